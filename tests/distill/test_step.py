"""One step: the schedule, the normalisation by the global count, the cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from factories import make_features, make_tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from salad_ray.config import AdapterConfig
from salad_ray.distill.losses import distillation_loss
from salad_ray.distill.step import (
    batch_loss,
    global_scale,
    head_share,
    label_weight,
    learning_rate_factor,
    told_parameters,
    training_flops,
)
from salad_ray.model.adapter import Adapter
from salad_ray.model.layers import attention_widths
from salad_ray.model.speech_lm import (
    EncoderSpec,
    SpeechLM,
    SpeechLMConfig,
    hidden_states,
    lm_head,
    weights_fingerprint,
)
from salad_ray.sequences.batch import Batch, collate, sample_of, without_labels
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


def make_batch(num_rows: int, context: int = 128) -> Batch:
    tokenizer, rng = make_tokenizer("byte_level"), np.random.default_rng(0)
    rows = []
    for i in range(num_rows):
        utterances = [make_features("she said the people of the café opened 12 times and more so on", f"u{i}")]
        rows.append([sample_of(interleave(utterances, tokenizer, (2, 4), (2, 4), rng), utterances)])
    return collate(rows, context)


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


def test_padding_changes_nothing() -> None:
    teacher = make_teacher(400)
    student = make_student(teacher)
    plain, padded = (
        batch_loss(student, student.head, teacher, make_batch(2, context), alpha=0.7, word_end_weight=0.5).loss
        for context in (128, 224)
    )
    assert float(plain) == pytest.approx(float(padded), abs=1e-6)
    for one, other in zip(gradients(student, plain), gradients(student, padded), strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


def dense_loss(
    student: SpeechLM, teacher: Qwen2ForCausalLM, batches: Sequence[Batch], alpha: float, weight: float
) -> Tensor:
    """The objective by its definition, on all logits at once, over all of these batches."""
    total, count = torch.zeros(()), 0.0
    for batch in batches:
        heard = (student(batch) @ student.head.T).log_softmax(-1).flatten(0, 1)
        with torch.no_grad():
            read = hidden_states(teacher, batch.teacher_ids, batch.teacher_position_ids) @ lm_head(teacher).T
        read = read.log_softmax(-1).flatten(0, 1)
        at, there = torch.cat([batch.student_index, batch.word_end_student]), batch.teacher_index
        kl = F.kl_div(heard[at], read[torch.cat([there, batch.word_end_teacher])], reduction="none", log_target=True)
        on_text, at_ends = kl.sum(-1).split([len(batch.labels), len(batch.word_end_student)])
        nll = -heard[batch.student_index, batch.labels]
        total = total + (alpha * on_text + (1 - alpha) * nll).sum() + weight * at_ends.sum()
        count += len(batch.labels) + weight * len(batch.word_end_student)
    return total / count


def gradients(student: SpeechLM, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(student.parameters())))


@pytest.mark.parametrize("alpha", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("weight", [0.25, 1.0, 3.0])
def test_word_ends_add_their_kl_and_count_in_the_mean(alpha: float, weight: float) -> None:
    teacher = make_teacher(400)
    student, batch = make_student(teacher), make_batch(2)
    assert len(batch.word_end_student) > 5
    loss = batch_loss(student, student.head, teacher, batch, alpha, word_end_weight=weight)
    expected = dense_loss(student, teacher, [batch], alpha, weight)
    torch.testing.assert_close(loss.loss, expected, rtol=1e-5, atol=1e-6)
    for found, exact in zip(gradients(student, loss.loss), gradients(student, expected), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-6)
    without = batch_loss(student, student.head, teacher, batch, alpha)
    assert (loss.kl, loss.nll) == (without.kl, without.nll)
    parts = len(batch.labels) * without.loss + weight * len(batch.word_end_student) * loss.word_end_kl
    torch.testing.assert_close(loss.loss, parts / label_weight(batch, weight))


def test_without_word_ends_not_a_bit_changes() -> None:
    """The loss and all gradients are those of the labels alone, computed as before there were word ends."""
    teacher = make_teacher(400)
    student, batch = make_student(teacher), make_batch(2)
    with torch.no_grad():
        read = hidden_states(teacher, batch.teacher_ids, batch.teacher_position_ids).flatten(0, 1)[batch.teacher_index]
    heard = student(batch).flatten(0, 1)[batch.student_index]
    before = distillation_loss(heard, student.head, read, lm_head(teacher), batch.labels, 0.7)
    now = batch_loss(student, student.head, teacher, batch, 0.7)
    assert torch.equal(now.loss, before.loss)
    for found, exact in zip(gradients(student, now.loss), gradients(student, before.loss), strict=True):
        assert torch.equal(found, exact)
    assert label_weight(batch, 0.0) == len(batch.labels)
    assert global_scale(label_weight(batch, 0.0), 37.0, 2, 3) == len(batch.labels) * 2 * 3 / 37


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_unequal_micro_batches_with_word_ends_add_up_to_the_mean_over_all(weight: float) -> None:
    """One of them has nothing to score, as where a worker has a row less."""
    teacher = make_teacher(400)
    student, batches = make_student(teacher), [make_batch(1), make_batch(3), without_labels(make_batch(2))]
    total = sum(label_weight(batch, weight) for batch in batches)
    assert label_weight(batches[-1], weight) == 0
    losses = [batch_loss(student, student.head, teacher, batch, 0.7, word_end_weight=weight).loss for batch in batches]
    scales = [global_scale(label_weight(batch, weight), total, 1, len(batches)) for batch in batches]
    step = sum(loss * scale / len(batches) for loss, scale in zip(losses, scales, strict=True))
    exact = dense_loss(student, teacher, batches[:2], 0.7, weight)
    torch.testing.assert_close(step, exact, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(gradients(student, step), gradients(student, exact), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


def test_a_student_that_reads_everything_agrees_with_its_teacher() -> None:
    """Before any speech the contexts are the same, so is the prediction: positions and labels are paired exactly."""
    teacher = make_teacher(400)
    student, batch = make_student(teacher), make_batch(2)
    from salad_ray.distill.losses import divergence

    early = batch.distance < 0
    assert early.any()
    with torch.no_grad():
        heard = student(batch).flatten(0, 1)[batch.student_index]
        read = hidden_states(teacher, batch.teacher_ids, batch.teacher_position_ids).flatten(0, 1)[batch.teacher_index]
        kl, _ = divergence(heard, student.head, read, student.head, batch.labels)
    assert kl[early].abs().max() < 1e-5
    assert kl[~early].mean() > 0.01


def test_a_larger_vocabulary_takes_more_of_the_work() -> None:
    teacher = make_teacher(400)
    layers = sum(parameter.numel() for parameter in teacher.model.layers.parameters()) + 16  # and the last norm
    of_head = 8 * 400 * 16 / 3
    assert head_share(teacher, 1000) == pytest.approx(of_head / (of_head + 6 * (layers + 1000) + layers))
    assert head_share(teacher, 1000) < head_share(make_teacher(4000), 1000) < 1
    assert told_parameters(3000, 3000) == "3,000 parameters"
    assert told_parameters(3000, 2000) == "3,000 parameters, 2,000 of them active"


def test_flops_count_work_not_padding() -> None:
    teacher = make_teacher(400)
    one, two = make_batch(1), make_batch(2)
    num = sum(parameter.numel() for parameter in teacher.parameters())
    widths = attention_widths(teacher)
    single, double = (training_flops(num, num, widths, batch) for batch in (one, two))
    assert double / single == pytest.approx(two.num_positions / one.num_positions, rel=0.1)
    dense = 6 * num * one.num_positions + 2 * num * one.num_teacher_positions
    assert single == dense + 4 * 2 * 16 * (3 * one.num_pairs + one.num_teacher_pairs)  # two layers, 16 wide
