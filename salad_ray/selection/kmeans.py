"""Balanced k-means: clusters of equal size, by one price per cluster that any worker can apply alone.

A point belongs to `argmin_k ‖x − c_k‖² + price_k`. For given centroids the prices that make the clusters equal are the
dual variables of an assignment with capacities: they maximise the concave
`Σ_i min_k(‖x_i − c_k‖² + price_k) − N/K · Σ_k price_k` (semi-discrete optimal transport). They are learnt on a sample
by Newton's method, with the minimum softened by a temperature that gives every boundary between clusters a width:
roughly on a few points in each of Lloyd's iterations, then on the whole sample with the centroids at rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from salad_ray.config import ConfigError
from salad_ray.tables import BadInput

BLOCK = 4096
"""Points that are handled at a time."""
CORE_POINTS_PER_CLUSTER, MIN_CORE_POINTS = 64, 4096
"""The points on which prices are learnt while the centroids move: noise in the prices hardly matters there."""
SOFTNESS = 0.25
"""Temperature in median gaps between a point's best and second cluster."""
COOLING, MAX_COOLINGS = 4.0, 6
ROUGHLY = 0.1
"""The imbalance of the core that is good enough while the centroids move."""
FINER = 8
"""Once the centroids rest, prices are learnt on so many times the core, then on the whole sample."""
MAX_KEPT_SCORES = 1 << 25
"""Scores of a sample as small as this are kept (128 MB) instead of computed for each step of the prices."""

Points = np.ndarray | torch.Tensor
ScoreBlocks = Callable[[], Iterable[torch.Tensor]]
"""Yields `2 x·c − ‖c‖²`, float32 (points, K), block by block: the negative squared distance but for ‖x‖²."""


