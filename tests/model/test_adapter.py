"""The adapter: its size, its causality, its initial scale, its seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.shapes import QWEN_3B
from salad_ray.config import AdapterConfig
from salad_ray.model.adapter import Adapter, checkpoint_layers
from salad_ray.scaling.memory import Shape

SMALL = AdapterConfig(hidden_size=32, num_layers=2, num_heads=2, ffn_size=48)


def make_spans(lengths: list[int], dim: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random frames (P, S, C), garbage in the padding, and their mask."""
    frames = torch.randn(len(lengths), max(lengths), dim, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return frames, mask


@pytest.mark.parametrize("model_dim", [2048, 3584])
def test_the_default_has_122_million_parameters(model_dim: int) -> None:
    with torch.device("meta"):
        adapter = Adapter(AdapterConfig(), 512, model_dim)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == pytest.approx(122e6, rel=0.01)


def test_the_papers_shape_has_the_papers_parameters() -> None:
    """≈120.4 M at 3B and 121.9 M at 7B, says its appendix."""
    shape = AdapterConfig(hidden_size=960, num_heads=15, num_kv_heads=5, ffn_size=2560)
    for model_dim, number in ((2048, 120.4e6), (3584, 121.9e6)):
        with torch.device("meta"):
            adapter = Adapter(shape, 512, model_dim)
        found = sum(parameter.numel() for parameter in adapter.parameters())
        assert found == pytest.approx(number, rel=0.005)
        assert Shape(QWEN_3B, shape, 512).num_adapter == found or model_dim != 2048


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_a_span_in_a_batch_equals_the_span_alone(attention: str) -> None:
    adapter = Adapter(SMALL, 6, 10, attention=attention)
    frames, mask = make_spans([5, 1, 9])
    together = adapter(frames, mask).split([5, 1, 9])
    for span, length, output in zip(frames, [5, 1, 9], together, strict=True):
        alone = adapter(span[None, :length], torch.ones(1, length, dtype=torch.bool))
        torch.testing.assert_close(output, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_no_frame_hears_the_future_or_the_padding(attention: str) -> None:
    adapter = Adapter(SMALL, 6, 10, attention=attention)
    frames, mask = make_spans([7, 4])
    frames.requires_grad_()
    adapter(frames, mask)[3].sum().backward()
    reached = frames.grad.abs().sum(-1) > 0
    assert reached[0].tolist() == [True] * 4 + [False] * 3
    assert not reached[1].any()


def test_order_of_frames_matters() -> None:
    adapter = Adapter(SMALL, 6, 10)
    frames, mask = make_spans([6])
    swapped = frames[:, [1, 0, 2, 3, 4, 5]]
    assert (adapter(frames, mask)[-1] - adapter(swapped, mask)[-1]).abs().max() > 1e-4


@pytest.mark.parametrize("output_rms", [0.015, 1.0])
def test_outputs_start_at_the_wanted_scale(output_rms: float) -> None:
    adapter = Adapter(AdapterConfig(hidden_size=128, num_layers=4, num_heads=4, ffn_size=192), 80, 256, output_rms)
    frames, mask = make_spans([40, 25], dim=80)
    assert adapter(3 * frames, mask).square().mean().sqrt().item() == pytest.approx(output_rms, rel=0.15)


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = Adapter(SMALL, 6, 10, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = Adapter(SMALL, 6, 10, seed=3), Adapter(SMALL, 6, 10, seed=4)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
    assert not torch.equal(first.output.weight, other.output.weight)


def test_casting_keeps_the_rotary_frequencies_exact() -> None:
    adapter = Adapter(SMALL, 6, 10)
    before = adapter.rotary.inv_freq.clone()
    adapter.to(torch.bfloat16)
    assert adapter.output.weight.dtype == torch.bfloat16
    assert torch.equal(adapter.rotary.inv_freq, before)
    frames, mask = make_spans([5, 3])
    assert adapter(frames.bfloat16(), mask).dtype == torch.bfloat16


def test_moving_to_another_device_moves_the_buffers() -> None:
    assert Adapter(SMALL, 6, 10).to("meta").rotary.inv_freq.is_meta


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_without_spans_there_is_no_output_but_a_gradient(attention: str) -> None:
    adapter = Adapter(SMALL, 6, 10, attention=attention)
    output = adapter(torch.zeros(0, 0, 6), torch.zeros(0, 0, dtype=torch.bool))
    assert output.shape == (0, 10)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_packed_spans_give_what_padded_ones_give_with_their_gradients() -> None:
    frames, mask = make_spans([5, 1, 9, 3])
    outputs, gradients = [], []
    for attention in ("sdpa", "varlen"):
        adapter = Adapter(SMALL, 6, 10, attention=attention)
        outputs.append(adapter(frames, mask))
        outputs[-1].square().sum().backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradient_and_runs_layers_twice() -> None:
    frames, mask = make_spans([5, 3])
    calls, gradients = [], []
    for checkpointing in (False, True):
        adapter = Adapter(SMALL, 6, 10).train()
        if checkpointing:
            assert checkpoint_layers(adapter) == len(adapter.layers)
        count: list[int] = []
        adapter.layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        adapter(frames, mask).square().sum().backward()
        calls.append(len(count))
        gradients.append(adapter.input.weight.grad)
    assert calls == [1, 2]
    torch.testing.assert_close(gradients[0], gradients[1])
