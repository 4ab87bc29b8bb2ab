"""The training job: Ray Train workers, each with a DeepSpeed engine around the student and a frozen teacher beside it.

Step s trains on rows s·b … of every lane of the plan, whatever the number of workers. Its gradient is that of the mean
loss over all labels of the step, over workers and accumulation. A step whose loss or gradient is not finite never
updates the weights. A worker group that Ray Train starts again, after a failure or with another number of workers, and
a rerun after the driver's death, all continue from the last whole checkpoint (`checkpoints.py`). Trainings that follow
each other share a worker group, as it takes longer to start than a small training takes.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.util.metrics import Gauge
from torch import Tensor

from salad_ray.config import Config, ConfigError, DistillConfig
from salad_ray.configfile import parse_config
from salad_ray.console import log_facts, say
from salad_ray.distill.budget import mix_of
from salad_ray.distill.checkpoints import (
    Checkpoint,
    CheckpointReader,
    CheckpointWriter,
    checkpoint_at,
    keep,
    latest,
    new_token,
)
from salad_ray.distill.engine import compile_layers, destroy, forward_backward, make_engine
from salad_ray.distill.logger import Logger
from salad_ray.distill.start import faults, start_divergences
from salad_ray.distill.step import (
    DTYPES,
    has_fast_bfloat16,
    head_share,
    label_weight,
    learning_rate_factor,
    num_active_parameters,
    peak_flops,
    told_parameters,
    training_flops,
    weight_of_word_ends,
)
from salad_ray.distill.worker import work
from salad_ray.distill.zero import optimizer_step, partitions, restored
from salad_ray.model.layers import attention_widths
from salad_ray.model.loading import load_tokenizer, tokenizer_hash
from salad_ray.model.speech_lm import EncoderSpec, ModelError, SpeechLM, load_text_lm, weights_fingerprint
from salad_ray.names import TEXT
from salad_ray.ray_private import LOGGER_OF_REPORTS
from salad_ray.sequences.batch import Batch, without_labels
from salad_ray.sequences.loader import LaneReader
from salad_ray.store import StoreError, for_ray, scratch_folder
from salad_ray.tables import Table, TableError, delete_file, local_folder, put_folder, read_json, write_json

MENDABLE = (ConfigError, ModelError, TableError)
"""What a user has to mend before another try can succeed."""
MAX_SKIPPED = 2
"""Updates left out one after the other at which training stops: one may be a freak row, two are the training."""
TOLD_HEAD_SHARE = 0.1
"""Of the work, from which on it is said that the vocabulary takes it."""
GAUGES = ("step", "loss", "kl", "word_end_kl", "text_kl", "positions_per_sec", "waiting_share", "memory_gib", "mfu")
"""Of a row of the curve, what Ray's dashboard and Prometheus show, as `salad_train_…`."""
SUMS = (
    *("loss", "kl", "nll", "word_end_kl", "text_kl"),
    *("label_weight", "num_labels", "num_word_ends", "num_text_labels"),
    *("num_positions", "num_text_positions", "flops"),
)


class TrainingStopped(RuntimeError):
    """Training that cannot go on; the weights on disk are those of the last checkpoint. The message is for the user."""


@dataclass
class Progress:
    """How far training is; travels with the checkpoint."""

    step: int = 0
    num_positions: int = 0
    """D of the scaling law: with those of text alone."""
    num_text_positions: int = 0
    """Of them, those of samples that are text alone."""
    train_seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)
    sums: list[float] = field(default_factory=lambda: [0.0] * len(SUMS))
    """Of the steps since the last row of the log."""
    skipped_steps: int = 0
    """Updates that the engine left out, before the last resume."""


