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


def margin(metrics: dict[str, Any], system: str, heard: bool) -> dict[str, Any]:
    [row] = [row for row in metrics["hearing_margins"] if (row["system"], row["heard"]) == (system, heard)]
    return row


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_it_hears_where_speech_was_heard_and_then_where_it_was_chosen(metrics: dict[str, Any]) -> None:
    """One seed; docs/benchmarks.md has three. Stage II's bound is below the aim of 75 % by its standard error.

    Heard domains have 320 questions and unheard ones 160: of two systems that guess, the difference on these has a
    standard error of √(2 · 0.25 · 0.75 / 160) = 0.05, so what stays where it was is within 0.12.
    """
    right = {
        (system, heard): accuracy(metrics, system, heard)["accuracy"]
        for system in ("base", "stage1", "stage2", "control")
        for heard in (True, False)
    }
    assert min(right["base", True], right["base", False]) >= 0.9
    assert right["stage1", True] >= 0.85
    assert right["stage2", True] >= right["stage1", True] - 0.05
    assert right["stage2", False] >= 0.71
    assert max(right["stage1", False], right["control", False]) <= 0.45
    assert abs(right["control", False] - right["stage1", False]) <= 0.12
    assert right["control", True] >= right["stage1", True] - 0.05


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_margins_call_deaf_who_does_not_hear_and_nobody_else(metrics: dict[str, Any]) -> None:
    for system, heard in (("stage1", True), ("stage2", True), ("stage2", False), ("control", True)):
        row = margin(metrics, system, heard)
        assert row["deaf"] is False, (system, heard)
        assert min(row["ci_low"], row["swapped_ci_low"]) > 0.2, (system, heard)
    for system in ("stage1", "control"):
        row = margin(metrics, system, heard=False)
        assert row["deaf"] is True, system
        assert row["ci_low"] <= 0 <= row["ci_high"] < 0.2, system


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_who_hears_silence_or_other_questions_guesses(metrics: dict[str, Any]) -> None:
    """Twelve 99 % intervals, all of seed 0: of the twelve of another seed one may miss 25 % by chance."""
    for system in ("stage1", "stage2", "control"):
        for heard in (True, False):
            for condition in ("silence", "swapped"):
                floor = accuracy(metrics, system, heard, condition)
                assert floor["ci99_low"] <= 0.25 <= floor["ci99_high"], (system, heard, condition)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("quantity", ["forgetting", "forgetting_whole"])
def test_nothing_is_forgotten_in_any_domain(metrics: dict[str, Any], quantity: str) -> None:
    for system in ("stage1", "stage2", "control"):
        by_domain = metrics[system]["by_domain"]
        assert len(by_domain) == 3
        assert max(row[quantity] for row in by_domain.values()) <= 0.1, system
