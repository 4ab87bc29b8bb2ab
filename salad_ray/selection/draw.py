"""Drawing passages by hash priority, without replacement, within a budget of speech.

Every passage has one priority for all draws. A cluster's draw is its lowest priorities; its first ones are the probe.
P_target is over passages, as in the paper, and the budget in seconds. Clusters take turns by a divisor method
(Sainte-Laguë): the n-th passage of cluster c, from 0, stands at (n + 1/2) / P_target(c), and passages are taken in this
order until the next one would exceed the budget. So a larger budget contains a smaller one, shares are met to a passage
however long those of a cluster are, and a cluster that runs dry hands its share on to all others. Only passages below a
bound on the priority are ever looked at, which any worker can apply to its shard alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

SIGMAS = 6.0
SPREAD = 1.0
"""Standard deviation of a passage's duration, as a share of the mean; web passages reach half of that."""
TICKS = 1_000_000
"""Time is counted in microseconds, as integers: sums are exact, so an order never depends on what else was summed."""


def priorities(passage_ids: Iterable[str], seed: int) -> np.ndarray:
    """The upper 63 bits of `stable_hash(seed, passage_id)`: int64 (N,), uniform on [0, 2⁶³)."""
    seeded = hashlib.blake2b(f"{seed}\x1f".encode(), digest_size=8)
    digests = []
    for passage_id in passage_ids:
        passage_hash = seeded.copy()  # half the time of a new one
        passage_hash.update(passage_id.encode())
        digests.append(passage_hash.digest())
    return (np.frombuffer(b"".join(digests), ">u8") >> np.uint64(1)).astype(np.int64)


def probe_bounds(sizes: np.ndarray, number: int) -> np.ndarray:
    """Bounds, (K,) as shares of all priorities, below which each cluster of `sizes` (K,) has `number` passages."""
    wanted = number + SIGMAS * np.sqrt(number) + SIGMAS**2
    return np.minimum(wanted / np.maximum(sizes, 1), 1.0)


def draw_probe(candidates: pa.Table, number: int) -> pa.Table:
    """The `number` lowest priorities of each cluster; candidates have passage_id, cluster_id and priority."""
    ordered = candidates.sort_by([(name, "ascending") for name in ("cluster_id", "priority", "passage_id")])
    labels = ordered["cluster_id"].to_numpy()
    return ordered.filter(pa.array(np.arange(len(labels)) - _first(labels) < number))


def bounds(
    sizes: np.ndarray,
    total_secs: np.ndarray,
    share: np.ndarray,
    budget_secs: float,
    num_probed: int,
    slack: float = 1.0,
) -> np.ndarray:
    """Bounds, (K,) as shares of all priorities, below which everything lies that the budget can reach.

    The number of passages that fill a cluster's part of the budget varies with their durations, and the number of
    priorities below a bound varies by itself; the margin covers `SIGMAS` of both. `exhausted` says if it did not.

    Args:
        sizes: passages of each cluster, (K,).
        total_secs: what they would last, float (K,).
        share: P_target (K,); a cluster without gets the bound 0.
        num_probed: passages of each cluster that the probe has, which are not drawn.
        slack: factor on the margin, for another try.
    """
    drawable = np.maximum(sizes - num_probed, 0)
    mean_secs = np.divide(total_secs, sizes, out=np.ones_like(total_secs), where=sizes > 0)
    level = _level(drawable, np.maximum(mean_secs, 1e-9), share, budget_secs)
    number = (np.full_like(share, np.inf) if np.isinf(level) else level * share) + num_probed + 1
    margin = slack * (SIGMAS * (1 + SPREAD) * np.sqrt(number) + SIGMAS**2)
    return np.where(share > 0, np.minimum((number + margin) / np.maximum(sizes, 1), 1.0), 0.0)


