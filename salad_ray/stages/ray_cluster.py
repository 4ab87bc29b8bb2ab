"""Start Ray on this machine or join a cluster, and what its processes have to be told."""

from __future__ import annotations

import json
import logging
import os
import socket
from typing import Any

import ray

from salad_ray.config import Config
from salad_ray.ray_private import LOGGERS_OF_ERRORS, listen_on_loopback
from salad_ray.stages.shards import StageError, first_line
from salad_ray.store import aws_settings

LOCAL_TRAIN = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
"""For Ray Train where Ray is this machine's alone: no process that waits for notice of machines to be taken away, each
of which takes seconds of CPU to start, and the end of a training is seen at once."""


def start_ray(config: Config) -> None:
    """Start or join Ray once per process; all servers of a local one listen on loopback, and ask for Ray's token."""
    if not ray.is_initialized():
        address = config.ray.address or os.environ.get("RAY_ADDRESS")  # set where a job was submitted
        settings = {"runtime_env": {"env_vars": worker_settings()}} if address else _local_settings(config)
        ray.init(address=address or "local", logging_level=logging.ERROR, **settings)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # spot machines can take longer than its half hour, and so can a shard
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    for name in LOGGERS_OF_ERRORS:
        logging.getLogger(name).addFilter(_error_in_a_line)


def _local_settings(config: Config) -> dict[str, Any]:
    listen_on_loopback()
    for name, value in LOCAL_TRAIN.items():
        os.environ.setdefault(name, value)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # For Ray Train, which asks the dashboard for state: else it would look for a Ray of this machine, and may find
    # another, or a note that one has left which is gone.
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
    dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port}
    return {"num_cpus": config.ray.num_cpus} | dashboard


def _error_in_a_line(record: logging.LogRecord) -> bool:
    """What Ray Data logs of a lost process or a pass that was broken off, without the error itself.

    Its traceback holds the actor, hence its CPU and GPU, for as long as some handler keeps the record.
    """
    if record.exc_info and record.exc_info[1] is not None:
        record.msg, record.args = f"A process was lost: {first_line(record.exc_info[1])}", ()
        record.exc_info = None
    return True


def worker_settings() -> dict[str, str]:
    """What workers on other machines have to be told: the store's endpoint and region (never keys), the log's format.

    Ray refuses a variable that the submitted job's own environment sets, too.
    """
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env") or {}
    known = aws_settings() | {name: os.environ[name] for name in ("SALAD_LOG",) if name in os.environ}
    return {name: value for name, value in known.items() if name not in submitted.get("env_vars", {})}


def require_gpus(config: Config, label: str, num_gpus: float) -> None:
    """Refuse what would wait for ever: GPUs on a cluster that has none, unless `ray.max_actors` says that it grows."""
    if config.ray.max_actors is None and num_gpus > ray.cluster_resources().get("GPU", 0):
        raise StageError(
            f"{label} asks for {num_gpus:g} GPUs an actor, but this Ray cluster has none now; if it grows on demand, "
            "say by ray.max_actors how far"
        )
