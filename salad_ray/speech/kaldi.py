"""Kaldi's data folders, as LibriHeavy's second step writes them: `wav.scp`, `text`, `segments`, `utt2spk`."""

from __future__ import annotations

import math
from collections.abc import Iterator

from salad_ray.config import ConfigError
from salad_ray.names import INGEST
from salad_ray.speech.lhotse_cuts import book_of, transcript
from salad_ray.speech.readers import IdSet, inside, lines_of
from salad_ray.store import open_file
from salad_ray.tables import BadInput, Reject, Utterance, file_exists

TABLES = ("wav.scp", "text", "segments", "utt2spk")


def recordings_of(folder: str) -> Iterator[tuple[str, str]]:
    """Names and audio paths of `wav.scp`; raises `ConfigError` where a table is missing."""
    if not file_exists(f"{folder}/text"):
        raise ConfigError(f"{folder}: no text; a Kaldi folder has wav.scp and text")
    yield from (row for row in _rows(folder, "wav.scp") if not row[1].endswith("|"))


def read_kaldi(folder: str, corpus: str, root: str, allow_outside: bool) -> Iterator[Utterance | Reject]:
    """Every line of `text` as an utterance or a reject, and a reject for every segment or recording without text.

    Only the recordings are held in memory; the tables of utterances are read side by side.
    """
    audio, speakers = dict(_rows(folder, "wav.scp")), _SideBySide(folder, "utt2spk")
    segments = _SideBySide(folder, "segments") if file_exists(f"{folder}/segments") else None
    seen, used = IdSet(), set[str]()
    for name, text in _rows(folder, "text"):
        try:
            if not seen.add(ascii(name)):  # an id that is not UTF-8 has no hash
                raise BadInput("text has a line of this id already")
            recording, offset, duration = _segment(name, segments)
            used.add(recording)
            yield Utterance(
                utt_id=f"{corpus}/{name}",
                text=transcript(text),
                duration_secs=duration,
                recording_id=f"{corpus}/{recording}",
                corpus=corpus,
                speaker=speakers.take(name) or "",
                source=f"{corpus}/{book_of(recording)}",
                uri=inside(_audio(recording, audio), root, allow_outside),
                offset_secs=offset,
            )
        except BadInput as error:
            yield Reject(INGEST, f"{corpus}/{name}", str(error))
    for name in segments.rest() if segments else ():
        yield Reject(INGEST, f"{corpus}/{name}", "a segment without a line in text")
    for name in audio.keys() - used:
        yield Reject(INGEST, f"{corpus}/{name}", "a recording of wav.scp that no line of text is of")


class _SideBySide:
    """A table whose lines are taken in about their own order; those that are ahead of their turn wait."""

    def __init__(self, folder: str, name: str) -> None:
        self._rows = _rows(folder, name) if file_exists(f"{folder}/{name}") else iter(())
        self._waiting: dict[str, str] = {}

    def take(self, name: str) -> str | None:
        while name not in self._waiting:
            row = next(self._rows, None)
            if row is None:
                return None
            self._waiting[row[0]] = row[1]
        return self._waiting.pop(name)

    def rest(self) -> Iterator[str]:
        """The ids of all that was not taken."""
        yield from self._waiting
        yield from (name for name, _ in self._rows)


def _rows(folder: str, name: str) -> Iterator[tuple[str, str]]:
    """First field and rest of every line of a table; bytes that are not UTF-8 become surrogates."""
    try:
        with open_file(f"{folder}/{name}") as file:
            for number, line in lines_of(file):
                if isinstance(line, BadInput):
                    raise ConfigError(f"{folder}/{name}:{number}: {line}; is it Kaldi's?")
                fields = line.decode("utf-8", errors="surrogateescape").split(maxsplit=1)
                if fields:
                    yield fields[0], fields[1].strip() if len(fields) > 1 else ""
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no {name}; a Kaldi folder has wav.scp and text") from None


def _segment(name: str, segments: _SideBySide | None) -> tuple[str, float, float]:
    """Recording, offset and duration; without `segments` an utterance is a whole recording."""
    if segments is None:
        return name, 0.0, 0.0
    fields = (segments.take(name) or "").split()
    try:
        recording, start, end = fields[0], float(fields[1]), float(fields[2])
    except (IndexError, ValueError):
        raise BadInput(f"its line in segments is '{' '.join(fields)}', not recording, start and end") from None
    if not (0 <= start < end and math.isfinite(end)):
        raise BadInput(f"segment from {start:g} to {end:g} s")
    return recording, start, round(end - start, 6)


def _audio(recording: str, audio: dict[str, str]) -> str:
    if recording not in audio:
        raise BadInput(f"recording '{recording}' is not in wav.scp")
    if audio[recording].endswith("|"):
        raise BadInput(f"wav.scp gives a command for '{recording}', and commands are not run; name a file")
    return audio[recording]
