"""Encoding through the stage (Ray Data, one actor) beside a bare loop over the same model and the same shards.

    python -m benchmarks.encoding

Mimi has its true architecture and random weights; the speech is eSpeak's. The bare loop reads a shard, decodes,
encodes in the same batches and writes, in a process of its own without Ray. Both compute with one thread and take
turns.

"steady": from the moment the first shard is written to the moment the last one is, in both, so that starting Ray Data,
the actor and the model is left out. "whole": the stage's manifest beside the bare loop with loading its model; of these
seconds, a fixed part that a real run pays once is the stage's start.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MimiConfig, MimiModel

from benchmarks.side_by_side import PAIRS, ROOT, in_subprocess, one_thread_each, ratio_row, take_turns
from salad_ray.config import Config
from salad_ray.configfile import load_config
from salad_ray.model.encoder import Encoder, encode_in_batches, load_encoder
from salad_ray.speech.audio import load_audio
from salad_ray.tables import Features, Table, Utterance, to_arrow
from tests.factories import a_table, redo, run_stage, table_of

NUM_DOCUMENTS = {"mimi": 14, "log_mel": 400}
"""12 s of speech each; Mimi has some hundred times the work with it."""
NUM_SHARDS = 8
BARE = "bare_features"


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: over all, and when (since the epoch) each shard was there."""

    secs: float
    written: dict[str, float]


def run(
    pairs: int = PAIRS, num_documents: dict[str, int] = NUM_DOCUMENTS, mimi: MimiConfig | None = None
) -> list[dict[str, Any]]:
    """Two rows for each encoder, steady and whole."""
    with tempfile.TemporaryDirectory(prefix="salad-bench-") as folder, one_thread_each():
        write_mimi(Path(folder, "model"), mimi or MimiConfig())
        rows = []
        for encoder, number in num_documents.items():
            config = prepare(f"{folder}/{encoder}", encoder, f"{folder}/model", number)
            rows += compare(encoder, audio_secs(config), measure(config, pairs))
        return rows


def measure(config: Config, pairs: int) -> list[tuple[Timing, Timing]]:
    """Stage and bare loop, taking turns."""
    turns = take_turns(lambda _: ours(config), lambda _: bare(config), pairs)
    require_equal(config)
    return turns


def write_mimi(folder: Path, config: MimiConfig) -> None:
    """A Mimi that has learnt nothing, as safetensors."""
    torch.manual_seed(0)
    MimiModel(config).save_pretrained(folder)


def prepare(run_dir: str, encoder: str, path: str, num_documents: int) -> Config:
    """Speak the world's documents."""
    overrides = (
        f"run_dir={run_dir}",
        f"world.num_natural={num_documents}",
        f"ingest.num_shards={NUM_SHARDS}",
        f"encode.encoder={encoder}",
        *([f"encode.path={path}"] if encoder == "mimi" else []),
    )
    config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
    for stage in ("ingest", "synthesize"):
        run_stage(config, stage, "natural")
    # From here on Ray Data has one actor.
    return config.model_copy(update={"ray": config.ray.model_copy(update={"max_actors": 1})})


def ours(config: Config) -> Timing:
    """The stage, anew."""
    redo(config, "encode", "natural")
    run_stage(config, "encode", "natural")
    table = table_of(config, "natural", "features")
    return Timing((table.manifest() or {})["seconds"], write_times(table))


def bare(config: Config) -> Timing:
    return Timing(**in_subprocess("benchmarks.encoding", config.run_dir))


def bare_loop(config: Config) -> Timing:
    """What one would write without Ray."""
    started = time.monotonic()
    source, target = table_of(config, "natural", "utterances"), a_table(config.run_dir, "natural", BARE)
    encoder = load_encoder(config.encode, "cpu")
    written = {}
    for shard in source.shards():
        rows: list[Utterance] = source.read_rows(Utterance, shard)
        audios = [load_audio(row.audio, sampling_rate=encoder.sampling_rate)[0] for row in rows]
        frames = encode_in_batches(encoder, audios, config.encode.batch_secs)
        kept = [features_of(row, own, encoder) for row, own in zip(rows, frames, strict=True)]
        target.write(shard, to_arrow(Features, kept))
        written[shard] = time.time()
    return Timing(time.monotonic() - started, written)


def features_of(row: Utterance, frames: np.ndarray, encoder: Encoder) -> Features:
    copied = ("utt_id", "recording_id", "offset_secs", "duration_secs", "domain", "split", "text", "words")
    return Features(
        **{name: getattr(row, name) for name in copied},
        num_frames=len(frames),
        frame_rate=encoder.frame_rate,
        dim=encoder.dim,
        features=frames.astype(np.float16).tobytes(),
    )


def write_times(table: Table) -> dict[str, float]:
    """Shard → when it was written, in seconds since the epoch."""
    return {path.stem: path.stat().st_mtime for path in Path(table.url).glob("*.parquet")}


def audio_secs(config: Config) -> dict[str, float]:
    """Seconds of speech in each shard."""
    table = table_of(config, "natural", "utterances")
    return {shard: sum(table.read(shard, ["duration_secs"])["duration_secs"].to_pylist()) for shard in table.shards()}


def require_equal(config: Config) -> None:
    """Both loops must have done the same work."""
    features, bare_features = table_of(config, "natural", "features"), a_table(config.run_dir, "natural", BARE)
    for shard in features.shards():
        left, right = (
            [np.frombuffer(row.features, np.float16) for row in table.read_rows(Features, shard)]
            for table in (features, bare_features)
        )
        if not all(np.allclose(*pair, rtol=1e-2, atol=1e-2) for pair in zip(left, right, strict=True)):
            raise RuntimeError(f"the stage and the bare loop wrote different features in {shard}")


def compare(encoder: str, audio: dict[str, float], turns: list[tuple[Timing, Timing]]) -> list[dict[str, Any]]:
    """The rows of one encoder."""
    steady = [[steady_rate(timing, audio) for timing in side] for side in zip(*turns, strict=True)]
    whole = [[sum(audio.values()) / timing.secs for timing in side] for side in zip(*turns, strict=True)]
    unit = "audio-s/s"
    length = {"audio (s)": sum(audio.values())}
    return [
        ratio_row(f"{encoder}, steady", unit, *steady) | length,
        ratio_row(f"{encoder}, whole", unit, *whole) | length,
    ]


def steady_rate(timing: Timing, audio: dict[str, float]) -> float:
    """Audio a second between the first shard's end and the last one's."""
    first, *others = sorted(timing.written, key=timing.written.__getitem__)
    return sum(audio[shard] for shard in others) / (timing.written[others[-1]] - timing.written[first])


def main() -> None:
    if "--bare" in sys.argv:
        timing = bare_loop(load_config(f"{sys.argv[-1]}/config.yaml"))
        print(json.dumps({"secs": timing.secs, "written": timing.written}))
        return
    for row in run():
        print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
