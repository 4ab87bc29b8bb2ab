"""One distillation step, free of any framework: the loss of a micro-batch, the schedule, the cost.

Shape letters: B rows, T student positions, U teacher positions, L labels, E word ends, D model width.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from salad_ray.config import DistillConfig
from salad_ray.distill.losses import distillation_loss, loss_and_each_kl
from salad_ray.model.head import Head, lm_head
from salad_ray.model.packed import hidden_states
from salad_ray.sequences.batch import Batch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BUCKET = 500_000_000
"""Most elements of gradients that ZeRO reduces at once, DeepSpeed's default."""
# Dense bf16 peaks by the vendors' datasheets, FLOP/s.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "B200": 2250e12}

_NUM_CHOSEN = ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_top_k", "moe_k")


class BatchLoss(NamedTuple):
    """Means in nats; only `loss` carries a gradient. `kl` and `nll` are of the text labels, L of them, `word_end_kl` of
    the E word ends; `each_kl` (L,) is the KL of every text label."""

    loss: Tensor
    kl: Tensor
    nll: Tensor
    word_end_kl: Tensor
    each_kl: Tensor


def batch_loss(
    student: Callable[[Batch], Tensor],
    student_head: Tensor | Head,
    teacher: nn.Module,
    batch: Batch,
    alpha: float,
    chunk_size: int | None = None,
    gather_head: Callable[[], object] = lambda: None,
    word_end_weight: float = 0.0,
) -> BatchLoss:
    """α · L_DIST + (1 − α) · L_NLL of one micro-batch, as a mean over its L labels; with a weight λ > 0, word ends too:

        [Σ_labels (α · KL + (1 − α) · NLL) + λ · Σ_word ends KL] / (L + λ · E)

    with KL from the teacher to the student, over the full vocabulary. A word end is the student's last position of a
    word inside a speech span, where the teacher has just read the word. It has no NLL at any α: the next word is not
    the student's to write there. Word ends take a second gradient of the head for as long as the graph lives.

    Args:
        student: batch → hidden states (B, T, D); a `SpeechLM` or the engine around it.
        student_head: the student's output head, or its weight (V, D).
        teacher: the frozen text LLM; sees batch.teacher_ids (B, U) only.
        gather_head: called before the head is used; under ZeRO-3 it makes `student_head` whole, and the caller keeps it
            so until the backward is done.
        word_end_weight: λ; 0 leaves word ends out.
    """
    at, there = [batch.student_index], [batch.teacher_index]
    if word_end_weight:
        at, there = [*at, batch.word_end_student], [*there, batch.word_end_teacher]
    with torch.no_grad():
        read = _gathered(hidden_states(teacher, batch.teacher_ids, batch.teacher_position_ids), there)
    heard = _gathered(student(batch), at)
    gather_head()
    teacher_head = lm_head(teacher)
    text, each_kl = loss_and_each_kl(heard[0], student_head, read[0], teacher_head, batch.labels, alpha, chunk_size)
    if not word_end_weight:
        return BatchLoss(*text, torch.zeros_like(text.kl), each_kl)
    next_ids = batch.teacher_ids.flatten()[batch.word_end_teacher + 1]
    ends = distillation_loss(heard[1], student_head, read[1], teacher_head, next_ids, 1.0, chunk_size)
    num_ends, total = word_end_weight * len(next_ids), label_weight(batch, word_end_weight)
    loss = (len(batch.labels) * text.loss + num_ends * ends.loss) / (total or 1.0)
    return BatchLoss(loss, text.kl, text.nll, ends.kl, each_kl)


def _gathered(hidden: Tensor, indices: Sequence[Tensor]) -> list[Tensor]:
    """States (B, T, D) at each of these flat positions; all others can be freed."""
    flat = hidden.flatten(0, 1)
    return [flat[index] for index in indices]


