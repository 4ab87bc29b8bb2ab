"""What a text LLM must be is tried out: right models pass to 1e-4, and each kind of fault is refused by its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from factories import make_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, processors
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedModel

from salad_ray.config import AdapterConfig
from salad_ray.configfile import parse_config
from salad_ray.distill.start import faults, start_divergences
from salad_ray.evaluation.scoring import Query, score
from salad_ray.model.listen import prompt_ids
from salad_ray.model.loading import ModelError, load_tokenizer
from salad_ray.model.packed import hidden_states, needs_mask, window
from salad_ray.model.speech_lm import EncoderSpec, SpeechLM, lm_head, load_text_lm
from salad_ray.model.trial import TOLERANCE, layer_kinds, small_copy, try_out
from salad_ray.sequences.interleave import prefix_ids
from salad_ray.stages import teacher

SHAPE: dict[str, Any] = {
    **{"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
PER_LAYER = {"vocab_size_per_layer_input": 400, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
GPT2 = {"vocab_size": 400, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
ADAPTER = AdapterConfig(hidden_size=16, num_layers=2, num_heads=2, ffn_size=24)
ENCODER = EncoderSpec(name="log_mel", path=None, revision=None, sampling_rate=16000, frame_rate=12.5, dim=6)


def save(folder: Path, name: str, config: str = "", **settings: Any) -> str:
    torch.manual_seed(0)
    kind = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    shape = GPT2 if name == "GPT2" else SHAPE
    kind(getattr(transformers, config or f"{name}Config")(**shape | settings)).save_pretrained(folder)
    make_tokenizer("byte_level").save_pretrained(folder)
    return str(folder)


def packed_off(llm: PreTrainedModel) -> float:
    """How far logits of packed samples are from those that the model makes of each by itself."""
    lengths = (25, 11, 20)
    ids = torch.randint(3, 400, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        packed = hidden_states(llm, ids[None], positions[None])[0] @ lm_head(llm).T
        alone = torch.cat([llm(input_ids=part[None], use_cache=False).logits[0] for part in ids.split(lengths)])
    return float((packed - alone).abs().max() / alone.std())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Qwen3Moe", EXPERTS | {"head_dim": 16}),
        ("Mixtral", EXPERTS),
        ("GPT2", {}),
        ("Phi", {"partial_rotary_factor": 0.5}),
        ("Gemma2", {"head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 2.0}),
        ("Granite", {"logits_scaling": 8.0, "attention_dropout": 0.1}),
        ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 2048}),
        ("Falcon", {"alibi": False, "multi_query": True}),
    ],
)
def test_what_is_accepted_packs_and_begins_as_its_teacher(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    path = save(tmp_path, name, **settings)
    llm = load_text_lm(path, None)
    found = llm.trial
    assert max(found[each] for each in ("embeddings", "logits", "packed", "far", "train_mode")) <= TOLERANCE
    assert found["mask"] == needs_mask(llm) == (name in ("OPT", "Falcon"))
    assert packed_off(llm) <= TOLERANCE
    student = SpeechLM.from_teacher(path, None, ADAPTER, ENCODER, 0)
    assert student.training
    divergences = start_divergences(student, llm)
    assert max(map(abs, divergences.values())) <= 1e-6
    assert not faults(divergences, torch.float32)


def test_the_start_is_measured_with_attention_that_is_told_the_bounds(tmp_path: Path) -> None:
    path = save(tmp_path, "Llama")
    student = SpeechLM.from_teacher(path, None, ADAPTER, ENCODER, 0, attention="varlen")
    divergences = start_divergences(student, load_text_lm(path, None, attention="varlen"))
    assert divergences.keys() == {"student", "packed", "logits"}
    assert max(map(abs, divergences.values())) <= 1e-5


def test_a_saved_model_is_tried_for_the_context_that_it_was_trained_on(tmp_path: Path) -> None:
    settings = {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}
    path = save(tmp_path / "teacher", "Llama", **settings)
    with pytest.raises(ModelError, match=r"set pack\.context to 64 or less"):
        load_text_lm(path, None)
    SpeechLM.from_teacher(path, None, ADAPTER, ENCODER, 0, context=64).save_pretrained(tmp_path / "model")
    assert SpeechLM.from_pretrained(tmp_path / "model").config.context == 64


def test_layers_that_are_in_no_list_are_told_at_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not when the engine is made, after all speech."""
    path = save(tmp_path, "GPT2")
    plain = {"run_dir": str(tmp_path / "run"), "model": {"teacher": path}, "pack": {"context": 64}}
    wanted = {"optimizer": "muon", "compile": True, "activation_checkpointing": True}
    config = parse_config(plain | {"distill": wanted})
    assert teacher._verify(path, config)["vocabulary"] == 400
    monkeypatch.setattr(teacher, "checkpoint_layers", lambda _: 0)
    with pytest.raises(ModelError, match=r"set distill\.activation_checkpointing=false$"):
        teacher._verify(path, config)
    monkeypatch.setattr(teacher, "decoder_layers", lambda _: None)
    with pytest.raises(ModelError, match=r"set distill\.optimizer=adamw and distill\.compile=false and distill\.act"):
        teacher._verify(path, config)
    assert teacher._verify(path, parse_config(plain))["vocabulary"] == 400


