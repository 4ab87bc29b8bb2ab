"""`stage2`: go on from before Stage I's decay, with natural and actively selected speech mixed.

The control goes on as long with natural speech alone.
"""

from __future__ import annotations

from dataclasses import replace

from salad_ray.distill.budget import active_share, budget_of
from salad_ray.flow import Step
from salad_ray.runs import Run
from salad_ray.stages.training import AheadTrainings, Training, branch_job, missing


def training(run: Run, step: Step, ahead: AheadTrainings) -> Training | None:
    """To `stage2/model`, or to `control/model`, which reads no active speech."""
    stage = missing(run, step, ahead)
    if stage is None:
        return None
    config, settings = run.config, run.config.stage2
    assert settings is not None
    active = (run.table("active", "plan"), run.table("active", "features")) if "active/plan" in step.reads else None
    plan = run.table("natural", "plan")
    num_steps = budget_of(config, plan).stage2_steps
    sets = ("natural", "active") if active else ("natural",)
    job = replace(
        branch_job(run, stage, num_steps, sets, settings.alpha, ahead),
        decay_steps=round(num_steps * settings.decay_share),
        active=active,
        active_share=active_share(config, plan, active[0]) if active else 0.0,
    )
    share = f"{job.active_share:.1%} of the rows active speech" if active else "natural speech alone"
    return Training(stage, job, f"training {num_steps:,} steps, {share}")
