"""Active selection (γ = 5) against uniform (γ = 0): the same Stage I, budget and positions, over several seeds.

    python -m benchmarks.active [--seeds 5] [--out FOLDER] [key=value …]

Every seed is another world, another teacher, another student: the quickstart up to Stage II with γ = 5, then selection
and Stage II once more with γ = 0. What is compared is M on the unheard domains; the interval is Student's t over the
paired differences of the seeds. Runs are kept in FOLDER and continued where they stand. About nine minutes a seed on
two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import ray
from rich.table import Table as Grid
from scipy import stats

from benchmarks.side_by_side import ROOT
from salad_ray import pipeline
from salad_ray.configfile import load_config
from salad_ray.console import console
from salad_ray.tables import read_json

SEEDS = 5
GAMMAS = (5.0, 0.0)
CONFIDENCE = 0.95


def run(
    seeds: int = SEEDS, folder: str = "runs/active", overrides: tuple[str, ...] = ("stage2.control=false",)
) -> list[dict[str, Any]]:
    """A row for each seed."""
    rows = []
    for seed in range(seeds):
        found = [measured(seed, gamma, folder, overrides) for gamma in GAMMAS]
        rows.append({"seed": seed} | found[0] | found[1])
    return rows


def measured(seed: int, gamma: float, folder: str, overrides: tuple[str, ...]) -> dict[str, float]:
    """M of one run; its metrics are kept beside the runs, so that a rerun goes on."""
    name = f"gamma{gamma:g}"
    kept = Path(folder, f"seed{seed}-{name}.json")
    if not kept.exists():
        run_dir = f"run_dir={folder}/seed{seed}"
        config = load_config(
            ROOT / "configs" / "quickstart.yaml", [*overrides, run_dir, f"seed={seed}", f"select.gamma={gamma}"]
        )
        done = pipeline.run_all(config)
        kept.write_text(json.dumps(read_json(f"{done.places.report_url}/metrics.json"), indent=1))
    metrics = json.loads(kept.read_text())
    return {
        f"unheard M, γ={gamma:g}": unheard(metrics["stage2"]),
        f"mean M, γ={gamma:g}": metrics["stage2"]["misalignment"],
        **({"unheard M, Stage I": unheard(metrics["stage1"])} if gamma == GAMMAS[0] else {}),
    }


def unheard(system: dict[str, Any]) -> float:
    return mean(row["misalignment"] for row in system["by_domain"].values() if not row["heard"])


def paired(left: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Mean of right − left with its interval, and as a share of right."""
    differences = right - left
    error = stats.sem(differences)
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(differences) - 1) * error)
    centre = float(differences.mean())
    return {"difference": centre, "low": centre - reach, "high": centre + reach, "effect": centre / float(right.mean())}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.active", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", default="runs/active")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    rows = run(options.seeds, options.out, ("stage2.control=false", *options.overrides))
    grid = Grid(title="Misalignment after Stage II, by seed")
    for name in rows[0]:
        grid.add_column(name, justify="right")
    for row in rows:
        grid.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(grid)
    columns = [np.array([row[f"unheard M, γ={gamma:g}"] for row in rows]) for gamma in GAMMAS]
    result = paired(*columns)
    console.print(
        f"unheard M, uniform − active: {result['difference']:.3f} [{result['low']:.3f}, {result['high']:.3f}] "
        f"({CONFIDENCE:.0%}, {len(rows)} seeds), {result['effect']:.0%} of uniform"
    )
    ray.shutdown()


if __name__ == "__main__":
    main()
