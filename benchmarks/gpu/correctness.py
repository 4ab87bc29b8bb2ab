"""Whether a GPU computes what a CPU computes: each row is a check, with its tolerance.

Half precision is held against fp32 or float64 from the same weights. Where there is an established way to compute the
same in half precision (dense PyTorch, sdpa), the tolerance is a little more than the error of that way: being exact is
not asked for, being worse than the usual is not accepted. `usual` is the error of that way.

The step is compared part by part: in one norm over everything the adapter, with ten times the learning rate, would hide
an LLM that is never updated, and large gradients those of queries and keys that are none.
"""

from __future__ import annotations

import copy
import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.gpu.shapes import (
    make_batches,
    make_llm,
    make_pair,
    shape_of,
    start_process_group,
    use_attention,
)
from benchmarks.gpu.worker import Context, missing, reason
from benchmarks.loss import compare_with_exact, make_inputs
from salad_ray.config import DistillConfig
from salad_ray.distill.losses import divergence
from salad_ray.distill.step import batch_loss
from salad_ray.model.speech_lm import SpeechLM, hidden_states, lm_head, parameter_groups
from salad_ray.sequences.batch import Batch

Row = dict[str, Any]

FP32_TOLERANCES = (1e-5, 1e-4, 1e-4)
"""Relative, of the loss, of the gradient of the hidden states and of the head's."""
NO_WORSE = 1.2
"""Times the error of the established way, and `SLACK` for errors that are nearly zero."""
SLACK = 1e-4
SAME_KL = 1e-5
"""Nats between the student before step 0 and its teacher, which have the same weights and take the same kernels."""
STEP_TOLERANCES = {"loss": 0.01, "norm": 0.02, "gradient": 0.1, "update": 0.35}
"""Relative errors of a bf16 step against fp32; what is left out altogether has an error of 1.

The first update of AdamW is a sign for every weight. Where gradients have a relative error of e, a share of e / π of
the signs is wrong, which is an error of √(4 e / π) in the update: 0.11 at the usual e of 0.01, 0.35 at its limit.
"""

SETTINGS = DistillConfig(zero_stage=2, precision="bf16", learning_rate=1e-4, adapter_learning_rate=1e-3)


def rows(context: Context) -> Iterator[Row]:
    """All checks; those that need a package that is missing say so, and what ends in an error does not end the rest."""
    parts = {"loss": loss_rows, "attention": attention_rows, "start": start_rows, "step": step_rows}
    for name, part in parts.items():
        try:
            yield from part(context)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is told, and counts as a check out of tolerance
            traceback.print_exc()
            yield {"name": f"checks of the {name}", "failed": reason(error), "ok": False}


def check(name: str, error: float, tolerance: float, usual: float | None = None) -> Row:
    """A row; an error that is not a number is no match."""
    return {"name": name, "error": error, "tolerance": tolerance, "usual": usual, "ok": bool(error <= tolerance)}


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def loss_rows(context: Context) -> Iterator[Row]:
    """The distillation loss against a dense one in float64, and in bf16 beside dense PyTorch in bf16."""
    num, width, vocab = (64, 32, 500) if context.tiny else (512, 2048, 151_936)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(num, width, dtype, vocab, context.device)
        errors = compare_with_exact(("ours", "dense"), inputs)
        for index, part in enumerate(("value", "hidden gradient", "head gradient")):
            ours, dense = errors["ours"][index], errors["dense"][index]
            is_exact = dtype == torch.float32
            tolerance = FP32_TOLERANCES[index] if is_exact else NO_WORSE * dense + SLACK
            yield check(f"loss, {str(dtype).removeprefix('torch.')}: {part}", ours, tolerance, usual=dense)


