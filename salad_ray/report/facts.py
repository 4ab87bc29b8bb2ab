"""What the page tells of a run, read from its tables and manifests alone, in bounded memory.

Big tables are never read whole: of speech a few utterances of each cluster, of rejects the first `MAX_REJECTS`, of
Parquet files the footers, and those of `MAX_FOOTERS` shards of a table at most.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import soundfile
import yaml

from salad_ray.config import PROTOCOLS
from salad_ray.distill.checkpoints import latest
from salad_ray.flow import TRAINED, TRUNK
from salad_ray.runs import Places
from salad_ray.speech.audio import load_utterance
from salad_ray.store import list_folder
from salad_ray.tables import BadInput, Reject, Table, TableError, Utterance, read_json

SCORED = ("base", *TRAINED, "cascade")
MEASURED = ("untrained", *TRAINED)
MAX_REJECTS = 200_000
MAX_REASONS = 100
MAX_FOOTERS = 32
MAX_CLIP_SHARDS = 64
CLIP_RATE = 16_000
CLIP_BYTES_PER_SEC = 4_000
"""MP3 at 32 kbit/s: every browser plays it, and it is written seven times as fast as Opus."""
MIN_CLIP_SECS = 5.0
CLIPS_PER_CLUSTER = {"probe": 2, "active": 1}


@dataclass(frozen=True)
class TableFacts:
    """One table as its manifest describes it; `num_bytes` is an estimate where footers were sampled."""

    set: str
    name: str
    stage: str
    state: str
    num_rows: int | None
    num_rejected: int
    seconds: float | None
    num_bytes: int | None
    is_estimate: bool
    manifest: dict[str, Any]

    @property
    def label(self) -> str:
        return "/".join(filter(None, (self.set, self.name)))


@dataclass(frozen=True)
class Curve:
    """A training log; `state` says how far an unfinished training is."""

    name: str
    rows: list[dict[str, float]]
    state: str


@dataclass(frozen=True)
class RejectGroup:
    """Rejects of a stage whose reasons differ only in numbers, names and paths; with one of them."""

    set: str
    stage: str
    reason: str
    count: int
    key: str
    example: str


@dataclass(frozen=True)
class Clip:
    """A spoken passage of a cluster, as MP3; `loss` is its distillation loss after Stage I, nats per position."""

    set: str
    cluster_id: int
    utt_id: str
    text: str
    domain: str
    speaker: str
    duration_secs: float
    loss: float | None
    audio: bytes


@dataclass(frozen=True)
class ClusterFacts:
    """A cluster; `place` (2,) is its centroid on the first two principal components of all centroids."""

    cluster_id: int
    num_passages: int
    web_share: float
    place: tuple[float, float] | None
    terms: list[str]
    closest: list[str]
    selection: dict[str, Any]
    """A row of `by_cluster`; empty before `select`."""
    clips: list[Clip]


@dataclass(frozen=True)
class RunFacts:
    """Everything that the page shows of one run; what was not measured is empty."""

    run_dir: str
    name: str
    config: dict[str, Any]
    config_text: str
    metrics: dict[str, Any]
    tables: list[TableFacts]
    curves: list[Curve]
    clusters: list[ClusterFacts]
    num_clips_left_out: int
    rejects: list[RejectGroup]
    num_rejects_read: int
    problems: list[str] = field(default_factory=list)
    """Tables that could not be read, and why."""
    sweeps: list[dict[str, Any]] = field(default_factory=list)
    """results.json of every finished sweep."""

    def table(self, set_name: str, name: str) -> dict[str, Any]:
        """The manifest of a finished table, or an empty one."""
        found = (table.manifest for table in self.tables if (table.set, table.name) == (set_name, name))
        return next(found, {})


def collect(places: Places, clip_bytes: int = 5_500_000) -> RunFacts:
    """Read what there is of a run.

    Args:
        clip_bytes: room in the page for the run's audio.
    """
    problems: list[str] = []
    config = _attempt(lambda: _json(places.index_url), {}, problems).get("config", {})
    metrics = _attempt(lambda: _json(f"{places.report_url}/metrics.json"), {}, problems)
    tables = [facts for label in places.keys if (facts := _table(places.labelled(label), problems))]
    clusters = _attempt(lambda: _clusters(places, metrics.get("selection") or {}), [], problems)
    protocol = (metrics.get("selection") or {}).get("protocol", PROTOCOLS[0])
    left_out = _attempt(lambda: _add_clips(places, clusters, clip_bytes, problems, protocol), 0, problems)
    num_read, rejects = _rejects(places, problems)
    return RunFacts(
        run_dir=places.run_dir,
        name=places.name,
        config=config,
        config_text=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        metrics=metrics,
        tables=tables,
        curves=[curve for name in TRAINED if (curve := _attempt(partial(_curve, places, name), None, problems))],
        clusters=clusters,
        num_clips_left_out=left_out,
        rejects=rejects,
        num_rejects_read=num_read,
        problems=problems,
        sweeps=_attempt(lambda: _sweeps(places.run_dir), [], problems),
    )


def _sweeps(run_dir: str) -> list[dict[str, Any]]:
    found = (_json(f"{run_dir}/sweeps/{name}/results.json") for name in sorted(list_folder(f"{run_dir}/sweeps")))
    return [result for result in found if result]


def _attempt(work: Callable[[], Any], default: Any, problems: list[str]) -> Any:
    """What `work` returns; a damaged file is told on the page and does not take the rest of it away."""
    try:
        return work()
    except (TableError, OSError) as error:
        problems.append(str(error))
        return default


def _json(url: str) -> dict[str, Any]:
    try:
        return read_json(url) or {}
    except ValueError as error:
        raise TableError(f"{url} is damaged ({error}); delete it and rerun the stage that writes it") from None


def _table(table: Table, problems: list[str]) -> TableFacts | None:
    manifest = _attempt(lambda: _json(f"{table.url}/manifest.json"), {}, problems)
    begun = {} if manifest else _attempt(lambda: _json(f"{table.url}/begun.json"), {}, problems)
    if not manifest and not begun:
        return None
    shards = table.shards()
    num_bytes = _attempt(lambda: _num_bytes(table, shards), None, problems)
    rows = manifest.get("num_rows", manifest.get("num_positions"))
    return TableFacts(
        set=table.set,
        name=table.name,
        stage=str((manifest or begun).get("stage", "")),
        state="done" if manifest else f"begun, {len(shards)} shards",
        num_rows=rows,
        num_rejected=int(manifest.get("num_rejected", 0)),
        seconds=manifest.get("train_seconds", manifest.get("seconds")),
        num_bytes=num_bytes,
        is_estimate=len(shards) > MAX_FOOTERS,
        manifest=manifest or begun,
    )


def _num_bytes(table: Table, shards: Sequence[str]) -> int | None:
    """Bytes of the shards' data; of many shards, from evenly spaced ones."""
    if not shards:
        return None
    step = -(-len(shards) // MAX_FOOTERS)
    sample = shards[::step]
    footers = [table.metadata(shard) for shard in sample]
    total = sum(
        footer.row_group(group).column(column).total_compressed_size
        for footer in footers
        for group in range(footer.num_row_groups)
        for column in range(footer.num_columns)
    )
    return round(total * len(shards) / len(sample))


def _curve(places: Places, name: str) -> Curve | None:
    """The training log of the manifest; of unfinished training that of its last checkpoint; before Stage I's decay
    that of its trunk."""
    url = places.table("", name).url
    if name == TRAINED[0] and not _json(f"{url}/begun.json"):
        url = places.table("", TRUNK).url
    manifest = _json(f"{url}/manifest.json")
    if manifest:
        return Curve(name, manifest.get("log", []), "finished")
    progress = _json(f"{url}/progress.json")
    if not progress:
        return None
    checkpoint = latest(f"{url}/checkpoints")
    rows = checkpoint.state.get("log", []) if checkpoint else []
    return Curve(name, rows, f"unfinished: step {progress.get('step')} of {progress.get('num_steps')}")


def _clusters(places: Places, selection: Mapping[str, Any]) -> list[ClusterFacts]:
    """The clusters, those with the largest M(c) first; before `select` in their own order."""
    table = places.table("web", "centroids")
    if table.manifest() is None:
        return []
    cards = {card["cluster_id"]: card for card in _json(f"{table.url}/cards.json").get("clusters", [])}
    selected = {row["cluster_id"]: row for row in selection.get("by_cluster", [])}
    rows = [row for shard in table.shards() for row in table.read(shard).to_pylist()]
    spots = principal_places([np.frombuffer(row["centroid"], np.float32) for row in rows])
    clusters = [
        ClusterFacts(
            cluster_id=row["cluster_id"],
            num_passages=row["num_passages"],
            web_share=row["web_share"],
            place=place,
            terms=cards.get(row["cluster_id"], {}).get("terms", []),
            closest=cards.get(row["cluster_id"], {}).get("closest", []),
            selection=selected.get(row["cluster_id"], {}),
            clips=[],
        )
        for row, place in zip(rows, spots, strict=True)
    ]
    return sorted(clusters, key=lambda cluster: (-cluster.selection.get("distillation", 0.0), cluster.cluster_id))


def principal_places(centroids: Sequence[np.ndarray]) -> list[tuple[float, float]]:
    """The first two principal components of K centroids (dim,); signs fixed so that the picture is always the same."""
    if not centroids:
        return []
    points = np.stack(centroids).astype(np.float64)
    points -= points.mean(axis=0)
    _, _, axes = np.linalg.svd(points, full_matrices=False)
    axes = axes[:2] * np.sign(np.take_along_axis(axes[:2], np.abs(axes[:2]).argmax(axis=1)[:, None], 1))
    flat = np.zeros((len(points), 2))
    flat[:, : len(axes)] = points @ axes.T
    return [(float(x), float(y)) for x, y in flat]


@dataclass(frozen=True)
class _Wanted:
    """An utterance to be heard: where it lies, and what it will take."""

    set: str
    shard: str
    utt_id: str
    cluster_id: int
    num_bytes: int


def _add_clips(
    places: Places, clusters: list[ClusterFacts], clip_bytes: int, problems: list[str], protocol: str
) -> int:
    """Give the clusters their clips, within the budget; returns how many there was no room for."""
    found = [item for name, number in CLIPS_PER_CLUSTER.items() for item in _candidates(places, name, number)]
    longest = max(MIN_CLIP_SECS, clip_bytes * 3 / 4 / CLIP_BYTES_PER_SEC / max(len(found), 1))
    found = [
        replace(item, num_bytes=min(item.num_bytes, round(longest * CLIP_BYTES_PER_SEC * 4 / 3))) for item in found
    ]
    chosen, left_out = _within(found, [cluster.cluster_id for cluster in clusters], clip_bytes)
    losses = _losses(places, {item.utt_id for item in chosen if item.set == "probe"}, protocol)
    by_id = {cluster.cluster_id: cluster for cluster in clusters}
    shards = {(item.set, item.shard) for item in chosen}
    for set_name, shard in sorted(shards, key=lambda place: (place[0] != "probe", place[1])):
        wanted = {item.utt_id: item for item in chosen if (item.set, item.shard) == (set_name, shard)}
        for row in _utterances(places.table(set_name, "utterances"), shard, set(wanted)):
            try:
                clip = _clip(row, set_name, wanted[row.utt_id].cluster_id, losses.get(row.utt_id), longest)
            except (BadInput, OSError, soundfile.LibsndfileError) as error:
                problems.append(f"{set_name}/utterances: {row.utt_id}: {error}")
                continue
            by_id[clip.cluster_id].clips.append(clip)
    return left_out


def _candidates(places: Places, set_name: str, per_cluster: int) -> list[_Wanted]:
    """The first utterances of every cluster: passages were dealt by hash, so these are not hand-picked."""
    table = places.table(set_name, "utterances")
    if table.manifest() is None:
        return []
    found: dict[int, list[_Wanted]] = {}
    for shard in table.shards()[:MAX_CLIP_SHARDS]:
        for row in table.read(shard, ["utt_id", "cluster_id", "duration_secs"]).to_pylist():
            cluster = row["cluster_id"]
            if cluster is not None and len(found.setdefault(cluster, [])) < per_cluster:
                size = round(row["duration_secs"] * CLIP_BYTES_PER_SEC * 4 / 3)  # in base64
                found[cluster].append(_Wanted(set_name, shard, row["utt_id"], cluster, size))
    return [item for items in found.values() for item in items]


def _within(found: Sequence[_Wanted], order: Sequence[int], clip_bytes: int) -> tuple[list[_Wanted], int]:
    """A first clip for every cluster, in this order, before any has a second; returns also how many were left out."""
    rank = {cluster: place for place, cluster in enumerate(order)}
    seen: dict[tuple[str, int], int] = {}
    rounds = []
    for item in (item for item in found if item.cluster_id in rank):
        nth = seen[item.set, item.cluster_id] = seen.get((item.set, item.cluster_id), -1) + 1
        rounds.append(((nth, item.set != "probe", rank[item.cluster_id]), item))
    chosen, room = [], clip_bytes
    for _, item in sorted(rounds, key=lambda pair: pair[0]):
        if item.num_bytes <= room:
            chosen.append(item)
            room -= item.num_bytes
    return chosen, len(rounds) - len(chosen)


def _utterances(table: Table, shard: str, wanted: set[str]) -> Iterator[Utterance]:
    for row in table.iterate(Utterance, shard, batch_rows=8):
        if row.utt_id in wanted:
            yield row
            wanted = wanted - {row.utt_id}
            if not wanted:
                return


def _clip(row: Utterance, set_name: str, cluster_id: int, loss: float | None, longest: float) -> Clip:
    """At most its first `longest` seconds, so that with many clusters each still has a clip."""
    audio = load_utterance(row, CLIP_RATE)[: round(longest * CLIP_RATE)]
    return Clip(
        set=set_name,
        cluster_id=cluster_id,
        utt_id=row.utt_id,
        text=row.text,
        domain=row.domain,
        speaker=row.speaker,
        duration_secs=len(audio) / CLIP_RATE,
        loss=loss,
        audio=encode_mp3(audio),
    )


def encode_mp3(audio: np.ndarray) -> bytes:
    """Audio (num_samples,) at `CLIP_RATE` as MP3 of `CLIP_BYTES_PER_SEC`."""
    file = io.BytesIO()
    soundfile.write(
        file, audio, CLIP_RATE, format="MP3", subtype="MPEG_LAYER_III", compression_level=0.84, bitrate_mode="CONSTANT"
    )
    return file.getvalue()


def _losses(places: Places, passages: set[str], protocol: str) -> dict[str, float]:
    """The distillation loss of these probe passages after Stage I, nats per position, as a protocol hears them."""
    table = places.table("probe", "measurements_stage1")
    sums: dict[str, np.ndarray] = {}
    for shard in table.shards() if passages and table.manifest() is not None else []:
        for row in table.read(shard, ["passage", "protocol", "distillation", "num_positions"]).to_pylist():
            if row["passage"] in passages and row["protocol"] == protocol:
                total = sums.setdefault(row["passage"], np.zeros(2))
                total += (row["distillation"], row["num_positions"])
    return {passage: float(loss / number) for passage, (loss, number) in sums.items()}


def _rejects(places: Places, problems: list[str]) -> tuple[int, list[RejectGroup]]:
    """The first rejects of every set, grouped; returns also how many were read."""
    groups: dict[tuple[str, str, str], list[Any]] = {}
    num_read = 0
    for label in places.keys:
        table = places.labelled(label).rejects
        for shard in table.shards():
            if num_read >= MAX_REJECTS:
                break
            num_read += _attempt(partial(_group_shard, table, shard, groups), 0, problems)
    found = [RejectGroup(*key, count, *example) for key, (count, *example) in groups.items()]
    found.sort(key=lambda group: (group.set, group.stage, -group.count, group.reason))
    return num_read, found


def _group_shard(table: Table, shard: str, groups: dict[tuple[str, str, str], list[Any]]) -> int:
    num_rows = 0
    for row in table.iterate(Reject, shard, batch_rows=4096):
        num_rows += 1
        key = (table.set, row.stage, reason_shape(row.reason))
        if key not in groups and len(groups) >= MAX_REASONS:
            key = (table.set, row.stage, "other reasons")
        groups.setdefault(key, [0, row.key, row.reason])[0] += 1
    return num_rows


def reason_shape(reason: str) -> str:
    """A reason without what differs from row to row: quoted text, paths and numbers become `…` and `n`."""
    reason = re.sub(r"'[^']*'|\"[^\"]*\"|“[^”]*”", "'…'", reason[:1000])
    reason = re.sub(r"(?<!\S)(?![A-Za-z]+/[A-Za-z]+\b)\S*/\S+", "…", reason)
    return re.sub(r"(?<![\w.])[-−+]?\d[\d,]*(\.\d+)?([eE][-+]?\d+)?", "n", reason)
