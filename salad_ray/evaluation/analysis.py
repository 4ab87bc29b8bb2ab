"""What drives the gap, over many runs: how well misalignment M and forgetting F predict accuracy.

As in the paper: leave-one-out R² of speech accuracy on log M and of text accuracy on F, and the partial R² of each with
the other held fixed; beside them the same of M itself. All are of straight lines fitted by least squares to a table
with one row per model: `run`, `system`, `misalignment` and `forgetting` (nats per position), `text_accuracy` and
`speech_accuracy`, and maybe `group` and `misalignment_whole`, which is M with all but the last words spoken.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from rich.table import Table as Grid

from salad_ray.config import ConfigError
from salad_ray.names import BASE, CASCADE, UNTRAINED
from salad_ray.tables import read_bytes, read_json

VALUES = ("misalignment", "forgetting", "text_accuracy", "speech_accuracy")
_WHOLE = "misalignment_whole"
_WORDS = {
    "log_misalignment": "log M",
    "misalignment": "M",
    "log_misalignment_whole": "log M, whole",
    "forgetting": "F",
    "text_accuracy": "text accuracy",
    "speech_accuracy": "speech accuracy",
}
_QUESTIONS: tuple[tuple[str, str, str | None, float | None], ...] = (
    ("speech_accuracy", "log_misalignment", None, 0.75),
    ("text_accuracy", "forgetting", None, 0.74),
    ("speech_accuracy", "log_misalignment", "forgetting", 0.56),
    ("text_accuracy", "forgetting", "log_misalignment", 0.32),
    ("speech_accuracy", "misalignment", None, None),
    ("speech_accuracy", "misalignment", "forgetting", None),
    ("speech_accuracy", "log_misalignment_whole", None, None),
    ("speech_accuracy", "log_misalignment_whole", "forgetting", None),
)
"""Outcome, predictor, what is held fixed, and the R² that the paper found; the last two where all rows have it."""
_EMPTY = ("", "na", "n/a", "nan", "none", "null", "-", "–")
MIN_ROWS = 5
MAX_VIF = 10.0


@dataclass(frozen=True)
class Effect:
    """How well a quantity predicts an accuracy; None where it cannot be told.

    `r2` is leave-one-out where nothing is `given`, partial otherwise; `slope` is accuracy per nat, in the units of the
    table, with `given` in the model.
    """

    outcome: str
    predictor: str
    given: str | None
    r2: float | None
    ci_low: float | None
    ci_high: float | None
    slope: float | None
    paper: float | None


@dataclass(frozen=True)
class Analysis:
    """What `analyse` found; `points` are the rows that it used, `left_out` names the others and what they lack.

    `vif` is the variance inflation of log M and F, 1 / (1 − r²), None where one is a line of the other.
    """

    effects: list[Effect]
    num_rows: int
    num_groups: int
    resamples: int
    vif: float | None
    left_out: list[str]
    warnings: list[str]
    points: list[dict[str, Any]]


def runs_table(urls: Sequence[str], metric: str = "acc") -> list[dict[str, Any]]:
    """A row for each trained system of some runs, from `RUN/report/metrics.json`.

    Accuracies are means over benchmarks (clean speech), of those alone that all systems have in text and in speech, so
    that rows can be compared; the others are named in `benchmarks_left_out`. What a system lacks is None.

    Raises:
        ConfigError: a run without metrics or with damaged ones, or that is named twice; systems without a common
            benchmark.
    """
    names = [url.rstrip("/") for url in urls]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{name} is named {names.count(name)} times; name each run once")
    found = {name: _metrics(name) for name in names}
    systems = [(name, system, metrics) for name, metrics in found.items() for system in _systems(metrics)]
    accuracies = [_accuracies(metrics, system, metric) for _, system, metrics in systems]
    complete = [table for table in accuracies if all(table.values())]
    sides = [set(side) for table in complete for side in table.values()]
    common, known = (set.intersection(*sides), set.union(*sides)) if sides else (set(), set())
    if sides and not common:
        raise ConfigError(f"no benchmark is common to all of {', '.join(names)}; name runs that were evaluated alike")
    rows = []
    for (name, system, metrics), table in zip(systems, accuracies, strict=True):
        measured = metrics.get(system) or {}
        row: dict[str, Any] = {"run": name, "system": system}
        row |= {quantity: measured.get(quantity) for quantity in ("misalignment", "forgetting", _WHOLE)}
        for side, values in table.items():
            full = common <= values.keys() and bool(common)
            row[f"{side}_accuracy"] = math.fsum(values[key] for key in common) / len(common) if full else None
        row |= {"benchmarks": " ".join(sorted(common)), "benchmarks_left_out": " ".join(sorted(known - common))}
        rows.append(row)
    return rows


def _metrics(run: str) -> dict[str, Any]:
    url = f"{run}/report/metrics.json"
    try:
        metrics = read_json(url)
    except ValueError as error:
        raise ConfigError(f"{url} is damaged ({error}); run `salad report` on its config anew") from None
    if not isinstance(metrics, dict):
        raise ConfigError(f"{url} is missing or empty; run `salad report` on its config first, or name other runs")
    return metrics


def _systems(metrics: Mapping[str, Any]) -> list[str]:
    """What was trained, in the order of the file; the base and the cascade have no F and M of their own."""
    measured = [name for name, value in metrics.items() if isinstance(value, dict) and "misalignment" in value]
    scored = [row["system"] for row in metrics.get("accuracy") or []]
    return [name for name in dict.fromkeys(measured + scored) if name not in (UNTRAINED, BASE, CASCADE)]


def _accuracies(metrics: Mapping[str, Any], system: str, metric: str) -> dict[str, dict[str, float]]:
    """Accuracy by benchmark, in text and in speech."""
    result: dict[str, dict[str, float]] = {"text": {}, "speech": {}}
    for row in metrics.get("accuracy") or []:
        wanted = row["system"] == system and row.get("metric", metric) == metric
        if wanted and row.get("heard") is None and row.get("condition", "clean") == "clean":
            result[row["modality"]][row["benchmark"]] = row["accuracy"]
    return result


def read_table(path: str) -> list[dict[str, Any]]:
    """The rows of a CSV file (a path or URL) with the columns of this module; others are kept as text.

    An empty value, `na` or the like is None. `run` may be missing: rows are then named by their line.

    Raises:
        ConfigError: a file or column that is missing, something else than a number, a row that is too long.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name a CSV file or runs") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as CSV ({error}); save it as UTF-8 text") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    columns = [name.strip() for name in reader.fieldnames or []]
    missing = [name for name in VALUES if columns.count(name) != 1]
    if missing:
        raise ConfigError(
            f"{path}: its first line must name each of {', '.join(VALUES)} once; mend {', '.join(missing)}"
        )
    reader.fieldnames = columns
    try:
        return [_row(path, reader.line_num, cells) for cells in reader]
    except csv.Error as error:
        raise ConfigError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _row(path: str, line: int, cells: dict[str, Any]) -> dict[str, Any]:
    if None in cells:
        raise ConfigError(f"{path}, line {line}: more cells than columns; put quotes around text with commas")
    row: dict[str, Any] = {"run": f"line {line}", "system": ""} | {name: cell or "" for name, cell in cells.items()}
    for name in (*VALUES, *(name for name in (_WHOLE,) if name in row)):
        text = row[name].strip()
        try:
            row[name] = None if text.lower() in _EMPTY else float(text)
        except ValueError:
            raise ConfigError(f"{path}, line {line}: {name} is '{text}'; write a number or leave it empty") from None
    return row


