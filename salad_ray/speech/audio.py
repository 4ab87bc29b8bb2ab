"""Audio files: reading cuts, encoding, and the checks that recorded speech must pass.

libsndfile (through soundfile) decodes WAV, FLAC, MP3, Ogg Vorbis and Opus. It opens a truncated WAV or Ogg file as if
it were merely shorter, so what the container announces is looked up here (`_missing_frames`).
"""

from __future__ import annotations

import errno
import io
import re
import struct
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr

from salad_ray.config import QualityConfig, RecordedQualityConfig, SpeechGates
from salad_ray.store import StoreError, filesystem, is_local, open_file, read_range
from salad_ray.tables import BadInput, Utterance

FORMATS = ("WAV", "WAVEX", "FLAC", "MP3", "OGG")
OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
FULL_SCALE = 0.999
"""Samples from here on count as full scale; 16-bit audio ends at 0.99997."""
MIN_CLIPPED_RUN = 3
"""Shorter runs at full scale are single peaks of loud, intact audio."""
PAUSE_FRAME_SECS = 0.02
PAUSE_POWER = 1e-4
END_TOLERANCE_SECS = 0.1
"""Durations in tables are rounded, and MP3 encoders pad."""
MAX_FOREIGN_SHARE = 0.2
"""Largest share of letters outside the language's script."""
MAX_SAMPLES = 2**27
"""That are decoded at once, of all channels: 23 minutes of stereo at 48 kHz. Silence is compressed a thousandfold.
Resampled, it may be as many again."""
CACHE_BYTES = 2**28
"""Largest remote recording that is fetched whole."""
LASTING = (IsADirectoryError, NotADirectoryError, PermissionError)
LASTING_ERRNOS = (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)
"""Errors of a file system that another try would meet again; of others (EIO, ESTALE, a timeout) nobody knows."""
_UNKNOWN_FRAMES = 2**62
_STREAMED_WAV_BYTES = 0x7FFFF000
"""Programs that write WAV to a pipe leave a data size at or above this."""
_FETCHING = threading.Lock()
_OGG_PAGE_BYTES = 65_307
"""The longest page."""
_MP3_FRAME = 1152
_MP3_LEAD = 10 * _MP3_FRAME


def load_audio(
    source: str | bytes | None,
    offset_secs: float = 0.0,
    duration_secs: float | None = None,
    sampling_rate: int | None = None,
) -> tuple[np.ndarray, int]:
    """Decode a cut of a recording: mean of the channels, resampled if asked for; only the cut is read.

    Args:
        source: local path, URL that fsspec opens, or an encoded file's bytes.
        duration_secs: None or 0 reads to the end.
        sampling_rate: of the result; None keeps the file's.

    Returns:
        Audio, float32 (num_samples,), and its sampling rate.

    Raises:
        BadInput: missing, not audio, truncated, shorter than the cut, or of more than `MAX_SAMPLES` samples.
        OSError: of the network or a disk, which says nothing of the recording.
    """
    with open_recording(source) as recording:
        start, num_frames = _cut(recording, offset_secs, duration_secs or 0.0)
        rate = recording.file.samplerate
        if sampling_rate is not None and num_frames / rate * sampling_rate > MAX_SAMPLES:
            raise BadInput(
                f"{num_frames:,} samples at {rate} Hz are too many at {sampling_rate} Hz; cut the recording into parts"
            )
        samples = _read(recording, start, num_frames)
    audio = samples.mean(axis=1, dtype=np.float32)
    if sampling_rate is None or sampling_rate == rate:
        return audio, rate
    return soxr.resample(audio, rate, sampling_rate), sampling_rate


