"""Interleaving: one passage of speech becomes a sequence of text tokens and speech frames, with its teacher.

A passage (one utterance, or several consecutive ones of a recording, their texts joined by a space) is tokenised once,
as a whole, with character offsets. Words that share a token are fused; what remains is the *unit*, the smallest thing
that can be text or speech, with a contiguous range of tokens and of frames. Spans are made of whole units, so the
student's text tokens are the teacher's, id by id, and every (student position, teacher position) pair is exact.

With a stride n, n frames of a speech span stand side by side at one position, counted from the span's start: training
and listening, where nobody knows the words, make the same groups. The last group of a span repeats the span's last
frame, so what stands before a cut has heard nothing behind it.

Shapes: N text tokens (prefix included), U units, W words, F speech positions of the sample (frames, or groups of n),
S_stu student positions, P speech spans, L scored labels, E word ends.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle, pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from salad_ray.config import ConfigError
from salad_ray.tables import BadInput, Features
from salad_ray.tables import Span as Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

MAX_CUT_SHIFT = 2  # units by which a drawn cut may move to a longer pause
_WORD = re.compile(r"\S+")


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenised text without special tokens: ids (N,) and the characters [starts, ends) that each came from."""

    ids: IntArray
    starts: IntArray
    ends: IntArray


@dataclass(frozen=True, slots=True)
class Timing:
    """When the words of one utterance are spoken; a single "word" when their times are not known.

    frame_starts: (W,) first frame of each word; the last word ends with the utterance.
    pauses: (W,) seconds of silence before each word.
    trailing_secs: silence after the last word.
    """

    frame_starts: IntArray
    pauses: FloatArray
    trailing_secs: float
    num_frames: int
    has_words: bool


@dataclass(frozen=True, slots=True)
class Units:
    """A passage cut into its smallest switchable parts.

    token_ids: (N,) the prefix (BOS, if the tokenizer adds one) and the tokens of the whole text.
    num_prefix: tokens before the text.
    token_starts: (U + 1,) unit u has tokens [token_starts[u], token_starts[u + 1]), at least one.
    frame_starts: (U + 1,) and frames [frame_starts[u], frame_starts[u + 1]), maybe none, counted through the passage.
    pauses: (U + 1,) seconds of silence at each cut; 0 at both ends.
    by_utterance: units are whole utterances, because word times are missing.
    """

    token_ids: IntArray
    num_prefix: int
    token_starts: IntArray
    frame_starts: IntArray
    pauses: FloatArray
    by_utterance: bool

    @property
    def num_units(self) -> int:
        return len(self.token_starts) - 1

    @property
    def num_frames(self) -> int:
        return int(self.frame_starts[-1])


def _no_positions() -> IntArray:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Segment:
    """One sample, ready to be put into a row.

    token_ids: (S_stu,) the student's text tokens, -1 where speech stands.
    frame_index: (F, n) the frames at each speech position, counted through the concatenated utterances.
    span_lengths: (P,) positions of each speech span.
    teacher_ids: (N,) the whole text, as the tokenizer gives it.
    student_index, teacher_index: (L,) positions whose next-token distributions are compared.
    labels: (L,) the token that follows both.
    distance: (L,) text tokens since the last speech frame: 0 predicted from the frame itself, -1 before any speech.
    word_end_student, word_end_teacher: (E,) positions at the ends of spoken words: the student's last one of the word,
        and the teacher's last token of it. Only training with `distill.word_ends` compares them.
    """

    token_ids: IntArray
    frame_index: IntArray
    span_lengths: IntArray
    teacher_ids: IntArray
    student_index: IntArray
    teacher_index: IntArray
    labels: IntArray
    distance: IntArray
    word_end_student: IntArray = field(default_factory=_no_positions)
    word_end_teacher: IntArray = field(default_factory=_no_positions)


def interleave(
    utterances: Sequence[Features],
    tokenizer: PreTrainedTokenizerBase,
    text_words: tuple[int, int],
    speech_words: tuple[int, int],
    rng: np.random.Generator,
    stride: int = 1,
    whole: bool = False,
) -> Segment:
    """Turn consecutive utterances of a recording into one sample with freshly drawn spans.

    Args:
        utterances: in order; their `features` are not looked at.
        tokenizer: a fast Hugging Face tokenizer.
        text_words: shortest and longest text span, in words.
        speech_words: shortest and longest speech span, in words.
        rng: decides the spans.
        stride: frames side by side at a speech position.
        whole: speak all but a last text span.

    Raises:
        BadInput: words and text disagree, fewer than two units, or nothing to hear before the last unit.
    """
    units = units_of(utterances, tokenizer)
    return build_segment(units, draw_spans(units, text_words, speech_words, rng, whole), stride)


