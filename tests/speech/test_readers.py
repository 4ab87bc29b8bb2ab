from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from salad_ray.config import ConfigError
from salad_ray.speech.readers import read_folder, split_of


def write_table(folder: Path, *lines: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "transcripts.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


def test_reads_all_columns(tmp_path: Path) -> None:
    folder = write_table(
        tmp_path / "books",
        "utt_id\taudio\ttext\tspeaker\trecording_id\toffset\tduration\tdomain\tlanguage\tlicense\tmood",
        'a\taudio/a.wav\t “one   two"\u00a0cafe\u0301 \ts1\tr1\t1.5\t2.25\tlaw\ten-GB\tCC0\tgay',
        "b\tb.wav\tthree\t\t\t\t\t\t\t\t",
    )
    (first, second), rejects = read_folder(folder + "/", "CC BY 4.0")
    assert not rejects
    assert (first.utt_id, first.recording_id, first.corpus) == ("books/a", "books/r1", "books")
    assert first.text == '“one two" café'
    assert (first.uri, first.offset_secs, first.duration_secs) == (f"{folder}/audio/a.wav", 1.5, 2.25)
    assert (first.speaker, first.domain, first.language, first.license) == ("s1", "law", "en-GB", "CC0")
    assert (second.recording_id, second.language, second.license) == ("books/b", "en", "CC BY 4.0")
    assert (second.offset_secs, second.duration_secs) == (0, 0)


def test_every_line_is_an_utterance_or_a_reject(tmp_path: Path) -> None:
    folder = write_table(
        tmp_path / "x",
        "utt_id\taudio\ttext\toffset\tduration",
        "good\ta.wav\thello\t\t",
        "\ta.wav\thello\t\t",
        "good\tb.wav\tagain\t\t",
        "short\ta.wav",
        "silent\ta.wav\t  \t\t",
        "up\t../a.wav\thello\t\t",
        "root\t/etc/passwd\thello\t\t",
        "url\thttp://a/b.wav\thello\t\t",
        "back\t..\\a.wav\thello\t\t",
        "late\ta.wav\thello\t-1\t",
        "word\ta.wav\thello\t\tlong",
        "nan\ta.wav\thello\tnan\t",
        "zero\ta.wav\thello\t\t0",
        "nofile\t\thello\t\t",
        "",
        "last\tc.wav\tbye\t\t",
    )
    utterances, rejects = read_folder(folder, "")
    assert [row.utt_id for row in utterances] == ["x/good", "x/last"]
    reasons = {row.key: row.reason for row in rejects}
    assert len(rejects) == 13
    assert reasons[f"{folder}/transcripts.tsv:3"] == "empty utt_id"
    assert "line 2" in reasons["x/good"]
    assert "2 fields where the header has 5" in reasons[f"{folder}/transcripts.tsv:5"]
    assert reasons["x/silent"] == "empty transcript"
    for key in ("up", "root", "url", "back"):
        assert "leaves the folder" in reasons[f"x/{key}"]
    for key in ("late", "word", "nan", "zero"):
        assert "offset" in reasons[f"x/{key}"] or "duration" in reasons[f"x/{key}"]


def test_a_byte_order_mark_and_windows_line_ends_are_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "transcripts.tsv").write_bytes(b"\xef\xbb\xbfutt_id\taudio\ttext\r\na\ta.wav\thello\r\n")
    (row,), _ = read_folder(str(tmp_path), "")
    assert row.text == "hello"


def test_wrong_encoding_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "transcripts.tsv").write_bytes("utt_id\taudio\ttext\na\ta.wav\tx\nb\tb.wav\tcafé\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"transcripts.tsv:3: byte 0xe9 is not UTF-8"):
        read_folder(str(tmp_path), "")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("utt_id\taudio\ttxt", "no column 'text' among 'utt_id', 'audio', 'txt'; did you mean 'txt'"),
        ("utt_id,audio,text", "separated by tabs"),
        ("utt_id\taudio\ttext\ttext", "'text' appears more than once"),
        ("", "no column"),
    ],
)
def test_wrong_headers_end_in_one_sentence(tmp_path: Path, header: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_folder(write_table(tmp_path, header), "")


def test_wrong_paths_end_in_one_sentence(tmp_path: Path) -> None:
    write_table(tmp_path / "recordings", "utt_id\taudio\ttext")
    with pytest.raises(ConfigError, match="no such folder; did you mean 'recordings'"):
        read_folder(str(tmp_path / "recording"), "")
    with pytest.raises(ConfigError, match=r"has no transcripts.tsv"):
        read_folder(str(tmp_path), "")
    with pytest.raises(ConfigError, match="a file, but a folder"):
        read_folder(str(tmp_path / "recordings" / "transcripts.tsv"), "")


def test_reads_from_an_object_store() -> None:
    fsspec.filesystem("memory").pipe_file("/store/talks/transcripts.tsv", b"utt_id\taudio\ttext\na\tx/a.flac\thello\n")
    (row,), _ = read_folder("memory://store/talks", "")
    assert row.uri == "memory://store/talks/x/a.flac"
    assert row.utt_id == "talks/a"


def test_split_goes_by_recording_and_keeps_its_share() -> None:
    splits = [split_of(f"book{index}", 0.1) for index in range(5000)]
    assert 400 < splits.count("test") < 600
    assert splits[:50] == [split_of(f"book{index}", 0.1) for index in range(50)]
    assert {split_of(f"book{index}", 0.0) for index in range(100)} == {"train"}
    small = {index for index in range(5000) if split_of(f"book{index}", 0.05) == "test"}
    assert small <= {index for index, split in enumerate(splits) if split == "test"}


def test_real_folders(shared_data: Path) -> None:
    sizes = {}
    for name in ("lj_text_male", "ljspeech", "spoken_digits", "mixed_read"):
        utterances, rejects = read_folder(str(shared_data / "speech" / name), "x")
        assert not rejects
        sizes[name] = len(utterances)
    assert sizes == {"lj_text_male": 95, "ljspeech": 22, "spoken_digits": 300, "mixed_read": 33}
