"""Loading: the same rows at every world size and after every resume, each shard read once."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from factories import a_table, make_features, make_tokenizer

from salad_ray.config import ConfigError, PackConfig
from salad_ray.sequences.batch import Batch, Sample
from salad_ray.sequences.loader import LaneReader, LaneStream, Mix
from salad_ray.sequences.plan import plan_lane, plan_shard_name, read_without_features, shards_of_lane
from salad_ray.tables import Features, PlanRow, Table, TableError, to_arrow, write_json

TOKENIZER = make_tokenizer("byte_level")
CONFIG = PackConfig(context=128, text_words=(2, 6), speech_words=(1, 4), num_lanes=4, rows_per_lane=2)
NUM_EPOCHS = 3


@dataclass(frozen=True)
class CountingTable(Table):
    """A table that remembers which shards were read with all their columns."""

    reads: list[str] = field(default_factory=list, compare=False)

    def read(self, shard: str, columns: Any = None) -> pa.Table:
        if columns is None:
            self.reads.append(shard)
        return super().read(shard, columns)


def counting(run_dir: str) -> CountingTable:
    return CountingTable(f"{run_dir}/natural/features", "natural", "features")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("run"))
    rng = np.random.default_rng(0)
    features, plan = a_table(folder, "natural", "features"), a_table(folder, "natural", "plan")
    for shard in range(12):
        texts = [" ".join(rng.choice(["people", "said", "union,"], rng.integers(2, 20))) for _ in range(20)]
        rows = [make_features(text, f"{shard}-{i}") for i, text in enumerate(texts)]
        features.write(f"shard-{shard:02d}", to_arrow(Features, rows))
    for lane in range(CONFIG.num_lanes):
        shards = shards_of_lane(features.shards(), lane, CONFIG.num_lanes)
        for epoch in range(NUM_EPOCHS):
            rows, _ = plan_lane(
                lambda shard: read_without_features(features, shard),
                shards, TOKENIZER, CONFIG, lane=lane, epoch=epoch, seed=0,
            )  # fmt: skip
            plan.write(plan_shard_name(lane, epoch), to_arrow(PlanRow, rows))
    return folder


def make_reader(run_dir: str, **options: Any) -> LaneReader:
    plan, features = (
        a_table(run_dir, "natural", "plan"),
        counting(run_dir),
    )
    return LaneReader(plan, features, TOKENIZER, CONFIG, **options)


def test_rows_are_stacked_as_they_were_planned(run_dir: str) -> None:
    """Plans of stride 2: rows are as long as they promise, and every speech position holds two frames."""
    features, plan = a_table(run_dir, "natural", "features"), a_table(f"{run_dir}/stacked", "natural", "plan")
    for lane in range(CONFIG.num_lanes):
        shards = shards_of_lane(features.shards(), lane, CONFIG.num_lanes)
        rows, _ = plan_lane(
            lambda shard: read_without_features(features, shard),
            shards, TOKENIZER, CONFIG, lane=lane, epoch=0, seed=0, stride=2,
        )  # fmt: skip
        plan.write(plan_shard_name(lane, 0), to_arrow(PlanRow, rows))
        for row, samples in zip(rows, LaneStream(plan, features, TOKENIZER, lane, 2).rows(0), strict=False):
            assert sum(len(sample.segment.token_ids) for sample in samples) == row.num_positions
    [step] = islice(LaneReader(plan, features, TOKENIZER, CONFIG, stride=2), 1)
    for batch in step:
        assert batch.frames.shape[2] == 2 * 2
        frames = batch.frames[batch.frame_mask]
        assert len(frames) == len(batch.speech_index)
        ahead = frames[:, 2] - frames[:, 0]  # numbers of the two frames; a last one is repeated
        assert set(ahead.tolist()) == {0.0, 1.0}
        assert len(batch.word_end_student) > 0


def min_epoch_rows(run_dir: str) -> int:
    plan = a_table(run_dir, "natural", "plan")
    return min(plan.read(name).num_rows for name in plan.shards())


def row_key(row: list[Sample]) -> bytes:
    return b"".join(s.segment.token_ids.tobytes() + s.frames.tobytes() for s in row)


def steps(reader: LaneReader, num: int) -> list[list[bytes]]:
    return [[row_key(row) for row in rows] for rows in islice(reader.samples(), num)]


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.token_ids, b.token_ids) and torch.equal(a.frames, b.frames) and torch.equal(a.labels, b.labels)


def test_every_world_size_sees_the_same_rows(run_dir: str) -> None:
    num_steps = min_epoch_rows(run_dir) // CONFIG.rows_per_lane + 3  # into the second epoch
    alone = steps(make_reader(run_dir), num_steps)
    for world_size in (2, 3, 4):
        ranks = [steps(make_reader(run_dir, rank=r, world_size=world_size), num_steps) for r in range(world_size)]
        for number, step in enumerate(alone):
            assert sorted(step) == sorted(row for rank in ranks for row in rank[number])
            lanes_first = [step[i : i + CONFIG.num_lanes] for i in range(0, len(step), CONFIG.num_lanes)]
            for rank in range(world_size):  # (row, lane) order within a rank
                assert ranks[rank][number] == [row for group in lanes_first for row in group[rank::world_size]]
    assert len({row for step in alone for row in step}) == sum(map(len, alone))


def test_resuming_equals_never_stopping(run_dir: str) -> None:
    num_rows = min_epoch_rows(run_dir)
    uninterrupted = steps(make_reader(run_dir), num_rows)
    for start in (1, num_rows // 4, num_rows // 2 + 1, num_rows - 2):
        resumed = steps(make_reader(run_dir, start_step=start), num_rows - start)
        assert resumed == uninterrupted[start:]


def test_each_shard_is_read_once_an_epoch_and_two_are_held(run_dir: str) -> None:
    plan, features = (
        a_table(run_dir, "natural", "plan"),
        counting(run_dir),
    )
    stream = LaneStream(plan, features, TOKENIZER, lane=1)
    num_rows = plan.read(plan_shard_name(1, 0)).num_rows
    held = [len(stream.shards) for _ in islice(stream.rows(0), num_rows)]
    assert Counter(features.reads) == dict.fromkeys(shards_of_lane(features.shards(), 1, CONFIG.num_lanes), 1)
    assert max(held) == 2


def test_a_jump_does_not_read_what_it_skips(run_dir: str) -> None:
    plan, features = (
        a_table(run_dir, "natural", "plan"),
        counting(run_dir),
    )
    num_rows = sum(plan.read(plan_shard_name(0, epoch)).num_rows for epoch in (0, 1))
    rows = LaneStream(plan, features, TOKENIZER, lane=0).rows(num_rows - 1)
    next(rows)
    assert 1 <= len(features.reads) <= 2


def test_an_epoch_gives_every_utterance_once(run_dir: str) -> None:
    plan, features = a_table(run_dir, "natural", "plan"), a_table(run_dir, "natural", "features")
    for lane in range(CONFIG.num_lanes):
        num_rows = plan.read(plan_shard_name(lane, 0)).num_rows
        rows = islice(LaneStream(plan, features, TOKENIZER, lane).rows(0), num_rows)
        given = sorted(sample.segment.teacher_ids.tolist() for row in rows for sample in row)
        shards = shards_of_lane(features.shards(), lane, CONFIG.num_lanes)
        texts = [text for shard in shards for text in features.read(shard)["text"].to_pylist()]
        assert given == sorted(TOKENIZER(text)["input_ids"] for text in texts)


def test_batches_are_the_samples_in_micro_batches(run_dir: str) -> None:
    reader = make_reader(run_dir, rank=1, world_size=2, micro_batch_rows=2)
    batches = list(islice(iter(reader), 3))
    assert [len(step) for step in batches] == [2, 2, 2]
    assert {tuple(batch.token_ids.shape) for step in batches for batch in step} == {(2, CONFIG.context)}
    again = list(islice(iter(make_reader(run_dir, rank=1, world_size=2, micro_batch_rows=2, prefetch_steps=5)), 3))
    assert all(same(a, b) for x, y in zip(batches, again, strict=True) for a, b in zip(x, y, strict=True))
    assert reader.wait_secs > 0


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lane-reader")]


def test_leaving_the_loop_ends_the_thread(run_dir: str) -> None:
    reader: Iterator[list[Batch]] = iter(make_reader(run_dir))
    next(reader)
    assert loader_threads()
    reader.close()  # type: ignore[attr-defined]
    assert not loader_threads()


def test_the_plans_end_is_a_clear_error_after_all_its_steps(run_dir: str) -> None:
    plan = a_table(run_dir, "natural", "plan")
    totals = [
        sum(plan.read(plan_shard_name(lane, epoch), ["row"]).num_rows for epoch in range(NUM_EPOCHS))
        for lane in range(CONFIG.num_lanes)
    ]
    last_step = min(totals) // CONFIG.rows_per_lane
    reader = iter(make_reader(run_dir, start_step=last_step - 2))
    assert len([next(reader), next(reader)]) == 2
    with pytest.raises(TableError, match="plans 3 epochs of lane"):
        next(reader)
    assert not loader_threads()


def test_a_missing_feature_shard_reaches_the_caller(run_dir: str, tmp_path: Path) -> None:
    plan = a_table(run_dir, "natural", "plan")
    reader = LaneReader(plan, a_table(str(tmp_path), "natural", "features"), TOKENIZER, CONFIG)
    with pytest.raises(TableError, match="is missing"):
        next(iter(reader))


def test_a_shard_that_went_after_planning_is_named_with_the_remedy(run_dir: str, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path, dirs_exist_ok=True)
    write_json(f"{tmp_path}/natural/features/manifest.json", {"stage": "encode"})
    reader = iter(make_reader(str(tmp_path)))
    next(reader)
    for path in Path(tmp_path, "natural", "features").glob("*.parquet"):
        path.unlink()
    with pytest.raises(TableError, match=r"shard-\d\d.parquet is missing; rerun `salad encode CONFIG set=natural`"):
        list(islice(reader, min_epoch_rows(run_dir)))
    assert not loader_threads()


def test_a_shard_with_fewer_rows_than_planned_is_named(run_dir: str, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path, dirs_exist_ok=True)
    features = a_table(str(tmp_path), "natural", "features")
    for shard in features.shards():
        features.write(shard, features.read(shard).slice(0, 1))
    with pytest.raises(
        TableError, match=r"features/shard-\d\d has 1 rows, and .* refers to row \d+; .*salad pack CONFIG --redo"
    ):
        next(iter(make_reader(str(tmp_path))))


def test_another_tokenizer_is_noticed(run_dir: str) -> None:
    plan, features = a_table(run_dir, "natural", "plan"), a_table(run_dir, "natural", "features")
    fusing = make_tokenizer("byte_level")
    fusing.add_tokens(["people said", "said people", "said said", "people people"])
    with pytest.raises(TableError, match="another tokenizer"):
        list(islice(LaneReader(plan, features, fusing, CONFIG).samples(), 3))


@pytest.mark.parametrize(("world_size", "micro_batch_rows"), [(1, 1), (1, 3), (2, 2), (3, 1), (3, 3), (4, 1)])
def test_every_rank_knows_how_many_micro_batches_a_step_has_at_most(
    run_dir: str, world_size: int, micro_batch_rows: int
) -> None:
    options = {"world_size": world_size, "micro_batch_rows": micro_batch_rows}
    readers = [make_reader(run_dir, rank=rank, **options) for rank in range(world_size)]
    first = [next(iter(reader)) for reader in readers]
    assert {reader.num_micro_batches for reader in readers} == {max(map(len, first))}
    sizes = [[len(batch.token_ids) for batch in step] for step in first]
    assert sum(map(sum, sizes)) == CONFIG.num_lanes * CONFIG.rows_per_lane
    for step in sizes:
        assert set(step[:-1]) <= {micro_batch_rows}
        assert 0 < step[-1] <= micro_batch_rows


def test_more_workers_than_lanes_are_refused(run_dir: str) -> None:
    with pytest.raises(ConfigError, match=r"5 workers cannot share pack\.num_lanes=4"):
        make_reader(run_dir, world_size=5)


@pytest.fixture(scope="module")
def active_dir(run_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A second set beside the first, much smaller, with a plan of many epochs."""
    folder = str(tmp_path_factory.mktemp("active"))
    features, plan = a_table(folder, "active", "features"), a_table(folder, "active", "plan")
    for shard in range(CONFIG.num_lanes):
        rows = [make_features("we hold these truths " * 4, f"active-{shard}-{i}") for i in range(5)]
        features.write(f"shard-{shard:02d}", to_arrow(Features, rows))
    for lane in range(CONFIG.num_lanes):
        shards = shards_of_lane(features.shards(), lane, CONFIG.num_lanes)
        for epoch in range(12):
            rows, _ = plan_lane(
                lambda shard: read_without_features(features, shard),
                shards, TOKENIZER, CONFIG, lane=lane, epoch=epoch, seed=0,
            )  # fmt: skip
            plan.write(plan_shard_name(lane, epoch), to_arrow(PlanRow, rows))
    return folder


