"""`export`: a trained model as a folder to keep or to publish: weights, card, config, lineage and numbers.

Neither Ray nor DeepSpeed is needed, to write it or to load it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from salad_ray import __version__
from salad_ray.config import ConfigError
from salad_ray.distill.step import DTYPES
from salad_ray.model.loading import is_hub_id, weights_fingerprint
from salad_ray.model.speech_lm import SpeechLM, replacing
from salad_ray.names import ACTIVE, CONTROL, ENCODE, FEATURES, INGEST, NATURAL, STAGE1, STAGE2, TEACHER, UTTERANCES
from salad_ray.report.card import card_numbers, model_card, speech_of_run, text_alone
from salad_ray.runs import Places, open_places
from salad_ray.speech.readers import language_code
from salad_ray.tables import Table, TableError, local_folder, read_json, table_label, write_json

LINEAGE = "salad_ray.lineage/1"
SETS = {STAGE1: (NATURAL,), STAGE2: (NATURAL, ACTIVE), CONTROL: (NATURAL,)}
"""What speech each system was trained on."""
FILES = {
    *("config.json", "adapter.safetensors", "llm"),
    *("README.md", "config.yaml", "lineage.json", "metrics.json"),
}
_FACTS = (
    *("stage", "version", "config", "inputs", "sources", "schema_version", "salad_ray", "written_at"),
    *("num_input", "num_kept", "num_rejected", "num_rows", "totals", "synthesizer", "step"),
    *("num_positions", "num_text_positions", "train_seconds"),
)
"""What lineage.json repeats of a manifest; shards, curves and the like stay in the run."""
_VERSION = re.compile(r"[0-9a-f]{12}-[0-9a-f]{8}")
_HUB_LICENSES = re.compile(r"cc0-1\.0|cc-by(-nc)?(-nd|-sa)?-[1-4]\.0|apache-2\.0|mit|bsd-[23]-clause|odc-by|unlicense")


@dataclass(frozen=True)
class _Run:
    """A finished system of a run and what is known of it."""

    places: Places
    config: dict[str, Any]
    """As plain data."""
    system: str
    manifest: dict[str, Any]
    teacher: dict[str, Any]
    features: dict[str, Any]
    """Manifests."""
    metrics: dict[str, Any]
    """The report's numbers, none before there is a report."""


