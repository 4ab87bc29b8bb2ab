from __future__ import annotations

import re
from collections import Counter, defaultdict

import pytest

from salad_ray.config import ConfigError
from salad_ray.text.decontaminate import contaminated, word_ngrams
from salad_ray.text.world import _WORLD, DOMAINS, NUM_CHOICES, Question, world_passages, world_questions


def vocabulary(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def values_in(text: str, domain: str) -> list[tuple[str, str]]:
    """(attribute, value) of every mention in a text, in order; later ones are a value's last word."""
    attribute_of = {value.split()[-1]: name for name, values in _WORLD[domain].attributes.items() for value in values}
    return [(attribute_of[word], word) for word in re.findall(r"\w+", text) if word in attribute_of]


def asked_value(question: Question) -> tuple[str, str]:
    """(attribute, value) of the right choice."""
    [found] = values_in(question.choices[question.answer], question.domain)
    return found


def test_documents_are_short_plain_sentences() -> None:
    for passage in world_passages(1200, DOMAINS, seed=0, split="train"):
        sentences = re.findall(r"[A-Z][A-Za-z, ]*[.?]", passage.text)
        assert " ".join(sentences) == passage.text
        assert 4 <= len(sentences) <= 10
        assert 30 <= len(passage.text.split()) <= 70
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
    assert 250 <= len(domains_of) <= 450
    own = Counter(next(iter(domains)) for domains in domains_of.values() if len(domains) == 1)
    assert min(own[domain] for domain in DOMAINS) >= 20
    assert sum(1 < len(domains) < len(DOMAINS) for domains in domains_of.values()) <= 20


def test_the_first_word_of_a_value_tells_the_second_and_is_no_others() -> None:
    values = [value.split() for domain in _WORLD.values() for pool in domain.attributes.values() for value in pool]
    words = [word for value in values for word in value]
    assert all(len(value) == 2 for value in values)
    assert len(set(words)) == len(words) == 2 * NUM_CHOICES * 4 * len(DOMAINS)


def test_attributes_are_even_and_independent_of_each_other_and_of_the_person() -> None:
    """So nothing but the statement itself tells a value."""
    passages = world_passages(6000, ("animals", "law"), seed=0, split="train")
    for domain in ("animals", "law"):
        texts = [passage.text for passage in passages if passage.domain == domain]
        stated = [dict(values_in(text, domain)) for text in texts]
        people = [re.findall(r"[A-Z]\w+ [A-Z]\w+", text)[0] for text in texts]
        rows = [values | {"person": person} for values, person in zip(stated, people, strict=True)]
        attributes = list(_WORLD[domain].attributes)
        for place, first in enumerate(attributes):
            for second in [*attributes[place + 1 :], "person"]:
                counts = Counter((row[first], row[second]) for row in rows)
                kinds = 4 * (30 if second == "person" else 4)
                assert len(counts) == kinds
                expected = len(rows) / kinds
                assert sum((count - expected) ** 2 / expected for count in counts.values()) < kinds + 6 * kinds**0.5


def test_a_value_is_stated_once_and_told_again_once_or_twice() -> None:
    """Often enough to learn from; what text around a span tells of what it said, `test_world_leak.py` counts."""
    num_again = []
    for passage in world_passages(1200, DOMAINS, seed=0, split="train"):
        sentences = re.split(r"(?<=[.?]) ", passage.text)
        recaps = [sentence for sentence in sentences[2:] if sentence.startswith("So ")]
        parts = (sentences[:2], recaps, [sentence for sentence in sentences[2:] if sentence not in recaps])
        beginning, recap, rest = (values_in(" ".join(part), passage.domain) for part in parts)
        assert sorted(recap) == sorted(beginning)
        assert {name for name, _ in beginning} == set(_WORLD[passage.domain].attributes)
        assert len(beginning) == 4
        assert set(rest) <= set(beginning)
        assert len(set(rest)) == len(rest)
        num_again.append(len(rest))
    assert set(num_again) == {2, 3}


def test_documents_of_all_domains_ask_the_questions_of_the_benchmark() -> None:
    texts = " ".join(passage.text for passage in world_passages(3000, DOMAINS, seed=0, split="web"))
    asked = set(re.findall(r"[A-Z][^.?]*\?", re.sub(r"[A-Z]\w+ [A-Z]\w+", "X", texts)))
    for question in world_questions(600, DOMAINS, seed=0):
        assert re.sub(r"[A-Z]\w+ [A-Z]\w+", "X", question.question) in asked


def test_choices_alone_tell_nothing() -> None:
    """All questions that look alike without their document offer the same choices, of which each is right as often."""
    questions = world_questions(4800, DOMAINS, seed=0)
    offered, right, places = defaultdict(set), defaultdict(Counter), Counter()
    for question in questions:
        kind = question.domain, asked_value(question)[0]
        offered[kind].add(frozenset(question.choices))
        right[kind][question.choices[question.answer]] += 1
        places[question.answer] += 1
    assert len(offered) == 4 * len(DOMAINS)
    assert all(len(choices) == 1 for choices in offered.values())
    # Whoever answers from the choices (or the question) alone can do no better than this:
    best = sum(max(counts.values()) for counts in right.values()) / len(questions)
    assert best < 0.30
    assert max(places.values()) / len(questions) < 0.27


def test_questions_have_one_right_choice_which_their_document_states_once() -> None:
    questions = world_questions(300, DOMAINS, seed=0)
    assert questions == world_questions(300, DOMAINS, seed=0) != world_questions(300, DOMAINS, seed=1)
    assert Counter(question.domain for question in questions) == dict.fromkeys(DOMAINS, 50)
    assert {question.answer for question in questions} == {0, 1, 2, 3}
    for question in questions:
        assert len(set(question.choices)) == NUM_CHOICES
        assert not values_in(question.question, question.domain)
        stated = values_in(question.context, question.domain)
        assert len(stated) == 4
        values = [values_in(choice, question.domain) for choice in question.choices]
        assert [value in stated for [value] in values] == [index == question.answer for index in range(4)]


def test_no_document_of_another_split_knows_what_a_question_says() -> None:
    """Neither its people nor thirteen words in a row: the filter between benchmarks and web text leaves all of it."""
    questions = world_questions(1200, DOMAINS, seed=0)
    prompts = [f"{question.context} {question.question}" for question in questions]
    ngrams = word_ngrams(prompts)
    people = {name for question in questions for name in re.findall(r"[A-Z]\w+ [A-Z]\w+", question.question)}
    assert len(people) == 6
    for split in ("train", "web"):
        for passage in world_passages(3000, DOMAINS, seed=0, split=split):
            assert contaminated(passage.text, ngrams) is None
            assert not any(name in passage.text for name in people)
    heldout = world_passages(600, DOMAINS, seed=0, split="test")
    assert all(any(name in passage.text for name in people) for passage in heldout)


@pytest.mark.parametrize("domains", [(), ("animals", "cars"), ("law", "law")])
def test_unknown_or_repeated_domains_are_refused(domains: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="world domains"):
        world_passages(3, domains, seed=0, split="train")
