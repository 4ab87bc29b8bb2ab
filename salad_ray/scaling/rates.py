"""What `salad plan` reckons with: `rates.yaml`, which users copy and edit, and what a run has measured of it.

Every rate is an assumption until a run on this kind of machine has measured it: a stage's manifest says how long it
took and for how long its actors worked on shards, which tells the start from the work. Nothing here needs Ray.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from salad_ray.config import Config, ConfigError, Section, all_keys
from salad_ray.flow import Step, merged, steps
from salad_ray.model.loading import load_tokenizer
from salad_ray.model.speech_lm import ModelError
from salad_ray.runs import Run
from salad_ray.sequences.interleave import tokenize
from salad_ray.sequences.plan import plan_shard_name
from salad_ray.tables import Table, local_folder, read_bytes

RATES = Path(__file__).with_name("rates.yaml")
ASSUMPTION, DERIVED = "assumption", "derived"
TRAININGS = ("trunk", "stage1", "stage2")
CLUSTER_FIT = "cluster fit"
"""The kind of the one job that fits k-means; `cluster` is what its actors do then."""
SAMPLE_SHARDS = 32
"""Of the features, from which words are counted: recordings were dealt to them by hash."""
SAMPLE_TEXTS = 1000
"""Of those, whose tokens are counted."""

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class Cluster(Section):
    cpus: int = Field(gt=0)
    gpus: int = Field(ge=0)
    gpu: Literal["H100", "H200", "A100", "L40S", "L4", "B200"]
    gpu_memory_gib: Positive


class Prices(Section):
    currency: str
    cpu_hour: NotNegative
    gpu_hour: NotNegative
    spot_gpu_hour: NotNegative
    storage_gb_month: NotNegative
    months: NotNegative


class SpeechRates(Section):
    words_per_sec: Positive
    tokens_per_word: Positive
    secs_per_utterance: Positive
    words_per_passage: Positive
    secs_per_item: Positive
    items_per_benchmark: Positive


class TrainingRates(Section):
    mfu: Share
    fill: Share
    cpu_flops: Positive


class StageRate(Section):
    """Seconds until the first actor works, and of one actor for one unit of work."""

    start: NotNegative
    unit: NotNegative | None
    per: str
    source: str = ASSUMPTION


class ByteRates(Section):
    source_hour: NotNegative
    flac_hour: NotNegative
    opus_hour: NotNegative
    text_passage: NotNegative
    plan_utterance: NotNegative


class Rates(Section):
    """What `rates.yaml` holds."""

    cluster: Cluster
    prices: Prices
    corpora: dict[str, Positive]
    web: dict[str, Positive]
    speech: SpeechRates
    training: TrainingRates
    stages: dict[str, StageRate]
    bytes: ByteRates
    models: dict[str, dict[str, Any]]
    sources: dict[str, str] = Field(default_factory=dict)
    """Which of the other numbers were measured, and where."""

    def stage(self, kind: str) -> StageRate:
        """Of a kind of stage (`kind_of`); raises `ConfigError` where the file has none."""
        if kind not in self.stages:
            raise ConfigError(f"rates: `stages` has no '{kind}'; take it over from {RATES}")
        return self.stages[kind]

    def source_of(self, name: str) -> str:
        """Of a number that is no stage's: where it was measured, or an assumption."""
        return self.sources.get(name, ASSUMPTION)

    @model_validator(mode="after")
    def _work_takes_time(self) -> Rates:
        empty = [kind for kind, rate in self.stages.items() if rate.unit is None and kind != "train"]
        if empty:
            raise ValueError(f"'stages.{empty[0]}.unit' is null, but only training follows from FLOP; give its seconds")
        return self


def weakest(sources: Iterable[str]) -> str:
    """The source of a number that is made of others: an assumption if any is, else what was measured, if any was."""
    found = [source for source in sources if source != DERIVED]
    return ASSUMPTION if ASSUMPTION in found else next(iter(found), DERIVED)


def load_rates(path: str | None = None) -> Rates:
    """The rates of a YAML file, by default ours; raises `ConfigError` naming file, key and remedy."""
    place = path or str(RATES)
    try:
        rates = Rates.model_validate(_read_yaml(place))
    except ValidationError as error:
        raise ConfigError(f"{place}: " + "; ".join(_explain(item) for item in error.errors())) from None
    kinds = _read_yaml(str(RATES))["stages"]
    for kind in rates.stages:
        if kind not in kinds:
            raise ConfigError(f"{place}: unknown key 'stages.{kind}'; {_near(kind, kinds)}")
    numbers = [name for section in (SpeechRates, TrainingRates, ByteRates) for name in section.model_fields]
    for name in rates.sources:
        if name not in numbers:
            raise ConfigError(f"{place}: unknown key 'sources.{name}'; {_near(name, numbers)}")
    return rates


