"""What all stages share: skip and resume; manifests, counts and rejects.

A stage maps items (usually the shards of its input) to shards of one table (`shards.py`); a rerun does only what is
missing.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar, get_args

import numpy as np
import pyarrow as pa
import ray

from salad_ray import __version__
from salad_ray.config import PICKED_PER_SHARD, PROTOCOLS, Condition, Config, identity
from salad_ray.console import progress, say
from salad_ray.flow import Step, steps
from salad_ray.names import CLUSTERS, PASSAGES, PROBE, STAGE1, TEACHER, WEB, measurements_of
from salad_ray.runs import Run
from salad_ray.selection.importance import ClusterLoss, distillation_by_cluster
from salad_ray.speech.spoken import num_asides, unsaid_signs
from salad_ray.stages.ray_cluster import require_gpus, start_ray
from salad_ray.stages.shards import ShardPart, StageError, Task, Worker, map_shards
from salad_ray.tables import (
    SCHEMA_VERSION,
    Measurement,
    Passage,
    Table,
    Totals,
    Utterance,
    add_totals,
    each_shard,
    read_json,
    to_arrow,
    write_json,
)

Row = TypeVar("Row")


class Begun(Protocol):
    """The making of a table, of which something is known before it is there."""

    def promise(self) -> dict[str, Any]:
        """What is known of its manifest."""


@dataclass(frozen=True)
class Stage:
    """The making of one table, as its manifest describes it."""

    run: Run
    step: Step
    table: Table
    inputs: dict[str, dict[str, Any]]
    """Label of a table that it is made from → its manifest."""

    @classmethod
    def of(
        cls,
        run: Run,
        step: Step,
        name: str | None = None,
        ahead: Mapping[str, Begun] | None = None,
        **others: dict[str, Any],
    ) -> Stage:
        """Of a step's table, by default its first.

        Args:
            ahead: what the same processes make before it.
            others: manifests of tables of the same step that it is made from.

        Raises:
            StageError: an input is not finished.
        """
        table, ahead = run.table(step.set, name or step.tables[0]), ahead or {}
        inputs = {label: ahead[label].promise() if label in ahead else finished(run, label) for label in step.reads}
        return cls(run, step, table, inputs | others)

    @property
    def name(self) -> str:
        return self.step.stage

    @property
    def label(self) -> str:
        return f"{self.name} set={self.table.set}" if self.table.set else self.name

    def is_done(self) -> bool:
        """Whether the table is finished, of the inputs as they are now. One that is not is removed: an input that was
        made anew may differ (training on GPUs does), though its key is the same."""
        manifest = self.table.manifest()
        begun = manifest or read_json(f"{self.table.url}/begun.json")
        if begun is None:
            return False
        other = [label for label, version in self._versions().items() if begun["inputs"].get(label) != version]
        if other:
            say(f"{self.label}: {other[0]} was made anew, so {self.table.url} is, too")
            self.table.delete()
            return False
        if manifest is None:
            return False
        lost = set(manifest.get("shards", ())) - set(self.table.shards())
        if lost:
            say(f"{self.label}: {len(lost)} shards of {self.table.url} are gone, {min(lost)} first; making them again")
        return not lost

    def done_already(self) -> bool:
        """Whether it `is_done`, which is told; raises as `check_strict`."""
        if not self.is_done():
            return False
        check_strict(self.run.config, self)
        say(f"{self.label}: done already, {self.table.url}")
        return True

    def begin(self) -> None:
        """Say what this is before the first shard is written. What is made anew gets another version."""
        if read_json(f"{self.table.url}/begun.json") is None:
            version = f"{self.table.url.rsplit('/', 1)[-1]}-{uuid.uuid4().hex[:8]}"
            write_json(f"{self.table.url}/begun.json", self._description() | {"version": version})

    def finish(self, **facts: Any) -> dict[str, Any]:
        """Write the manifest: from now on the table counts as done."""
        begun = read_json(f"{self.table.url}/begun.json")
        if begun is None:
            raise StageError(f"{self.table.url} was deleted while the stage ran; run it again")
        self.table.clear_temporaries()
        manifest = self._description() | {"version": begun["version"]} | facts
        write_json(f"{self.table.url}/manifest.json", manifest)
        return manifest

    def _versions(self) -> dict[str, str]:
        return {label: manifest["version"] for label, manifest in self.inputs.items()}

    def _description(self) -> dict[str, Any]:
        config, step = self.run.config, self.step
        return {
            "stage": step.stage,
            "set": step.set,
            "config": identity(config, *step.keys, without=step.without),
            "inputs": self._versions(),
            "sources": dict(self.run.facts_of(step)),
            "schema_version": SCHEMA_VERSION,
            "salad_ray": __version__,
            "written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def finished(run: Run, label: str) -> dict[str, Any]:
    """The manifest of a table; raises `StageError`, which says what to run, where it is not finished."""
    table = run.labelled(label)
    manifest = table.manifest()
    if manifest is None:
        writer = next((step for step in steps(run.config) if label in step.writes), None)
        if writer is None:
            raise StageError(f"this config has no table {label}")
        where = f" set={writer.set}" if writer.set else ""
        raise StageError(f"{label} is not finished; run `salad {writer.stage} CONFIG{where}` first")
    return manifest


def teacher_of(run: Run) -> dict[str, Any]:
    """The manifest of the text LLM; its `path` as it is now, where the run has trained it itself."""
    return run.with_path(finished(run, TEACHER))


@dataclass(frozen=True)
class Work:
    """What a step that goes shard by shard does."""

    stage: Stage
    items: dict[str, Any]
    """Shard name → payload (plain JSON data) for the worker."""
    make_worker: Callable[[], Worker]
    """Builds the worker inside its actor (a `functools.partial` of its class)."""
    num_gpus: float = 0.0
    """Of each actor."""
    num_cpus: float = 1.0
    """Of each actor, its threads included."""
    facts: dict[str, Any] = field(default_factory=dict)
    """For the manifest."""
    clean_up: Callable[[], None] = lambda: None
    """Called when the manifest is written."""

    def promise(self) -> dict[str, Any]:
        """What is known of the manifest before it is written."""
        begun = read_json(f"{self.stage.table.url}/begun.json") or {}
        return begun | self.facts | {"shards": dict.fromkeys(self.items)}


Ahead = Mapping[str, Work]
"""Label of a table → the work that makes it, by the same actors, a shard at a time."""


def run_works(run: Run, works: Sequence[Work]) -> None:
    """Make these tables, by the same actors, a chain of tasks at a time: they start once for all.

    Raises:
        StageError: with strict=true at the first bad input; when too large a share is rejected; without items.
    """
    for work in works:
        work.stage.begin()
    started = time.monotonic()
    pace, busy = _do(run, works)
    secs = time.monotonic() - started
    for work in works:
        counts = checked_counts(run.config, work.stage, list(work.items))
        own_busy = busy.get(work.stage.table.url, 0.0)
        own_secs = secs * own_busy / (sum(busy.values()) or 1.0)
        facts = pace | {"busy_secs": round(own_busy, 2), "seconds": round(own_secs, 2)}
        work.stage.finish(**counts, **facts, **work.facts)
        work.clean_up()
        say(f"{work.stage.label}: {counts['num_kept']:,} kept in {own_secs:.1f} s → {work.stage.table.url}")


def begun_works(batch: Sequence[Step], work_of: Callable[[Step, Ahead], Work]) -> list[Work]:
    """What the steps do whose tables are missing, each begun, so that the next can refer to what it will make."""
    ahead: dict[str, Work] = {}
    for step in batch:
        work = work_of(step, ahead)
        if not work.stage.done_already():
            work.stage.begin()
            ahead[work.stage.table.label] = work
    return list(ahead.values())


def make_shards(run: Run, work: Work) -> dict[str, Any]:
    """Make every shard that is missing, and no manifest; returns the counts over all items. Raises as `run_works`."""
    pace, _ = _do(run, [work])
    return checked_counts(run.config, work.stage, list(work.items)) | pace


def _do(run: Run, works: Sequence[Work]) -> tuple[dict[str, float], dict[str, float]]:
    """Make the shards that are missing; returns the pace and, by URL of a table, how long actors worked on it
    (`map_shards`)."""
    tasks: list[Task] = []
    chains: dict[str, int] = {}
    for number, work in enumerate(works):
        chains[work.stage.table.label] = chains.get(work.stage.step.along, number)
        done = set(work.stage.table.shards())
        items = {name: payload for name, payload in work.items.items() if name not in done}
        if done and items:
            there = f"{len(work.items) - len(items)} of {len(work.items)} shards are there already"
            say(f"{work.stage.label}: continuing, {there}")
        if items:
            num_there = len(work.items) - len(items)
            table = work.stage.table
            chain = chains[table.label]
            tasks.append(Task(work.stage.label, table, run.config.run_dir, items, work.make_worker, num_there, chain))
    if not tasks:
        return {}, {}
    config, num_gpus = run.config, works[0].num_gpus
    num_cpus = max(work.num_cpus for work in works)
    start_ray(config)
    cluster = ray.cluster_resources()
    room = int(cluster.get("GPU", 0) / num_gpus) if num_gpus else int(cluster.get("CPU", 0) / num_cpus)
    label = tasks[0].label
    require_gpus(config, label, num_gpus)
    if not room and config.ray.max_actors is None:
        say(f"{label}: this Ray cluster has no CPUs now; one actor waits for one, more if ray.max_actors says how many")
    return map_shards(config, tasks, room, num_gpus, num_cpus)


def gather(config: Config, label: str, shards: Sequence[str], work: Callable[[str], pa.Table]) -> pa.Table:
    """What `work` makes of every shard, on all machines, in the order of the shards; it all comes to this process."""
    start_ray(config)

    def of_shard(batch: dict[str, Any]) -> pa.Table:
        [number] = batch["number"].tolist()
        table = work(shards[number])
        return table.append_column("number", pa.array([number] * len(table), pa.int64()))

    numbers = ray.data.from_items(
        [{"number": number} for number in range(len(shards))], override_num_blocks=len(shards)
    )
    at_once = ray.data.TaskPoolStrategy(config.ray.max_actors)
    found = numbers.map_batches(of_shard, batch_size=1, num_cpus=1, compute=at_once)
    parts: list[pa.Table] = []
    with progress(label, len(shards), "shards") as advance:
        for part in found.iter_batches(batch_size=None, batch_format="pyarrow"):
            parts.append(part)
            advance(len(pa.compute.unique(part["number"])))
    if not parts:  # Ray hands on no block that is empty
        return work(shards[0])
    return pa.concat_tables(parts).sort_by("number").drop_columns(["number"])


def members_below(run: Run, label: str, shards: Sequence[str], bounds: np.ndarray) -> pa.Table:
    """Passages of `web/clusters`, but those kept aside for measuring, whose priority is below their cluster's bound.

    Args:
        bounds: (K,), float in [0, 1], as shares of all priorities.

    Returns:
        The rows of the table with a column `shard`.
    """
    clusters = run.table(WEB, CLUSTERS)

    def of_shard(shard: str) -> pa.Table:
        rows = clusters.read(shard)
        place = rows["priority"].to_numpy() / 2.0**63
        near = (place < bounds[rows["cluster_id"].to_numpy()]) & (
            rows["split"].to_numpy(zero_copy_only=False) != "test"
        )
        found = rows.filter(pa.array(near))
        return found.append_column("shard", pa.array([shard] * len(found), pa.string()))

    return gather(run.config, label, shards, of_shard)


def probe_losses(run: Run, num_clusters: int) -> dict[str, ClusterLoss]:
    """M(c) of every cluster by each protocol, as Stage I has it on the probe."""
    probe, table = run.table(PROBE, PASSAGES), run.table(PROBE, measurements_of(STAGE1))
    owner = {
        row["passage_id"]: row["cluster_id"]
        for passages in each_shard(partial(probe.read, columns=["passage_id", "cluster_id"]), probe.shards())
        for row in passages.to_pylist()
    }
    shards = each_shard(partial(table.read_rows, Measurement), table.shards())
    measured: list[Measurement] = [row for rows in shards for row in rows]
    by_protocol = {name: [row for row in measured if row.protocol == name] for name in PROTOCOLS}
    return {
        name: distillation_by_cluster(
            [row.passage for row in rows],
            [owner[row.passage] for row in rows],
            [row.distillation for row in rows],
            [row.num_positions for row in rows],
            num_clusters,
        )
        for name, rows in by_protocol.items()
    }


class PickPassages:
    """Makes a shard of passages out of chosen ones of the web's shards: web shard → [[passage_id, cluster_id], …]."""

    def __init__(self, passages: Table, split: str) -> None:
        self.passages = passages
        self.split = split

    def __call__(self, chosen: dict[str, list[tuple[str, int | None]]]) -> Iterator[ShardPart]:
        for shard, pairs in sorted(chosen.items()):
            clusters = dict(pairs)
            rows = self.passages.read_where(Passage, shard, "passage_id", clusters)
            if len(rows) != len(clusters):
                raise StageError(
                    f"{self.passages.url}/{shard} lacks passages that were drawn from it; rerun with --redo"
                )
            rows = [replace(row, cluster_id=clusters[row.passage_id], split=self.split) for row in rows]
            yield ShardPart(to_arrow(Passage, rows), len(rows), len(rows))


