"""English text → Kokoro's phonemes, word by word, in parts that Kokoro can take.

eSpeak NG pronounces each word by itself, numbers and symbols included, and misaki's table maps that to the symbols that
Kokoro was trained on; neither needs spaCy's model. Punctuation that Kokoro knows stays, for it shapes the prosody.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

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
_ABBREVIATION = re.compile(
    r"(?:mrs?|ms|messrs|dr|prof|st|gen|col|lt|sgt|capt|rev|hon|sen|gov|vs|vol|[a-z]|(?:[a-z]\.)+[a-z])", re.IGNORECASE
)

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
        BadInput: nothing in the text can be spoken, or a single word is too long for a part.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput("the text holds lone surrogates, which are no characters") from None
    written = text.split()
    words = [_pronounce(word, british, symbols, is_last=i == len(written)) for i, word in enumerate(written, start=1)]
    if not any(word.sounds for word in words):
        raise BadInput("nothing in the text can be spoken" if written else "empty text")
    return [_join(words[start:end]) for start, end in pairwise(_bounds(words, max_phonemes))]


def _pronounce(written: str, british: bool, symbols: Container[str], is_last: bool) -> _Pronounced:
    match = _SPLIT.fullmatch(_plain(written))
    assert match is not None
    before, core, after = match["before"].replace('"', "“"), match["core"], match["after"].replace('"', "”")
    sounds = "".join(
        piece.replace('"', "”") if index % 2 else sounds_of(piece, british)
        for index, piece in enumerate(_BREAKS.split(core))
    )
    if after == "." and not is_last and _ABBREVIATION.fullmatch(core):
        after = ""  # it ends no sentence
    if not sounds.strip(_PAUSES):
        before, sounds, after = "", "", "".join(char for char in before + core + after if char in _PAUSES)
    known = ["".join(char for char in piece if char in symbols) for piece in (before, sounds, after)]
    return _Pronounced(*known)


def _plain(written: str) -> str:
    """One spelling for quotes, brackets, dashes and dots."""
    text = written.translate(_ALIKE).replace("...", "…")
    text = re.sub(r"--+|―|(?<!\d)–|–(?!\d)", "—", text)
    return "—" if text == "-" else re.sub(r"[\x00-\x1f\x7f]", "", text)


@lru_cache(maxsize=1 << 16)
def sounds_of(piece: str, british: bool) -> str:
    """Kokoro's phonemes of a piece without spaces and pauses; may be several words ("25"), or none."""
    if piece in ("a", "A"):
        return "ɐ"  # alone, eSpeak would name the letter
    if not piece:
        return ""
    from misaki.token import MToken

    with _lock:
        phonemes, _ = _espeak(british)(MToken(piece, tag="", whitespace=""))
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
