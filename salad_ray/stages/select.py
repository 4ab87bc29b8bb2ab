"""`select`: P_target(c) ∝ P_web(c) · M(c)^γ, and the passages that it draws within the budget."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from salad_ray.config import Config
from salad_ray.console import say, show
from salad_ray.flow import Step
from salad_ray.names import CENTROIDS, PASSAGES, PROBE, SELECT, SELECTION, UTTERANCES, WEB
from salad_ray.report.clusters import selection_tables
from salad_ray.runs import Run
from salad_ray.selection.draw import bounds, draw, exhausted
from salad_ray.selection.importance import (
    effective_sample_size,
    reliability,
    shrink,
    target_share,
)
from salad_ray.stages.common import PickPassages, Stage, Work, members_below, picked_shards, probe_losses, run_works
from salad_ray.stages.shards import StageError
from salad_ray.tables import Selected, Table, schema_of

DEFAULT_PERCENT = 1.0
"""Of the natural speech, the paper's budget."""


def make(run: Run, step: Step) -> None:
    """Write `active/selection`, what is drawn and why, and `active/passages`."""
    stage = Stage.of(run, step, SELECTION)
    if not stage.done_already():
        _draw(run, stage)
    selection = stage.table.manifest()
    assert selection is not None
    spoken = Stage.of(run, step, PASSAGES, selection=selection)
    if not spoken.done_already():
        chosen = stage.table.read("part-00000", ["passage_id", "cluster_id", "shard"])
        worker = partial(PickPassages, run.table(WEB, PASSAGES), "train")
        run_works(run, [Work(spoken, picked_shards(run.config, chosen), worker)])


def _draw(run: Run, stage: Stage) -> None:
    """Write `active/selection`; its manifest says for each cluster what was measured, aimed at and drawn."""
    config = run.config
    started = time.monotonic()
    stage.begin()
    _, members, *_, features = stage.step.reads
    budget_secs = budget_of(config, stage.inputs[features]["totals"]["training_hours"])
    clusters = measured_clusters(run)
    chosen = draw_within(run, list(stage.inputs[members]["shards"]), clusters, budget_secs)
    facts = selection_facts(config, clusters, chosen, budget_secs)
    stage.table.write("part-00000", chosen)
    seconds = round(time.monotonic() - started, 2)
    stage.finish(num_rows=len(chosen), shards={"part-00000": len(chosen)}, seconds=seconds, **facts)
    show(*selection_tables(facts))


def budget_of(config: Config, natural_hours: float) -> float:
    """The budget in seconds of speech."""
    settings = config.select
    if settings.budget_hours is not None:
        return settings.budget_hours * 3600
    return natural_hours * 36 * (settings.budget_percent or DEFAULT_PERCENT)


def measured_clusters(run: Run) -> dict[str, np.ndarray]:
    """Arrays (K,) of all clusters: shares, sizes, M(c) with its standard error, and P_target."""
    config = run.config
    rows = run.table(WEB, CENTROIDS).read("part-00000").drop_columns(["centroid"])
    clusters = {name: rows[name].to_numpy() for name in rows.column_names}
    loss = probe_losses(run, len(rows))[config.probe.protocol]
    unknown = np.flatnonzero(~np.isfinite(loss.mean))
    if len(unknown):
        say(f"select: {len(unknown)} clusters could not be measured, {unknown[0]} for one; they count as average")
    mean = np.where(np.isfinite(loss.mean), loss.mean, loss.overall)
    trust = reliability(loss.mean, loss.standard_error)
    if len(mean) > 1 and trust < config.probe.min_reliability:
        say(
            f"select: the probe cannot rank the clusters well, {1 - trust:.0%} of the variance between M(c) is noise; "
            f"raise probe.passages_per_cluster={config.probe.passages_per_cluster}"
        )
    used = np.maximum(shrink(mean, loss.standard_error) if config.select.shrink else mean, 0)  # rounding, below
    return clusters | {
        "distillation": mean,
        "standard_error": loss.standard_error,
        "num_probed": loss.num_passages,
        "reliability": np.full(len(mean), trust),
        "target_share": _aim(clusters["web_share"], used, config.select.gamma),
        "secs_per_char": np.full(len(mean), secs_per_char(run.table(PROBE, UTTERANCES))),
    }


