"""The planner: the paper's numbers from the paper's config, rates that a run has measured, clear refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from salad_ray import pipeline
from salad_ray.config import Config, ConfigError, load_config, parse_config
from salad_ray.scaling.plan import RATES, Plan, load_rates, make_plan, measured_rates

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def paper() -> Plan:
    config = load_config(ROOT / "configs" / "salad_3b.yaml")
    return make_plan(config, pipeline.steps(config), load_rates())


def value(plan: Plan, name: str) -> float:
    return next(line.value for line in plan.lines if line.name == name)


def test_the_papers_config_gives_the_papers_numbers(paper: Plan) -> None:
    assert value(paper, "natural speech") == pytest.approx(141_000, rel=0.01)
    assert value(paper, "positions of an epoch") == pytest.approx(3.4e9, rel=0.05)
    assert value(paper, "epochs of Stage I") == pytest.approx(7, abs=0.3)
    assert value(paper, "features") == pytest.approx(6.5e12, rel=0.02)
    assert value(paper, "FLOP in all") == pytest.approx(5.5e20, rel=0.1)
    assert value(paper, "synthetic speech") == pytest.approx(1_400, rel=0.02)
    stage1 = next(cost for cost in paper.stages if cost.stage == "stage1")
    assert stage1.secs / 3600 == pytest.approx(6, rel=0.15)
    assert stage1.gpu_hours == pytest.approx(stage1.secs * 64 / 3600)


def test_every_stage_is_there_and_the_totals_add_up(paper: Plan) -> None:
    config = load_config(ROOT / "configs" / "salad_3b.yaml")
    assert [(cost.stage, cost.set) for cost in paper.stages] == [(s.stage, s.set) for s in pipeline.steps(config)]
    assert paper.totals["secs"] == pytest.approx(sum(cost.secs for cost in paper.stages))
    assert paper.totals["storage_gb"] == pytest.approx(sum(paper.storage.values()) / 1e9)
    assert paper.totals["money"] > paper.totals["compute"] > 0
    assert paper.memory[0].is_configured
    assert paper.memory[0].fits
    assert any("assumptions" in note for note in paper.notes)


def test_what_does_not_fit_is_said_with_what_does() -> None:
    config = load_config(ROOT / "configs" / "salad_3b.yaml", ["distill.micro_batch_rows=8"])
    plan = make_plan(config, pipeline.steps(config), load_rates())
    assert plan.memory[0].fits is False
    assert any("does not fit" in note and "micro_batch_rows" in note for note in plan.notes)


def test_prices_and_rates_come_from_the_users_file(tmp_path: Path) -> None:
    rates = yaml.safe_load(RATES.read_text())
    rates["prices"]["gpu_hour"] = 10.0
    rates["training"]["mfu"] = 0.2
    own = tmp_path / "mine.yaml"
    own.write_text(yaml.safe_dump(rates))
    config = load_config(ROOT / "configs" / "salad_3b.yaml")
    plans = [make_plan(config, pipeline.steps(config), load_rates(path)) for path in (None, str(own))]
    costs = [next(cost for cost in plan.stages if cost.stage == "stage1") for plan in plans]
    assert costs[1].gpu_hours == pytest.approx(2 * costs[0].gpu_hours, rel=0.01)
    assert costs[1].money == pytest.approx(2 * 10 / 3 * costs[0].money, rel=0.01)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rates: rates["prices"].pop("gpu_hour"), "prices.gpu_hour"),
        (lambda rates: rates["stages"].pop("encode mimi"), "encode mimi"),
        (lambda rates: rates["corpora"].pop("libriheavy"), "how many hours 'libriheavy' has"),
        (lambda rates: rates["web"].clear(), "how many passages 'fineweb-edu' has"),
        (lambda rates: rates["cluster"].update(gpu="RTX 9000"), "cluster.gpu"),
    ],
)
def test_what_the_rates_do_not_know_is_named(change: object, words: str, tmp_path: Path) -> None:
    rates = yaml.safe_load(RATES.read_text())
    change(rates)  # type: ignore[operator]
    own = tmp_path / "mine.yaml"
    own.write_text(yaml.safe_dump(rates))
    config = load_config(ROOT / "configs" / "salad_3b.yaml")
    with pytest.raises(ConfigError, match=words):
        make_plan(config, pipeline.steps(config), load_rates(str(own)))


def test_a_model_that_cannot_be_looked_up_is_named(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs" / "salad_3b.yaml", [f"model.teacher={tmp_path}"])
    with pytest.raises(ConfigError, match=r"its config cannot be read here.*`models`"):
        make_plan(config, pipeline.steps(config), load_rates())


def test_rates_of_another_model_are_not_taken(finished_run: Config) -> None:
    paper = load_config(ROOT / "configs" / "salad_3b.yaml")
    rates = measured_rates(load_rates(), finished_run, pipeline.steps(finished_run), paper)
    assert {rates.stages[name].source for name in ("train", "measure", "evaluate", "synthesize espeak")} == {
        "assumption"
    }


def test_a_missing_rates_file_says_what_to_copy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file; copy .*rates\.yaml"):
        load_rates(str(tmp_path / "none.yaml"))


def test_a_run_gives_its_own_rates(finished_run: Config) -> None:
    steps = pipeline.steps(finished_run)
    rates = measured_rates(load_rates(), finished_run, steps, finished_run)
    for kind in ("synthesize espeak", "encode log_mel", "train", "teacher world"):
        rate = rates.stages[kind]
        assert rate.source.startswith("measured in"), kind
        assert rate.unit is not None
        assert rate.unit > 0, kind
    assert rates.stages["align ctc"].source == "assumption"
    plan = make_plan(finished_run, steps, rates)
    trained = next(cost for cost in plan.stages if cost.stage == "stage1")
    assert trained.source.startswith("measured in")
    assert trained.cpu_hours > 0
    assert trained.gpu_hours == 0
    assert all(row.fits is None for row in plan.memory)


def test_the_embedded_world_needs_no_rates_of_corpora() -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    plan = make_plan(config, pipeline.steps(config), load_rates())
    assert value(plan, "natural speech") == pytest.approx(10.7, rel=0.5)
    assert plan.storage["recorded corpora"] == 0


def test_calibration_is_a_small_run_of_the_same_models() -> None:
    config = load_config(ROOT / "configs" / "salad_3b.yaml")
    small = pipeline.calibration(config)
    assert small.model.model_dump(exclude={"tiny_lm"}) == config.model.model_dump(exclude={"tiny_lm"})
    assert small.encode == config.encode
    assert small.synthesize == config.synthesize
    assert not small.ingest.corpora
    assert small.distill.num_workers == 1
    parse_config(small.model_dump(mode="json"))
