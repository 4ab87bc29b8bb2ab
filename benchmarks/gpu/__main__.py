"""`python -m benchmarks.gpu --out DIR [--only NAME …] [--tiny]`: every measurement that needs a GPU.

Sections run in order of worth, each in a process of its own with a time limit. Every row goes into `DIR/gpu.json` as
soon as it is measured, so that a stop in the middle, whatever its cause, loses what was being measured and no more.
`DIR/gpu.md` has the same as tables, `DIR/gpu.log` what the sections printed. This file imports neither torch nor
anything of the project: it starts at once and outlives whatever a section does.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
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
    Section("kokoro", "benchmarks.gpu.kokoro:rows", 120, "Kokoro in batches beside one text at a time"),
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
        self.content: dict[str, Any] = {"tiny": tiny, "runs": [], "sections": {}}
        if self.path.exists():
            self.content = self._earlier(tiny)
        self.content["runs"].append(circumstances())
        self.save()

    def _earlier(self, tiny: bool) -> dict[str, Any]:
        """What is there stays, for the sections that are not run again."""
        try:
            content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            markdown(content)  # which fails without what belongs there
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadRequest(f"{self.path}: is no file of this benchmark; give another --out, or remove it") from None
        if content["tiny"] != tiny:
            kinds = ("a run at full size", "a run with --tiny")
            was, wanted = kinds[bool(content["tiny"])], kinds[tiny]
            raise BadRequest(f"{self.path}: is of {was}, and this is {wanted}; give another --out")
        return content

    def begin(self, section: Section, limit_secs: float) -> dict[str, Any]:
        """A section's entry, which `save` writes with all that is put into it.

        What was measured before stays in it as `previous` until `end` finds everything measured anew.
        """
        before = self.content["sections"].pop(section.name, {})
        previous = before if before.get("rows") else before.get("previous")
        entry = {
            "title": section.title,
            "status": "running",
            "began": now(),
            "limit_secs": round(limit_secs),
            "rows": [],
        }
        if previous:
            entry["previous"] = previous
        self.content["sections"][section.name] = entry
        self.save()
        return entry

    def end(self, entry: dict[str, Any]) -> None:
        if entry["status"] == "done" and not any(row.get("out_of_memory") for row in entry["rows"]):
            entry.pop("previous", None)
        self.save()

    def leave_out(self, section: Section, reason: str) -> None:
        """What an earlier run has measured stays as it is."""
        entry = {"title": section.title, "status": "left out", "reason": reason, "rows": []}
        self.content["sections"].setdefault(section.name, entry)
        self.save()

    def save(self) -> None:
        """Whole or not at all."""
        new = self.path.with_suffix(".json.new")
        new.write_text(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        new.replace(self.path)
        self.path.with_suffix(".md").write_text(markdown(self.content), encoding="utf-8")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def circumstances() -> dict[str, str | None]:
    """When, of which commit, how and on what a run was started; None where a machine cannot tell."""
    query = "--query-gpu=name,memory.total,driver_version"
    return {
        "date": now(),
        "commit": output_of("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "gpu, memory, driver": output_of("nvidia-smi", query, "--format=csv,noheader"),
    }


def output_of(*command: str) -> str | None:
    try:
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return ended.stdout.strip()


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
        if limit_secs < 10:
            reason = f"the {minutes:g} minutes of the whole run are over"
            results.leave_out(section, reason)
            print(f"{section.name}: left out: {reason}", flush=True)
            continue
        print(f"{section.name}: {section.title} (at most {limit_secs:.0f} s) …", flush=True)
        entry = results.begin(section, limit_secs)
        _run_section(section, folder, tiny, limit_secs, entry, results)
        results.end(entry)
        print(f"{section.name}: {describe(entry)}", flush=True)
    return results.content


def _run_section(
    section: Section, folder: Path, tiny: bool, limit_secs: float, entry: dict[str, Any], results: Results
) -> None:
    """One section's process, from its start to its end, which is forced when the time is over."""
    started = time.monotonic()
    worker = ["-m", "benchmarks.gpu.worker", section.target, str(folder), str(os.getpid()), *(["--tiny"] * tiny)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"}
    with (folder / "gpu.log").open("a", encoding="utf-8") as log:
        log.write(f"== {section.name}, {entry['began']} ==\n")
        process = subprocess.Popen(
            [sys.executable, *worker], cwd=ROOT, env=os.environ | settings | {"PYTHONPATH": path},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace",
            start_new_session=True,
        )  # fmt: skip
        try:
            how, said = _collect(process, started + limit_secs, log, entry, results)
        except KeyboardInterrupt:
            entry |= {"status": "interrupted", "secs": round(time.monotonic() - started, 1)}
            results.end(entry)
            raise
        finally:
            _end(process)
    entry["secs"] = round(time.monotonic() - started, 1)
    if how == "overran":
        cut = "" if limit_secs == section.limit_secs else ", as the time of the whole run was over"
        entry |= {"status": "overran", "reason": f"stopped after {limit_secs:.0f} s{cut}"}
    elif entry["status"] == "running":
        entry |= _outcome(0 if how == "finished" else process.returncode, entry["rows"], said)


def _collect(
    process: subprocess.Popen[str], deadline: float, log: IO[str], entry: dict[str, Any], results: Results
) -> tuple[Literal["finished", "died", "overran"], str]:
    """Keep every row that arrives, until the section says that it is done, or its process is gone, or time is over.

    What a section leaves behind may hold its output open, so that does not count.

    Returns:
        How it ended, and the last line that is no row.
    """
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)

    threading.Thread(target=read, daemon=True).start()
    said = ""
    while time.monotonic() < deadline:
        is_gone = process.poll() is not None
        try:
            line = lines.get(timeout=0.5)
        except queue.Empty:
            if is_gone:
                return "died", said
            continue
        if line.startswith(ROW):
            row = json.loads(line.removeprefix(ROW))
            put(row, entry["rows"])
            results.save()
            print(f"  {one_line(row)}", flush=True)
        elif line.startswith(LEFT_OUT):
            entry |= {"status": "left out", "reason": line.removeprefix(LEFT_OUT).strip()}
        elif line.startswith(END):
            return "finished", said
        else:
            log.write(line)
            log.flush()
            said = line.strip() or said
    return "overran", said


