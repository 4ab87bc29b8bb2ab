"""`salad sweep`: many trainings that share what they can, on Ray Tune over the Train job.

A sweep is a grid over keys of the config. Everything before the first stage that a key changes is made once, in the run
itself; the trials take it over by reference (`Table.link`).

With training budgets, the trainings of one combination share their *trunk*: constant-rate training, once, to where the
decay of the largest budget begins, with a checkpoint where each budget's decay begins. From there a short decay
branches off. A branch sees the rows, and has the learning rate, that training to its budget alone would have; only the
warm-up is that of the trunk.

A sweep that varies what is selected pools its speech: the passages of all selections are spoken and encoded once.

Trials hold no resources of their own, so Tune cannot starve the Train job inside; as many run at a time as their
training workers have room for. They are drivers and run beside the sweep's own, so none is lost with a spot machine or
keeps a training machine busy. What is finished is not run again; a trial that fails is reported, and the others go on.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa
import ray
from ray import tune

from salad_ray.config import Config, ConfigError, SweepConfig, identity, replaced
from salad_ray.console import clock, console, say, user_error
from salad_ray.distill.checkpoints import checkpoint_at
from salad_ray.distill.step import decay_start
from salad_ray.distill.trainer import Job, TrainingStopped, train, worker_resources
from salad_ray.flow import Step, steps
from salad_ray.model.speech_lm import EncoderSpec
from salad_ray.report.card import model_card, speech_data
from salad_ray.scaling.law import LawError, MisalignmentLaw, fit_misalignment_law
from salad_ray.stages.common import PickPassages, Stage, finished, picked_shards, run_shards
from salad_ray.stages.pack import steps_of
from salad_ray.stages.ray_cluster import start_ray
from salad_ray.stages.select import draw_selection
from salad_ray.stages.shards import StageError
from salad_ray.store import for_ray
from salad_ray.tables import Table, fingerprint, read_json, write_bytes, write_json

SELECTION = "select."
"""Keys that begin so change nothing before `select`."""
OF_STAGE2 = ("select.", "probe.", "cluster.", "embed.")
"""Keys that begin so change nothing without Stage II."""
WITHIN = 0.05
"""Of E: the data that the paper asks for."""


@dataclass(frozen=True)
class Flow:
    """What the pipeline lends: how to run one of its stages."""

    run_stage: Callable[[Config, str, str], None]

    def run(self, config: Config, chosen: Iterable[Step]) -> None:
        for step in chosen:
            self.run_stage(config, step.stage, step.set or config.set)


@dataclass(frozen=True)
class Trial:
    """One training of a sweep; `config.run_dir` is where it lies."""

    name: str
    values: dict[str, Any]
    """Key of the grid → value."""
    config: Config
    budget: float | None = None

    @property
    def row(self) -> dict[str, Any]:
        return {"trial": self.name} | self.values | ({} if self.budget is None else {"budget": self.budget})


def run_sweep(config: Config, name: str, flow: Flow) -> dict[str, Any]:
    """Run what is missing of a sweep; write `sweeps/<name>/results.json` and `.csv`.

    Returns:
        What results.json holds: `rows`, a dict each; `laws`, one for each combination; `saving`.

    Raises:
        ConfigError: the sweep does not exist, or a value of its grid makes no valid config.
        StageError: what all trials share cannot be made.
    """
    sweep = config.sweeps[name]
    trials = grid_trials(config, name)
    start_ray(config)
    started = time.monotonic()
    work = budget_sweep if sweep.budgets else run_sweep_of_runs
    rows = work(config, name, trials, flow)
    result = {"name": name, "grid": dict(sweep.grid), "rows": rows, "laws": laws(rows, list(sweep.grid))}
    if sweep.budgets:
        result["saving"] = saving(name, rows)
    url = f"{config.run_dir}/sweeps/{name}/results"
    write_json(f"{url}.json", result)
    write_bytes(f"{url}.csv", as_csv(rows).encode())
    say(f"sweep {name}: {len(rows)} trainings in {clock(time.monotonic() - started)} → {url}.csv")
    return result


def grid_trials(config: Config, name: str) -> list[Trial]:
    """One trial for each combination of the grid, and seed."""
    sweep = config.sweeps[name]
    grid = {key: list(values) for key, values in sweep.grid.items()}
    if sweep.seeds:
        grid["seed"] = list(sweep.seeds)
    trials = []
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        label = trial_name(values)
        changes = values | {
            "run_dir": f"{config.run_dir}/sweeps/{name}/{label}",
            "base_run": config.run_dir,
            "sweeps": {},
            "ray.max_actors": actors_of_trial(config, sweep),
        }
        if sweep.budgets:
            changes |= {"stage2": None, **budget_keys(sweep, sweep.budgets[-1])}
        elif values.get("stage2", config.stage2) is not None:
            changes = {"stage2.control": False} | changes
        trials.append(Trial(label, values, replaced(config, changes, f"sweeps.{name}: {label}")))
        idle = [key for key in values if key.startswith(OF_STAGE2) and trials[-1].config.stage2 is None]
        if idle:
            raise ConfigError(f"sweeps.{name} varies {idle[0]}, but the config has no stage2; add stage2: {{}}")
    return trials


def trial_name(values: dict[str, Any]) -> str:
    """A folder's name, such as `alpha=0.5,seed=1`."""
    leaves = [key.rsplit(".", 1)[-1] for key in values]
    keys = leaves if len(set(leaves)) == len(leaves) else list(values)
    text = ",".join(f"{key}={value}" for key, value in zip(keys, values.values(), strict=True))
    safe = re.sub(r"[^\w=,.+-]+", "_", text)
    return safe if safe == text and len(text) < 100 else f"{safe[:80]}-{fingerprint(values)[:6]}"