def analyse(rows: Sequence[Mapping[str, Any]], resamples: int = 2000, seed: int = 0) -> Analysis:
    """Leave-one-out and partial R² of the accuracies on log M, M and F.

    Leave-one-out R² = 1 − Σ (y_i − ŷ_i)² / Σ (y_i − ȳ_i)², where both the line's ŷ_i and the mean ȳ_i are fitted
    without row i: what the line adds to guessing the mean; below 0 it adds nothing. Partial R² is the share of what the
    other quantity leaves unexplained that this one explains.

    Intervals (95 %) are percentiles of a bootstrap over groups: rows that share `group`, or without it `run`, are drawn
    together. Row i is left out with all its copies, which would otherwise predict it. A partial R² cannot fall below 0,
    so its interval is that of the partial correlation, squared: it begins at 0 where the sign is open. With fewer than
    5 groups there are none.

    Raises:
        ConfigError: fewer than 5 rows have all four values and M above 0, or one of these is the same in all of them.
    """
    left_out = [text for row in rows if (text := _lack(row))]
    usable = [dict(row) for row in rows if not _lack(row)]
    if len(usable) < MIN_ROWS:
        what = f" ({_listed(left_out)})" if left_out else ""
        raise ConfigError(f"{len(usable)} of {len(rows)} rows can be used{what}; name more runs, {MIN_ROWS} at least")
    columns = {name: np.array([float(row[name]) for row in usable]) for name in VALUES}
    for name, values in columns.items():
        if np.ptp(values) <= 1e-9 * np.abs(values).max():
            raise ConfigError(f"{name} is {values[0]:g} in all {len(usable)} rows; name runs that differ in it")
    columns["log_misalignment"] = np.log(columns["misalignment"])
    questions = _QUESTIONS[:-2]
    if all(_is_positive(row.get(_WHOLE)) for row in usable):
        columns[f"log_{_WHOLE}"] = np.log([float(row[_WHOLE]) for row in usable])
        questions = _QUESTIONS
    labels = [str(row.get("group") or row.get("run") or place) for place, row in enumerate(usable)]
    names, groups = np.unique(labels, return_inverse=True)
    weights = None
    if len(names) >= MIN_ROWS:  # (resamples, rows) how often each row is drawn
        shares = np.full(len(names), 1 / len(names))
        weights = np.random.default_rng(seed).multinomial(len(names), shares, resamples)[:, groups].astype(float)
    unshared = 1.0 - float(np.corrcoef(columns["log_misalignment"], columns["forgetting"])[0, 1]) ** 2
    vif = 1.0 / unshared if unshared > 1e-12 else None
    effects = [_effect(columns, weights, *question) for question in questions]
    return Analysis(
        effects=effects,
        num_rows=len(usable),
        num_groups=len(names),
        resamples=resamples,
        vif=vif,
        left_out=left_out,
        warnings=_warnings(usable, len(names), vif, effects),
        points=[
            {name: row.get(name) for name in ("run", "system", "group", *VALUES, _WHOLE) if name in row}
            for row in usable
        ],
    )


