"""Sweeps through real Tune, Train and Data, with everything small: shared trunks and speech, failures, reruns."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from clusters import head, node
from factories import table_of

from salad_ray import pipeline
from salad_ray.config import Config, ConfigError, SweepConfig
from salad_ray.configfile import parse_config, replaced
from salad_ray.distill.budget import decay_start
from salad_ray.distill.trainer import worker_resources
from salad_ray.model.speech_lm import SpeechLM
from salad_ray.runs import Places, Run, kept_runs, open_places, open_run
from salad_ray.scaling import sweep as sweep_module
from salad_ray.scaling.sweep import Trial, concurrency, grid_trials, laws, measured_row, reached, told_reached
from salad_ray.tables import Table, write_json

BUDGETS = (4, 8)
SWEEPS = {
    "rate": {
        "grid": {"distill.adapter_learning_rate": [1.5e-3, 1e6]},  # the second one ends in NaN
        "num_steps": list(BUDGETS),
    },
    "gamma": {"grid": {"select.gamma": [0, 5]}},
    "nothing": {"grid": {"select.budget_percent": [1e-9]}},  # selects no passage
}


def test_a_small_sweep_shares_the_trunk_and_tells_of_what_failed(
    finished_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One branch off the run's own trunk, lengthened for it, and a combination that cannot be prepared."""
    shutil.copytree(finished_run.run_dir, tmp_path / "run", symlinks=True)
    [largest] = BUDGETS[1:]
    rate = {"grid": {"distill.adapter_learning_rate": [1.5e-3]}, "num_steps": [largest]}
    sweeps = {"rate": rate, "nothing": SWEEPS["nothing"]}
    config = replaced(finished_run, {"run_dir": str(tmp_path / "run"), "sweeps": sweeps})
    with pytest.raises(ConfigError, match=r"1 trainings failed, first .*too little for a single passage"):
        pipeline.run_sweeps(config)
    [row] = results(config, "rate")["rows"]
    assert (row["budget"], row["error"]) == (largest, "")
    assert row["misalignment"] > 0
    assert row["forgetting"] > 0
    branch = places_of(config, "rate", row["trial"])
    assert branch.table("", "trunk").url == table_of(finished_run.run_dir, "", "trunk").url.replace(
        finished_run.run_dir, config.run_dir
    )
    trunk = branch.table("", "trunk").manifest() or {}
    steps = (finished_run.distill.num_steps, largest)
    assert trunk["branch_steps"] == [decay_start(number, finished_run.distill.decay_share) for number in steps]
    assert (branch.table("", "stage1").manifest() or {})["log"][-1]["step"] == largest
    assert "All trainings of sweep rate" in Path(config.run_dir, "report/page.html").read_text()
    capsys.readouterr()
    pipeline.run_sweeps(config, "rate")
    assert "0 of 1 trainings to run" in capsys.readouterr().out


