"""`salad plan`: what a config will take before anything runs: data, epochs, FLOP, hours, bytes, memory, money.

Every number is derived from the config and from rates, step by step, and every step is shown. A rate is an assumption
(`rates.yaml`, which users copy and edit) until a run on this kind of machine has measured it: a stage's manifest says
when its first actor had finished its first shard and when all had finished the last, which tells the start from the
work. Nothing here needs Ray.

Words are spoken or written by the spans of `pack`: with text spans of t words and speech spans of s words on average,
s / (s + t) of the words are heard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal, Protocol

import yaml
from pydantic import Field, ValidationError
from rich.table import Table as RichTable
from transformers import AutoConfig, PreTrainedConfig, Qwen2Config

from salad_ray.config import (
    PICKED_PER_SHARD,
    STAGE2_SHARE,
    BenchmarkConfig,
    Config,
    ConfigError,
    Section,
    SetName,
    path_name,
)
from salad_ray.console import clock
from salad_ray.distill.step import PEAK_FLOPS
from salad_ray.scaling.memory import Shape, training_memory
from salad_ray.tables import Table, read_bytes
from salad_ray.text.world import DOMAINS, world_passages

RATES = Path(__file__).with_name("rates.yaml")
ENCODERS = {"mimi": (512, 12.5), "log_mel": (640, 12.5)}
"""Width and frame rate."""
GPU_STAGES = {"stage1", "stage2"}
MICRO_BATCHES = (1, 2, 4, 8, 16)


class Cluster(Section):
    cpus: int
    gpus: int
    gpu: Literal["H100", "H200", "A100", "L40S", "L4", "B200"]
    gpu_memory_gib: float


class Prices(Section):
    currency: str
    cpu_hour: float
    gpu_hour: float
    spot_gpu_hour: float
    storage_gb_month: float
    months: float


class SpeechRates(Section):
    words_per_sec: float
    tokens_per_word: float
    secs_per_utterance: float
    words_per_passage: float
    secs_per_item: float
    items_per_benchmark: float


class TrainingRates(Section):
    mfu: float
    fill: float
    cpu_flops: float


class StageRate(Section):
    """Seconds until the first actor works, and of one actor for one unit of work."""

    start: float
    unit: float | None
    per: str
    source: str = "assumption"


class ByteRates(Section):
    source_hour: float
    flac_hour: float
    opus_hour: float
    text_passage: float
    plan_utterance: float


class Rates(Section):
    """What `rates.yaml` holds."""

    cluster: Cluster
    prices: Prices
    corpora: dict[str, float]
    web: dict[str, float]
    speech: SpeechRates
    training: TrainingRates
    stages: dict[str, StageRate]
    bytes: ByteRates
    models: dict[str, dict[str, Any]]
    sources: dict[str, str] = Field(default_factory=dict)
    """Which of the other numbers were measured, and where."""


class Step(Protocol):
    """A step of the pipeline."""

    @property
    def stage(self) -> str: ...

    @property
    def set(self) -> str: ...

    @property
    def tables(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Line:
    """One step of the derivation: `value` in `unit`, and how it comes about."""

    name: str
    value: float
    unit: str
    how: str
    source: str = "derived"


@dataclass(frozen=True)
class StageCost:
    """What one step of the pipeline takes."""

    stage: str
    set: str
    amount: float
    unit: str
    actors: int
    secs: float
    cpu_hours: float
    gpu_hours: float
    money: float
    source: str


@dataclass(frozen=True)
class Memory:
    """Peak of one training worker under a setting, in bytes by part; `peak` is their worst sum."""

    zero_stage: int
    micro_batch_rows: int
    is_configured: bool
    parts: dict[str, float]
    fits: bool | None
    """None without a GPU."""


@dataclass(frozen=True)
class Plan:
    lines: list[Line]
    stages: list[StageCost]
    memory: list[Memory]
    storage: dict[str, float]
    """Bytes by what lies there."""
    totals: dict[str, float]
    currency: str
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_rates(path: str | None = None) -> Rates:
    """The rates of a YAML file; raises `ConfigError` naming the key."""
    try:
        return Rates.model_validate(yaml.safe_load(read_bytes(path) if path else RATES.read_bytes()))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; copy {RATES} and edit it") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path or RATES}: '{key}': {first['msg']}") from None


def make_plan(config: Config, steps: Sequence[Step], rates: Rates) -> Plan:
    """Derive everything; raises `ConfigError` where a corpus or model is not known to the rates."""
    llm = text_llm(config, rates)
    data = Amounts(config, rates, llm)
    costs = [stage_cost(config, step, data, rates) for step in steps]
    storage = storage_bytes(config, data, rates)
    prices = rates.prices
    gigabytes = sum(storage.values()) / 1e9
    monthly = gigabytes * prices.storage_gb_month
    totals = {
        "secs": sum(cost.secs for cost in costs),
        "cpu_hours": sum(cost.cpu_hours for cost in costs),
        "gpu_hours": sum(cost.gpu_hours for cost in costs),
        "compute": sum(cost.money for cost in costs),
        "storage_gb": gigabytes,
        "storage_month": monthly,
        "money": sum(cost.money for cost in costs) + monthly * prices.months,
    }
    memory = memory_table(config, data, rates)
    return Plan(data.lines, costs, memory, storage, totals, prices.currency, notes(memory, costs))


def notes(memory: list[Memory], costs: list[StageCost]) -> list[str]:
    """What the reader has to know before trusting the numbers."""
    found = []
    if memory[0].fits is False:
        fitting = next((row for row in reversed(memory) if row.fits), None)
        remedy = "; take distill.activation_checkpointing=true, or a smaller pack.context"
        if fitting is not None:
            rows = fitting.micro_batch_rows
            remedy = f"; distill.zero_stage={fitting.zero_stage} with distill.micro_batch_rows={rows} does"
        found.append(f"the configured training does not fit into the GPU's memory{remedy}")
    assumed = {cost.stage for cost in costs if cost.source == "assumption"}
    if assumed:
        found.append(
            f"the rates of {', '.join(sorted(assumed))} are assumptions; --calibrate measures on this machine, and "
            "--measured RUN_DIR takes those of a run"
        )
    return found


def text_llm(config: Config, rates: Rates) -> PreTrainedConfig:
    """The text LLM's config: of the embedded world's, of the rates, else where its weights lie."""
    if config.model.teacher == "world":
        tiny = config.model.tiny_lm
        return Qwen2Config(
            hidden_size=tiny.hidden_size,
            num_hidden_layers=tiny.num_layers,
            num_attention_heads=tiny.num_heads,
            num_key_value_heads=tiny.num_heads,
            intermediate_size=tiny.ffn_size,
            vocab_size=860,
            tie_word_embeddings=True,
        )
    known = rates.models.get(config.model.teacher)
    if known is not None:
        return AutoConfig.for_model(**known)
    try:
        return AutoConfig.from_pretrained(config.model.teacher, revision=config.model.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.teacher={config.model.teacher}: its config cannot be read here ({str(error).splitlines()[0]}); add "
            "its shape to `models` in a copy of rates.yaml, and pass that with --rates"
        ) from None


class Amounts:
    """How much of everything there will be; `lines` shows each step."""

    def __init__(self, config: Config, rates: Rates, llm: PreTrainedConfig) -> None:
        self.config, self.rates, self.lines = config, rates, list[Line]()
        dim, self.frame_rate = ENCODERS[config.encode.encoder]
        self.shape = Shape(llm, config.model.adapter, dim)
        self._speech()
        self._positions()
        self._flops()

    def _add(self, name: str, value: float, unit: str, how: str, source: str = "derived") -> float:
        self.lines.append(Line(name, float(value), unit, how, source))
        return float(value)

    def _speech(self) -> None:
        config, rates = self.config, self.rates
        speech, world = rates.speech, config.world
        self.passages, self.hours = dict[str, float](), dict[str, float]()
        if config.ingest.corpora:
            named = {corpus.name or path_name(corpus.path): corpus for corpus in config.ingest.corpora}
            found = {name: known(rates.corpora, name, "corpora", "hours") for name in named}
            how = " + ".join(f"{hours:,.0f} ({name})" for name, hours in found.items())
            natural = self._add("natural speech", sum(found.values()), "h", how, "assumption")
            self.natural = self._add(
                "training speech", natural * (1 - config.ingest.heldout_share), "h", "without ingest.heldout_share"
            )
            self.utterances = natural * 3600 / speech.secs_per_utterance
        else:
            words = world_words()
            self.natural = self._add(
                "natural speech",
                world.num_natural * words / speech.words_per_sec / 3600,
                "h",
                f"{world.num_natural:,} documents × {words:.1f} words / {speech.words_per_sec:.2f} words/s",
                rates.sources.get("words_per_sec", "assumption"),
            )
            self.utterances = float(world.num_natural)
        self._written(speech, world_words() if not config.ingest.web else speech.words_per_passage)

    def _written(self, speech: SpeechRates, words: float) -> None:
        """Web text, and what is spoken of it."""
        config = self.config
        hours = words / speech.words_per_sec / 3600
        if config.ingest.web:
            names = [corpus.name or path_name(corpus.path) for corpus in config.ingest.web]
            found = {
                name: known(self.rates.web, name, "web", "passages") * corpus.share
                for name, corpus in zip(names, config.ingest.web, strict=True)
            }
            how = " + ".join(f"{number:,.0f} ({name})" for name, number in found.items())
            self.web = self._add("web text", sum(found.values()), "passages", how, "assumption")
        else:
            self.web = float(config.world.num_web)
        heldout = config.ingest.passages.num_heldout if config.ingest.web else config.world.num_heldout
        self.passages["heldout"] = heldout if "heldout" in config.measured_sets else 0
        second = config.stage2 is not None
        self.passages["probe"] = config.cluster.num_clusters * config.probe.passages_per_cluster * second
        budget = config.select.budget_hours or self.natural * (config.select.budget_percent or 1.0) / 100
        if config.stage2 is not None:
            self._add("synthetic speech", budget, "h", "select.budget_*")
        self.passages["active"] = budget / hours * second
        self.passages["benchmark"] = self._items()
        self.hours = {name: number * hours for name, number in self.passages.items()}
        self.hours["benchmark"] = self.passages["benchmark"] * (
            speech.secs_per_item / 3600 if self.config.evaluate.benchmarks else hours / 2
        )
        self.hours["natural"] = self.natural

    def _items(self) -> float:
        config = self.config
        if not config.evaluate.benchmarks:
            return float(config.world.num_questions if config.has_benchmark else 0)

        def items(benchmark: BenchmarkConfig) -> float:
            return benchmark.max_items or self.rates.speech.items_per_benchmark

        return float(sum(map(items, config.evaluate.benchmarks)))

    def _positions(self) -> None:
        config, speech = self.config, self.rates.speech
        text, spoken = mean(config.pack.text_words), mean(config.pack.speech_words)
        heard = self._add(
            "share of words heard", spoken / (spoken + text), "", f"{spoken:g} / ({spoken:g} + {text:g}) words a span"
        )
        frames = self.natural * 3600 * self.frame_rate
        words = self.natural * 3600 * speech.words_per_sec
        self.frames = self._add("speech frames", frames, "", f"hours × 3,600 × {self.frame_rate} Hz")
        self.speech_share = heard * frames / (heard * frames + (1 - heard) * words * speech.tokens_per_word)
        epoch = self._add(
            "positions of an epoch",
            heard * frames + (1 - heard) * words * speech.tokens_per_word,
            "",
            f"{heard:.3f} × frames + {1 - heard:.3f} × {words:,.3g} words × {speech.tokens_per_word:g} tokens",
        )
        self.teacher_share = words * speech.tokens_per_word / epoch
        rows = config.pack.num_lanes * config.pack.rows_per_lane
        self.step = rows * config.pack.context * self.rates.training.fill
        settings = config.distill
        steps = settings.num_steps or math.ceil((settings.num_positions or epoch) / self.step)
        self.trained = {"stage1": self._add("Stage I, D", steps * self.step, "positions", f"{steps:,} steps")}
        self.epochs = self._add("epochs of Stage I", self.trained["stage1"] / epoch, "", "D / positions of an epoch")
        if config.stage2 is not None:
            second = config.stage2
            given = math.ceil(second.num_positions / self.step) if second.num_positions else None
            more = second.num_steps or given or max(1, round(STAGE2_SHARE * steps))
            self.trained["stage2"] = self._add("Stage II", more * self.step, "positions", f"{more:,} steps")

    def _flops(self) -> None:
        student, teacher = self.shape.num_llm + self.shape.num_adapter, self.shape.num_llm
        self._add("text LLM", teacher, "parameters", self.config.model.teacher)
        self._add("adapter", self.shape.num_adapter, "parameters", "model.adapter")
        self.flops_per_position = self._add(
            "FLOP of a position",
            6 * student + 2 * teacher * self.teacher_share,
            "",
            f"6 × {student:,.4g} student + 2 × {teacher:,.4g} teacher × {self.teacher_share:.3f} of the positions",
        )
        total = self.flops_per_position * sum(self.trained.values())
        self._add("FLOP in all", total, "", "positions × FLOP of a position")
        self._add(
            "features",
            self.frames * self.shape.encoder_dim * (1 if self.config.encode.storage == "int8" else 2),
            "bytes",
            f"frames × {self.shape.encoder_dim} × {self.config.encode.storage}",
        )


def known(table: dict[str, float], name: str, key: str, unit: str) -> float:
    if name not in table:
        raise ConfigError(
            f"the plan does not know how many {unit} '{name}' has; add it under `{key}` in a copy of rates.yaml, and "
            "pass that with --rates"
        )
    return table[name]


def world_words(sample: int = 200) -> float:
    """Words of a document of the embedded world, on average."""
    return mean(len(passage.text.split()) for passage in world_passages(sample, DOMAINS, 0, "web"))


def kind_of(config: Config, step: Step) -> str:
    """The key of `rates.stages` for a step."""
    choices = {
        "align": config.align.aligner,
        "synthesize": config.synthesize.synthesizer,
        "encode": config.encode.encoder,
        "embed": config.embed.embedder,
        "teacher": "world" if config.model.teacher == "world" else "model",
        "ingest": "recorded" if "catalog" in step.tables else "text",
    }
    if step.stage in ("stage1", "stage2"):
        return "train"
    return f"{step.stage} {choices[step.stage]}" if step.stage in choices else step.stage


def gpus_of(config: Config, step: Step) -> float:
    """GPUs of each actor of a step."""
    if step.stage in GPU_STAGES:
        return 1.0 if config.distill.use_gpu else 0.0
    section = getattr(config, step.stage, None)
    return float(getattr(section, "num_gpus", 0.0))


def amount_of(config: Config, step: Step, data: Amounts) -> float:
    """Units of work of a step, as `rates.stages` counts them."""
    name = step.set or "web"
    if step.stage in ("ingest", "embed", "cluster", "probe", "select"):
        if "catalog" in step.tables:
            return data.natural
        own = {"web": data.web, "natural": float(config.world.num_natural)} | data.passages
        return data.web if step.stage in ("probe", "select") else own[name]
    if step.stage in ("synthesize", "encode", "align"):
        heard = len(config.evaluate.conditions) if (step.stage, name) == ("encode", "benchmark") else 1
        return data.hours[name] * heard
    if step.stage == "measure":
        systems = 1 if name == "probe" else len(step.tables)
        recorded = data.natural * config.ingest.heldout_share / (1 - config.ingest.heldout_share)
        return (recorded if name == "natural" else data.hours[name]) * systems
    if step.stage == "pack":
        return data.utterances * math.ceil(data.epochs) if name == "natural" else data.passages["active"]
    if step.stage == "evaluate":
        return data.passages["benchmark"] * len(step.tables) * len(config.evaluate.conditions)
    if step.stage == "teacher":
        return float(config.model.tiny_lm.num_steps) if config.model.teacher == "world" else 1.0
    return 1.0


def actors_of(config: Config, step: Step, amount_shards: int, rates: Rates) -> int:
    gpus = gpus_of(config, step)
    room = rates.cluster.gpus / gpus if gpus else (config.ray.num_cpus or rates.cluster.cpus)
    return max(1, min(int(room), amount_shards, config.ray.max_actors or 10**9))


def shards_of(config: Config, step: Step, data: Amounts) -> int:
    """Shards that a step's work is dealt to."""
    if step.stage == "pack":
        return config.pack.num_lanes * (math.ceil(data.epochs) if step.set == "natural" else 1)
    if step.set in ("heldout", "probe", "active", "benchmark"):
        lanes = config.pack.num_lanes
        number = math.ceil(data.passages[step.set] / PICKED_PER_SHARD)
        return max(1, min(config.ingest.num_shards, -(-number // lanes) * lanes))
    return config.ingest.num_shards


def stage_cost(config: Config, step: Step, data: Amounts, rates: Rates) -> StageCost:
    """Start, then the shards in waves of as many as there are actors."""
    kind = kind_of(config, step)
    if kind not in rates.stages:
        raise ConfigError(f"rates: `stages` has no '{kind}'; add it: {{start: …, unit: …, per: …}}")
    rate = rates.stages[kind]
    if kind == "train":
        return _training_cost(config, step, data, rates)
    amount, shards = amount_of(config, step, data), shards_of(config, step, data)
    is_single = step.stage in ("teacher", "report")
    actors = 1 if is_single else actors_of(config, step, shards, rates)
    waves = 1.0 if is_single else math.ceil(shards / actors) * actors / shards
    busy = (rate.unit or 0.0) * amount
    secs = rate.start + busy / actors * waves
    gpus = gpus_of(config, step)
    gpu_hours, cpu_hours = (secs * actors * gpus / 3600, 0.0) if gpus else (0.0, secs * actors / 3600)
    money = gpu_hours * rates.prices.spot_gpu_hour + cpu_hours * rates.prices.cpu_hour
    return StageCost(step.stage, step.set, amount, rate.per, actors, secs, cpu_hours, gpu_hours, money, rate.source)


def _training_cost(config: Config, step: Step, data: Amounts, rates: Rates) -> StageCost:
    rate, settings, training = rates.stages["train"], config.distill, rates.training
    workers = settings.most_workers
    positions = data.trained[step.stage] * len(step.tables)
    if rate.unit is not None:
        busy, source = rate.unit * positions, rate.source
    else:
        peak = training.mfu * PEAK_FLOPS[rates.cluster.gpu] if settings.use_gpu else training.cpu_flops
        busy, source = data.flops_per_position * positions / peak, "assumption"
    secs = rate.start * len(step.tables) + busy / workers
    gpu_hours = secs * workers / 3600 if settings.use_gpu else 0.0  # a GPU's price has its machine's cores in it
    cpu_hours = 0.0 if settings.use_gpu else secs * workers * settings.cpus_per_worker / 3600
    money = gpu_hours * rates.prices.gpu_hour + cpu_hours * rates.prices.cpu_hour
    return StageCost(step.stage, "", positions, "position", workers, secs, cpu_hours, gpu_hours, money, source)


def memory_table(config: Config, data: Amounts, rates: Rates) -> list[Memory]:
    """The configured setting first, then the other ZeRO stages and micro-batches that the lanes allow."""
    settings = config.distill
    least = settings.num_workers if isinstance(settings.num_workers, int) else settings.num_workers[0]
    per_worker = max(1, config.pack.num_lanes // settings.most_workers * config.pack.rows_per_lane)
    limit = rates.cluster.gpu_memory_gib * 2**30 if settings.use_gpu else None
    found = []
    for stage in (1, 2, 3):
        for rows in sorted({size for size in MICRO_BATCHES if per_worker % size == 0} | {settings.micro_batch_rows}):
            changed = settings.model_copy(update={"zero_stage": stage, "micro_batch_rows": rows})
            parts = training_memory(data.shape, changed, config.pack, least, data.speech_share)
            own = (stage, rows) == (settings.zero_stage, settings.micro_batch_rows)
            fits = None if limit is None else parts["peak"] <= 0.92 * limit  # the rest is CUDA's and fragmentation
            found.append(Memory(stage, rows, own, parts, fits))
    return sorted(found, key=lambda row: not row.is_configured)


def storage_bytes(config: Config, data: Amounts, rates: Rates) -> dict[str, float]:
    """What lies in run_dir, and the corpora themselves."""
    sizes, dim = rates.bytes, data.shape.encoder_dim
    per_hour = 3600 * data.frame_rate * dim * (1 if config.encode.storage == "int8" else 2)
    synthetic = sum(hours for name, hours in data.hours.items() if name != "natural" or not config.ingest.corpora)
    student = data.shape.num_llm + data.shape.num_adapter
    width = 4 if config.distill.precision == "fp32" else 2
    models = len(data.trained) + bool(config.stage2 and config.stage2.control)
    return {
        "recorded corpora": data.natural * sizes.source_hour if config.ingest.corpora else 0.0,
        "synthetic speech": synthetic
        * (sizes.opus_hour if config.synthesize.audio_format == "OPUS" else sizes.flac_hour),
        "features": sum(data.hours.values()) * per_hour,
        "web text": data.web * sizes.text_passage,
        "embeddings": (data.web * 2 if config.stage2 is not None else 0.0)
        * (config.embed.dim if config.embed.embedder == "tfidf" else 384),
        "plan": data.utterances * math.ceil(data.epochs) * sizes.plan_utterance,
        "checkpoints": 12.0 * student * (config.distill.keep_checkpoints + 1) * models,
        "models": float(width * student * models),
    }


def measured_rates(rates: Rates, config: Config, steps: Sequence[Step], planned: Config) -> Rates:
    """Rates with what a finished run has measured: starts and units of its stages, speech, training.

    Args:
        config, steps: of that run; its tables are read.
        planned: what is planned; of another model, device or precision a rate stays what it was.
    """
    stages = dict(rates.stages)
    seen: dict[str, list[tuple[float, float, float | None]]] = {}
    for step in steps:
        found = _measured(config, step) if comparable(config, planned, step) else None
        if found is not None:
            seen.setdefault(kind_of(config, step), []).append(found)
    source = f"measured in {config.run_dir}"
    for kind, rows in seen.items():
        largest = max(rows, key=lambda row: row[0])
        units = [row for row in rows if row[2] is not None]
        unit = max(units, key=lambda row: row[0])[2] if units else stages[kind].unit
        start = median(row[1] for row in rows) if units else largest[1]
        stages[kind] = stages[kind].model_copy(update={"start": start, "unit": unit, "source": source})
    changes: dict[str, Any] = {"stages": stages}
    hours, words = _spoken(config)
    if hours:
        changes["speech"] = rates.speech.model_copy(update={"words_per_sec": words / hours / 3600})
        changes["sources"] = rates.sources | {"words_per_sec": source}
    return rates.model_copy(update=changes)


def comparable(run: Config, planned: Config, step: Step) -> bool:
    """Whether a step of a run tells how fast the planned one would be, on the same machines."""
    same_model = (run.model.teacher, run.model.adapter) == (planned.model.teacher, planned.model.adapter)
    if step.stage in ("stage1", "stage2"):
        names = ("use_gpu", "precision", "activation_checkpointing", "compile")
        same = all(getattr(run.distill, name) == getattr(planned.distill, name) for name in names)
        return same_model and same and run.pack.context == planned.pack.context
    if step.stage in ("measure", "evaluate"):
        return same_model and gpus_of(run, step) == gpus_of(planned, step)
    return kind_of(run, step) == kind_of(planned, step) and gpus_of(run, step) == gpus_of(planned, step)


def _measured(config: Config, step: Step) -> tuple[float, float, float | None] | None:
    """Amount, start, and seconds of one actor for a unit (None where the waves do not tell); None if unfinished."""
    manifests = [Table(config.run_dir, step.set, name).manifest() for name in step.tables]
    done = [manifest for manifest in manifests if manifest is not None]
    if len(done) < len(manifests) or not done:
        return None
    if step.stage in GPU_STAGES:
        return _measured_training(done)
    if step.stage == "teacher" and "training" in done[0]:
        steps_ = done[0]["config"]["model.tiny_lm"]["num_steps"]
        secs = done[0]["training"]["seconds"]
        return steps_, done[0]["seconds"] - secs, secs / steps_
    amount = _amount(config, step, done)
    secs = sum(manifest.get("seconds", 0.0) for manifest in done)
    timed = [manifest for manifest in done if {"first_secs", "num_actors"} <= manifest.keys()]
    shards = sum(len(manifest["shards"]) for manifest in timed)
    waves = math.ceil(shards / timed[0]["num_actors"]) if timed else 0
    whole = bool(timed) and timed[0].get("num_made") == shards  # else it was resumed, and the times are of a part
    if waves < 3 or not amount or not whole:  # too few to tell the start from the work
        return amount, secs, None
    working = sum(manifest["seconds"] for manifest in timed) - timed[0]["first_secs"]
    wave = max(working, 0.0) / (waves - 1)
    return amount, max(secs - wave * waves, 0.0), wave * shards / amount


def _measured_training(done: list[dict[str, Any]]) -> tuple[float, float, float | None]:
    log = done[0]["log"]
    rates = [row["positions_per_sec"] for row in log[1:]] or [row["positions_per_sec"] for row in log]
    unit = done[0]["num_workers"] / median(rates)
    start = done[0].get("seconds", 0.0) - done[0]["num_positions"] / median(rates)
    return done[0]["num_positions"], max(start, 0.0), unit


def _amount(config: Config, step: Step, done: list[dict[str, Any]]) -> float:
    """Units of a finished step, counted from its tables."""
    if step.stage in ("synthesize", "encode", "align"):
        return _hours(Table(config.run_dir, step.set, step.tables[-1]))
    if step.stage == "measure":
        return _hours(Table(config.run_dir, step.set, "features")) * len(step.tables)
    if step.stage in ("probe", "select"):
        return float((Table(config.run_dir, "web", "passages").manifest() or {}).get("num_rows", 0))
    if "catalog" in step.tables:
        return _hours(Table(config.run_dir, step.set, "utterances"))
    if step.stage == "evaluate":
        items = Table(config.run_dir, "benchmark", "items").manifest() or {}
        return float(items.get("num_rows", 0) * len(step.tables))
    return float(done[0].get("num_kept", 0))


def _hours(table: Table) -> float:
    return (
        sum(sum(table.read(shard, ["duration_secs"])["duration_secs"].to_pylist()) for shard in table.shards()) / 3600
    )


def _spoken(config: Config) -> tuple[float, float]:
    """Hours and words of the natural speech of a run."""
    name: SetName = "natural"
    table = Table(config.run_dir, name, "features")
    if table.manifest() is None:
        return 0.0, 0.0
    hours, words = 0.0, 0
    for shard in table.shards():
        rows = table.read(shard, ["duration_secs", "text"])
        hours += sum(rows["duration_secs"].to_pylist()) / 3600
        words += sum(len(text.split()) for text in rows["text"].to_pylist())
    return hours, float(words)


def plan_grids(plan: Plan) -> list[RichTable]:
    """The derivation, the stages, memory and storage as tables."""
    return [_derivation(plan), _stages(plan), _memory(plan), _storage(plan)]


def _derivation(plan: Plan) -> RichTable:
    grid = RichTable("quantity", "value", "how", "source", title="What there will be", title_justify="left")
    grid.columns[1].justify = "right"
    for line in plan.lines:
        grid.add_row(line.name, f"{_number(line.value)} {line.unit}".strip(), line.how, _short(line.source))
    return grid


def _stages(plan: Plan) -> RichTable:
    grid = RichTable(title="What each stage will take", title_justify="left")
    for name in ("stage", "work", "actors", "wall", "CPU h", "GPU h", plan.currency, "rate"):
        grid.add_column(name, justify="left" if name in ("stage", "rate") else "right")
    for cost in plan.stages:
        grid.add_row(
            f"{cost.stage} {cost.set}".strip(),
            f"{_number(cost.amount)} {cost.unit}",
            f"{cost.actors:,}",
            clock(cost.secs),
            _number(cost.cpu_hours),
            _number(cost.gpu_hours),
            _number(cost.money),
            _short(cost.source),
        )
    grid.add_section()
    totals = plan.totals
    numbers = [_number(totals[name]) for name in ("cpu_hours", "gpu_hours", "compute")]
    grid.add_row("all", "", "", clock(totals["secs"]), *numbers, "")
    return grid


def _memory(plan: Plan) -> RichTable:
    grid = RichTable(title="Peak memory of a training worker, GiB (the configured setting first)", title_justify="left")
    for name in ("ZeRO", "rows", "peak", "fits", "weights", "gradients", "optimizer", "activations", "loss"):
        grid.add_column(name, justify="right")
    for row in plan.memory:
        parts = {name: size / 2**30 for name, size in row.parts.items()}
        weights = parts["teacher"] + parts["student"] + parts.get("gathered parameters", 0.0)
        numbers = (weights, parts["gradients"], parts["fp32 weights and Adam"], parts["activations"], parts["loss"])
        fits = {None: "", True: "yes", False: "no"}[row.fits]
        cells = [str(row.zero_stage), str(row.micro_batch_rows), f"{parts['peak']:.2f}", fits]
        grid.add_row(*cells, *(f"{number:.2f}" for number in numbers))
        if row.is_configured:
            grid.add_section()
    return grid


def _storage(plan: Plan) -> RichTable:
    grid = RichTable("what", "GB", title="What will lie in storage", title_justify="left")
    grid.columns[1].justify = "right"
    for name, size in plan.storage.items():
        grid.add_row(name, _number(size / 1e9))
    grid.add_section()
    grid.add_row("all", _number(plan.totals["storage_gb"]))
    grid.add_row(f"a month, {plan.currency}", _number(plan.totals["storage_month"]))
    grid.add_row(f"compute and storage, {plan.currency}", _number(plan.totals["money"]))
    return grid


def _number(value: float) -> str:
    """Three digits; large counts in powers of ten."""
    if value >= 1e7:
        return f"{value:.3g}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _short(source: str) -> str:
    return source if len(source) < 16 else source.split()[0]
