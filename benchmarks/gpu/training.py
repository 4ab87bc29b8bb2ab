"""A training step of the full shape on one GPU: the project's own engine and step, no Ray, no reading.

Qwen2.5-3B's shape with the adapter and the frozen teacher beside it, bf16, ZeRO 2, rows of 2,048 positions. A step has
`MICRO_BATCHES` micro-batches, so that the optimizer, which a single GPU runs over all weights, takes the share of a
step that it may take; on many GPUs ZeRO divides it.

`mfu` counts as the trainer's log does: 6 FLOP per parameter and student position, 2 per parameter and teacher
position, and attention; no recomputation, no padding. `mfu_products` counts the matrix products that were really
needed: the head at scored positions only, the adapter at frames only. It is lower, and what the GPU did.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.shapes import (
    Shape,
    convention_flops,
    make_batches,
    make_pair,
    product_flops,
    shape_of,
    start_process_group,
    use_attention,
)
from benchmarks.gpu.timing import forget_peak, gib, peak_bytes, seconds
from benchmarks.gpu.worker import Context, out_of_memory
from salad_ray.config import DistillConfig, PackConfig
from salad_ray.distill.losses import distillation_loss
from salad_ray.distill.step import batch_loss, peak_flops
from salad_ray.model.speech_lm import SpeechLM, hidden_states, lm_head, parameter_groups
from salad_ray.scaling.memory import Shape as MemoryShape
from salad_ray.scaling.memory import training_memory
from salad_ray.sequences.batch import Batch

Row = dict[str, Any]

MICRO_BATCHES = 4
STEPS = 3


@dataclass(frozen=True)
class Variant:
    """How a step is run."""

    rows: int
    recompute: bool
    attention: str

    @property
    def name(self) -> str:
        kept = "activations recomputed" if self.recompute else "activations kept"
        return f"{self.rows} rows, {kept}, {self.attention}"


VARIANTS = (
    Variant(4, True, "sdpa"),
    Variant(4, True, "varlen"),
    Variant(8, True, "varlen"),
    Variant(4, False, "varlen"),
    Variant(8, False, "varlen"),
)
"""Those that are surest to fit come first: an engine that ran out of memory is of no more use."""


def engine_rows(context: Context) -> Iterator[Row]:
    """Every variant in one engine."""
    from salad_ray.distill.engine import make_engine

    shape = shape_of(context)
    start_process_group(context)
    teacher, student = make_pair(shape, context.device, torch.bfloat16, VARIANTS[0].attention)
    settings = settings_of(context, VARIANTS[0])
    engine = make_engine(student, settings, micro_batches(context), context.device)
    make = cache(partial(make_batches, shape))  # variants of as many rows have the same
    for variant in VARIANTS:
        prepare(variant, student, teacher)
        step = EngineStep(engine, teacher, settings_of(context, variant), context)
        try:
            yield measure(variant, step, student, teacher, shape, context, make)
        except RuntimeError as error:
            yield out_of_memory(error, variant.name) | {"peak_gib": gib(peak_bytes(context.device))}
            return


def compiled_rows(context: Context) -> Iterator[Row]:
    """The best variant under torch.compile; its first steps, in which it compiles, are told apart."""
    from salad_ray.distill.engine import compile_layers, make_engine

    shape, variant = shape_of(context), best(context)
    start_process_group(context)
    teacher, student = make_pair(shape, context.device, torch.bfloat16, variant.attention)
    settings = settings_of(context, variant)
    engine = make_engine(student, settings, micro_batches(context), context.device)
    prepare(variant, student, teacher)
    for llm in (student.llm, teacher):  # as `distill.compile=true`; a toy run only traces, which is faster
        compile_layers(llm, "inductor" if context.on_gpu else "eager")
    step = EngineStep(engine, teacher, settings, context)
    batches = make_batches(shape, variant.rows, micro_batches(context), seed=100)
    compiled = {
        "name": f"{variant.name}, compiled",
        "first_step_secs": seconds(lambda: step(batches), context.device),
    }
    yield compiled
    row = measure(variant, step, student, teacher, shape, context, partial(make_batches, shape), warm_up=0)
    uncompiled = rate_of(context, variant)
    yield row | compiled | {"compiled/not": uncompiled and row["positions_per_sec"] / uncompiled}


def bare_rows(context: Context) -> Iterator[Row]:
    """The best variant as one would write it without DeepSpeed: fp32 copies of the bf16 weights, AdamW over them."""
    shape, variant = shape_of(context), best(context)
    teacher, student = make_pair(shape, context.device, torch.bfloat16, variant.attention)
    prepare(variant, student, teacher)
    step = BareStep(student, teacher, settings_of(context, variant), context)
    row = measure(variant, step, student, teacher, shape, context, partial(make_batches, shape))
    ours = rate_of(context, variant)
    ratio = {"ours/bare": ours and ours / row["positions_per_sec"]}
    yield row | {"name": f"{variant.name}, bare"} | ratio
    [batch] = make_batches(shape, variant.rows, 1)
    yield from phases(step, batch.to(context.device, torch.bfloat16), context)


def micro_batches(context: Context) -> int:
    return 2 if context.tiny else MICRO_BATCHES


def settings_of(context: Context, variant: Variant) -> DistillConfig:
    return DistillConfig(
        precision="bf16", zero_stage=2, use_gpu=context.on_gpu, micro_batch_rows=variant.rows,
        activation_checkpointing=variant.recompute,
    )  # fmt: skip


def prepare(variant: Variant, student: SpeechLM, teacher: nn.Module) -> None:
    """Switch attention and recomputation of models that are there."""
    student.gradient_checkpointing(variant.recompute)
    for llm in (student.llm, teacher):
        use_attention(llm, variant.attention)


class EngineStep:
    """An optimizer step as the trainer makes it."""

    def __init__(self, engine: Any, teacher: nn.Module, settings: DistillConfig, context: Context) -> None:
        from salad_ray.distill.engine import forward_backward

        self.engine, self.teacher, self.settings, self.context = engine, teacher, settings, context
        self.forward_backward = forward_backward

    def __call__(self, batches: list[Batch]) -> float:
        """Mean KL over the labels of the step."""
        num_labels = sum(len(batch.labels) for batch in batches)
        kl = 0.0
        for batch in batches:
            moved = batch.to(self.context.device, torch.bfloat16)
            loss = self.forward_backward(self.engine, self.teacher, moved, self.settings, num_labels, len(batches))
            kl += loss.kl.item() * len(batch.labels) / num_labels
            self.engine.step()
        return kl


class BareStep:
    """The same step in plain PyTorch."""

    def __init__(self, student: SpeechLM, teacher: nn.Module, settings: DistillConfig, context: Context) -> None:
        self.student, self.teacher, self.settings, self.context = student, teacher, settings, context
        groups = parameter_groups(student, settings)
        self.weights = [parameter for group in groups for parameter in group["params"]]
        masters = [parameter.detach().float() for parameter in self.weights]
        self.masters = masters
        rest = iter(masters)
        groups = [group | {"params": [next(rest) for _ in group["params"]]} for group in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=settings.betas, fused=context.on_gpu)

    def __call__(self, batches: list[Batch]) -> float:
        num_labels = sum(len(batch.labels) for batch in batches)
        kl = 0.0
        for batch in batches:
            moved = batch.to(self.context.device, torch.bfloat16)
            loss = batch_loss(self.student, self.student.head, self.teacher, moved, self.settings.alpha)
            (loss.loss * (len(batch.labels) / num_labels)).backward()
            kl += loss.kl.item() * len(batch.labels) / num_labels
        self.update()
        return kl

    def update(self) -> None:
        """Clip, step the fp32 copies, and take them over."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(self.masters, self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_copy_([weight.detach() for weight in self.weights], self.masters)


