"""Speech encoders: frames in time, causal, and the same in any batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MimiConfig, MimiEncoderModel, MimiModel

from salad_ray.config import EncodeConfig
from salad_ray.model.encoder import (
    Encoder,
    LogMelEncoder,
    MimiEncoder,
    MoshiMimiEncoder,
    encode_in_batches,
    load_encoder,
)
from salad_ray.model.loading import ModelError

LENGTHS_SECS = (0.01, 0.08, 1.0, 3.14, 12.5)  # the last is longer than Mimi's window of 250 positions at 25 Hz


@pytest.fixture(scope="module")
def mimi_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mimi with all its layers and ratios, and narrow ones."""
    folder = tmp_path_factory.mktemp("mimi")
    config = MimiConfig(
        hidden_size=64,
        num_filters=4,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=128,
        upsample_groups=64,
        codebook_size=64,
        codebook_dim=32,
        vector_quantization_hidden_dimension=32,
        num_quantizers=4,
        layer_scale_initial_scale=0.5,  # at the usual 0.01 attention would hardly show
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MimiModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def full_mimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The encoder half of Mimi in its true shape, as transformers saves it; every weight random and to be heard."""
    folder = tmp_path_factory.mktemp("full") / "mimi"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MimiEncoderModel(MimiConfig())
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:  # at the usual 0.01 attention would hardly show
                torch.nn.init.normal_(parameter, std=0.3)
            elif parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def moshi_file(full_mimi: Path) -> Path:
    """The same weights as moshi has them, with some decoder."""
    loaders = pytest.importorskip("moshi.models.loaders", reason="make moshi")
    file = full_mimi.parent / "moshi" / "weights.safetensors"
    file.parent.mkdir()
    with torch.random.fork_rng():
        decoder = {name: tensor for name, tensor in loaders.get_mimi(None).state_dict().items() if not is_encoder(name)}
    save_file(decoder | moshi_names(MimiEncoderModel.from_pretrained(full_mimi).state_dict()), file)
    return file


MOSHI_NAMES = {
    "encoder_seanet.layers.": "encoder.model.",
    "encoder_transformer.layers.": "encoder_transformer.transformer.layers.",
    "downsample.conv.": "downsample.conv.conv.",
    ".conv.": ".conv.conv.",
    ".o_proj.": ".out_proj.",
    ".mlp.fc1.": ".linear1.",
    ".mlp.fc2.": ".linear2.",
    ".input_layernorm.": ".norm1.",
    ".post_attention_layernorm.": ".norm2.",
    ".self_attn_layer_scale.": ".layer_scale_1.",
    ".mlp_layer_scale.": ".layer_scale_2.",
}


def is_encoder(name: str) -> bool:
    return name.startswith(("encoder.", "encoder_transformer.", "downsample."))


def moshi_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of transformers' Mimi encoder as the published file of moshi has them.

    Moshi keeps query, key and value in one matrix; its rotary embedding turns neighbouring rows of a head together,
    that of transformers the first half of them with the second.
    """
    result = {}
    for name, tensor in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            continue
        if name.endswith("q_proj.weight"):
            query, key, value = (weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj"))
            turned = [part.unflatten(0, (8, 2, 32)).transpose(1, 2).flatten(0, 2) for part in (query, key)]
            name, tensor = name.replace("q_proj.weight", "in_proj_weight"), torch.cat([*turned, value])
        for old, new in MOSHI_NAMES.items():
            name = name.replace(old, new)
        result[name] = tensor.contiguous()
    return result


@pytest.fixture(scope="module", params=["log_mel", "mimi", "moshi"])
def encoder(request: pytest.FixtureRequest, mimi_folder: Path) -> Encoder:
    if request.param == "moshi":
        return MoshiMimiEncoder(str(request.getfixturevalue("moshi_file")))
    return LogMelEncoder() if request.param == "log_mel" else MimiEncoder(str(mimi_folder))


def noise(secs: float, sampling_rate: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(round(secs * sampling_rate))).astype(np.float32)


def test_a_frame_for_each_80_ms_begun(encoder: Encoder) -> None:
    assert encoder.frame_rate == 12.5
    frame_size = int(encoder.sampling_rate / encoder.frame_rate)
    for num_samples in (0, 1, frame_size - 1, frame_size, frame_size + 1, 7 * frame_size):
        [frames] = encoder.encode([np.full(num_samples, 0.1, np.float32)])
        assert frames.shape == (-(-num_samples // frame_size), encoder.dim)
        assert frames.dtype == np.float32
    assert encoder.encode([]) == []


def test_a_batch_of_many_lengths_equals_one_at_a_time(encoder: Encoder) -> None:
    audios = [noise(secs, encoder.sampling_rate, seed) for seed, secs in enumerate(LENGTHS_SECS)]
    alone = [encoder.encode([audio])[0] for audio in audios]
    for one, batched in zip(alone, encoder.encode(audios), strict=True):
        assert np.std(one) > 0.1
        np.testing.assert_allclose(batched, one, atol=1e-4)


def test_later_audio_changes_no_earlier_frame(encoder: Encoder) -> None:
    audio = noise(4.0, encoder.sampling_rate)
    changed = audio.copy()
    frame_size = int(encoder.sampling_rate / encoder.frame_rate)
    changed[20 * frame_size :] *= -3
    before, after = encoder.encode([audio])[0], encoder.encode([changed])[0]
    np.testing.assert_allclose(before[:20], after[:20], atol=1e-5)
    assert np.abs(before[20] - after[20]).max() > 0.01


def test_encode_in_batches_keeps_order_and_budget(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    audios = [noise(secs, encoder.sampling_rate, seed) for seed, secs in enumerate((0.5, 4.0, 1.0, 0.0, 1.0, 0.7))]
    batches: list[list[int]] = []
    encode = encoder.encode

    def spy(batch: list[np.ndarray]) -> list[np.ndarray]:
        batches.append([len(audio) for audio in batch])
        return encode(batch)

    monkeypatch.setattr(encoder, "encode", spy)
    features = encode_in_batches(encoder, audios, batch_secs=3.0)
    for audio, frames in zip(audios, features, strict=True):
        np.testing.assert_allclose(frames, encode([audio])[0], atol=1e-4)
    assert sorted(length for batch in batches for length in batch) == sorted(map(len, audios))
    assert all(len(batch) == 1 or len(batch) * max(batch) <= 3 * encoder.sampling_rate for batch in batches)
    assert len(batches) == 3
    assert encode_in_batches(encoder, [], 3.0) == []


def test_stereo_is_refused(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="mono"):
        encoder.encode([np.zeros((100, 2), np.float32)])


def test_log_mel_hears_when_and_how_high() -> None:
    """A tone in the third hop of the fifth frame shows there, in its band, and in the rest of the window after it."""
    encoder = LogMelEncoder()
    audio = np.zeros(16000, np.float32)
    start = 5 * 1280 + 3 * 160
    audio[start : start + 160] = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(160) / 16000)
    hops = encoder.encode([audio])[0].reshape(-1, 80)
    heard = np.flatnonzero((hops > hops[0] + 0.1).any(axis=1))
    assert heard.tolist() == [43, 44, 45]
    assert 20 < hops[43].argmax() < 30  # 1 kHz is a third of the way up the mel scale to 8 kHz
    assert (hops[:43] == hops[0]).all()


def test_log_mel_of_speech_and_silence_is_small_and_smooth() -> None:
    encoder = LogMelEncoder()
    silence, dither, loud = encoder.encode(
        [np.zeros(16000, np.float32), noise(1.0, 16000) * 3e-4, np.clip(noise(1.0, 16000) * 10, -1, 1)]
    )
    assert np.ptp(silence) == 0
    assert np.abs(dither - silence).max() < 0.5
    assert max(np.abs(silence).max(), np.abs(loud).max()) < 5


def test_mimi_gives_what_the_quantizer_is_given(mimi_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MimiModel.from_pretrained(mimi_folder).eval()
    seen: list[torch.Tensor] = []
    quantize = model.quantizer.encode

    def spy(latents: torch.Tensor, num_quantizers: int | None = None) -> torch.Tensor:
        seen.append(latents)
        return quantize(latents, num_quantizers)

    monkeypatch.setattr(model.quantizer, "encode", spy)
    audio = noise(12.8, 24000)  # whole frames
    with torch.no_grad():
        model.encode(torch.from_numpy(audio)[None, None])
    [frames] = MimiEncoder(str(mimi_folder)).encode([audio])
    np.testing.assert_allclose(frames, seen[0][0].T.numpy(), atol=1e-4)


def test_mimi_in_pieces_equals_mimi_in_one(mimi_folder: Path) -> None:
    encoder = MimiEncoder(str(mimi_folder))
    audios = [noise(30.0, 24000), noise(7.0, 24000, seed=1)]
    results = []
    for secs in (1e9, 4.0, 0.7):
        encoder._secs_per_forward = secs
        results.append(encoder.encode(audios))
    for pieces in results[1:]:
        for one, other in zip(results[0], pieces, strict=True):
            np.testing.assert_allclose(other, one, atol=1e-4)


def test_mimi_never_runs_more_audio_at_once_than_it_should(mimi_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = MimiEncoder(str(mimi_folder))
    sizes: list[int] = []
    forward = encoder._model.forward

    def spy(audio: torch.Tensor, **kwargs: object) -> object:
        sizes.append(audio.numel())
        return forward(audio, **kwargs)

    monkeypatch.setattr(encoder._model, "forward", spy)
    [frames] = encoder.encode([noise(90.0, 24000)])
    assert len(frames) == 1125
    assert max(sizes) <= 4 * 24000


def test_mimi_keeps_only_its_encoder(mimi_folder: Path) -> None:
    names = [name for name, _ in MimiEncoder(str(mimi_folder))._model.named_parameters()]
    assert {name.split(".")[0] for name in names} == {"encoder_seanet", "encoder_transformer", "downsample"}


def test_mimi_in_bfloat16_is_near(mimi_folder: Path) -> None:
    audio = noise(3.0, 24000)
    exact = MimiEncoder(str(mimi_folder)).encode([audio])[0]
    rough = MimiEncoder(str(mimi_folder), dtype=torch.bfloat16).encode([audio])[0]
    assert np.linalg.norm(rough - exact) < 0.05 * np.linalg.norm(exact)


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """The largest, as a share of the standard deviation."""
    return float(np.abs(one - other).max() / one.std())


@pytest.mark.parametrize("secs", [(2.0,), (0.01, 0.5, 3.14159), (14.0, 3.3)], ids=str)
def test_moshi_and_transformers_give_the_same(full_mimi: Path, moshi_file: Path, secs: tuple[float, ...]) -> None:
    """Whole frames and not, in batches of many lengths, and more audio than a forward or the attention (10 s) takes."""
    audios = [noise(length, 24000, seed) for seed, length in enumerate(secs)]
    expected, found = (
        encoder.encode(audios) for encoder in (MimiEncoder(str(full_mimi)), MoshiMimiEncoder(str(moshi_file)))
    )
    for one, other in zip(expected, found, strict=True):
        assert one.shape == other.shape
        assert difference(one, other) < 2e-5


def test_every_weight_of_moshi_is_heard(moshi_file: Path) -> None:
    """So the agreement of the two says that each of them has its place."""
    encoder = MoshiMimiEncoder(str(moshi_file))
    audio = noise(0.4, 24000)
    [before] = encoder.encode([audio])
    parameters = dict(encoder._model.named_parameters())
    assert len(parameters) == 14 * 2 + 8 * 10 + 1
    for name, parameter in parameters.items():
        assert is_encoder(name)
        original = parameter.detach().clone()
        parameter.data = original.roll(1, dims=0) if len(original) > 1 else -original
        assert difference(before, encoder.encode([audio])[0]) > 1e-3, name
        parameter.data = original
    np.testing.assert_array_equal(encoder.encode([audio])[0], before)


def test_moshi_in_pieces_equals_moshi_in_one(moshi_file: Path) -> None:
    """Its own ring of keys would forget some of them in all pieces of more than one position."""
    encoder = MoshiMimiEncoder(str(moshi_file))
    audios = [noise(11.5, 24000), noise(2.0, 24000, seed=1)]
    whole = [encoder._model.encode_to_latent(torch.from_numpy(audio)[None, None], quantize=False) for audio in audios]
    for secs in (1e9, 5.0):
        encoder._secs_per_forward = secs
        for one, other in zip(whole, encoder.encode(audios), strict=True):
            assert difference(one[0].detach().numpy().T, other[: one.shape[2]]) < 2e-5


def test_moshi_recovers_from_an_error(moshi_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = MoshiMimiEncoder(str(moshi_file))
    audio = noise(1.0, 24000)
    [before] = encoder.encode([audio])

    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("as on a full GPU")

    with monkeypatch.context() as patch:
        patch.setattr(encoder._model.downsample, "forward", fail)
        with pytest.raises(torch.OutOfMemoryError):
            encoder.encode([audio])
    np.testing.assert_array_equal(encoder.encode([audio])[0], before)


@pytest.mark.parametrize("change", ["missing", "unexpected", "size mismatch", "cannot be loaded"])
def test_weights_that_are_not_moshis_are_refused(moshi_file: Path, tmp_path: Path, change: str) -> None:
    weights, name = load_file(moshi_file), "encoder_transformer.transformer.layers.0.linear1.weight"
    file = tmp_path / "weights.safetensors"
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        weights[name.replace("layers.0", "layers.8")] = weights[name].clone()
    elif change == "size mismatch":
        weights[name] = weights[name][:7].clone()
    save_file(weights, file)
    if change == "cannot be loaded":
        file.write_bytes(b"not weights")
    with pytest.raises(ModelError, match=change) as error:
        MoshiMimiEncoder(str(file))
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


def test_a_wrong_path_for_moshi_ends_in_one_sentence(moshi_file: Path, mimi_folder: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "weights.pt"
    torch.save({}, pickled)
    for path, problem in {
        tmp_path / "nowhere.safetensors": "no such file",
        pickled: "pickled weights are not read",
        tmp_path: "holds 0 .safetensors files",
        mimi_folder: "in transformers' format",
    }.items():
        with pytest.raises(ModelError, match=problem):
            MoshiMimiEncoder(str(path))
    config = EncodeConfig(encoder="mimi", backend="moshi", path=str(moshi_file.parent))
    encoder = load_encoder(config, "cpu")
    assert isinstance(encoder, MoshiMimiEncoder)
    assert (encoder.name, encoder.sampling_rate, encoder.frame_rate, encoder.dim) == ("mimi", 24000, 12.5, 512)


def test_without_moshi_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "moshi", None)
    monkeypatch.setitem(sys.modules, "moshi.models.loaders", None)
    with pytest.raises(ModelError, match="make moshi"):
        load_encoder(EncodeConfig(encoder="mimi", backend="moshi", path=str(tmp_path)), "cpu")


def test_an_encoder_says_which_weights_it_has(mimi_folder: Path, tmp_path: Path, encoder: Encoder) -> None:
    assert encoder.revision is None
    assert bool(encoder.weights) == (encoder.name == "mimi")
    one, again = (MimiEncoder(str(mimi_folder)) for _ in range(2))
    assert one.weights == again.weights
    replaced = shutil.copytree(mimi_folder, tmp_path / "mimi")
    weights = load_file(replaced / "model.safetensors")
    weights["encoder.layers.0.conv.bias"][0] += 1e-3
    save_file(weights, replaced / "model.safetensors", metadata={"format": "pt"})
    assert MimiEncoder(str(replaced)).weights != one.weights


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_of_a_hub_id_the_commit_is_known(mimi_folder: Path, moshi_file: Path, tmp_path: Path) -> None:
    """In a process of its own, since the hub's cache and offline mode are settings of a process."""
    for name, files in {
        "kyutai/mimi": {part: mimi_folder / part for part in ("config.json", "model.safetensors")},
        "kyutai/moshiko-pytorch-bf16": {"tokenizer-e351c8d8-checkpoint125.safetensors": moshi_file},
    }.items():
        place = tmp_path / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text(COMMIT)
        (place / "snapshots" / COMMIT).mkdir(parents=True)
        for part, source in files.items():
            (place / "snapshots" / COMMIT / part).symlink_to(source)
    code = """
from salad_ray.model.encoder import MimiEncoder, MoshiMimiEncoder
for kind, path in (MimiEncoder, "kyutai/mimi"), (MoshiMimiEncoder, "kyutai/moshiko-pytorch-bf16"):
    print(*(kind(path, revision).revision for revision in (None, "main")))
"""
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.split() == [COMMIT] * 4


def changed_copy(folder: Path, target: Path, change: str) -> Path:
    """A copy of Mimi's folder with its weights or its config damaged."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    name = "encoder_transformer.layers.0.mlp.fc1.weight"
    config = json.loads((target / "config.json").read_text())
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        weights["encoder_transformer.layers.8.mlp.fc1.weight"] = weights[name].clone()
    elif change == "of another shape":
        weights[name] = weights[name][:7].clone()
    elif change == "look ahead":
        config["use_causal_conv"] = False
    (target / "config.json").write_text(json.dumps(config))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    if change == "cannot be loaded":
        (target / "model.safetensors").write_bytes(b"not weights")
    if change == "pickle":
        torch.save(weights, target / "pytorch_model.bin")
        (target / "model.safetensors").unlink()
    return target


@pytest.mark.parametrize(
    "change", ["missing", "unexpected", "of another shape", "look ahead", "cannot be loaded", "pickle"]
)
def test_weights_that_are_not_mimi_are_refused(mimi_folder: Path, tmp_path: Path, change: str) -> None:
    folder = changed_copy(mimi_folder, tmp_path / "damaged", change)
    with pytest.raises(ModelError, match="cannot be loaded" if change == "pickle" else change) as error:
        MimiEncoder(str(folder))
    assert str(error.value).startswith(f"{folder}: ")
    assert "\n" not in str(error.value)


def test_a_wrong_path_ends_in_one_sentence(tmp_path: Path) -> None:
    config = EncodeConfig(encoder="mimi", path=str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="no such folder"):
        load_encoder(config, "cpu")
    with pytest.raises(ModelError, match="not a Hugging Face model folder"):
        MimiEncoder(str(tmp_path))


def test_load_encoder_takes_what_the_config_names(mimi_folder: Path) -> None:
    assert load_encoder(EncodeConfig(), "cpu").name == "log_mel"
    mimi = load_encoder(EncodeConfig(encoder="mimi", path=str(mimi_folder)), "cpu")
    assert (mimi.name, mimi.sampling_rate, mimi.frame_rate, mimi.dim) == ("mimi", 24000, 12.5, 64)
