"""Where Ray Train's workers begin.

Ray Train's controller reads what it hands to the workers. So that it need not import DeepSpeed and all else that
training needs, several seconds each time, the job travels as bytes and the import waits until a worker runs.
"""

from __future__ import annotations

import pickle
from typing import Any


def work(loop_config: dict[str, Any]) -> None:
    """Entry of every worker; `loop_config["job"]` is a pickled `trainer.Job`, written by the driver of this run."""
    from salad_ray.distill.trainer import train_worker

    train_worker(pickle.loads(loop_config["job"]))
