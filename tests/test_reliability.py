"""Faults on a cluster of several nodes on this machine: afterwards the tables are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from clusters import free_ports
from factories import untrained_copy
from ray._private import ray_constants
from ray.cluster_utils import Cluster

from salad_ray.config import Config, dump_config
from salad_ray.tables import Table

PATIENCE_SECS = 600
STORE_BYTES = 100 * 2**20


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that computes nothing and two nodes of a core each."""
    # A local Ray, which other tests have started in this process, confines itself and all that follow to loopback.
    monkeypatch.setenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "1")
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    with nodes(2) as found:
        yield found


@contextmanager
def nodes(number: int) -> Iterator[Cluster]:
    [port] = free_ports(1)
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": port, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(number):
            cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        yield cluster
    finally:
        cluster.shutdown()


class Driver:
    """`salad STAGE CONFIG` in a process of its own, on a cluster."""

    def __init__(self, cluster: Cluster, config: Config, *command: str) -> None:
        path = Path(config.run_dir).parent / "config.yaml"
        path.write_text(dump_config(config))
        self.log = Path(config.run_dir).parent / "log"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "salad_ray.cli", command[0], str(path), *command[1:]],
                stdout=log,
                stderr=subprocess.STDOUT,
                # The second, since Ray Train would look at all Rays of this machine.
                env=os.environ
                | {"RAY_ADDRESS": cluster.address, "RAY_API_SERVER_ADDRESS": f"http://{cluster.head_node.webui_url}"},
            )

    def wait(self) -> None:
        assert self.process.wait(PATIENCE_SECS) == 0, self.log.read_text()[-4000:]


def wait_for(what: Callable[[], Any], driver: Driver) -> Any:
    deadline = time.monotonic() + PATIENCE_SECS
    while time.monotonic() < deadline:
        if found := what():
            return found
        assert driver.process.poll() is None, driver.log.read_text()[-4000:]
        time.sleep(0.02)
    raise AssertionError(driver.log.read_text()[-4000:])


def copied(finished_run: Config, folder: Path, *tables: str) -> Config:
    """A finished run without some of its tables, to be made again."""
    shutil.copytree(finished_run.run_dir, folder / "run")
    for table in tables:
        shutil.rmtree(folder / "run" / table)
    return finished_run.model_copy(update={"run_dir": str(folder / "run")})


def content(config: Config, place: str) -> dict[str, Any]:
    """Every shard of a table with its rows."""
    set_name, name = place.split("/")
    table = Table(config.run_dir, set_name, name)
    return {shard: table.read(shard).to_pylist() for shard in table.shards()}


def kill_node(cluster: Cluster, holds: str = "") -> None:
    """Kill a worker node, processes and all, one on which a process of this name is at work."""
    for node in cluster.list_all_nodes():
        if node is not cluster.head_node and any(holds in name for name in processes_of(node)):
            cluster.remove_node(node, allow_graceful=False)
            return
    raise AssertionError(f"no node has a process {holds}")


def processes_of(node: Any) -> list[str]:
    [raylet] = [process.process.pid for process in node.all_processes["raylet"]]
    return [" ".join(child.cmdline()) for child in psutil.Process(raylet).children(recursive=True)]


SPOKEN = "natural/utterances"


def speaking(finished_run: Config, cluster: Cluster, folder: Path) -> tuple[Config, Driver]:
    """A run whose speech is being made again, the first of it being there."""
    config = copied(finished_run, folder, SPOKEN)
    driver = Driver(cluster, config, "synthesize", "set=natural")
    wait_for(lambda: list(Path(config.run_dir, SPOKEN).glob("**/*.parquet")), driver)
    return config, driver


