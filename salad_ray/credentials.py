"""Credentials: what they look like, so that none gets into a config, a log or a report."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NoReturn

from salad_ray.config import ConfigError

# What a credential looks like: before a URL's host (`https://token@…` too; fsspec's github:// has a repository there),
# in a query (signed URLs, with or without their host), in a header, given to a name, or by its own shape. What comes
# before it is `keep`. None of them may take quadratic time, since they see what strangers wrote.
_SECRETS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?i)(?P<keep>https?://)[^/?#\s]*(?=@)",
        r"(?i)(?P<keep>(?<!github)://)[^/?#\s:]*:[^/?#\s]*(?=@)",
        r"(?i)(?P<keep>[?&][\w.%;-]*(sig|signature|credentials?|auth|token|secret|passw(or)?d|pwd|key|accessid)=)"
        r"[^&#\s'\"<>)]*",
        r"(?i)(?P<keep>\b(authorization['\"]?\s*[:=]\s*['\"]?[a-z]+|bearer)\s+)[\w.~+/=-]{16,}",
        r"(?i)(?P<keep>(?<![\w-])[\w-]*(passw(or)?d|pwd|(api|access|account|secret)[_-]?key|client[_-]?secret|"
        r"(access|auth|session|security)[_-]?token)['\"]?\s*[=:]\s*)('[^'\n]*'|\"[^\"\n]*\"|['\"]?[^\s'\",;&)}\]]+)",
        r"\b(?P<keep>hf_|gh[oprsu]_)[A-Za-z0-9]{20,}",
        r"\b(?P<keep>github_pat_|glpat-|sk-proj-|sk-ant-|xox[abeprs]-)[\w-]{20,}",
        r"\b(?P<keep>AKIA|ASIA)[A-Z0-9]{16}\b|\bdapi[0-9a-f]{32}\b",
        r"(?<![\w-])(?P<keep>eyJ)[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+",  # JSON web tokens
    )
)
_SECRET_KEY = re.compile(
    r"(^|_)(tokens?|secret.*|passw(or)?ds?|passphrase|pwd|credentials?|(api|access)keys?)$|_keys?$"
)


def holds_secret(text: str) -> bool:
    """Whether it has in it what a credential looks like."""
    return any(pattern.search(text) for pattern in _SECRETS)


def redact(text: str) -> str:
    """The text with `***` for what a credential looks like: errors of libraries repeat signed URLs and headers."""
    for pattern in _SECRETS:
        text = pattern.sub(r"\g<keep>***", text)
    return text


def _names_secret(key: str) -> bool:
    """Whether a (dotted) key is called what credentials are called: `hf_token`, `storage.accessKey`."""
    leaf = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key.rpartition(".")[2])
    return _SECRET_KEY.search(leaf.replace("-", "_").lower()) is not None


def refuse_secrets(value: Any, where: str, key: str = "") -> None:
    """Raises `ConfigError` for a value or key that holds a credential, looking into lists and mappings; never repeats
    it.

    The config is copied into run_dir, manifests, reports, exported models and trackers. None of them has to be searched
    for secrets, as none gets in.

    Args:
        where: what the value was read from.
        key: (dotted) of the value there.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            within = f"{key}.{name}" if key else str(name)
            if holds_secret(str(name)):
                _refuse(where, f"a key ('{redact(within)}')")
            refuse_secrets(item, where, within)
    elif isinstance(value, list | tuple):
        for item in value:
            refuse_secrets(item, where, key)
    elif isinstance(value, str) and (_names_secret(key) or holds_secret(value)):
        _refuse(where, f"'{redact(key)}'")


def _refuse(where: str, what: str) -> NoReturn:
    raise ConfigError(
        f"{redact(where)}: {what} holds a credential (a password, a token, a signed URL), which would end in logs and "
        "reports; take it out, and give it by the environment (HF_TOKEN, AWS_PROFILE, …) or the machine's role"
    )


def refuse_secret_arguments(arguments: Iterable[str]) -> None:
    """`refuse_secrets` for what stands on a command line, `key=value` or not."""
    for argument in arguments:
        found = re.match(r"-*([A-Za-z][\w.-]*)=", argument)
        refuse_secrets(argument, "command line", found[1] if found else "an argument")
