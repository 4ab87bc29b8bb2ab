"""`cluster`: balanced k-means on a sample of the embeddings, then every passage's cluster, each shard by itself."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import safetensors.numpy

from salad_ray.config import Config
from salad_ray.console import say, show
from salad_ray.flow import Step
from salad_ray.names import CENTROIDS, CLUSTER, CLUSTERS
from salad_ray.runs import Run
from salad_ray.selection.cards import cards_table, chance_purity, cluster_cards, purity
from salad_ray.selection.draw import priorities
from salad_ray.selection.kmeans import BalancedKMeans
from salad_ray.stages.common import Stage, Work, run_works
from salad_ray.stages.ray_cluster import require_gpus, start_ray
from salad_ray.stages.shards import ShardPart, StageError
from salad_ray.tables import (
    BadInput,
    Cluster,
    Membership,
    Table,
    Totals,
    file_exists,
    read_bytes,
    schema_of,
    to_arrow,
    write_bytes,
    write_json,
)


def make(run: Run, step: Step) -> None:
    """Write `web/clusters` from `web/embeddings`, and `web/centroids` with the clusters' shares and cards."""
    stage = Stage.of(run, step, CLUSTERS)
    passages, embeddings = (run.labelled(label) for label in step.reads)
    shards = list(stage.inputs[embeddings.label]["shards"])
    fitted = f"{stage.table.url}/fitted.safetensors"
    if not stage.done_already():
        stage.begin()
        fit(run.config, embeddings, shards, fitted)
        worker = partial(AssignShard, embeddings, fitted, run.config.seed)
        run_works(run, [Work(stage, {name: name for name in shards}, worker)])
    write_centroids(run, step, passages, stage.table, fitted)


def fit(config: Config, embeddings: Table, shards: list[str], fitted_url: str) -> None:
    """Centroids and prices, from the first shards: passages were dealt to them by hash, so they are a fair sample."""
    if file_exists(fitted_url):
        return
    start_ray(config)
    settings = config.cluster
    started = time.monotonic()
    require_gpus(config, CLUSTER, settings.num_gpus)
    on_gpu = ray.remote(num_cpus=1, num_gpus=settings.num_gpus or None)(_fit)
    fitted, num_points = ray.get(on_gpu.remote(config, embeddings, shards))
    write_bytes(fitted_url, safetensors.numpy.save(fitted))
    secs = time.monotonic() - started
    say(f"cluster: {settings.num_clusters} centroids and prices from {num_points:,} passages in {secs:.1f} s")


def _fit(config: Config, embeddings: Table, shards: list[str]) -> tuple[dict[str, np.ndarray], int]:
    settings = config.cluster
    points: list[np.ndarray] = []
    while shards[len(points) :] and sum(map(len, points)) < settings.sample_passages:
        points.append(vectors(embeddings.read(shards[len(points)], ["embedding"])))
    sample = np.concatenate(points)[: settings.sample_passages]
    try:
        kmeans = BalancedKMeans(
            settings.num_clusters,
            config.seed,
            settings.num_iterations,
            max_points=settings.sample_passages,
            use_gpu=settings.num_gpus > 0,
        ).fit(sample)
    except BadInput as error:
        raise StageError(f"cluster: {embeddings.label}: {error}") from None
    return {"centroids": kmeans.centroids, "prices": kmeans.prices}, len(sample)


def load_kmeans(fitted_url: str) -> BalancedKMeans:
    fitted = safetensors.numpy.load(read_bytes(fitted_url))
    return BalancedKMeans.from_arrays(fitted["centroids"], fitted["prices"])


def vectors(table: pa.Table) -> np.ndarray:
    """The embeddings of a shard, float16 (N, dim)."""
    rows = table["embedding"].to_pylist()
    return np.frombuffer(b"".join(rows), np.float16).reshape(len(rows), -1)


