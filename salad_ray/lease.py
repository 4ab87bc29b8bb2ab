"""One driver at a time on a run: two would clear each other's temporary files and prune each other's checkpoints.

The lease is `run_dir/driver.json`. While its holder lives, it counts `beat` up; clocks, which differ, are not compared.
"""

from __future__ import annotations

import _thread
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from salad_ray.console import say
from salad_ray.tables import delete_file, read_json, write_json

BEAT_SECS = 20.0
"""Between two signs of life."""
WAIT_SECS = 60.0
"""Without a sign of life, until a driver of which nothing else is known counts as dead."""
LOOK_SECS = 1.0
"""Between two looks at whether there is one."""
SETTLE_SECS = 0.5
"""Between writing a lease and reading it back: of drivers that start at the same time, the last to write has it."""


class LeaseError(RuntimeError):
    """A run that another driver works on; the message is for the user."""


@contextmanager
def only_driver(run_dir: str) -> Iterator[None]:
    """Hold the lease of a run, taking over that of a dead driver; raises `LeaseError` while another one lives."""
    url = f"{run_dir}/driver.json"
    pid = os.getpid()
    own = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": pid, "beat": 0}
    own |= {"machine": _machine(), "started": _started(pid)}
    ended, lost = threading.Event(), threading.Event()
    beating = threading.Thread(target=_beat, args=(run_dir, url, own, ended, lost), daemon=True)
    try:
        while _lease(url).get("id") != own["id"]:
            _wait_for_end(run_dir, url)
            asked = time.monotonic()
            write_json(url, own)
            time.sleep(max(SETTLE_SECS, time.monotonic() - asked))  # on a slow store others' writes are slow, too
        beating.start()
        yield
    except KeyboardInterrupt:
        if lost.is_set():
            raise LeaseError(
                f"{run_dir}: {_who(_lease(url))} has taken this run over, as this driver gave no sign of life for "
                f"{WAIT_SECS:g} s; this one ends"
            ) from None
        raise
    finally:
        ended.set()
        if beating.is_alive():
            beating.join()  # or it might write once more
        with suppress(Exception):  # what ended the work is what is told; a lease that stays is silent from now on
            if _lease(url).get("id") == own["id"]:
                delete_file(url)


def _lease(url: str) -> dict[str, Any]:
    """What the holder has written; nothing where there is none, or where a machine's crash has left half a file."""
    try:
        return read_json(url) or {}
    except ValueError:
        return {}


def _wait_for_end(run_dir: str, url: str) -> None:
    """Return once nobody has the lease, or only a dead driver; raises `LeaseError` at a sign of life."""
    first = seen = _lease(url)
    until = time.monotonic() + WAIT_SECS
    if _may_live(first):
        say(f"{run_dir}: {_who(first)} may still be at work; waiting up to {WAIT_SECS:g} s for a sign of life")
    while _may_live(seen):
        if seen != first:
            raise LeaseError(
                f"{run_dir}: {_who(seen)} is at work on this run; wait until it is done, end it there (Ctrl-C, or "
                "`ray job stop` for a job), or choose another run_dir"
            )
        if time.monotonic() > until:
            say(f"{run_dir}: {_who(first)} has given no sign of life; its run is taken over")
            return
        time.sleep(LOOK_SECS)
        asked = time.monotonic()
        seen = _lease(url)
        if time.monotonic() - asked > BEAT_SECS:  # the store was away, for its holder perhaps as well
            until = time.monotonic() + WAIT_SECS


def _beat(run_dir: str, url: str, own: dict[str, Any], ended: threading.Event, lost: threading.Event) -> None:
    """Show that the holder lives, until it has ended; interrupt it if another driver took it for dead."""
    while not ended.wait(BEAT_SECS):
        with suppress(Exception):  # a store that fails now may work at the next beat
            if _lease(url).get("id", own["id"]) != own["id"]:
                lost.set()
                if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a script
                    say(f"{run_dir}: {_who(_lease(url))} has taken this run over; this driver ends")
                    os._exit(1)
                _thread.interrupt_main()
                return
            own["beat"] += 1
            write_json(url, own)


def _who(lease: dict[str, Any]) -> str:
    return f"the driver with pid {lease.get('pid')} on {lease.get('host')}"


def _may_live(lease: dict[str, Any]) -> bool:
    """Whether there is a holder, and not one of this machine whose process is gone."""
    here = _machine()
    return bool(lease) and not (here and lease.get("machine") == here and _started(lease["pid"]) != lease["started"])


def _machine() -> str:
    """Where a pid stands for one process that can be seen from here: boot, container and user; "" where not known.

    The name of the host would not do: containers share it, or their first pids.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process began, in clock ticks since the boot, which tells it from a later one of the same pid; None for
    none, and for one that has died and is not yet buried."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
