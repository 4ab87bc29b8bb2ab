"""Frames side by side: packed samples stay apart, models are kept, and nothing hears behind a cut."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import make_features, make_tokenizer
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from salad_ray.config import AdapterConfig
from salad_ray.evaluation.misalignment import QUANTITIES, measure_batch
from salad_ray.evaluation.scoring import score, speech_query
from salad_ray.model.encoder import LogMelEncoder
from salad_ray.model.listen import listen, prompt_embeddings
from salad_ray.model.speech_lm import EncoderSpec, SpeechLM, hidden_states, load_text_lm, weights_fingerprint
from salad_ray.sequences.batch import Batch, Sample, collate, frames_of, sample_of
from salad_ray.sequences.interleave import Span, build_segment, draw_spans, units_of
from salad_ray.tables import BadInput, Features, Item

DIM, CONTEXT = 6, 128
TOKENIZER = make_tokenizer("byte_level")
ADAPTER = AdapterConfig(hidden_size=16, num_layers=2, num_heads=2, ffn_size=24)
ENCODER = EncoderSpec(name="log_mel", path=None, revision=None, sampling_rate=16000, frame_rate=12.5, dim=DIM)
WORDS = ["people", "said", "union,", "12", "café", "a", "opened—wide"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random LM; its weights are large, so that whatever is heard shows."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    shape = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(**shape, **heads, initializer_range=0.3)).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def make_student(teacher: str, stride: int, encoder: EncoderSpec = ENCODER) -> SpeechLM:
    adapter = ADAPTER.model_copy(update={"stride": stride})
    return SpeechLM.from_teacher(teacher, None, adapter, encoder, 0).eval()


def make_utterance(seed: int, num_words: int = 9, **settings: bool) -> Features:
    """Words of 3.75 frames, pauses included, with random frames."""
    rng = np.random.default_rng(seed)
    utterance = make_features(" ".join(rng.choice(WORDS, num_words)), f"u{seed}", secs_per_word=0.2, **settings)
    return noised(replace(utterance, dim=DIM), 0, seed)


def noised(utterance: Features, start: int, seed: int = 99) -> Features:
    """The same utterance, its frames from `start` on replaced by noise."""
    noise = np.random.default_rng(seed).standard_normal((utterance.num_frames, DIM)).astype(np.float16)
    heard = np.frombuffer(utterance.features, np.float16)[: start * DIM].reshape(start, DIM)
    return replace(utterance, features=np.concatenate([heard, noise[start:]]).tobytes())


def make_sample(utterance: Features, stride: int, seed: int = 0, whole: bool = False) -> tuple[Sample, list[Span]]:
    units = units_of([utterance], TOKENIZER)
    spans = draw_spans(units, (1, 3), (2, 4), np.random.default_rng(seed), whole)
    return sample_of(build_segment(units, spans, stride), [utterance]), spans


@torch.no_grad()
def hidden(student: SpeechLM, batch: Batch) -> Tensor:
    return student(batch).flatten(0, 1)


@pytest.mark.parametrize("stride", [1, 2, 3, 9])
def test_a_packed_sample_equals_the_sample_alone(teacher: str, stride: int) -> None:
    student = make_student(teacher, stride)
    samples = [make_sample(make_utterance(seed), stride, seed)[0] for seed in range(4)]
    packed = hidden(student, collate([samples[:2], samples[2:]], CONTEXT)).view(2, CONTEXT, -1)
    for row, pair in zip(packed, (samples[:2], samples[2:]), strict=True):
        start = 0
        for sample in pair:
            length = len(sample.segment.token_ids)
            alone = hidden(student, collate([[sample]], CONTEXT))[:length]
            torch.testing.assert_close(row[start : start + length], alone, rtol=1e-4, atol=1e-4)
            start += length


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_training_hears_nothing_behind_a_words_end_or_a_spans(teacher: str, stride: int, whole: bool) -> None:
    student = make_student(teacher, stride)
    for seed in range(4):
        utterance = make_utterance(seed)
        units = units_of([utterance], TOKENIZER)
        sample, spans = make_sample(utterance, stride, seed, whole)
        before = hidden(student, collate([[sample]], CONTEXT))
        segment = sample.segment
        words = np.searchsorted(units.token_starts, segment.word_end_teacher, side="right")  # the word behind
        places = list(zip(segment.word_end_student.tolist(), units.frame_starts[words].tolist(), strict=True))
        speech = np.flatnonzero(segment.token_ids < 0)[np.cumsum(segment.span_lengths) - 1]
        cuts = [units.frame_starts[span.end] for span in spans if span.is_speech]
        places += list(zip(speech.tolist(), cuts, strict=True))
        assert len(places) > 1
        for position, cut in places:
            other = sample_of(segment, [noised(utterance, int(cut))])
            after = hidden(student, collate([[other]], CONTEXT))
            assert torch.equal(after[: position + 1], before[: position + 1])
            if position != speech[-1]:
                assert not torch.equal(after[position + 1 :], before[position + 1 :])


@pytest.mark.parametrize("stride", [2, 3])
def test_measuring_hears_nothing_behind_a_cut(teacher: str, stride: int) -> None:
    student, reader = make_student(teacher, stride), load_text_lm(teacher, None)
    utterance = make_utterance(3, 12)
    units = units_of([utterance], TOKENIZER)
    spans = [Span(0, 3, True), Span(3, 6, False), Span(6, 9, True), Span(9, 12, False)]
    segment = build_segment(units, spans, stride)
    num_first = int(units.token_starts[6] - units.token_starts[3])  # labels between the two speech spans
    measured = []
    for heard in (utterance, noised(utterance, int(units.frame_starts[3])), noised(utterance, 0)):
        values = measure_batch(student, reader, collate([[sample_of(segment, [heard])]], CONTEXT))
        measured.append(np.stack([values[name] for name in QUANTITIES]))
    assert measured[0].shape[1] == len(segment.labels)  # word ends are not among them
    np.testing.assert_array_equal(measured[0][:, :num_first], measured[1][:, :num_first])
    assert (measured[0][0, num_first:] != measured[1][0, num_first:]).any()
    assert (measured[0][0, :num_first] != measured[2][0, :num_first]).any()


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_listening_hears_nothing_behind_and_what_training_hears(teacher: str, stride: int) -> None:
    """Against the training path of an utterance without word times, which is grouped from its start, too."""
    student = make_student(teacher, stride)
    pair = [make_utterance(seed, 3, with_words=False) for seed in (0, 1)]
    segment = build_segment(units_of(pair, TOKENIZER), [Span(0, 1, True), Span(1, 2, False)], stride)
    trained = hidden(student, collate([[sample_of(segment, pair)]], CONTEXT))[: len(segment.token_ids)]
    assert len(segment.word_end_student) == 0
    frames = frames_of(pair[0]).astype(np.float32)
    behind = segment.token_ids[segment.token_ids >= 0].tolist()
    embeddings = prompt_embeddings(student, [], frames, behind)
    with torch.no_grad():
        found = hidden_states(student.llm, embeddings, torch.arange(embeddings.shape[1])[None])[0]
    torch.testing.assert_close(found, trained, rtol=1e-4, atol=1e-4)
    for cut in range(len(frames)):
        other = frames_of(noised(pair[0], cut)).astype(np.float32)
        after = prompt_embeddings(student, [], other, behind)[0]
        assert torch.equal(after[: cut // stride], embeddings[0, : cut // stride])
        assert not torch.equal(after[cut // stride], embeddings[0, cut // stride])


@pytest.mark.parametrize("stride", [2, 3])
def test_questions_are_heard_as_they_are_listened_to_and_cost_less(teacher: str, stride: int) -> None:
    student = make_student(teacher, stride)
    item = Item(
        item_id="1", benchmark="arc_challenge", domain="", before="", spoken="people said", after=" union,",
        choices=["12", "café opened"], answer=0,
    )  # fmt: skip
    frames = frames_of(make_utterance(5, 4))
    asked = speech_query(TOKENIZER, [], item, frames, CONTEXT, stride)
    assert asked.frames is not None
    assert len(asked.frames) == -(-len(frames) // stride)
    full = speech_query(TOKENIZER, [], item, frames, CONTEXT)
    assert full.num_positions - asked.num_positions == len(frames) - len(asked.frames)
    with pytest.raises(BadInput, match="longer than the context"):
        speech_query(TOKENIZER, [], item, frames, asked.num_positions)
    assert speech_query(TOKENIZER, [], item, frames, asked.num_positions, stride).num_shots == 0
    prompt = prompt_embeddings(student, asked.before, frames.astype(np.float32), asked.after)
    embed = student.llm.get_input_embeddings()
    for choice, found in zip(asked.choices, score(student, [asked])[0], strict=True):
        inputs = torch.cat([prompt, embed(torch.tensor([choice[:-1]], dtype=torch.long))], dim=1)
        with torch.no_grad():
            states = hidden_states(student.llm, inputs, torch.arange(inputs.shape[1])[None])[0, -len(choice) :]
        expected = (states @ student.head.T).log_softmax(-1)[range(len(choice)), choice].sum()
        assert found == pytest.approx(expected.item(), abs=1e-4)


def test_the_stride_is_kept_and_a_model_without_one_has_one_frame_at_a_position(teacher: str, tmp_path: Path) -> None:
    for stride in (1, 2):
        student = make_student(teacher, stride)
        student.save_pretrained(tmp_path / str(stride))
        loaded = SpeechLM.from_pretrained(tmp_path / str(stride))
        assert loaded.config == student.config
        assert weights_fingerprint(loaded) == weights_fingerprint(student)
        assert loaded.config.frame_rate == 12.5 / stride
        assert loaded.config.encoder.frame_rate == 12.5
    path = tmp_path / "1" / "config.json"
    content = json.loads(path.read_text())
    assert content["adapter"].pop("stride") == 1
    path.write_text(json.dumps(content))
    assert SpeechLM.from_pretrained(tmp_path / "1").config.adapter.stride == 1


def test_a_recording_takes_fewer_positions(teacher: str) -> None:
    student = make_student(teacher, 2, replace(ENCODER, dim=640))
    student.llm.config.max_position_embeddings = 64
    audio = np.sin(np.arange(80000) / 20).astype(np.float32)  # 5 s, 63 frames at 32 positions
    assert "".join(listen(student, LogMelEncoder(), audio, 16000, max_tokens=32)) is not None
    with pytest.raises(BadInput, match=r"are 65 positions.*; 5.0 s would fit"):
        listen(student, LogMelEncoder(), audio, 16000, max_tokens=33)
