"""`measure`: forgetting, misalignment and distillation loss of a model on held-out passages."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from salad_ray.config import Config
from salad_ray.distill.step import DTYPES
from salad_ray.evaluation.misalignment import measure_batch, summarise
from salad_ray.flow import Step
from salad_ray.model.speech_lm import EncoderSpec, SpeechLM, load_text_lm
from salad_ray.runs import Run
from salad_ray.sequences.batch import collate
from salad_ray.sequences.loader import samples_of
from salad_ray.sequences.plan import plan_lane
from salad_ray.stages.common import Ahead, Stage, Work, teacher_of
from salad_ray.stages.shards import ShardPart, StageError
from salad_ray.tables import Features, Measurement, PlanRow, Table, local_folder, to_arrow

UNTRAINED = "untrained"


def work(run: Run, step: Step, ahead: Ahead) -> Work:
    """`<set>/measurements_<system>`; of the probe set only what Stage I makes of it."""
    stage = Stage.of(run, step, ahead=ahead)
    _, features, *trained = step.reads
    manifest = stage.inputs[features]
    worker = partial(
        MeasureShard,
        run.config,
        trained[0] if trained else UNTRAINED,
        teacher_of(run),
        run.labelled(features),
        manifest["encoder"],
        f"{run.labelled(trained[0]).url}/model" if trained else None,
    )
    return Work(stage, {shard: shard for shard in manifest["shards"]}, worker, run.config.measure.num_gpus)


class MeasureShard:
    """The model and its teacher; scores the `split=test` utterances of a feature shard, interleaved as in training."""

    def __init__(
        self,
        config: Config,
        system: str,
        teacher: dict[str, Any],
        features: Table,
        encoder: dict[str, Any],
        model: str | None,
    ) -> None:
        self.config, self.system, self.features = config, system, features
        self.device = "cuda" if config.measure.num_gpus else "cpu"
        self.dtype, attention = DTYPES[config.distill.precision], config.model.attention
        revision = teacher["revision"]
        with local_folder(teacher["path"]) as path:
            self.teacher = load_text_lm(path, revision, self.dtype, attention).to(self.device)
            if model is None:
                spec = EncoderSpec(**encoder)
                student = SpeechLM.from_teacher(
                    path, revision, config.model.adapter, spec, config.seed, self.dtype, attention
                )
        if model is not None:
            with local_folder(model) as path:
                student = SpeechLM.from_pretrained(path, self.dtype, attention)
        self.student = student.eval().to(self.device)
        self.stride = self.student.config.adapter.stride
        self.pack = config.pack.model_copy(update={"whole_share": 0.0})  # what is measured does not follow training

    def __call__(self, shard: str) -> Iterator[ShardPart]:
        config = self.config
        utterances: list[Features] = self.features.read_where(Features, shard, "split", ["test"])
        num_input = len(utterances)
        rows, rejects = plan_lane(
            lambda _: utterances,
            [shard],
            self.student.tokenizer,
            self.pack,
            lane=0,
            epoch=0,
            seed=config.seed,
            split="test",
            stride=self.stride,
        )
        if rejects and config.strict:
            raise StageError(f"measure: {rejects[0].key}: {rejects[0].reason}")
        size = config.measure.batch_rows
        scored = [self._measure(rows[i : i + size], utterances) for i in range(0, len(rows), size)]
        measured = [measurement for part in scored for measurement in part]
        yield ShardPart(to_arrow(Measurement, measured), num_input, num_input - len(rejects), rejects)

    def _measure(self, rows: list[PlanRow], utterances: list[Features]) -> list[Measurement]:
        segments = [[[utterances[i] for i in segment.rows] for segment in row.segments] for row in rows]
        samples = [
            samples_of(row.segments, passages, self.student.tokenizer, self.stride)
            for row, passages in zip(rows, segments, strict=True)
        ]
        batch = collate(samples, self.config.pack.context).to(self.device, self.dtype)
        values = measure_batch(self.student, self.teacher, batch)
        passages = [(passage[0].utt_id, passage[0].domain) for row in segments for passage in row]
        return summarise(self.system, values, passages, self.config.measure.distance_bins)
