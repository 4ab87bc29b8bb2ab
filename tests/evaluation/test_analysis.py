"""What drives accuracy, over tables of runs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import LeaveOneOut, cross_val_predict

from salad_ray.config import ConfigError
from salad_ray.evaluation.analysis import (
    VALUES,
    Analysis,
    Effect,
    analyse,
    analysis_grid,
    leave_one_out_r2,
    partial_correlation,
    read_table,
    runs_table,
)


def table(number: int, seed: int = 0, noise: float = 0.02) -> list[dict]:
    """Runs in which M costs speech accuracy and F text accuracy, and M and F hang together a little."""
    rng = np.random.default_rng(seed)
    f = rng.gamma(2.0, 0.05, number)
    m = 0.3 * f / 0.1 + rng.gamma(3.0, 0.1, number)
    text = 0.75 - 0.8 * f + noise * rng.standard_normal(number)
    speech = 0.75 - 0.3 * m - 0.1 * f + noise * rng.standard_normal(number)
    return [
        {"run": f"runs/{place}", "system": "stage1"} | dict(zip(VALUES, map(float, values), strict=True))
        for place, values in enumerate(zip(m, f, text, speech, strict=True))
    ]


def columns(rows: list[dict]) -> tuple[np.ndarray, ...]:
    return tuple(np.array([row[name] for row in rows]) for name in VALUES)


def effect_of(analysis: Analysis, outcome: str, given: str | None, predictor: str = "") -> Effect:
    """By default speech accuracy's is on M itself, text accuracy's on F."""
    predictor = predictor or ("misalignment" if outcome == "speech_accuracy" else "forgetting")
    key = (outcome, predictor, given)
    (found,) = [effect for effect in analysis.effects if (effect.outcome, effect.predictor, effect.given) == key]
    return found


def residual_sum(y: np.ndarray, *predictors: np.ndarray) -> float:
    design = np.stack([*predictors, np.ones_like(y)], axis=1)
    return float(((y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2).sum())


def printed(grid: object, width: int = 80) -> str:
    console = Console(record=True, width=width)
    console.print(grid)
    return console.export_text()


def test_leave_one_out_agrees_with_sklearn() -> None:
    rows = table(17)
    m, _, _, speech = columns(rows)
    predicted = cross_val_predict(LinearRegression(), m[:, None], speech, cv=LeaveOneOut())
    means = (speech.sum() - speech) / (len(speech) - 1)
    expected = 1 - ((speech - predicted) ** 2).sum() / ((speech - means) ** 2).sum()
    assert effect_of(analyse(rows, 50), "speech_accuracy", None).r2 == pytest.approx(expected)


def test_partial_r2_is_the_share_of_the_residual_that_is_explained() -> None:
    rows = table(17)
    m, f, text, speech = columns(rows)
    found = analyse(rows, 50)
    of_m = effect_of(found, "speech_accuracy", "forgetting")
    assert of_m.r2 == pytest.approx(1 - residual_sum(speech, m, f) / residual_sum(speech, f))
    of_f = effect_of(found, "text_accuracy", "log_misalignment")
    log = np.log(m)
    assert of_f.r2 == pytest.approx(1 - residual_sum(text, log, f) / residual_sum(text, log))
    assert found.vif == pytest.approx(((log - log.mean()) ** 2).sum() / residual_sum(log, f))


def test_the_papers_regression_is_on_log_m_and_the_raw_one_stands_beside_it() -> None:
    rng = np.random.default_rng(5)
    rows = [row | {"speech_accuracy": 0.5 - 0.1 * np.log(row["misalignment"])} for row in table(20)]
    rows = [row | {"misalignment_whole": row["misalignment"] * float(rng.lognormal(1, 0.5))} for row in rows]
    found = analyse(rows, 50)
    m, _, _, speech = columns(rows)
    predicted = cross_val_predict(LinearRegression(), np.log(m)[:, None], speech, cv=LeaveOneOut())
    means = (speech.sum() - speech) / (len(speech) - 1)
    on_log = effect_of(found, "speech_accuracy", None, "log_misalignment")
    assert on_log.r2 == pytest.approx(1 - ((speech - predicted) ** 2).sum() / ((speech - means) ** 2).sum())
    assert on_log.slope == pytest.approx(-0.1)
    assert (on_log.paper, effect_of(found, "speech_accuracy", None).paper) == (0.75, None)
    assert effect_of(found, "speech_accuracy", None).r2 < on_log.r2 - 0.02
    assert effect_of(found, "speech_accuracy", None, "log_misalignment_whole").r2 < on_log.r2 - 0.1
    lines = printed(analysis_grid(found)).splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)


def test_m_without_a_logarithm_is_left_out() -> None:
    rows = table(8)
    rows[3]["misalignment"] = 0.0
    assert analyse(rows, 50).left_out == ["runs/3 stage1: misalignment 0 has no logarithm"]


def test_a_drawn_table_counts_each_row_as_often_as_it_was_drawn() -> None:
    m, f, _, speech = columns(table(9))
    weights = np.array([3, 0, 1, 1, 0, 2, 1, 1, 0])
    copies = np.repeat(np.arange(9), weights)
    predicted, means = np.zeros(9), np.zeros(9)
    for place in range(9):
        rest = copies[copies != place]
        line = np.polyfit(m[rest], speech[rest], 1)
        predicted[place], means[place] = np.polyval(line, m[place]), speech[rest].mean()
    expected = 1 - (weights * (speech - predicted) ** 2).sum() / (weights * (speech - means) ** 2).sum()
    assert leave_one_out_r2(m, speech, weights[None].astype(float))[0] == pytest.approx(expected)
    share = 1 - residual_sum(speech[copies], m[copies], f[copies]) / residual_sum(speech[copies], f[copies])
    assert partial_correlation(m, speech, f, weights[None].astype(float))[0] ** 2 == pytest.approx(share)


def test_what_was_put_in_comes_out() -> None:
    found = analyse(table(2000, noise=0.05), resamples=200)
    # Given F, M varies by 3 · 0.01 (gamma) and costs 0.3 of it, against a noise of 0.05².
    explained = 0.3**2 * 0.03
    of_m = effect_of(found, "speech_accuracy", "forgetting")
    assert of_m.r2 == pytest.approx(explained / (explained + 0.05**2), abs=0.05)
    assert of_m.slope == pytest.approx(-0.3, abs=0.02)
    assert effect_of(found, "text_accuracy", "log_misalignment").slope == pytest.approx(-0.8, abs=0.06)
    for effect in found.effects:
        assert effect.ci_low < effect.r2 < effect.ci_high < effect.ci_low + 0.12
    assert not found.warnings


def test_noise_explains_nothing() -> None:
    rng = np.random.default_rng(4)
    rows = [{"run": str(place)} | dict(zip(VALUES, rng.random(4).tolist(), strict=True)) for place in range(40)]
    found = analyse(rows, resamples=500)
    for effect in found.effects:
        assert effect.r2 < 0.2
        assert effect.ci_low <= (0.0 if effect.given else 0.05)


@pytest.mark.parametrize("slope", [0.0, -1.0])
def test_the_interval_of_partial_r2_covers_the_truth(slope: float) -> None:
    rng = np.random.default_rng(8)
    covered = []
    for _ in range(200):
        f = rng.standard_normal(25)
        m = 9 + 0.5 * f + np.sqrt(0.75) * rng.standard_normal(25)
        speech, text = slope * m + 0.7 * f + rng.standard_normal(25), rng.standard_normal(25)
        rows = [dict(zip(VALUES, map(float, row), strict=True)) for row in zip(m, f, text, speech, strict=True)]
        effect = effect_of(analyse(rows, resamples=300), "speech_accuracy", "forgetting")
        covered.append(effect.ci_low <= 0.75 * slope**2 / (0.75 * slope**2 + 1) <= effect.ci_high)
    assert 0.88 <= np.mean(covered) <= 0.99


def test_seeds_of_one_recipe_are_drawn_together() -> None:
    recipes = table(8, noise=0.1)
    alone = analyse(recipes)
    rows = [row | {"run": f"{row['run']}-{seed}", "group": row["run"]} for row in recipes for seed in range(6)]
    together, apart = analyse(rows), analyse([row | {"group": ""} for row in rows])
    assert (together.num_rows, together.num_groups, apart.num_groups) == (48, 8, 48)

    def width(found: Analysis) -> float:
        effect = effect_of(found, "speech_accuracy", "forgetting")
        return effect.ci_high - effect.ci_low

    assert width(together) == pytest.approx(width(alone), rel=1e-6)  # copies tell nothing new
    assert width(apart) < 0.6 * width(alone)


def test_systems_of_one_run_are_one_group() -> None:
    rows = table(10)
    for place, row in enumerate(rows):
        row["run"] = f"runs/{place % 3}"
    found = analyse(rows)
    assert found.num_groups == 3
    assert all(effect.ci_low is None and effect.r2 is not None for effect in found.effects)
    assert any("no intervals: the 10 rows are of 3 independent groups" in text for text in found.warnings)


def test_the_same_table_gives_the_same_analysis() -> None:
    assert analyse(table(12), 100, seed=3) == analyse(table(12), 100, seed=3)
    assert analyse(table(12), 100, seed=3).effects != analyse(table(12), 100, seed=4).effects


def test_rows_without_a_value_are_named_and_left_out() -> None:
    rows = table(8)
    rows[2]["forgetting"] = None
    rows[5] |= {"text_accuracy": float("nan"), "speech_accuracy": None}
    found = analyse(rows, 50)
    assert found.num_rows == 6
    assert found.left_out == ["runs/2 stage1: no forgetting", "runs/5 stage1: no text_accuracy, speech_accuracy"]
    text = " ".join(printed(analysis_grid(found)).split())
    assert "2 rows left out: runs/2 stage1: no forgetting;" in text


def test_too_few_rows_and_constant_columns_are_refused() -> None:
    rows = table(6)
    rows[0]["misalignment"] = rows[1]["misalignment"] = None
    with pytest.raises(ConfigError, match=r"4 of 6 rows can be used \(runs/0 stage1: no misalignment; .*5 at least"):
        analyse(rows)
    with pytest.raises(ConfigError, match="0 of 0 rows can be used; name more runs"):
        analyse([])
    with pytest.raises(ConfigError, match=r"text_accuracy is 0\.5 in all 9 rows"):
        analyse([row | {"text_accuracy": 0.5} for row in table(9)])


def test_collinear_quantities_are_told() -> None:
    rows = table(30)
    rng = np.random.default_rng(0)
    near = [row | {"misalignment": float(np.exp(3 * row["forgetting"] + 0.01 * rng.random()))} for row in rows]
    assert any("VIF" in text for text in analyse(near, 50).warnings)
    same = analyse([row | {"misalignment": float(np.exp(3 * row["forgetting"]))} for row in rows], 50)
    assert same.vif is None
    assert effect_of(same, "speech_accuracy", "forgetting", "log_misalignment").r2 is None
    assert effect_of(same, "speech_accuracy", None, "log_misalignment").r2 is not None
    assert [text for text in same.warnings if "undefined" in text] == []
    assert "–" in printed(analysis_grid(same))


def test_a_line_that_one_row_decides_is_no_finding() -> None:
    rows = [row | {"misalignment": 1.0 if place else 2.0} for place, row in enumerate(table(8))]
    found = analyse(rows, 50)
    assert effect_of(found, "speech_accuracy", None).r2 is None
    assert any("one row alone decides" in text for text in found.warnings)


def test_accuracy_that_rises_with_misalignment_is_told() -> None:
    rows = [row | {"speech_accuracy": row["misalignment"] / 4} for row in table(12, noise=0.0)]
    assert any("accuracy rises with M here" in text for text in analyse(rows, 50).warnings)


def test_the_table_fits_a_terminal_and_json_holds_everything() -> None:
    found = analyse(table(12), 100)
    text = printed(analysis_grid(found))
    assert "over 12 models" in text
    assert "0.75" in text
    assert "log M given F" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    data = json.loads(json.dumps(asdict(found), allow_nan=False))
    assert len(data["effects"]) == 6
    assert len(data["points"]) == 12
    assert data["effects"][0]["r2"] == found.effects[0].r2


def write_run(
    folder: Path,
    systems: dict[str, tuple[float, float]],
    accuracies: dict[tuple[str, str], dict[str, float]],
) -> str:
    """A run's metrics: (M, F) of systems, accuracies by (system, modality) and benchmark."""
    rows = [
        {"system": system, "modality": modality, "benchmark": name, "accuracy": value + shift}
        | {"metric": metric, "condition": condition, "heard": heard}
        for (system, modality), values in accuracies.items()
        for name, value in values.items()
        for metric, condition, heard, shift in (
            ("acc", "clean", None, 0.0),
            ("acc_norm", "clean", None, 0.1),
            ("acc", "noise", None, 0.2),
            ("acc", "clean", True, 0.3),
        )
    ]
    metrics = {name: {"misalignment": m, "forgetting": f, "by_domain": {}} for name, (m, f) in systems.items()}
    (folder / "report").mkdir(parents=True)
    content = metrics | {"accuracy": rows, "selection": {"gamma": 5.0}}
    (folder / "report" / "metrics.json").write_text(json.dumps(content))
    return str(folder)


