"""The process of one section: `python -m benchmarks.gpu.worker MODULE:FUNCTION DIR [--tiny]`.

The function gets a `Context` and yields rows: flat dicts with a `name`, measured values, and `ok` where a row is a
check. A row is handed on as soon as it is yielded. A package that is missing is no failure: it is said by name.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import LEFT_OUT, ROW

OURS = ("salad_ray", "benchmarks", "tests")


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
        entry = json.loads((self.folder / "gpu.json").read_text(encoding="utf-8"))["sections"].get(section, {})
        rows: list[dict[str, Any]] = entry.get("rows", [])
        return rows


def main() -> None:
    target, folder, *flags = sys.argv[1:]
    warnings.filterwarnings("ignore", category=FutureWarning)
    tiny = "--tiny" in flags
    if not tiny and not torch.cuda.is_available():
        print(f"{LEFT_OUT}torch sees no GPU here, and the full shapes take hours on a CPU; --tiny runs on one")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module, _, function = target.partition(":")
    try:
        for row in getattr(importlib.import_module(module), function)(Context(device, tiny, Path(folder))):
            print(ROW + json.dumps(row), flush=True)
    except ImportError as error:
        if (error.name or "").split(".")[0] in OURS:
            raise
        print(LEFT_OUT + missing(error))


def missing(error: ImportError) -> str:
    """What is not installed, or too old: a package without a name that a later version has."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return (
        f"{error.name} {version_of(error.name or '')} is another version than this needs ({error.msg.split(' (')[0]})"
    )


def version_of(package: str) -> str:
    """The version that is installed, or "missing"."""
    try:
        return importlib.metadata.version(package.split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return "missing"


if __name__ == "__main__":
    main()
