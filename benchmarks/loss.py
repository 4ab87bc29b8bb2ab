"""The distillation loss beside what one would use instead: dense PyTorch, and Liger's chunked loss at two
chunk sizes, compiled and not.

    python -m benchmarks.loss [--full]

All run forward KL at temperature 1 with its backward. Time: the variants take turns in one process, after one round to
warm up; the median counts, `spread` is (max − min) / median of ours. Memory: every variant in a process of its own,
peak resident memory above the inputs, minus the gradients (Linux only). Error: relative, against a dense float64
reference. `liger` is its best configuration for each number, `setting` names it. Without --full only N = 1,024 and
D = 512 are measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from salad_ray.distill.losses import distillation_loss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

VOCAB = 151_936
THREADS = 2
REPEATS = 5
DTYPES = ("float32", "bfloat16")
VARIANTS = ("ours", "dense", "liger_default", "liger_small", "liger_default_compiled", "liger_small_compiled")
"""Liger's default is 1,024 positions a chunk; `liger_small` has N / 8, as ours. Compiling needs a C++ compiler."""


def run(full: bool = False) -> list[dict[str, Any]]:
    """One row per quantity and setting: name, setting, ours, dense, liger, ours as a share of each, spread of ours."""
    sizes = [(n, d) for n in (1024, 2048) for d in (512, 2048)] if full else [(1024, 512)]
    rows = []
    for num, width in sizes:
        for dtype in DTYPES:
            rows += measure(num, width, dtype)
    return rows + [row for dtype in DTYPES for row in compare_errors(512, 512, dtype)]


def measure(num: int, width: int, dtype: str) -> list[dict[str, Any]]:
    """Time and memory at one size."""
    times = worker("time", ",".join(VARIANTS), num, width, dtype)
    memory = {variant: worker("memory", variant, num, width, dtype) for variant in VARIANTS}
    spread = (max(times["ours"]) - min(times["ours"])) / median(times["ours"])
    setting = f"N={num} D={width} {dtype}"
    medians = {variant: median(values) for variant, values in times.items()}
    return [row("loss time (s)", setting, medians, spread), row("loss memory (GB)", setting, memory)]


def compare_errors(num: int, width: int, dtype: str) -> Iterable[dict[str, Any]]:
    """Relative errors of the value and of both gradients at one size."""
    errors = worker("error", ",".join(VARIANTS), num, width, dtype)
    for index, name in enumerate(("value", "hidden gradient", "head gradient")):
        values = {variant: errors[variant][index] for variant in VARIANTS}
        yield row(f"loss error: {name}", f"N={num} D={width} {dtype}", values)


def row(name: str, setting: str, values: dict[str, float], spread: float | None = None) -> dict[str, Any]:
    best = min((variant for variant in values if variant.startswith("liger")), key=values.__getitem__)
    ours, dense, liger = values["ours"], values["dense"], values[best]
    return {
        "name": name,
        "setting": f"{setting} {best}",
        "ours": ours,
        "dense": dense,
        "liger": liger,
        "ours/dense": ours / dense,
        "ours/liger": ours / liger,
        "spread": spread,
    }


def worker(*arguments: object) -> Any:
    """Run one of the tasks below in a fresh process and return what it prints."""
    command = [sys.executable, "-m", "benchmarks.loss", "--worker", *map(str, arguments)]
    root = Path(__file__).resolve().parents[1]
    return json.loads(subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout)