def test_runs_become_rows(tmp_path: Path) -> None:
    first = write_run(
        tmp_path / "a",
        {"untrained": (1.2, 0.0), "stage1": (0.3, 0.1), "stage2": (0.2, 0.05)},
        {
            ("base", "text"): {"piqa": 0.9, "hellaswag": 0.9},
            ("stage1", "text"): {"piqa": 0.8, "hellaswag": 0.6},
            ("stage1", "speech"): {"piqa": 0.5, "hellaswag": 0.4},
            ("stage2", "text"): {"piqa": 0.7, "hellaswag": 0.6},
        },
    )
    second = write_run(
        tmp_path / "b",
        {"stage1": (0.4, 0.2)},
        {("stage1", "text"): {"piqa": 0.6, "world": 0.9}, ("stage1", "speech"): {"piqa": 0.3, "world": 0.8}},
    )
    rows = runs_table([first + "/", second])
    assert [(Path(row["run"]).name, row["system"]) for row in rows] == [
        ("a", "stage1"),
        ("a", "stage2"),
        ("b", "stage1"),
    ]
    # Only piqa is common to the systems that have both accuracies.
    assert [row["text_accuracy"] for row in rows] == [0.8, 0.7, 0.6]
    assert [row["speech_accuracy"] for row in rows] == [0.5, None, 0.3]
    assert [row["misalignment"] for row in rows] == [0.3, 0.2, 0.4]
    assert {row["benchmarks_left_out"] for row in rows} == {"hellaswag world"}
    assert runs_table([first], metric="acc_norm")[0]["speech_accuracy"] == pytest.approx(0.55)
    told = analyse([*rows, *table(6)], 20)
    assert told.left_out == [f"{first} stage2: no speech_accuracy"]
    assert "benchmarks that not all systems have do not count: hellaswag, world" in told.warnings


