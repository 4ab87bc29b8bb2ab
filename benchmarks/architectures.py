"""Which architectures of text LLMs can be taught to listen: each is built small and tried out, as every teacher is.

    python -m benchmarks.architectures [name …] [--out docs/architectures.md]

The models are random, a few layers wide enough for every part of the architecture; nothing is downloaded. What is tried
is `salad_ray.model.trial.try_out`, the very function that accepts or refuses a teacher, so the table says what a run
will say. It takes a few minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel

from salad_ray.model.head import lm_head
from salad_ray.model.layers import decoder_layers
from salad_ray.model.loading import ModelError, quiet
from salad_ray.model.multimodal import is_multimodal, text_part
from salad_ray.model.trial import TOLERANCE, try_out, without_dropout

SHAPE: dict[str, Any] = {
    **{"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
GPT = {"vocab_size": 400, "n_embd": 32, "n_layer": 3, "n_head": 4}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MLA = {"num_key_value_heads": 4, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8}
ROUTED = {"moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
SHORT_CONTEXT: dict[str, Any] = {"factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 1024}
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
PER_LAYER: dict[str, Any] = {"head_dim": 16, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 400}
PER_LAYER |= {"hidden_size_per_layer_input": 8, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
MULTIMODAL: dict[str, Any] = {"text_config": SHAPE | {"head_dim": 16}, "vision_config": VISION}


class Architecture(NamedTuple):
    """What is built."""

    models: str
    """Names under which people know it."""
    kind: str
    """Class of transformers, without ForCausalLM; of a multimodal one, without ForConditionalGeneration."""
    settings: dict[str, Any]
    shape: dict[str, Any] = SHAPE
    config: str | None = None
    """Class of the config; none is that of the model."""


ARCHITECTURES = (
    Architecture("Llama 2, 3.x, SmolLM2, Falcon 3, TinyLlama", "Llama", {"tie_word_embeddings": True}),
    Architecture("Llama with dynamic NTK of 1,024", "Llama",
                 {"rope_parameters": {"rope_type": "dynamic"} | SHORT_CONTEXT, "max_position_embeddings": 1024}),
    Architecture("SmolLM3", "SmolLM3", {"no_rope_layers": [1, 1, 1, 0]}),
    Architecture("Qwen2, Qwen2.5, R1-Distill-Qwen", "Qwen2", {"tie_word_embeddings": True}),
    Architecture("Qwen3", "Qwen3", {"head_dim": 16}),
    Architecture("Qwen2-MoE", "Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 16}),
    Architecture("Qwen3-MoE", "Qwen3Moe", EXPERTS | {"head_dim": 16}),
    Architecture("Gemma 1", "Gemma", {"head_dim": 16}),
    Architecture("Gemma 2", "Gemma2", {"head_dim": 16, "sliding_window": 8}),
    Architecture("Gemma 3 (text)", "Gemma3", {"head_dim": 16, "sliding_window": 8}, config="Gemma3TextConfig"),
    Architecture("Gemma 3n (text)", "Gemma3n", PER_LAYER | {"intermediate_size": [48] * 4, "laurel_rank": 4,
                 "activation_sparsity_pattern": [0.0] * 4}, config="Gemma3nTextConfig"),
    Architecture("Gemma 4 with per-layer embeddings", "Gemma4", PER_LAYER | {"global_head_dim": 16},
                 config="Gemma4TextConfig"),
    Architecture("Gemma 4 without", "Gemma4", PER_LAYER | {"global_head_dim": 16, "hidden_size_per_layer_input": 0},
                 config="Gemma4TextConfig"),
    Architecture("Gemma 3 4B and larger", "Gemma3", {}, MULTIMODAL, "Gemma3Config"),
    Architecture("LLaVA", "Llava", {}, MULTIMODAL, "LlavaConfig"),
    Architecture("Mistral Small 3.1", "Mistral3", {}, MULTIMODAL, "Mistral3Config"),
    Architecture("Qwen2-Audio", "Qwen2Audio", {}, {"text_config": SHAPE, "audio_config": {"d_model": 32,
                 "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}}, "Qwen2AudioConfig"),
    Architecture("Qwen2-VL", "Qwen2VL", {}, {"text_config": SHAPE}, "Qwen2VLConfig"),
    Architecture("Phi-1, 1.5, 2", "Phi", {"partial_rotary_factor": 0.5}),
    Architecture("Phi-3, 3.5, Phi-4", "Phi3", {"sliding_window": None}),
    Architecture("Phi with longrope of 1,024", "Phi3", {"num_attention_heads": 2, "num_key_value_heads": 1,
                 "original_max_position_embeddings": 1024,
                 "rope_parameters": {"rope_type": "longrope"} | LONGROPE | SHORT_CONTEXT}),
    Architecture("Phi-3.5-MoE", "Phimoe", EXPERTS | {"lm_head_bias": True}),
    Architecture("Mistral", "Mistral", {"sliding_window": 8}),
    Architecture("Mixtral", "Mixtral", EXPERTS),
    Architecture("OLMo", "Olmo", {"clip_qkv": 8.0}),
    Architecture("OLMo 2", "Olmo2", {}),
    Architecture("OLMo 3", "Olmo3", {"sliding_window": 8}),
    Architecture("OLMoE", "Olmoe", EXPERTS),
    Architecture("Pythia, GPT-NeoX", "GPTNeoX", {}),
    Architecture("GPT-2", "GPT2", {}, GPT),
    Architecture("StarCoder (GPT-BigCode)", "GPTBigCode", {}, GPT),
    Architecture("GPT-Neo", "GPTNeo", {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "num_heads": 4},
                 {"vocab_size": 400, "hidden_size": 32}),
    Architecture("GPT-J", "GPTJ", {"rotary_dim": 4}, GPT),
    Architecture("CodeGen", "CodeGen", {"rotary_dim": 4}, GPT),
    Architecture("OPT", "OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    Architecture("XGLM", "XGLM", {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4},
                 {"vocab_size": 400}),
    Architecture("BioGPT", "BioGpt", {}),
    Architecture("Falcon 7B", "Falcon", {"alibi": False, "multi_query": True}),
    Architecture("Falcon 40B", "Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    Architecture("Falcon RW (ALiBi)", "Falcon", {"alibi": True, "multi_query": False}),
    Architecture("BLOOM", "Bloom", {"n_layer": 3, "n_head": 4}, {"vocab_size": 400, "hidden_size": 32}),
    Architecture("MPT", "Mpt", {"d_model": 32, "n_layers": 3, "n_heads": 4}, {"vocab_size": 400}),
    Architecture("Granite 3", "Granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0}),
    Architecture("Granite 3 MoE", "GraniteMoe", EXPERTS | {"logits_scaling": 6.0}),
    Architecture("Granite 4 hybrid", "GraniteMoeHybrid", EXPERTS | MAMBA | {"layer_types": ["mamba", "attention"] * 2,
                 "shared_intermediate_size": 16}),
    Architecture("Command R", "Cohere", {"logit_scale": 0.0625}),
    Architecture("Command R7B, Aya", "Cohere2", {"logit_scale": 0.25, "sliding_window": 8}),
    Architecture("StableLM 2", "StableLm", {"partial_rotary_factor": 0.25}),
    Architecture("StarCoder 2", "Starcoder2", {"sliding_window": 8}),
    Architecture("Seed-OSS", "SeedOss", {"head_dim": 8}),
    Architecture("Nemotron", "Nemotron", {}),
    Architecture("GLM-4", "Glm4", {"head_dim": 16}),
    Architecture("EXAONE 4", "Exaone4", {"sliding_window": 8, "sliding_window_pattern": 4}),
    Architecture("ERNIE 4.5", "Ernie4_5", {"head_dim": 8}),
    Architecture("HunYuan dense", "HunYuanDenseV1", {"head_dim": 8}),
    Architecture("Apertus", "Apertus", {}),
    Architecture("BitNet", "BitNet", {}),
    Architecture("MiniCPM 3", "MiniCPM3", MLA | {"q_lora_rank": 8, "dim_model_base": 8}),
    Architecture("DeepSeek V2", "DeepseekV2", MLA | ROUTED | {"q_lora_rank": None, "topk_method": "greedy"}),
    Architecture("DeepSeek V3, R1", "DeepseekV3", MLA | ROUTED | {"q_lora_rank": 8, "n_group": 2, "topk_group": 1}),
    Architecture("GPT-OSS", "GptOss", EXPERTS | {"head_dim": 8, "sliding_window": 8}),
    Architecture("Llama 4 (text)", "Llama4", {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2,
                 "attention_chunk_size": 8}, config="Llama4TextConfig"),
    Architecture("nanochat", "NanoChat", {"num_key_value_heads": 4}),
    Architecture("JetMoE", "JetMoe", {"kv_channels": 8, "num_local_experts": 4}),
    Architecture("AFMoE", "Afmoe", EXPERTS | {"head_dim": 8, "num_dense_layers": 1, "sliding_window": 8}),
    Architecture("Qwen3-Next", "Qwen3Next", EXPERTS | {"head_dim": 16, "shared_expert_intermediate_size": 16,
                 "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                 "linear_value_head_dim": 8}),
    Architecture("Mamba", "Mamba", {"state_size": 4}, {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2}),
    Architecture("Jamba", "Jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
                 "expert_layer_period": 2, "use_mamba_kernels": False, "mamba_d_state": 4}),
    Architecture("Falcon H1", "FalconH1", MAMBA | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_n_groups": 1}),
    Architecture("RecurrentGemma", "RecurrentGemma", {"lru_width": 32, "num_hidden_layers": 3, "head_dim": 8}),
    Architecture("LFM2", "Lfm2", {"block_multiple_of": 8, "layer_types": ["conv", "full_attention"] * 2}),
    Architecture("RWKV", "Rwkv", {"attention_hidden_size": 32},
                 {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2}),
)  # fmt: skip


class Row(NamedTuple):
    """A row of the table."""

    models: str
    kind: str
    outcome: str
    needs: str


def build(architecture: Architecture) -> PreTrainedModel:
    """A small random model, as `load_text_lm` would have it: with SDPA where the class has it, and no dropout."""
    ending = "LMHeadModel" if architecture.kind == "GPT2" else "ForCausalLM"
    name = architecture.kind + ("ForConditionalGeneration" if "text_config" in architecture.shape else ending)
    kind: Any = getattr(transformers, name)
    config = getattr(transformers, architecture.config or f"{architecture.kind}Config")(
        **architecture.shape | architecture.settings
    )
    attention = "sdpa" if kind._supports_sdpa else "eager"
    without_dropout(config.get_text_config())
    with quiet(), torch.random.fork_rng(devices=[]):
        return kind._from_config(config, dtype=torch.float32, attn_implementation=attention).eval()


def row_of(architecture: Architecture) -> Row:
    try:
        llm = build(architecture)
    except Exception as error:  # noqa: BLE001 - a config that another version of transformers does not take
        why = f"not built by transformers {transformers.__version__}: {type(error).__name__}"
        return Row(architecture.models, architecture.kind, why, "")
    kind = type(llm).__name__
    try:
        if is_multimodal(llm.config):
            llm, _ = text_part(kind, llm)
        found = try_out(llm)
    except ModelError as error:
        return Row(architecture.models, kind, f"refused: {error}", "")
    works = "works" if type(llm).__name__ == kind else f"works: its text model alone, {type(llm).__name__}"
    return Row(architecture.models, kind, works, "; ".join(_needs(llm, found)))


def _needs(llm: PreTrainedModel, found: dict[str, Any]) -> Iterator[str]:
    head = lm_head(llm)
    parts = {"a bias": head.bias is not None, "a scale": head.scale != 1, "a soft cap": head.cap is not None}
    if any(parts.values()):
        yield "a loss with " + " and ".join(name for name, there in parts.items() if there) + " of the head (built in)"
    if llm.config._attn_implementation == "eager":
        yield "eager attention (chosen by itself)"
    if found["mask"]:
        yield "a mask for every row (made by itself; slower than SDPA without)"
    if decoder_layers(llm) is None:
        yield "distill.optimizer=adamw and distill.compile=false"
    if found["context"] < 2048:
        yield f"pack.context={found['context']} or less"


def as_markdown(rows: list[Row]) -> str:
    lines = [
        "# Text LLMs that can be taught to listen",
        "",
        "Written by `python -m benchmarks.architectures`, which builds a small random model of each",
        f"architecture (transformers {transformers.__version__}) and tries out what a teacher has to be: packed rows",
        "equal single samples, also at position 2,048; logits are those of its head; train mode equals",
        "eval mode; choices that share a prompt are scored as alone. Differences are at most",
        f"{TOLERANCE:g} standard deviations of the logits. Of a multimodal model the text model is tried, which must",
        "say of text what the whole says. Another architecture is tried in the same way when it is",
        "given as `model.teacher`, and refused with the reason.",
        "",
        "| models | class | outcome | needs |",
        "| --- | --- | --- | --- |",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.architectures", description=__doc__)
    parser.add_argument("names", nargs="*", help="classes, such as Llama; all by default")
    parser.add_argument("--out", type=Path, help="a file for the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for architecture in ARCHITECTURES:
        if not options.names or architecture.kind in options.names:
            rows.append(row_of(architecture))
            print(" | ".join(rows[-1]), flush=True)
    if options.out:
        options.out.write_text(as_markdown(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