def mix_of(active_dir: str, share: float) -> dict[str, Any]:
    """Options of a reader that mixes active speech in."""
    tables = a_table(active_dir, "active", "plan"), a_table(active_dir, "active", "features")
    return {"others": {"active": tables}, "mix": Mix({"active": share}, CONFIG.num_lanes), "earlier": NATURAL_ALONE}


NATURAL_ALONE = Mix({}, CONFIG.num_lanes)


@pytest.fixture(scope="module")
def active_rows(active_dir: str) -> set[bytes]:
    plan, features = a_table(active_dir, "active", "plan"), a_table(active_dir, "active", "features")
    rows = set()
    for lane in range(CONFIG.num_lanes):
        number = sum(plan.read(name).num_rows for name in plan.shards() if name.startswith(f"lane-{lane:04d}"))
        rows |= {row_key(row) for row in islice(LaneStream(plan, features, TOKENIZER, lane).rows(0), number)}
    return rows


@pytest.mark.parametrize("share", [0.1, 0.4, 0.77])
def test_every_step_holds_the_active_share(
    run_dir: str, active_dir: str, active_rows: set[bytes], share: float
) -> None:
    reader = make_reader(run_dir, **mix_of(active_dir, share))
    rows = CONFIG.num_lanes * CONFIG.rows_per_lane
    for step in steps(reader, 10):
        assert abs(len(active_rows.intersection(step)) - share * rows) < CONFIG.rows_per_lane + 1
    mix = Mix({"active": share}, CONFIG.num_lanes)
    for lane in range(CONFIG.num_lanes):
        assert abs(mix.rows_before(1000, lane)["active"] - 1000 * share) <= 1


def test_a_mix_is_the_same_at_every_world_size_and_after_every_resume(run_dir: str, active_dir: str) -> None:
    options = mix_of(active_dir, 0.4) | {"first_row": 3}
    alone = steps(make_reader(run_dir, **options), 8)
    for start in (1, 4, 7):
        assert steps(make_reader(run_dir, start_step=start, **options), 8 - start) == alone[start:]
    ranks = [steps(make_reader(run_dir, rank=rank, world_size=2, **options), 8) for rank in range(2)]
    for number, step in enumerate(alone):
        assert sorted(step) == sorted(row for rank in ranks for row in rank[number])


def test_a_mix_takes_the_natural_rows_in_order_from_the_first_row_on(
    run_dir: str, active_dir: str, active_rows: set[bytes]
) -> None:
    lane = [
        LaneStream(a_table(run_dir, "natural", "plan"), a_table(run_dir, "natural", "features"), TOKENIZER, 2).rows(5)
    ]
    expected = [row_key(row) for row in islice(lane[0], 9)]
    reader = make_reader(run_dir, rank=2, world_size=4, first_row=5, **mix_of(active_dir, 0.4))
    found = [row for step in steps(reader, 8) for row in step if row not in active_rows]
    assert found[:9] == expected
