"""Accuracies, hearing margins, the text-speech gap and other differences on the same items, with 95 % intervals.

An answer is right or wrong; a tie is wrong, and counted. So the difference of two systems on an item is −1, 0 or 1, and
all that resampling n items can change are three counts: drawing items with replacement is one multinomial draw, and
10,000 resamples cost the same whatever the number of items. Nothing is approximated by that.

Intervals of differences are percentiles of such a paired bootstrap over items, within each benchmark, after half an
item was added to each side of the disagreements and one to the agreements (as Agresti and Min did, 2005). Without these
two items a bootstrap that saw no disagreement would claim to be certain: simulated with 30 items and two systems that
are right on nearly all of them, the plain percentile interval held the truth in 63 to 91 % of tables, this one in 96 %
and more; from 100 items on they hardly differ. BCa would not help, it has no more to resample. Intervals of accuracies
are Wilson's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any

import numpy as np
from scipy.stats import binomtest

from salad_ray.config import FLOORS, ConfigError
from salad_ray.flow import TRAINED
from salad_ray.names import BASE, CASCADE
from salad_ray.tables import Score, stable_hash

METRICS = ("acc", "acc_norm")
AVERAGE = "average"
"""Stands where a benchmark's name would: the mean over benchmarks, each counting the same."""
_ORDER = {
    name: place
    for names in ((BASE, *TRAINED, CASCADE), ("text", "speech"), ("clean", *FLOORS), METRICS)
    for place, name in enumerate(names)
}
_PRIOR = np.array([0.5, 1.0, 0.5])
"""Items added to those where the first system loses, neither does, and it wins."""

Answers = dict[str, tuple[int, int | None]]
"""Of one system and benchmark: the right answer and the prediction, by item."""


@dataclass(frozen=True)
class Paired:
    """Two systems on the items of one benchmark that both answered; `num_unpaired` items have only one of them."""

    num_items: int
    num_right: tuple[int, int]
    wins: int
    losses: int
    num_unpaired: int

    @property
    def difference(self) -> float:
        return (self.wins - self.losses) / self.num_items


def accuracy_table(scores: Sequence[Score], heard: set[str] | None = None) -> list[dict[str, Any]]:
    """Accuracy of each system, benchmark, modality and condition, with Wilson's 95 % interval.

    Args:
        heard: domains of the natural training speech; given, the world's rows follow once more by heard and unheard.

    Returns:
        Rows of `accuracy` in metrics.json; floors are conditions, of which "choices" is read. `chance` is the mean of
        one by the number of choices; a floor also has its 99 % interval, `ci99_low` and `ci99_high`. `num_short` counts
        the items with fewer exemplars than the most that any item of the benchmark has, whatever the system;
        `word_error_rate` is the mean over the items that have one.

    Raises:
        ValueError: an item that is there twice.
    """
    most_shots: dict[str, int] = defaultdict(int)
    for score in scores:
        most_shots[score.benchmark] = max(most_shots[score.benchmark], score.num_shots)
    rows = []
    for key, group in _groups(scores):
        _require_once(group)
        rows += [
            _accuracy_row(part, metric, side, most_shots[key[1]])
            for side, part in _parts(group, heard)
            for metric in METRICS
        ]
    return rows


def _parts(scores: Sequence[Score], heard: set[str] | None) -> list[tuple[bool | None, list[Score]]]:
    """The scores (None), and those of the world's domains that were heard in training (True) and were not (False)."""
    parts: list[tuple[bool | None, list[Score]]] = [(None, list(scores))]
    if heard is not None:
        world = [score for score in scores if score.benchmark == "world"]
        parts += [(side, [score for score in world if (score.domain in heard) == side]) for side in (True, False)]
    return [(side, part) for side, part in parts if part]


