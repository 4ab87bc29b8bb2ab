"""Tell Ray when AWS is about to take this machine away: `python spot_notice.py NODE_NAME`, beside `ray start`.

AWS tells a spot machine two minutes before it goes, and nobody else. A machine that Ray knows to be leaving gets no new
work, and training saves a checkpoint. On a machine that is not spot no notice ever comes. One process per user is
enough; any other ends at once. Ray's own address is found as `ray status` finds it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import datetime
from pathlib import Path

import ray

METADATA = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")
POLL_SECS = 5
open_directly = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def ask(path: str, method: str = "GET", **headers: str) -> str:
    """Of the instance metadata service, version 2."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"{METADATA}/latest/{path}", headers=named, method=method)
    with open_directly(request, timeout=2) as answer:
        return str(answer.read().decode())


def notice() -> dict[str, str] | None:
    """Such as {"action": "terminate", "time": "2026-01-01T00:02:00Z"}; None as long as there is none.

    Raises:
        OSError: whoever answers does not do it as AWS does; another cloud's service has no such token.
    """
    token = ask("api/token", "PUT", X_aws_ec2_metadata_token_ttl_seconds="60")
    try:
        found: dict[str, str] = json.loads(ask("meta-data/spot/instance-action", X_aws_ec2_metadata_token=token))
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    return found


def drain(node_name: str, action: str, when: str) -> None:
    """By `ray drain-node`, which cannot tell which of Ray's nodes this is."""
    ray.init(address="auto", log_to_driver=False, ignore_reinit_error=True)
    [own] = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeName"] == node_name]
    ray.shutdown()
    secs = int(datetime.fromisoformat(when).timestamp() - time.time())
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", f"AWS: {action} at {when}"]
    command = ["ray", "drain-node", "--node-id", own, *reason, "--deadline-remaining-seconds", str(max(secs, 0))]
    subprocess.run(command, check=True)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    [node_name] = sys.argv[1:]
    with Path("~/.spot_notice").expanduser().open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        while True:
            try:
                found = notice()
                if found:
                    drain(node_name, found["action"], found["time"])
                    logging.info("Ray knows that this machine goes: %s", found)
                    return
            except Exception:  # of a service or of Ray that does not answer just now
                logging.exception("asking again")
            time.sleep(POLL_SECS)


if __name__ == "__main__":
    main()
