"""Tables: what is written is what is read, and a shard is there whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import fsspec
import pytest
from factories import a_table

from salad_ray.store import scratch_folder
from salad_ray.tables import (
    READ_AT_ONCE,
    Features,
    Measurement,
    Passage,
    PlanRow,
    PlanSegment,
    Reject,
    Span,
    TableError,
    Utterance,
    Word,
    delete_folder,
    each_shard,
    file_exists,
    fingerprint,
    local_folder,
    put_folder,
    read_bytes,
    sampled_digest,
    stable_hash,
    to_arrow,
    write_bytes,
)

ROWS = [
    Passage(passage_id="p", doc_id="d", text="Ein Wort — 語\n", domain="law"),
    Utterance(utt_id="u", text="a b", duration_secs=1.5, recording_id="r", corpus="c", words=[Word("a", 0.0, 0.5)]),
    Utterance(utt_id="u", text="a b", duration_secs=1.5, recording_id="r", corpus="c", audio=b"\x00fLaC"),
    Features(
        utt_id="u",
        recording_id="r",
        offset_secs=0.0,
        duration_secs=0.16,
        domain="",
        split="train",
        text="a",
        words=None,
        num_frames=2,
        frame_rate=12.5,
        dim=1,
        features=b"\x00\x01\x02\x03",
    ),
    PlanRow(
        lane=0, epoch=1, row=2, num_positions=9, num_labels=3, segments=[PlanSegment("s", [4, 5], [Span(0, 2, True)])]
    ),
    Reject("ingest", "u", "empty"),
    Measurement(
        system="stage1",
        passage="p",
        domain="law",
        distance=4,
        num_positions=7,
        misalignment=0.5,
        forgetting=0.25,
        distillation=1.0,
        nll_speech=2.0,
        nll_text=1.5,
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: type(row).__name__)
@pytest.mark.parametrize("place", ["{tmp}", "memory://{tmp}"])
def test_rows_survive_a_shard(row: object, place: str, tmp_path: Path) -> None:
    table = a_table(place.format(tmp=tmp_path), "natural", "rows")
    table.write("part-0", to_arrow(type(row), [row, row]))
    assert table.shards() == ["part-0"]
    assert table.read_rows(type(row), "part-0") == [row, row]
    assert table.manifest() is None
    table.delete()
    assert table.shards() == []


def test_a_missing_and_a_damaged_shard_name_the_file_and_the_remedy(tmp_path: Path) -> None:
    table = a_table(tmp_path, "natural", "rows")
    with pytest.raises(TableError, match=r"part-0\.parquet is missing; rerun"):
        table.read("part-0")
    table.write("part-0", to_arrow(Reject, [Reject("a", "b", "c")] * 100))
    whole = (tmp_path / "natural/rows/part-0.parquet").read_bytes()
    (tmp_path / "natural/rows/part-0.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TableError, match=r"part-0\.parquet is damaged"):
        table.read("part-0")


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "shard.parquet"
    write_bytes(str(target), b"old")
    local = fsspec.filesystem("file")
    monkeypatch.setattr(type(local), "mv", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_bytes(str(target), b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["shard.parquet"]
    assert target.read_bytes() == b"old"


def test_folders_go_to_a_store_and_come_back(tmp_path: Path) -> None:
    source = tmp_path / "model"
    (source / "llm").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "llm" / "weights").write_bytes(b"abc")
    for url in (str(tmp_path / "copy"), "memory://store/copy"):
        put_folder(str(source), url)
        put_folder(str(source), url)  # replaces
        with local_folder(url) as back:
            files = sorted(str(path.relative_to(back)) for path in Path(back).rglob("*") if path.is_file())
            assert files == ["config.json", "llm/weights"]
        assert Path(back).exists() == ("://" not in url)  # only a copy goes


@pytest.mark.parametrize("name", ["run?", "run*", "run[X]", "[!a]un?"])
@pytest.mark.parametrize("place", ["{tmp}", "memory://{tmp}", "file://{tmp}"])
def test_a_name_is_never_a_pattern(place: str, name: str, tmp_path: Path) -> None:
    model = tmp_path / "model[1]"
    (model / "llm").mkdir(parents=True)
    (model / "llm" / "a[b]").write_bytes(b"1")
    rows = to_arrow(Reject, [Reject("a", "b", "c")])
    own_run, other_run = (f"{place.format(tmp=tmp_path)}/{run}" for run in (name, "runX"))
    own, other = (a_table(run, "", "rows") for run in (own_run, other_run))
    for run, table in ((own_run, own), (other_run, other)):
        table.write("part-0", rows)
        put_folder(str(model), f"{run}/model")
    put_folder(str(model), f"{own_run}/model")  # replaces
    with local_folder(f"{own_run}/model") as back:
        assert [path.name for path in Path(back).rglob("*") if path.is_file()] == ["a[b]"]
    own.delete_shards("part-")
    assert own.shards() == []
    own.write("part-0", rows)
    own.delete()
    delete_folder(own_run)
    assert not file_exists(f"{own_run}/model/llm/a[b]")
    assert other.read("part-0").equals(rows)
    assert read_bytes(f"{other_run}/model/llm/a[b]") == b"1"


def test_a_removal_takes_all_but_what_a_link_leads_to(tmp_path: Path) -> None:
    table, rows = a_table(tmp_path, "", "rows"), to_arrow(Reject, [Reject("a", "b", "c")])
    table.write("part-0", rows)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_bytes(b"1")
    (tmp_path / "rows" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    write_bytes(f"{table.url}/pieces/part-0.parquet", b"1")
    table.delete()
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    assert (tmp_path / "elsewhere" / "kept").exists()


def test_a_file_is_known_by_samples_of_it(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    seen = set()
    for size in (0, 10, 2**20, 3 * 2**20 + 1, 40 * 2**20):
        data = bytearray(size)
        file.write_bytes(data)
        seen.add(sampled_digest(str(file)))
        assert sampled_digest(str(file)) in seen
        for place in {0, size // 2, size - 1} if 0 < size <= 16 * 2**20 else {0, size - 1} if size else ():
            data[place] = 1
            file.write_bytes(data)
            data[place] = 0
            assert sampled_digest(str(file)) not in seen
    assert len(seen) == 5


def test_shards_are_read_side_by_side_and_come_in_order() -> None:
    names = [f"part-{number}" for number in range(3 * READ_AT_ONCE + 1)]
    together = threading.Barrier(READ_AT_ONCE)
    read: list[str] = []

    def one(name: str) -> str:
        read.append(name)
        if name != names[-1]:
            together.wait(30)
        return name

    for number, name in enumerate(each_shard(one, names)):
        assert name == names[number]
        assert len(read) <= number + READ_AT_ONCE
    assert len(read) == len(names)


def test_a_copy_goes_after_an_error_too(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    put_folder(str(tmp_path / "model"), "memory://store/kept")
    with pytest.raises(ValueError, match="unusable"), local_folder("memory://store/kept") as back:
        raise ValueError("unusable")
    assert not Path(back).exists()
    with local_folder("memory://store/kept") as back:
        assert Path(back, "config.json").is_file()


def test_a_hub_id_is_left_alone(tmp_path: Path) -> None:
    for place in ("Qwen/Qwen2.5-3B", str(tmp_path)):
        with local_folder(place) as same:
            assert same == place
    assert tmp_path.is_dir()


def test_hashes_are_the_same_in_every_process() -> None:
    code = "from salad_ray.tables import *; print(stable_hash(1, 'a'), fingerprint({'b': [1], 'a': None}))"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert seen == [str(stable_hash(1, "a")), fingerprint({"a": None, "b": [1]})]
    assert stable_hash(1, "a") != stable_hash(1, "b")
    assert 0 <= stable_hash("x") < 2**64


def test_scratch_folders_of_killed_processes_go_and_those_of_living_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    holder = """
import sys, time
from salad_ray.store import scratch_folder
with scratch_folder() as folder:
    print(folder, flush=True)
    time.sleep(60)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", holder],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
        for _ in range(2)
    ]
    try:
        living, killed = (Path(process.stdout.readline().strip()) for process in processes if process.stdout)
        (killed / "weights").write_bytes(b"gigabytes")
        processes[1].kill()
        processes[1].wait()
        with scratch_folder() as young:
            assert killed.exists(), "it may have been made just now, and not be locked yet"
        long_ago = time.time() - 3600
        for folder in (living, killed):
            os.utime(folder, (long_ago, long_ago))
        with scratch_folder() as own:
            assert sorted(tmp_path.iterdir()) == sorted([living, Path(own)])
        assert not Path(young).exists()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert list(tmp_path.iterdir()) == [living]
