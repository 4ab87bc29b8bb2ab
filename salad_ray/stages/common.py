"""What all stages share: skip, resume or refuse; shards through Ray Data; manifests and rejects.

A stage maps items (usually the shards of its input) to shards of one table. Each item is done by a worker that lives in
a Ray Data actor and writes its shard itself, whole or not at all, under the item's name: an item that is done twice,
after a lost node say, is still there once, and a rerun does only what is missing.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import ray

from salad_ray import __version__
from salad_ray.config import Config, identity
from salad_ray.console import progress, say
from salad_ray.tables import SCHEMA_VERSION, BadInput, Reject, Table, fingerprint, read_json, to_arrow, write_json

Row = TypeVar("Row")


class StageError(RuntimeError):
    """A stage that cannot go on; the message is for the user."""


@dataclass
class ShardPart:
    """A piece of what a worker makes of one item, in order: `num_input == num_kept + len(rejects)`."""

    rows: pa.Table
    num_input: int
    num_kept: int
    rejects: list[Reject] = field(default_factory=list)
    totals: dict[str, float] = field(default_factory=dict)
    """Sums for the manifest, such as hours of audio."""


class Worker(Protocol):
    """Makes a shard of an item piece by piece, so that no shard has to fit into memory."""

    def __call__(self, payload: Any, /) -> Iterator[ShardPart]: ...


@dataclass(frozen=True)
class Stage:
    """One stage's work on one table, as its manifest describes it."""

    name: str
    table: Table
    own_config: dict[str, Any]
    inputs: dict[str, str]
    """Fingerprints of what it reads."""

    @property
    def fingerprint(self) -> str:
        return fingerprint({"schema": SCHEMA_VERSION, "config": self.own_config, "inputs": self.inputs})

    @property
    def label(self) -> str:
        return f"{self.name} set={self.table.set}" if self.table.set else self.name

    def is_done(self) -> bool:
        """Whether the table is finished; refuses one that was begun with another config."""
        manifest = self.table.manifest()
        begun = manifest or read_json(f"{self.table.url}/begun.json")
        if begun is None and self.table.shards():
            raise StageError(f"{self.table.url} holds shards, but not whose they are; {self._remedy}")
        if begun is not None and begun["fingerprint"] != self.fingerprint:
            difference = self._difference(begun)
            raise StageError(f"{self.table.url} was written with another config ({difference}); {self._remedy}")
        if manifest is None:
            return False
        lost = set(manifest.get("shards", ())) - set(self.table.shards())
        if lost:
            say(f"{self.label}: {len(lost)} shards of {self.table.url} are gone, {min(lost)} first; making them again")
        return not lost

    def begin(self) -> None:
        """Say whose output this is before the first shard is written."""
        write_json(f"{self.table.url}/begun.json", self._description())

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Write the manifest: from now on the table counts as done."""
        manifest = self._description() | facts
        write_json(f"{self.table.url}/manifest.json", manifest)
        return manifest

    @property
    def _remedy(self) -> str:
        where = f" set={self.table.set}" if self.table.set else ""
        return f"to replace it run `salad {self.name} CONFIG{where} --redo`, or choose another run_dir"

    def _description(self) -> dict[str, Any]:
        return {
            "stage": self.name,
            "fingerprint": self.fingerprint,
            "config": self.own_config,
            "inputs": self.inputs,
            "schema_version": SCHEMA_VERSION,
            "salad_ray": __version__,
            "written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def _difference(self, begun: dict[str, Any]) -> str:
        old, new = _flatten(begun["config"]), _flatten(self.own_config)
        changes = [f"{key}: {old.get(key)} → {new.get(key)}" for key in new | old if old.get(key) != new.get(key)]
        changes += [
            f"its input {name} changed" for name in self.inputs if begun["inputs"].get(name) != self.inputs[name]
        ]
        if begun["schema_version"] != SCHEMA_VERSION:
            changes.append(f"schema version {begun['schema_version']} → {SCHEMA_VERSION}")
        return "; ".join(changes[:5])


def training_budget(config: Config) -> dict[str, Any]:
    """What decides how many steps a plan must last."""
    return identity(config, "distill.num_steps", "distill.num_positions", "pack.rows_per_lane")


def finished(table: Table, writer: str) -> dict[str, Any]:
    """The manifest of an input; without it, say which stage to run."""
    manifest = table.manifest()
    if manifest is None:
        where = f" set={table.set}" if table.set else ""
        raise StageError(f"{table.url} is not finished; run `salad {writer} CONFIG{where}` first")
    return manifest


def run_shards(
    config: Config,
    stage: Stage,
    items: dict[str, Any],
    make_worker: Callable[[], Worker],
    num_gpus: float = 0.0,
    **facts: Any,
) -> None:
    """Skip the stage if it is done; else do every item whose shard is missing and write the manifest, with `facts`."""
    if stage.is_done():
        check_strict(config, stage)
        say(f"{stage.label}: done already, {stage.table.url}")
        return
    started = time.monotonic()
    stage.begin()
    counts = make_shards(config, stage, items, make_worker, num_gpus)
    stage.finish(**counts, **facts, seconds=round(time.monotonic() - started, 2))
    say(f"{stage.label}: {counts['num_kept']:,} kept in {time.monotonic() - started:.1f} s → {stage.table.url}")


def make_shards(
    config: Config, stage: Stage, items: dict[str, Any], make_worker: Callable[[], Worker], num_gpus: float = 0.0
) -> dict[str, Any]:
    """Do every item whose shard is missing; returns the counts over all items.

    Args:
        items: shard name → payload (plain JSON data) for the worker.
        make_worker: builds the worker inside its actor (a `functools.partial` of its class).
        num_gpus: GPUs of each actor.

    Raises:
        StageError: with strict=true at the first bad input; when too large a share is rejected; without items.
    """
    done = set(stage.table.shards())
    pending = {name: payload for name, payload in items.items() if name not in done}
    if done and pending:
        say(f"{stage.label}: continuing, {len(items) - len(pending)} of {len(items)} shards are there already")
    if pending:
        _map_on_ray(config, stage, pending, make_worker, num_gpus)
    return checked_counts(config, stage, list(items))


def keep_or_reject(
    stage: str, rows: Sequence[Row], key: Callable[[Row], str], work: Callable[[Row], Any], strict: bool
) -> tuple[list[Any], list[Reject]]:
    """Apply `work` to every row; `BadInput` puts the row among the rejects (or stops a strict run)."""
    kept, rejects = [], []
    for row in rows:
        try:
            kept.append(work(row))
        except BadInput as error:
            if strict:
                raise StageError(f"{stage}: {key(row)}: {error}") from None
            rejects.append(Reject(stage, key(row), str(error)))
    return kept, rejects


def windows(rows: Iterable[Row], limit: float, size: Callable[[Row], float] = lambda _: 1.0) -> Iterator[list[Row]]:
    """Runs of rows whose sizes add up to about `limit`; at least one, if an empty one, so that a shard has a part."""
    window: list[Row] = []
    total = 0.0
    for row in rows:
        if window and total + size(row) > limit:
            yield window
            window, total = [], 0.0
        window.append(row)
        total += size(row)
    yield window


def checked_counts(config: Config, stage: Stage, shards: Sequence[str]) -> dict[str, Any]:
    """The counts over all shards of a stage, which add up; says where its rejects are. Raises as `check_counts`."""
    counts = count_shards(stage.table, shards)
    check_counts(config, stage, counts)
    if counts["num_rejected"]:
        rejects = Table(stage.table.run_dir, stage.table.set, "rejects")
        say(
            f"{stage.label}: {counts['num_rejected']:,} rejected, the reasons are in {rejects.url}/{stage.table.name}-*"
        )
    return counts


def count_shards(table: Table, shards: Sequence[str]) -> dict[str, Any]:
    """Sum the counts that the shards carry in their footers."""
    counts: dict[str, Any] = {"num_input": 0, "num_kept": 0, "num_rejected": 0, "num_rows": 0, "shards": {}}
    totals: dict[str, float] = {}
    with ThreadPoolExecutor(32) as threads:  # an object store answers one at a time too slowly for thousands
        for shard, (own, num_rows) in zip(shards, threads.map(partial(_footer, table), shards), strict=True):
            for name, total in own.pop("totals", {}).items():
                totals[name] = totals.get(name, 0.0) + total
            for name, value in own.items():
                counts[name] += value
            counts["num_rows"] += num_rows
            counts["shards"][shard] = num_rows
    return counts | {"totals": {name: round(total, 6) for name, total in sorted(totals.items())}}


def _footer(table: Table, shard: str) -> tuple[dict[str, Any], int]:
    metadata = table.metadata(shard)
    return json.loads(metadata.metadata[b"counts"]), metadata.num_rows


def start_ray(config: Config) -> None:
    """Start or join Ray once per process; a local one has its dashboard on loopback, as Ray Train asks it for state."""
    if not ray.is_initialized():
        address = config.ray.address or os.environ.get("RAY_ADDRESS")  # set where a job was submitted
        local = {"num_cpus": config.ray.num_cpus, "include_dashboard": True, "dashboard_host": "127.0.0.1"}
        ray.init(address=address or "local", logging_level=logging.ERROR, **({} if address else local))
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


class _ShardWriter:
    """The actor: makes its worker once, then turns items into shards."""

    def __init__(self, make_worker: Callable[[], Worker], stage: Stage) -> None:
        self.worker = make_worker()
        self.stage = stage

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        try:
            write_shard(self.stage.table, item["shard"], self.worker(json.loads(item["payload"])))
        except StageError as error:
            return {"error": str(error)}
        return {"error": ""}


def write_shard(table: Table, shard: str, parts: Iterator[ShardPart]) -> None:
    """Write a shard as its parts come, its counts into the footer, and what was left out into `rejects` beside it."""
    first = next(parts)
    counts = {"num_input": 0, "num_kept": 0, "num_rejected": 0}
    totals: dict[str, float] = {}
    rejects: list[Reject] = []
    footer: dict[str, str] = {}
    with table.writer(shard, first.rows.schema, footer) as write:
        for part in chain([first], parts):
            write(part.rows)
            rejects += part.rejects
            for name, number in zip(counts, (part.num_input, part.num_kept, len(part.rejects)), strict=True):
                counts[name] += number
            for name, total in part.totals.items():
                totals[name] = totals.get(name, 0.0) + total
        footer["counts"] = json.dumps(counts | {"totals": totals})
        if rejects:  # before the shard is there: a shard that is there is complete
            Table(table.run_dir, table.set, "rejects").write(f"{table.name}-{shard}", to_arrow(Reject, rejects))


def _map_on_ray(
    config: Config, stage: Stage, items: dict[str, Any], make_worker: Callable[[], Worker], num_gpus: float
) -> None:
    start_ray(config)
    cluster = ray.cluster_resources()
    room = int(cluster.get("GPU", 0) / num_gpus) if num_gpus else int(cluster.get("CPU", 1))
    if not room and config.ray.max_actors is None:
        raise StageError(
            f"{stage.label} asks for {num_gpus:g} GPUs an actor, but this Ray cluster has none now; if it grows on "
            "demand, say by ray.max_actors how far"
        )
    num_actors = max(1, min(config.ray.max_actors or room, len(items)))
    rows = [{"shard": name, "payload": json.dumps(payload)} for name, payload in items.items()]
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _ShardWriter,
        fn_constructor_args=(make_worker, stage),
        compute=ray.data.ActorPoolStrategy(min_size=max(1, min(room, num_actors)), max_size=num_actors),
        num_cpus=1,
        num_gpus=num_gpus or None,
    )
    with progress(stage.label, len(items), "shards") as advance:
        for result in results.iter_rows():
            if result["error"]:
                raise StageError(result["error"])
            advance(1)


def check_strict(config: Config, stage: Stage) -> None:
    """A strict run does not accept a table beside which anything was rejected."""
    num_rejected = (stage.table.manifest() or {}).get("num_rejected", 0)
    if config.strict and num_rejected:
        first = _first_reject(stage)
        raise StageError(f"{stage.name}: {first['key']}: {first['reason']}")


def _first_reject(stage: Stage) -> dict[str, str]:
    rejects = Table(stage.table.run_dir, stage.table.set, "rejects")
    name = next((name for name in rejects.shards() if name.startswith(f"{stage.table.name}-")), None)
    return rejects.read(name).to_pylist()[0] if name else {"key": "", "reason": "no input"}


def check_counts(config: Config, stage: Stage, counts: dict[str, Any]) -> None:
    """Raises `StageError` when rows were lost, nothing was kept, or too large a share was rejected."""
    if counts["num_input"] != counts["num_kept"] + counts["num_rejected"]:
        raise StageError(f"{stage.label}: rows were lost ({counts}); please report this as a bug")
    share = counts["num_rejected"] / max(counts["num_input"], 1)
    if share > config.ingest.max_rejected_share or counts["num_kept"] == 0:
        reason = _first_reject(stage)
        raise StageError(
            f"{stage.label}: {counts['num_rejected']:,} of {counts['num_input']:,} rows were rejected, first "
            f"{reason['key']}: {reason['reason']}; mend the input and run the "
            "stage with --redo, or raise ingest.max_rejected_share"
        )


def _flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
