"""Scoring the choices of an item with their prompt shared, beside each choice in a row of its own.

    python -m benchmarks.scoring

Both score the same queries in fp32, on one thread, in batches of as many positions, longest first, and make logits at
scored positions only; they take turns. Real ARC items through the small text LM of SALAD_DATA, and the same ids through
a Qwen2 of 60 M parameters with random weights. `difference` is the largest of any log-likelihood, in nats.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from benchmarks.side_by_side import PAIRS, ratio_row, take_turns
from salad_ray.evaluation.benchmarks import choose_exemplars, exemplar_of, read_items
from salad_ray.evaluation.scoring import Query, batches, score, text_query
from salad_ray.model.loading import load_tokenizer
from salad_ray.model.speech_lm import lm_head, load_text_lm
from salad_ray.tables import Item

Scorer = Callable[[PreTrainedModel, Sequence[Query]], list[list[float]]]

NUM_CHOICES = 4
BATCH_POSITIONS = 4096
CONTEXT = 1024
THREADS = 1


def run() -> list[dict[str, Any]]:
    """One row per model and number of exemplars: items a second of both, their ratio, the largest difference."""
    torch.set_num_threads(THREADS)
    data = Path(os.environ.get("SALAD_DATA", "../shared/data"))
    path = str(data / "models" / "tiny-teacher")
    tokenizer, small = load_tokenizer(path, None), load_text_lm(path, None)
    rows = read_items("arc_challenge", str(data / "benchmarks" / "arc_challenge.jsonl"))
    items = [item for item in rows if isinstance(item, Item) and len(item.choices) == NUM_CHOICES]
    found = []
    for name, model, num in (("tiny-teacher, 4.7 M", small, 200), ("Qwen2, 60 M", random_qwen2(), 24)):
        for shots in (0, 5):
            exemplars = [map(exemplar_of, choose_exemplars(items, item, shots, 0)) for item in items[:num]]
            chosen = [
                text_query(tokenizer, list(own), item, CONTEXT) for own, item in zip(exemplars, items, strict=False)
            ]
            found.append(compare(f"{name}, {shots} exemplars", model, chosen))
    return found


def compare(name: str, model: PreTrainedModel, queries: Sequence[Query]) -> dict[str, Any]:
    for score_all in (shared, alone):
        score_all(model, queries[:2])  # what is set up once
    pairs = take_turns(lambda _: timed(shared, model, queries), lambda _: timed(alone, model, queries), PAIRS)
    values, secs = zip(*((side[0], side[1]) for pair in pairs for side in pair), strict=True)
    rates = [len(queries) / value for value in secs]
    row = ratio_row(name, "items/s", rates[::2], rates[1::2])
    differences = [np.abs(np.subtract(ours, bare)).max() for ours, bare in zip(values[0], values[1], strict=True)]
    return row | {"difference": float(max(differences))}


def timed(score_all: Scorer, model: PreTrainedModel, queries: Sequence[Query]) -> tuple[list[list[float]], float]:
    """The scores, and how many seconds they took."""
    started = time.perf_counter()
    values = score_all(model, queries)
    return values, time.perf_counter() - started


def shared(model: PreTrainedModel, queries: Sequence[Query]) -> list[list[float]]:
    values: list[list[float]] = [[] for _ in queries]
    for batch in batches(queries, BATCH_POSITIONS):
        for index, own in zip(batch, score(model, [queries[index] for index in batch]), strict=True):
            values[index] = own
    return values


def alone(model: PreTrainedModel, queries: Sequence[Query]) -> list[list[float]]:
    """Every choice behind a prompt of its own: causal attention without a mask, which is the faster one."""
    values: list[list[float]] = [[0.0] * len(query.choices) for query in queries]
    pairs = [replace(query, choices=[choice]) for query in queries for choice in query.choices]
    owners = [(q, c) for q, query in enumerate(queries) for c in range(len(query.choices))]
    for batch in batches(pairs, BATCH_POSITIONS):
        for index, value in zip(batch, score_rows(model, [pairs[index] for index in batch]), strict=True):
            q, c = owners[index]
            values[q][c] = value
    return values


@torch.no_grad()
def score_rows(model: PreTrainedModel, rows: Sequence[Query]) -> list[float]:
    ids = [torch.tensor(row.before + row.choices[0]) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence([row[:-1] for row in ids], batch_first=True)
    hidden = model.get_decoder()(input_ids=padded, use_cache=False).last_hidden_state
    sizes = [len(row.choices[0]) for row in rows]
    scored = [own[len(row) - 1 - size : len(row) - 1] for own, row, size in zip(hidden, ids, sizes, strict=True)]
    labels = torch.cat([row[-size:] for row, size in zip(ids, sizes, strict=True)])
    logits = torch.cat(scored) @ lm_head(model).T
    found = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0].double()
    return [part.sum().item() for part in found.split(sizes)]


def random_qwen2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32_768,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=11,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval()


if __name__ == "__main__":
    from benchmarks.__main__ import console, grid

    console.print(grid("Scoring", run()))
