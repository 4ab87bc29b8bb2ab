"""Batched Kokoro: what `KModel` says one at a time, whatever the batch; words where the durations put them."""

from __future__ import annotations

import json
import os
import shutil
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kokoro.model import KModel
from kokoro_weights import SYMBOLS, double_precision, fix_source, in_double, write_random_kokoro

from salad_ray.config import ConfigError
from salad_ray.model.loading import ModelError
from salad_ray.synthesis.kokoro import (
    WEIGHTS,
    KokoroSynthesizer,
    empty_kokoro,
    load_kokoro,
    load_voice,
    noise_seed,
    place_weights,
)
from salad_ray.synthesis.phonemes import MAX_PHONEMES, sounds_of, to_parts
from salad_ray.synthesis.speech import Speech
from salad_ray.tables import BadInput

AMERICAN, BRITISH = VOICES = ("af_heart", "bm_george")
BATCH = 100_000  # frames: everything at once
TEXTS = ("Hello.", "A longer one: five words.", "Yes!", "No — never.")
TEXT_VOICES = (AMERICAN, BRITISH, BRITISH, AMERICAN)
TRICKY = (
    "“Well,” she said… “it's 'odd' -- isn't it?” (yes)",
    "In 1984, 25 cats cost $3.50 & 7%; e.g. the U.S.A.",
    "Ｏｄｄ ① 😀 e\u0301 a\u200bb",
    "tabs\tand\r\nlines\n\n\n — \u00a0 … \u2028end",
    '"" [[fri:]] <b>x</b> a_b and/or #1 --',
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kokoro") / "small"
    write_random_kokoro(path, voices=VOICES)
    return path


@pytest.fixture(scope="module")
def kokoro(folder: Path) -> KokoroSynthesizer:
    return KokoroSynthesizer(str(folder), VOICES)


def one_at_a_time(model: KModel, kokoro: KokoroSynthesizer, seed: int) -> list[KModel.Output]:
    outputs = []
    for text, voice in zip(TEXTS, TEXT_VOICES, strict=True):
        [part] = to_parts(text, voice == BRITISH, model.vocab)
        torch.manual_seed(noise_seed(seed, text, voice, 0))
        outputs.append(model(part.phonemes, kokoro.voices[voice][len(part.phonemes) - 1], return_output=True))
    return outputs


def spoken(kokoro: KokoroSynthesizer, order: list[int], seed: int = 7) -> dict[int, Speech]:
    texts, voices = [TEXTS[i] for i in order], [TEXT_VOICES[i] for i in order]
    return dict(zip(order, kokoro.synthesize(texts, voices, seed), strict=True))


def largest_difference(left: np.ndarray, right: np.ndarray) -> float:
    assert left.shape == right.shape
    return float(np.abs(left - right).max())


def test_a_batch_is_what_kmodel_says_one_at_a_time(folder: Path) -> None:
    """In double precision: in single, a rounding of the pitch moves the phases of the source, which jump at ±π."""
    with double_precision():
        kokoro = KokoroSynthesizer(str(folder), VOICES, batch_frames=BATCH)
        kokoro.voices = {name: voice.double() for name, voice in kokoro.voices.items()}
        in_double(kokoro.model.model)
        outputs = one_at_a_time(in_double(load_kokoro(str(folder))), kokoro, 7)
        for speech, output in zip(spoken(kokoro, [0, 1, 2, 3]).values(), outputs, strict=True):
            assert len(speech.audio) == 600 * int(output.pred_dur.sum())
            assert largest_difference(speech.audio, output.audio.numpy()) < 1e-6
            assert output.audio.std() > 0.02
    assert len({len(output.audio) for output in outputs}) == 4


def test_a_batch_is_what_kmodel_says_in_single_precision_too(folder: Path) -> None:
    """Durations as they are; the audio with the source fixed, in any order, up to rounding."""
    kokoro = KokoroSynthesizer(str(folder), VOICES, batch_frames=BATCH)
    fix_source(kokoro.model.model)
    model = fix_source(KModel(repo_id="", config=str(folder / "config.json"), model=str(folder / WEIGHTS)).eval())
    parts = [to_parts(text, False, SYMBOLS)[0] for text in TEXTS]
    utterances = [kokoro._utterance(part, AMERICAN, 0) for part in parts]
    outputs = [model(utterance.phonemes, utterance.style[None], return_output=True) for utterance in utterances]
    for order in ([3, 1, 0, 2], [2]):
        for index, (audio, durations) in zip(order, kokoro.model.speak([utterances[i] for i in order]), strict=True):
            assert durations.tolist() == outputs[index].pred_dur.tolist()
            assert largest_difference(audio, outputs[index].audio.numpy()) < 1e-4
    assert len({frames for output in outputs for frames in output.pred_dur.tolist()}) > 3


def test_speech_depends_on_text_voice_and_seed_alone(kokoro: KokoroSynthesizer) -> None:
    together, alone = spoken(kokoro, [3, 0, 2]), spoken(kokoro, [0])
    assert together[0].audio.tobytes() == alone[0].audio.tobytes()
    assert together[0].words == alone[0].words
    assert spoken(kokoro, [0], seed=8)[0].audio.tobytes() != alone[0].audio.tobytes()
    [other] = kokoro.synthesize([TEXTS[0]], [BRITISH], 7)
    assert other.audio.tobytes() != alone[0].audio.tobytes()
    same, again = kokoro.synthesize(["Yes!", "Yes!"], [AMERICAN, AMERICAN])
    assert same.audio.tobytes() == again.audio.tobytes()


def test_words_are_the_written_ones_in_order_and_within_the_audio(kokoro: KokoroSynthesizer) -> None:
    for text, speech in zip(TRICKY, kokoro.synthesize(TRICKY, [AMERICAN] * len(TRICKY)), strict=True):
        assert [word.text for word in speech.words] == text.split()
        times = [time for word in speech.words for time in (word.start_secs, word.end_secs)]
        assert times == sorted(times)
        assert times[0] >= 0
        assert times[-1] <= speech.duration_secs
        assert speech.audio.dtype == np.float32
        assert speech.sampling_rate == 24000
        for word in speech.words:
            assert (word.end_secs > word.start_secs) == bool(sounds(word.text)), word


def sounds(written: str) -> str:
    try:
        [part] = to_parts(written, False, SYMBOLS)
    except BadInput:
        return ""
    return part.phonemes


def test_words_last_as_long_as_their_sounds(kokoro: KokoroSynthesizer) -> None:
    text = "Well, so — “yes”!"
    [part] = to_parts(text, False, SYMBOLS)
    [speech] = kokoro.synthesize([text], [AMERICAN], 1)
    [(_, durations)] = kokoro.model.speak([kokoro._utterance(part, AMERICAN, 0)])
    frame = dict(enumerate(accumulate(durations.tolist(), initial=0), start=-1))  # of each phoneme; the mark is −1
    at = part.phonemes.index
    well, so, dash, yes = speech.words
    assert (well.start_secs, well.end_secs) == (frame[0] / 40, frame[at(",")] / 40)
    assert (so.start_secs, so.end_secs) == (frame[at(",") + 2] / 40, frame[at("—") - 1] / 40)
    assert (dash.start_secs, dash.end_secs) == (so.end_secs, so.end_secs)
    assert (yes.start_secs, yes.end_secs) == (frame[at("“") + 1] / 40, frame[at("”")] / 40)


def test_a_long_text_is_spoken_in_parts_and_joined(folder: Path) -> None:
    text = "One two. Four, six eight nine? Ten! …"
    divided = KokoroSynthesizer(str(folder), [AMERICAN], max_phonemes=10)
    parts = to_parts(text, False, SYMBOLS, 10)
    assert len(parts) > 3
    short, speech = divided.synthesize(["Yes!", text], [AMERICAN, AMERICAN], 5)
    assert short.words[0].text == "Yes!"
    alone = divided.model.speak(
        [divided._utterance(part, AMERICAN, noise_seed(5, text, AMERICAN, i)) for i, part in enumerate(parts)]
    )
    assert np.array_equal(speech.audio, np.concatenate([audio for audio, _ in alone]))
    ends = np.cumsum([len(audio) for audio, _ in alone]) / 24000
    words = iter(speech.words)
    for part, start, end in zip(parts, [0.0, *ends], ends, strict=False):
        for _ in part.spans:
            word = next(words)
            assert start <= word.start_secs <= word.end_secs <= end
    assert [word.text for word in speech.words] == text.split()


def test_text_becomes_kokoros_phonemes() -> None:
    [part] = to_parts('"Hello," said Mr. Smith (a man of 25) — it cost $3.50... - The end-game—so!', False, SYMBOLS)
    assert part.phonemes == (
        "“həlˈO,” sˈɛd mˈɪstəɹ smˈɪθ (ɐ mˈæn ʌv twˈɛnti fˈIv) — ɪt kˈɔst θɹˈi dˈɑləɹz ænd fˈɪfti sˈɛnts… — ðɪ "
        "ˈɛndɡˈAm—sˈO!"
    )
    assert [part.phonemes[start:end] for start, end in part.spans[:4]] == ["həlˈO", "sˈɛd", "mˈɪstəɹ", "smˈɪθ"]
    assert (sounds_of("go", True), sounds_of("go", False)) == ("ɡˈQ", "ɡˈO")


def test_parts_end_at_sentences_else_at_clauses_else_between_words() -> None:
    def divided(text: str) -> list[str]:
        parts = to_parts(text, False, SYMBOLS, 24)
        counts = [0, *accumulate(len(part.spans) for part in parts)]
        return [" ".join(text.split()[start:end]) for start, end in pairwise(counts)]

    assert divided("One, two. Three four five, six.") == ["One, two.", "Three four five, six."]
    assert divided("One, two three four five six.") == ["One,", "two three four five", "six."]
    assert divided("One two three four five six.") == ["One two three four five", "six."]
    assert divided("Mr. Smith, the U.S. president") == ["Mr. Smith,", "the U.S. president"]


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("ab Z.,!?—-–\"'“’()[]…$5:;\n\té😀Ж\u200b\x01") | st.characters(), max_size=60))
def test_every_written_word_has_its_sounds_in_a_part_that_fits(text: str) -> None:
    try:
        parts = to_parts(text, False, set(SYMBOLS), 100)
    except BadInput:
        return
    assert sum(len(part.spans) for part in parts) == len(text.split())
    for part in parts:
        assert len(part.phonemes) <= 100
        assert set(part.phonemes) <= set(SYMBOLS)
        assert part.phonemes == part.phonemes.strip()
        bounds = [bound for span in part.spans for bound in span]
        assert bounds == sorted(bounds)
        assert bounds[-1] <= len(part.phonemes)
    assert any(start < end for part in parts for start, end in part.spans)


