"""Muon for the matrices of the adapter and inside the LLM's layers, AdamW for all other weights; under ZeRO 1, 2 or 3.

ZeRO hands the optimizer flat fp32 shards: of the weights, and of gradients that are summed over micro-batches, averaged
over workers and clipped. Momentum is taken element by element, so it is a flat shard too, and checkpoints hold it as
they hold Adam's moments. Only the orthogonalisation needs whole matrices. One worker makes each: the one that has all
of it, else one of those that have a part, which is sent the others' parts and sends back what becomes of them.

DeepSpeed's own Muon (0.19.8) clips the orthogonalised update instead of the gradient, and keeps momentum in bf16 under
bf16, so it is not used (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from salad_ray.distill.checkpoints import Piece

NUM_STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton–Schulz iteration (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon)."""
EXCHANGED = 2**25
"""Elements that a worker is sent at once, about; a matrix is never cut for it."""


def orthogonalised(matrix: Tensor) -> Tensor:
    """About U Vᵀ of a matrix U S Vᵀ, times √max(1, rows / columns): fp32 (R, C) → fp32 (R, C).

    Five steps bring singular values to about 0.7–1.2, but leave those alone that are thousands of times smaller than
    the norm. Computed in bf16 on GPUs, as by Jordan et al., and in fp32 on CPUs.
    """
    rows, columns = matrix.shape
    a, b, c = COEFFICIENTS
    x = matrix.T if rows > columns else matrix
    x = (x / x.norm().clamp(min=1e-7)).to(torch.bfloat16 if x.is_cuda else torch.float32)
    for _ in range(NUM_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.T if rows > columns else x
    return x.float() * max(1.0, rows / columns) ** 0.5


@dataclass(frozen=True)
class Matrix:
    """Where the elements of one matrix lie, and who orthogonalises it."""

    shape: torch.Size
    pieces: dict[int, Piece]
    """By worker."""
    owner: int
    inputs_first: bool
    """GPT-2 and its kin hold their matrices the other way round."""

    def orthogonalised(self, flat: Tensor) -> Tensor:
        """Of its elements, flat as they are."""
        matrix = flat.view(self.shape)
        return (orthogonalised(matrix.T).T if self.inputs_first else orthogonalised(matrix)).flatten()


class MuonAdamW(torch.optim.AdamW):
    """Muon, with Nesterov momentum and decoupled weight decay, for groups that have `momentum`; AdamW for the others.

    Of a matrix W with gradient G, momentum m and learning rate η:
    M ← m M + (1 − m) G;  W ← (1 − η λ) W − η √max(1, rows / columns) · NS(m M + (1 − m) G).

    `locate` must be called when ZeRO has divided the parameters. A step overwrites the gradients of the matrices.

    Args:
        model: names the parameters.
        groups: of `parameter_groups`.
    """

    def __init__(
        self, model: nn.Module, groups: list[dict[str, Any]], betas: tuple[float, float], fused: bool = False
    ) -> None:
        of_muon = {id(parameter) for group in groups if "momentum" in group for parameter in group["params"]}
        named = model.named_parameters()
        self._shapes = {name: parameter.shape for name, parameter in named if id(parameter) in of_muon}
        self._inputs_first = {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, Conv1D)}
        self._matrices: dict[Tensor, list[Matrix]] = {}
        super().__init__(groups, betas=betas, fused=fused)

    def locate(self, owned: Iterable[tuple[Tensor, list[Piece]]]) -> None:
        """Learn where each matrix lies; all workers call it together, with the shards that they own and what is in
        them. Matrices that are cut are given to the worker with least to do."""
        shards = list(owned)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [pieces for _, pieces in shards])
        load = [0] * len(everyone)
        for index, (flat, _) in enumerate(shards):
            found: dict[str, dict[int, Piece]] = {}
            for rank, pieces_of in enumerate(everyone):
                for piece in pieces_of[index]:
                    if piece.name in self._shapes:
                        found.setdefault(piece.name, {})[rank] = piece
            for name, pieces in found.items():
                owner = min(pieces, key=load.__getitem__)
                load[owner] += self._shapes[name].numel() * min(self._shapes[name])
                matrix = Matrix(self._shapes[name], pieces, owner, name in self._inputs_first)
                self._matrices.setdefault(flat, []).append(matrix)

    def momentum_of(self, flat: Tensor) -> Tensor | None:
        """Like the shard, made when it is not there yet; none where the shard is AdamW's."""
        if flat not in self._matrices:
            return None
        state = self.state[flat]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(flat.data)
        return state["momentum"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of the shards that have a gradient."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if "momentum" not in group]
        loss = super().step(closure)
        self.param_groups = groups
        for group in groups:
            for flat in group["params"] if "momentum" in group else ():
                self._step_matrices(flat, group)
        return loss

    def _step_matrices(self, flat: Tensor, group: dict[str, Any]) -> None:
        momentum, update = self.momentum_of(flat), flat.grad
        if momentum is None or update is None:
            raise RuntimeError("a step before `locate`, or without gradient")
        momentum.lerp_(update, 1 - group["momentum"])
        update.lerp_(momentum, group["momentum"])
        matrices, rank = self._matrices[flat], dist.get_rank()
        for matrix in matrices:
            if len(matrix.pieces) == 1 and matrix.owner == rank:
                own = _part(update, matrix.pieces[rank])
                own.copy_(matrix.orthogonalised(own))
        for some in _rounds([matrix for matrix in matrices if len(matrix.pieces) > 1]):
            _orthogonalise_together(update, some)
        flat.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def _part(flat: Tensor, piece: Piece) -> Tensor:
    return flat.narrow(0, piece.offset, piece.numel)


def _rounds(matrices: list[Matrix]) -> Iterator[list[Matrix]]:
    """A few matrices at a time, the same on all workers."""
    some: list[Matrix] = []
    for matrix in matrices:
        if some and sum(each.shape.numel() for each in some) >= EXCHANGED * dist.get_world_size():
            yield some
            some = []
        some.append(matrix)
    if some:
        yield some


def _orthogonalise_together(update: Tensor, matrices: list[Matrix]) -> None:
    """Send the parts of each matrix to its owner, and get back what it made of them."""
    rank, workers = dist.get_rank(), range(dist.get_world_size())
    # In the order in which they are sent, and in which they arrive.
    sent = [[each.pieces[rank] for each in matrices if each.owner == to and rank in each.pieces] for to in workers]
    own = [each for each in matrices if each.owner == rank]
    came = [[(each, each.pieces[by]) for each in own if by in each.pieces] for by in workers]
    num_sent = [sum(piece.numel for piece in pieces) for pieces in sent]
    num_came = [sum(piece.numel for _, piece in pieces) for pieces in came]
    outgoing = torch.cat([update[:0], *(_part(update, piece) for pieces in sent for piece in pieces)])
    incoming = update.new_empty(sum(num_came))
    dist.all_to_all_single(incoming, outgoing, num_came, num_sent)
    arrived = [pair for pairs in came for pair in pairs]
    parts = incoming.split([piece.numel for _, piece in arrived])
    for matrix in own:
        places = [(part, piece) for part, (each, piece) in zip(parts, arrived, strict=True) if each is matrix]
        whole = update.new_empty(matrix.shape.numel())
        for part, piece in places:
            whole[piece.start : piece.start + piece.numel] = part
        whole = matrix.orthogonalised(whole)
        for part, piece in places:
            part.copy_(whole[piece.start : piece.start + piece.numel])
    dist.all_to_all_single(outgoing, incoming, num_sent, num_came)
    pieces = [piece for pieces in sent for piece in pieces]
    for piece, part in zip(pieces, outgoing.split([piece.numel for piece in pieces]), strict=True):
        _part(update, piece).copy_(part)
