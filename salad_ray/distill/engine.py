"""The DeepSpeed engine around the student, and one micro-batch through it.

Nothing here knows Ray: the trainer uses it inside Ray Train's workers, tests and benchmarks under torch.distributed
alone, so that what is tested and measured is what trains.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns, in every process, that it found no other

import deepspeed
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

from salad_ray.config import DistillConfig
from salad_ray.distill.muon import MuonAdamW
from salad_ray.distill.step import BUCKET, BatchLoss, batch_loss, global_scale, label_weight, weight_of_word_ends
from salad_ray.distill.zero import owned
from salad_ray.model.layers import decoder_layers
from salad_ray.model.speech_lm import ModelError, SpeechLM, parameter_groups
from salad_ray.sequences.batch import Batch

# DeepSpeed would compile a shared-memory all-reduce for CPUs, which needs a C++ compiler; gloo needs nothing.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
ZERO_SUPPORTED_OPTIMIZERS.append(MuonAdamW)  # else it warns of an untested one; tests/distill/test_muon.py is the test


def make_engine(student: SpeechLM, settings: DistillConfig, num_micro_batches: int, device: torch.device) -> Any:
    """The student under DeepSpeed, on its device, with AdamW, or Muon and AdamW, over the groups of `parameter_groups`.

    torch.distributed must be running. Each group keeps its peak learning rate as `peak_lr`.

    Args:
        num_micro_batches: forward and backward passes of one optimizer step.

    Raises:
        ModelError: `distill.compile` or Muon is set, and the LLM has no list of layers.
    """
    if settings.activation_checkpointing:
        student.gradient_checkpointing()
    if settings.compile:
        compile_layers(student.llm)
    groups = parameter_groups(student, settings)
    for group in groups:
        group["peak_lr"] = group["lr"]
    fused = device.type == "cuda"
    muon = MuonAdamW(student, groups, settings.betas, fused) if settings.optimizer == "muon" else None
    optimizer = muon or torch.optim.AdamW(groups, betas=settings.betas, fused=fused)
    num_parameters = sum(parameter.numel() for parameter in student.parameters())
    engine, *_ = deepspeed.initialize(
        model=student.to(device),
        optimizer=optimizer,
        config=deepspeed_config(settings, num_micro_batches, num_parameters),
        dist_init_required=False,
    )
    if muon is not None:
        muon.locate(owned(engine))
    return engine


def destroy(engine: Any) -> None:
    """Let an engine go, so that its models and optimizer leave the memory.

    ZeRO 3 leaves its model in a global list, and hooks that refer to the engine; so that is emptied.
    """
    engine.destroy()
    FWD_MODULE_STACK.clear()
    for parameter in engine.module.parameters():
        vars(parameter).clear()
        parameter.grad, parameter.data = None, parameter.data.new_empty(0)
    for held in (engine.optimizer, engine):
        vars(held).clear()


def compile_layers(llm: PreTrainedModel, backend: str = "inductor") -> None:
    """Compile each decoder layer by itself, in place, student's and teacher's alike.

    All layers of one shape share their code, so that compiling takes seconds. The model as a whole would be compiled
    anew for nearly every batch, since the number and length of its speech spans and labels differ.

    Raises:
        ModelError: the LLM has no list of layers.
    """
    layers = decoder_layers(llm)
    if layers is None:
        raise ModelError(f"the layers of {type(llm).__name__} cannot be compiled one by one; set distill.compile=false")
    for layer in layers:
        layer.compile(backend=backend)


def deepspeed_config(settings: DistillConfig, num_micro_batches: int, num_parameters: int) -> dict[str, Any]:
    """What the engine needs to know; the optimizer and the learning rate are ours.

    Its buffer for gradients has `reduce_bucket_size` elements, however few parameters there are.
    """
    return {
        "train_micro_batch_size_per_gpu": settings.micro_batch_rows,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": settings.max_grad_norm,
        "bf16": {"enabled": settings.precision == "bf16"},
        "zero_optimization": {"stage": settings.zero_stage, "reduce_bucket_size": min(BUCKET, num_parameters)},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def forward_backward(
    engine: Any, teacher: nn.Module, batch: Batch, settings: DistillConfig, num_labels: float, num_micro_batches: int
) -> BatchLoss:
    """One micro-batch: its loss, and its gradient added to the engine's. `engine.step()` must follow.

    Args:
        batch: on the engine's device, frames in its precision.
        num_labels: of the whole step, over all workers and micro-batches; with word ends their sum of `label_weight`.
    """
    head, word_end_weight = engine.module.head, weight_of_word_ends(settings)
    with ExitStack() as stack:
        gathered = GatheredParameters(head.parameters, enabled=settings.zero_stage == 3)
        gather_head = partial(stack.enter_context, gathered)
        loss = batch_loss(
            engine, head, teacher, batch, settings.alpha, settings.loss_chunk_size, gather_head, word_end_weight
        )
        weight = label_weight(batch, word_end_weight)
        scale = global_scale(weight, num_labels, dist.get_world_size(), num_micro_batches)
        engine.backward(loss.loss * scale)
    return loss
