"""Pools grow from nothing for the stage that needs them, hold nothing else, and go when it is over.

Ray's own autoscaler starts and ends the nodes, by its fake provider: processes of this machine that claim the resources
of the pools of `cluster.yaml`, shrunk.
"""

from __future__ import annotations

import calendar
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from clusters import ROOT, Head, free_ports, head, wait_for
from factories import small_world_config, table_of
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE
from ray.autoscaler._private.kuberay.autoscaling_config import _generate_legacy_autoscaling_config_fields

pytestmark = pytest.mark.timeout(3600)  # a minute a test, but for machines that are busy with other things
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
SHRUNK = {"cpu": ({"CPU": 1}, 2), "gpu_spot": ({"CPU": 2, "GPU": 1}, 1), "training": ({"CPU": 0, "GPU": 2}, 1)}
"""Resources and most nodes of each pool, where `cluster.yaml` has machines."""
IDLE_MINUTES = 0.1


def autoscaling_config(port: int) -> dict[str, Any]:
    """The pools of `cluster.yaml` for the fake provider."""
    pools = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    assert set(pools) - {"head"} == set(SHRUNK)
    types: dict[str, Any] = {FAKE_HEAD_NODE_TYPE: {"resources": pools["head"]["resources"], "max_workers": 0}}
    for name, (resources, most) in SHRUNK.items():
        own = {"training": 2} if "training" in pools[name]["resources"] else {}
        assert bool(resources["CPU"]) == bool(pools[name]["resources"]["CPU"])
        types[name] = {"resources": resources | own, "min_workers": 0, "max_workers": most}
    for kind in types.values():
        kind["node_config"] = {}
        kind["resources"] |= {"object_store_memory": 100 * 2**20}
    # Not by the provider's own name: for that Ray reads defaults from a file that its wheel lacks.
    provider = {"type": "external", "module": PROVIDER, "head_node_id": FAKE_HEAD_NODE_ID, "launch_multiple": True}
    provider |= {"disable_node_updaters": True, "disable_launch_config_check": True}  # there is nothing to install
    return {
        "cluster_name": "salad",
        "max_workers": 4,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": provider | {"gcs_address": f"127.0.0.1:{port}"},
        "available_node_types": types,
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        **_generate_legacy_autoscaling_config_fields(),  # empty, but Ray wants to see them
    }


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head that computes nothing, and Ray's second autoscaler, as `ray up` and KubeRay start it."""
    [port] = free_ports(1)
    file = tmp_path_factory.mktemp("cluster") / "autoscaling.yaml"
    file.write_text(yaml.safe_dump(autoscaling_config(port)))
    fake = {"RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID}
    fake |= {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    fake["PYTHONPATH"] = str(ROOT)
    with head(f"--autoscaling-config={file}", "--num-cpus=0", port=port, **fake) as each:
        yield each


def nodes(cluster: Head) -> list[dict[str, Any]]:
    """Every node that ever was, but the head."""
    return [node for node in cluster.state("nodes") if not node["is_head_node"]]


def pool_of(node: dict[str, Any]) -> str:
    resources = node["resources_total"]
    return "training" if "training" in resources else "gpu_spot" if "GPU" in resources else "cpu"


def run_job(cluster: Head, *command: str) -> str:
    """Without a working dir of its own, as the nodes of this machine would share the folder where Ray keeps it."""
    done = cluster.ray("job", "submit", "--", "python", *command)
    assert done.returncode == 0, done.stdout
    return done.stdout


def wait_until_gone(cluster: Head) -> None:
    wait_for(lambda: all(node["state"] == "DEAD" for node in nodes(cluster)), "the end of idle nodes")


def pools_of(cluster: Head, kind: str, name: str) -> set[str]:
    """Where actors of this class have run, or tasks of this name."""
    by_id = {node["node_id"]: pool_of(node) for node in nodes(cluster)}
    rows = [row for row in cluster.state(kind) if name in row["class_name" if kind == "actors" else "name"]]
    return {by_id[row["node_id"]] for row in rows if row["node_id"]}  # some have waited in vain


@pytest.mark.slow
def test_a_stage_begins_on_no_cpu_at_all_and_its_node_goes_when_it_is_idle(grown: Head, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(small_world_config(tmp_path)))
    assert nodes(grown) == []
    log = run_job(grown, str(ROOT / "jobs/stage.py"), "ingest", "--config", str(file), "set=natural")
    assert "this Ray cluster has no CPUs now" in log
    assert [pool_of(node) for node in nodes(grown)] == ["cpu"]
    wait_until_gone(grown)


STAGE = """
import sys, time
from functools import partial
from pathlib import Path
import pyarrow as pa, ray
from salad_ray.configfile import parse_config
from salad_ray.flow import Step
from salad_ray.runs import Places, Run
from salad_ray.stages.common import ShardPart, Stage, Work, run_works

folder, num_gpus, max_actors, wanted = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

class Waits:  # for as many nodes as are wanted, but for whichever comes first: from it Ray Data learns the pace
    def __call__(self, item):
        seen = Path(folder, "seen")
        is_first = not seen.exists()
        seen.mkdir(exist_ok=True)
        (seen / ray.get_runtime_context().get_node_id()).touch()
        deadline = time.monotonic() + 1000
        while not is_first and len(list(seen.iterdir())) < wanted and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(1)
        yield ShardPart(pa.table({"item": [item]}), 1, 1)

config = parse_config({"run_dir": folder, "ray": {"max_actors": max_actors}})
step = Step("waits", "web", ("waits",))
run = Run(config, Places(folder, "run", {"web/waits": "key"}))
run_works(run, [Work(Stage.of(run, step), {f"part-{item:05d}": item for item in range(12)}, Waits, num_gpus)])
"""
"""A stage with nothing to do, as it would run on GPUs if there were any."""


@pytest.mark.slow
def test_a_pool_grows_under_load_as_far_as_it_is_told(grown: Head, tmp_path: Path) -> None:
    before = {node["node_id"] for node in nodes(grown)}
    run_job(grown, "-c", STAGE, str(tmp_path), "0", "2", "2")
    assert len(list((tmp_path / "seen").iterdir())) == 2
    assert [pool_of(node) for node in nodes(grown) if node["node_id"] not in before] == ["cpu", "cpu"]
    wait_until_gone(grown)


@pytest.mark.slow
def test_a_stage_on_gpus_stays_off_training_machines_when_its_own_pool_is_full(grown: Head, tmp_path: Path) -> None:
    before = {node["node_id"] for node in nodes(grown)}
    run_job(grown, "-c", STAGE, str(tmp_path), "1", "3", "1")
    assert [pool_of(node) for node in nodes(grown) if node["node_id"] not in before] == ["gpu_spot"]
    wait_until_gone(grown)


def tiny_config(folder: Path) -> dict[str, Any]:
    """A whole run and a sweep of one branch, as small as they come; training has machines of its own."""
    config = small_world_config(folder) | {"ray": {"max_actors": 2}, "cluster": {"num_clusters": 2}}
    config["world"] |= {"num_natural": 32, "num_heldout": 4, "num_web": 60, "num_text": 10, "num_questions": 8}
    config["pack"] |= {"text_share": 0.0}
    config["probe"] = {"passages_per_cluster": 2}
    config["distill"] |= {"extra_resources": {"training": 1}, "cpus_per_worker": 0}
    config["stage2"] = {"num_steps": 2, "control": False, "shares": {"natural": 0.5, "active": 0.5}}
    config["sweeps"] = {"rate": {"grid": {"distill.alpha": [1.0]}, "num_steps": [4]}}
    return config


def end_one(cluster: Head, pool: str) -> str:
    """Switch a machine of this pool off, with all that runs there; returns its id."""
    gone = next(node["node_id"] for node in nodes(cluster) if node["state"] == "ALIVE" and pool_of(node) == pool)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RAY_OVERRIDE_NODE_ID_FOR_TESTING") == gone:
                process.kill()
    return str(gone)


@pytest.mark.slow
def test_jobs_of_one_run_go_on_from_each_other_while_machines_come_and_go(grown: Head, tmp_path: Path) -> None:
    """Stage I, in which a machine is lost, then Stage II and a sweep, each from no machine at all."""
    file, run_dir = tmp_path / "tiny.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(tiny_config(tmp_path)))
    before = {node["node_id"] for node in nodes(grown)}
    submitted = ("job", "submit", "--no-wait", "--submission-id=one", "--", "python", str(ROOT / "jobs/stage1.py"))
    started = grown.ray(*submitted, "--config", str(file))
    assert started.returncode == 0, started.stdout
    wait_for(lambda: list(run_dir.glob("natural/utterances/*/part-*.parquet")), "the first shard")
    lost = end_one(grown, "cpu")
    wait_for(lambda: grown.request("jobs/one")["status"] in ("SUCCEEDED", "FAILED"), "the end of Stage I", 1800)
    log = grown.request("jobs/one/logs")["logs"]
    assert grown.request("jobs/one")["status"] == "SUCCEEDED", log
    seen = [node for node in nodes(grown) if node["node_id"] not in before]
    assert [node["state"] for node in seen if node["node_id"] == lost] == ["DEAD"]
    assert {pool_of(node) for node in seen if node["node_id"] != lost} >= {"cpu", "training"}
    made = {label: table_of(run_dir, *label.rsplit("/", 1)).manifest() for label in ("natural/features", "/stage1")}
    assert None not in made.values()
    for job, table in (("stage2.py", "stage2"), ("sweep.py", "sweeps/rate/results.json")):
        wait_until_gone(grown)
        before = {node["node_id"] for node in nodes(grown)}
        log = run_job(grown, str(ROOT / "jobs" / job), "--config", str(file))
        assert {pool_of(node) for node in nodes(grown) if node["node_id"] not in before} >= {"cpu", "training"}, log
        assert list(run_dir.glob(f"{table}/*/manifest.json" if job == "stage2.py" else table)), log
        for label, manifest in made.items():  # nothing is made twice
            assert table_of(run_dir, *label.rsplit("/", 1)).manifest() == manifest, log
    [row] = json.loads((run_dir / "sweeps/rate/results.json").read_text())["rows"]
    assert (row["budget"], row["error"]) == (4, "")
    wait_until_gone(grown)


FLOW = """
import sys
from salad_ray import pipeline
from salad_ray.configfile import load_config

pipeline.make(load_config(sys.argv[1]), "stage1", "natural")
"""


@pytest.mark.slow
def test_training_lands_on_training_machines_alone_and_others_elsewhere(grown: Head, tmp_path: Path) -> None:
    config = small_world_config(tmp_path) | {"ray": {"max_actors": 2}}
    config["distill"] |= {"extra_resources": {"training": 1}, "cpus_per_worker": 0}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(config))
    run_job(grown, "-c", FLOW, str(file))
    assert pools_of(grown, "actors", "RayTrainWorker") == {"training"}
    elsewhere = pools_of(grown, "tasks", "write_shards")
    assert elsewhere
    assert elsewhere <= {"cpu", "gpu_spot"}
    begun = json.loads(Path(table_of(tmp_path / "run", "", "trunk").url, "begun.json").read_text())["written_at"]
    begun_ms = 1000 * calendar.timegm(time.strptime(begun, "%Y-%m-%dT%H:%M:%SZ"))
    [machine] = [node for node in nodes(grown) if pool_of(node) == "training"]
    assert machine["start_time_ms"] >= begun_ms  # not before there was something to train
    wait_until_gone(grown)
