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
from salad_ray.speech.audio import check_recording, check_transcript, encode_audio, load_audio, mono
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


@pytest.mark.parametrize(
    ("codec", "is_length_found"), [(("WAV", "PCM_16"), True), (("OGG", "VORBIS"), True), (("OGG", "VORBIS"), False)]
)
def test_a_cut_before_the_break_of_a_truncated_recording_is_fine(
    codec: tuple[str, str], is_length_found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = 0.1 * np.random.default_rng(0).standard_normal(10 * RATE)
    data = encoded(noise, codec=codec)
    half = data[: len(data) // 2]
    if not is_length_found:  # as libsndfile says where it finds no last page; seen once, with this very input
        monkeypatch.setattr(soundfile.SoundFile, "frames", 2**63 - 1)
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


# ---- lengths that headers state wrongly or not at all, and files that hold more than one recording


def mp3(audio: np.ndarray, rate: int = RATE, bitrate_mode: str = "VARIABLE") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format="MP3", bitrate_mode=bitrate_mode, compression_level=0.5)
    return file.getvalue()


def without_index(data: bytes) -> bytes:
    """An MP3 without its first frame, in which the number of frames is."""
    assert b"Xing" in data[:64] or b"Info" in data[:64]
    return data[data.index(data[:2], 4) :]


def speech_like(secs: float = 10.0, rate: int = RATE) -> np.ndarray:
    """Loud noise first, then near silence: an estimate by the first frames' size is wrong by much."""
    noise = 0.2 * np.random.default_rng(0).standard_normal(int(secs * rate)).astype(np.float32)
    noise[len(noise) // 2 :] *= 1e-3
    return noise


def heard(data: bytes, text: str = "many words " * 12, **cut: float) -> np.ndarray:
    """What training hears; it must be what was checked, sample by sample."""
    checked = check_recording(utterance(data, text, **cut), QUALITY)
    audio, rate = load_audio(data, checked.offset_secs, checked.duration_secs)
    assert len(audio) == round(checked.duration_secs * rate)
    return audio


@pytest.mark.parametrize("rate", [16000, 44100])
@pytest.mark.parametrize("bitrate_mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize(("turn", "tail"), [(1, b""), (-1, b"APETAGEX" + bytes(24)), (-1, b"TAG" + bytes(125))])
def test_an_mp3_without_a_header_is_kept_whole(rate: int, bitrate_mode: str, turn: int, tail: bytes) -> None:
    audio = speech_like(rate=rate)[::turn]
    data = without_index(mp3(audio, rate, bitrate_mode)) + tail
    whole = heard(data)
    assert len(whole) / rate == pytest.approx(10.0, abs=0.15)
    np.testing.assert_array_equal(heard(data, duration_secs=9.5), whole[: round(9.5 * rate)])
    cut, _ = load_audio(data, 4.0, 3.0)
    np.testing.assert_array_equal(cut, whole[4 * rate : 7 * rate])
    assert "beyond its recording, which has 10.0" in reason(data, "many words " * 12, duration_secs=11.0)
    assert "beyond its recording, which has 10.0" in reason(data, "many words " * 12, offset_secs=60.0)


@pytest.mark.parametrize("index", [True, False])
def test_a_long_mp3_is_found_so_before_it_is_decoded_whole(index: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data = mp3(np.tile(chirp(), 30))
    assert "too long: " in reason(data if index else without_index(data))
    monkeypatch.setattr("salad_ray.speech.audio.MAX_SAMPLES", 20 * RATE)
    with pytest.raises(BadInput, match="cut the recording into parts"):
        load_audio(data if index else without_index(data))


@pytest.mark.parametrize("first", [1, 100])
def test_a_damaged_mp3_says_so(first: int) -> None:
    data = bytearray(without_index(mp3(speech_like()[::-1])))
    frames = [at for at in range(len(data) - 4) if data[at : at + 2] == data[:2]]
    for at in frames[first : first + 60]:  # headers that promise data, without the data
        data[at + 4 : at + 20] = b"\xff" * 16
    assert "damaged" in reason(bytes(data), "many words " * 12)


@pytest.mark.parametrize("junk", [bytes(4000), np.random.default_rng(1).bytes(4000)])
@pytest.mark.parametrize("index", [True, False])
def test_an_mp3_with_a_hole_is_damaged_and_one_with_junk_behind_is_not(junk: bytes, index: bool) -> None:
    data = mp3(speech_like()) if index else without_index(mp3(speech_like()))
    third = len(data) // 3
    assert "damaged: " in reason(data[:third] + junk + data[third + len(junk) :], "many words " * 12)
    assert len(heard(data + junk)) / RATE == pytest.approx(10.0, abs=0.15)


def test_joined_mp3s_of_different_kinds_say_so() -> None:
    first = mp3(chirp())
    for second in (mp3(chirp(rate=44100), 44100), mp3(np.stack([chirp()] * 2, axis=1))):
        assert "changes on the way; split the file there" in reason(first + second)


def test_an_mp3_behind_tags_and_zeros_is_found() -> None:
    tag = b"ID3\x04\x00\x00" + bytes([0, 0, 1, 0]) + bytes(128)
    for before in (tag, tag + tag, bytes(1000), tag + bytes(1000)):
        assert len(heard(before + mp3(speech_like()))) / RATE == pytest.approx(10.0, abs=0.15)
    tagged = mp3(speech_like()) + b"TAG" + bytes(125)
    assert len(heard(2 * (tag + tagged))) / RATE == pytest.approx(20.0, abs=0.3)


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec[0] != "WAV"])
def test_of_recordings_that_follow_each_other_all_is_kept(codec: tuple[str, str]) -> None:
    audio = speech_like()
    first, second = encoded(audio, codec=codec), encoded(chirp(5.0), codec=codec)
    whole = heard(first + second)
    assert len(whole) / RATE == pytest.approx(15.0, abs=0.0 if codec[0] != "MP3" else 0.15)
    expected = chirp(5.0)[: 4 * RATE]
    match = np.correlate(whole[-5 * RATE - 4000 :], expected, "valid").max() / np.square(expected).sum()
    assert match == pytest.approx(1.0, abs=0.03)
    np.testing.assert_array_equal(load_audio(first + second, 8.0, 3.0)[0], whole[8 * RATE : 11 * RATE])
    if codec[0] in ("FLAC", "OGG"):
        assert "truncated" in reason(first + second[: len(second) // 2])
        stereo = encoded(np.stack([chirp()] * 2, axis=1), codec=codec)
        assert "different rates or channels" in reason(first + stereo)


def test_wavs_that_follow_each_other_are_told_from_damaged_ones() -> None:
    data = encoded(chirp())
    assert f"another recording follows in the same file at byte {len(data):,}" in reason(data + data)


@pytest.mark.parametrize(("channels", "subtype"), [(1, "PCM_16"), (1, "PCM_24"), (6, "PCM_16"), (6, "PCM_24")])
@pytest.mark.parametrize("size", [0x7FFFF000, 0x80000000, 0xFFFFFFFF])
def test_a_wav_from_a_pipe_has_its_samples_not_its_headers(channels: int, subtype: str, size: int) -> None:
    data = bytearray(encoded(np.stack([chirp()] * channels, axis=1), codec=("WAV", subtype)))
    frame = channels * int(subtype[-2:]) // 8
    struct.pack_into("<I", data, data.index(b"data") + 4, size - size % frame)
    assert len(heard(bytes(data), text="some words that were said here")) == 3 * RATE


def test_a_wav_whose_header_was_never_completed_is_not_called_empty() -> None:
    data = bytearray(encoded(chirp()))
    struct.pack_into("<I", data, data.index(b"data") + 4, 0)
    assert "no samples, but 96,000 bytes follow" in reason(bytes(data))


LIST = b"LIST" + struct.pack("<I", 12) + b"INFOISFT" + bytes(4)


def with_data_size(data: bytes, size: int) -> bytes:
    at = data.index(b"data") + 4
    return data[:at] + struct.pack("<I", size) + data[at + 4 :]


@pytest.mark.parametrize("size", [2, 1000, 1001, 90_000])  # the last as where it is counted modulo 2^32
def test_a_wav_of_more_samples_than_its_header_counts_is_refused(size: int) -> None:
    data = with_data_size(encoded(speech_like(3.0)), size)
    assert f"{size:,} bytes of samples, but {96_000 - size:,} bytes follow" in reason(data)


@pytest.mark.parametrize(
    "behind",
    [
        *(LIST, LIST + b"abcd" + struct.pack("<I", 4) + bytes(4), LIST[:9], b"_PMX" + struct.pack("<I", 2**20)),
        *(bytes(50_000), b"\xff" * 100, b"TAG" + bytes(125), b"ID3\3\0\0\0\0\x4e\x20" + b"\xff" * 10_000),
    ],
)
def test_what_follows_the_samples_of_a_wav_is_not_taken_for_some(behind: bytes) -> None:
    assert len(heard(encoded(chirp()) + behind, text="some words that were said here")) == 3 * RATE


def test_odd_samples_may_lack_their_padding() -> None:
    data = encoded(chirp()[: 2 * RATE + 1], codec=("WAV", "PCM_24"))
    size = 3 * (2 * RATE + 1)
    data = data[: data.index(b"data") + 8 + size] + LIST
    assert len(heard(data, text="some words that were said here")) == 2 * RATE + 1


def test_a_wav_behind_a_tag_or_of_the_other_byte_order_is_seen_to_break_off() -> None:
    data = encoded(chirp())
    tag = b"ID3\3\0\0\0\0\x0f\x76" + bytes(2038)
    assert len(heard(tag + data, text="some words that were said here")) == 3 * RATE
    assert "truncated" in reason(tag + data[:60_000])
    file = io.BytesIO()
    soundfile.write(file, chirp(), RATE, format="WAV", subtype="PCM_16", endian="BIG")
    assert file.getvalue()[:4] == b"RIFX"
    assert len(heard(file.getvalue(), text="some words that were said here")) == 3 * RATE
    assert "truncated" in reason(file.getvalue()[:60_000])


def test_samples_in_two_chunks_say_so() -> None:
    assert "several chunks" in reason(encoded(chirp()) + b"data" + struct.pack("<I", 1000) + bytes(1000))


APE = b"APETAGEX" + struct.pack("<IIII", 2000, 70_032, 1, 0x80000000) + bytes(8)
PICTURE = np.random.default_rng(5).bytes(70_000)


@pytest.mark.parametrize("tail", [b"TAG" + bytes(125), APE + PICTURE + APE, bytes(70_000), b"ID3" + PICTURE])
@pytest.mark.parametrize("codec", [("OGG", "VORBIS"), ("OGG", "OPUS")])
def test_tags_around_an_ogg_file_are_no_part_of_it(codec: tuple[str, str], tail: bytes) -> None:
    text = "some words that were said here"
    data = encoded(speech_like(3.0), codec=codec)
    tag = b"ID3\3\0\0\0\0\x0f\x76" + bytes(2038)
    plain = heard(data, text)
    np.testing.assert_array_equal(heard(data + tail, text), plain)
    np.testing.assert_array_equal(heard(tag + data, text), plain)
    assert len(heard(data + tail + data + tail, text)) == 2 * len(plain)
    assert "breaks off" in reason(data[: len(data) * 2 // 3] + tail)


def test_a_picture_behind_an_mp3_is_not_taken_for_frames() -> None:
    data = encoded(speech_like(3.0), codec=("MP3", "MPEG_LAYER_III"))
    text = "some words that were said here"
    np.testing.assert_array_equal(heard(data + APE + PICTURE + APE, text), heard(data, text))


def test_a_flac_without_a_length_is_read_where_the_table_gives_it() -> None:
    data = bytearray(encoded(chirp(), codec=("FLAC", "PCM_16")))
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    assert len(heard(bytes(data), duration_secs=2.5, text="some words that were said here")) == 5 * RATE // 2
    assert "header without a length" in reason(bytes(data))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\xff\xf1\x60\x40" + bytes(500), "AAC"),
        (b"\x1aE\xdf\xa3" + bytes(500), "WebM"),
        (b"\0\0\0\x20ftypisom" + bytes(500), "MP4"),
        (b"#!AMR\n" + bytes(500), "AMR"),
        (b"OggS\0\2" + bytes(20) + b"\1\x33\x7fFLAC\1" + bytes(500), "FLAC in Ogg"),
        (encoded(chirp()).replace(b"\x01\x00\x01\x00", b"\xff\x00\x01\x00", 1), "AAC in a WAV"),
    ],
)
def test_what_is_not_decoded_is_named(data: bytes, name: str) -> None:
    assert f"{name} " in reason(data)
    assert "cannot be decoded here" in reason(data)


def test_gsm_in_a_wav_is_decoded() -> None:
    data = encoded(chirp(rate=8000), 8000, codec=("WAV", "GSM610"))
    assert len(heard(data, text="some words that were said here")) / 8000 == pytest.approx(3.0, abs=0.05)
    assert len(load_audio(data, 1.0, 1.0)[0]) == 8000


# ---- what is checked is what is heard


@pytest.mark.parametrize("codec", [("WAV", "PCM_16"), ("MP3", "MPEG_LAYER_III")])
@pytest.mark.parametrize("residue", [0.0, 0.03])
def test_channels_that_cancel_each_other_are_refused(codec: tuple[str, str], residue: float) -> None:
    noise = residue * np.random.default_rng(1).standard_normal(3 * RATE)
    assert "opposite phase" in reason(encoded(np.stack([chirp(), noise - chirp()], axis=1), codec=codec))


@pytest.mark.parametrize(("rate", "begin"), [(16000, 0), (16000, 2), (44100, 3), (8000, 1)])
def test_channels_that_cancel_each_other_for_a_while_are_refused(rate: int, begin: int) -> None:
    left = np.tile(speech_like(1.0, rate)[: rate // 2], 12)
    right = left.copy()
    right[begin * rate : (begin + 3) * rate] *= -0.97
    data = encoded(np.stack([left, right], axis=1), rate)
    assert "opposite phase" in reason(data, "many words " * 5)
    with pytest.raises(BadInput, match="opposite phase"):  # also where nothing else is checked
        load_audio(data)


def test_channels_that_differ_or_hum_in_pauses_do_not_cancel() -> None:
    rng = np.random.default_rng(3)
    left, right = speech_like(6.0), np.roll(speech_like(6.0), 40) + 0.05 * rng.standard_normal(6 * RATE)
    hum = 0.002 * np.sin(2 * np.pi * 50 * np.arange(6 * RATE) / RATE)
    left, right = left.copy(), right.copy()
    left[2 * RATE : 4 * RATE] = right[2 * RATE : 4 * RATE] = 0
    heard(encoded(np.stack([left + hum, right - hum], axis=1)), "many words " * 5)
    heard(encoded(rng.normal(0, 0.1, (6 * RATE, 2))), "many words " * 5)


def test_one_channel_of_six_is_enough() -> None:
    silent = np.zeros_like(chirp())
    assert (
        len(heard(encoded(np.stack([silent, chirp(), *[silent] * 4], axis=1)), text="some words were said")) == 3 * RATE
    )


@pytest.mark.parametrize("offset", [0.02, 0.3, -0.6])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_constant_offset_is_not_heard(offset: float, channels: int) -> None:
    data = encoded(np.stack([chirp() + offset] * channels, axis=1), codec=("WAV", "FLOAT"))
    audio = heard(data, text="some words that were said here")
    assert abs(audio.mean()) < 1e-6
    np.testing.assert_allclose(audio, chirp() - chirp().mean(), atol=1e-5)


def test_a_sound_recording_keeps_its_samples() -> None:
    audio = chirp() + np.float32(0.005)
    np.testing.assert_array_equal(mono(audio[:, None]), audio)


@pytest.mark.parametrize(("peak", "fine"), [(1.0005, True), (1.2, True), (1.5, False)])
def test_floats_may_overshoot(peak: float, fine: bool) -> None:
    data = encoded(chirp() * np.float32(peak / np.abs(chirp()).max()), codec=("WAV", "FLOAT"))
    quality = RecordedQualityConfig(max_clipped_share=1.0)
    if fine:
        assert check_recording(utterance(data), quality).duration_secs == 3.0
    else:
        with pytest.raises(BadInput, match=r"samples reach 1\.5"):
            check_recording(utterance(data), quality)


# ---- files that were read wrongly


@pytest.mark.parametrize(
    ("name", "secs"),
    [
        ("headerless_vbr_speech_first.mp3", 12.8),
        ("headerless_vbr_silence_first.mp3", 12.924),
        ("headerless_cbr_44100.mp3", 12.878),
        ("headerless_cbr_ape_tag.mp3", 12.888),
        ("two_mp3_joined.mp3", 25.7),
        ("chained_vorbis.ogg", 12.831),
        ("sox_pipe_24bit_mono.wav", 12.831),
        ("float_peak_1.0005.wav", 12.831),
    ],
)
@pytest.mark.parametrize("duration_secs", [0.0, 12.7])
def test_files_that_were_read_wrongly_are_kept_whole(cases: Path, name: str, secs: float, duration_secs: float) -> None:
    text = (cases / "audio/transcript.txt").read_text().strip()
    row = utterance(uri=str(cases / "audio" / name), text=text, duration_secs=duration_secs)
    checked = check_recording(row, QUALITY)
    assert checked.duration_secs == pytest.approx(duration_secs or secs, abs=0.1 if secs in (12.8, 25.7) else 0.001)
    audio, rate = load_audio(row.uri, 0.0, checked.duration_secs)
    assert len(audio) == round(checked.duration_secs * rate)


@pytest.mark.parametrize(
    ("name", "words"), [("opposite_phase.wav", "opposite phase"), ("a.webm", "WebM .* cannot be decoded")]
)
def test_files_that_cannot_be_used_say_why(cases: Path, name: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        check_recording(utterance(uri=str(cases / "audio" / name)), QUALITY)
