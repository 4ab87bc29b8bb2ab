"""Readers of web text: every row is a document or a reject, whatever state its file is in."""

from __future__ import annotations

import bz2
import decimal
import gzip
import json
import lzma
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from salad_ray.config import ConfigError, WebTextConfig
from salad_ray.speech import readers
from salad_ray.tables import Reject
from salad_ray.text import documents
from salad_ray.text.documents import Document, find_text_sources, read_documents, source_stamp


def corpus(path: object, **settings: Any) -> WebTextConfig:
    return WebTextConfig(path=str(path), **{"name": "web", **settings})


def read(path: object, **settings: Any) -> tuple[list[Document], dict[str, str]]:
    """Documents, and key → reason of the rejects."""
    config = corpus(path, **settings)
    rows = [row for source in find_text_sources(config) for row in read_documents(source, config)]
    rejects = [row for row in rows if isinstance(row, Reject)]
    assert len({row.key for row in rejects}) == len(rejects)
    return [row for row in rows if isinstance(row, Document)], {row.key: row.reason for row in rejects}


def rows(num: int = 10) -> list[dict[str, Any]]:
    common = {"language": "en", "dump": "CC-MAIN-2024-10", "token_count": 5}
    return [
        {"text": f"This is text number {row}.", "id": f"<urn:{row}>", "url": f"https://x.org/{row}"}
        | {"language_score": 0.9 + row / 1000, "score": float(row)}
        | common
        for row in range(num)
    ]


def write_parquet(path: Path, table: list[dict[str, Any]], rows_a_group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(table), path, row_group_size=rows_a_group, compression="none")
    return path


def write_jsonl(path: Path, table: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{json.dumps(row)}\n" for row in table).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.json.gz"])
def test_formats_give_the_same_documents(tmp_path: Path, name: str) -> None:
    write = write_parquet if name.endswith(".parquet") else write_jsonl
    found, rejects = read(write(tmp_path / name, rows()))
    assert not rejects
    url, text = "https://x.org/3", "This is text number 3."
    assert found[3] == Document("web/<urn:3>", text, url, license="unknown", language="en", score=3.0)
    assert [document.score for document in found] == list(range(10))


def test_a_folder_a_pattern_and_a_url_are_searched(tmp_path: Path) -> None:
    def names(path: object, **settings: Any) -> list[str]:
        return [source.name for source in find_text_sources(corpus(path, **settings))]

    write_parquet(tmp_path / "data/one/a.parquet", rows(2))
    write_jsonl(tmp_path / "data/two/a.jsonl.gz", rows(3))
    (tmp_path / "data/README.md").write_text("no text of the corpus")
    assert names(tmp_path) == ["data/one/a.parquet", "data/two/a.jsonl.gz"]
    assert names(tmp_path, format="jsonl") == ["data/two/a.jsonl.gz"]
    assert names(tmp_path / "data/*/*.parquet") == ["one/a.parquet"]
    assert names(tmp_path / "data/one/a.parquet") == ["a.parquet"]
    fsspec.filesystem("memory").pipe("/documents/x/a.jsonl", json.dumps(rows(1)[0]).encode())
    found, _ = read("memory://documents")
    assert [document.doc_id for document in found] == ["web/<urn:0>"]


def test_a_file_of_another_ending_is_read_when_its_format_is_set(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "dump.txt", rows(2))
    assert len(read(path, format="jsonl")[0]) == 2
    with pytest.raises(ConfigError, match=r"none ends in \.parquet"):
        find_text_sources(corpus(path))


def test_row_groups_are_divided_among_sources_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"text": f"Text {row}."} for row in range(23)])
    whole, _ = read(path)
    monkeypatch.setattr(documents, "SOURCE_BYTES", 150)
    sources = find_text_sources(corpus(path))
    assert len(sources) > 2
    assert len({source_stamp(source) for source in sources}) == len(sources)
    assert read(path)[0] == whole
    assert [document.doc_id for document in whole] == [f"web/a.parquet:{row}" for row in range(23)]


