"""Listening: the text that a speech LM writes after a recording, token by token.

A prompt is text around one place for the speech, `{speech}`. The recording becomes frames as in training (mono, the
encoder's sampling rate, whole frames, float16), one span for the adapter; then the LLM goes on from a key-value cache.
There is a single row and nothing is packed, so no other sample could be seen through it.

Shape letters: T positions of the prompt, S speech frames, C encoder width, D model width, V tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import soxr
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from salad_ray.config import ConfigError, EncodeConfig, QualityConfig
from salad_ray.model.encoder import Encoder, load_encoder
from salad_ray.model.loading import ModelError
from salad_ray.model.speech_lm import EncoderSpec, SpeechLM
from salad_ray.names import STAGE1
from salad_ray.sequences.batch import stacked
from salad_ray.sequences.interleave import prefix_ids, tokenize
from salad_ray.speech.audio import check_samples, load_audio, mono, require_mixable
from salad_ray.tables import BadInput, local_folder, read_json

SPEECH = "{speech}"
_STUBS = ("a", ".")
"""What text behind the speech is tokenised behind, as it is never the beginning of a text."""
_INCOMPLETE = "\ufffd"
"""What a decoder shows for the first bytes of a character."""


def load_listener(
    path: str, encoder_path: str | None = None, backend: str | None = None, device: str | None = None
) -> tuple[SpeechLM, Encoder]:
    """A speech LM, in eval mode, and the encoder that it was trained with.

    Args:
        path: folder or URL that `SpeechLM.save_pretrained` or `export` wrote.
        encoder_path: where the encoder's weights are on this machine; unset: where training found them.
        backend: whose code runs Mimi, "transformers" or "moshi"; unset: that of training.
        device: none takes the GPU if there is one.

    Raises:
        ModelError: no speech LM is there; the encoder's weights cannot be had, are others than those of training (as
            far as `lineage.json`, which `export` writes, knows), or do not fit the model.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _fetched(path) as folder:
        trained = (read_json(f"{folder}/lineage.json") or {}).get("encoder", {})
        model = _load_model(folder, path).to(device)
    spec = model.config.encoder
    backend = backend or trained.get("backend")
    encoder = _load_encoder(path, spec, encoder_path, backend, device)
    require_fit(spec, encoder)
    same_names = backend == trained.get("backend")  # the two backends name the same weights differently
    if same_names and trained.get("weights") and trained["weights"] != encoder.weights:
        raise ModelError(
            f"{encoder_path or spec.path}: its weights ({encoder.weights}) are not those that {path} was trained with "
            f"({trained['weights']}); give the encoder's path and revision of training, {spec.path} at {spec.revision}"
        )
    return model, encoder


