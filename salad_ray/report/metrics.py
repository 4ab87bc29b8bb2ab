"""What `report/metrics.json` holds of measurements and of clusters; of answers it is in `evaluation/statistics.py`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from salad_ray.config import PROTOCOLS
from salad_ray.evaluation.misalignment import difference, estimate
from salad_ray.flow import TRAINED
from salad_ray.names import CONTROL, STAGE1, STAGE2, UNTRAINED
from salad_ray.selection.importance import ClusterLoss, reliability
from salad_ray.tables import Measurement

MEASURED = (UNTRAINED, *TRAINED)
QUANTITIES = ("misalignment", "forgetting", "distillation")


def system_metrics(rows: Sequence[Measurement], heard: set[str]) -> dict[str, Any]:
    """F, M and the distillation loss (nats per position) of one system, by both protocols, with standard errors.

    Args:
        rows: all measurements of the system.
        heard: domains of the natural training speech.
    """
    by_domain = {
        domain: {"heard": domain in heard} | _quantities([row for row in rows if row.domain == domain])
        for domain in sorted({row.domain for row in rows})
    }
    by_distance = {
        str(distance): _quantities([row for row in rows if row.distance == distance])
        for distance in sorted({row.distance for row in rows})
    }
    return _quantities(rows) | {"by_domain": by_domain, "by_distance": by_distance}


def _quantities(rows: Sequence[Measurement]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for protocol in PROTOCOLS:
        end = protocol_end(protocol)
        own = [row for row in rows if row.protocol == protocol]
        estimates = {name: estimate(own, name) for name in QUANTITIES}
        # JSON has no NaN; nothing measured has no mean, a single document no spread.
        result |= {f"{name}{end}": _known(value.mean) for name, value in estimates.items()}
        result |= {f"{name}{end}_standard_error": _known(value.standard_error) for name, value in estimates.items()}
        of_any = estimates["misalignment"]
        result |= {f"num_scored{end}": of_any.num_positions, f"num_passages{end}": of_any.num_passages}
    return result


def protocol_end(protocol: str) -> str:
    """What follows the names of a protocol's numbers in metrics.json; those of `interleaved` are bare."""
    return "" if protocol == PROTOCOLS[0] else f"_{protocol}"


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def system_differences(systems: Mapping[str, Sequence[Measurement]], heard: set[str]) -> list[dict[str, Any]]:
    """Stage II − Stage I and Stage II − control on the same passages, for each quantity, protocol and side.

    Args:
        systems: all measurements of each system.
        heard: domains of the natural training speech.

    Returns:
        Rows with `difference`, `standard_error` and a paired 95 % interval (None where a single document leaves them
        open); `heard` is None for all domains.
    """
    found = []
    for other, protocol, side in product((STAGE1, CONTROL), PROTOCOLS, (None, True, False)):
        ours, theirs = (
            [row for row in systems.get(system, ()) if row.protocol == protocol and side in (None, row.domain in heard)]
            for system in (STAGE2, other)
        )
        for quantity in QUANTITIES:
            paired = difference(ours, theirs, quantity)
            if paired is not None:
                facts = {"system_a": STAGE2, "system_b": other, "quantity": quantity, "protocol": protocol}
                numbers = {name: _known(value) for name, value in asdict(paired).items()}
                found.append(facts | {"heard": side} | numbers)
    return found


def rankings(
    losses: Mapping[str, ClusterLoss], domains: Sequence[Counter[str]], heard: set[str]
) -> dict[str, dict[str, float | None]]:
    """How well M(c) by each protocol ranks the clusters: the noise in it, and whether it finds unheard domains."""
    return {
        protocol: {
            "reliability": reliability(loss.mean, loss.standard_error),
            "unheard_auc": unheard_auc(loss.mean.tolist(), domains, heard),
        }
        for protocol, loss in losses.items()
        if np.isfinite(loss.mean).any()
    }


def unheard_auc(losses: Sequence[float], domains: Sequence[Counter[str]], heard: set[str]) -> float | None:
    """Chance that a cluster of unheard domains has a larger M(c) than one of heard domains.

    Args:
        losses: M(c) of each cluster; those that are no number are left out.
        domains: for each cluster how many of its passages are of which domain; most of them decide.
        heard: domains of the natural training speech.

    Returns:
        The area under the ROC curve; None where all clusters are of one kind.
    """
    known = [index for index, counts in enumerate(domains) if counts and math.isfinite(losses[index])]
    unheard = [domains[index].most_common(1)[0][0] not in heard for index in known]
    if len(set(unheard)) < 2:
        return None
    return float(roc_auc_score(unheard, [losses[index] for index in known]))
