"""The distillation loss against a dense one in float64, in value and gradient, and at its edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from salad_ray.distill.losses import distillation_loss, divergence, loss_and_each_kl
from salad_ray.model.head import Head

Inputs = tuple[Tensor, Tensor | Head, Tensor, Tensor | Head, Tensor]
HEADS: dict[str, dict[str, Any]] = {
    "bias": {"bias": True},  # Phi-1 and 2
    "scale": {"scale": 0.125},  # Granite, Cohere
    "scale near 1": {"scale": 1.015},
    "cap": {"cap": 3.0},  # Gemma 2 and 3n; low, so that most logits feel it
    "all": {"bias": True, "scale": 1.7, "cap": 4.0},
}


def make_inputs(
    num: int = 13,
    vocabs: tuple[int, int] = (50, 50),
    dims: tuple[int, int] = (8, 6),
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    seed: int = 0,
) -> Inputs:
    """Random hidden states, heads and labels; student's tensors require a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    student = normal(num, dims[0]).requires_grad_(), normal(vocabs[0], dims[0]).requires_grad_()
    labels = torch.randint(min(vocabs), (num,), generator=generator)
    return *student, normal(num, dims[1]), normal(vocabs[1], dims[1]), labels


def bend(inputs: Inputs, kind: str) -> Inputs:
    """The same inputs with heads that do more than a product, the teacher's in another way than the student's."""

    def head(weight: Tensor, bias: bool = False, scale: float = 1.0, cap: float | None = None) -> Head:
        values = torch.randn(len(weight), generator=torch.Generator().manual_seed(9)).to(weight.dtype)
        return Head(weight, values.requires_grad_(weight.requires_grad) if bias else None, scale, cap)

    hidden, weight, teacher_hidden, teacher_weight, labels = inputs
    teacher_kind = {"cap": "all", "all": "cap"}.get(kind, kind)
    return hidden, head(weight, **HEADS[kind]), teacher_hidden, head(teacher_weight, **HEADS[teacher_kind]), labels


def learnt(inputs: Inputs) -> list[Tensor]:
    """What gets a gradient."""
    hidden, head = inputs[:2]
    return [hidden, *(head.parameters if isinstance(head, Head) else [head])]


def dense_logits(hidden: Tensor, head: Tensor | Head) -> Tensor:
    """By the definition, in float64."""
    if isinstance(head, Tensor):
        return hidden.double() @ head.double().T
    logits = hidden.double() @ head.weight.double().T
    logits = head.scale * (logits if head.bias is None else logits + head.bias.double())
    return logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)


