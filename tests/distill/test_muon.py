"""Muon on ZeRO's shards: the published update, over several steps, and its momentum through checkpoints.

This file is also the worker, as `test_parity.py` is: `python test_muon.py FOLDER` trains under torch.distributed's
variables, with one process or two on the same rows.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from test_parity import (
    NUM_WORKERS,
    SETTINGS,
    errors,
    launch,
    load,
    make_optimizers,
    micro_batches,
    newton_schulz,
    save_teacher,
    updates,
)
from torch import Tensor, nn

from salad_ray.config import DistillConfig
from salad_ray.distill.checkpoints import CheckpointReader, CheckpointWriter, checkpoint_at
from salad_ray.distill.muon import orthogonalised
from salad_ray.distill.step import batch_loss

SAVED_AT, NUM_STEPS = 2, 4
MUON = SETTINGS.model_copy(update={"optimizer": "muon", "precision": "fp32"})


# The workers.


def work(folder: str) -> None:
    """Train through, and again from the checkpoint of every training so far, at this number of workers."""
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    world_size = torch.distributed.get_world_size()
    for stage in (2, 3) if world_size == NUM_WORKERS else (1,):
        found = train(folder, stage, save_to=f"{folder}/by{world_size}-zero{stage}")
        save(found, f"{folder}/through{world_size}-zero{stage}.pt")
        for checkpoints in sorted(Path(folder).glob("by*")):
            found = train(folder, stage, load_from=str(checkpoints))
            save(found, f"{folder}/{checkpoints.name}-to{world_size}-zero{stage}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def save(weights: dict[str, Tensor], path: str) -> None:
    if torch.distributed.get_rank() == 0:
        torch.save(weights, path)


def train(folder: str, zero_stage: int, save_to: str = "", load_from: str = "") -> dict[str, Tensor]:
    """fp32 weights after `NUM_STEPS` steps, the first of them perhaps another training's."""
    from deepspeed.utils import safe_get_full_fp32_param

    from salad_ray.distill.engine import forward_backward, make_engine
    from salad_ray.distill.zero import optimizer_step, partitions, restored

    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    settings = MUON.model_copy(update={"zero_stage": zero_stage})
    batches = [batch for each in range(rank, NUM_WORKERS, world_size) for batch in micro_batches(each)]
    num_labels = sum(len(batch.labels) for each in range(NUM_WORKERS) for batch in micro_batches(each))
    teacher, student = load(folder, torch.float32)
    engine = make_engine(student, settings, len(batches), torch.device("cpu"))
    first = 0
    if load_from:
        checkpoint = checkpoint_at(load_from, SAVED_AT)
        for partition in partitions(engine):
            CheckpointReader(checkpoint).fill(partition)
        restored(engine, checkpoint.state["optimizer_step"])
        first = checkpoint.step
    for step in range(first, NUM_STEPS):
        for batch in batches:
            forward_backward(engine, teacher, batch.to("cpu", torch.float32), settings, num_labels, len(batches))
            engine.step()
        if save_to and step + 1 == SAVED_AT:
            writer = CheckpointWriter(save_to, rank, world_size, "muon", 1)
            writer.save(partitions(engine), {"step": step + 1, "optimizer_step": optimizer_step(engine)})
            writer.wait()
    return {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()}


# The reference.


def plain_training(folder: str, settings: DistillConfig = MUON) -> dict[str, Tensor]:
    """The same steps without DeepSpeed, over the rows of all workers."""
    teacher, student = load(folder, torch.float32)
    optimizers = make_optimizers(student, settings)
    batches = [batch for rank in range(NUM_WORKERS) for batch in micro_batches(rank)]
    num_labels = sum(len(batch.labels) for batch in batches)
    for _ in range(NUM_STEPS):
        student.zero_grad()
        for batch in batches:
            loss = batch_loss(student, student.head, teacher, batch.to("cpu", torch.float32), settings.alpha)
            (loss.loss * (len(batch.labels) / num_labels)).backward()
        nn.utils.clip_grad_norm_(student.parameters(), settings.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in student.named_parameters()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The teacher, and what one worker, then two, then one again have made."""
    path = tmp_path_factory.mktemp("muon")
    save_teacher(path)
    for num_workers in (1, NUM_WORKERS, 1):
        launch(Path(__file__), str(path), num_workers)
    return str(path)


def moves(folder: str, name: str) -> dict[str, Tensor]:
    """From the first weights to those after all steps."""
    start = {key: p.detach() for key, p in load(folder, torch.float32)[1].named_parameters()}
    return updates(torch.load(f"{folder}/{name}.pt"), start)


@pytest.mark.parametrize("name", ["through1-zero1", "through2-zero2", "through2-zero3"])
def test_several_steps_are_those_of_plain_pytorch(folder: str, name: str) -> None:
    start = {key: p.detach() for key, p in load(folder, torch.float32)[1].named_parameters()}
    plain = updates(plain_training(folder), start)
    found = errors(moves(folder, name), plain)
    assert max(found[key] for key in found if ".layers." in key and plain[key].ndim == 2) <= 1e-3
    assert max(found.values()) <= 2e-2  # those of Adam, whose first step is each gradient's sign
    without = updates(plain_training(folder, MUON.model_copy(update={"muon_momentum": 0.0})), start)
    assert max(errors(without, plain).values()) >= 0.1  # momentum shows in these steps


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_training_ends_bit_for_bit_where_it_would_have(folder: str, stage: int) -> None:
    through, resumed = (torch.load(f"{folder}/{n}-zero{stage}.pt") for n in ("through2", f"by2-zero{stage}-to2"))
    assert all(torch.equal(resumed[name], weight) for name, weight in through.items())


@pytest.mark.parametrize(
    "name", ["by1-zero1-to2-zero2", "by1-zero1-to2-zero3", "by2-zero2-to2-zero3", "by2-zero3-to1-zero1"]
)
def test_momentum_outlives_other_numbers_of_workers_and_zero_stages(folder: str, name: str) -> None:
    found = errors(moves(folder, name), moves(folder, "through2-zero2"))
    assert max(found.values()) <= 1e-2
    assert sorted(found.values())[len(found) // 2] <= 1e-4


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16), (1, 8)])
def test_the_iteration_is_the_published_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scale = max(1, shape[0] / shape[1]) ** 0.5
    found = orthogonalised(matrix) / scale
    assert torch.allclose(found, newton_schulz(matrix), atol=1e-5)
    values = torch.linalg.svdvals(found)
    assert 0.6 <= values.min() <= values.max() <= 1.3
    assert not orthogonalised(torch.zeros(shape)).any()


def test_a_step_is_that_of_torchs_own_muon() -> None:
    """Which computes in bf16, and takes no flat shards."""
    torch.manual_seed(0)
    weight, grads = torch.randn(24, 16), [torch.randn(24, 16) for _ in range(3)]
    theirs = nn.Parameter(weight.clone())
    muon = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.01, nesterov=True)
    ours, momentum = weight.clone(), torch.zeros(24, 16)
    for grad in grads:
        theirs.grad = grad.clone()
        muon.step()
        momentum.lerp_(grad, 0.05)
        ours = ours * (1 - 0.02 * 0.01) - 0.02 * orthogonalised(grad.lerp(momentum, 0.95))
    assert float((ours - theirs).norm() / (theirs - weight).norm()) <= 0.02


if __name__ == "__main__":
    work(sys.argv[1])
