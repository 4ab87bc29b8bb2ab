"""Accuracies, gaps and comparisons on the same items."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import bootstrap, kstest, norm

from salad_ray.config import ConfigError
from salad_ray.evaluation.statistics import (
    Paired,
    accuracy_table,
    compare,
    gap_table,
    hearing_margins,
    mcnemar,
    paired_interval,
    robustness_table,
    sign_flip,
    wilson,
)
from salad_ray.report.accuracy import deaf_sentences
from salad_ray.tables import Score


def scores(
    system: str,
    modality: str,
    right: Sequence[bool | None],
    benchmark: str = "piqa",
    condition: str = "clean",
    start: int = 0,
    **facts: object,
) -> list[Score]:
    """One score per answer: right, wrong or a tie (None); acc_norm is always wrong."""
    fields: dict = {"domain": "", "num_shots": 5} | facts
    return [
        Score(
            system=system,
            benchmark=benchmark,
            item_id=f"{benchmark}-{place}",
            modality=modality,
            condition=condition,
            log_likelihoods=[-1.0, -2.0],
            answer=place % 2,
            prediction=None if value is None else place % 2 if value else 1 - place % 2,
            prediction_norm=1 - place % 2,
            **fields,
        )
        for place, value in enumerate(right, start)
    ]


def row_of(rows: list[dict], **facts: object) -> dict:
    found = [row for row in rows if facts.items() <= row.items()]
    assert len(found) == 1, f"{len(found)} rows of {facts}"
    return found[0]


def correlated(rng: np.random.Generator, number: int, accuracies: tuple[float, float], shared: float) -> np.ndarray:
    """Right or wrong of two systems (2, N) whose answers hang together, as those to the same items do."""
    common = rng.standard_normal(number)
    own = rng.standard_normal((2, number))
    return np.sqrt(shared) * common + np.sqrt(1 - shared) * own < norm.ppf(accuracies)[:, None]


def test_wilson_is_the_textbooks() -> None:
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert wilson(1, 1) == (pytest.approx(0.2065, abs=1e-4), 1.0)


def test_ties_are_wrong_and_counted() -> None:
    row = row_of(accuracy_table(scores("base", "text", [True, True, None, False])), metric="acc")
    assert (row["accuracy"], row["num_items"], row["num_ties"]) == (0.5, 4, 1)
    assert row_of(accuracy_table(scores("base", "text", [True, None])), metric="acc_norm")["num_ties"] == 0


def test_items_short_of_exemplars_are_counted_over_all_systems() -> None:
    rows = accuracy_table(
        scores("base", "text", [True] * 3)
        + scores("stage1", "speech", [True] * 2, num_shots=4)
        + scores("stage1", "speech", [True], start=2)
        + scores("base", "text", [True], benchmark="world", num_shots=0)
    )
    short = {(row["system"], row["benchmark"]): row["num_short"] for row in rows if row["metric"] == "acc"}
    assert short == {("base", "piqa"): 0, ("stage1", "piqa"): 2, ("base", "world"): 0}


def test_conditions_and_modalities_stay_apart_in_a_fixed_order() -> None:
    table = (
        scores("stage1", "speech", [False], condition="noise")
        + scores("stage1", "speech", [True])
        + scores("stage1", "text", [True])
        + scores("base", "text", [True])
    )
    rows = [row for row in accuracy_table(table) if row["metric"] == "acc"]
    keys = [(row["system"], row["modality"], row["condition"], row["accuracy"]) for row in rows]
    assert keys == [
        ("base", "text", "clean", 1.0),
        ("stage1", "text", "clean", 1.0),
        ("stage1", "speech", "clean", 1.0),
        ("stage1", "speech", "noise", 0.0),
    ]
    assert accuracy_table(table) == accuracy_table(table[::-1])


def test_the_world_is_split_by_what_was_heard() -> None:
    table = scores("stage1", "speech", [True, True, True], "world", domain="food")
    table += scores("stage1", "speech", [False], "world", domain="law", start=3)
    rows = accuracy_table(table, heard={"food"})
    shares = {row["heard"]: (row["accuracy"], row["num_items"]) for row in rows if row["metric"] == "acc"}
    assert shares == {None: (0.75, 4), True: (1.0, 3), False: (0.0, 1)}
    assert {row["heard"] for row in accuracy_table(table)} == {None}
    assert {row["heard"] for row in accuracy_table(table, heard={"food", "law"})} == {None, True}
    elsewhere = scores("stage1", "speech", [True], "piqa", domain="food")
    assert {row["heard"] for row in accuracy_table(elsewhere, heard={"food"})} == {None}


def test_word_error_rates_are_averaged_where_there_are_any() -> None:
    table = scores("cascade", "speech", [True], word_error_rate=0.5)
    table += scores("cascade", "speech", [True], word_error_rate=0.0, start=1) + scores(
        "cascade", "speech", [True], start=2
    )
    assert row_of(accuracy_table(table), metric="acc")["word_error_rate"] == 0.25
    assert row_of(accuracy_table(scores("base", "text", [True])), metric="acc")["word_error_rate"] is None


def paired_table(text: Sequence[bool | None], speech: Sequence[bool | None], benchmark: str = "piqa") -> list[Score]:
    return scores("base", "text", text, benchmark) + scores("stage1", "speech", speech, benchmark)


def test_gap_topline_and_accuracy_are_those_of_the_common_items() -> None:
    table = paired_table([True, True, True, True, False], [True, False, None, True])
    row = row_of(gap_table(table), metric="acc")
    assert (row["topline"], row["accuracy"], row["gap"]) == (1.0, 0.5, 0.5)
    assert (row["num_items"], row["num_unpaired"]) == (4, 1)
    assert row["p_value"] == 0.5  # two disagreements, both one way: 2 · ¼
    assert row["ci_low"] <= 0.5 <= row["ci_high"]


def test_benchmarks_count_the_same_in_the_average() -> None:
    small, large = [True] * 10, [True] * 190
    table = paired_table(small, [False] * 10, "mmlu_spoken") + paired_table(large, large, "voicebench_mmsu")
    rows = [row for row in gap_table(table) if row["metric"] == "acc"]
    assert [row["benchmark"] for row in rows] == ["mmlu_spoken", "voicebench_mmsu", "average"]
    assert rows[-1]["gap"] == 0.5  # pooled over items it would be 0.05
    assert rows[-1]["benchmarks"] == ["mmlu_spoken", "voicebench_mmsu"]
    assert rows[-1]["num_items"] == 200


def test_a_benchmark_without_common_items_has_no_numbers_and_does_not_count() -> None:
    table = paired_table([True, False], [False, False]) + scores("base", "text", [True], "arc_challenge")
    rows = [row for row in gap_table(table) if row["metric"] == "acc"]
    assert row_of(rows, benchmark="arc_challenge")["gap"] is None
    assert row_of(rows, benchmark="arc_challenge")["num_unpaired"] == 1
    average = row_of(rows, benchmark="average")
    assert (average["gap"], average["benchmarks"], average["num_unpaired"]) == (0.5, ["piqa"], 1)


def test_forgetting_is_the_gap_of_text_and_conditions_do_not_mix() -> None:
    table = paired_table([True, True], [False, False])
    table += scores("stage1", "text", [True, False]) + scores("stage1", "speech", [True, True], condition="noise")
    gaps = {row["modality"]: row["gap"] for row in gap_table(table) if row["metric"] == "acc"}
    assert gaps == {"speech": 1.0, "text": 0.5}
    assert {row["modality"] for row in gap_table(table, modalities=["speech"])} == {"speech"}


def test_no_items_no_topline_one_item() -> None:
    assert accuracy_table([]) == gap_table([]) == compare([], []) == robustness_table([]) == []
    assert gap_table(scores("base", "text", [True])) == []
    alone = row_of(gap_table(scores("stage1", "speech", [True])), metric="acc")
    assert (alone["gap"], alone["p_value"], alone["num_items"], alone["num_unpaired"]) == (None, None, 0, 1)
    one = row_of(gap_table(paired_table([True], [False])), metric="acc")
    assert (one["gap"], one["p_value"]) == (1.0, 1.0)
    assert one["ci_low"] <= 0 < one["ci_high"] <= 1  # one item proves nothing


def test_agreement_on_few_items_is_not_certainty() -> None:
    few, many = [row_of(gap_table(paired_table([True] * n, [True] * n)), metric="acc") for n in (10, 1000)]
    assert few["gap"] == many["gap"] == 0
    assert few["ci_low"] < -0.05 < 0.05 < few["ci_high"]
    assert -0.01 < many["ci_low"] <= 0 <= many["ci_high"] < 0.01


def test_the_same_table_gives_the_same_rows_whatever_else_is_in_it() -> None:
    rng = np.random.default_rng(0)
    table = paired_table(*correlated(rng, 50, (0.8, 0.6), 0.5).tolist())
    other = paired_table(*correlated(rng, 50, (0.8, 0.6), 0.5).tolist(), "arc_challenge")
    alone = gap_table(table)
    assert alone == gap_table(table[::-1])
    assert [row for row in gap_table(other + table) if row["benchmark"] == "piqa"] == alone
    assert gap_table(table, resamples=9, seed=1) != gap_table(table, resamples=9)


def test_items_that_are_there_twice_or_with_two_answers_are_refused() -> None:
    table = paired_table([True, True], [True, False])
    with pytest.raises(ValueError, match="stage1, piqa, speech, clean: 2 scores of items"):
        gap_table(table + table[2:])
    with pytest.raises(ValueError, match="base, piqa, text, clean: 1 scores of items"):
        accuracy_table(table + table[:1])
    shifted = scores("base", "text", [True]) + scores("stage1", "speech", [True] * 2)[1:]
    moved = [Score(**{name: getattr(row, name) for name in Score.__slots__} | {"item_id": "piqa-0"}) for row in shifted]
    with pytest.raises(ConfigError, match="piqa: the right answer of piqa-0 is 0 on one side and 1 on the other"):
        gap_table(moved)


def test_the_interval_agrees_with_scipys_paired_bootstrap() -> None:
    right = correlated(np.random.default_rng(3), 500, (0.75, 0.6), 0.5)
    difference = right[0].astype(float) - right[1]
    theirs = bootstrap((difference,), np.mean, n_resamples=9999, method="percentile", rng=0).confidence_interval
    row = row_of(gap_table(paired_table(*right.tolist())), metric="acc")
    assert row["gap"] == pytest.approx(difference.mean())
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((theirs.low, theirs.high), abs=0.004)


@pytest.mark.parametrize(("number", "shared", "accuracies"), [(30, 0.8, (0.97, 0.95)), (200, 0.6, (0.7, 0.6))])
def test_the_interval_covers_the_truth(number: int, shared: float, accuracies: tuple[float, float]) -> None:
    rng = np.random.default_rng(number)
    covered = []
    for _ in range(300):
        pairs = []
        for _ in range(2):  # benchmarks
            first, second = correlated(rng, number, accuracies, shared)
            wins, losses = int((first & ~second).sum()), int((second & ~first).sum())
            pairs.append(Paired(number, (int(first.sum()), int(second.sum())), wins, losses, 0))
        low, high = paired_interval(pairs, 500, rng)
        covered.append(low <= accuracies[0] - accuracies[1] <= high)
    assert 0.90 <= np.mean(covered) <= 0.995


def test_mcnemar_is_the_binomial_of_the_disagreements() -> None:
    assert mcnemar(Paired(100, (50, 50), 5, 5, 0)) == 1.0
    assert mcnemar(Paired(100, (55, 50), 5, 0, 0)) == pytest.approx(2 / 32)
    assert mcnemar(Paired(100, (50, 50), 0, 0, 0)) == 1.0


def test_the_permutation_test_is_mcnemars_where_there_is_one_benchmark() -> None:
    rng = np.random.default_rng(0)
    for wins, losses in ((9, 3), (12, 1), (7, 7), (0, 0)):
        pair = Paired(60, (40, 40), wins, losses, 0)
        assert sign_flip([pair], 40_000, rng) == pytest.approx(mcnemar(pair), abs=0.01)


def test_the_permutation_p_is_uniform_under_the_null() -> None:
    rng = np.random.default_rng(5)
    values = []
    for _ in range(400):
        wins = rng.binomial((60, 90), 0.5)
        pairs = [Paired(n, (0, 0), int(w), m - int(w), 0) for n, m, w in zip((150, 311), (60, 90), wins, strict=True)]
        values.append(sign_flip(pairs, 999, rng))
    assert kstest(values, "uniform").pvalue > 0.01
    assert np.mean(np.array(values) <= 0.05) == pytest.approx(0.05, abs=0.03)


def test_a_clear_difference_is_significant_in_the_average() -> None:
    rng = np.random.default_rng(6)
    table = [
        row
        for name in ("piqa", "hellaswag")
        for row in paired_table(*correlated(rng, 200, (0.9, 0.5), 0.5).tolist(), name)
    ]
    row = row_of(gap_table(table, resamples=2000), metric="acc", benchmark="average")
    assert row["p_value"] == pytest.approx(1 / 2001)
    assert row["ci_low"] > 0.25


def test_two_systems_are_compared_on_their_common_items() -> None:
    first = scores("stage2", "speech", [True] * 8 + [False] * 2)
    second = scores("stage1", "speech", [True] * 2 + [False] * 7)
    row = row_of(compare(first, second), metric="acc")
    assert (row["accuracy_a"], row["accuracy_b"]) == (pytest.approx(8 / 9), pytest.approx(2 / 9))
    assert row["difference"] == pytest.approx(6 / 9)
    assert (row["num_items"], row["num_unpaired"], row["p_value"]) == (9, 1, 2 / 64)
    reverse = row_of(compare(second, first), metric="acc")
    assert reverse["difference"] == -row["difference"]
    assert reverse["p_value"] == row["p_value"]
    with pytest.raises(ValueError, match="each side must be one system"):
        compare(first + second, second)


def test_robustness_is_against_clean_speech_of_the_same_items() -> None:
    table = scores("base", "text", [True] * 4) + scores("stage1", "speech", [True, True, True, False])
    table += scores("stage1", "speech", [False, False, True], condition="noise")
    row = row_of(robustness_table(table), metric="acc")
    assert (row["system"], row["condition"], row["clean"], row["accuracy"]) == ("stage1", "noise", 1.0, 1 / 3)
    assert row["loss"] == pytest.approx(2 / 3)
    assert (row["num_items"], row["num_unpaired"]) == (3, 1)


def heard_and_silent(clean: Sequence[bool], silent: Sequence[bool], **facts: object) -> list[Score]:
    return scores("stage1", "speech", clean, **facts) + scores("stage1", "speech", silent, condition="silence", **facts)  # type: ignore[arg-type]


def test_a_hearing_margin_is_over_silence_on_the_same_items_with_its_floors_beside_it() -> None:
    table = heard_and_silent([True] * 90 + [False] * 10, [True] * 30 + [False] * 69)
    table += scores("stage1", "speech", [True] * 40 + [False] * 60, condition="swapped")
    table += scores("stage1", "text", [True] * 20 + [False] * 80, condition="choices")
    table += scores("base", "text", [True] * 100)
    row = row_of(hearing_margins(table))
    assert (row["system"], row["benchmark"], row["heard"], row["metric"]) == ("stage1", "piqa", None, "acc")
    assert (row["accuracy"], row["silence"]) == (90 / 99, 30 / 99)
    assert row["margin"] == pytest.approx(60 / 99)
    assert (row["num_items"], row["num_unpaired"]) == (99, 1)
    assert 0.4 < row["ci_low"] < row["margin"] < row["ci_high"] < 0.8
    assert row["deaf"] is False
    assert (row["swapped"], row["choices"], row["chance"]) == (0.4, 0.2, 0.5)
    assert (row["silence_ci99_low"], row["silence_ci99_high"]) == wilson(30, 99, 0.99)
    assert (row["reading"], row["gap"]) == (1.0, pytest.approx(0.1))
    assert {part["benchmark"] for part in robustness_table(table)} == set()  # a floor is no disturbance
    told = row_of(accuracy_table(table), condition="silence", metric="acc")
    assert (told["ci99_low"], told["ci99_high"]) == wilson(30, 99, 0.99)
    assert "ci99_low" not in row_of(accuracy_table(table), system="stage1", condition="clean", metric="acc")
    assert row_of(accuracy_table(table), condition="choices", metric="acc")["num_short"] == 0


def test_a_system_that_only_likes_speech_better_than_silence_is_deaf_too() -> None:
    """As the old quickstart's Stage II: 12 points above silence, none above the speech of other questions."""
    clean, silent = [True] * 48 + [False] * 52, [True] * 24 + [False] * 76
    table = heard_and_silent(clean, silent) + scores("stage1", "speech", clean[::-1], condition="swapped")
    row = row_of(hearing_margins(table))
    assert row["ci_low"] > 0 == row["margin_swapped"]
    assert row["swapped_ci_low"] < 0 < row["swapped_ci_high"]
    assert row["deaf"]
    [line] = deaf_sentences([row])
    assert line.startswith(
        "Stage I is deaf on piqa: hearing the question is no better than hearing the speech of another question"
    )
    assert not row_of(hearing_margins(heard_and_silent(clean, silent)))["deaf"]  # where it was not asked


