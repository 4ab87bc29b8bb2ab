"""Recorded speech from a folder: `transcripts.tsv` and the audio files it names; and what all readers share."""

from __future__ import annotations

import bz2
import csv
import difflib
import io
import lzma
import math
import os
import re
import unicodedata
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from salad_ray.config import ConfigError
from salad_ray.credentials import holds_secret
from salad_ray.names import INGEST
from salad_ray.store import filesystem, is_of_storage, open_file
from salad_ray.tables import BadInput, Reject, Utterance, stable_hash

TABLE = "transcripts.tsv"
REQUIRED = ("utt_id", "audio", "text")
MAX_LINE_BYTES = 2**25
"""Of a line of a manifest or of JSON; a longer one is skipped, and never held in memory."""

READ_BYTES = 2**16
"""Of a compressed file that are decompressed at once."""
XZ_BYTES = 2**28
"""Of memory for an xz file; its highest level needs 65 MiB."""
COMPRESSIONS = ("", ".gz", ".zst", ".bz2", ".xz", ".lzma")
"""Ends of names of files that `decompressed` reads."""
BROKEN = (EOFError, zlib.error, lzma.LZMAError, OSError)
"""What reading `decompressed` raises for a file that breaks off or is damaged; an `OSError` may be the storage's."""
HARMLESS = re.compile(
    r"(^|/)(\.|_success|_(common_)?metadata|_(committed|started)_"
    r"|(readme|licen[cs]e|copying|notice|change(s|log)|citation|authors|contributing|(md5|sha\d+)(sums?)?|checksums?)"
    r"[\w-]*(\.(txt|rst|html|cff|bib))?$)"
    r"|\.(md|crc|md5|sha\d+|asc|sig|py|sh|ipynb|ya?ml|toml|cfg|ini|png|jpe?g|gif|svg|webp|mp4|mkv|avi|mov|webm"
    r"|wav|flac|mp3|ogg|opus|m4a|aac|aiff?|wma|sph)$"
)
"""Names, in lower case, of files that hold no records; any other one beside files that are read is told."""
MAX_NAMED = 20
"""Files that are not read, and told each by its name."""
INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff\u200e\u200f\u202a\u202b\u202c\u202d\u202e"))
"""Soft hyphen, zero-width spaces, marks of direction: nothing of them is said. Joiners stay: they change letters."""
# A field as pandas writes it where it holds a quotation mark, which is then doubled.
_QUOTED = re.compile(r'(?:^|\t)"(?:[^"\t\n]|"")*""(?:[^"\t\n]|"")*"(?=\t|\r?$)', re.MULTILINE)

_ZSTD = b"\x28\xb5\x2f\xfd"
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
_COMPRESSED = re.compile(rb"\x1f\x8b\x08|\x28\xb5\x2f\xfd|BZh[1-9]1AY&SY|\xfd7zXZ\0")
# A record of JSON at the beginning of a line.
_RECORD = re.compile(rb'(?:\A|\n)(?:\xef\xbb\xbf)?\s*\{\s*"')

# How corpora spell languages, beside codes such as en, EN or en-GB.
LANGUAGES = {
    "english": "en", "german": "de", "french": "fr", "chinese": "zh", "japanese": "ja", "korean": "ko", "spanish": "es",
    "italian": "it", "dutch": "nl", "polish": "pl", "portuguese": "pt", "russian": "ru",
}  # fmt: skip


def read_folder(
    folder: str, license: str, name: str = "", allow_outside: bool = False
) -> tuple[list[Utterance], list[Reject]]:
    """Read `folder/transcripts.tsv`: UTF-8, tab-separated, with a header, without quoting or quoted as by pandas.

    Columns: utt_id, audio (relative to the folder) and text; if known speaker, recording_id, offset and duration
    (seconds of a cut of the audio file), domain, language, license. Others are ignored.

    Args:
        folder: a local path or any URL that fsspec opens.
        license: licence of rows that state none.
        name: the corpus and prefix of the ids; "" takes the folder's name.
        allow_outside: believe absolute paths, URLs and links that leave the folder.

    Returns:
        Utterances whose `duration_secs` is what the table says, or 0 where it says nothing (the audio's end), and
        the rows that cannot be used.

    Raises:
        ConfigError: no such folder or table, not UTF-8, or a required column is missing.
    """
    fs, path = filesystem(folder.rstrip("/") or folder)
    root = path if isinstance(fs, LocalFileSystem) else folder.rstrip("/")
    rows = _split(_decode(_read_table(fs, path, folder), f"{folder.rstrip('/')}/{TABLE}"))
    columns = _columns(rows[0][1], f"{folder.rstrip('/')}/{TABLE}")
    return _read_rows(rows[1:], columns, root, license, name or root.rsplit("/", 1)[-1], allow_outside)


