"""Interleaving: the student's tokens are the teacher's, and every pair of positions is exact."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from factories import TOKENIZERS, make_features, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from salad_ray.sequences.interleave import (
    Segment,
    Span,
    Units,
    build_segment,
    draw_spans,
    frame_groups,
    interleave,
    passage_text,
    prefix_ids,
    segment_lengths,
    timing_of,
    units_of,
)
from salad_ray.tables import BadInput, Features, Word

TRICKY = [
    'She said, ("word and more) twice.',
    "a dash—another — and a third—",
    "a blank\n\nline  and   wide\tspaces\n",
    "  12 345 6,789.0 and 1787",
    "😀 was 👩‍👩‍👧 there 😀😀 naïve café… don't",
    "日本語 の 文 mixed in\u00a0between",
    "x y",
]
tokenizer_of = cache(make_tokenizer)
word_texts = st.text(st.sampled_from('ab("—1é😀.\u200d日'), min_size=1, max_size=5)
spaces = st.sampled_from([" ", "  ", "\n", "\n\n", "\t"])
texts = st.lists(st.tuples(word_texts, spaces), min_size=2, max_size=40).map(lambda pairs: "".join(map("".join, pairs)))


def check_units(units: Units, utterances: list[Features], tokenizer: PreTrainedTokenizerFast) -> None:
    plain = tokenizer(passage_text(utterances), add_special_tokens=False)["input_ids"]
    assert units.token_ids.tolist() == prefix_ids(tokenizer) + plain
    assert units.token_starts[0] == units.num_prefix
    assert units.token_starts[-1] == len(units.token_ids)
    assert (np.diff(units.token_starts) >= 1).all()
    assert units.frame_starts[0] == 0
    assert units.frame_starts[-1] == sum(utterance.num_frames for utterance in utterances)
    assert (np.diff(units.frame_starts) >= 0).all()
    assert len(units.frame_starts) == len(units.token_starts) == len(units.pauses)


def check_spans(units: Units, spans: list[Span]) -> None:
    assert [unit for span in spans for unit in range(span.start, span.end)] == list(range(units.num_units))
    assert not spans[-1].is_speech
    assert any(span.is_speech for span in spans)
    assert all(a.is_speech != b.is_speech for a, b in pairwise(spans))
    frames = units.frame_starts
    assert all(frames[span.end] > frames[span.start] for span in spans if span.is_speech)


def check_segment(units: Units, spans: list[Span], segment: Segment) -> None:
    """Every scored pair sees the same text so far, the label comes next on both sides, and the text can be rebuilt."""
    ids, student = segment.teacher_ids, segment.token_ids
    assert (segment.teacher_index >= 0).all()
    assert (segment.student_index >= 0).all()
    assert ids[segment.teacher_index + 1].tolist() == segment.labels.tolist()
    assert student[segment.student_index + 1].tolist() == segment.labels.tolist()
    is_text = student[segment.student_index] >= 0
    np.testing.assert_array_equal(student[segment.student_index][is_text], ids[segment.teacher_index][is_text])
    np.testing.assert_array_equal(segment.distance == 0, ~is_text)
    expected_distance = [distance_of(student, position) for position in segment.student_index]
    assert segment.distance.tolist() == expected_distance
    num_unscored = units.num_prefix + (units.num_prefix == 0 and student[0] >= 0)
    assert len(segment.labels) == (student >= 0).sum() - num_unscored
    assert segment_lengths(units, spans) == (len(student), len(ids), len(segment.labels))
    assert rebuild(units, spans, segment) == ids.tolist()
    assert segment.span_lengths.sum() == len(segment.frame_index) == (student < 0).sum()
    expected_frames = [
        [frame]
        for span in spans
        if span.is_speech
        for frame in range(units.frame_starts[span.start], units.frame_starts[span.end])
    ]
    assert segment.frame_index.tolist() == expected_frames


def distance_of(student: np.ndarray, position: int) -> int:
    speech = np.flatnonzero(student[: position + 1] < 0)
    return int(position - speech[-1]) if len(speech) else -1


def rebuild(units: Units, spans: list[Span], segment: Segment) -> list[int]:
    """Read the student's text where it is text, and put the words of each speech span where its frames stand."""
    ids, position = segment.token_ids[: units.num_prefix].tolist(), units.num_prefix
    lengths = iter(segment.span_lengths.tolist())
    for span in spans:
        start, end = units.token_starts[span.start], units.token_starts[span.end]
        if span.is_speech:
            num_frames = next(lengths)
            assert (segment.token_ids[position : position + num_frames] == -1).all()
            ids += units.token_ids[start:end].tolist()
            position += num_frames
        else:
            ids += segment.token_ids[position : position + end - start].tolist()
            position += end - start
    assert position == len(segment.token_ids)
    return ids


