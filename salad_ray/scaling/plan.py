"""`salad plan`: what a config will take before anything runs: data, epochs, FLOP, hours, bytes, memory, money.

Every number follows from the derivation (amounts.py) and the rates (rates.py), and stands beside the weakest source of
what it is made of: the config alone (derived), a run (measured) or an assumption. Nothing here needs Ray.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table as RichTable
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, PreTrainedConfig

from salad_ray import names
from salad_ray.config import PICKED_PER_SHARD, Config, ConfigError, DistillConfig
from salad_ray.console import clock
from salad_ray.distill.step import DTYPES
from salad_ray.flow import Step, merged, steps
from salad_ray.model.loading import UNUSABLE, reason
from salad_ray.model.tiny_lm import tiny_shape
from salad_ray.scaling.amounts import SPOKEN, TRAINED, WRITTEN, Amounts, Line
from salad_ray.scaling.memory import BYTES, is_estimated, layer_bytes, num_parameters, training_memory
from salad_ray.scaling.number import ASSUMPTION, Number, total
from salad_ray.scaling.rates import CLUSTER_FIT, TRAIN, Rates, gpus_of, kind_of, passes

SENTENCE_DIM = 384
"""Of MiniLM's embeddings."""
WORLD_VOCABULARY = 1000
"""Tokens of the embedded world's text LLM, about."""
MICRO_BATCHES = (1, 2, 4, 8, 16)
USABLE = 0.92
"""Share of a GPU's memory; the rest is CUDA's and fragmentation."""
GIB = 2**30


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
    """The weakest, of its amount and of its rates."""


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
    storage: list[Line]
    """In bytes, what lies there."""
    totals: dict[str, float]
    currency: str
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(config: Config, rates: Rates) -> Plan:
    """Derive everything; raises `ConfigError` where a corpus or model is not known to the rates."""
    data, prices = Amounts(config, rates, text_llm(config, rates)), rates.prices
    flow = merged(steps(config))
    costs = [stage_cost(step, data) for step in flow]
    storage, memory = storage_lines(data), memory_table(data)
    totals = {name: sum(getattr(cost, name) for cost in costs) for name in ("secs", "cpu_hours", "gpu_hours")}
    totals["compute"] = sum(cost.money for cost in costs)
    totals["storage_gb"] = sum(line.value for line in storage) / 1e9
    totals["storage_month"] = totals["storage_gb"] * prices.storage_gb_month
    totals["money"] = totals["compute"] + totals["storage_month"] * prices.months
    notes = []
    if is_estimated(data.shape.llm):
        notes = [f"activations of {data.shape.llm.model_type} are estimated from its matrices, to about a quarter"]
    notes += [*misfit(config.distill, memory), *shortages(config, rates, flow), *assumed(config, rates, flow)]
    return Plan(list(data.lines.values()), costs, memory, storage, totals, prices.currency, notes)


def text_llm(config: Config, rates: Rates) -> PreTrainedConfig:
    """The text LLM's config: of the embedded world's, of the rates, else where its weights lie.

    Raises:
        ConfigError: it cannot be had, or the rates' shape is none.
    """
    teacher = config.model.teacher
    if teacher == "world":
        return tiny_shape(config.model.tiny_lm, WORLD_VOCABULARY)
    shape = rates.models.get(teacher)
    try:
        if shape is not None:
            llm = AutoConfig.for_model(**shape)
        else:
            llm = AutoConfig.from_pretrained(teacher, revision=config.model.revision, trust_remote_code=False)
            llm = llm.get_text_config()
        if type(llm) in MODEL_FOR_MASKED_LM_MAPPING:
            raise TypeError(f"{llm.model_type} fills gaps and does not continue a text")
        num_parameters(llm)  # this and the next fail where it is another kind of model
        layer_bytes(llm, DTYPES["bf16"], rows=1, context=8)
        return llm
    except (*UNUSABLE, AttributeError, ArithmeticError) as error:
        if shape is not None:
            raise ConfigError(f"rates: 'models.{teacher}' is no config of a text LLM ({reason(error)})") from None
        raise ConfigError(
            f"model.teacher={teacher}: its config cannot be read here ({reason(error)}); add its shape to `models` in "
            "a copy of rates.yaml, and pass that with --rates"
        ) from None


