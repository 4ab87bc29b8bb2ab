"""`encode`: utterances → features of the frozen speech encoder, one shard for each shard of utterances."""

from __future__ import annotations

from functools import partial

import numpy as np

from salad_ray.config import Config, identity
from salad_ray.model.encoder import encode_in_batches, load_encoder
from salad_ray.speech.audio import load_audio
from salad_ray.stages.common import ShardResult, Stage, finished, keep_or_reject, run_shards
from salad_ray.tables import BadInput, Features, Table, Utterance, to_arrow


def run(config: Config) -> None:
    """Write `<set>/features` from `<set>/aligned`, or `<set>/utterances` where the words are known or not wanted."""
    recorded = config.set == "natural" and config.ingest.natural == "folder"
    aligned = recorded and config.align.aligner != "none"
    utterances = Table(config.run_dir, config.set, "aligned" if aligned else "utterances")
    manifest = finished(utterances, "align" if aligned else "ingest" if recorded else "synthesize")
    stage = Stage(
        "encode",
        Table(config.run_dir, config.set, "features"),
        identity(config, "encode"),
        {utterances.name: manifest["fingerprint"]},
    )
    encoder = load_encoder(config.encode, "cpu")  # here too, so that a wrong path ends in one sentence
    spec = {name: getattr(encoder, name) for name in ("name", "sampling_rate", "frame_rate", "dim")}
    spec |= {"path": config.encode.path, "revision": config.encode.revision}
    items = {name: name for name in manifest["shards"]}
    worker = partial(EncodeShard, config, utterances)
    run_shards(config, stage, items, worker, config.encode.num_gpus, encoder=spec)


class EncodeShard:
    def __init__(self, config: Config, utterances: Table) -> None:
        self.config = config
        self.utterances = utterances
        self.encoder = load_encoder(config.encode, "cuda" if config.encode.num_gpus else "cpu")

    def __call__(self, shard: str) -> ShardResult:
        rows: list[Utterance] = self.utterances.read_rows(Utterance, shard)
        strict = self.config.strict
        heard, rejects = keep_or_reject("encode", rows, lambda row: row.utt_id, self._load, strict)
        features = encode_in_batches(self.encoder, [audio for _, audio in heard], self.config.encode.batch_secs)
        encoded = [(row, frames) for (row, _), frames in zip(heard, features, strict=True)]
        kept, unusable = keep_or_reject("encode", encoded, lambda pair: pair[0].utt_id, self._to_row, strict)
        return ShardResult(to_arrow(Features, kept), len(rows), len(kept), rejects + unusable)

    def _load(self, row: Utterance) -> tuple[Utterance, np.ndarray]:
        source = row.audio or row.uri
        return row, load_audio(source, row.offset_secs, row.duration_secs, self.encoder.sampling_rate)[0]

    def _to_row(self, pair: tuple[Utterance, np.ndarray]) -> Features:
        row, frames = pair
        features = frames.astype(np.float16)
        if not len(features) or not np.isfinite(features).all():
            raise BadInput("the encoder gave no frames, or values that are not finite in float16")
        return Features(
            utt_id=row.utt_id,
            recording_id=row.recording_id,
            offset_secs=row.offset_secs,
            duration_secs=row.duration_secs,
            domain=row.domain,
            split=row.split,
            text=row.text,
            words=row.words,
            num_frames=len(features),
            frame_rate=self.encoder.frame_rate,
            dim=self.encoder.dim,
            features=features.tobytes(),
        )
