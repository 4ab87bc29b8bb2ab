"""`stage2`: go on from before Stage I's decay, with natural speech, actively selected speech and text alone mixed.

The control goes on as long without active speech.
"""

from __future__ import annotations

import time

from salad_ray.console import clock, say
from salad_ray.distill.budget import budget_of, plans_of, stage1_row_shares, stage2_row_shares
from salad_ray.distill.checkpoints import checkpoint_at
from salad_ray.distill.logger import where_curves_are
from salad_ray.distill.trainer import Job, checkpoints_url, train
from salad_ray.flow import Step
from salad_ray.model.speech_lm import EncoderSpec
from salad_ray.report.card import model_card, speech_data, text_alone
from salad_ray.runs import Run
from salad_ray.sequences.loader import TEXT
from salad_ray.stages.common import Stage, teacher_of, training_tables
from salad_ray.stages.ray_cluster import start_ray
from salad_ray.tables import read_json

SET_NAMES = {"natural": "natural speech", "active": "active speech", "text": "text alone"}


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
    job = _job(run, stage)
    mixed = ", ".join(f"{share:.1%} {SET_NAMES[name]}" for name, share in job.shares.items())
    say(f"{name}: training {job.num_steps:,} steps, rows: {mixed}; curves: {where_curves_are(stage.table.url)}")
    facts = train(job)
    starts = read_json(f"{stage.table.url}/starts.json") or {"starts": []}
    stage.finish(
        **facts,
        seconds=round(time.monotonic() - started, 2),
        starts=starts["starts"],
        begun_from=job.start and job.start.url,
    )
    say(f"{name}: {facts['num_positions']:,} positions in {clock(facts['train_seconds'])} → {stage.table.url}/model")


def _job(run: Run, stage: Stage) -> Job:
    config, settings = run.config, run.config.stage2
    assert settings is not None
    teacher, encoder = teacher_of(run), stage.inputs["natural/features"]["encoder"]
    plans, tables = plans_of(run, stage.step), training_tables(run, stage.step)
    budget = budget_of(config, plans)
    speech = speech_data(run, [name for name in ("natural", "active") if name in tables])
    text = text_alone(config.ingest.model_dump()) if TEXT in tables else ()
    return Job(
        config,
        stage.table,
        tables["natural"],
        teacher,
        EncoderSpec(**encoder),
        config.distill.model_copy(update={"alpha": settings.alpha}),
        budget.stage2_steps,
        decay_steps=round(budget.stage2_steps * settings.decay_share),
        card=model_card(stage.table.name, teacher, encoder, speech, settings.alpha, text),
        start=checkpoint_at(checkpoints_url(run.table("", "trunk")), budget.branch_step),
        first_row=budget.branch_step * config.pack.rows_per_lane,
        others={name: pair for name, pair in tables.items() if name != "natural"},
        shares=stage2_row_shares(config, plans),
        earlier_shares=stage1_row_shares(config, plans),
    )
