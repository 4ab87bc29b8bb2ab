"""Drawing 1 % of 10 million passages beside what one would write with pandas: read all, then `df.sample(weights=…)`.

    python -m benchmarks draw

The passages are made up: ids as FineWeb's, 128 balanced clusters whose M(c) are log-normal with a long tail, γ = 5, in
100 shards of `web/clusters` on the local disk, mostly in the page cache. Both draw in a process of their own, taking
turns; seconds count from after the imports, memory is the peak of the whole process (Linux only). Both may use both
cores. pandas reads only the columns that it needs, its draw has no order that a larger budget would keep, and it needs
no priorities: these are made once, when the passages are clustered, at the rate in the last row.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from salad_ray.selection.draw import bounds, draw, draw_probe, exhausted, priorities
from salad_ray.selection.importance import effective_sample_size, target_share
from salad_ray.tables import Membership, schema_of
from tests.factories import a_table

ROOT = Path(__file__).resolve().parents[1]
NUM_SHARDS, SHARD_SIZE = 100, 100_000
NUM_CLUSTERS, GAMMA, TAIL = 128, 5.0, 0.8  # TAIL: standard deviation of log M(c)
NUM_PROBED = 32  # of each cluster
BUDGET_SHARE = 0.01
SECS_PER_CHAR = 0.065
PAIRS = 3


def run() -> list[dict[str, Any]]:
    """One row per quantity: name, pairs, ours, pandas, and their ratio pair by pair (median, lowest, highest)."""
    with tempfile.TemporaryDirectory(prefix="salad-bench-") as folder:
        written = in_subprocess("write", folder)
        pairs = [(in_subprocess("ours", folder), in_subprocess("pandas", folder)) for _ in range(PAIRS)]
    quantities = ("seconds", "CPU seconds", "peak memory (GB)", "hours drawn, % of the budget", "passages drawn")
    name = f"1 % of {NUM_SHARDS * SHARD_SIZE / 1e6:g} M passages: "
    rows = [
        ratio_row(name + key, *([outcome[key] for outcome in side] for side in zip(*pairs, strict=True)))
        for key in quantities
    ]
    facts = {key: pairs[0][0][key] for key in ("passages looked at, %", "clusters run dry", "effective sample size")}
    rows += [ratio_row(name + key, [value], []) for key, value in facts.items()]
    return [*rows, ratio_row("priorities, millions a CPU second", [written["rate"]], [])]


def ratio_row(name: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    ratios = [left / right for left, right in zip(ours, theirs, strict=False)]
    return {
        "name": name,
        "pairs": len(ratios) or None,
        "ours": median(ours),
        "pandas": median(theirs) if theirs else None,
        "ours/pandas": median(ratios) if ratios else None,
        "min": min(ratios, default=None),
        "max": max(ratios, default=None),
    }


def in_subprocess(task: str, folder: str) -> dict[str, float]:
    """Run a task of this module in a fresh process, whose peak memory then is the task's, and return what it prints."""
    command = [sys.executable, "-m", "benchmarks.draw", task, folder]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def write(folder: str) -> dict[str, float]:
    """Write the shards, and what the manifest would know of the clusters."""
    rng = np.random.default_rng(0)
    table = a_table(folder, "web", "clusters")
    web_share = rng.uniform(0.9, 1.1, NUM_CLUSTERS)
    sizes, chars, secs = np.zeros(NUM_CLUSTERS), np.zeros(NUM_CLUSTERS), 0.0
    for shard in range(NUM_SHARDS):
        ids = passage_ids(SHARD_SIZE, rng)
        started = time.process_time()
        order = priorities(ids, seed=0)
        secs += time.process_time() - started
        labels = rng.choice(NUM_CLUSTERS, SHARD_SIZE, p=web_share / web_share.sum())
        num_chars = np.clip(rng.lognormal(6.3, 0.5, SHARD_SIZE), 40, 1300).astype(np.int64)
        columns = {"passage_id": ids, "cluster_id": labels, "distance": rng.random(SHARD_SIZE), "priority": order}
        columns |= {"num_chars": num_chars, "split": ["train"] * SHARD_SIZE}
        table.write(f"{shard:05d}", pa.table(columns, schema_of(Membership)))
        sizes += np.bincount(labels, minlength=NUM_CLUSTERS)
        chars += np.bincount(labels, num_chars, NUM_CLUSTERS)
    loss = rng.lognormal(-1.5, TAIL, NUM_CLUSTERS)
    np.savez(f"{folder}/known.npz", sizes=sizes, total_secs=chars * SECS_PER_CHAR, distillation=loss)
    return {"rate": NUM_SHARDS * SHARD_SIZE / secs / 1e6}


