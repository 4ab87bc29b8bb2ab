"""The pipeline on real Ray, Ray Train and DeepSpeed, with everything small: runs, resumes, refuses, adds up."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from salad_ray import pipeline
from salad_ray.config import Config
from salad_ray.model.speech_lm import SpeechLM, load_text_lm, weights_fingerprint
from salad_ray.stages.shards import StageError
from salad_ray.tables import Features, Measurement, PlanRow, Table, Utterance


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
            manifest = Table(finished_run.run_dir, step.set, name).manifest() or {}
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
    teacher = load_text_lm(f"{finished_run.run_dir}/teacher/model", None)
    assert model.config.encoder.name == "log_mel"
    assert weights_fingerprint(model.llm) != weights_fingerprint(teacher)
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def test_a_second_run_does_nothing(finished_run: Config, capsys: pytest.CaptureFixture[str]) -> None:
    before = _times(finished_run)
    pipeline.run_all(finished_run)
    printed = capsys.readouterr().out
    assert printed.count("done already") >= len(pipeline.steps(finished_run)) - 2  # report, and select's two tables
    assert not [line for line in printed.splitlines() if "kept in" in line or "shards," in line or "step " in line]
    assert _times(finished_run) == before


def test_outputs_of_different_configs_are_not_mixed(finished_run: Config) -> None:
    other = finished_run.model_copy(update={"seed": 1})
    with pytest.raises(StageError, match=r"seed: 0 → 1.*--redo"):
        pipeline.run_stage(other, "ingest", "natural")
    faster = finished_run.model_copy(update={"encode": finished_run.encode.model_copy(update={"batch_secs": 5.0})})
    pipeline.run_stage(faster, "encode", "natural")


def test_an_interrupted_stage_continues_where_its_shards_end(finished_run: Config, tmp_path: Path) -> None:
    run_dir = tmp_path / "copy"
    shutil.copytree(finished_run.run_dir, run_dir)
    config = finished_run.model_copy(update={"run_dir": str(run_dir)})
    table = run_dir / "natural" / "features"
    kept, lost = sorted(table.glob("*.parquet"))[:2]
    content, time = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    (table / "manifest.json").unlink()
    pipeline.run_stage(config, "encode", "natural")
    assert lost.read_bytes() == content
    assert kept.stat().st_mtime_ns == time
    assert json.loads((table / "manifest.json").read_text())["num_kept"] == config.world.num_natural


def test_a_longer_training_adds_epochs_and_leaves_the_first_alone(finished_run: Config, tmp_path: Path) -> None:
    run_dir = tmp_path / "copy"
    shutil.copytree(finished_run.run_dir, run_dir)
    longer = finished_run.distill.model_copy(update={"num_steps": 40})
    config = finished_run.model_copy(update={"run_dir": str(run_dir), "distill": longer})
    plan = run_dir / "natural" / "plan"
    before = {path.name: path.read_bytes() for path in plan.glob("*.parquet")}
    pipeline.run_stage(config, "pack", "natural")
    after = {path.name: path.read_bytes() for path in plan.glob("*.parquet")}
    assert len(after) > len(before)
    assert {name: after[name] for name in before} == before


def test_status_tells_how_far_each_table_is(finished_run: Config) -> None:
    rows = {(row["stage"], row["set"]): row for row in pipeline.status(finished_run)}
    assert rows[("encode", "natural")]["state"] == "done"
    assert rows[("encode", "natural")]["rows"] == str(finished_run.world.num_natural)
    empty = finished_run.model_copy(update={"run_dir": "/nowhere"})
    assert {row["state"] for row in pipeline.status(empty)} == {"not begun"}


def test_measurements_are_the_same_when_repeated(finished_run: Config, tmp_path: Path) -> None:
    run_dir = tmp_path / "copy"
    shutil.copytree(finished_run.run_dir, run_dir)
    config = finished_run.model_copy(update={"run_dir": str(run_dir)})
    before = _rows(config, "heldout", "measurements_stage1", Measurement)
    pipeline.redo(config, "measure", "heldout")
    pipeline.run_stage(config, "measure", "heldout")
    assert _rows(config, "heldout", "measurements_stage1", Measurement) == before


def _rows(config: Config, set_name: str, name: str, row_type: type) -> list:
    table = Table(config.run_dir, set_name, name)
    return [row for shard in table.shards() for row in table.read_rows(row_type, shard)]


def _times(config: Config) -> dict[str, int]:
    paths = Path(config.run_dir).glob("**/manifest.json")
    tables = (path for path in paths if path.parent.name != "report" and "checkpoints" not in path.parts)
    return {str(path): path.stat().st_mtime_ns for path in tables}
