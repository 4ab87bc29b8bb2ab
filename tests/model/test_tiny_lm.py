from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from salad_ray.config import TinyLMConfig
from salad_ray.evaluation.benchmarks import world_items
from salad_ray.evaluation.scoring import batches, predict, score, text_query
from salad_ray.model.tiny_lm import (
    MAX_POSITIONS,
    MAX_SPREAD,
    _build,
    _mean_loss,
    _spread_positions,
    train_tiny_lm,
    train_tokenizer,
)
from salad_ray.tables import BadInput, Item
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


def test_positions_reach_those_of_samples_that_hold_speech() -> None:
    rng = np.random.default_rng(0)
    drawn = [_spread_positions(48, rng) for _ in range(400)]
    steps = [np.diff(positions) for positions in drawn]
    assert all(positions[0] == 0 and len(positions) == 48 for positions in drawn)
    assert all(step.min() >= 1 and step.max() <= MAX_SPREAD for step in steps)
    assert 0.4 < np.mean([(step == 1).all() for step in steps]) < 0.65
    assert max(positions[-1] for positions in drawn) > 250
    assert max(_spread_positions(1000, rng)[-1] for _ in range(50)) < MAX_POSITIONS


def test_a_jump_in_the_positions_hides_nothing() -> None:
    tokenizer = train_tokenizer(TEXTS)
    model = _build(SMALL, tokenizer, seed=0)
    sample, other = (tokenizer(text)["input_ids"] for text in (TEXTS[0], TEXTS[6]))
    changed = [*other[:4], *sample[4:]]  # of the same domain, so only what was read before the jump tells them apart
    jump = np.arange(len(sample)) + 100 * (np.arange(len(sample)) >= 6)
    assert _mean_loss(model, [sample], [jump]).item() != pytest.approx(_mean_loss(model, [sample]).item(), rel=1e-5)
    losses = [_loss_after(model, ids, jump, start=8) for ids in (sample, changed)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)


def _loss_after(model: Qwen2ForCausalLM, sample: list[int], positions: np.ndarray, start: int) -> float:
    """The summed loss of the tokens from `start` on."""
    whole, before = (
        _mean_loss(model, [sample[:end]], [positions[:end]]).item() * (end - 1) for end in (len(sample), start)
    )
    return whole - before


@pytest.mark.slow
def test_the_world_is_read_and_cannot_be_guessed(tmp_path: Path) -> None:
    """The quickstart's text LLM: at least nine in ten with the prompt, and chance without it."""
    quickstart = yaml.safe_load((Path(__file__).parents[2] / "configs" / "quickstart.yaml").read_text())
    num_web, domains = quickstart["world"]["num_web"], quickstart["world"]["domains"]
    texts = [passage.text for passage in world_passages(num_web, domains, seed=0, split="web")]
    config = TinyLMConfig(**quickstart["model"]["tiny_lm"])
    train_tiny_lm(texts, config, seed=0, folder=tmp_path)
    items = world_items(2000, domains, seed=0)
    unread = [replace(item, spoken="") for item in items]
    assert abs(accuracy_of(tmp_path, unread) - 0.25) <= 0.03
    assert accuracy_of(tmp_path, items[:600]) >= 0.9


def accuracy_of(folder: Path, items: list[Item]) -> float:
    tokenizer, llm = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    queries = [text_query(tokenizer, [], item, context=512) for item in items]
    right = 0
    for batch in batches(queries, max_positions=8192):
        values = score(llm, [queries[index] for index in batch])
        for index, value in zip(batch, values, strict=True):
            right += predict(value, items[index].choices)[0] == items[index].answer
    return right / len(items)
