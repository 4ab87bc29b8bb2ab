"""Planning: which utterances, read or heard, stand in which training row of one lane in one epoch.

A plan holds references only. Shards come in an order drawn for (seed, epoch, lane) and are packed as they come: a row
refers to one shard and perhaps the one before it, and rows are shuffled among those that close together, so a reader
that holds two shards reads each of them once. Neighbouring utterances of a recording are joined into passages of many
lengths: long ones teach the model to use its context, short ones fill the rows' ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from salad_ray.config import PackConfig
from salad_ray.names import PACK
from salad_ray.sequences.interleave import (
    Timing,
    Tokens,
    assemble_units,
    draw_spans,
    passage_text,
    prefix_ids,
    segment_lengths,
    timing_of,
    tokenize,
)
from salad_ray.sequences.packing import pack_window
from salad_ray.tables import BadInput, Features, PlanRow, PlanSegment, Reject, Table, from_arrow, schema_of, stable_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_GAP_SECS = 2.0  # utterances further apart are not one passage
MAX_OVERLAP_SECS = 0.5  # nor are those that lie over each other, as clips without a known offset do
MAX_FILL = 0.9  # of the context, for a passage whose exact length is not known yet
_NUM_PROBES = 64  # utterances that are tokenised to estimate the length of the others


@dataclass(frozen=True, slots=True)
class Clip:
    """One usable utterance of a shard."""

    index: int
    utterance: Features
    timing: Timing


@dataclass(frozen=True, slots=True)
class Draft:
    """A planned sample and its lengths."""

    segment: PlanSegment
    num_positions: int
    num_teacher_positions: int
    num_labels: int


def shards_of_lane(shards: Iterable[str], lane: int, num_lanes: int) -> list[str]:
    """The feature shards that belong to a lane."""
    return sorted(shards)[lane::num_lanes]


def plan_shard_name(lane: int, epoch: int) -> str:
    """The plan table's shard for one lane and epoch."""
    return f"lane-{lane:04d}-epoch-{epoch:04d}"


def read_without_features(table: Table, shard: str) -> list[Features]:
    """The rows of a feature shard, `features=b""` and no scales: columns, nearly all of the file, that are not read."""
    columns = [name for name in schema_of(Features).names if name not in ("features", "scales")]
    rows = table.read(shard, columns)
    return from_arrow(Features, rows.append_column("features", pa.array([b""] * rows.num_rows, pa.binary())))


def plan_lane(
    load_rows: Callable[[str], Sequence[Features]],
    shards: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: PackConfig,
    *,
    lane: int,
    epoch: int,
    seed: int,
    split: str = "train",
    stride: int = 1,
) -> tuple[list[PlanRow], list[Reject]]:
    """Plan one lane for one epoch; every utterance of the split is in exactly one row or in the rejects.

    Args:
        load_rows: gives the rows of a feature shard, whose `features` are not looked at.
        shards: the lane's feature shards (`shards_of_lane`).
        tokenizer: the teacher's, fast.
        config: context and span lengths.
        stride: frames side by side at a speech position.
        lane, epoch, seed: with the data they decide everything; another epoch has other spans, passages and order.

    Returns:
        The rows in reading order, and what was left out with its reason.
    """
    rejects: list[Reject] = []

    def drafts_of(shard: str) -> list[Draft]:
        clips, unusable = usable_clips(load_rows(shard), split)
        drafts, rejected = draft_shard(shard, clips, tokenizer, config, (seed, epoch), stride)
        rejects.extend(unusable + rejected)
        return drafts

    return pack_lane(shards, drafts_of, config.context, lane=lane, epoch=epoch, seed=seed), rejects


