"""`trunk`: distil at a constant rate, with a checkpoint at each step where a decay branches off.

Stage I is a short decay from the trunk, and Stage II begins there, too. A longer budget lengthens the trunk, and what
was made of the shorter one stays valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from salad_ray.console import say
from salad_ray.distill.budget import budget_of, plans_of, stage1_row_shares
from salad_ray.distill.trainer import train
from salad_ray.flow import Step
from salad_ray.runs import Run
from salad_ray.stages.common import Stage
from salad_ray.stages.ray_cluster import start_ray
from salad_ray.stages.shards import StageError
from salad_ray.stages.training import AheadTrainings, Training, begun_trainings, run_trainings, stage1_job


def training(run: Run, step: Step, ahead: AheadTrainings) -> Training | None:
    """To the checkpoint where this run's decay begins."""
    budget = budget_of(run.config, plans_of(run, step))
    return _training_to(run, step, [budget.branch_step], budget.stage1_shares)


def lengthen(run: Run, step: Step, branch_steps: Sequence[int]) -> None:
    """Train to the last of these steps, with a checkpoint at each, beginning from the nearest one that is there.

    Raises:
        StageError: a decay would begin before the warm-up has ended.
        TrainingStopped: as `train`.
    """
    shares = stage1_row_shares(run.config, plans_of(run, step))
    run_trainings(run.config, begun_trainings([step], lambda step, _: _training_to(run, step, branch_steps, shares)))


def _training_to(run: Run, step: Step, branch_steps: Sequence[int], shares: dict[str, float]) -> Training | None:
    """What trains to the last of these steps that is missing. Steps before the trunk's end are trained to at once, each
    from the checkpoint before it and in a job of its own, which only a sweep with new budgets asks for."""
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
        return None
    job = stage1_job(run, stage, missing[-1], shares)
    job = replace(job, warmup_steps=warmup, branch_steps=tuple(missing), exports=False)
    seconds = done.get("seconds", 0.0)
    for last in missing[:-1]:
        if last < max(there, default=0):
            start_ray(config)
            say(f"trunk: training to step {last:,}")
            [result] = train([replace(job, num_steps=last)])
            seconds += result["seconds"]

    def facts(result: dict[str, Any]) -> dict[str, Any]:
        own = result | {"seconds": result["seconds"] + seconds}
        if missing[-1] < max(there, default=0):  # what is told of the trunk is told of all of it
            own |= {name: done[name] for name in result if name != "seconds"}
        return own | {"branch_steps": sorted(there | set(missing))}

    return Training(stage, job, f"training to step {missing[-1]:,}", facts)