def budget_keys(sweep: SweepConfig, budget: float) -> dict[str, Any]:
    """The keys of the config that say how long to train."""
    given, other = ("num_steps", "num_positions") if sweep.num_steps else ("num_positions", "num_steps")
    return {f"distill.{given}": budget, f"distill.{other}": None}


def actors_of_trial(config: Config, sweep: SweepConfig) -> int | None:
    """Actors of a trial's stages, where several trials share the cluster."""
    if config.ray.max_actors is None or sweep.max_concurrent is None:
        return config.ray.max_actors
    return max(1, config.ray.max_actors // sweep.max_concurrent)


def run_sweep_of_runs(config: Config, name: str, trials: list[Trial], flow: Flow) -> list[dict[str, Any]]:
    """Every combination as a run of its own, from the first stage that the grid changes."""
    sweep = config.sweeps[name]
    is_selection = all(key.startswith(SELECTION) for key in sweep.grid) and not sweep.seeds
    flow.run(config, shared_steps(config, "select" if is_selection else "stage1", sweep.evaluate))
    failed: dict[str, str] = {}
    if is_selection:
        drawn, failed = prepared(trials, partial(_draw, flow=flow))
        pool_speech(config, name, drawn, flow)
    ready = [trial for trial in trials if trial.name not in failed]
    rows = run_trials(config, name, ready, partial(_whole_run, flow=flow, evaluate=sweep.evaluate))
    return rows + [trial.row | {"error": failed[trial.name]} for trial in trials if trial.name in failed]


Prepared = TypeVar("Prepared")


def prepared(
    trials: Sequence[Trial], work: Callable[[Trial], Prepared]
) -> tuple[list[tuple[Trial, Prepared]], dict[str, str]]:
    """What `work` makes of each trial before any is trained; of those of which it can make nothing, why, by name."""
    ready, failed = [], {}
    for trial in trials:
        try:
            ready.append((trial, work(trial)))
        except Exception as error:
            cause = user_error(error)
            if cause is None:
                raise
            failed[trial.name] = str(cause)
    return ready, failed


def _draw(trial: Trial, flow: Flow) -> Table:
    take(trial.config, flow, "select")
    return draw_selection(trial.config)


def shared_steps(config: Config, first: str, evaluate: bool) -> list[Step]:
    """Steps of the run itself that no trial changes: those before `first`, then what has no part in training."""
    whole = steps(config)
    place = next(index for index, step in enumerate(whole) if step.stage == first)
    asked = ("ingest", "synthesize", "encode") if evaluate else ()
    later = [step for step in whole[place:] if step.set == "benchmark" and step.stage in asked]
    measured = [step for step in whole[place:] if step.stage == "measure" and step.set in config.measured_sets]
    return [*whole[:place], *later, *measured]


def trial_steps(config: Config, evaluate: bool) -> list[Step]:
    """Steps of a trial; questions are asked only if the sweep says so."""
    return [step for step in steps(config) if evaluate or (step.set != "benchmark" and step.stage != "evaluate")]


def _whole_run(trial: Trial, flow: Flow, evaluate: bool) -> None:
    own = trial_steps(trial.config, evaluate)
    if Table(trial.config.run_dir, "active", "features").linked_to():  # pooled, and drawn already
        own = [step for step in own if step.set != "active" or step.stage == "pack"]
    flow.run(trial.config, own)


def pool_speech(config: Config, name: str, drawn: list[tuple[Trial, Table]], flow: Flow) -> None:
    """Speak and encode what any of the trials selects, once; each then finds it as its own active speech."""
    if not drawn:
        return
    versions = {trial.name: finished(table, "select")["version"] for trial, table in drawn}
    folder = f"{config.run_dir}/sweeps/{name}/pool-{fingerprint(versions)[:8]}"
    pool = drawn[0][0].config.model_copy(update={"run_dir": folder, "set": "active"})
    take(pool, flow, "select")
    chosen = (
        pa.concat_tables(table.read("part-00000", ["passage_id", "cluster_id", "shard"]) for _, table in drawn)
        .group_by(["passage_id", "cluster_id", "shard"])
        .aggregate([])
    )
    stage = Stage("select", Table(pool.run_dir, "active", "passages"), {}, versions)
    run_shards(pool, stage, picked_shards(pool, chosen), partial(PickPassages, pool, "train"))
    for each in ("synthesize", "encode"):
        flow.run_stage(pool, each, "active")
    say(f"sweep {name}: {len(chosen):,} passages are spoken once for {len(drawn)} selections")
    for trial, _ in drawn:
        for table in ("passages", "utterances", "features"):
            own = Table(trial.config.run_dir, "active", table)
            if own.linked_to() is None:  # one that began with a smaller pool goes on with it
                own.link(Table(pool.run_dir, "active", table).url)


def take(config: Config, flow: Flow, until: str) -> None:
    """Take over from the base run all that comes before a stage."""
    assert config.base_run is not None
    for step in itertools.takewhile(lambda step: step.stage != until, steps(config)):
        for name in step.tables:
            own = Table(config.run_dir, step.set, name)
            if own.is_new():
                own.link(Table(config.base_run, step.set, name).url)


def budget_sweep(config: Config, name: str, trials: list[Trial], flow: Flow) -> list[dict[str, Any]]:
    """Trunks first, one for each combination, then the branches; of a trunk that failed, those that it reached."""
    sweep = config.sweeps[name]
    flow.run(config, shared_steps(config, "stage1", sweep.evaluate))
    planned, unplanned = prepared(trials, partial(with_shared_plan, config, name, flow))
    ready = [trial for _, trial in planned]
    trunks = run_trials(config, name, ready, partial(_trunk, flow=flow, sweep=sweep), kind="trunks")
    failed = {row["trial"]: row["error"] for row in trunks if row["error"]}
    branches = [_branch_trial(trial, sweep, budget) for trial in ready for budget in sweep.budgets]
    rows = run_trials(config, name, branches, partial(_branch, flow=flow, sweep=sweep), kind="branches")
    for row in rows:
        trunk = failed.get(row["trial"].rsplit("/", 1)[0])
        if trunk and row["error"]:
            row["error"] = f"its trunk failed: {trunk}"
    lost = [
        _branch_trial(trial, sweep, budget) for trial in trials for budget in sweep.budgets if trial.name in unplanned
    ]
    return rows + [trial.row | {"error": unplanned[trial.name.rsplit("/", 1)[0]]} for trial in lost]


def with_shared_plan(config: Config, name: str, flow: Flow, trial: Trial) -> Trial:
    """The trial above a run that has the plan for the largest budget; trials that need the same share it."""
    own = trial.config
    sections = ("pack", "world", "ingest", "synthesize", "align", "encode", "model", "measure", "evaluate", "seed")
    same = fingerprint(identity(own, *sections, "distill.precision"))
    shared = own.model_copy(update={"run_dir": f"{config.run_dir}/sweeps/{name}/shared-{same[:8]}"})
    flow.run(shared, shared_steps(shared, "stage1", config.sweeps[name].evaluate))
    return replace(trial, config=own.model_copy(update={"base_run": shared.run_dir}))


def _branch_trial(trial: Trial, sweep: SweepConfig, budget: float) -> Trial:
    unit = "steps" if sweep.num_steps else "positions"
    label = f"{unit}={budget:g}" if sweep.num_positions else f"{unit}={budget}"
    own = {"run_dir": f"{trial.config.run_dir}/{label}", "base_run": trial.config.run_dir}
    config = replaced(trial.config, own | budget_keys(sweep, budget))
    return Trial(f"{trial.name}/{label}", trial.values, config, budget)


def _trunk(trial: Trial, flow: Flow, sweep: SweepConfig) -> None:
    """Train at a constant rate to where the largest budget's decay begins; lengthens a trunk that ends before."""
    config = trial.config
    own = trial_steps(config, sweep.evaluate)
    flow.run(config, [step for step in own if step.stage not in ("stage1", "evaluate", "report")])
    budgets = steps_of_budgets(config, sweep)
    points = tuple(branch_points(budgets, config.distill.decay_share))
    warmup = sweep.warmup_steps or max(1, round(config.distill.warmup_share * min(budgets)))
    if points[0] < warmup:
        raise StageError(
            f"the decay of the smallest budget, {min(budgets)} steps, begins at step {points[0]}, before the warm-up "
            f"of {warmup} steps has ended; name larger budgets, or a smaller warmup_steps or distill.decay_share"
        )
    if points == tuple(budgets):
        raise StageError("a sweep with budgets needs a decay, which branches off; raise distill.decay_share")
    constant = config.model_copy(
        update={"distill": config.distill.model_copy(update=dict.fromkeys(("num_steps", "num_positions")))}
    )
    inputs = training_inputs(config)
    stage = Stage(
        "sweep",
        Table(config.run_dir, "", "trunk"),
        training_identity(constant) | {"warmup_steps": warmup},
        {label: manifest["version"] for label, manifest in inputs.items()},
    )
    done = (stage.table.manifest() or {}) if stage.is_done() else {}
    if set(points) <= set(done.get("branch_points", ())):
        return
    past = [point for point in points if point < done.get("num_steps", 0) and point not in done["branch_points"]]
    if past:
        raise StageError(
            f"{stage.table.url} has passed step {past[0]}, where a new budget branches off, and kept no checkpoint "
            "there; name only larger budgets, or begin anew with --redo"
        )
    stage.begin()
    settings = config.distill.model_copy(update={"warmup_share": warmup / points[-1], "decay_share": 0.0})
    encoder = EncoderSpec(**inputs["features"]["encoder"])
    job = Job(
        config, "trunk", inputs["teacher"], encoder, settings, points[-1], "", branch_points=points, exports=False
    )
    facts = _trained(stage, job)
    stage.finish(**facts, num_steps=points[-1], branch_points=list(points))


def branch_points(steps: Sequence[int], decay_share: float) -> list[int]:
    """The step at which the decay of each budget begins."""
    return [decay_start(each, decay_share) for each in steps]


def steps_of_budgets(config: Config, sweep: SweepConfig) -> list[int]:
    """The budgets in optimizer steps; positions are converted as `pack` does, each by itself."""
    if sweep.num_steps:
        return sorted(set(sweep.num_steps))
    plan = Table(config.run_dir, "natural", "plan")
    ends = [config.distill.model_copy(update={"num_positions": budget}) for budget in sweep.budgets]
    return [steps_of(end, config, plan) for end in ends]


def _branch(trial: Trial, flow: Flow, sweep: SweepConfig) -> None:
    """Decay from the trunk to the budget, then measure: a run like any other, from Stage I on."""
    config = trial.config
    assert trial.budget is not None
    take(config, flow, "stage1")
    _decay(config, steps_of_budgets(config, sweep)[sweep.budgets.index(trial.budget)])
    own = trial_steps(config, sweep.evaluate)
    flow.run(
        config, [step for step in own if step.stage in ("measure", "evaluate", "report") or step.set == "benchmark"]
    )


def _decay(config: Config, num_steps: int) -> None:
    assert config.base_run is not None
    point = decay_start(num_steps, config.distill.decay_share)
    trunk = Table(config.base_run, "", "trunk")
    begun = read_json(f"{trunk.url}/begun.json")
    if begun is None:
        raise StageError(f"{trunk.url} was not begun")
    inputs = training_inputs(config) | {"trunk": begun}
    stage = Stage(
        "sweep",
        Table(config.run_dir, "", "stage1"),
        training_identity(config),
        {label: manifest["version"] for label, manifest in inputs.items()},
    )
    if stage.is_done():
        return
    stage.begin()
    start = checkpoint_at(f"{trunk.url}/checkpoints", point)
    teacher, features = inputs["teacher"], inputs["features"]
    job = Job(
        config,
        "stage1",
        teacher,
        EncoderSpec(**features["encoder"]),
        config.distill.model_copy(update={"warmup_share": 0.0, "decay_share": 1.0}),
        num_steps - point,
        model_card("stage1", teacher, features["encoder"], speech_data(config, ("natural",)), config.distill.alpha),
        start=start,
        first_row=point * config.pack.rows_per_lane,
    )
    facts = _trained(stage, job)
    own = facts["num_positions"]
    facts["num_positions"] += start.state["num_positions"]
    facts["train_seconds"] += start.state["train_seconds"]
    stage.finish(**facts, num_steps=num_steps, own_positions=own, begun_from=start.url)


def _trained(stage: Stage, job: Job) -> dict[str, Any]:
    try:
        return train(job)
    except TrainingStopped as error:
        raise StageError(f"{stage.label}: {error}") from None


def training_inputs(config: Config) -> dict[str, dict[str, Any]]:
    """Manifests of what training reads."""
    writers = {("", "teacher"): "teacher", ("natural", "features"): "encode", ("natural", "plan"): "pack"}
    return {name: finished(Table(config.run_dir, set_, name), stage) for (set_, name), stage in writers.items()}


def training_identity(config: Config) -> dict[str, Any]:
    return identity(config, "distill", "model.adapter", "pack.rows_per_lane", "seed")


def run_trials(
    config: Config, name: str, trials: Sequence[Trial], work: Callable[[Trial], None], kind: str = "trainings"
) -> list[dict[str, Any]]:
    """Run those that are not done, several at a time; a row each, with `error` ("" where it went well)."""
    decided = _decided(config, name)
    prints = {trial.name: _fingerprint(trial, kind, decided) for trial in trials}
    done = {trial.name: _done_row(trial, kind, prints[trial.name]) for trial in trials}
    pending = [trial for trial in trials if done[trial.name] is None]
    sweep = config.sweeps[name]
    at_once = sweep.max_concurrent or concurrency([trial.config for trial in trials] or [config])
    count = f"{len(pending)} of {len(trials)} {kind}" if len(pending) < len(trials) else f"{len(trials)} {kind}"
    say(f"sweep {name}: {count} to run, {min(at_once, max(len(pending), 1))} at a time")
    errors = _tune(config, name, pending, work, at_once, kind) if pending else {}
    rows = []
    for trial in trials:
        row = done[trial.name] or _finished_row(trial, kind, prints[trial.name], errors.get(trial.name, ""))
        rows.append(row)
    return rows


def concurrency(configs: Sequence[Config]) -> int:
    """Trials whose training workers the cluster has room for, at least one; the largest of them decides."""
    cluster = ray.cluster_resources()
    rooms = [
        cluster.get(name, 0) // (number * config.distill.most_workers)
        for config in configs
        for name, number in worker_resources(config.distill).items()
        if number
    ]
    return max(1, int(min(rooms, default=1)))


def _tune(
    config: Config, name: str, trials: Sequence[Trial], work: Callable[[Trial], None], at_once: int, kind: str
) -> dict[str, str]:
    """Errors by trial."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_SYNCER", "1")
    by_name = {trial.name: trial for trial in trials}
    sweep = config.sweeps[name]

    def trainable(given: dict[str, str]) -> None:
        trial = by_name[given["trial"]]
        tune.report({"trial": trial.name, "error": _attempt(work, trial, kind)})

    tuner = tune.Tuner(
        tune.with_resources(trainable, nothing_but_this_node()),
        param_space={"trial": tune.grid_search(list(by_name))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=at_once, trial_dirname_creator=lambda t: f"trial-{t.trial_id}"
        ),
        run_config=tune.RunConfig(
            name=f"tune-{kind}",
            **for_ray(f"{config.run_dir}/sweeps/{name}"),
            failure_config=tune.FailureConfig(max_failures=sweep.max_failures),
            verbose=0,
            callbacks=[_Progress(f"sweep {name}", len(trials))],
        ),
    )
    errors = {}
    for result in tuner.fit():
        label = (result.config or {})["trial"]
        if result.error is not None:
            errors[label] = _last_line(result.error)
        elif "error" not in (result.metrics or {}):  # Tune ends quietly at the first Ctrl-C
            raise KeyboardInterrupt
        elif result.metrics["error"]:
            errors[label] = result.metrics["error"]
    return errors


def nothing_but_this_node() -> tune.PlacementGroupFactory:
    """What a trial asks for: the driver's node and a byte, since Tune does not take nothing."""
    own = ray.get_runtime_context().get_node_id()
    return tune.PlacementGroupFactory([{"memory": 1}], bundle_label_selector=[{"ray.io/node-id": own}])


def _attempt(work: Callable[[Trial], None], trial: Trial, kind: str) -> str:
    """Run a trial, what it tells going to a file of its run; returns a user's error, for which no other try helps."""
    try:
        with console.capture() as told:
            work(trial)
    except Exception as error:
        cause = user_error(error)
        if cause is None:
            raise
        return str(cause)
    finally:
        write_bytes(f"{trial.config.run_dir}/{kind}.log", told.get().encode())
    return ""


class _Progress(tune.Callback):
    """A line for every trial that ends, with an ETA."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done, self.started = label, total, 0, time.monotonic()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(trial, (trial.last_result or {}).get("error", ""))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(trial, "failed")

    def _tell(self, trial: Any, error: str) -> None:
        self.done += 1
        rest = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        state = f"failed: {error}" if error else "done"
        say(f"{self.label}: {trial.config['trial']} {state}; {self.done}/{self.total}, ETA {clock(rest)}")


def _decided(config: Config, name: str) -> dict[str, Any]:
    """What decides a trial's outcome beside its own config: what it takes over, and what the sweep says."""
    sets = ("natural", "heldout", "probe", "benchmark")
    read = [("", "teacher"), ("", "stage1"), ("benchmark", "items"), *((name, "features") for name in sets)]
    versions = {
        f"{of}/{table}": (Table(config.run_dir, of, table).manifest() or {}).get("version") for of, table in read
    }
    sweep = config.sweeps[name]
    if sweep.budgets:
        del versions["/stage1"]
    return {"versions": versions, "evaluate": sweep.evaluate, "warmup_steps": sweep.warmup_steps}


def _fingerprint(trial: Trial, kind: str, decided: dict[str, Any]) -> str:
    sections = set(Config.model_fields) - {"run_dir", "base_run", "ray", "sweeps", "set"}
    return fingerprint({"kind": kind, "decided": decided, "config": identity(trial.config, *sorted(sections))})


def _done_row(trial: Trial, kind: str, print_: str) -> dict[str, Any] | None:
    done = read_json(f"{trial.config.run_dir}/{kind}.json")
    return done["row"] if done and done["fingerprint"] == print_ else None


def _finished_row(trial: Trial, kind: str, print_: str, error: str) -> dict[str, Any]:
    row = trial.row | ({} if error or kind == "trunks" else measured_row(trial.config)) | {"error": error}
    if not error:
        write_json(f"{trial.config.run_dir}/{kind}.json", {"fingerprint": print_, "row": row})
    return row


def measured_row(config: Config) -> dict[str, Any]:
    """F and M of a finished run's last system, by whether its domains were heard; accuracy, where it was asked."""
    metrics = read_json(f"{config.run_dir}/report/metrics.json") or {}
    system = "stage2" if "stage2" in metrics else "stage1"
    facts = metrics[system]
    names = ("misalignment", "forgetting", "distillation")
    row = {"system": system, "num_positions": facts["num_positions"]}
    row |= {key: facts[key] for name in names for key in (name, f"{name}_standard_error")}
    for label, heard in (("heard", True), ("unheard", False)):
        chosen = [found for found in facts["by_domain"].values() if found["heard"] is heard]
        if chosen:
            row |= {f"{label}_{name}": sum(found[name] for found in chosen) / len(chosen) for name in names[:2]}
    if "selection" in metrics and system == "stage2":
        row |= {"synthetic_hours": metrics["selection"]["hours"]}
    for found in metrics.get("accuracy", []):
        if found["system"] == system and found["metric"] == "acc" and found["heard"] is None:
            row[f"{found['benchmark']} {found['modality']}"] = found["accuracy"]
    return row | {"train_seconds": facts["train_seconds"], "run_dir": config.run_dir}


def laws(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """`M(D) = E + B · D^−β` for each combination with several budgets, or why there is none."""
    found = []
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if not row["error"] and "budget" in row:
            groups.setdefault(json.dumps([row[key] for key in keys], sort_keys=True), []).append(row)
    for group in groups.values():
        values = {key: group[0][key] for key in keys}
        try:
            law = fit_misalignment_law([row["num_positions"] for row in group], [row["misalignment"] for row in group])
            found.append({"values": values, "problem": ""} | law_facts(law))
        except LawError as error:
            found.append({"values": values, "problem": str(error)})
    return found


def law_facts(law: MisalignmentLaw) -> dict[str, Any]:
    """A law as plain data; an open end of an interval is null."""
    plain = asdict(replace(law, _fit=None))  # type: ignore[arg-type]
    del plain["_fit"]
    within = law.positions_within_interval(WITHIN)
    plain["ci"] = {name: [_finite(end) for end in ends] for name, ends in law.ci.items()}
    low, high = law._fit.positions.min(), law._fit.positions.max() * 4
    places = [low * (high / low) ** (index / 24) for index in range(25)]
    curve = [[place, float(law.predict(place)), *law.predict_interval(place)] for place in places]
    return plain | {
        "within": WITHIN,
        "positions_within": _finite(law.positions_within(WITHIN)),
        "positions_within_ci": [_finite(end) for end in within],
        "curve": [[_finite(number) for number in point] for point in curve],
    }


def _finite(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None


def saving(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Positions that were trained, beside those that as many separate trainings would have needed."""
    done = [row for row in rows if not row["error"]]
    own = {row["trial"]: (Table(row["run_dir"], "", "stage1").manifest() or {})["own_positions"] for row in done}
    groups = _by_folder(done).values()
    # A trunk is as long as the last branch that begins on it, also where it failed behind that.
    trunks = sum(max(row["num_positions"] - own[row["trial"]] for row in group) for group in groups)
    trained, separate = trunks + sum(own.values()), sum(row["num_positions"] for row in done)
    largest = sum(max(row["num_positions"] for row in group) for group in groups)
    if done:
        say(
            f"sweep {name}: trained {trained:,.0f} positions, {trained / separate:.0%} of what separate trainings "
            f"would have needed and {trained / largest:.2f} × the largest budgets alone"
        )
    return {"positions": trained, "separate_positions": separate, "largest_positions": largest}


def _by_folder(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["run_dir"].rsplit("/", 1)[0], []).append(row)
    return groups


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each training, failed ones included; no text of theirs is a formula to a spreadsheet."""
    rows = [{name: _no_formula(value) for name, value in row.items()} for row in rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _no_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
