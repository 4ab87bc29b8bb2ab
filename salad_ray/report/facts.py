"""What the page tells of a run, read from its tables and manifests alone, in bounded memory.

Big tables are never read whole: of speech a few utterances of each cluster, of rejects the first `MAX_REJECTS`.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import soundfile

from salad_ray.config import PROTOCOLS
from salad_ray.distill.checkpoints import latest
from salad_ray.flow import TRAINED
from salad_ray.names import ACTIVE, CENTROIDS, PROBE, STAGE1, TRUNK, UTTERANCES, WEB, measurements_of
from salad_ray.report.rows import Row
from salad_ray.runs import Places, num_bytes
from salad_ray.speech.audio import load_utterance
from salad_ray.store import list_folder
from salad_ray.tables import BadInput, Reject, Table, TableError, Utterance, read_json

MAX_REJECTS = 200_000
MAX_REASONS = 100
MAX_CLIP_SHARDS = 64
CLIP_RATE = 16_000
CLIP_BYTES_PER_SEC = 4_000
"""MP3 at 32 kbit/s: every browser plays it, and it is written seven times as fast as Opus."""
MIN_CLIP_SECS = 5.0
CLIPS_PER_CLUSTER = {PROBE: 2, ACTIVE: 1}


@dataclass(frozen=True)
class RunFacts:
    """Everything that the page shows of one run; what was not measured is empty."""

    run_dir: str
    title: str = ""
    """Tells it from the other runs of a page; "" where there are none."""
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Row] = field(default_factory=dict)
    """Label of a table → its manifest (of one that is not finished, how it began), with its `state` and `num_bytes`."""
    curves: list[Row] = field(default_factory=list)
    """The `log` of each training of a `system`, and its `state`."""
    clusters: list[Row] = field(default_factory=list)
    """What each is about and, after `select`, its row of `by_cluster`; with `clips` of passages as MP3."""
    num_clips_left_out: int = 0
    rejects: list[Row] = field(default_factory=list)
    """Rejects of a stage, one row for those whose reasons differ only in numbers, names and paths."""
    num_rejects_read: int = 0
    sweeps: list[dict[str, Any]] = field(default_factory=list)
    """results.json of every finished sweep."""
    problems: list[str] = field(default_factory=list)
    """Tables that could not be read, and why."""


def collect(places: Places, clip_bytes: int = 5_500_000, title: str = "") -> RunFacts:
    """Read what there is of a run.

    Args:
        clip_bytes: room in the page for the run's audio.
    """
    reader = _Reader(places)
    metrics = reader.attempt({}, _json, f"{places.report_url}/metrics.json")
    selection = metrics.get("selection") or {}
    clusters = reader.attempt([], reader.clusters, selection.get("by_cluster", []))
    num_read, rejects = reader.rejects()
    return RunFacts(
        places.run_dir,
        title,
        config=reader.attempt({}, _json, places.index_url).get("config", {}),
        metrics=metrics,
        tables={label: row for label in places.keys if (row := reader.table(places.labelled(label)))},
        curves=[curve for name in TRAINED for curve in reader.attempt([], reader.curve, name)],
        clusters=clusters,
        num_clips_left_out=reader.attempt(0, reader.add_clips, clusters, clip_bytes, selection.get("protocol")),
        rejects=rejects,
        num_rejects_read=num_read,
        sweeps=reader.attempt([], reader.sweeps),
        problems=reader.problems,
    )


def _json(url: str) -> dict[str, Any]:
    try:
        return read_json(url) or {}
    except ValueError as error:
        raise TableError(f"{url} is damaged ({error}); delete it and rerun the stage that writes it") from None


class _Reader:
    """Reads a run; a damaged file is told on the page and does not take the rest of it away."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.problems: list[str] = []

    def attempt(self, default: Any, read: Callable[..., Any], *args: Any) -> Any:
        try:
            return read(*args)
        except (TableError, OSError) as error:
            self.problems.append(str(error))
            return default

    def sweeps(self) -> list[dict[str, Any]]:
        folder = f"{self.places.run_dir}/sweeps"
        return [found for name in sorted(list_folder(folder)) if (found := _json(f"{folder}/{name}/results.json"))]

    def table(self, table: Table) -> Row | None:
        manifest = self.attempt({}, _json, f"{table.url}/manifest.json")
        begun = {} if manifest else self.attempt({}, _json, f"{table.url}/begun.json")
        if not manifest and not begun:
            return None
        state = "done" if manifest else f"begun, {len(table.shards())} shards"
        return (manifest or begun) | {"state": state, "num_bytes": self.attempt(None, num_bytes, table)}

    def curve(self, name: str) -> list[Row]:
        """The training log of the manifest; of unfinished training that of its last checkpoint; before Stage I's decay
        that of its trunk."""
        url = self.places.table("", name).url
        if name == STAGE1 and not _json(f"{url}/begun.json"):
            url = self.places.table("", TRUNK).url
        if manifest := _json(f"{url}/manifest.json"):
            facts = {"log": manifest.get("log", []), "train_seconds": manifest.get("train_seconds")}
            return [facts | {"system": name, "state": "finished"}]
        progress = _json(f"{url}/progress.json")
        checkpoint = latest(f"{url}/checkpoints") if progress else None
        state = f"unfinished: step {progress.get('step')} of {progress.get('num_steps')}"
        log = checkpoint.state.get("log", []) if checkpoint else []
        return [{"system": name, "state": state, "log": log}] if progress else []

    def clusters(self, selected: Sequence[Row]) -> list[Row]:
        """The clusters, those with the largest M(c) first; before `select` in their own order. `place` (2,) is that of
        the centroid on the first two principal components of all."""
        table = self.places.table(WEB, CENTROIDS)
        if table.manifest() is None:
            return []
        rows = [row for shard in table.shards() for row in table.read(shard).to_pylist()]
        places = principal_places([np.frombuffer(row.pop("centroid"), np.float32) for row in rows])
        by_id = {row["cluster_id"]: row | {"clips": [], "place": at} for row, at in zip(rows, places, strict=True)}
        for row in (*_json(f"{table.url}/cards.json").get("clusters", []), *selected):
            by_id.get(row["cluster_id"], {}).update(row)
        return sorted(by_id.values(), key=lambda row: (-row.get("distillation", 0.0), row["cluster_id"]))

    def add_clips(self, clusters: Sequence[Row], clip_bytes: int, protocol: str | None) -> int:
        """Give the clusters their clips, within the budget; returns how many there was no room for.

        Each cluster has a first clip, in their order, before any has a second. None is longer than leaves one to each.
        """
        rank = {row["cluster_id"]: place for place, row in enumerate(clusters)}
        found = [row for name in CLIPS_PER_CLUSTER for row in self.candidates(name) if row["cluster_id"] in rank]
        longest = max(MIN_CLIP_SECS, clip_bytes * 3 / 4 / CLIP_BYTES_PER_SEC / max(len(found), 1))
        chosen = []
        for row in sorted(found, key=lambda row: (row["nth"], row["set"] != PROBE, rank[row["cluster_id"]])):
            needed = round(min(row["duration_secs"], longest) * CLIP_BYTES_PER_SEC * 4 / 3)  # in base64
            if needed <= clip_bytes:
                chosen.append(row)
                clip_bytes -= needed
        losses = self.losses({row["utt_id"] for row in chosen if row["set"] == PROBE}, protocol or PROTOCOLS[0])
        chosen.sort(key=lambda row: (row["set"] != PROBE, row["shard"]))
        for (set_name, shard), rows in groupby(chosen, key=lambda row: (row["set"], row["shard"])):
            wanted = {row["utt_id"]: rank[row["cluster_id"]] for row in rows}
            for utterance in _utterances(self.places.table(set_name, UTTERANCES), shard, set(wanted)):
                try:
                    clip = _clip(utterance, longest) | {"set": set_name, "loss": losses.get(utterance.utt_id)}
                    clusters[wanted[utterance.utt_id]]["clips"].append(clip)
                except (BadInput, OSError, soundfile.LibsndfileError) as error:
                    self.problems.append(f"{set_name}/{UTTERANCES}: {utterance.utt_id}: {error}")
        return len(found) - len(chosen)

    def candidates(self, set_name: str) -> Iterator[Row]:
        """The first utterances of every cluster: passages were dealt by hash, so these are not hand-picked."""
        table, seen = self.places.table(set_name, UTTERANCES), Counter[int]()
        for shard in table.shards()[:MAX_CLIP_SHARDS] if table.manifest() is not None else []:
            for row in table.read(shard, ["utt_id", "cluster_id", "duration_secs"]).to_pylist():
                nth = seen[row["cluster_id"]]
                if nth < CLIPS_PER_CLUSTER[set_name]:
                    seen[row["cluster_id"]] += 1
                    yield row | {"set": set_name, "shard": shard, "nth": nth}

    def losses(self, passages: set[str], protocol: str) -> dict[str, float]:
        """The distillation loss of these probe passages after Stage I, nats per position, as a protocol hears them."""
        table = self.places.table(PROBE, measurements_of(STAGE1))
        sums: dict[str, np.ndarray] = {}
        for shard in table.shards() if passages and table.manifest() is not None else []:
            for row in table.read(shard, ["passage", "protocol", "distillation", "num_positions"]).to_pylist():
                if row["passage"] in passages and row["protocol"] == protocol:
                    total = sums.setdefault(row["passage"], np.zeros(2))
                    total += (row["distillation"], row["num_positions"])
        return {passage: float(loss / number) for passage, (loss, number) in sums.items()}

    def rejects(self) -> tuple[int, list[Row]]:
        """The first rejects of every table, grouped; returns also how many were read."""
        groups: dict[tuple[str, str, str], Row] = {}
        num_read = 0
        for table in (self.places.labelled(label).rejects for label in self.places.keys):
            for shard in table.shards() if num_read < MAX_REJECTS else []:
                num_read += self.attempt(0, _group_shard, table, shard, groups)
        return num_read, sorted(
            groups.values(), key=lambda row: (row["set"], row["stage"], -row["count"], row["reason"])
        )


