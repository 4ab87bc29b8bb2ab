"""Whether a text LLM does what the method takes for granted: tried out, not believed from names and signatures.

Samples packed into a row may see each other, perhaps only where positions get far; a decoder may want more than
embeddings; logits may be more than hidden states times the head; something may be random in training, so that the
student is not its teacher. All of it goes unnoticed in a loss that falls. These are properties of code and config, not
of the weights, so they are tried in float32 on a small copy: the same class and config with fewer layers, but one of
every kind, narrow, and with random weights that let every part show. It takes about a second, once in a process.
`distill/start.py` measures the same on the weights that were loaded, on the device and in the precision of the run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from salad_ray.model.head import lm_head
from salad_ray.model.layers import decoder_layers
from salad_ray.model.loading import UNUSABLE, ModelError, quiet
from salad_ray.model.packed import give_mask, hidden_states, is_window, window

TOLERANCE = 1e-4
"""Largest difference of logits, in their standard deviation."""
SEGMENTS = (5, 12, 1, 27, 3)
"""Lengths of the samples of a short row."""
CONTEXT = 2048
"""Length of the long row where nobody says how long rows will be."""
WINDOW = 8
"""Sliding windows and chunks are made no longer, so that short samples reach beyond them."""
CHOICES = 40
"""Positions of a row of two choices, or as many as the window has: to longer ones scoring does not give a row."""
SEEDS = 3
"""Tries. Rounding decides between two experts that score alike, and the output jumps; a true fault shows every time."""
_UNBUILDABLE = (*UNUSABLE, AttributeError, IndexError, AssertionError, ZeroDivisionError)
_LARGE = 1_000_000_000
"""Parameters above which a copy is only made of a few layers."""


class _TooLong(ModelError):
    """A row of the wanted length cannot be read."""


_outcomes: dict[tuple[str, ...], dict[str, Any] | ModelError] = {}


def try_out(llm: PreTrainedModel, context: int | None = None) -> dict[str, Any]:
    """Refuse an LLM that would be trained wrongly; else say how exact it is, and set it to do as was tried.

    Args:
        context: positions of the rows to come; unset: 2,048, or as many as a table of positions has.

    Returns:
        The largest differences, in standard deviations: of the hidden states of token ids from those of their
        `embeddings`; of our `logits` from the model's own; of `packed` samples, text and speech, from single ones, also
        at the end of rows of `context` positions (`far`); of a choice that shares its prompt and row with others, as in
        scoring, from the choice alone (`choices`); of `train_mode` from eval mode. `mask`: whether packed rows
        need an explicit mask to stay apart.

    Raises:
        ModelError: what failed. The caller knows the model's path.
    """
    attention = llm.config._attn_implementation
    if attention not in ("eager", "sdpa"):  # depends on device and precision: distill/start.py measures those of a run
        attention = "sdpa" if type(llm)._supports_sdpa else "eager"
    key = (type(llm).__name__, llm.config.to_json_string(use_diff=False), attention, str(context))
    if key not in _outcomes:
        try:
            _outcomes[key] = _tried(llm, attention, context)
        except ModelError as error:
            _outcomes[key] = error
    outcome = _outcomes[key]
    if isinstance(outcome, ModelError):
        raise outcome
    if outcome["mask"]:
        give_mask(llm)
    return outcome


def _tried(llm: PreTrainedModel, attention: str, context: int | None) -> dict[str, Any]:
    small, length = small_copy(llm, attention), context or CONTEXT
    most = getattr(small.config, "max_position_embeddings", None) or length
    try:
        found = _differences(small, length)
    except ModelError as error:
        if most >= length:
            raise
        if context:
            raise ModelError(
                f"{type(llm).__name__} has {most:,} positions, but rows are to have {context:,}; set pack.context to "
                f"{most} or less"
            ) from error
        found = _differences(small, most)
    if fault := _failure(small, found):
        raise ModelError(fault)
    return found


def _differences(llm: PreTrainedModel, length: int) -> dict[str, Any]:
    """Of the first try without a fault, with an explicit mask only if need be; of the first of all if all have one."""
    tries: list[dict[str, Any]] = []
    for mask in (False, True):
        give_mask(llm, mask)
        for seed in range(SEEDS):
            try:
                tries.append(_measured(llm, length, seed) | {"context": length, "mask": mask})
            except _TooLong:
                raise
            except ModelError:
                if not mask:
                    raise
                return tries[0]  # it takes no such mask
            if "train_mode" in tries[-1]:  # which no seed excuses: the same row twice
                return tries[-1]
        if not tries[0]["embeddings"] <= TOLERANCE >= tries[0]["logits"]:  # for which packing is no reason
            break
    return tries[0]


@torch.no_grad()
def _measured(llm: PreTrainedModel, length: int, seed: int) -> dict[str, float]:
    """Differences between what the model makes of single samples and what we make of packed rows.

    The long row, which takes most of the time, is left out where a short one has shown a fault.

    Raises:
        ModelError: what the model cannot do at all; the error inside it is the cause.
    """
    generator, kind = torch.Generator().manual_seed(seed), type(llm).__name__
    with _or_else(ModelError(f"{kind} has no embeddings and head by themselves; use another model")):
        embed, head = llm.get_input_embeddings(), lm_head(llm)
    lengths = [max(each * min(length, sum(SEGMENTS)) // sum(SEGMENTS), 1) for each in SEGMENTS]
    texts = [torch.randint(len(head), (each,), generator=generator) for each in lengths]
    embedded = [embed(text) for text in texts]
    speech = [torch.randn(each.shape, generator=generator) * each.std(correction=0) for each in embedded]
    with _or_else(ModelError(f"{kind} has no decoder that gives hidden states by itself; use another model")):
        own = torch.cat([_own(llm, input_ids=text) for text in texts])
        outputs = [llm.get_decoder()(input_ids=text[None], use_cache=False) for text in texts]
        read = torch.cat([each.last_hidden_state[0] for each in outputs])
    with _or_else(ModelError(f"{kind} reads nothing but token ids, and speech has no token ids; use another model")):
        alone = torch.cat([_hidden(llm, [each]) for each in embedded])
        spoken = torch.cat([_own(llm, inputs_embeds=each) for each in speech])
    with _or_else(ModelError(f"{kind} has layers between hidden states and head; use another model")):  # Electra
        found = {"embeddings": _off(alone, read), "logits": _off(head.logits(alone), own)}
    with _or_else(ModelError(_unusable(llm, "it cannot read a row of several"))):
        packed, heard = (head.logits(_hidden(llm, samples)) for samples in (embedded, speech))
    found["packed"] = max(_off(packed, own), _off(heard, spoken))
    num_asked = max(min(window(llm.config) or CHOICES, CHOICES, length), 5)
    if found["packed"] <= TOLERANCE:
        asked = embed(torch.randint(len(head), (num_asked,), generator=generator))
        with _or_else(ModelError(f"{kind} takes no mask, so that choices cannot share a prompt; use another model")):
            found["choices"] = _off(*_two_choices(llm, asked))
    if _failure(llm, found):
        return found
    # Behind a short sample, as many positions as are left, or of a very long row its end.
    far = torch.arange(max(lengths[0], length - CONTEXT), length)
    text = torch.randint(len(head), (len(far),), generator=generator)
    where = {"position_ids": far[None]} if length > CONTEXT else {}
    far, samples = far if where else far - lengths[0], [embedded[0], embed(text)]
    with _or_else(_TooLong(f"{kind} cannot read rows of {length:,} positions; set pack.context to less")):
        row = head.logits(_hidden(llm, samples, far))
        found["far"] = _off(row, torch.cat([own[: lengths[0]], _own(llm, input_ids=text, **where)]))
    if _failure(llm, found):
        return found
    try:  # in a long row, since what is random may be rare
        with _or_else(ModelError(f"{kind} cannot read embeddings in train mode; use another model")):
            found["train_mode"] = _off(head.logits(_hidden(llm.train(), samples, far)), row)
    finally:
        llm.eval()
    return found


@contextmanager
def _or_else(told: ModelError) -> Iterator[None]:
    """What is told where something inside the model fails; its own words, which are the cause, help nobody."""
    try:
        yield
    except _UNBUILDABLE as error:
        raise told from error


def _two_choices(llm: PreTrainedModel, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the last of two choices, of two positions each, behind a prompt: as scoring makes them, in one row with
    the last choice at the positions of the first; and as the model makes them of that choice alone."""
    num = len(asked)
    branches = torch.tensor([0] * (num - 4) + [1, 1, 2, 2])
    seen = ((branches == 0) | (branches == branches[:, None])).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    states = llm.get_decoder()(
        inputs_embeds=asked[None],
        attention_mask=mask[None, None],
        position_ids=torch.tensor([[*range(num - 2), num - 4, num - 3]]),
        use_cache=False,
    ).last_hidden_state
    alone = _own(llm, inputs_embeds=torch.cat([asked[:-4], asked[-2:]]))
    return lm_head(llm).logits(states[0, -2:]), alone[-2:]


