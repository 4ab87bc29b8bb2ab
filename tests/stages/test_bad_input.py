"""Bad recordings and transcripts: each ends in `rejects` with its reason, the job goes on, the counts add up."""

from __future__ import annotations

import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from factories import a_table, rejects_of, run_stage, small_world_config, table_of

from salad_ray import pipeline
from salad_ray.config import Config, ConfigError
from salad_ray.configfile import parse_config
from salad_ray.stages.ingest import CheckShard
from salad_ray.stages.shards import StageError
from salad_ray.tables import Utterance, to_arrow

RATE = 16000
GOOD = "she said so"


def tone(secs: float, level: float = 0.1) -> np.ndarray:
    return level * np.sin(np.arange(int(secs * RATE)) * 0.05) * np.random.default_rng(0).random(int(secs * RATE))


def make_corpus(folder: Path) -> dict[str, str]:
    """Write recordings and their table; returns what each row's reject reason must contain ("" for a good one)."""
    (folder / "audio").mkdir(parents=True)
    rows: list[tuple[str, str, str]] = []
    expected: dict[str, str] = {}

    def add(name: str, audio: np.ndarray | bytes, text: str = GOOD, reason: str = "", subtype: str = "PCM_16") -> None:
        path = folder / "audio" / f"{name}.wav"
        if isinstance(audio, bytes):
            path.write_bytes(audio)
        else:
            soundfile.write(path, audio, RATE, subtype=subtype)
        rows.append((name, f"audio/{name}.wav", text))
        expected[f"corpus/{name}"] = reason

    for i in range(12):
        add(f"good{i}", tone(1.5))
    whole = (folder / "audio" / "good0.wav").read_bytes()
    add("truncated", whole[: len(whole) // 2], reason="truncated")
    add("empty", b"", reason="")
    expected["corpus/empty"] = "empty"
    add("silent", np.zeros(RATE * 2), reason="silent")
    add("clipped", np.clip(tone(1.5) * 1000, -1, 1), reason="clip")
    add("coarse", tone(1.5), reason="8-bit", subtype="PCM_U8")
    add("nan", np.full(RATE * 2, np.nan), reason="finite", subtype="FLOAT")
    add("text", b"this is not audio at all", reason="audio")
    add("wordless", tone(1.5), text="", reason="empty")
    add("script", tone(1.5), text="это другой алфавит", reason="script")
    add("talkative", tone(1.5), text=GOOD * 40, reason="characters")
    rows.append(("good0", "audio/good0.wav", GOOD))
    rows.append(("gone", "audio/gone.wav", GOOD))
    expected["corpus/gone"] = "no such audio file"
    lines = ["utt_id\taudio\ttext", *("\t".join(row) for row in rows)]
    (folder / "transcripts.tsv").write_text("\n".join(lines) + "\n")
    return expected


def config_for(tmp_path: Path, **overrides: object) -> Config:
    data = small_world_config(tmp_path) | {"stage2": None}  # without web text there is nothing to select
    data["ingest"] |= {"corpora": [str(tmp_path / "corpus")]} | overrides
    data["pack"] |= {"text_share": 0}
    return parse_config(data)


def test_every_bad_row_is_rejected_with_its_reason_and_counted(tmp_path: Path) -> None:
    expected = make_corpus(tmp_path / "corpus")
    config = config_for(tmp_path)
    run_stage(config, "ingest", "natural")
    kept = _read(config, "utterances", Utterance)
    rejects = rejects_of(config, "natural", "catalog", "utterances")
    assert {row.utt_id for row in kept} == {key for key, reason in expected.items() if not reason}
    reasons = {reject.key: reject.reason.lower() for reject in rejects}
    for key, reason in expected.items():
        assert not reason or reason in reasons[key], (key, reasons.get(key))
    duplicates = [reject for reject in rejects if "duplicate" in reject.reason.lower() or "already" in reject.reason]
    assert len(duplicates) == 1
    catalog, checked = (table_of(config, "natural", name).manifest() or {} for name in ("catalog", "utterances"))
    assert catalog["num_input"] == len(expected) + 1 == catalog["num_kept"] + catalog["num_rejected"]
    assert catalog["num_kept"] == checked["num_input"] == checked["num_kept"] + checked["num_rejected"]
    assert catalog["num_rejected"] + checked["num_rejected"] == len(rejects)


@pytest.mark.slow
def test_strict_stops_at_the_first_with_the_same_words(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus")
    config = config_for(tmp_path).model_copy(update={"strict": True})
    with pytest.raises(StageError, match=r"ingest: corpus/\w+: "):
        run_stage(config, "ingest", "natural")
    assert table_of(config, "natural", "utterances").manifest() is None


@pytest.mark.slow
def test_a_stage_that_rejects_too_much_stops_with_the_first_reason(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus")
    config = config_for(tmp_path, max_rejected_share=0.1)
    with pytest.raises(StageError, match=r"rejected, first corpus/.*max_rejected_share"):
        run_stage(config, "ingest", "natural")


@pytest.mark.slow
def test_an_edited_table_is_another_one(tmp_path: Path) -> None:
    make_corpus(tmp_path / "corpus")
    run_stage(config_for(tmp_path), "ingest", "natural")
    table = tmp_path / "corpus" / "transcripts.tsv"
    table.write_text(table.read_text().replace("audio/gone.wav", "audio/good1.wav"))
    run_stage(config_for(tmp_path), "ingest", "natural")
    assert "corpus/gone" in {row.utt_id for row in _read(config_for(tmp_path), "utterances", Utterance)}
    with pytest.raises(ConfigError, match="the stage 'ingest' works on benchmark, web, natural, not on set=heldout"):
        pipeline.make(config_for(tmp_path), "ingest", "heldout")


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "transcripts.tsv"), ("utt_id\ttext\na\tb\n", "audio"), ("", "transcripts.tsv")],
)
def test_a_wrong_folder_or_column_is_one_clear_sentence(tmp_path: Path, content: str | None, words: str) -> None:
    (tmp_path / "corpus").mkdir()
    if content is not None:
        (tmp_path / "corpus" / "transcripts.tsv").write_text(content)
    with pytest.raises(ConfigError, match=words) as error:
        run_stage(config_for(tmp_path), "ingest", "natural")
    assert "\n" not in str(error.value)


def test_a_stage_without_its_input_says_which_stage_to_run(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "transcripts.tsv").write_text("utt_id\taudio\ttext\n")
    for stage, first in (("align", "ingest"), ("encode", "align"), ("pack", "teacher"), ("stage1", "trunk")):
        with pytest.raises(StageError, match=f"run `salad {first} CONFIG"):
            run_stage(config_for(tmp_path), stage, "natural")


@pytest.mark.parametrize("path", ["corpus", "corpus/cuts.jsonl.gz", "corpus/cuts*.jsonl"])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_machine_without_the_corpus_rejects_none_of_it(tmp_path: Path, path: str, is_there: bool) -> None:
    """Whether it lacks the folder, or has the empty one where nothing is mounted."""
    corpus = tmp_path / "corpus"
    (corpus / "audio").mkdir(parents=True)
    (corpus / "audio" / "a.wav").write_bytes(b"no audio")
    config = config_for(tmp_path, corpora=[{"path": str(tmp_path / path), "name": "c"}])
    row = Utterance(utt_id="c/u", text=GOOD, duration_secs=0.0, recording_id="c/u", corpus="c")
    names = ("audio/a.wav", "audio/b.wav", "../b.wav")
    rows = [replace(row, utt_id=f"c/{name}", uri=f"{corpus}/{name}") for name in names]
    catalog = a_table(tmp_path, "natural", "catalog")
    catalog.write("part-00000", to_arrow(Utterance, rows))
    [part] = CheckShard(config, catalog)("part-00000")
    assert [re.split(" of a kind|:", reject.reason)[0] for reject in part.rejects] == [
        "not audio",
        *["no such audio file"] * 2,
    ]
    shutil.rmtree(corpus)
    if is_there:
        corpus.mkdir()
    with pytest.raises(
        StageError, match=rf"machine {socket.gethostname()} has nothing in {corpus}, where corpus c lies"
    ):
        list(CheckShard(config, catalog)("part-00000"))


def _read(config: Config, name: str, row_type: type) -> list:
    table = table_of(config, "natural", name)
    return [row for shard in table.shards() for row in table.read_rows(row_type, shard)]
