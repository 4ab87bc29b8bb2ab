"""Rows of what was found, and tables of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from salad_ray.report.blocks import Cell, Table

Row = dict[str, Any]
"""What was found of one thing, such as a system on a benchmark; `run` is the title of its run, "" where it is alone."""
Numbers = Mapping[str, dict[str, Any]]
"""The title of each run → its metrics.json."""
Columns = Mapping[str, Callable[[Any], Cell | str]]
"""Title → what a row has in this column."""


def ordered(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def of(key: str, show: Callable[[Any], str] = str) -> Callable[[Row], str]:
    """A column: how a key of a row is shown."""
    return lambda row: show(row.get(key))


def rows_of(numbers: Numbers, name: str) -> list[Row]:
    """The rows of a table of metrics.json, of all runs."""
    return [row | {"run": run} for run, metrics in numbers.items() for row in metrics.get(name) or []]


def listed(
    caption: str,
    rows: Iterable[Any],
    columns: Columns,
    num_text_columns: int = 1,
    notes: Sequence[str] = (),
) -> list[Table]:
    """A table with a line for each row. Columns without any text are left out; without rows there is no table."""
    lines = [[_cell(show(row)) for show in columns.values()] for row in rows]
    kept = [place for place in range(len(columns)) if any(line[place].text for line in lines)]
    names = list(columns)
    table = Table(
        caption,
        columns=[names[place] for place in kept],
        rows=[[line[place] for place in kept] for line in lines],
        groups=[],
        notes=[note for note in notes if note],
        num_text_columns=sum(place < num_text_columns for place in kept),
    )
    return [table] if lines else []


def pivoted(
    caption: str,
    rows: Iterable[Row],
    lead: Mapping[str, Callable[[Row], str]],
    across: Callable[[Row], str],
    show: Callable[[Row, Row | None], Cell | str],
    notes: Sequence[str] = (),
    compared: str = "",
) -> list[Table]:
    """A table with a line for each text of the leading columns, and for each run a column for each text of `across`.

    Args:
        show: what is in a cell, of its row and of that in the first run's column of this name.
        compared: a note for several runs.
    """
    cells = {(tuple(text(row) for text in lead.values()), row["run"], across(row)): row for row in rows}
    runs = ordered(run for _, run, _ in cells)
    columns = sorted(ordered((run, name) for _, run, name in cells), key=lambda column: runs.index(column[0]))
    lines: list[list[Cell]] = []
    for line in ordered(line for line, *_ in cells):
        found = [(cells.get((line, *column)), cells.get((line, runs[0], column[1]))) for column in columns]
        lines.append([_cell(text) for text in (*line, *(show(row, first) if row else "–" for row, first in found))])
    groups = [(run, sum(own == run for own, _ in columns)) for run in runs]
    table = Table(
        caption,
        columns=[*lead, *(name for _, name in columns)],
        rows=lines,
        groups=[("", len(lead)), *groups] if len(runs) > 1 else [],
        notes=[note for note in (*notes, compared * (len(runs) > 1)) if note],
        num_text_columns=len(lead),
    )
    return [table] if lines else []


def beside_first(text: str, is_above: bool, is_below: bool) -> Cell:
    """A value, marked where it lies above or below that of the first run."""
    mark, tone = ("▲", "up") if is_above else ("▼", "down") if is_below else ("", "")
    return Cell(text, mark, "against the first run", tone)


def by_run(
    caption: str, facts: Mapping[str, Mapping[str, str]], lead: str, keys: Iterable[str], notes: Sequence[str] = ()
) -> list[Table]:
    """A table of facts with a column for each run; what differs from the first run is marked."""
    first = next(iter(facts.values()))

    def show(own: Mapping[str, str], key: str) -> Cell:
        return Cell(own.get(key, "–"), "≠" if own.get(key) != first.get(key) else "", "differs from the first run")

    columns: Columns = {lead: str} | {run: partial(show, own) for run, own in facts.items()}
    return listed(caption, keys, columns, len(columns), notes)


def _cell(text: Cell | str) -> Cell:
    return text if isinstance(text, Cell) else Cell(text)
