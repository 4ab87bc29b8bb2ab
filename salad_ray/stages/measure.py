"""`measure`: forgetting, misalignment and distillation loss of a model on held-out passages."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from salad_ray.config import PROTOCOLS, Config, Protocol
from salad_ray.distill.step import DTYPES
from salad_ray.evaluation.misalignment import measure_batch, summarise
from salad_ray.evaluation.protocols import HeldOut, held_out, read_by
from salad_ray.flow import Step
from salad_ray.model.speech_lm import EncoderSpec, SpeechLM, load_text_lm
from salad_ray.names import MEASURE
from salad_ray.runs import Run
from salad_ray.sequences.batch import collate, sample_of
from salad_ray.sequences.interleave import Segment
from salad_ray.sequences.packing import pack
from salad_ray.stages.common import Ahead, Stage, Work, teacher_of
from salad_ray.stages.shards import ShardPart, StageError
from salad_ray.tables import Features, Measurement, Reject, Table, Totals, local_folder, to_arrow


def work(run: Run, step: Step, ahead: Ahead) -> Work:
    """`<set>/measurements_<system>`; of the probe set only what Stage I makes of it."""
    stage = Stage.of(run, step, ahead=ahead)
    _, features, *trained = step.reads
    manifest, teacher = stage.inputs[features], teacher_of(run)
    model = f"{run.labelled(trained[0]).url}/model" if trained else None
    worker = partial(MeasureShard, run.config, step.system, teacher, run.labelled(features), manifest["encoder"], model)
    return Work(stage, {shard: shard for shard in manifest["shards"]}, worker, run.config.measure.num_gpus)


class MeasureShard:
    """The model and its teacher; scores the `split=test` utterances of a feature shard by every protocol.

    An input is an utterance under a protocol, so that one that only `whole` cannot use is a reject. Utterances without
    word times are no input of `whole`; the manifest's totals count them.
    """

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
            self.teacher = load_text_lm(path, revision, self.dtype, attention, config.pack.context).to(self.device)
            if model is None:
                spec = EncoderSpec(**encoder)
                student = SpeechLM.from_teacher(
                    path, revision, config.model.adapter, spec, config.seed, self.dtype, attention, config.pack.context
                )
        if model is not None:
            with local_folder(model) as path:
                student = SpeechLM.from_pretrained(path, self.dtype, attention)
        self.student = student.eval().to(self.device)

    def __call__(self, shard: str) -> Iterator[ShardPart]:
        config = self.config
        utterances: list[Features] = self.features.read_where(Features, shard, "split", ["test"])
        passages, left_out = held_out(utterances, self.student.tokenizer, config.measure, config.pack.context)
        timed = [passage for passage in passages if not passage.units.by_utterance]
        untimed = len(utterances) - len(left_out) - sum(len(passage.utterances) for passage in timed)
        stride = self.student.config.adapter.stride
        measured: list[Measurement] = []
        rejects = [Reject(MEASURE, key, f"{protocol}: {reason}") for protocol in PROTOCOLS for key, reason in left_out]
        for protocol in PROTOCOLS:
            of_protocol = timed if protocol == "whole" else passages
            samples, unusable = read_by(protocol, of_protocol, config.measure, config.pack.context, stride)
            rejects += [Reject(MEASURE, key, reason) for key, reason in unusable]
            measured += self._measure(protocol, samples)
        if rejects and config.strict:
            raise StageError(f"measure: {rejects[0].key}: {rejects[0].reason}")
        num_input = len(PROTOCOLS) * len(utterances) - untimed
        totals: Totals = {"num_untimed": untimed}
        yield ShardPart(to_arrow(Measurement, measured), num_input, num_input - len(rejects), rejects, totals)

    def _measure(self, protocol: Protocol, samples: list[tuple[HeldOut, Segment]]) -> list[Measurement]:
        context, size = self.config.pack.context, self.config.measure.batch_rows
        rows = pack([(len(segment.token_ids), len(segment.teacher_ids)) for _, segment in samples], context)
        measured: list[Measurement] = []
        for start in range(0, len(rows), size):
            chosen = [[samples[i] for i in row] for row in rows[start : start + size]]
            batch = collate(
                [[sample_of(segment, passage.utterances) for passage, segment in row] for row in chosen], context
            )
            values = measure_batch(self.student, self.teacher, batch.to(self.device, self.dtype))
            passages = [(passage.key, passage.source, passage.domain) for row in chosen for passage, _ in row]
            measured += summarise(self.system, protocol, values, passages, self.config.measure.distance_bins)
        return measured
