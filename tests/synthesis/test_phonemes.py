"""Kokoro's phonemes: words in the form that their clause demands, each in its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.spoken import is_right, labelled, said
from salad_ray.synthesis.phonemes import _shared_out, sounds_of, to_parts


class AllSymbols:
    def __contains__(self, symbol: object) -> bool:
        return True


def sounds(text: str) -> list[tuple[str, str]]:
    """Written words and their sounds."""
    spoken = [part.phonemes[start:end] for part in to_parts(text, False, AllSymbols()) for start, end in part.spans]
    return list(zip(text.split(), spoken, strict=True))


@pytest.mark.parametrize(
    ("text", "word", "expected"),
    [
        ("They live in the town.", "live", "lˈɪv"),
        ("It was a live show.", "live", "lˈIv"),
        ("They use it now.", "use", "jˈuz"),
        ("The use of it is known.", "use", "jˈus"),
        ("To close the door is easy.", "close", "klˈOz"),
        ("We sat close to it.", "close", "klˈOs"),
        ("To record it is hard.", "record", "ɹᵻkˈɔɹd"),
        ("The record was lost.", "record", "ɹˈɛkəɹd"),
        ("She has read the book.", "read", "ɹˈɛd"),
        ("I will read the book.", "read", "ɹˈid"),
        ("He lives on Main St. in town.", "lives", "lˈɪvz"),
        ("Their lives were saved.", "lives", "lˈIvz"),
        ("In the yard, they live on $3.50 and use it.", "live", "lˈɪv"),
        # What eSpeak has no rule for.
        ("He read it yesterday.", "read", "ɹˈɛd"),
        ("They read it every day.", "read", "ɹˈid"),
        ("He used to live here.", "used", "jˈust"),
        ("They were used to it.", "used", "jˈust"),
        ("It is used to make bread.", "used", "jˈuzd"),
        ("He used the axe.", "used", "jˈuzd"),
        ("These pumps use the energy of the wind.", "use", "jˈuz"),
        ("The body uses more energy.", "uses", "jˈuzᵻz"),
        ("Ninety percent of these species live on land.", "live", "lˈɪv"),
        ("He wound the clock.", "wound", "wˈWnd"),
        ("The wound was deep.", "wound", "wˈund"),
        ("Firms increase their costs.", "increase", "ɪnkɹˈis"),
        ("They will excuse me.", "excuse", "ɪkskjˈuz"),
        ("It consists of stone.", "consists", "kənsˈɪsts"),
        ("Our imports fell.", "imports", "ˈɪmpˌɔɹts"),
        ("Close the door!", "Close", "klˈOz"),
        ("They took a closer look.", "closer", "klˈOsəɹ"),
    ],
)
def test_a_word_has_the_form_that_its_clause_demands(text: str, word: str, expected: str) -> None:
    assert dict(sounds(text))[word] == expected


@pytest.mark.parametrize(("kind", "most_wrong"), [("seen", 2), ("held out", 3)])
def test_heteronyms_of_labelled_sentences_are_said_right(kind: str, most_wrong: int) -> None:
    """`python -m benchmarks spoken` counts them beside eSpeak's own."""
    sentences = labelled(kind)
    assert len(sentences) > 80
    assert len([row for row in sentences if not is_right(row, said(row))]) <= most_wrong


def test_words_that_are_said_as_one_keep_their_own_sounds() -> None:
    text = "In the end of the war it was a record of the use, and that it is to be, of a live show."
    for written, sound in sounds(text):
        alone = sounds_of(written.strip(",.").lower(), False)
        assert sound, written
        assert sound.strip("ˈˌ")[0] == alone.strip("ˈˌ")[0] or written in ("of", "a", "and", "use", "it"), (
            written,
            sound,
        )
    assert [sound for written, sound in sounds("the end of the day")] == ["ðɪ", "ˈɛnd", "ʌv", "ðə", "dˈA"]


def test_a_written_word_has_all_the_sounds_of_its_reading() -> None:
    assert dict(sounds("It cost $3.50 — no more."))["$3.50"] == "θɹˈi dˈɑləɹz ænd fˈɪfti sˈɛnts"
    assert dict(sounds("King Henry VIII’s well-known No. 1 man [laughter] left.")) | {"[laughter]": ""} == dict(
        sounds("King Henry VIII’s well-known No. 1 man [laughter] left.")
    )


@pytest.mark.parametrize(
    ("alone", "chunks", "expected"),
    [
        (["ab", "cd"], ["ab", "cd"], ["ab", "cd"]),
        (["ʌv", "ðə", "dA"], ["əvðə", "dA"], ["əv", "ðə", "dA"]),
        (["ab", "cdef", "gh"], ["ab", "cd", "ef", "gh"], ["ab", "cd ef", "gh"]),
        (["ab", "cd", "ef"], ["abcdef"], ["ab", "cd", "ef"]),
        (["ab", "", "cd"], ["ab", "cd"], ["ab", "", "cd"]),
        (["ab"], ["x"] * 20, [" ".join("x" * 20)]),
    ],
)
def test_what_is_said_is_shared_out_to_the_words(alone: list[str], chunks: list[str], expected: list[str]) -> None:
    assert _shared_out(alone, chunks) == expected


def test_words_of_the_cases_sound_right(cases: Path) -> None:
    rows = [json.loads(line) for line in (cases / "text" / "synthesis.jsonl").read_text().splitlines()]
    heard = [(row["text"], row["right"].split("; ")[-1]) for row in rows if "ˈ" in row["right"]]
    assert len(heard) >= 5
    for text, right in heard:
        assert right in [sound for _, sound in sounds(text)], text
