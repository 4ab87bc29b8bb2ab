"""Audio files: reading cuts, encoding, and the checks that recorded speech must pass.

FFmpeg (through PyAV) decodes MP3: most of these do not state their length, and libsndfile believes a guess. libsndfile
(through soundfile) decodes WAV, FLAC, Ogg Vorbis and Opus. It opens a truncated WAV or Ogg file as if it were merely
shorter, so what the container announces is looked up here (`_missing_frames`), and it hears only the first of several
recordings in one file (`_parts`).

What is checked is what training hears: both come from `_cut` and `_read`, and `mono` mixes for both.
"""

from __future__ import annotations

import errno
import io
import re
import struct
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import soundfile
import soxr

from salad_ray.config import QualityConfig, RecordedQualityConfig, SpeechGates
from salad_ray.store import StoreError, filesystem, is_local, open_file, read_range
from salad_ray.tables import BadInput, Utterance

if TYPE_CHECKING:
    import av.container

FORMATS = ("WAV", "WAVEX", "FLAC", "OGG")
"""Of libsndfile's."""
OPUS_RATES = (8000, 12000, 16000, 24000, 48000)
FULL_SCALE = 0.999
"""Samples from here on count as full scale; 16-bit audio ends at 0.99997."""
MIN_CLIPPED_RUN = 3
"""Shorter runs at full scale are single peaks of loud, intact audio."""
MAX_PEAK = 1.25
"""Floats overshoot full scale by up to 2 dB where a recording was resampled or levelled; beyond, they are no audio."""
MAX_OFFSET = 0.05
"""A constant offset is removed where it exceeds this share of the signal's own level."""
MIN_MIX = 0.1
"""Least power of a mix, in that of unrelated channels: below it they cancel each other."""
MIX_WINDOW = 2**13
"""Samples that are mixed and judged by themselves: 0.2 to 1 s, as channels may cancel in part of a recording only."""
MIN_HEARD = 0.01
"""Power of a window, in the mean one, that may hold speech; a hum in pauses may well cancel."""
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
_STREAMED_WAV_BYTES = 0x7FFFF000 - 2**16
"""Programs that write WAV to a pipe leave a data size of 0x7FFFF000, rounded down to whole frames, or more."""
_FETCHING = threading.Lock()
_OGG_PAGE_BYTES = 65_307
"""The longest page."""
_MP3_FRAME = 1152
_MP3_DELAY = 529
"""Samples by which any decoder lags; an encoder that adds less behind loses the rest."""
_MP3_LEAD = 10 * _MP3_FRAME
"""An MP3 frame needs those before it."""
_MP3_FRAME_BYTES = 1729
"""The longest frame; FFmpeg adds to a frame what lies between it and the next one."""
_HEAD_BYTES = 2**12
# How a recording begins; FLAC's with its first block, Ogg's with the flag of a first page.
_BEGINNINGS = {"FLAC": re.compile(rb"fLaC\0\0\0\x22"), "OGG": re.compile(rb"OggS\0[\x02\x03\x06\x07]")}
_UNDECODED = [
    (4, b"ftyp", "M4A or MP4"),
    (0, b"\x1aE\xdf\xa3", "WebM or Matroska"),
    (0, b"0&\xb2u", "WMA"),
    (0, b"#!AMR", "AMR"),
    (28, b"\x7fFLAC", "FLAC in Ogg"),
    (28, b"Speex", "Speex"),
]
# What may follow the samples of a WAV though it breaks off itself: chunks, and tags that are none.
_BEHIND_WAV = re.compile(rb"LIST|RIF[FX]|data|id3 |ID3|TAG|APET|bext|iXML|_PMX|cue |fact|JUNK")
_WAV_CODECS = {0x55: "MP3", 0xFF: "AAC", 0x1600: "AAC", 0x1601: "AAC", 0x161: "WMA", 0x162: "WMA"}