class AssignShard:
    """Cluster, distance and priority of every passage, and the sizes of the clusters for the manifest."""

    def __init__(self, embeddings: Table, fitted: str, seed: int) -> None:
        self.embeddings, self.seed = embeddings, seed
        self.kmeans = load_kmeans(fitted)

    def __call__(self, shard: str) -> Iterator[ShardPart]:
        rows = self.embeddings.read(shard)
        labels, distances = self._assign(rows)
        found = {
            "cluster_id": labels,
            "distance": distances,
            "priority": priorities(rows["passage_id"].to_pylist(), self.seed),
        }
        columns = {name: rows[name] for name in ("passage_id", "num_chars", "split")} | found
        schema = schema_of(Membership)
        members = pa.table({name: columns[name] for name in schema.names}, schema)
        yield ShardPart(members, len(members), len(members), totals=_sizes(members))

    def _assign(self, embeddings: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        if not len(embeddings):
            return np.empty(0, np.int64), np.empty(0)
        return self.kmeans.assign(vectors(embeddings))


def _sizes(rows: pa.Table) -> Totals:
    """Passages and characters of each cluster; what is kept aside for measuring does not count."""
    open_rows = rows.filter(pa.compute.not_equal(rows["split"], "test"))
    sums = open_rows.group_by("cluster_id").aggregate([("num_chars", "count"), ("num_chars", "sum")]).to_pylist()
    return {
        "num_passages_by_cluster": {str(row["cluster_id"]): row["num_chars_count"] for row in sums},
        "num_chars_by_cluster": {str(row["cluster_id"]): row["num_chars_sum"] for row in sums},
    }


def write_centroids(run: Run, step: Step, passages: Table, clusters: Table, fitted: str) -> None:
    """`web/centroids`: centroid, price and share of each cluster, and its card in `cards.json`."""
    manifest = clusters.manifest()
    assert manifest is not None
    stage = Stage.of(run, step, CENTROIDS, clusters=manifest)
    if stage.is_done():
        return
    stage.begin()
    kmeans, totals = load_kmeans(fitted), manifest["totals"]
    sizes = [totals["num_passages_by_cluster"].get(str(index), 0) for index in range(len(kmeans.prices))]
    if not sum(sizes):
        raise StageError(f"cluster: {passages.label} has none but those kept aside; lower ingest.heldout_share")
    rows = [
        Cluster(
            cluster_id=index,
            centroid=kmeans.centroids[index].tobytes(),
            price=float(kmeans.prices[index]),
            web_share=size / sum(sizes),
            num_passages=size,
            num_chars=totals["num_chars_by_cluster"].get(str(index), 0),
        )
        for index, size in enumerate(sizes)
    ]
    stage.table.write("part-00000", to_arrow(Cluster, rows))
    facts = write_cards(run.config, passages, clusters, f"{stage.table.url}/cards.json", sizes)
    stage.finish(num_rows=len(rows), shards={"part-00000": len(rows)}, **facts)
    mean, url = sum(sizes) / len(sizes), stage.table.url
    say(f"cluster: sizes {min(sizes) / mean:.2f} to {max(sizes) / mean:.2f} of the mean {mean:,.0f} → {url}")


def write_cards(config: Config, passages: Table, clusters: Table, url: str, sizes: list[int]) -> dict[str, Any]:
    """What the clusters are about, from a sample; how pure they are, where passages have domains."""
    parts: list[pa.Table] = []
    for shard in clusters.shards():
        texts = passages.read(shard, ["passage_id", "text", "domain"])
        parts.append(clusters.read(shard, ["passage_id", "cluster_id", "distance"]).join(texts, "passage_id"))
        if sum(map(len, parts)) >= config.cluster.cards_passages:
            break
    sample = pa.concat_tables(parts)
    labels = sample["cluster_id"].to_numpy()
    cards = cluster_cards(sample["text"].to_pylist(), labels, sample["distance"].to_numpy(), len(sizes), sizes)
    write_json(url, {"clusters": json.loads(json.dumps(cards))})
    show(cards_table(cards))
    domains = sample["domain"].to_pylist()
    if len(set(domains)) < 2:
        return {}
    facts = {"purity": purity(labels, domains), "chance_purity": chance_purity(labels, domains)}
    say(f"cluster: purity {facts['purity']:.2f} against the passages' domains (by chance {facts['chance_purity']:.2f})")
    return facts
