"""How a causal LM turns hidden states into logits: a matrix, and what known architectures do besides.

Shape letters: N positions, D model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """Logits z = cap · tanh(u / cap) with u = scale · (hidden · weightᵀ + bias); without a cap, z = u.

    `hidden @ head.T` gives them as it does for a plain matrix, so nobody can forget what comes after the product.
    """

    weight: Tensor
    """(V, D)."""
    bias: Tensor | None = None
    """(V,)."""
    scale: float = 1.0
    cap: float | None = None

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def parameters(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, V) of hidden states (…, D), float32 at least; on CUDA without a float32 copy of the weight."""
        flat, weight = hidden.reshape(-1, hidden.shape[-1]), self.weight
        if flat.is_cuda and flat.dtype != torch.float32 and flat.dtype == weight.dtype:
            product = torch.mm(flat, weight.T, out_dtype=torch.float32)
        else:
            wide = torch.promote_types(torch.promote_types(flat.dtype, weight.dtype), torch.float32)
            product = flat.to(wide) @ weight.T.to(wide)
        return self.bend(product).reshape(*hidden.shape[:-1], len(weight))

    def bend(self, product: Tensor) -> Tensor:
        """What is done with hidden · weightᵀ (N, V or fewer ids)."""
        logits = product if self.bias is None else product + self.bias[: product.shape[1]].to(product.dtype)
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap

    def slope(self, logits: Tensor) -> Tensor | float | None:
        """∂z / ∂(hidden · weightᵀ), given the logits z; none where it is 1."""
        if self.cap is None:
            return None if self.scale == 1 else self.scale
        return (logits / self.cap).square_().neg_().add_(1).mul_(self.scale)

    @property
    def T(self) -> Head:
        """Itself: what stands on the right of `hidden @`."""
        return self

    def __rmatmul__(self, hidden: Tensor) -> Tensor:
        return self.logits(hidden)


def lm_head(llm: Any) -> Head:
    """The output layer of a causal LM, with what its config says of a scale and a cap.

    These are the names that transformers has for them. That a model does what its config says, and nothing else, is
    tried out before it is used (trial.py).
    """
    layer, config = llm.get_output_embeddings(), llm.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, getattr(layer, "bias", None), scale, cap or None)
