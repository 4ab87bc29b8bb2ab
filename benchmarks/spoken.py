"""How much of real text is not read as it is written, and in how many passages that goes wrong without `read_words`.

Passages are cut from the corpus of `SALAD_DATA`. A written word counts as misread if eSpeak NG's own reading of it is
none of those that `read_words` accepts; a heteronym ("live", "use") if Kokoro's phonemes as eSpeak has them, of the
word alone or in its clause, differ from ours by more than stress and weak vowels. How often each is right is counted
on sentences labelled by hand, `tests/synthesis/heteronyms.tsv`; the rules were made with those "seen" alone.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq

from salad_ray.speech.spoken import Spoken, read_words, unreadable
from salad_ray.synthesis import phonemes as pronouncing
from salad_ray.synthesis.espeak import phonemes
from salad_ray.synthesis.phonemes import sounds_of, to_parts
from salad_ray.text.documents import Document
from salad_ray.text.passages import Limits, cut_passages

NUM_DOCUMENTS = 100
HETERONYMS = frozenset(
    re.findall(
        r"\w+",
        """
    abuse advocate aggregate alternate appropriate approximate articulate associate attribute axes bass bow close
    combine compound compress conduct conflict console content contract contrast converse convert convict decrease
    deliberate desert digest dove duplicate elaborate escort estimate excuse export graduate house import increase
    insult intimate invalid isolate lead live lives minute moderate object objects perfect permit present produce
    progress project protest read rebel record records refuse reject research resume row separate sow subject survey
    suspect tear tears transport use used uses wind wound
    """,
    )
)
KINDS = {
    "money": r"[$£€¥₹¢]", "fraction or slash": r"\d/\d|[¼-¾]|/", "power or footnote": r"[⁰-⁹¹²³]",
    "range": r"\d[–-]\d", "time or ratio": r"\d:\d", "percent, degrees and units": r"[%°℃′″]", "other number": r"\d",
    "Roman numeral": r"^\W*[IVXLCDM]+\W*(?:'s)?\W*$", "abbreviation": r"\.", "sign": r"[^\w\s.,;:!?'\"()-]",
    "other": "",
}  # fmt: skip


def run() -> list[dict[str, Any]]:
    """Measure; each result has name, value and unit."""
    texts = real_passages(NUM_DOCUMENTS)
    started = time.process_time()
    readings = [read_words(text.split()) for text in texts]
    secs = time.process_time() - started
    kinds: Counter[str] = Counter()
    num_misread = num_heteronyms = num_in_clause = num_either = 0
    for text, words in zip(texts, readings, strict=True):
        wrong = {
            kind_of(written) for written, spoken in zip(text.split(), words, strict=True) if misread(written, spoken)
        }
        kinds.update(wrong)
        other_form = bool(misplaced_heteronyms(text))
        num_misread, num_heteronyms = num_misread + bool(wrong), num_heteronyms + other_form
        num_in_clause += bool(misplaced_heteronyms(text, in_clause=True))
        num_either += bool(wrong) or other_form
    num_words = sum(len(words) for words in readings)
    share = 100 / len(texts)
    return [
        {"name": "passages", "value": float(len(texts)), "unit": ""},
        {"name": "a word misread by eSpeak NG alone", "value": share * num_misread, "unit": "% of passages"},
        *(
            {"name": f"  {kind}", "value": share * number, "unit": "% of passages"}
            for kind, number in kinds.most_common()
        ),
        {"name": "a heteronym in another form than alone", "value": share * num_heteronyms, "unit": "% of passages"},
        {"name": "… than eSpeak has in its clause", "value": share * num_in_clause, "unit": "% of passages"},
        {"name": "either", "value": share * num_either, "unit": "% of passages"},
        {"name": "with a sign without a reading", "value": share * sum(map(bool, map(unreadable, texts))), "unit": "%"},
        *labelled_rows(),
        {"name": "read_words", "value": num_words / secs / 1000, "unit": "thousand words per CPU second"},
    ]  # fmt: skip


def real_passages(num_documents: int) -> list[str]:
    path = Path(os.environ.get("SALAD_DATA", "../shared/data")) / "text" / "corpus.parquet"
    rows = pq.read_table(path, columns=["id", "text"]).slice(0, num_documents).to_pylist()
    return [
        passage.text for row in rows for passage in cut_passages(Document(row["id"], row["text"]), Limits()).passages
    ]


def misread(written: str, spoken: Spoken) -> bool:
    """Whether eSpeak NG, given the written word, says none of its readings."""
    if spoken.text == re.sub("[’‘]", "'", written) or not spoken.tokens:
        return False
    readings = itertools.islice(itertools.product(*spoken.tokens), 64)
    return all(
        heard(reading) != heard(written)
        for reading in (spoken.text, *(" ".join(itertools.chain(*r)) for r in readings))
    )


@cache
def heard(text: str) -> str:
    return bare(phonemes(text))


def bare(ipa: str) -> str:
    """Without stress, length, spaces, and what weakens in a clause."""
    return re.sub("[ˈˌː ]", "", ipa).translate(str.maketrans("ᵻəɐʌɾ", "ɪɪɪɪt"))


def kind_of(written: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, written))


def misplaced_heteronyms(text: str, in_clause: bool = False) -> list[str]:
    """The heteronyms of a text that eSpeak says otherwise, alone or in their clause, than we do in their sentence."""
    if not any(word.strip(".,;:!?\"'()“”").lower() in HETERONYMS for word in text.split()):
        return []
    ours = word_sounds(text)
    with by_espeak():
        theirs = word_sounds(text) if in_clause else [(word, sounds_of(word, False)) for word, _ in ours]
    return [
        word
        for (word, our), (_, their) in zip(ours, theirs, strict=True)
        if word.lower() in HETERONYMS and bare(our) != bare(their)
    ]


def word_sounds(text: str) -> list[tuple[str, str]]:
    """Each written word, without punctuation, and Kokoro's phonemes of it."""
    sounds = [part.phonemes[start:end] for part in to_parts(text, False, _AllSymbols()) for start, end in part.spans]
    words = [word.strip(".,;:!?\"'()“”") for word in text.split()]
    return list(zip(words, sounds, strict=True))


