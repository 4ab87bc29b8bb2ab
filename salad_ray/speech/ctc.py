"""Word times of recorded speech: forced alignment with any CTC recogniser of transformers, on CPUs or GPUs.

A written word is first turned into what is said for it (`spoken.transcript_tokens`, of each token the first reading),
that into the labels of the recogniser's vocabulary, and an exact Viterbi search fits the labels, with optional blanks
between them, to the frames of the recogniser.

Shape letters: N samples, T frames, V labels of the vocabulary, L labels of a text.
"""

from __future__ import annotations

import string
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer, Wav2Vec2CTCTokenizer

from salad_ray.model.loading import (
    UNUSABLE,
    ModelError,
    hub_commit,
    load_pretrained,
    quiet,
    reason,
    require_readable,
    require_whole,
    weights_fingerprint,
)
from salad_ray.sequences.packing import padded_batches
from salad_ray.speech.align import Alignment, best_of, check_score, or_error, worst_stretch
from salad_ray.speech.spoken import Token, transcript_tokens
from salad_ray.tables import BadInput, Word

CTC_MIN_SCORE = -1.0
"""Least mean log-probability of a frame, in nats, along the path in the worst stretch. A recogniser that hears what the
text says puts nearly all of its probability on the path: the small one of the tests scores −0.1 and better. With a
wrong text every third frame or so of speech is off by 5 to 10 nats: −1.6 to −2.7. Not measured on published models,
which differ in how sure they are, above all of noisy speech: look at the scores (`align_score`, and those in the
reasons of `rejects`) of some hundred utterances before a large run, and set `min_score`."""
SCORE_SECS = 2.0
"""Stretch over which scores are averaged: long enough to be sure, short enough to find a wrong sentence."""
MIN_SECS = 0.1
PADDING_NATS = 5e-3
"""What padding may change in a log-probability: what rounding does, on a GPU too. Without a mask it is 0.02 or more."""
_PROBE_SECS = 1.28
"""A multiple of every stride of 10 ms · 2ⁿ up to itself, so that the stride is measured exactly."""
_EDGE_STEPS = 16
"""Parts of a stride to which the least audio for a number of frames is found: frames lie right to half of one."""


@dataclass(frozen=True)
class _Script:
    """What is to be found: the labels (L,) of a text, and the word of each; −1 for the delimiters between words."""

    words: list[str]
    labels: list[int]
    owners: list[int]


@dataclass(frozen=True)
class _Frames:
    """Frame t stands for `stride_secs` of audio from first_secs + t · stride_secs on; `first_secs` may be below 0."""

    stride_secs: float
    first_secs: float


