"""Shards through Ray Data, whatever happens to a row, a process or a machine.

An item is done by a worker inside a Ray task, on GPUs inside an actor, which writes its shard itself, whole or not at
all, under the item's name: an item that is done twice, after a lost machine say, is still there once.

An error that a user has to mend ends the stage. Anything else (a bug that one row meets, a GPU that fell over, a killed
process) costs a try: the process is replaced, since its GPU may be unusable from then on, and the shard is done again
after the others. From the third try on a row at a time, so that a row at which it fails twice becomes a reject. Where
on most machines more shards fail than go well, or hardly a row is kept, that is not one bad row, nor one bad machine:
the stage ends at once. What fails is faster than what goes well, so a bad machine takes shards from the good ones: the
passes that follow leave it out.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any, TypeVar

import pyarrow as pa
import ray
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError, RayTaskError
from ray.util.metrics import Counter, Gauge

from salad_ray.config import Config
from salad_ray.console import progress, say, user_error
from salad_ray.credentials import redact
from salad_ray.tables import (
    BadInput,
    Reject,
    Table,
    Totals,
    add_totals,
    delete_file,
    file_exists,
    read_json,
    to_arrow,
    write_bytes,
    write_json,
)

Row = TypeVar("Row")
Result = TypeVar("Result")

WHOLE_TRIES = 2
"""Of a shard, before it is done a row at a time."""
ROW_FAILURES = 2
"""After so many, a row is a reject; one may be the machine's fault."""
MAX_LEFT_OUT = 3
"""Rows of a shard that may be rejected for a failure whose reason is not known."""
TASK_RETRIES = 2
"""Of an item whose process died, before it counts as a try."""
MIN_FAILURES, ENOUGH_FAILURES = 3, 32
"""Shards that fail at their first try, more than go well: systematic. One for each actor, from some to many."""
RECENT = 8
"""Times as many of the last first tries are looked at."""
NODE_ID_LABEL = "ray.io/node-id"
"""Ray labels every machine so, with its id."""
EMPTY_PASSES = 6
"""Passes in a row that are broken off before anything is done; each may lose twice as many shards as the one before."""
MAX_LOST = 8
"""Shards lost with their processes at which a pass is broken off to see whether that is systematic; doubles then."""
LEFT_OUT_SECS = 3600.0
"""Without a shard on a cluster that does not grow, after which machines that are left out are taken back, if no other
is there; doubles if one is, since a shard may take that long."""
MAX_EARLY_REJECTED = 0.95
"""Share of the rows of the first shards; beyond it the rest is not even begun."""
WAIT_SECS = 120.0
"""Without a first shard, before it is said that no machine has what a stage asks for."""
SEEN_SECS = 60.0
"""In which a machine has to see what the driver has begun."""
IDLE_SECS = 20.0
"""Without a shard, after which a process drops what its workers have loaded."""
NOTE_SECS = 5.0
"""Between two notes of how far a stage is."""


class StageError(RuntimeError):
    """A stage that cannot go on; the message is for the user."""


@dataclass
class ShardPart:
    """A piece of what a worker makes of one item, in order: `num_input == num_kept + len(rejects)`."""

    rows: pa.Table
    num_input: int
    num_kept: int
    rejects: list[Reject] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)
    """For the manifest, such as hours of audio."""


Worker = Callable[[Any], Iterator[ShardPart]]
"""Makes a shard of an item (plain JSON data) piece by piece, so that no shard has to fit into memory."""


