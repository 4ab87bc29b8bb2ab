"""Drawing: budgets nest, shares are met to a passage, and shards, their order and bounds make no difference."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from salad_ray.selection.draw import bounds, draw, draw_probe, exhausted, priorities, probe_bounds
from salad_ray.selection.importance import target_share
from salad_ray.tables import stable_hash

NUM_CLUSTERS = 6


def passages(number: int, seed: int = 0, num_clusters: int = NUM_CLUSTERS, same_secs: bool = False) -> pa.Table:
    """Clusters of unequal sizes; durations vary by half of a mean that is three times as long in the last cluster as in
    the first, or not at all."""
    rng = np.random.default_rng(seed)
    names = [f"<urn:uuid:{seed}-{index}>#{index % 5}" for index in range(number)]
    labels = rng.choice(num_clusters, number, p=rng.dirichlet(np.full(num_clusters, 3.0)))
    means = np.linspace(10, 30, num_clusters)[labels]
    columns = {
        "passage_id": names,
        "cluster_id": labels,
        "priority": priorities(names, seed),
        "duration_secs": np.full(number, 7.5) if same_secs else means * rng.gamma(4, 0.25, number) + 0.1,
    }
    return pa.table(columns)


def shares(seed: int, num_clusters: int = NUM_CLUSTERS) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(num_clusters, 0.5))


def sizes(table: pa.Table, num_clusters: int = NUM_CLUSTERS) -> np.ndarray:
    return np.bincount(table["cluster_id"].to_numpy(), minlength=num_clusters)


def seconds(table: pa.Table, num_clusters: int = NUM_CLUSTERS) -> np.ndarray:
    return np.bincount(table["cluster_id"].to_numpy(), table["duration_secs"].to_numpy(), num_clusters)


def names(table: pa.Table) -> list[str]:
    return table["passage_id"].to_pylist()


def below(table: pa.Table, limits: np.ndarray) -> pa.Table:
    """What a worker lets through of a shard."""
    place = table["priority"].to_numpy() / 2.0**63
    return table.filter(pa.array(place < limits[table["cluster_id"].to_numpy()]))


def without(table: pa.Table, taken: pa.Table) -> pa.Table:
    return table.filter(pa.compute.invert(pa.compute.is_in(table["passage_id"], taken["passage_id"])))


def test_priorities_are_the_stable_hash_whatever_the_process() -> None:
    ids = ["<urn:uuid:0>#3", "", "naïve 😀", "a" * 300]
    here = priorities(ids, 7)
    assert here.dtype == np.int64
    assert here.tolist() == [stable_hash(7, name) >> 1 for name in ids]
    code = f"from salad_ray.selection.draw import priorities; print(priorities({ids!r}, 7).tolist())"
    elsewhere = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert elsewhere.strip() == str(here.tolist())
    assert priorities(["<urn:uuid:0>#3"], 0)[0] == 9144758431614551857  # another hash would redraw all runs
    assert len(priorities([], 0)) == 0


def test_priorities_are_uniform_and_independent_between_seeds() -> None:
    ids = [f"passage-{index}" for index in range(20_000)]
    first, second = priorities(ids, 0) / 2.0**63, priorities(ids, 1) / 2.0**63
    assert kstest(first, "uniform").pvalue > 0.001
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 300),
    st.lists(st.floats(0.1, 8000), min_size=2, max_size=5),
    st.booleans(),
)
def test_larger_budgets_begin_with_smaller_ones_and_none_is_exceeded(
    seed: int, number: int, budgets: list[float], same_secs: bool
) -> None:
    table, share = passages(number, seed, same_secs=same_secs), shares(seed)
    previous: list[str] = []
    for budget in sorted(budgets):
        chosen = draw(table, share, budget)
        assert names(chosen)[: len(previous)] == previous
        assert chosen["rank"].to_pylist() == list(range(len(chosen)))
        assert chosen["duration_secs"].to_numpy().sum() <= budget + 1e-3
        previous = names(chosen)
    assert len(set(previous)) == len(previous)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(50, 20_000))
def test_quotas_are_met_to_half_a_passage_and_dry_clusters_hand_theirs_on(seed: int, budget: float) -> None:
    table, share = passages(800, seed), shares(seed)
    chosen = draw(table, share, budget)
    if not len(chosen):
        return
    got, there = sizes(chosen), sizes(table)
    cluster = chosen["cluster_id"][len(chosen) - 1].as_py()
    level = (got[cluster] - 0.5) / share[cluster]  # the key of the last passage
    assert np.all(np.abs(got - np.minimum(level * share, there)) <= 0.5 + 1e-9)
    left, longest = budget - seconds(chosen).sum(), table["duration_secs"].to_numpy().max()
    assert len(chosen) == len(table) or left <= longest  # the budget is used up


def test_a_cluster_that_runs_dry_hands_its_share_on_in_proportion() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [20, 3000, 3000])
    ids = [f"p{index}" for index in range(len(labels))]
    columns = {"passage_id": ids, "cluster_id": labels, "priority": priorities(ids, 0)}
    table = pa.table(columns | {"duration_secs": rng.uniform(5, 15, len(labels)) * (1 + labels)})
    chosen = draw(table, np.array([0.7, 0.2, 0.1]), 20_000.0)
    got = sizes(chosen, 3)
    assert got[0] == 20
    assert got[1] == pytest.approx(2 * got[2], abs=2)
    assert seconds(chosen, 3).sum() == pytest.approx(20_000, abs=45)


def test_a_clusters_draw_is_its_lowest_priorities_in_their_order() -> None:
    table = passages(3000)
    chosen = draw(table, shares(1), 9000.0)
    for cluster in range(NUM_CLUSTERS):
        mine = table.filter(pa.compute.equal(table["cluster_id"], cluster)).sort_by("priority")
        drawn = chosen.filter(pa.compute.equal(chosen["cluster_id"], cluster))
        assert names(drawn) == names(mine)[: len(drawn)]


def test_clusters_without_share_give_nothing_even_if_the_budget_exceeds_all() -> None:
    table, share = passages(500), np.array([0.5, 0.0, 0.5, 0.0, 0.0, 0.0])
    chosen = draw(table, share, float("inf"))
    assert sizes(chosen).tolist() == np.where(share > 0, sizes(table), 0).tolist()
    assert len(draw(table, share, 0.05)) == 0  # less than the shortest passage
    assert len(draw(table.slice(0, 0), share, 100.0)) == 0


def test_shares_as_small_as_floats_are_come_last_and_do_no_harm() -> None:
    table, share = passages(500), np.array([0.5, 1e-308, 0.5, 1e-310, 1e-30, 0.0])
    chosen = draw(table, share, float("inf"))
    assert len(chosen) == len(table) - sizes(table)[5]
    assert set(chosen["cluster_id"].to_pylist()[: sizes(table)[[0, 2]].sum()]) == {0, 2}
    limits = bounds(sizes(table), seconds(table), share, float(seconds(table)[[0, 2, 4]].sum() - 60), 0)
    assert not exhausted(table, draw(table, share, 1000.0), limits)


@pytest.mark.parametrize("same_secs", [False, True])  # equal durations and shares make ties
@pytest.mark.parametrize("equal_shares", [False, True])
def test_order_and_shards_of_the_candidates_make_no_difference(same_secs: bool, equal_shares: bool) -> None:
    table = passages(2000, same_secs=same_secs)
    share = np.full(NUM_CLUSTERS, 1 / NUM_CLUSTERS) if equal_shares else shares(3)
    expected = draw(table, share, 6000.0)
    rng = np.random.default_rng(0)
    for num_shards in (1, 3, 17):
        shuffled = table.take(pa.array(rng.permutation(len(table))))
        cuts = np.sort(rng.integers(0, len(table), num_shards - 1))
        pieces = np.split(np.arange(len(table)), cuts)
        sharded = pa.concat_tables([shuffled.take(pa.array(piece)) for piece in pieces[::-1]])
        assert draw(sharded, share, 6000.0).equals(expected)


def test_equal_priorities_are_ordered_by_name() -> None:
    table = pa.table(
        {
            "passage_id": ["b", "a", "c"],
            "cluster_id": [0, 0, 0],
            "priority": [5, 5, 5],
            "duration_secs": [1.0, 1.0, 1.0],
        }
    )
    assert names(draw(table, np.array([1.0]), 2.0)) == ["a", "b"]
    assert names(draw_probe(table, 1)) == ["a"]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000), st.floats(1e-4, 1.2), st.integers(0, 12), st.booleans(), st.floats(0, 8), st.integers(1, 12)
)
def test_bounds_change_nothing_but_how_much_is_looked_at(
    seed: int, part: float, num_probed: int, same_secs: bool, gamma: float, num_clusters: int
) -> None:
    table = passages(3000, seed, num_clusters, same_secs)
    share = target_share(sizes(table, num_clusters), np.random.default_rng(seed).gamma(3, 0.2, num_clusters), gamma)
    probe = draw_probe(table, num_probed)
    open_table = without(table, probe)
    budget = part * table["duration_secs"].to_numpy().sum()
    limits = bounds(sizes(table, num_clusters), seconds(table, num_clusters), share, budget, num_probed)
    near = below(open_table, limits)
    chosen = draw(near, share, budget)
    assert not exhausted(near, chosen, limits)
    assert chosen.equals(draw(open_table, share, budget))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 0.5), st.floats(0.01, 1.0))
def test_whatever_the_bounds_a_draw_not_called_exhausted_is_that_of_all(seed: int, cut: float, part: float) -> None:
    table, share = passages(400, seed), shares(seed)
    budget = part * table["duration_secs"].to_numpy().sum()
    limits = np.random.default_rng(seed).uniform(0.001, 1, NUM_CLUSTERS) ** cut
    near = below(table, limits)
    chosen = draw(near, share, budget)
    if not exhausted(near, chosen, limits):
        assert chosen.equals(draw(table, share, budget))


def test_ties_go_by_priority_whatever_else_is_looked_at() -> None:
    """Equal shares and durations: every cluster's n-th passage is due at the same time."""
    table, share = passages(2000, same_secs=True), np.full(NUM_CLUSTERS, 1 / NUM_CLUSTERS)
    chosen = draw(table, share, 7.5 * 100)
    assert np.all(np.diff(chosen["priority"].to_numpy()[:NUM_CLUSTERS]) > 0)
    assert sorted(chosen["cluster_id"].to_pylist()[:NUM_CLUSTERS]) == list(range(NUM_CLUSTERS))
    limits = bounds(sizes(table), seconds(table), share, 7.5 * 100, 0)
    assert draw(below(table, limits), share, 7.5 * 100).equals(chosen)


