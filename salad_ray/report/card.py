"""The model card that travels with a model: what it is, what it heard, under which licences, and its numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from salad_ray import __version__
from salad_ray.config import path_name
from salad_ray.evaluation.statistics import METRICS
from salad_ray.names import ACTIVE, BASE, CASCADE, CATALOG, NATURAL, TEXT, UNTRAINED, UTTERANCES, WEB
from salad_ray.report.accuracy import answer_tables, margin_sentences, robustness_tables
from salad_ray.report.blocks import Block, Paragraph
from salad_ray.report.measured import RECORDED, measured_tables
from salad_ray.runs import Places, Run


@dataclass(frozen=True)
class SpeechData:
    """Training speech of one corpus under one licence."""

    corpus: str
    license: str
    hours: float
    attribution: str


def speech_data(run: Run, sets: Sequence[str]) -> list[SpeechData]:
    """The speech of these sets: hours of each corpus and licence, and whom to name for it."""
    return speech_of_run(run.places, sets, run.config.ingest.model_dump())


def speech_of_run(places: Places, sets: Sequence[str], ingest: Mapping[str, Any]) -> list[SpeechData]:
    """As `speech_data`, from the tables alone, and from the config's section as data."""
    catalog = places.table(NATURAL, CATALOG).manifest() or {"attributions": {}}
    credits = {
        NATURAL: catalog["attributions"],
        ACTIVE: {_name(corpus): corpus.get("attribution") for corpus in _corpora(ingest, WEB)},
    }
    found = []
    for name in sets:
        manifest = places.table(name, UTTERANCES).manifest() or {"totals": {"hours_by_corpus": {}}}
        voice = f" ({manifest['synthesizer']})" if "synthesizer" in manifest else ""
        for corpus, by_license in manifest["totals"]["hours_by_corpus"].items():
            credit = credits[name].get(corpus) or ""
            found += [SpeechData(f"{corpus}{voice}", license, hours, credit) for license, hours in by_license.items()]
    return found


def text_alone(ingest: Mapping[str, Any]) -> list[str]:
    """What was read in training and never heard, with licence and whom to name, from the config's section as data."""
    found = []
    for corpus in _corpora(ingest, TEXT):
        facts = [corpus.get("license") or "licence as its documents state it", corpus.get("attribution")]
        found.append(f"{_name(corpus)} ({', '.join(filter(None, facts))})")
    return found or ["the embedded world's documents (CC0-1.0)"]


def _corpora(ingest: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    return [corpus if isinstance(corpus, dict) else {"path": corpus} for corpus in ingest.get(name) or ()]


def _name(corpus: dict[str, Any]) -> str:
    return str(corpus.get("name") or path_name(corpus["path"]))


def model_card(
    stage: str,
    teacher: dict[str, Any],
    encoder: dict[str, Any],
    speech: Sequence[SpeechData],
    alpha: float,
    stride: int = 1,
    word_ends: bool = False,
    text: Sequence[str] = (),
    exported: Mapping[str, Any] | None = None,
) -> str:
    """The card as Markdown.

    Args:
        teacher: the manifest of the stage `teacher`.
        encoder: what `encode` wrote about the encoder.
        stride: frames side by side at a position.
        word_ends: whether the ends of spoken words were compared, too.
        text: corpora of text alone that it was trained on (`text_alone`).
        exported: what the card of an export tells besides.
    """
    loader = PackageLoader("salad_ray.report", "")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cell": cell, "pinned": _pinned}
    return environment.get_template("card.md.j2").render(
        stage=stage,
        version=__version__,
        teacher=teacher,
        encoder=encoder,
        speech=speech,
        alpha=alpha,
        stride=stride,
        word_ends=word_ends,
        text=text,
        non_commercial=any(re.search(r"\bNC\b", row.license.upper()) for row in speech),
        exported=exported,
    )


def cell(text: str) -> str:
    """Text of a corpus in a table of Markdown: on one line, and neither a column's end nor HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _pinned(weights: Mapping[str, Any]) -> str:
    return f" at revision {weights['revision']}" if weights.get("revision") else ""


def card_numbers(metrics: dict[str, Any], system: str) -> list[Block]:
    """What was measured of a system: M before and after, F, and what it answers, in the tables of the page."""
    names = ("hearing_margins", "hearing_margins_norm", "accuracy", "gaps", "robustness")
    own = {name: [row for row in metrics.get(name) or [] if row["system"] in (BASE, system, CASCADE)] for name in names}
    spoken, recorded = (
        {"": {name: found[name] for name in (UNTRAINED, system) if name in found}}
        for found in (metrics, metrics.get("recorded") or {})
    )
    return [
        *measured_tables(spoken, ", held-out text that was spoken,", ["side"]),
        *measured_tables(recorded, f"{RECORDED},", ["side"]),
        *map(Paragraph, margin_sentences(own, (system,))),
        *(table for metric in METRICS for table in answer_tables({"": own}, metric)),
        *robustness_tables({"": own}),
    ]
