"""What programs outside of the package read of others' output: AWS' notice, and Ray's use of memory."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import HTTPError

import pytest
import ray
from ray._private.internal_api import store_stats_summary
from ray.core.generated.node_manager_pb2 import FormatGlobalMemoryInfoReply

from benchmarks.nodes import spilled_of

ROOT = Path(__file__).resolve().parents[1]
NOTICE = "/latest/meta-data/spot/instance-action"
TOKEN = "/latest/api/token"


@pytest.fixture
def spot_notice() -> ModuleType:
    """A file that is copied to machines, and in no package."""
    spec = importlib.util.spec_from_file_location("spot_notice", ROOT / "deploy/spot_notice.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def service(spot_notice: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, tuple[int, str]]]:
    """Path → status and body of what a metadata service answers; 404 where it has nothing."""
    answers: dict[str, tuple[int, str]] = {TOKEN: (200, "a-token")}

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.get(self.path, (404, "Not Found"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        do_PUT = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(spot_notice, "METADATA", f"http://127.0.0.1:{server.server_port}")
        yield answers
        server.shutdown()


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
def test_each_notice_of_aws_is_read(spot_notice: ModuleType, service: dict[str, tuple[int, str]], action: str) -> None:
    assert spot_notice.notice() is None
    service[NOTICE] = (200, f'{{"action": "{action}", "time": "2017-09-18T08:22:00Z"}}')  # as AWS' manual has it
    assert spot_notice.notice() == {"action": action, "time": "2017-09-18T08:22:00Z"}


GOOGLE = {"/computeMetadata/v1/instance/preempted": (200, "TRUE")}
AZURE = {
    "/metadata/scheduledevents": (200, json.dumps({"DocumentIncarnation": 1, "Events": [{"EventType": "Preempt"}]}))
}


@pytest.mark.parametrize("other", [GOOGLE, AZURE])
def test_another_clouds_service_is_not_taken_for_one_without_a_notice(
    spot_notice: ModuleType, service: dict[str, tuple[int, str]], other: dict[str, tuple[int, str]]
) -> None:
    service.clear()
    service.update(other)
    with pytest.raises(HTTPError, match="404"):  # which the log then has every five seconds
        spot_notice.notice()


@pytest.mark.parametrize("answer", [(500, ""), (401, ""), (200, "<html>"), (200, "")])
def test_what_is_no_answer_is_not_taken_for_no_notice(
    spot_notice: ModuleType, service: dict[str, tuple[int, str]], answer: tuple[int, str]
) -> None:
    service[NOTICE] = answer
    with pytest.raises((HTTPError, json.JSONDecodeError)):
        spot_notice.notice()


@pytest.mark.parametrize(("ahead", "least", "most"), [(120, 110, 120), (-30, 0, 0)])
def test_ray_is_told_how_long_the_living_node_has(
    spot_notice: ModuleType, monkeypatch: pytest.MonkeyPatch, ahead: int, least: int, most: int
) -> None:
    told: list[list[str]] = []
    rows = [("old", "one", False), ("own", "one", True), ("other", "two", True)]
    nodes = [{"NodeID": key, "NodeName": name, "Alive": alive} for key, name, alive in rows]
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: told.append(command))
    spot_notice.drain("one", "terminate", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + ahead)))
    [command] = told
    options = dict(zip(command[2::2], command[3::2], strict=True))
    assert (command[:2], options["--node-id"]) == (["ray", "drain-node"], "own")
    assert least <= int(options["--deadline-remaining-seconds"]) <= most


def memory(**stats: float) -> str:
    """What `ray memory --stats-only` prints, by the function of Ray that writes it."""
    reply = FormatGlobalMemoryInfoReply()
    for name, number in {"object_store_bytes_avail": 100 * 2**20, **stats}.items():
        setattr(reply.store_stats, name, number)
    return str(store_stats_summary(reply)) + "\n"


def test_what_ray_has_spilled_is_read_from_its_own_words() -> None:
    spilled = {"spilled_bytes_total": 1_234 * 2**20, "spilled_objects_total": 17, "spill_time_total_s": 2.5}
    restored = {"restored_bytes_total": 77 * 2**20, "restored_objects_total": 3, "restore_time_total_s": 1.0}
    assert spilled_of(memory(**spilled, **restored)) == 1_234
    assert spilled_of(memory(**restored)) == 0
    assert spilled_of(memory()) == 0
    with pytest.raises(ValueError, match="printed no use of memory: 'Ray is gone'"):
        spilled_of("Ray is gone")
