from __future__ import annotations

import importlib.util
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from salad_ray.speech.align import MIN_SCORE, SAMPLING_RATE, Alignment, PocketsphinxAligner, guess_phones
from salad_ray.speech.audio import load_audio
from salad_ray.tables import BadInput, Word


@pytest.fixture(scope="module")
def aligner() -> PocketsphinxAligner:
    return PocketsphinxAligner()


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "alignment.py"
    spec = importlib.util.spec_from_file_location("benchmark_alignment", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def jfk(shared_data: Path) -> np.ndarray:
    return load_audio(str(shared_data / "speech/mixed_read/audio/jfk.flac"), sampling_rate=SAMPLING_RATE)[0]


JFK = "And so, my fellow Americans, ask not what your country can do for you, ask what you can do for your country."

ARPABET = "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"


def check_words(words: list[Word], text: str, audio: np.ndarray) -> None:
    assert [word.text for word in words] == text.split()
    times = [time for word in words for time in (word.start_secs, word.end_secs)]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] <= len(audio) / SAMPLING_RATE


def test_words_keep_their_writing(aligner: PocketsphinxAligner, jfk: np.ndarray) -> None:
    text = (
        "— And so, my fellow Americans — ask NOT what your country can do 4 you … ask what you can-do for your country!"
    )
    words = aligner.align(jfk, text)
    check_words(words, text, jfk)
    dash = words[text.split().index("—", 1)]
    americans = words[text.split().index("Americans")]
    assert dash.start_secs == dash.end_secs == americans.end_secs
    assert all(0.03 <= word.end_secs - word.start_secs < 1.5 for word in words if any(map(str.isalnum, word.text)))


@pytest.mark.parametrize("note", ["[the king]", "[door slams]", "[s]", "[Speaker 2]"])
def test_the_recording_tells_whether_words_in_brackets_are_said(
    aligner: PocketsphinxAligner, jfk: np.ndarray, note: str
) -> None:
    """An editor's words are said, notes are not; neither costs the utterance."""
    said = JFK.replace("my fellow", "[my fellow]").replace("you, ask", "[you,] ask")
    assert all(word.start_secs < word.end_secs for word in aligner.align(jfk, said))
    unsaid = aligner.align(jfk, JFK.replace("what your", f"what {note} your"))
    assert [word.text for word in unsaid if word.start_secs == word.end_secs] == note.split()
    assert [word for word in unsaid if word.text not in note.split()] == aligner.align(jfk, JFK)


def test_the_long_pauses_lie_between_the_words(aligner: PocketsphinxAligner, jfk: np.ndarray) -> None:
    words = aligner.align(jfk, JFK)
    loud = np.square(jfk).mean()
    for before, after in pairwise(words):
        if after.start_secs - before.end_secs > 0.2:
            pause = jfk[int(before.end_secs * SAMPLING_RATE) : int(after.start_secs * SAMPLING_RATE)]
            assert np.square(pause).mean() < loud / 10
    assert any(after.start_secs - before.end_secs > 0.2 for before, after in pairwise(words))


def test_order_and_failures_leave_no_trace(aligner: PocketsphinxAligner, jfk: np.ndarray) -> None:
    first = aligner.align(jfk, JFK)
    with pytest.raises(BadInput, match=r"alignment|does not say"):
        aligner.align(jfk, "completely different words were written down in the place of this speech by mistake")
    with pytest.raises(BadInput):
        aligner.align(jfk[:4000], JFK)
    with pytest.raises(BadInput):
        aligner.align(np.zeros(0, np.float32), JFK)
    with pytest.raises(BadInput, match="no word that can be spoken"):
        aligner.align(jfk, "— …")
    assert aligner.align(jfk, JFK) == first == PocketsphinxAligner().align(jfk, JFK)