def attention_rows(context: Context) -> Iterator[Row]:
    """`varlen` in packed rows beside sdpa, both in bf16 against sdpa in fp32; and segments do not see each other."""
    shape = shape_of(context, num_layers=4)
    [batch] = make_batches(shape, num_rows=2, num_batches=1)
    batch = batch.to(context.device)
    exact, llm = (make_llm(shape, context.device, dtype, "sdpa") for dtype in (torch.float32, torch.bfloat16))
    exact.load_state_dict(llm.state_dict())
    reference = states_and_gradient(exact, batch)
    found = {}
    for attention in ("sdpa", "varlen"):
        use_attention(llm, attention)
        found[attention] = [relative(*pair) for pair in zip(states_and_gradient(llm, batch), reference, strict=True)]
    for index, part in enumerate(("states", "gradient")):
        sdpa = found["sdpa"][index]
        tolerance = NO_WORSE * sdpa + SLACK
        yield check(f"varlen in packed rows, bfloat16: {part}", found["varlen"][index], tolerance, usual=sdpa)
    for attention in ("sdpa", "varlen"):
        use_attention(llm, attention)
        yield check(f"{attention}: what another first segment changes in the others", leak(llm, batch), 0.0)


def states_and_gradient(llm: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Last hidden states of the text at its real positions, and the gradient of a fixed projection of them."""
    embeddings = llm.get_input_embeddings()(batch.teacher_ids).detach().requires_grad_()
    states = hidden_states(llm, embeddings, batch.teacher_position_ids)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(states.shape, generator=generator).to(states)
    real = real_positions(batch)
    (states * direction)[real].sum().backward()
    assert embeddings.grad is not None
    return states.detach()[real], embeddings.grad[real]


def real_positions(batch: Batch) -> Tensor:
    """(B, U) the teacher's positions up to a row's last id that is not 0, as padding is."""
    return batch.teacher_ids.flip(1).ne(0).cumsum(1).flip(1) > 0


def leak(llm: PreTrainedModel, batch: Batch) -> float:
    """Largest change of a state of the second segment or a later one when the first one has other tokens."""
    starts = batch.teacher_position_ids[0].eq(0).nonzero().flatten()
    others = int(starts[1])
    changed = batch.teacher_ids[:1].clone()
    changed[:, :others] = (changed[:, :others] + 1) % llm.config.vocab_size
    with torch.no_grad():
        before, after = (
            hidden_states(llm, ids, batch.teacher_position_ids[:1])[0, others:].float()
            for ids in (batch.teacher_ids[:1], changed)
        )
    return float((after - before).abs().max())


def start_rows(context: Context) -> Iterator[Row]:
    """Student = teacher before step 0, in bf16 and in train mode, also inside the engine; as a KL over text."""
    shape = shape_of(context, num_layers=4)
    teacher, student = make_pair(shape, context.device, torch.bfloat16, "varlen")
    [batch] = make_batches(shape, num_rows=2, num_batches=1)
    batch = batch.to(context.device)
    yield check("student = teacher before step 0: KL in nats", text_kl(student, teacher, batch), SAME_KL)
    try:
        engine = make_step_engine(student, context)
    except ImportError as error:
        yield {"name": "the same inside the engine", "left_out": missing(error)}
        return
    kl = text_kl(engine.module, teacher, batch)
    yield check("the same inside the engine", kl, SAME_KL)


def text_kl(student: SpeechLM, teacher: nn.Module, batch: Batch) -> float:
    """The largest over all positions of rows of text."""
    with torch.no_grad():
        ours = student.text_hidden(batch.teacher_ids, batch.teacher_position_ids).flatten(0, 1)
        theirs = hidden_states(teacher, batch.teacher_ids, batch.teacher_position_ids).flatten(0, 1)
    kl, _ = divergence(ours, student.head, theirs, lm_head(teacher), batch.teacher_ids.flatten())
    return float(kl.abs().max())


def make_step_engine(student: SpeechLM, context: Context) -> Any:
    from salad_ray.distill.engine import make_engine

    start_process_group(context)
    return make_engine(student, SETTINGS, 1, context.device)


def step_rows(context: Context) -> Iterator[Row]:
    """One step of the engine, in bf16 with `varlen`, against the same step in fp32 with sdpa on a CPU."""
    try:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
    except ImportError as error:
        yield {"name": "a step in bf16 against fp32 on a CPU", "left_out": missing(error)}
        return
    from salad_ray.distill.engine import forward_backward

    shape = shape_of(context, num_layers=2, positions=512)
    [batch] = make_batches(shape, num_rows=1, num_batches=1)
    teacher, student = make_pair(shape, context.device, torch.bfloat16, "varlen")
    expected = PlainStep(student, teacher, batch)
    engine = make_step_engine(student, context)
    before = {name: p.detach().float() for name, p in engine.module.named_parameters()}
    moved = batch.to(context.device, torch.bfloat16)
    loss = forward_backward(engine, teacher, moved, SETTINGS, len(batch.labels), 1)
    grads = {name: safe_get_full_grad(p).float() for name, p in engine.module.named_parameters()}
    norm, expected_norm = (norm_of(found.values()) for found in (grads, expected.grads))
    yield step_check("loss", "loss", abs(float(loss.loss) / expected.loss - 1))
    yield step_check("norm of the gradient", "norm", abs(norm / expected_norm - 1))
    errors = apart(grads, expected.grads, kind_of)
    worst = max(errors, key=lambda kind: (math.isnan(errors[kind]), errors[kind]))
    yield step_check("gradient, worst kind of weight", "gradient", errors[worst]) | {"worst": worst, "of": len(errors)}
    del grads
    engine.step()
    updates = {name: safe_get_full_fp32_param(p).float() - before[name] for name, p in engine.module.named_parameters()}
    for group, value in apart(updates, expected.updates(), group_of).items():
        yield step_check(f"update of {group}", "update", value)


def step_check(part: str, tolerance: str, error: float) -> Row:
    return check(f"a step in bf16 against fp32 on a CPU: {part}", error, STEP_TOLERANCES[tolerance])


class PlainStep:
    """The step in plain PyTorch, fp32, on the CPU, from copies of the weights."""

    def __init__(self, student: SpeechLM, teacher: nn.Module, batch: Batch) -> None:
        self.student = copy.deepcopy(student).to("cpu", torch.float32)
        reader = copy.deepcopy(teacher).to("cpu", torch.float32)
        for llm in (self.student.llm, reader):
            use_attention(llm, "sdpa")
        loss = batch_loss(self.student, self.student.head, reader, batch.to("cpu", torch.float32), SETTINGS.alpha).loss
        loss.backward()
        self.loss = float(loss)
        parameters = self.student.named_parameters()
        self.grads = {name: p.grad.clone() for name, p in parameters if p.grad is not None}

    def updates(self) -> dict[str, Tensor]:
        """What the optimizer adds to each weight; takes the step."""
        before = {name: p.detach().clone() for name, p in self.student.named_parameters()}
        nn.utils.clip_grad_norm_(self.student.parameters(), SETTINGS.max_grad_norm)
        torch.optim.AdamW(parameter_groups(self.student, SETTINGS), betas=SETTINGS.betas).step()
        return {name: p.detach() - before[name] for name, p in self.student.named_parameters()}


def kind_of(parameter: str) -> str:
    """What is compared in its gradient: as `adapter q_proj`, `llm mlp`, `llm norm` or `llm embed_tokens`."""
    model, *_, module, _ = parameter.split(".")
    kind = "mlp" if ".mlp." in parameter else "norm" if module.endswith("norm") else module
    return f"{model} {kind}"


def group_of(parameter: str) -> str:
    """What is compared in its update: parts with a learning rate or a place of their own."""
    if parameter.startswith("adapter."):
        return "the adapter"
    return "the embedding, which is the head" if "embed_tokens" in parameter else "the LLM's layers"


def apart(found: dict[str, Tensor], expected: dict[str, Tensor], part_of: Callable[[str], str]) -> dict[str, float]:
    """Relative error of each part over all its tensors, computed where those of `found` lie, one at a time."""
    parts: dict[str, list[str]] = {}
    for name in expected:
        parts.setdefault(part_of(name), []).append(name)
    return {
        part: norm_of(found[name] - expected[name].to(found[name].device) for name in names)
        / norm_of(expected[name] for name in names)
        for part, names in parts.items()
    }


def norm_of(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.norm()) ** 2 for tensor in tensors))
