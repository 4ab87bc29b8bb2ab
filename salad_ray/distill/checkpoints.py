"""Checkpoints that do not depend on the number of workers or the ZeRO stage, written while training goes on.

A checkpoint is a folder `step-00000500-3fa1/`. Every worker writes what it owns of the fp32 weights and of the
optimizer's moments, as pieces of flattened parameters, into a safetensors file of its own; the worker of rank 0 writes
`manifest.json` when all files are there. A folder without manifest is none. To resume, a worker reads the pieces that
overlap with what it owns now, by byte range, so no conversion is needed at another world size and nobody reads it all.

The file format: 8 bytes little-endian header length, JSON header (name → dtype, shape, data_offsets), then the data.
"""

from __future__ import annotations

import json
import re
import struct
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from salad_ray.store import list_folder, read_range
from salad_ray.tables import TableError, atomic_file, delete_file, delete_folder, read_json, write_json

POLL_SECS = 0.5
WRITE_BYTES = 16 * 2**20
"""Handed on at once: an object store's client keeps what it was handed until a part is full."""
PATIENCE_SECS = 3600.0
"""How long rank 0 waits for the other workers' files; a worker that died ends the wait by ending the run."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of a flattened parameter, which stand at `offset` of a worker's partition."""

    name: str
    start: int
    numel: int
    offset: int


@dataclass
class Partition:
    """A run of parameters laid end to end, as one worker owns it."""

    weight: Tensor
    """fp32 (numel,)."""
    pieces: list[Piece]
    moments: dict[str, Tensor] = field(default_factory=dict)
    """Adam's `exp_avg` and `exp_avg_sq`, or Muon's `momentum`; like `weight`."""

    @property
    def parts(self) -> tuple[str, ...]:
        return ("weight", *self.moments)

    def part(self, name: str) -> Tensor:
        return self.weight if name == "weight" else self.moments[name]


class CheckpointWriter:
    """One worker's side of writing: `save` copies to host memory and returns; a thread does the rest.

    Args:
        url: folder of the checkpoints.
        token: what tells this attempt's folders from an earlier one's; the same on all workers.
        keep: whole checkpoints to keep, beside those that are to stay.
    """

    def __init__(self, url: str, rank: int, world_size: int, token: str, keep: int) -> None:
        self.url, self.rank, self.world_size, self.token, self.keep = url, rank, world_size, token, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self.stalled_secs = 0.0
        """Time for which training stood still."""

    def save(self, partitions: Iterable[Partition], state: Mapping[str, Any], stays: bool = False) -> None:
        """Begin to write a checkpoint; waits for the one before, and raises what went wrong with it.

        Args:
            state: plain data for the manifest, with `step`.
            stays: never pruned.
        """
        started = time.perf_counter()
        self.wait()
        folder = f"{self.url}/step-{state['step']:08d}-{self.token}"
        tensors = {
            f"{part}/{piece.start}/{piece.name}": _to_host(partition.part(part), piece)
            for partition in partitions
            for piece in partition.pieces
            for part in partition.parts
        }
        self._pending = self._thread.submit(self._write, folder, tensors, dict(state) | {"stays": stays})
        self.stalled_secs += time.perf_counter() - started

    def wait(self) -> None:
        """Return when the last checkpoint is whole, as far as this worker is concerned; raises what went wrong."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _write(self, folder: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        write_tensors(f"{folder}/{_file_name(self.rank)}", tensors)
        if self.rank == 0:
            files = _wait_for_files(folder, self.world_size)
            write_json(f"{folder}/manifest.json", {"files": files, "world_size": self.world_size} | state)
            prune(self.url, self.keep)


def _to_host(values: Tensor, piece: Piece) -> Tensor:
    own = values.detach().narrow(0, piece.offset, piece.numel)
    return own.clone() if own.device.type == "cpu" else own.cpu()


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _wait_for_files(folder: str, world_size: int) -> dict[str, int]:
    """Sizes of all workers' files, once they are there; each appears whole."""
    deadline = time.monotonic() + PATIENCE_SECS
    names = [_file_name(rank) for rank in range(world_size)]
    while not set(names) <= (found := _files(folder)).keys():
        if time.monotonic() > deadline:
            missing = next(name for name in names if name not in found)
            raise TableError(f"{folder}/{missing} was not written within {PATIENCE_SECS / 60:.0f} minutes")
        time.sleep(POLL_SECS)
    return {name: found[name] for name in names}


def _files(folder: str) -> dict[str, int]:
    return {name: entry["size"] for name, entry in list_folder(folder).items()}


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    url: str
    state: dict[str, Any]
    """Its manifest."""

    @property
    def step(self) -> int:
        return self.state["step"]


def keep(checkpoint: Checkpoint) -> None:
    """Let a checkpoint stay that was written on the way."""
    write_json(f"{checkpoint.url}/manifest.json", checkpoint.state | {"stays": True})


def new_token() -> str:
    return uuid.uuid4().hex[:8]


def latest(
    url: str, complain: Callable[[str], None] = lambda _: None, last_step: int | None = None
) -> Checkpoint | None:
    """The newest whole checkpoint, up to `last_step`; `complain` is told of every newer one that is not whole, and
    why."""
    for folder in _folders(url):
        if last_step is not None and int(folder.split("-")[1]) > last_step:
            continue
        found = _examine(f"{url}/{folder}")
        if isinstance(found, Checkpoint):
            return found
        if found:
            complain(f"checkpoint {url}/{folder} is not whole ({found}); going back to the one before it")
    return None


