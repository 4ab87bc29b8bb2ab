"""Muon on ZeRO's shards: several steps beside plain PyTorch, and its momentum through checkpoints.

This file is also the worker: `python test_muon.py FOLDER` under torch.distributed's variables trains with one process
or two, on the same rows, and resumes what earlier processes have saved in FOLDER.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from factories import make_features, make_tokenizer
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.pytorch_utils import Conv1D

from salad_ray.config import AdapterConfig, DistillConfig
from salad_ray.configfile import parse_config
from salad_ray.distill import muon
from salad_ray.distill.checkpoints import CheckpointReader, CheckpointWriter, Piece, checkpoint_at
from salad_ray.distill.muon import MuonAdamW, orthogonalised
from salad_ray.distill.step import DTYPES
from salad_ray.flow import steps
from salad_ray.model.speech_lm import EncoderSpec, SpeechLM, parameter_groups
from salad_ray.runs import identity
from salad_ray.sequences.batch import Batch, collate, sample_of
from salad_ray.sequences.interleave import interleave

NUM_STEPS, SAVED_AT = 4, 2
NUM_BATCHES = 4
"""Of a step, over all workers."""
ADAPTER = AdapterConfig(hidden_size=20, num_layers=2, num_heads=2, ffn_size=28)
ENCODER = EncoderSpec(name="log_mel", path=None, revision=None, sampling_rate=16000, frame_rate=12.5, dim=6)
SETTINGS = DistillConfig(optimizer="muon", use_gpu=False, learning_rate=1e-3, adapter_learning_rate=3e-3)
SETTINGS = SETTINGS.model_copy(update={"max_grad_norm": 0.05})  # every step is clipped


@dataclass(frozen=True)
class Case:
    """A training, from the start or from what another one has saved half-way."""

    num_workers: int
    zero_stage: int
    precision: str = "fp32"
    start: Case | None = None

    def __str__(self) -> str:
        name = f"{self.num_workers}x-zero{self.zero_stage}-{self.precision}"
        return f"{self.start}-to-{name}" if self.start else name

    @property
    def settings(self) -> DistillConfig:
        return SETTINGS.model_copy(update={"zero_stage": self.zero_stage, "precision": self.precision})


THROUGH = [Case(2, stage, "fp32") for stage in (1, 2, 3)] + [Case(2, stage, "bf16") for stage in (2, 3)]
RESUMED = [replace(case, start=case) for case in THROUGH if case.zero_stage > 1]
ONE = Case(1, 1)
MOVED = [
    Case(2, 2, start=ONE),
    Case(2, 3, start=Case(2, 2)),
    Case(2, 1, start=Case(2, 3)),
    Case(1, 2, start=Case(2, 3)),
]
LAUNCHES = [[ONE], [case for case in (*THROUGH, *RESUMED, *MOVED) if case.num_workers == 2], MOVED[-1:]]


def save_teacher(folder: Path) -> None:
    """Matrices of an odd number of elements, so that shards cut them unevenly, are the key and value projections'."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 27, "intermediate_size": 37, "num_hidden_layers": 2, "vocab_size": 400}
    shape |= {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "initializer_range": 0.2}
    Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **shape)).save_pretrained(folder)
    make_tokenizer("byte_level").save_pretrained(folder)


def load(folder: str, dtype: torch.dtype) -> SpeechLM:
    return SpeechLM.from_teacher(folder, None, ADAPTER, ENCODER, 0, dtype)


def make_batch(index: int) -> Batch:
    tokenizer, rng = make_tokenizer("byte_level"), np.random.default_rng(index)
    utterance = make_features(" ".join(rng.choice(["people", "said", "union,"], 9)), dim=6, secs_per_word=0.3)
    frames = rng.standard_normal((utterance.num_frames, ENCODER.dim)).astype(np.float16)
    utterance = replace(utterance, features=frames.tobytes())
    return collate([[sample_of(interleave([utterance], tokenizer, (1, 3), (1, 3), rng), [utterance])]], 128)


# The workers.


