"""`trunk`: distil at a constant rate, with a checkpoint at each step where a decay branches off.

Stage I is a short decay from the trunk, and Stage II begins there, too. A longer budget lengthens the trunk, and what
was made of the shorter one stays valid.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from salad_ray.console import clock, say
from salad_ray.distill.budget import budget_of, plans_of, stage1_row_shares
from salad_ray.distill.logger import where_curves_are
from salad_ray.distill.trainer import Job, train
from salad_ray.flow import Step
from salad_ray.model.speech_lm import EncoderSpec
from salad_ray.runs import Run
from salad_ray.stages.common import Stage, teacher_of, training_tables
from salad_ray.stages.ray_cluster import start_ray
from salad_ray.stages.shards import StageError
from salad_ray.tables import read_json


def make(run: Run, step: Step) -> None:
    """Write the trunk's checkpoint where this run's decay begins."""
    lengthen(run, step, [budget_of(run.config, plans_of(run, step)).branch_step])


def lengthen(run: Run, step: Step, branch_steps: Sequence[int]) -> None:
    """Train to the last of these steps, with a checkpoint at each, beginning from the nearest one that is there.

    Raises:
        StageError: a decay would begin before the warm-up has ended.
        TrainingStopped: as `train`.
    """
    config, stage = run.config, Stage.of(run, step)
    warmup = config.distill.warmup_steps
    if min(branch_steps) < max(warmup, 1):
        raise StageError(
            f"trunk: a decay would begin at step {min(branch_steps)}, before the warm-up of {warmup} steps has ended; "
            "train longer, or lower distill.warmup_steps or distill.decay_share"
        )
    done = (stage.table.manifest() or {}) if stage.is_done() else {}
    there = set(done.get("branch_steps", ()))
    missing = sorted(set(branch_steps) - there)
    if not missing:
        say(f"trunk: done already, {stage.table.url}")
        return
    started = time.monotonic()
    stage.begin()
    start_ray(config)
    longest = max(there, default=0)
    inner = [point for point in missing if point < longest]  # each is trained to from the checkpoint before it
    facts: dict[str, Any] = {}
    tables = training_tables(run, step)
    for last in [*inner, *missing[-1:]] if missing[-1] > longest else inner:
        say(f"trunk: training to step {last:,}; curves: {where_curves_are(stage.table.url)}")
        job = Job(
            config,
            stage.table,
            tables["natural"],
            teacher_of(run),
            EncoderSpec(**stage.inputs["natural/features"]["encoder"]),
            config.distill,
            last,
            warmup_steps=warmup,
            others={name: pair for name, pair in tables.items() if name != "natural"},
            shares=stage1_row_shares(config, plans_of(run, step)),
            branch_steps=tuple(missing),
            exports=False,
        )
        facts = train(job)
    if missing[-1] < longest:  # what is told of the trunk is told of all of it
        facts = {name: done[name] for name in facts}
    starts = read_json(f"{stage.table.url}/starts.json") or {"starts": []}
    stage.finish(
        **facts,
        branch_steps=sorted(there | set(missing)),
        seconds=round(done.get("seconds", 0.0) + time.monotonic() - started, 2),
        starts=starts["starts"],
    )
    say(f"trunk: {facts['num_positions']:,} positions in {clock(facts['train_seconds'])} → {stage.table.url}")
