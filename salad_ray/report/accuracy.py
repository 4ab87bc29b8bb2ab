"""Answers to the benchmarks: hearing margins, gaps and accuracies, as tables, a figure and sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from salad_ray.config import FLOORS
from salad_ray.evaluation.statistics import AVERAGE, METRICS
from salad_ray.names import BASE, CASCADE, CONTROL, STAGE1, STAGE2
from salad_ray.report import words
from salad_ray.report.blocks import Block, Cell, Figure, Fold, Section, Table
from salad_ray.report.facts import RunFacts
from salad_ray.report.plots import Mark, dot_plot
from salad_ray.report.rows import Columns, Numbers, Row, beside_first, listed, of, ordered, pivoted, rows_of

ACC, ACC_NORM = METRICS
HEARING = (STAGE1, STAGE2, CONTROL, CASCADE)
_METRICS = {ACC: "choices scored whole (acc)", ACC_NORM: "choices scored per character (acc_norm)"}
_MARGINS = {ACC: "hearing_margins", ACC_NORM: "hearing_margins_norm"}
_MODALITIES = {"text": "reading", "speech": "hearing"}
_COMPARED = "▲ or ▼: a gap above or below the first run's, and the 95 % intervals do not meet."
_FOOTNOTES = {
    "num_ties": ("†", "† Items without a single best answer (ties)"),
    "num_short": ("‡", "‡ Items with fewer exemplars than asked for"),
    "word_error_rate": ("", "Word error rate of the recogniser"),
}


def accuracy(runs: Sequence[RunFacts]) -> Section:
    """Hearing margins and gaps first, then the accuracies that they are made of, then what disturbs them."""
    numbers = {run.title: run.metrics for run in runs}
    intro = [
        "The hearing margin is the accuracy hearing the questions minus the accuracy with silence of the same length "
        "in their place, on the same items. Where its interval reaches down to 0, or that of the margin over another "
        "item's speech, the system is deaf: whatever it scores, it does not score by listening.",
        "The gap is the text LLM's accuracy reading the questions minus the system's accuracy hearing them, on the "
        "same items, in percentage points. Brackets hold 95 % intervals. The cascade is a recogniser followed by the "
        "text LLM.",
    ]
    blocks: list[Block] = [
        *accuracy_figures(numbers),
        *answer_tables(numbers, ACC),
        *robustness_tables(numbers),
        *(Fold(table.caption, "", [table]) for table in answer_tables(numbers, ACC_NORM)),
    ]
    nothing = "Nothing measured yet: run `salad evaluate CONFIG` and then `salad report CONFIG`."
    title = "The gap between reading and hearing"
    return Section("accuracy", "The gap", title, blocks, nothing, intro if blocks else ())


def answer_tables(numbers: Numbers, metric: str) -> list[Table]:
    return [*margin_tables(numbers, metric), *gap_tables(numbers, metric), *accuracy_tables(numbers, metric)]


def _place(row: Row, in_brief: bool = False) -> str:
    """A benchmark, or its part of heard or unheard domains."""
    part = {None: "", True: "heard", False: "unheard"}[row.get("heard")]
    if in_brief:
        return f"  {part}" if part else str(row["benchmark"])
    return f"{row['benchmark']}, {part} domains" if part else str(row["benchmark"])


def _reads(row: Row) -> bool:
    return row.get("modality") == "text"


_system = of("system", words.system)


def margin_tables(numbers: Numbers, metric: str = ACC, in_brief: bool = False) -> list[Table]:
    """A line for each benchmark and system: what it scores hearing the questions, and what without.

    Args:
        in_brief: as it fits a terminal of 80 columns.
    """
    share, point = (partial(show, digits=0 if in_brief else 1) for show in (words.percent, words.points))
    verdicts: dict[bool | None, Cell | str] = {True: Cell("deaf", tone="down"), False: "hears", None: "–"}
    columns: Columns = {
        "run": of("run"),
        "benchmark": partial(_place, in_brief=in_brief),
        "system": _system,
        "chance": of("chance", share),
        "choices alone": of("choices", share),
        "silence": of("silence", share),
        "silence (99 %)": lambda row: words.ranged(row, "silence", share, ("silence_ci99_low", "silence_ci99_high")),
        "swapped": of("swapped", share),
        "hearing": of("accuracy", share),
        "margin (95 %)": lambda row: words.ranged(row, "margin", point),
        "over swapped": lambda row: words.ranged(row, "margin_swapped", ends=("swapped_ci_low", "swapped_ci_high")),
        "gap": of("gap", point),
        "": lambda row: verdicts[row.get("deaf")],
        "items": of("num_items", words.number),
    }
    brief = ("benchmark", "system", "hearing", "silence", "swapped", "margin (95 %)", "gap", "")
    names = brief if in_brief else [name for name in columns if name != "silence"]
    notes = [
        "Choices alone: without a prompt; with letters, the options without the question. Swapped: hearing another "
        "item's speech, which tells nothing of the question."
    ]
    rows = sorted(rows_of(numbers, _MARGINS[metric]), key=lambda row: row["benchmark"] if in_brief else "")
    caption, shown = f"Hearing margin, {_METRICS[metric]}", {name: columns[name] for name in names}
    return listed(caption, rows, shown, list(names).index("system") + 1, [] if in_brief else notes)


def gap_tables(numbers: Numbers, metric: str) -> list[Table]:
    """A line for each benchmark and system; how it reads comes after how it hears."""
    rows = [row for row in rows_of(numbers, "gaps") if row.get("metric") == metric]
    firsts = {_gap_key(row): row for row in rows if row["run"] == next(iter(numbers))}
    unpaired = sum(row.get("num_unpaired") or 0 for row in rows)
    columns: Columns = {
        "run": of("run"),
        "benchmark": _place,
        "system": lambda row: _system(row) + ", reading" * _reads(row),
        "text LLM": of("topline", words.percent),
        "accuracy": of("accuracy", words.percent),
        "gap (95 %)": lambda row: _gap(row, firsts.get(_gap_key(row)) or row),
        "p": of("p_value", words.p_value),
        "items": of("num_items", words.number),
    }
    notes = [
        _COMPARED * (len(numbers) > 1),
        "Reading: what adapting the LLM costs it in text." * any(map(_reads, rows)),
        f"{unpaired:,} answers without a counterpart on the other side do not count here." * bool(unpaired),
    ]
    return listed(f"Text-speech gap, {_METRICS[metric]}", rows, columns, 3, notes)


def _gap_key(row: Row) -> tuple[Any, ...]:
    return row["system"], row["benchmark"], row.get("modality")


def _gap(row: Row, first: Row) -> Cell:
    text = words.ranged(row, "gap")
    if not all(words.finite(part.get(end)) for part in (row, first) for end in ("ci_low", "ci_high")):
        return Cell(text)
    return beside_first(text, row["ci_low"] > first["ci_high"], row["ci_high"] < first["ci_low"])


def _under(numbers: Numbers, metric: str, condition: str) -> list[Row]:
    rows = rows_of(numbers, "accuracy")
    return [row for row in rows if row.get("metric") == metric and row.get("condition", "clean") == condition]


def _is_as_asked(row: Row) -> bool:
    """The text LLM reading, or another hearing."""
    return (row["system"] == BASE) == _reads(row)


def accuracy_tables(numbers: Numbers, metric: str = ACC, in_brief: bool = False) -> list[Table]:
    """A line for each benchmark, a column for each system reading and hearing it, without disturbance.

    Args:
        in_brief: as it fits a terminal of 80 columns: the text LLM reading, the others hearing.
    """
    rows = [row for row in _under(numbers, metric, "clean") if _is_as_asked(row) or not in_brief]
    share = partial(words.percent, digits=0 if in_brief else 1)
    notes: dict[str, list[str]] = {what: [] for _, what in _FOOTNOTES.values()}
    for row in rows:
        for key in _noted(row):
            count = f"{row[key]:,} of {row['num_items']:,}" if isinstance(row[key], int) else words.percent(row[key])
            whose = f"{row['run']}: {row['benchmark']}".removeprefix(": ")
            notes[_FOOTNOTES[key][1]].append(f"{whose}, {_system(row)} {_MODALITIES[row['modality']]} {count}")

    def show(row: Row, _: Row | None) -> Cell:
        marks = "".join(_FOOTNOTES[key][0] for key in _noted(row))
        return Cell(words.ranged(row, "accuracy", share), marks, "see the notes below")

    return pivoted(
        f"Accuracy, {_METRICS[metric]}",
        rows,
        {"benchmark": partial(_place, in_brief=in_brief)},
        lambda row: f"{_system(row)}, {_MODALITIES[row['modality']]}",
        show,
        [f"{what}: {'; '.join(whose)}." for what, whose in notes.items() if whose and not in_brief],
    )


def _noted(row: Row) -> list[str]:
    """What a footnote tells of a row; its parts of heard and unheard domains do not tell it again."""
    return [key for key in _FOOTNOTES if row.get(key) and row.get("heard") is None]


def robustness_tables(numbers: Numbers) -> list[Table]:
    """Accuracy hearing disturbed speech, with what it costs on the same items, beside that hearing clean speech."""

    def key(row: Row) -> tuple[str, ...]:
        return row["run"], row["system"], row["benchmark"]

    lost = {(*key(row), row["condition"]): row for row in rows_of(numbers, "robustness") if row["metric"] == ACC}
    rows = [row for row in rows_of(numbers, "accuracy") if row.get("metric") == ACC and row.get("heard") is None]
    rows = [row for row in rows if row["condition"] not in FLOORS and not _reads(row)]
    disturbed = {key(row) for row in rows if row["condition"] != "clean"}

    def show(row: Row, _: Row | None) -> str:
        loss = lost.get((*key(row), row["condition"]))
        return words.percent(row["accuracy"]) + (f", {words.ranged(loss, 'loss')} lost" if loss else "")

    caption = "Robustness: accuracy hearing disturbed speech, and the points lost"
    lead = {"benchmark": of("benchmark"), "system": _system}
    return pivoted(caption, [row for row in rows if key(row) in disturbed], lead, of("condition"), show)


def accuracy_figures(numbers: Numbers) -> list[Figure]:
    """Accuracy by benchmark, of the text LLM reading and of the others hearing, and with silence instead."""
    marks = []
    for row in [*filter(_is_as_asked, _under(numbers, ACC, "clean")), *_under(numbers, ACC, "silence")]:
        value, low, high = (100 * row[key] for key in ("accuracy", "ci_low", "ci_high"))
        hollow = row.get("condition") == "silence"
        marks.append(Mark(row["system"], _place(row), value, low, high, row["run"], hollow=hollow))
    caption = (
        "Accuracy with 95 % intervals: the text LLM reads the questions, the others hear them; hollow marks: silence "
        "instead of the question."
    )
    return dot_plot("accuracy", caption, marks, "accuracy, %")


# -------------------------------------------------------------------------------------------------------- sentences


def main_row(metrics: dict[str, Any], name: str, system: str, quantity: str) -> Row | None:
    """The row of a system that stands for all benchmarks: their average, else that of the only benchmark."""
    rows = [row for row in metrics.get(name) or [] if row.get("system", row.get("system_b")) == system]
    rows = [row for row in rows if row.get("metric", ACC) == ACC and row.get("heard") is None and not _reads(row)]
    rows = [row for row in rows if words.finite(row.get(quantity))]
    average = [row for row in rows if row["benchmark"] == AVERAGE]
    return (average or (rows if len(rows) == 1 else [None]))[0]


def _each(metrics: dict[str, Any], name: str, quantity: str, link: str, systems: Sequence[str] = HEARING) -> str:
    """A quantity of each system that has it, as a part of a sentence."""
    found = {system: main_row(metrics, name, system, quantity) for system in systems}
    parts = [f"{words.ranged(row, quantity)} {link} {words.who(system)}" for system, row in found.items() if row]
    return words.listing(parts)


def margin_sentences(metrics: dict[str, Any], systems: Sequence[str] = HEARING) -> list[str]:
    """How much these systems hear, and which are deaf where."""
    margins = _each(metrics, "hearing_margins", "margin", "for", systems)
    what = "The hearing margin, how many points of accuracy hearing the questions is above hearing silence instead"
    deaf = deaf_sentences(row for row in metrics.get("hearing_margins") or [] if row["system"] in systems)
    return [*([f"{what}, is {margins} (95 % intervals)."] if margins else []), *(f"{line}." for line in deaf)]


def deaf_sentences(margins: Iterable[Row]) -> list[str]:
    """Who is deaf where: within silence, or where it is not, within the speech of other items."""
    reasons = {True: "silence", False: "the speech of another question"}
    places: dict[tuple[str, str], list[str]] = {}
    for row in (row for row in margins if row["deaf"]):
        places.setdefault((row["system"], reasons[row["ci_low"] <= 0]), []).append(_place(row))
    systems = ordered(system for system, _ in places)
    return [
        f"{words.system(system)} is deaf on {'; '.join(places[system, what])}: hearing the question is no better than "
        f"hearing {what} (the 95 % interval of the difference includes 0)"
        for system in systems
        for what in reasons.values()
        if (system, what) in places
    ]


def gap_sentences(metrics: dict[str, Any]) -> list[str]:
    """How far the systems lie behind the text LLM, and Stage II before the others."""
    gaps = _each(metrics, "gaps", "gap", "for")
    ahead = _each(metrics, "differences", "difference", "above")
    chances = {system: main_row(metrics, "differences", system, "p_value") for system in HEARING}
    p_values = words.listing([words.p_value(row["p_value"]) for row in chances.values() if row])
    what = "The text-speech gap, how many points of accuracy hearing the questions lies behind the text LLM reading"
    return [
        *([f"{what} them, is {gaps} (95 % intervals)."] if gaps else []),
        *([f"On the same questions, heard, Stage II lies {ahead}, in points (p {p_values})."] if ahead else []),
    ]
