"""The speech LM: a text LLM that also reads speech frames, through an adapter, in the place of text embeddings.

Teacher and student are plain Hugging Face causal LMs, loaded with every weight accounted for, from safetensors only.

Shape letters: B rows, T positions, F speech frames, P spans, S frames of a span, C encoder width, D model width,
V vocabulary.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from salad_ray.config import AdapterConfig, DistillConfig
from salad_ray.model.adapter import Adapter, ExactBuffers, checkpoint_layers
from salad_ray.model.head import Head
from salad_ray.model.head import lm_head as lm_head  # also had from here, as are others: all that a speech LM is
from salad_ray.model.layers import decoder_layers
from salad_ray.model.loading import (
    UNUSABLE,
    load_pretrained,
    quiet,
    reason,
    require_finite,
    require_readable,
    require_whole,
)
from salad_ray.model.loading import ModelError as ModelError
from salad_ray.model.loading import load_tokenizer as load_tokenizer
from salad_ray.model.loading import weights_fingerprint as weights_fingerprint
from salad_ray.model.multimodal import is_multimodal, load_text_part
from salad_ray.model.older import write_older_keys
from salad_ray.model.packed import hidden_states as hidden_states
from salad_ray.model.trial import try_out, without_dropout
from salad_ray.sequences.batch import Batch

FORMAT = "salad_ray.speech_lm/1"


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
    context: int | None = None
    """Positions of the rows that it was trained on, for which its LLM was tried out."""

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
    def head(self) -> Head:
        """The output layer."""
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
        context: int | None = None,
    ) -> SpeechLM:
        """A student before its first step, in train mode: the teacher's weights and a fresh adapter.

        Raises:
            ModelError: as `load_text_lm` and `load_tokenizer`.
        """
        llm = load_text_lm(path, revision, dtype, attention, context)
        tokenizer = load_tokenizer(path, revision)
        _require_embeddings(path, llm, tokenizer)
        weight = llm.get_input_embeddings().weight
        module = Adapter(adapter, encoder.dim, weight.shape[1], _embedding_rms(llm), seed, attention)
        config = SpeechLMConfig(path, revision, encoder, adapter, context)
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
        llm = load_text_lm(str(folder / "llm"), None, dtype or "auto", attention, config.context)
        tokenizer = load_tokenizer(str(folder / "llm"), None)
        _require_embeddings(str(folder), llm, tokenizer)
        width = llm.get_input_embeddings().weight.shape[1]
        adapter = Adapter(config.adapter, config.encoder.dim, width, attention=attention)
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
        # A file may have a head of its own though its config says tied; transformers 5 minds the file, 4 the config.
        self.llm.config.tie_word_embeddings = self.head.weight is self.llm.get_input_embeddings().weight
        with replacing(folder) as new, quiet():
            self.llm.save_pretrained(new / "llm", state_dict=_part(weights, "llm."))
            self.tokenizer.save_pretrained(new / "llm")
            write_older_keys(new / "llm")
            save_file(_part(weights, "adapter."), new / "adapter.safetensors")
            (new / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_text_lm(
    path: str,
    revision: str | None,
    dtype: torch.dtype | str = torch.float32,
    attention: str = "sdpa",
    context: int | None = None,
) -> PreTrainedModel:
    """A text LLM in eval mode, every weight accounted for, tried out (trial.py); safetensors only, no remote code.

    Of a multimodal LLM it is the text model alone (multimodal.py). It has no dropout in train mode either: a student
    must begin as its teacher. What the trial found is its `trial`.

    Args:
        path: folder or hub id.
        dtype: a torch dtype or its name; "auto" keeps that of the files.
        attention: "sdpa" (for models that have none: eager), "eager", "flash_attention_2", or "varlen" (no T × T mask,
            no other package).
        context: positions of the rows that it is to read; unset: 2,048.

    Raises:
        ModelError: it cannot be read or had; weights are missing, too many, of other shapes or not finite; it is
            multimodal, and its text model is not to be had alone; or what failed when it was tried out.
    """
    require_readable(path, "Qwen/Qwen2.5-3B")
    config = _config(path, revision)
    text = config.get_text_config()
    if attention == "sdpa" and not getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None), "_supports_sdpa", True):
        attention = "eager"
    if is_multimodal(config):
        llm = load_text_part(path, revision, config, dtype, attention)
    else:
        settings = {"config": config, "dtype": dtype, "attn_implementation": attention}
        llm, info = load_pretrained(AutoModelForCausalLM, path, revision, "a text LLM", **settings)
        require_whole(path, info)
    require_finite(path, llm)
    try:
        llm.trial = try_out(llm, context)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error.__cause__
    return llm.eval()


def _config(path: str, revision: str | None) -> PretrainedConfig:
    """Of the model, with nothing random in training; raises `ModelError`, for quantized weights too."""
    try:
        with quiet():
            config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        without_dropout(config.get_text_config())
    except UNUSABLE as error:
        raise ModelError(f"{path}: cannot be loaded as a text LLM ({reason(error)})") from None
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method", "quantized") if isinstance(quantized, dict) else quantized.quant_method
        raise ModelError(
            f"{path}: its weights are quantized ({method}), so they cannot be trained; give the model that they were "
            "made from"
        )
    return config


def parameter_groups(model: SpeechLM, settings: DistillConfig) -> list[dict[str, Any]]:
    """Optimizer groups of LLM and adapter: with and without weight decay, and under Muon their matrices.

    Norms and biases do not decay, nor do embeddings and head: decay would wear away the tokens that speech never shows.

    Returns:
        Groups with `rate`, the setting that `lr` was taken from; those of Muon, and only those, have `momentum`.

    Raises:
        ModelError: Muon is set, and the LLM has no list of layers.
    """
    tables = {id(model.llm.get_input_embeddings().weight), id(model.head.weight)}
    matrices = _matrices(model) if settings.optimizer == "muon" else set()
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


def _matrices(model: SpeechLM) -> set[int]:
    """Ids of the two-dimensional weights of the adapter, and of those inside the decoder layers of the LLM."""
    layers = decoder_layers(model.llm)
    if layers is None:
        raise ModelError(f"the layers of {type(model.llm).__name__} are not known to Muon; set distill.optimizer=adamw")
    inside = (parameter for each in (layers, model.adapter) for parameter in each.parameters())
    return {id(parameter) for parameter in inside if parameter.ndim == 2}


def _embedding_rms(llm: PreTrainedModel) -> float:
    """Root mean square of the LLM's input embeddings, over 4,096 ids spread over the vocabulary."""
    embed = llm.get_input_embeddings()
    num_ids = embed.weight.shape[0]
    ids = torch.linspace(0, num_ids - 1, min(num_ids, 4096), device=embed.weight.device).long()
    with torch.no_grad():  # through the module, since some scale what they look up
        return embed(ids).float().square().mean().sqrt().item()


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
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary sibling that takes the folder's place once it is complete; if that fails, all is as it was."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.{kind}") for kind in ("new", "old"))
    new.mkdir()
    try:
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except OSError:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
