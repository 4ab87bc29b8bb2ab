"""What a corpus lists, read without its audio: our set of ids beside Python's, our readers of Kaldi's folders and of
lhotse's cuts beside lhotse's own.

    python -m benchmarks lists

CPU time, and peak memory above that of the start, of a process each, taking turns. Ours make the same rows with every
check; of lhotse's only what its own objects hold. Kaldi's recordings have `reco2dur`, or lhotse would open them all.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import PAIRS, in_subprocess, ratio_row, take_turns
from salad_ray.speech.kaldi import read_kaldi
from salad_ray.speech.lhotse_cuts import read_cuts
from salad_ray.speech.readers import IdSet

LISTED = {"ids": 2_000_000, "kaldi": 200_000, "cuts": 50_000}
CUTS_PER_RECORDING = 100
SENTENCE = "and so it was that nobody heard of them again until the winter had come and gone over the hills"


def run(pairs: int = PAIRS, listed: dict[str, int] = LISTED) -> list[dict[str, Any]]:
    """Two rows for each kind of list."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="salad-bench-") as folder:
        write_lists(Path(folder), listed)
        for what, number in listed.items():
            ours, others = (partial(turn, folder, what, number, whose) for whose in ("ours", "others"))
            turns = take_turns(ours, others, pairs)
            for unit in ("rows/CPU s", "MiB"):
                sides = zip(*((own[unit], other[unit]) for own, other in turns), strict=True)
                rows.append(ratio_row(f"{what}, {number:,}", unit, *sides))
    return rows


def turn(folder: str, what: str, number: int, whose: str, _: int) -> dict[str, float]:
    """`read_list` in a process of its own."""
    found: dict[str, float] = in_subprocess("benchmarks.lists", folder, what, str(number), whose)
    return found


def write_lists(folder: Path, listed: dict[str, int]) -> None:
    """A Kaldi folder with segments, and cuts as LibriHeavy has them, of recordings that are not there."""
    recordings = range(max(listed.values()) // CUTS_PER_RECORDING)
    with ExitStack() as files:
        wavs, lengths, texts, segments, speakers = (
            files.enter_context((folder / name).open("w"))
            for name in ("wav.scp", "reco2dur", "text", "segments", "utt2spk")
        )
        for recording in recordings:
            wavs.write(f"rec-{recording} /audio/rec-{recording}.flac\n")
            lengths.write(f"rec-{recording} 1500.0\n")
        for number in range(listed["kaldi"]):
            recording, start = number // CUTS_PER_RECORDING, number % CUTS_PER_RECORDING * 15.0
            texts.write(f"rec-{recording}-{number:08d} {SENTENCE}\n")
            segments.write(f"rec-{recording}-{number:08d} rec-{recording} {start:.2f} {start + 14.5:.2f}\n")
            speakers.write(f"rec-{recording}-{number:08d} speaker-{recording}\n")
    with (folder / "cuts.jsonl").open("w") as file:
        for number in range(listed["cuts"]):
            file.write(json.dumps(cut_of(number // CUTS_PER_RECORDING, number)) + "\n")


def cut_of(recording: int, number: int) -> dict[str, Any]:
    """As LibriHeavy's second step writes them."""
    name, start = f"small/{recording}/book/chapter", number % CUTS_PER_RECORDING * 15.0
    source = {"type": "file", "channels": [0], "source": f"{name}.flac"}
    audio = {"id": name, "sources": [source], "sampling_rate": 16000, "num_samples": 24_000_000, "duration": 1500.0}
    supervision = {"id": f"{name}_{number}", "recording_id": name, "start": 0.0, "duration": 14.5, "channel": 0}
    supervision |= {"text": SENTENCE, "language": "English", "speaker": str(recording)}
    cut = {"id": f"{name}_{number}", "start": start, "duration": 14.5, "channel": 0, "type": "MonoCut"}
    return cut | {"supervisions": [supervision], "recording": audio}


def read_list(folder: str, what: str, number: int, whose: str) -> dict[str, float]:
    """Read all of it once; nothing is kept but what the reader itself keeps."""
    if what != "ids":
        importlib.import_module("lhotse.kaldi")  # before the clock runs; it imports torch
        next(READERS["cuts", whose](folder, 1))  # and more with the first cut
    rows = READERS[what, whose](folder, number)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    started, before = time.process_time(), peak_mib()
    num_rows = sum(1 for _ in rows)
    assert num_rows >= number, f"{num_rows} rows"
    return {"rows/CPU s": number / (time.process_time() - started), "MiB": peak_mib() - before}


def peak_mib() -> float:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10


def ids_of_ours(_: str, number: int) -> Iterator[str]:
    seen = IdSet()
    return (name for name in names(number) if seen.add(name))


def ids_of_others(_: str, number: int) -> Iterator[str]:
    seen = set[str]()
    for name in names(number):
        if name not in seen:
            seen.add(name)
            yield name


def names(number: int) -> Iterator[str]:
    return (f"corpus/rec-{each // CUTS_PER_RECORDING}-{each:08d}" for each in range(number))


def kaldi_of_others(folder: str, _: int) -> Iterator[Any]:
    from lhotse.kaldi import load_kaldi_data_dir

    yield from load_kaldi_data_dir(folder, 16_000)[1]


def cuts_of_others(folder: str, _: int) -> Iterator[Any]:
    from lhotse import CutSet

    return iter(CutSet.from_jsonl_lazy(f"{folder}/cuts.jsonl"))


READERS: dict[tuple[str, str], Callable[[str, int], Iterator[Any]]] = {
    ("ids", "ours"): ids_of_ours,
    ("ids", "others"): ids_of_others,
    ("kaldi", "ours"): lambda folder, _: read_kaldi(folder, "corpus", "/audio", allow_outside=True),
    ("kaldi", "others"): kaldi_of_others,
    ("cuts", "ours"): lambda folder, _: read_cuts(f"{folder}/cuts.jsonl", "corpus", "/audio", "book", False),
    ("cuts", "others"): cuts_of_others,
}
"""By kind of list, ours and what a user would take instead."""


def main() -> None:
    if "--bare" in sys.argv:
        folder, what, number, whose = sys.argv[-4:]
        print(json.dumps(read_list(folder, what, int(number), whose)))
    else:
        for row in run():
            print(json.dumps(row))


if __name__ == "__main__":
    main()
