"""Protocols: what they speak, what they leave out, and M, F and the distillation loss against a dense reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import make_features, make_tokenizer, small_world_config
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from salad_ray.config import PROTOCOLS, AdapterConfig, MeasureConfig, Protocol, identity
from salad_ray.configfile import parse_config
from salad_ray.evaluation.misalignment import measure_batch
from salad_ray.evaluation.protocols import HeldOut, held_out, read_by, spans_of, whole_spans
from salad_ray.flow import steps
from salad_ray.model.adapter import Adapter
from salad_ray.model.speech_lm import EncoderSpec, SpeechLM, SpeechLMConfig
from salad_ray.sequences.batch import collate, sample_of
from salad_ray.sequences.interleave import Segment
from salad_ray.tables import BadInput, Features
from salad_ray.text.world import DOMAINS, world_passages

TOKENIZER = make_tokenizer("byte_level")
SETTINGS = MeasureConfig()
CONTEXT = 512
TEXT = (
    "she said the people of the café opened a union and more so on in order to form a word, the people of the states "
    "said she opened 12 times and then so on, in order to form a more perfect union of the people"
)


def spoken(text: str, utt_id: str = "a", **fields: object) -> Features:
    return make_features(text, utt_id, split="test", **fields)  # type: ignore[arg-type]


def passages_of(*utterances: Features, settings: MeasureConfig = SETTINGS, context: int = CONTEXT) -> list[HeldOut]:
    found, left_out = held_out(utterances, TOKENIZER, settings, context)
    assert not left_out
    return found


def sample(protocol: Protocol, passage: HeldOut) -> Segment:
    [(_, segment)], left_out = read_by(protocol, [passage], SETTINGS, CONTEXT)
    assert not left_out
    return segment


def make_models() -> tuple[SpeechLM, Qwen2ForCausalLM]:
    """Student and teacher whose weights differ, so that F is not 0."""
    shape = {"vocab_size": len(TOKENIZER), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    torch.manual_seed(0)
    teacher = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True)).eval()
    llm = Qwen2ForCausalLM(teacher.config)
    llm.load_state_dict({name: value + 0.05 * torch.randn_like(value) for name, value in teacher.state_dict().items()})
    llm.tie_weights()
    encoder = EncoderSpec("log_mel", None, None, 16000, 12.5, 2)
    config = AdapterConfig(hidden_size=8, num_layers=1, num_heads=2, ffn_size=16)
    return SpeechLM(SpeechLMConfig("t", None, encoder, config), llm, Adapter(config, 2, 16), TOKENIZER).eval(), teacher


def kl(p: Tensor, q: Tensor) -> float:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def dense(student: SpeechLM, teacher: Qwen2ForCausalLM, passage: HeldOut, protocol: Protocol) -> dict[str, float]:
    """M, F and distillation loss, summed: the context is built token by token and frame by frame, without packing."""
    units, spans = passage.units, spans_of(protocol, passage, SETTINGS)
    ids = torch.from_numpy(units.token_ids)
    frames = torch.tensor(np.frombuffer(passage.utterances[0].features, np.float16).reshape(-1, 2), dtype=torch.float32)
    embed, parts, pairs, heard = student.llm.get_input_embeddings(), [], [], False
    position = 0
    for span in spans:
        first, last = int(units.token_starts[span.start]), int(units.token_starts[span.end])
        if span.is_speech:
            own = frames[units.frame_starts[span.start] : units.frame_starts[span.end]][None]
            parts.append(student.adapter(own, torch.ones(own.shape[:2], dtype=torch.bool)))
            heard = True
        else:
            parts.append(embed(ids[first:last]))
            # Token t at student position s: predicted from s − 1, and from t − 1 where all is text.
            pairs += [(position + t - first - 1, t - 1) for t in range(first, last) if heard]
        position += len(parts[-1])
    speech = student.llm(inputs_embeds=torch.cat(parts)[None]).logits[0]
    text, base = student.llm(ids[None]).logits[0], teacher(ids[None]).logits[0]
    return {
        "misalignment": sum(kl(text[t], speech[s]) for s, t in pairs),
        "forgetting": sum(kl(base[t], text[t]) for _, t in pairs),
        "distillation": sum(kl(base[t], speech[s]) for s, t in pairs),
        "num_positions": len(pairs),
    }


@torch.no_grad()
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_packed_measures_are_those_of_a_dense_reference(protocol: Protocol) -> None:
    student, teacher = make_models()
    words = TEXT.split()
    passages = passages_of(*(spoken(" ".join(words[i:]), f"u{i}") for i in (0, 7, 15)))
    samples, _ = read_by(protocol, passages, SETTINGS, CONTEXT)
    rows = [[sample_of(segment, passage.utterances) for passage, segment in samples]]
    values = measure_batch(student, teacher, collate(rows, 1024))
    for place, (passage, _) in enumerate(samples):
        own = values["segment"] == place
        expected = dense(student, teacher, passage, protocol)
        assert own.sum() == expected.pop("num_positions") > 0
        for name, value in expected.items():
            assert values[name][own].sum() == pytest.approx(value, rel=1e-4)
        assert expected["misalignment"] > 0.1
        assert expected["forgetting"] > 0.01


def test_whole_speaks_all_but_the_last_words_and_scores_their_tokens() -> None:
    [passage] = passages_of(spoken(TEXT))
    segment = sample("whole", passage)
    tail = TOKENIZER(" " + " ".join(TEXT.split()[-4:]), add_special_tokens=False)["input_ids"]
    assert segment.labels.tolist() == tail
    assert segment.distance.tolist() == list(range(len(tail)))
    assert (segment.token_ids[: -len(tail)] == -1).all()
    assert len(segment.span_lengths) == 1
    last = passage.utterances[0].words[-4]  # type: ignore[index]
    assert len(segment.frame_index) == pytest.approx(last.start_secs * 12.5, abs=1)


def test_interleaved_has_the_papers_spans() -> None:
    for number in range(20):
        [passage] = passages_of(spoken(" ".join(TEXT.split() * 4), f"u{number}"), context=4096)
        spans = spans_of("interleaved", passage, SETTINGS)
        lengths = {kind: [s.end - s.start for s in spans[1:-1] if s.is_speech is kind] for kind in (True, False)}
        assert min(lengths[True]) >= 5 - 2  # a cut may move by two words to a pause
        assert max(lengths[True]) <= 15 + 2
        assert min(lengths[False]) >= 10 - 2
        assert max(lengths[False]) <= 30 + 2
        assert not spans[-1].is_speech


def test_spans_follow_from_the_passage_alone() -> None:
    """Neither the shard that a passage lies in nor what else is in it, nor any setting of training."""
    alone = passages_of(spoken(TEXT, "b"))
    among = passages_of(spoken(TEXT, "a"), spoken(TEXT, "b"), context=2048)
    for protocol in PROTOCOLS:
        assert spans_of(protocol, alone[0], SETTINGS) == spans_of(protocol, among[1], SETTINGS)
    assert spans_of("interleaved", among[0], SETTINGS) != spans_of("interleaved", among[1], SETTINGS)


@pytest.mark.parametrize(
    ("key", "value", "changed"),
    [
        ("pack", {"text_words": [2, 3]}, False),
        ("pack", {"speech_words": [2, 3]}, False),
        ("measure", {"text_words": [2, 3]}, True),
        ("measure", {"whole_tail_words": 7}, True),
        ("measure", {"batch_rows": 2}, False),
    ],
)
def test_tables_of_measurements_depend_on_their_own_spans_only(
    key: str, value: dict, changed: bool, tmp_path: Path
) -> None:
    """By the keys that decide a table, its inputs left aside."""
    plain = small_world_config(tmp_path)
    other = plain | {key: plain.get(key, {}) | value}

    def keys(content: dict) -> str:
        config = parse_config(content)
        [step] = [step for step in steps(config) if step.writes == ("heldout/measurements_stage1",)]
        return json.dumps(identity(config, *step.keys, without=step.without), sort_keys=True)

    assert (keys(plain) != keys(other)) == changed


def test_what_a_protocol_cannot_use_is_told() -> None:
    short, long = spoken("she said the union", "short"), spoken(TEXT, "long")
    passages = passages_of(short, long)
    assert read_by("interleaved", passages, SETTINGS, CONTEXT)[1] == []
    samples, left_out = read_by("whole", passages, SETTINGS, CONTEXT)
    assert [passage.key for passage, _ in samples] == ["long"]
    [(key, reason)] = left_out
    assert key == "short"
    assert reason.startswith("whole: of its 4 words the last 4 (measure.whole_tail_words) are not spoken")
    [(_, reason)] = read_by("whole", passages[1:], SETTINGS, 64)[1]
    assert reason.startswith("whole: needs ")
    assert reason.endswith("more than pack.context=64")
    with pytest.raises(BadInput, match="word times are not known"):
        whole_spans(passages_of(spoken(TEXT, "x", with_words=False))[0].units, 4)
    bad = replace(spoken(TEXT, "bad"), words=spoken("other words").words)
    assert held_out([bad], TOKENIZER, SETTINGS, CONTEXT)[1][0][0] == "bad"


def recording(number: int, **fields: object) -> list[Features]:
    """Neighbouring utterances of 6.1 s, twelve words each."""
    text = "she said the people of the union opened and more so on"
    return [
        spoken(text, f"r{i}", recording_id="r", offset_secs=6.1 * i, secs_per_word=0.4, **fields) for i in range(number)
    ]


def test_neighbours_of_a_recording_are_joined_within_the_context() -> None:
    minute = passages_of(*recording(30), context=2048)
    assert [len(passage.utterances) for passage in minute] == [8, 8, 7, 7]
    assert sum(len(passage.utterances) for passage in minute) == 30
    short = passages_of(*recording(30), context=256)
    for passage in short:
        assert len(sample_of(sample("whole", passage), passage.utterances).segment.token_ids) <= 256
    assert sum(len(passage.utterances) for passage in short) == 30
    untimed = passages_of(*recording(30, with_words=False), settings=MeasureConfig(passage_secs=5), context=2048)
    assert [len(passage.utterances) for passage in untimed] == [2] * 15  # one alone could not alternate
    assert {passage.source for passage in untimed} == {"r"}


def test_the_worlds_passages_are_long_enough_for_the_papers_spans() -> None:
    passages = world_passages(180, DOMAINS, 0, "test")
    assert len(passages) == 180
    lengths = sorted(len(row.text.split()) for row in passages)
    assert (lengths[0], np.median(lengths), lengths[-1]) == (44, 51, 59)  # as docs/evaluation.md says
    found = passages_of(*(spoken(row.text, row.passage_id) for row in passages), context=1024)
    for protocol, least in (("interleaved", 10), ("whole", 4)):
        samples, left_out = read_by(protocol, found, SETTINGS, 1024)  # type: ignore[arg-type]
        assert not left_out
        assert np.mean([(segment.distance >= 0).sum() for _, segment in samples]) >= least