def encode_audio(audio: np.ndarray, sampling_rate: int, audio_format: str) -> bytes:
    """Audio (num_samples,) in [−1, 1] as a FLAC (16-bit) or OPUS (Ogg) file.

    Opus knows five sampling rates; others are resampled to the next higher one.
    """
    if audio_format not in ("FLAC", "OPUS"):
        raise ValueError(f"audio format '{audio_format}' cannot be written; use FLAC or OPUS")
    file = io.BytesIO()
    if audio_format == "FLAC":
        soundfile.write(file, audio, sampling_rate, format="FLAC", subtype="PCM_16")
    else:
        rate = next((rate for rate in OPUS_RATES if rate >= sampling_rate), OPUS_RATES[-1])
        audio = audio if rate == sampling_rate else soxr.resample(audio, sampling_rate, rate)
        soundfile.write(file, audio, rate, format="OGG", subtype="OPUS")
    return file.getvalue()


def load_utterance(row: Utterance, sampling_rate: int) -> np.ndarray:
    """The audio of an utterance, float32 (num_samples,) at `sampling_rate`; raises as `load_audio`."""
    return load_audio(referenced(row), row.offset_secs, row.duration_secs, sampling_rate)[0]


def referenced(row: Utterance) -> str | bytes | None:
    """What an utterance's audio is to be opened from: a local path, or an encoded file's bytes.

    Of an archive only the member is read. A remote recording is fetched once for the many cuts of it that follow each
    other; one larger than `CACHE_BYTES` is left where it is.

    Raises:
        BadInput: missing, or an archive that ends before the member does.
        OSError: as `load_audio`.
    """
    if row.audio is not None or row.uri is None:
        return row.audio
    with naming(row.uri):
        if row.byte_start is not None and row.num_bytes is not None:
            data = read_range(row.uri, row.byte_start, row.byte_start + row.num_bytes)
            if len(data) != row.num_bytes:
                raise BadInput(f"truncated: {row.uri} ends {row.num_bytes - len(data):,} bytes before the audio does")
            return data
        if is_local(filesystem(row.uri)[0]):
            return row.uri
        with _FETCHING:  # threads want cuts of the same recording, which is fetched once
            fetched = _fetched(row.uri)
        return row.uri if fetched is None else fetched


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Errors of a file system with the file's name: `BadInput` if they last, else an `OSError`, for another try."""
    try:
        yield
    except StoreError:  # names it already
        raise
    except FileNotFoundError:
        raise BadInput(f"no such audio file: {source}") from None
    except OSError as error:
        text = f"audio file {source} cannot be read ({error})"
        if isinstance(error, LASTING) or error.errno in LASTING_ERRNOS:
            raise BadInput(text) from None
        raise OSError(text) from error


@lru_cache(maxsize=2)
def _fetched(uri: str) -> bytes | None:
    """A remote file, or None for one that is too large; the look at its size is kept, too, as it costs a request."""
    fs, path = filesystem(uri)
    return bytes(fs.cat_file(path)) if fs.size(path) <= CACHE_BYTES else None


def check_recording(utterance: Utterance, quality: RecordedQualityConfig) -> Utterance:
    """Decode the audio of an utterance and check it and its transcript; at most `max_duration_secs` are decoded.

    Returns:
        The utterance with its true duration.

    Raises:
        BadInput: with the reason.
        OSError: as `load_audio`.
    """
    check_transcript(utterance.text, utterance.language)
    if quality.min_dnsmos is not None and utterance.dnsmos is not None and utterance.dnsmos < quality.min_dnsmos:
        raise BadInput(f"DNSMOS {utterance.dnsmos:.2f}, below min_dnsmos={quality.min_dnsmos:g}")
    with open_recording(referenced(utterance)) as recording:
        if recording.file.subtype in ("PCM_U8", "PCM_S8"):
            raise BadInput("8-bit samples, too coarse for speech; at least 16 bits are needed")
        start, num_frames = _cut(recording, utterance.offset_secs, utterance.duration_secs)
        rate = recording.file.samplerate
        check_duration(num_frames / rate, quality)
        samples = _read(recording, start, num_frames)
        check_samples(samples, quality, lossy=recording.file.format in ("MP3", "OGG"))
    duration_secs = len(samples) / rate
    check_duration(duration_secs, quality)
    _check_pace(utterance.text, duration_secs, quality)
    return replace(utterance, duration_secs=duration_secs)