def measure(
    variant: Variant,
    step: Callable[[list[Batch]], float],
    student: SpeechLM,
    teacher: nn.Module,
    shape: Shape,
    context: Context,
    make: Callable[[int, int, int], list[Batch]],
    warm_up: int = 1,
) -> Row:
    """Rate, MFU and memory over a few steps, each on batches of its own, after `warm_up` others (none in a toy run).

    `make` is `make_batches` of the shape.
    """
    device, number = context.device, micro_batches(context)
    warm_up = 0 if context.tiny else warm_up
    num_steps = warm_up + (1 if context.tiny else STEPS)
    steps = [make(variant.rows, number, seed) for seed in range(num_steps)]
    gc.collect()
    forget_peak(device)
    kls: list[float] = []
    secs = [seconds(lambda: kls.append(step(batches)), device) for batches in steps][warm_up:]  # noqa: B023
    timed = [batch for batches in steps[warm_up:] for batch in batches]
    positions = [sum(batch.num_positions for batch in batches) for batches in steps[warm_up:]]
    rates = [number / taken for number, taken in zip(positions, secs, strict=True)]
    peak = peak_flops(device)
    per_sec = 1 / sum(secs)
    speech = sum(len(batch.speech_index) for batch in timed) / sum(positions)
    return {
        "name": variant.name,
        "positions_per_sec": median(rates),
        "min": min(rates),
        "max": max(rates),
        "mfu": peak and sum(convention_flops(student, teacher, batch) for batch in timed) * per_sec / peak,
        "mfu_products": peak and sum(product_flops(shape, batch) for batch in timed) * per_sec / peak,
        "peak_gib": gib(peak_bytes(device)),
        "planned_gib": gib(planned(variant, shape, context, speech)),
        "step_secs": median(secs),
        "fill": sum(positions) / (len(timed) * variant.rows * shape.context),
        "kl": kls[-1],
        "ok": bool(torch.isfinite(torch.tensor(kls)).all()),
    }


