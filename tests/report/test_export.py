"""Export: a run's model as a folder that loads anywhere, says where it comes from, and appears whole or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from factories import HAND, hand_table, keep_run, make_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from salad_ray.config import AdapterConfig, ConfigError
from salad_ray.configfile import parse_config
from salad_ray.model.listen import load_listener
from salad_ray.model.loading import ModelError, tokenizer_hash, weights_fingerprint
from salad_ray.model.speech_lm import EncoderSpec, SpeechLM, hidden_states
from salad_ray.report import export as exporting
from salad_ray.report.card import SpeechData, speech_of_run
from salad_ray.report.export import export
from salad_ray.stages.common import count_shards, hours_by_corpus
from salad_ray.stages.shards import ShardPart, write_shard
from salad_ray.tables import (
    SCHEMA_VERSION,
    TableError,
    Utterance,
    fingerprint,
    put_folder,
    to_arrow,
    write_json,
)

ADAPTER = AdapterConfig(hidden_size=16, num_layers=1, num_heads=2, ffn_size=24)
LOG_MEL = {"name": "log_mel", "path": None, "revision": None, "sampling_rate": 16000, "frame_rate": 12.5, "dim": 640}
WEB = {"path": "books.jsonl", "attribution": "the authors of the books"}


def version(label: str) -> str:
    return f"{fingerprint({'table': label})[:12]}-0a1b2c3d"


def write_manifest(run: Path | str, label: str, inputs: Sequence[str], config: Any = None, **facts: Any) -> None:
    """A manifest as stages write them; `inputs` are tables of the run."""
    name = label.rpartition("/")[2]
    content = {
        "stage": name,
        "config": config or {},
        "inputs": {label: version(label) for label in inputs},
        "schema_version": SCHEMA_VERSION,
        "salad_ray": "0.1.0",
        "written_at": "2026-11-21T12:00:00Z",
        "version": version(label),
    }
    write_json(f"{hand_table(run, label).url}/manifest.json", content | facts)


def write_speech(run: Path, name: str, hours_by_corpus: dict[str, dict[str, float]], **facts: Any) -> None:
    """Utterances, features and plan of a set."""
    facts |= {"totals": {"hours_by_corpus": hours_by_corpus}, "num_rows": 8, "shards": {"a": 8}}
    write_manifest(run, f"{name}/utterances", [f"{name}/passages"], **facts)
    hours = sum(sum(by_license.values()) for by_license in hours_by_corpus.values())
    encode = {"encode": {"encoder": "log_mel", "backend": "transformers"}}
    totals = {"hours": hours, "training_hours": 0.75 * hours}
    facts = {"encoder": LOG_MEL, "totals": totals, "sources": {"weights": ""}}
    write_manifest(run, f"{name}/features", [f"{name}/utterances"], encode, **facts)
    write_manifest(run, f"{name}/plan", [f"{name}/features", "teacher"])
    write_manifest(run, f"{name}/passages", [])


def write_system(run: Path, name: str, inputs: Sequence[str], model: SpeechLM, **facts: Any) -> None:
    model.save_pretrained(f"{hand_table(run, name).url}/model")
    starts = [{"teacher_weights": "a-hash-of-the-teacher", "zero_stage": 3}]
    facts = {"step": 20, "num_positions": 12345, "log": [{"loss": 1.0}], "starts": starts} | facts
    write_manifest(run, name, inputs, **facts)


def quantities(misalignment: float, num_scored: int) -> dict[str, Any]:
    errors = {f"{name}_standard_error": 0.03 for name in ("misalignment", "forgetting", "distillation")}
    means = {"misalignment": misalignment, "forgetting": misalignment / 4, "distillation": misalignment}
    return means | errors | {"num_scored": num_scored, "num_passages": 10}


def system_metrics(heard: float, unheard: float, train_seconds: float) -> dict[str, Any]:
    by_domain = {
        "stars": {"heard": True} | quantities(heard, 300),
        "cooking": {"heard": True} | quantities(heard + 0.4, 100),
        "law": {"heard": False} | quantities(unheard, 200),
    }
    return quantities(heard, 600) | {"by_domain": by_domain, "train_seconds": train_seconds, "num_positions": 12345}


def accuracy(system: str, modality: str, heard: bool | None, value: float) -> dict[str, Any]:
    names = {"system": system, "benchmark": "world", "modality": modality, "condition": "clean", "metric": "acc"}
    numbers = {"accuracy": value, "ci_low": value - 0.05, "ci_high": value + 0.05, "num_items": 240, "num_ties": 1}
    return names | numbers | {"num_short": 0, "heard": heard, "word_error_rate": None}


METRICS = {
    "untrained": system_metrics(2.0, 2.4, 0),
    "stage1": system_metrics(0.1, 0.5, 118.25),
    "stage2": system_metrics(0.08, 0.12, 43.5),
    "accuracy": [
        accuracy("base", "text", None, 0.95),
        accuracy("stage1", "speech", False, 0.40),
        accuracy("stage2", "speech", True, 0.85),
        accuracy("stage2", "speech", False, 0.71),
    ],
    "gaps": [
        {"system": "stage2", "benchmark": "world", "metric": "acc", "topline": 0.95, "accuracy": 0.78, "gap": 0.17}
        | {"modality": "speech", "ci_low": 0.12, "ci_high": 0.22, "p_value": 0.0004, "num_items": 240},
        {"system": "stage2", "benchmark": "world", "metric": "acc", "topline": 0.95, "accuracy": 0.951, "gap": -0.001}
        | {"modality": "text", "ci_low": -0.01, "ci_high": 0.01, "p_value": 1.0, "num_items": 240},
        {"system": "stage2", "benchmark": "piqa", "metric": "acc", "topline": None, "accuracy": None, "gap": None}
        | {"modality": "speech", "ci_low": None, "ci_high": None, "p_value": None, "num_items": 0},
    ],
}


LABELS = (
    *("teacher", "trunk", "stage1", "stage2", "natural/catalog", "heldout/features", "heldout/measurements_stage2"),
    *(f"{of}/{name}" for of in ("natural", "active") for name in ("passages", "utterances", "features", "plan")),
    "web/embeddings",
)


def make_teacher(folder: Path) -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    make_tokenizer("byte_level").save_pretrained(folder)


@pytest.fixture(scope="module")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run with both stages leaves, on paper: true weights and manifests, no rows but a few."""
    run = tmp_path_factory.mktemp("runs") / "small"
    given = {"run_dir": "/where/it/ran", "ingest": {"web": [WEB], "corpora": ["emilia", "smith"]}}
    given |= {"distill": {"precision": "fp32"}, "stage2": {"alpha": 0.5}}
    places = keep_run(run, parse_config(given).model_dump(mode="json"), LABELS)
    teacher = f"{hand_table(run, 'teacher').url}/model"
    make_teacher(Path(teacher))
    students = [SpeechLM.from_teacher(teacher, None, ADAPTER, EncoderSpec(**LOG_MEL), seed) for seed in (1, 2)]
    facts = {"path": teacher, "revision": None, "num_parameters": 20000, "vocabulary": 400}
    facts["tokenizer_hash"] = tokenizer_hash(students[0].tokenizer)
    write_manifest(run, "teacher", [], {"model.teacher": teacher}, **facts)
    write_manifest(run, "natural/catalog", [], attributions={"Emilia (EN)": "the readers of LibriVox", "Smith, J": ""})
    write_speech(run, "natural", {"Emilia (EN)": {"CC BY 4.0": 12.5}, "Smith, J": {"CC BY-NC 4.0": 4.0}})
    write_speech(run, "active", {"books": {"CC BY 4.0": 1.25}}, synthesizer="kokoro")
    languages = pa.table({"utt_id": ["a", "b", "c"], "language": ["en", "en-GB", "de"]})
    hand_table(run, "natural/utterances").write("a", languages)
    read = ["teacher", "natural/features", "natural/plan"]
    write_manifest(run, "trunk", read)
    write_system(run, "stage1", ["trunk", *read], students[0], train_seconds=118.25)
    inputs = ["trunk", "teacher", "natural/features", "active/features", "active/plan"]
    write_system(run, "stage2", inputs, students[1], train_seconds=43.5, begun_from="/where/it/ran/trunk/checkpoints")
    write_manifest(run, "heldout/measurements_stage2", ["stage2", "heldout/features"])
    write_manifest(run, "heldout/features", [])
    write_manifest(run, "web/embeddings", ["web/passages"])  # leads nowhere
    write_json(f"{places.report_url}/metrics.json", METRICS)
    return run


