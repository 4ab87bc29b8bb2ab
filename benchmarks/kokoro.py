"""Batched Kokoro beside `KModel` one text at a time: same weights, same phonemes, same noise.

    python -m benchmarks.kokoro

Kokoro-82M's true shape with random weights, under which durations and pitch vary as in speech. Texts from two words to
a paragraph, two voices; both take turns, with two threads on the CPU and, if there is one, on a GPU (there in full
float32, without TF32).

Durations must be equal. Audio is compared in double precision, and in single precision with the source fixed (the
harmonics of the pitch, and noise). Else single precision is no measure: Kokoro sums the pitch up to phases of 10⁵ rad
and takes the angles of a spectrum, which jump at ±π, so that a rounding turns into other noise. The last row shows that
by `KModel` beside itself with other convolution kernels (`bare`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kokoro.model import KModel

from benchmarks.side_by_side import PAIRS, ratio_row, take_turns
from salad_ray.synthesis.kokoro import SAMPLING_RATE, BatchedKokoro, KokoroSynthesizer, Utterance, load_kokoro
from tests.kokoro_weights import double_precision, fix_source, in_double, write_random_kokoro

VOICES = ("af_heart", "bm_george")
NUM_THREADS = 2
COPIES = {"cpu": 1, "cuda": 8}
"""How often a turn speaks the texts."""
TOGETHER = 1 << 20
"""Frames: all utterances in one padded batch."""
TEXTS = (
    "It rains.",
    "Who was the first to cross the river?",
    "The committee met on Tuesday, but nothing was decided.",
    "Leaves are green because chlorophyll absorbs red and blue light, and reflects what remains of it.",
    "In 1928, a mould that had settled on a dish by accident killed the bacteria around it; from it came penicillin.",
    "Prices rise when many buyers want a thing of which there is little. When sellers see that, they make more of it, "
    "until the last one made costs as much as anybody will pay.",
    "A glacier is snow that did not melt. Year after year it is pressed into ice, and under its own weight the ice "
    "begins to flow down the valley, a few centimetres a day, carrying stones that scratch the rock beneath. Where it "
    "melts it leaves them in long heaps, which are called moraines.",
)
NUM_COMPARED = 4

Spoken = list[tuple[np.ndarray, np.ndarray]]


def run(
    pairs: int = PAIRS, texts: Sequence[str] = TEXTS, small: bool = False, compare: bool = True
) -> list[dict[str, Any]]:
    """A row of rates and one of durations for each device, and three of differences in the audio."""
    num_threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    torch.set_num_threads(NUM_THREADS)
    torch.backends.cudnn.allow_tf32 = False
    try:
        with tempfile.TemporaryDirectory(prefix="salad-bench-") as folder:
            path = f"{folder}/kokoro"
            write_random_kokoro(Path(path), small=small, voices=VOICES)
            devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
            rows = [row for device in devices for row in _compare_rates(path, device, texts, pairs)]
            return rows + (_compare_audio(path, texts[:NUM_COMPARED]) if compare else [])
    finally:
        torch.set_num_threads(num_threads)
        torch.backends.cudnn.allow_tf32 = tf32


def _compare_rates(path: str, device: str, texts: Sequence[str], pairs: int) -> list[dict[str, Any]]:
    synthesizer, model = KokoroSynthesizer(path, VOICES, device), load_kokoro(path).to(device)
    utterances = _utterances(synthesizer, [*texts] * COPIES[device])
    in_batches(synthesizer.model, utterances[:2])  # what is done once, such as choosing kernels
    one_by_one(model, utterances[:2])
    turns = take_turns(
        lambda _: _timed(lambda: in_batches(synthesizer.model, utterances)),
        lambda _: _timed(lambda: one_by_one(model, utterances)),
        pairs,
    )
    ours, theirs = turns[0][0][1], turns[0][1][1]
    unequal = [int((left[1] != right[1]).sum()) for left, right in zip(ours, theirs, strict=True)]
    rates = [(left, right) for (left, _), (right, _) in turns]
    return [
        ratio_row(f"{device}, {len(utterances)} texts", "audio s/s", *zip(*rates, strict=True)),
        _value_row(f"{device}, durations that differ", "phonemes", sum(unequal)),
    ]


def _compare_audio(path: str, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Largest differences of samples on the CPU, the batch padded."""
    model = load_kokoro(path)
    utterances = _utterances(KokoroSynthesizer(path, VOICES), texts)
    single = one_by_one(model, utterances)
    with torch.backends.mkldnn.flags(enabled=False):
        itself = difference(one_by_one(model, utterances), single)
    ours = difference(in_batches(BatchedKokoro(load_kokoro(path), TOGETHER), utterances), single)
    with double_precision():
        doubled = [replace(utterance, style=utterance.style.double()) for utterance in utterances]
        expected = one_by_one(in_double(load_kokoro(path)), doubled)
        double = difference(in_batches(BatchedKokoro(in_double(load_kokoro(path)), TOGETHER), doubled), expected)
    silent = in_batches(BatchedKokoro(fix_source(load_kokoro(path)), TOGETHER), utterances)
    quiet = difference(silent, one_by_one(fix_source(model), utterances))
    return [
        _value_row("largest difference, float64", "", double),
        _value_row("largest difference, float32, the source fixed", "", quiet),
        _value_row("largest difference, float32", "", ours, itself),
    ]


def _utterances(synthesizer: KokoroSynthesizer, texts: Sequence[str]) -> list[Utterance]:
    """The texts by both voices in turn."""
    from salad_ray.synthesis.phonemes import to_parts

    utterances = []
    for seed, text in enumerate(texts):
        voice = VOICES[seed % len(VOICES)]
        [part] = to_parts(text, voice.startswith("b"), synthesizer.model.vocab)
        utterances.append(Utterance(part.phonemes, synthesizer.voices[voice][len(part.phonemes) - 1, 0], seed))
    return utterances


def in_batches(model: BatchedKokoro, utterances: Sequence[Utterance]) -> Spoken:
    return model.speak(utterances)


def one_by_one(model: KModel, utterances: Sequence[Utterance]) -> Spoken:
    spoken = []
    for utterance in utterances:
        torch.manual_seed(utterance.noise_seed)
        output = model(utterance.phonemes, utterance.style[None], return_output=True)
        spoken.append((output.audio.numpy(), output.pred_dur.numpy()))
    return spoken


def _timed(speak: Callable[[], Spoken]) -> tuple[float, Spoken]:
    """Seconds of audio a second, and the audio, which is on the CPU by then."""
    started = time.perf_counter()
    spoken = speak()
    secs = time.perf_counter() - started
    return sum(len(audio) for audio, _ in spoken) / SAMPLING_RATE / secs, spoken


def difference(left: Spoken, right: Spoken) -> float:
    return max(float(np.abs(ours - theirs).max()) for (ours, _), (theirs, _) in zip(left, right, strict=True))


def _value_row(name: str, unit: str, ours: float, bare: float | None = None) -> dict[str, Any]:
    nothing = {"ours/bare": None, "min": None, "max": None}
    return {"name": name, "unit": unit, "pairs": None, "ours": ours, "bare": bare, **nothing}


def main() -> None:
    for row in run():
        print(", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
