"""`ingest`: the embedded world's documents, or web text, → passages; recorded speech → checked utterances.

Recordings come in two steps. The catalog: every manifest, table and archive index is read once, in parallel, without
touching audio, and its rows are dealt to shards by the hash of their recording. Then every shard's audio is decoded and
checked. Only the first step moves rows between machines, and those are references.

Benchmarks are small: their items, and the passages that are spoken of them, are written by this process itself.

Web text is read once, in parallel, cut into passages, and these are dealt to shards by the hash of their text: so exact
duplicates meet in one shard, and any shard is a fair sample of the whole.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from salad_ray.config import BenchmarkConfig, Config, ConfigError, CorpusConfig, WebTextConfig
from salad_ray.console import progress, say, user_error
from salad_ray.credentials import redact
from salad_ray.evaluation.benchmarks import prompt_of, read_items, world_items
from salad_ray.flow import Step
from salad_ray.names import BENCHMARK, CATALOG, EXEMPLARS, HELDOUT, INGEST, ITEMS, NATURAL, PASSAGES, TEXT, WEB
from salad_ray.runs import Run
from salad_ray.selection.draw import priorities, probe_bounds
from salad_ray.speech.audio import check_recording
from salad_ray.speech.corpora import Source, attributions, corpus_name, find_sources, scan, source_stamp
from salad_ray.speech.readers import language_code, split_of
from salad_ray.stages.common import (
    Ahead,
    PickPassages,
    Stage,
    Work,
    check_strict,
    checked_counts,
    gather,
    hours_by_corpus,
    picked_shards,
    run_works,
)
from salad_ray.stages.ray_cluster import start_ray
from salad_ray.stages.shards import (
    NOTE_SECS,
    ShardPart,
    StageError,
    WindowWorker,
    count_rows,
    first_line,
    keep_or_reject,
    waiting_gauge,
    write_shard,
)
from salad_ray.store import filesystem, is_local, list_folder
from salad_ray.tables import (
    BadInput,
    Item,
    Passage,
    Reject,
    Table,
    Totals,
    Utterance,
    add_totals,
    delete_folder,
    fingerprint,
    from_arrow,
    read_json,
    schema_of,
    stable_hash,
    table_label,
    to_arrow,
    write_json,
)
from salad_ray.text.decontaminate import NGrams, contaminated, read_benchmark_texts, word_ngrams
from salad_ray.text.documents import Document, TextSource, find_text_sources, read_documents, text_corpus_name
from salad_ray.text.documents import source_stamp as text_stamp
from salad_ray.text.passages import Limits, cut_passages, estimated_word_pieces
from salad_ray.text.world import DOMAINS, world_passages

SCAN_ROWS = 2000
"""Rows that a scan hands on at once."""
CHECK_ROWS = 256
ITEMS_PER_SHARD = 32
MIN_FAILURES = 20
"""Documents of a source at which something unforeseen fails, more than are cut: a systematic error."""
DECONTAMINATE = "name those that will be evaluated in evaluate.benchmarks or ingest.passages.benchmarks"
SCAN_NOTE_SECS = 20.0
"""Between two notes of a task of how far its source is read."""
MAX_PARTITIONS = 2048
"""Of the exchange in which rows find their shards; a partition carries as many shards as it must."""
MAX_AGGREGATORS = 128
"""Processes in which the rows of a partition meet: Ray's own number, above which this would be no bound."""
DEALT = [pa.field("shard", pa.int64()), pa.field("reason", pa.string()), pa.field("cut", pa.string())]
"""Where a row is dealt to; of a reject, whose key stands in the first column, the reason; and with the first row of a
document, as JSON, what was cut out of it."""


def sources(config: Config, step: Step) -> dict[str, Any]:
    """Stamps of what is read: an edited corpus is another one, and its tables lie elsewhere."""
    if step.set == BENCHMARK:
        if step.reads:
            return {"voices": len(_voices(config))}
        return {"items": fingerprint({"rows": [asdict(row) for row in (*_items(config), *_exemplars(config))]})}
    if step.set in (WEB, TEXT) and _text_corpora(config, step.set):
        stamps = {text_corpus_name(corpus): _text_stamp(corpus) for corpus in _text_corpora(config, step.set)}
        texts = fingerprint({"texts": _benchmark_texts(config)})
        return {"corpora": stamps, "benchmarks": texts, "max_words": config.max_words}
    if step.set == TEXT:
        return {"benchmarks": fingerprint({"texts": _world_benchmark_texts(config)})}
    if CATALOG in step.tables:
        return {corpus_name(corpus): _stamp(find_sources(corpus)) for corpus in config.ingest.corpora}
    return {}


