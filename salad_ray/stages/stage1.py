"""`stage1`: a decay of the learning rate that branches off the trunk, to the text LLM that listens."""

from __future__ import annotations

import time

from salad_ray.console import clock, say
from salad_ray.distill.budget import budget_of, plans_of, stage1_row_shares
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


def make(run: Run, step: Step) -> None:
    """Write `stage1/model` and its manifest, with the training curve from the trunk's first step on."""
    config, stage = run.config, Stage.of(run, step)
    if stage.is_done():
        say(f"stage1: done already, {stage.table.url}")
        return
    started = time.monotonic()
    stage.begin()
    start_ray(config)
    plans, tables = plans_of(run, step), training_tables(run, step)
    budget = budget_of(config, plans)
    start = checkpoint_at(checkpoints_url(run.table("", "trunk")), budget.branch_step)
    num_steps = budget.num_steps - budget.branch_step
    teacher, encoder = teacher_of(run), stage.inputs["natural/features"]["encoder"]
    text = text_alone(config.ingest.model_dump()) if TEXT in tables else ()
    say(f"stage1: training {num_steps:,} steps more; curves: {where_curves_are(stage.table.url)}")
    job = Job(
        config,
        stage.table,
        tables["natural"],
        teacher,
        EncoderSpec(**encoder),
        config.distill,
        num_steps,
        decay_steps=num_steps,
        card=model_card("stage1", teacher, encoder, speech_data(run, ("natural",)), config.distill.alpha, text),
        start=start,
        first_row=budget.branch_step * config.pack.rows_per_lane,
        others={name: pair for name, pair in tables.items() if name != "natural"},
        shares=stage1_row_shares(config, plans),
    )
    facts = train(job)
    own = facts["num_positions"]
    for name in ("num_positions", "num_text_positions", "train_seconds", "skipped_steps"):
        facts[name] += start.state[name]
    facts["log"] = [*start.state["log"], *(row | {"step": row["step"] + start.step} for row in facts["log"])]
    starts = read_json(f"{stage.table.url}/starts.json") or {"starts": []}
    stage.finish(
        **facts | {"step": budget.num_steps},
        own_positions=own,
        begun_from=start.url,
        seconds=round(time.monotonic() - started, 2),
        starts=starts["starts"],
    )
    say(
        f"stage1: {facts['num_positions']:,} positions in {clock(facts['train_seconds'])}, "
        f"{facts['skipped_steps']} optimizer steps skipped → {stage.table.url}/model"
    )
