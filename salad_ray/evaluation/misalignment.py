"""Forgetting F, misalignment M and the distillation loss, measured at the same positions (paper, Eq. 2 and 3).

Only text tokens after a sample's first speech count: before it the interleaved context is the text itself, so M is 0
there and would only dilute. With Q the teacher, P the student, w the text and c the interleaved context:
M = KL(P(·|w) ‖ P(·|c)), F = KL(Q(·|w) ‖ P(·|w)), distillation = KL(Q(·|w) ‖ P(·|c)), in nats per position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from salad_ray.distill.losses import divergence
from salad_ray.model.speech_lm import SpeechLM, hidden_states, lm_head
from salad_ray.sequences.batch import Batch
from salad_ray.tables import Measurement

QUANTITIES = ("misalignment", "forgetting", "distillation", "nll_speech", "nll_text")


@dataclass(frozen=True)
class Estimate:
    """A mean per position with its standard error, passages being the independent units."""

    mean: float
    standard_error: float
    num_positions: int
    num_passages: int


@torch.no_grad()
def measure_batch(student: SpeechLM, teacher: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
    """Score one batch.

    Returns:
        `segment`, `distance` and one array per name of `QUANTITIES`, all (L',), for the L' labels after speech.
    """
    scored = batch.distance >= 0
    text_ids, text_positions = batch.teacher_ids, batch.teacher_position_ids
    at_text, at_speech = batch.teacher_index[scored], batch.student_index[scored]
    teacher_text = hidden_states(teacher, text_ids, text_positions).flatten(0, 1)[at_text]
    student_text = student.text_hidden(text_ids, text_positions).flatten(0, 1)[at_text]
    student_speech = student(batch).flatten(0, 1)[at_speech]
    labels, head, teacher_head = batch.labels[scored], student.head, lm_head(teacher)
    misalignment, nll_speech = divergence(student_speech, head, student_text, head, labels)
    forgetting, nll_text = divergence(student_text, head, teacher_text, teacher_head, labels)
    distillation, _ = divergence(student_speech, head, teacher_text, teacher_head, labels)
    values = dict(zip(QUANTITIES, (misalignment, forgetting, distillation, nll_speech, nll_text), strict=True))
    values |= {"segment": batch.segment[scored], "distance": batch.distance[scored]}
    return {name: value.cpu().numpy() for name, value in values.items()}


def summarise(
    system: str, values: dict[str, np.ndarray], passages: Sequence[tuple[str, str]], edges: Sequence[int]
) -> list[Measurement]:
    """Sum scored positions by passage and distance bin.

    Args:
        values: what `measure_batch` returns.
        passages: (key, domain) of every segment of the batch.
        edges: upper edges of the distance bins, in text tokens; a bin is named by its first distance.
    """
    starts = np.array([0, *edges])
    bins = starts[np.searchsorted(starts, values["distance"], side="right") - 1]
    rows = []
    for segment, (key, domain) in enumerate(passages):
        for distance in np.unique(bins[values["segment"] == segment]):
            chosen = (values["segment"] == segment) & (bins == distance)
            sums = {name: float(values[name][chosen].sum(dtype=np.float64)) for name in QUANTITIES}
            rows.append(
                Measurement(
                    system=system,
                    passage=key,
                    domain=domain,
                    distance=int(distance),
                    num_positions=int(chosen.sum()),
                    **sums,
                )
            )
    return rows


def estimate(rows: Sequence[Measurement], quantity: str) -> Estimate:
    """Mean of a quantity per position: a ratio estimator whose standard error treats passages as the sample."""
    passages: dict[str, list[float]] = {}
    for row in rows:
        total = passages.setdefault(row.passage, [0.0, 0.0])
        total[0] += getattr(row, quantity)
        total[1] += row.num_positions
    if not passages:
        return Estimate(float("nan"), float("nan"), 0, 0)
    sums, counts = np.array(list(passages.values())).T
    mean = sums.sum() / counts.sum()
    number = len(sums)
    residuals = sums - mean * counts
    spread = np.sqrt((residuals**2).sum() * number / (number - 1)) / counts.sum() if number > 1 else float("nan")
    return Estimate(float(mean), float(spread), int(counts.sum()), number)
