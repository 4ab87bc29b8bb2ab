"""`evaluate`: what every system answers to the items of the benchmarks, read as text and heard as speech."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from salad_ray.config import Config
from salad_ray.distill.step import DTYPES
from salad_ray.evaluation.benchmarks import choose_exemplars, exemplar_of
from salad_ray.evaluation.scoring import Query, batches, predict, score, speech_query, text_query
from salad_ray.flow import Step
from salad_ray.model.loading import load_tokenizer
from salad_ray.model.speech_lm import SpeechLM, load_text_lm
from salad_ray.runs import Run
from salad_ray.sequences.batch import frames_of
from salad_ray.speech.audio import load_utterance
from salad_ray.speech.augment import distort
from salad_ray.speech.recognise import load_recogniser, word_error_rate
from salad_ray.stages.common import Ahead, Stage, Work, condition_of, teacher_of
from salad_ray.stages.shards import ShardPart, StageError, keep_or_reject
from salad_ray.tables import Features, Item, Score, Table, Utterance, local_folder, stable_hash, to_arrow

CASCADE = "cascade"
SPOKEN_RATE = 16000
"""At which recognisers listen, in Hz."""

Asked = tuple[Item, str, Query, dict[str, Any]]
"""An item, the condition under which it is heard, what the model is asked, and what else is known of it."""


def sources(config: Config, step: Step) -> dict[str, Any]:
    """The cascade's recogniser, loaded here too, so that a wrong path ends in one sentence."""
    if step.tables != (f"scores_{CASCADE}",):
        return {}
    return {name: str(fact) for name, fact in _recogniser(config, "cpu").facts.items()}


def work(run: Run, step: Step, ahead: Ahead) -> Work:
    """`benchmark/scores_<system>`: the base LLM reads, the cascade reads transcripts, others read and listen."""
    stage = Stage.of(run, step, ahead=ahead)
    system = step.tables[0].removeprefix("scores_")
    tables = {table.name: table for table in map(run.labelled, step.reads)}
    shards = {table.name: list(stage.inputs[table.label].get("shards", ())) for table in tables.values()}
    items = {} if system == CASCADE else {f"text-{shard}": ["text", shard] for shard in shards["items"]}
    items |= {f"speech-{shard}": ["speech", shard] for shard in shards.get("features", ())}
    items |= {f"speech-{shard}": [CASCADE, shard] for shard in shards.get("utterances", ())}
    model = f"{tables[system].url}/model" if system in tables else None
    worker = partial(AskShard, run.config, system, teacher_of(run), tables, model)
    return Work(stage, items, worker, run.config.evaluate.num_gpus)


def _recogniser(config: Config, device: str) -> Any:
    settings = config.evaluate
    assert settings.cascade != "none"
    return load_recogniser(settings.cascade, settings.recogniser, settings.recogniser_revision, device)


class AskShard:
    """A system and all items; scores the items of one shard of texts, features or utterances."""

    def __init__(
        self, config: Config, system: str, teacher: dict[str, Any], tables: dict[str, Table], model: str | None
    ) -> None:
        self.config, self.system, self.tables = config, system, tables
        device, dtype = "cuda" if config.evaluate.num_gpus else "cpu", DTYPES[config.distill.precision]
        with local_folder(model or teacher["path"]) as path:
            if model is None:
                self.model: Any = load_text_lm(path, teacher["revision"], dtype).to(device)
                self.tokenizer = load_tokenizer(path, teacher["revision"])
            else:
                self.model = SpeechLM.from_pretrained(path, dtype).to(device)
                self.tokenizer = self.model.tokenizer
        reach = getattr(
            getattr(self.model, "llm", self.model).config.get_text_config(), "max_position_embeddings", None
        )
        self.context = min(config.pack.context, reach or config.pack.context)
        self.recogniser = _recogniser(config, device) if system == CASCADE else None
        self.items = {row.item_id: row for row in _all_items(tables["items"])}
        self.pools: dict[str, list[Item]] = {}
        others = _all_items(tables["exemplars"]) if "exemplars" in tables else []
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
            items = self.tables["items"].read_rows(Item, shard)
            return items, lambda row: row.item_id, self._ask_text
        if kind == "speech":
            features = self.tables["features"].read_rows(Features, shard)
            return features, lambda row: row.utt_id, self._ask_speech
        utterances = self.tables["utterances"].read_rows(Utterance, shard)
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
            speech_query(
                self.tokenizer, self._exemplars(item), item, frames, self.context, self.model.config.adapter.stride
            ),
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


def _all_items(table: Table) -> list[Item]:
    return [row for shard in table.shards() for row in table.read_rows(Item, shard)]
