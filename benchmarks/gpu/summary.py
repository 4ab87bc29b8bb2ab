"""The rows of `gpu.json` as tables, beside the goals, and as rates for the planner. No torch: the runner uses it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

Content = dict[str, Any]
Row = dict[str, Any]


class Goal(NamedTuple):
    """What is aimed at: the best value of a column in some sections, or the worst, is at least so much.

    Where rows tell the pipeline's default setting from others (`default`), only the default's is judged.
    """

    name: str
    words: str
    key: str
    sections: tuple[str, ...]
    least: float
    choose: Any = max


GOALS = (
    Goal("MFU of a training step", "≥ 45 % on an H200", "mfu", ("training", "training-compiled"), 0.45),
    Goal("engine / bare PyTorch, positions/s", "≥ 0.95", "ours/bare", ("training-bare",), 0.95),
    Goal("loss: best other time / ours", "≥ 1", "best other/ours", ("loss",), 1.0),
    Goal("loss: dense memory / ours", "≥ 8", "dense/ours memory", ("loss",), 8.0),
    Goal("Kokoro in batches / one at a time", "≥ 3", "ours/bare", ("kokoro",), 3.0),
    Goal("embedding / SentenceTransformer.encode, its faster way", "≥ 0.95", "ours/bare", ("embedding",), 0.95, min),
    Goal("faiss.Kmeans' time / balanced k-means'", "≥ 0.5", "faiss/ours", ("kmeans",), 0.5),
)


def rows_of(content: Content, *sections: str) -> Iterator[Row]:
    """What was measured last; of a section whose latest run is not whole also what only an earlier one has."""
    for section in sections:
        measured: set[str] = set()
        entry = content["sections"].get(section)
        while entry:
            yield from (row for row in entry["rows"] if row["name"] not in measured)
            measured |= {row["name"] for row in entry["rows"] if not row.get("out_of_memory")}
            entry = entry.get("previous")


def judged(content: Content, key: str, *sections: str, choose: Any = max) -> tuple[Row | None, Row | None]:
    """The row of the largest value of a column, or of the least; and one of no default setting that is better."""
    found = [row for row in rows_of(content, *sections) if row.get(key) is not None]
    usual = choose((row for row in found if row.get("default", True)), key=lambda row: row[key], default=None)
    other = max((row for row in found if not row.get("default", True)), key=lambda row: row[key], default=None)
    return usual, other if usual and other and other[key] > usual[key] else None


def verdicts(content: Content) -> Iterator[str]:
    """How sections ended, where not well, and a line for each goal."""
    for name, entry in content["sections"].items():
        if entry["status"] != "done":
            yield f"{name} {entry['status']}: {entry.get('reason', '')}"
    checks = [row for name in content["sections"] for row in rows_of(content, name) if "ok" in row]
    yield f"checks: {sum(row['ok'] for row in checks)} of {len(checks)} within tolerance"
    if content["tiny"]:
        yield "toy shapes: goals are for full size on a GPU"
        return
    for goal in GOALS:
        row, better = judged(content, goal.key, *goal.sections, choose=goal.choose)
        if row is None:
            yield f"{goal.name}: not measured (goal {goal.words})"
        else:
            value, verdict = row[goal.key], "met" if row[goal.key] >= goal.least else "missed"
            beside = f"; best {better[goal.key]:.3g}: {better['name']}" if better else ""
            yield f"{goal.name}: {value:.3g}, {verdict} (goal {goal.words}; {row['name']}{beside})"


def markdown(content: Content) -> str:
    """Everything as tables, runs and goals first."""
    lines = [f"- {', '.join(f'{key} {cell(value)}' for key, value in run.items())}" for run in content["runs"]]
    lines += [f"- {line}" for line in verdicts(content)]
    for name, entry in content["sections"].items():
        lines += ["", f"## {entry['title']} (`{name}`, {ending(entry)})", "", *table(entry["rows"])]
        while entry := entry.get("previous"):
            lines += ["", f"### Before: `{name}`, {ending(entry)}", "", *table(entry["rows"])]
    if not content["tiny"]:
        lines += ["", "## For `salad_ray/scaling/rates.yaml`", "", *rates(content)]
    return "\n".join(lines) + "\n"


def ending(entry: dict[str, Any]) -> str:
    """How a section ended, why, and when it began."""
    reason = f": {entry['reason']}" if "reason" in entry else ""
    began = f", began {entry['began']}" if "began" in entry else ""
    return entry["status"] + reason + began


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A table for each run of rows with the same columns; wide ones, as that of the software, are a list."""
    lines: list[str] = []
    for columns, group in groupby(rows, key=tuple):
        if lines:
            lines.append("")
        if len(columns) > 14:
            lines += [f"- {', '.join(f'{key} {cell(value)}' for key, value in row.items())}" for row in group]
            continue
        lines += ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
        lines += ["| " + " | ".join(cell(row[key]) for key in columns) + " |" for row in group]
    return lines or ["no rows"]


def cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value).replace("|", "/")


def rates(content: Content) -> list[str]:
    """The planner's assumptions that were measured, in its units: seconds of one GPU for one unit of work.

    Each with the row that it is of, and a better one of another setting; whoever configures that takes that row.
    """
    found = (
        ("training.mfu", "mfu", "training", lambda value: value),
        ("stages.synthesize kokoro.unit, per hour of audio", "audio_per_sec", "kokoro", lambda value: 3600 / value),
        ("stages.encode mimi.unit, per hour of audio", "audio_per_sec", "mimi", lambda value: 3600 / value),
        ("stages.embed sentence_transformers.unit, per passage", "passages_per_sec", "embedding", lambda v: 1 / v),
        ("stages.cluster fit.unit, per passage", "points_per_sec", "kmeans", lambda value: 1 / value),
    )
    lines = []
    for name, key, section, in_unit in found:
        row, better = judged(content, key, section)
        if row:
            beside = f"; best {in_unit(better[key]):.3g}: {better['name']}" if better else ""
            lines.append(f"- `{name}`: {in_unit(row[key]):.3g} ({row['name']}{beside})")
    return lines or ["nothing"]
