"""The speech LM: a text LLM that also reads speech frames, through an adapter, in the place of text embeddings.

Teacher and student are plain Hugging Face causal LMs, loaded with every weight accounted for, from safetensors only.

Shape letters: B rows, T positions, F speech frames, P spans, S frames of a span, C encoder width, D model width,
V vocabulary.
"""

from __future__ import annotations

import inspect
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from salad_ray.config import AdapterConfig, DistillConfig
from salad_ray.model.adapter import Adapter, ExactBuffers, checkpoint_layers
from salad_ray.model.loading import ModelError as ModelError  # also had from here, as part of loading a speech LM
from salad_ray.model.loading import (
    load_pretrained,
    load_tokenizer,
    quiet,
    reason,
    require_readable,
    require_whole,
)
from salad_ray.model.loading import weights_fingerprint as weights_fingerprint
from salad_ray.sequences.batch import Batch

FORMAT = "salad_ray.speech_lm/1"
# Settings with which known architectures bend their logits away from hidden · headᵀ.
_LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "logit_softcap")


@dataclass(frozen=True)
class EncoderSpec:
    """The speech encoder whose frames the adapter was made for."""

    name: str
    path: str | None
    revision: str | None
    sampling_rate: int
    frame_rate: float
    dim: int


@dataclass(frozen=True)
class SpeechLMConfig:
    """What a speech LM is made of."""

    teacher: str
    teacher_revision: str | None
    encoder: EncoderSpec
    adapter: AdapterConfig

    @property
    def frame_rate(self) -> float:
        """Positions that a second of speech takes: the encoder's rate, divided by the frames side by side."""
        return self.encoder.frame_rate / self.adapter.stride


class SpeechLM(ExactBuffers):
    """A causal LM and the adapter that turns speech frames into its input embeddings."""

    def __init__(
        self, config: SpeechLMConfig, llm: PreTrainedModel, adapter: Adapter, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.llm, self.adapter = llm, adapter

    @property
    def head(self) -> Tensor:
        """(V, D) weight of the output layer."""
        return lm_head(self.llm)

    def forward(self, batch: Batch) -> Tensor:
        """Last hidden states (B, T, D), after the final norm: what the head takes. Packed segments stay apart."""
        embeddings = self.llm.get_input_embeddings()(batch.token_ids)
        speech = self.adapter(batch.frames.to(self.adapter.input.weight.dtype), batch.frame_mask)
        mixed = embeddings.flatten(0, 1).index_copy(0, batch.speech_index, speech.to(embeddings.dtype))
        return hidden_states(self.llm, mixed.view_as(embeddings), batch.position_ids)

    def text_hidden(self, token_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Last hidden states (B, T, D) of text alone."""
        return hidden_states(self.llm, token_ids, position_ids)

    def gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute activations in the backward: less memory, about a third more time.

        Raises:
            ModelError: the LLM has no layers that can be recomputed.
        """
        if not checkpoint_layers(self.llm, enabled):
            raise ModelError(
                f"{self.config.teacher}: the layers of {type(self.llm).__name__} cannot be recomputed in the backward; "
                "set distill.activation_checkpointing=false"
            )
        checkpoint_layers(self.adapter, enabled)

    @classmethod
    def from_teacher(
        cls,
        path: str,
        revision: str | None,
        adapter: AdapterConfig,
        encoder: EncoderSpec,
        seed: int,
        dtype: torch.dtype | str = torch.float32,
        attention: str = "sdpa",
    ) -> SpeechLM:
        """A student before its first step, in train mode: the teacher's weights and a fresh adapter.

        Raises:
            ModelError: as `load_text_lm` and `load_tokenizer`.
        """
        llm = load_text_lm(path, revision, dtype, attention)
        tokenizer = load_tokenizer(path, revision)
        _require_embeddings(path, llm, tokenizer)
        weight = llm.get_input_embeddings().weight
        module = Adapter(adapter, encoder.dim, weight.shape[1], _embedding_rms(llm), seed)
        config = SpeechLMConfig(path, revision, encoder, adapter)
        return cls(config, llm, module.to(weight.dtype), tokenizer).train()

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype | str | None = None, attention: str = "sdpa"
    ) -> SpeechLM:
        """Load what `save_pretrained` wrote, in eval mode; `dtype` none keeps that of the files.

        Raises:
            ModelError: the folder is not one of a speech LM, or its weights are missing, too many or of other shapes.
        """
        folder = Path(folder)
        config = _read_config(folder)
        llm = load_text_lm(str(folder / "llm"), None, dtype or "auto", attention)
        tokenizer = load_tokenizer(str(folder / "llm"), None)
        _require_embeddings(str(folder), llm, tokenizer)
        adapter = Adapter(config.adapter, config.encoder.dim, llm.get_input_embeddings().weight.shape[1])
        _load_adapter(adapter, folder / "adapter.safetensors")
        return cls(config, llm, adapter if dtype is None else adapter.to(llm.dtype), tokenizer).eval()

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write `config.json`, `adapter.safetensors` and `llm/`, a plain Hugging Face folder with the tokenizer.

        The folder appears whole or not at all, and replaces a speech LM that was there.

        Args:
            state_dict: all weights under the names of `self.state_dict()`, where the modules hold only a part (ZeRO-3).

        Raises:
            ModelError: something else is at `folder`.
        """
        folder = Path(folder)
        _require_replaceable(folder)
        weights = dict(self.state_dict() if state_dict is None else state_dict)
        content = {"format": FORMAT} | asdict(self.config) | {"adapter": self.config.adapter.model_dump()}
        with _replacing(folder) as new, quiet():
            self.llm.save_pretrained(new / "llm", state_dict=_part(weights, "llm."))
            self.tokenizer.save_pretrained(new / "llm")
            save_file(_part(weights, "adapter."), new / "adapter.safetensors")
            (new / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def hidden_states(llm: PreTrainedModel, inputs: Tensor, position_ids: Tensor) -> Tensor:
    """Last hidden states (B, T, D) of a causal LM over packed rows; `lm_head(llm)` turns them into logits.

    A segment begins wherever position_ids do not count on, and sees nothing of the segments before it. Transformers
    does so only without attention mask and without cache, and its flash attention only for a single row; that and
    "varlen" are told the bounds of the segments instead.

    Args:
        inputs: token ids (B, T) or embeddings (B, T, D).
        position_ids: (B, T), restarting from 0 at every segment.
    """
    embeddings = inputs if inputs.is_floating_point() else llm.get_input_embeddings()(inputs)
    bounds = _segment_bounds(position_ids) if _takes_bounds(llm.config._attn_implementation) else {}
    outputs = llm.get_decoder()(
        inputs_embeds=embeddings, attention_mask=None, position_ids=position_ids, use_cache=False, **bounds
    )
    return outputs.last_hidden_state


def lm_head(llm: PreTrainedModel) -> Tensor:
    """(V, D) weight of a causal LM's output layer."""
    return llm.get_output_embeddings().weight


def _takes_bounds(attention: str) -> bool:
    return attention.startswith("flash_attention") or attention == "varlen"


def _segment_bounds(position_ids: Tensor) -> dict[str, Any]:
    """Cumulative lengths of the segments of all rows, laid end to end, and the longest segment."""
    starts = F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)
    bounds = F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=starts.numel()).int()
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def varlen_attn(*states: Any, **settings: Any) -> Any:
    """The kernel inside torch, imported when it is called: with it comes the compiler, which takes seconds."""
    from torch.nn.attention.varlen import varlen_attn as kernel

    return kernel(*states, **settings)


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
    """Block-diagonal causal attention by the flash kernel inside torch: no T × T mask, no other package; CUDA, 16 bit.

    query (B, heads, T, head_dim), key and value (B, kv_heads, T, head_dim) → (B, T, heads, head_dim).
    """
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


