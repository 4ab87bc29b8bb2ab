"""Synthesis and embedding on one simulated node and on two, each of one core.

    python -m benchmarks.nodes

The nodes are Ray's own (raylet, object store, workers) and share this machine, so that two of them need both of its
cores, and what else Ray does comes on top. Each actor computes with one thread. Rates are of the shards after the
first, since every node starts its processes once; the efficiency is the rate of two over twice the rate of one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from benchmarks.side_by_side import one_thread_each, ratio_row, take_turns
from salad_ray import pipeline
from salad_ray.config import parse_config
from salad_ray.tables import Table

PAIRS = 3
STAGES = {"synthesize": ("natural", "utterances"), "embed": ("web", "embeddings")}


def run(pairs: int = PAIRS) -> list[dict[str, Any]]:
    """A row for each stage: rows/s of two nodes, half of them beside those of one, and the efficiency."""
    with one_thread_each(), tempfile.TemporaryDirectory(prefix="salad-bench-") as folder:
        outcomes = take_turns(
            lambda pair: on_nodes(2, Path(folder) / f"two-{pair}"),
            lambda pair: on_nodes(1, Path(folder) / f"one-{pair}"),
            pairs,
        )
    return [
        ratio_row(
            f"{stage}, two nodes / 2 × one",
            "rows/s of a node",
            [two[stage] / 2 for two, _ in outcomes],
            [one[stage] for _, one in outcomes],
        )
        for stage in STAGES
    ]


def on_nodes(number: int, folder: Path) -> dict[str, float]:
    """Rows a second of each stage."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(number):
        cluster.add_node(num_cpus=1)
    config = parse_config(
        {
            "run_dir": str(folder),
            "ray": {"address": cluster.address},
            "world": {"num_natural": 2400, "num_heldout": 1, "num_web": 24_000},
            "ingest": {"num_shards": 24},
            "embed": {"dim": 64},
        }
    )
    rates = {}
    try:
        for stage, (set_name, table) in STAGES.items():
            pipeline.run_stage(config, "ingest", set_name)
            pipeline.run_stage(config, stage, set_name)
            facts = Table(config.run_dir, set_name, table).manifest() or {}
            shards = facts["num_made"] - facts["num_actors"]
            rates[stage] = facts["num_input"] * shards / facts["num_made"] / (facts["seconds"] - facts["first_secs"])
    finally:
        ray.shutdown()
        cluster.shutdown()
    return rates


if __name__ == "__main__":
    from benchmarks.__main__ import show

    show("nodes", full=False)
