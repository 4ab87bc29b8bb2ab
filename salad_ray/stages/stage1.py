"""`stage1`: a decay of the learning rate that branches off the trunk, to the text LLM that listens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from salad_ray.distill.budget import budget_of, plans_of
from salad_ray.distill.checkpoints import checkpoint_at
from salad_ray.distill.trainer import Job
from salad_ray.flow import Step
from salad_ray.runs import Run
from salad_ray.stages.training import AheadTrainings, Training, branch_job, missing


def training(run: Run, step: Step, ahead: AheadTrainings) -> Training | None:
    """To `stage1/model`, with the training curve from the trunk's first step on."""
    stage = missing(run, step, ahead)
    if stage is None:
        return None
    budget = budget_of(run.config, plans_of(run, step))
    num_steps = budget.num_steps - budget.branch_step
    job = branch_job(run, stage, budget, num_steps, run.config.distill.alpha, ahead)
    job = replace(job, decay_steps=num_steps)
    return Training(stage, job, f"training {num_steps:,} steps more", lambda facts: _with_trunk(job, facts))


def _with_trunk(job: Job, facts: dict[str, Any]) -> dict[str, Any]:
    """The decay's facts, continued backwards by those of the trunk."""
    assert job.start is not None
    trunk = checkpoint_at(*job.start)
    log = [*trunk.state["log"], *(row | {"step": row["step"] + trunk.step} for row in facts["log"])]
    names = ("step", "num_positions", "num_text_positions", "train_seconds", "skipped_steps")
    sums = {name: facts[name] + trunk.state[name] for name in names}
    return facts | sums | {"log": log, "own_positions": facts["num_positions"]}