def pack_lane(
    shards: Sequence[str],
    drafts_of: Callable[[str], list[Draft]],
    context: int,
    *,
    lane: int,
    epoch: int,
    seed: int,
) -> list[PlanRow]:
    """The rows of a lane: its shards in an order drawn for (seed, epoch, lane), packed as they come.

    Args:
        drafts_of: gives the samples of a shard.
        context: positions of a row.
    """
    rng = np.random.default_rng(stable_hash(seed, epoch, lane, "order"))
    order = [shards[i] for i in rng.permutation(len(shards))]
    rows: list[PlanRow] = []
    carried: list[Draft] = []
    for number, shard in enumerate(order):
        num_carried, drafts = len(carried), carried + drafts_of(shard)
        lengths = [(draft.num_positions, draft.num_teacher_positions) for draft in drafts]
        is_last = number == len(order) - 1
        closed, again = pack_window(lengths, context, len(drafts) if is_last else num_carried)
        for i in rng.permutation(len(closed)):
            rows.append(_plan_row([drafts[j] for j in closed[i]], lane, epoch, len(rows)))
        carried = [drafts[i] for i in again]
    return rows


def _plan_row(drafts: Sequence[Draft], lane: int, epoch: int, row: int) -> PlanRow:
    return PlanRow(
        lane=lane,
        epoch=epoch,
        row=row,
        num_positions=sum(draft.num_positions for draft in drafts),
        num_labels=sum(draft.num_labels for draft in drafts),
        segments=[draft.segment for draft in drafts],
    )


def draft_shard(
    shard: str,
    clips: Sequence[Clip],
    tokenizer: PreTrainedTokenizerBase,
    config: PackConfig,
    key: tuple[int, int],
    stride: int = 1,
) -> tuple[list[Draft], list[Reject]]:
    """Join a shard's utterances into passages that fit the context and draw their spans.

    Args:
        key: (seed, epoch); together with a passage's first utt_id it decides the spans.
    """
    rejects: list[Reject] = []
    prefix = prefix_ids(tokenizer)
    tokens_per_char = _tokens_per_char(clips[:_NUM_PROBES], tokenizer)
    pending = [part for chain in find_chains(clips) for part in cut_chain(chain, config, tokens_per_char, key, stride)]
    drafts: list[Draft] = []
    while pending:
        texts = [passage_text([clip.utterance for clip in passage]) for passage in pending]
        too_long: list[list[Clip]] = []
        for passage, tokens in zip(pending, tokenize(texts, tokenizer), strict=True):
            try:
                draft = _draft(shard, passage, tokens, prefix, config, key, stride)
            except BadInput as error:
                rejects += [Reject(PACK, clip.utterance.utt_id, str(error)) for clip in passage]
                continue
            if draft is None:
                too_long.append(passage)
            else:
                drafts.append(draft)
        pending = [half for passage in too_long for half in _halves(passage)]
    return drafts, rejects


def usable_clips(utterances: Sequence[Features], split: str) -> tuple[list[Clip], list[Reject]]:
    """The utterances of a split whose text and times fit together, and the rest with the reason."""
    clips, rejects = [], []
    for index, utterance in enumerate(utterances):
        if utterance.split != split:
            continue
        try:
            clips.append(Clip(index, utterance, timing_of(utterance)))
        except BadInput as error:
            rejects.append(Reject(PACK, utterance.utt_id, str(error)))
    return clips, rejects


def _tokens_per_char(clips: Sequence[Clip], tokenizer: PreTrainedTokenizerBase) -> float:
    texts = [clip.utterance.text for clip in clips]
    return sum(len(tokens.ids) for tokens in tokenize(texts, tokenizer)) / max(1, sum(map(len, texts)))


def find_chains(clips: Sequence[Clip]) -> list[list[Clip]]:
    """Runs of utterances that follow each other in a recording, in order of their first appearance."""
    by_recording: dict[str, list[Clip]] = {}
    for clip in clips:
        by_recording.setdefault(clip.utterance.recording_id, []).append(clip)
    chains: list[list[Clip]] = []
    for recording in by_recording.values():
        recording.sort(key=_place)
        chains.append(recording[:1])
        for previous, clip in pairwise(recording):
            if not _is_adjacent(previous.utterance, clip.utterance):
                chains.append([])
            chains[-1].append(clip)
    return chains


def _place(clip: Clip) -> tuple[bool, float, int]:
    """Sorts the clips of a recording: by their order where that is known, else by their offset."""
    utterance = clip.utterance
    place = utterance.offset_secs if utterance.order is None else utterance.order
    return utterance.order is None, place, clip.index