def make(run: Run, step: Step) -> None:
    """Write `<set>/passages` of web text, `natural/catalog`, or the benchmarks' items and what is spoken of them."""
    if step.set == BENCHMARK:
        make_benchmark_passages(run, step) if step.reads else make_items(run, step)
    elif CATALOG in step.tables:
        make_catalog(run, step)
    elif step.set == HELDOUT:
        keep_aside(run, step)
    else:
        make_passages(run, step)


def work(run: Run, step: Step, ahead: Ahead) -> Work:
    """`<set>/passages` of the embedded world, or `natural/utterances`, which are checked."""
    config, stage = run.config, Stage.of(run, step, ahead=ahead)
    if stage.inputs:
        [(label, catalog)] = stage.inputs.items()
        worker: Any = partial(CheckShard, config, run.labelled(label))
        return Work(stage, {name: name for name in catalog["shards"]}, worker)
    _require_domains(config)
    items = {name: index for index, name in enumerate(shard_names(config))}
    if step.set == TEXT:
        return Work(stage, items, partial(WorldText, config))
    return Work(stage, items, partial(WorldPassages, config, step.set))


def shard_names(config: Config) -> list[str]:
    return [f"part-{index:05d}" for index in range(config.ingest.num_shards)]


def _require_domains(config: Config) -> None:
    if unknown := set(config.world.domains) - set(DOMAINS):
        raise ConfigError(f"world.domains={sorted(unknown)}: the world's domains are {', '.join(DOMAINS)}")


class WorldPassages:
    """Every shard takes each num_shards-th document, so all domains are in all shards."""

    def __init__(self, config: Config, set_name: str) -> None:
        world = config.world
        number, domains, split = {
            NATURAL: (world.num_natural, world.heard, "train"),
            HELDOUT: (world.num_heldout, world.domains, "test"),
        }.get(set_name, (world.num_web, world.domains, set_name))
        self.passages = world_passages(number, domains, config.seed, split)
        self.num_shards = config.ingest.num_shards

    def __call__(self, index: int) -> Iterator[ShardPart]:
        rows = self.passages[index :: self.num_shards]
        yield ShardPart(to_arrow(Passage, rows), len(rows), len(rows))


class WorldText:
    """Documents of a draw of its own, but none that the web text has, too (the probe is taken of it), and none that
    shares a run of words with a question. The held-out ones are of texts that no other draw has (`world_passages`)."""

    def __init__(self, config: Config) -> None:
        world, num_drawn = config.world, config.world.num_text
        web = {row.text: row.passage_id for row in world_passages(world.num_web, world.domains, config.seed, WEB)}
        kept_out = {"a benchmark": word_ngrams(_world_benchmark_texts(config), config.ingest.passages.ngram)}
        self.num_shards = config.ingest.num_shards
        self.passages: list[Passage] = []
        while len(self.passages) < world.num_text:  # a longer draw begins with the shorter one
            drawn = world_passages(num_drawn, world.domains, config.seed, TEXT)
            checked = [_not_in_web(_decontaminated(row, kept_out), web) for row in drawn]
            usable = [replace(row, split="train") for row in checked if isinstance(row, Passage)]
            self.passages, num_drawn = usable[: world.num_text], 2 * num_drawn

    def __call__(self, index: int) -> Iterator[ShardPart]:
        rows = self.passages[index :: self.num_shards]
        yield ShardPart(to_arrow(Passage, rows), len(rows), len(rows))


def _decontaminated(passage: Passage, kept_out: Mapping[str, NGrams]) -> Passage | Reject:
    for where, ngrams in kept_out.items():
        if (match := contaminated(passage.text, ngrams)) is not None:
            return Reject(INGEST, passage.passage_id, f"shares the words '{match}' with {where}")
    return passage


def _not_in_web(passage: Passage | Reject, web: Mapping[str, str]) -> Passage | Reject:
    """Of text that is trained on: a reject where it is the web's, which may be held out or probed. `web`: text → id."""
    if isinstance(passage, Reject) or passage.text not in web:
        return passage
    reason = f"the same text as {web[passage.text]} of the web text, which may be measured"
    return Reject(INGEST, passage.passage_id, reason)


