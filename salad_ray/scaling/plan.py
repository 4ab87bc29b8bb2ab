"""`salad plan`: what a config will take before anything runs: data, epochs, FLOP, hours, bytes, memory, money.

Every number is derived from the config and from rates (rates.py), step by step, and every step is shown, with the
weakest source of what it is made of: the config alone (derived), a run (measured) or an assumption. Nothing here needs
Ray.

Words are spoken or written by the spans of `pack`: with text spans of t words and speech spans of s words on average,
s / (s + t) of the words are heard; of a sample that is spoken whole, all but its last (1 + longest text span) / 2. With
n frames side by side the last position of a span is half full on average. Shares of text alone are shares of samples;
the lengths of samples of speech and of text make shares of positions of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import mean
from typing import Any

from rich.table import Table as RichTable
from transformers import AutoConfig, PreTrainedConfig, Qwen2Config

from salad_ray.config import (
    PICKED_PER_SHARD,
    STAGE2_SHARE,
    Config,
    ConfigError,
    DistillConfig,
    WebTextConfig,
    path_name,
)
from salad_ray.console import clock
from salad_ray.distill.step import DTYPES, PEAK_FLOPS
from salad_ray.flow import Step, merged, steps
from salad_ray.model.loading import UNUSABLE, reason
from salad_ray.scaling.memory import BYTES, Shape, layer_bytes, num_parameters, training_memory
from salad_ray.scaling.rates import (
    ASSUMPTION,
    CLUSTER_FIT,
    DERIVED,
    Rates,
    StageRate,
    gpus_of,
    kind_of,
    weakest,
)
from salad_ray.sequences.plan import MAX_FILL
from salad_ray.text.world import DOMAINS, world_passages

ENCODERS = {"mimi": (512, 12.5), "log_mel": (640, 12.5)}
"""Width and frame rate."""
SENTENCE_DIM = 384
"""Of MiniLM's embeddings."""
WORLD_VOCABULARY = 1000
"""Tokens of the embedded world's text LLM, about."""
MICRO_BATCHES = (1, 2, 4, 8, 16)
USABLE = 0.92
"""Share of a GPU's memory; the rest is CUDA's and fragmentation."""
PASSAGES = {
    "web": "web text",
    "text": "text alone",
    "natural": "training utterances",
    "heldout": "held-out passages",
    "probe": "probe passages",
    "active": "selected passages",
    "benchmark": "benchmark items",
}
SPEECH = {
    "natural": "natural speech",
    "heldout": "held-out speech",
    "probe": "probe speech",
    "active": "synthetic speech",
    "benchmark": "spoken items",
}
"""Lines of the derivation, by set."""
TRAINED = {"stage1": "Stage I, D", "stage2": "Stage II"}
"""Of a training, the line that says how many positions it sees; the trunk's are Stage I's but those of its decay."""
TEXT_SHARES = {"stage1": "text of Stage I", "stage2": "text of Stage II"}
"""Of a training, the line with the share of its positions that are samples of text alone."""


@dataclass(frozen=True)
class Line:
    """One step of the derivation: `value` in `unit`, how it comes about, and its weakest source."""

    name: str
    value: float
    unit: str
    how: str
    source: str


@dataclass(frozen=True)
class StageCost:
    """What one step of the pipeline takes; `amount_source` is the work's, `source` the rate's."""

    stage: str
    set: str
    amount: float
    unit: str
    amount_source: str
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
    storage: list[Line]
    """In bytes, what lies there."""
    totals: dict[str, float]
    currency: str
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(config: Config, rates: Rates) -> Plan:
    """Derive everything; raises `ConfigError` where a corpus or model is not known to the rates."""
    data, flow = Amounts(config, rates, text_llm(config, rates)), merged(steps(config))
    costs = [stage_cost(config, step, data, rates) for step in flow]
    storage = storage_lines(config, data, rates)
    prices = rates.prices
    gigabytes = sum(line.value for line in storage) / 1e9
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
    found = [*misfit(config.distill, memory), *shortages(config, flow, rates), *assumed(costs)]
    return Plan(list(data.lines.values()), costs, memory, storage, totals, prices.currency, found)


