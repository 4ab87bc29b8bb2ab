"""The rows of `gpu.json` as tables, beside the goals, and as rates for the planner. No torch: the runner uses it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

Content = dict[str, Any]


class Goal(NamedTuple):
    """What is aimed at: the best value of a column in some sections, or the worst, is at least so much."""

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


def rows_of(content: Content, *sections: str) -> Iterator[dict[str, Any]]:
    for section in sections:
        yield from content["sections"].get(section, {}).get("rows", [])


def best(content: Content, key: str, *sections: str, choose: Any = max) -> tuple[float, str] | None:
    """The largest value of a column, or the least, and the name of its row."""
    found = [(row[key], row["name"]) for row in rows_of(content, *sections) if row.get(key) is not None]
    return choose(found) if found else None


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
        found = best(content, goal.key, *goal.sections, choose=goal.choose)
        if found is None:
            yield f"{goal.name}: not measured (goal {goal.words})"
        else:
            verdict = "met" if found[0] >= goal.least else "missed"
            yield f"{goal.name}: {found[0]:.3g}, {verdict} (goal {goal.words}; {found[1]})"


def markdown(content: Content) -> str:
    """Everything as tables, goals first."""
    lines = [f"- {line}" for line in verdicts(content)]
    for name, entry in content["sections"].items():
        reason = f": {entry['reason']}" if "reason" in entry else ""
        lines += ["", f"## {entry['title']} (`{name}`, {entry['status']}{reason})", "", *table(entry["rows"])]
    if not content["tiny"]:
        lines += ["", "## For `salad_ray/scaling/rates.yaml`", "", *rates(content)]
    return "\n".join(lines) + "\n"


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

    Each with the row that it is of; whoever configures another way than that one takes another row.
    """
    found = (
        ("training.mfu", "mfu", "training", lambda value: value),
        ("stages.synthesize kokoro.unit, per hour of audio", "audio_per_sec", "kokoro", lambda value: 3600 / value),
        ("stages.encode mimi.unit, per hour of audio", "audio_per_sec", "mimi", lambda value: 3600 / value),
        ("stages.embed sentence_transformers.unit, per passage", "passages_per_sec", "embedding", lambda v: 1 / v),
        ("stages.cluster fit.unit, per passage", "points_per_sec", "kmeans", lambda value: 1 / value),
    )
    lines = [
        f"- `{name}`: {in_unit(measured[0]):.3g} ({measured[1]})"
        for name, key, section, in_unit in found
        if (measured := best(content, key, section)) is not None
    ]
    return lines or ["nothing"]
