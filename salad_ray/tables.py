"""The tables between stages: row types, Parquet shards, rejects and manifests.

A table is a folder `run_dir/<set>/<name>/<key>/` of Parquet shards plus `manifest.json`, which is written last; the key
is a hash of what decides its content (`runs.py`). A shard is the unit of work, of resume and of retry: it appears whole
or not at all, under a name fixed by its input, so a shard that is done twice is still there once. What a stage leaves
out goes to `rejects/` in the table's folder, with the reason. Paths may be local or any URL that fsspec opens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypedDict, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from salad_ray.store import as_name, filesystem, is_local, list_folder, remove_files, scratch_folder

SCHEMA_VERSION = 5
"""Of row types and of the manifests' totals: raised, it makes all tables anew."""
SAMPLES, SAMPLE_BYTES = 16, 2**20
"""Of a file that is too large to be read whole for its hash."""
READ_AT_ONCE = 32
"""An object store answers one request after the other too slowly for thousands of shards."""

Content = TypeVar("Content")


class TableError(RuntimeError):
    """A table that is missing or damaged; the message says what to do."""


class BadInput(ValueError):
    """One input that cannot be used; the message is the reason that goes into `rejects`."""


class Totals(TypedDict, total=False):
    """What the shards of a table add up to, besides its rows: `totals` of its manifest, of each stage its own. Hours
    are of audio."""

    hours: float
    training_hours: float
    """Of them, without what is held out."""
    training_hours_by_domain: dict[str, float]
    hours_by_corpus: dict[str, dict[str, float]]
    """And by licence."""
    num_kept_aside: int
    """Passages that are kept from training, to be measured."""
    num_chars_cut: dict[str, int]
    """By the reason why they cannot be spoken."""
    num_passages_by_cluster: dict[str, int]
    num_chars_by_cluster: dict[str, int]
    num_unsaid_signs: int
    """Emoji, "♪", "「" and the like, which stay in the text."""
    num_unsaid_asides: int
    """Sounds and notes in brackets ("[laughter]", "[12]") and tags, which stay in it too."""
    num_tokens_cut: int
    """Beyond the context."""
    num_untimed: int
    """Utterances without word times, which are not measured whole."""