def misfit(settings: DistillConfig, memory: Sequence[Memory]) -> list[str]:
    """Where the configured training does not fit, the least change with which it does."""
    if memory[0].fits is not False:
        return []
    fitting = [
        row
        for row in memory
        if row.fits and row.zero_stage >= settings.zero_stage and row.micro_batch_rows <= settings.micro_batch_rows
    ]
    if fitting:
        least = min(fitting, key=lambda row: (row.zero_stage, -row.micro_batch_rows))
        changes = f"distill.zero_stage={least.zero_stage} with distill.micro_batch_rows={least.micro_batch_rows}"
        return [f"the configured training does not fit into the GPU's memory; {changes} does"]
    recompute = "" if settings.activation_checkpointing else "distill.activation_checkpointing=true, "
    return [
        "the configured training does not fit into the GPU's memory, nor does any ZeRO stage with fewer rows; take "
        f"{recompute}a smaller pack.context or GPUs with more memory"
    ]


def shortages(config: Config, steps: Sequence[Step], rates: Rates) -> list[str]:
    """What asks for more GPUs at once than the cluster has; the plan reckons as if it had them."""
    have, workers = rates.cluster.gpus, training_workers(config, rates)
    found = []
    if config.distill.use_gpu and workers > have:
        found.append(
            f"training needs {workers} GPUs at once, and the cluster has {have}; lower distill.num_workers, or raise "
            "cluster.gpus in the rates"
        )
    asked = {step.stage: gpus_of(config, step) for step in steps if kind_of(config, step) != "train"}
    short = {stage: gpus for stage, gpus in asked.items() if gpus > have}
    if short:
        names = ", ".join(f"{stage}.num_gpus={gpus:g}" for stage, gpus in short.items())
        found.append(f"{names}, and the cluster has {have} GPUs; set them to 0, or raise cluster.gpus in the rates")
    return found


def assumed(costs: Sequence[StageCost]) -> list[str]:
    """Whose rates nobody has measured."""
    stages = sorted({cost.stage for cost in costs if cost.source == ASSUMPTION})
    if not stages:
        return []
    return [
        f"the rates of {', '.join(stages)} are assumptions, at least in part; --calibrate measures on this machine, "
        "and --measured RUN_DIR takes those of a run"
    ]


def text_llm(config: Config, rates: Rates) -> PreTrainedConfig:
    """The text LLM's config: of the embedded world's, of the rates, else where its weights lie.

    Raises:
        ConfigError: it cannot be had, or the rates' shape is none.
    """
    teacher = config.model.teacher
    if teacher == "world":
        tiny = config.model.tiny_lm
        return Qwen2Config(
            hidden_size=tiny.hidden_size,
            num_hidden_layers=tiny.num_layers,
            num_attention_heads=tiny.num_heads,
            num_key_value_heads=tiny.num_heads,
            intermediate_size=tiny.ffn_size,
            vocab_size=WORLD_VOCABULARY,
            tie_word_embeddings=True,
        )
    shape = rates.models.get(teacher)
    try:
        if shape is not None:
            llm = AutoConfig.for_model(**shape)
        else:
            llm = AutoConfig.from_pretrained(teacher, revision=config.model.revision, trust_remote_code=False)
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