class BalancedKMeans:
    """Balanced k-means on embeddings, all of it by torch on its threads or on a GPU.

    The result depends on nothing but the arguments, the points and their order, on one kind of machine with one number
    of threads: another number lets BLAS sum in another order, and points within rounding of a tie may move.
    Exact duplicates stay together, so points that are mostly duplicates cannot be balanced: drop them first, and look
    at `cluster_sizes`. Each step of the prices costs K² per point and K³, which suits a few hundred clusters.

    Attributes:
        centroids: (K, D) float32.
        prices: (K,) float32, a squared distance; their mean is 0.
        cluster_sizes: (K,) int64, points of the sample in each cluster.
        inertia: sum over the sample of the squared distance to the own centroid, without the price.
    """

    centroids: np.ndarray
    prices: np.ndarray
    cluster_sizes: np.ndarray
    inertia: float

    def __init__(
        self,
        num_clusters: int,
        seed: int = 0,
        num_iterations: int = 20,
        max_points: int = 1_000_000,
        tolerance: float = 0.04,
        use_gpu: bool = False,
    ) -> None:
        """
        Args:
            num_iterations: of Lloyd.
            max_points: the sample; a larger x is thinned to this many points at random. With n of them per cluster,
                sizes on unseen points scatter by about 1/√n (n = 256: 6 %, the largest of 128 clusters 17 % too large).
            tolerance: prices are refined until no cluster of the sample differs from the mean size by more than this
                share of it, or by one point.
            use_gpu: compute on the first GPU, which then holds the sample.

        Raises:
            ConfigError: an argument is out of range, or torch sees no GPU to use.
        """
        if min(num_clusters, num_iterations + 1, max_points) < 1 or tolerance < 0:
            raise ConfigError("balanced k-means needs a positive number of clusters and points")
        if use_gpu and not torch.cuda.is_available():
            raise ConfigError("torch sees no GPU to cluster on: install the extra gpu, or set cluster.num_gpus to 0")
        self.num_clusters = num_clusters
        self.seed = seed
        self.num_iterations = num_iterations
        self.max_points = max_points
        self.tolerance = tolerance
        self.use_gpu = use_gpu
        self._device = torch.device("cuda" if use_gpu else "cpu")

    @classmethod
    def from_arrays(cls, centroids: np.ndarray, prices: np.ndarray, use_gpu: bool = False) -> Self:
        """A model that predicts with given centroids (K, D) and prices (K,).

        Raises:
            ValueError: the shapes do not fit each other.
        """
        model = cls(len(centroids), use_gpu=use_gpu)
        model.centroids = np.array(centroids, dtype=np.float32, order="C")
        model.prices = np.array(prices, dtype=np.float32, order="C")
        if model.centroids.ndim != 2 or model.prices.shape != (len(centroids),):
            raise ValueError(
                f"centroids {model.centroids.shape} and prices {model.prices.shape} are not (K, D) and (K,)"
            )
        return model

    def fit(self, x: np.ndarray) -> Self:
        """Learn centroids and prices from points x, float16 or float32 (N, D), of which no float32 copy is made.

        Raises:
            ConfigError: there are fewer points, or fewer distinct points, than clusters.
            BadInput: a point has a value that is not finite.
        """
        if x.ndim != 2:
            raise BadInput(f"points of shape {x.shape} are not (N, D)")
        for _ in _blocks(x, torch.zeros(x.shape[1])):
            pass  # all are finite
        rng = np.random.default_rng(self.seed)
        thinned = _thinned(x, self.max_points, rng)
        few = _thinned(thinned, max(CORE_POINTS_PER_CLUSTER * self.num_clusters, MIN_CORE_POINTS), rng)
        self.centroids = _distinct_points(thinned, self.num_clusters, rng)
        self.prices = np.zeros(self.num_clusters, np.float32)
        more = _thinned(thinned, FINER * len(few), rng)
        core, finer, sample = (_tensor(points).to(self._device) for points in (few, more, thinned))
        for _ in range(self.num_iterations):
            self._balance_roughly(core)
            self._move_centroids(sample)
        temperature = self._balance_roughly(core)
        for points in (finer, sample):
            temperature = self._balance(points, temperature)
        labels, distances = self.assign(sample)
        self.cluster_sizes = np.bincount(labels, minlength=self.num_clusters)
        self.inertia = float(np.square(distances, dtype=np.float64).sum())
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """The cluster of each point of x (N, D): int64 (N,); N may be 0.

        Raises:
            BadInput: a point has a value that is not finite.
        """
        return np.concatenate([np.empty(0, np.int64), *(labels.numpy(force=True) for _, labels in self._search(x))])

    def assign(self, x: Points) -> tuple[np.ndarray, np.ndarray]:
        """As `predict`, and the Euclidean distance to the own centroid, without the price: float32 (N,)."""
        labels, distances = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        _, centroids = self._centered()
        for points, found in self._search(x):
            labels.append(found.numpy(force=True))
            distances.append(torch.linalg.vector_norm(points - centroids[found], dim=1).numpy(force=True))
        return np.concatenate(labels), np.concatenate(distances)

    def _search(self, x: Points) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Blocks of points, centered like `_centered()`, and their clusters."""
        center, centroids = self._centered()
        offsets = -centroids.square().sum(dim=1) - torch.from_numpy(self.prices).to(self._device)
        weights = 2 * centroids.T
        scores = torch.empty((BLOCK, self.num_clusters), device=self._device)
        for points, whole in _blocks(x, center):
            # Always the same shape: BLAS may sum a row differently in a matrix of another shape, and a point's cluster
            # shall not depend on those that came with it.
            torch.addmm(offsets, whole, weights, out=scores)
            yield points, _argmax(scores[: len(points)])

    def _scores(self, x: Points) -> Iterator[torch.Tensor]:
        center, centroids = self._centered()
        for points, _ in _blocks(x, center):
            yield torch.addmm(-centroids.square().sum(dim=1), points, 2 * centroids.T)

    def _centered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The centroids' mean, and they without it: less is lost to rounding around the origin."""
        centroids = torch.from_numpy(self.centroids).to(self._device)
        center = centroids.mean(dim=0)
        return center, centroids - center

    def _move_centroids(self, sample: Points) -> None:
        """One of Lloyd's iterations; a cluster without points keeps its centroid."""
        center, centroids = self._centered()
        sums = torch.zeros(centroids.shape, dtype=torch.float64, device=self._device)
        sizes = torch.zeros(self.num_clusters, dtype=torch.int64, device=self._device)
        for points, labels in self._search(sample):
            sums += _sums(points, labels, self.num_clusters)
            sizes += torch.bincount(labels, minlength=self.num_clusters)
        moved = center + sums / sizes[:, None]
        full = (sizes > 0).numpy(force=True)
        self.centroids[full] = moved.numpy(force=True)[full]

    def _balance_roughly(self, core: torch.Tensor) -> float:
        """Prices from the core: a few steps from the last ones, or else cooling down from soft boundaries.

        Cooling is slower, but without it some clusters may stay empty and others full. Returns the last temperature.
        """
        scores = list(self._scores(core))
        temperature = SOFTNESS * _median_gap(scores, self.prices)
        prices = self.prices.astype(np.float64)
        dual = newton(lambda: scores, prices, temperature, ROUGHLY, max_steps=2)
        if dual.imbalance > ROUGHLY:
            for warmer in (COOLING**2, COOLING, 1.0):
                dual = newton(lambda: scores, prices, warmer * temperature, ROUGHLY, max_steps=8)
                prices = dual.prices
        self.prices = dual.prices.astype(np.float32)
        return temperature

    def _balance(self, points: torch.Tensor, temperature: float) -> float:
        """Prices from all these points, ever colder until their clusters are as large as they shall be.

        Returns:
            The temperature that did it. Small samples need low ones, with few points at each boundary.
        """
        kept = list(self._scores(points)) if len(points) * self.num_clusters <= MAX_KEPT_SCORES else None
        tolerance = max(self.tolerance, self.num_clusters / len(points))
        prices = self.prices.astype(np.float64)
        found = []
        for cooling in range(MAX_COOLINGS):
            cold = temperature / COOLING**cooling
            found.append(newton(lambda: kept or self._scores(points), prices, cold, tolerance, max_steps=10))
            prices = found[-1].prices
            if found[-1].imbalance <= tolerance:
                break
        best = min(found, key=lambda dual: dual.imbalance)
        self.prices = (best.prices - best.prices.mean()).astype(np.float32)
        return cold