def _own(llm: PreTrainedModel, position_ids: Tensor | None = None, **inputs: Tensor) -> Tensor:
    """The model's own logits of one sample."""
    where = {} if position_ids is None else {"position_ids": position_ids}
    return llm(**{name: values[None] for name, values in inputs.items()}, **where, use_cache=False).logits[0]


def _hidden(llm: PreTrainedModel, samples: Sequence[Tensor], last_positions: Tensor | None = None) -> Tensor:
    """Of embeddings in one row, as training and measuring make them."""
    positions = [torch.arange(len(sample)) for sample in samples]
    positions[-1] = positions[-1] if last_positions is None else last_positions
    return hidden_states(llm, torch.cat([*samples])[None], torch.cat(positions)[None])[0]


def _off(values: Tensor, expected: Tensor) -> float:
    off = float((values - expected).abs().max() / expected.std())
    return off if math.isfinite(off) else math.inf


def _unusable(llm: PreTrainedModel, why: str) -> str:
    what = " keeps a state that runs on from sample to sample and" if llm._is_stateful else ""
    return f"{type(llm).__name__}{what} cannot keep packed samples apart ({why}); use a plain attention model"


def _failure(llm: PreTrainedModel, found: Mapping[str, Any]) -> str:
    """What is wrong and what to do, in one sentence; empty where nothing is."""
    kind, rope = type(llm).__name__, getattr(llm.config, "rope_parameters", None) or {}
    names = ("embeddings", "logits", "packed", "choices", "far", "train_mode")
    wrong = [name for name in names if not found.get(name, 0) <= TOLERANCE]
    if not wrong:
        return ""
    off = f"off by {found[wrong[0]]:.1g} standard deviations"
    if wrong[0] == "embeddings":
        return f"{kind} makes more of token ids than their embeddings ({off}), and speech has no token ids; use another"
    if wrong[0] == "logits":
        return f"{kind} does more with hidden states than product, bias, scale and soft cap ({off}); use another model"
    if wrong[0] == "choices":
        return (
            f"{kind} goes by places in a row and not by positions ({off}), so that choices cannot share a prompt; use "
            "another model"
        )
    if wrong[0] == "train_mode":
        return f"{kind} is random in training ({off}), so that the student would not be its teacher; use another model"
    if rope.get("rope_type") in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings") or llm.config.max_position_embeddings
        return (
            f"{kind} turns all positions of a row by the farthest, so that it cannot keep packed samples apart in rows "
            f"of this length ({off}); set pack.context to {original} or less"
        )
    return _unusable(llm, off)


