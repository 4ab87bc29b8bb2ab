"""`ray job submit --working-dir . -- python jobs/…` against a head with its job server and token authentication."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import ROOT, Head, head, wait_for
from factories import table_of, untrained_copy

from salad_ray.config import Config
from salad_ray.configfile import dump_config

pytestmark = pytest.mark.timeout(3600)  # two minutes, but for machines that are busy with other things
MOST_UPLOADED = 8 * 2**20
WHOSE_CODE = """
import os, ray, salad_ray
ray.init()
in_worker = ray.remote(lambda: __import__("salad_ray").__file__).remote()
print("code:", os.getcwd(), salad_ray.__file__, ray.get(in_worker))
"""
SAYING = """
import time
import ray
from salad_ray.configfile import parse_config
from salad_ray.console import say
from salad_ray.stages.ray_cluster import start_ray

@ray.remote
def work(worker):
    for step in range(20):
        say(f"[step] {step} of: many", worker=worker, step=step)

start_ray(parse_config({"ray": {"num_cpus": 2}}))
ray.get([work.remote(worker) for worker in range(2)])
say("done")
time.sleep(5)  # Ray forwards what workers print twice a second or so
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with head("--num-cpus=2", HOME=str(tmp_path_factory.mktemp("home"))) as each:
        yield each


@pytest.fixture
def config(finished_run: Config, tmp_path: Path) -> Path:
    """A run without its training, which takes long enough to be stopped in the middle, and without held-out speech."""
    config = untrained_copy(finished_run, tmp_path / "run", num_steps=120)
    for gone in ("heldout", "natural/plan"):
        shutil.rmtree(tmp_path / "run" / gone)
    (tmp_path / "run" / "report").unlink(missing_ok=True)
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(config.model_copy(update={"stage2": None})))
    return file


def submit(cluster: Head, *command: str) -> subprocess.CompletedProcess[str]:
    return cluster.ray("job", "submit", "--working-dir", ".", "--", "python", *command)


def of_job(output: str) -> str:
    """What the job itself has written, of what `ray job submit` prints."""
    return output.split("Running entrypoint for job", 1)[1].split("Status message:")[0]


def test_driver_and_workers_run_the_uploaded_code_and_little_is_uploaded(cluster: Head) -> None:
    done = submit(cluster, "-c", WHOSE_CODE)
    assert done.returncode == 0, done.stdout
    found = re.search(r"^code: (\S+) (\S+) (\S+)$", done.stdout, re.MULTILINE)
    assert found, done.stdout
    uploaded = Path(found[1])
    assert uploaded.parent.name == "working_dir_files"
    assert set(found.groups()[1:]) == {str(uploaded / "salad_ray/__init__.py")}
    files = {file.relative_to(uploaded) for file in uploaded.rglob("*") if file.is_file()}
    assert sum((uploaded / file).stat().st_size for file in files) < MOST_UPLOADED
    assert not {".git", ".venv", "runs"} & {file.parts[0] for file in files}
    [job] = [job for job in jobs(cluster) if job["submission_id"] in done.stdout]
    assert set(job["runtime_env"]) <= {"working_dir", "_ray_commit"}  # nothing is installed


def test_only_who_has_the_token_is_served(cluster: Head, tmp_path: Path) -> None:
    nobody = {"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN_PATH": None, "HOME": str(tmp_path)}
    for changes, refusal in ((nobody, "Missing authentication token"), ({"RAY_AUTH_TOKEN": "0" * 64}, "Invalid")):
        refused = cluster.ray("job", "submit", "--", "python", "-c", "print('served')", **changes)
        assert refused.returncode != 0
        assert refusal in refused.stdout
        assert "Running entrypoint" not in refused.stdout


@pytest.mark.slow
def test_a_relative_run_dir_lies_at_home_and_not_in_the_jobs_copy(cluster: Head) -> None:
    done = submit(cluster, "jobs/run.py", "--dry-run", "seed=3")
    assert done.returncode == 0, done.stdout
    shown = re.search(r"^run_dir: (\S+), on the machine", done.stdout, re.MULTILINE)
    assert shown, done.stdout
    assert shown[1].endswith("/runs/quickstart")
    assert "working_dir_files" not in shown[1]
    assert "\nseed: 3\n" in done.stdout


