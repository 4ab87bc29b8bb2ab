"""`report/metrics.json` and the gap table: what was measured, by system, domain and distance from the speech."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np
from rich.table import Table as Grid
from sklearn.metrics import roc_auc_score

from salad_ray.config import PROTOCOLS
from salad_ray.evaluation.misalignment import difference, estimate
from salad_ray.selection.importance import ClusterLoss, reliability
from salad_ray.tables import Measurement

SYSTEMS = ("untrained", "stage1", "stage2", "control")
NAMES = {"untrained": "untrained", "stage1": "Stage I", "stage2": "Stage II", "control": "control"}
NAMES |= {"base": "text LLM", "cascade": "cascade"}
"""The control is Stage I continued on natural speech for as many steps as Stage II has."""


def system_metrics(rows: Sequence[Measurement], heard: set[str]) -> dict[str, Any]:
    """F, M and the distillation loss (nats per position) of one system, by both protocols, with standard errors.

    Args:
        rows: all measurements of the system.
        heard: domains of the natural training speech.
    """
    domains = sorted({row.domain for row in rows})
    by_domain = {
        domain: {"heard": domain in heard} | _quantities([row for row in rows if row.domain == domain])
        for domain in domains
    }
    by_distance = {
        str(distance): _quantities([row for row in rows if row.distance == distance])
        for distance in sorted({row.distance for row in rows})
    }
    return _quantities(rows) | {"by_domain": by_domain, "by_distance": by_distance}


QUANTITIES = ("misalignment", "forgetting", "distillation")


def _quantities(rows: Sequence[Measurement]) -> dict[str, Any]:
    """Of each protocol; names of `whole` end in its name, those of `interleaved` are bare."""
    result: dict[str, Any] = {}
    for protocol in PROTOCOLS:
        end = protocol_end(protocol)
        own = [row for row in rows if row.protocol == protocol]
        estimates = {name: estimate(own, name) for name in QUANTITIES}
        # JSON has no NaN; nothing measured has no mean, a single document no spread.
        result |= {f"{name}{end}": _known(value.mean) for name, value in estimates.items()}
        result |= {f"{name}{end}_standard_error": _known(value.standard_error) for name, value in estimates.items()}
        of_any = estimates["misalignment"]
        result |= {f"num_scored{end}": of_any.num_positions, f"num_passages{end}": of_any.num_passages}
    return result


def protocol_end(protocol: str) -> str:
    """What follows the names of a protocol's numbers in metrics.json."""
    return "" if protocol == "interleaved" else f"_{protocol}"


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def system_differences(systems: Mapping[str, Sequence[Measurement]], heard: set[str]) -> list[dict[str, Any]]:
    """Stage II − Stage I and Stage II − control on the same passages, for each quantity, protocol and side.

    Args:
        systems: all measurements of each system.
        heard: domains of the natural training speech.

    Returns:
        Rows with `difference`, `standard_error` and a paired 95 % interval (None where a single document leaves them
        open); `heard` is None for all domains.
    """
    found = []
    ours = systems.get("stage2", ())
    for other, protocol, side in product(("stage1", "control"), PROTOCOLS, (None, True, False)):
        parts = [
            [row for row in rows if row.protocol == protocol and (side is None or (row.domain in heard) == side)]
            for rows in (ours, systems.get(other, ()))
        ]
        for quantity in QUANTITIES:
            paired = difference(parts[0], parts[1], quantity)
            if paired is not None:
                facts = {"system_a": "stage2", "system_b": other, "quantity": quantity, "protocol": protocol}
                numbers = {
                    name: _known(value) if isinstance(value, float) else value for name, value in asdict(paired).items()
                }
                found.append(facts | {"heard": side} | numbers)
    return found


def difference_table(differences: Sequence[dict[str, Any]]) -> Grid:
    """What Stage II changed in M and F, by both protocols, over all domains, heard and unheard ones."""
    grid = Grid(title="Stage II − the other, on the same passages, nats (95 % interval)", title_justify="left")
    for name in ("", "than", "domains"):
        grid.add_column(name)
    for protocol in PROTOCOLS:
        grid.add_column(protocol, justify="right")
    cells = {tuple(row[name] for name in (*_ROW, "protocol")): row for row in differences}
    for quantity, other, side in dict.fromkeys(tuple(row[name] for name in _ROW) for row in differences):
        if quantity in _LETTERS:
            own = [cells.get((quantity, other, side, protocol)) for protocol in PROTOCOLS]
            grid.add_row(_LETTERS[quantity], NAMES[other], SIDES[side], *map(with_interval, own))
    return grid


_ROW = ("quantity", "system_b", "heard")
_LETTERS = {"misalignment": "M", "forgetting": "F"}
SIDES = {None: "all", True: "heard", False: "unheard"}


