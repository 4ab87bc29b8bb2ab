"""`stage2`: go on from before Stage I's decay, with natural and actively selected speech mixed."""

from __future__ import annotations

import time
from typing import Any

from salad_ray.config import Config, identity
from salad_ray.console import clock, say
from salad_ray.distill.checkpoints import checkpoint_at
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
    """Write `stage2/model`; with stage2.control also `control/model`, which hears natural speech alone."""
    if config.stage2 is None:
        raise StageError("stage2: the config has no such section; add stage2={} for its defaults")
    _train(config, "stage2", ("natural", "active"))
    if config.stage2.control:
        _train(config, "control", ("natural",))


def _train(config: Config, name: str, sets: tuple[str, ...]) -> None:
    inputs = _inputs(config, sets)
    stage = Stage(
        name,
        Table(config.run_dir, "", name),
        identity(config, "distill", "stage2", "pack.rows_per_lane", "seed"),
        {label: manifest["version"] for label, manifest in inputs.items()},
    )
    if stage.is_done():
        say(f"{name}: done already, {stage.table.url}")
        return
    started = time.monotonic()
    stage.begin()
    start_ray(config)
    job = _job(config, name, sets, inputs)
    share = f"{job.active_share:.1%} of the rows active speech" if job.active_share else "natural speech alone"
    say(f"{name}: training {job.num_steps:,} steps, {share}; curves: {where_curves_are(stage.table.url)}")
    try:
        facts = train(job)
    except TrainingStopped as error:
        raise StageError(f"{name}: {error}") from None
    starts = read_json(f"{stage.table.url}/starts.json") or {"starts": []}
    stage.finish(
        **facts,
        seconds=round(time.monotonic() - started, 2),
        starts=starts["starts"],
        begun_from=job.start and job.start.url,
    )
    say(f"{name}: {facts['num_positions']:,} positions in {clock(facts['train_seconds'])} → {stage.table.url}/model")


def _inputs(config: Config, sets: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Manifests of all that is read."""
    tables = {"teacher": Table(config.run_dir, "", "teacher"), "stage1": Table(config.run_dir, "", "stage1")}
    writers = {"teacher": "teacher", "stage1": "stage1", "features": "encode", "plan": "pack"}
    tables |= {f"{name}/{table}": Table(config.run_dir, name, table) for name in sets for table in ("features", "plan")}
    inputs = {label: finished(table, writers[table.name]) for label, table in tables.items()}
    stale = [f"{name}/plan" for name in sets if inputs[f"{name}/plan"]["budget"] != training_budget(config)]
    if stale:
        where = stale[0].removesuffix("/plan")
        raise StageError(
            f"stage2: {stale[0]} was made for another number of steps; run `salad pack CONFIG set={where}`"
        )
    return inputs


def _job(config: Config, name: str, sets: tuple[str, ...], inputs: dict[str, dict[str, Any]]) -> Job:
    assert config.stage2 is not None
    teacher, features, plan = (inputs[label] for label in ("teacher", "natural/features", "natural/plan"))
    trunk = decay_start(plan["num_steps"], config.distill.decay_share)
    changes = {"alpha": config.stage2.alpha, "warmup_share": 0.0, "decay_share": config.stage2.decay_share}
    card = model_card(name, teacher, features["encoder"], speech_data(config, sets), config.stage2.alpha)
    return Job(
        config,
        name,
        teacher,
        EncoderSpec(**features["encoder"]),
        config.distill.model_copy(update=changes),
        plan["stage2_steps"],
        card,
        start=checkpoint_at(f"{Table(config.run_dir, '', 'stage1').url}/checkpoints", trunk),
        first_row=trunk * config.pack.rows_per_lane,
        active_share=inputs["active/plan"]["active_share"] if "active" in sets else 0.0,
    )
