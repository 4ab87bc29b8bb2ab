"""On a small wav2vec 2.0, trained here: it learns a dozen eSpeak utterances by heart, whose word times are known."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCTC,
    Data2VecAudioConfig,
    Data2VecAudioForCTC,
    HubertForCTC,
    LasrCTCConfig,
    LasrFeatureExtractor,
    LasrForCTC,
    ParakeetCTCConfig,
    ParakeetFeatureExtractor,
    ParakeetForCTC,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    Wav2Vec2Processor,
    WavLMForCTC,
)

from salad_ray.model.loading import ModelError
from salad_ray.speech.align import Alignment, PocketsphinxAligner
from salad_ray.speech.ctc import CTC_MIN_SCORE, CTCAligner, Speller, best_path
from salad_ray.speech.recognise import Recogniser as HearingTest
from salad_ray.speech.recognise import word_error_rate
from salad_ray.speech.spoken import spoken_tokens
from salad_ray.synthesis.espeak import EspeakSynthesizer
from salad_ray.tables import BadInput, Word

RATE = 16000
TEXTS = [
    "the cat sat on a mat",
    "we saw seven small boats",
    "my dog likes red apples",
    "open the green door now",
    "birds sing early in spring",
    "she sold five old books",
    "rain fell over the hills",
    "give him that long rope",
    "a fox jumped the fence",
    "turn left at the bank",
    "cold winds blow from north",
    "they walked home quickly",
]
LABELS = ["<pad>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
BLANK = 0
FRAME_SECS = 0.02


@dataclass(frozen=True)
class Recogniser:
    """A model with its processor in a folder, what it was trained on, and the true word times."""

    folder: Path
    audios: list[np.ndarray]
    words: list[list[Word]]


def config(**changes: object) -> Wav2Vec2Config:
    """Three convolutions, 20 ms a frame, one layer."""
    fields = {
        "vocab_size": len(LABELS),
        "pad_token_id": BLANK,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "conv_dim": (64, 64, 64),
        "conv_kernel": (10, 8, 4),
        "conv_stride": (5, 8, 8),
        "conv_bias": True,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "mask_time_prob": 0.0,
    }
    drops = ("hidden", "attention", "activation", "feat_proj", "final")
    return Wav2Vec2Config(**fields | {f"{name}_dropout": 0.0 for name in drops} | {"layerdrop": 0.0} | changes)


def save(folder: Path, model: PreTrainedModel, return_attention_mask: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({label: index for index, label in enumerate(LABELS)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), bos_token=None, eos_token=None)
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=return_attention_mask)
    Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def random_model(folder: Path, return_attention_mask: bool = True, **changes: object) -> Path:
    torch.manual_seed(0)
    return save(folder, Wav2Vec2ForCTC(config(**changes)), return_attention_mask)


def spectral_model(folder: Path, family: str) -> Path:
    """One that hears spectra, not waveforms; one layer, random weights."""
    encoder = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "subsampling_conv_channels": 16,
    }
    settings = {"vocab_size": len(LABELS), "pad_token_id": BLANK, "encoder_config": encoder}
    torch.manual_seed(0)
    if family == "parakeet":
        save(folder, ParakeetForCTC(ParakeetCTCConfig(**settings)))
        extractor = ParakeetFeatureExtractor()
    else:
        save(folder, LasrForCTC(LasrCTCConfig(**settings)))
        extractor = LasrFeatureExtractor()
    (folder / "processor_config.json").unlink()
    extractor.save_pretrained(folder)
    return folder


def frame_labels(words: list[Word], num_frames: int) -> torch.Tensor:
    """A label for the first half of its share of its word's true time, then blank; the delimiter ends a word."""
    labels = torch.full((num_frames,), BLANK)
    for word in words:
        symbols = word.text.upper() + ("|" if word is not words[-1] else "")
        edges = np.linspace(word.start_secs, word.end_secs, 2 * len(symbols) + 1) / FRAME_SECS
        for symbol, start, end in zip(symbols, edges[::2], edges[1::2], strict=False):
            labels[int(start) : max(int(start) + 1, int(end))] = LABELS.index(symbol)
    return labels


