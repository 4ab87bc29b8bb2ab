"""`salad sweep`: many trainings that share what they can, on Ray Tune over the Train job.

A sweep is a grid over keys of the config. Each training is a run of its own in the same `run_dir`; what two of them
would make alike has one place there (`runs.py`), and is made once, before any of them. With training budgets, the
trainings of one combination are short decays that branch off the same trunk, at the step where the decay of each budget
begins. A branch is what training to its budget alone would have been.

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
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import ray
from ray import tune

from salad_ray.config import Config, ConfigError, SweepConfig, identity
from salad_ray.configfile import replaced
from salad_ray.console import clock, console, say, user_error
from salad_ray.distill.budget import budget_of, plans_of
from salad_ray.distill.checkpoints import checkpoint_at
from salad_ray.distill.trainer import checkpoints_url, worker_resources
from salad_ray.flow import LENGTHS, Step, made_from, steps, with_needs
from salad_ray.lease import held
from salad_ray.names import EVALUATE, MEASURE, STAGE1, STAGE2, TRUNK, measurements_of
from salad_ray.runs import Run, write_index
from salad_ray.scaling.law import LawError, MisalignmentLaw, fit_misalignment_law
from salad_ray.stages.ray_cluster import start_ray
from salad_ray.stages.trunk import lengthen
from salad_ray.store import for_ray
from salad_ray.tables import Measurement, TableError, each_shard, fingerprint, read_json, write_bytes, write_json

OF_STAGE2 = ("select.", "probe.", "cluster.", "embed.")
"""Keys that begin so change nothing without Stage II."""
TRUNKS = "trunks"
"""The kind of what runs before the trainings, and is run again when another branch is asked for."""
WITHIN = 0.05
"""Of E: the data that the paper asks for."""


class Flow(Protocol):
    """What the pipeline lends: how to find the places of a run's tables, and how to make them."""

    def resolve(self, config: Config, name: str) -> Run: ...

    def run_steps(self, run: Run, flow: Sequence[Step]) -> None: ...


@dataclass(frozen=True)
class Trial:
    """One training of a sweep."""

    name: str
    values: dict[str, Any]
    """Key of the grid → value."""
    config: Config
    budget: float | None = None
    resolved: Run | None = None

    @property
    def run(self) -> Run:
        assert self.resolved is not None
        return self.resolved

    @property
    def folder(self) -> str:
        """Where its report and its log are."""
        return self.run.places.folder

    @property
    def lengths(self) -> str:
        """What decides how long its plan must be."""
        return fingerprint(identity(self.config, *LENGTHS, "stage2"))

    @property
    def trunk(self) -> Step:
        return next(step for step in steps(self.config) if step.stage == TRUNK)

    @property
    def branch_step(self) -> int:
        return budget_of(self.config, plans_of(self.run, self.trunk)).branch_step

    def steps(self, evaluate: bool) -> list[Step]:
        """What is to be made for it; questions are asked only if the sweep says so."""
        flow = steps(self.config)
        last = (MEASURE, EVALUATE) if evaluate else (MEASURE,)
        return [*with_needs(self.config, [step for step in flow if step.trains or step.stage in last]), flow[-1]]


def run_sweep(base: Run, name: str, flow: Flow) -> dict[str, Any]:
    """Run what is missing of a sweep; write `sweeps/<name>/results.json` and `.csv`.

    Args:
        base: the run of the config that has the sweep.

    Returns:
        What results.json holds: `rows`, a dict each; `laws`, one for each combination; `saving`.

    Raises:
        ConfigError: the sweep does not exist, or a value of its grid makes no valid config.
    """
    config = base.config
    sweep = config.sweeps[name]
    trials = [
        replace(trial, resolved=flow.resolve(trial.config, f"{name}/{trial.name}"))
        for trial in grid_trials(config, name)
    ]
    for trial in trials:
        write_index(trial.run)
    start_ray(config)
    started = time.monotonic()
    errors = make_shared(config, name, trials, flow)
    ready = [trial for trial in trials if trial.name not in errors]
    errors |= run_trials(config, name, ready, partial(_whole_run, flow=flow, evaluate=sweep.evaluate))
    found = {trial.name: measured_row(trial) for trial in trials if trial.name not in errors}
    rows = []
    for trial in trials:
        row = {"trial": trial.name} | trial.values | ({} if trial.budget is None else {"budget": trial.budget})
        rows.append(row | found.get(trial.name, {}) | {"error": errors.get(trial.name, "")})
    measured = {trial.name: measured_rows(trial) for trial in trials if sweep.budgets and trial.name in found}
    result = {"name": name, "grid": dict(sweep.grid), "rows": rows, "laws": laws(rows, list(sweep.grid), measured)}
    if sweep.budgets:
        same_m = reached(rows, list(sweep.grid))
        result |= {"saving": saving(name, trials, rows), "reached": same_m}
        for each in same_m:
            say(f"sweep {name}: {told_reached(each)}")
    url = f"{config.run_dir}/sweeps/{name}/results"
    write_json(f"{url}.json", result)
    write_bytes(f"{url}.csv", as_csv(rows).encode())
    say(f"sweep {name}: {len(rows)} trainings in {clock(time.monotonic() - started)} → {url}.csv")
    return result


