"""Running the flow: the whole of it, a stage with what it needs, sweeps, plans; and how far a run is."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from types import ModuleType
from typing import TYPE_CHECKING, Any

from salad_ray.config import Config, ConfigError, identity
from salad_ray.configfile import replaced
from salad_ray.console import clock, log_facts, say, show
from salad_ray.flow import TRAINED, Step, batches, made_from, steps, steps_of, with_needs
from salad_ray.lease import held, is_held
from salad_ray.names import ALIGNED, TEXT, UTTERANCES
from salad_ray.runs import (
    OPEN,
    Places,
    Run,
    forget,
    kept_runs,
    key_of,
    lead_to,
    num_bytes,
    open_places,
    open_run,
    refuse_older,
    run_name,
    unused_tables,
    write_index,
)
from salad_ray.tables import Table, Utterance, delete_folder, fingerprint, read_json, write_json

if TYPE_CHECKING:
    from salad_ray.scaling.rates import Rates

Ask = Callable[[str], bool]
"""Asks the user whether to go on."""


def stage_module(stage: str) -> ModuleType:
    """The stage's module; imported late, since `salad --help` should not wait for torch.

    It has `work(run, step, ahead) -> Work` for steps that go shard by shard, `training(run, step, ahead) -> Training`
    for those that train, `make(run, step)` for others; and perhaps `sources(config, step)`, the facts of what it reads
    from outside.
    """
    return importlib.import_module(f"salad_ray.stages.{stage}")


def resolve(
    config: Config, flow: Sequence[Step] | None = None, name: str | None = None, looked_at: dict[str, Any] | None = None
) -> Run:
    """The run of a config: the places of all that these steps write, all of the config's by default.

    Sources are looked at (models loaded, files listed), once each.

    Args:
        looked_at: facts that were found already, to which these are added; several configs may share them.

    Raises:
        ConfigError, ModelError: a source that is not there.
    """
    keys: dict[str, str] = {}
    facts: dict[str, dict[str, Any]] = {}
    looked_at = {} if looked_at is None else looked_at
    for step in steps(config) if flow is None else flow:
        found: dict[str, Any] = {}
        if sources := getattr(stage_module(step.stage), "sources", None):
            place = fingerprint({"stage": step.stage, "tables": step.tables, "keys": identity(config, *step.keys)})
            if place not in looked_at:
                looked_at[place] = sources(config, step)
            found = looked_at[place]
        keys |= dict.fromkeys(step.writes, key_of(config, step, keys, found))
        facts |= dict.fromkeys(step.writes, found)
    return Run(config, Places(config.run_dir, name or run_name(config), keys), facts)


def run_all(config: Config) -> Run:
    """Every stage in order; what is done is skipped, what was interrupted continues."""
    started = time.monotonic()
    flow = steps(config)
    run = start(config, flow)
    run_steps(run, flow, started)
    say(f"done in {clock(time.monotonic() - started)}; everything lies in {config.run_dir}")
    return run


def make(config: Config, stage: str, set_name: str, redo: bool = False, ask: Ask = lambda _: True) -> Run:
    """One stage, and before it all that it needs and that is not there yet.

    Args:
        redo: delete its tables first, and what was made from them.
        ask: asked before other kept runs lose tables.

    Raises:
        ConfigError: the stage does not work on this set, or has no part in this config.
    """
    wanted = steps_of(config, stage, set_name)
    if not wanted:
        sets = [step.set for step in steps(config) if step.stage == stage and step.set]
        where = f"works on {', '.join(dict.fromkeys(sets))}, not on set={set_name}" if sets else "has no part"
        where += "; stage2={} adds Stage II with its defaults" if config.stage2 is None and not sets else ""
        raise ConfigError(f"in this config the stage '{stage}' {where}")
    if not wanted[0].trains:
        wanted = _without_later_models(config, wanted)
    flow = with_needs(config, wanted)
    run = start(config, with_needs(config, wanted, if_there=True))
    if redo:
        delete_tables(run, [label for step in wanted for label in step.writes], ask)
    run_steps(run, flow, time.monotonic())
    return run


def _without_later_models(config: Config, wanted: list[Step]) -> list[Step]:
    """What is made of Stage II is left out until there is one: whoever looks at Stage I does not want it trained."""
    later = set(TRAINED[1:])
    if not any(later & set(step.reads) for step in wanted):
        return wanted
    run = resolve(config)
    return [step for step in wanted if all(run.labelled(label).manifest() for label in later & set(step.reads))]


def start(config: Config, flow: Sequence[Step]) -> Run:
    """Resolve, and keep the run; raises `TableError` where an earlier version has written."""
    refuse_older(config.run_dir)
    run = resolve(config, flow)
    write_index(run)
    return run


def run_steps(run: Run, flow: Sequence[Step], started: float) -> None:
    """Make what is missing of these steps, in batches that share their processes."""
    number = 0
    for batch in batches(run.config, flow):
        number += len(batch)
        log_facts.update(run=run.config.run_dir, stage=batch[0].stage, set=batch[0].set)
        names = dict.fromkeys(step.stage for step in batch)
        sets = dict.fromkeys(step.set for step in batch if step.set)
        label = f"{' → '.join(names)} {', '.join(sets)}".rstrip()
        say(f"[{number}/{len(flow)}, {clock(time.monotonic() - started)}] {label}")
        make_steps(run, batch)


def make_steps(run: Run, batch: Sequence[Step]) -> None:
    """Make the tables of a batch; another driver that makes one of them is waited for."""
    with ExitStack() as leases:
        for label in (label for step in batch for label in step.writes):
            leases.enter_context(held(run.labelled(label).url))
        if batch[0].by_shard:
            from salad_ray.stages.common import begun_works, run_works

            run_works(run, begun_works(batch, lambda step, ahead: stage_module(step.stage).work(run, step, ahead)))
        elif batch[0].trains:
            from salad_ray.stages.training import begun_trainings, run_trainings

            trainings = begun_trainings(batch, lambda step, ahead: stage_module(step.stage).training(run, step, ahead))
            run_trainings(run.config, trainings)
        else:
            for step in batch:
                stage_module(step.stage).make(run, step)


def delete_tables(run: Run, labels: Collection[str], ask: Ask) -> None:
    """Delete tables and all that was made from them, by whichever kept run.

    Raises:
        ConfigError: other kept runs have some of them, and the user does not want them to lose these.
    """
    kept = kept_runs(run.config.run_dir)
    doomed = _made_from(kept, {run.labelled(label).url for label in labels})
    tables = {table.url: table for places in kept for table in places.tables}
    there = {url: table for url, table in tables.items() if url in doomed and not table.is_new()}
    others = {places.name for places in kept for table in places.tables if table.url in there} - {run.places.name}
    if others and not ask(f"{len(there)} tables are deleted; {', '.join(sorted(others))} have some of them, too"):
        raise ConfigError("nothing was deleted")
    for table in there.values():
        with held(table.url):
            table.delete()
    if there:
        say(f"deleted {len(there)} tables: {', '.join(sorted({table.label for table in there.values()}))}")


def _made_from(kept: Sequence[Places], wanted: Collection[str]) -> set[str]:
    """Places of these tables and of all that the kept runs have made from them, as their indexes say."""
    found = set()
    for places in kept:
        reads = (read_json(places.index_url) or {}).get("reads", {})
        flow = [Step("", "", (label,), tuple(inputs)) for label, inputs in reads.items()]
        labels = made_from(flow, [table.label for table in places.tables if table.url in wanted])
        found |= {places.labelled(label).url for label in labels}
    return found


def clean(run_dir: str, forgotten: Sequence[str], ask: Ask) -> None:
    """Delete the tables that no kept run has, after they were listed with their sizes.

    Args:
        forgotten: names of runs that are kept no longer.
    """
    open_places(run_dir)  # nothing is deleted where no run of this version is kept
    known = {places.name: places for places in kept_runs(run_dir)}
    strange = [name for name in forgotten if name not in known]
    if strange:
        raise ConfigError(f"{run_dir} has no run '{strange[0]}'; it has {', '.join(known) or 'none'}")
    left = [table for table in unused_tables(run_dir, set(forgotten)) if not is_held(table.url)]
    sizes = {table.url: num_bytes(table) for table in left}
    for table in left:
        say(f"{sizes[table.url] / 1e6:12,.1f} MB  {table.url}")
    total = f"{len(left)} tables, {sum(sizes.values()) / 1e6:,.1f} MB, which no kept run has"
    if not left and not forgotten:
        say(f"{run_dir}: nothing to clean")
        return
    if not ask(f"delete {total}" + (f", and forget {', '.join(forgotten)}" if forgotten else "")):
        say("nothing was deleted")
        return
    for name in forgotten:
        forget(known[name])
    for table in left:
        table.delete()
    say(f"deleted {total}")


def run_sweeps(config: Config, only: str | None = None, redo: bool = False) -> None:
    """The config's sweeps, then the report with their laws and plots.

    Raises:
        ConfigError: there is no such sweep, or some trainings failed.
    """
    from salad_ray.report.page import write_page
    from salad_ray.report.scaling import sweep_tables
    from salad_ray.scaling.sweep import run_sweep

    if only is not None and only not in config.sweeps:
        raise ConfigError(f"there is no sweep '{only}' in the config; it has {', '.join(config.sweeps) or 'none'}")
    if not config.sweeps:
        raise ConfigError("the config has no sweeps; name one: sweeps: {alpha: {grid: {distill.alpha: [0, 1]}}}")
    chosen = [name for name in config.sweeps if only in (None, name)]
    run = start(config, steps(config))
    if redo:
        for name in chosen:
            _forget_sweep(run, name)
    results = [run_sweep(run, name, SweepFlow()) for name in chosen]
    url = run.places.report_url
    write_page([run.places], f"{url}/page.html")
    lead_to(run.places)
    for result in results:
        show(*sweep_tables(result))
    say(f"report: {config.run_dir}/report/page.html#scaling")
    failed = [row for result in results for row in result["rows"] if row["error"]]
    if failed:
        raise ConfigError(
            f"{len(failed)} trainings failed, first {failed[0]['trial']}: {failed[0]['error']}; the same command tries "
            "them again"
        )


class SweepFlow:
    """What the pipeline lends to a sweep, which must not import it."""

    def __init__(self) -> None:
        self.looked_at: dict[str, Any] = {}

    def resolve(self, config: Config, name: str) -> Run:
        return resolve(config, name=name, looked_at=self.looked_at)

    @staticmethod
    def run_steps(run: Run, flow: Sequence[Step]) -> None:
        run_steps(run, flow, time.monotonic())


def _forget_sweep(run: Run, name: str) -> None:
    """Delete a sweep's results and the tables that its trainings alone have."""
    run_dir = run.config.run_dir
    kept = [run.places, *kept_runs(run_dir)]
    mine = [places for places in kept if places.name.startswith(f"{name}/")]
    others = {table.url for places in kept if places not in mine for table in places.tables}
    for places in mine:
        for table in places.tables:
            if table.url not in others and not table.is_new():
                with held(table.url):
                    table.delete()
        forget(places)
    delete_folder(f"{run_dir}/sweeps/{name}")