def load_audio(
    source: str | bytes | None,
    offset_secs: float = 0.0,
    duration_secs: float | None = None,
    sampling_rate: int | None = None,
) -> tuple[np.ndarray, int]:
    """Decode a cut of a recording: its channels mixed by `mono`, resampled if asked for; only the cut is read.

    Args:
        source: local path, URL that fsspec opens, or an encoded file's bytes.
        duration_secs: None or 0 reads to the end.
        sampling_rate: of the result; unset: the file's.

    Returns:
        Audio, float32 (num_samples,), and its sampling rate.

    Raises:
        BadInput: missing, not audio, truncated, shorter than the cut, of more than `MAX_SAMPLES` samples, or of
            channels that cancel each other.
        OSError: of the network or a disk, which says nothing of the recording.
    """
    with open_recording(source, offset_secs + duration_secs if duration_secs else None) as recording:
        rate = recording.rate
        samples = _read(recording, *_cut(recording, offset_secs, duration_secs or 0.0))
    require_mixable(samples)
    audio = mono(samples)
    if sampling_rate is None or sampling_rate == rate:
        return audio, rate
    if len(audio) / rate * sampling_rate > MAX_SAMPLES:
        raise BadInput(
            f"{len(audio):,} samples at {rate} Hz are too many at {sampling_rate} Hz; cut the recording into parts"
        )
    return soxr.resample(audio, rate, sampling_rate), sampling_rate


def mono(samples: np.ndarray) -> np.ndarray:
    """What is heard of samples (num_samples, num_channels): their mean, float32 (num_samples,), without an offset.

    Of the offset only what matters is taken away, so that a sound recording and its cuts keep their samples.
    """
    audio: np.ndarray = samples.mean(axis=1, dtype=np.float32)
    if len(audio) and abs(offset := float(audio.mean(dtype=np.float64))) > MAX_OFFSET * float(audio.std()):
        audio -= np.float32(offset)
    return audio


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
    end_secs = utterance.offset_secs + utterance.duration_secs if utterance.duration_secs else None
    with open_recording(referenced(utterance), end_secs) as recording:
        if recording.subtype in ("PCM_U8", "PCM_S8"):
            raise BadInput("8-bit samples, too coarse for speech; at least 16 bits are needed")
        start, num_frames = _cut(recording, utterance.offset_secs, utterance.duration_secs)
        rate, most = recording.rate, int(quality.max_duration_secs * recording.rate) + 1
        if num_frames is not None or recording.announced > start:
            check_duration((num_frames or recording.announced - start) / rate, quality)
        samples = _read(recording, start, num_frames, most)
        check_samples(samples, quality, lossy=recording.is_lossy)
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
    """Raises `BadInput` for samples (num_samples, num_channels) that are not finite, silent when mixed, or clipped.

    Args:
        lossy: from a lossy decoder, which may overshoot ±1 where the recording did not.
    """
    if not np.isfinite(samples).all():
        raise BadInput(f"{np.count_nonzero(~np.isfinite(samples))} samples are NaN or infinite")
    # A constant offset is as silent as zeros.
    level = float(mono(samples).std(dtype=np.float64))
    require_mixable(samples, quality.min_level_dbfs)
    if level < 10 ** (quality.min_level_dbfs / 20):
        dbfs = f"{20 * np.log10(level):.0f} dBFS" if level > 0 else "all samples equal"
        raise BadInput(f"silent: {dbfs}, below min_level_dbfs={quality.min_level_dbfs:g}")
    peak = float(np.abs(samples).max())
    if peak > MAX_PEAK and not lossy:
        raise BadInput(f"clipped: samples reach {peak:.4g}, outside [−1, 1]")
    clipped = max(_clipped_share(channel) for channel in samples.T)
    if clipped > quality.max_clipped_share:
        raise BadInput(f"clipped: {clipped:.1%} of the samples at full scale, above {quality.max_clipped_share:.1%}")


