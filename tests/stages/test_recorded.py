"""Recorded corpora through the pipeline: catalog, checks, word times, features; nothing lost, nothing doubled."""

from __future__ import annotations

import json
import shutil
import string
from itertools import pairwise
from pathlib import Path
from typing import Any

import lhotse
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from factories import rejects_of, run_stage, run_stages, small_world_config, table_of
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

from salad_ray import pipeline
from salad_ray.config import AlignConfig, AugmentConfig, Config, ConfigError, WebTextConfig
from salad_ray.configfile import parse_config
from salad_ray.sequences.batch import frames_of
from salad_ray.sequences.interleave import timing_of
from salad_ray.stages import ingest
from salad_ray.stages.align import AlignShard
from salad_ray.stages.encode import EncodeShard
from salad_ray.stages.shards import StageError
from salad_ray.tables import Features, Passage, PlanRow, TableError, Utterance, from_arrow
from salad_ray.text.decontaminate import normalized_words


def corpora_config(folder: Path, shared_data: Path, **sections: Any) -> Config:
    formats = shared_data / "formats"
    data = small_world_config(folder) | {"stage2": None}  # without web text there is nothing to select
    data["ingest"] |= {
        "corpora": [
            {"path": str(formats / "libriheavy"), "name": "libriheavy"},
            {"path": str(formats / "emilia" / "Emilia"), "name": "emilia"},
            {"path": str(formats / "emilia" / "Emilia-YODAS"), "name": "yodas"},
            {"path": str(formats / "emilia" / "raw_layout"), "name": "raw"},
        ],
        "heldout_share": 0.3,
    }
    data["pack"] |= {"text_share": 0}
    for name, section in sections.items():
        data[name] = data.get(name, {}) | section
    return parse_config(data)


def rows_of(config: Config, name: str, row_type: type) -> list[Any]:
    table = table_of(config, "natural", name)
    return [row for shard in table.shards() for row in table.read_rows(row_type, shard)]


def manifest_of(config: Config, name: str) -> dict[str, Any]:
    return table_of(config, "natural", name).manifest() or {}


def reasons_of(config: Config, *names: str) -> dict[str, str]:
    return {row.key: row.reason for row in rejects_of(config, "natural", *names)}