class Amounts:
    """How much of everything there will be; `lines` has each step by its name."""

    def __init__(self, config: Config, rates: Rates, llm: PreTrainedConfig) -> None:
        self.config, self.rates, self.lines = config, rates, dict[str, Line]()
        dim, self.frame_rate = ENCODERS[config.encode.encoder]
        self.shape = Shape(llm, config.model.adapter, dim)
        self._natural()
        self._written()
        self._positions()
        self._flops()

    def __getitem__(self, name: str) -> float:
        """The value of a line."""
        return self.lines[name].value

    def line(self, name: str, value: float, unit: str, how: str, *inputs: str) -> Line:
        """A line from others and from rates, whose names are the inputs: their weakest source is its own."""
        sources = (self.lines[each].source if each in self.lines else self.rates.source_of(each) for each in inputs)
        return Line(name, float(value), unit, how, weakest(sources))

    def _add(self, name: str, value: float, unit: str, how: str, *inputs: str) -> float:
        self.lines[name] = self.line(name, value, unit, how, *inputs)
        return float(value)

    def _natural(self) -> None:
        config, speech = self.config, self.rates.speech
        if not config.ingest.corpora:
            number, words = config.world.num_natural, world_words()
            how = f"{number:,} documents × {words:.1f} words / {speech.words_per_sec:.2f} words/s"
            hours = number * words / speech.words_per_sec / 3600
            self._add("natural speech", hours, "h", how, "words_per_sec")
            self._add("training speech", hours, "h", "all of it", "natural speech")
            self._add("training utterances", number, "", "world.num_natural")
            return
        names = [corpus.name or path_name(corpus.path) for corpus in config.ingest.corpora]
        found = {name: known(self.rates.corpora, name, "corpora", "hours") for name in names}
        hours = self._add("natural speech", sum(found.values()), "h", _sum(found), "corpora")
        heldout = hours * config.ingest.heldout_share
        self._add("held-out recordings", heldout, "h", "ingest.heldout_share", "natural speech")
        self._add("training speech", hours - heldout, "h", "without ingest.heldout_share", "natural speech")
        secs, how = (hours - heldout) * 3600, f"hours × 3,600 / {speech.secs_per_utterance:g} s"
        each = ("training speech", "secs_per_utterance")
        self._add("training utterances", secs / speech.secs_per_utterance, "", how, *each)

    def _written(self) -> None:
        """Web text, and what is spoken of it and of benchmarks."""
        config = self.config
        self.passage_words, self.passage_rates = self._web_text()
        if "text" in config.trained_sets:
            self._text_alone()
        if "heldout" in config.measured_sets:
            own, key = config.world.num_heldout, "world.num_heldout"
            if config.ingest.web:
                own, key = config.ingest.passages.num_heldout, "ingest.passages.num_heldout"
            self._add(PASSAGES["heldout"], own, "passages", key)
            self._add_speech("heldout")
        if config.stage2 is not None:
            self._active()
        if config.has_benchmark:
            self._benchmarks()

    def _web_text(self) -> tuple[float, tuple[str, ...]]:
        """Its passages; returns the words of each, and of which rates its speech is made."""
        corpora, world = self.config.ingest.web, self.config.world
        if not corpora:
            self._add("web text", world.num_web, "passages", "world.num_web")
            return world_words(), ("words_per_sec",)
        self._add_passages("web", corpora)
        return self.rates.speech.words_per_passage, ("words_per_passage", "words_per_sec")

    def _text_alone(self) -> None:
        """What is read in training and never heard; and the positions of a sample of it."""
        corpora, speech = self.config.ingest.text, self.rates.speech
        words, read = (speech.words_per_passage, ("words_per_passage",)) if corpora else (world_words(), ())
        if corpora:
            self._add_passages("text", corpora)
        else:
            self._add(PASSAGES["text"], self.config.world.num_text, "passages", "world.num_text")
        how = f"{words:.1f} words × {speech.tokens_per_word:.3g} tokens"
        self._add("a sample of text", words * speech.tokens_per_word, "positions", how, *read, "tokens_per_word")

    def _add_passages(self, name: str, corpora: Sequence[WebTextConfig]) -> None:
        found: dict[str, float] = {}
        for corpus in corpora:
            own = corpus.name or path_name(corpus.path)
            found[own] = known(self.rates.web, own, "web", "passages") * corpus.share
        self._add(PASSAGES[name], sum(found.values()), "passages", _sum(found), "web")

    @property
    def _passage_secs(self) -> float:
        return self.passage_words / self.rates.speech.words_per_sec

    def _add_speech(self, name: str) -> None:
        hours = self[PASSAGES[name]] * self._passage_secs / 3600
        how = f"{PASSAGES[name]} × {self._passage_secs:.1f} s"
        self._add(SPEECH[name], hours, "h", how, PASSAGES[name], *self.passage_rates)

    def _active(self) -> None:
        """What is spoken to measure the clusters, and what is selected."""
        config, budget = self.config, self.config.select
        clusters, each = config.cluster.num_clusters, config.probe.passages_per_cluster
        self._add(PASSAGES["probe"], clusters * each, "passages", f"{clusters:,} clusters × {each:,}")
        self._add_speech("probe")
        if budget.budget_hours is not None:
            hours = self._add(SPEECH["active"], budget.budget_hours, "h", "select.budget_hours")
        else:
            percent = budget.budget_percent or 1.0
            hours = self["training speech"] * percent / 100
            self._add(SPEECH["active"], hours, "h", f"{percent:g} % of the training speech", "training speech")
        how = f"synthetic speech / {self._passage_secs:.1f} s"
        number = hours * 3600 / self._passage_secs
        self._add(PASSAGES["active"], number, "passages", how, SPEECH["active"], *self.passage_rates)

    def _benchmarks(self) -> None:
        asked, speech, world = self.config.evaluate.benchmarks, self.rates.speech, self.config.world
        if not asked:
            self._add(PASSAGES["benchmark"], world.num_questions, "items", "world.num_questions")
            hours, how = world.num_questions * self._passage_secs / 2 / 3600, "items × half a passage"
            self._add(SPEECH["benchmark"], hours, "h", how, PASSAGES["benchmark"], *self.passage_rates)
            return
        numbers = [benchmark.max_items or speech.items_per_benchmark for benchmark in asked]
        read = () if all(benchmark.max_items for benchmark in asked) else ("items_per_benchmark",)
        number = self._add(PASSAGES["benchmark"], sum(numbers), "items", f"{len(asked)} benchmarks", *read)
        hours, how = number * speech.secs_per_item / 3600, f"items × {speech.secs_per_item:g} s"
        self._add(SPEECH["benchmark"], hours, "h", how, PASSAGES["benchmark"], "secs_per_item")

    def _positions(self) -> None:
        speech, training = self.rates.speech, self["training speech"]
        how = f"hours × 3,600 × {self.frame_rate} Hz"
        frames = self._add("speech frames", training * 3600 * self.frame_rate, "", how, "training speech")
        words = training * 3600 * speech.words_per_sec
        how = f"hours × 3,600 × {speech.words_per_sec:.2f} words/s"
        self._add("words", words, "", how, "training speech", "words_per_sec")
        frames = self._add_groups(frames, words)
        heard = self._add_heard(frames / words)
        tokens, taken = words * speech.tokens_per_word, "frames" if self._stride == 1 else "speech positions"
        epoch = self._add(
            "positions of an epoch",
            heard * frames + (1 - heard) * tokens,
            "",
            f"{heard:.3f} × {taken} + {1 - heard:.3f} × words × {speech.tokens_per_word:.3g} tokens",
            *("speech frames", "words", "tokens_per_word"),
        )
        self.speech_share, self.teacher_share = heard * frames / epoch, tokens / epoch
        self.word_end_share = heard * words / epoch
        for stage, shares in self._sample_shares().items():
            if "text" in self.config.trained_sets:
                self._add_text_share(stage, shares.get("text", 0.0), epoch)
        self._training(epoch)

    @property
    def _stride(self) -> int:
        return self.config.model.adapter.stride

    def _add_groups(self, frames: float, words: float) -> float:
        """Positions that the speech takes: its frames, or the groups of frames that stand side by side."""
        if self._stride == 1:
            return frames
        more = (1 - 1 / self._stride) / 2 / mean(self.config.pack.speech_words)  # a span's last group is half full
        how = f"speech frames / {self._stride} + {more:.3g} × words"
        return self._add("speech positions", frames / self._stride + more * words, "", how, "speech frames", "words")

    def _add_heard(self, positions_per_word: float) -> float:
        """Share of the words that are heard, over samples of all kinds."""
        pack = self.config.pack
        text, spoken = mean(pack.text_words), mean(pack.speech_words)
        share, how = spoken / (spoken + text), f"{spoken:g} / ({spoken:g} + {text:g}) words a span"
        if pack.whole_share == 0:
            return self._add("share of words heard", share, "", how)
        # Joined utterances have density ∝ 1/√length up to MAX_FILL of the context: a third of that on average.
        length = pack.context * MAX_FILL / 3 / positions_per_word if self.config.ingest.corpora else world_words()
        tail = min((1 + pack.text_words[1]) / 2, length)
        how = f"{1 - pack.whole_share:g} × {how} + {pack.whole_share:g} × (1 − {tail:g} / {length:.0f} words)"
        share = (1 - pack.whole_share) * share + pack.whole_share * (1 - tail / length)
        return self._add("share of words heard", share, "", how)

    def _sample_shares(self) -> dict[str, dict[str, float]]:
        """Of the samples, by stage and set."""
        second = {} if self.config.stage2 is None else {"stage2": self.config.stage2_shares}
        return {"stage1": self.config.stage1_shares} | second

    def _add_text_share(self, stage: str, share: float, epoch: float) -> None:
        """Share of a stage's positions that are text alone, from the share of its samples."""
        each = epoch / self["training utterances"]
        how, read = "an utterance", ("positions of an epoch", "training utterances")
        if self.config.ingest.corpora:  # neighbours are joined, up to a length with density ∝ 1/√length
            joined = MAX_FILL * self.config.pack.context / 3
            each, how = max(each, joined), f"utterances, joined to {joined:,.0f} positions on average or more"
        speech = self._add("a sample of speech", each, "positions", how, *read)
        text = self["a sample of text"]
        value = share * text / (share * text + (1 - share) * speech)
        how = f"{share:.1%} of the samples, of {text:,.0f} positions; those of speech have {speech:,.0f}"
        self._add(TEXT_SHARES[stage], value, "of the positions", how, "a sample of speech", "a sample of text")

    def text_share(self, stage: str) -> float:
        """Share of a training's positions that are text alone."""
        line = self.lines.get(TEXT_SHARES["stage2" if stage == "stage2" else "stage1"])
        return line.value if line else 0.0

    def flop_of_position(self, stage: str) -> float:
        """On average over a training's positions of speech and of text alone."""
        share = self.text_share(stage)
        of_text = self["FLOP of a position of text"] if share else 0.0
        return (1 - share) * self["FLOP of a position"] + share * of_text

    def _training(self, epoch: float) -> None:
        """Positions that both stages see, and epochs that the plan must last."""
        config, settings, second = self.config, self.config.distill, self.config.stage2
        step = config.pack.num_lanes * config.pack.rows_per_lane * config.pack.context * self.rates.training.fill
        all_of_it = epoch / (1 - self.text_share("stage1"))  # one epoch of the speech, and its share of text
        steps = settings.num_steps or math.ceil((settings.num_positions or all_of_it) / step)
        ends = () if settings.num_steps or settings.num_positions else ("positions of an epoch",)
        trained = self._add("Stage I, D", steps * step, "positions", f"{steps:,} steps", "fill", *ends)
        text = self.text_share("stage1")
        how, read = "D / positions of an epoch", ["Stage I, D", "positions of an epoch"]
        if text:
            how, read = "D without text alone / positions of an epoch", [*read, TEXT_SHARES["stage1"]]
        epochs = self._add("epochs of Stage I", trained * (1 - text) / epoch, "", how, *read)
        if text:
            one = self[PASSAGES["text"]] * self["a sample of text"]
            how = f"{text:.1%} of D / ({PASSAGES['text']} × a sample of text)"
            read = ["Stage I, D", TEXT_SHARES["stage1"], PASSAGES["text"], "a sample of text"]
            self._add("passes over the text", trained * text / one, "", how, *read)
        planned, how = self["training utterances"] * math.ceil(epochs), "training utterances × whole epochs"
        self._add("planned utterances", planned, "", how, "training utterances", "epochs of Stage I")
        if second is not None:
            given = math.ceil(second.num_positions / step) if second.num_positions else None
            more = second.num_steps or given or max(1, round(STAGE2_SHARE * steps))
            ends = () if second.num_steps or given else ("Stage I, D",)
            self._add("Stage II", more * step, "positions", f"{more:,} steps", "fill", *ends)

    def _flops(self) -> None:
        config = self.config
        student, teacher = self.shape.num_llm + self.shape.num_adapter, self.shape.num_llm
        self._add("text LLM", teacher, "parameters", config.model.teacher)
        self._add("adapter", self.shape.num_adapter, "parameters", "model.adapter")
        self._add(
            "FLOP of a position",
            6 * student + 2 * teacher * self.teacher_share,
            "",
            f"6 × {student:,.4g} student + 2 × {teacher:,.4g} teacher × {self.teacher_share:.3f} of the positions",
            "positions of an epoch",
        )
        trained = [(stage, line) for stage, line in TRAINED.items() if line in self.lines]
        trained += [("stage2", TRAINED["stage2"])] * has_control(config)
        names = [line for _, line in trained]
        how, read = f"FLOP of a position × ({' + '.join(names)})", ["FLOP of a position", *names]
        if "text" in config.trained_sets:
            how_each = f"6 × {student:,.4g} student + 2 × {teacher:,.4g} teacher"
            self._add("FLOP of a position of text", 6 * student + 2 * teacher, "", how_each)
            how = f"FLOP of a position, of speech and of text by their shares × ({' + '.join(names)})"
            read += [TEXT_SHARES[stage] for stage, _ in trained]
        total = sum(self.flop_of_position(stage) * self[line] for stage, line in trained)
        self._add("FLOP in all", total, "", how, *read)
        size = bytes_per_hour(config)
        how = f"natural speech × {size:,.0f} bytes an hour ({config.encode.storage})"
        self._add("features", self["natural speech"] * size, "bytes", how, "natural speech")


