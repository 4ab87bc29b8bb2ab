"""One driver at a time makes a table: two would clear each other's temporary files and prune each other's checkpoints.

The lease is a file beside the table's folder. While its holder lives, it counts `beat` up; clocks, which differ, are
not compared. Whoever wants the same table waits, and then finds it done.
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
from salad_ray.store import filesystem, is_local
from salad_ray.tables import delete_file, file_exists, read_json, write_json

BEAT_SECS = 20.0
"""Between two signs of life."""
WAIT_SECS = 60.0
"""Without a sign of life, until a driver of which nothing else is known counts as dead."""
LOOK_SECS = 1.0
"""Between two looks at whether there is one."""
SETTLE_SECS = 0.5
"""Between writing a lease and reading it back: of drivers that start at the same time, the last to write has it."""


class LeaseError(RuntimeError):
    """Another driver has taken over the table that this one was making; the message is for the user."""


@contextmanager
def held(url: str) -> Iterator[None]:
    """Hold the lease of a table's folder; waits while another driver has it, and takes over that of a dead one.

    Raises:
        LeaseError: another driver took it over, as this one gave no sign of life.
    """
    place = f"{url}.lease.json"
    pid = os.getpid()
    own = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": pid, "beat": 0}
    own |= {"machine": _machine(), "started": _started(pid)}
    ended, lost = threading.Event(), threading.Event()
    beating = threading.Thread(target=_beat, args=(url, place, own, ended, lost), daemon=True)
    try:
        while not _made(place, own):
            _wait_for_end(url, place)
            if not _lease(place) and is_local(filesystem(place)[0]) and not file_exists(place):
                continue  # it is gone, and whoever makes it first has it
            asked = time.monotonic()
            write_json(place, own)
            time.sleep(max(SETTLE_SECS, time.monotonic() - asked))  # on a slow store others' writes are slow, too
            if _lease(place).get("id") == own["id"]:
                break
        beating.start()
        yield
    except KeyboardInterrupt:
        if lost.is_set():
            raise LeaseError(
                f"{url}: {_who(_lease(place))} has taken this table over, as this driver gave no sign of life for "
                f"{WAIT_SECS:g} s; this one ends"
            ) from None
        raise
    finally:
        ended.set()
        if beating.is_alive():
            beating.join()  # or it might write once more
        with suppress(Exception):  # what ended the work is what is told; a lease that stays is silent from now on
            if _lease(place).get("id") == own["id"]:
                delete_file(place)


def is_held(url: str) -> bool:
    """Whether somebody seems to be at work on a table."""
    return _may_live(_lease(f"{url}.lease.json"))


def _made(place: str, own: dict[str, Any]) -> bool:
    """Whether a new lease could be made: on a local disk a file is made once. A store gives no such promise."""
    fs, path = filesystem(place)
    if not is_local(fs):
        return False
    fs.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{own['id']}.tmp"
    write_json(temporary, own)
    try:
        os.link(temporary, path)  # whole, or not at all
    except OSError:
        return False
    finally:
        os.unlink(temporary)
    return True


def _lease(place: str) -> dict[str, Any]:
    """What the holder has written; nothing where there is none, or where a machine's crash has left half a file."""
    try:
        return read_json(place) or {}
    except ValueError:
        return {}


def _wait_for_end(url: str, place: str) -> None:
    """Return once nobody has the lease, or only a dead driver, or one that gives no sign of life."""
    seen = _lease(place)
    until = time.monotonic() + WAIT_SECS
    if _may_live(seen):
        say(f"{url}: {_who(seen)} is making this table; waiting for it")
    while _may_live(seen):
        before = seen
        time.sleep(LOOK_SECS)
        asked = time.monotonic()
        seen = _lease(place)
        was_away = time.monotonic() - asked > BEAT_SECS  # the store, for its holder perhaps as well
        if seen != before or was_away:
            until = time.monotonic() + WAIT_SECS
        elif time.monotonic() > until:
            say(f"{url}: {_who(seen)} has given no sign of life for {WAIT_SECS:g} s; its table is taken over")
            return


def _beat(url: str, place: str, own: dict[str, Any], ended: threading.Event, lost: threading.Event) -> None:
    """Show that the holder lives, until it has ended; interrupt it if another driver took it for dead."""
    while not ended.wait(BEAT_SECS):
        with suppress(Exception):  # a store that fails now may work at the next beat
            if _lease(place).get("id", own["id"]) != own["id"]:
                lost.set()
                if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a script
                    say(f"{url}: {_who(_lease(place))} has taken this table over; this driver ends")
                    os._exit(1)
                _thread.interrupt_main()
                return
            own["beat"] += 1
            write_json(place, own)


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
