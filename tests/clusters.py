"""Ray clusters of their own for tests, on free ports, that leave nothing behind and touch nobody else's Ray."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
MARK = "SALAD_TEST_CLUSTER"
RAY = [sys.executable, "-c", "import sys; from ray.scripts.scripts import main; sys.argv[0] = 'ray'; main()"]
"""The `ray` command of this Python."""
SMALL = f"--object-store-memory={100 * 2**20}"


@dataclass(frozen=True)
class Head:
    """A running `ray start --head`."""

    port: int
    dashboard_port: int
    folder: Path
    env: dict[str, str]
    """Of everyone who has the token."""

    def ray(self, *arguments: str, cwd: Path = ROOT, **env: str | None) -> subprocess.CompletedProcess[str]:
        """Run the `ray` command as a client of this cluster; None takes a variable away."""
        own = {name: value for name, value in (self.env | env).items() if value is not None}
        return subprocess.run([*RAY, *arguments], cwd=cwd, env=own, **CAPTURED, timeout=1800)

    def request(self, path: str, method: str = "GET") -> Any:
        """What the dashboard's API answers, asked with the token."""
        token = Path(self.env["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.dashboard_port}/api/{path}",
            headers={"Authorization": f"Bearer {token}"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def state(self, kind: str) -> list[dict[str, Any]]:
        """Nodes, actors or tasks that are or were there, as Ray's state API lists them."""
        rows: list[dict[str, Any]] = self.request(f"v0/{kind}?limit=10000&detail=1")["data"]["result"]["result"]
        return rows


@dataclass(frozen=True)
class Node:
    """A machine of a cluster: a running `ray start --address`, and all that it has started."""

    name: str
    process: subprocess.Popen[bytes]
    mark: str

    def kill(self) -> None:
        """Everything at once, as when a machine is switched off."""
        _kill(self.mark)
        self.process.wait(30)

    def runs(self, name: str) -> bool:
        """Whether a process whose command line contains this is at work there."""
        for each in _marked(self.mark):
            with contextlib.suppress(psutil.Error):
                if name in " ".join(each.cmdline()):
                    return True
        return False


CAPTURED = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def head(*options: str, port: int | None = None, **env: str) -> Iterator[Head]:
    """Start a head with a token of its own; at the end all that descends from it is gone, and its folder too."""
    own_port, dashboard, client, agent, metrics = free_ports(5)
    port = port or own_port
    folder = Path(tempfile.mkdtemp(prefix="salad-"))  # short: a socket's path has at most 107 characters
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    mark = secrets.token_hex(8)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    own["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"  # else Ray Train finds all Rays of this machine
    inherited["PATH"] = f"{Path(sys.executable).parent}:{inherited.get('PATH', '')}"  # where a job finds `python`
    started = Head(port, dashboard, folder, inherited | own)
    command = [
        *(*RAY, "start", "--head", "--block", SMALL, f"--port={port}", f"--temp-dir={folder}"),
        *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
        *(f"--metrics-export-port={metrics}", *options),
    ]
    with open(folder / "head.log", "w") as log:
        process = subprocess.Popen(
            command, env=started.env | {MARK: mark} | env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(lambda: _answers(dashboard, process, folder), "the head's dashboard")
        yield started
    finally:
        process.terminate()  # it ends its own children, or is slow to
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        _kill(mark)  # nodes of the autoscaler, and workers, are nobody's children
        psutil.wait_procs(_marked(mark), 30)
        process.wait(30)
        assert not _marked(mark), "the cluster left processes behind"
        wait_for(lambda: _removed(folder), f"the end of {folder}", 30)


@contextlib.contextmanager
def node(cluster: Head, *options: str, within: Sequence[str] = ()) -> Iterator[Node]:
    """Start another machine of a cluster; at the end all that descends from it is gone.

    Args:
        within: a command that runs the rest of its line, in which the machine has another view of the disk, say.
    """
    agent, metrics = free_ports(2)
    name, mark = f"node-{secrets.token_hex(4)}", secrets.token_hex(8)
    command = [
        *(*RAY, "start", "--block", SMALL, f"--address=127.0.0.1:{cluster.port}", f"--node-name={name}"),
        *("--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}"),
        *(f"--metrics-export-port={metrics}", *options),
    ]
    with open(cluster.folder / f"{name}.log", "w") as log:
        process = subprocess.Popen([*within, *command], env=cluster.env | {MARK: mark}, stdout=log, stderr=log)
    started = Node(name, process, mark)
    try:
        wait_for(lambda: process.poll() is not None or _is_alive(cluster, name), f"{name} in the cluster")
        assert process.poll() is None, (cluster.folder / f"{name}.log").read_text()
        yield started
    finally:
        started.kill()


def _kill(mark: str) -> None:
    for each in _marked(mark):
        with contextlib.suppress(psutil.Error):
            each.kill()


def _removed(folder: Path) -> bool:
    """Remove a folder, which a process that is killed may still write to as it goes."""
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def _is_alive(cluster: Head, name: str) -> bool:
    with contextlib.suppress(ConnectionError):  # a dashboard of a busy machine that has only begun
        return any(row["node_name"] == name and row["state"] == "ALIVE" for row in cluster.state("nodes"))
    return False


def wait_for(happened: Callable[[], object], what: str, secs: float = 600.0) -> None:
    """Poll until something is true; fails after a deadline that is far beyond what it takes."""
    deadline = time.monotonic() + secs
    while not happened():
        assert time.monotonic() < deadline, f"{what}: not after {secs:.0f} s"
        time.sleep(0.2)


def _answers(port: int, process: subprocess.Popen[bytes], folder: Path) -> bool:
    assert process.poll() is None, (folder / "head.log").read_text()
    with socket.socket() as each:
        return each.connect_ex(("127.0.0.1", port)) == 0


def _marked(mark: str) -> list[psutil.Process]:
    """Processes that this cluster's head, or a descendant of it, has started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
