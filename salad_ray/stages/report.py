"""`report`: the gap table on the terminal and `report/metrics.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from salad_ray.config import Config, SetName
from salad_ray.console import say, show
from salad_ray.evaluation.analysis import robustness_grid
from salad_ray.evaluation.statistics import accuracy_table as accuracy_rows
from salad_ray.evaluation.statistics import compare, gap_table, robustness_table
from salad_ray.report.metrics import (
    NAMES,
    SYSTEMS,
    accuracy_table,
    gap_tables,
    selection_table,
    system_metrics,
    unheard_auc,
)
from salad_ray.report.page import write_page
from salad_ray.stages.common import TRAINED_ON, finished
from salad_ray.stages.shards import StageError
from salad_ray.tables import Measurement, Score, Table, each_shard, write_json

ANSWERING = ("base", "stage1", "stage2", "control", "cascade")
"""The systems that `evaluate` asks."""


def run(config: Config) -> None:
    """Write `report/metrics.json` from the measurements; always anew, since it costs nothing."""
    heard = heard_domains(Table(config.run_dir, "natural", "features"))
    main, *others = config.measured_sets
    metrics = measured(config, main, heard)
    show(*gap_tables(metrics))
    for name in others:  # recordings, beside web text that is spoken
        metrics["recorded"] = measured(config, name, heard)
        show(*gap_tables(metrics["recorded"], ", held-out recordings"))
    selection = Table(config.run_dir, "active", "selection").manifest()
    if selection is not None:
        metrics["selection"] = selection_metrics(config, selection, heard)
        show(selection_table(metrics["selection"]))
    scores = scored(config)
    if scores:
        metrics["accuracy"] = accuracy_rows(scores, heard)
        metrics["gaps"] = gap_table(scores)
        metrics["differences"] = differences(scores)
        show(accuracy_table(metrics["accuracy"]))
    if len(config.evaluate.conditions) > 1:
        metrics["robustness"] = robustness_table(scores)
        show(robustness_grid(metrics["robustness"]))
    url = f"{config.run_dir}/report/metrics.json"
    write_json(url, metrics)
    write_json(f"{config.run_dir}/report/manifest.json", {"stage": "report", "systems": list(metrics)})
    for line in conclusions(metrics):
        say(line)
    page = f"{config.run_dir}/report/page.html"
    write_page([config.run_dir], page)
    say(f"report: {page}, to look at and listen to; the numbers are in {url}")


def scored(config: Config) -> list[Score]:
    """What the systems answered; raises `StageError` where a system was trained anew since."""
    scores: list[Score] = []
    read = [Table(config.run_dir, "benchmark", name) for name in ("items", "features", "utterances")]
    current = {
        table.name: (table.manifest() or {}).get("version") for table in (*read, Table(config.run_dir, "", "teacher"))
    }
    for system in ANSWERING:
        table = Table(config.run_dir, "benchmark", f"scores_{system}")
        manifest, trained = table.manifest(), Table(config.run_dir, "", system).manifest()
        if manifest is None or (system == "cascade" and config.evaluate.cascade == "none"):
            continue
        if trained is not None and manifest["inputs"].get("model") != trained["version"]:
            raise StageError(f"report: {table.url} is of another {system} model; run `salad evaluate CONFIG --redo`")
        for name, version in current.items():
            if manifest["inputs"].get(name, version) != version:
                raise StageError(f"report: {table.url} is of other {name}; run `salad evaluate CONFIG --redo`")
        if manifest["config"]["evaluate.num_shots"] != config.evaluate.num_shots:
            raise StageError(f"report: {table.url} has another evaluate.num_shots; run `salad evaluate CONFIG --redo`")
        scores += rows_of(Score, table)
    return scores


def differences(scores: list[Score]) -> list[dict[str, Any]]:
    """Stage II beside the other systems that listen, on the same items, clean: paired intervals and p-values."""
    heard = [row for row in scores if row.modality == "speech" and row.condition == "clean"]
    by_system = {name: [row for row in heard if row.system == name] for name in ANSWERING}
    others = [name for name in ("stage1", "control", "cascade") if by_system[name] and by_system["stage2"]]
    return [
        {"system_a": "stage2", "system_b": name} | row
        for name in others
        for row in compare(by_system["stage2"], by_system[name])
    ]


def measured(config: Config, name: SetName, heard: set[str]) -> dict[str, Any]:
    """The metrics of every system that was measured on a set."""
    metrics: dict[str, Any] = {}
    for system in SYSTEMS:
        table = Table(config.run_dir, name, f"measurements_{system}")
        trained = Table(config.run_dir, "", system).manifest()
        if system != "untrained" and (table.manifest() is None or trained is None):
            continue
        manifest = finished(table, "measure")
        if trained is not None and manifest["inputs"]["model"] != trained["version"]:
            raise StageError(
                f"report: {table.url} is of another {system} model; run `salad measure CONFIG set={name} --redo`"
            )
        metrics[system] = system_metrics(rows_of(Measurement, table), heard) | training_facts(config, system)
    return metrics


def rows_of(row_type: type, table: Table) -> list[Any]:
    """The rows of all shards of a table."""
    return [row for rows in each_shard(partial(table.read_rows, row_type), table.shards()) for row in rows]


def training_facts(config: Config, system: str) -> dict[str, Any]:
    """Positions and seconds of training; none for the untrained model."""
    manifest = Table(config.run_dir, "", system).manifest() or {}
    return {name: manifest.get(name, 0) for name in ("num_positions", "train_seconds")}


def heard_domains(features: Table) -> set[str]:
    """Domains of the natural training speech."""
    totals = finished(features, "encode")["totals"]
    return {name.removeprefix(TRAINED_ON) for name in totals if name.startswith(TRAINED_ON)}


def selection_metrics(config: Config, manifest: dict[str, Any], heard: set[str]) -> dict[str, Any]:
    """What was selected and why; and, where passages have domains, whether M(c) finds those that were never heard."""
    names = ("gamma", "budget_hours", "hours", "effective_sample_size", "num_web_passages", "reliability", "by_cluster")
    selection = {name: manifest[name] for name in names}
    probe = Table(config.run_dir, "probe", "passages")
    domains = [Counter[str]() for _ in selection["by_cluster"]]
    for passages in each_shard(partial(probe.read, columns=["cluster_id", "domain"]), probe.shards()):
        for row in passages.to_pylist():
            domains[row["cluster_id"]][row["domain"]] += 1
    rows = [row | {"domains": dict(counts)} for row, counts in zip(selection["by_cluster"], domains, strict=True)]
    return selection | {"by_cluster": rows, "unheard_auc": unheard_auc(rows, domains, heard)}


def conclusions(metrics: dict[str, Any]) -> list[str]:
    """One sentence for what Stage II set out to do."""
    lines = []
    auc = metrics.get("selection", {}).get("unheard_auc")
    if auc is not None:
        lines.append(f"ranking clusters by M(c) finds the domains that were never heard: AUC {auc:.3f}")
    if "stage2" in metrics and "control" in metrics:
        ours, control = (metrics[name]["misalignment"] for name in ("stage2", "control"))
        lines.append(
            f"mean M after Stage II: {ours:.3f}; after as much more natural speech: {control:.3f} "
            f"({ours / control - 1:+.0%})"
        )
    gaps = metrics.get("gaps", [])
    chosen = [row for row in gaps if row["benchmark"] == _widest(gaps) and row["metric"] == "acc"]
    lines += [
        f"gap between reading ({NAMES['base']}) and hearing ({NAMES[row['system']]}), {row['benchmark']}: "
        f"{100 * row['gap']:.1f} points ({100 * row['ci_low']:.1f} to {100 * row['ci_high']:.1f})"
        for row in chosen
        if row["modality"] == "speech" and row["gap"] is not None
    ]
    lines += [
        f"Stage II − {NAMES[row['system_b']]}, hearing, {row['benchmark']}: {100 * row['difference']:+.1f} points "
        f"({100 * row['ci_low']:.1f} to {100 * row['ci_high']:.1f}), p = {row['p_value']:.2g}"
        for row in metrics.get("differences", [])
        if row["metric"] == "acc" and row["benchmark"] == _widest(gaps) and row["difference"] is not None
    ]
    return lines


def _widest(gaps: Sequence[dict[str, Any]]) -> str:
    """The average over the benchmarks; where there is one, that one."""
    names = [row["benchmark"] for row in gaps]
    return "average" if "average" in names else str(names[0])
