"""Corpora of recorded speech: what lies at a path, and its records as utterances, one source file at a time.

Reading is cheap and never opens audio; an utterance refers to its audio (`audio.py` opens it).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from salad_ray.config import ConfigError, CorpusConfig, path_name
from salad_ray.names import INGEST
from salad_ray.speech import emilia, kaldi, lhotse_cuts, readers
from salad_ray.store import filesystem, find_files
from salad_ray.tables import Reject, Utterance, digest

MANIFESTS = tuple(f".jsonl{end}" for end in readers.COMPRESSIONS)
_CUTS = re.compile(r"(cuts|supervisions|manifest)[^/]*\.(json|ya?ml)$")
"""Other formats of Lhotse and NeMo; other files of these ends are seldom manifests."""
NUM_PROBES = 50
MAX_PROBES = 2_000
"""Of a corpus' recordings that are looked for before it counts as one without audio."""
DIGEST_BYTES = 2**26
"""Sources up to this size are known by their content, larger ones by size and time."""
LIBRILIGHT = "LibriVox readers, by way of Libri-Light; text and cuts: LibriHeavy (k2-fsa), Apache-2.0"
LIBRILIGHT_LICENSE = "public domain"
EMILIA = "Emilia (open-mmlab/Amphion)"
NO_LONGER_KNOWN = "not known: the corpus could not be read any more when this was written"
YODAS = "Emilia-YODAS (open-mmlab/Amphion), from YODAS: YouTube videos, whose ids are the utterances' `source`"


@dataclass(frozen=True)
class Source:
    """One file that one task reads: a manifest, a table or an archive."""

    corpus: str
    format: str
    """As configured, or `unread`: a file that may hold records, too, and is a reject with its name."""
    url: str
    root: str = ""
    """Folder that audio paths are relative to."""
    archive: str = ""
    """Emilia's older layout: the tar.gz beside the jsonl."""
    num_more: int = 0
    """Further files that are not read."""


def corpus_name(corpus: CorpusConfig) -> str:
    return corpus.name or path_name(corpus.path)


def attributions(corpora: Sequence[CorpusConfig]) -> dict[str, str]:
    """Corpus name → whom the model card is to name: as configured, else as the first records of all files tell."""
    return {corpus_name(corpus): corpus.attribution or _known_attribution(corpus) for corpus in corpora}


def _known_attribution(corpus: CorpusConfig) -> str:
    try:
        with ThreadPoolExecutor(32) as threads:
            found = sorted(set(threads.map(_origin, find_sources(corpus))))
    except (ConfigError, OSError):  # training needs its features only
        return NO_LONGER_KNOWN
    return "; ".join(filter(None, found))


def _origin(source: Source) -> str:
    """Which of the known corpora a source is of, "" for none: by its records, never by what its folder is called."""
    if source.format == "emilia":
        record = emilia.first_record(source.url)
        return "" if record is None else YODAS if emilia.is_yodas(record) else EMILIA
    readers_of = {"kaldi": kaldi.recordings_of, "lhotse": lhotse_cuts.recordings_of}
    found = islice(readers_of[source.format](source.url), NUM_PROBES) if source.format in readers_of else ()
    return LIBRILIGHT if any(lhotse_cuts.book_of(name) != name for name, _ in found) else ""


