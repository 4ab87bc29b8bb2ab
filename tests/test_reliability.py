"""Faults on a cluster of several nodes on this machine: afterwards the tables are those of an undisturbed run.

Each test prints how long after the fault the work was done again (`pytest -s`), for docs/reliability.md.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from clusters import ROOT, Head, Node, head, node, wait_for
from factories import small_world_config, table_of, untrained_copy
from object_store import BUCKET, s3_server

from salad_ray.config import Config
from salad_ray.configfile import dump_config, parse_config
from salad_ray.runs import open_places
from salad_ray.s3 import S3
from salad_ray.tables import put_folder
from salad_ray.text.world import DOMAINS, world_passages

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # a minute each, but for machines busy with other things
PATIENCE_SECS = 1200
SPOKEN = "natural/utterances"
STAGES = {"ingest": "natural/passages", "synthesize": SPOKEN, "encode": "natural/features"}
WORKER = "write_shards"
FULL_DISK = """
cp "$0/begun.json" /dev/shm/salad-begun-$$ && mount -t tmpfs -o size=64k none "$0"
mv /dev/shm/salad-begun-$$ "$0/begun.json"
cat /dev/zero > "$0/ballast" 2> /dev/null
exec "$@"
"""
"""In a mount namespace of its own: a folder, as this machine alone sees it, has not a byte left."""


class Cluster:
    """A head that computes nothing, and nodes of a core each."""

    def __init__(self, num_nodes: int, **options: Any) -> None:
        self.stack = ExitStack()
        self.head: Head = self.stack.enter_context(head("--num-cpus=0", **options))
        self.nodes: list[Node] = []
        for _ in range(num_nodes):
            self.add_node()

    def add_node(self, within: Sequence[str] = ()) -> None:
        self.nodes.append(self.stack.enter_context(node(self.head, "--num-cpus=1", within=within)))

    def node_with(self, process: str) -> Node:
        return next(each for each in self.nodes if each.runs(process))

    def row_of(self, leaving: Node) -> dict[str, Any]:
        """What Ray knows of a node."""
        return next(row for row in self.head.state("nodes") if row["node_name"] == leaving.name)

    def give_notice(self, leaving: Node, secs: int) -> None:
        """As a cloud does of a spot machine that it takes away."""
        why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
        where = ["--node-id", self.row_of(leaving)["node_id"], "--address", f"127.0.0.1:{self.head.port}"]
        noticed = self.head.ray("drain-node", *where, *why, "--deadline-remaining-seconds", str(secs))
        assert noticed.returncode == 0, noticed.stdout


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    each = Cluster(2)
    with each.stack:
        yield each


class Driver:
    """`salad COMMAND CONFIG` in a process of its own, on a cluster."""

    def __init__(self, cluster: Head, config: Config, *command: str, folder: Path | None = None, **env: str) -> None:
        folder = folder or Path(config.run_dir).parent
        path, self.log = folder / "config.yaml", folder / "log"
        path.write_text(dump_config(config))
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "salad_ray.cli", command[0], str(path), *command[1:]],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=cluster.env | {"RAY_ADDRESS": f"127.0.0.1:{cluster.port}"} | env,
            )

    def wait(self) -> None:
        assert self.process.wait(PATIENCE_SECS) == 0, self.told()

    def told(self) -> str:
        return self.log.read_text()[-4000:]

    def wait_for(self, what: Callable[[], Any]) -> None:
        """While it runs."""
        deadline = time.monotonic() + PATIENCE_SECS
        while not what():
            assert self.process.poll() is None, self.told()
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.02)


def copied(finished_run: Config, folder: Path, *tables: str) -> Config:
    """A finished run without some of its tables, to be made again."""
    shutil.copytree(finished_run.run_dir, folder / "run", symlinks=True)
    for table in tables:
        shutil.rmtree(folder / "run" / table)
    return finished_run.model_copy(update={"run_dir": str(folder / "run")})


def content(config: Config, place: str) -> dict[str, Any]:
    """Every shard of a table with its rows."""
    set_name, name = place.split("/")
    table = table_of(config, set_name, name)
    return {shard: table.read(shard).to_pylist() for shard in table.shards()}


def folder_of(config: Config, label: str) -> Path:
    return Path(open_places(config.run_dir)[0].labelled(label).url)


def losses(config: Config) -> list[tuple[float, float]]:
    log = json.loads((folder_of(config, "trunk") / "result.json").read_text())["log"]
    return [(row["step"], row["loss"]) for row in log]


def begun(finished_run: Config, cluster: Head, folder: Path, stage: str = "synthesize") -> tuple[Config, Driver]:
    """A run of which a table is being made again, the first of it being there."""
    config = copied(finished_run, folder, STAGES[stage])
    driver = Driver(cluster, config, stage, "set=natural")
    driver.wait_for(lambda: list(folder_of(config, STAGES[stage]).glob("**/*.parquet")))
    return config, driver


def tell(fault: str, since: float) -> None:
    print(f"{fault}: done {time.monotonic() - since:.1f} s after it")  # noqa: T201 - what `pytest -s` is for


@pytest.mark.parametrize("stage", ["ingest", "synthesize", "encode"])
def test_a_node_that_dies_while_shards_are_made_costs_nothing(
    finished_run: Config, cluster: Cluster, tmp_path: Path, stage: str
) -> None:
    config, driver = begun(finished_run, cluster.head, tmp_path, stage)
    cluster.node_with(WORKER).kill()
    since = time.monotonic()
    assert not Path(folder_of(config, STAGES[stage]), "manifest.json").exists(), "it was done before the node died"
    driver.wait()
    tell(f"a node dies in {stage}", since)
    assert content(config, STAGES[stage]) == content(finished_run, STAGES[stage])


def test_a_node_that_dies_while_web_text_is_dealt_to_shards_costs_nothing(cluster: Cluster, tmp_path: Path) -> None:
    """Its part of what was read lies in the object store, and is read again."""
    (tmp_path / "web").mkdir()
    texts = [passage.text for passage in world_passages(24_000, DOMAINS, 0, "web")]
    for number in range(16):
        rows = [{"id": f"{number}-{at}", "text": text} for at, text in enumerate(texts[number::16])]
        (tmp_path / "web" / f"{number:02d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    web = {"path": str(tmp_path / "web"), "name": "web", "license": "CC0-1.0"}

    def config_in(folder: str) -> Config:
        own = {"run_dir": str(tmp_path / folder / "run"), "ingest": {"web": [web], "num_shards": 8}}
        own |= {"pack": {"context": 256}, "stage2": None}  # of text alone there is none
        Path(tmp_path, folder).mkdir()
        return parse_config(small_world_config(tmp_path) | own)

    undisturbed, config = config_in("one"), config_in("two")
    Driver(cluster.head, undisturbed, "ingest", "set=web").wait()
    driver = Driver(cluster.head, config, "ingest", "set=web")
    table = Path(config.run_dir, "web/passages")
    driver.wait_for(lambda: len(list(table.glob("*/scanned/*.json"))) >= 4)
    cluster.nodes[0].kill()
    since = time.monotonic()
    assert len(list(table.glob("*/part-*.parquet"))) < 8, "it was done before the node died"
    driver.wait()
    tell("a node dies while web text is dealt", since)
    assert content(config, "web/passages") == content(undisturbed, "web/passages")
    counts = [table_of(each, "web", "passages").manifest() or {} for each in (undisturbed, config)]
    assert counts[0]["num_input"] == counts[1]["num_input"] >= len(texts)


def test_a_node_that_dies_in_training_is_replaced_and_the_losses_are_the_same(
    undisturbed: Config, cluster: Cluster, tmp_path: Path
) -> None:
    config = untrained_copy(undisturbed, tmp_path / "run", max_failures=3)
    driver = Driver(cluster.head, config, "trunk")
    driver.wait_for(lambda: list(Path(folder_of(config, "trunk"), "checkpoints").glob("*/manifest.json")))
    cluster.node_with("RayTrainWorker").kill()
    since = time.monotonic()
    cluster.add_node()  # as an autoscaler does for a spot machine that was taken away
    starts = Path(folder_of(config, "trunk"), "starts.json")
    driver.wait_for(lambda: len(json.loads(starts.read_text())["starts"]) == 2)
    tell("a node dies in training, its workers' next start", since)
    driver.wait()
    assert losses(config) == losses(undisturbed)
    assert json.loads(starts.read_text())["starts"][1]["step"] >= 5


def test_a_killed_driver_leaves_nothing_double(finished_run: Config, cluster: Cluster, tmp_path: Path) -> None:
    config, driver = begun(finished_run, cluster.head, tmp_path)
    driver.process.kill()
    driver.process.wait()
    since = time.monotonic()
    Driver(cluster.head, config, "synthesize", "set=natural").wait()
    tell("the driver dies", since)
    assert content(config, SPOKEN) == content(finished_run, SPOKEN)


def test_a_head_that_dies_and_comes_back_costs_a_second_submission(
    finished_run: Config, cluster: Cluster, tmp_path: Path
) -> None:
    config, driver = begun(finished_run, cluster.head, tmp_path)
    cluster.stack.close()
    since = time.monotonic()
    assert driver.process.wait(PATIENCE_SECS) != 0
    assert "Traceback" not in driver.told().split("salad: ")[-1]
    tell("the head dies, the driver's end", since)
    again = Cluster(2)
    with again.stack:
        Driver(again.head, config, "synthesize", "set=natural").wait()
    tell("the head dies", since)
    assert content(config, SPOKEN) == content(finished_run, SPOKEN)


def test_a_machine_that_is_taken_away_with_notice_costs_nothing(
    finished_run: Config, cluster: Cluster, tmp_path: Path
) -> None:
    config, driver = begun(finished_run, cluster.head, tmp_path, "encode")
    leaving = cluster.node_with(WORKER)
    cluster.give_notice(leaving, 1)
    since = time.monotonic()
    time.sleep(1)
    assert driver.process.poll() is None
    leaving.kill()
    driver.wait()
    tell("1 s of notice, then the node is gone", since)
    assert "preemption" in cluster.row_of(leaving)["state_message"]  # the notice was taken, and not only the node
    assert content(config, STAGES["encode"]) == content(finished_run, STAGES["encode"])


def test_training_saves_what_it_has_when_a_machine_gets_notice(
    undisturbed: Config, cluster: Cluster, tmp_path: Path
) -> None:
    config = untrained_copy(undisturbed, tmp_path / "run", checkpoint_every=1000, max_failures=0)
    driver = Driver(cluster.head, config, "trunk", RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.2")
    starts = Path(folder_of(config, "trunk"), "starts.json")
    driver.wait_for(starts.exists)
    leaving = cluster.node_with("RayTrainWorker")
    cluster.give_notice(leaving, 60)
    driver.wait_for(lambda: list(Path(folder_of(config, "trunk"), "checkpoints").glob("*/manifest.json")))
    leaving.kill()
    since = time.monotonic()
    cluster.add_node()
    driver.wait_for(lambda: len(json.loads(starts.read_text())["starts"]) == 2)
    tell("notice in training, its workers' next start", since)
    driver.wait()
    assert losses(config) == losses(undisturbed)
    saved = json.loads(starts.read_text())["starts"][1]["step"]
    assert 0 < saved < 30
    assert f"saving step {saved} before" in driver.log.read_text()


def test_a_full_disk_ends_the_stage_with_a_sentence_and_costs_nothing(
    finished_run: Config, cluster: Cluster, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "none", str(disk)], check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        place = STAGES["encode"]
        config = copied(finished_run, disk, place)
        ballast = disk / "ballast"
        with suppress(OSError), ballast.open("wb") as file:  # to the last byte
            while True:
                file.write(bytes(4096))
        driver = Driver(cluster.head, config, "encode", "set=natural", folder=tmp_path)
        assert driver.process.wait(PATIENCE_SECS) == 1
        assert "No space left on device" in driver.told()
        assert "Traceback" not in driver.log.read_text()
        ballast.unlink()
        since = time.monotonic()
        Driver(cluster.head, config, "encode", "set=natural", folder=tmp_path).wait()
        tell("a full disk, from the second submission on", since)
        assert content(config, place) == content(finished_run, place)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_machine_whose_own_disk_is_full_leaves_the_work_to_the_others(
    finished_run: Config, cluster: Cluster, tmp_path: Path
) -> None:
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("a machine with a disk of its own needs root")
    config, driver = begun(finished_run, cluster.head, tmp_path, "encode")
    driver.process.kill()
    driver.process.wait()
    cluster.nodes[0].kill()
    place = folder_of(config, STAGES["encode"])
    cluster.add_node(within=["unshare", "--mount", "sh", "-c", FULL_DISK, str(place)])
    driver = Driver(cluster.head, config, "encode", "set=natural")
    since = time.monotonic()
    driver.wait()
    tell("a full disk on one of two machines, from the start on", since)
    assert "No space left on device" in driver.log.read_text()
    assert content(config, STAGES["encode"]) == content(finished_run, STAGES["encode"])


def test_a_job_whose_run_is_on_an_object_store_outlives_one_of_its_nodes(
    finished_run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once: a submitted job, nodes that share the store alone, and one of them dies."""
    place = STAGES["encode"]
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        S3.clear_instance_cache()
        config = copied(finished_run, tmp_path, place).model_copy(update={"run_dir": f"s3://{BUCKET}/run"})
        put_folder(str(tmp_path / "run"), config.run_dir)
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "config.yaml").write_text(dump_config(config))
        cluster = Cluster(2)
        with cluster.stack:
            job = ["jobs/stage.py", "encode", "--config", str(tmp_path / "config.yaml"), "set=natural"]
            options = ["--no-wait", "--submission-id=far", "--working-dir", "."]
            submitted = cluster.head.ray("job", "submit", *options, "--", "python", *job)
            assert submitted.returncode == 0, submitted.stdout
            wait_for(lambda: table_of(config, *place.split("/")).shards(), "a shard on the store")
            cluster.node_with(WORKER).kill()
            since = time.monotonic()
            assert table_of(config, *place.split("/")).manifest() is None, "it was done before the node died"
            wait_for(
                lambda: cluster.head.request("jobs/far")["status"] in ("SUCCEEDED", "FAILED", "STOPPED"), "its end"
            )
            tell("a node of a job on a store dies", since)
            log = cluster.head.request("jobs/far/logs")["logs"]
            assert cluster.head.request("jobs/far")["status"] == "SUCCEEDED", log
        assert "64 kept" in log
        assert content(config, place) == content(finished_run, place)


