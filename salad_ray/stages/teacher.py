"""`teacher`: the frozen text LLM, verified and pinned; or, for the embedded world, trained."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from salad_ray.config import Config, identity
from salad_ray.console import progress, say
from salad_ray.model.loading import hub_commit
from salad_ray.model.speech_lm import load_text_lm, load_tokenizer, tokenizer_hash
from salad_ray.model.tiny_lm import train_tiny_lm
from salad_ray.stages.common import Stage, finished
from salad_ray.store import scratch_folder
from salad_ray.tables import Table, local_folder, put_folder


def run(config: Config) -> None:
    """Write `teacher/manifest.json` (path, revision, tokenizer hash), and `teacher/model` for the embedded world."""
    table = Table(config.run_dir, "", "teacher")
    own = identity(config, "model.teacher", "model.revision")
    inputs = _local_files(config.model.teacher)
    if config.model.teacher == "world":
        own = identity(config, "model.teacher", "model.tiny_lm", "seed")
        inputs = {"passages": finished(Table(config.run_dir, "web", "passages"), "ingest")["version"]}
    stage = Stage("teacher", table, own, inputs)
    if stage.is_done():
        say(f"teacher: done already, {table.url}")
        return
    stage.begin()
    started = time.monotonic()
    facts = _train_on_world(config, table) if config.model.teacher == "world" else {"path": config.model.teacher}
    facts |= _verify(facts["path"], config)
    stage.finish(**facts, seconds=round(time.monotonic() - started, 2))
    say(f"teacher: {facts['num_parameters']:,} parameters, {facts['vocabulary']:,} tokens ← {facts['path']}")


def _local_files(path: str) -> dict[str, str]:
    """Sizes and times of a local model's files, so that one replaced in place is noticed; a hub id has its revision."""
    files = sorted(file for file in Path(path).glob("*") if file.is_file()) if Path(path).is_dir() else []
    return {file.name: f"{file.stat().st_size} bytes, {file.stat().st_mtime_ns}" for file in files}


def _train_on_world(config: Config, table: Table) -> dict[str, Any]:
    passages = Table(config.run_dir, "web", "passages")
    texts = [text for shard in passages.shards() for text in passages.read(shard, ["text"])["text"].to_pylist()]
    with (
        scratch_folder() as folder,
        progress("teacher: training", config.model.tiny_lm.num_steps, "steps") as advance,
    ):
        summary = train_tiny_lm(texts, config.model.tiny_lm, config.seed, folder, lambda *_: advance(1))
        put_folder(folder, f"{table.url}/model")
    return {"path": f"{table.url}/model", "training": summary}


def _verify(path: str, config: Config) -> dict[str, Any]:
    """Load the model once, so that a wrong path or missing weights end here and not in a worker."""
    with local_folder(path) as local:
        revision = hub_commit(local, config.model.revision)
        tokenizer = load_tokenizer(local, revision)
        llm = load_text_lm(local, revision, "auto", "sdpa")
    return {
        "revision": revision,
        "num_parameters": llm.num_parameters(),
        "vocabulary": llm.get_output_embeddings().weight.shape[0],
        "tokenizer_hash": tokenizer_hash(tokenizer),
    }
