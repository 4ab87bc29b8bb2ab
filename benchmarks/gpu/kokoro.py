"""Kokoro-82M's true shape with random weights: `BatchedKokoro` beside `KModel`, one text at a time.

The texts are phonemes, so that nothing that makes them from text need be installed. Rates are with torch's own
settings; durations and audio are compared in full fp32, audio with the source fixed: why is in benchmarks/kokoro.py.
"""

from __future__ import annotations

import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu.timing import seconds, spread
from benchmarks.gpu.worker import Context

if TYPE_CHECKING:
    from salad_ray.synthesis.kokoro import Utterance

VOICES = ("af_heart", "bm_george")
NUM_PHONEMES, TINY_PHONEMES = (12, 30, 60, 100, 160, 240, 400), (6, 14)
COPIES = 8
PAIRS = 3
BATCH_FRAMES = (4_000, 16_000, 64_000)
AUDIO_TOLERANCE = 1e-3


def rows(context: Context) -> Iterator[dict[str, Any]]:
    """Equal durations, rates by size of batch, equal audio."""
    without_spacy()
    from benchmarks.kokoro import difference, in_batches, one_by_one
    from salad_ray.synthesis.kokoro import SAMPLING_RATE, KokoroSynthesizer, load_kokoro
    from tests.kokoro_weights import fix_source, write_random_kokoro

    with tempfile.TemporaryDirectory(prefix="salad-bench-") as folder:
        path = f"{folder}/kokoro"
        write_random_kokoro(Path(path), small=context.tiny, voices=VOICES)
        device = str(context.device)
        synthesizer = KokoroSynthesizer(path, VOICES, device, batch_frames=BATCH_FRAMES[1])
        utterances = make_utterances(synthesizer, context)
        single = load_kokoro(path).to(device)
        with full_fp32():
            ours, theirs = in_batches(synthesizer.model, utterances), one_by_one(single, utterances)
        unequal = sum(int((left[1] != right[1]).sum()) for left, right in zip(ours, theirs, strict=True))
        yield {"name": "durations that differ", "error": unequal, "tolerance": 0, "ok": unequal == 0}
        audio_secs = sum(len(audio) for audio, _ in theirs) / SAMPLING_RATE
        for batch_frames in BATCH_FRAMES[1:2] if context.tiny else BATCH_FRAMES:
            synthesizer.model.batch_frames = batch_frames
            turns = [
                (
                    seconds(lambda: in_batches(synthesizer.model, utterances), context.device),
                    seconds(lambda: one_by_one(single, utterances), context.device),
                )
                for _ in range(1 if context.tiny else PAIRS)
            ]
            ratios = spread([bare / own for own, bare in turns])
            yield {
                "name": f"batches of {batch_frames:,} frames, {len(utterances)} texts",
                "audio_per_sec": audio_secs / spread([own for own, _ in turns])["median"],
                "bare": audio_secs / spread([bare for _, bare in turns])["median"],
                "ours/bare": ratios["median"],
                "min": ratios["min"],
                "max": ratios["max"],
            }
        synthesizer.model.batch_frames = BATCH_FRAMES[1]
        for model in (synthesizer.model.model, single):
            fix_source(model)
        some = utterances[: len(lengths_of(context))]
        with full_fp32():
            error = difference(in_batches(synthesizer.model, some), one_by_one(single, some))
        name = "largest difference of audio, the source fixed"
        yield {"name": name, "error": error, "tolerance": AUDIO_TOLERANCE, "ok": error <= AUDIO_TOLERANCE}


def make_utterances(synthesizer: Any, context: Context) -> list[Utterance]:
    """Random phonemes with pauses, of many lengths, by both voices in turn."""
    from salad_ray.synthesis.kokoro import Utterance
    from tests.kokoro_weights import PANGRAM

    utterances, lengths = [], lengths_of(context)
    for seed in range((1 if context.tiny else COPIES) * len(lengths)):
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
