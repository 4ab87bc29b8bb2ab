"""`report`: the gap table on the terminal and `report/metrics.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

from salad_ray.config import SetName
from salad_ray.console import say, show
from salad_ray.evaluation.analysis import robustness_grid
from salad_ray.evaluation.statistics import accuracy_table as accuracy_rows
from salad_ray.evaluation.statistics import compare, gap_table, hearing_margins, robustness_table
from salad_ray.flow import Step
from salad_ray.report.metrics import (
    NAMES,
    SYSTEMS,
    accuracy_table,
    difference_table,
    gap_tables,
    hearing_sentences,
    hearing_table,
    protocol_end,
    rankings,
    selection_table,
    system_differences,
    system_metrics,
    unheard_auc,
    with_interval,
)
from salad_ray.report.page import write_page
from salad_ray.runs import Run, lead_to
from salad_ray.stages.common import TRAINED_ON, finished, probe_losses
from salad_ray.stages.shards import StageError
from salad_ray.tables import Measurement, Score, Table, each_shard, table_label, write_json

ANSWERING = ("base", "stage1", "stage2", "control", "cascade")
"""The systems that `evaluate` asks."""


def make(run: Run, step: Step) -> None:
    """Write the run's `report/metrics.json` and `report/page.html`; always anew, since it costs nothing."""
    config = run.config
    heard = heard_domains(finished(run, "natural/features"))
    main, *others = config.measured_sets
    metrics = measured(run, main, heard)
    show(*gap_tables(metrics))
    if metrics["measured_differences"]:
        show(difference_table(metrics["measured_differences"]))
    for name in others:  # recordings, beside web text that is spoken
        metrics["recorded"] = measured(run, name, heard)
        show(*gap_tables(metrics["recorded"], ", held-out recordings"))
    selection = _current(run, run.table("active", "selection"))
    if selection is not None:
        metrics["selection"] = selection_metrics(run, selection, heard)
        show(selection_table(metrics["selection"]))
    scores = scored(run)
    if scores:
        metrics["accuracy"] = accuracy_rows(scores, heard)
        metrics["hearing_margins"] = hearing_margins(scores, heard)
        metrics["hearing_margins_norm"] = hearing_margins(scores, heard, "acc_norm")
        metrics["gaps"] = gap_table(scores)
        metrics["differences"] = differences(scores)
        show(accuracy_table(metrics["accuracy"]))
        if metrics["hearing_margins"]:
            show(hearing_table(metrics["hearing_margins"]))
    if len(config.evaluate.conditions) > 1:
        metrics["robustness"] = robustness_table(scores)
        show(robustness_grid(metrics["robustness"]))
    write_json(f"{run.places.report_url}/metrics.json", metrics)
    for line in conclusions(metrics):
        say(line)
    write_page([run.places], f"{run.places.report_url}/page.html")
    lead_to(run.places)
    url = run.places.report_url if "/" in run.places.name else f"{config.run_dir}/report"
    say(f"report: {url}/page.html, to look at and listen to; the numbers are in {url}/metrics.json")


def _current(run: Run, table: Table) -> dict[str, Any] | None:
    """The manifest of a table, None where it is not finished; raises `StageError` if an input was made anew since."""
    manifest = table.manifest()
    for label, version in (manifest or {"inputs": {}})["inputs"].items():
        inner = label if "/" in label or run.labelled(label).manifest() else f"{table.set}/{label}"
        now = run.labelled(inner).manifest()
        if now is None or now["version"] != version:
            raise StageError(f"report: {table.url} was made from another {label}; run `salad run CONFIG`")
    return manifest


def scored(run: Run) -> list[Score]:
    """What the systems answered."""
    tables = [run.table("benchmark", f"scores_{system}") for system in ANSWERING]
    return [row for table in tables if _current(run, table) is not None for row in rows_of(Score, table)]


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


def measured(run: Run, name: SetName, heard: set[str]) -> dict[str, Any]:
    """The metrics of every system that was measured on a set, and how far they differ on the same passages."""
    tables = {system: run.table(name, f"measurements_{system}") for system in SYSTEMS}
    rows = {system: rows_of(Measurement, table) for system, table in tables.items() if _current(run, table) is not None}
    if not rows:
        finished(run, table_label(name, "measurements_stage1"))
    metrics: dict[str, Any] = {
        system: system_metrics(own, heard) | training_facts(run, system) for system, own in rows.items()
    }
    return metrics | {"measured_differences": system_differences(rows, heard)}


def rows_of(row_type: type, table: Table) -> list[Any]:
    """The rows of all shards of a table."""
    return [row for rows in each_shard(partial(table.read_rows, row_type), table.shards()) for row in rows]


def training_facts(run: Run, system: str) -> dict[str, Any]:
    """Positions (D, which counts text alone, too), those of text alone, and seconds of training; none for the untrained
    model."""
    manifest = run.table("", system).manifest() or {}
    return {name: manifest.get(name, 0) for name in ("num_positions", "num_text_positions", "train_seconds")}


def heard_domains(features: dict[str, Any]) -> set[str]:
    """Domains of the natural training speech, from the manifest of its features."""
    totals = features["totals"]
    return {name.removeprefix(TRAINED_ON) for name in totals if name.startswith(TRAINED_ON)}


def selection_metrics(run: Run, manifest: dict[str, Any], heard: set[str]) -> dict[str, Any]:
    """What was selected and why; and, where passages have domains, whether M(c) finds those that were never heard, by
    the protocol that was used and by each."""
    names = (
        "protocol",
        "gamma",
        "budget_hours",
        "hours",
        "effective_sample_size",
        "num_web_passages",
        "reliability",
        "by_cluster",
    )
    selection = {name: manifest[name] for name in names}
    probe = run.table("probe", "passages")
    domains = [Counter[str]() for _ in selection["by_cluster"]]
    for passages in each_shard(partial(probe.read, columns=["cluster_id", "domain"]), probe.shards()):
        for row in passages.to_pylist():
            domains[row["cluster_id"]][row["domain"]] += 1
    rows = [row | {"domains": dict(counts)} for row, counts in zip(selection["by_cluster"], domains, strict=True)]
    return selection | {
        "by_cluster": rows,
        "unheard_auc": unheard_auc([row["distillation"] for row in rows], domains, heard),
        "by_protocol": rankings(probe_losses(run, len(rows)), domains, heard),
    }


def conclusions(metrics: dict[str, Any]) -> list[str]:
    """Who hears, and one sentence for what Stage II set out to do."""
    lines = hearing_sentences(metrics.get("hearing_margins", []))
    ranked = metrics.get("selection", {}).get("by_protocol", {})
    known = [f"{name} {row['unheard_auc']:.3f}" for name, row in ranked.items() if row["unheard_auc"] is not None]
    if known:
        lines.append(f"ranking clusters by M(c) finds the domains that were never heard: AUC {', '.join(known)}")
    for row in metrics.get("measured_differences", []):
        if (row["system_b"], row["quantity"], row["heard"]) == ("control", "misalignment", None):
            name = f"misalignment{protocol_end(row['protocol'])}"
            lines.append(
                f"mean M after Stage II, {row['protocol']}: {metrics['stage2'][name]:.3f}; after as much more natural "
                f"speech: {metrics['control'][name]:.3f}; difference {with_interval(row)}"
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
