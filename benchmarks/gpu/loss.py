"""The distillation loss with its backward, beside dense PyTorch and Liger's chunked loss; bf16.

Memory is the peak beyond inputs and their gradients. Ways are measured one after the other. `ours, compiled` has the
softmaxes of a chunk under torch.compile, which the library does not do today: the row says what that would buy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import allocated, forget_peak, peak_bytes, seconds, spread
from benchmarks.gpu.worker import Context, missing, reason
from benchmarks.loss import dense, make_inputs, make_loss, step
from salad_ray.distill import losses
from salad_ray.distill.losses import distillation_loss

REPEATS = 5
CHUNK = 2048
SAME_VALUE = 0.01
"""Relative difference of a way's value from ours that rounding to bf16 may make."""

Way = Callable[..., Tensor]


def rows(context: Context) -> Iterator[dict[str, Any]]:
    """A row for each way as soon as it is measured, those that compile last; from Liger on also one of ratios.

    A way that fails, for want of a compiler or of memory, is a row as well.
    """
    num, width, vocab = (64, 32, 500) if context.tiny else (8192, 2048, 151_936)
    inputs = make_inputs(num, width, torch.bfloat16, vocab, context.device)
    found: dict[str, dict[str, Any]] = {}
    for name, make in ways(context, num).items():
        found[name] = measured(name, make, inputs, context)
        if "value" in found[name] and "value" in found["ours"]:
            apart = abs(found[name]["value"] / found["ours"]["value"] - 1)
            found[name]["ok"] = apart <= SAME_VALUE
        yield found[name]
        if "Liger" in found:
            yield {"name": f"{num:,} × {width:,}, V = {vocab:,}"} | ratios(found)


def measured(name: str, make: Callable[[], Way], inputs: tuple[Tensor, ...], context: Context) -> dict[str, Any]:
    """Seconds and memory of one way, after a first call that sets up what has to be, or why it could not be had."""
    try:
        work = partial(step, make(), inputs)
        value = float(work())
        secs = spread([seconds(work, context.device) for _ in range(2 if context.tiny else REPEATS)])
        num_bytes = extra_bytes(work, inputs, context)
    except ImportError as error:
        return {"name": name, "left_out": missing(error)}
    except Exception as error:  # noqa: BLE001  # a compiler that is not there has errors of its own
        return {"name": name, "failed": reason(error)} | ({"ok": False} if name == "ours" else {})
    gb = None if num_bytes is None else num_bytes / 1e9
    return {
        "name": name,
        "secs": secs["median"],
        "min": secs["min"],
        "max": secs["max"],
        "extra_gb": gb,
        "value": value,
    }


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Time beside the best other, which must have been compared with Liger; memory beside dense PyTorch."""
    others = {name: row["secs"] for name, row in found.items() if not name.startswith("ours") and "secs" in row}
    if "secs" not in found["ours"] or "Liger" not in others:
        return {"best other": None, "best other/ours": None, "dense/ours memory": None}
    best = min(others, key=others.__getitem__)
    ours, dense_gb = found["ours"]["extra_gb"], found["dense PyTorch"].get("extra_gb")
    return {
        "best other": best,
        "best other/ours": others[best] / found["ours"]["secs"],
        "dense/ours memory": dense_gb / ours if ours and dense_gb else None,
    }


def ways(context: Context, num: int) -> dict[str, Callable[[], Way]]:
    """What makes each loss; only making it may need a package."""
    found: dict[str, Callable[[], Way]] = {
        "ours": lambda: make_loss("ours", num),
        "dense PyTorch": lambda: dense,
        "Liger": lambda: make_loss("liger_default", num),
        "Liger, N/8": lambda: make_loss("liger_small", num),
        f"ours, chunks of {CHUNK:,}": lambda: partial(in_chunks, CHUNK),
        "ours, compiled": lambda: compiled(context),
    }
    if context.on_gpu:  # on a CPU it takes a C++ compiler and half a minute
        found["Liger, compiled"] = lambda: make_loss("liger_default_compiled", num)
        found["Liger, N/8, compiled"] = lambda: make_loss("liger_small_compiled", num)
    return found


def in_chunks(size: int | None, *inputs: Tensor) -> Tensor:
    hidden, head, teacher_hidden, teacher_head, labels = inputs
    return distillation_loss(hidden, head, teacher_hidden, teacher_head, labels, chunk_size=size).loss


def compiled(context: Context) -> Callable[..., Tensor]:
    """`distillation_loss` whose softmaxes are compiled, for the time of a call."""
    plain = losses._losses_
    fused = torch.compile(plain, dynamic=True, backend="inductor" if context.on_gpu else "eager")

    def loss(*inputs: Tensor) -> Tensor:
        losses._losses_ = fused
        try:
            return in_chunks(None, *inputs)
        finally:
            losses._losses_ = plain

    return loss


def extra_bytes(work: Callable[[], Tensor], inputs: tuple[Tensor, ...], context: Context) -> int | None:
    """The peak of one call beyond inputs and gradients."""
    inputs[0].grad = inputs[1].grad = None
    forget_peak(context.device)
    before = allocated(context.device)
    work()
    peak = peak_bytes(context.device)
    return None if peak is None else peak - before - inputs[0].nbytes - inputs[1].nbytes
