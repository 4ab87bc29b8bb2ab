"""The training loop (Ray Train, DeepSpeed ZeRO, one worker) beside a bare PyTorch loop over the same batches.

    python -m benchmarks.training

The models are the quickstart's, in fp32 on a CPU, 2,048 positions a step; both loops read the same plan with the same
`LaneReader` and compute with one thread. The bare loop has a process of its own, without Ray and DeepSpeed: teacher,
student, AdamW, clipping, schedule, nothing else. The two take turns.

Throughput is the trainer's own, from the rows of its log after the first. No checkpoint falls into that time: the only
one follows the last step. It, the export and the start are in "around (s)", which a run pays once.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.side_by_side import PAIRS, ROOT, in_subprocess, one_thread_each, ratio_row, take_turns
from salad_ray import pipeline
from salad_ray.config import Config
from salad_ray.configfile import load_config
from salad_ray.distill.budget import budget_of, decay_start
from salad_ray.distill.step import DTYPES, batch_loss, label_weight, learning_rate_factor, weight_of_word_ends
from salad_ray.distill.trainer import Job, train
from salad_ray.model.speech_lm import EncoderSpec, SpeechLM, load_text_lm, parameter_groups
from salad_ray.sequences.batch import Batch
from salad_ray.sequences.loader import LaneReader
from salad_ray.stages.common import finished, teacher_of
from tests.factories import a_table, table_of

NUM_STEPS = 50
LOG_EVERY = 10
"""Steps of a window; the first window warms up and does not count."""
NUM_DOCUMENTS = 400

Rows = list[dict[str, float]]


def run(pairs: int = PAIRS, num_steps: int = NUM_STEPS, num_documents: int = NUM_DOCUMENTS) -> list[dict[str, Any]]:
    """One row: positions/s of both, the ratio, and how far apart (relatively) the last KL of the two is."""
    with tempfile.TemporaryDirectory(prefix="salad-bench-") as folder, one_thread_each():
        config = prepare(folder, num_steps, num_documents)
        turns = take_turns(
            lambda pair: ours(config, pair), lambda _: in_subprocess("benchmarks.training", folder), pairs
        )
    for (trained, _), bare in turns:
        if [row["num_positions"] for row in trained] != [row["num_positions"] for row in bare]:
            raise RuntimeError("the two loops did not train on the same batches")
    row = ratio_row(
        "training loop",
        "positions/s",
        [throughput(trained) for (trained, _), _ in turns],
        [throughput(bare) for _, bare in turns],
    )
    (last, around_secs), bare = turns[-1]
    row["KL apart"] = abs(last[-1]["kl"] / bare[-1]["kl"] - 1)
    return [row | {"around (s)": around_secs}]


def prepare(folder: str, num_steps: int, num_documents: int) -> Config:
    """Run every stage before Stage I, for natural speech only."""
    overrides = (
        f"run_dir={folder}",
        f"world.num_natural={num_documents}",
        "model.tiny_lm.num_steps=20",
        f"distill.num_steps={num_steps}",
        f"distill.log_every={LOG_EVERY}",
        "distill.checkpoint_every=1000000",
        "distill.optimizer=adamw",
        "pack.text_share=0",  # it has a plan and a table of its own, which the bare loop does not read
        "distill.num_workers=1",
        "distill.micro_batch_rows=4",
    )
    config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
    pipeline.make(config, "pack", "natural")
    return config


def job_of(config: Config, name: str) -> Job:
    """What the trainer is told by the stages, warm-up and decay in one."""
    run, settings = pipeline.resolve(config), config.distill
    plan, features = (run.table("natural", each) for each in ("plan", "features"))
    encoder = EncoderSpec(**finished(run, features.label)["encoder"])
    num_steps = budget_of(config, {"natural": plan}).num_steps
    return Job(
        config, a_table(config.run_dir, "", name), (plan, features), teacher_of(run), encoder, settings, num_steps,
        settings.warmup_steps, num_steps - decay_start(num_steps, settings.decay_share),
    )  # fmt: skip


def ours(config: Config, pair: int) -> tuple[Rows, float]:
    """The trainer's log, and the seconds that it took around its steps."""
    started = time.monotonic()
    [facts] = train([job_of(config, f"training-{pair}")])
    return facts["log"], time.monotonic() - started - facts["train_seconds"]


def throughput(rows: Rows) -> float:
    """Positions a second over all windows but the first."""
    counts = [after["num_positions"] - before["num_positions"] for before, after in pairwise(rows)]
    secs = sum(count / row["positions_per_sec"] for count, row in zip(counts, rows[1:], strict=True))
    return sum(counts) / secs


def bare_loop(job: Job) -> Rows:
    """What one would write without Ray and DeepSpeed; rows as in the trainer's log."""
    settings = job.config.distill
    teacher, student = models(job)
    optimizer = torch.optim.AdamW(parameter_groups(student, settings), betas=settings.betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(step, job.num_steps, job.warmup_steps, job.decay_steps),
    )
    rows: Rows = []
    of_word_ends = weight_of_word_ends(settings)
    num_positions, kl_sum, num_labels = 0, 0.0, 0
    with closing(iter(reader(job.config, student))) as steps:
        started = time.monotonic()
        for step in range(1, job.num_steps + 1):
            for batch, share in shares(next(steps), of_word_ends):
                loss = batch_loss(
                    student, student.head, teacher, batch, settings.alpha, settings.loss_chunk_size,
                    word_end_weight=of_word_ends,
                )  # fmt: skip
                (loss.loss * share).backward()
                num_positions += batch.num_positions
                num_labels += len(batch.labels)
                kl_sum += loss.kl.item() * len(batch.labels)
            torch.nn.utils.clip_grad_norm_(student.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % settings.log_every == 0 or step == job.num_steps:
                now, before = time.monotonic(), rows[-1]["num_positions"] if rows else 0
                rate = (num_positions - before) / (now - started)
                rows.append({"num_positions": num_positions, "positions_per_sec": rate, "kl": kl_sum / num_labels})
                started, kl_sum, num_labels = now, 0.0, 0
    return rows


def models(job: Job) -> tuple[PreTrainedModel, SpeechLM]:
    """Frozen teacher and student before its first step, as the trainer makes them."""
    model, path, revision = job.config.model, job.teacher["path"], job.teacher["revision"]
    dtype = DTYPES[job.config.distill.precision]
    teacher = load_text_lm(path, revision, dtype, model.attention).requires_grad_(False).eval()
    student = SpeechLM.from_teacher(path, revision, model.adapter, job.encoder, job.config.seed, dtype, model.attention)
    return teacher, student


def reader(config: Config, student: SpeechLM) -> LaneReader:
    """The same rows in the same order as the trainer's."""
    return LaneReader(
        table_of(config, "natural", "plan"),
        table_of(config, "natural", "features"),
        student.tokenizer,
        config.pack,
        micro_batch_rows=config.distill.micro_batch_rows,
        stride=config.model.adapter.stride,
    )


def shares(batches: list[Batch], of_word_ends: float) -> Iterator[tuple[Batch, float]]:
    """Each micro-batch with its share of the step's labels and word ends."""
    weights = [label_weight(batch, of_word_ends) for batch in batches]
    return ((batch, weight / sum(weights)) for batch, weight in zip(batches, weights, strict=True))


def main() -> None:
    if "--bare" in sys.argv:
        print(json.dumps(bare_loop(job_of(load_config(f"{sys.argv[-1]}/config.yaml"), "bare"))))
        return
    for row in run():
        print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
