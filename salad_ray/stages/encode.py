"""`encode`: utterances → features of the frozen speech encoder, one shard for each shard of utterances."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from salad_ray.config import Config
from salad_ray.flow import Step
from salad_ray.model.encoder import encode_in_batches, load_encoder
from salad_ray.runs import Run
from salad_ray.sequences.batch import store_frames
from salad_ray.speech.audio import load_utterance
from salad_ray.speech.augment import augment, distort
from salad_ray.stages.common import TRAINED_ON, Ahead, Stage, Work, condition_of
from salad_ray.stages.shards import ShardPart, StageError, WindowWorker, keep_or_reject
from salad_ray.tables import Features, Table, Utterance, stable_hash, to_arrow

WINDOW_BATCHES = 4
"""Batches of audio in memory at once; they are sorted by length within."""


def sources(config: Config, step: Step) -> dict[str, Any]:
    """The encoder, loaded here too, so that a wrong path ends in one sentence."""
    encoder = load_encoder(config.encode, "cpu")
    spec = {name: getattr(encoder, name) for name in ("name", "sampling_rate", "frame_rate", "dim", "revision")}
    return {"encoder": spec | {"path": config.encode.path}, "weights": encoder.weights}


def work(run: Run, step: Step, ahead: Ahead) -> Work:
    """`<set>/features` from utterances, aligned ones where they were."""
    stage = Stage.of(run, step, ahead=ahead)
    [(label, utterances)] = stage.inputs.items()
    facts = run.facts_of(step)
    worker = partial(EncodeShard, run.config, step.set, run.labelled(label), facts["weights"])
    items = {name: name for name in utterances["shards"]}
    return Work(stage, items, worker, run.config.encode.num_gpus, {"encoder": facts["encoder"]})


class EncodeShard(WindowWorker):
    def __init__(self, config: Config, set_name: str, utterances: Table, weights: str) -> None:
        self.config, self.is_benchmark = config, set_name == "benchmark"
        self.utterances, self.weights = utterances, weights
        self.encoder = load_encoder(config.encode, "cuda" if config.encode.num_gpus else "cpu")

    def __call__(self, shard: str) -> Iterator[ShardPart]:
        if self.encoder.weights != self.weights:
            raise StageError(
                f"encode: {self.config.encode.path} holds other weights here than where the run was started"
            )
        rows = (heard for row in self.utterances.iterate(Utterance, shard) for heard in self._conditions(row))
        for window in self.windows(
            rows, lambda row: row.utt_id, WINDOW_BATCHES * self.config.encode.batch_secs, lambda row: row.duration_secs
        ):
            yield self._encode(window)

    def _conditions(self, row: Utterance) -> Iterator[Utterance]:
        """The utterance, and of a benchmark's also once for every other condition that it is to be heard under."""
        yield row
        if self.is_benchmark and condition_of(row.utt_id)[1] == "clean":
            for condition in self.config.evaluate.conditions:
                if condition not in ("clean", "voice"):
                    yield replace(row, utt_id=f"{row.utt_id}@{condition}")

    def _encode(self, window: list[Utterance]) -> ShardPart:
        strict = self.config.strict
        heard, rejects = keep_or_reject("encode", window, lambda row: row.utt_id, self._load, strict)
        features = encode_in_batches(self.encoder, [audio for _, audio in heard], self.config.encode.batch_secs)
        encoded = [(row, frames) for (row, _), frames in zip(heard, features, strict=True)]
        kept, unusable = keep_or_reject("encode", encoded, lambda pair: pair[0].utt_id, self._to_row, strict)
        secs = {row.utt_id: len(audio) / self.encoder.sampling_rate for row, audio in heard}
        hours = {
            "hours": sum(secs[row.utt_id] for row in kept) / 3600,
            "training hours": sum(secs[row.utt_id] for row in kept if row.split != "test") / 3600,
        }
        for row in kept:
            if row.split != "test":
                name = f"{TRAINED_ON}{row.domain}"
                hours[name] = hours.get(name, 0.0) + secs[row.utt_id] / 3600
        return ShardPart(to_arrow(Features, kept), len(window), len(kept), rejects + unusable, hours)

    def _load(self, row: Utterance) -> tuple[Utterance, np.ndarray]:
        """The audio, and the row with the word times that hold in it.

        Offset and duration stay those of the cut, by which neighbours are known; how long the audio is that is heard,
        the number of frames tells.
        """
        audio = load_utterance(row, self.encoder.sampling_rate)
        _, condition = condition_of(row.utt_id) if self.is_benchmark else ("", "clean")
        if condition not in ("clean", "voice"):
            rng = np.random.default_rng(stable_hash(self.config.seed, row.utt_id))
            return row, distort(audio, self.encoder.sampling_rate, condition, rng)
        settings = self.config.encode.augment
        if not settings.share or row.split != "train":
            return row, audio
        rng = np.random.default_rng(stable_hash(self.config.seed, "augment", row.utt_id))
        audio, words, _ = augment(audio, self.encoder.sampling_rate, row.words, settings, rng)
        return replace(row, words=words), audio

    def _to_row(self, pair: tuple[Utterance, np.ndarray]) -> Features:
        row, frames = pair
        features, scales = store_frames(frames, self.config.encode.storage)
        return Features(
            utt_id=row.utt_id,
            recording_id=row.recording_id,
            offset_secs=row.offset_secs,
            duration_secs=row.duration_secs,
            domain=row.domain,
            split=row.split,
            text=row.text,
            words=row.words,
            num_frames=len(frames),
            frame_rate=self.encoder.frame_rate,
            dim=self.encoder.dim,
            features=features,
            scales=scales,
            order=row.order,
            source=row.source,
        )
