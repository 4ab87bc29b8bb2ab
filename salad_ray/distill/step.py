"""One distillation step, free of any framework: the loss of a micro-batch, the schedule, the cost.

Shape letters: B rows, T student positions, U teacher positions, L labels, D model width.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from salad_ray.distill.losses import DistillationLoss, distillation_loss
from salad_ray.model.speech_lm import hidden_states, lm_head
from salad_ray.sequences.batch import Batch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BUCKET = 500_000_000
"""Most elements of gradients that ZeRO reduces at once, DeepSpeed's default."""
# Dense bf16 peaks by the vendors' datasheets, FLOP/s.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "B200": 2250e12}


def batch_loss(
    student: Callable[[Batch], Tensor],
    student_head: Tensor,
    teacher: nn.Module,
    batch: Batch,
    alpha: float,
    chunk_size: int | None = None,
    gather_head: Callable[[], object] = lambda: None,
) -> DistillationLoss:
    """L = α · L_DIST + (1 − α) · L_NLL of one micro-batch, as a mean over its L labels.

    Args:
        student: batch → hidden states (B, T, D); a `SpeechLM` or the engine around it.
        student_head: (V, D) weight of the student's output head.
        teacher: the frozen text LLM; sees batch.teacher_ids (B, U) only.
        gather_head: called before the head is used; under ZeRO-3 it makes `student_head` whole, and the caller keeps it
            so until the backward is done.
    """
    with torch.no_grad():
        teacher_hidden = hidden_states(teacher, batch.teacher_ids, batch.teacher_position_ids)
        teacher_hidden = teacher_hidden.flatten(0, 1)[batch.teacher_index]
    student_hidden = student(batch).flatten(0, 1)[batch.student_index]
    gather_head()
    return distillation_loss(
        student_hidden, student_head, teacher_hidden, lm_head(teacher), batch.labels, alpha, chunk_size
    )


def global_scale(num_labels: int, num_labels_of_step: int, num_workers: int, num_micro_batches: int) -> float:
    """What turns a micro-batch's mean into its share of the step's mean over all labels of all workers.

    DeepSpeed divides by the number of micro-batches and averages over the workers; both are undone here.
    """
    return num_labels * num_workers * num_micro_batches / max(num_labels_of_step, 1)


def learning_rate_factor(step: int, num_steps: int, warmup_steps: int, decay_steps: int) -> float:
    """Warm-up, constant, linear decay to zero: the factor of the peak rate in step 0 … num_steps − 1."""
    rising = (step + 1) / max(warmup_steps, 1)
    falling = (num_steps - step) / (decay_steps + 1) if decay_steps else 1.0
    return min(rising, falling, 1.0)


def training_flops(num_student: int, num_teacher: int, llm_config: object, batch: Batch) -> float:
    """Useful FLOP of one micro-batch: 6N per student position, 2N per teacher position, and causal attention.

    No recompute and no padding is counted. A pair of positions that attend costs 4 · width FLOP a layer in the forward
    (scores and values), three times that with the backward.
    """
    width = llm_config.num_attention_heads * head_dim(llm_config)  # type: ignore[attr-defined]
    attention = 4 * width * llm_config.num_hidden_layers  # type: ignore[attr-defined]
    dense = 6 * num_student * batch.num_positions + 2 * num_teacher * batch.num_teacher_positions
    return dense + attention * (3 * batch.num_pairs + batch.num_teacher_pairs)


def head_dim(llm_config: object) -> int:
    """Width of one attention head."""
    explicit = getattr(llm_config, "head_dim", None)
    return explicit or llm_config.hidden_size // llm_config.num_attention_heads  # type: ignore[attr-defined]


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak, where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)
