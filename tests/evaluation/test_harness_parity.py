"""Trust: text accuracy is that of lm-evaluation-harness, item by item, on real items and with a real (small) text LM.

The harness (0.4.13) runs its own tasks and its own model class, with local files in the place of the hub's; without it
the tests are skipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from salad_ray.evaluation.benchmarks import exemplar_of, prompt_of, read_items
from salad_ray.evaluation.scoring import batches, predict, score, text_query
from salad_ray.model.loading import load_tokenizer
from salad_ray.model.speech_lm import load_text_lm
from salad_ray.tables import Item

harness = pytest.importorskip("lm_eval.evaluator", reason="lm-evaluation-harness is not installed")

TASKS = {  # the harness' own, below its folder of tasks
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}
CONTEXT = 1024


def hub_row(benchmark: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row as the hub's data set has it, on which the harness' task is written."""
    if benchmark not in ("arc_challenge", "openbookqa"):
        return row
    choices = row["question"]["choices"]
    columns = {name: [choice[name] for choice in choices] for name in ("text", "label")}
    stem = "question" if benchmark == "arc_challenge" else "question_stem"
    return {"id": row["id"], stem: row["question"]["stem"], "choices": columns, "answerKey": row["answerKey"]}


def run_harness(benchmark: str, rows: list[dict[str, Any]], num_shots: int, folder: Path, model: str) -> list[Any]:
    """The harness' record of each item; the first `num_shots` rows are the exemplars of the others."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    files = {"train": rows[: max(num_shots, 1)], "validation": rows[num_shots:]}
    for name, content in files.items():
        lines = [json.dumps(hub_row(benchmark, row)) + "\n" for row in content]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    own = {
        "include": str(Path(harness.__file__).parent / "tasks" / TASKS[benchmark]),
        "task": f"local_{benchmark}",
        "dataset_path": "json",
        "dataset_name": None,
        "test_split": None,
        "dataset_kwargs": {
            "data_files": {name: str(folder / f"{name}.jsonl") for name in files},
            "cache_dir": str(folder / "cache"),
        },
        "fewshot_config": {"sampler": "first_n", "split": "train"},
    }
    (folder / "tasks").mkdir()
    (folder / "tasks" / "local.yaml").write_text(yaml.safe_dump(own))
    lm = HFLM(pretrained=load_text_lm(model, None, torch.float32), tokenizer=load_tokenizer(model, None), batch_size=8)
    results = harness.simple_evaluate(
        lm,
        tasks=[own["task"]],
        num_fewshot=num_shots,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
    )
    return sorted(results["samples"][own["task"]], key=lambda sample: sample["doc_id"])


@pytest.mark.parametrize(
    ("benchmark", "num_items", "num_shots"),
    [*((name, 40, 0) for name in TASKS), ("hellaswag", 16, 3), ("arc_challenge", 16, 5)],
)
def test_every_item_scores_as_in_the_harness(
    shared_data: Path, tmp_path: Path, benchmark: str, num_items: int, num_shots: int
) -> None:
    lines = (shared_data / "benchmarks" / f"{benchmark}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[: num_items + num_shots]]
    path = str(shared_data / "models" / "tiny-teacher")
    samples = run_harness(benchmark, rows, num_shots, tmp_path, path)
    assert len(samples) == num_items

    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = [item for item in read_items(benchmark, str(tmp_path / "items.jsonl")) if isinstance(item, Item)]
    exemplars, asked = [exemplar_of(item) for item in items[:num_shots]], items[num_shots:]
    tokenizer = load_tokenizer(path, None)
    queries = [text_query(tokenizer, exemplars, item, CONTEXT) for item in asked]
    model = load_text_lm(path, None, torch.float32)
    values = {
        i: own
        for batch in batches(queries, 4096)
        for i, own in zip(batch, score(model, [queries[i] for i in batch]), strict=True)
    }

    for i, (item, sample) in enumerate(zip(asked, samples, strict=True)):
        prompt = "\n\n".join([*exemplars, prompt_of(item)])
        assert list(map(tuple, sample["arguments"])) == [(prompt, f" {choice}") for choice in item.choices]
        assert queries[i].num_shots == num_shots
        theirs = [float(value) for ((value, _),) in sample["resps"]]
        np.testing.assert_allclose(values[i], theirs, rtol=1e-5)
        prediction, prediction_norm = predict(values[i], item.choices)
        assert None not in (prediction, prediction_norm)
        assert (prediction == item.answer) == sample["acc"]
        assert (prediction_norm == item.answer) == sample["acc_norm"]
