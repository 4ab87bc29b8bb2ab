"""Tar archives as places where audio lies: an index of byte ranges, made in one pass. Nothing is ever extracted.

So no name in an archive is ever used as a path, and links and devices lead nowhere.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from salad_ray.speech.readers import inflated
from salad_ray.store import filesystem
from salad_ray.tables import BadInput, atomic_file, file_exists, stable_hash

BLOCK_BYTES = 2**23
"""Read ahead on object stores: headers are some ten kilobytes apart, and a request each costs more than reading all."""
MAX_META_BYTES = 2**20
"""Largest JSON file, and largest extended header, that is believed."""
MAX_RATIO = 20
"""Speech is compressed already; a gzip that grows more is a decompression bomb."""
FREE_BYTES = 2**26
"""Below this much output the ratio does not matter."""
# What tarfile raises for an archive that is not whole, and for numbers in its headers, which it hardly checks.
_MALFORMED = (tarfile.TarError, EOFError, ValueError, OverflowError, IndexError, RecursionError)


@dataclass(frozen=True)
class Member:
    """A file in an archive; `content` only of small metadata."""

    name: str
    byte_start: int
    num_bytes: int
    content: bytes | None = None


@dataclass(frozen=True)
class Unusable:
    """A member, or the archive (`name` ""), that cannot be used, and why."""

    name: str
    reason: str


class _Bounded:
    """A file of `size` bytes that refuses what only forged headers ask for: huge reads, and places behind its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_META_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.file.read(size)

    def seek(self, position: int) -> int:
        if not 0 <= position <= self.size:
            raise tarfile.ReadError(f"a member leads to byte {position:,}")
        return self.file.seek(position)

    def tell(self) -> int:
        return self.file.tell()


def members(url: str, max_member_bytes: int, block_bytes: int = BLOCK_BYTES) -> Iterator[Member | Unusable]:
    """Every entry of a tar but folders, in its order; `.json` members with their content.

    A tar that is cut off gives all that is whole before the cut, and then says where it ends.

    Args:
        block_bytes: read at once on object stores.
    """
    fs, path = filesystem(url)
    size = fs.info(path)["size"]
    with fs.open(path, "rb", block_size=block_bytes) as file:
        end = 0
        try:
            with tarfile.open(fileobj=cast(Any, _Bounded(file, size)), mode="r:") as tar:
                for info in tar:
                    if info.size < 0:  # forged: tarfile would go backwards
                        raise tarfile.ReadError("a member of negative size")
                    end = tar.offset
                    if not info.isdir():
                        yield _member(info, file, size, max_member_bytes)
            yield from _after(file, end, size)
        except _MALFORMED as error:
            yield Unusable("", f"the archive is truncated or damaged at byte {min(end, size):,} of {size:,} ({error})")


def _after(file: BinaryIO, end: int, size: int) -> Iterator[Unusable]:
    """What is wrong behind the last member that tarfile found: it takes a damaged header for the end."""
    file.seek(end)
    rest = file.read(min(max(0, size - end), MAX_META_BYTES))
    position = end + len(rest) - len(rest.lstrip(b"\0"))
    if len(rest) < 512:
        yield Unusable("", f"the archive ends at byte {size:,} without its end mark, so it is truncated")
    elif position < end + 512:
        yield Unusable("", f"the archive is damaged at byte {end:,} of {size:,}; nothing from there on is read")
    elif position < end + len(rest):
        yield Unusable("", f"another archive follows the first one's end at byte {end:,}; it is not read")


def _member(info: tarfile.TarInfo, file: BinaryIO, size: int, max_member_bytes: int) -> Member | Unusable:
    parts = info.name.replace("\\", "/").split("/")
    is_meta = info.name.endswith(".json")
    most = min(MAX_META_BYTES, max_member_bytes) if is_meta else max_member_bytes
    if parts[0] == "" or ":" in parts[0] or ".." in parts:
        return Unusable(info.name, "its name leaves the archive's folder")
    if not info.isreg() or info.issparse():
        return Unusable(info.name, "not a plain file (a link, a device or a sparse file)")
    if info.size > most:
        return Unusable(
            info.name, f"{info.size:,} bytes, above the {most:,} that are allowed (ingest.max_member_bytes)"
        )
    if info.offset_data + info.size > size:
        return Unusable(info.name, f"truncated: the archive ends at byte {size:,}, within it")
    if not is_meta:
        return Member(info.name, info.offset_data, info.size)
    file.seek(info.offset_data)
    return Member(info.name, info.offset_data, info.size, file.read(info.size))


def unpack(archive: str, target: str) -> str:
    """Decompress a tar.gz once, as a whole: gzip has no random access.

    Args:
        target: where to, `….tar`; what tells one state of the archive from another is added to the name.

    Returns:
        Where it is. A gzip that breaks off gives a tar that does.

    Raises:
        BadInput: not a gzip, or one that grows more than audio can.
    """
    fs, path = filesystem(archive)
    info = fs.info(path)
    state = stable_hash(info["size"], info.get("ETag") or info.get("mtime") or "")
    target = f"{target.removesuffix('.tar')}-{state:016x}.tar"
    if file_exists(target):
        return target
    with fs.open(path, "rb", block_size=BLOCK_BYTES) as packed, atomic_file(target) as unpacked:
        written = 0
        for chunk in _decompress(packed, archive):
            written += len(chunk)
            if written > max(FREE_BYTES, MAX_RATIO * info["size"]):
                raise BadInput(
                    f"{archive} grows to more than {MAX_RATIO} times its size: a decompression bomb, refused"
                )
            unpacked.write(chunk)
    return target


def _decompress(packed: BinaryIO, archive: str) -> Iterator[bytes]:
    """The content, as far as it goes: where a gzip breaks off, the tar inside will be found cut off."""
    if packed.read(2) != b"\x1f\x8b":
        raise BadInput(f"{archive} is not a gzip file")
    packed.seek(0)
    try:
        with suppress(EOFError):
            yield from inflated(packed)
    except zlib.error as error:
        raise BadInput(f"{archive} is not a gzip file, or damaged ({error})") from None
