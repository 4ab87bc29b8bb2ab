"""A step of the trainer under DeepSpeed ZeRO 1, 2 and 3 on two workers, beside plain PyTorch on the same rows, and the
model that ZeRO 3 writes.

This file is also the worker: `python test_parity.py FOLDER` under torch.distributed's variables writes what the trainer
of every case has after one step, so two processes are started once for all cases.
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
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM, Qwen2Config, Qwen2ForCausalLM

from salad_ray.config import AdapterConfig, DistillConfig
from salad_ray.distill.step import DTYPES, batch_loss, label_weight, weight_of_word_ends
from salad_ray.model.speech_lm import EncoderSpec, SpeechLM, load_text_lm, parameter_groups
from salad_ray.sequences.batch import Batch, Sample, collate, sample_of, without_labels
from salad_ray.sequences.interleave import interleave
from salad_ray.sequences.text_rows import text_samples
from salad_ray.tables import PlanSegment, Span, Table

NUM_WORKERS = 2
NUM_MICRO_BATCHES = 3  # not a power of two, so that dividing by it rounds
VOCABULARY = 403
"""More than the tokenizer has, and a number that two workers cannot share evenly."""
ADAPTER = AdapterConfig(hidden_size=16, num_layers=2, num_heads=2, ffn_size=24)
ENCODER = EncoderSpec(name="log_mel", path=None, revision=None, sampling_rate=16000, frame_rate=12.5, dim=6)
SETTINGS = DistillConfig(
    use_gpu=False,
    alpha=0.7,
    word_ends_weight=0.6,
    learning_rate=1e-3,
    adapter_learning_rate=3e-3,
    max_grad_norm=0.5,
)


@dataclass(frozen=True)
class Case:
    """One engine."""

    zero_stage: int
    precision: str
    recompute: bool = False
    """Activation checkpointing, under which every layer runs twice a step (DeepSpeed#8224)."""
    word_ends: bool = False
    biased_head: bool = False
    """A teacher whose head is not its embeddings, and has a bias; both are gathered under ZeRO 3."""

    def __str__(self) -> str:
        parts = "-recompute" * self.recompute + "-word-ends" * self.word_ends + "-biased-head" * self.biased_head
        return f"zero{self.zero_stage}-{self.precision}{parts}"

    @property
    def settings(self) -> DistillConfig:
        changes = {"zero_stage": self.zero_stage, "precision": self.precision}
        changes |= {"activation_checkpointing": self.recompute, "word_ends": self.word_ends}
        return SETTINGS.model_copy(update=changes)

    @property
    def teacher(self) -> str:
        return "phi" if self.biased_head else "qwen2"

    @property
    def reference(self) -> tuple[str, bool, str]:
        """What decides the outcome without DeepSpeed."""
        return self.precision, self.word_ends, self.teacher


CASES = [Case(stage, precision) for precision in DTYPES for stage in (1, 2, 3)]
CASES += [Case(stage, "bf16", recompute=True) for stage in (2, 3)]
CASES += [Case(stage, "fp32", word_ends=True) for stage in (2, 3)]
CASES += [Case(stage, "fp32", biased_head=True) for stage in (2, 3)]
CASES += [Case(3, "bf16", biased_head=True)]


@dataclass(frozen=True)
class Outcome:
    """What a step made: gradients before it and weights after it, in fp32 by name."""

    grads: dict[str, Tensor]
    weights: dict[str, Tensor]
    used: dict[str, Tensor]
    """The weights that the next forward computes with, as they are."""
    norm: float
    """Of the whole gradient, before clipping."""
    loss: float
    """Of the step, as the training curve tells it."""


def save_teacher(folder: Path, biased_head: bool = False) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    shape["vocab_size"] = VOCABULARY
    if biased_head:
        phi = PhiForCausalLM(PhiConfig(**shape))
        nn.init.normal_(phi.lm_head.bias)
        phi.save_pretrained(folder)
    else:
        Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **shape)).save_pretrained(folder)
    make_tokenizer("byte_level").save_pretrained(folder)


