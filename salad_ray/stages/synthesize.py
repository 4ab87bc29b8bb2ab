"""`synthesize`: passages → utterances, spoken with word times."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from salad_ray.config import Config, identity
from salad_ray.speech.audio import encode_audio
from salad_ray.stages.common import ShardPart, Stage, finished, keep_or_reject, run_shards
from salad_ray.synthesis.espeak import EspeakSynthesizer
from salad_ray.tables import Passage, Table, Utterance, stable_hash, to_arrow

EVALUATION_SETS = ("heldout", "benchmark")


def run(config: Config) -> None:
    """Write `<set>/utterances` from `<set>/passages`."""
    passages = Table(config.run_dir, config.set, "passages")
    manifest = finished(passages, "ingest")
    stage = Stage(
        "synthesize",
        Table(config.run_dir, config.set, "utterances"),
        identity(config, "synthesize", "seed"),
        {"passages": manifest["fingerprint"]},
    )
    run_shards(config, stage, {name: name for name in manifest["shards"]}, partial(SpeakShard, config))


class SpeakShard:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.synthesizer = EspeakSynthesizer()
        self.passages = Table(config.run_dir, config.set, "passages")

    def __call__(self, shard: str) -> Iterator[ShardPart]:
        rows: list[Passage] = self.passages.read_rows(Passage, shard)
        kept, rejects = keep_or_reject("synthesize", rows, lambda row: row.passage_id, self._speak, self.config.strict)
        yield ShardPart(to_arrow(Utterance, kept), len(rows), len(kept), rejects)

    def _speak(self, passage: Passage) -> Utterance:
        settings = self.config.synthesize
        voices = settings.evaluation_voices if self.config.set in EVALUATION_SETS else settings.voices
        voice = voices[stable_hash(self.config.seed, "voice", passage.passage_id) % len(voices)]
        [speech] = self.synthesizer.synthesize([passage.text], [voice], self.config.seed)
        return Utterance(
            utt_id=passage.passage_id,
            passage_id=passage.passage_id,
            recording_id=passage.passage_id,
            corpus=self.config.set,
            text=passage.text,
            words=speech.words,
            speaker=f"{settings.synthesizer}:{voice}",
            license=passage.license,
            domain=passage.domain,
            split=passage.split,
            duration_secs=len(speech.audio) / speech.sampling_rate,
            audio=encode_audio(speech.audio, speech.sampling_rate, settings.audio_format),
        )
