"""`python -m benchmarks.gpu`: every section at toy shapes, and what a section that misbehaves does to the others."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import correctness
from benchmarks.gpu.__main__ import SECTIONS, BadRequest, Results, Section, choose, run_sections
from benchmarks.gpu.shapes import make_batches, make_pair, product_flops, shape_of
from benchmarks.gpu.summary import markdown, rows_of, verdicts
from benchmarks.gpu.worker import Context
from salad_ray.distill.engine import compile_layers
from salad_ray.distill.step import batch_loss
from salad_ray.model import packed

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


@pytest.mark.slow
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
    assert sum("step in bf16" in name for name in rows["correctness"]) == 6
    assert len(rows["training"]) == 5
    every = [row for entry in content["sections"].values() for row in entry["rows"]]
    assert not any({"left_out", "failed", "out_of_memory"} & set(row) for row in every)
    bare = content["sections"]["training-bare"]["rows"][0]
    best = max(content["sections"]["training"]["rows"], key=lambda row: row["positions_per_sec"])
    assert bare["name"] == f"{best['name']}, bare"
    assert bare["ours/bare"] == pytest.approx(best["positions_per_sec"] / bare["positions_per_sec"])
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert "| durations that differ | 0 |" in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gpu.json", "gpu.log", "gpu.md"}
    [run] = content["runs"]
    assert run["command"].startswith("python -m benchmarks.gpu --tiny --out ")
    assert set(run) == {"date", "commit", "command", "gpu, memory, driver"}
    assert "gpu.json" in ended.stdout
    assert "docs/gpu.md" in ended.stdout


@pytest.mark.slow
def test_a_section_that_misbehaves_stops_no_other(with_sections: None, tmp_path: Path) -> None:
    expected = {
        "fails": "failed", "overruns": "overran", "dies": "failed", "is_wrong": "failed", "has_a_bug": "failed",
        "has_a_nameless_error": "failed", "is_silent": "failed", "crashes_and_leaves_something_behind": "failed",
        "leaves_something_behind": "done", "leaves_a_line_unfinished": "done", "runs_out_of_memory": "done",
        "yields_nan": "done", "lacks_a_package": "left out", "needs_a_later_version": "left out",
        "refines_a_row": "done", "good": "done",
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
    names = [(row["name"], row.get("repeats")) for row in entries["refines_a_row"]["rows"]]
    assert names == [("a rate", 2), ("something after 1", None), ("something after 2", None)]
    log = (tmp_path / "gpu.log").read_text()
    assert log.index("== good, 20") < log.index("a line for the log")
    assert log.index("== fails, 20") < log.index("ValueError: this section is broken") < log.index("== overruns, 20")
    assert "overran: stopped after 25 s" in "\n".join(verdicts(content))


def start_runner(folder: Path, *names: str) -> subprocess.Popen[str]:
    """The command, with these sections; signals mean what they mean in a shell."""
    code = (
        "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL); from benchmarks.gpu import __main__ as gpu; "
        f"gpu.SECTIONS = tuple(gpu.Section(n, f'gpu_sections:{{n}}', 100, n) for n in {names}); "
        f"sys.argv = ['gpu', '--tiny', '--out', {str(folder)!r}]; sys.exit(gpu.main())"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.Popen([sys.executable, "-c", code], env=env, text=True, stdout=subprocess.PIPE)


def wait_until(condition: Callable[[], bool], secs: float = 60) -> None:
    deadline = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_stopped_keeps_its_rows_and_leaves_no_process(
    kind: signal.Signals, tmp_path: Path, interruptible: None
) -> None:
    process = start_runner(tmp_path, "good", "overruns", "fails")
    wait_until(lambda: '"before"' in text_of(tmp_path / "gpu.json"))
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


def text_of(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def test_a_section_does_not_outlive_a_runner_that_is_killed(tmp_path: Path) -> None:
    process = start_runner(tmp_path, "sleeps")
    wait_until(lambda: '"before"' in text_of(tmp_path / "gpu.json"))
    worker = int((tmp_path / "worker.pid").read_text())
    assert runs(worker)
    process.kill()
    process.communicate(timeout=30)
    wait_until(lambda: not runs(worker), secs=10)


def test_a_section_whose_runner_is_gone_does_not_begin(tmp_path: Path) -> None:
    arguments = ["gpu_sections:good", str(tmp_path), "1", "--tiny"]  # the parent is this test, not process 1
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.worker", *arguments], env=env, text=True, capture_output=True
    )
    assert (ended.returncode, ended.stdout) == (1, "")


def test_a_second_run_loses_nothing_that_it_does_not_measure_anew(with_sections: None, tmp_path: Path) -> None:
    wanted = [section("works_at_first")]
    first = run_sections(wanted, tmp_path, tiny=True)["sections"]["works_at_first"]
    again = run_sections(wanted, tmp_path, tiny=True, minutes=0.1)
    assert again["sections"]["works_at_first"] == first
    content = run_sections(wanted, tmp_path, tiny=True)
    assert content["sections"]["works_at_first"]["previous"] == first
    assert json.loads((tmp_path / "gpu.json").read_text()) == content
    assert [(row["name"], row.get("value")) for row in rows_of(content, "works_at_first")] == [
        ("first", 2),
        ("the section", None),
        ("second", 1),
    ]
    assert "### Before: `works_at_first`, done" in (tmp_path / "gpu.md").read_text()
    assert len(content["runs"]) == 3


def test_what_was_measured_before_goes_when_a_section_is_done(tmp_path: Path) -> None:
    def attempt(status: str, *rows: dict[str, Any]) -> dict[str, Any]:
        entry = results.begin(section("good"), 60)
        entry |= {"status": status, "rows": list(rows)}
        results.end(entry)
        return entry

    results = Results(tmp_path, tiny=True)
    assert "previous" not in attempt("done", {"name": "a", "value": 1})
    for status in ("overran", "interrupted", "failed", "left out"):
        assert attempt(status)["previous"]["rows"] == [{"name": "a", "value": 1}]
    assert attempt("overran", {"name": "b", "value": 2})["previous"]["status"] == "done"
    assert attempt("running")["previous"]["previous"]["status"] == "done"
    assert [row["name"] for row in rows_of(results.content, "good")] == ["b", "a"]
    assert "previous" not in attempt("done", {"name": "a", "value": 3})


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
        ('{"tiny": true}', [], "is no file of this benchmark"),
        ('{"tiny": true, "runs": [], "sections": {"kokoro": 1}}', [], "is no file of this benchmark"),
        ("", ["--minutes", "0"], "--minutes 0: give more than none"),
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
        "mimi": [
            {"name": "24", "default": True, "audio_per_sec": 900.0},
            {"name": "512", "default": False, "audio_per_sec": 3600.0},
        ],
        "kokoro": [
            {"name": "16,000", "default": True, "ours/bare": 2.5},
            {"name": "4,000", "default": False, "ours/bare": 2.0},
            {"name": "64,000", "default": False, "ours/bare": 3.5},
        ],
    }
    sections = {name: {"title": name, "status": "done", "rows": found} for name, found in rows.items()}
    text = markdown({"tiny": False, "runs": [], "sections": sections})
    assert "MFU of a training step: 0.47, met (goal ≥ 45 % on an H200; b)" in text
    assert "loss: best other time / ours: 0.9, missed" in text
    assert "loss: dense memory / ours: not measured" in text
    assert "its faster way: 0.5, missed" in text
    assert "faiss.Kmeans' time / balanced k-means': not measured" in text
    assert "Kokoro in batches / one at a time: 2.5, missed (goal ≥ 3; 16,000; best 3.5: 64,000)" in text
    assert "`stages.encode mimi.unit, per hour of audio`: 4 (24; best 1: 512)" in text


def test_what_is_judged_is_what_the_pipeline_does_by_default() -> None:
    from benchmarks.gpu import kokoro, mimi
    from salad_ray.config import EncodeConfig
    from salad_ray.synthesis.kokoro import _GPU_FRAMES

    assert kokoro.DEFAULT_FRAMES == _GPU_FRAMES
    assert yaml.safe_load((ROOT / "configs" / "salad_3b.yaml").read_text())["synthesize"]["batch_size"] == (
        kokoro.NUM_TEXTS
    )
    assert mimi.DEFAULT_BATCH == 24
    assert EncodeConfig().batch_secs == mimi.DEFAULT_BATCH * mimi.SECS


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


def test_a_way_that_fails_is_no_check_and_ratios_come_before_what_compiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from benchmarks.gpu import loss

    def no_compiler(context: Context) -> Any:
        raise RuntimeError("no C compiler\nand more")

    monkeypatch.setattr(loss, "compiled", no_compiler)
    rows = list(loss.rows(TINY))
    assert [row["name"] for row in rows].index("64 × 32, V = 500") == 3
    assert rows[3]["best other"] is not None
    [failed] = [row for row in rows if row["name"] == "ours, compiled"]
    assert failed == {"name": "ours, compiled", "failed": "RuntimeError: no C compiler"}


def test_a_check_that_ends_in_an_error_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(context: Context) -> Any:
        raise ValueError("not this one")

    monkeypatch.setattr(correctness, "attention_rows", fails)
    monkeypatch.setattr(correctness, "start_rows", lambda context: iter([{"name": "start"}]))
    monkeypatch.setattr(correctness, "step_rows", lambda context: iter([{"name": "step"}]))
    rows = list(correctness.rows(TINY))
    assert [row["name"] for row in rows[-3:]] == ["checks of the attention", "start", "step"]
    assert rows[-3] == {"name": "checks of the attention", "failed": "ValueError: not this one", "ok": False}
    assert len(rows) == 6 + 3


@pytest.mark.slow
def test_a_step_that_leaves_something_out_is_noticed(with_sections: None, tmp_path: Path) -> None:
    content = run_sections([Section("steps", "gpu_steps:rows", 300, "Steps")], tmp_path, tiny=True)
    rows = content["sections"]["steps"]["rows"]
    assert len(rows) == 4 * 6
    assert {row["name"]: row.get("worst") for row in rows if not row["ok"]} == {
        "frozen LLM: update of the LLM's layers": None,
        "frozen LLM: update of the embedding, which is the head": None,
        "no gradient of q: gradient, worst kind of weight": "llm q_proj",
        "no gradient of k: gradient, worst kind of weight": "llm k_proj",
    }


@pytest.mark.parametrize("knows_gqa", [True, False])
def test_the_kernel_takes_what_it_is_given(knows_gqa: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch 2.11 has no `enable_gqa`: heads are repeated there, and nothing else changes."""
    from torch.nn.attention.varlen import varlen_attn as kernel

    shape = shape_of(TINY)
    [batch] = make_batches(shape, num_rows=2, num_batches=1)
    _, student = make_pair(shape, torch.device("cpu"), torch.float32, "varlen")
    expected = student.text_hidden(batch.teacher_ids, batch.teacher_position_ids)
    repeated = []

    def stand_in(*states: Any, **settings: Any) -> torch.Tensor:
        inspect.signature(kernel).bind(*states, **settings)
        assert ("enable_gqa" in settings) == knows_gqa
        repeated.append(states[0].shape[1] == states[1].shape[1])
        return packed.segment_by_segment(*states, **settings)

    monkeypatch.setattr(packed, "varlen_attn", stand_in)
    monkeypatch.setattr(packed, "_knows_gqa", lambda: knows_gqa)
    found = student.text_hidden(batch.teacher_ids, batch.teacher_position_ids)
    assert repeated == [not knows_gqa] * shape.llm.num_hidden_layers
    torch.testing.assert_close(found, expected)
