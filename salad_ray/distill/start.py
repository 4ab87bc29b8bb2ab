"""What is measured before the first step, on the weights that were loaded, the device and the precision of the run.

`model/trial.py` has tried the code on a small copy in float32; this is the rest: the same kernels, weights and rounding
with which training runs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from salad_ray.distill.losses import divergence
from salad_ray.model.head import lm_head
from salad_ray.model.packed import hidden_states, segment_bounds
from salad_ray.model.speech_lm import SpeechLM

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.02}
"""Of a mean KL in nats. A sample that sees another is off by more than 0.1."""
SEGMENTS = (23, 64, 9)


@torch.no_grad()
def start_divergences(student: SpeechLM, teacher: PreTrainedModel) -> dict[str, float]:
    """Mean KL in nats over random tokens, the student in the mode that it is in.

    Returns:
        `student`: from the teacher to the student, on a packed row of text. `packed`: from the teacher on single
        samples to the teacher on the row. `logits`: from the teacher's own logits to what its head makes of its hidden
        states.
    """
    head = lm_head(teacher)
    vocab = min(len(head), len(student.head))
    ids = torch.randint(vocab, (sum(SEGMENTS),), generator=torch.Generator().manual_seed(0)).to(head.device)
    positions = torch.cat([torch.arange(each) for each in SEGMENTS]).to(head.device)
    row = hidden_states(teacher, ids[None], positions[None])[0]
    heard = student.text_hidden(ids[None], positions[None])[0]
    samples = list(zip(ids.split(SEGMENTS), positions.split(SEGMENTS), strict=True))
    alone = torch.cat([hidden_states(teacher, text[None], where[None])[0] for text, where in samples])
    own = torch.cat([_own_logits(teacher, text[None], where[None]) for text, where in samples])
    return {
        "student": float(divergence(heard, student.head, row, head, ids)[0].mean()),
        "packed": float(divergence(row, head, alone, head, ids)[0].mean()),
        "logits": float(_kl(own, head.logits(alone).to(own.dtype))),  # rounded alike
    }


def _own_logits(llm: PreTrainedModel, ids: Tensor, position_ids: Tensor) -> Tensor:
    bounds = segment_bounds(llm, position_ids)
    logits: Tensor = llm(input_ids=ids, use_cache=False, **bounds).logits[0]
    return logits


def _kl(logits: Tensor, others: Tensor) -> Tensor:
    log_q, log_p = logits.float().log_softmax(-1), others.float().log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1).mean()


def faults(divergences: dict[str, float], dtype: torch.dtype) -> list[str]:
    """In words, which of `start_divergences` are too large for the precision, or not finite."""
    words = {
        "student": "the student in train mode is not its teacher before step 0",
        "packed": "packed samples see each other",
        "logits": "the logits are not those of the head",
    }
    limit = TOLERANCES[dtype]
    return [
        f"{words[name]} (KL {value:.2g} nats, more than {limit:g})"
        for name, value in divergences.items()
        if not value <= limit
    ]
