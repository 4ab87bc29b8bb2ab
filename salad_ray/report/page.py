"""`report/page.html`: one file for a run, or several compared, that needs neither network nor script.

`facts.py` reads, `plots.py` draws, `sections.py` and `accuracy.py` find the words and numbers, and `page.html.j2` sets
them. Whatever comes from data is text: Jinja escapes it, and the page's own policy lets nothing be run or loaded.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from salad_ray.report.accuracy import accuracy_section
from salad_ray.report.facts import RunFacts, collect
from salad_ray.report.grids import number, secs
from salad_ray.report.scaling import scaling_section
from salad_ray.report.sections import (
    cluster_section,
    headline,
    lineage_section,
    misalignment_section,
    rejects_section,
    sentences,
    training_section,
)
from salad_ray.runs import Places
from salad_ray.tables import TableError, write_bytes

__all__ = ["RunFacts", "collect", "write_page"]

AUDIO_BYTES = 5_500_000
"""Room for all players of a page, in base64; with it a page stays below about 8 MB."""
NUM_UNFOLDED = 2
"""Clusters whose passages are unfolded from the start."""


def write_page(places: Sequence[Places], target: str) -> None:
    """Write the page of these runs, the first being the one that the others are held against.

    Args:
        target: local path or URL of the HTML file.

    Raises:
        TableError: none was named.
    """
    if not places:
        raise TableError("no run was named; name one or more run_dirs")
    runs = [collect(each, AUDIO_BYTES // len(places)) for each in places]
    write_bytes(target, render(runs).encode("utf-8", "replace"))


def render(runs: Sequence[RunFacts]) -> str:
    """The page as HTML."""
    dirs = [run.run_dir for run in runs]
    names = run_names([f"{run.run_dir}/{run.name}" if dirs.count(run.run_dir) > 1 else run.run_dir for run in runs])
    pairs = list(zip(names, runs, strict=True))
    environment = Environment(
        loader=PackageLoader("salad_ray.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"player": player, "code": code}
    return environment.get_template("page.html.j2").render(
        title=" · ".join(names),
        headline=headline(pairs),
        sentences=[(name, found) for name, run in pairs if (found := sentences(run.metrics))],
        accuracy=accuracy_section(pairs),
        misalignment=misalignment_section(pairs),
        training=training_section(pairs),
        clusters=[(name, cluster_section(number, run), run) for number, (name, run) in enumerate(pairs)],
        scaling=[(name, scaling_section(number, run)) for number, (name, run) in enumerate(pairs)],
        rejects=rejects_section(pairs),
        lineage=lineage_section(pairs),
        runs=pairs,
        problems=[(name, problem) for name, run in pairs for problem in run.problems],
        num_unfolded=NUM_UNFOLDED,
        number=number,
        secs=secs,
    )


def player(audio: bytes) -> str:
    return "data:audio/mpeg;base64," + base64.b64encode(audio).decode()


def code(text: str) -> Markup:
    """Text whose parts between backticks are set as code."""
    parts = (
        Markup("<code>{}</code>").format(part) if odd % 2 else escape(part) for odd, part in enumerate(text.split("`"))
    )
    return Markup("").join(parts)


def run_names(run_dirs: Sequence[str]) -> list[str]:
    """The last part of each path, or as many parts as tell the runs apart."""
    parts = [run_dir.rstrip("/").split("/") for run_dir in run_dirs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({number})" for number, name in enumerate(names, 1)]
