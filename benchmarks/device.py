"""How busy the encoding worker keeps its device, by threads that decode ahead of it; beside one thing after the other.

    python -m benchmarks.device

The device is a stand-in: it sleeps for as long as a GPU at the given real-time factor would compute, and leaves the
processor alone. All else is the stage's own: FLAC of 16 kHz decoded and resampled to Mimi's 24 kHz, features of Mimi's
width made into rows, shards written. "busy" is the device's share of the time from its first batch to the last
shard's end; "bare" decodes, computes and writes in turn.

The processor's seconds for an hour of speech, from the same runs, tell how many cores a device of any speed needs.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.side_by_side import PAIRS, ROOT, ratio_row, take_turns
from salad_ray.config import Config
from salad_ray.configfile import load_config
from salad_ray.speech.audio import encode_audio
from salad_ray.stages import encode
from salad_ray.stages.shards import ShardPart, write_shard
from salad_ray.tables import Table, Utterance, Word, to_arrow
from tests.factories import a_table

SPEED = 1000.0
"""Seconds of speech that the device encodes in a second."""
THREADS = (1, 2)
NUM_UTTERANCES, SECS = 200, 12.0
SHARDS = ("a", "b", "c")
BATCH_SECS = 60.0


class StandIn:
    """An encoder of Mimi's shape that takes as long as a device would."""

    name, sampling_rate, frame_rate, dim, revision, weights = "stand-in", 24_000, 12.5, 512, None, "none"

    def __init__(self, speed: float) -> None:
        self.speed, self.busy_secs, self.started = speed, 0.0, 0.0
        self.frames = np.random.default_rng(0).standard_normal((4096, self.dim), dtype=np.float32)

    def encode(self, audios: Sequence[np.ndarray]) -> list[np.ndarray]:
        begun = time.perf_counter()
        self.started = self.started or begun
        padded = len(audios) * max(map(len, audios)) / self.sampling_rate
        time.sleep(padded / self.speed)
        self.busy_secs += time.perf_counter() - begun
        return [self.frames[: round(len(audio) / self.sampling_rate * self.frame_rate)] for audio in audios]


class InTurn(encode.EncodeShard):
    """The same work without anything ahead: a careful pass has no threads."""

    def overlapped(self, windows: Any, load: Any, compute: Any, num_threads: int) -> Iterator[Any]:
        for window in windows:
            yield compute(window, [_Done(load(row)) for row in window])


class _Done:
    def __init__(self, value: Any) -> None:
        self.result = lambda: value


def run(pairs: int = PAIRS, num_utterances: int = NUM_UTTERANCES, speed: float = SPEED) -> list[dict[str, Any]]:
    """A row for each number of threads: the share of the time in which the device is busy."""
    with tempfile.TemporaryDirectory(prefix="salad-bench-") as folder:
        config = load_config(
            ROOT / "configs" / "quickstart.yaml", (f"run_dir={folder}", f"encode.batch_secs={BATCH_SECS}")
        )
        speech = a_table(folder, "natural", "utterances")
        rows = speak(num_utterances)
        for shard in SHARDS:
            speech.write(shard, to_arrow(Utterance, rows))
        return [measure(config, speech, speed, threads, pairs) for threads in THREADS]


def speak(number: int) -> list[Utterance]:
    """Noise with the level of speech; FLAC takes as long with it, or longer."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(number):
        secs = SECS * rng.uniform(0.5, 1.5)
        samples = rng.standard_normal(int(16_000 * secs)).cumsum()
        audio = (0.3 * samples / np.abs(samples).max()).astype(np.float32)
        words = [Word(f"w{i}", i * secs / 30, (i + 1) * secs / 30) for i in range(30)]
        row = Utterance(
            utt_id=f"u{index}", recording_id=f"u{index}", corpus="noise", text=" ".join(word.text for word in words),
            words=words, duration_secs=secs, split="train", audio=encode_audio(audio, 16_000, "FLAC"),
        )  # fmt: skip
        rows.append(replace(row, domain="noise"))
    return rows


def measure(config: Config, speech: Table, speed: float, num_threads: int, pairs: int) -> dict[str, Any]:
    own = config.model_copy(update={"encode": config.encode.model_copy(update={"num_threads": num_threads})})
    turns = take_turns(
        lambda _: busy(encode.EncodeShard, own, speech, speed), lambda _: busy(InTurn, own, speech, speed), pairs
    )
    hours = sum(speech.metadata(shard).num_rows for shard in SHARDS) * SECS / 3600
    cpu = sorted(cpu_secs / hours for (_, cpu_secs), _ in turns)
    row = ratio_row(f"{num_threads} threads", "busy", [share for (share, _), _ in turns], [b for _, (b, _) in turns])
    cores = cpu[len(cpu) // 2] / 3600 * speed
    return row | {"CPU s for an hour": round(cpu[len(cpu) // 2], 2), f"cores at {speed:,.0f} ×": round(cores, 2)}


def busy(make: type[encode.EncodeShard], config: Config, speech: Table, speed: float) -> tuple[float, float]:
    """The device's share of the time, and the seconds of the processor, for all shards."""
    worker = make.__new__(make)
    worker.config, worker.is_benchmark, worker.utterances = config, False, speech
    device = StandIn(speed)
    worker.encoder, worker.weights = device, device.weights
    target = a_table(config.run_dir, "natural", f"features-{time.monotonic_ns()}")
    cpu = time.process_time()
    for shard in SHARDS:
        parts: Iterator[ShardPart] = worker(shard)
        write_shard(target, shard, parts)
    share = device.busy_secs / (time.perf_counter() - device.started)
    cpu = time.process_time() - cpu
    target.delete()
    return share, cpu


def main() -> None:
    for row in run():
        print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
