"""`embed`: web passages → sentence embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

import numpy as np

from salad_ray.config import Config, identity
from salad_ray.console import say
from salad_ray.stages.common import Stage, finished, run_shards
from salad_ray.stages.shards import ShardPart, StageError, WindowWorker, keep_or_reject
from salad_ray.tables import BadInput, Embedding, Passage, Table, file_exists, to_arrow
from salad_ray.text.embedding import SentenceEmbedder, TfidfEmbedder

WINDOW_BATCHES = 32
"""Batches of passages in memory at once; they are sorted by length within."""


def run(config: Config) -> None:
    """Write `web/embeddings` from `web/passages`."""
    passages = Table(config.run_dir, "web", "passages")
    manifest = finished(passages, "ingest")
    inputs = {"passages": manifest["version"]}
    if config.embed.embedder == "sentence_transformers":
        embedder = load_embedder(config, "cpu")
        inputs["embedder weights"] = embedder.weights
        longest = config.ingest.passages.max_word_pieces
        if embedder.max_pieces is not None and embedder.max_pieces < longest:
            say(
                f"embed: {config.embed.path} reads {embedder.max_pieces} word pieces, and passages have up to "
                f"{longest}; set ingest.passages.max_word_pieces={embedder.max_pieces}"
            )
    keys = ("embed",) if config.embed.embedder == "sentence_transformers" else ("embed", "seed")
    stage = Stage("embed", Table(config.run_dir, "web", "embeddings"), identity(config, *keys), inputs)
    if config.embed.embedder == "tfidf" and not stage.is_done():
        stage.begin()
        fit_tfidf(config, passages, list(manifest["shards"]))
    items = {name: name for name in manifest["shards"]}
    worker = partial(EmbedShard, config, inputs.get("embedder weights"))
    run_shards(config, stage, items, worker, config.embed.num_gpus)


def tfidf_url(config: Config) -> str:
    return f"{Table(config.run_dir, 'web', 'embeddings').url}/tfidf"


def fit_tfidf(config: Config, passages: Table, shards: Sequence[str]) -> None:
    """Fit on the first shards' passages: they were dealt by hash, so any of them is a fair sample."""
    url = tfidf_url(config)
    if file_exists(f"{url}/{TfidfEmbedder.LAST_FILE}"):
        return
    rows = (row.text for shard in shards for row in passages.iterate(Passage, shard))
    texts = list(islice(rows, config.embed.sample_passages))
    TfidfEmbedder.fit(texts, config.embed.dim, config.seed).save(url)
    say(f"embed: TF-IDF and SVD fitted on {len(texts):,} passages")


def load_embedder(config: Config, device: str) -> SentenceEmbedder | TfidfEmbedder:
    settings = config.embed
    if settings.embedder == "tfidf":
        return TfidfEmbedder.load(tfidf_url(config))
    assert settings.path is not None
    return SentenceEmbedder(settings.path, settings.revision, device, settings.batch_size)


class EmbedShard(WindowWorker):
    def __init__(self, config: Config, weights: str | None) -> None:
        self.config = config
        self.embedder = load_embedder(config, "cuda" if config.embed.num_gpus else "cpu")
        if weights is not None and self.embedder.weights != weights:
            raise StageError(f"embed: {config.embed.path} holds other weights here than where the run was started")
        self.passages = Table(config.run_dir, "web", "passages")

    def __call__(self, shard: str) -> Iterator[ShardPart]:
        rows = self.passages.iterate(Passage, shard)
        for window in self.windows(rows, lambda row: row.passage_id, WINDOW_BATCHES * self.config.embed.batch_size):
            vectors = self.embedder.encode([row.text for row in window])
            pairs = list(zip(window, vectors, strict=True))
            kept, rejects = keep_or_reject("embed", pairs, lambda pair: pair[0].passage_id, _row, self.config.strict)
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
