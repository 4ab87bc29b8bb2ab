"""A real S3 server on loopback (moto's), and a proxy before it that has bad minutes."""

from __future__ import annotations

import http.client
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "salad-test"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "eu-central-1"}
ANSWERS = (
    (503, "SlowDown", "Please reduce your request rate."),
    (500, "InternalError", "We encountered an internal error. Please try again."),
    (503, "ServiceUnavailable", "Service is unable to handle request."),
    (0, "", "The connection is closed without an answer."),
)


@dataclass
class Server:
    """An S3 server with an empty bucket; `client` is boto3's, which nothing of salad_ray is between."""

    endpoint: str
    client: Any

    @property
    def environment(self) -> dict[str, str]:
        return KEYS | {"AWS_ENDPOINT_URL_S3": self.endpoint}

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", [])]

    def uploads(self, prefix: str) -> list[str]:
        """Keys of multipart uploads that were neither completed nor aborted."""
        found = self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        return [one["Key"] for one in found if one["Key"].startswith(prefix)]

    def read(self, key: str) -> bytes:
        data: bytes = self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return data


@contextmanager
def s3_server() -> Iterator[Server]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it would tell every request
    os.environ["MOTO_S3_DEFAULT_MAX_KEYS"] = "20"  # so that listings have pages
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=KEYS["AWS_REGION"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    client.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": KEYS["AWS_REGION"]})
    try:
        yield Server(endpoint, client)
    finally:
        for key in Server(endpoint, client).keys(""):  # what it holds is the process', and would be the next server's
            client.delete_object(Bucket=BUCKET, Key=key)
        client.delete_bucket(Bucket=BUCKET)
        moto.stop()


@dataclass
class Faults:
    """What the proxy does instead of passing a request on, and what came by."""

    requests: int = 0
    """The next so many fail."""
    until: float = 0.0
    """On the monotonic clock: every request fails."""
    answers: list[tuple[int, str, str]] = field(default_factory=lambda: list(ANSWERS))
    cut_bodies: int = 0
    """The next so many answers with more than a kilobyte break off in the middle."""
    lost: str = ""
    """The next POST whose target has this in it is passed on, and its answer lost."""
    undeleted: list[str] = field(default_factory=list)
    """Error codes of the next bulk removals: a good answer that says so of each object, and nothing is removed."""
    failed: int = 0
    seen: list[tuple[str, str]] = field(default_factory=list)
    """Method and target of every request."""
    num_bytes: int = 0
    """Of all bodies that were answered."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def hit(self) -> bool:
        with self.lock:
            bad = self.requests > 0 or time.monotonic() < self.until
            self.requests = max(0, self.requests - 1)
            self.failed += bad
            return bad

    def lose(self, method: str, target: str) -> bool:
        with self.lock:
            bad = bool(self.lost) and method == "POST" and self.lost in target
            self.lost = "" if bad else self.lost
            self.failed += bad
            return bad

    def keep(self, target: str, body: bytes) -> bytes:
        """The answer to a bulk removal that fails; nothing where it is to be passed on."""
        with self.lock:
            if not self.undeleted or not target.endswith("?delete"):
                return b""
            self.failed += 1
            code = self.undeleted.pop(0)
        keys = re.findall(r"<Key>(.*?)</Key>", body.decode())
        told = "".join(f"<Error><Key>{key}</Key><Code>{code}</Code><Message>No.</Message></Error>" for key in keys)
        return f"<?xml version='1.0'?><DeleteResult>{told}</DeleteResult>".encode()

    def cut(self, body: bytes) -> bytes:
        with self.lock:
            self.num_bytes += len(body)
            if self.cut_bodies > 0 and len(body) > 1024:
                self.cut_bodies -= 1
                self.failed += 1
                return body[: len(body) // 2]
            return body


@contextmanager
def bad_seconds(faults: Faults, every_secs: float, secs: float) -> Iterator[None]:
    """For `secs` out of so many all requests fail."""
    over = threading.Event()

    def disturb() -> None:
        while not over.wait(every_secs):
            faults.until = time.monotonic() + secs

    threading.Thread(target=disturb, daemon=True).start()
    try:
        yield
    finally:
        over.set()


@contextmanager
def faulty(server: Server, port: int = 0) -> Iterator[tuple[Server, Faults]]:
    """The same server by way of a proxy."""
    faults, behind = Faults(), urlsplit(server.endpoint).netloc
    numbers = count()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            faults.seen.append((self.command, self.path))
            if faults.hit():
                status, code, message = faults.answers[next(numbers) % len(faults.answers)]
                if status == 0:
                    self.close_connection = True
                    return
                told = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
                self.answer(status, {"Content-Type": "application/xml"}, told.encode())
                return
            kept = faults.keep(self.path, body)
            if kept:
                self.answer(200, {"Content-Type": "application/xml"}, kept)
                return
            onward = http.client.HTTPConnection(behind, timeout=60)
            onward.request(self.command, self.path, body, dict(self.headers))
            answer = onward.getresponse()
            if faults.lose(self.command, self.path):
                answer.read()
                self.close_connection = True
                return
            headers = {name: value for name, value in answer.getheaders() if name not in ("Connection", "Date")}
            self.answer(answer.status, headers, answer.read())
            onward.close()

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            if self.command != "HEAD":
                headers = headers | {"Content-Length": str(len(body))}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                sent = faults.cut(body)
                self.wfile.write(sent)
                self.close_connection = len(sent) < len(body)

        def log_message(self, *_: object) -> None:
            """Silence."""

    proxy = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        yield Server(f"http://127.0.0.1:{proxy.server_address[1]}", server.client), faults
    finally:
        proxy.shutdown()
        proxy.server_close()