def learn_by_heart(audios: list[np.ndarray], words: list[list[Word]], max_secs: float = 40.0) -> Wav2Vec2ForCTC:
    """From frames with true labels: so small a model learns where words are only from them, not by the CTC loss."""
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(config()).train()
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    order = sorted(range(len(audios)), key=lambda index: len(audios[index]))
    batches = []
    for batch in (order[:4], order[4:8], order[8:]):
        inputs = extractor([audios[index] for index in batch], sampling_rate=RATE, padding=True, return_tensors="pt")
        num_frames = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(-1)).tolist()
        labels = [frame_labels(words[index], number) for index, number in zip(batch, num_frames, strict=True)]
        batches.append((inputs, torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)))
    start = time.monotonic()
    for step in itertools.count(1):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 7)
        worst = max(train_step(model, optimizer, inputs, labels) for inputs, labels in batches)
        if worst < 0.1 or time.monotonic() - start > max_secs:
            break
    assert worst < 0.5, f"the small model did not learn: loss {worst}"
    return model.eval()


def train_step(model: Wav2Vec2ForCTC, optimizer: torch.optim.Optimizer, inputs: Any, labels: torch.Tensor) -> float:
    loss = torch.nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory: pytest.TempPathFactory) -> Recogniser:
    spoken = EspeakSynthesizer().synthesize(TEXTS, ["en-us"] * len(TEXTS))
    audios = [soxr.resample(speech.audio, speech.sampling_rate, RATE).astype(np.float32) for speech in spoken]
    words = [speech.words for speech in spoken]
    return Recogniser(save(tmp_path_factory.mktemp("ctc"), learn_by_heart(audios, words)), audios, words)


@pytest.fixture(scope="module")
def aligner(recogniser: Recogniser) -> CTCAligner:
    return CTCAligner(str(recogniser.folder))


def check_words(words: list[Word], text: str, audio: np.ndarray) -> None:
    assert [word.text for word in words] == text.split()
    times = [secs for word in words for secs in (word.start_secs, word.end_secs)]
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] <= len(audio) / RATE


def starts(words: list[Word]) -> np.ndarray:
    return np.array([word.start_secs for word in words])


def test_words_start_where_they_are_spoken(recogniser: Recogniser, aligner: CTCAligner) -> None:
    found = aligner.align_batch(recogniser.audios, TEXTS)
    errors = []
    for alignment, text, audio, true in zip(found, TEXTS, recogniser.audios, recogniser.words, strict=True):
        assert isinstance(alignment, Alignment)
        check_words(alignment.words, text, audio)
        assert alignment.score > CTC_MIN_SCORE / 2
        errors.append(np.abs(starts(alignment.words) - starts(true)))
    assert np.median(np.concatenate(errors)) <= 0.03
    assert np.max(np.concatenate(errors)) <= 0.15


def test_both_aligners_find_the_same_words(recogniser: Recogniser, aligner: CTCAligner) -> None:
    other = PocketsphinxAligner()
    assert aligner.sampling_rate == other.sampling_rate == RATE
    differences = []
    for found, known, text in zip(
        aligner.align_batch(recogniser.audios, TEXTS), other.align_batch(recogniser.audios, TEXTS), TEXTS, strict=True
    ):
        assert isinstance(found, Alignment)
        if isinstance(known, Alignment):
            assert [word.text for word in found.words] == [word.text for word in known.words] == text.split()
            differences.extend(np.abs(starts(found.words) - starts(known.words)))
    assert len(differences) >= 30
    assert np.median(differences) <= 0.08


def test_a_wrong_text_is_rejected(recogniser: Recogniser, aligner: CTCAligner) -> None:
    wrong = TEXTS[1:] + TEXTS[:1]
    for result in aligner.align_batch(recogniser.audios, wrong):
        assert isinstance(result, BadInput)
        assert "does not say what the transcript does" in str(result)
    with pytest.raises(BadInput, match="does not say"):
        aligner.align(recogniser.audios[0], "the cat")
    lenient = CTCAligner(str(recogniser.folder), min_score=-1000.0)
    check_words(lenient.align(recogniser.audios[0], wrong[0]), wrong[0], recogniser.audios[0])


def test_words_keep_their_writing(recogniser: Recogniser, aligner: CTCAligner) -> None:
    plain = aligner.align(recogniser.audios[1], TEXTS[1])
    text = "— We saw — 7 'small' BOATS! …"
    words = aligner.align(recogniser.audios[1], text)
    check_words(words, text, recogniser.audios[1])
    assert [(word.start_secs, word.end_secs) for word in words if any(map(str.isalnum, word.text))] == [
        (word.start_secs, word.end_secs) for word in plain
    ]
    assert words[0].start_secs == words[0].end_secs == 0
    assert words[3].start_secs == words[3].end_secs == words[2].end_secs
    assert words[-1].start_secs == words[-1].end_secs == words[-2].end_secs