def _aim(web_share: np.ndarray, loss: np.ndarray, gamma: float) -> np.ndarray:
    try:
        return target_share(web_share, loss, gamma)
    except ValueError as error:
        raise StageError(f"select: nothing can be aimed at: {error}") from None


def secs_per_char(table: Table) -> float:
    """How long the synthesizer takes over a character, seen on these utterances."""
    rows = pa.concat_tables(table.read(shard, ["text", "duration_secs"]) for shard in table.shards())
    return float(
        pa.compute.sum(rows["duration_secs"]).as_py() / pa.compute.sum(pa.compute.utf8_length(rows["text"])).as_py()
    )


def draw_within(run: Run, shards: list[str], clusters: dict[str, np.ndarray], budget_secs: float) -> pa.Table:
    """The passages drawn, in order of their rank; only candidates below a bound on the priority are ever collected."""
    probe = run.table(PROBE, PASSAGES)
    probed = pa.concat_tables(probe.read(shard, ["passage_id"]) for shard in probe.shards())["passage_id"]
    total_secs = clusters["num_chars"] * clusters["secs_per_char"]
    share, slack = clusters["target_share"], 1.0
    while True:
        limits = bounds(
            clusters["num_passages"], total_secs, share, budget_secs, run.config.probe.passages_per_cluster, slack
        )
        found = members_below(run, SELECT, shards, limits)
        found = found.filter(pa.compute.invert(pa.compute.is_in(found["passage_id"], probed)))
        secs = pa.compute.multiply(found["num_chars"].cast(pa.float64()), clusters["secs_per_char"][0])
        chosen = draw(found.append_column("duration_secs", secs), share, budget_secs)
        if not exhausted(found, chosen, limits):
            break
        slack *= 2
    if not len(found):
        raise StageError("select: the probe took every passage of the web text; ingest more of it")
    if not len(chosen):
        raise StageError(
            f"select: a budget of {budget_secs / 3600:.3g} h is too little for a single passage; raise "
            "select.budget_hours or select.budget_percent"
        )
    weight = np.divide(share, clusters["web_share"], out=np.zeros_like(share), where=clusters["web_share"] > 0)
    chosen = chosen.append_column("weight", pa.array(weight[chosen["cluster_id"].to_numpy()]))
    return chosen.select(schema_of(Selected).names).cast(schema_of(Selected))


def selection_facts(
    config: Config, clusters: dict[str, np.ndarray], chosen: pa.Table, budget_secs: float
) -> dict[str, Any]:
    """What the manifest and `metrics.json` tell."""
    labels, secs = chosen["cluster_id"].to_numpy(), chosen["duration_secs"].to_numpy()
    num_clusters, num_passages = len(clusters["web_share"]), int(clusters["num_passages"].sum())
    columns = {
        "cluster_id": clusters["cluster_id"],
        "web_share": clusters["web_share"],
        "distillation": clusters["distillation"],
        "standard_error": clusters["standard_error"],
        "num_probed": clusters["num_probed"],
        "target_share": clusters["target_share"],
        "num_selected": np.bincount(labels, minlength=num_clusters),
        "hours_selected": np.bincount(labels, secs, minlength=num_clusters) / 3600,
    }
    hours, budget_hours = float(secs.sum() / 3600), budget_secs / 3600
    if hours < 0.9 * budget_hours:
        say(f"select: the web text ran dry after {hours:.2f} of {budget_hours:.2f} h; ingest more of it")
    return {
        "protocol": config.probe.protocol,
        "gamma": config.select.gamma,
        "budget_hours": budget_hours,
        "hours": hours,
        "effective_sample_size": effective_sample_size(clusters["web_share"], clusters["target_share"], num_passages),
        "num_web_passages": num_passages,
        "reliability": float(clusters["reliability"][0]),
        "by_cluster": [
            {name: _plain(values[index]) for name, values in columns.items()} for index in range(num_clusters)
        ],
    }


def _plain(value: Any) -> Any:
    """A number as JSON has it; what could not be measured is null."""
    number = value.item()
    return None if isinstance(number, float) and not np.isfinite(number) else number
