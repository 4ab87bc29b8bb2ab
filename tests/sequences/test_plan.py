"""Planning: every utterance once an epoch, other spans in the next, and no shard needed twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from factories import a_table, make_features, make_tokenizer

from salad_ray.config import PackConfig
from salad_ray.sequences.interleave import build_segment, units_of
from salad_ray.sequences.plan import find_chains, is_whole, plan_lane, read_without_features, shards_of_lane
from salad_ray.sequences.plan import usable_clips as usable_clips
from salad_ray.tables import Features, PlanRow, PlanSegment, Reject, Table, from_arrow, schema_of, to_arrow

TOKENIZER = make_tokenizer("bos")
CONFIG = PackConfig(context=256, text_words=(2, 6), speech_words=(1, 4), num_lanes=4)


def make_shards(num_shards: int = 4, num_recordings: int = 12, seed: int = 0) -> dict[str, list[Features]]:
    """Recordings of 1 to 8 utterances of 1 to 20 words; every fifth recording has no word times."""
    rng = np.random.default_rng(seed)
    shards: dict[str, list[Features]] = {}
    for number in range(num_shards * num_recordings):
        rows = shards.setdefault(f"shard-{number % num_shards}", [])
        offset_secs = 0.0
        for i in range(rng.integers(1, 9)):
            text = " ".join(rng.choice(["said", "people", "union,", "12", "dash—another"], rng.integers(1, 21)))
            utterance = make_features(
                text, f"r{number}-{i}", recording_id=f"r{number}", offset_secs=offset_secs, with_words=number % 5 > 0
            )
            rows.append(utterance)
            offset_secs += utterance.duration_secs + rng.choice([0.1, 3.0], p=[0.9, 0.1])
    return {name: [rows[i] for i in rng.permutation(len(rows))] for name, rows in shards.items()}


def plan(
    shards: dict[str, list[Features]], epoch: int = 0, seed: int = 0, config: PackConfig = CONFIG, stride: int = 1
) -> tuple[list[PlanRow], list[Reject]]:
    return plan_lane(
        shards.__getitem__, sorted(shards), TOKENIZER, config, lane=3, epoch=epoch, seed=seed, stride=stride
    )


def test_every_training_utterance_is_in_one_row_or_rejected_with_a_reason() -> None:
    shards = make_shards()
    shards["shard-0"] += [
        make_features("of the test split", "held out", split="test"),
        make_features("word", "single"),
        make_features("people said " * 300, "too long"),
        replace(make_features("a b"), utt_id="wrong words", text="a c"),
    ]
    for epoch in (0, 1):
        rows, rejects = plan(shards, epoch)
        used = [shards[s.shard][i].utt_id for row in rows for s in row.segments for i in s.rows]
        reasons = {reject.key: reject.reason for reject in rejects}
        assert sorted(used + [reject.key for reject in rejects]) == sorted(
            utterance.utt_id for rows in shards.values() for utterance in rows if utterance.split == "train"
        )
        assert "single word" in reasons["single"]
        assert "pack.context=256" in reasons["too long"]
        assert "pieces of the text" in reasons["wrong words"]
        assert len(used) > 10 * len(rejects)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("whole_share", [0.0, 0.5])
def test_rows_hold_the_segments_that_they_promise(stride: int, whole_share: float) -> None:
    shards = make_shards()
    rows, _ = plan(shards, config=CONFIG.model_copy(update={"whole_share": whole_share}), stride=stride)
    assert [row.row for row in rows] == list(range(len(rows)))
    for row in rows:
        segments = [
            build_segment(units_of([shards[s.shard][i] for i in s.rows], TOKENIZER), s.spans, stride)
            for s in row.segments
        ]
        assert row.num_positions == sum(len(segment.token_ids) for segment in segments) <= CONFIG.context
        assert row.num_labels == sum(len(segment.labels) for segment in segments) > 0
        assert sum(len(segment.teacher_ids) for segment in segments) <= CONFIG.context


def is_spoken_whole(segment: PlanSegment) -> bool:
    return [span.is_speech for span in segment.spans] == [True, False]


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_so_many_samples_are_spoken_whole(share: float) -> None:
    """Of long samples, where ordinary spans hardly ever come out as one speech and one text span."""
    shards = make_shards(num_recordings=60)
    config = CONFIG.model_copy(update={"whole_share": share})
    rows, rejects = plan(shards, config=config)
    assert (rows, rejects) == plan(shards, config=config)
    assert len(rejects) <= len(plan(shards)[1])
    long, agree = [], []
    for segment in (segment for row in rows for segment in row.segments):
        passage = [shards[segment.shard][i] for i in segment.rows]
        drawn = is_whole(config, (0, 0), passage[0].utt_id)
        if sum(len(utterance.text.split()) for utterance in passage) > 14 and passage[0].words is not None:
            long.append(is_spoken_whole(segment))
            agree.append(is_spoken_whole(segment) == drawn)
    assert len(long) > 60
    assert np.mean(long) == pytest.approx(share, abs=0.1)
    assert np.mean(agree) > 0.97  # an utterance alone that would be too long is not spoken whole


def test_whole_samples_differ_between_epochs_and_leave_the_others_as_they_were() -> None:
    config = CONFIG.model_copy(update={"whole_share": 0.5})
    names = [f"r{i}" for i in range(400)]
    first, second = ([is_whole(config, (0, epoch), name) for name in names] for epoch in (0, 1))
    assert 0.4 < np.mean(first) < 0.6
    assert 0.4 < np.mean(np.array(first) != np.array(second)) < 0.6
    more = [is_whole(config.model_copy(update={"whole_share": 0.7}), (0, 0), name) for name in names]
    assert all(more[i] for i, whole in enumerate(first) if whole)


def test_no_utterance_is_lost_because_it_would_be_spoken_whole() -> None:
    utterance = make_features("people said " * 35, "long")  # 440 frames; half of them fit
    for epoch in range(4):
        rows, rejects = plan({"s": [utterance]}, epoch, config=CONFIG.model_copy(update={"whole_share": 1.0}))
        assert not rejects
        assert len(rows) == 1


def test_passages_are_consecutive_utterances_of_one_recording() -> None:
    shards = make_shards()
    rows, _ = plan(shards)
    joined = 0
    for segment in (segment for row in rows for segment in row.segments):
        passage = [shards[segment.shard][i] for i in segment.rows]
        joined += len(passage) > 1
        for first, second in pairwise(passage):
            assert first.recording_id == second.recording_id
            assert 0 <= second.offset_secs - first.offset_secs - first.duration_secs <= 2
    assert joined > 10


@pytest.mark.parametrize("offset_secs", [0.0, 0.5, 10.0])
def test_clips_that_overlap_or_lie_apart_are_not_joined(offset_secs: float) -> None:
    """Offset 0 everywhere is how clips look whose place in the recording is not known."""
    utterances = [
        make_features("a b c", str(i), recording_id="book", offset_secs=i * offset_secs) for i in range(4)
    ]  # of 1.6 s each
    clips, _ = usable_clips(utterances, "train")
    assert [len(chain) for chain in find_chains(clips)] == [1, 1, 1, 1]


def test_clips_of_unknown_offset_are_joined_where_their_order_counts_on() -> None:
    """As in windows that were cut for a corpus: all offsets 0, and 2 and 7 are missing."""
    orders = [9, 0, 4, 6, 1, 5, 8, 3, 10]
    utterances = [replace(make_features("a b c", str(i), recording_id="window"), order=i) for i in orders]
    clips, _ = usable_clips(utterances, "train")
    chains = [[clip.utterance.order for clip in chain] for chain in find_chains(clips)]
    assert chains == [[0, 1], [3, 4, 5, 6], [8, 9, 10]]
    rows, rejects = plan({"s": utterances})
    joined = [[utterances[i].order for i in segment.rows] for row in rows for segment in row.segments]
    assert not rejects
    assert sorted(order for passage in joined for order in passage) == sorted(orders)
    assert max(map(len, joined)) > 1
    for passage in joined:
        assert passage == list(range(passage[0], passage[-1] + 1))


def test_plan_is_deterministic_and_every_epoch_and_seed_differs() -> None:
    shards = make_shards()
    assert plan(shards) == plan(shards)
    spans = [
        {tuple(s.rows): s.spans for row in rows for s in row.segments}
        for rows, _ in (plan(shards), plan(shards, epoch=1), plan(shards, seed=1))
    ]
    assert spans[0] != spans[1]
    assert spans[0] != spans[2]
    assert spans[1] != spans[2]


def test_a_row_refers_to_neighbouring_shards_and_each_shard_is_needed_once() -> None:
    shards = make_shards(num_shards=6)
    rows, _ = plan(shards)
    uses = [{segment.shard for segment in row.segments} for row in rows]
    first = {shard: min(i for i, use in enumerate(uses) if shard in use) for shard in shards}
    last = {shard: max(i for i, use in enumerate(uses) if shard in use) for shard in shards}
    assert max(sum(first[shard] <= i <= last[shard] for shard in shards) for i in range(len(rows))) == 2
    assert any(len(use) == 2 for use in uses)


def test_rows_are_full() -> None:
    rows, _ = plan(make_shards(num_shards=4, num_recordings=60))
    assert sum(row.num_positions for row in rows) / (len(rows) * CONFIG.context) >= 0.98


def test_word_less_recordings_are_heard_in_every_part_over_the_epochs() -> None:
    utterances = [
        make_features("people said", str(i), recording_id="r", offset_secs=i * 1.1, with_words=False) for i in range(30)
    ]
    heard = set()
    for epoch in range(20):
        rows, rejects = plan({"s": utterances}, epoch)
        assert not rejects
        for segment in (segment for row in rows for segment in row.segments):
            heard |= {i for i, span in zip(segment.rows, segment.spans, strict=True) if span.is_speech}
    assert heard >= set(range(27))  # near the recording's end the alternation is fixed: 28 is heard, 27 and 29 are read


def test_lanes_share_the_shards() -> None:
    names = [f"shard-{i:05d}" for i in range(16)]
    lanes = [shards_of_lane(names, lane, 8) for lane in range(8)]
    assert sorted(name for lane in lanes for name in lane) == names
    assert {len(lane) for lane in lanes} == {2}


def test_tables_give_back_what_was_written(tmp_path) -> None:
    shards = make_shards(num_shards=1)
    rows, _ = plan(shards)
    assert from_arrow(PlanRow, to_arrow(PlanRow, rows)) == rows
    table = a_table(str(tmp_path), "natural", "features")
    written = [replace(row, order=i, scales=b"1234") for i, row in enumerate(shards["shard-0"])]
    table.write("shard", to_arrow(Features, written))
    assert read_without_features(table, "shard") == [replace(row, features=b"", scales=None) for row in written]


def test_the_heavy_columns_are_not_read(tmp_path) -> None:
    asked: list[str] = []

    class Watched(Table):
        def read(self, shard: str, columns: Sequence[str] | None = None) -> pa.Table:
            asked.extend(columns or ["everything"])
            return super().read(shard, columns)

    table = Watched(str(tmp_path), "natural", "features")
    table.write("shard", to_arrow(Features, [make_features("a b")]))
    read_without_features(table, "shard")
    assert set(schema_of(Features).names) - set(asked) == {"features", "scales"}
