"""How often a recording is decoded, as docs/corpora.md says: the stages' own workers on small files, without Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile
from factories import a_table, make_tokenizer

from salad_ray.config import Config
from salad_ray.configfile import parse_config
from salad_ray.model.encoder import load_encoder
from salad_ray.speech import audio
from salad_ray.stages.align import AlignShard
from salad_ray.stages.encode import EncodeShard
from salad_ray.stages.evaluate import AskShard
from salad_ray.stages.ingest import CheckShard
from salad_ray.stages.shards import Worker, write_shard
from salad_ray.stages.synthesize import SpeakShard, load_synthesizer
from salad_ray.synthesis.espeak import EspeakSynthesizer
from salad_ray.tables import Item, Passage, Table, Utterance, to_arrow

TEXTS = ["The cat sat on the old mat.", "A storm came over the sea at night.", "They sold bread and milk here."]
CONDITIONS = ["clean", "voice", "noise", "speed", "codec", "telephone"]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How often each file, by path or bytes, was opened to be decoded."""
    counts: Counter[Any] = Counter()
    opened = audio.open_recording

    @contextmanager
    def counting(source: str | bytes | None, end_secs: float | None = None) -> Iterator[audio.Recording]:
        counts[source] += 1
        with opened(source, end_secs) as recording:
            yield recording

    monkeypatch.setattr(audio, "open_recording", counting)
    return counts


def write_recordings(folder: Path) -> list[Utterance]:
    """Real speech as WAV, FLAC and MP3; the first with the word times that a corpus may give."""
    rows = []
    speeches = EspeakSynthesizer(("en-us",)).synthesize(TEXTS, ["en-us"] * len(TEXTS), 0)
    for text, speech, kind in zip(TEXTS, speeches, ("wav", "flac", "mp3"), strict=True):
        path = folder / f"{kind}.{kind}"
        soundfile.write(path, speech.audio, speech.sampling_rate)
        words = speech.words if kind == "wav" else None
        row = Utterance(
            utt_id=kind, text=text, duration_secs=0.0, recording_id=kind, corpus="c", uri=str(path), words=words
        )
        rows.append(row)
    return rows


def made(decoded: Counter[Any], table: Table, worker: Worker, num_rows: int) -> dict[Any, int]:
    """Make a shard of so many rows; how often each file was decoded for it."""
    decoded.clear()
    counts = write_shard(table, "a", worker("a"))
    assert (counts["num_kept"], counts["num_rejected"]) == (num_rows, 0), table.rejects.read("a").to_pylist()
    return dict(decoded)


def encoding(config: Config, set_name: str, utterances: Table) -> EncodeShard:
    return EncodeShard(config, set_name, utterances, load_encoder(config.encode, "cpu").weights)


def test_recorded_speech_is_decoded_once_by_each_stage(tmp_path: Path, decoded: Counter[Any]) -> None:
    config = parse_config({"run_dir": str(tmp_path / "run"), "align": {"min_score": -100.0}})
    rows = write_recordings(tmp_path)
    timed, *untimed = [row.uri for row in rows]
    catalog, utterances, aligned, features = (
        a_table(tmp_path, "natural", name) for name in ("catalog", "utterances", "aligned", "features")
    )
    catalog.write("a", to_arrow(Utterance, rows))
    once = dict.fromkeys([timed, *untimed], 1)
    assert made(decoded, utterances, CheckShard(config, catalog), 3) == once
    assert made(decoded, aligned, AlignShard(config, utterances), 3) == dict.fromkeys(untimed, 1)
    assert made(decoded, features, encoding(config, "natural", aligned), 3) == once


def test_synthesized_speech_is_decoded_by_encode_alone(tmp_path: Path, decoded: Counter[Any]) -> None:
    config = parse_config({"run_dir": str(tmp_path / "run")})
    passages, utterances, features = (
        a_table(tmp_path, "active", name) for name in ("passages", "utterances", "features")
    )
    passages.write("a", to_arrow(Passage, [Passage(passage_id=text, doc_id="d", text=text) for text in TEXTS]))
    assert made(decoded, utterances, speaking(config, "active", passages, utterances), 3) == {}
    once = {row.audio: 1 for row in utterances.read_rows(Utterance, "a")}
    assert made(decoded, features, encoding(config, "active", utterances), 3) == once


def speaking(config: Config, set_name: str, passages: Table, utterances: Table) -> SpeakShard:
    weights = load_synthesizer(config, config.synthesize.voices, "cpu").weights
    return SpeakShard(config, set_name, passages, utterances, weights)


@pytest.mark.parametrize("conditions", [CONDITIONS[:1], CONDITIONS])
def test_a_benchmarks_item_is_decoded_once_for_each_condition_that_changes_its_audio(
    tmp_path: Path, decoded: Counter[Any], conditions: list[str]
) -> None:
    """One item has a recording of its own, the others are spoken; one of these in another voice, too."""
    evaluate = {"conditions": conditions, "cascade": "pocketsphinx", "num_shots": 0}
    config = parse_config({"run_dir": str(tmp_path / "run"), "evaluate": evaluate})
    recorded = write_recordings(tmp_path)[0]
    names = ["recorded", "spoken", "third", *(["third@voice"] if "voice" in conditions else [])]
    rows = [Passage(passage_id=name, doc_id=name, text=TEXTS[place % 3]) for place, name in enumerate(names)]
    rows[0] = Passage(passage_id="recorded", doc_id="recorded", text=f"{recorded.text} 漢字", uri=recorded.uri)
    passages, utterances, features = (
        a_table(tmp_path, "benchmark", name) for name in ("passages", "utterances", "features")
    )
    passages.write("a", to_arrow(Passage, rows))
    worker = speaking(config, "benchmark", passages, utterances)
    assert list(made(decoded, utterances, worker, len(rows)).values()) == [1], "the recording, to check it"

    num_changed = len(set(conditions) - {"clean", "voice"})
    heard = utterances.read_rows(Utterance, "a")
    expected = {row.audio: 1 if row.utt_id.endswith("@voice") else 1 + num_changed for row in heard}
    num_rows = sum(expected.values())
    assert made(decoded, features, encoding(config, "benchmark", utterances), num_rows) == expected

    decoded.clear()
    cascade: Any = AskShard.__new__(AskShard)
    cascade.config, cascade.tokenizer, cascade.context = config, make_tokenizer("byte_level"), 512
    cascade.tables = {"utterances": utterances}
    cascade.items = {name: item(name) for name in names[:3]}
    cascade.pools = {"b": list(cascade.items.values())}
    cascade.recogniser = SimpleNamespace(transcribe=lambda *_: "what was heard")
    pairs, ask = cascade._rows("cascade", "a")
    asked = [ask(pair) for pair in pairs]
    assert {condition for _, condition, *_ in asked} == {*conditions, "silence", "swapped"}
    assert decoded == {row.audio: 1 for row in heard}


def item(name: str) -> Item:
    return Item(
        item_id=name,
        benchmark="b",
        domain="d",
        before="",
        spoken=f"Which is {name}?",
        after="",
        choices=["a", "b"],
        answer=0,
    )
