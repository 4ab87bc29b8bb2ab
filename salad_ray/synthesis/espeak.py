"""eSpeak NG in process: speech with word times, and phonemes, at hundreds of times real time on one core.

eSpeak keeps the phase of its pitch flutter in a static variable that no call resets, so what it says depends on what
it said before. Each text is therefore spoken by a freshly loaded library (about 1 ms), from a private copy of its file,
which nobody else in the process can hold open.
"""

from __future__ import annotations

import _ctypes
import atexit
import ctypes
import re
import shutil
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path

import espeakng_loader
import numpy as np

from salad_ray.speech.spoken import read_words
from salad_ray.store import scratch_folder
from salad_ray.synthesis.speech import Speech
from salad_ray.tables import BadInput, Word, stable_hash

SAMPLING_RATE = 22050
MIN_RATE, MAX_RATE = 160, 190
"""Words per minute, of which a seed draws one for each text; without a seed it is 175."""
MIN_PITCH, MAX_PITCH = 42, 58
"""Pitch on eSpeak's scale of 0 to 100, likewise; without a seed it is 50."""

# Constants of espeak-ng/speak_lib.h, 1.52.
_SYNCHRONOUS, _BUFFER_MS, _PHONEME_EVENTS, _DONT_EXIT = 2, 200, 0x1, 0x8000
_CHARS_UTF8, _POS_CHARACTER, _IPA = 1, 1, 0x2
_RATE, _PITCH = 1, 3
_LIST_TERMINATED, _WORD, _PHONEME = 0, 1, 7

_LIBRARY = "libespeak-ng"

_lock = threading.Lock()
_until_exit = ExitStack()
atexit.register(_until_exit.close)


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Event))


@dataclass
class _SpokenWord:
    """A word as eSpeak says it: `position` in the text, samples [start, end) without the pause after it."""

    position: int
    start: int
    end: int | None = None


@dataclass
class _Recording:
    """What the library hands over while it speaks."""

    chunks: list[bytes] = field(default_factory=list)
    words: list[_SpokenWord] = field(default_factory=list)

    def listen(self, wave: int | None, num_samples: int, events: ctypes._Pointer[_Event]) -> int:
        if wave and num_samples:
            self.chunks.append(ctypes.string_at(wave, 2 * num_samples))
        index = 0
        while (event := events[index]).type != _LIST_TERMINATED:
            self._note(event)
            index += 1
        return 0

    def _note(self, event: _Event) -> None:
        if event.type == _WORD:
            self._end_word(event.sample)
            self.words.append(_SpokenWord(event.text_position - 1, event.sample))
        elif event.type == _PHONEME and event.id.string.startswith(b"_"):  # a pause
            self._end_word(event.sample)
        elif event.type == _PHONEME and self.words:
            self.words[-1].end = None

    def _end_word(self, sample: int) -> None:
        if self.words and self.words[-1].end is None:
            self.words[-1].end = sample

    def audio(self) -> np.ndarray:
        return np.frombuffer(b"".join(self.chunks), "<i2").astype(np.float32) / 32768


class EspeakSynthesizer:
    """Text → speech with eSpeak NG's own word events; nothing to download."""

    sampling_rate = SAMPLING_RATE
    weights = "eSpeak NG 1.52"

    def __init__(self, voices: Sequence[str] = ()) -> None:
        """
        Args:
            voices: names to check now rather than at the first text.

        Raises:
            ValueError: an unknown voice.
        """
        for voice in voices:
            _require_voice(voice)

    def synthesize_each(
        self, texts: Sequence[str], voices: Sequence[str], seed: int | None = None
    ) -> list[Speech | BadInput]:
        """Like `synthesize`, but what cannot be spoken comes back as the reason and takes nothing else with it."""
        return [_speech_or_reason(text, voice, seed) for text, voice in zip(texts, voices, strict=True)]

    def synthesize(self, texts: Sequence[str], voices: Sequence[str], seed: int | None = None) -> list[Speech]:
        """Speak each text with its voice.

        Args:
            texts: plain English; numbers, signs and abbreviations are read as `read_words` says.
            voices: one for each text, see `voices()`, with or without a variant: "en-us", "en-us+f3".
            seed: draws rate and pitch for each text from (seed, text, voice); None speaks all alike. The same text,
                voice and seed give the same samples, whatever else is spoken.

        Returns:
            Audio at 22,050 Hz. What is spoken as several words ("25", "well-known") is one written word; words that are
            spoken as one ("of the") share its time by their letters; a written word that is not spoken (a lone dash)
            has zero length at the end of the word before it. Words end where the pause after them begins.

        Raises:
            BadInput: a text that is empty or has a word that cannot be read.
            ValueError: an unknown voice.
        """
        return [_speak(text, voice, seed) for text, voice in zip(texts, voices, strict=True)]


