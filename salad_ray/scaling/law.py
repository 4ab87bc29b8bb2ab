"""The misalignment law `M(D) = E + B · D^−β` (E, B ≥ 0): how low misalignment can go, and how much data that takes.

For a given exponent the law is linear in E and B, so the fit is a search over one number, without a start value that
could be wrong. Residuals are relative to the law's own value. Where the standard error of each M is known, a point's
weight is 1 / (τ² + its relative error²): τ² is what trainings differ by beyond those errors, and where they differ by
much all points count alike. A point that the others speak against is found by leaving each out in turn (externally
studentised residuals), and Huber's weights keep what is left of it from deciding; that takes six points, of fewer none
can be told from the rest.

Intervals are profile likelihoods with the F threshold of the few degrees of freedom there are: all values for which the
rest of the law still fits the points about as well. They are not symmetric, and hold for six points too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

Array = NDArray[np.float64]

EXPONENTS = np.geomspace(0.02, 6.0, 241)
"""β that are tried."""
MIN_BUDGETS = 4
"""Three numbers are fitted."""
SAME_BUDGET = 1.05
"""D that lie nearer to each other than this ratio are one budget, which seeds come to with rows of other fill."""
HUBER = 1.345
"""Residuals beyond so many standard deviations lose weight (Huber 1981: 95 % as efficient where there are none)."""
OUTLIER_P_VALUE = 0.05
"""Of the most conspicuous point, over all points."""
GROWTH, MAX_P_OF_GROWTH = 0.08, 0.05
"""M that grows by more than this share has no law: over all budgets, or behind its smallest value with this p-value."""
NO_REST = 1e-6
"""E below this share of the smallest M is 0."""
TINY = 1e-18
"""Sums of squared relative residuals below this are rounding."""
MAX_IRREDUCIBLE_SHARE, MAX_P_VALUE = 0.9, 0.2
"""Where both E = 0 (with this p-value or more) and E beyond that share of the smallest M fit, nothing is known of E."""


class LawError(ValueError):
    """Points from which no law can be told; the message says why, and what would help."""


@dataclass(frozen=True)
class MisalignmentLaw:
    """`M(D) = irreducible + scale · D^−exponent`, in nats per position; D in training positions."""

    irreducible: float
    """E, what more of the same data never closes."""
    scale: float
    """B."""
    exponent: float
    """β."""
    ci: dict[str, tuple[float, float]]
    """Profile intervals of `irreducible`, `scale` and `exponent`; an end that the points leave open is 0 or inf."""
    confidence: float
    irreducible_p_value: float
    """Of E = 0, a pure power law, against E > 0 (F test)."""
    residuals: tuple[float, ...]
    """(N,) relative to the law, in the order of the points."""
    noise: float
    """Standard deviation of the relative residuals of the points that were kept, those of a point with a larger
    standard error than the others being scaled down."""
    outliers: tuple[int, ...]
    """Points that the others speak against; they have little weight."""
    _fit: _Fit = field(repr=False)

    def predict(self, num_positions: ArrayLike) -> Array:
        """M at these D, inside the data or beyond; same shape."""
        return self.irreducible + self.scale * np.asarray(num_positions, float) ** -self.exponent

    def predict_interval(self, num_positions: float) -> tuple[float, float]:
        """Profile interval of the law's value at D (of the mean, without the noise of a single training)."""
        x = self._fit.unit(num_positions)

        def held(value: float, exponents: Array) -> Array:  # E = value − B · x^−β, and E ≥ 0
            at = x**-exponents
            basis = self._fit.powers(exponents) - at[:, None]
            return self._fit.losses(value, basis, value / at)

        return self._fit.interval(held, float(self.predict(num_positions)), self.confidence)

    def interval_over_passages(
        self, sums: Array, counts: Array, strata: Sequence[str], resamples: int = 200, seed: int = 0
    ) -> tuple[float, float]:
        """Interval of E over the passages that M was measured on: a bootstrap of units within strata.

        All trainings are measured on the same passages, so their errors are shared: a draw takes the same units in all
        of them. `ci` is of how trainings scatter around the law, this one of what other passages would have given.

        Args:
            sums, counts: (N, U) M summed over the scored positions of each unit (book, video or document), and their
                number, for the trainings in the order of the fit; 0 where a training was not measured on a unit.
            strata: (U,) the domain of each unit.
        """
        rng = np.random.default_rng(seed)
        labels = np.unique(np.asarray(strata), return_inverse=True)[1]
        members = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
        found = []
        for _ in range(resamples):
            drawn = np.concatenate([rng.choice(units, len(units)) for units in members])
            values = sums[:, drawn].sum(axis=1) / counts[:, drawn].sum(axis=1)
            found.append(self._fit.anew(self._fit.huber, values).parameters[0])
        low, high = np.quantile(found, [(1 - self.confidence) / 2, (1 + self.confidence) / 2])
        return float(low), float(high)

    def positions_within(self, fraction: float) -> float:
        """D from which M is at most (1 + fraction) · E; inf where E is 0.

        Raises:
            ValueError: the fraction is not above 0.
        """
        if not fraction > 0:
            raise ValueError(f"fraction={fraction}: M only ever comes near E; ask for a fraction above 0, such as 0.05")
        if self.irreducible == 0:
            return float("inf")
        return float((self.scale / (fraction * self.irreducible)) ** (1 / self.exponent))

    def positions_within_interval(self, fraction: float) -> tuple[float, float]:
        """Profile interval of `positions_within`; (0, inf) where the points leave it open."""
        best = self.positions_within(fraction)
        if not np.isfinite(best):
            return 0.0, float("inf")

        def held(value: float, exponents: Array) -> Array:  # B = fraction · E · D^β
            basis = 1 + fraction * self._fit.powers(exponents) * self._fit.unit(value) ** exponents[:, None]
            return self._fit.losses(0.0, basis)

        return self._fit.interval(held, best, self.confidence)