def test_choices_that_share_a_row_need_positions(tmp_path: Path) -> None:
    """MPT's ALiBi goes by places in the row."""
    shape = {"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 128, "vocab_size": 400}
    torch.manual_seed(0)
    transformers.MptForCausalLM(transformers.MptConfig(**shape)).save_pretrained(tmp_path)
    make_tokenizer("byte_level").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="Mpt"):
        load_text_lm(str(tmp_path), None)


@pytest.mark.parametrize(
    ("name", "config", "settings", "words"),
    [
        ("Llama", "", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}, "set pack.context to 64 or less"),
        ("Qwen3Next", "", EXPERTS | {"head_dim": 16, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 2,
         "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}, "keeps a state"),
        ("Gemma3n", "Gemma3nTextConfig", PER_LAYER | {"head_dim": 16, "intermediate_size": [48] * 4, "laurel_rank": 4,
         "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "activation_sparsity_pattern": [0.0] * 4},
         "more of token ids than their embeddings"),
        ("GptOss", "", EXPERTS | {"head_dim": 8}, "cannot keep packed samples apart"),
    ],
)  # fmt: skip
def test_what_would_be_wrong_in_silence_is_refused_by_its_reason(
    name: str, config: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = save(tmp_path, name, config, **settings)
    with pytest.raises(ModelError, match=words) as caught:
        load_text_lm(path, None)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "config", "settings", "words"),
    [
        ("Llama4", "Llama4TextConfig", {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2},
         "has no decoder that gives hidden states by itself"),
        ("ModernBertDecoder", "", {"local_attention": 8}, "has no decoder that gives hidden states by itself"),
        ("Gemma4", "Gemma4TextConfig", PER_LAYER | {"head_dim": 16, "global_head_dim": 16,
         "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}, "reads nothing but token ids"),
        ("Electra", "", {"embedding_size": 16, "is_decoder": True}, "has layers between hidden states and head"),
        ("Falcon", "", {"alibi": True, "multi_query": False}, r"samples apart \(off by \d standard deviations\)"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_the_model_cannot_do_and_keeps_the_error_inside_it_as_cause(
    name: str, config: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = save(tmp_path, name, config, **settings)
    with pytest.raises(ModelError, match=f"{name}ForCausalLM .*{words}.*; use ") as caught:
        load_text_lm(path, None)
    inside = caught.value.__cause__
    assert (inside is None) == (name == "Falcon")  # which takes no mask, and that is not what it is refused for
    assert inside is None or str(inside).split(".")[0] not in str(caught.value)


def test_a_model_of_which_no_small_copy_can_be_made_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | {"vocab_size": 399})).eval()

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("shape '[1, 2]' is invalid")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "_from_config", fails)
    with pytest.raises(ModelError, match=r"^LlamaForCausalLM cannot be tried out: no small copy of it") as caught:
        try_out(llm)
    assert "shape" not in str(caught.value)
    assert str(caught.value.__cause__) == "shape '[1, 2]' is invalid"


def test_what_is_seldom_random_in_training_is_found(tmp_path: Path) -> None:
    """Phi-3.5-MoE draws among experts that score nearly alike, in train mode only."""
    path = save(tmp_path, "Phimoe", **EXPERTS | {"router_jitter_noise": 0.01, "input_jitter_noise": 0.0})
    with pytest.raises(ModelError, match="PhimoeForCausalLM is random in training"):
        load_text_lm(path, None)


def test_a_mask_is_given_also_where_positions_are_few(tmp_path: Path) -> None:
    """The first try, at 2,048 positions, fails after it was found that a mask is needed."""
    path = save(tmp_path, "OPT", ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=128)
    llm = load_text_lm(path, None)
    assert needs_mask(llm)
    assert packed_off(llm) <= TOLERANCE


def test_layers_that_differ_by_the_config_alone_are_of_different_kinds() -> None:
    config = transformers.LlamaConfig(**SHAPE)
    llm = transformers.LlamaForCausalLM(config).eval()
    assert len(set(layer_kinds(llm))) == 1
    llm.config.switched = [1, 1, 0, 1]
    assert [kind == layer_kinds(llm)[0] for kind in layer_kinds(llm)] == [True, True, False, True]


def test_a_window_is_known_by_any_name() -> None:
    config = transformers.LlamaConfig(**SHAPE)
    assert window(config) is None
    config.local_window_size = 300
    config.sliding_window, config.max_window_layers, config.use_sliding_window = 500, 2, True
    config.sliding_window_pattern = config._sliding_window_pattern = 6
    assert window(config) == 300
    config.layer_types = ["full_attention"] * 4
    assert window(config) is None


def test_local_attention_scores_within_its_window_as_alone_and_not_beyond(tmp_path: Path) -> None:
    """GPT-Neo's goes by places in the row, and choices that share a prompt are further on than their positions."""
    shape = {"hidden_size": 32, "num_layers": 2, "attention_types": [[["global", "local"], 1]], "num_heads": 4}
    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(**shape, vocab_size=400, window_size=16, initializer_range=0.2)
    transformers.GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer("byte_level").save_pretrained(tmp_path)
    llm = load_text_lm(str(tmp_path), None)
    prompt, choices = [5, 9, 30, 41, 8], [[50, 60, 70, 80], [90, 11], [12, 13, 14, 15]]
    shorter = Query([7], None, [], [[1, 2], [3]], 0)  # which is padded
    [found, _] = score(llm, [Query(prompt, None, [], choices, 0), shorter])
    for value, choice in zip(found, choices, strict=True):
        with torch.no_grad():
            logits = llm(input_ids=torch.tensor([prompt + choice])).logits[0].log_softmax(-1)
        alone = sum(logits[len(prompt) - 1 + place, token] for place, token in enumerate(choice))
        assert value == pytest.approx(float(alone), abs=1e-4)
    with pytest.raises(ModelError, match="a sliding window of 16 positions, but a query takes"):
        score(llm, [Query(prompt * 4, None, [], choices, 0)])


def test_varlen_refuses_scores_that_it_would_not_cap(tmp_path: Path) -> None:
    path = save(tmp_path, "Gemma2", head_dim=16, sliding_window=8)
    llm = load_text_lm(path, None, attention="varlen")
    with pytest.raises(ModelError, match="Gemma2Attention have a cap or sinks, which varlen does not know"):
        hidden_states(llm, torch.arange(9)[None], torch.arange(9)[None])


def test_a_context_within_the_original_one_is_welcome(tmp_path: Path) -> None:
    path = save(tmp_path, "Llama", rope_parameters=DYNAMIC, max_position_embeddings=64)
    assert load_text_lm(path, None, context=64).trial["context"] == 64


def test_more_positions_than_a_table_has_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, "GPT2")
    with pytest.raises(ModelError, match=r"has 128 positions, but rows are to have 2,048; set pack\.context to 128"):
        load_text_lm(path, None, context=2048)
    assert load_text_lm(path, None).trial["context"] == 128


def test_the_small_copy_has_a_layer_of_every_kind_and_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.Gemma3TextConfig(**SHAPE | {"num_hidden_layers": 14, "head_dim": 16})
    llm = transformers.Gemma3ForCausalLM(config).eval()
    small = small_copy(llm, "sdpa")
    assert small.config.num_hidden_layers == 6  # five of a sliding window, one without
    assert set(layer_kinds(small)) == set(layer_kinds(llm))
    assert small.config.sliding_window == 8
    state = torch.get_rng_state()
    found = try_out(llm)
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.setattr("salad_ray.model.trial.small_copy", None)
    assert try_out(llm) is found


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


def save_multimodal(folder: Path, name: str, text: str, **settings: Any) -> PreTrainedModel:
    """A random model that also sees, as its makers would save it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        text_config=SHAPE | {"model_type": text, "head_dim": 16, "sliding_window": 8} | settings, vision_config=VISION
    )
    whole: PreTrainedModel = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    whole.save_pretrained(folder)
    make_tokenizer("byte_level").save_pretrained(folder)
    return whole


@pytest.mark.parametrize(("name", "text", "kind"), [("Gemma3", "gemma3_text", "Gemma3"), ("Llava", "llama", "Llama")])
def test_of_a_multimodal_llm_the_text_model_is_taken_alone(name: str, text: str, kind: str, tmp_path: Path) -> None:
    """google/gemma-3-4b-pt: what sees is neither kept, nor trained, nor saved; logits of text are the whole's own."""
    whole = save_multimodal(tmp_path / "whole", name, text)
    student = SpeechLM.from_teacher(str(tmp_path / "whole"), None, ADAPTER, ENCODER, 0)
    assert type(student.llm).__name__ == f"{kind}ForCausalLM"
    assert not any("vision" in weight or "projector" in weight for weight, _ in student.named_parameters())
    student.save_pretrained(tmp_path / "model")
    content = json.loads((tmp_path / "model" / "llm" / "config.json").read_text())
    assert content["architectures"] == [f"{kind}ForCausalLM"]
    assert content["model_type"] == text
    assert "vision_config" not in content
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model" / "llm")
    ids = torch.randint(3, 400, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = whole(input_ids=ids).logits
        for llm in (student.llm, saved.eval()):
            assert (llm(input_ids=ids).logits - own).abs().max() <= 1e-5 * own.std()


def test_fuyu_is_taken_for_its_persimmon(tmp_path: Path) -> None:
    """It sees without a vision tower, by a linear layer beside the text model."""
    torch.manual_seed(0)
    shape = SHAPE | {"num_hidden_layers": 2, "patch_size": 4, "num_channels": 1, "image_size": 8}
    whole = transformers.FuyuForCausalLM(transformers.FuyuConfig(text_config=SHAPE, **shape)).eval()
    whole.save_pretrained(tmp_path)
    make_tokenizer("byte_level").save_pretrained(tmp_path)
    llm = load_text_lm(str(tmp_path), None)
    assert type(llm).__name__ == "PersimmonForCausalLM"
    ids = torch.randint(3, 400, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = whole(input_ids=ids).logits
        assert (llm(input_ids=ids).logits - own).abs().max() <= 1e-5 * own.std()


def test_a_weight_of_the_text_model_that_is_missing_is_named_and_one_that_sees_is_not(tmp_path: Path) -> None:
    save_multimodal(tmp_path, "Gemma3", "gemma3_text")
    weights = load_file(tmp_path / "model.safetensors")
    of = {part: [name for name in weights if part in name] for part in ("vision", "language_model.model.layers.2.mlp")}
    for names in of.values():
        assert names
        del weights[names[0]]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        if "vision" in names[0]:
            load_text_lm(str(tmp_path), None)
    with pytest.raises(ModelError, match=r"do not fit its config: 1 missing: .*layers\.2\.mlp"):
        load_text_lm(str(tmp_path), None)


def test_a_text_model_that_is_not_the_whole_on_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_multimodal(tmp_path, "Llava", "llama")
    own = transformers.LlavaForConditionalGeneration.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        outputs = own(*args, **kwargs)
        outputs.logits = 1.01 * outputs.logits
        return outputs

    monkeypatch.setattr(transformers.LlavaForConditionalGeneration, "forward", scaled)
    with pytest.raises(ModelError, match="LlamaForCausalLM makes another thing of text than LlavaForConditionalGener"):
        load_text_lm(str(tmp_path), None)


def test_a_multimodal_llm_without_a_class_for_its_text_is_refused(tmp_path: Path) -> None:
    content = {"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"is a model of more than text \(qwen2_vl\), and transformers has no class"):
        load_text_lm(str(tmp_path), None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    path = save(tmp_path, "Qwen2")
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"][3] = value
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 of its weights hold values that are not finite: model\.norm\.weight"):
        load_text_lm(path, None)


def test_a_student_that_is_not_its_teacher_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, "Qwen2")
    teacher, student = load_text_lm(path, None), SpeechLM.from_teacher(path, None, ADAPTER, ENCODER, 0)
    for layer in student.llm.model.layers:
        layer.self_attn.attention_dropout = 0.3
    divergences = start_divergences(student, teacher)
    assert divergences["student"] > 0.01
    [fault] = faults(divergences, torch.float32)
    assert fault.startswith("the student in train mode is not its teacher before step 0 (KL ")
    assert faults({"packed": float("nan")}, torch.bfloat16)


# Tokenizers: what tokenizer.json says, whatever other files call it.

DIGITS = pre.Sequence([pre.Split(Regex(r"\d"), "isolated"), pre.ByteLevel(add_prefix_space=False)])
TEXT = "In 1969 it cost 12345 dollars, don't we'll."


def save_tokenizer(folder: Path, bos: bool, **settings: Any) -> Tokenizer:
    tokenizer: Any = make_tokenizer("byte_level").backend_tokenizer
    tokenizer.pre_tokenizer = DIGITS
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    kind = settings.pop("model_type", "llama")
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens | settings))
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "vocab_size": 400}))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        ("PreTrainedTokenizerFast", "qwen2"),
        ("GPT2Tokenizer", "llama"),
        ("LlamaTokenizerFast", "qwen2"),
        ("GPTNeoXTokenizerFast", "gpt_neox"),
        ("GemmaTokenizerFast", "gemma"),
        ("T5TokenizerFast", "llama"),  # these cannot be built of another's vocabulary
        ("XLMRobertaTokenizer", "llama"),
        ("PegasusTokenizer", "llama"),
        ("BigBirdTokenizer", "llama"),
        ("BertTokenizerFast", "llama"),  # these fail when they encode
        ("GemmaTokenizerFast", "llama"),
    ],
)
def test_ids_and_bos_are_those_of_tokenizer_json(kind: str, model_type: str, bos: bool, tmp_path: Path) -> None:
    own = save_tokenizer(tmp_path, bos, tokenizer_class=kind, model_type=model_type)
    tokenizer = load_tokenizer(str(tmp_path), None)
    assert tokenizer(TEXT)["input_ids"] == own.encode(TEXT).ids
    assert prefix_ids(tokenizer) == [1] * bos


