"""What is used of Ray's private API, since no public one does it: seen in Ray 2.60.0, to be looked at with each other.

Nothing else imports it (`tests/test_layers.py`). Of public names that Ray may still change, `shards.py` uses the label
`ray.io/node-id` and the limit `execution_no_progress_timeout_s` with its error, and `deploy/spot_notice.py` the command
`ray drain-node`.
"""

from __future__ import annotations

import os
import re
import socket

from ray._private import ray_constants

LOGGERS_OF_ERRORS = ("ray.data._internal.execution.streaming_executor_state", "ray.data.exceptions")
"""Loggers of Ray Data that are given errors whole."""
LOGGER_OF_REPORTS = "ray.train.v2._internal.execution.context"
"""Of Ray Train, which announces every report there, metrics and all."""


def listen_on_loopback() -> None:
    """Ray's processes, and gloo between training workers, would listen on the network for other machines to come.

    Ray turns a given 127.0.0.1 into the machine's address, but has a switch, which it sets where firewalls would ask
    (Windows, macOS). It is read at import, so the constant is set, and the variable for the processes to come.
    """
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    loopback = next((name for _, name in socket.if_nameindex() if re.fullmatch("lo[0-9]*", name)), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
