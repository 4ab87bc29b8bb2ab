"""Checkpoints: whole or not at all, independent of who wrote them, pruned, and readable by the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from salad_ray.distill.checkpoints import (
    Checkpoint,
    CheckpointReader,
    CheckpointWriter,
    Partition,
    Piece,
    checkpoint_at,
    latest,
)
from salad_ray.tables import TableError

PARTS = ("weight", "exp_avg", "exp_avg_sq")
SIZES = {"embed": 37, "layer.0.weight": 64, "layer.1/bias": 5, "head": 101}


def model(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Part → parameter → values."""
    generator = torch.Generator().manual_seed(seed)
    return {part: {name: torch.randn(n, generator=generator) for name, n in SIZES.items()} for part in PARTS}


def cut(values: dict[str, dict[str, torch.Tensor]], rank: int, world_size: int) -> list[Partition]:
    """What ZeRO 2 would give a worker: an even piece of all parameters laid end to end, in two groups."""
    groups = [["embed", "layer.0.weight"], ["layer.1/bias", "head"]]
    return [_cut_group(values, group, rank, world_size) for group in groups]


def _cut_group(values: dict[str, dict[str, torch.Tensor]], group: list[str], rank: int, world_size: int) -> Partition:
    total = sum(SIZES[name] for name in group)
    width = -(-total // world_size)
    begin, end = rank * width, min((rank + 1) * width, total)
    flats = {part: torch.full((width,), -7.0) for part in PARTS}
    pieces, position = [], 0
    for name in group:
        first, last = max(begin, position), min(end, position + SIZES[name])
        if first < last:
            piece = Piece(name, first - position, last - first, first - begin)
            pieces.append(piece)
            for part in PARTS:
                own = values[part][name][piece.start : piece.start + piece.numel]
                flats[part][piece.offset : piece.offset + piece.numel] = own
        position += SIZES[name]
    return Partition(flats["weight"], pieces, {part: flats[part] for part in PARTS[1:]})


def save(url: str, step: int, world_size: int = 2, token: str = "abcd", keep: int = 9, stays: bool = False) -> None:
    values = model(step)
    writers = [CheckpointWriter(url, rank, world_size, token, keep) for rank in range(world_size)]
    for rank, writer in enumerate(writers):
        writer.save(cut(values, rank, world_size), {"step": step, "note": "n"}, stays)
    for writer in writers:
        writer.wait()


@pytest.mark.parametrize(("written_by", "read_by"), [(2, 2), (1, 3), (3, 1), (4, 3)])
@pytest.mark.parametrize("url", ["{tmp}/checkpoints", "memory://{tmp}/checkpoints"])
def test_any_number_of_workers_reads_what_any_other_wrote(
    tmp_path: Path, url: str, written_by: int, read_by: int
) -> None:
    url = url.format(tmp=tmp_path)
    save(url, 3, written_by)
    checkpoint = latest(url)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.state["note"]) == (3, "n")
    for rank in range(read_by):
        expected = cut(model(3), rank, read_by)
        found = cut(model(99), rank, read_by)
        for partition, wanted in zip(found, expected, strict=True):
            CheckpointReader(checkpoint).fill(partition)
            for part in PARTS:
                assert torch.equal(partition.part(part), wanted.part(part))


def test_what_is_saved_is_the_state_at_the_call_and_not_what_training_makes_of_it(tmp_path: Path) -> None:
    partitions = cut(model(1), 0, 1)
    before = partitions[0].weight.clone()
    writer = CheckpointWriter(str(tmp_path), 0, 1, "t", 2)
    writer.save(partitions, {"step": 1})
    partitions[0].weight += 1
    writer.wait()
    tensors = load_file(next(tmp_path.glob("step-*/rank-00000.safetensors")))
    assert torch.equal(tensors["weight/0/embed"], before[:37])


def test_a_checkpoint_without_all_its_files_is_none_and_the_last_whole_one_is_used(tmp_path: Path) -> None:
    url = str(tmp_path)
    for step in (1, 2, 3, 4):
        save(url, step)
    (tmp_path / "step-00000004-abcd" / "rank-00001.safetensors").unlink()
    cut_off = tmp_path / "step-00000003-abcd" / "rank-00000.safetensors"
    cut_off.write_bytes(cut_off.read_bytes()[:-4])
    half = tmp_path / "step-00000005-abcd"
    half.mkdir()
    (half / "rank-00000.safetensors").write_bytes(b"interrupted")
    said: list[str] = []
    checkpoint = latest(url, said.append)
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert len(said) == 3
    assert "step-00000005-abcd is not whole (its writing was interrupted)" in said[0]
    assert "step-00000004-abcd is not whole (rank-00001.safetensors is missing)" in said[1]
    assert "step-00000003-abcd is not whole (rank-00000.safetensors has" in said[2]