def fit_misalignment_law(
    num_positions: ArrayLike,
    misalignment: ArrayLike,
    confidence: float = 0.9,
    standard_error: ArrayLike | None = None,
) -> MisalignmentLaw:
    """Fit `M(D) = E + B · D^−β` to measured points (PAPER: the scaling law of misalignment).

    Args:
        num_positions: (N,) D, training positions; budgets may occur more than once (seeds).
        misalignment: (N,) M, nats per position.
        confidence: of the intervals.
        standard_error: (N,) of M, in nats; where NaN, as large as the largest. None weights all points alike, and so
            do errors that are the same share of each M.

    Raises:
        LawError: too few budgets, values that are no numbers or not above 0, M that grows with D or does not fall, or
            points that pin nothing down.
    """
    positions, values = _checked(num_positions, misalignment)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1")
    _require_fall(positions, values)
    fit = _robust(_Fit(positions, values, np.ones(len(values)), _relative_variance(values, standard_error)))
    _require_dependence(fit)
    irreducible, scale, exponent = fit.parameters
    law = MisalignmentLaw(
        irreducible if irreducible > NO_REST * values.min() else 0.0,
        scale * fit.middle**exponent,
        exponent,
        _intervals(fit, confidence),
        confidence,
        _p_value_of_zero(fit),
        tuple(fit.residuals.tolist()),
        fit.noise,
        tuple(np.flatnonzero(fit.huber < 0.5).tolist()),
        fit,
    )
    _require_pinned(law)
    return law


def _checked(num_positions: ArrayLike, misalignment: ArrayLike) -> tuple[Array, Array]:
    positions, values = (np.asarray(given, float) for given in (num_positions, misalignment))
    if positions.ndim != 1 or positions.shape != values.shape:
        raise LawError(f"num_positions has shape {positions.shape} and misalignment {values.shape}; both must be (N,)")
    for name, given in (("num_positions", positions), ("misalignment", values)):
        wrong = np.flatnonzero(~(np.isfinite(given) & (given > 0)))
        if len(wrong):
            raise LawError(f"{name}[{wrong[0]}] is {given[wrong[0]]:g}; the law is fitted to numbers above 0")
    budgets = len(np.unique(_budgets(positions)))
    if budgets < MIN_BUDGETS:
        raise LawError(
            f"{budgets} training budget{'s' if budgets != 1 else ''} cannot tell E, B and β apart; measure at "
            f"{MIN_BUDGETS} or more (six over two decades are good)"
        )
    return positions, values


