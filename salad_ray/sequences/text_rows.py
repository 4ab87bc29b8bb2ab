"""Rows of text alone: passages that training reads and never hears, so that the student keeps its teacher's text.

A sample is the passage's tokens behind the tokenizer's prefix. The student's positions are the teacher's, and each but
the first is scored. Nothing is drawn, so a plan has one epoch per lane, which training reads again and again; its rows
are named, ordered and packed as those of speech are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from salad_ray.names import PACK
from salad_ray.sequences.batch import Sample
from salad_ray.sequences.interleave import Segment, Span, Tokens, Units, build_segment, prefix_ids, tokenize
from salad_ray.sequences.plan import Draft, pack_lane
from salad_ray.tables import BadInput, PlanRow, PlanSegment, Reject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Text:
    """A passage of a shard, at this row of it."""

    index: int
    passage_id: str
    text: str


def text_segment(tokens: Tokens, prefix: Sequence[int], num_tokens: int) -> Segment:
    """The sample of the first `num_tokens` tokens of a passage, each of them a unit; no speech.

    Raises:
        BadInput: the text has fewer tokens.
    """
    if num_tokens > len(tokens.ids):
        raise BadInput(f"has {len(tokens.ids)} tokens, and {num_tokens} were planned with another tokenizer")
    nothing = np.zeros(num_tokens + 1, np.int64)
    units = Units(
        token_ids=np.concatenate([np.array(prefix, np.int64), tokens.ids[:num_tokens]]),
        num_prefix=len(prefix),
        token_starts=len(prefix) + np.arange(num_tokens + 1),
        frame_starts=nothing,
        pauses=nothing.astype(np.float64),
        by_utterance=False,
    )
    return build_segment(units, [Span(0, num_tokens, is_speech=False)])


def text_samples(
    segments: Sequence[PlanSegment], texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Sample]:
    """The samples of one planned row, from the text of each segment; raises `BadInput` as `text_segment`."""
    prefix = prefix_ids(tokenizer)
    tokens = tokenize(texts, tokenizer)
    planned = [segment.spans[-1].end for segment in segments]
    no_frames = np.zeros((0, 0), np.float16)
    return [Sample(text_segment(own, prefix, num), no_frames) for own, num in zip(tokens, planned, strict=True)]


def plan_text_lane(
    load_texts: Callable[[str], Sequence[Text]],
    shards: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    *,
    lane: int,
    seed: int,
) -> tuple[list[PlanRow], list[Reject], int]:
    """Plan one lane; every passage is in exactly one row or in the rejects.

    Args:
        load_texts: gives the passages of a shard.
        shards: the lane's shards (`shards_of_lane`).
        context: positions of a row, at which longer passages are cut.

    Returns:
        The rows in reading order, what was left out with its reason, and the number of tokens that were cut off.
    """
    rejects: list[Reject] = []
    num_cut = 0
    prefix = prefix_ids(tokenizer)

    def drafts_of(shard: str) -> list[Draft]:
        nonlocal num_cut
        drafts = []
        texts = load_texts(shard)
        for text, tokens in zip(texts, tokenize([text.text for text in texts], tokenizer), strict=True):
            num_tokens = min(len(tokens.ids), context - len(prefix))
            num_positions = len(prefix) + num_tokens
            if num_tokens < 1 or num_positions < 2:
                rejects.append(Reject(PACK, text.passage_id, "the tokenizer makes fewer than two positions of it"))
                continue
            num_cut += len(tokens.ids) - num_tokens
            segment = PlanSegment(shard, [text.index], [Span(0, num_tokens, is_speech=False)])
            num_labels = num_tokens - (not prefix)
            drafts.append(Draft(segment, num_positions, num_positions, num_labels))
        return drafts

    rows = pack_lane(shards, drafts_of, context, lane=lane, epoch=0, seed=seed)
    return rows, rejects, num_cut
