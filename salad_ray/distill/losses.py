"""The distillation loss: forward KL from the teacher and next-token NLL, without ever storing the logits.

L = α · KL(Q‖P) + (1 − α) · NLL, a mean over N positions (SALAD, arXiv 2510.13632). With P the student's and Q the
teacher's distribution over the V shared ids, z the student's logits and y the label, one position has

    KL = Σ_v Q_v (log Q_v − log P_v)        NLL = −log P_y
    ∂L/∂z_v = α (P_v − Q_v) + (1 − α) (P_v − 1[v = y]) = P_v − α Q_v − (1 − α) 1[v = y]

The gradient needs nothing but the two softmaxes, so it is made in the forward, chunk by chunk, and folded at once into
the gradients of the hidden states and of the head; the backward only scales those. Where a head has a bias b, a scale
s or a soft cap c (`Head`), z = c · tanh(u / c) with u = s · (h · Wᵀ + b), and ∂L/∂z is multiplied by s · (1 − z² / c²).

Shape letters: N positions, n positions of a chunk or block, D_s and D_t model widths of student and teacher, V shared
vocabulary, V_s and V_t the vocabularies of the heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from salad_ray.model.head import Head

CHUNKS = 8
"""Parts into which the positions are cut by default: two (N / 8, V) buffers are under 1/16 of what dense code keeps."""
MAX_CHUNK_SIZE = 512
"""Matrix products no longer gain from more rows than this."""
CPU_BLOCK = 1 << 20
"""Logits that pass through the softmaxes at a time on a CPU, so that they stay in its cache."""


class DistillationLoss(NamedTuple):
    """Means over the positions, in nats; only `loss` carries a gradient."""

    loss: Tensor
    kl: Tensor
    nll: Tensor


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_head: Tensor | Head,
    labels: Tensor,
    alpha: float = 1.0,
    chunk_size: int | None = None,
) -> DistillationLoss:
    """α · KL(teacher ‖ student) + (1 − α) · NLL over the full vocabulary at temperature 1, as a mean over N positions.

    Heads of different size are both cut to the ids they share, the first V = min(V_s, V_t), and renormalised, for the
    NLL too. Softmaxes are computed in fp32 (float64 for float64 input), from logits in the dtype of the head or, on
    CUDA, in fp32. Both parts are reported at any alpha, so alpha = 0 still pays for the teacher's logits. No positions
    give a connected zero: its backward gives zero gradients.

    The backward scales the gradients in place, as the head's may be larger than all else. After it has scaled by
    anything but 1, autograd refuses another backward through the same graph.

    Args:
        student_hidden: (N, D_s), gets a gradient.
        student_head: a weight (V_s, D_s), or a `Head` whose logits are more than hidden · weightᵀ. Weight and bias get
            a gradient if they require one; `student_hidden` is cast to their dtype.
        teacher_hidden: (N, D_t), no gradient.
        teacher_head: (V_t, D_t) or a `Head`, no gradient.
        labels: (N,) next ids, all below V; there is no ignored id: pass the scored positions only.
        alpha: weight of the KL, 0 … 1.
        chunk_size: positions whose logits exist at a time; by default N / 8, at most 512.

    Raises:
        ValueError: on shapes that do not fit, a label outside the shared ids, or alpha or chunk_size out of range.
    """
    return loss_and_each_kl(student_hidden, student_head, teacher_hidden, teacher_head, labels, alpha, chunk_size)[0]


def loss_and_each_kl(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_head: Tensor | Head,
    labels: Tensor,
    alpha: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[DistillationLoss, Tensor]:
    """`distillation_loss`, and the KL of every position, (N,), without gradient."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, but it is a weight between 0 and 1")
    head, teacher_head = _as_head(student_head), _as_head(teacher_head)
    student_hidden, teacher_hidden = student_hidden.to(head.dtype), teacher_hidden.to(teacher_head.dtype)
    chunk_size = _check(student_hidden, head, teacher_hidden, teacher_head, labels, chunk_size)
    *means, each_kl = _Distillation.apply(
        *(student_hidden, head.weight, head.bias),  # what a gradient can be asked of
        *(head, teacher_hidden, teacher_head, labels, alpha, chunk_size, torch.is_grad_enabled()),
    )
    return DistillationLoss(*means), each_kl


