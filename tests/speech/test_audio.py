from __future__ import annotations

import errno
import io
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import soundfile

from salad_ray.config import RecordedQualityConfig
from salad_ray.speech.audio import check_recording, check_transcript, encode_audio, load_audio
from salad_ray.speech.readers import read_folder
from salad_ray.store import StoreError
from salad_ray.tables import BadInput, Utterance

QUALITY = RecordedQualityConfig()
RATE = 16000
CODECS = [
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("WAV", "PCM_24"),
    ("FLAC", "PCM_16"),
    ("MP3", "MPEG_LAYER_III"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
]


def chirp(secs: float = 3.0, rate: int = RATE) -> np.ndarray:
    """A tone that rises, so that a cut from the wrong place differs; (num_samples,)."""
    time = np.arange(int(secs * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * (200 + 100 * time) * time)).astype(np.float32)


def encoded(audio: np.ndarray, rate: int = RATE, codec: tuple[str, str] = ("WAV", "PCM_16")) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format=codec[0], subtype=codec[1])
    return file.getvalue()


def utterance(audio: bytes | None = None, text: str = "some words that were said here", **fields: object) -> Utterance:
    row = Utterance(utt_id="c/u", text=text, duration_secs=0.0, recording_id="c/u", corpus="c", audio=audio)
    return replace(row, **fields)


def reason(audio: bytes | None, text: str = "some words that were said here", **fields: object) -> str:
    with pytest.raises(BadInput) as error:
        check_recording(utterance(audio, text, **fields), QUALITY)
    return str(error.value)


