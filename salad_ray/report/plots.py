"""Figures as inline SVG: dots in rows of names, lines over numbers, the cluster map.

They are drawn for a phone's width and take their ink from the page: colours are names of CSS variables, for which a
colour that occurs nowhere else stands in while matplotlib draws. The same data gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from salad_ray.names import BASE, CASCADE, CONTROL, STAGE1, STAGE2, UNTRAINED
from salad_ray.report import words
from salad_ray.report.blocks import Figure
from salad_ray.report.rows import Row, ordered

WIDTH = 4.7
"""Inches: 338 points, so that text of 9 points stays readable where the page is 360 pixels wide."""
MAX_ROWS = 60
"""Rows of a figure; tables have them all."""
Z95 = 1.96
INK, FAINT = "#010100", "#010200"
MARKERS = {
    **{UNTRAINED: ("o", "●"), STAGE1: ("s", "■"), STAGE2: ("D", "◆")},
    **{CONTROL: ("^", "▲"), BASE: ("P", "✚"), CASCADE: ("v", "▼")},
}
"""Of a system, in matplotlib and in a legend; its colour is the page's variable of its name."""
COLOURS = {system: f"#0100{place:02}" for place, system in enumerate(MARKERS, 1)}
_LOGARITHMIC = " The scale is logarithmic."
DASHES: Any = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_SETTINGS: Any = {
    "svg.hashsalt": "salad",
    "svg.fonttype": "none",
    "text.parse_math": False,  # `$` in a name is a dollar
    "axes.unicode_minus": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "lines.markersize": 4.5,
    **dict.fromkeys(("font.size", "axes.labelsize", "axes.titlesize"), 9),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True)
class Mark:
    """A value, with its interval where there is one, at a name or a number; hollow ones are drawn as outlines.

    Marks of a system (or of a label, in a system's colour) and a run are a series.
    """

    system: str
    at: Any
    value: float
    low: float | None = None
    high: float | None = None
    run: str = ""
    label: str = ""
    hollow: bool = False

    @property
    def name(self) -> str:
        return self.label or words.SYSTEM_NAMES[self.system]


def marks_of(rows: Iterable[Row], quantity: str, at: Callable[[Row], Any]) -> list[Mark]:
    """Means with their 95 % intervals, of those rows that have the quantity."""
    found = []
    for row in rows:
        value, error = row.get(quantity), row.get(f"{quantity}_standard_error")
        if words.finite(value):
            low, high = (value - Z95 * error, value + Z95 * error) if words.finite(error) else (None, None)
            found.append(Mark(row["system"], at(row), value, low, high, row.get("run", ""), row.get("label", "")))
    return found


@mpl.rc_context(_SETTINGS)
def dot_plot(name: str, caption: str, marks: Sequence[Mark], x_label: str, may_be_log: bool = False) -> list[Figure]:
    """Dots with intervals, a row for each name that they are at, the rows of each run below its title.

    Args:
        name: where no other figure of the page has it.

    Returns:
        The figure; without marks none.
    """
    if not marks:
        return []
    log, series = may_be_log and _is_wide(marks), ordered((mark.system, mark.hollow) for mark in marks)
    rows: list[tuple[str, str]] = []
    for run in ordered(mark.run for mark in marks):
        names = ordered(mark.at for mark in marks if mark.run == run)
        rows += [*([(run, "")] if run else []), *((run, name) for name in names[:MAX_ROWS])]
        caption += f" The first {MAX_ROWS} of {len(names)} rows." if len(names) > MAX_ROWS else ""
    drawing = Drawing((WIDTH, 0.55 + max(0.27, 0.1 * len(series)) * (len(rows) + 0.6)))
    axes = drawing.subplots()
    for mark in (mark for mark in marks if (mark.run, mark.at) in rows):
        lane = series.index((mark.system, mark.hollow)) - (len(series) - 1) / 2
        y, colour = rows.index((mark.run, mark.at)) + lane * 0.72 / len(series), COLOURS[mark.system]
        axes.hlines(*_spans([mark], [y], log), color=colour, linewidth=1.4)
        face = "none" if mark.hollow else colour
        axes.plot([mark.value], [y], MARKERS[mark.system][0], color=colour, markerfacecolor=face)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [_short(at or run) for run, at in rows])
    for (_, at), label in zip(rows, axes.get_yticklabels(), strict=True):
        label.set_fontweight("normal" if at else "bold")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    _scale(axes, "x", log)
    axes.set_xlabel(x_label)
    told = [f"{mark.run} {mark.name}, {mark.at}: {mark.value:.4g}".strip() for mark in marks if not mark.hollow]
    caption += _LOGARITHMIC * log
    return [_figure(drawing, name, caption, told[:MAX_ROWS], marks)]


