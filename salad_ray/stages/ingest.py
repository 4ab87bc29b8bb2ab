"""`ingest`: the embedded world's documents → passages; corpora of recorded speech → checked utterances.

Recordings come in two steps. The catalog: every manifest, table and archive index is read once, in parallel, without
touching audio, and its rows are dealt to shards by the hash of their recording. Then every shard's audio is decoded and
checked. Only the first step moves rows between machines, and those are references.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
import ray.data

from salad_ray.config import Config, ConfigError, CorpusConfig, identity
from salad_ray.console import progress, say
from salad_ray.speech.audio import check_recording
from salad_ray.speech.corpora import Source, corpus_name, find_sources, scan, source_stamp
from salad_ray.speech.readers import language_code, split_of
from salad_ray.stages.common import (
    ShardPart,
    Stage,
    StageError,
    check_strict,
    checked_counts,
    keep_or_reject,
    run_shards,
    start_ray,
    windows,
    write_shard,
)
from salad_ray.tables import (
    Passage,
    Reject,
    Table,
    Utterance,
    fingerprint,
    from_arrow,
    schema_of,
    stable_hash,
    to_arrow,
)
from salad_ray.text.world import DOMAINS, world_passages

SCAN_ROWS = 2000
"""Rows that a scan hands on at once."""
CHECK_ROWS = 256
MAX_PARTITIONS = 2048
"""Of the exchange in which rows find their shards; a partition carries as many shards as it must."""
SCANNED = pa.schema([*schema_of(Utterance), pa.field("shard", pa.int64()), pa.field("reason", pa.string())])
"""An utterance, or the key and the reason of a reject, and the shard it is dealt to."""


def run(config: Config) -> None:
    """Write `<set>/passages` (text that is spoken later), or `natural/catalog` and `natural/utterances`."""
    if config.set == "natural" and config.ingest.corpora:
        catalog = make_catalog(config)
        stage = Stage(
            "ingest",
            Table(config.run_dir, "natural", "utterances"),
            identity(config, "ingest.quality"),
            {"catalog": catalog["fingerprint"]},
        )
        worker: Any = CheckShard
        items: dict[str, Any] = {name: name for name in catalog["shards"]}
    else:
        stage, worker = _world_stage(config), WorldPassages
        items = {name: index for index, name in enumerate(shard_names(config))}
    run_shards(config, stage, items, partial(worker, config))


def shard_names(config: Config) -> list[str]:
    return [f"part-{index:05d}" for index in range(config.ingest.num_shards)]


def _world_stage(config: Config) -> Stage:
    unknown = set(config.world.unheard) - set(DOMAINS)
    if unknown:
        raise ConfigError(f"world.unheard={sorted(unknown)}: the world's domains are {', '.join(DOMAINS)}")
    size = {"natural": "num_natural", "heldout": "num_heldout"}.get(config.set, "num_web")
    keys = (f"world.{size}", "ingest.num_shards", "seed", *(["world.unheard"] if config.set == "natural" else []))
    return Stage("ingest", Table(config.run_dir, config.set, "passages"), identity(config, *keys), {})


class WorldPassages:
    """Every shard takes each num_shards-th document, so all domains are in all shards."""

    def __init__(self, config: Config) -> None:
        world = config.world
        heard = tuple(domain for domain in DOMAINS if domain not in world.unheard)
        number, domains, split = {
            "natural": (world.num_natural, heard, "train"),
            "heldout": (world.num_heldout, DOMAINS, "test"),
        }.get(config.set, (world.num_web, DOMAINS, config.set))
        self.passages = world_passages(number, domains, config.seed, split)
        self.num_shards = config.ingest.num_shards

    def __call__(self, index: int) -> Iterator[ShardPart]:
        rows = self.passages[index :: self.num_shards]
        yield ShardPart(to_arrow(Passage, rows), len(rows), len(rows))


class CheckShard:
    """Decodes the audio of a catalog shard and checks it and its transcript; the rows get their true durations."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.catalog = Table(config.run_dir, "natural", "catalog")

    def __call__(self, shard: str) -> Iterator[ShardPart]:
        quality, strict = self.config.ingest.quality, self.config.strict
        for rows in windows(self.catalog.iterate(Utterance, shard), CHECK_ROWS):
            kept, rejects = keep_or_reject(
                "ingest", rows, lambda row: row.utt_id, lambda row: check_recording(row, quality), strict
            )
            yield ShardPart(to_arrow(Utterance, kept), len(rows), len(kept), rejects, _hours(kept))


def _hours(rows: list[Utterance]) -> dict[str, float]:
    """Audio of each corpus and licence, in hours; the model card tells them."""
    hours: dict[str, float] = {}
    for row in rows:
        key = f"hours of {row.corpus}, {row.license or 'licence unknown'}"
        hours[key] = hours.get(key, 0.0) + row.duration_secs / 3600
    return hours