def without_dropout(config: PretrainedConfig) -> None:
    """Nothing of this config's model is dropped in train mode: a student must begin as its teacher.

    The jitter of routers stays: Phi-3.5-MoE goes by it in eval mode too, and is refused for what it draws in training.
    """
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            without_dropout(value)
        elif "drop" in name and type(value) in (int, float):
            setattr(config, name, type(value)(0))


def small_copy(llm: PreTrainedModel, attention: str) -> PreTrainedModel:
    """The same class and config, random and as small as a layer of every kind allows; raises `ModelError`."""
    kinds, number = layer_kinds(llm), llm.config.get_text_config().num_hidden_layers
    few = max([2, *(1 + kinds.index(kind) for kind in set(kinds))]) if kinds else number
    error: BaseException | None = None
    for config in _small_configs(llm.config.get_text_config(), few, number, llm.num_parameters() > _LARGE):
        try:
            with torch.random.fork_rng(devices=[]), quiet(), torch.no_grad():
                small = type(llm)._from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
                _randomise(small)
                small(input_ids=torch.arange(4)[None], use_cache=False)
        except _UNBUILDABLE as failure:
            error = error or failure
            continue
        if set(layer_kinds(small)) >= set(kinds):
            return small
    why = "no small copy of it can be made that has a layer of every kind and reads a few token ids"
    told = f"{type(llm).__name__} cannot be tried out: {why}; use another model"
    raise ModelError(_unusable(llm, why) if llm._is_stateful else told) from error


