"""`stage1`: distil the frozen text LLM into the speech-adapted one over the natural speech's plan."""

from __future__ import annotations

from salad_ray.config import Config, identity
from salad_ray.console import clock, say
from salad_ray.distill.trainer import Job, TrainingStopped, train
from salad_ray.model.speech_lm import EncoderSpec
from salad_ray.report.card import SpeechData, model_card
from salad_ray.speech.corpora import attributions
from salad_ray.stages.common import Stage, StageError, finished, start_ray, training_budget
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
        {name: manifest["fingerprint"] for name, manifest in inputs.items()},
    )
    if stage.is_done():
        say(f"stage1: done already, {stage.table.url}")
        return
    stage.begin()
    start_ray(config)
    say(f"stage1: training {plan['num_steps']:,} steps; curves: `tensorboard --logdir {stage.table.url}/tensorboard`")
    card = model_card("stage1", teacher, features["encoder"], data_of(config), config.distill.alpha)
    job = Job(config, "stage1", teacher, EncoderSpec(**features["encoder"]), plan["num_steps"], card)
    try:
        facts = train(job)
    except TrainingStopped as error:
        raise StageError(f"stage1: {error}") from None
    starts = read_json(f"{stage.table.url}/starts.json") or {"starts": []}
    stage.finish(**facts, starts=starts["starts"])
    say(
        f"stage1: {facts['num_positions']:,} positions in {clock(facts['train_seconds'])}, "
        f"{facts['skipped_steps']} optimizer steps skipped → {stage.table.url}/model"
    )


def data_of(config: Config) -> list[SpeechData]:
    """The training speech: hours of each corpus and licence, and whom to name for it."""
    manifest = Table(config.run_dir, "natural", "utterances").manifest() or {}
    credits = attributions(config.ingest.corpora)
    rows = []
    for key, hours in manifest.get("totals", {}).items():
        corpus, license = key.removeprefix("hours of ").split(", ", 1)
        rows.append(SpeechData(corpus, license, hours, credits.get(corpus, "")))
    return rows
