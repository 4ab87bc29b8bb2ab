"""Benchmarks on real Ray: items asked as text and as speech, every condition, the cascade; what is told of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import run_stage, table_of

from salad_ray.config import Config, ConfigError
from salad_ray.configfile import parse_config
from salad_ray.evaluation.scoring import Query
from salad_ray.evaluation.statistics import hearing_margins
from salad_ray.flow import steps_of
from salad_ray.model.encoder import LogMelEncoder
from salad_ray.model.speech_lm import SpeechLM
from salad_ray.pipeline import resolve
from salad_ray.report.export import export
from salad_ray.sequences.batch import frames_of
from salad_ray.stages import evaluate
from salad_ray.stages.common import condition_of, teacher_of
from salad_ray.stages.evaluate import AskShard
from salad_ray.stages.shards import ShardPart, StageError, write_shard
from salad_ray.tables import Features, Item, Reject, Score, Utterance, from_arrow, to_arrow

CONDITIONS = ("clean", "voice", "noise", "speed", "codec", "telephone")


def rows_of(config: Config, name: str, row_type: type) -> list[Any]:
    table = table_of(config, "benchmark", name)
    return [row for shard in table.shards() for row in table.read_rows(row_type, shard)]


def copy_of(run: Config, folder: Path, systems: tuple[str, ...] = ("stage1", "stage2"), **evaluate: Any) -> Config:
    """A copy to change, in which only these systems were trained."""
    shutil.copytree(run.run_dir, folder / "run", symlinks=True)
    changes: dict[str, Any] = {"run_dir": str(folder / "run"), "evaluate": run.evaluate.model_copy(update=evaluate)}
    if "stage2" not in systems:
        changes["stage2"] = None
    elif "control" not in systems:
        changes["stage2"] = run.stage2 and run.stage2.model_copy(update={"control": False})
    return run.model_copy(update=changes)


def test_every_system_answers_every_item(finished_run: Config) -> None:
    items = rows_of(finished_run, "items", Item)
    assert len(items) == finished_run.world.num_questions == 24
    for system in ("base", "stage1", "stage2", "control"):
        scores = rows_of(finished_run, f"scores_{system}", Score)
        ways = {("text", "clean"), ("text", "choices")}
        if system != "base":
            ways |= {("speech", "clean"), ("speech", "silence"), ("speech", "swapped")}
        asked = {(row.item_id, row.modality, row.condition) for row in scores}
        assert asked == {(item.item_id, *way) for item in items for way in ways}
        assert len(scores) == len(asked)
        assert all(len(row.log_likelihoods) == 4 and max(row.log_likelihoods) < 0 for row in scores)


def test_speech_is_in_voices_that_training_never_used(finished_run: Config) -> None:
    speakers = {row.speaker for row in rows_of(finished_run, "utterances", Utterance)}
    assert speakers == {f"espeak:{voice}" for voice in finished_run.synthesize.evaluation_voices}


@pytest.mark.slow
def test_scores_are_the_same_when_repeated_and_go_on_where_they_stood(finished_run: Config, tmp_path: Path) -> None:
    config = copy_of(finished_run, tmp_path)
    folder = Path(table_of(config, "benchmark", "scores_stage1").url)
    before = {path.name: path.read_bytes() for path in folder.glob("*.parquet")}
    kept, lost = sorted(before)[0], sorted(before)[-1]
    (folder / "manifest.json").unlink()
    (folder / lost).unlink()
    time = (folder / kept).stat().st_mtime_ns
    run_stage(config, "evaluate", "benchmark")
    assert {path.name: path.read_bytes() for path in folder.glob("*.parquet")} == before
    assert (folder / kept).stat().st_mtime_ns == time


def test_the_report_tells_accuracies_and_gaps(finished_run: Config) -> None:
    metrics = json.loads(Path(finished_run.run_dir, "report/metrics.json").read_text())
    rows = [row for row in metrics["accuracy"] if row["metric"] == "acc"]
    told = {(row["system"], row["modality"], row["heard"]) for row in rows}
    for system in ("stage1", "stage2", "control"):
        assert {(system, "speech", heard) for heard in (None, True, False)} <= told
    assert all(0 <= row["ci_low"] <= row["accuracy"] <= row["ci_high"] <= 1 for row in rows)
    assert {(row["system"], row["modality"]) for row in metrics["gaps"]} >= {("stage2", "speech"), ("stage2", "text")}
    page = Path(finished_run.run_dir, "report/page.html").read_text()
    assert "Text-speech gap" in page
    assert "data:audio" in page


def shard_asker(config: Config, system: str = "stage1", **changes: Any) -> AskShard:
    """The worker of `evaluate` on the tables of a run, in this process; `changes` are of its own config alone."""
    run = resolve(config)
    step = next(step for step in steps_of(config, "evaluate", "benchmark") if step.tables == (f"scores_{system}",))
    tables = {table.name: table for table in map(run.labelled, step.reads)}
    weights = tables["features"].manifest()["sources"]["weights"]  # type: ignore[index]
    own = config.model_copy(update={"evaluate": config.evaluate.model_copy(update=changes)})
    return AskShard(own, system, teacher_of(run), tables, f"{tables[system].url}/model", weights)


def test_silence_is_as_long_as_the_speech_and_swapped_speech_is_anothers(
    finished_run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model is asked, frame by frame; and what one that hears perfectly would score."""
    features = {row.utt_id: frames_of(row) for row in rows_of(finished_run, "features", Features)}
    items = {row.item_id: row for row in rows_of(finished_run, "items", Item)}
    asker = shard_asker(finished_run)
    longest = max(map(len, features.values()))
    silence = LogMelEncoder().encode([np.zeros(longest * 1280, np.float32)])[0]
    asked: list[Query] = []

    def hear(_: Any, queries: list[Query]) -> list[list[float]]:
        """The answer of the item whose speech this is; the first choice where it is no item's."""
        asked.extend(queries)
        values = []
        for query in queries:
            whose = [name for name, frames in features.items() if np.array_equal(frames, query.frames)]
            right = items[whose[0]].answer if whose else 0
            values.append([0.0 if place == right else -1.0 - place for place in range(len(query.choices))])
        return values

    monkeypatch.setattr(evaluate, "score", hear)
    shards = table_of(finished_run, "benchmark", "features").shards()
    rows = [row for shard in shards for part in asker(("speech", shard)) for row in from_arrow(Score, part.rows)]
    quiet = [query.frames for query in asked if np.array_equal(query.frames, silence[: len(query.frames)])]
    assert sorted(map(len, quiet)) == sorted(map(len, features.values()))
    assert not any(np.array_equal(frames, silence[: len(frames)]) for frames in features.values())
    right = {name: [row.item_id for row in rows if row.condition == name and row.prediction == row.answer]
             for name in ("clean", "silence", "swapped")}  # fmt: skip
    assert len(right["clean"]) == len(items)
    assert len(right["silence"]) == sum(item.answer == 0 for item in items.values())
    assert len(right["swapped"]) <= len(items) / 2  # a quarter is expected
    [whole, *_] = hearing_margins(rows)
    assert not whole["deaf"]
    assert whole["swapped"] == len(right["swapped"]) / len(items)