def phonemes(text: str, voice: str = "en-us", separator: str = "") -> str:
    """A text in IPA with stress marks, words separated by spaces, phonemes by `separator` (one character or none).

    Raises:
        BadInput: an empty text.
        ValueError: an unknown voice.
    """
    clauses = []
    with _loaded(voice) as library:
        library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        rest = ctypes.c_char_p(_speakable(text))
        while rest.value is not None:
            mode = _IPA | ord(separator or "\0") << 8
            clauses.append(library.espeak_TextToPhonemes(ctypes.byref(rest), _CHARS_UTF8, mode).decode().strip())
    return " ".join(filter(None, clauses))


def voices() -> tuple[str, ...]:
    """Names of the voices, such as en-us; each goes with each of `variants()`, as in en-us+f3."""
    return tuple(sorted(_voice_files()))


@cache
def variants() -> tuple[str, ...]:
    """Names of the variants: f1 … f5 and m1 … m8 are the plain female and male ones.

    All of them speak, with words where the sound is, and as fast as the plain voice. For training some are of no use:
    whisper and whisperf have no pitch; klatt, klatt2, caleb, croak, grandpa and Demonic have half of one, and klatt and
    klatt2 are faint; fast is the plain voice; adam (klatt6), klatt5 (klatt4), Gene2 (Gene), RicishayMax3
    (RicishayMax2), robosoft3 (robosoft2) and michel (miguel) sound like another one; robosoft to robosoft8, UniRobot
    and anikaRobot echo.
    """
    return tuple(sorted(path.name for path in (_data_folder() / "voices" / "!v").iterdir()))


def _speech_or_reason(text: str, voice: str, seed: int | None) -> Speech | BadInput:
    try:
        return _speak(text, voice, seed)
    except BadInput as error:
        return error


def _speak(text: str, voice: str, seed: int | None) -> Speech:
    said = [spoken.text for spoken in read_words(_characters(text).split())]
    if not any(said):
        raise BadInput("nothing in the text can be spoken" if text.strip() else "empty text")
    spoken = _speakable(" ".join(filter(None, said)))
    recording = _Recording()
    callback = _Callback(recording.listen)
    with _loaded(voice) as library:
        library.espeak_SetSynthCallback(callback)
        for parameter, value in _manner(text, voice, seed).items():
            library.espeak_SetParameter(parameter, value, 0)
        size = ctypes.c_size_t(len(spoken) + 1)
        if library.espeak_Synth(spoken, size, 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None):
            raise RuntimeError(f"eSpeak NG failed on {text[:80]!r}")
    audio = recording.audio()
    if not recording.words:
        raise BadInput("nothing in the text can be spoken")
    pieces = _piece_times(" ".join(filter(None, said)), recording.words, len(audio))
    return Speech(audio, SAMPLING_RATE, _written_words(text.split(), said, pieces))


def _manner(text: str, voice: str, seed: int | None) -> dict[int, int]:
    if seed is None:
        return {}
    rng = np.random.default_rng(stable_hash("espeak", seed, text, voice))
    rate, pitch = rng.integers((MIN_RATE, MIN_PITCH), (MAX_RATE, MAX_PITCH), endpoint=True).tolist()
    return {_RATE: rate, _PITCH: pitch}


