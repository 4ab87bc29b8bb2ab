"""Recorded speech through ingest, align and encode: beside a bare loop, and from one hour to twenty.

    python -m benchmarks.recorded

The recordings of `SALAD_DATA`, listed again and again under new ids; decoding, alignment and encoding are done for
every one of them. Each stage has one Ray actor and the bare loop one process, both with one thread, taking turns; the
bare loop calls the same functions and writes the same tables, without Ray. Rates are of the steady part, from the first
shard to the last, so that starting Ray and the actors is left out; "whole" includes it.

Memory: the largest resident set of any actor during a stage, while the audio grows twentyfold in as many shards.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
import soundfile

from benchmarks.encoding import Timing, steady_rate, write_times
from benchmarks.side_by_side import PAIRS, in_subprocess, one_thread_each, ratio_row, take_turns
from salad_ray.config import Config
from salad_ray.configfile import load_config, parse_config
from salad_ray.model.encoder import load_encoder
from salad_ray.stages.align import AlignShard
from salad_ray.stages.encode import EncodeShard
from salad_ray.stages.ingest import CheckShard
from salad_ray.stages.shards import ShardPart, write_shard
from tests.factories import a_table, redo, run_stage, table_of

Turns = list[tuple[Timing, Timing]]
Rate = Callable[[Timing, dict[str, float]], float]

NUM_SHARDS = 8
PAIR_HOURS = {"ingest": 16.0, "align": 0.75, "encode": 8.0}
"""A shard of a true run holds hours, and Ray's price is one for each shard; aligning is the slow one."""
MEMORY_HOURS = (1.0, 20.0)
STAGES = {"ingest": "utterances", "align": "aligned", "encode": "features"}
FOLDERS = ("lj_text_male", "ljspeech")


def run(
    pairs: int = PAIRS, hours: tuple[float, ...] = MEMORY_HOURS, pair_hours: dict[str, float] = PAIR_HOURS
) -> list[dict[str, Any]]:
    """Two rows for each stage beside the bare loop, then one for each stage and amount of audio."""
    with tempfile.TemporaryDirectory(prefix="salad-bench-") as folder, one_thread_each():
        rows = side_by_side(Path(folder), pair_hours, pairs)
        memory = [row for amount in hours for row in peak_memory(Path(folder), amount)]
    names = list(rows[0]) + [name for name in memory[0] if name not in rows[0]]
    return [{name: row.get(name) for name in names} for row in rows + memory]


def side_by_side(folder: Path, hours: dict[str, float], pairs: int) -> list[dict[str, Any]]:
    """Every stage on a corpus of its own; `encode` without word times, which cost it nothing."""
    rows = []
    for stage, table in STAGES.items():
        config = prepare(folder / f"pairs-{stage}", hours[stage], "none" if stage == "encode" else "pocketsphinx")
        if stage != "ingest":
            run_stage(config, "ingest", "natural")
        turns = take_turns(partial(of_stage, ours, config, stage), partial(of_stage, bare, config, stage), pairs)
        audio = audio_secs(config, "utterances")
        rows += [
            ratio_row(f"{stage}, {kind}", "audio-s/s per core", *sides(turns, rate, audio))
            | {"audio (h)": hours[stage]}
            for kind, rate in (("steady", steady_rate), ("whole", whole_rate))
        ]
        require_equal(config, table)
    return rows


def sides(turns: Turns, rate: Rate, audio: dict[str, float]) -> list[list[float]]:
    """Rates of the stage, and of the bare loop."""
    return [[rate(timing, audio) for timing in side] for side in zip(*turns, strict=True)]


def whole_rate(timing: Timing, audio: dict[str, float]) -> float:
    return sum(audio.values()) / timing.secs


def peak_memory(folder: Path, hours: float) -> list[dict[str, Any]]:
    """The stages on so much audio; everything but the amount is the same."""
    config = prepare(folder / f"hours-{hours:g}", hours)
    config = config.model_copy(update={"ray": config.ray.model_copy(update={"max_actors": 2})})  # half the time
    rows = []
    for stage in STAGES:
        with largest_actor() as peak:
            timing = ours(config, stage)
        name, rate = f"{stage}, {hours:g} h, two actors", hours * 3600 / timing.secs / 2
        rows.append(
            {"name": name, "unit": "audio-s/s per core", "ours": rate, "audio (h)": hours, "peak (MiB)": peak[0]}
        )
    return rows