def add_totals(totals: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Add those of a part, label by label."""
    for name, value in own.items():
        if isinstance(value, Mapping):
            add_totals(totals.setdefault(name, {}), value)
        else:
            totals[name] = totals.get(name, 0) + value


@dataclass(frozen=True, slots=True)
class Word:
    """One whitespace-separated word of an utterance: `[w.text for w in words] == text.split()`."""

    text: str
    start_secs: float
    end_secs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A piece of text that is embedded, clustered, selected and spoken as a whole."""

    passage_id: str
    doc_id: str
    text: str
    source: str = ""
    url: str = ""
    license: str = ""
    domain: str = ""
    split: str = "train"
    cluster_id: int | None = None
    uri: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """A passage's sentence embedding: float16 (dim,) of unit length; and what the draw needs to know of the passage."""

    passage_id: str
    embedding: bytes
    num_chars: int
    split: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """The cluster of a passage, its distance from the centroid, and what the draw needs.

    `priority` is the passage's place in every draw of this seed: a hash of 63 bits.
    """

    passage_id: str
    cluster_id: int
    distance: float
    priority: int
    num_chars: int
    split: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A cluster of web text: `centroid` is float32 (dim,) in C order; the price balances (selection/kmeans.py)."""

    cluster_id: int
    centroid: bytes
    price: float
    web_share: float
    num_passages: int
    num_chars: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """A passage that was drawn: `rank` is its place in the order of all budgets, `weight` P_target / P_web.

    `shard` of the web's passages holds it; `duration_secs` is what its characters are expected to take.
    """

    passage_id: str
    cluster_id: int
    weight: float
    rank: int
    shard: str
    duration_secs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Utterance:
    """Speech with its text; the audio by reference or, if synthetic, as encoded bytes.

    A reference is the file `uri`, or `num_bytes` of it from `byte_start` on (a member of a tar), and in that audio the
    cut of `duration_secs` from `offset_secs` on. `source` is the book, video or document, which splits never divide.
    `order` counts the clips of a recording where their offsets are not known: 4 follows 3 directly.
    """

    utt_id: str
    text: str
    duration_secs: float
    recording_id: str
    corpus: str
    speaker: str = ""
    language: str = "en"
    license: str = ""
    domain: str = ""
    split: str = "train"
    passage_id: str | None = None
    cluster_id: int | None = None
    words: list[Word] | None = None
    source: str = ""
    order: int | None = None
    pre_text: str = ""
    dnsmos: float | None = None
    align_score: float | None = None
    uri: str | None = None
    byte_start: int | None = None
    num_bytes: int | None = None
    offset_secs: float = 0.0
    audio: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Encoded speech; the rest is copied from the utterance, `source` too: the book, video or document.

    `features` holds (num_frames, dim) in C order: float16, or int8 where `scales`, float16 (dim,), are given, by which
    the channels are multiplied.
    """

    utt_id: str
    recording_id: str
    offset_secs: float
    duration_secs: float
    domain: str
    split: str
    text: str
    words: list[Word] | None
    num_frames: int
    frame_rate: float
    dim: int
    features: bytes
    scales: bytes | None = None
    order: int | None = None
    source: str = ""


@dataclass(frozen=True, slots=True)
class Span:
    """Units [start, end) of a passage, heard (`is_speech`) or read; sequences/interleave.py says what a unit is."""

    start: int
    end: int
    is_speech: bool


@dataclass(frozen=True, slots=True)
class PlanSegment:
    """One sample of a training row: consecutive utterances (`rows` of a feature `shard`) and their spans."""

    shard: str
    rows: list[int]
    spans: list[Span]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """Row number `row` of a lane in an epoch, as references; `num_positions` and `num_labels` count the student's."""

    lane: int
    epoch: int
    row: int
    num_positions: int
    num_labels: int
    segments: list[PlanSegment]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Sums over the scored positions of one passage at one distance from its last speech frame.

    `protocol` says how the passage was heard (evaluation/protocols.py). `source` is the book, video or document that it
    is of: what was sampled, and so the unit of standard errors.
    """

    system: str
    protocol: str = "interleaved"
    passage: str
    source: str = ""
    domain: str
    distance: int
    num_positions: int
    misalignment: float
    forgetting: float
    distillation: float
    nll_speech: float
    nll_text: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A multiple-choice item: `before`, `spoken` and `after` make the prompt, a space and a choice continue it.

    `spoken` alone is heard; `audio` is a recording of it, where the format brings one.
    """

    item_id: str
    benchmark: str
    domain: str
    before: str
    spoken: str
    after: str
    choices: list[str]
    answer: int
    audio: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a system made of an item; a prediction is None where the largest value is not alone.

    `log_likelihoods` (nats) are summed over the tokens of each choice; `prediction` takes the largest,
    `prediction_norm` the largest per character. `num_shots` counts the exemplars that fitted in front of the item.
    """

    system: str
    benchmark: str
    item_id: str
    modality: str
    condition: str
    domain: str
    log_likelihoods: list[float]
    answer: int
    prediction: int | None
    prediction_norm: int | None
    num_shots: int
    heard: str | None = None
    word_error_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Reject:
    """An input that was left out, and why."""

    stage: str
    key: str
    reason: str


_WORDS = pa.list_(pa.struct([("text", pa.string()), ("start_secs", pa.float64()), ("end_secs", pa.float64())]))
_SPANS = pa.list_(pa.struct([("start", pa.int64()), ("end", pa.int64()), ("is_speech", pa.bool_())]))
_SEGMENTS = pa.list_(pa.struct([("shard", pa.string()), ("rows", pa.list_(pa.int64())), ("spans", _SPANS)]))
_TYPES = {
    "str": pa.string(),
    "str | None": pa.string(),
    "int": pa.int64(),
    "int | None": pa.int64(),
    "float": pa.float64(),
    "float | None": pa.float64(),
    "bytes": pa.binary(),
    "bytes | None": pa.binary(),
    "list[Word] | None": _WORDS,
    "list[PlanSegment]": _SEGMENTS,
    "list[str]": pa.list_(pa.string()),
    "list[float]": pa.list_(pa.float64()),
}

_PARQUET = ds.ParquetFileFormat(
    default_fragment_scan_options=ds.ParquetFragmentScanOptions(
        pre_buffer=True, cache_options=pa.CacheOptions(hole_size_limit=2**20, range_size_limit=2**25, lazy=False)
    )
)
"""Pieces of a shard that are a megabyte apart are read as one: a store sends that much sooner than it answers anew."""


def schema_of(row_type: type) -> pa.Schema:
    """The Arrow schema of a row type."""
    return pa.schema([(field.name, _TYPES[str(field.type)]) for field in dataclasses.fields(row_type)])


def to_arrow(row_type: type, rows: Iterable[Any]) -> pa.Table:
    """Rows (instances of `row_type`) as an Arrow table."""
    return pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=schema_of(row_type))


def from_arrow(row_type: type, table: pa.Table) -> list[Any]:
    """The rows of an Arrow table as instances of `row_type`."""
    columns = {name: _values(name, table[name]) for name in table.column_names}
    return [row_type(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def _values(name: str, column: pa.ChunkedArray) -> list[Any]:
    """A column as Python values; words, the many small ones, by way of flat columns, which is several times faster."""
    if name == "segments":
        return [[_plan_segment(**segment) for segment in row] for row in column.to_pylist()]
    if name != "words":
        return column.to_pylist()
    lists = column.combine_chunks()
    flat = lists.flatten().flatten()
    words = iter([Word(*fields) for fields in zip(*(values.to_pylist() for values in flat), strict=True)])
    return [
        None if length is None else list(islice(words, length)) for length in pc.list_value_length(lists).to_pylist()
    ]


def _plan_segment(shard: str, rows: list[int], spans: list[dict[str, Any]]) -> PlanSegment:
    return PlanSegment(shard, rows, [Span(**span) for span in spans])


@dataclass(frozen=True)
class Table:
    """One table: `Table(url, "natural", "utterances")`, set "" for what the whole run shares (`runs.py` finds it)."""

    url: str
    """Its folder."""
    set: str
    name: str

    @property
    def label(self) -> str:
        """`natural/utterances`, or `teacher`."""
        return table_label(self.set, self.name)

    @property
    def rejects(self) -> Table:
        """The rows that were left out of this table, shard by shard, and why."""
        return Table(f"{self.url}/rejects", self.set, "rejects")

    def is_new(self) -> bool:
        """Whether nothing was written."""
        return not list_folder(self.url)

    def shards(self) -> list[str]:
        """Names of the finished shards, sorted."""
        return sorted(name.removesuffix(".parquet") for name in list_folder(self.url) if name.endswith(".parquet"))

    def read(self, shard: str, columns: Sequence[str] | None = None) -> pa.Table:
        """One shard as an Arrow table; raises `TableError` naming the file when it is missing or damaged."""
        with self._open(shard) as file:
            return _PARQUET.make_fragment(file).to_table(columns=columns)

    @contextmanager
    def _open(self, shard: str, cache_type: str = "none") -> Iterator[Any]:
        """A shard's file: uncached, since Arrow reads what it needs and no more, or for reading straight on."""
        url = f"{self.url}/{shard}.parquet"
        fs, path = filesystem(url)
        try:
            with fs.open(path, "rb", cache_type=cache_type) as file:
                yield file
        except FileNotFoundError:
            raise TableError(f"{url} is missing; {self._remedy}, it makes what is missing") from None
        except pa.ArrowInvalid as error:
            raise TableError(f"{url} is damaged ({error}); delete it and {self._remedy}") from None

    @property
    def _remedy(self) -> str:
        manifest = read_json(f"{self.url}/manifest.json") or {}
        where = f" set={self.set}" if self.set else ""
        return f"rerun `salad {manifest['stage']} CONFIG{where}`" if manifest else "rerun the stage that writes it"

    def metadata(self, shard: str) -> pq.FileMetaData:
        """A shard's footer; raises as `read`."""
        with self._open(shard) as file:
            return pq.ParquetFile(file).metadata

    def read_rows(self, row_type: type, shard: str) -> list[Any]:
        return from_arrow(row_type, self.read(shard))

    def read_where(self, row_type: type, shard: str, column: str, values: Iterable[str]) -> list[Any]:
        """The rows of a shard with one of these values in a column; of the others little is read, and none kept."""
        wanted = pa.array(list(values), pa.string())
        with self._open(shard) as file:
            fragment = _PARQUET.make_fragment(file)
            fragment.ensure_complete_metadata()
            hits = np.flatnonzero(pc.is_in(fragment.to_table(columns=[column])[column], wanted))
            ends = np.cumsum([group.num_rows for group in fragment.row_groups])
            groups = np.unique(np.searchsorted(ends, hits, side="right")).tolist()
            if not groups:
                return []
            rows = fragment.subset(row_group_ids=groups).to_table(filter=pc.field(column).isin(wanted))
        return from_arrow(row_type, rows)

    def iterate(self, row_type: type, shard: str, batch_rows: int = 256) -> Iterator[Any]:
        """The rows of a shard one after the other, `batch_rows` of them in memory; raises as `read`."""
        with self._open(shard, "readahead") as file:
            for batch in pq.ParquetFile(file).iter_batches(batch_rows):
                yield from from_arrow(row_type, pa.Table.from_batches([batch]))

    def write(self, shard: str, table: pa.Table) -> None:
        """Write one shard; it appears whole or not at all."""
        with self.writer(shard, table.schema) as write:
            write(table)

    @contextmanager
    def writer(
        self, shard: str, schema: pa.Schema, footer: dict[str, str] | None = None
    ) -> Iterator[Callable[[pa.Table], None]]:
        """Write one shard piece by piece, in bounded memory; it appears when the block ends without an error.

        Args:
            footer: filled by the caller before the block ends; it becomes the file's metadata.
        """
        url = f"{self.url}/{shard}.parquet"
        with atomic_file(url) as file, pq.ParquetWriter(file, schema, compression="zstd") as parquet:
            yield parquet.write_table
            parquet.add_key_value_metadata(footer or {})

    def delete(self) -> None:
        """Remove the table and its rejects. `begun.json` goes last: half a removal is not mistaken for data."""
        fs, path = filesystem(self.url)
        delete_file(f"{self.url}/manifest.json")
        if is_local(fs):
            fs.rm([f"{path}/{name}" for name in list_folder(self.url) if name != "begun.json"], recursive=True)
        else:
            remove_files(fs, [found for found in fs.find(path) if found != f"{path}/begun.json"])
        delete_file(f"{self.url}/begun.json")
        delete_folder(self.url)

    def clear_temporaries(self) -> None:
        """Remove what writers left that were killed; none may be at work."""
        for name in list_folder(self.url):
            if name.endswith(".tmp"):
                delete_file(f"{self.url}/{name}")

    def delete_shards(self, prefix: str) -> None:
        fs, path = filesystem(self.url)
        remove_files(fs, [f"{path}/{name}.parquet" for name in self.shards() if name.startswith(prefix)])

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None while the table is unfinished."""
        return read_json(f"{self.url}/manifest.json")


def table_label(set_name: str, name: str) -> str:
    """How a table is called in indexes, manifests and messages: `natural/utterances`, or `teacher`."""
    return f"{set_name}/{name}" if set_name else name


def each_shard(read: Callable[[str], Content], shards: Sequence[str]) -> Iterator[Content]:
    """What `read` makes of each shard, in order; `READ_AT_ONCE` of them are read, and wait in memory, at a time."""
    with ThreadPoolExecutor(READ_AT_ONCE) as threads:
        for first in range(0, len(shards), READ_AT_ONCE):
            yield from threads.map(read, shards[first : first + READ_AT_ONCE])


def fingerprint(content: Mapping[str, Any]) -> str:
    """A short hash of nested plain data, independent of key order."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def stable_hash(*parts: object) -> int:
    """A 64-bit hash that is the same in every process: for splits, shards and seeds."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def file_exists(url: str) -> bool:
    fs, path = filesystem(url)
    return bool(fs.exists(path))


def delete_file(url: str) -> None:
    """Delete a file, if it is there."""
    fs, path = filesystem(url)
    with suppress(FileNotFoundError):
        fs.rm_file(path)


def delete_folder(url: str) -> None:
    """Delete a folder and all in it, if it is there."""
    fs, path = filesystem(url)
    if fs.isdir(path):
        fs.rm(as_name(fs, path), recursive=True)


def digest(url: str) -> str:
    """A hash of a file's bytes: notices an input that was edited under the same name."""
    fs, path = filesystem(url)
    return hashlib.blake2b(fs.cat_file(path), digest_size=8).hexdigest()


def sampled_digest(url: str) -> str:
    """A hash of a file's size and of a megabyte at each of `SAMPLES` places: other weights differ everywhere, and to
    read all of them takes minutes."""
    fs, path = filesystem(url)
    size = int(fs.size(path))
    hasher = hashlib.blake2b(str(size).encode(), digest_size=8)
    for index in range(SAMPLES):
        start = (size - SAMPLE_BYTES) * index // (SAMPLES - 1)
        hasher.update(fs.cat_file(path, start=max(start, 0), end=min(max(start, 0) + SAMPLE_BYTES, size)))
        if size <= SAMPLE_BYTES:
            break
    return hasher.hexdigest()


def read_json(url: str) -> dict[str, Any] | None:
    """A JSON file, or None when there is none."""
    fs, path = filesystem(url)
    try:
        return json.loads(fs.cat_file(path, start=0))  # of the whole file s3fs asks the size first
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_bytes(url: str) -> bytes:
    fs, path = filesystem(url)
    return bytes(fs.cat_file(path))


def write_json(url: str, content: Mapping[str, Any]) -> None:
    write_bytes(url, json.dumps(content, indent=1, ensure_ascii=False).encode())


def write_bytes(url: str, data: bytes) -> None:
    """Write a file that appears whole or not at all."""
    fs, path = filesystem(url)
    if not is_local(fs):
        fs.pipe_file(path, data)
        return
    with atomic_file(url) as file:
        file.write(data)


@contextmanager
def atomic_file(url: str) -> Iterator[Any]:
    """A file open for writing that appears, whole, when the block ends without an error.

    Locally it is renamed into place. On an object store the parts of an upload become an object only when it is closed;
    after an error the upload is aborted.
    """
    fs, path = filesystem(url)
    if not is_local(fs):
        file = fs.open(path, "wb")
        try:
            yield file
            file.close()
        except BaseException:
            if isinstance(file, AbstractBufferedFile):
                file.closed = True  # first: closing at the end of its life would upload what there is
                with suppress(OSError):  # what failed before is what is told
                    file.discard()
            raise
        return
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with fs.open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # after a loss of power, too, a file that has its name is whole
        fs.mv(temporary, path)
    finally:
        if fs.exists(temporary):
            fs.rm(temporary)


def put_folder(local: str, url: str) -> None:
    """Copy a folder of finished files to a local path or object store, replacing what was there."""
    fs, path = filesystem(url.rstrip("/"))
    if fs.exists(path):
        fs.rm(as_name(fs, path), recursive=True)
    source, folder = filesystem(local)
    names = _names_below(source, folder)
    if is_local(fs):
        fs.makedirs(path, exist_ok=True)
    fs.put([f"{folder}/{name}" for name in names], [f"{path}/{name}" for name in names])


@contextmanager
def local_folder(url: str) -> Iterator[str]:
    """A local path with the contents of a folder: of what a URL names a copy, which goes when the block ends, since
    models fill disks; anything else (a hub id too) as it is."""
    if "://" not in url:
        yield url
        return
    fs, path = filesystem(url)
    path = path.rstrip("/")
    with scratch_folder() as copy:
        names = _names_below(fs, path)
        if not names:
            raise FileNotFoundError(f"{url}: there is no such folder, or nothing in it")
        fs.get([f"{path}/{name}" for name in names], [f"{copy}/{name}" for name in names])
        yield copy


def _names_below(fs: AbstractFileSystem, path: str) -> list[str]:
    """What a folder holds, folders first that hold others; as lists of names are copied, none is taken for a pattern.

    Raises:
        ValueError: a name of a store would lie outside the folder.
    """
    found = [name.removeprefix(f"{path}/") for name in fs.find(path, withdirs=True) if name.startswith(f"{path}/")]
    for name in found:
        if ".." in name.split("/"):
            raise ValueError(f"{path} holds {name}, which would be copied to another folder")
    return sorted(found)