@pytest.mark.parametrize(
    "text", ["", " \n\t", "...", "— “”", "\ud800 hello", "donau—" * 100, "Привет 日本語 hello", "The sign 水 is here."]
)
def test_what_cannot_be_spoken_is_bad_input(kokoro: KokoroSynthesizer, text: str) -> None:
    with pytest.raises(BadInput):
        kokoro.synthesize([text], [AMERICAN])


def test_what_cannot_be_spoken_takes_nothing_with_it(kokoro: KokoroSynthesizer) -> None:
    reason, speech, other = kokoro.synthesize_each(["…", "Yes!", ""], [AMERICAN, BRITISH, BRITISH], 7)
    assert isinstance(reason, BadInput)
    assert isinstance(other, BadInput)
    assert isinstance(speech, Speech)
    assert speech.words[0].text == "Yes!"


def test_no_texts_no_speech(kokoro: KokoroSynthesizer) -> None:
    assert kokoro.synthesize([], []) == []


def test_nothing_is_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    KokoroSynthesizer(str(folder), VOICES).synthesize(["Oh, 😀!"], [BRITISH])
    assert capfd.readouterr() == ("", "")


def test_weights_as_kokoro_82m_has_them_load_whole(folder: Path) -> None:
    """Saved from DataParallel, with a buffer of old, and without AdaIN's inner scale and shift."""
    states = torch.load(folder / WEIGHTS, weights_only=True, mmap=True)
    optional = (".norm.weight", ".norm.bias")
    published: dict[str, dict[str, Any]] = {
        part: {f"module.{name}": weight for name, weight in state.items() if not name.endswith(optional)}
        for part, state in states.items()
    }
    published["bert"]["module.embeddings.position_ids"] = torch.arange(512)[None]
    model = empty_kokoro(json.loads((folder / "config.json").read_text()))
    place_weights("published", model, published)
    for name, weight in model.state_dict().items():
        part, _, rest = name.partition(".")
        if name.endswith(optional):
            assert torch.equal(weight, torch.full_like(weight, name.endswith("weight")))
        else:
            assert torch.equal(weight, states[part][rest])


