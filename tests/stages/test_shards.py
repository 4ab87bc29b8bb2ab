"""Rows, processes and machines that fail while shards are made, through real Ray actors."""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import errno
import json
import logging
import os
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from logging.handlers import BufferingHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from factories import a_table, run_stage, small_world_config

from salad_ray.config import Config
from salad_ray.configfile import parse_config
from salad_ray.console import say, show
from salad_ray.flow import Step, batches
from salad_ray.runs import Places, Run
from salad_ray.stages import shards
from salad_ray.stages.common import Ahead, Stage, Work, begun_works, run_works
from salad_ray.stages.ray_cluster import start_ray
from salad_ray.stages.shards import (
    Counts,
    ShardPart,
    ShardWriter,
    StageError,
    Task,
    WindowWorker,
    machines_with,
    own_node,
    write_shard,
)
from salad_ray.store import StoreError
from salad_ray.tables import Passage, Reject, Table, to_arrow

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

NUM_SHARDS, ROWS_PER_SHARD = 12, 10


class CopyShard(WindowWorker):
    """Keeps every row of a shard, but does to some of them what `harm` does."""

    def __init__(self, harm: Callable[[str], None]) -> None:
        self.harm = harm

    def __call__(self, shard: str) -> Iterator[ShardPart]:
        rows = [Passage(passage_id=f"{shard}/{i}", doc_id="d", text="t") for i in range(ROWS_PER_SHARD)]
        for window in self.windows(rows, lambda row: row.passage_id, 4):
            for row in window:
                self.harm(row.passage_id)
            yield ShardPart(to_arrow(Passage, window), len(window), len(window))


def fail_at(bad: str, row_id: str) -> None:
    if row_id == bad:
        raise RuntimeError(f"cannot do {row_id}")


def fail_in(prefix: str, row_id: str) -> None:
    if row_id.startswith(prefix):
        raise RuntimeError("nothing works")


def segfault_at(bad: str, row_id: str) -> None:
    if row_id == bad:
        ctypes.string_at(0)


def break_process_once(marker: str, row_id: str) -> None:
    """Like a GPU after an illegal access: from then on nothing works in this process, but in another it does."""
    if row_id == "part-00002/5" and not Path(marker).exists():
        Path(marker).write_text(str(os.getpid()))
    if Path(marker).exists() and Path(marker).read_text() == str(os.getpid()):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def fail_at_each(bad: tuple[str, ...], row_id: str) -> None:
    if row_id in bad:
        raise RuntimeError(f"cannot do {row_id}")


def segfault_everywhere(row_id: str) -> None:
    ctypes.string_at(0)


def fail_to_write_at_first(tries: str, times: int, error: OSError, row_id: str) -> None:
    """Like a disk that is full, or a store that cannot be reached, for a while."""
    if row_id == "part-00004/3" and len(list(Path(tries).iterdir())) < times:
        Path(tries, uuid.uuid4().hex).touch()
        raise error


def config_in(folder: Path, **changes: Any) -> Config:
    return parse_config(small_world_config(folder) | {"ray": {"num_cpus": 2}} | changes)


def stage_in(config: Config) -> Stage:
    """A stage of no flow, which copies."""
    run = Run(config, Places(config.run_dir, "run", {"web/copies": "key"}))
    return Stage.of(run, Step("copy", "web", ("copies",)))


def a_task(folder: object, items: dict[str, Any], worker: Callable[[], Any], num_there: int = 0) -> Task:
    return Task("copy", a_table(folder, "web", "copies"), str(folder), items, worker, num_there)


def make(config: Config, harm: Callable[[str], None], num_gpus: float = 0.0) -> Table:
    items = {f"part-{i:05d}": f"part-{i:05d}" for i in range(NUM_SHARDS)}
    stage = stage_in(config)
    run_works(stage.run, [Work(stage, items, partial(CopyShard, harm), num_gpus)])
    return stage.table


def ids(table: Table) -> list[str]:
    return [row.passage_id for shard in table.shards() for row in table.read_rows(Passage, shard)]


EVERY_ID = [f"part-{shard:05d}/{row}" for shard in range(NUM_SHARDS) for row in range(ROWS_PER_SHARD)]