def units_of(utterances: Sequence[Features], tokenizer: PreTrainedTokenizerBase) -> Units:
    """Tokenise a passage and cut it into units; raises `BadInput` as `timing_of` and `assemble_units` do."""
    timings = [timing_of(utterance) for utterance in utterances]
    (tokens,) = tokenize([passage_text(utterances)], tokenizer)
    return assemble_units(utterances, timings, tokens, prefix_ids(tokenizer))


def passage_text(utterances: Sequence[Features]) -> str:
    """The text of consecutive utterances as one."""
    return " ".join(utterance.text for utterance in utterances)


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer puts before a text by itself: usually BOS or nothing."""
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name_or_path} gives no character offsets; use a model with a tokenizer.json"
        )
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    starts = (start for start in range(len(full)) if full[start : start + len(plain)] == plain)
    return full[: next(starts, 0)]


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
    """Tokenise texts, each as a whole and without special tokens, in one call."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,  # passages may exceed `model_max_length`; the packer keeps them within the context
    )
    return [_tokens(*pair) for pair in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)]


def _tokens(ids: list[int], offsets: list[tuple[int, int]]) -> Tokens:
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    return Tokens(np.array(ids, dtype=np.int64), starts, ends)


def timing_of(utterance: Features) -> Timing:
    """Check an utterance's words and give each its frames.

    The cut between two words lies mid-way in the pause between them, and a frame belongs to the word in whose
    interval its centre (f + 0.5) / frame_rate lies; the first word starts with frame 0, the last ends with the last.

    Raises:
        BadInput: empty text, words that are not `text.split()`, or times that are not finite or go backwards.
    """
    if not utterance.text or utterance.text.isspace():
        raise BadInput("the text is empty")
    if utterance.words is None:
        return Timing(np.zeros(1, np.int64), np.zeros(1), 0.0, utterance.num_frames, has_words=False)
    if [word.text for word in utterance.words] != utterance.text.split():
        raise BadInput("the words are not the whitespace-separated pieces of the text")
    starts = np.array([word.start_secs for word in utterance.words])
    ends = np.array([word.end_secs for word in utterance.words])
    _check_times(starts, ends)
    cuts = (ends[:-1] + starts[1:]) / 2
    centres = (np.arange(utterance.num_frames) + 0.5) / utterance.frame_rate
    frame_starts = np.concatenate([[0], np.searchsorted(centres, cuts)])
    pauses = np.maximum(starts - np.concatenate([[0.0], ends[:-1]]), 0.0)
    # `duration_secs` is the cut's in its recording; what is heard may have been made faster or slower, as frames tell.
    least, most = (np.array([-1, 0]) + utterance.num_frames) / utterance.frame_rate
    trailing_secs = max(0.0, float(np.clip(utterance.duration_secs, least, most) - ends[-1]))
    return Timing(frame_starts, pauses, trailing_secs, utterance.num_frames, has_words=True)


def _check_times(starts: FloatArray, ends: FloatArray) -> None:
    if not (np.isfinite(starts).all() and np.isfinite(ends).all()):
        raise BadInput("a word time is not a finite number")
    if (starts[1:] < starts[:-1]).any() or (ends[1:] < ends[:-1]).any() or (ends < starts).any():
        raise BadInput("the word times go backwards")


def assemble_units(
    utterances: Sequence[Features], timings: Sequence[Timing], tokens: Tokens, prefix: Sequence[int]
) -> Units:
    """Bring tokens and times together: fuse the words that share a token, and give every unit its ranges.

    Without word times in every utterance the pieces are whole utterances instead of words.

    Raises:
        BadInput: the tokenizer makes nothing of the text.
    """
    if len(tokens.ids) == 0:
        raise BadInput("the tokenizer makes no token of the text")
    by_utterance = not all(timing.has_words for timing in timings)
    starts, ends = _utterance_chars(utterances) if by_utterance else _word_chars(passage_text(utterances))
    frame_starts, pauses = _join_timings(utterances, timings, by_utterance)
    unit_tokens, unit_pieces = _fuse(tokens, starts, ends)
    pauses = pauses[unit_pieces]
    pauses[[0, -1]] = 0.0
    return Units(
        token_ids=np.concatenate([np.array(prefix, dtype=np.int64), tokens.ids]),
        num_prefix=len(prefix),
        token_starts=unit_tokens + len(prefix),
        frame_starts=frame_starts[unit_pieces],
        pauses=pauses,
        by_utterance=by_utterance,
    )


def _word_chars(text: str) -> tuple[IntArray, IntArray]:
    spans = np.array([match.span() for match in _WORD.finditer(text)], dtype=np.int64)
    return spans[:, 0], spans[:, 1]


