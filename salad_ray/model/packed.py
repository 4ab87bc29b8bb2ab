"""Hidden states of packed rows: several samples in one row, none of which sees another.

Shape letters: B rows, T positions, D model width.
"""

from __future__ import annotations

import inspect
import re
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from salad_ray.model.loading import ModelError

_WINDOW = re.compile(r"(?!_|n_|num_|conv_)\w*window(_size|_len|_length)?")


def hidden_states(llm: PreTrainedModel, inputs: Tensor, position_ids: Tensor) -> Tensor:
    """Last hidden states (B, T, D) of a causal LM over packed rows; `lm_head(llm)` turns them into logits.

    A segment begins wherever position_ids do not count on, and sees nothing of the segments before it. Transformers
    does so only without attention mask and without cache, and its flash attention only for a single row; that and
    "varlen" are told the bounds of the segments instead. Some decoders, such as OPT's, never look at the positions:
    those get a mask, where the trial has found that they need it (`needs_mask`).

    Args:
        inputs: token ids (B, T) or embeddings (B, T, D).
        position_ids: (B, T), restarting from 0 at every segment.
    """
    embeddings = inputs if inputs.is_floating_point() else llm.get_input_embeddings()(inputs)
    bounds = segment_bounds(llm, position_ids)
    mask = _segment_mask(position_ids, embeddings.dtype) if needs_mask(llm) and not bounds else None
    outputs = llm.get_decoder()(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=position_ids, use_cache=False, **bounds
    )
    return outputs.last_hidden_state


def needs_mask(llm: PreTrainedModel) -> bool:
    """Whether packed rows of this LM stay apart only by an explicit mask; `give_mask` says so."""
    return getattr(llm, "_needs_segment_mask", False)


def give_mask(llm: PreTrainedModel, needed: bool = True) -> None:
    """Pass this LM an explicit mask for packed rows from now on, or no longer."""
    llm._needs_segment_mask = needed


def is_window(name: str, value: object) -> bool:
    """Whether a setting of a config is how far attention reaches back, by its name; `sliding_window_pattern` is not."""
    named = _WINDOW.fullmatch(name) or name in ("attention_chunk_size", "local_attention")
    return bool(named) and type(value) is int and value > 0


def window(config: PretrainedConfig) -> int | None:
    """Positions that attention reaches back in some layer; none where all layers reach the beginning."""
    if set(getattr(config, "layer_types", None) or ["unknown"]) == {"full_attention"}:
        return None
    return min((value for name, value in vars(config).items() if is_window(name, value)), default=None)


def _segment_mask(position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T) to add to the attention's scores: earlier positions of one's own segment."""
    segment = _starts(position_ids).cumsum(dim=1)
    seen = (segment[:, :, None] == segment[:, None, :]).tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def _starts(position_ids: Tensor) -> Tensor:
    """(B, T) true where a segment begins."""
    return F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)


def segment_bounds(llm: PreTrainedModel, position_ids: Tensor) -> dict[str, Any]:
    """What flash kernels are told: cumulative lengths of the segments of all rows, laid end to end, and the longest."""
    attention = llm.config._attn_implementation
    if not attention.startswith("flash_attention") and attention != "varlen":
        return {}
    starts = _starts(position_ids)
    return told(F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=starts.numel()))


def told(bounds: Tensor) -> dict[str, Any]:
    """What flash kernels take, of the cumulative lengths of the segments, from 0 on: (segments + 1,)."""
    bounds, longest = bounds.int(), int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def varlen_attn(query: Tensor, *states: Any, **settings: Any) -> Any:
    """The kernel inside torch, imported when it is called: with it comes the compiler, which takes seconds.

    It is for GPUs and 16 bit; elsewhere the same is computed segment by segment.
    """
    if query.is_cpu or query.dtype == torch.float32:
        return segment_by_segment(query, *states, **settings)
    from torch.nn.attention.varlen import varlen_attn as kernel

    return kernel(query, *states, **settings)


@torch.compiler.disable  # its loop would be compiled anew for every batch; the kernel is one operator
def segment_by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    _bounds_of_keys: Tensor,
    _longest: int,
    _longest_of_keys: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, 0),
    enable_gqa: bool = False,
) -> Tensor:
    """What the kernel computes, by sdpa for each segment; nothing is computed between segments, as sdpa alone does.

    query (positions, heads, head_dim), key and value (positions, kv_heads, head_dim), bounds (segments + 1,) →
    (positions, heads, head_dim).
    """
    back, outputs = window_size[0], []
    for start, end in pairwise(bounds.tolist()):
        q, k, v = (states[None, start:end].transpose(1, 2) for states in (query, key, value))
        mask = None
        if 0 <= back < end - start - 1:
            mask = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).tril().triu(-back)
        output = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=enable_gqa
        )
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


@lru_cache
def _knows_gqa() -> bool:
    """Whether the kernel repeats keys and values by itself; in torch 2.11 it does not."""
    from torch.nn.attention.varlen import varlen_attn as kernel

    return "enable_gqa" in inspect.signature(kernel).parameters


def _varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Block-diagonal causal attention: no T × T mask, no other package. On GPUs in 16 bit torch's own flash kernel.

    query (B, heads, T, head_dim), key and value (B, kv_heads, T, head_dim) → (B, T, heads, head_dim).

    Raises:
        ModelError: scores are to be capped, or to have sinks, of which the kernel knows nothing.
    """
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        kind = type(module).__name__
        raise ModelError(
            f"the scores of {kind} have a cap or sinks, which varlen does not know; set model.attention=sdpa"
        )
    settings: dict[str, Any] = {"enable_gqa": True}
    if not _knows_gqa():
        settings, groups = {}, query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    query_flat, key_flat, value_flat = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    output: Any = varlen_attn(
        query_flat,
        key_flat,
        value_flat,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **settings,
    )
    return output.unflatten(0, (query.shape[0], query.shape[2])), None


AttentionInterface.register("varlen", _varlen_attention)
