"""What all loaders of pretrained weights share: every weight accounted for, and failures in one sentence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What transformers and its parsers raise for a folder, hub id or setting that cannot be used, and torch for a pickle.
UNUSABLE = (
    OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError, StrictDataclassError,
    UnpicklingError,
)  # fmt: skip


class ModelError(ValueError):
    """A model, tokenizer or folder that cannot be used; the message is one sentence for the user."""


def require_readable(path: str, example: str) -> None:
    """A hub id such as `example`, or a folder with a config; raises `ModelError`.

    Transformers would take a mistyped path for a hub id.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        raise ModelError(f"{path}: is a file; give the folder that holds it")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{path}: holds no config.json, so it is not a Hugging Face model folder")
    elif not is_hub_id(path):
        raise ModelError(f"{path}: no such folder; give a folder or a hub id such as {example}")


def is_hub_id(path: str) -> bool:
    """Whether something that is not on this disk can be the name of a hub repository."""
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))


def hub_commit(path: str, revision: str | None) -> str | None:
    """The commit that a revision (none: the main branch) of a hub id stands for now.

    To know what was loaded, load this one: transformers keeps no note of it. None for a folder, and where neither the
    hub nor its cache answers, which loading itself will say better.
    """
    if Path(path).expanduser().is_dir():
        return None
    from transformers.utils.hub import resolve_revision  # not in 5.17, with which folders can be loaded

    return getattr(resolve_revision(path, revision), "resolved", None)


def load_pretrained(
    kind: Any, path: str, revision: str | None, what: str, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """A transformers model and what loading says of its weights (`require_whole`); safetensors only, no remote code.

    Raises:
        ModelError: it cannot be read, had, or built.
    """
    try:
        with quiet():
            return kind.from_pretrained(
                path,
                revision=revision,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they come back beside the model, all of them
                output_loading_info=True,
                **settings,
            )
    except UNUSABLE as error:
        raise ModelError(f"{path}: cannot be loaded as {what} ({reason(error)})") from None


def require_whole(path: str, info: Mapping[str, Any]) -> None:
    """Refuse weights that do not fit their model.

    Args:
        info: `missing_keys` and `unexpected_keys`, names; `mismatched_keys`, (name, found shape, needed shape): what
            `from_pretrained(…, ignore_mismatched_sizes=True, output_loading_info=True)` returns beside the model.

    Raises:
        ModelError: any of them is not empty.
    """
    shapes = [f"{name} {tuple(found)} instead of {tuple(needed)}" for name, found, needed in info["mismatched_keys"]]
    problems = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"], "of another shape": shapes}
    found = [f"{len(names)} {kind}: {_listed(sorted(names))}" for kind, names in problems.items() if names]
    if found:
        raise ModelError(f"{path}: its weights do not fit its config: {'; '.join(found)}")


def require_finite(path: str, model: nn.Module) -> None:
    """Refuse weights that hold NaN or infinity; raises `ModelError`."""
    bad = [name for name, weight in model.named_parameters() if not torch.isfinite(weight.detach().abs().amax())]
    if bad:
        raise ModelError(f"{path}: {len(bad)} of its weights hold values that are not finite: {_listed(sorted(bad))}")


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and reports: what matters of them is raised."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def reason(error: BaseException) -> str:
    """The first sentence of an error, on one line."""
    text = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return text[:300] or type(error).__name__


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes, types and bytes of all weights: equal if and only if they are bit-identical."""
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        digests = pool.map(_tensor_digest, sorted(model.state_dict().items()))
        return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def _tensor_digest(item: tuple[str, Tensor]) -> bytes:
    name, tensor = item
    digest = hashlib.sha256(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    digest.update(data)
    return digest.digest()


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of everything that decides a fast tokenizer's output."""
    return hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=8).hexdigest()


HARD_TEXTS = (
    "Hello world, don't we'll I'M HERE: 12345 67 (\"quoted\") and so on.",
    "  two  spaces\n\n\tand tabs \n",
    "naïve café cafe\u0301 你好\uff0c世界 Привет مرحبا — “OK”… 😀",
    "x=1;\ny += 2.50 # $3,000.75 3rd 1812³ don’t CamelCase http://a.b/c?d=1",
    "a",
)
"""Where tokenizers differ: digits, contractions, spaces, composed letters, other scripts."""


