"""Layers and the width of their attention, found in models that call them by other names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from salad_ray.distill.engine import compile_layers
from salad_ray.model.layers import attention_widths, decoder_layers
from salad_ray.scaling.memory import estimated_layer_bytes

SHAPE: dict[str, Any] = {
    **{"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}
GPT: dict[str, Any] = {"vocab_size": 400, "n_embd": 32, "n_layer": 3, "n_head": 4}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SHAPE | {"head_dim": 16}),
    "gpt2": ("GPT2", GPT),
    "gpt-neo": ("GPTNeo", {"vocab_size": 400, "hidden_size": 32, "num_layers": 2, "num_heads": 4,
                           "attention_types": [[["global", "local"], 1]]}),
    "falcon": ("Falcon", {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}),
    "opt": ("OPT", {"vocab_size": 400, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3,
                    "num_attention_heads": 4, "word_embed_proj_dim": 32}),
    "neox": ("GPTNeoX", SHAPE),
    "as many experts as layers": ("Qwen3Moe", SHAPE | EXPERTS | {"head_dim": 16}),
    "a width for every kind of layer": ("Gemma4Unified", SHAPE | WINDOWS | {"head_dim": 16, "global_head_dim": 24}),
}  # fmt: skip


def build(name: str) -> PreTrainedModel:
    kind, settings = MODELS[name]
    text = "Text" if kind.startswith("Gemma") else ""
    config = getattr(transformers, f"{kind}{text}Config")(**settings)
    ending = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    model: Any = getattr(transformers, f"{kind}{ending}")
    return model._from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_found_by_their_number_and_not_by_their_name(name: str) -> None:
    llm = build(name)
    layers = decoder_layers(llm)
    assert layers is not None
    assert len(layers) == llm.config.num_hidden_layers
    seen: list[Any] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, _: seen.append(module))
    llm(input_ids=torch.arange(5)[None])
    assert seen == list(layers)


@pytest.mark.parametrize("name", MODELS)
def test_widths_are_what_a_pair_of_positions_costs(name: str) -> None:
    """All products of a forward, as torch counts them: what grows with the square of the length is attention."""
    llm = build(name)
    counts = []
    for length in (8, 16, 24):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            llm(input_ids=torch.arange(length)[None], use_cache=False)
        counts.append(counter.get_total_flops())
    first, second, third = counts
    assert (third - 2 * second + first) / (2 * 8 * 8) == pytest.approx(4 * attention_widths(llm))


def test_layers_that_are_in_no_list_cost_what_the_model_is_wide() -> None:
    llm = build("llama")
    for index, layer in enumerate(decoder_layers(llm) or ()):
        llm.model.register_module(f"layer{index}", layer)
    del llm.model.layers
    assert decoder_layers(llm) is None
    assert attention_widths(llm) == 4 * 32


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_compiled_layers_say_the_same(name: str) -> None:
    llm = build(name)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        before = llm(input_ids=ids, use_cache=False).logits
        compile_layers(llm, backend="eager")
        assert all(layer._compiled_call_impl for layer in decoder_layers(llm) or ())
        torch.testing.assert_close(llm(input_ids=ids, use_cache=False).logits, before)


def test_what_a_layer_keeps_is_estimated_where_it_cannot_run_by_itself() -> None:
    assert estimated_layer_bytes(build("a width for every kind of layer").config, torch.float32, 1, 64) > 0