def with_interval(row: dict[str, Any] | None) -> str:
    """A paired difference with its interval."""
    if row is None:
        return "–"
    if row["ci_low"] is None:
        return f"{row['difference']:+.3f}"
    return f"{row['difference']:+.3f} ({row['ci_low']:+.3f} to {row['ci_high']:+.3f})"


def gap_tables(metrics: dict[str, Any], what: str = "") -> list[Grid]:
    """M, then F, of each system by domain, by both protocols, with standard errors; each fits 80 columns."""
    systems = [name for name in SYSTEMS if name in metrics]
    trained = [name for name in systems if name != "untrained"]
    titles = (
        ("misalignment", f"Misalignment M{what}", systems),
        ("misalignment_whole", f"M, all but the last words spoken{what}", systems),
        ("forgetting", f"Forgetting F{what}", trained),
        ("forgetting_whole", f"F at the last words{what}", trained),
    )
    return [
        _gap_table(metrics, quantity, title, shown)
        for quantity, title, shown in titles
        if any(metrics[system].get(quantity) is not None for system in shown)
    ]


def _gap_table(metrics: dict[str, Any], quantity: str, title: str, systems: list[str]) -> Grid:
    grid = Grid(title=f"{title}, nats per position (± standard error)", title_justify="left")
    grid.add_column("domain")
    grid.add_column("heard")
    for system in systems:
        grid.add_column(NAMES[system], justify="right")
    for domain, facts in metrics[systems[0]]["by_domain"].items():
        rows = (metrics[system]["by_domain"].get(domain, {}) for system in systems)
        grid.add_row(domain or "all", "yes" if facts["heard"] else "no", *(_cell(row, quantity) for row in rows))
    grid.add_section()
    grid.add_row("mean", "", *(_cell(metrics[system], quantity) for system in systems))
    return grid


def _cell(row: dict[str, Any], quantity: str) -> str:
    if row.get(quantity) is None:
        return "–"
    error = row[f"{quantity}_standard_error"]
    return f"{row[quantity]:.3f}" + ("" if error is None else f"±{error:.3f}")


def accuracy_table(accuracy: Sequence[dict[str, Any]], metric: str = "acc") -> Grid:
    """Accuracy of the base LLM reading and of each system listening, in percent with 95 % intervals; clean speech."""
    shown = [row for row in accuracy if row["metric"] == metric and row["condition"] == "clean"]
    columns = [("base", "text"), *((system, "speech") for system in (*SYSTEMS[1:], "cascade"))]
    columns = [key for key in columns if any((row["system"], row["modality"]) == key for row in shown)]
    grid = Grid(title="Accuracy, % (95 % interval): the text LLM reads, the others listen", title_justify="left")
    grid.add_column("benchmark")
    for system, _ in columns:
        grid.add_column({"base": "text"}.get(system) or NAMES.get(system, system), justify="right")
    cells = {(row["benchmark"], row["heard"], row["system"], row["modality"]): row for row in shown}
    for benchmark, heard in dict.fromkeys((row["benchmark"], row["heard"]) for row in shown):
        name = benchmark if heard is None else f"  {'heard' if heard else 'unheard'}"
        grid.add_row(name, *(_percent(cells.get((benchmark, heard, *key))) for key in columns))
    return grid


def hearing_table(margins: Sequence[dict[str, Any]]) -> Grid:
    """Hearing margins over silence, with the gap and the floors; a system that does not hear is called deaf."""
    grid = Grid(title="Hearing margin, points (95 % interval): accuracy hearing − with silence", title_justify="left")
    grid.add_column("benchmark")
    grid.add_column("system")
    for name in ("hears", "silence", "swapped", "margin", "gap"):
        grid.add_column(name, justify="right")
    grid.add_column("")
    keys = ("accuracy", "silence", "swapped")
    for row in sorted(margins, key=lambda row: row["benchmark"]):
        name = row["benchmark"] if row["heard"] is None else f"  {'heard' if row['heard'] else 'unheard'}"
        numbers = (f"{100 * row[key]:.0f}" if row[key] is not None else "–" for key in keys)
        gap = "–" if row["gap"] is None else f"{100 * row['gap']:.0f}"
        verdict = {True: "deaf", False: "", None: ""}[row["deaf"]]
        grid.add_row(name, NAMES.get(row["system"], row["system"]), *numbers, _short_margin(row), gap, verdict)
    return grid


def _short_margin(row: dict[str, Any]) -> str:
    """In whole points: the table must fit a terminal of 80 columns."""
    if row["margin"] is None:
        return "–"
    margin, low, high = (f"{100 * row[name]:+.0f}" for name in ("margin", "ci_low", "ci_high"))
    return f"{margin} ({low}…{high})".replace("-", "−")


def margin_text(row: dict[str, Any]) -> str:
    """A margin in points with its interval."""
    if row["margin"] is None:
        return "–"
    return f"{100 * row['margin']:+.1f} ({100 * row['ci_low']:+.1f} to {100 * row['ci_high']:+.1f})".replace("-", "−")


