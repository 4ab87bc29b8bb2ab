"""cluster.yaml and deploy/kuberay.yaml: valid for Ray, closed to the world, with room for what the configs ask for."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.client import BaseClient
from ray.autoscaler._private.aws import config as rays_aws
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import fillout_defaults, validate_config

from salad_ray import pipeline
from salad_ray.config import Config, load_config
from salad_ray.scaling.plan import gpus_of

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ("salad_3b", "salad_7b")


def cluster() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return content


def ray_job() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "kuberay.yaml").read_text())
    return content


def pools() -> dict[str, dict[str, dict[str, Any]]]:
    """Resources and most nodes of every worker pool, by file and pool."""
    aws = {
        name: {"resources": kind["resources"], "most": kind["max_workers"]}
        for name, kind in cluster()["available_node_types"].items()
        if name != "head"
    }
    groups = {
        name: {"resources": kind["resources"], "most": kind["max_workers"]}
        for name, kind in as_rays_autoscaler_reads_it(ray_job())["available_node_types"].items()
        if kind["max_workers"]
    }
    return {"cluster.yaml": aws, "kuberay.yaml": groups}


def as_rays_autoscaler_reads_it(job: dict[str, Any]) -> dict[str, Any]:
    """What Ray's autoscaler on Kubernetes makes of a RayJob's cluster; it validates it, too."""
    cluster = {"metadata": {"name": "salad", "namespace": "default"}, "spec": job["spec"]["rayClusterSpec"]}
    config: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(cluster)
    return config


def security_groups(config: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    kinds = config["available_node_types"].items()
    return {name: tuple(kind["node_config"].get("SecurityGroupIds", ())) for name, kind in kinds}


def as_rays_launcher_starts_it(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `ray up` makes of the file before it starts a machine; fails if Ray turns to AWS, as to make a group."""

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("Ray turns to AWS")

    for kind, name in ((boto3.Session, "client"), (boto3.Session, "resource"), (BaseClient, "_make_api_call")):
        monkeypatch.setattr(kind, name, refuse)
    monkeypatch.setattr(rays_aws, "_configure_subnet", lambda config: config)  # looks subnets up and makes nothing
    config = fillout_defaults(config)
    config["auth"]["ssh_private_key"] = "own.pem"  # else Ray would make a key pair
    for kind in config["available_node_types"].values():
        kind["node_config"]["KeyName"] = "own"
    started: dict[str, Any] = rays_aws.bootstrap_aws(config)
    return started


def demands(config: Config) -> dict[str, tuple[dict[str, float], int]]:
    """What an actor or worker of each step asks for, and how many there must be at once."""
    found = {}
    for step in pipeline.steps(config):
        gpus = gpus_of(config, step)
        found[f"{step.stage} {step.set}".strip()] = ({"CPU": 1.0} | ({"GPU": gpus} if gpus else {}), 1)
    settings = config.distill
    worker = {"CPU": float(settings.cpus_per_worker), "GPU": 1.0} | settings.extra_resources
    for stage in ("stage1", "stage2"):
        found[stage] = (worker, settings.most_workers)
    return found


def room(pool: dict[str, Any], wanted: dict[str, float]) -> int:
    """How many such actors a pool holds when it is as large as it may be."""
    each = min(math.floor(pool["resources"].get(name, 0) / number) for name, number in wanted.items() if number)
    return each * int(pool["most"])


def test_ray_accepts_the_file() -> None:
    config = fillout_defaults(cluster())
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("file", ["cluster.yaml", "kuberay.yaml"])
def test_no_stage_asks_for_what_no_pool_has(name: str, file: str) -> None:
    for step, (wanted, number) in demands(load_config(ROOT / "configs" / f"{name}.yaml")).items():
        most = sum(room(pool, wanted) for pool in pools()[file].values())
        assert most >= number, f"{step} asks {number} × {wanted}"


@pytest.mark.parametrize("name", CONFIGS)
def test_training_never_lands_on_spot_machines(name: str) -> None:
    wanted, _ = demands(load_config(ROOT / "configs" / f"{name}.yaml"))["stage1"]
    for file, kinds in pools().items():
        fitting = {kind for kind, pool in kinds.items() if room(pool, wanted)}
        assert fitting == {"training"}, file
    spot = cluster()["available_node_types"]
    assert "InstanceMarketOptions" not in spot["training"]["node_config"]
    assert spot["gpu_spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_but_training_lands_on_training_machines(name: str) -> None:
    steps = demands(load_config(ROOT / "configs" / f"{name}.yaml"))
    others = [wanted for step, (wanted, _) in steps.items() if step not in ("stage1", "stage2")]
    for file, kinds in pools().items():  # not even when the other pools are full
        assert not any(room(kinds["training"], wanted) for wanted in others), file


def test_nothing_is_open_to_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    config = cluster()
    named = security_groups(config)
    assert security_groups(as_rays_launcher_starts_it(config, monkeypatch)) == named
    assert len(set(named.values())) == 1  # the same for all: its machines reach each other
    assert all(groups and all(group.startswith("sg-") for group in groups) for groups in named.values())
    assert "security_group" not in config["provider"]  # Ray would pass over its rules
    guide = (ROOT / "docs" / "cluster.md").read_text()
    assert re.findall(r"authorize-security-group-ingress --group-id \$group (.+)", guide) == [
        "--protocol tcp --port 22 --cidr 203.0.113.7/32",
        "--protocol all --source-group $group",
    ]
    starts = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in starts
    assert "0.0.0.0" not in starts
    assert starts.count("RAY_AUTH_MODE=token") == 2
    spec = ray_job()["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_pools_begin_empty_and_the_head_computes_nothing() -> None:
    config = cluster()
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert all(kind.get("min_workers", 0) == 0 for kind in config["available_node_types"].values())
    spec = ray_job()["spec"]["rayClusterSpec"]
    assert spec["enableInTreeAutoscaling"]
    kinds = as_rays_autoscaler_reads_it(ray_job())
    assert kinds["available_node_types"]["headgroup"]["resources"]["CPU"] == 0
    assert all(kind["min_workers"] == 0 for kind in kinds["available_node_types"].values())
    assert kinds["idle_timeout_minutes"] == config["idle_timeout_minutes"]


def test_set_up_is_from_the_lock_and_the_versions_agree() -> None:
    assert any("locks/gpu.txt" in command for command in cluster()["setup_commands"])
    locked = next(line for line in (ROOT / "locks/gpu.txt").read_text().splitlines() if line.startswith("ray"))
    assert locked.endswith(f"=={ray_job()['spec']['rayClusterSpec']['rayVersion']}")


def test_the_job_runs_an_entry_point_that_exists() -> None:
    _, job, *arguments = ray_job()["spec"]["entrypoint"].split()
    assert (ROOT / job).is_file()
    assert (ROOT / arguments[arguments.index("--config") + 1]).is_file()
