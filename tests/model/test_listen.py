"""Listening: the speech LM hears a recording as in training, its cache changes nothing, and its text comes whole."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from factories import make_tokenizer
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import DynamicCache, MimiConfig, MimiEncoderModel, MimiModel, PreTrainedTokenizerFast

from salad_ray.config import AdapterConfig, ConfigError
from salad_ray.model import listen as listening
from salad_ray.model.encoder import LogMelEncoder
from salad_ray.model.listen import listen, load_listener, next_tokens, prompt_embeddings, prompt_ids
from salad_ray.model.loading import ModelError
from salad_ray.model.speech_lm import EncoderSpec, SpeechLM, hidden_states
from salad_ray.sequences.batch import collate, frames_of, sample_of, store_frames
from salad_ray.sequences.interleave import Span, build_segment, units_of
from salad_ray.tables import BadInput, Features, Word

ADAPTER = AdapterConfig(hidden_size=16, num_layers=2, num_heads=2, ffn_size=24)
LOG_MEL = EncoderSpec(name="log_mel", path=None, revision=None, sampling_rate=16000, frame_rate=12.5, dim=640)
RATE = 16000
SHAPES = {"Qwen2": {}, "Qwen3": {}, "Llama": {}, "Mistral": {"sliding_window": 8}}


def make_model(folder: Path, shape: str = "Qwen2", encoder: EncoderSpec = LOG_MEL, **settings: Any) -> SpeechLM:
    """A tiny random speech LM; its weights are large, so that every earlier position shows."""
    chosen = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    chosen |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    config = getattr(transformers, f"{shape}Config")(**(chosen | SHAPES[shape] | settings))
    torch.manual_seed(0)
    getattr(transformers, f"{shape}ForCausalLM")(config).save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return SpeechLM.from_teacher(str(folder), None, ADAPTER, encoder, seed=0).eval()


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer("byte_level")
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SpeechLM:
    return make_model(tmp_path_factory.mktemp("teacher"))


def tone(secs: float = 1.3, rate: int = RATE) -> np.ndarray:
    """A tone that rises and falls in loudness, (num_samples,)."""
    time = np.arange(int(secs * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * 5 * time) * np.sin(2 * np.pi * (200 + 300 * time) * time)).astype(np.float32)


def encoded(audio: np.ndarray, rate: int = RATE, codec: tuple[str, str] = ("WAV", "PCM_16")) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, rate, format=codec[0], subtype=codec[1])
    return file.getvalue()


def heard(model: SpeechLM, audio: Any, rate: int | None = None, **settings: Any) -> str:
    return "".join(listen(model, LogMelEncoder(), audio, rate, **settings))


# ----------------------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("shape", SHAPES)
def test_generating_with_the_cache_equals_recomputing_every_step(shape: str, tmp_path: Path) -> None:
    model = make_model(tmp_path, shape)
    start = prompt_embeddings(model, [5, 6], LogMelEncoder().encode([tone()])[0], [7])
    tokens = list(next_tokens(model, start, 24))
    assert len(tokens) == 24
    cache, inputs, grown = DynamicCache(config=model.llm.config), start, start
    for token in tokens:
        cached = listening._next_logits(model, inputs, cache)
        anew = last_logits(model, grown)
        torch.testing.assert_close(cached, anew, rtol=1e-4, atol=1e-4)
        assert int(anew[: len(model.tokenizer)].argmax()) == token
        inputs = model.llm.get_input_embeddings()(torch.tensor([[token]]))
        grown = torch.cat([grown, inputs], dim=1)
    assert len(set(tokens)) > 5, "it says little when every step says the same"


@torch.no_grad()
def last_logits(model: SpeechLM, embeddings: Tensor) -> Tensor:
    positions = torch.arange(embeddings.shape[1])[None]
    return (hidden_states(model.llm, embeddings, positions)[0, -1] @ model.head.T).float()


def test_a_cache_that_forgot_the_speech_would_be_noticed(model: SpeechLM) -> None:
    start = prompt_embeddings(model, [5, 6], LogMelEncoder().encode([tone()])[0], [7])
    other = prompt_embeddings(model, [5, 6], LogMelEncoder().encode([tone()[::-1].copy()])[0], [7])
    assert (last_logits(model, start) - last_logits(model, other)).abs().max() > 0.1


def test_attention_without_a_cache_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    model.llm.config._attn_implementation = "varlen"
    with pytest.raises(ModelError, match="attention='sdpa'"):
        heard(model, tone(), RATE)


# -------------------------------------------------------------------------------------------------------- as trained


@pytest.mark.parametrize("words", [(2, 5), (0, 4), (3, 8)])
def test_the_prompt_is_what_training_would_have_made_of_it(model: SpeechLM, words: tuple[int, int]) -> None:
    """Text, speech and text of one utterance, by the training path and as a prompt, to the last hidden state."""
    text = "we the people of the united states in"
    pieces, audio, encoder = text.split(), tone(4.0), LogMelEncoder()
    times = [Word(word, 0.5 * place, 0.5 * place + 0.45) for place, word in enumerate(pieces)]
    [frames] = encoder.encode([audio])
    row = Features(
        utt_id="u",
        recording_id="u",
        offset_secs=0.0,
        duration_secs=4.0,
        domain="",
        split="train",
        text=text,
        words=times,
        num_frames=len(frames),
        frame_rate=12.5,
        dim=640,
        features=store_frames(frames, "float16")[0],
    )
    units = units_of([row], model.tokenizer)
    spans = [Span(0, words[0], False), Span(*words, True), Span(words[1], len(pieces), False)]
    spans = [span for span in spans if span.start < span.end]
    if words[1] == len(pieces):  # a training sample ends in text; what is heard last is asked for all the same
        spans = [*spans[:-1], Span(spans[-1].start, words[1] - 1, True), Span(words[1] - 1, words[1], False)]
    sample = sample_of(build_segment(units, spans), [row])
    with torch.inference_mode():
        hidden = model(collate([[sample]], 96))[0]
    spoken = next(span for span in spans if span.is_speech)
    before, behind = " ".join(pieces[: spoken.start]), " ".join(pieces[spoken.end :])
    ids = prompt_ids(model.tokenizer, f"{before} {{speech}} {behind}")
    assert [*ids[0], *ids[1]] == [token for token in sample.segment.token_ids.tolist() if token >= 0]
    embeddings = prompt_embeddings(model, ids[0], sample.frames.astype(np.float32), ids[1])
    length = embeddings.shape[1]
    assert length == len(sample.segment.token_ids)
    with torch.inference_mode():
        found = hidden_states(model.llm, embeddings, torch.arange(length)[None])[0]
    torch.testing.assert_close(found, hidden[:length], rtol=1e-4, atol=1e-4)
    assert np.array_equal(listening._frames(encoder, audio), frames_of(row).astype(np.float32))


@pytest.mark.parametrize("kind", ["byte_level", "trimmed", "metaspace", "bos", "unigram", "wordpiece"])
@pytest.mark.parametrize("after", [" of the", "\nA new line:", ", and so on.", ""])
def test_text_behind_the_speech_has_the_tokens_it_has_in_a_text(kind: str, after: str) -> None:
    tokenizer = make_tokenizer(kind)
    before, behind = prompt_ids(tokenizer, f"we the {{speech}}{after}")
    spoken = " people"
    whole = tokenizer(f"we the{spoken}{after}")["input_ids"]
    ending = [2] if kind == "bos" else []  # this tokenizer puts </s> behind a text, where nothing would follow
    assert whole[: len(before)] == before
    assert whole[len(whole) - len(behind) - len(ending) :] == behind + ending
    assert len(before) + len(behind) < len(whole) - len(ending)
    assert (tokenizer.bos_token_id in before) == (kind == "bos")


def test_text_glued_to_the_speech_keeps_its_tokens(model: SpeechLM) -> None:
    assert model.tokenizer.decode(prompt_ids(model.tokenizer, "{speech}people")[1]) == "people"
    assert model.tokenizer.decode(prompt_ids(model.tokenizer, "{speech}'s 😀")[1]) == "'s 😀"


def test_braces_of_the_users_own_are_text(model: SpeechLM) -> None:
    assert model.tokenizer.decode(prompt_ids(model.tokenizer, "{x} {speech}")[0]) == "{x}"


@pytest.mark.parametrize("prompt", ["", "What was said?", "{speech} and {speech}"])
def test_a_prompt_needs_one_place_for_the_speech(model: SpeechLM, prompt: str) -> None:
    with pytest.raises(ConfigError, match=r"must hold \{speech\} once"):
        listen(model, LogMelEncoder(), tone(), RATE, prompt=prompt)


def test_the_prompt_changes_what_is_written(model: SpeechLM) -> None:
    texts = {heard(model, tone(), RATE, prompt=prompt) for prompt in ("{speech}", "we {speech}", "{speech} we")}
    assert len(texts) == 3


# ------------------------------------------------------------------------------------------------------------- text


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: what is not in the vocabulary becomes bytes."""
    vocabulary = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "n", "d"]
    tokenizer = Tokenizer(
        models.BPE({token: place for place, token in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()], ids=["byte_level", "byte_fallback"])
def test_text_comes_in_whole_characters(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "and 😀 né “日本”… and"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids)
    assert len(ids) > len(text), "the tokens should be parts of characters"
    for num_tokens in range(len(ids) + 1):
        pieces = list(listening._pieces(tokenizer, ids[:num_tokens]))
        assert "" not in pieces
        assert "\ufffd" not in "".join(pieces)
        assert whole.startswith("".join(pieces))
    assert "".join(pieces) == whole
    assert len(pieces) > 10


def test_bytes_that_are_no_character_do_not_stop_the_text() -> None:
    tokenizer = byte_fallback()
    ids = [2 + 0xE2, 2 + 0x41, *tokenizer("and", add_special_tokens=False)["input_ids"]]
    assert "".join(listening._pieces(tokenizer, ids)).endswith("and")


def test_the_text_ends_where_the_llm_ends_it(model: SpeechLM) -> None:
    start = prompt_embeddings(model, [], LogMelEncoder().encode([tone()])[0], [])
    tokens = list(next_tokens(model, start, 12))
    end = next(place for place in range(3, 12) if tokens[place] not in tokens[:place])
    for by_tokenizer in (True, False):
        ended, config = model.tokenizer.eos_token_id, model.llm.generation_config
        try:
            if by_tokenizer:
                model.tokenizer.eos_token_id = tokens[end]
            else:
                config.eos_token_id = [399, tokens[end]]
            assert list(next_tokens(model, start, 12)) == tokens[:end]
        finally:
            model.tokenizer.eos_token_id, config.eos_token_id = ended, None
    assert list(next_tokens(model, start, 3)) == tokens[:3]


def test_padding_rows_of_the_head_are_never_written(tmp_path: Path) -> None:
    model = make_model(tmp_path, vocab_size=512)  # more rows than tokens, as Qwen has
    with torch.no_grad():
        model.head.weight[len(model.tokenizer) :] *= 20
    start = prompt_embeddings(model, [], LogMelEncoder().encode([tone()])[0], [])
    assert int(last_logits(model, start).argmax()) >= len(model.tokenizer), "the test needs a padding row that wins"
    assert max(next_tokens(model, start, 20)) < len(model.tokenizer)


def test_the_seed_decides_what_is_drawn(model: SpeechLM) -> None:
    drawn = [heard(model, tone(), RATE, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert heard(model, tone(), RATE, temperature=1e-6) == heard(model, tone(), RATE)


def test_text_comes_while_it_is_written(model: SpeechLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    forward = listening._next_logits

    def counted(*args: Any) -> Tensor:
        steps.append(1)
        return forward(*args)

    monkeypatch.setattr(listening, "_next_logits", counted)
    pieces = listen(model, LogMelEncoder(), tone(), RATE, max_tokens=32)
    assert not steps
    next(pieces)
    assert 0 < len(steps) < 8
    list(pieces)
    assert len(steps) == 32


# ------------------------------------------------------------------------------------------------------------ audio


def test_every_way_to_give_a_recording_is_heard_alike(model: SpeechLM, tmp_path: Path) -> None:
    whole = np.round(tone() * 32768).astype(np.int16)
    floats = whole / np.float32(32768)
    path = tmp_path / "a recording.wav"
    path.write_bytes(encoded(whole))
    expected = heard(model, floats, RATE)
    assert expected
    stereo = np.stack([floats, floats], axis=1)
    assert (
        heard(model, str(path)) == heard(model, encoded(whole)) == heard(model, encoded(whole, codec=FLAC)) == expected
    )
    assert heard(model, whole, RATE) == heard(model, floats.astype(np.float64), RATE) == expected
    assert heard(model, stereo, RATE) == heard(model, encoded(stereo, codec=("WAV", "FLOAT"))) == expected


FLAC = ("FLAC", "PCM_16")
CODECS = [("WAV", "PCM_24"), FLAC, ("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS")]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rate", [8000, 48000])
def test_any_format_and_rate_is_heard(model: SpeechLM, codec: tuple[str, str], rate: int) -> None:
    waveform = listening._waveform(encoded(tone(rate=rate), rate, codec), None, RATE)
    assert len(waveform) == pytest.approx(1.3 * RATE, abs=2)
    assert np.corrcoef(waveform[: len(tone()) - 2], tone()[: len(waveform)][:-2])[0, 1] > 0.95
    assert heard(model, encoded(tone(rate=rate), rate, codec), max_tokens=2)


BAD_AUDIO: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty file"),
    "not audio": (b"This is a letter, and no recording of one.", "not audio"),
    "no samples": (encoded(np.zeros(0, np.float32)), "no samples"),
    "silent": (encoded(np.zeros(RATE, np.float32)), "silent"),
    "nan": (encoded(np.full(RATE, np.nan, np.float32), codec=("WAV", "FLOAT")), "NaN"),
    "cut": (encoded(tone())[:9000], "truncated"),
    "m4a": (b"\0\0\0\x20ftypM4A " + bytes(64), "M4A"),
}


@pytest.mark.parametrize("damage", BAD_AUDIO)
def test_a_recording_that_cannot_be_heard_ends_in_one_sentence(model: SpeechLM, damage: str, tmp_path: Path) -> None:
    data, words = BAD_AUDIO[damage]
    path = tmp_path / "recording.wav"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=words) as caught:
        listen(model, LogMelEncoder(), str(path))  # before anything is written
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match=words):
        listen(model, LogMelEncoder(), data)


def test_a_recording_that_is_not_there(model: SpeechLM, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such audio file"):
        listen(model, LogMelEncoder(), str(tmp_path / "nothing.wav"))
    with pytest.raises(BadInput, match="cannot be read"):
        listen(model, LogMelEncoder(), str(tmp_path))


@pytest.mark.parametrize(
    ("samples", "rate", "words"),
    [
        (np.zeros(0), RATE, "no samples"),
        (np.zeros(RATE), RATE, "silent"),
        (np.full(RATE, np.inf), RATE, "infinite"),
        (np.stack([tone(), -tone()], axis=1), RATE, "opposite phase"),
        (np.ones((2, RATE)), RATE, r"must be \(num_samples,\)"),
        (np.ones((2, 2, 2)), RATE, r"must be \(num_samples,\)"),
        (np.ones(RATE, np.uint8), RATE, "uint8"),
        (tone(), None, "sampling_rate=None"),
        (tone(), 0, "sampling_rate=0"),
    ],
)
def test_samples_that_cannot_be_heard(model: SpeechLM, samples: np.ndarray, rate: int | None, words: str) -> None:
    with pytest.raises((BadInput, ConfigError), match=words):
        listen(model, LogMelEncoder(), samples, rate)


def test_a_recording_longer_than_the_context_says_how_much_fits(tmp_path: Path) -> None:
    model = make_model(tmp_path, max_position_embeddings=64)
    with pytest.raises(BadInput, match=r"5.0 s of speech, 2 tokens.* 64; 3.4 s would fit") as caught:
        listen(model, LogMelEncoder(), tone(5.0), RATE, prompt="{speech} we", max_tokens=20)
    assert "85 positions" in str(caught.value)
    assert heard(model, tone(3.36), RATE, prompt="{speech} we", max_tokens=20)
    with pytest.raises(BadInput, match=r"; 0.0 s would fit"):
        listen(model, LogMelEncoder(), tone(5.0), RATE, max_tokens=100)


@pytest.mark.parametrize("settings", [{"max_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}])
def test_numbers_out_of_range(model: SpeechLM, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        listen(model, LogMelEncoder(), tone(), RATE, **settings)


# ------------------------------------------------------------------------------------------------ model and encoder


@pytest.fixture(scope="module")
def folder(model: SpeechLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model.save_pretrained(tmp_path_factory.mktemp("models") / "model")
    return next(tmp_path_factory.getbasetemp().glob("models*/model"))


@pytest.fixture(scope="module")
def mimi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("mimi")
    narrow = {"hidden_size": 64, "num_filters": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    narrow |= {"intermediate_size": 128, "upsample_groups": 64, "codebook_size": 64, "codebook_dim": 32}
    narrow |= {"vector_quantization_hidden_dimension": 32, "num_quantizers": 4, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MimiModel(MimiConfig(**narrow)).save_pretrained(place / "whole")
    MimiEncoderModel.from_pretrained(place / "whole").save_pretrained(place / "encoder")
    return place / "encoder"


def test_a_loaded_model_listens_as_the_one_that_was_saved(model: SpeechLM, folder: Path) -> None:
    loaded, encoder = load_listener(str(folder), device="cpu")
    assert "".join(listen(loaded, encoder, tone(), RATE)) == heard(model, tone(), RATE)


def test_a_model_that_hears_through_mimi(mimi: Path, tmp_path: Path) -> None:
    spec = EncoderSpec("mimi", str(mimi), None, 24000, 12.5, 64)
    made = make_model(tmp_path / "teacher", encoder=spec)
    made.save_pretrained(tmp_path / "model")
    model, encoder = load_listener(str(tmp_path / "model"), device="cpu")
    assert (encoder.name, encoder.dim) == ("mimi", 64)
    assert "".join(listen(model, encoder, encoded(tone(rate=44100), 44100)))
    with pytest.raises(
        ModelError, match=r"this encoder is log_mel \(16,000 Hz.* trained on frames of mimi \(24,000 Hz"
    ):
        listen(model, LogMelEncoder(), tone(), RATE)


def test_weights_of_the_encoder_that_moved(mimi: Path, tmp_path: Path) -> None:
    made = make_model(tmp_path / "teacher", encoder=EncoderSpec("mimi", "/gone/mimi", None, 24000, 12.5, 64))
    made.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"/gone/mimi: no such folder.*give the path of its weights") as caught:
        load_listener(str(tmp_path / "model"))
    assert "\n" not in str(caught.value)
    _, encoder = load_listener(str(tmp_path / "model"), str(mimi), device="cpu")
    lineage = {"encoder": {"backend": "transformers", "weights": encoder.weights}}
    (tmp_path / "model" / "lineage.json").write_text(json.dumps(lineage))
    load_listener(str(tmp_path / "model"), str(mimi), device="cpu")
    lineage["encoder"]["weights"] = "those of training"
    (tmp_path / "model" / "lineage.json").write_text(json.dumps(lineage))
    with pytest.raises(ModelError, match=r"are not those that .* was trained with"):
        load_listener(str(tmp_path / "model"), str(mimi), device="cpu")


def test_an_encoder_that_cannot_be_had(model: SpeechLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for place, (change, words) in enumerate(
        [
            ({"name": "ear"}, "its encoder is ear, and this salad_ray has only log_mel, mimi"),
            ({"name": "mimi"}, "does not say where the weights"),
            ({"name": "mimi", "path": "nobody/nothing"}, "nobody/nothing: cannot be loaded as Mimi.*give the path"),
            ({"dim": 80}, "width 640"),
        ]
    ):
        spec = replace(LOG_MEL, **change)
        made = SpeechLM.from_teacher(model.config.teacher, None, ADAPTER, spec, 0)
        made.save_pretrained(tmp_path / str(place))
        with pytest.raises(ModelError, match=words) as caught:
            load_listener(str(tmp_path / str(place)))
        assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_speech_lm(model: SpeechLM, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_listener(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match="is not the config of a speech LM"):
        load_listener(model.config.teacher)  # a plain text LM
    with pytest.raises(ModelError, match="memory://nothing"):
        load_listener("memory://nothing")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ModelError, match=r"is a run, not a model; name a model in it, such as .*/stage1/model"):
        load_listener(f"{run}/")
