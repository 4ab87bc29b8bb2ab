"""`pack`: features and the tokeniser → the plan of training rows, as many epochs as training needs.

Every epoch draws fresh interleavings. A longer training run adds epochs to the same plan and leaves the others alone.
The natural speech's plan lasts for Stage I and, from the point where Stage I's decay begins, for Stage II (and for its
control, which has no other speech); the active speech's plan for its share of Stage II's rows. Text alone has nothing
to draw: its plan is one epoch, which training reads again and again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from salad_ray.config import Config
from salad_ray.console import say
from salad_ray.distill.budget import Budget, budget_of, fill, mix_of, plans_of, rows_of_epoch
from salad_ray.flow import Step
from salad_ray.model.loading import load_tokenizer
from salad_ray.names import ACTIVE, NATURAL, TEXT
from salad_ray.runs import Run
from salad_ray.sequences.plan import plan_lane, plan_shard_name, read_without_features, shards_of_lane
from salad_ray.sequences.text_rows import Text, plan_text_lane
from salad_ray.stages.common import Stage, Work, make_shards, teacher_of
from salad_ray.stages.shards import ShardPart, StageError
from salad_ray.tables import PlanRow, Table, Totals, local_folder, to_arrow


def make(run: Run, step: Step) -> None:
    """Write `<set>/plan`, one shard for each lane and epoch, or lengthen it."""
    if step.set == TEXT:
        make_text(run, step)
        return
    config, stage = run.config, Stage.of(run, step)
    features = run.labelled(step.reads[1])
    plans = plans_of(run, step) | {step.set: stage.table}
    done = (stage.table.manifest() or {}) if stage.is_done() else {}
    started = time.monotonic()
    stage.begin()
    worker = partial(PackLane, config, teacher_of(run), features, list(stage.inputs[features.label]["shards"]))
    num_epochs = done.get("num_epochs", 1)
    counts = make_shards(run, Work(stage, epoch_items(config, range(num_epochs)), worker))
    budget = budget_of(config, plans)
    needed = natural_rows(config, budget) if step.set == NATURAL else active_rows(config, budget)
    if done.get("rows_per_lane", 0) >= needed:
        say(f"{stage.label}: done already, {stage.table.url}")
        return
    while min(rows_of_lanes(config, counts["shards"])) < needed:  # later epochs have other rows
        num_epochs = max(num_epochs + 1, epochs_for(stage.table, config, needed))
        counts = make_shards(run, Work(stage, epoch_items(config, range(num_epochs)), worker))
    facts = {"rows_per_lane": min(rows_of_lanes(config, counts["shards"])), "num_epochs": num_epochs}
    stage.finish(**counts, **facts, seconds=round(time.monotonic() - started, 2))
    mixed = f", {budget.stage2_shares[ACTIVE]:.1%} of Stage II's rows" if step.set == ACTIVE else ""
    say(
        f"{stage.label}: {counts['num_rows']:,} rows in {num_epochs} epochs{mixed}, "
        f"fill {fill(config, stage.table):.1%} → {stage.table.url}"
    )


def make_text(run: Run, step: Step) -> None:
    """Write `text/plan`, one shard for each lane."""
    config, stage = run.config, Stage.of(run, step)
    if stage.done_already():
        return
    started = time.monotonic()
    stage.begin()
    [_, passages] = map(run.labelled, step.reads)
    worker = partial(PackText, config, teacher_of(run), passages, list(stage.inputs[passages.label]["shards"]))
    counts = make_shards(run, Work(stage, epoch_items(config, [0]), worker))
    require_rows(config, stage.table)
    stage.finish(**counts, num_epochs=1, seconds=round(time.monotonic() - started, 2))
    say(f"{stage.label}: {counts['num_rows']:,} rows, fill {fill(config, stage.table):.1%} → {stage.table.url}")


def natural_rows(config: Config, budget: Budget) -> int:
    """Rows of natural speech that a lane needs for both stages: Stage II goes on where Stage I's decay begins. Its
    control takes most of them."""
    rows, trunk = config.pack.rows_per_lane, mix_of(config, budget.stage1_shares)
    needed = trunk.most_rows(NATURAL, budget.num_steps * rows)
    if config.stage2 is None:
        return needed
    control = mix_of(config, budget.stage2_shares)
    before = trunk.most_rows(NATURAL, budget.branch_step * rows)
    return max(needed, before + control.most_rows(NATURAL, budget.stage2_steps * rows))


def active_rows(config: Config, budget: Budget) -> int:
    """Rows of active speech that Stage II takes of a lane."""
    return mix_of(config, budget.stage2_shares).most_rows(ACTIVE, budget.stage2_steps * config.pack.rows_per_lane)


class PackLane:
    """Plans the rows of a lane for an epoch.

    Args:
        shards: of the source.
    """

    def __init__(self, config: Config, teacher: dict[str, Any], source: Table, shards: list[str]) -> None:
        self.config, self.source, self.shards = config, source, shards
        with local_folder(teacher["path"]) as path:
            self.tokenizer = load_tokenizer(path, teacher["revision"])

    def __call__(self, item: dict[str, int]) -> Iterator[ShardPart]:
        pack, lane, epoch = self.config.pack, item["lane"], item["epoch"]
        num_input = 0

        def load(shard: str) -> list[Any]:
            nonlocal num_input
            rows = read_without_features(self.source, shard)
            num_input += sum(row.split == "train" for row in rows)
            return rows

        mine = shards_of_lane(self.shards, lane, pack.num_lanes)
        stride = self.config.model.adapter.stride
        rows, rejects = plan_lane(
            load, mine, self.tokenizer, pack, lane=lane, epoch=epoch, seed=self.config.seed, stride=stride
        )
        if rejects and self.config.strict:
            raise StageError(f"pack: {rejects[0].key}: {rejects[0].reason}")
        num_planned = sum(len(segment.rows) for row in rows for segment in row.segments)
        yield ShardPart(to_arrow(PlanRow, rows), num_input, num_planned, rejects)


class PackText(PackLane):
    """The same of text alone; its source are passages."""

    def __call__(self, item: dict[str, int]) -> Iterator[ShardPart]:
        pack, lane = self.config.pack, item["lane"]
        num_input = 0

        def load(shard: str) -> list[Text]:
            nonlocal num_input
            columns = self.source.read(shard, ["passage_id", "text"])
            num_input += len(columns)
            return [Text(index, *pair) for index, pair in enumerate(zip(*columns.to_pydict().values(), strict=True))]

        mine = shards_of_lane(self.shards, lane, pack.num_lanes)
        rows, rejects, num_cut = plan_text_lane(
            load, mine, self.tokenizer, pack.context, lane=lane, seed=self.config.seed
        )
        if rejects and self.config.strict:
            raise StageError(f"pack: {rejects[0].key}: {rejects[0].reason}")
        num_planned = sum(len(row.segments) for row in rows)
        totals: Totals = {"num_tokens_cut": num_cut}
        yield ShardPart(to_arrow(PlanRow, rows), num_input, num_planned, rejects, totals)


def epoch_items(config: Config, epochs: Any) -> dict[str, Any]:
    """Shard name → lane and epoch."""
    pairs = [(lane, epoch) for epoch in epochs for lane in range(config.pack.num_lanes)]
    return {plan_shard_name(lane, epoch): {"lane": lane, "epoch": epoch} for lane, epoch in pairs}


def epochs_for(plan: Table, config: Config, rows: int) -> int:
    """Epochs in which the shortest lane has so many rows, if all are as long as the first."""
    return math.ceil(rows / require_rows(config, plan))


def require_rows(config: Config, plan: Table) -> int:
    """Rows of the first epoch's shortest lane; raises `StageError` where it has none."""
    shortest = min(rows_of_epoch(config, plan))
    if shortest == 0:
        what = (
            "text alone has no rows, because there are too few passages"
            if plan.set == TEXT
            else (f"{plan.set} speech has no rows, because there are too few recordings")
        )
        raise StageError(f"pack: a lane of {what} for so many; lower pack.num_lanes and ingest.num_shards")
    return shortest


def rows_of_lanes(config: Config, shards: dict[str, int]) -> list[int]:
    """Rows of every lane, over all epochs; `shards` has the rows of each lane and epoch."""
    totals = [0] * config.pack.num_lanes
    for name, item in epoch_items(config, range(len(shards) // len(totals))).items():
        totals[item["lane"]] += shards[name]
    return totals