def check_speech(audio: np.ndarray, sampling_rate: int, text: str, gates: SpeechGates) -> None:
    """Raises `BadInput` for synthetic speech (num_samples,) that cannot be what its text says.

    It is of the wrong length for its text, silent for too long or altogether, clipped, or not finite.
    """
    if len(audio) == 0:
        raise BadInput("no samples")
    duration_secs = len(audio) / sampling_rate
    check_duration(duration_secs, gates)
    check_samples(audio[:, None], gates)
    _check_pace(text, duration_secs, gates)
    pause_secs = longest_pause(audio, sampling_rate)
    if pause_secs > gates.max_pause_secs:
        raise BadInput(f"silent for {pause_secs:.1f} s within, above max_pause_secs={gates.max_pause_secs:g}")


def longest_pause(audio: np.ndarray, sampling_rate: int) -> float:
    """Seconds of the longest stretch between sounds that is 40 dB below the speech's level, in frames of 20 ms."""
    size = round(PAUSE_FRAME_SECS * sampling_rate)
    frames = audio[: len(audio) // size * size].reshape(-1, size)
    power = np.square(frames, dtype=np.float64).mean(axis=1)
    loud = np.flatnonzero(power > PAUSE_POWER * power.mean())
    return float(np.diff(loud).max(initial=1) - 1) * PAUSE_FRAME_SECS


def check_transcript(text: str, language: str) -> None:
    """Raises `BadInput` for a transcript without words or, in English, largely outside the Latin script."""
    if not text.strip():
        raise BadInput("empty transcript")
    if not any(char.isalnum() for char in text):
        raise BadInput(f"no letters or digits in the transcript '{text[:40]}'")
    letters = [char for char in text if char.isalpha()]
    foreign = sum(not unicodedata.name(char, "").startswith("LATIN") for char in letters)
    if re.match(r"en(\b|_|g)", language.lower()) and foreign > MAX_FOREIGN_SHARE * len(letters):
        raise BadInput(f"transcript in another script: {foreign} of {len(letters)} letters are not Latin")


def check_samples(samples: np.ndarray, quality: QualityConfig, lossy: bool = False) -> None:
    """Raises `BadInput` for samples (num_samples, num_channels) that are not finite, silent or clipped.

    Args:
        lossy: from a lossy decoder, which may overshoot ±1 where the recording did not.
    """
    if not np.isfinite(samples).all():
        raise BadInput(f"{np.count_nonzero(~np.isfinite(samples))} samples are NaN or infinite")
    # A constant offset is as silent as zeros.
    level = float(np.sqrt(np.mean(np.square(samples - samples.mean(axis=0)), dtype=np.float64)))
    if level < 10 ** (quality.min_level_dbfs / 20):
        dbfs = f"{20 * np.log10(level):.0f} dBFS" if level > 0 else "all samples equal"
        raise BadInput(f"silent: {dbfs}, below min_level_dbfs={quality.min_level_dbfs:g}")
    peak = float(np.abs(samples).max())
    if peak > 1 and not lossy:
        raise BadInput(f"clipped: samples reach {peak:.4g}, outside [−1, 1]")
    clipped = max(_clipped_share(channel) for channel in samples.T)
    if clipped > quality.max_clipped_share:
        raise BadInput(f"clipped: {clipped:.1%} of the samples at full scale, above {quality.max_clipped_share:.1%}")


def check_duration(duration_secs: float, quality: QualityConfig) -> None:
    """Raises `BadInput` for a recording that is too long or too short."""
    if duration_secs > quality.max_duration_secs:
        raise BadInput(f"too long: {duration_secs:.1f} s, above max_duration_secs={quality.max_duration_secs:g}")
    if duration_secs < quality.min_duration_secs:
        raise BadInput(f"too short: {duration_secs:.3f} s, below min_duration_secs={quality.min_duration_secs:g}")


def _check_pace(text: str, duration_secs: float, quality: QualityConfig) -> None:
    pace = len(text) / duration_secs
    what = f"{len(text)} characters in {duration_secs:.1f} s are {pace:.1f} a second"
    if pace > quality.max_chars_per_sec:
        raise BadInput(f"transcript too long for the audio: {what}, above {quality.max_chars_per_sec:g}")
    if pace < quality.min_chars_per_sec:
        raise BadInput(f"transcript too short for the audio: {what}, below {quality.min_chars_per_sec:g}")


def _clipped_share(channel: np.ndarray) -> float:
    """Share of samples (num_samples,) in runs of at least `MIN_CLIPPED_RUN` at the same end of the scale."""
    clipped = 0
    for at_end in (channel >= FULL_SCALE, channel <= -FULL_SCALE):
        edges = np.flatnonzero(np.diff(at_end, prepend=False, append=False))
        lengths = edges[1::2] - edges[::2]
        clipped += int(lengths[lengths >= MIN_CLIPPED_RUN].sum())
    return clipped / len(channel)


@dataclass(frozen=True)
class Recording:
    """An open audio file and how far its container can be believed."""

    file: soundfile.SoundFile
    missing: int | None
    """Frames that the container announces beyond those that libsndfile found; None: unknown, but some."""
    slack: int
    """Frames by which the announced length may exceed what an intact file holds."""


@contextmanager
def open_recording(source: str | bytes | None) -> Iterator[Recording]:
    """Open an audio file for reading; libsndfile's errors, also those while reading, become `BadInput`."""
    with _open_binary(source) as binary:
        size = binary.seek(0, io.SEEK_END)
        if size == 0:
            raise BadInput("empty file")
        missing, id3_bytes = _missing_frames(binary, size), _id3_bytes(binary)
        binary.seek(4)
        if binary.read(4) == b"ftyp":
            raise BadInput("M4A or MP4 cannot be decoded here; convert it to FLAC or MP3")
        binary.seek(0)
        watched = _Watched(binary)
        try:
            with soundfile.SoundFile(watched) as file:
                if file.format not in FORMATS:
                    raise BadInput(f"format {file.format} is not supported; convert it to WAV or FLAC")
                # libsndfile before 1.2.1 finds no length in an Ogg stream that breaks off; its samples can be read.
                if file.frames >= _UNKNOWN_FRAMES and missing is not None:
                    raise BadInput(f"{file.format} header without a length; encode it again")
                # Without an index, an MP3's length is guessed from the file's size, tags included.
                slack = _MP3_FRAME + file.frames * id3_bytes // size if file.format == "MP3" else 0
                yield Recording(file, missing, slack)
        except soundfile.LibsndfileError as error:
            raise BadInput(_explain(error)) from None
        finally:
            if watched.error is not None:  # rather than that the recording is truncated
                raise watched.error


class _Watched:
    """A file that remembers why it could not be read: libsndfile takes any error for the end of the file."""

    def __init__(self, binary: Any) -> None:
        self.binary, self.seek, self.tell = binary, binary.seek, binary.tell
        self.error: OSError | None = None

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self.binary.readinto(buffer))
        except OSError as error:
            self.error = error
            return 0