def test_failures_are_values_and_leave_the_others_alone(recogniser: Recogniser, aligner: CTCAligner) -> None:
    audio = recogniser.audios[0]
    results = aligner.align_batch([audio, audio, audio[:4000], np.zeros(0, np.float32), audio], ["— …", *TEXTS[:1] * 4])
    assert [type(result) for result in results] == [BadInput, Alignment, BadInput, BadInput, Alignment]
    assert "can spell" in str(results[0])
    assert "too few" in str(results[2])
    assert results[1] == results[4]
    assert aligner.align_batch([], []) == []
    with pytest.raises(BadInput, match="nan"):
        aligner.align(np.full_like(audio, np.nan), TEXTS[0])


def same(one: Alignment | BadInput, other: Alignment | BadInput) -> bool:
    assert isinstance(one, Alignment)
    assert isinstance(other, Alignment)
    return one.words == other.words and bool(np.isclose(one.score, other.score, rtol=1e-3, atol=1e-4))


def test_a_padded_batch_gives_what_one_at_a_time_gives(recogniser: Recogniser, aligner: CTCAligner) -> None:
    assert len({len(audio) for audio in recogniser.audios}) > 6
    together = aligner.align_batch(recogniser.audios, TEXTS)
    alone = CTCAligner(str(recogniser.folder), batch_secs=0.1).align_batch(recogniser.audios, TEXTS)
    assert all(itertools.starmap(same, zip(together, alone, strict=True)))


@pytest.mark.parametrize(
    ("mask", "norm", "sizes"), [(True, "layer", [3]), (False, "layer", [2, 1]), (True, "group", [2, 1])]
)
def test_only_models_that_mask_padding_get_padded_batches(
    recogniser: Recogniser, tmp_path: Path, mask: bool, norm: str, sizes: list[int]
) -> None:
    folder = random_model(tmp_path, mask, feat_extract_norm=norm)
    aligner = CTCAligner(str(folder), min_score=-1000.0)
    calls: list[int] = []
    aligner._model.register_forward_pre_hook(
        lambda _, args, inputs: calls.append(len(inputs["input_values"])), with_kwargs=True
    )
    audio = recogniser.audios[1]
    audios = [audio, audio[:16000], np.flip(audio).copy()]
    together = aligner.align_batch(audios, TEXTS[:3])
    assert sorted(calls, reverse=True) == sizes
    alone = [aligner.align_batch([audio], [text])[0] for audio, text in zip(audios, TEXTS, strict=False)]
    assert all(itertools.starmap(same, zip(together, alone, strict=True)))


def test_a_model_that_takes_a_mask_but_does_not_heed_it_is_found_out(recogniser: Recogniser, tmp_path: Path) -> None:
    """The convolutions of data2vec over positions look into the padding."""
    torch.manual_seed(0)
    settings = config(num_conv_pos_embeddings=2).to_dict()
    del settings["model_type"]
    folder = save(tmp_path, Data2VecAudioForCTC(Data2VecAudioConfig(**settings)))
    together = CTCAligner(str(folder), min_score=-1000.0).align_batch(recogniser.audios, TEXTS)
    alone = CTCAligner(str(folder), min_score=-1000.0, batch_secs=0.1).align_batch(recogniser.audios, TEXTS)
    assert all(itertools.starmap(same, zip(together, alone, strict=True)))


@pytest.mark.parametrize(("strides", "stride_secs"), [((5, 8, 8), 0.02), ((5, 4, 8), 0.01), ((10, 8, 8), 0.04)])
def test_the_stride_is_measured_exactly(tmp_path: Path, strides: tuple[int, ...], stride_secs: float) -> None:
    folder = random_model(tmp_path, conv_stride=strides)
    assert CTCAligner(str(folder))._frames.stride_secs == stride_secs