def test_clusters_without_share_are_not_looked_at_nor_called_exhausted() -> None:
    table, share = passages(3000), np.array([0.5, 0.0, 0.5, 0.0, 0.0, 0.0])
    limits = bounds(sizes(table), seconds(table), share, 1000.0, 8)
    assert limits[share == 0].tolist() == [0] * 4
    near = below(table, limits)
    assert not exhausted(near, draw(near, share, 1000.0), limits)


def test_bounds_know_that_what_the_probe_took_is_handed_on() -> None:
    """Fifty small clusters lose 50 of their 60 passages to the probe; what they leave undone falls to the large one."""
    number, num_probed, budget = np.array([60] * 50 + [20_000]), 50, 5000.0
    labels, share = np.repeat(np.arange(51), number), np.array([0.018] * 50 + [0.1])
    ids = [f"p{index}" for index in range(len(labels))]
    columns = {"passage_id": ids, "cluster_id": labels, "priority": priorities(ids, 0)}
    table = pa.table(columns | {"duration_secs": np.ones(len(labels))})
    limits = bounds(number, number.astype(float), share, budget, num_probed)
    near = below(without(table, draw_probe(table, num_probed)), limits)
    chosen = draw(near, share, budget)
    assert sizes(chosen, 51).tolist() == [10] * 50 + [4500]
    assert not exhausted(near, chosen, limits)
    assert limits[50] < 0.5