def dense(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """KL and NLL (N,) by the definition, on all logits at once, in float64."""
    hidden, head, teacher_hidden, teacher_head, labels = inputs
    vocab = min(len(head), len(teacher_head))
    log_p = dense_logits(hidden, head)[:, :vocab].log_softmax(-1)
    log_q = dense_logits(teacher_hidden, teacher_head)[:, :vocab].log_softmax(-1)
    kl = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    return kl, F.nll_loss(log_p, labels, reduction="none")


def dense_gradients(inputs: Inputs, alpha: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    kl, nll = dense(inputs)
    loss = (alpha * kl + (1 - alpha) * nll).mean()
    return loss, torch.autograd.grad(loss, learnt(inputs))


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Relative to at least 0.01: where a prediction is all but certain, 1 − p has no more digits in fp32."""
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm().clamp_min(0.01))


def assert_conforms(inputs: Inputs, alpha: float, chunk_size: int | None, tolerance: float) -> None:
    result = distillation_loss(*inputs, alpha, chunk_size)
    gradients = torch.autograd.grad(result.loss, learnt(inputs))
    loss, expected = dense_gradients(inputs, alpha)
    kl, nll = dense(inputs)
    for value, reference in ((result.loss, loss), (result.kl, kl.mean()), (result.nll, nll.mean())):
        assert relative_error(value, reference) <= tolerance
    for gradient, reference in zip(gradients, expected, strict=True):
        assert gradient.dtype == inputs[0].dtype
        assert relative_error(gradient, reference) <= tolerance


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("vocabs", [(50, 50), (50, 64), (64, 50)])
@pytest.mark.parametrize("chunk_size", [None, 1, 4, 13, 100])
def test_value_and_gradients_are_those_of_the_dense_loss(
    alpha: float, vocabs: tuple[int, int], chunk_size: int | None
) -> None:
    assert_conforms(make_inputs(vocabs=vocabs), alpha, chunk_size, 1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("vocabs", [(50, 50), (50, 64), (64, 50)])
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("kind", HEADS)
def test_heads_with_a_bias_a_scale_or_a_cap_conform(
    kind: str, alpha: float, vocabs: tuple[int, int], chunk_size: int | None
) -> None:
    assert_conforms(bend(make_inputs(vocabs=vocabs), kind), alpha, chunk_size, 1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", HEADS)
def test_such_heads_lose_no_more_in_bfloat16_than_its_rounding(kind: str, alpha: float) -> None:
    inputs = make_inputs(64, (500, 512), (32, 32), torch.bfloat16, scale=0.5)
    assert_conforms(bend(inputs, kind), alpha, 8, 1e-2)


@pytest.mark.parametrize("kind", HEADS)
def test_gradcheck_of_such_heads(kind: str) -> None:
    inputs = bend(make_inputs(5, (11, 13), (3, 4), torch.float64), kind)

    def loss(hidden: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        head = Head(weight, *(bias or [None]), inputs[1].scale, inputs[1].cap)
        return distillation_loss(hidden, head, *inputs[2:], 0.3, 2).loss

    assert torch.autograd.gradcheck(loss, learnt(inputs))


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_gives_the_logits_of_its_definition(kind: str) -> None:
    hidden, head, *_ = bend(make_inputs(), kind)
    for found in (head.logits(hidden), hidden @ head.T):
        torch.testing.assert_close(found, dense_logits(hidden, head).float(), rtol=1e-5, atol=1e-5)
    assert head.logits(hidden.bfloat16()).dtype == torch.float32
    assert head.logits(hidden[None, None]).shape == (1, 1, 13, 50)


@pytest.mark.parametrize("kind", HEADS)
def test_such_heads_measure_the_kl_to_themselves_as_zero(kind: str) -> None:
    hidden, head, *_, labels = bend(make_inputs(64, (1000, 1000)), kind)
    assert divergence(hidden, head, hidden, head, labels)[0].abs().max() <= 1e-6


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(1, 40),
    vocabs=st.tuples(st.integers(2, 90), st.integers(2, 90)),
    dims=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    alpha=st.floats(0, 1),
    chunk_size=st.none() | st.integers(1, 50),
    seed=st.integers(0, 2**31),
)
def test_any_shape_conforms(
    num: int,
    vocabs: tuple[int, int],
    dims: tuple[int, int],
    alpha: float,
    chunk_size: int | None,
    seed: int,
) -> None:
    assert_conforms(make_inputs(num, vocabs, dims, seed=seed), alpha, chunk_size, 1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_vocabularies_of_qwen(alpha: float) -> None:
    assert_conforms(make_inputs(5, (151_936, 152_064), (16, 24)), alpha, 2, 1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_gradcheck(alpha: float) -> None:
    hidden, head, teacher_hidden, teacher_head, labels = make_inputs(5, (11, 13), (3, 4), torch.float64)

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return distillation_loss(hidden, head, teacher_hidden, teacher_head, labels, alpha, 2).loss

    assert torch.autograd.gradcheck(loss, (hidden, head))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_bfloat16_loses_no_more_than_its_own_rounding(alpha: float) -> None:
    inputs = make_inputs(64, (500, 512), (32, 32), torch.bfloat16, scale=0.5)
    assert_conforms(inputs, alpha, 8, 1e-2)


def test_bfloat16_softmaxes_are_in_fp32() -> None:
    hidden, head, teacher_hidden, teacher_head, labels = make_inputs(
        64, (500, 500), (32, 32), torch.bfloat16, scale=0.5
    )
    result = distillation_loss(hidden, head, teacher_hidden, teacher_head, labels, 0.5, 8)
    # On a CPU the logits themselves come in bf16; heads of one-hot rows hand just those to the float64 reference.
    student, teacher = (hidden @ head.T).detach(), teacher_hidden @ teacher_head.T
    kl, nll = dense((student, torch.eye(500), teacher, torch.eye(500), labels))
    assert result.loss.dtype == result.kl.dtype == result.nll.dtype == torch.float32
    assert relative_error(result.kl, kl.mean()) <= 1e-5
    assert relative_error(result.nll, nll.mean()) <= 1e-5


def test_parts_add_up_and_only_the_loss_has_a_gradient() -> None:
    (loss, kl, nll), each_kl = loss_and_each_kl(*make_inputs(), alpha=0.3)
    torch.testing.assert_close(each_kl, divergence(*make_inputs())[0])
    assert not each_kl.requires_grad
    torch.testing.assert_close(loss, 0.3 * kl + 0.7 * nll)
    assert loss.requires_grad
    assert not kl.requires_grad
    assert not nll.requires_grad


def test_divergence_is_the_loss_per_position() -> None:
    inputs = make_inputs(vocabs=(64, 50))
    kl, nll = divergence(*inputs, chunk_size=4)
    for value, reference in zip((kl, nll), dense(inputs), strict=True):
        assert not value.requires_grad
        torch.testing.assert_close(value, reference.float())
    result = distillation_loss(*inputs)
    torch.testing.assert_close((kl.mean(), nll.mean()), (result.kl, result.nll))


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_kl_of_a_distribution_to_itself_is_zero(scale: float) -> None:
    hidden, head, *_, labels = make_inputs(64, (1000, 1000), scale=scale)
    kl, _ = divergence(hidden, head, hidden, head, labels)
    assert kl.abs().max() <= 1e-6


def test_kl_is_never_negative_and_precise_when_small() -> None:
    hidden, head, *_, labels = make_inputs(200, (3000, 3000), (16, 16))
    near = hidden.detach() + 1e-3 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    kl, _ = divergence(hidden, head, near, head, labels)
    expected, _ = dense((hidden, head, near, head, labels))
    assert kl.min() >= -1e-6
    assert (kl - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_huge_logits_stay_finite(alpha: float, dtype: torch.dtype) -> None:
    hidden = torch.ones(4, 1, dtype=dtype, requires_grad=True)
    head = torch.linspace(-1e4, 1e4, 7).to(dtype)[:, None].requires_grad_()
    inputs = (hidden, head, -torch.ones(4, 1, dtype=dtype), head.detach(), torch.tensor([0, 3, 6, 6]))
    result = distillation_loss(*inputs, alpha, 3)
    gradients = torch.autograd.grad(result.loss, (hidden, head))
    loss, expected = dense_gradients(inputs, alpha)
    torch.testing.assert_close(result.loss.double(), loss, rtol=1e-5, atol=0)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), reference.double(), rtol=1e-2, atol=1e-6)


def test_teacher_that_excludes_ids_gives_no_nan() -> None:
    hidden, head, teacher_hidden, teacher_head, labels = make_inputs(dims=(8, 1))
    teacher_head[10:] = -1e30
    loss, kl, *_ = distillation_loss(hidden, head, teacher_hidden.abs() + 1, teacher_head, labels)
    loss.backward()
    assert torch.isfinite(kl)
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_no_positions_give_a_connected_zero() -> None:
    inputs = make_inputs(0)
    result = distillation_loss(*inputs)
    result.loss.backward()
    assert result.loss == result.kl == result.nll == 0
    for tensor in inputs[:2]:
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()
    assert [part.shape for part in divergence(*inputs)] == [(0,), (0,)]


def test_teacher_gets_no_gradient() -> None:
    inputs = make_inputs()
    for tensor in inputs[2:4]:
        tensor.requires_grad_()
    distillation_loss(*inputs).loss.backward()
    assert inputs[2].grad is None
    assert inputs[3].grad is None


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_costs_the_other_nothing(frozen: int) -> None:
    inputs = make_inputs()
    expected = dense_gradients(inputs, 0.5)[1][1 - frozen]
    inputs[frozen].requires_grad_(False)
    distillation_loss(*inputs, 0.5).loss.backward()
    assert inputs[frozen].grad is None
    gradient = inputs[1 - frozen].grad
    assert gradient is not None
    assert relative_error(gradient, expected) <= 1e-5


def test_without_grad_the_value_is_the_same() -> None:
    inputs = make_inputs()
    with torch.no_grad():
        result = distillation_loss(*inputs, 0.5)
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, distillation_loss(*inputs, 0.5).loss.detach())


def test_hidden_and_head_need_not_be_contiguous() -> None:
    hidden, head, teacher_hidden, teacher_head, labels = make_inputs()
    strided = hidden.detach().repeat_interleave(2, 0)[::2].T.contiguous().T.requires_grad_()
    spaced = torch.stack((head.detach(), head.detach()), -1)[..., 0].requires_grad_()
    assert not strided.is_contiguous()
    assert not spaced.is_contiguous()
    inputs = (strided, spaced, teacher_hidden.T.contiguous().T, teacher_head.T.contiguous().T, labels)
    assert_conforms(inputs, 0.5, 4, 1e-5)


def test_tied_head_gathers_both_gradients() -> None:
    _, head, teacher_hidden, teacher_head, labels = make_inputs()

    def gradient(loss: Any) -> Tensor:
        return torch.autograd.grad(loss(F.embedding(labels, head)), head)[0]

    ours = gradient(lambda hidden: distillation_loss(hidden, head, teacher_hidden, teacher_head, labels).loss)
    expected = gradient(lambda hidden: dense((hidden, head, teacher_hidden, teacher_head, labels))[0].mean())
    assert relative_error(ours, expected) <= 1e-5


def test_mixed_precision_inputs_meet_in_the_dtype_of_each_head() -> None:
    hidden, head, teacher_hidden, teacher_head, labels = make_inputs()
    inputs = (hidden, head, teacher_hidden.bfloat16().float(), teacher_head.bfloat16(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = distillation_loss(hidden.bfloat16(), *inputs[1:])
    result.loss.backward()
    expected = dense((hidden.bfloat16(), *inputs[1:]))[0].mean()
    assert relative_error(result.loss, expected) <= 1e-2
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


def test_gradients_scale_with_what_comes_from_above() -> None:
    inputs = make_inputs()
    expected = torch.autograd.grad(distillation_loss(*inputs).loss, inputs[:2])
    gradients = torch.autograd.grad(-3 * distillation_loss(*inputs).loss, inputs[:2])
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, -3 * reference)


def test_a_second_scaled_backward_is_refused_rather_than_wrong() -> None:
    loss = 2 * distillation_loss(*make_inputs()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class LargestTensor(TorchDispatchMode):
    """Notes the most elements any operation returned."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.num_elements = max(self.num_elements, *sizes, 0)
        return result


@pytest.mark.parametrize("kind", [None, *HEADS])
@pytest.mark.parametrize("num", [16, 64, 1000, 9000])
def test_logits_never_exist_as_a_whole(num: int, kind: str | None) -> None:
    inputs = make_inputs(num, (300, 300), (2, 2))
    inputs = inputs if kind is None else bend(inputs, kind)
    with LargestTensor() as largest:
        distillation_loss(*inputs, 0.5).loss.backward()
    assert 0 < largest.num_elements <= max(num * 300 / 8, num * 2)


def test_liger_agrees_on_the_value() -> None:
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    inputs = make_inputs(64, (500, 500), (32, 32), scale=0.5)
    theirs = liger.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)
    torch.testing.assert_close(distillation_loss(*inputs).loss, theirs(*inputs), rtol=1e-5, atol=0)


@pytest.mark.parametrize("label", [-100, -1, 50, 63])
def test_a_label_outside_the_shared_ids_is_refused(label: int) -> None:
    inputs = make_inputs(vocabs=(64, 50))
    inputs[4][3] = label
    for function in (distillation_loss, divergence):
        with pytest.raises(ValueError, match="share the ids 0 to 49"):
            function(*inputs)


def test_what_does_not_fit_is_refused() -> None:
    hidden, head, teacher_hidden, teacher_head, labels = make_inputs()
    with pytest.raises(ValueError, match="student hidden states are"):
        distillation_loss(hidden[:-1], head, teacher_hidden, teacher_head, labels)
    with pytest.raises(ValueError, match="teacher hidden states are"):
        distillation_loss(hidden, head, teacher_hidden, teacher_head[:, :-1], labels)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="weight between 0 and 1"):
            distillation_loss(hidden, head, teacher_hidden, teacher_head, labels, alpha)
    with pytest.raises(ValueError, match="chunk_size"):
        distillation_loss(hidden, head, teacher_hidden, teacher_head, labels, chunk_size=0)
