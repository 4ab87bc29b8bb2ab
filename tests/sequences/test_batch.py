"""Batches: tensors that say the same as their segments."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import make_features, make_tokenizer

from salad_ray.sequences.batch import Sample, collate, frames_of, sample_of, store_frames
from salad_ray.sequences.interleave import interleave
from salad_ray.tables import BadInput, Features

CONTEXT = 200


def make_rows(kind: str = "bos") -> list[list[Sample]]:
    tokenizer, rng = make_tokenizer(kind), np.random.default_rng(0)
    rows = []
    for row in range(3):
        samples = []
        for number in range(row + 1):
            passage = [
                make_features("the people said dash—another time in union", f"{row}{number}{i}") for i in range(2)
            ]
            samples.append(sample_of(interleave(passage, tokenizer, (1, 4), (1, 3), rng), passage))
        rows.append(samples)
    return rows


@pytest.mark.parametrize("kind", ["bos", "byte_level"])
def test_scattered_speech_stands_where_the_segment_has_it(kind: str) -> None:
    rows = make_rows(kind)
    batch = collate(rows, CONTEXT)
    grid = torch.zeros(len(rows) * CONTEXT, 2)
    grid[batch.speech_index] = batch.frames[batch.frame_mask]
    for row, values, ids in zip(rows, grid.view(len(rows), CONTEXT, 2), batch.token_ids, strict=True):
        position = 0
        for sample in row:
            tokens = torch.from_numpy(sample.segment.token_ids)
            here = slice(position, position + len(tokens))
            assert torch.equal(ids[here], tokens.clamp(min=0))
            assert torch.equal(values[here][tokens < 0], torch.from_numpy(sample.frames.astype(np.float32)))
            assert (values[here][tokens >= 0] == 0).all()
            position += len(tokens)
        assert (ids[position:] == 0).all()
        assert (values[position:] == 0).all()


def test_each_speech_span_is_one_row_of_frames() -> None:
    rows = make_rows()
    batch = collate(rows, CONTEXT)
    lengths = np.concatenate([sample.segment.span_lengths for row in rows for sample in row])
    assert batch.frame_mask.sum(dim=1).tolist() == lengths.tolist()
    assert batch.frames.shape == (len(lengths), lengths.max(), 2)
    assert batch.frames.dtype == torch.float32
    assert (batch.frames[~batch.frame_mask] == 0).all()
    assert (batch.speech_index.diff() > 0).all()


def test_pairs_point_at_the_same_text_in_both_grids() -> None:
    rows = make_rows()
    batch = collate(rows, CONTEXT)
    teacher, student = batch.teacher_ids.flatten(), batch.token_ids.flatten()
    assert torch.equal(teacher[batch.teacher_index + 1], batch.labels)
    assert torch.equal(student[batch.student_index + 1], batch.labels)
    is_text = batch.distance != 0
    assert torch.equal(student[batch.student_index][is_text], teacher[batch.teacher_index][is_text])
    assert set(batch.student_index[~is_text].tolist()) <= set(batch.speech_index.tolist())


def test_no_label_crosses_a_segment_and_positions_restart() -> None:
    rows = make_rows()
    batch = collate(rows, CONTEXT)
    for positions, row in zip(batch.position_ids.tolist(), rows, strict=True):
        lengths = [len(sample.segment.token_ids) for sample in row]
        expected = [i for n in [*lengths, CONTEXT - sum(lengths)] for i in range(n)]
        assert positions == expected
    assert (batch.position_ids.flatten()[batch.student_index + 1] > 0).all()
    assert (batch.teacher_position_ids.flatten()[batch.teacher_index + 1] > 0).all()
    num_labels = [len(sample.segment.labels) for row in rows for sample in row]
    assert torch.bincount(batch.segment).tolist() == num_labels
    assert batch.num_positions == sum(len(sample.segment.token_ids) for row in rows for sample in row)
    lengths = [len(sample.segment.token_ids) for row in rows for sample in row]
    assert batch.num_pairs == sum(position + 1 for length in lengths for position in range(length))


def test_to_changes_the_frames_type_only() -> None:
    batch = collate(make_rows(), CONTEXT)
    moved = batch.to("cpu", torch.bfloat16)
    assert moved.frames.dtype == torch.bfloat16
    assert moved.num_positions == batch.num_positions
    assert torch.equal(moved.token_ids, batch.token_ids)
    assert batch.to("cpu").frames.dtype == torch.float32


def test_too_long_rows_and_none_are_errors() -> None:
    with pytest.raises(ValueError, match="more than the context"):
        collate(make_rows(), 50)
    with pytest.raises(ValueError, match="at least one row"):
        collate([], 50)


def stored(frames: np.ndarray, storage: str) -> Features:
    features, scales = store_frames(frames, storage)
    num_frames, dim = frames.shape
    return replace(make_features("a"), num_frames=num_frames, dim=dim, features=features, scales=scales)


def channels(num_frames: int = 50) -> np.ndarray:
    """float32 channels of every size that float16 knows, and beyond its small end; one is zero, one constant."""
    rng = np.random.default_rng(0)
    sizes = 10.0 ** np.arange(-9, 5)
    values = rng.uniform(-6.5, 6.5, (num_frames, len(sizes))) * sizes
    extremes = np.where(rng.random((num_frames, 2)) < 0.5, [65504, 65472], [-65504, -65472])
    constant = np.full((num_frames, 1), 3.7)
    return np.concatenate([values, extremes, np.zeros((num_frames, 1)), constant], axis=1).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_float16_is_stored_as_it_is(dtype: type) -> None:
    frames = channels().astype(dtype)
    utterance = stored(frames, "float16")
    assert utterance.scales is None
    np.testing.assert_array_equal(frames_of(utterance), frames.astype(np.float16))


@pytest.mark.parametrize("num_frames", [1, 50])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_int8_is_off_by_half_a_step(num_frames: int, dtype: type) -> None:
    frames = channels(num_frames).astype(dtype)
    utterance = stored(frames, "int8")
    assert (len(utterance.features), len(utterance.scales or b"")) == (frames.size, 2 * frames.shape[1])
    loaded = frames_of(utterance)
    assert loaded.dtype == np.float16
    assert np.isfinite(loaded).all()
    exact = frames.astype(np.float64)
    scales = np.frombuffer(utterance.scales or b"", np.float16).astype(np.float64)
    rounding = np.maximum(np.abs(exact) * 2.0**-11, 2.0**-25)
    assert (np.abs(loaded - exact) <= scales / 2 + 1.1 * rounding).all()
    largest = np.abs(exact).max(axis=0)
    assert (scales <= largest / 127 * (1 + 2.0**-10) + 2.0**-24).all()  # and the steps are no larger than they must be
    assert (loaded[:, largest == 0] == 0).all()


def test_int8_uses_the_whole_range_of_each_channel() -> None:
    rng = np.random.default_rng(0)
    frames = (rng.standard_normal((200, 16)) * np.geomspace(0.01, 100, 16)).astype(np.float32)
    levels = np.frombuffer(stored(frames, "int8").features, np.int8).reshape(frames.shape)
    assert (np.abs(levels).max(axis=0) == 127).all()
    error = frames_of(stored(frames, "int8")).astype(np.float64) - frames
    assert (error.std(axis=0) < 0.01 * frames.std(axis=0)).all()


def test_samples_of_both_storages_are_alike() -> None:
    passage = [make_features("the people said dash—another time in union", name) for name in "ab"]
    small = [replace(row, **_int8(row)) for row in passage]
    segment = interleave(passage, make_tokenizer("bos"), (1, 4), (1, 3), np.random.default_rng(0))
    one, other = sample_of(segment, passage).frames, sample_of(segment, small).frames
    assert one.shape == other.shape
    np.testing.assert_allclose(other, one, atol=5)  # of values up to 1,024
    assert np.abs(other.astype(np.float32) - one).max() > 0


def _int8(row: Features) -> dict[str, bytes | None]:
    features, scales = store_frames(frames_of(row), "int8")
    return {"features": features, "scales": scales}


@pytest.mark.parametrize("storage", ["float16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 65520.0, -1e6, None])
def test_what_cannot_be_stored_is_refused(storage: str, value: float | None) -> None:
    frames = np.zeros((0 if value is None else 3, 2), np.float32)
    frames[1:2] = value
    with pytest.raises(BadInput, match="no frames, or values that are not finite"):
        store_frames(frames, storage)


def test_wrong_sizes_are_bad_input() -> None:
    halves, small = (stored(np.ones((4, 3), np.float32), storage) for storage in ("float16", "int8"))
    for row in (halves, small):
        with pytest.raises(BadInput, match="frames of 2"):
            frames_of(replace(row, dim=2))
        with pytest.raises(BadInput, match="not 5 frames"):
            frames_of(replace(row, num_frames=5))
        with pytest.raises(BadInput, match="frames of 3"):
            frames_of(replace(row, features=row.features[:-1]))
    with pytest.raises(BadInput, match="12 bytes are not 4 frames of 3 float16"):
        frames_of(replace(small, scales=None))
    with pytest.raises(BadInput, match="24 bytes are not 4 frames of 3 int8"):
        frames_of(replace(halves, scales=b"\0" * 6))
    with pytest.raises(BadInput, match="scales of 3 channels"):
        frames_of(replace(small, scales=b"\0" * 5))
