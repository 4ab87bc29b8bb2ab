"""Loading: the batches of one rank, in an order that does not depend on how many ranks there are.

Lane l belongs to rank l % world_size, and step s takes rows s·b … (s + 1)·b − 1 of every lane, where a lane is the
endless stream of its epochs' plans. So every world size up to the number of lanes trains on the same rows at the same
step, and a run resumes at any step without reading what lies before it.

A lane may be several such streams: natural speech, active speech, text alone. Each gives a fixed share of the lane's
rows, evenly spread and staggered over the lanes, so that every step holds about that share (`Mix`).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from salad_ray.config import ConfigError, PackConfig
from salad_ray.names import NATURAL, TEXT
from salad_ray.sequences.batch import Batch, Sample, collate, sample_of
from salad_ray.sequences.interleave import (
    assemble_units,
    build_segment,
    passage_text,
    prefix_ids,
    timing_of,
    tokenize,
)
from salad_ray.sequences.plan import plan_shard_name
from salad_ray.sequences.text_rows import text_samples
from salad_ray.tables import BadInput, Features, PlanRow, PlanSegment, Table, TableError, from_arrow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAN_ROWS = 64  # planned rows that are Python objects at a time
GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, are spread evenly however many they are


@dataclass
class LaneStream:
    """The rows of one lane from any position on, across epochs, holding at most two shards of what they refer to.

    Args:
        plan: of speech, or of text alone (set=text), whose single epoch is read again and again.
        source: what the plan refers to: features, or passages.
    """

    plan: Table
    source: Table
    tokenizer: PreTrainedTokenizerBase
    lane: int
    stride: int = 1
    shards: dict[str, pa.Table] = field(default_factory=dict)

    def rows(self, position: int) -> Iterator[list[Sample]]:
        """The samples of row `position` and all that follow; raises `TableError` when the epochs are used up."""
        if self.plan.set == TEXT:
            yield from self._repeated(plan_shard_name(self.lane, 0), position)
        planned = set(self.plan.shards())
        for epoch in count():
            name = plan_shard_name(self.lane, epoch)
            if name not in planned:
                raise TableError(
                    f"{self.plan.url} plans {epoch} epochs of lane {self.lane}, and training has used them up; "
                    "let the stage 'pack' plan more epochs, or train for fewer steps"
                )
            num_rows = self.plan.metadata(name).num_rows
            if position < num_rows:
                yield from self._epoch(name, position)
            position = max(0, position - num_rows)

    def _repeated(self, name: str, position: int) -> Iterator[list[Sample]]:
        """Rows of the one epoch of text, without end."""
        num_rows = self.plan.metadata(name).num_rows
        if not num_rows:
            raise TableError(f"{self.plan.url}/{name} has no rows; run `salad pack CONFIG set={TEXT} --redo`")
        position %= num_rows
        while True:
            yield from self._epoch(name, position)
            position = 0

    def _epoch(self, name: str, position: int) -> Iterator[list[Sample]]:
        """Rows from `position` on; a shard is dropped after the last row that refers to it, before another is read."""
        plan = self.plan.read(name)
        last_use = _last_uses(plan)
        self.shards = {}
        for start in range(position, plan.num_rows, PLAN_ROWS):
            rows: list[PlanRow] = from_arrow(PlanRow, plan.slice(start, PLAN_ROWS))
            for row in rows:
                self.shards = {shard: table for shard, table in self.shards.items() if last_use[shard] >= row.row}
                referred = [self._referred(segment) for segment in row.segments]
                try:
                    yield self._samples(row.segments, referred)
                except BadInput as error:
                    where = f"row {row.row} of {self.plan.url}/{name}"
                    raise TableError(f"{where}: {error}; run `salad pack CONFIG --redo`") from None

    def _referred(self, segment: PlanSegment) -> pa.Table:
        """What a segment refers to: rows of features, or a passage."""
        return self._shard(segment.shard, max(segment.rows)).take(segment.rows)

    def _samples(self, segments: Sequence[PlanSegment], referred: Sequence[pa.Table]) -> list[Sample]:
        if self.plan.set == TEXT:
            return text_samples(segments, [table["text"][0].as_py() for table in referred], self.tokenizer)
        return samples_of(segments, [from_arrow(Features, table) for table in referred], self.tokenizer, self.stride)

    def _shard(self, shard: str, row: int) -> pa.Table:
        """A shard of the source that has this row at least."""
        if shard not in self.shards:
            columns = ["text"] if self.plan.set == TEXT else None
            self.shards[shard] = self.source.read(shard, columns).combine_chunks()  # rows of chunks are slow to take
        table = self.shards[shard]
        if row >= table.num_rows:
            raise TableError(
                f"{self.source.url}/{shard} has {table.num_rows} rows, and {self.plan.url} refers to row {row}; it "
                "was made anew from something else, so run `salad pack CONFIG --redo`"
            )
        return table


def _last_uses(plan: pa.Table) -> dict[str, int]:
    """The last row that refers to each shard."""
    segments = plan["segments"].combine_chunks()
    rows = plan["row"].combine_chunks().take(pc.list_parent_indices(segments))
    uses = pa.table({"shard": segments.flatten().field("shard"), "row": rows})
    last = uses.group_by("shard").aggregate([("row", "max")])
    return dict(zip(last["shard"].to_pylist(), last["row_max"].to_pylist(), strict=True))


def samples_of(
    segments: Sequence[PlanSegment],
    passages: Sequence[Sequence[Features]],
    tokenizer: PreTrainedTokenizerBase,
    stride: int = 1,
) -> list[Sample]:
    """The samples of one planned row, from the utterances of each segment; `stride` frames stand side by side.

    Raises:
        BadInput: the plan was made with another tokenizer or for other words, or feature bytes are damaged.
    """
    tokens = tokenize([passage_text(passage) for passage in passages], tokenizer)
    prefix = prefix_ids(tokenizer)
    samples = []
    for segment, passage, passage_tokens in zip(segments, passages, tokens, strict=True):
        units = assemble_units(passage, [timing_of(utterance) for utterance in passage], passage_tokens, prefix)
        if segment.spans[-1].end != units.num_units:
            raise BadInput(f"{passage[0].utt_id} was planned with another tokenizer, or for other words")
        samples.append(sample_of(build_segment(units, segment.spans, stride), passage))
    return samples


@dataclass(frozen=True)
class Mix:
    """Which rows of a lane are of which set; a rule without state, so that reading begins anywhere.

    Set by set a share of the rows that the sets before have left is taken, and natural speech has the rest. Over any n
    rows of a lane a set is at most one row for each set before it, and one for itself, away from its share of n.

    Args:
        shares: of the lane's rows, of every set but natural speech; above 0, and together below 1.
        num_lanes: over which the rows are staggered.
    """

    shares: Mapping[str, float]
    num_lanes: int

    def rows_before(self, row: int, lane: int) -> dict[str, int]:
        """Rows of each set among the first `row` rows of a lane."""
        left, share_left, found = row, 1.0, {}
        for level, (name, share) in enumerate(self.shares.items()):
            phase = (lane / self.num_lanes + level * GOLDEN * lane) % 1.0  # another one for each set
            found[name] = math.floor(left * min(share / share_left, 1.0) + phase)
            left, share_left = left - found[name], share_left - share
        return found | {NATURAL: left}

    def most_rows(self, name: str, rows: int) -> int:
        """Rows of a set among the first `rows` of the lane that has most of them."""
        return max(self.rows_before(rows, lane)[name] for lane in range(self.num_lanes))

    def sets(self, row: int, lane: int) -> Iterator[str]:
        """The set of each row of a lane from `row` on."""
        before = self.rows_before(row, lane)
        for number in count(row + 1):
            after = self.rows_before(number, lane)
            yield next(name for name in after if after[name] > before[name])
            before = after


@dataclass
class LaneReader:
    """One rank's batches, step by step; iterating yields the micro-batches of one step as a list.

    The rows of a step come in order of (row, lane), `micro_batch_rows` at a time; the last micro-batch has what is
    left. Where the world size does not divide the lanes some ranks have more rows than others. A background thread is
    `prefetch_steps` steps ahead; its errors are raised where the step they belong to would have come. Leaving the loop
    (or closing the iterator) ends the thread. `wait_secs` adds up the time spent waiting for it.

    Args:
        plan, features: tables of the same set; the plan's shards are named by `plan_shard_name`.
        tokenizer: the one that the plan was made with.
        config: context, num_lanes and rows_per_lane, as in the plan.
        start_step: first step to give; the feature shards of earlier steps are not read.
        first_row: row of every lane at which step 0 begins, where an earlier training took those before it.
        others: set → plan and what it refers to, of each set that the mix names.
        mix: the shares of the rows; unset: natural speech alone.
        earlier: the mix of the rows before `first_row`, where it was another one.
        stride: frames side by side at a speech position, as in the plan.

    Raises:
        ConfigError: there are more ranks than lanes.
        TableError: while iterating, when the planned epochs are used up or a shard is missing or damaged.
    """

    plan: Table
    features: Table
    tokenizer: PreTrainedTokenizerBase
    config: PackConfig
    rank: int = 0
    world_size: int = 1
    start_step: int = 0
    micro_batch_rows: int = 1
    prefetch_steps: int = 2
    first_row: int = 0
    others: Mapping[str, tuple[Table, Table]] = field(default_factory=dict)
    mix: Mix | None = None
    earlier: Mix | None = None
    stride: int = 1
    wait_secs: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.world_size > self.config.num_lanes:
            raise ConfigError(
                f"{self.world_size} workers cannot share pack.num_lanes={self.config.num_lanes}; lower "
                "distill.num_workers, or raise pack.num_lanes and rerun `salad pack CONFIG --redo`"
            )

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a step on the rank that has the most; the same number on every rank."""
        num_lanes = -(-self.config.num_lanes // self.world_size)
        return -(-num_lanes * self.config.rows_per_lane // self.micro_batch_rows)

    def __iter__(self) -> Generator[list[Batch]]:
        steps = self._steps()
        with ThreadPoolExecutor(1, thread_name_prefix="lane-reader") as thread:
            ahead = deque(thread.submit(next, steps) for _ in range(max(1, self.prefetch_steps)))
            try:
                while True:
                    started = time.perf_counter()
                    step = ahead.popleft().result()
                    self.wait_secs += time.perf_counter() - started
                    ahead.append(thread.submit(next, steps))
                    yield step
            finally:
                thread.shutdown(wait=False, cancel_futures=True)

    def _steps(self) -> Iterator[list[Batch]]:
        size = self.micro_batch_rows
        for rows in self.samples():
            yield [collate(rows[i : i + size], self.config.context) for i in range(0, len(rows), size)]

    def samples(self) -> Iterator[list[list[Sample]]]:
        """The rows of each step, before they are collated and without a thread."""
        lanes = range(self.rank, self.config.num_lanes, self.world_size)
        streams = [self._lane(lane, self.start_step * self.config.rows_per_lane) for lane in lanes]
        while True:
            yield [next(stream) for _ in range(self.config.rows_per_lane) for stream in streams]

    def _lane(self, lane: int, row: int) -> Iterator[list[Sample]]:
        """A lane from its row number `row` on."""
        mix = self.mix or Mix({}, self.config.num_lanes)
        taken = dict.fromkeys((NATURAL, *mix.shares), 0)
        if self.earlier is None:
            row += self.first_row
        else:
            taken |= self.earlier.rows_before(self.first_row, lane)
        given = mix.rows_before(row, lane)
        tables = {NATURAL: (self.plan, self.features), **self.others}
        streams = {
            name: LaneStream(*tables[name], self.tokenizer, lane, self.stride).rows(taken[name] + number)
            for name, number in given.items()
        }
        for name in mix.sets(row, lane):
            yield next(streams[name])
