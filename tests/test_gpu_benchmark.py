"""`python -m benchmarks.gpu`: every section at toy shapes, and what a section that misbehaves does to the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.__main__ import SECTIONS, BadRequest, Section, choose, run_sections
from benchmarks.gpu.shapes import make_batches, make_pair, product_flops, shape_of, varlen_anywhere, varlen_on_cpu
from benchmarks.gpu.summary import markdown, verdicts
from benchmarks.gpu.worker import Context
from salad_ray.distill.engine import compile_layers
from salad_ray.distill.step import batch_loss

ROOT = Path(__file__).resolve().parents[1]
TINY = Context(torch.device("cpu"), tiny=True, folder=Path())


def section(name: str, limit_secs: float = 60) -> Section:
    return Section(name, f"gpu_sections:{name}", limit_secs, name)


@pytest.fixture
def with_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))


def runs(pid: int) -> bool:
    """Not what has ended and only waits for its parent to notice."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", *arguments]


def test_every_section_runs_at_toy_shapes_without_ray(tmp_path: Path) -> None:
    """Nothing may fail, and every check is within its tolerance; `ray` is made impossible to import."""
    (tmp_path / "ray.py").write_text("raise RuntimeError('this benchmark may not need Ray')\n")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(
        command("--tiny", "--out", str(tmp_path / "out")), cwd=ROOT, env=env, text=True, capture_output=True
    )
    content = json.loads((tmp_path / "out" / "gpu.json").read_text())
    found = {name: entry["status"] for name, entry in content["sections"].items()}
    assert found == {each.name: "done" for each in SECTIONS}, list(verdicts(content))
    assert ended.returncode == 0, ended.stderr
    rows = {name: {row["name"] for row in entry["rows"]} for name, entry in content["sections"].items()}
    assert sum("step in bf16" in name for name in rows["correctness"]) == 4
    assert len(rows["training"]) == 5
    every = [row for entry in content["sections"].values() for row in entry["rows"]]
    assert not any({"left_out", "failed", "out_of_memory"} & set(row) for row in every)
    bare = content["sections"]["training-bare"]["rows"][0]
    best = max(content["sections"]["training"]["rows"], key=lambda row: row["positions_per_sec"])
    assert bare["name"] == f"{best['name']}, bare"
    assert bare["ours/bare"] == pytest.approx(best["positions_per_sec"] / bare["positions_per_sec"])
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert "| durations that differ | 0 |" in text
    assert "gpu.json" in ended.stdout
    assert "docs/gpu.md" in ended.stdout


def test_a_section_that_misbehaves_stops_no_other(with_sections: None, tmp_path: Path) -> None:
    expected = {
        "fails": "failed", "overruns": "overran", "dies": "failed", "is_wrong": "failed", "has_a_bug": "failed",
        "has_a_nameless_error": "failed", "is_silent": "failed", "crashes_and_leaves_something_behind": "failed",
        "leaves_something_behind": "done", "leaves_a_line_unfinished": "done", "runs_out_of_memory": "done",
        "yields_nan": "done", "lacks_a_package": "left out", "needs_a_later_version": "left out", "good": "done",
    }  # fmt: skip
    wanted = [section(name, limit_secs=25 if name == "overruns" else 60) for name in expected]
    content = run_sections(wanted, tmp_path, tiny=True)
    entries = content["sections"]
    assert {name: entry["status"] for name, entry in entries.items()} == expected
    assert "this section is broken" in entries["fails"]["reason"]
    assert "signal 6" in entries["dies"]["reason"]
    assert "a check" in entries["is_wrong"]["reason"]
    assert entries["lacks_a_package"]["reason"] == "a_package_that_nobody_has is not installed"
    assert "transformers" in entries["needs_a_later_version"]["reason"]
    for name in ("fails", "overruns", "dies", "has_a_nameless_error"):
        assert entries[name]["rows"] == [{"name": "before"}]
    assert len(entries["leaves_a_line_unfinished"]["rows"]) == 3
    assert entries["runs_out_of_memory"]["rows"][1]["out_of_memory"] is True
    assert entries["yields_nan"]["rows"] == [{"name": "a loss", "kl": None}]
    for file in ("child.pid", "left.pid"):
        assert not runs(int((tmp_path / file).read_text()))
    assert json.loads((tmp_path / "gpu.json").read_text()) == content
    assert "a line for the log" in (tmp_path / "good.log").read_text()
    assert "overran: stopped after 25 s" in "\n".join(verdicts(content))


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_keeps_its_rows_and_leaves_no_process(
    kind: signal.Signals, tmp_path: Path, interruptible: None
) -> None:
    code = (
        "import sys; from pathlib import Path; from benchmarks.gpu import __main__ as gpu; "
        "gpu.SECTIONS = tuple(gpu.Section(n, f'gpu_sections:{n}', 100, n) for n in ('good', 'overruns', 'fails')); "
        f"sys.argv = ['gpu', '--tiny', '--out', {str(tmp_path)!r}]; sys.exit(gpu.main())"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, text=True, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "child.pid").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)
    process.send_signal(kind)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in output
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: entry["status"] for name, entry in content["sections"].items()} == {
        "good": "done",
        "overruns": "interrupted",
    }
    assert content["sections"]["overruns"]["rows"] == [{"name": "before"}]
    assert not runs(int((tmp_path / "child.pid").read_text()))