class WindowWorker:
    """A worker that takes several rows at a time, and can be told to take one (`careful`)."""

    careful: str | None = None
    """URL of the note that says at which row it is; None for whole windows."""
    by = ""
    """Id of the driver that runs it: what an earlier driver noted does not count, since the fault may be mended."""
    note: dict[str, Any] = {}  # noqa: RUF012 - replaced, never changed
    """At which row it is, and of the shard's rows how often they failed, and which are left out and why."""
    num_passed = 0
    """Rows of it that went well."""

    @property
    def left_out(self) -> dict[str, str]:
        return self.note.get("left_out", {})

    def at_row(self, row_id: str) -> None:
        """Note which row will be to blame if this fails now; "" for none."""
        if self.careful is not None:
            self.note |= {"at": row_id, "node": own_node()}
            write_json(self.careful, self.note)

    def windows(
        self,
        rows: Iterable[Row],
        key: Callable[[Row], str],
        limit: float,
        size: Callable[[Row], float] = lambda _: 1.0,
    ) -> Iterator[list[Row]]:
        """Runs of rows whose sizes add up to about `limit`; at least one, if an empty one: a shard needs a part."""
        self.note, self.num_passed = {}, 0
        if self.careful is not None:
            yield from self._one_at_a_time(rows, key, self.careful)
            return
        window: list[Row] = []
        total = 0.0
        for row in rows:
            if window and total + size(row) > limit:
                yield window
                window, total = [], 0.0
            window.append(row)
            total += size(row)
        yield window

    def overlapped(
        self,
        windows: Iterable[list[Row]],
        load: Callable[[Row], Any],
        compute: Callable[[list[Row], list[Future[Any]]], Result],
        num_threads: int,
    ) -> Iterator[Result]:
        """What `compute` makes of each window, in order, so that a device has always its next window at hand.

        Threads load the rows of a window while the one before is computed, in a thread of its own, and the caller
        writes what was made of the one before that. A careful pass does one thing after the other.

        Args:
            load: of a row, what takes CPU: decoding, resampling. It should release Python's lock.
            compute: of a window and its loaded rows, what takes the device.
        """
        ahead = 0 if self.careful is not None else 1
        with ThreadPoolExecutor(num_threads) as threads, ThreadPoolExecutor(1) as device:
            loading = ((window, [threads.submit(load, row) for row in window]) for window in windows)
            computing = (device.submit(compute, *loaded) for loaded in look_ahead(loading, ahead))
            for computed in look_ahead(computing, ahead):
                yield computed.result()

    def _one_at_a_time(self, rows: Iterable[Row], key: Callable[[Row], str], url: str) -> Iterator[list[Row]]:
        self._look_back(read_json(url))
        yield []
        for row in rows:
            if key(row) not in self.left_out:
                self.at_row(key(row))
                yield [row]
                self.num_passed += 1

    def _look_back(self, note: dict[str, Any] | None) -> None:
        """Charge the former try's failure to the row at which it was, unless its machine was taken away."""
        if note is None or note.get("by") != self.by:
            note = {"by": self.by, "at": "", "node": "", "reason": "", "failures": {}, "left_out": {}}
        if (row_id := note["at"]) and (note["reason"] or is_alive(note["node"])):
            note["failures"][row_id] = note["failures"].get(row_id, 0) + 1
            if note["failures"][row_id] >= ROW_FAILURES:
                note["left_out"][row_id] = note["reason"] or "its process died at this row, twice"
        self.note = note | {"reason": ""}
        self.at_row("")
        if len(self.left_out) > MAX_LEFT_OUT:
            row_id, reason = list(self.left_out.items())[-1]
            raise RuntimeError(f"more than {MAX_LEFT_OUT} of its rows fail, the last {row_id}: {reason}")


def look_ahead(items: Iterable[Row], number: int) -> Iterator[Row]:
    """The items in order, each once `number` more were taken from the iterable."""
    taken: deque[Row] = deque()
    for item in items:
        taken.append(item)
        if len(taken) > number:
            yield taken.popleft()
    yield from taken


def own_node() -> str:
    """Ray's id of the machine; "" outside of Ray."""
    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else ""


def machines_with(num_cpus: float = 0.0, num_gpus: float = 0.0) -> dict[str, str]:
    """Ray's ids of the machines that are there and large enough for a process with this → their names."""
    needs = {"CPU": num_cpus, "GPU": num_gpus}
    return {
        node["NodeID"]: node["NodeManagerHostname"]
        for node in ray.nodes()
        if node["Alive"] and all(node["Resources"].get(name, 0.0) >= number for name, number in needs.items())
    }


def is_alive(node: str) -> bool:
    """Whether Ray still has a machine; of "" nobody says otherwise."""
    return not node or node in machines_with()


@dataclass(frozen=True)
class Task:
    """A table to be made: shard name → payload (plain JSON data), and what builds the worker inside its actor."""

    label: str
    table: Table
    run_dir: str
    items: dict[str, Any]
    make_worker: Callable[[], Worker]
    num_there: int = 0
    """Shards of the table that are done already."""
    chain: int = 0
    """Tasks of one chain go along with each other: an actor takes a shard through all of them, in their order."""

    @property
    def stage(self) -> str:
        return self.label.split()[0]

    def failures(self, shard: str) -> str:
        """URL, without its ending, of what is known of a shard that failed."""
        return f"{self.table.url}/failures/{shard}"


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


