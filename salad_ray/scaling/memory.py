"""How much memory a training worker needs, before there is one: weights, optimizer, activations, loss.

What the backward needs is counted, not guessed: one layer of the true shape runs on torch's `meta` device, which
computes nothing, and every tensor that autograd keeps is added up. Attention is taken to be fused, as on a GPU: it
keeps its inputs, its output and one number a head and position. The rest follows what DeepSpeed allocates.

N parameters, W workers, B rows of a micro-batch, T positions of a row, D model width, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from salad_ray.config import AdapterConfig, ConfigError, DistillConfig, PackConfig
from salad_ray.distill.losses import CHUNKS, MAX_CHUNK_SIZE
from salad_ray.distill.step import BUCKET, DTYPES, num_active_parameters, num_chosen_experts
from salad_ray.model.adapter import Adapter, llama_config
from salad_ray.model.layers import decoder_layers
from salad_ray.model.loading import UNUSABLE

GATHERED = 50_000_000
"""Elements that ZeRO-3 prefetches (its default `stage3_prefetch_bucket_size`)."""
BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Shape:
    """What is trained: the LLM's config, the adapter, the encoder's width."""

    llm: PreTrainedConfig
    adapter: AdapterConfig
    encoder_dim: int

    @cached_property
    def num_llm(self) -> int:
        return num_parameters(self.llm)

    @cached_property
    def num_active(self) -> int:
        with torch.device("meta"):
            return num_active_parameters(AutoModelForCausalLM.from_config(self.llm))

    @cached_property
    def num_adapter(self) -> int:
        return sum(parameter.numel() for parameter in self._own.parameters())

    @cached_property
    def num_matrices(self) -> int:
        """Elements of the matrices of the adapter and inside the layers of the LLM, which Muon may update."""
        with torch.device("meta"):
            llm = AutoModelForCausalLM.from_config(self.llm)
        layers = decoder_layers(llm)
        if layers is None:
            raise ConfigError(f"the layers of {type(llm).__name__} are not known to Muon; set distill.optimizer=adamw")
        parameters = (*layers.parameters(), *self._own.parameters())
        return sum(parameter.numel() for parameter in parameters if parameter.ndim == 2)

    @cached_property
    def _own(self) -> Adapter:
        with torch.device("meta"):
            return Adapter(self.adapter, self.encoder_dim, self.llm.hidden_size)


def num_parameters(llm: PreTrainedConfig) -> int:
    """Of a causal LM of this config, tied weights once; nothing is allocated."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(llm).num_parameters()


def training_memory(
    shape: Shape,
    settings: DistillConfig,
    pack: PackConfig,
    num_workers: int,
    speech_share: float = 0.65,
    word_end_share: float = 0.15,
) -> dict[str, float]:
    """Peak bytes of one training worker, by what holds them; `peak` is their sum at the worst moment.

    Args:
        num_workers: over which ZeRO divides.
        speech_share: of the positions that are speech.
        word_end_share: of the positions that end a spoken word; they count with `distill.word_ends`.
    """
    width, num = BYTES[settings.precision], shape.num_llm + shape.num_adapter
    rows, context, stage = settings.micro_batch_rows, pack.context, settings.zero_stage
    with_one_moment = shape.num_matrices if settings.optimizer == "muon" else 0
    static = {
        "teacher": float(width * shape.num_llm),
        "student": width * num / (num_workers if stage == 3 else 1),
        "optimizer": (12.0 * num - 4.0 * with_one_moment) / num_workers,  # fp32 weights, two moments of most
    }
    if stage == 3:
        head = shape.llm.vocab_size * shape.llm.hidden_size
        layer = (shape.num_llm - head) / shape.llm.num_hidden_layers
        static["gathered parameters"] = width * (head + min(max(GATHERED, 2 * layer), shape.num_llm))
    bucket = float(width * min(BUCKET, num))
    gradients = width * num / (1 if stage == 1 else num_workers)
    # They are flattened, and in half precision copied to fp32, while their parts and the bucket are still there.
    flat = (width + (4 if width < 4 else 0)) * num / num_workers
    kept = activation_bytes(shape, settings, rows, context, speech_share)
    logits, head_gradient = loss_bytes(shape.llm, settings, rows * context * (1 - speech_share))
    if settings.word_ends:  # a loss of their own, after the other's logits are gone
        more, gradient = loss_bytes(shape.llm, settings, rows * context * word_end_share)
        logits, head_gradient = max(logits, more), head_gradient + gradient
    accumulated = gradients if pack.num_lanes * pack.rows_per_lane > num_workers * rows else 0.0
    moments = {
        "forward": accumulated + kept + logits + head_gradient,
        "backward": accumulated + kept + head_gradient + bucket,
        "step": gradients + bucket + flat,
    }
    parts = static | {"gradients": gradients, "bucket": bucket, "activations": kept, "loss": logits + head_gradient}
    return parts | {"peak": sum(static.values()) + max(moments.values())}