def load_text_lm(
    path: str, revision: str | None, dtype: torch.dtype | str = torch.float32, attention: str = "sdpa"
) -> PreTrainedModel:
    """A text LLM in eval mode, every weight accounted for; safetensors only, no remote code.

    Args:
        path: folder or hub id.
        dtype: a torch dtype or its name; "auto" keeps that of the files.
        attention: "sdpa", "eager", "flash_attention_2", or "varlen" (CUDA, 16 bit: no mask, no other package).

    Raises:
        ModelError: it cannot be read or had; weights are missing, too many or of other shapes; its logits are not
            hidden · headᵀ; or it cannot keep packed segments apart.
    """
    require_readable(path, "Qwen/Qwen2.5-3B")
    settings = {"dtype": dtype, "attn_implementation": attention}
    llm, info = load_pretrained(AutoModelForCausalLM, path, revision, "a text LLM", **settings)
    require_whole(path, info)
    _require_packable(path, llm)
    _require_plain_logits(path, llm)
    return llm.eval()


def parameter_groups(model: SpeechLM, settings: DistillConfig) -> list[dict[str, Any]]:
    """Optimizer groups of LLM and adapter: with and without weight decay, and under Muon the matrices of the layers.

    Norms and biases do not decay, nor do embeddings and head: decay would wear away the tokens that speech never shows.

    Returns:
        Groups with `rate`, the setting that `lr` was taken from; those of Muon, and only those, have `momentum`.

    Raises:
        ModelError: Muon is set, and the LLM keeps its layers elsewhere.
    """
    tables = {id(model.llm.get_input_embeddings().weight), id(model.head)}
    matrices = _layer_matrices(model) if settings.optimizer == "muon" else set()
    groups: list[dict[str, Any]] = []
    for module, prefix in ((model.llm, ""), (model.adapter, "adapter_")):
        rate, muon_rate = f"{prefix}learning_rate", f"{prefix}muon_learning_rate"
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for_muon = [parameter for parameter in trained if id(parameter) in matrices]
        others = [parameter for parameter in trained if id(parameter) not in matrices]
        fixed = [parameter for parameter in others if parameter.ndim < 2 or id(parameter) in tables]
        decayed = [parameter for parameter in others if parameter.ndim >= 2 and id(parameter) not in tables]
        groups += [
            {"rate": rate, "params": decayed, "weight_decay": settings.weight_decay},
            {"rate": rate, "params": fixed, "weight_decay": 0.0},
            {"rate": muon_rate, "params": for_muon, "weight_decay": settings.muon_weight_decay}
            | {"momentum": settings.muon_momentum},
        ]
    return [group | {"lr": getattr(settings, group["rate"])} for group in groups if group["params"]]