def _relative_variance(values: Array, standard_error: ArrayLike | None) -> Array:
    """(N,) of each point as its standard error has it, 0 where none is known; an error of nothing is a tenth of the
    largest, so that no point decides alone."""
    errors = np.full(len(values), np.nan) if standard_error is None else np.asarray(standard_error, float)
    if errors.shape != values.shape or (errors < 0).any() or np.isinf(errors).any():
        raise LawError(f"standard_error must be {values.shape} finite numbers of at least 0, or NaN where not known")
    relative = errors / values
    if not np.isfinite(relative).any():
        return np.zeros(len(values))
    largest = np.nanmax(relative)
    return np.maximum(np.where(np.isfinite(relative), relative, largest), largest / 10) ** 2


def _require_fall(positions: Array, values: Array) -> None:
    """M that grows has no law of this shape, be it throughout or from its smallest value on."""
    for since, p_value in ((positions.min(), np.inf), (_lowest(positions, values), MAX_P_OF_GROWTH)):
        change, its_p_value = _growth(positions, values, since)
        if change > GROWTH and its_p_value < p_value:
            raise LawError(
                f"M grows with the budget ({change:+.0%} from {since:.3g} to {positions.max():.3g} positions), "
                "so no E + B · D^−β describes it; training on the next-token loss alone (α = 0) does that"
            )


def _budgets(positions: Array) -> Array:
    """(N,) the budget of each point: the smallest D of those that are one."""
    budgets = np.empty_like(positions)
    for index in np.argsort(positions):
        same = budgets[positions < positions[index]]
        near = same[positions[index] <= SAME_BUDGET * same]
        budgets[index] = near[0] if len(near) else positions[index]
    return budgets


def _lowest(positions: Array, values: Array) -> float:
    """The budget with the smallest M, of several seeds on average."""
    budgets = _budgets(positions)
    return float(min(np.unique(budgets), key=lambda budget: values[budgets == budget].mean()))


def _growth(positions: Array, values: Array, first: float) -> tuple[float, float]:
    """By what share M grows from a budget on, and the p-value of that trend (1 where fewer than three points tell)."""
    chosen = positions >= first
    if len(np.unique(_budgets(positions[chosen]))) < 3:
        return 0.0, 1.0
    trend = stats.linregress(np.log(positions[chosen]), np.log(values[chosen]), alternative="greater")
    return float(np.expm1(trend.slope * np.log(positions.max() / first))), float(trend.pvalue)


def _require_dependence(fit: _Fit) -> None:
    """Nor is there one for M that does not fall."""
    trend = stats.linregress(np.log(fit.positions), np.log(fit.values), alternative="less")
    constant = float((fit.weights * (fit.values - np.average(fit.values, weights=fit.weights)) ** 2).sum())
    if _p_value(fit, constant, fewer=2) > MAX_P_VALUE and trend.pvalue > 0.05:
        since = _lowest(fit.positions, fit.values)
        change, _ = _growth(fit.positions, fit.values, since)
        why = "it is as low as it gets, or the budgets lie too near to each other: try smaller ones"
        if change > GROWTH:
            why = f"it is lowest at {since:.3g} and {change:+.0%} behind that, if that is no noise: try more budgets"
        raise LawError(
            f"M does not fall measurably between {fit.positions.min():.3g} and {fit.positions.max():.3g} positions: "
            f"{fit.values.mean():.3g} throughout fits as well; {why}"
        )


def _require_pinned(law: MisalignmentLaw) -> None:
    """Nor for points that leave E anywhere."""
    low, high = law.ci["irreducible"]
    smallest = float(law.predict(law._fit.positions.max()))
    if low == 0 and high > MAX_IRREDUCIBLE_SHARE * smallest and law.irreducible_p_value > MAX_P_VALUE:
        raise LawError(
            f"the points do not pin E down: anything from 0 to {high:.3g} fits them ({law.confidence:.0%}), and the "
            f"smallest M is {law._fit.values.min():.3g}; measure at larger budgets, at more of them, or with less noise"
        )


