"""What `salad plan` reckons with: `rates.yaml`, which users copy and edit, and what a run has measured of it.

Every rate is an assumption until a run on this kind of machine has measured it: a stage's manifest says how long it
took and for how long its actors worked on shards, which tells the start from the work. Nothing here needs Ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from salad_ray import names
from salad_ray.config import Config, ConfigError, Section, all_keys
from salad_ray.configfile import explain, read_mapping, unknown_key
from salad_ray.flow import Step, gpus, merged, steps
from salad_ray.model.loading import load_tokenizer
from salad_ray.model.speech_lm import ModelError
from salad_ray.runs import Run
from salad_ray.scaling.number import ASSUMPTION, Number
from salad_ray.sequences.interleave import tokenize
from salad_ray.sequences.plan import plan_shard_name
from salad_ray.tables import Table, local_folder

RATES = Path(__file__).with_name("rates.yaml")
REMEDY = f"see {RATES}, which is to be copied and edited"
TRAIN, CLUSTER_FIT = "train", "cluster fit"
"""Kinds of `stages` that are not called as their stage: all trainings; the one job that fits k-means, before the actors
of `cluster`."""
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
    """Which of the numbers of `speech`, `training` and `bytes` were measured, and where."""

    def __getitem__(self, name: str) -> Number:
        """A number of `speech`, `training` or `bytes`."""
        sections = (self.speech, self.training, self.bytes)
        value = next(getattr(section, name) for section in sections if name in type(section).model_fields)
        return Number(value, f"# ({name})", self.sources.get(name, ASSUMPTION))

    def size_of(self, kind: str, name: str, unit: str) -> Number:
        """Of a corpus in `corpora` or `web`; raises `ConfigError` where the file has none."""
        table: dict[str, float] = getattr(self, kind)
        if name not in table:
            raise ConfigError(
                f"the plan does not know how many {unit} '{name}' has; add it under `{kind}` in a copy of rates.yaml, "
                "and pass that with --rates"
            )
        return Number(table[name], f"# ({name})", ASSUMPTION)

    def stage(self, kind: str) -> StageRate:
        """Of a kind of stage (`kind_of`); raises `ConfigError` where the file has none."""
        if kind not in self.stages:
            raise ConfigError(f"rates: `stages` has no '{kind}'; take it over from {RATES}")
        return self.stages[kind]

    def problems(self) -> Iterator[str]:
        known = _known_keys()
        for key in (*(f"stages.{kind}" for kind in self.stages), *(f"sources.{name}" for name in self.sources)):
            if key not in known:
                yield unknown_key(key, known, REMEDY)
        for kind, rate in self.stages.items():
            if rate.unit is None and kind != TRAIN:
                yield f"'stages.{kind}.unit' is null, but only training follows from FLOP; give its seconds"


def load_rates(path: str | None = None) -> Rates:
    """The rates of a YAML file, by default ours; raises `ConfigError` naming file, key and remedy."""
    place = path or str(RATES)
    try:
        return Rates.model_validate(read_mapping(place, "file of rates", REMEDY))
    except ValidationError as error:
        told = (explain(item, _known_keys(), REMEDY) for item in error.errors())
        raise ConfigError(f"{place}: {'; '.join(told)}") from None


def _known_keys() -> list[str]:
    """Every dotted key that a file of rates may have; the names of corpora and models are the user's."""
    kinds = [f"stages.{kind}" for kind in read_mapping(str(RATES), "file of rates", REMEDY)["stages"]]
    of_kinds = [f"{kind}.{name}" for kind in kinds for name in StageRate.model_fields]
    numbers = [name for section in (SpeechRates, TrainingRates, ByteRates) for name in section.model_fields]
    return [*all_keys(Rates), *kinds, *of_kinds, *(f"sources.{name}" for name in numbers)]


def kind_of(config: Config, step: Step) -> str:
    """The key of `rates.stages` for a step."""
    choices = {
        names.ALIGN: config.align.aligner,
        names.SYNTHESIZE: config.synthesize.synthesizer,
        names.ENCODE: config.encode.encoder,
        names.EMBED: config.embed.embedder,
        names.TEACHER: "world" if config.model.teacher == "world" else "model",
        names.INGEST: "recorded" if names.CATALOG in step.tables else "text",
    }
    return TRAIN if step.trains else f"{step.stage} {choices.get(step.stage, '')}".strip()


def gpus_of(config: Config, step: Step) -> float:
    """GPUs that each worker of a step asks for; of `cluster` the job that fits."""
    return float(config.distill.use_gpu) if step.trains else gpus(config, step)


