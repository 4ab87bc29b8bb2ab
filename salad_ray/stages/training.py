"""What the stages that train share: their jobs, and how the tables of one Train job are made and told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from salad_ray.config import Config
from salad_ray.console import clock, say
from salad_ray.distill.budget import Budget, plans_of
from salad_ray.distill.checkpoints import checkpoint_at
from salad_ray.distill.logger import where_curves_are
from salad_ray.distill.trainer import Job, checkpoints_url, train
from salad_ray.flow import Step
from salad_ray.model.speech_lm import EncoderSpec
from salad_ray.names import FEATURES, NATURAL, PASSAGES, TEXT, TRUNK
from salad_ray.report.card import model_card, speech_data, text_alone
from salad_ray.runs import Run
from salad_ray.stages.common import Stage, teacher_of
from salad_ray.stages.ray_cluster import start_ray
from salad_ray.tables import Table, read_json


@dataclass(frozen=True)
class Training:
    """What a step that trains does."""

    stage: Stage
    job: Job
    plan: str
    """What it will do, for the log."""
    facts: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """Those of the manifest, from those of the job (`train`)."""

    def promise(self) -> dict[str, Any]:
        """What is known of the manifest before it is written."""
        return read_json(f"{self.stage.table.url}/begun.json") or {}

    def finish(self, result: dict[str, Any]) -> None:
        """Write the manifest, with the facts of the job and of all its starts."""
        url, facts = self.stage.table.url, self.facts(result)
        starts = read_json(f"{url}/starts.json") or {"starts": []}
        self.stage.finish(**facts | {"seconds": round(facts["seconds"], 2), "starts": starts["starts"]})
        skipped = f", {facts['skipped_steps']} optimizer steps skipped" if facts["skipped_steps"] else ""
        told = f"{facts['num_positions']:,} positions in {clock(facts['train_seconds'])}{skipped}"
        say(f"{self.job.name}: {told} → {url}{'/model' if self.job.exports else ''}")


AheadTrainings = Mapping[str, Training]
"""Label of a table → the training that makes it before, on the same workers."""


def begun_trainings(
    batch: Sequence[Step], training_of: Callable[[Step, AheadTrainings], Training | None]
) -> list[Training]:
    """The trainings that are missing, each begun, so that the next can refer to what it will make."""
    ahead: dict[str, Training] = {}
    for step in batch:
        training = training_of(step, ahead)
        if training is not None:
            training.stage.begin()
            ahead[training.stage.table.label] = training
    return list(ahead.values())


def run_trainings(config: Config, trainings: Sequence[Training]) -> None:
    """One after the other in one Train job. Those before one that fails are finished. Raises as `train`."""
    if not trainings:
        return
    start_ray(config)
    for training in trainings:
        say(f"{training.job.name}: {training.plan}; curves: {where_curves_are(training.stage.table.url)}")
    for training, result in zip(trainings, train([each.job for each in trainings]), strict=True):
        training.finish(result)


def missing(run: Run, step: Step, ahead: AheadTrainings) -> Stage | None:
    """The making of a step's table, unless it is done."""
    stage = Stage.of(run, step, ahead=ahead)
    return None if stage.done_already() else stage


def training_tables(run: Run, step: Step) -> dict[str, tuple[Table, Table]]:
    """Set → plan and what it refers to, of the plans that a training is made from."""
    plans = plans_of(run, step)
    return {name: (plan, run.table(name, PASSAGES if name == TEXT else FEATURES)) for name, plan in plans.items()}


def stage1_job(run: Run, stage: Stage, num_steps: int, shares: dict[str, float]) -> Job:
    """A training on rows of Stage I, of these shares, that begins with the teacher's weights."""
    tables = training_tables(run, stage.step)
    natural = tables.pop(NATURAL)
    return Job(
        run.config,
        stage.table,
        natural,
        teacher_of(run),
        EncoderSpec(**stage.inputs[natural[1].label]["encoder"]),
        run.config.distill,
        num_steps,
        others=tables,
        shares=shares,
    )


def branch_job(run: Run, stage: Stage, budget: Budget, num_steps: int, alpha: float, ahead: AheadTrainings) -> Job:
    """A training that goes on from this run's checkpoint of the trunk, with the rows that follow, to a model.

    Args:
        alpha: of its loss, Eq. (3).

    Raises:
        TableError: the trunk has no such checkpoint, and is not trained before it in the same job.
    """
    config, trunk = run.config, run.labelled(TRUNK)
    start = (checkpoints_url(trunk), budget.branch_step)
    if trunk.label not in ahead:
        checkpoint_at(*start)
    job = stage1_job(run, stage, num_steps, budget.stage1_shares)
    return replace(
        job,
        settings=config.distill.model_copy(update={"alpha": alpha}),
        card=model_card(
            job.name,
            job.teacher,
            asdict(job.encoder),
            speech_data(run, [name for name in (NATURAL, *job.others) if name != TEXT]),
            alpha,
            config.model.adapter.stride,
            config.distill.word_ends,
            text_alone(config.ingest.model_dump()) if TEXT in job.others else (),
        ),
        start=start,
        first_row=budget.branch_step * config.pack.rows_per_lane,
    )
