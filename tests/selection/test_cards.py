"""Cluster cards: terms that tell clusters apart, shares, closest passages; and what purity says at its limits."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from salad_ray.selection.cards import cards_table, chance_purity, cluster_cards, purity
from salad_ray.text.world import DOMAINS, world_passages


def cards_of(texts: list[str], labels: list[int], distances: list[float], num_clusters: int, **settings: int) -> list:
    sizes = np.bincount(labels, minlength=num_clusters).tolist()
    return cluster_cards(texts, np.array(labels, int), np.array(distances), num_clusters, sizes, **settings)


def test_terms_are_of_their_own_domain() -> None:
    passages = world_passages(300, DOMAINS, seed=0, split="web")
    labels = [DOMAINS.index(passage.domain) for passage in passages]
    cards = cards_of([passage.text for passage in passages], labels, [0.0] * 300, len(DOMAINS))
    terms = {domain: card["terms"] for domain, card in zip(DOMAINS, cards, strict=True)}
    assert all(len(words) == 8 for words in terms.values())
    assert len({word for words in terms.values() for word in words}) == 48  # no word tells of two
    assert "orion" in terms["stars"]
    assert "anna" not in terms["law"]  # as frequent as any word of law, and everywhere


def test_terms_weigh_as_class_based_tf_idf() -> None:
    cards = cards_of(["violin violin shared shared shared", "comet shared"], [0, 1], [0, 0], 2)
    # A = 7 / 2; of cluster 0: violin 2/5 · log(1 + 3.5 / 2) = 0.40, shared 3/5 · log(1 + 3.5 / 4) = 0.38
    assert cards[0]["terms"] == ["violin", "shared"]
    # of cluster 1: comet 1/2 · log(1 + 3.5), shared 1/2 · log(1 + 3.5 / 4)
    assert cards[1]["terms"] == ["comet", "shared"]


def test_the_closest_passages_come_in_order_and_ties_in_that_of_the_sample() -> None:
    texts = ["far away", "nearest", "tie one", "tie two", "other cluster"]
    cards = cards_of(texts, [0, 0, 0, 0, 1], [0.9, 0.1, 0.5, 0.5, 0.0], 2, num_closest=3)
    assert cards[0]["closest"] == ["nearest", "tie one", "tie two"]
    assert cards[1]["closest"] == ["other cluster"]


def test_shares_are_of_all_passages_and_not_of_the_sample() -> None:
    cards = cluster_cards(["owl", "soup"], np.array([0, 1]), np.zeros(2), 3, sizes=[30, 60, 10])
    assert [card["size"] for card in cards] == [30, 60, 10]
    assert [card["share"] for card in cards] == pytest.approx([0.3, 0.6, 0.1])


def test_empty_clusters_have_cards_and_cards_are_json() -> None:
    cards = cards_of(["an owl hunts mice", "the soup is hot"], [2, 0], [0.0, 0.0], 4)
    assert [card["cluster_id"] for card in cards] == [0, 1, 2, 3]
    for index in (1, 3):
        assert cards[index] == {"cluster_id": index, "size": 0, "share": 0.0, "terms": [], "closest": []}
    assert json.loads(json.dumps(cards)) == cards


@pytest.mark.parametrize("texts", [[], ["the of and", "12 3 _"]])
def test_samples_without_a_telling_word_give_cards_without_terms(texts: list[str]) -> None:
    cards = cards_of(texts, [0] * len(texts), [0.0] * len(texts), 2)
    assert [card["terms"] for card in cards] == [[], []]
    assert cards[0]["closest"] == texts


def test_the_table_shows_each_cluster_on_a_line() -> None:
    long = "The judge signs [bold]a treaty[/bold] " + "about borders and rivers " * 10
    cards = cards_of([long, "An owl hunts."], [0, 2], [0.0, 0.0], 3)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(cards_table(cards))
    lines = [line for line in capture.get().splitlines() if "%" in line]
    assert len(lines) == 3
    assert "50.00%" in lines[0]
    assert "signs [bold]a treaty[/bold] about" in lines[0]
    assert "…" in lines[0]
    assert "0.00%" in lines[1]
    assert "An owl hunts." in lines[2]


def test_purity_at_its_limits() -> None:
    domains = ["a", "a", "b", "b"]
    assert purity(np.array([1, 1, 0, 0]), domains) == 1  # whatever the clusters' numbers
    assert purity(np.array([0, 1, 2, 3]), domains) == 1  # a cluster of one is always pure
    assert purity(np.array([0, 0, 0, 0]), domains) == 0.5  # one cluster: the share of the largest domain
    assert purity(np.array([0, 0, 0, 5]), domains) == 0.75
    assert math.isnan(purity(np.empty(0, int), []))


def test_chance_purity_of_large_clusters_is_the_share_of_the_largest_domain() -> None:
    domains = ["a"] * 6000 + ["b"] * 4000
    labels = np.random.default_rng(1).integers(4, size=10_000)
    assert chance_purity(labels, domains) == pytest.approx(0.6, abs=0.01)
    assert chance_purity(labels, domains) == chance_purity(labels, domains)
    assert chance_purity(np.repeat([0, 1], [6000, 4000]), domains) < purity(np.repeat([0, 1], [6000, 4000]), domains)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abc")), min_size=1))
def test_purity_lies_between_the_largest_domain_and_one_and_ignores_order(pairs: list[tuple[int, str]]) -> None:
    labels, domains = np.array([label for label, _ in pairs]), [domain for _, domain in pairs]
    largest = max(domains.count(domain) for domain in "abc") / len(domains)
    assert largest - 1e-12 <= purity(labels, domains) <= 1
    assert largest - 1e-12 <= chance_purity(labels, domains) <= 1
    assert purity(labels[::-1], domains[::-1]) == purity(labels, domains)