def write_shard(table: Table, shard: str, parts: Iterator[ShardPart]) -> dict[str, int]:
    """Write a shard as its parts come, its counts into the footer, and what was left out into `rejects` beside it.

    Returns:
        `num_input`, `num_kept` and `num_rejected`.
    """
    first = next(parts)
    counts = {"num_input": 0, "num_kept": 0, "num_rejected": 0}
    totals: dict[str, Any] = {}
    rejects: list[Reject] = []
    footer: dict[str, str] = {}
    with table.writer(shard, first.rows.schema, footer) as write:
        for part in chain([first], parts):
            write(part.rows)
            rejects += [replace(reject, reason=redact(reject.reason)) for reject in part.rejects]
            for name, number in zip(counts, (part.num_input, part.num_kept, len(part.rejects)), strict=True):
                counts[name] += number
            add_totals(totals, part.totals)
        footer["counts"] = json.dumps(counts | {"totals": totals})
        # Before the shard is there: a shard that is there is complete. A former try may have left others.
        if rejects:
            table.rejects.write(shard, to_arrow(Reject, rejects))
        else:
            delete_file(f"{table.rejects.url}/{shard}.parquet")
    return counts


def _require_run(table: Table) -> None:
    """What this machine writes where the driver does not see it would be lost."""
    until = time.monotonic() + SEEN_SECS
    while not file_exists(f"{table.url}/begun.json"):
        if time.monotonic() < until:  # a network's file system may remember for a while that there was nothing
            time.sleep(1)
            continue
        raise StageError(
            f"machine {socket.gethostname()} does not see {table.url}, which the driver has begun; let run_dir be a "
            "URL, or in a folder that all machines share"
        )


def first_line(error: BaseException) -> str:
    """What an error says; of a task that failed in another process the last line, where its own error stands."""
    lines = str(error).strip().splitlines() or [""]
    return lines[-1] if isinstance(error, RayTaskError) else lines[0]


METRIC_TAGS = ("run", "stage", "set")


@lru_cache(maxsize=1)
def _counters() -> tuple[Counter, Counter]:
    """Of this process."""
    rows = Counter("salad_rows", "Rows that a stage has done, kept or not.", METRIC_TAGS)
    return rows, Counter("salad_rejects", "Rows that a stage has left out.", METRIC_TAGS)


def count_rows(tags: dict[str, str], num_rows: int, num_rejected: int) -> None:
    """Tell Ray's metrics what a stage has done."""
    for counter, number in zip(_counters(), (num_rows, num_rejected), strict=True):
        if number:  # Ray refuses 0
            counter.inc(number, tags)


def waiting_gauge() -> Gauge:
    return Gauge("salad_shards_waiting", "Shards that a stage has yet to make.", METRIC_TAGS)


