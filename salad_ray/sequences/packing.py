"""Packing: put segments into rows so that hardly a position is padding.

Best fit decreasing, window by window. A segment has two lengths, its student and its teacher positions, and a row holds
at most `capacity` of each. Rows of a window that are not full are taken apart, and their segments try again
with the next window; after that they are closed, so the state stays bounded and a row spans at most two windows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

Lengths = tuple[int, int]

FULL = 0.99  # a row with this share of its positions in use is not worth another try


def pack(lengths: Sequence[Lengths], capacity: int, window: int = 2048) -> list[list[int]]:
    """Deal segments to rows.

    Args:
        lengths: (student positions, teacher positions) of each segment.
        capacity: the most of either that a row can hold.
        window: segments that are packed at a time.

    Returns:
        Rows of indices into `lengths`; every index is in exactly one row.

    Raises:
        ValueError: a segment is longer than `capacity`.
    """
    rows: list[list[int]] = []
    carried: list[int] = []
    for start in range(0, len(lengths), window):
        items = carried + list(range(start, min(start + window, len(lengths))))
        closed, again = pack_window([lengths[i] for i in items], capacity, len(carried))
        rows += [[items[i] for i in row] for row in closed]
        carried = [items[i] for i in again]
    last, _ = pack_window([lengths[i] for i in carried], capacity, len(carried))
    return rows + [[carried[i] for i in row] for row in last]


def pack_window(lengths: Sequence[Lengths], capacity: int, num_carried: int) -> tuple[list[list[int]], list[int]]:
    """Pack one window; the first `num_carried` segments come from the window before and are not carried again.

    Returns:
        The rows that are closed, and the segments to carry into the next window.
    """
    closed, carried = [], []
    for row in best_fit_decreasing(lengths, capacity, num_carried):
        if row[0] < num_carried or sum(lengths[i][0] for i in row) >= FULL * capacity:
            closed.append(row)
        else:
            carried += row
    return closed, sorted(carried)


def best_fit_decreasing(lengths: Sequence[Lengths], capacity: int, num_first: int = 0) -> list[list[int]]:
    """Longest segment first, each into the row where it leaves the least room; rows are sorted within.

    The first `num_first` segments go before all others, so that none of them ends in the last, emptiest row.
    O(n log n) while the student's lengths decide; rows whose teacher side is full are stepped over one by one.
    """
    order = sorted(range(len(lengths)), key=lambda i: (i >= num_first, -max(lengths[i]), -min(lengths[i]), i))
    if any(max(pair) > capacity for pair in lengths):
        raise ValueError(f"a segment of {max(map(max, lengths))} positions is longer than a row of {capacity}")
    rows: list[list[int]] = []
    room: list[tuple[int, int, int]] = []  # (student room, teacher room, row), ascending
    for i in order:
        student, teacher = lengths[i]
        at = bisect_left(room, (student, teacher, -1))
        while at < len(room) and room[at][1] < teacher:
            at += 1
        student_room, teacher_room, row = room.pop(at) if at < len(room) else (capacity, capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        insort(room, (student_room - student, teacher_room - teacher, row))
    return [sorted(row) for row in rows]


def padded_batches(lengths: Sequence[int], limit: float, min_fill: float = 0.0) -> Iterator[list[int]]:
    """Indices of what is computed at once and padded to its longest: longest first, and one at least.

    Args:
        limit: of size × longest.
        min_fill: share of the longest that the others have at least; 1 for items of one length.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batch[0]] if batch else 0
        if batch and ((len(batch) + 1) * longest > limit or lengths[index] < min_fill * longest):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
