from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest

from salad_ray.config import ConfigError
from salad_ray.speech.readers import decompressed, inflated, inside, lines_of, normalize_text, read_folder, split_of
from salad_ray.tables import BadInput


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


TEXTS = ['he said "yes" twice', '"No."', "two\nlines", "a\ttab", "plain", '"open', 'shut"', '""']


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_that_was_quoted_gives_what_was_written(tmp_path: Path, quoting: int, end: str) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter="\t", quoting=quoting, lineterminator=end)  # pandas writes with this, too
    writer.writerow(["utt_id", "audio", "text"])
    writer.writerows([f"u{number}", "a.wav", text] for number, text in enumerate(TEXTS))
    (tmp_path / "transcripts.tsv").write_bytes(file.getvalue().encode())
    utterances, rejects = read_folder(str(tmp_path), "")
    assert [row.text for row in utterances] == [" ".join(text.split()) for text in TEXTS]
    assert not rejects


def test_quotation_marks_of_a_text_stay_where_nothing_was_quoted(tmp_path: Path) -> None:
    texts = ['"No."', '"open', "then", 'shut"', '"Yes," he said.', 'the 5" disk', '""']
    lines = (f"u{number}\ta.wav\t{text}" for number, text in enumerate(texts))
    utterances, rejects = read_folder(write_table(tmp_path / "x", "utt_id\taudio\ttext", *lines), "")
    assert [row.text for row in utterances] == texts
    assert not rejects


def test_invisible_characters_are_no_part_of_a_text() -> None:
    assert normalize_text("\ufeffco\u00adop\u00aderate \u200band\u2060 \u202ago\u202c") == "cooperate and go"
    assert normalize_text("\u0645\u06cc\u200c\u0631\u0648\u062f") == "\u0645\u06cc\u200c\u0631\u0648\u062f"


@pytest.mark.parametrize("allow_outside", [True, False])
def test_a_path_with_a_nul_is_a_reject(allow_outside: bool) -> None:
    with pytest.raises(BadInput, match="holds a NUL"):
        inside("a\0.wav", "/corpus", allow_outside)


LINES = b"".join(b"line %d\n" % number for number in range(50_000))


@pytest.mark.parametrize("after", [b"", b"trailing", bytes(600), bytes(70_000) + b"junk", b"x" * 200_000])
@pytest.mark.parametrize("members", [1, 3])
def test_what_lies_behind_a_gzip_costs_nothing(after: bytes, members: int) -> None:
    assert decompressed(io.BytesIO(gzip.compress(LINES) * members + after)).read() == LINES * members


def test_a_gzip_gives_all_before_it_breaks_off() -> None:
    packed = gzip.compress(LINES)
    stream, got = inflated(io.BytesIO(packed[:-9])), b""
    with suppress(EOFError):
        for block in stream:
            got += block
        pytest.fail("an end that is missing was not noticed")
    assert got == LINES[: len(got)]
    assert len(got) > len(LINES) - 100
    with pytest.raises(EOFError, match="perhaps by another"):
        decompressed(io.BytesIO(packed + b"junk" + packed)).read()
    with pytest.raises(zlib.error):
        decompressed(io.BytesIO(packed[:-8] + bytes(8))).read()


@pytest.mark.parametrize("frames", [1, 2])
def test_zstandard_is_read_by_its_first_bytes(frames: int) -> None:
    packed = pa.compress(LINES, "zstd", asbytes=True) * frames
    assert decompressed(io.BytesIO(packed)).read() == LINES * frames
    with pytest.raises(OSError, match="runcated"):
        decompressed(io.BytesIO(packed[:-50])).read()


SKIPPABLE = struct.pack("<II", 0x184D2A53, 9) + b"123456789"