class CheckShard(WindowWorker):
    """Decodes the audio of a catalog shard and checks it and its transcript; the rows get their true durations."""

    def __init__(self, config: Config, catalog: Table) -> None:
        self.config, self.catalog = config, catalog
        self.corpora = {corpus_name(corpus): corpus for corpus in config.ingest.corpora}

    def __call__(self, shard: str) -> Iterator[ShardPart]:
        for rows in self.windows(self.catalog.iterate(Utterance, shard), lambda row: row.utt_id, CHECK_ROWS):
            kept, rejects = keep_or_reject(INGEST, rows, lambda row: row.utt_id, self._checked, self.config.strict)
            yield ShardPart(to_arrow(Utterance, kept), len(rows), len(kept), rejects, hours_by_corpus(kept))

    def _checked(self, row: Utterance) -> Utterance:
        try:
            return check_recording(row, self.config.ingest.quality)
        except BadInput:
            corpus = self.corpora.get(row.corpus)
            if corpus is not None and row.uri is not None:
                _require_folder(corpus, row.uri)
            raise


def _require_folder(corpus: CorpusConfig, uri: str) -> None:
    """Raises `StageError` where a file is missing since this machine lacks its corpus: no fault of the recording."""
    fs, root = filesystem(corpus.root or corpus.path)
    if not (is_local(fs) and uri.startswith("/")) or os.path.exists(uri):
        return
    folder = os.path.commonpath([root, os.path.dirname(uri)])  # the path may be that of a manifest or an archive
    if os.path.isdir(folder):
        with os.scandir(folder) as entries:
            if any(entries):  # an empty one is where nothing is mounted
                return
    raise StageError(
        f"ingest: machine {socket.gethostname()} has nothing in {folder}, where corpus {corpus_name(corpus)} lies; "
        "mount it there, as on the other machines, and run the stage again"
    )


def make_catalog(run: Run, step: Step) -> None:
    """Read all sources and deal their rows to shards.

    An interrupted catalog is begun again: reading it costs little beside the audio, whose checks continue.

    Raises:
        ConfigError: a corpus that is not there, or not of a kind that is known.
        StageError: too much of the corpora is unusable.
    """
    config, stage = run.config, Stage.of(run, step)
    if stage.done_already():
        return
    found = [(corpus, find_sources(corpus)) for corpus in config.ingest.corpora]
    scan_source, write_group = partial(_scan, config, stage.table), partial(_write_group, config, stage.table)
    facts = {"attributions": attributions(config.ingest.corpora)}
    made = _deal(config, stage, found, scan_source, write_group, Utterance, facts)
    num_files = sum(len(sources) for _, sources in found)
    say(f"ingest: {made['num_kept']:,} utterances in {num_files:,} files, {made['seconds']:.1f} s")


def _text_stamp(corpus: WebTextConfig) -> str:
    return fingerprint({"stamps": list(map(text_stamp, find_text_sources(corpus)))})


def _stamp(sources: list[Source]) -> str:
    with ThreadPoolExecutor(32) as threads:
        stamps = threads.map(source_stamp, sources)
        return fingerprint(dict(zip((source.url for source in sources), stamps, strict=True)))


