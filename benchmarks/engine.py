"""Web text through ingest, embed, cluster, probe and select: 10 k, then 100 k passages; time and memory.

    python -m benchmarks.engine

Real text where `SALAD_DATA` has it (passages of up to 40 words), else the embedded world's. All stages are the true
ones, on real Ray with two actors; only M(c) is made up, since no model is trained here: log-normal, from a fixed seed.
Memory is the largest private memory of any process of Ray's workers, and the largest resident set of the driver.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from benchmarks.side_by_side import one_thread_each
from salad_ray import pipeline
from salad_ray.config import Config
from salad_ray.configfile import parse_config
from salad_ray.flow import Step
from salad_ray.runs import Run
from salad_ray.stages.common import Stage
from salad_ray.tables import Measurement, Passage, Table, to_arrow
from salad_ray.text.world import DOMAINS, world_passages
from tests.factories import run_stage, table_of

NUM_PASSAGES = (10_000, 100_000)
DOCUMENT_PASSAGES = 13.0
"""Passages of up to 40 words that a document of the shared text makes, about."""
STAGES = (("ingest", "web"), ("embed", "web"), ("cluster", "web"), ("probe", "probe"), ("select", "active"))
NATURAL_HOURS = 100.0


def run(sizes: tuple[int, ...] = NUM_PASSAGES) -> list[dict[str, Any]]:
    """A row for each stage and number of passages."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="salad-bench-") as folder, one_thread_each():
        for size in sizes:
            config = prepare(Path(folder) / str(size), size)
            for stage, set_name in STAGES:
                if stage == "select":
                    speak_and_measure(config)
                rows.append({"wanted": size} | timed(config, stage, set_name))
    return rows


def prepare(folder: Path, size: int) -> Config:
    """The config of a run on about so many passages."""
    folder.mkdir(parents=True)
    return parse_config(
        {
            "run_dir": str(folder / "run"),
            "ray": {"num_cpus": 2, "max_actors": 2},
            "ingest": {
                "web": [str(write_text(folder / "web.parquet", size))],
                "num_shards": 16,
                "passages": {"max_words": 40},
            },
            "cluster": {"num_clusters": 128},
            "probe": {"passages_per_cluster": 8},
            "pack": {"num_lanes": 4},
            "stage2": {"num_steps": 1},
        }
    )


def write_text(path: Path, size: int) -> Path:
    """Documents for about so many passages; the same ones come first in a larger file."""
    source = Path(os.environ.get("SALAD_DATA", "../shared/data"), "text", "corpus.parquet")
    if source.is_file():
        table = pq.read_table(source, columns=["text", "id", "url", "domain", "license", "language"])
        table = table.slice(0, round(size / DOCUMENT_PASSAGES))
    else:
        passages = world_passages(size, DOMAINS, 0, "web")
        table = pa.table({"text": [row.text for row in passages], "id": [row.passage_id for row in passages]})
    pq.write_table(table, path, row_group_size=256)
    return path


def timed(config: Config, stage: str, set_name: str) -> dict[str, Any]:
    started = time.monotonic()
    with largest_processes() as peak:
        run_stage(config, stage, set_name)
    secs = time.monotonic() - started
    number = (table_of(config, "web", "passages").manifest() or {})["num_kept"]
    return {
        "stage": stage,
        "passages": number,
        "secs": secs,
        "passages/s": number / secs,
        "worker (MiB)": peak[0],
        "driver (MiB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


def speak_and_measure(config: Config) -> None:
    """The probe's speech, by eSpeak NG, and an M(c) that is made up; natural speech exists on paper only."""
    run_stage(config, "synthesize", "probe")
    passages = table_of(config, "probe", "passages")
    rng = np.random.default_rng(0)
    loss = rng.lognormal(0, 0.5, config.cluster.num_clusters)
    rows = [row for shard in passages.shards() for row in passages.read_rows(Passage, shard)]
    measured = [
        Measurement(
            system="stage1",
            passage=row.passage_id,
            domain=row.domain,
            distance=0,
            num_positions=100,
            misalignment=0.0,
            forgetting=0.0,
            distillation=float(100 * loss[row.cluster_id] * rng.lognormal(0, 0.2)),
            nll_speech=0.0,
            nll_text=0.0,
        )
        for row in rows
        if row.cluster_id is not None
    ]
    run = pipeline.resolve(config)
    finish(run, "measure", run.table("probe", "measurements_stage1"), to_arrow(Measurement, measured), {})
    facts = {"totals": {"training_hours": NATURAL_HOURS}}
    finish(run, "encode", run.table("natural", "features"), to_arrow(Measurement, []), facts)


def finish(run: Run, name: str, table: Table, rows: pa.Table, facts: dict[str, Any]) -> None:
    stage = Stage(run, Step(name, table.set, (table.name,)), table, {})
    stage.begin()
    table.write("part-00000", rows)
    stage.finish(shards={"part-00000": len(rows)}, **facts)


@contextmanager
def largest_processes() -> Iterator[list[float]]:
    """Yields [MiB]: the largest private memory of any process that works on passages."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                peak[0] = max(peak[0], private_mib(process))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def private_mib(process: psutil.Process) -> float:
    """Memory that a worker shares with nobody; 0 for other processes. Ray's shared object store is not counted."""
    try:
        if not any(part.startswith("ray::") for part in process.cmdline()):
            return 0.0
        memory = process.memory_info()
        return float(memory.rss - memory.shared) / 2**20
    except psutil.Error:
        return 0.0


def main() -> None:
    for row in run():
        print(json.dumps(row))
    ray.shutdown()


if __name__ == "__main__":
    main()