def harm_three_ways(marker: str, row_id: str) -> None:
    fail_at("part-00003/5", row_id)
    segfault_at("part-00007/0", row_id)
    break_process_once(marker, row_id)


def test_poisoned_rows_become_rejects_and_broken_processes_are_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SALAD_LOG", "json")
    config, marker = config_in(tmp_path), tmp_path / "marker"
    keeping = BufferingHandler(10**6)  # keeps what it is given, as pytest's own and error trackers do
    monkeypatch.setattr(
        logging.getLogger("ray.data._internal.execution.streaming_executor_state"), "handlers", [keeping]
    )
    table = make(config, partial(harm_three_ways, str(marker)))
    assert marker.exists()
    assert {record.getMessage().split(":")[0] for record in keeping.buffer} == {"A process was lost"}
    bad = {
        "part-00003/5": "RuntimeError: cannot do part-00003/5",
        "part-00007/0": "its process died at this row, twice",
    }
    assert ids(table) == [row_id for row_id in EVERY_ID if row_id not in bad]
    rejects = [row for shard in table.rejects.shards() for row in table.rejects.read_rows(Reject, shard)]
    assert rejects == [Reject("copy", row_id, reason) for row_id, reason in bad.items()]
    manifest = table.manifest()
    assert manifest is not None
    assert (manifest["num_input"], manifest["num_kept"], manifest["num_rejected"]) == (120, 118, 2)
    told = capsys.readouterr().out
    assert told.count("illegal memory access") == 1  # no other shard was tried in that process
    lines = [json.loads(line) for line in told.splitlines() if line.startswith("{")]  # the rest is of the segfault
    assert {(line["shard"], line["row"]) for line in lines if line.get("row")} == {("part-00003", "part-00003/5")}
    assert "illegal memory access" in Path(table.url, "failures", "part-00002.log").read_text()
    status = json.loads(Path(table.url, "progress.json").read_text())
    assert status["done"] == status["total"] == NUM_SHARDS
    for name in ("ray_salad_rows", "ray_salad_rejects", "ray_salad_shards_waiting"):
        rows = scraped(name, config.run_dir)
        assert 'stage="copy"' in rows
        assert 'set="web"' in rows


def note_process(folder: str, row_id: str) -> None:
    Path(folder, str(os.getpid())).touch()


def test_processes_stay_for_the_stages_that_follow_but_not_what_they_loaded(tmp_path: Path) -> None:
    seen = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        assert ids(make(config_in(tmp_path / name), partial(note_process, str(tmp_path / name)))) == EVERY_ID
        seen.append({path.name for path in (tmp_path / name).iterdir() if path.name.isdigit()})
    assert seen[0] & seen[1]


def test_a_process_drops_its_worker_with_the_next_pass_or_without_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "IDLE_SECS", 0.05)
    monkeypatch.delitem(sys.modules, "torch", raising=False)  # whose threads are not this test's
    row = {"shard": "part-00000", "items": "[]", "by": "me"}
    assert shards.write_shards([], "me", row) == []
    first = shards._writer
    assert first is not None
    shards.write_shards([], "me", row)
    assert shards._writer is first
    shards.write_shards([], "another pass", row)
    assert shards._writer is not first
    deadline = time.monotonic() + 60
    while shards._writer is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert shards._writer is None
    monkeypatch.setattr(shards, "_writer", first)
    first.broken = True
    ended: list[int] = []
    monkeypatch.setattr(shards.os, "_exit", ended.append)  # which a process in which something failed does
    monkeypatch.setattr(shards, "IDLE_SECS", 60.0)
    shards.write_shards([], "another pass", row)
    assert ended == [1]
    assert shards._writer is first
    assert shards._idle is not None
    shards._idle.cancel()
    shards._forget_writer()  # what the timer would call
    assert ended == [1, 1]
    monkeypatch.setattr(shards, "_idle", None)
    monkeypatch.setattr(shards, "_writer", first)
    shards._forget_writer()  # a shard is being made
    assert ended == [1, 1]
    assert shards._writer is first