def least(losses: Callable[[Array], Array]) -> tuple[float, float]:
    """The exponent with the least loss, and that loss: the best of a grid, refined between its neighbours."""
    with np.errstate(over="ignore", invalid="ignore"):  # far from the points
        on_grid = np.nan_to_num(losses(EXPONENTS), nan=np.inf)
    best = int(np.argmin(on_grid))
    low, high = EXPONENTS[max(best - 1, 0)], EXPONENTS[min(best + 1, len(EXPONENTS) - 1)]
    found = optimize.minimize_scalar(
        lambda log_exponent: float(losses(np.exp(np.array([log_exponent])))[0]),
        bounds=(np.log(low), np.log(high)),
        method="bounded",
        options={"xatol": 1e-7},
    )
    if found.fun <= on_grid[best]:
        return float(np.exp(found.x)), float(found.fun)
    return float(EXPONENTS[best]), float(on_grid[best])


class _Fit:
    """The best law for weighted points; E, B and the exponent in units where D is 1 in the middle of the points.

    `spread` (N,) is how much more than the others each point is expected to scatter, 1 in the mean square.
    """

    def __init__(self, positions: Array, values: Array, huber: Array, measured: Array) -> None:
        self.positions, self.values, self.huber, self.measured = positions, values, huber, measured
        self.middle = float(np.exp(np.log(positions).mean()))
        self.spread = np.ones(len(values))
        self.weights = huber / values**2
        self.parameters, self.loss = self._best()
        for _ in range(4):  # relative to the law, not to the noisy points
            self.spread = self._spread()
            self.weights = huber / (self.model * self.spread) ** 2
            self.parameters, self.loss = self._best()

    def anew(self, huber: Array, values: Array | None = None) -> _Fit:
        """With other weights, and perhaps other values of the same points."""
        return _Fit(self.positions, self.values if values is None else values, huber, self.measured)

    @property
    def model(self) -> Array:
        irreducible, scale, exponent = self.parameters
        return irreducible + scale * self.unit(self.positions) ** -exponent

    @property
    def residuals(self) -> Array:
        return (self.values - self.model) / self.model

    def _spread(self) -> Array:
        if not self.measured.any():
            return np.ones(len(self.values))
        scatter = float((self.huber * self.residuals**2).sum()) / self.freedom
        variance = max(scatter - float(self.measured.mean()), 0.0) + self.measured
        return np.sqrt(variance / variance.mean())

    @property
    def freedom(self) -> float:
        return max(float(self.huber.sum()) - 3, 1.0)

    @property
    def noise(self) -> float:
        return float(np.sqrt((self.huber * (self.residuals / self.spread) ** 2).sum() / self.freedom))

    def unit(self, num_positions: ArrayLike) -> Array:
        return np.asarray(num_positions, float) / self.middle

    def powers(self, exponents: Array) -> Array:
        """(len(exponents), N) x^−β of every point."""
        return self.unit(self.positions)[None] ** -exponents[:, None]

    def _best(self) -> tuple[tuple[float, float, float], float]:
        exponent, loss = least(lambda exponents: self._linear(exponents)[2])
        irreducible, scale, _ = self._linear(np.array([exponent]))
        return (float(irreducible[0]), float(scale[0]), exponent), loss

    def _linear(self, exponents: Array) -> tuple[Array, Array, Array]:
        """Best E ≥ 0 and B ≥ 0 for each exponent, and the weighted sum of squares: three (len(exponents),)."""
        x, y, w = self.powers(exponents), self.values, self.weights
        sw, sx, sxx = w.sum(), (w * x).sum(-1), (w * x * x).sum(-1)
        sy, sxy = (w * y).sum(), (w * x * y).sum(-1)
        determinant = np.maximum(sw * sxx - sx**2, 1e-12 * sw * sxx)
        inner = (sxx * sy - sx * sxy) / determinant, (sw * sxy - sx * sy) / determinant
        candidates = [
            (np.where(np.minimum(*inner) >= 0, inner[0], np.nan), inner[1]),
            (np.zeros_like(sx), sxy / sxx),
            (np.full_like(sx, sy / sw), np.zeros_like(sx)),
        ]
        losses = np.stack([(w * (y - e[:, None] - b[:, None] * x) ** 2).sum(-1) for e, b in candidates])
        best = np.nanargmin(losses, axis=0)
        each = np.arange(len(exponents))
        irreducible, scale = (np.stack(parts)[best, each] for parts in zip(*candidates, strict=True))
        return irreducible, scale, losses[best, each]

    def losses(self, offset: ArrayLike, basis: Array, most: Array | None = None) -> Array:
        """Sum of squares of `offset + b · basis`, (rows, N) each, with the best b ≥ 0 (and ≤ `most`) of every row."""
        rest = self.values - np.asarray(offset)
        norm = np.maximum((self.weights * basis * basis).sum(-1), 1e-300)
        best = np.clip((self.weights * basis * rest).sum(-1) / norm, 0, most)
        return (self.weights * (rest - best[:, None] * basis) ** 2).sum(-1)

    def interval(
        self, held: Callable[[float, Array], Array], centre: float, confidence: float, factor: float = 1e12
    ) -> tuple[float, float]:
        """The values around `centre` at which the law, with one quantity held, still fits within the F threshold.

        Args:
            held: value, exponents → sums of squares with the quantity held at the value.
            factor: how far from `centre` to look; beyond, an end is open, 0 or inf.
        """
        reach = stats.f.ppf(confidence, 1, self.freedom) / self.freedom
        threshold = max(self.loss, least(lambda exponents: held(centre, exponents))[1], TINY) * (1 + reach)

        def excess(log_value: float) -> float:
            value = float(np.exp(log_value))
            return least(lambda exponents: held(value, exponents))[1] - threshold

        def end(direction: int, open_end: float) -> float:
            inside, step = np.log(max(centre, 1e-300)), 0.01
            while step < np.log(factor):
                outside = np.log(max(centre, 1e-300)) + direction * step
                if excess(outside) > 0:
                    return float(np.exp(optimize.brentq(excess, *sorted((inside, outside)), xtol=1e-6)))
                inside, step = outside, step * 1.5
            return open_end

        return end(-1, 0.0), end(1, float("inf"))


