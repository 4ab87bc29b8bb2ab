"""The reader beside what a training rank needs, and planning at the size of a large corpus.

    python -m benchmarks reader

A run of 24 billion positions in six hours takes 1.1 million positions a second, 17,200 for each of 64 ranks. Feature
shards here are two hours of speech, 92 MB: recordings of 60 utterances of 2–30 s, word times, 512 float16 values a
frame (random ones: they do not compress, real ones hardly do). They lie on the local disk, mostly in the page cache.

Planning runs over metadata that is made up on the way, so it can be of any size; what making it up takes is left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks import packing
from benchmarks.side_by_side import ROOT
from salad_ray.config import PackConfig
from salad_ray.sequences.loader import LaneReader
from salad_ray.sequences.plan import plan_lane, plan_shard_name, read_without_features
from salad_ray.tables import Features, PlanRow, Table, to_arrow
from tests.factories import a_table

NUM_RANKS = 64
NEEDED = 17_200.0
"""Positions a second of one rank."""
NUM_LANES = 2  # of the 64; one rank reads one
NUM_SHARDS, NUM_EPOCHS = 9, 2  # of a lane
RECORDING_SIZE = 60
CONFIG = PackConfig(num_lanes=NUM_RANKS, rows_per_lane=4)
NUM_PLANNED, NUM_PLANNED_FULL = 100_000, 1_000_000
CORPUS_HOURS, CORPUS_EPOCHS = 141_000, 7
NUM_STEPS = 40  # of the loop beside the reader
NUM_CALLS = 50_000  # of PyTorch in each of them, about a tenth of its time, twice

Results = list[dict[str, Any]]


def run(full: bool = False) -> Results:
    """Measure; each result has name, value and unit."""
    with tempfile.TemporaryDirectory(prefix="salad-bench-") as folder:
        write_tables(folder)
        results = [result for lane in range(NUM_LANES) for result in in_subprocess("read", folder, str(lane))]
        results += in_subprocess("starve", folder) + in_subprocess("metadata", folder)
    for size in (NUM_PLANNED, NUM_PLANNED_FULL) if full else (NUM_PLANNED,):
        results += in_subprocess("plan", str(size))
    return results


def in_subprocess(*arguments: str) -> Results:
    """A measurement of this module in a process of its own, computing with one thread: its peak memory counts."""
    command = [sys.executable, "-m", "benchmarks.reader", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    output = subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def result(name: str, value: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit}


def peak_mib() -> float:
    """Peak memory of this process alone; `getrusage` would begin with that of the process which started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


# Reading.


@dataclass(frozen=True)
class CountingTable(Table):
    """A table that remembers the sizes of the shards that were read."""

    sizes: list[int] = field(default_factory=list, compare=False)

    def read(self, shard: str, columns: Any = None) -> pa.Table:
        table = super().read(shard, columns)
        self.sizes.append(table.nbytes)
        return table


def write_tables(folder: str) -> None:
    """Features and plans of a few lanes."""
    rng = np.random.default_rng(0)
    vocabulary = packing._vocabulary(rng)
    tokenizer = packing._tokenizer(vocabulary)
    tokenizer.save_pretrained(f"{folder}/tokenizer")
    features, plan = a_table(folder, "natural", "features"), a_table(folder, "natural", "plan")
    for lane in range(NUM_LANES):
        shards = [f"lane-{lane}-shard-{i}" for i in range(NUM_SHARDS)]
        for shard in shards:
            utterances = packing._shard(vocabulary, RECORDING_SIZE, rng)
            features.write(shard, to_arrow(Features, [with_features(utterance, rng) for utterance in utterances]))
        for epoch in range(NUM_EPOCHS):
            rows, _ = plan_lane(
                lambda shard: read_without_features(features, shard),
                shards, tokenizer, CONFIG, lane=lane, epoch=epoch, seed=0,
            )  # fmt: skip
            plan.write(plan_shard_name(lane, epoch), to_arrow(PlanRow, rows))


def with_features(utterance: Features, rng: np.random.Generator) -> Features:
    values = rng.standard_normal((utterance.num_frames, utterance.dim), dtype=np.float32)
    return replace(utterance, features=values.astype(np.float16).tobytes())


def open_reader(folder: str, lane: int) -> tuple[LaneReader, CountingTable, int]:
    """A rank's reader, its features and how many steps they last."""
    from transformers import AutoTokenizer

    features, plan = (
        CountingTable(f"{folder}/natural/features", "natural", "features"),
        a_table(folder, "natural", "plan"),
    )
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
    reader = LaneReader(plan, features, tokenizer, CONFIG, rank=lane, world_size=NUM_RANKS, micro_batch_rows=4)
    num_rows = sum(plan.metadata(plan_shard_name(lane, epoch)).num_rows for epoch in range(NUM_EPOCHS))
    return reader, features, num_rows // CONFIG.rows_per_lane