def _lack(row: Mapping[str, Any]) -> str:
    """What a row lacks, with its name; empty where it lacks nothing."""
    missing = [name for name in VALUES if row.get(name) is None or not math.isfinite(row[name])]
    name = " ".join(str(part) for part in (row.get("run"), row.get("system")) if part) or "a row without name"
    if missing:
        return f"{name}: no {', '.join(missing)}"
    return "" if _is_positive(row["misalignment"]) else f"{name}: misalignment {row['misalignment']:g} has no logarithm"


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _listed(texts: Sequence[str], most: int = 10) -> str:
    return "; ".join([*texts[:most], *([f"and {len(texts) - most} more"] if len(texts) > most else [])])


def _effect(
    columns: Mapping[str, np.ndarray],
    weights: np.ndarray | None,
    outcome: str,
    predictor: str,
    given: str | None,
    paper: float | None,
) -> Effect:
    x, y, held = columns[predictor], columns[outcome], [columns[given]] if given else []
    told = partial(partial_correlation if given else leave_one_out_r2, x, y, *held)
    value = float(told(np.ones((1, len(y))))[0])
    limits = None if weights is None else _limits(told(weights))
    if not np.isfinite(value):
        slope = None if given else _slope(y, x)
        return Effect(outcome, predictor, given, None, None, None, slope, paper)
    low, high = limits or (None, None)
    if given:
        value = value**2
    if given and limits:
        low, high = sorted(end**2 for end in limits)
        low = 0.0 if limits[0] < 0 < limits[1] else low
    return Effect(outcome, predictor, given, value, low, high, _slope(y, x, *held), paper)


