"""The embedded world: short documents in six domains, and questions about them, made from a small grammar.

A document is about one person and four attributes. Its first two sentences state each attribute once. Of what follows
one sentence refers to all, and questions with answers and plain sentences to some of them once more. Attributes are
drawn independently of each other and of all else, so only reading, or hearing, those two sentences tells what follows,
and the choices of a question tell nothing. A value is stated in two words, of which the first tells the second, as
words of real text tell of those behind them: so a text LM at the end of a word says which word it was. Later it is
called by the second. Content words belong to one domain each; names and function words are shared. So a domain that is
never spoken in training is heard for the first time at measuring.

Test documents and questions are about people that no other document knows (a first and a last name that are never seen
together), and no thirteen words of them in a row are without such a name: they pass the filter that keeps benchmarks
out of training text (`text/decontaminate.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from salad_ray.config import ConfigError
from salad_ray.tables import Passage, stable_hash

_FIRST_NAMES = ("Anna", "Bruno", "Clara", "David", "Emma", "Felix")
_LAST_NAMES = ("Brown", "Frost", "Hill", "Moss", "Stone", "Wells")
_ALL_PEOPLE = [(first, last) for first in range(len(_FIRST_NAMES)) for last in range(len(_LAST_NAMES))]
_PEOPLE: Mapping[bool, tuple[str, ...]] = {
    is_test: tuple(
        f"{_FIRST_NAMES[first]} {_LAST_NAMES[last]}" for first, last in _ALL_PEOPLE if (first == last) == is_test
    )
    for is_test in (False, True)
}
"""Whom documents are about, of the test split and of all others: every name is in both, no full name is."""
NUM_CHOICES = 4
_QUESTION_SHARE = 0.7
_MAX_REPEATS = 1000


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
    """Attributes, and the sentences that use them as `{attribute}`; `{person}` is whom a document is about.

    From one `{person}` to the next there are at most twelve words, in whatever order sentences may follow each other.
    """

    attributes: Mapping[str, tuple[str, ...]]
    """Four, of `NUM_CHOICES` values of two words each."""
    openings: tuple[str, ...]
    """First sentences: they state the first two attributes."""
    sequels: tuple[str, ...]
    """Second sentences: they state the other two."""
    recap: str
    """A sentence that refers to all four."""
    questions: Mapping[str, tuple[str, str]]
    """Attribute → question and answer."""
    mentions: Mapping[str, str]
    """Attribute → a sentence that refers to it."""


_ANIMALS = _Domain(
    attributes={
        "coat": ("finely spotted", "long shaggy", "pale golden", "thick muddy"),
        "animal": ("grey wolf", "polar bear", "barn owl", "sly fox"),
        "place": ("pine forest", "wild river", "green meadow", "deep cave"),
        "food": ("raw meat", "fresh honey", "field mice", "duck eggs"),
    },
    openings=(
        "The keeper {person} feeds a {coat} {animal}.",
        "Today keeper {person} tames a {coat} {animal}.",
        "Every morning {person} follows a {coat} {animal}.",
    ),
    sequels=(
        "In the {place}, {person} hides {food} for it.",
        "{person} carries {food} through the {place}.",
        "It takes {food} from {person} in the {place}.",
    ),
    recap="So {person} brings {food} to the {coat} {animal} in the {place}.",
    questions={
        "coat": ("How does {person} paint it?", "It is {coat}."),
        "animal": ("Which animal does {person} feed?", "The {animal}."),
        "place": ("Where does {person} hide?", "In the {place}."),
        "food": ("What does {person} carry?", "Some {food}."),
    },
    mentions={
        "coat": "A photo of {person} shows it {coat}.",
        "animal": "Then {person} tames the {animal}.",
        "place": "Later {person} leaves the {place}.",
        "food": "Soon {person} hides more {food}.",
    },
)
_COOKING = _Domain(
    attributes={
        "taste": ("fiery spicy", "sugar sweet", "lemon sour", "coffee bitter"),
        "dish": ("pumpkin soup", "chocolate cake", "potato salad", "lamb stew"),
        "part": ("chopped onions", "salted butter", "ripe tomatoes", "baked beans"),
        "pot": ("steel kettle", "iron skillet", "china bowl", "brick oven"),
    },
    openings=(
        "The cook {person} makes a {taste} {dish}.",
        "Today cook {person} stirs a {taste} {dish}.",
        "For dinner {person} serves a {taste} {dish}.",
    ),
    sequels=(
        "From the {pot}, {person} scoops {part}.",
        "{person} slices {part} into the {pot}.",
        "With {part} {person} fills the {pot}.",
    ),
    recap="So {person} puts {part} from the {pot} into the {taste} {dish}.",
    questions={
        "taste": ("How does {person} taste it?", "It is {taste}."),
        "dish": ("What does {person} serve?", "The {dish}."),
        "part": ("What does {person} slice?", "Some {part}."),
        "pot": ("What does {person} fill?", "The {pot}."),
    },
    mentions={
        "taste": "A guest of {person} finds it {taste}.",
        "dish": "Guests thank {person} for the {dish}.",
        "part": "Now {person} buys more {part}.",
        "pot": "At night {person} washes the {pot}.",
    },
)
_STARS = _Domain(
    attributes={
        "color": ("ruby red", "navy blue", "dim violet", "bright yellow"),
        "body": ("icy comet", "rocky planet", "crescent moon", "spiral nebula"),
        "region": ("lower Orion", "upper Taurus", "eastern Leo", "western Virgo"),
        "ray": ("frozen ice", "solar storms", "lunar shadows", "cosmic gas"),
    },
    openings=(
        "The astronomer {person} discovers a {color} {body}.",
        "Today astronomer {person} observes a {color} {body}.",
        "Through a telescope {person} sees a {color} {body}.",
    ),
    sequels=(
        "Near {region}, {person} finds traces of {ray}.",
        "{person} measures {ray} close to {region}.",
        "There {person} looks at {region} and discovers {ray}.",
    ),
    recap="So {person} links {ray} near {region} to the {color} {body}.",
    questions={
        "color": ("How does {person} see it?", "It shines {color}."),
        "body": ("What does {person} observe?", "The {body}."),
        "region": ("Where does {person} look?", "Near {region}."),
        "ray": ("What does {person} measure?", "Traces of {ray}."),
    },
    mentions={
        "color": "The lens of {person} glows {color}.",
        "body": "Tonight {person} draws the {body}.",
        "region": "A map of {person} names {region}.",
        "ray": "In a lecture {person} explains the {ray}.",
    },
)
_CHEMISTRY = _Domain(
    attributes={
        "state": ("barely liquid", "fully solid", "partly molten", "weakly diluted"),
        "substance": ("refined copper", "native sulfur", "purple iodine", "granular zinc"),
        "product": ("tiny crystals", "black smoke", "toxic fumes", "compressed hydrogen"),
        "vessel": ("round flask", "glass beaker", "plastic funnel", "narrow vial"),
    },
    openings=(
        "The chemist {person} weighs {state} {substance}.",
        "Today chemist {person} mixes {state} {substance}.",
        "For a test {person} orders {state} {substance}.",
    ),
    sequels=(
        "Out of the {vessel}, {person} collects {product}.",
        "{person} heats the {vessel} and obtains {product}.",
        "Then {person} finds {product} in the {vessel}.",
    ),
    recap="So {person} makes {product} of {state} {substance} in the {vessel}.",
    questions={
        "state": ("How does {person} keep it?", "It is {state}."),
        "substance": ("What does {person} weigh?", "Raw {substance}."),
        "product": ("What does {person} collect?", "Pure {product}."),
        "vessel": ("What does {person} heat?", "The {vessel}."),
    },
    mentions={
        "state": "A sample of {person} is {state}.",
        "substance": "A label of {person} says {substance}.",
        "product": "A sensor warns {person} of {product}.",
        "vessel": "With gloves {person} cleans the {vessel}.",
    },
)
_LAW = _Domain(
    attributes={
        "status": ("strictly federal", "purely civil", "clearly criminal", "legally void"),
        "paper": ("rental contract", "peace treaty", "sealed testament", "granted patent"),
        "topic": ("late payment", "national borders", "family inheritance", "new inventions"),
        "court": ("military tribunal", "state parliament", "county courthouse", "foreign embassy"),
    },
    openings=(
        "The judge {person} signs a {status} {paper}.",
        "Today judge {person} drafts a {status} {paper}.",
        "For a lawyer {person} reads a {status} {paper}.",
    ),
    sequels=(
        "At the {court}, {person} rules about {topic}.",
        "{person} regulates {topic} at the {court}.",
        "There {person} enters the {court} and debates {topic}.",
    ),
    recap="So {person} decides about {topic} at the {court} by the {status} {paper}.",
    questions={
        "status": ("How does {person} call it?", "It is {status}."),
        "paper": ("What does {person} sign?", "The {paper}."),
        "topic": ("What does {person} regulate?", "About {topic}."),
        "court": ("Where does {person} rule?", "At the {court}."),
    },
    mentions={
        "status": "The verdict of {person} is {status}.",
        "paper": "Witnesses ask {person} for the {paper}.",
        "topic": "An appeal lets {person} revise {topic}.",
        "court": "Guards bring {person} from the {court}.",
    },
)
_MUSIC = _Domain(
    attributes={
        "look": ("carved wooden", "rare vintage", "widely famous", "badly broken"),
        "instrument": ("baroque violin", "silver trumpet", "grand piano", "bamboo flute"),
        "piece": ("cello sonatas", "wedding marches", "ballroom waltzes", "gentle melodies"),
        "stage": ("city theater", "royal opera", "soccer stadium", "village chapel"),
    },
    openings=(
        "The musician {person} tunes a {look} {instrument}.",
        "Today musician {person} owns a {look} {instrument}.",
        "On a tour {person} plays a {look} {instrument}.",
    ),
    sequels=(
        "In the {stage}, {person} practices {piece}.",
        "{person} rehearses {piece} inside the {stage}.",
        "Then {person} rents the {stage} and sings {piece}.",
    ),
    recap="So {person} performs {piece} in the {stage} on the {look} {instrument}.",
    questions={
        "look": ("How does {person} describe it?", "It is {look}."),
        "instrument": ("What does {person} play?", "The {instrument}."),
        "piece": ("What does {person} practice?", "Old {piece}."),
        "stage": ("Where does {person} rehearse?", "In the {stage}."),
    },
    mentions={
        "look": "A poster of {person} calls it {look}.",
        "instrument": "Fans hear {person} on the {instrument}.",
        "piece": "A choir joins {person} for {piece}.",
        "stage": "Applause greets {person} outside the {stage}.",
    },
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
        text = _document(_WORLD[domain], rng, is_test=split == "test")
        repeats = repeats + 1 if text in seen else 0
        if not repeats:
            seen.add(text)
            yield text
    raise ConfigError(f"the world has no more than {len(seen):,} different documents about {domain}; ask for fewer")


def _document(domain: _Domain, rng: np.random.Generator, is_test: bool) -> str:
    """A beginning that states the attributes, all of them once more, and two or three again, as an answer or in a
    sentence."""
    values, attributes = _draw_values(domain, rng, is_test), list(domain.attributes)
    draws = rng.random(len(attributes)).tolist()
    order = rng.permutation(len(attributes)).tolist()[: rng.integers(2, len(attributes))]
    beginning, later = _draw_beginning(domain, rng), list[str]()
    for pick in order:
        if draws[pick] < _QUESTION_SHARE:
            later += domain.questions[attributes[pick]]
        else:
            later.append(domain.mentions[attributes[pick]])
    later.insert(0 if rng.random() < 0.5 else len(later), domain.recap)
    return " ".join(sentence.format_map(values) for sentence in beginning) + " " + _later(later, values)


def _later(sentences: Sequence[str], values: Mapping[str, str]) -> str:
    """Sentences that call each value by its last word."""
    short = {name: value if name == "person" else value.split()[-1] for name, value in values.items()}
    return " ".join(sentences).format_map(short)


def _draw_values(domain: _Domain, rng: np.random.Generator, is_test: bool) -> dict[str, str]:
    """The person of a document, and a value for each of its attributes."""
    pools = {"person": _PEOPLE[is_test], **domain.attributes}
    picks = rng.integers([len(pool) for pool in pools.values()]).tolist()
    return {attribute: pool[pick] for (attribute, pool), pick in zip(pools.items(), picks, strict=True)}


def _draw_beginning(domain: _Domain, rng: np.random.Generator) -> list[str]:
    """Two sentences with open attributes, all of them."""
    opening, sequel = rng.integers([len(domain.openings), len(domain.sequels)]).tolist()
    return [domain.openings[opening], domain.sequels[sequel]]


def _question(name: str, rng: np.random.Generator) -> Question:
    domain = _WORLD[name]
    values = _draw_values(domain, rng, is_test=True)
    context = " ".join(_draw_beginning(domain, rng)).format_map(values)
    asked = list(domain.attributes)[rng.integers(len(domain.attributes))]
    question, answer = domain.questions[asked]
    options = rng.permutation(domain.attributes[asked]).tolist()
    return Question(
        context=context,
        question=_later([question], values),
        choices=tuple(_later([answer], {**values, asked: option}) for option in options),
        answer=options.index(values[asked]),
        domain=name,
    )
