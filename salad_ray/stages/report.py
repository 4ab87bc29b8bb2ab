"""`report`: the gap table on the terminal and `report/metrics.json`."""

from __future__ import annotations

from typing import Any

from salad_ray.config import Config
from salad_ray.console import console, say
from salad_ray.report.metrics import gap_table, system_metrics
from salad_ray.stages.common import StageError, finished
from salad_ray.tables import Measurement, Table, write_json

SYSTEMS = ("untrained", "stage1")


def run(config: Config) -> None:
    """Write `report/metrics.json` from the measurements; always anew, since it costs nothing."""
    heard = heard_domains(Table(config.run_dir, "natural", "features"))
    metrics: dict[str, Any] = {}
    for system in SYSTEMS:
        table = Table(config.run_dir, config.measured_set, f"measurements_{system}")
        if system != "untrained" and table.manifest() is None:
            continue
        measured = finished(table, "measure")
        trained = Table(config.run_dir, "", system).manifest()
        if trained is not None and measured["inputs"]["model"] != trained["fingerprint"]:
            raise StageError(f"report: {table.url} is of another {system} model; run `salad measure CONFIG --redo`")
        rows = [row for shard in table.shards() for row in table.read_rows(Measurement, shard)]
        metrics[system] = system_metrics(rows, heard) | training_facts(config, system)
    url = f"{config.run_dir}/report/metrics.json"
    write_json(url, metrics)
    write_json(f"{config.run_dir}/report/manifest.json", {"stage": "report", "systems": list(metrics)})
    console.print(gap_table(metrics))
    say(f"report: {url}")


def training_facts(config: Config, system: str) -> dict[str, Any]:
    """Positions and seconds of training; none for the untrained model."""
    manifest = Table(config.run_dir, "", system).manifest() or {}
    return {name: manifest.get(name, 0) for name in ("num_positions", "train_seconds")}


def heard_domains(features: Table) -> set[str]:
    """Domains of the natural training speech."""
    tables = [features.read(shard, ["domain", "split"]).to_pydict() for shard in features.shards()]
    return {domain for t in tables for domain, split in zip(t["domain"], t["split"], strict=True) if split == "train"}
