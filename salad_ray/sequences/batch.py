"""Batches: rows of packed segments as tensors.

Shapes: B rows, T student positions, U teacher positions, F speech positions, P speech spans, S longest speech span,
C encoder width times the frames at a position, L scored labels, E word ends. All segments of a row share it
block-diagonally: positions restart at each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from salad_ray.sequences.interleave import IntArray, Segment, frame_groups
from salad_ray.tables import BadInput, Features

TEACHER_MULTIPLE = 64  # the teacher's rows are padded to a multiple of this: few different shapes, little padding


@dataclass(frozen=True, slots=True)
class Sample:
    """A segment with the features at its speech positions, (F, C) in the order of `segment.frame_index`."""

    segment: Segment
    frames: NDArray[np.floating]


def _no_positions() -> Tensor:
    return torch.zeros(0, dtype=torch.long)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows for one forward pass.

    token_ids: (B, T) the student's text tokens, 0 at speech and padding.
    position_ids: (B, T) counted from 0 in each segment; padding is a segment of its own.
    speech_index: (F,) flat positions b · T + t of the speech, span by span.
    frames: (P, S, C) float32, one zero-padded row per speech span.
    frame_mask: (P, S) true at real frames, so that `frames[frame_mask]` (F, C) belongs at `speech_index`.
    teacher_ids, teacher_position_ids: (B, U) the same for the text alone.
    student_index: (L,) flat in B · T, and teacher_index: (L,) flat in B · U, where labels (L,) are predicted.
    distance: (L,) text tokens since the last speech frame; 0 predicted from the frame itself, -1 before any speech.
    segment: (L,) number of the label's segment in the batch.
    num_positions, num_teacher_positions: student's and teacher's positions that are not padding.
    num_pairs, num_teacher_pairs: pairs (query, key) of positions that attend, the causal half of every segment.
    word_end_student: (E,) flat in B · T, and word_end_teacher: (E,) flat in B · U, the ends of words inside speech.
    num_text_positions: those of `num_positions` in segments without speech.
    """

    token_ids: Tensor
    position_ids: Tensor
    speech_index: Tensor
    frames: Tensor
    frame_mask: Tensor
    teacher_ids: Tensor
    teacher_position_ids: Tensor
    student_index: Tensor
    teacher_index: Tensor
    labels: Tensor
    distance: Tensor
    segment: Tensor
    num_positions: int
    num_teacher_positions: int
    num_pairs: int
    num_teacher_pairs: int
    word_end_student: Tensor = field(default_factory=_no_positions)
    word_end_teacher: Tensor = field(default_factory=_no_positions)
    num_text_positions: int = 0

    @property
    def is_text(self) -> Tensor:
        """(L,) true where the label's segment has no speech: none of its labels comes after a speech frame."""
        heard = self.segment[self.distance >= 0]
        return torch.isin(self.segment, heard, invert=True)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The batch on a device, with its frames in `dtype`."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        moved["frames"] = self.frames.to(device, dtype, non_blocking=True)
        return replace(self, **moved)


def sample_of(segment: Segment, utterances: Sequence[Features]) -> Sample:
    """Gather a segment's frames from the stored ones of its utterances; raises `BadInput` when they do not fit."""
    frames = np.concatenate([frames_of(utterance) for utterance in utterances])
    return Sample(segment, side_by_side(frames, segment.frame_index))


def side_by_side(frames: NDArray[np.floating], groups: IntArray) -> NDArray[np.floating]:
    """Frames (num_frames, C) as the adapter takes them: (F, n · C), those of each group (F, n) one after the other."""
    num_positions, stride = groups.shape
    return frames[groups].reshape(num_positions, stride * frames.shape[1])


def stacked(frames: NDArray[np.floating], stride: int) -> NDArray[np.floating]:
    """Frames (S, C) of speech without word times, such as a question's: (⌈S / n⌉, n · C), grouped from its start."""
    return side_by_side(frames, frame_groups(0, len(frames), stride))


def store_frames(frames: np.ndarray, storage: Literal["float16", "int8"]) -> tuple[bytes, bytes | None]:
    """Frames as `Features` has them; `frames_of` reads them again.

    As int8 a value is off by at most half its channel's scale, which is 1/127 of the channel's largest value in this
    utterance, rounded up to float16.

    Args:
        frames: float (num_frames, dim).

    Returns:
        `features` and `scales`, the latter none for float16.

    Raises:
        BadInput: there are no frames, or values that are not finite in float16.
    """
    with np.errstate(over="ignore"):
        halves = frames.astype(np.float16)
    if not len(frames) or not np.isfinite(halves).all():
        raise BadInput("the encoder gave no frames, or values that are not finite in float16")
    if storage == "float16":
        return halves.tobytes(), None
    values = frames.astype(np.float32)
    scales = _float16_above(np.abs(values).max(axis=0) / 127)
    levels = np.rint(values / np.where(scales > 0, scales, np.float16(1)).astype(np.float32))
    return levels.astype(np.int8).tobytes(), scales.tobytes()


def frames_of(utterance: Features) -> NDArray[np.float16]:
    """The frames (num_frames, dim) of an utterance, stored either way; raises `BadInput` when the sizes are wrong."""
    shape = (utterance.num_frames, utterance.dim)
    kind = np.dtype(np.float16 if utterance.scales is None else np.int8)
    if len(utterance.features) != shape[0] * shape[1] * kind.itemsize:
        raise BadInput(f"{len(utterance.features)} bytes are not {shape[0]} frames of {shape[1]} {kind} values")
    values = np.frombuffer(utterance.features, kind).reshape(shape)
    if utterance.scales is None:
        return values
    if len(utterance.scales) != 2 * utterance.dim:
        raise BadInput(f"{len(utterance.scales)} bytes are not the float16 scales of {utterance.dim} channels")
    limit = np.finfo(np.float16).max  # a scale rounded up may lead a little beyond it
    scaled = values * np.frombuffer(utterance.scales, np.float16).astype(np.float32)
    return scaled.clip(-limit, limit).astype(np.float16)


