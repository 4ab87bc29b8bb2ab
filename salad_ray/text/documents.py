"""Web text: the files of a corpus, and their documents, a piece of a file at a time and in bounded memory.

Columns are those of FineWeb and its kin (text, id, url, language, language_score, score); which they are is configured.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice, pairwise
from typing import Any, Literal
from urllib.parse import quote

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub.errors import HfHubHTTPError

from salad_ray.config import ConfigError, WebTextConfig, path_name
from salad_ray.names import INGEST
from salad_ray.speech.readers import (
    BROKEN,
    COMPRESSIONS,
    HARMLESS,
    MAX_LINE_BYTES,
    MAX_NAMED,
    decompressed,
    language_code,
    lines_at,
)
from salad_ray.store import BROKEN_LINK, filesystem, find_files, is_of_storage, open_file
from salad_ray.tables import BadInput, Reject

ENDS: dict[str, tuple[str, ...]] = {
    "parquet": (".parquet", ".parq", ".pq"),
    "jsonl": (
        *(f"{kind}{end}" for kind in (".jsonl", ".jsonlines", ".jl", ".ndjson") for end in COMPRESSIONS),
        *(f".json{end}" for end in COMPRESSIONS[1:]),
    ),
}
SOURCE_BYTES = 2**28
"""Row groups of a Parquet file are handed out together up to this size (of all columns, uncompressed)."""
BATCH_ROWS = 4
"""Of a Parquet file that are decoded at once, or one where they are large: two kilobytes can hold as many texts of
megabytes each. More at once are hardly faster."""
LARGE_ROW_BYTES = 2**16
LARGE_DICTIONARY_BYTES = 2**22
"""Of texts in a row group of which rows name one or another, perhaps all of them the largest."""
READ_BYTES = 2**20
MAX_FILE_BYTES = 2**29
"""Of a file that is read whole, decompressed; benchmarks are files of some megabytes."""
NUM_TRIED = 100
"""Lines of a jsonl file that are asked whether it has the text column."""
FOOTER_THREADS = 16
# A hub cannot be reached: an error of its HTTP client, whichever that is, which HfHubHTTPError derives from.
UNREACHABLE: tuple[Any, ...] = (OSError, *HfHubHTTPError.__bases__)


@dataclass(frozen=True, slots=True)
class Document:
    """A text with what its corpus says of it; "" and None where it says nothing. `doc_id` begins with the corpus."""

    doc_id: str
    text: str
    url: str = ""
    license: str = ""
    domain: str = ""
    language: str = ""
    score: float | None = None


@dataclass(frozen=True)
class TextSource:
    """What one task reads: a jsonl file, or the row groups [first, end) of a Parquet file (None: all there are)."""

    url: str
    kind: Literal["parquet", "jsonl", "unread"]
    name: str
    """The file's path within its corpus."""
    stamp: str
    """Size, and time or tag, of the file when it was found."""
    row_groups: tuple[int, int] | None = None
    num_more: int = 0
    """Further files that are not read."""


def text_corpus_name(corpus: WebTextConfig) -> str:
    """What the ids of a corpus begin with."""
    return corpus.name or path_name(corpus.path)


def source_stamp(source: TextSource) -> str:
    """Tells whether what a task reads has changed, for fingerprints."""
    groups = "" if source.row_groups is None else "#{}-{}".format(*source.row_groups)
    return f"{source.name}{groups}: {source.stamp}"


