"""The prose of the docs stays within 100 columns."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_COLUMNS = 100
NAMES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "ARCHITECTURE.md")
DOCS = [path for path in (*(ROOT / name for name in NAMES), *sorted((ROOT / "docs").glob("*.md"))) if path.is_file()]
FENCE = re.compile(r"\s*(```|~~~)")
TABLE = re.compile(r"\s*\|")
LINK = re.compile(r"\s*(?:[-*+] +|\d+\. +)?(?:!?\[[^\]]*\]\(\S+\)|\[[^\]]*\]: \S+|<?https?://\S+)[.,;:)]*\s*")


def prose(text: str) -> Iterator[tuple[int, str]]:
    """The numbered lines of a Markdown file outside code fences and tables, without those that are one link."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced and not TABLE.match(line) and not LINK.fullmatch(line):
            yield number, line


def test_what_counts_as_prose() -> None:
    link = f"- [a page](https://example.org/{'x' * 100})"
    lines = ["one", "```", "code", "```", "| a | b |", "   | c | d |", link, f"https://example.org/{'x' * 100}", "two"]
    assert list(prose("\n".join(lines))) == [(1, "one"), (9, "two")]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_lines_are_short(path: Path) -> None:
    long = [number for number, line in prose(path.read_text(encoding="utf-8")) if len(line) > MAX_COLUMNS]
    assert not long, f"{path.name} has lines of more than {MAX_COLUMNS} columns: {long}"