def layer_kinds(llm: PreTrainedModel) -> list[str]:
    """What distinguishes the decoder's layers: modules and switches, in them or in the config, but no sizes.

    Empty where the layers are not found.
    """
    config = llm.config.get_text_config()
    number = config.num_hidden_layers
    settings = {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == number}
    return [
        repr([(name, type(module).__name__, _switches(module)) for name, module in layer.named_modules()])
        + repr(_shown({name: values[place] for name, values in settings.items()}))
        for place, layer in enumerate(decoder_layers(llm) or ())
    ]


def _switches(module: nn.Module) -> list[tuple[str, object]]:
    places = ("idx", "index", "layer_id", "layer_number")
    plain = {name: value for name, value in vars(module).items() if name != "training" and not name.startswith("_")}
    return _shown({name: value for name, value in plain.items() if type(value) is bool or not name.endswith(places)})


def _shown(settings: Mapping[str, object]) -> list[tuple[str, object]]:
    """Words and switches as they are; of a number whether it is 0."""
    shown = {name: value for name, value in settings.items() if value is None or isinstance(value, (bool, str))}
    numbers = {name: value != 0 for name, value in settings.items() if type(value) in (int, float)}
    return sorted((shown | numbers).items())


def _small_configs(config: PretrainedConfig, few: int, number: int, large: bool) -> Iterator[PretrainedConfig]:
    """From the smallest to the config itself, since not every class can be made as small as another."""
    for change in (_narrow, _flatten, lambda _: None):
        for num_layers in (few, number) if few < number else (number,):
            if large and change is not _narrow and num_layers > few:
                continue
            small = copy.deepcopy(config)
            try:
                change(small)
                if num_layers < number:
                    _cut_layers(small, num_layers)
            except _UNBUILDABLE:
                continue
            yield small


def _cut_layers(config: PretrainedConfig, num_layers: int) -> None:
    number = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == number:
            setattr(config, name, value[:num_layers])
    config.num_hidden_layers = num_layers


def _flatten(config: PretrainedConfig) -> None:
    """Few tokens, thin feed-forward layers, short windows."""
    for name, value in list(vars(config).items()):
        if name.startswith("vocab_size"):
            setattr(config, name, min(value, 512))
        elif "intermediate_size" in name or name in ("ffn_dim", "n_inner", "dff", "ffn_hidden_size"):
            setattr(
                config, name, [min(each, 64) for each in value] if isinstance(value, list) else value and min(value, 64)
            )
        elif is_window(name, value):
            setattr(config, name, min(value, WINDOW))
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id") and value is not None:
            setattr(config, name, 0)


def _narrow(config: PretrainedConfig) -> None:
    """Two or four heads, of the width that they have; grouped where they were."""
    width, heads = config.hidden_size, config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    few = min(groups, 2)
    many = few if groups == heads else 2 * few
    _flatten(config)
    for name, value in list(vars(config).items()):
        if (
            type(value) is int
            and value == width
            and any(part in name for part in ("hidden", "embd", "embed", "d_model"))
        ):
            setattr(config, name, many * head_dim)
    if getattr(config, "num_key_value_heads", None) is not None:
        config.num_key_value_heads = few
    config.num_attention_heads = many


def _randomise(llm: PreTrainedModel) -> None:
    """Weights of a scale that attention, biases, norms and a soft cap of the logits all show in the logits."""
    generator = torch.Generator().manual_seed(0)
    head = llm.get_output_embeddings().weight
    for parameter in llm.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            parameter += 0.2 * noise
        else:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 * (8 if parameter is head else 1))