def micro_batches(rank: int) -> list[Batch]:
    """Micro-batches with different numbers of labels. The first of rank 1 is text alone, so that its adapter is not
    heard there, and the last has no labels, as it has a row less."""
    batches = read_batches(rank)
    return batches + [without_labels(batches[-1])] * (NUM_MICRO_BATCHES - len(batches))


def read_batches(rank: int, context: int = 192) -> list[Batch]:
    """Those of them that the trainer reads; it fills up itself."""
    tokenizer, rng = make_tokenizer("byte_level"), np.random.default_rng(rank)
    batches = [collate([make_row(tokenizer, rng) for _ in range(1 + i)], context) for i in range(NUM_MICRO_BATCHES)]
    text = collate([text_row(tokenizer, rng)], context)
    return batches if rank == 0 else [text, *batches[1:-1]]


def padded_batches(rank: int) -> list[Batch]:
    """The same in longer rows, and each with a row more that is nothing but padding."""
    batches = []
    for batch in read_batches(rank, context=224):
        names = ("token_ids", "position_ids", "teacher_ids", "teacher_position_ids")
        grids = {name: getattr(batch, name) for name in names}
        more = {
            name: torch.arange(grid.shape[1])[None] if "position" in name else torch.zeros_like(grid[:1])
            for name, grid in grids.items()
        }
        batches.append(replace(batch, **{name: torch.cat([grid, more[name]]) for name, grid in grids.items()}))
    return batches


def make_row(tokenizer: Any, rng: np.random.Generator) -> list[Sample]:
    samples = []
    for _ in range(rng.integers(1, 4)):
        text = " ".join(rng.choice(["people", "said", "union,", "12", "café", "opened"], rng.integers(5, 12)))
        utterance = make_features(text, dim=ENCODER.dim, secs_per_word=0.3)
        frames = rng.standard_normal((utterance.num_frames, ENCODER.dim)).astype(np.float16)
        utterance = replace(utterance, features=frames.tobytes())
        samples.append(sample_of(interleave([utterance], tokenizer, (1, 3), (1, 3), rng), [utterance]))
    return samples


def text_row(tokenizer: Any, rng: np.random.Generator) -> list[Sample]:
    texts = [" ".join(rng.choice(["people", "said", "union,"], rng.integers(5, 12))) for _ in range(2)]
    planned = [PlanSegment("shard", [0], [Span(0, len(tokenizer(text)["input_ids"]), False)]) for text in texts]
    return text_samples(planned, texts, tokenizer)


def load(folder: str, dtype: torch.dtype) -> tuple[nn.Module, SpeechLM]:
    teacher = load_text_lm(folder, None, dtype).requires_grad_(False)
    return teacher, SpeechLM.from_teacher(folder, None, ADAPTER, ENCODER, 0, dtype)


def make_optimizer(student: SpeechLM) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(student, SETTINGS), betas=SETTINGS.betas)


# The workers.


