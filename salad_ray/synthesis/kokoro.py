"""Kokoro-82M in batches: the weights and layers of the `kokoro` package, our own forward pass over them.

`KModel` speaks one text at a time. Here texts of different lengths and voices are spoken at once, and each comes out
as if it were alone: what lies beyond its end is zero before every convolution, as the padding there would be; AdaIN
takes its statistics over the item's own length; LSTMs run over packed sequences; the sources and both Fourier
transforms, whose edges reflect, are computed item by item. The noise is drawn for each item from its own generator.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from kokoro.istftnet import AdaIN1d, AdainResBlk1d, AdaINResBlock1, Decoder, Generator
from kokoro.model import KModel
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import remove_weight_norm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from salad_ray.config import ConfigError
from salad_ray.model.loading import UNUSABLE, ModelError, is_hub_id, reason, require_whole, weights_fingerprint
from salad_ray.sequences.packing import padded_batches
from salad_ray.synthesis.phonemes import MAX_PHONEMES, Part, to_parts
from salad_ray.synthesis.speech import Speech
from salad_ray.tables import BadInput, Word, stable_hash

SAMPLING_RATE = 24000
FRAME_RATE = 40
"""Kokoro's durations are whole frames of 600 samples."""
HUB_ID = "hexgrad/Kokoro-82M"
WEIGHTS = "kokoro-v1_0.pth"
STYLE_DIM = 128
"""A voice is (510, 1, 256): for each number of phonemes, the decoder's style beside that of the prosody."""

_GPU_FRAMES = 16_000  # 400 s of speech: about 8 GB while it is decoded
_CACHED_ELEMENTS = 1 << 18  # 1 MB, which stays in a core's cache
_STRETCH = 8192  # steps


@dataclass(frozen=True, slots=True)
class Utterance:
    """What the model says in one go: `phonemes` (≤ 510), the voice's row for their number (256,), and its noise."""

    phonemes: str
    style: Tensor
    noise_seed: int


@dataclass(frozen=True, slots=True)
class _Prosody:
    """An utterance between the two halves of the model, T tokens (phonemes, beginning, end) long."""

    utterance: Utterance
    durations: Tensor  # (T,) int64, on the CPU
    prosody: Tensor  # (T, 640)
    text: Tensor  # (T, 512)

    @property
    def num_frames(self) -> int:
        return int(self.durations.sum())

    def over_time(self, tokens: Tensor) -> Tensor:
        """(T, C) → (frames, C): each token for as long as it lasts."""
        return tokens.repeat_interleave(self.durations.to(tokens.device), dim=0, output_size=self.num_frames)


