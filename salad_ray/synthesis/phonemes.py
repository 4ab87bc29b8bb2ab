"""English text → Kokoro's phonemes, with the place of each written word, in parts that Kokoro can take.

What is read comes from `read_words`. eSpeak NG pronounces it clause by clause, for "live", "use" or "record" sound as
the words around them demand (`heteronyms` mends what it gets wrong), and misaki's table maps that to the symbols that
Kokoro was trained on; neither needs spaCy's model. eSpeak runs some words together ("ʌvðə"): which sounds are whose is
found by the words said alone.
Punctuation that Kokoro knows stays, for it shapes the prosody.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise, product
from typing import TYPE_CHECKING

from salad_ray.speech.spoken import read_words
from salad_ray.synthesis.heteronyms import in_context
from salad_ray.tables import BadInput

if TYPE_CHECKING:
    from misaki.espeak import EspeakFallback

# misaki and phonemizer are imported where they are used: who brings phonemes along needs neither.

MAX_PHONEMES = 510
"""What Kokoro takes at once: 512 positions, less the marks of beginning and end."""

_SENTENCE_ENDS, _CLAUSE_ENDS = ".!?…", ",;:—)"
_PAUSES = ';:,.!?—…"()“”'
_ALIKE = str.maketrans({"‘": "'", "’": "'", "[": "(", "]": ")", "{": "(", "}": ")", "«": "“", "»": "”", "„": "“"})
_SPLIT = re.compile(r'(?P<before>["(“”—…]*)(?P<core>.*?)(?P<after>[;:,.!?—…"()“”]*)', re.DOTALL)
_BREAKS = re.compile(r'([;!?—…"()“”]+)')  # within a word; points, commas and colons there belong to numbers
_MAX_CHUNKS, _MAX_MERGED = 6, 3
"""Stretches without a space that eSpeak may say for a word, and words that it may say in one."""

_logger = logging.getLogger(f"{__name__}.phonemizer")
_logger.setLevel(logging.ERROR)  # it warns that "25" is spoken as two words
_lock = threading.Lock()  # eSpeak keeps its state in the process


@dataclass(frozen=True, slots=True)
class Part:
    """What is spoken in one go: `spans` holds for each written word the [start, end) of its sounds in `phonemes`.

    A word without sounds has an empty span behind the word before it. `phonemes` is empty where no word has any.
    """

    phonemes: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class _Pronounced:
    """A written word: punctuation, sounds, punctuation."""

    before: str
    sounds: str
    after: str

    def __len__(self) -> int:
        return len(self.before) + len(self.sounds) + len(self.after)


def to_parts(text: str, british: bool, symbols: Container[str], max_phonemes: int = MAX_PHONEMES) -> list[Part]:
    """Pronounce a text and divide it at sentence ends, else at clause ends, else between words.

    Args:
        british: en-gb instead of en-us.
        symbols: all that the model knows; what else comes up is left out, as Kokoro's own `KModel` does.
        max_phonemes: the longest part, punctuation and spaces included.

    Returns:
        Parts whose spans are together one for each of `text.split()`.

    Raises:
        BadInput: a word cannot be read, nothing in the text can be spoken, or a word is too long for a part.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput("the text holds lone surrogates, which are no characters") from None
    written = text.split()
    split = [_split(spoken.text) for spoken in read_words(written)]
    sounds = iter(_in_sentences(split, _sounds_in_context(split, british), british))
    words = [_pronounced(before, core, after, sounds, symbols) for before, core, after in split]
    if not any(word.sounds for word in words):
        raise BadInput("nothing in the text can be spoken" if written else "empty text")
    return [_join(words[start:end]) for start, end in pairwise(_bounds(words, max_phonemes))]


def _split(spoken: str) -> tuple[str, list[str], str]:
    """Punctuation before; the word, at odd places the punctuation within; punctuation after. One spelling for each."""
    text = re.sub(r"--+|–", "—", spoken.translate(_ALIKE).replace("...", "…"))
    match = _SPLIT.fullmatch("—" if text == "-" else text)
    assert match is not None
    return match["before"].replace('"', "“"), _BREAKS.split(match["core"]), match["after"].replace('"', "”")