@torch.no_grad()
def divergence(
    student_hidden: Tensor,
    student_head: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_head: Tensor | Head,
    labels: Tensor,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student) and NLL of every position, (N,) each, in nats and without gradient, for measuring.

    Arguments and errors are those of `distillation_loss`, whose `kl` and `nll` are the means of these.
    """
    student_head, teacher_head = _as_head(student_head), _as_head(teacher_head)
    student_hidden, teacher_hidden = student_hidden.to(student_head.dtype), teacher_hidden.to(teacher_head.dtype)
    chunk_size = _check(student_hidden, student_head, teacher_hidden, teacher_head, labels, chunk_size)
    kl, nll = labels.new_empty((2, len(labels)), dtype=_work_dtype(student_hidden))
    chunks = _chunks(student_hidden, student_head, teacher_hidden, teacher_head, labels, chunk_size, None)
    for rows, chunk_kl, chunk_nll, _ in chunks:
        kl[rows], nll[rows] = chunk_kl, chunk_nll
    return kl, nll


class _Distillation(torch.autograd.Function):
    """(loss, kl, nll, each_kl); the gradients are made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        teacher_hidden: Tensor,
        teacher_head: Head,
        labels: Tensor,
        alpha: float,
        chunk_size: int,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        needed = [with_grad and each for each in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(hidden) if needed[0] else None
        grad_weight = torch.zeros_like(weight) if needed[1] else None
        grad_bias = torch.zeros_like(bias, dtype=_work_dtype(hidden)) if bias is not None and needed[2] else None
        vocab = min(len(head), len(teacher_head))
        sums = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        each_kl = labels.new_empty(len(labels), dtype=_work_dtype(hidden))
        for rows, kl, nll, grad in _chunks(
            hidden, head, teacher_hidden, teacher_head, labels, chunk_size, alpha if any(needed) else None
        ):
            sums += torch.stack((kl.sum(dtype=torch.float64), nll.sum(dtype=torch.float64)))
            each_kl[rows] = kl
            if grad_bias is not None:
                grad_bias[:vocab] += grad.sum(0, dtype=grad_bias.dtype)
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight[:vocab], out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight[:vocab].addmm_(grad.T, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(weight.dtype))
        kl, nll = (sums / max(len(labels), 1)).to(_work_dtype(hidden))
        ctx.mark_non_differentiable(kl, nll, each_kl)
        return alpha * kl + (1 - alpha) * nll, kl, nll, each_kl

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        if grad_output != 1:
            grads = tuple(None if grad is None else grad.mul_(grad_output) for grad in grads)
        return *grads, *[None] * 7


def _chunks(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    labels: Tensor,
    chunk_size: int,
    alpha: float | None,
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Chunks of positions: which rows, their KL (n,) and NLL (n,), and ∂L/∂(h · Wᵀ) (n, V) in the dtype of the logits.

    The gradient lies in a buffer that the next chunk overwrites; it is rubbish if alpha is None.
    """
    vocab = min(len(head), len(teacher_head))
    buffers = tuple(
        x.new_empty((min(chunk_size, len(labels)), vocab), dtype=_logit_dtype(x)) for x in (hidden, teacher_hidden)
    )
    block = max(CPU_BLOCK // vocab, 1) if hidden.device.type == "cpu" else chunk_size
    for start in range(0, len(labels), chunk_size):
        rows = slice(start, start + chunk_size)
        student = _product(hidden[rows], head.weight[:vocab], buffers[0])
        teacher = _product(teacher_hidden[rows], teacher_head.weight[:vocab], buffers[1])
        blocks = zip(student.split(block), teacher.split(block), labels[rows].split(block), strict=True)
        losses = [_losses_(z, z_teacher, y, (head, teacher_head), alpha, len(labels)) for z, z_teacher, y in blocks]
        kl, nll = (torch.cat(column) for column in zip(*losses, strict=True))
        yield rows, kl, nll, student


def _product(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    """hidden · weightᵀ (n, V) in `buffer`, or in fp32 without a copy of the weight where the device can."""
    if buffer.dtype == hidden.dtype:
        return torch.mm(hidden, weight.T, out=buffer[: len(hidden)])
    return torch.mm(hidden, weight.T, out_dtype=buffer.dtype, out=buffer[: len(hidden)])


def _losses_(
    student: Tensor, teacher: Tensor, labels: Tensor, heads: tuple[Head, Head], alpha: float | None, total: int
) -> tuple[Tensor, Tensor]:
    """KL (n,) and NLL (n,) from h · Wᵀ of both heads, (n, V), which are used up.

    Unless alpha is None, `student` is then ∂L/∂(h · Wᵀ) / total.
    """
    head, teacher_head = heads
    p, q = head.bend(student.to(_work_dtype(student))), teacher_head.bend(teacher.to(_work_dtype(student)))
    slope = head.slope(p) if alpha is not None else None
    p -= p.amax(-1, keepdim=True)
    q -= q.amax(-1, keepdim=True)
    gap = q - p
    at_label = p.gather(1, labels[:, None])
    p_sum, q_sum = p.exp_().sum(-1, keepdim=True), q.exp_().sum(-1, keepdim=True)
    # The sums lie in 1 … V, so neither the quotients nor the logarithms can overflow; 0 · log 0 never arises.
    log_p_sum = p_sum.log()
    kl = gap.mul_(q).sum(-1, keepdim=True) / q_sum + (log_p_sum - q_sum.log())
    nll = log_p_sum - at_label
    if alpha is not None:
        p.mul_(1 / (total * p_sum)).addcmul_(q, alpha / (total * q_sum), value=-1)
        p.scatter_add_(1, labels[:, None], torch.full_like(at_label, -(1 - alpha) / total))
        if slope is not None:
            p.mul_(slope)
        if p is not student:
            student.copy_(p)
    return kl[:, 0], nll[:, 0]


def _as_head(head: Tensor | Head) -> Head:
    return head if isinstance(head, Head) else Head(head)


def _work_dtype(x: Tensor) -> torch.dtype:
    """The dtype of softmaxes and sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _logit_dtype(x: Tensor) -> torch.dtype:
    """The dtype of logits: fp32 for half precision where the device's products can write it."""
    return _work_dtype(x) if x.is_cuda else x.dtype


def _check(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    labels: Tensor,
    chunk_size: int | None,
) -> int:
    """The chunk size to use; raises ValueError on input that does not fit together."""
    num = len(labels)
    for name, hidden, head in (
        ("student", student_hidden, student_head),
        ("teacher", teacher_hidden, teacher_head),
    ):
        if hidden.shape != (num, head.shape[1]):
            raise ValueError(
                f"{name} hidden states are {tuple(hidden.shape)}, but {num} labels and a head of "
                f"{tuple(head.shape)} ask for {(num, head.shape[1])}"
            )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, but a chunk holds at least one position")
    vocab = min(len(student_head), len(teacher_head))
    if num and (int(labels.min()) < 0 or int(labels.max()) >= vocab):
        raise ValueError(
            f"labels reach from {int(labels.min())} to {int(labels.max())}, but student and teacher share the ids "
            f"0 to {vocab - 1}; pass scored positions only"
        )
    return chunk_size or min(max(-(-num // CHUNKS), 1), MAX_CHUNK_SIZE)
