"""The page's other sections: headline, F and M, training, clusters, rejects, cost and lineage."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from salad_ray.config import PROTOCOLS
from salad_ray.flow import TRAINED
from salad_ray.report.accuracy import main_gap, main_margin
from salad_ray.report.facts import MAX_REJECTS, MEASURED, RunFacts
from salad_ray.report.grids import (
    MAX_ROWS,
    SYSTEM_NAMES,
    TONES,
    Z95,
    Cell,
    Grid,
    Plot,
    Section,
    dot,
    finite,
    hours,
    in_any,
    interval,
    legend,
    number,
    ordered,
    percent,
    points,
    secs,
    size,
    systems_of,
    with_error,
)
from salad_ray.report.metrics import SIDES, deaf_sentences, with_interval
from salad_ray.report.plots import Line, Panel, Spot, cluster_map, dot_plot, is_wide, line_plot

ERRORS = "± standard error, with books, videos or documents as the units, stratified by domain."


def headline(pairs: Sequence[tuple[str, RunFacts]]) -> Section:
    """What a reader should know after ten seconds: a few sentences, one figure, one table of facts."""
    has_any = any(sentences(run.metrics) for _, run in pairs)
    empty = "" if has_any else "Nothing measured yet: run `salad measure CONFIG` and then `salad report CONFIG`."
    plots = [plot] if (plot := headline_plot(pairs)) else []
    return Section(empty, [], plots, [facts_grid(pairs)])


def sentences(metrics: dict[str, Any]) -> list[str]:
    """The three to six sentences that matter, of what was measured."""
    found = [
        *_margin_sentences(metrics),
        *_misalignment_sentence(metrics),
        *_heard_sentence(metrics),
        *_forgetting_sentence(metrics),
    ]
    aucs = _aucs(metrics.get("selection") or {})
    if aucs:
        found.append(
            "Ranking the clusters of web text by M(c) finds those that the natural speech never spoke of: AUC "
            f"{aucs} (1 is perfect, 0.5 is chance)."
        )
    return found + _gap_sentence(metrics)


def _aucs(selection: dict[str, Any]) -> str:
    """How well M(c) finds unheard domains, by each protocol, that of the selection first; "" where it is not known."""
    used, ranked = selection.get("protocol"), selection.get("by_protocol") or {}
    known = {name: row["unheard_auc"] for name, row in ranked.items() if finite(row.get("unheard_auc"))}
    parts = [f"{value:.3f} {name}" for name, value in sorted(known.items(), key=lambda item: item[0] != used)]
    auc = selection.get("unheard_auc")
    return ", ".join(parts) or (f"{auc:.3f}" if finite(auc) else "")


def _misalignment_sentence(metrics: dict[str, Any]) -> list[str]:
    shown = [(name, metrics[name]["misalignment"]) for name in systems_of(metrics) if "misalignment" in metrics[name]]
    trained = [f"{number(value)} after {SYSTEM_NAMES[name]}" for name, value in shown if name in ("stage1", "stage2")]
    if not trained:
        return []
    before = [f"{number(value)} before training" for name, value in shown if name == "untrained"]
    what = "Misalignment M, how far the model's next word after speech is from that after text"
    text = f"{what}, is {_and(before + trained)}"
    control = dict(shown).get("control")
    text += f"; as much more natural speech instead of Stage II leaves it at {number(control)}" if control else ""
    whole = [
        f"{number(metrics[name]['misalignment_whole'])} after {SYSTEM_NAMES[name]}"
        for name in systems_of(metrics, TRAINED)
        if finite(metrics[name].get("misalignment_whole"))
    ]
    told = f" Where all but the last words are spoken it is {_and(whole)}." if whole else ""
    return [text + " (nats per position)." + told]


def _heard_sentence(metrics: dict[str, Any]) -> list[str]:
    parts = []
    for name in systems_of(metrics, ("stage1", "stage2")):
        split = heard_and_unheard(metrics[name], "misalignment")
        if len(split) == 2:
            heard, unheard = split[True]["misalignment"], split[False]["misalignment"]
            parts.append(f"after {SYSTEM_NAMES[name]} {number(heard)} and {number(unheard)}")
    what = "M in the domains that the natural speech spoke of, and in those that it never spoke of"
    return [f"{what}: {', '.join(parts)}."] if parts else []


def heard_and_unheard(system: dict[str, Any], quantity: str) -> dict[bool, dict[str, Any]]:
    """The mean of a quantity over heard (True) and unheard (False) domains, weighted by their positions."""
    result: dict[bool, dict[str, Any]] = {}
    weight = "num_scored_whole" if quantity.endswith("_whole") else "num_scored"
    domains = list(system.get("by_domain", {}).values())
    for heard in (True, False):
        rows = [row for row in domains if row["heard"] is heard and finite(row.get(quantity))]
        total = sum(row[weight] for row in rows)
        if total:
            errors = [row[weight] * (row.get(f"{quantity}_standard_error") or 0.0) for row in rows]
            result[heard] = {
                quantity: sum(row[quantity] * row[weight] for row in rows) / total,
                f"{quantity}_standard_error": math.hypot(*errors) / total,
                "num_domains": len(rows),
            }
    return result


def _forgetting_sentence(metrics: dict[str, Any]) -> list[str]:
    shown = [
        f"{number(metrics[name]['forgetting'])} after {'the ' if name == 'control' else ''}{SYSTEM_NAMES[name]}"
        for name in systems_of(metrics, TRAINED)
        if finite(metrics[name].get("forgetting"))
    ]
    return [f"Forgetting F, how far it has moved from the text LLM on text, is {_and(shown)}."] if shown else []


def _margin_sentences(metrics: dict[str, Any]) -> list[str]:
    """Who hears, and who is deaf where."""
    parts = []
    for name in ("stage1", "stage2", "cascade"):
        row = main_margin(metrics, name)
        if row is not None:
            spread = interval(row.get("ci_low"), row.get("ci_high"))
            whose = "the cascade" if name == "cascade" else SYSTEM_NAMES[name]
            parts.append(f"{points(row['margin'])}{f' ({spread})' if spread else ''} for {whose}")
    what = "The hearing margin, how many points of accuracy hearing the questions is above hearing silence instead"
    found = [f"{what}, is {_and(parts)} (95 % intervals)."] if parts else []
    return found + [f"{line}." for line in deaf_sentences(metrics.get("hearing_margins") or [])]


def _gap_sentence(metrics: dict[str, Any]) -> list[str]:
    parts = []
    for name in ("stage1", "stage2", "cascade"):
        row = main_gap(metrics, name)
        if row is not None:
            spread = interval(row.get("ci_low"), row.get("ci_high"))
            whose = "the cascade" if name == "cascade" else SYSTEM_NAMES[name]
            parts.append(f"{points(row['gap'])}{f' ({spread})' if spread else ''} for {whose}")
    what = (
        "The text-speech gap, how many points of accuracy hearing the questions lies behind the text LLM reading them"
    )
    return [f"{what}, is {_and(parts)} (95 % intervals)."] if parts else []


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def headline_plot(pairs: Sequence[tuple[str, RunFacts]]) -> Plot | None:
    """Mean M before and after, for heard and unheard domains."""
    panels, values = [], []
    for name, run in pairs:
        rows, dots = ["all domains"], []
        for system in systems_of(run.metrics):
            facts = run.metrics[system]
            split = heard_and_unheard(facts, "misalignment")
            parts = [facts, *(split[heard] for heard in (True, False) if len(split) == 2)]
            rows = ["all domains", "heard domains", "unheard domains"][: len(parts)]
            dots += [made for place, part in enumerate(parts) if (made := dot(place, system, part, "misalignment"))]
        values += [made.value for made in dots]
        panels.append(Panel(name if len(pairs) > 1 else "", rows, dots))
    if not values:
        return None
    alt = "Mean misalignment M with 95 % intervals. " + " ".join(
        f"{name}: {SYSTEM_NAMES[system]} {number(run.metrics[system].get('misalignment'))}."
        for name, run in pairs
        for system in systems_of(run.metrics)
    )
    svg = dot_plot("headline", alt, panels, "misalignment M, nats per position", is_wide(values))
    return Plot(svg, "Mean misalignment with 95 % intervals; left is better.", legend(in_any(pairs)))


def facts_grid(pairs: Sequence[tuple[str, RunFacts]]) -> Grid:
    """What the runs were made of; a difference from the first run is marked."""
    facts = [run_facts(run) for _, run in pairs]
    rows: list[list[Cell | str]] = [[key, *_marked([fact[key] for fact in facts])] for key in facts[0]]
    notes = ["≠ differs from the first run."] if len(pairs) > 1 else []
    columns = ["", *(name for name, _ in pairs)]
    return Grid("The runs" if len(pairs) > 1 else "The run", columns, rows, notes=notes, num_text_columns=len(columns))


def _marked(values: Sequence[str]) -> list[Cell]:
    return [Cell(value, "≠" if value != values[0] else "", "differs from the first run") for value in values]


def run_facts(run: RunFacts) -> dict[str, str]:
    metrics, selection = run.metrics, run.metrics.get("selection") or {}
    natural = run.table("natural", "features").get("totals", {})
    active = run.table("active", "features").get("totals", {})
    stage1, stage2 = run.config.get("distill") or {}, run.config.get("stage2") or {}
    gap = main_gap(metrics, "stage2") or main_gap(metrics, "stage1")
    margin = main_margin(metrics, "stage2") or main_margin(metrics, "stage1")
    return {
        "teacher LLM": teacher_name(run),
        "speech encoder": encoder_name(run),
        "natural speech": hours(natural.get("training hours", natural.get("hours"))),
        "active (synthetic) speech": hours(active.get("training hours", active.get("hours"))),
        "α of Stage I, Stage II": f"{_plain(stage1.get('alpha'))}, {_plain(stage2.get('alpha'))}",
        "γ of the selection": _plain((run.config.get("select") or {}).get("gamma")),
        **{f"mean M, {SYSTEM_NAMES[name]}": with_error(metrics.get(name) or {}, "misalignment") for name in MEASURED},
        **{
            f"mean M whole, {SYSTEM_NAMES[name]}": with_error(metrics.get(name) or {}, "misalignment_whole")
            for name in MEASURED
        },
        **{f"mean F, {SYSTEM_NAMES[name]}": with_error(metrics.get(name) or {}, "forgetting") for name in TRAINED},
        "AUC of M(c) for unheard domains": _aucs(selection) or "–",
        "hearing margin, points": "–"
        if margin is None
        else f"{points(margin['margin'])} ({SYSTEM_NAMES[margin['system']]})",
        "text-speech gap, points": "–" if gap is None else f"{points(gap['gap'])} ({SYSTEM_NAMES[gap['system']]})",
    }


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def teacher_name(run: RunFacts) -> str:
    teacher = run.table("", "teacher")
    name = str((run.config.get("model") or {}).get("teacher") or teacher.get("path") or "–")
    name = "the embedded world's tiny LM" if name == "world" else name
    size_of = teacher.get("num_parameters")
    return f"{name} ({number(size_of)} parameters)" if size_of else name


def encoder_name(run: RunFacts) -> str:
    encoder = run.table("natural", "features").get("encoder") or {}
    if not encoder:
        return str((run.config.get("encode") or {}).get("encoder") or "–")
    where = f", {encoder['path']}" if encoder.get("path") else ""
    stride = ((run.config.get("model") or {}).get("adapter") or {}).get("stride") or 1
    rate = encoder.get("frame_rate", 0)
    grouped = f", {stride} side by side: {rate / stride:g} positions/s" if stride > 1 else ""
    return f"{encoder.get('name')}{where} ({rate:g} frames/s, {encoder.get('dim')} wide{grouped})"


def misalignment_section(pairs: Sequence[tuple[str, RunFacts]]) -> Section:
    """M and F by domain and by distance, of spoken text and, where there are any, of held-out recordings."""
    if not in_any(pairs):
        return Section("Nothing measured yet: run `salad measure CONFIG` and then `salad report CONFIG`.")
    main = _quantity_parts(pairs, "spoken text" if any("recorded" in run.metrics for _, run in pairs) else "", "spoken")
    recorded = [(name, replace(run, metrics=run.metrics.get("recorded") or {})) for name, run in pairs]
    other = _quantity_parts(recorded, "held-out recordings", "recorded") if in_any(recorded) else ([], [])
    return Section("", [], main[0] + other[0], main[1] + other[1])


def _quantity_parts(pairs: Sequence[tuple[str, RunFacts]], what: str, name: str) -> tuple[list[Plot], list[Grid]]:
    plots: list[Plot] = []
    grids: list[Grid] = []
    for quantity, title, systems in (
        ("misalignment", "Misalignment M", in_any(pairs)),
        ("misalignment_whole", "M, all but the last words spoken", in_any(pairs)),
        ("forgetting", "Forgetting F", in_any(pairs, TRAINED)),
        ("forgetting_whole", "F at the last words", in_any(pairs, TRAINED)),
    ):
        full = f"{title}, {what}" if what else title
        if any(finite((run.metrics.get(system) or {}).get(quantity)) for _, run in pairs for system in systems):
            plots += [domain_plot(pairs, quantity, full, systems, f"{name}-{quantity}")]
            plots += [distance_plot(pairs, quantity, full, systems, f"{name}-{quantity}-distance")]
            grids += [domain_grid(pairs, quantity, full, systems), distance_grid(pairs, quantity, full, systems)]
    grids += [
        grid for run_name, run in pairs if (grid := _difference_grid(run_name if len(pairs) > 1 else "", run, what))
    ]
    return plots, grids


def _difference_grid(name: str, run: RunFacts, what: str) -> Grid | None:
    """What Stage II changed, passage by passage; None before Stage II."""
    found = run.metrics.get("measured_differences") or []
    cells = {(row["quantity"], row["system_b"], row["heard"], row["protocol"]): row for row in found}
    rows: list[list[Cell | str]] = [
        [
            title,
            SYSTEM_NAMES[other],
            SIDES[side],
            *(with_interval(cells.get((quantity, other, side, protocol))) for protocol in PROTOCOLS),
        ]
        for quantity, title in (("misalignment", "M"), ("forgetting", "F"))
        for quantity_, other, side in ordered(key[:3] for key in cells)
        if quantity_ == quantity
    ]
    if not rows:
        return None
    caption = ", ".join(part for part in ("Stage II − the other, nats per position", what, name) if part)
    notes = ["95 % intervals, paired by passage, with books, videos or documents as the units."]
    return Grid(caption, ["", "than", "domains", *PROTOCOLS], rows, notes=notes, num_text_columns=3)


def _domains(pairs: Sequence[tuple[str, RunFacts]]) -> dict[str, Any]:
    """Domains of all runs and whether they were heard, heard ones first; None where runs differ."""
    heard: dict[str, Any] = {}
    for _, run in pairs:
        for system in systems_of(run.metrics):
            for domain, row in run.metrics[system].get("by_domain", {}).items():
                heard[domain] = row["heard"] if heard.get(domain, row["heard"]) == row["heard"] else None
    return dict(sorted(heard.items(), key=lambda item: (not item[1], item[0])))


def _domain_name(domain: str, heard: Any, several: bool) -> str:
    return (domain or "all text") + (" (unheard)" if heard is False and several else "")


def domain_plot(
    pairs: Sequence[tuple[str, RunFacts]], quantity: str, title: str, systems: Sequence[str], name: str
) -> Plot:
    domains = _domains(pairs)
    shown = list(domains)[:MAX_ROWS]
    several = len(set(domains.values())) > 1
    panels, values = [], []
    for run_name, run in pairs:
        dots = [
            made
            for system in systems
            for place, domain in enumerate(shown)
            if (
                made := dot(
                    place, system, (run.metrics.get(system) or {}).get("by_domain", {}).get(domain, {}), quantity
                )
            )
        ]
        values += [made.value for made in dots]
        labels = [_domain_name(domain, domains[domain], several) for domain in shown]
        panels.append(Panel(run_name if len(pairs) > 1 else "", labels, dots))
    alt = f"{title} by domain with 95 % intervals; the table after the figures has the numbers."
    svg = dot_plot(name, alt, panels, f"{title}, nats per position", is_wide(values))
    more = f" The first {MAX_ROWS} of {len(domains)} domains." if len(domains) > MAX_ROWS else ""
    return Plot(svg, f"{title} by domain, 95 % intervals.{more}", legend(systems))


def _distances(pairs: Sequence[tuple[str, RunFacts]]) -> list[int]:
    rows = (run.metrics[name].get("by_distance", {}) for _, run in pairs for name in systems_of(run.metrics))
    return sorted({int(key) for row in rows for key in row})


def _distance_names(starts: Sequence[int]) -> list[str]:
    ends = [*(start - 1 for start in starts[1:]), None]
    names = zip(starts, ends, strict=True)
    return [f"{start}+" if end is None else f"{start}–{end}" if end > start else str(start) for start, end in names]


def distance_plot(
    pairs: Sequence[tuple[str, RunFacts]], quantity: str, title: str, systems: Sequence[str], name: str
) -> Plot:
    starts = _distances(pairs)
    lines, values = [], []
    for place, (_, run) in enumerate(pairs):
        for system in systems:
            rows = (run.metrics.get(system) or {}).get("by_distance", {})
            at = [x for x, start in enumerate(starts) if finite(rows.get(str(start), {}).get(quantity))]
            y = [rows[str(starts[x])][quantity] for x in at]
            errors = [Z95 * (rows[str(starts[x])].get(f"{quantity}_standard_error") or 0.0) for x in at]
            errors = [error if finite(error) else 0.0 for error in errors]
            values += y
            lines += [Line(system, at, y, errors, place)] if at else []
    alt = (
        f"{title} by distance from the last speech frame, in text tokens; the table after the figures has the numbers."
    )
    log = is_wide(values)
    lines = [replace(line, error=None) for line in lines] if log else lines
    svg = line_plot(name, alt, lines, "text tokens since the speech", log, _distance_names(starts))
    return Plot(
        svg,
        f"{title} by distance from the speech, nats per position.",
        legend(systems, [run_name for run_name, _ in pairs]),
    )


def _columns(pairs: Sequence[tuple[str, RunFacts]], systems: Sequence[str]) -> tuple[list[str], list[tuple[str, int]]]:
    titles = [SYSTEM_NAMES[name] for name in systems] * len(pairs)
    return titles, [(name, len(systems)) for name, _ in pairs] if len(pairs) > 1 else []


def domain_grid(pairs: Sequence[tuple[str, RunFacts]], quantity: str, title: str, systems: Sequence[str]) -> Grid:
    titles, groups = _columns(pairs, systems)
    rows: list[list[Cell | str]] = []
    for domain, heard in _domains(pairs).items():
        found = [[(run.metrics.get(s) or {}).get("by_domain", {}).get(domain, {}) for s in systems] for _, run in pairs]
        word = {True: "yes", False: "no", None: "differs"}[heard]
        rows.append([domain or "all text", word, *_error_cells(found, quantity)])
    means = [[run.metrics.get(system) or {} for system in systems] for _, run in pairs]
    rows.append(["mean", "", *_error_cells(means, quantity)])
    notes = [ERRORS]
    notes += [TONES.format("value", "by more than 1.96 standard errors of the difference")] if groups else []
    lead = [("", 2), *groups] if groups else []
    return Grid(f"{title} by domain, nats per position", ["domain", "heard", *titles], rows, lead, notes, 2)


def distance_grid(pairs: Sequence[tuple[str, RunFacts]], quantity: str, title: str, systems: Sequence[str]) -> Grid:
    titles, groups = _columns(pairs, systems)
    starts = _distances(pairs)
    rows: list[list[Cell | str]] = []
    for start, name in zip(starts, _distance_names(starts), strict=True):
        found = [
            [(run.metrics.get(s) or {}).get("by_distance", {}).get(str(start), {}) for s in systems] for _, run in pairs
        ]
        rows.append([name, *_error_cells(found, quantity)])
    lead = [("", 1), *groups] if groups else []
    caption = f"{title} by text tokens since the speech, nats per position"
    return Grid(caption, ["tokens", *titles], rows, lead, [ERRORS])


def _error_cells(found: Sequence[Sequence[dict[str, Any]]], quantity: str) -> list[Cell | str]:
    """Values with their standard errors, marked where they differ from those of the first run."""
    cells: list[Cell | str] = []
    for run in found:
        for row, first in zip(run, found[0], strict=True):
            tone = _changed(row, first, quantity) if row is not first else ""
            mark = {"up": "▲", "down": "▼"}.get(tone, "")
            cells.append(Cell(with_error(row, quantity), mark, "against the first run", tone))
    return cells


def _changed(row: dict[str, Any], first: dict[str, Any], quantity: str) -> str:
    values = [part.get(key) for part in (row, first) for key in (quantity, f"{quantity}_standard_error")]
    known = [value for value in values if finite(value)]
    if len(known) < len(values):
        return ""
    value, error, other, other_error = known
    if abs(value - other) <= Z95 * math.hypot(error, other_error):
        return ""
    return "up" if value > other else "down"


CURVES = (
    ("kl", "KL to the teacher, nats per label"),
    ("word_end_kl", "KL to the teacher at the ends of spoken words, nats"),
    ("text_kl", "KL to the teacher on text alone, nats per label"),
    ("loss", "Loss, nats per label"),
    ("nll", "NLL of the text, nats per label"),
    ("learning_rate", "Learning rate of the LLM"),
    ("muon_learning_rate", "Learning rate of the matrices in the LLM's layers (Muon)"),
    ("positions_per_sec", "Positions per second, all workers together"),
)


def training_section(pairs: Sequence[tuple[str, RunFacts]]) -> Section:
    """One figure for each quantity: colours are stages, dashes are runs."""
    names = [name for name in TRAINED if any(curve.name == name for _, run in pairs for curve in run.curves)]
    if not names:
        return Section("Nothing trained yet: run `salad stage1 CONFIG`.")
    plots = []
    for key, title in CURVES:
        if key == "loss" and all(row.get("loss") == row.get("kl") for row in _log_rows(pairs)):
            continue  # α = 1: the loss is the KL
        lines = [line for place, (_, run) in enumerate(pairs) for line in _lines(run, key, place)]
        if lines:
            is_log = key in ("kl", "word_end_kl", "text_kl", "loss", "nll")
            log = is_log and is_wide([y for line in lines for y in line.y])
            alt = f"{title} by training step; " + "; ".join(_line_words(line) for line in lines) + "."
            svg = line_plot(f"curve-{key}", alt, lines, "step", log)
            plots.append(
                Plot(svg, title + (", logarithmic." if log else "."), legend(names, [name for name, _ in pairs]))
            )
    return Section("", [], plots, [training_grid(pairs)])


def _log_rows(pairs: Sequence[tuple[str, RunFacts]]) -> list[dict[str, float]]:
    return [row for _, run in pairs for curve in run.curves for row in curve.rows]


def _lines(run: RunFacts, key: str, dash: int) -> list[Line]:
    lines = []
    for curve in run.curves:
        rows = [row for row in curve.rows if finite(row.get(key)) and finite(row.get("step"))]
        if rows:
            lines.append(Line(curve.name, [row["step"] for row in rows], [row[key] for row in rows], dash=dash))
    return lines


def _line_words(line: Line) -> str:
    return f"{SYSTEM_NAMES[line.series]} from {line.y[0]:.3g} to {line.y[-1]:.3g} at step {line.x[-1]:,}"


def training_grid(pairs: Sequence[tuple[str, RunFacts]]) -> Grid:
    columns = [
        "state",
        "step",
        "positions",
        "of text alone",
        "time",
        "last KL",
        "last NLL",
        "positions/s",
        "skipped",
        "memory, GiB",
    ]
    rows: list[list[Cell | str]] = []
    for name, run in pairs:
        for curve in run.curves:
            last = curve.rows[-1] if curve.rows else {}
            manifest = run.table("", curve.name)
            label = SYSTEM_NAMES[curve.name]
            rows.append(
                [
                    f"{name}: {label}" if len(pairs) > 1 else label,
                    curve.state,
                    number(last.get("step")),
                    number(last.get("num_positions")),
                    number(last.get("num_text_positions")),
                    secs(manifest.get("train_seconds")),
                    number(last.get("kl")),
                    number(last.get("nll")),
                    number(last.get("positions_per_sec"), 0),
                    number(last.get("skipped_steps")),
                    number(last.get("memory_gib"), 1),
                ]
            )
    notes = [
        "Control: Stage I continued without active speech for as many steps as Stage II.",
        "Positions are D of the scaling law and count samples of text alone, too.",
    ]
    return Grid("Training", ["training", *columns], rows, notes=notes, num_text_columns=2)


def cluster_section(place: int, run: RunFacts) -> Section:
    """The map and the table of clusters; the template sets the passages and players."""
    if not run.clusters:
        return Section(
            "Nothing clustered yet: run `salad cluster CONFIG set=web`, or the whole with `salad run CONFIG`."
        )
    measured = [cluster for cluster in run.clusters if finite(cluster.selection.get("distillation"))]
    spots = [
        Spot(
            *cluster.place,
            cluster.web_share,
            cluster.selection.get("distillation"),
            str(cluster.cluster_id),
        )
        for cluster in run.clusters
        if cluster.place is not None
    ]
    alt = f"Map of {len(spots)} clusters of web text by their centroids. " + (
        "Largest M(c): "
        + ", ".join(f"{c.cluster_id} with {number(c.selection['distillation'])}" for c in measured[:5])
        + "."
        if measured
        else "M(c) is not measured yet."
    )
    svg = cluster_map(f"map{place}", alt, spots, "M(c), nats per position")
    caption = (
        "Centroids on their first two principal components, moved apart where they would cover each other; area is the "
        "share of the web text, colour M(c)."
    )
    return Section("", _selection_lines(run), [Plot(svg, caption)], [cluster_grid(run)])


def _selection_lines(run: RunFacts) -> list[str]:
    selection = run.metrics.get("selection") or {}
    if not selection:
        return [
            "M(c) and the selection are not there yet: run `salad select CONFIG set=active` and `salad report CONFIG`."
        ]
    drawn = f"{hours(selection.get('hours'))} of a budget of {hours(selection.get('budget_hours'))}"
    passages = number(selection.get("num_web_passages"))
    return [
        f"P_target ∝ P_web · M(c)^γ with γ = {_plain(selection.get('gamma'))} drew {drawn} from {passages} passages; "
        f"the effective sample size is {number(selection.get('effective_sample_size'), 0)}, and the probe's "
        f"reliability {number(selection.get('reliability'), 2)} (1: no noise in the differences between clusters)."
    ]


def cluster_grid(run: RunFacts) -> Grid:
    columns = ["cluster", "key terms", "domains", "M(c)", "probed", "P_web", "P_target", "selected", "hours"]
    rows: list[list[Cell | str]] = []
    for cluster in run.clusters:
        facts = cluster.selection
        domains = sorted((facts.get("domains") or {}).items(), key=lambda item: (-item[1], item[0]))
        rows.append(
            [
                str(cluster.cluster_id),
                ", ".join(cluster.terms[:5]),
                ", ".join(f"{name} {count}" if len(domains) > 1 else name for name, count in domains[:3] if name)
                or "–",
                _cluster_loss(facts),
                number(facts.get("num_probed")),
                percent(cluster.web_share),
                percent(facts.get("target_share"), 2),
                number(facts.get("num_selected")),
                number(facts.get("hours_selected")),
            ]
        )
    return Grid("Clusters, the most misunderstood first", columns, rows, num_text_columns=3)


def _cluster_loss(facts: dict[str, Any]) -> str:
    error = number(facts.get("standard_error"))
    return number(facts.get("distillation")) + ("" if error == "–" else f" ± {error}")


def rejects_section(pairs: Sequence[tuple[str, RunFacts]]) -> Section:
    several = len(pairs) > 1
    grids = []
    for name, run in pairs:
        rows: list[list[Cell | str]] = [
            [f"{group.set}, {group.stage}", group.reason, number(group.count), f"{group.key}: {group.example}"]
            for group in run.rejects
        ]
        total = sum(table.num_rejected for table in run.tables)
        notes = [f"{number(run.num_rejects_read)} rejects were read of {number(total)} that the manifests count."]
        notes += [f"Only the first {number(MAX_REJECTS)} are read."] if run.num_rejects_read >= MAX_REJECTS else []
        if rows:
            columns = ["set, stage", "reason", "rows", "for example"]
            grids.append(
                Grid(f"Left out in {name}" if several else "Left out", columns, rows, notes=notes, num_text_columns=2)
            )
    if not grids:
        return Section("Nothing was left out: no stage has rejected a row so far.")
    return Section("", ["Reasons that differ only in numbers, names and paths are counted together."], [], grids)


def lineage_section(pairs: Sequence[tuple[str, RunFacts]]) -> Section:
    """What each table cost and where it came from; for several runs also the settings that differ."""
    grids = [lineage_grid(name if len(pairs) > 1 else "", run) for name, run in pairs if run.tables]
    origins = [origin_grid(name if len(pairs) > 1 else "", run) for name, run in pairs if run.tables]
    if not grids:
        return Section("Nothing made yet: run `salad run CONFIG`.")
    differing = [config_grid(pairs)] if len(pairs) > 1 else []
    return Section("", [], [], differing + grids, origins)


def lineage_grid(name: str, run: RunFacts) -> Grid:
    rows: list[list[Cell | str]] = [
        [
            table.label,
            table.stage,
            table.state,
            number(table.num_rows),
            number(table.num_rejected),
            secs(table.seconds),
            size(table.num_bytes, table.is_estimate),
        ]
        for table in run.tables
    ]
    total_secs = sum(table.seconds or 0.0 for table in run.tables)
    total_bytes = sum(table.num_bytes or 0 for table in run.tables)
    estimate = any(table.is_estimate for table in run.tables)
    rejected = sum(table.num_rejected for table in run.tables)
    rows.append(["together", "", "", "", number(rejected), secs(total_secs), size(total_bytes, estimate)])
    columns = ["table", "stage", "state", "rows", "rejected", "time", "size"]
    notes = [
        "Time is m:ss or h:mm:ss of the stage itself. Rows of training are positions. Size is that of the Parquet "
        "data, without models and checkpoints."
    ]
    return Grid(f"Cost of {name}" if name else "Cost", columns, rows, notes=notes, num_text_columns=3)


def origin_grid(name: str, run: RunFacts) -> Grid:
    rows: list[list[Cell | str]] = []
    for table in run.tables:
        facts = table.manifest
        inputs = ", ".join(f"{key} {value}" for key, value in (facts.get("inputs") or {}).items())
        written = (
            f"{facts.get('salad_ray', '–')}, schema {facts.get('schema_version', '–')}, {facts.get('written_at', '–')}"
        )
        rows.append([table.label, str(facts.get("version", "–")), inputs or "–", written])
    columns = ["table", "version (fingerprint, draw)", "made from", "salad_ray, schema, written"]
    return Grid(f"Lineage of {name}" if name else "Lineage", columns, rows, num_text_columns=4)


def config_grid(pairs: Sequence[tuple[str, RunFacts]]) -> Grid:
    """The settings in which the runs differ."""
    flat = [flatten(run.config) for _, run in pairs]
    keys = ordered(key for config in flat for key in config)
    rows: list[list[Cell | str]] = [
        [key, *_marked([config.get(key, "–") for config in flat])]
        for key in keys
        if len({config.get(key, "–") for config in flat}) > 1
    ]
    columns = ["setting", *(name for name, _ in pairs)]
    return Grid("Settings that differ", columns, rows, num_text_columns=1 + len(pairs))


def flatten(config: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys and JSON values."""
    if isinstance(config, dict) and config:
        parts = (flatten(value, f"{prefix}{key}.") for key, value in config.items())
        return {key: value for part in parts for key, value in part.items()}
    return {prefix.rstrip("."): json.dumps(config, ensure_ascii=False, default=str)}
