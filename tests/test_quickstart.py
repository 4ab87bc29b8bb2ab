"""The quickstart as it is shipped, whole: a quarter of an hour on two cores. README tells what comes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from salad_ray import pipeline
from salad_ray.configfile import load_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run_dir = tmp_path_factory.mktemp("quickstart") / "run"
    pipeline.run_all(load_config(ROOT / "configs" / "quickstart.yaml", [f"run_dir={run_dir}"]))
    found: dict[str, Any] = json.loads((run_dir / "report" / "metrics.json").read_text())
    return found


def accuracy(metrics: dict[str, Any], system: str, heard: bool, condition: str = "clean") -> dict[str, Any]:
    modality = "text" if system == "base" else "speech"
    wanted = {"system": system, "modality": modality, "condition": condition, "metric": "acc", "heard": heard}
    [row] = [row for row in metrics["accuracy"] if row.items() >= wanted.items()]
    return row


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_it_hears_where_speech_was_heard_and_then_where_it_was_chosen(metrics: dict[str, Any]) -> None:
    """One seed; docs/benchmarks.md has three. Stage II's bound is below the aim of 75 % by its standard error."""
    right = {
        (system, heard): accuracy(metrics, system, heard)["accuracy"]
        for system in ("base", "stage1", "stage2", "control")
        for heard in (True, False)
    }
    assert min(right["base", True], right["base", False]) >= 0.9
    assert right["stage1", True] >= 0.85
    assert right["stage2", True] >= 0.8
    assert right["stage2", False] >= 0.71
    assert max(right["stage1", False], right["control", False]) <= 0.45
    assert right["control", True] >= right["stage1", True] - 0.05


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_who_hears_silence_guesses_and_nothing_is_forgotten(metrics: dict[str, Any]) -> None:
    for system in ("stage1", "stage2", "control"):
        for heard in (True, False):
            floor = accuracy(metrics, system, heard, "silence")
            assert floor["ci99_low"] <= 0.25 <= floor["ci99_high"], (system, heard)
        assert max(row["forgetting"] for row in metrics[system]["by_domain"].values()) <= 0.1
