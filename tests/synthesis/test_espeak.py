"""eSpeak NG: words where they are heard, and the same samples whatever was said before."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from salad_ray.config import ESPEAK_VOICES, EVALUATION_VOICES, SpeechGates
from salad_ray.speech.audio import check_speech
from salad_ray.synthesis.espeak import SAMPLING_RATE, EspeakSynthesizer, phonemes, variants, voices
from salad_ray.synthesis.speech import Speech
from salad_ray.tables import BadInput

TEXTS = (
    "Hello, world. It's a well-known fact; stop!",
    "In 1984, 25 cats — naïve café 😀 ended: $3.50 & 7%.\n\nA new line (“word”), e.g. the U.S.A.",
    "he said -- that is so -- that it was in the end of the war",
    "the yard. four. I saw 1,234,567.89 and the 3rd at 10:30, €5 million",
    "Ｏｄｄ words ① hello ½ end",
    'tabs\tand\r\nlines\n\n\n  spaces\u00a0and\u2028more <b>tags</b> &amp; [[fri:]] "the end"',
    "a\u200bb c\u0301d \ufeffe 👩\u200d👩\u200d👧 g — – … x x x x x",
    "and then it ran " * 120,
    "donau" * 300 + " end",
)


def speak(text: str, voice: str = "en-us", seed: int | None = None) -> Speech:
    [speech] = EspeakSynthesizer().synthesize([text], [voice], seed)
    return speech


def level(speech: Speech, start_secs: float, end_secs: float) -> float:
    part = speech.audio[round(start_secs * SAMPLING_RATE) : round(end_secs * SAMPLING_RATE)]
    return float(np.sqrt(np.mean(part**2)))


@pytest.mark.parametrize("text", TEXTS)
def test_words_are_the_written_ones_in_order_and_within_the_audio(text: str) -> None:
    speech = speak(text)
    assert [word.text for word in speech.words] == text.split()
    times = [time for word in speech.words for time in (word.start_secs, word.end_secs)]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] <= speech.duration_secs
    assert speech.audio.dtype == np.float32
    assert 0.05 < np.abs(speech.audio).max() <= 1


@pytest.mark.parametrize("text", TEXTS)
def test_every_word_with_letters_takes_time_and_symbols_alone_none(text: str) -> None:
    for word in speak(text).words:
        if any(char.isalnum() for char in word.text):
            assert word.end_secs > word.start_secs + 0.01, word
        elif word.text in ("—", "–", "…", "--"):
            assert word.end_secs == word.start_secs, word


def test_silence_falls_between_words_and_sound_within() -> None:
    speech = speak("One, two. Three, four: five; six! Seven? Eight.")
    for word in speech.words:
        assert level(speech, word.start_secs, word.end_secs) > 0.03, word
    pauses = [(a.end_secs, b.start_secs) for a, b in zip(speech.words, speech.words[1:], strict=False)]
    for end, start in pauses:
        assert start - end > 0.08
        # the last sound rings on for a little
        assert level(speech, end + 0.05, start) < 0.002


def test_a_word_is_where_it_would_be_if_the_text_ended_before_it() -> None:
    """Positions are in characters, not bytes: the naïve and the emoji would shift them."""
    text = "The naïve café, 😀, cost €25, and a dog came home."
    whole = speak(text)
    for index in (3, 4, 6):  # what ends with a comma
        part = speak(" ".join(text.split()[:index]))
        assert whole.words[index - 1].end_secs == pytest.approx(part.words[-1].end_secs, abs=0.12)


def test_repetition_adds_up() -> None:
    once, thrice = speak("Birds sing."), speak("Birds sing. " * 3)
    lengths = [b.end_secs - a.start_secs for a, b in zip(thrice.words[::2], thrice.words[1::2], strict=True)]
    assert lengths == pytest.approx([once.words[-1].end_secs] * 3, abs=0.03)


@pytest.mark.parametrize(
    ("text", "spelled", "pieces"),
    [
        ("He is 5′ 2″ tall in town.", "He is five feet two inches tall in town.", [1, 1, 2, 2, 1, 1, 1]),
        ("It costs $3.50 in town.", "It costs three dollars and fifty cents in town.", [1, 1, 5, 1, 1]),
        ("King Henry VIII was old.", "King Henry the eighth was old.", [1, 1, 2, 1, 1]),
        ("It was ① and 10–15 of them.", "It was one and ten to fifteen of them.", [1, 1, 1, 1, 3, 1, 1]),
        ("He said [laughter] to them — so.", "He said to them — so.", [1, 1, 0, 1, 1, 1, 1]),
    ],
)
def test_a_written_word_has_the_time_of_what_is_said_for_it(text: str, spelled: str, pieces: list[int]) -> None:
    written, said = speak(text), speak(spelled)
    assert written.audio.tobytes() == said.audio.tobytes()
    end, words = 0.0, iter(said.words)
    for word, number in zip(written.words, pieces, strict=True):
        own = [next(words) for _ in range(number)]
        start, end = (own[0].start_secs, own[-1].end_secs) if own else (end, end)
        assert (word.start_secs, word.end_secs) == (start, end)


def test_words_spoken_as_one_share_its_time() -> None:
    of, the = speak("end of the day").words[1:3]
    assert of.end_secs == the.start_secs
    assert (the.end_secs - the.start_secs) / (of.end_secs - of.start_secs) == pytest.approx(3 / 2)


@pytest.mark.parametrize("voice", ["en-us", "en-gb", "en-us+f3", "en-us+klatt6", "en-gb+whisper", "de"])
def test_samples_depend_on_text_voice_and_seed_alone(voice: str) -> None:
    text = "Hello, world. It is good to see you."
    alone = speak(text, voice, 7)
    others = EspeakSynthesizer().synthesize(["Something else.", text, text], ["en-us+f3", voice, voice], 7)
    for speech in others[1:]:
        assert speech.audio.tobytes() == alone.audio.tobytes()
        assert speech.words == alone.words
    assert speak(text, voice, 8).audio.tobytes() != alone.audio.tobytes()


def test_threads_take_turns() -> None:
    texts = ["One text.", "Another, longer text.", "A third."] * 4
    with ThreadPoolExecutor(4) as pool:
        spoken = list(pool.map(lambda text: speak(text, seed=1).audio.tobytes(), texts))
    assert spoken == [speak(text, seed=1).audio.tobytes() for text in texts]


def test_a_seed_varies_the_manner_a_little() -> None:
    text = "The cat sat on the mat, and then it ran away."
    plain = speak(text).duration_secs
    durations = {speak(text, seed=seed).duration_secs for seed in range(8)}
    assert len(durations) > 4
    assert all(0.85 * plain < duration < 1.15 * plain for duration in durations)


def test_voices_differ() -> None:
    spoken = {speak("Hello there.", voice).audio.tobytes() for voice in ("en-us", "en-gb", "en-us+f3", "en-us+m3")}
    assert len(spoken) == 4


def test_default_voices_are_audible_unlike_each_other_and_have_words_where_sound_is() -> None:
    text = "The keeper walked slowly through the cold forest, and she puts the bread on the wooden table."
    names = [*ESPEAK_VOICES, *EVALUATION_VOICES["espeak"]]
    assert len(set(names)) == len(names) == 34
    spoken = EspeakSynthesizer().synthesize([text] * len(names), names)
    for name, speech in zip(names, spoken, strict=True):
        check_speech(speech.audio, SAMPLING_RATE, text, SpeechGates())
        whole = level(speech, 0, speech.duration_secs)
        assert whole > 0.05, name
        assert min(level(speech, word.start_secs, word.end_secs) for word in speech.words) > 0.3 * whole, name
        assert 0.85 < speech.duration_secs / spoken[0].duration_secs < 1.2, name
        assert voicing(speech) > 0.5, name
    timbres = np.array([timbre(speech) for speech in spoken])
    distances = np.abs(timbres[:, None] - timbres).mean(axis=2)[np.triu_indices(len(names), 1)]
    assert distances.min() > 0.05
    assert np.median(distances) > 0.6


def test_no_variant_is_both_trained_on_and_evaluated() -> None:
    variant_of = {name: name.partition("+")[2] for name in (*ESPEAK_VOICES, *EVALUATION_VOICES["espeak"])}
    heard = {variant_of[name] for name in ESPEAK_VOICES}
    assert len(heard) == len(ESPEAK_VOICES) - 1  # two of them are plain
    assert not heard & {variant_of[name] for name in EVALUATION_VOICES["espeak"]}


def voicing(speech: Speech) -> float:
    """Median over the louder frames (46 ms) of how much a frame is like itself one period (60 – 550 Hz) later."""
    frames = speech.audio[: len(speech.audio) // 1024 * 1024].reshape(-1, 1024)
    frames = frames - frames.mean(axis=1, keepdims=True)
    power = np.square(frames).mean(axis=1)
    correlation = np.fft.irfft(np.abs(np.fft.rfft(frames[power > power.mean() / 4], 2048)) ** 2)[:, :370]
    return float(np.median(correlation[:, 40:].max(axis=1) / correlation[:, 0]))


def timbre(speech: Speech) -> np.ndarray:
    """Mean and spread over time of log power in 30 bands."""
    frames = speech.audio[: len(speech.audio) // 512 * 512].reshape(-1, 512) * np.hanning(512)
    power = np.log(np.abs(np.fft.rfft(frames)[:, :240]) ** 2 + 1e-6).reshape(len(frames), 30, 8).mean(axis=2)
    return np.concatenate([power.mean(axis=0), power.std(axis=0)])


@pytest.mark.parametrize(
    "text", ["", " \n\t", "...", "—", "\ud800 hello", "Привет мир hello 日本語 end", "The sign 水 is here."]
)
def test_what_cannot_be_spoken_is_bad_input(text: str) -> None:
    with pytest.raises(BadInput):
        speak(text)


@pytest.mark.parametrize("voice", ["xx", "en-us+nobody", "en-us+", "", "../en"])
def test_an_unknown_voice_is_named_with_the_known_ones(voice: str) -> None:
    with pytest.raises(ValueError, match=r"unknown (voice|variant) .*known are") as error:
        speak("Hello.", voice)
    assert f"'{voice}'" in str(error.value)


def test_voices_and_variants_are_listed() -> None:
    assert {"en-us", "en-gb", "de", "fr"} <= set(voices())
    assert {"f1", "f3", "m3"} <= set(variants())


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    speak("Hello, 😀 world.", "en-us+f3")
    phonemes("Hello")
    assert capfd.readouterr() == ("", "")


def test_phonemes() -> None:
    assert phonemes("Hello, world!") == "həlˈoʊ wˈɜːld"
    assert phonemes("there", "en-gb") == "ðˈeə"
    assert phonemes("a chin", separator="_") == "ɐ tʃ_ˈɪ_n"
    with pytest.raises(BadInput):
        phonemes(" ")