def _read_yaml(place: str) -> dict[str, Any]:
    remedy = f"copy {RATES} and edit it"
    try:
        data = yaml.safe_load(read_bytes(place))
    except FileNotFoundError:
        raise ConfigError(f"{place}: no such file; {remedy}") from None
    except OSError as error:
        raise ConfigError(f"{place}: cannot be read as a file of rates ({error}); {remedy}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{place}: not valid YAML ({' '.join(str(error).split())}); {remedy}") from None
    if not isinstance(data, dict):
        what = "nothing" if data is None else f"a {type(data).__name__}"
        raise ConfigError(f"{place}: holds {what}, but rates are a mapping of keys to values; {remedy}")
    return data


def _explain(error: Any) -> str:
    """One clause for one pydantic error: key, value, what is wrong, what to do."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"'{key}' is missing; take it over from {RATES}"
    if error["type"] == "extra_forbidden":
        parent = key.rpartition(".")[0]
        own = [f"{parent}.{name}" for name in StageRate.model_fields] if parent.startswith("stages.") else []
        return f"unknown key '{key}'; {_near(key, own or all_keys(Rates))}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"'{key}' is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _near(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"{RATES} has those that there are"


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
    if step.stage in TRAININGS:
        return "train"
    return f"{step.stage} {choices[step.stage]}" if step.stage in choices else step.stage


def gpus_of(config: Config, step: Step) -> float:
    """GPUs that each actor of a step asks for; of `cluster` the job that fits."""
    if step.stage in TRAININGS:
        return 1.0 if config.distill.use_gpu else 0.0
    section = getattr(config, step.stage, None)
    return float(getattr(section, "num_gpus", 0.0))


@dataclass(frozen=True)
class Pace:
    """What a step of a run has taken: `start` seconds, then `unit` seconds of one actor for each of `amount` units.

    Where the shards were too few to tell them apart, `unit` is None and `start` is all the seconds.
    """

    amount: float
    start: float
    unit: float | None
    actors: int = 1


def measured_rates(rates: Rates, run: Run, planned: Config) -> Rates:
    """Rates with what a finished run has measured: starts and units of its stages, words, tokens, filled rows.

    Args:
        run: its tables are read.
        planned: what is planned; a rate stays what it was where the run does not tell (`comparable`, `same_speech`).

    Raises:
        ConfigError: the rates lack a stage of the run.
    """
    source = f"measured in {run.config.run_dir}"
    paces: dict[str, list[Pace]] = {}
    for step in merged(steps(run.config)):
        pace = pace_of(run, step) if comparable(run.config, planned, step) else None
        if pace is not None:
            paces.setdefault(kind_of(run.config, step), []).append(pace)
    stages = {kind: _measured_stage(rates.stage(kind), found, source) for kind, found in paces.items()}
    numbers = measured_speech(run, planned)
    changes = {
        name: section.model_copy(update={key: numbers[key] for key in type(section).model_fields if key in numbers})
        for name, section in (("speech", rates.speech), ("training", rates.training))
    }
    sources = rates.sources | dict.fromkeys(numbers, source)
    return rates.model_copy(update={"stages": rates.stages | stages, "sources": sources, **changes})


def _measured_stage(rate: StageRate, paces: list[Pace], source: str) -> StageRate:
    """The largest step tells most. Without a measured unit the start is what the assumed one leaves of the time."""
    whole = [pace for pace in paces if pace.unit is not None]
    if whole:
        unit = max(whole, key=lambda pace: pace.amount).unit
        return rate.model_copy(update={"start": median(pace.start for pace in whole), "unit": unit, "source": source})
    largest = max(paces, key=lambda pace: pace.amount)
    start = max(largest.start - (rate.unit or 0.0) * largest.amount / largest.actors, 0.0)
    return rate.model_copy(update={"start": start, "source": rate.source if rate.unit else source})


def comparable(run: Config, planned: Config, step: Step) -> bool:
    """Whether a step of a run tells how fast the planned one would be, on the same machines."""
    same_model = (run.model.teacher, run.model.adapter) == (planned.model.teacher, planned.model.adapter)
    same_gpus = gpus_of(run, step) == gpus_of(planned, step)
    if step.stage in TRAININGS:  # a smaller micro-batch tells a little too little, recomputed activations nothing
        names = ("use_gpu", "precision", "activation_checkpointing", "compile")
        same = all(getattr(run.distill, name) == getattr(planned.distill, name) for name in names)
        return same_model and same and run.pack.context == planned.pack.context
    if step.stage in ("measure", "evaluate"):
        return same_model and same_gpus
    return kind_of(run, step) == kind_of(planned, step) and same_gpus


def pace_of(run: Run, step: Step) -> Pace | None:
    """The pace of a step, from its manifests; None where it is not finished."""
    manifests = [run.labelled(label).manifest() for label in step.writes]
    done = [manifest for manifest in manifests if manifest is not None]
    if len(done) < len(manifests) or not done:
        return None
    if step.stage in TRAININGS:
        return _training_pace(done[0])
    if step.stage == "teacher" and "training" in done[0]:
        num_steps, secs = done[0]["config"]["model.tiny_lm"]["num_steps"], done[0]["training"]["seconds"]
        return Pace(num_steps, max(done[0]["seconds"] - secs, 0.0), secs / num_steps)
    return _actors_pace(_amount(run, step, done), done)


def _actors_pace(amount: float, done: list[dict[str, Any]]) -> Pace:
    """Of actors that take shard after shard, and say how long they worked on them."""
    secs = sum(manifest.get("seconds", 0.0) for manifest in done)
    timed = [manifest for manifest in done if {"busy_secs", "num_actors"} <= manifest.keys()]
    if not timed or not amount:
        return Pace(amount, secs, None)
    actors, busy = timed[0]["num_actors"], sum(manifest["busy_secs"] for manifest in timed)
    return Pace(amount, max(secs - busy / actors, 0.0), busy / amount, actors)


def _training_pace(manifest: dict[str, Any]) -> Pace:
    log = manifest["log"]
    speed = median(row["positions_per_sec"] for row in log[1:] or log)
    positions = manifest.get("own_positions", manifest["num_positions"])
    start = manifest.get("seconds", 0.0) - positions / speed
    return Pace(positions, max(start, 0.0), manifest["num_workers"] / speed, manifest["num_workers"])


def _amount(run: Run, step: Step, done: list[dict[str, Any]]) -> float:
    """Units of a finished step, counted from its tables."""
    if step.stage in ("synthesize", "encode", "align"):
        return _hours(run.table(step.set, step.tables[-1]))
    if step.stage == "measure":
        return _hours(run.table(step.set, "features")) * len(step.tables)
    if step.stage in ("probe", "select"):
        return float((run.table("web", "passages").manifest() or {}).get("num_rows", 0))
    if "catalog" in step.tables:
        return _hours(run.table(step.set, "utterances"))
    if step.stage == "evaluate":
        items = run.table("benchmark", "items").manifest() or {}
        return float(items.get("num_rows", 0) * len(step.tables))
    return float(done[0].get("num_kept", 0))


def _hours(table: Table) -> float:
    columns = (table.read(shard, ["duration_secs"])["duration_secs"] for shard in table.shards())
    return float(sum(sum(column.to_pylist()) for column in columns)) / 3600


def same_speech(run: Config, planned: Config) -> bool:
    """Whether both hear the same natural speech: of the same corpora, or of the world by the same synthesizer."""
    spoken_alike = bool(run.ingest.corpora) or run.synthesize.synthesizer == planned.synthesize.synthesizer
    return run.ingest.corpora == planned.ingest.corpora and spoken_alike


def measured_speech(run: Run, planned: Config) -> dict[str, float]:
    """`words_per_sec`, `tokens_per_word` and `fill` of a run's natural speech, those that hold for what is planned."""
    features = run.table("natural", "features")
    if not same_speech(run.config, planned) or features.manifest() is None:
        return {}
    secs, texts = 0.0, list[str]()
    for shard in features.shards()[:SAMPLE_SHARDS]:
        rows = features.read(shard, ["duration_secs", "text"])
        secs += sum(rows["duration_secs"].to_pylist())
        texts += rows["text"].to_pylist()
    words = sum(len(text.split()) for text in texts)
    if not words or not secs:
        return {}
    found = {"words_per_sec": words / secs}
    teachers = [(config.model.teacher, config.model.revision) for config in (run.config, planned)]
    if teachers[0] == teachers[1] and run.config.pack == planned.pack:
        found |= _tokens_per_word(run, texts[:SAMPLE_TEXTS]) | _fill(run)
    return found


def _tokens_per_word(run: Run, texts: list[str]) -> dict[str, float]:
    """By the teacher's tokenizer, where that can be had here."""
    manifest = run.table("", "teacher").manifest()
    if manifest is None:
        return {}
    teacher = run.with_path(manifest)
    try:
        with local_folder(teacher["path"]) as path:
            tokenizer = load_tokenizer(path, teacher["revision"])
    except ModelError:
        return {}
    num_tokens = sum(len(tokens.ids) for tokens in tokenize(texts, tokenizer))
    return {"tokens_per_word": num_tokens / sum(len(text.split()) for text in texts)}


def _fill(run: Run) -> dict[str, float]:
    """Share of the first epoch's positions that is not padding."""
    plan = run.table("natural", "plan")
    if plan.manifest() is None:
        return {}
    shards = [plan_shard_name(lane, 0) for lane in range(run.config.pack.num_lanes)]
    rows = [number for shard in shards for number in plan.read(shard, ["num_positions"])["num_positions"].to_pylist()]
    return {"fill": sum(rows) / (len(rows) * run.config.pack.context)} if rows else {}