def work(folder: str, cases: list[str]) -> None:
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    for case in (case for launch in LAUNCHES for case in launch if str(case) in cases):
        outcome = train(case, folder)
        if torch.distributed.get_rank() == 0:
            torch.save(outcome, f"{folder}/{case}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train(case: Case, folder: str) -> dict[str, Any]:
    """Weights after `NUM_STEPS` steps, and the whole gradient of each, all in fp32 by name."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from salad_ray.distill.engine import make_engine
    from salad_ray.distill.zero import optimizer_step, partitions, restored

    rank, dtype = torch.distributed.get_rank(), DTYPES[case.precision]
    mine = range(rank, NUM_BATCHES, case.num_workers)
    engine = make_engine(load(folder, dtype), case.settings, len(mine), torch.device("cpu"))
    names = dict(engine.module.named_parameters())
    done, grads = 0, []
    if case.start:
        checkpoint = checkpoint_at(f"{folder}/{case.start}", SAVED_AT)
        for partition in partitions(engine):
            CheckpointReader(checkpoint).fill(partition)
        restored(engine, checkpoint.state["optimizer_step"])
        done = checkpoint.step
    for step in range(done, NUM_STEPS):
        for index in mine:
            hidden = engine(make_batch(index).to("cpu", dtype))
            engine.backward((hidden.float().tanh().mean(dim=1) - index).square().mean())
            if index == mine[-1]:
                grads.append({name: safe_get_full_grad(p).float().clone() for name, p in names.items()})
            engine.step()
        if step + 1 == SAVED_AT:
            writer = CheckpointWriter(f"{folder}/{case}", rank, case.num_workers, "muon", 1)
            writer.save(partitions(engine), {"step": step + 1, "optimizer_step": optimizer_step(engine)})
            writer.wait()
    return {"weights": {name: safe_get_full_fp32_param(p).clone() for name, p in names.items()}, "grads": grads}


def launch(folder: str, cases: list[Case]) -> None:
    """Run so many processes as the cases need."""
    here = Path(__file__).resolve()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(cases[0].num_workers)}
    env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    env |= {"PYTHONPATH": os.pathsep.join([str(here.parents[1]), str(here.parents[2])])}
    command = [sys.executable, str(here), folder, *map(str, cases)]
    streams: dict[str, Any] = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(cases[0].num_workers)]
    workers = [subprocess.Popen(command, env=env | rank, **streams) for rank in ranks]
    try:
        output = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert not any(worker.returncode for worker in workers), "\n".join(output)[-3000:]


# The reference.


class PlainMuon:
    """On whole matrices."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.groups = groups
        self.momenta = {id(weight): torch.zeros_like(weight) for group in groups for weight in group["params"]}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.groups:
            beta, rate = group["momentum"], group["lr"]
            for weight in group["params"]:
                momentum = self.momenta[id(weight)]
                momentum.mul_(beta).add_(weight.grad, alpha=1 - beta)
                update = newton_schulz(beta * momentum + (1 - beta) * weight.grad)
                update *= max(1, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.sub_(rate * group["weight_decay"] * weight + rate * update)


def newton_schulz(matrix: Tensor) -> Tensor:
    """X ← 3.4445 X − 4.775 (X Xᵀ) X + 2.0315 (X Xᵀ)² X, five times, from X / ‖X‖; in fp64."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return x.to(matrix.dtype)


def replayed(folder: str, case: Case, grads: list[dict[str, Tensor]], settings: DistillConfig) -> dict[str, Tensor]:
    """fp32 weights after steps with these gradients, clipped."""
    student = load(folder, DTYPES[case.precision]).float()
    groups = parameter_groups(student, settings)
    muon = PlainMuon([group for group in groups if "momentum" in group])
    adam = torch.optim.AdamW([group for group in groups if "momentum" not in group], betas=settings.betas)
    for step in grads:
        for name, parameter in student.named_parameters():
            parameter.grad = step[name].clone()
        assert nn.utils.clip_grad_norm_(student.parameters(), settings.max_grad_norm) > settings.max_grad_norm
        muon.step()
        adam.step()
    return {name: parameter.detach().clone() for name, parameter in student.named_parameters()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The teacher, and what one worker, then two, then one again have made."""
    path = tmp_path_factory.mktemp("muon")
    save_teacher(path)
    for cases in LAUNCHES:
        launch(str(path), cases)
    return str(path)


def moves(folder: str, case: Case, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """From the first weights to these."""
    student = load(folder, DTYPES[case.precision]).float()
    return {name: weights[name] - parameter.detach() for name, parameter in student.named_parameters()}


def errors(values: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of every tensor, in the 2-norm."""
    return {name: float((values[name] - exact).norm() / exact.norm()) for name, exact in reference.items()}


def outcome(folder: str, case: Case) -> dict[str, Any]:
    return torch.load(f"{folder}/{case}.pt")


@pytest.mark.parametrize("case", [ONE, *THROUGH], ids=str)
def test_steps_make_of_their_gradients_what_plain_pytorch_does(folder: str, case: Case) -> None:
    """Clipped before, Adam's groups too. Newton–Schulz makes small singular values up to 3.4⁵ times larger, and their
    rounding with them."""
    found = outcome(folder, case)
    assert len(found["grads"]) == NUM_STEPS
    expected = moves(folder, case, replayed(folder, case, found["grads"], case.settings))
    assert max(errors(moves(folder, case, found["weights"]), expected).values()) <= 2e-4
    for change in ({"muon_momentum": 0.0}, {"muon_weight_decay": 1.0}, {"max_grad_norm": 0.01}):
        other = replayed(folder, case, found["grads"], case.settings.model_copy(update=change))
        assert max(errors(moves(folder, case, other), expected).values()) >= 5e-3, f"{change} does not show"


@pytest.mark.parametrize("case", RESUMED, ids=str)
def test_a_resumed_training_ends_bit_for_bit_where_it_would_have(folder: str, case: Case) -> None:
    assert case.start is not None
    found, expected = (outcome(folder, each)["weights"] for each in (case, case.start))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("case", MOVED, ids=str)
def test_momentum_outlives_another_number_of_workers_and_another_zero_stage(folder: str, case: Case) -> None:
    """The last bits of the gradients differ, and both Adam and Newton–Schulz make the smallest of them larger."""
    found, expected = (moves(folder, case, outcome(folder, each)["weights"]) for each in (case, THROUGH[1]))
    assert max(errors(found, expected).values()) <= 5e-4


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16), (1, 8)])
def test_the_iteration_is_the_published_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalised(matrix) / max(1, shape[0] / shape[1]) ** 0.5
    assert torch.allclose(found, newton_schulz(matrix), atol=1e-4)
    assert torch.linalg.svdvals(found).max() <= 1.3
    assert not orthogonalised(torch.zeros(shape)).any()


def test_a_matrix_that_is_held_the_other_way_round_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's, beside the same product of another class."""
    monkeypatch.setattr(muon, "dist", SimpleNamespace(
        get_world_size=lambda: 1, get_rank=lambda: 0, all_gather_object=lambda found, own: found.__setitem__(0, own)
    ))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(24, 8, generator=generator) for _ in range(2))
    linear, turned = nn.Linear(8, 24, bias=False), Conv1D(24, 8)
    moved = []
    for product, held in ((linear, lambda matrix: matrix), (turned, lambda matrix: matrix.T)):
        model = nn.ModuleDict({"product": product})
        product.weight.data = held(weight).contiguous()
        flat = nn.Parameter(product.weight.detach().flatten().clone())
        group = {"params": [product.weight], "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
        optimizer = MuonAdamW(model, [group], (0.9, 0.95))
        optimizer.param_groups[0]["params"] = [flat]  # as ZeRO does
        optimizer.locate([(flat, [Piece("product.weight", start=0, numel=flat.numel(), offset=0)])])
        flat.grad = held(grad).flatten().clone()
        optimizer.step()
        moved.append(held(flat.detach().view(product.weight.shape)))
    torch.testing.assert_close(*moved)
    assert (moved[0] - weight).abs().max() > 0.01


def test_steps_are_those_of_torchs_own_muon() -> None:
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
    theirs_now = theirs.detach()
    assert float((ours - theirs_now).norm() / (theirs_now - weight).norm()) <= 0.02


@pytest.mark.parametrize(
    "change", [{"optimizer": "adamw"}, {"muon_learning_rate": 0.01}, {"muon_momentum": 0.9}, {"muon_weight_decay": 0.0}]
)
def test_the_optimizer_decides_the_trunk(change: dict[str, object]) -> None:
    config = parse_config({"run_dir": "r", "distill": {"optimizer": "muon"}})
    other = parse_config({"run_dir": "r", "distill": {"optimizer": "muon"} | change})
    [trunk] = [step for step in steps(config) if step.label == "trunk"]
    first, second = (identity(each, *trunk.keys, without=trunk.without) for each in (config, other))
    assert first != second


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2:])
