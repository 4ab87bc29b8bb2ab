"""Where Ray Train's workers begin.

Ray Train's controller reads what it hands to the workers. So that it need not import DeepSpeed and all else that
training needs, several seconds each time, jobs travel as JSON and the import waits until a worker runs.
"""

from __future__ import annotations


def work(loop_config: dict[str, list[str]]) -> None:
    """Entry of every worker; `loop_config["jobs"]` are `trainer.Job`s as JSON."""
    from salad_ray.distill.trainer import job_of, train_worker

    train_worker([job_of(job) for job in loop_config["jobs"]])
