"""`probe`: a few passages of every cluster, to be spoken and measured; they are never selected."""

from __future__ import annotations

from functools import partial

import pyarrow as pa

from salad_ray.config import Config, identity
from salad_ray.console import say
from salad_ray.selection.draw import draw_probe, probe_bounds
from salad_ray.stages.common import PickPassages, Stage, finished, members_below, picked_shards, run_shards
from salad_ray.stages.shards import StageError
from salad_ray.tables import Table


def run(config: Config) -> None:
    """Write `probe/passages` from `web/clusters`: the lowest priorities of each cluster."""
    clusters = finished(Table(config.run_dir, "web", "clusters"), "cluster")
    centroids = finished(Table(config.run_dir, "web", "centroids"), "cluster")
    stage = Stage(
        "probe",
        Table(config.run_dir, "probe", "passages"),
        identity(config, "probe.passages_per_cluster"),
        {"clusters": clusters["version"], "centroids": centroids["version"]},
    )
    if stage.is_done():
        say(f"probe: done already, {stage.table.url}")
        return
    chosen = _choose(config, list(clusters["shards"]))
    run_shards(config, stage, picked_shards(config, chosen), partial(PickPassages, config, "test"))


def _choose(config: Config, shards: list[str]) -> pa.Table:
    number = config.probe.passages_per_cluster
    sizes = Table(config.run_dir, "web", "centroids").read("part-00000", ["num_passages"])["num_passages"].to_numpy()
    if not sizes.sum():
        raise StageError("probe: web/clusters has no passages but those kept aside for measuring")
    candidates = members_below(config, "probe", shards, probe_bounds(sizes, number))
    chosen = draw_probe(candidates, number)
    small = [int(cluster) for cluster in (sizes < number).nonzero()[0]]
    if small:
        say(
            f"probe: {len(small)} clusters have fewer than {number} passages, {small[0]} for one; all of them are taken"
        )
    return chosen
