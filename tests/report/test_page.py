"""The page of a run: what it says, that nothing is missing in silence, and that data cannot write HTML."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from factories import hand_table, keep_run
from report.page_run import SECS, make_run

from salad_ray.report import facts as reading
from salad_ray.report.facts import collect, encode_mp3, principal_places, reason_shape
from salad_ray.report.page import run_names, write_page
from salad_ray.report.plots import Mark, apart, dot_plot
from salad_ray.runs import open_places
from salad_ray.tables import TableError, read_bytes, write_bytes

ATTACK = '<script>alert(1)</script><img src=x onerror="alert(2)"> "\'><svg onload=alert(3)> $x^{ '
SECTIONS = ("headline", "accuracy", "misalignment", "training", "clusters", "scaling", "rejects", "lineage")


class Reader(HTMLParser):
    """Text, tags and attributes of a page; the text of a section by its id."""

    VOID = frozenset({"meta", "link", "br", "img", "path", "use"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.section = ""
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text[self.section] = self.text.get(self.section, "") + data


def page_of(target: Path, *run_dirs: str) -> Reader:
    write_page([open_places(run_dir)[0] for run_dir in run_dirs], str(target))
    return Reader(target.read_text())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_run(tmp_path_factory.mktemp("runs") / "active")


@pytest.fixture(scope="module")
def page(run_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return page_of(tmp_path_factory.mktemp("page") / "page.html", run_dir)


def test_the_headline_says_what_was_found(page: Reader) -> None:
    text = page.text["headline"]
    assert "2.250 before training, 0.390 after Stage I and 0.115 after Stage II" in text
    assert "natural speech instead of Stage II leaves it at 0.388" in text
    assert "after Stage I 0.120 and 1.200, after Stage II 0.100 and 0.160" in text
    assert "AUC 1.000 interleaved, 0.875 whole" in text
    assert "Where all but the last words are spoken it is" in text
    assert "−1.250" in page.text["misalignment"].replace("-", "−")
    assert "15.0 (10.0 to 20.0) for Stage II" in text
    for fact in ("the embedded world's tiny LM (773,760 parameters)", "log_mel (12.5 frames/s, 640 wide)", "10.5 h"):
        assert fact in text


def test_the_gap_table_has_intervals_and_footnotes(page: Reader) -> None:
    text = page.text["accuracy"]
    for cell in (
        "15.0",
        "10.0 to 20.0",
        "< 0.001",
        "95.0 % (90.0 to 100.0)",
        "world, unheard domains",
        "telephone",
        "Stage II, reading",
    ):
        assert cell in text
    assert "† Items without a single best answer (ties): world, Stage I hearing 3 of 200." in text
    assert "‡ Items with fewer exemplars than asked for: world, Stage II hearing 7 of 200." in text
    assert "Word error rate of the recogniser: world, cascade hearing 12.5 %." in text


def test_the_hearing_margin_leads_and_the_deaf_are_called_deaf(page: Reader) -> None:
    text = page.text["headline"]
    assert "is 3.0 (−2.0 to 8.0) for Stage I and 53.0 (45.0 to 60.0) for Stage II (95 % intervals)" in text
    assert (
        "Stage I is deaf on world; world, unheard domains: hearing the question is no better than hearing silence"
        in text
    )
    assert "Stage II is deaf" not in text
    accuracy = page.text["accuracy"]
    assert accuracy.index("Hearing margin, choices scored whole") < accuracy.index("Text-speech gap, choices")
    for cell in ("chance", "27.0 % (20.0 to 35.0)", "45.0 to 60.0", "deaf", "hears", "hollow marks: silence"):
        assert cell in accuracy
    table = accuracy[accuracy.index("Robustness") :]
    assert "telephone" in table
    assert "silence" not in table  # a floor, and no disturbance


def test_clusters_have_passages_their_loss_and_players(page: Reader, run_dir: str) -> None:
    text = page.text["clusters"]
    assert "Cluster 0: judge, signs" in text
    assert text.index("Cluster 0:") < text.index("Cluster 1:")  # the larger M(c) comes first
    assert "loss 1.500" in text  # 2 × 6 nats over 2 × 4 positions
    players = [attributes for tag, attributes in page.tags if tag == "audio"]
    assert len(players) == 2 * (2 + 1)  # of each cluster two probe passages and an active one
    assert all((player["src"] or "").startswith("data:audio/mpeg;base64,") for player in players)
    assert all(player["preload"] == "none" and player["aria-label"] for player in players)
    clip = collect(open_places(run_dir)[0]).clusters[0]["clips"][0]
    samples, rate = soundfile.read(io.BytesIO(clip["audio"]))
    assert len(samples) / rate == pytest.approx(SECS, abs=0.15)
    assert np.abs(samples).max() > 0.1


def test_rejects_are_grouped_and_counted(page: Reader) -> None:
    text = page.text["rejects"]
    assert text.count("below min_level_dbfs=n") == 1
    assert "p7: silent: -80.1 dBFS" in text
    assert "3 rejects were read of 3 that the manifests count" in text


def test_cost_and_lineage_are_told(page: Reader) -> None:
    text = page.text["lineage"]
    for fact in ("web/passages", "1:01", "f00d-1", "passages cafe-2", "2026-11-21T12:00:00Z", "teacher: world"):
        assert fact in text


def test_the_page_is_whole_and_accessible(page: Reader) -> None:
    assert page.open == []
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section"] == list(SECTIONS)
    plots = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("class") == "plot"]
    assert len(plots) == 1 + 1 + 8 + 4 + 1
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in plots)
    headers = [attributes for tag, attributes in page.tags if tag == "th"]
    assert headers
    assert all(header.get("scope") in ("col", "row", "colgroup") for header in headers)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_nothing_is_loaded_from_elsewhere(page: Reader) -> None:
    assert not {"script", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "data", "action", "style", "clip-path"):
            value = attributes.get(name) or ""
            assert "//" not in value.split(",")[0], (tag, name, value[:80])
    policies = [attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes]
    assert len(policies) == 1
    assert "default-src 'none'" in (policies[0] or "")


def test_data_cannot_write_html(tmp_path: Path) -> None:
    """A passage, a domain and a run that are called like an attack come out as the text that they are."""
    run_dir = make_run(tmp_path / '<b onclick="x">$', domains=(ATTACK, "_stars"), text=ATTACK)
    read = page_of(tmp_path / "page.html", run_dir)
    tags = {tag for tag, _ in read.tags}
    assert not tags & {"script", "img", "b"}
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    assert ATTACK.strip() in read.text["clusters"]
    assert ATTACK.strip() in read.text["misalignment"]
    assert '<b onclick="x">$' in read.text[""]


def test_the_same_run_gives_the_same_bytes(run_dir: str, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_page([open_places(run_dir)[0]], str(tmp_path / name))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_runs_are_compared(run_dir: str, tmp_path: Path) -> None:
    other = make_run(tmp_path / "uniform", gamma=0.0, stage2=0.9)
    read = page_of(tmp_path / "page.html", run_dir, other)
    assert "active · uniform" in read.text[""]
    settings = read.text["lineage"].split("Settings that differ")[1].split("Cost of")[0]
    assert "select.gamma" in settings
    assert "distill.alpha" not in settings
    assert "0.900 ± 0.045▲" in read.text["misalignment"]  # unheard, Stage II: above the first run
    assert "1.200 ± 0.060▲" not in read.text["misalignment"]  # Stage I is the same
    assert "γ of the selection50≠" in read.text["headline"]


def test_a_run_that_has_only_begun_says_what_to_run(tmp_path: Path) -> None:
    keep_run(tmp_path / "run", {"seed": 1}, [])
    read = page_of(tmp_path / "page.html", f"{tmp_path}/run")
    for section, command in (
        ("headline", "salad measure CONFIG"),
        ("accuracy", "salad evaluate CONFIG"),
        ("misalignment", "salad measure CONFIG"),
        ("training", "salad stage1 CONFIG"),
        ("clusters", "salad cluster CONFIG"),
        ("scaling", "salad sweep CONFIG"),
        ("lineage", "salad run CONFIG"),
    ):
        assert command in read.text[section], section
    assert "Nothing was left out" in read.text["rejects"]


def test_unfinished_training_and_damage_are_told(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    table = hand_table(run_dir, "stage2")
    table.delete()
    write_bytes(f"{table.url}/begun.json", b'{"stage": "stage2"}')
    write_bytes(f"{table.url}/progress.json", b'{"step": 30, "num_steps": 50}')
    rejects = hand_table(run_dir, "web/passages").rejects.url
    write_bytes(f"{rejects}/part-00001.parquet", b"not Parquet")
    write_bytes(f"{open_places(run_dir)[0].report_url}/metrics.json", b"{")
    read = page_of(tmp_path / "page.html", run_dir)
    assert "unfinished: step 30 of 50" in read.text["training"]
    assert f"{rejects}/part-00001.parquet is damaged" in read.text[""]
    assert "metrics.json is damaged" in read.text[""]
    assert "Cluster 0" in read.text["clusters"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=r"holds no run; name a run_dir"):
        open_places(str(tmp_path))
    with pytest.raises(TableError, match="no run was named"):
        write_page([], str(tmp_path / "page.html"))


def test_audio_keeps_to_its_budget_and_every_cluster_comes_first(run_dir: str) -> None:
    one = round(SECS * reading.CLIP_BYTES_PER_SEC * 4 / 3)
    facts = collect(open_places(run_dir)[0], clip_bytes=2 * one)
    assert [len(cluster["clips"]) for cluster in facts.clusters] == [1, 1]
    assert facts.num_clips_left_out == 4
    assert collect(open_places(run_dir)[0], clip_bytes=0).num_clips_left_out == 6


def test_rejects_and_shards_are_read_within_bounds(run_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_REASONS", 1)
    facts = collect(open_places(run_dir)[0], clip_bytes=0)
    assert [(group["reason"][:6], group["count"]) for group in facts.rejects] == [("silent", 2), ("other ", 1)]
    monkeypatch.setattr(reading, "MAX_REJECTS", 0)
    assert collect(open_places(run_dir)[0], clip_bytes=0).rejects == []


@pytest.mark.parametrize(
    ("reason", "shape"),
    [
        ("clipped: 1.2% of the samples, above 0.1%", "clipped: n% of the samples, above n%"),
        ("language 'de' is not among en, fr", "language '…' is not among en, fr"),
        ("no such audio file: s3://a/b-1.flac", "no such audio file: …"),
        ("numbers and/or dates", "numbers and/or dates"),
    ],
)
def test_reasons_have_shapes(reason: str, shape: str) -> None:
    assert reason_shape(reason) == shape


def test_runs_of_one_name_are_told_apart() -> None:
    assert run_names(["runs/a", "s3://b/runs/c/"]) == ["a", "c"]
    assert run_names(["x/run", "y/run"]) == ["x/run", "y/run"]
    assert run_names(["x/run", "x/run"]) == ["x/run (1)", "x/run (2)"]


def test_the_map_keeps_its_place_and_its_distance() -> None:
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(size=(20, 5)), np.ones((5, 5))]).astype(np.float32)
    places = np.array(principal_places(list(points)))
    np.testing.assert_allclose(places, principal_places(list(points)))
    expected = np.linalg.svd(points - points.mean(axis=0))[1][:2] / np.sqrt(len(points))
    np.testing.assert_allclose(places.std(axis=0), expected, rtol=1e-4)
    radii = np.full(len(points), 6.0)
    moved = apart(places, radii, (320.0, 230.0))
    distance = np.linalg.norm(moved[:, None] - moved[None], axis=-1) + 100 * np.eye(len(points))
    assert distance.min() > 11.5
    assert principal_places([np.ones(3, np.float32)]) == [(0.0, 0.0)]


def test_a_logarithmic_axis_takes_intervals_below_zero() -> None:
    marks = [Mark("stage1", "a", 0.01, -0.02, 0.04), Mark("stage2", "b", 2.0, 1.9, 2.1)]
    [figure] = dot_plot("x", "caption", marks, "nats", may_be_log=True)
    svg = figure.svg
    assert [figure] == dot_plot("x", "caption", marks, "nats", may_be_log=True)
    assert "logarithmic" in svg
    assert "nan" not in svg
    assert re.search(r"var\(--stage1\)", svg)


def test_mp3_is_as_long_as_announced() -> None:
    data = encode_mp3(np.zeros(16_000 * 4, np.float32))
    assert len(data) == pytest.approx(4 * reading.CLIP_BYTES_PER_SEC, rel=0.08)


def test_runs_and_pages_may_lie_in_an_object_store() -> None:
    run_dir = make_run("memory://bucket/run")
    write_page([open_places(run_dir)[0]], "memory://bucket/page.html")
    assert "Cluster 0: judge, signs" in Reader(read_bytes("memory://bucket/page.html").decode()).text["clusters"]
