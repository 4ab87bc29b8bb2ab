"""What is saved loads in transformers 4 as it is: logits, also far away, dtype, ties and token ids.

This file is also the process that runs the older version: `python test_older.py FOLDER …` with it in PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

PLACES = [0, 1, 50, 500, 1000, 1500, 2000]
VOCABULARY = 400
TEXT = "We the people, don't stop: 12345 café!"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 1024}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
LONGROPE |= {"original_max_position_embeddings": 4096}
GEMMA3 = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
GEMMA3 |= {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True},
    "Qwen2-YaRN": {"rope_parameters": YARN},
    "Llama": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "Qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "head_dim": 16},
    "Mistral": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "sliding_window": None},
    "Gemma3": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "Gemma3-4B": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16, "rope_parameters": GEMMA3},
    "SmolLM3": {"no_rope_layers": [1, 1], "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
    "Phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 250000.0, "partial_rotary_factor": 0.75}},
    "Phi3-longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 4096},
    "GPTNeoX": {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 0.25}},
    "StableLm": {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 0.25}},
    "Olmo2": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "Olmo3": {"sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
}
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
SHAPE |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer")
CLASSES += ("GemmaTokenizerFast", "GPTNeoXTokenizerFast", "CodeGenTokenizer", "T5TokenizerFast", "TokenizersBackend")
TEXTS = [
    TEXT,
    "  two  spaces\n\n\tand tabs \n",
    "naïve cafe\u0301 你好\uff0c世界 😀",
    "x=1;\ny += 2.50 # $3,000.75 1812³",
    "a",
]
CHAT = "{% for each in messages %}<s>{{ each.role }}: {{ each.content }}</s>\n{% endfor %}"


def token_ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (1, PLACES[-1] + 1), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def read(folder: Path) -> dict[str, Any]:
    """What the installed version makes of a saved LLM."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llm = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto")
    logits = llm.float().eval()(token_ids(), use_cache=False).logits[0, PLACES]
    own = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").dtype
    return {"logits": logits, "dtype": str(own), "ids": AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]}


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """What the installed version makes of texts and of a chat."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": TEXT}], tokenize=False)
    return {"ids": [tokenizer(text)["input_ids"] for text in TEXTS], "chat": chat}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A speech LM of every family, by name; of `Llama-own-head` the config says tied, but its file has a head, and
    `Gemma3-4B` comes out of a model that also sees."""
    import transformers
    from factories import make_tokenizer  # here, as the older version has none of this

    from salad_ray.config import AdapterConfig
    from salad_ray.model.speech_lm import EncoderSpec, SpeechLM

    folder, found = tmp_path_factory.mktemp("saved"), {}
    adapter = AdapterConfig(hidden_size=16, num_layers=1, num_heads=2, ffn_size=24)
    encoder = EncoderSpec(name="log_mel", path=None, revision=None, sampling_rate=16000, frame_rate=12.5, dim=6)
    for number, (name, settings) in enumerate((FAMILIES | {"Llama-own-head": {}}).items()):
        kind = name.partition("-")[0]
        config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")
        teacher, dtype = folder / f"{name}-teacher", torch.bfloat16 if number % 2 else torch.float32
        llm = getattr(transformers, f"{kind}ForCausalLM")(config(**(SHAPE | settings)))
        if name == "Gemma3-4B":
            whole = transformers.Gemma3Config(text_config=SHAPE | settings, vision_config=VISION)
            llm = transformers.Gemma3ForConditionalGeneration(whole)
        llm.to(dtype).save_pretrained(teacher)
        make_tokenizer("byte_level").save_pretrained(teacher)
        if name == "Llama-own-head":
            content = json.loads((teacher / "config.json").read_text())
            (teacher / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": True}))
        student = SpeechLM.from_teacher(str(teacher), None, adapter, encoder, 0, dtype)
        student.save_pretrained(folder / name)
        found[name] = folder / name / "llm"
    return found


@pytest.fixture(scope="module")
def saved_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of every class, one whose digits are single in tokenizer.json, whatever its class would do; as we save it."""
    from factories import make_tokenizer
    from tokenizers import Regex, pre_tokenizers, processors

    from salad_ray.model.loading import load_tokenizer
    from salad_ray.model.older import write_older_keys

    folder, found = tmp_path_factory.mktemp("tokenizers"), {}
    for name in CLASSES:
        made, saved = folder / name, folder / f"{name}-saved"
        tokenizer: Any = make_tokenizer("byte_level")
        digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
        bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.backend_tokenizer.post_processor = bos
        tokenizer.chat_template = CHAT
        tokenizer.save_pretrained(made)
        path = made / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": name}))
        for each in (made, saved):
            each.mkdir(exist_ok=True)
            (each / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": VOCABULARY}))
        load_tokenizer(str(made), None).save_pretrained(saved)
        write_older_keys(saved)
        found[name] = saved
    return found


@pytest.fixture(scope="module")
def older(
    saved: dict[str, Path], saved_tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What transformers 4 makes of them, by name."""
    default = Path(__file__).resolve().parents[2] / ".venv" / "transformers4"
    place = Path(os.environ.get("SALAD_TRANSFORMERS4", default))
    if not place.is_dir():
        pytest.skip(f"no transformers 4 at {place}; `make transformers4` installs it")
    target, all_folders = tmp_path_factory.mktemp("older") / "found.pt", saved | saved_tokenizers
    subprocess.run(
        [sys.executable, __file__, str(target), *(str(folder) for folder in all_folders.values())],
        env=os.environ | {"PYTHONPATH": str(place)},
        check=True,
    )
    return dict(zip(all_folders, torch.load(target, weights_only=True), strict=True))


@pytest.mark.parametrize("name", [*FAMILIES, "Llama-own-head"])
def test_an_older_version_reads_the_same_model(name: str, saved: dict[str, Path], older: dict[str, Any]) -> None:
    from salad_ray.model.loading import load_tokenizer

    now, then = read(saved[name]), older[name]
    assert (then["logits"] - now["logits"]).abs().max() < 1e-3 * now["logits"].std()
    assert then["dtype"] == now["dtype"]
    # Ours, since transformers 5 gives Qwen2 a pre-tokenizer of its own whatever tokenizer.json says.
    assert then["ids"] == load_tokenizer(str(saved[name]), None)(TEXT)["input_ids"]


@pytest.mark.parametrize("name", CLASSES)
def test_an_older_version_reads_the_same_tokens_and_chats(
    name: str, saved_tokenizers: dict[str, Path], older: dict[str, Any]
) -> None:
    from salad_ray.model.loading import load_tokenizer

    ours, folder = load_tokenizer(str(saved_tokenizers[name]), None), saved_tokenizers[name]
    assert ours("12345", add_special_tokens=False)["input_ids"] == [
        *(ours(digit, add_special_tokens=False)["input_ids"][0] for digit in "12345")
    ]
    assert older[name]["ids"] == [ours(text)["input_ids"] for text in TEXTS] == read_tokenizer(folder)["ids"]
    chat = ours.apply_chat_template([{"role": "user", "content": TEXT}], tokenize=False)
    assert older[name]["chat"] == chat == f"<s>user: {TEXT}</s>\n"


def test_this_version_reads_the_same_rope_beside_older_keys(tmp_path: Path) -> None:
    """Of every config class, with RoPE of one kind and of one for each kind of layer."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    from salad_ray.model.loading import UNUSABLE
    from salad_ray.model.older import write_older_keys

    compared = 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING:
        for rope in (None, YARN | {"partial_rotary_factor": 0.5}, GEMMA3["full_attention"]):
            try:
                kind(**({"rope_parameters": dict(rope)} if rope else {})).save_pretrained(tmp_path)
                before = CONFIG_MAPPING[kind.model_type].from_pretrained(tmp_path)
            except (*UNUSABLE, AttributeError):  # not of these settings
                continue
            write_older_keys(tmp_path)
            after = CONFIG_MAPPING[kind.model_type].from_pretrained(tmp_path)
            own = getattr(before, "rope_parameters", None) or {}
            for now in (after.rope_parameters, as_vllm_reads_it(after).rope_parameters) if own else ():
                assert {name: now.get(name) for name in own} == own, kind
            compared += bool(own)
    assert compared > 200


def as_vllm_reads_it(config: Any) -> Any:
    """What `patch_rope_parameters` of vLLM's transformers_utils/config.py does with what transformers 5 has read: older
    keys, by any of their names, are set once more, and RoPE is standardised from them."""
    older = {
        "rope_theta": ("rope_theta", "rotary_emb_base"),
        "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct", "rotary_emb_fraction"),
    }
    for key, names in older.items():
        found = [value for name in names if (value := getattr(config, name, None)) is not None]
        if found:
            setattr(config, key, found[0])
    config.standardize_rope_params()
    config.validate_rope()
    return config


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_that_llama_cpp_and_vllm_read_say_the_same_in_both_spellings(name: str, saved: dict[str, Path]) -> None:
    """llama.cpp's convert_hf_to_gguf.py: `architectures` chooses its class; RoPE is `rope_parameters`, before that
    `rope_scaling` with `rope_theta` (`rotary_emb_base`, `rope_local_base_freq`), and `partial_rotary_factor`; sizes by
    their names; Phi-3 wants `rope_theta` and `original_max_position_embeddings` at the top. vLLM reads what the
    installed transformers makes of config.json; before 0.24 that may be version 4, of which it takes `rope_scaling`,
    `rope_theta` and `partial_rotary_factor`. Its models read `tie_word_embeddings` and `head_dim`, its dtype is `dtype`
    or `torch_dtype`. Both read tokenizer.json and generation_config.json.
    """
    folder = saved[name]
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    whole = rope.get("full_attention", rope)
    sizes = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size max_position_embeddings"
    assert not [key for key in sizes.split() if not isinstance(config.get(key), int)]
    assert config["architectures"] == [f"{name.partition('-')[0]}ForCausalLM"]
    assert config["torch_dtype"] == config["dtype"]
    heads = config["hidden_size"] // config["num_attention_heads"]
    weights = load_file(folder / "model.safetensors")
    if query := [weights[key] for key in weights if key.endswith("layers.0.self_attn.q_proj.weight")]:
        assert query[0].shape[0] == config["num_attention_heads"] * (config.get("head_dim") or heads)
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in weights and "embed_out.weight" not in weights)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert isinstance(config["tie_word_embeddings"], bool)
    assert config["rope_theta"] == whole["rope_theta"]
    assert config.get("partial_rotary_factor", 1.0) == whole.get("partial_rotary_factor", 1.0)
    assert config.get("rope_local_base_freq") == rope.get("sliding_attention", {}).get("rope_theta")
    scaling = config.get("rope_scaling") or {"rope_type": "default"}
    assert scaling.get("rope_type", scaling.get("type")) == whole["rope_type"]
    own = {"rope_type", "type"}
    assert {key: whole[key] for key in scaling.keys() - own} == {key: scaling[key] for key in scaling.keys() - own}
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "generation_config.json").is_file()


def test_no_weight_of_an_export_is_empty(saved: dict[str, Path]) -> None:
    for name, folder in saved.items():
        weights = load_file(folder / "model.safetensors")
        assert weights
        assert not [key for key, weight in weights.items() if weight.numel() == 0], name


def test_a_head_of_its_own_is_not_called_tied(saved: dict[str, Path]) -> None:
    tied = {
        name: json.loads((folder / "config.json").read_text())["tie_word_embeddings"] for name, folder in saved.items()
    }
    assert tied["Qwen2"]
    assert not tied["Llama-own-head"]


if __name__ == "__main__":
    places = [Path(folder) for folder in sys.argv[2:]]
    found = [(read if (place / "model.safetensors").exists() else read_tokenizer)(place) for place in places]
    torch.save(found, sys.argv[1])
