"""Runs: tables are found by what decides them, shared by the configs that agree, deleted when nobody has them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from factories import small_world_config
from typer.testing import CliRunner

from salad_ray import pipeline
from salad_ray.cli import app
from salad_ray.config import Config, ConfigError, identity, operational_keys
from salad_ray.configfile import parse_config, replaced
from salad_ray.flow import Step, steps
from salad_ray.lease import held
from salad_ray.runs import (
    Places,
    Run,
    all_tables,
    followed,
    forget,
    kept_runs,
    key_of,
    lead_to,
    open_places,
    open_run,
    write_index,
)
from salad_ray.tables import SCHEMA_VERSION, Table, TableError, file_exists, read_bytes, write_bytes, write_json

ROOT = Path(__file__).resolve().parents[1]
STEP = Step("encode", "natural", ("features",), ("natural/utterances",), ("encode",))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return parse_config(small_world_config(tmp_path))


def make_all(run: Run) -> None:
    """Every table of a run, on paper."""
    write_index(run)
    for label in run.places.keys:
        table = run.labelled(label)
        write_json(f"{table.url}/begun.json", {})
        write_bytes(f"{table.url}/part-0.parquet", bytes(1000))
        write_json(f"{table.url}/manifest.json", {"inputs": {}, "stage": "a stage"})


def there(run: Run) -> set[str]:
    return {label for label in run.places.keys if not run.labelled(label).is_new()}


# ---- keys


def test_a_key_is_made_of_all_that_decides_a_table_and_of_nothing_else(config: Config) -> None:
    inputs, facts = {"natural/utterances": "abc"}, {"weights": "w"}
    own = key_of(config, STEP, inputs, facts)
    others = {
        "config": key_of(replaced(config, {"encode.storage": "int8"}), STEP, inputs, facts),
        "input": key_of(config, STEP, {"natural/utterances": "abd"}, facts),
        "source": key_of(config, STEP, inputs, {"weights": "v"}),
        "version": key_of(config, replace(STEP, version=2), inputs, facts),
        "set": key_of(config, replace(STEP, set="heldout"), inputs, facts),
    }
    assert len({own, *others.values()}) == 1 + len(others)
    for changes in ({"encode.batch_secs": 7.0}, {"seed": 3}, {"run_dir": "elsewhere"}, {"encode.num_gpus": 1.0}):
        assert key_of(replaced(config, changes), STEP, inputs, facts) == own, changes
    assert key_of(config, STEP, inputs | {"another": "x"}, facts) == own


def test_what_is_operational_is_marked_at_the_key() -> None:
    marked = operational_keys(Config)
    assert {"distill.num_workers", "encode.num_gpus", "synthesize.batch_size", "distill.zero_stage"} <= marked
    assert not {"distill.alpha", "model.tiny_lm.batch_size", "select.gamma", "pack.num_lanes"} & marked
    assert not set(identity(parse_config({}), "distill")["distill"]) & {"num_workers", "log_every"}


def test_every_decisive_key_decides_some_table() -> None:
    """A key that is in no step's declaration, and not operational, would change nothing although it should."""
    text = {"pack": {"text_share": 0.3}}
    config = parse_config(
        {"stage2": {"control": True}, "evaluate": {"cascade": "pocketsphinx"}, "world": {"num_text": 9}} | text
    )
    real = parse_config(
        {"ingest": {"corpora": ["c"], "web": ["w"], "text": ["t"]}, "stage2": {}, "encode": {"augment": {"share": 0.5}}}
        | text
        | {"evaluate": {"benchmarks": [{"name": "piqa", "path": "x", "max_items": 1}]}, "model": {"teacher": "t"}}
    )
    declared = {key for each in (config, real) for step in steps(each) for key in step.keys}
    sections = [name for name in Config.model_fields if name not in ("run_dir", "set", "strict", "ray", "sweeps")]
    printed_only = {"probe.min_reliability"}
    in_facts = {"evaluate.recogniser", "evaluate.recogniser_revision"}
    for section in sections:
        if section in declared:
            continue
        names = getattr(parse_config({}), section)
        for name in type(names).model_fields if hasattr(type(names), "model_fields") else ():
            key = f"{section}.{name}"
            is_known = any(each == key or each.startswith(f"{key}.") for each in declared)
            assert is_known or key in operational_keys(Config) | printed_only | in_facts, key


