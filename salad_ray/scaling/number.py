"""Numbers that say how they came about: a formula is written once, as code, and then reckoned, shown and marked by its
weakest source."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

ASSUMPTION, DERIVED = "assumption", "derived"
SUM, PRODUCT, NAME = 1, 2, 3
"""How strongly a formula holds together; one that does so less than what it becomes a part of gets parentheses."""


def weakest(sources: Iterable[str]) -> str:
    """The source of a number that is made of others: an assumption if any is, else what was measured, if any was."""
    found = [source for source in sources if source != DERIVED]
    return ASSUMPTION if ASSUMPTION in found else next(iter(found), DERIVED)


def _operator(sign: str, strength: int, apply: Callable[[float, float], float]) -> tuple[Any, Any]:
    """With a `Number` on its left, and on its right."""

    def reckon(left: float, right: float) -> Number:
        one, other = (each if isinstance(each, Number) else Number(each) for each in (left, right))
        how = f"{one.part(strength)} {sign} {other.part(strength + (sign in '−/'))}"
        return Number(apply(float(one), float(other)), how, weakest((one.source, other.source)), strength)

    return reckon, lambda right, left: reckon(left, right)


class Number(float):
    """A float with its formula and its source: an assumption, where it was measured, or derived from the config."""

    how: str
    source: str
    strength: int

    def __new__(cls, value: float, how: str = "", source: str = DERIVED, strength: int = NAME) -> Number:
        number = super().__new__(cls, value)
        digits = f"{value:,.0f}" if value == round(value) else f"{value:.4g}"
        number.how, number.source, number.strength = how.replace("#", digits) or digits, source, strength
        return number

    def part(self, strength: int) -> str:
        return self.how if self.strength >= strength else f"({self.how})"

    def rounded(self, sign: str, apply: Callable[[float], int]) -> Number:
        return Number(apply(self), f"{sign[0]}{self.how}{sign[1]}", self.source)

    __add__, __radd__ = _operator("+", SUM, operator.add)
    __sub__, __rsub__ = _operator("−", SUM, operator.sub)
    __mul__, __rmul__ = _operator("×", PRODUCT, operator.mul)
    __truediv__, __rtruediv__ = _operator("/", PRODUCT, operator.truediv)


def total(numbers: Iterable[Number]) -> Number:
    """Their sum, which `sum` would begin with a 0."""
    return functools.reduce(operator.add, numbers)