def _robust(fit: _Fit) -> _Fit:
    """Least squares; where the others speak against a point, the fit without it, then with Huber's weights for all."""
    kept = np.ones(len(fit.values))
    clean = fit
    while kept.sum() - 4 >= 2:  # one fewer must leave two degrees of freedom
        without = {
            index: fit.anew(np.where(np.arange(len(kept)) == index, 0.0, kept)) for index in np.flatnonzero(kept)
        }
        index = min(without, key=lambda each: without[each].loss)
        freedom = kept.sum() - 4
        ratio = (clean.loss - without[index].loss) / max(without[index].loss / freedom, 1e-30)
        if 2 * stats.t.sf(np.sqrt(max(ratio, 0.0)), freedom) * kept.sum() > OUTLIER_P_VALUE:
            break
        kept, clean = without[index].huber, without[index]
    if kept.all():  # least squares, whose intervals are exact
        return fit
    noise = max(clean.noise, 1e-12)
    for _ in range(20):
        huber = np.minimum(1.0, HUBER * noise / np.maximum(np.abs(clean.residuals / clean.spread), 1e-300))
        if np.allclose(huber, clean.huber, atol=1e-6):
            break
        clean = fit.anew(huber)
    return clean


def _intervals(fit: _Fit, confidence: float) -> dict[str, tuple[float, float]]:
    irreducible, scale, exponent = fit.parameters

    def held_irreducible(value: float, exponents: Array) -> Array:
        return fit.losses(value, fit.powers(exponents))

    def held_scale(value: float, exponents: Array) -> Array:  # B in the units of D
        basis = np.ones((len(exponents), len(fit.values)))
        return fit.losses(value * fit.middle ** -exponents[:, None] * fit.powers(exponents), basis)

    def held_exponent(value: float, _: Array) -> Array:
        return fit._linear(np.array([value]))[2]

    smallest = 1e-6 * float(fit.values.min())
    return {
        "irreducible": fit.interval(held_irreducible, max(irreducible, smallest), confidence),
        "scale": fit.interval(held_scale, scale * fit.middle**exponent, confidence, factor=1e60),
        "exponent": fit.interval(held_exponent, exponent, confidence, factor=20),
    }


def _p_value_of_zero(fit: _Fit) -> float:
    """F test of E = 0 within the law; half of it, since E cannot be below 0."""
    without = least(lambda exponents: fit.losses(0.0, fit.powers(exponents)))[1]
    return _p_value(fit, without, 1) / 2


def _p_value(fit: _Fit, loss: float, fewer: int) -> float:
    """F test of a law with some numbers fewer, which has this loss."""
    ratio = max(loss - fit.loss, 0.0) / fewer / (max(fit.loss, TINY) / fit.freedom)
    return float(stats.f.sf(ratio, fewer, fit.freedom))