@pytest.fixture(scope="module")
def recorded_run(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """LibriHeavy, Emilia in three layouts: ingested, aligned and encoded. Copy its run_dir before changing it."""
    config = corpora_config(tmp_path_factory.mktemp("recorded"), shared_data)
    run_stages(config, ("ingest", "natural"), ("align", "natural"), ("encode", "natural"))
    return config


def copy_of(run: Config, folder: Path) -> Config:
    shutil.copytree(run.run_dir, folder, symlinks=True)
    return run.model_copy(update={"run_dir": str(folder)})


def test_every_record_is_there_once_with_times_and_features(recorded_run: Config) -> None:
    catalog = rows_of(recorded_run, "catalog", Utterance)
    assert len(catalog) == len({row.utt_id for row in catalog}) == 20 + 21 + 8 + 6
    aligned = rows_of(recorded_run, "aligned", Utterance)
    features = rows_of(recorded_run, "features", Features)
    rejected = reasons_of(recorded_run, "utterances", "aligned")
    assert {row.utt_id for row in aligned} | rejected.keys() == {row.utt_id for row in catalog}
    assert len(aligned) + len(rejected) == len(catalog)
    assert len(aligned) >= 50
    assert {row.utt_id for row in features} == {row.utt_id for row in aligned}
    for row in aligned:
        assert row.words is not None
        assert [word.text for word in row.words] == row.text.split()
        assert row.align_score is not None
    for row in features:
        assert row.num_frames == pytest.approx(row.duration_secs * 12.5, abs=1.5)


def test_a_recording_is_in_one_shard_in_its_order_and_a_source_in_one_split(recorded_run: Config) -> None:
    table = table_of(recorded_run, "natural", "utterances")
    places: dict[str, set[str]] = {}
    for shard in table.shards():
        rows: list[Utterance] = table.read_rows(Utterance, shard)
        for row in rows:
            places.setdefault(row.recording_id, set()).add(shard)
        keys = [(row.recording_id, row.offset_secs, row.order or 0) for row in rows]
        assert keys == sorted(keys)
    assert all(len(shards) == 1 for shards in places.values())
    splits: dict[str, set[str]] = {}
    for row in rows_of(recorded_run, "utterances", Utterance):
        splits.setdefault(row.source, set()).add(row.split)
    assert all(len(split) == 1 for split in splits.values())
    assert {split for own in splits.values() for split in own} == {"train", "test"}


def test_the_manifest_counts_hours_by_corpus_and_licence(recorded_run: Config) -> None:
    found = manifest_of(recorded_run, "utterances")["totals"]["hours_by_corpus"]
    assert [(corpus, *licenses) for corpus, licenses in found.items()] == [
        ("emilia", "CC BY-NC 4.0"),
        ("libriheavy", "public domain"),
        ("raw", "CC BY-NC 4.0"),
        ("yodas", "CC BY 4.0"),
    ]
    hours = sum(row.duration_secs for row in rows_of(recorded_run, "utterances", Utterance)) / 3600
    assert sum(sum(licenses.values()) for licenses in found.values()) == pytest.approx(hours, rel=1e-4)


def test_transcripts_of_heldout_recordings_are_not_trained_on_as_text(recorded_run: Config, tmp_path: Path) -> None:
    catalog = [row for row in rows_of(recorded_run, "catalog", Utterance) if len(row.text.split()) >= 13]
    measured = {run for row in catalog if row.split == "test" for run in runs_of_words(row.text)}
    leaks = [not measured.isdisjoint(runs_of_words(row.text)) for row in catalog]  # raw has what emilia has
    assert 0 < sum(leaks) < len(catalog)
    texts = [
        {"id": str(number), "text": f"As I read it: {row.text} That was all of the page."}
        for number, row in enumerate(catalog)
    ]
    pq.write_table(pa.Table.from_pylist(texts), tmp_path / "text.parquet")
    own = WebTextConfig(path=str(tmp_path / "text.parquet"), name="own")
    run = copy_of(recorded_run, tmp_path / "run")
    text = run.ingest.model_copy(update={"text": (own,), "max_rejected_share": 1.0})
    config = run.model_copy(update={"ingest": text, "pack": run.pack.model_copy(update={"text_share": 0.2})})
    run_stage(config, "ingest", "text")
    rejects = rejects_of(config, "text", "passages")
    found = {row.key.partition("#")[0] for row in rejects if "with a held-out recording" in row.reason}
    leaking = {f"own/{number}" for number, leak in enumerate(leaks) if leak}
    assert found <= leaking
    assert len(found) >= len(leaking) - 2  # where passages begin may divide a run
    table = table_of(config, "text", "passages")
    kept = [row for shard in table.shards() for row in table.read_rows(Passage, shard)]
    assert {row.doc_id for row in kept} >= {f"own/{number}" for number in range(len(catalog))} - leaking
    assert all(measured.isdisjoint(runs_of_words(row.text)) for row in kept)


def runs_of_words(text: str) -> set[str]:
    words = normalized_words(text)
    return {" ".join(words[start : start + 13]) for start in range(len(words) - 12)}


@pytest.mark.slow
def test_the_catalog_is_the_same_whatever_the_order_in_which_it_was_read(recorded_run: Config, tmp_path: Path) -> None:
    backwards = tuple(reversed(recorded_run.ingest.corpora))
    config = recorded_run.model_copy(
        update={
            "run_dir": str(tmp_path / "run"),
            "ingest": recorded_run.ingest.model_copy(update={"corpora": backwards}),
        }
    )
    run_stage(config, "ingest", "natural")
    rows = [row for row in rows_of(config, "utterances", Utterance) if row.corpus != "raw"]  # unpacked elsewhere
    assert rows == [row for row in rows_of(recorded_run, "utterances", Utterance) if row.corpus != "raw"]


@pytest.mark.slow
def test_neighbours_are_joined_into_passages_that_fill_the_context(recorded_run: Config, tmp_path: Path) -> None:
    config = copy_of(recorded_run, tmp_path / "run")
    for stage, name in (("ingest", "web"), ("teacher", "natural"), ("pack", "natural")):
        run_stage(config, stage, name)
    features = {name: table_of(config, "natural", "features").read_rows(Features, name) for name in _shards(config)}
    plan: list[PlanRow] = rows_of(config, "plan", PlanRow)
    joined = [segment for row in plan for segment in row.segments if len(segment.rows) > 1]
    assert joined
    corpora = set()
    for segment in joined:
        clips = [features[segment.shard][index] for index in segment.rows]
        assert len({clip.recording_id for clip in clips}) == 1
        corpora.add(clips[0].utt_id.split("/")[0])
        for left, right in pairwise(clips):
            if left.order is not None:
                assert right.order == left.order + 1
            else:
                assert right.offset_secs > left.offset_secs
    assert "libriheavy" in corpora  # by offsets
    assert corpora & {"emilia", "raw", "yodas"}  # by window numbers


def _shards(config: Config) -> list[str]:
    return table_of(config, "natural", "features").shards()


@pytest.mark.slow
def test_languages_dnsmos_and_speakers_are_switches(shared_data: Path, tmp_path: Path) -> None:
    settings = {"languages": ["de"]}
    config = corpora_config(tmp_path / "de", shared_data, ingest=settings)
    with pytest.raises(StageError, match=r"language 'en' is not among ingest.languages \(de\)"):
        run_stage(config, "ingest", "natural")
    settings = {"quality": {"min_dnsmos": 3.2}, "split_by": "speaker"}
    config = corpora_config(tmp_path / "dnsmos", shared_data, ingest=settings)
    run_stage(config, "ingest", "natural")
    rows = rows_of(config, "utterances", Utterance)
    assert all(row.dnsmos is None or row.dnsmos >= 3.2 for row in rows)
    assert any("below min_dnsmos=3.2" in reason for reason in reasons_of(config, "catalog", "utterances").values())
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(f"{row.corpus}/{row.speaker}", set()).add(row.split)
    assert all(len(own) == 1 for own in splits.values())


def test_two_corpora_of_one_name_are_refused(shared_data: Path, tmp_path: Path) -> None:
    path = str(shared_data / "formats" / "emilia" / "Emilia" / "EN")
    with pytest.raises(ConfigError, match=r"two of them are called 'EN', and ids begin with the name"):
        corpora_config(tmp_path, shared_data, ingest={"corpora": [path, path.replace("Emilia/EN", "Emilia-YODAS/EN")]})


@pytest.mark.slow
def test_utterances_that_are_read_twice_are_there_once(shared_data: Path, tmp_path: Path) -> None:
    """Two archives of a corpus with the same keys: the second finds its ids taken."""
    corpus = tmp_path / "corpus"
    for number in (0, 1):
        (corpus / f"part{number}").mkdir(parents=True)
        shutil.copy(
            shared_data / "formats/emilia/Emilia-YODAS/EN/EN-B000000.tar", corpus / f"part{number}" / "EN-B000000.tar"
        )
    config = corpora_config(tmp_path / "run", shared_data, ingest={"corpora": [str(corpus)]})
    run_stage(config, "ingest", "natural")
    assert len(rows_of(config, "utterances", Utterance)) == 8
    assert (
        list(reasons_of(config, "catalog", "utterances").values()) == ["an utterance of this id was read already"] * 8
    )


@pytest.mark.slow
def test_another_config_makes_another_catalog_beside_the_first(recorded_run: Config, tmp_path: Path) -> None:
    config = copy_of(recorded_run, tmp_path / "run")
    ingest = config.ingest.model_copy(update={"heldout_share": 0.5})
    kept = table_of(config, "natural", "catalog")
    run_stage(config.model_copy(update={"ingest": ingest}), "ingest", "natural")
    other = table_of(config, "natural", "catalog")
    assert other.url != kept.url
    assert kept.manifest() is not None
    assert {row.split for row in rows_of(config, "utterances", Utterance)} == {"train", "test"}


def test_a_run_goes_out_as_a_lhotse_manifest(recorded_run: Config, tmp_path: Path) -> None:
    path = tmp_path / "out" / "cuts.jsonl.gz"
    count = pipeline.export_cuts(recorded_run.run_dir, "natural", str(path))
    cuts = lhotse.CutSet.from_file(path)
    lhotse.validate(cuts)
    rows = rows_of(recorded_run, "aligned", Utterance)
    assert count == len(rows)
    aligned = {row.utt_id: row for row in rows}
    for cut in cuts:
        [supervision] = cut.supervisions
        assert [item.symbol for item in supervision.alignment["word"]] == aligned[cut.id].text.split()
        assert len(cut.load_audio()[0]) == pytest.approx(cut.duration * cut.sampling_rate, abs=200)
    with pytest.raises(ConfigError, match=r"ends in \.jsonl\.gz"):
        pipeline.export_cuts(recorded_run.run_dir, "natural", str(tmp_path / "cuts.json"))
    with pytest.raises(ConfigError, match="is not finished; run `salad ingest"):
        pipeline.export_cuts(recorded_run.run_dir, "web", str(path))


@pytest.mark.slow
def test_a_lost_shard_is_made_again_and_the_others_are_left_alone(recorded_run: Config, tmp_path: Path) -> None:
    config = copy_of(recorded_run, tmp_path / "run")
    table = table_of(config, "natural", "features")
    lost, *others = sorted(Path(table.url).glob("*.parquet"))
    content, times = lost.read_bytes(), [path.stat().st_mtime_ns for path in others]
    lost.unlink()
    with pytest.raises(
        TableError, match=r"is missing; rerun `salad encode CONFIG set=natural`, it makes what is missing"
    ):
        table.read(lost.stem)
    run_stage(config, "encode", "natural")
    assert lost.read_bytes() == content
    assert [path.stat().st_mtime_ns for path in others] == times


def test_faster_speech_keeps_its_place_in_the_recording(recorded_run: Config) -> None:
    """Neighbours are known by offset and duration of their cuts; hours count what is heard."""
    plain = {row.utt_id: row for row in rows_of(recorded_run, "features", Features)}
    augment = AugmentConfig(share=1.0, effects=("speed",), num_effects=(1, 1), speed=(1.25, 1.25))
    config = recorded_run.model_copy(update={"encode": recorded_run.encode.model_copy(update={"augment": augment})})
    table = table_of(config, "natural", "aligned")
    encode = EncodeShard(config, "natural", table, "")
    parts = [part for shard in table.shards() for part in encode(shard)]
    rows: list[Features] = [row for part in parts for row in from_arrow(Features, part.rows)]
    assert any(row.split == "train" for row in rows)
    for row in rows:
        known, speed = plain[row.utt_id], 1.25 if row.split == "train" else 1.0
        assert (row.offset_secs, row.duration_secs) == (known.offset_secs, known.duration_secs)
        assert row.num_frames == pytest.approx(known.num_frames / speed, abs=1.5)
        assert timing_of(row).trailing_secs <= timing_of(known).trailing_secs / speed + 2 / row.frame_rate
    hours = sum(row.num_frames / row.frame_rate for row in rows) / 3600
    assert sum(part.totals["hours"] for part in parts) == pytest.approx(hours, rel=0.02)


def ctc_model(folder: Path, seed: int) -> Path:
    """A small recogniser with random weights."""
    folder.mkdir(exist_ok=True)
    labels = ["<pad>", "<unk>", "|", *string.ascii_uppercase]
    (folder / "vocab.json").write_text(json.dumps({label: index for index, label in enumerate(labels)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), bos_token=None, eos_token=None)
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(return_attention_mask=True), tokenizer).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    convolutions = {"conv_dim": (16, 16, 16), "conv_kernel": (10, 8, 4), "conv_stride": (5, 8, 8)}
    torch.manual_seed(seed)
    config = Wav2Vec2Config(
        vocab_size=len(labels), pad_token_id=0, num_conv_pos_embedding_groups=2, feat_extract_norm="layer", **sizes,
        **convolutions,
    )  # fmt: skip
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_other_weights_of_the_aligner_make_another_table(recorded_run: Config, tmp_path: Path) -> None:
    align = AlignConfig(aligner="ctc", path=str(ctc_model(tmp_path / "ctc", 0)), min_score=-100.0)
    config = copy_of(recorded_run, tmp_path / "run").model_copy(update={"align": align})
    run_stage(config, "align", "natural")
    manifest = manifest_of(config, "aligned")
    assert manifest["sources"]["aligner"] == manifest["aligner"]
    aligned = table_of(config, "natural", "aligned")
    run_stage(config, "align", "natural")
    assert table_of(config, "natural", "aligned") == aligned
    ctc_model(tmp_path / "ctc", 1)
    run_stage(config, "align", "natural")
    assert table_of(config, "natural", "aligned") != aligned
    utterances = table_of(config, "natural", "utterances")
    with pytest.raises(StageError, match="holds other weights here than where the run was started"):
        next(AlignShard(config, utterances, manifest["aligner"])("part-00000"))


@pytest.mark.slow
def test_features_as_int8_and_augmented_training_speech(recorded_run: Config, tmp_path: Path) -> None:
    plain = {row.utt_id: row for row in rows_of(recorded_run, "features", Features)}
    config = copy_of(recorded_run, tmp_path / "int8")
    encode = config.encode.model_copy(update={"storage": "int8"})
    run_stage(config.model_copy(update={"encode": encode}), "encode", "natural")
    for row in rows_of(config, "features", Features):
        exact = frames_of(plain[row.utt_id]).astype(np.float32)
        assert len(row.features) == exact.size
        limit = np.abs(exact).max(axis=0) / 127
        assert (np.abs(frames_of(row).astype(np.float32) - exact) <= limit + 0.01).all()
    augment = config.encode.augment.model_copy(update={"share": 1.0})
    encode = config.encode.model_copy(update={"augment": augment})
    run_stage(config.model_copy(update={"encode": encode}), "encode", "natural")
    for row in rows_of(config, "features", Features):
        same = row.features == plain[row.utt_id].features
        assert same == (row.split == "test"), "training speech is changed, measured speech never"


def test_a_readers_bug_names_the_file() -> None:
    words = r"ingest: cuts\.jsonl: KeyError: 'k'; please report this as a bug"
    with pytest.raises(StageError, match=words), ingest._reading("cuts.jsonl"):
        raise KeyError("k")