SILENT_SECS = 300
"""After so long without a note of progress, `salad status` says that there was none."""
CALIBRATION: dict[str, Any] = {
    "ray.max_actors": None,
    "world.num_questions": 64,
    "ingest.corpora": [],
    "ingest.web": [],
    "ingest.text": [],
    "cluster.num_clusters": 12,
    "probe.passages_per_cluster": 6,
    "select.budget_hours": None,
    "select.budget_percent": 20,
    "model.tiny_lm.num_steps": 60,
    "distill.num_steps": 50,
    "distill.num_positions": None,
    "distill.log_every": 10,
    "distill.extra_resources": {},
    "distill.wandb_project": None,
    "distill.mlflow_experiment": None,
    "evaluate.benchmarks": [],
    "sweeps": {},
}
"""A run of minutes on the embedded world with the config's own models: what `salad plan --calibrate` measures."""
CALIBRATION_ROWS = {"num_natural": 150, "num_heldout": 12, "num_web": 250}
"""Of each shard: about as many as shards have, since a shard costs something however few rows it holds."""
CALIBRATION_WAVES = 4
"""Shards for each actor: enough that no single slow shard makes its pace."""


def show_plan(config: Config, rates_file: str | None, measured: str | None, calibrate: bool) -> None:
    """Print the plan and write it to `run_dir/plan/plan.json`.

    Raises:
        ConfigError: of what the rates do not know; where nothing can be calibrated.
    """
    from salad_ray.scaling.plan import make_plan, plan_grids
    from salad_ray.scaling.rates import load_rates, measured_rates

    rates = load_rates(rates_file)
    if calibrate:
        measured = _calibrate(config, rates)
    if measured:
        run = open_run(measured)
        rates = measured_rates(rates, run, config)
    plan = make_plan(config, rates)
    show(*plan_grids(plan))
    url = f"{config.run_dir}/plan/plan.json"
    write_json(url, plan.as_dict() | {"rates": rates.model_dump()})
    for note in plan.notes:
        say(note)
    say(f"plan: {url}; rates and prices are `salad plan --show-rates`, to copy, edit and pass with --rates")