@dataclass(frozen=True, slots=True)
class Dual:
    """The softened dual at some prices."""

    prices: np.ndarray
    value: float
    sizes: np.ndarray
    """(K,): points of each cluster, each point shared out over the clusters."""
    overlaps: np.ndarray
    """(K, K): Σ_i share_ik · share_il."""
    imbalance: float
    """Largest difference of a cluster's size from the mean size, as a share of it; points go to one cluster each."""

    @property
    def soft_imbalance(self) -> float:
        return _imbalance(self.sizes)


def soft_dual(blocks: ScoreBlocks, prices: np.ndarray, temperature: float) -> Dual:
    """Evaluate `Σ_i softmin_k(price_k − score_ik) − N/K · Σ_k price_k` for prices (K,) float64 at a temperature."""
    num_clusters = len(prices)
    value, sizes, overlaps = 0.0, np.zeros(num_clusters), np.zeros((num_clusters, num_clusters))
    counts = np.zeros(num_clusters, np.int64)
    offsets = torch.from_numpy(-prices / temperature).float()
    for scores in blocks():
        scaled = torch.add(offsets.to(scores.device), scores, alpha=1 / temperature)
        best, shares = scaled.amax(dim=1), scaled.softmax(dim=1)
        # The largest share is 1 / Σ_k exp(scaled_k − best).
        value -= temperature * float((best - shares.amax(dim=1).log()).sum(dtype=torch.float64))
        sizes += shares.sum(dim=0).numpy(force=True)
        overlaps += (shares.T @ shares).numpy(force=True)
        counts += torch.bincount(_argmax(scaled), minlength=num_clusters).numpy(force=True)
    return Dual(prices, value - counts.mean() * prices.sum(), sizes, overlaps, _imbalance(counts))


def newton(blocks: ScoreBlocks, prices: np.ndarray, temperature: float, tolerance: float, max_steps: int) -> Dual:
    """Raise the dual at one temperature until its clusters, as they are or shared out, are balanced.

    Damped like Levenberg and Marquardt's method: a cluster that stands apart has next to no points at its boundaries,
    so that the second derivative alone would send its price anywhere.
    """
    ridge = 1e-4
    now = soft_dual(blocks, prices, temperature)
    for _ in range(max_steps):
        if now.imbalance <= tolerance or now.soft_imbalance <= tolerance / 8:
            break
        mean_size = now.sizes.mean()
        curvature = np.diag(now.sizes + ridge * (now.sizes + 0.01 * mean_size)) - now.overlaps
        # By torch, as everything: numpy's BLAS has threads of its own, and the two would wait for each other's.
        step = torch.linalg.solve(torch.from_numpy(curvature), torch.from_numpy(now.sizes - mean_size)).numpy()
        tried = soft_dual(blocks, now.prices + temperature * step, temperature)
        better = tried.value >= now.value
        now, ridge = (tried, max(ridge / 10, 1e-6)) if better else (now, ridge * 10)
    return now


