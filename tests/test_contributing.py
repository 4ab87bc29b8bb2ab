"""The worked example of CONTRIBUTING.md, applied as it stands there to a copy of the package, and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from factories import small_world_config

from salad_ray.runs import open_places
from salad_ray.tables import Table

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PLACE = "salad_ray/stages/durations.py"
NUM_DOCUMENTS = 12


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)


def applied(text: str, diff: str) -> str:
    """A text after a diff without line numbers, whose lines must occur in it exactly once."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    assert text.count(before) == 1, f"CONTRIBUTING.md changes lines that are not there, or not once:\n{before}"
    return text.replace(before, after)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the example applied, and a tiny world's config."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "salad_ray", folder / "salad_ray", ignore=shutil.ignore_patterns("__pycache__"))
    [code], diffs = blocks("python"), blocks("diff")
    assert f"`{PLACE}`" in GUIDE
    (folder / PLACE).write_text(code, encoding="utf-8")
    for name, diff in zip(("names", "flow", "flow", "flow"), diffs, strict=True):
        path = folder / f"salad_ray/{name}.py"
        path.write_text(applied(path.read_text(encoding="utf-8"), diff), encoding="utf-8")
    config: dict[str, Any] = small_world_config(folder)
    config["world"] = {"num_natural": NUM_DOCUMENTS, "num_web": 24, "num_text": 12, "num_heldout": 6}
    config["world"]["num_questions"] = 6
    config["ingest"] = {"num_shards": 2}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


ONE_AFTER_THE_OTHER = """
import contextlib, sys
from salad_ray.cli import main
for command in sys.argv[1:]:
    sys.argv[1:] = command.split()
    with contextlib.suppress(SystemExit):
        main()
"""


def salad(checkout: Path, *commands: str) -> subprocess.CompletedProcess[str]:
    """What the copy's commands do, in one process."""
    return subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER, *commands],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_the_example_makes_its_table(checkout: Path) -> None:
    done = salad(checkout, "durations tiny.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    run = open_places(str(checkout / "run"))[0]
    table = run.table("natural", "durations")
    spoken = {row["utt_id"]: row for row in rows_of(run.table("natural", "utterances"))}
    expected = [
        {"utt_id": utt_id, "num_words": len(row["text"].split()), "duration_secs": row["duration_secs"]}
        for utt_id, row in sorted(spoken.items())
    ]
    assert len(expected) == NUM_DOCUMENTS
    assert sorted(rows_of(table), key=lambda row: row["utt_id"]) == expected
    manifest = table.manifest() or {}
    assert [manifest[f"num_{name}"] for name in ("input", "kept", "rejected")] == [NUM_DOCUMENTS, NUM_DOCUMENTS, 0]
    made = {label for label in run.keys if run.labelled(label).manifest() is not None}
    assert made == {"natural/passages", "natural/utterances", "natural/durations"}, "what it needs, and nothing else"


def rows_of(table: Table) -> list[dict[str, Any]]:
    return [row for shard in table.shards() for row in table.read(shard).to_pylist()]


def test_the_example_is_listed_and_in_its_place(checkout: Path) -> None:
    told = " ".join(salad(checkout, "--help", "run tiny.yaml --dry-run").stdout.split())
    assert "Say how long each utterance is" in told
    assert "stage1 → durations natural → embed web" in told


def test_the_planner_takes_the_line_that_the_guide_gives(checkout: Path) -> None:
    [line] = re.findall(r"`(durations: \{.*?\})`", GUIDE)
    rates = checkout / "salad_ray/scaling/rates.yaml"
    rates.write_text(applied(rates.read_text(encoding="utf-8"), f"+  {line}\n   report: {{start"), encoding="utf-8")
    planned = salad(checkout, "plan tiny.yaml")
    assert planned.returncode == 0, planned.stderr
    assert re.search(rf"durations natural\W+{NUM_DOCUMENTS} passage", planned.stdout)