def has_control(config: Config) -> bool:
    """Whether Stage II is trained a second time, without active speech."""
    return config.stage2 is not None and config.stage2.control


def bytes_per_hour(config: Config) -> float:
    """Of features, without what Parquet saves."""
    dim, frame_rate = ENCODERS[config.encode.encoder]
    return 3600 * frame_rate * dim * (1 if config.encode.storage == "int8" else 2)


def known(table: Mapping[str, float], name: str, key: str, unit: str) -> float:
    if name not in table:
        raise ConfigError(
            f"the plan does not know how many {unit} '{name}' has; add it under `{key}` in a copy of rates.yaml, and "
            "pass that with --rates"
        )
    return table[name]


def _sum(found: Mapping[str, float]) -> str:
    return " + ".join(f"{number:,.0f} ({name})" for name, number in found.items())


def world_words(sample: int = 200) -> float:
    """Words of a document of the embedded world, on average."""
    return mean(len(passage.text.split()) for passage in world_passages(sample, DOMAINS, 0, "web"))


def amount_of(config: Config, step: Step, data: Amounts) -> tuple[float, str]:
    """Units of work of a step, as `rates.stages` counts them, and the source of their number."""
    systems, conditions = len(step.tables), len(config.evaluate.conditions)
    if step.stage in ("teacher", "report"):
        is_trained = step.stage == "teacher" and config.model.teacher == "world"
        return (float(config.model.tiny_lm.num_steps) if is_trained else 1.0), DERIVED
    if step.stage in ("synthesize", "encode", "align"):
        name, times = SPEECH[step.set], conditions if (step.stage, step.set) == ("encode", "benchmark") else 1
    elif step.stage == "measure":
        name, times = "held-out recordings" if step.set == "natural" else SPEECH[step.set], systems
    elif step.stage == "evaluate":
        floors = len(set(config.evaluate.floors) - {"choices"})  # without a prompt, an item costs next to nothing
        name, times = PASSAGES["benchmark"], systems * (conditions + floors)
    elif step.stage in ("probe", "select"):
        name, times = PASSAGES["web"], 1
    elif (step.stage, step.set) == ("pack", "natural"):
        name, times = "planned utterances", 1
    else:
        name, times = SPEECH["natural"] if "catalog" in step.tables else PASSAGES[step.set], 1
    return data[name] * times, data.lines[name].source