@mpl.rc_context(_SETTINGS)
def line_plot(
    name: str,
    caption: str,
    marks: Sequence[Mark],
    x_label: str,
    may_be_log: bool = False,
    log_x: bool = False,
    fits: Mapping[str, Sequence[Sequence[float | None]]] | None = None,
) -> list[Figure]:
    """A line for each series, over numbers or names; runs differ in their dashes.

    Args:
        fits: for a label the law that is drawn with its band instead, as [x, y, low, high] at each point.
    """
    if not marks:
        return []
    log, runs = may_be_log and _is_wide(marks), ordered(mark.run for mark in marks)
    names = ordered(mark.at for mark in marks) if isinstance(marks[0].at, str) else []
    top = max(mark.value if mark.high is None else mark.high for mark in marks)
    drawing = Drawing((WIDTH, 2.8))
    axes = drawing.subplots()
    told = []
    for run, label in ordered((mark.run, mark.name) for mark in marks):
        own = [mark for mark in marks if (mark.run, mark.name) == (run, label)]
        x: Any = [names.index(mark.at) if names else mark.at for mark in own]
        y: Any = [mark.value for mark in own]
        colour, every = COLOURS[own[0].system], -(-len(x) // 8) if len(x) > 16 else 1
        axes.vlines(*_spans(own, x, log), color=colour, linewidth=1.4)
        axes.plot(x[::every], y[::every], MARKERS[own[0].system][0], color=colour)
        if fit := (fits or {}).get(label):
            x, y, low, high = (np.array(part, float) for part in zip(*fit, strict=True))
            axes.fill_between(x, low, np.nan_to_num(high, nan=top), color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, y, color=colour, linewidth=1.5, linestyle=DASHES[runs.index(run) % len(DASHES)])
        ends = (f"{mark.value:.3g} at {mark.at if names else f'{mark.at:,.4g}'}" for mark in (own[0], own[-1]))
        told.append(f"{run} {label} from {' to '.join(ends)}".strip())
    _scale(axes, "y", log)
    if not log:
        axes.set_ylim(min(0.0, *(mark.value for mark in marks)), 1.08 * top if top > 0 else None)
    if names:
        axes.set_xticks(range(len(names)), names)
    else:
        _scale(axes, "x", log_x, integer=all(isinstance(mark.at, int) for mark in marks))
    axes.set_xlabel(x_label)
    axes.grid(axis="y")
    caption += _LOGARITHMIC * log
    return [_figure(drawing, name, caption, told, marks, runs if len(runs) > 1 else ())]


@mpl.rc_context(_SETTINGS)
def cluster_map(name: str, clusters: Sequence[Row], num_labelled: int = 40) -> Figure:
    """Clusters by place, moved apart where they would cover each other; area is the share, colour M(c)."""
    shares, places = (np.array([cluster[key] for cluster in clusters]) for key in ("web_share", "place"))
    radius = min(9.0, 95 / math.sqrt(len(shares)))  # points, of the mean cluster
    radii = radius * np.sqrt(np.maximum(shares / (shares.mean() or 1.0), 0.1))
    places = apart(places, radii, box=(320.0, 230.0))
    values = np.array([cluster.get("distillation") for cluster in clusters], float)
    known = np.isfinite(values)
    low, high = (places - radii[:, None]).min(axis=0) - 3, (places + radii[:, None]).max(axis=0) + 3
    width, height = high - low
    drawing = Drawing((WIDTH, WIDTH * height / width + 0.55 * known.any()))
    axes = drawing.subplots()
    axes.set(aspect="equal", xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    axes.axis("off")
    style: Any = {"units": "xy", "offsets": places, "offset_transform": axes.transData, "edgecolors": INK}
    style |= {"array": np.ma.masked_invalid(values), "cmap": "cividis"} if known.any() else {"facecolors": "none"}
    discs = EllipseCollection(2 * radii, 2 * radii, np.zeros(len(radii)), linewidths=0.7, **style)
    axes.add_collection(discs)
    if known.any():
        bar = drawing.colorbar(discs, ax=axes, orientation="horizontal", pad=0.02, aspect=30, fraction=0.06)
        bar.set_label("M(c), nats per position")
        bar.outline.set_visible(False)
    is_dark = discs.to_rgba(values)[:, :3].sum(axis=1) < 1.5
    for rank, (place, size, cluster) in enumerate(zip(places, radii, clusters, strict=True)):
        if rank < num_labelled:
            ink = INK if not known[rank] else "#ffffff" if is_dark[rank] else "#000000"
            text: Any = {"ha": "center", "va": "center_baseline", "fontsize": 0.85 * size, "color": ink}
            axes.text(place[0], place[1], str(cluster["cluster_id"]), **text)
    caption = (
        "Centroids on their first two principal components, moved apart where they would cover each other; area is the "
        "share of the web text, colour M(c)."
    )
    largest = [f"{each['cluster_id']} with {value:.3f}" for each, value in zip(clusters, values, strict=True)]
    told = f"Largest M(c): {', '.join(largest[:5])}" if known.any() else "M(c) is not measured yet"
    return _figure(drawing, name, caption, [f"{len(clusters)} clusters. {told}"])


def apart(places: np.ndarray, radii: np.ndarray, box: tuple[float, float], num_rounds: int = 300) -> np.ndarray:
    """Places (K, 2) scaled into a box, with discs (K,) that overlap pushed apart, always in the same way."""
    low, high = places.min(axis=0), places.max(axis=0)
    places = (places - low) / np.where(high > low, high - low, 1.0) * box
    # Discs at the very same place need a direction: one turn of the golden angle for each.
    angles = np.arange(len(places)) * 2.399963
    places = places + 0.01 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    least = radii[:, None] + radii[None, :] + 1.0
    for _ in range(num_rounds):
        offset = places[:, None] - places[None, :]
        distance = np.sqrt((offset**2).sum(axis=-1))
        np.fill_diagonal(distance, np.inf)
        overlap = np.maximum(least - distance, 0.0)
        if not overlap.any():
            break
        places = places + 0.4 * (offset / distance[..., None] * overlap[..., None]).sum(axis=1)
    return places


def _spans(marks: Sequence[Mark], places: Sequence[float], log: bool) -> tuple[list[float], list[float], list[float]]:
    """Places and ends of the intervals; on a logarithmic axis there is no place for what is not positive."""
    found = [
        (place, max(mark.low, mark.value / 3) if log else mark.low, mark.high)
        for mark, place in zip(marks, places, strict=True)
        if mark.low is not None and mark.high is not None
    ]
    return [at for at, *_ in found], [low for _, low, _ in found], [high for *_, high in found]


def _is_wide(marks: Sequence[Mark]) -> bool:
    """Whether positive values differ so much that only a logarithmic axis shows them all."""
    values = [mark.value for mark in marks]
    return min(values) > 0 and max(values) / min(values) > 8


def _scale(axes: Axes, which: str, log: bool = False, integer: bool = False) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(6, integer=integer))
    if log:
        axes.set(**{f"{which}scale": "log"})
        low, high = axis.get_view_interval()
        decades = math.log10(high / low) if low > 0 else 1.0
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: words.short(value)))


