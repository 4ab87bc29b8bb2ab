"""Speech encoders: waveforms → continuous frames at 12.5 Hz, frozen and causal.

An encoder is a class that has what `Encoder` lists; a further one is one class and one branch in `load_encoder`. Mimi
is there twice, run by transformers' code and by moshi's, with the same results. Frame f stands for the audio in
[f, f + 1) / frame_rate; a last, partial frame is filled with silence. What an encoder gives for an utterance does not
depend on the batch around it.

Shape letters: B utterances, N samples, H 10 ms hops, M mel bands, S speech frames, C encoder width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor

from salad_ray.config import EncodeConfig
from salad_ray.model.loading import (
    UNUSABLE,
    ModelError,
    hub_commit,
    is_hub_id,
    load_pretrained,
    reason,
    require_readable,
    require_whole,
    weights_fingerprint,
)
from salad_ray.sequences.packing import padded_batches

if TYPE_CHECKING:
    from transformers import MimiEncoderModel


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
    @property
    def revision(self) -> str | None:
        """The commit that was loaded, where the weights are of a hub; also if none, or a branch, was asked for."""

    @property
    def weights(self) -> str:
        """Fingerprint of the weights that were loaded; empty where there are none."""

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
    revision = None
    weights = ""
    _hop, _window, _stack, _bands = 160, 400, 8, 80
    _floor = 1e-6
    """Mel energy added before the logarithm, that of white noise at −66 dBFS: digital silence is like a quiet room."""
    _mean, _std = -9.5, 3.9
    """Of log energies of recorded and synthetic speech."""

    def __init__(self) -> None:
        from transformers.audio_utils import mel_filter_bank

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


class _Mimi:
    """Kyutai's Mimi up to its quantiser: the continuous latents, 512 numbers every 80 ms.

    Batches run piece by piece through Mimi's own streaming state, so memory is bounded by a few seconds of audio
    (minutes on a GPU) and not by the longest utterance; on a CPU the small pieces stay in its caches and are 1.5 to 3
    times as fast as whole utterances.
    """

    name = "mimi"
    sampling_rate: int
    frame_rate: float
    dim: int
    revision: str | None
    weights: str
    _frame_size: int

    def __init__(self, device: str | torch.device) -> None:
        self._device = torch.device(device)
        self._secs_per_forward = 4.0 if self._device.type == "cpu" else 120.0

    @torch.inference_mode()
    def encode(self, audios: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One batch: mono float32 (N,) at 24 kHz → float32 (S, 512), S = ⌈N / 1920⌉."""
        # Over whole frames, silence on the right changes nothing before it; Mimi has no use for a padding mask.
        waveforms, num_frames = _pad_to_frames(audios, self._frame_size)
        if not waveforms.numel():
            return _split(waveforms.new_zeros(len(audios), 0, self.dim), num_frames)
        latents = [piece.transpose(1, 2).float().cpu() for piece in self._latents(self._pieces(waveforms))]
        return _split(torch.cat(latents, dim=1), num_frames)

    def _pieces(self, waveforms: Tensor) -> Sequence[Tensor]:
        """(B, S · frame_size) → (B, 1, ·) of whole frames each, the last one no longer than the others."""
        secs = self._secs_per_forward / len(waveforms)
        return waveforms[:, None].split(max(1, int(secs * self.frame_rate)) * self._frame_size, dim=2)

    def _latents(self, pieces: Sequence[Tensor]) -> Iterator[Tensor]:
        """Pieces of audio that follow each other → their latents (B, C, ·)."""
        raise NotImplementedError