# ---- runs that share a folder


def test_runs_share_what_they_agree_on_and_a_moved_one_is_found(config: Config, tmp_path: Path) -> None:
    first = pipeline.resolve(config)
    second = pipeline.resolve(replaced(config, {"select.gamma": 0.0}))
    assert first.places.name != second.places.name
    for run in (first, second):
        make_all(run)
    shared = {label for label, key in first.places.keys.items() if second.places.keys[label] == key}
    assert {"natural/features", "stage1", "web/clusters"} <= shared
    assert "stage2" not in shared
    assert len(all_tables(config.run_dir)) == 2 * len(first.places.keys) - len(shared)
    moved = tmp_path / "moved"
    shutil.move(config.run_dir, moved)
    assert open_places(f"{moved}/")[0] == replace(second.places, run_dir=str(moved))
    older = open_run(str(moved), first.places.name)
    assert older.config.select.gamma == 5
    assert older.config.run_dir == str(moved)
    assert older.labelled("stage2").manifest() is not None
    [(name, difference)] = pipeline.other_runs(open_run(str(moved)))
    assert (name, difference) == (first.places.name, "select.gamma=5.0")


def test_a_run_of_an_earlier_version_is_refused_in_one_sentence(config: Config) -> None:
    write_bytes(f"{config.run_dir}/config.yaml", b"seed: 1\n")
    for use in (lambda: open_places(config.run_dir), lambda: pipeline.start(config, steps(config))):
        with pytest.raises(TableError, match=r"holds a run of an earlier version of salad_ray.*choose another run_dir"):
            use()


def test_a_run_whose_manifests_have_another_form_is_refused_too(config: Config) -> None:
    run = pipeline.resolve(config)
    write_index(run)
    index = json.loads(Path(run.places.index_url).read_text())
    for earlier in ({"schema_version": SCHEMA_VERSION - 1}, {}):
        write_json(run.places.index_url, {name: index[name] for name in index if name != "schema_version"} | earlier)
        with pytest.raises(TableError, match=r"holds a run of an earlier version of salad_ray.*choose another run_dir"):
            open_places(config.run_dir)
    write_index(pipeline.start(config, steps(config)))  # making it anew is no fault
    assert open_places(config.run_dir)[0] == run.places


def test_what_is_no_run_is_said(config: Config, tmp_path: Path) -> None:
    with pytest.raises(TableError, match="holds no run; name a run_dir"):
        open_places(str(tmp_path))
    make_all(pipeline.resolve(config))
    with pytest.raises(TableError, match=r"has no run 'other'; it has [0-9a-f]{8}"):
        open_places(config.run_dir, "other")


def test_a_table_that_the_config_does_not_have_is_never_there(config: Config) -> None:
    run = pipeline.resolve(replaced(config, {"stage2": None}))
    assert run.table("", "stage2").manifest() is None
    assert run.table("", "stage2").shards() == []


# ---- deleting


def test_redo_deletes_what_was_made_of_a_table_too_and_asks_where_others_have_it(config: Config) -> None:
    run = pipeline.resolve(config)
    other = pipeline.resolve(replaced(config, {"select.gamma": 0.0}))
    for each in (other, run):
        make_all(each)
    asked: list[str] = []
    with pytest.raises(ConfigError, match="nothing was deleted"):
        pipeline.delete_tables(run, ["natural/features"], lambda question: bool(asked.append(question)))
    assert other.places.name in asked[0]
    assert there(run) == set(run.places.keys)
    pipeline.delete_tables(run, ["active/selection", "active/passages"], lambda _: pytest.fail("nobody else has it"))
    assert {"active/utterances", "active/plan", "stage2", "heldout/measurements_stage2"} <= set(
        run.places.keys
    ) - there(run)
    assert {"stage1", "control", "web/clusters"} <= there(run)
    assert there(other) == set(other.places.keys)
    pipeline.delete_tables(run, ["probe/passages"], lambda _: True)
    assert "active/selection" not in there(other), "it was made of the same probe"
    assert "natural/features" in there(other)


