"""F and M: sums by passage and distance, means and paired differences, with errors over documents by domain."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from salad_ray.evaluation.misalignment import QUANTITIES, difference, estimate, summarise
from salad_ray.report.measured import difference_tables, measured_tables
from salad_ray.report.metrics import system_differences, system_metrics
from salad_ray.tables import Measurement


def measurement(
    passage: str, misalignment: float, num_positions: int, domain: str = "law", **fields: Any
) -> Measurement:
    sums = dict.fromkeys(QUANTITIES, 0.0) | {"misalignment": misalignment}
    place = {"system": "stage1", "passage": passage, "domain": domain, "distance": 0, "num_positions": num_positions}
    return Measurement(**(place | sums | fields))


def test_every_scored_position_is_summed_once() -> None:
    rng = np.random.default_rng(0)
    values = {name: rng.random(50) for name in QUANTITIES}
    values |= {"segment": np.sort(rng.integers(0, 3, 50)), "distance": rng.integers(0, 60, 50)}
    passages = [("a", "one", "law"), ("b", "one", "law"), ("c", "two", "music")]
    rows = summarise("stage1", "whole", values, passages, (1, 2, 4, 8, 16, 32))
    assert sum(row.num_positions for row in rows) == 50
    assert {row.distance for row in rows} <= {0, 1, 2, 4, 8, 16, 32}
    assert {(row.protocol, row.source) for row in rows} == {("whole", "one"), ("whole", "two")}
    for name in QUANTITIES:
        assert sum(getattr(row, name) for row in rows) == pytest.approx(values[name].sum())
    of_b = [row for row in rows if row.passage == "b" and row.distance == 4]
    expected = (values["segment"] == 1) & (values["distance"] >= 4) & (values["distance"] < 8)
    assert sum(row.num_positions for row in of_b) == expected.sum()


def test_a_document_counts_as_one_however_many_rows_and_passages_it_has() -> None:
    whole = [measurement("a", 4.0, 4), measurement("b", 3.0, 1)]
    split = [measurement("a", 1.0, 1), measurement("a", 3.0, 3), measurement("b", 3.0, 1)]
    assert estimate(whole, "misalignment") == estimate(split, "misalignment")
    assert estimate(whole, "misalignment").mean == pytest.approx(7 / 5)
    apart = [measurement(name, value, 2, source=source) for name, value, source in (("a", 1, "x"), ("b", 3, "x"))]
    found = estimate([*apart, measurement("c", 3.0, 1, source="y")], "misalignment")
    assert (found.num_passages, found.num_units) == (3, 2)
    assert found.standard_error == estimate(whole, "misalignment").standard_error


def documents(rng: np.random.Generator, shift: float = 0.0) -> tuple[list[Measurement], list[Measurement]]:
    """Two systems on the same passages: three domains of very different M, in each 12 documents of one to six passages
    that resemble each other; the second system is worse by `shift` and a little of its own."""
    rows: tuple[list[Measurement], list[Measurement]] = ([], [])
    for domain, level in (("law", 0.3), ("music", 1.0), ("stars", 3.0)):
        for document in range(12):
            hardness = rng.normal(level, 0.3 * level)
            for passage in range(rng.integers(1, 7)):
                number = int(rng.integers(5, 30))
                own = hardness + rng.normal(0, 0.1)
                for side, value in zip(rows, (own, own + shift + rng.normal(0, 0.05)), strict=True):
                    name = f"{domain}-{document}"
                    side.append(measurement(f"{name}-{passage}", value * number, number, domain, source=name))
    return rows


def test_the_standard_error_is_that_of_repeated_samples_of_documents() -> None:
    rng = np.random.default_rng(1)
    samples = [documents(rng)[0] for _ in range(250)]
    estimates = [estimate(rows, "misalignment") for rows in samples]
    spread = np.std([found.mean for found in estimates])
    assert np.mean([found.standard_error for found in estimates]) == pytest.approx(spread, rel=0.12)
    loose = [[replace(row, source="") for row in rows] for rows in samples[:50]]  # as if passages were independent
    assert np.mean([estimate(rows, "misalignment").standard_error for rows in loose]) < 0.75 * spread
    mixed = [[replace(row, domain="") for row in rows] for rows in samples[:50]]  # as if domains were drawn
    assert np.mean([estimate(rows, "misalignment").standard_error for rows in mixed]) > 1.5 * spread


def test_the_standard_error_is_that_of_a_bootstrap_of_documents_within_domains() -> None:
    rng = np.random.default_rng(2)
    rows = documents(rng)[0]
    totals: dict[str, dict[str, np.ndarray]] = {}
    for row in rows:
        own = totals.setdefault(row.domain, {}).setdefault(row.source, np.zeros(2))
        own += (row.misalignment, row.num_positions)
    parts = [np.array(list(units.values())) for units in totals.values()]
    drawn = [sum(part[rng.integers(0, len(part), len(part))].sum(0) for part in parts) for _ in range(2000)]
    spread = np.std([total / number for total, number in drawn])
    # A bootstrap divides by n where the estimate divides by n − 1.
    assert estimate(rows, "misalignment").standard_error == pytest.approx(spread * np.sqrt(12 / 11), rel=0.06)


def test_domains_of_one_document_borrow_a_spread_and_one_document_alone_has_none() -> None:
    lone = [measurement("a", 1.0, 1, "law"), measurement("b", 3.0, 1, "music")]
    assert estimate(lone, "misalignment").standard_error == pytest.approx(1.0)
    more = [measurement(name, value, 1, "law") for name, value in (("a", 1.0), ("b", 2.0))]
    with_lone = estimate([*more, measurement("c", 6.0, 1, "music")], "misalignment")
    assert with_lone.standard_error == pytest.approx(np.std([1, 2, 6], ddof=1) / np.sqrt(3))


def test_differences_are_paired_and_their_intervals_hold_the_truth() -> None:
    rng = np.random.default_rng(3)
    hits, narrower = [], []
    for _ in range(150):
        first, second = documents(rng, shift=0.05)
        rng.shuffle(second)  # type: ignore[arg-type]
        found = difference(second, first, "misalignment")
        assert found is not None
        hits.append(found.ci_low <= 0.05 <= found.ci_high)
        alone = [estimate(rows, "misalignment").standard_error for rows in (first, second)]
        narrower.append(found.standard_error / np.hypot(*alone))
    assert 0.9 <= np.mean(hits) <= 0.99
    assert max(narrower) < 0.2
    assert found.difference == pytest.approx(
        estimate(second, "misalignment").mean - estimate(first, "misalignment").mean
    )


def test_only_common_passages_are_compared_and_they_must_be_the_same() -> None:
    first = [measurement("a", 2.0, 1), measurement("b", 3.0, 1), measurement("c", 9.0, 1)]
    second = [measurement("a", 1.0, 1), measurement("b", 1.0, 1), measurement("d", 0.0, 1)]
    found = difference(first, second, "misalignment")
    assert found is not None
    assert (found.difference, found.num_passages, found.num_units) == (1.5, 2, 2)
    assert found.standard_error == pytest.approx(0.5)
    assert found.ci_high - found.ci_low == pytest.approx(2 * 12.706 * 0.5, rel=1e-3)  # one degree of freedom
    assert difference(first[2:], second, "misalignment") is None
    with pytest.raises(ValueError, match="a is scored at 1 and at 2 positions"):
        difference(first, [measurement("a", 1.0, 2)], "misalignment")


def test_nothing_measured_is_no_number() -> None:
    assert math.isnan(estimate([], "misalignment").mean)
    assert math.isnan(estimate([measurement("a", 1.0, 1)], "misalignment").standard_error)


def test_metrics_and_table_split_by_domain() -> None:
    rows = [measurement("a", 1.0, 10, "law"), measurement("b", 2.0, 10, "law"), measurement("c", 9.0, 10, "music")]
    metrics = system_metrics(rows, heard={"law"})
    assert metrics["misalignment"] == pytest.approx(12 / 30)
    assert metrics["by_domain"]["law"]["heard"] is True
    assert metrics["by_domain"]["music"] == metrics["by_domain"]["music"] | {"heard": False, "misalignment": 0.9}
    misaligned, forgotten = measured_tables({"": {"untrained": metrics, "stage1": metrics}})
    assert len(misaligned.rows) == len(forgotten.rows) == 3
    assert misaligned.rows[-1][3].text.startswith("0.400 ± ")
    assert len(forgotten.columns) == 3  # an untrained model has forgotten nothing
    assert metrics["misalignment_whole"] is None  # nothing was measured whole
    json.dumps(metrics, allow_nan=False)


def test_metrics_hold_both_protocols_and_the_differences_of_both() -> None:
    def system(name: str, factor: float) -> list[Measurement]:
        return [
            measurement(f"{domain}-{i}", factor * scale * (1 + i), 10, domain, system=name, protocol=protocol)
            for domain in ("law", "music")
            for i in range(4)
            for protocol, scale in (("interleaved", 1.0), ("whole", 5.0))
        ]

    rows = {"stage1": system("stage1", 1.0), "stage2": system("stage2", 0.5), "control": system("control", 0.9)}
    metrics: dict[str, Any] = {name: system_metrics(own, {"law"}) for name, own in rows.items()}
    assert metrics["stage1"]["misalignment"] == pytest.approx(0.25)
    assert metrics["stage1"]["misalignment_whole"] == pytest.approx(1.25)
    assert metrics["stage2"]["by_domain"]["music"]["misalignment_whole"] == pytest.approx(0.625)
    assert metrics["stage2"]["by_distance"]["0"]["misalignment_whole_standard_error"] > 0
    assert len(measured_tables({"": metrics})) == 4
    found = system_differences(rows, {"law"})
    assert len(found) == 2 * 2 * 3 * 3  # others, protocols, sides, quantities
    [row] = [
        row
        for row in found
        if (row["system_b"], row["protocol"], row["heard"], row["quantity"])
        == ("control", "whole", False, "misalignment")
    ]
    assert row["difference"] == pytest.approx(-0.4 * 1.25)
    assert row["ci_low"] < row["difference"] < row["ci_high"]
    json.dumps(found, allow_nan=False)
    [table] = difference_tables({"": {"measured_differences": found}})
    assert len(table.rows) == 2 * 2 * 3
    assert system_differences({"stage1": rows["stage1"]}, {"law"}) == []
