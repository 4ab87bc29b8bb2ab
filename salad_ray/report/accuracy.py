"""The page's section on accuracy: the gap table, what it is made of, and what disturbs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from salad_ray.config import FLOORS
from salad_ray.report.facts import SCORED, RunFacts
from salad_ray.report.grids import (
    MAX_ROWS,
    SYSTEM_NAMES,
    TONES,
    Cell,
    Grid,
    Plot,
    Section,
    finite,
    interval,
    legend,
    number,
    ordered,
    p_value,
    percent,
    points,
)
from salad_ray.report.metrics import place_name
from salad_ray.report.plots import Dot, Panel, dot_plot


def accuracy_section(pairs: Sequence[tuple[str, RunFacts]]) -> Section:
    """Hearing margins and gaps first, then the accuracies that they are made of, then what disturbs them."""
    if not any(run.metrics.get("accuracy") for _, run in pairs):
        return Section("Nothing measured yet: run `salad evaluate CONFIG` and then `salad report CONFIG`.")
    margins = [grid for metric in ("acc", "acc_norm") if (grid := margin_grid(pairs, metric))]
    gaps = [grid for metric in ("acc", "acc_norm") if (grid := gap_grid(pairs, metric))]
    accuracies = [grid for metric in ("acc", "acc_norm") if (grid := accuracy_grid(pairs, metric))]
    plots = [plot] if (plot := accuracy_plot(pairs)) else []
    robustness = [grid] if (grid := robustness_grid(pairs)) else []
    lines = [
        "The hearing margin is the accuracy hearing the questions minus the accuracy with silence of the same length "
        "in their place, on the same items. Where its interval reaches down to 0, or that of the margin over another "
        "item's speech, the system is deaf: whatever it scores, it does not score by listening.",
        "The gap is the text LLM's accuracy reading the questions minus the system's accuracy hearing them, on the "
        "same items, in percentage points. Brackets hold 95 % intervals. The cascade is a "
        "recogniser followed by the text LLM.",
    ]
    shown = margins[:1] + gaps[:1] + accuracies[:1] + robustness
    return Section("", lines, plots, shown, margins[1:] + gaps[1:] + accuracies[1:])


def margin_grid(pairs: Sequence[tuple[str, RunFacts]], metric: str) -> Grid | None:
    """Rows are benchmarks and systems, beside what each scores without the question; of several runs one by one."""
    name = "hearing_margins" if metric == "acc" else "hearing_margins_norm"
    lead = ["run"] if len(pairs) > 1 else []
    rows: list[list[Cell | str]] = []
    for run_name, run in pairs:
        for row in run.metrics.get(name) or []:
            low, high = row.get("silence_ci99_low"), row.get("silence_ci99_high")
            spread = interval(low, high)
            verdict = {True: "deaf", False: "hears"}.get(row.get("deaf"), "–")
            rows.append([
                *([run_name] if lead else []),
                place_name(row["benchmark"], row.get("heard")),
                SYSTEM_NAMES.get(row["system"], str(row["system"])),
                percent(row.get("chance")),
                percent(row.get("choices")),
                percent(row.get("silence")) + (f" ({spread})" if spread else ""),
                percent(row.get("swapped")),
                percent(row.get("accuracy")),
                points(row.get("margin")),
                interval(row.get("ci_low"), row.get("ci_high")),
                points(row.get("margin_swapped")),
                interval(row.get("swapped_ci_low"), row.get("swapped_ci_high")),
                points(row.get("gap")),
                Cell(verdict, tone="down" if row.get("deaf") else ""),
                number(row.get("num_items")),
            ])  # fmt: skip
    if not rows:
        return None
    floors = ["chance", "choices alone", "silence (99 %)", "swapped speech"]
    columns = [
        *lead,
        "benchmark",
        "system",
        *floors,
        "hearing",
        "margin",
        "95 %",
        "over swapped",
        "95 %",
        "gap",
        "",
        "items",
    ]
    notes = [
        "Choices alone: without a prompt; with letters, the options without the question. Swapped: hearing another "
        "item's speech, which tells nothing of the question."
    ]
    return Grid(f"Hearing margin, {_METRICS[metric]}", columns, rows, notes=notes, num_text_columns=len(lead) + 2)


def gap_grid(pairs: Sequence[tuple[str, RunFacts]], metric: str) -> Grid | None:
    """Rows are benchmarks and systems; for several runs the groups of columns are runs."""
    tables = [
        {_gap_key(row): row for row in run.metrics.get("gaps") or [] if row.get("metric") == metric} for _, run in pairs
    ]
    keys = ordered(key for table in tables for key in table)
    if not keys:
        return None
    columns = ["text LLM", "system", "gap", "95 %", "p", "items"]
    rows: list[list[Cell | str]] = []
    for key in keys:
        modality, benchmark, heard, system = key
        reads = ", reading" if modality == "text" else ""
        cells: list[Cell | str] = [place_name(benchmark, heard), SYSTEM_NAMES.get(system, str(system)) + reads]
        for table in tables:
            cells += _gap_cells(table.get(key), tables[0].get(key))
        rows.append(cells)
    groups = [("", 2), *((name, len(columns)) for name, _ in pairs)] if len(pairs) > 1 else []
    notes = [TONES.format("gap", "the 95 % intervals do not meet")] if groups else []
    if any(key[0] == "text" for key in keys):
        notes.append("Reading: what adapting the LLM costs it in text.")
    unpaired = sum(row.get("num_unpaired") or 0 for table in tables for row in table.values())
    if unpaired:
        notes.append(f"{number(unpaired)} answers without a counterpart on the other side do not count here.")
    title = f"Text-speech gap, {_METRICS[metric]}"
    return Grid(title, ["benchmark", "system", *columns * len(pairs)], rows, groups, notes, num_text_columns=2)


def _gap_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row.get("modality", "speech"), row["benchmark"], row.get("heard"), row["system"]


_METRICS = {"acc": "choices scored whole (acc)", "acc_norm": "choices scored per character (acc_norm)"}


def _gap_cells(row: dict[str, Any] | None, first: dict[str, Any] | None) -> list[Cell | str]:
    if row is None:
        return ["–"] * 6
    tone = _apart(row, first)
    return [
        percent(row.get("topline")),
        percent(row.get("accuracy")),
        Cell(points(row.get("gap")), {"up": "▲", "down": "▼"}.get(tone, ""), "against the first run", tone),
        interval(row.get("ci_low"), row.get("ci_high")),
        p_value(row.get("p_value")),
        number(row.get("num_items")),
    ]


def _apart(row: dict[str, Any], first: dict[str, Any] | None) -> str:
    """Whether an interval lies wholly above or below that of the first run."""
    if first is None or not all(finite(part.get(key)) for part in (row, first) for key in ("ci_low", "ci_high")):
        return ""
    if row["ci_low"] > first["ci_high"]:
        return "up"
    return "down" if row["ci_high"] < first["ci_low"] else ""


def accuracy_grid(pairs: Sequence[tuple[str, RunFacts]], metric: str) -> Grid | None:
    """Rows are benchmarks, columns the systems reading and hearing them, without disturbance."""
    found = [
        {
            (row["benchmark"], row.get("heard"), row["system"], row["modality"]): row
            for row in run.metrics.get("accuracy") or []
            if row.get("metric") == metric and row.get("condition", "clean") == "clean"
        }
        for _, run in pairs
    ]
    keys = ordered(key[:2] for table in found for key in table)
    if not keys:
        return None
    columns = [
        (place, system, modality)
        for place, table in enumerate(found)
        for system in SCORED
        for modality in ("text", "speech")
        if any(key[2:] == (system, modality) for key in table)
    ]
    notes: dict[str, list[str]] = {what: [] for _, what in _FOOTNOTES.values()}
    runs = [f"{name}: " if len(pairs) > 1 else "" for name, _ in pairs]
    rows: list[list[Cell | str]] = []
    for key in keys:
        cells = [_accuracy_cell(found[place].get((*key, *column)), runs[place], notes) for place, *column in columns]
        rows.append([place_name(*key), *cells])
    titles = [f"{SYSTEM_NAMES[system]}, {_MODALITIES[modality]}" for _, system, modality in columns]
    counts = [sum(place == wanted for place, *_ in columns) for wanted in range(len(pairs))]
    several = [("", 1), *((name, count) for (name, _), count in zip(pairs, counts, strict=True))]
    footnotes = [f"{what}: {'; '.join(whose)}." for what, whose in notes.items() if whose]
    caption = f"Accuracy, {_METRICS[metric]}"
    return Grid(caption, ["benchmark", *titles], rows, several if len(pairs) > 1 else [], footnotes)


_MODALITIES = {"text": "reading", "speech": "hearing"}
_FOOTNOTES = {
    "num_ties": ("†", "† Items without a single best answer (ties)"),
    "num_short": ("‡", "‡ Items with fewer exemplars than asked for"),
    "word_error_rate": ("", "Word error rate of the recogniser"),
}


def _accuracy_cell(row: dict[str, Any] | None, who: str, notes: dict[str, list[str]]) -> Cell | str:
    """An accuracy with its interval; ties, items that lost examples and word errors become footnotes."""
    if row is None:
        return "–"
    marks = ""
    system = SYSTEM_NAMES.get(row["system"], str(row["system"]))
    for name, (mark, what) in _FOOTNOTES.items():
        value = row.get(name)
        if value and row.get("heard") is None:  # heard and unheard are parts of a row that has its notes
            marks += mark
            count = f"{number(value)} of {number(row.get('num_items'))}"
            amount = percent(value) if name == "word_error_rate" else count
            notes[what].append(f"{who}{row['benchmark']}, {system} {_MODALITIES.get(row['modality'], '')} {amount}")
    spread = interval(row.get("ci_low"), row.get("ci_high"))
    return Cell(percent(row.get("accuracy")) + (f" ({spread})" if spread else ""), marks, "see the notes below")


def accuracy_plot(pairs: Sequence[tuple[str, RunFacts]]) -> Plot | None:
    """Accuracy by benchmark, of the text LLM reading and of the others hearing."""
    panels, alts, systems = [], [], []
    for name, run in pairs:
        rows = [
            row
            for row in run.metrics.get("accuracy") or []
            if row.get("metric") == "acc" and row.get("condition", "clean") == "clean" and finite(row.get("accuracy"))
            if (row["system"] == "base") == (row["modality"] == "text")
        ]
        keys = ordered((row["benchmark"], row.get("heard")) for row in rows)[:MAX_ROWS]
        silent = [
            row
            for row in run.metrics.get("accuracy") or []
            if row.get("metric") == "acc" and row.get("condition") == "silence" and finite(row.get("accuracy"))
        ]
        dots = [
            _accuracy_dot(keys.index((row["benchmark"], row.get("heard"))), row)
            for row in rows + silent
            if row["system"] in SCORED and (row["benchmark"], row.get("heard")) in keys
        ]
        systems += [made.series for made in dots]
        panels.append(Panel(name if len(pairs) > 1 else "", [place_name(*key) for key in keys], dots))
        alts += [
            f"{place_name(row['benchmark'], row.get('heard'))}, {SYSTEM_NAMES.get(row['system'])} "
            f"{_MODALITIES.get(row['modality'])}: {percent(row['accuracy'])}."
            for row in rows
        ]
    if not systems:
        return None
    svg = dot_plot("accuracy", f"Accuracy by benchmark. {' '.join(alts[:MAX_ROWS])}", panels, "accuracy, %")
    caption = (
        "Accuracy with 95 % intervals: the text LLM reads the questions, the others hear them; hollow marks: silence "
        "instead of the question."
    )
    return Plot(svg, caption, legend(name for name in SCORED if name in systems))


def _accuracy_dot(place: int, row: dict[str, Any]) -> Dot:
    low, high = (100 * row[key] if finite(row.get(key)) else None for key in ("ci_low", "ci_high"))
    return Dot(place, row["system"], 100 * row["accuracy"], low, high, hollow=row.get("condition") == "silence")


def robustness_grid(pairs: Sequence[tuple[str, RunFacts]]) -> Grid | None:
    """Accuracy from disturbed speech beside clean speech."""
    columns: list[str] = []
    table: dict[tuple[str, ...], dict[str, str]] = {}
    for name, run in pairs:
        for row in run.metrics.get("accuracy") or []:
            if row.get("modality") == "speech" and row.get("metric") == "acc" and row.get("heard") is None:
                condition = row.get("condition", "clean")
                if condition in FLOORS:
                    continue
                columns += [condition] if condition not in columns else []
                system = SYSTEM_NAMES.get(row["system"], str(row["system"]))
                key = (*((name,) if len(pairs) > 1 else ()), str(row["benchmark"]), system)
                table.setdefault(key, {})[condition] = percent(row.get("accuracy"))
    if len(columns) < 2:
        return None
    rows: list[list[Cell | str]] = [
        [*key, *(cells.get(name, "–") for name in columns)] for key, cells in table.items() if set(cells) != {"clean"}
    ]
    lead = [*(("run",) if len(pairs) > 1 else ()), "benchmark", "system"]
    return Grid("Robustness: accuracy hearing disturbed speech", [*lead, *columns], rows, num_text_columns=len(lead))


def main_margin(metrics: dict[str, Any], system: str) -> dict[str, Any] | None:
    """The hearing margin that stands for all benchmarks, as `main_gap`."""
    rows = [row for row in metrics.get("hearing_margins") or [] if row.get("system") == system]
    rows = [row for row in rows if row.get("heard") is None and finite(row.get("margin"))]
    average = [row for row in rows if row.get("benchmark") == "average"]
    return (average or (rows if len(rows) == 1 else [None]))[0]


def main_gap(metrics: dict[str, Any], system: str) -> dict[str, Any] | None:
    """The gap that stands for all benchmarks: their average if it is there, else that of the only benchmark."""
    rows = [row for row in metrics.get("gaps") or [] if row.get("system") == system and row.get("metric") == "acc"]
    rows = [row for row in rows if row.get("heard") is None and row.get("modality", "speech") == "speech"]
    rows = [row for row in rows if finite(row.get("gap"))]
    average = [row for row in rows if row.get("benchmark") == "average"]
    return (average or (rows if len(rows) == 1 else [None]))[0]
