"""Recognition: what a machine hears in speech, and how much of a text that is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import jiwer
import numpy as np
import pocketsphinx
import soxr
import torch
from transformers import AutoFeatureExtractor, AutoModelForSpeechSeq2Seq, AutoTokenizer

from salad_ray.model.loading import (
    UNUSABLE,
    ModelError,
    load_pretrained,
    quiet,
    reason,
    require_whole,
    weights_fingerprint,
)
from salad_ray.speech.ctc import CTCAligner
from salad_ray.speech.spoken import spoken_tokens, unreadable

WHISPER_SECS = 30
"""What Whisper hears at once; longer speech is recognised in pieces of this length."""


class Recognises(Protocol):
    facts: Mapping[str, Any]
    """What decides the transcripts, for a stage's fingerprint."""

    def transcribe(self, audio: np.ndarray, sampling_rate: int) -> str:
        """Text of mono audio float32 (num_samples,), in whatever case the recogniser writes."""


def load_recogniser(
    kind: Literal["pocketsphinx", "ctc", "whisper"], path: str | None, revision: str | None, device: str
) -> Recognises:
    """A recogniser by its kind; raises `ModelError` where its weights cannot be had or are not whole."""
    if kind == "pocketsphinx":
        return PocketsphinxRecogniser()
    assert path is not None
    return Recogniser(path, revision, device) if kind == "ctc" else WhisperRecogniser(path, revision, device)


class PocketsphinxRecogniser:
    """pocketsphinx with the English models that it brings: offline, fast, and far from the state of the art."""

    sampling_rate = 16000

    def __init__(self) -> None:
        self._decoder = pocketsphinx.Decoder(samprate=self.sampling_rate, cmn="batch", loglevel="FATAL")
        self.facts: Mapping[str, Any] = {"recogniser": "pocketsphinx en-us"}

    def transcribe(self, audio: np.ndarray, sampling_rate: int) -> str:
        """Lower case without punctuation; empty where nothing was recognised."""
        samples = _resampled(audio, sampling_rate, self.sampling_rate)
        if not len(samples):
            return ""
        pcm = (np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes()
        self._decoder.reinit_feat()  # or the estimate of the channel goes on from the utterance before
        self._decoder.start_utt()
        self._decoder.process_raw(pcm, full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return "" if hypothesis is None else hypothesis.hypstr


class WhisperRecogniser:
    """Whisper, or any encoder-decoder recogniser of transformers that transcribes as Whisper does; greedily.

    Args:
        path: folder or hub id, such as openai/whisper-large-v3.

    Raises:
        ModelError: it cannot be read or had, or weights are missing, too many or of other shapes.
    """

    def __init__(self, path: str, revision: str | None = None, device: str | torch.device = "cpu") -> None:
        dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        kind = "an encoder-decoder recogniser"
        model, info = load_pretrained(AutoModelForSpeechSeq2Seq, path, revision, kind, dtype=dtype)
        require_whole(path, info)
        self._model = model.eval().to(device)
        try:
            with quiet():
                self._features = AutoFeatureExtractor.from_pretrained(path, revision=revision, trust_remote_code=False)
                self._tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        except UNUSABLE as error:
            raise ModelError(f"{path}: its tokenizer or feature extractor cannot be loaded ({reason(error)})") from None
        self.facts: Mapping[str, Any] = {"path": path, "weights": weights_fingerprint(self._model)}

    @torch.no_grad()
    def transcribe(self, audio: np.ndarray, sampling_rate: int) -> str:
        """Text as the model writes it."""
        rate = self._features.sampling_rate
        samples = _resampled(audio, sampling_rate, rate)
        size = WHISPER_SECS * rate
        pieces = [samples[start : start + size] for start in range(0, max(len(samples), 1), size)]
        inputs = self._features(pieces, sampling_rate=rate, return_tensors="pt").input_features
        ids = self._model.generate(inputs.to(self._model.device, self._model.dtype), do_sample=False, num_beams=1)
        return " ".join(text.strip() for text in self._tokenizer.batch_decode(ids, skip_special_tokens=True))


def _resampled(audio: np.ndarray, sampling_rate: int, target: int) -> np.ndarray:
    return audio if sampling_rate == target else soxr.resample(audio, sampling_rate, target)


class Recogniser:
    """Any CTC recogniser of transformers, without a language model.

    Args:
        path: folder or hub id, such as facebook/wav2vec2-base-960h; raises as `CTCAligner`.
    """

    def __init__(self, path: str, revision: str | None = None, device: str | torch.device = "cpu") -> None:
        self._ctc = CTCAligner(path, revision, device)
        self.facts: Mapping[str, Any] = self._ctc.facts

    def transcribe(self, audio: np.ndarray, sampling_rate: int) -> str:
        """Text of mono audio float32 (num_samples,), in whatever case the recogniser writes."""
        return self._ctc.transcribe(_resampled(audio, sampling_rate, self._ctc.sampling_rate))


def word_error_rate(text: str, heard: str) -> float:
    """Substituted, left out and added words, over the words that reading the text aloud takes.

    Numbers and signs, in both, count as they are spoken, in their first reading; case and punctuation do not count.
    """
    return float(jiwer.wer(_said(text), _said(heard)))


def _said(text: str) -> str:
    # A recogniser may write in another script; that is one wrong word.
    words = ["unreadable" if unreadable(word) else word for word in text.split()]
    spoken = " ".join(spoken for word in spoken_tokens(words) for token in word for spoken in token[0])
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)*", spoken.lower()))
