"""`pack`: features and the tokeniser → the plan of training rows, as many epochs as training needs.

Every epoch draws fresh interleavings. A longer training run adds epochs to the same plan and leaves the others alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from salad_ray.config import Config, identity
from salad_ray.console import say
from salad_ray.model.speech_lm import load_tokenizer
from salad_ray.sequences.plan import plan_lane, plan_shard_name, read_without_features, shards_of_lane
from salad_ray.stages.common import (
    ShardPart,
    Stage,
    StageError,
    count_shards,
    finished,
    make_shards,
    training_budget,
)
from salad_ray.tables import PlanRow, Table, local_folder, to_arrow


def run(config: Config) -> None:
    """Write `<set>/plan`, one shard for each lane and epoch."""
    teacher = finished(Table(config.run_dir, "", "teacher"), "teacher")
    features = finished(Table(config.run_dir, config.set, "features"), "encode")
    stage = Stage(
        "pack",
        Table(config.run_dir, config.set, "plan"),
        identity(config, "pack.context", "pack.text_words", "pack.speech_words", "pack.num_lanes", "seed"),
        {"features": features["fingerprint"], "teacher": teacher["fingerprint"]},
    )
    done = stage.table.manifest() if stage.is_done() else None
    started = time.monotonic()
    stage.begin()
    worker = partial(PackLane, config, teacher, list(features["shards"]))
    first = epoch_items(config, [0])
    make_shards(config, stage, first, worker)
    num_steps = steps_of(config, stage.table, list(first))
    num_epochs = epochs_for(config, stage.table, list(first), num_steps)
    items = epoch_items(config, range(num_epochs))
    counts = make_shards(config, stage, items, worker)
    budget = training_budget(config)
    if done is not None and (done["budget"], done["num_epochs"]) == (budget, num_epochs):
        say(f"{stage.label}: done already, {stage.table.url}")
        return
    seconds = round(time.monotonic() - started, 2)
    stage.finish(**counts, num_steps=num_steps, num_epochs=num_epochs, budget=budget, seconds=seconds)
    say(
        f"{stage.label}: {counts['num_rows']:,} rows in {num_epochs} epochs for {num_steps:,} steps, "
        f"fill {fill(config, stage.table, list(first)):.1%} → {stage.table.url}"
    )


class PackLane:
    def __init__(self, config: Config, teacher: dict[str, Any], shards: list[str]) -> None:
        self.config = config
        self.shards = shards
        self.features = Table(config.run_dir, config.set, "features")
        self.tokenizer = load_tokenizer(local_folder(teacher["path"]), teacher["revision"])

    def __call__(self, item: dict[str, int]) -> Iterator[ShardPart]:
        pack, lane, epoch = self.config.pack, item["lane"], item["epoch"]
        num_input = 0

        def load(shard: str) -> list[Any]:
            nonlocal num_input
            rows = read_without_features(self.features, shard)
            num_input += sum(row.split == "train" for row in rows)
            return rows

        mine = shards_of_lane(self.shards, lane, pack.num_lanes)
        rows, rejects = plan_lane(load, mine, self.tokenizer, pack, lane=lane, epoch=epoch, seed=self.config.seed)
        if rejects and self.config.strict:
            raise StageError(f"pack: {rejects[0].key}: {rejects[0].reason}")
        yield ShardPart(to_arrow(PlanRow, rows), num_input, num_input - len(rejects), rejects)


def epoch_items(config: Config, epochs: Any) -> dict[str, Any]:
    """Shard name → lane and epoch."""
    pairs = [(lane, epoch) for epoch in epochs for lane in range(config.pack.num_lanes)]
    return {plan_shard_name(lane, epoch): {"lane": lane, "epoch": epoch} for lane, epoch in pairs}


def steps_of(config: Config, plan: Table, first_epoch: list[str]) -> int:
    """Optimizer steps: as configured, or for so many positions, or one epoch of the shortest lane."""
    if config.distill.num_steps is not None:
        return config.distill.num_steps
    rows_per_step = config.pack.num_lanes * config.pack.rows_per_lane
    if config.distill.num_positions is not None:
        positions_per_row = fill(config, plan, first_epoch) * config.pack.context
        return math.ceil(config.distill.num_positions / (positions_per_row * rows_per_step))
    return max(1, min(rows_of(plan, first_epoch)) // config.pack.rows_per_lane)


def epochs_for(config: Config, plan: Table, first_epoch: list[str], num_steps: int) -> int:
    """Epochs that the shortest lane needs, and one more where others may come out a little shorter."""
    shortest = min(rows_of(plan, first_epoch))
    if shortest == 0:
        raise StageError(
            "pack: a lane has no rows, because there are too few recordings for so many; lower pack.num_lanes and "
            "ingest.num_shards"
        )
    needed = num_steps * config.pack.rows_per_lane / shortest
    return math.ceil(needed) if needed <= 1 else math.ceil(1.05 * needed)


def rows_of(plan: Table, shards: list[str]) -> list[int]:
    return list(count_shards(plan, shards)["shards"].values())


def fill(config: Config, plan: Table, shards: list[str]) -> float:
    """Share of the planned positions that is not padding."""
    positions = [n for shard in shards for n in plan.read(shard, ["num_positions"])["num_positions"].to_pylist()]
    return sum(positions) / (len(positions) * config.pack.context)
