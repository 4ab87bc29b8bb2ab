"""Emilia and Emilia-YODAS: WebDataset tars with `<key>.json` beside `<key>.mp3`, and the older jsonl with a tar.gz.

Members are paired by key, not by order. Keys are like EN_B00000_S00000_W000004: language, batch, source, window. The
windows of a source are numbered in order, and numbers are missing where Emilia's authors left windows out.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

from salad_ray.names import INGEST
from salad_ray.speech.archives import MAX_META_BYTES, Member, Unusable, members, unpack
from salad_ray.speech.lhotse_cuts import transcript
from salad_ray.speech.readers import language_code, lines_of
from salad_ray.store import open_file
from salad_ray.tables import BadInput, Reject, Utterance

AUDIO = ("mp3", "flac", "wav", "ogg", "opus", "m4a")
NUM_PROBES = 50
PROBE_BYTES = 2**16
LICENSE = "CC BY-NC 4.0"
YODAS_LICENSE = "CC BY 4.0"


def read_tar(url: str, corpus: str, max_member_bytes: int) -> Iterator[Utterance | Reject]:
    """The samples of a WebDataset tar, each an utterance or a reject, as are members that belong to none."""
    records: dict[str, Member] = {}
    audio: dict[str, Member] = {}
    for member in members(url, max_member_bytes):
        if isinstance(member, Unusable):
            yield _reject(corpus, url, member)
            continue
        key, _, end = member.name.rpartition(".")
        kind = records if end == "json" else audio if end.lower() in AUDIO else None
        if kind is None or key in kind:
            reason = "neither JSON nor audio" if kind is None else "its key has such a file already"
            yield Reject(INGEST, f"{corpus}/{member.name}", reason)
        else:
            kind[key] = member
    for key in sorted(records.keys() | audio.keys()):
        yield _sample(corpus, url, key, records.get(key), audio.get(key))


def read_raw(
    table: str, archive: str, unpacked: str, corpus: str, max_member_bytes: int
) -> Iterator[Utterance | Reject]:
    """The older layout: a line of the table for each sample, its audio at the path `wav` in the archive.

    Args:
        unpacked: where the archive is decompressed to.
    """
    audio: dict[str, Member] = {}
    try:
        url = unpack(archive, unpacked)
    except BadInput as error:
        yield Reject(INGEST, archive, str(error))
        url = ""
    for member in members(url, max_member_bytes) if url else ():
        if isinstance(member, Unusable):
            yield _reject(corpus, archive, member)
        else:
            audio[member.name.removeprefix("./")] = member
    used: set[str] = set()
    with open_file(table) as file:
        for number, line in lines_of(file):
            if isinstance(line, BadInput):
                yield Reject(INGEST, f"{corpus}/{table}:{number}", str(line))
            elif line.strip():
                yield _line(corpus, table, number, line, url, audio, used)
    for name in sorted(audio.keys() - used):
        yield Reject(INGEST, f"{corpus}/{name}", "no line of the table names it")


def first_record(url: str) -> dict[str, Any] | None:
    """The first JSON object of a tar or a table, if any of the first entries is one."""
    if url.endswith(".tar"):
        found = (getattr(member, "content", None) for member in members(url, MAX_META_BYTES, PROBE_BYTES))
        return _first_object(islice(found, NUM_PROBES))
    with open_file(url) as file:
        lines = (None if isinstance(line, BadInput) else line for _, line in lines_of(file))
        return _first_object(islice(lines, NUM_PROBES))


def _first_object(contents: Iterable[bytes | None]) -> dict[str, Any] | None:
    for content in filter(None, contents):
        try:
            return _json(content)
        except BadInput:  # left to those who read it all
            continue
    return None


def _reject(corpus: str, url: str, member: Unusable) -> Reject:
    return Reject(INGEST, f"{corpus}/{member.name}" if member.name else url, member.reason)


def _sample(corpus: str, url: str, key: str, record: Member | None, audio: Member | None) -> Utterance | Reject:
    try:
        if record is None:
            raise BadInput("audio without a JSON file of its key")
        if audio is None:
            raise BadInput("a JSON file without audio of its key")
        return _utterance(corpus, url, key.rpartition("/")[2], _json(record.content or b""), audio)
    except BadInput as error:
        return Reject(INGEST, f"{corpus}/{key}", str(error))


def _line(
    corpus: str, table: str, number: int, line: bytes, url: str, audio: dict[str, Member], used: set[str]
) -> Utterance | Reject:
    key = f"{table}:{number}"
    try:
        record = _json(line)
        key = str(record.get("id") or record.get("_id") or key)
        path = str(record.get("wav", "")).removeprefix("./")
        if path not in audio:
            raise BadInput(f"its audio '{path}' is not in the archive")
        if path in used:
            raise BadInput(f"another line names '{path}' already")
        used.add(path)
        return _utterance(corpus, url, key, record, audio[path])
    except BadInput as error:
        return Reject(INGEST, f"{corpus}/{key}", str(error))


def _json(data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"its JSON cannot be read ({error})") from None
    if not isinstance(record, dict):
        raise BadInput("its JSON is no object")
    return record


def _utterance(corpus: str, url: str, key: str, record: dict[str, Any], audio: Member) -> Utterance:
    text = transcript(record.get("text"))
    if audio.name.lower().endswith(".m4a"):
        raise BadInput("M4A cannot be decoded here; convert it to FLAC or MP3")
    window = re.fullmatch(r"(.+)_W(\d+)", key)
    recording = window[1] if window else key
    speaker = str(record.get("speaker") or "")
    return Utterance(
        utt_id=f"{corpus}/{key}",
        text=text,
        duration_secs=max(0.0, _number(record.get("duration")) or 0.0),
        recording_id=f"{corpus}/{recording}",
        corpus=corpus,
        speaker=speaker,
        language=language_code(str(record.get("language") or "en")),
        license=YODAS_LICENSE if is_yodas(record) else LICENSE,
        source=f"{corpus}/{_source(speaker, recording)}",
        order=_order(window[2]) if window else None,
        dnsmos=_number(record.get("dnsmos")),
        uri=url,
        byte_start=audio.byte_start,
        num_bytes=audio.num_bytes,
    )


def is_yodas(record: dict[str, Any]) -> bool:
    """Whether a record is one of Emilia-YODAS, and not of Emilia."""
    return "_id" in record or "phone_count" in record


def _order(digits: str) -> int:
    if len(digits) > 18:  # what 64 bits hold
        raise BadInput(f"its key counts to a number of {len(digits)} digits")
    return int(digits)


def _number(value: Any) -> float | None:
    """A number that a table can hold; those of JSON have any size, and some are written as text."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if not isinstance(value, int | float) or not -sys.float_info.max <= value <= sys.float_info.max:
        return None
    return float(value)


def _source(speaker: str, recording: str) -> str:
    """The video where the speaker's name holds its id (EN_<video>_SPEAKER_00), else the source that was cut up."""
    video = re.fullmatch(r"[A-Z]{2,3}_(.+)_SPEAKER_\d+", speaker)
    return video[1] if video else recording
