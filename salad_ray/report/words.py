"""How the report writes numbers and names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from salad_ray.console import clock
from salad_ray.names import BASE, CASCADE, CONTROL, STAGE1, STAGE2, UNTRAINED

SYSTEM_NAMES = {
    **{UNTRAINED: "untrained", STAGE1: "Stage I", STAGE2: "Stage II"},
    **{CONTROL: "control", BASE: "text LLM", CASCADE: "cascade"},
}
"""The control is Stage I continued on natural speech for as many steps as Stage II has."""


def finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: Any, digits: int = 3) -> str:
    """A number with a true minus sign; an en dash for what was not measured."""
    if not finite(value):
        return "–"
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"
    return text.replace("-", "−")


def percent(value: Any, digits: int = 1) -> str:
    return f"{number(100.0 * value, digits)} %" if finite(value) else "–"


def points(value: Any, digits: int = 1) -> str:
    return number(100.0 * value, digits) if finite(value) else "–"


def secs(value: Any) -> str:
    return clock(value) if finite(value) else "–"


def hours(value: Any) -> str:
    if not finite(value):
        return "–"
    return f"{value:,.0f} h" if value >= 100 else f"{value:.3g} h"


def general(value: Any) -> str:
    """A setting as it was written, or a word."""
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def short(value: float | None, units: Sequence[str] = ("", "k", "M", "B", "T")) -> str:
    """A number in three digits; ∞ for None."""
    if value is None:
        return "∞"
    power = max((power for power in range(len(units)) if abs(value) >= 1000**power), default=0)
    return f"{value / 1000**power:.3g} {units[power]}".rstrip().replace("-", "−")


def size(num_bytes: Any) -> str:
    return short(num_bytes, ("B", "kB", "MB", "GB", "TB")) if finite(num_bytes) else "–"


def p_value(value: Any) -> str:
    if not finite(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def ranged(
    row: Mapping[str, Any],
    key: str,
    show: Callable[[Any], str] = points,
    ends: tuple[str, str] = ("ci_low", "ci_high"),
) -> str:
    """A value with its interval where it has one: 15.0 % (10.0 to 20.0)."""
    low, high = (show(row.get(end)).removesuffix(" %") for end in ends)
    return show(row.get(key)) + ("" if "–" in (low, high) else f" ({low} to {high})")


def with_error(row: Mapping[str, Any], quantity: str, error_key: str = "") -> str:
    error = number(row.get(error_key or f"{quantity}_standard_error"))
    return number(row.get(quantity)) + ("" if error == "–" else f" ± {error}")


def system(name: str) -> str:
    return SYSTEM_NAMES.get(name, name)


def who(system: str) -> str:
    """A system in a sentence."""
    return f"the {SYSTEM_NAMES[system]}" if system in (CONTROL, CASCADE) else SYSTEM_NAMES[system]


def listing(parts: Sequence[str]) -> str:
    """Parts of a sentence: one, two and three."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))