@dataclass(frozen=True)
class Job:
    """What every worker is told."""

    config: Config
    table: Table
    """What it writes: checkpoints, the model."""
    natural: tuple[Table, Table]
    """Plan and features of the natural speech."""
    teacher: dict[str, Any]
    """The teacher's manifest: path, revision, hash of its tokenizer."""
    encoder: EncoderSpec
    settings: DistillConfig
    """Of this stage; `config.distill` is Stage I's."""
    num_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    """Of those, at the end, in which the learning rate falls."""
    card: str = ""
    """Text of the model card."""
    start: tuple[str, int] | None = None
    """Another training's folder of checkpoints, and the step of the one with whose weights and optimizer this training
    begins; without, it begins with the teacher's weights."""
    first_row: int = 0
    """Row of every lane of the natural plan at which step 0 begins."""
    others: dict[str, tuple[Table, Table]] = field(default_factory=dict)
    """Set → plan and what it refers to: features of active speech, passages of text alone."""
    shares: dict[str, float] = field(default_factory=dict)
    """Of the rows, by set; natural speech has what is missing to 1."""
    earlier_shares: dict[str, float] | None = None
    """Of the rows before `first_row`, where they were others."""
    branch_steps: tuple[int, ...] = ()
    """Steps whose checkpoints stay, since other trainings begin there."""
    exports: bool = True
    """Whether to write the model at the end."""

    @property
    def name(self) -> str:
        """The table's: trunk, stage1, stage2 or control."""
        return self.table.name


