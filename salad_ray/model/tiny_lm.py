"""The tiny text LM of the embedded default: a Qwen2 of about 0.8 M parameters, trained from scratch in a minute.

Letters: B documents of a batch, T positions, D model width, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import logging as transformers_logging

from salad_ray.config import TinyLMConfig
from salad_ray.tables import BadInput

END_OF_TEXT = "<|endoftext|>"
MAX_VOCABULARY = 1280
MAX_POSITIONS = 2048
_HELDOUT_SHARE = 0.02
_WARMUP_SHARE = 0.05
_IGNORED = -100
_SPREAD_SHARE = 0.5
MAX_SPREAD = 8.0
"""Positions of a token, at most: the slowest voices take as many frames, of 80 ms, for a word."""
# Qwen2's 0.02 suits widths of thousands; at a width of 160 the LM learns to copy from context far later with it.
_INITIALIZER_RANGE = 0.06

Progress = Callable[[int, int, float], None]


def train_tiny_lm(
    texts: Sequence[str],
    config: TinyLMConfig,
    seed: int,
    folder: str | Path,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train a tokenizer and a causal LM on short documents and write both as a Hugging Face folder.

    Every document is a sample of its own: it starts at position 0, without BOS, and ends with `<|endoftext|>`. Of half
    of them a part is spread over more positions than it has tokens, as if it were spoken: so the LM knows the distances
    of samples that hold speech, which are several times those of text. Runs on the CPU in fp32; the same texts, config
    and seed give the same weights.

    Args:
        texts: documents; one in fifty is held out for the figures below.
        config: shape and schedule of the LM.
        seed: for the weights, the order of the documents and the choice of the held-out ones.
        folder: local folder, made if missing.
        progress: called as `progress(step, num_steps, loss)` after every step, with the batch's loss in nats per token.

    Returns:
        `loss` (nats per token) and `perplexity` on the held-out documents, `seconds`, `num_parameters`, `vocab_size`
        and `tokens_per_text`.

    Raises:
        BadInput: when there are fewer than two documents, or one is too long for the LM.
    """
    start = time.monotonic()
    tokenizer = train_tokenizer(texts)
    samples = _encode(texts, tokenizer)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(samples)).tolist()
    num_heldout = math.ceil(_HELDOUT_SHARE * len(samples))
    heldout, train = ([samples[index] for index in part] for part in (order[:num_heldout], order[num_heldout:]))
    model = _build(config, tokenizer, seed)
    with _one_thread():
        _fit(model, train, config, rng, progress)
        loss = _evaluate(model, heldout, config.batch_size)
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "seconds": time.monotonic() - start,
        "num_parameters": float(model.num_parameters()),
        "vocab_size": float(len(tokenizer)),
        "tokens_per_text": float(np.mean([len(sample) for sample in samples])),
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small gain a third from a second core, and lose a factor of twenty where it is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_tokenizer(texts: Sequence[str]) -> Qwen2Tokenizer:
    """A byte-level BPE in which every word of a small world is one token, and any other text can be spelled.

    No special token is added by itself. It is Qwen2's own class because `AutoTokenizer` rebuilds the tokenizer of a
    Qwen2 folder from vocabulary and merges alone: any other pre-tokenizer would come back changed.
    """
    blank = Qwen2Tokenizer(bos_token=END_OF_TEXT, model_max_length=MAX_POSITIONS)
    return blank.train_new_from_iterator(texts, vocab_size=MAX_VOCABULARY, show_progress=False)


def _encode(texts: Sequence[str], tokenizer: Qwen2Tokenizer) -> list[list[int]]:
    if len(texts) < 2:
        raise BadInput(f"the tiny LM needs at least two documents, one of them held out, and got {len(texts)}")
    samples = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(texts))["input_ids"]]
    longest = max(len(sample) for sample in samples)
    if longest > MAX_POSITIONS:
        raise BadInput(f"a document has {longest:,} tokens, and the tiny LM takes {MAX_POSITIONS:,}; shorten it")
    return samples


def tiny_shape(config: TinyLMConfig, vocab_size: int, **others: Any) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=_INITIALIZER_RANGE,
        **others,
    )


def _build(config: TinyLMConfig, tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = tiny_shape(config, len(tokenizer), **ends)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(shape)


def _fit(
    model: Qwen2ForCausalLM,
    samples: list[list[int]],
    config: TinyLMConfig,
    rng: np.random.Generator,
    progress: Progress | None,
) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config.num_steps))
    batches = _shuffled_batches(samples, config.batch_size, rng)
    model.train()
    for step in range(1, config.num_steps + 1):
        batch = next(batches)
        loss = _mean_loss(model, batch, [_spread_positions(len(sample), rng) for sample in batch])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step, config.num_steps, loss.item())


def _rate(step: int, num_steps: int) -> float:
    """Share of the peak learning rate: a linear climb, then half a cosine down to zero."""
    warmup = max(1, round(_WARMUP_SHARE * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def _shuffled_batches(samples: list[list[int]], batch_size: int, rng: np.random.Generator) -> Iterator[list[list[int]]]:
    """Batches without end; each epoch groups documents of like length anew, as padding costs as much as text."""
    while True:
        noisy_length = np.array([len(sample) for sample in samples]) + rng.random(len(samples))
        order = np.argsort(noisy_length).tolist()
        starts = range(0, len(order), batch_size)
        for pick in rng.permutation(len(starts)).tolist():
            yield [samples[index] for index in order[starts[pick] : starts[pick] + batch_size]]


def _spread_positions(length: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of a document's tokens, rising from 0; in a random part, of half of all documents, a token takes up to
    `MAX_SPREAD` of them."""
    steps = np.ones(length)
    start, end = np.sort(rng.integers(length + 1, size=2))
    if rng.random() < _SPREAD_SHARE:
        steps[start:end] = rng.uniform(1, min(MAX_SPREAD, MAX_POSITIONS / length))
    return np.concatenate([[0], np.cumsum(steps)[:-1]]).astype(np.int64)


def _mean_loss(
    model: Qwen2ForCausalLM, samples: list[list[int]], positions: Sequence[np.ndarray] | None = None
) -> torch.Tensor:
    """Cross-entropy in nats per token. Padding is on the right, where causal attention never looks."""
    length = max(len(sample) for sample in samples)
    token_ids = torch.zeros((len(samples), length), dtype=torch.long)  # (B, T)
    labels = torch.full((len(samples), length), _IGNORED)
    position_ids = torch.arange(length).repeat(len(samples), 1)
    for row, sample in enumerate(samples):
        token_ids[row, : len(sample)] = torch.tensor(sample)
        labels[row, : len(sample) - 1] = torch.tensor(sample[1:])
        if positions is not None:
            position_ids[row, : len(sample)] = torch.from_numpy(positions[row])
    # A mask, though nothing is masked: without one, transformers takes a jump in the positions for another document.
    hidden = model.model(
        input_ids=token_ids, attention_mask=torch.ones_like(token_ids), position_ids=position_ids, use_cache=False
    ).last_hidden_state  # (B, T, D)
    scored = labels != _IGNORED
    return F.cross_entropy(model.lm_head(hidden[scored]), labels[scored])


@torch.no_grad()
def _evaluate(model: Qwen2ForCausalLM, samples: list[list[int]], batch_size: int) -> float:
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(samples), batch_size):
        batch = samples[start : start + batch_size]
        num_tokens = sum(len(sample) - 1 for sample in batch)
        total += _mean_loss(model, batch).item() * num_tokens
        count += num_tokens
    return total / count
