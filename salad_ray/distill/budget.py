"""How long training lasts: the budget of the config, in positions or steps, as steps and rows of the plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from salad_ray.config import STAGE2_SHARE, Config, DistillConfig, Stage2Config
from salad_ray.sequences.plan import plan_shard_name
from salad_ray.tables import Table


@dataclass(frozen=True)
class Budget:
    """Optimizer steps of both stages."""

    num_steps: int
    """Of Stage I, its decay included."""
    branch_step: int
    """Where Stage I's decay branches off the trunk, and Stage II begins."""
    stage2_steps: int


def budget_of(config: Config, plan: Table) -> Budget:
    """The steps of both stages.

    Args:
        plan: of the natural speech, at least its first epoch; it says how many positions a row has.
    """
    num_steps = steps_of(config.distill, config, plan)
    stage2_steps = 0
    if config.stage2 is not None:
        given = config.stage2.num_steps is not None or config.stage2.num_positions is not None
        stage2_steps = steps_of(config.stage2, config, plan) if given else max(1, round(STAGE2_SHARE * num_steps))
    return Budget(num_steps, decay_start(num_steps, config.distill.decay_share), stage2_steps)


def decay_start(num_steps: int, decay_share: float) -> int:
    """Steps after which the learning rate begins to fall."""
    return num_steps - round(num_steps * decay_share)


def steps_of(ends: DistillConfig | Stage2Config, config: Config, plan: Table) -> int:
    """Optimizer steps: as configured, or for so many positions, or one epoch of the shortest lane."""
    if ends.num_steps is not None:
        return ends.num_steps
    rows_per_step = config.pack.num_lanes * config.pack.rows_per_lane
    if ends.num_positions is not None:
        return math.ceil(ends.num_positions / (fill(config, plan) * config.pack.context * rows_per_step))
    return max(1, min(rows_of_epoch(config, plan)) // config.pack.rows_per_lane)


def active_share(config: Config, natural: Table, active: Table) -> float:
    """The share of Stage II's rows that are active speech, from the plans of both."""
    assert config.stage2 is not None
    weighted = config.stage2.active_weight * positions_of_epoch(config, active)
    return weighted / (weighted + positions_of_epoch(config, natural))


def first_epoch(config: Config) -> Sequence[str]:
    """The plan's shards of all lanes."""
    return [plan_shard_name(lane, 0) for lane in range(config.pack.num_lanes)]


def rows_of_epoch(config: Config, plan: Table) -> list[int]:
    """Rows of every lane in the first epoch."""
    with ThreadPoolExecutor(32) as threads:
        return [metadata.num_rows for metadata in threads.map(plan.metadata, first_epoch(config))]


def positions_of_epoch(config: Config, plan: Table) -> int:
    """Non-padding positions of the first epoch."""
    return sum(sum(plan.read(shard, ["num_positions"])["num_positions"].to_pylist()) for shard in first_epoch(config))


def fill(config: Config, plan: Table) -> float:
    """Share of the first epoch's positions that is not padding."""
    return positions_of_epoch(config, plan) / (sum(rows_of_epoch(config, plan)) * config.pack.context)
