"""`python -m benchmarks [name …] [--full]`: all of them, the quick ones first; one table each."""

from __future__ import annotations

import argparse
import importlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

console = Console(highlight=False)
if not console.is_terminal:  # a log has room for a row
    console.width = 150


@dataclass(frozen=True)
class Benchmark:
    """What the user is told before and beside the numbers."""

    minutes: float
    """On two cores."""
    title: str
    aim: str


BENCHMARKS = {
    "packing": Benchmark(0.5, "Packing at LibriHeavy-like lengths", "fill ≥ 99 %"),
    "spoken": Benchmark(
        1, "Real text as it is read, beside what eSpeak NG alone makes of it", "no sign dropped or misread"
    ),
    "alignment": Benchmark(2, "Word alignment at known joins of recordings", "errors within a frame of 80 ms"),
    "loss": Benchmark(2, "distillation_loss beside dense PyTorch and Liger", "memory ≤ 1/8 of dense; time ≤ both"),
    "attention": Benchmark(1, "Packed rows on a CPU, sample by sample, beside a masked row", "ours/bare ≥ 1"),
    "training": Benchmark(4, "Training loop beside a bare PyTorch loop", "ours/bare ≥ 0.95"),
    "checkpoint": Benchmark(2, "Checkpoints beside DeepSpeed's own", "stalled < 2 % of the steps between two"),
    "memory": Benchmark(4, "The planner's memory beside a real training step", "within 15 %"),
    "draw": Benchmark(3, "Drawing 1 % of 10 M passages beside pandas", "≤ 60 s and ≤ 2 GB"),
    "kmeans": Benchmark(
        14, "Balanced k-means beside faiss and k-means-constrained", "≤ 2 × faiss, skewed ≤ 2.5; ≤ 1.05 × mean size"
    ),
    "embedding": Benchmark(9, "Embedding beside SentenceTransformer.encode alone", "ours/bare ≥ 0.95"),
    "kokoro": Benchmark(6, "Kokoro in batches beside one text at a time", "ours/bare ≥ 1; 3 on a GPU"),
    "synthesis": Benchmark(6, "eSpeak NG through the stage beside a bare loop", "ours/bare ≥ 0.9"),
    "engine": Benchmark(6, "Web text through ingest, embed, cluster, probe and select", "time linear, memory flat"),
    "nodes": Benchmark(15, "Stages on two nodes and on one; the driver's memory", "efficiency near 1; memory flat"),
    "scoring": Benchmark(6, "Scoring with a shared prompt beside each choice alone", "≥ 2 × faster, same numbers"),
    "reader": Benchmark(3, "Reading beside what a training rank needs; planning", "≥ 3 × the need; waiting < 5 %"),
    "lists": Benchmark(
        3, "Ids, Kaldi folders and cuts beside Python's set and lhotse", "memory a half or less; or as fast"
    ),
    "recorded": Benchmark(
        40, "Ingest, align and encode beside a bare loop; 1 h to 20 h", "ours/bare ≥ 0.9; memory flat"
    ),
    "device": Benchmark(3, "Decoding ahead of a stand-in device of 1,000 × real time", "busy ≥ 95 %"),
    "encoding": Benchmark(4, "Encoding stage beside a bare loop", "ours/bare ≥ 0.95 for Mimi, steady"),
}
"""In the order in which they run."""


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Ratios, side by side in one run.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"which: {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument(
        "--full", action="store_true", help="the loss at all sizes, and the plan of a million utterances"
    )
    options = parser.parse_args()
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    chosen = [name for name in BENCHMARKS if name in options.names or not options.names]
    minutes = sum(BENCHMARKS[name].minutes for name in chosen)
    console.print(f"{', '.join(chosen)}: about {minutes:g} minutes on two cores; keep the machine quiet meanwhile")
    for name in chosen:
        show(name, options.full)


def show(name: str, full: bool) -> None:
    """Run one benchmark and print its table, or why it is left out."""
    benchmark = BENCHMARKS[name]
    missing = missing_data(name)
    if missing:
        console.print(f"\n{name}: left out, {missing}")
        return
    console.print(f"\n{name}: about {benchmark.minutes:g} minutes …")
    started = time.monotonic()
    options = {"full": True} if full and name in ("loss", "reader") else {}
    rows = importlib.import_module(f"benchmarks.{name}").run(**options)
    secs = time.monotonic() - started
    console.print(grid(f"{benchmark.title} ({secs:.0f} s; aim: {benchmark.aim})", rows))


def missing_data(name: str) -> str:
    """Why a benchmark cannot run here, if it cannot."""
    needed = {"alignment": "speech", "recorded": "speech", "scoring": "benchmarks"}.get(name)
    folder = Path(os.environ.get("SALAD_DATA", "../shared/data"))
    if needed is not None and not (folder / needed).is_dir():
        return f"as there is no {folder / needed}; set SALAD_DATA to the folder that holds {needed}/"
    return ""


def grid(title: str, rows: list[dict[str, Any]]) -> Grid:
    table = Grid(title=title, title_justify="left")
    for key, value in rows[0].items():
        table.add_column(key, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(cell(value) for value in row.values()))
    return table


def cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


if __name__ == "__main__":
    main()
