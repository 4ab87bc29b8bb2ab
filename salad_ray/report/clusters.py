"""Clusters of the web text: what the model misunderstands, and what was spoken of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from salad_ray.names import PROBE
from salad_ray.report import words
from salad_ray.report.blocks import Block, Clip, Fold, Paragraph, Section, Table
from salad_ray.report.facts import RunFacts
from salad_ray.report.plots import cluster_map
from salad_ray.report.rows import Columns, Row, listed, of

NUM_UNFOLDED = 2
"""Clusters whose passages are unfolded from the start."""
_NOT_CLUSTERED = "Nothing clustered yet: run `salad cluster CONFIG set=web`, or the whole with `salad run CONFIG`."
_NOT_SELECTED = (
    "M(c) and the selection are not there yet: run `salad select CONFIG set=active` and `salad report CONFIG`."
)
_COLUMNS: Columns = {
    "cluster": of("cluster_id"),
    "key terms": lambda row: ", ".join(row.get("terms", [])[:5]),
    "domains": lambda row: _domains(row.get("domains")),
    "M(c)": lambda row: words.with_error(row, "distillation", "standard_error"),
    "probed": of("num_probed", words.number),
    "P_web": of("web_share", partial(words.percent, digits=2)),
    "P_target": of("target_share", partial(words.percent, digits=2)),
    "selected": of("num_selected", words.number),
    "hours": of("hours_selected", words.number),
}


def _domains(counts: dict[str, int] | None) -> str:
    """The three that a cluster's probe has most of."""
    if counts is None:
        return ""
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:3]
    return ", ".join(f"{name} {count}" if len(counts) > 1 else name for name, count in most if name) or "–"


def selection_tables(selection: dict[str, Any], num_rows: int = 20) -> list[Table]:
    """The clusters that were aimed at most, and the others together."""
    if not selection:
        return []
    rows = sorted(selection["by_cluster"], key=lambda row: -row["target_share"])
    shown, rest = [row | {"domains": None} for row in rows[:num_rows]], rows[num_rows:]  # 80 columns have no room
    if rest:
        sums = ("web_share", "target_share", "num_selected", "hours_selected")
        shown.append({"cluster_id": f"{len(rest)} more"} | {name: sum(row[name] for row in rest) for name in sums})
    return listed(_drawn(selection), shown, _COLUMNS, 3)


def _drawn(selection: dict[str, Any]) -> str:
    drawn, budget = (words.number(selection.get(name), 2) for name in ("hours", "budget_hours"))
    size, reliability = selection.get("effective_sample_size"), selection.get("reliability")
    return (
        f"P_target ∝ P_web · M(c)^γ with γ = {words.general(selection.get('gamma'))} drew {drawn} of {budget} h from "
        f"{words.number(selection.get('num_web_passages'))} passages; the effective sample size is "
        f"{words.number(size, 0)}, and the probe's reliability {words.number(reliability, 2)} (1: no noise in the "
        "differences between clusters)."
    )


def clusters(runs: Sequence[RunFacts]) -> Section:
    """For each run the map, the table, and the passages with their players."""
    intro = (
        "M(c) is the distillation loss after Stage I on a spoken probe of the cluster: where it is large, the model "
        "misunderstands, and Stage II speaks more of it."
    )
    blocks: list[Block] = []
    for place, run in enumerate(runs):
        blocks += [Paragraph(run.title, "h3")] if run.title else []
        if not run.clusters:
            blocks.append(Paragraph(_NOT_CLUSTERED, "empty"))
            continue
        more = f"; {run.num_clips_left_out} more were left out to keep the page small" if run.num_clips_left_out else ""
        selection = run.metrics.get("selection")
        blocks += [
            Paragraph(_drawn(selection) if selection else _NOT_SELECTED),
            cluster_map(f"map{place}", run.clusters),
            *listed("Clusters, the most misunderstood first", run.clusters, _COLUMNS, num_text_columns=3),
            Paragraph(f"Passages of {run.title}" if run.title else "Passages", "h3"),
            Paragraph(
                f"The first utterances of each cluster as they come, not chosen{more}. On paper only what is unfolded "
                "is printed, without players.",
                "soft",
            ),
            *(_passages(cluster, rank < NUM_UNFOLDED) for rank, cluster in enumerate(run.clusters)),
        ]
    title = "Clusters of the web text, and what was spoken of them"
    return Section("clusters", "Clusters, audio", title, blocks, intro=[intro])


def _passages(cluster: Row, is_open: bool) -> Fold:
    name, terms, closest = cluster["cluster_id"], cluster.get("terms", []), cluster.get("closest", [])
    about = f"M(c) {words.number(cluster.get('distillation'))}, {words.number(cluster['num_passages'])} passages"
    blocks: list[Block] = [Paragraph(f"Key terms: {', '.join(terms)}")] if terms else []
    blocks += [
        Clip(clip["text"], _about(clip), f"Cluster {name}: {clip['text']}", clip["audio"]) for clip in cluster["clips"]
    ]
    blocks += [] if cluster["clips"] else [Paragraph("No audio of this cluster is in the page.", "soft")]
    blocks += [Paragraph("Closest to its centre:")] if closest else []
    blocks += [Paragraph(text, "quote") for text in closest]
    return Fold(f"Cluster {name}: {', '.join(terms[:4])}", about, blocks, is_open)


def _about(clip: Row) -> str:
    parts = [
        PROBE if clip["set"] == PROBE else "selected for Stage II",
        clip["domain"],
        f"voice {clip['speaker']}",
        f"{words.secs(clip['duration_secs'])} min",
        "" if clip["loss"] is None else f"loss {words.number(clip['loss'])}",
    ]
    return ", ".join(filter(None, parts))
