"""`report`: `report/metrics.json`, the tables on the terminal and the page."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

from salad_ray.config import SetName
from salad_ray.console import say, show
from salad_ray.evaluation.statistics import accuracy_table, compare, gap_table, hearing_margins, robustness_table
from salad_ray.flow import Step
from salad_ray.names import (
    ACTIVE,
    BASE,
    BENCHMARK,
    FEATURES,
    NATURAL,
    PASSAGES,
    PROBE,
    SELECTION,
    STAGE1,
    STAGE2,
    measurements_of,
    scores_of,
)
from salad_ray.report.accuracy import HEARING
from salad_ray.report.headline import printed_tables, sentences
from salad_ray.report.metrics import MEASURED, rankings, system_differences, system_metrics, unheard_auc
from salad_ray.report.page import write_page
from salad_ray.runs import Run, lead_to
from salad_ray.stages.common import finished, probe_losses
from salad_ray.stages.shards import StageError
from salad_ray.tables import Measurement, Score, Table, each_shard, table_label, write_json


def make(run: Run, step: Step) -> None:
    """Write the run's `report/metrics.json` and `report/page.html`; always anew, since it costs nothing."""
    config, url = run.config, run.places.report_url
    heard = set(finished(run, table_label(NATURAL, FEATURES))["totals"]["training_hours_by_domain"])
    main, *recorded = config.measured_sets
    metrics = measured(run, main, heard)
    for name in recorded:  # beside web text that is spoken
        metrics["recorded"] = measured(run, name, heard)
    selection = _current(run, run.table(ACTIVE, SELECTION))
    if selection is not None:
        metrics["selection"] = selection_metrics(run, selection, heard)
    metrics |= answered(run, heard)
    write_json(f"{url}/metrics.json", metrics)
    show(*printed_tables(metrics))
    for line in sentences(metrics):
        say(line)
    write_page([run.places], f"{url}/page.html")
    lead_to(run.places)
    url = url if "/" in run.places.name else f"{config.run_dir}/report"
    say(f"report: {url}/page.html, to look at and listen to; the numbers are in {url}/metrics.json")


def answered(run: Run, heard: set[str]) -> dict[str, Any]:
    """What the systems answered: accuracies, hearing margins, gaps and other differences."""
    tables = {system: run.table(BENCHMARK, scores_of(system)) for system in (BASE, *HEARING)}
    scores = {name: rows_of(Score, table) for name, table in tables.items() if _current(run, table) is not None}
    rows = [row for own in scores.values() for row in own]
    clean = {
        name: [row for row in own if (row.modality, row.condition) == ("speech", "clean")]
        for name, own in scores.items()
    }
    metrics: dict[str, Any] = {}
    if rows:
        metrics |= {
            "accuracy": accuracy_table(rows, heard),
            "hearing_margins": hearing_margins(rows, heard),
            "hearing_margins_norm": hearing_margins(rows, heard, "acc_norm"),
            "gaps": gap_table(rows),
            "differences": [
                {"system_a": STAGE2, "system_b": name} | row
                for name in HEARING
                if name != STAGE2 and clean.get(name) and clean.get(STAGE2)
                for row in compare(clean[STAGE2], clean[name])
            ],
        }
    if len(run.config.evaluate.conditions) > 1:
        metrics["robustness"] = robustness_table(rows)
    return metrics


def _current(run: Run, table: Table) -> dict[str, Any] | None:
    """The manifest of a table, None where it is not finished; raises `StageError` if an input was made anew since."""
    manifest = table.manifest()
    for label, version in (manifest or {"inputs": {}})["inputs"].items():
        inner = label if "/" in label or run.labelled(label).manifest() else f"{table.set}/{label}"
        now = run.labelled(inner).manifest()
        if now is None or now["version"] != version:
            raise StageError(f"report: {table.url} was made from another {label}; run `salad run CONFIG`")
    return manifest


def measured(run: Run, name: SetName, heard: set[str]) -> dict[str, Any]:
    """The metrics of every system that was measured on a set, and how far they differ on the same passages."""
    tables = {system: run.table(name, measurements_of(system)) for system in MEASURED}
    rows = {system: rows_of(Measurement, table) for system, table in tables.items() if _current(run, table) is not None}
    if not rows:
        finished(run, table_label(name, measurements_of(STAGE1)))
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


def selection_metrics(run: Run, manifest: dict[str, Any], heard: set[str]) -> dict[str, Any]:
    """What was selected and why; and, where passages have domains, whether M(c) finds those that were never heard, by
    the protocol that was used and by each."""
    names = ("protocol", "gamma", "budget_hours", "hours", "effective_sample_size", "num_web_passages", "reliability")
    selection = {name: manifest[name] for name in (*names, "by_cluster")}
    probe = run.table(PROBE, PASSAGES)
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
