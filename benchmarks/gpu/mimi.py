"""Mimi's true shape with random weights: seconds of audio a second by batch, and how many threads keep it fed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.gpu.timing import forget_peak, gib, peak_bytes, seconds, spread
from benchmarks.gpu.worker import Context, missing, num_cpus, out_of_memory
from salad_ray.config import EncodeConfig

if TYPE_CHECKING:
    from salad_ray.model.encoder import MimiEncoder

SECS, TINY_SECS = 10.0, 1.0
DEFAULT_BATCH = int(EncodeConfig().batch_secs // SECS)
"""What the stage gives the encoder at once."""
BATCHES = (DEFAULT_BATCH, 1, 8, 32, 128, 512)
THREADS = (1, 2, 4, 8, 16)
NUM_FILES = 256
SOURCE_RATE, MIMI_RATE = 16_000, 24_000
TINY = {
    "hidden_size": 32, "num_filters": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 32, "codebook_dim": 16, "vector_quantization_hidden_dimension": 16, "num_quantizers": 2,
    "codebook_size": 16, "head_dim": 16, "upsample_groups": 32, "sliding_window": 50,
}  # fmt: skip


def rows(context: Context) -> Iterator[dict[str, Any]]:
    """Rates of the encoder, in fp32 and bf16, then of decoding and resampling by number of threads."""
    with tempfile.TemporaryDirectory(prefix="salad-bench-") as folder:
        needed = None
        try:
            for row in model_rows(folder, context):
                needed = row["audio_per_sec"] if row.get("default") else needed
                yield row
        except ImportError as error:  # decoding needs no transformers
            yield {"name": "Mimi's encoder", "left_out": missing(error)}
        yield from feeding_rows(Path(folder), needed, context)


def model_rows(folder: str, context: Context) -> Iterator[dict[str, Any]]:
    from transformers import MimiConfig, MimiModel

    from salad_ray.model.encoder import MimiEncoder

    torch.manual_seed(0)
    MimiModel(MimiConfig(**TINY) if context.tiny else MimiConfig()).save_pretrained(folder)
    encoder = MimiEncoder(folder, device=context.device)
    yield from encoder_rows(encoder, context)
    yield half_row(encoder, MimiEncoder(folder, device=context.device, dtype=torch.bfloat16), context)


def secs_of(context: Context) -> float:
    """Of a recording."""
    return TINY_SECS if context.tiny else SECS


def speech(number: int, rate: int, secs: float) -> list[np.ndarray]:
    """Noise whose loudness moves as that of syllables."""
    rng = np.random.default_rng(0)
    times = np.arange(int(secs * rate)) / rate
    loudness = 0.1 * (1 + np.sin(2 * np.pi * 4 * times))
    return [(loudness * rng.standard_normal(len(times))).astype(np.float32) for _ in range(number)]


def encoder_rows(encoder: MimiEncoder, context: Context) -> Iterator[dict[str, Any]]:
    """A row for each size of batch, the pipeline's first."""
    length = secs_of(context)
    for size in BATCHES[:2] if context.tiny else BATCHES:
        audios = speech(size, encoder.sampling_rate, length)
        forget_peak(context.device)
        name = f"batch of {size} × {length:g} s"
        try:
            encoder.encode(audios)
            secs = spread([seconds(partial(encoder.encode, audios), context.device) for _ in range(3)])
        except RuntimeError as error:
            yield out_of_memory(error, name)
            return
        yield {
            "name": name,
            "default": size == DEFAULT_BATCH,
            "audio_per_sec": size * length / secs["median"],
            "min": size * length / secs["max"],
            "max": size * length / secs["min"],
            "peak_gib": gib(peak_bytes(context.device)),
        }


def half_row(encoder: MimiEncoder, half: MimiEncoder, context: Context) -> dict[str, Any]:
    """What bf16, which the stage does not use, would buy and cost."""
    size, length = 2 if context.tiny else 128, secs_of(context)
    audios = speech(size, encoder.sampling_rate, length)
    exact, found = encoder.encode(audios), half.encode(audios)
    error = np.linalg.norm(np.stack(found) - np.stack(exact)) / np.linalg.norm(np.stack(exact))
    secs = spread([seconds(lambda: half.encode(audios), context.device) for _ in range(3)])
    name = f"batch of {size} × {length:g} s, bf16"
    return {"name": name, "bf16_audio_per_sec": size * length / secs["median"], "relative_error": float(error)}


def run_all(pool: ThreadPoolExecutor, decode: Callable[[str], Any], files: list[str]) -> None:
    for _ in pool.map(decode, files):
        pass


def feeding_rows(folder: Path, needed: float | None, context: Context) -> Iterator[dict[str, Any]]:
    """FLAC at 16 kHz → audio at Mimi's rate, by the function that the stage calls.

    `needed` is what the encoder takes a second, at the pipeline's default; None where that was not measured.
    """
    try:
        import soundfile

        from salad_ray.speech.audio import load_audio
    except ImportError as error:
        yield {"name": "decoding and resampling", "left_out": missing(error)}
        return
    files = [str(folder / f"{index}.flac") for index in range(8 if context.tiny else NUM_FILES)]
    [audio] = speech(1, SOURCE_RATE, SECS)
    for file in files:
        soundfile.write(file, audio, SOURCE_RATE)
    for number in [threads for threads in THREADS if threads <= num_cpus()]:
        with ThreadPoolExecutor(number) as pool:
            work = partial(run_all, pool, partial(load_audio, sampling_rate=MIMI_RATE), files)
            work()
            secs = seconds(work, context.device)
        found = len(files) * SECS / secs
        row = {"name": f"decoding and resampling, {number} threads", "decoded_per_sec": found}
        yield row | {"decoded/encoded": found / needed if needed else None}
