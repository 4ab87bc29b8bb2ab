"""cluster.yaml and deploy/kuberay.yaml: valid for Ray, closed to the world, with room for what the configs ask for."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import json
import math
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import ray
import yaml
from botocore.client import BaseClient
from clusters import RAY, Head, Node, head, node, wait_for
from moto import mock_aws
from ray._private import ray_constants
from ray.autoscaler._private.aws import config as rays_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import fillout_defaults, validate_config

from salad_ray import pipeline
from salad_ray.config import Config
from salad_ray.configfile import load_config
from salad_ray.scaling.rates import gpus_of
from salad_ray.stages.ray_cluster import require_gpus

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ("salad_3b", "salad_7b")


def cluster() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return content


def ray_job() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "kuberay.yaml").read_text())
    return content


def guide() -> str:
    return (ROOT / "docs" / "cluster.md").read_text()


def submitted() -> list[list[str]]:
    """Job and arguments of what is run on a cluster: the RayJob's entrypoint, every `ray job submit` of the guide."""
    lines = [line.strip() for line in guide().replace("\\\n", " ").splitlines()]
    own = [line.split(" -- ")[1] for line in lines if line.startswith("ray job submit ")]
    assert len(own) == 4
    return [shlex.split(command)[1:] for command in (ray_job()["spec"]["entrypoint"], *own)]


def whole_runs() -> list[list[str]]:
    return [job for job in submitted() if job[0] == "jobs/run.py"]


def config_of(job: list[str]) -> Config:
    at = job.index("--config")
    return load_config(ROOT / job[at + 1], [each for each in job[at + 2 :] if each != "--redo"])


def policy(name: str) -> list[dict[str, Any]]:
    statements: list[dict[str, Any]] = json.loads((ROOT / "deploy" / f"{name}.json").read_text())["Statement"]
    return statements


def actions(name: str) -> list[str]:
    allowed = [statement["Action"] for statement in policy(name)]
    return [action for some in allowed for action in ([some] if isinstance(some, str) else some)]


def test_set_up_is_from_the_lock_and_the_versions_agree() -> None:
    mounts = cluster()["file_mounts"]
    assert mounts["/home/ubuntu/lock.txt"] == "locks/gpu.txt"
    assert any("pip install" in each and "-r ~/lock.txt" in each for each in cluster()["setup_commands"])
    assert pins("gpu")["ray"] == ray_job()["spec"]["rayClusterSpec"]["rayVersion"]


