"""The text model of a multimodal LLM, alone: `google/gemma-3-4b-pt` as a Gemma 3 that reads and writes text.

It is of the class that transformers has for the text part's config, with the very modules that the multimodal class
loaded: decoder, embeddings and head. What sees or hears is let go before anything is trained or saved. That the two say
the same of text is not believed but compared, on the weights that were loaded.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForMultimodalLM, PretrainedConfig, PreTrainedModel

from salad_ray.model.loading import UNUSABLE, ModelError, load_pretrained, reason, require_whole

NUM_TOKENS = 24
TOLERANCES = {torch.float32: 1e-4}
"""Largest difference of logits, in their standard deviation; other types, where attention may round otherwise: 0.05."""


def is_multimodal(config: PretrainedConfig) -> bool:
    """Whether there is more to a model than its text part."""
    return config.get_text_config() is not config


def text_class(path: str, config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of the text part by itself; raises `ModelError` where transformers has none."""
    text = config.get_text_config()
    try:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    except KeyError:
        raise ModelError(
            f"{path}: is a model of more than text ({config.model_type}), and transformers has no class for its text "
            f"model by itself ({text.model_type}); give a text LLM"
        ) from None


def load_text_part(
    path: str, revision: str | None, config: PretrainedConfig, dtype: torch.dtype | str, attention: str
) -> PreTrainedModel:
    """The text model of a multimodal one, every weight of it accounted for.

    Raises:
        ModelError: it cannot be read, or taken out; or what it makes of text is not what the whole makes of it.
    """
    text_class(path, config)  # before all is read
    whole, info = load_pretrained(
        AutoModelForMultimodalLM, path, revision, "a multimodal LLM", config=config, dtype=dtype
    )
    llm, prefixes = text_part(path, whole.eval())
    require_whole(path, {kind: [each for each in found if _is_part(each, prefixes)] for kind, found in info.items()})
    try:
        llm.set_attn_implementation(attention)
    except UNUSABLE as error:
        raise ModelError(f"{path}: cannot be had with model.attention={attention} ({reason(error)})") from None
    return llm


def text_part(path: str, whole: PreTrainedModel) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The text model of a multimodal one in eval mode, and how the names of its weights begin in there.

    Raises:
        ModelError: it cannot be taken out, or does not say the same of text.
    """
    kind, own_kind = text_class(path, whole.config), type(whole).__name__
    ids = torch.arange(1, NUM_TOKENS + 1)[None] * (whole.config.get_text_config().vocab_size // (2 * NUM_TOKENS))
    try:
        llm, prefixes = _taken_out(whole, kind)
        with torch.no_grad():
            own = whole(input_ids=ids, use_cache=False).logits[0].float()
            off = float((llm(input_ids=ids, use_cache=False).logits[0].float() - own).abs().max() / own.std())
    except (*UNUSABLE, AttributeError) as error:
        raise ModelError(
            f"{path}: the text model of {own_kind} cannot be had alone ({reason(error)}); give a text LLM"
        ) from None
    if not off <= TOLERANCES.get(llm.dtype, 0.05):
        raise ModelError(
            f"{path}: {kind.__name__} makes another thing of text than {own_kind}, whose text model it is (off by "
            f"{off:.1g} standard deviations); give a text LLM"
        )
    return llm, prefixes


def _taken_out(whole: PreTrainedModel, kind: type[PreTrainedModel]) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The text model, and how the names of its weights begin inside the whole."""
    decoder, head = whole.get_decoder(), whole.get_output_embeddings()
    prefixes = tuple(f"{name}." for name, module in whole.named_modules() if module is decoder or module is head)
    if type(decoder) is kind:  # some hold a causal LM, with a head of its own
        return decoder, prefixes
    config = decoder.config
    config.tie_word_embeddings = head.weight is whole.get_input_embeddings().weight
    with torch.device("meta"):
        llm = kind(config)
    empty = llm.get_decoder()
    if type(empty) is not type(decoder):
        raise TypeError(f"it is a {type(decoder).__name__} and not a {type(empty).__name__}")
    llm.set_submodule(next(name for name, module in llm.named_modules() if module is empty), decoder)
    llm.set_output_embeddings(head)
    if missing := [name for name, weight in llm.named_parameters() if weight.is_meta]:
        raise ValueError(f"nothing fills {missing[0]}")
    llm.generation_config = whole.generation_config
    return llm.eval(), prefixes


def _is_part(weight: Any, prefixes: tuple[str, ...]) -> bool:
    """Of a name, or of (name, found shape, needed shape)."""
    return (weight if isinstance(weight, str) else weight[0]).startswith(prefixes)
