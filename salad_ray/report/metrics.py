"""`report/metrics.json` and the gap table: what was measured, by system, domain and distance from the speech."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table as Grid

from salad_ray.evaluation.misalignment import Estimate, estimate
from salad_ray.tables import Measurement


def system_metrics(rows: Sequence[Measurement], heard: set[str]) -> dict[str, Any]:
    """F, M and the distillation loss (nats per position) of one system, with standard errors over passages.

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


def _quantities(rows: Sequence[Measurement]) -> dict[str, Any]:
    names = ("misalignment", "forgetting", "distillation")
    estimates: dict[str, Estimate] = {name: estimate(rows, name) for name in names}
    result: dict[str, Any] = {name: value.mean for name, value in estimates.items()}
    result |= {f"{name}_standard_error": value.standard_error for name, value in estimates.items()}
    any_estimate = estimates["misalignment"]
    return result | {"num_scored": any_estimate.num_positions, "num_passages": any_estimate.num_passages}


def gap_table(metrics: dict[str, Any]) -> Grid:
    """Untrained against Stage I: M and F by domain, with standard errors."""
    systems = [name for name in ("untrained", "stage1", "stage2") if name in metrics]
    grid = Grid(title="Misalignment M and forgetting F, nats per position (± standard error)")
    grid.add_column("domain")
    grid.add_column("heard")
    for system in systems:
        grid.add_column(f"M {system}", justify="right")
        grid.add_column(f"F {system}", justify="right")
    for domain, facts in metrics[systems[0]]["by_domain"].items():
        cells = [metrics[system]["by_domain"].get(domain, {}) for system in systems]
        grid.add_row(
            domain or "all", "yes" if facts["heard"] else "no", *(cell for row in cells for cell in _cells(row))
        )
    grid.add_section()
    grid.add_row("mean", "", *(cell for system in systems for cell in _cells(metrics[system])))
    return grid


def _cells(row: dict[str, Any]) -> tuple[str, str]:
    def cell(name: str) -> str:
        return f"{row[name]:.3f}±{row[f'{name}_standard_error']:.3f}" if name in row else "–"

    return cell("misalignment"), cell("forgetting")