def test_failures_of_a_batch_are_values(aligner: PocketsphinxAligner, jfk: np.ndarray) -> None:
    silence = np.zeros(0, np.float32)
    wrong = "completely different words were written down in the place of this speech by mistake"
    found, *failed, again = aligner.align_batch([jfk, jfk, silence, jfk, jfk], [JFK, wrong, JFK, "— …", JFK])
    assert isinstance(found, Alignment)
    assert found == again
    assert found.words == aligner.align(jfk, JFK)
    assert MIN_SCORE <= found.score < 0
    assert all(isinstance(error, BadInput) for error in failed)


def test_the_least_score_can_be_set(aligner: PocketsphinxAligner, jfk: np.ndarray) -> None:
    [found] = aligner.align_batch([jfk], [JFK])
    assert isinstance(found, Alignment)
    assert PocketsphinxAligner(found.score - 0.01).align_batch([jfk], [JFK]) == [found]
    with pytest.raises(BadInput, match="does not say"):
        PocketsphinxAligner(found.score + 0.01).align(jfk, JFK)


def test_transcripts_that_go_wrong_half_way_are_refused(
    aligner: PocketsphinxAligner, benchmark: ModuleType, shared_data: Path
) -> None:
    recordings = benchmark.recordings(shared_data / "speech" / "ljspeech")[:12]
    texts = [text.split() for _, text in recordings]
    refused = 0
    for (audio, _), own, other in zip(recordings, texts, texts[5:] + texts[:5], strict=True):
        half = len(own) // 2
        try:
            aligner.align(audio, " ".join(own[:half] + other[: len(own) - half]))
        except BadInput:
            refused += 1
    assert refused >= 10


def test_the_level_does_not_matter(aligner: PocketsphinxAligner, jfk: np.ndarray) -> None:
    loud, quiet = aligner.align(jfk, JFK), aligner.align(jfk * np.float32(0.05), JFK)
    assert np.median([abs(a.start_secs - b.start_secs) for a, b in zip(loud, quiet, strict=True)]) <= 0.02


def test_unknown_words_get_a_pronunciation() -> None:
    assert guess_phones("woodcutters") == "W UH D K AH T ER Z"
    assert guess_phones("wizard") == "W IH Z ER D"
    for word in ("quixotically", "xqz", "'", "zzz", "hmm", "a", "llanfairpwllgwyngyll"):
        assert set(guess_phones(word).split()) <= set(ARPABET.split())
        assert guess_phones(word)


@pytest.mark.parametrize(("corpus", "median", "p95"), [("lj_text_male", 0.025, 0.1), ("ljspeech", 0.025, 0.06)])
def test_word_boundaries_meet_true_joins(
    aligner: PocketsphinxAligner, benchmark: ModuleType, shared_data: Path, corpus: str, median: float, p95: float
) -> None:
    items = list(benchmark.join(benchmark.recordings(shared_data / "speech" / corpus)))[:8]
    result = benchmark.measure(aligner, items)
    assert result["failed"] == 0
    assert result["joins"] >= 14
    assert result["edge_median_ms"] <= 1000 * median
    assert result["edge_p95_ms"] <= 1000 * p95
    # The measure itself must see a shift.
    words = aligner.align(items[0].audio, " ".join(items[0].texts))
    late = [Word(word.text, word.start_secs + 0.3, word.end_secs + 0.3) for word in words]
    shift = benchmark.boundary_errors(late, items[0]) - benchmark.boundary_errors(words, items[0])
    np.testing.assert_allclose(shift, 0.3)


@pytest.mark.parametrize("case", ["cased", "upper", "lower"])
def test_joins_lie_in_pauses_whatever_the_speaker_and_the_case(
    aligner: PocketsphinxAligner, benchmark: ModuleType, shared_data: Path, case: str
) -> None:
    items = list(benchmark.join(benchmark.recordings(shared_data / "speech" / "mixed_read")))
    result = benchmark.measure(aligner, items, case)
    assert result["failed"] == 0
    assert result["outside_median_ms"] <= 20
    assert result["outside_p95_ms"] <= 80
