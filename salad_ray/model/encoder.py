"""Speech encoders: waveforms → continuous frames at 12.5 Hz, frozen and causal.

An encoder is a class with `name`, `sampling_rate`, `frame_rate`, `dim` and `encode`; a further one is one class and
one branch in `load_encoder`. Frame f stands for the audio in [f, f + 1) / frame_rate; a last, partial frame is filled
with silence. What an encoder gives for an utterance does not depend on the batch around it.

Shape letters: B utterances, N samples, H 10 ms hops, M mel bands, S speech frames, C encoder width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import MimiEncoderModel
from transformers.audio_utils import mel_filter_bank
from transformers.utils import logging as transformers_logging

from salad_ray.config import EncodeConfig
from salad_ray.model.speech_lm import ModelError

# What transformers and its parsers raise for a folder, hub id or setting that cannot be used.
_UNUSABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, StrictDataclassError)


class Encoder(Protocol):
    """What the stages ask of a speech encoder."""

    @property
    def name(self) -> str: ...
    @property
    def sampling_rate(self) -> int: ...
    @property
    def frame_rate(self) -> float: ...
    @property
    def dim(self) -> int: ...

    def encode(self, audios: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One batch: mono float32 (N,) at `sampling_rate` → float32 (S, C), S = ⌈N · frame_rate / sampling_rate⌉."""