@pytest.fixture
def run(made_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def exported(made_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(str(made_run), str(tmp_path_factory.mktemp("out") / "model"))


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of the model card."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


# --------------------------------------------------------------------------------------------------------- weights


def test_the_last_finished_stage_is_exported_bit_for_bit(made_run: Path, exported: Path, tmp_path: Path) -> None:
    original = SpeechLM.from_pretrained(made_run / "stage2" / HAND / "model")
    model = SpeechLM.from_pretrained(exported)
    assert weights_fingerprint(model) == weights_fingerprint(original)
    assert model.config == original.config
    first = SpeechLM.from_pretrained(export(str(made_run), str(tmp_path / "first"), system="stage1"))
    assert weights_fingerprint(first) == weights_fingerprint(
        SpeechLM.from_pretrained(made_run / "stage1" / HAND / "model")
    )
    assert weights_fingerprint(first) != weights_fingerprint(model)
    assert {path.name for path in exported.iterdir()} == exporting.FILES
    assert sorted(path.name for path in exported.parent.iterdir()) == ["model"]


def test_stage_one_is_taken_while_stage_two_is_not_finished(run: Path, tmp_path: Path) -> None:
    (run / "stage2" / HAND / "manifest.json").unlink()
    folder = export(str(run), str(tmp_path / "out"))
    assert json.loads((folder / "lineage.json").read_text())["system"] == "stage1"
    with pytest.raises(TableError, match="is not finished; run `salad stage2 CONFIG` first"):
        export(str(run), str(tmp_path / "other"), system="stage2")
    assert not (tmp_path / "other").exists()


def test_the_llm_half_is_a_plain_model_with_the_same_logits(exported: Path) -> None:
    model = SpeechLM.from_pretrained(exported)
    llm = AutoModelForCausalLM.from_pretrained(exported / "llm")
    tokenizer = AutoTokenizer.from_pretrained(exported / "llm")
    ids = tokenizer("we the people of the united states", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = llm(ids).logits
        hidden = hidden_states(model.llm, ids, torch.arange(ids.shape[1])[None])
        torch.testing.assert_close(logits, hidden @ model.head.T, rtol=1e-5, atol=1e-5)
    assert logits.std() > 0.1
    assert tokenizer_hash(tokenizer) == tokenizer_hash(model.tokenizer)


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_another_dtype(made_run: Path, tmp_path: Path, dtype: str, kind: torch.dtype) -> None:
    folder = export(str(made_run), str(tmp_path / "out"), dtype=dtype)
    for file in (folder / "adapter.safetensors", folder / "llm" / "model.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {kind}
    model, original = (SpeechLM.from_pretrained(path) for path in (folder, made_run / "stage2" / HAND / "model"))
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(kind)), name
    lineage = json.loads((folder / "lineage.json").read_text())
    assert lineage["dtype"] == str(kind).removeprefix("torch.")
    assert lineage["weights"] == weights_fingerprint(model)
    assert AutoModelForCausalLM.from_pretrained(folder / "llm").dtype == kind


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "deepspeed") or name.startswith("salad_ray.stages"):
            raise ModuleNotFoundError(f"{name} is not installed on this machine")

sys.meta_path.insert(0, Blocked())
import numpy as np
import torch
from salad_ray.model.listen import listen, load_listener
from salad_ray.model.speech_lm import SpeechLM
from salad_ray.report.export import export

folder = export(sys.argv[1], sys.argv[2])
model = SpeechLM.from_pretrained(folder)
ids = torch.arange(3, 12)[None]
assert model.text_hidden(ids, torch.arange(9)[None]).isfinite().all()
model, encoder = load_listener(str(folder))
tone = 0.3 * np.sin(np.arange(24000) * np.linspace(0.1, 0.3, 24000))
text = "".join(listen(model, encoder, tone, 24000, prompt="we {speech} the", max_tokens=8))
assert text
assert not {"ray", "deepspeed"} & set(sys.modules)
print(ascii(text))
"""


def test_a_machine_without_ray_and_deepspeed_exports_loads_and_listens(made_run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BLOCKED, str(made_run), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_files_are_as_readable_as_others(exported: Path) -> None:
    modes = {path.stat().st_mode & 0o777 for path in exported.rglob("*") if path.is_file()}
    assert modes == {(exported / "README.md").stat().st_mode & 0o777}
    (exported.parent / "any").write_text("")
    assert modes == {(exported.parent / "any").stat().st_mode & 0o777}
    (exported.parent / "any").unlink()


def test_a_run_at_a_url(made_run: Path, exported: Path, tmp_path: Path) -> None:
    put_folder(str(made_run), "memory://runs/small")
    folder = export("memory://runs/small/", str(tmp_path / "out"))
    for name in ("README.md", "config.yaml", "metrics.json"):
        assert (folder / name).read_text() == (exported / name).read_text()
    lineages = [json.loads((path / "lineage.json").read_text()) for path in (folder, exported)]
    assert lineages[0] == lineages[1]


# ------------------------------------------------------------------------------------------------- what goes with it


def test_the_card_tells_data_licences_and_numbers(exported: Path) -> None:
    front, text = card_of(exported)
    assert front["license"] == "other"
    assert front["language"] == ["de", "en"]
    assert front["pipeline_tag"] == "audio-text-to-text"
    assert "base_model" not in front, "a folder on the machine of training is not on a hub"
    assert "| Emilia (EN) | CC BY 4.0 | 12.50 | the readers of LibriVox |" in text
    assert "| Smith, J | CC BY-NC 4.0 | 4.00 |  |" in text
    assert "| books (kokoro) | CC BY 4.0 | 1.25 | the authors of the books |" in text
    assert "non-commercial use only" in text
    assert "13.31 hours" in text
    assert "α = 0.5" in text
    # heard: (300 · 0.08 + 100 · 0.48) / 400 = 0.18, its standard error 0.03 · √(0.75² + 0.25²) = 0.024
    misaligned, forgotten = text.split("| domains | passages | untrained | Stage II |")[1].split("Forgetting F")
    assert "| heard | 20 | 2.100 ± 0.024 | 0.180 ± 0.024 |" in misaligned
    assert "| unheard | 10 | 2.400 ± 0.030 | 0.120 ± 0.030 |" in misaligned
    assert "| heard | 20 | 0.045 ± 0.024 |" in forgotten
    assert "| unheard | 10 | 0.030 ± 0.030 |" in forgotten
    assert "| benchmark | text LLM, reading | Stage II, hearing |" in text
    assert "| world | 95.0 % (90.0 to 100.0)† | – |" in text
    assert "| world, heard domains | – | 85.0 % (80.0 to 90.0) |" in text
    assert "| world, unheard domains | – | 71.0 % (66.0 to 76.0) |" in text
    assert "Items without a single best answer (ties): world, text LLM reading 1 of 240." in text
    assert "| world | Stage II | 95.0 % | 78.0 % | 17.0 (12.0 to 22.0) | &lt; 0.001 | 240 |" in text
    assert "Stage I |" not in text.replace("Stage II", ""), "numbers of another model"
    for path in ("/where/it/ran", str(exported.parent), "/teacher/model"):
        assert path not in text


def test_the_card_of_a_hub_model_on_one_licence(run: Path, tmp_path: Path) -> None:
    manifest = json.loads((run / "teacher" / HAND / "manifest.json").read_text())
    manifest |= {"path": "Qwen/Qwen2.5-0.5B", "revision": "0123abcd", "config": {"model.teacher": "Qwen/Qwen2.5-0.5B"}}
    write_json(f"{run}/teacher/{HAND}/manifest.json", manifest)
    front, text = card_of(export(str(run), str(tmp_path / "out"), system="stage1"))
    assert (front["base_model"], front["license"]) == ("Qwen/Qwen2.5-0.5B", "other")
    assert "`Qwen/Qwen2.5-0.5B` at revision 0123abcd" in text
    assert "books (kokoro)" not in text
    write_json(f"{run}/teacher/{HAND}/manifest.json", manifest | {"config": {"model.teacher": "world"}, "path": "/a/b"})
    write_speech(run, "natural", {"world": {"CC0-1.0": 1.0}}, synthesizer="espeak")
    front, text = card_of(export(str(run), str(tmp_path / "out"), system="stage1"))
    assert front["license"] == "cc0-1.0"
    assert "base_model" not in front
    assert "`world`" in text


def test_a_corpus_keeps_its_licence_and_attribution_whatever_it_is_called(tmp_path: Path) -> None:
    """Recorded, and text of the same name that is spoken."""
    names = sorted(["Smith, J", "Emilia (EN)", "books (kokoro)", '["speech", "a"]', "plain"])
    rows = [replace(utterance(name), license=f"licence, of {name}", duration_secs=3600.0) for name in names]
    places = keep_run(tmp_path, {}, ["natural/utterances", "natural/catalog", "active/utterances"])
    for set_name, facts in {"natural": {}, "active": {"synthesizer": "kokoro"}}.items():
        table = places.table(set_name, "utterances")
        parts = [ShardPart(to_arrow(Utterance, each), 5, 5, totals=hours_by_corpus(each)) for each in (rows, rows[:1])]
        write_shard(table, "a", iter(parts))
        write_json(f"{table.url}/manifest.json", count_shards(table, ["a"]) | facts)
    credits = {name: f"read by {name}" for name in names}
    write_json(f"{places.table('natural', 'catalog').url}/manifest.json", {"attributions": credits})
    web = [{"path": "a", "name": name, "attribution": f"written by {name}"} for name in names]
    assert speech_of_run(places, ["natural", "active"], {"web": web}) == [
        SpeechData(name + voice, f"licence, of {name}", 2.0 if name == names[0] else 1.0, f"{who} by {name}")
        for voice, who in (("", "read"), (" (kokoro)", "written"))
        for name in names
    ]


def utterance(corpus: str) -> Utterance:
    return Utterance(utt_id=f"{corpus}/u", text="a", duration_secs=1.0, recording_id="r", corpus=corpus, uri="a.wav")


def test_a_run_that_was_not_measured(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "runs" / HAND / "report")
    folder = export(str(run), str(tmp_path / "out"))
    assert "Not measured yet." in card_of(folder)[1]
    assert not (folder / "metrics.json").exists()


def test_numbers_of_a_former_model_are_not_passed_on(run: Path, tmp_path: Path) -> None:
    write_json(f"{run}/runs/{HAND}/report/metrics.json", METRICS | {"stage2": system_metrics(0.01, 0.01, 99.0)})
    with pytest.raises(TableError, match=r"of another stage2 model; run `salad run CONFIG`"):
        export(str(run), str(tmp_path / "out"))
    export(str(run), str(tmp_path / "out"), system="stage1")


def test_the_lineage_names_every_table_that_led_here(made_run: Path, exported: Path) -> None:
    lineage = json.loads((exported / "lineage.json").read_text())
    speech = {
        f"{name}/{table}" for name in ("natural", "active") for table in ("passages", "utterances", "features", "plan")
    }
    assert set(lineage["tables"]) == {"stage2", "trunk", "teacher"} | speech
    assert set(lineage["measured_with"]) == {"heldout/measurements_stage2", "heldout/features"}
    assert lineage["missing"] == {}
    for label, table in (lineage["tables"] | lineage["measured_with"]).items():
        manifest = json.loads((made_run / label / HAND / "manifest.json").read_text())
        assert table == {name: value for name, value in manifest.items() if name in table}
        assert {"version", "config", "inputs", "salad_ray"} <= set(table)
        assert not {"log", "shards", "starts"} & set(table)
    teacher = json.loads((made_run / "teacher" / HAND / "manifest.json").read_text())
    expected = {"weights": "a-hash-of-the-teacher", "precision": "fp32"}
    expected |= {name: teacher[name] for name in ("path", "revision", "tokenizer_hash", "num_parameters")}
    assert lineage["teacher"] == expected
    assert lineage["encoder"] == LOG_MEL | {"backend": "transformers", "weights": ""}
    assert lineage["system"] == "stage2"
    content = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (exported, made_run)]
    assert content[0] == content[1]
    assert json.loads((exported / "metrics.json").read_text()) == METRICS


def test_an_input_that_was_made_anew_is_told(run: Path, tmp_path: Path) -> None:
    features = run / "natural" / "features" / HAND / "manifest.json"
    features.write_text(features.read_text().replace(version("natural/features"), f"{'f' * 12}-00000000"))
    lineage = json.loads((export(str(run), str(tmp_path / "out")) / "lineage.json").read_text())
    assert lineage["missing"]["trunk ← natural/features"] == version("natural/features")
    assert "natural/features" not in lineage["tables"]


def test_a_config_of_another_salad_ray_does_not_matter(run: Path, tmp_path: Path) -> None:
    index = run / "runs" / f"{HAND}.json"
    content = json.loads(index.read_text())
    content["config"] |= {"a_key_that_is_gone": {"x": 1}}
    index.write_text(json.dumps(content))
    assert load_listener(str(export(str(run), str(tmp_path / "out"))))


# ------------------------------------------------------------------------------------------------- what can go wrong


TARGETS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (lambda target: target.write_text("years of work"), "is a file"),
    "other files": (lambda target: (target.mkdir(), (target / "thesis.txt").write_text("years")), "holds thesis.txt"),
    "a text LM": (make_teacher, "holds generation_config.json"),
    "its names, but no model": (
        lambda target: (target.mkdir(), (target / "README.md").write_text("mine")),
        "not of an",
    ),
}


@pytest.mark.parametrize("kind", TARGETS)
def test_a_target_that_is_something_else_is_left_alone(made_run: Path, tmp_path: Path, kind: str) -> None:
    make, words = TARGETS[kind]
    target = tmp_path / "target"
    make(target)
    before = {path: path.read_bytes() for path in [target, *target.rglob("*")] if path.is_file()}
    with pytest.raises(ConfigError, match=words):
        export(str(made_run), str(target))
    assert {path: path.read_bytes() for path in [target, *target.rglob("*")] if path.is_file()} == before


def test_an_earlier_export_is_replaced_unless_something_was_added(made_run: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()  # an empty folder is welcome
    export(str(made_run), str(target), system="stage1")
    export(str(made_run), str(target))
    assert json.loads((target / "lineage.json").read_text())["system"] == "stage2"
    (target / ".git").mkdir()
    with pytest.raises(ConfigError, match=r"holds \.git"):
        export(str(made_run), str(target))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_runs_own_model_is_no_target(run: Path) -> None:
    own = run / "stage2" / HAND / "model"
    before = weights_fingerprint(SpeechLM.from_pretrained(own))
    for target in (own, run / "stage1" / ".." / "stage2" / HAND / "model"):
        with pytest.raises(ConfigError, match="the run's own model"):
            export(str(run), str(target), dtype="bf16")
    assert weights_fingerprint(SpeechLM.from_pretrained(own)) == before


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("fails", ["_card", "_lineage", "_share"])
def test_an_export_that_fails_leaves_everything_as_it_was(
    made_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, fails: str
) -> None:
    target = tmp_path / "out"
    if existing:
        export(str(made_run), str(target), system="stage1")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(exporting, fails, fail)
    with pytest.raises(OSError, match="no space"):
        export(str(made_run), str(target))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert target.exists() == existing
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * existing


def test_what_cannot_be_exported(run: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "out")
    with pytest.raises(TableError, match=r"holds no run"):
        export(str(tmp_path / "nothing"), target)
    with pytest.raises(ConfigError, match="dtype=fp8: a model can be exported as fp32 or bf16"):
        export(str(run), target, dtype="fp8")
    with pytest.raises(ConfigError, match="system=base: a run's systems are stage1, stage2, control"):
        export(str(run), target, system="base")
    with pytest.raises(TableError, match="is not finished; run `salad stage2 CONFIG` first"):
        export(str(run), target, system="control")
    with pytest.raises(ConfigError, match="is a URL"):
        export(str(run), "s3://bucket/model")
    (run / "stage2" / HAND / "model" / "adapter.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match=r"adapter.safetensors: cannot be read"):
        export(str(run), target)
    (run / "runs" / "newest.json").unlink()
    with pytest.raises(TableError, match="holds a run of an earlier version"):
        export(str(run), target)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