def _layer_matrices(model: SpeechLM) -> set[int]:
    """Ids of the two-dimensional weights inside the decoder layers of LLM and adapter."""
    layers = getattr(model.llm.get_decoder(), "layers", None)
    if layers is None:
        raise ModelError(f"the layers of {type(model.llm).__name__} are not known to Muon; set distill.optimizer=adamw")
    inside = (parameter for each in (layers, model.adapter.layers) for parameter in each.parameters())
    return {id(parameter) for parameter in inside if parameter.ndim == 2}


def _embedding_rms(llm: PreTrainedModel) -> float:
    """Root mean square of the LLM's input embeddings, over 4,096 ids spread over the vocabulary."""
    embed = llm.get_input_embeddings()
    num_ids = embed.weight.shape[0]
    ids = torch.linspace(0, num_ids - 1, min(num_ids, 4096), device=embed.weight.device).long()
    with torch.no_grad():  # through the module, since some scale what they look up
        return embed(ids).float().square().mean().sqrt().item()


def _require_packable(path: str, llm: PreTrainedModel) -> None:
    """Refuse decoders known to mix the segments of a packed row."""
    decoder = llm.get_decoder()
    kinds = set(getattr(decoder.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or llm._is_stateful or "position_ids" not in inspect.signature(decoder.forward).parameters:
        what = f"layers of type {', '.join(sorted(kinds))}" if kinds else f"a decoder of type {type(decoder).__name__}"
        raise ModelError(f"{path}: has {what}, which cannot keep packed samples apart; use a plain attention model")


def _require_plain_logits(path: str, llm: PreTrainedModel) -> None:
    """Refuse logits that are not hidden · headᵀ, by asking the model's own forward what it makes of hidden states."""
    layer = llm.get_output_embeddings()
    if getattr(layer, "bias", None) is not None:
        raise ModelError(f"{path}: its lm_head has a bias, and the distillation loss takes logits as hidden · headᵀ")
    weight = lm_head(llm).detach()
    hidden = torch.randn(1, 2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    hidden *= 50 / (hidden @ weight.T).std()  # large enough to meet a cap
    decoder = llm.get_decoder()
    decoder.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=hidden)
    try:
        with torch.no_grad():
            logits = llm(input_ids=torch.zeros(1, 2, dtype=torch.long, device=weight.device), use_cache=False).logits
    finally:
        del decoder.forward
    plain = hidden @ weight.T
    if (logits - plain).abs().max() > 0.02 * plain.abs().max():
        config = llm.config.get_text_config()
        settings = [f"{name}={getattr(config, name)}" for name in _LOGIT_SETTINGS if getattr(config, name, None)]
        raise ModelError(
            f"{path}: its logits are not hidden · headᵀ ({', '.join(settings) or type(llm).__name__}), which the "
            "distillation loss needs"
        )


def _require_embeddings(path: str, llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = llm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(f"{path}: its tokenizer has {len(tokenizer)} tokens, but the LLM only {rows} embeddings")


def _read_config(folder: Path) -> SpeechLMConfig:
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; give one that SpeechLM.save_pretrained wrote")
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        parts = {"encoder": EncoderSpec(**content["encoder"]), "adapter": AdapterConfig(**content["adapter"])}
        return SpeechLMConfig(**(content | parts))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / 'config.json'}: is not the config of a speech LM ({reason(error)})") from None


def _load_adapter(adapter: Adapter, path: Path) -> None:
    """Fill the adapter, taking over the dtype of the file."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read ({reason(error)}); copy the model's folder again") from None
    own = adapter.state_dict()
    mismatched = [(name, weights[name].shape, own[name].shape) for name in own.keys() & weights.keys()]
    mismatched = [entry for entry in mismatched if entry[1] != entry[2]]
    missing, unexpected = own.keys() - weights.keys(), weights.keys() - own.keys()
    require_whole(str(path), {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": mismatched})
    adapter.load_state_dict(weights, assign=True)


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    chosen = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor.detach().contiguous() for name, tensor in chosen.items()}


def _require_replaceable(folder: Path) -> None:
    if folder.is_dir():
        if not any(folder.iterdir()):
            return
        try:
            _read_config(folder)
        except ModelError:
            raise ModelError(f"{folder}: holds something other than a speech LM; give another folder") from None
    elif folder.exists():
        raise ModelError(f"{folder}: is a file; give the name of a folder")


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A temporary sibling that takes the folder's place once it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.{kind}") for kind in ("new", "old"))
    new.mkdir()
    try:
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