def require_mixable(samples: np.ndarray, min_level_dbfs: float = QualityConfig().min_level_dbfs) -> None:
    """Raises `BadInput` where the mix of samples (num_samples, num_channels) loses what its channels hold."""
    if samples.shape[1] == 1 or not len(samples):
        return
    windows = np.array_split(samples, max(1, len(samples) // MIX_WINDOW))
    powers = np.array([window.var(axis=0, dtype=np.float64).mean() for window in windows])
    mixes = np.array([window.mean(axis=1, dtype=np.float32).var(dtype=np.float64) for window in windows])
    is_heard = powers >= max(10 ** (min_level_dbfs / 10), MIN_HEARD * powers.mean())
    if (is_heard & (mixes < MIN_MIX * powers / samples.shape[1])).any():
        raise BadInput("its channels are in opposite phase: mixed, they cancel each other; keep one of them")


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

    kind: str
    """WAV, WAVEX, FLAC, OGG or MP3."""
    subtype: str
    rate: int
    num_channels: int
    read: Callable[[int, int], np.ndarray]
    """From a frame on so many frames, or those that are left; float32 (num_frames, num_channels)."""
    announced: int
    """Frames that the container says there are; 0: it says nothing."""
    length: int | None
    """Frames that there are to find; None: only decoding tells."""
    breaks_off: bool = False
    """An Ogg stream without its last page."""
    slack: int = 0
    """Frames by which `announced` may exceed what an intact file holds."""

    @property
    def is_lossy(self) -> bool:
        return self.kind in ("MP3", "OGG")

    def count(self) -> int:
        """Frames that there are; may have to decode them all."""
        if self.length is not None:
            return self.length
        count, step = 0, 2**22 // self.num_channels
        while found := len(self.read(count, step)):
            count += found
        return count


@contextmanager
def open_recording(source: str | bytes | None, end_secs: float | None = None) -> Iterator[Recording]:
    """Open an audio file for reading; its decoder's errors, also those while reading, become `BadInput`.

    Args:
        end_secs: up to where it is to be read; None: to its end. Only there it matters whether another one follows.
    """
    with _open_binary(source) as binary:
        size = binary.seek(0, io.SEEK_END)
        if size == 0:
            raise BadInput("empty file")
        begin, head = _head(binary)
        if name := next((name for at, magic, name in _UNDECODED if head.startswith(magic, at)), None):
            raise BadInput(f"{name} cannot be decoded here; convert it to FLAC or MP3")
        is_mpeg = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
        if is_mpeg and not head[1] & 0x06:  # ADTS has MPEG's mark and a layer that MPEG has not
            raise BadInput("AAC cannot be decoded here; convert it to FLAC or MP3")
        watched = _Watched(binary, 0, _tags_begin(binary, size)) if is_mpeg else _Watched(binary, begin, size)
        try:
            with _open_mp3(watched, head) if is_mpeg else _open_sndfile(watched, end_secs) as recording:
                yield recording
        finally:
            if watched.error is not None:  # rather than that the recording is truncated
                raise watched.error


def _head(binary: BinaryIO) -> tuple[int, bytes]:
    """Where a file begins behind its ID3 tags, and its first bytes there, less the zeros that some programs leave."""
    binary.seek(0)
    position, head = 0, binary.read(_HEAD_BYTES)
    while head[:3] == b"ID3":
        position += 10 + _synchsafe(head[6:10])
        binary.seek(position)
        head = binary.read(_HEAD_BYTES)
    binary.seek(0)
    return position, head if any(head[:8]) else head.lstrip(b"\0")


def _synchsafe(data: bytes) -> int:
    return sum(byte << shift for byte, shift in zip(data, (21, 14, 7, 0), strict=False))


def _tags_begin(binary: BinaryIO, size: int) -> int:
    """Where the tags behind an MP3 begin, or its size: a picture in one may look like frames."""
    while size > 0:
        binary.seek(max(0, size - 128))
        tail = binary.read(min(size, 128))
        if tail[:3] == b"TAG":
            size -= 128
        elif tail[-32:-24] == b"APETAGEX":  # of which the header is not counted
            size -= max(32, int.from_bytes(tail[-20:-16], "little")) + 32 * (tail[-9] >> 7)
        elif tail[-10:-7] == b"3DI":
            size -= 20 + _synchsafe(tail[-4:])
        else:
            return size
    return 0


@contextmanager
def _open_sndfile(watched: _Watched, end_secs: float | None) -> Iterator[Recording]:
    missing = _missing_frames(watched)
    watched.seek(0)
    try:
        with soundfile.SoundFile(watched) as file:
            if file.format not in FORMATS:
                raise BadInput(f"format {file.format} is not supported; convert it to WAV or FLAC")
            found, rate = file.frames, file.samplerate
            is_known = found < _UNKNOWN_FRAMES
            read: Callable[[int, int], np.ndarray] = partial(_read_sndfile, file)
            if end_secs is None or not is_known or end_secs * rate > found:
                parts = _parts(watched, file.format)
                if len(parts) > 1:
                    whole = _join(parts, file)
                    found, is_known, read = len(whole), True, lambda start, number: whole[start : start + number]
            yield Recording(
                kind=file.format,
                subtype=file.subtype,
                rate=rate,
                num_channels=file.channels,
                read=read,
                announced=found + (missing or 0) if is_known else 0,
                length=found if is_known else None,
                breaks_off=missing is None,
            )
    except soundfile.LibsndfileError as error:
        raise BadInput(_explain(error)) from None


def _read_sndfile(file: soundfile.SoundFile, start: int, num_frames: int) -> np.ndarray:
    if not file.seekable():  # GSM; it is read but once
        file.read(start, dtype="int16")
    elif start != file.tell():  # a FLAC without a length cannot even be sent to where it is
        file.seek(start)
    return file.read(num_frames, dtype="float32", always_2d=True)


def _parts(watched: _Watched, kind: str) -> list[bytes]:
    """The recordings in a file, where there are several: chained Ogg streams, or files joined by `cat`."""
    if kind not in _BEGINNINGS:
        return []
    position = watched.tell()  # the decoder goes on from here
    watched.seek(0)
    starts, size, before = [], 0, b""
    while block := watched.read(2**20):
        starts += [size - len(before) + found.start() for found in _BEGINNINGS[kind].finditer(before + block)]
        size, before = size + len(block), block[-7:]
    parts: list[bytes] = []
    if len(starts := sorted(set(starts))) > 1:
        if size > CACHE_BYTES:
            raise BadInput(f"another recording follows in the same file at byte {starts[1]:,}; split the file there")
        watched.seek(0)
        data = watched.read(size)
        parts = [data[start:end] for start, end in zip(starts, [*starts[1:], size], strict=True)]
        if kind == "OGG":  # between them there may be tags
            parts = [part[: _ogg_end(io.BytesIO(part), len(part))[0]] for part in parts]
    watched.seek(position)
    return parts


def _join(parts: list[bytes], first: soundfile.SoundFile) -> np.ndarray:
    samples, most = [], MAX_SAMPLES // first.channels
    for part in parts:
        with soundfile.SoundFile(io.BytesIO(part)) as file:
            if (file.samplerate, file.channels) != (first.samplerate, first.channels):
                raise BadInput("recordings of different rates or channels follow each other in the file; split it")
            samples.append(file.read(most, dtype="float32", always_2d=True))
            most -= len(samples[-1])
    if most <= 0:
        raise BadInput(f"{len(parts)} recordings follow each other in the file, too long for memory; split it")
    return np.concatenate(samples)


@contextmanager
def _open_mp3(watched: _Watched, head: bytes) -> Iterator[Recording]:
    import av  # here and below: of the bare machines that know only WAV and FLAC some have none

    try:
        with av.open(watched, format="mp3") as container:
            if not container.streams.audio or not container.streams.audio[0].rate:
                raise BadInput("no MPEG audio is found in it")
            stream = container.streams.audio[0]
            yield Recording(
                kind="MP3",
                subtype=stream.codec_context.name,
                rate=stream.rate,
                num_channels=stream.channels,
                read=partial(_read_mp3, container, stream.rate, stream.channels),
                announced=_announced(head),
                length=None,
                slack=_MP3_DELAY,
            )
    except av.FFmpegError as error:
        raise BadInput(f"truncated or damaged audio ({error.strerror})") from None


def _announced(head: bytes) -> int:
    """Samples that an MP3 says it has, in the index in place of its first frame; 0: nothing is said.

    After Xing or Info come flags and, if these say so, the numbers of frames and bytes, a table and a quality; then
    LAME's tag, with the samples that it has added before and behind. VBRI is Fraunhofer's.
    """
    per_frame = _MP3_FRAME if head[1] >> 3 & 3 == 3 else _MP3_FRAME // 2
    if (at := head.find(b"VBRI", 0, 64)) >= 0:
        return per_frame * int.from_bytes(head[at + 14 : at + 18])
    found = re.compile(rb"Xing|Info").search(head, 0, 64)
    flags = head[found.start() + 7] if found else 0
    if found is None or not flags & 1:
        return 0
    samples = per_frame * int.from_bytes(head[found.start() + 8 : found.start() + 12])
    at = found.start() + 12 + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
    added = int.from_bytes(head[at + 21 : at + 24]) if any(head[at : at + 4]) else 0
    return max(0, samples - (added >> 12) - (added & 0xFFF))


def _read_mp3(
    container: av.container.InputContainer, rate: int, num_channels: int, start: int, num_frames: int
) -> np.ndarray:
    """As `Recording.read`; `rate` and `num_channels` are those of the beginning, as the stream's own may change."""
    import av

    stream = container.streams.audio[0]
    origin = stream.start_time or 0

    def frames_of(time: int | None) -> int:
        return round((time or 0) * stream.time_base * rate)

    lead = max(0, start - _MP3_LEAD)
    container.seek(origin + int(lead / rate / stream.time_base) if lead else 0, stream=stream)
    pieces, first, position, pending, lost, others, junk = [], None, 0, 0, 0, 0, 0
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            frames = []
            if not _holds(packet, b"Xing", b"Info"):  # the index of one that was joined
                pending += frames_of(packet.duration)
        if junk and frames:
            raise BadInput(f"damaged: {junk:,} bytes in it are no MP3 frames")
        if packet.size > _MP3_FRAME_BYTES and not _holds(packet, b"ID3", b"TAG"):
            junk = packet.size - _MP3_FRAME_BYTES  # behind the last frame they would not matter
        for frame in frames:
            if (frame.sample_rate, frame.layout.nb_channels) != (rate, num_channels):
                others += frame.samples
                continue
            if first is None:  # what lacked the frames before it is no loss
                first = position = frames_of(frame.pts - origin)
                pending = 0
            if pending:  # silence, so that all that follows keeps its time
                pieces.append(np.zeros((num_channels, pending), np.float32))
                lost, position, pending = lost + pending, position + pending, 0
            samples = frame.to_ndarray()  # of MP2 as integers
            pieces.append(samples if samples.dtype == np.float32 else samples.astype(np.float32) / 2**15)
            position += frame.samples
        if first is not None and position >= start + num_frames:
            break
    if others > END_TOLERANCE_SECS * rate:
        raise BadInput("its sampling rate or number of channels changes on the way; split the file there")
    lost += pending + max(0, (first or 0) - start)
    if lost > END_TOLERANCE_SECS * rate:
        raise BadInput(f"damaged: {lost / rate:.3f} s of its MP3 frames cannot be decoded")
    if first is None:
        return np.zeros((0, num_channels), np.float32)
    samples = np.concatenate([np.zeros((num_channels, max(0, first - start)), np.float32), *pieces], axis=1)
    return samples[:, max(0, start - first) :][:, :num_frames].T


def _holds(packet: av.Packet, *marks: bytes) -> bool:
    data = bytes(packet)
    return any(mark in data for mark in marks)


class _Watched:
    """Bytes [begin, end) of a file that remember why they could not be read: decoders take any error for the end."""

    def __init__(self, binary: Any, begin: int, end: int) -> None:
        self.binary, self.begin, self.end = binary, begin, end
        self.error: OSError | None = None
        self.seek(0)

    @property
    def size(self) -> int:
        return self.end - self.begin

    def tell(self) -> int:
        return int(self.binary.tell()) - self.begin

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = (0, self.tell() if whence == io.SEEK_CUR else 0, self.size)[whence]
        return int(self.binary.seek(self.begin + origin + offset)) - self.begin

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            size = max(0, self.size - self.tell())
        buffer = bytearray(size)
        return bytes(memoryview(buffer)[: self.readinto(buffer)])

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self.binary.readinto(memoryview(buffer)[: max(0, self.size - self.tell())]))
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
        return "not audio of a kind that is decoded here (WAV, FLAC, MP3, Ogg), or its first bytes are damaged"
    return f"truncated or damaged audio ({reason})"


def _cut(recording: Recording, offset_secs: float, duration_secs: float) -> tuple[int, int | None]:
    """First frame and number of frames of a cut; duration 0 means to the end: None where nothing tells where it is."""
    rate, length = recording.rate, recording.length
    start = round(offset_secs * rate)
    end = start + round(duration_secs * rate) if duration_secs else None
    if recording.breaks_off and (end is None or length == 0):  # with an end and no known length, reading tells
        after = f" after {length / rate:.3f} s" if length is not None else ""
        raise BadInput(f"truncated: the Ogg stream breaks off{after}")
    if length is None and end is None and recording.kind != "MP3":
        raise BadInput(f"{recording.kind} header without a length; encode it again, or give its duration")
    if length is None:
        return start, None if end is None else end - start
    if recording.announced == 0:
        raise BadInput("no samples")
    if start >= recording.announced or (end or 0) > recording.announced + END_TOLERANCE_SECS * rate:
        raise _beyond(offset_secs, end or start, recording.announced, rate)
    return start, min(end or recording.announced, recording.announced) - start


def _beyond(offset_secs: float, end: int, length: int, rate: int) -> BadInput:
    return BadInput(
        f"cut {offset_secs:g}–{end / rate:.3f} s ends beyond its recording, which has {length / rate:.3f} s"
    )


def _read(recording: Recording, start: int, num_frames: int | None, most: int | None = None) -> np.ndarray:
    """Samples float32 (num_frames, num_channels), to the end where `num_frames` is None.

    Args:
        most: read no more than so many where nothing tells beforehand how many there are.

    Raises:
        BadInput: fewer than there should be, none, or more than `MAX_SAMPLES`.
    """
    rate, limit = recording.rate, MAX_SAMPLES // recording.num_channels
    wanted = min(most or limit, limit) if num_frames is None else num_frames
    if wanted > limit:
        raise BadInput(
            f"{wanted:,} samples of {recording.num_channels} channels would take "
            f"{wanted * recording.num_channels * 4 / 2**30:.1f} GiB of memory; cut the recording into parts"
        )
    missing = 0 if recording.length is None else start + wanted - recording.length
    samples = recording.read(start, wanted) if missing <= 0 else np.zeros((0, recording.num_channels), np.float32)
    if num_frames is None and len(samples) == wanted:
        raise BadInput(f"too long: more than {wanted / rate:.1f} s; cut the recording into parts")
    if recording.length is not None:
        missing = missing if missing > 0 else wanted - len(samples)
    elif len(samples) < wanted:  # this is its end
        end = start + len(samples) if len(samples) else recording.count()
        missing = recording.announced - end - recording.slack
        if missing <= 0 and (end <= start or (num_frames or 0) > len(samples) + END_TOLERANCE_SECS * rate):
            raise _beyond(start / rate, start + (num_frames or 0), end, rate) if end else BadInput("no samples")
    if missing > 0:
        announced = wanted if recording.length is not None else recording.announced
        raise BadInput(f"truncated or damaged: {missing / rate:.3f} s of the {announced} announced samples are missing")
    if len(samples) == 0:
        raise BadInput("no samples")
    return samples


def _missing_frames(watched: _Watched) -> int | None:
    """Frames announced by a WAV header beyond the end of the file; None for an Ogg stream without its last page.

    What follows the last page of an Ogg stream is no part of it from here on. FLAC needs no look: libsndfile announces
    what its header does and fails or falls short while reading.
    """
    watched.seek(0)
    magic = watched.read(12)
    if magic[:4] in (b"RIFF", b"RIFX") and magic[8:] == b"WAVE":
        return _missing_in_wav(watched, watched.size, "<" if magic[:4] == b"RIFF" else ">")
    if magic[:4] == b"OggS":
        end, is_last = _ogg_end(watched, watched.size)
        watched.end = watched.begin + end
        return 0 if is_last else None
    return 0


def _missing_in_wav(binary: _Watched, size: int, order: str) -> int:
    """Raises `BadInput` for what libsndfile would call damaged, empty or shorter than it is.

    Args:
        order: of the bytes, as in `struct`.
    """
    block_align = byte_rate = 0
    position, has_samples = 12, False
    while position + 8 <= size:
        binary.seek(position)
        name, length = struct.unpack(f"{order}4sI", binary.read(8))
        position += 8
        if name in (b"RIFF", b"RIFX"):
            raise BadInput(f"another recording follows in the same file at byte {position - 8:,}; split the file there")
        if name == b"fmt ":
            codec, byte_rate, block_align = struct.unpack(f"{order}H6xIH", binary.read(14).ljust(14, b"\0"))
            if codec in _WAV_CODECS:
                raise BadInput(f"{_WAV_CODECS[codec]} in a WAV file cannot be decoded here; convert it to FLAC or MP3")
        if name == b"data":
            if has_samples:
                raise BadInput("its samples lie in several chunks; write it again")
            if length > size - position:
                streamed = length >= _STREAMED_WAV_BYTES
                return 0 if streamed else -(-(length - size + position) // max(1, block_align))
            has_samples = True
            end = _wav_chunk_behind(binary, position + length, length % 2, order)
            if end is None and _holds_samples(binary, position + length, END_TOLERANCE_SECS * byte_rate):
                says = f"{length:,} bytes of samples" if length else "no samples"
                rest = size - position - length
                raise BadInput(f"its header says that there are {says}, but {rest:,} bytes follow; write it again")
            if end is None:
                return 0
            position = end
        else:
            position += length + length % 2
    return 0


def _wav_chunk_behind(binary: _Watched, position: int, pad: int, order: str) -> int | None:
    """Where a chunk follows the samples that end at `position`, or the end of the file; None: something else does."""
    for place in (position + pad, position):  # some programs leave the byte of padding out
        binary.seek(place)
        head = binary.read(8)
        if len(head) < 8 or _BEHIND_WAV.match(head):
            return place
        if re.match(rb"[ -~]{4}", head) and place + 8 + struct.unpack(f"{order}I", head[4:])[0] <= binary.size:
            return place
    return None


def _holds_samples(binary: _Watched, position: int, tolerance: float) -> bool:
    """Whether what is no chunk may be samples that the header does not count, and not a few bytes, or zeros."""
    binary.seek(position)
    blocks = iter(lambda: binary.read(2**16), b"")
    return binary.size - position > tolerance and any(block.strip(b"\0") for block in blocks)


def _ogg_end(binary: Any, size: int) -> tuple[int, bool]:
    """Where the last page of an Ogg file ends, and whether it is whole and the end of its stream (RFC 3533, section 6).

    Behind it there may be tags of any size.
    """
    at, position = -1, size
    while at < 0 and position > 0:
        position = max(0, position - _OGG_PAGE_BYTES)
        binary.seek(position)
        block = binary.read(_OGG_PAGE_BYTES + 5)
        at = max((found.start() for found in re.finditer(rb"OggS\0[\0-\7]", block)), default=-1)
    binary.seek(max(0, position + at))
    page = binary.read(27 + 255)
    if at < 0 or len(page) < 27 or len(page) < 27 + page[26]:
        return size, False
    end = position + at + 27 + page[26] + sum(page[27 : 27 + page[26]])
    return min(end, size), end <= size and bool(page[5] & 4)
