"""What the benchmarks of whole loops share: one thread for everybody, taking turns, and ratios with their spread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from salad_ray.console import console

ROOT = Path(__file__).resolve().parents[1]
PAIRS = 3

Outcome = TypeVar("Outcome")


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Ray's workers and the subprocesses that start inside compute with one thread; Ray ends with the block."""
    before, quiet = os.environ.get("OMP_NUM_THREADS"), console.quiet
    os.environ["OMP_NUM_THREADS"] = "1"
    console.quiet = True
    try:
        yield
    finally:
        if "ray" in sys.modules:  # machines without Ray use this file, too
            sys.modules["ray"].shutdown()
        console.quiet = quiet
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def take_turns(
    ours: Callable[[int], Outcome], bare: Callable[[int], Outcome], pairs: int
) -> list[tuple[Outcome, Outcome]]:
    """Ours, bare, ours, bare, …: what changes on the machine meanwhile meets both; each is given the pair's number."""
    return [(ours(pair), bare(pair)) for pair in range(pairs)]


def in_subprocess(module: str, *arguments: str, threads: int | None = None) -> Any:
    """Run `python -m module --bare arguments` and return the JSON of the last line that it prints.

    Args:
        threads: as many of them instead of what the environment says.
    """
    command = [sys.executable, "-m", module, "--bare", *arguments]
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def ratio_row(name: str, unit: str, ours: Sequence[float], bare: Sequence[float]) -> dict[str, Any]:
    """Rates of both (medians), and their ratio pair by pair: median, lowest, highest."""
    ratios = [left / right for left, right in zip(ours, bare, strict=True)]
    return {
        "name": name,
        "unit": unit,
        "pairs": len(ratios),
        "ours": median(ours),
        "bare": median(bare),
        "ours/bare": median(ratios),
        "min": min(ratios),
        "max": max(ratios),
    }