def _short(text: str, length: int = 26) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _figure(
    drawing: Drawing,
    name: str,
    caption: str,
    told: Sequence[str],
    marks: Sequence[Mark] = (),
    runs: Sequence[str] = (),
) -> Figure:
    """The drawing as an element of the page: its ids made unique by `name`, its colours the page's; who cannot see
    it is told the caption and `told`. The legend has the series of the marks, and the dashes of runs."""
    for _ in range(2):  # the first may change the number of ticks, and so the width of their labels
        drawing.tight_layout(pad=0.4)
    for patch in (drawing.patch, *(axes.patch for axes in drawing.axes)):
        patch.set_alpha(0)
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has fonts of its own
        FigureCanvasSVG(drawing).print_svg(file, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, "matplotlib's SVG has no viewBox"
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'((?:xlink:)?href)="#', rf'\1="#{name}-', body).replace("url(#", f"url(#{name}-")
    for system, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{system})")
    body = body.replace(INK, "currentColor").replace(FAINT, "var(--line)")
    alt = escape(f"{caption} {'; '.join(told)}.")
    legend = ordered((MARKERS[mark.system][1], mark.system, "", mark.name) for mark in marks)
    dashes = ["none", *(" ".join(map(str, dash)) for _, dash in DASHES[1:])]
    legend += [("", "", dashes[place % len(dashes)], run) for place, run in enumerate(runs)]
    return Figure(Markup(f'<svg class="plot" role="img" aria-label="{alt}" {box.group()}>{body}'), caption, legend)
