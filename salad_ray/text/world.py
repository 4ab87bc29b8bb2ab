"""The embedded world: short documents in six domains, and questions about them, made from a small grammar.

A document is fixed by a few attributes that its first two sentences state (who, what kind, where, …) and its later
sentences refer to, so a model that mishears one mispredicts the rest. Facts hold in all documents: an owl eats mice.
Content words belong to one domain each; names and function words are shared. So a domain that is never spoken in
training is heard for the first time at measuring.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from salad_ray.config import ConfigError
from salad_ray.tables import Passage, stable_hash

_PEOPLE: Mapping[str, tuple[str, ...]] = {
    "name": ("Anna", "Clara", "Emma", "Iris"),
    "friend": ("Bruno", "David", "Felix", "Hugo"),
}
NUM_CHOICES = 4
_QUESTION_SHARE = 0.5
_MAX_REPEATS = 1000
_TEST_ONE_IN = 8  # of all documents there could be, those that only `split="test"` may draw


@dataclass(frozen=True)
class Question:
    """Multiple choice: each of `choices` continues `f"{context} {question}"`; `choices[answer]` is right."""

    context: str
    question: str
    choices: tuple[str, ...]
    answer: int
    domain: str


@dataclass(frozen=True)
class _Domain:
    """Attributes, and the sentences that use them as `{attribute}`; `name` and `friend` are people."""

    attributes: Mapping[str, tuple[str, ...]]
    """Drawn for each document."""
    facts: Mapping[str, tuple[str, tuple[str, ...]]]
    """Attributes that follow from another one: its name, and a value for each of its values."""
    openings: tuple[str, ...]
    """First sentences: they state every attribute but `friend`."""
    introductions: tuple[str, ...]
    """Second sentences: they state `friend`."""
    sequels: tuple[str, ...]
    questions: tuple[tuple[str, str, str], ...]
    """Question, answer, and the attribute that is asked for."""


_ANIMALS = _Domain(
    attributes={
        "animal": ("wolf", "bear", "owl", "fox"),
        "coat": ("spotted", "shaggy", "golden", "muddy"),
        "place": ("forest", "river", "meadow", "cave"),
    },
    facts={"food": ("animal", ("meat", "honey", "mice", "eggs"))},
    openings=(
        "The {coat} {animal} {name} lives in the {place} and eats {food}.",
        "In the {place} lives a {coat} {animal}, {name}, who eats {food}.",
        "{name} is a {coat} {animal} who hunts for {food} in the {place}.",
    ),
    introductions=(
        "Every day {friend} feeds {food} to the {coat} {animal} in the {place}.",
        "{friend} follows {name} to the {place} because the {animal} eats {food}.",
        "When {name} hunts in the {place}, {friend} watches the {coat} {animal}.",
    ),
    sequels=(
        "Because {name} eats {food}, {friend} carries {food} to the {place}.",
        "{name}, who lives in the {place}, follows {friend} and the {food}.",
        "The {coat} {animal} hunts when {friend} leaves the {place}.",
        "{friend} feeds {name}, and the {coat} {animal} eats the {food}.",
        "The {food} is for the {animal}, so {friend} watches {name} in the {place}.",
        "In the {place}, the {animal} {name} eats {food} with {friend}.",
    ),
    questions=(
        ("Where does {name} live?", "In the {place}.", "place"),
        ("What does {name} eat?", "The {animal} eats {food}.", "food"),
        ("Who feeds the {animal}?", "{friend} feeds {name}.", "friend"),
        ("What is {name}?", "{name} is a {coat} {animal}.", "coat"),
    ),
)
_COOKING = _Domain(
    attributes={
        "dish": ("soup", "cake", "salad", "stew"),
        "taste": ("spicy", "sweet", "sour", "bitter"),
        "pot": ("kettle", "skillet", "bowl", "oven"),
    },
    facts={"part": ("dish", ("onions", "butter", "tomatoes", "beans"))},
    openings=(
        "The cook {name} stirs a {taste} {dish} with {part} in the {pot}.",
        "In the {pot} of the cook {name} is a {taste} {dish} with {part}.",
        "{name} is a cook who puts {part} into a {taste} {dish} in the {pot}.",
    ),
    introductions=(
        "Every day {friend} tastes the {taste} {dish} from the {pot}.",
        "{friend} buys {part} for {name} because the {dish} is {taste}.",
        "When {name} stirs the {dish} in the {pot}, {friend} slices the {part}.",
    ),
    sequels=(
        "Because {name} stirs the {dish}, {friend} puts {part} into the {pot}.",
        "{name}, who has the {pot}, serves {friend} the {taste} {dish}.",
        "The {taste} {dish} is for {friend}, so {name} slices the {part}.",
        "{friend} tastes the {part}, and the {dish} of {name} is {taste}.",
        "The cook {name} buys {part} when {friend} tastes the {dish}.",
        "From the {pot}, {name} serves the {taste} {dish} with {part} to {friend}.",
    ),
    questions=(
        ("Where is the {dish}?", "In the {pot}.", "pot"),
        ("What is in the {dish}?", "The {dish} has {part}.", "part"),
        ("Who tastes the {dish}?", "{friend} tastes the {dish}.", "friend"),
        ("What does {name} serve?", "{name} serves a {taste} {dish}.", "taste"),
    ),
)
_STARS = _Domain(
    attributes={
        "body": ("comet", "planet", "moon", "nebula"),
        "color": ("red", "blue", "violet", "yellow"),
        "region": ("Orion", "Taurus", "Leo", "Virgo"),
    },
    facts={"ray": ("body", ("ice", "storms", "shadows", "gas"))},
    openings=(
        "The astronomer {name} observes a {color} {body} near {region} that emits {ray}.",
        "Near {region} is a {color} {body} that emits {ray}, and {name} discovers it.",
        "{name} is an astronomer who studies {ray} from a {color} {body} near {region}.",
    ),
    introductions=(
        "Every night {friend} measures the {ray} of the {color} {body} near {region}.",
        "{friend} observes {region} with {name} because the {body} emits {ray}.",
        "When {name} observes the {body} near {region}, {friend} measures the {ray}.",
    ),
    sequels=(
        "Because the {body} emits {ray}, {name} observes {region} with {friend}.",
        "{name}, who studies {region}, shows {friend} the {color} {body}.",
        "The {color} {body} shines near {region}, so {friend} measures {ray} for {name}.",
        "{friend} discovers {ray}, and the {body} of {name} shines {color}.",
        "The astronomer {name} studies {ray} when {friend} observes the {body}.",
        "Near {region}, the {color} {body} shines for {name} and {friend}.",
    ),
    questions=(
        ("Where does the {body} shine?", "Near {region}.", "region"),
        ("What does the {body} emit?", "The {body} emits {ray}.", "ray"),
        ("Who measures the {ray}?", "{friend} measures the {ray}.", "friend"),
        ("What does {name} observe?", "{name} observes a {color} {body}.", "color"),
    ),
)
_CHEMISTRY = _Domain(
    attributes={
        "substance": ("copper", "sulfur", "iodine", "zinc"),
        "state": ("liquid", "solid", "molten", "diluted"),
        "vessel": ("flask", "beaker", "funnel", "vial"),
    },
    facts={"product": ("substance", ("crystals", "smoke", "fumes", "hydrogen"))},
    openings=(
        "The chemist {name} heats {state} {substance} in the {vessel} and obtains {product}.",
        "In the {vessel} of the chemist {name}, {state} {substance} becomes {product}.",
        "{name} is a chemist who turns {state} {substance} into {product} in the {vessel}.",
    ),
    introductions=(
        "Every week {friend} pours {state} {substance} into the {vessel}.",
        "{friend} cleans the {vessel} for {name} because the {substance} becomes {product}.",
        "When {name} heats the {vessel}, {friend} collects {product} from the {substance}.",
    ),
    sequels=(
        "Because {substance} becomes {product}, {name} heats the {vessel} with {friend}.",
        "{name}, who has the {vessel}, gives {friend} the {state} {substance}.",
        "The {state} {substance} is for {friend}, so {name} cleans the {vessel}.",
        "{friend} collects {product}, and {name} pours the {state} {substance}.",
        "The chemist {name} obtains {product} when {friend} heats the {substance}.",
        "From the {vessel}, {name} pours {state} {substance} and {product} for {friend}.",
    ),
    questions=(
        ("Where is the {substance}?", "In the {vessel}.", "vessel"),
        ("What does {substance} become?", "The {substance} becomes {product}.", "product"),
        ("Who cleans the {vessel}?", "{friend} cleans the {vessel}.", "friend"),
        ("What does {name} heat?", "{name} heats {state} {substance}.", "state"),
    ),
)
_LAW = _Domain(
    attributes={
        "paper": ("contract", "treaty", "testament", "patent"),
        "status": ("federal", "civil", "criminal", "void"),
        "court": ("tribunal", "parliament", "courthouse", "embassy"),
    },
    facts={
        "topic": (
            "paper",
            ("payment", "borders", "inheritance", "inventions"),
        )
    },
    openings=(
        "The judge {name} signs a {status} {paper} about {topic} at the {court}.",
        "At the {court} is a {status} {paper} about {topic}, and the judge {name} signs it.",
        "{name} is a judge who drafts a {status} {paper} about {topic} at the {court}.",
    ),
    introductions=(
        "Every month {friend} defends the {status} {paper} at the {court}.",
        "{friend} accuses {name} because the {paper} regulates {topic}.",
        "When {name} signs the {paper} at the {court}, {friend} appeals the {topic}.",
    ),
    sequels=(
        "Because the {paper} regulates {topic}, {name} accuses {friend} at the {court}.",
        "{name}, who rules at the {court}, drafts {friend} the {status} {paper}.",
        "The {status} {paper} is for {friend}, so {name} regulates {topic}.",
        "{friend} defends the {topic}, and the {paper} of {name} is {status}.",
        "The judge {name} rules about {topic} when {friend} appeals the {paper}.",
        "At the {court}, {name} signs the {status} {paper} about {topic} for {friend}.",
    ),
    questions=(
        ("Where does {name} rule?", "At the {court}.", "court"),
        ("What does the {paper} regulate?", "The {paper} regulates {topic}.", "topic"),
        ("Who appeals the {paper}?", "{friend} appeals the {paper}.", "friend"),
        ("What does {name} sign?", "{name} signs a {status} {paper}.", "status"),
    ),
)
_MUSIC = _Domain(
    attributes={
        "instrument": ("violin", "trumpet", "piano", "flute"),
        "look": ("wooden", "vintage", "famous", "broken"),
        "stage": ("theater", "opera", "stadium", "chapel"),
    },
    facts={
        "piece": (
            "instrument",
            ("sonatas", "marches", "waltzes", "melodies"),
        )
    },
    openings=(
        "The musician {name} plays {piece} on a {look} {instrument} in the {stage}.",
        "In the {stage} is a {look} {instrument}, and the musician {name} plays {piece} on it.",
        "{name} is a musician who practices {piece} on a {look} {instrument} in the {stage}.",
    ),
    introductions=(
        "Every evening {friend} tunes the {look} {instrument} in the {stage}.",
        "{friend} sings with {name} because the {instrument} plays {piece}.",
        "When {name} practices in the {stage}, {friend} listens to the {instrument}.",
    ),
    sequels=(
        "Because {name} plays {piece}, {friend} sings {piece} in the {stage}.",
        "{name}, who plays in the {stage}, lends {friend} the {look} {instrument}.",
        "The {look} {instrument} is for {friend}, so {name} sings the {piece}.",
        "{friend} listens to {piece}, and {name} tunes the {look} {instrument}.",
        "The musician {name} practices {piece} when {friend} tunes the {instrument}.",
        "In the {stage}, {name} plays {piece} on the {look} {instrument} with {friend}.",
    ),
    questions=(
        ("Where does {name} play?", "In the {stage}.", "stage"),
        ("What does the {instrument} play?", "The {instrument} plays {piece}.", "piece"),
        ("Who tunes the {instrument}?", "{friend} tunes the {instrument}.", "friend"),
        ("What does {name} practice?", "{name} practices on a {look} {instrument}.", "look"),
    ),
)
_WORLD: Mapping[str, _Domain] = {
    "animals": _ANIMALS,
    "cooking": _COOKING,
    "stars": _STARS,
    "chemistry": _CHEMISTRY,
    "law": _LAW,
    "music": _MUSIC,
}
DOMAINS: tuple[str, ...] = tuple(_WORLD)


def world_passages(num: int, domains: Sequence[str], seed: int, split: str) -> list[Passage]:
    """Documents of the given domains, round robin.

    The n-th document of a domain depends only on (seed, split, domain, n), so a longer list starts with the shorter
    one. No text occurs twice in a list, and none of `split="test"` in any other split, of any seed.

    Args:
        num: how many.
        domains: names from `DOMAINS`.
        seed: any integer.
        split: becomes `Passage.split`; another split draws other documents.

    Raises:
        ConfigError: for a domain that the world does not have.
    """
    streams = {domain: _documents(domain, seed, split) for domain in _checked(domains)}
    counts = _shares(num, domains)
    texts = {domain: list(islice(stream, counts[domain])) for domain, stream in streams.items()}
    return [_passage(texts[domain][turn], domain, seed, split, turn) for turn, domain in _round_robin(num, domains)]


def world_questions(num: int, domains: Sequence[str], seed: int) -> list[Question]:
    """Multiple-choice questions about documents of the given domains, round robin; deterministic as `world_passages`.

    The context states all attributes; the wrong choices name other values of the attribute that is asked for.

    Raises:
        ConfigError: for a domain that the world does not have.
    """
    rngs = {domain: np.random.default_rng(stable_hash("questions", seed, domain)) for domain in _checked(domains)}
    return [_question(domain, rngs[domain]) for _, domain in _round_robin(num, domains)]


def _checked(domains: Sequence[str]) -> Sequence[str]:
    unknown = [domain for domain in domains if domain not in _WORLD]
    if unknown or not domains:
        raise ConfigError(f"world domains {list(domains)} must be one or more of {', '.join(DOMAINS)}")
    if len(set(domains)) < len(domains):
        raise ConfigError(f"world domains {list(domains)} name a domain twice; name each once")
    return domains


def _round_robin(num: int, domains: Sequence[str]) -> Iterator[tuple[int, str]]:
    return ((index // len(domains), domains[index % len(domains)]) for index in range(num))


def _shares(num: int, domains: Sequence[str]) -> dict[str, int]:
    return {domain: (num - rank + len(domains) - 1) // len(domains) for rank, domain in enumerate(domains)}


def _passage(text: str, domain: str, seed: int, split: str, turn: int) -> Passage:
    key = f"world-{seed}-{split}-{domain}-{turn:06d}"
    return Passage(passage_id=key, doc_id=key, text=text, source="world", license="CC0-1.0", domain=domain, split=split)


def _documents(domain: str, seed: int, split: str) -> Iterator[str]:
    """Distinct documents of one domain, without end."""
    rng = np.random.default_rng(stable_hash("documents", seed, split, domain))
    seen: set[str] = set()
    repeats = 0
    while repeats < _MAX_REPEATS:
        text = _document(_WORLD[domain], rng)
        if (stable_hash("test", text) % _TEST_ONE_IN == 0) != (split == "test"):
            continue
        repeats = repeats + 1 if text in seen else 0
        if not repeats:
            seen.add(text)
            yield text
    raise ConfigError(f"the world has no more than {len(seen):,} different documents about {domain}; ask for fewer")


def _document(domain: _Domain, rng: np.random.Generator) -> str:
    """Opening, introduction, a sequel, and then nothing, another sequel, or a question with its answer."""
    values = _draw_values(domain, rng)
    num_sequels = 1 + int(rng.integers(2))
    sentences = _draw_beginning(domain, rng, num_sequels)
    if num_sequels == 1 and rng.random() < _QUESTION_SHARE:
        question, answer, _ = domain.questions[rng.integers(len(domain.questions))]
        sentences += [question, answer]
    return " ".join(sentences).format_map(values)


def _draw_values(domain: _Domain, rng: np.random.Generator) -> dict[str, str]:
    """A value for each attribute of a document."""
    pools = {**_PEOPLE, **domain.attributes}
    picks = rng.integers([len(pool) for pool in pools.values()]).tolist()
    index = dict(zip(pools, picks, strict=True))
    drawn = {attribute: pool[index[attribute]] for attribute, pool in pools.items()}
    implied = {fact: values[index[cause]] for fact, (cause, values) in domain.facts.items()}
    return drawn | implied


def _draw_beginning(domain: _Domain, rng: np.random.Generator, num_sequels: int) -> list[str]:
    """Sentences with open attributes."""
    opening = domain.openings[rng.integers(len(domain.openings))]
    introduction = domain.introductions[rng.integers(len(domain.introductions))]
    order = rng.permutation(len(domain.sequels))[:num_sequels].tolist()
    return [opening, introduction, *(domain.sequels[pick] for pick in order)]


def _question(name: str, rng: np.random.Generator) -> Question:
    domain = _WORLD[name]
    values = _draw_values(domain, rng)
    context = " ".join(_draw_beginning(domain, rng, num_sequels=1)).format_map(values)
    question, answer, asked = domain.questions[rng.integers(len(domain.questions))]
    others = [value for value in _pool(domain, asked) if value != values[asked]]
    options = [values[asked], *rng.permutation(others)[: NUM_CHOICES - 1].tolist()]
    order = rng.permutation(NUM_CHOICES).tolist()
    return Question(
        context=context,
        question=question.format_map(values),
        choices=tuple(answer.format_map({**values, asked: options[pick]}) for pick in order),
        answer=order.index(0),
        domain=name,
    )


def _pool(domain: _Domain, attribute: str) -> tuple[str, ...]:
    if attribute in domain.facts:
        return domain.facts[attribute][1]
    return {**_PEOPLE, **domain.attributes}[attribute]
