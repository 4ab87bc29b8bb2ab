"""Which parts of weights and optimizer a DeepSpeed engine keeps on this worker, and how to put them back.

ZeRO keeps the parameters of a group as one flat fp32 tensor per worker, under whose key the optimizer has its moments:
Adam's two, or Muon's momentum.
Stages 1 and 2 cut the flat group anywhere; stage 3 cuts every parameter into one part per worker, the last one padded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from salad_ray.distill.checkpoints import Partition, Piece
from salad_ray.distill.muon import MuonAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's."""


def owned(engine: Any) -> list[tuple[Tensor, list[Piece]]]:
    """The flat tensors of this worker, as many on every worker, and what lies in them."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    return _groups_stage3(optimizer, names) if _is_stage3(optimizer) else _groups_stage12(optimizer, names)


def partitions(engine: Any) -> list[Partition]:
    """What this worker owns, as views of the engine's own tensors; moments that are not there yet are made, zero."""
    optimizer = engine.optimizer.optimizer
    return [Partition(flat.data, pieces, _moments(optimizer, flat)) for flat, pieces in owned(engine)]


def optimizer_step(engine: Any) -> int:
    """Updates that Adam has counted, for its bias correction."""
    states = engine.optimizer.optimizer.state.values()
    return int(next((state["step"] for state in states if "step" in state), 0))


def restored(engine: Any, step: int) -> None:
    """Tell the engine that its partitions were overwritten: Adam's count, and the weights that the model uses."""
    optimizer = engine.optimizer
    for state in optimizer.optimizer.state.values():
        if "step" in state:
            state["step"].fill_(step)
    if _is_stage3(optimizer):
        _refresh_stage3(optimizer)
    else:
        optimizer.update_lp_params()


def _is_stage3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _moments(adam: torch.optim.AdamW, flat: Tensor) -> dict[str, Tensor]:
    if isinstance(adam, MuonAdamW) and (momentum := adam.momentum_of(flat)) is not None:
        return {"momentum": momentum}
    state = adam.state[flat]
    if not state:
        on_device = adam.defaults.get("fused") or adam.defaults.get("capturable")
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device if on_device else "cpu")
        state |= {name: torch.zeros_like(flat.data) for name in MOMENTS}
    return {name: state[name] for name in MOMENTS}


def _groups_stage12(optimizer: Any, names: dict[int, str]) -> list[tuple[Tensor, list[Piece]]]:
    groups = []
    for flat, parameters in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        pieces = []
        for parameter in parameters:
            mapping = parameter._hp_mapping  # none where another worker owns all of it
            if mapping is not None:
                inside, own = mapping.lp_fragment_address, mapping.hp_fragment_address
                pieces.append(Piece(names[id(parameter)], inside.start, inside.numel, own.start))
        groups.append((flat, pieces))
    return groups


def _groups_stage3(optimizer: Any, names: dict[int, str]) -> list[tuple[Tensor, list[Piece]]]:
    flats = optimizer.fp32_partitioned_groups_flat
    groups: list[tuple[Tensor, list[Piece]]] = [(flat, []) for flat in flats]
    rank = torch.distributed.get_rank()
    for parameters in optimizer.fp16_groups:
        for parameter in parameters:
            group, offset, width = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = rank * width
            numel = min(width, parameter.ds_numel - start)
            if numel > 0:
                groups[group][1].append(Piece(names[id(parameter)], start, numel, offset))
    return groups


def _refresh_stage3(optimizer: Any) -> None:
    """The weights of the forward from the fp32 ones: partitions first, then what stays gathered on every worker."""
    optimizer.checkpoint_event_prologue()
    for flat, low, parameters in zip(
        optimizer.fp32_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups_flat,
        optimizer.fp16_partitioned_groups,
        strict=True,
    ):
        low.data.copy_(flat.data)
        for parameter, values in zip(parameters, optimizer.unflatten(low, parameters), strict=True):
            parameter.data = values.data
    optimizer.checkpoint_event_epilogue()
