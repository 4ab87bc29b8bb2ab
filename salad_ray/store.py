"""Where files lie: local paths and URLs behind one function, so that all of them are opened alike.

An object store is read without a cache of its listings, since other processes write what this one looks for. One that
answers errors for a while is asked again for a minute and a half, one that does not answer for some minutes (`s3.py`);
one that refuses is a `StoreError`.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

AWS_SETTINGS = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
)
"""What other machines have to be told of a store, if it is set. Keys are no part of it: they have their own roles."""

BROKEN_LINK = "a link that leads nowhere"
_SCRATCH = "salad-scratch-"
_HELD_BY_SECS = 60
"""A scratch folder is locked well within this time after it was made."""


class StoreError(OSError):
    """An object store that refuses or cannot be reached; the message names the object and says what to do."""


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and the path in it; raises `ImportError` where a protocol's package lacks."""
    if url.startswith(("s3://", "s3a://")):
        from salad_ray.s3 import open_s3  # late: whoever has no S3 does not wait for its client

        return open_s3(), url.split("://", 1)[1]
    fs, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return fs, path


def open_file(url: str, mode: str = "rb", **kwargs: Any) -> Any:
    """A file open for reading; keywords are those of fsspec's `open`."""
    fs, path = filesystem(url)
    return fs.open(path, mode, **kwargs)


def list_folder(url: str) -> dict[str, dict[str, Any]]:
    """What lies directly in a folder: name → what the file system knows of it; nothing where there is no folder.

    Asking first whether it is there would not help: an object store's folder goes with its last file.
    """
    fs, path = filesystem(url)
    try:
        found = fs.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    entries = {entry["name"].rstrip("/"): entry for entry in found}
    return {name.rsplit("/", 1)[-1]: entry for name, entry in entries.items() if name != path.rstrip("/")}


def find_files(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
    """Files at or below a path, or that match its `*`: name → what the file system knows of them.

    On a local disk links are followed, for the hub's cache consists of them; a folder to which several lead is read
    once. One that leads nowhere has the type `BROKEN_LINK`.
    """
    try:
        if not is_local(fs):
            found = fs.glob(path, detail=True) if "*" in path else fs.find(path, detail=True)
            return {name: info for name, info in found.items() if info["type"] == "file"}
        names = [name for one in (fs.glob(path) if "*" in path else [path]) for name in _local_files(one, "*" in path)]
        return {name: _local_info(name) for name in names}
    except FileNotFoundError:
        return {}


def _fail(error: OSError) -> None:
    raise error


def _local_files(path: str, is_match: bool) -> list[str]:
    if is_match or not os.path.isdir(path):
        return [path] if os.path.isfile(path) or (os.path.islink(path) and not os.path.exists(path)) else []
    files, seen = [], set()
    for folder, folders, names in os.walk(path, followlinks=True, onerror=_fail):
        folders.sort()
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        files += [os.path.join(folder, name) for name in names]
    return files


def _local_info(path: str) -> dict[str, Any]:
    try:
        state = os.stat(path)
    except FileNotFoundError:
        return {"type": BROKEN_LINK, "size": 0}
    return {"type": "file", "size": state.st_size, "mtime": state.st_mtime}


def read_range(url: str, begin: int, end: int) -> bytes:
    """Bytes [begin, end) of a file; fewer where it ends sooner."""
    fs, path = filesystem(url)
    return bytes(fs.cat_file(path, start=begin, end=end))  # by name: s3fs has the version of an object before them


def as_name(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """A path as `rm` of its file system takes it for just this one: many would expand `?`, `*` and `[`."""
    return path if is_local(fs) or "s3" in fs.protocol else glob.escape(path)


def remove_files(fs: fsspec.AbstractFileSystem, paths: Sequence[str]) -> None:
    """Files that are there; a store removes many with one request."""
    if fs.async_impl and paths:
        fs.rm([as_name(fs, path) for path in paths])
        return
    for path in paths:
        fs.rm_file(path)


def is_of_storage(error: Exception) -> bool:
    """Whether it is the storage that fails, where another try may not: Arrow's own errors, of a damaged file, are plain
    `OSError`s without a number, or with that of a seek to a place that cannot be.
    """
    return isinstance(error, OSError) and (type(error) is not OSError or error.errno not in (None, errno.EINVAL))


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def aws_settings() -> dict[str, str]:
    """Those of `AWS_SETTINGS` that are set for this process."""
    return {name: os.environ[name] for name in AWS_SETTINGS if os.environ.get(name)}


def for_ray(url: str) -> dict[str, Any]:
    """A folder as Ray's run configs take it. A URL goes through this module's file system: Arrow's own would ask other
    variables and profiles for the endpoint and the credentials, and give up sooner.
    """
    if "://" not in url:
        return {"storage_path": url}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = filesystem(url)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}


@contextmanager
def scratch_folder() -> Iterator[str]:
    """A folder on this machine's disk for the length of a block.

    What a process leaves that was killed (Ray ends its workers so) goes when the next one makes a folder: else a
    machine's disk would fill with copies of models.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        _remove_if_left(folder)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, ignore_cleanup_errors=True) as made:
        descriptor = os.open(made, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network file systems lock no folders, and then nothing is cleaned
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # until this process ends, however that is
            yield made
        finally:
            os.close(descriptor)


def _remove_if_left(folder: Path) -> None:
    with suppress(OSError):  # another process holds it, or it is another user's, or gone meanwhile
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if time.time() - os.fstat(descriptor).st_mtime > _HELD_BY_SECS:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)