@contextmanager
def by_espeak() -> Iterator[None]:
    with patch.object(pronouncing, "in_context", lambda words, sounds, british: list(sounds)):
        yield


# ------------------------------------------------------------------------------------------------ sentences labelled


def labelled_rows() -> list[dict[str, Any]]:
    rows = []
    for kind in ("seen", "held out"):
        sentences = labelled(kind)
        alone = sum(is_right(row, sounds_of(row[1], False)) for row in sentences)
        with by_espeak():
            in_clause = sum(is_right(row, said(row)) for row in sentences)
        in_sentence = sum(is_right(row, said(row)) for row in sentences)
        for how, number in {"alone": alone, "eSpeak in its clause": in_clause, "ours": in_sentence}.items():
            name = f"right of {len(sentences)} sentences, {kind}: {how}"
            rows.append({"name": name, "value": float(number), "unit": f"{100 * number / len(sentences):.0f} %"})
    return rows


def labelled(kind: str) -> list[tuple[str, str, str, list[str]]]:
    """Sentences, the word that is meant (between stars), its right form, and its other forms."""
    table = Path(__file__).parents[1] / "tests" / "synthesis" / "heteronyms.tsv"
    rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines()]
    return [(text, text.split("*")[1], right, others) for name, text, right, *others in rows if name == kind]


def said(row: tuple[str, str, str, list[str]]) -> str:
    index = next(place for place, word in enumerate(row[0].split()) if "*" in word)
    return word_sounds(row[0].replace("*", ""))[index][1]


def is_right(row: tuple[str, str, str, list[str]], sounds: str) -> bool:
    """Whether sounds are nearest to the right form: vowels in weak syllables differ between tables."""
    from rapidfuzz.distance import Levenshtein

    def distance(form: str) -> int:
        return Levenshtein.distance(sounds.replace("ᵻ", "ɪ"), form.replace("ᵻ", "ɪ"))

    return all(distance(row[2]) < distance(other) for other in row[3])


class _AllSymbols:
    def __contains__(self, symbol: object) -> bool:
        return True
