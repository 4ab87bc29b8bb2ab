"""Runs, corpora and checkpoints in an object store: a real S3 server on loopback, and one that has bad minutes."""

from __future__ import annotations

import gzip
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from factories import a_table, commanded, small_world_config, table_of
from object_store import BUCKET, Faults, Server, bad_seconds, faulty, s3_server

from salad_ray import pipeline
from salad_ray.cli import main
from salad_ray.config import Config, CorpusConfig, RecordedQualityConfig, WebTextConfig
from salad_ray.console import user_error
from salad_ray.distill.checkpoints import CheckpointReader, CheckpointWriter, Partition, Piece, latest
from salad_ray.runs import open_run
from salad_ray.s3 import PART_BYTES, S3
from salad_ray.speech.audio import check_recording, load_utterance
from salad_ray.speech.corpora import find_sources, scan, source_stamp
from salad_ray.stages.ray_cluster import worker_settings
from salad_ray.store import AWS_SETTINGS, StoreError, filesystem, for_ray, open_file
from salad_ray.tables import (
    Reject,
    Utterance,
    atomic_file,
    delete_file,
    delete_folder,
    file_exists,
    from_arrow,
    local_folder,
    put_folder,
    read_bytes,
    read_json,
    to_arrow,
    write_bytes,
    write_json,
)
from salad_ray.text.documents import Document, find_text_sources, read_documents

