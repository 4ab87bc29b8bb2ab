"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from factories import run_stage, small_world_config, untrained_copy

from salad_ray import pipeline
from salad_ray.config import Config
from salad_ray.configfile import parse_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real recordings, texts and a small text LM: `SALAD_DATA`, or `../shared/data` beside the checkout."""
    return _folder_beside("data", "SALAD_DATA", "real data")


@pytest.fixture(scope="session")
def cases() -> Path:
    """Inputs that were once read wrongly, in silence: `SALAD_CASES`, or `../shared/cases` beside the checkout."""
    return _folder_beside("cases", "SALAD_CASES", "cases")


def _folder_beside(name: str, variable: str, what: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT.parent / "shared" / name))
    if not folder.is_dir():
        pytest.skip(f"no {what} at {folder}; set {variable} to the folder")
    return folder


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C works, also where a script has started the tests in its background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The whole pipeline, once, on a shrunken quickstart; copy its run_dir before changing anything there."""
    config = parse_config(small_world_config(tmp_path_factory.mktemp("runs")))
    pipeline.run_all(config)
    return config


@pytest.fixture(scope="session")
def undisturbed(finished_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two workers, ZeRO 2, fp32, long enough to be killed, with all its checkpoints; each training in its own job."""
    settings = {"num_steps": 40, "checkpoint_every": 5, "keep_checkpoints": 20}
    config = untrained_copy(finished_run, tmp_path_factory.mktemp("undisturbed") / "run", **settings)
    for stage in ("pack", "trunk", "stage1"):
        run_stage(config, stage, "natural")
    return config
