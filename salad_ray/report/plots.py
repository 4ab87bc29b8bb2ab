"""Figures as inline SVG: dots with intervals, lines, the cluster map.

They are drawn for a phone's width and take their ink from the page: colours are names of CSS variables, for which a
colour that occurs nowhere else stands in while matplotlib draws. The same data gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

WIDTH = 4.7
"""Inches: 338 points, so that text of 9 points stays readable where the page is 360 pixels wide."""
INK, FAINT = "#010100", "#010200"
COLOURS = {
    "untrained": "#010001",
    "stage1": "#010002",
    "stage2": "#010003",
    "control": "#010004",
    "base": "#010005",
    "cascade": "#010006",
}
MARKERS = {"untrained": "o", "stage1": "s", "stage2": "D", "control": "^", "base": "P", "cascade": "v"}
DASHES = ("solid", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_SETTINGS: Any = {
    "svg.hashsalt": "salad",
    "svg.fonttype": "none",
    "text.parse_math": False,  # `$` in a name is a dollar
    "axes.unicode_minus": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK),
    "axes.edgecolor": INK,
    "grid.color": FAINT,
}


@dataclass(frozen=True)
class Dot:
    """A value with its interval (where there is one) in the row `row` of a panel; hollow ones are drawn as outlines."""

    row: int
    series: str
    value: float
    low: float | None = None
    high: float | None = None
    hollow: bool = False


@dataclass(frozen=True)
class Panel:
    """A title ("" for none), the names of the rows from top to bottom, and what lies in them."""

    title: str
    rows: Sequence[str]
    dots: Sequence[Dot]


@dataclass(frozen=True)
class Line:
    """Points of one series, with intervals where there are any; `dash` tells runs apart."""

    series: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    dash: int = 0


@dataclass(frozen=True)
class Mark:
    """A point, with its interval where there is one; an open end is None."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """Points of one label in the colour of `series`; `fit` is a law through them: [x, y, low, high] each."""

    series: str
    label: str
    marks: Sequence[Mark]
    fit: Sequence[Sequence[float | None]] = ()


@dataclass(frozen=True)
class Spot:
    """A cluster on the map; `value` is M(c), None before it is measured."""

    x: float
    y: float
    share: float
    value: float | None
    label: str


def dot_plot(name: str, alt: str, panels: Sequence[Panel], x_label: str, log: bool = False) -> Markup:
    """Dots with intervals, one row for each name; panels one below the other, with the same x axis."""
    panels = [panel for panel in panels if panel.dots]
    heights = [len(panel.rows) + 0.6 for panel in panels]
    with mpl.rc_context(_SETTINGS):
        titles = sum(0.25 for panel in panels if panel.title)
        lanes = len({(dot.series, dot.hollow) for panel in panels for dot in panel.dots})
        figure = Figure((WIDTH, 0.55 + max(0.27, 0.1 * lanes) * sum(heights) + titles))
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
        for axes, panel in zip(grid[:, 0], panels, strict=True):
            _draw_dots(axes, panel, log)
        if log:
            _log_axis(grid[-1, 0].xaxis)
        else:
            grid[-1, 0].xaxis.set_major_locator(MaxNLocator(6))
        grid[-1, 0].set_xlabel(x_label)
        _fit(figure)
        return _svg(figure, name, alt)


def _draw_dots(axes: Axes, panel: Panel, log: bool) -> None:
    if panel.title:
        axes.set_title(_short(panel.title, 48), loc="left", fontweight="bold")
    series = list(dict.fromkeys((dot.series, dot.hollow) for dot in panel.dots))
    for dot in panel.dots:
        lane = series.index((dot.series, dot.hollow))
        y = dot.row + (lane - (len(series) - 1) / 2) * 0.72 / len(series)
        colour = COLOURS[dot.series]
        if dot.low is not None and dot.high is not None:
            low = max(dot.low, dot.value / 3) if log else dot.low  # a logarithm has no place for what is not positive
            axes.plot([low, dot.high], [y, y], color=colour, linewidth=1.4, solid_capstyle="butt")
        face = "none" if dot.hollow else colour
        axes.plot([dot.value], [y], MARKERS[dot.series], color=colour, markersize=4.5, markerfacecolor=face)
    if log:
        axes.set_xscale("log")
    axes.set_ylim(len(panel.rows) - 0.4, -0.6)
    axes.set_yticks(range(len(panel.rows)), [_short(row, 26) for row in panel.rows])
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelbottom=True)
    axes.grid(axis="x", linewidth=0.5)
    axes.set_axisbelow(True)


def line_plot(
    name: str,
    alt: str,
    lines: Sequence[Line],
    x_label: str,
    log: bool = False,
    x_ticks: Sequence[str] | None = None,
) -> Markup:
    """Lines over a numeric axis, or over named places where `x_ticks` are given; the caption says what they show."""
    with mpl.rc_context(_SETTINGS):
        figure = Figure((WIDTH, 2.6))
        axes = figure.subplots()
        for line in lines:
            colour, dash = COLOURS[line.series], DASHES[line.dash % len(DASHES)]
            every = -(-len(line.x) // 8)
            axes.plot(line.x, line.y, color=colour, linestyle=dash, linewidth=1.5)
            axes.plot(line.x[::every], line.y[::every], MARKERS[line.series], color=colour, markersize=4.5)
            if line.error is not None:
                axes.errorbar(line.x, line.y, line.error, fmt="none", ecolor=colour, elinewidth=1.2)
        if log:
            axes.set_yscale("log")
            _log_axis(axes.yaxis)
        else:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
        if x_ticks is not None:
            axes.set_xticks(range(len(x_ticks)), x_ticks)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel(x_label)
        axes.grid(axis="y", linewidth=0.5)
        axes.set_axisbelow(True)
        _fit(figure)
        return _svg(figure, name, alt)


def curve_plot(name: str, alt: str, curves: Sequence[Curve], x_label: str, log_x: bool = False) -> Markup:
    """Points with intervals over a numeric axis; a fitted law is drawn with its band, else the points are joined."""
    with mpl.rc_context(_SETTINGS):
        figure = Figure((WIDTH, 3.0))
        axes = figure.subplots()
        tops = [mark.high if mark.high is not None else mark.y for curve in curves for mark in curve.marks]
        for curve in curves:
            colour = COLOURS[curve.series]
            x, y = [mark.x for mark in curve.marks], [mark.y for mark in curve.marks]
            for mark in curve.marks:
                if mark.low is not None and mark.high is not None:
                    axes.plot([mark.x, mark.x], [mark.low, mark.high], color=colour, linewidth=1.4)
            axes.plot(x, y, MARKERS[curve.series], color=colour, markersize=4.5)
            if curve.fit:
                at, law, low, high = (np.array(part, float) for part in zip(*curve.fit, strict=True))
                axes.fill_between(at, low, np.nan_to_num(high, nan=max(tops)), color=colour, alpha=0.15, linewidth=0)
                axes.plot(at, law, color=colour, linewidth=1.5)
            else:
                axes.plot(x, y, color=colour, linewidth=1.2, linestyle="solid")
        axes.set_ylim(0.0, 1.08 * max(tops))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
        if log_x:
            axes.set_xscale("log")
            _log_axis(axes.xaxis)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
        axes.set_xlabel(x_label)
        axes.grid(axis="y", linewidth=0.5)
        axes.set_axisbelow(True)
        _fit(figure)
        return _svg(figure, name, alt)


def cluster_map(name: str, alt: str, spots: Sequence[Spot], colour_label: str, num_labelled: int = 40) -> Markup:
    """Clusters by place, moved apart where they would cover each other; area is the share, colour M(c)."""
    mean = sum(spot.share for spot in spots) / len(spots) or 1.0
    radius = min(9.0, 95 / math.sqrt(len(spots)))  # points, of the mean cluster
    radii = radius * np.sqrt([max(spot.share / mean, 0.1) for spot in spots])
    places = apart(np.array([(spot.x, spot.y) for spot in spots]), radii, box=(320.0, 230.0))
    values = [spot.value for spot in spots if spot.value is not None]
    shades = ScalarMappable(Normalize(min(values, default=0.0), max(values, default=1.0)), "cividis")
    with mpl.rc_context(_SETTINGS):
        low, high = (places - radii[:, None]).min(axis=0) - 3, (places + radii[:, None]).max(axis=0) + 3
        width, height = high - low
        figure = Figure((WIDTH, WIDTH * height / width + (0.55 if values else 0.0)))
        axes = figure.subplots()
        axes.set_aspect("equal")
        axes.set_xlim(low[0], high[0])
        axes.set_ylim(low[1], high[1])
        axes.axis("off")
        for rank, (spot, place, size) in enumerate(zip(spots, places, radii, strict=True)):
            face: Any = "none" if spot.value is None else tuple(shades.to_rgba(np.array([spot.value]))[0])
            axes.add_patch(Circle(place, size, facecolor=face, edgecolor=INK, linewidth=0.7))
            if rank < num_labelled:
                ink = INK if face == "none" else "#ffffff" if sum(face[:3]) < 1.5 else "#000000"
                style: Any = {"ha": "center", "va": "center_baseline", "fontsize": 0.85 * size}
                axes.text(place[0], place[1], spot.label, color=ink, **style)
        if values:
            bar = figure.colorbar(shades, ax=axes, orientation="horizontal", pad=0.02, aspect=30, fraction=0.06)
            bar.set_label(colour_label)
            bar.outline.set_visible(False)
        _fit(figure)
        return _svg(figure, name, alt)


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


def is_wide(values: Sequence[float]) -> bool:
    """Whether positive values differ so much that only a logarithmic axis shows them all."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > 8


def _log_axis(axis: mpl.axis.Axis) -> None:
    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if low > 0 else 1.0
    steps = (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    axis.set_minor_formatter(NullFormatter())


def _number(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g} M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g} k"
    return f"{value:.6g}".replace("-", "−")


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _fit(figure: Figure) -> None:
    figure.tight_layout(pad=0.4)
    figure.tight_layout(pad=0.4)  # the first may have changed the number of ticks, and so the width of their labels


def _svg(figure: Figure, name: str, alt: str) -> Markup:
    """The figure as an element of the page: its ids made unique by `name`, its colours the page's, `alt` its label."""
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has fonts of its own
        FigureCanvasSVG(figure).print_svg(file, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, "matplotlib's SVG has no viewBox"
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'((?:xlink:)?href)="#', rf'\1="#{name}-', body).replace("url(#", f"url(#{name}-")
    for series, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{series})")
    body = body.replace(INK, "currentColor").replace(FAINT, "var(--line)")
    return Markup(f'<svg class="plot" role="img" aria-label="{escape(alt)}" {box.group()}>{body}')
