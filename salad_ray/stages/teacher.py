"""`teacher`: the frozen text LLM, verified and pinned; or, for the embedded world, trained."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from salad_ray.config import Config, DistillConfig
from salad_ray.console import progress, say
from salad_ray.distill.step import num_active_parameters, told_parameters
from salad_ray.flow import Step
from salad_ray.model.adapter import checkpoint_layers
from salad_ray.model.layers import decoder_layers
from salad_ray.model.loading import ModelError, hub_commit, load_tokenizer, tokenizer_hash
from salad_ray.model.speech_lm import load_text_lm
from salad_ray.model.tiny_lm import train_tiny_lm
from salad_ray.runs import OWN_MODEL, Run
from salad_ray.stages.common import Stage
from salad_ray.store import scratch_folder
from salad_ray.tables import Table, local_folder, put_folder, sampled_digest


def sources(config: Config, step: Step) -> dict[str, Any]:
    """Hashes of a local model's files, so that one replaced in place is noticed; of a hub id the commit."""
    path = config.model.teacher
    if path == "world":
        return {}
    if "://" in path or not Path(path).is_dir():
        return {"revision": hub_commit(path, config.model.revision)} if "://" not in path else {}
    return {file.name: sampled_digest(str(file)) for file in sorted(Path(path).glob("*")) if file.is_file()}


def make(run: Run, step: Step) -> None:
    """Write `teacher/manifest.json` (path, revision, tokenizer hash), and `teacher/model` for the embedded world."""
    config, stage = run.config, Stage.of(run, step)
    url = stage.table.url
    if stage.done_already():
        return
    stage.begin()
    started = time.monotonic()
    facts: dict[str, Any] = {"path": config.model.teacher}
    if stage.inputs:
        [passages] = map(run.labelled, step.reads)
        facts = {"path": OWN_MODEL, "training": _train_on_world(config, passages, f"{url}/{OWN_MODEL}")}
    path = f"{url}/{OWN_MODEL}" if stage.inputs else config.model.teacher
    facts |= _verify(path, config)
    stage.finish(**facts, seconds=round(time.monotonic() - started, 2))
    parameters = told_parameters(facts["num_parameters"], facts["num_active_parameters"])
    say(f"teacher: {parameters}, {facts['vocabulary']:,} tokens ← {path}")


def _train_on_world(config: Config, passages: Table, url: str) -> dict[str, Any]:
    texts = [text for shard in passages.shards() for text in passages.read(shard, ["text"])["text"].to_pylist()]
    with (
        scratch_folder() as folder,
        progress("teacher: training", config.model.tiny_lm.num_steps, "steps") as advance,
    ):
        summary = train_tiny_lm(texts, config.model.tiny_lm, config.seed, folder, lambda *_: advance(1))
        put_folder(folder, url)
    return summary


def _unfit_settings(llm: PreTrainedModel, settings: DistillConfig) -> list[str]:
    """What has to be set otherwise, since the LLM has no layers to be updated, compiled or recomputed one by one."""
    listed, recomputes = bool(decoder_layers(llm)), bool(checkpoint_layers(llm))
    unfit = {
        "optimizer=adamw": settings.optimizer == "muon" and not listed,
        "compile=false": settings.compile and not listed,
        "activation_checkpointing=false": settings.activation_checkpointing and not recomputes,
    }
    return [f"distill.{name}" for name, wrong in unfit.items() if wrong]


def _verify(path: str, config: Config) -> dict[str, Any]:
    """Load the model once, so that a wrong path or missing weights end here and not in a worker."""
    with local_folder(path) as local:
        revision = hub_commit(local, config.model.revision)
        tokenizer = load_tokenizer(local, revision)
        llm = load_text_lm(local, revision, "auto", "sdpa", config.pack.context)
    if unfit := _unfit_settings(llm, config.distill):  # rather than when all is packed
        kind = type(llm).__name__
        raise ModelError(f"{path}: the layers of {kind} are not in a list as others' are; set {' and '.join(unfit)}")
    return {
        "revision": revision,
        "num_parameters": llm.num_parameters(),
        "num_active_parameters": num_active_parameters(llm),
        "vocabulary": llm.get_output_embeddings().weight.shape[0],
        "trial": llm.trial,
        "tokenizer_hash": tokenizer_hash(tokenizer),
    }
