"""`probe`: a few passages of every cluster, to be spoken and measured; they are never selected."""

from __future__ import annotations

from functools import partial

import pyarrow as pa

from salad_ray.console import say
from salad_ray.flow import Step
from salad_ray.names import PROBE
from salad_ray.runs import Run
from salad_ray.selection.draw import draw_probe, probe_bounds
from salad_ray.stages.common import Ahead, PickPassages, Stage, Work, members_below, picked_shards
from salad_ray.stages.shards import StageError
from salad_ray.tables import Table


def work(run: Run, step: Step, ahead: Ahead) -> Work:
    """`probe/passages` from `web/clusters`: the lowest priorities of each cluster."""
    stage = Stage.of(run, step, ahead=ahead)
    passages, clusters, centroids = step.reads
    items = {}
    if not stage.is_done():
        chosen = _choose(run, run.labelled(centroids), list(stage.inputs[clusters]["shards"]))
        items = picked_shards(run.config, chosen)
    return Work(stage, items, partial(PickPassages, run.labelled(passages), "test"))


def _choose(run: Run, centroids: Table, shards: list[str]) -> pa.Table:
    number = run.config.probe.passages_per_cluster
    sizes = centroids.read("part-00000", ["num_passages"])["num_passages"].to_numpy()
    if not sizes.sum():
        raise StageError(f"probe: {centroids.label} count no passages but those kept aside for measuring")
    candidates = members_below(run, PROBE, shards, probe_bounds(sizes, number))
    chosen = draw_probe(candidates, number)
    small = [int(cluster) for cluster in (sizes < number).nonzero()[0]]
    if small:
        say(
            f"probe: {len(small)} clusters have fewer than {number} passages, {small[0]} for one; all of them are taken"
        )
    return chosen
