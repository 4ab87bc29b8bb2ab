"""`measure`: forgetting, misalignment and distillation loss of a model on held-out passages."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from salad_ray.config import Config, SetName, identity
from salad_ray.console import say
from salad_ray.distill.step import DTYPES
from salad_ray.evaluation.misalignment import measure_batch, summarise
from salad_ray.model.speech_lm import EncoderSpec, SpeechLM, load_text_lm
from salad_ray.sequences.batch import collate
from salad_ray.sequences.loader import samples_of
from salad_ray.sequences.plan import plan_lane
from salad_ray.stages.common import Stage, Work, finished, run_together
from salad_ray.stages.shards import ShardPart, StageError
from salad_ray.tables import Features, Measurement, PlanRow, Table, local_folder, to_arrow

SYSTEMS = ("untrained", "stage1", "stage2", "control")


def run(config: Config) -> None:
    """Write `<set>/measurements_<system>` for every model there is; of the probe set, only what Stage I makes of it.

    A set that is not measured stands for those that are.
    """
    if config.set == "probe":
        run_together(config, _works(config, "probe", "stage1"), config.measure.num_gpus)
        return
    sets = (config.set,) if config.set in config.measured_sets else config.measured_sets
    works = [work for name in sets for system in SYSTEMS for work in _works(config, name, system)]
    run_together(config, works, config.measure.num_gpus)


def _works(config: Config, name: SetName, system: str) -> list[Work]:
    """Measuring one system on one set; none if the system was not trained yet."""
    teacher = finished(Table(config.run_dir, "", "teacher"), "teacher")
    features = finished(Table(config.run_dir, name, "features"), "encode")
    trained = Table(config.run_dir, "", system).manifest()
    if system != "untrained" and trained is None:
        if system == "stage1":
            say("measure: no stage1 model yet; run `salad stage1 CONFIG` to have one")
        return []
    inputs = {} if trained is None else {"model": trained["version"]}
    keys = ["measure", "distill.precision", "pack.context", "pack.text_words", "pack.speech_words", "seed"]
    stage = Stage(
        "measure",
        Table(config.run_dir, name, f"measurements_{system}"),
        identity(config, *keys, *(["model.adapter"] if trained is None else [])),
        inputs | {"teacher": teacher["version"], "features": features["version"]},
    )
    items = {shard: shard for shard in features["shards"]}
    return [
        Work(stage, items, partial(MeasureShard, config.model_copy(update={"set": name}), system, teacher, features))
    ]


class MeasureShard:
    """The model and its teacher; scores the `split=test` utterances of a feature shard, interleaved as in training."""

    def __init__(self, config: Config, system: str, teacher: dict[str, Any], features: dict[str, Any]) -> None:
        self.config, self.system = config, system
        self.device = "cuda" if config.measure.num_gpus else "cpu"
        self.dtype, attention = DTYPES[config.distill.precision], config.model.attention
        revision, encoder = teacher["revision"], EncoderSpec(**features["encoder"])
        with local_folder(teacher["path"]) as path:
            self.teacher = load_text_lm(path, revision, self.dtype, attention).to(self.device)
            if system == "untrained":
                model = SpeechLM.from_teacher(
                    path, revision, config.model.adapter, encoder, config.seed, self.dtype, attention
                )
        if system != "untrained":
            with local_folder(f"{Table(config.run_dir, '', system).url}/model") as path:
                model = SpeechLM.from_pretrained(path, self.dtype, attention)
        self.student = model.eval().to(self.device)

    def __call__(self, shard: str) -> Iterator[ShardPart]:
        config = self.config
        features = Table(config.run_dir, config.set, "features")
        utterances: list[Features] = features.read_where(Features, shard, "split", ["test"])
        num_input = len(utterances)
        rows, rejects = plan_lane(
            lambda _: utterances,
            [shard],
            self.student.tokenizer,
            config.pack,
            lane=0,
            epoch=0,
            seed=config.seed,
            split="test",
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
            samples_of(row.segments, passages, self.student.tokenizer)
            for row, passages in zip(rows, segments, strict=True)
        ]
        batch = collate(samples, self.config.pack.context).to(self.device, self.dtype)
        values = measure_batch(self.student, self.teacher, batch)
        passages = [(passage[0].utt_id, passage[0].domain) for row in segments for passage in row]
        return summarise(self.system, values, passages, self.config.measure.distance_bins)