@pytest.mark.slow
def test_poisoned_rows_of_several_shards_are_rejects_and_a_rerun_knows_it_too(tmp_path: Path) -> None:
    bad = ("part-00001/2", "part-00004/0", "part-00006/9", "part-00009/4")
    config = config_in(tmp_path)
    table = make(config, partial(fail_at_each, bad))
    assert ids(table) == [row_id for row_id in EVERY_ID if row_id not in bad]
    for row_id in bad:  # as if the first run had been stopped before it came to them
        Path(table.url, f"{row_id.split('/')[0]}.parquet").unlink()
    Path(table.url, "manifest.json").unlink()
    assert ids(make(config, partial(fail_at_each, bad))) == [row_id for row_id in EVERY_ID if row_id not in bad]
    rejects = [row.key for shard in table.rejects.shards() for row in table.rejects.read_rows(Reject, shard)]
    assert sorted(rejects) == list(bad)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        pytest.param(StoreError("s3://bucket cannot be reached"), marks=pytest.mark.slow),
    ],
)
def test_an_error_of_the_disk_or_the_store_is_no_rows_fault(tmp_path: Path, error: OSError) -> None:
    (tmp_path / "tries").mkdir()
    table = make(config_in(tmp_path), partial(fail_to_write_at_first, str(tmp_path / "tries"), 6, error))
    assert ids(table) == EVERY_ID
    assert not table.rejects.shards()


def test_a_row_is_to_blame_only_while_it_is_worked_on(tmp_path: Path) -> None:
    worker = CopyShard(partial(fail_at, "nobody"))
    writer = ShardWriter([a_task(tmp_path, {}, lambda: worker)])
    replace(stage_in(config_in(tmp_path)), table=writer.tasks[0].table).begin()
    worker.careful, worker.by = str(tmp_path / "note.json"), "me"
    parts = writer._with_left_out(writer.tasks[0], worker, worker("part-00000"))
    assert [json.loads((tmp_path / "note.json").read_text())["at"] for _ in parts] == [""] * (1 + ROWS_PER_SHARD)
    worker.at_row("part-00000/4")
    list(worker("part-00000"))
    assert worker.note["failures"] == {"part-00000/4": 1}
    worker.at_row("part-00000/4")
    worker.by = "somebody else, after it was mended"
    list(worker("part-00000"))
    assert worker.note["failures"] == {}
    worker.note["left_out"] = {"part-00000/4": "of this shard alone"}
    item = {"task": 0, "shard": "part-00001", "tries": 2, "by": "me"}
    assert writer._worker(item) is worker
    failed = writer._note_failure(writer.tasks[0], item, OSError("before its rows"))
    assert failed == {"failed": "OSError: before its rows", "hopeless": False, "of_machine": True}
    assert not Path(f"{writer.tasks[0].failures('part-00001')}.json").exists()


def test_a_machine_that_is_taken_away_charges_no_row(tmp_path: Path) -> None:
    start_ray(config_in(tmp_path))
    worker = CopyShard(print)
    worker.careful, worker.by = str(tmp_path / "note.json"), "me"
    list(worker("part-00000"))
    for node in (worker.note["node"], "f" * 56, worker.note["node"]):
        Path(worker.careful).write_text(json.dumps(worker.note | {"at": "part-00000/4", "node": node}))
        list(worker("part-00000"))
    assert worker.note["failures"] == {"part-00000/4": 2}
    assert list(worker.left_out) == ["part-00000/4"]


def counts_of(folder: Path, num_items: int, machines: str, num_there: int = 0) -> Counts:
    items = {f"part-{i:05d}": 0 for i in range(num_items)}
    task = a_task(folder, items, lambda: CopyShard(print), num_there)
    return Counts(config_in(folder), [task], lambda: dict.fromkeys(machines, "its name"))


def made_on(machine: str) -> dict[str, Any]:
    return {"machine": machine, "num_input": 1, "num_rejected": 0}


def test_where_many_work_a_few_quick_failures_are_not_the_rule(tmp_path: Path) -> None:
    for num_actors, enough in ((2, 3), (10, 10), (512, 32)):
        counts = counts_of(tmp_path, 1000, "a")
        for number in range(enough - 1):
            counts.failed("a", num_actors, f"reason {number}")
        with pytest.raises(StageError, match=rf"{enough} shards failed and 0 went well.*the first one: reason 0"):
            counts.failed("a", num_actors, "the last reason")