def train(jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """Distil, one training after the other on the same workers: on the plan of the natural speech, and perhaps the
    active one's, from the last checkpoint if there is one; and write the models.

    Args:
        jobs: of one table each. The settings of the first say which workers there are. A later one may begin with a
            checkpoint of an earlier one.

    Yields:
        The facts of each training, when all have ended: steps, positions, skipped steps, the training curve, and
        `seconds`; the start of the workers counts to the first. Those before one that failed are told, too.

    Raises:
        TrainingStopped: the loss or, in two steps in a row, a gradient became infinite or NaN, the student does not
            begin as its teacher, or an input is missing or damaged.
        TrainingFailedError: the workers failed too often.
    """
    settings, started = jobs[0].settings, time.monotonic()
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    trainer = TorchTrainer(
        work,
        train_loop_config={"jobs": [as_json(job) for job in jobs]},
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers, use_gpu=settings.use_gpu, resources_per_worker=worker_resources(settings)
        ),
        run_config=RunConfig(
            name="ray_train",
            **for_ray(jobs[0].table.url),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    for job in jobs:
        delete_file(_result_url(job))
    failure: TrainingFailedError | None = None
    try:
        trainer.fit()
    except TrainingFailedError as error:
        failure = error
    results = [read_json(_result_url(job)) or {} for job in jobs]
    starting = time.monotonic() - started - sum(facts.get("seconds", 0.0) for facts in results)
    for job, facts in zip(jobs, results, strict=True):
        if "seconds" not in facts:
            if failure is not None:
                raise _first_cause(failure) from failure
            raise TrainingStopped(f"{job.name}: {facts.get('stopped', 'the workers ended without a result')}")
        yield facts | {"seconds": facts["seconds"] + starting}
        starting = 0.0


def worker_resources(settings: DistillConfig) -> dict[str, float]:
    """What Ray has to have for one training worker."""
    gpu = {"GPU": 1.0} if settings.use_gpu else {}
    return {"CPU": float(settings.cpus_per_worker)} | gpu | settings.extra_resources


def as_json(job: Job) -> str:
    """A job as text, for its workers."""
    content = {each.name: getattr(job, each.name) for each in fields(job)}
    content |= {name: content[name].model_dump(mode="json") for name in ("config", "settings")}
    content |= {name: asdict(content[name]) for name in ("encoder", "table")}
    content["natural"] = [asdict(table) for table in job.natural]
    content["others"] = {name: [asdict(table) for table in pair] for name, pair in job.others.items()}
    return json.dumps(content)


def job_of(text: str) -> Job:
    """What `as_json` has written."""
    content = json.loads(text)
    start = content["start"]
    return Job(
        **content
        | {
            "config": parse_config(content["config"]),
            "settings": DistillConfig.model_validate_json(json.dumps(content["settings"]), strict=True),
            "encoder": EncoderSpec(**content["encoder"]),
            "start": None if start is None else tuple(start),
            "table": Table(**content["table"]),
            "natural": tuple(Table(**each) for each in content["natural"]),
            "others": {name: tuple(Table(**each) for each in tables) for name, tables in content["others"].items()},
            "branch_steps": tuple(content["branch_steps"]),
        }
    )


def _result_url(job: Job) -> str:
    return f"{job.table.url}/result.json"


def _first_cause(error: TrainingFailedError) -> Exception:
    """What a user can mend, if any worker failed for that; else the error as it is."""
    if not isinstance(error, WorkerGroupError):
        return error
    causes = (getattr(failure, "cause", None) or failure for failure in error.worker_failures.values())
    return next((cause for cause in causes if isinstance(cause, (*MENDABLE, StoreError))), error)


def train_worker(jobs: Sequence[Job]) -> None:
    """What every Ray Train worker does: the trainings that have no result yet, up to the first that is stopped."""
    logging.getLogger(LOGGER_OF_REPORTS).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    for job in jobs[_num_ended(jobs) :]:
        log_facts.update(run=job.config.run_dir, stage=job.name)
        try:
            facts = _distil(job)
        except TrainingStopped as error:  # in all workers at once; raised, it would only be tried again
            facts = {"stopped": str(error)}
        except MENDABLE as error:  # perhaps in this worker alone; the group starts again, and ends at once
            write_json(_result_url(job), {"stopped": str(error)})
            raise
        if dist.get_rank() == 0:
            write_json(_result_url(job), facts)
        if "stopped" in facts:
            return


def _num_ended(jobs: Sequence[Job]) -> int:
    """Trainings that an earlier worker group has ended; all of them, where one was stopped.

    Rank 0 looks and tells the others: to them, a store or network disk may show an older state.
    """
    number = torch.zeros(1, dtype=torch.int64)
    if dist.get_rank() == 0:
        results = [read_json(_result_url(job)) for job in jobs]
        stopped = any("stopped" in facts for facts in results if facts)
        number += len(jobs) if stopped else sum(facts is not None for facts in results)
    number = number.to(ray.train.torch.get_device())
    dist.broadcast(number, 0)
    return int(number)


def _distil(job: Job) -> dict[str, Any]:
    """One training; returns its facts, and leaves no memory in use."""
    started = time.monotonic()
    distiller = Distiller(job)
    facts = distiller.run()
    distiller.close()
    del distiller
    gc.collect()  # engine and hooks refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return facts | {"seconds": time.monotonic() - started}


class Distiller:
    """One worker: engine, teacher, data, and the loop over steps."""

    skipped_in_a_row = 0
    """Updates that the engine has just left out, one after the other."""

    def __init__(self, job: Job) -> None:
        self.job, self.config, self.settings = job, job.config, job.settings
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = ray.train.torch.get_device()
        self.dtype = DTYPES[self.settings.precision]
        self.word_end_weight = weight_of_word_ends(self.settings)
        with local_folder(job.teacher["path"]) as path:
            self.teacher = self._load_teacher(path)
            self.reader = self._open_reader(path)
            student = self._make_student(path)
        self.engine = self._make_engine(student)
        self.progress = Progress()
        self.stalled = 0.0
        self.leaving: set[str] = set()

    def run(self) -> dict[str, Any]:
        """Train to the last step and write the model; returns the facts of the run."""
        resumed = self._resume()
        if self.rank == 0:
            self._note_start(resumed)
        self.logger = Logger(self.job.config, self.job.table, self.job.num_steps) if self.rank == 0 else None
        self.gauges = {key: Gauge(f"salad_train_{key}", "Of the last steps.", ("run", "stage")) for key in GAUGES}
        for gauge in self.gauges.values():
            gauge.set_default_tags({"run": self.config.run_dir, "stage": self.job.name})
        with closing(self.reader.__iter__()) as steps:
            self.logged = (time.monotonic(), self.reader.wait_secs)
            while self.progress.step < self.job.num_steps:
                self._train_step(next(steps))
                self._after_step()
        self._require_everywhere(
            weights_fingerprint(self.teacher) == self.teacher_weights,
            "the teacher's weights changed during training; please report this as a bug",
        )
        if self.job.exports:
            self._export()
        self.checkpoints.wait()
        begun = {"begun_from": self.begun_from} if self.begun_from else {}
        return asdict(self.progress) | begun | {"skipped_steps": self._skipped_steps(), "num_workers": self.world_size}

    def close(self) -> None:
        """End what would outlive the training: threads, trackers, and the engine's hold on the models."""
        self.checkpoints.close()
        if self.logger is not None:
            self.logger.close()
        destroy(self.engine)

    def _load_teacher(self, path: str) -> torch.nn.Module:
        model, context = self.config.model, self.config.pack.context
        teacher = load_text_lm(path, self.job.teacher["revision"], self.dtype, model.attention, context)
        self.num_teacher, self.widths = num_active_parameters(teacher), attention_widths(teacher)
        self.teacher_weights = weights_fingerprint(teacher)
        return teacher.requires_grad_(False).eval().to(self.device)

    def _make_student(self, path: str) -> SpeechLM:
        model = self.config.model
        student = SpeechLM.from_teacher(
            path,
            self.job.teacher["revision"],
            model.adapter,
            self.job.encoder,
            self.config.seed,
            self.dtype,
            model.attention,
            self.config.pack.context,
        )
        student.config = replace(student.config, teacher=self.job.teacher["path"])  # and not a copy, soon gone
        return student

    def _make_engine(self, student: SpeechLM) -> Any:
        """The student under DeepSpeed; its optimizer steps parameters of two groups, adapter and LLM."""
        num_adapter = sum(parameter.numel() for parameter in student.adapter.parameters())
        self.num_student, self.vocabulary = self.num_teacher + num_adapter, len(student.head)
        self.head_share = head_share(student.llm, num_adapter)
        self._verify_start(student)
        if self.settings.compile:
            compile_layers(self.teacher)
        return make_engine(student, self.settings, self.reader.num_micro_batches, self.device)

    def _open_reader(self, path: str) -> LaneReader:
        earlier = self.job.earlier_shares
        return LaneReader(
            *self.job.natural,
            load_tokenizer(path, self.job.teacher["revision"]),
            self.config.pack,
            rank=self.rank,
            world_size=self.world_size,
            micro_batch_rows=self.settings.micro_batch_rows,
            first_row=self.job.first_row,
            others=self.job.others,
            mix=mix_of(self.config, self.job.shares),
            earlier=None if earlier is None else mix_of(self.config, earlier),
            stride=self.config.model.adapter.stride,
        )

    def _verify_start(self, student: SpeechLM) -> None:
        """Before step 0 the student is its teacher, in weights and in what it says in train mode, and both are what the
        run was planned with.
        """
        student_weights = weights_fingerprint(student.llm)
        self._require_everywhere(
            student_weights == self.teacher_weights,
            f"the student's weights ({student_weights}) are not its teacher's ({self.teacher_weights}) before step 0",
        )
        divergences = start_divergences(student.to(self.device), self.teacher)
        wrong = faults(divergences, self.dtype)
        self._require_everywhere(not wrong, "; ".join(wrong) or "another worker's student is not its teacher")
        tokenizer = tokenizer_hash(student.tokenizer)
        self._require_everywhere(
            tokenizer == self.job.teacher["tokenizer_hash"],
            f"the tokenizer at {self.job.teacher['path']} is not the one that the plan was made with",
        )
        self.loaded: dict[str, Any] = {
            "teacher": {name: self.job.teacher[name] for name in ("path", "revision")},
            "teacher_weights": self.teacher_weights,
            "student_weights": student_weights,
            "kl_before_step_0": divergences,
            "trial": self.teacher.trial,
            "tokenizer_hash": tokenizer,
            "llm_tensors": len(student.llm.state_dict()),
            "llm_parameters": sum(parameter.numel() for parameter in self.teacher.parameters()),
            "llm_active_parameters": self.num_teacher,
            "adapter_parameters": sum(parameter.numel() for parameter in student.adapter.parameters()),
            "encoder": asdict(self.job.encoder),
        }

    def _note_start(self, resumed: dict[str, Any]) -> None:
        """Add this start to `starts.json` and show it: what was loaded, by how many workers, from where it goes on."""
        workers = {"num_workers": self.world_size, "zero_stage": self.settings.zero_stage}
        note = {"at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | workers | resumed | self.loaded
        url = f"{self.job.table.url}/starts.json"
        write_json(url, {"starts": [*(read_json(url) or {"starts": []})["starts"], note]})
        loaded = self.loaded
        say(
            f"{self.job.name}: student = teacher before step 0: KL {loaded['kl_before_step_0']['student']:.1g} nats in "
            f"train mode; {loaded['llm_tensors']} tensors, "
            f"{told_parameters(loaded['llm_parameters'], self.num_teacher)}, weights {loaded['student_weights']}; "
            f"adapter {loaded['adapter_parameters']:,} parameters; {self.world_size} workers"
        )
        if self.head_share >= TOLD_HEAD_SHARE:
            say(
                f"{self.job.name}: the vocabulary of {self.vocabulary:,} tokens takes about {self.head_share:.0%} of "
                "the FLOP"
            )
        if self.dtype == torch.bfloat16 and self.device.type == "cpu" and not has_fast_bfloat16():
            say(
                f"{self.job.name}: this CPU has no bf16 instructions, so that distill.precision=bf16 can take ten "
                "times as long as fp32; set distill.precision=fp32 unless memory forbids it"
            )
        if resumed["resumed_from"]:
            say(f"{self.job.name}: continuing after step {resumed['step']}, from {resumed['resumed_from']}")
        elif self.begun_from:
            say(f"{self.job.name}: beginning with weights and optimizer of {self.begun_from}")

    def _require_everywhere(self, good: bool, what: str) -> None:
        """Stops all workers where any of them sees something wrong."""
        if self._sum_over_workers(torch.tensor([float(not good)])).item():
            raise TrainingStopped(what)

    def _train_step(self, batches: list[Batch]) -> None:
        """One optimizer step over this worker's micro-batches."""
        step = self.progress.step
        factor = learning_rate_factor(step, self.job.num_steps, self.job.warmup_steps, self.job.decay_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        missing = self.reader.num_micro_batches - len(batches)  # other workers may have a lane more
        batches = batches + [without_labels(batches[-1])] * missing
        weights = [label_weight(batch, self.word_end_weight) for batch in batches]
        num_labels = self._sum_over_workers(torch.tensor([sum(weights)], dtype=torch.float64))
        sums = torch.zeros(len(SUMS), dtype=torch.float64)
        for index, batch in enumerate(batches):
            sums += self._forward_backward(batch, float(num_labels))
            if index == len(batches) - 1:
                sums = self._sum_over_workers(sums)
                self._require_finite(sums)
            skipped = self.engine.skipped_steps
            self.engine.step()
        self._require_updates(self.engine.skipped_steps > skipped)
        if self.settings.word_ends and not sums[SUMS.index("num_word_ends")] and step == self.reader.start_step:
            self._say_no_word_ends()
        self.progress.sums = [a + b for a, b in zip(self.progress.sums, sums.tolist(), strict=True)]
        self.progress.step += 1
        for name in ("num_positions", "num_text_positions"):
            setattr(self.progress, name, getattr(self.progress, name) + int(sums[SUMS.index(name)]))

    def _say_no_word_ends(self) -> None:
        if self.rank == 0:
            say(
                f"{self.job.name}: distill.word_ends=true compared nothing in the first step, so that its objective is "
                "the paper's: no word ended inside a speech span, as where utterances have no word times "
                f"(align.aligner={self.config.align.aligner}) or spans are of one word (pack.speech_words)"
            )

    def _forward_backward(self, batch: Batch, num_labels: float) -> Tensor:
        """Accumulate the gradient of one micro-batch; returns its `SUMS`."""
        batch = batch.to(self.device, self.dtype)
        loss = forward_backward(
            self.engine, self.teacher, batch, self.settings, num_labels, self.reader.num_micro_batches
        )
        count, num_ends = len(batch.labels), len(batch.word_end_student)
        weight = label_weight(batch, self.word_end_weight)
        counts = (weight, count, count, num_ends)  # what each of the loss's means is taken over
        sums = [mean.item() * number for mean, number in zip(loss[:4], counts, strict=True)]
        flops = training_flops(self.num_student, self.num_teacher, self.widths, batch)
        text_kl, num_text = 0.0, 0
        if batch.num_text_positions:  # else a device would be waited for in vain
            is_text = batch.is_text
            text_kl, num_text = loss.each_kl[is_text].sum().item(), int(is_text.sum())
        counted = (weight, count, num_ends, num_text, batch.num_positions, batch.num_text_positions, flops)
        return torch.tensor([*sums, text_kl, *counted], dtype=torch.float64)

    def _sum_over_workers(self, values: Tensor) -> Tensor:
        values = values.to(self.device, torch.float64)
        dist.all_reduce(values)
        return values.cpu()

    def _require_finite(self, sums: Tensor) -> None:
        """Every worker sees the same sums, so all of them stop, before any updates its weights."""
        if not torch.isfinite(sums).all():
            raise TrainingStopped(
                f"the loss of step {self.progress.step + 1} is not finite; the weights were not updated. Lower "
                "distill.learning_rate and distill.adapter_learning_rate (or Muon's, distill.muon_learning_rate and "
                f"distill.adapter_muon_learning_rate), or look at this step's rows in {self.job.natural[0].label}"
            )

    def _require_updates(self, skipped: bool) -> None:
        """The engine leaves an update out where a gradient is not finite, in all workers alike, and says nothing."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= MAX_SKIPPED:
            step = self.progress.step + 1
            raise TrainingStopped(
                f"the gradients of steps {step + 1 - MAX_SKIPPED} to {step} are not finite, although their losses are; "
                "the weights were not updated. Set distill.precision=fp32, lower "
                "distill.learning_rate and distill.adapter_learning_rate, or look at these steps' rows in "
                f"{self.job.natural[0].label}"
            )

    def _after_step(self) -> None:
        step = self.progress.step
        last = step == self.job.num_steps
        if step % self.settings.log_every == 0 or last:
            self._log()
        stays = step in self.job.branch_steps
        if self._has_notice() or step % self.settings.checkpoint_every == 0 or stays or last:
            self._save_checkpoint(stays)

    def _has_notice(self) -> bool:
        """Whether another of the machines is about to be taken away, as spot machines are; all workers hear the same.

        Ray begins anew with other machines when it is gone, so what is in a checkpoint by then is not lost.
        """
        notice = ray.train.get_preemption_info()
        new = set(notice.preempted_node_ids) - self.leaving if notice else set()
        self.leaving |= new
        if new and self.rank == 0:
            say(f"{self.job.name}: a machine is about to be taken away; saving step {self.progress.step} before")
        return bool(new)

    def _log(self) -> None:
        """Add a row to the training curve and show it."""
        now, waited, stalled = time.monotonic(), self.reader.wait_secs, self.checkpoints.stalled_secs
        secs, waited_secs, stalled_secs = now - self.logged[0], waited - self.logged[1], stalled - self.stalled
        self.logged, self.stalled = (now, waited), stalled
        self.progress.train_seconds += secs
        sums = dict(zip(SUMS, self.progress.sums, strict=True))
        self.progress.sums = [0.0] * len(SUMS)
        over = {"loss": "label_weight", "kl": "num_labels", "nll": "num_labels"}
        if self.settings.word_ends and sums["num_word_ends"]:  # the mean over none would read as perfect
            over["word_end_kl"] = "num_word_ends"
        row = {name: sums[name] / (sums[count] or 1.0) for name, count in over.items()} | {
            "step": self.progress.step,
            "num_positions": self.progress.num_positions,
            **{group["rate"]: group["lr"] for group in self.engine.optimizer.param_groups},
            "grad_norm": float(self.engine.get_global_grad_norm() or 0.0),
            "skipped_steps": self._skipped_steps(),
            "positions_per_sec": sums["num_positions"] / secs,
            "waiting_share": waited_secs / secs,
            "checkpoint_share": stalled_secs / secs,
            "memory_gib": peak_memory_gib(self.device),
        }
        if TEXT in self.job.shares:  # how far the student's text is from its teacher's: forgetting, as it comes
            row["text_kl"] = sums["text_kl"] / max(sums["num_text_labels"], 1)
            row["num_text_positions"] = self.progress.num_text_positions
        if (peak := peak_flops(self.device)) is not None:
            row["mfu"] = sums["flops"] / secs / peak / self.world_size
        self.progress.log.append(row)
        if self.logger is not None:
            self.logger.write(row)
            for key in row.keys() & set(GAUGES):
                self.gauges[key].set(row[key])

    def _skipped_steps(self) -> int:
        return self.progress.skipped_steps + self.engine.skipped_steps

    def _save_checkpoint(self, stays: bool) -> None:
        """Weights, optimizer and progress; training goes on as soon as they are copied."""
        state = asdict(self.progress) | {
            "train_seconds": self.progress.train_seconds + time.monotonic() - self.logged[0],
            "skipped_steps": self._skipped_steps(),
            "optimizer_step": optimizer_step(self.engine),
        }
        self.checkpoints.save(partitions(self.engine), state, stays)

    def _resume(self) -> dict[str, Any]:
        """Continue from the last whole checkpoint, if there is one, whoever wrote it; all workers from the same.

        Returns:
            What `starts.json` is to say about it.
        """
        url = checkpoints_url(self.job.table)
        not_whole: list[str] = []
        chosen: list[Any] = [None, None, None]
        if self.rank == 0:
            start = self.job.start and checkpoint_at(*self.job.start)
            chosen = [latest(url, not_whole.append, self.job.num_steps), new_token(), start]
        dist.broadcast_object_list(chosen)
        for sentence in not_whole:
            say(f"{self.job.name}: {sentence}")
        checkpoint, token, start = chosen
        number = self.settings.keep_checkpoints
        self.checkpoints = CheckpointWriter(url, self.rank, self.world_size, token, number)
        self.begun_from = start and start.url
        facts = {"not_whole": not_whole, "begun_from": self.begun_from}
        if checkpoint is None:
            if start is not None:
                self._load(start)
            return facts | {"step": 0, "resumed_from": None}
        self._load(checkpoint)
        if self.rank == 0 and checkpoint.step in self.job.branch_steps:
            keep(checkpoint)
        self.progress = Progress(**{name: checkpoint.state[name] for name in asdict(self.progress)})
        self.reader.start_step = self.progress.step
        return facts | {"step": self.progress.step, "resumed_from": checkpoint.url}

    def _load(self, checkpoint: Checkpoint) -> None:
        """Weights and optimizer."""
        reader = CheckpointReader(checkpoint)
        for partition in partitions(self.engine):
            reader.fill(partition)
        restored(self.engine, checkpoint.state["optimizer_step"])

    def _export(self) -> None:
        """Write the student as plain safetensors to `model` in the table's folder."""
        zero3 = self.settings.zero_stage == 3
        weights = self.engine._zero3_consolidated_16bit_state_dict() if zero3 else self.engine.module.state_dict()
        if self.rank == 0:
            with scratch_folder() as folder:
                self.engine.module.save_pretrained(f"{folder}/model", state_dict=weights)
                Path(folder, "model", "README.md").write_text(self.job.card, encoding="utf-8")
                put_folder(f"{folder}/model", f"{self.job.table.url}/model")
        dist.barrier()


def checkpoints_url(table: Table) -> str:
    """Where a training keeps its checkpoints."""
    return f"{table.url}/checkpoints"


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the GPU, or of this process (Linux counts it in KiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