def test_a_second_run_replaces_only_its_own_sections(with_sections: None, tmp_path: Path) -> None:
    run_sections([section("good"), section("is_silent")], tmp_path, tiny=True)
    content = run_sections([section("is_silent")], tmp_path, tiny=True)
    assert list(content["sections"]) == ["good", "is_silent"]
    with pytest.raises(BadRequest, match="--tiny"):
        run_sections([section("good")], tmp_path, tiny=False)


def test_sections_beyond_the_time_of_the_whole_run_are_left_out(tmp_path: Path) -> None:
    content = run_sections([section("good")], tmp_path, tiny=True, minutes=0.1)
    assert content["sections"]["good"]["status"] == "left out"


def test_without_a_gpu_full_shapes_are_left_out(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    content = run_sections([choose(["machine"], tiny=False)[0]], tmp_path, tiny=False)
    assert content["sections"]["machine"]["status"] == "left out"
    assert "--tiny" in content["sections"]["machine"]["reason"]


@pytest.mark.parametrize(
    ("before", "arguments", "said"),
    [
        ("", ["--only", "kokorro"], "no section is called kokorro; there are machine, correctness"),
        ("no json", [], "is no file of this benchmark"),
        ("[1]", [], "is no file of this benchmark"),
    ],
)
def test_bad_requests_are_refused_in_words(before: str, arguments: list[str], said: str, tmp_path: Path) -> None:
    if before:
        (tmp_path / "gpu.json").write_text(before)
    ended = subprocess.run(
        command("--tiny", "--out", str(tmp_path), *arguments), cwd=ROOT, text=True, capture_output=True
    )
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_goals_are_judged_by_the_measured_rows() -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        "training": [{"name": "a", "mfu": 0.41}, {"name": "b", "mfu": 0.47}],
        "loss": [{"name": "ours", "best other/ours": 0.9, "dense/ours memory": None}],
        "embedding": [{"name": "fp32", "ours/bare": 2.0}, {"name": "fp16", "ours/bare": 0.5}],
        "mimi": [{"name": "batch", "audio_per_sec": 900.0}],
    }
    sections = {name: {"title": name, "status": "done", "rows": found} for name, found in rows.items()}
    text = markdown({"tiny": False, "sections": sections})
    assert "MFU of a training step: 0.47, met (goal ≥ 45 % on an H200; b)" in text
    assert "loss: best other time / ours: 0.9, missed" in text
    assert "loss: dense memory / ours: not measured" in text
    assert "its faster way: 0.5, missed" in text
    assert "Kokoro in batches / one at a time: not measured" in text
    assert "`stages.encode mimi.unit, per hour of audio`: 4 (batch)" in text


def test_the_floating_point_operations_of_products_are_those_that_torch_counts() -> None:
    """What `mfu_products` is computed from, but for attention, against torch's counter over a forward and backward."""
    shape = shape_of(TINY)
    teacher, student = make_pair(shape, torch.device("cpu"), torch.float32, "eager")
    [batch] = make_batches(shape, num_rows=1, num_batches=1)
    speech, teacher_width = len(batch.speech_index), batch.teacher_ids.shape[1]
    padded = batch.frame_mask.numel()
    with FlopCounterMode(display=False) as counter:
        batch_loss(student, student.head, teacher, batch, 1.0).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    linear = sum(count for op, count in counts.items() if "bmm" not in str(op) and "attention" not in str(op))
    # The counter sees padding, which the formula leaves out.
    grown = replace(
        batch,
        num_positions=shape.context,
        num_teacher_positions=teacher_width,
        num_pairs=0,
        num_teacher_pairs=0,
        speech_index=torch.arange(padded),
    )
    expected = product_flops(shape, grown)
    # Nobody asks for the gradient of the frames; the adapter's last layer sees real frames only; and the counter knows
    # no addmm_, by which the loss adds up the gradient of the head.
    adapter = shape.adapter
    expected -= 2 * adapter.hidden_size * shape.encoder_dim * padded
    expected -= 6 * adapter.hidden_size * shape.llm.hidden_size * (padded - speech)
    expected -= 2 * shape.llm.vocab_size * shape.llm.hidden_size * len(batch.labels)
    assert linear == pytest.approx(expected, rel=1e-3)


