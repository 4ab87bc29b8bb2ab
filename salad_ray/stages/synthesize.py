"""`synthesize`: passages → utterances, spoken with word times and checked.

Passages are spoken a batch at a time, and every batch is kept as a piece of its shard as soon as it is there. So a
killed actor, driver or node costs the batch at hand, and each passage is there exactly once, whoever spoke it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from salad_ray.config import Config, ConfigError, QualityConfig
from salad_ray.evaluation.benchmarks import read_recording
from salad_ray.flow import Step
from salad_ray.names import BENCHMARK, HELDOUT, SYNTHESIZE
from salad_ray.runs import Run
from salad_ray.speech.audio import check_duration, check_samples, check_speech, encode_audio, load_audio
from salad_ray.stages.common import Ahead, Stage, Work, condition_of, count_unsaid, hours_by_corpus
from salad_ray.stages.shards import ShardPart, StageError, WindowWorker, keep_or_reject
from salad_ray.synthesis.espeak import EspeakSynthesizer
from salad_ray.synthesis.speech import Speech
from salad_ray.tables import BadInput, Passage, Reject, Table, Utterance, fingerprint, stable_hash, to_arrow

if TYPE_CHECKING:  # they take seconds to import, and eSpeak does without
    from salad_ray.speech.recognise import Recogniser
    from salad_ray.synthesis.kokoro import KokoroSynthesizer

EVALUATION_SETS = (HELDOUT, BENCHMARK)


def sources(config: Config, step: Step) -> dict[str, Any]:
    """The synthesizer, loaded here too with the voices of all sets, so that a wrong path or voice ends in one
    sentence."""
    settings = config.synthesize
    return {"weights": load_synthesizer(config, (*settings.voices, *settings.evaluation_voices), "cpu").weights}


def work(run: Run, step: Step, ahead: Ahead) -> Work:
    """`<set>/utterances` from `<set>/passages`."""
    stage = Stage.of(run, step, ahead=ahead)
    [(label, passages)] = stage.inputs.items()
    worker = partial(
        SpeakShard, run.config, step.set, run.labelled(label), stage.table, run.facts_of(step)["weights"]
    )  # fmt: skip
    items = {name: name for name in passages["shards"]}
    settings, pieces = run.config.synthesize, pieces_of(stage.table)
    facts = {"synthesizer": settings.synthesizer}
    return Work(stage, items, worker, settings.num_gpus, facts=facts, clean_up=pieces.delete)


def load_synthesizer(config: Config, voices: tuple[str, ...], device: str) -> EspeakSynthesizer | KokoroSynthesizer:
    settings = config.synthesize
    if settings.synthesizer == "kokoro":
        from salad_ray.synthesis.kokoro import HUB_ID, KokoroSynthesizer

        return KokoroSynthesizer(settings.path or HUB_ID, voices, device, settings.revision)
    try:
        return EspeakSynthesizer(voices)
    except ValueError as error:
        raise ConfigError(f"synthesize: {error}") from None


def voices_of(config: Config, set_name: str) -> tuple[str, ...]:
    """Training speech and evaluation share no voice, or the gain of Stage II would be confounded with hearing it."""
    settings = config.synthesize
    return settings.evaluation_voices if set_name in EVALUATION_SETS else settings.voices


def pieces_of(utterances: Table) -> Table:
    """What is spoken already of shards that are not finished."""
    return Table(f"{utterances.url}/pieces", utterances.set, "pieces")


class SpeakShard(WindowWorker):
    def __init__(self, config: Config, set_name: str, passages: Table, utterances: Table, weights: str) -> None:
        self.config, self.set, self.passages = config, set_name, passages
        self.pieces = pieces_of(utterances)
        settings = config.synthesize
        device = "cuda" if settings.num_gpus else "cpu"
        self.synthesizer = load_synthesizer(config, voices_of(config, set_name), device)
        if self.synthesizer.weights != weights:
            raise StageError(f"synthesize: {settings.path} holds other weights here than where the run was started")
        self.recogniser = None
        if settings.recogniser is not None:
            from salad_ray.speech.recognise import Recogniser

            self.recogniser = Recogniser(settings.recogniser, settings.recogniser_revision, device)
        self.last = ""

    def __call__(self, shard: str) -> Iterator[ShardPart]:
        if self.last:  # it is whole now
            self.pieces.delete_shards(f"{self.last}-piece-")
        self.last = shard
        there = set(self.pieces.shards())
        rows = self.passages.iterate(Passage, shard)
        spoken_together = self.windows(rows, lambda row: row.passage_id, self.config.synthesize.batch_size)
        for number, window in enumerate(spoken_together):
            # By the passages in it: with another batch_size, the pieces that are there hold others.
            name = f"{shard}-piece-{number:05d}-{fingerprint({'ids': [row.passage_id for row in window]})}"
            if name not in there:
                self._write(name, window)
            yield self._read(name)

    def _write(self, name: str, window: list[Passage]) -> None:
        utterances, rejects = self._speak(window)
        footer = {"num_input": json.dumps(len(window)), "rejects": json.dumps([asdict(row) for row in rejects])}
        table = to_arrow(Utterance, utterances)
        with self.pieces.writer(name, table.schema, footer) as write:
            write(table)

    def _read(self, name: str) -> ShardPart:
        footer = self.pieces.metadata(name).metadata
        rejects = [Reject(**row) for row in json.loads(footer[b"rejects"])]
        utterances: list[Utterance] = self.pieces.read_rows(Utterance, name)
        spoken = (row for row in utterances if row.words is not None)  # recordings may be in any script
        rows, totals = to_arrow(Utterance, utterances), hours_by_corpus(utterances) | count_unsaid(spoken)
        return ShardPart(rows, json.loads(footer[b"num_input"]), len(utterances), rejects, totals)

    def _speak(self, window: list[Passage]) -> tuple[list[Utterance], list[Reject]]:
        strict = self.config.strict
        recorded = [row for row in window if row.uri is not None]
        window = [row for row in window if row.uri is None]
        texts, voices = [row.text for row in window], [self._voice(row) for row in window]
        speeches = self.synthesizer.synthesize_each(texts, voices, self.config.seed)
        spoken = list(zip(window, voices, speeches, strict=True))
        kept, rejects = keep_or_reject(SYNTHESIZE, spoken, lambda row: row[0].passage_id, self._utterance, strict)
        heard, bad = keep_or_reject(SYNTHESIZE, recorded, lambda row: row.passage_id, self._recording, strict)
        return kept + heard, rejects + bad

    def _recording(self, passage: Passage) -> Utterance:
        """A benchmark's own recording of an item; it is copied, since a set of items is small."""
        assert passage.uri is not None
        data = read_recording(passage.uri)
        audio, rate = load_audio(data)
        check_duration(len(audio) / rate, self.config.synthesize.gates)
        check_samples(audio[:, None], QualityConfig(max_clipped_share=1.0), lossy=True)  # loud is no reason to refuse
        return Utterance(
            utt_id=passage.passage_id,
            passage_id=passage.passage_id,
            recording_id=passage.passage_id,
            source=passage.doc_id,
            corpus=passage.source,
            text=passage.text,
            license=passage.license,
            domain=passage.domain,
            split=passage.split,
            duration_secs=len(audio) / rate,
            audio=data,
        )

    def _voice(self, passage: Passage) -> str:
        voices = voices_of(self.config, self.set)
        name, condition = condition_of(passage.passage_id)
        number = stable_hash(self.config.seed, "voice", name) + (condition == "voice")
        return voices[number % len(voices)]

    def _utterance(self, spoken: tuple[Passage, str, Speech | BadInput]) -> Utterance:
        passage, voice, speech = spoken
        if isinstance(speech, BadInput):
            raise speech
        settings = self.config.synthesize
        check_speech(speech.audio, speech.sampling_rate, passage.text, settings.gates)
        if self.recogniser is not None:
            self._check_words(passage.text, speech, self.recogniser)
        return Utterance(
            utt_id=passage.passage_id,
            passage_id=passage.passage_id,
            cluster_id=passage.cluster_id,
            recording_id=passage.passage_id,
            source=passage.doc_id,
            corpus=passage.source or self.set,
            text=passage.text,
            words=speech.words,
            speaker=f"{settings.synthesizer}:{voice}",
            license=passage.license,
            domain=passage.domain,
            split=passage.split,
            duration_secs=speech.duration_secs,
            audio=encode_audio(speech.audio, speech.sampling_rate, settings.audio_format),
        )

    def _check_words(self, text: str, speech: Speech, recogniser: Recogniser) -> None:
        from salad_ray.speech.recognise import word_error_rate

        heard = recogniser.transcribe(speech.audio, speech.sampling_rate)
        errors, limit = word_error_rate(text, heard), self.config.synthesize.max_word_error_rate
        if errors > limit:
            raise BadInput(f"the recogniser heard {errors:.0%} of the words wrong, above {limit:.0%}: '{heard[:80]}'")