def test_the_missing_shards_of_a_run_may_be_its_bad_ones_but_not_hundreds(tmp_path: Path) -> None:
    for num_actors, most in ((2, 12), (512, 128)):
        counts = counts_of(tmp_path, 1000, "a", num_there=1000)
        for _ in range(most):
            counts.failed("a", num_actors, "bad")
        with pytest.raises(StageError, match=f"{most + 1} shards failed"):
            counts.failed("a", num_actors, "bad")


def test_what_begins_to_fail_in_the_middle_is_noticed(tmp_path: Path) -> None:
    counts = counts_of(tmp_path, 10_000, "ab")
    for number in range(5_000):
        counts.made(made_on("ab"[number % 2]), a_table(tmp_path, "web", "copies"), is_first=True)
    for number in range(13):
        counts.failed("ab"[number % 2], 2, "the token has expired")
    with pytest.raises(StageError, match="14 shards failed and 10 went well"):
        counts.failed("b", 2, "the token has expired")


def test_a_bad_machine_does_not_end_the_work_of_the_good_ones(tmp_path: Path) -> None:
    counts = counts_of(tmp_path, 1000, "abcd")
    for _ in range(300):
        counts.failed("a", 8, "its disk is full")
        counts.failed("b", 8, "its disk is full")
    with pytest.raises(StageError, match="went well"):
        counts.failed("c", 8, "its disk is full")


def test_machines_that_did_nothing_in_a_whole_pass_have_no_say(tmp_path: Path) -> None:
    counts = counts_of(tmp_path, 1000, "abcd")  # others' work keeps c and d busy
    for _ in range(9):
        counts.failed("a", 4, "the model is gone")
        counts.failed("b", 4, "the model is gone")
    with pytest.raises(StageError, match=r"18 shards failed and 0 went well.*the model is gone"):
        counts.end_pass()


def test_later_passes_leave_out_machines_on_which_most_fails_while_there_are_others(tmp_path: Path) -> None:
    table, machines = a_table(tmp_path, "web", "copies"), dict.fromkeys("abc", "its name")
    counts = Counts(config_in(tmp_path), [a_task(tmp_path, {}, lambda: CopyShard(print))], lambda: machines)
    counts.failed("a", 2, "its disk is full")
    assert counts.end_pass() == []  # nobody knows a better one
    for _ in range(4):
        counts.made(made_on("b"), table, is_first=True)
    counts.failed("b", 2, "a bad row")
    counts.failed("c", 2, "its disk is full")
    counts.failed("", 2, "its process died")
    assert counts.end_pass() == ["a", "c"]
    del machines["c"]
    assert counts.end_pass() == ["a"]
    del machines["b"]
    assert counts.end_pass() == []


def test_ray_gives_no_shard_to_a_machine_that_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_ray(config_in(tmp_path))
    told: list[str] = []
    monkeypatch.setattr(shards, "say", told.append)
    task = a_task(tmp_path, {"part-00000": 0}, lambda: CopyShard(print))
    passes = shards.Passes(config_in(tmp_path), [task], 1, 0.0)
    assert list(passes.machines()) == [own_node()]
    assert machines_with(num_gpus=1.0) == {}
    passes._leave_out(["f" * 56, own_node()])
    passes._leave_out(["f" * 56])
    names = (passes.machines()[own_node()], "f" * 56)  # another machine has gone, and so has its name
    assert told == [f"copy: most fails on machine {name}, which is left out from now on" for name in names]
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(ray.data.Dataset, "flat_map", lambda *_, **options: given.append(options) or SimpleNamespace())
    for num_gpus in (0.0, 1.0):
        with contextlib.suppress(AttributeError):  # there is nothing to be read
            passes.num_gpus = num_gpus
            passes._results()
    selectors = [{"label_selector": options["label_selector"]} for options in given]
    assert selectors == [passes.elsewhere()] * 2
    somewhere = ray.remote(own_node)
    assert ray.get(somewhere.options(**selectors[0]).remote(), timeout=300) == own_node()
    passes.left_out = [own_node()]
    nowhere = somewhere.options(**passes.elsewhere()).remote()
    assert ray.wait([nowhere], timeout=5)[0] == []
    ray.cancel(nowhere)