@contextmanager
def _open_binary(source: str | bytes | None) -> Iterator[BinaryIO]:
    if source is None:
        raise BadInput("no audio: neither a file nor bytes")
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    with naming(source), open_file(source) as file:
        yield file


def _explain(error: soundfile.LibsndfileError) -> str:
    reason = error.error_string.removeprefix("Error : ").rstrip(".")
    if "not recognised" in reason or "does not exist" in reason:
        return "not audio, or its first bytes are damaged"
    return f"truncated or damaged audio ({reason})"


def _cut(recording: Recording, offset_secs: float, duration_secs: float) -> tuple[int, int]:
    """First frame and number of frames of a cut; duration 0 means to the end that the container announces."""
    rate, found = recording.file.samplerate, recording.file.frames
    start = round(offset_secs * rate)
    if recording.missing is None and not (duration_secs and found):
        after = f" after {found / rate:.3f} s" if found < _UNKNOWN_FRAMES else ""
        raise BadInput(f"truncated: the Ogg stream breaks off{after}")
    announced = found + (recording.missing or 0)
    if announced == 0:
        raise BadInput("no samples")
    end = start + round(duration_secs * rate) if duration_secs else announced
    if start >= announced or end > announced + END_TOLERANCE_SECS * rate:
        raise BadInput(
            f"cut {offset_secs:g}–{end / rate:.3f} s ends beyond its recording, which has {announced / rate:.3f} s"
        )
    return start, min(end, announced) - start


