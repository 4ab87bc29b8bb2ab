"""What an engine has held leaves the memory with it, as the next training of the same worker needs the room."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

LEFT = 1000
"""Elements; the model has about 60,000 weights, and as many of each moment."""


def num_elements() -> int:
    gc.collect()
    return sum(each.numel() for each in gc.get_objects() if isinstance(each, torch.Tensor))


def step_and_destroy(folder: str, zero_stage: int) -> None:
    from test_parity import NUM_MICRO_BATCHES, SETTINGS, load, micro_batches, save_teacher

    from salad_ray.distill.engine import destroy, forward_backward, make_engine

    save_teacher(Path(folder))
    settings = SETTINGS.model_copy(update={"zero_stage": zero_stage, "precision": "fp32"})
    teacher, student = load(folder, torch.float32)
    engine = make_engine(student, settings, NUM_MICRO_BATCHES, torch.device("cpu"))
    for batch in micro_batches(0):
        forward_backward(engine, teacher, batch.to("cpu", torch.float32), settings, 50, NUM_MICRO_BATCHES)
        engine.step()
    assert num_elements() > 100 * LEFT
    destroy(engine)


@pytest.mark.parametrize("zero_stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_an_engine_that_is_destroyed_leaves_no_tensors(zero_stage: int, tmp_path: Path) -> None:
    """In a process of its own, where nothing else makes tensors."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, str(tmp_path), str(zero_stage)]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    subprocess.run(command, env=os.environ | place | {"PYTHONPATH": paths}, check=True, timeout=300)


if __name__ == "__main__":
    store = torch.distributed.FileStore(f"{sys.argv[1]}/store", 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    before = num_elements()
    step_and_destroy(sys.argv[1], int(sys.argv[2]))
    left = num_elements() - before
    assert left < LEFT, f"{left} elements are left"