def test_all_frames_of_zstandard_are_read() -> None:
    """Also behind frames to be skipped, as pzstd writes them, of no bytes, of one block that repeats, and zeros."""
    packed = pa.compress(LINES, "zstd", asbytes=True)
    stored = b"\x28\xb5\x2f\xfd\x20\x05" + (5 << 3 | 1).to_bytes(3, "little") + b"abcd\n"
    repeated = b"\x28\xb5\x2f\xfd\x20\x05" + (5 << 3 | 2 | 1).to_bytes(3, "little") + b"x"
    whole = LINES + b"abcd\n" + b"xxxxx" + LINES
    for data in (
        SKIPPABLE + packed + stored + SKIPPABLE + repeated + packed + SKIPPABLE,
        packed + stored + repeated + SKIPPABLE * 3 + packed + bytes(600),
    ):
        assert decompressed(io.BytesIO(data)).read() == whole


def given(data: bytes) -> tuple[bytes, str]:
    """What is read, and what is said at its end."""
    stream, got = decompressed(io.BytesIO(data)), b""
    try:
        while line := stream.readline():
            got += line
    except EOFError as error:
        return got, str(error)
    return got, ""


def test_bytes_behind_zstandard_are_told_and_cost_nothing() -> None:
    packed = pa.compress(LINES, "zstd", asbytes=True)
    for junk, words in (
        (b"junk", "no Zstandard"),
        (b"x" * 200_000, "no Zstandard"),
        (SKIPPABLE + b"junk", "no Zstandard"),
        (b"junk" + packed, "perhaps by another"),
    ):
        got, said = given(packed + junk)
        assert got.rstrip() == LINES.rstrip()
        assert words in said
        assert given(pa.compress(b"a\nb", "zstd", asbytes=True) + junk)[0] == b"a\nb\n"


@pytest.mark.parametrize("packing", ["gzip", "zstd", "bz2", "xz"])
@pytest.mark.parametrize("size", [1, 5000])
def test_lines_of_json_that_were_appended_to_a_compressed_file_are_read(packing: str, size: int) -> None:
    compress = {
        "gzip": gzip.compress,
        "zstd": lambda data: pa.compress(data, "zstd", asbytes=True),
        "bz2": bz2.compress,
        "xz": lzma.compress,
    }[packing]
    more = b'\xef\xbb\xbf{"text": "appended"}\n' * size
    assert given(compress(LINES) + more) == (LINES + more, "")
    assert given(compress(LINES) + b'rn": 1}\n' + more) == (LINES + b'rn": 1}\n' + more, "")


@pytest.mark.parametrize("packing", ["gzip", "bz2", "xz"])
def test_another_compression_behind_the_first_is_told(packing: str) -> None:
    compress = {"gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    more = [pack(LINES) for name, pack in compress.items() if name != packing]
    for each in (*more, pa.compress(LINES, "zstd", asbytes=True)):
        read, error = given(compress[packing](LINES) + each)
        assert read.rstrip(b"\n") == LINES.rstrip(b"\n")
        assert "another compressed file" in error


def test_lzma_is_read() -> None:
    packed = lzma.compress(LINES, lzma.FORMAT_ALONE)
    assert given(packed) == (LINES, "")
    assert "breaks off" in given(packed[:-20])[1]


def test_byte_order_marks_of_joined_files_are_no_part_of_a_line(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": "\xef\xbb\xbf"}\n'
    assert [line for _, line in lines_of(io.BytesIO(data))] == [b'{"a": 1}\n', b'{"a": "\xef\xbb\xbf"}\n']
    folder = write_table(tmp_path, "\ufeffutt_id\taudio\ttext", "a\ta.wav\tone", "\ufeffb\tb.wav\ttwo")
    assert [row.utt_id.rpartition("/")[2] for row in read_folder(folder, "")[0]] == ["a", "b"]


# ---- corpora that were read wrongly


def test_a_quoted_table_is_unquoted(cases: Path) -> None:
    utterances, rejects = read_folder(str(cases / "corpus_quoted"), "", "c")
    assert [(row.utt_id, row.text) for row in utterances] == [
        ("c/u1", 'hello "there" you'),
        ("c/u2", "he said it"),
        ("c/u3", "first half second half"),
        ("c/u4", "hello zerowidth"),
    ]
    assert not rejects


def test_a_nul_in_a_path_costs_its_row(cases: Path) -> None:
    utterances, rejects = read_folder(str(cases / "corpus_nul_path"), "", "c")
    assert [row.utt_id for row in utterances] == ["c/u1"]
    assert [row.key for row in rejects] == ["c/u2"]
