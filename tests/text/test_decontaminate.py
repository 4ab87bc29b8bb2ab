"""Decontamination: passages that hold a run of words of a benchmark are found, however spelt; others are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from salad_ray.config import ConfigError
from salad_ray.text.decontaminate import NGrams, contaminated, normalized_words, read_benchmark_texts, word_ngrams

ITEM = "Which of these would most likely happen if a farmer stopped watering the young trees in summer?"
SHORT = "How can you cool a glass of water quickly?"  # nine words
words = st.lists(st.sampled_from([f"w{number}" for number in range(40)]), min_size=1, max_size=60)


def naive(text: str, items: list[str], n: int, min_words: int = 8) -> bool:
    """Compares the runs themselves."""
    padded = f" {' '.join(normalized_words(text))} "
    for item in items:
        item_words = normalized_words(item)
        length = min(n, len(item_words))
        runs = range(len(item_words) - length + 1) if length >= min_words else range(0)
        if any(f" {' '.join(item_words[start : start + length])} " in padded for start in runs):
            return True
    return False


@given(words, st.lists(words, max_size=4), st.integers(0, 30))
def test_agrees_with_comparing_the_words(text: list[str], items: list[list[str]], start: int) -> None:
    joined = [" ".join(item) for item in items]
    ngrams = word_ngrams(joined, n=9, min_words=5)
    planted = " ".join([*text[:start], *(items[0] if items else []), *text[start:]])
    for candidate in (" ".join(text), planted):
        assert (contaminated(candidate, ngrams) is not None) == naive(candidate, joined, 9, 5)


def test_punctuation_case_and_typography_do_not_hide_a_run() -> None:
    ngrams = word_ngrams([ITEM])
    told = (
        "He read: “WHICH of these would most likely happen—if a farmer stopped, watering the young trees?” Nobody knew."
    )
    found = contaminated(told, ngrams)
    assert found == "which of these would most likely happen if a farmer stopped watering the"
    assert len(found.split()) == 13


def test_twelve_words_are_not_thirteen() -> None:
    twelve = " ".join(ITEM.split()[:12])
    ngrams = word_ngrams([ITEM])
    assert contaminated(f"{twelve} his horses", ngrams) is None
    assert contaminated(f"{twelve} {ITEM.split()[12]}", ngrams) is not None


def test_a_short_item_must_be_there_whole_and_a_tiny_one_is_ignored() -> None:
    ngrams = word_ngrams([SHORT, "What is the capital of France?"])
    assert contaminated(f"People ask: {SHORT} Ice helps.", ngrams) == " ".join(normalized_words(SHORT))
    assert contaminated("How can you cool a glass of water slowly?", ngrams) is None
    assert contaminated("What is the capital of France?", ngrams) is None
    assert len(ngrams) == 1


def test_order_of_words_counts() -> None:
    reverse = " ".join(reversed(ITEM.split()))
    swapped = ITEM.replace("most likely", "likely most").replace("young trees", "trees young")
    assert contaminated(reverse, word_ngrams([ITEM])) is None
    assert contaminated(swapped, word_ngrams([ITEM])) is None


def test_empty_benchmarks_and_texts_find_nothing() -> None:
    assert contaminated(ITEM, NGrams(13, {})) is None
    assert contaminated("", word_ngrams([ITEM])) is None
    assert contaminated("… — !", word_ngrams([ITEM])) is None
    assert len(word_ngrams([])) == 0


def test_long_texts_are_searched_to_their_end() -> None:
    assert contaminated("word " * 5000 + ITEM, word_ngrams([ITEM])) is not None


def test_hashes_are_the_same_in_every_process() -> None:
    """Passages are compared by other processes than that which reads the benchmarks."""
    code = f"from salad_ray.text.decontaminate import word_ngrams as b; print(b([{ITEM!r}]).hashes[13].tolist())"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    hashes = word_ngrams([ITEM]).hashes[13]
    assert json.loads(done.stdout) == hashes.tolist()
    assert hashes.dtype == np.uint64
    assert (np.diff(hashes.astype(object)) > 0).all()


def test_benchmark_files_of_all_kinds(tmp_path: Path) -> None:
    arc = {"id": "a", "question": {"stem": ITEM, "choices": [{"text": "the trees would grow", "label": "A"}]}}
    (tmp_path / "arc.jsonl").write_text(json.dumps(arc) + "\n\n" + json.dumps({"goal": SHORT, "label": 1}) + "\n")
    (tmp_path / "mmlu.csv").write_text(f'"{ITEM.replace("farmer", "gardener")}",A,B,C,D,A\n')
    texts = read_benchmark_texts([str(tmp_path / "arc.jsonl"), str(tmp_path / "mmlu.csv")])
    assert texts == [ITEM, SHORT, ITEM.replace("farmer", "gardener")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"question": "x"}\n', "no field has 8 words"),
        ("a.jsonl", f'{{"question": "{ITEM}"}}\n{{"question": \n', r"a\.jsonl:2: not JSON"),
        ("a.txt", ITEM, "files that end in"),
    ],
)
def test_unusable_benchmark_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_benchmark_texts([str(tmp_path / name)])


def test_damaged_or_missing_benchmark_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\xfa" * 9)
    for name, message in (("a.jsonl.gz", "not JSON"), ("a.csv", "cannot be read"), ("b.csv", "no such file")):
        with pytest.raises(ConfigError, match=message):
            read_benchmark_texts([str(tmp_path / name)])


def test_real_benchmarks_are_found_in_text_that_quotes_them_and_not_elsewhere(shared_data: Path) -> None:
    files = sorted(map(str, (shared_data / "benchmarks").glob("*.jsonl")))
    texts = read_benchmark_texts(files)
    ngrams = word_ngrams(texts)
    assert len(texts) > 2500
    assert all(contaminated(f"As was once asked. {text} Nobody knew.", ngrams) for text in texts[::10])
    rows = pq.ParquetFile(shared_data / "text" / "corpus.parquet").read_row_group(0, columns=["text"])["text"]
    found = [contaminated(text, ngrams) for text in rows.to_pylist()]
    assert sum(run is not None for run in found) <= 0.01 * len(found)
