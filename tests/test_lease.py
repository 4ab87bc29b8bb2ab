"""The lease of a table: one driver at a time, and the table of a dead one is not lost."""

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
from salad_ray.lease import LeaseError, held

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from salad_ray import lease
lease.BEAT_SECS = float(sys.argv[2])
with lease.held(sys.argv[1]):
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
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir / "table"), str(beat_secs)], **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            if process.poll() is None:
                process.communicate("\n")


def file_of(run_dir: Path) -> Path:
    return run_dir / "table.lease.json"


def read(run_dir: Path) -> dict[str, Any]:
    return json.loads(file_of(run_dir).read_text())


def wait_for(what: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_living_driver_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    with holder(tmp_path) as other:
        assert other.stdin is not None
        ending = threading.Timer(1.5, other.stdin.close)  # longer than a dead one is waited for
        ending.start()
        with held(str(tmp_path / "table")):
            assert time.monotonic() - started > 1.4
            assert read(tmp_path)["pid"] == os.getpid()
        ending.join()
        other.wait(30)
    assert not file_of(tmp_path).exists()
    assert f"the driver with pid {other.pid} on" in capsys.readouterr().out


def test_the_run_of_a_killed_driver_is_taken_over_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with holder(tmp_path) as other:
        other.kill()  # and not yet buried, as where the first process of a container buries nobody
        wait_for(lambda: lease._started(other.pid) is None)
        with held(str(tmp_path / "table")):
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
    with held(str(tmp_path / "table")):
        assert time.monotonic() - started > 1
        assert read(tmp_path)["id"] != "f"
    told = capsys.readouterr().out
    assert "the driver with pid" in told
    assert "on elsewhere is making this table; waiting for it" in told
    assert "no sign of life for 1 s; its table is taken over" in told


def test_a_store_that_was_away_does_not_make_a_driver_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its holder could not write a sign of life either."""
    looks: list[float] = []

    def slow(place: str) -> dict[str, Any]:
        looks.append(time.monotonic())
        if len(looks) == 2:
            time.sleep(1.2)  # longer than a dead driver is waited for
        return {} if len(looks) > 4 else FOREIGN

    monkeypatch.setattr(lease, "_lease", slow)
    lease._wait_for_end(str(tmp_path), "url")
    assert len(looks) == 5, "it was not taken over when the store came back, but left when its lease was gone"


def test_a_driver_that_ends_in_the_meantime_is_followed(tmp_path: Path) -> None:
    file_of(tmp_path).write_text(json.dumps(FOREIGN))
    ending = threading.Timer(0.2, file_of(tmp_path).unlink)
    ending.start()
    started = time.monotonic()
    with held(str(tmp_path / "table")):
        assert time.monotonic() - started < 1
    ending.join()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_lease_ends_with_its_holder_and_not_before(error: type[BaseException], tmp_path: Path) -> None:
    run_dir = tmp_path / "new" / "run"

    def drive() -> None:
        with held(str(run_dir / "table")):
            wait_for(lambda: read(run_dir)["beat"] > 1)
            raise error

    with pytest.raises(error):
        drive()
    assert list(run_dir.iterdir()) == []


@pytest.mark.usefixtures("interruptible")
def test_who_was_wrongly_held_to_be_dead_ends_and_leaves_the_other_alone(tmp_path: Path) -> None:
    def drive() -> None:
        with held(str(tmp_path / "table")):
            file_of(tmp_path).write_text(json.dumps(FOREIGN))
            for _ in range(600):
                time.sleep(0.05)  # the interrupt comes after a sleep, not into it

    with pytest.raises(LeaseError, match="pid 7 on elsewhere has taken this table over"):
        drive()
    assert read(tmp_path) == FOREIGN


@pytest.mark.parametrize("place", ["{tmp}/table", "memory://{tmp}/table"])
def test_drivers_that_start_at_once_take_turns(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "WAIT_SECS", 30.0)
    url, together, inside, most = place.format(tmp=tmp_path), threading.Barrier(4), [0], [0]

    def drive() -> None:
        together.wait()
        with held(url):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.2)
            inside[0] -= 1

    drivers = [threading.Thread(target=drive) for _ in range(4)]
    for each in drivers:
        each.start()
    for each in drivers:
        each.join()
    assert most == [1]
    assert not lease.is_held(url)


def test_half_a_file_is_no_lease(tmp_path: Path) -> None:
    file_of(tmp_path).write_text("")
    with held(str(tmp_path / "table")):
        assert read(tmp_path)["pid"] == os.getpid()
