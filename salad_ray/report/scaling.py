"""What more data would buy: the sweeps of a run, on the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean, stdev
from typing import Any

from salad_ray.names import BASE, CASCADE, CONTROL, STAGE1, STAGE2, UNTRAINED
from salad_ray.report import words
from salad_ray.report.blocks import Block, Figure, Fold, Paragraph, Section, Table
from salad_ray.report.facts import RunFacts
from salad_ray.report.plots import Z95, Mark, line_plot, marks_of
from salad_ray.report.rows import Columns, Row, listed, of

PALETTE = (STAGE2, STAGE1, BASE, CONTROL, CASCADE, UNTRAINED)
"""The systems whose colours curves have."""
BUDGET_KEYS = ("select.budget_hours", "select.budget_percent")
QUANTITIES = {"misalignment": "Misalignment M", "forgetting": "Forgetting F"}
NONE = "Nothing swept yet: name a sweep in the config (`sweeps:`), and run `salad sweep CONFIG`."


def scaling(runs: Sequence[RunFacts]) -> Section:
    """Curves with intervals, E against the swept key, F, and the table of all trainings."""
    blocks: list[Block] = []
    for number, run in enumerate(runs):
        blocks += [Paragraph(run.title, "h3")] if run.title else []
        blocks += [Paragraph(line) for result in run.sweeps for line in _sentences(result)]
        for place, result in enumerate(run.sweeps):
            name = f"sweep-{number}-{place}"
            blocks += [figure for quantity in QUANTITIES for figure in _against_budget(name, result, quantity)]
            blocks += _irreducible(name, result)
        blocks += [table for result in run.sweeps for table in _laws_tables(result)]
        blocks += [Fold(table.caption, "", [table]) for result in run.sweeps for table in _rows_tables(result)]
        blocks += [] if run.sweeps else [Paragraph(NONE, "empty")]
    return Section("scaling", "More data", "What more data would buy", blocks)


def sweep_tables(result: dict[str, Any]) -> list[Table]:
    """The trainings of a sweep, and the laws fitted to them."""
    return [*_rows_tables(result), *_laws_tables(result)]


def _rows_tables(result: dict[str, Any]) -> list[Table]:
    measured = {"positions": "num_positions", "synthetic_hours": "synthetic_hours"}
    sides = {"heard M": "heard_misalignment", "unheard M": "unheard_misalignment"}
    quantities = {"M": "misalignment", "F": "forgetting", "M whole": "misalignment_whole"}
    columns: Columns = {
        **{key: of(key) for key in result["grid"]},
        "seed": lambda row: str(row.get("seed", "")),
        **{name: of(key, lambda value: "" if value is None else words.number(value)) for name, key in measured.items()},
        **{name: partial(words.with_error, quantity=key) for name, key in quantities.items()},
        **{name: of(key, words.number) for name, key in sides.items()},
        "problem": of("error"),
    }
    return listed(f"All trainings of sweep {result['name']}", result["rows"], columns, len(result["grid"]) + 1)


def _laws_tables(result: dict[str, Any]) -> list[Table]:
    within = next((law["within"] for law in result["laws"] if not law["problem"]), 0.05)

    columns: Columns = {
        ", ".join(result["grid"]): lambda law: _label(law["values"]) + ": no law" * bool(law["problem"]),
        "E": partial(_with_ends, quantity="irreducible"),
        "E over passages": lambda law: " to ".join(map(words.number, law.get("ci_over_passages") or ())) or "–",
        "β": partial(_with_ends, quantity="exponent", show=partial(words.number, digits=2)),
        f"D within {100 * within:g} % of E": partial(_with_ends, quantity="positions_within", show=words.short),
        "p (E = 0)": of("irreducible_p_value", words.number),
    }
    notes = [
        "E is what more of the same data never closes. Intervals are profile likelihoods (90 %) of how trainings "
        "scatter; over passages, a bootstrap of what M was measured on. p tests E = 0, a pure power law."
    ]
    return listed(f"M(D) = E + B · D^−β, sweep {result['name']}", result["laws"], columns, 1, notes)


def _with_ends(law: Row, quantity: str, show: Callable[[Any], str] = words.number) -> str:
    """A parameter of a law with its interval, whose ends may be open."""
    if law["problem"]:
        return "–"
    ends = law["ci"][quantity] if quantity in law["ci"] else law[f"{quantity}_ci"]
    return f"{show(law[quantity])} ({' to '.join('∞' if end is None else show(end) for end in ends)})"


def _sentences(result: dict[str, Any]) -> list[str]:
    lines = [
        f"Sweep {result['name']}, {_label(law['values'])}: no law. {law['problem'][0].upper()}{law['problem'][1:]}."
        for law in result["laws"]
        if law["problem"]
    ]
    lines += [] if result["laws"] else _best(result)
    saving = result.get("saving")
    if saving and saving["separate_positions"]:
        share = saving["positions"] / saving["separate_positions"]
        lines.append(
            f"Sweep {result['name']}: the budgets of one combination shared their trunk, so "
            f"{words.number(saving['positions'], 0)} positions were trained, {words.percent(share, 0)} of what "
            "separate trainings would have needed."
        )
    return lines


def _best(result: dict[str, Any]) -> list[str]:
    """Which combination has the lowest M, and which others' M cannot be told from it; of two and more of them."""
    groups = _groups(_measured(result, "misalignment"), list(result["grid"]))
    places = sorted((_mean(group), label) for label, group in groups.items())
    if len(places) < 2:
        return []
    ((value, error), best), *others = places
    lowest = f"Sweep {result['name']}: M is lowest, {words.number(value)}"
    if not all(math.isfinite(its) for (_, its), _ in places):
        return [f"{lowest}, at {best}."]
    near = [label for (other, its), label in others if other - value <= Z95 * math.hypot(error, its)]
    told = f"within the noise lie also {'; '.join(near)}" if near else "no other comes near it"
    return [f"{lowest} ± {words.number(error)}, at {best}; {told}."]