def find_sources(corpus: CorpusConfig) -> list[Source]:
    """The files of a corpus, sorted.

    Raises:
        ConfigError: nothing is there, nothing that is known, or a manifest whose audio is nowhere.
    """
    fs, path = filesystem(corpus.path.rstrip("/") or corpus.path)
    if "*" not in path and not fs.exists(path):
        raise ConfigError(_nothing_there(fs, corpus.path, path))
    kind = corpus.format if corpus.format != "auto" else _guess(fs, path, corpus.path)
    name = corpus_name(corpus)
    if kind == "folder":
        readers.check_folder(corpus.path)
        tables = [Source(name, kind, f"{url_of(fs, path)}/{readers.TABLE}")]
        return tables + _unread(fs, fs.ls(path, detail=False), path, tables)
    if kind == "kaldi":
        root = _root(fs, path, kaldi.recordings_of(url_of(fs, path)), corpus)
        return [Source(name, kind, url_of(fs, path), root)]
    if kind == "emilia":
        return _emilia_sources(fs, path, name, corpus.path)
    files = fs.glob(path) if "*" in path else fs.ls(path, detail=False) if fs.isdir(path) else [path]
    manifests = sorted(one for one in files if _is_manifest(one))
    if not manifests:
        raise ConfigError(f"{corpus.path}: no Lhotse manifest ({', '.join(MANIFESTS)}) is there")
    recordings = chain.from_iterable(lhotse_cuts.recordings_of(url_of(fs, one)) for one in manifests)
    root = _root(fs, manifests[0].rpartition("/")[0], recordings, corpus)
    sources = [Source(name, kind, url_of(fs, one), root) for one in manifests]
    return sources + _unread(fs, files, "" if "*" in path else path, sources)


def _unread(fs: fsspec.AbstractFileSystem, files: Iterable[str], path: str, sources: Sequence[Source]) -> list[Source]:
    """Files beside those that are read, which may hold records, too."""
    read = {url for source in sources for url in (source.url, source.archive)}
    within = {one.removeprefix(path).lstrip("/"): one for one in files if url_of(fs, one) not in read}
    names = [name for name in within if not readers.HARMLESS.search(name.lower()) and name[-5:] != ".json"]
    names = sorted({*names, *filter(_CUTS.search, within)})
    others = [name for name in names if not fs.isdir(within[name])]
    found = [Source(sources[0].corpus, "unread", url_of(fs, within[name])) for name in others[: readers.MAX_NAMED]]
    return [*found[:-1], replace(found[-1], num_more=len(others) - len(found))] if found else []


