"""Synthesis and embedding on one node and on two, each of one core; the driver's memory at 1 k and 100 k passages, and
with many shards of nothing.

    python -m benchmarks.nodes

The nodes are Ray's own (raylet, object store, workers) and share this machine, so that two of them need both of its
cores, and what else Ray does comes on top. Each actor computes with one thread. Rates are of the shards after the
first, since every node starts its processes once; the efficiency is the rate of two over twice the rate of one. What
the object stores spill to disk is summed over the nodes, each of which has a store of 100 MiB.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from benchmarks.engine import write_text
from benchmarks.side_by_side import PAIRS, in_subprocess, one_thread_each, ratio_row, take_turns
from salad_ray.config import Config
from salad_ray.configfile import parse_config
from salad_ray.flow import Step
from salad_ray.runs import Places, Run
from salad_ray.stages.common import Stage, Work, run_works
from salad_ray.stages.shards import ShardPart
from salad_ray.tables import Passage, to_arrow
from tests.factories import run_stage, table_of

SPOKEN, EMBEDDED = 2_000, 24_000
SIZES = (1_000, 100_000)
SHARDS = (400, 4_000)
ROWS_PER_SHARD = 250
STAGES = {"synthesize": ("natural", "utterances"), "embed": ("web", "embeddings")}
STORE_BYTES = 100 * 2**20


def run(pairs: int = PAIRS) -> list[dict[str, Any]]:
    """Rows/s of a node among two beside those of one alone; then memory at the larger size beside the smaller."""
    with one_thread_each():
        nodes = take_turns(lambda _: on_nodes(2, SPOKEN, EMBEDDED), lambda _: on_nodes(1, SPOKEN, EMBEDDED), pairs)
        small, large = (on_nodes(2, 0, size) for size in SIZES)
        few, many = (in_subprocess("benchmarks.nodes", "shards", str(number)) for number in SHARDS)
    of_stages = [
        ratio_row(
            f"{stage}: a node of two, one alone",
            "rows/s",
            [two[stage] / 2 for two, _ in nodes],
            [one[stage] for _, one in nodes],
        )
        for stage in STAGES
    ]
    sizes = f"{SIZES[1]:,} passages, {SIZES[0]:,}"
    driver = ratio_row(f"driver: {sizes}", "MiB", [large["driver"]], [small["driver"]])
    spilled = {"ours": large["spilled"], "bare": small["spilled"], "ours/bare": None, "min": None, "max": None}
    of_shards = ratio_row(
        f"driver: {SHARDS[1]:,} shards of a row, {SHARDS[0]:,}", "MiB", [many["driver"]], [few["driver"]]
    )
    return [*of_stages, driver, driver | {"name": f"spilled: {sizes}"} | spilled, of_shards]


def on_nodes(*settings: int) -> dict[str, float]:
    """`measure` in a process of its own, whose memory starts from nothing."""
    facts: dict[str, float] = in_subprocess("benchmarks.nodes", *map(str, settings))
    return facts


def measure(num_nodes: int, num_spoken: int, num_web: int) -> dict[str, float]:
    """Rows/s of each stage; the driver's largest resident set and what was spilled, in MiB."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES})
    for _ in range(num_nodes):
        cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    facts: dict[str, float] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="salad-bench-") as folder:
            for stage, (set_name, table) in STAGES.items():
                num_rows = num_spoken if set_name == "natural" else num_web
                if not num_rows:
                    continue
                config = config_of(cluster.address, Path(folder), num_spoken, num_web, num_rows)
                run_stage(config, "ingest", set_name)
                run_stage(config, stage, set_name)
                done = table_of(config, set_name, table).manifest() or {}
                share = (done["num_made"] - done["num_actors"]) / done["num_made"]
                facts[stage] = share * done["num_input"] / (done["seconds"] - done["first_secs"])
            facts["spilled"] = spilled(cluster.address)
            facts["driver"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    finally:
        ray.shutdown()
        cluster.shutdown()
    return facts


def spilled(address: str) -> float:
    """MiB of all nodes, which Ray says by its command alone, and only if there are some."""
    command = [str(Path(sys.executable).with_name("ray")), "memory", "--stats-only", "--address", address]
    return spilled_of(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def spilled_of(told: str) -> float:
    """MiB, of what `ray memory --stats-only` prints; it leaves the line out as long as nothing was spilled.

    Raises:
        ValueError: this is something else.
    """
    if "Plasma memory usage" not in told:
        raise ValueError(f"`ray memory --stats-only` printed no use of memory: {told!r}")
    found = re.search(r"^Spilled (\d+) MiB", told, re.MULTILINE)
    return float(found[1]) if found else 0.0


class OneRow:
    """A worker whose shards cost nothing, so that what is left is the driver's part."""

    def __call__(self, shard: str) -> Iterator[ShardPart]:
        yield ShardPart(to_arrow(Passage, [Passage(passage_id=shard, doc_id=shard, text="")]), 1, 1)


def measure_shards(num_shards: int) -> dict[str, float]:
    """The driver's largest resident set, in MiB."""
    with tempfile.TemporaryDirectory(prefix="salad-bench-") as folder:
        config = parse_config({"run_dir": f"{folder}/run", "ray": {"num_cpus": 2}})
        run = Run(config, Places(config.run_dir, "run", {"web/rows": "key"}))
        stage = Stage.of(run, Step("one row", "web", ("rows",)))
        run_works(run, [Work(stage, {f"part-{number:05d}": f"{number}" for number in range(num_shards)}, OneRow)])
        ray.shutdown()
    return {"driver": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}


def config_of(address: str, folder: Path, num_spoken: int, num_web: int, num_rows: int) -> Config:
    """The world is spoken; web text is read from a file. The more rows, the more shards."""
    web = folder / "web.parquet"
    return parse_config(
        {
            "run_dir": str(folder / "run"),
            "ray": {"address": address},
            "world": {"num_natural": max(num_spoken, 1), "num_heldout": 1},
            "ingest": {
                "web": [str(web if web.exists() else write_text(web, num_web))],
                "num_shards": max(2, num_rows // ROWS_PER_SHARD),
                "passages": {"max_words": 40},
            },
            "embed": {"dim": 64},
            "pack": {"num_lanes": 2},
        }
    )


def main() -> None:
    if "--bare" in sys.argv:
        settings = sys.argv[2:]
        facts = measure_shards(int(settings[1])) if settings[0] == "shards" else measure(*map(int, settings))
        print(json.dumps(facts))
    else:
        for row in run():
            print(json.dumps(row))


if __name__ == "__main__":
    main()
