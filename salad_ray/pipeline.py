"""Running the flow: the whole of it, a stage with what it needs, sweeps, plans; and how far a run is."""

from __future__ import annotations

import importlib
import os
import time
from types import ModuleType
from typing import TYPE_CHECKING, Any

from salad_ray.config import Config, ConfigError, SetName, dump_config, load_config, replaced
from salad_ray.console import clock, log_facts, say, show
from salad_ray.flow import Step, steps, steps_of, with_needs
from salad_ray.tables import (
    Table,
    Utterance,
    delete_folder,
    file_exists,
    fingerprint,
    read_json,
    write_bytes,
    write_json,
)

if TYPE_CHECKING:
    from salad_ray.scaling.rates import Rates


def stage_module(stage: str) -> ModuleType:
    """The stage's module; imported late, since `salad --help` should not wait for torch."""
    return importlib.import_module(f"salad_ray.stages.{stage}")


def run_all(config: Config) -> None:
    """Every stage in order; what is done is skipped, what was interrupted continues."""
    started = time.monotonic()
    _run_steps(config, steps(config), started)
    say(f"done in {clock(time.monotonic() - started)}; everything lies in {config.run_dir}")


def make(config: Config, stage: str, set_name: str, anew: bool = False) -> None:
    """One stage, and before it all that it needs and that is not there yet; `anew` deletes its own output first.

    A stage that is no step of this config runs by itself, and says what it lacks.

    Raises:
        ConfigError: the stage does not work on this set.
    """
    wanted = steps_of(config, stage, set_name)
    sets = [step.set for step in steps(config) if step.stage == stage]
    if sets and not wanted:
        raise ConfigError(f"in this config the stage '{stage}' works on {', '.join(sets)}, not on set={set_name}")
    if anew:
        redo(config, stage, set_name)
    if wanted:
        _run_steps(config, with_needs(config, wanted), time.monotonic(), wanted if anew else [])
    else:
        run_stage(config, stage, set_name)


def _run_steps(config: Config, flow: list[Step], started: float, anew: list[Step] | None = None) -> None:
    for number, step in enumerate(flow, 1):
        say(f"[{number}/{len(flow)}, {clock(time.monotonic() - started)}] {step.stage} {step.set}".rstrip())
        run_stage(config, step.stage, step.set or config.set, anew=step in (anew or []))


def run_stage(config: Config, stage: str, set_name: SetName | str, anew: bool = False) -> None:
    """One stage on one set, the resolved config saved first; `anew` takes nothing over from the base run."""
    url = f"{config.run_dir}/config.yaml"
    log_facts.update(run=config.run_dir, stage=stage, set=set_name)
    resolved = dump_config(config).encode()
    if not file_exists(url):
        write_bytes(url, resolved)
    if config.base_run and not anew:
        take_over(config, stage, set_name)
    stage_module(stage).run(config.model_copy(update={"set": set_name}))
    write_bytes(url, resolved)  # only now: a stage that refuses a config has not used it


def take_over(config: Config, stage: str, set_name: str) -> None:
    """Let a stage find its tables done where the base run has them; it lets go of those that this config would not
    make."""
    assert config.base_run is not None
    for step in steps(config):
        if step.stage == stage and step.set in ("", set_name):
            for name in step.tables:
                own, base = (Table(run_dir, step.set, name) for run_dir in (config.run_dir, config.base_run))
                manifest = base.manifest()
                if (
                    manifest is not None
                    and _may_take(config, name)
                    and (own.is_new() or _was_moved(own, base, manifest))
                ):
                    own.link(base.url)


def _was_moved(own: Table, base: Table, manifest: dict[str, Any]) -> bool:
    """Whether a table was taken over from where this base run lay before it was moved, or from what it is a copy of."""
    there = own.linked_to()
    return there not in (None, base.url) and (own.manifest() or {}).get("version") in (None, manifest["version"])


def _may_take(config: Config, name: str) -> bool:
    """Not a report, which nobody checks; nor what was measured of a model that this run has not taken over."""
    trained = name.removeprefix("measurements_").removeprefix("scores_")
    if trained in ("stage1", "stage2", "control") and trained != name:
        return Table(config.run_dir, "", trained).linked_to() is not None
    return name != "report"


