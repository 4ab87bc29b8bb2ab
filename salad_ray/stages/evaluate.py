"""`evaluate`: what every system answers to the items of the benchmarks, read as text and heard as speech."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from salad_ray.config import Config
from salad_ray.distill.step import DTYPES
from salad_ray.evaluation.benchmarks import choices_alone, choose_exemplars, exemplar_of, swap_partners
from salad_ray.evaluation.scoring import Heard, Query, batches, predict, score, speech_query, text_query
from salad_ray.flow import Step
from salad_ray.model.encoder import Encoder, load_encoder
from salad_ray.model.loading import load_tokenizer
from salad_ray.model.speech_lm import SpeechLM, load_text_lm
from salad_ray.names import CASCADE, EVALUATE, EXEMPLARS, FEATURES, ITEMS, UTTERANCES
from salad_ray.runs import Run
from salad_ray.sequences.batch import frames_of
from salad_ray.speech.audio import load_utterance
from salad_ray.speech.augment import distort
from salad_ray.speech.recognise import load_recogniser, word_error_rate
from salad_ray.stages.common import Ahead, Stage, Work, condition_of, teacher_of
from salad_ray.stages.shards import ShardPart, StageError, keep_or_reject
from salad_ray.tables import Features, Item, Score, Table, Utterance, local_folder, stable_hash, to_arrow

SPOKEN_RATE = 16000
"""At which recognisers listen, in Hz."""
MAX_KEPT = 64
"""Recordings that the cascade keeps decoded, a megabyte each; one is heard under several conditions in a row."""
HEARD_FLOORS = ("silence", "swapped")

Asked = tuple[Item, str, Query, dict[str, Any]]
"""An item, the condition under which it is heard, what the model is asked, and what else is known of it."""


def sources(config: Config, step: Step) -> dict[str, Any]:
    """The cascade's recogniser, loaded here too, so that a wrong path ends in one sentence."""
    if step.system != CASCADE:
        return {}
    return {name: str(fact) for name, fact in _recogniser(config, "cpu").facts.items()}


def work(run: Run, step: Step, ahead: Ahead) -> Work:
    """`benchmark/scores_<system>`: the base LLM reads, the cascade reads transcripts, others read and listen."""
    stage = Stage.of(run, step, ahead=ahead)
    tables = {table.name: table for table in map(run.labelled, step.reads)}
    shards = {table.name: list(stage.inputs[table.label].get("shards", ())) for table in tables.values()}
    items = {} if step.system == CASCADE else {f"text-{shard}": ["text", shard] for shard in shards[ITEMS]}
    items |= {f"speech-{shard}": ["speech", shard] for shard in shards.get(FEATURES, ())}
    items |= {f"speech-{shard}": [CASCADE, shard] for shard in shards.get(UTTERANCES, ())}
    model = f"{tables[step.system].url}/model" if step.system in tables else None
    weights = stage.inputs[tables[FEATURES].label]["sources"]["weights"] if FEATURES in tables else ""
    worker = partial(AskShard, run.config, step.system, teacher_of(run), tables, model, weights)
    return Work(stage, items, worker, run.config.evaluate.num_gpus)


def _recogniser(config: Config, device: str) -> Any:
    settings = config.evaluate
    assert settings.cascade != "none"
    return load_recogniser(settings.cascade, settings.recogniser, settings.recogniser_revision, device)


