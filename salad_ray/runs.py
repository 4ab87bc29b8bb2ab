"""Runs: which tables a config stands for, and where they lie.

A table's place is `run_dir/<set>/<table>/<key>`. The key is a hash of all that decides its content: its stage's keys of
the config, the keys of the tables that it is made from, and facts of its sources (the hash of a model's weights, the
stamps of a corpus' files). So all places are known before anything runs; what is there is found, and what two configs
would make alike they share.

A run is a config and its places. It is kept as `run_dir/runs/<name>.json`; the name is a hash of the config, and for a
training of a sweep `<sweep>/<trial>`. The run that was started last is the newest: `run_dir/config.yaml` is its config,
`run_dir/INDEX.txt` lists its tables for people, and `run_dir/report`, `run_dir/stage1/model` and the like lead to what
it has made.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from salad_ray.config import Config, identity
from salad_ray.configfile import dump_config, parse_config
from salad_ray.flow import TRAINED, Step, steps
from salad_ray.names import REPORT, TEACHER
from salad_ray.store import filesystem, is_local, list_folder
from salad_ray.tables import (
    SCHEMA_VERSION,
    Table,
    TableError,
    delete_file,
    delete_folder,
    file_exists,
    fingerprint,
    read_bytes,
    read_json,
    table_label,
    write_bytes,
    write_json,
)

NOWHERE = "none"
"""The key of a table that a run does not have; nothing lies there."""
OWN_MODEL = "model"
"""`path` in the manifest of a teacher that the run has trained: beside the manifest, wherever that is moved."""
OPEN = ("run_dir", "set", "strict", "ray", "sweeps")
"""Keys that make no other run of a config."""


@dataclass(frozen=True)
class Places:
    """Where the tables of a run lie."""

    run_dir: str
    name: str
    keys: Mapping[str, str]
    """Label of a table → its key."""

    def table(self, set_name: str, name: str) -> Table:
        """A table of the run, finished or not; of one that this run does not have, one that is never there."""
        label = table_label(set_name, name)
        return Table(f"{self.run_dir}/{label}/{self.keys.get(label, NOWHERE)}", set_name, name)

    def labelled(self, label: str) -> Table:
        """The same by `set/table`."""
        set_name, _, name = label.rpartition("/")
        return self.table(set_name, name)

    @property
    def tables(self) -> list[Table]:
        """All that the run has, finished or not."""
        return [self.labelled(label) for label in self.keys]

    @property
    def folder(self) -> str:
        return f"{self.run_dir}/runs/{self.name}"

    @property
    def report_url(self) -> str:
        return f"{self.folder}/{REPORT}"

    @property
    def index_url(self) -> str:
        return f"{self.folder}.json"


@dataclass(frozen=True)
class Run:
    """A config and where its tables lie; what every stage and worker is given."""

    config: Config
    places: Places
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Label of a step → facts of its sources: what they were when the run was started."""

    def table(self, set_name: str, name: str) -> Table:
        return self.places.table(set_name, name)

    def labelled(self, label: str) -> Table:
        return self.places.labelled(label)

    def with_path(self, teacher: dict[str, Any]) -> dict[str, Any]:
        """A teacher's manifest with its `path` as it is now, also where the run has trained it itself."""
        own = f"{self.labelled(TEACHER).url}/{OWN_MODEL}"
        return teacher | {"path": own} if teacher["path"] == OWN_MODEL else teacher

    def facts_of(self, step: Step) -> Mapping[str, Any]:
        return self.facts.get(step.writes[0], {})


def run_name(config: Config) -> str:
    """Of a config that is no training of a sweep."""
    return fingerprint(identity(config, *sorted(set(Config.model_fields) - set(OPEN))))[:8]


