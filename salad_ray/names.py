"""The names of stages, sets, tables and systems: the one place where they stand as text.

`flow.py` says what they are. A table is named "set/table", or by its name alone where it is the whole run's.
"""

from __future__ import annotations

# Stages.
INGEST, EMBED, CLUSTER, PROBE, SELECT, TEACHER = "ingest", "embed", "cluster", "probe", "select", "teacher"
ALIGN, SYNTHESIZE, ENCODE, PACK, TRUNK = "align", "synthesize", "encode", "pack", "trunk"
STAGE1, STAGE2, MEASURE, EVALUATE, REPORT = "stage1", "stage2", "measure", "evaluate", "report"

# Sets; the probe's is called as its stage.
NATURAL, HELDOUT, BENCHMARK, WEB, TEXT, ACTIVE = "natural", "heldout", "benchmark", "web", "text", "active"

# Tables; that of a stage which trains is called as the stage.
PASSAGES, CATALOG, UTTERANCES, ALIGNED, FEATURES, PLAN = (
    "passages", "catalog", "utterances", "aligned", "features", "plan"
)  # fmt: skip
ITEMS, EXEMPLARS, EMBEDDINGS, CLUSTERS, CENTROIDS, SELECTION = (
    "items", "exemplars", "embeddings", "clusters", "centroids", "selection"
)  # fmt: skip

# Systems that are measured and compared, beside the trained ones: `STAGE1`, `STAGE2` and `CONTROL`, Stage II's table
# without active speech. The first two are the text LLM: with an untrained adapter, and reading.
UNTRAINED, BASE, CONTROL, CASCADE = "untrained", "base", "control", "cascade"


def measurements_of(system: str) -> str:
    """The table of what `measure` finds of a system."""
    return f"measurements_{system}"


def scores_of(system: str) -> str:
    """The table of what a system answers."""
    return f"scores_{system}"