def grid_trials(config: Config, name: str) -> list[Trial]:
    """One trial for each combination of the grid, seed and budget."""
    sweep = config.sweeps[name]
    grid = {key: list(values) for key, values in sweep.grid.items()}
    if sweep.seeds:
        grid["seed"] = list(sweep.seeds)
    given, other = ("num_steps", "num_positions") if sweep.num_steps else ("num_positions", "num_steps")
    actors = config.ray.max_actors
    if actors is not None and sweep.max_concurrent is not None:  # several trials share the cluster
        actors = max(1, actors // sweep.max_concurrent)
    trials = []
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        for budget in sweep.budgets or (None,):
            label = trial_name(values, sweep, budget)
            changes = values | {"sweeps": {}, "ray.max_actors": actors}
            if budget is not None:
                changes |= {"stage2": None, f"distill.{given}": budget, f"distill.{other}": None}
            elif values.get("stage2", config.stage2) is not None:
                changes = {"stage2.control": False} | changes
            trials.append(Trial(label, values, replaced(config, changes, f"sweeps.{name}: {label}"), budget))
        idle = [key for key in values if key.startswith(OF_STAGE2) and trials[-1].config.stage2 is None]
        if idle:
            raise ConfigError(f"sweeps.{name} varies {idle[0]}, but the config has no stage2; add stage2: {{}}")
    return trials


def trial_name(values: dict[str, Any], sweep: SweepConfig, budget: float | None) -> str:
    """A file's name, such as `alpha=0.5,seed=1` or `alpha=0.5,steps=160`."""
    leaves = [key.rsplit(".", 1)[-1] for key in values]
    keys = leaves if len(set(leaves)) == len(leaves) else list(values)
    parts = [f"{key}={value}" for key, value in zip(keys, values.values(), strict=True)]
    if budget is not None:
        parts.append(f"steps={budget}" if sweep.num_steps else f"positions={budget:g}")
    text = ",".join(parts)
    safe = re.sub(r"[^\w=,.+-]+", "_", text)
    return safe if safe == text and len(text) < 100 else f"{safe[:80]}-{fingerprint({'name': text})[:6]}"


def make_shared(config: Config, name: str, trials: Sequence[Trial], flow: Flow) -> dict[str, str]:
    """Make what several trials have in common, once: first what comes before training, then each trunk to its longest,
    then what follows. Where a branch leaves its trunk is known by the plans, so those are made also for a single trial.

    Returns:
        Why a trial cannot go on, by its name.
    """
    errors: dict[str, str] = {}
    users: dict[str, Sharing] = {}
    flows = {trial.name: trial.steps(config.sweeps[name].evaluate) for trial in trials}
    for trial in trials:
        for step in flows[trial.name]:
            if step.writes:
                users.setdefault(trial.run.labelled(step.writes[0]).url, []).append((trial, step))
    for_trunks = {
        trial.run.labelled(label).url
        for trial in trials
        for step in with_needs(trial.config, [trial.trunk])
        for label in step.writes
    }
    shared = [
        sharing
        for url, sharing in users.items()
        if (len(sharing) > 1 or url in for_trunks) and sharing[0][1].stage != TRUNK
    ]
    later = set(made_from(itertools.chain(*flows.values()), [TRUNK]))
    for sharing in shared:
        if later.isdisjoint(sharing[0][1].writes):
            _make_once(sharing, flow, errors)
    trunks = {}
    for sharing in users.values():
        alive = [trial for trial, step in sharing if step.stage == TRUNK and trial.name not in errors]
        if alive:
            trunks[alive[0].name] = alive
    points = {first: sorted({trial.branch_step for trial in alive}) for first, alive in trunks.items()}
    firsts = [alive[0] for alive in trunks.values()]
    failed = run_trials(config, name, firsts, partial(_trunk, points=points), kind=TRUNKS) if firsts else {}
    for first, error in failed.items():
        errors |= {trial.name: f"its trunk failed: {error}" for trial in trunks[first] if not _has_branch(trial)}
    for sharing in shared:
        if not later.isdisjoint(sharing[0][1].writes):
            _make_once(sharing, flow, errors)
    return errors


Sharing = list[tuple[Trial, Step]]
"""The trials that have a table in common, with the step that makes it."""


def _make_once(sharing: Sharing, flow: Flow, errors: dict[str, str]) -> None:
    """Make a shared table by way of one of its trials; one that grows, by way of each that may want it longer."""
    alive = [(trial, step) for trial, step in sharing if trial.name not in errors]
    lengths = {trial.lengths: (trial, step) for trial, step in alive if step.grows}
    for trial, step in lengths.values() or alive[:1]:
        try:
            flow.run_steps(trial.run, [step])
        except Exception as error:
            cause = user_error(error)
            if cause is None:
                raise
            errors |= {each.name: str(cause) for each, _ in sharing}
            return


def _has_branch(trial: Trial) -> bool:
    """Whether the trunk has reached this trial's decay, though it failed behind."""
    try:
        checkpoint_at(checkpoints_url(trial.run.labelled(TRUNK)), trial.branch_step)
    except TableError:
        return False
    return True


def _trunk(trial: Trial, points: dict[str, list[int]]) -> None:
    with held(trial.run.labelled(TRUNK).url):
        lengthen(trial.run, trial.trunk, points[trial.name])


def _whole_run(trial: Trial, flow: Flow, evaluate: bool) -> None:
    """Make all that is missing of a trial, its report last."""
    flow.run_steps(trial.run, trial.steps(evaluate))
    write_json(_done_url(trial), {"versions": _versions(trial, evaluate)})


def _done_url(trial: Trial) -> str:
    return f"{trial.folder}/done.json"


def _versions(trial: Trial, evaluate: bool) -> dict[str, str | None]:
    """Of all tables of a trial, as they are now."""
    labels = [label for step in trial.steps(evaluate) for label in step.writes]
    with ThreadPoolExecutor(32) as threads:
        manifests = threads.map(lambda label: trial.run.labelled(label).manifest() or {}, labels)
        return {label: manifest.get("version") for label, manifest in zip(labels, manifests, strict=True)}


def run_trials(
    config: Config, name: str, trials: Sequence[Trial], work: Callable[[Trial], None], kind: str = "trainings"
) -> dict[str, str]:
    """Run those that are not done, several at a time; returns the errors of those that failed, by name."""
    sweep = config.sweeps[name]
    pending = {trial.name: trial for trial in trials if kind == TRUNKS or not _is_done(trial, sweep.evaluate)}
    at_once = sweep.max_concurrent or concurrency([trial.config for trial in trials] or [config])
    count = f"{len(pending)} of {len(trials)} {kind}" if len(pending) < len(trials) else f"{len(trials)} {kind}"
    say(f"sweep {name}: {count} to run, {min(at_once, max(len(pending), 1))} at a time")
    if not pending:
        return {}
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_SYNCER", "1")

    def trainable(given: dict[str, str]) -> None:
        trial = pending[given["trial"]]
        tune.report({"trial": trial.name, "error": _attempt(work, trial, kind)})

    tuner = tune.Tuner(
        tune.with_resources(trainable, nothing_but_this_node()),
        param_space={"trial": tune.grid_search(list(pending))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=at_once, trial_dirname_creator=lambda t: f"trial-{t.trial_id}"
        ),
        run_config=tune.RunConfig(
            name=f"tune-{kind}",
            **for_ray(f"{config.run_dir}/sweeps/{name}"),
            failure_config=tune.FailureConfig(max_failures=sweep.max_failures),
            verbose=0,
            callbacks=[_Progress(f"sweep {name}", len(pending))],
        ),
    )
    errors = {}
    for result in tuner.fit():
        label = (result.config or {})["trial"]
        if result.error is not None:
            lines = [line for line in str(result.error).strip().splitlines() if line.strip()]
            errors[label] = lines[-1] if lines else type(result.error).__name__
        elif "error" not in (result.metrics or {}):  # Tune ends quietly at the first Ctrl-C
            raise KeyboardInterrupt
        elif result.metrics["error"]:
            errors[label] = result.metrics["error"]
    return errors


def _is_done(trial: Trial, evaluate: bool) -> bool:
    done = read_json(_done_url(trial))
    return done is not None and done["versions"] == _versions(trial, evaluate)


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
        write_bytes(f"{trial.folder}/{kind}.log", told.get().encode())
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


def measured_row(trial: Trial) -> dict[str, Any]:
    """F and M of a finished run's last system, by whether its domains were heard; accuracy, where it was asked."""
    metrics = read_json(f"{trial.run.places.report_url}/metrics.json") or {}
    system = STAGE2 if STAGE2 in metrics else STAGE1
    facts = metrics[system]
    names = ("misalignment", "forgetting", "distillation", "misalignment_whole", "forgetting_whole")
    row = {"system": system, "num_positions": facts["num_positions"]}  # the law's D, as the paper's: with text alone
    row |= {"num_text_positions": facts.get("num_text_positions", 0)}
    row |= {key: facts[key] for name in names for key in (name, f"{name}_standard_error")}
    for (label, heard), name in itertools.product((("heard", True), ("unheard", False)), names):
        domains = [
            found for found in facts["by_domain"].values() if found["heard"] is heard and found[name] is not None
        ]
        if domains and name != "distillation":
            row[f"{label}_{name}"] = sum(found[name] for found in domains) / len(domains)
            errors = [found[f"{name}_standard_error"] for found in domains]
            row[f"{label}_{name}_standard_error"] = None if None in errors else math.hypot(*errors) / len(errors)
    if "selection" in metrics and system == STAGE2:
        row["synthetic_hours"] = metrics["selection"]["hours"]
    for found in metrics.get("accuracy", []):
        if found["system"] == system and found["metric"] == "acc":
            condition = "" if found["condition"] == "clean" else f" {found['condition']}"  # floors have theirs
            part = {None: "", True: " heard", False: " unheard"}[found["heard"]]
            name = f"{found['benchmark']} {found['modality']}{condition}{part}"
            row |= {name: found["accuracy"], f"{name} low": found["ci_low"], f"{name} high": found["ci_high"]}
    return row | {"train_seconds": facts["train_seconds"], "run": trial.run.places.name}


def laws(
    rows: Sequence[dict[str, Any]], keys: Sequence[str], measured: Mapping[str, Sequence[Measurement]] | None = None
) -> list[dict[str, Any]]:
    """`M(D) = E + B · D^−β` for each combination with several budgets, or why there is none.

    Args:
        measured: what M of each trial was measured on, by its name; unset: no interval over passages.
    """
    found = []
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if not row["error"] and "budget" in row:
            groups.setdefault(json.dumps([row[key] for key in keys], sort_keys=True), []).append(row)
    for group in groups.values():
        values = {key: group[0][key] for key in keys}
        errors = [row.get("misalignment_standard_error") for row in group]
        try:
            law = fit_misalignment_law(
                [row["num_positions"] for row in group],
                [row["misalignment"] for row in group],
                standard_error=[math.nan if error is None else error for error in errors],
            )
        except LawError as error:
            found.append({"values": values, "problem": str(error)})
            continue
        over_passages = None
        if measured is not None:
            over_passages = law.interval_over_passages(*unit_sums([measured[row["trial"]] for row in group]))
        found.append({"values": values, "problem": "", "ci_over_passages": over_passages} | law_facts(law))
    return found


def unit_sums(trainings: Sequence[Sequence[Measurement]]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """M summed over the positions of each book, video or document (N, U), these (N, U), and its domain (U,)."""
    domains = {row.source or row.passage: row.domain for rows in trainings for row in rows}
    places = {name: place for place, name in enumerate(domains)}
    sums, counts = np.zeros((2, len(trainings), len(places)))
    for training, rows in enumerate(trainings):
        for row in rows:
            sums[training, places[row.source or row.passage]] += row.misalignment
            counts[training, places[row.source or row.passage]] += row.num_positions
    return sums, counts, list(domains.values())


def measured_rows(trial: Trial) -> list[Measurement]:
    """What M of a trial with a budget, which ends with Stage I, was measured on."""
    table = trial.run.table(trial.config.measured_sets[0], measurements_of(STAGE1))
    shards = each_shard(partial(table.read_rows, Measurement), table.shards())
    return [row for rows in shards for row in rows if row.protocol == "interleaved"]


def law_facts(law: MisalignmentLaw) -> dict[str, Any]:
    """A law as plain data; an open end of an interval is null."""
    low, high = law._fit.positions.min(), law._fit.positions.max() * 4
    places = [low * (high / low) ** (index / 24) for index in range(25)]
    curve = [(place, float(law.predict(place)), *law.predict_interval(place)) for place in places]
    return {each.name: getattr(law, each.name) for each in fields(law) if each.repr} | {
        "ci": {name: _finite(ends) for name, ends in law.ci.items()},
        "within": WITHIN,
        "positions_within": _finite([law.positions_within(WITHIN)])[0],
        "positions_within_ci": _finite(law.positions_within_interval(WITHIN)),
        "curve": [_finite(point) for point in curve],
    }


def _finite(numbers: Iterable[float]) -> list[float | None]:
    return [float(number) if math.isfinite(number) else None for number in numbers]


def saving(name: str, trials: Sequence[Trial], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Positions that were trained, beside those that as many separate trainings would have needed."""
    done = [(trial, row) for trial, row in zip(trials, rows, strict=True) if not row["error"]]
    own = {row["trial"]: (trial.run.labelled(STAGE1).manifest() or {})["own_positions"] for trial, row in done}
    groups: dict[str, list[dict[str, Any]]] = {}
    for trial, row in done:
        groups.setdefault(trial.run.labelled(TRUNK).url, []).append(row)
    # A trunk is as long as the last branch that begins on it, also where it failed behind that.
    trunks = sum(max(row["num_positions"] - own[row["trial"]] for row in group) for group in groups.values())
    trained, separate = trunks + sum(own.values()), sum(row["num_positions"] for _, row in done)
    largest = sum(max(row["num_positions"] for row in group) for group in groups.values())
    if done:
        say(
            f"sweep {name}: trained {trained:,.0f} positions, {trained / separate:.0%} of what separate trainings "
            f"would have needed and {trained / largest:.2f} × the largest budgets alone"
        )
    return {"positions": trained, "separate_positions": separate, "largest_positions": largest}


def reached(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """With how many positions a combination reaches the M that another has at its largest budget, where it needs fewer.

    M is interpolated between neighbouring budgets, log M over log D; nothing is extrapolated. M is that of the heard
    domains, where some are not, by both protocols.
    """
    found = []
    for name in ("misalignment", "misalignment_whole"):
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            value = row.get(f"heard_{name}", row.get(name))
            if not row["error"] and value:
                combination = ", ".join(f"{key}={row[key]}" for key in keys)
                curves.setdefault(combination, []).append((row["num_positions"], value))
        for (ours, curve), (other, target) in itertools.permutations(curves.items(), 2):
            positions, goal = max(target)
            needed = _first_at(sorted(curve), goal)
            if needed is not None and needed < positions:
                found.append({
                    "of": name, "combination": ours, "other": other, "value": goal, "positions": needed,
                    "positions_of_other": positions, "ratio": positions / needed,
                    "at_most": needed == min(curve)[0],
                })  # fmt: skip
    return found


def _first_at(curve: Sequence[tuple[float, float]], goal: float) -> float | None:
    """Positions at which a curve (positions, M) comes down to a value; its first budget, where that is below it."""
    if curve[0][1] <= goal:
        return curve[0][0]
    for (left, above), (right, below) in itertools.pairwise(curve):
        if below <= goal < above:
            share = math.log(above / goal) / math.log(above / below)
            return left * (right / left) ** share
    return None


def told_reached(each: Mapping[str, Any]) -> str:
    """A row of `reached`, as users read it."""
    measure = "M, all but the last words spoken," if each["of"].endswith("whole") else "M"
    fewer = "at least" if each["at_most"] else "about"
    return (
        f"{measure} of {each['other']} at {each['positions_of_other']:,.0f} positions ({each['value']:.3f}) is reached "
        f"with {each['combination']} by {each['positions']:,.0f}: {fewer} {each['ratio']:.1f} × fewer"
    )


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
