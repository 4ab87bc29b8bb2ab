"""The lease of a run: one driver at a time, and the run of a dead one is not lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from salad_ray import lease
from salad_ray.lease import LeaseError, only_driver

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from salad_ray import lease
lease.BEAT_SECS = float(sys.argv[2])
with lease.only_driver(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""
FOREIGN = {"id": "f", "host": "elsewhere", "pid": 7, "beat": 3, "machine": "another boot", "started": "1"}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, secs in (("BEAT_SECS", 0.05), ("WAIT_SECS", 1.0), ("LOOK_SECS", 0.02), ("SETTLE_SECS", 0.05)):
        monkeypatch.setattr(lease, name, secs)


@contextmanager
def holder(run_dir: Path, beat_secs: float = 0.05) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lease until it is told to end."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir), str(beat_secs)], **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            if process.poll() is None:
                process.communicate("\n")


def file_of(run_dir: Path) -> Path:
    return run_dir / "driver.json"


def read(run_dir: Path) -> dict[str, Any]:
    return json.loads(file_of(run_dir).read_text())


def wait_for(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_living_driver_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "WAIT_SECS", 30.0)
    with holder(tmp_path) as other:
        with pytest.raises(LeaseError, match=rf"the driver with pid {other.pid} on \S+ is at work on this run; wait"):
            only_driver(str(tmp_path)).__enter__()
        assert read(tmp_path)["pid"] == other.pid
    assert not file_of(tmp_path).exists()
    with only_driver(str(tmp_path)):
        assert read(tmp_path)["pid"] == os.getpid()


def test_the_run_of_a_killed_driver_is_taken_over_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with holder(tmp_path) as other:
        other.kill()  # and not yet buried, as where the first process of a container buries nobody
        wait_for(lambda: lease._started(other.pid) is None)
        with only_driver(str(tmp_path)):
            assert read(tmp_path)["pid"] == os.getpid()
    assert "sign of life" not in capsys.readouterr().out


def test_another_process_with_the_pid_of_a_dead_driver_is_not_it(tmp_path: Path) -> None:
    own = {"pid": os.getpid(), "machine": lease._machine(), "started": lease._started(os.getpid())}
    assert lease._may_live(FOREIGN | own)
    assert not lease._may_live(FOREIGN | own | {"started": "1"})


def test_a_driver_on_another_machine_is_waited_for_before_its_run_is_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file_of(tmp_path).write_text(json.dumps(FOREIGN | {"pid": os.getpid()}))
    started = time.monotonic()
    with only_driver(str(tmp_path)):
        assert time.monotonic() - started > 1
        assert read(tmp_path)["id"] != "f"
    told = capsys.readouterr().out
    assert "on elsewhere may still be at work; waiting up to 1 s" in told
    assert "no sign of life; its run is taken over" in told


def test_a_store_that_was_away_does_not_make_a_driver_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder could not write a sign of life either."""
    file_of(tmp_path).write_text(json.dumps(FOREIGN))
    looks = 0

    def slow(url: str) -> dict[str, Any]:
        nonlocal looks
        looks += 1
        if looks == 2:
            time.sleep(1.2)  # longer than a dead driver is waited for
        if looks == 4:
            file_of(tmp_path).write_text(json.dumps(FOREIGN | {"beat": 4}))
        return json.loads(file_of(tmp_path).read_text())

    monkeypatch.setattr(lease, "_lease", slow)
    with pytest.raises(LeaseError, match="is at work on this run"):
        lease._wait_for_end(str(tmp_path), "url")


def test_a_driver_that_ends_in_the_meantime_is_followed(tmp_path: Path) -> None:
    file_of(tmp_path).write_text(json.dumps(FOREIGN))
    ending = threading.Timer(0.2, file_of(tmp_path).unlink)
    ending.start()
    started = time.monotonic()
    with only_driver(str(tmp_path)):
        assert time.monotonic() - started < 1
    ending.join()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_lease_ends_with_its_holder_and_not_before(error: type[BaseException], tmp_path: Path) -> None:
    run_dir = tmp_path / "new" / "run"

    def drive() -> None:
        with only_driver(str(run_dir)):
            wait_for(lambda: read(run_dir)["beat"] > 1)
            raise error

    with pytest.raises(error):
        drive()
    assert list(run_dir.iterdir()) == []


@pytest.mark.usefixtures("interruptible")
def test_who_was_wrongly_held_to_be_dead_ends_and_leaves_the_other_alone(tmp_path: Path) -> None:
    def drive() -> None:
        with only_driver(str(tmp_path)):
            file_of(tmp_path).write_text(json.dumps(FOREIGN))
            time.sleep(30)

    with pytest.raises(LeaseError, match="pid 7 on elsewhere has taken this run over"):
        drive()
    assert read(tmp_path) == FOREIGN


def test_of_drivers_that_start_at_once_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "WAIT_SECS", 30.0)
    together, refused, ended = threading.Barrier(4), [], threading.Event()

    def drive() -> None:
        together.wait()
        try:
            with only_driver(str(tmp_path)):
                ended.wait(30)
        except LeaseError as error:
            refused.append(error)

    drivers = [threading.Thread(target=drive) for _ in range(4)]
    for each in drivers:
        each.start()
    wait_for(lambda: len(refused) == 3)
    ended.set()
    for each in drivers:
        each.join()
    assert len(refused) == 3


def test_half_a_file_is_no_lease(tmp_path: Path) -> None:
    file_of(tmp_path).write_text("")
    with only_driver(str(tmp_path)):
        assert read(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("command", [["run"], ["report"], ["ingest", "--redo"], ["sweep"]])
def test_what_writes_a_run_is_refused_in_a_sentence(command: list[str], tmp_path: Path) -> None:
    arguments = [command[0], "configs/quickstart.yaml", f"run_dir={tmp_path}", *command[1:]]
    with only_driver(str(tmp_path)):
        done = subprocess.run(
            [sys.executable, "-m", "salad_ray.cli", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert [path.name for path in tmp_path.iterdir() if path.suffix != ".tmp"] == ["driver.json"]
    assert done.returncode == 1
    assert f"pid {os.getpid()} on" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