def find_text_sources(corpus: WebTextConfig) -> list[TextSource]:
    """The files of a corpus, sorted, Parquet divided at row groups.

    A path is a file, a folder (all the way down), a pattern, any URL that fsspec opens, or a hub id of a data set, with
    or without a folder or pattern behind it.

    Raises:
        ConfigError: nothing is there, nothing that is known, no file with the columns that the config names, or a hub
            that cannot be reached.
    """
    url = hub_url(corpus.path, corpus.revision)
    try:
        fs, path = filesystem(url)
        files = find_files(fs, path.rstrip("/") or path)
    except ImportError as error:
        raise ConfigError(f"{corpus.path}: its protocol needs a package that is not installed ({error})") from None
    except UNREACHABLE as error:
        here = "nothing is there, and as a data set of the hub it" if "://" not in corpus.path else "it"
        raise ConfigError(f"{corpus.path}: {here} cannot be listed ({url}: {type(error).__name__}: {error})") from None
    if not files:
        raise ConfigError(_nothing_there(corpus, url))
    sources = []
    is_sole = len(files) == 1 or "*" in path
    kinds = {file: _kind(_within(path, file), corpus.format, is_sole) for file in sorted(files)}
    unclear = [file for file, kind in kinds.items() if kind is None and file.lower().endswith(".json")]
    if corpus.format == "auto":
        with ThreadPoolExecutor(FOOTER_THREADS) as pool:  # a small read each, slow over a network
            kinds |= zip(unclear, pool.map(lambda file: _kind_of_json(_url_of(fs, file), corpus), unclear), strict=True)
    others = [file for file, kind in kinds.items() if kind == "unread"]
    named, num_more = others[:MAX_NAMED], len(others[MAX_NAMED:])
    for file, kind in kinds.items():
        if kind is not None and (kind != "unread" or file in named):
            known = "unread" if files[file]["type"] == BROKEN_LINK else kind
            more = num_more if kind == "unread" and file == named[-1] else 0
            name, stamp = _within(path, file), _stamp(files[file])
            sources.append(TextSource(_url_of(fs, file), known, name, stamp, num_more=more))
    if all(source.kind == "unread" for source in sources):
        ends = ENDS["parquet"] + ENDS["jsonl"] if corpus.format == "auto" else ENDS[corpus.format]
        raise ConfigError(
            f"{corpus.path}: {len(files)} files are there, but none ends in {', '.join(ends)}"
            + (f" (such as {_within(path, min(files))}); " if len(files) > 1 else "; ")
            + "point path at such files, or set format for a file of another ending"
        )
    _check_columns(sources, corpus)
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:  # footers: a small read each, slow over a network
        return [part for parts in pool.map(_divided, sources) for part in parts]


def read_documents(source: TextSource, corpus: WebTextConfig) -> Iterator[Document | Reject]:
    """The documents of one source in their order; what cannot be used, or is filtered out, is a reject with its reason.

    A file that breaks off is a reject of its own, after what was read of it; of Parquet, other row groups are still
    read. Documents without an id are named by file and row.
    """
    name = text_corpus_name(corpus)
    if source.kind == "unread":
        reason = "its name is none of Parquet or JSON lines (.parquet, .jsonl, .jsonl.gz, …); convert it"
        reason = source.stamp if source.stamp == BROKEN_LINK else reason
        more = f" ({source.num_more:,} more such files are there)" if source.num_more else ""
        yield Reject(INGEST, _legible(f"{name}/{source.name}"), f"a file that is not read: {reason}{more}")
        return
    for place, row in _parquet_rows(source, corpus) if source.kind == "parquet" else _json_rows(source):
        key = f"{name}/{_text_of(row.get(corpus.id_column)) or place}" if isinstance(row, dict) else f"{name}/{place}"
        try:
            if isinstance(row, BadInput):
                raise row
            yield _document(key, row, corpus)
        except BadInput as error:
            yield Reject(INGEST, _legible(key).replace("\0", "\\0"), _legible(str(error)))


def _document(doc_id: str, row: Mapping[str, Any], corpus: WebTextConfig) -> Document:
    text = row.get(corpus.text_column)
    if not isinstance(text, str):
        if corpus.text_column not in row:
            raise BadInput(f"it has no '{corpus.text_column}', only {', '.join(row) or 'nothing'}")
        reason = "null" if text is None else f"{type(text).__name__}, not text"
        raise BadInput(f"its '{corpus.text_column}' is {reason}")
    if not text.strip():
        raise BadInput(f"its '{corpus.text_column}' is empty")
    if "\0" in doc_id:
        raise BadInput("its id holds a NUL, which ends a text for many programs")
    document = Document(
        doc_id=doc_id,
        text=text,
        url=_text_of(row.get(corpus.url_column)),
        license=_text_of(row.get(corpus.license_column)) or corpus.license or "unknown",
        domain=_text_of(row.get(corpus.domain_column)),
        language=language_code(_text_of(row.get(corpus.language_column))),
        score=_number(row.get(corpus.score_column)),
    )
    if _legible(all_text := "".join((doc_id, text, document.url, document.license, document.domain))) != all_text:
        raise BadInput("not valid Unicode (UTF-8, without lone surrogates)")
    _filter(document, _number(row.get(corpus.language_score_column)), corpus)
    return document


