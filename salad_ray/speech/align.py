"""Word times of recorded speech: forced alignment with pocketsphinx and its English model, offline.

A written word is first turned into what is said for it (`spoken.transcript_tokens`), each token into its
pronunciations, and a Viterbi search over 10 ms frames fits the tokens, with optional silences between them, to the
audio. Where a transcript may have been said in two ways, the one that fits better is taken.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ParamSpec, TypeVar

import numpy as np
import pocketsphinx

from salad_ray.speech.spoken import Reading, Token, transcript_tokens
from salad_ray.synthesis.espeak import phonemes
from salad_ray.tables import BadInput, Word

SAMPLING_RATE = 16000
FRAME_RATE = 100
"""Frames a second of the acoustic model."""
MIN_SAMPLES = SAMPLING_RATE // 10
WINDOW_OFFSET_SECS = 0.0078
"""A frame hears 25.6 ms from its start on; the 10 ms it stands for are the middle of them."""
SCORE_FRAMES = 200
"""Stretch of speech over which scores are averaged: long enough to be sure, short enough to find a wrong sentence."""
MIN_SCORE = -4.3
"""Least mean log-likelihood of a frame, relative to the frame's best phone state, in the worst stretch. Clean
speech has −1 to −3, at telephone bandwidth down to −4; a wrong text −5 to −7."""
SHORT_FRAMES = 100
MIN_SHORT_SCORE = -6.0
"""The same for less than a second of audio, of which a phone or two is a large part."""
MAX_TOKEN_FRAMES = 300
_SCORE_SCALE = 1024
"""pocketsphinx divides the log-likelihoods of its frames by this."""


P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Alignment:
    """Times of the words of a text, and how well it fits the audio: the mean score of a frame in the worst stretch.

    Scores of different aligners, or of different models, are on different scales.
    """

    words: list[Word]
    score: float


@dataclass(frozen=True)
class _Segment:
    """A token or a silence (`is_token` false) as it was found: frames [start, end), log-likelihood of all of them."""

    start: int
    end: int
    score: float
    is_token: bool


class PocketsphinxAligner:
    """Aligns text to audio; one decoder serves all utterances, and learns words as they come.

    Args:
        min_score: least score of an alignment, of whatever length; unset: `MIN_SCORE`, or `MIN_SHORT_SCORE`.
    """

    sampling_rate = SAMPLING_RATE

    def __init__(self, min_score: float | None = None) -> None:
        self._min_score = min_score
        self._decoder = pocketsphinx.Decoder(
            lm=None,
            samprate=SAMPLING_RATE,
            frate=FRAME_RATE,
            cmn="batch",
            beam=1e-80,
            wbeam=1e-60,
            pbeam=1e-80,
            bestpath=False,
            loglevel="FATAL",
        )
        self._names: dict[Token, str] = {}

    def align(self, audio: np.ndarray, text: str) -> list[Word]:
        """Times of the white-space separated words of `text`.

        Args:
            audio: float32 (num_samples,) at 16 kHz.

        Returns:
            One `Word` per word of `text.split()`, times in seconds, non-decreasing, within the audio. A word that
            is not spoken (a lone dash, "[laughter]") has zero length at the end of the word before it.

        Raises:
            BadInput: the text does not fit the audio, or has a word that cannot be read.
        """
        return self._align(audio, text).words

    def align_batch(self, audios: Sequence[np.ndarray], texts: Sequence[str]) -> list[Alignment | BadInput]:
        """`align` for each pair, one by one; where it fails, the error in place of the result."""
        return [or_error(self._align, audio, text) for audio, text in zip(audios, texts, strict=True)]

    def _align(self, audio: np.ndarray, text: str) -> Alignment:
        if len(audio) < MIN_SAMPLES:
            raise BadInput(f"alignment failed: {len(audio)} samples are too few")
        words = text.split()
        return best_of([or_error(self._fit, audio, words, tokens) for tokens in transcript_tokens(words)])

    def _fit(self, audio: np.ndarray, words: Sequence[str], tokens: Sequence[Sequence[Token]]) -> Alignment:
        flat = [token for word in tokens for token in word]
        if not flat:
            raise BadInput("nothing to align: the transcript has no word that can be spoken")
        segments = self._search(audio, [self._name(token) for token in flat])
        score = check_segments(segments, self._min_score)
        found = [segment for segment in segments if segment.is_token]
        return Alignment(_words(words, [len(word) for word in tokens], found, len(audio) / SAMPLING_RATE), score)

    def _search(self, audio: np.ndarray, names: Sequence[str]) -> list[_Segment]:
        self._decode(_pcm(audio), " ".join(names))
        found = list(self._decoder.seg() or ())
        if [_base(segment.word) for segment in found if not _is_filler(segment.word)] != list(names):
            raise BadInput("alignment failed: the audio does not fit the transcript")
        return [
            _Segment(
                segment.start_frame,
                segment.end_frame + 1,
                math.log(segment.ascore) * _SCORE_SCALE,
                not _is_filler(segment.word),
            )
            for segment in found
        ]

    def _decode(self, pcm: bytes, names: str) -> None:
        self._decoder.reinit_feat()  # else scores would depend a little on the utterance before
        try:
            self._decoder.set_align_text(names)
            self._decoder.start_utt()
            try:
                self._decoder.process_raw(pcm, full_utt=True)
            finally:
                self._decoder.end_utt()  # else the next utterance could not start
        except RuntimeError as error:
            raise BadInput(f"alignment failed: {error}") from None

    def _name(self, token: Token) -> str:
        """The dictionary entry for a token, added to the dictionary if need be."""
        if token not in self._names:
            plain = token[0][0] if len(token) == 1 and len(token[0]) == 1 else ""
            self._names[token] = plain if plain and self._decoder.lookup_word(plain) else self._add(token)
        return self._names[token]

    def _add(self, token: Token) -> str:
        name = f"={len(self._names)}"
        phones = dict.fromkeys(phones for reading in token for phones in self._reading_phones(reading))
        for index, pronunciation in enumerate(phones, start=1):
            self._decoder.add_word(name if index == 1 else f"{name}({index})", pronunciation, False)
        return name

    def _reading_phones(self, reading: Reading) -> list[str]:
        """Pronunciations of a reading; of its words' variants only a lone word's are all kept."""
        variants = [self._word_phones(word) for word in reading]
        return variants[0] if len(variants) == 1 else [" ".join(phones[0] for phones in variants)]

    def _word_phones(self, word: str) -> list[str]:
        known: list[str] = []
        letter = f"{word}." if len(word) == 1 else word
        while phones := self._decoder.lookup_word(letter if not known else f"{letter}({len(known) + 1})"):
            known.append(phones)
        return known or [guess_phones(word)]


def or_error(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | BadInput:
    """What a function returns, or the `BadInput` that it raises."""
    try:
        return function(*args, **kwargs)
    except BadInput as error:
        return error


def best_of(found: Sequence[Alignment | BadInput]) -> Alignment:
    """The alignment with the best score; where all failed, raises what is wrong with the first."""
    alignments = [one for one in found if isinstance(one, Alignment)]
    if not alignments:
        raise next(one for one in found if isinstance(one, BadInput))
    return max(alignments, key=lambda one: one.score)


def alignment_score(segments: Sequence[_Segment]) -> float:
    """Mean log-likelihood of a frame in the worst stretch of `SCORE_FRAMES`; speech that the text lacks counts too."""
    frames = [np.full(seg.end - seg.start, seg.score / (seg.end - seg.start)) for seg in segments]
    return worst_stretch(np.concatenate(frames), SCORE_FRAMES)


def worst_stretch(frames: np.ndarray, width: int) -> float:
    """The least mean of `width` scores of frames in a row, of all of them where there are fewer."""
    width = min(width, len(frames))
    total = np.concatenate([[0.0], np.cumsum(frames)])
    return float((total[width:] - total[:-width]).min() / width)


def check_score(score: float, lowest: float) -> None:
    """Raises `BadInput` for a score below the lowest, or one that is not a number."""
    if not score >= lowest:
        raise BadInput(f"the audio does not say what the transcript does: alignment score {score:.1f}, below {lowest}")


def check_segments(segments: Sequence[_Segment], min_score: float | None = None) -> float:
    """The score of an alignment; raises `BadInput` for one that no reader of the text would have produced."""
    longest = max(segment.end - segment.start for segment in segments if segment.is_token)
    if longest > MAX_TOKEN_FRAMES:
        raise BadInput(f"alignment failed: one word would last {longest / FRAME_RATE:.1f} s")
    usual = MIN_SCORE if segments[-1].end >= SHORT_FRAMES else MIN_SHORT_SCORE
    score = alignment_score(segments)
    check_score(score, usual if min_score is None else min_score)
    return score


def _frame_secs(frame: int) -> float:
    return frame / FRAME_RATE + WINDOW_OFFSET_SECS if frame else 0.0


def _pcm(audio: np.ndarray) -> bytes:
    return (np.clip(audio, -1, 1) * 32767).astype("<i2").tobytes()


def _is_filler(name: str) -> bool:
    """Silence, noise and sentence marks: `<sil>`, `[NOISE]`, `</s>`."""
    return name[0] in "<["


def _base(name: str) -> str:
    """`the(2)` is the second pronunciation of `the`."""
    return re.sub(r"\(\d+\)$", "", name)


def _words(words: Sequence[str], num_tokens: Sequence[int], found: Sequence[_Segment], end_secs: float) -> list[Word]:
    result: list[Word] = []
    position, previous_end = 0, 0.0
    for text, number in zip(words, num_tokens, strict=True):
        start = end = previous_end
        if number:
            start = min(_frame_secs(found[position].start), end_secs)
            end = min(_frame_secs(found[position + number - 1].end), end_secs)
            position += number
        result.append(Word(text, start, end))
        previous_end = end
    return result


# eSpeak NG's American phonemes (IPA, stress and length removed) in the symbols of the acoustic model.
# fmt: off
_ARPABET = {
    "a": "AE", "æ": "AE", "ɑ": "AA", "ɒ": "AA", "ɐ": "AH", "ə": "AH", "ʌ": "AH", "ᵻ": "IH", "ɪ": "IH", "i": "IY",
    "iə": "IY AH", "ɛ": "EH", "e": "EH", "o": "AO", "ɔ": "AO", "ʊ": "UH", "u": "UW", "y": "UW", "ɜ": "ER", "ɚ": "ER",
    "aɪ": "AY", "aʊ": "AW", "eɪ": "EY", "oʊ": "OW", "əʊ": "OW", "ɔɪ": "OY", "aɪɚ": "AY ER", "aʊɚ": "AW ER",
    "aɪə": "AY AH", "əl": "AH L",
    "b": "B", "d": "D", "f": "F", "ɡ": "G", "g": "G", "h": "HH", "x": "K", "ç": "HH", "j": "Y", "k": "K", "l": "L",
    "ɬ": "L", "m": "M", "n": "N", "ɲ": "N Y", "ŋ": "NG", "p": "P", "r": "R", "ɹ": "R", "s": "S", "ʃ": "SH", "t": "T",
    "ɾ": "T", "ʔ": "T", "tʃ": "CH", "dʒ": "JH", "θ": "TH", "ð": "DH", "v": "V", "w": "W", "z": "Z", "ʒ": "ZH",
}
# fmt: on


@cache
def guess_phones(word: str) -> str:
    """A pronunciation from eSpeak NG's letter rules, in the acoustic model's symbols; never empty."""
    ipa = re.sub("[ˈˌː\u0329\u0303]", "", phonemes(word, "en-us", "_"))
    phones = [_phones(phoneme) for phoneme in re.split("[ _]+", ipa)]
    return " ".join(" ".join(phones).split()) or "AH"


def _phones(phoneme: str) -> str:
    """Phonemes that are not in the table (ɛɹ, ɔɹ, …) are read letter by letter."""
    return _ARPABET.get(phoneme) or " ".join(_ARPABET.get(char, "") for char in phoneme)
