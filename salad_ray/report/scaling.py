"""What more data would buy: the sweeps of a run, on the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from rich.table import Table as RichTable

from salad_ray.report.facts import RunFacts
from salad_ray.report.grids import MARKS, Z95, Cell, Grid, Plot, Section, finite, number, percent
from salad_ray.report.plots import Curve, Mark, curve_plot

PALETTE = ("stage2", "stage1", "base", "control", "cascade", "untrained")
BUDGET_KEYS = ("select.budget_hours", "select.budget_percent")
QUANTITIES = {"misalignment": "Misalignment M", "forgetting": "Forgetting F"}
NONE = "Nothing swept yet: name a sweep in the config (`sweeps:`), and run `salad sweep CONFIG`."


def sweep_grids(result: dict[str, Any]) -> list[RichTable]:
    """The trainings of a sweep, and the laws fitted to them."""
    grid = RichTable(title=f"sweep {result['name']}", title_justify="left")
    keys = list(result["grid"]) + (["seed"] if any("seed" in row for row in result["rows"]) else [])
    for name in (*keys, "positions", *result_columns(result), "M", "F"):
        grid.add_column(name, justify="right")
    for row in result["rows"]:
        measured = [number(row.get("num_positions")), *(number(row.get(name)) for name in result_columns(result))]
        values = [_with_error(row, name) for name in QUANTITIES] if not row["error"] else ["failed", ""]
        grid.add_row(*(str(row[key]) for key in keys), *measured, *values)
    if not result["laws"]:
        return [grid]
    laws = RichTable(title="M(D) = E + B · D^−β, with 90 % intervals", title_justify="left")
    for name in (*result["grid"], "E", "E over passages", "β", f"D within {_within(result)} of E", "p (E = 0)"):
        laws.add_column(name, justify="right")
    for law in result["laws"]:
        laws.add_row(*(str(value) for value in law["values"].values()), *_law_cells(law))
    return [grid, laws]


def result_columns(result: dict[str, Any]) -> list[str]:
    return [name for name in ("synthetic_hours",) if any(name in row for row in result["rows"])]


def scaling_section(number_: int, run: RunFacts) -> Section:
    """Curves with intervals, E against the swept key, F, and the table of all trainings."""
    if not run.sweeps:
        return Section(NONE)
    lines: list[str] = []
    plots: list[Plot] = []
    grids: list[Grid] = []
    folded: list[Grid] = []
    for place, result in enumerate(run.sweeps):
        name = f"sweep-{number_}-{place}"
        lines += _sentences(result)
        plots += [plot for quantity in QUANTITIES if (plot := _against_budget(name, result, quantity))]
        plots += [plot] if (plot := _irreducible(name, result)) else []
        grids += [_laws_grid(result)] if result["laws"] else []
        folded.append(_rows_grid(result))
    return Section("", lines, plots, grids, folded)


def _sentences(result: dict[str, Any]) -> list[str]:
    lines = [
        f"Sweep {result['name']}, {_label(law['values'])}: no law. {law['problem'][0].upper()}{law['problem'][1:]}."
        for law in result["laws"]
        if law["problem"]
    ]
    if not result["laws"] and (best := _best(result)):
        lines.append(best)
    saving = result.get("saving")
    if saving and saving["separate_positions"]:
        share = saving["positions"] / saving["separate_positions"]
        lines.append(
            f"Sweep {result['name']}: the budgets of one combination shared their trunk, so "
            f"{number(saving['positions'], 0)} positions were trained, {percent(share, 0)} of what separate trainings "
            "would have needed."
        )
    return lines


def _best(result: dict[str, Any]) -> str:
    """Which combination has the lowest M, and which others' M cannot be told from it; "" without two of them."""
    rows = [row for row in result["rows"] if not row["error"] and finite(row.get("misalignment"))]
    places = [_place(result, group) for group in _groups(rows, list(result["grid"]))]
    if len(places) < 2:
        return ""
    (value, error, best), *others = sorted(places, key=lambda place: place[0])
    if not all(map(math.isfinite, (error, *(other for _, other, _ in others)))):
        return f"Sweep {result['name']}: M is lowest, {number(value)}, at {best}."
    near = [label for other, its, label in others if other - value <= Z95 * math.hypot(error, its)]
    told = f"within the noise lie also {'; '.join(near)}" if near else "no other comes near it"
    return f"Sweep {result['name']}: M is lowest, {number(value)} ± {number(error)}, at {best}; {told}."


