"""Packed rows on a CPU: `model.attention=varlen`, which computes each sample by itself, beside `sdpa` with a mask.

    python -m benchmarks.attention

Forward and backward of an LLM of the quickstart's shape, in fp32 on one thread, two rows, the two in turns.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.side_by_side import PAIRS, ratio_row, take_turns
from salad_ray.model.packed import hidden_states

NUM_ROWS = 2
REPEATS = 5
SHAPES = ((512, 120), (2048, 120), (2048, 400))
"""Positions of a row, and of each sample in it."""


def run(pairs: int = PAIRS) -> list[dict[str, Any]]:
    """A row a shape: positions/s of both, the ratio, and the largest difference of a state."""
    torch.set_num_threads(1)
    return [row(context, length, pairs) for context, length in SHAPES]


def row(context: int, length: int, pairs: int) -> dict[str, Any]:
    position_ids = (torch.arange(context) % length)[None].expand(NUM_ROWS, -1)
    embeddings = 0.02 * torch.randn(NUM_ROWS, context, 160, generator=torch.Generator().manual_seed(0))
    llms = {attention: make_llm(attention) for attention in ("varlen", "sdpa")}
    states = [hidden_states(llm, embeddings, position_ids) for llm in llms.values()]
    turns = take_turns(
        lambda _: rate(llms["varlen"], embeddings, position_ids),
        lambda _: rate(llms["sdpa"], embeddings, position_ids),
        pairs,
    )
    found = ratio_row(f"{context} positions, samples of {length}", "positions/s", *map(list, zip(*turns, strict=True)))
    return found | {"apart": (states[0] - states[1]).abs().max().item()}


def make_llm(attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=160, intermediate_size=432, num_hidden_layers=2, num_attention_heads=5, vocab_size=816
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=attention)


def rate(llm: PreTrainedModel, embeddings: Tensor, position_ids: Tensor) -> float:
    """Positions a second, forward and backward."""
    started = time.perf_counter()
    for _ in range(REPEATS):
        hidden_states(llm, embeddings.clone().requires_grad_(), position_ids).square().mean().backward()
    return REPEATS * position_ids.numel() / (time.perf_counter() - started)


def main() -> None:
    for each in run():
        print(each)


if __name__ == "__main__":
    main()