class KokoroSynthesizer:
    """Text → speech with Kokoro and the word times that its durations tell."""

    sampling_rate = SAMPLING_RATE

    def __init__(
        self,
        path: str = HUB_ID,
        voices: Sequence[str] = ("af_heart",),
        device: str = "cpu",
        revision: str | None = None,
        batch_frames: int | None = None,
        max_phonemes: int = MAX_PHONEMES,
    ) -> None:
        """Load weights and voices.

        Args:
            path: a hub id, or a folder with config.json, kokoro-v1_0.pth and voices/<name>.pt.
            voices: names; those that begin with b speak British English, all others American.
            revision: of a hub id; unset: the main branch.
            batch_frames: frames (of 25 ms, padding included) that are computed at once. None is 16,000 on a GPU and on
                the CPU one utterance at a time: its convolutions are no faster in batches, and padding costs.
            max_phonemes: longer texts are spoken in parts of at most so many.

        Raises:
            ConfigError: a file is missing or damaged, or does not fit the others.
        """
        if batch_frames is None:
            batch_frames = 0 if torch.device(device).type == "cpu" else _GPU_FRAMES
        model = load_kokoro(path, revision)
        self.weights = weights_fingerprint(model)
        """Tells whether two machines speak with the same weights; the voices are not in it."""
        self.model = BatchedKokoro(model.to(device), batch_frames)
        self.voices = {name: load_voice(path, name, revision).to(device) for name in voices}
        self.max_phonemes = max_phonemes

    def synthesize(self, texts: Sequence[str], voices: Sequence[str], seed: int | None = None) -> list[Speech]:
        """Speak each text with its voice.

        Args:
            texts: plain English.
            voices: one for each text, of those that were loaded.
            seed: of the noise in breath and consonants, drawn for each text from (seed, text, voice). The same text,
                voice and seed give the same speech up to rounding, whatever else is in the batch.

        Returns:
            Audio at 24,000 Hz as the model gives it: it may exceed [−1, 1]. Words last as long as their sounds: neither
            pauses nor punctuation; a written word that is not spoken (a lone dash) has zero length at the end of the
            word before it.

        Raises:
            BadInput: a text that cannot be spoken.
            ConfigError: a voice that was not loaded.
        """
        speeches = []
        for speech in self.synthesize_each(texts, voices, seed):
            if isinstance(speech, BadInput):
                raise speech
            speeches.append(speech)
        return speeches

    def synthesize_each(
        self, texts: Sequence[str], voices: Sequence[str], seed: int | None = None
    ) -> list[Speech | BadInput]:
        """Like `synthesize`, but what cannot be spoken comes back as the reason and takes nothing else with it."""
        self._require_voices(voices)
        scripts = [self._script(text, voice) for text, voice in zip(texts, voices, strict=True)]
        utterances = [
            self._utterance(part, voice, noise_seed(seed, text, voice, index))
            for text, voice, script in zip(texts, voices, scripts, strict=True)
            if not isinstance(script, BadInput)
            for index, part in enumerate(script)
            if part.phonemes
        ]
        spoken = iter(self.model.speak(utterances))
        return [
            script if isinstance(script, BadInput) else _assemble(text, script, spoken)
            for text, script in zip(texts, scripts, strict=True)
        ]

    def _script(self, text: str, voice: str) -> list[Part] | BadInput:
        try:
            return to_parts(text, voice.startswith("b"), self.model.vocab, self.max_phonemes)
        except BadInput as error:
            return error

    def _utterance(self, part: Part, voice: str, seed: int) -> Utterance:
        return Utterance(part.phonemes, self.voices[voice][len(part.phonemes) - 1, 0], seed)

    def _require_voices(self, voices: Sequence[str]) -> None:
        unknown = sorted(set(voices) - set(self.voices))
        if unknown:
            raise ConfigError(
                f"Kokoro's voice '{unknown[0]}' was not loaded; those that were: {', '.join(self.voices)}"
            )