def prepare(folder: Path, hours: float, aligner: str = "pocketsphinx") -> Config:
    """A corpus of so many hours by reference, and the config of its run."""
    write_corpus(folder / "corpus", hours)
    return parse_config(
        {
            "run_dir": str(folder / "run"),
            "ray": {"num_cpus": 2, "max_actors": 1},
            "ingest": {"corpora": [str(folder / "corpus")], "num_shards": NUM_SHARDS},
            "pack": {"num_lanes": 1},
            "align": {"aligner": aligner},
        }
    )


def write_corpus(folder: Path, hours: float) -> None:
    """List the recordings again and again until they last so long; a hundred of them make a recording to be dealt."""
    source = Path(os.environ.get("SALAD_DATA", "../shared/data"), "speech").resolve()
    (folder).mkdir(parents=True)
    clips = []
    for name in FOLDERS:
        (folder / name).symlink_to(source / name)
        with open(source / name / "transcripts.tsv", encoding="utf-8") as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                path = f"{name}/{row['audio']}"
                clips.append((path, soundfile.info(str(folder / path)).duration, row["text"]))
    with open(folder / "transcripts.tsv", "w", encoding="utf-8") as file:
        file.write("utt_id\taudio\ttext\trecording_id\n")
        secs, number = 0.0, 0
        while secs < hours * 3600:
            path, duration, text = clips[number % len(clips)]
            file.write(f"{number:07d}\t{path}\t{text}\tr{number // 20}\n")
            secs, number = secs + duration, number + 1


def of_stage(side: Callable[[Config, str], Timing], config: Config, stage: str, _: int) -> Timing:
    return side(config, stage)


def ours(config: Config, stage: str) -> Timing:
    """The stage, anew; the catalog is part of ingest, but not of its steady rate."""
    redo(config, stage, "natural")
    run_stage(config, stage, "natural")
    table = table_of(config, "natural", STAGES[stage])
    return Timing((table.manifest() or {})["seconds"], write_times(table))


def bare(config: Config, stage: str) -> Timing:
    return Timing(**in_subprocess("benchmarks.recorded", config.run_dir, stage))


def bare_loop(config: Config, stage: str) -> Timing:
    """The same work in a plain loop, written to tables of its own."""
    started = time.monotonic()
    natural = {name: table_of(config, "natural", name) for name in ("catalog", "utterances")}
    workers: dict[str, Callable[[], Callable[[str], Iterator[ShardPart]]]] = {
        "ingest": lambda: CheckShard(config, natural["catalog"]),
        "align": lambda: AlignShard(config, natural["utterances"]),
        "encode": lambda: EncodeShard(
            config, "natural", natural["utterances"], load_encoder(config.encode, "cpu").weights
        ),
    }
    worker = workers[stage]()
    target = a_table(config.run_dir, "natural", f"bare_{STAGES[stage]}")
    source = natural[{"ingest": "catalog", "align": "utterances", "encode": "utterances"}[stage]]
    written = {}
    for shard in source.shards():
        write_shard(target, shard, worker(shard))
        written[shard] = time.time()
    return Timing(time.monotonic() - started, written)


def audio_secs(config: Config, name: str) -> dict[str, float]:
    table = table_of(config, "natural", name)
    return {shard: sum(table.read(shard, ["duration_secs"])["duration_secs"].to_pylist()) for shard in table.shards()}


def require_equal(config: Config, name: str) -> None:
    """Both loops must have done the same work."""
    left, right = (table_of(config, "natural", table) for table in (name, f"bare_{name}"))
    if any(left.read(shard) != right.read(shard) for shard in left.shards()):
        raise RuntimeError(f"the stage and the bare loop wrote different {name}")


@contextmanager
def largest_actor() -> Iterator[list[float]]:
    """Yields [MiB]: the largest resident set of any of Ray's actors while the block lasts."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                peak[0] = max(peak[0], actor_mib(process))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def actor_mib(process: psutil.Process) -> float:
    """Private memory of an actor; 0 for any other process. Ray's shared object store is not counted."""
    try:
        if "MapWorker" not in process.name() and "ray::" not in " ".join(process.cmdline()):
            return 0.0
        memory = process.memory_info()
        return (memory.rss - memory.shared) / 2**20
    except psutil.Error:
        return 0.0


def main() -> None:
    if "--bare" in sys.argv:
        timing = bare_loop(load_config(f"{sys.argv[-2]}/config.yaml"), sys.argv[-1])
        print(json.dumps({"secs": timing.secs, "written": timing.written}))
        return
    for row in run():
        print(json.dumps(row, indent=1))
    ray.shutdown()


if __name__ == "__main__":
    main()
