"""`encode`: utterances → features of the frozen speech encoder, one shard for each shard of utterances."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from salad_ray.config import Config
from salad_ray.flow import Step
from salad_ray.model.encoder import encode_in_batches, load_encoder
from salad_ray.names import BENCHMARK, ENCODE
from salad_ray.runs import Run
from salad_ray.sequences.batch import store_frames
from salad_ray.speech.audio import load_utterance
from salad_ray.speech.augment import augment, distort
from salad_ray.stages.common import Ahead, Stage, Work, condition_of
from salad_ray.stages.shards import ShardPart, StageError, WindowWorker, keep_or_reject
from salad_ray.tables import Features, Reject, Table, Totals, Utterance, stable_hash, to_arrow

WINDOW_BATCHES = 4
"""Batches of audio in a window, sorted by length within; three windows are in memory at once."""

Heard = tuple[Utterance, np.ndarray]
"""A row, with the word times that hold in what is heard, and its audio."""
Encoded = tuple[Utterance, np.ndarray, float]
"""The row, its frames (S, C), and how many seconds were heard."""


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
    settings = run.config.encode
    return Work(stage, items, worker, settings.num_gpus, settings.num_threads, {"encoder": facts["encoder"]})


class EncodeShard(WindowWorker):
    def __init__(self, config: Config, set_name: str, utterances: Table, weights: str) -> None:
        self.config, self.is_benchmark = config, set_name == BENCHMARK
        self.utterances, self.weights = utterances, weights
        self.encoder = load_encoder(config.encode, "cuda" if config.encode.num_gpus else "cpu")

    def __call__(self, shard: str) -> Iterator[ShardPart]:
        if self.encoder.weights != self.weights:
            raise StageError(
                f"encode: {self.config.encode.path} holds other weights here than where the run was started"
            )
        rows = (heard for row in self.utterances.iterate(Utterance, shard) for heard in self._conditions(row))
        limit = WINDOW_BATCHES * self.config.encode.batch_secs
        windows = self.windows(rows, lambda row: row.utt_id, limit, lambda row: row.duration_secs)
        for encoded in self.overlapped(windows, self._load, self._encode, self.config.encode.num_threads):
            yield self._part(*encoded)

    def _conditions(self, row: Utterance) -> Iterator[Utterance]:
        """The utterance, and of a benchmark's also once for every other condition that it is to be heard under."""
        yield row
        if self.is_benchmark and condition_of(row.utt_id)[1] == "clean":
            for condition in self.config.evaluate.conditions:
                if condition not in ("clean", "voice"):
                    yield replace(row, utt_id=f"{row.utt_id}@{condition}")

    def _encode(self, window: list[Utterance], loading: list[Future[Heard]]) -> tuple[list[Encoded], list[Reject]]:
        pairs = list(zip(window, loading, strict=True))
        heard, rejects = keep_or_reject(
            ENCODE, pairs, lambda pair: pair[0].utt_id, lambda pair: pair[1].result(), self.config.strict
        )
        features = encode_in_batches(self.encoder, [audio for _, audio in heard], self.config.encode.batch_secs)
        rate = self.encoder.sampling_rate
        encoded = [(row, frames, len(audio) / rate) for (row, audio), frames in zip(heard, features, strict=True)]
        return encoded, rejects

    def _part(self, encoded: list[Encoded], rejects: list[Reject]) -> ShardPart:
        strict = self.config.strict
        kept, unusable = keep_or_reject(ENCODE, encoded, lambda each: each[0].utt_id, self._to_row, strict)
        secs = {row.utt_id: secs for row, _, secs in encoded}
        by_domain: dict[str, float] = {}
        for row in kept:
            if row.split != "test":
                by_domain[row.domain] = by_domain.get(row.domain, 0.0) + secs[row.utt_id] / 3600
        hours: Totals = {
            "hours": sum(secs[row.utt_id] for row in kept) / 3600,
            "training_hours": sum(by_domain.values()),
            "training_hours_by_domain": by_domain,
        }
        num_input = len(encoded) + len(rejects)
        return ShardPart(to_arrow(Features, kept), num_input, len(kept), rejects + unusable, hours)

    def _load(self, row: Utterance) -> Heard:
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

    def _to_row(self, encoded: Encoded) -> Features:
        row, frames, _ = encoded
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
