"""Lhotse cut manifests, read and written: LibriHeavy's full manifest and both its second-step forms, and any other.

A MonoCut gives one utterance per supervision. LibriHeavy's full manifest keeps its text in `custom.texts` (the book's
and the recogniser's) and what stands before it in `custom.pre_texts`.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import soundfile

from salad_ray.names import INGEST
from salad_ray.speech.audio import load_audio, open_recording, referenced
from salad_ray.speech.readers import inside, language_code, lines_at, normalize_text
from salad_ray.tables import BadInput, Reject, Utterance, Word, atomic_file, stable_hash, write_bytes

if TYPE_CHECKING:
    from lhotse import MonoCut, Recording, SupervisionSegment

END_TOLERANCE_SECS = 0.1
SPLITS = ("train", "test")
# What a record raises that is not of lhotse's format, whose types of fields nobody checks; `BadInput` is a ValueError.
_MALFORMED = (
    ValueError, KeyError, TypeError, AttributeError, AssertionError, NotImplementedError, RecursionError, OverflowError,
)  # fmt: skip


def read_cuts(
    url: str, corpus: str, root: str, form: Literal["book", "recogniser"], allow_outside: bool
) -> Iterator[Utterance | Reject]:
    """The supervisions of a manifest, line by line; every broken line or unusable cut is a reject.

    Args:
        root: folder that audio paths are relative to.
        form: which of LibriHeavy's two texts.
        allow_outside: believe absolute paths and URLs.
    """
    for number, line in _lines(url):
        if isinstance(line, BadInput):
            yield Reject(INGEST, f"{corpus}/{url}:{number}", str(line))
            continue
        try:
            rows = _utterances(line, corpus, root, form, allow_outside)
        except _MALFORMED as error:
            yield Reject(INGEST, f"{corpus}/{_id_in(line) or f'{url}:{number}'}", _reason(error))
            continue
        yield from rows


def recordings_of(url: str) -> Iterator[tuple[str, str]]:
    """Names and audio paths of a manifest's recordings; what is unreadable is left to `read_cuts` to say."""
    before: list[tuple[str, str]] = []
    for _, line in _lines(url):
        try:
            recording = _cut(line).recording
            paths = [one.source for one in recording.sources if one.type in ("file", "url")]
            found = [(str(recording.id), path) for path in paths if isinstance(path, str)]
        except _MALFORMED:
            continue
        if found != before:  # cuts of one recording follow each other
            yield from found
        before = found


def book_of(recording_id: str) -> str:
    """What of a Libri-Light recording (size/speaker/book/chapter) is its book; any other recording is its own."""
    found = re.match(r"((?:small|medium|large|unlab-\w+)/\d+/[^/]+)/", recording_id)
    return found[1] if found else recording_id


def transcript(text: Any) -> str:
    """What a record gives as its text, normalised; raises `BadInput` where that is nothing, or no text."""
    if not isinstance(text, str | None):
        raise BadInput(f"its text is no string ({type(text).__name__})")
    if not normalize_text(text or ""):
        raise BadInput("empty transcript")
    return normalize_text(text or "")


def _lines(url: str) -> Iterator[tuple[int, str | BadInput]]:
    """Numbered lines; bytes that are not UTF-8 become surrogates, by which `corpora.scan` knows them."""
    for number, line in lines_at(url, "manifest"):
        yield number, line if isinstance(line, BadInput) else line.decode("utf-8", errors="surrogateescape")


def _cut(line: str | BadInput) -> MonoCut:
    if isinstance(line, BadInput):
        raise line
    from lhotse import MonoCut  # here and below: it imports torch, for which no other corpus should wait
    from lhotse.serialization import deserialize_item

    cut = deserialize_item(json.loads(line))
    if not isinstance(cut, MonoCut):
        raise BadInput(f"a {type(cut).__name__}; only cuts of one channel of one recording are read")
    if cut.recording is None:
        raise BadInput("the cut names no recording")
    return cut


def _id_in(line: str) -> str:
    found = re.search(r'"id": ?"([^"]+)"', line)
    return found[1] if found else ""


def _utterances(
    line: str, corpus: str, root: str, form: Literal["book", "recogniser"], allow_outside: bool
) -> list[Utterance | Reject]:
    cut = _cut(line)
    if not cut.supervisions:
        raise BadInput("the cut has no supervision, so no text")
    uri = _uri(cut, root, allow_outside)
    rows: list[Utterance | Reject] = []
    for supervision in cut.supervisions:
        name = cut.id if len(cut.supervisions) == 1 else f"{cut.id}/{supervision.id}"
        try:
            rows.append(_utterance(f"{corpus}/{name}", cut, supervision, corpus, uri, form))
        except _MALFORMED as error:
            rows.append(Reject(INGEST, f"{corpus}/{name}", _reason(error)))
    return rows


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, BadInput) else f"not a Lhotse cut ({type(error).__name__}: {error})"


