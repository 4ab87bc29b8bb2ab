"""The misalignment law: error and coverage on synthetic data, outliers, and clear answers instead of numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import optimize

from salad_ray.scaling.law import LawError, MisalignmentLaw, fit_misalignment_law

BUDGETS = np.geomspace(1e8, 1e10, 6)
Draw = tuple[float, NDArray[np.float64]]


def draws(number: int, seed: int, outlier: float = 0.0) -> Iterator[Draw]:
    """True E and noisy M at six budgets over two decades: 2 % noise, β ≥ 0.5, B · D_min^−β between 0.3 and 3 E."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        irreducible, exponent = rng.uniform(0.03, 0.3), rng.uniform(0.5, 1.2)
        above = rng.uniform(0.3, 3) * irreducible
        values = irreducible + above * (BUDGETS / BUDGETS[0]) ** -exponent
        values *= 1 + 0.02 * rng.standard_normal(6)
        if outlier:
            values[rng.integers(6)] *= 1 + outlier * rng.choice([-1, 1])
        yield irreducible, values


def least_squares(values: NDArray[np.float64]) -> float:
    """E by `scipy.optimize.curve_fit` with relative sigma, from a sensible start."""
    found, _ = optimize.curve_fit(
        lambda d, e, b, beta: e + b * d**-beta,
        BUDGETS / BUDGETS[0],
        values,
        p0=[0.8 * values.min(), values.max() - values.min(), 0.8],
        sigma=0.02 * values,
        bounds=([0, 0, 0.01], [np.inf, np.inf, 6]),
        max_nfev=20_000,
    )
    return float(found[0])


def fitted(values: NDArray[np.float64]) -> MisalignmentLaw | None:
    try:
        return fit_misalignment_law(BUDGETS, values)
    except LawError:
        return None


@pytest.mark.slow
def test_error_and_coverage_on_two_hundred_draws() -> None:
    errors, covered, theirs = [], [], []
    for irreducible, values in draws(200, seed=1):
        law = fit_misalignment_law(BUDGETS, values)
        low, high = law.ci["irreducible"]
        errors.append(abs(law.irreducible / irreducible - 1))
        covered.append(low <= irreducible <= high)
        theirs.append(abs(least_squares(values) / irreducible - 1))
    assert np.median(errors) <= 0.06
    assert 0.85 <= np.mean(covered) <= 0.95
    assert np.median(errors) <= 1.05 * np.median(theirs)


@pytest.mark.slow
def test_one_outlier_hurts_less_than_in_least_squares() -> None:
    errors = []
    for irreducible, values in draws(60, seed=2, outlier=0.25):
        law = fitted(values)
        ours = 1.0 if law is None else abs(law.irreducible / irreducible - 1)  # a refusal is no answer
        errors.append((ours, abs(least_squares(values) / irreducible - 1)))
    ours, theirs = np.median(errors, axis=0)
    assert ours < 0.8 * theirs


def test_the_outlier_is_named() -> None:
    values = 0.1 + 0.2 * (BUDGETS / BUDGETS[0]) ** -0.8
    values *= 1 + 0.005 * np.array([1, -1, 0.5, -0.5, 1, -1])
    values[2] *= 1.4
    assert fit_misalignment_law(BUDGETS, values).outliers == (2,)


@settings(max_examples=40, deadline=None)
@given(
    irreducible=st.floats(0.02, 0.5),
    share=st.floats(0.3, 3),
    exponent=st.floats(0.3, 2.0),
    unit=st.sampled_from([1.0, 1e3, 1e9]),
)
def test_points_on_a_law_give_it_back(irreducible: float, share: float, exponent: float, unit: float) -> None:
    positions = np.geomspace(1, 100, 6) * unit
    law = fit_misalignment_law(positions, irreducible + share * irreducible * (positions / unit) ** -exponent)
    assert law.irreducible == pytest.approx(irreducible, rel=1e-3)
    assert law.exponent == pytest.approx(exponent, rel=1e-3)
    assert law.scale == pytest.approx(share * irreducible * unit**exponent, rel=1e-2)
    within = law.positions_within(0.05)
    assert law.predict(within) == pytest.approx(1.05 * law.irreducible, rel=1e-6)