@pytest.mark.parametrize("content", [b"", b'{"files": {', b"\xff\xfe", b"[]", b"null", b'{"files": []}'])
def test_a_damaged_manifest_stops_neither_resuming_nor_saving(tmp_path: Path, content: bytes) -> None:
    url = str(tmp_path)
    for step in (1, 2):
        save(url, step)
    (tmp_path / "step-00000002-abcd" / "manifest.json").write_bytes(content)
    said: list[str] = []
    found = latest(url, said.append)
    assert found is not None
    assert found.step == 1
    [sentence] = said
    assert "step-00000002-abcd is not whole (its manifest.json is damaged)" in sentence
    with pytest.raises(TableError, match=r"no whole checkpoint of step 2; step-00000002-abcd is not whole \(its manif"):
        checkpoint_at(url, 2)
    save(url, 3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003-abcd"]


def test_the_checkpoint_of_a_step_is_the_whole_one(tmp_path: Path) -> None:
    url = str(tmp_path)
    save(url, 7, token="aaaa")
    save(url, 7, token="bbbb")
    (tmp_path / "step-00000007-bbbb" / "manifest.json").unlink()
    assert checkpoint_at(url, 7).url == f"{url}/step-00000007-aaaa"
    (tmp_path / "step-00000007-aaaa" / "rank-00000.safetensors").unlink()
    with pytest.raises(TableError, match=r"bbbb is not whole \(its writing was interr.*aaaa is not whole \(rank-00000"):
        checkpoint_at(url, 7)
    with pytest.raises(TableError, match="no whole checkpoint of step 8; rerun"):
        checkpoint_at(url, 8)


def test_no_folder_and_an_empty_folder_hold_no_checkpoint(tmp_path: Path) -> None:
    assert latest(str(tmp_path / "nowhere")) is None
    (tmp_path / "step-00000001-abcd").mkdir()
    said: list[str] = []
    assert latest(str(tmp_path), said.append) is None
    assert not said, "nothing was written yet"


def test_old_ones_are_pruned_but_not_those_that_stay(tmp_path: Path) -> None:
    url = str(tmp_path)
    interrupted = tmp_path / "step-00000002-gone"
    interrupted.mkdir()
    for step in (1, 2, 3, 4, 5):
        save(url, step, keep=2, stays=step == 2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000002-abcd", "step-00000004-abcd", "step-00000005-abcd"]


def test_damaged_ones_do_not_push_whole_ones_out(tmp_path: Path) -> None:
    url = str(tmp_path)
    for step in (1, 2, 3):
        save(url, step)
    for step in (2, 3):
        (tmp_path / f"step-{step:08d}-abcd" / "rank-00000.safetensors").unlink()
    save(url, 2, token="zzzz", keep=2)
    found = latest(url)
    assert found is not None
    assert (found.step, found.url) == (2, f"{url}/step-00000002-zzzz")
    assert (tmp_path / "step-00000001-abcd").exists()
    save(url, 4, token="zzzz", keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002-zzzz", "step-00000004-zzzz"]


def test_the_manifest_comes_last(tmp_path: Path) -> None:
    """Rank 0 alone writes no manifest: the other worker's file is not there."""
    writer = CheckpointWriter(str(tmp_path), 0, 2, "t", 2)
    writer.save(cut(model(1), 0, 2), {"step": 1})
    folder = tmp_path / "step-00000001-t"
    other = CheckpointWriter(str(tmp_path), 1, 2, "t", 2)
    while not (folder / "rank-00000.safetensors").exists():
        pass
    assert latest(str(tmp_path)) is None
    other.save(cut(model(1), 1, 2), {"step": 1})
    writer.wait()
    assert json.loads((folder / "manifest.json").read_text())["files"].keys() == {
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    }


def test_an_error_of_the_thread_is_raised_at_the_next_save(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    writer = CheckpointWriter(str(blocked), 0, 1, "t", 2)
    writer.save(cut(model(1), 0, 1), {"step": 1})
    with pytest.raises(OSError, match="file"):
        writer.save(cut(model(1), 0, 1), {"step": 2})


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save(str(tmp_path), 1)
    checkpoint = latest(str(tmp_path))
    assert isinstance(checkpoint, Checkpoint)
    wider = Partition(torch.zeros(40), [Piece("embed", 0, 40, 0)], {part: torch.zeros(40) for part in PARTS[1:]})
    with pytest.raises(TableError, match="holds 37 of the 40 elements of weight embed"):
        CheckpointReader(checkpoint).fill(wider)


def test_a_checkpoint_of_another_optimizer_is_refused_before_anything_is_overwritten(tmp_path: Path) -> None:
    save(str(tmp_path), 1)
    checkpoint = latest(str(tmp_path))
    assert isinstance(checkpoint, Checkpoint)
    of_muon = Partition(torch.zeros(37), [Piece("embed", 0, 37, 0)], {"momentum": torch.zeros(37)})
    with pytest.raises(
        TableError, match=r"step-00000001-abcd is of another optimizer: of embed it holds exp_avg, exp_"
    ):
        CheckpointReader(checkpoint).fill(of_muon)
    assert not of_muon.weight.any()
    writer = CheckpointWriter(str(tmp_path), 0, 1, "muon", 9)
    writer.save([of_muon], {"step": 2})
    writer.wait()
    checkpoint = latest(str(tmp_path))
    assert isinstance(checkpoint, Checkpoint)
    adam = {part: torch.zeros(37) for part in PARTS[1:]}
    with pytest.raises(
        TableError, match=r"it holds momentum, weight, and exp_avg, exp_avg_sq, weight is needed; set d"
    ):
        CheckpointReader(checkpoint).fill(Partition(torch.zeros(37), of_muon.pieces, adam))
