"""How much of a document of the embedded world only hearing tells: the rest stands in the text around the spans."""

from __future__ import annotations

import re

import numpy as np
import pytest

from salad_ray.evaluation.protocols import whole_spans
from salad_ray.sequences.interleave import Units, draw_spans
from salad_ray.text.world import _WORLD, DOMAINS, world_passages

PAPER, TRAINING = ((10, 30), (5, 15)), ((4, 14), (3, 40))
"""Text and speech words: of the protocol `interleaved`, and of the quickstart's training."""


def only_heard(kind: str) -> float:
    """Of the scored values that were mentioned before, the share whose mentions before all lie in spoken spans."""
    rng, told_again, heard_alone = np.random.default_rng(0), 0, 0
    for passage in world_passages(600, DOMAINS, seed=0, split="test"):
        values = [value.split() for pool in _WORLD[passage.domain].attributes.values() for value in pool]
        value_of = {word: value[1] for value in values for word in value}
        words = [value_of.get(re.sub(r"\W", "", word)) for word in passage.text.split()]
        counts = np.arange(len(words) + 1)
        units = Units(counts, 0, counts, counts * 4, np.zeros(len(words) + 1), by_utterance=False)
        text_words, speech_words = PAPER if kind == "interleaved" else TRAINING
        whole = kind == "training whole"
        spans = whole_spans(units, 4) if kind == "whole" else draw_spans(units, text_words, speech_words, rng, whole)
        is_spoken = np.concatenate([np.full(span.end - span.start, span.is_speech) for span in spans])
        for place in range(int(is_spoken.argmax()), len(words)):
            before = [i for i in range(place) if words[i] == words[place]]
            is_read_on = words[place - 1] == words[place] and not is_spoken[place - 1]  # "wolf" behind a read "grey"
            if words[place] is not None and not is_spoken[place] and before and not is_read_on:
                told_again += 1
                heard_alone += bool(is_spoken[before].all())
    return heard_alone / told_again


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("interleaved", 0.15, 0.30), ("training", 0.5, 0.72), ("training whole", 0.9, 1.0), ("whole", 1.0, 1.0)],
)
def test_only_hearing_tells_this_share_of_the_values_that_are_scored(kind: str, low: float, high: float) -> None:
    assert low <= only_heard(kind) <= high
