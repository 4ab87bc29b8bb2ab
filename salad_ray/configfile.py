"""Reading and writing configs: YAML plus `key=value`, checked as a whole, credentials refused."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from salad_ray.config import RESOLVE, Config, ConfigError, all_keys
from salad_ray.credentials import refuse_secret_arguments, refuse_secrets
from salad_ray.store import open_file


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides, and validate the whole.

    Args:
        path: YAML file; its stem names the default `run_dir`.
        overrides: strings such as `distill.alpha=0`; the value is read as YAML.

    Raises:
        ConfigError: with one sentence naming the file or override, the key, the value and the remedy.
    """
    refuse_secret_arguments([str(path), *overrides])
    data = read_mapping(str(path), "config file", "configs/quickstart.yaml is the one to start from")
    for override in overrides:
        _apply_override(data, override)
    data["run_dir"] = data.get("run_dir") or f"runs/{Path(path).stem}"
    return parse_config(data, source=str(path), resolve=True)


def parse_config(data: dict[str, Any], source: str = "config", resolve: bool = False) -> Config:
    """Validate a nested dictionary; raises `ConfigError`.

    Args:
        source: what it is called in errors.
        resolve: make relative paths absolute.
    """
    refuse_secrets(data, source)  # first: other errors name the value
    try:
        return Config.model_validate_json(json.dumps(data), strict=True, context={RESOLVE: resolve})
    except ValidationError as error:
        known, remedy = all_keys(Config), "see `salad run --help` for the keys"
        told = "; ".join(explain(item, known, remedy) for item in error.errors())
        raise ConfigError(f"{source}: {told}") from None
    except TypeError as error:
        raise ConfigError(f"{source}: {error}; use plain numbers, words, lists and mappings") from None


def replaced(config: Config, values: Mapping[str, Any], source: str = "config") -> Config:
    """The config with other values of some (dotted) keys; raises `ConfigError`."""
    data = config.model_dump(mode="json")
    for key, value in values.items():
        _set(data, key, value, f"{source}: '{key}'")
    return parse_config(data, source)


def _set(data: dict[str, Any], key: str, value: Any, where: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        data[parent] = {} if data.get(parent) is None else data[parent]
        data = data[parent]
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: '{parent}' is a value, not a section")
    data[last] = value


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back unchanged."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1, where `5e-5` is a string; this one reads it as the number it is in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"), list("-+0123456789.")
)


def read_mapping(path: str, what: str, remedy: str) -> dict[str, Any]:
    """The keys and values of a YAML file, none of an empty one; raises `ConfigError`."""
    try:
        with open_file(path, "r", encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {what}; {remedy}") from None
    except (OSError, ImportError, ValueError) as error:  # of a URL also a protocol that is not known or not installed
        raise ConfigError(f"{path}: cannot be read as a {what} ({error}); {remedy}") from None
    data = _parse_yaml(text, path)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: holds a {type(data).__name__}, but a {what} is a mapping of keys to values; {remedy}"
        )
    return data


def _parse_yaml(text: str, source: str, remedy: str = "") -> Any:
    """Plain data; the `ConfigError` of what is not YAML repeats nothing of the text, which may be a credential."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark and not remedy else ""
        told = error.problem or error.context or "it cannot be parsed"
        problem = re.sub(r" (['\"])(?!<)\S{2,}\1$", "", told)  # a name or tag; `'<scalar>'` is YAML's own word
        raise ConfigError(f"{source}: not valid YAML{place}: {problem}{remedy}") from None
    except (yaml.YAMLError, ValueError):  # of a character, or of a date such as 2024-99-99
        raise ConfigError(f"{source}: not valid YAML: a character or value in it cannot be read{remedy}") from None


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override '{override}' is not of the form key=value, for example distill.alpha=0.5")
    where = f"override of '{key}'"
    _set(data, key, _parse_yaml(value, where, "; quote the value"), where)


def explain(error: Any, known: Sequence[str], remedy: str) -> str:
    """One clause for one pydantic error: key, value, what is wrong, what to do.

    The value of a key that nobody knows is left out, since it may be a credential under a name that does not say so.
    """
    key = ".".join(str(part) for part in error["loc"] if part != "int" and "[" not in str(part))  # a union names kinds
    if error["type"] == "extra_forbidden":
        return unknown_key(key, known, remedy)
    if error["type"] == "missing":
        return f"'{key}' is missing; {remedy}"
    if error["type"] == "value_error":
        told = str(error["ctx"]["error"])
        return told if isinstance(error["input"], dict) else f"{key}={_shown(error['input'])} {told}"  # of one key
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"'{key}' is {_shown(error['input'])}: {message}"


def unknown_key(key: str, known: Sequence[str], remedy: str) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6) or _same_leaf(key, known)
    return f"unknown key '{key}'; " + (f"did you mean '{near[0]}'?" if near else remedy)


def _shown(value: Any) -> str:
    """A value as an error names it, without what is in a mapping: its keys may be known to nobody."""
    if isinstance(value, list):
        return f"[{', '.join(_shown(item) for item in value)}]"
    return "a mapping" if isinstance(value, dict) else repr(value)


def _same_leaf(key: str, known: Sequence[str]) -> list[str]:
    leaf = key.rsplit(".", 1)[-1]
    leaves = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}  # the first of a name wins
    return [leaves[match] for match in difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.75)]
