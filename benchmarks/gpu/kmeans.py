"""Balanced k-means beside faiss.Kmeans, both searching on the GPU; points as in benchmarks/kmeans.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.gpu.timing import seconds
from benchmarks.gpu.worker import Context

NUM_ITERATIONS = 20


def rows(context: Context) -> Iterator[dict[str, Any]]:
    """Seconds, largest cluster and inertia of both, on the same points."""
    import faiss

    from benchmarks.kmeans import embeddings, inertia, largest
    from salad_ray.selection.kmeans import BalancedKMeans

    if context.on_gpu and not hasattr(faiss, "StandardGpuResources"):
        raise ModuleNotFoundError("faiss has no GPU here", name="faiss-gpu")
    number, dim, clusters = (5_000, 16, 8) if context.tiny else (1_000_000, 384, 128)
    points = embeddings(number, dim, seed=1)
    model = BalancedKMeans(clusters, 0, NUM_ITERATIONS, max_points=number, use_gpu=context.on_gpu)
    settings = {"niter": NUM_ITERATIONS, "max_points_per_centroid": number, "seed": 0, "gpu": context.on_gpu}
    bare = faiss.Kmeans(dim, clusters, **settings)
    secs = {
        "ours": seconds(lambda: model.fit(points), context.device),
        "faiss": seconds(lambda: bare.train(points.astype(np.float32)), context.device),
    }
    labels = {"ours": model.predict(points), "faiss": bare.index.search(points.astype(np.float32), 1)[1][:, 0]}
    for name, taken in secs.items():
        row = {"name": f"{name}, {number:,} × {dim}, K = {clusters}", "secs": taken}
        if name == "ours":
            row |= {"points_per_sec": number / taken, "faiss/ours": secs["faiss"] / taken}
        found = {"largest": largest(labels[name], clusters), "inertia": inertia(points, labels[name], clusters)}
        yield row | found
