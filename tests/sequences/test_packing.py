"""Packing: nothing lost, nothing doubled, hardly any padding."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salad_ray.sequences.packing import pack, pack_window, padded_batches

CAPACITY = 100
lengths_lists = st.lists(st.tuples(st.integers(1, CAPACITY), st.integers(0, CAPACITY)), max_size=200)


@settings(max_examples=200, deadline=None)
@given(lengths_lists, st.integers(1, 50))
def test_every_segment_is_in_one_row_that_holds_it(lengths: list[tuple[int, int]], window: int) -> None:
    rows = pack(lengths, CAPACITY, window)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i][side] for i in row) <= CAPACITY for row in rows for side in (0, 1))
    assert rows == pack(lengths, CAPACITY, window)
    assert all(max(row) // window - min(row) // window <= 1 for row in rows)  # at most two neighbouring windows


@settings(max_examples=100, deadline=None)
@given(lengths_lists, st.integers(0, 200))
def test_a_window_closes_or_carries_each_segment_once(lengths: list[tuple[int, int]], num_carried: int) -> None:
    closed, carried = pack_window(lengths, CAPACITY, num_carried)
    assert sorted([i for row in closed for i in row] + carried) == list(range(len(lengths)))
    assert all(i >= num_carried for i in carried)


@pytest.mark.parametrize("mean_utterances", [1, 4, 12])
def test_rows_are_full_at_the_lengths_of_read_books(mean_utterances: int) -> None:
    """Utterances of 2–30 s, 12 s on average: about 6.7 positions a second, alone or joined."""
    rng = np.random.default_rng(mean_utterances)
    num_joined = rng.integers(1, 2 * mean_utterances, 5000, endpoint=mean_utterances == 1)
    seconds = [np.clip(rng.gamma(4, 3, n), 2, 30).sum() for n in num_joined]
    lengths = [(min(2048, int(6.7 * s)), int(3.7 * s)) for s in seconds]
    rows = pack(lengths, 2048)
    assert sum(length for length, _ in lengths) / (2048 * len(rows)) >= 0.99


def test_too_long_a_segment_is_an_error() -> None:
    with pytest.raises(ValueError, match="101 positions"):
        pack([(10, 10), (50, 101)], CAPACITY)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=20), st.integers(1, 60), st.sampled_from((0.0, 0.75, 1.0)))
def test_batches_with_their_padding_stay_within_the_limit(lengths: list[int], limit: int, min_fill: float) -> None:
    batches = list(padded_batches(lengths, limit, min_fill))
    order = [index for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths, reverse=True)
    for batch in batches:
        longest = lengths[batch[0]]
        assert len(batch) == 1 or len(batch) * longest <= limit
        assert lengths[batch[-1]] >= min_fill * longest
    for batch, following in pairwise(batches):  # none ends before it must
        longest = lengths[batch[0]]
        assert (len(batch) + 1) * longest > limit or lengths[following[0]] < min_fill * longest
