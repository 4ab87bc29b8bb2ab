"""`stage1`: distil the frozen text LLM into the speech-adapted one over the natural speech's plan."""

from __future__ import annotations

import time

from salad_ray.config import Config, identity
from salad_ray.console import clock, say
from salad_ray.distill.logger import where_curves_are
from salad_ray.distill.step import decay_start
from salad_ray.distill.trainer import Job, TrainingStopped, train
from salad_ray.model.speech_lm import EncoderSpec
from salad_ray.report.card import model_card, speech_data
from salad_ray.stages.common import Stage, finished, training_budget
from salad_ray.stages.ray_cluster import start_ray
from salad_ray.stages.shards import StageError
from salad_ray.tables import Table, read_json


def run(config: Config) -> None:
    """Write `stage1/model` and its manifest, with the training curve."""
    teacher = finished(Table(config.run_dir, "", "teacher"), "teacher")
    features = finished(Table(config.run_dir, "natural", "features"), "encode")
    plan = finished(Table(config.run_dir, "natural", "plan"), "pack")
    if plan["budget"] != training_budget(config):
        raise StageError("stage1: natural/plan was made for another number of steps; run `salad pack CONFIG` first")
    inputs = {"teacher": teacher, "features": features, "plan": plan}
    stage = Stage(
        "stage1",
        Table(config.run_dir, "", "stage1"),
        identity(config, "distill", "model.adapter", "pack.rows_per_lane", "seed"),
        {name: manifest["version"] for name, manifest in inputs.items()},
    )
    if stage.is_done():
        say(f"stage1: done already, {stage.table.url}")
        return
    started = time.monotonic()
    stage.begin()
    start_ray(config)
    say(f"stage1: training {plan['num_steps']:,} steps; curves: {where_curves_are(stage.table.url)}")
    card = model_card("stage1", teacher, features["encoder"], speech_data(config, ("natural",)), config.distill.alpha)
    encoder = EncoderSpec(**features["encoder"])
    trunk = decay_start(plan["num_steps"], config.distill.decay_share)  # Stage II goes on from there
    job = Job(config, "stage1", teacher, encoder, config.distill, plan["num_steps"], card, branch_points=(trunk,))
    try:
        facts = train(job)
    except TrainingStopped as error:
        raise StageError(f"stage1: {error}") from None
    starts = read_json(f"{stage.table.url}/starts.json") or {"starts": []}
    stage.finish(**facts, seconds=round(time.monotonic() - started, 2), starts=starts["starts"])
    say(
        f"stage1: {facts['num_positions']:,} positions in {clock(facts['train_seconds'])}, "
        f"{facts['skipped_steps']} optimizer steps skipped → {stage.table.url}/model"
    )
