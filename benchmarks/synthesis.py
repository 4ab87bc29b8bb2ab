"""eSpeak NG through the stage (Ray Data, one actor) beside a bare loop over the same passages.

    python -m benchmarks.synthesis

The embedded world's documents, spoken by training voices. The bare loop reads a shard, speaks, encodes FLAC and writes
a Parquet file, in a process of its own without Ray, and neither checks the speech nor keeps pieces for a resume. One
thread each, taking turns. "steady": from the first shard written to the last; "whole": with the start of Ray and of the
actor, which a real run pays once.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

from benchmarks.encoding import Timing, audio_secs, steady_rate, write_times
from benchmarks.side_by_side import PAIRS, ROOT, in_subprocess, one_thread_each, ratio_row, take_turns
from salad_ray.config import Config
from salad_ray.configfile import load_config
from salad_ray.speech.audio import encode_audio
from salad_ray.synthesis.espeak import EspeakSynthesizer
from salad_ray.tables import Passage, Utterance, stable_hash, to_arrow
from tests.factories import redo, run_stage, table_of

NUM_DOCUMENTS = 3000
NUM_SHARDS = 8
BARE = "bare_utterances"


def run(pairs: int = PAIRS, num_documents: int = NUM_DOCUMENTS) -> list[dict[str, Any]]:
    """Two rows: steady and whole."""
    with tempfile.TemporaryDirectory(prefix="salad-bench-") as folder, one_thread_each():
        overrides = (f"run_dir={folder}/run", f"world.num_natural={num_documents}", f"ingest.num_shards={NUM_SHARDS}")
        config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
        config = config.model_copy(update={"ray": config.ray.model_copy(update={"max_actors": 1})})
        run_stage(config, "ingest", "natural")
        turns = take_turns(lambda _: ours(config), lambda _: bare(config), pairs)
        require_equal(config)
        audio = audio_secs(config)
    steady = [[steady_rate(timing, audio) for timing in side] for side in zip(*turns, strict=True)]
    whole = [[sum(audio.values()) / timing.secs for timing in side] for side in zip(*turns, strict=True)]
    unit = "audio-s/s per core"
    return [ratio_row("eSpeak NG, steady", unit, *steady), ratio_row("eSpeak NG, whole", unit, *whole)]


def ours(config: Config) -> Timing:
    """The stage, anew."""
    redo(config, "synthesize", "natural")
    run_stage(config, "synthesize", "natural")
    table = table_of(config, "natural", "utterances")
    return Timing((table.manifest() or {})["seconds"], write_times(table))


def bare(config: Config) -> Timing:
    return Timing(**in_subprocess("benchmarks.synthesis", config.run_dir))


def bare_loop(config: Config) -> Timing:
    """What one would write without Ray."""
    started = time.monotonic()
    synthesizer = EspeakSynthesizer()
    source, target = (table_of(config, "natural", name) for name in ("passages", BARE))
    written = {}
    for shard in source.shards():
        rows = [spoken(config, synthesizer, row) for row in source.read_rows(Passage, shard)]
        target.write(shard, to_arrow(Utterance, rows))
        written[shard] = time.time()
    return Timing(time.monotonic() - started, written)


def spoken(config: Config, synthesizer: EspeakSynthesizer, passage: Passage) -> Utterance:
    voices = config.synthesize.voices
    voice = voices[stable_hash(config.seed, "voice", passage.passage_id) % len(voices)]
    [speech] = synthesizer.synthesize([passage.text], [voice], config.seed)
    return Utterance(
        utt_id=passage.passage_id,
        recording_id=passage.passage_id,
        corpus="natural",
        text=passage.text,
        words=speech.words,
        duration_secs=speech.duration_secs,
        audio=encode_audio(speech.audio, speech.sampling_rate, config.synthesize.audio_format),
    )


def require_equal(config: Config) -> None:
    """Both must have said the same."""
    left, right = (table_of(config, "natural", name) for name in ("utterances", BARE))
    columns = ["utt_id", "audio", "words"]
    if any(left.read(shard, columns) != right.read(shard, columns) for shard in left.shards()):
        raise RuntimeError("the stage and the bare loop said different things")


def main() -> None:
    if "--bare" in sys.argv:
        timing = bare_loop(load_config(f"{sys.argv[-1]}/config.yaml"))
        print(json.dumps({"secs": timing.secs, "written": timing.written}))
        return
    for row in run():
        print(json.dumps(row))


if __name__ == "__main__":
    main()
