"""Balanced k-means beside faiss.Kmeans and k-means-constrained: time, largest cluster, inertia, memory.

Every fit has a process to itself, and after a small one, which sets up what is set up once, its seconds are taken:
pairs in turns, with seeds 0, 1, 2 … for both sides. faiss.Kmeans thins its points to 256 per cluster unless told
otherwise; here it is told to take all, as ours does. Both get the same arrays, and converting float16 to float32
counts. k-means-constrained has size_max = 1.05 × mean, one start and at most as many iterations.

The points (`embeddings`) stand for sentence embeddings by all-MiniLM-L6-v2: a normalised mixture of topics of lognormal
size within domains of lognormal size, all with the same anisotropic covariance, in float16. Others (`skewed`) are 40
Gaussians of very different size, which balance must cut and merge, in float32. On a sample of these k-means-constrained
without bounds, but for those the same program, says what balance itself costs.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from benchmarks.side_by_side import PAIRS, in_subprocess, one_thread_each, ratio_row, take_turns
from salad_ray.selection.kmeans import BalancedKMeans

NUM_ITERATIONS = 20
Labeller = Callable[[np.ndarray], np.ndarray]
DOMAINS, TOPICS = 60, 3000
VARIANCES = (0.25, 0.2, 0.55)
"""Between domains, between a domain's topics, within a topic."""
GAUSSIANS, CONCENTRATION = 40, 0.4
MEASURES = {
    "secs": "CPU s",
    "wall": "s",
    "largest": "× mean",
    "unseen": "× mean",
    "inertia": "per point",
    "peak": "GB",
}
SKEWED_MEASURES = ("wall", "secs", "largest", "inertia")
SKEWED_PAIRS = 5


