"""Text alone on real Ray, a shrunken quickstart: what it is made of, and what training says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from factories import rejects_of, table_of

from salad_ray.config import Config
from salad_ray.stages.ingest import WorldText
from salad_ray.tables import Item, Passage, PlanRow
from salad_ray.text.decontaminate import benchmark_ngrams, contaminated


def passages_of(config: Config, set_name: str) -> list[Passage]:
    table = table_of(config, set_name, "passages")
    return [row for shard in table.shards() for row in table.read_rows(Passage, shard)]


def test_text_has_nothing_that_is_measured_by_text_or_by_id(finished_run: Config) -> None:
    text = passages_of(finished_run, "text")
    assert 0.5 * finished_run.world.num_text < len(text) <= finished_run.world.num_text
    assert {row.split for row in text} == {"train"}
    assert len({row.domain for row in text}) == 6  # unheard ones, too
    for name in ("heldout", "probe", "active", "web"):
        others = passages_of(finished_run, name)
        assert others
        assert not {row.text for row in text} & {row.text for row in others}, name
        assert not {row.passage_id for row in text} & {row.passage_id for row in others}, name
    items = table_of(finished_run, "benchmark", "items")
    asked = [row for shard in items.shards() for row in items.read_rows(Item, shard)]
    assert not {row.text for row in text} & {row.spoken for row in asked}
    prompts = benchmark_ngrams([f"{row.before}{row.spoken}{row.after}" for row in asked], 13)
    assert not any(contaminated(row.text, prompts) for row in text)
    lost = rejects_of(finished_run, "text", "passages")
    assert len(text) + len(lost) == finished_run.world.num_text


def test_a_document_of_the_web_or_of_a_question_is_a_reject() -> None:
    """As many documents as there is chance to draw one twice."""
    config = Config.model_validate({"world": {"num_text": 4000, "num_web": 4000, "num_questions": 240}})
    worker = WorldText(config)
    reasons = [reject.reason for index in range(16) for part in worker(index) for reject in part.rejects]
    assert any("with a benchmark" in reason for reason in reasons)
    worker.web |= {row.text: row.passage_id for row in worker.passages[:40]}
    parts = [part for index in range(16) for part in worker(index)]
    found = [reject for part in parts for reject in part.rejects if "may be measured" in reject.reason]
    assert 0 < len(found) <= 40 + len(reasons)
    assert sum(part.num_kept + len(part.rejects) for part in parts) == sum(part.num_input for part in parts) == 4000


def test_the_plan_of_text_is_one_epoch_of_all_passages(finished_run: Config) -> None:
    plan = table_of(finished_run, "text", "plan")
    rows = [row for shard in plan.shards() for row in plan.read_rows(PlanRow, shard)]
    assert {row.epoch for row in rows} == {0}
    placed = [(segment.shard, *segment.rows) for row in rows for segment in row.segments]
    assert len(placed) == len(set(placed)) == len(passages_of(finished_run, "text"))
    assert (plan.manifest() or {})["totals"] == {"tokens cut off at the context": 0}


@pytest.mark.parametrize("name", ["trunk", "stage1", "stage2", "control"])
def test_training_tells_text_apart(finished_run: Config, name: str) -> None:
    manifest = table_of(finished_run, "", name).manifest() or {}
    assert 0 < manifest["num_text_positions"] < manifest["num_positions"]
    for row in manifest["log"]:
        assert row["text_kl"] >= 0
        assert 0 < row["num_text_positions"] < row["num_positions"]
    if name == "trunk":
        assert manifest["log"][0]["text_kl"] < 0.1 * manifest["log"][0]["kl"]  # the student began as its teacher


def test_metrics_have_positions_with_and_without_text(finished_run: Config) -> None:
    metrics = json.loads(Path(finished_run.run_dir, "report/metrics.json").read_text())
    for name in ("stage1", "stage2", "control"):
        manifest = table_of(finished_run, "", name).manifest() or {}
        assert metrics[name]["num_positions"] == manifest["num_positions"]
        assert metrics[name]["num_text_positions"] == manifest["num_text_positions"] > 0