LEFT_OUT = """
import os, sys, time
from pathlib import Path
import ray
from salad_ray.configfile import parse_config
from salad_ray.flow import Step
from salad_ray.runs import Places, Run
from salad_ray.stages import shards
from salad_ray.stages.common import Stage, Work, run_works
from salad_ray.stages.shards import ShardPart, machines_with, own_node
from salad_ray.tables import Passage, to_arrow

folder, address = Path(sys.argv[1]), sys.argv[2]
shards.LEFT_OUT_SECS = 4.0

class Works:
    '''The bad machine fails; the good one makes a shard for each failure, and then stands still.'''
    def __call__(self, shard):
        bad = (folder / "bad").read_text()
        if own_node() == bad:
            (folder / "failed").touch()
            raise RuntimeError("this machine is bad")
        if bad and (folder / "begun").exists():
            (folder / "again").touch()
            time.sleep(3600)
        while bad and not (folder / "failed").exists():
            time.sleep(0.1)
        yield ShardPart(to_arrow(Passage, [Passage(passage_id=shard, doc_id="d", text="t")]), 1, 1)

config = parse_config({"run_dir": str(folder / "run"), "ray": {"address": address}})
run = Run(config, Places(config.run_dir, "run", {"web/rows": "key"}))
say = shards.say
def told(line, **facts):
    if "left out from now on" in line:
        (folder / "begun").touch()
    say(line, **facts)
shards.say = told
items = {f"part-{number:05d}": f"{number}" for number in range(6)}
run_works(run, [Work(Stage.of(run, Step("rows", "web", ("rows",))), items, Works)])
"""
"""A stage of six shards on a good and a bad machine."""


