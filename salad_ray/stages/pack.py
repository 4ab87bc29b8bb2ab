"""`pack`: features and the tokeniser → the plan of training rows, as many epochs as training needs.

Every epoch draws fresh interleavings. A longer training run adds epochs to the same plan and leaves the others alone.
The natural speech's plan lasts for Stage I and, from the point where Stage I's decay begins, for Stage II (and for its
control, which has no other speech); the active speech's plan for its share of Stage II's rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from salad_ray.config import STAGE2_SHARE, Config, DistillConfig, Stage2Config, identity
from salad_ray.console import say
from salad_ray.distill.step import decay_start
from salad_ray.model.speech_lm import load_tokenizer
from salad_ray.sequences.plan import plan_lane, plan_shard_name, read_without_features, shards_of_lane
from salad_ray.stages.common import Stage, count_shards, finished, make_shards, training_budget
from salad_ray.stages.shards import ShardPart, StageError
from salad_ray.tables import PlanRow, Table, local_folder, to_arrow


def run(config: Config) -> None:
    """Write `<set>/plan`, one shard for each lane and epoch."""
    teacher = finished(Table(config.run_dir, "", "teacher"), "teacher")
    features = finished(Table(config.run_dir, config.set, "features"), "encode")
    inputs = {"features": features["version"], "teacher": teacher["version"]}
    if config.set == "active":
        inputs["selection"] = finished(Table(config.run_dir, "active", "selection"), "select")["version"]
    stage = Stage(
        "pack",
        Table(config.run_dir, config.set, "plan"),
        identity(config, "pack.context", "pack.text_words", "pack.speech_words", "pack.num_lanes", "seed"),
        inputs,
    )
    done = stage.table.manifest() if stage.is_done() else None
    started = time.monotonic()
    stage.begin()
    worker = partial(PackLane, config, teacher, list(features["shards"]))
    first = epoch_items(config, [0])
    make_shards(config, stage, first, worker)
    facts = active_facts(config, stage.table) if config.set == "active" else natural_facts(config, stage.table)
    if done is not None and all(done[name] == value for name, value in facts.items()):
        say(f"{stage.label}: done already, {stage.table.url}")
        return
    if stage.table.linked_to():  # a plan of another run is never lengthened
        stage.table.unlink()
        run(config)
        return
    num_epochs = epochs_for(stage.table, config, facts["rows_per_lane"])
    counts = make_shards(config, stage, epoch_items(config, range(num_epochs)), worker)
    while min(rows_of_lanes(config, counts["shards"])) < facts["rows_per_lane"]:  # later epochs have other rows
        num_epochs += 1
        counts = make_shards(config, stage, epoch_items(config, range(num_epochs)), worker)
    facts["num_epochs"] = num_epochs
    stage.finish(**counts, **facts, seconds=round(time.monotonic() - started, 2))
    mixed = f", {facts['active_share']:.1%} of Stage II's rows" if config.set == "active" else ""
    say(
        f"{stage.label}: {counts['num_rows']:,} rows in {facts['num_epochs']} epochs{mixed}, "
        f"fill {fill(config, stage.table):.1%} → {stage.table.url}"
    )


def natural_facts(config: Config, plan: Table) -> dict[str, Any]:
    """Steps of both stages, and the rows of a lane that they need."""
    num_steps = steps_of(config.distill, config, plan)
    stage2_steps = 0
    if config.stage2 is not None:
        given = config.stage2.num_steps is not None or config.stage2.num_positions is not None
        stage2_steps = steps_of(config.stage2, config, plan) if given else max(1, round(STAGE2_SHARE * num_steps))
    last = max(num_steps, decay_start(num_steps, config.distill.decay_share) + stage2_steps)
    return {
        "num_steps": num_steps,
        "stage2_steps": stage2_steps,
        "rows_per_lane": last * config.pack.rows_per_lane,
        "budget": training_budget(config),
    }


def active_facts(config: Config, plan: Table) -> dict[str, Any]:
    """The share of Stage II's rows that are active, and how many of a lane that makes."""
    natural = Table(config.run_dir, "natural", "plan")
    stage2_steps = finished(natural, "pack")["stage2_steps"]
    if config.stage2 is None:
        raise StageError("pack set=active: the config has no stage2 that could train on it; add stage2={}")
    active = config.stage2.active_weight * positions_of_epoch(config, plan)
    share = active / (active + positions_of_epoch(config, natural))
    rows = math.ceil(stage2_steps * config.pack.rows_per_lane * share) + 1  # a lane's phase may add one
    return {"active_share": share, "rows_per_lane": rows, "budget": training_budget(config)}