def pins(lock: str) -> dict[str, str]:
    lines = (ROOT / "locks" / f"{lock}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines)


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
    assert re.findall(r"authorize-security-group-ingress --group-id \$group (.+)", guide()) == [
        "--protocol tcp --port 22 --cidr 203.0.113.7/32",
        "--protocol all --source-group $group",
    ]
    starts = " ".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in starts
    assert "0.0.0.0" not in starts
    assert starts.count("RAY_AUTH_MODE=token") == 2  # the head and the workers
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


def test_stages_may_grow_the_pools_which_begin_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", dict)
    assert len(whole_runs()) == 3
    for job in whole_runs():
        config = config_of(job)
        for step in pipeline.steps(config):
            gpus = gpus_of(config, step)
            require_gpus(config, step.stage, gpus)
            wanted = {"CPU": 1.0, "GPU": gpus}
            most = max(sum(room(pool, wanted) for pool in kinds.values()) for kinds in pools().values()) if gpus else 1
            assert config.ray.max_actors is not None, job
            assert config.ray.max_actors >= most, f"{step} would leave machines unused"


def test_the_rehearsals_start_one_machine_of_each_gpu_pool() -> None:
    measure, train = (job for job in submitted() if job not in whole_runs())
    assert measure[:2] == ["jobs/stage.py", "measure"]
    assert train[0] == "jobs/stage1.py"
    assert all("--redo" in job for job in (measure, train))  # else the first rehearsal would have done them
    config = config_of(measure)
    assert (config.ray.max_actors, config.measure.num_gpus) == (1, 1)
    wanted, number = demands(config_of(train))["stage1"]
    for kinds in pools().values():
        spot = [kind for kind, pool in kinds.items() if room(pool, {"CPU": 1, "GPU": 1})]
        assert [kind.replace("_", "-") for kind in spot] == ["gpu-spot"]
        assert [kind for kind, pool in kinds.items() if room(pool, wanted)] == ["training"]
        assert room(kinds["training"] | {"most": 1}, wanted) >= number


def test_what_is_submitted_is_there_and_writes_where_all_machines_reach() -> None:
    for job in submitted():
        assert (ROOT / job[0]).is_file()
        assert config_of(job).run_dir.startswith("s3://")


def test_after_the_guides_edits_nothing_is_left_to_change(tmp_path: Path) -> None:
    for name in ("configs", "deploy"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "cluster.yaml", tmp_path)
    edits = [line.strip() for line in guide().splitlines() if line.strip().startswith("perl -pi -e ")]
    own = {"bucket": "own-bucket", "account": "123456789012", "ami": "ami-0a", "group": "sg-0a"}
    own |= {"image": "images/salad_ray:1", "service_account": "salad"}
    subprocess.run(["bash", "-ec", "\n".join(edits)], cwd=tmp_path, env=own | {"PATH": "/usr/bin:/bin"}, check=True)

    def edited(file: str) -> Any:
        content = yaml.safe_load((tmp_path / file).read_text())
        assert "CHANGE-ME" not in str(content), file
        return content

    machine = edited("cluster.yaml")["available_node_types"]["cpu"]["node_config"]
    assert machine["IamInstanceProfile"]["Arn"] == "arn:aws:iam::123456789012:instance-profile/salad-worker"
    assert (machine["ImageId"], machine["SecurityGroupIds"]) == ("ami-0a", ["sg-0a"])
    assert edited("deploy/iam-head.json")["Statement"][-1]["Resource"] == "arn:aws:iam::123456789012:role/salad-worker"
    assert edited("deploy/iam-bucket.json")["Statement"][-1]["Resource"] == "arn:aws:s3:::own-bucket/*"
    assert "run_dir=s3://own-bucket/" in edited("deploy/kuberay.yaml")["spec"]["entrypoint"]
    assert edited("configs/salad_3b.yaml")
    corpora = load_config(tmp_path / "configs" / "salad_3b.yaml").ingest.corpora
    assert all(corpus.path.startswith("s3://own-bucket/") for corpus in corpora)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_benchmark_can_be_read_by_everyone(name: str) -> None:
    """The first stage reads all of them, to keep them out of the web text."""
    benchmarks = load_config(ROOT / "configs" / f"{name}.yaml").evaluate.benchmarks
    assert {benchmark.name for benchmark in benchmarks} == {
        *("openbookqa", "hellaswag", "arc_challenge", "piqa", "mmlu_spoken"),
        *("openbookqa_letters", "arc_challenge_letters", "voicebench_mmsu_letters"),
    }
    assert all(re.fullmatch(r"[\w-]+/[\w-]+", benchmark.path) for benchmark in benchmarks)


def test_the_heads_role_may_do_what_rays_autoscaler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set()
    call = BaseClient._make_api_call

    def record(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        asked.add(f"{client.meta.service_model.service_name}:{operation}")
        return call(client, operation, arguments)

    with mock_aws():
        ec2 = boto3.client("ec2", "us-east-1")
        machine = {"ImageId": ec2.describe_images()["Images"][0]["ImageId"], "InstanceType": "g6.12xlarge"}
        machine |= {"SubnetIds": [ec2.describe_subnets()["Subnets"][0]["SubnetId"]]}
        machine |= {"InstanceMarketOptions": {"MarketType": "spot"}}
        monkeypatch.setattr(BaseClient, "_make_api_call", record)
        provider = AWSNodeProvider(cluster()["provider"], cluster()["cluster_name"])
        provider.create_node(machine, {"ray-node-kind": "worker"}, 1)
        [node] = provider.non_terminated_nodes({})
        provider.set_node_tags(node, {"ray-node-status": "up-to-date"})
        provider.internal_ip(node)
        provider.terminate_nodes([node])
        assert provider.non_terminated_nodes({}) == []
    assert {"ec2:RunInstances", "ec2:CreateTags", "ec2:TerminateInstances"} <= asked
    allowed = actions("iam-head")
    assert [each for each in asked if not any(fnmatch.fnmatchcase(each, action) for action in allowed)] == []
    owned = [
        each["Condition"]["StringEquals"] for each in policy("iam-head") if "ec2:TerminateInstances" in each["Action"]
    ]
    assert owned == [{"aws:ResourceTag/ray-cluster-name": cluster()["cluster_name"]}]


def test_the_buckets_policy_is_what_the_guide_says() -> None:
    assert set(actions("iam-bucket")) == set(re.findall(r"`(s3:\w+)`", guide()))


def test_what_machines_get_is_two_files_and_a_token_that_only_its_owner_reads() -> None:
    mounts = cluster()["file_mounts"]
    assert mounts == {
        "/home/ubuntu/lock.txt": "locks/gpu.txt",  # a folder would be read as a whole before every `ray up`
        "/home/ubuntu/spot_notice.py": "deploy/spot_notice.py",
        "/home/ubuntu/.ray/auth_token": "~/.ray/auth_token",
    }
    assert "chmod 600 ~/.ray/auth_token" in cluster()["setup_commands"]
    [made] = [line for line in guide().splitlines() if "openssl rand" in line]
    assert "umask 077" in made
    assert "~/.ray/auth_token" in made


def test_gpu_pools_of_kubernetes_are_let_onto_tainted_machines() -> None:
    for group in ray_job()["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        if "nvidia.com/gpu" in spec["containers"][0]["resources"]["requests"]:
            assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]


def test_the_image_holds_what_the_job_needs() -> None:
    lines = (ROOT / "deploy" / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert {"locks/gpu.txt", "pyproject.toml", "README.md", "LICENSE", "salad_ray", "jobs", "configs"} == set(copied)
    assert all((ROOT / name).exists() for name in copied)
    assert "WORKDIR /app" in lines
    assert (
        ray_job()["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["workingDir"]
        == "/app"
    )


def test_clusters_install_what_ray_needs_there_and_nothing_of_development() -> None:
    gpu, cpu = pins("gpu"), pins("cpu")
    assert "boto3" in gpu  # the head's autoscaler starts machines by it
    assert not {"pytest", "moto", "playwright", "flask", "mypy", "ruff", "hypothesis", "liger-kernel"} & set(gpu)
    assert {name: gpu[name] for name in gpu.keys() & cpu.keys()} == {
        name: cpu[name] for name in gpu.keys() & cpu.keys()
    }


def test_the_guides_costs_are_the_plans(tmp_path: Path) -> None:
    prices = re.findall(r"^ +((?:cpu|gpu|spot_gpu)_hour: [\d.]+)", guide(), re.MULTILINE)
    assert len(prices) == 3
    rates = (ROOT / "salad_ray" / "scaling" / "rates.yaml").read_text()
    for price in prices:
        rates, found = re.subn(rf"^  {price.split(':')[0]}: [\d.]+", f"  {price}", rates, flags=re.MULTILINE)
        assert found == 1
    (tmp_path / "mine.yaml").write_text(rates)
    overrides = [f"run_dir={tmp_path}", "distill.num_workers=8"]
    config = load_config(ROOT / "configs" / "salad_3b.yaml", overrides)
    pipeline.show_plan(config, str(tmp_path / "mine.yaml"), None, False)
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    stage1 = sum(cost["money"] for cost in plan["stages"] if cost["stage"] in ("trunk", "stage1"))
    said = re.search(r"([\d,]+) USD of compute: ([\d,]+) for\s+training in Stage I", guide())
    assert said is not None
    for number, reckoned in zip(said.groups(), (plan["totals"]["compute"], stage1), strict=True):
        assert float(number.replace(",", "")) == pytest.approx(reckoned, rel=0.05)


KEYS = {
    "pod": """activeDeadlineSeconds affinity automountServiceAccountToken dnsConfig dnsPolicy enableServiceLinks
        ephemeralContainers hostAliases hostIPC hostNetwork hostPID hostUsers hostname imagePullSecrets initContainers
        nodeName os overhead preemptionPolicy priority priorityClassName readinessGates resourceClaims restartPolicy
        runtimeClassName schedulerName schedulingGates securityContext setHostnameAsFQDN shareProcessNamespace subdomain
        topologySpreadConstraints""",
    "container": """args command envFrom imagePullPolicy lifecycle livenessProbe ports readinessProbe resizePolicy
        restartPolicy securityContext startupProbe stdin stdinOnce terminationMessagePath terminationMessagePolicy tty
        volumeDevices""",
    "group": "labels resources",
    "cluster": "gcsFaultToleranceOptions headServiceAnnotations managedBy suspend upgradeStrategy",
    "job": """activeDeadlineSeconds clusterSelector deletionStrategy entrypointNumCpus entrypointNumGpus
        entrypointResources jobId managedBy metadata preRunningDeadlineSeconds runtimeEnvYAML submitterConfig
        submitterPodTemplate suspend""",
}
"""Keys that the file does not use, so that their values are not looked at."""


def others(of: str) -> dict[str, Any]:
    return dict.fromkeys(KEYS[of].split(), object)


TEXTS = {"*": str}
CONTAINER = others("container") | {
    "name": str,
    "image": str,
    "workingDir": str,
    "env": [{"name": str, "value": str, "valueFrom": dict}],
    "resources": {"requests": TEXTS, "limits": TEXTS, "claims": list},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool, "subPath": str}],
}
POD = others("pod") | {
    "serviceAccountName": str,
    "terminationGracePeriodSeconds": int,
    "nodeSelector": TEXTS,
    "tolerations": [
        {
            "key": str,
            "value": str,
            "operator": {"Exists", "Equal"},
            "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
            "tolerationSeconds": int,
        }
    ],
    "containers": [CONTAINER],
    "volumes": [{"name": str, "emptyDir": {"medium": {"", "Memory"}, "sizeLimit": str}, "persistentVolumeClaim": dict}],
}
GROUP = others("group") | {"rayStartParams": TEXTS, "template": {"metadata": dict, "spec": POD}}
HEAD_GROUP = GROUP | {
    "serviceType": {"ClusterIP", "NodePort", "LoadBalancer", "ExternalName"},
    "headService": dict,
    "enableIngress": bool,
}
WORKER_GROUP = GROUP | {
    "groupName": str,
    **dict.fromkeys(("replicas", "minReplicas", "maxReplicas", "numOfHosts", "idleTimeoutSeconds"), int),
    "scaleStrategy": dict,
    "suspend": bool,
}
RAY_CLUSTER = others("cluster") | {
    "rayVersion": str,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {
        "version": {"v1", "v2"},
        "idleTimeoutSeconds": int,
        "upscalingMode": {"Default", "Aggressive", "Conservative"},
        **dict.fromkeys(("image", "imagePullPolicy"), str),
        **dict.fromkeys(("resources", "securityContext", "env", "envFrom", "volumeMounts"), object),
    },
    "authOptions": {"mode": {"disabled", "token"}, "secretName": str, "enableK8sTokenAuth": bool},
    "headGroupSpec": HEAD_GROUP,
    "workerGroupSpecs": [WORKER_GROUP],
}
RAY_JOB = {
    "apiVersion": {"ray.io/v1"},
    "kind": {"RayJob"},
    "metadata": dict,
    "spec": others("job")
    | {
        "entrypoint": str,
        "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "backoffLimit": int,
        "rayClusterSpec": RAY_CLUSTER,
    },
}
"""What KubeRay 1.6.2's resource definitions (docs/reference/api.md) and Kubernetes 1.28's core/v1 know.

A key or a value that is not here may still be one of theirs: look it up before it is added.
"""


def faults(content: Any, known: Any, place: str = "") -> list[str]:
    """Places whose key, value or type is not a known one; "*" stands for any key."""
    if isinstance(known, set):
        return [] if any(content == each for each in known) else [place]
    if isinstance(known, type):
        return [] if isinstance(content, known) and (known is object or type(content) is known) else [place]
    if not isinstance(content, type(known)):
        return [place]
    if isinstance(known, list):
        pairs = [(f"{place}[{at}]", each, known[0]) for at, each in enumerate(content)]
    else:
        pairs = [(f"{place}.{key}", each, known.get(key, known.get("*", set()))) for key, each in content.items()]
    return [fault for where, each, of in pairs for fault in faults(each, of, where)]


def test_every_key_of_the_ray_job_is_one_that_kuberay_and_kubernetes_know() -> None:
    assert faults(ray_job(), RAY_JOB) == []


CPU_GROUP = "spec.rayClusterSpec.workerGroupSpecs.0"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("spec.backofLimit", 3),
        ("spec.backoffLimit", "3"),
        ("spec.submissionMode", "K8sJob"),
        ("spec.rayClusterSpec.autoscalerOptions.version", "v3"),
        ("spec.rayClusterSpec.authOption", {"mode": "token"}),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        (f"{CPU_GROUP}.maxReplica", 16),
        (f"{CPU_GROUP}.template.spec.serviceAcountName", "mine"),
        (f"{CPU_GROUP}.template.spec.tolerations", [{"key": "spot", "operator": "Exist"}]),
        (f"{CPU_GROUP}.template.spec.containers.0.resource", {}),
    ],
)
def test_a_key_or_value_that_nobody_knows_is_seen(place: str, value: Any) -> None:
    job = copy.deepcopy(ray_job())
    *path, key = place.split(".")
    section: Any = job
    for each in path:
        section = section[int(each) if each.isdigit() else each]
    section[key] = value
    found = faults(job, RAY_JOB)
    assert len(found) == 1
    assert key in found[0]