def check_folder(folder: str) -> None:
    """Raises `ConfigError` for a folder without a table that can be read."""
    fs, path = filesystem(folder.rstrip("/") or folder)
    table = f"{folder.rstrip('/')}/{TABLE}"
    _columns(_split(_decode(_read_table(fs, path, folder), table))[0][1], table)


def split_of(source: str, heldout_share: float) -> str:
    """`test` for the given share of the sources (or speakers), chosen by a hash that never changes; else `train`."""
    return "test" if stable_hash("split", source) < heldout_share * 2**64 else "train"


class IdSet:
    """Ids that were seen, as 64-bit hashes with open addressing: 11 M of them take 256 MiB, in a `set` 900.

    Two different ids of so many share a hash with a probability of 3 in a million.
    """

    def __init__(self) -> None:
        self._size = 0
        self._slots = array("Q", bytes(8 * 2**10))

    def add(self, name: str) -> bool:
        """Whether the id is new; from now on it is not."""
        is_new = self._insert(stable_hash(name) or 1)  # 0 marks a free slot
        self._size += is_new
        if 3 * self._size > 2 * len(self._slots):
            self._grow(self._slots)
        return is_new

    def _insert(self, key: int) -> bool:
        slots, mask = self._slots, len(self._slots) - 1
        place = key & mask
        while slots[place] != key:
            if not slots[place]:
                slots[place] = key
                return True
            place = (place + 1) & mask
        return False

    def _grow(self, old: Iterable[int]) -> None:
        self._slots = array("Q", bytes(8 * 2 * len(self._slots)))
        for key in old:
            if key:
                self._insert(key)


def language_code(name: str) -> str:
    """English, EN and en-GB as `en`; a name that is not known as it is, in lower case."""
    lower = name.strip().lower()
    code = re.split("[-_]", lower)[0]
    return LANGUAGES.get(lower) or (code if len(code) in (2, 3) else lower)


def inside(path: str, root: str, allow_outside: bool = False) -> str:
    """Where audio lies that a table or manifest names; it must not name other files of this machine, or other machines.

    Raises:
        BadInput: a path that leaves `root`, unless that is allowed.
    """
    if not path:
        raise BadInput("empty audio path")
    if "\0" in path:
        raise BadInput(f"its audio path {path!r} holds a NUL, which no file's name can")
    if holds_secret(path):  # which the reason, the tables and the logs would repeat
        raise BadInput("its audio path holds a credential (a signed URL, say); name the file without it")
    parts = path.replace("\\", "/").split("/")
    is_absolute = parts[0] == "" or ":" in parts[0]
    place = path if is_absolute else f"{root}/{path}"
    if allow_outside:
        return place
    if is_absolute or ".." in parts or "::" in path:  # `::` chains file systems in fsspec's URLs
        raise BadInput(f"audio path '{path}' leaves the folder; give a path relative to it, or set allow_outside=true")
    if "://" not in root and _leads_out(place, root):
        raise BadInput(f"audio path '{path}' is a link out of the folder; copy the file, or set allow_outside=true")
    return place


@lru_cache(maxsize=2**14)  # cuts of one recording follow each other
def _leads_out(place: str, root: str) -> bool:
    return not Path(os.path.realpath(place)).is_relative_to(os.path.realpath(root))