def _mean(group: Sequence[Row]) -> tuple[float, float]:
    """M of a combination and its standard error: over seeds; of one over passages; nan for none."""
    values = [row["misalignment"] for row in group]
    if len(values) > 1:
        return mean(values), stdev(values) / math.sqrt(len(values))
    error = group[0].get("misalignment_standard_error")
    return values[0], error if words.finite(error) else math.nan


def _measured(result: dict[str, Any], quantity: str) -> list[Row]:
    return [row for row in result["rows"] if not row["error"] and words.finite(row.get(quantity))]


def _against_budget(name: str, result: dict[str, Any], quantity: str) -> list[Figure]:
    """M or F against the budget (or the first number of the grid), a curve for each combination of the other keys."""
    x_name, unit, own_keys = _axis(result)
    rows = [row for row in _measured(result, quantity) if words.finite(row.get(x_name))]
    groups = _groups(rows, [key for key in result["grid"] if key not in own_keys])
    laws = {_label(law["values"]): law["curve"] for law in result["laws"] if not law["problem"]}
    fits = {label: laws[label] for label in groups if label in laws and quantity == "misalignment"}
    caption = f"{QUANTITIES[quantity]} against {unit}, sweep {result['name']}: points with 95 % intervals over passages"
    caption += ", the fitted law with its 90 % band." if fits else "."
    curves = _coloured(groups, x_name)
    if len({row[x_name] for row in rows}) < 2:
        return []
    marks = marks_of(curves, quantity, lambda row: row[x_name])
    return line_plot(f"{name}-{quantity}", caption, marks, unit, log_x=x_name == "num_positions", fits=fits)


def _axis(result: dict[str, Any]) -> tuple[str, str, tuple[str, ...]]:
    """Column of a plot's x axis, what it is, and the keys of the grid that it stands for."""
    if any("budget" in row for row in result["rows"]):
        return "num_positions", "training positions D", ()
    if any(len(result["grid"].get(key, ())) > 1 for key in BUDGET_KEYS):
        return "synthetic_hours", "hours of synthetic speech", BUDGET_KEYS
    key = _numeric_key(result)
    return key, key, (key,)


def _numeric_key(result: dict[str, Any]) -> str:
    """The first key of the grid with several values that are all numbers; "" for none."""
    numeric = (key for key, values in result["grid"].items() if len(values) > 1 and all(map(words.finite, values)))
    return next(numeric, "")


def _irreducible(name: str, result: dict[str, Any]) -> list[Figure]:
    """E against the first key of the grid that is a number, a curve for each combination of the others."""
    key = _numeric_key(result)
    found = [law | law["values"] for law in result["laws"] if not law["problem"]]
    if not key or len({law[key] for law in found}) < 2:
        return []
    curves = _coloured(_groups(found, [other for other in result["grid"] if other != key], "E"), key)
    ends = [law["ci"]["irreducible"] for law in curves]
    marks = [
        Mark(law["system"], law[key], law["irreducible"], low, high, label=law["label"])
        for law, (low, high) in zip(curves, ends, strict=True)
    ]
    caption = f"Irreducible misalignment E against {key}, sweep {result['name']}, with 90 % intervals."
    return line_plot(f"{name}-irreducible", caption, marks, key)


def _groups(rows: Sequence[Row], keys: Sequence[str], if_none: str = "all") -> dict[str, list[Row]]:
    """The rows of each combination of these keys, by its name."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_label({key: row[key] for key in keys}, if_none), []).append(row)
    return groups


def _coloured(groups: dict[str, list[Row]], x_name: str) -> list[Row]:
    """The rows as curves from left to right: with a label, and a system of whose colour they are."""
    return [
        row | {"label": label, "system": PALETTE[place % len(PALETTE)], "run": ""}
        for place, (label, rows) in enumerate(groups.items())
        for row in sorted(rows, key=lambda row: row[x_name])
    ]


def _label(values: dict[str, Any], if_none: str = "all") -> str:
    return ", ".join(f"{key.rsplit('.', 1)[-1]} = {value}" for key, value in values.items()) or if_none