class PackLane:
    def __init__(self, config: Config, teacher: dict[str, Any], shards: list[str]) -> None:
        self.config = config
        self.shards = shards
        self.features = Table(config.run_dir, config.set, "features")
        with local_folder(teacher["path"]) as path:
            self.tokenizer = load_tokenizer(path, teacher["revision"])
        self.selected = selected_passages(config) if config.set == "active" else None

    def __call__(self, item: dict[str, int]) -> Iterator[ShardPart]:
        pack, lane, epoch = self.config.pack, item["lane"], item["epoch"]
        num_input = 0

        def load(shard: str) -> list[Any]:
            nonlocal num_input
            rows = read_without_features(self.features, shard)
            if self.selected is not None:  # several selections may share their speech
                rows = [row if row.utt_id in self.selected else replace(row, split="not selected") for row in rows]
            num_input += sum(row.split == "train" for row in rows)
            return rows

        mine = shards_of_lane(self.shards, lane, pack.num_lanes)
        rows, rejects = plan_lane(load, mine, self.tokenizer, pack, lane=lane, epoch=epoch, seed=self.config.seed)
        if rejects and self.config.strict:
            raise StageError(f"pack: {rejects[0].key}: {rejects[0].reason}")
        num_planned = sum(len(segment.rows) for row in rows for segment in row.segments)
        yield ShardPart(to_arrow(PlanRow, rows), num_input, num_planned, rejects)


def selected_passages(config: Config) -> set[str]:
    """Ids of what `select` has drawn; a passage's speech has the passage's id."""
    table = Table(config.run_dir, "active", "selection")
    return {
        passage for shard in table.shards() for passage in table.read(shard, ["passage_id"])["passage_id"].to_pylist()
    }


def epoch_items(config: Config, epochs: Any) -> dict[str, Any]:
    """Shard name → lane and epoch."""
    pairs = [(lane, epoch) for epoch in epochs for lane in range(config.pack.num_lanes)]
    return {plan_shard_name(lane, epoch): {"lane": lane, "epoch": epoch} for lane, epoch in pairs}


def steps_of(ends: DistillConfig | Stage2Config, config: Config, plan: Table) -> int:
    """Optimizer steps: as configured, or for so many positions, or one epoch of the shortest lane."""
    if ends.num_steps is not None:
        return ends.num_steps
    rows_per_step = config.pack.num_lanes * config.pack.rows_per_lane
    if ends.num_positions is not None:
        return math.ceil(ends.num_positions / (fill(config, plan) * config.pack.context * rows_per_step))
    return max(1, min(rows_of_epoch(config, plan)) // config.pack.rows_per_lane)


def epochs_for(plan: Table, config: Config, rows: int) -> int:
    """Epochs in which the shortest lane has so many rows, if all are as long as the first."""
    shortest = min(rows_of_epoch(config, plan))
    if shortest == 0:
        raise StageError(
            f"pack: a lane of {plan.set} speech has no rows, because there are too few recordings for so many; lower "
            "pack.num_lanes and ingest.num_shards"
        )
    return math.ceil(rows / shortest)


def rows_of_lanes(config: Config, shards: dict[str, int]) -> list[int]:
    """Rows of every lane, over all epochs; `shards` has the rows of each lane and epoch."""
    totals = [0] * config.pack.num_lanes
    for name, item in epoch_items(config, range(len(shards) // len(totals))).items():
        totals[item["lane"]] += shards[name]
    return totals


def rows_of_epoch(config: Config, plan: Table) -> list[int]:
    """Rows of every lane in the first epoch."""
    return list(count_shards(plan, list(epoch_items(config, [0])))["shards"].values())


def positions_of_epoch(config: Config, plan: Table) -> int:
    """Non-padding positions of the first epoch."""
    shards = epoch_items(config, [0])
    return sum(sum(plan.read(shard, ["num_positions"])["num_positions"].to_pylist()) for shard in shards)


def fill(config: Config, plan: Table) -> float:
    """Share of the first epoch's positions that is not padding."""
    return positions_of_epoch(config, plan) / (sum(rows_of_epoch(config, plan)) * config.pack.context)