def principal_places(centroids: Sequence[np.ndarray]) -> list[tuple[float, float]]:
    """The first two principal components of K centroids (dim,); signs fixed so that the picture is always the same."""
    if not centroids:
        return []
    points = np.stack(centroids).astype(np.float64)
    axes = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)[2][:2]
    axes *= np.sign(np.take_along_axis(axes, np.abs(axes).argmax(axis=1)[:, None], 1))
    flat = np.zeros((len(points), 2))
    flat[:, : len(axes)] = (points - points.mean(axis=0)) @ axes.T
    return [(float(x), float(y)) for x, y in flat]


def _utterances(table: Table, shard: str, wanted: set[str]) -> Iterator[Utterance]:
    for row in table.iterate(Utterance, shard, batch_rows=8):
        if row.utt_id in wanted:
            yield row
            wanted = wanted - {row.utt_id}
            if not wanted:
                return


def _clip(row: Utterance, longest: float) -> Row:
    audio = load_utterance(row, CLIP_RATE)[: round(longest * CLIP_RATE)]
    facts = {"text": row.text, "domain": row.domain, "speaker": row.speaker}
    return facts | {"duration_secs": len(audio) / CLIP_RATE, "audio": encode_mp3(audio)}


def encode_mp3(audio: np.ndarray) -> bytes:
    """Audio (num_samples,) at `CLIP_RATE` as MP3 of `CLIP_BYTES_PER_SEC`."""
    file = io.BytesIO()
    quality = {"compression_level": 0.84, "bitrate_mode": "CONSTANT"}
    soundfile.write(file, audio, CLIP_RATE, format="MP3", subtype="MPEG_LAYER_III", **quality)
    return file.getvalue()


def _group_shard(table: Table, shard: str, groups: dict[tuple[str, str, str], Row]) -> int:
    num_rows = 0
    for row in table.iterate(Reject, shard, batch_rows=4096):
        num_rows += 1
        key = (table.set, row.stage, reason_shape(row.reason))
        if key not in groups and len(groups) >= MAX_REASONS:
            key = (table.set, row.stage, "other reasons")
        first = dict(zip(("set", "stage", "reason"), key, strict=True)) | {"key": row.key, "example": row.reason}
        groups.setdefault(key, first | {"count": 0})["count"] += 1
    return num_rows


def reason_shape(reason: str) -> str:
    """A reason without what differs from row to row: quoted text, paths and numbers become `…` and `n`."""
    reason = re.sub(r"'[^']*'|\"[^\"]*\"|“[^”]*”", "'…'", reason[:1000])
    reason = re.sub(r"(?<!\S)(?![A-Za-z]+/[A-Za-z]+\b)\S*/\S+", "…", reason)
    return re.sub(r"(?<![\w.])[-−+]?\d[\d,]*(\.\d+)?([eE][-+]?\d+)?", "n", reason)
