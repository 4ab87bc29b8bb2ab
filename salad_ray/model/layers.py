"""The decoder layers of a causal LM and the width of their attention, found by what they are and not by their names."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def decoder_layers(llm: PreTrainedModel) -> nn.ModuleList | None:
    """The list of as many modules as the config has layers, of several the one with most weights; none without any."""
    number = llm.config.get_text_config().num_hidden_layers
    modules = llm.get_decoder().modules()
    lists = [module for module in modules if isinstance(module, nn.ModuleList) and len(module) == number]
    return max(lists, key=lambda each: sum(weight.numel() for weight in each.parameters()), default=None)


def attention_widths(llm: PreTrainedModel) -> int:
    """Heads times their width, summed over the layers, which may differ.

    What leaves the heads of a layer enters the last product of its attention, so that is where they are measured, and
    the width of queries is taken to be the same. A layer whose attention has no such product counts with the model's
    width.
    """
    width = llm.get_input_embeddings().weight.shape[1]
    layers = decoder_layers(llm)
    if layers is None:
        return int(width * llm.config.get_text_config().num_hidden_layers)
    return sum(_attention_width(layer, width) for layer in layers)


def _attention_width(layer: nn.Module, width: int) -> int:
    attention = (module for module in layer.modules() if "Attention" in type(module).__name__)
    parts = next(attention, nn.Module()).modules()
    sizes = [product_sizes(part) for part in parts if isinstance(part, (nn.Linear, Conv1D))]
    return next((inputs for inputs, outputs in reversed(sizes) if outputs == width), width)


def product_sizes(product: nn.Linear | Conv1D) -> tuple[int, int]:
    """Inputs and outputs; GPT-2 and its kin hold their matrices the other way round."""
    if isinstance(product, nn.Linear):
        return product.in_features, product.out_features
    return product.nx, product.nf
