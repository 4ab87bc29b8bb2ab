"""How much of everything there will be: derived from the config and the rates, step by step, each step a line.

Words are spoken or written by the spans of `pack`: with text spans of t words and speech spans of s words on average,
s / (s + t) of the words are heard; of a sample that is spoken whole, all but its last (1 + longest text span) / 2. With
n frames side by side the last position of a span is half full on average. Shares of text alone are shares of samples;
the lengths of samples of speech and of text make shares of positions of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from transformers import PreTrainedConfig

from salad_ray import names
from salad_ray.config import STAGE2_SHARE, Config, CorpusConfig, WebTextConfig, path_name
from salad_ray.distill.step import PEAK_FLOPS
from salad_ray.flow import steps
from salad_ray.scaling.memory import Shape
from salad_ray.scaling.number import Number, total
from salad_ray.scaling.rates import Rates
from salad_ray.sequences.plan import MAX_FILL
from salad_ray.text.world import DOMAINS, world_passages

ENCODERS = {"mimi": (512, 12.5), "log_mel": (640, 12.5)}
"""Width and frame rate."""
WRITTEN = {
    names.WEB: "web text", names.TEXT: "text alone", names.NATURAL: "training utterances",
    names.HELDOUT: "held-out passages", names.PROBE: "probe passages", names.ACTIVE: "selected passages",
    names.BENCHMARK: "benchmark items",
}  # fmt: skip
SPOKEN = {
    names.NATURAL: "natural speech", names.HELDOUT: "held-out speech", names.PROBE: "probe speech",
    names.ACTIVE: "synthetic speech", names.BENCHMARK: "spoken items",
}  # fmt: skip
"""Lines with the passages of a set, and with the hours that they take."""
TRAINED = {names.STAGE1: "Stage I, D", names.STAGE2: "Stage II"}
TEXT_SHARES = {names.STAGE1: "text of Stage I", names.STAGE2: "text of Stage II"}
FLOP = {names.STAGE1: "FLOP of Stage I", names.STAGE2: "FLOP of Stage II"}
"""Lines with the positions of a training, the share of them that is text alone, and what they take. The trunk's are
Stage I's."""


@dataclass(frozen=True)
class Line:
    """One step of the derivation: `value` in `unit`, how it comes about, and its weakest source."""

    name: str
    value: float
    unit: str
    how: str
    source: str

    @classmethod
    def of(cls, name: str, value: Number, unit: str) -> Line:
        return cls(name, float(value), unit, value.how, value.source)


