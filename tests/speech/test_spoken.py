from __future__ import annotations

import pytest

from salad_ray.speech.spoken import cardinal, ordinal, spoken_tokens


def readings(text: str) -> list[list[str]]:
    """Per token, its readings."""
    return [[" ".join(reading) for reading in token] for word in spoken_tokens(text.split()) for token in word]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (342, "three hundred forty two"),
        (1_000_000, "one million"),
        (2_030_500, "two million thirty thousand five hundred"),
    ],
)
def test_cardinals(number: int, words: str) -> None:
    assert " ".join(cardinal(number)) == words


def test_ordinals() -> None:
    names = [" ".join(ordinal(cardinal(number))) for number in (1, 2, 3, 5, 8, 9, 12, 20, 21, 100)]
    assert ",".join(names) == "first,second,third,fifth,eighth,ninth,twelfth,twentieth,twenty first,one hundredth"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1905", "nineteen oh five"),
        ("1984,", "nineteen eighty four"),
        ("2005", "two thousand five"),
        ("1980s", "nineteen eighties"),
        ("21st", "twenty first"),
        ("3.14", "three point one four"),
        ("$5", "five dollars"),
        ("$1", "one dollar"),
        ("£2.50", "two pounds and fifty pence"),
        ("10:30", "ten thirty"),
        ("1/2", "one half"),
        ("007", "zero zero seven"),
        ("Mr.", "mister"),
        ("St.", "street"),
        ("U.S.", "u s"),
        ("US", "us"),
        ("FBI's", "f b i's"),
        ("café,", "cafe"),
        ("O’Neill’s", "o'neill's"),
        ("&", "and"),
    ],
)
def test_a_token_can_be_read_as(text: str, expected: str) -> None:
    # Other text, so that capitals mean something.
    (token,) = readings(f"as {text}")[1:]
    assert expected in token


def test_words_split_where_a_pause_may_be() -> None:
    assert readings("well-known") == [["well"], ["known"]]
    assert readings("this—that") == [["this"], ["that"]]
    assert [token[0] for token in readings("5%")] == ["five", "percent"]
    assert " ".join(token[0] for token in readings("1,200,000")) == "one million two hundred thousand"
    assert [len(word) for word in spoken_tokens(["a", "—", "b"])] == [1, 0, 1]


def test_millions_of_dollars_are_said_after_the_million() -> None:
    amount, scale = readings("$3 million")
    assert "three" in amount
    assert "million dollars" in scale


def test_capitals_throughout_are_no_acronyms() -> None:
    assert readings("WHO TOLD US") == [["who"], ["told"], ["us"]]
    assert readings("Who told US")[2] == ["u s", "us"]


def test_spoken_words_are_plain() -> None:
    text = "He paid $1,234.56 (≈ 3 %) on 4/5/1999 @ 7:00 to A.B.C. & co.; №5 𝔘nicode ٣ 12345678901234567890 x² ½"
    words = [word for word in spoken_tokens(text.split()) for token in word for reading in token for word in reading]
    assert words
    assert all(set(word) <= set("abcdefghijklmnopqrstuvwxyz'") for word in words)
