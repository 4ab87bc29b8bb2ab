"""Checkpoints: how long training stands still, bytes, and time to resume, beside DeepSpeed's own.

    python -m benchmarks.checkpoint

One worker, ZeRO 2, fp32, a Qwen2 of 62 M parameters with random weights, in a process of its own. Both write to the
same disk, taking turns. Ours copies to host memory and writes while training goes on; "stalled" is that copy, "written"
the time until the checkpoint is whole. DeepSpeed's `save_checkpoint` returns when everything is written. "resume"
reads the checkpoint back into the engine. Ours may be read at any other number of workers; DeepSpeed's has to be
converted first (`ds_to_universal`), which is timed as "to universal".
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import deepspeed
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.side_by_side import in_subprocess
from salad_ray.config import DistillConfig
from salad_ray.distill.checkpoints import CheckpointReader, CheckpointWriter, latest
from salad_ray.distill.engine import deepspeed_config
from salad_ray.distill.zero import optimizer_step, partitions, restored

PAIRS = 5
INTERVAL_STEPS = 500
"""The default of distill.checkpoint_every."""


def run(pairs: int = PAIRS) -> list[dict[str, Any]]:
    """One row for each of stalled, written, resume and bytes: ours, DeepSpeed's, and their ratio with its spread."""
    found = in_subprocess("benchmarks.checkpoint", str(pairs))
    rows = []
    for name, (ours, theirs) in found["pairs"].items():
        ratios = [left / right for left, right in zip(ours, theirs, strict=True)]
        rows.append(
            {"name": name, "ours": median(ours), "DeepSpeed": median(theirs), "ratio": median(ratios)}
            | {"min": min(ratios), "max": max(ratios)}
        )
    share = median(found["pairs"]["stalled (s)"][0]) / (INTERVAL_STEPS * found["step_secs"])
    rows.append({"name": f"stalled, of {INTERVAL_STEPS} steps", "ours": f"{share:.3%}", "DeepSpeed": None})
    rows.append({"name": "to universal (s)", "ours": 0.0, "DeepSpeed": found["universal_secs"]})
    names = list(rows[0])
    return [{name: row.get(name) for name in names} for row in rows]


def measure(pairs: int) -> dict[str, Any]:
    """Both, taking turns, after a first step that gives the optimizer its moments."""
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29577",
    }
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    engine = make_engine()
    step_secs = [timed(lambda: train_step(engine)) for _ in range(4)][1:]
    names = ("stalled (s)", "written (s)", "resume (s)", "bytes (MiB)")
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    with tempfile.TemporaryDirectory(prefix="salad-bench-") as folder:
        for _ in range(pairs):
            for side, measured in enumerate((ours(engine, f"{folder}/ours"), theirs(engine, f"{folder}/theirs"))):
                for name, value in zip(names, measured, strict=True):
                    found[name][side].append(value)
        engine.save_checkpoint(f"{folder}/theirs", tag="engine", save_latest=False)
        universal_secs = timed(lambda: to_universal(f"{folder}/theirs/engine", f"{folder}/universal"))
    return {"pairs": found, "step_secs": median(step_secs), "universal_secs": universal_secs}


def make_engine() -> Any:
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=16384, hidden_size=512, num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=2,
        intermediate_size=1408,
    )  # fmt: skip
    model = Qwen2ForCausalLM(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    settings = deepspeed_config(DistillConfig(zero_stage=2, precision="fp32", use_gpu=False), 1, model.num_parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine


def train_step(engine: Any) -> None:
    tokens = torch.randint(0, 16384, (1, 256))
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()


def ours(engine: Any, url: str) -> tuple[float, float, float, float]:
    """Seconds stalled, until written, to resume; MiB."""
    shutil.rmtree(url, ignore_errors=True)
    writer = CheckpointWriter(url, 0, 1, "bench", 1)
    started = time.perf_counter()
    writer.save(partitions(engine), {"step": 1, "optimizer_step": optimizer_step(engine)})
    stalled = time.perf_counter() - started
    writer.wait()
    written = time.perf_counter() - started

    def resume() -> None:
        checkpoint = latest(url)
        assert checkpoint is not None
        reader = CheckpointReader(checkpoint)
        for partition in partitions(engine):
            reader.fill(partition)
        restored(engine, checkpoint.state["optimizer_step"])

    return stalled, written, timed(resume), size_mib(url)


def theirs(engine: Any, url: str) -> tuple[float, float, float, float]:
    shutil.rmtree(url, ignore_errors=True)
    secs = timed(lambda: engine.save_checkpoint(url, tag="engine", save_latest=False))
    return secs, secs, timed(lambda: engine.load_checkpoint(url, tag="engine")), size_mib(url)


def to_universal(source: str, target: str) -> None:
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    paths = ["--input_folder", source, "--output_folder", target, "--num_extract_workers", "1"]
    subprocess.run([*command, *paths, "--num_merge_workers", "1"], check=True, capture_output=True)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def size_mib(url: str) -> float:
    return sum(path.stat().st_size for path in Path(url).rglob("*") if path.is_file()) / 2**20


def main() -> None:
    if "--bare" in sys.argv:
        print(json.dumps(measure(int(sys.argv[-1]))))
        return
    for row in run():
        print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