def hearing_sentences(margins: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each system: what it hears over all, and where it is deaf."""
    lines = []
    for system in dict.fromkeys(row["system"] for row in margins):
        own = [row for row in margins if row["system"] == system and row["margin"] is not None]
        names = [row["benchmark"] for row in own]
        main = [row for row in own if row["heard"] is None and row["benchmark"] in ("average", names[0])][-1:]
        lines += [
            f"hearing margin of {NAMES[system]} over silence, {row['benchmark']}: {margin_text(row)} points "
            f"({100 * row['accuracy']:.1f} % hearing, {100 * row['silence']:.1f} % with silence)"
            for row in main
        ]
        lines += deaf_sentences(own)
    return lines


def deaf_sentences(margins: Sequence[dict[str, Any]]) -> list[str]:
    """Who is deaf where: within silence, or where it is not, within the speech of other items."""
    lines = []
    for system in dict.fromkeys(row["system"] for row in margins):
        deaf = [row for row in margins if row["system"] == system and row["deaf"]]
        parts = {
            "silence": [row for row in deaf if row["ci_low"] <= 0],
            "the speech of another question": [row for row in deaf if row["ci_low"] > 0],
        }
        lines += [
            f"{NAMES[system]} is deaf on {'; '.join(place_name(row['benchmark'], row['heard']) for row in rows)}: "
            f"hearing the question is no better than hearing {what} (the 95 % interval of the difference includes 0)"
            for what, rows in parts.items()
            if rows
        ]
    return lines


def place_name(benchmark: Any, heard: Any) -> str:
    """A benchmark, or its part of heard or unheard domains."""
    return str(benchmark) + {True: ", heard domains", False: ", unheard domains"}.get(heard, "")


def _percent(row: dict[str, Any] | None) -> str:
    if row is None or not row["num_items"]:
        return "–"
    return f"{100 * row['accuracy']:.0f} ({100 * row['ci_low']:.0f}–{100 * row['ci_high']:.0f})"


def selection_table(selection: dict[str, Any], num_rows: int = 20) -> Grid:
    """The clusters that the model misunderstands most: M(c), and what was aimed at and drawn."""
    drawn = f"{selection['hours']:.2f} of {selection['budget_hours']:.2f} h"
    size = f"{selection['effective_sample_size']:,.0f} of {selection['num_web_passages']:,} passages"
    grid = Grid(title=f"Selection at γ = {selection['gamma']:g}: {drawn}; effective sample size {size}")
    for name in ("cluster", "M(c)", "probed", "P_web", "P_target", "selected", "hours"):
        grid.add_column(name, justify="right")
    rows = sorted(selection["by_cluster"], key=lambda row: -row["target_share"])
    for row in rows[:num_rows]:
        error = "" if row["standard_error"] is None else f"±{row['standard_error']:.3f}"
        grid.add_row(
            str(row["cluster_id"]),
            f"{row['distillation']:.3f}{error}",
            str(row["num_probed"]),
            f"{row['web_share']:.2%}",
            f"{row['target_share']:.2%}",
            f"{row['num_selected']:,}",
            f"{row['hours_selected']:.3f}",
        )
    if len(rows) > num_rows:
        rest = rows[num_rows:]
        shares = (f"{sum(row[name] for row in rest):.2%}" for name in ("web_share", "target_share"))
        selected, hours = (sum(row[name] for row in rest) for name in ("num_selected", "hours_selected"))
        grid.add_row(f"{len(rest)} more", "", "", *shares, f"{selected:,}", f"{hours:.3f}")
    return grid


def rankings(
    losses: Mapping[str, ClusterLoss], domains: Sequence[Counter[str]], heard: set[str]
) -> dict[str, dict[str, float | None]]:
    """How well M(c) by each protocol ranks the clusters: the noise in it, and whether it finds unheard domains."""
    return {
        protocol: {
            "reliability": reliability(loss.mean, loss.standard_error),
            "unheard_auc": unheard_auc(loss.mean.tolist(), domains, heard),
        }
        for protocol, loss in losses.items()
        if np.isfinite(loss.mean).any()
    }


def unheard_auc(losses: Sequence[float], domains: Sequence[Counter[str]], heard: set[str]) -> float | None:
    """Chance that a cluster of unheard domains has a larger M(c) than one of heard domains.

    Args:
        losses: M(c) of each cluster; those that are no number are left out.
        domains: for each cluster how many of its passages are of which domain; most of them decide.
        heard: domains of the natural training speech.

    Returns:
        The area under the ROC curve; None where all clusters are of one kind.
    """
    known = [index for index, counts in enumerate(domains) if counts and math.isfinite(losses[index])]
    unheard = [domains[index].most_common(1)[0][0] not in heard for index in known]
    if len(set(unheard)) < 2:
        return None
    return float(roc_auc_score(unheard, [losses[index] for index in known]))