def _groups(scores: Iterable[Score]) -> list[tuple[tuple[str, str, str, str], list[Score]]]:
    """The scores of each system, benchmark, modality and condition."""
    groups: dict[tuple[str, str, str, str], list[Score]] = defaultdict(list)
    for score in scores:
        groups[score.system, score.benchmark, score.modality, score.condition].append(score)
    return sorted(groups.items(), key=lambda pair: [_place(name) for name in pair[0]])


def _place(name: str) -> tuple[int, str]:
    return _ORDER.get(name, len(_ORDER)), name


def _require_once(scores: Sequence[Score]) -> None:
    items = {score.item_id for score in scores}
    if len(items) < len(scores):
        first = scores[0]
        place = f"{first.system}, {first.benchmark}, {first.modality}, {first.condition}"
        raise ValueError(f"{place}: {len(scores) - len(items)} scores of items that have one already")


def _accuracy_row(scores: Sequence[Score], metric: str, heard: bool | None, most_shots: int) -> dict[str, Any]:
    first, predictions = scores[0], [_prediction(score, metric) for score in scores]
    num_right = sum(guess == score.answer for guess, score in zip(predictions, scores, strict=True))
    low, high = wilson(num_right, len(scores))
    floor = dict(zip(("ci99_low", "ci99_high"), wilson(num_right, len(scores), 0.99), strict=True))
    rates = [score.word_error_rate for score in scores if score.word_error_rate is not None]
    return {
        "system": first.system,
        "benchmark": first.benchmark,
        "modality": first.modality,
        "condition": first.condition,
        "metric": metric,
        "accuracy": num_right / len(scores),
        "ci_low": low,
        "ci_high": high,
        "num_items": len(scores),
        "num_ties": sum(guess is None for guess in predictions),
        # Without a prompt there are no exemplars to lose.
        "num_short": sum(score.num_shots < most_shots for score in scores if score.condition != "choices"),
        "heard": heard,
        "chance": _mean([1 / len(score.log_likelihoods) for score in scores]),
        "word_error_rate": math.fsum(rates) / len(rates) if rates else None,
    } | (floor if first.condition in FLOORS else {})


def _prediction(score: Score, metric: str) -> int | None:
    return score.prediction if metric == "acc" else score.prediction_norm