def passes(config: Config, step: Step) -> int:
    """How often a step goes through its set: for each system, and each way that an item is heard."""
    if step.stage not in (names.MEASURE, names.EVALUATE):
        return 1
    floors = set(config.evaluate.floors) - {"choices"}  # without a prompt, an item costs next to nothing
    heard = len(config.evaluate.conditions) + len(floors) if step.stage == names.EVALUATE else 1
    return len(step.tables) * heard


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
    return rates.model_copy(
        update={
            "stages": rates.stages | stages,
            "speech": rates.speech.model_copy(update={key: numbers[key] for key in numbers if key != "fill"}),
            "training": rates.training.model_copy(update={key: numbers[key] for key in numbers if key == "fill"}),
            "sources": rates.sources | dict.fromkeys(numbers, source),
        }
    )


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
    if step.trains:  # a smaller micro-batch tells a little too little, recomputed activations nothing
        deciding = ("use_gpu", "precision", "activation_checkpointing", "compile")
        same = all(getattr(run.distill, name) == getattr(planned.distill, name) for name in deciding)
        return same_model and same and run.pack.context == planned.pack.context
    same_kind = (
        same_model if step.stage in (names.MEASURE, names.EVALUATE) else kind_of(run, step) == kind_of(planned, step)
    )
    return same_kind and gpus_of(run, step) == gpus_of(planned, step)


def pace_of(run: Run, step: Step) -> Pace | None:
    """The pace of a step, from its manifests; None where it is not finished."""
    done = [manifest for label in step.writes if (manifest := run.labelled(label).manifest()) is not None]
    if not done or len(done) < len(step.writes):
        return None
    first, all_secs = done[0], sum(manifest.get("seconds", 0.0) for manifest in done)
    timed = [manifest for manifest in done if {"busy_secs", "num_actors"} <= manifest.keys()]
    if step.trains:
        speed = median(row["positions_per_sec"] for row in first["log"][1:] or first["log"])
        amount, actors = first.get("own_positions", first["num_positions"]), first["num_workers"]
        all_secs, busy = first.get("seconds", 0.0), amount / speed * actors
    elif step.stage == names.TEACHER and "training" in first:
        amount, actors, busy = first["config"]["model.tiny_lm"]["num_steps"], 1, first["training"]["seconds"]
    else:
        amount, actors = _amount(run, step, first), timed[0]["num_actors"] if timed else 0
        busy = sum(manifest["busy_secs"] for manifest in timed)
    if not actors or not amount:
        return Pace(amount, all_secs, None)
    return Pace(amount, max(all_secs - busy / actors, 0.0), busy / amount, actors)


def _amount(run: Run, step: Step, first: dict[str, Any]) -> float:
    """Units of a finished step, counted from its tables."""
    if step.stage in (names.ALIGN, names.SYNTHESIZE, names.ENCODE):
        return _hours(run.table(step.set, step.tables[-1]))
    if step.stage == names.MEASURE:  # of recordings only those that are held out
        return _hours(run.table(step.set, names.FEATURES), split="test") * passes(run.config, step)
    if step.stage == names.EVALUATE:
        return _num_rows(run.table(step.set, names.ITEMS)) * passes(run.config, step)
    if step.stage in (names.PROBE, names.SELECT):
        return _num_rows(run.table(names.WEB, names.PASSAGES))
    if names.CATALOG in step.tables:
        return _hours(run.table(step.set, names.UTTERANCES))
    return float(first.get("num_kept", 0))


def _hours(table: Table, split: str = "") -> float:
    rows = (row for shard in table.shards() for row in table.read(shard, ["duration_secs", "split"]).to_pylist())
    return sum(row["duration_secs"] for row in rows if split in ("", row["split"])) / 3600


def _num_rows(table: Table) -> float:
    return float((table.manifest() or {}).get("num_rows", 0))


def same_speech(run: Config, planned: Config) -> bool:
    """Whether both hear the same natural speech: of the same corpora, or of the world by the same synthesizer."""
    spoken_alike = bool(run.ingest.corpora) or run.synthesize.synthesizer == planned.synthesize.synthesizer
    return run.ingest.corpora == planned.ingest.corpora and spoken_alike


def measured_speech(run: Run, planned: Config) -> dict[str, float]:
    """`words_per_sec`, `tokens_per_word` and `fill` of a run's natural speech, those that hold for what is planned."""
    features, same = run.table(names.NATURAL, names.FEATURES), same_speech(run.config, planned)
    shards = features.shards()[:SAMPLE_SHARDS] if same and features.manifest() is not None else []
    rows = [row for shard in shards for row in features.read(shard, ["duration_secs", "text"]).to_pylist()]
    texts, secs = [row["text"] for row in rows], sum(row["duration_secs"] for row in rows)
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
    manifest = run.table("", names.TEACHER).manifest()
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
    plan, pack = run.table(names.NATURAL, names.PLAN), run.config.pack
    shards = [plan_shard_name(lane, 0) for lane in range(pack.num_lanes)] if plan.manifest() is not None else []
    rows = [number for shard in shards for number in plan.read(shard, ["num_positions"])["num_positions"].to_pylist()]
    return {"fill": sum(rows) / (len(rows) * pack.context)} if rows else {}