def _filter(document: Document, language_score: float | None, corpus: WebTextConfig) -> None:
    """Raises `BadInput` for a document that the config leaves out, or of which it cannot be told."""
    if corpus.languages and document.language not in map(language_code, corpus.languages):
        raise BadInput(f"language '{document.language}' is not among {', '.join(corpus.languages)}")
    limits = (
        (corpus.min_language_score, language_score, "language score"),
        (corpus.min_score, document.score, "score"),
    )
    for least, value, what in limits:
        if least is not None and (value is None or value < least):
            raise BadInput(f"no {what}" if value is None else f"{what} {value:.3g} is below {least:g}")


def _needed(corpus: WebTextConfig) -> dict[str, str]:
    """Columns that must be there → the config's key."""
    needed = {corpus.text_column: "text_column"}
    if corpus.languages:
        needed[corpus.language_column] = "language_column"
    if corpus.min_language_score is not None:
        needed[corpus.language_score_column] = "language_score_column"
    if corpus.min_score is not None:
        needed[corpus.score_column] = "score_column"
    return needed


def _wanted(corpus: WebTextConfig) -> list[str]:
    return [
        corpus.text_column, corpus.id_column, corpus.url_column, corpus.license_column, corpus.domain_column,
        corpus.language_column, corpus.language_score_column, corpus.score_column,
    ]  # fmt: skip


def _check_columns(sources: list[TextSource], corpus: WebTextConfig) -> None:
    """Raises `ConfigError` where no file has the columns that are needed; of a file beside one that has, each row is a
    reject. Mostly the first file has them, and no other is opened.
    """
    faults = []
    for source in sources:
        if source.kind != "unread" and (fault := _fault(source, corpus)) is not None:
            if not fault:
                return
            faults.append(f"{source.url}: {fault}")
    if faults:
        raise ConfigError(faults[0])


def _fault(source: TextSource, corpus: WebTextConfig) -> str | None:
    """What keeps a file's texts from being found, "" if nothing does; None for one that nobody can tell of."""
    if source.kind == "jsonl":
        records = [json_record(line) for _, line in islice(lines_at(source.url), NUM_TRIED)]
        names = dict.fromkeys(chain.from_iterable(record for record in records if isinstance(record, dict)))
        return _missing(list(names), corpus) if names else None
    with open_file(source.url) as file:
        try:
            return _parquet_fault(pq.ParquetFile(file), corpus)
        except (pa.ArrowException, OSError) as error:
            _damage(error)
            return None


def _missing(columns: list[str], corpus: WebTextConfig) -> str:
    for column, key in _needed(corpus).items():
        if column not in columns:
            return f"no column '{column}', only {', '.join(columns)}; set {key} to the right one"
    return ""


def _parquet_fault(parquet: pq.ParquetFile, corpus: WebTextConfig) -> str:
    if fault := _missing(parquet.schema_arrow.names, corpus):
        return fault
    [column_type, *others] = [field.type for field in parquet.schema_arrow if field.name == corpus.text_column]
    if others:
        return f"{len(others) + 1} columns are called '{corpus.text_column}'"
    if _is_text(column_type) or _is_null(parquet, corpus.text_column):
        return ""
    return f"column '{corpus.text_column}' holds {column_type}, not text; set text_column"


