"""Keys of a model folder that transformers 4 and tools built on its files (vLLM, llama.cpp's converter) look for.

Transformers 5 writes all of RoPE as `rope_parameters`, the dtype as `dtype`, and a tokenizer class of its own. Versions
before it ignore what they do not know and take their defaults, in silence: another θ, no scaling. Here their keys are
written beside the new ones, where transformers 5 goes on reading the same. (Of some classes it takes the older keys
first, or for layers that they do not mean; no version before it knows these.)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from salad_ray.model.loading import UNUSABLE

_NOT_SCALING = ("rope_theta", "partial_rotary_factor")
_LONGROPE = ("short_factor", "long_factor")
_ORIGINAL = "original_max_position_embeddings"
_OF_LAYERS = ("full_attention", "sliding_attention")


def write_older_keys(folder: Path) -> None:
    """Add the keys to `config.json` and `tokenizer_config.json` of a Hugging Face folder, where they are not there."""
    path, before = folder / "config.json", _rope(folder)
    own = json.loads(path.read_text(encoding="utf-8"))
    dtype = {"torch_dtype": own["dtype"]} if own.get("dtype") else {}
    _write(path, dtype | _older_rope(own) | own)
    try:
        same = _rope(folder).items() >= before.items()
    except UNUSABLE:  # read with them, it is no valid config
        same = False
    if not same:
        _write(path, dtype | own)
    path = folder / "tokenizer_config.json"
    if path.exists():
        _write(path, _with_known_class(json.loads(path.read_text(encoding="utf-8"))))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _rope(folder: Path) -> dict[str, str]:
    """What this version of transformers reads of RoPE, in words that can be compared."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    original, most = (rope.get(_ORIGINAL), getattr(config, "max_position_embeddings", None))
    if rope.get("rope_type") == "longrope" and original and most:  # the default
        rope.setdefault("factor", most / original)
    return {name: repr(value) for name, value in rope.items()}


def _older_rope(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    whole = rope.get("full_attention") or rope
    older = {name: whole[name] for name in _NOT_SCALING if whole.get(name) is not None}
    if config.get("model_type") == "gpt_neox":
        names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
        older |= {old: whole[new] for new, old in names.items() if new in whole}
    if "rope_theta" in (rope.get("sliding_attention") or {}):
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if whole.get("rope_type", "default") != "default":
        scaling = {name: value for name, value in whole.items() if name not in (*_NOT_SCALING, *_OF_LAYERS)}
        if config.get("model_type") == "phi3":  # takes these alone
            scaling = {"type": scaling["rope_type"]} | {name: scaling[name] for name in _LONGROPE if name in scaling}
        older["rope_scaling"] = scaling
    return older


def _with_known_class(config: dict[str, Any]) -> dict[str, Any]:
    """`PreTrainedTokenizerFast` reads tokenizer.json as it is, in all versions."""
    return config | {"tokenizer_class": "PreTrainedTokenizerFast"}
