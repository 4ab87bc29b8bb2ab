"""The adapter between speech encoder and LLM: a small Llama-style causal decoder over the frames of one speech span.

With a stride n the frames come n side by side, and what is a frame below is such a group.

Shape letters: P spans, S frames of the longest span, N real frames, C encoder width, n stride, A adapter width,
D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from salad_ray.config import AdapterConfig
from salad_ray.model.packed import told


class ExactBuffers(nn.Module):
    """A module whose buffers move with it but are never cast.

    `module.bfloat16()`, which older versions of DeepSpeed call, would round the rotary frequencies too: at position
    2,000 that turns queries and keys by more than a radian, and the student is no longer its teacher.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExactBuffers:
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            owner, _, leaf = name.rpartition(".")
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype:
                setattr(self.get_submodule(owner), leaf, buffer.to(moved.device))
        return self


def checkpoint_layers(module: nn.Module, enabled: bool = True) -> int:
    """Recompute the activations of every decoder layer in the backward instead of keeping them, or keep them again.

    What `activation_checkpointing_enable` of transformers 5.23 does, and `gradient_checkpointing_enable` of older ones.

    Returns:
        The number of layers.
    """
    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer in layers:
        layer.gradient_checkpointing = enabled
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    return len(layers)


def llama_config(config: AdapterConfig, attention: str = "sdpa") -> LlamaConfig:
    """The config of the adapter's decoder layers; spans that are not packed need no kernel but sdpa."""
    return LlamaConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads or config.num_heads,
        attn_implementation=attention if attention == "varlen" else "sdpa",
    )


class Adapter(ExactBuffers):
    """Linear n·C→A, causal decoder layers, norm, Linear A→D; 122 M parameters at the default shape.

    Args:
        config: width A, layers, heads, feed-forward width and stride.
        encoder_dim: C.
        model_dim: D.
        output_rms: root mean square of the outputs at the start, that of the LLM's embeddings.
        seed: of the initial weights; the global random state is neither read nor changed.
        attention: that of the LLM. With "varlen" (packed.py) nothing is computed for what pads the spans.
    """

    def __init__(
        self,
        config: AdapterConfig,
        encoder_dim: int,
        model_dim: int,
        output_rms: float = 1.0,
        seed: int = 0,
        attention: str = "sdpa",
    ) -> None:
        super().__init__()
        llama = llama_config(config, attention)
        self.packs = llama._attn_implementation == "varlen"
        with torch.random.fork_rng(devices=[]):  # torch's own initialisation draws from the global state
            self.input = nn.Linear(config.stride * encoder_dim, config.hidden_size)
            self.layers = nn.ModuleList(LlamaDecoderLayer(llama, index) for index in range(config.num_layers))
            self.norm = LlamaRMSNorm(config.hidden_size, eps=llama.rms_norm_eps)
            self.output = nn.Linear(config.hidden_size, model_dim)
        self.rotary = LlamaRotaryEmbedding(llama)
        self._initialise(output_rms, torch.Generator().manual_seed(seed))

    def forward(self, frames: Tensor, frame_mask: Tensor) -> Tensor:
        """Speech spans as the LLM's input embeddings.

        Args:
            frames: (P, S, n·C), spans padded on the right; of the adapter's dtype.
            frame_mask: (P, S) bool, true at real frames.

        Returns:
            (N, D): the real frames, span after span.
        """
        if frames.numel() == 0:  # text only: ZeRO-3 still needs every worker to use every parameter
            frame = frames.new_zeros(1, 1, self.input.in_features)
            return self.forward(frame, frame_mask.new_ones(1, 1))[:0]
        positions = torch.arange(frames.shape[1], device=frames.device)[None]
        bounds: dict[str, Any] = {}
        if self.packs:
            bounds = told(F.pad(frame_mask.sum(dim=1).cumsum(dim=0), (1, 0)))
            frames, positions = frames[frame_mask][None], positions.expand_as(frame_mask)[frame_mask][None]
        hidden = self.input(frames)
        rotary = self.rotary(hidden, positions)
        for layer in self.layers:
            # No mask: sdpa is then purely causal, so what pads a span on the right cannot reach its frames.
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, **bounds)
        hidden = self.norm(hidden)
        return self.output(hidden[0] if self.packs else hidden[frame_mask])

    def _initialise(self, output_rms: float, generator: torch.Generator) -> None:
        """Normal weights that keep the scale: 1 / √fan-in, less on the residual branches, zero biases.

        The final norm gives a root mean square of 1, so the output's weights alone set the scale of the outputs.
        """
        branch = (2 * len(self.layers)) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                scale = output_rms if module is self.output else branch if _ends_branch(name) else 1.0
                nn.init.normal_(module.weight, std=scale * module.in_features**-0.5, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _ends_branch(name: str) -> bool:
    return name.endswith(("o_proj", "down_proj"))
