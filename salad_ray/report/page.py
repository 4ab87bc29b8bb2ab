"""`report/page.html`: one file for a run, or several compared, that needs neither network nor script.

`facts.py` reads a run, the sections say in blocks what it found, and `page.html.j2` sets them. Whatever comes from data
is text: Jinja escapes it, and the page's own policy lets nothing be run or loaded.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from itertools import groupby

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from salad_ray.report.accuracy import accuracy
from salad_ray.report.blocks import Block
from salad_ray.report.clusters import clusters
from salad_ray.report.facts import collect
from salad_ray.report.headline import headline
from salad_ray.report.measured import misalignment
from salad_ray.report.scaling import scaling
from salad_ray.report.sections import lineage, rejects, training
from salad_ray.runs import Places
from salad_ray.tables import TableError, write_bytes

SECTIONS = (headline, accuracy, misalignment, training, clusters, scaling, rejects, lineage)
"""In their order; each says in blocks what the runs show of its matter."""
AUDIO_BYTES = 5_500_000
"""Room for all players of a page, in base64; with it a page stays below about 8 MB."""


def write_page(places: Sequence[Places], target: str) -> None:
    """Write the page of these runs, the first being the one that the others are held against.

    Args:
        target: local path or URL of the HTML file.

    Raises:
        TableError: none was named.
    """
    if not places:
        raise TableError("no run was named; name one or more run_dirs")
    dirs = [each.run_dir for each in places]
    names = run_names(
        [f"{each.run_dir}/{each.name}" if dirs.count(each.run_dir) > 1 else each.run_dir for each in places]
    )
    titles = names if len(names) > 1 else [""]
    runs = [collect(each, AUDIO_BYTES // len(places), title) for each, title in zip(places, titles, strict=True)]
    environment = Environment(
        loader=PackageLoader("salad_ray.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"player": player, "code": code, "by_kind": by_kind}
    page = environment.get_template("page.html.j2").render(
        title=" · ".join(names),
        problems=[f"{name}: {problem}" for name, run in zip(names, runs, strict=True) for problem in run.problems],
        sections=[section(runs) for section in SECTIONS],
    )
    write_bytes(target, page.encode("utf-8", "replace"))


def by_kind(blocks: Sequence[Block]) -> Iterator[tuple[str, list[Block]]]:
    """Neighbours of a kind stand beside each other."""
    return ((kind, list(group)) for kind, group in groupby(blocks, key=lambda block: block.kind))


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
