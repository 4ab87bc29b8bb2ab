"""Seconds and bytes of a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch


def wait(device: torch.device) -> None:
    """Until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of one call, until the device is done."""
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def take_turns(works: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Seconds of every repeat; what changes on the machine meanwhile meets all. One round before warms up."""
    secs: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            taken = seconds(work, device)
            if repeat:
                secs[name].append(taken)
    return secs


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most, as columns of a row."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def forget_peak(device: torch.device) -> None:
    """The peak of memory begins anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def allocated(device: torch.device) -> int:
    """Bytes of tensors on a GPU now; 0 on a CPU, which nobody counts."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes of tensors on a GPU since `forget_peak`; none on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def gib(num_bytes: float | None) -> float | None:
    return None if num_bytes is None else num_bytes / 2**30