def test_pods_have_the_time_that_ray_takes_to_drain_their_nodes() -> None:
    for group in ray_job()["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        [drain] = spec["containers"][0]["env"]
        assert drain["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
        assert hasattr(ray_constants, drain["name"])
        grace = spec.get("terminationGracePeriodSeconds", 30)  # Kubernetes' own
        assert 0 < int(drain["value"]) < grace <= 120  # AWS says it 120 s before
        assert group["groupName"] == "cpu" or int(drain["value"]) >= 60


class Metadata(ThreadingHTTPServer):
    """A machine's metadata service, which gives nothing without a token of its own."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.asked, self.notice = 0, ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        has_ttl = self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200 if self.path == "/latest/api/token" and has_ttl else 400, "a-token")

    def do_GET(self) -> None:
        if self.headers["X-aws-ec2-metadata-token"] != "a-token":
            self.answer(401)
        elif self.path == "/latest/meta-data/spot/instance-action" and self.server.notice:
            self.answer(200, self.server.notice)
        else:
            self.server.asked += 1
            self.answer(404)

    def answer(self, status: int, body: str = "") -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with Metadata() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def rays_head() -> Iterator[Head]:
    with head("--num-cpus=0") as each:
        yield each


class Machine:
    """A worker's home, where `ray up` has put its files; `ray start` is done already, and `hostname` is the node's."""

    def __init__(self, home: Path, cluster: Head, own: Node, metadata: Metadata) -> None:
        self.home, self.mark = home, secrets.token_hex(8)
        self.env = cluster.env | {"HOME": str(home), "RAY_ADDRESS": f"127.0.0.1:{cluster.port}", "MACHINE": self.mark}
        self.env |= {"AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url, "http_proxy": "http://127.0.0.1:9"}
        (home / "venv" / "bin").mkdir(parents=True)
        self.program("python", f'exec {sys.executable} "$@"')
        self.program("hostname", f"echo {own.name}")
        self.ray_starts(True)
        for path, source in cluster_files(cluster).items():
            (home / path).parent.mkdir(exist_ok=True)
            shutil.copy(source, home / path)

    def ray_starts(self, well: bool) -> None:
        drains = f'[ "$1" = drain-node ] && exec {shlex.join(RAY)} "$@"'
        self.program("ray", drains, f"exit {0 if well else 1}")

    def program(self, name: str, *lines: str) -> None:
        path = self.home / "venv" / "bin" / name
        path.write_text("\n".join(["#!/bin/sh", *lines]))
        path.chmod(0o755)

    def start(self) -> int:
        """Run the line that starts Ray, as Ray's updater does by SSH: until all that holds the output has ended."""
        line = " ".join(_with_interactive(cluster()["worker_start_ray_commands"][-1]))
        return subprocess.run(["bash", "-c", line], env=self.env, capture_output=True, timeout=60).returncode

    def watching(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                own = process.environ().get("MACHINE") == self.mark and "spot_notice.py" in " ".join(process.cmdline())
                if own and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def log(self) -> str:
        return (self.home / "spot_notice.log").read_text()


def cluster_files(cluster: Head) -> dict[str, Path]:
    return {
        "spot_notice.py": ROOT / "deploy/spot_notice.py",
        ".ray/auth_token": Path(cluster.env["RAY_AUTH_TOKEN_PATH"]),
    }


def message(cluster: Head, own: Node) -> str:
    """What Ray says of a node's state; "" while there is nothing to say."""
    [row] = [row for row in cluster.state("nodes") if row["node_name"] == own.name]
    return row["state_message"] or ""


@pytest.mark.slow
def test_ray_hears_of_the_notice_that_a_spot_machine_gets(rays_head: Head, metadata: Metadata, tmp_path: Path) -> None:
    with node(rays_head, "--num-cpus=1") as own:
        machine = Machine(tmp_path, rays_head, own, metadata)
        machine.ray_starts(False)
        assert machine.start() == 1
        assert machine.watching() == []  # nor is a Ray that could not start taken for one that has
        machine.ray_starts(True)
        try:
            assert [machine.start(), machine.start()] == [0, 0]
            wait_for(lambda: metadata.asked and len(machine.watching()) == 1, "the second one's end", 60)
            assert message(rays_head, own) == ""
            soon = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 120))
            metadata.notice = json.dumps({"action": "terminate", "time": soon})
            wait_for(lambda: not machine.watching(), "the notice", 60)
            wait_for(lambda: message(rays_head, own), "Ray's word", 60)
        finally:
            for process in machine.watching():
                process.kill()
        assert f"AWS: terminate at {soon}" in message(rays_head, own), machine.log()


@pytest.mark.slow
def test_a_node_whose_pod_is_told_to_end_drains_first(rays_head: Head) -> None:
    with node(rays_head, "--num-cpus=1") as own:
        own.process.terminate()
        own.process.wait(60)
        wait_for(lambda: message(rays_head, own), "Ray's word", 60)
        assert "draining" in message(rays_head, own)