class CTCAligner:
    """Aligns text to audio; utterances of like length run through the model together.

    What is found for an utterance does not depend on the others: whether padding leaves a model's results alone is
    tried out, and where it does not, only utterances of the very same length share a batch.

    Args:
        path: folder or hub id (`facebook/wav2vec2-base-960h`) of the model, its feature extractor and its tokenizer;
            safetensors only.
        revision: of the hub id.
        min_score: least score of an alignment; unset: `CTC_MIN_SCORE`.
        batch_secs: audio of a batch, padding included; a longer utterance is a batch of its own.

    Raises:
        ModelError: it cannot be read or had, is not a CTC model, its parts do not fit each other, or weights are
            missing, too many or of other shapes.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        min_score: float | None = None,
        batch_secs: float = 120.0,
    ) -> None:
        require_readable(path, "facebook/wav2vec2-base-960h")
        commit = hub_commit(path, revision)
        self._model = _load_model(path, commit or revision).to(device)
        self._features = _load_part(AutoFeatureExtractor, path, commit or revision)
        self._speller = Speller(path, _load_part(AutoTokenizer, path, commit or revision), self._model.config)
        self._min_score = CTC_MIN_SCORE if min_score is None else min_score
        self._batch_secs = batch_secs
        self.sampling_rate: int = self._features.sampling_rate
        self.facts = {"path": path, "revision": commit, "weights": weights_fingerprint(self._model)}
        self._pads = False
        # What tells how many frames are no padding has one name in models of waveforms, another in those of spectra.
        self._output_lengths: Any = getattr(self._model, "_get_feat_extract_output_lengths", None) or getattr(
            self._model, "_get_subsampling_output_length", None
        )
        self._probe(path)

    def align(self, audio: np.ndarray, text: str) -> list[Word]:
        """Times of the white-space separated words of `text`.

        Args:
            audio: float32 (N,) at `sampling_rate`.

        Returns:
            One `Word` per word of `text.split()`, times in seconds, non-decreasing, within the audio. A word that
            is not spoken (a lone dash, "[laughter]") has zero length at the end of the word before it.

        Raises:
            BadInput: the text does not fit the audio, or has a word that cannot be read or that the recogniser has
                no labels for.
        """
        [found] = self.align_batch([audio], [text])
        if isinstance(found, BadInput):
            raise found
        return found.words

    def align_batch(self, audios: Sequence[np.ndarray], texts: Sequence[str]) -> list[Alignment | BadInput]:
        """`align` for each pair, in batches; where it fails, the error in place of the result."""
        found: list[Alignment | BadInput] = []
        scripts: dict[int, list[_Script]] = {}
        for index, (audio, text) in enumerate(zip(audios, texts, strict=True)):
            ways = or_error(self._scripts, audio, text)
            found.append(ways if isinstance(ways, BadInput) else BadInput("not aligned"))
            if not isinstance(ways, BadInput):
                scripts[index] = ways
        indices, limit = list(scripts), self._batch_secs * self.sampling_rate
        lengths = [len(audios[index]) for index in indices]
        for batch in padded_batches(lengths, limit, min_fill=0.0 if self._pads else 1.0):
            own = [indices[place] for place in batch]
            for index, log_probs in zip(own, self._log_probs([audios[index] for index in own]), strict=True):
                fits = [or_error(self._fit, script, log_probs, len(audios[index])) for script in scripts[index]]
                found[index] = or_error(best_of, fits)
        return found

    def transcribe(self, audio: np.ndarray) -> str:
        """What the recogniser hears by itself, the likeliest label of each frame; audio float32 (N,)."""
        [log_probs] = self._log_probs([audio])
        return self._speller.decode(log_probs.argmax(-1))

    def _scripts(self, audio: np.ndarray, text: str) -> list[_Script]:
        one_frame_secs = 2 * self._frames.first_secs + self._frames.stride_secs  # what a lone frame hears
        if len(audio) < max(MIN_SECS, one_frame_secs) * self.sampling_rate:
            raise BadInput(f"alignment failed: {len(audio)} samples are too few")
        words = text.split()
        ways = [or_error(self._speller.script, words, tokens) for tokens in transcript_tokens(words)]
        scripts = [way for way in ways if not isinstance(way, BadInput)]
        if not scripts and isinstance(ways[0], BadInput):
            raise ways[0]
        if not any(script.labels for script in scripts):
            raise BadInput("nothing to align: the transcript has no word that the CTC model can spell")
        return [script for script in scripts if script.labels]

    def _fit(self, script: _Script, log_probs: np.ndarray, num_samples: int) -> Alignment:
        labels = np.array(script.labels)
        path = best_path(log_probs, labels, self._speller.blank)
        symbols = np.where(path % 2, labels[np.minimum(path // 2, len(labels) - 1)], self._speller.blank)
        score = worst_stretch(log_probs[np.arange(len(path)), symbols], round(SCORE_SECS / self._frames.stride_secs))
        check_score(score, self._min_score)
        return Alignment(_words(script, path, self._frames, num_samples / self.sampling_rate), score)

    @torch.inference_mode()
    def _log_probs(self, audios: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One batch, (N,) each → (T, V) each, without the frames of the padding."""
        inputs = self._inputs(audios)
        logits = self._model(**inputs.to(self._model.device)).logits
        num_frames = [logits.shape[1]] * len(audios)
        if self._pads:
            num_frames = self._output_lengths(inputs["attention_mask"].sum(-1)).tolist()
        log_probs = logits.float().log_softmax(-1).cpu().numpy()
        return [row[:number] for row, number in zip(log_probs, num_frames, strict=True)]

    def _inputs(self, audios: Sequence[np.ndarray]) -> Any:
        return self._features(list(audios), sampling_rate=self.sampling_rate, padding=True, return_tensors="pt")

    def _probe(self, path: str) -> None:
        """Learn what the config does not tell: when frames are, whether padding changes them; raises `ModelError`."""
        try:
            short, long = self._num_frames(_PROBE_SECS), self._num_frames(2 * _PROBE_SECS)
            if short >= long:
                raise ModelError(f"{path}: gives {long} frames for {2 * _PROBE_SECS} s, so it cannot time words")
            self._frames = self._measure_frames(short, long)
            self._pads = self._can_pad()
        except ModelError:
            raise
        except UNUSABLE as error:
            raise ModelError(f"{path}: its feature extractor does not fit its model ({reason(error)})") from None

    def _measure_frames(self, short: int, long: int) -> _Frames:
        """From the numbers of frames of the probe and of one twice as long, to which the edges add the same.

        The least audio that gives `short` frames is what they hear without padding, so their middle is its middle. A
        recogniser that pads its input hears beyond either edge alike, and the same holds.
        """
        stride = _PROBE_SECS / (long - short)
        trials = [_PROBE_SECS - stride * left / _EDGE_STEPS for left in range(_EDGE_STEPS, -1, -1)]
        least = trials[bisect_left(trials, short, hi=_EDGE_STEPS, key=self._num_frames)]
        return _Frames(stride, (least - short * stride) / 2)

    def _num_frames(self, secs: float) -> int:
        return len(self._log_probs([self._noise(secs)])[0])

    def _can_pad(self) -> bool:
        """Some models have no mask, norms over time, or convolutions that do not heed the mask."""
        # Not whole strides, at which some models mask the last of their frames, padding or not.
        audios = [self._noise(_PROBE_SECS * size) for size in (1.03, 1.31, 1.97)]
        if not (self._output_lengths and "attention_mask" in self._inputs(audios)):
            return False
        alone = [self._log_probs([audio])[0] for audio in audios]
        self._pads = True
        padded = self._log_probs(audios)
        return all(
            one.shape == other.shape and np.allclose(one, other, rtol=0, atol=PADDING_NATS)
            for one, other in zip(alone, padded, strict=True)
        )

    def _noise(self, secs: float) -> np.ndarray:
        noise = np.random.default_rng(0).normal(0, 0.1, round(secs * self.sampling_rate))
        return noise.astype(np.float32)