@pytest.mark.parametrize("family", ["wav2vec2", "parakeet", "lasr"])
def test_frames_lie_where_they_listen(tmp_path: Path, family: str) -> None:
    """The first frame of Parakeet is centred on the edge of the audio, the first of LASR 72 ms behind it."""
    torch.manual_seed(0)
    aligner = CTCAligner(str(spectral_model(tmp_path, family) if family != "wav2vec2" else random_model(tmp_path)))
    timing = aligner._frames
    noise = aligner._noise(2.5)
    quiet = aligner._log_probs([noise])[0]
    late = []
    for sample in range(12000, 28000, 777):
        clicked = noise.copy()
        clicked[sample : sample + 8] += 0.5
        heard = np.abs(aligner._log_probs([clicked])[0] - quiet).sum(1)
        heard[heard < 0.3 * heard.max()] = 0
        frame = np.average(np.arange(len(heard)) + 0.5, weights=heard)
        late.append(timing.first_secs + frame * timing.stride_secs - sample / RATE)
    assert abs(np.median(late)) <= 0.01


def test_parakeet_and_lasr_get_what_is_right_for_them(recogniser: Recogniser, tmp_path: Path) -> None:
    """The one heeds its mask under another name, the other's convolutions do not."""
    for family, pads in (("parakeet", True), ("lasr", False)):
        aligner = CTCAligner(str(spectral_model(tmp_path / family, family)), min_score=-1000.0)
        assert aligner._pads is pads
        audios, texts = recogniser.audios[:4], ["a", "we saw", "my dog", "open"]
        together = aligner.align_batch(audios, texts)
        alone = [aligner.align_batch([audio], [text])[0] for audio, text in zip(audios, texts, strict=True)]
        assert all(itertools.starmap(same, zip(together, alone, strict=True)))
        for num_samples in range(0, 4000, 160):  # LASR hears nothing in less than 145 ms
            [found] = aligner.align_batch([audios[0][:num_samples]], ["a"])
            assert isinstance(found, Alignment if num_samples >= 2400 else (Alignment, BadInput))


@pytest.mark.parametrize("family", ["wav2vec2", "hubert", "wavlm"])
def test_folders_as_they_were_published_load(tmp_path: Path, family: str) -> None:
    """Old names of the normed weights, the feature extractor in a file of its own, the tokenizer's class untold."""
    kinds = {"wav2vec2": Wav2Vec2ForCTC, "hubert": HubertForCTC, "wavlm": WavLMForCTC}
    settings = config().to_dict()
    del settings["model_type"]
    torch.manual_seed(0)
    folder = save(tmp_path, kinds[family](kinds[family].config_class(**settings)))
    known = CTCAligner(str(folder)).facts["weights"]
    old_names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    weights = load_file(folder / "model.safetensors")
    for new, old in old_names.items():
        weights = {name.replace(new, old): tensor for name, tensor in weights.items()}
    assert sum(name.endswith(("weight_g", "weight_v")) for name in weights) == 2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    processor = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(processor["feature_extractor"]))
    if family != "wavlm":  # for which transformers knows no class of its own
        tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    aligner = CTCAligner(str(folder))
    assert aligner.facts["weights"] == known
    assert aligner._pads


def test_facts_tell_the_weights(recogniser: Recogniser, aligner: CTCAligner, tmp_path: Path) -> None:
    assert aligner.facts == CTCAligner(str(recogniser.folder)).facts
    assert aligner.facts["path"] == str(recogniser.folder)
    assert aligner.facts["revision"] is None
    assert aligner.facts["weights"] != CTCAligner(str(random_model(tmp_path))).facts["weights"]


def test_a_missing_training_mask_does_no_harm(tmp_path: Path) -> None:
    """As in facebook/wav2vec2-base-960h."""
    folder = random_model(tmp_path, mask_time_prob=0.0, mask_feature_prob=0.0)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"mask_time_prob": 0.05}))
    _, info = AutoModelForCTC.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {"wav2vec2.masked_spec_embed"}
    assert CTCAligner(str(folder)).facts == CTCAligner(str(folder)).facts


