"""How held-out passages are heard when F and M are measured: by two protocols that do not depend on training.

`interleaved` is the paper's: text and speech by turns, in spans of `measure.text_words` and `measure.speech_words`.
`whole` speaks all but the last `measure.whole_tail_words` words and scores the tokens of these: no text after the first
word gives away what was spoken. Both are of the same passages, cut so that they fit the context when all is spoken, and
their spans follow from the passage alone, so that runs with other training, seeds or `pack` can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from salad_ray.config import MeasureConfig, Protocol
from salad_ray.sequences.interleave import (
    Segment,
    Span,
    Units,
    assemble_units,
    build_segment,
    draw_spans,
    passage_text,
    prefix_ids,
    tokenize,
)
from salad_ray.sequences.plan import Clip, find_chains, usable_clips
from salad_ray.tables import BadInput, Features, stable_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LeftOut = list[tuple[str, str]]
"""utt_id and reason."""


@dataclass(frozen=True)
class HeldOut:
    """A passage to be measured: one utterance, or neighbouring ones of a recording."""

    utterances: list[Features]
    units: Units

    @property
    def key(self) -> str:
        return self.utterances[0].utt_id

    @property
    def source(self) -> str:
        """The book, video or document, which is what was held out."""
        return self.utterances[0].source or self.utterances[0].recording_id

    @property
    def domain(self) -> str:
        return self.utterances[0].domain


def held_out(
    utterances: Sequence[Features], tokenizer: PreTrainedTokenizerBase, settings: MeasureConfig, context: int
) -> tuple[list[HeldOut], LeftOut]:
    """The passages of a shard's `split=test` utterances, and what cannot be used.

    Utterances that follow each other are joined to passages of about `passage_secs`, and of no more than `context`
    positions if all were spoken and all written.
    """
    clips, rejects = usable_clips(utterances, "test")
    left_out = [(reject.key, reject.reason) for reject in rejects]
    prefix = prefix_ids(tokenizer)
    pending = [part for chain in find_chains(clips) for part in _parts(chain, settings.passage_secs)]
    found: list[HeldOut] = []
    while pending:
        texts = [passage_text([clip.utterance for clip in part]) for part in pending]
        halves: list[list[Clip]] = []
        for part, tokens in zip(pending, tokenize(texts, tokenizer), strict=True):
            spoken = [clip.utterance for clip in part]
            try:
                units = assemble_units(spoken, [clip.timing for clip in part], tokens, prefix)
            except BadInput as error:
                left_out += [(utterance.utt_id, str(error)) for utterance in spoken]
                continue
            if len(part) > 1 and units.num_frames + len(units.token_ids) > context:
                halves += [part[: len(part) // 2], part[len(part) // 2 :]]
            else:
                found.append(HeldOut(spoken, units))
        pending = halves
    return found, left_out


def _parts(chain: Sequence[Clip], passage_secs: float) -> list[list[Clip]]:
    """A run of utterances in equal parts; of two at least where word times are missing, since they then alternate."""
    number = math.ceil(sum(clip.utterance.duration_secs for clip in chain) / passage_secs)
    least = 1 if all(clip.timing.has_words for clip in chain) else 2
    number = max(1, min(number, len(chain) // least))
    return [[chain[i] for i in part] for part in np.array_split(np.arange(len(chain)), number)]


def read_by(
    protocol: Protocol, passages: Sequence[HeldOut], settings: MeasureConfig, context: int, stride: int = 1
) -> tuple[list[tuple[HeldOut, Segment]], LeftOut]:
    """The sample that a protocol makes of each passage; those that are too short or too long for it are left out.

    Args:
        stride: of the model's adapter, frames side by side at a position.
    """
    found: list[tuple[HeldOut, Segment]] = []
    left_out: LeftOut = []
    for passage in passages:
        try:
            segment = build_segment(passage.units, spans_of(protocol, passage, settings), stride)
            longest = max(len(segment.token_ids), len(segment.teacher_ids))
            if longest > context:
                raise BadInput(f"needs {longest} positions, more than pack.context={context}")
        except BadInput as error:
            left_out += [(utterance.utt_id, f"{protocol}: {error}") for utterance in passage.utterances]
        else:
            found.append((passage, segment))
    return found, left_out


def spans_of(protocol: Protocol, passage: HeldOut, settings: MeasureConfig) -> list[Span]:
    """What is spoken and what is text; raises `BadInput` for a passage in which no text follows speech."""
    if protocol == "whole":
        return whole_spans(passage.units, settings.whole_tail_words)
    rng = np.random.default_rng(stable_hash("measure", passage.key))
    return draw_spans(passage.units, settings.text_words, settings.speech_words, rng)


def whole_spans(units: Units, tail_words: int) -> list[Span]:
    """Everything spoken but the last words; raises `BadInput` without word times, or where nothing is left to speak."""
    if units.by_utterance:
        raise BadInput("the word times are not known")
    cut = units.num_units - tail_words
    if cut < 1 or units.frame_starts[cut] == 0:
        raise BadInput(
            f"of its {units.num_units} words the last {tail_words} (measure.whole_tail_words) are not spoken, and "
            "before them is no speech"
        )
    return [Span(0, cut, True), Span(cut, units.num_units, False)]