def export(
    run_dir: str, target: str, system: str | None = None, dtype: str | None = None, name: str | None = None
) -> Path:
    """Write a run's model to a folder that `SpeechLM.from_pretrained` loads, and its `llm/` as a plain causal LM.

    The folder appears whole or not at all; an earlier export or speech LM at `target` is replaced.

    Args:
        run_dir: a local folder or a URL.
        target: a local folder.
        system: stage1, stage2 or control; unset: stage2 if it is finished, else stage1.
        dtype: "bf16" or "fp32"; unset: that of the run.
        name: of a run in `run_dir`; unset: the newest.

    Raises:
        ConfigError: a system or dtype that there is not, or a target that holds something else.
        TableError: it is no run, the system is not finished, or the report is of another model.
        ModelError: the model's folder is damaged.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: a model can be exported as {' or '.join(DTYPES)}")
    run = _open(run_dir.rstrip("/"), system, name)
    place = _require_replaceable(target, run.places)
    with local_folder(f"{run.places.table('', run.system).url}/model") as folder:
        model = SpeechLM.from_pretrained(folder, None if dtype is None else DTYPES[dtype])
    with replacing(place) as new:
        model.save_pretrained(new)
        _describe(run, model, new)
        _share(new)
    return place


def _open(run_dir: str, system: str | None, name: str | None) -> _Run:
    places, config = open_places(run_dir, name)
    if system is not None and system not in SETS:
        raise ConfigError(f"system={system}: a run's systems are {', '.join(SETS)}")
    if system is None:
        system = STAGE2 if places.table("", STAGE2).manifest() else STAGE1
    manifest = _finished(places, system, STAGE2 if system == CONTROL else system)
    teacher, features = _finished(places, TEACHER, TEACHER), _finished(places, table_label(NATURAL, FEATURES), ENCODE)
    url = f"{places.report_url}/metrics.json"
    metrics = read_json(url) or {}
    # A training is known by its seconds.
    if system in metrics and metrics[system].get("train_seconds") != manifest["train_seconds"]:
        raise TableError(f"{url} is of another {system} model; run `salad run CONFIG`")
    return _Run(places, config, system, manifest, teacher, features, metrics)


def _finished(places: Places, label: str, writer: str) -> dict[str, Any]:
    table = places.labelled(label)
    manifest = table.manifest()
    if manifest is None:
        raise TableError(f"{table.url} is not finished; run `salad {writer} CONFIG` first")
    return manifest


def _require_replaceable(target: str, places: Places) -> Path:
    if "://" in target:
        raise ConfigError(f"{target}: is a URL; export to a local folder and copy that")
    place = Path(target).expanduser().absolute()
    if place.exists() and not place.is_dir():
        raise ConfigError(f"{target}: is a file; give the name of a folder")
    own = {Path(places.table("", name).url, "model").resolve() for name in SETS if "://" not in places.run_dir}
    if place.resolve() in own:
        raise ConfigError(f"{target}: is the run's own model; give another folder")
    found = {entry.name for entry in place.iterdir()} if place.is_dir() else set()
    foreign = sorted(found - FILES)
    if foreign or (found and not _is_speech_lm(place)):
        what = f"holds {foreign[0]}, which is" if foreign else "holds files that are"
        raise ConfigError(f"{target}: {what} not of an exported speech LM; give another folder")
    return place


def _is_speech_lm(folder: Path) -> bool:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and str(content.get("format", "")).startswith("salad_ray.speech_lm/")


def _describe(run: _Run, model: SpeechLM, folder: Path) -> None:
    """Everything beside the weights."""
    (folder / "config.yaml").write_text(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True), "utf-8")
    (folder / "README.md").write_text(_card(run, model), encoding="utf-8")
    write_json(f"{folder}/lineage.json", _lineage(run, model))
    if run.metrics:
        write_json(f"{folder}/metrics.json", run.metrics)


def _share(folder: Path) -> None:
    """Weights as readable as the rest: safetensors writes them for their owner alone."""
    mode = (folder / "README.md").stat().st_mode & 0o777
    for file in (path for path in folder.rglob("*") if path.is_file()):
        file.chmod(mode)


# ---------------------------------------------------------------------------------------------------------- lineage


def _lineage(run: _Run, model: SpeechLM) -> dict[str, Any]:
    """Where the model comes from: every table that led to it, by version, and all weights by fingerprint."""
    found = {label: run.places.labelled(label).manifest() for label in run.places.keys}
    tables = {label: manifest for label, manifest in found.items() if manifest is not None}
    facts = {label: {name: table[name] for name in _FACTS if name in table} for label, table in tables.items()}
    measured = [label for label, table in tables.items() if run.manifest["version"] in table["inputs"].values()]
    led, missing = _led_to([run.system], tables)
    judged, _ = _led_to(measured, tables)
    teacher = {name: run.teacher.get(name) for name in ("path", "revision", "tokenizer_hash", "num_parameters")}
    [*_, start] = run.manifest["starts"] or [{}]
    teacher |= {"weights": start.get("teacher_weights"), "precision": run.config["distill"]["precision"]}
    encoder = {"backend": run.features["config"][ENCODE]["backend"], "weights": run.features["sources"]["weights"]}
    return {
        "format": LINEAGE,
        "salad_ray": __version__,
        "system": run.system,
        "weights": weights_fingerprint(model),
        "dtype": str(model.head.dtype).removeprefix("torch."),
        "teacher": teacher,
        "encoder": run.features["encoder"] | encoder,
        "begun_from": run.manifest.get("begun_from"),
        "tables": {label: facts[label] for label in led},
        "missing": missing,
        "measured_with": {label: facts[label] for label in judged if label not in led},
    }


def _led_to(labels: Sequence[str], tables: dict[str, dict[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """The tables that these were made from, themselves included; and inputs that were since deleted or made anew."""
    by_version = {table["version"]: label for label, table in tables.items()}
    led: dict[str, None] = {}
    missing: dict[str, str] = {}
    pending = list(labels)
    while pending:
        label = pending.pop(0)
        if label in led:
            continue
        led[label] = None
        for name, version in tables[label]["inputs"].items():
            if version in by_version:
                pending.append(by_version[version])
            elif _VERSION.fullmatch(str(version)):
                missing[f"{label} ← {name}"] = version
    return list(led), missing


# ------------------------------------------------------------------------------------------------------------- card


def _card(run: _Run, model: SpeechLM) -> str:
    """The model card: front matter as hubs expect, then data, use and numbers."""
    sets, ingest = SETS[run.system], run.config.get(INGEST) or {}
    speech = speech_of_run(run.places, sets, ingest)
    teacher, encoder = (facts | {"path": _shown(facts["path"])} for facts in (run.teacher, run.features["encoder"]))
    is_world = run.teacher["config"].get("model.teacher") == "world"
    if is_world:
        teacher["path"] = "world"
    license = _common_license("CC0-1.0" if is_world else "unknown", [row.license for row in speech])
    front: dict[str, Any] = {"license": license}
    if languages := _languages(run.places.table(NATURAL, UTTERANCES), ingest.get("languages") or ()):
        front["language"] = languages
    front |= {"pipeline_tag": "audio-text-to-text", "library_name": "salad_ray"}
    if _is_on_hub(run.teacher["path"]):
        front |= {"base_model": run.teacher["path"], "base_model_relation": "finetune"}
    front["tags"] = ["speech", "speech-llm", "salad", "arxiv:2510.13632"]
    totals = [(run.places.table(name, FEATURES).manifest() or {}).get("totals", {}) for name in sets]
    num_text = run.manifest.get("num_text_positions", 0)
    return model_card(
        run.system,
        teacher,
        encoder,
        speech,
        run.config["distill" if run.system == STAGE1 else STAGE2]["alpha"],
        model.config.adapter.stride,
        run.config["distill"].get("word_ends", False),
        text_alone(ingest) if num_text else (),
        exported={
            "front": yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
            "license": license,
            "hours": sum(own.get("training_hours", 0.0) for own in totals),
            "num_positions": run.manifest["num_positions"],
            "num_text_positions": num_text,
            "numbers": card_numbers(run.metrics, run.system),
        },
    )


def _shown(path: str | None) -> str | None:
    """A hub id as it is; of a path on the machine of training only the name."""
    if path is None or _is_on_hub(path):
        return path
    return path.rstrip("/").rsplit("/", 1)[-1]


def _is_on_hub(path: str) -> bool:
    return is_hub_id(path) and "://" not in path and not Path(path).exists()


def _common_license(teacher: str, speech: Sequence[str]) -> str:
    """The hub's name of the licence that data and text LLM share; "other" where they differ or one is not known.

    Of text LLMs only the embedded world's is known: it is trained on the world's own text.
    """
    names = {name.lower().replace(" ", "-") for name in (teacher, *speech)}
    name = names.pop()
    return name if not names and speech and _HUB_LICENSES.fullmatch(name) else "other"


def _languages(table: Table, configured: Sequence[str]) -> list[str]:
    """Configured languages, or those of one shard of natural speech: it is dealt by hash, so a shard has them all."""
    found = [table.read(shard, ["language"])["language"].unique().to_pylist() for shard in table.shards()[:1]]
    return sorted({language_code(name) for names in (found or [[]]) for name in (configured or names) if name})
