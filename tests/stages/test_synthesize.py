"""`synthesize` on real Ray: Kokoro's path with random weights, gates, and what a killed actor costs."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from factories import a_table, rejects_of, run_stage, small_world_config, table_of
from kokoro_weights import write_random_kokoro

from salad_ray import pipeline
from salad_ray.config import Config, ConfigError
from salad_ray.configfile import parse_config
from salad_ray.speech.audio import encode_audio
from salad_ray.stages.shards import StageError
from salad_ray.stages.synthesize import SpeakShard, load_synthesizer
from salad_ray.tables import BadInput, Passage, Utterance, to_arrow

VOICES = ("af_one", "am_two", "bf_three")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kokoro")
    write_random_kokoro(folder, small=True, voices=VOICES)
    return folder


def spoken_config(folder: Path, num_natural: int = 12, **synthesize: Any) -> Config:
    """A few documents of the world, in two shards."""
    config = small_world_config(folder)
    config["world"] |= {"num_natural": num_natural}
    config["ingest"] = {"num_shards": 2}
    return parse_config(config | {"synthesize": synthesize})


def rows_of(config: Config, name: str, row_type: type) -> list[Any]:
    table = table_of(config, "natural", name)
    return [row for shard in table.shards() for row in table.read_rows(row_type, shard)]


@pytest.mark.slow
def test_kokoro_speaks_through_the_stage_with_words_and_disjoint_voices(weights: Path, tmp_path: Path) -> None:
    gates = {"min_chars_per_sec": 0.5, "max_chars_per_sec": 100.0, "min_level_dbfs": -120.0, "max_pause_secs": 60.0}
    voices = {"voices": list(VOICES[:2]), "evaluation_voices": [VOICES[2]]}
    config = spoken_config(tmp_path, 6, synthesizer="kokoro", path=str(weights), batch_size=3, gates=gates, **voices)
    for stage in ("ingest", "synthesize"):
        run_stage(config, stage, "natural")
    spoken, passages = rows_of(config, "utterances", Utterance), rows_of(config, "passages", Passage)
    rejects = rejects_of(config, "natural", "utterances")
    assert {row.passage_id for row in spoken} | {row.key for row in rejects} == {row.passage_id for row in passages}
    assert len(spoken) > len(passages) / 2, rejects
    assert {row.speaker for row in spoken} <= {f"kokoro:{voice}" for voice in VOICES[:2]}
    for row in spoken:
        assert [word.text for word in row.words] == row.text.split()
        assert 0 <= row.words[0].start_secs < row.words[-1].end_secs <= row.duration_secs + 1e-6


@pytest.mark.slow
def test_a_voice_that_is_not_there_is_one_sentence(weights: Path, tmp_path: Path) -> None:
    config = spoken_config(
        tmp_path, synthesizer="kokoro", path=str(weights), voices=["af_none"], evaluation_voices=["af_one"]
    )
    run_stage(config, "ingest", "natural")
    with pytest.raises(ConfigError, match="af_none"):
        run_stage(config, "synthesize", "natural")
    config = spoken_config(tmp_path, voices=["en-nowhere"])
    with pytest.raises(ConfigError, match="en-nowhere"):
        run_stage(config, "synthesize", "natural")


def test_what_a_gate_rejects_is_told_and_too_much_of_it_stops_the_stage(tmp_path: Path) -> None:
    config = spoken_config(tmp_path, gates={"max_chars_per_sec": 8.0})
    run_stage(config, "ingest", "natural")
    with pytest.raises(StageError, match=r"12 of 12 rows were rejected.*characters in .* s are .* a second, above 8"):
        run_stage(config, "synthesize", "natural")


def test_another_batch_size_finds_other_pieces(tmp_path: Path) -> None:
    """Pieces are reused where they hold the same passages, and only there."""
    config = spoken_config(tmp_path, 24, batch_size=8)
    run_stage(config, "ingest", "natural")
    weights = load_synthesizer(config, config.synthesize.voices, "cpu").weights
    passages, utterances = (pipeline.resolve(config).table("natural", name) for name in ("passages", "utterances"))
    expected = [row.passage_id for row in passages.read_rows(Passage, "part-00000")]
    assert len(expected) == 12
    next(SpeakShard(config, "natural", passages, utterances, weights)("part-00000"))
    for size in (4, 8, 5):
        settings = config.synthesize.model_copy(update={"batch_size": size})
        changed = config.model_copy(update={"synthesize": settings})
        parts = list(SpeakShard(changed, "natural", passages, utterances, weights)("part-00000"))
        assert [row for part in parts for row in part.rows["utt_id"].to_pylist()] == expected


@pytest.mark.slow
def test_a_killed_process_is_replaced_and_each_passage_is_there_once(tmp_path: Path) -> None:
    config = spoken_config(tmp_path, 96, batch_size=1)
    config = config.model_copy(update={"ray": config.ray.model_copy(update={"max_actors": 1})})
    run_stage(config, "ingest", "natural")
    pieces = Path(pipeline.resolve(config).table("natural", "utterances").url, "pieces")
    killed: list[int] = []

    def kill_once() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            if len(list(pieces.glob("*.parquet"))) >= 5:
                for process in psutil.Process().children(recursive=True):
                    if "write_shards" in " ".join(process.cmdline()):
                        killed.append(process.pid)
                        os.kill(process.pid, signal.SIGKILL)
                        break
            time.sleep(0.01)

    thread = threading.Thread(target=kill_once)
    thread.start()
    run_stage(config, "synthesize", "natural")
    thread.join()
    assert killed
    spoken, passages = rows_of(config, "utterances", Utterance), rows_of(config, "passages", Passage)
    assert sorted(row.passage_id for row in spoken) == sorted(row.passage_id for row in passages)
    manifest = table_of(config, "natural", "utterances").manifest()
    assert manifest is not None
    assert manifest["num_kept"] == len(passages) == 96
    assert not pieces.exists()


def test_a_benchmarks_own_recording_can_be_heard(tmp_path: Path) -> None:
    config = spoken_config(tmp_path, gates={"max_duration_secs": 2.0})
    tables = [a_table(tmp_path, "benchmark", name) for name in ("passages", "utterances")]
    worker = SpeakShard(config, "benchmark", *tables, load_synthesizer(config, config.synthesize.voices, "cpu").weights)
    for secs in (1, 3):
        audio = 0.1 * np.sin(np.arange(secs * 16_000) / 20)
        (tmp_path / f"{secs}.flac").write_bytes(encode_audio(audio, 16_000, "FLAC"))
    row = Passage(passage_id="p", doc_id="d", text="A question.", uri=str(tmp_path / "1.flac"))
    assert worker._recording(row).duration_secs == 1
    with pytest.raises(BadInput, match=r"too long: 3\.0 s, above max_duration_secs=2"):
        worker._recording(replace(row, uri=str(tmp_path / "3.flac")))
    (tmp_path / "silent.flac").write_bytes(encode_audio(np.zeros(16_000), 16_000, "FLAC"))
    with pytest.raises(BadInput, match="silent"):
        worker._recording(replace(row, uri=str(tmp_path / "silent.flac")))


def test_signs_that_are_not_said_are_counted(tmp_path: Path) -> None:
    config = spoken_config(tmp_path)
    passages, utterances = (a_table(tmp_path, "natural", name) for name in ("passages", "utterances"))
    texts = ["The boy 😀 went [sighs] home to see his 「dog」 again.", "The girl went home to see her cat."]
    rows = to_arrow(Passage, [Passage(passage_id=text, doc_id="d", text=text) for text in texts])
    with passages.writer("part-00000", rows.schema) as write:
        write(rows)
    weights = load_synthesizer(config, config.synthesize.voices, "cpu").weights
    parts = list(SpeakShard(config, "natural", passages, utterances, weights)("part-00000"))
    assert sum(part.num_kept for part in parts) == 2
    assert sum(part.totals.get("num_unsaid_signs", 0) for part in parts) == 3
    assert sum(part.totals.get("num_unsaid_asides", 0) for part in parts) == 1
