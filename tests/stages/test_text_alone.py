"""Text alone on real Ray, a shrunken quickstart: what it is made of, and what training says of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from factories import table_of

from salad_ray.config import Config, ConfigError
from salad_ray.configfile import parse_config
from salad_ray.stages import ingest
from salad_ray.stages.ingest import WorldPassages, WorldText
from salad_ray.tables import Item, Passage, PlanRow
from salad_ray.text.decontaminate import contaminated, word_ngrams
from salad_ray.text.world import DOMAINS, world_passages


def passages_of(config: Config, set_name: str) -> list[Passage]:
    table = table_of(config, set_name, "passages")
    return [row for shard in table.shards() for row in table.read_rows(Passage, shard)]


def test_text_has_nothing_that_is_measured_by_text_or_by_id(finished_run: Config) -> None:
    text = passages_of(finished_run, "text")
    assert len(text) == finished_run.world.num_text
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
    prompts = word_ngrams([f"{row.before}{row.spoken}{row.after}" for row in asked], 13)
    assert not any(contaminated(row.text, prompts) for row in text)


def test_documents_of_the_web_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two draws of the world hardly ever agree, so every third document of the text stands for the web's."""
    config = parse_config({"world": {"num_text": 300, "num_web": 100, "num_questions": 240}})
    drawn = world_passages(450, DOMAINS, config.seed, "text")

    def draw(num: int, domains: Sequence[str], seed: int, split: str) -> list[Passage]:
        return drawn[::3][:num] if split == "web" else world_passages(num, domains, seed, split)

    monkeypatch.setattr(ingest, "world_passages", draw)
    worker = WorldText(config)
    rows = [row for index in range(config.ingest.num_shards) for part in worker(index) for row in part.rows.to_pylist()]
    web = {row.text for row in drawn[::3][:100]}
    texts = {row["text"] for row in rows}
    assert len(rows) == len(texts) == 300
    assert not texts & web
    kept = [row.passage_id for row in drawn if row.text not in web]
    assert [row.passage_id for row in worker.passages] == kept[:300]


def test_a_smaller_world_is_smaller_everywhere() -> None:
    world = {"domains": ["animals", "music", "law"], "unheard": ["music"], "num_web": 60, "num_text": 30}
    config = parse_config({"world": world})
    sets = {"natural": {"animals", "law"}} | {name: set(world["domains"]) for name in ("heldout", "web")}
    for name, domains in sets.items():
        assert {row.domain for row in WorldPassages(config, name).passages} == domains, name
    assert {row.domain for row in WorldText(config).passages} == set(world["domains"])
    assert {item.domain for item in ingest._items(config) if isinstance(item, Item)} == set(world["domains"])


@pytest.mark.parametrize(
    ("world", "message"),
    [
        ({"domains": ["animals", "law"]}, r"world\.unheard=\['music'\] are not among world\.domains="),
        ({"domains": ["law"], "unheard": ["law"]}, "leave one of world.domains to be heard"),
    ],
)
def test_domains_that_do_not_fit_each_other(world: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"world": world})


def test_the_plan_of_text_is_one_epoch_of_all_passages(finished_run: Config) -> None:
    plan = table_of(finished_run, "text", "plan")
    rows = [row for shard in plan.shards() for row in plan.read_rows(PlanRow, shard)]
    assert {row.epoch for row in rows} == {0}
    placed = [(segment.shard, *segment.rows) for row in rows for segment in row.segments]
    assert len(placed) == len(set(placed)) == len(passages_of(finished_run, "text"))
    assert (plan.manifest() or {})["totals"] == {"num_tokens_cut": 0}


@pytest.mark.parametrize("name", ["trunk", "stage1", "stage2", "control"])
def test_training_tells_text_apart(finished_run: Config, name: str) -> None:
    manifest = table_of(finished_run, "", name).manifest() or {}
    assert 0 < manifest["num_text_positions"] < manifest["num_positions"]
    for row in manifest["log"]:
        assert row["text_kl"] >= 0
        assert 0 <= row["num_text_positions"] < row["num_positions"]
    if name == "trunk":
        first = next(row for row in manifest["log"] if row["num_text_positions"])
        assert first["text_kl"] < 0.2 * first["kl"]  # the student began as its teacher, and its adapter with nothing


def test_metrics_have_positions_with_and_without_text(finished_run: Config) -> None:
    metrics = json.loads(Path(finished_run.run_dir, "report/metrics.json").read_text())
    for name in ("stage1", "stage2", "control"):
        manifest = table_of(finished_run, "", name).manifest() or {}
        assert metrics[name]["num_positions"] == manifest["num_positions"]
        assert metrics[name]["num_text_positions"] == manifest["num_text_positions"] > 0