def test_a_bos_that_is_promised_and_not_added_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, False, tokenizer_class="PreTrainedTokenizerFast", add_bos_token=True)
    with pytest.raises(ModelError, match=r"says add_bos_token, but its tokenizer\.json adds no BOS"):
        load_tokenizer(str(tmp_path), None)


def test_a_bos_that_is_promised_and_has_no_name_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"add_bos_token": True, "bos_token": None}
    save_tokenizer(tmp_path, False, tokenizer_class="PreTrainedTokenizerFast", **settings)
    with pytest.raises(ModelError, match=r"says add_bos_token, but names no bos_token"):
        load_tokenizer(str(tmp_path), None)


def test_a_token_that_tokenizer_json_does_not_know_is_refused(tmp_path: Path) -> None:
    added = {"382": {"content": "<tool>", "special": False, "normalized": False, "lstrip": False, "rstrip": False}}
    added["382"] |= {"single_word": False}
    save_tokenizer(tmp_path, False, tokenizer_class="PreTrainedTokenizerFast", added_tokens_decoder=added)
    with pytest.raises(ModelError, match=r"makes other ids of 'a <tool> b' than its tokenizer\.json"):
        load_tokenizer(str(tmp_path), None)


def test_a_pad_token_that_tokenizer_json_does_not_know_does_no_harm(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, False, tokenizer_class="PreTrainedTokenizerFast", pad_token="<nothing>")
    assert load_tokenizer(str(tmp_path), None).pad_token == "<nothing>"


