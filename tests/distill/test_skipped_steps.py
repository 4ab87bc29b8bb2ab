"""Steps whose gradients are not finite though their losses are: DeepSpeed leaves the update out and says nothing.

This file is also the process: `python test_skipped_steps.py FOLDER` trains with DeepSpeed, as one worker.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from test_parity import SETTINGS, bare_distiller, micro_batches, save_teacher  # beside this file

CASES = [("fp32", 1), ("bf16", 2), ("fp32", 3)]
BAD = (1, 3, 4)
"""Steps with an infinite gradient: one alone, two in a row."""


class Infinite(torch.autograd.Function):
    """The identity, with an infinite gradient while `on`."""

    on = False

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * (float("inf") if Infinite.on else 1.0)


def work(folder: str) -> None:
    """Train by `Distiller._train_step` until it stops."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    torch.set_num_threads(1)
    found = {f"{precision}-{stage}": steps(folder, precision, stage) for precision, stage in CASES}
    Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def steps(folder: str, precision: str, stage: int) -> dict[str, Any]:
    from salad_ray.distill.trainer import TrainingStopped
    from salad_ray.distill.zero import partitions

    settings = SETTINGS.model_copy(update={"precision": precision, "zero_stage": stage})
    distiller = bare_distiller(folder, settings, num_micro_batches=1)
    adapter = distiller.engine.module.adapter
    heard = adapter.forward
    adapter.forward = lambda *inputs: Infinite.apply(heard(*inputs))
    stopped = ""
    while not stopped and distiller.progress.step < 9:
        Infinite.on = distiller.progress.step in BAD
        try:
            distiller._train_step(micro_batches(0)[:1])
        except TrainingStopped as error:
            stopped = str(error)
    tensors = [each for part in partitions(distiller.engine) for each in (part.weight, *part.moments.values())]
    return {
        "stopped": stopped,
        "step": distiller.progress.step,
        "skipped": distiller.engine.skipped_steps,
        "finite": all(bool(torch.isfinite(tensor).all()) for tensor in tensors),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("skipped")
    save_teacher(folder)
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    ended = subprocess.run(
        [sys.executable, __file__, str(folder)], env=env, capture_output=True, text=True, check=False, timeout=900
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("case", [f"{precision}-{stage}" for precision, stage in CASES])
def test_two_updates_left_out_in_a_row_stop_training_and_one_does_not(
    case: str, found: dict[str, dict[str, Any]]
) -> None:
    assert found[case]["step"] == 4
    assert found[case]["skipped"] == 3
    assert "the gradients of steps 4 to 5 are not finite, although their losses are" in found[case]["stopped"]
    assert "natural/features" in found[case]["stopped"]
    assert found[case]["finite"], "weights and moments are still usable"


if __name__ == "__main__":
    work(sys.argv[1])