class Speller:
    """Spoken words → labels of a recogniser: characters in the vocabulary's own case, or its subwords.

    Args:
        path: of the model, for messages.
        tokenizer: any of transformers.
        config: of the model.

    Raises:
        ModelError: it has no blank, or the tokenizer has no letters, or more labels than the model.
    """

    def __init__(self, path: str, tokenizer: Any, config: Any) -> None:
        if config.pad_token_id is None:
            raise ModelError(f"{path}: its config names no pad_token_id, which is the blank of CTC")
        self.blank: int = config.pad_token_id
        self._tokenizer = tokenizer
        self._by_character = isinstance(tokenizer, Wav2Vec2CTCTokenizer)
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()
        self._no_labels = {self.blank, tokenizer.unk_token_id}
        delimiter = tokenizer.word_delimiter_token if self._by_character else None
        self._delimiter = self._vocabulary.get(delimiter) if delimiter else None
        letters = [label for letter in string.ascii_lowercase for label in self.spell(letter)]
        if not letters:
            raise ModelError(f"{path}: its tokenizer knows no English letters")
        if max(letters) >= config.vocab_size:
            raise ModelError(f"{path}: its tokenizer has labels beyond the model's {config.vocab_size}")

    def script(self, words: Sequence[str], tokens: Sequence[Sequence[Token]]) -> _Script:
        """The labels of written words and their tokens, delimiters only between spoken words that have labels."""
        script = _Script(list(words), [], [])
        for owner, own in enumerate(tokens):
            spelled = [self.spell(spoken) for token in own for spoken in token[0]]
            if spelled and not any(spelled):
                raise BadInput(f"the CTC model has no labels for '{words[owner][:40]}'")
            for labels in filter(None, spelled):
                if script.labels and self._delimiter is not None:
                    script.labels.append(self._delimiter)
                    script.owners.append(-1)
                script.labels.extend(labels)
                script.owners.extend([owner] * len(labels))
        return script

    def spell(self, spoken: str) -> list[int]:
        """Labels of a word in lower case; characters that the vocabulary lacks have none."""
        if self._by_character:
            labels = [self._vocabulary.get(char, self._vocabulary.get(char.upper())) for char in spoken]
        else:
            labels = min(self._subwords(spoken), self._subwords(spoken.upper()), key=self._num_unknown)
        return [label for label in labels if label is not None and label not in self._no_labels]

    def decode(self, labels: np.ndarray) -> str:
        """Text of the labels (T,) of all frames: repeated ones once, blanks left out."""
        runs = labels[np.flatnonzero(np.diff(labels, prepend=-1))]
        if self._by_character:
            return str(self._tokenizer.decode(labels))  # knows the delimiter, and counts repetitions itself
        return str(self._tokenizer.decode(runs[runs != self.blank], skip_special_tokens=True))

    def _subwords(self, spoken: str) -> list[int | None]:
        return list(self._tokenizer(spoken, add_special_tokens=False)["input_ids"])

    def _num_unknown(self, labels: Sequence[int | None]) -> int:
        return sum(label in self._no_labels for label in labels)


