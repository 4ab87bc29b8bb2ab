"""Decontamination: which passages share a run of 13 words with an item of a benchmark, or with what is measured.

As for GPT-3 (Brown et al. 2020, appendix C) and in lm-evaluation-harness, words are compared in lower case and without
punctuation. A run is known by a 64-bit hash; should two different runs agree, which among 10^6 of benchmarks and 10^10
of passages has a probability of about 1 in 1,000, a passage is left out for nothing.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from salad_ray.config import ConfigError
from salad_ray.text.documents import read_whole

MIN_WORDS = 8
"""Shorter items are ignored: they are found in any large text, by chance."""
_ENDS = (".jsonl", ".json", ".csv", ".tsv")
_DASHES = re.compile(r"--+|[–—]")
_MARKS = re.compile(r"[^\w\s]|_")
# Odd, so it can be inverted modulo 2^64, and 5 modulo 8, so that its powers differ in their low bits.
_BASE = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class NGrams:
    """Runs of words of texts, by their length: that asked for, and those of whole texts that are shorter.

    `hashes`: length in words → uint64 (number of runs,), sorted.
    """

    n: int
    hashes: dict[int, np.ndarray]

    def __len__(self) -> int:
        return sum(map(len, self.hashes.values()))

    def to_arrow(self) -> pa.Table:
        lengths = [np.full(len(hashes), length, np.int64) for length, hashes in self.hashes.items()]
        both = {
            "length": np.concatenate([np.empty(0, np.int64), *lengths]),
            "hash": np.concatenate([np.empty(0, np.uint64), *self.hashes.values()]),
        }
        return pa.table(both)

    @classmethod
    def of(cls, n: int, table: pa.Table) -> NGrams:
        """From what `to_arrow` made of parts of the texts."""
        lengths, hashes = table["length"].to_numpy(), table["hash"].to_numpy()
        found = sorted(set(lengths.tolist()), reverse=True)
        return cls(n, {length: np.unique(hashes[lengths == length]) for length in found})


def word_ngrams(texts: Iterable[str], n: int = 13, min_words: int = MIN_WORDS) -> NGrams:
    """All runs of `n` words of the texts, and whole texts of `min_words` to n − 1 words; shorter texts are ignored."""
    runs: dict[int, list[np.ndarray]] = defaultdict(list)
    for text in texts:
        words = normalized_words(text)
        length = min(n, len(words))
        if length >= min_words:
            runs[length].append(_run_hashes(_prefixes(words), length))
    return NGrams(n, {length: np.unique(np.concatenate(runs[length])) for length in sorted(runs, reverse=True)})


def contaminated(text: str, ngrams: NGrams) -> str | None:
    """The first run of a text that is among these, as it was compared; None for a clean text."""
    words = normalized_words(text)
    prefixes = _prefixes(words)
    for length, known in ngrams.hashes.items():
        if length > len(words):
            continue
        hashes = _run_hashes(prefixes, length)
        places = np.searchsorted(known, hashes)
        found = known[np.minimum(places, len(known) - 1)] == hashes
        if found.any():
            start = int(found.argmax())
            return " ".join(words[start : start + length])
    return None


def normalized_words(text: str) -> list[str]:
    """Words as they are compared: lower case, NFKC, without punctuation; a dash divides words, a hyphen does not."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _MARKS.sub("", _DASHES.sub(" ", text.lower())).split()


@lru_cache(maxsize=2**18)
def _word_hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


@cache
def _powers(num: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers 0 … num − 1 of the base and of its inverse modulo 2^64."""
    inverse = pow(_BASE, -1, 2**64)
    bases = (np.full(num, base, np.uint64) for base in (_BASE, inverse))
    first, second = (np.multiply.accumulate(np.concatenate([[np.uint64(1)], base[1:]])) for base in bases)
    return first, second


def _prefixes(words: Sequence[str]) -> np.ndarray:
    """Polynomial hashes of the first 0, 1, … words: uint64 (number of words + 1,)."""
    hashes = np.fromiter(map(_word_hash, words), np.uint64, len(words))
    powers, _ = _powers(_room(len(words)))
    return np.concatenate([[np.uint64(0)], np.cumsum(hashes * powers[: len(words)])])


def _run_hashes(prefixes: np.ndarray, length: int) -> np.ndarray:
    """Hashes of all runs of a length, wherever they stand: Σ_j hash(word_i+j) · base^j modulo 2^64."""
    _, inverses = _powers(_room(len(prefixes) - 1))
    return (prefixes[length:] - prefixes[:-length]) * inverses[: len(prefixes) - length]


def _room(num: int) -> int:
    return max(1024, 1 << num.bit_length())


def read_benchmark_texts(paths: Iterable[str], min_words: int = MIN_WORDS) -> list[str]:
    """Every string of at least `min_words` words in benchmark files: questions, contexts, answers, in any nesting.

    Args:
        paths: JSON, JSON lines, CSV or TSV, with or without a header and .gz; local or any URL that fsspec opens.

    Raises:
        ConfigError: a file that is missing, of another kind, damaged, or without any such string.
    """
    texts: dict[str, None] = {}
    for path in paths:
        found = [text for text in _file_texts(path) if len(normalized_words(text)) >= min_words]
        if not found:
            raise ConfigError(f"{path}: no field has {min_words} words or more; is it a benchmark's file?")
        texts.update(dict.fromkeys(found))
    return list(texts)


def _file_texts(path: str) -> Iterator[str]:
    plain = path.removesuffix(".gz")
    if not plain.endswith(_ENDS):
        raise ConfigError(f"{path}: benchmarks are read from files that end in {', '.join(_ENDS)} (or those with .gz)")
    try:
        text = read_whole(path).decode("utf-8-sig")
        if plain.endswith(".json"):
            yield from _strings(_parsed(text, path))
        elif plain.endswith(".jsonl"):
            for number, line in enumerate(text.split("\n"), start=1):
                yield from _strings(_parsed(line, f"{path}:{number}"))
        else:
            rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if plain.endswith(".tsv") else ",")
            yield from _strings(list(rows))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; ingest.passages.benchmarks must name existing ones") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text) if text.strip() else None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not JSON ({error})") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