def test_bounds_that_are_too_low_are_noticed_and_slack_raises_them() -> None:
    table, share = passages(3000), shares(2)
    probe_less = np.full(NUM_CLUSTERS, 0.01)
    near = below(table, probe_less)
    assert exhausted(near, draw(near, share, 5000.0), probe_less)
    narrow, wide = (bounds(sizes(table), seconds(table), share, 5000.0, 0, slack) for slack in (1.0, 2.0))
    assert np.all(wide >= narrow)
    assert np.any(wide > narrow)


def test_an_empty_hand_of_a_cluster_with_more_to_give_is_noticed() -> None:
    table = passages(3000)
    limits = np.array([1.0, 1e-9, 1.0, 1.0, 1.0, 1.0])
    near = below(table, limits)
    assert exhausted(near, draw(near, shares(2), 500.0), limits)


def test_few_candidates_are_collected_for_a_small_budget() -> None:
    """1 % of 10 M passages in 128 clusters: the margin doubles what is drawn at most."""
    count = np.full(128, 78_125)
    share = target_share(count, np.random.default_rng(0).lognormal(-1, 0.3, 128), 5)
    limits = bounds(count, count * 20.0, share, 100_000 * 20.0, 32)
    drawn = np.minimum(100_000 * share, count)
    assert np.all(limits * count >= np.minimum(drawn + 32, count))
    assert (limits * count).sum() < 2 * drawn.sum() + 128 * 200