def best_path(log_probs: np.ndarray, labels: np.ndarray, blank: int) -> np.ndarray:
    """The most probable CTC path of a label sequence.

    Args:
        log_probs: (T, V), of each frame.
        labels: int (L,), none of them the blank.

    Returns:
        int (T,), non-decreasing: state 2i + 1 is label i, state 2i the blank before it, 2L the blank at the end.

    Raises:
        BadInput: fewer frames than labels and the blanks between equal neighbours.
    """
    needed = len(labels) + int((labels[1:] == labels[:-1]).sum())
    if len(log_probs) < needed:
        raise BadInput(f"alignment failed: {len(log_probs)} frames are too few for {needed} labels")
    symbols = np.full(2 * len(labels) + 1, blank)
    symbols[1::2] = labels
    skips = np.full(len(symbols), -np.inf)  # what it costs to come from two states before
    skips[3::2][labels[1:] != labels[:-1]] = 0
    return _trace(*_moves(log_probs, symbols, skips))


def _moves(log_probs: np.ndarray, symbols: np.ndarray, skips: np.ndarray) -> tuple[np.ndarray, int]:
    """For every frame and state how many states back its best predecessor is, uint8 (T, 2L + 1); the last state."""
    moves = np.zeros((len(log_probs), len(symbols)), np.uint8)
    # Two unreachable states in front spare the first two a case of their own.
    scores = np.full(len(symbols) + 2, -np.inf)
    scores[2:4] = log_probs[0, symbols[:2]]
    for frame in range(1, len(log_probs)):
        best, skip = np.maximum(scores[2:], scores[1:-1]), scores[:-2] + skips
        moves[frame] = scores[1:-1] > scores[2:]
        moves[frame][skip > best] = 2
        scores[2:] = np.maximum(best, skip) + log_probs[frame, symbols]
    return moves, len(symbols) - 1 - int(scores[-2] > scores[-1])


def _trace(moves: np.ndarray, last: int) -> np.ndarray:
    path = np.empty(len(moves), np.int64)
    for frame in range(len(moves) - 1, -1, -1):
        path[frame] = last
        last -= int(moves[frame, last])
    return path


def _words(script: _Script, path: np.ndarray, timing: _Frames, end_secs: float) -> list[Word]:
    owners = np.append(script.owners, -1)[np.where(path % 2, path // 2, -1)]  # (T,): the word of each frame
    result: list[Word] = []
    previous_end = 0.0
    for index, text in enumerate(script.words):
        frames = np.flatnonzero(owners == index)
        start = end = previous_end
        if len(frames):
            edges = timing.first_secs + np.array([frames[0], frames[-1] + 1]) * timing.stride_secs
            start, end = np.clip(edges, 0, end_secs).tolist()
        result.append(Word(text, start, end))
        previous_end = end
    return result


def _load_model(path: str, revision: str | None) -> Any:
    model, info = load_pretrained(AutoModelForCTC, path, revision, "a CTC model", dtype=torch.float32)
    # Many published wav2vec 2.0 models lack the vector that masks frames in training. It is not used here; it is
    # zeroed because it would be drawn at random, and the fingerprint would change from one load to the next.
    unused = {name for name in info["missing_keys"] if name.endswith("masked_spec_embed")}
    for name in unused:
        torch.nn.init.zeros_(model.get_parameter(name))
    require_whole(path, {**info, "missing_keys": set(info["missing_keys"]) - unused})
    return model.eval()


def _load_part(kind: Any, path: str, revision: str | None) -> Any:
    """The feature extractor or the tokenizer that lies with the model."""
    try:
        with quiet():
            return kind.from_pretrained(path, revision=revision, trust_remote_code=False)
    except UNUSABLE as error:
        what = {AutoTokenizer: "tokenizer"}.get(kind, "feature extractor")
        raise ModelError(f"{path}: its {what} cannot be loaded ({reason(error)})") from None