def _parquet_rows(source: TextSource, corpus: WebTextConfig) -> Iterator[tuple[str, dict[str, Any] | BadInput]]:
    """(file:row, row); damage is told once for a row group."""
    with open_file(source.url) as file:
        try:
            # Buffered column by column, so that row groups of any size are read in bounded memory.
            parquet = pq.ParquetFile(file, buffer_size=READ_BYTES, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            yield source.name, _damage(error)
            return
        first, end = source.row_groups or (0, parquet.num_row_groups)
        row = sum(parquet.metadata.row_group(group).num_rows for group in range(first))
        if fault := _parquet_fault(parquet, corpus):
            lost = sum(parquet.metadata.row_group(group).num_rows for group in range(first, end))
            yield f"{source.name}:{row}", BadInput(f"the file cannot be used: {fault} ({lost:,} rows are not read)")
            return
        wanted = [column for column in parquet.schema_arrow.names if column in _wanted(corpus)]
        for group in range(first, end):
            yield from _row_group(parquet, group, wanted, source.name, row)
            row += parquet.metadata.row_group(group).num_rows


def _row_group(
    parquet: pq.ParquetFile, group: int, columns: list[str], name: str, row: int
) -> Iterator[tuple[str, dict[str, Any] | BadInput]]:
    start, metadata = row, parquet.metadata.row_group(group)
    chunks = [metadata.column(index) for index in range(metadata.num_columns)]
    named = sum(chunk.total_uncompressed_size for chunk in chunks if any("DICT" in each for each in chunk.encodings))
    is_large = metadata.total_byte_size > LARGE_ROW_BYTES * metadata.num_rows or named > LARGE_DICTIONARY_BYTES
    num_rows = 1 if is_large else BATCH_ROWS
    try:
        for batch in parquet.iter_batches(num_rows, row_groups=[group], columns=columns, use_threads=False):
            for fields in _rows(batch):
                yield f"{name}:{row}", fields
                row += 1
    except (pa.ArrowException, OSError) as error:
        lost = metadata.num_rows - (row - start)
        yield f"{name}:{row}", _damage(error, f"; {lost} rows of row group {group} are lost")


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | BadInput]:
    """The rows of a batch; of a large one never two at once, and nothing of a row that is too large."""
    is_large = batch.nbytes > LARGE_ROW_BYTES * BATCH_ROWS
    for part in [batch.slice(row, 1) for row in range(len(batch))] if is_large else [batch]:
        if is_large and part.nbytes > MAX_LINE_BYTES:
            yield BadInput(f"a row of more than {MAX_LINE_BYTES:,} bytes")
            continue
        for values in zip(*map(column_values, part.columns), strict=True):
            yield dict(zip(part.schema.names, values, strict=True))


def _damage(error: Exception, detail: str = "") -> BadInput:
    """What Arrow says of a damaged file; errors of the storage itself, which a retry may cure, are raised again."""
    if is_of_storage(error):
        raise error
    return BadInput(f"the file is truncated or damaged ({error}){detail}")


def column_values(column: pa.Array) -> list[Any]:
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):  # text, as some programs write it
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in column.to_pylist()]
    if pa.types.is_dictionary(column.type):  # each of its texts once, and shared by its rows
        used = pc.unique(column.indices.drop_null())
        texts = dict(zip(used.to_pylist(), column_values(column.dictionary.take(used)), strict=True))
        return [None if index is None else texts[index] for index in column.indices.to_pylist()]
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # not UTF-8: becomes surrogates, by which items and documents know it
        return column_values(pc.cast(column, pa.large_binary()))


def _is_text(column_type: pa.DataType) -> bool:
    if pa.types.is_dictionary(column_type):
        column_type = column_type.value_type
    types = pa.types
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    return any(test(column_type) for test in tests)


def _is_null(parquet: pq.ParquetFile, column: str) -> bool:
    """Whether a column holds nothing at all: a part of a corpus without any text has no type for it."""
    if pa.types.is_null(parquet.schema_arrow.field(column).type):
        return True
    index, metadata = parquet.schema_arrow.names.index(column), parquet.metadata
    if metadata.num_columns != len(parquet.schema_arrow.names):  # nested ones: their places are others
        return False
    chunks = [metadata.row_group(group).column(index) for group in range(metadata.num_row_groups)]
    return all(chunk.statistics is not None and chunk.statistics.null_count == chunk.num_values for chunk in chunks)


def _json_rows(source: TextSource) -> Iterator[tuple[str, dict[str, Any] | BadInput]]:
    """(file:line, record)."""
    return ((f"{source.name}:{number}", json_record(line)) for number, line in lines_at(source.url))


def json_record(line: bytes | BadInput) -> dict[str, Any] | BadInput:
    if isinstance(line, BadInput):
        return line
    try:
        record = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        return BadInput(f"not JSON ({error})")
    return record if isinstance(record, dict) else BadInput(f"a JSON {type(record).__name__}, not an object")


def read_whole(url: str) -> bytes:
    """A file, decompressed.

    Raises:
        ConfigError: a truncated or damaged one, or a file of more than `MAX_FILE_BYTES`.
        OSError: and what else its storage raises.
    """
    data = bytearray()
    with open_file(url) as file:
        stream = decompressed(file)
        try:
            while chunk := stream.read(READ_BYTES):
                data += chunk
                if len(data) > MAX_FILE_BYTES:
                    raise ConfigError(f"{url} holds more than {MAX_FILE_BYTES:,} bytes, which no benchmark does")
        except BROKEN as error:
            if is_of_storage(error):
                raise
            raise ConfigError(f"{url} is truncated or damaged ({error}); fetch it again") from None
    return bytes(data)