def amount_of(step: Step, data: Amounts) -> float:
    """Units of work of a step, as `rates.stages` counts them."""
    config, speech, passages = data.config, SPOKEN.get(step.set, ""), WRITTEN.get(step.set, "")
    if step.stage in (names.TEACHER, names.REPORT):
        return config.model.tiny_lm.num_steps if kind_of(config, step) == "teacher world" else 1
    if step.trains:
        decay = config.distill.decay_share
        share = {names.TRUNK: 1 - decay, names.STAGE1: decay}.get(step.stage, 1)
        return data[TRAINED.get(step.stage, TRAINED[names.STAGE1])] * share * len(step.tables)
    if names.CATALOG in step.tables or step.stage in (names.ALIGN, names.SYNTHESIZE):
        return data[speech]
    if step.stage == names.ENCODE:
        return data[speech] * (len(config.evaluate.conditions) if step.set == names.BENCHMARK else 1)
    if step.stage in (names.PROBE, names.SELECT):
        return data[WRITTEN[names.WEB]]
    if step.stage == names.MEASURE:
        return data["held-out recordings" if step.set == names.NATURAL else speech] * passes(config, step)
    if (step.stage, step.set) == (names.PACK, names.NATURAL):
        return data["planned utterances"]
    return data[passages] * passes(config, step)