class LogMelEncoder:
    """Log-mel energies of eight 10 ms hops side by side: 80 bands × 8 = 640 numbers every 80 ms; no weights.

    The 25 ms window of a hop ends with the hop, so nothing depends on later audio. Levels are normalised by constants,
    not per utterance, which would look ahead.
    """

    name = "log_mel"
    sampling_rate = 16000
    frame_rate = 12.5
    dim = 640
    _hop, _window, _stack, _bands = 160, 400, 8, 80
    _floor = 1e-6
    """Mel energy added before the logarithm, that of white noise at −66 dBFS: digital silence is like a quiet room."""
    _mean, _std = -9.5, 3.9
    """Of log energies of recorded and synthetic speech."""

    def __init__(self) -> None:
        filters = mel_filter_bank(
            self._window // 2 + 1, self._bands, 0.0, 8000.0, self.sampling_rate, norm="slaney", mel_scale="slaney"
        )
        self._filters = torch.from_numpy(filters).float().T.contiguous()  # (M, bins)
        self._hann = torch.hann_window(self._window)

    @torch.inference_mode()
    def encode(self, audios: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One batch: mono float32 (N,) at 16 kHz → float32 (S, 640), S = ⌈N / 1280⌉."""
        # One by one they stay in the caches, and are three times as fast as side by side.
        return [self._frames(audio).numpy() for audio in audios]

    def _frames(self, audio: np.ndarray) -> Tensor:
        waveform, [num_frames] = _pad_to_frames([audio], self._hop * self._stack)
        if not num_frames:
            return torch.zeros(0, self.dim)
        heard = F.pad(waveform[0], (self._window - self._hop, 0))
        spectrum = torch.stft(heard, self._window, self._hop, window=self._hann, center=False, return_complex=True)
        power = torch.view_as_real(spectrum).square().sum(-1)  # (bins, H)
        levels = (self._filters @ power).add_(self._floor).log_().sub_(self._mean).div_(self._std)  # (M, H)
        return levels.T.reshape(num_frames, self.dim)  # hops of a frame in order of time


class MimiEncoder:
    """Kyutai's Mimi up to its quantiser: the continuous latents, 512 numbers every 80 ms.

    Only the encoder half of the codec is loaded. Batches run piece by piece through Mimi's own streaming state, so
    memory is bounded by a few seconds of audio (minutes on a GPU) and not by the longest utterance; on a CPU the small
    pieces stay in its caches and are 1.5 to 3 times as fast as whole utterances.

    Args:
        path: folder or hub id (`kyutai/mimi`), safetensors only.
        revision: of the hub id.

    Raises:
        ModelError: it cannot be read or had, is not a causal Mimi, or weights are missing, too many or of other shapes.
    """

    name = "mimi"

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._model = _load_mimi(path, revision, dtype).to(device)
        config = self._model.config
        self.sampling_rate: int = config.sampling_rate
        self.frame_rate: float = config.sampling_rate / config.frame_size
        self.dim: int = config.hidden_size
        self._frame_size: int = config.frame_size
        self._secs_per_forward = 4.0 if torch.device(device).type == "cpu" else 120.0

    @torch.inference_mode()
    def encode(self, audios: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One batch: mono float32 (N,) at 24 kHz → float32 (S, 512), S = ⌈N / 1920⌉."""
        # Mimi ignores its padding mask; over whole frames, silence on the right changes nothing before it.
        waveforms, num_frames = _pad_to_frames(audios, self._frame_size)
        if not waveforms.numel():
            return _split(waveforms.new_zeros(len(audios), 0, self.dim), num_frames)
        return _split(torch.cat(list(self._latents(waveforms)), dim=1), num_frames)

    def _latents(self, waveforms: Tensor) -> Iterator[Tensor]:
        """(B, N) → pieces (B, ·, C) that follow each other."""
        secs = self._secs_per_forward / len(waveforms)
        pieces = waveforms.split(max(1, int(secs * self.frame_rate)) * self._frame_size, dim=1)
        padding_cache = past = None
        for piece in pieces:
            output = self._model(
                piece[:, None].to(self._model.device, self._model.dtype),
                past_key_values=past,
                padding_cache=padding_cache,
                use_streaming=len(pieces) > 1,
            )
            padding_cache, past = output.padding_cache, output.past_key_values
            yield output.latents.transpose(1, 2).float().cpu()


def load_encoder(config: EncodeConfig, device: str | torch.device) -> Encoder:
    """The encoder that a config names.

    Raises:
        ModelError: its weights cannot be used.
    """
    if config.encoder == "mimi":
        assert config.path is not None, "EncodeConfig asks for a path"
        return MimiEncoder(config.path, config.revision, device)
    return LogMelEncoder()


def encode_in_batches(encoder: Encoder, audios: Sequence[np.ndarray], batch_secs: float) -> list[np.ndarray]:
    """Encode any number of utterances, those of like length together; results in the order of the input.

    Args:
        audios: mono float32 (N,) at the encoder's sampling rate.
        batch_secs: audio of a batch, padding included; a longer utterance is a batch of its own.

    Returns:
        One float32 (S, C) for each utterance.
    """
    features: list[np.ndarray] = [np.empty(0, np.float32)] * len(audios)
    for batch in _batches([len(audio) for audio in audios], batch_secs * encoder.sampling_rate):
        for index, frames in zip(batch, encoder.encode([audios[index] for index in batch]), strict=True):
            features[index] = frames
    return features


def _batches(lengths: Sequence[int], max_samples: float) -> Iterator[list[int]]:
    """Indices from the longest to the shortest, grouped so that size × longest ≤ max_samples."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_samples:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _pad_to_frames(audios: Sequence[np.ndarray], frame_size: int) -> tuple[Tensor, list[int]]:
    """Waveforms (B, S · frame_size) with silence on the right, and the number of frames of each."""
    num_frames = [-(-len(audio) // frame_size) for audio in audios]
    waveforms = np.zeros((len(audios), max(num_frames, default=0) * frame_size), np.float32)
    for row, audio in zip(waveforms, audios, strict=True):
        if audio.ndim != 1:
            raise ValueError(f"audio of shape {audio.shape} must be mono, (num_samples,)")
        row[: len(audio)] = audio
    return torch.from_numpy(waveforms), num_frames


def _split(frames: Tensor, num_frames: Sequence[int]) -> list[np.ndarray]:
    """(B, S, C) → for each utterance a copy of its own frames, so that none keeps the batch in memory."""
    return [row[:number].numpy().copy() for row, number in zip(frames, num_frames, strict=True)]


def _load_mimi(path: str, revision: str | None, dtype: torch.dtype) -> MimiEncoderModel:
    folder = Path(path).expanduser()
    if not folder.is_dir() and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise ModelError(f"{path}: no such folder; give a folder or a hub id such as kyutai/mimi")
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # what its reports would say is raised
    transformers_logging.disable_progress_bar()
    try:
        model, info = MimiEncoderModel.from_pretrained(
            path,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they come back in `info`
            output_loading_info=True,
        )
    except _UNUSABLE as error:
        raise ModelError(f"{path}: cannot be loaded as Mimi ({_reason(error)})") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    _require_whole(path, info)
    if not model.config.use_causal_conv:
        raise ModelError(f"{path}: its convolutions look ahead (use_causal_conv=false); take a causal Mimi")
    return model.eval()


def _require_whole(path: str, info: Mapping[str, Any]) -> None:
    shapes = [f"{name} {tuple(found)} instead of {tuple(needed)}" for name, found, needed in info["mismatched_keys"]]
    names = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"], "of another shape": shapes}
    problems = [f"{len(found)} {kind}, such as {min(found)}" for kind, found in names.items() if found]
    if problems:
        raise ModelError(f"{path}: its weights do not fit its config: {'; '.join(problems)}")


def _reason(error: BaseException) -> str:
    """The first sentence of an error, on one line."""
    text = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return text[:300] or type(error).__name__