def test_exemplars_are_heard_from_whichever_shard_they_are_in(
    finished_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = copy_of(finished_run, tmp_path)
    table = table_of(config, "benchmark", "features")
    features = {row.utt_id: frames_of(row) for row in rows_of(config, "features", Features)}
    first, *_ = table.shards()
    rows = table.read(first)
    table.write(first, rows.slice(0, 5))
    table.write("z", rows.slice(5))
    asked: list[Query] = []

    def score(_: Any, queries: list[Query]) -> list[list[float]]:
        asked.extend(queries)
        return [[0.0, -1.0, -2.0, -3.0]] * len(queries)

    monkeypatch.setattr(evaluate, "score", score)
    asker = shard_asker(config, exemplars="spoken", num_shots=2)
    asker.context = 4096  # room for all
    [part] = asker(("speech", first))
    heard = [frames for query in asked for _, frames in query.shots]
    whose = {name for name, own in features.items() if any(np.array_equal(own, frames) for frames in heard)}
    assert len(heard) == 2 * len(asked) == 2 * part.rows.num_rows
    assert all(any(np.array_equal(own, frames) for own in features.values()) for frames in heard)
    assert whose - {row.item_id for row in from_arrow(Score, part.rows)}


def test_floors_are_a_choice(finished_run: Config) -> None:
    """Without them nothing but the items themselves is asked, and no encoder is loaded."""
    asker = shard_asker(finished_run, floors=())
    shard = table_of(finished_run, "benchmark", "features").shards()[0]
    for kind in ("text", "speech"):
        rows = [row for part in asker((kind, shard)) for row in from_arrow(Score, part.rows)]
        assert {row.condition for row in rows} == {"clean"}
    assert "encoder" not in vars(asker)


def test_the_report_says_who_is_deaf(finished_run: Config) -> None:
    """The miniature is trained for seconds: it hears nothing yet, and must not look as if it did."""
    metrics = json.loads(Path(finished_run.run_dir, "report/metrics.json").read_text())
    margins = metrics["hearing_margins"]
    told = {(row["system"], row["benchmark"], row["heard"]) for row in margins}
    assert told == {(name, "world", part) for name in ("stage1", "stage2", "control") for part in (None, True, False)}
    assert len(margins) == len(told)
    assert all(row["deaf"] == (min(row["ci_low"], row["swapped_ci_low"]) <= 0) for row in margins)
    assert all(row["chance"] == 0.25 for row in margins)
    [deaf] = [row for row in margins if row["system"] == "stage1" and row["heard"] is None]
    assert deaf["deaf"]
    page = Path(finished_run.run_dir, "report/page.html").read_text()
    assert "Hearing margin" in page
    assert "Stage I is deaf on world" in page


@pytest.mark.slow
def test_conditions_and_cascade(finished_run: Config, tmp_path: Path) -> None:
    config = copy_of(finished_run, tmp_path, ("stage2",), conditions=CONDITIONS, cascade="pocketsphinx")
    world = config.world.model_copy(update={"num_questions": 2})
    config = config.model_copy(update={"world": world})
    for stage in ("ingest", "synthesize", "encode", "evaluate"):
        run_stage(config, stage, "benchmark")
    utterances = rows_of(config, "utterances", Utterance)
    speakers = {row.utt_id: row.speaker for row in utterances}
    assert len(utterances) == 4
    assert all(speakers[name] != speakers[f"{name}@voice"] for name in speakers if "@" not in name)
    heard = {condition_of(row.utt_id) for row in rows_of(config, "features", Features)}
    names = {item.item_id for item in rows_of(config, "items", Item)}
    assert heard == {(name, condition) for name in names for condition in CONDITIONS}
    lengths = {row.utt_id: row.num_frames for row in rows_of(config, "features", Features)}
    assert all(lengths[f"{name}@speed"] < lengths[name] for name in names)
    stage2 = [row for row in rows_of(config, "scores_stage2", Score) if row.modality == "speech"]
    floors = {(name, floor) for name in names for floor in ("silence", "swapped")}
    assert {(row.item_id, row.condition) for row in stage2} == heard | floors
    cascade = rows_of(config, "scores_cascade", Score)
    assert {(row.item_id, row.condition) for row in cascade} == heard | floors
    transcripts = {(row.item_id, row.condition): row.heard for row in cascade}
    first, second = names
    assert transcripts[first, "swapped"] == transcripts[second, "clean"] != transcripts[first, "clean"]
    assert all(transcripts[name, "silence"] == "" for name in names)
    assert all(row.word_error_rate == 1 for row in cascade if row.heard == "")
    errors = [row.word_error_rate for row in cascade if row.condition == "clean"]
    assert 0 < sum(errors) / len(errors) < 2  # pocketsphinx understands little of eSpeak
    run_stage(config, "report", "natural")
    told = json.loads(Path(config.run_dir, "report/metrics.json").read_text())["robustness"]
    assert {row["condition"] for row in told} == set(CONDITIONS) - {"clean"}


@pytest.mark.slow
def test_an_item_without_speech_is_missed_nowhere(finished_run: Config, tmp_path: Path) -> None:
    """As after a gate of synthesis: the rejects say so, and the gap counts the items that both answered."""
    config = copy_of(finished_run, tmp_path, ("stage1",))
    utterances = table_of(config, "benchmark", "utterances")
    for shard in utterances.shards():
        rows = utterances.read_rows(Utterance, shard)
        lost = [Reject("synthesize", row.utt_id, "it stuttered") for row in rows[::3]]
        kept = [row for row in rows if row.utt_id not in {reject.key for reject in lost}]
        write_shard(utterances, shard, iter([ShardPart(to_arrow(Utterance, kept), len(rows), len(kept), lost)]))
    for name in ("features", "scores_stage1"):
        table_of(config, "benchmark", name).delete()
    for stage in ("encode", "evaluate"):
        run_stage(config, stage, "benchmark")
    spoken = {row.utt_id for row in rows_of(config, "utterances", Utterance)}
    rejected = table_of(config, "benchmark", "utterances").rejects
    rejects = {row.key for shard in rejected.shards() for row in rejected.read_rows(Reject, shard)}
    assert rejects
    assert len(spoken) + len(rejects) == 24
    speech = {row.item_id for row in rows_of(config, "scores_stage1", Score) if row.modality == "speech"}
    assert speech == spoken
    run_stage(config, "report", "natural")
    metrics = json.loads(Path(config.run_dir, "report/metrics.json").read_text())
    [gap] = [
        row for row in metrics["gaps"] if (row["system"], row["modality"], row["metric"]) == ("stage1", "speech", "acc")
    ]
    assert (gap["num_items"], gap["num_unpaired"]) == (len(spoken), len(rejects))


def test_scores_of_another_model_are_not_reported(finished_run: Config, tmp_path: Path) -> None:
    config = copy_of(finished_run, tmp_path)
    manifest = Path(table_of(config, "benchmark", "scores_stage2").url, "manifest.json")
    content = json.loads(manifest.read_text())
    content["inputs"]["stage2"] = "another"
    manifest.write_text(json.dumps(content))
    with pytest.raises(StageError, match="was made from another stage2; run `salad run CONFIG`"):
        run_stage(config, "report", "natural")


def test_real_files_and_broken_ones(tmp_path: Path, shared_data: Path, finished_run: Config) -> None:
    """Original formats through ingest; half a file of rubbish is refused with its name."""
    source = shared_data / "benchmarks"
    asked = [
        {"name": "piqa", "path": str(source / "piqa.jsonl"), "max_items": 5},
        {"name": "mmlu_spoken", "path": str(source / "mmlu.jsonl"), "exemplars": str(source / "mmlu.jsonl")},
    ]
    data = {"run_dir": str(tmp_path / "run"), "evaluate": {"benchmarks": asked}}
    config = parse_config(data)
    run_stage(config, "ingest", "benchmark")
    items = rows_of(config, "items", Item)
    assert [sum(item.benchmark == name for item in items) for name in ("piqa", "mmlu_spoken")] == [5, 513]
    assert len(rows_of(config, "exemplars", Item)) == 500 + 513
    broken = tmp_path / "piqa.jsonl"
    broken.write_text('{"goal": "a", "sol1": "b"}\nnot json\n')
    data["evaluate"] = {"benchmarks": [{"name": "piqa", "path": str(broken)}]}
    with pytest.raises(ConfigError, match=r"piqa\.jsonl"):
        run_stage(parse_config(data | {"run_dir": str(tmp_path / "other")}), "ingest", "benchmark")


def test_the_exported_model_is_the_trained_one(finished_run: Config, tmp_path: Path) -> None:
    place = export(finished_run.run_dir, str(tmp_path / "model"))
    exported = SpeechLM.from_pretrained(place)
    trained = SpeechLM.from_pretrained(f"{finished_run.run_dir}/stage2/model")
    left, right = exported.state_dict(), trained.state_dict()
    assert left.keys() == right.keys()
    assert all(left[name].equal(right[name]) for name in left)
    card = (place / "README.md").read_text()
    assert "world" in card
    lineage = json.loads((place / "lineage.json").read_text())
    assert "natural/features" in json.dumps(lineage)