def work(folder: str) -> None:
    """Entry of each of the two processes."""
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    for case in CASES:
        outcome = engine_step(case, f"{folder}/{case.teacher}")
        if torch.distributed.get_rank() == 0:
            torch.save(vars(outcome), f"{folder}/{case}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # or its threads may outlive what they use, and abort the process


def engine_step(case: Case, folder: str) -> Outcome:
    """One step of the trainer."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from salad_ray.distill.trainer import SUMS

    distiller = bare_distiller(folder, case.settings, NUM_MICRO_BATCHES)
    engine, grads = distiller.engine, {}
    update = engine.step

    def look_and_update() -> None:
        if engine.is_gradient_accumulation_boundary():
            named = engine.module.named_parameters()
            grads.update({name: safe_get_full_grad(parameter).float().clone() for name, parameter in named})
        update()

    engine.step = look_and_update
    distiller._train_step(padded_batches(torch.distributed.get_rank()))
    with GatheredParameters(list(engine.module.parameters()), enabled=case.zero_stage == 3):
        used = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    weights = {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()}
    if case.zero_stage == 3:
        distiller.job = replace(distiller.job, table=Table(f"{Path(folder).parent}/{case}", "natural", "stage1"))
        distiller._export()
    sums = dict(zip(SUMS, distiller.progress.sums, strict=True))
    loss = sums["loss"] / sums["label_weight"]
    return Outcome(grads, weights, used, float(engine.get_global_grad_norm()), loss)


def bare_distiller(folder: str, settings: DistillConfig, num_micro_batches: int) -> Any:
    """The trainer as far as its steps need it: without Ray, data and checkpoints."""
    from salad_ray.distill.engine import make_engine
    from salad_ray.distill.trainer import Distiller, Job, Progress

    natural = Table(f"{folder}/features", "natural", "features")
    distiller: Any = Distiller.__new__(Distiller)
    distiller.job = Job(None, natural, (natural, natural), {}, None, settings, num_steps=9)  # type: ignore[arg-type]
    distiller.settings, distiller.progress = settings, Progress()
    distiller.rank = torch.distributed.get_rank()
    distiller.device, distiller.dtype = torch.device("cpu"), DTYPES[settings.precision]
    distiller.word_end_weight = weight_of_word_ends(settings)
    distiller.reader = SimpleNamespace(num_micro_batches=num_micro_batches)
    distiller.num_student = distiller.num_teacher = distiller.widths = 1
    distiller.teacher, student = load(folder, distiller.dtype)
    distiller.engine = make_engine(student, settings, num_micro_batches, distiller.device)
    return distiller


# The reference.


def plain_step(folder: str, dtype: torch.dtype, compute: torch.dtype, word_end_weight: float) -> Outcome:
    """The same step without DeepSpeed, over the rows of all workers; weights of `dtype`, everything in `compute`."""
    teacher, student = load(folder, dtype)
    teacher, student = teacher.to(compute), student.to(compute)
    batches = [batch for rank in range(NUM_WORKERS) for batch in micro_batches(rank)]
    weights, total = [label_weight(batch, word_end_weight) for batch in batches], 0.0
    for batch, weight in zip(batches, weights, strict=True):
        on = batch.to("cpu", compute)
        loss = batch_loss(student, student.head, teacher, on, SETTINGS.alpha, word_end_weight=word_end_weight)
        share = loss.loss * (weight / sum(weights))
        share.backward()
        total += share.item()
    grads = {name: parameter.grad.float() for name, parameter in student.named_parameters()}  # type: ignore[union-attr]
    return optimizer_step(folder, dtype, grads, total)


def optimizer_step(folder: str, dtype: torch.dtype, grads: dict[str, Tensor], loss: float) -> Outcome:
    """One step of AdamW on fp32 copies of weights of `dtype`, from given gradients, clipped."""
    student = load(folder, dtype)[1].float()
    optimizer = make_optimizer(student)
    for name, parameter in student.named_parameters():
        parameter.grad = grads[name].clone()
    norm = nn.utils.clip_grad_norm_(student.parameters(), SETTINGS.max_grad_norm)
    optimizer.step()
    weights = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    used = {name: weight.to(dtype) for name, weight in weights.items()}
    return Outcome(grads, weights, used, float(norm), loss)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The teachers; also where the workers write."""
    path = tmp_path_factory.mktemp("parity")
    save_teacher(path / "qwen2")
    save_teacher(path / "phi", biased_head=True)
    return str(path)


@pytest.fixture(scope="module")
def outcomes(folder: str) -> dict[Case, Outcome]:
    """Every case, from one launch of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [start_worker(folder, rank, port) for rank in range(NUM_WORKERS)]
    try:
        output = [worker.communicate(timeout=900)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * NUM_WORKERS, "\n".join(output)[-3000:]
    return {case: Outcome(**torch.load(f"{folder}/{case}.pt")) for case in CASES}


def start_worker(folder: str, rank: int, port: int) -> subprocess.Popen[str]:
    here = Path(__file__).resolve()
    env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_WORKERS)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    env |= {"PYTHONPATH": os.pathsep.join([str(here.parents[1]), str(here.parents[2])])}
    command = [sys.executable, str(here), folder]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@dataclass(frozen=True)
class References:
    """Of one precision, objective and teacher."""

    start: dict[str, Tensor]
    plain: Outcome
    exact: Outcome
    """From the same weights, computed in fp32."""


@pytest.fixture(scope="module")
def references(folder: str) -> dict[tuple[str, bool, str], References]:
    weights = {case.reference: weight_of_word_ends(case.settings) for case in CASES}
    return {key: make_references(f"{folder}/{key[2]}", DTYPES[key[0]], weight) for key, weight in weights.items()}


def make_references(folder: str, dtype: torch.dtype, word_end_weight: float) -> References:
    start = {name: p.detach().float() for name, p in load(folder, dtype)[1].named_parameters()}
    plain, exact = (plain_step(folder, dtype, compute, word_end_weight) for compute in (dtype, torch.float32))
    return References(start, plain, exact)


def errors(values: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of every parameter's tensor, in the 2-norm."""
    assert values.keys() == reference.keys()
    return {name: float((values[name] - exact).norm() / exact.norm()) for name, exact in reference.items()}


def updates(after: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: after[name] - before[name] for name in before}


def of_precision(precision: str) -> list[Case]:
    return [case for case in CASES if case.precision == precision]


def test_the_micro_batches_differ_in_labels_and_one_has_none() -> None:
    counts = [len(batch.labels) for rank in range(NUM_WORKERS) for batch in micro_batches(rank)]
    assert len(set(counts)) == NUM_WORKERS * NUM_MICRO_BATCHES
    assert counts[-1] == 0
    ends = [len(batch.word_end_student) for rank in range(NUM_WORKERS) for batch in micro_batches(rank)]
    shares = [number / count for number, count in zip(ends, counts, strict=True) if count]
    assert [number == 0 for number in ends] == [False] * 3 + [True, False, True]  # text alone has none, either
    assert len(set(shares)) == len(shares)


def test_the_workers_rows_have_padding_that_the_reference_has_not() -> None:
    for plain, padded in zip(read_batches(0), padded_batches(0), strict=True):
        assert padded.token_ids.shape == (len(plain.token_ids) + 1, 224)
        assert len(padded.teacher_ids) == len(plain.teacher_ids) + 1
        assert torch.equal(padded.labels, plain.labels)


def test_word_ends_change_the_gradient(references: dict[tuple[str, bool, str], References]) -> None:
    without, with_ends = (references["fp32", word_ends, "qwen2"].exact.grads for word_ends in (False, True))
    assert min(errors(with_ends, without).values()) > 0.05


def test_one_worker_begins_with_text_alone_while_the_other_hears_speech() -> None:
    (speech, *_), (text, *_) = (micro_batches(rank) for rank in range(NUM_WORKERS))
    assert text.frames.numel() == len(text.speech_index) == 0 < len(text.labels)
    assert text.is_text.all()
    assert text.num_text_positions == text.num_positions
    assert len(speech.speech_index) > 0 == speech.num_text_positions


@pytest.mark.parametrize("case", of_precision("fp32"), ids=str)
def test_fp32_gradients_are_those_of_plain_pytorch(
    outcomes: dict[Case, Outcome], references: dict[tuple[str, bool, str], References], case: Case
) -> None:
    exact = references[case.reference].exact
    assert max(errors(outcomes[case].grads, exact.grads).values()) <= 1e-5
    assert outcomes[case].norm == pytest.approx(exact.norm, rel=1e-5)
    assert outcomes[case].loss == pytest.approx(exact.loss, rel=1e-5)


@pytest.mark.parametrize("case", of_precision("bf16"), ids=str)
def test_bf16_gradients_err_hardly_more_than_plain_bf16(
    outcomes: dict[Case, Outcome], references: dict[tuple[str, bool, str], References], case: Case
) -> None:
    """Plain bf16 is 1–4 % from the exact gradient, as every product is rounded to 8 bits. DeepSpeed rounds the scaled
    loss, the division by the micro-batches and the mean over the workers besides: a few ulp of 2⁻⁸. A micro-batch, a
    worker or one of a tied weight's two gradients lost or counted twice would be an error of tens of percent.
    """
    reference = references[case.reference]
    plain, exact = reference.plain, reference.exact
    ours, theirs = errors(outcomes[case].grads, exact.grads), errors(plain.grads, exact.grads)
    assert {name: error for name, error in ours.items() if error > 1.5 * theirs[name] + 2**-8} == {}
    assert max(errors(outcomes[case].grads, plain.grads).values()) <= 8 * 2**-8
    assert outcomes[case].norm == pytest.approx(plain.norm, rel=2**-7)


@pytest.mark.parametrize("case", [case for case in CASES if case.recompute], ids=str)
def test_recomputing_the_layers_changes_no_gradient(outcomes: dict[Case, Outcome], case: Case) -> None:
    without = outcomes[replace(case, recompute=False)]
    assert max(errors(outcomes[case].grads, without.grads).values()) <= 1e-6


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_step_makes_of_its_gradients_what_adamw_does(
    outcomes: dict[Case, Outcome], references: dict[tuple[str, bool, str], References], folder: str, case: Case
) -> None:
    """Clipping, groups and fp32 copies of the weights too. Adam divides each gradient by its own size, so weights are
    compared from the same gradients: at the first step, noise in the smallest of them turns into whole updates.
    """
    outcome, start = outcomes[case], references[case.reference].start
    expected = optimizer_step(f"{folder}/{case.teacher}", DTYPES[case.precision], outcome.grads, outcome.loss)
    assert max(errors(updates(outcome.weights, start), updates(expected.weights, start)).values()) <= 1e-4
    for name, weight in outcome.weights.items():
        assert torch.equal(outcome.used[name], weight.to(DTYPES[case.precision])), name


@pytest.mark.parametrize("case", of_precision("fp32"), ids=str)
def test_fp32_weights_after_the_step_are_those_of_plain_pytorch(
    outcomes: dict[Case, Outcome], references: dict[tuple[str, bool, str], References], case: Case
) -> None:
    """Adam's first step is little more than each gradient's sign, so the last bits of the few gradients near zero,
    which change with the number of threads, show as thousandths. A worker or micro-batch left out would flip signs by
    the tenth.
    """
    reference = references[case.reference]
    start, exact = reference.start, reference.exact
    found = errors(updates(outcomes[case].weights, start), updates(exact.weights, start))
    # A bias of keys moves all scores of a query nearly alike, so most of its gradient is near zero.
    assert max(error for name, error in found.items() if not name.endswith("k_proj.bias")) <= 1e-2


@pytest.mark.parametrize("case", [case for case in CASES if case.zero_stage == 3], ids=str)
def test_what_zero_3_writes_is_whole(outcomes: dict[Case, Outcome], folder: str, case: Case) -> None:
    """The weights with which the next step would compute, none of size 0, with a head of its own or without; and what
    others load from there says what they say."""
    model, dtype, used = Path(folder, str(case), "model"), DTYPES[case.precision], outcomes[case].used
    written = {f"llm.{name}": weight for name, weight in load_file(model / "llm" / "model.safetensors").items()}
    written |= {f"adapter.{name}": weight for name, weight in load_file(model / "adapter.safetensors").items()}
    assert {name: weight.shape for name, weight in written.items()} == {name: w.shape for name, w in used.items()}
    assert all(weight.numel() and torch.equal(weight, used[name]) for name, weight in written.items())
    assert ("llm.lm_head.weight" in written) == case.biased_head
    assert written["llm.model.embed_tokens.weight"].shape == (VOCABULARY, 32)
    loaded, again = AutoModelForCausalLM.from_pretrained(model / "llm"), SpeechLM.from_pretrained(model)
    assert loaded.dtype == again.llm.dtype == dtype
    plain = load(f"{folder}/{case.teacher}", dtype)[1]
    before = plain.llm.eval()(input_ids=torch.arange(3, 50)[None], use_cache=False).logits
    plain.load_state_dict(used | ({} if case.biased_head else {"llm.lm_head.weight": plain.head.weight}))
    for llm in (loaded, again.llm):
        found, expected = (
            each.eval()(input_ids=torch.arange(3, 50)[None], use_cache=False).logits for each in (llm, plain.llm)
        )
        assert torch.equal(found, expected)
        assert not torch.equal(found, before), "the step has changed nothing"


if __name__ == "__main__":
    work(sys.argv[1])
