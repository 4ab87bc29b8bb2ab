"""Sections of benchmarks.gpu that misbehave, for test_gpu_benchmark.py."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.worker import Context


def good(context: Context) -> Iterator[dict[str, Any]]:
    print("a line for the log")  # noqa: T201
    yield {"name": "a number", "value": 1.5}


def fails(context: Context) -> Iterator[dict[str, Any]]:
    yield {"name": "before"}
    raise ValueError("this section is broken")


def dies(context: Context) -> Iterator[dict[str, Any]]:
    yield {"name": "before"}
    os.abort()


def overruns(context: Context) -> Iterator[dict[str, Any]]:
    """It also leaves a process behind, which must not outlive it."""
    child = subprocess.Popen(["sleep", "600"])
    Path(context.folder, "child.pid").write_text(str(child.pid))
    yield {"name": "before"}
    time.sleep(600)


def sleeps(context: Context) -> Iterator[dict[str, Any]]:
    Path(context.folder, "worker.pid").write_text(str(os.getpid()))
    yield {"name": "before"}
    time.sleep(600)


def works_at_first(context: Context) -> Iterator[dict[str, Any]]:
    """Two rows; when it is run again there is no memory for the second."""
    again = Path(context.folder, "again")
    yield {"name": "first", "value": 2 if again.exists() else 1}
    if again.exists():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 60.00 GiB.")
    again.touch()
    yield {"name": "second", "value": 1}


def refines_a_row(context: Context) -> Iterator[dict[str, Any]]:
    for repeats in (1, 2):
        yield {"name": "a rate", "repeats": repeats}
        yield {"name": f"something after {repeats}"}


def is_wrong(context: Context) -> Iterator[dict[str, Any]]:
    yield {"name": "a check", "error": 2.0, "tolerance": 1.0, "ok": False}


def lacks_a_package(context: Context) -> Iterator[dict[str, Any]]:
    import a_package_that_nobody_has  # type: ignore[import-not-found]

    yield {"name": str(a_package_that_nobody_has)}


def needs_a_later_version(context: Context) -> Iterator[dict[str, Any]]:
    from transformers import AModelOfTomorrow  # type: ignore[attr-defined]

    yield {"name": str(AModelOfTomorrow)}


def has_a_bug(context: Context) -> Iterator[dict[str, Any]]:
    from salad_ray.tables import nothing_of_this_name  # type: ignore[attr-defined]

    yield {"name": str(nothing_of_this_name)}


def is_silent(context: Context) -> Iterator[dict[str, Any]]:
    yield from ()


def leaves_something_behind(context: Context) -> Iterator[dict[str, Any]]:
    """A process that holds the section's output open."""
    child = subprocess.Popen(["sleep", "600"])
    Path(context.folder, "left.pid").write_text(str(child.pid))
    yield {"name": "done"}


def crashes_and_leaves_something_behind(context: Context) -> Iterator[dict[str, Any]]:
    subprocess.Popen(["sleep", "600"])
    yield {"name": "before"}
    os.abort()


def leaves_a_line_unfinished(context: Context) -> Iterator[dict[str, Any]]:
    for number in range(3):
        print(f"progress {number}", end="")  # noqa: T201
        yield {"name": f"row {number}"}


def runs_out_of_memory(context: Context) -> Iterator[dict[str, Any]]:
    yield {"name": "what fits"}
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 60.00 GiB.")


def yields_nan(context: Context) -> Iterator[dict[str, Any]]:
    yield {"name": "a loss", "kl": float("nan")}


def has_a_nameless_error(context: Context) -> Iterator[dict[str, Any]]:
    yield {"name": "before"}
    raise ImportError("something could not be imported")
