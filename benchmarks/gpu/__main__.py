"""`python -m benchmarks.gpu --out DIR [--only NAME …] [--tiny]`: every measurement that needs a GPU.

Sections run in order of worth, each in a process of its own with a time limit. Every row goes into `DIR/gpu.json` as
soon as it is measured, so that a stop in the middle, whatever its cause, loses what was being measured and no more.
`DIR/gpu.md` has the same as tables, `DIR/<section>.log` what a section printed. This file imports neither torch nor
anything of the project: it starts at once and outlives whatever a section does.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

from benchmarks.gpu import END, LEFT_OUT, ROW
from benchmarks.gpu.summary import markdown, verdicts

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 8.0
TINY_PATIENCE = 4
"""Limits are for a GPU; toy shapes run on any CPU, busy ones too, and have so many times as long."""


@dataclass(frozen=True)
class Section:
    """One measurement: `target` is a function `module:name` that yields rows, see `worker.py`."""

    name: str
    target: str
    limit_secs: float
    title: str


SECTIONS = (
    Section("machine", "benchmarks.gpu.machine:rows", 60, "The machine's own limits"),
    Section("correctness", "benchmarks.gpu.correctness:rows", 120, "The same numbers on the GPU"),
    Section("training", "benchmarks.gpu.training:engine_rows", 150, "A training step, Qwen2.5-3B's shape"),
    Section("training-bare", "benchmarks.gpu.training:bare_rows", 75, "The best of these in a bare PyTorch loop"),
    Section("loss", "benchmarks.gpu.loss:rows", 100, "The distillation loss beside dense PyTorch and Liger"),
    Section("kokoro", "benchmarks.gpu.kokoro:rows", 75, "Kokoro in batches beside one text at a time"),
    Section("mimi", "benchmarks.gpu.mimi:rows", 75, "Mimi by batch, and the threads that feed it"),
    Section("embedding", "benchmarks.gpu.embedding:rows", 75, "Sentence embeddings, all-MiniLM-L6-v2's shape"),
    Section("kmeans", "benchmarks.gpu.kmeans:rows", 120, "Balanced k-means beside faiss.Kmeans"),
    Section("training-compiled", "benchmarks.gpu.training:compiled_rows", 120, "The best of these, compiled"),
)
"""In the order in which they run: what is missed most comes first, what may take longest last."""


class BadRequest(ValueError):
    """Arguments or files that the user has to mend; the message says how."""


class Results:
    """`gpu.json` and `gpu.md`, written anew whenever something changes."""

    def __init__(self, folder: Path, tiny: bool) -> None:
        self.path = folder / "gpu.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.content: dict[str, Any] = {"tiny": tiny, "sections": {}}
        if self.path.exists():
            self.content = self._earlier(tiny)
        self._write()

    def _earlier(self, tiny: bool) -> dict[str, Any]:
        """What is there stays, for the sections that are not run again."""
        try:
            content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            was_tiny = content["tiny"]
        except (ValueError, KeyError, TypeError):
            raise BadRequest(f"{self.path}: is no file of this benchmark; give another --out, or remove it") from None
        if was_tiny != tiny:
            kinds = {True: "a run with --tiny", False: "a run at full size"}
            raise BadRequest(f"{self.path}: is of {kinds[was_tiny]}, and this is {kinds[tiny]}; give another --out")
        return content

    def begin(self, section: Section, limit_secs: float) -> dict[str, Any]:
        """A section's entry, which `save` writes with all that is put into it."""
        entry = {"title": section.title, "status": "running", "limit_secs": round(limit_secs), "rows": []}
        self.content["sections"].pop(section.name, None)
        self.content["sections"][section.name] = entry
        self.save()
        return entry

    def save(self) -> None:
        """Whole or not at all."""
        self._write()
        self.path.with_suffix(".md").write_text(markdown(self.content), encoding="utf-8")

    def _write(self) -> None:
        new = self.path.with_suffix(".json.new")
        new.write_text(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        new.replace(self.path)


def run_sections(sections: Sequence[Section], folder: Path, tiny: bool, minutes: float = MINUTES) -> dict[str, Any]:
    """Run sections one after the other; returns what `gpu.json` holds then.

    A section that fails, overruns its limit or needs a package that is missing ends for itself, and the next begins.
    Those that could only begin after `minutes` are left out.

    Raises:
        BadRequest: `folder` holds something else.
        KeyboardInterrupt: with the section at hand stopped, and what it had measured kept.
    """
    results = Results(folder, tiny)
    ends = time.monotonic() + 60 * minutes
    for section in sections:
        limit_secs = min(section.limit_secs, ends - time.monotonic())
        entry = results.begin(section, max(limit_secs, 0))
        if limit_secs < 10:
            entry |= {"status": "left out", "reason": f"the {minutes:g} minutes of the whole run are over"}
        else:
            print(f"{section.name}: {section.title} (at most {limit_secs:.0f} s) …", flush=True)
            _run_section(section, folder, tiny, limit_secs, entry, results)
        results.save()
        print(f"{section.name}: {describe(entry)}", flush=True)
    return results.content


def _run_section(
    section: Section, folder: Path, tiny: bool, limit_secs: float, entry: dict[str, Any], results: Results
) -> None:
    """One section's process, from its start to its end, which is forced when the time is over."""
    started = time.monotonic()
    command = [sys.executable, "-m", "benchmarks.gpu.worker", section.target, str(folder), *(["--tiny"] * tiny)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "true"}
    with (folder / f"{section.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip
        try:
            how = _collect(process, started + limit_secs, log, entry, results)
        except KeyboardInterrupt:
            entry |= {"status": "interrupted", "secs": round(time.monotonic() - started, 1)}
            results.save()
            raise
        finally:
            _end(process)
    entry["secs"] = round(time.monotonic() - started, 1)
    if how == "overran":
        cut = "" if limit_secs == section.limit_secs else ", as the time of the whole run was over"
        entry |= {"status": "overran", "reason": f"stopped after {limit_secs:.0f} s{cut}"}
    elif entry["status"] == "running":
        returncode = 0 if how == "finished" else process.returncode
        entry |= _outcome(returncode, entry["rows"], folder / f"{section.name}.log")


def _collect(
    process: subprocess.Popen[str], deadline: float, log: IO[str], entry: dict[str, Any], results: Results
) -> Literal["finished", "died", "overran"]:
    """Keep every row that arrives, until the section says that it is done, or its process is gone, or time is over.

    What a section leaves behind may hold its output open, so that does not count.
    """
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)

    threading.Thread(target=read, daemon=True).start()
    while time.monotonic() < deadline:
        is_gone = process.poll() is not None
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            if is_gone:
                return "died"
            continue
        if line.startswith(ROW):
            entry["rows"].append(json.loads(line.removeprefix(ROW)))
            results.save()
            print(f"  {one_line(entry['rows'][-1])}", flush=True)
        elif line.startswith(LEFT_OUT):
            entry |= {"status": "left out", "reason": line.removeprefix(LEFT_OUT).strip()}
        elif line.startswith(END):
            return "finished"
        else:
            log.write(line)
            log.flush()
    return "overran"


def _end(process: subprocess.Popen[str]) -> None:
    """The process, if it is still there, and all that it has left behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(returncode: int, rows: list[dict[str, Any]], log: Path) -> dict[str, Any]:
    """Status and reason of a section whose process has ended."""
    wrong = [row["name"] for row in rows if row.get("ok") is False]
    if returncode:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
        how = f"signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
        return {"status": "failed", "reason": f"{said[-1][:300]} ({how}; see {log.name})"}
    if wrong:
        return {"status": "failed", "reason": f"out of tolerance: {', '.join(wrong)}"}
    if not rows:
        return {"status": "failed", "reason": f"it ended without a row; see {log.name}"}
    return {"status": "done"}


def describe(entry: dict[str, Any]) -> str:
    """A section's end in a line."""
    secs = f" in {entry['secs']:.0f} s" if "secs" in entry else ""
    reason = f": {entry['reason']}" if "reason" in entry else ""
    return f"{entry['status']}{secs}, {len(entry['rows'])} rows{reason}"


def one_line(row: dict[str, Any]) -> str:
    """A row as it is shown while the sections run."""
    cells = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    return ", ".join(cells).removeprefix("name ")


def choose(only: Sequence[str], tiny: bool) -> list[Section]:
    """The sections that are called by these names, in their usual order; all for none.

    Raises:
        BadRequest: there is no such section.
    """
    unknown = sorted(set(only) - {section.name for section in SECTIONS})
    if unknown:
        known = ", ".join(section.name for section in SECTIONS)
        raise BadRequest(f"no section is called {', '.join(unknown)}; there are {known}")
    patience = TINY_PATIENCE if tiny else 1
    chosen = [section for section in SECTIONS if section.name in only or not only]
    return [replace(section, limit_secs=patience * section.limit_secs) for section in chosen]


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for gpu.json, gpu.md and logs")
    names = ", ".join(section.name for section in SECTIONS)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=f"sections to run: {names}")
    parser.add_argument("--tiny", action="store_true", help="toy shapes: every path, in two minutes, also on a CPU")
    told = f"for the whole run ({MINUTES:g} by default, and {TINY_PATIENCE * MINUTES:g} with --tiny)"
    parser.add_argument("--minutes", type=float, help=told)
    options = parser.parse_args()
    minutes = options.minutes or MINUTES * (TINY_PATIENCE if options.tiny else 1)
    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else a section would outlive its runner
    try:
        content = run_sections(choose(options.only, options.tiny), options.out, options.tiny, minutes)
    except (BadRequest, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was measured until then is in {options.out / 'gpu.json'}")
        return 130
    print(f"\n{time.monotonic() - started:.0f} s in all")
    for line in verdicts(content):
        print(line)
    print(
        f"All rows: {options.out / 'gpu.json'}; as tables, for docs/benchmarks.md: {options.out / 'gpu.md'}. "
        "What they mean: docs/gpu.md"
    )
    good = {"done", "left out"}
    return 0 if all(entry["status"] in good for entry in content["sections"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
