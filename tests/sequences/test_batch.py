"""Batches: tensors that say the same as their segments."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import make_features, make_tokenizer

from salad_ray.sequences.batch import Sample, collate, frames_of, sample_of
from salad_ray.sequences.interleave import interleave
from salad_ray.tables import BadInput

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


def test_wrong_sizes_are_errors() -> None:
    with pytest.raises(ValueError, match="more than the context"):
        collate(make_rows(), 50)
    with pytest.raises(ValueError, match="at least one row"):
        collate([], 50)
    with pytest.raises(BadInput, match="frames of 3"):
        frames_of(replace(make_features("a b"), dim=3))