def test_a_systems_margin_is_split_by_heard_domains_and_averaged_over_benchmarks() -> None:
    world = {"benchmark": "world"}
    table = heard_and_silent([True] * 200, [False] * 200, domain="food", **world)
    table += heard_and_silent([False, True] * 100, [True, False] * 100, domain="law", start=200, **world)
    rows = {row["heard"]: row for row in hearing_margins(table, heard={"food"})}
    assert {part: (row["margin"], row["deaf"]) for part, row in rows.items()} == {
        None: (0.5, False),
        True: (1.0, False),
        False: (0.0, True),
    }
    both = table + heard_and_silent([True] * 10, [False] * 10)
    average = row_of(hearing_margins(both), benchmark="average")
    assert (average["margin"], average["silence_ci99_low"]) == (0.75, None)
    assert hearing_margins(scores("base", "text", [True])) == []


def test_chance_is_that_of_the_choices_there_are() -> None:
    two, *_ = scores("stage1", "speech", [True])
    fields = {name: getattr(two, name) for name in Score.__slots__}
    ten = Score(**fields | {"item_id": "piqa-9", "log_likelihoods": [-float(n) for n in range(10)]})
    assert row_of(accuracy_table([two, ten]), metric="acc")["chance"] == pytest.approx((1 / 2 + 1 / 10) / 2)