def _float16_above(values: np.ndarray) -> NDArray[np.float16]:
    """The least float16 numbers that are not below `values`."""
    nearest = values.astype(np.float16)
    return np.where(nearest < values, np.nextafter(nearest, np.float16(np.inf)), nearest)


def without_labels(batch: Batch) -> Batch:
    """The batch with nothing to score or to count: for a worker that has to run one more than its rows fill."""
    scored = ("student_index", "teacher_index", "labels", "distance", "segment", "word_end_student", "word_end_teacher")
    numbers = ("num_positions", "num_teacher_positions", "num_pairs", "num_teacher_pairs", "num_text_positions")
    nothing: dict[str, Any] = {name: getattr(batch, name)[:0] for name in scored}
    return replace(batch, **nothing | dict.fromkeys(numbers, 0))


def collate(rows: Sequence[Sequence[Sample]], context: int) -> Batch:
    """Lay rows of samples out as tensors; T = context, U a multiple of `TEACHER_MULTIPLE`.

    Raises:
        ValueError: a row is longer than the context, or there is no row.
    """
    if not rows:
        raise ValueError("a batch needs at least one row")
    student = [[len(sample.segment.token_ids) for sample in row] for row in rows]
    teacher = [[len(sample.segment.teacher_ids) for sample in row] for row in rows]
    longest = max(map(sum, student))
    if longest > context:
        raise ValueError(f"a row has {longest} positions, more than the context of {context}")
    width = -(-max(map(sum, teacher)) // TEACHER_MULTIPLE) * TEACHER_MULTIPLE
    segments = [sample.segment for row in rows for sample in row]
    student_starts, teacher_starts = _starts(student, context), _starts(teacher, width)
    text = [[np.maximum(sample.segment.token_ids, 0) for sample in row] for row in rows]
    frames, frame_mask = _pad_spans([sample for row in rows for sample in row])
    num_labels = [len(segment.labels) for segment in segments]
    return Batch(
        token_ids=_grid(text, context),
        position_ids=_positions(student, context),
        speech_index=_flat([np.flatnonzero(segment.token_ids < 0) for segment in segments], student_starts),
        frames=frames,
        frame_mask=frame_mask,
        teacher_ids=_grid([[sample.segment.teacher_ids for sample in row] for row in rows], width),
        teacher_position_ids=_positions(teacher, width),
        student_index=_flat([segment.student_index for segment in segments], student_starts),
        teacher_index=_flat([segment.teacher_index for segment in segments], teacher_starts),
        labels=_flat([segment.labels for segment in segments]),
        distance=_flat([segment.distance for segment in segments]),
        segment=torch.from_numpy(np.repeat(np.arange(len(segments)), num_labels)),
        num_positions=sum(map(sum, student)),
        num_teacher_positions=sum(map(sum, teacher)),
        num_pairs=_num_pairs(student),
        num_teacher_pairs=_num_pairs(teacher),
        word_end_student=_flat([segment.word_end_student for segment in segments], student_starts),
        word_end_teacher=_flat([segment.word_end_teacher for segment in segments], teacher_starts),
        num_text_positions=sum(len(segment.token_ids) for segment in segments if not len(segment.span_lengths)),
    )


def _num_pairs(lengths: Sequence[Sequence[int]]) -> int:
    return sum(n * (n + 1) // 2 for row in lengths for n in row)


def _starts(lengths: Sequence[Sequence[int]], width: int) -> list[int]:
    """Flat start of every segment in a grid of this width."""
    return [b * width + sum(row[:i]) for b, row in enumerate(lengths) for i in range(len(row))]


def _flat(parts: Sequence[IntArray], starts: Sequence[int] | None = None) -> Tensor:
    shifted = parts if starts is None else [part + start for part, start in zip(parts, starts, strict=True)]
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *shifted]))


def _grid(rows: Sequence[Sequence[IntArray]], width: int) -> Tensor:
    """Rows of concatenated parts, (B, width), padded with zeros."""
    grid = np.zeros((len(rows), width), dtype=np.int64)
    for values, parts in zip(grid, rows, strict=True):
        joined = np.concatenate(parts)
        values[: len(joined)] = joined
    return torch.from_numpy(grid)


def _positions(lengths: Sequence[Sequence[int]], width: int) -> Tensor:
    """(B, width) positions that restart at each segment, and at the padding."""
    return _grid([[np.arange(n) for n in [*row, width - sum(row)]] for row in lengths], width)


def _pad_spans(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Frames (P, S, C) and mask (P, S), one row per speech span; C is 0 where no sample has speech."""
    lengths = np.concatenate([np.zeros(0, np.int64), *(sample.segment.span_lengths for sample in samples)])
    heard = [sample.frames for sample in samples if len(sample.frames)]
    values = np.concatenate(heard) if heard else np.zeros((0, 0), np.float16)
    mask = np.arange(max(lengths, default=0)) < lengths[:, None]
    frames = np.zeros((*mask.shape, values.shape[1]), dtype=np.float32)
    frames[mask] = values
    return torch.from_numpy(frames), torch.from_numpy(mask)