def make_catalog(config: Config) -> dict[str, Any]:
    """Read all sources and deal their rows to shards; returns the manifest of `natural/catalog`.

    An interrupted catalog is begun again: reading it costs little beside the audio, whose checks continue.

    Raises:
        ConfigError: a corpus that is not there, or not of a kind that is known.
        StageError: the corpora changed since, or too much of them is unusable.
    """
    found = [(corpus, find_sources(corpus)) for corpus in config.ingest.corpora]
    stage = Stage(
        "ingest",
        Table(config.run_dir, "natural", "catalog"),
        identity(config, "ingest.corpora", "ingest.languages", "ingest.heldout_share", "ingest.split_by")
        | identity(config, "ingest.num_shards"),
        {corpus_name(corpus): _stamp(sources) for corpus, sources in found},
    )
    manifest = stage.table.manifest()
    if manifest is not None and stage.is_done():
        check_strict(config, stage)
        return manifest
    started = time.monotonic()
    stage.begin()
    _deal(config, stage, found)
    counts = checked_counts(config, stage, shard_names(config))
    seconds = round(time.monotonic() - started, 2)
    manifest = stage.finish(**counts, seconds=seconds)
    check_strict(config, stage)
    say(f"ingest: {counts['num_kept']:,} utterances in {sum(len(s) for _, s in found):,} files, {seconds:.1f} s")
    return manifest


def _stamp(sources: list[Source]) -> str:
    with ThreadPoolExecutor(32) as threads:
        stamps = threads.map(source_stamp, sources)
        return fingerprint(dict(zip((source.url for source in sources), stamps, strict=True)))


def _deal(config: Config, stage: Stage, found: list[tuple[CorpusConfig, list[Source]]]) -> None:
    """Scan the sources on all machines and write the shards, which Ray Data groups."""
    start_ray(config)
    items = [
        {"source": json.dumps(asdict(source)), "corpus": corpus.model_dump_json()}
        for corpus, sources in found
        for source in sources
    ]
    names = shard_names(config)
    groups = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .map_batches(partial(_scan, config), batch_size=1, num_cpus=1)
        .groupby("shard", num_partitions=min(len(names), MAX_PARTITIONS))
        .map_groups(partial(_write_group, config, stage.table), batch_format="pyarrow")
    )
    missing = set(names)
    with progress("ingest: catalog", len(names), "shards") as advance:
        for row in groups.iter_rows():
            missing.discard(row["shard"])
            advance(1)
    for name in sorted(missing):  # no recording fell to it
        write_shard(stage.table, name, iter([ShardPart(to_arrow(Utterance, []), 0, 0)]))


def _scan(config: Config, item: dict[str, Any]) -> Iterator[pa.Table]:
    """The rows of one source, some thousands at a time."""
    corpus = CorpusConfig.model_validate_json(item["corpus"][0])
    source = Source(**json.loads(item["source"][0]))
    unpacked = f"{config.run_dir}/natural/unpacked"
    rows = scan(source, corpus, config.ingest.max_member_bytes, unpacked)
    try:
        while piece := list(islice(rows, SCAN_ROWS)):
            yield pa.Table.from_pylist([_scanned(config, row) for row in piece], schema=SCANNED)
    except OSError as error:  # a reject would lose all that the file holds, for what may pass
        raise StageError(f"ingest: {source.url} cannot be read ({error}); mend that and run the stage again") from None


def _scanned(config: Config, row: Utterance | Reject) -> dict[str, Any]:
    ingest = config.ingest
    if isinstance(row, Utterance) and ingest.languages and language_code(row.language) not in ingest.languages:
        names = ", ".join(ingest.languages)
        row = Reject("ingest", row.utt_id, f"language '{row.language}' is not among ingest.languages ({names})")
    if isinstance(row, Reject):
        return {"utt_id": row.key, "reason": row.reason, "shard": stable_hash(row.key) % ingest.num_shards}
    undivided = f"{row.corpus}/{row.speaker}" if ingest.split_by == "speaker" and row.speaker else row.source
    row = replace(row, split=split_of(undivided, ingest.heldout_share))
    return asdict(row) | {"shard": stable_hash(row.recording_id) % ingest.num_shards}


def _write_group(config: Config, table: Table, group: pa.Table) -> dict[str, Any]:
    """Write one shard of the catalog, its rows in an order that does not depend on how they came."""
    name = shard_names(config)[group["shard"][0].as_py()]
    reasons = group["reason"].to_pylist()
    rejects = [
        Reject("ingest", key, reason)
        for key, reason in zip(group["utt_id"].to_pylist(), reasons, strict=True)
        if reason is not None
    ]
    found = group.filter(pa.compute.is_null(group["reason"])).select(schema_of(Utterance).names)
    rows = sorted(from_arrow(Utterance, found), key=lambda row: (row.recording_id, row.offset_secs, row.order or 0))
    kept: dict[str, Utterance] = {}
    for row in rows:
        if row.utt_id in kept:
            rejects.append(Reject("ingest", row.utt_id, "an utterance of this id was read already"))
        kept.setdefault(row.utt_id, row)
    rejects.sort(key=lambda reject: (reject.key, reject.reason))
    write_shard(table, name, iter([ShardPart(to_arrow(Utterance, kept.values()), len(group), len(kept), rejects)]))
    return {"shard": [name]}