def test_a_stamp_tells_of_a_change(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(2))
    [before] = find_text_sources(corpus(path))
    assert source_stamp(before) == source_stamp(find_text_sources(corpus(path))[0])
    write_jsonl(path, rows(3))
    assert source_stamp(before) != source_stamp(find_text_sources(corpus(path))[0])


def test_only_the_columns_that_are_needed_are_read(tmp_path: Path) -> None:
    """A damaged page of another column does not matter."""
    table = [row | {"junk": "JUNK" * 1000} for row in rows()]
    path = write_parquet(tmp_path / "a.parquet", table)
    data = bytearray(path.read_bytes())
    start = data.index(b"JUNKJUNK") - 60
    data[start : start + 4000] = b"\xff" * 4000
    path.write_bytes(data)
    with pytest.raises((pa.ArrowException, OSError)):
        pq.read_table(path)
    found, rejects = read(path)
    assert (len(found), rejects) == (10, {})


def test_ids_without_an_id_column_name_the_file_and_the_row(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write_jsonl(tmp_path / folder / "a.jsonl", [{"text": "Some text."}, {"text": "More text.", "id": 7}])
    found, _ = read(tmp_path)
    assert [document.doc_id for document in found] == ["web/one/a.jsonl:1", "web/7", "web/two/a.jsonl:1", "web/7"]


@pytest.mark.parametrize("value", [None, "", " \n\t ", 7, ["a"], {"a": 1}, "half a \ud800 character"])
def test_a_row_without_text_is_a_reject(tmp_path: Path, value: Any) -> None:
    found, rejects = read(write_jsonl(tmp_path / "a.jsonl", [rows(1)[0], {"text": value, "id": "bad"}]))
    assert len(found) == 1
    assert list(rejects) == ["web/bad"]


def test_null_and_non_utf8_text_in_parquet_are_rejects(tmp_path: Path) -> None:
    binary = pa.array([b"good text", None, b"bad \xff byte"], pa.binary())
    text = pa.StringArray.from_buffers(3, binary.buffers()[1], binary.buffers()[2], binary.buffers()[0])
    pq.write_table(pa.table({"text": text, "id": ["a", "b", "c"]}), tmp_path / "a.parquet")
    found, rejects = read(tmp_path)
    assert [document.doc_id for document in found] == ["web/a"]
    assert "null" in rejects["web/b"]
    assert "Unicode" in rejects["web/c"]


@pytest.mark.parametrize("write", [write_parquet, write_jsonl])
def test_a_missing_column_names_the_file_its_columns_and_the_remedy(
    tmp_path: Path, write: Callable[[Path, list[dict[str, Any]]], Path]
) -> None:
    path = write(tmp_path / ("a.parquet" if write is write_parquet else "a.jsonl"), [{"content": "x y", "id": "1"}])
    with pytest.raises(ConfigError, match=rf"{path.name}.*no column 'text', only content, id; set text_column"):
        read(path)
    assert len(read(path, text_column="content")[0]) == 1
    with pytest.raises(ConfigError, match="set language_column"):
        read(path, text_column="content", languages=("en",))


def test_a_column_of_numbers_is_no_text(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", rows())
    with pytest.raises(ConfigError, match="token_count' holds int64, not text"):
        read(path, text_column="token_count")


def test_filters_reject_with_the_reason(tmp_path: Path) -> None:
    table = rows(6)
    table[1]["language"], table[2]["language"], table[3]["language_score"] = "en-GB", "fr", 0.2
    table[4]["score"] = None
    found, rejects = read(
        write_parquet(tmp_path / "a.parquet", table), languages=("en",), min_language_score=0.65, min_score=1.0
    )
    assert [document.doc_id for document in found] == ["web/<urn:1>", "web/<urn:5>"]
    assert rejects == {
        "web/<urn:0>": "score 0 is below 1",
        "web/<urn:2>": "language 'fr' is not among en",
        "web/<urn:3>": "language score 0.2 is below 0.65",
        "web/<urn:4>": "no score",
    }


def test_lines_that_are_not_json_are_rejects_of_their_own(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", rows(2))
    deep = "[" * 100_000
    path.write_text(f"{path.read_text()}not json\n\n[1, 2]\n{deep}\n" + json.dumps(rows(3)[2]))
    found, rejects = read(path)
    assert [document.score for document in found] == [0, 1, 2]
    assert list(rejects) == ["web/a.jsonl:3", "web/a.jsonl:5", "web/a.jsonl:6"]


def test_an_endless_line_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    table = rows(3)
    table[1]["text"] = "word " * 1000
    found, rejects = read(write_jsonl(tmp_path / "a.jsonl", table))
    assert [document.score for document in found] == [0, 2]
    assert list(rejects) == ["web/a.jsonl:2"]


def large_texts(path: Path, number: int, num_bytes: int) -> Path:
    """Different texts, which compress to next to nothing."""
    texts = [f"{row:04d}" + "a" * num_bytes for row in range(number)]
    pq.write_table(pa.table({"text": texts, "id": list(map(str, range(number)))}), path, compression="zstd")
    return path


def test_of_large_texts_few_are_in_memory_at_once(tmp_path: Path) -> None:
    path = large_texts(tmp_path / "a.parquet", 64, 2**20)
    [source] = find_text_sources(corpus(path))
    documents_ = read_documents(source, corpus(path))
    tracemalloc.start()  # of Python's own objects
    try:
        assert sum(isinstance(row, Document) for row in documents_) == 64
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20
    finally:
        tracemalloc.stop()


def test_a_text_that_is_too_large_is_told_by_file_and_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 2**20)
    table = [{"text": "short " * 3, "id": str(row)} for row in range(5)]
    table[2]["text"] = "word " * 2**20
    found, rejects = read(write_parquet(tmp_path / "a.parquet", table))
    assert [document.doc_id for document in found] == [f"web/{row}" for row in (0, 1, 3, 4)]
    assert rejects == {"web/a.parquet:2": "a row of more than 1,048,576 bytes"}


def test_of_a_truncated_gzip_what_was_there_is_kept(tmp_path: Path) -> None:
    table = [
        row | {"noise": np.random.default_rng(int(row["score"])).integers(0, 10**9, 50).tolist()} for row in rows(200)
    ]
    path = write_jsonl(tmp_path / "a.jsonl.gz", table)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found, rejects = read(path)
    assert 50 < len(found) < 150
    assert any("truncated or damaged" in reason for reason in rejects.values())
    path.write_bytes(gzip.compress(b"")[:-4])
    assert len(read(path)[1]) == 1


def test_of_a_damaged_row_group_the_others_are_kept(tmp_path: Path) -> None:
    table = [{"text": f"Text {row} " + "MARK" * 50, "id": str(row)} for row in range(12)]
    path = write_parquet(tmp_path / "a.parquet", table)
    data = bytearray(path.read_bytes())
    second = data.index(b"Text 4 ") - 4
    data[second : second + 200] = b"\xff" * 200
    path.write_bytes(data)
    found, rejects = read(path)
    assert [document.doc_id for document in found] == [f"web/{row}" for row in (0, 1, 2, 3, 8, 9, 10, 11)]
    assert list(rejects) == ["web/a.parquet:4"]
    assert "4 rows of row group 1 are lost" in rejects["web/a.parquet:4"]


def test_truncated_and_empty_parquet_files_are_rejects(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", rows())
    write_parquet(tmp_path / "b.parquet", rows(2))
    (tmp_path / "c.parquet").write_bytes(b"")
    path.write_bytes(path.read_bytes()[:-50])
    found, rejects = read(tmp_path)
    assert len(found) == 2
    assert sorted(rejects) == ["web/a.parquet", "web/c.parquet"]


def test_nothing_there_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        find_text_sources(corpus(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="no file matches"):
        find_text_sources(corpus(tmp_path / "*.parquet"))
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"2 files are there, but none ends in .*such as a\.txt"):
        find_text_sources(corpus(tmp_path))
    with pytest.raises(ConfigError, match="no hub id"):
        find_text_sources(corpus(tmp_path, revision="main"))


@pytest.mark.parametrize(
    ("path", "revision", "url"),
    [
        ("HuggingFaceFW/fineweb-edu", None, "hf://datasets/HuggingFaceFW/fineweb-edu"),
        ("HuggingFaceFW/fineweb-edu", "v1.0", "hf://datasets/HuggingFaceFW/fineweb-edu@v1.0"),
        (
            "HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet", "refs/convert/parquet",
            "hf://datasets/HuggingFaceFW/fineweb-edu@refs%2Fconvert%2Fparquet/sample/10BT/*.parquet",
        ),
        ("hf://datasets/a/b/c.jsonl", "v1", "hf://datasets/a/b@v1/c.jsonl"),
        ("hf://datasets/a/b@v0/c.jsonl", None, "hf://datasets/a/b@v0/c.jsonl"),
        ("s3://bucket/a", None, "s3://bucket/a"),
    ],
)  # fmt: skip
def test_hub_ids_become_urls(path: str, revision: str | None, url: str) -> None:
    assert documents.hub_url(path, revision) == url


def test_a_local_folder_comes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "data/web/a.jsonl", rows(1))
    monkeypatch.chdir(tmp_path)
    assert len(read("data/web")[0]) == 1
    assert len(read("data/web/*.jsonl")[0]) == 1


def test_licence_of_the_config_stands_where_a_row_has_none(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "One."}, {"text": "Two.", "license": "CC0"}])
    found, _ = read(path, license="ODC-By")
    assert [document.license for document in found] == ["ODC-By", "CC0"]