def test_what_is_no_ctc_model_is_refused_in_a_sentence(shared_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        CTCAligner(str(tmp_path / "missing" / "model"))
    with pytest.raises(ModelError, match=r"config\.json"):
        CTCAligner(str(tmp_path))
    with pytest.raises(ModelError, match="cannot be loaded as a CTC model"):
        CTCAligner(str(shared_data / "models" / "tiny-teacher"))
    headless = save(tmp_path / "headless", Wav2Vec2Model(config(architectures=["Wav2Vec2ForCTC"])))
    with pytest.raises(ModelError, match="2 missing: lm_head"):
        CTCAligner(str(headless))
    bare = tmp_path / "bare"
    Wav2Vec2ForCTC(config()).save_pretrained(bare)
    with pytest.raises(ModelError, match="feature extractor cannot be loaded"):
        CTCAligner(str(bare))
    small = random_model(tmp_path / "small", vocab_size=10)
    with pytest.raises(ModelError, match="labels beyond the model's 10"):
        CTCAligner(str(small))
    pickled = random_model(tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded as a CTC model"):
        CTCAligner(str(pickled))


def test_the_recording_tells_whether_words_in_brackets_are_said(recogniser: Recogniser) -> None:
    audio = recogniser.audios[0]
    said, unsaid = (
        CTCAligner(recogniser.folder).align(audio, text)
        for text in ("the cat [sat on] a mat", "the cat sat [old books] on a mat [bird]")
    )
    assert all(word.start_secs < word.end_secs for word in said)
    assert [word.text for word in unsaid if word.start_secs == word.end_secs] == ["[old", "books]", "[bird]"]


def test_texts_become_labels(recogniser: Recogniser) -> None:
    tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(recogniser.folder)
    script = Speller("here", tokenizer, config()).script(words := ["Dr.", "Jo's", "—", "25"], spoken_tokens(words))
    assert "".join(LABELS[label] for label in script.labels) == "DOCTOR|JOS|TWENTY|FIVE"
    assert script.owners == [0] * 6 + [-1] + [1] * 3 + [-1] + [3] * 6 + [-1] + [3] * 4


def test_subwords_come_from_the_tokenizer() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {piece: index for index, piece in enumerate(["<pad>", "<unk>", "▁", "▁the", "▁c", "at", *"abceht"])}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "c"), ("a", "t")]
    vocabulary |= {"th": 12, "the": 13}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>")
    script = Speller("here", tokenizer, config(vocab_size=14)).script(words := ["The", "cat"], spoken_tokens(words))
    assert tokenizer.convert_ids_to_tokens(script.labels) == ["▁the", "▁c", "at"]
    assert script.owners == [0, 1, 1]


def collapse(path: tuple[int, ...]) -> list[int]:
    return [label for label, _ in itertools.groupby(path) if label != BLANK]


@pytest.mark.parametrize("labels", [[1], [1, 2], [1, 1], [2, 1, 2], [1, 2, 2], [2, 2, 2]])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 5, 6])
def test_the_path_is_the_best_of_all(labels: list[int], num_frames: int) -> None:
    rng = np.random.default_rng(num_frames)
    for _ in range(5):
        log_probs = np.log(rng.dirichlet(np.ones(3), num_frames))
        paths = [path for path in itertools.product(range(3), repeat=num_frames) if collapse(path) == labels]
        if not paths:
            with pytest.raises(BadInput, match="too few"):
                best_path(log_probs, np.array(labels), BLANK)
            continue
        states = best_path(log_probs, np.array(labels), BLANK)
        found = tuple(labels[state // 2] if state % 2 else BLANK for state in states)
        frames = np.arange(num_frames)
        assert collapse(found) == labels
        assert set(range(1, 2 * len(labels), 2)) <= set(states)
        best = max(log_probs[frames, path].sum() for path in paths)
        np.testing.assert_allclose(log_probs[frames, found].sum(), best)


def test_half_a_minute_takes_no_time() -> None:
    rng = np.random.default_rng(0)
    log_probs = np.log(rng.dirichlet(np.ones(32), 1500)).astype(np.float32)
    labels = rng.integers(1, 32, 600)
    best_path(log_probs, labels, BLANK)
    start = time.process_time()
    best_path(log_probs, labels, BLANK)
    assert time.process_time() - start < 0.2


def test_a_recogniser_hears_what_was_said(recogniser: Recogniser) -> None:
    heard = HearingTest(str(recogniser.folder))
    errors = [
        word_error_rate(text, heard.transcribe(a, RATE)) for text, a in zip(TEXTS, recogniser.audios, strict=True)
    ]
    assert np.mean(errors) < 0.1
    wrong = [
        word_error_rate(text, heard.transcribe(a, RATE)) for text, a in zip(TEXTS[1:], recogniser.audios, strict=False)
    ]
    assert min(wrong) > 0.5


def test_word_errors_count_what_is_spoken() -> None:
    assert word_error_rate("Twenty-five cats — it's fun!", "twenty five cats it's fun") == 0
    assert word_error_rate("I have 25 cats.", "I HAVE TWENTY FIVE CATS") == 0
    assert word_error_rate("the cat sat", "the bat") == pytest.approx(2 / 3)
    assert word_error_rate("the cat sat", "") == 1
