"""Scoring: the shared prompt gives what each choice alone gives, in text and in speech; ids, ties, limits."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from factories import TOKENIZERS, make_tokenizer
from tokenizers import Tokenizer, models
from tokenizers import pre_tokenizers as pre
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from salad_ray.config import AdapterConfig
from salad_ray.evaluation.benchmarks import choices_alone, exemplar_of, world_items
from salad_ray.evaluation.scoring import Query, batches, predict, score, speech_query, text_query
from salad_ray.evaluation.statistics import hearing_margins
from salad_ray.model.adapter import Adapter
from salad_ray.model.speech_lm import EncoderSpec, ModelError, SpeechLM, SpeechLMConfig
from salad_ray.sequences.batch import Batch
from salad_ray.tables import BadInput, Item, Score
from salad_ray.text.world import DOMAINS

DIM = 6
ADAPTER = AdapterConfig(hidden_size=16, num_layers=2, num_heads=2, ffn_size=24)
ENCODER = EncoderSpec(name="log_mel", path=None, revision=None, sampling_rate=16000, frame_rate=12.5, dim=DIM)
EXEMPLARS = ["Question: who?\nAnswer: the people", "Question: when?\nAnswer: in 1787"]
CHOICES = ["the café", "a more perfect union", "12 345", "don't stop! 😀"]
ATTENTIONS = ("sdpa", "eager")
TOKENS = ("byte_level", "metaspace", "bos", "unigram", "wordpiece")


def make_llm(shape: str = "Qwen2", attention: str = "sdpa", **settings: Any) -> PreTrainedModel:
    """A tiny random LM; its weights are large, so that a choice that saw another would show."""
    chosen: dict[str, Any] = {"vocab_size": 400, "initializer_range": 0.15, "attn_implementation": attention}
    if shape == "GPT2":
        chosen |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
    else:
        chosen |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        chosen |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    kind = f"{shape}LMHeadModel" if shape == "GPT2" else f"{shape}ForCausalLM"
    return getattr(transformers, kind)(getattr(transformers, f"{shape}Config")(**(chosen | settings))).eval()


def make_speech_lm(tokenizer: PreTrainedTokenizerFast, attention: str = "sdpa") -> SpeechLM:
    config = SpeechLMConfig("tiny", None, ENCODER, ADAPTER)
    return SpeechLM(config, make_llm(attention=attention), Adapter(ADAPTER, DIM, 32), tokenizer).eval()


def make_item(**changes: Any) -> Item:
    values: dict[str, Any] = {
        "item_id": "test-1",
        "benchmark": "arc_challenge",
        "domain": "",
        "before": "Question: ",
        "spoken": "we the people said, was there 12 345?",
        "after": "\nAnswer:",
        "choices": CHOICES,
        "answer": 0,
    }
    return Item(**(values | changes))


def spell(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """The text of byte-level tokens (without accents)."""
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("Ġ", " ").replace("Ċ", "\n")


def make_frames(num: int) -> np.ndarray:
    return np.random.default_rng(num).normal(size=(num, DIM)).astype(np.float16)


ITEMS = [
    make_item(),
    make_item(before="", spoken="The café opened", after="", choices=["now", "once, don't stop!"]),
    make_item(spoken="who?", after=" ", choices=CHOICES[::-1]),
    make_item(before="was there: ", after="", spoken="We the people… " * 5 + "stop", choices=[*CHOICES, "union"]),
]


def make_queries(tokenizer: PreTrainedTokenizerFast, speech: bool = False) -> list[Query]:
    if not speech:
        return [text_query(tokenizer, EXEMPLARS[: i % 3], item, 1000) for i, item in enumerate(ITEMS)]
    return [
        speech_query(tokenizer, EXEMPLARS[: i % 3], item, make_frames(5 + 3 * i), 1000) for i, item in enumerate(ITEMS)
    ]


def text_alone(llm: PreTrainedModel, query: Query) -> list[float]:
    """Each choice in a forward of its own, causal and without mask, with all logits."""
    return [_choice_alone(llm, query, choice) for choice in query.choices]


@torch.no_grad()
def _choice_alone(llm: PreTrainedModel, query: Query, choice: list[int]) -> float:
    ids = torch.tensor([query.before + query.after + choice])
    logits = llm(input_ids=ids, use_cache=False).logits[0, -len(choice) - 1 : -1]
    return logits.log_softmax(-1)[range(len(choice)), choice].double().sum().item()


def speech_alone(model: SpeechLM, query: Query) -> list[float]:
    """Each choice through `SpeechLM.forward`, one sample a batch, as in training."""
    assert query.frames is not None
    shots = [part for shot in query.shots for part in shot]
    return heard_alone(model, [*shots, query.before, query.frames, query.after], query.choices)


def heard_alone(model: SpeechLM, prompt: list[list[int] | np.ndarray], choices: list[list[int]]) -> list[float]:
    spans = [part for part in prompt if isinstance(part, np.ndarray)]
    marked = [part if isinstance(part, list) else [-1] * len(part) for part in prompt]
    values = []
    for choice in choices:
        ids = torch.tensor([[*chain(*marked), *choice]])
        empty = torch.zeros(0, dtype=torch.long)
        batch = Batch(
            token_ids=ids.clamp(min=0),
            position_ids=torch.arange(ids.shape[1])[None],
            speech_index=(ids[0] == -1).nonzero()[:, 0],
            frames=pad_sequence([torch.from_numpy(span.astype(np.float32)) for span in spans], batch_first=True),
            frame_mask=pad_sequence([torch.ones(len(span), dtype=torch.bool) for span in spans], batch_first=True),
            teacher_ids=ids,
            teacher_position_ids=torch.arange(ids.shape[1])[None],
            **dict.fromkeys(("student_index", "teacher_index", "labels", "distance", "segment"), empty),
            **dict.fromkeys(("num_positions", "num_teacher_positions", "num_pairs", "num_teacher_pairs"), 0),
        )
        with torch.no_grad():
            logits = model(batch)[0, -len(choice) - 1 : -1] @ model.head.T
        values.append(logits.log_softmax(-1)[range(len(choice)), choice].double().sum().item())
    return values


def assert_close(left: list[list[float]], right: list[list[float]], limit: float) -> None:
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("shape", "attention"),
    [
        *((shape, attention) for shape in ("Qwen2", "Qwen3", "Llama", "GPT2", "Mistral") for attention in ATTENTIONS),
        ("Gemma2", "eager"),  # transformers has no sdpa for it
    ],
)
def test_a_shared_prompt_changes_no_score(shape: str, attention: str) -> None:
    settings = {"Gemma2": {"head_dim": 8, "final_logit_softcapping": None}}.get(shape, {})
    llm = make_llm(shape, attention, **settings)
    queries = make_queries(make_tokenizer("bos" if shape == "Llama" else "byte_level"))
    assert_close(score(llm, queries), [text_alone(llm, query) for query in queries], 1e-5)


@pytest.mark.parametrize("kind", TOKENS)
def test_with_every_kind_of_tokenizer(kind: str) -> None:
    llm, queries = make_llm(), make_queries(make_tokenizer(kind))
    assert_close(score(llm, queries), [text_alone(llm, query) for query in queries], 1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", TOKENS)
def test_speech_scores_are_those_of_the_forward_in_training(kind: str, attention: str) -> None:
    model = make_speech_lm(make_tokenizer(kind), attention)
    queries = make_queries(make_tokenizer(kind), speech=True)
    assert_close(score(model, queries), [speech_alone(model, query) for query in queries], 1e-5)


def test_a_batch_mixes_both_and_changes_no_score() -> None:
    tokenizer = make_tokenizer("bos")
    model = make_speech_lm(tokenizer)
    queries = make_queries(tokenizer) + make_queries(tokenizer, speech=True)
    together = score(model, queries)
    assert_close(together, [score(model, [query])[0] for query in queries], 1e-6 * np.abs(together[0]).max())
    assert_close(together, score(model, queries[::-1])[::-1], 1e-6 * np.abs(together[0]).max())
    assert together[: len(ITEMS)] != together[len(ITEMS) :]  # hearing is not reading
    assert together == score(model, queries)  # to the last bit
    assert_close(together[: len(ITEMS)], [text_alone(model.llm, query) for query in queries[: len(ITEMS)]], 1e-5)


def test_logits_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, queries = make_llm(), make_queries(make_tokenizer("byte_level"))
    whole = score(llm, queries)
    monkeypatch.setattr("salad_ray.evaluation.scoring.CHUNK_LOGITS", 3 * 400)
    assert_close(score(llm, queries), whole, 1e-5)


def test_half_precision_scores_in_single_precision() -> None:
    tokenizer = make_tokenizer("byte_level")
    model = make_speech_lm(tokenizer).bfloat16()
    queries = make_queries(tokenizer, speech=True)
    values = score(model, queries)
    rough = score(make_speech_lm(tokenizer), queries)
    assert all(
        abs(a / b - 1) < 0.1 for row, other in zip(values, rough, strict=True) for a, b in zip(row, other, strict=True)
    )
    assert any(value != torch.tensor(value).bfloat16().item() for row in values for value in row)


def test_frames_stand_where_the_words_were() -> None:
    tokenizer = make_tokenizer("byte_level")
    frames = make_frames(7)
    read = text_query(tokenizer, EXEMPLARS, make_item(), 1000)
    heard = speech_query(tokenizer, EXEMPLARS, make_item(), frames, 1000)
    assert spell(tokenizer, heard.before) == "\n\n".join([*EXEMPLARS, "Question:"])
    assert spell(tokenizer, heard.after) == "\nAnswer:"
    assert heard.choices == read.choices
    assert heard.num_shots == read.num_shots == 2
    assert read.before[: len(heard.before)] == heard.before
    assert read.before[-len(heard.after) :] == heard.after
    assert heard.num_positions == heard.num_prompt + max(map(len, heard.choices)) - 1
    model = make_speech_lm(tokenizer)
    assert score(model, [heard]) != score(model, [replace(heard, frames=frames[::-1].copy())])


def test_exemplars_are_heard_as_items_are() -> None:
    tokenizer = make_tokenizer("byte_level")
    shots = [(replace(ITEMS[0], answer=1), make_frames(9)), (ITEMS[1], make_frames(4))]
    query = speech_query(tokenizer, shots, ITEMS[2], make_frames(7), 1000)
    assert [spell(tokenizer, ids) for ids, _ in query.shots] == [
        "Question:",
        f"\nAnswer: {ITEMS[0].choices[1]}\n\n",
    ]
    assert spell(tokenizer, query.before) == f" {ITEMS[1].choices[ITEMS[1].answer]}\n\nQuestion:"
    assert query.num_shots == 2
    read = text_query(tokenizer, [exemplar_of(item) for item, _ in shots], ITEMS[2], 1000)
    assert query.choices == read.choices
    model = make_speech_lm(tokenizer)
    (first, heard), (second, also_heard) = query.shots
    prompt = [first, heard, second, also_heard, query.before, make_frames(7), query.after]
    others = make_queries(tokenizer, speech=True)
    (values, *_) = score(model, [query, *others])
    assert_close([values], [heard_alone(model, prompt, query.choices)], 1e-4)
    fewer = speech_query(tokenizer, shots, ITEMS[2], make_frames(7), query.num_positions - 1)
    assert (fewer.num_shots, len(fewer.shots)) == (1, 1)
    assert len(speech_query(tokenizer, shots, ITEMS[2], make_frames(7), 1000, stride=3).shots[0][1]) == 3
    with pytest.raises(BadInput, match="no token of what is spoken"):
        speech_query(tokenizer, [(replace(ITEMS[0], spoken=""), make_frames(2))], ITEMS[2], make_frames(7), 1000)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_cut_leaves_what_is_read(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    for item in ITEMS:
        heard = speech_query(tokenizer, EXEMPLARS, item, make_frames(3), 1000)
        read = text_query(tokenizer, EXEMPLARS, item, 1000)
        assert heard.choices == read.choices
        assert heard.before == read.before[: len(heard.before)]
        assert heard.after == read.before[len(read.before) - len(heard.after) :]
        start = tokenizer(
            "\n\n".join([*EXEMPLARS, item.before]).rstrip(" "), add_special_tokens=kind == "bos"
        ).input_ids
        ends = [tokenizer.eos_token_id] if kind == "bos" else []
        assert heard.before + ends == start


def pieces_tokenizer(*pieces: str) -> PreTrainedTokenizerFast:
    """A BPE whose merges make exactly these pieces of single characters, spaces and line breaks included."""
    characters = sorted({character for piece in pieces for character in piece})
    vocab = {character: i for i, character in enumerate(characters)}
    merges = []
    for piece in pieces:
        for end in range(2, len(piece) + 1):
            vocab.setdefault(piece[:end], len(vocab))
            merges.append((piece[: end - 1], piece[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab, list(dict.fromkeys(merges))))
    tokenizer.pre_tokenizer = pre.Split(" ", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_line_break_within_the_last_token_is_heard_and_a_word_is_not() -> None:
    tokenizer = pieces_tokenizer("Q:", "who?\n", "A:", "me", "you", " ")
    item = make_item(before="Q: ", spoken="who?", after="\nA:", choices=["me", "you"])
    query = speech_query(tokenizer, [], item, make_frames(2), 100)
    assert tokenizer.convert_ids_to_tokens(query.before) == ["Q:"]  # the space in front of the words is heard too
    assert tokenizer.convert_ids_to_tokens(query.after) == ["A:"]
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in query.choices] == [[" ", "me"], [" ", "you"]]
    with pytest.raises(BadInput, match="joins what is spoken with 'Q'"):
        speech_query(tokenizer, [], replace(item, before="Q", spoken=":", after=" who?\nA:"), make_frames(2), 100)


def test_a_choice_follows_the_ids_of_the_prompt_and_takes_its_trailing_spaces() -> None:
    tokenizer = pieces_tokenizer("me", "you", "A:", " ")
    query = text_query(tokenizer, [], make_item(before="", spoken="you", after=" A:  ", choices=["me", "you"]), 100)
    assert tokenizer.convert_ids_to_tokens(query.before) == ["you", " ", "A:"]
    assert [tokenizer.convert_ids_to_tokens(ids)[-2:] for ids in query.choices] == [[" ", "me"], [" ", "you"]]
    assert [len(ids) for ids in query.choices] == [4, 4]


def test_bos_iff_the_tokenizer_adds_it_and_eos_never() -> None:
    with_bos, without = make_tokenizer("bos"), make_tokenizer("metaspace")
    first, second = (text_query(tokenizer, [], make_item(), 100) for tokenizer in (with_bos, without))
    assert first.before == [with_bos.bos_token_id, *second.before]
    assert first.choices == second.choices
    heard = speech_query(with_bos, [], make_item(before="", after=""), make_frames(2), 100)
    assert heard.before == [with_bos.bos_token_id]


def test_an_empty_prompt_is_bos() -> None:
    tokenizer = make_tokenizer("byte_level")
    nothing = make_item(before="", spoken="", after="")  # a cascade that heard nothing
    query = text_query(tokenizer, [], nothing, 100)
    assert query.before == [tokenizer.bos_token_id]
    assert [spell(tokenizer, ids) for ids in query.choices[1:3]] == [" a more perfect union", " 12 345"]
    with pytest.raises(BadInput, match="neither BOS nor EOS"):
        text_query(pieces_tokenizer("me", "you", " "), [], replace(nothing, choices=["me", "you"]), 100)


def test_exemplars_are_lost_first_and_counted() -> None:
    tokenizer = make_tokenizer("byte_level")
    whole = [text_query(tokenizer, EXEMPLARS[i:], make_item(), 1000) for i in range(3)]
    sizes = [query.num_positions for query in whole]
    assert [text_query(tokenizer, EXEMPLARS, make_item(), size).num_shots for size in sizes] == [2, 1, 0]
    assert text_query(tokenizer, EXEMPLARS, make_item(), sizes[0] - 1).before == whole[1].before  # the first one goes
    with pytest.raises(BadInput, match=rf"takes {sizes[2]} positions .* longer than the context of {sizes[2] - 1}"):
        text_query(tokenizer, EXEMPLARS, make_item(), sizes[2] - 1)
    heard = speech_query(tokenizer, EXEMPLARS, make_item(), make_frames(40), 1000)
    assert speech_query(tokenizer, EXEMPLARS, make_item(), make_frames(41), heard.num_positions).num_shots == 1
    assert speech_query(tokenizer, EXEMPLARS, make_item(), make_frames(80), heard.num_positions, 2).num_shots == 2
    assert speech_query(tokenizer, EXEMPLARS, make_item(), make_frames(81), heard.num_positions, 2).num_shots == 1
    llm = make_llm(max_position_embeddings=sizes[0])  # what fits the context fits a model of that length
    assert len(score(llm, whole)) == 3


def test_nothing_to_hear_is_refused() -> None:
    with pytest.raises(BadInput, match="no speech frames"):
        speech_query(make_tokenizer("byte_level"), [], make_item(), make_frames(0), 100)
    with pytest.raises(BadInput, match="no token of what is spoken"):
        speech_query(make_tokenizer("byte_level"), [], make_item(spoken=""), make_frames(1), 100)


def test_batches_hold_every_query_once_and_keep_their_size() -> None:
    rng = np.random.default_rng(0)
    queries = [Query([1] * int(n), None, [], [[1, 2], [3]], 0) for n in rng.integers(1, 90, 200)]
    found = list(batches(queries, 300))
    assert sorted(index for batch in found for index in batch) == list(range(200))
    widths = [[queries[index].width for index in batch] for batch in found]
    assert all(len(batch) * max(batch) <= 300 for batch in widths)
    assert [width for batch in widths for width in batch] == sorted((query.width for query in queries), reverse=True)
    assert all(min(batch) >= 0.75 * max(batch) for batch in widths)
    assert list(batches(queries[:3], 1)) == [[index] for index in np.argsort([-query.width for query in queries[:3]])]
    assert list(batches([], 300)) == []


def test_models_that_cannot_share_a_prompt_are_refused() -> None:
    queries = make_queries(make_tokenizer("byte_level"))
    for attention in ("flash_attention_2", "varlen", "flex_attention"):
        llm = make_llm()
        llm.config._attn_implementation = attention
        with pytest.raises(ModelError, match=f"attention '{attention}' takes no mask"):
            score(llm, queries)
    longest = max(query.num_positions for query in queries)
    for shape, settings in (
        ("Mistral", {"sliding_window": longest - 1}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": longest - 1, "max_window_layers": 1}),
    ):
        with pytest.raises(ModelError, match=f"a sliding window of {longest - 1} positions"):
            score(make_llm(shape, **settings), queries)
    with pytest.raises(ModelError, match=f"room of {longest - 1} positions"):
        score(make_llm("GPT2", n_positions=longest - 1), queries)
    with pytest.raises(ModelError, match="cannot hear"):
        score(make_llm(), make_queries(make_tokenizer("byte_level"), speech=True))
    assert score(make_llm(), []) == []


@pytest.mark.parametrize(
    ("shape", "settings"),
    [("Mistral", {}), ("Qwen2", {"use_sliding_window": True, "max_window_layers": 1})],
)
def test_a_window_that_reaches_is_no_hindrance(shape: str, settings: dict[str, Any]) -> None:
    queries = make_queries(make_tokenizer("byte_level"))
    longest = max(query.num_positions for query in queries)
    llm = make_llm(shape, sliding_window=longest, **settings)
    assert_close(score(llm, queries), [text_alone(llm, query) for query in queries], 1e-5)


def test_predictions_are_the_largest_and_ties_are_none() -> None:
    assert predict([-3.0, -2.0, -4.0], ["a", "b", "a longer one"]) == (1, 2)
    assert predict([-2.0, -2.0, -4.0], ["a", "bb", "c"]) == (None, 1)
    assert predict([-2.0, -4.0], ["a", "bb"]) == (0, None)
    assert predict([-4.0, -2.0, -4.0], ["a", "b", "c"]) == (1, 1)  # a tie below the largest is none
    values = predict([-3.0, -2.0], ["a", "b"])
    assert json.dumps(values) == "[1, 1]"
    for wrong in (float("nan"), float("-inf"), float("inf")):
        with pytest.raises(BadInput, match="not finite"):
            predict([-1.0, wrong], ["a", "b"])
    with pytest.raises(BadInput, match="empty"):
        predict([-1.0, -2.0], ["a", ""])


def test_a_model_that_breaks_gives_no_prediction() -> None:
    llm, queries = make_llm(), make_queries(make_tokenizer("byte_level"))[:1]
    with torch.no_grad():
        llm.get_input_embeddings().weight[queries[0].before[0]] = float("nan")
    with pytest.raises(BadInput, match="not finite"):
        predict(score(llm, queries)[0], ITEMS[0].choices)


@pytest.mark.parametrize("kind", TOKENS)
def test_choices_alone_follow_the_start_of_a_text(kind: str) -> None:
    tokenizer, llm = make_tokenizer(kind), make_llm()
    query = text_query(tokenizer, [], choices_alone(make_item()), 1000)
    assert query.before == [tokenizer.bos_token_id]
    assert score(llm, [query])[0] == pytest.approx(text_alone(llm, query), abs=2e-4)


def score_of(item: Item, condition: str, log_likelihoods: list[float]) -> Score:
    guess, guess_norm = predict(log_likelihoods, item.choices)
    return Score(
        system="stage1",
        benchmark=item.benchmark,
        item_id=item.item_id,
        modality="speech",
        condition=condition,
        domain=item.domain,
        log_likelihoods=log_likelihoods,
        answer=item.answer,
        prediction=guess,
        prediction_norm=guess_norm,
        num_shots=0,
    )


def test_a_student_that_was_never_trained_is_deaf() -> None:
    """Its answers change with what it hears, and are right no more often than with silence."""
    tokenizer = make_tokenizer("byte_level")
    model, silence = make_speech_lm(tokenizer), np.zeros((40, DIM), np.float16)
    items = world_items(120, DOMAINS, seed=0)
    table = []
    for condition in ("clean", "silence"):
        lengths = [20 + place % 20 for place in range(len(items))]
        heard = [make_frames(length) if condition == "clean" else silence[:length] for length in lengths]
        queries = [speech_query(tokenizer, [], item, frames, 1000) for item, frames in zip(items, heard, strict=True)]
        for batch in batches(queries, 8192):
            values = score(model, [queries[place] for place in batch])
            table += [score_of(items[place], condition, own) for place, own in zip(batch, values, strict=True)]
    by_condition = [
        {row.item_id: row.prediction for row in table if row.condition == name} for name in ("clean", "silence")
    ]
    assert by_condition[0] != by_condition[1]
    [row] = hearing_margins(table)
    assert row["deaf"]
    assert row["silence_ci99_low"] <= row["chance"] == 0.25 <= row["silence_ci99_high"]
