"""Dealing on real Ray: how far it is, and how many tasks there may be at once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import a_table, run_stage, table_of

from salad_ray import pipeline
from salad_ray.config import Config
from salad_ray.configfile import parse_config
from salad_ray.stages import ingest
from salad_ray.stages.common import gather
from salad_ray.tables import read_json
from salad_ray.text.world import DOMAINS, world_passages

NUM_FILES = 6


def web_config(folder: Path, web: Path, **ray: Any) -> Config:
    settings = {"web": [{"path": str(web), "name": "web"}], "num_shards": 3}
    sections = {"ray": {"num_cpus": 2} | ray, "ingest": settings, "pack": {"num_lanes": 3}}
    return parse_config({"run_dir": str(folder)} | sections)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    for number in range(NUM_FILES):
        rows = [{"text": row.text, "id": row.passage_id} for row in world_passages(60, DOMAINS, number, "train")]
        pq.write_table(pa.Table.from_pylist([*rows, {"text": None, "id": "none"}]), folder / f"{number}.parquet")
    return folder


@pytest.mark.slow
def test_ingest_tells_how_far_it_is_and_max_actors_changes_no_row(web: Path, tmp_path: Path) -> None:
    tables = []
    for name, settings in (("all", {}), ("one", {"max_actors": 1})):
        config = web_config(tmp_path / name, web, **settings)
        run_stage(config, "ingest", "web")
        table = table_of(config, "web", "passages")
        tables.append([table.read(shard) for shard in table.shards()])
        note, manifest = read_json(f"{table.url}/progress.json"), table.manifest()
        assert note is not None
        assert manifest is not None
        assert note["num_input"] == manifest["num_input"]
        assert note["num_rejected"] == NUM_FILES
        assert (note["sources_read"], note["sources"]) == (NUM_FILES, NUM_FILES)
        assert note["done"] == note["total"] == NUM_FILES + 3
        assert note["rows_per_sec"] > 0
    assert tables[0] == tables[1]


def test_status_reads_the_note_of_an_ingest_at_work(web: Path, tmp_path: Path) -> None:
    config = web_config(tmp_path, web)
    table = a_table(tmp_path, "web", "passages")
    tags = {"run": config.run_dir, "stage": "ingest", "set": "web"}
    pace = ingest.DealingPace(table, tags, 2, 3)
    pace.note()
    assert read_json(f"{table.url}/progress.json") is None

    def scan(item: dict[str, Any]) -> Iterator[pa.Table]:
        yield pa.table({"reason": pa.array([None] * 9 + ["empty"], pa.string())})

    item = {"source": np.array(["a"]), "corpus": np.array(["{}"])}
    assert len(list(ingest._counted(scan, f"{table.url}/scanned", tags, item))) == 1
    pace.note()
    row = pipeline._table_status(table)
    assert row["state"].startswith("1/2 sources read, 0 shards, ")
    assert "ETA" in row["state"]
    assert (row["rows"], row["rejects"]) == ("10", "1")


def test_a_source_that_is_being_read_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "SCAN_NOTE_SECS", 0.0)
    item, tags = {"source": np.array(["a"]), "corpus": np.array(["{}"])}, {"run": "", "stage": "ingest", "set": "web"}
    pieces = ingest._counted(lambda _: iter([pa.table({"a": [1, 2]})] * 2), f"{tmp_path}/scanned", tags, item)
    next(pieces), next(pieces)
    [note] = (tmp_path / "scanned/reading").glob("*.json")
    assert read_json(str(note)) == {"source": "a", "num_rows": 2, "num_rejected": 0, "read": False}
    assert ingest._num_scanned(f"{tmp_path}/scanned") == 0
    list(pieces)
    again = ingest._counted(lambda _: iter([pa.table({"a": [1, 2]})] * 2), f"{tmp_path}/scanned", tags, item)
    next(again), next(again)  # after a machine was lost; what was read is still what it was
    assert ingest._num_scanned(f"{tmp_path}/scanned") == 4


def test_no_more_shards_are_gathered_at_once_than_max_actors(tmp_path: Path) -> None:
    def work(shard: str) -> pa.Table:
        started = time.time()
        time.sleep(0.4)
        return pa.table({"shard": [shard], "started": [started], "ended": [time.time()]})

    shards = [f"s{number}" for number in range(4)]
    found = gather(web_config(tmp_path, tmp_path, max_actors=1), "test", shards, work)
    assert found["shard"].to_pylist() == shards
    spans = sorted(zip(found["started"].to_pylist(), found["ended"].to_pylist(), strict=True))
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_shards_in_which_nothing_is_found_are_an_empty_table(tmp_path: Path) -> None:
    empty = pa.table({"shard": pa.array([], pa.string())})
    assert gather(web_config(tmp_path, tmp_path), "test", ["a", "b"], lambda _: empty) == empty
