"""How long training lasts, and what it is made of: the budget and the shares of the config, as steps and rows of plans.

The config counts shares in samples, training mixes rows: a set of the share s, whose rows hold n samples on average,
gets s / n of the rows, divided by the sum of these over all sets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from salad_ray.config import STAGE2_SHARE, Config, DistillConfig, Stage2Config
from salad_ray.flow import Step
from salad_ray.names import ACTIVE, NATURAL, PLAN
from salad_ray.runs import Run
from salad_ray.sequences.loader import Mix
from salad_ray.sequences.plan import plan_shard_name
from salad_ray.tables import Table

Plans = Mapping[str, Table]
"""Set → its plan."""


@dataclass(frozen=True)
class Budget:
    """Optimizer steps of both stages, and the shares of the rows, by set."""

    num_steps: int
    """Of Stage I, its decay included."""
    branch_step: int
    """Where Stage I's decay branches off the trunk, and Stage II begins."""
    stage1_shares: dict[str, float]
    stage2_steps: int = 0
    stage2_shares: dict[str, float] = field(default_factory=dict)
    """The control's, where no plan of active speech was given."""


def plans_of(run: Run, step: Step) -> dict[str, Table]:
    """The plans that a step is made from."""
    return {table.set: table for table in map(run.labelled, step.reads) if table.name == PLAN}


def budget_of(config: Config, plans: Plans) -> Budget:
    """The steps of both stages.

    Args:
        plans: of natural speech and, where training has it, of text alone, at least their first epochs: they say how
            many positions a step has. Without that of text the steps are those of natural speech alone; they are at
            least as many rows of natural speech as training with text takes. One of active speech changes no steps.
    """
    shares = stage1_row_shares(config, plans)
    num_steps = steps_of(config.distill, config, shares, plans)
    branch_step = decay_start(num_steps, config.distill.decay_share)
    if config.stage2 is None:
        return Budget(num_steps, branch_step, shares)
    without_active = {name: plan for name, plan in plans.items() if name != ACTIVE}
    control = stage2_row_shares(config, without_active)
    given = config.stage2.num_steps is not None or config.stage2.num_positions is not None
    own = steps_of(config.stage2, config, control, plans) if given else round(STAGE2_SHARE * num_steps)
    stage2_shares = stage2_row_shares(config, plans) if ACTIVE in plans else control
    return Budget(num_steps, branch_step, shares, max(1, own), stage2_shares)


def decay_start(num_steps: int, decay_share: float) -> int:
    """Steps after which the learning rate begins to fall."""
    return num_steps - round(num_steps * decay_share)


def steps_of(ends: DistillConfig | Stage2Config, config: Config, shares: Mapping[str, float], plans: Plans) -> int:
    """Optimizer steps: as configured, or for so many positions, or one epoch of the shortest lane of natural speech.

    Args:
        shares: of the rows, by set.
    """
    if ends.num_steps is not None:
        return ends.num_steps
    if ends.num_positions is not None:
        rows_per_step = config.pack.num_lanes * config.pack.rows_per_lane
        filled = sum(share * fill(config, plans[name]) for name, share in shares.items())
        return math.ceil(ends.num_positions / (filled * config.pack.context * rows_per_step))
    natural_rows = config.pack.rows_per_lane * shares[NATURAL]
    return max(1, math.floor(min(rows_of_epoch(config, plans[NATURAL])) / natural_rows))


def stage1_row_shares(config: Config, plans: Plans) -> dict[str, float]:
    """Shares of Stage I's rows, by set, of those that have a plan here."""
    return row_shares(config, config.stage1_shares, plans)


def stage2_row_shares(config: Config, plans: Plans) -> dict[str, float]:
    """Shares of Stage II's rows, by set. Without a plan of active speech they are the control's, which has the same
    share of text and natural speech for the rest."""
    shares = dict(config.stage2_shares)
    if ACTIVE not in plans:
        shares[NATURAL] += shares.pop(ACTIVE)
    return row_shares(config, shares, plans)


def row_shares(config: Config, shares: Mapping[str, float], plans: Plans) -> dict[str, float]:
    """Shares of the rows from shares of the samples, of the sets that have a plan."""
    shares = {name: share for name, share in shares.items() if name in plans}
    if len(shares) == 1:
        return dict.fromkeys(shares, 1.0)
    weights = {name: share / samples_per_row(config, plans[name]) for name, share in shares.items()}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def mix_of(config: Config, shares: Mapping[str, float]) -> Mix:
    """The rule by which training reads rows of these shares."""
    return Mix({name: share for name, share in shares.items() if name != NATURAL}, config.pack.num_lanes)


def first_epoch(config: Config) -> Sequence[str]:
    """The plan's shards of all lanes."""
    return [plan_shard_name(lane, 0) for lane in range(config.pack.num_lanes)]


def rows_of_epoch(config: Config, plan: Table) -> list[int]:
    """Rows of every lane in the first epoch."""
    with ThreadPoolExecutor(32) as threads:
        return [metadata.num_rows for metadata in threads.map(plan.metadata, first_epoch(config))]


def samples_per_row(config: Config, plan: Table) -> float:
    """Samples of a row of the first epoch, on average, from the files' footers alone: each sample names a shard."""
    num_rows, num_samples = 0, 0
    with ThreadPoolExecutor(32) as threads:
        for metadata in threads.map(plan.metadata, first_epoch(config)):
            num_rows += metadata.num_rows
            groups = map(metadata.row_group, range(metadata.num_row_groups))
            columns = (group.column(i) for group in groups for i in range(group.num_columns))
            num_samples += sum(column.num_values for column in columns if column.path_in_schema == SAMPLE_COLUMN)
    return max(num_samples, 1) / max(num_rows, 1)


SAMPLE_COLUMN = "segments.list.element.shard"
"""Of a plan's shard, as Parquet names it; it has a value for each sample."""


def positions_of_epoch(config: Config, plan: Table) -> int:
    """Non-padding positions of the first epoch."""
    with ThreadPoolExecutor(32) as threads:
        lanes = threads.map(lambda shard: plan.read(shard, ["num_positions"])["num_positions"], first_epoch(config))
        return sum(sum(lane.to_pylist()) for lane in lanes)


def fill(config: Config, plan: Table) -> float:
    """Share of the first epoch's positions that is not padding."""
    return positions_of_epoch(config, plan) / (sum(rows_of_epoch(config, plan)) * config.pack.context)
