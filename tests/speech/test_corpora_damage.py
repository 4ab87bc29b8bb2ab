"""Records that are damaged, forged or merely odd: each is a reject of its own, and never ends the scan or is lost."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import lhotse
import numpy as np
import pyarrow as pa
import pytest
import soundfile

from salad_ray.config import ConfigError, CorpusConfig, RecordedQualityConfig
from salad_ray.speech.audio import check_recording, load_audio, load_utterance
from salad_ray.speech.corpora import find_sources, scan, source_stamp
from salad_ray.speech.lhotse_cuts import write_cuts
from salad_ray.speech.readers import IdSet
from salad_ray.tables import BadInput, Reject, Utterance, Word, from_arrow, to_arrow

RATE = 16000


def read(path: str | Path, **settings: Any) -> tuple[list[Utterance], dict[str, str]]:
    """Utterances, and key → reason of the rejects; all as a table gives them back."""
    corpus = CorpusConfig(path=str(path), name="c", **settings)
    rows = [row for source in find_sources(corpus) for row in scan(source, corpus, 2**20, "memory://unpacked")]
    utterances = to_arrow(Utterance, [row for row in rows if isinstance(row, Utterance)])
    rejects = from_arrow(Reject, to_arrow(Reject, [row for row in rows if isinstance(row, Reject)]))
    return from_arrow(Utterance, utterances), {row.key: row.reason for row in rejects}


def samples(secs: float = 4.0, channels: int = 1) -> np.ndarray:
    noise = 0.1 * np.random.default_rng(0).standard_normal((int(secs * RATE), channels))
    return noise.astype(np.float32)


def flac(secs: float = 4.0) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples(secs), RATE, format="FLAC")
    return file.getvalue()


def cut(**changes: Any) -> dict[str, Any]:
    recording = {
        "id": "r", "sources": [{"type": "file", "channels": [0], "source": "audio/r.flac"}], "sampling_rate": RATE,
        "num_samples": 4 * RATE, "duration": 4.0, "channel_ids": [0],
    } | changes.pop("recording", {})  # fmt: skip
    supervision = {"id": "s", "recording_id": "r", "start": 0.0, "duration": 1.0, "channel": 0, "text": "one two"}
    supervision |= changes.pop("supervision", {})
    whole = {"id": "bad", "start": 0.0, "duration": 1.0, "channel": 0, "supervisions": [supervision]}
    return whole | {"recording": recording, "type": "MonoCut"} | changes


def manifest(folder: Path, *lines: bytes | dict[str, Any]) -> Path:
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    (folder / "audio" / "r.flac").write_bytes(flac())
    data = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "cuts.jsonl").write_bytes(b"\n".join(data) + b"\n")
    return folder / "cuts.jsonl"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (cut(start="1.0"), "not a Lhotse cut"),
        (cut(start=float("nan")), "cannot be cut"),
        (cut(supervision={"duration": float("inf")}), "cannot be cut"),
        (cut(supervision={"duration": -1.0}), "cannot be cut"),
        (cut(supervision={"start": -0.5}), "starts before its recording"),
        (cut(recording={"duration": "4"}), "not a Lhotse cut"),
        (cut(recording={"sources": [{"type": "file", "channels": [0], "source": 5}]}), "no path"),
        (cut(recording={"sources": [{"type": "memory", "channels": [0], "source": "AAAA"}]}), "'memory'"),
        (cut(channel=3, supervision={"channel": 3}), "channel 3 of a recording that has only channel 0"),
        (cut(custom=["a"]), "not a Lhotse cut"),
        (cut(supervision={"alignment": {"word": [["one", "a", None], ["two", 1, 1]]}}), "not a Lhotse cut"),
        (cut(supervision={"text": None, "custom": {"texts": [None, "ONE TWO"]}}), "empty transcript"),
        (cut(supervision={"text": "half \ud83d of it"}), "not valid Unicode"),
        (json.dumps(cut()).encode().replace(b"one", b"\xff"), "not valid Unicode"),
        (cut(supervisions=None), "not a Lhotse cut"),
        (cut(supervision={"text": ["one", "two"]}), "its text is no string (list)"),
        (cut(supervision={"text": None, "custom": {"texts": [{"a": 1}]}}), "its text is no string (dict)"),
        (cut(custom={"order": 10**30}), "its order has more than 64 bits"),
        (cut(custom={"dnsmos": 10**400}), "not a Lhotse cut"),
        (cut(recording={"channel_ids": 5}), "not a Lhotse cut"),
        (cut(recording={"channel_ids": {"a": 1}}), "not a Lhotse cut"),
    ],
)
def test_no_line_of_a_manifest_ends_the_scan(tmp_path: Path, line: bytes | dict[str, Any], words: str) -> None:
    utterances, rejects = read(manifest(tmp_path, cut(id="first"), line, cut(id="last")))
    assert [row.utt_id for row in utterances] == ["c/first", "c/last"]
    assert rejects.keys() == {"c/bad"}
    assert words in rejects["c/bad"]


def test_json_that_is_too_deep_is_a_reject(tmp_path: Path) -> None:
    utterances, rejects = read(manifest(tmp_path, b"[" * 200_000, cut(id="last")))
    assert len(utterances) == 1
    [reason] = rejects.values()
    assert "RecursionError" in reason


def test_names_and_speakers_that_are_numbers_become_text(tmp_path: Path) -> None:
    [row], rejects = read(manifest(tmp_path, cut(id=5, supervision={"speaker": 7, "language": 3})))
    assert not rejects
    assert (row.utt_id, row.speaker, row.language) == ("c/5", "7", "3")


def test_numbers_of_other_types_fit_into_a_table(tmp_path: Path) -> None:
    long = 10**17 + 1  # more than a float counts
    line = cut(duration=long, supervision={"duration": long}, recording={"duration": long}, custom={"order": True})
    [row], rejects = read(manifest(tmp_path, line))
    assert not rejects
    assert (row.duration_secs, row.order) == (1e17, None)


def word_cut(first: float, second: float) -> dict[str, Any]:
    alignment = {"word": [["one", first, 0.2, None], ["two", second, 0.3, None]]}
    return cut(start=2.0, supervision={"alignment": alignment})


def test_words_are_timed_from_the_recordings_start_as_lhotse_does(tmp_path: Path) -> None:
    """`trim_to_supervisions` moves the cut and leaves its alignment alone."""
    recording = lhotse.Recording("r", [lhotse.AudioSource("file", [0], "audio/r.flac")], RATE, 4 * RATE, 4.0)
    items = [lhotse.supervision.AlignmentItem("one", 2.1, 0.2), lhotse.supervision.AlignmentItem("two", 2.5, 0.3)]
    segment = lhotse.SupervisionSegment("s", "r", 2.0, 1.0, text="one two", alignment={"word": items})
    cuts = lhotse.CutSet.from_manifests(
        lhotse.RecordingSet.from_recordings([recording]), lhotse.SupervisionSet.from_segments([segment])
    )
    path = manifest(tmp_path)
    cuts.trim_to_supervisions().to_file(path)
    [row], _ = read(path)
    assert (row.offset_secs, row.words) == (2.0, [Word("one", 0.1, 0.3), Word("two", 0.5, 0.8)])


@pytest.mark.parametrize(("first", "second"), [(0.1, 0.5), (2.5, 3.4), (2.5, 2.1)])
def test_words_outside_their_utterance_or_out_of_order_are_dropped(tmp_path: Path, first: float, second: float) -> None:
    [row], rejects = read(manifest(tmp_path, word_cut(first, second)))
    assert row.words is None
    assert not rejects


def test_only_librilights_recordings_are_said_to_be_public_domain(tmp_path: Path) -> None:
    book = {"id": "small/100/sea_fairies/01_chapter"}
    mine = {"source": "tape 1"}
    rows, _ = read(manifest(tmp_path, cut(id="mine", custom=mine), cut(id="theirs", recording=book)))
    assert {row.utt_id: row.license for row in rows} == {"c/mine": "unknown", "c/theirs": "public domain"}


# ---- archives


def tar_of(entries: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def record(**fields: Any) -> bytes:
    return json.dumps({"id": "x", "text": "hi there", "speaker": "S", "language": "en"} | fields).encode()


def four_samples() -> list[tuple[str, bytes]]:
    return [entry for i in range(4) for entry in ((f"k{i}.json", record()), (f"k{i}.flac", flac(0.1)))]


def header_of(data: bytes, index: int) -> int:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()[index].offset


def read_tar(folder: Path, data: bytes) -> tuple[list[Utterance], str]:
    """Utterances, and what is wrong with the archive as a whole."""
    (folder / "x.tar").write_bytes(data)
    utterances, rejects = read(folder / "x.tar")
    return utterances, rejects.get(str(folder / "x.tar"), "")


def test_a_damaged_header_inside_a_tar_is_not_taken_for_its_end(tmp_path: Path) -> None:
    data = bytearray(tar_of(four_samples()))
    place = header_of(bytes(data), 4)
    data[place : place + 512] = b"\xaa" * 512
    utterances, reason = read_tar(tmp_path, bytes(data))
    assert [row.utt_id for row in utterances] == ["c/k0", "c/k1"]
    assert f"damaged at byte {place:,}" in reason


def test_an_archive_behind_an_archive_is_noticed(tmp_path: Path) -> None:
    entries = four_samples()
    utterances, reason = read_tar(tmp_path, tar_of(entries[:4]) + tar_of(entries[4:]))
    assert len(utterances) == 2
    assert "another archive follows" in reason
    assert read_tar(tmp_path, tar_of(entries))[1] == ""


@pytest.mark.timeout(20)
def test_a_member_of_negative_size_ends_the_archive(tmp_path: Path) -> None:
    data = bytearray(tar_of(four_samples()))
    place = header_of(bytes(data), 2)
    data[place + 124 : place + 136] = b"\xff" * 10 + struct.pack(">H", 2**16 - 2048)  # −2,048 in base 256
    data[place + 148 : place + 156] = b" " * 8
    data[place + 148 : place + 156] = f"{sum(data[place : place + 512]):06o}\0 ".encode()
    utterances, reason = read_tar(tmp_path, bytes(data))
    assert [row.utt_id for row in utterances] == ["c/k0"]
    assert "negative size" in reason


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.map": "abc"},
        {"GNU.sparse.size": "abc"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
        {"size": "1" + "0" * 30},
        {"size": str(2**62)},
    ],
)
def test_forged_extended_headers_end_the_archive_and_not_the_scan(tmp_path: Path, headers: dict[str, str]) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in four_samples():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.pax_headers = headers if name == "k2.flac" else {}
            tar.addfile(info, io.BytesIO(data))
    utterances, reason = read_tar(tmp_path, file.getvalue())
    assert [row.utt_id for row in utterances] == ["c/k0", "c/k1"]
    assert "truncated or damaged at byte" in reason


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_headers_upon_headers_end_the_archive(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("name")
    info.type = kind
    _, reason = read_tar(tmp_path, info.tobuf(tarfile.GNU_FORMAT) * 2000)
    assert "recursion" in reason


def test_odd_samples_of_a_tar(tmp_path: Path) -> None:
    entries = [
        ("a/same.json", record()), ("a/same.mp3", b"x"), ("b/same.json", record()), ("b/same.mp3", b"x"),
        ("half.json", b'{"text": "half \\ud83d"}'), ("half.mp3", b"x"), ("deep.json", b"[" * 100_000),
        ("deep.mp3", b"x"), ("film.json", record()), ("film.m4a", b"x"),
        ("inf.json", record(duration=float("inf"), dnsmos=float("nan"))), ("inf.mp3", b"x"),
        ("n\udcff.json", record()), ("n\udcff.mp3", b"x"), (f"k_W{10**19}.json", record()), (f"k_W{10**19}.mp3", b"x"),
        ("list.json", record(text=["a"])), ("list.mp3", b"x"),
        ("huge.json", record(duration=10**400, dnsmos=10**400)), ("huge.mp3", b"x"),
    ]  # fmt: skip
    (tmp_path / "x.tar").write_bytes(tar_of(entries))
    utterances, rejects = read(tmp_path / "x.tar")
    assert [(row.utt_id, row.duration_secs, row.dnsmos) for row in utterances] == [
        ("c/same", 0.0, None),
        ("c/huge", 0.0, None),
        ("c/inf", 0.0, None),
    ]
    assert rejects.keys() == {
        "c/same", "c/half", "c/deep", "c/film", "c/n\\udcff", "c/list", f"c/k_W{10**19}",
    }  # fmt: skip
    assert "a number of 20 digits" in rejects[f"c/k_W{10**19}"]
    assert rejects["c/list"] == "its text is no string (list)"
    assert "read already" in rejects["c/same"]
    assert "M4A" in rejects["c/film"]


@pytest.mark.parametrize("lone", ["C.jsonl", "C.tar.gz"])
def test_half_of_the_older_layout_is_named(tmp_path: Path, lone: str) -> None:
    (tmp_path / "B.jsonl").write_bytes(record(wav="a.mp3"))
    (tmp_path / "B.tar.gz").write_bytes(gzip.compress(tar_of([("a.mp3", b"x")])))
    assert len(find_sources(CorpusConfig(path=str(tmp_path)))) == 1
    (tmp_path / lone).write_bytes(b"x")
    with pytest.raises(ConfigError, match=f"{lone} lacks its other half"):
        find_sources(CorpusConfig(path=str(tmp_path)))


def test_two_lines_of_one_id_are_one_utterance(tmp_path: Path) -> None:
    (tmp_path / "B.jsonl").write_bytes(record(id="k", wav="a.mp3") + b"\n" + record(id="k", wav="b.mp3"))
    (tmp_path / "B.tar.gz").write_bytes(gzip.compress(tar_of([("a.mp3", b"x"), ("b.mp3", b"y")])))
    utterances, rejects = read(tmp_path)
    assert [row.utt_id for row in utterances] == ["c/k"]
    assert "read already" in rejects["c/k"]


# ---- Kaldi and folders


def kaldi(folder: Path, **tables: str | bytes) -> Path:
    (folder / "audio").mkdir(parents=True)
    (folder / "audio" / "r.flac").write_bytes(flac())
    for name, text in ({"wav.scp": "r audio/r.flac\n"} | tables).items():
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_kaldi_tables_may_be_in_any_order(tmp_path: Path) -> None:
    segments = "a r 0 1\nb r 1 2\nextra r 0 1\nd r 3 4\n"
    text = "d four\na one\nb two\na again\n"
    rows, rejects = read(kaldi(tmp_path / "k", segments=segments, text=text, utt2spk="b bob\na ann\n"))
    assert [(row.utt_id, row.offset_secs, row.speaker) for row in rows] == [
        ("c/d", 3.0, ""),
        ("c/a", 0.0, "ann"),
        ("c/b", 1.0, "bob"),
    ]
    assert rejects == {"c/a": "text has a line of this id already", "c/extra": "a segment without a line in text"}


def test_a_recording_of_kaldi_without_text_is_told(tmp_path: Path) -> None:
    scp = "r audio/r.flac\nlost audio/r.flac\n"
    rows, rejects = read(kaldi(tmp_path / "k", **{"wav.scp": scp, "text": "r one two\n"}))
    assert [row.utt_id for row in rows] == ["c/r"]
    assert rejects == {"c/lost": "a recording of wav.scp that no line of text is of"}


def test_lines_of_kaldis_tables_end_at_line_feeds_only(tmp_path: Path) -> None:
    text = "a one\u2028two\x0bthree\nb ".encode() + b"\xff\n"
    [row], rejects = read(kaldi(tmp_path / "k", segments="a r 0 1\nb r 1 2\n", text=text))
    assert row.text == "one two three"
    assert "not valid Unicode" in rejects["c/b"]


def test_an_id_of_kaldi_that_is_not_utf8_is_a_reject(tmp_path: Path) -> None:
    tables = {"wav.scp": b"r audio/r.flac\n\xe9 audio/r.flac\n", "text": b"r one two\n\xe9 one two\n\xff one two\n"}
    [row], rejects = read(kaldi(tmp_path / "k", **tables))
    assert row.utt_id == "c/r"
    assert "not valid Unicode" in rejects["c/\\udce9"]
    assert "not in wav.scp" in rejects["c/\\udcff"]


def test_kaldi_without_text_and_patterns_without_an_ending_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no text; a Kaldi folder has"):
        find_sources(CorpusConfig(path=str(kaldi(tmp_path / "k"))))
    with pytest.raises(ConfigError, match=r"a pattern must end in \.jsonl"):
        find_sources(CorpusConfig(path=str(tmp_path / "k*")))


def test_kaldi_and_folders_are_read_from_an_object_store(tmp_path: Path) -> None:
    local = kaldi(tmp_path / "k", segments="a r 1 2\n", text="a one\n")
    fsspec.filesystem("memory").put(str(local), "/damage/kaldi", recursive=True)
    [row], _ = read("memory://damage/kaldi")
    assert np.array_equal(load_utterance(row, RATE), load_audio(flac(), 1.0, 1.0)[0])
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/damage/folder/transcripts.tsv", b"utt_id\taudio\ttext\na\ta.flac\thello\n")
    fs.pipe_file("/damage/folder/a.flac", flac())
    [row], _ = read("memory://damage/folder")
    assert np.array_equal(load_utterance(row, RATE), load_audio(flac())[0])


# ---- audio and export


def plain(path: Path, **fields: Any) -> Utterance:
    row = Utterance(utt_id="c/1", text="one two", duration_secs=1.0, recording_id="c/r", corpus="c", uri=str(path))
    return replace(row, **fields)


def exported(folder: Path, row: Utterance) -> Any:
    write_cuts([row], str(folder / "e.jsonl.gz"))
    [loaded] = lhotse.CutSet.from_file(folder / "e.jsonl.gz")
    lhotse.qa.validate_cut(loaded, read_data=True)
    return loaded


@pytest.mark.parametrize(
    ("channels", "offset", "duration"), [(2, 1.0, 1.0), (1, 1.0, 0.0), (1, 3.0, 1.09), (1, 0.0, 0.0)]
)
def test_an_exported_cut_has_the_samples_that_we_hear(
    tmp_path: Path, channels: int, offset: float, duration: float
) -> None:
    path = tmp_path / "r.wav"
    soundfile.write(path, samples(4.0, channels), RATE, subtype="FLOAT")
    row = plain(path, offset_secs=offset, duration_secs=duration, words=[Word("one", 0.1, 0.3), Word("two", 0.4, 0.9)])
    loaded = exported(tmp_path, row)
    assert np.array_equal(loaded.load_audio()[0], load_utterance(row, RATE))
    [back], rejects = read(tmp_path / "e.jsonl.gz", allow_outside=True)
    assert not rejects
    assert back.words == row.words
    assert np.array_equal(load_utterance(back, RATE), load_utterance(row, RATE))


def test_a_score_of_zero_is_exported(tmp_path: Path) -> None:
    (tmp_path / "r.flac").write_bytes(flac())
    exported(tmp_path, plain(tmp_path / "r.flac", align_score=0.0))
    assert read(tmp_path / "e.jsonl.gz", allow_outside=True)[0][0].align_score == 0.0


def test_a_remote_recording_is_fetched_once_for_all_its_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/damage/long.flac", flac())
    requests: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(type(fs), name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            requests.append(name)
            return original(self, *args, **kwargs)

        return call

    for name in ("info", "cat_file"):
        monkeypatch.setattr(type(fs), name, counted(name))
    rows = [replace(plain(Path()), uri="memory://damage/long.flac", offset_secs=float(i)) for i in range(4)]
    heard = np.concatenate([load_utterance(row, RATE) for row in rows])
    assert np.array_equal(heard, load_audio(flac())[0])
    assert sorted(requests) == ["cat_file", "info"]


def test_m4a_is_named_as_such() -> None:
    with pytest.raises(BadInput, match="M4A or MP4 cannot be decoded"):
        load_audio(b"\0\0\0\x20ftypM4A " + bytes(200))


def test_a_set_of_ids_agrees_with_pythons() -> None:
    draws = [f"c/{number}" for number in np.random.default_rng(0).integers(0, 4000, 9000)]
    ids, known = IdSet(), set()
    for name in draws:
        assert ids.add(name) == (name not in known)
        known.add(name)
    assert len(known) > 2**10, "the table did not have to grow"


# ---- manifests


def missing_first(folder: Path, num_missing: int) -> Path:
    lost = [
        cut(
            id=f"a{i}", recording={"id": f"r{i}", "sources": [{"type": "file", "channels": [0], "source": f"{i}.flac"}]}
        )
        for i in range(num_missing)
    ]
    return manifest(folder, *lost, cut(id="b"))


@pytest.mark.parametrize("settings", [{}, {"root": True}])
def test_a_corpus_may_lack_its_first_recordings(tmp_path: Path, settings: dict[str, bool]) -> None:
    path = missing_first(tmp_path, 120)
    utterances, rejects = read(path, **({"root": str(tmp_path)} if settings else {}))
    assert len(utterances) == 121
    assert not rejects
    assert len(load_utterance(utterances[-1], RATE)) == RATE
    with pytest.raises(BadInput, match="no such audio file"):
        load_utterance(utterances[0], RATE)
    (tmp_path / "audio/r.flac").unlink()
    with pytest.raises(ConfigError, match=r"points nowhere: 0\.flac is not under"):
        read(path)


def test_a_second_manifest_has_the_audio(tmp_path: Path) -> None:
    manifest(tmp_path, cut(id="b")).rename(tmp_path / "z.jsonl")
    lost = cut(id="a", recording={"sources": [{"type": "file", "channels": [0], "source": "lost.flac"}]})
    manifest(tmp_path, lost)
    assert {row.utt_id for row in read(tmp_path)[0]} == {"c/a", "c/b"}


@pytest.mark.parametrize("end", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.bz2", ".jsonl.xz"])
@pytest.mark.parametrize("packing", ["none", "gzip", "zstd", "bz2", "xz"])
def test_a_manifest_is_what_its_bytes_say(tmp_path: Path, end: str, packing: str) -> None:
    """Also with a byte order mark, which some editors leave."""
    path = manifest(tmp_path, cut(id="a"), cut(id="b"))
    data = b"\xef\xbb\xbf" + path.read_bytes()
    path.unlink()
    (tmp_path / f"cuts{end}").write_bytes(
        {
            "none": lambda: data,
            "gzip": lambda: gzip.compress(data) + b"junk",
            "zstd": lambda: pa.compress(data, "zstd", asbytes=True),
            "bz2": lambda: bz2.compress(data),
            "xz": lambda: lzma.compress(data),
        }[packing]()
    )
    utterances, rejects = read(tmp_path)
    assert [row.utt_id for row in utterances] == ["c/a", "c/b"]
    assert not rejects


def test_files_of_other_kinds_beside_manifests_and_tars_are_told(tmp_path: Path) -> None:
    """Beside a manifest that is packed in another way: no word of it would be a loss that nobody sees."""
    manifest(tmp_path, cut(id="a"))
    packed = manifest(tmp_path / "other", cut(id="b")).read_bytes()
    (tmp_path / "more.jsonl.xz").write_bytes(lzma.compress(packed))
    for name in ("cuts.jsonl.lz4", "cuts.json.gz", "recordings.tar.zst", "cuts_dev.yaml", "README.md", "info.json"):
        (tmp_path / name).write_bytes(b"x")
    utterances, rejects = read(tmp_path)
    assert [row.utt_id for row in utterances] == ["c/a", "c/b"]
    assert [key.rpartition("/")[2] for key in rejects] == [
        "cuts.json.gz", "cuts.jsonl.lz4", "cuts_dev.yaml", "recordings.tar.zst",
    ]  # fmt: skip
    assert all("not read" in reason for reason in rejects.values())
    assert all(source_stamp(source) for source in find_sources(CorpusConfig(path=str(tmp_path))))


def test_every_other_file_beside_a_table_is_told(tmp_path: Path) -> None:
    (tmp_path / "transcripts.tsv").write_text("utt_id\taudio\ttext\na\ta.wav\tone\n")
    for name in ("transcripts2.tsv", "part-00001", "x.pq", "README", "a.wav", "info.json"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "audio").mkdir()
    utterances, rejects = read(tmp_path)
    assert [row.utt_id for row in utterances] == ["c/a"]
    assert [key.rpartition("/")[2] for key in rejects] == ["part-00001", "transcripts2.tsv", "x.pq"]


@pytest.mark.parametrize("field", ["id", "text", "speaker"])
def test_a_nul_in_what_a_manifest_says_costs_its_row(tmp_path: Path, field: str) -> None:
    bad = cut(id="a")
    (bad if field == "id" else bad["supervisions"][0])[field] = "one\0two"
    manifest(tmp_path, bad, cut(id="b"))
    utterances, rejects = read(tmp_path)
    assert [row.utt_id for row in utterances] == ["c/b"]
    assert list(rejects) == ["c/one\\0two" if field == "id" else "c/a"]
    assert all("NUL" in reason for reason in rejects.values())


@pytest.mark.parametrize("column", [0, 2, 3])
def test_a_nul_in_a_table_costs_its_row(tmp_path: Path, column: int) -> None:
    fields = ["a", "a.wav", "one", "s"]
    fields[column] += "\0x"
    (tmp_path / "transcripts.tsv").write_text(
        "utt_id\taudio\ttext\tspeaker\n" + "\t".join(fields) + "\nb\tb.wav\ttwo\ts\n"
    )
    utterances, rejects = read(tmp_path)
    assert [row.utt_id for row in utterances] == ["c/b"]
    assert len(rejects) == 1


def test_tars_in_linked_folders_are_found(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "EN").symlink_to(shared_data / "formats/emilia/Emilia/EN")
    (tmp_path / "EN-B000001.tar.bz2").write_bytes(b"x")
    utterances, rejects = read(tmp_path)
    assert len(utterances) == 21
    assert list(rejects) == [f"c/{tmp_path}/EN-B000001.tar.bz2"]


def test_scores_that_are_written_out_are_scores(tmp_path: Path) -> None:
    path = manifest(tmp_path, cut(custom={"dnsmos": "2.5"}), cut(id="none", custom={"dnsmos": "unknown"}))
    assert [row.dnsmos for row in read(path)[0]] == [2.5, None]


def test_a_manifest_with_bytes_behind_its_gzip_is_read_whole(cases: Path) -> None:
    utterances, rejects = read(cases / "manifest_gz/trailing_junk.jsonl.gz")
    assert (len(utterances), rejects) == (300, {})


@pytest.mark.parametrize("with_root", [True, False])
def test_a_missing_first_book_costs_its_cuts(cases: Path, with_root: bool) -> None:
    folder = cases / "corpus_missing_first_book"
    utterances, rejects = read(folder, **({"root": str(folder)} if with_root else {}))
    assert not rejects
    kept, lost = [], []
    for row in utterances:
        try:
            check_recording(row, RecordedQualityConfig())
            kept.append(row.utt_id)
        except BadInput as error:
            lost.append(str(error))
    assert (len(kept), len(lost)) == (70, 60)
    assert all("no such audio file" in reason for reason in lost)


def test_an_exported_mp3_without_a_header_has_its_true_length(tmp_path: Path) -> None:
    noise = samples(4.0)
    file = io.BytesIO()
    soundfile.write(file, noise, RATE, format="MP3", bitrate_mode="VARIABLE")
    data = file.getvalue()
    headerless = data[data.index(data[:2], 4) :]
    row = replace(plain(Path(), duration_secs=0.0), uri=None, audio=headerless)
    write_cuts([row], str(tmp_path / "e.jsonl.gz"))
    [loaded] = lhotse.CutSet.from_file(tmp_path / "e.jsonl.gz")
    assert loaded.recording.num_samples == len(load_utterance(row, RATE))
    assert loaded.duration == pytest.approx(4.0, abs=0.15)
