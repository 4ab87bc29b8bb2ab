"""The command line: what it says, to whom, and how it exits."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from factories import commanded

from salad_ray import cli
from salad_ray.config import ConfigError
from salad_ray.flow import STAGES

ROOT = Path(__file__).resolve().parents[1]


salad = partial(commanded, cli.main)


def job(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return commanded(lambda: runpy.run_path(f"jobs/{name}", run_name="__main__"), *arguments)


def test_help_names_every_command() -> None:
    """In a process of its own, as all that follows would be."""
    done = subprocess.run(
        [sys.executable, "-m", "salad_ray.cli", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for name in ("run", "status", *STAGES):
        assert name in done.stdout


@pytest.mark.parametrize("stage", ["encode", "stage1"])
def test_the_help_of_a_stage_lists_its_keys(stage: str) -> None:
    shown = salad(stage, "--help").stdout
    assert {"encode": "encode.encoder=log_mel", "stage1": "distill.alpha=1.0"}[stage] in shown


@pytest.mark.parametrize("command", ["sweep", "ingest", "encode", "stage2"])
def test_the_help_says_what_is_required_and_what_is_unset(command: str) -> None:
    shown = salad(command, "--help").stdout
    assert "Undefined" not in shown
    assert "=None" not in shown
    assert {"sweep": "sweeps.NAME.grid (required)"}.get(command, "=unset") in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "configs/quickstart.yaml", "distill.alhpa=1"), "did you mean 'distill.alpha'"),
        (("run", "configs/gone.yaml"), "no such config file"),
        (("run", "memory://bucket/gone.yaml"), "salad: memory://bucket/gone.yaml: no such config file"),
        (("run", "nothing://bucket/a.yaml"), "nothing://bucket/a.yaml: cannot be read as a config file"),
        (("status", "gone"), "gone holds no run; name a run_dir that `salad run` has written to"),
        (("teacher", "configs/real.yaml", "model.teacher=./gone", "run_dir={tmp}"), "no such folder"),
        (
            ("pack", "configs/quickstart.yaml", "run_dir={tmp}", "set=heldout"),
            "works on text, natural, active, not on set=",
        ),
        (
            ("stage2", "configs/real.yaml", "stage2=null", "run_dir={tmp}"),
            "the stage 'stage2' has no part; stage2={} adds Stage II",
        ),
        (("ingest", "configs/real.yaml", "ingest.corpora=[gone]", "run_dir={tmp}"), "gone"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence_and_exit_code_1(
    arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    done = salad(*(argument.format(tmp=tmp_path / "run") for argument in arguments))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["salad_3b", "salad_7b"])
def test_a_dry_run_of_the_paper_needs_no_weights(name: str) -> None:
    done = salad("run", f"configs/{name}.yaml", "--dry-run")
    assert done.returncode == 0
    assert "ingest natural → ingest heldout → ingest text → align natural → " in done.stdout
    assert "→ select active → synthesize active → encode active → pack active → stage2 →" in done.stdout


def test_jobs_take_the_same_arguments_and_default_to_the_quickstart() -> None:
    for name, extra in (("run.py", ["--dry-run"]), ("stage.py", ["encode", "--help"])):
        done = job(name, *extra)
        assert done.returncode == 0, done.stderr
    done = job("stage1.py", "--config", "gone.yaml")
    assert done.returncode == 1
    assert "gone.yaml: no such config file" in done.stderr


@pytest.mark.parametrize(
    ("called", "words"),
    [
        (("stage.py",), "usage: jobs/stage.py NAME [--config C] [key=value …], where NAME is one of ingest, embed,"),
        (("stage.py", "ingest", "--config"), "--config stands without the path or URL of a config"),
        (("run.py", "--config="), "--config stands without the path or URL of a config"),
        (("run.py", "--config", "--dry-run"), "--config stands without the path or URL of a config"),
    ],
)
def test_a_job_that_is_called_wrongly_exits_with_2(called: tuple[str, ...], words: str) -> None:
    done = job(*called)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


BROKEN = """
import sys
from salad_ray import cli

def load(*_):
    raise RuntimeError("403 for https://host/x?X-Amz-Date=1&X-Amz-Signature=abc0123")

cli.load = load
sys.argv[1:] = {arguments}
{call}
"""


@pytest.mark.parametrize("in_job", [False, True])
def test_the_traceback_of_a_bug_is_in_a_file_and_a_jobs_also_in_its_log(in_job: bool, tmp_path: Path) -> None:
    """The file of a job lies on a head whose pod goes with it."""
    call, arguments = ("cli.job('run')", []) if in_job else ("cli.main()", ["run", "c.yaml"])
    script = BROKEN.format(call=call, arguments=arguments)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    [file] = tmp_path.glob("salad-*.log")
    assert "Traceback" in file.read_text()
    assert ("Traceback" in done.stderr) == in_job
    assert done.stderr.endswith(
        "salad: RuntimeError: 403 for https://host/x?X-Amz-Date=1&X-Amz-Signature=***\n"
        f"salad: the whole story is in {file}\n"
    )
    assert "abc0123" not in done.stderr + file.read_text()


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job's working directory as Ray makes it, with what a checkout ships."""
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    (folder / "data").mkdir(parents=True)
    (folder / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(folder)
    return folder


def test_a_job_takes_the_shipped_config_and_absolute_inputs(copy: Path, tmp_path: Path) -> None:
    corpora = "ingest.corpora=[/data/speech, 's3://bucket/x']"
    config = cli.load("configs/quickstart.yaml", [corpora, "stage2=null", "pack.text_share=0"])
    assert config.run_dir == f"{tmp_path}/home/runs/quickstart"
    assert [corpus.path for corpus in config.ingest.corpora] == ["/data/speech", "s3://bucket/x"]
    assert cli.load("configs/salad_3b.yaml", []).model.teacher == "Qwen/Qwen2.5-3B"


@pytest.mark.parametrize(
    ("override", "key", "shown"),
    [
        ("ingest.corpora=[data]", "ingest.corpora.path", "data"),
        ("ingest.corpora=[../shared/speech]", "ingest.corpora.path", "../shared/speech"),
        ("ingest.corpora=[{path: /data, root: data}]", "ingest.corpora.root", "data"),
        ("ingest.web=[{path: 'data/*.jsonl', name: x}]", "ingest.web.path", "data/*.jsonl"),
        ("ingest.passages.benchmarks=[gone.csv]", "ingest.passages.benchmarks", "gone.csv"),
        ("model.teacher=data", "model.teacher", "data"),
        ("evaluate.benchmarks=[{name: piqa, path: data}]", "evaluate.benchmarks.path", "data"),
        ("sweeps.a.grid={model.teacher: [./data]}", "sweeps.a.grid.model.teacher", "data"),
        ("run_dir=../x", "run_dir", "../x"),
    ],
)
def test_an_input_in_a_jobs_copy_of_the_checkout_is_refused(copy: Path, override: str, key: str, shown: str) -> None:
    """Its path is another one with each submission, and gone after it."""
    with pytest.raises(ConfigError, match=f"'{re.escape(key)}' is the relative path {re.escape(shown)}, .*a URL"):
        cli.load("configs/quickstart.yaml", [override, "stage2=null", "pack.text_share=0"])