@pytest.mark.parametrize("codec", CODECS)
def test_decodes_every_codec_whole_and_in_cuts(codec: tuple[str, str]) -> None:
    data = encoded(chirp(), codec=codec)
    audio, rate = load_audio(data)
    assert (audio.dtype, audio.shape, rate) == (np.float32, (3 * RATE,), RATE)
    assert np.corrcoef(audio, chirp())[0, 1] > 0.99
    cut, _ = load_audio(data, offset_secs=1.0, duration_secs=0.5)
    np.testing.assert_allclose(cut, audio[RATE : RATE * 3 // 2], atol=1e-4)
    assert check_recording(utterance(data), QUALITY).duration_secs == 3.0


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_resamples_odd_rates(rate: int) -> None:
    audio, got = load_audio(encoded(chirp(rate=rate), rate), sampling_rate=RATE)
    assert got == RATE
    assert abs(len(audio) - 3 * RATE) <= 1
    assert np.corrcoef(audio[: 3 * RATE - 1], chirp()[: len(audio)][: 3 * RATE - 1])[0, 1] > 0.999


def test_stereo_is_the_mean_of_its_channels() -> None:
    stereo = np.stack([chirp(), np.zeros_like(chirp())], axis=1)
    audio, _ = load_audio(encoded(stereo, codec=("WAV", "FLOAT")))
    np.testing.assert_allclose(audio, chirp() / 2, atol=1e-7)


def test_reads_paths_and_urls(tmp_path: Path) -> None:
    data = encoded(chirp(), codec=("FLAC", "PCM_16"))
    (tmp_path / "a.flac").write_bytes(data)
    fsspec.filesystem("memory").pipe_file("/store/a.flac", data)
    local, _ = load_audio(str(tmp_path / "a.flac"), 1.0, 1.0)
    remote, _ = load_audio("memory://store/a.flac", 1.0, 1.0)
    np.testing.assert_array_equal(local, remote)


@pytest.mark.parametrize(("audio_format", "rate", "decoded"), [("FLAC", 22050, 22050), ("OPUS", 22050, 24000)])
def test_encoding_round_trip(audio_format: str, rate: int, decoded: int) -> None:
    data = encode_audio(chirp(rate=rate), rate, audio_format)
    audio, got = load_audio(data)
    assert got == decoded
    assert abs(len(audio) / got - 3.0) < 1e-3
    expected = chirp(rate=decoded)
    assert np.corrcoef(audio[: len(expected)], expected[: len(audio)])[0, 1] > 0.99
    with pytest.raises(ValueError, match="use FLAC or OPUS"):
        encode_audio(chirp(), RATE, "MP3")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_files_are_found(codec: tuple[str, str], share: float) -> None:
    data = encoded(chirp(), codec=codec)
    assert "truncated" in reason(data[: int(len(data) * share)])


@pytest.mark.parametrize("codec", [("WAV", "PCM_16"), ("OGG", "VORBIS")])
def test_a_cut_before_the_break_of_a_truncated_recording_is_fine(codec: tuple[str, str]) -> None:
    noise = 0.1 * np.random.default_rng(0).standard_normal(10 * RATE)
    data = encoded(noise, codec=codec)
    half = data[: len(data) // 2]
    assert check_recording(utterance(half, duration_secs=2.0), QUALITY).duration_secs == 2.0
    with pytest.raises(BadInput):
        check_recording(utterance(half, duration_secs=8.0), QUALITY)


def test_a_wav_that_was_written_to_a_pipe_is_not_truncated() -> None:
    data = bytearray(encoded(chirp()))
    struct.pack_into("<I", data, data.index(b"data") + 4, 0xFFFFFFFF)
    assert check_recording(utterance(bytes(data)), QUALITY).duration_secs == 3.0


def test_an_mp3_with_a_large_tag_is_not_truncated() -> None:
    file = io.BytesIO()
    options = {"format": "MP3", "bitrate_mode": "CONSTANT", "compression_level": 0.5}
    soundfile.write(file, chirp(), RATE, **options)
    data = file.getvalue()
    plain = data[data.index(data[:2], 4) :]  # without the index frame, whose length is exact
    tag = b"ID3\x04\x00\x00" + bytes([0, 1, 0, 0]) + bytes(16384)
    assert check_recording(utterance(tag + plain), QUALITY).duration_secs == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty file"),
        (b"this is not audio\n" * 100, "not audio"),
        (b"<html><body>404</body></html>", "not audio"),
        (encoded(chirp()[:0]), "no samples"),
        (encoded(chirp()[:0], codec=("OGG", "VORBIS")), "no samples"),
        (encoded(chirp())[:30], "truncated"),
        (encoded(chirp(), codec=("AIFF", "PCM_16")), "AIFF is not supported"),
        (encoded(chirp(), codec=("WAV", "PCM_U8")), "8-bit"),
        (encoded(chirp(), codec=("FLAC", "PCM_S8")), "8-bit"),
        (encoded(np.zeros(RATE)), "silent"),
        (encoded(np.full(RATE, 0.25)), "silent"),
        (encoded(chirp() * 1e-4, codec=("WAV", "FLOAT")), "silent"),
        (encoded(np.clip(chirp() * 6, -1, 1)), "clipped"),
        (encoded(chirp() * 6, codec=("WAV", "FLOAT")), "clipped: samples reach 1.8"),
        (encoded(chirp() * 32768, codec=("WAV", "FLOAT")), "outside"),
        (encoded(np.where(np.arange(RATE) == 99, np.nan, chirp(1.0)), codec=("WAV", "FLOAT")), "1 samples are NaN"),
        (encoded(np.where(np.arange(RATE) == 99, np.inf, chirp(1.0)), codec=("WAV", "FLOAT")), "infinite"),
        (encoded(chirp(61.0)), "too long: 61.0 s"),
        (encoded(chirp(0.1)), "too short"),
    ],
)
def test_bad_audio_is_refused_with_its_reason(data: bytes, expected: str) -> None:
    assert expected in reason(data)


def test_one_bad_channel_is_enough() -> None:
    clipped = np.clip(chirp() * 6, -1, 1)
    assert "clipped" in reason(encoded(np.stack([chirp(), clipped], axis=1)))


def test_single_peaks_are_not_clipping() -> None:
    audio = chirp()
    audio[::20] = 1.0
    audio[::21] = -1.0
    assert check_recording(utterance(encoded(audio)), QUALITY).duration_secs == 3.0


def test_three_hours_are_refused_from_the_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.wav"
    num_bytes = 3 * 3600 * RATE * 2
    header = (
        b"RIFF"
        + struct.pack("<I", 36 + num_bytes)
        + b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, 1, RATE, 32000, 2, 16)
    )
    with path.open("wb") as file:
        file.write(header + b"data" + struct.pack("<I", num_bytes))
        file.truncate(44 + num_bytes)  # sparse
    with monkeypatch.context() as patch:
        patch.setattr(soundfile.SoundFile, "read", None)
        assert "too long: 10800.0 s" in reason(None, uri=str(path))
    audio, _ = load_audio(str(path), offset_secs=9000.0, duration_secs=1.0)
    assert len(audio) == RATE