def test_a_deaf_system_is_called_deaf_and_the_margins_interval_covers_the_truth() -> None:
    """A system that is right on a quarter of the items with and without speech, and one that hears ten points."""
    rng = np.random.default_rng(11)
    deaf, covered = [], []
    for _ in range(200):
        nothing, something = (correlated(rng, 150, pair, 0.5) for pair in ((0.25, 0.25), (0.45, 0.25)))
        deaf.append(row_of(hearing_margins(heard_and_silent(*nothing.tolist()), resamples=300))["deaf"])
        row = row_of(hearing_margins(heard_and_silent(*something.tolist()), resamples=300))
        covered.append(row["ci_low"] <= 0.2 <= row["ci_high"])
    assert np.mean(deaf) > 0.94  # 97.5 % are expected
    assert 0.90 <= np.mean(covered) <= 0.99


def test_ten_thousand_resamples_of_a_large_evaluation_take_seconds() -> None:
    rng = np.random.default_rng(0)
    systems = ["base", "stage1", "stage2", "control", "cascade", "other"]
    right = (rng.random((6, 5000)) < 0.7).tolist()
    table = []
    for system, answers in zip(systems, right, strict=True):
        for place, name in enumerate(("piqa", "hellaswag", "arc_challenge", "openbookqa", "storycloze")):
            part = answers[1000 * place : 1000 * (place + 1)]
            table += scores(system, "text" if system == "base" else "speech", part, name)
    began = time.monotonic()
    assert len(gap_table(table)) == 5 * 6 * 2
    assert time.monotonic() - began < 20