def url_of(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """A path of a file system as something that `fsspec.open` takes."""
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def source_stamp(source: Source) -> str:
    """Tells whether a source changed: its content, or size and time where it is large."""
    if source.format == "kaldi":
        return ", ".join(_stamp(f"{source.url}/{name}") for name in kaldi.TABLES)
    return ", ".join(_stamp(url) for url in (source.url, source.archive) if url)


def _stamp(url: str) -> str:
    fs, path = filesystem(url)
    if not fs.exists(path):
        return "none"
    info = fs.info(path)
    if info["size"] <= DIGEST_BYTES:
        return digest(url)
    changed = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified") or ""
    return f"{info['size']} bytes, {changed}"


def scan(source: Source, corpus: CorpusConfig, max_member_bytes: int, unpack_url: str) -> Iterator[Utterance | Reject]:
    """The records of one source: each is an utterance or a reject.

    The `split` of an utterance is that of the run that exported it, else "": it is still to be drawn.

    Args:
        max_member_bytes: largest file inside an archive.
        unpack_url: where a tar.gz is decompressed to.
    """
    seen = readers.IdSet()
    for row in _records(source, corpus, max_member_bytes, unpack_url):
        if isinstance(row, Reject):
            yield Reject(row.stage, _legible(row.key), _legible(row.reason))
        elif fault := _fault(row):
            yield Reject(INGEST, _legible(row.utt_id), fault)
        elif not seen.add(row.utt_id):
            yield Reject(INGEST, row.utt_id, "an utterance of this id was read already")
        else:
            split = row.split if source.format == "lhotse" else ""
            yield replace(row, split=split, license=_license(row, source, corpus))


def _fault(row: Utterance) -> str:
    """Why a table cannot hold the row, or no program its texts: JSON can name half a character, and a tar any bytes."""
    texts = (row.utt_id, row.text, row.pre_text, row.recording_id, row.speaker, row.source, row.language, row.domain)
    together = "".join((*texts, row.license, row.uri or ""))
    if "\0" in together:
        return "its id, its transcript or what else it says holds a NUL, which ends a text for many programs"
    return "" if _legible(together) == together else "not valid Unicode (UTF-8, without lone surrogates)"


def _legible(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def _records(
    source: Source, corpus: CorpusConfig, max_member_bytes: int, unpack_url: str
) -> Iterator[Utterance | Reject]:
    if source.format == "folder":
        utterances, rejects = readers.read_folder(
            source.url.rpartition("/")[0], "", source.corpus, corpus.allow_outside
        )
        yield from utterances
        yield from rejects
    elif source.format == "kaldi":
        yield from kaldi.read_kaldi(source.url, source.corpus, source.root, corpus.allow_outside)
    elif source.format == "lhotse":
        yield from lhotse_cuts.read_cuts(source.url, source.corpus, source.root, corpus.text, corpus.allow_outside)
    elif source.format == "unread":
        more = f" ({source.num_more:,} more such files are there)" if source.num_more else ""
        yield Reject(INGEST, f"{source.corpus}/{source.url}", f"a file that is not read; convert it{more}")
    elif source.archive:
        unpacked = f"{unpack_url}/{source.corpus}/{path_name(source.url)}.tar"
        yield from emilia.read_raw(source.url, source.archive, unpacked, source.corpus, max_member_bytes)
    else:
        yield from emilia.read_tar(source.url, source.corpus, max_member_bytes)


def _license(row: Utterance, source: Source, corpus: CorpusConfig) -> str:
    """The row's own licence, the one configured, or the one known for the corpus."""
    known = ""
    if source.format == "emilia":
        known = row.license  # by the kind of the record
    elif lhotse_cuts.book_of(recording := row.recording_id.removeprefix(f"{row.corpus}/")) != recording:
        known = LIBRILIGHT_LICENSE  # recordings are called <size>/<speaker>/<book>/<chapter> there only
    own = "" if source.format == "emilia" else row.license
    return own or corpus.license or known or "unknown"


def _guess(fs: fsspec.AbstractFileSystem, path: str, shown: str) -> str:
    """The format of what lies at a path, from the names there."""
    if "*" in path and not path.endswith((".tar", *MANIFESTS)):
        ends = ", ".join(MANIFESTS)
        raise ConfigError(f"{shown}: a pattern must end in {ends} or .tar; set its ending, or drop the `*`")
    if path.endswith(".tar"):
        return "emilia"
    if _is_manifest(path):
        return "emilia" if fs.exists(path.removesuffix(".jsonl") + ".tar.gz") else "lhotse"
    if not fs.isdir(path):
        raise ConfigError(
            f"{shown}: a file, but a corpus is a folder with {readers.TABLE}, a Lhotse manifest (.jsonl, .jsonl.gz), a "
            "folder of Kaldi's tables, or Emilia's tars; set its format if it is one of them"
        )
    names = {entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False)}
    if readers.TABLE in names:
        return "folder"
    if "wav.scp" in names:
        return "kaldi"
    manifests = [name for name in names if _is_manifest(name)]
    if manifests and not any(name.endswith((".tar", ".tar.gz")) for name in names):
        return "lhotse"
    if _archives(find_files(fs, path)):
        return "emilia"
    raise ConfigError(
        f"{shown}: has no {readers.TABLE}, no Lhotse manifest (.jsonl, .jsonl.gz), no wav.scp and no tar archives"
        + _similar(names)
    )


def _similar(names: set[str]) -> str:
    near = difflib.get_close_matches(readers.TABLE, names, n=1)
    return f"; did you mean '{near[0]}' to be {readers.TABLE}?" if near else ""


def _nothing_there(fs: fsspec.AbstractFileSystem, shown: str, path: str) -> str:
    parent, _, name = path.rpartition("/")
    entries = fs.ls(parent, detail=False) if parent and fs.isdir(parent) else []
    near = difflib.get_close_matches(name, [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries], n=1)
    return f"{shown}: no such file or folder" + (f"; did you mean '{near[0]}'?" if near else "")


def _is_manifest(path: str) -> bool:
    return path.lower().endswith(MANIFESTS)


def _archives(files: Mapping[str, Any]) -> list[str]:
    """Tars, and jsonl files with a tar.gz."""
    raw = [one for one in files if one.endswith(".jsonl") and f"{one.removesuffix('.jsonl')}.tar.gz" in files]
    return sorted([one for one in files if one.endswith(".tar")] + raw)


def _lone(fs: fsspec.AbstractFileSystem, path: str, archives: list[str], files: Iterable[str]) -> list[str]:
    """Halves of the older layout that are there without the other."""
    if not fs.isdir(path):
        return [one for one in archives if one.endswith(".jsonl") and not fs.exists(f"{one[:-6]}.tar.gz")]
    paired = {end for one in archives if one.endswith(".jsonl") for end in (one, f"{one[:-6]}.tar.gz")}
    return [one for one in sorted(files) if one.endswith((".jsonl", ".tar.gz")) and one not in paired]


def _emilia_sources(fs: fsspec.AbstractFileSystem, path: str, name: str, shown: str) -> list[Source]:
    sources, files = [], find_files(fs, path)
    archives = [path] if fs.isfile(path) and path.endswith(".jsonl") else _archives(files)
    if not archives:
        raise ConfigError(f"{shown}: no Emilia archives (.tar, or .jsonl beside its .tar.gz) are there")
    for one in _lone(fs, path, archives, files):
        raise ConfigError(
            f"{shown}: {one} lacks its other half: Emilia's older layout is a .jsonl beside a .tar.gz of the same name"
        )
    for one in archives:
        beside = url_of(fs, one.removesuffix(".jsonl") + ".tar.gz") if one.endswith(".jsonl") else ""
        sources.append(Source(name, "emilia", url_of(fs, one), archive=beside))
    return sources + _unread(fs, files, path, sources)


def _root(
    fs: fsspec.AbstractFileSystem, folder: str, recordings: Iterator[tuple[str, str]], corpus: CorpusConfig
) -> str:
    """What a manifest's audio paths are relative to: as configured, or the manifest's own folder.

    Folders above are searched to name them only: a manifest does not decide what else of a disk may be read.

    Args:
        recordings: names and paths; more than the first are looked at only while none of them is found, as a corpus
            may lack its first books.

    Raises:
        ConfigError: none of the paths is there.
    """
    folders = _upward(folder) if corpus.root is None else [filesystem(corpus.root.rstrip("/"))[1]]
    first, seen = "", 0
    while probes := list(islice(recordings, NUM_PROBES if seen == 0 else MAX_PROBES - seen)):
        seen += len(probes)
        relative = [path for _, path in probes if "://" not in path and not path.startswith("/") and "\0" not in path]
        if not relative and seen == len(probes):  # nothing to go by: each row is judged by itself
            return url_of(fs, folders[0])
        first = first or next(iter(relative), "")
        for one in folders if seen == len(probes) else folders[:1]:  # each is a request, on an object store
            if any(fs.exists(f"{one}/{path}") for path in dict.fromkeys(relative) if ".." not in path.split("/")):
                if one == folders[0] or corpus.allow_outside:
                    return url_of(fs, one)
                raise ConfigError(
                    f"{corpus.path}: its audio lies outside its folder, under {url_of(fs, one)}; if it may be read "
                    "there, set the corpus' root to that"
                )
    if not seen:
        return url_of(fs, folders[0])
    raise ConfigError(
        f"{corpus.path} points nowhere: {first} is not under {url_of(fs, folders[0])}"
        + (" or the folders above it" if corpus.root is None else "")
        + "; set the corpus' root to the folder that its audio paths are relative to"
    )


def _upward(folder: str, levels: int = 5) -> list[str]:
    parts = folder.split("/")
    return ["/".join(parts[: len(parts) - up]) for up in range(min(levels, len(parts)))]
