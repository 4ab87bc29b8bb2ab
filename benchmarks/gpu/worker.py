"""The process of one section: `python -m benchmarks.gpu.worker MODULE:FUNCTION DIR RUNNER [--tiny]`.

The function gets a `Context` and yields rows: flat dicts with a `name`, measured values, `ok` where a row is a check,
and `default` where only some rows are of the pipeline's own settings. A row is handed on as soon as it is yielded, and
takes the place of one of its name: what is wanted most may come early and be refined. Neither a package that is missing
nor memory that does not suffice is a failure: the one is said by name, the other is a row. RUNNER is the process that
must not be outlived.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import json
import math
import os
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import END, LEFT_OUT, ROW
from benchmarks.gpu.summary import rows_of

OURS = ("salad_ray", "benchmarks", "tests")
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Context:
    """What a section is told."""

    device: torch.device
    tiny: bool
    folder: Path
    """Where `gpu.json` lies, with the rows of the sections before."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def rows_of(self, section: str) -> list[dict[str, Any]]:
        """What an earlier section has measured."""
        return list(rows_of(json.loads((self.folder / "gpu.json").read_text(encoding="utf-8")), section))


def main() -> None:
    target, folder, runner, *flags = sys.argv[1:]
    die_with(int(runner))
    warnings.filterwarnings("ignore", category=FutureWarning)
    tiny = "--tiny" in flags
    # Threads that share toy shapes wait for each other longer than they work, above all on a busy machine.
    torch.set_num_threads(1 if tiny else num_cpus())
    if not tiny and not torch.cuda.is_available():
        hand_on(LEFT_OUT, "torch sees no GPU here, and the full shapes take hours on a CPU; --tiny runs on one")
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        _run(target, Context(device, tiny, Path(folder)))
    hand_on(END, "")
    os._exit(0)  # what a library does at its end (NCCL may hang there) is of no interest


def die_with(parent: int) -> None:
    """Let Linux kill this process when its parent is gone, which may have been killed and then ends nobody."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it is gone already
        os._exit(1)


def _run(target: str, context: Context) -> None:
    module, _, function = target.partition(":")
    try:
        for row in getattr(importlib.import_module(module), function)(context):
            hand_on(ROW, json.dumps({key: _finite(value) for key, value in row.items()}))
    except ImportError as error:
        hand_on(LEFT_OUT, missing(error))
    except RuntimeError as error:
        hand_on(ROW, json.dumps(out_of_memory(error, "the section")))


def hand_on(kind: str, text: str) -> None:
    """A line for the runner, in one piece, whatever unfinished line a library has left on the screen."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(1, f"\n{kind}{text}\n".encode())


def out_of_memory(error: RuntimeError, name: str) -> dict[str, Any]:
    """The row of what did not fit; any other error is raised again. cuBLAS has words of its own for it."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text:
        return {"name": name, "out_of_memory": True, "reason": text.strip().splitlines()[0][:200]}
    raise error


def reason(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def missing(error: ImportError) -> str:
    """What is not installed, or too old: a package without a name that a later version has.

    An import that fails in our own code, or for a reason that it does not name, is raised again.
    """
    package = (error.name or "").split(".")[0]
    if not package or package in OURS:
        raise error
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{package} {version_of(package)} is another version than this needs ({error.msg.split(' (')[0]})"


def version_of(package: str) -> str:
    """The version that is installed, or "missing"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def num_cpus() -> int:
    """CPUs that this process may use, which in a container can be fewer than the machine has."""
    number = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return number
    return number if quota == "max" else max(1, min(number, int(quota) // int(period)))


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
