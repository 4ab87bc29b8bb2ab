"""`stage2`: go on from before Stage I's decay, with natural and actively selected speech mixed.

The control goes on as long with natural speech alone.
"""

from __future__ import annotations

import time

from salad_ray.console import clock, say
from salad_ray.distill.budget import active_share, budget_of
from salad_ray.distill.checkpoints import checkpoint_at
from salad_ray.distill.logger import where_curves_are
from salad_ray.distill.trainer import Job, checkpoints_url, train
from salad_ray.flow import Step
from salad_ray.model.speech_lm import EncoderSpec
from salad_ray.report.card import model_card, speech_data
from salad_ray.runs import Run
from salad_ray.stages.common import Stage, teacher_of
from salad_ray.stages.ray_cluster import start_ray
from salad_ray.tables import read_json


def make(run: Run, step: Step) -> None:
    """Write `stage2/model`, or `control/model`, which reads no active speech."""
    config, stage = run.config, Stage.of(run, step)
    name = stage.table.name
    if stage.is_done():
        say(f"{name}: done already, {stage.table.url}")
        return
    started = time.monotonic()
    stage.begin()
    start_ray(config)
    job = _job(run, stage, ("natural", "active") if "active/plan" in step.reads else ("natural",))
    share = f"{job.active_share:.1%} of the rows active speech" if job.active else "natural speech alone"
    say(f"{name}: training {job.num_steps:,} steps, {share}; curves: {where_curves_are(stage.table.url)}")
    facts = train(job)
    starts = read_json(f"{stage.table.url}/starts.json") or {"starts": []}
    stage.finish(
        **facts,
        seconds=round(time.monotonic() - started, 2),
        starts=starts["starts"],
        begun_from=job.start and job.start.url,
    )
    say(f"{name}: {facts['num_positions']:,} positions in {clock(facts['train_seconds'])} → {stage.table.url}/model")


def _job(run: Run, stage: Stage, sets: tuple[str, ...]) -> Job:
    config, settings = run.config, run.config.stage2
    assert settings is not None
    teacher, encoder = teacher_of(run), stage.inputs["natural/features"]["encoder"]
    speech = {name: (run.table(name, "plan"), run.table(name, "features")) for name in sets}
    plans = [plan for plan, _ in speech.values()]
    budget = budget_of(config, plans[0])
    recipe = (settings.alpha, config.model.adapter.stride, config.distill.word_ends)
    return Job(
        config,
        stage.table,
        speech["natural"],
        teacher,
        EncoderSpec(**encoder),
        config.distill.model_copy(update={"alpha": settings.alpha}),
        budget.stage2_steps,
        decay_steps=round(budget.stage2_steps * settings.decay_share),
        card=model_card(stage.table.name, teacher, encoder, speech_data(run, sets), *recipe),
        start=checkpoint_at(checkpoints_url(run.table("", "trunk")), budget.branch_step),
        first_row=budget.branch_step * config.pack.rows_per_lane,
        active=speech.get("active"),
        active_share=active_share(config, *plans) if len(plans) > 1 else 0.0,
    )
