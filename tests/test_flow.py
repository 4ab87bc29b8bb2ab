"""The flow: what every stage reads is made before it, and a stage brings along what it needs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from factories import small_world_config, table_of, untrained_copy

from salad_ray import pipeline
from salad_ray.config import Config, ConfigError
from salad_ray.configfile import load_config, parse_config, replaced
from salad_ray.flow import STAGES, batches, steps, steps_of, with_needs

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def load(name: str) -> Config:
    return load_config(ROOT / "configs" / f"{name}.yaml", ["ingest.corpora=[corpus]"] if name == "real" else [])


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_step_reads_was_written_before_and_nothing_is_written_twice(name: str) -> None:
    written: set[str] = set()
    for step in steps(load(name)):
        assert step.stage in STAGES
        assert {*step.reads, *step.reads_if_there} <= written, step
        assert not written & set(step.writes), step
        written |= set(step.writes)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_step_has_readers_or_is_an_end(name: str) -> None:
    """Only the report is read by people alone."""
    flow = steps(load(name))
    read = {table for step in flow for table in (*step.reads, *step.reads_if_there)}
    assert {table for step in flow for table in step.writes} == read


def test_every_declared_stage_has_its_module_and_the_other_way_round() -> None:
    helpers = {"common", "shards", "ray_cluster", "training", "__init__"}
    modules = {path.stem for path in (ROOT / "salad_ray" / "stages").glob("*.py")} - helpers
    assert modules == set(STAGES)


def test_a_stage_needs_what_leads_to_it_and_nothing_else() -> None:
    config = load("quickstart")

    def needed(stage: str, set_name: str = "natural") -> list[str]:
        return [f"{each.stage} {each.set}".strip() for each in with_needs(config, steps_of(config, stage, set_name))]

    assert needed("stage1") == [
        "ingest web", "ingest natural", "ingest text", "synthesize natural", "encode natural", "teacher", "pack text",
        "pack natural", "trunk", "stage1",
    ]  # fmt: skip
    assert needed("embed") == ["ingest web", "embed web"]
    assert needed("encode", "heldout") == ["ingest heldout", "synthesize heldout", "encode heldout"]
    assert "select active" in needed("stage2")


def test_trainings_that_follow_each_other_share_a_train_job() -> None:
    config = load("quickstart")
    jobs = [[step.tables[0] for step in batch] for batch in batches(config, steps(config)) if batch[0].trains]
    assert jobs == [["trunk", "stage1"], ["stage2", "control"]]
    alone = steps_of(config, "trunk", "natural")
    assert batches(config, alone) == [alone]


def test_on_cpus_measuring_and_evaluating_share_actors_and_on_gpus_they_do_not() -> None:
    config = load("quickstart")
    on_gpus = replaced(config, {"evaluate.num_gpus": 1.0})

    def shared(config: Config) -> list[set[str]]:
        return [{step.stage for step in batch} for batch in batches(config, steps(config)) if batch[0].by_shard]

    assert shared(config)[-1] == {"measure", "evaluate"}
    assert shared(on_gpus)[-2:] == [{"measure"}, {"evaluate"}]


def test_looking_at_stage_one_trains_no_second_stage(tmp_path: Path) -> None:
    config = load("quickstart").model_copy(update={"run_dir": str(tmp_path)})
    for stage, set_name in (("measure", "heldout"), ("measure", "probe"), ("evaluate", "benchmark"), ("report", "")):
        wanted = pipeline._without_later_models(config, steps_of(config, stage, set_name))
        needed = {step.stage for step in with_needs(config, wanted)}
        assert {"stage1", stage} <= needed
        assert "stage2" not in needed


def test_sets_that_are_not_named_are_all_but_the_probe() -> None:
    config = load("quickstart")
    assert {step.set for step in steps_of(config, "measure", "natural")} == {"heldout"}
    assert [step.set for step in steps_of(config, "measure", "probe")] == ["probe"]
    assert [step.set for step in steps_of(config, "encode", "natural")] == ["natural"]
    assert steps_of(config, "encode", "web") == []


def test_a_stage_on_a_set_that_it_does_not_work_on_is_refused(tmp_path: Path) -> None:
    config = parse_config(small_world_config(tmp_path))
    with pytest.raises(ConfigError, match="works on text, natural, active, not on set=heldout"):
        pipeline.make(config, "pack", "heldout")


def test_a_stage_that_is_no_step_is_refused(tmp_path: Path) -> None:
    config = parse_config(small_world_config(tmp_path) | {"stage2": None})
    with pytest.raises(ConfigError, match="in this config the stage 'stage2' has no part"):
        pipeline.make(config, "stage2", "natural")


@pytest.mark.slow
def test_asking_for_a_stage_makes_what_it_needs_that_is_missing(finished_run: Config, tmp_path: Path) -> None:
    """From a run without features, plan and held-out speech; what `stage1` does not need stays away."""
    config = untrained_copy(finished_run, tmp_path / "run", num_steps=3)
    for gone in ("natural/features", "natural/plan", "heldout", "web/embeddings"):
        shutil.rmtree(tmp_path / "run" / gone, ignore_errors=True)
    kept = table_of(config, "natural", "utterances").manifest()
    pipeline.make(replaced(config, {"stage2": None}), "stage1", "natural")
    for set_name, name in (("natural", "features"), ("natural", "plan"), ("", "stage1")):
        assert table_of(config, set_name, name).manifest() is not None
    assert table_of(config, "natural", "utterances").manifest() == kept
    assert not (tmp_path / "run" / "heldout").exists()
    version = (table_of(config, "natural", "plan").manifest() or {})["version"]
    pipeline.make(replaced(config, {"stage2": None}), "pack", "natural", redo=True)
    assert (table_of(config, "natural", "plan").manifest() or {})["version"] != version