class ShardWriter:
    """Turns items into shards, of each task in a chain; makes the workers of a chain when its first item comes, and
    keeps them until another chain's comes. On GPUs it is an actor, which ends with the stage and frees the device."""

    def __init__(self, tasks: Sequence[Task], by: str = "") -> None:
        self.tasks, self.by = tasks, by
        self.chain = -1
        self.workers: dict[int, Worker] = {}
        self.worker: Worker | None = None
        """That at work."""
        self.broken = False

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """A result for each task that this shard lacks; behind one that failed they are left for the next pass."""
        if self.broken:  # whatever failed here may have left it unusable: Ray starts another, which tries this item
            os._exit(1)
        results: list[dict[str, Any]] = []
        for item in json.loads(row["items"]):
            item |= {"shard": row["shard"], "by": row["by"]}
            stopped = any(result["failed"] or result["error"] for result in results)
            results.append(self._nothing(item) | {"skipped": True} if stopped else self.make(item))
        return results

    def _nothing(self, item: dict[str, Any]) -> dict[str, Any]:
        """A result to begin with."""
        result = {"task": item["task"], "shard": item["shard"], "error": "", "failed": "", "row": "", "hopeless": False}
        result |= {"machine": own_node(), "process": os.getpid(), "of_machine": False, "skipped": False, "secs": 0.0}
        return result | {"num_input": 0, "num_kept": 0, "num_rejected": 0}

    def make(self, item: dict[str, Any]) -> dict[str, Any]:
        """Make a shard of a task."""
        task, shard = self.tasks[item["task"]], item["shard"]
        result = self._nothing(item)
        try:
            worker = self._worker(item)
            started = time.monotonic()  # the worker's own start is not work
            parts = self._with_left_out(task, worker, worker(json.loads(item["payload"])))
            counts = write_shard(task.table, shard, parts)
        except Exception as error:  # noqa: BLE001 - told, and tried again
            self.broken = True
            cause = user_error(error)
            if cause is not None and not isinstance(cause, OSError):  # a store may refuse this machine alone
                return result | {"error": redact(str(cause))}
            return result | self._note_failure(task, item, cause or error)
        tags = {"run": task.run_dir, "stage": task.stage, "set": task.table.set or "-"}
        count_rows(tags, counts["num_input"], counts["num_rejected"])
        return result | counts | {"secs": time.monotonic() - started}

    def _worker(self, item: dict[str, Any]) -> Worker:
        task = self.tasks[item["task"]]
        if task.chain != self.chain:
            self.workers, self.chain = {}, task.chain  # the former ones go first
        if item["task"] not in self.workers:
            _require_run(task.table)
            self.workers[item["task"]] = task.make_worker()
        self.worker = self.workers[item["task"]]
        if isinstance(self.worker, WindowWorker):
            careful = item["tries"] >= WHOLE_TRIES
            self.worker.careful = f"{task.failures(item['shard'])}.json" if careful else None
            self.worker.by, self.worker.note, self.worker.num_passed = item["by"], {}, 0
        return self.worker

    def _with_left_out(self, task: Task, worker: Worker, parts: Iterator[ShardPart]) -> Iterator[ShardPart]:
        """The parts, and last the rows that are left out since they made it fail."""
        for part in parts:
            if isinstance(worker, WindowWorker):
                worker.at_row("")  # what fails in writing this, or in reading the next row, is no row's fault
            yield part
        if isinstance(worker, WindowWorker) and worker.left_out:
            rejects = [Reject(task.stage, row_id, reason) for row_id, reason in worker.left_out.items()]
            yield ShardPart(part.rows.slice(0, 0), len(rejects), 0, rejects)

    def _note_failure(self, task: Task, item: dict[str, Any], error: BaseException) -> dict[str, Any]:
        """Leave the traceback in a file, and in a careful try the reason in the note; both for whoever tries next."""
        reason = redact(f"{type(error).__name__}: {first_line(error)}")
        with suppress(Exception):  # a full disk, say, which may be what failed; the reason is told all the same
            write_bytes(f"{task.failures(item['shard'])}.log", redact(traceback.format_exc()).encode())
        of_a_machine = isinstance(error, OSError)  # a disk or a network: whatever the row
        worker = self.worker
        if not isinstance(worker, WindowWorker) or "by" not in worker.note:  # it was not at the rows
            return {
                "failed": reason,
                "hopeless": item["tries"] >= WHOLE_TRIES and not of_a_machine,
                "of_machine": of_a_machine,
            }
        row_id = "" if of_a_machine else worker.note["at"]
        with suppress(Exception):
            write_json(str(worker.careful), worker.note | {"at": row_id, "reason": reason})
        # Not one row has gone well, though others that failed are left out; or it failed outside of all rows.
        hopeless = not row_id or (worker.num_passed == 0 and len(worker.left_out) >= ROW_FAILURES)
        hopeless = hopeless and not of_a_machine
        return {"failed": reason, "row": row_id, "hopeless": hopeless, "of_machine": of_a_machine}


_writer: ShardWriter | None = None
"""Of this process, while it is one for tasks."""
_idle: threading.Timer | None = None
"""Runs while the process has no shard."""
_lock = threading.Lock()
"""Of the two."""


