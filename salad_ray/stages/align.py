"""`align`: recorded utterances → the same utterances with word times."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from salad_ray.config import Config, identity
from salad_ray.speech.align import SAMPLING_RATE, PocketsphinxAligner
from salad_ray.speech.audio import load_audio
from salad_ray.stages.common import ShardResult, Stage, StageError, finished, keep_or_reject, run_shards
from salad_ray.tables import Table, Utterance, to_arrow


def run(config: Config) -> None:
    """Write `<set>/aligned` from `<set>/utterances`."""
    if config.align.aligner == "none":
        raise StageError("align: align.aligner=none, so there is nothing to align; set align.aligner=pocketsphinx")
    utterances = Table(config.run_dir, config.set, "utterances")
    manifest = finished(utterances, "ingest")
    stage = Stage(
        "align",
        Table(config.run_dir, config.set, "aligned"),
        identity(config, "align"),
        {"utterances": manifest["fingerprint"]},
    )
    run_shards(config, stage, {name: name for name in manifest["shards"]}, partial(AlignShard, config))


class AlignShard:
    def __init__(self, config: Config) -> None:
        self.config = config
        self.aligner = PocketsphinxAligner()
        self.utterances = Table(config.run_dir, config.set, "utterances")

    def __call__(self, shard: str) -> ShardResult:
        rows: list[Utterance] = self.utterances.read_rows(Utterance, shard)
        kept, rejects = keep_or_reject("align", rows, lambda row: row.utt_id, self._align, self.config.strict)
        return ShardResult(to_arrow(Utterance, kept), len(rows), len(kept), rejects)

    def _align(self, row: Utterance) -> Utterance:
        audio, _ = load_audio(row.audio or row.uri, row.offset_secs, row.duration_secs, SAMPLING_RATE)
        return replace(row, words=self.aligner.align(audio, row.text))