def test_a_cut_must_lie_in_its_recording() -> None:
    data = encoded(chirp())
    assert check_recording(utterance(data, offset_secs=1.0, duration_secs=2.05), QUALITY).duration_secs == 2.0
    assert "beyond" in reason(data, offset_secs=1.0, duration_secs=2.5)
    assert "beyond" in reason(data, offset_secs=5.0)


def test_missing_audio() -> None:
    assert "no such audio file: /nowhere/a.wav" in reason(None, uri="/nowhere/a.wav")
    assert "no audio" in reason(None)


def test_names_that_can_be_no_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(encoded(chirp()))
    for uri in (str(tmp_path), f"{tmp_path}/a.wav/b.wav", f"{tmp_path}/{'a' * 300}.wav"):
        assert f"audio file {uri} cannot be read" in reason(None, uri=uri)
        assert f"audio file {uri} cannot be read" in reason(None, uri=uri, byte_start=0, num_bytes=9)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT])
@pytest.mark.parametrize("member", [{}, {"byte_start": 0, "num_bytes": 9}])
def test_errors_that_pass_say_nothing_of_a_recording(
    monkeypatch: pytest.MonkeyPatch, number: int, member: dict[str, int]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, "not today")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.open", fail)
    with pytest.raises(OSError, match=r"audio file /far/a.wav cannot be read \(.*not today"):
        check_recording(utterance(uri="/far/a.wav", **member), QUALITY)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken off"), StoreError("broken off")])
def test_a_recording_that_breaks_off_while_it_is_read_is_not_taken_for_truncated(
    monkeypatch: pytest.MonkeyPatch, codec: tuple[str, str], error: OSError
) -> None:
    noise = 0.1 * np.random.default_rng(0).standard_normal(10 * RATE)
    data = encoded(noise, codec=codec)

    class Breaking(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            if self.tell() + len(buffer) > len(data) // 2:
                raise error
            return super().readinto(buffer)

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.open", lambda *_, **__: Breaking(data))
    with pytest.raises(type(error), match="broken off"):
        check_recording(utterance(uri="/far/a"), QUALITY)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty transcript"),
        (" \t ", "empty transcript"),
        ("— … ♪", "no letters or digits"),
        ("это совсем другой язык", "another script"),
        ("今日は天気がいい", "another script"),
        ("far too many words for this " * 20, "transcript too long for the audio"),
        ("no", "transcript too short for the audio"),
    ],
)
def test_bad_transcripts_are_refused_with_their_reason(text: str, expected: str) -> None:
    assert expected in reason(encoded(chirp()), text)


def test_the_script_is_checked_in_english_only() -> None:
    check_transcript("это совсем другой язык", "ru")
    check_transcript("The naïve café, Gdańsk and the letter π", "en")
    for language in ("en", "en-US", "English", "eng"):
        with pytest.raises(BadInput):
            check_transcript("это совсем другой язык", language)


def test_real_recordings_pass_or_are_too_short_or_too_quiet(shared_data: Path) -> None:
    reasons: dict[str, str] = {}
    for name in ("lj_text_male", "ljspeech", "spoken_digits", "mixed_read"):
        for row in read_folder(str(shared_data / "speech" / name), "")[0]:
            try:
                checked = check_recording(row, RecordedQualityConfig(min_duration_secs=0.15, min_level_dbfs=-75.0))
                assert checked.duration_secs == pytest.approx(row.duration_secs, abs=0.01)
            except BadInput as error:
                reasons[row.utt_id] = str(error)
    assert not reasons


def test_a_recording_that_grows_beyond_measure_when_it_is_resampled_is_refused() -> None:
    data = encoded(np.tile(chirp(1.0), 4)[:20_000], rate=1, codec=("WAV", "PCM_16"))
    assert len(load_audio(data)[0]) == 20_000
    with pytest.raises(BadInput, match=r"20,000 samples at 1 Hz are too many at 16000 Hz"):
        load_audio(data, sampling_rate=16_000)
    assert len(load_audio(data, 0, 100, 16_000)[0]) == 1_600_000
