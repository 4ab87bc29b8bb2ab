"""Balanced k-means beside faiss.Kmeans, both searching on the GPU.

Points as in benchmarks/kmeans.py, a quarter of them drawn and each repeated with a little noise: drawing a million
takes longer than clustering them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.timing import seconds
from benchmarks.gpu.worker import Context

NUM_ITERATIONS = 20
COPIES, NOISE = 4, 0.3
"""Noise has this length beside a point's 1, before all are made 1 again."""


def rows(context: Context) -> Iterator[dict[str, Any]]:
    """Seconds, largest cluster and inertia of both, on the same points, each when it is done; faiss first."""
    import faiss

    from benchmarks.kmeans import inertia, largest
    from salad_ray.selection.kmeans import BalancedKMeans

    if context.on_gpu and not hasattr(faiss, "StandardGpuResources"):
        raise ModuleNotFoundError("faiss has no GPU here", name="faiss-gpu")
    number, dim, clusters = (5_000, 16, 8) if context.tiny else (1_000_000, 384, 128)
    points = make_points(number, dim, context.device)

    def bare(x: np.ndarray, num_clusters: int) -> Any:
        settings = {"niter": NUM_ITERATIONS, "max_points_per_centroid": len(x), "seed": 0, "gpu": context.on_gpu}
        model = faiss.Kmeans(dim, num_clusters, **settings)
        model.train(x.astype(np.float32))
        return lambda y: model.index.search(y.astype(np.float32), 1)[1][:, 0]

    def ours(x: np.ndarray, num_clusters: int) -> Any:
        model = BalancedKMeans(num_clusters, 0, NUM_ITERATIONS, max_points=len(x), use_gpu=context.on_gpu)
        return model.fit(x).predict

    taken: dict[str, float] = {}
    for name, fit in (("faiss", bare), ("ours", ours)):
        fit(points[: 100 * clusters], clusters)  # what is set up once
        found: list[Any] = []
        taken[name] = seconds(lambda: found.append(fit(points, clusters)), context.device)  # noqa: B023
        labels = found[0](points)
        row = {"name": f"{name}, {number:,} × {dim}, K = {clusters}", "secs": taken[name]}
        if name == "ours":
            row |= {"points_per_sec": number / taken["ours"], "faiss/ours": taken["faiss"] / taken["ours"]}
        yield row | {"largest": largest(labels, clusters), "inertia": inertia(points, labels, clusters)}


def make_points(number: int, dim: int, device: torch.device) -> np.ndarray:
    """Unit vectors (number, dim), float16."""
    from benchmarks.kmeans import embeddings

    drawn = torch.from_numpy(embeddings(number // COPIES, dim, seed=1)).to(device)
    generator = torch.Generator(device).manual_seed(0)
    parts = []
    for _ in range(COPIES):
        noise = torch.randn(drawn.shape, generator=generator, device=device) * (NOISE / dim**0.5)
        parts.append(torch.nn.functional.normalize(drawn.float() + noise, dim=1).half().cpu())
    return torch.cat(parts).numpy()