def _calibrate(config: Config, rates: Rates) -> str:
    """Run the calibration; returns its folder."""
    from salad_ray.scaling.plan import fit_training

    small = calibration(config)
    fitted = fit_training(small, rates, min((gpu.total_memory for gpu in _gpus()), default=0))
    if fitted.distill != small.distill:
        told = "so that it will seem a little slow"
        if fitted.distill.activation_checkpointing != small.distill.activation_checkpointing:
            told = "and activation checkpointing, so that its rate stays what it was"
        rows = fitted.distill.micro_batch_rows
        say(f"calibration: what is configured does not fit here; training takes micro_batch_rows={rows}, {told}")
    run_all(fitted)
    return fitted.run_dir


def calibration(config: Config) -> Config:
    """A small run of the same kind, on all GPUs of this machine; another config or machine gives it another folder."""
    gpus, changes = _gpus(), dict(CALIBRATION)
    if config.stage2 is not None:
        changes |= {"stage2.num_steps": 30, "stage2.num_positions": None, "stage2.control": False}
    lanes = config.pack.num_lanes
    if config.distill.use_gpu:
        lanes = max(1, len(gpus))
        rows = config.distill.micro_batch_rows
        changes |= {"distill.num_workers": lanes, "pack.num_lanes": lanes, "pack.rows_per_lane": rows}
    actors = config.ray.num_cpus or os.cpu_count() or 1
    if config.synthesize.num_gpus:  # speech takes longest, so its actors decide how much of it there is
        actors = max(1, int(len(gpus) / config.synthesize.num_gpus))
    num_shards = -(-CALIBRATION_WAVES * actors // lanes) * lanes
    changes |= {f"world.{name}": rows * num_shards for name, rows in CALIBRATION_ROWS.items()}
    changes |= {"world.num_text": changes["world.num_web"] if TEXT in config.trained_sets else 0}
    small = replaced(config, changes | {"ingest.num_shards": num_shards}, "calibration")
    decisive = small.model_dump(mode="json", exclude={"run_dir", "set", "strict"})
    name = fingerprint(decisive | {"gpus": [gpu.name for gpu in gpus]})[:8]
    return small.model_copy(update={"run_dir": f"{config.run_dir}/plan/calibration-{name}"})


def _gpus() -> list[Any]:
    """Of this machine: `name` and `total_memory` (bytes) of each."""
    import torch

    return [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]


def export_cuts(run_dir: str, set_name: str, target: str, name: str | None = None) -> int:
    """Write a set's utterances as a Lhotse manifest, with word times where there are any; returns their number.

    Raises:
        ConfigError: the set has no finished utterances, or the target is not called `….jsonl.gz`.
    """
    from salad_ray.speech.lhotse_cuts import write_cuts

    if not target.endswith(".jsonl.gz"):
        raise ConfigError(f"{target}: a cut manifest ends in .jsonl.gz")
    run = open_run(run_dir, name)
    tables = [run.table(set_name, name) for name in (ALIGNED, UTTERANCES)]
    table = next((table for table in tables if table.manifest() is not None), None)
    if table is None:
        raise ConfigError(f"{tables[-1].url} is not finished; run `salad ingest CONFIG set={set_name}` first")
    rows = (row for shard in table.shards() for row in table.iterate(Utterance, shard))
    return write_cuts(rows, target)


def status(run: Run) -> list[dict[str, str]]:
    """One row for each table of the run: stage, set, table, state, rows, rejects, time, place."""
    rows = []
    for step in steps(run.config):
        for label in step.writes:
            table = run.labelled(label)
            place = table.url.removeprefix(f"{run.config.run_dir}/") if label in run.places.keys else ""
            rows.append({"stage": step.stage, "set": step.set, "place": place} | _table_status(table))
    return rows


def other_runs(run: Run) -> list[tuple[str, str]]:
    """The other kept runs, but trainings of sweeps: name, and the keys of the config in which they differ."""
    own = _flat(run.config.model_dump(mode="json"))
    found = []
    for places in kept_runs(run.config.run_dir):
        if places.name != run.places.name and "/" not in places.name:
            other = _flat((read_json(places.index_url) or {}).get("config", {}))
            keys = [key for key in own | other if own.get(key) != other.get(key) and key.split(".")[0] not in OPEN]
            found.append((places.name, ", ".join(f"{key}={other.get(key)}" for key in keys)))
    return found


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _table_status(table: Table) -> dict[str, str]:
    manifest = table.manifest()
    if manifest is not None:
        rows = manifest.get("num_rows", manifest.get("num_positions"))
        rejected = manifest.get("num_rejected", 0)
        secs = manifest.get("train_seconds", manifest.get("seconds", 0))
        return {
            "table": table.name,
            "state": "done",
            "rows": "" if rows is None else f"{rows:,}",
            "rejects": f"{rejected:,}" if rejected else "",
            "time": clock(secs),
        }
    row = {"table": table.name, "state": "not begun", "rows": "", "rejects": "", "time": ""}
    note = read_json(f"{table.url}/progress.json")
    if note is None:
        begun = read_json(f"{table.url}/begun.json") is not None
        return row | ({"state": f"begun, {len(table.shards())} shards"} if begun else {})
    silent = time.time() - note["at"]
    when = f"silent for {clock(silent)}" if silent > SILENT_SECS else f"ETA {clock(note['eta_secs'])}"
    if "step" in note:
        return row | {"state": f"step {note['step']}/{note['num_steps']}, {when}"}
    left = note["total"] - note["done"]
    held = f"{note['num_gpus']:g} GPUs, " if note.get("num_gpus") else ""
    read = f"{note['sources_read']}/{note['sources']} sources read, " if "sources" in note else ""
    shards = f"{len(table.shards())} shards" + ("" if read else f", {left} to go")
    state = f"{read}{shards}, {note['rows_per_sec']:,.0f} rows/s, {held}{when}"
    rejects = f"{note['num_rejected']:,}" if note["num_rejected"] else ""
    return row | {"state": state, "rows": f"{note['num_input']:,}", "rejects": rejects}