def lines_of(stream: BinaryIO) -> Iterator[tuple[int, bytes | BadInput]]:
    """Numbered lines of a file, in bounded memory, less byte order marks, which files that were joined have at several
    places; in place of a line that is too long, what it is."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES):
        number += 1
        line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
            yield number, line
            continue
        yield number, BadInput(f"a line of more than {MAX_LINE_BYTES} bytes")
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_LINE_BYTES)


def lines_at(url: str, what: str = "file") -> Iterator[tuple[int, bytes | BadInput]]:
    """Numbered lines that are not blank, decompressed; a file that breaks off ends with what is wrong with it."""
    number = 0
    with open_file(url) as file:
        try:
            for number, line in lines_of(decompressed(file)):
                if isinstance(line, BadInput) or line.strip():
                    yield number, line
        except BROKEN as error:
            if is_of_storage(error):
                raise
            yield number + 1, BadInput(f"the {what} is truncated or damaged after line {number} ({error})")


def decompressed(file: BinaryIO) -> BinaryIO:
    """A file's content. How it is compressed, if it is, its first bytes tell: names are often wrong.

    What comes before a break is read; then one of `BROKEN` is raised.
    """
    start = file.read(6)
    file.seek(0)
    if start[:2] == b"\x1f\x8b":
        return io.BufferedReader(_Chunks(inflated(file)), READ_BYTES)
    if start[:4] == _ZSTD or _SKIPPABLE.match(start):
        return io.BufferedReader(_Chunks(_unpacked_zstd(file)), READ_BYTES)
    if re.match(rb"BZh[1-9]", start):
        return io.BufferedReader(_Chunks(_unpacked(file, bz2.BZ2Decompressor, b"BZh")), READ_BYTES)
    if start == b"\xfd7zXZ\0":
        return io.BufferedReader(_Chunks(_unpacked(file, partial(lzma.LZMADecompressor, memlimit=XZ_BYTES), start)))
    if start[:3] == b"]\0\0":  # xz's forerunner, .lzma
        unpack = partial(lzma.LZMADecompressor, lzma.FORMAT_ALONE, memlimit=XZ_BYTES)
        return io.BufferedReader(_Chunks(_unpacked(file, unpack, start[:3])), READ_BYTES)
    return file


def inflated(file: BinaryIO) -> Iterator[bytes]:
    """The content of a gzip, of one or more members; bytes behind them that are no gzip are left, as gzip does, unless
    they are lines of JSON, which somebody appended.

    Raises:
        EOFError: it breaks off.
        zlib.error: it is damaged.
    """
    inflate, has_begun = zlib.decompressobj(wbits=31), False
    while block := file.read(READ_BYTES):
        while block:
            if not has_begun and not (block := block.lstrip(b"\0")):  # tapes and some programs pad with zeros
                break
            if not has_begun and not b"\x1f\x8b".startswith(block[:2]):
                yield from _rest(block, file)
                return
            has_begun = True
            yield inflate.decompress(block, READ_BYTES)
            block = inflate.unconsumed_tail
            if inflate.eof:
                block, inflate, has_begun = inflate.unused_data, zlib.decompressobj(wbits=31), False
    if has_begun:
        raise EOFError("it breaks off before the end of the gzip")


def _unpacked(file: BinaryIO, decompressor: Callable[[], Any], magic: bytes) -> Iterator[bytes]:
    """The same of bzip2 or xz, one or more streams, and perhaps zeros behind them, as xz pads."""
    unpack = None
    while block := file.read(READ_BYTES):
        while block or (unpack and not unpack.needs_input):
            if unpack is None:
                if not (block := block.lstrip(b"\0")):
                    break
                if not magic.startswith(block[: len(magic)]):
                    yield from _rest(block, file)
                    return
                unpack = decompressor()
            yield unpack.decompress(block, READ_BYTES)
            block = b""
            if unpack.eof:
                block, unpack = unpack.unused_data, None
    if unpack:
        raise EOFError("it breaks off before the end of what is compressed")


def _unpacked_zstd(file: BinaryIO) -> Iterator[bytes]:
    """The same of Zstandard; other bytes behind it are told, as many of its files have no checksum."""
    rest: list[bytes] = []
    stream = pa.CompressedInputStream(pa.PythonFile(_Chunks(_zstd_frames(file, rest)), "r"), "zstd")
    while chunk := stream.read(READ_BYTES):
        yield chunk
    if not rest:
        return
    num_others = 0
    for block in _rest(rest[0] + file.read(READ_BYTES), file):
        num_others += len(block)
        yield block
    if not num_others:
        yield b"\n"  # lest a last line without one be lost with the error
        raise EOFError("its end is followed by bytes that are no Zstandard")


def _zstd_frames(file: BinaryIO, rest: list[bytes]) -> Iterator[bytes]:
    """The frames of a Zstandard file (RFC 8878, section 3.1), block by block, for Arrow's decoder stops at other bytes
    and loses what it holds; less the frames to be skipped, which pzstd writes, and zeros.

    Args:
        rest: is given the first bytes that are no frame.
    """
    while start := file.read(4):
        if _SKIPPABLE.match(start):
            left = int.from_bytes(file.read(4), "little")
            while left and (skipped := file.read(min(left, READ_BYTES))):
                left -= len(skipped)
        elif start == _ZSTD:
            header = file.read(1)
            flags = header[0] if header else 0
            size = (not flags & 32) + (0, 1, 2, 4)[flags & 3] + (flags >> 5 & 1, 2, 4, 8)[flags >> 6]
            yield start + header + file.read(size)
            is_last = False
            while not is_last and len(block := file.read(3)) == 3:
                number = int.from_bytes(block, "little")
                is_last = bool(number & 1)
                yield block + file.read(1 if number >> 1 & 3 == 1 else number >> 3)
            if is_last and flags & 4:
                yield file.read(4)
        elif any(start):
            rest.append(start)
            return


def _rest(block: bytes, file: BinaryIO) -> Iterator[bytes]:
    """What follows the end of what is compressed: lines of JSON as they are, else nothing.

    Raises:
        EOFError: it holds a further compressed file.
    """
    block += file.read(READ_BYTES)
    is_json = _RECORD.search(block) is not None
    while block:
        if is_json:
            yield block
        elif _COMPRESSED.search(block):
            yield b"\n"  # lest a last line without one be lost with the error
            raise EOFError("its end is followed by other bytes, and these perhaps by another compressed file")
        block = file.read(READ_BYTES)


class _Chunks(io.RawIOBase):
    """Pieces of a file as a stream, which gives all of them before it raises what they do."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.chunks, self.left = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.left:
            chunk = next(self.chunks, None)
            if chunk is None:
                return 0
            self.left = chunk
        size = min(len(buffer), len(self.left))
        buffer[:size], self.left = self.left[:size], self.left[size:]
        return size