def test_rows_are_those_of_training() -> None:
    shape = shape_of(replace(TINY, tiny=False))
    batches = make_batches(shape, num_rows=4, num_batches=2)
    assert [tuple(batch.token_ids.shape) for batch in batches] == [(4, 2048)] * 2
    fill = sum(batch.num_positions for batch in batches) / (8 * 2048)
    assert fill > 0.97
    speech = sum(len(batch.speech_index) for batch in batches) / sum(batch.num_positions for batch in batches)
    teacher = sum(batch.num_teacher_positions for batch in batches) / sum(batch.num_positions for batch in batches)
    assert 0.5 < speech < 0.75
    assert 0.4 < teacher < 0.65


def test_the_full_shape_is_qwens() -> None:
    shape = shape_of(replace(TINY, tiny=False))
    from salad_ray.scaling.memory import Shape

    numbers = Shape(shape.llm, shape.adapter, shape.encoder_dim)
    assert numbers.num_llm == 3_085_938_688
    assert 110e6 < numbers.num_adapter < 130e6


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_compute_the_same(recompute: bool) -> None:
    shape = shape_of(TINY)
    batches = make_batches(shape, num_rows=2, num_batches=2)
    teacher, student = make_pair(shape, torch.device("cpu"), torch.float32, "sdpa")
    student.gradient_checkpointing(recompute)

    def gradients() -> list[torch.Tensor]:
        student.zero_grad()
        for batch in batches:  # of different widths
            batch_loss(student, student.head, teacher, batch, 1.0).loss.backward()
        return [p.grad.clone() for p in student.parameters() if p.grad is not None]

    expected = gradients()
    for llm in (student.llm, teacher):
        compile_layers(llm, backend="aot_eager")  # type: ignore[arg-type]
    torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-6)
    assert set(student.state_dict()) == set(
        make_pair(shape, torch.device("cpu"), torch.float32, "sdpa")[1].state_dict()
    )


def test_what_is_carried_to_a_machine_without_a_network_is_pinned() -> None:
    makefile = (ROOT / "Makefile").read_text()
    names = makefile.split("WHEELS_OF := ")[1].split("\n\n")[0].replace("\\\n", " ").split("\n")[0].split()
    pinned = {line.partition("==")[0] for line in (ROOT / "locks" / "cpu.txt").read_text().splitlines()}
    assert len(names) > 10
    assert set(names) <= pinned


def test_a_way_whose_package_is_missing_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import loss

    for name in [name for name in sys.modules if name.startswith("liger_kernel")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    rows = {row["name"]: row for row in loss.rows(TINY)}
    assert "liger_kernel" in rows["Liger"]["left_out"]
    assert rows["ours"]["secs"] > 0


def test_attention_without_grouped_heads_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch 2.11 has no `enable_gqa`."""
    from salad_ray.model import speech_lm

    shape = shape_of(TINY)
    [batch] = make_batches(shape, num_rows=2, num_batches=1)
    with varlen_anywhere(TINY):
        _, student = make_pair(shape, torch.device("cpu"), torch.float32, "varlen")
        expected = student.text_hidden(batch.teacher_ids, batch.teacher_position_ids)
        seen = []

        def older(*args: Any, **settings: Any) -> torch.Tensor:
            assert "enable_gqa" not in settings
            seen.append(args[0].shape[1] == args[1].shape[1])
            return varlen_on_cpu(*args, **settings)

        monkeypatch.setattr(speech_lm, "varlen_attn", older)
        monkeypatch.setattr(speech_lm, "_knows_gqa", lambda: False)
        found = student.text_hidden(batch.teacher_ids, batch.teacher_position_ids)
    assert seen == [True] * shape.llm.num_hidden_layers
    torch.testing.assert_close(found, expected)