def check_passage(utterances: list[Features], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    units = units_of(utterances, tokenizer)
    check_units(units, utterances, tokenizer)
    if units.num_units < 2 or units.frame_starts[-2] == 0:
        with pytest.raises(BadInput):
            draw_spans(units, (1, 5), (1, 4), np.random.default_rng(seed))
        return
    spans = draw_spans(units, (1, 5), (1, 4), np.random.default_rng(seed))
    check_spans(units, spans)
    segment = build_segment(units, spans)
    check_segment(units, spans, segment)
    again = interleave(utterances, tokenizer, (1, 5), (1, 4), np.random.default_rng(seed))
    np.testing.assert_array_equal(again.token_ids, segment.token_ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", TRICKY)
def test_tricky_text_survives(kind: str, text: str) -> None:
    for seed in range(5):
        check_passage([make_features(text)], tokenizer_of(kind), seed)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(parts=st.lists(texts, min_size=1, max_size=3), seed=st.integers(0, 99), with_words=st.booleans())
def test_any_text_survives(kind: str, parts: list[str], seed: int, with_words: bool) -> None:
    utterances = [make_features(text, str(i), with_words=with_words or i > 0) for i, text in enumerate(parts)]
    check_passage(utterances, tokenizer_of(kind), seed)


def test_real_tokenizer(shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "tiny-teacher")
    for seed in range(5):
        check_passage([make_features(text, str(i)) for i, text in enumerate(TRICKY)], tokenizer, seed)


def test_prefix_is_what_the_tokenizer_adds_in_front() -> None:
    tokenizer = tokenizer_of("bos")
    assert prefix_ids(tokenizer) == [tokenizer.bos_token_id]
    assert tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id  # added, and left out by us
    assert all(prefix_ids(tokenizer_of(kind)) == [] for kind in TOKENIZERS if kind != "bos")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_units_are_words_where_no_token_is_shared(kind: str) -> None:
    text = 'She said, ("word and dash—another) 12 345 😀\n\nline'
    units = units_of([make_features(text)], tokenizer_of(kind))
    assert units.num_units == len(text.split())


def test_shared_token_fuses_words_and_their_frames() -> None:
    tokenizer = make_tokenizer("byte_level")
    tokenizer.add_tokens(["b c"])
    utterance = make_features("a b cd e")  # the token after "b c" is a part of "cd"
    apart, fused = units_of([utterance], tokenizer_of("wordpiece")), units_of([utterance], tokenizer)
    assert (apart.num_units, fused.num_units) == (4, 3)
    np.testing.assert_array_equal(fused.frame_starts, apart.frame_starts[[0, 1, 3, 4]])
    np.testing.assert_array_equal(fused.pauses, apart.pauses[[0, 1, 3, 4]])


def test_each_frame_belongs_to_the_word_at_its_centre() -> None:
    rng = np.random.default_rng(0)
    times = np.sort(rng.uniform(0, 6, 24)).tolist()
    words = [Word("abcdefghijkl"[i], times[2 * i], times[2 * i + 1]) for i in range(12)]
    utterance = replace(
        make_features(" ".join(word.text for word in words)), words=words, num_frames=75, duration_secs=6.0
    )
    units = units_of([utterance, utterance], tokenizer_of("wordpiece"))
    cuts = [(a.end_secs + b.start_secs) / 2 for a, b in pairwise(words)]
    for frame in range(150):
        unit = int(np.searchsorted(units.frame_starts, frame, side="right")) - 1
        centre = (frame % 75 + 0.5) / 12.5
        assert unit == 12 * (frame // 75) + sum(cut <= centre for cut in cuts)


def test_pause_between_utterances_counts_silence_and_gap() -> None:
    first = make_features("a b", "1", pause_secs=0.2)
    second = make_features("c d", "2", pause_secs=0.1, offset_secs=first.duration_secs + 0.5)
    first = replace(first, duration_secs=first.duration_secs + 0.3, num_frames=first.num_frames + 4)
    units = units_of([first, second], tokenizer_of("wordpiece"))
    np.testing.assert_allclose(units.pauses, [0, 0.2, (0.2 + 0.3) + 0.2 + 0.1, 0.1, 0])  # silence, gap, silence


@pytest.mark.parametrize("speed", [0.8, 1.0, 1.25])
def test_silence_at_the_end_is_that_of_the_audio_that_is_heard(speed: float) -> None:
    """Augmentation scales words and frames; offset and duration stay the cut's, so neighbours stay neighbours."""
    plain = make_features("word " * 60, pause_secs=0.2)
    assert plain.words is not None
    words = [Word(word.text, word.start_secs / speed, word.end_secs / speed) for word in plain.words]
    heard = replace(plain, words=words, num_frames=math.ceil(plain.num_frames / speed))
    assert timing_of(heard).trailing_secs == pytest.approx(0.2 / speed, abs=1e-9 if speed == 1 else 0.16)


def make_units(num_units: int, frames_per_unit: int = 4, pauses: np.ndarray | None = None) -> Units:
    counts = np.arange(num_units + 1)
    return Units(
        counts, 0, counts, counts * frames_per_unit, np.zeros(num_units + 1) if pauses is None else pauses, False
    )


def test_span_lengths_are_uniform_and_both_kinds_come_first() -> None:
    units = make_units(200)
    inner: dict[bool, set[int]] = {False: set(), True: set()}
    last, first = set(), set()
    for seed in range(400):
        spans = draw_spans(units, (5, 8), (2, 4), np.random.default_rng(seed))
        last.add(spans[-1].end - spans[-1].start)
        first.add(spans[0].is_speech)
        for span in spans[1:-1]:
            inner[span.is_speech].add(span.end - span.start)
    assert inner == {False: {5, 6, 7, 8}, True: {2, 3, 4}}
    assert last == set(range(1, 9))
    assert first == {False, True}


def test_cuts_move_to_the_longest_pause_nearby() -> None:
    pauses = np.zeros(101)
    pauses[5:100:5] = 1.0  # at most two units away from anywhere but the ends
    units = make_units(100, pauses=pauses)
    for seed in range(50):
        spans = draw_spans(units, (5, 20), (5, 15), np.random.default_rng(seed))
        assert all(span.start % 5 == 0 for span in spans[1:] if 3 <= span.start <= 97)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 2)), min_size=2, max_size=60), st.integers(0, 9), st.data())