def normalize_text(text: str) -> str:
    """Unicode NFC without invisible characters, and every run of white space as one space; nothing else changes."""
    return " ".join(unicodedata.normalize("NFC", text.translate(INVISIBLE)).split())


def _read_table(fs: fsspec.AbstractFileSystem, path: str, folder: str) -> bytes:
    try:
        return fs.cat_file(f"{path}/{TABLE}")
    except NotADirectoryError:
        raise ConfigError(f"{folder}: a file, but a folder with {TABLE} is needed") from None
    except (FileNotFoundError, IsADirectoryError):
        parent, _, name = path.rpartition("/")
        missing = (path, TABLE) if fs.isdir(path) else (parent, name)
        raise ConfigError(_not_found(fs, folder, *missing)) from None
    except OSError as error:
        raise ConfigError(f"{folder}/{TABLE}: cannot be read ({error})") from None


def _not_found(fs: fsspec.AbstractFileSystem, folder: str, parent: str, name: str) -> str:
    if name != TABLE and fs.exists(f"{parent}/{name}"):
        return f"{folder}: a file, but a folder with {TABLE} is needed"
    entries = fs.ls(parent, detail=False) if fs.isdir(parent) else []
    near = difflib.get_close_matches(name, [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries], n=1)
    what = f"has no {TABLE}, the table of utt_id, audio and text" if name == TABLE else "no such folder"
    return f"{folder}: {what}" + (f"; did you mean '{near[0]}'?" if near else "")


def _decode(data: bytes, table: str) -> str:
    try:
        return data.decode("utf-8-sig").replace("\n\ufeff", "\n")  # of tables that were joined
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{table}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the table as UTF-8"
        ) from None