def test_real_documents(shared_data: Path) -> None:
    found, rejects = read(shared_data / "text" / "corpus.parquet")
    assert (len(found), rejects) == (8348, {})
    assert len({document.doc_id for document in found}) == 8348
    assert len({document.domain for document in found}) == 15
    assert all(document.license != "unknown" for document in found)


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "gzip": lambda data: gzip.compress(data) + b"trailing",
    "zstd": lambda data: pa.compress(data, "zstd", asbytes=True),
    "bz2": lambda data: bz2.compress(data[:700]) + bz2.compress(data[700:]) + b"trailing",
    "xz": lambda data: lzma.compress(data) + b"\0" * 8,
}


@pytest.mark.parametrize("end", [".jsonl", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".jsonl.bz2", ".ndjson.xz", ".JSONL"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_file_is_what_its_bytes_say(tmp_path: Path, end: str, packing: str) -> None:
    data = b"\xef\xbb\xbf" + write_jsonl(tmp_path / "plain.md", rows()).read_bytes()
    (tmp_path / f"a{end}").write_bytes(PACKINGS[packing](data))
    found, rejects = read(tmp_path)
    assert [row.text for row in found] == [row["text"] for row in rows()]
    assert not rejects


@pytest.mark.parametrize("packing", ["zstd", "bz2", "xz"])
def test_a_compressed_file_that_breaks_off_says_so_after_what_was_there(tmp_path: Path, packing: str) -> None:
    compress = {"zstd": PACKINGS["zstd"], "bz2": bz2.compress, "xz": lzma.compress}[packing]
    packed = compress(write_jsonl(tmp_path / "plain", rows(5000)).read_bytes())
    (tmp_path / "a.jsonl.zst").write_bytes(packed[: -100 if packing == "zstd" else -5])
    found, rejects = read(tmp_path)
    assert len(found) > (0 if packing == "zstd" else 4900)
    assert any("truncated or damaged" in reason for reason in rejects.values())


def test_files_of_other_kinds_that_hold_text_are_told(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", rows())
    for name in ("b.jsonl.lz4", "c.csv", "d.txt.xz", "e.warc.gz", "README.md", "dataset_info.json", ".gitattributes"):
        (tmp_path / name).write_bytes(b"x")
    found, rejects = read(tmp_path)
    assert len(found) == len(rows())
    assert set(rejects) == {f"web/{name}" for name in ("b.jsonl.lz4", "c.csv", "d.txt.xz", "e.warc.gz")}
    assert all("not read" in reason for reason in rejects.values())


def test_every_other_file_is_told_but_those_that_hold_no_records(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", rows())
    told = [
        *("b.jsonl.1", "c.part", "d.wet.gz", "e.rar", "f.h5", "part-00001", "g.txt", "h.jsonl.Z", "notice_board.csv"),
        "deep/_rows",
    ]
    harmless = [
        *("README", "README.txt", "LICENSE", "licence-data.txt", "x.md", ".hidden", ".cache/x/y.txt", "_SUCCESS"),
        *("SHA256SUMS", "sha256sums.txt", "md5sum.txt", "checksums.txt", "a.jsonl.md5", "load.py", "logo.png", "a.wav"),
    ]
    for name in (*told, *harmless):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found, rejects = read(tmp_path)
    assert len(found) == len(rows())
    assert set(rejects) == {f"web/{name}" for name in told}
    assert set(read(tmp_path, format="jsonl")[1]) == set(rejects)
    write_parquet(tmp_path / "z.parquet", rows())
    assert set(read(tmp_path, format="jsonl")[1]) == set(rejects)


def test_of_many_other_files_some_are_named_and_all_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", rows())
    for number in range(100):
        (tmp_path / f"{number:03}.txt").write_bytes(b"x")
    _, rejects = read(tmp_path)
    assert list(rejects) == [f"web/{number:03}.txt" for number in range(20)]
    assert "(80 more such files are there)" in rejects["web/019.txt"]


@pytest.mark.parametrize("end", [".jl", ".jsonlines", ".jl.gz", ".jsonl.lzma"])
def test_json_lines_of_other_names_are_read(tmp_path: Path, end: str) -> None:
    data = write_jsonl(tmp_path / "a.md", rows()).read_bytes()
    packed = {".gz": gzip.compress, "zma": lambda text: lzma.compress(text, lzma.FORMAT_ALONE)}.get(end[-3:], bytes)
    (tmp_path / f"a{end}").write_bytes(packed(data))
    write_parquet(tmp_path / "b.pq", rows())
    found, rejects = read(tmp_path)
    assert (len(found), rejects) == (2 * len(rows()), {})


def test_an_id_with_a_nul_is_a_reject(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"id": "a\0b", "text": "A line."}, {"id": "c", "text": "A line."}])
    found, rejects = read(tmp_path)
    assert [row.doc_id for row in found] == ["web/c"]
    assert list(rejects) == ["web/a\\0b"]


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.json", rows(2))
    (tmp_path / "list.json").write_text('[\n{"text": "one"}]')
    (tmp_path / "dataset_info.json").write_text('{"features": 7}')
    (tmp_path / "pretty.json").write_text('{\n "features": 7}')
    (tmp_path / "spaced.json").write_text(' [{"text": "one"}]')
    lines = [json.dumps(row) for row in rows(4)[2:]]
    (tmp_path / "late.json").write_text("\n".join(['{"meta": 1}', '{"text": "brok', *lines]))
    (tmp_path / "other.json").write_text('{"body": "one"}\n{"body": "two"}\n')
    found, rejects = read(tmp_path)
    assert sorted(row.text for row in found) == sorted(row["text"] for row in rows(4))
    assert set(rejects) == {
        f"web/{name}" for name in ("list.json", "spaced.json", "other.json", "late.json:1", "late.json:2")
    }


@pytest.mark.parametrize("type", [pa.null(), pa.float64(), pa.string()])
def test_a_part_without_any_text_costs_its_rows_only(tmp_path: Path, type: pa.DataType) -> None:
    write_parquet(tmp_path / "a.parquet", rows(3))
    empty = {"text": pa.array([None] * 3, type), "id": pa.array(["x", "y", "z"])}
    pq.write_table(pa.table(empty), tmp_path / "b.parquet")
    found, rejects = read(tmp_path)
    assert len(found) == 3
    assert rejects == {f"web/{name}": "its 'text' is null" for name in "xyz"}


@pytest.mark.parametrize("type", [None, pa.int64(), pa.list_(pa.string())])
def test_a_part_without_the_text_column_is_a_reject_with_its_columns(tmp_path: Path, type: pa.DataType | None) -> None:
    write_parquet(tmp_path / "b.parquet", rows(3))
    other = {"url": pa.array(["x", "y"])} | ({} if type is None else {"text": pa.array([None, None], type)})
    if type is not None:
        other["text"] = pa.array([7, 8] if type == pa.int64() else [["a"], ["b"]], type)
    pq.write_table(pa.table(other), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "c.jsonl", [{"content": "other"}, {"text": "A line."}])
    found, rejects = read(tmp_path)
    assert [row.text for row in found] == [*(row["text"] for row in rows(3)), "A line."]
    what = "no column 'text', only url" if type is None else f"column 'text' holds {str(type)[:4]}"
    assert what in rejects["web/a.parquet:0"]
    assert "2 rows are not read" in rejects["web/a.parquet:0"]
    assert rejects["web/c.jsonl:1"] == "it has no 'text', only content"


def test_text_in_a_column_of_bytes_is_read(tmp_path: Path) -> None:
    table = {
        "text": pa.array(["é".encode(), b"\xff", None], pa.binary()),
        "id": pa.array([b"a", b"b", b"c"], pa.binary()),
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    found, rejects = read(tmp_path)
    assert [(row.doc_id, row.text) for row in found] == [("web/a", "é")]
    assert sorted(rejects) == ["web/b", "web/c"]


def test_links_are_followed_and_one_that_leads_nowhere_is_told(tmp_path: Path) -> None:
    """The hub's cache is made of them: files of a snapshot lead to blobs."""
    write_jsonl(tmp_path / "blobs/one", rows(1))
    write_jsonl(tmp_path / "more/b.jsonl", rows(2))
    folder = tmp_path / "snapshot"
    (folder / "deep").mkdir(parents=True)
    (folder / "a %20 é.jsonl").symlink_to("../blobs/one")
    (folder / "deep/linked").symlink_to("../../more")
    (folder / "deep/round").symlink_to("..")
    (folder / "gone.parquet").symlink_to("nowhere")
    found, rejects = read(folder)
    assert len(found) == 3
    assert rejects == {"web/gone.parquet": "a file that is not read: a link that leads nowhere"}
    shutil.copytree(folder, tmp_path / "copied", ignore=shutil.ignore_patterns("round", "gone*"))
    names = [[source.name for source in find_text_sources(corpus(tmp_path / at))] for at in ("snapshot", "copied")]
    assert names[0] == [*names[1], "gone.parquet"]
    assert len(read(f"{folder}/*.jsonl")[0]) == 1


def test_decimals_and_written_numbers_are_scores(tmp_path: Path) -> None:
    table = {"text": ["one", "two", "three"], "score": [decimal.Decimal(text) for text in ("3.5", "1.5", "4")]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "four", "score": "3.25"}, {"text": "five", "score": "high"}])
    found, rejects = read(tmp_path, min_score=2.0)
    assert [(row.text, row.score) for row in found] == [("one", 3.5), ("three", 4.0), ("four", 3.25)]
    assert sorted(rejects.values()) == ["no score", "score 1.5 is below 2"]


# ---- corpora that were read wrongly


@pytest.mark.parametrize(
    ("path", "num_documents", "reasons"),
    [
        ("web_folder_with_zst", 6, []),
        ("web_folder_null_part", 3, ["its 'text' is null"] * 3),
        ("web/gzjunk.jsonl.gz", 5000, []),
    ],
)
def test_corpora_that_were_read_wrongly(cases: Path, path: str, num_documents: int, reasons: list[str]) -> None:
    found, rejects = read(cases / path)
    assert (len(found), list(rejects.values())) == (num_documents, reasons)
