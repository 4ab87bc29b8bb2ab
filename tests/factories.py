"""Small objects that many tests need."""

from __future__ import annotations

import contextlib
import io
import math
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tokenizers import Tokenizer, models, processors, trainers
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from salad_ray import pipeline
from salad_ray.config import Config
from salad_ray.flow import steps_of, with_needs
from salad_ray.runs import Places, Run, open_places
from salad_ray.tables import SCHEMA_VERSION, Features, Reject, Table, Word, write_bytes, write_json

ROOT = Path(__file__).resolve().parents[1]
TRAINING_TEXT = (
    "She said, (\"word and dash—another) 12 345 times. The café opened…\n\nA new line: don't stop! 😀 was there. ",
    "we the people of the united states in order to form a more perfect union, establish justice 1787 — and so on.",
)
HAND = "by-hand"
TOKENIZERS = ("byte_level", "trimmed", "metaspace", "bos", "unigram", "wordpiece")


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer trained in memory; `trimmed` is byte-level with offsets without spaces, `bos` adds BOS, EOS."""
    if kind in ("byte_level", "trimmed"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        trainer: Any = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre.ByteLevel.alphabet())
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>")
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=200)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=200)
    trainer.special_tokens = ["<unk>", "<s>", "</s>"]
    trainer.show_progress = False
    tokenizer.train_from_iterator(TRAINING_TEXT * 4, trainer)
    if kind == "trimmed":
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if kind == "bos":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_features(
    text: str,
    utt_id: str = "utt",
    *,
    recording_id: str = "",
    offset_secs: float = 0.0,
    secs_per_word: float = 0.4,
    pause_secs: float = 0.1,
    with_words: bool = True,
    dim: int = 2,
    split: str = "train",
) -> Features:
    """An encoded utterance with evenly spaced words; frame f carries (f, a number made of utt_id)."""
    pieces = text.split()
    starts = [pause_secs + i * (secs_per_word + pause_secs) for i in range(len(pieces))]
    duration_secs = pause_secs + len(pieces) * (secs_per_word + pause_secs)
    num_frames = math.ceil(duration_secs * 12.5)
    frames = np.zeros((num_frames, dim), np.float16)
    frames[:, 0] = np.arange(num_frames)
    frames[:, 1:] = zlib.crc32(utt_id.encode()) % 1024
    words = [Word(piece, start, start + secs_per_word) for piece, start in zip(pieces, starts, strict=True)]
    return Features(
        utt_id=utt_id,
        recording_id=recording_id or utt_id,
        offset_secs=offset_secs,
        duration_secs=duration_secs,
        domain="test",
        split=split,
        text=text,
        words=words if with_words else None,
        num_frames=num_frames,
        frame_rate=12.5,
        dim=dim,
        features=frames.tobytes(),
    )


def small_world_config(folder: Path) -> dict[str, Any]:
    """The quickstart, shrunk to seconds of work: real Ray, Ray Train and DeepSpeed all the same."""
    return {
        "run_dir": str(folder / "run"),
        "ray": {"num_cpus": 2},
        "world": {"num_natural": 64, "num_heldout": 24, "num_web": 200, "num_text": 60, "num_questions": 24},
        "ingest": {"num_shards": 4},
        "pack": {"context": 256, "text_words": [4, 9], "speech_words": [4, 9], "num_lanes": 2, "text_share": 0.5},
        "model": {
            "adapter": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_size": 64},
            "tiny_lm": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_size": 64, "num_steps": 10},
        },
        "distill": {
            "num_steps": 6,
            "warmup_steps": 1,
            "learning_rate": 5e-4,
            "adapter_learning_rate": 1.5e-3,
            "num_workers": 2,
            "zero_stage": 2,
            "precision": "fp32",
            "use_gpu": False,
            "log_every": 2,
            "checkpoint_every": 3,
        },
        "embed": {"dim": 8},
        "cluster": {"num_clusters": 6},
        "probe": {"passages_per_cluster": 4},
        "select": {"budget_percent": 25.0},
        "stage2": {"num_steps": 4, "control": True, "shares": {"natural": 0.3, "active": 0.3, "text": 0.4}},
        "evaluate": {"num_shots": 1},
    }


def untrained_copy(run: Config, folder: Path, **distill: object) -> Config:
    """A copy of a finished run, as it was before Stage I."""
    shutil.copytree(
        run.run_dir,
        folder,
        ignore=shutil.ignore_patterns("trunk", "stage1", "measurements_stage1", "report"),
        symlinks=True,
    )
    return run.model_copy(update={"run_dir": str(folder), "distill": run.distill.model_copy(update=distill)})


def run_stage(config: Config, stage: str, set_name: str) -> Run:
    """Run this stage alone: what it needs is there, or it says what it lacks."""
    return run_stages(config, (stage, set_name))


def run_stages(config: Config, *stages: tuple[str, str]) -> Run:
    """Run these stages, each of a set, and no others; neighbours share their actors, as in a whole run."""
    chosen = [step for stage, set_name in stages for step in steps_of(config, stage, set_name)]
    assert chosen, f"no step of this config: {stages}"
    run = pipeline.start(config, with_needs(config, chosen, if_there=True))
    pipeline.run_steps(run, chosen, time.monotonic())
    return run


def redo(config: Config, stage: str, set_name: str) -> None:
    """Delete what this stage wrote, and what was made of it."""
    run = pipeline.start(config, with_needs(config, steps_of(config, stage, set_name)))
    labels = [label for step in steps_of(config, stage, set_name) for label in step.writes]
    pipeline.delete_tables(run, labels, lambda _: True)


def table_of(run: Config | str | Path, set_name: str, name: str) -> Table:
    """A table of the newest run of a folder."""
    run_dir = run.run_dir if isinstance(run, Config) else str(run)
    return open_places(run_dir)[0].table(set_name, name)


def rejects_of(config: Config, set_name: str, *names: str) -> list[Reject]:
    """What was left out of these tables."""
    tables = [table_of(config, set_name, name).rejects for name in names]
    return [row for table in tables for shard in table.shards() for row in table.read_rows(Reject, shard)]


def keep_run(run_dir: object, config: dict[str, Any], labels: Iterable[str]) -> Places:
    """The index of a run whose tables a test writes by hand (`hand_table`)."""
    keys = dict.fromkeys(labels, HAND)
    index = {"config": config, "schema_version": SCHEMA_VERSION, "tables": keys, "reads": {}}
    write_json(f"{run_dir}/runs/{HAND}.json", index)
    write_json(f"{run_dir}/runs/newest.json", {"run": HAND})
    write_bytes(f"{run_dir}/config.yaml", yaml.safe_dump(config).encode())
    return Places(str(run_dir), HAND, keys)


def hand_table(run_dir: object, label: str) -> Table:
    set_name, _, name = label.rpartition("/")
    return Table(f"{run_dir}/{label}/{HAND}", set_name, name)


def a_table(folder: object, set_name: str, name: str) -> Table:
    """A table of no run."""
    return Table("/".join(filter(None, (str(folder), set_name, name))), set_name, name)


def commanded(entry: Callable[[], object], *arguments: str) -> subprocess.CompletedProcess[str]:
    """What a command prints and returns, run as Python runs it, but without the seconds of imports of a new process."""
    argv, hook, told, complaints = sys.argv, sys.excepthook, io.StringIO(), io.StringIO()
    sys.argv = ["salad", *arguments]
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(told), contextlib.redirect_stderr(complaints):
        try:
            entry()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException as error:  # noqa: BLE001 - as the interpreter does
            sys.excepthook(type(error), error, error.__traceback__)
            code = 1
        finally:
            sys.argv, sys.excepthook = argv, hook
    return subprocess.CompletedProcess(arguments, code, told.getvalue(), complaints.getvalue())
