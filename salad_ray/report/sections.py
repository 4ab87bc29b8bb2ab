"""How the runs were made: training curves, what was left out, cost and lineage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import yaml

from salad_ray.report import words
from salad_ray.report.blocks import Block, Figure, Fold, Paragraph, Section, Table
from salad_ray.report.facts import MAX_REJECTS, RunFacts
from salad_ray.report.plots import line_plot, marks_of
from salad_ray.report.rows import Columns, by_run, listed, of, ordered

_CURVES = {
    "kl": "KL to the teacher, nats per label.",
    "word_end_kl": "KL to the teacher at the ends of spoken words, nats.",
    "text_kl": "KL to the teacher on text alone, nats per label.",
    "loss": "Loss, nats per label.",
    "nll": "NLL of the text, nats per label.",
    "learning_rate": "Learning rate of the LLM.",
    "muon_learning_rate": "Learning rate of the matrices in the LLM's layers (Muon).",
    "positions_per_sec": "Positions per second, all workers together.",
}
_RATES = ("learning_rate", "muon_learning_rate", "positions_per_sec")


def training(runs: Sequence[RunFacts]) -> Section:
    """One figure for each quantity: colours are stages, dashes are runs."""
    curves = [curve | {"run": run.title} for run in runs for curve in run.curves]
    logs = [row | {"system": curve["system"], "run": curve["run"]} for curve in curves for row in curve["log"]]
    figures: list[Figure] = []
    for key, title in _CURVES.items():
        if key != "loss" or any(row.get("loss") != row.get("kl") for row in logs):  # alike where α = 1
            marks = marks_of((row for row in logs if words.finite(row.get("step"))), key, lambda row: row["step"])
            figures += line_plot(f"curve-{key}", title, marks, "step", may_be_log=key not in _RATES)
    columns: Columns = {
        "run": of("run"),
        "training": of("system", words.system),
        "state": of("state"),
        "step": of("step", words.number),
        "positions": of("num_positions", words.number),
        "of text alone": of("num_text_positions", words.number),
        "time": of("train_seconds", words.secs),
        "last KL": of("kl", words.number),
        "last NLL": of("nll", words.number),
        "positions/s": of("positions_per_sec", partial(words.number, digits=0)),
        "skipped": of("skipped_steps", words.number),
        "memory, GiB": of("memory_gib", partial(words.number, digits=1)),
    }
    notes = [
        "Control: Stage I continued without active speech for as many steps as Stage II.",
        "Positions are D of the scaling law and count samples of text alone, too.",
    ]
    lasts = [{name: value for row in (*curve["log"][-1:], curve) for name, value in row.items()} for curve in curves]
    nothing = "Nothing trained yet: run `salad stage1 CONFIG`."
    table = listed("Training", lasts, columns, 3, notes)
    return Section("training", "Training", "Training curves", [*figures, *table], nothing)


def rejects(runs: Sequence[RunFacts]) -> Section:
    columns: Columns = {
        "set, stage": lambda row: f"{row['set']}, {row['stage']}",
        "reason": of("reason"),
        "rows": of("count", words.number),
        "for example": lambda row: f"{row['key']}: {row['example']}",
    }
    tables: list[Table] = []
    for run in runs:
        total = sum(row.get("num_rejected", 0) for row in run.tables.values())
        notes = [
            f"{run.num_rejects_read:,} rejects were read of {total:,} that the manifests count.",
            f"Only the first {MAX_REJECTS:,} are read." * (run.num_rejects_read >= MAX_REJECTS),
        ]
        tables += listed(_of("Rejects", run), run.rejects, columns, 2, notes)
    intro = "Reasons that differ only in numbers, names and paths are counted together."
    nothing = "Nothing was left out: no stage has rejected a row so far."
    return Section("rejects", "Rejects", "What was left out, and why", tables, nothing, [intro] if tables else [])


def _of(what: str, run: RunFacts) -> str:
    return f"{what} of {run.title}" if run.title else what


def lineage(runs: Sequence[RunFacts]) -> Section:
    """What each table cost and where it came from, the settings, and for several runs those that differ."""
    blocks: list[Block] = [*(_differing(runs) if len(runs) > 1 else [])]
    blocks += [table for run in runs for table in _costs(run)]
    blocks += [Fold(table.caption, "", [table]) for run in runs for table in _origins(run)]
    blocks += (
        [] if any(run.tables for run in runs) else [Paragraph("Nothing made yet: run `salad run CONFIG`.", "empty")]
    )
    for run in runs:
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
        blocks.append(Fold(_of("Settings", run), run.run_dir, [Paragraph(text, "pre")]))
    return Section("lineage", "Cost, lineage", "Cost and lineage", blocks)


def _costs(run: RunFacts) -> list[Table]:
    rows = [
        row
        | {"label": label, "rejected": row.get("num_rejected", 0)}
        | {"rows": row.get("num_rows", row.get("num_positions")), "secs": row.get("train_seconds", row.get("seconds"))}
        for label, row in run.tables.items()
    ]
    sums = {key: sum(row[key] or 0 for row in rows) for key in ("rejected", "secs", "num_bytes")}
    columns: Columns = {
        "table": of("label"),
        "stage": lambda row: row.get("stage", ""),
        "state": lambda row: row.get("state", ""),
        "rows": lambda row: words.number(row["rows"]) if "rows" in row else "",
        "rejected": of("rejected", words.number),
        "time": of("secs", words.secs),
        "size": of("num_bytes", words.size),
    }
    notes = [
        "Time is m:ss or h:mm:ss of the stage itself. Rows of training are positions. Size is that of all files, with "
        "rejects, models and checkpoints."
    ]
    together = [sums | {"label": "together"}] if rows else []
    return listed(_of("Cost", run), [*rows, *together], columns, 3, notes)


def _origins(run: RunFacts) -> list[Table]:
    written = "{salad_ray}, schema {schema_version}, {written_at}"
    unknown = dict.fromkeys(("version", "salad_ray", "schema_version", "written_at"), "–")
    columns: Columns = {
        "table": of("label"),
        "version (fingerprint, draw)": of("version"),
        "made from": lambda row: ", ".join(map(" ".join, (row.get("inputs") or {}).items())) or "–",
        "salad_ray, schema, written": lambda row: written.format(**row),
    }
    rows = [unknown | row | {"label": label} for label, row in run.tables.items()]
    return listed(_of("Lineage", run), rows, columns, 4)


def _differing(runs: Sequence[RunFacts]) -> list[Table]:
    settings = {run.title: _flat(run.config) for run in runs}
    keys = ordered(key for own in settings.values() for key in own)
    differing = [key for key in keys if len({own.get(key) for own in settings.values()}) > 1]
    return by_run("Settings that differ", settings, "setting", differing)


def _flat(config: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys and JSON values."""
    if isinstance(config, dict) and config:
        parts = (_flat(value, f"{prefix}{key}.") for key, value in config.items())
        return {key: value for part in parts for key, value in part.items()}
    return {prefix.rstrip("."): json.dumps(config, ensure_ascii=False, default=str)}
