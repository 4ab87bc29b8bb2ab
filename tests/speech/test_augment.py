"""Augmentation: each effect is what it says, words stay where they were, and the draw is the seed's alone."""

from __future__ import annotations

import numpy as np
import pytest

from salad_ray.config import AugmentConfig
from salad_ray.speech import augment as module
from salad_ray.speech.augment import ORDER, active_level, augment, room_response
from salad_ray.synthesis.espeak import EspeakSynthesizer
from salad_ray.tables import Word

RATES = (16000, 24000)
TEXT = "The quick brown fox jumps over the lazy dog, and nobody in the village says a single word about it."


@pytest.fixture(scope="module")
def speech() -> dict[int, np.ndarray]:
    import soxr

    [spoken] = EspeakSynthesizer().synthesize([TEXT], ["en-us"], 0)
    return {rate: soxr.resample(spoken.audio, spoken.sampling_rate, rate).astype(np.float32) for rate in RATES}


def only(effect: str, **settings: object) -> AugmentConfig:
    return AugmentConfig(share=1.0, effects=(effect,), num_effects=(1, 1), **settings)  # type: ignore[arg-type]


def delay_secs(heard: np.ndarray, original: np.ndarray, rate: int) -> float:
    size = 1 << (2 * len(original)).bit_length()
    likeness = np.fft.irfft(np.fft.rfft(heard, size) * np.conj(np.fft.rfft(original, size)), size)
    place = int(likeness.argmax())
    return (place if place < size // 2 else place - size) / rate


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("effect", ["noise", "reverberation", "codec", "telephone"])
def test_effects_keep_length_and_place(speech: dict[int, np.ndarray], effect: str, rate: int) -> None:
    audio, words = speech[rate], [Word("x", 0.5, 0.7)]
    for seed in range(6):
        heard, kept, effects = augment(audio, rate, words, only(effect), np.random.default_rng(seed))
        assert effects == (effect,)
        assert (heard.dtype, heard.shape) == (np.float32, audio.shape)
        assert kept is words
        assert np.isfinite(heard).all()
        assert np.abs(heard).max() <= 1
        assert not np.array_equal(heard, audio)
        assert abs(delay_secs(heard, audio, rate)) <= 1e-3


def test_every_codec_is_drawn_and_keeps_the_speech(
    speech: dict[int, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    audio = speech[16000]
    for codec in module.CODECS:
        monkeypatch.setattr(module, "CODECS", (codec,))
        heard, _, _ = augment(audio, 16000, None, only("codec"), np.random.default_rng(1))
        assert 0.7 < np.corrcoef(heard, audio)[0, 1] < 0.9999, codec


def test_a_click_stays_where_it_was_in_every_codec() -> None:
    """A measure of delay that is not the one which the delay is taken out by."""
    audio = np.zeros(48000, np.float32)
    audio[17001] = 0.9
    for codec in module.CODECS:
        for level in module.COMPRESSION:
            heard = module.transcode_with(audio, 24000, codec, level)
            assert abs(int(np.abs(heard).argmax()) - 17001) <= 24, (codec, level)


@pytest.mark.parametrize("delay", [-700, -1, 0, 1, 1500])
@pytest.mark.parametrize("change", [-900, 0, 900])
def test_a_codecs_delay_is_taken_out(speech: dict[int, np.ndarray], delay: int, change: int) -> None:
    audio = speech[16000]
    late = np.concatenate([np.zeros(max(delay, 0), np.float32), audio[max(-delay, 0) :]])
    decoded = np.pad(late, (0, 900))[: len(late) + change]
    heard = module._aligned(decoded, audio, 16000)
    assert heard.shape == audio.shape
    known = slice(700, len(audio) - 900)  # what neither the shift nor the cut lost
    assert np.array_equal(heard[known], audio[known])


@pytest.mark.parametrize("snr_db", [5.0, 20.0])
def test_noise_is_so_many_decibels_below_the_speech(speech: dict[int, np.ndarray], snr_db: float) -> None:
    audio = speech[16000] * 0.3
    silence = np.zeros(16000 * 3, np.float32)
    padded = np.concatenate([silence, audio, silence])  # pauses do not count
    heard, _, _ = augment(padded, 16000, None, only("noise", snr_db=(snr_db, snr_db)), np.random.default_rng(0))
    noise = np.sqrt(np.mean((heard - padded) ** 2))
    assert 20 * np.log10(active_level(audio, 16000) / noise) == pytest.approx(snr_db, abs=1)


@pytest.mark.parametrize("t60_secs", [0.15, 0.6])
def test_the_echo_falls_by_sixty_decibels_in_the_time_that_was_drawn(t60_secs: float) -> None:
    response = room_response(t60_secs, 16000, np.random.default_rng(0))
    assert response[0] == 1.0 == response.max()
    left = np.cumsum(response[:0:-1] ** 2)[::-1]  # Schroeder's backward integral, without the direct sound
    decibels = 10 * np.log10(left / left[0])
    first, last = np.argmax(decibels < -5), np.argmax(decibels < -25)
    assert 3 * (last - first) / 16000 == pytest.approx(t60_secs, rel=0.3)


def test_the_telephone_leaves_its_band_only(speech: dict[int, np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    noise = (0.1 * rng.standard_normal(48000)).astype(np.float32)
    heard, _, _ = augment(noise, 24000, None, only("telephone"), rng)
    power = np.abs(np.fft.rfft(heard)) ** 2
    hertz = np.fft.rfftfreq(len(heard), 1 / 24000)
    band = power[(hertz > 500) & (hertz < 3000)].mean()
    assert power[hertz > 4200].mean() < 1e-5 * band
    assert power[hertz < 100].mean() < 1e-3 * band


def test_speed_changes_length_and_words_together(speech: dict[int, np.ndarray]) -> None:
    audio, words = speech[16000], [Word("a", 0.5, 0.75), Word("b", 1.0, 1.5)]
    heard, scaled, _ = augment(audio, 16000, words, only("speed", speed=(1.25, 1.25)), np.random.default_rng(0))
    assert len(heard) == pytest.approx(len(audio) / 1.25, abs=2)
    assert scaled == [Word("a", 0.4, 0.6), Word("b", 0.8, 1.2)]
    assert augment(audio, 16000, None, only("speed"), np.random.default_rng(0))[1] is None


def test_speed_leaves_something_of_the_shortest() -> None:
    heard, _, _ = augment(np.ones(1, np.float32), 16000, None, only("speed", speed=(3.0, 3.0)), np.random.default_rng())
    assert len(heard) == 1


def test_the_draw_is_the_seeds_alone(speech: dict[int, np.ndarray]) -> None:
    audio, settings = speech[16000], AugmentConfig(share=1.0)
    first, again, other = (augment(audio, 16000, None, settings, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first[0], again[0])
    assert first[2] == again[2]
    assert not (first[0].shape == other[0].shape and np.array_equal(first[0], other[0]))


def test_share_and_numbers_of_effects_are_respected() -> None:
    audio = (0.1 * np.random.default_rng(0).standard_normal(800)).astype(np.float32)
    drawn = [augment(audio, 16000, None, AugmentConfig(share=0.5), np.random.default_rng(i))[2] for i in range(300)]
    changed = [effects for effects in drawn if effects]
    assert 110 < len(changed) < 190
    assert {len(effects) for effects in changed} == {1, 2}
    assert {effect for effects in changed for effect in effects} == set(ORDER)
    assert all(list(effects) == sorted(effects, key=ORDER.index) for effects in changed)


def test_switched_off_it_returns_what_it_was_given_and_draws_nothing() -> None:
    audio, words, rng = np.zeros(9, np.float32), [Word("x", 0, 1)], np.random.default_rng(0)
    before = rng.bit_generator.state
    heard, kept, effects = augment(audio, 16000, words, AugmentConfig(), rng)
    assert heard is audio
    assert kept is words
    assert effects == ()
    assert rng.bit_generator.state == before


@pytest.mark.parametrize("effect", ORDER)
@pytest.mark.parametrize("audio", [np.zeros(16000, np.float32), np.full(800, 0.3, np.float32), np.ones(1, np.float32)])
def test_silence_and_very_short_audio_do_no_harm(effect: str, audio: np.ndarray) -> None:
    heard, _, _ = augment(audio, 16000, None, only(effect), np.random.default_rng(0))
    assert np.isfinite(heard).all()
    assert np.abs(heard).max() <= 1


def test_loud_audio_is_scaled_and_not_clipped(speech: dict[int, np.ndarray]) -> None:
    audio = speech[16000] / np.abs(speech[16000]).max()
    heard, _, _ = augment(audio, 16000, None, only("noise", snr_db=(0.0, 0.0)), np.random.default_rng(0))
    assert 0.98 < np.abs(heard).max() <= 0.99
    assert np.count_nonzero(np.abs(heard) > 0.985) < 5