def shards_of(step: Step, data: Amounts) -> int:
    """Shards that a step's work is dealt to; each worker of a training has an equal share."""
    config, lanes = data.config, data.config.pack.num_lanes
    if step.trains:
        return training_workers(config, data.rates)
    if step.stage in (names.TEACHER, names.REPORT):
        return 1
    if step.stage == names.PACK:
        return lanes * (math.ceil(data["epochs of Stage I"]) if step.set == names.NATURAL else 1)
    if step.set in (names.HELDOUT, names.PROBE, names.ACTIVE, names.BENCHMARK):
        number = math.ceil(data[WRITTEN[step.set]] / PICKED_PER_SHARD)
        return max(1, min(config.ingest.num_shards, -(-number // lanes) * lanes))
    return config.ingest.num_shards


def training_workers(config: Config, rates: Rates) -> int:
    """Training workers; of an elastic number as many as the cluster has GPUs for."""
    settings = config.distill
    room = rates.cluster.gpus if settings.use_gpu else settings.most_workers
    return max(settings.least_workers, min(settings.most_workers, room))


def stage_cost(step: Step, data: Amounts) -> StageCost:
    """What a step takes: a start, then shards in waves of as many as there are workers. The fit of `cluster` is one job
    that may have a GPU; the actors behind it have none."""
    config, rates, prices = data.config, data.rates, data.rates.prices
    amount, shards, gpus = amount_of(step, data), shards_of(step, data), gpus_of(config, step)
    jobs = [(kind_of(config, step), amount, shards, gpus)]
    if step.stage == names.CLUSTER:
        sample = min(amount, config.cluster.sample_passages)
        jobs = [(CLUSTER_FIT, sample, 1, gpus), (kind_of(config, step), amount, shards, 0.0)]
    secs, cpu_hours, gpu_hours, workers = Number(0), Number(0), Number(0), 1
    for kind, units, parts, gpus in jobs:
        rate = rates.stage(kind)
        unit = data.secs_of_position(step.stage) if rate.unit is None else rate.unit
        room = rates.cluster.gpus / gpus if gpus else config.ray.num_cpus or rates.cluster.cpus
        workers = parts if step.trains else max(1, min(int(room), config.ray.max_actors or parts, parts))
        waves = math.ceil(parts / workers) * workers / parts
        start = Number(rate.start * (len(step.tables) if step.trains else 1), source=rate.source)
        own = start + unit * units / workers * waves
        secs, hours = secs + own, own * workers / 3600
        gpu_hours += hours * gpus
        if not gpus:  # whose price has their machine's cores in it
            cpu_hours += hours * (config.distill.cpus_per_worker if step.trains else 1)
    money = gpu_hours * (prices.gpu_hour if step.trains else prices.spot_gpu_hour) + cpu_hours * prices.cpu_hour
    took = {"secs": secs, "cpu_hours": cpu_hours, "gpu_hours": gpu_hours, "money": money}
    numbers = {name: float(number) for name, number in took.items()}
    return StageCost(step.stage, step.set, float(amount), rate.per, workers, **numbers, source=secs.source)


def misfit(settings: DistillConfig, memory: Sequence[Memory]) -> list[str]:
    """Where the configured training does not fit, the least change with which it does."""
    if memory[0].fits is not False:
        return []
    told = "the configured training does not fit into the GPU's memory"
    fitting = [
        (row.zero_stage, -row.micro_batch_rows)
        for row in memory
        if row.fits and row.zero_stage >= settings.zero_stage and row.micro_batch_rows <= settings.micro_batch_rows
    ]
    if fitting:
        stage, rows = min(fitting)
        return [f"{told}; distill.zero_stage={stage} with distill.micro_batch_rows={-rows} does"]
    others = "a smaller pack.context or GPUs with more memory"
    if not settings.activation_checkpointing:
        others = f"distill.activation_checkpointing=true, {others}"
    return [f"{told}, nor does any ZeRO stage with fewer rows; take {others}"]


def shortages(config: Config, rates: Rates, flow: Iterable[Step]) -> list[str]:
    """What asks for more GPUs at once than the cluster has; the plan reckons as if it had them."""
    have, workers = rates.cluster.gpus, training_workers(config, rates)
    found = []
    if config.distill.use_gpu and workers > have:
        found.append(
            f"training needs {workers} GPUs at once, and the cluster has {have}; lower distill.num_workers, or raise "
            "cluster.gpus in the rates"
        )
    asked = {step.stage: gpus_of(config, step) for step in flow if not step.trains}
    short = ", ".join(f"{stage}.num_gpus={gpus:g}" for stage, gpus in asked.items() if gpus > have)
    if short:
        found.append(f"{short}, and the cluster has {have} GPUs; set them to 0, or raise cluster.gpus in the rates")
    return found


def assumed(config: Config, rates: Rates, flow: Iterable[Step]) -> list[str]:
    """Whose rates nobody has measured."""
    kinds = [(step.stage, kind_of(config, step)) for step in flow]
    kinds += [(names.CLUSTER, CLUSTER_FIT)] * (config.stage2 is not None)
    found = {stage for stage, kind in kinds if rates.stage(kind).source == ASSUMPTION}
    if rates.stage(TRAIN).unit is None and rates["mfu" if config.distill.use_gpu else "cpu_flops"].source == ASSUMPTION:
        found |= {step.stage for step in flow if step.trains}
    stages = sorted(found)
    how = "--calibrate measures on this machine, and --measured RUN_DIR takes those of a run"
    return [f"the rates of {', '.join(stages)} are assumptions, at least in part; {how}"] if stages else []


def worker_memory(data: Amounts, settings: DistillConfig, num_workers: int) -> dict[str, float]:
    """Of the rows that need the most: with speech, or of text alone."""
    shares = [data.speech_shares] + [(0.0, 0.0)] * (names.TEXT in data.config.trained_sets)
    found = (training_memory(data.shape, settings, data.config.pack, num_workers, *each) for each in shares)
    return max(found, key=lambda parts: parts["peak"])


def memory_table(data: Amounts) -> list[Memory]:
    """The configured setting first, then the other ZeRO stages and micro-batches that the lanes allow."""
    settings, pack = data.config.distill, data.config.pack
    per_worker = max(1, pack.num_lanes // settings.most_workers * pack.rows_per_lane)
    limit = USABLE * data.rates.cluster.gpu_memory_gib * GIB
    sizes = sorted({size for size in MICRO_BATCHES if per_worker % size == 0} | {settings.micro_batch_rows})
    found = []
    for stage, rows in itertools.product((1, 2, 3), sizes):
        changed = settings.model_copy(update={"zero_stage": stage, "micro_batch_rows": rows})
        parts = worker_memory(data, changed, settings.least_workers)
        found.append(
            Memory(stage, rows, changed == settings, parts, parts["peak"] <= limit if settings.use_gpu else None)
        )
    return sorted(found, key=lambda row: not row.is_configured)


def fit_training(config: Config, rates: Rates, gpu_bytes: float) -> Config:
    """The config with a micro-batch that fits into this machine's GPUs: the configured one, else the largest smaller
    one, else one with activation checkpointing. Training on CPUs stays as it is.

    Args:
        gpu_bytes: memory of each GPU; 0 if there is none.

    Raises:
        ConfigError: there is no GPU, or not even one row with activation checkpointing fits.
    """
    settings, needed = config.distill, math.inf
    if not settings.use_gpu:
        return config
    data = Amounts(config, rates, text_llm(config, rates))
    sizes = [rows for rows in range(settings.micro_batch_rows, 0, -1) if settings.micro_batch_rows % rows == 0]
    for recompute, rows in itertools.product(sorted({settings.activation_checkpointing, True}), sizes):
        changed = settings.model_copy(update={"micro_batch_rows": rows, "activation_checkpointing": recompute})
        needed = worker_memory(data, changed, settings.most_workers)["peak"] / USABLE
        if needed <= gpu_bytes:
            return config.model_copy(update={"distill": changed})
    there = f"GPUs of {gpu_bytes / GIB:.0f} GiB" if gpu_bytes else "no GPU"
    raise ConfigError(
        f"--calibrate: training {config.model.teacher} needs {needed / GIB:.0f} GiB a GPU at least, and this machine "
        f"has {there}; plan without --calibrate, or with --measured RUN_DIR of a run's first steps"
    )


def storage_lines(data: Amounts) -> list[Line]:
    """Bytes of what lies in run_dir, and of the corpora themselves."""
    config, rates, web = data.config, data.rates, data[WRITTEN[names.WEB]]
    recorded = [SPOKEN[names.NATURAL]] if config.ingest.corpora else []
    spoken = [line for line in SPOKEN.values() if line in data.lines]
    synthetic = [data[line] for line in spoken if line not in recorded]
    audio = rates["opus_hour" if config.synthesize.audio_format == "OPUS" else "flac_hour"]
    dim = config.embed.dim if config.embed.embedder == "tfidf" else SENTENCE_DIM
    found = {}
    if recorded:
        found["recorded corpora"] = total(data[line] for line in recorded) * rates["source_hour"]
    if synthetic:
        found["synthetic audio"] = total(synthetic) * audio
    found[names.FEATURES] = total(data[line] for line in spoken) * data.bytes_per_hour
    found["web text"] = web * rates["text_passage"]
    found[names.PLAN] = data["planned utterances"] * rates["plan_utterance"]
    if names.TEXT in config.trained_sets:
        found["text alone"] = data[WRITTEN[names.TEXT]] * rates["text_passage"]
        found["plan of text alone"] = data[WRITTEN[names.TEXT]] * rates["plan_utterance"]
    if config.stage2 is not None:
        found[names.EMBEDDINGS] = web * 2 * Number(dim, "# (width)")
    models = Number(len(data.trainings), "# (trainings)") * (data["text LLM"] + data["adapter"])
    kept = Number(config.distill.keep_checkpoints + 1, "# (checkpoints)")
    found["checkpoints"] = models * kept * 12  # bytes: weights in fp32 and two moments of Adam
    found["models"] = models * BYTES[config.distill.precision]
    return [Line.of(name, value, "bytes") for name, value in found.items()]


def plan_grids(plan: Plan) -> list[RichTable]:
    """The derivation, the stages, memory and storage as tables."""
    totals, money = plan.totals, plan.currency
    lines = [
        [line.name, f"{_number(line.value)} {line.unit}".strip(), line.how, _short(line.source)] for line in plan.lines
    ]
    stages = [
        [
            *(f"{cost.stage} {cost.set}".strip(), f"{_number(cost.amount)} {cost.unit}", f"{cost.actors:,}"),
            *(clock(cost.secs), _number(cost.cpu_hours), _number(cost.gpu_hours), _number(cost.money)),
            _short(cost.source),
        ]
        for cost in plan.stages
    ]
    hours = [_number(totals[name]) for name in ("cpu_hours", "gpu_hours", "compute")]
    memory = [_memory_cells(row) for row in plan.memory]
    storage = [[line.name, _number(line.value / 1e9), line.how, _short(line.source)] for line in plan.storage]
    sums = [
        ["all", _number(totals["storage_gb"])],
        [f"a month, {money}", _number(totals["storage_month"])],
        [f"compute and storage, {money}", _number(totals["money"])],
    ]
    of_memory = ">ZeRO >rows >peak >fits >weights >gradients >optimizer >activations >loss"
    return [
        _grid("What there will be", "quantity >value how source", lines),
        _grid(
            "What each stage will take",
            f"stage >work >actors >wall >CPU\u00a0h >GPU\u00a0h >{money} source",
            stages,
            [["all", "", "", clock(totals["secs"]), *hours]],
        ),
        _grid(
            "Peak memory of a training worker, GiB (the configured setting first)", of_memory, memory[:1], memory[1:]
        ),
        _grid("What will lie in storage", "what >GB how source", storage, sums),
    ]


def _memory_cells(row: Memory) -> list[str]:
    parts = {name: size / GIB for name, size in row.parts.items()}
    weights = parts["teacher"] + parts["student"] + parts.get("gathered parameters", 0.0)
    others = (parts[name] for name in ("gradients", "optimizer", "activations", "loss"))
    fits = {None: "", True: "yes", False: "no"}[row.fits]
    numbers = [f"{number:.2f}" for number in (parts["peak"], weights, *others)]
    return [str(row.zero_stage), str(row.micro_batch_rows), numbers[0], fits, *numbers[1:]]


def _grid(title: str, columns: str, *sections: Iterable[Sequence[str]]) -> RichTable:
    """A table with a line between its sections; columns that begin with `>` are set to the right."""
    grid = RichTable(title=title, title_justify="left")
    for name in columns.split(" "):
        grid.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left")
    for rows in sections:
        for cells in rows:
            grid.add_row(*cells)
        grid.add_section()
    return grid


def _number(value: float) -> str:
    """Three digits; large counts in powers of ten."""
    if value >= 1e7:
        return f"{value:.3g}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _short(source: str) -> str:
    return source if len(source) < 16 else source.split()[0]
