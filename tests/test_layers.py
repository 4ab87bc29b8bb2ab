"""Who may import whom: config, flow, runs, tables, store, console ← pure rooms ← stages ← pipeline, cli ← jobs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BASE = {
    *("config", "configfile", "credentials", "flow", "names", "runs", "tables", "store"),
    *("s3", "console", "lease", "__init__"),
}  # fmt: skip
ON_RAY = {"distill.trainer", "distill.worker", "ray_private", "scaling.sweep"}
ON_DEEPSPEED = {"distill.engine"}
TOP = {"pipeline", "cli"}
HEAVY = {"ray", "deepspeed"}


def layer(module: str) -> int:
    """0 base, 1 pure room, 2 stages and what else runs on Ray or DeepSpeed, 3 pipeline and cli."""
    if module in BASE or module == "":
        return 0
    if module in TOP:
        return 3
    return 2 if module.startswith("stages") or module in ON_RAY | ON_DEEPSPEED else 1


def imports(path: Path, at_import: bool = False) -> Iterator[str]:
    """What a file imports; with `at_import` what it needs before it can be imported itself."""
    tree = ast.parse(path.read_text())
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules() -> list[str]:
    files = (ROOT / "salad_ray").rglob("*.py")
    return sorted(str(path.relative_to(ROOT / "salad_ray").with_suffix("")).replace("/", ".") for path in files)


def own_imports(module: str, at_import: bool = False) -> set[str]:
    path = ROOT / "salad_ray" / (module.replace(".", "/") + ".py")
    known = set(modules())
    names = {name.removeprefix("salad_ray.") for name in imports(path, at_import) if name.startswith("salad_ray.")}
    return {name for name in names if name in known}


def test_the_walk_sees_the_house() -> None:
    assert {"config", "distill.trainer", "stages.ingest", "sequences.interleave"} <= set(modules())
    assert "config" in own_imports("stages.ingest")
    assert layer("stages.ingest") == 2


@pytest.mark.parametrize("module", modules())
def test_no_module_imports_from_a_higher_layer(module: str) -> None:
    higher = {name for name in own_imports(module) if layer(name) > layer(module)}
    assert not higher, f"{module} may not import {higher}"


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that need each other, each module in its own set alone if there are none."""
    reached = {start: reachable(graph, start) for start in graph}
    return [{other for other in found if start in reached[other]} for start, found in reached.items()]


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found, ahead = set(), [start]
    while ahead:
        new = graph[ahead.pop()] - found
        found |= new
        ahead += new
    return found


def test_no_import_goes_in_a_circle() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [set(), {"b", "c"}, {"b", "c"}]  # as it should be seen
    own = {module: own_imports(module, at_import=True) - {module} for module in modules()}
    assert not [sorted(circle) for circle in circles(own) if circle]


RAYS_OWN = re.compile(r"\bray(?:\.\w+)*\._\w|\bray\.experimental\b|\b_internal_kv|\bfrom ray(?:\.\w+)* import _")


def test_rays_private_api_is_used_in_one_file() -> None:
    assert not RAYS_OWN.search("ray.data.range(1)._x; array._private")
    for name in ("ray._private.node", "from ray.train.v2._internal import x", "import ray.experimental.internal_kv"):
        assert RAYS_OWN.search(name)
    files = [path for folder in ("salad_ray", "jobs", "deploy", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in files if RAYS_OWN.search(path.read_text())] == ["ray_private.py"]


@pytest.mark.parametrize("module", [name for name in modules() if name.startswith("stages.")])
def test_stages_meet_only_through_tables(module: str) -> None:
    shared = {"stages.common", "stages.shards", "stages.ray_cluster", "stages.training"}
    others = {name for name in own_imports(module) if name.startswith("stages.")} - shared
    assert not others, f"{module} imports the stages {others}"


@pytest.mark.parametrize("module", [name for name in modules() if layer(name) < 2 or name in TOP])
def test_only_stages_and_trainers_know_ray(module: str) -> None:
    path = ROOT / "salad_ray" / (module.replace(".", "/") + ".py")
    assert not {name.split(".")[0] for name in imports(path)} & HEAVY


@pytest.mark.parametrize("module", sorted(ON_DEEPSPEED))
def test_the_engine_runs_without_ray(module: str) -> None:
    """Also through what it imports: benchmarks use it on machines that have no Ray."""
    seen, ahead = set(), {module}
    while ahead:
        name = ahead.pop()
        seen.add(name)
        found = {top.split(".")[0] for top in imports(ROOT / "salad_ray" / (name.replace(".", "/") + ".py"))}
        assert "ray" not in found, name
        ahead |= own_imports(name) - seen


def test_jobs_import_only_the_cli() -> None:
    for path in (ROOT / "jobs").glob("*.py"):
        assert {name for name in imports(path) if name.startswith("salad_ray")} <= {
            "salad_ray.cli",
            "salad_ray.cli.job",
        }


def test_nothing_reads_pickles_or_runs_remote_code() -> None:
    for path in (ROOT / "salad_ray").rglob("*.py"):
        found = {name for name in imports(path) if name.split(".")[0] in ("pickle", "dill", "joblib", "cloudpickle")}
        assert found in (set(), {"pickle", "pickle.UnpicklingError"}), path  # the error of torch.load does no harm
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), path
                assert node.value.value is False, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert settings.get("weights_only") == "True", path


def test_urls_are_opened_in_one_place() -> None:
    for path in (ROOT / "salad_ray").rglob("*.py"):
        calls = (ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        found = {call for call in calls if call.startswith("fsspec.")}
        assert not found or path.name == "store.py", (
            f"{path} calls {found}; take salad_ray.store.filesystem or open_file"
        )