def write_shards(tasks: Sequence[Task], by: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """What `ShardWriter` does, as a task: Ray keeps the processes of tasks for the stages that follow, so that they
    start once in a run, with all that they import. What a worker has loaded is dropped with the next stage, or after a
    while without work: a training may want the memory."""
    global _writer, _idle
    with _lock:
        if _idle is not None:
            _idle.cancel()
        _idle, writer = None, _writer
    if writer is None or (writer.by != by and not writer.broken):
        _writer = None  # the former stage's workers go first
        if (torch := sys.modules.get("torch")) is not None:  # which reads it when it is imported
            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        _writer = writer = ShardWriter(tasks, by)
    results = writer(row)
    with _lock:
        _idle = threading.Timer(IDLE_SECS, _forget_writer)
        _idle.daemon = True
        _idle.start()
    return results


def _forget_writer() -> None:
    """Drop what is loaded, and with what may be unusable the process."""
    global _writer
    with _lock:
        if _idle is None or _writer is None:  # a shard came meanwhile
            return
        if _writer.broken:
            os._exit(1)
        _writer = None


@dataclass
class Shortfall:
    """A shard that is not there yet."""

    tries: int = 0
    reason: str = "its process died"
    hopeless: bool = False
    of_machine: bool = False
    """Whether the last try failed for a disk, a network or a store, and for no row."""


class Counts:
    """What a stage's shards have come to so far; raises `StageError` where the error is systematic.

    Args:
        machines: says which are large enough for a process of the stage.
    """

    def __init__(self, config: Config, tasks: Sequence[Task], machines: Callable[[], dict[str, str]]) -> None:
        self.config, self.label, self.machines = config, tasks[0].label, machines
        self.total = sum(len(task.items) for task in tasks)
        self.num_made = self.num_input = self.num_rejected = 0
        self.num_there = sum(task.num_there for task in tasks)
        self.enough = MIN_FAILURES
        self.firsts: deque[tuple[str, str]] = deque(maxlen=RECENT * ENOUGH_FAILURES)
        """Of the last first tries the machine, and why it failed, or ""."""

    def made(self, result: dict[str, Any], table: Table, is_first: bool) -> None:
        if is_first:
            self.firsts.append((result["machine"], ""))
        self.num_made += 1
        self.num_input += result["num_input"]
        self.num_rejected += result["num_rejected"]
        limit = max(MAX_EARLY_REJECTED, self.config.ingest.max_rejected_share)
        early = MIN_FAILURES <= self.num_made < self.total
        if early and result["num_rejected"] and self.num_rejected > limit * self.num_input:
            first = table.rejects.read(result["shard"]).to_pylist()[0]
            raise StageError(
                f"{self.label}: {self.num_rejected:,} of the first {self.num_input:,} rows were rejected, so the rest "
                f"was not begun; {first['key']}: {first['reason']}. Mend the input and run the stage with --redo, or "
                "raise ingest.max_rejected_share to 1"
            )

    def failed(self, machine: str, num_actors: int, reason: str) -> None:
        """A shard failed at its first try, on "" where nobody knows on which machine. What fails is faster than what
        goes well: each actor has a say, of hundreds the first to speak, and so has a machine that has said nothing."""
        self.firsts.append((machine, reason))
        self.enough = max(MIN_FAILURES, min(num_actors, ENOUGH_FAILURES))
        self._require_few(min(num_actors, len(self.machines())))

    def end_pass(self) -> list[str]:
        """Ray's ids of the machines to be left out from now on: on which more fails than goes well, while there is
        another one. A machine that has done nothing in a whole pass has no say."""
        self._require_few(0)
        balance = _balance(self.firsts)
        there = self.machines()
        if not any(number <= 0 and machine in there for machine, number in balance.items()):
            return []
        return sorted(machine for machine, number in balance.items() if number > 0 and machine in there)

    def _require_few(self, num_machines: int) -> None:
        """End the stage if more of the last first tries failed than went well, on most of the machines.

        Args:
            num_machines: at work; those that have done something count in any case.
        """
        # What is there went well; what is missing may be the bad ones of a run that was broken off.
        there = [("", "")] * min(self.num_there, RECENT * self.enough // 2)
        recent = [*there, *self.firsts][-RECENT * self.enough :]
        reasons = [reason for _, reason in recent if reason]
        balance = _balance(recent)
        num_bad = sum(number > 0 for number in balance.values())
        many = len(reasons) >= self.enough and 2 * len(reasons) > len(recent)
        if many and 2 * num_bad > max(num_machines, len(balance)):
            raise StageError(
                f"{self.label}: {len(reasons)} shards failed and {len(recent) - len(reasons)} went well, so this is no "
                f"single row's fault; the first one: {reasons[0]}"
            )


def _balance(tries: Iterable[tuple[str, str]]) -> dict[str, int]:
    """By machine, how many tries more failed than went well. Of shards that were lost with their processes nobody knows
    where that was: they count as a machine each."""
    balance: dict[str, int] = {}
    for number, (machine, reason) in enumerate(tries):
        if machine or reason:
            place = machine or str(number)
            balance[place] = balance.get(place, 0) + (1 if reason else -1)
    return balance


class Pace:
    """Notes beside each table how far it is, for `salad status`, and what Ray's dashboard and Prometheus show."""

    def __init__(self, tasks: Sequence[Task], num_gpus: float) -> None:
        self.tasks, self.num_gpus = tasks, num_gpus
        self.actors: set[tuple[str, int]] = set()
        """Machine and process of those at work."""
        self.max_actors = 0
        """The most that were at work at once."""
        self.started = self.noted = time.monotonic()
        self.done = [0] * len(tasks)
        self.rows = [0] * len(tasks)
        self.rejects = [0] * len(tasks)
        self.waiting = waiting_gauge()

    def add(self, result: dict[str, Any]) -> None:
        number = result["task"]
        actor = (result["machine"], result["process"])
        self.actors.add(actor)
        if result["failed"]:  # its process is replaced
            self.actors.discard(actor)
        self.done[number] += not result["failed"]
        self.rows[number] += result["num_input"]
        self.rejects[number] += result["num_rejected"]
        if time.monotonic() - self.noted > NOTE_SECS:
            self.note()

    def note(self) -> None:
        self.noted = time.monotonic()
        secs = self.noted - self.started
        alive = machines_with()
        self.actors = {actor for actor in self.actors if actor[0] in alive}
        self.max_actors = max(self.max_actors, len(self.actors))
        for number, task in enumerate(self.tasks):
            left = len(task.items) - self.done[number]
            tags = {"run": task.run_dir, "stage": task.stage, "set": task.table.set or "-"}
            self.waiting.set(left, tags)
            if self.done[number]:
                eta = secs / sum(self.done) * (sum(len(task.items) for task in self.tasks) - sum(self.done))
                note = {
                    "done": self.done[number],
                    "total": len(task.items),
                    "num_actors": len(self.actors),
                    "num_gpus": len(self.actors) * self.num_gpus,
                    "num_input": self.rows[number],
                    "num_rejected": self.rejects[number],
                    "rows_per_sec": self.rows[number] / secs,
                    "eta_secs": eta,
                    "at": time.time(),
                }
                with suppress(OSError):  # a store that fails now may work at the next note
                    write_json(f"{task.table.url}/progress.json", note)


def map_shards(
    config: Config, tasks: Sequence[Task], room: int, num_gpus: float, num_cpus: float = 1.0
) -> tuple[dict[str, float], dict[str, float]]:
    """Make every item's shard, trying again what fails.

    Args:
        room: actors for which the cluster has room now; `ray.max_actors` says how far it may grow.
        num_gpus, num_cpus: of each actor.

    Returns:
        What tells the start from the work: actors, items, and seconds until the first item was done; and, by URL of a
        table, the seconds for which actors worked on it, each counted by itself.

    Raises:
        StageError: for what the user has to mend; for a systematic error; at the end for shards that cannot be made.
    """
    passes = Passes(config, tasks, room, num_gpus, num_cpus)
    pace: dict[str, float] = {}
    hopeless: dict[tuple[int, str], Shortfall] = {}
    while passes.missing:
        facts = passes.once()
        pace = pace or facts
        for item, shortfall in list(passes.missing.items()):
            strict = config.strict and not shortfall.of_machine
            last = WHOLE_TRIES if strict else WHOLE_TRIES + ROW_FAILURES * MAX_LEFT_OUT + 1
            if shortfall.hopeless or shortfall.tries >= last:
                hopeless[item] = passes.missing.pop(item)
    if hopeless:
        (number, shard), shortfall = next(iter(hopeless.items()))
        task = tasks[number]
        log = f"{task.failures(shard)}.log"
        story = f" ({log} has the story)" if file_exists(log) else ""
        raise StageError(
            f"{task.label}: {len(hopeless)} of {len(task.items)} shards cannot be made, {shard} first, after "
            f"{shortfall.tries} tries: {shortfall.reason}{story}. The others are done; mend the cause and run the "
            "stage again"
        )
    return pace, passes.busy


class Passes:
    """Passes over the shards that are missing; each shard is tried once in a pass."""

    def __init__(
        self, config: Config, tasks: Sequence[Task], room: int, num_gpus: float, num_cpus: float = 1.0
    ) -> None:
        self.config, self.tasks, self.room = config, tasks, room
        self.num_gpus, self.num_cpus = num_gpus, num_cpus
        self.missing = {(number, shard): Shortfall() for number, task in enumerate(tasks) for shard in task.items}
        self.by = uuid.uuid4().hex
        self.machines = partial(machines_with, num_cpus, num_gpus)
        self.counts, self.pace = Counts(config, tasks, self.machines), Pace(tasks, num_gpus)
        self.left_out: list[str] = []
        """Ray's ids of machines on which most fails."""
        self.left_out_secs = LEFT_OUT_SECS
        self.max_lost, self.num_lost, self.num_empty = MAX_LOST, 0, 0
        self.num_actors = 0
        """How many there may be now."""
        self.busy: dict[str, float] = {}
        """URL of a table → seconds for which actors worked on it."""

    def once(self) -> dict[str, float]:
        """Do each missing item; returns the pace."""
        started, first_secs = time.monotonic(), 0.0
        label, num_rows = self.tasks[0].label, len(self.missing)
        results, self.num_actors = self._results()
        unseen = set(self.missing)
        try:
            needs = (self.num_cpus, self.num_gpus)
            with progress(label, num_rows, "shards") as advance, _told_while_waiting(label, *needs) as waiting:
                for result in results.iter_rows():
                    waiting.cancel()
                    unseen.discard((result["task"], result["shard"]))
                    if result["skipped"]:
                        continue
                    self._take(result)
                    first_secs = first_secs or time.monotonic() - started
                    advance(1)
        except RayError as error:  # too many were lost, which ones is not said; all that are unseen keep their tries
            say(f"{label}: too many processes died, a pass is broken off ({first_line(error)})")
            self._lost(min(self.max_lost, len(unseen)), first_line(error))
            self.max_lost *= 2
            self._require_some(num_rows - len(unseen), first_line(error))
        except ExecutionTimeoutError:
            self._take_back()
        else:
            self._missed(unseen)
            self._leave_out(self.counts.end_pass())
            self.num_empty = 0
        self.pace.note()
        actors = min(self.pace.max_actors or self.num_actors, self.num_actors)  # tasks change processes
        return {"num_actors": actors, "num_made": num_rows, "first_secs": round(first_secs, 2)}

    def _results(self) -> tuple[ray.data.Dataset, int]:
        """What actors say of each missing item, and how many actors there may be."""
        items: dict[tuple[int, str], list[dict[str, Any]]] = {}
        for (number, shard), shortfall in self.missing.items():
            task = self.tasks[number]
            item = {"task": number, "payload": json.dumps(task.items[shard]), "tries": shortfall.tries}
            items.setdefault((task.chain, shard), []).append(item)
        rows = [
            {"shard": shard, "items": json.dumps(sorted(own, key=lambda item: item["task"])), "by": self.by}
            for (_, shard), own in items.items()
        ]
        num_actors = max(1, min(self.config.ray.max_actors or self.room, len(rows)))
        with warnings.catch_warnings():  # no other way yet to say how often a task is retried whose process died
            warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
            items_to_do = ray.data.from_items(rows, override_num_blocks=len(rows))
            tasks = [replace(task, items={}) for task in self.tasks]
            if self.num_gpus:
                results = items_to_do.flat_map(
                    ShardWriter,
                    fn_constructor_args=(tasks, self.by),
                    compute=ray.data.ActorPoolStrategy(
                        min_size=max(1, min(self.room, num_actors)), max_size=num_actors
                    ),
                    num_cpus=self.num_cpus,
                    num_gpus=self.num_gpus,
                    max_task_retries=TASK_RETRIES,
                    **self.elsewhere(),
                )
            else:
                results = items_to_do.flat_map(
                    partial(write_shards, tasks, self.by),
                    compute=ray.data.TaskPoolStrategy(num_actors),
                    num_cpus=self.num_cpus,
                    max_retries=TASK_RETRIES,
                    **self.elsewhere(),
                )
        results.context.max_errored_blocks = self.max_lost  # items whose processes keep dying; they are missing still
        results.context.max_consecutive_actor_init_deaths = num_actors  # a machine on which none can start is not all
        if self.left_out and self.config.ray.max_actors is None:
            results.context.execution_no_progress_timeout_s = self.left_out_secs
        return results, num_actors

    def _take(self, result: dict[str, Any]) -> None:
        item = (result["task"], result["shard"])
        table, tries = self.tasks[result["task"]].table, self.missing[item].tries
        if result["error"]:
            raise StageError(result["error"])
        self.pace.add(result)
        if not result["failed"]:
            url = table.url
            self.busy[url] = self.busy.get(url, 0.0) + result["secs"]
            del self.missing[item]
            self.counts.made(result, table, is_first=not tries)
            return
        self.missing[item] = Shortfall(tries + 1, result["failed"], result["hopeless"], result["of_machine"])
        at = f" at {result['row']}" if result["row"] else ""
        say(
            f"{self.tasks[0].label}: {result['shard']} failed{at} ({result['failed']}); its process is replaced, and "
            "it is tried again",
            shard=result["shard"],
            row=result["row"],
        )
        if not tries:
            reason = f"{result['failed']} ({table.url}/failures/{result['shard']}.log)"
            self.counts.failed(result["machine"], self.num_actors, reason)

    def elsewhere(self) -> dict[str, Any]:
        """What Ray has to be told of where shards are made."""
        return {"label_selector": {NODE_ID_LABEL: f"!in({','.join(self.left_out)})"}} if self.left_out else {}

    def _leave_out(self, machines: list[str]) -> None:
        """Make what is missing on other machines than these."""
        names = machines_with()
        for each in sorted(set(machines) - set(self.left_out)):
            say(f"{self.tasks[0].label}: most fails on machine {names.get(each, each)}, which is left out from now on")
        self.left_out = machines

    def _take_back(self) -> None:
        """For too long no shard was made: all other machines are gone, or it takes that long."""
        label, secs = self.tasks[0].label, self.left_out_secs
        if set(self.machines()) <= set(self.left_out):
            say(f"{label}: no shard in {secs:.0f} s, as no other machine is there; those left out are taken back")
            self.left_out = []
        else:
            say(f"{label}: no shard in {secs:.0f} s; what is missing is begun again, and given twice as long")
            self.left_out_secs *= 2

    def _missed(self, items: set[tuple[int, str]]) -> None:
        """Each process that was to make one of these died."""
        if not items:
            return
        label, first = self.tasks[0].label, min(items)
        say(f"{label}: {len(items)} shards were lost with their processes, {first[1]} first; they are tried again")
        num_new = sum(not self.missing[item].tries for item in items)
        for item in items:
            self.missing[item] = Shortfall(self.missing[item].tries + 1)
        self._lost(num_new, f"the process died that made {first[1]}")

    def _lost(self, number: int, reason: str) -> None:
        """So many shards were lost at their first try, those of passes that were broken off included."""
        for _ in range(number - self.num_lost):
            self.counts.failed("", self.num_actors, reason)
        self.num_lost = max(self.num_lost, number)

    def _require_some(self, num_seen: int, reason: str) -> None:
        """Passes that are broken off before anything is done would follow each other for ever."""
        self.num_empty = 0 if num_seen else self.num_empty + 1
        if self.num_empty >= EMPTY_PASSES:
            raise StageError(
                f"{self.tasks[0].label}: {self.num_empty} times in a row no process could do anything, with "
                f"{len(self.missing)} shards missing: {reason}"
            )


@contextmanager
def _told_while_waiting(label: str, num_cpus: float, num_gpus: float) -> Iterator[threading.Timer]:
    """Say so if after a while no machine has what the stage asks for; whoever has the first shard cancels it."""

    def tell() -> None:
        if not machines_with(num_cpus, num_gpus):
            needs = {"CPU": num_cpus, "GPU": num_gpus}
            wanted = " and ".join(f"{number:g} {name}" for name, number in needs.items() if number)
            say(
                f"{label}: waiting for a machine with {wanted}, as this Ray cluster has none; is there a pool of such "
                "machines (`ray status`)? The wait can be interrupted, and the stage run again"
            )

    waiting = threading.Timer(WAIT_SECS, tell)
    waiting.daemon = True
    waiting.start()
    try:
        yield waiting
    finally:
        waiting.cancel()
