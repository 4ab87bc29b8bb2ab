"""The pipeline on real Ray, Ray Train and DeepSpeed, with everything small: runs, resumes, refuses, adds up."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from factories import redo, run_stage, table_of

from salad_ray import pipeline
from salad_ray.config import Config
from salad_ray.flow import made_from
from salad_ray.model.speech_lm import SpeechLM, load_text_lm, weights_fingerprint
from salad_ray.runs import Run, open_run
from salad_ray.tables import Features, Measurement, PlanRow, Utterance


def test_the_run_ends_with_a_table_of_what_was_measured(finished_run: Config) -> None:
    metrics = json.loads(Path(finished_run.run_dir, "report/metrics.json").read_text())
    untrained, trained = metrics["untrained"], metrics["stage1"]
    assert untrained["misalignment"] > 0
    assert untrained["forgetting"] == pytest.approx(0, abs=1e-6)  # the student still is its teacher
    assert trained["forgetting"] > 0
    assert trained["num_positions"] > 0
    assert trained["train_seconds"] > 0
    heard = {name: row["heard"] for name, row in trained["by_domain"].items()}
    assert [name for name, is_heard in heard.items() if not is_heard] == sorted(finished_run.world.unheard)
    assert all(math.isfinite(row["misalignment"]) for row in trained["by_domain"].values())
    assert untrained["num_scored"] == trained["num_scored"]


def test_every_row_is_kept_or_rejected(finished_run: Config) -> None:
    for step in pipeline.steps(finished_run):
        for name in step.tables:
            manifest = table_of(finished_run, step.set, name).manifest() or {}
            if "num_input" in manifest:
                assert manifest["num_input"] == manifest["num_kept"] + manifest["num_rejected"], name
    utterances = _rows(finished_run, "natural", "utterances", Utterance)
    features = _rows(finished_run, "natural", "features", Features)
    assert {row.utt_id for row in utterances} == {row.utt_id for row in features}
    assert len(features) == finished_run.world.num_natural
    assert not {row.speaker for row in utterances} & {
        row.speaker for row in _rows(finished_run, "heldout", "utterances", Utterance)
    }


def test_every_epoch_of_the_plan_has_every_utterance_once(finished_run: Config) -> None:
    plan: list[PlanRow] = _rows(finished_run, "natural", "plan", PlanRow)
    for epoch in {row.epoch for row in plan}:
        placed = [
            (segment.shard, index)
            for row in plan
            if row.epoch == epoch
            for segment in row.segments
            for index in segment.rows
        ]
        assert len(placed) == len(set(placed)) == finished_run.world.num_natural


def test_the_trained_model_loads_without_ray_and_differs_from_its_teacher(finished_run: Config) -> None:
    model = SpeechLM.from_pretrained(f"{finished_run.run_dir}/stage1/model")
    teacher = load_text_lm(f"{table_of(finished_run, '', 'teacher').url}/model", None)
    assert model.config.encoder.name == "log_mel"
    assert weights_fingerprint(model.llm) != weights_fingerprint(teacher)
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def test_a_second_run_does_nothing(finished_run: Config, capsys: pytest.CaptureFixture[str]) -> None:
    before = _times(finished_run)
    pipeline.run_all(finished_run)
    printed = capsys.readouterr().out
    assert printed.count("done already") >= len(pipeline.steps(finished_run)) - 1  # the report
    assert not [line for line in printed.splitlines() if "kept in" in line or "shards," in line or "step " in line]
    assert _times(finished_run) == before


def test_what_changes_nothing_of_a_table_leaves_it_where_it_is(finished_run: Config) -> None:
    before = pipeline.resolve(finished_run).places
    faster = finished_run.encode.model_copy(update={"batch_secs": 5.0})
    assert pipeline.resolve(finished_run.model_copy(update={"encode": faster})).places == before
    select = finished_run.select.model_copy(update={"gamma": 0.0})
    other = pipeline.resolve(finished_run.model_copy(update={"select": select})).places
    changed = [label for label, key in before.keys.items() if other.keys[label] != key]
    assert changed[0] == "active/selection"
    assert set(changed) == set(made_from(pipeline.steps(finished_run), ["active/selection", "active/passages"]))
    seed = pipeline.resolve(finished_run.model_copy(update={"seed": 1})).places
    assert not set(seed.keys.values()) & set(before.keys.values())


@pytest.mark.slow
def test_an_interrupted_stage_continues_where_its_shards_end(finished_run: Config, tmp_path: Path) -> None:
    run_dir = tmp_path / "copy"
    shutil.copytree(finished_run.run_dir, run_dir, symlinks=True)
    config = finished_run.model_copy(update={"run_dir": str(run_dir)})
    table = Path(table_of(config, "natural", "features").url)
    kept, lost = sorted(table.glob("*.parquet"))[:2]
    content, time = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    (table / "manifest.json").unlink()
    run_stage(config, "encode", "natural")
    assert lost.read_bytes() == content
    assert kept.stat().st_mtime_ns == time
    assert json.loads((table / "manifest.json").read_text())["num_kept"] == config.world.num_natural


@pytest.mark.slow
def test_a_longer_training_adds_epochs_and_leaves_the_first_alone(finished_run: Config, tmp_path: Path) -> None:
    run_dir = tmp_path / "copy"
    shutil.copytree(finished_run.run_dir, run_dir, symlinks=True)
    longer = finished_run.distill.model_copy(update={"num_steps": 40})
    config = finished_run.model_copy(update={"run_dir": str(run_dir), "distill": longer})
    plan = Path(table_of(config, "natural", "plan").url)
    before = {path.name: path.read_bytes() for path in plan.glob("*.parquet")}
    run_stage(config, "pack", "natural")
    after = {path.name: path.read_bytes() for path in plan.glob("*.parquet")}
    assert len(after) > len(before)
    assert {name: after[name] for name in before} == before


def test_status_tells_how_far_each_table_is(finished_run: Config) -> None:
    run = open_run(finished_run.run_dir)
    rows = {(row["stage"], row["set"]): row for row in pipeline.status(run)}
    assert rows[("encode", "natural")]["state"] == "done"
    assert rows[("encode", "natural")]["rows"] == str(finished_run.world.num_natural)
    assert rows[("encode", "natural")]["place"] == f"natural/features/{run.places.keys['natural/features']}"
    empty = Run(run.config, replace(run.places, run_dir="/nowhere"))
    assert {row["state"] for row in pipeline.status(empty)} == {"not begun"}


@pytest.mark.slow
def test_measurements_are_the_same_when_repeated(finished_run: Config, tmp_path: Path) -> None:
    run_dir = tmp_path / "copy"
    shutil.copytree(finished_run.run_dir, run_dir, symlinks=True)
    config = finished_run.model_copy(update={"run_dir": str(run_dir)})
    before = _rows(config, "heldout", "measurements_stage1", Measurement)
    redo(config, "measure", "heldout")
    run_stage(config, "measure", "heldout")
    assert _rows(config, "heldout", "measurements_stage1", Measurement) == before


def _rows(config: Config, set_name: str, name: str, row_type: type) -> list:
    table = table_of(config, set_name, name)
    return [row for shard in table.shards() for row in table.read_rows(row_type, shard)]


def _times(config: Config) -> dict[str, int]:
    paths = Path(config.run_dir).glob("**/manifest.json")
    return {str(path): path.stat().st_mtime_ns for path in paths if "checkpoints" not in path.parts}
