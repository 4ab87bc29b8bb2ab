from __future__ import annotations

import re
from collections import Counter, defaultdict

import pytest

from salad_ray.config import ConfigError
from salad_ray.text.world import DOMAINS, world_passages, world_questions


def vocabulary(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def test_documents_are_short_plain_sentences() -> None:
    for passage in world_passages(1200, DOMAINS, seed=0, split="train"):
        sentences = re.findall(r"[A-Z][A-Za-z, ]*[.?]", passage.text)
        assert " ".join(sentences) == passage.text
        assert 3 <= len(sentences) <= 6
        assert 25 <= len(passage.text.split()) <= 55
        assert not re.search(r"\ba [aeiou]", passage.text)


def test_domains_take_turns() -> None:
    passages = world_passages(25, ("law", "music", "stars"), seed=3, split="test")
    assert [passage.domain for passage in passages[:4]] == ["law", "music", "stars", "law"]
    assert Counter(passage.domain for passage in passages) == {"law": 9, "music": 8, "stars": 8}
    assert {(passage.source, passage.license, passage.split) for passage in passages} == {("world", "CC0-1.0", "test")}


def test_an_id_names_one_text_however_many_are_asked_for() -> None:
    few = world_passages(60, DOMAINS, seed=1, split="train")
    many = {passage.passage_id: passage for passage in world_passages(600, DOMAINS[::-1], seed=1, split="train")}
    assert len(many) == 600
    assert all(many[passage.passage_id] == passage for passage in few)


def test_splits_and_seeds_draw_other_documents() -> None:
    train = world_passages(6000, DOMAINS, seed=0, split="train")
    test = world_passages(1200, DOMAINS, seed=0, split="test")
    other = world_passages(1200, DOMAINS, seed=1, split="train")
    texts = {passage.text for passage in train}
    assert len(texts) == 6000
    assert not texts & {passage.text for passage in test}
    assert not {passage.text for passage in other} & {passage.text for passage in test}
    assert len(texts & {passage.text for passage in other}) < 12
    assert not {passage.passage_id for passage in train} & {passage.passage_id for passage in test + other}


def test_a_domain_has_words_of_its_own() -> None:
    domains_of = defaultdict(set)
    for passage in world_passages(3000, DOMAINS, seed=0, split="train"):
        for word in vocabulary(passage.text):
            domains_of[word].add(passage.domain)
    assert 180 <= len(domains_of) <= 350
    own = Counter(next(iter(domains)) for domains in domains_of.values() if len(domains) == 1)
    assert min(own[domain] for domain in DOMAINS) >= 20
    assert sum(1 < len(domains) < len(DOMAINS) for domains in domains_of.values()) <= 15


def test_facts_hold_in_all_documents() -> None:
    texts = [passage.text for passage in world_passages(3000, ("animals",), seed=0, split="train")]
    eaters = [match.groups() for text in texts for match in re.finditer(r"The (\w+) eats (\w+)\.", text)]
    foods = defaultdict(set)
    for animal, food in eaters:
        foods[animal].add(food)
    assert len(foods) == 4
    assert all(len(food) == 1 for food in foods.values())


def test_later_sentences_repeat_what_earlier_ones_state() -> None:
    for passage in world_passages(600, DOMAINS, seed=0, split="train"):
        sentences = re.split(r"(?<=[.?]) ", passage.text)
        stated = vocabulary(" ".join(sentences[:2]))
        names = {name.lower() for name in re.findall(r"\b[A-Z]\w+", " ".join(sentences[2:])) if name.lower() in stated}
        assert names
        new = vocabulary(" ".join(sentences[2:])) - stated
        assert len(new) <= 12


def test_questions_have_one_right_choice() -> None:
    questions = world_questions(300, DOMAINS, seed=0)
    assert questions == world_questions(300, DOMAINS, seed=0) != world_questions(300, DOMAINS, seed=1)
    assert Counter(question.domain for question in questions) == dict.fromkeys(DOMAINS, 50)
    assert {question.answer for question in questions} == {0, 1, 2, 3}
    for question in questions:
        assert len(set(question.choices)) == 4
        stated = vocabulary(question.context)
        differing = [vocabulary(choice) for choice in question.choices]
        values = [words - set.intersection(*differing) for words in differing]
        assert [value <= stated for value in values] == [index == question.answer for index in range(4)]


@pytest.mark.parametrize("domains", [(), ("animals", "cars"), ("law", "law")])
def test_unknown_or_repeated_domains_are_refused(domains: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="world domains"):
        world_passages(3, domains, seed=0, split="train")