@pytest.mark.slow
def test_intervals_hold_what_they_say() -> None:
    law_of = {"irreducible": 0.13, "exponent": 0.7}
    truth = 0.13 + 0.3 * (BUDGETS / BUDGETS[0]) ** -0.7
    far, hits, within_hits = 1e11, [], []
    at_far = 0.13 + 0.3 * (far / BUDGETS[0]) ** -0.7
    true_within = BUDGETS[0] * (0.3 / (0.05 * 0.13)) ** (1 / 0.7)
    rng = np.random.default_rng(3)
    for _ in range(60):
        law = fit_misalignment_law(BUDGETS, truth * (1 + 0.02 * rng.standard_normal(6)))
        for name, value in law_of.items():
            low, high = law.ci[name]
            hits.append(low <= value <= high)
        low, high = law.predict_interval(far)
        hits.append(low <= at_far <= high)
        assert low <= law.predict(far) <= high
        low, high = law.positions_within_interval(0.05)
        within_hits.append(low <= true_within <= high)
    assert 0.82 <= np.mean(hits) <= 0.96
    assert 0.82 <= np.mean(within_hits) <= 0.98


def test_a_power_law_without_rest_has_no_irreducible_misalignment() -> None:
    rng = np.random.default_rng(0)
    values = 0.5 * (BUDGETS / BUDGETS[0]) ** -0.5 * (1 + 0.01 * rng.standard_normal(6))
    law = fit_misalignment_law(BUDGETS, values)
    assert law.ci["irreducible"][0] < 0.002
    there = fit_misalignment_law(BUDGETS, values + 0.2)
    assert there.irreducible_p_value < 0.01


@pytest.mark.parametrize("noise", [0.002, 0.02])
@pytest.mark.slow
def test_the_test_of_zero_is_right_five_times_in_a_hundred(noise: float) -> None:
    rng = np.random.default_rng(1)
    truth = 0.5 * (BUDGETS / BUDGETS[0]) ** -0.5
    laws = [fitted(truth * (1 + noise * rng.standard_normal(6))) for _ in range(50)]
    p_values = [law.irreducible_p_value for law in laws if law is not None]
    assert len(p_values) > 35
    assert np.mean(np.array(p_values) < 0.05) < 0.13


def test_flat_misalignment_is_refused() -> None:
    rng = np.random.default_rng(2)
    refused = [fitted(0.2 * (1 + 0.02 * rng.standard_normal(6))) is None for _ in range(25)]
    assert np.mean(refused) > 0.7


def test_several_seeds_at_a_budget_narrow_the_interval() -> None:
    rng = np.random.default_rng(4)
    positions = np.repeat(BUDGETS, 4)
    values = (0.1 + 0.2 * (positions / BUDGETS[0]) ** -0.8) * (1 + 0.03 * rng.standard_normal(24))
    one, four = fit_misalignment_law(BUDGETS, values[::4]), fit_misalignment_law(positions, values)
    width = [law.ci["irreducible"][1] - law.ci["irreducible"][0] for law in (one, four)]
    assert width[1] < width[0]
    assert len(four.residuals) == 24


@pytest.mark.parametrize(
    ("positions", "values", "words"),
    [
        ([1e8], [0.2], "1 training budget "),
        ([1e8] * 6, [0.2] * 6, "1 training budget "),
        ([1e8, 1e9, 1e10], [0.3, 0.2, 0.15], "3 training budgets"),
        ([1e8, 1.01e8, 0.99e8, 1e9, 1.02e9], [0.3, 0.31, 0.29, 0.2, 0.21], "2 training budgets"),
        ([1e8, 1e9, 1e10, 1e11], [0.1, 0.2, 0.3, 0.4], "grows with the budget"),
        ([1e5, 2e5, 5e5, 1e6, 2e6, 5e6], [0.5, 0.3, 0.2, 0.22, 0.25, 0.28], r"grows .* from 5e\+05 to"),
        ([4e4, 8e4, 1.6e5, 3.2e5, 6.4e5, 1e6, 1.3e6], [1, 0.75, 0.64, 0.66, 0.71, 0.75, 0.83], r"from 1.6e\+05 to"),
        ([8e4, 1.6e5, 3.2e5, 6.4e5], [0.75, 0.64, 0.66, 0.71], r"lowest at 1.6e\+05 and \+11% behind that"),
        ([1e8, 1e9, 1e10, 1e11], [0.2, 0.1, np.nan, 0.1], r"misalignment\[2\] is nan"),
        ([1e8, 0, 1e10, 1e11], [0.2, 0.1, 0.1, 0.1], r"num_positions\[1\] is 0"),
        ([1e8, 1e9, 1e10, 1e11], [0.2, 0.1, 0.1], "both must be"),
        ([1e8, 1e9, 1e10, 1e11], [0.201, 0.199, 0.202, 0.2], "does not fall measurably"),
        ([1e8, 3e8, 1e9, 3e9], [0.30, 0.24, 0.21, 0.17], "do not pin E down"),
    ],
)
def test_what_has_no_answer_gets_a_sentence(positions: list[float], values: list[float], words: str) -> None:
    with pytest.raises(LawError, match=words):
        fit_misalignment_law(positions, values)