def listen(
    model: SpeechLM,
    encoder: Encoder,
    audio: str | bytes | np.ndarray,
    sampling_rate: int | None = None,
    prompt: str = SPEECH,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """The text that follows a recording, in pieces of whole characters, as they come.

    Everything is checked, and the recording encoded, before this returns; each piece costs one step of the LLM.

    Args:
        audio: path or URL of a recording, the bytes of one, or samples: (num_samples,) or (num_samples, num_channels),
            floats in [−1, 1] or integers.
        sampling_rate: of samples; recordings know theirs.
        prompt: text with one `{speech}` where the recording is heard. Spaces in front of it and at the end are
            dropped: a word brings its own.
        max_tokens: most tokens to write; fewer where the LLM ends its text.
        temperature: 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature).
        seed: of the draws.

    Raises:
        BadInput: the recording is missing, not audio, damaged, empty or silent, or longer than the LLM's context.
        ConfigError: a prompt without `{speech}` or with two, or a number out of range.
        ModelError: the encoder is not the one that the model was trained with.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens={max_tokens} must be at least 1")
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature={temperature:g} must be 0 or more")
    require_fit(model.config.encoder, encoder)
    before, after = prompt_ids(model.tokenizer, prompt)
    name = audio if isinstance(audio, str) else "the recording"
    try:
        waveform = _waveform(audio, sampling_rate, encoder.sampling_rate)
        _require_room(model, encoder, len(waveform), len(before) + len(after), max_tokens)
        frames = _frames(encoder, waveform)
    except (BadInput, OSError) as error:
        raise BadInput(str(error) if name in str(error) else f"{name}: {error}") from None
    embeddings = prompt_embeddings(model, before, frames, after)
    return _pieces(model.tokenizer, next_tokens(model, embeddings, max_tokens, temperature, seed))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[list[int], list[int]]:
    """Token ids in front of the speech (those that begin every text included) and behind it.

    As in training, the space in front of a spoken word is part of the speech, and the text behind is tokenised as the
    middle of a text. Raises `ConfigError` unless `{speech}` is there once.
    """
    before, found, after = prompt.partition(SPEECH)
    if not found or SPEECH in after:
        raise ConfigError(f"the prompt '{prompt}' must hold {SPEECH} once, where the recording is to be heard")
    [head] = tokenize([before.rstrip(" ")], tokenizer)
    prefix, ids = prefix_ids(tokenizer), head.ids.tolist()
    said = next((num for num in range(len(prefix), 0, -1) if ids[:num] == prefix[-num:]), 0)  # a prompt's own `<s>`
    return prefix + ids[said:], _continuation(tokenizer, after.rstrip(" "))


def _continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of text in the middle of a text; some tokenizers would put a space in front of it."""
    for stub in _STUBS:
        [tokens] = tokenize([stub + text], tokenizer)
        behind = tokens.starts >= len(stub)
        if (behind | (tokens.ends <= len(stub))).all():
            return tokens.ids[behind].tolist()
    return tokenize([text], tokenizer)[0].ids.tolist()


@torch.inference_mode()
def prompt_embeddings(model: SpeechLM, before: list[int], frames: np.ndarray, after: list[int]) -> Tensor:
    """The LLM's inputs (1, T, D): text, speech frames (S, C), text."""
    device, dtype = model.head.device, model.adapter.input.weight.dtype
    embed = model.llm.get_input_embeddings()
    heard = torch.from_numpy(stacked(frames, model.config.adapter.stride)).to(device, dtype)[None]  # one span
    speech = model.adapter(heard, torch.ones(heard.shape[:2], dtype=torch.bool, device=device))
    ids = (torch.tensor(part, dtype=torch.long, device=device) for part in (before, after))
    head, tail = (embed(part) for part in ids)
    return torch.cat([head, speech.to(head.dtype), tail])[None]


def next_tokens(
    model: SpeechLM, embeddings: Tensor, max_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Iterator[int]:
    """Token ids that follow embeddings (1, T, D), until the LLM ends its text or there are `max_tokens`."""
    if model.llm.config._attn_implementation == "varlen":
        raise ModelError("attention 'varlen' knows no cache; load the model with attention='sdpa' to listen")
    embed, ends = model.llm.get_input_embeddings(), _end_ids(model)
    cache, generator = DynamicCache(config=model.llm.config), torch.Generator().manual_seed(seed)
    for _ in range(max_tokens):
        # Rows of the head beyond the vocabulary are padding: no token could be read from them.
        logits = _next_logits(model, embeddings, cache)[: len(model.tokenizer)]
        token = _choose(logits, temperature, generator)
        if token in ends:
            return
        yield token
        embeddings = embed(torch.tensor([[token]], device=embeddings.device)).detach()


@torch.inference_mode()
def _next_logits(model: SpeechLM, embeddings: Tensor, cache: DynamicCache) -> Tensor:
    """Logits (V,), float32 on the CPU, behind what the cache holds and these further embeddings, which it takes up."""
    start = cache.get_seq_length()
    positions = torch.arange(start, start + embeddings.shape[1], device=embeddings.device)[None]
    outputs = model.llm.get_decoder()(
        inputs_embeds=embeddings, attention_mask=None, position_ids=positions, past_key_values=cache, use_cache=True
    )
    return model.head.logits(outputs.last_hidden_state[0, -1:])[0].cpu()


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    shares = ((logits - logits.max()) / temperature).softmax(dim=0)  # the largest at 0: no overflow when T is small
    return int(torch.multinomial(shares, 1, generator=generator))


def _end_ids(model: SpeechLM) -> set[int]:
    """Tokens that end a text, by the LLM and by its tokenizer."""
    ends: Any = getattr(model.llm.generation_config, "eos_token_id", None)
    found = set(ends) if isinstance(ends, list) else {ends}
    return {token for token in found | {model.tokenizer.eos_token_id} if token is not None}


def _pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """Text as soon as its characters are whole; the beginning of a character at the very end is dropped."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if len(text) > len(shown) and not text.endswith(_INCOMPLETE):
            yield text[len(shown) :]
            shown = text


def _waveform(audio: str | bytes | np.ndarray, sampling_rate: int | None, wanted_rate: int) -> np.ndarray:
    """Mono float32 (num_samples,) at `wanted_rate`, neither empty nor silent; raises `BadInput`."""
    if isinstance(audio, np.ndarray):
        waveform = _resampled(audio, sampling_rate, wanted_rate)
    else:
        waveform, _ = load_audio(audio, sampling_rate=wanted_rate)
    if not len(waveform):
        raise BadInput("no samples")
    check_samples(waveform[:, None], QualityConfig(max_clipped_share=1.0), lossy=True)  # loud is no reason to refuse
    return waveform


def _resampled(samples: np.ndarray, sampling_rate: int | None, wanted_rate: int) -> np.ndarray:
    if sampling_rate is None or sampling_rate < 1:
        raise ConfigError(f"sampling_rate={sampling_rate}: give that of the samples, in Hz")
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and 0 < samples.shape[0] < samples.shape[1]):
        raise BadInput(f"samples of shape {samples.shape} must be (num_samples,) or (num_samples, num_channels)")
    if np.issubdtype(samples.dtype, np.signedinteger):
        samples = samples / -float(np.iinfo(samples.dtype).min)
    elif not np.issubdtype(samples.dtype, np.floating):
        raise BadInput(f"samples of type {samples.dtype} must be floats in [−1, 1] or signed integers")
    if not samples.size:
        raise BadInput("no samples")
    channels = samples.astype(np.float32).reshape(len(samples), -1)
    require_mixable(channels)
    audio = mono(channels)
    return audio if sampling_rate == wanted_rate else soxr.resample(audio, sampling_rate, wanted_rate)


def _require_room(model: SpeechLM, encoder: Encoder, num_samples: int, num_prompt: int, max_tokens: int) -> None:
    """Raises `BadInput` where speech, prompt and what is to be written exceed the LLM's context."""
    context = getattr(model.llm.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return
    num_frames = math.ceil(num_samples * encoder.frame_rate / encoder.sampling_rate)
    num_positions = math.ceil(num_frames / model.config.adapter.stride) + num_prompt + max_tokens
    if num_positions <= context:
        return
    room_secs = max(0, context - num_prompt - max_tokens) / model.config.frame_rate
    raise BadInput(
        f"{num_samples / encoder.sampling_rate:.1f} s of speech, {num_prompt:,} tokens of prompt and {max_tokens:,} to "
        f"write are {num_positions:,} positions, but the LLM's context is {context:,}; {room_secs:.1f} s would fit"
    )


def _frames(encoder: Encoder, waveform: np.ndarray) -> np.ndarray:
    """Frames (S, C), float32 with the precision in which training read them."""
    with np.errstate(over="ignore"):
        [frames] = (frames.astype(np.float16) for frames in encoder.encode([waveform]))
    if not np.isfinite(frames).all():
        raise BadInput("the encoder gave values that are not finite in float16")
    return frames.astype(np.float32)


def require_fit(spec: EncoderSpec, encoder: Encoder) -> None:
    """Raises `ModelError` for an encoder whose frames are not of the kind that the adapter was made for."""
    wanted, found = ((part.name, part.sampling_rate, part.frame_rate, part.dim) for part in (spec, encoder))
    if wanted != found:
        shown = ["{} ({:,} Hz, {:g} frames a second, width {})".format(*facts) for facts in (wanted, found)]
        raise ModelError(
            f"this encoder is {shown[1]}, but the model was trained on frames of {shown[0]}; give that one"
        )


def _load_encoder(path: str, spec: EncoderSpec, encoder_path: str | None, backend: str | None, device: str) -> Encoder:
    known = get_args(EncodeConfig.model_fields["encoder"].annotation)
    if spec.name not in known:
        raise ModelError(f"{path}: its encoder is {spec.name}, and this salad_ray has only {', '.join(known)}")
    weights = encoder_path or spec.path
    if spec.name != "log_mel" and weights is None:
        raise ModelError(f"{path}: does not say where the weights of its encoder {spec.name} are; give their path")
    choice: dict[str, Any] = {"encoder": spec.name, "path": weights}
    choice["revision"] = spec.revision if encoder_path in (None, spec.path) else None
    choice["backend"] = backend or ("moshi" if (weights or "").endswith(".safetensors") else "transformers")
    try:
        return load_encoder(EncodeConfig(**choice), device)
    except ModelError as error:
        raise ModelError(f"{error}; {path} hears through {spec.name}: give the path of its weights here") from None


def _load_model(folder: str, path: str) -> SpeechLM:
    place = Path(folder)
    if not (place / "adapter.safetensors").exists() and (place / "config.yaml").is_file():
        model = f"{path.rstrip('/')}/{STAGE1}/model"
        raise ModelError(f"{path}: is a run, not a model; name a model in it, such as {model}")
    try:
        return SpeechLM.from_pretrained(folder)
    except ModelError as error:
        raise ModelError(str(error).replace(folder, path)) from None


@contextmanager
def _fetched(path: str) -> Iterator[str]:
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(local_folder(path))
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(f"{path}: cannot be fetched ({type(error).__name__}: {error}); give a folder") from None
        yield folder