def _uri(cut: MonoCut, root: str, allow_outside: bool) -> str:
    if len(cut.recording.sources) != 1:
        raise BadInput(f"its recording has {len(cut.recording.sources)} sources; one file is needed")
    if cut.recording.transforms:
        raise BadInput("its recording is transformed on the fly, which is not done here; store it as it should sound")
    if cut.recording.num_channels != 1:
        raise BadInput(f"its recording has {cut.recording.num_channels} channels; split them into files of one")
    if [cut.channel] != list(cut.recording.channel_ids):
        raise BadInput(f"channel {cut.channel} of a recording that has only channel {cut.recording.channel_ids[0]}")
    [source] = cut.recording.sources
    if source.type not in ("file", "url"):
        raise BadInput(f"its audio is a '{source.type}', which is not run or read; give a file")
    if not isinstance(source.source, str):
        raise BadInput("its audio is named by something that is no path")
    return inside(source.source, root, allow_outside)


def _utterance(
    utt_id: str, cut: MonoCut, supervision: SupervisionSegment, corpus: str, uri: str, form: str
) -> Utterance:
    custom = (cut.custom or {}) | (supervision.custom or {})
    text, pre_text = _texts(supervision, custom, form)
    offset = _offset(cut, supervision)
    is_ours = "recording" in custom and custom.get("split") in SPLITS
    return Utterance(
        utt_id=utt_id,
        text=text,
        duration_secs=float(supervision.duration),
        recording_id=f"{corpus}/{custom.get('recording') or cut.recording.id}",
        corpus=corpus,
        speaker=str(supervision.speaker or ""),
        language=language_code(str(supervision.language or "en")),
        license=str(custom.get("license") or ""),
        domain=str(custom.get("domain") or ""),
        split=custom["split"] if is_ours else "",
        source=f"{corpus}/{custom.get('source') or custom.get('text_path') or book_of(cut.recording.id)}",
        order=_order(custom.get("order")),
        pre_text=pre_text,
        dnsmos=_number(custom.get("dnsmos")),
        align_score=_number(custom.get("align_score")),
        words=_words(supervision, text, offset),
        uri=uri,
        offset_secs=offset,
    )


def _offset(cut: MonoCut, supervision: SupervisionSegment) -> float:
    """Where in the recording the speech starts; it may lie partly outside the cut, but not outside the recording."""
    offset, duration, available = cut.start + supervision.start, supervision.duration, cut.recording.duration
    if not all(map(math.isfinite, (offset, duration, available))) or duration <= 0:
        raise BadInput(f"a start of {offset} and a duration of {duration} s in {available} s cannot be cut")
    end = offset + duration
    if offset < -END_TOLERANCE_SECS or end > available + END_TOLERANCE_SECS:
        where = "starts before" if offset < 0 else "ends beyond"
        raise BadInput(f"cut {offset:g}–{end:.3f} s {where} its recording, which has {available:.3f} s")
    return float(max(0.0, round(offset, 6)))


def _texts(supervision: SupervisionSegment, custom: dict[str, Any], form: str) -> tuple[str, str]:
    """Text and what stands before it."""
    which = 0 if form == "book" else 1
    text = supervision.text if supervision.text is not None else _form(custom.get("texts"), which)
    pre_text = custom.get("pre_text") or _form(custom.get("pre_texts"), which)
    return transcript(text), normalize_text(pre_text) if isinstance(pre_text, str) else ""


def _form(values: Any, index: int) -> Any:
    return values[index] if isinstance(values, list) and len(values) > index else None


def _order(value: Any) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    if not -(2**63) <= value < 2**63:
        raise BadInput("its order has more than 64 bits")
    return value


def _number(value: Any) -> float | None:
    if isinstance(value, str):  # as some tools write scores
        with suppress(ValueError):
            value = float(value)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _words(supervision: SupervisionSegment, text: str, offset: float) -> list[Word] | None:
    """Its own word alignment, if it covers the text word by word and lies in the utterance; times from there.

    Lhotse counts the times of words from the start of the recording, whatever the cut (`AlignmentItem`).
    """
    items = (supervision.alignment or {}).get("word") or []
    if [item.symbol for item in items] != text.split():
        return None
    words = [Word(item.symbol, round(item.start - offset, 6), round(item.end - offset, 6)) for item in items]
    times = [time for word in words for time in (word.start_secs, word.end_secs)]
    latest = supervision.duration + END_TOLERANCE_SECS
    if times != sorted(times) or not all(-END_TOLERANCE_SECS <= time <= latest for time in times):
        return None
    return [replace(word, start_secs=max(0.0, word.start_secs), end_secs=max(0.0, word.end_secs)) for word in words]


