"""Models and rows that the sections share: Qwen2.5-3B's shape with random weights, rows as training has them.

Shape letters as in `salad_ray.sequences.batch`.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from benchmarks.gpu.worker import Context
from salad_ray.config import AdapterConfig
from salad_ray.distill.step import training_flops
from salad_ray.model.adapter import Adapter
from salad_ray.model.layers import attention_widths
from salad_ray.model.speech_lm import EncoderSpec, SpeechLM, SpeechLMConfig
from salad_ray.sequences.batch import Batch, Sample, collate
from salad_ray.sequences.interleave import Segment, Units, build_segment, draw_spans
from salad_ray.sequences.packing import pack

QWEN_3B = Qwen2Config(
    hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008,
    vocab_size=151_936, tie_word_embeddings=True, max_position_embeddings=32_768, rope_parameters={
        "rope_type": "default", "rope_theta": 1e6},
)  # fmt: skip
TINY_LLM = Qwen2Config(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
    vocab_size=512, tie_word_embeddings=True,
)  # fmt: skip
TINY_ADAPTER = AdapterConfig(hidden_size=32, num_layers=2, num_heads=2, ffn_size=64)
TEXT_WORDS, SPEECH_WORDS = (10, 30), (5, 15)
"""Spans, as the paper draws them."""
TOKENS_PER_WORD, FRAMES_PER_WORD = 1.3, 4.8
"""English: 2.6 words a second at 12.5 frames a second."""
PASSAGE_WORDS = (60, 240)


@dataclass(frozen=True)
class Shape:
    """A student and the rows that it trains on."""

    llm: Qwen2Config
    adapter: AdapterConfig
    encoder_dim: int
    context: int


def shape_of(context: Context, num_layers: int | None = None, positions: int = 2048) -> Shape:
    """Qwen2.5-3B with the adapter and Mimi's frames, or a toy; `num_layers` keeps fewer layers, of the same width."""
    llm = copy.deepcopy(TINY_LLM if context.tiny else QWEN_3B)
    if num_layers is not None:
        llm.num_hidden_layers = min(num_layers, llm.num_hidden_layers)
    if context.tiny:
        return Shape(llm, TINY_ADAPTER, 16, min(positions, 128))
    return Shape(llm, AdapterConfig(), 512, positions)


