"""Kokoro-82M's true shape with random weights: `BatchedKokoro` beside `KModel`, one text at a time.

The texts are phonemes, so that nothing that makes them from text need be installed. Rates are of one call with as many
texts as salad_3b's (`synthesize.batch_size`), with torch's own settings. Durations and audio are compared in full fp32,
audio with the source fixed: why is in benchmarks/kokoro.py.
"""

from __future__ import annotations

import math
import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.gpu.timing import seconds, spread
from benchmarks.gpu.worker import Context

if TYPE_CHECKING:
    from salad_ray.synthesis.kokoro import Utterance

VOICES = ("af_heart", "bm_george")
NUM_PHONEMES, TINY_PHONEMES = (12, 30, 60, 100, 160, 240, 400), (4, 9)
NUM_TEXTS, NUM_CHECKED = 64, 2 * len(NUM_PHONEMES)
PAIRS = 3
DEFAULT_FRAMES, OTHER_FRAMES = 16_000, (4_000, 64_000)
AUDIO_TOLERANCE = 1e-3
DURATION_TOLERANCE = 1e-3
"""Durations are rounded to frames; sums in another order move some across the half."""


def rows(context: Context) -> Iterator[dict[str, Any]]:
    """Whether durations and audio are equal; the rate of the pipeline's setting, after every pair; then others."""
    without_spacy()
    from benchmarks.kokoro import in_batches, one_by_one
    from salad_ray.synthesis.kokoro import SAMPLING_RATE, KokoroSynthesizer, load_kokoro
    from tests.kokoro_weights import write_random_kokoro

    with tempfile.TemporaryDirectory(prefix="salad-bench-") as folder:
        path = f"{folder}/kokoro"
        write_random_kokoro(Path(path), small=context.tiny, voices=VOICES)
        device = str(context.device)
        synthesizer = KokoroSynthesizer(path, VOICES, device, batch_frames=DEFAULT_FRAMES)
        single = load_kokoro(path).to(device)
    utterances = make_utterances(synthesizer, context)
    few = utterances[:NUM_CHECKED]
    with full_fp32():
        yield from checks(synthesizer.model, single, few)
    spoken = in_batches(synthesizer.model, utterances)  # what is done once, as choosing kernels
    one_by_one(single, few)
    audio_secs = sum(len(audio) for audio, _ in spoken) / SAMPLING_RATE
    ours, bare = partial(in_batches, synthesizer.model, utterances), partial(one_by_one, single, utterances)
    own, theirs = [], []
    for _ in range(1 if context.tiny else PAIRS):
        own.append(seconds(ours, context.device))
        theirs.append(seconds(bare, context.device))
        yield rate_row(DEFAULT_FRAMES, own, theirs, audio_secs)
    for batch_frames in () if context.tiny else OTHER_FRAMES:
        synthesizer.model.batch_frames = batch_frames
        own = [seconds(ours, context.device) for _ in range(PAIRS)]
        yield rate_row(batch_frames, own, theirs, audio_secs)


def checks(batched: Any, single: Any, utterances: list[Utterance]) -> Iterator[dict[str, Any]]:
    """Durations, of which one in a thousand may be rounded the other way, by a frame; and audio, where they agree."""
    from benchmarks.kokoro import difference, in_batches, one_by_one

    with fixed_source(batched.model, single):
        ours, theirs = in_batches(batched, utterances), one_by_one(single, utterances)
    frames = [np.abs(left[1] - right[1]) for left, right in zip(ours, theirs, strict=True)]
    differ, number = sum(int((each > 0).sum()) for each in frames), sum(len(each) for each in frames)
    largest = max(int(each.max()) for each in frames)
    is_good = differ <= DURATION_TOLERANCE * number and largest <= 1
    yield {"name": "durations that differ", "error": differ, "of": number, "largest": largest, "ok": is_good}
    same = [index for index, each in enumerate(frames) if not each.any()]
    error = difference([ours[i] for i in same], [theirs[i] for i in same]) if same else math.inf
    name = f"largest difference of audio, {len(same)} of {len(frames)} texts, the source fixed"
    yield {"name": name, "error": error, "tolerance": AUDIO_TOLERANCE, "ok": error <= AUDIO_TOLERANCE}


def rate_row(batch_frames: int, ours: list[float], bare: list[float], audio_secs: float) -> dict[str, Any]:
    ratios = spread([theirs / own for own, theirs in zip(ours, bare, strict=True)])
    return {
        "name": f"batches of {batch_frames:,} frames, {audio_secs:.0f} s of audio",
        "default": batch_frames == DEFAULT_FRAMES,
        "audio_per_sec": audio_secs / spread(ours)["median"],
        "bare": audio_secs / spread(bare)["median"],
        "ours/bare": ratios["median"],
        "min": ratios["min"],
        "max": ratios["max"],
    }


@contextmanager
def fixed_source(*models: Any) -> Iterator[None]:
    """The same noise for every pitch, in all models."""
    from tests.kokoro_weights import fix_source

    sources = [model.decoder.generator.m_source for model in models]
    own = [source.l_tanh for source in sources]
    for model in models:
        fix_source(model)
    try:
        yield
    finally:
        for source, layer in zip(sources, own, strict=True):
            source.l_tanh = layer


def make_utterances(synthesizer: Any, context: Context) -> list[Utterance]:
    """Random phonemes with pauses, of many lengths, by both voices in turn."""
    from salad_ray.synthesis.kokoro import Utterance
    from tests.kokoro_weights import PANGRAM

    utterances, lengths = [], lengths_of(context)
    for seed in range(len(lengths) if context.tiny else NUM_TEXTS):
        length = lengths[seed % len(lengths)]
        shift = 7 * seed % len(PANGRAM)
        phonemes = (PANGRAM * (length // len(PANGRAM) + 2))[shift : shift + length]
        style = synthesizer.voices[VOICES[seed % len(VOICES)]][length - 1, 0]
        utterances.append(Utterance(phonemes, style, seed))
    return utterances


def lengths_of(context: Context) -> tuple[int, ...]:
    return TINY_PHONEMES if context.tiny else NUM_PHONEMES


def without_spacy() -> None:
    """Make `kokoro.model` importable without kokoro's `__init__`, whose pipeline takes 50 MB of spaCy's packages."""
    spec = find_spec("kokoro")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("kokoro is not installed", name="kokoro")
    package = types.ModuleType("kokoro")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["kokoro"] = package
    from loguru import logger

    logger.disable("kokoro")  # as its `__init__` does: `KModel` would print every text, and wait for the GPU to do so


@contextmanager
def full_fp32() -> Iterator[None]:
    """Convolutions without TF32, whose 10 bits would be all that is compared."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