def shards_of(config: Config, step: Step, data: Amounts) -> int:
    """Shards that a step's work is dealt to."""
    if step.stage in ("teacher", "report"):
        return 1
    if step.stage == "pack":
        return config.pack.num_lanes * (math.ceil(data["epochs of Stage I"]) if step.set == "natural" else 1)
    if step.set in ("heldout", "probe", "active", "benchmark"):
        lanes = config.pack.num_lanes
        number = math.ceil(data[PASSAGES[step.set]] / PICKED_PER_SHARD)
        return max(1, min(config.ingest.num_shards, -(-number // lanes) * lanes))
    return config.ingest.num_shards


def stage_cost(config: Config, step: Step, data: Amounts, rates: Rates) -> StageCost:
    """What a step takes; of `cluster` the fit, one job that may have a GPU, and then its actors, which have none."""
    kind = kind_of(config, step)
    rate = rates.stage(kind)
    if kind == "train":
        return _training_cost(config, step, data, rates)
    amount, shards = amount_of(config, step, data), shards_of(config, step, data)
    gpus = gpus_of(config, step)
    if kind != "cluster":
        return _actors_cost(config, step, rate, amount, shards, gpus, rates)
    points = min(amount[0], config.cluster.sample_passages), amount[1]
    fit = _actors_cost(config, step, rates.stage(CLUSTER_FIT), points, 1, gpus, rates)
    assign = _actors_cost(config, step, rate, amount, shards, 0.0, rates)
    sums = {name: getattr(fit, name) + getattr(assign, name) for name in ("secs", "cpu_hours", "gpu_hours", "money")}
    return replace(assign, **sums, source=weakest((fit.source, assign.source)))


def _actors_cost(
    config: Config, step: Step, rate: StageRate, amount: tuple[float, str], shards: int, gpus: float, rates: Rates
) -> StageCost:
    """Start, then the shards in waves of as many as there are actors, each with so many GPUs."""
    work, work_source = amount
    room = rates.cluster.gpus / gpus if gpus else (config.ray.num_cpus or rates.cluster.cpus)
    actors = max(1, min(int(room), shards, config.ray.max_actors or shards))
    waves = math.ceil(shards / actors) * actors / shards
    secs = rate.start + (rate.unit or 0.0) * work / actors * waves
    gpu_hours, cpu_hours = (secs * actors * gpus / 3600, 0.0) if gpus else (0.0, secs * actors / 3600)
    money = gpu_hours * rates.prices.spot_gpu_hour + cpu_hours * rates.prices.cpu_hour
    return StageCost(
        step.stage, step.set, work, rate.per, work_source, actors, secs, cpu_hours, gpu_hours, money, rate.source
    )


def training_workers(config: Config, rates: Rates) -> int:
    """Training workers; of an elastic number as many as the cluster has GPUs for."""
    settings = config.distill
    if isinstance(settings.num_workers, int) or not settings.use_gpu:
        return settings.most_workers
    least, most = settings.num_workers
    return max(least, min(most, rates.cluster.gpus))


def _training_cost(config: Config, step: Step, data: Amounts, rates: Rates) -> StageCost:
    rate, settings, training = rates.stage("train"), config.distill, rates.training
    workers, line = training_workers(config, rates), data.lines[TRAINED.get(step.stage, TRAINED["stage1"])]
    share = {"trunk": 1 - settings.decay_share, "stage1": settings.decay_share}.get(step.stage, 1.0)
    positions = line.value * len(step.tables) * share
    if rate.unit is not None:
        busy, source = rate.unit * positions, rate.source
    else:
        peak = training.mfu * PEAK_FLOPS[rates.cluster.gpu] if settings.use_gpu else training.cpu_flops
        busy = data.flop_of_position(step.stage) * positions / peak
        source = weakest((rate.source, rates.source_of("mfu" if settings.use_gpu else "cpu_flops")))
    secs = rate.start * len(step.tables) + busy / workers
    gpu_hours = secs * workers / 3600 if settings.use_gpu else 0.0  # a GPU's price has its machine's cores in it
    cpu_hours = 0.0 if settings.use_gpu else secs * workers * settings.cpus_per_worker / 3600
    money = gpu_hours * rates.prices.gpu_hour + cpu_hours * rates.prices.cpu_hour
    return StageCost(
        step.stage, "", positions, "position", line.source, workers, secs, cpu_hours, gpu_hours, money, source
    )


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
            kinds = [(data.speech_share, data.word_end_share)]
            kinds += [(0.0, 0.0)] if "text" in config.trained_sets else []  # rows without speech, too
            found_parts = [training_memory(data.shape, changed, config.pack, least, *shares) for shares in kinds]
            parts = max(found_parts, key=lambda each: each["peak"])
            own = (stage, rows) == (settings.zero_stage, settings.micro_batch_rows)
            fits = None if limit is None else parts["peak"] <= USABLE * limit
            found.append(Memory(stage, rows, own, parts, fits))
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
        shares = data.speech_share, data.word_end_share
        peak = training_memory(data.shape, changed, config.pack, settings.most_workers, *shares)["peak"]
        needed = peak / USABLE
        if needed <= gpu_bytes:
            return config.model_copy(update={"distill": changed})
    there = f"GPUs of {gpu_bytes / 2**30:.0f} GiB" if gpu_bytes else "no GPU"
    raise ConfigError(
        f"--calibrate: training {config.model.teacher} needs {needed / 2**30:.0f} GiB a GPU at least, and this machine "
        f"has {there}; plan without --calibrate, or with --measured RUN_DIR of a run's first steps"
    )


def storage_lines(config: Config, data: Amounts, rates: Rates) -> list[Line]:
    """Bytes of what lies in run_dir, and of the corpora themselves."""
    spoken = [name for name in SPEECH.values() if name in data.lines]
    synthetic = [name for name in spoken if not (config.ingest.corpora and name == SPEECH["natural"])]
    audio = "opus_hour" if config.synthesize.audio_format == "OPUS" else "flac_hour"
    each = rates.bytes.model_dump() | {
        "feature bytes an hour": bytes_per_hour(config),
        "bytes of an embedding": 2 * (config.embed.dim if config.embed.embedder == "tfidf" else SENTENCE_DIM),
    }

    def times(name: str, size: str, *counted: str) -> Line:
        value = each[size] * sum(data[count] for count in counted)
        read = (size,) if size in type(rates.bytes).model_fields else ()
        what = counted[0] if len(counted) == 1 else "hours of all of it"
        return data.line(name, value, "bytes", f"{what} × {each[size]:,.10g} ({size})", *read, *counted)

    found = [times("recorded corpora", "source_hour", SPEECH["natural"])] if config.ingest.corpora else []
    found += [
        times("synthetic audio", audio, *synthetic),
        times("features", "feature bytes an hour", *spoken),
        times("web text", "text_passage", PASSAGES["web"]),
        times("plan", "plan_utterance", "planned utterances"),
    ]
    if PASSAGES["text"] in data.lines:
        found.append(times("text alone", "text_passage", PASSAGES["text"]))
        found.append(times("plan of text alone", "plan_utterance", PASSAGES["text"]))
    if config.stage2 is not None:
        found.append(times("embeddings", "bytes of an embedding", PASSAGES["web"]))
    return found + _models(config, data)


def _models(config: Config, data: Amounts) -> list[Line]:
    """Weights in fp32 and two moments of Adam for every checkpoint that is kept, and what is exported."""
    student = data.shape.num_llm + data.shape.num_adapter
    trainings = sum(name in data.lines for name in TRAINED.values()) + has_control(config)
    kept, width = config.distill.keep_checkpoints + 1, BYTES[config.distill.precision]
    how = f"{trainings} × {kept} × 12 × {student:,.4g} parameters"
    return [
        data.line("checkpoints", 12.0 * student * kept * trainings, "bytes", how),
        data.line("models", width * student * trainings, "bytes", f"{trainings} × {width} × {student:,.4g} parameters"),
    ]


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
    for name in ("stage", "work", "its source", "actors", "wall", "CPU h", "GPU h", plan.currency, "rate"):
        grid.add_column(name, justify="left" if name in ("stage", "its source", "rate") else "right")
    for cost in plan.stages:
        grid.add_row(
            f"{cost.stage} {cost.set}".strip(),
            f"{_number(cost.amount)} {cost.unit}",
            _short(cost.amount_source),
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
    grid.add_row("all", "", "", "", clock(totals["secs"]), *numbers, "")
    return grid


def _memory(plan: Plan) -> RichTable:
    grid = RichTable(title="Peak memory of a training worker, GiB (the configured setting first)", title_justify="left")
    for name in ("ZeRO", "rows", "peak", "fits", "weights", "gradients", "optimizer", "activations", "loss"):
        grid.add_column(name, justify="right")
    for row in plan.memory:
        parts = {name: size / 2**30 for name, size in row.parts.items()}
        weights = parts["teacher"] + parts["student"] + parts.get("gathered parameters", 0.0)
        numbers = (weights, parts["gradients"], parts["optimizer"], parts["activations"], parts["loss"])
        fits = {None: "", True: "yes", False: "no"}[row.fits]
        cells = [str(row.zero_stage), str(row.micro_batch_rows), f"{parts['peak']:.2f}", fits]
        grid.add_row(*cells, *(f"{number:.2f}" for number in numbers))
        if row.is_configured:
            grid.add_section()
    return grid


def _storage(plan: Plan) -> RichTable:
    grid = RichTable("what", "GB", "how", "source", title="What will lie in storage", title_justify="left")
    grid.columns[1].justify = "right"
    for line in plan.storage:
        grid.add_row(line.name, _number(line.value / 1e9), line.how, _short(line.source))
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
