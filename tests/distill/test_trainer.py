"""Training on real Ray Train and DeepSpeed: it stops before a bad update, and resumes after any kill, at any size."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from factories import run_stage, run_stages, table_of, untrained_copy
from ray.train import WorkerGroupError

from salad_ray import pipeline
from salad_ray.config import Config, DistillConfig
from salad_ray.configfile import dump_config, parse_config
from salad_ray.distill import trainer
from salad_ray.distill.trainer import SUMS, Distiller, Job, Progress, TrainingStopped, as_json, job_of
from salad_ray.flow import steps_of, with_needs
from salad_ray.model.speech_lm import EncoderSpec, SpeechLM
from salad_ray.tables import Table


def half_trained_copy(run: Config, folder: Path, last_step: int, **distill: object) -> Config:
    """A copy of a finished run as a kill after `last_step` would have left it."""
    shutil.copytree(run.run_dir, folder)
    trunk = Path(table_of(folder, "", "trunk").url)
    for name in ("manifest.json", "result.json", "starts.json"):
        (trunk / name).unlink()
    for checkpoint in (trunk / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > last_step:
            shutil.rmtree(checkpoint)
    return run.model_copy(update={"run_dir": str(folder), "distill": run.distill.model_copy(update=distill)})


def trunk_of(config: Config) -> Path:
    return folder_of(config, "trunk")


def folder_of(config: Config, name: str) -> Path:
    return Path(table_of(config, "", name).url)


def train_to_stage1(config: Config) -> None:
    """Trunk and Stage I in one Train job."""
    wanted = [*steps_of(config, "trunk", "natural"), *steps_of(config, "stage1", "natural")]
    pipeline.run_steps(pipeline.start(config, with_needs(config, wanted)), wanted, time.monotonic())


def weights(config: Config) -> dict[str, torch.Tensor]:
    return SpeechLM.from_pretrained(str(folder_of(config, "stage1") / "model")).state_dict()


def assert_same_model(config: Config, reference: Config) -> None:
    found, expected = weights(config), weights(reference)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    manifests = [table_of(each, "", "stage1").manifest() or {} for each in (config, reference)]
    for fact in ("step", "num_positions", "own_positions", "skipped_steps"):
        assert manifests[0][fact] == manifests[1][fact]
    logs = [[(row["step"], row["loss"]) for row in manifest["log"]] for manifest in manifests]
    assert logs[0] == logs[1]


def training_log(config: Config) -> list[dict[str, float]]:
    return json.loads((trunk_of(config) / "result.json").read_text())["log"]


def training_workers() -> list[psutil.Process]:
    """Of this process' Ray."""
    children = psutil.Process().children(recursive=True)
    return [
        each for each in children if "RayTrainWorker" in each.name() or "RayTrainWorker" in " ".join(each.cmdline())
    ]


def losses(config: Config) -> list[tuple[float, float]]:
    return [(row["step"], row["loss"]) for row in training_log(config)]


def starts(config: Config) -> list[dict]:
    return json.loads(Path(trunk_of(config), "starts.json").read_text())["starts"]


def manifests(config: Config) -> list[Path]:
    return sorted(Path(trunk_of(config), "checkpoints").glob("step-*/manifest.json"))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_before_the_update(finished_run: Config, tmp_path: Path) -> None:
    config = untrained_copy(finished_run, tmp_path / "run", learning_rate=1e30, warmup_steps=0)
    with pytest.raises(
        TrainingStopped, match=r"trunk: the loss of step \d+ is not finite; the weights were not updated"
    ):
        run_stage(config, "trunk", "natural")
    assert not (trunk_of(config) / "manifest.json").exists()


def test_every_start_says_what_was_loaded_and_that_the_student_is_its_teacher(finished_run: Config) -> None:
    [start] = starts(finished_run)
    assert start["student_weights"] == start["teacher_weights"] != ""
    teacher = table_of(finished_run, "", "teacher").manifest() or {}
    assert start["tokenizer_hash"] == teacher["tokenizer_hash"]
    assert start["llm_parameters"] == teacher["num_parameters"]
    assert (start["resumed_from"], start["num_workers"]) == (None, 2)
    card = Path(finished_run.run_dir, "stage1", "model", "README.md").read_text()
    assert teacher["tokenizer_hash"] in card