def _utterance_chars(utterances: Sequence[Features]) -> tuple[IntArray, IntArray]:
    lengths = np.array([len(utterance.text) for utterance in utterances])
    ends = np.cumsum(lengths + 1) - 1  # one space between two utterances
    return ends - lengths, ends


def _fuse(tokens: Tokens, starts: IntArray, ends: IntArray) -> tuple[IntArray, IntArray]:
    """Boundaries (U + 1,) of the units, in tokens and in pieces (words or utterances at characters [starts, ends)).

    A token belongs to the piece of its first non-space character, a token of nothing but space to the piece after it
    (else before it); tokens that reach into a later piece fuse both. A piece without a token joins the one before.
    """
    first = np.minimum(np.searchsorted(ends, tokens.starts, side="right"), len(ends) - 1)
    last = np.maximum(first, np.searchsorted(starts, tokens.ends) - 1)
    reached = np.maximum.accumulate(last)
    ahead = np.minimum.accumulate(first[::-1])[::-1]  # = first, unless a tokenizer moves characters around
    cuts = np.flatnonzero(ahead[1:] > reached[:-1]) + 1
    return np.concatenate([[0], cuts, [len(first)]]), np.concatenate([[0], ahead[cuts], [len(ends)]])


def _join_timings(
    utterances: Sequence[Features], timings: Sequence[Timing], by_utterance: bool
) -> tuple[IntArray, FloatArray]:
    """First frame of, and silence before, each piece of a passage, both (pieces + 1,)."""
    num_pieces = 1 if by_utterance else None
    frame_starts, pauses = [], []
    num_frames, silence_secs = 0, 0.0
    for i, timing in enumerate(timings):
        frame_starts.append(timing.frame_starts[:num_pieces] + num_frames)
        before = timing.pauses[:num_pieces].copy()
        if i > 0:
            previous = utterances[i - 1]
            gap_secs = utterances[i].offset_secs - previous.offset_secs - previous.duration_secs
            before[0] += silence_secs + max(0.0, gap_secs)
        pauses.append(before)
        num_frames += timing.num_frames
        silence_secs = timing.trailing_secs
    return np.concatenate([*frame_starts, [num_frames]]), np.concatenate([*pauses, [0.0]])


def draw_spans(
    units: Units,
    text_words: tuple[int, int],
    speech_words: tuple[int, int],
    rng: np.random.Generator,
    whole: bool = False,
) -> list[Span]:
    """Draw alternating text and speech spans that cover the passage and end in text.

    Lengths are uniform, drawn from the end backwards; the last text span has 1 to `text_words[1]` units, as if the
    passage had been cut at random, so the first span may be of either kind. A cut moves by up to `MAX_CUT_SHIFT`
    units to the longest pause. Units that are whole utterances alternate one by one.

    Of a `whole` sample everything before the last text span is speech; of units that are utterances, all but the last.

    Raises:
        BadInput: fewer than two units, or no speech frame before the last unit.
    """
    if units.num_units < 2:
        what = "utterance, and its word times are not known" if units.by_utterance else "word"
        raise BadInput(f"a sample needs speech followed by text, but this is a single {what}")
    if units.frame_starts[-2] == 0:
        raise BadInput("there is no speech frame before the last word")
    if whole:
        bounds = [units.num_units, _last_cut(units, text_words[1], rng), 0]
    elif units.by_utterance:
        bounds = list(range(units.num_units, -1, -1))
    else:
        bounds = _draw_bounds(units, text_words, speech_words, rng)
    spans = _alternate(bounds, units.frame_starts)
    return spans if any(span.is_speech for span in spans) else _two_spans(units, rng)


def _last_cut(units: Units, most_words: int, rng: np.random.Generator) -> int:
    """Where the last text span of a whole sample begins: at least a frame is heard before, and a unit read behind."""
    num_units, first = units.num_units, int(np.argmax(units.frame_starts > 0))
    tail = 1 if units.by_utterance else int(rng.integers(1, most_words + 1))
    return max(first, _nearest_pause(units.pauses.tolist(), max(1, num_units - tail), num_units))


def _draw_bounds(
    units: Units, text_words: tuple[int, int], speech_words: tuple[int, int], rng: np.random.Generator
) -> list[int]:
    """Span boundaries from the last to the first."""
    pauses = units.pauses.tolist()
    bounds = [units.num_units]
    for low, high in chain([(1, text_words[1])], cycle([speech_words, text_words])):
        drawn = bounds[-1] - int(rng.integers(low, high + 1))
        if drawn <= 0:
            break
        bounds.append(_nearest_pause(pauses, drawn, bounds[-1]))
    return [*bounds, 0]


def _nearest_pause(pauses: list[float], drawn: int, end: int) -> int:
    """The cut with the longest pause around `drawn`, strictly between 0 and `end`; the nearest of equals."""
    candidates = range(max(1, drawn - MAX_CUT_SHIFT), min(end - 1, drawn + MAX_CUT_SHIFT) + 1)
    return max(candidates, key=lambda cut: (pauses[cut], -abs(cut - drawn)))