def key_of(config: Config, step: Step, keys: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    """The key of what a step writes.

    Args:
        keys: of the tables that it is made from.
        facts: of its sources.
    """
    content = {
        "stage": step.label,
        "tables": step.tables,
        "version": step.version,
        "schema": SCHEMA_VERSION,
        "config": identity(config, *step.keys, without=step.without),
        "inputs": {label: keys.get(label, NOWHERE) for label in step.reads},
        "facts": facts,
    }
    return fingerprint(json.loads(json.dumps(content)))[:12]


def write_index(run: Run) -> None:
    """Keep the run: its config, and the places of its tables with what each is made from. What an earlier start of the
    same run knew of other tables stays."""
    before = read_json(run.places.index_url) or {}
    keys = before.get("tables", {}) | dict(run.places.keys)
    reads = {label: list(step.reads) for step in steps(run.config) for label in step.writes}
    write_json(
        run.places.index_url,
        {
            "config": run.config.model_dump(mode="json"),
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "schema_version": SCHEMA_VERSION,
            "tables": keys,
            "reads": reads,
        },
    )
    if "/" not in run.places.name:
        write_bytes(f"{run.places.run_dir}/config.yaml", dump_config(run.config).encode())
        _name_newest(replace(run.places, keys=keys))


def _name_newest(places: Places) -> None:
    """Say which run is the newest, and in `INDEX.txt`, for people, where its tables lie."""
    write_json(f"{places.run_dir}/runs/newest.json", {"run": places.name})
    width = max(map(len, places.keys), default=0)
    lines = [
        f"Tables of run {places.name}, the newest here; places are from this folder on. Other runs: runs/*.json.",
        "A table with manifest.json is finished: shards are *.parquet, what was left out is in rejects/.",
        "`salad status RUN_DIR` says how far the run is.",
        "",
        *(f"{label:{width}}  {label}/{key}" for label, key in sorted(places.keys.items())),
    ]
    write_bytes(f"{places.run_dir}/INDEX.txt", "\n".join([*lines, ""]).encode())


def refuse_older(run_dir: str) -> None:
    """Raises `TableError` where an earlier version has written, whose tables lie elsewhere."""
    if file_exists(f"{run_dir}/config.yaml") and not file_exists(f"{run_dir}/runs/newest.json"):
        raise _of_earlier_version(run_dir)


def _of_earlier_version(run_dir: str) -> TableError:
    return TableError(
        f"{run_dir} holds a run of an earlier version of salad_ray, whose tables this one does not read; choose "
        "another run_dir, or delete that run"
    )


def open_places(run_dir: str, name: str | None = None) -> tuple[Places, dict[str, Any]]:
    """A run that was kept, the newest by default, wherever it was moved since; and its config as plain data.

    Raises:
        TableError: there is none, or an earlier version has written it.
    """
    run_dir = run_dir if run_dir.endswith("://") else run_dir.rstrip("/")
    refuse_older(run_dir)
    newest = read_json(f"{run_dir}/runs/newest.json")
    if newest is None:
        raise TableError(f"{run_dir} holds no run; name a run_dir that `salad run` has written to")
    name = name or str(newest["run"])
    index = read_json(f"{run_dir}/runs/{name}.json")
    if index is None:
        known = ", ".join(each.name for each in kept_runs(run_dir))
        raise TableError(f"{run_dir} has no run '{name}'; it has {known}")
    if index.get("schema_version") != SCHEMA_VERSION:
        raise _of_earlier_version(run_dir)
    return Places(run_dir, name, index["tables"]), index["config"]


def open_run(run_dir: str, name: str | None = None) -> Run:
    """As `open_places`, with the config; raises `ConfigError`, too, where this version cannot read it."""
    places, data = open_places(run_dir, name)
    config = parse_config(data, places.index_url)
    return Run(config.model_copy(update={"run_dir": places.run_dir}), places)


def kept_runs(run_dir: str) -> list[Places]:
    """All runs that are kept, trainings of sweeps included, by name."""
    names = list(_index_names(f"{run_dir}/runs"))
    with ThreadPoolExecutor(32) as threads:
        found = threads.map(read_json, [f"{run_dir}/runs/{name}.json" for name in names])
        pairs = zip(names, found, strict=True)
        return [Places(run_dir, name, index["tables"]) for name, index in pairs if index and "tables" in index]


def _index_names(url: str, prefix: str = "") -> Iterator[str]:
    for name, entry in sorted(list_folder(url).items()):
        if name.endswith(".json"):
            yield prefix + name.removesuffix(".json")
        elif entry["type"] == "directory" and not prefix:
            yield from _index_names(f"{url}/{name}", f"{name}/")


def unused_tables(run_dir: str, forgotten: Collection[str] = ()) -> list[Table]:
    """Tables that no kept run has, but those that are to be forgotten."""
    kept = [run for run in kept_runs(run_dir) if run.name not in forgotten]
    used = {table.url for run in kept for table in run.tables}
    return [table for table in all_tables(run_dir) if table.url not in used]


def all_tables(run_dir: str) -> list[Table]:
    """Every table that was begun in `run_dir`, whoever has it."""
    found = []
    for first in _folders(run_dir):
        for second in _folders(f"{run_dir}/{first}"):
            if _is_table(f"{run_dir}/{first}/{second}"):
                found.append(Table(f"{run_dir}/{first}/{second}", "", first))
                continue
            places = (f"{run_dir}/{first}/{second}/{key}" for key in _folders(f"{run_dir}/{first}/{second}"))
            found += [Table(place, first, second) for place in places if _is_table(place)]
    return found


def _folders(url: str) -> Sequence[str]:
    return sorted(name for name, entry in list_folder(url).items() if entry["type"] == "directory")


def _is_table(url: str) -> bool:
    return any(file_exists(f"{url}/{name}") for name in ("begun.json", "manifest.json"))


def num_bytes(table: Table) -> int:
    """Of all files in a table's folder."""
    fs, path = filesystem(table.url)
    return int(sum(entry["size"] for entry in fs.find(path, detail=True).values()))


def lead_to(places: Places) -> None:
    """Let `run_dir/report` and `run_dir/<system>/model` lead to what this run has made: by links, where the place has
    them; else a model by a small file `model.json` that names it, and the report by a copy."""
    if "/" in places.name:
        return
    run_dir = places.run_dir
    names = [name for name, entry in list_folder(places.report_url).items() if entry["type"] == "file"]
    if names and not _link(f"{run_dir}/{REPORT}", places.report_url):
        for name in names:
            write_bytes(f"{run_dir}/{REPORT}/{name}", read_bytes(f"{places.report_url}/{name}"))
    for system in TRAINED:
        table = places.table("", system)
        if table.manifest() is not None and not _link(f"{run_dir}/{system}/model", f"{table.url}/model"):
            write_json(f"{run_dir}/{system}/model.json", {"model": f"{table.url}/model"})


def _link(url: str, target: str) -> bool:
    """Whether a symbolic link could be made, in place of an earlier one."""
    fs, path = filesystem(url)
    if not is_local(fs):
        return False
    goal = os.path.relpath(filesystem(target)[1], os.path.dirname(path))
    temporary = f"{path}.{os.getpid()}.link"
    try:
        os.symlink(goal, temporary)
        os.replace(temporary, path)
    except OSError:  # a file system without links, or a folder of this name
        with suppress(OSError):
            os.unlink(temporary)
        return False
    return True


def followed(url: str) -> str:
    """Where a model really lies: what `model.json` beside it names, where `lead_to` could make no link."""
    pointer = read_json(f"{url.rstrip('/')}.json") if "://" in url else None
    return str(pointer["model"]) if pointer and "model" in pointer else url


def forget(places: Places) -> None:
    """Keep a run no longer, nor its report; its tables stay until `clean`. Where it was the newest, the last of the
    others is."""
    delete_file(places.index_url)
    delete_folder(places.folder)
    newest = f"{places.run_dir}/runs/newest.json"
    if (read_json(newest) or {}).get("run") == places.name:
        others = [run for run in kept_runs(places.run_dir) if "/" not in run.name]
        if not others:
            delete_file(newest)
            delete_file(f"{places.run_dir}/INDEX.txt")
            return
        last = max(others, key=lambda run: (read_json(run.index_url) or {}).get("started_at", ""))
        _name_newest(last)
        lead_to(last)
