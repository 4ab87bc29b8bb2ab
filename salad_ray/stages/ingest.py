"""`ingest`: the embedded world's documents → passages; folders of recordings → checked utterances."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from salad_ray.config import Config, ConfigError, identity
from salad_ray.speech.audio import check_recording
from salad_ray.speech.readers import TABLE, read_folder, split_of
from salad_ray.stages.common import ShardResult, Stage, StageError, keep_or_reject, run_shards
from salad_ray.tables import Passage, Reject, Table, Utterance, digest, stable_hash, to_arrow
from salad_ray.text.world import DOMAINS, world_passages


def run(config: Config) -> None:
    """Write `<set>/passages` (text that is spoken later) or `<set>/utterances` (recordings)."""
    recorded = config.set == "natural" and config.ingest.natural == "folder"
    table = Table(config.run_dir, config.set, "utterances" if recorded else "passages")
    if recorded:
        read_folders(config)  # a wrong path ends here, in one sentence, before anything starts
        tables = {folder: digest(f"{folder}/{TABLE}") for folder in config.ingest.folders}
        stage = Stage("ingest", table, identity(config, "ingest"), tables)
    else:
        unknown = set(config.world.unheard) - set(DOMAINS)
        if unknown:
            raise ConfigError(f"world.unheard={sorted(unknown)}: the world's domains are {', '.join(DOMAINS)}")
        size = {"natural": "num_natural", "heldout": "num_heldout"}.get(config.set, "num_web")
        keys = (f"world.{size}", "ingest.num_shards", "seed", *(["world.unheard"] if config.set == "natural" else []))
        stage = Stage("ingest", table, identity(config, *keys), {})
    items = {f"part-{index:05d}": index for index in range(config.ingest.num_shards)}
    run_shards(config, stage, items, partial(FolderUtterances if recorded else WorldPassages, config))


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

    def __call__(self, index: int) -> ShardResult:
        rows = self.passages[index :: self.num_shards]
        return ShardResult(to_arrow(Passage, rows), len(rows), len(rows))


class FolderUtterances:
    """A shard takes the recordings that their hash deals to it; the audio is opened, decoded and checked."""

    def __init__(self, config: Config) -> None:
        self.config = config
        utterances, self.rejects = read_folders(config)
        self.shards: dict[int, list[Utterance]] = {}
        for row in utterances:
            self.shards.setdefault(stable_hash(row.recording_id) % config.ingest.num_shards, []).append(row)

    def __call__(self, index: int) -> ShardResult:
        ingest, strict = self.config.ingest, self.config.strict
        mine = self.shards.get(index, [])
        kept, rejects = keep_or_reject(
            "ingest", mine, lambda row: row.utt_id, lambda row: check_recording(row, ingest.quality), strict
        )
        unreadable = self.rejects if index == 0 else []  # lines that never became an utterance
        if unreadable and strict:
            raise StageError(f"ingest: {unreadable[0].key}: {unreadable[0].reason}")
        num_input = len(mine) + len(unreadable)
        return ShardResult(to_arrow(Utterance, kept), num_input, len(kept), rejects + unreadable)


def read_folders(config: Config) -> tuple[list[Utterance], list[Reject]]:
    """All rows of all folders with their split, and the lines that cannot be one."""
    utterances: list[Utterance] = []
    rejects: list[Reject] = []
    names = [folder.rstrip("/").rsplit("/", 1)[-1] for folder in config.ingest.folders]
    if len(set(names)) < len(names):
        raise ConfigError(f"ingest.folders: two of them have the same name ({', '.join(names)}); ids begin with it")
    for folder in config.ingest.folders:
        rows, unusable = read_folder(folder, config.ingest.license)
        rejects += unusable
        for row in rows:
            split = split_of(row.recording_id, config.ingest.heldout_share)
            utterances.append(replace(row, split=split))
    return utterances, rejects