def test_clean_lists_and_deletes_what_no_kept_run_has(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = pipeline.resolve(config), pipeline.resolve(replaced(config, {"select.gamma": 0.0}))
    for each in (other, run):
        make_all(each)
    pipeline.clean(config.run_dir, [], lambda _: pytest.fail("there is nothing to ask about"))
    assert "nothing to clean" in capsys.readouterr().out
    questions: list[str] = []
    pipeline.clean(config.run_dir, [other.places.name], lambda question: bool(questions.append(question)))
    assert f"and forget {other.places.name}" in questions[0]
    assert there(other) == set(other.places.keys), "the answer was no"
    busy = other.labelled("stage2")
    with held(busy.url):
        pipeline.clean(config.run_dir, [other.places.name], lambda _: True)
    told = capsys.readouterr().out
    assert other.labelled("active/selection").url in told
    assert there(run) == set(run.places.keys)
    assert not busy.is_new(), "somebody was at work on it"
    assert [places.name for places in kept_runs(config.run_dir)] == [run.places.name]
    pipeline.clean(config.run_dir, [], lambda _: True)
    assert busy.is_new()
    with pytest.raises(ConfigError, match="has no run 'gone'"):
        pipeline.clean(config.run_dir, ["gone"], lambda _: True)


def test_a_forgotten_newest_run_gives_its_place_to_the_last_of_the_others(config: Config) -> None:
    runs = [pipeline.resolve(replaced(config, {"select.gamma": float(gamma)})) for gamma in range(3)]
    for run in runs:
        make_all(run)
        write_bytes(f"{run.places.report_url}/metrics.json", b"{}")
        lead_to(run.places)
    pipeline.clean(config.run_dir, [runs[2].places.name], lambda _: True)
    newest = open_places(config.run_dir)[0].name
    assert newest in {runs[0].places.name, runs[1].places.name}
    assert Path(config.run_dir, "report").resolve() == Path(config.run_dir, "runs", newest, "report").resolve()
    assert not Path(config.run_dir, "runs", runs[2].places.name).exists()


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    write_json(f"{tmp_path}/thesis/chapter/manifest.json", {})
    with pytest.raises(TableError, match="holds no run"):
        pipeline.clean(str(tmp_path), [], lambda _: True)
    assert (tmp_path / "thesis/chapter/manifest.json").exists()


def test_the_commands_ask_before_they_delete_and_find_runs_by_name(config: Config, tmp_path: Path) -> None:
    run, other = pipeline.resolve(config), pipeline.resolve(replaced(config, {"select.gamma": 0.0}))
    for each in (other, run):
        make_all(each)
    asked = CliRunner().invoke(app, ["clean", config.run_dir, "--forget", other.places.name])
    assert asked.exit_code == 0, asked.output
    assert "there is nobody to ask here; say --yes" in asked.output
    assert there(other) == set(other.places.keys)
    shown = CliRunner().invoke(app, ["status", config.run_dir, "--run", other.places.name])
    assert shown.exit_code == 0, shown.output
    assert f"also here: run {run.places.name} (select.gamma=5.0)" in shown.output
    page = tmp_path / "page.html"
    named = [f"{config.run_dir}#{each.places.name}" for each in (run, other)]
    compared = CliRunner().invoke(app, ["compare", *named, "--out", str(page)])
    assert compared.exit_code == 0, compared.output
    assert f"{run.places.name} · {other.places.name}" in page.read_text()
    assert CliRunner().invoke(app, ["clean", config.run_dir, "--forget", other.places.name, "--yes"]).exit_code == 0
    assert not there(other) - there(run)


@pytest.mark.parametrize("place", ["{tmp}/run", "memory://{tmp}/run"])
def test_what_a_run_has_made_is_found_by_a_short_way(place: str, tmp_path: Path) -> None:
    run_dir = place.format(tmp=tmp_path)
    for key in ("first", "second"):  # the newest is what it leads to
        places = Places(run_dir, key, {"stage1": key})
        table = places.table("", "stage1")
        write_bytes(f"{table.url}/model/config.json", key.encode())
        write_json(f"{table.url}/manifest.json", {})
        write_bytes(f"{places.report_url}/metrics.json", key.encode())
        lead_to(places)
    lead_to(Places(run_dir, "sweep/trial", {"stage1": "first"}))
    if "://" in place:
        assert followed(f"{run_dir}/stage1/model") == f"{table.url}/model"
    else:
        assert Path(run_dir, "stage1/model/config.json").read_text() == "second"
        assert Path(run_dir, "report/metrics.json").read_text() == "second"
        assert not Path(run_dir, "stage1/model").readlink().is_absolute(), "it can be moved"
        assert followed(f"{run_dir}/stage1/model") == f"{run_dir}/stage1/model"


def test_the_index_is_plain_data(config: Config) -> None:
    run = pipeline.resolve(config)
    write_index(run)
    index: dict[str, Any] = json.loads(Path(run.places.index_url).read_text())
    assert index["tables"] == dict(run.places.keys)
    assert index["reads"]["stage1"][0] == "trunk"
    assert parse_config(index["config"]) == config
    newest = yaml.safe_load(Path(config.run_dir, "config.yaml").read_text())
    assert newest["select"]["gamma"] == config.select.gamma
    partly = Run(config, replace(run.places, keys={"teacher": "t"}))
    write_index(partly)  # a stage alone knows few places
    assert open_places(config.run_dir)[0].keys == dict(run.places.keys) | {"teacher": "t"}


@pytest.mark.parametrize("place", ["{tmp}/run", "memory://{tmp}/run"])
def test_a_person_finds_the_tables_of_the_newest_run(config: Config, place: str, tmp_path: Path) -> None:
    config = config.model_copy(update={"run_dir": place.format(tmp=tmp_path)})
    runs = [
        Run(config, Places(config.run_dir, name, {"natural/features": name, "stage1": name}))
        for name in ("first", "second")
    ]
    for run in runs:
        make_all(run)
    partly = replace(runs[1], places=replace(runs[1].places, keys={"stage1": "second"}))
    write_index(partly)
    for run in reversed(runs):
        listed = str(read_bytes(f"{config.run_dir}/INDEX.txt"), "utf-8")
        assert f"Tables of run {run.places.name}," in listed
        found = dict(line.split() for line in listed.partition("\n\n")[2].splitlines())
        assert list(found) == ["natural/features", "stage1"]
        for label, path in found.items():
            assert Table(f"{config.run_dir}/{path}", "", label).shards() == run.labelled(label).shards() == ["part-0"]
            assert path.endswith(run.places.name)
        forget(run.places)
    assert not file_exists(f"{config.run_dir}/INDEX.txt")


@pytest.mark.slow
def test_two_drivers_that_want_the_same_table_make_it_once(tmp_path: Path) -> None:
    data = small_world_config(tmp_path) | {"ray": {"num_cpus": 1}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(data))
    command = [sys.executable, "-m", "salad_ray.cli", "ingest", str(file), "set=natural"]
    drivers = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    told = [driver.communicate(timeout=240)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], told
    assert sum("kept in" in each for each in told) == 1, told
    assert sum("done already" in each for each in told) == 1, told
    [table] = [Table(each.url, "natural", "passages") for each in all_tables(data["run_dir"])]
    assert len(table.shards()) == 4
