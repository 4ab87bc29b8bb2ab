"""Packing at LibriHeavy-like lengths: how full 2,048-position rows are, and what planning costs per utterance.

Utterances of 2–30 s (12 s on average) with about 2.8 words and 12.5 frames a second, either alone or as chapters whose
neighbours are joined. The alternative is a row per passage, padded to the context or (fairer) to the longest of 16.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from salad_ray.config import PackConfig
from salad_ray.sequences.plan import draft_shard, plan_lane, usable_clips
from salad_ray.tables import Features, Word

NUM_SHARDS, SHARD_SIZE = 8, 600  # a feature shard of 600 utterances has 90 MB at 512 float16 values a frame
FRAME_RATE = 12.5


def run() -> list[dict[str, Any]]:
    """Measure; each result has name, value and unit."""
    rng = np.random.default_rng(0)
    vocabulary = _vocabulary(rng)
    tokenizer = _tokenizer(vocabulary)
    results: list[dict[str, Any]] = []
    for name, recording_size in (("alone", 1), ("8 in a row", 8), ("chapters of 60", 60)):
        shards = {f"shard-{i}": _shard(vocabulary, recording_size, rng) for i in range(NUM_SHARDS)}
        results += _measure(name, shards, tokenizer)
    return results


def _measure(name: str, shards: dict[str, list[Features]], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    config = PackConfig()
    started = time.process_time()
    rows, rejects = plan_lane(shards.__getitem__, list(shards), tokenizer, config, lane=0, epoch=0, seed=0)
    secs = time.process_time() - started
    fill = sum(row.num_positions for row in rows) / (len(rows) * config.context)
    padded = _padded_fill(shards["shard-0"], tokenizer, config)
    return [
        {"name": f"fill of packed rows, {name}", "value": 100 * fill, "unit": "%"},
        {"name": f"positions gained over padding to the longest of 16, {name}", "value": fill / padded, "unit": "×"},
        {"name": f"planning, {name}", "value": 1e6 * secs / (NUM_SHARDS * SHARD_SIZE), "unit": "CPU µs per utterance"},
        {"name": f"utterances rejected, {name}", "value": float(len(rejects)), "unit": ""},
    ]


def _padded_fill(utterances: list[Features], tokenizer: PreTrainedTokenizerFast, config: PackConfig) -> float:
    clips, _ = usable_clips(utterances, "train")
    drafts, _ = draft_shard("shard-0", clips, tokenizer, config, (0, 0))
    lengths = np.array([draft.num_positions for draft in drafts][: len(drafts) // 16 * 16]).reshape(-1, 16)
    return float(lengths.sum() / (16 * lengths.max(axis=1).sum()))


def _shard(vocabulary: list[str], recording_size: int, rng: np.random.Generator) -> list[Features]:
    utterances: list[Features] = []
    offset_secs = 0.0
    for i in range(SHARD_SIZE):
        offset_secs = 0.0 if i % recording_size == 0 else offset_secs
        recording_id = f"{rng.integers(1 << 62)}" if i % recording_size == 0 else utterances[-1].recording_id
        utterances.append(_utterance(f"{recording_id}-{i}", recording_id, offset_secs, vocabulary, rng))
        offset_secs += utterances[-1].duration_secs + 0.1
    return utterances


def _utterance(
    utt_id: str, recording_id: str, offset_secs: float, vocabulary: list[str], rng: np.random.Generator
) -> Features:
    duration_secs = float(np.clip(rng.gamma(4, 3), 2, 30))
    num_words = max(2, int(duration_secs * rng.normal(2.8, 0.3)))
    pieces = [vocabulary[min(i, len(vocabulary)) - 1] for i in rng.zipf(1.3, num_words)]
    times = np.sort(rng.uniform(0, duration_secs, 2 * num_words)).tolist()
    return Features(
        utt_id=utt_id,
        recording_id=recording_id,
        offset_secs=offset_secs,
        duration_secs=duration_secs,
        domain="",
        split="train",
        text=" ".join(pieces),
        words=[Word(*word) for word in zip(pieces, times[::2], times[1::2], strict=True)],
        num_frames=int(np.ceil(duration_secs * FRAME_RATE)),
        frame_rate=FRAME_RATE,
        dim=512,
        features=b"",
    )


def _vocabulary(rng: np.random.Generator) -> list[str]:
    """Words of one to four syllables, the frequent ones shorter."""
    syllables = [first + vowel + last for first in "bdfhklmnprstw" for vowel in "aeiou" for last in ("", "n", "r", "s")]
    counts = np.minimum(4, 1 + np.arange(3000) // 150)
    return ["".join(rng.choice(syllables, count)) for count in counts]


def _tokenizer(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits the rarer words, as those of LLMs do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([f" {word}" for word in vocabulary], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def main() -> None:
    for result in run():
        print(f"{result['name']:<66} {result['value']:>9.2f} {result['unit']}")


if __name__ == "__main__":
    main()