def _is_adjacent(first: Features, second: Features) -> bool:
    if first.order is not None and second.order is not None:
        return second.order == first.order + 1
    gap_secs = second.offset_secs - first.offset_secs - first.duration_secs
    return second.offset_secs > first.offset_secs and -MAX_OVERLAP_SECS <= gap_secs <= MAX_GAP_SECS


def cut_chain(
    chain: Sequence[Clip], config: PackConfig, tokens_per_char: float, key: tuple[int, int], stride: int = 1
) -> list[list[Clip]]:
    """Cut a run of utterances into passages, each at most as long as a length drawn for it.

    The lengths have density ∝ 1/√length up to `MAX_FILL` of the context. A passage has at least two units (words, or
    utterances without word times), where the chain has them, so that none is lost for being alone.
    """
    if len(chain) == 1:
        return [list(chain)]
    rng = np.random.default_rng(stable_hash(*key, chain[0].utterance.utt_id, "passages"))
    by_utterance = not all(clip.timing.has_words for clip in chain)
    passages: list[list[Clip]] = []
    room, num_units, share = 0.0, 0, 0.0
    for clip in chain:
        size = _expected_positions(clip, share, tokens_per_char, stride)
        if not passages or (size > room and num_units >= 2):
            passages.append([])
            room, num_units = MAX_FILL * config.context * rng.random() ** 2, 0
            share = _speech_share(config, by_utterance, is_whole(config, key, clip.utterance.utt_id))
            size = _expected_positions(clip, share, tokens_per_char, stride)
        passages[-1].append(clip)
        room -= size
        num_units += 1 if by_utterance else len(clip.timing.frame_starts)
    if num_units < 2 and len(passages) > 1:
        passages[-2:] = [passages[-2] + passages[-1]]
    return passages


def is_whole(config: PackConfig, key: tuple[int, int], utt_id: str) -> bool:
    """Whether the sample that begins with this utterance is spoken but for its last words."""
    if config.whole_share == 0:
        return False
    return bool(np.random.default_rng(stable_hash(*key, utt_id, "whole")).random() < config.whole_share)


def _speech_share(config: PackConfig, by_utterance: bool, whole: bool) -> float:
    """Share of a sample's words that is expected to be spoken."""
    if whole:
        return 1.0
    text, speech = sum(config.text_words), sum(config.speech_words)
    return 0.5 if by_utterance else speech / (text + speech)


def _expected_positions(clip: Clip, speech_share: float, tokens_per_char: float, stride: int) -> float:
    num_tokens = tokens_per_char * len(clip.utterance.text)
    return max(num_tokens, speech_share * clip.timing.num_frames / stride + (1 - speech_share) * num_tokens)


def _draft(
    shard: str,
    passage: Sequence[Clip],
    tokens: Tokens,
    prefix: Sequence[int],
    config: PackConfig,
    key: tuple[int, int],
    stride: int,
) -> Draft | None:
    """A passage with its spans drawn, or None when it is too long but can be halved.

    A single utterance that does not fit when it is spoken whole gets the usual spans, so that none is lost by its draw.
    """
    utterances = [clip.utterance for clip in passage]
    units = assemble_units(utterances, [clip.timing for clip in passage], tokens, prefix)
    whole = is_whole(config, key, utterances[0].utt_id)
    for is_spoken in (True, False) if whole and len(passage) == 1 else (whole,):
        rng = np.random.default_rng(stable_hash(*key, utterances[0].utt_id))
        spans = draw_spans(units, config.text_words, config.speech_words, rng, is_spoken)
        student, teacher, num_labels = segment_lengths(units, spans, stride)
        if max(student, teacher) <= config.context:
            return Draft(PlanSegment(shard, [clip.index for clip in passage], spans), student, teacher, num_labels)
    if len(passage) == 1:
        raise BadInput(f"needs {max(student, teacher)} positions, more than pack.context={config.context}")
    return None


def _halves(passage: list[Clip]) -> tuple[list[Clip], list[Clip]]:
    middle = len(passage) // 2
    return passage[:middle], passage[middle:]