def weight_of_word_ends(settings: DistillConfig) -> float:
    """λ of `batch_loss`, 0 where word ends are not compared."""
    return settings.word_ends_weight if settings.word_ends else 0.0


def label_weight(batch: Batch, word_end_weight: float) -> float:
    """L + λ · E: what the mean of a micro-batch's loss is taken over."""
    return len(batch.labels) + word_end_weight * len(batch.word_end_student)


def global_scale(weight: float, weight_of_step: float, num_workers: int, num_micro_batches: int) -> float:
    """What turns a micro-batch's mean into its share of the step's mean over all labels of all workers.

    DeepSpeed divides by the number of micro-batches and averages over the workers; both are undone here. Weights are
    those of `label_weight`: the number of labels, where word ends are left out.
    """
    return weight * num_workers * num_micro_batches / (weight_of_step or 1.0)


def learning_rate_factor(step: int, num_steps: int, warmup_steps: int, decay_steps: int) -> float:
    """Warm-up, constant, linear decay to zero: the factor of the peak rate in step 0 … num_steps − 1."""
    rising = (step + 1) / max(warmup_steps, 1)
    falling = (num_steps - step) / (decay_steps + 1) if decay_steps else 1.0
    return min(rising, falling, 1.0)


def num_active_parameters(llm: PreTrainedModel) -> int:
    """Parameters that take part in what is made of a position: of a mixture's experts, as many as its router chooses.

    Experts lie in weights of three dimensions or in lists. Where a config does not say how many are chosen, all count.
    """
    chosen = _num_chosen(llm.config.get_text_config())
    lists = {
        f"{name}.": len(module)
        for name, module in llm.named_modules()
        if name.endswith("experts") and isinstance(module, nn.ModuleList)
    }
    active = 0.0
    for name, weight in llm.named_parameters():
        number = next((len_ for prefix, len_ in lists.items() if name.startswith(prefix)), 1)
        if weight.ndim == 3 and "conv" not in name:
            number = weight.shape[0]
        active += weight.numel() * min(1.0, chosen / number)
    return round(active)


def num_chosen_experts(config: PretrainedConfig, weight: Tensor) -> int:
    """How many of the experts in a weight a position goes through; 1 where it holds none."""
    return int(min(_num_chosen(config), weight.shape[0])) if weight.ndim == 3 else 1


def _num_chosen(config: PretrainedConfig) -> float:
    return next((getattr(config, name) for name in _NUM_CHOSEN if getattr(config, name, None)), math.inf)


def told_parameters(number: int, active: int) -> str:
    """As users read it."""
    return f"{number:,} parameters" + (f", {active:,} of them active" if active < number else "")


def head_share(llm: PreTrainedModel, num_adapter: int) -> float:
    """Share of a training's FLOP that the head takes: student and teacher, at the labels.

    Labels are taken to be at a third of the positions, and the teacher's positions to be half of the student's.
    """
    head, embeddings = llm.get_output_embeddings().weight, llm.get_input_embeddings().weight
    body = num_active_parameters(llm) - embeddings.numel() - (0 if head is embeddings else head.numel())
    of_head = (6 + 2) * head.numel() / 3
    return of_head / (of_head + 6 * (body + num_adapter) + 2 * body / 2)


def training_flops(num_student: int, num_teacher: int, widths: int, batch: Batch) -> float:
    """Useful FLOP of one micro-batch: 6N per student position, 2N per teacher position, and causal attention.

    No recompute and no padding is counted, and of experts those that are active. A pair of positions that attend costs
    4 · width FLOP a layer in the forward (scores and values), three times that with the backward.

    Args:
        widths: of the attention, summed over the layers (`attention_widths`).
    """
    dense = 6 * num_student * batch.num_positions + 2 * num_teacher * batch.num_teacher_positions
    return dense + 4 * widths * (3 * batch.num_pairs + batch.num_teacher_pairs)


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bf16 by instructions of its own; without, that takes many times as long as fp32."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak, where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)
