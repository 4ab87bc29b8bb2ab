"""The page in a real Chromium: it loads without a word, its audio plays, its figures are there, and it fits a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report.page_run import SECS, make_run

from salad_ray.report.page import write_page
from salad_ray.runs import open_places

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--autoplay-policy=no-user-gesture-required"),
)
PLAY = """async audio => {
    await audio.play();
    const until = Date.now() + 5000;
    while (audio.currentTime < 0.2 && Date.now() < until) await new Promise(done => setTimeout(done, 50));
    audio.pause();
    return {time: audio.currentTime, state: audio.readyState, secs: audio.duration, error: audio.error};
}"""
PLOTS = """all => all.map(svg => ({
    width: svg.getBoundingClientRect().width, height: svg.getBoundingClientRect().height,
    marks: svg.querySelectorAll('path, use').length, words: svg.textContent.trim().length,
    label: svg.getAttribute('aria-label'),
}))"""
TORN = """all => all.filter(one => getComputedStyle(one).breakInside !== 'avoid').length"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="no browser: playwright is not installed")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if binary is None:
        pytest.skip("no browser: Chromium is not installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=binary, args=list(FLAGS))
        yield running
        running.close()


@pytest.fixture(scope="module", params=["one run", "two runs"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    run_dirs = [make_run(folder / "active", text="<script>alert('never')</script> A judge signs.")]
    if request.param == "two runs":
        run_dirs.append(make_run(folder / "uniform", gamma=0.0, stage2=0.9))
    write_page([open_places(each)[0] for each in run_dirs], str(folder / "page.html"))
    return (folder / "page.html").as_uri()


class Visit:
    """A page with what it asked for and complained about."""

    def __init__(self, browser: Any, url: str, **settings: Any) -> None:
        self.context = browser.new_context(**settings)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", lambda request: self.complaints.append(f"failed: {request.url[:100]}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: (self.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.goto(url)

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


def test_it_loads_alone_and_without_complaint(browser: Any, url: str) -> None:
    with Visit(browser, url) as visit:
        visit.page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
        visit.page.wait_for_timeout(200)
        assert visit.complaints == []
        assert [request for request in visit.requests if not request.startswith("data:")] == [url]


def test_audio_plays(browser: Any, url: str) -> None:
    with Visit(browser, url) as visit:
        players = visit.page.query_selector_all("audio")
        assert players
        for player in (players[0], players[-1]):
            heard = player.evaluate(PLAY)
            assert heard["error"] is None
            assert heard["time"] >= 0.2
            assert heard["state"] >= 2
            assert heard["secs"] == pytest.approx(SECS, abs=0.2)
        assert visit.complaints == []


def test_figures_are_there(browser: Any, url: str) -> None:
    with Visit(browser, url) as visit:
        plots = visit.page.eval_on_selector_all("svg.plot", PLOTS)
        assert len(plots) >= 11
        for plot in plots:
            assert plot["width"] > 200, plot
            assert plot["height"] > 60, plot
            assert plot["marks"] > 5, plot
            assert plot["words"] > 3, plot
            assert plot["label"], plot


def test_it_fits_a_phone(browser: Any, url: str) -> None:
    with Visit(browser, url, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True) as visit:
        visit.page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
        widths = visit.page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]")
        assert max(widths) <= 360
        sizes = visit.page.eval_on_selector_all(
            "p, td, th, summary", "all => all.map(one => parseFloat(getComputedStyle(one).fontSize))"
        )
        assert min(sizes) >= 12


def test_light_and_dark_are_readable(browser: Any, url: str) -> None:
    """WCAG's contrast of 4.5 for text and 3 for marks, in both schemes."""
    papers = set()
    for scheme in ("light", "dark"):
        with Visit(browser, url, color_scheme=scheme) as visit:
            colours = visit.page.evaluate(
                "['paper', 'ink', 'soft', 'link', 'up', 'down', 'untrained', 'stage1', 'stage2', 'control', 'base', "
                "'cascade'].map(name => [name, getComputedStyle(document.documentElement)"
                ".getPropertyValue('--' + name).trim()])"
            )
        found = dict(colours)
        papers.add(found["paper"])
        for name, colour in found.items():
            least = 4.5 if name in ("ink", "soft", "link", "up", "down") else 3.0
            assert name == "paper" or contrast(colour, found["paper"]) >= least, (scheme, name, colour)
    assert len(papers) == 2


def contrast(one: str, other: str) -> float:
    first, second = sorted((luminance(one), luminance(other)))
    return (second + 0.05) / (first + 0.05)


def luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    parts = (int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_it_prints(browser: Any, url: str, tmp_path: Path) -> None:
    with Visit(browser, url, color_scheme="dark") as visit:
        data = visit.page.pdf(path=tmp_path / "page.pdf", format="A4")
        assert data.startswith(b"%PDF")
        visit.page.emulate_media(media="print", color_scheme="dark")
        paper = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == "rgb(255, 255, 255)"
        assert not visit.page.is_visible("audio")
        assert not visit.page.is_visible("nav")
        assert visit.page.eval_on_selector_all("figure, tr, .whole", TORN) == 0
