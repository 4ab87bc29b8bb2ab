"""all-MiniLM-L6-v2's shape with random weights: `SentenceEmbedder` beside `SentenceTransformer.encode`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from benchmarks.gpu.timing import spread, take_turns
from benchmarks.gpu.worker import Context

VOCAB = 30_522
BATCH_SIZE = 512
NUM_PASSAGES = 16_384
PASSAGE_WORDS = (60, 190)
COSINE = 0.999
"""Least cosine of a passage's two vectors, autocast to fp16 against fp32."""


def rows(context: Context) -> Iterator[dict[str, Any]]:
    """Rates beside the plain call in fp32 and in fp16, and how far apart the vectors are."""
    from sentence_transformers import SentenceTransformer

    from salad_ray.text.embedding import SentenceEmbedder

    number, size = (32, 8) if context.tiny else (NUM_PASSAGES, BATCH_SIZE)
    with tempfile.TemporaryDirectory(prefix="salad-bench-") as folder:
        words = np.array(write_model(Path(folder), context.tiny))
        rng = np.random.default_rng(0)
        texts = [" ".join(rng.choice(words, rng.integers(*PASSAGE_WORDS))) for _ in range(number)]
        device = str(context.device)
        ours = SentenceEmbedder(folder, device=device, batch_size=size)
        plain = {"fp32": SentenceTransformer(folder, device=device)}
        if context.on_gpu:
            plain["fp16"] = SentenceTransformer(folder, device=device, model_kwargs={"dtype": "float16"})
        vectors, exact = ours.encode(texts[:size]).astype(np.float32), encode(plain["fp32"], texts[:size], size)
        cosine = float((vectors * exact).sum(1).min())
        yield {"name": "least cosine with fp32", "cosine": cosine, "tolerance": COSINE, "ok": cosine >= COSINE}
        for name, model in plain.items():
            works: dict[str, Callable[[], Any]] = {
                "ours": partial(in_windows, ours, texts),
                "bare": partial(encode, model, texts, size),
            }
            secs = take_turns(works, context.device, 1 if context.tiny else 2)
            ratios = spread([bare / own for own, bare in zip(secs["ours"], secs["bare"], strict=True)])
            yield {
                "name": f"{number:,} passages, beside SentenceTransformer.encode in {name}",
                "passages_per_sec": number / spread(secs["ours"])["median"],
                "bare": number / spread(secs["bare"])["median"],
                "ours/bare": ratios["median"],
                "min": ratios["min"],
                "max": ratios["max"],
            }


def in_windows(embedder: Any, texts: list[str]) -> None:
    """As the stage calls it, window by window."""
    for start in range(0, len(texts), 8192):
        embedder.encode(texts[start : start + 8192])


def encode(model: Any, texts: list[str], size: int) -> np.ndarray:
    vectors: np.ndarray = model.encode(
        texts, batch_size=size, normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True
    )
    return vectors


def write_model(folder: Path, tiny: bool) -> list[str]:
    """A sentence-transformers model that has learnt nothing; returns the words that its tokenizer knows."""
    num_words = 500 if tiny else VOCAB - 5
    words = [_word(number) for number in range(num_words)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {piece: index for index, piece in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **names)
    layers = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    full = {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=len(vocab), **(layers if tiny else full)))
    bert.save_pretrained(folder)
    fast.save_pretrained(folder)
    _write_modules(folder, bert.config.hidden_size)
    return words


def _write_modules(folder: Path, dim: int) -> None:
    """The files that make a transformer a sentence-transformers model: mean pooling, unit length."""
    import json

    kinds = ("Transformer", "Pooling", "Normalize")
    places = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, place) in enumerate(zip(kinds, places, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 256, "do_lower_case": False}))
    for place in places[1:]:
        (folder / place).mkdir()
    pooling = {"word_embedding_dimension": dim, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def _word(number: int) -> str:
    """Letters only, another word for each number."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return "".join(letters[number // 26**place % 26] for place in range(4))