@pytest.mark.slow
def test_a_law_is_seldom_taken_for_one_that_grows() -> None:
    rng = np.random.default_rng(7)
    laws = [(0.1 + 0.1 * (BUDGETS / BUDGETS[0]) ** -1.2) * (1 + 0.05 * rng.standard_normal(6)) for _ in range(60)]
    assert sum("grows" in refusal(values) for values in laws) <= 3


def refusal(values: NDArray[np.float64]) -> str:
    try:
        fit_misalignment_law(BUDGETS, values)
    except LawError as error:
        return str(error)
    return ""


def test_a_fraction_must_be_above_zero() -> None:
    law = fit_misalignment_law(BUDGETS, 0.1 + 0.2 * (BUDGETS / BUDGETS[0]) ** -0.8)
    with pytest.raises(ValueError, match="above 0"):
        law.positions_within(0)


def test_errors_that_are_the_same_share_of_every_m_change_nothing() -> None:
    for _, values in draws(5, seed=5):
        plain = fit_misalignment_law(BUDGETS, values)
        weighted = fit_misalignment_law(BUDGETS, values, standard_error=0.05 * values)
        assert weighted.irreducible == pytest.approx(plain.irreducible, rel=1e-6)
        assert weighted.ci["irreducible"] == pytest.approx(plain.ci["irreducible"], rel=1e-4)
        unknown = fit_misalignment_law(BUDGETS, values, standard_error=np.full(6, np.nan))
        assert unknown.ci == plain.ci


def test_points_with_smaller_errors_count_more_and_intervals_stay_true() -> None:
    rng = np.random.default_rng(6)
    positions = np.repeat(np.geomspace(1e8, 1e10, 5), 2)
    errors = np.tile([0.004, 0.04], 5)  # each budget is measured twice, on many passages and on few
    truth = 0.1 + 0.2 * (positions / BUDGETS[0]) ** -0.8
    misses, hits = [], []
    for _ in range(60):
        values = truth * (1 + errors * rng.standard_normal(10))
        laws = [fit_misalignment_law(positions, values, standard_error=se) for se in (errors * values, None)]
        misses.append([abs(law.irreducible - 0.1) for law in laws])
        low, high = laws[0].ci["irreducible"]
        hits.append(low <= 0.1 <= high)
    with_errors, without = np.median(misses, axis=0)
    assert with_errors < 0.6 * without
    assert np.mean(hits) >= 0.8  # of 90 % intervals


def test_where_trainings_scatter_more_than_passages_all_points_count_alike() -> None:
    rng = np.random.default_rng(7)
    positions = np.repeat(np.geomspace(1e8, 1e10, 5), 4)
    values = (0.1 + 0.2 * (positions / BUDGETS[0]) ** -0.8) * (1 + 0.05 * rng.standard_normal(20))
    plain = fit_misalignment_law(positions, values)
    weighted = fit_misalignment_law(positions, values, standard_error=np.tile([0.001, 0.01], 10) * values)
    assert weighted.irreducible == pytest.approx(plain.irreducible, rel=0.02)


@pytest.mark.parametrize("errors", [[0.1, 0.1], [0.1] * 5 + [-0.1], [0.1] * 5 + [np.inf]])
def test_errors_that_are_none_are_refused(errors: list[float]) -> None:
    with pytest.raises(LawError, match="standard_error must be"):
        fit_misalignment_law(BUDGETS, 0.1 + 0.2 * (BUDGETS / BUDGETS[0]) ** -0.8, standard_error=errors)


def test_the_interval_over_passages_is_that_of_other_passages() -> None:
    """Documents are harder or easier in all trainings alike: E of other documents moves with them, the scatter does not
    tell."""
    rng = np.random.default_rng(8)
    truth = 0.1 + 0.2 * (BUDGETS / BUDGETS[0]) ** -0.8
    strata = ["law"] * 20 + ["music"] * 20

    def measured() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        counts = np.broadcast_to(rng.integers(20, 60, 40).astype(float), (6, 40))
        hardness = rng.gamma(4, 0.25, 40) * np.repeat([0.5, 1.5], 20)
        noise = 1 + 0.002 * rng.standard_normal((6, 1))
        return truth[:, None] * noise * hardness * counts, counts

    found, widths, own = [], [], []
    for repeat in range(12):
        sums, counts = measured()
        law = fit_misalignment_law(BUDGETS, sums.sum(1) / counts.sum(1))
        found.append(law.irreducible)
        if repeat < 4:
            low, high = law.interval_over_passages(sums, counts, strata, resamples=40)
            assert low < law.irreducible < high
            widths.append(high - low)
            own.append(law.ci["irreducible"][1] - law.ci["irreducible"][0])
    assert np.mean(widths) == pytest.approx(2 * 1.645 * np.std(found, ddof=1), rel=0.5)
    assert np.mean(own) < 0.5 * np.mean(widths)
