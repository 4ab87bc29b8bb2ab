from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from salad_ray.config import TinyLMConfig
from salad_ray.model.tiny_lm import _build, _mean_loss, train_tiny_lm, train_tokenizer
from salad_ray.tables import BadInput
from salad_ray.text.world import DOMAINS, world_passages

SMALL = TinyLMConfig(
    hidden_size=32, num_layers=1, num_heads=2, ffn_size=64, num_steps=30, batch_size=8, learning_rate=1e-2
)
TEXTS = [passage.text for passage in world_passages(300, DOMAINS, seed=0, split="train")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("lm")
    return folder, train_tiny_lm(TEXTS, SMALL, seed=0, folder=folder)


def test_folder_is_a_plain_hugging_face_model(trained: tuple[Path, dict[str, float]]) -> None:
    folder, summary = trained
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (folder / "model.safetensors").exists()
    assert model.config.model_type == "qwen2"
    assert model.config.tie_word_embeddings
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 2048
    assert model.config.vocab_size == len(tokenizer) == summary["vocab_size"]
    assert model.num_parameters() == summary["num_parameters"]
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == model.config.eos_token_id


def test_reloaded_tokenizer_is_the_trained_one(trained: tuple[Path, dict[str, float]]) -> None:
    tokenizer, reloaded = train_tokenizer(TEXTS), AutoTokenizer.from_pretrained(trained[0])
    for text in [*TEXTS[:50], '("word", naïve 😀 42\n\n dash—es  two', "the wolf"]:
        token_ids = reloaded(text)["input_ids"]
        assert token_ids == tokenizer(text)["input_ids"]
        assert reloaded.decode(token_ids) == text
        assert reloaded.eos_token_id not in token_ids


def test_words_of_the_world_are_single_tokens() -> None:
    tokenizer = train_tokenizer(TEXTS)
    for text in TEXTS[:100]:
        marks = sum(text.count(mark) for mark in ".,?")
        assert len(tokenizer(text)["input_ids"]) == len(text.split()) + marks


def test_training_learns_and_reports(tmp_path: Path) -> None:
    losses: list[float] = []
    summary = train_tiny_lm(TEXTS, SMALL, 0, tmp_path, lambda step, num_steps, loss: losses.append(loss))
    assert len(losses) == SMALL.num_steps
    assert losses[-1] < losses[0] - 1
    assert summary["loss"] == pytest.approx(losses[-1], abs=1.0)
    assert summary["perplexity"] == pytest.approx(torch.tensor(summary["loss"]).exp().item(), rel=1e-5)


def test_same_seed_gives_the_same_weights(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    random_state = torch.get_rng_state()
    train_tiny_lm(TEXTS, SMALL, 0, tmp_path / "again")
    train_tiny_lm(TEXTS, SMALL, 1, tmp_path / "other")
    first, again, other = (
        folder / "model.safetensors" for folder in (trained[0], tmp_path / "again", tmp_path / "other")
    )
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
    assert torch.equal(torch.get_rng_state(), random_state)


def test_documents_in_a_batch_do_not_see_each_other() -> None:
    tokenizer = train_tokenizer(TEXTS)
    model = _build(SMALL, tokenizer, seed=0)
    samples = [tokenizer(text)["input_ids"] for text in (TEXTS[0], TEXTS[1][:40])]
    counts = [len(sample) - 1 for sample in samples]
    alone = sum(_mean_loss(model, [sample]).item() * count for sample, count in zip(samples, counts, strict=True))
    assert _mean_loss(model, samples).item() == pytest.approx(alone / sum(counts), rel=1e-5)


def test_unusable_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="at least two documents"):
        train_tiny_lm(TEXTS[:1], SMALL, 0, tmp_path)
    with pytest.raises(BadInput, match="tokens"):
        train_tiny_lm([TEXTS[0], "wolf " * 3000], SMALL, 0, tmp_path)


@pytest.mark.slow
def test_a_swapped_attribute_changes_what_the_lm_expects_later(tmp_path: Path) -> None:
    texts = [passage.text for passage in world_passages(6000, DOMAINS, seed=0, split="train")]
    summary = train_tiny_lm(texts, TinyLMConfig(), seed=0, folder=tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    document = "The tiny {} Anna lives in the {} and eats meat. Because Anna eats meat, Hugo carries meat to the"
    places, gains = ("forest", "desert", "river", "garden"), []
    for animal in ("wolf", "bear", "fox"):
        log_probs = torch.stack(
            [
                model(torch.tensor([tokenizer(document.format(animal, place))["input_ids"]])).logits[0, -1]
                for place in places
            ]
        ).log_softmax(-1)[:, [tokenizer(f" {place}")["input_ids"][-1] for place in places]]
        gains += (log_probs.diagonal() - (log_probs.sum(0) - log_probs.diagonal()) / (len(places) - 1)).tolist()
    # Which of the places it has learnt best differs from machine to machine.
    assert sum(gains) / len(gains) > 1, gains
    assert max(gains) > 4, gains
    assert summary["loss"] < 0.5
