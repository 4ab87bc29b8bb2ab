"""The config: strict, typed, and clear about what is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from salad_ray.config import Config, ConfigError, all_keys, identity
from salad_ray.configfile import dump_config, load_config, parse_config, replaced

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"distill": {"alhpa": 1}}, ["distill.alhpa", "did you mean 'distill.alpha'"]),
        ({"alpha": 1}, ["'alpha'", "did you mean 'distill.alpha'"]),
        ({"distill": {"alpha": "much"}}, ["distill.alpha", "'much'", "number"]),
        ({"distill": {"alpha": 1.5}}, ["distill.alpha", "1.5", "less than or equal to 1"]),
        ({"distill": {"num_steps": True}}, ["distill.num_steps", "True", "integer"]),
        ({"distill": {"num_steps": 3, "num_positions": 1e6}}, ["num_steps=3", "num_positions=1e+06", "give one"]),
        ({"pack": {"text_words": [9, 5]}}, ["pack.text_words=[9, 5]", "[least, most]"]),
        ({"distill": {"num_workers": 3}}, ["num_workers=3", "num_lanes=8", "divide"]),
        ({"encode": {"encoder": "mini"}}, ["encode.encoder", "'mini'", "'log_mel' or 'mimi'"]),
        ({"encode": {"encoder": "mimi"}}, ["encode.path", "kyutai/mimi"]),
        ({"ingest": {"corpora": [{"name": "x"}]}}, ["ingest.corpora.0.path"]),
        ({"ingest": {"corpora": ["a/x", "b/x"]}}, ["ingest.corpora", "'x'"]),
        ({"align": {"aligner": "ctc"}}, ["align.path"]),
        ({"distill": {"num_workers": 0}}, ["distill.num_workers=0"]),
        ({"distill": {"num_workers": [3, 2]}}, ["distill.num_workers=(3, 2)"]),
        ({"distill": {"num_workers": [1, 9]}}, ["distill.num_workers=9", "pack.num_lanes=8"]),
        ({"distill": {"num_workers": "two"}}, ["distill.num_workers"]),
        ({"encode": {"augment": {"num_effects": [1, 9]}}}, ["encode.augment.num_effects=[1, 9]"]),
        ({"encode": {"augment": {"speed": [1.1, 0.9]}}}, ["encode.augment.speed"]),
        ({"synthesize": {"voices": ["en-us"], "evaluation_voices": ["en-us"]}}, ["share en-us"]),
        ({"distill": 3}, ["'distill'", "3"]),
        ({"model": {"tiny_lm": {"num_heads": 3}}}, ["model.tiny_lm.hidden_size=160", "num_heads=3"]),
        ({"ingest": {"corpora": ["a"], "heldout_share": 0}}, ["heldout_share=0"]),
        ({"distill": {"learning_rate": float("inf")}}, ["distill.learning_rate", "finite"]),
    ],
)
def test_a_wrong_config_is_one_sentence_with_key_value_and_remedy(data: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(data, "run.yaml")
    message = str(error.value)
    assert message.startswith("run.yaml: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_each_synthesizer_has_voices_of_its_own() -> None:
    espeak, kokoro = (parse_config({"synthesize": {"synthesizer": name}}, "run.yaml") for name in ("espeak", "kokoro"))
    assert parse_config({}, "run.yaml").synthesize == espeak.synthesize
    assert min(len(config.synthesize.voices) for config in (espeak, kokoro)) >= 20
    assert kokoro.synthesize.evaluation_voices == ("af_nicole", "am_puck")
    one = parse_config({"synthesize": {"synthesizer": "kokoro", "voices": ["af_heart"]}}, "run.yaml")
    assert one.synthesize.voices == ("af_heart",)
    assert one.synthesize.evaluation_voices == kokoro.synthesize.evaluation_voices
    with pytest.raises(ConfigError, match="'en-us' is no voice of Kokoro's"):
        parse_config({"synthesize": {"synthesizer": "kokoro", "voices": ["en-us"]}}, "run.yaml")


def test_overrides_are_read_as_yaml_and_checked_like_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("distill: {learning_rate: 1e-4}\n")
    config = load_config(path, ["distill.alpha=0", "pack.text_words=[2, 6]", "distill.adapter_learning_rate=3e-4"])
    assert config.distill.learning_rate == 1e-4
    assert config.distill.adapter_learning_rate == 3e-4
    assert config.pack.text_words == (2, 6)
    assert config.run_dir == str(Path("runs/mine").resolve())
    for wrong in ("distill.alpha", "=3", "distill.alpha.x=1", "seed=[1"):
        with pytest.raises(ConfigError, match=r"override|'distill\.alpha'"):
            load_config(path, [wrong])


def test_a_file_that_is_no_config_is_named(tmp_path: Path) -> None:
    for name, content in (("list.yaml", "[1, 2]"), ("torn.yaml", "a: [1"), ("binary.yaml", None)):
        path = tmp_path / name
        path.write_bytes(b"\xff\xfe\x00") if content is None else path.write_text(content)
        with pytest.raises(ConfigError, match=name):
            load_config(path)
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such config file"):
        load_config(tmp_path / "gone.yaml")


PLAIN = "hunter2plain"
"""A credential that looks like none."""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"storage:\n  pin: {PLAIN}\n bad: [1", ["at line 3, column 2", "expected <block end>"]),
        (f"pin: *{PLAIN}", ["at line 1, column 6", "found undefined alias"]),
        (f"pin: !{PLAIN} x", ["at line 1, column 6", "could not determine a constructor"]),
        (f"pin: {PLAIN}\x00", ["a character or value in it cannot be read"]),
        (f"pin: {PLAIN}\nday: 2024-99-99", ["a character or value in it cannot be read"]),
        (f"pin: {PLAIN}", ["unknown key 'pin'; see `salad run --help`"]),
        (f"ingest: {{passages: {{pin: {PLAIN}}}}}", ["unknown key 'ingest.passages.pin'"]),
        (f"seed: {{pin: {PLAIN}}}", ["'seed' is a mapping: "]),
        (f"encode: {{augment: {{speed: [{{pin: {PLAIN}}}, 1]}}}}", ["'encode.augment.speed.0' is a mapping: "]),
        (f"encode: [{{pin: {PLAIN}}}, 1]", ["'encode' is [a mapping, 1]: "]),
    ],
)
def test_an_error_repeats_nothing_of_what_nobody_knows(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert PLAIN not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("override", [f"pin={PLAIN}", f"seed.pin={PLAIN}", f"pin=[{PLAIN}", f"pin=*{PLAIN}"])
def test_nor_does_the_error_of_an_override(override: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="pin") as error:
        load_config(path, [override])
    assert PLAIN not in str(error.value)


def test_a_pattern_of_web_text_is_made_absolute_where_its_folder_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "mine.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for path, found in (("texts/*.jsonl", f"{tmp_path}/texts/*.jsonl"), ("org/name/sample/*.parquet", None)):
        for key in ("web", "text"):
            ingest = load_config("mine.yaml", [f"ingest.{key}=[{{path: '{path}', name: x}}]"]).ingest
            [corpus] = getattr(ingest, key)
            assert corpus.path == (found or path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, "{}") for key in ("align.path", "encode.path", "embed.path", "synthesize.path", "model.teacher")),
        *((key, "{}") for key in ("synthesize.recogniser", "evaluate.recogniser")),
        ("ingest.corpora", "[{{path: {}, root: {}}}]"),
        ("ingest.web", "[{}]"),
        ("ingest.text", "[{}]"),
        ("ingest.passages.benchmarks", "[{}]"),
        ("evaluate.benchmarks", "[{{name: piqa, path: {}, exemplars: {}}}]"),
    ],
)
def test_paths_are_made_absolute_in_a_file_that_is_loaded_and_nowhere_else(
    key: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "mine.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)

    def known(name: str, config: Config) -> bool:
        return yaml.safe_dump(config.model_dump(mode="json")).count(f" {name}\n") == value.count("{}")

    loaded = load_config("mine.yaml", [f"{key}={value.format(*['here'] * 2)}"])
    assert known(f"{tmp_path}/here", loaded)
    assert replaced(loaded, {"seed": 1}) == loaded.model_copy(update={"seed": 1})
    data: dict = {}
    for part in reversed(key.split(".")):
        data = {part: data or yaml.safe_load(value.format(*["here"] * 2))}
    assert known("here", parse_config(data))
    if not key.endswith(("corpora", "passages.benchmarks")):  # which are no hub ids
        assert known("org/name", load_config("mine.yaml", [f"{key}={value.format(*['org/name'] * 2)}"]))


def test_a_section_that_is_null_can_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("stage2: null\n")
    config = load_config(path, ["stage2.alpha=0.5"])
    assert config.stage2 is not None
    assert config.stage2.alpha == 0.5
    path.write_text("distill: 0\n")
    with pytest.raises(ConfigError, match="'distill' is a value, not a section"):
        load_config(path, ["distill.alpha=0.5"])


def test_a_folder_called_world_is_not_the_embedded_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "world").mkdir()
    (tmp_path / "mine.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert load_config("mine.yaml").model.teacher == "world"
    assert load_config("mine.yaml", ["model.teacher=./world"]).model.teacher == f"{tmp_path}/world"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "config.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


@pytest.mark.parametrize(
    ("name", "teacher", "rate", "adapter_rate"),
    [("salad_3b", "Qwen/Qwen2.5-3B", 5e-5, 1e-3), ("salad_7b", "Qwen/Qwen2.5-7B", 5e-6, 1e-4)],
)
def test_the_paper_recipe_says_what_the_paper_says(name: str, teacher: str, rate: float, adapter_rate: float) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    distill, adapter, stage2 = config.distill, config.model.adapter, config.stage2
    assert config.model.teacher == teacher
    assert (distill.alpha, distill.num_positions, config.pack.context) == (1.0, 24e9, 2048)
    assert (distill.learning_rate, distill.adapter_learning_rate) == (rate, adapter_rate)
    assert (distill.optimizer, distill.weight_decay, distill.word_ends) == ("adamw", 0.1, False)
    assert (distill.warmup_steps, distill.decay_share) == (500, 0.2)
    assert (config.pack.text_words, config.pack.speech_words, config.pack.whole_share) == ((10, 30), (5, 15), 0.0)
    assert (config.encode.encoder, config.encode.path) == ("mimi", "kyutai/mimi")
    assert (adapter.num_layers, adapter.hidden_size, adapter.ffn_size, adapter.stride) == (12, 960, 2560, 1)
    assert (adapter.num_heads, adapter.num_kv_heads) == (15, 5)
    assert (config.embed.embedder, config.embed.path) == ("sentence_transformers", "BAAI/bge-large-en-v1.5")
    assert (config.cluster.num_clusters, config.select.gamma, config.select.budget_percent) == (128, 5, 1)
    assert (config.select.shrink, config.probe.protocol) == (False, "interleaved")
    assert (config.synthesize.synthesizer, config.synthesize.voices) == ("kokoro", ("af_heart",))
    assert stage2 is not None
    assert (stage2.alpha, stage2.num_positions, stage2.decay_share) == (1.0, 1.9e9, 1.0)
    assert config.pack.text_share == pytest.approx(1 / 3, abs=1e-3)
    assert config.stage2_shares == pytest.approx(dict.fromkeys(("natural", "active", "text"), 1 / 3), abs=1e-3)
    assert [corpus.path.startswith("HuggingFaceTB/smollm-corpus/") for corpus in config.ingest.text] == [True, True]
    rows = config.pack.num_lanes * config.pack.rows_per_lane
    assert rows * config.pack.context == pytest.approx(1e6, rel=0.05)


@pytest.mark.parametrize(
    ("given", "shares"),
    [
        ({}, {"natural": 1 / 2, "active": 1 / 2}),
        ({"world": {"num_text": 9}}, {"natural": 1 / 3, "active": 1 / 3, "text": 1 / 3}),
        ({"ingest": {"text": ["t"]}}, {"natural": 1 / 3, "active": 1 / 3, "text": 1 / 3}),
        ({"stage2": {"shares": {"natural": 0.7, "active": 0.3}}}, {"natural": 0.7, "active": 0.3}),
        ({"world": {"num_text": 9}, "stage2": {"shares": {"natural": 0.333, "active": 0.333, "text": 0.333}}},
         {"natural": 1 / 3, "active": 1 / 3, "text": 1 / 3}),
    ],
)  # fmt: skip
def test_shares_of_stage_two_are_equal_parts_of_what_there_is(given: dict, shares: dict[str, float]) -> None:
    assert parse_config({"stage2": {}} | given).stage2_shares == pytest.approx(shares)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"stage2": {"active_weight": 13}}, ["stage2.active_weight is gone", "stage2.shares"]),
        ({"stage2": {"shares": {"natural": 0.5, "active": 0.3}}}, ["stage2.shares", "make 0.8, and must make 1"]),
        ({"stage2": {"shares": {"natural": 1.0, "active": 0.0}}}, ["stage2.shares.natural"]),
        ({"pack": {"text_share": 0.3}}, ["pack.text_share=0.3", "ingest.text", "world.num_text"]),
        ({"pack": {"text_share": 1.0}}, ["pack.text_share"]),
        ({"stage2": {"shares": {"natural": 0.5, "active": 0.3, "text": 0.2}}},
         ["stage2.shares.text", "ingest.text", "world.num_text"]),
        ({"pack": {"text_share": 0.3}, "world": {"num_text": 9}, "ingest": {"corpora": ["c"]}}, ["ingest.text"]),
        ({"ingest": {"text": ["a/x", "b/x"]}}, ["ingest.text", "'x'"]),
    ],
)  # fmt: skip
def test_shares_that_cannot_be_are_an_error_with_the_key_to_mend(given: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(given)
    assert all(word in str(error.value) for word in words), error.value


def test_every_key_is_read_somewhere() -> None:
    keys = all_keys(Config)
    assert "distill.alpha" in keys
    files = [path for path in (ROOT / "salad_ray").rglob("*.py") if path.name != "config.py"]
    source = "\n".join(path.read_text() for path in files)
    unread = [key for key in keys if not re.search(rf"\.{key.rsplit('.', 1)[-1]}\b", source)]
    assert not unread


def test_identity_ignores_how_and_where() -> None:
    config = parse_config({})
    faster = parse_config({"encode": {"batch_secs": 10, "num_gpus": 1}, "distill": {"num_workers": 2}})
    assert identity(config, "encode", "distill") == identity(faster, "encode", "distill")
    other = parse_config({"distill": {"alpha": 0}})
    assert identity(config, "distill") != identity(other, "distill")
    assert identity(config, "pack.context") == {"pack.context": 2048}
