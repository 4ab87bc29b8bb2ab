"""The model card that travels with an exported model: what it is, what it heard, under which licences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from salad_ray import __version__
from salad_ray.config import path_name
from salad_ray.runs import Places, Run
from salad_ray.text.documents import text_corpus_name


@dataclass(frozen=True)
class SpeechData:
    """Training speech of one corpus under one licence."""

    corpus: str
    license: str
    hours: float
    attribution: str


def speech_data(run: Run, sets: Sequence[str]) -> list[SpeechData]:
    """The speech of these sets: hours of each corpus and licence, and whom to name for it."""
    web = {text_corpus_name(corpus): corpus.attribution or "" for corpus in run.config.ingest.web}
    return speech_of_run(run.places, sets, web)


def speech_of_run(places: Places, sets: Sequence[str], web: Mapping[str, str]) -> list[SpeechData]:
    """As `speech_data`, from the tables alone; `web` is whom to name for the text of each web corpus."""
    catalog = places.table("natural", "catalog").manifest() or {"attributions": {}}
    credits = catalog["attributions"] | web
    sources = [
        source for name in sets for source in (places.table(name, "utterances").manifest() or {}).get("speech", ())
    ]
    return [SpeechData(**source, attribution=_credit(source["corpus"], credits)) for source in sources]


def _credit(corpus: str, credits: Mapping[str, str]) -> str:
    """Whom to name for a corpus, or for the text that a synthesizer speaks: "fineweb (kokoro)" is of fineweb."""
    return credits.get(corpus, credits.get(re.sub(r" \((espeak|kokoro)\)$", "", corpus), ""))


def text_alone(ingest: Mapping[str, Any]) -> list[str]:
    """What was read in training and never heard, with licence and whom to name, from the config's section as data."""
    corpora = [corpus if isinstance(corpus, dict) else {"path": corpus} for corpus in ingest.get("text") or ()]
    found = []
    for corpus in corpora:
        facts = [corpus.get("license") or "licence as its documents state it", corpus.get("attribution")]
        found.append(f"{corpus.get('name') or path_name(corpus['path'])} ({', '.join(filter(None, facts))})")
    return found or ["the embedded world's documents (CC0-1.0)"]


def model_card(
    stage: str,
    teacher: dict[str, Any],
    encoder: dict[str, Any],
    speech: Sequence[SpeechData],
    alpha: float,
    stride: int = 1,
    word_ends: bool = False,
    text: Sequence[str] = (),
) -> str:
    """The card as Markdown.

    Args:
        teacher: the manifest of the stage `teacher`.
        encoder: what `encode` wrote about the encoder.
        stride: frames side by side at a position.
        word_ends: whether the ends of spoken words were compared, too.
        text: corpora of text alone that it was trained on (`text_alone`).
    """
    ends = ", with a comparison at the end of every spoken word" if word_ends else ""
    rate = f"{encoder['frame_rate']:g} frames a second"
    rate += f", {stride} side by side: {encoder['frame_rate'] / stride:g} positions a second" if stride > 1 else ""
    revision = f" at revision {teacher['revision']}" if teacher["revision"] else ""
    source = encoder["path"] or "no weights"
    pinned = f" at revision {encoder['revision']}" if encoder.get("revision") else ""
    lines = [
        f"# Speech LM, {stage}",
        "",
        f"Distilled by salad_ray {__version__} (SALAD, arXiv 2510.13632) from the text LLM "
        f"`{teacher['path']}`{revision}, α = {alpha:g}{ends}. It hears speech through the encoder {encoder['name']} "
        f"({source}{pinned}, {encoder['sampling_rate']:,} Hz, {rate}).",
        "",
        f"Tokenizer hash: `{teacher['tokenizer_hash']}`. The licence of the text LLM applies to its weights here too.",
        "",
        "## Speech it was trained on",
        "",
        "| corpus | licence | hours | attribution |",
        "| --- | --- | --- | --- |",
        *(
            f"| {cell(row.corpus)} | {cell(row.license)} | {row.hours:,.2f} | {cell(row.attribution)} |"
            for row in speech
        ),
        "",
    ]
    if text:
        lines += [f"Text alone that it was trained on: {cell('; '.join(text))}.", ""]
    if any(re.search(r"\bNC\b", row.license.upper()) for row in speech):
        lines += ["Some of this speech is licensed for non-commercial use only.", ""]
    return "\n".join(lines)


def cell(text: str) -> str:
    """Text of a corpus in a table of Markdown: on one line, and neither a column's end nor HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
