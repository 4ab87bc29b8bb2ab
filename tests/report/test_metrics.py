"""What the report says of a selection, and of disturbed speech."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from report.page_run import metrics
from rich.console import Console

from salad_ray.evaluation.statistics import accuracy_table, robustness_table
from salad_ray.report.accuracy import robustness_tables
from salad_ray.report.clusters import selection_tables
from salad_ray.report.headline import printed_tables
from salad_ray.report.metrics import rankings, unheard_auc
from salad_ray.selection.importance import ClusterLoss
from salad_ray.tables import Score


def test_the_area_is_one_where_unheard_clusters_have_the_larger_loss() -> None:
    domains = [Counter(law=9, food=1), Counter(food=5), Counter(law=2), Counter(food=3)]
    assert unheard_auc([2.0, 0.1, 1.5, 0.2], domains, {"food"}) == 1.0
    assert unheard_auc([0.1, 2.0, 0.2, 1.5], domains, {"food"}) == 0.0
    assert unheard_auc([1.0, 1.0, 1.0, 1.0], domains, {"food"}) == pytest.approx(0.5)


def test_there_is_no_area_without_both_kinds() -> None:
    assert unheard_auc([1.0, 2.0], [Counter(food=1), Counter(food=1)], {"food"}) is None
    assert unheard_auc([1.0, 2.0], [Counter(food=1), Counter()], set()) is None
    assert unheard_auc([1.0, float("nan")], [Counter(food=1), Counter(law=1)], {"food"}) is None


def test_each_protocol_is_told_how_well_it_ranks() -> None:
    domains = [Counter(law=3), Counter(food=3), Counter(law=3), Counter(food=3)]
    error, number = np.full(4, 0.01), np.full(4, 3)
    losses = {
        "interleaved": ClusterLoss(np.array([0.1, 0.2, 0.4, 0.3]), error, number, 0.25),
        "whole": ClusterLoss(np.array([2.0, 0.2, 3.0, np.nan]), error, number, 1.7),
    }
    found = rankings(losses, domains, {"food"})
    assert found["interleaved"]["unheard_auc"] == 0.5
    assert found["whole"]["unheard_auc"] == 1.0
    assert found["interleaved"]["reliability"] > 0.9
    nothing = ClusterLoss(np.full(4, np.nan), error, number, float("nan"))
    assert rankings({"whole": nothing}, domains, {"food"}) == {}


def test_the_table_sums_up_the_clusters_beyond_the_first() -> None:
    rows = [
        {
            "cluster_id": number,
            "web_share": 0.25,
            "distillation": 1.0 + number,
            "standard_error": None if number == 0 else 0.1,
            "num_probed": 3,
            "target_share": 0.1 * (number + 1),
            "num_selected": 10 * number,
            "hours_selected": 0.5 * number,
        }
        for number in range(4)
    ]
    selection = {"gamma": 5.0, "hours": 3.0, "budget_hours": 3.5, "effective_sample_size": 12.0}
    console = Console(record=True, width=120)
    console.print(*selection_tables(selection | {"num_web_passages": 40, "by_cluster": rows}, num_rows=2))
    text = console.export_text()
    assert "3.00 of 3.50 h" in text
    assert "2 more" in text
    assert "50.00%" in text  # the web's share of the two that are summed up
    assert text.index("4.000±0.100") < text.index("3.000±0.100")


def test_what_a_run_prints_fits_a_terminal_of_80_columns() -> None:
    console = Console(record=True, width=80)
    for table in printed_tables(metrics()):
        console.print(table)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for part in ("1.200±0.060", "1.500±0.100", "−0.310 (−0.510…−0.110)", "80% (75…85)", "unheard", "deaf", "99.00%"):
        assert part in text


def test_the_robustness_table_shows_the_loss_under_each_condition() -> None:
    def score(item: int, condition: str, right: bool) -> Score:
        fields = {"answer": 0, "prediction": int(not right), "prediction_norm": None, "log_likelihoods": [0.0, 0.0]}
        place = {"system": "stage1", "benchmark": "piqa", "item_id": f"piqa-{item}", "modality": "speech"}
        return Score(**place, **fields, condition=condition, domain="", num_shots=0)

    scores = [score(item, "clean", True) for item in range(20)] + [score(item, "noise", item > 4) for item in range(20)]
    console = Console(record=True, width=80)
    console.print(
        *robustness_tables({"": {"accuracy": accuracy_table(scores), "robustness": robustness_table(scores)}})
    )
    text = console.export_text()
    assert "100.0%" in text
    assert "75.0%, 25.0 (" in text
    assert robustness_tables({"": {"accuracy": [], "robustness": []}}) == []