def _sounds_in_context(split: Sequence[tuple[str, list[str], str]], british: bool) -> list[str]:
    """Sounds of all words between spaces and punctuation, in their order."""
    sounds: list[str] = []
    clause: list[str] = []
    for _, core, after in split:
        for index, piece in enumerate([*core, after]):
            if index % 2 == 0:
                clause += piece.split()
            elif set(piece) & set(_SENTENCE_ENDS + _CLAUSE_ENDS):
                sounds += _clause_sounds(clause, british)
                clause = []
    return sounds + _clause_sounds(clause, british)


def _in_sentences(split: Sequence[tuple[str, list[str], str]], sounds: Sequence[str], british: bool) -> Iterator[str]:
    """The sounds with those of heteronyms as their sentence demands."""
    words: list[str] = []
    left = list(sounds)
    for index, (_, core, after) in enumerate(split):
        own = " ".join(core[::2]).split()
        words += [*own[:-1], own[-1] + after] if own else []
        if set(after) & set(_SENTENCE_ENDS) or index == len(split) - 1:
            yield from in_context(words, left[: len(words)], british)
            left, words = left[len(words) :], []


def _pronounced(
    before: str, core: Sequence[str], after: str, sounds: Iterator[str], symbols: Container[str]
) -> _Pronounced:
    own = "".join(
        piece.replace('"', "”") if index % 2 else " ".join(filter(None, [next(sounds) for _ in piece.split()]))
        for index, piece in enumerate(core)
    )
    if not own.strip(_PAUSES):
        before, own, after = "", "", "".join(char for char in before + own + after if char in _PAUSES)
    known = ["".join(char for char in piece if char in symbols) for piece in (before, own, after)]
    return _Pronounced(*known)


def _clause_sounds(words: Sequence[str], british: bool) -> list[str]:
    """Sounds of each word of a clause, said in its context: those of the words alone tell where each one ends."""
    if len(words) < 2:
        return [sounds_of(word, british) for word in words]
    alone = [sounds_of(word, british).replace(" ", "") for word in words]
    sounds = _shared_out(tuple(alone), _phonemes(" ".join(words), british).split())
    return ["ɐ" if word == "a" and sound == "ə" else sound for word, sound in zip(words, sounds, strict=True)]


def _shared_out(alone: Sequence[str], chunks: Sequence[str]) -> list[str]:
    """The chunks that eSpeak says, shared out to the words, by the least edit distance to the words said alone.

    A word takes any number of chunks up to `_MAX_CHUNKS`; up to `_MAX_MERGED` words share one, which is divided.
    """
    if len(alone) == len(chunks) and all(
        _distance(*pair) <= 1 + len(pair[0]) // 2 for pair in zip(alone, chunks, strict=True)
    ):
        return list(chunks)
    slope, width = len(chunks) / len(alone), 2 + abs(len(chunks) - len(alone))
    costs = {(0, 0): 0.0}
    came_from: dict[tuple[int, int], tuple[int, int]] = {}
    for word, chunk in product(range(len(alone)), range(len(chunks) + 1)):
        if (word, chunk) not in costs or abs(chunk - word * slope) > width:
            continue
        for num_words, num_chunks in _STEPS:
            end = (word + num_words, chunk + num_chunks)
            if end[0] > len(alone) or end[1] > len(chunks):
                continue
            said, heard = "".join(alone[word : end[0]]), "".join(chunks[chunk : end[1]])
            if num_chunks > 1 and len(heard) > len(said) + _LONGER:
                break
            cost = costs[word, chunk] + _distance(said, heard) + 0.1 * (max(num_words, num_chunks) > 1)
            if cost < costs.get(end, math.inf):
                costs[end], came_from[end] = cost, (word, chunk)
    # More chunks than all words together can take are the last word's.
    end = max(place for place in costs if place[0] == len(alone))
    sounds = [*chunks[end[1] :]]
    while end != (0, 0):
        start = came_from[end]
        own = _divided(alone[start[0] : end[0]], " ".join(chunks[start[1] : end[1]]))
        sounds = [*own, *sounds]
        end = start
    return [*sounds[: len(alone) - 1], " ".join(sounds[len(alone) - 1 :])]