def read(folder: str, lane: int) -> Results:
    """As fast as it goes, from the third shard on."""
    reader, features, num_steps = open_reader(folder, lane)
    started, first_bytes, num_positions = None, 0, 0
    peaks = {0: 0.0}  # by shards read
    with closing(reader.__iter__()) as steps:
        for batches in islice(steps, num_steps - reader.prefetch_steps):
            if started is not None:
                num_positions += sum(batch.num_positions for batch in batches)
            elif len(features.sizes) > 2:
                started, first_bytes = (time.perf_counter(), time.process_time()), sum(features.sizes)
            peaks[len(features.sizes)] = peak_mib()
        ended = time.perf_counter(), time.process_time()
    assert started is not None, "fewer than three shards"
    secs, cpu_secs = (end - start for start, end in zip(started, ended, strict=True))
    rate, num_bytes = num_positions / secs, sum(features.sizes) - first_bytes
    name, last = f"rank {lane} of {NUM_RANKS}", max(peaks)
    return [
        result(f"{name}: read and collated", rate, "positions/s"),
        result(f"{name}: of what training needs", rate / NEEDED, "×"),
        result(f"{name}: CPU", 1e6 * cpu_secs / num_positions, "µs per position"),
        result(f"{name}: features read", num_bytes / secs / 1e6, "MB/s"),
        result(f"{name}: features read at the rate needed", num_bytes / num_positions * NEEDED / 1e6, "MB/s"),
        result(f"{name}: peak memory", peaks[last], "MiB"),
        result(f"{name}: of it after the first {NUM_SHARDS} shards of {last}", peaks[last] - peaks[NUM_SHARDS], "MiB"),
    ]


def starve(folder: str) -> Results:
    """A consumer that takes as long as training would. It makes calls while the reader works and again when it rests:
    the difference is what the reader costs a loop that needs the interpreter."""
    reader, _, num_steps = open_reader(folder, 0)
    early, late = [], []
    with closing(reader.__iter__()) as steps:
        next(steps)
        reader.wait_secs, started = 0.0, time.perf_counter()
        for batches in islice(steps, min(NUM_STEPS, num_steps - 1 - reader.prefetch_steps)):
            until = time.perf_counter() + sum(batch.num_positions for batch in batches) / NEEDED
            early.append(timed_calls())
            time.sleep(max(0.0, until - time.perf_counter() - 1.5 * early[0]))
            late.append(timed_calls())
            time.sleep(max(0.0, until - time.perf_counter()))
        secs = time.perf_counter() - started
    return [
        result("at the rate needed: waiting for the reader", 100 * reader.wait_secs / secs, "% of the time"),
        result("at the rate needed: the loop's own calls", 100 * sum(late) / secs, "% of the time"),
        result(
            "at the rate needed: their being longer while it reads",
            100 * (sum(early) - sum(late)) / secs,
            "% of the time",
        ),
    ]


def timed_calls() -> float:
    """Seconds of a fixed number of small calls, as a training loop makes them to launch kernels."""
    started, x = time.perf_counter(), torch.zeros(8)
    for _ in range(NUM_CALLS):
        x.add_(1.0)
    return time.perf_counter() - started


# Planning.


def metadata(folder: str) -> Results:
    """What planning reads of a feature shard."""
    table = a_table(folder, "natural", "features")
    started = time.process_time()
    num = sum(len(read_without_features(table, shard)) for shard in table.shards())
    return [
        result(
            "reading a shard without its features", 1e6 * (time.process_time() - started) / num, "CPU µs per utterance"
        )
    ]


class MadeUp:
    """Shards of metadata, made from a few utterances under new names; counts hours and the time that it takes."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.vocabulary = packing._vocabulary(rng)
        self.templates = [packing._shard(self.vocabulary, RECORDING_SIZE, rng) for _ in range(8)]
        self.cpu_secs, self.hours = 0.0, 0.0

    def __call__(self, shard: str) -> list[Features]:
        started = time.process_time()
        utterances = self.templates[int(shard) % len(self.templates)]
        named = [
            replace(utterance, utt_id=f"{shard}-{i}", recording_id=f"{shard}-{i // RECORDING_SIZE}")
            for i, utterance in enumerate(utterances)
        ]
        self.hours += sum(utterance.duration_secs for utterance in utterances) / 3600
        self.cpu_secs += time.process_time() - started
        return named


def plan(num_utterances: int) -> Results:
    """One lane, one epoch, and writing it."""
    load = MadeUp()
    tokenizer = packing._tokenizer(load.vocabulary)
    shards = [f"{i:06d}" for i in range(-(-num_utterances // packing.SHARD_SIZE))]
    num, peak, started = len(shards) * packing.SHARD_SIZE, peak_mib(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="salad-bench-") as folder:
        rows, _ = plan_lane(load, shards, tokenizer, CONFIG, lane=0, epoch=0, seed=0)
        planned_secs = time.process_time() - started - load.cpu_secs
        table = a_table(folder, "natural", "plan")
        table.write("plan", to_arrow(PlanRow, rows))
        secs = time.process_time() - started - load.cpu_secs
        meta = table.metadata("plan")
        num_bytes = sum(
            meta.row_group(i).column(j).total_compressed_size
            for i in range(meta.num_row_groups)
            for j in range(meta.num_columns)
        )
    name, corpus = f"planning {num:,} utterances", CORPUS_HOURS / load.hours * CORPUS_EPOCHS
    what = f"{CORPUS_EPOCHS} epochs of {CORPUS_HOURS:,} h, extrapolated"
    return [
        result(f"{name}: planning", 1e6 * planned_secs / num, "CPU µs per utterance"),
        result(f"{name}: and writing", 1e6 * secs / num, "CPU µs per utterance"),
        result(f"{name}: plan", num_bytes / num, "bytes per utterance"),
        result(f"{name}: peak memory above the start", peak_mib() - peak, "MiB"),
        result(f"{name}: {what}", secs * corpus / 3600, "CPU hours"),
        result(f"{name}: {what}", num_bytes * corpus / 1e9, "GB"),
    ]


def main() -> None:
    parts = {
        "read": lambda: read(sys.argv[2], int(sys.argv[3])),
        "starve": lambda: starve(sys.argv[2]),
    }
    parts |= {"metadata": lambda: metadata(sys.argv[2]), "plan": lambda: plan(int(sys.argv[2]))}
    print(json.dumps(parts[sys.argv[1]]()))


if __name__ == "__main__":
    main()