def test_weights_that_do_not_fit_are_refused(folder: Path) -> None:
    states = torch.load(folder / WEIGHTS, weights_only=True, mmap=True)
    model = empty_kokoro(json.loads((folder / "config.json").read_text()))
    predictor = states["predictor"]
    without = {name: weight for name, weight in predictor.items() if name != "F0_proj.bias"}
    refused = {
        "missing: text_encoder": {name: state for name, state in states.items() if name != "text_encoder"},
        r"1 missing: predictor\.F0_proj\.bias": {**states, "predictor": without},
        r"1 unexpected: predictor\.more": {**states, "predictor": {**predictor, "more": torch.zeros(1)}},
        r"\(2,\) instead of \(1,\)": {**states, "predictor": {**without, "F0_proj.bias": torch.zeros(2)}},
    }
    for message, wrong in refused.items():
        with pytest.raises(ModelError, match=message):
            place_weights("other", model, wrong)


def test_files_that_are_missing_or_damaged_are_named(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other, copy_function=os.link)
    with pytest.raises(ConfigError, match=r"holds no voices/af_nobody\.pt"):
        load_voice(str(other), "af_nobody")
    torch.save(torch.zeros(3, 256), other / "voices" / "short.pt")
    with pytest.raises(ConfigError, match=r"short\.pt is no Kokoro voice: \(3, 256\) instead of \(510, 1, 256\)"):
        load_voice(str(other), "short")
    (other / "voices" / "text.pt").write_text("hello")
    with pytest.raises(ConfigError, match=r"text\.pt cannot be read"):
        load_voice(str(other), "text")
    (other / WEIGHTS).unlink()
    for damaged in (b"", b"PK\x03\x04", b"hello"):
        (other / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ConfigError, match="cannot be loaded as Kokoro"):
            load_kokoro(str(other))
    torch.save({"bert": 3}, other / WEIGHTS)
    with pytest.raises(ConfigError, match="cannot be loaded as Kokoro"):
        load_kokoro(str(other))
    (other / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        load_kokoro(str(other))
    with pytest.raises(ConfigError, match="no such folder"):
        load_kokoro(str(tmp_path / "nowhere"))


def test_a_voice_that_was_not_loaded_is_named_with_those_that_were(kokoro: KokoroSynthesizer) -> None:
    with pytest.raises(ConfigError, match=r"'am_adam' was not loaded.*af_heart, bm_george"):
        kokoro.synthesize_each(["Yes."], ["am_adam"])


@pytest.mark.slow
def test_the_true_shape(tmp_path: Path) -> None:
    write_random_kokoro(tmp_path / "true", small=False, voices=(AMERICAN,))
    kokoro = KokoroSynthesizer(str(tmp_path / "true"), [AMERICAN], batch_frames=BATCH)
    fix_source(kokoro.model.model)
    model = fix_source(load_kokoro(str(tmp_path / "true")))
    assert sum(weight.numel() for weight in model.parameters()) == 81_810_022
    parts = [part for text in ("Yes!", "Oh no.") for part in to_parts(text, False, SYMBOLS)]
    utterances = [kokoro._utterance(part, AMERICAN, 0) for part in parts]
    for utterance, (audio, durations) in zip(utterances, kokoro.model.speak(utterances), strict=True):
        expected = model(utterance.phonemes, utterance.style[None], return_output=True)
        assert durations.tolist() == expected.pred_dur.tolist()
        assert largest_difference(audio, expected.audio.numpy()) < 1e-4
    assert kokoro.max_phonemes == MAX_PHONEMES