def _split(text: str) -> list[tuple[int, list[str]]]:
    """Line numbers and fields of a table, its header first.

    A quotation mark is one of the text's, unless the table can be read by pandas' rules and shows signs of them: a
    quoted header, a doubled mark, or lines that only these rules put together to the header's number of fields.
    """
    plain = [(number, line.rstrip("\r").split("\t")) for number, line in enumerate(text.split("\n"), start=1)]
    if '"' not in text:
        return plain
    rows: list[tuple[int, list[str]]] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
    end = 0
    try:
        for fields in reader:
            rows.append((end + 1, fields))
            end = reader.line_num
    except csv.Error:  # marks that no such rules put there
        return plain
    width = len(plain[0][1])
    is_torn = any(len(fields) != width for _, fields in plain if any(fields)) and all(
        len(fields) == width for _, fields in rows if any(fields)
    )
    return rows if is_torn or text.startswith('"') or _QUOTED.search(text) else plain


def _columns(header: Sequence[str], table: str) -> list[str]:
    columns = [name.strip() for name in header]
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        near = difflib.get_close_matches(missing[0], columns, n=1)
        hint = f"did you mean '{near[0]}' as '{missing[0]}'?" if near else "the first line must name the columns"
        if len(columns) == 1:
            hint = "columns must be separated by tabs"
        raise ConfigError(f"{table}: no column {_names(missing)} among {_names(columns)}; {hint}")
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise ConfigError(f"{table}: column {_names(twice)} appears more than once; name each column once")
    return columns


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _read_rows(
    rows: Sequence[tuple[int, list[str]]],
    columns: Sequence[str],
    root: str,
    license: str,
    corpus: str,
    allow_outside: bool,
) -> tuple[list[Utterance], list[Reject]]:
    utterances: list[Utterance] = []
    rejects: list[Reject] = []
    first_line: dict[str, int] = {}
    for number, fields in rows:
        if not any(field.strip() for field in fields):
            continue
        # A row is known by its id only when it has one and its fields can be told apart.
        name = fields[columns.index("utt_id")].strip() if len(fields) == len(columns) else ""
        utt_id = f"{corpus}/{name}"
        try:
            row = _row(fields, columns)
            if utt_id in first_line:
                raise BadInput(f"duplicate utt_id; line {first_line[utt_id]} of {TABLE} has it first")
            first_line[utt_id] = number
            utterances.append(_utterance(row, utt_id, root, corpus, license, allow_outside))
        except BadInput as error:
            rejects.append(Reject(INGEST, utt_id if name else f"{root}/{TABLE}:{number}", str(error)))
    return utterances, rejects


def _row(fields: Sequence[str], columns: Sequence[str]) -> dict[str, str]:
    if len(fields) != len(columns):
        raise BadInput(f"{len(fields)} fields where the header has {len(columns)}")
    row = {name: field.strip() for name, field in zip(columns, fields, strict=True)}
    if not row["utt_id"]:
        raise BadInput("empty utt_id")
    return row


def _utterance(
    row: dict[str, str], utt_id: str, root: str, corpus: str, license: str, allow_outside: bool
) -> Utterance:
    text = normalize_text(row["text"])
    if not text:
        raise BadInput("empty transcript")
    duration_secs = _seconds(row, "duration")
    if duration_secs == 0 and row.get("duration"):
        raise BadInput(f"duration '{row['duration']}' must be above 0")
    return Utterance(
        utt_id=utt_id,
        text=text,
        duration_secs=duration_secs,
        recording_id=f"{corpus}/{row.get('recording_id') or row['utt_id']}",
        corpus=corpus,
        source=f"{corpus}/{row.get('recording_id') or row['utt_id']}",
        speaker=row.get("speaker", ""),
        language=row.get("language") or "en",
        license=row.get("license") or license,
        domain=row.get("domain", ""),
        uri=inside(row["audio"], root, allow_outside),
        offset_secs=_seconds(row, "offset"),
    )


def _seconds(row: dict[str, str], column: str) -> float:
    value = row.get(column, "")
    try:
        seconds = float(value or 0)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise BadInput(f"{column} '{value}' is not a number of seconds")
    return seconds
