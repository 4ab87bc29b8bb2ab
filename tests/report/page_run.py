"""A small finished run, made by hand of true tables, for the tests of the page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from factories import hand_table, keep_run

from salad_ray.tables import Cluster, Measurement, Passage, Reject, Table, Utterance, to_arrow, write_json

SECS = 1.5
RATE = 22_050
TERMS = (["judge", "signs"], ["comet", "ice"])
"""Of the clusters 0, which was never heard, and 1."""


def tone(secs: float = SECS) -> bytes:
    """A quiet tone as FLAC."""
    file = io.BytesIO()
    wave = 0.2 * np.sin(2 * np.pi * 330 * np.arange(round(secs * RATE)) / RATE)
    soundfile.write(file, wave, RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def finish(table: Table, row_type: type, rows: list[Any], stage: str, **facts: Any) -> None:
    table.write("part-00000", to_arrow(row_type, rows))
    manifest(table, stage, num_rows=len(rows), shards={"part-00000": len(rows)}, **facts)


def manifest(table: Table, stage: str, **facts: Any) -> None:
    origin = {"fingerprint": "f00d", "version": "f00d-1", "inputs": {"passages": "cafe-2"}, "schema_version": 3}
    written = {"salad_ray": "0.1.0", "written_at": "2026-11-21T12:00:00Z"}
    write_json(f"{table.url}/manifest.json", {"stage": stage, "config": {}} | origin | written | facts)


def quantities(misalignment: float, forgetting: float, num_scored: int = 100) -> dict[str, float]:
    values = {"misalignment": misalignment, "forgetting": forgetting, "distillation": misalignment + forgetting}
    values |= {f"{name}_whole": 7 * value for name, value in values.items()}
    errors = {f"{name}_standard_error": 0.05 * value for name, value in values.items()}
    counts = {"num_scored": num_scored, "num_passages": 9, "num_scored_whole": 40, "num_passages_whole": 9}
    return values | errors | counts


def system(heard: float, unheard: float, forgetting: float, domains: tuple[str, str]) -> dict[str, Any]:
    parts = {domains[0]: {"heard": False} | quantities(unheard, 2 * forgetting)}
    parts |= {domains[1]: {"heard": True} | quantities(heard, forgetting, 300)}
    mean = (unheard + 3 * heard) / 4
    by_distance = {"0": quantities(2 * mean, forgetting), "1": quantities(mean, forgetting)}
    return quantities(mean, forgetting) | {"by_domain": parts, "by_distance": by_distance}


def accuracy(system_name: str, modality: str, value: float, **other: Any) -> dict[str, Any]:
    row = {"system": system_name, "benchmark": "world", "modality": modality, "condition": "clean", "metric": "acc"}
    ends = {"accuracy": value, "ci_low": value - 0.05, "ci_high": value + 0.05, "num_items": 200}
    return row | ends | {"num_ties": 0, "num_short": 0, "heard": None, "word_error_rate": None} | other


def metrics(domains: tuple[str, str] = ("law", "stars"), stage2: float = 0.16) -> dict[str, Any]:
    shares = {"web_share": 0.5, "num_probed": 2, "num_selected": 1, "hours_selected": 0.01}
    losses = ((0, 1.5, 0.99, domains[0]), (1, 0.1, 0.01, domains[1]))
    by_cluster = [
        {"cluster_id": place, "distillation": loss, "standard_error": 0.1, "target_share": share, "domains": {name: 2}}
        for place, loss, share, name in losses
    ]
    gap = {
        "system": "stage2",
        "benchmark": "world",
        "metric": "acc",
        "topline": 0.95,
        "accuracy": 0.8,
        "num_items": 200,
    }
    margin = {"metric": "acc", "benchmark": "world", "chance": 0.25, "choices": 0.26, "swapped": 0.24, "silence": 0.27}
    margin |= {"silence_ci99_low": 0.2, "silence_ci99_high": 0.35, "num_items": 200, "reading": 0.95, "heard": None}
    hears = {"system": "stage2", "accuracy": 0.8, "margin": 0.53, "ci_low": 0.45, "ci_high": 0.6, "gap": 0.15}
    deaf = {"system": "stage1", "accuracy": 0.3, "margin": 0.03, "ci_low": -0.02, "ci_high": 0.08, "gap": 0.65}
    return {
        "untrained": system(2.2, 2.4, 0.0, domains),
        "stage1": system(0.12, 1.2, 0.12, domains),
        "stage2": system(0.1, stage2, 0.03, domains),
        "control": system(0.1, 1.25, 0.13, domains),
        "measured_differences": [
            {"system_a": "stage2", "system_b": "control", "quantity": "misalignment", "protocol": protocol}
            | {"heard": None, "difference": shift, "standard_error": 0.1, "ci_low": shift - 0.2, "ci_high": shift + 0.2}
            | {"num_passages": 9, "num_units": 9}
            for protocol, shift in (("interleaved", -0.31), ("whole", -1.25))
        ],
        "selection": {
            "protocol": "interleaved",
            "by_protocol": {
                "interleaved": {"reliability": 0.97, "unheard_auc": 1.0},
                "whole": {"reliability": 0.9, "unheard_auc": 0.875},
            },
            "gamma": 5.0,
            "budget_hours": 0.5,
            "hours": 0.49,
            "effective_sample_size": 321.0,
            "num_web_passages": 40,
            "reliability": 0.97,
            "by_cluster": [shares | row for row in by_cluster],
            "unheard_auc": 1.0,
        },
        "accuracy": [
            accuracy("base", "text", 0.95),
            accuracy("stage1", "speech", 0.5, num_ties=3),
            accuracy("stage2", "speech", 0.8, num_short=7),
            accuracy("stage2", "speech", 0.85, heard=False),
            accuracy("stage2", "speech", 0.6, condition="telephone"),
            accuracy("stage2", "speech", 0.27, condition="silence"),
            accuracy("cascade", "speech", 0.9, word_error_rate=0.125),
        ],
        "hearing_margins": [
            margin | deaf | {"deaf": True},
            margin | deaf | {"deaf": True, "heard": False},
            margin | hears | {"deaf": False},
        ],
        "gaps": [
            gap | {"modality": "speech", "gap": 0.15, "ci_low": 0.1, "ci_high": 0.2, "p_value": 1e-4, "num_items": 200},
            gap | {"modality": "text", "gap": 0.02, "ci_low": 0.0, "ci_high": 0.04, "p_value": 0.3, "num_items": 200},
        ],
    }


def curve(start: float, num_steps: int) -> list[dict[str, float]]:
    steps = range(10, num_steps + 1, 10)
    return [
        {"step": step, "num_positions": 1000 * step, "loss": start / step, "kl": start / step, "nll": 1 + start / step}
        | {"learning_rate": 5e-4, "positions_per_sec": 7000.0, "skipped_steps": 0, "memory_gib": 1.2}
        for step in steps
    ]


def utterances(set_name: str, texts: dict[int, str], domains: tuple[str, str]) -> list[Utterance]:
    return [
        Utterance(
            utt_id=f"{set_name}-{cluster}-{number}",
            text=f"{text} Number {number}.",
            duration_secs=SECS,
            recording_id=f"{set_name}-{cluster}-{number}",
            corpus="world",
            speaker="espeak:en-gb",
            domain=domains[cluster],
            cluster_id=cluster,
            audio=tone(),
        )
        for cluster, text in texts.items()
        for number in range(3)
    ]


LABELS = (
    *("web/passages", "teacher", "natural/features", "stage1", "web/centroids", "probe/utterances"),
    *("probe/measurements_stage1", "active/utterances", "stage2", "control"),
)


def make_run(
    run_dir: str | Path,
    domains: tuple[str, str] = ("law", "stars"),
    text: str = "The judge Clara signs the treaty.",
    gamma: float = 5.0,
    stage2: float = 0.16,
) -> str:
    """Write the run; cluster 0 is of the first domain, which was never heard."""
    run_dir = str(run_dir)
    config = {"run_dir": run_dir, "model": {"teacher": "world"}, "select": {"gamma": gamma}, "distill": {"alpha": 1.0}}
    places = keep_run(run_dir, config, LABELS)
    write_json(f"{places.report_url}/metrics.json", metrics(domains, stage2))
    passages = [Passage(passage_id=f"p{place}", doc_id="d", text=text) for place in range(4)]
    finish(hand_table(run_dir, "web/passages"), Passage, passages, "ingest", num_rejected=3, seconds=61.0)
    rejects = [
        Reject("ingest", "p7", "silent: -80.1 dBFS, below min_level_dbfs=-75"),
        Reject("ingest", "p8", "silent: -91.0 dBFS, below min_level_dbfs=-75"),
        Reject("ingest", "p9", f"no such audio file: /data/{text[:8].strip()}.wav"),
    ]
    hand_table(run_dir, "web/passages").rejects.write("part-00000", to_arrow(Reject, rejects))
    centroids = hand_table(run_dir, "web/centroids")
    rows = [
        Cluster(
            cluster_id=place,
            centroid=np.eye(4, dtype=np.float32)[place].tobytes(),
            price=0.0,
            web_share=0.5,
            num_passages=20,
            num_chars=900,
        )
        for place in range(2)
    ]
    finish(centroids, Cluster, rows, "cluster")
    cards = [{"cluster_id": place, "terms": TERMS[place], "closest": [text]} for place in range(2)]
    write_json(f"{centroids.url}/cards.json", {"clusters": cards})
    for set_name in ("probe", "active"):
        spoken = utterances(set_name, {0: text, 1: "A comet of ice."}, domains)
        finish(hand_table(run_dir, f"{set_name}/utterances"), Utterance, spoken, "synthesize", seconds=2.0)
    measured = [
        Measurement(
            system="stage1",
            passage="probe-0-0",
            domain=domains[0],
            distance=distance,
            num_positions=4,
            misalignment=0.0,
            forgetting=0.0,
            distillation=6.0,
            nll_speech=0.0,
            nll_text=0.0,
        )
        for distance in (0, 1)
    ]
    finish(hand_table(run_dir, "probe/measurements_stage1"), Measurement, measured, "measure")
    encoder = {"name": "log_mel", "frame_rate": 12.5, "dim": 640, "path": None}
    totals = {"hours": 10.7, "training_hours": 10.5}
    manifest(hand_table(run_dir, "natural/features"), "encode", totals=totals, encoder=encoder, num_rows=3000)
    manifest(hand_table(run_dir, "teacher"), "teacher", num_parameters=773_760, path="model", seconds=30.0)
    for name, start, num_steps in (("stage1", 10.0, 100), ("stage2", 5.0, 50), ("control", 4.0, 50)):
        log = curve(start, num_steps)
        manifest(hand_table(run_dir, name), name, log=log, num_positions=1000 * num_steps, train_seconds=120.0)
    return run_dir