_STEPS = [(count, 1) for count in range(_MAX_MERGED, 0, -1)] + [(1, 0)] + [(1, n) for n in range(2, _MAX_CHUNKS + 1)]
_LONGER = 4
"""Sounds that a word may have in a clause beyond those that it has alone."""


def _divided(alone: Sequence[str], chunk: str) -> list[str]:
    """A chunk divided where its parts are nearest to the words said alone."""
    if len(alone) == 1:
        return [chunk]
    rest = alone[1:]
    divisions = [[chunk[:at], *_divided(rest, chunk[at:])] for at in range(1, len(chunk))]
    return min(divisions, key=lambda parts: sum(map(_distance, alone, parts)), default=[chunk, *[""] * len(rest)])


def _distance(alone: str, heard: str) -> float:
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(alone, heard) if heard or not alone else len(alone) + 2


@lru_cache(maxsize=1 << 16)
def sounds_of(word: str, british: bool) -> str:
    """Kokoro's phonemes of a word by itself; may be several words ("www"), or none."""
    # Alone, eSpeak would name the letter.
    return "ɐ" if word == "a" else _phonemes(word, british) if word else ""


def _phonemes(text: str, british: bool) -> str:
    """Kokoro's phonemes of a clause."""
    from misaki.token import MToken

    with _lock:
        phonemes, _ = _espeak(british)(MToken(text, tag="", whitespace=""))
    return " ".join((phonemes or "").split())


@cache
def _espeak(british: bool) -> EspeakFallback:
    from misaki.espeak import EspeakFallback
    from phonemizer.backend import EspeakBackend

    fallback = EspeakFallback(british)
    fallback.backend = EspeakBackend(
        "en-gb" if british else "en-us",
        punctuation_marks="\x00",  # else it cuts numbers: 3.50 would be "three. fifty"
        with_stress=True,
        tie="^",
        language_switch="remove-flags",
        logger=_logger,
    )
    return fallback


def _bounds(words: Sequence[_Pronounced], max_phonemes: int) -> list[int]:
    """Where parts begin, and the end."""
    bounds = [0]
    while bounds[-1] < len(words):
        start = bounds[-1]
        end = _furthest(words, start, max_phonemes)
        if end == start:
            raise BadInput(f"a word of {len(words[start])} phonemes is longer than the {max_phonemes} that fit")
        if end < len(words):
            end = max(range(start + 1, end + 1), key=lambda bound: (_rank(words[bound - 1]), bound))
        bounds.append(end)
    return bounds


def _furthest(words: Sequence[_Pronounced], start: int, max_phonemes: int) -> int:
    """The end of the most words from `start` on that fit."""
    used = -1  # no space before the first
    for index in range(start, len(words)):
        used += len(words[index]) + 1 if len(words[index]) else 0
        if used > max_phonemes:
            return index
    return len(words)


def _rank(word: _Pronounced) -> int:
    """How well a part can end behind a word."""
    return 2 if any(char in _SENTENCE_ENDS for char in word.after) else int(any(c in _CLAUSE_ENDS for c in word.after))


def _join(words: Sequence[_Pronounced]) -> Part:
    phonemes, spans, end = "", [], 0
    for word in words:
        if len(word):
            phonemes += " " if phonemes else ""
        if word.sounds:
            start = len(phonemes) + len(word.before)
            end = start + len(word.sounds)
            spans.append((start, end))
        else:
            spans.append((end, end))
        phonemes += word.before + word.sounds + word.after
    return Part(phonemes if any(word.sounds for word in words) else "", spans)