def _text_of(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _number(value: Any) -> float | None:
    """A finite number, also a decimal or one that is written out; else None."""
    try:
        number = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _legible(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def hub_url(path: str, revision: str | None) -> str:
    """The path as a URL: a hub id, which is no local path, becomes hf://datasets/<id>@<revision>/…

    Raises:
        ConfigError: a revision of something else than a hub id.
    """
    url = path
    if "://" not in path and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(/.*)?", path):
        fs, local = filesystem(path)
        url = path if fs.exists(local) or fs.glob(local) else f"hf://datasets/{path}"
    found = re.fullmatch(r"(hf://datasets/[^/@]+/[^/@]+)((?:/.*)?)", url)
    if found is None and revision is not None:
        raise ConfigError(f"{path} is no hub id, so it has no revision '{revision}'; drop it")
    return url if found is None or not revision else f"{found[1]}@{quote(revision, safe='')}{found[2]}"


def _within(path: str, file: str) -> str:
    """A file's path from the corpus' folder on; by it documents without an id are named."""
    plain = re.sub(r"@[^/]*", "", file)  # of a hub: its revision
    root = re.sub(r"@[^/]*", "", path).split("*", 1)[0]
    folder = root.rpartition("/")[0] if "*" in path or root == plain else root.rstrip("/")
    return plain.removeprefix(folder).lstrip("/")


def _url_of(fs: fsspec.AbstractFileSystem, path: str) -> str:
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def _stamp(info: Mapping[str, Any]) -> str:
    if info["type"] == BROKEN_LINK:
        return BROKEN_LINK
    changed = next((info[key] for key in ("ETag", "etag", "blob_id", "mtime", "LastModified") if info.get(key)), "")
    return f"{info['size']} bytes, {changed}"


def _kind(file: str, wanted: str, sole: bool) -> Literal["parquet", "jsonl", "unread"] | None:
    """A file's format; its ending decides, but for a single file or a pattern the config may.

    None: it holds no text, is of a format that is not wanted, or of one that its content tells.
    """
    file = file.lower()
    if wanted != "jsonl" and (file.endswith(ENDS["parquet"]) or (sole and wanted == "parquet")):
        return "parquet"
    if wanted != "parquet" and (file.endswith(ENDS["jsonl"]) or (sole and wanted == "jsonl")):
        return "jsonl"
    is_known = file.endswith((".json", *ENDS["parquet"], *ENDS["jsonl"]))
    return None if is_known or HARMLESS.search(file) else "unread"


def _kind_of_json(url: str, corpus: WebTextConfig) -> Literal["jsonl", "unread"] | None:
    """JSON lines may be called `.json`; a list is none of ours, and a lone object describes a data set."""
    try:
        lines = [line for _, line in islice(lines_at(url), NUM_TRIED)]
    except FileNotFoundError:  # a link that leads nowhere
        return None
    records = [record for record in map(json_record, lines) if isinstance(record, dict)]
    if any(corpus.text_column in record for record in records):
        return "jsonl"
    is_list = bool(lines) and (not isinstance(lines[0], bytes) or lines[0].lstrip().startswith(b"["))
    return "unread" if is_list or len(records) > 1 else None


def _divided(source: TextSource) -> list[TextSource]:
    """A Parquet file as runs of row groups of up to `SOURCE_BYTES`; a damaged one whole, for its reader to tell."""
    if source.kind != "parquet":
        return [source]
    try:
        with open_file(source.url) as file:
            metadata = pq.ParquetFile(file).metadata
    except (pa.ArrowException, OSError) as error:
        _damage(error)
        return [source]
    bounds, size = [0], 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size > SOURCE_BYTES and group > bounds[-1]:
            bounds.append(group)
            size = metadata.row_group(group).total_byte_size
    bounds.append(metadata.num_row_groups)
    return [replace(source, row_groups=pair) for pair in pairwise(bounds)]


def _nothing_there(corpus: WebTextConfig, url: str) -> str:
    on_hub = f", nor {url} on the hub" if url != corpus.path else ""
    return (
        f"{corpus.path}: no such file or folder, and no file matches it{on_hub}; set path to text in Parquet or jsonl"
    )