def make_inputs(
    num: int, width: int, dtype: torch.dtype, vocab: int = VOCAB, device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    """Logits with a standard deviation of 3, the teacher's near the student's: KL ≈ 0.4 nats. No temporaries."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, scale, generator=generator)

    hidden, head = normal(num, width), normal(vocab, width, scale=3 * width**-0.5)
    teacher_hidden, teacher_head = hidden + normal(num, width, scale=0.3), head.clone()
    labels = torch.randint(vocab, (num,), generator=generator, device=device)
    return hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head, labels


def make_loss(variant: str, num: int) -> Loss:
    if variant == "ours":
        return lambda *inputs: distillation_loss(*inputs).loss
    if variant == "dense":
        return dense
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    chunk_size = 1024 if "default" in variant else num // 8
    return LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled="compiled" in variant, chunk_size=chunk_size
    )


def dense(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, labels: Tensor) -> Tensor:
    """What one writes without further thought: logits in the model's dtype, softmaxes in fp32."""
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        teacher = (teacher_hidden @ teacher_head.T).to(work).log_softmax(-1)
    student = (hidden @ head.T).to(work).log_softmax(-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def step(loss: Loss, inputs: tuple[Tensor, ...]) -> Tensor:
    """Value, with the gradients in the inputs."""
    inputs[0].grad = inputs[1].grad = None
    value = loss(*inputs)
    value.backward()
    return value.detach()


def time_task(variants: str, num: int, width: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """Seconds of every repeat, the variants taking turns."""
    losses = {variant: make_loss(variant, num) for variant in variants.split(",")}
    inputs = make_inputs(num, width, dtype)
    times: dict[str, list[float]] = {variant: [] for variant in losses}
    for repeat in range(REPEATS + 1):
        for variant, loss in losses.items():
            start = time.perf_counter()
            step(loss, inputs)
            if repeat:
                times[variant].append(time.perf_counter() - start)
    return times


def memory_task(variant: str, num: int, width: int, dtype: torch.dtype) -> float:
    """GB of the step's peak above the inputs, minus the two gradients."""
    loss = make_loss(variant, num)
    step(loss, make_inputs(64, width, dtype, vocab=256))  # what libraries set up once
    inputs = make_inputs(num, width, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    step(loss, inputs)
    gradients = sum(tensor.nbytes for tensor in inputs[:2])
    return (resident("VmHWM") - before - gradients) / 1e9


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def error_task(variants: str, num: int, width: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """Relative errors of value, hidden gradient and head gradient."""
    return compare_with_exact(variants.split(","), make_inputs(num, width, dtype))


def compare_with_exact(variants: Iterable[str], inputs: tuple[Tensor, ...]) -> dict[str, list[float]]:
    """Relative errors of value, hidden gradient and head gradient, against a dense float64 reference."""
    exact = tuple(tensor.detach().double() if tensor.is_floating_point() else tensor for tensor in inputs)
    expected = outcome(dense, (exact[0].requires_grad_(), exact[1].requires_grad_(), *exact[2:]))
    errors = {}
    for variant in variants:
        pairs = zip(outcome(make_loss(variant, len(inputs[0])), inputs), expected, strict=True)
        errors[variant] = [float((value.double() - right).norm() / right.norm()) for value, right in pairs]
    return errors


def outcome(loss: Loss, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    value = step(loss, inputs)
    return value, *(tensor.grad for tensor in inputs[:2] if tensor.grad is not None)


def print_table(rows: list[dict[str, Any]]) -> None:
    widths = {"name": 28, "setting": 40}
    print(" ".join(f"{key:<{widths.get(key, 11)}}" for key in rows[0]))
    for entry in rows:
        cells = (
            (key, f"{value:.3g}" if isinstance(value, float) else str(value or "")) for key, value in entry.items()
        )
        print(" ".join(f"{cell:<{widths.get(key, 11)}}" for key, cell in cells))


def main() -> None:
    if "--worker" not in sys.argv:
        print_table(run(full="--full" in sys.argv))
        return
    torch.set_num_threads(THREADS)
    task, variants, num, width, dtype = sys.argv[2:]
    tasks: dict[str, Callable[..., Any]] = {"time": time_task, "memory": memory_task, "error": error_task}
    print(json.dumps(tasks[task](variants, int(num), int(width), getattr(torch, dtype))))


if __name__ == "__main__":
    main()
