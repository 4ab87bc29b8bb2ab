"""How large the probe must be: how well n passages per cluster rank the clusters, against a large probe.

    python -m benchmarks.probe_size RUN_DIR [--passages 96]

RUN_DIR is a finished run of the quickstart; it gets another, large probe beside its own. Small probes
are drawn from the large one; Spearman's rank correlation of their M(c) with the M(c) of the passages left out.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import ray
from rich.table import Table as Grid

from salad_ray.config import Config
from salad_ray.configfile import replaced
from salad_ray.console import console
from salad_ray.runs import open_run
from salad_ray.selection.importance import probe_size_study
from salad_ray.tables import Measurement
from tests.factories import run_stage, table_of

SIZES = (2, 4, 8, 12, 16, 24, 32, 48)
STAGES = ("probe", "synthesize", "encode", "measure")


def measure_probe(config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cluster, summed loss and positions of every passage of the probe, (N,) each."""
    for stage in STAGES:
        run_stage(config, stage, "probe")
    passages, measured = (table_of(config, "probe", name) for name in ("passages", "measurements_stage1"))
    owner = {
        row["passage_id"]: row["cluster_id"]
        for shard in passages.shards()
        for row in passages.read(shard, ["passage_id", "cluster_id"]).to_pylist()
    }
    sums: dict[str, list[float]] = {}
    for shard in measured.shards():
        rows = measured.read_rows(Measurement, shard)
        for row in (row for row in rows if row.protocol == config.probe.protocol):
            total = sums.setdefault(row.passage, [float(owner[row.passage]), 0.0, 0.0])
            total[1] += row.distillation
            total[2] += row.num_positions
    clusters, losses, positions = np.array(list(sums.values())).T
    return clusters.astype(np.int64), losses, positions


def show(rows: list[dict[str, Any]], title: str) -> None:
    grid = Grid(title=title, title_justify="left")
    for name in rows[0]:
        grid.add_column(name, justify="right")
    for row in rows:
        grid.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(grid)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.probe_size", description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("--passages", type=int, default=96)
    options = parser.parse_args()
    config = replaced(open_run(options.run_dir).config, {"probe.passages_per_cluster": options.passages})
    clusters, losses, positions = measure_probe(config)
    show(probe_size_study(clusters, losses, positions, SIZES, seed=0), "All clusters")
    means = {int(c): losses[clusters == c].sum() / positions[clusters == c].sum() for c in np.unique(clusters)}
    median = float(np.median(list(means.values())))
    large = np.isin(clusters, [cluster for cluster, mean in means.items() if mean > median])
    for name, keep in (("larger", large), ("smaller", ~large)):
        rows = probe_size_study(clusters[keep], losses[keep], positions[keep], SIZES, seed=0)
        show(rows, f"Only the half of the clusters with the {name} M(c)")
    ray.shutdown()


if __name__ == "__main__":
    main()