def _place(result: dict[str, Any], group: list[dict[str, Any]]) -> tuple[float, float, str]:
    """M of a combination, its standard error (over seeds; of one over passages; nan for none), and its name."""
    values = [row["misalignment"] for row in group]
    errors = [row.get("misalignment_standard_error") for row in group]
    own = errors[0] if finite(errors[0]) else math.nan
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else own
    return mean(values), error, _label({key: group[0][key] for key in result["grid"]})


def _against_budget(name: str, result: dict[str, Any], quantity: str) -> Plot | None:
    """M or F against the budget (or the first number of the grid), a curve for each combination of the other keys."""
    rows = [row for row in result["rows"] if not row["error"] and finite(row.get(quantity))]
    x_name, unit, own_keys = _axis(result)
    rows = [row for row in rows if finite(row.get(x_name))]
    if len({row[x_name] for row in rows}) < 2:
        return None
    keys = [key for key in result["grid"] if key not in own_keys]
    curves: list[Curve] = []
    for group in _groups(rows, keys):
        values = {key: group[0][key] for key in keys}
        marks = [_mark(row, x_name, quantity) for row in sorted(group, key=lambda row: row[x_name])]
        law = next((law for law in result["laws"] if law["values"] == values and not law["problem"]), None)
        fit = law["curve"] if law and quantity == "misalignment" else []
        curves.append(Curve(_colour(len(curves)), _label(values), marks, fit))
    alt = f"{QUANTITIES[quantity]} against {unit}; " + "; ".join(_words(curve) for curve in curves) + "."
    svg = curve_plot(f"{name}-{quantity}", alt, curves, unit, log_x=x_name == "num_positions")
    caption = f"{QUANTITIES[quantity]} against {unit}, sweep {result['name']}: points with 95 % intervals over passages"
    caption += ", the fitted law with its 90 % band." if any(curve.fit for curve in curves) else "."
    return Plot(svg, caption, _legend(curves))


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
    return next((key for key, values in result["grid"].items() if len(values) > 1 and all(map(finite, values))), "")


def _irreducible(name: str, result: dict[str, Any]) -> Plot | None:
    """E against the first key of the grid that is a number, a curve for each combination of the others."""
    key = _numeric_key(result)
    found = [law["values"] | law for law in result["laws"] if not law["problem"]]
    if not key or len({law[key] for law in found}) < 2:
        return None
    others = [other for other in result["grid"] if other != key]
    curves: list[Curve] = []
    for group in _groups(found, others):
        marks = [
            Mark(law[key], law["irreducible"], law["ci"]["irreducible"][0], law["ci"]["irreducible"][1])
            for law in sorted(group, key=lambda law: law[key])
        ]
        curves.append(Curve(_colour(len(curves)), _label({other: group[0][other] for other in others}, "E"), marks))
    alt = f"Irreducible misalignment E against {key}; " + "; ".join(_words(curve) for curve in curves) + "."
    svg = curve_plot(f"{name}-irreducible", alt, curves, key)
    caption = f"Irreducible misalignment E against {key}, sweep {result['name']}, with 90 % intervals."
    return Plot(svg, caption, _legend(curves) if len(curves) > 1 else [])