def _deal(
    config: Config,
    stage: Stage,
    found: Sequence[tuple[CorpusConfig | WebTextConfig, Sequence[Source | TextSource]]],
    scan: Callable[[dict[str, Any]], Iterator[pa.Table]],
    write_group: Callable[[pa.Table], dict[str, Any]],
    row_type: type,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Make a table: read the corpora's sources on all machines and write the shards, which Ray Data groups.

    Args:
        facts: for the manifest.

    Returns:
        The manifest.

    Raises:
        StageError: rows were lost between machines, or too much of them is unusable.
    """
    started = time.monotonic()
    stage.begin()
    _say_unread(stage, [source for _, sources in found for source in sources])
    items = [
        {"source": json.dumps(asdict(source)), "corpus": corpus.model_dump_json()}
        for corpus, sources in found
        for source in sources
    ]
    start_ray(config)
    scanned = f"{stage.table.url}/scanned"
    delete_folder(scanned)  # of a run that was interrupted, perhaps of other sources
    names = shard_names(config)
    at_once = ray.data.TaskPoolStrategy(config.ray.max_actors)
    tags = {"run": config.run_dir, "stage": stage.name, "set": stage.table.set or "-"}
    sources = ray.data.from_items(items, override_num_blocks=len(items))
    if config.ray.max_actors:  # of this data set alone; they hold CPUs, too
        sources.context.max_hash_shuffle_aggregators = min(config.ray.max_actors, MAX_AGGREGATORS)
    groups = (
        sources.map_batches(partial(_counted, scan, scanned, tags), batch_size=1, num_cpus=1, compute=at_once)
        .groupby("shard", num_partitions=min(len(names), MAX_PARTITIONS))
        .map_groups(write_group, batch_format="pyarrow", compute=at_once)
    )
    missing = set(names)
    with (
        DealingPace(stage.table, tags, len(items), len(names)) as pace,
        progress(stage.label, len(names), "shards") as advance,
    ):
        for row in groups.iter_rows():
            missing.discard(row["shard"])
            pace.num_written += 1
            advance(1)
    for name in sorted(missing):  # nothing fell to it
        write_shard(stage.table, name, iter([ShardPart(to_arrow(row_type, []), 0, 0)]))
    counts = checked_counts(config, stage, names)
    if (num_scanned := _num_scanned(scanned)) != counts["num_input"]:
        raise StageError(
            f"{stage.label}: rows were lost ({num_scanned:,} were read, {counts['num_input']:,} came to shards); "
            "please report this as a bug"
        )
    manifest = stage.finish(**counts, **facts, seconds=round(time.monotonic() - started, 2))
    check_strict(config, stage)
    return manifest


def _say_unread(stage: Stage, sources: Sequence[Source | TextSource]) -> None:
    """Name the files beside those that are read; each is a reject, too."""
    unread = [one for one in sources if (one.kind if isinstance(one, TextSource) else one.format) == "unread"]
    if unread:
        number = len(unread) + sum(one.num_more for one in unread)
        names = ", ".join(one.url.rpartition("/")[2] for one in unread)
        more = ", …" if number > len(unread) else ""
        say(f"{stage.label}: {number:,} files of other kinds are not read: {names}{more}")


def _counted(
    scan: Callable[[dict[str, Any]], Iterator[pa.Table]], scanned: str, tags: dict[str, str], item: dict[str, Any]
) -> Iterator[pa.Table]:
    """What a scan yields. How many rows that was goes to a file of the source's own, which a retry writes again, and to
    Ray's metrics, which count a source twice that is read twice."""
    source, corpus = str(item["source"][0]), str(item["corpus"][0])
    name = f"{stable_hash(source, corpus):016x}"
    note: dict[str, Any] = {"source": source, "num_rows": 0, "num_rejected": 0, "read": False}
    noted = time.monotonic()
    for piece in scan(item):
        num_rejected = len(piece) - piece["reason"].null_count if "reason" in piece.column_names else 0
        note["num_rows"] += len(piece)
        note["num_rejected"] += num_rejected
        count_rows(tags, len(piece), num_rejected)
        yield piece
        if time.monotonic() - noted > SCAN_NOTE_SECS:
            with suppress(OSError):  # a store that fails now may work at the next note
                write_json(f"{scanned}/reading/{name}.json", note)
            noted = time.monotonic()
    write_json(f"{scanned}/{name}.json", note | {"read": True})


class DealingPace:
    """Notes beside the table, from a thread, how many sources are read and shards written, for `salad status`."""

    def __init__(self, table: Table, tags: dict[str, str], num_sources: int, num_shards: int) -> None:
        self.table, self.tags, self.num_sources, self.num_shards = table, tags, num_sources, num_shards
        self.num_written = 0
        self.notes: dict[str, dict[str, Any]] = {}
        self.started = time.monotonic()
        self.waiting = waiting_gauge()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> DealingPace:
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.ended.set()
        if kind is None:  # else a store that is silent would keep back why this ends
            self.thread.join()
            with suppress(OSError):
                self.note()

    def _watch(self) -> None:
        while not self.ended.wait(NOTE_SECS):
            with suppress(OSError):  # a store that fails now may work at the next note
                self.note()

    def note(self) -> None:
        """Write `progress.json`; until the first rows are read there is nothing to tell."""
        self.waiting.set(self.num_shards - self.num_written, self.tags)
        self._look()
        num_rows, num_rejected, num_read = (
            sum(note[name] for note in self.notes.values()) for name in ("num_rows", "num_rejected", "read")
        )
        secs = time.monotonic() - self.started
        done, total = num_read + self.num_written, self.num_sources + self.num_shards
        if not num_rows:
            return
        note = {
            "done": done,
            "total": total,
            "sources": self.num_sources,
            "sources_read": num_read,
            "num_input": num_rows,
            "num_rejected": num_rejected,
            "rows_per_sec": num_rows / secs,
            "eta_secs": secs / max(done, 0.5) * (total - done),
            "at": time.time(),
        }
        write_json(f"{self.table.url}/progress.json", note)

    def _look(self) -> None:
        """Read the tasks' notes again, but of sources that are read."""
        scanned = f"{self.table.url}/scanned"
        for folder in (f"{scanned}/reading", scanned):  # the whole one of a source replaces what it had before
            names = [name for name in list_folder(folder) if name.endswith(".json")]
            names = [name for name in names if not self.notes.get(name, {}).get("read")]
            with ThreadPoolExecutor(32) as threads:
                found = zip(names, threads.map(read_json, [f"{folder}/{name}" for name in names]), strict=True)
                self.notes |= {name: note for name, note in found if note is not None}


def _num_scanned(scanned: str) -> int:
    with ThreadPoolExecutor(32) as threads:
        notes = threads.map(read_json, [f"{scanned}/{name}" for name in list_folder(scanned) if name.endswith(".json")])
        return sum(note["num_rows"] for note in notes if note is not None)


def dealt_schema(row_type: type) -> pa.Schema:
    return pa.schema([*schema_of(row_type), *DEALT])


def _dealt(config: Config, row_type: type, row: Any, hashed: str, cut: str | None = None) -> dict[str, Any]:
    """A row or a reject, with the shard that it is dealt to."""
    dealt = {"shard": stable_hash(hashed) % config.ingest.num_shards, "cut": cut}
    if isinstance(row, Reject):
        return {schema_of(row_type).names[0]: row.key, "reason": redact(row.reason)} | dealt
    return asdict(row) | dealt


def _undealt(row_type: type, group: pa.Table) -> tuple[list[Any], list[Reject]]:
    """The rows and the rejects of one shard's group."""
    reasons, keys = group["reason"].to_pylist(), group[schema_of(row_type).names[0]].to_pylist()
    rejects = [Reject(INGEST, key, reason) for key, reason in zip(keys, reasons, strict=True) if reason is not None]
    found = group.filter(pa.compute.is_null(group["reason"])).select(schema_of(row_type).names)
    return from_arrow(row_type, found), rejects


def _scan(config: Config, catalog: Table, item: dict[str, Any]) -> Iterator[pa.Table]:
    """The rows of one source, some thousands at a time."""
    corpus = CorpusConfig.model_validate_json(item["corpus"][0])
    source = Source(**json.loads(item["source"][0]))
    rows = scan(source, corpus, config.ingest.max_member_bytes, f"{catalog.url}/unpacked")
    with _reading(source.url):
        while piece := list(islice(rows, SCAN_ROWS)):
            yield pa.Table.from_pylist([_scanned(config, row) for row in piece], schema=dealt_schema(Utterance))


@contextmanager
def _reading(url: str) -> Iterator[None]:
    """What a source fails with, in a sentence; a reject would lose all that it holds."""
    try:
        yield
    except OSError as error:
        raise StageError(f"ingest: {url} cannot be read ({error}); mend that and run the stage again") from None
    except Exception as error:
        if user_error(error) is not None:
            raise
        raise StageError(
            f"ingest: {url}: {type(error).__name__}: {first_line(error)}; please report this as a bug, and "
            "leave the file out until it is mended"
        ) from error


def _scanned(config: Config, row: Utterance | Reject) -> dict[str, Any]:
    ingest = config.ingest
    if isinstance(row, Utterance) and ingest.languages and language_code(row.language) not in ingest.languages:
        names = ", ".join(ingest.languages)
        row = Reject(INGEST, row.utt_id, f"language '{row.language}' is not among ingest.languages ({names})")
    if isinstance(row, Reject):
        return _dealt(config, Utterance, row, row.key)
    undivided = f"{row.corpus}/{row.speaker}" if ingest.split_by == "speaker" and row.speaker else row.source
    row = replace(row, split=row.split or split_of(undivided, ingest.heldout_share))
    return _dealt(config, Utterance, row, row.recording_id)


def _write_group(config: Config, table: Table, group: pa.Table) -> dict[str, Any]:
    """Write one shard of the catalog, its rows in an order that does not depend on how they came."""
    name = shard_names(config)[group["shard"][0].as_py()]
    rows, rejects = _undealt(Utterance, group)
    rows.sort(key=lambda row: (row.recording_id, row.offset_secs, row.order or 0, row.utt_id, row.uri or "", row.text))
    kept: dict[str, Utterance] = {}
    for row in rows:
        if row.utt_id in kept:
            rejects.append(Reject(INGEST, row.utt_id, "an utterance of this id was read already"))
        kept.setdefault(row.utt_id, row)
    rejects.sort(key=lambda reject: (reject.key, reject.reason))
    write_shard(table, name, iter([ShardPart(to_arrow(Utterance, kept.values()), len(group), len(kept), rejects)]))
    return {"shard": [name]}


def make_items(run: Run, step: Step) -> None:
    """Write `benchmark/items`, and `benchmark/exemplars` from other files.

    Raises:
        ConfigError: a benchmark that is not there, or not of its format.
    """
    _write_rows(run, Stage.of(run, step, ITEMS), Item, _items(run.config))
    if EXEMPLARS in step.tables:
        _write_rows(run, Stage.of(run, step, EXEMPLARS), Item, _exemplars(run.config))


def make_benchmark_passages(run: Run, step: Step) -> None:
    """Write `benchmark/passages`: what is spoken of the items, by each voice that is asked for."""
    passages = [
        Passage(
            passage_id=f"{row.item_id}{voice}",
            doc_id=row.item_id,
            text=row.spoken,
            source=row.benchmark,
            domain=row.domain,
            split="test",
            uri=row.audio,
        )
        for row in _items(run.config)
        if isinstance(row, Item)
        for voice in (_voices(run.config) if row.audio is None else ("",))
    ]
    _write_rows(run, Stage.of(run, step), Passage, passages)


def _voices(config: Config) -> tuple[str, ...]:
    return ("", "@voice") if "voice" in config.evaluate.conditions else ("",)


def _items(config: Config) -> list[Item | Reject]:
    """The items of all benchmarks; without any, the world's own questions."""
    if not config.evaluate.benchmarks:
        return list(world_items(config.world.num_questions, config.world.domains, config.seed))
    return [row for benchmark in config.evaluate.benchmarks for row in _chosen_items(config, benchmark)]


def _exemplars(config: Config) -> list[Item | Reject]:
    pools = [benchmark for benchmark in config.evaluate.benchmarks if benchmark.exemplars or benchmark.max_items]
    return [row for benchmark in pools for row in _pool(benchmark)]


def _pool(benchmark: BenchmarkConfig) -> Iterator[Item | Reject]:
    """What exemplars are taken from: another file, or all items where only some are asked."""
    if benchmark.exemplars is None:
        return read_items(benchmark.name, benchmark.path, benchmark.revision)
    return read_items(benchmark.name, benchmark.exemplars)


def _chosen_items(config: Config, benchmark: BenchmarkConfig) -> list[Item | Reject]:
    """At most `max_items`, the first by the hash of their id."""
    rows = list(read_items(benchmark.name, benchmark.path, benchmark.revision))
    if benchmark.max_items is None:
        return rows
    items = [row for row in rows if isinstance(row, Item)]
    items.sort(key=lambda row: stable_hash(config.seed, "item", row.item_id))
    return [*items[: benchmark.max_items], *(row for row in rows if isinstance(row, Reject))]


def _write_rows(run: Run, stage: Stage, row_type: type, rows: Sequence[Any]) -> None:
    """Write a small table of set=benchmark in shards of a few rows, the unit of resume of what follows."""
    if stage.done_already():
        return
    stage.begin()
    shards = [f"part-{index:05d}" for index in range(-(-len(rows) // ITEMS_PER_SHARD) or 1)]
    for index, shard in enumerate(shards):
        window = rows[index * ITEMS_PER_SHARD : (index + 1) * ITEMS_PER_SHARD]
        rejects = [row for row in window if isinstance(row, Reject)]
        kept = [row for row in window if not isinstance(row, Reject)]
        write_shard(stage.table, shard, iter([ShardPart(to_arrow(row_type, kept), len(window), len(kept), rejects)]))
    manifest = stage.finish(**checked_counts(run.config, stage, shards))
    check_strict(run.config, stage)
    say(f"{stage.label}: {manifest['num_kept']:,} {stage.table.name} → {stage.table.url}")


def make_passages(run: Run, step: Step) -> None:
    """Read web text, or what is trained on as text alone, cut it into passages and deal them to shards; what was
    interrupted is begun again.

    Raises:
        ConfigError: a corpus that is not there, or without the columns that it must have.
        StageError: too much of the corpora is unusable.
    """
    config, stage = run.config, Stage.of(run, step)
    if stage.done_already():
        return
    found = [(corpus, find_text_sources(corpus)) for corpus in _text_corpora(config, step.set)]
    start_ray(config)
    kept_out = ray.put(_kept_out(run, step, stage.label))
    heldout_share = config.ingest.heldout_share if step.set == WEB else 0.0
    scan = partial(_scan_text, config, heldout_share, kept_out)
    web = run.table(WEB, PASSAGES) if table_label(WEB, PASSAGES) in step.reads else None
    write_group = partial(_write_passages, config, stage.table, web)
    made = _deal(config, stage, found, scan, write_group, Passage, {})
    say(f"{stage.label}: {made['num_kept']:,} passages in {made['seconds']:.1f} s → {stage.table.url}")


def _kept_out(run: Run, step: Step, label: str) -> dict[str, NGrams]:
    """Runs of words that no passage may have, by what a reject calls the place where they are.

    Of text that is trained on, these are also those of what F and M are measured on: passages of the web text and the
    transcripts of recordings.
    """
    n = run.config.ingest.passages.ngram
    texts = _benchmark_texts(run.config)
    if not texts:
        say(f"{label}: no benchmarks are named, so none is kept out of the text; {DECONTAMINATE}")
    found = {"a benchmark": word_ngrams(texts, n)}
    measured = {
        table_label(HELDOUT, PASSAGES): "a held-out passage",
        table_label(NATURAL, CATALOG): "a held-out recording",
    }
    for read in step.reads:
        if read in measured:
            found[measured[read]] = _measured_ngrams(run, read, n)
    return found


def _measured_ngrams(run: Run, label: str, n: int) -> NGrams:
    table = run.labelled(label)

    def of_shard(shard: str) -> pa.Table:
        rows = table.read(shard, ["text", "split"])
        texts = rows.filter(pa.compute.equal(rows["split"], "test"))["text"].to_pylist()
        return word_ngrams(texts, n).to_arrow()

    shards = (table.manifest() or {})["shards"]
    return NGrams.of(n, gather(run.config, f"{label}: words", list(shards), of_shard))


def _text_corpora(config: Config, set_name: str) -> tuple[WebTextConfig, ...]:
    return config.ingest.text if set_name == TEXT else config.ingest.web


def _benchmark_texts(config: Config) -> list[str]:
    """What web text must not contain: the named files' strings, and the items that will be evaluated."""
    items = (row for b in config.evaluate.benchmarks for row in read_items(b.name, b.path, b.revision))
    return read_benchmark_texts(config.ingest.passages.benchmarks) + _texts_of(items)


def _world_benchmark_texts(config: Config) -> list[str]:
    """The same for the world's text, with the world's own questions where they are asked."""
    own = config.has_benchmark and not config.evaluate.benchmarks
    return _benchmark_texts(config) + (_texts_of(_items(config)) if own else [])


def _texts_of(items: Iterable[Item | Reject]) -> list[str]:
    return [text for row in items if isinstance(row, Item) for text in (prompt_of(row), *row.choices)]


def _scan_text(config: Config, heldout_share: float, kept_out: Any, item: dict[str, Any]) -> Iterator[pa.Table]:
    """The passages of one source, some thousands at a time."""
    corpus = WebTextConfig.model_validate_json(item["corpus"][0])
    source = TextSource(**json.loads(item["source"][0]))
    cut = PassageCutter(config, ray.get(kept_out), heldout_share)
    documents = (row for row in read_documents(source, corpus) if _is_taken(row, corpus))
    rows = (row for document in documents for row in cut(document, text_corpus_name(corpus)))
    with _reading(source.url):
        while piece := list(islice(rows, SCAN_ROWS)):
            yield pa.Table.from_pylist([_dealt(config, Passage, *row) for row in piece], schema=dealt_schema(Passage))


def _is_taken(row: Document | Reject, corpus: WebTextConfig) -> bool:
    return stable_hash("share", row.key if isinstance(row, Reject) else row.doc_id) < corpus.share * 2.0**64


class PassageCutter:
    """Cuts documents into passages that the embedder reads whole, that fit into the context and can be spoken."""

    def __init__(self, config: Config, kept_out: Mapping[str, NGrams], heldout_share: float) -> None:
        self.config, self.kept_out, self.heldout_share = config, kept_out, heldout_share
        self.num_cut = self.num_failed = 0
        settings, embed = config.ingest.passages, config.embed
        self.limits = Limits(settings.max_word_pieces, config.max_words, settings.min_words)
        self.count_pieces: Callable[[Sequence[str]], list[int]] = estimated_word_pieces
        if embed.embedder == "sentence_transformers":
            from salad_ray.text.embedding import piece_counter

            assert embed.path is not None
            self.count_pieces = piece_counter(embed.path, embed.revision)

    def __call__(
        self, document: Document | Reject, corpus: str
    ) -> Iterator[tuple[Passage | Reject, str] | tuple[Passage | Reject, str, str]]:
        """The passages of a document or what is wrong with it; what each is to be hashed by; what was cut out.

        What fails unforeseen costs its document only, unless that is the rule, or nothing may be left out.
        """
        if isinstance(document, Reject):
            yield document, document.key
            return
        try:
            rows, cut = self._cut(document, corpus)
            self.num_cut += 1
        except Exception as error:  # noqa: BLE001 - told, and counted
            yield self._failed(document, error), document.doc_id
            return
        yield *rows[0], json.dumps(cut)
        yield from rows[1:]

    def _failed(self, document: Document, error: Exception) -> Reject:
        if isinstance(error, OSError | MemoryError) or user_error(error) is not None:
            raise error
        self.num_failed += 1
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if self.config.strict or (self.num_failed >= MIN_FAILURES and self.num_failed > self.num_cut):
            number = f"{self.num_failed:,} of {self.num_failed + self.num_cut:,} documents of its source failed so"
            raise StageError(f"ingest: {document.doc_id}: {reason} ({number}); please report this as a bug") from error
        return Reject(INGEST, document.doc_id, reason)

    def _cut(self, document: Document, corpus: str) -> tuple[list[tuple[Passage | Reject, str]], dict[str, int]]:
        passages, rejects, cut = cut_passages(document, self.limits, self.count_pieces)
        split = split_of(document.doc_id, self.heldout_share)
        rows: list[tuple[Passage | Reject, str]] = [(row, row.key) for row in rejects]
        for row in passages:
            # A document's id may occur twice; with the text in it, equal ids meet in one shard, where they are seen.
            key = f"{row.passage_id}-{stable_hash(row.text) & 0xFFFFFF:06x}"
            passage = replace(row, passage_id=key, source=corpus, split=split)
            rows.append((_decontaminated(passage, self.kept_out), passage.text))
        return rows, cut


def _write_passages(config: Config, table: Table, web: Table | None, group: pa.Table) -> dict[str, Any]:
    """Write one shard of passages: of those with the same text the first, by id, is kept.

    Args:
        web: passages that must not be among them; they are dealt to shards by their text, too.
    """
    name = shard_names(config)[group["shard"][0].as_py()]
    rows, rejects = _undealt(Passage, group)
    if web is not None:
        columns = web.read(name, ["text", "passage_id"])
        known = dict(zip(*columns.to_pydict().values(), strict=True))
        checked = [_not_in_web(row, known) for row in rows]
        rows = [row for row in checked if isinstance(row, Passage)]
        rejects += [row for row in checked if isinstance(row, Reject)]
    kept: dict[str, Passage] = {}
    ids: set[str] = set()
    for row in sorted(rows, key=lambda row: row.passage_id):
        if row.passage_id in ids:
            rejects.append(Reject(INGEST, row.passage_id, "a passage of this id was read already"))
        elif row.text in kept:
            rejects.append(Reject(INGEST, row.passage_id, f"the same text as {kept[row.text].passage_id}"))
        else:
            kept[row.text] = row
            ids.add(row.passage_id)
    rejects.sort(key=lambda reject: (reject.key, reject.reason))
    num_cut: dict[str, int] = {}
    for cut in filter(None, group["cut"].to_pylist()):
        add_totals(num_cut, json.loads(cut))
    totals: Totals = {
        "num_kept_aside": sum(row.split == "test" for row in kept.values()),
        "num_chars_cut": num_cut,
    }
    write_shard(
        table, name, iter([ShardPart(to_arrow(Passage, kept.values()), len(group), len(kept), rejects, totals)])
    )
    return {"shard": [name]}


def keep_aside(run: Run, step: Step) -> None:
    """Write `heldout/passages`: of the web's passages that are kept aside, those with the lowest priorities."""
    config, stage = run.config, Stage.of(run, step)
    if stage.done_already():
        return
    [(label, manifest)] = stage.inputs.items()
    passages = run.labelled(label)
    number, there = config.ingest.passages.num_heldout, manifest["totals"]["num_kept_aside"]
    if not there:
        raise StageError(f"{stage.label}: no passage of the web text is kept aside; raise ingest.heldout_share")
    bound = probe_bounds(np.array([there]), number)[0]

    def of_shard(shard: str) -> pa.Table:
        rows = passages.read(shard, ["passage_id", "split"])
        rows = rows.filter(pa.compute.equal(rows["split"], "test")).select(["passage_id"])
        order = priorities(rows["passage_id"].to_pylist(), config.seed)
        near = order / 2.0**63 < bound
        columns = {"priority": pa.array(order[near]), "shard": pa.array([shard] * int(near.sum()), pa.string())}
        return pa.table({"passage_id": rows["passage_id"].filter(pa.array(near))} | columns)

    chosen = gather(config, stage.label, list(manifest["shards"]), of_shard)
    chosen = chosen.sort_by([("priority", "ascending"), ("passage_id", "ascending")]).slice(0, number)
    items = picked_shards(config, chosen.append_column("cluster_id", pa.nulls(len(chosen), pa.int64())))
    run_works(run, [Work(stage, items, partial(PickPassages, passages, "test"))])
