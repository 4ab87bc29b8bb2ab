"""What the user sees while work is going on: lines and progress with an ETA."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from salad_ray.credentials import redact

USER_ERRORS = frozenset(
    ["ConfigError", "StageError", "TableError", "ModelError", "BadInput", "StoreError", "LeaseError", "TrainingStopped"]
)
"""What a user can mend; the message is one sentence for the user."""

console = Console(highlight=False, soft_wrap=True, emoji=False)  # an id or a URL may hold `:key:`
if not console.is_terminal and "COLUMNS" not in os.environ:
    console.width = 160  # a job's log or a pipe, where rich would cut tables off at 80 columns

log_facts: dict[str, str] = {}
"""What every line of a JSON log says besides: the run, and the stage and set at work."""


def user_error(error: BaseException | None) -> BaseException | None:
    """The user's error in a chain of causes, however deep Ray has wrapped it."""
    while error is not None:
        cause = getattr(error, "cause", None)
        if cause is not None:  # Ray's wrapper, which poses as an instance of what it wraps, and tells the whole trace
            error = cause
        elif USER_ERRORS & {kind.__name__ for kind in type(error).__mro__}:
            return error
        else:
            error = error.__cause__
    return None


def say(text: str, **facts: Any) -> None:
    """Print one line, flushed, without markup and credentials.

    With `SALAD_LOG=json` it is a JSON object, with `facts` and `log_facts`.
    """
    text = redact(text)
    if as_json():
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "message": text} | log_facts | facts
        text = json.dumps(_redacted(line), ensure_ascii=False)
    console.print(text, markup=False)
    console.file.flush()


def _redacted(value: Any) -> Any:
    """`redact` before the JSON is written, whose quotes it would not know."""
    if isinstance(value, dict):
        return {name: _redacted(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def show(*tables: Any) -> None:
    """Print tables for the eye; a log of JSON has none, since what they show is in the run's files."""
    if not as_json():
        console.print(*tables, sep="\n")


def as_json() -> bool:
    """Whether lines are for a log collector."""
    return os.environ.get("SALAD_LOG") == "json"


@contextlib.contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield `advance(count)`: a bar with an ETA on a terminal; elsewhere (a job's log) a line every ten seconds."""
    if console.is_terminal and not as_json():
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} " + unit))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda count: bar.advance(task, count)
        return
    started = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last > 10 and done < total:
            eta = (now - started) / done * (total - done)
            say(f"{label}: {done}/{total} {unit}, {clock(eta)} to go", done=done, total=total, eta_secs=round(eta, 1))
            last = now

    yield advance


def clock(secs: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(secs), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
