"""Forgetting F, misalignment M and the distillation loss, measured at the same positions (paper, Eq. 2 and 3).

How passages are heard is up to a protocol (protocols.py). Only text tokens after a sample's first speech count: before
it the interleaved context is the text itself, so M is 0 there and would only dilute. With Q the teacher, P the student,
w the text and c the interleaved context:
M = KL(P(·|w) ‖ P(·|c)), F = KL(Q(·|w) ‖ P(·|w)), distillation = KL(Q(·|w) ‖ P(·|c)), in nats per position.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import nn

from salad_ray.distill.losses import divergence
from salad_ray.model.head import lm_head
from salad_ray.model.packed import hidden_states
from salad_ray.model.speech_lm import SpeechLM
from salad_ray.sequences.batch import Batch
from salad_ray.tables import Measurement

QUANTITIES = ("misalignment", "forgetting", "distillation", "nll_speech", "nll_text")


@dataclass(frozen=True)
class Estimate:
    """A mean per position with its standard error, books, videos or documents being the independent units."""

    mean: float
    standard_error: float
    num_positions: int
    num_passages: int
    num_units: int


@dataclass(frozen=True)
class Difference:
    """The first system's mean − the second's, over the passages of both, with its 95 % interval (Student's t)."""

    difference: float
    standard_error: float
    ci_low: float
    ci_high: float
    num_passages: int
    num_units: int


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
    system: str,
    protocol: str,
    values: dict[str, np.ndarray],
    passages: Sequence[tuple[str, str, str]],
    edges: Sequence[int],
) -> list[Measurement]:
    """Sum scored positions by passage and distance bin.

    Args:
        values: what `measure_batch` returns.
        passages: (key, source, domain) of every segment of the batch.
        edges: upper edges of the distance bins, in text tokens; a bin is named by its first distance.
    """
    starts = np.array([0, *edges])
    bins = starts[np.searchsorted(starts, values["distance"], side="right") - 1]
    rows = []
    for segment, (key, source, domain) in enumerate(passages):
        for distance in np.unique(bins[values["segment"] == segment]):
            chosen = (values["segment"] == segment) & (bins == distance)
            sums = {name: float(values[name][chosen].sum(dtype=np.float64)) for name in QUANTITIES}
            rows.append(
                Measurement(
                    system=system,
                    protocol=protocol,
                    passage=key,
                    source=source,
                    domain=domain,
                    distance=int(distance),
                    num_positions=int(chosen.sum()),
                    **sums,
                )
            )
    return rows


def estimate(rows: Sequence[Measurement], quantity: str) -> Estimate:
    """Mean of a quantity per position: a ratio of sums, whose standard error is linearised (Cochran 1977, 6.11).

    Units are sources, stratified by domain: how often a domain is measured is given, not drawn.
    """
    units = _units(rows, quantity)
    num_positions = sum(unit.num_positions for unit in units)
    if not num_positions:
        return Estimate(float("nan"), float("nan"), 0, 0, 0)
    mean = sum(unit.total for unit in units) / num_positions
    error, _ = _error([unit.total - mean * unit.num_positions for unit in units], [unit.domain for unit in units])
    return Estimate(mean, error / num_positions, num_positions, sum(len(unit.passages) for unit in units), len(units))


def difference(first: Sequence[Measurement], second: Sequence[Measurement], quantity: str) -> Difference | None:
    """How far two systems differ on the same passages; what makes a passage hard for both drops out of the error.

    Args:
        first, second: measurements of one system each, by one protocol.

    Returns:
        None where they have no passage in common.

    Raises:
        ValueError: a passage is scored at more positions in one system than in the other.
    """
    common = {row.passage for row in first} & {row.passage for row in second}
    sides = [_units([row for row in rows if row.passage in common], quantity) for rows in (first, second)]
    if not common:
        return None
    ours, theirs = ({unit.key: unit for unit in units} for units in sides)
    for key, unit in ours.items():
        if unit.num_positions != theirs[key].num_positions:
            raise ValueError(f"{key} is scored at {unit.num_positions} and at {theirs[key].num_positions} positions")
    num_positions = sum(unit.num_positions for unit in ours.values())
    gains = {key: unit.total - theirs[key].total for key, unit in ours.items()}
    mean = sum(gains.values()) / num_positions
    error, freedom = _error(
        [gain - mean * ours[key].num_positions for key, gain in gains.items()],
        [unit.domain for unit in ours.values()],
    )
    error /= num_positions
    reach = float(stats.t.ppf(0.975, freedom)) * error if freedom else float("nan")
    return Difference(mean, error, mean - reach, mean + reach, len(common), len(ours))


@dataclass
class Unit:
    """What was drawn as a whole, and its sums."""

    key: str
    domain: str
    passages: set[str]
    total: float = 0.0
    num_positions: int = 0


def _units(rows: Sequence[Measurement], quantity: str) -> list[Unit]:
    found: dict[str, Unit] = {}
    for row in rows:
        key = row.source or row.passage
        unit = found.setdefault(key, Unit(key, row.domain, set()))
        unit.total += getattr(row, quantity)
        unit.num_positions += row.num_positions
        unit.passages.add(row.passage)
    return list(found.values())


def _error(residuals: Sequence[float], domains: Sequence[str]) -> tuple[float, int]:
    """Standard error of the sum of residuals (U,), with its degrees of freedom; NaN and 0 for a single unit.

    Domains of a single unit have no spread of their own: they are taken together, a lone one with the largest domain.
    """
    counts = Counter(domains)
    largest = counts.most_common(1)[0][0]
    lone = [domain for domain, count in counts.items() if count == 1]
    pool = lone[0] if len(lone) > 1 else largest
    strata: dict[str, list[float]] = {}
    for residual, domain in zip(residuals, domains, strict=True):
        strata.setdefault(pool if counts[domain] == 1 else domain, []).append(residual)
    if any(len(values) < 2 for values in strata.values()):
        return float("nan"), 0
    variance = sum(len(values) * float(np.var(values, ddof=1)) for values in strata.values())
    return float(np.sqrt(variance)), len(residuals) - len(strata)