def checkpoint_at(url: str, step: int) -> Checkpoint:
    """The whole checkpoint of a step; raises `TableError` where there is none."""
    damages = ""
    for folder in _folders(url):
        if int(folder.split("-")[1]) == step:
            found = _examine(f"{url}/{folder}")
            if isinstance(found, Checkpoint):
                return found
            damages += f"; {folder} is not whole ({found})" if found else ""
    raise TableError(f"{url} has no whole checkpoint of step {step}{damages}; rerun that stage with --redo")


def _examine(folder: str) -> Checkpoint | str:
    """The checkpoint in a folder, or what it lacks to be one; "" where no worker wrote anything."""
    found = _files(folder)
    if "manifest.json" not in found:
        return "its writing was interrupted" if any(name.endswith(".safetensors") for name in found) else ""
    try:
        state: Any = read_json(f"{folder}/manifest.json")
    except ValueError:
        state = None
    if not (isinstance(state, dict) and isinstance(state.get("files"), dict) and {"step", "stays"} <= state.keys()):
        return "its manifest.json is damaged"
    broken = next((name for name, size in state["files"].items() if found.get(name) != size), None)
    if broken is None:
        return Checkpoint(folder, state)
    return f"{broken} is missing" if broken not in found else f"{broken} has {found[broken]:,} bytes"


def _folders(url: str) -> list[str]:
    """Names of the checkpoints' folders, the newest first."""
    return sorted((name for name in list_folder(url) if re.fullmatch(r"step-\d+-\w+", name)), reverse=True)


def prune(url: str, keep: int) -> None:
    """Delete all but the newest `keep` whole checkpoints and those that stay, and what interrupted writing left."""
    whole: list[str] = []
    stay: set[str] = set()
    folders = _folders(url)
    for folder in folders:
        found = _examine(f"{url}/{folder}")
        if isinstance(found, Checkpoint):
            whole.append(folder)
            stay |= {folder} if found.state["stays"] else set()
    newest = whole[0] if whole else ""
    kept = set(whole[:keep]) | stay
    for folder in folders:
        if folder not in kept and folder < newest:
            _delete(f"{url}/{folder}")


def _delete(url: str) -> None:
    delete_file(f"{url}/manifest.json")  # first: half a deletion must not look whole
    delete_folder(url)


class CheckpointReader:
    """Fills partitions from a checkpoint, whoever wrote it: only the bytes that are needed are read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._saved: dict[str, list[tuple[int, int, str, int]]] = {}
        """Part and parameter → first element, number, file and place in it of every piece."""
        self._url, self._parts = checkpoint.url, dict[str, set[str]]()
        for file in checkpoint.state["files"]:
            url = f"{checkpoint.url}/{file}"
            for name, tensor in read_header(url).items():
                part, start, parameter = name.split("/", 2)
                begin, end = tensor["data_offsets"]
                saved = (int(start), (end - begin) // 4, url, begin)
                self._saved.setdefault(f"{part}/{parameter}", []).append(saved)
                self._parts.setdefault(parameter, set()).add(part)

    def fill(self, partition: Partition) -> None:
        """Overwrite weights and moments; raises `TableError` where the checkpoint has no such elements."""
        for piece in partition.pieces:
            self._require_same_optimizer(partition, piece.name)
        for part in partition.parts:
            values = partition.part(part)
            for piece in partition.pieces:
                values.narrow(0, piece.offset, piece.numel).copy_(self._read(part, piece))

    def _require_same_optimizer(self, partition: Partition, name: str) -> None:
        saved = self._parts.get(name)
        if saved and saved != set(partition.parts):
            raise TableError(
                f"the checkpoint {self._url} is of another optimizer: of {name} it holds {', '.join(sorted(saved))}, "
                f"and {', '.join(sorted(partition.parts))} is needed; set distill.optimizer as it was, or train anew"
            )

    def _read(self, part: str, piece: Piece) -> Tensor:
        values = torch.empty(piece.numel)
        num_found = 0
        for start, numel, url, begin in self._saved.get(f"{part}/{piece.name}", []):
            first, last = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            if first < last:
                found = _read_floats(url, begin + 4 * (first - start), last - first)
                values[first - piece.start : last - piece.start] = found
                num_found += last - first
        if num_found != piece.numel:
            raise TableError(
                f"the checkpoint holds {num_found:,} of the {piece.numel:,} elements of {part} {piece.name} that are "
                "needed; it is of another model"
            )
        return values


def write_tensors(url: str, tensors: Mapping[str, Tensor]) -> None:
    """Write fp32 CPU tensors as a safetensors file, without a second copy in memory; appears whole or not at all."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}, but a checkpoint holds float32")
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + 4 * tensor.numel()]}
        end += 4 * tensor.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(url) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            data = tensor.contiguous().numpy().data.cast("B")
            for start in range(0, len(data), WRITE_BYTES):
                file.write(data[start : start + WRITE_BYTES])


def read_header(url: str) -> dict[str, Any]:
    """The header of a safetensors file, with `data_offsets` from the beginning of the file."""
    [length] = struct.unpack("<Q", read_range(url, 0, 8))
    header = json.loads(read_range(url, 8, 8 + length))
    header.pop("__metadata__", None)
    for tensor in header.values():
        tensor["data_offsets"] = [8 + length + offset for offset in tensor["data_offsets"]]
    return header


def _read_floats(url: str, begin: int, number: int) -> Tensor:
    data = read_range(url, begin, begin + 4 * number)
    if len(data) != 4 * number:
        raise TableError(f"{url} ends in the middle of a tensor; delete its folder to resume from an earlier one")
    return torch.frombuffer(bytearray(data), dtype=torch.float32)