def test_rejects_and_failures_repeat_no_credentials(tmp_path: Path) -> None:
    table, signed = a_table(tmp_path, "web", "copies"), "https://store/a?X-Amz-Signature=abcdef0123456789"
    rejects = [Reject("copy", "row", f"403 of {signed}")]
    write_shard(table, "part-0", iter([ShardPart(to_arrow(Passage, []), 1, 0, rejects)]))
    writer = ShardWriter([a_task(tmp_path, {}, lambda: CopyShard(print))])
    try:
        raise RuntimeError(f"403 of {signed}")
    except RuntimeError as error:
        failed = writer._note_failure(writer.tasks[0], {"shard": "part-0", "tries": 0}, error)
    log = Path(table.url, "failures", "part-0.log").read_text()
    told = [failed["failed"], table.rejects.read_rows(Reject, table.rejects.shards()[0])[0].reason, log]
    assert ["X-Amz-Signature=***" in text and "abcdef" not in text for text in told] == [True] * 3


def no_worker() -> CopyShard:
    os._exit(1)


@pytest.mark.slow
def test_processes_that_cannot_start_end_a_stage_of_which_most_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass is broken off, and nobody knows which shards were lost."""
    config = config_in(tmp_path)
    table = make(config, partial(fail_at, "nobody"))
    for shard in ("part-00003", "part-00007"):
        Path(table.url, f"{shard}.parquet").unlink()
    monkeypatch.setattr(shards, "MAX_LOST", 0)
    monkeypatch.setattr(shards, "TASK_RETRIES", 0)
    items = {f"part-{i:05d}": f"part-{i:05d}" for i in range(NUM_SHARDS)}
    Path(table.url, "manifest.json").unlink()
    with pytest.raises(StageError, match="in a row no process could do anything, with 2 shards missing"):
        run_works(stage_in(config).run, [Work(stage_in(config), items, no_worker)])


def test_processes_that_were_replaced_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "machines_with", lambda: {"a": "", "b": ""})
    monkeypatch.setattr(shards, "NOTE_SECS", -1)
    task = a_task(tmp_path, {f"part-{i}": 0 for i in range(9)}, lambda: CopyShard(print))
    table = task.table
    Path(table.url).mkdir(parents=True)
    pace = shards.Pace([task], 1.0)
    where = [("a", 1, ""), ("b", 1, ""), ("a", 1, "failed"), ("a", 2, ""), ("gone", 1, "")]
    for machine, process, failed in where:
        pace.add(made_on(machine) | {"task": 0, "process": process, "failed": failed})
    status = json.loads(Path(table.url, "progress.json").read_text())
    assert (status["num_actors"], status["num_gpus"], pace.max_actors) == (2, 2, 2)


def test_a_machine_that_does_not_see_the_run_is_told_before_it_works_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SEEN_SECS", 1.5)
    writer = ShardWriter([a_task(tmp_path / "at home", {}, lambda: CopyShard(print))])
    item = {"task": 0, "shard": "part-00000", "payload": '"part-00000"', "tries": 0, "by": "me"}
    assert "does not see" in writer.make(item)["error"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_processes_that_all_die_end_the_stage_early(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"copy set=web: \d+ shards failed and 0 went well.*(died|unavailable)"):
        make(config_in(tmp_path), segfault_everywhere)
    tried = list(Path(tmp_path, "run/web/copies/key").glob("*.parquet"))
    assert not tried


def scraped(name: str, run_dir: str) -> str:
    """A metric of a run, as Prometheus reads it from Ray; "" when it does not appear within a minute."""
    port = next(node["MetricsExportPort"] for node in ray.nodes() if node["Alive"])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
        for line in text.splitlines():
            if line.startswith(name) and run_dir in line:
                return line
        time.sleep(1)
    return ""


@pytest.mark.usefixtures("interruptible")
@pytest.mark.slow
def test_waiting_for_a_machine_that_no_cluster_has_is_told_and_can_be_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def interrupt(line: str) -> None:
        told.append(line)
        _thread.interrupt_main()

    monkeypatch.setattr(shards, "WAIT_SECS", 1.0)
    monkeypatch.setattr(shards, "say", interrupt)
    config = config_in(tmp_path, ray={"num_cpus": 2, "max_actors": 1})
    with pytest.raises(KeyboardInterrupt):
        make(config, partial(fail_at, "nobody"), num_gpus=1.0)
    assert [line for line in told if "waiting for a machine with 1 CPU and 1 GPU" in line] == told
    assert ids(make(config_in(tmp_path), partial(fail_at, "nobody"))) == EVERY_ID


def test_a_systematic_error_ends_the_stage_early_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"copy set=web: 3 shards failed and 0 went well.*RuntimeError: nothing works"):
        make(config_in(tmp_path), partial(fail_in, "part"))


@pytest.mark.slow
def test_a_shard_that_cannot_be_made_is_named_when_the_others_are_done(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    with pytest.raises(StageError, match=r"1 of 12 shards cannot be made, part-00001 first.*nothing works"):
        make(config, partial(fail_in, "part-00001"))
    table = make(config, partial(fail_at, "nobody"))  # the cause is mended
    assert ids(table) == EVERY_ID


@pytest.mark.slow
def test_strict_tries_again_what_a_disk_did(tmp_path: Path) -> None:
    (tmp_path / "tries").mkdir()
    error = OSError(errno.ENOSPC, "No space left on device")
    config = config_in(tmp_path, strict=True)
    assert ids(make(config, partial(fail_to_write_at_first, str(tmp_path / "tries"), 3, error))) == EVERY_ID


def test_strict_leaves_no_row_out(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="part-00003 first, after 2 tries: RuntimeError: cannot do part-00003/5"):
        make(config_in(tmp_path, strict=True), partial(fail_at, "part-00003/5"))


@pytest.mark.slow
def test_a_stage_that_keeps_nothing_ends_before_the_rest_is_begun(tmp_path: Path) -> None:
    changes = {"synthesize": {"gates": {"max_chars_per_sec": 8.0}}}
    config = config_in(tmp_path, **changes)
    run_stage(config, "ingest", "natural")
    with pytest.raises(StageError, match=r"of the first .* rows were rejected, so the rest was not begun"):
        run_stage(config, "synthesize", "natural")


@pytest.mark.parametrize("log", ["", "json"])
def test_what_a_row_or_a_file_is_called_is_not_changed(
    log: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SALAD_LOG", log)
    say("libri:a:12 [bold] failed", row="libri:x:12")
    told = capsys.readouterr().out
    assert "libri:a:12 [bold] failed" in told
    assert not log or json.loads(told)["row"] == "libri:x:12"


def test_the_log_can_be_json_with_run_and_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SALAD_LOG", "json")
    config = config_in(tmp_path)
    run_stage(config, "ingest", "heldout")
    show("a table for the eye")
    told = capsys.readouterr().out.splitlines()  # Ray tells late, in its words, of processes that other tests killed
    lines = [json.loads(line) for line in told if "(raylet)" not in line]
    assert lines
    assert all(
        (line["run"], line["stage"], line["set"]) == (config.run_dir, "ingest", "heldout") and line["message"]
        for line in lines
    )


class Follow(WindowWorker):
    """Goes along with the shards of a table: as many rows as it has, but fails at some at first."""

    def __init__(self, table: Table, harm: Callable[[str], None]) -> None:
        self.table, self.harm = table, harm

    def __call__(self, shard: str) -> Iterator[ShardPart]:
        rows: list[Passage] = self.table.read_rows(Passage, shard)
        for window in self.windows(rows, lambda row: row.passage_id, 4):
            for row in window:
                self.harm(row.passage_id)
            yield ShardPart(to_arrow(Passage, window), len(window), len(window))


def test_a_chain_of_four_takes_each_shard_through_all_of_them(tmp_path: Path) -> None:
    """By two actors on two cores; what fails in one of them costs the others nothing, and is made again."""
    config, names = config_in(tmp_path), ("a", "b", "c", "d")
    run = Run(config, Places(config.run_dir, "run", {f"web/{name}": "key" for name in names}))
    items = {f"part-{i:05d}": f"part-{i:05d}" for i in range(NUM_SHARDS)}
    marker = str(tmp_path / "marker")
    harms = {"b": partial(fail_at, "part-00003/5"), "c": partial(break_process_once, marker), "d": partial(fail_at, "")}

    def work_of(step: Step, ahead: Ahead) -> Work:
        stage = Stage.of(run, step, ahead=ahead)
        worker: Any = partial(CopyShard, partial(fail_at, ""))
        if step.along:
            assert list(stage.inputs[step.along]["shards"]) == list(items)
            worker = partial(Follow, run.labelled(step.along), harms[step.tables[0]])
        return Work(stage, items, worker)

    def flow() -> list[Step]:
        reads = [(), *((f"web/{name}",) for name in names)]
        return [
            Step(f"make {name}", "web", (name,), read, by_shard=True, along=(*read, "")[0])
            for name, read in zip(names, reads, strict=False)
        ]

    assert [len(batch) for batch in batches(config, flow())] == [4]
    run_works(run, begun_works(flow(), work_of))
    tables = [run.table("web", name) for name in names]
    lost = "part-00003/5"
    assert ids(tables[0]) == EVERY_ID
    for table in tables[1:]:
        assert ids(table) == [row_id for row_id in EVERY_ID if row_id != lost]
    [reject] = tables[1].rejects.read_rows(Reject, "part-00003")
    assert reject.reason == f"RuntimeError: cannot do {lost}"
    assert Path(marker).exists()
    manifests = [table.manifest() or {} for table in tables]
    assert [manifest["inputs"] for manifest in manifests[1:]] == [
        {table.label: manifest["version"]} for table, manifest in zip(tables, manifests, strict=False)
    ][:3]
    assert all(manifest["busy_secs"] > 0 for manifest in manifests)
    for table in tables[2:]:  # a run that was broken off: the chain begins in the middle
        Path(table.url, "manifest.json").unlink()
        Path(table.url, "part-00001.parquet").unlink()
    run_works(run, begun_works(flow(), work_of))
    assert ids(tables[3]) == [row_id for row_id in EVERY_ID if row_id != lost]


def overlapped(worker: WindowWorker, windows: list[list[int]], load: Callable[[int], int]) -> Iterator[list[int]]:
    return worker.overlapped(windows, load, lambda _, loading: [each.result() for each in loading], num_threads=2)


def test_windows_are_loaded_ahead_and_come_in_order() -> None:
    """A window is computed only while the next one is loaded: with one after the other this would wait for ever."""
    windows = [[0, 1, 2], [3], [], [4, 5]]
    reached = [threading.Event() for _ in windows]

    def load(row: int) -> int:
        reached[next(number for number, window in enumerate(windows) if row in window)].set()
        return row * row

    def compute(window: list[int], loading: list[Future[int]]) -> list[int]:
        number = windows.index(window)
        if number == 0:
            assert reached[1].wait(10), "the second window is not loaded while the first is computed"
        return [each.result() for each in loading]

    made = list(WindowWorker().overlapped(windows, load, compute, num_threads=2))
    assert made == [[row * row for row in window] for window in windows]


def test_a_careful_pass_has_nothing_ahead() -> None:
    """Else the row that is noted would not be the one that fails."""
    worker, seen = WindowWorker(), list[str]()
    worker.careful = "somewhere"

    def windows() -> Iterator[list[int]]:
        for row in range(3):
            seen.append(f"noted {row}")
            yield [row]

    def load(row: int) -> int:
        seen.append(f"loaded {row}")
        return row

    for [row] in worker.overlapped(windows(), load, lambda _, loading: [each.result() for each in loading], 2):
        seen.append(f"written {row}")
    assert seen == [f"{what} {row}" for row in range(3) for what in ("noted", "loaded", "written")]


def test_what_fails_ahead_fails_where_it_belongs() -> None:
    def load(row: int) -> int:
        if row == 3:
            raise RuntimeError("three")
        return row

    made = overlapped(WindowWorker(), [[0], [1, 2], [3, 4], [5]], load)
    assert [next(made), next(made)] == [[0], [1, 2]]
    with pytest.raises(RuntimeError, match="three"):
        next(made)
