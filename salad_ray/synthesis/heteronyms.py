"""Words that sound as their part of speech demands: "He read it", "to close", "an abuse", "used to".

eSpeak NG has rules for the commonest of them only. misaki, whose phonemes Kokoro was trained on, has a table of forms
by part of speech. The parts of speech come from gruut's tagger (a CRF over two words to either side, trained on the
English Web Treebank), whose model a package brings along, while spaCy's would have to be downloaded.
"""

from __future__ import annotations

import base64
import importlib.resources
import json
import re
import string
from collections.abc import Sequence
from functools import cache
from typing import Any

MIN_CERTAINTY = 0.6
"""Of a part of speech; below it the word stays as eSpeak has it."""
_TAGS = {"DEFAULT", "NOUN", "VERB", "ADJ", "ADV", "VBD", "VBN", "VBP"}
_NEVER_NOUNS = ("closer", "consist", "consists")  # "a closer look", "it consists of", which the tagger takes for nouns
_PARENTS = {"VB": "VERB", "NN": "NOUN", "JJ": "ADJ", "RB": "ADV"}
_TOKEN = re.compile(r"\w+(?=n['’]t\b)|n['’]t\b|['’](?:s|ll|re|ve|d|m)\b|\w+(?:['’-]\w+)*?(?=n?['’]\w+\b|\b)|[^\w\s]")


def in_context(words: Sequence[str], sounds: Sequence[str], british: bool) -> list[str]:
    """The sounds of a sentence's words, with those of heteronyms that have another form there.

    Args:
        words: with the punctuation around them.
        sounds: of each word, as eSpeak has them; a word without any is left as it is.
    """
    known = _forms(british)
    plain = [word.strip(string.punctuation + "“”‘’…—").lower() for word in words]
    if not any(word in known for word in plain):
        return list(sounds)
    # A word that the tagger has hardly seen with a capital it would take for a name.
    tags = _tags([words[0][:1].lower() + words[0][1:] if plain[0] in known else words[0], *words[1:]])
    result = list(sounds)
    for index, word in enumerate(plain):
        if (forms := known.get(word)) and sounds[index]:
            following = (plain[index + 1], tags[index + 1][0]) if index + 1 < len(plain) else ("", "")
            tag, certainty = tags[index]
            if tag[:2] in _PARENTS and certainty >= MIN_CERTAINTY:
                form = _form(word, tag, following, forms)
                if form not in _nearest(sounds[index], forms):
                    result[index] = form
    return result


def _form(word: str, tag: str, following: tuple[str, str], forms: dict[str, str]) -> str:
    if word == "used":  # "used to go", "was used to it"; "was used to make it" has the other one
        is_habit = (tag in ("VBD", "JJ") and following[0] == "to") or following == ("to", "IN")
        return forms["VBD" if is_habit else "DEFAULT"]
    if tag == "VBP" and "VBD" in forms and word.endswith("read"):  # "they read it daily"
        return forms["DEFAULT"]
    return forms.get(tag) or forms.get(_PARENTS[tag[:2]]) or forms["DEFAULT"]


def _nearest(heard: str, forms: dict[str, str]) -> list[str]:
    from rapidfuzz.distance import Levenshtein

    distances = {form: Levenshtein.distance(heard, form) for form in forms.values()}
    return [form for form, distance in distances.items() if distance == min(distances.values())]


def _tags(words: Sequence[str]) -> list[tuple[str, float]]:
    """The Penn tag of each word, that of the longest of its parts, and how sure the tagger is of it."""
    tokens, owners = [], []
    for owner, word in enumerate(words):
        parts = _TOKEN.findall(word) or [word]
        tokens += parts
        owners += [owner] * len(parts)
    tagger = _tagger()
    found = [("", 0.0)] * len(words)
    longest = [0] * len(words)
    for index, (tag, owner) in enumerate(zip(tagger.tag(_features(tokens)), owners, strict=True)):
        if len(tokens[index]) > longest[owner]:
            found[owner], longest[owner] = (tag, tagger.marginal(tag, index)), len(tokens[index])
    return found


def _features(tokens: Sequence[str]) -> list[dict[str, Any]]:
    """What the tagger was trained on (gruut.pos): each word with two before and two behind it."""
    alone = [_features_alone(token) for token in tokens]
    features = []
    for index in range(len(tokens)):
        own: dict[str, Any] = dict(alone[index])
        for offset in (-2, -1, 1, 2):
            if 0 <= index + offset < len(tokens):
                own |= {f"{offset:+d}:{name}": value for name, value in alone[index + offset].items()}
        features.append(
            own | ({"BOS": True} if index == 0 else {}) | ({"EOS": True} if index == len(tokens) - 1 else {})
        )
    return features


def _features_alone(token: str) -> dict[str, Any]:
    ends = {f"word[:{size}]": token[:size] for size in (2, 3)} | {f"word[-{size}:]": token[-size:] for size in (2, 3)}
    return ends | {
        "bias": 1.0,
        "word": base64.b64encode(token.encode()).decode(),
        "len(word)": len(token),
        "word.ispunctuation": token in string.punctuation,
        "word.isdigit()": token.isdigit(),
    }


@cache
def _tagger() -> Any:
    import gruut_lang_en  # late, as all that only Kokoro needs
    import pycrfsuite

    tagger = pycrfsuite.Tagger()
    tagger.open(str(importlib.resources.files(gruut_lang_en) / "pos" / "model.crf"))
    return tagger


@cache
def _forms(british: bool) -> dict[str, dict[str, str]]:
    """misaki's words with several forms, by part of speech; not those that are only said with or without stress."""
    table = importlib.resources.files("misaki.data") / f"{'gb' if british else 'us'}_gold.json"
    entries = json.loads(table.read_text(encoding="utf-8"))
    return {
        word: forms
        for word, forms in entries.items()
        if isinstance(forms, dict)
        and word not in _NEVER_NOUNS
        and word.islower()
        and set(forms) <= _TAGS
        and len(set(forms.values())) > 1
    }