ROWS = to_arrow(Reject, [Reject("ingest", f"utt {number}", "empty") for number in range(300)])
NUM_STEPS = 30
HEAD = """
import ray, sys
print(ray.init(address="local", num_cpus=1, include_dashboard=False).address_info["gcs_address"], flush=True)
sys.stdin.read()
"""
DRIVER = """
import json, os, ray, sys
from salad_ray.configfile import load_config
from salad_ray.stages.ray_cluster import start_ray
start_ray(load_config(sys.argv[1]))
seen = ray.remote(lambda: {name: value for name, value in os.environ.items() if name.startswith("AWS_")})
print(json.dumps(ray.get(seen.remote())), flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as found:
        yield found


def enter(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process take the server for its S3; a file system made before would ask the former one."""
    for name in (*AWS_SETTINGS, "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    S3.clear_instance_cache()


@pytest.fixture
def place(server: Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A folder of the bucket for one test."""
    enter(server, monkeypatch)
    return f"s3://{BUCKET}/{request.node.originalname}"


@pytest.fixture
def faults(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """The same, by way of a proxy that can be told to fail."""
    with faulty(server) as (front, found):
        enter(front, monkeypatch)
        yield found


def keys(server: Server, url: str) -> list[str]:
    return server.keys(url.removeprefix(f"s3://{BUCKET}/"))


def uploads(server: Server, url: str) -> list[str]:
    return server.uploads(url.removeprefix(f"s3://{BUCKET}/"))


def large_rows(num_bytes: int) -> Any:
    """Rows that do not get smaller by compression."""
    noise = np.random.default_rng(0).bytes(num_bytes).hex()
    step = 2**16
    return to_arrow(Reject, [Reject("a", str(at), noise[at : at + step]) for at in range(0, len(noise), step)])


def test_a_table_is_written_listed_read_and_deleted(server: Server, place: str) -> None:
    table = a_table(place, "natural", "rows")
    assert table.is_new()
    assert table.manifest() is None
    for name in ("part-1", "part-0"):
        table.write(name, ROWS)
    write_json(f"{table.url}/begun.json", {"version": "a"})
    write_json(f"{table.url}/manifest.json", {"num_rows": 600})
    assert table.shards() == ["part-0", "part-1"]
    assert table.read("part-0").equals(ROWS)
    assert table.metadata("part-1").num_rows == 300
    assert [row.key for row in table.read_where(Reject, "part-0", "key", ["utt 7"])] == ["utt 7"]
    assert len(list(table.iterate(Reject, "part-0", 100))) == 300
    assert table.manifest() == {"num_rows": 600}
    table.delete_shards("part-1")
    assert table.shards() == ["part-0"]
    table.delete()
    assert keys(server, place) == []


def test_a_listing_has_more_than_a_page(server: Server, place: str) -> None:
    table = a_table(place, "", "many")
    names = [f"part-{number:05d}" for number in range(51)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: write_bytes(f"{table.url}/{name}.parquet", b"x"), names))
    assert table.shards() == names
    table.delete()
    assert keys(server, place) == []


def test_what_another_process_writes_is_seen_at_once(server: Server, place: str) -> None:
    table = a_table(place, "", "rows")
    assert table.shards() == []
    server.client.put_object(Bucket=BUCKET, Key=f"{place.removeprefix(f's3://{BUCKET}/')}/rows/a.parquet", Body=b"")
    assert table.shards() == ["a"]


def test_a_large_shard_goes_up_in_parts(server: Server, place: str) -> None:
    table, rows = a_table(place, "", "rows"), large_rows(2 * PART_BYTES)
    table.write("part-0", rows)
    [key] = keys(server, place)
    assert server.client.head_object(Bucket=BUCKET, Key=key)["ETag"].strip('"').endswith("-3")
    assert table.read("part-0").equals(rows)


def test_a_writer_that_fails_leaves_nothing(server: Server, place: str) -> None:
    table, rows = a_table(place, "", "rows"), large_rows(PART_BYTES)

    def fail_after(count: int) -> None:
        with table.writer("part-0", rows.schema) as write:
            for _ in range(count):
                write(rows)
            raise KeyError("midway")

    for count in (0, 3):  # before the first part was sent, and after some
        with pytest.raises(KeyError, match="midway"):
            fail_after(count)
    assert keys(server, place) == []
    assert uploads(server, place) == []


def test_a_writer_that_is_killed_leaves_nothing_to_see(server: Server, place: str) -> None:
    code = f"""
import time
from salad_ray.tables import atomic_file
with atomic_file("{place}/part-0.parquet") as file:
    for _ in range(3):
        file.write(bytes({PART_BYTES}))
    print("written", flush=True)
    time.sleep(60)
"""
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "written\n"
    writer.kill()
    writer.wait()
    assert uploads(server, place), "no part had been sent"
    assert keys(server, place) == []
    assert not file_exists(f"{place}/part-0.parquet")
    with atomic_file(f"{place}/part-0.parquet") as file:
        file.write(b"whole")
    assert read_bytes(f"{place}/part-0.parquet") == b"whole"


def test_folders_go_there_and_come_back(place: str, tmp_path: Path) -> None:
    (tmp_path / "model" / "llm").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "llm" / "weights").write_bytes(b"abc")
    for _ in range(2):  # replaces
        put_folder(str(tmp_path / "model"), f"{place}/model")
    with local_folder(f"{place}/model") as back:
        files = sorted(str(path.relative_to(back)) for path in Path(back).rglob("*") if path.is_file())
    assert files == ["config.json", "llm/weights"]
    delete_folder(place)
    assert not file_exists(f"{place}/model/config.json")


def test_checkpoints_are_whole_pruned_and_read_back(server: Server, place: str) -> None:
    def partition(rank: int, seed: int) -> Partition:
        values = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed))[:, 25 * rank : 25 * rank + 25]
        moments = {"exp_avg": values[1], "exp_avg_sq": values[2]}
        return Partition(values[0].clone(), [Piece("embed", 25 * rank, 25, 0)], moments)

    for step in (1, 2, 3):
        writers = [CheckpointWriter(place, rank, 2, "abcd", keep=2) for rank in (0, 1)]
        for rank, writer in enumerate(writers):
            writer.save([partition(rank, step)], {"step": step})
        for writer in writers:
            writer.wait()
    assert {key.split("/")[-2] for key in keys(server, place)} == {"step-00000002-abcd", "step-00000003-abcd"}
    write_bytes(f"{place}/step-00000004-dead/rank-00000.safetensors", b"begun")
    complaints: list[str] = []
    found = latest(place, complaints.append)
    assert found is not None
    assert (found.step, len(complaints)) == (3, 1)
    whole = Partition(
        torch.zeros(50), [Piece("embed", 0, 50, 0)], {name: torch.zeros(50) for name in ("exp_avg", "exp_avg_sq")}
    )
    CheckpointReader(found).fill(whole)
    expected = torch.randn(3, 50, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.stack([whole.weight, *whole.moments.values()]), expected)


def test_a_store_that_answers_errors_for_a_while_is_waited_out(faults: Faults, server: Server) -> None:
    url = f"s3://{BUCKET}/errors"
    table, rows = a_table(url, "", "rows"), large_rows(2 * PART_BYTES)

    def in_bad_times(work: Any) -> Any:
        faults.requests, before = 4, faults.failed
        result = work()
        assert faults.failed - before == 4
        return result

    in_bad_times(lambda: table.write("small", ROWS))
    with table.writer("large", rows.schema) as write:  # begin, parts and completion fail, each in its turn
        for number in range(len(rows)):
            faults.requests += number % 100 == 0
            write(rows.slice(number, 1))
        faults.requests = 3
    assert in_bad_times(table.shards) == ["large", "small"]
    assert in_bad_times(lambda: table.read("large")).equals(rows)
    assert in_bad_times(lambda: read_json(f"{url}/none.json")) is None
    in_bad_times(table.delete)
    assert keys(server, url) == uploads(server, url) == []


def test_many_at_once_outlast_bad_seconds(faults: Faults) -> None:
    """botocore's standard mode would give up here: all threads of a process share its quota of retries."""
    url = f"s3://{BUCKET}/seconds/file"
    write_bytes(url, b"a" * 100)
    faults.until = time.monotonic() + 8
    with ThreadPoolExecutor(32) as threads:
        assert set(threads.map(read_bytes, [url] * 32)) == {b"a" * 100}
    assert faults.failed > 100


def test_a_store_that_is_down_is_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    enter(replace(server, endpoint=f"http://127.0.0.1:{port}"), monkeypatch)
    url = f"s3://{BUCKET}/down/file"
    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(write_bytes, url, b"1")
        time.sleep(2)
        assert not writing.done()
        with faulty(server, port):
            writing.result()
    assert server.read("down/file") == b"1"


def test_an_answer_that_breaks_off_is_asked_for_again(faults: Faults) -> None:
    url, data = f"s3://{BUCKET}/broken/file", np.random.default_rng(0).bytes(100_000)
    write_bytes(url, data)
    faults.cut_bodies = 2
    assert read_bytes(url) == data
    table = a_table(f"s3://{BUCKET}/broken", "", "rows")
    table.write("part-0", ROWS)
    faults.cut_bodies = 1
    assert table.read("part-0").equals(ROWS)
    large = np.random.default_rng(0).bytes(2 * PART_BYTES)
    write_bytes(f"s3://{BUCKET}/broken/model/weights", large)
    faults.cut_bodies = 1
    with local_folder(f"s3://{BUCKET}/broken/model") as back:
        assert Path(back, "weights").read_bytes() == large
    assert faults.failed == 4


def test_of_a_large_object_only_the_part_that_breaks_off_is_asked_for_again(faults: Faults, tmp_path: Path) -> None:
    folder, data = f"s3://{BUCKET}/parts", np.random.default_rng(0).bytes(4 * PART_BYTES + 7)
    write_bytes(f"{folder}/file", data)
    faults.num_bytes, faults.cut_bodies = 0, 1
    assert read_bytes(f"{folder}/file") == data
    assert faults.num_bytes < len(data) + 2 * PART_BYTES
    faults.num_bytes, faults.cut_bodies = 0, 2  # the first answer is dropped for parts, wherever it ends
    with local_folder(folder) as back:
        assert Path(back, "file").read_bytes() == data
    assert faults.failed == 3


@pytest.mark.parametrize("num_bytes", [100_000, 2 * PART_BYTES])
def test_answers_that_all_break_off_are_the_store_s_fault(
    num_bytes: int, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{BUCKET}/broken-{num_bytes}"
    write_bytes(f"{url}/file", bytes(num_bytes))
    monkeypatch.setattr(S3, "retries", 2)
    faults.cut_bodies = 1000

    def fetch() -> None:
        with local_folder(url):
            pass

    for read in (lambda: read_bytes(f"{url}/file"), lambda: open_file(f"{url}/file").read(), fetch):
        with pytest.raises(StoreError, match=rf"{url}/file: the store does not answer"):
            read()


@pytest.mark.parametrize("name", ["run?", "run*", "run[X]", "[!a]un?"])
def test_a_name_is_never_a_pattern(name: str, server: Server, place: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a[b]").write_bytes(b"1")
    own, other = (a_table(f"{place}/{run}", "", "rows") for run in (name, "runX"))
    for table, run in ((own, name), (other, "runX")):
        table.write("part-0", ROWS)
        put_folder(str(tmp_path / "model"), f"{place}/{run}/model")
    put_folder(str(tmp_path / "model"), f"{place}/{name}/model")  # replaces
    with local_folder(f"{place}/{name}/model") as back:
        assert [path.name for path in Path(back).rglob("*")] == ["a[b]"]
    own.delete_shards("part-")
    assert own.shards() == []
    own.write("part-0", ROWS)
    own.delete()
    delete_folder(f"{place}/{name}")
    left = place.removeprefix(f"s3://{BUCKET}/")
    assert keys(server, place) == [f"{left}/runX/model/a[b]", f"{left}/runX/rows/part-0.parquet"]


def test_a_removal_takes_few_requests_and_ends_with_whose_it_is(faults: Faults, server: Server) -> None:
    table = a_table(f"s3://{BUCKET}/removal", "", "rows")
    for name in ("manifest.json", "begun.json", "sub/begun.json", *(f"part-{n:02d}.parquet" for n in range(30))):
        server.client.put_object(Bucket=BUCKET, Key=f"removal/rows/{name}", Body=b"{}")
    faults.undeleted = ["AccessDenied"]
    with pytest.raises(StoreError, match="access denied"):
        table.delete()
    left = server.keys("removal/")
    assert "removal/rows/manifest.json" not in left
    assert len(left) == 32
    faults.seen.clear()
    table.delete_shards("part-0")
    table.delete()
    assert server.keys("removal/") == []
    assert len(faults.seen) < 20
    removals = [target for method, target in faults.seen if method == "DELETE" or "?delete" in target]
    assert removals[-2:] == [f"/{BUCKET}?delete", f"/{BUCKET}/removal/rows/begun.json"]


def test_what_a_bulk_removal_leaves_is_removed_after_all(faults: Faults, server: Server) -> None:
    table = a_table(f"s3://{BUCKET}/left", "", "rows")
    for number in range(3):
        table.write(f"part-{number}", ROWS)
    faults.undeleted = ["InternalError", "SlowDown"]
    table.delete_shards("part-1")
    assert table.shards() == ["part-0", "part-2"]
    assert faults.failed == 2
    faults.undeleted = ["AccessDenied"]
    with pytest.raises(StoreError, match=rf"s3://{BUCKET}/left/rows/part-0\.parquet: access denied \(No\."):
        table.delete()
    assert table.shards() == ["part-0", "part-2"]


def test_of_a_shard_only_what_is_asked_for_is_fetched(faults: Faults) -> None:
    """Few bytes, and few requests where pieces lie close together."""
    table = a_table(f"s3://{BUCKET}/fetched", "", "rows")
    with table.writer("large", ROWS.schema) as write:
        for number in range(8):
            noise = np.random.default_rng(number).bytes(2 * 2**20).hex()
            write(
                to_arrow(
                    Reject, [Reject(f"{number}-{at}", "k", noise[at : at + 2**19]) for at in range(0, 2**22, 2**19)]
                )
            )
    with table.writer("close", ROWS.schema) as write:
        for _ in range(50):
            write(ROWS)

    def cost(read: Any) -> tuple[int, int]:
        faults.num_bytes = 0
        faults.seen.clear()
        read()
        return faults.num_bytes, len(faults.seen)

    size = cost(lambda: table.read("large"))[0]
    assert size > 2**24
    few = 2**17
    for read, num_bytes, num_requests in (
        (lambda: table.read("large"), size + few, 6),
        (lambda: list(table.iterate(Reject, "large")), size + few, 6),
        (lambda: table.metadata("large"), few, 2),
        (lambda: table.read("large", ["stage"]), few, 10),
        (lambda: table.read_where(Reject, "large", "stage", ["none"]), few, 10),
        (lambda: table.read_where(Reject, "large", "stage", [f"5-{2**19}"]), size // 8 + few, 11),
        (lambda: table.read("close", ["key"]), 2 * few, 3),
        (lambda: table.read_where(Reject, "close", "key", ["utt 3"]), 3 * few, 4),
    ):
        found = cost(read)
        assert found[0] < num_bytes
        assert found[1] <= num_requests
    [row] = table.read_where(Reject, "large", "stage", [f"5-{2**19}"])
    assert row == from_arrow(Reject, table.read("large").filter(pc.field("stage") == f"5-{2**19}"))[0]
    assert len(table.read_where(Reject, "close", "key", ["utt 3", "utt 299"])) == 100


def test_a_shard_takes_few_requests(faults: Faults) -> None:
    table = a_table(f"s3://{BUCKET}/asks", "", "rows")
    faults.seen.clear()
    table.write("part-1", ROWS)
    assert len(faults.seen) == 1
    faults.seen.clear()
    table.read("part-1")
    assert len(faults.seen) <= 3


def test_many_threads_have_connections(place: str) -> None:
    fs, _ = filesystem(place)
    fs.connect()
    assert fs.s3.meta.config.max_pool_connections >= 64


def test_an_upload_whose_completion_was_not_answered_is_there(faults: Faults) -> None:
    url, data = f"s3://{BUCKET}/lost/file", np.random.default_rng(0).bytes(2 * PART_BYTES)
    faults.lost = "uploadId="
    with atomic_file(url) as file:
        file.write(data)
    assert faults.failed == 1
    assert read_bytes(url) == data


def test_ray_gets_the_same_store(server: Server, place: str) -> None:
    """Ray Train and Ray Tune keep their own state in run_dir, too, and make folders there first."""
    assert for_ray("/runs/a") == {"storage_path": "/runs/a"}
    given = for_ray(f"{place}/run")
    files, path = given["storage_filesystem"], given["storage_path"]
    files.create_dir(f"{path}/stage1")
    with files.open_output_stream(f"{path}/stage1/mark") as file:
        file.write(b"1")
    assert keys(server, place) == [f"{path.removeprefix(f'{BUCKET}/')}/stage1/mark"]


def test_workers_elsewhere_hear_of_the_store_and_never_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in AWS_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "secret")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://store")
    assert worker_settings() == {"AWS_REGION": "eu-central-1", "AWS_ENDPOINT_URL_S3": "http://store"}
    job = {"runtime_env": {"env_vars": {"AWS_REGION": "eu-west-1"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))  # as `ray job submit` leaves it
    assert worker_settings() == {"AWS_ENDPOINT_URL_S3": "http://store"}


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
def test_the_endpoint_is_that_of_the_usual_variables(
    variable: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(server, monkeypatch)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.setenv(variable, server.endpoint)
    write_bytes(f"s3://{BUCKET}/endpoint/{variable}", b"1")
    assert server.read(f"endpoint/{variable}") == b"1"


@pytest.mark.slow
def test_workers_of_a_running_cluster_hear_of_the_store(server: Server, tmp_path: Path) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_ADDRESS"))}
    plain |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD], env=plain, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert head.stdout is not None
    assert head.stdin is not None
    try:
        address = head.stdout.readline().strip()
        environment = plain | server.environment | {"RAY_ADDRESS": address}
        path = small_config(tmp_path, "s3://anywhere/run")
        done = subprocess.run([sys.executable, "-c", DRIVER, path], env=environment, capture_output=True, text=True)
    finally:
        head.stdin.close()  # ends it
        head.wait()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        name: server.environment[name] for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION")
    }


@pytest.mark.parametrize(
    ("changes", "url", "words"),
    [
        ({}, "s3://no-such-bucket/run", r"s3://no-such-bucket/run/a\.json: there is no such bucket; create it"),
        ({"AWS_PROFILE": "none"}, f"s3://{BUCKET}/run", r"profile \(none\) could not be found; set AWS_PROFILE"),
        ({"AWS_ENDPOINT_URL_S3": "nowhere"}, f"s3://{BUCKET}/run", "Invalid endpoint: nowhere; AWS_ENDPOINT_URL_S3 is"),
        ({}, "s3://No_Bucket!/run", r"no valid name .*; write s3://bucket/folder"),
        (
            {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"},
            f"s3://{BUCKET}/run",
            "does not answer, after 2 attempts .*AWS_EN",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(
    changes: dict[str, str], url: str, words: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(server, monkeypatch)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("salad_ray.s3.ATTEMPTS", 2)
    monkeypatch.setattr(S3, "retries", 2)
    with pytest.raises(StoreError, match=words) as error:
        write_json(f"{url}/a.json", {})
    assert user_error(error.value) is error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (400, "ExpiredToken")])
def test_a_refusal_names_the_object(status: int, code: str, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    faults.answers = [(status, code, "No.")]
    faults.requests = 1
    with pytest.raises(StoreError, match=rf"s3://{BUCKET}/refused/a.json: .*No.*(AWS_PROFILE|AWS_REGION)"):
        write_json(f"s3://{BUCKET}/refused/a.json", {})


def test_without_keys_it_says_so(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(server, monkeypatch)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_SHARED_CREDENTIALS_FILE": "/none",
        "AWS_CONFIG_FILE": "/none",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match="Unable to locate credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID"):
        write_json(f"s3://{BUCKET}/run/a.json", {})


def records(corpus: CorpusConfig, unpack_url: str) -> dict[str, Any]:
    [source] = find_sources(corpus)
    assert source_stamp(source) not in ("", "none")
    rows = list(scan(source, corpus, 10**8, unpack_url))
    assert all(isinstance(row, Utterance) for row in rows)
    return {row.utt_id: row for row in rows if isinstance(row, Utterance)}


@pytest.mark.shared_data
@pytest.mark.parametrize("folder", ["libriheavy", "emilia/Emilia-YODAS"])
def test_a_corpus_is_read_from_there(folder: str, place: str, shared_data: Path) -> None:
    """A manifest with long recordings, and tars of which each member is read by its bytes."""
    local = shared_data / "formats" / folder
    put_folder(str(local), f"{place}/corpus")
    here = records(CorpusConfig(path=str(local), name="c"), f"{place}/unpacked")
    there = records(CorpusConfig(path=f"{place}/corpus", name="c"), f"{place}/unpacked")
    assert here.keys() == there.keys()
    for name in sorted(there)[:3]:
        assert there[name].uri.startswith("s3://")
        assert np.array_equal(load_utterance(there[name], 16_000), load_utterance(here[name], 16_000))


def test_a_store_that_fails_makes_no_rejects(faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with the store is not told of a recording: its row would be lost without need."""
    write_bytes(f"s3://{BUCKET}/audio/a.wav", b"RIFF")
    row = Utterance(
        utt_id="u", text="a", duration_secs=1.0, recording_id="r", corpus="c", uri=f"s3://{BUCKET}/audio/a.wav"
    )
    monkeypatch.setattr(S3, "retries", 2)
    faults.requests = 100
    with pytest.raises(StoreError, match="does not answer"):
        check_recording(row, RecordedQualityConfig())


def test_web_text_is_read_from_there(place: str) -> None:
    rows = [{"text": f"Text number {number}.", "id": str(number)} for number in range(60)]
    with atomic_file(f"{place}/web/a.parquet") as file:
        pq.write_table(pa.Table.from_pylist(rows[:40]), file, row_group_size=10)
    write_bytes(
        f"{place}/web/more/b.jsonl.gz", gzip.compress("".join(json.dumps(r) + "\n" for r in rows[40:]).encode())
    )
    corpus = WebTextConfig(path=f"{place}/web")
    found = [row for source in find_text_sources(corpus) for row in read_documents(source, corpus)]
    assert sorted(row.text for row in found if isinstance(row, Document)) == sorted(row["text"] for row in rows)
    assert len(found) == len(rows)


# ---- whole runs, each in a process of its own: Ray's workers inherit its variables


def small_config(folder: Path, run_dir: str, **changes: Any) -> Path:
    data = small_world_config(folder) | {"run_dir": run_dir}
    for name, section in changes.items():
        data[name] = section and data.get(name, {}) | section
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def salad(server: Server, *arguments: str | Path) -> str:
    """Run a command to its end; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "salad_ray.cli", *map(str, arguments)],
        env=os.environ | server.environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_command_ends_with_one_sentence(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(server, monkeypatch)
    done = commanded(main, "ingest", str(small_config(tmp_path, "s3://no-such-bucket/run")))
    assert done.returncode == 1
    assert done.stderr.strip().startswith("salad: s3://no-such-bucket/run/")
    assert "there is no such bucket" in done.stderr
    assert "\n" not in done.stderr.strip()


@pytest.mark.slow
def test_a_stage_writes_there_and_continues(server: Server, place: str, tmp_path: Path) -> None:
    """The shortest way through driver, Ray's actors and store: two stages, the second with a shard taken away."""
    path = small_config(tmp_path, place, world={"num_natural": 16}, ingest={"num_shards": 2})
    salad(server, "synthesize", path)
    table = table_of(place, "natural", "utterances")
    [first, second] = table.shards()
    kept = server.client.head_object(Bucket=BUCKET, Key=f"{table.url.split('/', 3)[3]}/{first}.parquet")["LastModified"]
    lost = table.read(second)
    delete_file(f"{table.url}/{second}.parquet")
    assert "1 of 2 shards are there already" in salad(server, "synthesize", path)
    assert table.read(second).equals(lost)
    again = server.client.head_object(Bucket=BUCKET, Key=f"{table.url.split('/', 3)[3]}/{first}.parquet")
    assert again["LastModified"] == kept
    states = {row["place"].rpartition("/")[0]: row["state"] for row in pipeline.status(open_run(place))}
    assert states["natural/utterances"] == "done"


@pytest.mark.slow
def test_a_whole_run_is_that_of_a_local_folder(
    server: Server, place: str, finished_run: Config, tmp_path: Path
) -> None:
    path = small_config(tmp_path, place)
    with faulty(server) as (front, faults), bad_seconds(faults, every_secs=20, secs=3):
        salad(front, "run", path)
    assert faults.failed > 0
    tables = (("natural", "utterances"), ("natural", "features"), ("web", "clusters"), ("active", "selection"))
    for set_name, name in tables:
        here, there = (table_of(run_dir, set_name, name) for run_dir in (finished_run.run_dir, place))
        assert here.shards() == there.shards()
        assert all(here.read(shard).equals(there.read(shard)) for shard in here.shards()), name
    here, there = (read_json(f"{run_dir}/report/metrics.json") for run_dir in (finished_run.run_dir, place))
    assert here is not None
    assert there is not None
    for system in ("untrained", "stage1", "stage2", "control"):
        for name in ("misalignment", "forgetting", "distillation"):
            assert there[system][name] == pytest.approx(here[system][name], rel=1e-4), (system, name)
    assert {row["state"] for row in pipeline.status(open_run(place))} == {"done"}
    assert file_exists(f"{place}/report/page.html")
    assert uploads(server, place) == []
    again = salad(server, "run", path)
    assert again.count("done already") >= len(pipeline.steps(finished_run)) - 1
    assert read_json(f"{place}/stage1/model.json") == {"model": f"{table_of(place, '', 'stage1').url}/model"}
    salad(server, "export", place, tmp_path / "exported")
    assert (tmp_path / "exported" / "README.md").is_file()


@pytest.mark.slow
def test_a_killed_training_continues_from_its_checkpoint(
    server: Server, place: str, finished_run: Config, tmp_path: Path
) -> None:
    """The same losses as without the kill, on a store that has bad seconds."""
    shared = ("natural", "teacher", "web")
    for name in shared:
        source = Path(finished_run.run_dir, name)
        if source.is_dir():
            put_folder(str(source), f"{place}/killed/{name}")
            put_folder(str(source), f"{place}/whole/{name}")
    settings = {"num_steps": NUM_STEPS, "checkpoint_every": 5, "keep_checkpoints": 20}
    folders = {name: tmp_path / name for name in ("killed", "whole")}
    paths = {}
    for name, folder in folders.items():
        folder.mkdir()
        paths[name] = small_config(folder, f"{place}/{name}", distill=settings)
        salad(server, "pack", paths[name])
    salad(server, "trunk", paths["whole"])
    command = [sys.executable, "-m", "salad_ray.cli", "trunk", str(paths["killed"])]
    driver = subprocess.Popen(command, env=os.environ | server.environment, stdout=subprocess.DEVNULL)
    killed, whole = (table_of(f"{place}/{name}", "", "trunk").url for name in ("killed", "whole"))
    checkpoints = f"{killed}/checkpoints"
    deadline = time.monotonic() + 300
    while latest(checkpoints) is None and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.1)
    driver.kill()
    driver.wait()
    assert latest(checkpoints) is not None
    assert not file_exists(f"{killed}/manifest.json"), "it had ended before it was killed"
    with faulty(server) as (front, faults), bad_seconds(faults, every_secs=10, secs=3):
        salad(front, "trunk", paths["killed"])
    assert faults.failed > 0
    results = [read_json(f"{url}/result.json") for url in (killed, whole)]
    starts = read_json(f"{killed}/starts.json")
    assert starts is not None
    assert starts["starts"][-1]["step"] >= 5, "it began anew"
    logs = [[(row["step"], row["loss"]) for row in result["log"]] for result in results if result is not None]
    assert logs[0] == logs[1]