class AskShard:
    """A system and all items; scores the items of one shard of texts, features or utterances."""

    def __init__(
        self,
        config: Config,
        system: str,
        teacher: dict[str, Any],
        tables: dict[str, Table],
        model: str | None,
        weights: str,
    ) -> None:
        self.config, self.system, self.tables, self.weights = config, system, tables, weights
        device, dtype = "cuda" if config.evaluate.num_gpus else "cpu", DTYPES[config.distill.precision]
        with local_folder(model or teacher["path"]) as path:
            if model is None:
                llm = load_text_lm(path, teacher["revision"], dtype, context=config.pack.context)
                self.model: Any = llm.to(device)
                self.tokenizer = load_tokenizer(path, teacher["revision"])
            else:
                self.model = SpeechLM.from_pretrained(path, dtype).to(device)
                self.tokenizer = self.model.tokenizer
        reach = getattr(
            getattr(self.model, "llm", self.model).config.get_text_config(), "max_position_embeddings", None
        )
        self.context = min(config.pack.context, reach or config.pack.context)
        self.recogniser = _recogniser(config, device) if system == CASCADE else None
        self.items = {row.item_id: row for row in _all_items(tables[ITEMS])}
        self.pools: dict[str, list[Item]] = {}
        others = _all_items(tables[EXEMPLARS]) if EXEMPLARS in tables else []
        named = {row.benchmark for row in others}
        for row in others + [row for row in self.items.values() if row.benchmark not in named]:
            self.pools.setdefault(row.benchmark, []).append(row)

    def __call__(self, payload: tuple[str, str]) -> Iterator[ShardPart]:
        kind, shard = payload
        rows, ask = self._rows(kind, shard)
        strict = self.config.strict
        asked, rejects = keep_or_reject(EVALUATE, rows, _key, ask, strict)
        scored: list[tuple[Asked, list[float]]] = []
        for batch in batches([query for _, _, query, _ in asked], self.config.evaluate.batch_positions):
            values = score(self.model, [asked[index][2] for index in batch])
            scored += [(asked[index], own) for index, own in zip(batch, values, strict=True)]
        modality = "text" if kind == "text" else "speech"
        kept, unusable = keep_or_reject(
            EVALUATE, scored, lambda pair: pair[0][0].item_id, partial(self._score, modality), strict
        )
        kept.sort(key=lambda row: (row.item_id, row.condition))
        yield ShardPart(to_arrow(Score, kept), len(rows), len(kept), rejects + unusable)

    def _rows(self, kind: str, shard: str) -> tuple[list[tuple[Any, str]], Callable[[tuple[Any, str]], Asked]]:
        """A shard's rows with the conditions under which each is asked, and how it is asked."""
        if kind == "text":
            items = self.tables[ITEMS].read_rows(Item, shard)
            conditions = ["clean", *(name for name in self.config.evaluate.floors if name == "choices")]
            return [(item, condition) for item in items for condition in conditions], self._ask_text
        if kind == "speech":
            features = self.tables[FEATURES].read_rows(Features, shard)
            self._prepare_floors(features, [row.num_frames for row in features])
            rows = [(row, condition) for row in features for condition in self._conditions(row, ("clean",))]
            silence = self._silence(max((row.num_frames for row in features), default=0))
            spoken = self._heard_exemplars(features) if self.config.evaluate.exemplars == "spoken" else None
            return rows, partial(self._ask_speech, silence, spoken)
        utterances = self.tables[UTTERANCES].read_rows(Utterance, shard)
        self._prepare_floors(utterances, [row.duration_secs for row in utterances])
        conditions = [name for name in self.config.evaluate.conditions if name != "voice"]
        return [(row, name) for row in utterances for name in self._conditions(row, conditions)], self._ask_cascade

    def _conditions(self, row: Features | Utterance, of_clean: Sequence[str]) -> list[str]:
        """Those under which this speech is heard: its own, or those of clean speech and its floors."""
        own = condition_of(row.utt_id)[1]
        floors = [name for name in self.config.evaluate.floors if name in HEARD_FLOORS]
        if row.utt_id not in self.swapped:
            floors = [name for name in floors if name != "swapped"]
        return [*of_clean, *floors] if own == "clean" else [own]

    def _prepare_floors(self, rows: Sequence[Any], lengths: Sequence[float]) -> None:
        """Whose speech each clean row of the shard hears when it is swapped; an item alone of its kind in the shard is
        not swapped. Nothing is remembered of the cascade's shard before."""
        clean = [place for place, row in enumerate(rows) if condition_of(row.utt_id)[1] == "clean"]
        items = [self._item(rows[place].utt_id)[0] for place in clean]
        partners = swap_partners(items, [lengths[place] for place in clean])
        self.swapped: dict[str, Any] = {
            rows[place].utt_id: rows[clean[other]]
            for place, other in zip(clean, partners, strict=True)
            if other is not None
        }
        self.audio: dict[str, NDArray[np.floating]] = {}
        self.heard: dict[str, str] = {}

    def _silence(self, num_frames: int) -> NDArray[np.floating]:
        """(num_frames, C): what the encoder makes of silence. It is causal, so shorter silence is the beginning of it;
        of a shard the longest is encoded anew, so that no shard depends on those before."""
        if "silence" not in self.config.evaluate.floors:
            return np.empty((0, 0), np.float32)
        samples = round(num_frames * self.encoder.sampling_rate / self.encoder.frame_rate)
        [frames] = self.encoder.encode([np.zeros(samples, np.float32)])
        return frames

    @cached_property
    def shard_of(self) -> dict[str, str]:
        """Where the speech of each item is."""
        table = self.tables[FEATURES]
        ids = {shard: table.read(shard, ["utt_id"])["utt_id"].to_pylist() for shard in table.shards()}
        return {name: shard for shard, own in ids.items() for name in own}

    @cached_property
    def encoder(self) -> Encoder:
        encoder = load_encoder(self.config.encode, "cuda" if self.config.evaluate.num_gpus else "cpu")
        if encoder.weights != self.weights:
            raise StageError(f"evaluate: {self.config.encode.path} holds other weights than what encoded the items")
        return encoder

    def _chosen(self, item: Item) -> list[Item]:
        return choose_exemplars(self.pools[item.benchmark], item, self.config.evaluate.num_shots, self.config.seed)

    def _exemplars(self, item: Item) -> list[str]:
        return [exemplar_of(row) for row in self._chosen(item)]

    def _heard_exemplars(self, rows: Sequence[Features]) -> dict[str, list[Heard]]:
        """Of each item of a shard its exemplars with their speech, from whichever shards that is in; an exemplar whose
        speech was rejected is left out."""
        chosen = {item.item_id: self._chosen(item) for item in (self._item(row.utt_id)[0] for row in rows)}
        wanted = {exemplar.item_id for exemplars in chosen.values() for exemplar in exemplars}
        by_shard: dict[str, list[str]] = {}
        for name in sorted(wanted & self.shard_of.keys()):
            by_shard.setdefault(self.shard_of[name], []).append(name)
        table = self.tables[FEATURES]
        found = (row for place in by_shard.items() for row in table.read_where(Features, place[0], "utt_id", place[1]))
        frames = {row.utt_id: frames_of(row) for row in found}
        return {
            name: [(exemplar, frames[exemplar.item_id]) for exemplar in exemplars if exemplar.item_id in frames]
            for name, exemplars in chosen.items()
        }

    def _ask_text(self, pair: tuple[Item, str]) -> Asked:
        item, condition = pair
        if condition == "choices":
            return item, condition, text_query(self.tokenizer, [], choices_alone(item), self.context), {}
        return item, condition, text_query(self.tokenizer, self._exemplars(item), item, self.context), {}

    def _ask_speech(
        self, silence: NDArray[np.floating], spoken: dict[str, list[Heard]] | None, pair: tuple[Features, str]
    ) -> Asked:
        row, condition = pair
        item, _ = self._item(row.utt_id)
        frames = frames_of(self.swapped[row.utt_id] if condition == "swapped" else row)
        if condition == "silence":
            frames = silence[: len(frames)]
        stride = self.model.config.adapter.stride
        exemplars = self._exemplars(item) if spoken is None else spoken[item.item_id]
        query = speech_query(self.tokenizer, exemplars, item, frames, self.context, stride)
        return item, condition, query, {}

    def _ask_cascade(self, pair: tuple[Utterance, str]) -> Asked:
        """The recogniser listens, and its transcript stands where the item's own words would."""
        row, condition = pair
        item, _ = self._item(row.utt_id)
        if condition == "swapped":
            heard = self._transcribe(self.swapped[row.utt_id], "clean")
        else:
            heard = self._transcribe(row, condition)
        # What was not heard at all is asked too, without words: a cascade must not gain by being deaf.
        asked = replace(item, spoken=heard.strip())
        query = text_query(self.tokenizer, self._exemplars(item), asked, self.context)
        return item, condition, query, {"heard": heard, "word_error_rate": word_error_rate(item.spoken, heard)}

    def _transcribe(self, row: Utterance, condition: str) -> str:
        """What the recogniser hears; clean speech of the shard once, though it is heard in the place of others too. A
        recording is decoded once for all conditions, and once more if it was heard in another's place long before."""
        name = f"{row.utt_id}@{condition}"
        if name not in self.heard:
            if row.utt_id not in self.audio:
                while len(self.audio) >= MAX_KEPT:
                    self.audio.pop(next(iter(self.audio)))
                self.audio[row.utt_id] = load_utterance(row, SPOKEN_RATE)
            audio = self.audio[row.utt_id]
            if condition == "silence":
                audio = np.zeros_like(audio)
            elif condition not in ("clean", "voice"):
                audio = distort(
                    audio, SPOKEN_RATE, condition, np.random.default_rng(stable_hash(self.config.seed, name))
                )
            assert self.recogniser is not None
            self.heard[name] = self.recogniser.transcribe(audio, SPOKEN_RATE)
        return self.heard[name]

    def _item(self, utt_id: str) -> tuple[Item, str]:
        name, condition = condition_of(utt_id)
        if name not in self.items:
            raise StageError(f"evaluate: {self.tables[ITEMS].label} has no item of {utt_id}; run `salad ingest --redo`")
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


def _key(pair: tuple[Any, str]) -> str:
    """An item or its speech as rejects call it, with the condition under which it is asked."""
    row, condition = pair
    name = getattr(row, "item_id", None) or row.utt_id
    return name if condition == "clean" or name.endswith(f"@{condition}") else f"{name}@{condition}"


def _all_items(table: Table) -> list[Item]:
    return [row for shard in table.shards() for row in table.read_rows(Item, shard)]