def _level(number: np.ndarray, mean_secs: np.ndarray, share: np.ndarray, budget_secs: float) -> float:
    """λ with Σ_c min(number_c, λ · share_c) · mean_secs_c = budget; infinite where that is all there is or more."""
    number, mean_secs, share = number[share > 0], mean_secs[share > 0], share[share > 0]
    with np.errstate(over="ignore"):  # shares may be as small as floats are
        dry_at = number / share  # λ at which each cluster runs dry
    order = np.argsort(dry_at)
    total_secs, rate = (number * mean_secs)[order], (share * mean_secs)[order]
    dried_secs = np.cumsum(total_secs) - total_secs  # of the clusters that run dry before it
    left = np.cumsum(rate[::-1])[::-1]  # of it and those after it; a difference would lose the small ones
    drawn_secs = dried_secs + dry_at[order] * left  # of all clusters, when it runs dry
    turn = int(np.searchsorted(drawn_secs, budget_secs, side="right"))
    return float((budget_secs - dried_secs[turn]) / left[turn]) if turn < len(order) else float("inf")


def draw(candidates: pa.Table, share: np.ndarray, budget_secs: float) -> pa.Table:
    """The passages of a budget in seconds of speech, in their order, with their `rank`.

    They are the same in whatever order, and from whatever shards, the candidates come. Fewer passages than the budget
    has room for are all there are; none, if the first one is too long.

    Args:
        candidates: passage_id, cluster_id, priority and duration_secs (more is kept), without the probe's. Of every
            cluster the lowest priorities suffice, if `exhausted` agrees.
        share: P_target (K,).

    Raises:
        ValueError: a duration that is not above 0 and finite.
    """
    drawable = candidates.filter(pa.array(share[candidates["cluster_id"].to_numpy()] > 0))
    ordered = drawable.sort_by([(name, "ascending") for name in ("cluster_id", "priority", "passage_id")])
    ticks = _ticks(ordered)
    keys = _keys(ordered["cluster_id"].to_numpy(), share)
    order = np.lexsort((ordered["priority"].to_numpy(), keys))
    fits = int(np.searchsorted(np.cumsum(ticks[order]), budget_secs * TICKS, side="right"))
    chosen = ordered.take(pa.array(order[:fits]))
    return chosen.append_column("rank", pa.array(np.arange(fits), pa.int64()))


def _ticks(passages: pa.Table) -> np.ndarray:
    secs = passages["duration_secs"].to_numpy()
    bad = np.flatnonzero(~(np.isfinite(secs) & (secs > 0)))
    if len(bad):
        name = passages["passage_id"][int(bad[0])]
        raise ValueError(f"duration_secs of passage {name} is {secs[bad[0]]}; it must be above 0 and finite")
    return np.rint(secs * TICKS).astype(np.int64)


def _keys(labels: np.ndarray, share: np.ndarray) -> np.ndarray:
    """(n + 1/2) / P_target of passages (N,) sorted by cluster and priority, n counting those of a cluster from 0."""
    with np.errstate(over="ignore"):  # the smallest shares come last
        return (np.arange(len(labels)) - _first(labels) + 0.5) / share[labels]


def exhausted(candidates: pa.Table, chosen: pa.Table, limits: np.ndarray) -> bool:
    """Whether a cluster gave all its candidates although passages beyond its bound were never looked at.

    Then `chosen` may not be what all passages would have given: look again with larger bounds.

    Args:
        candidates, chosen: what `draw` was given and returned.
        limits: the bounds (K,) below which the candidates lie; a bound of 0 is a cluster that is not drawn from.
    """
    there = np.bincount(candidates["cluster_id"].to_numpy(), minlength=len(limits))
    taken = np.bincount(chosen["cluster_id"].to_numpy(), minlength=len(limits))
    return bool(((taken >= there) & (limits > 0) & (limits < 1)).any())


def _first(labels: np.ndarray) -> np.ndarray:
    """For each row of sorted labels (N,) the place of the first row with the same label."""
    starts = np.flatnonzero(np.diff(labels, prepend=-1))
    return np.repeat(starts, np.diff(np.append(starts, len(labels))))