@pytest.mark.parametrize(
    ("job", "sentence"),
    [
        ("stage2.py", r"^salad: in this config the stage 'stage2' has no part; stage2=.*$"),
        ("sweep.py", r"^salad: the config has no sweeps; .*$"),
    ],
)
@pytest.mark.slow
def test_a_failing_job_says_why_in_a_sentence_and_exits_1(cluster: Head, config: Path, job: str, sentence: str) -> None:
    done = submit(cluster, f"jobs/{job}", "--config", str(config))
    assert done.returncode == 1
    log = of_job(done.stdout)
    assert re.search(sentence, log, re.MULTILINE), log
    assert "Traceback" not in log


@pytest.mark.slow
def test_a_whole_run_is_gone_through_and_stage_two_trained(cluster: Head, finished_run: Config, tmp_path: Path) -> None:
    shutil.copytree(finished_run.run_dir, tmp_path / "run", symlinks=True)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(finished_run.model_copy(update={"run_dir": str(tmp_path / "run")})))
    done = submit(cluster, "jobs/run.py", "--config", str(file))
    assert done.returncode == 0, done.stdout
    assert of_job(done.stdout).count("done already") > 10
    shutil.rmtree(tmp_path / "run" / "stage2")
    done = submit(cluster, "jobs/stage2.py", "--config", str(file))
    assert done.returncode == 0, done.stdout
    assert "stage2: step" in of_job(done.stdout)
    assert (tmp_path / "run/stage2/model/config.json").is_file()


@pytest.mark.slow
def test_a_whole_run_goes_on_from_a_stage_and_is_stopped(cluster: Head, config: Path) -> None:
    first = submit(cluster, "jobs/stage.py", "ingest", "--config", str(config), "set=heldout")
    assert first.returncode == 0, first.stdout
    assert re.search(r"^ingest set=heldout: \d+ kept in \S+ s → ", first.stdout, re.MULTILINE)
    log = stopped_in_training(cluster, config, "whole", "jobs/run.py")
    assert "ingest set=heldout: done already" in log
    assert re.search(
        r"^\[\d+/\d+, [\d:]+\] ingest → synthesize → encode web, natural, heldout, benchmark$", log, re.MULTILINE
    )


def stopped_in_training(cluster: Head, config: Path, name: str, job: str) -> str:
    """Submit a job and stop it when the trunk has a checkpoint; returns its log."""
    run = config.parent / "run"
    started = cluster.ray(
        "job", "submit", "--no-wait", f"--submission-id={name}", "--working-dir", ".", "--",
        *("python", job, "--config", str(config)),
    )  # fmt: skip
    assert started.returncode == 0, started.stdout
    wait_for(lambda: list(run.glob("trunk/*/checkpoints/*/manifest.json")) or ended(cluster, name), "a checkpoint")
    cluster.request(f"jobs/{name}/stop", "POST")  # what `ray job stop` does, at once
    wait_for(lambda: ended(cluster, name), "the job's end")
    log: str = cluster.request(f"jobs/{name}/logs")["logs"]
    assert ended(cluster, name) == "STOPPED", log
    assert not list(run.glob("trunk/*/manifest.json"))
    return log


@pytest.mark.slow
def test_a_training_that_is_stopped_continues_where_it_was(cluster: Head, config: Path) -> None:
    stopped_in_training(cluster, config, "training", "jobs/stage1.py")

    again = submit(cluster, "jobs/stage1.py", "--config", str(config))
    assert again.returncode == 0, again.stdout
    log = of_job(again.stdout)
    assert re.search(r"trunk: continuing after step \d+, from ", log), log
    assert "Traceback" not in log
    assert not {"━", "\r", "…"} & set(log)  # lines; no bars, nothing cut off
    starts = (table_of(config.parent / "run", "", "trunk").manifest() or {})["starts"]
    assert len(starts) == 2
    assert starts[1]["step"] > 0


@pytest.mark.slow
def test_a_log_of_json_has_the_lines_of_workers_as_they_are() -> None:
    """Ray would put a prefix in colour before them, and leave out those that differ in numbers only."""
    done = subprocess.run(
        [sys.executable, "-c", SAYING], cwd=ROOT, env=os.environ | {"SALAD_LOG": "json"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted((line["worker"], line["step"]) for line in lines if "worker" in line) == [
        (worker, step) for worker in range(2) for step in range(20)
    ]
    assert len(lines) == 41


def ended(cluster: Head, job: str) -> str:
    """How a job has ended; "" while it runs."""
    status = cluster.request(f"jobs/{job}")["status"]
    return status if status in ("SUCCEEDED", "FAILED", "STOPPED") else ""


def jobs(cluster: Head) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = cluster.request("jobs/")
    return listed