def test_runs_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", {}, {("stage1", "text"): {"piqa": 0.5}, ("stage1", "speech"): {"piqa": 0.5}})
    other = write_run(tmp_path / "b", {}, {("stage1", "text"): {"world": 0.5}, ("stage1", "speech"): {"world": 0.5}})
    with pytest.raises(ConfigError, match="no benchmark is common"):
        runs_table([one, other])
    with pytest.raises(ConfigError, match=r"metrics.json is missing or empty; run `salad report`"):
        runs_table([str(tmp_path / "none")])
    with pytest.raises(ConfigError, match="is named 2 times"):
        runs_table([one, one + "/"])
    (tmp_path / "a" / "report" / "metrics.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        runs_table([one])


HEADER = "run,misalignment,forgetting,text_accuracy,speech_accuracy,note"


def test_a_csv_keeps_its_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "models.csv"
    path.write_text(f'\ufeff{HEADER}\nours,0.2, 0.1,71.5,n/a,"3B, mine"\nother,0.3,,70,60,\n', encoding="utf-8")
    rows = read_table(str(path))
    assert rows[0] == {
        "run": "ours",
        "system": "",
        "misalignment": 0.2,
        "forgetting": 0.1,
        "text_accuracy": 71.5,
        "speech_accuracy": None,
        "note": "3B, mine",
    }
    assert (rows[1]["forgetting"], rows[1]["speech_accuracy"]) == (None, 60.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its first line must name each of misalignment"),
        ("run,misalignment,forgetting,text_accuracy\na,1,2,3\n", "mend speech_accuracy"),
        (f"{HEADER},forgetting\n", "mend forgetting"),
        (f"{HEADER}\na,1,2,3,71 %,\n", r"line 2: speech_accuracy is '71 %'; write a number"),
        (f"{HEADER}\na,1,2,3,4,x,y\n", "line 2: more cells than columns"),
    ],
)
def test_a_csv_that_cannot_be_used_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "models.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_table(str(path))


def test_files_that_are_no_csv_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_table(str(tmp_path / "none.csv"))
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00run")
    with pytest.raises(ConfigError, match="cannot be read as CSV"):
        read_table(str(tmp_path / "binary.csv"))
    (tmp_path / "short.csv").write_text("misalignment,forgetting,text_accuracy,speech_accuracy\n1,2,3\n")
    (row,) = read_table(str(tmp_path / "short.csv"))
    assert (row["run"], row["speech_accuracy"]) == ("line 2", None)