def test_spans_cover_whatever_the_frames(rows: list[tuple[int, float]], seed: int, data: st.DataObject) -> None:
    low, more = data.draw(st.tuples(st.integers(1, 4), st.integers(0, 40)))
    counts = np.arange(len(rows) + 1)
    frames = np.concatenate([[0], np.cumsum([row[0] for row in rows])])
    units = Units(counts, 0, counts, frames, np.array([0.0] + [row[1] for row in rows]), False)
    rng = np.random.default_rng(seed)
    if frames[-2] == 0:
        with pytest.raises(BadInput, match="no speech frame"):
            draw_spans(units, (low, low + more), (low, low + more), rng)
    else:
        check_spans(units, draw_spans(units, (low, low + more), (low, low + more), rng))


def test_speech_without_a_frame_becomes_text() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        counts = np.arange(31)
        frames = np.concatenate([[0, 1], 1 + np.cumsum(rng.integers(0, 2, 29))])
        units = Units(counts, 0, counts, frames, np.zeros(31), False)
        check_spans(units, draw_spans(units, (1, 3), (1, 2), rng))


def test_whole_utterances_alternate_without_word_times() -> None:
    utterances = [make_features("one two three", str(i), with_words=i != 2) for i in range(5)]
    units = units_of(utterances, tokenizer_of("byte_level"))
    spans = draw_spans(units, (5, 30), (5, 15), np.random.default_rng(0))
    assert spans == [Span(i, i + 1, i % 2 == 1) for i in range(5)]
    assert units.frame_starts.tolist() == [i * utterances[0].num_frames for i in range(6)]


@st.composite
def passages(draw: st.DrawFn, least: int = 1) -> tuple[Units, list[Span]]:
    """Units of any tokens and frames, words without a frame among them, and any spans over them."""
    sizes = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 7)), min_size=least, max_size=25))
    prefix, by_utterance = draw(st.integers(0, 1)), draw(st.booleans())
    tokens, frames = (np.concatenate([[0], np.cumsum(column)]) for column in zip(*sizes, strict=True))
    pauses = np.array(draw(st.lists(st.sampled_from([0.0, 0.3]), min_size=len(tokens), max_size=len(tokens))))
    ids = np.arange(100, 100 + prefix + tokens[-1])
    units = Units(ids, prefix, tokens + prefix, frames, pauses, by_utterance)
    cuts = sorted({0, len(sizes)} | set(draw(st.lists(st.integers(1, len(sizes)), max_size=6))))
    first = draw(st.booleans())
    spoken = [(i % 2 == 0) == first and bool(frames[b] > frames[a]) for i, (a, b) in enumerate(pairwise(cuts))]
    return units, [Span(a, b, is_speech) for (a, b), is_speech in zip(pairwise(cuts), spoken, strict=True)]


