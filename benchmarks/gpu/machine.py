"""What the machine is and what it can do at best: the ceilings beside which the other sections are read."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.timing import gib, seconds
from benchmarks.gpu.worker import Context, num_cpus, version_of
from salad_ray.distill.step import peak_flops

Row = dict[str, Any]

PACKAGES = (
    "torch", "transformers", "deepspeed", "liger-kernel", "kokoro", "faiss-gpu", "faiss-cpu", "sentence-transformers",
    "soundfile", "soxr", "triton", "numpy",
)  # fmt: skip
REPEATS = 10


def rows(context: Context) -> Iterator[Row]:
    """Names and versions; matrix products in bf16; copies within the device's memory."""
    found = {name: version_of(name) for name in PACKAGES}
    hardware: Row = {"gpu": "none"}
    if context.on_gpu:
        memory = gib(torch.cuda.get_device_properties(context.device).total_memory)
        hardware = {"gpu": torch.cuda.get_device_name(), "memory_gib": memory, "cuda": torch.version.cuda}
    yield {"name": "software"} | hardware | {"python": platform.python_version(), "cpus": num_cpus()} | found
    size = 256 if context.tiny else 8192
    left, right = (torch.randn(size, size, device=context.device).bfloat16() for _ in range(2))
    torch.mm(left, right)
    secs = median(seconds(lambda: torch.mm(left, right), context.device) for _ in range(REPEATS))
    peak = peak_flops(context.device)
    rate = 2 * size**3 / secs
    yield {"name": f"bf16 product, {size:,} cubed", "tflops": rate / 1e12, "share_of_peak": peak and rate / peak}
    source = torch.empty(2**20 if context.tiny else 2**31, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    target.copy_(source)
    secs = median(seconds(lambda: target.copy_(source), context.device) for _ in range(REPEATS))
    yield {"name": "copy, bytes read and written", "gb_per_sec": 2 * source.nbytes / secs / 1e9}