def passage_ids(number: int, rng: np.random.Generator) -> list[str]:
    digits, parts = rng.bytes(16 * number).hex(), rng.integers(0, 9, number).tolist()
    uuids = (digits[i : i + 32] for i in range(0, 32 * number, 32))
    return [
        f"<urn:uuid:{u[:8]}-{u[8:12]}-{u[12:16]}-{u[16:20]}-{u[20:]}>#{n}" for u, n in zip(uuids, parts, strict=True)
    ]


def known(folder: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Sizes, seconds and P_target of the clusters, and the budget in seconds."""
    with np.load(f"{folder}/known.npz") as arrays:
        sizes, total_secs, loss = (arrays[name] for name in ("sizes", "total_secs", "distillation"))
    return sizes, total_secs, target_share(sizes, loss, GAMMA), BUDGET_SHARE * float(total_secs.sum())


def ours(folder: str) -> dict[str, float]:
    """As the stage `select` does it, but for Ray: one shard after the other."""
    sizes, total_secs, share, budget_secs = known(folder)
    limits = bounds(sizes, total_secs, share, budget_secs, NUM_PROBED)
    table = a_table(folder, "web", "clusters")
    near = pa.concat_tables(below(table.read(shard), limits) for shard in table.shards())
    probe = draw_probe(near, NUM_PROBED)
    found = near.filter(pc.invert(pc.is_in(near["passage_id"], probe["passage_id"].combine_chunks())))
    chosen = draw(found, share, budget_secs)
    if exhausted(found, chosen, limits):
        raise RuntimeError("the bounds were too low")
    dry = np.bincount(chosen["cluster_id"].to_numpy(), minlength=NUM_CLUSTERS) == sizes - NUM_PROBED
    return {
        "passages drawn": len(chosen),
        "hours drawn, % of the budget": 100 * chosen["duration_secs"].to_numpy().sum() / budget_secs,
        "passages looked at, %": 100 * len(near) / sizes.sum(),
        "clusters run dry": int(dry.sum()),
        "effective sample size": effective_sample_size(sizes / sizes.sum(), share, int(sizes.sum())),
    }


def below(rows: pa.Table, limits: np.ndarray) -> pa.Table:
    near = rows.filter(pa.array(rows["priority"].to_numpy() / 2.0**63 < limits[rows["cluster_id"].to_numpy()]))
    return near.append_column("duration_secs", pc.multiply(near["num_chars"].cast(pa.float64()), SECS_PER_CHAR))


def with_pandas(folder: str) -> dict[str, float]:
    """Read everything, sample by weight without replacement, cut at the budget."""
    pd = importlib.import_module("pandas")  # only this process shall carry it
    sizes, _, share, budget_secs = known(folder)
    rows = pd.read_parquet(f"{folder}/web/clusters", columns=["passage_id", "cluster_id", "num_chars"])
    weights = (share / sizes)[rows["cluster_id"].to_numpy()]
    number = int(1.1 * budget_secs / (rows["num_chars"].mean() * SECS_PER_CHAR))
    sample = rows.sample(number, weights=weights, random_state=0)
    secs = sample["num_chars"].to_numpy() * SECS_PER_CHAR
    fits = int(np.searchsorted(secs.cumsum(), budget_secs, side="right"))
    chosen = sample[:fits]
    return {"passages drawn": len(chosen), "hours drawn, % of the budget": 100 * secs[:fits].sum() / budget_secs}


def timed(task: Callable[[str], dict[str, float]], folder: str) -> dict[str, float]:
    """A task's result with what it took."""
    started, cpu_started = time.perf_counter(), time.process_time()
    result = task(folder)
    secs, cpu_secs = time.perf_counter() - started, time.process_time() - cpu_started
    peak_kib = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return result | {"seconds": secs, "CPU seconds": cpu_secs, "peak memory (GB)": peak_kib * 1024 / 1e9}


def main() -> None:
    task, folder = sys.argv[1:]
    importlib.import_module("pandas" if task == "pandas" else "pyarrow")  # before the clock starts
    tasks: dict[str, Callable[[str], dict[str, float]]]
    tasks = {"write": write, "ours": partial(timed, ours), "pandas": partial(timed, with_pandas)}
    print(json.dumps(tasks[task](folder)))


if __name__ == "__main__":
    main()
