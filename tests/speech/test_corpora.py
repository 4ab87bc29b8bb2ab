"""Corpora in their true formats: every record an utterance or a reject, audio by reference, nothing outside opened."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import lhotse
import numpy as np
import pytest
import soundfile

from salad_ray.config import ConfigError, CorpusConfig, RecordedQualityConfig
from salad_ray.speech import archives, readers
from salad_ray.speech.audio import check_recording, load_audio, load_utterance
from salad_ray.speech.corpora import (
    EMILIA,
    LIBRILIGHT,
    NO_LONGER_KNOWN,
    YODAS,
    attributions,
    find_sources,
    scan,
    source_stamp,
)
from salad_ray.speech.lhotse_cuts import write_cuts
from salad_ray.speech.readers import read_folder
from salad_ray.tables import BadInput, Reject, Utterance, Word

RATE = 16000


def read(
    path: str | Path, unpacked: str = "memory://unpacked", **settings: Any
) -> tuple[list[Utterance], list[Reject]]:
    corpus = CorpusConfig(path=str(path), **settings)
    rows = [row for source in find_sources(corpus) for row in scan(source, corpus, 2**20, unpacked)]
    utterances = [row for row in rows if isinstance(row, Utterance)]
    return utterances, [row for row in rows if isinstance(row, Reject)]


def tone(secs: float = 1.0, level: float = 0.1) -> np.ndarray:
    noise = np.random.default_rng(0).standard_normal(int(secs * RATE))
    return (level * noise).astype(np.float32)


def wav(secs: float = 1.0) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, tone(secs), RATE, format="FLAC")
    return file.getvalue()


# ---- the true formats


@pytest.mark.parametrize(
    ("path", "count", "license", "source", "order"),
    [
        ("libriheavy", 20, "public domain", "Art of Printing/text.txt", None),
        ("libriheavy/cases_and_punc/lhotse", 20, "public domain", "art_printing_0107_librivox_64kb_mp3", None),
        ("libriheavy/upper_no_punc/kaldi/small", 20, "public domain", "art_printing_0107_librivox_64kb_mp3", None),
        ("emilia/Emilia/EN", 21, "CC BY-NC 4.0", "EN_B00000_S00000", 1),
        ("emilia/Emilia-YODAS", 8, "CC BY 4.0", "abcDEF0hijk", 1),
        ("emilia/raw_layout", 6, "CC BY-NC 4.0", "EN_B00000_S00000", 1),
    ],
)
def test_the_papers_corpora_are_read_as_they_are(
    shared_data: Path, tmp_path: Path, path: str, count: int, license: str, source: str, order: int | None
) -> None:
    formats = shared_data / "formats"
    root = str(formats / "libriheavy") if path.startswith("libriheavy") else None
    utterances, rejects = read(formats / path, str(tmp_path), root=root)
    assert not rejects
    assert len(utterances) == len({row.utt_id for row in utterances}) == count
    assert {row.license for row in utterances} == {license}
    assert {row.language for row in utterances} == {"en"}
    assert utterances[1].source.endswith(source)
    assert utterances[1].order == order
    for row in utterances:
        checked = check_recording(row, RecordedQualityConfig())
        assert checked.duration_secs == pytest.approx(row.duration_secs, abs=0.1)


def test_all_formats_refer_to_the_same_audio_and_text(shared_data: Path, tmp_path: Path) -> None:
    """The examples hold the same readings: LJ001-0001 is a cut, a Kaldi segment and, as MP3, a member of a tar."""
    formats = shared_data / "formats"
    full = read(formats / "libriheavy")[0][0]
    root = str(formats / "libriheavy")
    cased = read(formats / "libriheavy/cases_and_punc/lhotse", root=root)[0][0]
    kaldi = read(formats / "libriheavy/cases_and_punc/kaldi/small", root=root)[0][0]
    emilia = read(formats / "emilia/Emilia/EN")[0][0]
    raw = read(formats / "emilia/raw_layout", str(tmp_path))[0][0]
    assert full.text == cased.text == kaldi.text == emilia.text == raw.text
    assert read(formats / "libriheavy", text="recogniser")[0][0].text == full.text.upper().replace(",", "")
    expected = load_utterance(full, RATE)
    assert np.array_equal(load_utterance(cased, RATE), expected)
    assert np.array_equal(load_utterance(kaldi, RATE), expected)
    for row in (emilia, raw):
        heard = load_utterance(row, RATE)[: len(expected)]
        assert np.corrcoef(heard, expected[: len(heard)])[0, 1] > 0.99


def test_the_text_before_a_cut_is_kept(shared_data: Path) -> None:
    first, second, *_ = read(shared_data / "formats" / "libriheavy")[0]
    assert first.pre_text == ""
    assert second.pre_text == first.text


def test_known_corpora_are_attributed_and_the_users_words_win(shared_data: Path) -> None:
    paths = {
        "full": "libriheavy", "cased": "libriheavy/cases_and_punc/lhotse",
        "kaldi": "libriheavy/upper_no_punc/kaldi/small", "plain": "emilia/Emilia/EN", "yodas": "emilia/Emilia-YODAS",
        "raw": "emilia/raw_layout",
    }  # fmt: skip
    formats = shared_data / "formats"
    corpora = [
        CorpusConfig(path=str(formats / path), name=name, root=str(formats / path.split("/")[0]))
        for name, path in paths.items()
    ]
    names = attributions([*corpora, CorpusConfig(path="z/mine", attribution="A. Reader")])
    assert names == {
        "full": LIBRILIGHT, "cased": LIBRILIGHT, "kaldi": LIBRILIGHT, "plain": EMILIA, "yodas": YODAS, "raw": EMILIA,
        "mine": "A. Reader",
    }  # fmt: skip


def test_what_a_folder_is_called_attributes_nothing(tmp_path: Path) -> None:
    mine = tmp_path / "emilia" / "not-libriheavy"
    mine.mkdir(parents=True)
    (mine / "transcripts.tsv").write_text("utt_id\taudio\ttext\na\ta.wav\thello\n")
    theirs = tmp_path / "interviews"
    theirs.mkdir()
    make_tar(theirs / "a.tar", [("k.mp3", b"x"), ("broken.json", b"{"), ("k.json", record())])
    make_tar(theirs / "b.tar", [("k.json", record(_id="k")), ("k.mp3", b"x")])
    gone = CorpusConfig(path=str(tmp_path / "gone"))
    corpora = [CorpusConfig(path=str(mine)), CorpusConfig(path=str(theirs)), gone]
    assert attributions(corpora) == {
        "not-libriheavy": "", "interviews": f"{EMILIA}; {YODAS}", "gone": NO_LONGER_KNOWN,
    }  # fmt: skip


def test_a_configured_licence_wins_over_the_known_one(shared_data: Path) -> None:
    utterances, _ = read(shared_data / "formats/emilia/Emilia/EN", license="by agreement", name="em")
    assert {row.license for row in utterances} == {"by agreement"}
    assert all(row.utt_id.startswith("em/EN_B00000_") for row in utterances)


def test_everything_is_read_from_an_object_store(shared_data: Path) -> None:
    fs = fsspec.filesystem("memory")
    for name in ("libriheavy", "emilia"):
        fs.put(str(shared_data / "formats" / name), f"/corpora/{name}", recursive=True)
    local = {row.utt_id: row for row in read(shared_data / "formats/libriheavy")[0]}
    utterances, rejects = read("memory://corpora/libriheavy")
    assert (len(utterances), rejects) == (20, [])
    for row in utterances[:3]:
        assert row.uri is not None
        assert row.uri.startswith("memory://")
        assert np.array_equal(load_utterance(row, RATE), load_utterance(local[row.utt_id], RATE))
    assert len(read("memory://corpora/emilia/Emilia-YODAS")[0]) == 8
    raw, rejects = read("memory://corpora/emilia/raw_layout")
    assert (len(raw), rejects) == (6, [])
    assert check_recording(raw[0], RecordedQualityConfig()).duration_secs == pytest.approx(
        raw[0].duration_secs, abs=0.1
    )


# ---- tars


def make_tar(path: Path, entries: list[tuple[str, bytes] | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
                continue
            name, data = entry
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def record(text: str = "hello there", **fields: Any) -> bytes:
    return json.dumps({"id": "x", "text": text, "speaker": "S", "language": "en", "dnsmos": 3.1} | fields).encode()


def test_members_are_paired_by_key_and_what_has_no_partner_is_named(tmp_path: Path) -> None:
    entries: list[tuple[str, bytes]] = [
        ("B_W000001.mp3", wav()),
        ("A_W000000.json", record("first")),
        ("B_W000001.json", record("second")),
        ("alone.json", record()),
        ("A_W000000.mp3", wav(0.5)),
        ("mute.mp3", wav()),
        ("broken.json", b"{not json"),
        ("broken.mp3", wav()),
        ("empty.json", record("  ")),
        ("empty.mp3", wav()),
        ("A_W000000.flac", wav()),
        ("notes.txt", b"notes"),
    ]
    utterances, rejects = read(make_tar(tmp_path / "x.tar", entries), name="c")
    assert [(row.utt_id, row.text, row.recording_id, row.order) for row in utterances] == [
        ("c/A_W000000", "first", "c/A", 0),
        ("c/B_W000001", "second", "c/B", 1),
    ]
    assert len(load_utterance(utterances[0], RATE)) == RATE // 2
    reasons = {row.key: row.reason for row in rejects}
    assert reasons["c/alone"] == "a JSON file without audio of its key"
    assert reasons["c/mute"] == "audio without a JSON file of its key"
    assert "its JSON cannot be read" in reasons["c/broken"]
    assert reasons["c/empty"] == "empty transcript"
    assert "already" in reasons["c/A_W000000.flac"]
    assert reasons["c/notes.txt"] == "neither JSON nor audio"
    assert len(rejects) == 6


@pytest.mark.parametrize("keep", [0.3, 0.62, 0.97])
def test_a_tar_that_is_cut_off_keeps_what_is_whole_and_says_where_it_ends(
    shared_data: Path, tmp_path: Path, keep: float
) -> None:
    data = (shared_data / "formats/emilia/Emilia/EN/EN-B000000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: int(keep * len(data))])
    utterances, rejects = read(tmp_path / "cut.tar")
    whole = read(shared_data / "formats/emilia/Emilia/EN", name="cut")[0]
    assert 0 < len(utterances) < len(whole)
    assert [row.text for row in utterances] == [row.text for row in whole[: len(utterances)]]
    assert any("truncated" in row.reason for row in rejects)
    for row in utterances:
        check_recording(row, RecordedQualityConfig())


def test_a_tar_that_is_cut_between_two_members_is_noticed(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", [("a.json", record()), ("a.mp3", wav())])
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    data = path.read_bytes()
    path.write_bytes(data[: last.offset_data + -(-last.size // 512) * 512])
    utterances, rejects = read(path)
    assert len(utterances) == 1
    assert "without its end mark" in rejects[0].reason


def test_names_that_leave_the_folder_and_links_and_giants_are_refused(tmp_path: Path) -> None:
    link = tarfile.TarInfo("link.mp3")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("device.mp3")
    device.type = tarfile.CHRTYPE
    big = b"\0" * (2**20 + 1)
    entries: list[tuple[str, bytes] | tarfile.TarInfo] = [
        ("../up.json", record()), ("/abs.json", record()), ("a/../../b.mp3", wav()), ("C:/x.mp3", wav()),
        link, device, ("big.mp3", big), ("big.json", record()), ("meta.json", b" " * (2**20 + 1)), ("meta.mp3", wav()),
        ("good.json", record()), ("good.mp3", wav()),
    ]  # fmt: skip
    utterances, rejects = read(make_tar(tmp_path / "x.tar", entries), name="c")
    assert [row.utt_id for row in utterances] == ["c/good"]
    reasons = {row.key: row.reason for row in rejects}
    for name in ("../up.json", "/abs.json", "a/../../b.mp3", "C:/x.mp3"):
        assert reasons[f"c/{name}"] == "its name leaves the archive's folder"
    for name in ("link.mp3", "device.mp3"):
        assert "not a plain file" in reasons[f"c/{name}"]
    for name in ("big.mp3", "meta.json"):
        assert "ingest.max_member_bytes" in reasons[f"c/{name}"]
    assert not (tmp_path.parent / "up.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"x.tar"}


def test_a_forged_header_is_not_read_into_memory(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", [("a.json", record()), ("a.mp3", wav()), ("n" * 300 + ".json", record())])
    data = bytearray(path.read_bytes())
    place = data.index(b"././@LongLink")
    data[place + 124 : place + 136] = b"77777777777\0"  # 8 GiB of name
    data[place + 148 : place + 156] = b"        "
    checksum = sum(data[place : place + 512])
    data[place + 148 : place + 156] = f"{checksum:06o}\0 ".encode()
    path.write_bytes(bytes(data))
    utterances, rejects = read(path)
    assert len(utterances) == 1
    assert "a header of" in rejects[0].reason


def raw_layout(folder: Path, lines: list[bytes], members: list[tuple[str, bytes]], compress: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "B.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    data = make_tar(folder / "B.tar", list(members)).read_bytes()
    (folder / "B.tar").unlink()
    (folder / "B.tar.gz").write_bytes(gzip.compress(data) if compress else data)
    return folder


def test_the_older_layout_pairs_lines_and_members(tmp_path: Path) -> None:
    lines = [
        record(id="K_W000002", wav="a/k.mp3"),
        record(id="gone", wav="a/gone.mp3"),
        b"{broken",
        record(id="again", wav="a/k.mp3"),
    ]
    folder = raw_layout(tmp_path / "raw", lines, [("a/k.mp3", wav()), ("a/unnamed.mp3", wav())])
    utterances, rejects = read(folder, str(tmp_path / "unpacked"))
    assert [(row.utt_id, row.order) for row in utterances] == [("raw/K_W000002", 2)]
    assert len(load_utterance(utterances[0], RATE)) == RATE
    reasons = {row.key: row.reason for row in rejects}
    assert "not in the archive" in reasons["raw/gone"]
    assert "another line names" in reasons["raw/again"]
    assert reasons["raw/a/unnamed.mp3"] == "no line of the table names it"
    assert len(rejects) == 4
    [unpacked] = (tmp_path / "unpacked").rglob("*.tar")
    before = unpacked.stat().st_mtime_ns
    read(folder, str(tmp_path / "unpacked"))
    assert unpacked.stat().st_mtime_ns == before, "decompressed twice"


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "FREE_BYTES", 2**16)
    monkeypatch.setattr(readers, "READ_BYTES", 2**14)
    folder = raw_layout(tmp_path / "raw", [record(id="k", wav="k.mp3")], [("k.mp3", b"\0" * 2**20)])
    utterances, rejects = read(folder, str(tmp_path / "unpacked"))
    assert not utterances
    assert any("decompression bomb" in row.reason for row in rejects)
    assert not list((tmp_path / "unpacked").rglob("*.tar"))


def test_bytes_behind_a_whole_tar_gz_cost_nothing(tmp_path: Path) -> None:
    folder = raw_layout(tmp_path / "raw", [record(id="k", wav="k.mp3")], [("k.mp3", bytes(50))])
    path = folder / "B.tar.gz"
    path.write_bytes(path.read_bytes() + b"trailing")
    assert [row.utt_id for row in read(folder, str(tmp_path / "unpacked"))[0]] == ["raw/k"]


@pytest.mark.parametrize("cut", [True, False])
def test_a_damaged_tar_gz_is_said(tmp_path: Path, cut: bool) -> None:
    lines = [record(id=f"k{i}", wav=f"k{i}.mp3") for i in range(4)]
    noise = np.random.default_rng(0).bytes
    folder = raw_layout(tmp_path / "raw", lines, [(f"k{i}.mp3", noise(50_000)) for i in range(4)], compress=cut)
    if cut:
        path = folder / "B.tar.gz"
        path.write_bytes(path.read_bytes()[:120_000])
    utterances, rejects = read(folder, str(tmp_path / "unpacked"))
    assert len(utterances) == (2 if cut else 0)
    assert any(("truncated" if cut else "not a gzip file") in row.reason for row in rejects)


# ---- manifests


def cut(**changes: Any) -> dict[str, Any]:
    recording = {
        "id": "r", "sources": [{"type": "file", "channels": [0], "source": "audio/r.flac"}], "sampling_rate": RATE,
        "num_samples": 4 * RATE, "duration": 4.0, "channel_ids": [0],
    }  # fmt: skip
    recording |= changes.pop("recording", {})
    supervision = {"id": "s", "recording_id": "r", "start": 0.0, "duration": 1.0, "channel": 0, "text": "one two"}
    supervision |= changes.pop("supervision", {})
    return {
        "id": "c", "start": 0.0, "duration": 1.0, "channel": 0, "supervisions": [supervision], "recording": recording,
        "type": "MonoCut",
    } | changes  # fmt: skip


def write_manifest(folder: Path, cuts: list[dict[str, Any] | str], name: str = "cuts.jsonl") -> Path:
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / "audio" / "r.flac", tone(4.0), RATE)
    path = folder / name
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in cuts).encode()
    path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return path


def test_every_line_of_a_manifest_is_an_utterance_or_a_reject(tmp_path: Path) -> None:
    outside = {"sources": [{"type": "file", "channels": [0], "source": "/etc/passwd"}]}
    url = {"sources": [{"type": "url", "channels": [0], "source": "http://x/y.wav"}]}
    command = {"sources": [{"type": "command", "channels": [0], "source": "cat /etc/passwd"}]}
    speed = {"transforms": [{"name": "Speed", "kwargs": {"factor": 1.1}}]}
    lines: list[dict[str, Any] | str] = [
        cut(id="good"),
        "{broken\n",
        cut(id="beyond", start=3.5, supervision={"duration": 2.0}),
        cut(id="outside", recording=outside),
        cut(id="url", recording=url),
        cut(id="command", recording=command),
        cut(id="transformed", recording=speed),
        cut(id="stereo", recording={"channel_ids": [0, 1]}),
        cut(id="mute", supervision={"text": " "}),
        cut(id="unsupervised", supervisions=[]),
        cut(id="good"),
        {"id": "pad", "type": "PaddingCut", "duration": 1.0},
        '"just a string"\n',
        cut(id="last", start=2.0),
    ]
    utterances, rejects = read(write_manifest(tmp_path, lines), name="c")
    assert [row.utt_id for row in utterances] == ["c/good", "c/last"]
    assert np.array_equal(load_utterance(utterances[1], RATE), load_audio(str(tmp_path / "audio/r.flac"), 2.0, 1.0)[0])
    reasons = {row.key: row.reason for row in rejects}
    assert len(rejects) == 12
    assert "ends beyond its recording, which has 4.000 s" in reasons["c/beyond"]
    assert "leaves the folder" in reasons["c/outside"]
    assert "leaves the folder" in reasons["c/url"]
    assert "'command'" in reasons["c/command"]
    assert "transformed" in reasons["c/transformed"]
    assert "2 channels" in reasons["c/stereo"]
    assert reasons["c/mute"] == "empty transcript"
    assert reasons["c/good"] == "an utterance of this id was read already"
    allowed, _ = read(tmp_path / "cuts.jsonl", allow_outside=True)
    assert {"/etc/passwd", "http://x/y.wav"} <= {row.uri for row in allowed}


def test_several_supervisions_and_word_alignments_are_read(tmp_path: Path) -> None:
    words = [["one", 1.6, 0.2, None], ["two", 1.9, 0.3, None]]  # from the start of the recording
    first = {"id": "a", "recording_id": "r", "start": 0.5, "duration": 1.0, "channel": 0, "text": "one two"}
    first |= {"alignment": {"word": words}, "speaker": "Ann", "language": "English"}
    second = {"id": "b", "recording_id": "r", "start": 2.0, "duration": 0.5, "channel": 0, "text": "three four"}
    second |= {"alignment": {"word": words}}
    path = write_manifest(tmp_path, [cut(id="long", start=1.0, duration=3.0, supervisions=[first, second])])
    (left, right), rejects = read(path, name="c")
    assert not rejects
    assert (left.utt_id, left.offset_secs, left.speaker, left.language) == ("c/long/a", 1.5, "Ann", "en")
    assert left.words == [Word("one", 0.1, 0.3), Word("two", 0.4, 0.7)]
    assert (right.offset_secs, right.words) == (3.0, None), "an alignment of other words is not believed"


def test_a_manifest_that_points_nowhere_ends_before_anything_starts(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, [cut()])
    (tmp_path / "audio" / "r.flac").unlink()
    with pytest.raises(ConfigError, match=r"points nowhere: audio/r.flac is not under .* set the corpus' root"):
        find_sources(CorpusConfig(path=str(path)))
    with pytest.raises(ConfigError, match="points nowhere"):
        find_sources(CorpusConfig(path=str(path), root=str(tmp_path / "elsewhere")))


@pytest.mark.parametrize("where", ["gz", "deflate"])
def test_a_manifest_that_is_cut_off_keeps_its_whole_lines(tmp_path: Path, where: str) -> None:
    lines: list[dict[str, Any] | str] = [
        cut(id=f"c{i}", custom={"n": str(np.random.default_rng(i).bytes(99))}) for i in range(200)
    ]
    path = write_manifest(tmp_path, lines, "cuts.jsonl.gz")
    data = bytearray(path.read_bytes())
    if where == "gz":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2 : len(data) // 2 + 40] = b"\xff" * 40
        path.write_bytes(data)
    utterances, rejects = read(path)
    assert 10 < len(utterances) < 200
    assert any("truncated or damaged after line" in row.reason for row in rejects)


def test_what_is_written_lhotse_loads_with_the_same_audio_and_words(shared_data: Path, tmp_path: Path) -> None:
    formats = shared_data / "formats"
    rows = [
        *read(formats / "libriheavy")[0][:4],
        *read(formats / "emilia/Emilia-YODAS")[0][:3],
        Utterance(
            utt_id="made/é/1", text="one two", duration_secs=1.0, recording_id="made/r", corpus="made", audio=wav(),
            words=[Word("one", 0.1, 0.3), Word("two", 0.4, 0.9)], license="CC0", source="made/r",
        ),
    ]  # fmt: skip
    path = tmp_path / "cuts.jsonl.gz"
    assert write_cuts(rows, str(path)) == len(rows)
    cuts = lhotse.CutSet.from_file(path)
    lhotse.validate(cuts)
    for row, loaded in zip(rows, cuts, strict=True):
        samples = loaded.load_audio()[0]
        expected = load_utterance(row, loaded.sampling_rate)
        assert len(samples) == pytest.approx(len(expected), abs=loaded.sampling_rate / 1000)
        shared = min(len(samples), len(expected))
        assert np.allclose(samples[:shared], expected[:shared], atol=1e-4)
        assert loaded.supervisions[0].text == row.text
    assert [item.symbol for item in loaded.supervisions[0].alignment["word"]] == ["one", "two"]
    again, rejects = read(path, allow_outside=True, name="x")
    assert not rejects
    for row, back in zip(rows, again, strict=True):
        assert (back.text, back.words, back.speaker, back.language) == (row.text, row.words, row.speaker, row.language)
        assert (back.offset_secs, back.duration_secs) == pytest.approx((row.offset_secs, row.duration_secs), abs=1e-3)
        assert (back.order, back.recording_id) == (row.order, f"x/{row.recording_id}")
        assert (back.license, back.dnsmos, back.pre_text) == (row.license, row.dnsmos, row.pre_text)


def test_speech_that_was_held_out_stays_so_when_it_is_read_again(tmp_path: Path) -> None:
    (row,), _ = read(write_manifest(tmp_path, [cut(custom={"split": "test"})]))
    assert row.split == "", "still to be drawn: another's splits are not ours"
    splits = ["test", "train", "web", ""]
    rows = [replace(row, utt_id=f"c/{split}", split=split) for split in splits]
    write_cuts(rows, str(tmp_path / "out.jsonl.gz"))
    again, rejects = read(tmp_path / "out.jsonl.gz", allow_outside=True)
    assert not rejects
    assert [row.split for row in again] == ["test", "train", "", ""]
    assert {row.split for row in read(kaldi_folder(tmp_path / "k", text="r one two\n"))[0]} == {""}


# ---- Kaldi and what lies at a path


def kaldi_folder(folder: Path, **tables: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "audio").mkdir()
    soundfile.write(folder / "audio" / "r.flac", tone(4.0), RATE)
    for name, text in ({"wav.scp": "r audio/r.flac\n", "text": "u one two\n"} | tables).items():
        (folder / name).write_text(text)
    return folder


def test_kaldi_folders_without_segments_and_with_bad_rows(tmp_path: Path) -> None:
    plain, _ = read(kaldi_folder(tmp_path / "plain", text="r one two\n", utt2spk="r ann\n"))
    assert [(row.utt_id, row.duration_secs, row.speaker) for row in plain] == [("plain/r", 0.0, "ann")]
    wav_scp = "r audio/r.flac\np sph2pipe x |\nout /etc/passwd\n"
    segments = "u r 0.5 1.5\nb r 2 1\np1 p 0 1\no1 out 0 1\nm1 missing 0 1\nt1 r 0 1\nn1 r zero 1\n"
    text = "u one two\nb x\np1 x\no1 x\nm1 x\nn1 x\ne1\n"
    utterances, rejects = read(kaldi_folder(tmp_path / "k", **{"wav.scp": wav_scp, "segments": segments, "text": text}))
    assert [(row.utt_id, row.offset_secs, row.duration_secs) for row in utterances] == [("k/u", 0.5, 1.0)]
    reasons = {row.key: row.reason for row in rejects}
    assert "from 2 to 1 s" in reasons["k/b"]
    assert "commands are not run" in reasons["k/p1"]
    assert "leaves the folder" in reasons["k/o1"]
    assert "not in wav.scp" in reasons["k/m1"]
    assert "not recording, start and end" in reasons["k/n1"]
    assert reasons["k/t1"] == "a segment without a line in text"
    assert "k/e1" in reasons


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "no such file or folder"),
        (lambda folder: folder.mkdir(), "no Lhotse manifest"),
        (lambda folder: folder.write_text("x"), "a file, but a corpus is a folder"),
    ],
)
def test_a_path_with_nothing_known_is_one_sentence(tmp_path: Path, make: Any, words: str) -> None:
    make(tmp_path / "corpus")
    with pytest.raises(ConfigError, match=words) as error:
        find_sources(CorpusConfig(path=str(tmp_path / "corpus")))
    assert "\n" not in str(error.value)


def test_a_misspelt_path_is_guessed(tmp_path: Path) -> None:
    (tmp_path / "libriheavy").mkdir()
    with pytest.raises(ConfigError, match="did you mean 'libriheavy'"):
        find_sources(CorpusConfig(path=str(tmp_path / "libriheavvy")))


def test_a_source_that_changed_is_noticed(tmp_path: Path) -> None:
    path = write_manifest(tmp_path, [cut()])
    [source] = find_sources(CorpusConfig(path=str(path)))
    before = source_stamp(source)
    assert source_stamp(source) == before
    write_manifest(tmp_path, [cut(id="d")])
    assert source_stamp(source) != before


def test_an_archive_that_was_shortened_after_the_catalog_is_said(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", [("a.json", record()), ("a.mp3", wav())])
    [row], _ = read(path)
    shutil.copy(path, tmp_path / "whole.tar")
    path.write_bytes(path.read_bytes()[: (row.byte_start or 0) + 100])
    with pytest.raises(BadInput, match="truncated"):
        load_utterance(row, RATE)
    path.unlink()
    with pytest.raises(BadInput, match="no such audio file"):
        load_utterance(row, RATE)


def test_low_dnsmos_is_rejected(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", [("a.json", record()), ("a.mp3", wav())])
    [row], _ = read(path)
    check_recording(row, RecordedQualityConfig(min_dnsmos=3.0))
    with pytest.raises(BadInput, match=r"DNSMOS 3.10, below min_dnsmos=3.2"):
        check_recording(row, RecordedQualityConfig(min_dnsmos=3.2))


def test_a_folder_keeps_its_name_unless_given_another(tmp_path: Path) -> None:
    (tmp_path / "transcripts.tsv").write_text("utt_id\taudio\ttext\na\ta.wav\thello\n")
    assert read(tmp_path, name="other")[0][0].utt_id == "other/a"
    assert read_folder(str(tmp_path), "")[0][0].corpus == tmp_path.name