class MimiEncoder(_Mimi):
    """Mimi as transformers runs it. Only the encoder half of the codec is loaded.

    Args:
        path: folder or hub id (`kyutai/mimi`), safetensors only.
        revision: of the hub id.

    Raises:
        ModelError: it cannot be read or had, is not a causal Mimi, or weights are missing, too many or of other shapes.
    """

    def __init__(
        self,
        path: str,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(device)
        require_readable(path, "kyutai/mimi")
        self.revision = hub_commit(path, revision)
        self._model = _load_mimi(path, self.revision or revision, dtype).to(self._device)
        config = self._model.config
        self.sampling_rate = config.sampling_rate
        self.frame_rate = config.sampling_rate / config.frame_size
        self.dim = config.hidden_size
        self.weights = weights_fingerprint(self._model)
        self._frame_size = config.frame_size

    def _latents(self, pieces: Sequence[Tensor]) -> Iterator[Tensor]:
        padding_cache = past = None
        for piece in pieces:
            output = self._model(
                piece.to(self._device, self._model.dtype),
                past_key_values=past,
                padding_cache=padding_cache,
                use_streaming=len(pieces) > 1,
            )
            padding_cache, past = output.padding_cache, output.past_key_values
            yield output.latents


class MoshiMimiEncoder(_Mimi):
    """Mimi as Kyutai's own package runs it, from weights in its format; only the encoder half is kept.

    Args:
        path: a .safetensors file, a folder with exactly one, or a hub id (`kyutai/moshiko-pytorch-bf16`).
        revision: of the hub id.

    Raises:
        ModelError: moshi is not installed; the weights cannot be read or had, are missing, too many or of other shapes.
    """

    def __init__(self, path: str, revision: str | None = None, device: str | torch.device = "cpu") -> None:
        super().__init__(device)
        self._model, self.revision = _load_moshi_mimi(path, revision)
        self._model.to(self._device)
        self.sampling_rate = self._model.sample_rate
        self.frame_rate = self._model.frame_rate
        self.dim = self._model.dimension
        self.weights = weights_fingerprint(self._model)
        self._frame_size = self._model.frame_size
        self._context: int = self._model.encoder_transformer.transformer.layers[0].self_attn.context

    def _latents(self, pieces: Sequence[Tensor]) -> Iterator[Tensor]:
        with self._streaming(*pieces[0].shape[::2]):
            for piece in pieces:
                yield self._model.encode_to_latent(piece.to(self._device), quantize=False)

    @contextmanager
    def _streaming(self, batch_size: int, num_samples: int) -> Iterator[None]:
        """Streaming of pieces of up to `num_samples`, as exact as one forward over them all.

        Moshi's key-value ring has room for the attention's context, and a piece is written into it before it is read:
        the first positions of a piece would lose as many keys as the piece has positions. With room for the piece too,
        nothing is lost, and the mask still ends at the context.
        """
        from moshi.modules.transformer import set_attention_context
        from moshi.utils.compile import no_compile, no_cuda_graph

        num_positions = round(num_samples / self.sampling_rate * self._model.encoder_frame_rate)
        set_attention_context(self._model, self._context + num_positions - 1)
        state = self._model.streaming(batch_size)
        set_attention_context(self._model, self._context)
        with state, no_compile(), no_cuda_graph():  # both want shapes that never change
            yield


def load_encoder(config: EncodeConfig, device: str | torch.device) -> Encoder:
    """The encoder that a config names.

    Raises:
        ModelError: its weights cannot be used.
    """
    if config.encoder == "log_mel":
        return LogMelEncoder()
    assert config.path is not None, "EncodeConfig asks for a path"
    if config.backend == "moshi":
        return MoshiMimiEncoder(config.path, config.revision, device)
    return MimiEncoder(config.path, config.revision, device)


def encode_in_batches(encoder: Encoder, audios: Sequence[np.ndarray], batch_secs: float) -> list[np.ndarray]:
    """Encode any number of utterances, those of like length together; results in the order of the input.

    Args:
        audios: mono float32 (N,) at the encoder's sampling rate.
        batch_secs: audio of a batch, padding included; a longer utterance is a batch of its own.

    Returns:
        One float32 (S, C) for each utterance.
    """
    features: list[np.ndarray] = [np.empty(0, np.float32)] * len(audios)
    for batch in padded_batches([len(audio) for audio in audios], batch_secs * encoder.sampling_rate):
        for index, frames in zip(batch, encoder.encode([audios[index] for index in batch]), strict=True):
            features[index] = frames
    return features


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
    from transformers import MimiEncoderModel  # its code takes seconds to import, for which log-mel should not wait

    model, info = load_pretrained(MimiEncoderModel, path, revision, "Mimi", dtype=dtype)
    require_whole(path, info)
    if not model.config.use_causal_conv:
        raise ModelError(f"{path}: its convolutions look ahead (use_causal_conv=false); take a causal Mimi")
    return model.eval()


def _load_moshi_mimi(path: str, revision: str | None) -> tuple[Any, str | None]:
    """Moshi's model on the CPU, in eval mode and without its decoder, and the commit of a hub id."""
    try:
        from moshi.models.loaders import MIMI_NAME, get_mimi
    except ImportError as error:
        raise ModelError(
            f"encode.backend=moshi: moshi cannot be imported ({reason(error)}); run `make moshi`"
        ) from None
    try:
        file, commit = _find_moshi_weights(path, revision, MIMI_NAME)
        weights = load_file(file)
        if "encoder.layers.0.conv.weight" in weights:
            raise ModelError(f"{path}: its weights are in transformers' format; set encode.backend=transformers")
        model = get_mimi(None)
        found = model.load_state_dict(weights, strict=False)
    except ModelError:
        raise
    except UNUSABLE as error:
        raise ModelError(f"{path}: cannot be loaded as moshi's Mimi ({reason(error)})") from None
    unplaced = {"missing_keys": found.missing_keys, "unexpected_keys": found.unexpected_keys, "mismatched_keys": []}
    require_whole(path, unplaced)
    model.decoder = model.decoder_transformer = model.upsample = model.quantizer = None
    return model, commit


def _find_moshi_weights(path: str, revision: str | None, name: str) -> tuple[Path, str | None]:
    """The file, never a pickle, and the commit if it is of a hub, whose file is called `name`."""
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(place.glob("*.safetensors"))
        if len(files) != 1:
            raise ModelError(f"{path}: holds {len(files)} .safetensors files; give the path of Mimi's weights")
        return files[0], None
    if place.is_file():
        if place.suffix != ".safetensors":
            raise ModelError(f"{path}: is no .safetensors file; pickled weights are not read")
        return place, None
    if not is_hub_id(path):
        raise ModelError(f"{path}: no such file; give one, or a hub id such as kyutai/moshiko-pytorch-bf16")
    file = Path(hf_hub_download(path, name, revision=revision))
    return file, file.parent.name  # …/snapshots/<commit>/<name>
