"""The planner: the paper's numbers from the paper's config, rates that a run has measured, clear refusals."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from factories import hand_table, keep_run, make_features, make_tokenizer, small_world_config
from rich.console import Console
from transformers import Qwen2Config
from typer.testing import CliRunner

from salad_ray import pipeline
from salad_ray.cli import app
from salad_ray.config import Config, ConfigError
from salad_ray.configfile import dump_config, load_config, parse_config, replaced
from salad_ray.flow import merged, steps
from salad_ray.runs import open_run
from salad_ray.scaling.number import Number, total, weakest
from salad_ray.scaling.plan import Plan, StageCost, fit_training, make_plan, plan_grids
from salad_ray.scaling.rates import RATES, Rates, comparable, load_rates, measured_rates
from salad_ray.sequences.plan import plan_shard_name
from salad_ray.tables import Features, PlanRow, Utterance, to_arrow, write_json

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
KOKORO = {
    "synthesize.synthesizer": "kokoro",
    "synthesize.voices": ["af_heart"],
    "synthesize.evaluation_voices": ["bf_emma"],
}


def of_paper(*overrides: str) -> Config:
    return load_config(ROOT / "configs" / "salad_3b.yaml", overrides)


def plan_of(config: Config, rates: Rates | None = None) -> Plan:
    return make_plan(config, rates or load_rates())


@pytest.fixture(scope="module")
def paper() -> Plan:
    return plan_of(of_paper())


@pytest.fixture(scope="module")
def quickstart() -> Config:
    return load_config(ROOT / "configs" / "quickstart.yaml")


def value(plan: Plan, name: str) -> float:
    return next(line.value for line in plan.lines if line.name == name)


def sources(plan: Plan) -> dict[str, str]:
    """Of the lines of derivation and storage, in one word."""
    return {line.name: line.source.split()[0] for line in (*plan.lines, *plan.storage)}


def cost(plan: Plan, stage: str, name: str = "") -> StageCost:
    return next(cost for cost in plan.stages if (cost.stage, cost.set) == (stage, name))


def rates_file(folder: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """Our rates, changed."""
    rates = yaml.safe_load(RATES.read_text())
    change(rates)
    own = folder / "mine.yaml"
    own.write_text(yaml.safe_dump(rates))
    return str(own)


def cluster_of(gpus: int, memory_gib: float = 80) -> Rates:
    rates = load_rates()
    cluster = rates.cluster.model_copy(update={"gpus": gpus, "gpu_memory_gib": memory_gib})
    return rates.model_copy(update={"cluster": cluster})


def test_the_papers_config_gives_the_papers_numbers(paper: Plan) -> None:
    assert value(paper, "natural speech") == pytest.approx(141_000, rel=0.01)
    assert value(paper, "positions of an epoch") == pytest.approx(3.4e9, rel=0.05)
    # A third of the samples is text: 120 words × 1.3 tokens, beside speech of 0.3 × 2,048 positions.
    assert value(paper, "text of Stage I") == pytest.approx(156 / (156 + 2 * 614), rel=0.01)
    assert value(paper, "epochs of Stage I") == pytest.approx(7.4 * (1 - 156 / (156 + 2 * 614)), abs=0.3)
    assert value(paper, "features") == pytest.approx(6.5e12, rel=0.02)
    assert value(paper, "FLOP in all") == pytest.approx(5.5e20, rel=0.1)
    assert value(paper, "synthetic speech") == pytest.approx(1_400, rel=0.02)
    trunk, decay = cost(paper, "trunk"), cost(paper, "stage1")
    assert (trunk.secs + decay.secs) / 3600 == pytest.approx(6, rel=0.15)
    assert decay.amount == pytest.approx(0.2 * (trunk.amount + decay.amount))
    assert trunk.gpu_hours == pytest.approx(trunk.secs * 64 / 3600)


def test_frames_side_by_side_and_whole_samples_change_the_positions_of_an_epoch(paper: Plan) -> None:
    words, frames = value(paper, "words"), value(paper, "speech frames")
    tokens = (value(paper, "positions of an epoch") - value(paper, "share of words heard") * frames) / (
        1 - value(paper, "share of words heard")
    )
    pairs = plan_of(of_paper("model.adapter.stride=2"))
    assert value(pairs, "speech frames") == frames
    assert value(pairs, "speech positions") == pytest.approx(frames / 2 + words / 4 / 10)  # spans of 10 words
    heard = value(pairs, "share of words heard")
    expected = heard * value(pairs, "speech positions") + (1 - heard) * tokens
    assert value(pairs, "positions of an epoch") == pytest.approx(expected)
    whole = plan_of(of_paper("pack.whole_share=0.5"))
    assert value(paper, "share of words heard") + 0.1 < value(whole, "share of words heard") < 0.95
    assert value(whole, "positions of an epoch") > 1.1 * value(paper, "positions of an epoch")
    assert value(pairs, "features") == value(whole, "features") == value(paper, "features")


def test_every_stage_is_there_and_the_totals_add_up(paper: Plan) -> None:
    assert [(cost.stage, cost.set) for cost in paper.stages] == [(s.stage, s.set) for s in merged(steps(of_paper()))]
    assert paper.totals["secs"] == pytest.approx(sum(cost.secs for cost in paper.stages))
    assert paper.totals["storage_gb"] == pytest.approx(sum(line.value for line in paper.storage) / 1e9)
    assert paper.totals["money"] > paper.totals["compute"] > 0
    assert paper.memory[0].is_configured
    assert paper.memory[0].fits
    assert any("assumptions" in note for note in paper.notes)


def test_held_out_recordings_are_read_aligned_and_encoded_but_not_trained_on() -> None:
    plan = plan_of(of_paper("ingest.heldout_share=0.2"))
    for stage in ("ingest", "align", "encode"):
        assert cost(plan, stage, "natural").amount == pytest.approx(141_000)
    assert cost(plan, "measure", "natural").amount == pytest.approx(0.2 * 141_000 * 3)
    assert value(plan, "training speech") == pytest.approx(0.8 * 141_000)
    assert value(plan, "speech frames") == pytest.approx(0.8 * 141_000 * 3600 * 12.5)
    assert value(plan, "features") == pytest.approx(141_000 * 3600 * 12.5 * 512 * 2)
    assert next(line.value for line in plan.storage if line.name == "recorded corpora") == 141_000 * 58e6


def test_passages_and_their_speech_are_shown(paper: Plan) -> None:
    assert value(paper, "probe passages") == 128 * 64
    for passages, speech in (("probe passages", "probe speech"), ("selected passages", "synthetic speech")):
        assert value(paper, speech) == pytest.approx(value(paper, passages) * 120 / 2.6 / 3600)


def test_the_control_counts_in_flop_as_in_hours(quickstart: Config) -> None:
    speech = replaced(quickstart, {"pack.text_share": 0, "stage2.shares": {"natural": 0.5, "active": 0.5, "text": 0}})
    alone = plan_of(replaced(speech, {"stage2.control": False}))
    both = plan_of(speech)
    more = value(both, "Stage II") * value(both, "FLOP of a position")
    assert value(both, "FLOP in all") - value(alone, "FLOP in all") == pytest.approx(more)
    assert cost(both, "stage2").amount == 2 * cost(alone, "stage2").amount


def test_clustering_is_one_gpu_job_and_then_actors_without(paper: Plan) -> None:
    rates = load_rates()
    fit = rates.stages["cluster fit"]
    assert fit.unit is not None
    fit_secs = fit.start + 1_000_000 * fit.unit
    found = cost(paper, "cluster", "web")
    assert found.gpu_hours == pytest.approx(fit_secs / 3600)
    assert found.actors == rates.cluster.cpus
    assert found.cpu_hours == pytest.approx((found.secs - fit_secs) * found.actors / 3600)


def test_what_comes_from_an_assumption_is_called_one(paper: Plan) -> None:
    marks = sources(paper)
    derived = {name for name, source in marks.items() if source == "derived"}
    assert derived == {
        "held-out passages", "probe passages", "FLOP of a position of text",
        "share of words heard", "text LLM", "adapter", "checkpoints", "models",
    }  # fmt: skip
    assert cost(paper, "stage1").source == "assumption"
    rates = load_rates()
    known = {kind: rate.model_copy(update={"source": "measured in x"}) for kind, rate in rates.stages.items()}
    told = plan_of(of_paper(), rates.model_copy(update={"stages": known}))
    assert cost(told, "ingest", "heldout").source == "measured in x"  # as many passages as the config says
    assert cost(told, "encode", "natural").source == "assumption"  # its hours are the corpora's


@pytest.mark.parametrize(
    ("of", "name"),
    [
        ([], "derived"),
        (["derived", "measured in x"], "measured in x"),
        (["measured in x", "assumption", "derived"], "assumption"),
    ],
)
def test_the_weakest_source_counts(of: list[str], name: str) -> None:
    assert weakest(of) == name


def test_a_number_shows_its_formula_and_keeps_its_weakest_source() -> None:
    hours, share = Number(1500, "hours"), Number(0.25, "# (share)", "assumption")
    left = 2 * (hours - hours * share) / (hours / 4)
    assert (float(left), left.how) == (6, "2 × (hours − hours × 0.25 (share)) / (hours / 4)")
    assert (left.source, (hours / 7).source) == ("assumption", "derived")
    up = total([hours, 1 - share, Number(1 / 3)]).rounded("⌈⌉", math.ceil)
    assert (float(up), up.how) == (1502, "⌈hours + 1 − 0.25 (share) + 0.3333⌉")
    assert (up.source, (up * 1000).how) == ("assumption", f"{up.how} × 1,000")


def test_the_derivation_shows_the_formulas_that_it_reckons(paper: Plan) -> None:
    shown = {line.name: line.how for line in (*paper.lines, *paper.storage)}
    assert shown["training speech"] == "natural speech − held-out recordings"
    assert shown["held-out recordings"] == "natural speech × 0.001 (ingest.heldout_share)"
    assert shown["steps of Stage I"] == "⌈24,000,000,000 (distill.num_positions) / positions of a step⌉"
    assert shown["checkpoints"] == "2 (trainings) × (text LLM + adapter) × 3 (checkpoints) × 12"


@pytest.mark.parametrize(
    ("overrides", "memory_gib", "words"),
    [
        (["distill.micro_batch_rows=8"], 80, r"does not fit.*; distill.zero_stage=2 with distill.micro_batch_rows=4"),
        ([], 20.5, r"distill.zero_stage=3 with distill.micro_batch_rows=1 does"),
        ([], 16, r"take distill.activation_checkpointing=true, a smaller"),
        (["distill.activation_checkpointing=true"], 6, r"fewer rows; take a smaller pack.context"),
    ],
)
def test_what_does_not_fit_is_said_with_the_least_change(overrides: list[str], memory_gib: float, words: str) -> None:
    plan = plan_of(of_paper(*overrides), cluster_of(64, memory_gib))
    assert plan.memory[0].fits is False
    [note] = [note for note in plan.notes if "does not fit" in note]
    assert re.search(words, note), note


def test_an_elastic_training_takes_the_gpus_that_there_are() -> None:
    elastic = of_paper("distill.num_workers=[8, 64]")
    small, large = (plan_of(elastic, cluster_of(gpus)) for gpus in (16, 64))
    assert cost(small, "stage1").actors == 16
    assert cost(small, "stage1").secs == pytest.approx(4 * cost(large, "stage1").secs, rel=0.01)
    assert not any("GPUs" in note for note in small.notes)


def test_gpus_that_are_not_there_are_named() -> None:
    [note] = [note for note in plan_of(of_paper(), cluster_of(16)).notes if "GPUs" in note]
    assert "training needs 64 GPUs at once, and the cluster has 16; lower distill.num_workers" in note
    training, others = (note for note in plan_of(of_paper(), cluster_of(0)).notes if "GPUs" in note)
    assert "needs 64 GPUs at once, and the cluster has 0" in training
    assert "encode.num_gpus=1" in others
    assert "the cluster has 0 GPUs; set them to 0, or raise cluster.gpus" in others


def test_prices_and_rates_come_from_the_users_file(tmp_path: Path, paper: Plan) -> None:
    def change(rates: dict[str, Any]) -> None:
        rates["prices"]["gpu_hour"] = 10.0
        rates["training"]["mfu"] = 0.2

    own = cost(plan_of(of_paper(), load_rates(rates_file(tmp_path, change))), "stage1")
    assert own.gpu_hours == pytest.approx(2 * cost(paper, "stage1").gpu_hours, rel=0.01)
    assert own.money == pytest.approx(2 * 10 / 3 * cost(paper, "stage1").money, rel=0.01)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rates: rates["prices"].pop("gpu_hour"), r"'prices.gpu_hour' is missing; see .*rates\.yaml"),
        (lambda rates: rates["prices"].update(gpu_hour=-3), r"'prices.gpu_hour' is -3: .*greater than or equal to 0"),
        (lambda rates: rates["training"].update(mfu=40), r"'training.mfu' is 40: .*less than or equal to 1"),
        (lambda rates: rates["speech"].update(words_per_sec=0), r"'speech.words_per_sec' is 0: .*greater than 0"),
        (lambda rates: rates["corpora"].update(libriheavy="many"), r"'corpora.libriheavy' is 'many': .*number"),
        (lambda rates: rates["stages"]["pack"].update(unit=None), r"'stages.pack.unit' is null"),
        (
            lambda rates: rates["stages"]["pack"].update(strat=1),
            "did you mean 'stages.pack.start'",
        ),
        (lambda rates: rates["prices"].update(gpu_huor=1), r"'prices.gpu_huor'; did you mean 'prices.gpu_hour'"),
        (
            lambda rates: rates["stages"].update({"encode mimmi": rates["stages"]["pack"]}),
            "did you mean 'stages.encode mimi'",
        ),
        (lambda rates: rates["cluster"].update(gpu="RTX 9000"), r"'cluster.gpu' is 'RTX 9000'"),
        (lambda rates: rates["models"].update({"Qwen/Qwen2.5-3B": {}}), r"models.Qwen/Qwen2.5-3B' is no config"),
        *(
            (
                lambda rates, shape=shape: rates["models"].update({"Qwen/Qwen2.5-3B": shape}),
                r"2.5-3B' is no config of a",
            )
            for shape in (
                {"model_type": "bert"},
                {"model_type": "t5"},
                {"model_type": "qwen2", "num_attention_heads": 0},
            )
        ),
        (lambda rates: rates.update(sources={"mfuu": "me"}), r"'sources.mfuu'; did you mean 'sources.mfu'"),
        (lambda rates: rates["stages"].pop("encode mimi"), "no 'encode mimi'; take it over"),
        (lambda rates: rates["corpora"].pop("libriheavy"), "how many hours 'libriheavy' has"),
        (lambda rates: rates["web"].clear(), "how many passages 'fineweb-edu' has"),
    ],
)
def test_what_is_wrong_with_the_rates_is_named(
    change: Callable[[dict[str, Any]], object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        plan_of(of_paper(), load_rates(rates_file(tmp_path, change)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"no such file of rates; see .*rates\.yaml, .* copied and edited"),
        (b"- 1\n- 2\n", r"holds a list, but a file of rates is a mapping of keys to values; see"),
        (b"", r"'cluster' is missing; see .*rates\.yaml"),
        (b"\x00\xff\xfe\x81PK", r"cannot be read as a file of rates .*; see"),
        (b"prices: [", r"not valid YAML"),
    ],
)
def test_what_is_no_file_of_rates_is_named(content: bytes | None, words: str, tmp_path: Path) -> None:
    own = tmp_path / "rates"
    if content is not None:
        own.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        load_rates(str(own))
    assert str(caught.value).startswith(str(own))
    with pytest.raises(ConfigError, match=r"cannot be read as a file of rates .*; see"):
        load_rates(str(tmp_path))


def test_a_model_that_cannot_be_looked_up_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"its config cannot be read here.*`models`"):
        plan_of(of_paper(f"model.teacher={tmp_path}"))


def test_the_embedded_world_needs_no_rates_of_corpora(quickstart: Config) -> None:
    plan = plan_of(quickstart)
    assert value(plan, "natural speech") == pytest.approx(6.6, rel=0.3)  # as a run of it had
    assert "recorded corpora" not in {line.name for line in plan.storage}


@pytest.fixture
def measured(tmp_path: Path) -> Config:
    """A run of which only that is there from which rates are measured, in numbers that are easy to check.

    8 shards of a quarter of an hour each, taken by two actors after 5 s of start in waves of 10 s.
    """
    run = parse_config(small_world_config(tmp_path) | {"ingest": {"num_shards": 8}})
    labels = ["natural/utterances", "natural/features", "natural/plan", "teacher"]
    keep_run(run.run_dir, run.model_dump(mode="json"), labels)
    utterances, features, plan, own_teacher = (hand_table(run.run_dir, label) for label in labels)
    names = [f"part-{index:05d}" for index in range(8)]
    pace = {"shards": dict.fromkeys(names, 1), "num_actors": 2, "busy_secs": 80.0, "seconds": 45.0}
    spoken = make_features("one two three four", secs_per_word=0.4, pause_secs=0.1)
    for name in names:
        row = Utterance(utt_id=name, text="one", duration_secs=900.0, recording_id=name, corpus="world")
        utterances.write(name, to_arrow(Utterance, [row]))
        features.write(name, to_arrow(Features, [spoken]))
    for lane in range(run.pack.num_lanes):
        row = PlanRow(lane=lane, epoch=0, row=0, num_positions=192, num_labels=1, segments=[])
        plan.write(plan_shard_name(lane, 0), to_arrow(PlanRow, [row]))
    write_json(f"{utterances.url}/manifest.json", pace)
    for table in (features, plan):
        write_json(f"{table.url}/manifest.json", {"shards": {}, "num_kept": 8, "seconds": 1.0})
    teacher = tmp_path / "teacher"
    Qwen2Config().save_pretrained(teacher)
    make_tokenizer("byte_level").save_pretrained(teacher)
    write_json(f"{own_teacher.url}/manifest.json", {"path": str(teacher), "revision": None, "seconds": 2.0})
    return run


def rates_of(run: Config, planned: Config | None = None) -> Rates:
    return measured_rates(load_rates(), open_run(run.run_dir), planned or run)


def test_the_start_is_told_from_the_work(measured: Config) -> None:
    rate = rates_of(measured).stages["synthesize espeak"]
    assert rate.start == pytest.approx(5)
    assert rate.unit == pytest.approx(2 * 40 / 2)  # two actors, 40 s, two hours
    assert rate.source == f"measured in {measured.run_dir}"


def test_without_actors_times_the_assumed_work_is_left_and_said(measured: Config) -> None:
    assumed, found = (rates.stages["pack"] for rates in (load_rates(), rates_of(measured)))
    assert found.unit == assumed.unit
    assert found.unit is not None
    assert found.start == pytest.approx(1 - 8 * found.unit)
    assert found.source == "assumption"


def finish(run: Config, stage: str, set_name: str, more: list[str]) -> int:
    """Let two actors have taken a minute for each table of a step; returns their number."""
    [step] = [step for step in merged(steps(run)) if (step.stage, step.set) == (stage, set_name)]
    keep_run(run.run_dir, run.model_dump(mode="json"), [*step.writes, *more])
    for label in step.writes:
        pace = {"shards": {}, "num_actors": 2, "busy_secs": 120.0, "seconds": 60.0}
        write_json(f"{hand_table(run.run_dir, label).url}/manifest.json", pace)
    return len(step.tables)


def test_a_run_planned_again_takes_as_long_to_ask_its_items(tmp_path: Path) -> None:
    conditions = {"evaluate": {"num_shots": 1, "conditions": ["clean", "noise"]}}
    run = parse_config(small_world_config(tmp_path) | conditions)
    systems = finish(run, "evaluate", "benchmark", ["benchmark/items"])
    write_json(f"{hand_table(run.run_dir, 'benchmark/items').url}/manifest.json", {"num_rows": 24})
    assert cost(plan_of(run, rates_of(run)), "evaluate", "benchmark").secs == pytest.approx(systems * 60)


def test_of_recordings_those_that_are_held_out_are_measured(tmp_path: Path) -> None:
    corpora = {"ingest": {"corpora": ["x"], "num_shards": 4}, "stage2": None, "pack": {"num_lanes": 2}}
    run = parse_config(small_world_config(tmp_path) | corpora)
    systems = finish(run, "measure", "natural", ["natural/features"])
    features = hand_table(run.run_dir, "natural/features")
    for split in ("train", "test"):
        spoken = make_features("one two", secs_per_word=900.0, pause_secs=0.0, split=split)
        features.write(split, to_arrow(Features, [spoken]))
    write_json(f"{features.url}/manifest.json", {"shards": {}})
    assert rates_of(run).stages["measure"].unit == pytest.approx(120 * systems / (0.5 * systems))


def test_words_tokens_and_fill_are_measured_of_the_same_speech(measured: Config) -> None:
    rates = rates_of(measured)
    assert rates.speech.words_per_sec == pytest.approx(4 / 2.1)
    assert rates.training.fill == pytest.approx(192 / 256)
    tokens = make_tokenizer("byte_level")("one two three four", add_special_tokens=False)["input_ids"]
    assert rates.speech.tokens_per_word == pytest.approx(len(tokens) / 4)
    marks = sources(plan_of(measured, rates))
    for name in ("natural speech", "positions of an epoch", "Stage I, D", "FLOP in all", "features"):
        assert marks[name] == "measured", name
    assert marks["synthetic audio"] == "assumption"  # bytes of an hour of FLAC


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"ingest.corpora": ["/data/other"], "ingest.web": ["/data/web"], "ingest.text": ["/data/text"]}, set()),
        (KOKORO, set()),
        ({"pack.context": 512}, {"words_per_sec"}),
        ({"model.teacher": "another/llm"}, {"words_per_sec"}),
        ({"distill.num_steps": 7}, {"words_per_sec", "tokens_per_word", "fill"}),
    ],
)
def test_speech_is_not_taken_for_other_speech(measured: Config, changes: dict[str, Any], kept: set[str]) -> None:
    planned = replaced(measured, changes)
    assert set(rates_of(measured, planned).sources) == kept


def test_tokens_stay_assumed_where_the_teacher_is_gone(measured: Config) -> None:
    write_json(
        f"{hand_table(measured.run_dir, 'teacher').url}/manifest.json",
        {"path": "/gone", "revision": None, "seconds": 2.0},
    )
    assert set(rates_of(measured).sources) == {"words_per_sec", "fill"}


def test_rates_of_another_model_are_not_taken(finished_run: Config) -> None:
    rates = rates_of(finished_run, of_paper())
    kinds = ("train", "measure", "evaluate", "synthesize espeak")
    assert {rates.stages[name].source for name in kinds} == {"assumption"}
    assert not rates.sources


def test_a_run_gives_its_own_rates(finished_run: Config) -> None:
    rates = rates_of(finished_run)
    for kind in ("train", "teacher world"):
        rate = rates.stages[kind]
        assert rate.source.startswith("measured in"), kind
        assert rate.unit is not None
        assert rate.unit > 0, kind
    assert rates.stages["align ctc"].source == "assumption"
    assert set(rates.sources) == {"words_per_sec", "tokens_per_word", "fill"}
    assert 0.5 < rates.training.fill <= 1
    plan = plan_of(finished_run, rates)
    trained = cost(plan, "trunk")
    assert trained.source.startswith("measured in")
    assert trained.cpu_hours > 0
    assert trained.gpu_hours == 0
    assert all(row.fits is None for row in plan.memory)


def test_the_command_takes_the_rates_of_a_run(finished_run: Config, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(dump_config(finished_run.model_copy(update={"run_dir": str(tmp_path / "next")})))
    done = CliRunner().invoke(app, ["plan", str(own), "--measured", finished_run.run_dir])
    assert done.exit_code == 0
    written = json.loads((tmp_path / "next" / "plan" / "plan.json").read_text())
    assert written["rates"]["stages"]["train"]["source"] == f"measured in {finished_run.run_dir}"


def test_the_command_shows_the_plan_and_writes_it(tmp_path: Path) -> None:
    arguments = ["plan", str(ROOT / "configs" / "quickstart.yaml"), f"run_dir={tmp_path}"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    for words in ("What there will be", "What each stage will take", "Peak memory", "What will lie in storage"):
        assert words in done.stdout
    assert "are assumptions" in done.stdout
    written = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert {line["name"] for line in written["lines"]} >= {"natural speech", "epochs of Stage I"}


def test_the_command_shows_the_rates_as_they_can_be_given_back(tmp_path: Path) -> None:
    config = str(ROOT / "configs" / "quickstart.yaml")
    shown = CliRunner().invoke(app, ["plan", config, "--show-rates"])
    own = tmp_path / "mine.yaml"
    own.write_text(shown.stdout)
    assert load_rates(str(own)) == load_rates()
    refused = CliRunner().invoke(app, ["plan", config, f"run_dir={tmp_path}", "--rates", str(tmp_path)])
    assert isinstance(refused.exception, ConfigError)


def test_the_tables_have_every_line_with_its_source(paper: Plan) -> None:
    grids = plan_grids(paper)
    assert [grid.row_count for grid in grids] == [
        len(paper.lines), len(paper.stages) + 1, len(paper.memory), len(paper.storage) + 3,
    ]  # fmt: skip
    console = Console(width=200, file=io.StringIO())
    console.print(*grids)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "141,000 h" in text
    assert "natural speech × 58,000,000 (source_hour)" in text


def with_gpus(monkeypatch: pytest.MonkeyPatch, number: int, memory_gib: float = 80, name: str = "NVIDIA H100") -> None:
    gpu = SimpleNamespace(name=name, total_memory=int(memory_gib * GIB))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)


def test_calibration_is_a_small_run_of_the_same_models(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 8)
    config = of_paper("ray.max_actors=64")
    small = pipeline.calibration(config)
    assert small.model.model_dump(exclude={"tiny_lm"}) == config.model.model_dump(exclude={"tiny_lm"})
    assert small.encode == config.encode
    assert small.synthesize == config.synthesize
    assert not small.ingest.corpora
    assert not small.evaluate.benchmarks
    assert small.distill.num_workers == small.pack.num_lanes == 8
    assert small.distill.extra_resources == {}  # which a single machine need not have
    assert small.ray.max_actors is None
    assert small.ingest.num_shards == 4 * 8  # of speech, four for each of the synthesizer's actors
    assert not any(step.stage == "evaluate" for step in pipeline.steps(small))
    parse_config(small.model_dump(mode="json"))


def test_calibration_asks_the_worlds_questions_where_its_text_lm_is_trained(quickstart: Config) -> None:
    asking = replaced(quickstart, {"evaluate.benchmarks": [{"name": "piqa", "path": "x", "max_items": 9}]})
    small = pipeline.calibration(asking)
    assert small.has_benchmark
    written = [step.tables for step in steps(small) if (step.stage, step.set) == ("ingest", "benchmark")]
    assert written == [("items",), ("passages",)]
    assert small.distill.num_workers == asking.distill.num_workers
    assert small.pack == asking.pack


def test_another_config_or_machine_is_calibrated_in_another_folder(
    quickstart: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def folder(**values: Any) -> str:
        return pipeline.calibration(replaced(quickstart, values)).run_dir

    own = folder()
    assert own.startswith(f"{quickstart.run_dir}/plan/calibration-")
    assert len(own.rpartition("-")[2]) == 8
    assert folder(**{"distill.num_steps": 7, "world.num_natural": 9, "strict": True}) == own  # it has its own
    changed = [{"encode.storage": "int8"}, {"embed.batch_size": 8}, {"distill.precision": "bf16"}]
    assert len({own, *(folder(**values) for values in changed)}) == 4
    with_gpus(monkeypatch, 1)
    assert folder() != own


@pytest.mark.parametrize(
    ("number", "memory_gib", "rows", "recomputed"),
    [(1, 141, 4, False), (8, 80, 4, False), (1, 94, 2, False), (8, 40, 1, False), (8, 26, 4, True)],
)
def test_calibration_trains_what_fits_into_the_gpus(
    number: int, memory_gib: float, rows: int, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, number, memory_gib)
    fitted = fit_training(pipeline.calibration(of_paper()), load_rates(), memory_gib * GIB)
    assert fitted.distill.micro_batch_rows == rows
    assert fitted.distill.activation_checkpointing == recomputed
    parse_config(fitted.model_dump(mode="json"))
    step = next(step for step in pipeline.steps(fitted) if step.stage == "stage1")
    assert comparable(fitted, of_paper(), step) is not recomputed


@pytest.mark.parametrize(("number", "there"), [(0, "has no GPU"), (1, "has GPUs of 24 GiB")])
def test_a_machine_that_cannot_train_says_what_it_lacks(
    number: int, there: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_gpus(monkeypatch, number, 24)
    words = rf"needs \d+ GiB a GPU at least, and this machine {there}; plan without --calibrate, or with --measured"
    with pytest.raises(ConfigError, match=words):
        pipeline.show_plan(of_paper(f"run_dir={tmp_path}"), None, None, calibrate=True)


def test_the_plan_takes_what_the_calibration_has_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[Config] = []

    def run_all(config: Config) -> None:
        ran.append(config)
        keep_run(config.run_dir, config.model_dump(mode="json"), ["teacher"])
        url = hand_table(config.run_dir, "teacher").url
        write_json(f"{url}/manifest.json", {"path": "x", "revision": None, "seconds": 7.0})

    with_gpus(monkeypatch, 1, 94)
    monkeypatch.setattr(pipeline, "run_all", run_all)
    config = of_paper(f"run_dir={tmp_path}")
    pipeline.show_plan(config, None, None, calibrate=True)
    assert ran[0].run_dir == pipeline.calibration(config).run_dir
    assert ran[0].distill.micro_batch_rows == 2
    written = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert written["rates"]["stages"]["teacher model"]["start"] == 7.0
    assert written["rates"]["stages"]["teacher model"]["source"] == f"measured in {ran[0].run_dir}"
    assert written["rates"]["sources"] == {}
