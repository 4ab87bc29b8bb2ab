"""Training on real Ray Train and DeepSpeed: it stops before a bad update and continues after a kill, at any ZeRO."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from salad_ray import pipeline
from salad_ray.config import Config, dump_config
from salad_ray.model.speech_lm import SpeechLM
from salad_ray.stages.common import StageError


def untrained_copy(run: Config, folder: Path, **distill: object) -> Config:
    """A copy of a finished run, as it was before Stage I."""
    shutil.copytree(run.run_dir, folder, ignore=shutil.ignore_patterns("stage1", "measurements_stage1", "report"))
    return run.model_copy(update={"run_dir": str(folder), "distill": run.distill.model_copy(update=distill)})


def training_log(config: Config) -> list[dict[str, float]]:
    return json.loads(Path(config.run_dir, "stage1", "result.json").read_text())["log"]


def losses(config: Config) -> list[tuple[float, float]]:
    return [(row["step"], row["loss"]) for row in training_log(config)]


def test_a_loss_that_is_not_finite_stops_before_the_update(finished_run: Config, tmp_path: Path) -> None:
    config = untrained_copy(finished_run, tmp_path / "run", learning_rate=1e30, warmup_share=0.0)
    with pytest.raises(StageError, match=r"the loss of step \d+ is not finite; the weights were not updated"):
        pipeline.run_stage(config, "stage1", "natural")
    assert not Path(config.run_dir, "stage1", "model").exists()
    assert not Path(config.run_dir, "stage1", "manifest.json").exists()


def test_a_killed_run_continues_from_its_checkpoint_with_the_same_losses(finished_run: Config, tmp_path: Path) -> None:
    config = untrained_copy(finished_run, tmp_path / "run")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    driver = subprocess.Popen([sys.executable, "-m", "salad_ray.cli", "stage1", str(path)])
    snapshot = Path(config.run_dir, "stage1", "checkpoint_manager_snapshot.json")
    deadline = time.monotonic() + 180
    while not snapshot.exists() and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    assert snapshot.exists()
    assert not Path(config.run_dir, "stage1", "manifest.json").exists(), "it had ended before it was killed"
    first_checkpoint = Path(config.run_dir, "stage1", "step-00000003").stat().st_mtime_ns
    pipeline.run_stage(config, "stage1", "natural")
    assert losses(config) == losses(finished_run)
    assert Path(config.run_dir, "stage1", "step-00000003").stat().st_mtime_ns == first_checkpoint, "it began anew"


@pytest.mark.parametrize("stage", [0, 3])
def test_the_zero_stages_agree(finished_run: Config, tmp_path: Path, stage: int) -> None:
    """ZeRO 3 shards the head and the tied embedding; the loss gathers them. The reference is ZeRO 2."""
    config = untrained_copy(finished_run, tmp_path / "run", zero_stage=stage)
    pipeline.run_stage(config, "stage1", "natural")
    for (step, loss), (reference_step, reference) in zip(losses(config), losses(finished_run), strict=True):
        assert step == reference_step
        assert loss == pytest.approx(reference, rel=1e-4)
    weights = SpeechLM.from_pretrained(f"{config.run_dir}/stage1/model").state_dict()
    for name, tensor in SpeechLM.from_pretrained(f"{finished_run.run_dir}/stage1/model").state_dict().items():
        assert weights[name].numpy() == pytest.approx(tensor.numpy(), abs=2e-4), name


def test_bf16_with_accumulation_checkpointing_and_all_losses(finished_run: Config, tmp_path: Path) -> None:
    switches = {"precision": "bf16", "num_workers": 1, "activation_checkpointing": True, "alpha": 0.5}
    config = untrained_copy(finished_run, tmp_path / "run", **switches)
    pipeline.run_stage(config, "stage1", "natural")
    first = training_log(config)[0]
    assert first["loss"] == pytest.approx(0.5 * first["kl"] + 0.5 * first["nll"], rel=1e-3)
    reference = training_log(finished_run)[0]
    assert first["num_positions"] == reference["num_positions"]  # the same rows, whatever the number of workers
    assert first["kl"] == pytest.approx(reference["kl"], abs=0.02)