def walk(units: Units, spans: list[Span], stride: int) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Position by position: the frames that stand there, and where spoken words end (student's, teacher's position)."""
    position, groups, ends = units.num_prefix, [], []
    for span in spans:
        last_tokens = {unit: int(units.token_starts[unit + 1]) - 1 for unit in range(span.start, span.end)}
        if not span.is_speech:
            position += last_tokens[span.end - 1] + 1 - int(units.token_starts[span.start])
            continue
        unit_of = {f: u for u in last_tokens for f in range(units.frame_starts[u], units.frame_starts[u + 1])}
        frames = sorted(unit_of)
        last_of: dict[int, int] = {}  # unit → the last position whose last frame is the unit's
        for at in range(0, len(frames), stride):
            group = frames[at : at + stride]
            groups.append([*group, *[group[-1]] * (stride - len(group))])
            last_of[unit_of[group[-1]]] = position
            position += 1
        last_of.pop(unit_of[frames[-1]])  # where the span ends the text behind it has its label
        ends += [(at, last_tokens[unit]) for unit, at in sorted(last_of.items())]
    return groups, [] if units.by_utterance else ends


@settings(max_examples=300, deadline=None)
@given(passages(), st.integers(1, 4))
def test_frames_and_word_ends_are_those_of_a_walk_through_the_sample(
    passage: tuple[Units, list[Span]], stride: int
) -> None:
    units, spans = passage
    segment = build_segment(units, spans, stride)
    groups, ends = walk(units, spans, stride)
    assert segment.frame_index.shape == (len(groups), stride)
    assert segment.frame_index.tolist() == groups
    assert list(zip(segment.word_end_student.tolist(), segment.word_end_teacher.tolist(), strict=True)) == ends
    assert len(groups) == (segment.token_ids < 0).sum() == segment.span_lengths.sum()
    assert segment_lengths(units, spans, stride) == (
        len(segment.token_ids),
        len(segment.teacher_ids),
        len(segment.labels),
    )
    assert not set(segment.word_end_student.tolist()) & set(segment.student_index.tolist())
    assert (segment.token_ids[segment.word_end_student + 1] == -1).all()  # the speech goes on


@settings(max_examples=200, deadline=None)
@given(passages(), st.integers(1, 4))
def test_what_stands_at_a_words_end_or_a_cut_has_heard_nothing_behind_it(
    passage: tuple[Units, list[Span]], stride: int
) -> None:
    units, spans = passage
    segment = build_segment(units, spans, stride)
    number = np.cumsum(segment.token_ids < 0)  # speech positions up to and with each position
    for student, teacher in zip(segment.word_end_student, segment.word_end_teacher, strict=True):
        word = int(np.searchsorted(units.token_starts, teacher, side="right")) - 1
        short = units.frame_starts[word + 1] - 1 - segment.frame_index[: number[student]].max()
        assert 0 <= short < stride
    ends = np.cumsum(segment.span_lengths)
    for end, span in zip(ends, [span for span in spans if span.is_speech], strict=True):
        assert segment.frame_index[:end].max(initial=-1) < units.frame_starts[span.end]
        assert (segment.frame_index[end:] >= units.frame_starts[span.end]).all()


def test_word_ends_by_hand() -> None:
    """Words of 3, 0, 2 and 5 frames in a span: the empty one has no end, the last one a text label."""
    starts = np.arange(7)
    units = Units(np.arange(10, 16), 0, starts, np.array([0, 4, 7, 7, 9, 14, 16]), np.zeros(7), False)
    spans = [Span(0, 1, False), Span(1, 5, True), Span(5, 6, False)]
    one, two = build_segment(units, spans), build_segment(units, spans, 2)
    assert one.token_ids.tolist() == [10, *[-1] * 10, 15]
    assert (one.word_end_student.tolist(), one.word_end_teacher.tolist()) == ([3, 5], [1, 3])
    assert two.frame_index.tolist() == [[4, 5], [6, 7], [8, 9], [10, 11], [12, 13]]
    assert (two.word_end_student.tolist(), two.word_end_teacher.tolist()) == ([1, 2], [1, 3])
    assert two.student_index.tolist() == [5]
    whole = replace(units, by_utterance=True)
    assert len(build_segment(whole, spans).word_end_student) == 0


def test_word_ends_of_a_passage_of_two_recorded_utterances() -> None:
    """Recorded one after the other, with word times each of its own: positions go on where the first one ends."""
    first = make_features("a b c", "1", recording_id="r")
    second = make_features("d e f g", "2", recording_id="r", offset_secs=first.duration_secs)
    tokenizer = tokenizer_of("wordpiece")
    units = units_of([first, second], tokenizer)
    assert (first.num_frames, second.num_frames) == (20, 27)  # 1.6 and 2.1 s; a cut between words lies mid-way
    assert units.frame_starts.tolist() == [0, 7, 13, 20, 27, 33, 39, 47]
    assert units.token_starts.tolist() == list(range(8))
    spans = [Span(0, 1, False), Span(1, 6, True), Span(6, 7, False)]  # "a", "b c | d e f" spoken, "g"
    segment = build_segment(units, spans)
    assert segment.token_ids.tolist() == [units.token_ids[0], *[-1] * 32, units.token_ids[6]]
    assert segment.frame_index.ravel().tolist() == list(range(7, 39))
    # Student: the frames from 7 on, behind one token; teacher: b, c, then d and e of the second. f ends with the span.
    assert segment.word_end_student.tolist() == [6, 13, 20, 26]
    assert segment.word_end_teacher.tolist() == [1, 2, 3, 4]
    assert segment.student_index.tolist() == [32]
    assert segment.teacher_index.tolist() == [5]
    untimed = units_of([first, replace(second, words=None)], tokenizer)
    assert len(build_segment(untimed, [Span(0, 1, True), Span(1, 2, False)]).word_end_student) == 0


def test_a_stride_beyond_the_span_is_one_position() -> None:
    assert frame_groups(2, 6, 10).tolist() == [[2, 3, 4, *[5] * 7]]
    assert frame_groups(2, 7, 2).tolist() == [[2, 3], [4, 5], [6, 6]]
    assert frame_groups(3, 3, 2).shape == (0, 2)


@settings(max_examples=200, deadline=None)
@given(passages(least=2), st.integers(1, 30), st.integers(0, 99))
def test_a_whole_sample_is_spoken_but_for_its_end(
    passage: tuple[Units, list[Span]], most_words: int, seed: int
) -> None:
    units, _ = passage
    if units.frame_starts[-2] == 0:
        return
    spans = draw_spans(units, (1, most_words), (1, 3), np.random.default_rng(seed), whole=True)
    check_spans(units, spans)
    assert [span.is_speech for span in spans] == [True, False]
    tail = spans[-1].end - spans[-1].start
    longest = 1 if units.by_utterance else most_words
    assert tail <= longest + 2  # a cut moves by so much to a pause


def test_the_tail_of_whole_samples_is_uniform_and_leaves_something_to_hear() -> None:
    for num_units, longest in ((100, 8), (4, 3)):
        units = make_units(num_units)
        drawn = [draw_spans(units, (5, 8), (2, 4), np.random.default_rng(seed), whole=True) for seed in range(800)]
        tails = np.array([spans[-1].end - spans[-1].start for spans in drawn])
        counts = np.bincount(tails, minlength=longest + 1)
        assert set(tails) == set(range(1, longest + 1))
        expected = np.full(longest, 100.0)
        expected[-1] += 800 - expected.sum()  # what would leave nothing to hear is cut short
        assert (np.abs(counts[1:] - expected) < 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize(
    ("utterance", "reason"),
    [
        (make_features("single"), "single word"),
        (make_features("no word times here", with_words=False), "single utterance"),
        (replace(make_features("a b"), text="a c"), "pieces of the text"),
        (replace(make_features("a b"), num_frames=0), "no speech frame"),
        (make_features("  \n"), "empty"),
        (replace(make_features("a b"), words=[Word("a", 0.0, 0.1), Word("b", float("nan"), 1.0)]), "finite"),
        (replace(make_features("a b"), words=[Word("a", 0.5, 0.6), Word("b", 0.1, 0.2)]), "backwards"),
    ],
)
def test_bad_input_has_its_reason(utterance: Features, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        interleave([utterance], tokenizer_of("byte_level"), (5, 30), (5, 15), np.random.default_rng(0))
