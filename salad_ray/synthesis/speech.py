"""Synthetic speech: what every synthesizer returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from salad_ray.tables import Word


@dataclass(frozen=True, slots=True, eq=False)
class Speech:
    """A spoken text: mono float32 `audio` (num_samples,) in [−1, 1], and the time of every written word.

    `[w.text for w in words] == text.split()`; times are in seconds, non-decreasing and within the audio.
    """

    audio: np.ndarray
    sampling_rate: int
    words: list[Word]

    @property
    def duration_secs(self) -> float:
        return len(self.audio) / self.sampling_rate
