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

from salad_ray.config import Config, identity
from salad_ray.console import say, show
from salad_ray.selection.cards import cards_table, chance_purity, cluster_cards, purity
from salad_ray.selection.draw import priorities
from salad_ray.selection.kmeans import BalancedKMeans
from salad_ray.stages.common import Stage, finished, run_shards
from salad_ray.stages.ray_cluster import require_gpus, start_ray
from salad_ray.stages.shards import ShardPart, StageError
from salad_ray.tables import (
    BadInput,
    Cluster,
    Membership,
    Table,
    file_exists,
    read_bytes,
    schema_of,
    to_arrow,
    write_bytes,
    write_json,
)


def run(config: Config) -> None:
    """Write `web/clusters` from `web/embeddings`, and `web/centroids` with the clusters' shares and cards."""
    embeddings = Table(config.run_dir, "web", "embeddings")
    manifest = finished(embeddings, "embed")
    shards = list(manifest["shards"])
    stage = Stage(
        "cluster",
        Table(config.run_dir, "web", "clusters"),
        identity(config, "cluster", "seed"),
        {"embeddings": manifest["version"]},
    )
    if not stage.is_done():
        stage.begin()
        fit(config, embeddings, shards)
    run_shards(config, stage, {name: name for name in shards}, partial(AssignShard, config))
    write_centroids(config, stage)


def fitted_url(config: Config) -> str:
    return f"{Table(config.run_dir, 'web', 'clusters').url}/fitted.safetensors"


def fit(config: Config, embeddings: Table, shards: list[str]) -> None:
    """Centroids and prices, from the first shards: passages were dealt to them by hash, so they are a fair sample."""
    if file_exists(fitted_url(config)):
        return
    start_ray(config)
    settings = config.cluster
    started = time.monotonic()
    require_gpus(config, "cluster", settings.num_gpus)
    on_gpu = ray.remote(num_cpus=1, num_gpus=settings.num_gpus or None)(_fit)
    fitted, num_points = ray.get(on_gpu.remote(config, embeddings, shards))
    write_bytes(fitted_url(config), safetensors.numpy.save(fitted))
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
        raise StageError(f"cluster: web/embeddings: {error}") from None
    return {"centroids": kmeans.centroids, "prices": kmeans.prices}, len(sample)


def load_kmeans(config: Config) -> BalancedKMeans:
    fitted = safetensors.numpy.load(read_bytes(fitted_url(config)))
    return BalancedKMeans.from_arrays(fitted["centroids"], fitted["prices"])


def vectors(table: pa.Table) -> np.ndarray:
    """The embeddings of a shard, float16 (N, dim)."""
    rows = table["embedding"].to_pylist()
    return np.frombuffer(b"".join(rows), np.float16).reshape(len(rows), -1)


class AssignShard:
    """Cluster, distance and priority of every passage, and the sizes of the clusters for the manifest."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.kmeans = load_kmeans(config)
        self.embeddings = Table(config.run_dir, "web", "embeddings")

    def __call__(self, shard: str) -> Iterator[ShardPart]:
        rows = self.embeddings.read(shard)
        labels, distances = self._assign(rows)
        found = {
            "cluster_id": labels,
            "distance": distances,
            "priority": priorities(rows["passage_id"].to_pylist(), self.config.seed),
        }
        columns = {name: rows[name] for name in ("passage_id", "num_chars", "split")} | found
        schema = schema_of(Membership)
        members = pa.table({name: columns[name] for name in schema.names}, schema)
        yield ShardPart(members, len(members), len(members), totals=_sizes(members))

    def _assign(self, embeddings: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        if not len(embeddings):
            return np.empty(0, np.int64), np.empty(0)
        return self.kmeans.assign(vectors(embeddings))


def _sizes(rows: pa.Table) -> dict[str, float]:
    """Passages and characters of each cluster; what is kept aside for measuring does not count."""
    open_rows = rows.filter(pa.compute.not_equal(rows["split"], "test"))
    sums = open_rows.group_by("cluster_id").aggregate([("num_chars", "count"), ("num_chars", "sum")]).to_pylist()
    return {
        f"{name} of cluster {row['cluster_id']}": float(row[f"num_chars_{how}"])
        for row in sums
        for name, how in (("passages", "count"), ("characters", "sum"))
    }


def write_centroids(config: Config, clusters: Stage) -> None:
    """`web/centroids`: centroid, price and share of each cluster, and its card in `cards.json`."""
    manifest = finished(clusters.table, "cluster")
    table = Table(config.run_dir, "web", "centroids")
    stage = Stage("cluster", table, identity(config, "cluster.num_clusters"), {"clusters": manifest["version"]})
    if stage.is_done():
        return
    stage.begin()
    kmeans, totals = load_kmeans(config), manifest["totals"]
    sizes = [int(totals.get(f"passages of cluster {index}", 0)) for index in range(len(kmeans.prices))]
    if not sum(sizes):
        raise StageError("cluster: web/passages has none but those kept aside; lower ingest.heldout_share")
    rows = [
        Cluster(
            cluster_id=index,
            centroid=kmeans.centroids[index].tobytes(),
            price=float(kmeans.prices[index]),
            web_share=size / sum(sizes),
            num_passages=size,
            num_chars=int(totals.get(f"characters of cluster {index}", 0)),
        )
        for index, size in enumerate(sizes)
    ]
    table.write("part-00000", to_arrow(Cluster, rows))
    facts = write_cards(config, sizes)
    stage.finish(num_rows=len(rows), shards={"part-00000": len(rows)}, **facts)
    mean = sum(sizes) / len(sizes)
    say(f"cluster: sizes {min(sizes) / mean:.2f} to {max(sizes) / mean:.2f} of the mean {mean:,.0f} → {table.url}")


def write_cards(config: Config, sizes: list[int]) -> dict[str, Any]:
    """What the clusters are about, from a sample; how pure they are, where passages have domains."""
    parts: list[pa.Table] = []
    clusters, passages = (Table(config.run_dir, "web", name) for name in ("clusters", "passages"))
    for shard in clusters.shards():
        texts = passages.read(shard, ["passage_id", "text", "domain"])
        parts.append(clusters.read(shard, ["passage_id", "cluster_id", "distance"]).join(texts, "passage_id"))
        if sum(map(len, parts)) >= config.cluster.cards_passages:
            break
    sample = pa.concat_tables(parts)
    labels = sample["cluster_id"].to_numpy()
    cards = cluster_cards(sample["text"].to_pylist(), labels, sample["distance"].to_numpy(), len(sizes), sizes)
    write_json(
        f"{Table(config.run_dir, 'web', 'centroids').url}/cards.json", {"clusters": json.loads(json.dumps(cards))}
    )
    show(cards_table(cards))
    domains = sample["domain"].to_pylist()
    if len(set(domains)) < 2:
        return {}
    facts = {"purity": purity(labels, domains), "chance_purity": chance_purity(labels, domains)}
    say(f"cluster: purity {facts['purity']:.2f} against the passages' domains (by chance {facts['chance_purity']:.2f})")
    return facts