def run(
    num_points: int = 1_000_000, small: int = 20_000, skewed_points: int = 200_000, sample: int = 6_400
) -> list[dict[str, Any]]:
    """Measure; each result has both sides' medians and their ratios."""
    constrained = importlib.util.find_spec("k_means_constrained") is not None
    if not constrained:
        print("k-means-constrained is not installed: what is compared with it is left out")
    with one_thread_each(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = _skewed(folder, skewed_points, sample, constrained)
        _save(folder / "large", embeddings, num_points, 384)
        usual = ("secs", "largest", "unseen", "inertia", "peak")
        rows += _compare(folder / "large", "ours", "faiss", 128, usual)
        if constrained:
            _save(folder / "small", embeddings, small, 64)
            rows += _compare(folder / "small", "ours", "k-means-constrained", 32, usual)
    return rows


def _skewed(folder: Path, num_points: int, sample: int, constrained: bool) -> list[dict[str, Any]]:
    _save(folder / "skewed", skewed, num_points, 128)
    rows = []
    for threads in (1, 2):
        rows += _compare(folder / "skewed", "ours", "faiss", 64, SKEWED_MEASURES, threads, SKEWED_PAIRS)
    if constrained:
        _save(folder / "skewed-sample", skewed, sample, 128)
        for left, right in (
            ("ours", "k-means-constrained"),
            ("k-means-constrained", "the same without bounds"),
            ("ours", "faiss"),
        ):
            rows += _compare(folder / "skewed-sample", left, right, 64, SKEWED_MEASURES)
    return rows


def skewed(num_points: int, dim: int, seed: int) -> np.ndarray:
    """Points (num_points, dim) of 40 Gaussians, float32: their shares are drawn from Dirichlet(0.4), whatever the seed.

    Variance 1 in each coordinate within them and between them.
    """
    law, rng = np.random.default_rng(0), np.random.default_rng(seed)
    shares = law.dirichlet(np.full(GAUSSIANS, CONCENTRATION))
    centers = law.standard_normal((GAUSSIANS, dim), dtype=np.float32)
    found = rng.standard_normal((num_points, dim), dtype=np.float32)
    found += centers[rng.choice(GAUSSIANS, num_points, p=shares)]
    return found


def embeddings(num_points: int, dim: int, seed: int) -> np.ndarray:
    """Points (num_points, dim) of unit length, float16; the same topics whatever the seed.

    Coordinate j has a variance ∝ 1 / (j + 8) before a random rotation. Logarithms of the shares of domains and topics
    have standard deviations 0.6 and 1, those of the topics' widths 0.25; all share a mean of length 0.2.
    """
    law, rng = np.random.default_rng(0), np.random.default_rng(seed)
    scale = (np.arange(dim) + 8.0) ** -0.5
    scale /= np.linalg.norm(scale)
    rotation = np.linalg.qr(law.standard_normal((dim, dim)))[0].astype(np.float32)
    between, among, within = np.sqrt(VARIANCES)
    domain = law.choice(DOMAINS, TOPICS, p=_shares(law, 0.6, DOMAINS))
    topic_shares = _shares(law, 1.0, TOPICS)
    centers = between * law.standard_normal((DOMAINS, dim))[domain] + among * law.standard_normal((TOPICS, dim))
    centers *= scale
    centers[:, -1] += 0.2
    widths = within * law.lognormal(0, 0.25, (TOPICS, 1))
    points = np.empty((num_points, dim), np.float16)
    for rows in np.array_split(np.arange(num_points), num_points // 50_000 + 1):
        topic = rng.choice(TOPICS, len(rows), p=topic_shares)
        found = centers[topic] + widths[topic] * scale * rng.standard_normal((len(rows), dim), dtype=np.float32)
        found = found.astype(np.float32) @ rotation
        points[rows] = found / np.linalg.norm(found, axis=1, keepdims=True)
    return points


def _shares(law: np.random.Generator, deviation: float, count: int) -> np.ndarray:
    shares = law.lognormal(0, deviation, count)
    return shares / shares.sum()


def _save(folder: Path, draw: Callable[[int, int, int], np.ndarray], num_points: int, dim: int) -> None:
    folder.mkdir()
    for seed, name in enumerate(("sample", "unseen"), start=1):
        np.save(folder / f"{name}.npy", draw(num_points, dim, seed))


def _compare(
    folder: Path,
    left: str,
    right: str,
    num_clusters: int,
    measures: Sequence[str],
    threads: int = 1,
    pairs: int = PAIRS,
) -> list[dict[str, Any]]:
    def fit(side: str, seed: int) -> dict[str, float]:
        return in_subprocess("benchmarks.kmeans", side, str(folder), str(num_clusters), str(seed), threads=threads)

    found = take_turns(lambda seed: fit(left, seed), lambda seed: fit(right, seed), pairs)
    count, dim = np.load(folder / "sample.npy", mmap_mode="r").shape
    title = f"{folder.name} {count:,} × {dim}, K = {num_clusters}, {threads} thr., {left} beside {right}"
    return [
        ratio_row(
            f"{title}: {name}", MEASURES[name], [ours[name] for ours, _ in found], [bare[name] for _, bare in found]
        )
        for name in measures
    ]


def _bare(side: str, folder: str, num_clusters: int, seed: int) -> dict[str, float]:
    """One fit of one side: its cost, and what it does with points that it has and has not seen."""
    sample, unseen = np.load(f"{folder}/sample.npy"), np.load(f"{folder}/unseen.npy")
    fits: dict[str, Callable[[np.ndarray, int, int], Labeller]] = {
        "ours": _ours,
        "faiss": _faiss,
        "k-means-constrained": _constrained,
        "the same without bounds": partial(_constrained, bounded=False),
    }
    fit = fits[side]
    fit(sample[: 40 * num_clusters], num_clusters, seed)
    started, started_wall = time.process_time(), time.perf_counter()
    labels_of = fit(sample, num_clusters, seed)
    secs, wall = time.process_time() - started, time.perf_counter() - started_wall
    peak = _peak_gb()
    labels = labels_of(sample)
    return {
        "secs": secs,
        "wall": wall,
        "largest": largest(labels, num_clusters),
        "unseen": largest(labels_of(unseen), num_clusters),
        "inertia": inertia(sample, labels, num_clusters),
        "peak": peak,
    }


def _ours(sample: np.ndarray, num_clusters: int, seed: int) -> Labeller:
    return BalancedKMeans(num_clusters, seed, NUM_ITERATIONS, max_points=len(sample)).fit(sample).predict


def _faiss(sample: np.ndarray, num_clusters: int, seed: int) -> Labeller:
    settings = {"niter": NUM_ITERATIONS, "max_points_per_centroid": len(sample), "seed": seed}
    kmeans = faiss.Kmeans(sample.shape[1], num_clusters, **settings)
    kmeans.train(sample)
    return lambda x: kmeans.index.search(x.astype(np.float32), 1)[1][:, 0]


def _constrained(sample: np.ndarray, num_clusters: int, seed: int, bounded: bool = True) -> Labeller:
    """It has no rule for single points: unseen ones go to the nearest centroid."""
    from k_means_constrained import KMeansConstrained

    size_max = int(1.05 * len(sample) / num_clusters) if bounded else None
    settings = {"n_init": 1, "max_iter": NUM_ITERATIONS, "random_state": seed, "n_jobs": 1}
    model = KMeansConstrained(num_clusters, size_max=size_max, **settings).fit(sample.astype(np.float32))
    nearest = BalancedKMeans.from_arrays(model.cluster_centers_, np.zeros(num_clusters))
    return lambda x: model.labels_ if x is sample else nearest.predict(x)


def _peak_gb() -> float:
    """Resident memory at its highest, points included. (ru_maxrss would count that of the parent before exec.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1e6


def largest(labels: np.ndarray, num_clusters: int) -> float:
    return float(np.bincount(labels, minlength=num_clusters).max() * num_clusters / len(labels))


def inertia(x: np.ndarray, labels: np.ndarray, num_clusters: int) -> float:
    """Mean squared distance to the mean of the own cluster, whatever centroids a side reports."""
    squares = 0.0
    for cluster in range(num_clusters):
        points = x[labels == cluster].astype(np.float32)
        if len(points):
            squares += float(np.square(points - points.mean(axis=0)).sum(dtype=np.float64))
    return squares / len(x)


def main() -> None:
    if sys.argv[1:2] == ["--bare"]:
        side, folder, num_clusters, seed = sys.argv[2:]
        print(json.dumps(_bare(side, folder, int(num_clusters), int(seed))))
        return
    for row in run():
        print(
            f"{row['name']:<96} {row['ours']:>9.4g} beside {row['bare']:<9.4g} {row['unit']:<10} "
            f"ratio {row['ours/bare']:.3f} ({row['min']:.3f}–{row['max']:.3f})"
        )


if __name__ == "__main__":
    main()