@pytest.mark.slow
@pytest.mark.parametrize("slow", [False, True])
def test_a_start_says_what_will_take_long(slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary that takes much of the work, and bf16 on a CPU that has no instructions for it."""
    said: list[str] = []
    monkeypatch.setattr(trainer, "say", said.append)
    monkeypatch.setattr(trainer, "has_fast_bfloat16", lambda: not slow)
    table, settings = Table(str(tmp_path), "", "trunk"), DistillConfig(precision="bf16", use_gpu=False)
    distiller = Distiller.__new__(Distiller)
    distiller.job = Job(None, table, (table, table), {}, None, settings, num_steps=1)  # type: ignore[arg-type]
    distiller.settings, distiller.world_size, distiller.begun_from, distiller.num_teacher = settings, 1, None, 900
    distiller.device, distiller.dtype = torch.device("cpu"), torch.bfloat16
    distiller.vocabulary, distiller.head_share = 49_152, 0.43 if slow else 0.09
    distiller.loaded = {"kl_before_step_0": {"student": 0.0}, "llm_tensors": 9, "llm_parameters": 900}
    distiller.loaded |= {"student_weights": "ab", "adapter_parameters": 9}
    distiller._note_start({"step": 0, "resumed_from": None})
    assert said[0].startswith("trunk: student = teacher before step 0: KL 0 nats in train mode")
    told = [
        "trunk: the vocabulary of 49,152 tokens takes about 43% of the FLOP",
        "trunk: this CPU has no bf16 instructions, so that distill.precision=bf16 can take ten times as long as fp32; "
        "set distill.precision=fp32 unless memory forbids it",
    ]
    assert said[1:] == (told if slow else [])
    assert json.loads((tmp_path / "starts.json").read_text())["starts"][0]["kl_before_step_0"] == {"student": 0.0}


def test_a_tokenizer_that_changed_since_planning_stops_the_start(finished_run: Config, tmp_path: Path) -> None:
    config = untrained_copy(finished_run, tmp_path / "run")
    manifest = Path(table_of(config, "", "teacher").url, "manifest.json")
    content = json.loads(manifest.read_text()) | {"tokenizer_hash": "another"}
    manifest.write_text(json.dumps(content))
    with pytest.raises(TrainingStopped, match="is not the one that the plan was made with"):
        run_stage(config, "trunk", "natural")


@pytest.mark.slow
def test_a_killed_driver_continues_from_its_checkpoint_with_the_same_losses(
    undisturbed: Config, tmp_path: Path
) -> None:
    config = untrained_copy(undisturbed, tmp_path / "run")
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    driver = subprocess.Popen([sys.executable, "-m", "salad_ray.cli", "trunk", str(path)])
    deadline = time.monotonic() + 180
    while not manifests(config) and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    assert manifests(config)
    assert not (trunk_of(config) / "manifest.json").exists(), "it had ended before it was killed"
    run_stage(config, "trunk", "natural")
    assert starts(config)[-1]["step"] >= 5, "it began anew"
    assert losses(config) == losses(undisturbed)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_losses_are_the_same(undisturbed: Config, tmp_path: Path) -> None:
    config = untrained_copy(undisturbed, tmp_path / "run")
    killed: list[int] = []

    def kill_one_after_the_first_checkpoint() -> None:
        while not manifests(config):
            time.sleep(0.05)
        process = training_workers()[0]
        process.kill()
        killed.append(process.pid)

    killer = threading.Thread(target=kill_one_after_the_first_checkpoint, daemon=True)
    killer.start()
    run_stage(config, "trunk", "natural")
    assert killed
    first, second = starts(config)
    assert first["step"] == 0
    assert second["step"] >= 5
    assert losses(config) == losses(undisturbed)


@pytest.mark.slow
def test_trunk_and_stage1_in_one_job_make_the_same_model_as_two_jobs(undisturbed: Config, tmp_path: Path) -> None:
    config = untrained_copy(undisturbed, tmp_path / "run")
    train_to_stage1(config)
    assert_same_model(config, undisturbed)
    assert losses(config) == losses(undisturbed)
    begun = [
        json.loads((folder_of(each, "stage1") / "starts.json").read_text())["starts"] for each in (config, undisturbed)
    ]
    assert [[Path(start["begun_from"]).name.split("-")[1] for start in own] for own in begun] == [["00000032"]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("max_failures", [0, 1])
def test_a_job_that_is_killed_in_stage1_continues_there_and_leaves_the_trunk_done(
    undisturbed: Config, tmp_path: Path, max_failures: int
) -> None:
    """With retries in the same job, whose new workers skip the trunk; without, by the next command."""
    config = untrained_copy(undisturbed, tmp_path / "run", max_failures=max_failures)
    killed: list[int] = []

    def kill_in_stage1() -> None:
        while not list(Path(config.run_dir, "stage1").glob("*/checkpoints/step-*/manifest.json")):
            time.sleep(0.01)
        process = training_workers()[0]
        process.kill()
        killed.append(process.pid)

    threading.Thread(target=kill_in_stage1, daemon=True).start()
    if max_failures == 0:
        with pytest.raises(WorkerGroupError):
            train_to_stage1(config)
        assert table_of(config, "", "trunk").manifest() is not None
        assert table_of(config, "", "stage1").manifest() is None
    train_to_stage1(config)
    assert killed
    assert len(starts(config)) == 1, "the trunk was trained again"
    first, second = (table_of(config, "", "stage1").manifest() or {})["starts"]
    assert (first["step"], first["resumed_from"]) == (0, None)
    assert second["step"] >= 5
    assert_same_model(config, undisturbed)


@pytest.mark.slow
def test_other_numbers_of_workers_and_zero_stages_go_on_with_the_same_rows(undisturbed: Config, tmp_path: Path) -> None:
    """2 workers, ZeRO 2 → (a file of its last checkpoint is lost) → 1 worker, ZeRO 3 → 2 workers, ZeRO 1."""
    config = half_trained_copy(undisturbed, tmp_path / "one", 15, num_workers=1, zero_stage=3)
    lost = manifests(config)[-1].parent / "rank-00001.safetensors"
    lost.unlink()
    run_stage(config, "trunk", "natural")
    [start] = starts(config)
    assert (start["step"], start["num_workers"], start["zero_stage"]) == (10, 1, 3)
    assert "step-00000015" in start["not_whole"][0]
    assert "rank-00001.safetensors is missing" in start["not_whole"][0]
    assert_same_course(config, undisturbed)
    again = half_trained_copy(config, tmp_path / "two", 20, num_workers=2, zero_stage=1)
    run_stage(again, "trunk", "natural")
    [start] = starts(again)
    assert (start["step"], start["num_workers"], start["zero_stage"]) == (20, 2, 1)
    assert_same_course(again, undisturbed)


def assert_same_course(config: Config, reference: Config) -> None:
    found, expected = training_log(config), training_log(reference)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row["num_positions"] == other["num_positions"]
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)


@pytest.mark.slow
def test_elastic_training_starts_with_the_workers_there_is_room_for(undisturbed: Config, tmp_path: Path) -> None:
    """A cluster of one CPU has room for one of [1, 2] workers; it goes on from what two had written."""
    config = half_trained_copy(undisturbed, tmp_path / "run", 20, num_workers=(1, 2))
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config.model_copy(update={"ray": config.ray.model_copy(update={"num_cpus": 1})})))
    subprocess.run([sys.executable, "-m", "salad_ray.cli", "trunk", str(path)], check=True, timeout=240)
    assert [(start["step"], start["num_workers"]) for start in starts(config)] == [(20, 1)]
    assert_same_course(config, undisturbed)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.slow
def test_the_zero_stages_agree(finished_run: Config, tmp_path: Path, stage: int) -> None:
    """ZeRO 3 shards the head and the tied embedding; the loss gathers them. The reference is ZeRO 2."""
    config = untrained_copy(finished_run, tmp_path / "run", zero_stage=stage)
    train_to_stage1(config)
    for (step, loss), (reference_step, reference) in zip(losses(config), losses(finished_run), strict=True):
        assert step == reference_step
        assert loss == pytest.approx(reference, rel=1e-4)
    found = weights(config)
    for name, tensor in weights(finished_run).items():
        assert found[name].numpy() == pytest.approx(tensor.numpy(), abs=2e-4), name


@pytest.mark.slow
def test_bf16_with_accumulation_checkpointing_and_all_losses(finished_run: Config, tmp_path: Path) -> None:
    switches = {"precision": "bf16", "num_workers": 1, "activation_checkpointing": True, "alpha": 0.5}
    config = untrained_copy(finished_run, tmp_path / "run", **switches)
    run_stage(config, "trunk", "natural")
    first = training_log(config)[0]
    assert first["loss"] == pytest.approx(0.5 * first["kl"] + 0.5 * first["nll"], rel=1e-3)
    reference = training_log(finished_run)[0]
    assert first["num_positions"] == reference["num_positions"]  # the same rows, whatever the number of workers
    assert first["kl"] == pytest.approx(reference["kl"], abs=0.02)


@pytest.mark.slow
def test_word_ends_whole_samples_and_pairs_of_frames_from_the_plan_to_the_scores(
    finished_run: Config, tmp_path: Path
) -> None:
    config = untrained_copy(finished_run, tmp_path / "run", word_ends=True, word_ends_weight=0.5)
    adapter = config.model.adapter.model_copy(update={"stride": 2})
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"adapter": adapter}),
            "pack": config.pack.model_copy(update={"whole_share": 0.5}),
            "stage2": None,
        }
    )
    run_stages(config, ("pack", "natural"), ("trunk", ""), ("stage1", ""), ("measure", "heldout"))
    log, reference = training_log(config), training_log(finished_run)
    assert "word_end_kl" not in reference[0]
    for row in log:
        assert row["word_end_kl"] > 0
        low, high = sorted((row["kl"], row["word_end_kl"]))
        assert low < row["loss"] < high
    model = SpeechLM.from_pretrained(f"{table_of(config, '', 'stage1').url}/model")
    assert model.config.adapter.stride == 2
    assert model.adapter.input.in_features == 2 * model.config.encoder.dim
    measured, before = (table_of(each, "heldout", "measurements_stage1") for each in (config, finished_run))
    counts = [sum(sum(t.read(s, ["num_positions"])["num_positions"].to_pylist()) for s in t.shards()) for t in
              (measured, before)]  # fmt: skip
    assert counts[0] == counts[1]  # the same text labels: neither word ends nor whole samples


@pytest.mark.parametrize(("num_word_ends", "start_step"), [(0, 0), (3, 0), (0, 4)])
def test_where_no_word_ends_its_kl_is_left_out_and_said_at_the_start(
    num_word_ends: int, start_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mean over none would be 0, and read as perfect."""
    told: list[str] = []
    config = parse_config({"distill": {"word_ends": True, "num_steps": 9}, "align": {"aligner": "none"}})
    groups: list[dict[str, Any]] = []
    step_sums = torch.zeros(len(SUMS), dtype=torch.float64)
    for name, value in {"loss": 6, "kl": 6, "word_end_kl": 1.5, "label_weight": 3, "num_labels": 3}.items():
        step_sums[SUMS.index(name)] = value if num_word_ends or name != "word_end_kl" else 0
    step_sums[SUMS.index("num_word_ends")] = num_word_ends
    trainer_only: Any = Distiller.__new__(Distiller)
    vars(trainer_only).update(
        job=SimpleNamespace(config=config, name="trunk", num_steps=9, warmup_steps=0, decay_steps=2, shares={}),
        config=config, settings=config.distill, rank=0, world_size=1, device=torch.device("cpu"),
        progress=Progress(), word_end_weight=1.0, stalled=0.0, logged=(0.0, 0.0), logger=None, gauges={},
        reader=SimpleNamespace(num_micro_batches=1, start_step=start_step, wait_secs=0.0),
        checkpoints=SimpleNamespace(stalled_secs=0.0),
        engine=SimpleNamespace(
            optimizer=SimpleNamespace(param_groups=groups), skipped_steps=0, step=lambda: None,
            get_global_grad_norm=lambda: 1.0,
        ),
        _forward_backward=lambda *_: step_sums, _sum_over_workers=lambda sums: sums,
    )  # fmt: skip
    monkeypatch.setattr(trainer, "say", told.append)
    monkeypatch.setattr(trainer, "label_weight", lambda *_: 3.0)
    monkeypatch.setattr(trainer, "without_labels", lambda batch: batch)
    for _ in range(2):
        trainer_only._train_step([None])
    trainer_only._log()
    [row] = trainer_only.progress.log
    assert row["kl"] == 2
    if num_word_ends:
        assert row["word_end_kl"] == pytest.approx(0.5)
    else:
        assert "word_end_kl" not in row
    if num_word_ends or start_step:  # a step that is not the first of this start says nothing
        assert not told
    else:
        [sentence] = told
        assert "distill.word_ends=true compared nothing in the first step" in sentence
        assert "align.aligner=none" in sentence


def test_a_job_travels_as_text_and_comes_back_as_it_was() -> None:
    config = parse_config({"run_dir": "r", "distill": {"num_workers": [2, 8]}, "stage2": {}})
    encoder = EncoderSpec("log_mel", None, None, 16_000, 12.5, 640)
    speech = Table("p", "natural", "plan"), Table("f", "natural", "features")
    job = Job(
        config, Table("u", "", "stage2"), speech, {"path": "p", "revision": None}, encoder, config.distill, 10,
        warmup_steps=1, decay_steps=2, card="c", start=("url", 3), first_row=3, branch_steps=(1, 2), exports=False,
        others={"active": speech}, shares={"natural": 0.6, "active": 0.4}, earlier_shares={"natural": 1.0},
    )  # fmt: skip
    assert job_of(as_json(job)) == job