def picked_shards(config: Config, chosen: pa.Table) -> dict[str, dict[str, list[tuple[str, int | None]]]]:
    """Items for `PickPassages`: the passages of every n-th web shard make a shard, so that nothing is shuffled.

    Args:
        chosen: `passage_id`, `cluster_id` and `shard`, the web shard where it lies.
    """
    lanes = config.pack.num_lanes
    number = -(-len(chosen) // PICKED_PER_SHARD)
    number = min(config.ingest.num_shards, -(-number // lanes) * lanes)
    sources = sorted(set(chosen["shard"].to_pylist()))
    target = {shard: f"part-{index % number:05d}" for index, shard in enumerate(sources)}
    items: dict[str, dict[str, list[tuple[str, int | None]]]] = {f"part-{index:05d}": {} for index in range(number)}
    for row in chosen.select(["passage_id", "cluster_id", "shard"]).to_pylist():
        items[target[row["shard"]]].setdefault(row["shard"], []).append((row["passage_id"], row["cluster_id"]))
    return {name: item for name, item in items.items() if item}


def condition_of(utt_id: str) -> tuple[str, str]:
    """An item of a benchmark and the condition under which this utterance of it is heard: `<item>[@<condition>]`."""
    item, _, condition = utt_id.rpartition("@")
    return (item, condition) if item and condition in get_args(Condition) else (utt_id, "clean")


def hours_by_corpus(rows: Iterable[Utterance]) -> Totals:
    """Hours of audio of each corpus and licence."""
    hours: dict[str, Any] = {}
    for row in rows:
        add_totals(hours, {row.corpus: {row.license or "licence unknown": row.duration_secs / 3600}})
    return {"hours_by_corpus": hours}


def count_unsaid(rows: Iterable[Utterance]) -> Totals:
    """What of the texts is not said, for a shard's totals: signs (emoji, "「") and asides ("[laughter]", "[12]")."""
    texts = [row.text for row in rows]
    signs, asides = sum(len(unsaid_signs(text)) for text in texts), sum(map(num_asides, texts))
    totals: Totals = {}
    if signs:
        totals["num_unsaid_signs"] = signs
    if asides:
        totals["num_unsaid_asides"] = asides
    return totals


def checked_counts(config: Config, stage: Stage, shards: Sequence[str]) -> dict[str, Any]:
    """The counts over all shards of a stage, which add up; says where its rejects are. Raises as `check_counts`."""
    counts = count_shards(stage.table, shards)
    check_counts(config, stage, counts)
    if counts["num_rejected"]:
        rejects = stage.table.rejects
        say(f"{stage.label}: {counts['num_rejected']:,} rejected, the reasons are in {rejects.url}")
    return counts


def count_shards(table: Table, shards: Sequence[str]) -> dict[str, Any]:
    """Sum the counts that the shards carry in their footers.

    Returns:
        `num_input`, `num_kept`, `num_rejected`, `num_rows`; `shards`, name → rows; and `totals`.
    """
    counts: dict[str, Any] = {"num_input": 0, "num_kept": 0, "num_rejected": 0, "num_rows": 0, "shards": {}}
    totals: dict[str, Any] = {}
    with ThreadPoolExecutor(32) as threads:  # an object store answers one at a time too slowly for thousands
        for shard, (own, num_rows) in zip(shards, threads.map(partial(_footer, table), shards), strict=True):
            add_totals(totals, own.pop("totals"))
            for name, value in own.items():
                counts[name] += value
            counts["num_rows"] += num_rows
            counts["shards"][shard] = num_rows
    return counts | {"totals": _rounded(totals)}


def _rounded(totals: dict[str, Any]) -> dict[str, Any]:
    pairs = sorted(totals.items())
    return {name: _rounded(total) if isinstance(total, dict) else round(total, 6) for name, total in pairs}


def _footer(table: Table, shard: str) -> tuple[dict[str, Any], int]:
    metadata = table.metadata(shard)
    return json.loads(metadata.metadata[b"counts"]), metadata.num_rows


def check_strict(config: Config, stage: Stage) -> None:
    """A strict run does not accept a table beside which anything was rejected."""
    num_rejected = (stage.table.manifest() or {}).get("num_rejected", 0)
    if config.strict and num_rejected:
        first = _first_reject(stage)
        raise StageError(f"{stage.name}: {first['key']}: {first['reason']}")


def _first_reject(stage: Stage) -> dict[str, str]:
    rejects = stage.table.rejects
    name = next(iter(rejects.shards()), None)
    return rejects.read(name).to_pylist()[0] if name else {"key": "", "reason": "no input"}


def check_counts(config: Config, stage: Stage, counts: dict[str, Any]) -> None:
    """Raises `StageError` when rows were lost, nothing was kept, or too large a share was rejected."""
    if counts["num_input"] != counts["num_kept"] + counts["num_rejected"]:
        raise StageError(f"{stage.label}: rows were lost ({counts}); please report this as a bug")
    share = counts["num_rejected"] / max(counts["num_input"], 1)
    if share > config.ingest.max_rejected_share or counts["num_kept"] == 0:
        reason = _first_reject(stage)
        raise StageError(
            f"{stage.label}: {counts['num_rejected']:,} of {counts['num_input']:,} rows were rejected, first "
            f"{reason['key']}: {reason['reason']}; mend the input and run the "
            "stage with --redo, or raise ingest.max_rejected_share"
        )
