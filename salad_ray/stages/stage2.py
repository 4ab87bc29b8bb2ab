"""`stage2`: go on from before Stage I's decay, with natural speech, actively selected speech and text alone mixed.

The control goes on as long without active speech.
"""

from __future__ import annotations

from dataclasses import replace

from salad_ray.distill.budget import budget_of, plans_of
from salad_ray.flow import Step
from salad_ray.names import ACTIVE, NATURAL, TEXT
from salad_ray.runs import Run
from salad_ray.stages.training import AheadTrainings, Training, branch_job, missing

SET_NAMES = {NATURAL: "natural speech", ACTIVE: "active speech", TEXT: "text alone"}


def training(run: Run, step: Step, ahead: AheadTrainings) -> Training | None:
    """To `stage2/model`, or to `control/model`, which reads no active speech."""
    stage = missing(run, step, ahead)
    if stage is None:
        return None
    settings = run.config.stage2
    assert settings is not None
    budget = budget_of(run.config, plans_of(run, step))
    num_steps = budget.stage2_steps
    job = replace(
        branch_job(run, stage, budget, num_steps, settings.alpha, ahead),
        decay_steps=round(num_steps * settings.decay_share),
        shares=budget.stage2_shares,
        earlier_shares=budget.stage1_shares,
    )
    mixed = ", ".join(f"{share:.1%} {SET_NAMES[name]}" for name, share in job.shares.items())
    return Training(stage, job, f"training {num_steps:,} steps, rows: {mixed}")