STAGES = {
    "ingest": "natural/passages",
    "synthesize": "natural/utterances",
    "encode": "natural/features",
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_node_that_dies_while_shards_are_made_costs_nothing(
    finished_run: Config, cluster: Cluster, tmp_path: Path, stage: str
) -> None:
    place = STAGES[stage]
    config = copied(finished_run, tmp_path, place)
    driver = Driver(cluster, config, stage, "set=natural")
    wait_for(lambda: list(Path(config.run_dir, place).glob("**/*.parquet")), driver)
    kill_node(cluster, "MapWorker" if stage != "ingest" else "")
    driver.wait()
    assert content(config, place) == content(finished_run, place)


def test_a_node_that_dies_in_training_is_replaced_and_the_losses_are_the_same(
    undisturbed: Config, cluster: Cluster, tmp_path: Path
) -> None:
    config = untrained_copy(undisturbed, tmp_path / "run", max_failures=3)
    driver = Driver(cluster, config, "stage1")
    wait_for(lambda: list(Path(config.run_dir, "stage1/checkpoints").glob("*/manifest.json")), driver)
    kill_node(cluster, "RayTrainWorker")
    cluster.add_node(num_cpus=1)  # as an autoscaler does for a spot machine that was taken away
    driver.wait()
    assert losses(config) == losses(undisturbed)
    starts = json.loads(Path(config.run_dir, "stage1", "starts.json").read_text())["starts"]
    assert len(starts) == 2
    assert starts[1]["step"] >= 5


def losses(config: Config) -> list[tuple[float, float]]:
    log = json.loads(Path(config.run_dir, "stage1", "result.json").read_text())["log"]
    return [(row["step"], row["loss"]) for row in log]


@pytest.mark.slow
def test_a_killed_driver_leaves_nothing_double(finished_run: Config, cluster: Cluster, tmp_path: Path) -> None:
    config, driver = speaking(finished_run, cluster, tmp_path)
    driver.process.kill()
    driver.process.wait()
    Driver(cluster, config, "synthesize", "set=natural").wait()
    assert content(config, SPOKEN) == content(finished_run, SPOKEN)


@pytest.mark.slow
def test_a_head_that_dies_and_comes_back_costs_a_second_submission(
    finished_run: Config, cluster: Cluster, tmp_path: Path
) -> None:
    config, driver = speaking(finished_run, cluster, tmp_path)
    cluster.shutdown()
    assert driver.process.wait(PATIENCE_SECS) != 0
    with nodes(2) as again:
        Driver(again, config, "synthesize", "set=natural").wait()
    assert content(config, SPOKEN) == content(finished_run, SPOKEN)


@pytest.mark.slow
def test_a_machine_that_is_taken_away_with_notice_costs_nothing(
    finished_run: Config, cluster: Cluster, tmp_path: Path
) -> None:
    config, driver = speaking(finished_run, cluster, tmp_path)
    node = next(node for node in cluster.worker_nodes if any("MapWorker" in name for name in processes_of(node)))
    notice = ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    limits = ["--deadline-remaining-seconds", "5", "--address", cluster.address]
    subprocess.run([Path(sys.executable).with_name("ray"), "drain-node", *notice, *limits], check=True)
    time.sleep(5)
    cluster.remove_node(node, allow_graceful=False)
    driver.wait()
    assert content(config, SPOKEN) == content(finished_run, SPOKEN)


@pytest.mark.slow
def test_a_full_disk_ends_the_stage_with_a_sentence_and_costs_nothing(
    finished_run: Config, cluster: Cluster, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(disk)], check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        place = "natural/features"
        config = copied(finished_run, disk, place)
        ballast = disk / "ballast"
        free = shutil.disk_usage(disk).free
        ballast.write_bytes(bytes(free - 200_000))
        driver = Driver(cluster, config, "encode", "set=natural")
        assert driver.process.wait(PATIENCE_SECS) == 1
        told = driver.log.read_text()
        assert "No space left on device" in told
        assert "Traceback" not in told.splitlines()[-1]
        ballast.unlink()
        Driver(cluster, config, "encode", "set=natural").wait()
        assert content(config, place) == content(finished_run, place)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
