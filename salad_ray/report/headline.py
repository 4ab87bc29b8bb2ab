"""What a reader should know after ten seconds, on the page and at the end of a run on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from salad_ray.flow import TRAINED
from salad_ray.names import ACTIVE, CONTROL, ENCODE, FEATURES, NATURAL, SELECT, STAGE1, STAGE2, TEACHER, UNTRAINED
from salad_ray.report import words
from salad_ray.report.accuracy import (
    accuracy_tables,
    gap_sentences,
    margin_sentences,
    margin_tables,
    robustness_tables,
)
from salad_ray.report.blocks import Block, Figure, Paragraph, Section, Table
from salad_ray.report.clusters import selection_tables
from salad_ray.report.facts import RunFacts
from salad_ray.report.measured import RECORDED, difference_tables, measured_rows, measured_tables
from salad_ray.report.plots import dot_plot, marks_of
from salad_ray.report.rows import Row, by_run
from salad_ray.tables import table_label


def headline(runs: Sequence[RunFacts]) -> Section:
    """A few sentences, one figure, one table of facts."""
    blocks: list[Block] = []
    for run in runs:
        lines = [Paragraph(line) for line in sentences(run.metrics)]
        blocks += [Paragraph(run.title, "h3"), *lines] if lines and run.title else lines
    nothing = "Nothing measured yet: run `salad measure CONFIG` and then `salad report CONFIG`."
    facts = {run.title or run.run_dir.rsplit("/", 1)[-1]: _facts(run) for run in runs}
    notes = ["≠ differs from the first run."] if len(runs) > 1 else []
    table = by_run("The runs" if len(runs) > 1 else "The run", facts, "", _facts(runs[0]), notes)
    blocks = [*(blocks or [Paragraph(nothing, "empty")]), *_figure(runs), *table]
    return Section("headline", "", "In short", blocks)


def printed_tables(metrics: dict[str, Any]) -> list[Table]:
    """What a run prints when it ends; each fits a terminal of 80 columns."""
    numbers, recorded = {"": metrics}, {"": metrics.get("recorded") or {}}
    return [
        *measured_tables(numbers),
        *difference_tables(numbers),
        *measured_tables(recorded, RECORDED),
        *selection_tables(metrics.get("selection") or {}),
        *accuracy_tables(numbers, in_brief=True),
        *margin_tables(numbers, in_brief=True),
        *robustness_tables(numbers),
    ]


def sentences(metrics: dict[str, Any]) -> list[str]:
    """What matters of what was measured."""
    rows = {(row["system"], row["heard"]): row for row in _overall(metrics)}
    aucs = _aucs(metrics.get("selection") or {})
    whole, forgotten = (_after(rows, TRAINED, quantity) for quantity in ("misalignment_whole", "forgetting"))
    means = _after(rows, (UNTRAINED, STAGE1, STAGE2), "misalignment")
    control = rows.get((CONTROL, None), {}).get("misalignment")
    instead = f"; as much more natural speech instead of Stage II leaves it at {words.number(control)}" * bool(control)
    sides = [
        f"after {words.system(system)} {words.number(rows[system, True].get('misalignment'))} and "
        + words.number(rows[system, False].get("misalignment"))
        for system in (STAGE1, STAGE2)
        if {(system, True), (system, False)} <= rows.keys()
    ]
    paired = [
        f"{words.ranged(row, 'difference', words.number)} {row['protocol']}"
        for row in metrics.get("measured_differences") or []
        if (row["system_b"], row["quantity"], row["heard"]) == (CONTROL, "misalignment", None)
    ]
    told = {
        f"Misalignment M, how far the model's next word after speech is from that after text, is {means}{instead} "
        "(nats per position).": means,
        f"Where all but the last words are spoken it is {whole}.": whole,
        f"On the same passages M after Stage II less that of the control is {words.listing(paired)}.": paired,
        "M in the domains that the natural speech spoke of, and in those that it never spoke of: "
        f"{', '.join(sides)}.": sides,
        f"Forgetting F, how far it has moved from the text LLM on text, is {forgotten}.": forgotten,
        "Ranking the clusters of web text by M(c) finds those that the natural speech never spoke of: AUC "
        f"{aucs} (1 is perfect, 0.5 is chance).": aucs,
    }
    known = [line for line, found in told.items() if found]
    return [*margin_sentences(metrics), *known, *gap_sentences(metrics)]


def _overall(metrics: dict[str, Any], run: str = "") -> list[Row]:
    """What was measured over all passages, and where domains differ in this, over heard and unheard ones."""
    rows = [row for row in measured_rows({run: metrics}) if row["part"] in ("all", "side")]
    sides = {row["heard"] for row in rows}
    return sorted(
        (row for row in rows if row["part"] == "all" or len(sides) == 3),
        key=lambda row: (row["part"], not row["heard"]),
    )


def _aucs(selection: dict[str, Any]) -> str:
    """How well M(c) finds unheard domains, by each protocol, that of the selection first; "" where it is not known."""
    ranked = selection.get("by_protocol") or {"": selection}
    known = {name: row["unheard_auc"] for name, row in ranked.items() if words.finite(row.get("unheard_auc"))}
    used = selection.get("protocol")
    return ", ".join(f"{known[name]:.3f} {name}".strip() for name in sorted(known, key=lambda name: name != used))


def _after(rows: dict[tuple[str, Any], Row], systems: Sequence[str], quantity: str) -> str:
    """The means of systems, as a part of a sentence."""
    known = {system: rows[system, None].get(quantity) for system in systems if (system, None) in rows}
    when = {system: "before training" if system == UNTRAINED else f"after {words.who(system)}" for system in known}
    return words.listing(
        [f"{words.number(value)} {when[name]}" for name, value in known.items() if words.finite(value)]
    )


def _figure(runs: Sequence[RunFacts]) -> list[Figure]:
    """Mean M before and after, for heard and unheard domains."""
    names = {None: "all domains", True: "heard domains", False: "unheard domains"}
    rows = [row for run in runs for row in _overall(run.metrics, run.title)]
    marks = marks_of(rows, "misalignment", lambda row: names[row["heard"]])
    caption = "Mean misalignment with 95 % intervals; left is better."
    return dot_plot("headline", caption, marks, "misalignment M, nats per position", may_be_log=True)


def _facts(run: RunFacts) -> dict[str, str]:
    """What a run was made of."""
    totals = {name: _features(run, name).get("totals", {}) for name in (NATURAL, ACTIVE)}
    heard = {name: words.hours(own.get("training_hours")) for name, own in totals.items()}
    stage1, stage2, select = (run.config.get(name) or {} for name in ("distill", STAGE2, SELECT))
    return {
        "teacher LLM": _teacher(run),
        "speech encoder": _encoder(run),
        "natural speech": heard[NATURAL],
        "active (synthetic) speech": heard[ACTIVE],
        "α of Stage I, Stage II": ", ".join(words.general(section.get("alpha")) for section in (stage1, stage2)),
        "γ of the selection": words.general(select.get("gamma")),
        "AUC of M(c) for unheard domains": _aucs(run.metrics.get("selection") or {}) or "–",
    }


def _features(run: RunFacts, set_name: str) -> Row:
    return run.tables.get(table_label(set_name, FEATURES), {})


def _teacher(run: RunFacts) -> str:
    teacher = run.tables.get(TEACHER, {})
    name = str((run.config.get("model") or {}).get("teacher") or teacher.get("path") or "–")
    name = "the embedded world's tiny LM" if name == "world" else name
    size = teacher.get("num_parameters")
    return f"{name} ({words.number(size)} parameters)" if size else name


def _encoder(run: RunFacts) -> str:
    encoder = _features(run, NATURAL).get("encoder") or {}
    if not encoder:
        return words.general((run.config.get(ENCODE) or {}).get("encoder"))
    where = f", {encoder['path']}" if encoder.get("path") else ""
    stride = ((run.config.get("model") or {}).get("adapter") or {}).get("stride") or 1
    rate = encoder.get("frame_rate", 0)
    grouped = f", {stride} side by side: {rate / stride:g} positions/s" if stride > 1 else ""
    return f"{encoder.get('name')}{where} ({rate:g} frames/s, {encoder.get('dim')} wide{grouped})"
