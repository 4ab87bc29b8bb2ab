"""`embed`: web passages → sentence embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from salad_ray.config import Config
from salad_ray.console import say
from salad_ray.flow import Step
from salad_ray.names import EMBED
from salad_ray.runs import Run
from salad_ray.stages.common import Ahead, Stage, Work
from salad_ray.stages.shards import ShardPart, StageError, WindowWorker, keep_or_reject
from salad_ray.tables import BadInput, Embedding, Passage, Table, file_exists, to_arrow
from salad_ray.text.embedding import SentenceEmbedder, TfidfEmbedder

WINDOW_BATCHES = 32
"""Batches of passages in memory at once; they are sorted by length within."""


def sources(config: Config, step: Step) -> dict[str, Any]:
    """The sentence model, loaded here too, so that a wrong path ends in one sentence; TF-IDF is fitted on the text."""
    if config.embed.embedder == "tfidf":
        return {}
    embedder = load_embedder(config, "", "cpu")
    longest = config.ingest.passages.max_word_pieces
    if embedder.max_pieces is not None and embedder.max_pieces < longest:
        say(
            f"embed: {config.embed.path} reads {embedder.max_pieces} word pieces, and passages have up to {longest}; "
            f"set ingest.passages.max_word_pieces={embedder.max_pieces}"
        )
    return {"weights": embedder.weights}


def work(run: Run, step: Step, ahead: Ahead) -> Work:
    """`web/embeddings` from `web/passages`."""
    stage = Stage.of(run, step, ahead=ahead)
    [(label, manifest)] = stage.inputs.items()
    passages, fitted = run.labelled(label), tfidf_url(stage.table)
    if run.config.embed.embedder == "tfidf" and not stage.is_done():
        stage.begin()
        fit_tfidf(run.config, passages, list(manifest["shards"]), fitted)
    worker = partial(EmbedShard, run.config, passages, fitted, run.facts_of(step).get("weights"))
    return Work(stage, {name: name for name in manifest["shards"]}, worker, run.config.embed.num_gpus)


def tfidf_url(embeddings: Table) -> str:
    return f"{embeddings.url}/tfidf"


def fit_tfidf(config: Config, passages: Table, shards: Sequence[str], url: str) -> None:
    """Fit on the first shards' passages: they were dealt by hash, so any of them is a fair sample."""
    if file_exists(f"{url}/{TfidfEmbedder.LAST_FILE}"):
        return
    rows = (row.text for shard in shards for row in passages.iterate(Passage, shard))
    texts = list(islice(rows, config.embed.sample_passages))
    TfidfEmbedder.fit(texts, config.embed.dim, config.seed).save(url)
    say(f"embed: TF-IDF and SVD fitted on {len(texts):,} passages")


def load_embedder(config: Config, fitted: str, device: str) -> SentenceEmbedder | TfidfEmbedder:
    """The configured embedder; `fitted` is where TF-IDF was saved."""
    settings = config.embed
    if settings.embedder == "tfidf":
        return TfidfEmbedder.load(fitted)
    assert settings.path is not None
    return SentenceEmbedder(settings.path, settings.revision, device, settings.batch_size)


class EmbedShard(WindowWorker):
    def __init__(self, config: Config, passages: Table, fitted: str, weights: str | None) -> None:
        self.config, self.passages = config, passages
        self.embedder = load_embedder(config, fitted, "cuda" if config.embed.num_gpus else "cpu")
        if weights is not None and self.embedder.weights != weights:
            raise StageError(f"embed: {config.embed.path} holds other weights here than where the run was started")

    def __call__(self, shard: str) -> Iterator[ShardPart]:
        rows = self.passages.iterate(Passage, shard)
        for window in self.windows(rows, lambda row: row.passage_id, WINDOW_BATCHES * self.config.embed.batch_size):
            vectors = self.embedder.encode([row.text for row in window])
            pairs = list(zip(window, vectors, strict=True))
            kept, rejects = keep_or_reject(EMBED, pairs, lambda pair: pair[0].passage_id, _row, self.config.strict)
            yield ShardPart(to_arrow(Embedding, kept), len(window), len(kept), rejects)


def _row(pair: tuple[Passage, np.ndarray]) -> Embedding:
    passage, vector = pair
    if not np.isfinite(vector).all():
        raise BadInput("its embedding is not finite")
    if not vector.any():
        raise BadInput("no word of it is known to the embedder")
    return Embedding(
        passage_id=passage.passage_id,
        embedding=vector.astype(np.float16).tobytes(),
        num_chars=len(passage.text),
        split=passage.split,
    )