def loss_bytes(llm: PreTrainedConfig, settings: DistillConfig, num_labels: float) -> tuple[float, float]:
    """Logits of a chunk, of student and teacher, with what their softmaxes need; and what lasts until the backward: the
    gradients of the head and of the hidden states, and those states themselves."""
    width, vocab = BYTES[settings.precision], llm.vocab_size
    chunk = settings.loss_chunk_size or min(-(-num_labels // CHUNKS), MAX_CHUNK_SIZE)
    logits = (3 * 4 if settings.use_gpu else 2 * width) * chunk * vocab  # on a CPU the softmaxes are cut into blocks
    return logits, width * vocab * llm.hidden_size + 3 * width * num_labels * llm.hidden_size


def activation_bytes(shape: Shape, settings: DistillConfig, rows: int, context: int, speech_share: float) -> float:
    """What autograd keeps between forward and backward: LLM and adapter."""
    dtype = DTYPES[settings.precision]
    width, llm = BYTES[settings.precision], shape.llm
    layer = layer_bytes(llm, dtype, rows, context)
    own = layer_bytes(llama_config(shape.adapter), dtype, rows, max(1, round(context * speech_share)))
    inner, inputs = 0.0, rows * context * width
    if settings.activation_checkpointing:  # a layer keeps its input, and one at a time is made anew
        inner = max(layer, own)
        layer = inputs * llm.hidden_size
        own = inputs * speech_share * shape.adapter.hidden_size
    frames = inputs * speech_share * (shape.adapter.stride * shape.encoder_dim + shape.adapter.hidden_size)
    ends = rows * context * (3 * width + 4) * llm.hidden_size  # embeddings, mixed, final norm in fp32
    return llm.num_hidden_layers * layer + shape.adapter.num_layers * own + inner + frames + ends


def layer_bytes(llm: PreTrainedConfig, dtype: torch.dtype, rows: int, context: int) -> float:
    """Bytes that the backward of one decoder layer keeps, its parameters not counted."""
    key = (llm.to_json_string(), dtype, rows, context)
    if key not in _COUNTED:  # a plan asks for the same layer under every ZeRO stage
        try:
            _COUNTED[key] = _count(copy.deepcopy(llm), dtype, rows, context)
        except (*UNUSABLE, AttributeError, IndexError):
            _COUNTED[key] = estimated_layer_bytes(llm, dtype, rows, context)
            _ESTIMATED.add(key[0])
    return _COUNTED[key]


def is_estimated(llm: PreTrainedConfig) -> bool:
    """Whether `layer_bytes` could only estimate, since no layer of this LLM can run by itself without weights."""
    return llm.to_json_string() in _ESTIMATED


_COUNTED: dict[tuple[str, torch.dtype, int, int], float] = {}
_ESTIMATED: set[str] = set()


def estimated_layer_bytes(llm: PreTrainedConfig, dtype: torch.dtype, rows: int, context: int) -> float:
    """As `layer_bytes`, on average over the layers, by the inputs and outputs of their matrices: within a quarter."""
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(llm).get_decoder()
    tables = {id(module.weight) for module in decoder.modules() if isinstance(module, nn.Embedding)}
    weights = [weight for weight in decoder.parameters() if id(weight) not in tables]
    ends = sum(sum(weight.shape[-2:]) * num_chosen_experts(llm, weight) for weight in weights if weight.ndim > 1)
    return float(dtype.itemsize * rows * context * ends / llm.num_hidden_layers)


def _count(config: PreTrainedConfig, dtype: torch.dtype, rows: int, context: int) -> float:
    config._attn_implementation = "salad_plan"
    with torch.device("meta"):
        layer, rotary = _layer(config, dtype)
        hidden = torch.empty(rows, context, config.hidden_size, dtype=dtype, requires_grad=True)
        angles = rotary(hidden, torch.arange(context)[None])
    own = {parameter.untyped_storage()._cdata for parameter in layer.parameters()}
    own |= {angle.untyped_storage()._cdata for angle in angles}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other storage gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(hidden, attention_mask=None, position_embeddings=angles)
    return float(sum(storage.nbytes() for place, storage in kept.items() if place not in own))


def _layer(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    if isinstance(config, LlamaConfig):
        return LlamaDecoderLayer(config, 0).to(dtype), LlamaRotaryEmbedding(config)
    decoder = AutoModelForCausalLM.from_config(config, dtype=dtype).get_decoder()
    return decoder.layers[0], decoder.rotary_emb


class _Fused(torch.autograd.Function):
    """Attention that keeps what a fused kernel keeps, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("only counted")


def _fused(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _Fused.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register("salad_plan", _fused)