def make_llm(shape: Shape, device: torch.device, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Random weights, drawn where they are used: on a GPU that takes a second, from a file minutes."""
    torch.manual_seed(0)
    with torch.device(device):
        llm: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(shape.llm), dtype=dtype, attn_implementation=attention
        )
    return llm.eval()


def make_pair(shape: Shape, device: torch.device, dtype: torch.dtype, attention: str) -> tuple[nn.Module, SpeechLM]:
    """A frozen teacher, and the student before its first step, in train mode: the same LLM and a fresh adapter."""
    teacher = make_llm(shape, device, dtype, attention).requires_grad_(False)
    llm = copy.deepcopy(teacher).requires_grad_(True)
    rms = shape.llm.initializer_range
    adapter = Adapter(shape.adapter, shape.encoder_dim, shape.llm.hidden_size, rms, attention=attention).to(
        device, dtype
    )
    encoder = EncoderSpec("random", None, None, 24_000, 12.5, shape.encoder_dim)
    config = SpeechLMConfig("random", None, encoder, shape.adapter)
    return teacher, SpeechLM(config, llm, adapter, None).train()  # nothing asks for text


def use_attention(model: PreTrainedModel, attention: str) -> None:
    """Change an LLM's attention; `hidden_states` looks it up at every forward."""
    model.config._attn_implementation = attention


def start_process_group(context: Context) -> None:
    """A group of this one process, which DeepSpeed needs; without a port that another could have."""
    if not dist.is_initialized():
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        backend = "nccl" if context.on_gpu else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def make_batches(shape: Shape, num_rows: int, num_batches: int, seed: int = 0) -> list[Batch]:
    """Micro-batches of packed rows, made by the project's own interleaving, packing and collating; on the CPU."""
    rng = np.random.default_rng(seed)
    longest = shape.context // 8  # words; even all spoken they fit a row
    low, high = (min(words, longest) for words in PASSAGE_WORDS)
    num_positions = shape.context * num_rows * num_batches
    segments: list[Segment] = []
    while sum(len(segment.token_ids) for segment in segments) < 1.1 * num_positions + 2 * shape.context:
        units = _random_units(int(rng.integers(low, high + 1)), shape.llm.vocab_size, rng)
        segments.append(build_segment(units, draw_spans(units, TEXT_WORDS, SPEECH_WORDS, rng)))
    rows = pack([(len(segment.token_ids), len(segment.teacher_ids)) for segment in segments], shape.context)
    rows.sort(key=lambda row: -sum(len(segments[i].token_ids) for i in row))  # the last one may be nearly empty
    rows = [rows[i] for i in rng.permutation(num_rows * num_batches)]
    samples = [[_with_frames(segments[i], shape.encoder_dim, rng) for i in row] for row in rows]
    return [collate(samples[start : start + num_rows], shape.context) for start in range(0, len(samples), num_rows)]


def _random_units(num_words: int, vocab_size: int, rng: np.random.Generator) -> Units:
    """A passage of random words: one to three tokens and some frames each, without pauses."""
    tokens = 1 + rng.binomial(2, (TOKENS_PER_WORD - 1) / 2, num_words)
    frames = 1 + rng.poisson(FRAMES_PER_WORD - 1, num_words)
    return Units(
        token_ids=rng.integers(0, vocab_size, int(tokens.sum())),
        num_prefix=0,
        token_starts=np.concatenate([[0], tokens.cumsum()]),
        frame_starts=np.concatenate([[0], frames.cumsum()]),
        pauses=np.zeros(num_words + 1),
        by_utterance=False,
    )


def _with_frames(segment: Segment, dim: int, rng: np.random.Generator) -> Sample:
    frames = rng.standard_normal((len(segment.frame_index), dim), dtype=np.float32).astype(np.float16)
    return Sample(segment, frames)


def convention_flops(student: SpeechLM, teacher: nn.Module, batch: Batch) -> float:
    """FLOP of a micro-batch as MFU counts them, and as the trainer's log does (`training_flops`)."""
    num_student, num_teacher = (sum(p.numel() for p in model.parameters()) for model in (student, teacher))
    return training_flops(num_student, num_teacher, attention_widths(student.llm), batch)


def product_flops(shape: Shape, batch: Batch) -> float:
    """FLOP of the matrix products that a micro-batch really takes.

    By convention every parameter counts at every position. In truth the adapter sees speech frames only, the head
    scored positions only, and looking an embedding up is no product; padding and recomputation count in neither.
    """
    llm, adapter = shape.llm, shape.adapter
    head_dim = getattr(llm, "head_dim", None) or llm.hidden_size // llm.num_attention_heads
    width, kv = llm.num_attention_heads * head_dim, llm.num_key_value_heads * head_dim
    layer = llm.hidden_size * (2 * width + 2 * kv + 3 * llm.intermediate_size)
    body, head = llm.num_hidden_layers * layer, llm.vocab_size * llm.hidden_size
    adapter_layer = adapter.hidden_size * (4 * adapter.hidden_size + 3 * adapter.ffn_size)
    ends = adapter.hidden_size * (shape.encoder_dim + llm.hidden_size)
    in_adapter = 6 * (adapter.num_layers * adapter_layer + ends) * len(batch.speech_index)
    in_llms = body * (6 * batch.num_positions + 2 * batch.num_teacher_positions)
    attention = 4 * width * llm.num_hidden_layers * (3 * batch.num_pairs + batch.num_teacher_pairs)
    return in_adapter + in_llms + 8 * head * len(batch.labels) + attention