def load_tokenizer(path: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a text LLM, which makes the ids that its tokenizer.json says.

    Transformers takes the class from other files, and some classes put a splitting of their own in the place of the
    file's, or cannot be built from it. Where ids differ, or the class fails, the file is loaded as it is.

    Raises:
        ModelError: there is none, its ids cannot be had, or its files contradict each other about BOS.
    """
    require_readable(path, "Qwen/Qwen2.5-3B")
    own = _tokenizer_of_file(path, revision)
    try:
        tokenizer = _tokenizer(transformers.AutoTokenizer, path, revision, use_fast=True)
    except ModelError:
        if own is None:
            raise
        tokenizer = _tokenizer(transformers.PreTrainedTokenizerFast, path, revision)
    if not tokenizer.is_fast:
        raise ModelError(f"{path}: its tokenizer gives no character offsets; add a fast tokenizer (tokenizer.json)")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up where there are no files
        raise ModelError(f"{path}: holds no tokenizer; save one there with tokenizer.save_pretrained")
    if own is None:
        return tokenizer
    if not _follows(tokenizer, own):
        tokenizer = _tokenizer(transformers.PreTrainedTokenizerFast, path, revision)
    if differ := _differing(tokenizer, own):
        raise ModelError(
            f"{path}: its tokenizer, loaded as {type(tokenizer).__name__}, makes other ids of {differ[0]!r} than its "
            "tokenizer.json; save both anew with tokenizer.save_pretrained"
        )
    promised = _promises_bos(path, revision)
    if promised and tokenizer.bos_token_id is None:
        raise ModelError(
            f"{path}: its tokenizer_config.json says add_bos_token, but names no bos_token; correct one of them"
        )
    if promised and tokenizer.bos_token_id not in tokenizer("a")["input_ids"]:
        raise ModelError(
            f"{path}: its tokenizer_config.json says add_bos_token, but its tokenizer.json adds no BOS; correct one of "
            "them"
        )
    return tokenizer


def _tokenizer(kind: Any, path: str, revision: str | None, **settings: Any) -> Any:
    try:
        with quiet():
            return kind.from_pretrained(path, revision=revision, trust_remote_code=False, **settings)
    except (*UNUSABLE, AttributeError, UnboundLocalError) as error:  # some classes fail on another's vocabulary
        raise ModelError(f"{path}: its tokenizer cannot be loaded ({reason(error)})") from None


def _follows(tokenizer: PreTrainedTokenizerBase, own: Tokenizer) -> bool:
    try:
        found = _behaviour(tokenizer.backend_tokenizer)
    except Exception:  # noqa: BLE001 - such as "Unk token <unk> not found", which the class has put in place of the file's
        return False
    return found == _behaviour(own) and not _differing(tokenizer, own)


def _differing(tokenizer: PreTrainedTokenizerBase, own: Tokenizer) -> list[str]:
    """Texts of which a tokenizer makes other ids than its tokenizer.json: hard ones, and what was added to it."""
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    unused = {tokenizer.pad_token} - used  # no text has it, and padding is masked
    texts = [*HARD_TEXTS, *(f"a {token} b" for token in sorted(tokenizer.get_added_vocab().keys() - unused))]
    ids = zip(texts, tokenizer(texts, verbose=False)["input_ids"], own.encode_batch(texts), strict=True)
    return [text for text, found, wanted in ids if found != wanted.ids]


def _promises_bos(path: str, revision: str | None) -> bool:
    """Whether tokenizer_config.json says so; transformers forgets it."""
    file = cached_file(path, "tokenizer_config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    return file is not None and json.loads(Path(file).read_text(encoding="utf-8")).get("add_bos_token") is True


def _tokenizer_of_file(path: str, revision: str | None) -> Tokenizer | None:
    """What tokenizer.json itself says, without truncation and padding; none where there is no such file."""
    file = cached_file(path, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - the library raises nothing narrower
        raise ModelError(f"{path}: its tokenizer cannot be loaded (tokenizer.json: {reason(error)})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _behaviour(tokenizer: Tokenizer) -> tuple[object, ...]:
    """How a tokenizer reads texts: its steps before the model, and the ids of hard texts, special tokens included."""
    content = json.loads(tokenizer.to_str())
    return content["normalizer"], content["pre_tokenizer"], [tokenizer.encode(text).ids for text in HARD_TEXTS]
