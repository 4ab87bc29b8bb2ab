"""What the report is made of: paragraphs, tables, figures and players.

A section is a list of these. The page's template sets them as HTML, the card's as Markdown, and the terminal prints the
tables as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from markupsafe import Markup
from rich.table import Table as RichTable
from rich.text import Text


@dataclass(frozen=True)
class Cell:
    """Text of a table; `mark` follows it as a superscript that `why` explains, `tone` is `up`, `down` or empty."""

    text: str
    mark: str = ""
    why: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Paragraph:
    """Text, of which the parts between backticks are code; `style` is a class of the page, or `h3`, `quote`, `pre`."""

    kind: ClassVar = "paragraph"
    text: str
    style: str = ""


@dataclass(frozen=True)
class Table:
    """Columns, in groups (title, number of columns) where there are several runs, and rows, named by the first cell."""

    kind: ClassVar = "table"
    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    groups: list[tuple[str, int]]
    notes: Sequence[str]
    num_text_columns: int

    def __rich__(self) -> RichTable:
        """As the terminal prints it, closer together than on the page."""
        notes = Text("\n".join(self.notes))
        grid = RichTable(title=Text(self.caption), title_justify="left", caption=notes, caption_justify="left")
        for place, name in enumerate(self.columns):
            grid.add_column(Text(name), justify="left" if place < self.num_text_columns else "right")
        for row in self.rows:
            texts = (re.sub(r"(?<=\d) to (?=[−\d])", "…", cell.text) for cell in row)
            grid.add_row(*(Text(re.sub(r" (?=[±%])|(?<=±) ", "", text)) for text in texts))
        return grid


@dataclass(frozen=True)
class Figure:
    """A drawing with its caption and legend: (mark, colour, dash, name)."""

    kind: ClassVar = "figure"
    svg: Markup
    caption: str
    legend: list[tuple[str, str, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Clip:
    """A spoken text with its player (MP3)."""

    kind: ClassVar = "clip"
    text: str
    about: str
    label: str
    audio: bytes


@dataclass(frozen=True)
class Fold:
    """What is behind a title until it is opened."""

    kind: ClassVar = "fold"
    title: str
    about: str
    blocks: Sequence[Block]
    is_open: bool = False


Block = Paragraph | Table | Figure | Clip | Fold


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; `link` is what the menu calls it, `empty` says what to run where there are no blocks."""

    id: str
    link: str
    title: str
    blocks: Sequence[Block]
    empty: str = ""
    intro: Sequence[str] = ()
