"""`align`: recorded utterances → the same utterances with word times."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from salad_ray.config import AlignConfig, Config
from salad_ray.flow import Step
from salad_ray.names import ALIGN
from salad_ray.runs import Run
from salad_ray.speech.align import Alignment, PocketsphinxAligner
from salad_ray.speech.audio import load_utterance
from salad_ray.speech.ctc import CTCAligner
from salad_ray.stages.common import Ahead, Stage, Work, count_unsaid
from salad_ray.stages.shards import ShardPart, StageError, WindowWorker, keep_or_reject
from salad_ray.tables import BadInput, Table, Utterance, to_arrow

WINDOW_BATCHES = 4
"""Batches of audio in a window, sorted by length within; three windows are in memory at once."""


def sources(config: Config, step: Step) -> dict[str, Any]:
    """The CTC model, loaded here too, so that a wrong path ends in one sentence; pocketsphinx comes with its own."""
    return {"aligner": load_ctc(config.align, "cpu").facts} if config.align.aligner == "ctc" else {}


def work(run: Run, step: Step, ahead: Ahead) -> Work:
    """`<set>/aligned` from `<set>/utterances`."""
    stage = Stage.of(run, step, ahead=ahead)
    [(label, utterances)] = stage.inputs.items()
    facts = dict(run.facts_of(step))
    worker = partial(AlignShard, run.config, run.labelled(label), facts.get("aligner"))
    items, settings = {name: name for name in utterances["shards"]}, run.config.align
    return Work(stage, items, worker, settings.num_gpus, settings.num_threads, facts)


def load_ctc(settings: AlignConfig, device: str) -> CTCAligner:
    """The CTC model that a config names; raises `ModelError` when its weights cannot be used."""
    assert settings.path is not None, "AlignConfig asks for a path"
    return CTCAligner(settings.path, settings.revision, device, settings.min_score, settings.batch_secs)


class AlignShard(WindowWorker):
    """Args: facts: of the CTC model with which the stage was started; unset: pocketsphinx."""

    def __init__(self, config: Config, utterances: Table, facts: dict[str, Any] | None = None) -> None:
        self.config, self.utterances, self.has_other_weights = config, utterances, False
        settings, device = config.align, "cuda" if config.align.num_gpus else "cpu"
        self.aligner: CTCAligner | PocketsphinxAligner
        if facts is None:
            self.aligner = PocketsphinxAligner(settings.min_score)
        else:  # the commit that was loaded there, wherever its branch is by now
            pinned = settings.model_copy(update={"revision": facts["revision"] or settings.revision})
            self.aligner = load_ctc(pinned, device)
            self.has_other_weights = self.aligner.facts["weights"] != facts["weights"]

    def __call__(self, shard: str) -> Iterator[ShardPart]:
        if self.has_other_weights:
            raise StageError(f"align: {self.config.align.path} holds other weights here than where the run was started")
        rows = self.utterances.iterate(Utterance, shard)
        limit = WINDOW_BATCHES * self.config.align.batch_secs
        windows = self.windows(rows, lambda row: row.utt_id, limit, lambda row: row.duration_secs)
        yield from self.overlapped(windows, self._load, self._align, self.config.align.num_threads)

    def _align(self, window: list[Utterance], loading: list[Future[np.ndarray | None]]) -> ShardPart:
        """Utterances whose corpus gave word times keep them."""
        strict = self.config.strict
        unaligned = [(row, audio) for row, audio in zip(window, loading, strict=True) if row.words is None]
        heard, unreadable = keep_or_reject(
            ALIGN, unaligned, lambda pair: pair[0].utt_id, lambda pair: (pair[0], pair[1].result()), strict
        )
        found = self.aligner.align_batch([audio for _, audio in heard], [row.text for row, _ in heard])
        pairs = [(row, alignment) for (row, _), alignment in zip(heard, found, strict=True)]
        aligned, unfit = keep_or_reject(ALIGN, pairs, lambda pair: pair[0].utt_id, _with_words, strict)
        by_id = {row.utt_id: row for row in aligned}
        kept = [by_id.get(row.utt_id, row) for row in window if row.words is not None or row.utt_id in by_id]
        return ShardPart(to_arrow(Utterance, kept), len(window), len(kept), unreadable + unfit, count_unsaid(aligned))

    def _load(self, row: Utterance) -> np.ndarray | None:
        return None if row.words is not None else load_utterance(row, self.aligner.sampling_rate)


def _with_words(pair: tuple[Utterance, Alignment | BadInput]) -> Utterance:
    row, found = pair
    if isinstance(found, BadInput):
        raise found
    return replace(row, words=found.words, align_score=found.score)
