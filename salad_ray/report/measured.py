"""Misalignment M and forgetting F: rows of what was measured, and their tables and figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise

from salad_ray.names import UNTRAINED
from salad_ray.report import words
from salad_ray.report.blocks import Cell, Figure, Section, Table
from salad_ray.report.facts import RunFacts
from salad_ray.report.metrics import MEASURED
from salad_ray.report.plots import Z95, dot_plot, line_plot, marks_of
from salad_ray.report.rows import Numbers, Row, beside_first, of, pivoted, rows_of

QUANTITIES = {
    "misalignment": "Misalignment M",
    "misalignment_whole": "M, all but the last words spoken",
    "forgetting": "Forgetting F",
    "forgetting_whole": "F at the last words",
}
SIDES = {None: "all", True: "heard", False: "unheard"}
_PARTS: dict[str, tuple[str, Mapping[str, Callable[[Row], str]]]] = {
    "domain": ("by domain", {"domain": of("name"), "heard": of("side")}),
    "distance": ("by text tokens since the speech", {"tokens": of("name")}),
    "side": ("in domains that were heard in training or not", {"domains": of("name"), "passages": of("num_passages")}),
}
RECORDED = ", held-out recordings"
_LETTERS = {"misalignment": "M", "forgetting": "F"}


def misalignment(runs: Sequence[RunFacts]) -> Section:
    """M and F by domain and by distance, of spoken text and, where there are any, of held-out recordings."""
    spoken = {run.title: run.metrics for run in runs}
    recorded = {run.title: run.metrics.get("recorded") or {} for run in runs}
    figures: list[Figure] = []
    tables: list[Table] = []
    for numbers, what, name in (
        (spoken, ", spoken text" if any(recorded.values()) else "", "spoken"),
        (recorded, RECORDED, "recorded"),
    ):
        figures += measured_figures(numbers, what, name)
        tables += [*measured_tables(numbers, what, ("domain", "distance")), *difference_tables(numbers, what)]
    intro = (
        "Misalignment M is the divergence between what the model expects after text and after the same text partly "
        "spoken; forgetting F that between the text LLM and the model, both reading. Both are 0 for a perfect listener."
    )
    nothing = "Nothing measured yet: run `salad measure CONFIG` and then `salad report CONFIG`."
    title = "Misalignment and forgetting, before and after"
    return Section("misalignment", "Misalignment, forgetting", title, [*figures, *tables], nothing, [intro])


def measured_rows(numbers: Numbers) -> list[Row]:
    """A row for each run, system and part of the passages, with the means of all quantities and their standard errors.

    A part is "all", a "side" (all domains that were heard, or all others), a "domain" or a "distance" from the speech.
    Rows come in the order in which they are shown; `side` says whether a domain was heard, in all runs.
    """
    rows: list[Row] = []
    for run, metrics in numbers.items():
        for system in (name for name in MEASURED if isinstance(metrics.get(name), dict)):
            facts = metrics[system]
            domains, distances = facts.get("by_domain", {}), facts.get("by_distance", {})
            parts = [_side(domains.values(), heard) for heard in SIDES if heard is not None]
            parts += [{"part": "domain", "name": name or "all text"} | row for name, row in domains.items()]
            parts += [{"part": "distance", "start": int(start)} | row for start, row in distances.items()]
            parts += [{"part": "all", "name": "mean", "side": "", "heard": None} | facts]
            rows += [{"run": run, "system": system} | part for part in parts if part]
    own = {part: [row for row in rows if row["part"] == part] for part in ("domain", "distance")}
    heard = {(row["name"], row["heard"]) for row in own["domain"]}
    for row in own["domain"]:
        row["side"] = "differs" if (row["name"], not row["heard"]) in heard else "yes" if row["heard"] else "no"
    starts = sorted({row["start"] for row in own["distance"]})
    ends = dict(pairwise(starts))
    for row in own["distance"]:
        start, last = row["start"], ends.get(row["start"], math.inf) - 1
        row["name"] = f"{start}+" if last == math.inf else f"{start}–{last}" if last > start else str(start)
    own["domain"].sort(key=lambda row: (row["side"] != "yes", row["name"]))
    own["distance"].sort(key=lambda row: row["start"])
    return [*own["domain"], *own["distance"], *(row for row in rows if row["part"] not in own)]


def _side(domains: Iterable[Row], heard: bool) -> Row:
    """Means over heard or unheard domains, weighted by their positions; domains are independent of each other."""
    rows = [row for row in domains if row["heard"] is heard]
    side: Row = {"part": "side", "name": SIDES[heard], "heard": heard}
    side["num_passages"] = sum(row["num_passages"] for row in rows)
    for quantity in QUANTITIES:
        weight, error = f"num_scored{'_whole' * quantity.endswith('_whole')}", f"{quantity}_standard_error"
        known = [row for row in rows if words.finite(row.get(quantity))]
        if total := sum(row[weight] for row in known):
            side[quantity] = sum(row[weight] * row[quantity] for row in known) / total
            side[error] = math.hypot(*(row[weight] * (row.get(error) or 0.0) for row in known)) / total
    return side if rows else {}


def _measured(numbers: Numbers, what: str) -> Iterator[tuple[str, str, list[Row]]]:
    """Each quantity that was measured, with its title and rows; an untrained model forgets nothing."""
    rows = measured_rows(numbers)
    for quantity, title in QUANTITIES.items():
        own = [row for row in rows if row["system"] != UNTRAINED or quantity.startswith("misalignment")]
        if any(words.finite(row.get(quantity)) for row in own):
            yield quantity, title + what, own


def measured_tables(numbers: Numbers, what: str = "", parts: Sequence[str] = ("domain",)) -> list[Table]:
    """A table for each quantity and these parts, ending with the mean where the parts are domains.

    Args:
        what: was measured, in the captions.
    """
    notes = ["± standard error, with books, videos or documents as the units, stratified by domain."]
    compared = "▲ or ▼: a value above or below the first run's by more than 1.96 standard errors of the difference."
    found = []
    for quantity, title, rows in _measured(numbers, what):
        for part in parts:
            name, lead = _PARTS[part]
            shown = [row for row in rows if row["part"] in (part, part if part == "distance" else "all")]
            caption = f"{title} {name}, nats per position"
            found += pivoted(
                caption, shown, lead, of("system", words.system), partial(_beside_first, quantity), notes, compared
            )
    return found


def _beside_first(quantity: str, row: Row, first: Row | None) -> Cell:
    error = f"{quantity}_standard_error"
    if not first or not all(words.finite(part.get(key)) for part in (row, first) for key in (quantity, error)):
        return Cell(words.with_error(row, quantity))
    change, reach = row[quantity] - first[quantity], Z95 * math.hypot(row[error], first[error])
    return beside_first(words.with_error(row, quantity), change > reach, change < -reach)


def measured_figures(numbers: Numbers, what: str, name: str) -> list[Figure]:
    """Two figures for each quantity: by domain and by distance."""
    found = []
    for quantity, title, rows in _measured(numbers, what):
        parts = {part: [row for row in rows if row["part"] == part] for part in ("domain", "distance")}
        several = len({row["side"] for row in parts["domain"]}) > 1
        marks = marks_of(parts["domain"], quantity, _with_side if several else of("name"))
        caption, label = f"{title} by domain, 95 % intervals.", f"{title}, nats per position"
        found += dot_plot(f"{name}-{quantity}", caption, marks, label, may_be_log=True)
        marks = marks_of(parts["distance"], quantity, of("name"))
        caption = f"{title} by distance from the speech, nats per position."
        found += line_plot(f"{name}-{quantity}-distance", caption, marks, "text tokens since the speech", True)
    return found


def _with_side(row: Row) -> str:
    return f"{row['name']}{' (unheard)' * (row['side'] == 'no')}"


def difference_tables(numbers: Numbers, what: str = "") -> list[Table]:
    """What Stage II changed in M and F, passage by passage."""
    rows = [row for row in rows_of(numbers, "measured_differences") if row["quantity"] in _LETTERS]
    lead = {
        "": of("quantity", _LETTERS.__getitem__),
        "than": of("system_b", words.system),
        "domains": of("heard", SIDES.__getitem__),
    }
    return pivoted(
        f"Stage II − the other, nats per position{what}",
        sorted(rows, key=lambda row: list(_LETTERS).index(row["quantity"])),
        lead,
        of("protocol"),
        lambda row, _: words.ranged(row, "difference", words.number),
        ["95 % intervals, paired by passage, with books, videos or documents as the units."],
    )