class Amounts:
    """The derivation: `lines` by their names; `amounts[name]` is the value of a line, by its name in other formulas."""

    def __init__(self, config: Config, rates: Rates, llm: PreTrainedConfig) -> None:
        self.config, self.rates, self.lines = config, rates, dict[str, Line]()
        dim, self.frame_rate = ENCODERS[config.encode.encoder]
        self.shape = Shape(llm, config.model.adapter, dim)
        self.trainings = [step.stage for step in steps(config) if step.trains and step.stage != names.TRUNK]
        width, storage = 1 if config.encode.storage == "int8" else 2, config.encode.storage
        self.bytes_per_hour = Number(3600 * self.frame_rate * dim * width, f"# (bytes an hour, {storage})")
        self._speech()
        self._texts()
        self._epoch()
        self._training()
        self._compute()

    def __getitem__(self, name: str) -> Number:
        return Number(self.lines[name].value, name, self.lines[name].source)

    def _add(self, name: str, value: Number, unit: str = "") -> Number:
        self.lines[name] = Line.of(name, value, unit)
        return self[name]

    def _key(self, key: str) -> Number:
        """Of the config."""
        value: Any = functools.reduce(getattr, key.split("."), self.config)
        return Number(value, f"# ({key})")

    def _speech(self) -> None:
        """Natural speech, recorded or of the embedded world, and what of it is trained on."""
        if self.config.ingest.corpora:
            hours = self._add("natural speech", self._corpora("corpora", self.config.ingest.corpora, "hours"), "h")
            heldout = self._add("held-out recordings", hours * self._key("ingest.heldout_share"), "h")
            hours = self._add("training speech", hours - heldout, "h")
            self._add("training utterances", hours * 3600 / self.rates["secs_per_utterance"])
        else:
            utterances = self._key("world.num_natural")
            secs = utterances * world_words() / self.rates["words_per_sec"]
            self._add("training speech", self._add("natural speech", secs / 3600, "h"), "h")
            self._add("training utterances", utterances)

    def _corpora(self, kind: str, corpora: Sequence[CorpusConfig | WebTextConfig], unit: str) -> Number:
        sizes = [self.rates.size_of(kind, corpus.name or path_name(corpus.path), unit) for corpus in corpora]
        shares = [getattr(corpus, "share", 1) for corpus in corpora]
        return total(size if share == 1 else size * share for size, share in zip(sizes, shares, strict=True))

    def _texts(self) -> None:
        """What is written: web text, text that is never heard, and what is spoken of web text and of benchmarks."""
        config, key = self.config, self._key
        self._add("a spoken passage", self._passages(names.WEB, config.ingest.web) / self.rates["words_per_sec"], "s")
        if names.TEXT in config.trained_sets:
            words = self._passages(names.TEXT, config.ingest.text)
            self._add("a sample of text", words * self.rates["tokens_per_word"], "positions")
        if names.HELDOUT in config.measured_sets:
            self._spoken(names.HELDOUT, key(f"{'ingest.passages' if config.ingest.web else 'world'}.num_heldout"))
        if config.stage2 is not None:
            self._spoken(names.PROBE, key("cluster.num_clusters") * key("probe.passages_per_cluster"))
            percent = config.select.budget_percent or 1.0
            hours = self["training speech"] * Number(percent / 100, f"{percent:g} %")
            if config.select.budget_hours is not None:
                hours = key("select.budget_hours")
            hours = self._add(SPOKEN[names.ACTIVE], hours, "h")
            self._add(WRITTEN[names.ACTIVE], hours * 3600 / self["a spoken passage"], "passages")
        if config.evaluate.benchmarks:
            limits = [asked.max_items for asked in config.evaluate.benchmarks if asked.max_items]
            without = len(config.evaluate.benchmarks) - len(limits)
            parts = [Number(sum(limits), "# (max_items)")] if limits else []
            parts += [without * self.rates["items_per_benchmark"]] if without else []
            items = self._add(WRITTEN[names.BENCHMARK], total(parts), "items")
            self._add(SPOKEN[names.BENCHMARK], items * self.rates["secs_per_item"] / 3600, "h")
        elif config.has_benchmark:
            items = self._add(WRITTEN[names.BENCHMARK], key("world.num_questions"), "items")
            self._add(SPOKEN[names.BENCHMARK], items * self["a spoken passage"] / 2 / 3600, "h")

    def _passages(self, name: str, corpora: Sequence[WebTextConfig]) -> Number:
        """Passages of web text or of text alone; returns the words of one."""
        found = self._corpora(names.WEB, corpora, "passages") if corpora else self._key(f"world.num_{name}")
        self._add(WRITTEN[name], found, "passages")
        return self.rates["words_per_passage"] if corpora else world_words()

    def _spoken(self, name: str, number: Number) -> None:
        """Passages of web text that are spoken."""
        passages = self._add(WRITTEN[name], number, "passages")
        self._add(SPOKEN[name], passages * self["a spoken passage"] / 3600, "h")

    def _epoch(self) -> None:
        """Positions of one pass over the training speech, and which share of a training's is text alone."""
        pack, stride, tokens = self.config.pack, self._key("model.adapter.stride"), self.rates["tokens_per_word"]
        secs = self["training speech"] * 3600
        frames = self._add("speech frames", secs * Number(self.frame_rate, "# Hz"))
        words = self._add("words", secs * self.rates["words_per_sec"])
        if stride > 1:  # a span's last group is half full
            groups = frames / stride + (1 - 1 / stride) / 2 / Number(mean(pack.speech_words)) * words
            frames = self._add("speech positions", groups)
        heard = self._add("share of words heard", self._heard(frames / words))
        epoch = self._add("positions of an epoch", heard * frames + (1 - heard) * words * tokens)
        self.teacher_share = words * tokens / epoch
        self.speech_shares = float(heard * frames / epoch), float(heard * words / epoch)
        if names.TEXT in self.config.trained_sets:
            self._text_shares(epoch / self["training utterances"])

    def _heard(self, positions_per_word: Number) -> Number:
        """Share of the words that are heard, over samples of all kinds."""
        pack, whole = self.config.pack, self._key("pack.whole_share")
        spoken = Number(mean(pack.speech_words), "# (words of a speech span)")
        share = spoken / (spoken + Number(mean(pack.text_words), "# (of a text span)"))
        if not whole:
            return share
        # Joined utterances have density ∝ 1/√length up to MAX_FILL of the context: a third of that on average.
        joined = self._key("pack.context") * MAX_FILL / 3 / positions_per_word
        length = joined if self.config.ingest.corpora else world_words()
        tail = min(Number((1 + pack.text_words[1]) / 2, "# (words read)"), length)
        return (1 - whole) * share + whole * (1 - tail / length)

    def _text_shares(self, utterance: Number) -> None:
        """Of positions that are text alone, from the shares of samples."""
        if self.config.ingest.corpora:  # neighbours are joined, up to a length with density ∝ 1/√length
            joined = self._key("pack.context") * MAX_FILL / 3
            how = f"max({utterance.how}, {joined.how})"
            utterance = Number(max(utterance, joined), how, utterance.source)
        speech, text = self._add("a sample of speech", utterance, "positions"), self["a sample of text"]
        for stage in dict.fromkeys(self.trainings):
            shares = self.config.stage1_shares if stage == names.STAGE1 else self.config.stage2_shares
            share = Number(shares.get(names.TEXT, 0.0))
            self._add(TEXT_SHARES[stage], share * text / (share * text + (1 - share) * speech), "of the positions")

    def _training(self) -> None:
        """Positions that both stages see, and epochs that the plan must last."""
        settings, second, key = self.config.distill, self.config.stage2, self._key
        epoch, text = self["positions of an epoch"], self.lines.get(TEXT_SHARES[names.STAGE1])
        speech = 1 - self[text.name] if text and text.value else Number(1)
        lanes = key("pack.num_lanes") * key("pack.rows_per_lane")
        step = self._add("positions of a step", lanes * key("pack.context") * self.rates["fill"])
        asked = key("distill.num_positions") if settings.num_positions else epoch / speech
        steps = key("distill.num_steps") if settings.num_steps else (asked / step).rounded("⌈⌉", math.ceil)
        steps = self._add("steps of Stage I", steps)
        trained = self._add(TRAINED[names.STAGE1], steps * step, "positions")
        epochs = self._add("epochs of Stage I", trained * speech / epoch)
        if text and text.value:
            passes = trained * self[text.name] / (self[WRITTEN[names.TEXT]] * self["a sample of text"])
            self._add("passes over the text", passes)
        self._add("planned utterances", self["training utterances"] * epochs.rounded("⌈⌉", math.ceil))
        if second is not None:
            more = max((STAGE2_SHARE * steps).rounded("[]", round), Number(1))
            if second.num_positions:
                more = (key("stage2.num_positions") / step).rounded("⌈⌉", math.ceil)
            more = self._add("steps of Stage II", key("stage2.num_steps") if second.num_steps else more)
            self._add(TRAINED[names.STAGE2], more * step, "positions")

    def _compute(self) -> None:
        """FLOP of the trainings, and the features' bytes."""
        teacher = self._add("text LLM", Number(self.shape.num_llm, self.config.model.teacher), "parameters")
        active = teacher
        if self.shape.num_active < self.shape.num_llm:  # a mixture of experts
            active = self._add(
                "active in a position", Number(self.shape.num_active, "# (experts chosen)"), "parameters"
            )
        adapter = self._add("adapter", Number(self.shape.num_adapter, "model.adapter"), "parameters")
        student = 6 * (active + adapter)
        self._add("FLOP of a position", student + 2 * active * self.teacher_share)
        if names.TEXT in self.config.trained_sets:
            self._add("FLOP of a position of text", student + 2 * active)
        for stage in dict.fromkeys(self.trainings):
            self._add(FLOP[stage], self[TRAINED[stage]] * self._flop_of_position(stage))
        self._add("FLOP in all", total(self[FLOP[stage]] for stage in self.trainings))
        self._add(names.FEATURES, self["natural speech"] * self.bytes_per_hour, "bytes")

    def _flop_of_position(self, stage: str) -> Number:
        """On average over a training's positions of speech and of text alone."""
        line, flop = self.lines.get(TEXT_SHARES[stage]), self["FLOP of a position"]
        if line is None or not line.value:
            return flop
        return (1 - self[line.name]) * flop + self[line.name] * self["FLOP of a position of text"]

    def secs_of_position(self, stage: str) -> Number:
        """Of a training worker."""
        stage = stage if stage in FLOP else names.STAGE1
        peak = self.rates["cpu_flops"]
        if self.config.distill.use_gpu:
            peak = self.rates["mfu"] * PEAK_FLOPS[self.rates.cluster.gpu]
        return self[FLOP[stage]] / self[TRAINED[stage]] / peak


@functools.cache
def world_words(sample: int = 200) -> Number:
    """Words of a document of the embedded world, on average."""
    words = (len(passage.text.split()) for passage in world_passages(sample, DOMAINS, 0, names.WEB))
    return Number(mean(words), "# words")
