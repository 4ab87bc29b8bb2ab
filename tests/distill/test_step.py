"""One step: the schedule, the normalisation by the global count, the cost."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from factories import make_features, make_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from salad_ray.config import AdapterConfig
from salad_ray.distill.step import batch_loss, global_scale, learning_rate_factor, training_flops
from salad_ray.model.adapter import Adapter
from salad_ray.model.speech_lm import EncoderSpec, SpeechLM, SpeechLMConfig, weights_fingerprint
from salad_ray.sequences.batch import Batch, collate, sample_of
from salad_ray.sequences.interleave import interleave


def make_teacher(tokenizer_size: int) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=tokenizer_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return Qwen2ForCausalLM(shape).eval().requires_grad_(False)


def make_student(teacher: Qwen2ForCausalLM) -> SpeechLM:
    student = Qwen2ForCausalLM(teacher.config)
    student.load_state_dict(teacher.state_dict())
    encoder = EncoderSpec("log_mel", None, None, 16000, 12.5, 2)
    config = AdapterConfig(hidden_size=8, num_layers=1, num_heads=2, ffn_size=16)
    adapter = Adapter(config, 2, 16, 1.0, 0)
    return SpeechLM(SpeechLMConfig("t", None, encoder, config), student, adapter, make_tokenizer("byte_level"))


def make_batch(num_rows: int) -> Batch:
    tokenizer, rng = make_tokenizer("byte_level"), np.random.default_rng(0)
    rows = []
    for i in range(num_rows):
        utterances = [make_features("she said the people of the café opened 12 times and more so on", f"u{i}")]
        rows.append([sample_of(interleave(utterances, tokenizer, (2, 4), (2, 4), rng), utterances)])
    return collate(rows, 128)


def test_warm_up_constant_decay() -> None:
    factors = [learning_rate_factor(step, 100, 10, 20) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10:80] == [1.0] * 70
    assert all(later < earlier for earlier, later in pairwise(factors[80:]))
    assert 0 < factors[-1] < 0.06
    assert learning_rate_factor(0, 1, 0, 0) == 1.0


def test_unequal_micro_batches_add_up_to_the_mean_over_all_labels() -> None:
    """2 workers × 2 micro-batches; DeepSpeed divides by the micro-batches and averages over the workers."""
    rng = np.random.default_rng(0)
    losses = [[rng.random(n) for n in (3, 11)], [rng.random(n) for n in (7, 0)]]
    total = sum(len(micro) for worker in losses for micro in worker)
    step = 0.0
    for worker in losses:
        for micro in worker:
            mean = micro.mean() if len(micro) else 0.0
            step += mean * global_scale(len(micro), total, 2, 2) / 2 / 2
    everything = np.concatenate([micro for worker in losses for micro in worker])
    assert step == pytest.approx(everything.mean())


def test_the_teacher_gets_no_gradient_and_the_student_all_of_it() -> None:
    teacher = make_teacher(400)
    student, before = make_student(teacher), weights_fingerprint(teacher)
    batch = make_batch(2)
    loss = batch_loss(student, student.head, teacher, batch, alpha=1.0)
    loss.loss.backward()
    torch.optim.AdamW(student.parameters(), lr=0.1).step()
    assert weights_fingerprint(teacher) == before
    assert weights_fingerprint(student.llm) != before
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert loss.kl > 0


def test_a_student_that_reads_everything_agrees_with_its_teacher() -> None:
    """Before any speech the contexts are the same, so is the prediction: positions and labels are paired exactly."""
    teacher = make_teacher(400)
    student, batch = make_student(teacher), make_batch(2)
    from salad_ray.distill.losses import divergence
    from salad_ray.model.speech_lm import hidden_states

    early = batch.distance < 0
    assert early.any()
    with torch.no_grad():
        heard = student(batch).flatten(0, 1)[batch.student_index]
        read = hidden_states(teacher, batch.teacher_ids, batch.teacher_position_ids).flatten(0, 1)[batch.teacher_index]
        kl, _ = divergence(heard, student.head, read, student.head, batch.labels)
    assert kl[early].abs().max() < 1e-5
    assert kl[~early].mean() > 0.01


def test_flops_count_work_not_padding() -> None:
    teacher = make_teacher(400)
    one, two = make_batch(1), make_batch(2)
    num = sum(parameter.numel() for parameter in teacher.parameters())
    single, double = (training_flops(num, num, teacher.config, batch) for batch in (one, two))
    assert double / single == pytest.approx(two.num_positions / one.num_positions, rel=0.1)
    assert single > 6 * num * one.num_positions + 2 * num * one.num_teacher_positions