def put(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """At the end, or in the place of the row of its name: more is known of the same."""
    names = [each["name"] for each in rows]
    at = names.index(row["name"]) if row["name"] in names else len(rows)
    rows[at : at + 1] = [row]


def _end(process: subprocess.Popen[str]) -> None:
    """The process, if it is still there, and all that it has left behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(returncode: int, rows: list[dict[str, Any]], said: str) -> dict[str, Any]:
    """Status and reason of a section whose process has ended; `said` is the last line of its log."""
    wrong = [row["name"] for row in rows if row.get("ok") is False]
    if returncode:
        how = f"signal {-returncode}" if returncode < 0 else f"exit status {returncode}"
        return {"status": "failed", "reason": f"{said[:300] or 'it said nothing'} ({how}; see gpu.log)"}
    if wrong:
        return {"status": "failed", "reason": f"failed or out of tolerance: {', '.join(wrong)}"}
    if not rows:
        return {"status": "failed", "reason": "it ended without a row; see gpu.log"}
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
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for gpu.json, gpu.md and gpu.log"
    )
    names = ", ".join(section.name for section in SECTIONS)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help=f"sections to run: {names}")
    parser.add_argument("--tiny", action="store_true", help="toy shapes: every path, in two minutes, also on a CPU")
    told = f"for the whole run ({MINUTES:g} by default, and {TINY_PATIENCE * MINUTES:g} with --tiny)"
    parser.add_argument("--minutes", type=float, help=told)
    options = parser.parse_args()
    minutes = MINUTES * (TINY_PATIENCE if options.tiny else 1) if options.minutes is None else options.minutes
    if not minutes > 0:
        parser.error(f"--minutes {minutes:g}: give more than none")
    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the section ends and its rows are kept
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        chosen = choose(options.only, options.tiny)
        content = run_sections(chosen, options.out, options.tiny, minutes)
    except (BadRequest, FileExistsError, NotADirectoryError, PermissionError) as error:
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
    return 0 if all(content["sections"][section.name]["status"] in good for section in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