def _characters(text: str) -> str:
    """The text itself, unless it is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput("the text holds lone surrogates, which are no characters") from None
    return text


def _speakable(text: str) -> bytes:
    """UTF-8 of the text, character by character the same, but for what C or eSpeak would stumble over."""
    if not text.strip():
        raise BadInput("empty text")
    return re.sub(r"[^\S\n]|[\x00-\x08\x0e-\x1f\x7f]", " ", _characters(text)).encode()


def _written_words(written: Sequence[str], said: Sequence[str], pieces: Sequence[Word]) -> list[Word]:
    """Times of written words, each from its first to its last spoken piece; of one that is not said the end before."""
    words: list[Word] = []
    position, end = 0, 0.0
    for word, text in zip(written, said, strict=True):
        own = pieces[position : position + len(text.split())]
        start, end = (own[0].start_secs, own[-1].end_secs) if own else (end, end)
        words.append(Word(word, start, end))
        position += len(own)
    return words


def _piece_times(text: str, spoken: Sequence[_SpokenWord], num_samples: int) -> list[Word]:
    """Times of the whitespace-separated pieces of a text, from the words that eSpeak said for them."""
    pieces = list(re.finditer(r"\S+", text))
    spans: dict[int, tuple[int, int]] = {}
    for owner, word in zip(_owners(pieces, spoken), spoken, strict=True):
        start = spans[owner][0] if owner in spans else word.start
        spans[owner] = (start, num_samples if word.end is None else word.end)
    words: list[Word] = []
    previous = 0
    while len(words) < len(pieces):
        first = len(words)
        group = [pieces[first][0]] + [piece[0] for piece in _unannounced(pieces[first:], first, spans)]
        start, previous = spans.get(first, (previous, previous))
        bounds = (np.linspace(start, previous, sum(map(len, group)) + 1) / SAMPLING_RATE).tolist()
        ends = list(accumulate(map(len, group)))
        words += [Word(text, bounds[end - len(text)], bounds[end]) for text, end in zip(group, ends, strict=True)]
    return words


def _owners(pieces: Sequence[re.Match[str]], spoken: Sequence[_SpokenWord]) -> list[int]:
    """Index of the written word that each spoken word belongs to, non-decreasing.

    eSpeak puts the later words of a number or an emoji on it or behind it, and now and then a word on the space or the
    dash before it; that is seen by the word behind having nothing of its own.
    """
    starts = [piece.start() for piece in pieces]
    owners = [max(bisect_right(starts, word.position) - 1, 0) for word in spoken]
    own = {owner for owner, word in zip(owners, spoken, strict=True) if word.position < pieces[owner].end()}
    for index, (owner, word) in enumerate(zip(owners, spoken, strict=True)):
        beside = word.position >= pieces[owner].end() or not _has_letters(pieces[owner])
        if beside and owner + 1 < len(pieces) and owner + 1 not in own and _has_letters(pieces[owner + 1]):
            owners[index] = owner + 1
    return list(accumulate(owners, max))


def _unannounced(
    pieces: Sequence[re.Match[str]], first: int, spans: Mapping[int, tuple[int, int]]
) -> Iterator[re.Match[str]]:
    """The words that eSpeak says in one breath with the first of `pieces`, and under its name: "of the"."""
    for index, (before, piece) in enumerate(pairwise(pieces), start=first + 1):
        if first not in spans or index in spans or not before[0][-1].isalnum() or not _has_letters(piece):
            return
        yield piece


def _has_letters(piece: re.Match[str]) -> bool:
    return any(char.isalnum() for char in piece[0])


@contextmanager
def _loaded(voice: str) -> Iterator[ctypes.CDLL]:
    """A library in its first state with a voice, for one text."""
    _require_voice(voice)
    with _lock:
        home = _home()
        library = ctypes.CDLL(str(home / _LIBRARY))
        try:
            options = _PHONEME_EVENTS | _DONT_EXIT
            if library.espeak_Initialize(_SYNCHRONOUS, _BUFFER_MS, str(home).encode(), options) != SAMPLING_RATE:
                raise RuntimeError(f"eSpeak NG finds no data in {_data_folder()}; reinstall espeakng-loader")
            library.espeak_ng_SetRandSeed(ctypes.c_long(1))
            library.srand(1)  # of the C library, which two variants draw their breath from
            if library.espeak_SetVoiceByName(voice.encode()):
                raise ValueError(f"eSpeak NG cannot load the voice '{voice}'; take another")
            yield library
        finally:
            library.espeak_Terminate()
            _ctypes.dlclose(library._handle)


@cache
def _home() -> Path:
    """A copy of the library's file for this process alone, beside links to its data.

    eSpeak puts a voice's name in lower case and looks for a file of that name; where there is none (the data has
    lang/gmw/en-US) it reads all voices first, which takes longer than a sentence.
    """
    home = Path(_until_exit.enter_context(scratch_folder()))
    shutil.copyfile(espeakng_loader.get_library_path(), home / _LIBRARY)
    for path in _data_folder().iterdir():
        if path.name != "lang":
            (home / path.name).symlink_to(path)
    (home / "lang").mkdir()
    for language, path in _voice_files().items():
        (home / "lang" / language).symlink_to(path)
    return home


def _require_voice(voice: str) -> None:
    base, plus, variant = voice.partition("+")
    if base not in _voice_files():
        raise ValueError(f"unknown voice '{voice}'; known are en-us, en-gb and {len(voices()) - 2} more, see voices()")
    # eSpeak takes any variant, and leaves out silently what it does not have.
    if plus and variant not in variants():
        raise ValueError(f"unknown variant '{variant}' of voice '{voice}'; known are {', '.join(variants())}")


@cache
def _voice_files() -> dict[str, Path]:
    """Language tag in lower case → the file of the voice that claims it with the highest priority (lowest number)."""
    files = [path for path in (_data_folder() / "lang").rglob("*") if path.is_file()]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    claims = [
        (int(match[2] or 5), path, match[1].lower())
        for path, text in texts.items()
        if _dictionary(path, text).exists()
        for match in re.finditer(r"^language +(\S+)(?: +(\d+))?", text, re.MULTILINE)
    ]
    return {language: path for _, path, language in sorted(claims, reverse=True)}


def _dictionary(path: Path, text: str) -> Path:
    """The dictionary that a voice's file asks for; the package lacks a few."""
    named = re.search(r"^dictionary +(\S+)", text, re.MULTILINE)
    return _data_folder() / f"{named[1] if named else path.name.split('-')[0]}_dict"


def _data_folder() -> Path:
    return Path(espeakng_loader.get_data_path())
