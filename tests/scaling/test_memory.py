"""The planner's memory, held against what a training step really takes, and against the true sizes."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.memory import measure_case
from salad_ray.config import AdapterConfig, DistillConfig, PackConfig
from salad_ray.model.adapter import Adapter
from salad_ray.scaling.memory import (
    Shape,
    estimated_layer_bytes,
    is_estimated,
    layer_bytes,
    num_parameters,
    training_memory,
)

QWEN_3B = Qwen2Config(
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    vocab_size=151936,
    tie_word_embeddings=True,
)

MIXTURE = transformers.Qwen3MoeConfig(
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=8,
    num_experts_per_tok=2,
)


@pytest.mark.parametrize(
    "case", [*(pytest.param(case, marks=pytest.mark.slow) for case in ("weights, bf16", "activations, fp32")), "ZeRO 3"]
)
def test_the_plan_is_within_fifteen_percent_of_a_real_step(case: str) -> None:
    planned, measured = measure_case(case)
    assert planned == pytest.approx(measured, rel=0.15)


def test_parameters_are_those_of_the_true_shapes() -> None:
    for stride in (1, 2):
        shape = Shape(QWEN_3B, AdapterConfig(stride=stride), 512)
        assert shape.num_llm == 3_085_938_688  # as published
        layers = 12 * (4 * 1024**2 + 3 * 1024 * 1856 + 2 * 1024) + 1024  # with norms
        assert shape.num_adapter == layers + (stride * 512 + 1) * 1024 + (1024 + 1) * 2048


def test_muon_keeps_one_moment_of_the_matrices_instead_of_two() -> None:
    shape, pack = Shape(QWEN_3B, AdapterConfig(), 512), PackConfig()
    adam, muon = (training_memory(shape, DistillConfig(optimizer=name), pack, 8) for name in ("adamw", "muon"))
    with torch.device("meta"):
        layer = Qwen2ForCausalLM(QWEN_3B).model.layers[0]
        own = Adapter(AdapterConfig(), 512, 2048)
    matrices = 36 * sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    matrices += sum(p.numel() for p in own.parameters() if p.ndim == 2)
    assert shape.num_matrices == matrices
    assert adam["peak"] - muon["peak"] == 4 * matrices / 8


def test_recomputing_zero_and_smaller_batches_save_memory() -> None:
    shape, pack = Shape(QWEN_3B, AdapterConfig(), 512), PackConfig(num_lanes=64, rows_per_lane=8)

    def peak(**settings: object) -> float:
        return training_memory(shape, DistillConfig.model_validate(settings), pack, 64)["peak"]

    assert peak(zero_stage=3) < peak(zero_stage=2) < peak(zero_stage=1)
    assert peak(micro_batch_rows=1) < peak(micro_batch_rows=4)
    assert peak(activation_checkpointing=True, micro_batch_rows=4) < 0.7 * peak(micro_batch_rows=4)


def test_word_ends_keep_a_second_gradient_of_the_head() -> None:
    shape, pack = Shape(QWEN_3B, AdapterConfig(), 512), PackConfig(num_lanes=64, rows_per_lane=8)
    one, two = (training_memory(shape, DistillConfig(word_ends=on), pack, 64)["loss"] for on in (False, True))
    head = 2 * QWEN_3B.vocab_size * QWEN_3B.hidden_size
    assert head < two - one < 1.1 * head


def test_where_no_layer_runs_by_itself_the_estimate_is_within_a_quarter() -> None:
    exact = layer_bytes(QWEN_3B, torch.bfloat16, 1, 512)
    assert estimated_layer_bytes(QWEN_3B, torch.bfloat16, 1, 512) == pytest.approx(exact, rel=0.25)
    assert not is_estimated(QWEN_3B)


@pytest.mark.parametrize(
    "llm",
    [
        transformers.GPT2Config(),
        transformers.OPTConfig(num_hidden_layers=2),
        transformers.FalconConfig(num_hidden_layers=2),
        transformers.Gemma3TextConfig(num_hidden_layers=6),
        MIXTURE,
    ],
    ids=lambda llm: str(llm.model_type),
)
def test_every_kind_of_text_llm_is_planned(llm: transformers.PretrainedConfig) -> None:
    """Whatever its layers are called, and whether or not one of them runs by itself."""
    shape, pack = Shape(llm, AdapterConfig(), 512), PackConfig(num_lanes=64, rows_per_lane=8)
    parts = training_memory(shape, DistillConfig(optimizer="adamw"), pack, 64)
    assert parts["activations"] > 2 * pack.context * llm.hidden_size * llm.num_hidden_layers
    muon = training_memory(shape, DistillConfig(optimizer="muon"), pack, 64)
    assert sum(muon.values()) < sum(parts.values())  # of its matrices it keeps one moment instead of two


def test_of_a_mixture_the_experts_that_a_position_goes_through_are_active() -> None:
    shape = Shape(MIXTURE, AdapterConfig(), 512)
    expert = 3 * 32 * 64
    assert shape.num_llm - shape.num_active == 2 * (8 - 2) * expert
    assert Shape(QWEN_3B, AdapterConfig(), 512).num_active == num_parameters(QWEN_3B)


def test_a_layer_keeps_more_for_more_positions_and_in_fp32() -> None:
    one = layer_bytes(QWEN_3B, torch.bfloat16, 1, 512)
    assert layer_bytes(QWEN_3B, torch.bfloat16, 2, 512) == pytest.approx(2 * one, rel=0.01)
    assert layer_bytes(QWEN_3B, torch.float32, 1, 512) > 1.3 * one