class BatchedKokoro:
    """`KModel`'s layers, over many utterances at once; takes the model over (its weight norms are folded)."""

    def __init__(self, model: KModel, batch_frames: int) -> None:
        self.model = _folded(model.eval())
        self.batch_frames = batch_frames
        self.vocab: Mapping[str, int] = model.vocab

    @torch.inference_mode()
    def speak(self, utterances: Sequence[Utterance]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each utterance its audio (600 · frames,), float32 at 24 kHz, and its durations (phonemes + 2,) in frames.

        The same as `KModel` gives after `torch.manual_seed(noise_seed)`.
        """
        prosodies: dict[int, _Prosody] = {}
        for batch in padded_batches([len(utterance.phonemes) + 2 for utterance in utterances], self.batch_frames):
            prosodies |= zip(batch, self._predict([utterances[i] for i in batch]), strict=True)
        order = range(len(utterances))
        audios: dict[int, np.ndarray] = {}
        for batch in padded_batches([prosodies[i].num_frames for i in order], self.batch_frames):
            audios |= zip(batch, self._decode([prosodies[i] for i in batch]), strict=True)
        return [(audios[i], prosodies[i].durations.numpy()) for i in order]

    def _predict(self, utterances: Sequence[Utterance]) -> list[_Prosody]:
        """Durations, and what the decoder needs of each token."""
        model, predictor = self.model, self.model.predictor
        tokens = [torch.tensor([0, *(self.vocab[p] for p in utterance.phonemes), 0]) for utterance in utterances]
        lengths = torch.tensor([len(row) for row in tokens])
        ids = pad_sequence(tokens, batch_first=True)
        padding = (torch.arange(ids.shape[1]) >= lengths[:, None]).to(model.device)
        ids = ids.to(model.device)
        style = torch.stack([utterance.style for utterance in utterances])[:, STYLE_DIM:]
        hidden = model.bert_encoder(model.bert(ids, attention_mask=(~padding).int()))
        prosody = predictor.text_encoder(hidden.transpose(1, 2), style, lengths, padding)
        rates = predictor.duration_proj(_run_lstm(predictor.lstm, prosody, lengths.tolist()))
        durations = torch.sigmoid(rates).sum(-1).round().clamp(min=1).long().cpu()
        text = model.text_encoder(ids, lengths, padding).transpose(1, 2)
        return [
            _Prosody(utterance, durations[i, :length], prosody[i, :length], text[i, :length])
            for i, (utterance, length) in enumerate(zip(utterances, lengths.tolist(), strict=True))
        ]

    def _decode(self, items: Sequence[_Prosody]) -> list[np.ndarray]:
        predictor, decoder = self.model.predictor, self.model.decoder
        styles = torch.stack([item.utterance.style for item in items])
        lengths = _Lengths([item.num_frames for item in items], self.model.device, styles.dtype)
        style, prosody_style = styles[:, :STYLE_DIM], styles[:, STYLE_DIM:]
        prosody = pad_sequence([item.over_time(item.prosody) for item in items], batch_first=True)
        prosody = _run_lstm(predictor.shared, prosody, lengths.frames).transpose(1, 2)
        pitch = predictor.F0_proj(_run_blocks(predictor.F0, prosody, prosody_style, lengths))
        energy = predictor.N_proj(_run_blocks(predictor.N, prosody, prosody_style, lengths))
        sources = [
            _source_spectrum(decoder.generator, curve[: 2 * frames], item.utterance.noise_seed)
            for item, curve, frames in zip(items, pitch[:, 0], lengths.frames, strict=True)
        ]
        source = pad_sequence(sources, batch_first=True).transpose(1, 2)
        text = pad_sequence([item.over_time(item.text) for item in items], batch_first=True).transpose(1, 2)
        hidden = _run_decoder(decoder, text, pitch, energy, style, lengths)
        return _to_audio(decoder.generator, _run_generator(decoder.generator, hidden, source, style, lengths), lengths)


class _Lengths:
    """The frames of every item of a padded batch, and its masks at the resolutions of the layers."""

    def __init__(self, frames: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
        self.frames = list(frames)
        self._on_device = torch.tensor(self.frames, device=device)[:, None, None]
        self._dtype = dtype
        self._masks: dict[tuple[int, int], Tensor] = {}

    def mask(self, scale: int, extra: int = 0) -> Tensor | None:
        """(B, 1, T), 1 within the items and 0 behind them, where n frames are n · scale + extra steps.

        None if nothing is padded.
        """
        if len(set(self.frames)) == 1:
            return None
        if (scale, extra) not in self._masks:
            steps = torch.arange(max(self.frames) * scale + extra, device=self._on_device.device)
            self._masks[scale, extra] = (steps < self._on_device * scale + extra).to(self._dtype)
        return self._masks[scale, extra]


def noise_seed(seed: int | None, text: str, voice: str, part: int) -> int:
    """What the noise of a part of a text is drawn from."""
    return stable_hash("kokoro", seed, text, voice, part) >> 1  # torch takes 63 bits


def load_kokoro(path: str, revision: str | None = None) -> KModel:
    """Kokoro on the CPU, every weight of it from the file.

    `KModel` itself loads what fits and is silent about the rest.

    Raises:
        ConfigError: a file is missing or damaged, or the two do not fit each other.
    """
    config, weights = _find(path, "config.json", revision), _find(path, WEIGHTS, revision)
    try:
        model = empty_kokoro(json.loads(config.read_text(encoding="utf-8")))
        place_weights(path, model, torch.load(weights, map_location="cpu", weights_only=True))
    except ModelError as error:
        raise ConfigError(str(error)) from None
    except (*UNUSABLE, AttributeError, EOFError, UnpicklingError) as error:
        raise ConfigError(f"{path}: cannot be loaded as Kokoro ({reason(error)}); take {HUB_ID}") from None
    return model


def empty_kokoro(config: Mapping[str, Any]) -> KModel:
    """A model in eval mode, its weights still random."""
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kokoro's use of weight_norm, and of dropout in LSTMs
        return KModel(repo_id=HUB_ID, config=dict(config), model=nothing).eval()


def place_weights(path: str, model: KModel, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Load a checkpoint's weights, all of them.

    Raises:
        ModelError: model and checkpoint do not hold the same weights, but for some that make no difference.
    """
    found = {f"{part}.{name.removeprefix('module.')}": w for part, state in states.items() for name, w in state.items()}
    wanted = model.state_dict()
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.InstanceNorm1d)}
    # Kokoro was trained without scale and shift in AdaIN's norm, which start as 1 and 0; nothing reads the pooler.
    missing = [w for w in set(wanted) - set(found) if w.rpartition(".")[0] not in norms and ".pooler." not in w]
    unexpected = [name for name in set(found) - set(wanted) if not name.endswith("_ids")]  # positions: once a buffer
    shapes = [
        (name, found[name].shape, wanted[name].shape)
        for name in set(found) & set(wanted)
        if found[name].shape != wanted[name].shape
    ]
    require_whole(path, {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": shapes})
    model.load_state_dict(found, strict=False)


def load_voice(path: str, name: str, revision: str | None = None) -> Tensor:
    """A voice's styles, float32 (510, 1, 256).

    Raises:
        ConfigError: there is no such voice, or its file is damaged or holds something else.
    """
    file = _find(path, f"voices/{name}.pt", revision)
    try:
        voice = torch.load(file, map_location="cpu", weights_only=True)
    except (*UNUSABLE, EOFError, UnpicklingError) as error:
        raise ConfigError(f"{path}: voices/{name}.pt cannot be read ({reason(error)})") from None
    needed = (MAX_PHONEMES, 1, 2 * STYLE_DIM)
    if not isinstance(voice, Tensor) or voice.shape != needed:
        found = tuple(voice.shape) if isinstance(voice, Tensor) else type(voice).__name__
        raise ConfigError(f"{path}: voices/{name}.pt is no Kokoro voice: {found} instead of {needed}")
    return voice


def _find(path: str, name: str, revision: str | None) -> Path:
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / name).is_file():
            raise ConfigError(f"{path}: holds no {name}; it needs config.json, {WEIGHTS} and voices/<name>.pt")
        return folder / name
    if not is_hub_id(path):
        raise ConfigError(f"{path}: no such folder; give Kokoro's, or a hub id such as {HUB_ID}")
    try:
        return Path(hf_hub_download(path, name, revision=revision))
    except UNUSABLE as error:
        raise ConfigError(f"{path}: {name} cannot be had from the hub ({reason(error)})") from None


def _folded(model: KModel) -> KModel:
    """Weights as their norms make them; `KModel` computes them anew for every text."""
    for module in model.modules():
        if hasattr(module, "weight_g"):
            remove_weight_norm(module)
    return model


def _run_lstm(lstm: nn.LSTM, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """(B, T, C) → (B, T, hidden), zero behind each item's end, where the backward direction begins."""
    if len(set(lengths)) == 1:
        return lstm(x)[0]
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(lstm(packed)[0], batch_first=True, total_length=x.shape[1])[0]


def _adain(
    norm: AdaIN1d, x: Tensor, style: Tensor, mask: Tensor | None, alpha: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """AdaIN over each item's own length and the activation after it, x + sin²(αx)/α with `alpha`, else a leaky ReLU.

    Zero behind the items, as convolutions need it. `x` (B, C, T) may be `out`. On the CPU a few channels at a time go
    through all of it while the cache holds them: the passes over memory would take as long as the convolutions.
    """
    gamma, beta = norm.fc(style)[:, :, None].chunk(2, dim=1)
    weight = (1 + gamma) * norm.norm.weight[:, None]
    bias = (1 + gamma) * norm.norm.bias[:, None] + beta
    out = torch.empty_like(x) if out is None else out
    size = max(1, _CACHED_ELEMENTS // (x.shape[0] * x.shape[2])) if x.device.type == "cpu" else x.shape[1]
    for start in range(0, x.shape[1], size):
        channels = slice(start, start + size)
        mean, variance = _moments(x[:, channels], mask)
        scale = weight[:, channels] * torch.rsqrt(variance + norm.norm.eps)
        shift = bias[:, channels] - mean * scale
        y = torch.addcmul(shift, x[:, channels], scale, out=out[:, channels])
        if mask is not None:
            y.mul_(mask)
        if alpha is None:
            functional.leaky_relu_(y, 0.2)
        else:
            y.addcmul_((y * alpha[:, channels]).sin_().square_(), 1 / alpha[:, channels])
    return out


def _moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, C, 1) over time."""
    if mask is None:
        mean = x.mean(2, keepdim=True)
        return mean, (x - mean).square_().mean(2, keepdim=True)
    number = mask.sum(2, keepdim=True)
    mean = (x * mask).sum(2, keepdim=True) / number
    return mean, (x - mean).mul_(mask).square_().sum(2, keepdim=True) / number


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.mul_(mask)


def _run_blocks(blocks: Sequence[AdainResBlk1d], x: Tensor, style: Tensor, lengths: _Lengths) -> Tensor:
    """The predictor's blocks for pitch or energy, (B, C, frames) → (B, C', 2 · frames)."""
    scale = 1
    for block in blocks:
        x, scale = _run_block(block, x, style, lengths, scale)
    return x


def _run_block(block: AdainResBlk1d, x: Tensor, style: Tensor, lengths: _Lengths, scale: int) -> tuple[Tensor, int]:
    """The block's output, and its steps per frame: twice those of its input if it upsamples."""
    y = block.pool(_adain(block.norm1, x, style, lengths.mask(scale)))
    scale *= 1 if block.upsample_type == "none" else 2
    y = block.conv1(_masked(y, lengths.mask(scale)))
    y = block.conv2(_adain(block.norm2, y, style, lengths.mask(scale), out=y))
    return y.add_(block._shortcut(x)).mul_(math.sqrt(0.5)), scale


def _run_decoder(
    decoder: Decoder, text: Tensor, pitch: Tensor, energy: Tensor, style: Tensor, lengths: _Lengths
) -> Tensor:
    """Text (B, 512, frames), pitch and energy (B, 1, 2 · frames) → (B, 512, 2 · frames)."""
    curves = torch.cat([decoder.F0_conv(pitch), decoder.N_conv(energy)], dim=1)
    x, scale = _run_block(decoder.encode, torch.cat([text, curves], dim=1), style, lengths, 1)
    residual = torch.cat([decoder.asr_res(text), curves], dim=1)
    for block in decoder.decode:  # the last one upsamples
        x, scale = _run_block(block, torch.cat([x, residual], dim=1), style, lengths, scale)
    return x


def _run_generator(generator: Generator, x: Tensor, source: Tensor, style: Tensor, lengths: _Lengths) -> Tensor:
    """Hidden states (B, 512, 2 · frames) and source spectra (B, 22, T) → spectra (B, 22, T), T = 120 · frames + 1."""
    scale, extra = 2, 0
    for i, upsample in enumerate(generator.ups):
        x = upsample(_masked(functional.leaky_relu_(x, 0.1), lengths.mask(scale)))
        scale *= upsample.stride[0]
        if i == len(generator.ups) - 1:
            x, extra = generator.reflection_pad(x), 1
        mask = lengths.mask(scale, extra)
        x = x.add_(_run_resblock(generator.noise_res[i], generator.noise_convs[i](source), style, mask))
        kernels = generator.resblocks[i * generator.num_kernels : (i + 1) * generator.num_kernels]
        total = _run_resblock(kernels[0], x, style, mask)
        for block in kernels[1:]:
            total.add_(_run_resblock(block, x, style, mask))
        x = total.div_(generator.num_kernels)
    return generator.conv_post(_masked(functional.leaky_relu_(x), mask))


def _run_resblock(block: AdaINResBlock1, x: Tensor, style: Tensor, mask: Tensor | None) -> Tensor:
    total, buffer = x.clone(), torch.empty_like(x)
    layers = zip(block.convs1, block.convs2, block.adain1, block.adain2, block.alpha1, block.alpha2, strict=True)
    for conv1, conv2, norm1, norm2, alpha1, alpha2 in layers:
        y = _convolve(conv1, _adain(norm1, total, style, mask, alpha1, out=buffer))
        _convolve(conv2, _adain(norm2, y, style, mask, alpha2, out=y), add_to=total)
    return total


def _convolve(conv: nn.Conv1d, x: Tensor, add_to: Tensor | None = None) -> Tensor:
    """A convolution that keeps the shape; on the CPU in stretches of time, which are faster than a long one at once."""
    num_steps, reach = x.shape[2], int(conv.padding[0])
    if x.device.type != "cpu" or num_steps <= _STRETCH:
        return conv(x) if add_to is None else add_to.add_(conv(x))
    out = torch.empty_like(x) if add_to is None else add_to
    for start in range(0, num_steps, _STRETCH):
        end = min(start + _STRETCH, num_steps)
        beyond = max(0, reach - start), max(0, end + reach - num_steps)
        around = functional.pad(x[:, :, max(0, start - reach) : end + reach], beyond)
        y = functional.conv1d(around, conv.weight, conv.bias, dilation=conv.dilation)
        out[:, :, start:end] = y if add_to is None else y.add_(out[:, :, start:end])
    return out


def _source_spectrum(generator: Generator, pitch: Tensor, seed: int) -> Tensor:
    """The voice's source (Kokoro's `SourceModuleHnNSF`): harmonics of the pitch (2 · frames,) in Hz, and noise.

    Returns:
        Magnitudes and phases (120 · frames + 1, 22).
    """
    module, sine, scale = generator.m_source, generator.m_source.l_sin_gen, generator.m_source.l_sin_gen.upsample_scale
    draws = torch.Generator(pitch.device).manual_seed(seed)
    # KModel draws first phases too, which its resampling loses: only to draw the same noise after them.
    torch.rand(1, sine.dim, generator=draws, device=pitch.device, dtype=pitch.dtype)
    cycles = pitch[:, None] * torch.arange(1, sine.dim + 1, device=pitch.device) / sine.sampling_rate % 1
    phase = torch.cumsum(cycles, dim=0) * 2 * torch.pi
    phase = functional.interpolate(phase.T[None] * scale, scale_factor=scale, mode="linear")[0].T
    voiced = (pitch > sine.voiced_threshold).to(pitch.dtype).repeat_interleave(scale)[:, None]
    noise_level = voiced * sine.noise_std + (1 - voiced) * sine.sine_amp / 3
    noise = torch.empty_like(phase).normal_(generator=draws)
    waves = torch.sin(phase) * sine.sine_amp * voiced + noise_level * noise
    wave = module.l_tanh(module.l_linear(waves))[:, 0]
    return torch.cat(generator.stft.transform(wave[None]), dim=1)[0].T


def _to_audio(generator: Generator, spectra: Tensor, lengths: _Lengths) -> list[np.ndarray]:
    """Each item's inverse transform by itself, for its edges, and all samples to the CPU at once."""
    bins = generator.post_n_fft // 2 + 1
    magnitudes, phases = torch.exp(spectra[:, :bins]), torch.sin(spectra[:, bins:])
    steps = [2 * 60 * frames + 1 for frames in lengths.frames]
    audios = [
        generator.stft.inverse(magnitude[None, :, :length], phase[None, :, :length])[0, 0]
        for magnitude, phase, length in zip(magnitudes, phases, steps, strict=True)
    ]
    samples = torch.cat(audios).cpu()
    return [audio.numpy().copy() for audio in samples.split([len(audio) for audio in audios])]


def _assemble(text: str, script: Sequence[Part], spoken: Iterator[tuple[np.ndarray, np.ndarray]]) -> Speech:
    """One after the other the parts of a text, and the times of its words."""
    audios: list[np.ndarray] = []
    frames: list[tuple[int, int]] = []
    offset = 0
    for part in script:
        audio, durations = next(spoken) if part.phonemes else (np.zeros(0, np.float32), np.zeros(2, np.int64))
        bounds = list(accumulate(durations.tolist(), initial=offset))  # the first token marks the beginning
        frames += [(bounds[start + 1], bounds[end + 1]) for start, end in part.spans]
        audios.append(audio)
        offset += int(durations.sum())
    words = [
        Word(written, start / FRAME_RATE, end / FRAME_RATE)
        for written, (start, end) in zip(text.split(), frames, strict=True)
    ]
    return Speech(np.concatenate(audios), SAMPLING_RATE, words)
