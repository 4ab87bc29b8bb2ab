"""The distillation loss with its backward, beside dense PyTorch and Liger's chunked loss; bf16.

Memory is the peak beyond inputs and their gradients. `ours, compiled` has the softmaxes of a chunk under torch.compile,
which the library does not do today: the row says what that would buy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import allocated, forget_peak, peak_bytes, spread, take_turns
from benchmarks.gpu.worker import Context, missing
from benchmarks.loss import dense, make_inputs, make_loss, step
from salad_ray.distill import losses
from salad_ray.distill.losses import distillation_loss

REPEATS = 5
CHUNK = 2048


def rows(context: Context) -> Iterator[dict[str, Any]]:
    """A row for each way, and one of ratios."""
    num, width, vocab = (64, 32, 500) if context.tiny else (8192, 2048, 151_936)
    inputs = make_inputs(num, width, torch.bfloat16, vocab, context.device)
    works: dict[str, Callable[[], Tensor]] = {}
    left_out = []
    for name, loss in ways(context, num).items():
        try:
            made = loss()
            step(made, make_inputs(64, width, torch.bfloat16, 256, context.device))  # what is set up once
        except ImportError as error:
            left_out.append({"name": name, "left_out": missing(error)})
            continue
        works[name] = lambda made=made: step(made, inputs)  # type: ignore[misc]
    secs = take_turns(works, context.device, 2 if context.tiny else REPEATS)
    memory = {name: extra_bytes(work, inputs, context) for name, work in works.items()}
    for name, values in secs.items():
        taken = spread(values)
        num_bytes = memory[name]
        gb = None if num_bytes is None else num_bytes / 1e9
        yield {"name": name, "secs": taken["median"], "min": taken["min"], "max": taken["max"], "extra_gb": gb}
    yield from left_out
    medians = {name: spread(values)["median"] for name, values in secs.items()}
    others = min(value for name, value in medians.items() if not name.startswith("ours"))
    ours, of_dense = memory["ours"], memory["dense PyTorch"]
    ratio = None if ours is None or of_dense is None else of_dense / ours
    yield {
        "name": f"ours, {num:,} × {width:,}, V = {vocab:,}",
        "best other/ours": others / medians["ours"],
        "dense/ours memory": ratio,
    }


def ways(context: Context, num: int) -> dict[str, Callable[[], Any]]:
    """What makes each loss; only making it may need a package."""
    found: dict[str, Callable[[], Any]] = {
        "ours": lambda: make_loss("ours", num),
        f"ours, chunks of {CHUNK:,}": lambda: partial(in_chunks, CHUNK),
        "ours, compiled": lambda: compiled(context),
        "dense PyTorch": lambda: dense,
        "Liger": lambda: make_loss("liger_default", num),
    }
    if context.on_gpu:  # on a CPU it takes a C++ compiler and half a minute
        found["Liger, compiled"] = lambda: make_loss("liger_default_compiled", num)
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
