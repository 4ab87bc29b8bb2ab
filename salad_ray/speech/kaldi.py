"""Kaldi's data folders, as LibriHeavy's second step writes them: `wav.scp`, `text`, `segments`, `utt2spk`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import fsspec

from salad_ray.config import ConfigError
from salad_ray.speech.lhotse_cuts import book_of
from salad_ray.speech.readers import STAGE, inside, normalize_text
from salad_ray.tables import BadInput, Reject, Utterance

NUM_PROBES = 50
TABLES = ("wav.scp", "text", "segments", "utt2spk")


def first_paths(folder: str) -> list[str]:
    """The first audio paths of `wav.scp`; raises `ConfigError` where there is none."""
    return [path for path in _table(folder, "wav.scp").values() if not path.endswith("|")][:NUM_PROBES]


def read_kaldi(folder: str, corpus: str, root: str, allow_outside: bool) -> Iterator[Utterance | Reject]:
    """Every line of `text` as an utterance or a reject, and a reject for every segment without text."""
    audio, speakers, segments = _table(folder, "wav.scp"), _table(folder, "utt2spk"), _table(folder, "segments")
    texts = _table(folder, "text")
    for name, text in texts.items():
        try:
            recording, offset, duration = _segment(name, segments)
            yield Utterance(
                utt_id=f"{corpus}/{name}",
                text=_text(text),
                duration_secs=duration,
                recording_id=f"{corpus}/{recording}",
                corpus=corpus,
                speaker=speakers.get(name, ""),
                source=f"{corpus}/{book_of(recording)}",
                uri=inside(_audio(recording, audio), root, allow_outside),
                offset_secs=offset,
            )
        except BadInput as error:
            yield Reject(STAGE, f"{corpus}/{name}", str(error))
    for name in segments.keys() - texts.keys():
        yield Reject(STAGE, f"{corpus}/{name}", "a segment without a line in text")


def _table(folder: str, name: str) -> dict[str, str]:
    fs, path = fsspec.core.url_to_fs(f"{folder}/{name}")
    if not fs.exists(path):
        if name in ("wav.scp", "text"):
            raise ConfigError(f"{folder}: no {name}; a Kaldi folder has wav.scp and text")
        return {}
    lines = fs.cat_file(path).decode("utf-8", errors="replace").splitlines()
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    return {pair[0]: pair[1].strip() if len(pair) > 1 else "" for pair in pairs}


def _segment(name: str, segments: dict[str, str]) -> tuple[str, float, float]:
    """Recording, offset and duration; without `segments` an utterance is a whole recording."""
    if not segments:
        return name, 0.0, 0.0
    fields = segments.get(name, "").split()
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


def _text(text: str) -> str:
    text = normalize_text(text)
    if not text:
        raise BadInput("empty transcript")
    return text
