"""How much of real text is not read as it is written, and in how many passages that goes wrong without `read_words`.

Passages are cut from the corpus of `SALAD_DATA`. A written word counts as misread if eSpeak NG's own reading of it is
none of those that `read_words` accepts; a heteronym ("live", "use") if Kokoro's phonemes of the word alone, as eSpeak
has them, differ from those in its clause by more than stress and weak vowels.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from salad_ray.speech.spoken import Spoken, read_words, unreadable
from salad_ray.synthesis.espeak import phonemes
from salad_ray.synthesis.phonemes import sounds_of, to_parts
from salad_ray.text.documents import Document
from salad_ray.text.passages import Limits, cut_passages

NUM_DOCUMENTS = 100
HETERONYMS = frozenset(
    re.findall(
        r"\w+",
        """
    abuse advocate aggregate alternate appropriate approximate articulate associate attribute bow close combine
    compound compress conduct conflict console content contract contrast converse convert convict decrease
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
    num_misread = num_heteronyms = num_either = 0
    for text, words in zip(texts, readings, strict=True):
        wrong = {
            kind_of(written) for written, spoken in zip(text.split(), words, strict=True) if misread(written, spoken)
        }
        kinds.update(wrong)
        other_form = bool(misplaced_heteronyms(text))
        num_misread, num_heteronyms = num_misread + bool(wrong), num_heteronyms + other_form
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
        {"name": "either", "value": share * num_either, "unit": "% of passages"},
        {"name": "with a sign without a reading", "value": share * sum(map(bool, map(unreadable, texts))), "unit": "%"},
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


def misplaced_heteronyms(text: str) -> list[str]:
    """The heteronyms of a text that sound otherwise alone than in their clause."""
    written = text.split()
    if not any(word.strip(".,;:!?\"'()“”").lower() in HETERONYMS for word in written):
        return []
    sounds = [part.phonemes[start:end] for part in to_parts(text, False, _AllSymbols()) for start, end in part.spans]
    words = [(word.strip(".,;:!?\"'()“”"), sound) for word, sound in zip(written, sounds, strict=True)]
    return [word for word, sound in words if word.lower() in HETERONYMS and bare(sounds_of(word, False)) != bare(sound)]


class _AllSymbols:
    def __contains__(self, symbol: object) -> bool:
        return True
