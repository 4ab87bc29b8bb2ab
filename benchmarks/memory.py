"""The planner's memory beside what training really takes: small models, real DeepSpeed engines on a CPU.

    python -m benchmarks.memory

Each shape trains two steps in a process of its own, with one worker. What is alive before the second step is counted
tensor by tensor; torch's profiler then adds every allocation and release of that step, and the highest sum is the peak.
A CPU has no fused attention for packed rows; so each row is a single segment here, whose attention is fused.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.side_by_side import in_subprocess, one_thread_each
from salad_ray.config import AdapterConfig, DistillConfig, PackConfig
from salad_ray.distill.engine import forward_backward, make_engine
from salad_ray.distill.step import DTYPES
from salad_ray.model.adapter import Adapter
from salad_ray.model.speech_lm import EncoderSpec, SpeechLM, SpeechLMConfig
from salad_ray.scaling.memory import Shape, training_memory
from salad_ray.sequences.batch import Batch

ENCODER_DIM = 512
SPEECH_SHARE = 0.5
# hidden, layers, ffn, vocabulary, rows, context, precision, ZeRO stage, recompute
CASES: dict[str, tuple[int, int, int, int, int, int, str, int, bool]] = {
    "weights, fp32": (384, 8, 1024, 4000, 1, 256, "fp32", 2, False),
    "weights, bf16": (512, 8, 1408, 8000, 1, 128, "bf16", 2, False),
    "ZeRO 1": (384, 8, 1024, 4000, 1, 256, "fp32", 1, False),
    "ZeRO 3": (384, 8, 1024, 4000, 1, 256, "fp32", 3, False),
    "activations, fp32": (256, 8, 704, 2000, 8, 512, "fp32", 2, False),
    "activations, bf16": (256, 8, 704, 2000, 8, 512, "bf16", 2, False),
    "recomputed": (256, 8, 704, 2000, 8, 512, "fp32", 2, True),
    "large vocabulary": (128, 4, 352, 60000, 4, 256, "fp32", 2, False),
}


def run(cases: tuple[str, ...] = tuple(CASES)) -> list[dict[str, Any]]:
    """A row for each case: planned and measured MiB, and their ratio."""
    rows = []
    with one_thread_each():
        for name in cases:
            planned, measured = measure_case(name)
            row = {"name": name, "parameters": num_parameters(name), "planned (MiB)": planned / 2**20}
            rows.append(row | {"measured (MiB)": measured / 2**20, "planned/measured": planned / measured})
    return rows


def measure_case(name: str) -> tuple[float, float]:
    """Planned and measured bytes."""
    shape, settings, pack = parts(name)
    planned = training_memory(shape, settings, pack, 1, SPEECH_SHARE)["peak"]
    return planned, in_subprocess("benchmarks.memory", name)["peak"]


def parts(name: str) -> tuple[Shape, DistillConfig, PackConfig]:
    hidden, layers, ffn, vocabulary, rows, context, precision, stage, recompute = CASES[name]
    llm = Qwen2Config(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=ffn, vocab_size=vocabulary,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, tie_word_embeddings=True,
    )  # fmt: skip
    adapter = AdapterConfig(hidden_size=hidden, num_layers=3, num_heads=hidden // 64, ffn_size=2 * hidden)
    settings = DistillConfig(
        precision=precision, zero_stage=stage, micro_batch_rows=rows, activation_checkpointing=recompute, use_gpu=False
    )
    return Shape(llm, adapter, ENCODER_DIM), settings, PackConfig(context=context, num_lanes=rows)


def num_parameters(name: str) -> int:
    shape, *_ = parts(name)
    return shape.num_llm + shape.num_adapter


def measure(name: str) -> dict[str, float]:
    """Peak bytes of tensors in the second step."""
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29578",
    }
    torch.distributed.init_process_group("gloo")
    shape, settings, pack = parts(name)
    dtype = DTYPES[settings.precision]
    teacher = Qwen2ForCausalLM(shape.llm).to(dtype).requires_grad_(False).eval()
    llm = Qwen2ForCausalLM(shape.llm).to(dtype)
    adapter = Adapter(shape.adapter, ENCODER_DIM, shape.llm.hidden_size).to(dtype)
    encoder = EncoderSpec("log_mel", None, None, 16000, 12.5, ENCODER_DIM)
    student = SpeechLM(SpeechLMConfig("bench", None, encoder, shape.adapter), llm, adapter, None)
    engine = make_engine(student.train(), settings, 1, torch.device("cpu"))
    batch = make_batch(settings.micro_batch_rows, pack.context, shape.llm.vocab_size).to("cpu", dtype)

    def step() -> None:
        forward_backward(engine, teacher, batch, settings, len(batch.labels), 1)
        engine.step()

    step()
    gc.collect()
    alive = live_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    return {"peak": alive + highest(recorded), "alive": alive}


def make_batch(rows: int, context: int, vocabulary: int) -> Batch:
    """Rows of one segment: spans of 32 frames, as many tokens between, half of the positions speech."""
    span = 32
    is_speech = (torch.arange(context) // span) % 2 == 0
    speech = is_speech.repeat(rows, 1).flatten().nonzero().flatten()
    text = (~is_speech).repeat(rows, 1).flatten().nonzero().flatten()
    tokens = torch.randint(0, vocabulary, (rows, context))
    num_spans = len(speech) // span
    words = len(text) // rows * 2  # the teacher reads what is spoken as text, about as long
    return Batch(
        token_ids=tokens,
        position_ids=torch.arange(context).repeat(rows, 1),
        frames=torch.randn(num_spans, span, ENCODER_DIM),
        frame_mask=torch.ones(num_spans, span, dtype=torch.bool),
        speech_index=speech,
        student_index=text,
        teacher_ids=torch.randint(0, vocabulary, (rows, words)),
        teacher_position_ids=torch.arange(words).repeat(rows, 1),
        teacher_index=torch.randint(0, rows * words, (len(text),)),
        labels=torch.randint(0, vocabulary, (len(text),)),
        distance=torch.ones(len(text), dtype=torch.long),
        segment=torch.zeros(len(text), dtype=torch.long),
        num_positions=rows * context,
        num_teacher_positions=rows * words,
        num_pairs=0,
        num_teacher_pairs=0,
    )


def live_bytes() -> int:
    """Bytes of all tensors that anything still holds, each storage once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"
    }
    return sum(storages.values())


def highest(recorded: Any) -> int:
    """The highest sum of allocations and releases, in the order in which they happened."""
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def main() -> None:
    if "--bare" in sys.argv:
        print(json.dumps(measure(sys.argv[-1])))
        return
    for row in run():
        print(json.dumps(row))


if __name__ == "__main__":
    main()