def leave_one_out_r2(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Leave-one-out R² of y on x (N,), for R tables in which row i is there weights[r, i] times.

    Closed form: without row i and its copies, its residual is e_i / (1 − h_i), its distance from the mean
    (y_i − ȳ) / (1 − w_i / n). NaN where that leaves an x without spread.

    Returns:
        (R,)
    """
    number = weights.sum(1, keepdims=True)
    dx, dy = _centred(x, weights), _centred(y, weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = (weights * dx * dx).sum(1, keepdims=True)
        leverage = weights * (1 / number + dx * dx / spread)
        residuals = (dy - (weights * dx * dy).sum(1, keepdims=True) / spread * dx) / (1 - leverage)
        around_mean = dy / (1 - weights / number)
        r2 = 1 - (weights * residuals**2).sum(1) / (weights * around_mean**2).sum(1)
        defined = (spread[:, 0] > 1e-12 * (weights * x * x).sum(1)) & (leverage < 1 - 1e-9).all(1)
    return np.where(defined, r2, np.nan)


def partial_correlation(x: np.ndarray, y: np.ndarray, z: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Correlation of x and y with z held fixed, (N,) each, for R tables as in `leave_one_out_r2`; NaN where undefined.

    Returns:
        (R,)
    """
    dx, dy, dz = (_centred(value, weights) for value in (x, y, z))

    def inner(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (weights * a * b).sum(1)

    with np.errstate(divide="ignore", invalid="ignore"):
        zz = inner(dz, dz)
        xx, yy = inner(dx, dx) - inner(dx, dz) ** 2 / zz, inner(dy, dy) - inner(dy, dz) ** 2 / zz
        xy = inner(dx, dy) - inner(dx, dz) * inner(dy, dz) / zz
        defined = (xx > 1e-12 * inner(dx, dx)) & (yy > 1e-12 * inner(dy, dy))
        return np.where(defined, np.clip(xy / np.sqrt(xx * yy), -1, 1), np.nan)


def _centred(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return values - (weights * values).sum(1, keepdims=True) / weights.sum(1, keepdims=True)


def _slope(y: np.ndarray, *predictors: np.ndarray) -> float:
    """Of the first predictor, with the others and a constant in the model."""
    design = np.stack([*predictors, np.ones_like(y)], axis=1)
    return float(np.linalg.lstsq(design, y, rcond=None)[0][0])


def _limits(values: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 %; a resample without spread tells nothing, and where that is one in ten no interval is given."""
    known = values[np.isfinite(values)]
    if len(known) < 0.9 * len(values):
        return None
    low, high = np.quantile(known, (0.025, 0.975))
    return float(low), float(high)


def _warnings(
    rows: Sequence[Mapping[str, Any]], num_groups: int, vif: float | None, effects: Sequence[Effect]
) -> list[str]:
    found = []
    if vif is None or vif > MAX_VIF:
        size = "without bound" if vif is None else f"{vif:.1f}"
        found.append(
            f"log M and F rise together (VIF {size}, above {MAX_VIF:g}): partial R² cannot tell them apart here"
        )
    if num_groups < MIN_ROWS:
        found.append(
            f"no intervals: the {len(rows)} rows are of {num_groups} independent groups, {MIN_ROWS} are needed"
        )
    for effect in effects:
        if effect.r2 is None and (effect.given is None or vif is not None):
            found.append(
                f"{_name(effect)} is undefined: one row alone decides the line, or the other quantity explains all"
            )
        elif effect.r2 is not None and effect.ci_low is None and num_groups >= MIN_ROWS:
            found.append(f"{_name(effect)} has no interval: many resamples have no spread; name more runs")
        if effect.slope is not None and effect.slope > 0:
            found.append(f"{_name(effect)}: accuracy rises with {_WORDS[effect.predictor]} here, against the theory")
    dropped = sorted({name for row in rows for name in str(row.get("benchmarks_left_out") or "").split()})
    if dropped:
        found.append(f"benchmarks that not all systems have do not count: {', '.join(dropped)}")
    return found


def _name(effect: Effect) -> str:
    given = f" given {_WORDS[effect.given]}" if effect.given else ""
    kind = "partial R²" if effect.given else "leave-one-out R²"
    return f"{kind} of {_WORDS[effect.outcome]} on {_WORDS[effect.predictor]}{given}"


def analysis_grid(analysis: Analysis) -> Grid:
    """Each R², the first four beside the paper's, then what to keep in mind; fits a terminal of 80 columns."""
    groups = "" if analysis.num_groups == analysis.num_rows else f" in {analysis.num_groups} groups"
    title = f"What drives accuracy, over {analysis.num_rows} models{groups}"
    grid = Grid(title=title, title_justify="left", pad_edge=False)
    grid.add_column("of", no_wrap=True)
    grid.add_column("on")
    grid.add_column("R²", no_wrap=True)
    for name in ("value", "95 %", "slope", "paper"):
        grid.add_column(name, justify="right", no_wrap=True)
    for effect in analysis.effects:
        on = _WORDS[effect.predictor] + (f" given {_WORDS[effect.given]}" if effect.given else "")
        grid.add_row(
            effect.outcome.removesuffix("_accuracy"),
            on,
            "partial" if effect.given else "leave-one-out",
            _number(effect.r2),
            "–" if effect.ci_low is None else f"{_number(effect.ci_low)} to {_number(effect.ci_high)}",
            "–" if effect.slope is None else f"{effect.slope:+.3g}",
            _number(effect.paper),
        )
    notes = [f"! {text}" for text in analysis.warnings]
    if analysis.left_out:
        number = len(analysis.left_out)
        notes.append(f"{number} row{'s' if number > 1 else ''} left out: {_listed(analysis.left_out)}")
    grid.caption, grid.caption_justify = ("\n".join(notes) or None), "left"
    return grid


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
