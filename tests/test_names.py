"""The names of stages, sets, tables and systems stand as text in `names.py` alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from salad_ray import names

PACKAGE = Path(__file__).resolve().parents[1] / "salad_ray"
NAMES = {value for key, value in vars(names).items() if key.isupper() and isinstance(value, str)}
PREFIXES = (names.measurements_of(""), names.scores_of(""))
ANY = "|".join(sorted(NAMES))
IN_PROSE = re.compile(rf"\b(?:{ANY})/(?:{ANY})\b(?!\.\w)|\b(?:{'|'.join(PREFIXES)})")
"""What no sentence says by chance: a label such as `natural/features`, or how the table of a system begins."""

FIELDS = {"text", "benchmark"}
"""Names that fields of rows and columns of files have, too."""
ELSE = {
    "config.py": {
        "natural": "a value of the type `SetName`",
        "heldout": "a value of the type `SetName`",
        "text": "a column of a corpus, by default",
        "select": "a section of the config",
        "stage2": "a section of the config",
    },
    "pipeline.py": {"report": "the folder of a report", "plan": "the folder of a plan of hours and costs"},
    "distill/losses.py": {"teacher": "whose hidden states a message is about"},
    "distill/trainer.py": {"natural": "a field of `Job`", "teacher": "a key of what a checkpoint keeps"},
    "evaluation/analysis.py": {"report": "the folder of a report"},
    "evaluation/statistics.py": {"text": "a modality"},
    "model/trial.py": {"embed": "a part of a setting's name", "embeddings": "a key of what was found"},
    "report/accuracy.py": {
        "benchmark": "the heading of a column",
        "items": "the heading of a column",
        "text": "a modality",
    },
    "report/clusters.py": {
        "cluster": "the heading of a column",
        "clusters": "the section of a page",
        "selection": "a key of metrics",
    },
    "report/export.py": {"teacher": "a key of the card"},
    "report/facts.py": {"clusters": "a key of the cards' file", "selection": "a key of metrics"},
    "report/headline.py": {"selection": "a key of metrics", "teacher": "a key of the config"},
    "report/measured.py": {"passages": "the heading of a column"},
    "report/words.py": {
        "untrained": "how a system is called on a page",
        "control": "how a system is called on a page",
        "cascade": "how a system is called on a page",
    },
    "scaling/amounts.py": {"items": "a unit", "passages": "a unit"},
    "scaling/memory.py": {"teacher": "a part of the memory"},
    "scaling/plan.py": {"teacher": "a part of the memory"},
    "scaling/rates.py": {"text": "what a rate of reading is of"},
    "scaling/sweep.py": {"selection": "a key of metrics", "stage2": "a section of the config"},
    "selection/importance.py": {"clusters": "a key of metrics"},
    "sequences/plan.py": {"features": "a column"},
    "speech/kaldi.py": {"text": "a file of Kaldi's"},
    "speech/readers.py": {"text": "a column of a corpus"},
    "stages/cluster.py": {
        "centroids": "an array in a file",
        "clusters": "a key of the cards' file",
    },
    "stages/evaluate.py": {"text": "a modality"},
    "stages/ingest.py": {"items": "a fact of a source"},
    "stages/report.py": {"report": "the folder of a report", "selection": "a key of metrics"},
    "stages/shards.py": {"items": "a column"},
    "tables.py": {"text": "a field of a word"},
}
"""File → name that stands there as text → what else it means."""


def found(source: str, file: str = "") -> Iterator[str]:
    """The names that stand in a source as text, and do not mean something else by one of the rules below."""
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            above = [node, *_above(node, parents)]
            if not isinstance(above[1], ast.Expr):  # a docstring
                yield from IN_PROSE.findall(node.value)
                parts = [part for part in re.split("[/#]", node.value) if part in NAMES]
                yield from [] if parts and _means_something_else(parts[0], above, file) else parts


def _above(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[ast.AST]:
    while node in parents:
        node = parents[node]
        yield node


def _means_something_else(name: str, above: list[ast.AST], file: str) -> bool:
    text = above[0]
    for node in above[1:]:
        match node:
            case ast.Subscript(value=ast.Name(id="Literal")):
                return True
            case ast.Call(func=ast.Name(id="stable_hash") | ast.Attribute(attr="add_column")):  # salt, heading
                return True
            case ast.Call(func=ast.Name(id="About")) | ast.keyword(arg="keys"):  # keys of the config
                return True
            case ast.Assign(targets=[ast.Name(id="keys")]) | ast.AnnAssign(target=ast.Name(id="keys")):
                return True
            case ast.Dict(keys=keys) if text in keys:  # of a row, or sections of the config
                return name in FIELDS or file == "configfile.py"
            case ast.Subscript(slice=key) | ast.Call(func=ast.Attribute(attr="get"), args=[key, *_]) if key is text:
                return name in FIELDS
            case ast.Call(func=ast.Attribute(attr="read")) | ast.Assign(targets=[ast.Name(id="columns")]):
                return name in FIELDS and any(isinstance(each, ast.List) for each in above)
    return False


FILES = sorted(
    file for file in (str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")) if file != "names.py"
)


@pytest.mark.parametrize("file", FILES)
def test_no_name_stands_as_text_in_a_second_place(file: str) -> None:
    strange = set(found((PACKAGE / file).read_text(encoding="utf-8"), file))
    assert strange == set(ELSE.get(file, {})), "take it from salad_ray/names.py, or from the step"


def test_what_is_not_looked_at_is_there() -> None:
    assert all((PACKAGE / place).exists() for place in ELSE)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('run.table("natural", "features")', ["natural", "features"]),
        ('stage.inputs["natural/features"]', ["natural/features", "natural", "features"]),
        ('reads = (f"{name}/plan",)', ["plan"]),
        ('table = f"measurements_{system}"', ["measurements_"]),
        ('raise StageError(f"{name}: web/embeddings: {error}")', ["web/embeddings"]),
        ('shares["active"]', ["active"]),
        ('tables = {"passages": 1}', ["passages"]),
        ('if step.set == "text" or name in ("stage1", "stage2"): ...', ["text", "stage1", "stage2"]),
        ('Step("encode", name, keys=("encode", "seed"))', ["encode"]),
        ('passages.read(shard, ["passage_id", "text"])', []),
        ('rows = [{"text": row["text"], "benchmark": row.get("benchmark")} for row in found]', []),
        ('"""Write `natural/features`."""', []),
        ('say("nothing to pack, and no text in natural speech")', []),
        ("run.table(NATURAL, FEATURES)", []),
    ],
)
def test_what_counts_as_a_name(source: str, expected: list[str]) -> None:
    assert sorted(found(source)) == sorted(expected)
