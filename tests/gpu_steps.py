"""A section of benchmarks.gpu with steps that leave something out, for test_gpu_benchmark.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu import correctness
from benchmarks.gpu.correctness import make_step_engine
from benchmarks.gpu.worker import Context
from salad_ray.model.speech_lm import SpeechLM


def rows(context: Context) -> Iterator[dict[str, Any]]:
    """The checks of the step for an engine that is right, and for some that are not."""
    makers = {
        "right": make_step_engine,
        "frozen LLM": make_engine_that_freezes,
        "no gradient of q": partial(make_engine_without, "q_proj"),
        "no gradient of k": partial(make_engine_without, "k_proj"),
    }
    for name, make in makers.items():
        with patch.object(correctness, "make_step_engine", make):
            for row in correctness.step_rows(context):
                yield row | {"name": f"{name}: {row['name'].partition(': ')[2]}"}


def make_engine_that_freezes(student: SpeechLM, context: Context) -> Any:
    """It updates nothing but the adapter."""
    engine = make_step_engine(student, context)
    for group in engine.optimizer.param_groups:
        if group["rate"] == "learning_rate":
            group["lr"] = 0.0
    return engine


def make_engine_without(projection: str, student: SpeechLM, context: Context) -> Any:
    """It gets no gradient of the LLM's projections of this name."""
    for layer in student.llm.get_decoder().layers:
        getattr(layer.self_attn, projection).weight.register_hook(torch.zeros_like)
    return make_step_engine(student, context)