@pytest.fixture(scope="module")
def swept(finished_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run with two sweeps; one of the four trainings with budgets and their trunk cannot succeed."""
    folder = tmp_path_factory.mktemp("swept") / "run"
    shutil.copytree(finished_run.run_dir, folder, symlinks=True)
    config = replaced(finished_run, {"run_dir": str(folder), "sweeps": SWEEPS})
    with pytest.raises(ConfigError, match=r"3 trainings failed, first .*not finite"):
        pipeline.run_sweeps(config)
    return config


def results(config: Config, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(config.run_dir, "sweeps", name, "results.json").read_text())
    return found


def places_of(config: Config, name: str, trial: str) -> Places:
    return open_places(config.run_dir, f"{name}/{trial}")[0]


@pytest.mark.slow
def test_a_failed_training_is_a_row_and_the_others_are_finished(swept: Config) -> None:
    rows = results(swept, "rate")["rows"]
    assert [(row["distill.adapter_learning_rate"], row["budget"]) for row in rows] == [
        (rate, budget) for rate in (1.5e-3, 1e6) for budget in BUDGETS
    ]
    assert [bool(row["error"]) for row in rows] == [False, False, True, True]
    good = rows[:2]
    assert all(row["misalignment"] > 0 and row["forgetting"] > 0 for row in good)
    assert good[0]["num_positions"] < good[1]["num_positions"]
    with Path(swept.run_dir, "sweeps/rate/results.csv").open() as file:
        assert [row["trial"] for row in csv.DictReader(file)] == [row["trial"] for row in rows]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.slow
def test_a_branch_is_what_training_to_its_budget_alone_would_be(swept: Config, tmp_path: Path, budget: int) -> None:
    """A run of its own with this budget only, in another folder: its trunk ends where its decay begins. The sweep's
    trunk was the run's, which got a checkpoint in its middle for the smaller budget, a longer end for the larger."""
    folder = tmp_path / "alone"
    ignored = shutil.ignore_patterns("trunk", "stage1", "plan", "runs", "sweeps")
    shutil.copytree(swept.run_dir, folder, ignore=ignored, symlinks=True)
    (folder / "config.yaml").unlink()
    changes = {"run_dir": str(folder), "sweeps": {}, "stage2": None, "distill.num_steps": budget}
    alone = replaced(swept, changes)
    pipeline.make(alone, "stage1", "natural")
    branch = places_of(swept, "rate", f"adapter_learning_rate=0.0015,steps={budget}")
    tables = (branch.table("", "stage1"), table_of(alone, "", "stage1"))
    ours, theirs = (SpeechLM.from_pretrained(f"{table.url}/model") for table in tables)
    for (name, one), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert one.sub(other).abs().max() < 1e-5, name
    manifests = [table.manifest() or {} for table in tables]
    assert manifests[0]["num_positions"] == manifests[1]["num_positions"]
    assert [row["step"] for row in manifests[0]["log"]][-1] == budget


@pytest.mark.slow
def test_the_trunk_is_shared_and_the_saving_told(swept: Config) -> None:
    saving = results(swept, "rate")["saving"]
    trials = [f"adapter_learning_rate=0.0015,steps={budget}" for budget in BUDGETS]
    urls = {places_of(swept, "rate", trial).table("", "trunk").url for trial in trials}
    assert urls == {table_of(swept, "", "trunk").url}, "the run itself has the same"
    [url] = urls
    trunk = Table(url, "", "trunk").manifest() or {}
    points = {decay_start(steps, swept.distill.decay_share) for steps in (*BUDGETS, swept.distill.num_steps)}
    assert trunk["branch_steps"] == sorted(points)
    assert not Path(url, "model").exists()
    assert saving["positions"] < saving["separate_positions"]
    rows = [row for row in results(swept, "rate")["rows"] if not row["error"]]
    assert saving["separate_positions"] == sum(row["num_positions"] for row in rows)


@pytest.mark.slow
def test_selections_share_what_comes_before_them(swept: Config) -> None:
    own, *others = (places_of(swept, "gamma", f"gamma={gamma}") for gamma in (5, 0))
    assert own.keys == {label: key for label, key in open_places(swept.run_dir)[0].keys.items() if label in own.keys}
    for places in others:
        different = {label for label, key in places.keys.items() if own.keys[label] != key}
        assert "active/features" in different
        assert "stage2" in different
        assert not different & {"stage1", "probe/measurements_stage1", "web/clusters", "natural/plan"}
    rows = results(swept, "gamma")["rows"]
    assert [row["select.gamma"] for row in rows] == [0, 5]
    assert all(row["system"] == "stage2" and row["synthetic_hours"] > 0 for row in rows)


@pytest.mark.slow
def test_the_run_itself_is_left_as_it_was(swept: Config, finished_run: Config) -> None:
    for label in ("natural/features", "stage1", "active/selection", "stage2"):
        before, after = (open_places(config.run_dir)[0].labelled(label).manifest() for config in (finished_run, swept))
        assert before == after, label
    report = Path(swept.run_dir, "report", "metrics.json").read_bytes()
    assert report == Path(finished_run.run_dir, "report", "metrics.json").read_bytes()


@pytest.mark.slow
def test_a_second_sweep_of_what_is_done_runs_nothing(swept: Config, capsys: pytest.CaptureFixture[str]) -> None:
    only_good = replaced(swept, {"sweeps": {"gamma": SWEEPS["gamma"]}})
    before = results(swept, "gamma")
    pipeline.run_sweeps(only_good)
    assert "0 of 2 trainings to run" in capsys.readouterr().out
    assert results(swept, "gamma")["rows"] == before["rows"]


@pytest.mark.slow
def test_a_sweep_grows_by_a_budget_and_a_value_and_tries_again_what_failed(
    swept: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(swept.run_dir, folder, symlinks=True)
    rate = SWEEPS["rate"] | {"num_steps": [*BUDGETS, 12]}
    more = {"rate": rate, "gamma": {"grid": {"select.gamma": [0, 5, 2]}}}
    config = replaced(swept, {"run_dir": str(folder), "sweeps": more})
    with pytest.raises(ConfigError, match="3 trainings failed"):
        pipeline.run_sweeps(config)
    assert "1 of 3 trainings to run" in capsys.readouterr().out
    rows = results(config, "rate")["rows"]
    assert [bool(row["error"]) for row in rows] == [False] * 3 + [True] * 3
    assert rows[0]["misalignment"] == results(swept, "rate")["rows"][0]["misalignment"]
    assert rows[2]["num_positions"] > rows[1]["num_positions"]
    assert [row["error"] for row in results(config, "gamma")["rows"]] == [""] * 3


@pytest.mark.slow
def test_a_sweep_begun_anew_deletes_what_it_alone_has(swept: Config, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(swept.run_dir, folder, symlinks=True)
    config = replaced(swept, {"run_dir": str(folder)})
    own, shared = (places_of(config, "gamma", f"gamma={gamma}").table("", "stage2") for gamma in (0, 5))
    pipeline._forget_sweep(open_run(str(folder)), "gamma")
    assert own.manifest() is None
    assert shared.manifest() is not None, "the run itself has it"
    assert not Path(folder, "sweeps", "gamma").exists()
    assert all(not places.name.startswith("gamma/") for places in kept_runs(str(folder)))


@pytest.mark.slow
def test_the_report_shows_the_sweeps(swept: Config) -> None:
    page = Path(swept.run_dir, "report/page.html").read_text()
    assert "What more data would buy" in page
    assert "All trainings of sweep rate" in page
    assert 'id="sweep-0-' in page
    assert "no law" in page  # two budgets


@pytest.mark.slow
def test_a_combination_that_cannot_even_be_prepared_is_a_row(swept: Config) -> None:
    [row] = results(swept, "nothing")["rows"]
    assert row["select.budget_percent"] == 1e-9
    assert "too little for a single passage" in row["error"]


def test_a_single_trials_plans_are_made_before_its_trunk_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a branch begins depends on the rows of text, so on plans that no other trial shares."""
    sweeps = {"whole": {"grid": {"pack.whole_share": [0.5]}, "num_steps": [8]}}
    config = parse_config(
        {"run_dir": str(tmp_path), "sweeps": sweeps, "pack": {"text_share": 0.2}, "world": {"num_text": 20}}
    )
    done: list[str] = []

    class Recorder(pipeline.SweepFlow):
        @staticmethod
        def run_steps(run: Run, flow: Any) -> None:
            done.extend(label for step in flow for label in step.writes)

    monkeypatch.setattr(Trial, "branch_step", property(lambda _: done.append("branch")))
    monkeypatch.setattr(sweep_module, "run_trials", lambda *_, **__: {})
    trials = [
        replace(trial, resolved=Recorder().resolve(trial.config, f"whole/{trial.name}"))
        for trial in grid_trials(config, "whole")
    ]
    assert sweep_module.make_shared(config, "whole", trials, Recorder()) == {}
    before = done[: done.index("branch")]
    assert {"natural/plan", "text/plan", "natural/features", "teacher"} <= set(before)
    assert not {"trunk", "stage1"} & set(done)


def test_trials_share_a_plan_only_where_all_that_decides_it_is_the_same() -> None:
    def shared(sweep: dict[str, Any], label: str = "natural/plan") -> int:
        trials = grid_trials(small(sweep | {"num_steps": [100, 500]}), "one")
        return len({pipeline.resolve(trial.config).places.keys[label] for trial in trials})

    assert shared({"grid": {"distill.alpha": [0, 1], "distill.learning_rate": [1e-4, 1e-3]}}) == 1
    assert shared({"grid": {"distill.alpha": [0, 1]}}, "trunk") == 2
    assert shared({"grid": {"distill.alpha": [0, 1]}}, "stage1") == 4
    for key, values in {
        "model.tiny_lm.num_steps": [5, 6],
        "pack.context": [256, 512],
        "encode.storage": ["float16", "int8"],
    }.items():
        assert shared({"grid": {key: values}}) == 2, key


def test_as_many_trainings_at_a_time_as_the_largest_leaves_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 13.0})
    one, four = (
        small({"grid": {"pack.context": [1]}}, distill={"num_workers": number, "use_gpu": False}) for number in (1, 4)
    )
    assert concurrency([one]) == 13 // worker_resources(one.distill)["CPU"]
    assert concurrency([one, four]) == 13 // (4 * worker_resources(four.distill)["CPU"])
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 1.0})
    assert concurrency([four]) == 1


TRIALS = """
import sys
import ray
from ray import tune
from salad_ray.scaling.sweep import nothing_but_this_node

ray.init()
def where(given):
    tune.report({"node": ray.get_runtime_context().get_node_id()})
tuner = tune.Tuner(
    tune.with_resources(where, nothing_but_this_node()),
    param_space={"number": tune.grid_search([0, 1, 2])},
    run_config=tune.RunConfig(storage_path=sys.argv[1], verbose=0),
)
assert {result.metrics["node"] for result in tuner.fit()} == {ray.get_runtime_context().get_node_id()}
"""


@pytest.mark.slow
def test_trials_run_where_the_driver_does(tmp_path: Path) -> None:
    """Although the head has no core for work, and another machine has."""
    with head("--num-cpus=0") as cluster, node(cluster, "--num-cpus=4"):
        env = cluster.env | {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"}
        done = subprocess.run(
            [sys.executable, "-c", TRIALS, str(tmp_path)], env=env, capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stderr


def test_stage_two_is_left_out_where_the_grid_says_so() -> None:
    trials = grid_trials(small({"grid": {"stage2": [None, {"num_steps": 3}]}}), "one")
    assert trials[0].config.stage2 is None
    assert trials[1].config.stage2 is not None
    kept = grid_trials(small({"grid": {"stage2.control": [True]}}, stage2={}), "one")
    assert kept[0].config.stage2 is not None
    assert kept[0].config.stage2.control
    with pytest.raises(ConfigError, match=r"varies select\.gamma, but the config has no stage2"):
        grid_trials(small({"grid": {"distill.alpha": [0, 1], "select.gamma": [0, 5]}}), "one")


def small(sweep: dict[str, Any], **others: Any) -> Config:
    return parse_config({"run_dir": "/nowhere", "sweeps": {"one": sweep}, **others})


def test_every_combination_and_seed_is_a_trial_of_its_own() -> None:
    config = small({"grid": {"distill.alpha": [0, 1], "pack.speech_words": [[3, 6], [5, 15]]}, "seeds": [0, 1]})
    trials = grid_trials(config, "one")
    assert len(trials) == 8
    assert len({trial.name for trial in trials}) == 8
    assert trials[-1].config.distill.alpha == 1
    assert trials[-1].config.pack.speech_words == (5, 15)
    assert trials[-1].config.seed == 1
    assert {trial.config.run_dir for trial in trials} == {"/nowhere"}


def test_names_of_trials_are_names_of_files() -> None:
    def named(**grid: list[Any]) -> list[str]:
        sweep = {"grid": {key.replace("__", "."): values for key, values in grid.items()}}
        return [trial.name for trial in grid_trials(small(sweep, stage2={}), "one")]

    assert named(distill__alpha=[0.5]) == ["alpha=0.5"]
    odd = named(model__teacher=["Qwen/Qwen2.5-3B", "Qwen:Qwen2.5-3B"])
    assert len(set(odd)) == 2
    assert not any("/" in name for name in odd)
    assert named(distill__num_steps=[200], stage2__num_steps=[2]) == ["distill.num_steps=200,stage2.num_steps=2"]
    [trial] = grid_trials(small({"grid": {"distill.alpha": [0.5]}, "seeds": [1], "num_positions": [1e6]}), "one")
    assert trial.name == "alpha=0.5,seed=1,positions=1e+06"


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"grid": {}}, "at least 1"),
        ({"grid": {"distill.alpha": []}}, "without values"),
        ({"grid": {"distill.alpha": [1, 1]}}, "twice"),
        ({"grid": {"run_dir": ["a"]}}, "cannot vary 'run_dir'"),
        ({"grid": {"seed": [1, 2]}}, "name seeds"),
        ({"grid": {"distill.alpha": [1]}, "num_steps": [1], "num_positions": [1.0]}, "give one of them"),
        ({"grid": {"distill.alpha": [1]}, "num_steps": [0]}, "greater than 0"),
        ({"grid": {"select.gamma": [1]}, "num_steps": [4]}, "does not change"),
        ({"grid": {"set": ["web"]}}, "cannot vary 'set'"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(sweep: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small(sweep)


def test_a_value_that_makes_no_config_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"sweeps\.one: alpha=2.*distill\.alpha"):
        grid_trials(small({"grid": {"distill.alpha": [1, 2]}}), "one")
    with pytest.raises(ConfigError, match=r"did you mean 'distill\.alpha'"):
        grid_trials(small({"grid": {"distill.alhpa": [1]}}), "one")
    with pytest.raises(ConfigError, match="'alpha' is a value"):
        grid_trials(small({"grid": {"distill.alpha.x": [1]}}), "one")
    with pytest.raises(ConfigError, match="there is no sweep 'two'"):
        pipeline.run_sweeps(small({"grid": {"distill.alpha": [1]}}), "two")


def test_laws_are_told_for_each_combination_or_why_there_is_none() -> None:
    rows = [
        {"key": key, "budget": d, "num_positions": d, "misalignment": 0.1 + key * 2 * d**-0.5, "error": ""}
        for key in (1, 2)
        for d in (100, 300, 1000, 3000, 10000)
    ]
    rows += [
        {"key": 3, "budget": d, "num_positions": d, "misalignment": 0.1 + 1e-5 * d, "error": ""}
        for d in (100, 1000, 5000, 10000)
    ]
    rows.append({"key": 3, "budget": 1, "error": "failed"})
    rows += [row | {"key": {"of": "a section"}} for row in rows[:5]]
    found = laws(rows, ["key"])
    assert found.pop()["values"] == {"key": {"of": "a section"}}
    assert [law["values"]["key"] for law in found] == [1, 2, 3]
    assert found[0]["irreducible"] == pytest.approx(0.1, rel=0.01)
    assert "grows" in found[2]["problem"]
    json.dumps(found, allow_nan=False)


def test_budgets_are_sorted_and_told_once() -> None:
    assert SweepConfig(grid={"a": (1,)}, num_steps=(8, 4, 8)).budgets == (4, 8)


def test_floors_have_columns_of_their_own_beside_what_was_heard(tmp_path: Path) -> None:
    places = Places(str(tmp_path), "sweep/trial", {})
    found = {"system": "stage1", "metric": "acc", "heard": None, "benchmark": "world", "ci_low": 0.1, "ci_high": 1.0}
    accuracy = [
        found | {"modality": modality, "condition": condition, "accuracy": value}
        for modality, condition, value in (
            ("speech", "clean", 0.9), ("speech", "silence", 0.2), ("speech", "swapped", 0.3), ("text", "choices", 0.1)
        )
    ]  # fmt: skip
    names = ("misalignment", "forgetting", "distillation", "misalignment_whole", "forgetting_whole")
    facts = {key: 0.0 for name in names for key in (name, f"{name}_standard_error")}
    domains = {
        name: facts | {"heard": name != "music", "misalignment": m, "misalignment_standard_error": error}
        for name, m, error in (("animals", 0.1, 0.03), ("cooking", 0.3, 0.04), ("music", 2.0, None))
    }
    facts |= {"num_positions": 1, "train_seconds": 1.0, "by_domain": domains}
    accuracy.append(accuracy[0] | {"heard": True, "accuracy": 0.95, "ci_low": 0.9, "ci_high": 0.98})
    write_json(f"{places.report_url}/metrics.json", {"stage1": facts, "accuracy": accuracy})
    config = parse_config({"run_dir": str(tmp_path)})
    row = measured_row(Trial("trial", {}, config, resolved=Run(config, places)))
    assert (row["world speech"], row["world speech silence"], row["world speech swapped"]) == (0.9, 0.2, 0.3)
    assert row["world text choices"] == 0.1
    assert "world text" not in row
    heard = [row[f"world speech heard{part}"] for part in ("", " low", " high")]
    assert heard == [0.95, 0.9, 0.98]
    assert row["heard_misalignment"] == pytest.approx(0.2)
    assert row["heard_misalignment_standard_error"] == pytest.approx(0.025)
    assert row["unheard_misalignment_standard_error"] is None


def trained(word_ends: bool, num_positions: int, heard: float, whole: float) -> dict[str, Any]:
    values = {"misalignment": 9.0, "heard_misalignment": heard, "misalignment_whole": whole}
    return {"distill.word_ends": word_ends, "num_positions": num_positions, "error": ""} | values


def test_what_reaches_the_same_m_with_less_is_told() -> None:
    """M falls by half as positions double; without word ends, four times as many are needed."""
    rows = [trained(True, n * 100, 0.8 / n, 0.5) for n in (1, 2, 4)]
    rows += [trained(False, n * 100, 3.2 / n, 1.0) for n in (1, 2, 4)]
    rows.append({"distill.word_ends": True, "num_positions": 50, "error": "it broke"})
    first, second = reached(rows, ["distill.word_ends"])
    assert (first["combination"], first["other"]) == ("distill.word_ends=True", "distill.word_ends=False")
    assert (first["positions"], first["ratio"], first["at_most"]) == (100, 4.0, True)
    assert (second["of"], second["ratio"]) == ("misalignment_whole", 4.0)
    assert told_reached(second).endswith("by 100: at least 4.0 × fewer")
    rows[0]["heard_misalignment"] = 1.6  # now between the first two budgets: 1.6 → 0.4 over a doubling
    [first, _] = reached(rows, ["distill.word_ends"])
    assert first["positions"] == pytest.approx(100 * 2**0.5)
    assert not first["at_most"]


def test_nothing_is_reached_beyond_what_was_trained() -> None:
    rows = [trained(True, n * 100, 1.0, 1.0) for n in (1, 2)] + [trained(False, n * 100, 0.9, 1.0) for n in (1, 2)]
    found = reached(rows, ["distill.word_ends"])
    assert {(each["of"], each["combination"]) for each in found} == {
        ("misalignment", "distill.word_ends=False"),
        ("misalignment_whole", "distill.word_ends=True"),
        ("misalignment_whole", "distill.word_ends=False"),
    }