def run_sweeps(config: Config, only: str | None = None, redo: bool = False) -> None:
    """The config's sweeps, then the report with their laws and plots.

    Raises:
        ConfigError: there is no such sweep, or some trainings failed.
    """
    from salad_ray.report.page import write_page
    from salad_ray.report.scaling import sweep_grids
    from salad_ray.scaling.sweep import Flow, run_sweep

    if only is not None and only not in config.sweeps:
        raise ConfigError(f"there is no sweep '{only}' in the config; it has {', '.join(config.sweeps) or 'none'}")
    if not config.sweeps:
        raise ConfigError("the config has no sweeps; name one: sweeps: {alpha: {grid: {distill.alpha: [0, 1]}}}")
    chosen = [name for name in config.sweeps if only in (None, name)]
    if redo:
        for name in chosen:
            delete_folder(f"{config.run_dir}/sweeps/{name}")  # what it took over are references
    results = [run_sweep(config, name, Flow(run_stage)) for name in chosen]
    page = f"{config.run_dir}/report/page.html"
    write_page([config.run_dir], page)
    for result in results:
        show(*sweep_grids(result))
    say(f"report: {page}#scaling")
    failed = [row for result in results for row in result["rows"] if row["error"]]
    if failed:
        raise ConfigError(
            f"{len(failed)} trainings failed, first {failed[0]['trial']}: {failed[0]['error']}; the same command tries "
            "them again"
        )


SILENT_SECS = 300
"""After so long without a note of progress, `salad status` says that there was none."""
CALIBRATION: dict[str, Any] = {
    "ray.max_actors": None,
    "world.num_questions": 64,
    "ingest.corpora": [],
    "ingest.web": [],
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
"""Shards for each actor; fewer do not tell its start from its work."""


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
        run = config_of(measured)
        rates = measured_rates(rates, run, steps(run), config)
    plan = make_plan(config, steps(config), rates)
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
    gpus, changes = _gpus(), CALIBRATION | {"base_run": None}
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
    small = replaced(config, changes | {"ingest.num_shards": num_shards}, "calibration")
    decisive = small.model_dump(mode="json", exclude={"run_dir", "set", "strict"})
    name = fingerprint(decisive | {"gpus": [gpu.name for gpu in gpus]})[:8]
    return small.model_copy(update={"run_dir": f"{config.run_dir}/plan/calibration-{name}"})


def _gpus() -> list[Any]:
    """Of this machine: `name` and `total_memory` (bytes) of each."""
    import torch

    return [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]


def redo(config: Config, stage: str, set_name: str) -> None:
    """Delete what this stage wrote for this set; raises `ConfigError` if it has no part in this config."""
    chosen = steps_of(config, stage, set_name)
    if not chosen:
        sets = ", ".join(step.set for step in steps(config) if step.stage == stage) or "no set"
        raise ConfigError(f"--redo: in this config the stage '{stage}' works on {sets}, not on set={set_name}")
    for step in chosen:
        for table in step.tables:
            Table(config.run_dir, step.set, table).delete()
            Table(config.run_dir, step.set, "rejects").delete_shards(f"{table}-")


def export_cuts(run_dir: str, set_name: str, target: str) -> int:
    """Write a set's utterances as a Lhotse manifest, with word times where there are any; returns their number.

    Raises:
        ConfigError: the set has no finished utterances, or the target is not called `….jsonl.gz`.
    """
    from salad_ray.speech.lhotse_cuts import write_cuts

    if not target.endswith(".jsonl.gz"):
        raise ConfigError(f"{target}: a cut manifest ends in .jsonl.gz")
    tables = [Table(run_dir, set_name, name) for name in ("aligned", "utterances")]
    table = next((table for table in tables if table.manifest() is not None), None)
    if table is None:
        raise ConfigError(f"{tables[-1].url} is not finished; run `salad ingest CONFIG set={set_name}` first")
    rows = (row for shard in table.shards() for row in table.iterate(Utterance, shard))
    return write_cuts(rows, target)


def config_of(run_dir: str) -> Config:
    """The config of a run, which may have been moved since."""
    place = run_dir.rstrip("/")
    return load_config(f"{place}/config.yaml").model_copy(update={"run_dir": place})


def status(config: Config) -> list[dict[str, str]]:
    """One row for each table of the run: stage, set, state, rows, rejects, time, place."""
    return [
        {"stage": step.stage, "set": step.set} | _table_status(Table(config.run_dir, step.set, name))
        for step in steps(config)
        for name in step.tables
    ]


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