def write_cuts(utterances: Iterable[Utterance], url: str) -> int:
    """Write utterances as a manifest that `lhotse.CutSet.from_file` loads; returns their number.

    Audio in plain files is referred to. Audio in an archive or in the row itself is written beside the manifest, into
    `<its name>_audio/`, as are cuts of files of several channels, as the mean that we hear.

    Args:
        url: `….jsonl.gz`, local or remote.

    Raises:
        BadInput: audio that cannot be opened.
    """
    count = 0
    with atomic_file(url) as file, gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as stream:
        recordings = _Recordings(re.sub(r"\.jsonl(\.gz)?$", "", url) + "_audio")
        for row in utterances:
            cut = _cut_of(*recordings.of(row))
            stream.write(json.dumps(cut.to_dict(), ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


@dataclass
class _Recordings:
    """Lhotse's description of the recordings, one look at a file's header for consecutive cuts of it."""

    folder: str
    last: dict[str, Recording] = field(default_factory=dict)

    def of(self, row: Utterance) -> tuple[Utterance, Recording]:
        """The recording that a cut is taken from, and the utterance as a reference to it."""
        recording = self._described(row)
        if recording.num_channels > 1:  # lhotse would take one of them
            row = _averaged(row)
            recording = self._described(row)
        return row, recording

    def _described(self, row: Utterance) -> Recording:
        from lhotse import AudioSource, Recording

        embedded = row.audio is not None or row.byte_start is not None
        path = self._write(row) if embedded else row.uri or ""
        if path not in self.last:
            with open_recording(path) as recording:
                frames, rate = recording.count(), recording.rate
                channels = list(range(recording.num_channels))
            kind = "url" if "://" in path else "file"
            name = row.utt_id if embedded else row.recording_id
            self.last = {
                path: Recording(name, [AudioSource(kind, channels, path)], rate, frames, frames / rate, channels)
            }
        return self.last[path]

    def _write(self, row: Utterance) -> str:
        source = referenced(row)
        assert isinstance(source, bytes), "embedded audio is bytes"
        with open_recording(source) as recording:
            end = {"WAV": "wav", "WAVEX": "wav", "FLAC": "flac", "MP3": "mp3", "OGG": "ogg"}[recording.kind]
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", row.utt_id)[-100:]
        path = f"{self.folder}/{safe}-{stable_hash(row.utt_id):016x}.{end}"
        write_bytes(path, source)
        return path


def _averaged(row: Utterance) -> Utterance:
    """The utterance with its audio, the mean of the channels, in the row; as floats, so no sample changes."""
    audio, rate = load_audio(referenced(row), row.offset_secs, row.duration_secs)
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format="WAV", subtype="FLOAT")
    return replace(row, audio=file.getvalue(), uri=None, byte_start=None, num_bytes=None, offset_secs=0.0)


def _cut_of(row: Utterance, recording: Recording) -> MonoCut:
    from lhotse import MonoCut, SupervisionSegment
    from lhotse.supervision import AlignmentItem

    extra: dict[str, Any] = {
        "license": row.license,
        "domain": row.domain,
        "source": row.source,
        "recording": row.recording_id,
        "order": row.order,
        "split": row.split,
    }
    extra |= {"dnsmos": row.dnsmos, "align_score": row.align_score, "pre_text": row.pre_text}
    items = [
        AlignmentItem(word.text, round(row.offset_secs + word.start_secs, 6), _length(word)) for word in row.words or []
    ]
    left = recording.duration - row.offset_secs  # tables round, and lhotse does not forgive a cut that is too long
    duration = min(row.duration_secs or left, left)
    if duration <= 0:
        raise BadInput(f"{row.utt_id} begins at {row.offset_secs:g} s of {recording.duration:g} s")
    supervision = SupervisionSegment(
        id=row.utt_id,
        recording_id=recording.id,
        start=0.0,
        duration=duration,
        channel=0,
        text=row.text,
        language=row.language,
        speaker=row.speaker or None,
        custom={name: value for name, value in extra.items() if value not in (None, "")},
        alignment={"word": items} if items else None,
    )
    return MonoCut(supervision.id, row.offset_secs, duration, 0, supervisions=[supervision], recording=recording)


def _length(word: Word) -> float:
    return round(word.end_secs - word.start_secs, 6)