def _read(recording: Recording, start: int, num_frames: int) -> np.ndarray:
    """Samples float32 (num_frames, num_channels); raises `BadInput` for more than `MAX_SAMPLES`."""
    if num_frames * recording.file.channels > MAX_SAMPLES:
        raise BadInput(
            f"{num_frames:,} samples of {recording.file.channels} channels would take "
            f"{num_frames * recording.file.channels * 4 / 2**30:.1f} GiB of memory; cut the recording into parts"
        )
    missing = start + num_frames - recording.file.frames
    if missing <= 0:
        # An MP3 frame needs those before it; libsndfile does not go back for them.
        lead = min(start, _MP3_LEAD) if recording.file.format == "MP3" else 0
        recording.file.seek(start - lead)
        samples = recording.file.read(lead + num_frames, dtype="float32", always_2d=True)[lead:]
        missing = num_frames - len(samples) - recording.slack
    if missing > 0:
        secs = missing / recording.file.samplerate
        raise BadInput(f"truncated or damaged: {secs:.3f} s of the {num_frames} announced samples are missing")
    if len(samples) == 0:
        raise BadInput("no samples")
    return samples


def _missing_frames(binary: BinaryIO, size: int) -> int | None:
    """Frames announced by a WAV header beyond the end of the file; None for an Ogg stream without its last page.

    FLAC and MP3 need no look: libsndfile announces what their headers do and fails or falls short while reading.
    """
    binary.seek(0)
    magic = binary.read(12)
    if magic[:4] == b"RIFF" and magic[8:] == b"WAVE":
        return _missing_in_wav(binary, size)
    if magic[:4] == b"OggS" and not _ogg_ends(binary, size):
        return None
    return 0


def _missing_in_wav(binary: BinaryIO, size: int) -> int:
    block_align = 1
    position = 12
    while position + 8 <= size:
        binary.seek(position)
        name, length = struct.unpack("<4sI", binary.read(8))
        if name == b"fmt ":
            block_align = max(1, struct.unpack("<12xH", binary.read(14).ljust(14, b"\0"))[0])
        if name == b"data":
            streamed = length >= _STREAMED_WAV_BYTES
            return 0 if streamed else -(-max(0, length - (size - position - 8)) // block_align)
        position += 8 + length + length % 2
    return 0


def _ogg_ends(binary: BinaryIO, size: int) -> bool:
    """Whether the last page is complete and marked as the end of its stream (RFC 3533, section 6)."""
    binary.seek(max(0, size - _OGG_PAGE_BYTES))
    tail = binary.read()
    page = tail[tail.rfind(b"OggS") :]
    if len(page) < 27 or not page[5] & 4:
        return False
    num_segments = page[26]
    return len(page) >= 27 + num_segments + sum(page[27 : 27 + num_segments])


def _id3_bytes(binary: BinaryIO) -> int:
    """Length of an ID3v2 tag: four bytes of seven bits after a 6-byte start."""
    binary.seek(0)
    head = binary.read(10)
    if head[:3] != b"ID3" or len(head) < 10:
        return 0
    return 10 + sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
