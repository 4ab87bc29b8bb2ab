"""The data engine on real Ray, a shrunken quickstart: embed, cluster, probe, select, synthesise, Stage II."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from factories import run_stage, table_of

from salad_ray.config import Config
from salad_ray.configfile import dump_config
from salad_ray.distill.budget import decay_start, stage2_row_shares
from salad_ray.model.speech_lm import SpeechLM, weights_fingerprint
from salad_ray.selection.draw import priorities
from salad_ray.tables import Cluster, Membership, Passage, Selected, Utterance


def rows_of(config: Config, set_name: str, name: str, row_type: type) -> list:
    table = table_of(config, set_name, name)
    return [row for shard in table.shards() for row in table.read_rows(row_type, shard)]


def manifest_of(config: Config, set_name: str, name: str) -> dict:
    manifest = table_of(config, set_name, name).manifest()
    assert manifest is not None
    return manifest


def ids(rows: list) -> set[str]:
    return {row.passage_id for row in rows}


def copy_of(config: Config, folder: Path) -> Config:
    shutil.copytree(config.run_dir, folder / "run", symlinks=True)
    return config.model_copy(update={"run_dir": str(folder / "run")})


def test_every_web_passage_has_a_cluster_and_clusters_are_balanced(finished_run: Config) -> None:
    passages, members = (
        rows_of(finished_run, "web", "passages", Passage),
        rows_of(finished_run, "web", "clusters", Membership),
    )
    assert ids(passages) == ids(members)
    sizes = Counter(row.cluster_id for row in members)
    clusters = rows_of(finished_run, "web", "centroids", Cluster)
    assert [row.cluster_id for row in clusters] == list(range(finished_run.cluster.num_clusters))
    assert {row.cluster_id: row.num_passages for row in clusters} == dict(sizes)
    assert sum(row.web_share for row in clusters) == pytest.approx(1)
    assert max(sizes.values()) <= 1.1 * len(members) / len(clusters)
    assert [row.priority for row in members] == priorities(
        [row.passage_id for row in members], finished_run.seed
    ).tolist()


def test_the_clusters_have_cards_and_are_purer_than_chance(finished_run: Config) -> None:
    cards = json.loads(Path(table_of(finished_run, "web", "centroids").url, "cards.json").read_text())["clusters"]
    assert len(cards) == finished_run.cluster.num_clusters
    assert all(card["terms"] and len(card["closest"]) == 3 for card in cards)
    manifest = manifest_of(finished_run, "web", "centroids")
    assert manifest["purity"] > 0.9 > 0.5 > manifest["chance_purity"]


def test_the_probe_is_the_lowest_priorities_of_each_cluster_and_is_never_selected(finished_run: Config) -> None:
    members = rows_of(finished_run, "web", "clusters", Membership)
    number = finished_run.probe.passages_per_cluster
    expected = set()
    for cluster in range(finished_run.cluster.num_clusters):
        own = sorted((row.priority, row.passage_id) for row in members if row.cluster_id == cluster)
        expected |= {passage_id for _, passage_id in own[:number]}
    probe = rows_of(finished_run, "probe", "passages", Passage)
    assert ids(probe) == expected
    assert {row.split for row in probe} == {"test"}
    assert not expected & ids(rows_of(finished_run, "active", "passages", Passage))


def test_the_selection_follows_the_target_within_the_budget(finished_run: Config) -> None:
    manifest = manifest_of(finished_run, "active", "selection")
    natural = manifest_of(finished_run, "natural", "features")["totals"]["training_hours"]
    assert manifest["budget_hours"] == pytest.approx(natural / 4)
    assert manifest["hours"] <= manifest["budget_hours"]
    chosen = rows_of(finished_run, "active", "selection", Selected)
    assert [row.rank for row in chosen] == list(range(len(chosen)))
    assert sum(row.duration_secs for row in chosen) / 3600 == pytest.approx(manifest["hours"])
    clusters = manifest["by_cluster"]
    weights = np.array([row["web_share"] * row["distillation"] ** finished_run.select.gamma for row in clusters])
    assert np.allclose([row["target_share"] for row in clusters], weights / weights.sum())
    longest = max(row.duration_secs for row in chosen)
    for row in clusters:
        expected = row["target_share"] * manifest["budget_hours"] * 3600
        assert abs(row["hours_selected"] * 3600 - expected) <= 1.5 * longest
    assert 1 <= manifest["effective_sample_size"] <= manifest["num_web_passages"]


def test_what_was_selected_is_spoken_by_training_voices_with_cluster_and_words(finished_run: Config) -> None:
    chosen = {row.passage_id: row.cluster_id for row in rows_of(finished_run, "active", "selection", Selected)}
    spoken = rows_of(finished_run, "active", "utterances", Utterance)
    assert {row.passage_id: row.cluster_id for row in spoken} == chosen
    voices = {f"espeak:{voice}" for voice in finished_run.synthesize.voices}
    assert {row.speaker for row in spoken} <= voices
    assert all([word.text for word in row.words] == row.text.split() for row in spoken)
    assert {row.split for row in spoken} == {"train"}
    assert not Path(table_of(finished_run, "active", "utterances").url, "pieces").exists()


@pytest.mark.slow
def test_a_larger_budget_contains_the_smaller_one_and_changes_nothing_before_it(
    finished_run: Config, tmp_path: Path
) -> None:
    config = copy_of(finished_run, tmp_path)
    before = ids(rows_of(config, "active", "selection", Selected))
    larger = config.model_copy(update={"select": config.select.model_copy(update={"budget_percent": 60.0})})
    kept = table_of(config, "active", "selection")
    run_stage(larger, "select", "active")
    assert kept.manifest() is not None
    after = ids(rows_of(larger, "active", "selection", Selected))
    assert before < after
    assert table_of(larger, "active", "utterances").manifest() is None


def test_stage2_begins_before_the_decay_of_stage1_and_ends_elsewhere_than_its_control(finished_run: Config) -> None:
    trunk = decay_start(finished_run.distill.num_steps, finished_run.distill.decay_share)
    models = {}
    for name in ("stage2", "control"):
        manifest = manifest_of(finished_run, "", name)
        assert f"/checkpoints/step-{trunk:08d}-" in manifest["begun_from"]
        [start] = manifest["starts"]
        assert start["begun_from"] == manifest["begun_from"]
        assert manifest["step"] == finished_run.stage2.num_steps
        assert manifest["log"][0]["learning_rate"] > 0
        models[name] = weights_fingerprint(SpeechLM.from_pretrained(f"{finished_run.run_dir}/{name}/model"))
    models["stage1"] = weights_fingerprint(SpeechLM.from_pretrained(f"{finished_run.run_dir}/stage1/model"))
    assert len(set(models.values())) == 3
    plans = {name: table_of(finished_run, name, "plan") for name in ("natural", "active", "text")}
    shares = stage2_row_shares(finished_run, plans)
    assert shares.keys() == plans.keys()
    assert all(0 < share < 1 for share in shares.values())


def test_all_four_systems_are_measured_on_the_same_passages(finished_run: Config) -> None:
    metrics = json.loads(Path(finished_run.run_dir, "report/metrics.json").read_text())
    scored = {name: metrics[name]["num_scored"] for name in ("untrained", "stage1", "stage2", "control")}
    assert len(set(scored.values())) == 1
    selection = metrics["selection"]
    assert selection["gamma"] == finished_run.select.gamma
    assert len(selection["by_cluster"]) == finished_run.cluster.num_clusters
    assert {"cluster_id", "web_share", "distillation", "target_share", "num_selected"} <= selection["by_cluster"][
        0
    ].keys()
    assert 0 <= selection["unheard_auc"] <= 1


def sign(piece: Path) -> str:
    """Make the one utterance of a piece another one than synthesis would write; returns its id."""
    table, footer = pq.read_table(piece), pq.read_metadata(piece).metadata
    place = table.schema.get_field_index("speaker")
    signed = table.set_column(place, "speaker", pa.array(["signed"]))
    pq.write_table(signed.replace_schema_metadata({name: footer[name] for name in (b"num_input", b"rejects")}), piece)
    [utt_id] = table["utt_id"].to_pylist()
    return str(utt_id)


@pytest.mark.slow
def test_a_killed_synthesis_continues_with_each_passage_once(finished_run: Config, tmp_path: Path) -> None:
    """The driver dies in the middle of a shard; its finished pieces are not spoken again."""
    config = copy_of(finished_run, tmp_path)
    settings = config.synthesize.model_copy(update={"batch_size": 1})
    config = config.model_copy(update={"synthesize": settings, "ray": config.ray.model_copy(update={"max_actors": 1})})
    table_of(config, "natural", "utterances").delete()
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    command = [sys.executable, "-m", "salad_ray.cli", "synthesize", str(path), "set=natural"]
    pieces = Path(table_of(config, "natural", "utterances").url, "pieces")
    driver = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(pieces.glob("*.parquet"))) < 3 and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert table_of(config, "natural", "utterances").manifest() is None
    there = [sign(file) for file in pieces.glob("*.parquet")]
    assert there
    run_stage(config, "synthesize", "natural")
    spoken = rows_of(config, "natural", "utterances", Utterance)
    original = rows_of(finished_run, "natural", "utterances", Utterance)
    assert sorted(row.utt_id for row in spoken if row.speaker == "signed") == sorted(there)
    speakers = {row.utt_id: row.speaker for row in original}
    assert [replace(row, speaker=speakers[row.utt_id]) for row in spoken] == original
    assert not pieces.exists()