def _alternate(bounds: Sequence[int], frame_starts: IntArray) -> list[Span]:
    """Spans between descending bounds, in ascending order; speech without a frame becomes text and merges."""
    spans: list[Span] = []  # from the last to the first
    for number, (end, start) in enumerate(pairwise(bounds)):
        is_speech = number % 2 == 1 and bool(frame_starts[end] > frame_starts[start])
        if spans and spans[-1].is_speech == is_speech:
            end = spans.pop().end
        spans.append(Span(start, end, is_speech))
    return spans[::-1]


def _two_spans(units: Units, rng: np.random.Generator) -> list[Span]:
    cuts = np.flatnonzero(units.frame_starts[1:-1] > 0) + 1
    cut = int(rng.choice(cuts))
    return [Span(0, cut, True), Span(cut, units.num_units, False)]


def frame_groups(start: int, end: int, stride: int) -> IntArray:
    """(S, n) the frames at each position of a span of the frames [start, end), n = stride side by side.

    A last group that is not full repeats the span's last frame.
    """
    return np.minimum(np.arange(start, end, stride)[:, None] + np.arange(stride), end - 1)


def segment_lengths(units: Units, spans: Sequence[Span], stride: int = 1) -> tuple[int, int, int]:
    """Student positions, teacher positions and labels (word ends not among them) of the sample, without building it."""
    tokens, frames = units.token_starts, units.frame_starts
    num_text = sum(int(tokens[span.end] - tokens[span.start]) for span in spans if not span.is_speech)
    num_speech = sum(-(-int(frames[span.end] - frames[span.start]) // stride) for span in spans if span.is_speech)
    is_first_unscored = units.num_prefix == 0 and not spans[0].is_speech
    return units.num_prefix + num_text + num_speech, len(units.token_ids), num_text - is_first_unscored


def build_segment(units: Units, spans: Sequence[Span], stride: int = 1) -> Segment:
    """Lay out the student's sequence [prefix] + spans and pair its scored positions with the teacher's.

    Every text token with a predecessor is a label. The first one after a speech span is predicted from the span's last
    frame; its teacher position is the last text token that the span replaced.
    """
    ids, position = units.token_ids, units.num_prefix
    empty = np.zeros(0, np.int64)
    students, student, teacher, distance = [ids[:position]], [empty], [empty], [empty]
    frames, ends = [np.zeros((0, stride), np.int64)], [np.zeros((2, 0), np.int64)]
    for span in spans:
        start, end = units.token_starts[span.start], units.token_starts[span.end]
        if span.is_speech:
            first, last = units.frame_starts[[span.start, span.end]].tolist()
            frames.append(frame_groups(first, last, stride))
            students.append(np.full(len(frames[-1]), -1))
            ends.append(_word_ends(units, span, stride, position))
        else:
            since = np.arange(position == 0, end - start)  # nothing predicts the first element
            students.append(ids[start:end])
            student.append(position - 1 + since)
            teacher.append(start - 1 + since)
            distance.append(since if len(frames) > 1 else np.full(len(since), -1))
        position += len(students[-1])
    teacher_index = np.concatenate(teacher)
    word_end_student, word_end_teacher = np.concatenate(ends, axis=1)
    return Segment(
        token_ids=np.concatenate(students),
        frame_index=np.concatenate(frames),
        span_lengths=np.array([len(part) for part in frames[1:]], dtype=np.int64),
        teacher_ids=ids,
        student_index=np.concatenate(student),
        teacher_index=teacher_index,
        labels=ids[teacher_index + 1],
        distance=np.concatenate(distance),
        word_end_student=word_end_student,
        word_end_teacher=word_end_teacher,
    )


def _word_ends(units: Units, span: Span, stride: int, position: int) -> IntArray:
    """(2, E) the student's last position and the teacher's last token of each unit that ends inside a speech span.

    A position counts for the word in which its last frame lies, so with a stride the end of a word may be heard up to
    `stride` − 1 frames short, but never anything behind it. Left out are units in which no position ends, and whatever
    ends with the span: there the text label stands. Units that are utterances have none, since nobody knows where their
    words end.

    Args:
        position: the student's, where the span begins.
    """
    if units.by_utterance:
        return np.zeros((2, 0), np.int64)
    frames = units.frame_starts[span.start : span.end + 1] - units.frame_starts[span.start]
    whole = frames // stride  # positions that end before each unit begins
    (unit,) = np.nonzero((whole[1:] > whole[:-1]) & (frames[1:] < frames[-1]))
    return np.stack([position + whole[unit + 1] - 1, units.token_starts[span.start + unit + 1] - 1])
