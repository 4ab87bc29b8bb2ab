"""The speech LM: packing, saving and loading, and every way in which a model folder can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from factories import make_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from salad_ray.config import AdapterConfig, DistillConfig
from salad_ray.model import packed, speech_lm
from salad_ray.model.loading import load_tokenizer
from salad_ray.model.speech_lm import (
    EncoderSpec,
    ModelError,
    SpeechLM,
    hidden_states,
    lm_head,
    load_text_lm,
    parameter_groups,
    weights_fingerprint,
)
from salad_ray.sequences.batch import Batch

ADAPTER = AdapterConfig(hidden_size=16, num_layers=2, num_heads=2, ffn_size=24)
ENCODER = EncoderSpec(name="log_mel", path=None, revision=None, sampling_rate=16000, frame_rate=12.5, dim=6)
SHAPES = ("Qwen2", "Qwen3", "Llama")


def make_llm(shape: str = "Qwen2", **settings: Any) -> PreTrainedModel:
    """A tiny random LM; its weights are large, so that attention across segments would show."""
    chosen = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    chosen |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3} | settings
    torch.manual_seed(0)
    return getattr(transformers, f"{shape}ForCausalLM")(getattr(transformers, f"{shape}Config")(**chosen))


def save_teacher(folder: Path, shape: str = "Qwen2", **settings: Any) -> str:
    make_llm(shape, **settings).save_pretrained(folder)
    make_tokenizer("byte_level").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


def make_student(path: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> SpeechLM:
    return SpeechLM.from_teacher(path, None, ADAPTER, ENCODER, seed, dtype)


def positions_of(lengths: list[int], width: int) -> Tensor:
    """Restarting positions of a row; what is left of it is padding, a segment of its own."""
    return torch.cat([torch.arange(length) for length in [*lengths, width - sum(lengths)]])


def make_batch(rows: list[list[list[int]]], width: int = 24) -> Batch:
    """Rows of segments; a segment lists its spans: n text tokens as n, n speech frames as -n."""
    generator = torch.Generator().manual_seed(sum(abs(span) for row in rows for segment in row for span in segment))
    token_ids = torch.randint(3, 400, (len(rows), width), generator=generator)
    positions, speech, spans = [], [], []
    for b, row in enumerate(rows):
        positions.append(positions_of([sum(map(abs, segment)) for segment in row], width))
        start = b * width
        for span in (span for segment in row for span in segment):
            if span < 0:
                speech += range(start, start - span)
                spans.append(-span)
            start += abs(span)
    speech_index = torch.tensor(speech, dtype=torch.long)
    lengths = torch.tensor(spans, dtype=torch.long)
    longest = max(spans, default=0)
    empty = torch.zeros(0, dtype=torch.long)
    return Batch(
        token_ids=token_ids.flatten().index_fill(0, speech_index, 0).view_as(token_ids),
        position_ids=torch.stack(positions),
        speech_index=speech_index,
        frames=torch.randn(len(spans), longest, 6, generator=generator),
        frame_mask=torch.arange(longest) < lengths[:, None],
        teacher_ids=token_ids,
        teacher_position_ids=torch.stack(positions),
        student_index=empty,
        teacher_index=empty,
        labels=empty,
        distance=empty,
        segment=empty,
        num_positions=sum(abs(span) for row in rows for segment in row for span in segment),
        num_teacher_positions=0,
        num_pairs=0,
        num_teacher_pairs=0,
    )


ROWS = [[[3, -4, 2], [2, -5, 1]], [[-1, 6], [1], [2, -3, 4, -2, 2]]]


def segments_alone(batch: Batch, rows: list[list[list[int]]]) -> list[tuple[slice, Batch]]:
    """Each segment as a batch of its own, with the slice of the flat B · T positions it came from."""
    parts, span = [], 0
    width = batch.token_ids.shape[1]
    for b, row in enumerate(rows):
        start = b * width
        for segment in row:
            length = sum(map(abs, segment))
            here, mine = slice(start, start + length), slice(span, span + sum(part < 0 for part in segment))
            inside = batch.speech_index[(batch.speech_index >= here.start) & (batch.speech_index < here.stop)]
            alone = replace(
                batch,
                token_ids=batch.token_ids.flatten()[None, here],
                position_ids=torch.arange(length)[None],
                speech_index=inside - start,
                frames=batch.frames[mine],
                frame_mask=batch.frame_mask[mine],
            )
            parts.append((here, alone))
            start, span = here.stop, mine.stop
    return parts


def set_attention(llm: PreTrainedModel, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose an attention; the flash kernels, which need a GPU, are stood in for, what feeds them is real."""

    def flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **settings: Any) -> Tensor:
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        bounds, longest = (cu_seqlens_q, cu_seqlens_k), int(cu_seqlens_q.diff().max())
        return packed.varlen_attn(q, k, v, *bounds, longest, longest, scale=settings["softmax_scale"], enable_gqa=True)

    def process(**settings: Any) -> dict[str, Any]:
        assert settings["is_causal"]
        return {"softmax_scale": settings["softmax_scale"]}

    def refuse(*args: Any, **settings: Any) -> None:
        raise AssertionError("flash attention without the bounds of the segments")

    flash_module = transformers.modeling_flash_attention_utils
    functions = ((refuse, flash, refuse, refuse, refuse), (process, refuse))
    monkeypatch.setattr(flash_module, "lazy_import_flash_attention", lambda name: functions)
    llm.config._attn_implementation = attention


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2", "varlen"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("train", [False, True])
def test_a_packed_segment_equals_the_segment_alone(
    shape: str, attention: str, train: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_student(save_teacher(tmp_path, shape)).train(train)
    set_attention(student.llm, attention, monkeypatch)
    batch = make_batch(ROWS)
    packed = student(batch).flatten(0, 1)
    text = student.text_hidden(batch.teacher_ids, batch.teacher_position_ids).flatten(0, 1)
    student.llm.config._attn_implementation = "sdpa"
    for here, alone in segments_alone(batch, ROWS):
        torch.testing.assert_close(packed[here], student(alone)[0], rtol=1e-4, atol=1e-4)
        ids = batch.teacher_ids.flatten()[None, here]
        torch.testing.assert_close(text[here], student.text_hidden(ids, alone.position_ids)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [1, 4, 8, 9, 100])
def test_varlen_reaches_back_as_far_as_the_window(window: int) -> None:
    """A window of n positions is one's own and n − 1 before it, as transformers masks them."""
    config = MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, sliding_window=window,
    )  # fmt: skip
    llm = MistralForCausalLM(config).eval()
    ids, positions = torch.arange(24)[None] * 7 % 50, positions_of([9, 8], 24)[None]
    found = {}
    for attention in ("sdpa", "varlen"):
        llm.config._attn_implementation = attention
        found[attention] = hidden_states(llm, ids, positions)
    torch.testing.assert_close(found["varlen"], found["sdpa"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2", "varlen"])
def test_the_packing_test_would_notice_a_leak(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm()
    set_attention(llm, attention, monkeypatch)
    ids = make_batch(ROWS).teacher_ids[:1]
    joined = hidden_states(llm, ids, torch.arange(24)[None])
    apart = hidden_states(llm, ids, positions_of([9, 8], 24)[None])
    assert (joined - apart)[0, 9:17].abs().max() > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_states_times_head_are_the_models_logits(shape: str) -> None:
    llm = make_llm(shape).eval()
    ids = make_batch([[[20]]]).teacher_ids
    logits = hidden_states(llm, ids, torch.arange(24)[None]) @ lm_head(llm).T
    torch.testing.assert_close(logits, llm(ids).logits, rtol=1e-4, atol=1e-4)


def test_speech_stands_where_the_batch_says(teacher: str) -> None:
    student = make_student(teacher)
    batch = make_batch(ROWS)
    seen: list[Tensor] = []
    student.llm.get_decoder().register_forward_pre_hook(
        lambda _, args, inputs: seen.append(inputs["inputs_embeds"]), with_kwargs=True
    )
    student(batch)
    flat, expected = seen[0].flatten(0, 1), student.adapter(batch.frames, batch.frame_mask)
    torch.testing.assert_close(flat[batch.speech_index], expected)
    text = torch.ones(len(flat), dtype=torch.bool).index_fill(0, batch.speech_index, False)
    embedded = student.llm.get_input_embeddings()(batch.token_ids).flatten(0, 1)
    assert torch.equal(flat[text], embedded[text])


def test_the_gradient_reaches_every_weight_of_the_forward(teacher: str) -> None:
    student = make_student(teacher)
    student(make_batch(ROWS)).square().sum().backward()
    without = [name for name, parameter in student.named_parameters() if parameter.grad is None]
    assert without == ["llm.lm_head.weight"]
    assert all(parameter.grad.abs().sum() > 0 for parameter in student.adapter.parameters())


def test_a_batch_of_text_alone_equals_text_hidden_and_still_uses_the_adapter(teacher: str) -> None:
    student = make_student(teacher)
    batch = make_batch([[[9], [5]]])
    hidden = student(batch)
    torch.testing.assert_close(hidden, student.text_hidden(batch.token_ids, batch.position_ids))
    hidden.sum().backward()
    assert all(parameter.grad is not None for parameter in student.adapter.parameters())


def test_the_student_starts_as_the_teacher(teacher: str) -> None:
    student, llm = make_student(teacher), load_text_lm(teacher, None)
    assert weights_fingerprint(student.llm) == weights_fingerprint(llm)
    with torch.no_grad():
        llm.get_input_embeddings().weight[7, 3] += 1e-6
    assert weights_fingerprint(student.llm) != weights_fingerprint(llm)


def test_the_adapter_starts_at_the_scale_of_the_embeddings(tmp_path: Path) -> None:
    student = make_student(save_teacher(tmp_path, initializer_range=0.05))
    output = student.adapter(*(getattr(make_batch(ROWS), name) for name in ("frames", "frame_mask")))
    wanted = student.llm.get_input_embeddings().weight.square().mean().sqrt().item()
    assert output.square().mean().sqrt().item() == pytest.approx(wanted, rel=0.4)


def test_the_seed_decides_the_adapter(teacher: str) -> None:
    prints = [weights_fingerprint(make_student(teacher, seed=seed).adapter) for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_bfloat16_runs_as_loaded_and_as_cast_later(teacher: str) -> None:
    loaded, cast = make_student(teacher, torch.bfloat16), make_student(teacher).bfloat16()
    assert weights_fingerprint(loaded.llm) == weights_fingerprint(cast.llm)
    batch = make_batch(ROWS)
    assert loaded(batch).dtype == torch.bfloat16
    cast.adapter = loaded.adapter
    assert torch.equal(loaded(batch), cast(batch))


def test_casting_keeps_the_llms_rotary_frequencies_exact(teacher: str) -> None:
    student = make_student(teacher)
    frequencies = {name: buffer.clone() for name, buffer in student.named_buffers()}
    student.to(torch.bfloat16)
    assert frequencies
    for name, buffer in student.named_buffers():
        assert torch.equal(buffer, frequencies[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading_is_bit_exact(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    student = make_student(save_teacher(tmp_path / "teacher", tie_word_embeddings=tied), dtype)
    student.save_pretrained(tmp_path / "model")
    loaded = SpeechLM.from_pretrained(tmp_path / "model")
    assert weights_fingerprint(loaded) == weights_fingerprint(student)
    assert loaded.config == student.config
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    batch = make_batch(ROWS)
    assert torch.equal(loaded(batch), student(batch))
    wide = SpeechLM.from_pretrained(tmp_path / "model", torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "teacher"]


def test_the_llm_half_is_a_plain_hugging_face_folder(teacher: str, tmp_path: Path) -> None:
    student = make_student(teacher, torch.bfloat16)
    student.save_pretrained(tmp_path / "model")
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "model" / "llm", dtype="auto")
    assert weights_fingerprint(llm) == weights_fingerprint(student.llm)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model" / "llm")
    assert tokenizer.encode("we the people") == make_tokenizer("byte_level").encode("we the people")
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pth")]


@pytest.mark.parametrize("tied", [False, True])
def test_weights_gathered_elsewhere_can_be_saved(tied: bool, tmp_path: Path) -> None:
    student = make_student(save_teacher(tmp_path / "teacher", tie_word_embeddings=tied))
    gathered = {name: (tensor + 1).bfloat16() for name, tensor in student.state_dict().items()}
    student.save_pretrained(tmp_path / "model", state_dict=gathered)
    loaded = SpeechLM.from_pretrained(tmp_path / "model", torch.bfloat16)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, gathered[name]), name


def test_saving_replaces_a_speech_lm_but_nothing_else(teacher: str, tmp_path: Path) -> None:
    make_student(teacher, seed=1).save_pretrained(tmp_path / "model")
    student = make_student(teacher, seed=2)
    student.save_pretrained(tmp_path / "model")
    assert weights_fingerprint(SpeechLM.from_pretrained(tmp_path / "model")) == weights_fingerprint(student)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match="something other than a speech LM"):
        student.save_pretrained(tmp_path / "notes")
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"


def test_a_save_that_fails_leaves_the_old_model(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = make_student(teacher)
    student.save_pretrained(tmp_path / "model")

    def fail(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(speech_lm, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        make_student(teacher, seed=1).save_pretrained(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert weights_fingerprint(SpeechLM.from_pretrained(tmp_path / "model")) == weights_fingerprint(student)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit_weights(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


TEXT_LM_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "config cut": (lambda f: truncate(f / "config.json"), "not a valid JSON file"),
    "unknown type": (lambda f: edit_json(f / "config.json", model_type="x9"), "model type `x9`"),
    "not causal": (lambda f: edit_json(f / "config.json", model_type="t5"), "Unrecognized configuration class"),
    "wrong value": (lambda f: edit_json(f / "config.json", hidden_size="wide"), "hidden_size"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "pickled": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "model.safetensors"),
    "weights cut": (lambda f: truncate(f / "model.safetensors"), "deserializing header"),
    "missing": (
        lambda f: edit_weights(f / "model.safetensors", lambda w: w.pop("model.norm.weight")),
        "1 missing: model.norm.weight",
    ),
    "no head": (
        lambda f: edit_weights(f / "model.safetensors", lambda w: w.pop("lm_head.weight")),
        "1 missing: lm_head.weight",
    ),
    "unexpected": (
        lambda f: edit_weights(f / "model.safetensors", lambda w: w.update(extra=torch.ones(2))),
        "1 unexpected: extra",
    ),
    "shape": (
        lambda f: edit_weights(f / "model.safetensors", lambda w: w.update({"model.norm.weight": torch.ones(5)})),
        r"1 of another shape: model.norm.weight \(5,\) instead of \(32,\)",
    ),
    "quantized": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        r"its weights are quantized \(gptq\), so they cannot be trained; give the model that they were made from",
    ),
    "remote code": (
        lambda f: edit_json(f / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
                            model_type="evil"),
        "custom code",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", TEXT_LM_DAMAGE)
def test_a_damaged_text_lm_ends_in_one_sentence(damage: str, teacher: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teacher, tmp_path / "copy"))
    change, words = TEXT_LM_DAMAGE[damage]
    change(folder)
    with pytest.raises(ModelError, match=words) as caught:
        load_text_lm(str(folder), None)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "nothing", "a/b/c"])
def test_a_wrong_path_ends_in_one_sentence(path: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_text_lm(path, None)
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer(path, None)


def test_a_hub_id_that_cannot_be_had_ends_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="nobody/nothing: cannot be loaded") as caught:
        load_text_lm("nobody/nothing", None)
    assert "\n" not in str(caught.value)


def test_an_attention_that_is_not_installed_ends_in_one_sentence(teacher: str) -> None:
    with pytest.raises(ModelError, match="FlashAttention2"):
        load_text_lm(teacher, None, attention="flash_attention_2")
    assert load_text_lm(teacher, None, attention="varlen").config._attn_implementation == "varlen"


@pytest.mark.parametrize(
    ("shape", "settings", "words"),
    [
        ("Mamba", {"state_size": 4}, "cannot keep packed samples apart"),
        ("Bloom", {"n_head": 4, "n_layer": 2}, "cannot keep packed samples apart"),
    ],
)
def test_models_that_the_method_cannot_use_are_refused(
    shape: str, settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words):
        load_text_lm(save_teacher(tmp_path, shape, **settings), None, attention="eager")


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        *[("Cohere", {"logit_scale": scale}) for scale in (1.0, 0.5, 0.0625)],
        *[("Granite", {"logits_scaling": scale}) for scale in (1.0, 8.0, 1.015)],
        *[("Gemma2", {"final_logit_softcapping": cap}) for cap in (30.0, 2.0)],
        *[("Mistral", {}), ("OPT", {}), ("Phi", {})],
    ],
)
def test_other_models_are_welcome(shape: str, settings: dict[str, Any], tmp_path: Path) -> None:
    path = save_teacher(tmp_path, shape, word_embed_proj_dim=32, **settings)
    llm = load_text_lm(path, None, torch.bfloat16)
    assert "forward" not in vars(llm.get_decoder())
    assert torch.isfinite(hidden_states(llm, torch.ones(1, 4, dtype=torch.long), torch.arange(4)[None])).all()
    llm, ids, positions = load_text_lm(path, None), torch.arange(3, 20)[None], torch.arange(17)[None]
    torch.testing.assert_close(hidden_states(llm, ids, positions) @ lm_head(llm).T, llm(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("files", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_folder_without_tokenizer_is_refused(files: list[str], teacher: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teacher, tmp_path / "copy"))
    for name in files:
        (folder / name).unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(str(folder), None)


def test_a_damaged_tokenizer_is_refused(teacher: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teacher, tmp_path / "copy"))
    truncate(folder / "tokenizer.json")
    with pytest.raises(ModelError, match="tokenizer cannot be loaded"):
        load_tokenizer(str(folder), None)


def test_a_tokenizer_larger_than_the_embeddings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokens, but the LLM only 100 embeddings"):
        make_student(save_teacher(tmp_path, vocab_size=100))


SPEECH_LM_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (shutil.rmtree, "no such folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "is not the config of a speech LM"),
    "config cut": (lambda f: truncate(f / "config.json"), "is not the config of a speech LM"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "is not the config of a speech LM"),
    "other model": (lambda f: shutil.copy(f / "llm" / "config.json", f / "config.json"), "not the config of a speech"),
    "newer": (lambda f: edit_json(f / "config.json", format="salad_ray.speech_lm/9"), "format is not"),
    "extra key": (lambda f: edit_json(f / "config.json", extra=1), "extra"),
    "no llm": (lambda f: shutil.rmtree(f / "llm"), "llm: no such folder"),
    "no adapter": (lambda f: (f / "adapter.safetensors").unlink(), "adapter.safetensors: cannot be read"),
    "adapter cut": (lambda f: truncate(f / "adapter.safetensors"), "adapter.safetensors: cannot be read"),
    "missing": (lambda f: edit_weights(f / "adapter.safetensors", lambda w: w.pop("norm.weight")), "missing: norm"),
    "unexpected": (
        lambda f: edit_weights(f / "adapter.safetensors", lambda w: w.update(extra=torch.ones(2))),
        "unexpected: extra",
    ),
    "shape": (
        lambda f: edit_weights(f / "adapter.safetensors", lambda w: w.update({"norm.weight": torch.ones(5)})),
        "of another shape: norm.weight",
    ),
}


@pytest.mark.parametrize("damage", SPEECH_LM_DAMAGE)
def test_a_damaged_speech_lm_ends_in_one_sentence(damage: str, teacher: str, tmp_path: Path) -> None:
    make_student(teacher).save_pretrained(tmp_path / "model")
    change, words = SPEECH_LM_DAMAGE[damage]
    change(tmp_path / "model")
    with pytest.raises(ModelError, match=words) as caught:
        SpeechLM.from_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_groups_hold_every_weight_once(tied: bool, tmp_path: Path) -> None:
    student = make_student(save_teacher(tmp_path, tie_word_embeddings=tied))
    groups = parameter_groups(student, DistillConfig())
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in student.parameters())
    rates = {(group["rate"], group["lr"]) for group in groups}
    assert rates == {("learning_rate", 5e-5), ("adapter_learning_rate", 3e-4)}
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert all(".layers." in name or name in ("adapter.input.weight", "adapter.output.weight") for name in decayed)
    assert not any("norm" in name or name.endswith("bias") for name in decayed)
    assert "llm.model.layers.0.mlp.up_proj.weight" in decayed


@pytest.mark.parametrize("tied", [False, True])
def test_muon_takes_the_matrices_of_the_adapter_and_inside_the_layers(tied: bool, tmp_path: Path) -> None:
    student = make_student(save_teacher(tmp_path, tie_word_embeddings=tied))
    groups = parameter_groups(student, DistillConfig(optimizer="muon"))
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    grouped = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    found = {names[id(p)]: group for group in groups if "momentum" in group for p in group["params"]}
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    inside = {n for n in names.values() if n.endswith(tuple(f".{p}.weight" for p in projections))}
    assert found.keys() == inside | {"adapter.input.weight", "adapter.output.weight"}
    assert {(name.partition(".")[0], group["lr"]) for name, group in found.items()} == {
        ("llm", 7e-3),
        ("adapter", 0.02),
    }
    assert {(group["momentum"], group["weight_decay"]) for group in found.values()} == {(0.95, 0.01)}
    assert {group["rate"]: group["lr"] for group in groups} == {
        "learning_rate": 5e-5,
        "adapter_learning_rate": 3e-4,
        "muon_learning_rate": 7e-3,
        "adapter_muon_learning_rate": 0.02,
    }


def test_muon_finds_layers_of_another_name_and_is_refused_without_any(tmp_path: Path) -> None:
    student = make_student(save_teacher(tmp_path, "GPTBigCode"))
    groups = parameter_groups(student, DistillConfig(optimizer="muon"))
    names = {id(parameter): name for name, parameter in student.llm.named_parameters()}
    found = {names.get(id(p), "") for group in groups if "momentum" in group for p in group["params"]} - {""}
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert found == {f"transformer.h.{layer}.{part}.weight" for layer in range(2) for part in parts}
    student.llm.config.num_hidden_layers = 9
    with pytest.raises(ModelError, match=r"not known to Muon; set distill\.optimizer=adamw"):
        parameter_groups(student, DistillConfig(optimizer="muon"))


def test_frozen_weights_are_in_no_group(teacher: str) -> None:
    student = make_student(teacher)
    student.llm.requires_grad_(False)
    assert {group["rate"] for group in parameter_groups(student, DistillConfig())} == {"adapter_learning_rate"}


def test_gradient_checkpointing_gives_the_same_gradient_and_runs_layers_twice(teacher: str) -> None:
    calls, gradients = [], []
    for checkpointing in (False, True):
        student = make_student(teacher)
        if checkpointing:
            student.gradient_checkpointing()
        count: list[int] = []
        for module in (student.llm.get_decoder().layers[0].mlp, student.adapter.layers[0].mlp):
            module.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        student(make_batch(ROWS)).square().sum().backward()
        calls.append(len(count))
        gradients.append([student.adapter.input.weight.grad, student.llm.get_input_embeddings().weight.grad])
    assert calls == [2, 4]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_real_text_lm_and_its_student(shared_data: Path) -> None:
    path = str(shared_data / "models" / "tiny-teacher")
    student = make_student(path, torch.bfloat16)
    ids = torch.tensor([student.tokenizer.encode("The sun is a star, and it shines.")])
    positions = torch.arange(ids.shape[1])[None]
    llm = load_text_lm(path, None, torch.bfloat16)
    assert torch.equal(student.text_hidden(ids, positions), hidden_states(llm, ids, positions))