def _imbalance(sizes: np.ndarray) -> float:
    return float(np.abs(sizes / sizes.mean() - 1).max())


def _median_gap(blocks: Iterable[torch.Tensor], prices: np.ndarray) -> float:
    """How much dearer the second cluster is for the median point, kept above zero."""
    gaps, magnitude = [], 0.0
    for scores in blocks:
        ranked = (scores - torch.from_numpy(prices).to(scores.device)).topk(min(2, len(prices)), dim=1).values
        gaps.append(ranked[:, 0] - ranked[:, -1])
        magnitude = max(magnitude, float(scores.abs().max()))
    return max(float(torch.cat(gaps).median()), 1e-6 * magnitude, 1e-30)


def _argmax(scores: torch.Tensor) -> torch.Tensor:
    """Over each row: int64. On few threads of a CPU numpy takes a fifth of torch's time."""
    if scores.is_cuda or torch.get_num_threads() > 4:
        return scores.argmax(dim=1)
    return torch.from_numpy(scores.numpy().argmax(axis=1))


def _sums(points: torch.Tensor, labels: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """The sum of each cluster's points: float32 (K, D)."""
    if points.is_cuda:  # where `index_add_` sums in any order
        return torch.nn.functional.one_hot(labels, num_clusters).float().T @ points
    return torch.zeros(num_clusters, points.shape[1]).index_add_(0, labels, points)


def _blocks(x: Points, center: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Points minus the center in blocks (up to BLOCK, D) float32, and (BLOCK, D) that begins with them.

    Each takes the memory of the one before. Arrays are checked; tensors are those that have been.
    """
    if x.ndim != 2 or not (isinstance(x, torch.Tensor) or np.issubdtype(x.dtype, np.floating)):
        raise ValueError(f"points must be floating point (N, D), not {x.dtype} {x.shape}")
    if x.shape[1] != len(center):
        raise ValueError(f"points have {x.shape[1]} dimensions, centroids {len(center)}")
    whole = torch.zeros((BLOCK, len(center)), device=center.device)
    for start in range(0, len(x), BLOCK):
        rows = x[start : start + BLOCK]
        points = whole[: len(rows)]
        if isinstance(rows, torch.Tensor):
            torch.sub(rows, center, out=points)
        else:
            torch.sub(_tensor(rows).to(center.device), center, out=points)
            finite = points.sum(dim=1).isfinite()
            if not finite.all():
                raise BadInput(f"point {start + int(finite.int().argmin())} has a value that is not finite")
        yield points, whole


def _tensor(x: np.ndarray) -> torch.Tensor:
    """The same memory where torch takes it: it warns about arrays that cannot be written, as Arrow's."""
    return torch.from_numpy(np.require(x, requirements=["C", "W"]))


def _thinned(x: np.ndarray, max_points: int, rng: np.random.Generator) -> np.ndarray:
    if len(x) <= max_points:
        return x
    return x[np.sort(rng.choice(len(x), max_points, replace=False, shuffle=False))]


def _distinct_points(sample: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """That many points of the sample, drawn at random, no two alike: float32 (count, D)."""
    if len(sample) < count:
        raise ConfigError(f"{len(sample)} points cannot make {count} clusters: lower cluster.num_clusters or add text")
    drawn: dict[bytes, np.ndarray] = {}
    for row in rng.permutation(len(sample)):
        point = sample[row].astype(np.float32) + 0.0  # −0 and 0 are one value
        drawn.setdefault(point.tobytes(), point)
        if len(drawn) == count:
            return np.stack(list(drawn.values()))
    raise ConfigError(
        f"{len(sample)} points, of which {len(drawn)} are distinct, cannot make {count} clusters: "
        "lower cluster.num_clusters or add text"
    )