@pytest.mark.parametrize("mended", [True, False])
def test_a_machine_that_is_left_out_is_taken_back_when_all_others_are_gone(
    cluster: Cluster, tmp_path: Path, mended: bool
) -> None:
    """On a cluster that does not grow: a stage that nobody can make would else wait for ever."""
    bad, good = cluster.nodes
    (tmp_path / "bad").write_text(cluster.row_of(bad)["node_id"])
    log = tmp_path / "log"
    with log.open("w") as file:
        driver = subprocess.Popen(
            [sys.executable, "-c", LEFT_OUT, str(tmp_path), f"127.0.0.1:{cluster.head.port}"],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=cluster.head.env | {"PYTHONPATH": str(ROOT)},
        )
    try:
        wait_for((tmp_path / "again").exists, "the pass without the bad machine")
        if mended:
            (tmp_path / "bad").write_text("")
        good.kill()
        assert (driver.wait(PATIENCE_SECS) == 0) == mended, log.read_text()
    finally:
        driver.kill()
        driver.wait()
    told = log.read_text()
    assert "which is left out from now on" in told
    assert "as no other machine is there; those left out are taken back" in told
    assert ("shards cannot be made" in told) != mended, told
    assert ("this machine is bad" in told.split("taken back")[1]) != mended
    assert Path(tmp_path, "run/web/rows/key/manifest.json").exists() == mended