def wilson(num_right: int, num_items: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share."""
    low, high = binomtest(num_right, num_items).proportion_ci(level, method="wilson")
    return float(low), float(high)


def hearing_margins(
    scores: Sequence[Score],
    heard: set[str] | None = None,
    metric: str = "acc",
    resamples: int = 10_000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """What hearing is worth: accuracy on clean speech − that with silence of the same length, on the same items.

    A gap to the text LLM cannot tell a system that listens from one that guesses well from the choices, or from the
    exemplars; against silence nothing but the speech differs. But silence may also confuse a system that was trained on
    speech alone, so that any speech is worth something. Hence a second margin, over speech of another item.

    Args:
        heard: as in `accuracy_table`.

    Returns:
        Rows of `hearing_margins` in metrics.json, a row for each system that hears, benchmark and part, and for the
        `AVERAGE` as in `gap_table`. `margin_swapped` with its interval is that over swapped speech, where it was
        asked. `deaf` says that the interval of either reaches down to 0. Beside them: the floors `silence` (with its
        99 % interval), `choices` (a cascade's is the text LLM's) and `swapped`, and `chance`; on the items that both
        have, the accuracy `reading` of the text LLM and the `gap` to it.

    Raises:
        ConfigError: an item whose right answer is not the same on both sides.
    """
    rows = []
    systems = sorted({score.system for score in scores}, key=_place)
    for system, (side, part) in product(systems, _parts(scores, heard)):
        own, base = ([score for score in part if score.system == name] for name in (system, BASE))
        clean, silent, swapped = (_under(own, "speech", condition) for condition in ("clean", "silence", "swapped"))
        if not silent:
            continue
        choices = _under(own, "text", "choices") or _under(base, "text", "choices")
        pairs = {"silence": (clean, silent), "swapped": (clean, swapped), "gap": (_under(base, "text", "clean"), clean)}
        tables = {
            name: _paired_rows(*pair, resamples, seed, f"margin {system} {side}", (metric,))
            for name, pair in pairs.items()
        }
        for row in tables["silence"]:
            over, gap = (_of_same(row, tables[name]) for name in ("swapped", "gap"))
            facts = {"system": system, "heard": side} | _margin_facts(row, over, gap, silent, choices, metric)
            rows.append(facts | _named(row, "accuracy", "silence", "margin"))
    return rows


def _margin_facts(
    row: Mapping[str, Any],
    over: Mapping[str, Any],
    gap: Mapping[str, Any],
    silent: Sequence[Score],
    choices: Sequence[Score],
    metric: str,
) -> dict[str, Any]:
    """What stands beside a margin over silence: the margin over swapped speech, floors, and the gap to the text LLM."""
    answers = [score for score in silent if score.benchmark in row["benchmarks"]]
    floor: tuple[float | None, float | None] = (None, None)
    if len(row["benchmarks"]) == 1:
        floor = wilson(sum(_is_right(score, metric) for score in answers), len(answers), 0.99)
    lowest = [low for low in (row["ci_low"], over["ci_low"]) if low is not None]
    return {
        "margin_swapped": over["difference"],
        "swapped": over["second"],
        "swapped_ci_low": over["ci_low"],
        "swapped_ci_high": over["ci_high"],
        "deaf": None if row["ci_low"] is None else min(lowest) <= 0,
        "silence_ci99_low": floor[0],
        "silence_ci99_high": floor[1],
        "choices": _by_benchmark(choices, row["benchmarks"], lambda score: _is_right(score, metric)),
        "chance": _by_benchmark(answers, row["benchmarks"], lambda score: 1 / len(score.log_likelihoods)),
        "reading": gap["first"],
        "gap": gap["difference"],
    }


def _of_same(row: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row of another comparison that is over the same benchmarks, else one that says nothing."""
    name, names = row["benchmark"], row["benchmarks"]
    same = (each for each in others if each["benchmark"] == name and each["benchmarks"] == names)
    return next(same, dict.fromkeys(("first", "second", "difference", "ci_low", "ci_high")))


def _under(scores: Iterable[Score], modality: str, condition: str) -> list[Score]:
    return [score for score in scores if (score.modality, score.condition) == (modality, condition)]


def _is_right(score: Score, metric: str) -> bool:
    return _prediction(score, metric) == score.answer


def _by_benchmark(scores: Sequence[Score], names: Sequence[str], value: Callable[[Score], float]) -> float | None:
    """The mean over benchmarks of the mean over their items; None where one of them has no items."""
    groups = [[value(score) for score in scores if score.benchmark == name] for name in names]
    return _mean([_mean(group) for group in groups]) if groups and all(groups) else None


def gap_table(
    scores: Sequence[Score],
    topline: tuple[str, str] = (BASE, "text"),
    resamples: int = 10_000,
    seed: int = 0,
    modalities: Sequence[str] = ("speech", "text"),
) -> list[dict[str, Any]]:
    """How far each system lies behind the topline on the same clean items: accuracy of the topline − its own.

    From speech that is the text-speech gap; from text, of the adapted systems, what forgetting costs.

    Args:
        topline: system and modality that the others are held against.
        modalities: of the systems; rows of the first come first.

    Returns:
        A row for each system, modality, metric and benchmark, then one for the `AVERAGE` where there are two
        benchmarks or more: the mean over those named in its `benchmarks`, whose items are never pooled. `topline` and
        `accuracy` are over the `num_items` items that both have; `num_unpaired` others have only one. Without common
        items, so also without a topline, the numbers are None. `p_value`: exact McNemar for a benchmark, random sign
        flips of the paired differences for the average.

    Raises:
        ConfigError: an item whose right answer is not the same on both sides.
    """
    clean = [score for score in scores if score.condition == "clean"]
    top = [score for score in clean if (score.system, score.modality) == topline]
    rows = []
    systems = sorted({score.system for score in clean}, key=_place)
    for modality in modalities:
        for system in systems:
            own = [score for score in clean if (score.system, score.modality) == (system, modality)]
            if not own or (system, modality) == topline:
                continue
            facts = {"system": system, "modality": modality}
            found = _paired_rows(top, own, resamples, seed, f"gap {system} {modality}")
            rows += [facts | _named(row, "topline", "accuracy", "gap") for row in found]
    return rows


def compare(
    scores_a: Sequence[Score], scores_b: Sequence[Score], resamples: int = 10_000, seed: int = 0
) -> list[dict[str, Any]]:
    """Whether two systems differ on the same items: accuracy of the first − that of the second.

    Args:
        scores_a, scores_b: of one system, modality and condition each, perhaps of different runs.

    Returns:
        Rows as those of `gap_table`, with `accuracy_a`, `accuracy_b` and `difference`.

    Raises:
        ConfigError: an item whose right answer is not the same on both sides.
        ValueError: several systems, modalities or conditions on one side.
    """
    for side in (scores_a, scores_b):
        found = {(score.system, score.modality, score.condition) for score in side}
        if len(found) > 1:
            raise ValueError(f"each side must be one system, modality and condition, not {sorted(found)}")
    rows = _paired_rows(scores_a, scores_b, resamples, seed, "compare")
    return [_named(row, "accuracy_a", "accuracy_b", "difference") for row in rows]


def robustness_table(scores: Sequence[Score], resamples: int = 10_000, seed: int = 0) -> list[dict[str, Any]]:
    """What each condition costs a system that listens: accuracy on clean speech − accuracy under it, on the same items.

    Returns:
        Rows as those of `gap_table`, with `condition`, `clean`, `accuracy` and `loss`.
    """
    rows = []
    speech = [score for score in scores if score.modality == "speech"]
    for system in sorted({score.system for score in speech}, key=_place):
        own = [score for score in speech if score.system == system]
        clean = [score for score in own if score.condition == "clean"]
        for condition in sorted({score.condition for score in own} - {"clean", *FLOORS}):
            other = [score for score in own if score.condition == condition]
            found = _paired_rows(clean, other, resamples, seed, f"robustness {system} {condition}")
            rows += [
                {"system": system, "condition": condition} | _named(row, "clean", "accuracy", "loss") for row in found
            ]
    return rows


def _named(row: Mapping[str, Any], *numbers: str) -> dict[str, Any]:
    """A row of a comparison, with other names of what was compared and of the difference."""
    names = dict(zip(("first", "second", "difference"), numbers, strict=True))
    return {names.get(name, name): value for name, value in row.items()}


def _paired_rows(
    first: Sequence[Score],
    second: Sequence[Score],
    resamples: int,
    seed: int,
    purpose: str,
    metrics: Sequence[str] = METRICS,
) -> list[dict[str, Any]]:
    rows = []
    for metric in metrics:
        answers = _answers(first, metric), _answers(second, metric)
        pairs = {
            name: _pair(name, answers[0].get(name, {}), answers[1].get(name, {}))
            for name in sorted({*answers[0], *answers[1]}, key=_place)
        }
        # Seeded by what is compared, so that a row is the same whatever else the table holds.
        rows += [
            _paired_row(name, metric, {name: pair}, resamples, stable_hash(seed, purpose, metric, name))
            for name, pair in pairs.items()
        ]
        if len(pairs) > 1:
            rows.append(_paired_row(AVERAGE, metric, pairs, resamples, stable_hash(seed, purpose, metric, AVERAGE)))
    return rows


def _answers(scores: Sequence[Score], metric: str) -> dict[str, Answers]:
    """The answers of one system, by benchmark."""
    result: dict[str, Answers] = {}
    ordered = sorted(scores, key=lambda score: score.benchmark)
    for name, group in groupby(ordered, key=lambda score: score.benchmark):
        rows = list(group)
        _require_once(rows)
        result[name] = {score.item_id: (score.answer, _prediction(score, metric)) for score in rows}
    return result


def _pair(benchmark: str, first: Answers, second: Answers) -> Paired:
    both = sorted(first.keys() & second.keys())
    for item in both:
        if first[item][0] != second[item][0]:
            raise ConfigError(
                f"{benchmark}: the right answer of {item} is {first[item][0]} on one side and {second[item][0]} on the "
                "other; evaluate both on the same file"
            )
    right = [(first[item][1] == first[item][0], second[item][1] == second[item][0]) for item in both]
    return Paired(
        num_items=len(both),
        num_right=(sum(a for a, _ in right), sum(b for _, b in right)),
        wins=sum(a and not b for a, b in right),
        losses=sum(b and not a for a, b in right),
        num_unpaired=len(first.keys() ^ second.keys()),
    )


def _paired_row(name: str, metric: str, pairs: Mapping[str, Paired], resamples: int, seed: int) -> dict[str, Any]:
    """The mean difference over benchmarks, of which there may be one; those without common items do not count."""
    usable = {key: pair for key, pair in pairs.items() if pair.num_items}
    row: dict[str, Any] = {"benchmark": name, "metric": metric, "benchmarks": list(usable)}
    row |= {"num_items": sum(pair.num_items for pair in usable.values())}
    row |= {"num_unpaired": sum(pair.num_unpaired for pair in pairs.values())}
    if not usable:
        return row | dict.fromkeys(("first", "second", "difference", "ci_low", "ci_high", "p_value"))
    rng = np.random.default_rng(seed)
    group = list(usable.values())
    low, high = paired_interval(group, resamples, rng)
    return row | {
        "first": _mean([pair.num_right[0] / pair.num_items for pair in group]),
        "second": _mean([pair.num_right[1] / pair.num_items for pair in group]),
        "difference": _mean([pair.difference for pair in group]),
        "ci_low": low,
        "ci_high": high,
        "p_value": mcnemar(group[0]) if len(group) == 1 else sign_flip(group, resamples, rng),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def paired_interval(pairs: Sequence[Paired], resamples: int, rng: np.random.Generator) -> tuple[float, float]:
    """95 % percentile interval of the mean difference over benchmarks (see the head of this file)."""
    total = np.zeros(resamples)
    for pair in pairs:
        counts = np.array([pair.losses, pair.num_items - pair.losses - pair.wins, pair.wins]) + _PRIOR
        drawn = rng.multinomial(pair.num_items, counts / counts.sum(), size=resamples)
        total += (drawn[:, 2] - drawn[:, 0]) / pair.num_items
    low, high = np.quantile(total / len(pairs), (0.025, 0.975))
    return float(low), float(high)


def mcnemar(pair: Paired) -> float:
    """Exact, two-sided: of the items on which only one system is right, each should be so half the time."""
    discordant = pair.wins + pair.losses
    return float(binomtest(pair.wins, discordant, 0.5).pvalue) if discordant else 1.0


def sign_flip(pairs: Sequence[Paired], resamples: int, rng: np.random.Generator) -> float:
    """Two-sided permutation test of the mean difference over benchmarks: the systems swap names on random items.

    Only disagreements can flip, and the sum of m random signs is 2 · Binomial(m, ½) − m.
    """
    total = np.zeros(resamples)
    for pair in pairs:
        discordant = pair.wins + pair.losses
        total += (2 * rng.binomial(discordant, 0.5, size=resamples) - discordant) / pair.num_items
    observed = abs(sum(pair.difference for pair in pairs))
    as_large = int((np.abs(total) >= observed - 1e-9).sum())
    return (as_large + 1) / (resamples + 1)