@pytest.mark.parametrize("role", ["bos_token", "eos_token", "unk_token"])
def test_a_pad_token_that_is_also_another_and_is_not_known_is_refused(role: str, tmp_path: Path) -> None:
    settings = {role: "<nothing>", "pad_token": "<nothing>"}
    save_tokenizer(tmp_path, False, tokenizer_class="PreTrainedTokenizerFast", **settings)
    with pytest.raises(ModelError, match="makes other ids of 'a <nothing> b'"):
        load_tokenizer(str(tmp_path), None)


def test_gpt2_s_own_token_is_added_to_no_other_vocabulary(tmp_path: Path) -> None:
    own = save_tokenizer(
        tmp_path, False, tokenizer_class="GPT2Tokenizer", bos_token=None, eos_token=None, unk_token=None
    )
    text = "a <|endoftext|> b"
    assert load_tokenizer(str(tmp_path), None)(text)["input_ids"] == own.encode(text).ids


def test_a_prompt_that_begins_with_one_of_two_bos_has_two(tmp_path: Path) -> None:
    tokenizer: Any = make_tokenizer("byte_level")
    two = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = two
    for prompt in ("{speech}", "<s>{speech}", "<s><s>{speech}"):
        assert prompt_ids(tokenizer, prompt) == ([1, 1], [])


def test_a_prompt_that_begins_with_bos_has_one(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, True, tokenizer_class="PreTrainedTokenizerFast")
    tokenizer = load_tokenizer(str(tmp_path), None)
    assert prompt_ids(tokenizer, "<s>{speech}") == prompt_ids(tokenizer, "{speech}") == ([1], [])


# The cases: folders of the same kinds, with the right value of each.


@pytest.mark.slow
@pytest.mark.parametrize("script", ["tokenizer_class", "bos_lost"])
def test_no_case_of_a_tokenizer_differs(script: str, cases: Path, shared_data: Path) -> None:
    tiny = str(shared_data / "models" / "tiny-teacher")
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"SMOLLM2": tiny, "TINY_TEACHER": tiny, "PYTHONPATH": str(root), "SALAD_TESTS": f"{root}/tests"}
    ended = subprocess.run(
        [sys.executable, str(cases / "models" / f"{script}.py")], env=env, capture_output=True, text=True, check=True
    )
    assert len(ended.stdout.splitlines()) > 20
    for word in ("DIFFERENT", "special tokens differ", "BOS LOST"):
        assert word not in ended.stdout