def planned(variant: Variant, shape: Shape, context: Context, speech_share: float) -> float:
    """Bytes that the planner expects."""
    pack = PackConfig(context=shape.context, num_lanes=variant.rows * micro_batches(context))
    memory = MemoryShape(shape.llm, shape.adapter, shape.encoder_dim)
    return training_memory(memory, settings_of(context, variant), pack, 1, speech_share)["peak"]


def phases(step: BareStep, batch: Batch, context: Context) -> Iterator[Row]:
    """Where the seconds of a micro-batch and of an update go, one after the other with a wait between."""
    student, teacher, found = step.student, step.teacher, dict[str, Any]()

    def read() -> None:
        with torch.no_grad():
            states = hidden_states(teacher, batch.teacher_ids, batch.teacher_position_ids)
            found["teacher"] = states.flatten(0, 1)[batch.teacher_index]

    def hear() -> None:
        found["student"] = student(batch).flatten(0, 1)[batch.student_index]

    def compare() -> None:
        heads = student.head, lm_head(teacher)
        found["loss"] = distillation_loss(found["student"], heads[0], found["teacher"], heads[1], batch.labels).loss

    works = {
        "teacher's forward": read,
        "student's forward": hear,
        "loss and its gradients": compare,
        "backward": lambda: found["loss"].backward(),
        "update (once a step)": step.update,
    }
    secs: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(3):
        for name, work in works.items():
            secs[name].append(seconds(work, context.device))
    for name, values in secs.items():
        yield {"name": f"bare: {name}", "secs": median(values[1:])}


def best(context: Context) -> Variant:
    """The fastest variant of the section before; without it the one that is surest to work."""
    measured = [row for row in context.rows_of("training") if "positions_per_sec" in row]
    if not measured:
        return VARIANTS[0]
    name = max(measured, key=lambda row: row["positions_per_sec"])["name"]
    return next(variant for variant in VARIANTS if variant.name == name)


def rate_of(context: Context, variant: Variant) -> float | None:
    """Positions a second of this variant in the section before."""
    rows = {row["name"]: row.get("positions_per_sec") for row in context.rows_of("training")}
    return rows.get(variant.name)
