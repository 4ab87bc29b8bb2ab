"""`evaluate`: what every system answers to the items of the benchmarks, read as text and heard as speech."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from salad_ray.config import Config, identity
from salad_ray.console import say
from salad_ray.distill.step import DTYPES
from salad_ray.evaluation.benchmarks import choose_exemplars, exemplar_of
from salad_ray.evaluation.scoring import Query, batches, predict, score, speech_query, text_query
from salad_ray.model.speech_lm import SpeechLM, load_text_lm, load_tokenizer
from salad_ray.sequences.batch import frames_of
from salad_ray.speech.audio import load_utterance
from salad_ray.speech.augment import distort
from salad_ray.speech.recognise import load_recogniser, word_error_rate
from salad_ray.stages.common import Stage, Work, condition_of, finished, run_together
from salad_ray.stages.shards import ShardPart, StageError, keep_or_reject
from salad_ray.tables import Features, Item, Score, Table, Utterance, local_folder, stable_hash, to_arrow

SPOKEN_RATE = 16000
"""At which recognisers listen, in Hz."""

Asked = tuple[Item, str, Query, dict[str, Any]]
"""An item, the condition under which it is heard, what the model is asked, and what else is known of it."""


def run(config: Config) -> None:
    """Write `benchmark/scores_<system>`: the base LLM reads, the cascade reads transcripts, others read and listen."""
    if not config.has_benchmark:
        say("evaluate: no benchmarks; name some in evaluate.benchmarks")
        return
    run_together(config, [_work(config, system) for system in systems_of(config)], config.evaluate.num_gpus)


def systems_of(config: Config) -> list[str]:
    """The systems that there are by now."""
    trained = [name for name in ("stage1", "stage2", "control") if Table(config.run_dir, "", name).manifest()]
    return ["base", *trained, *(["cascade"] if config.evaluate.cascade != "none" else [])]


def _work(config: Config, system: str) -> Work:
    """Asking one system."""
    teacher = finished(Table(config.run_dir, "", "teacher"), "teacher")
    items = finished(Table(config.run_dir, "benchmark", "items"), "ingest")
    inputs, keys = {"items": items["version"], "teacher": teacher["version"]}, ["evaluate.num_shots"]
    if config.evaluate.has_pool:
        inputs["exemplars"] = finished(Table(config.run_dir, "benchmark", "exemplars"), "ingest")["version"]
    work = {} if system == "cascade" else {f"text-{shard}": ["text", shard] for shard in items["shards"]}
    if system == "cascade":
        spoken = finished(Table(config.run_dir, "benchmark", "utterances"), "synthesize")
        recogniser = _recogniser(config, "cpu")  # here too, so that a wrong path ends in one sentence
        inputs |= {"utterances": spoken["version"]} | {name: str(fact) for name, fact in recogniser.facts.items()}
        keys += ["evaluate.conditions", "evaluate.cascade"]
        work |= {f"speech-{shard}": ["cascade", shard] for shard in spoken["shards"]}
    elif system != "base":
        features = finished(Table(config.run_dir, "benchmark", "features"), "encode")
        model = finished(Table(config.run_dir, "", system), system)
        inputs |= {"features": features["version"], "model": model["version"]}
        work |= {f"speech-{shard}": ["speech", shard] for shard in features["shards"]}
    stage = Stage(
        "evaluate",
        Table(config.run_dir, "benchmark", f"scores_{system}"),
        identity(config, *keys, "distill.precision", "pack.context", "seed"),
        inputs,
    )
    return Work(stage, work, partial(AskShard, config, system, teacher))


def _recogniser(config: Config, device: str) -> Any:
    settings = config.evaluate
    assert settings.cascade != "none"
    return load_recogniser(settings.cascade, settings.recogniser, settings.recogniser_revision, device)


class AskShard:
    """A system and all items; scores the items of one shard of texts, features or utterances."""

    def __init__(self, config: Config, system: str, teacher: dict[str, Any]) -> None:
        self.config, self.system = config, system
        device, dtype = "cuda" if config.evaluate.num_gpus else "cpu", DTYPES[config.distill.precision]
        is_text = system in ("base", "cascade")
        with local_folder(teacher["path"] if is_text else f"{Table(config.run_dir, '', system).url}/model") as path:
            if is_text:
                self.model: Any = load_text_lm(path, teacher["revision"], dtype).to(device)
                self.tokenizer = load_tokenizer(path, teacher["revision"])
            else:
                self.model = SpeechLM.from_pretrained(path, dtype).to(device)
                self.tokenizer = self.model.tokenizer
        reach = getattr(
            getattr(self.model, "llm", self.model).config.get_text_config(), "max_position_embeddings", None
        )
        self.context = min(config.pack.context, reach or config.pack.context)
        self.recogniser = _recogniser(config, device) if system == "cascade" else None
        self.items = {row.item_id: row for row in _all_items(config, "items")}
        self.pools: dict[str, list[Item]] = {}
        others = _all_items(config, "exemplars") if config.evaluate.has_pool else []
        named = {row.benchmark for row in others}
        for row in others + [row for row in self.items.values() if row.benchmark not in named]:
            self.pools.setdefault(row.benchmark, []).append(row)

    def __call__(self, payload: tuple[str, str]) -> Iterator[ShardPart]:
        kind, shard = payload
        rows, key, ask = self._rows(kind, shard)
        strict = self.config.strict
        asked, rejects = keep_or_reject("evaluate", rows, key, ask, strict)
        scored: list[tuple[Asked, list[float]]] = []
        for batch in batches([query for _, _, query, _ in asked], self.config.evaluate.batch_positions):
            values = score(self.model, [asked[index][2] for index in batch])
            scored += [(asked[index], own) for index, own in zip(batch, values, strict=True)]
        modality = "text" if kind == "text" else "speech"
        kept, unusable = keep_or_reject(
            "evaluate", scored, lambda pair: pair[0][0].item_id, partial(self._score, modality), strict
        )
        kept.sort(key=lambda row: (row.item_id, row.condition))
        yield ShardPart(to_arrow(Score, kept), len(rows), len(kept), rejects + unusable)

    def _rows(self, kind: str, shard: str) -> tuple[Sequence[Any], Any, Any]:
        """A shard's rows, how they are called, and how each is asked."""
        if kind == "text":
            items = Table(self.config.run_dir, "benchmark", "items").read_rows(Item, shard)
            return items, lambda row: row.item_id, self._ask_text
        if kind == "speech":
            features = Table(self.config.run_dir, "benchmark", "features").read_rows(Features, shard)
            return features, lambda row: row.utt_id, self._ask_speech
        utterances = Table(self.config.run_dir, "benchmark", "utterances").read_rows(Utterance, shard)
        heard = [(row, condition) for row in utterances for condition in self._conditions(row)]
        return heard, lambda pair: f"{pair[0].utt_id}@{pair[1]}", self._ask_cascade

    def _conditions(self, row: Utterance) -> Sequence[str]:
        own = condition_of(row.utt_id)[1]
        return [own] if own != "clean" else [name for name in self.config.evaluate.conditions if name != "voice"]

    def _exemplars(self, item: Item) -> list[str]:
        chosen = choose_exemplars(self.pools[item.benchmark], item, self.config.evaluate.num_shots, self.config.seed)
        return [exemplar_of(row) for row in chosen]

    def _ask_text(self, item: Item) -> Asked:
        query = text_query(self.tokenizer, self._exemplars(item), item, self.context)
        return item, "clean", query, {}

    def _ask_speech(self, row: Features) -> Asked:
        item, condition = self._item(row.utt_id)
        frames = frames_of(row)
        return (
            item,
            condition,
            speech_query(self.tokenizer, self._exemplars(item), item, frames, self.context),
            {},
        )

    def _ask_cascade(self, pair: tuple[Utterance, str]) -> Asked:
        """The recogniser listens, and its transcript stands where the item's own words would."""
        row, condition = pair
        item, _ = self._item(row.utt_id)
        audio = load_utterance(row, SPOKEN_RATE)
        if condition not in ("clean", "voice"):
            rng = np.random.default_rng(stable_hash(self.config.seed, f"{row.utt_id}@{condition}"))
            audio = distort(audio, SPOKEN_RATE, condition, rng)
        assert self.recogniser is not None
        heard = self.recogniser.transcribe(audio, SPOKEN_RATE)
        # What was not heard at all is asked too, without words: a cascade must not gain by being deaf.
        asked = replace(item, spoken=heard.strip())
        query = text_query(self.tokenizer, self._exemplars(item), asked, self.context)
        return item, condition, query, {"heard": heard, "word_error_rate": word_error_rate(item.spoken, heard)}

    def _item(self, utt_id: str) -> tuple[Item, str]:
        name, condition = condition_of(utt_id)
        if name not in self.items:
            raise StageError(f"evaluate: {utt_id} is of no item of benchmark/items; run `salad ingest` with --redo")
        return self.items[name], condition

    def _score(self, modality: str, pair: tuple[Asked, list[float]]) -> Score:
        (item, condition, query, facts), values = pair
        prediction, prediction_norm = predict(values, item.choices)
        return Score(
            system=self.system,
            benchmark=item.benchmark,
            item_id=item.item_id,
            modality=modality,
            condition=condition,
            domain=item.domain,
            log_likelihoods=values,
            answer=item.answer,
            prediction=prediction,
            prediction_norm=prediction_norm,
            num_shots=query.num_shots,
            **facts,
        )


def _all_items(config: Config, name: str) -> list[Item]:
    table = Table(config.run_dir, "benchmark", name)
    return [row for shard in table.shards() for row in table.read_rows(Item, shard)]