def _laws_grid(result: dict[str, Any]) -> Grid:
    columns = [", ".join(result["grid"]), "E", "E over passages", "β", f"D within {_within(result)} of E", "p (E = 0)"]
    rows: list[list[Cell | str]] = [[_label(law["values"]), *_law_cells(law)] for law in result["laws"]]
    notes = [
        "E is what more of the same data never closes. Intervals are profile likelihoods (90 %) of how trainings "
        "scatter; over passages, a bootstrap of what M was measured on. p tests E = 0, a pure power law."
    ]
    return Grid(f"M(D) = E + B · D^−β, sweep {result['name']}", columns, rows, notes=notes)


def _law_cells(law: dict[str, Any]) -> list[str]:
    if law["problem"]:
        return ["no law", "–", "–", "–", "–"]
    over = law.get("ci_over_passages")
    return [
        _with_interval(law["irreducible"], law["ci"]["irreducible"]),
        f"{number(over[0])} to {number(over[1])}" if over else "–",
        _with_interval(law["exponent"], law["ci"]["exponent"], 2),
        f"{_short(law['positions_within'])} ({_short(law['positions_within_ci'][0])} to "
        f"{_short(law['positions_within_ci'][1])})",
        number(law["irreducible_p_value"]),
    ]


def _with_interval(value: float, ends: Sequence[float | None], digits: int = 3) -> str:
    low, high = (number(end, digits) if end is not None else "∞" for end in ends)
    return f"{number(value, digits)} ({low} to {high})"


def _short(value: float | None) -> str:
    """A number of positions, or ∞."""
    if value is None:
        return "∞"
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.3g}"


def _rows_grid(result: dict[str, Any]) -> Grid:
    keys = list(result["grid"]) + (["seed"] if any("seed" in row for row in result["rows"]) else [])
    columns = [*keys, "positions", *result_columns(result), "M", "F", "M whole", "heard M", "unheard M", "problem"]
    rows: list[list[Cell | str]] = [
        [
            *(str(row[key]) for key in keys),
            number(row.get("num_positions")),
            *(number(row.get(name)) for name in result_columns(result)),
            *(_with_error(row, name) for name in (*QUANTITIES, "misalignment_whole")),
            number(row.get("heard_misalignment")),
            number(row.get("unheard_misalignment")),
            row["error"],
        ]
        for row in result["rows"]
    ]
    return Grid(f"All trainings of sweep {result['name']}", columns, rows, num_text_columns=len(keys))


def _groups(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str([row[key] for key in keys]), []).append(row)
    return list(groups.values())


def _mark(row: dict[str, Any], x_name: str, quantity: str) -> Mark:
    value, error = row[quantity], row.get(f"{quantity}_standard_error")
    if not finite(error):
        return Mark(row[x_name], value)
    return Mark(row[x_name], value, value - Z95 * error, value + Z95 * error)


def _label(values: dict[str, Any], if_none: str = "all") -> str:
    return ", ".join(f"{key.rsplit('.', 1)[-1]} = {value}" for key, value in values.items()) or if_none


def _within(result: dict[str, Any]) -> str:
    share = next((law["within"] for law in result["laws"] if not law["problem"]), 0.05)
    return f"{100 * share:g} %"


def _with_error(row: dict[str, Any], quantity: str) -> str:
    if quantity not in row:
        return "–"
    error = row.get(f"{quantity}_standard_error")
    return number(row[quantity]) + (f" ± {number(error)}" if finite(error) else "")


def _words(curve: Curve) -> str:
    ends = (curve.marks[0], curve.marks[-1])
    return f"{curve.label} from {ends[0].y:.3g} at {ends[0].x:,.4g} to {ends[1].y:.3g} at {ends[1].x:,.4g}"


def _colour(place: int) -> str:
    return PALETTE[place % len(PALETTE)]


def _legend(curves: Sequence[Curve]) -> list[tuple[str, str, str, str]]:
    return [(MARKS[curve.series], curve.series, "", curve.label) for curve in curves]