def test_gamma_0_draws_uniformly_over_passages() -> None:
    """Sixteen groups of passages that cut across the clusters are drawn as often as they are large."""
    table = passages(40_000, same_secs=True)
    share = target_share(sizes(table) / len(table), np.linspace(0.1, 3, NUM_CLUSTERS), 0)
    chosen = draw(table, share, 7.5 * 8000)
    groups = np.array([stable_hash("group", name) % 16 for name in names(table)])
    picked = np.array([stable_hash("group", name) % 16 for name in names(chosen)])
    observed, expected = np.bincount(picked, minlength=16), np.bincount(groups, minlength=16) * 8000 / 40_000
    assert chisquare(observed, expected).pvalue > 0.001
    assert np.abs(sizes(chosen) - 0.2 * sizes(table)).max() <= 1


def test_gamma_0_draws_passages_as_often_whether_their_cluster_is_long_or_short() -> None:
    """The passages of the last cluster last three times as long; a quota in seconds would draw a third of them."""
    table = passages(40_000)
    share = target_share(sizes(table) / len(table), np.linspace(0.1, 3, NUM_CLUSTERS), 0)
    chosen = draw(table, share, 0.2 * table["duration_secs"].to_numpy().sum())
    number = len(chosen)
    assert np.abs(sizes(chosen) - number / 40_000 * sizes(table)).max() <= 1
    lengths = np.quantile(table["duration_secs"].to_numpy(), np.linspace(0, 1, 17))
    there, got = (
        np.bincount(np.searchsorted(lengths[1:-1], rows["duration_secs"].to_numpy()), minlength=16)
        for rows in (table, chosen)
    )
    assert chisquare(got, there * number / 40_000).pvalue > 0.001
    assert seconds(chosen).sum() == pytest.approx(0.2 * seconds(table).sum(), rel=0.001)


def test_the_probe_is_never_drawn_and_is_a_uniform_sample_of_each_cluster() -> None:
    table = passages(6000)
    probe = draw_probe(table, 40)
    assert sizes(probe).tolist() == np.minimum(sizes(table), 40).tolist()
    assert probe.equals(draw_probe(below(table, probe_bounds(sizes(table), 40)), 40))
    assert set(names(draw_probe(table, 10))) <= set(names(probe))
    chosen = draw(without(table, probe), shares(0), float("inf"))
    assert not set(names(chosen)) & set(names(probe))
    assert len(chosen) + len(probe) == len(table)
    position = {name: index for index, name in enumerate(names(table))}
    assert kstest([position[name] / len(table) for name in names(probe)], "uniform").pvalue > 0.001


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60))
def test_probe_bounds_let_the_whole_probe_through(seed: int, number: int) -> None:
    table = passages(2000, seed)
    near = below(table, probe_bounds(sizes(table), number))
    assert draw_probe(near, number).equals(draw_probe(table, number))


@pytest.mark.parametrize("secs", [0.0, -1.0, float("nan"), float("inf")])
def test_a_duration_that_is_none_is_an_error_naming_the_passage(secs: float) -> None:
    table = pa.table({"passage_id": ["a"], "cluster_id": [0], "priority": [1], "duration_secs": [secs]})
    with pytest.raises(ValueError, match="passage a"):
        draw(table, np.array([1.0]), 100.0)
