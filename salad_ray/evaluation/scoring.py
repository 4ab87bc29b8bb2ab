"""Log-likelihoods of the choices of multiple-choice items, read as text or heard as speech.

A choice's score is log P(its tokens | the prompt), summed over its tokens, as lm-evaluation-harness (0.4.13) has it.
The prompt of an item is computed once for all its choices: a row holds the prompt and then every choice, positions go
on from the prompt's end in each, and a mask lets a choice see the prompt and itself, not the other choices.

Where an item is heard, frames stand in the place of what is spoken. The prompt is tokenised as text and cut: a token
with any character of what is spoken, and a token of nothing but spaces in front of it, is heard and not read, as in
training. So of "?\\n" at the end of a question, one token to many tokenizers, the line break goes with the question.

Shapes: B items, T positions of a row, C encoder width times the frames at a position, D model width, V vocabulary,
P scored positions (those from which something is predicted), L scored tokens; P < L, since all choices of an item begin
at one position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from salad_ray.evaluation.benchmarks import exemplar_of
from salad_ray.model.head import Head, lm_head
from salad_ray.model.loading import ModelError
from salad_ray.model.packed import window
from salad_ray.model.speech_lm import SpeechLM
from salad_ray.sequences.batch import stacked
from salad_ray.sequences.interleave import Tokens, prefix_ids, tokenize
from salad_ray.sequences.packing import padded_batches
from salad_ray.tables import BadInput, Item

Heard = tuple[Item, NDArray[np.floating]]
"""An item, and the frames (num_frames, C) of what is spoken of it."""

EXEMPLAR_END = "\n\n"
MIN_FILL = 0.75
CHUNK_LOGITS = 2**25  # logits in memory at once: 128 MB in fp32
_MASKED_ATTENTION = ("sdpa", "eager")  # flash attention and "varlen" know segments only, no tree


@dataclass(frozen=True, eq=False)
class Query:
    """What a model is asked: a prompt of `before`, `frames` and `after`, and the choices that may follow it.

    before, after: token ids in front of the speech and behind it; of a text query all of the prompt is `before`.
    frames: (S, C) of the encoder, or none.
    choices: token ids of each choice, at least one.
    num_shots: exemplars that are left.
    shots: what is in front of `before` where exemplars are heard: of each the token ids, and the frames (S, C) behind.
    """

    before: list[int]
    frames: NDArray[np.floating] | None
    after: list[int]
    choices: list[list[int]]
    num_shots: int
    shots: tuple[tuple[list[int], NDArray[np.floating]], ...] = ()

    @property
    def prompt(self) -> list[int]:
        """Token ids, 0 where speech is."""
        parts = [*self.shots, (self.before, () if self.frames is None else self.frames)]
        return [id for ids, frames in parts for id in (*ids, *[0] * len(frames))] + self.after

    @property
    def speech(self) -> Iterator[tuple[int, NDArray[np.floating]]]:
        """Each span of speech in the prompt, with the position of its first frame."""
        position = 0
        for ids, frames in (*self.shots, (self.before, self.frames)):
            if frames is not None:
                yield position + len(ids), frames
                position += len(ids) + len(frames)

    @property
    def num_prompt(self) -> int:
        """Positions of the prompt."""
        return len(self.prompt)

    @property
    def num_positions(self) -> int:
        """Positions of the prompt and the longest choice; a choice's last token is predicted, never read."""
        return self.num_prompt + max(map(len, self.choices)) - 1

    @property
    def width(self) -> int:
        """Positions of the row: the prompt and all choices."""
        return self.num_prompt + sum(len(choice) - 1 for choice in self.choices)


def text_query(tokenizer: PreTrainedTokenizerBase, exemplars: Sequence[str], item: Item, context: int) -> Query:
    """An item to read; the first exemplars are dropped until prompt and choice fit into `context` positions.

    Ids are those of lm-evaluation-harness: prompt and choice encoded as a whole, the prompt's trailing spaces part of
    the choice; BOS iff the tokenizer adds it. (EOS never, where the harness would cut a choice short.) An empty prompt
    is BOS, else EOS.

    Raises:
        BadInput: it does not fit without any exemplar, or there is nothing to predict.
    """

    def make(kept: Sequence[str]) -> Query:
        _, tokens, choices = _encode(tokenizer, kept, item)
        before = prefix_ids(tokenizer) + tokens.ids.tolist()
        return Query(before or _start_id(tokenizer), None, [], choices, len(kept))

    return _longest_fitting(make, exemplars, context)


def speech_query(
    tokenizer: PreTrainedTokenizerBase,
    exemplars: Sequence[str] | Sequence[Heard],
    item: Item,
    frames: NDArray[np.floating],
    context: int,
    stride: int = 1,
) -> Query:
    """An item to hear: as `text_query`, with the same ids for the choices, and frames for `item.spoken`.

    Args:
        exemplars: as texts, or as items with their frames, which are then heard like the item, and their answers read.
        frames: (num_frames, C) of the encoder. Nobody knows where the words of a question end, so they are grouped from
            the question's start.
        stride: of the adapter, frames side by side at a position.

    Raises:
        BadInput: as `text_query`; there are no frames; or a token joins what is spoken with a word that is not.
    """
    if len(frames) == 0:
        raise BadInput("there are no speech frames")

    def make(kept: Sequence[str] | Sequence[Heard]) -> Query:
        texts = [each if isinstance(each, str) else exemplar_of(each[0]) for each in kept]
        text, tokens, choices = _encode(tokenizer, texts, item)
        starts = accumulate((len(each) + len(EXEMPLAR_END) for each in texts), initial=0)
        ids, front, read = tokens.ids.tolist(), prefix_ids(tokenizer), 0
        spans = []
        for start, each in zip(starts, (*kept, (item, frames)), strict=True):
            if not isinstance(each, str):
                start += len(each[0].before)
                first, last = _heard(text, tokens, start, start + len(each[0].spoken))
                spans.append((front + ids[read:first], stacked(each[1], stride)))
                front, read = [], last
        *shots, (before, heard) = spans
        return Query(before, heard, ids[read:], choices, len(kept), tuple(shots))

    return _longest_fitting(make, exemplars, context)


def batches(queries: Sequence[Query], max_positions: int) -> Iterator[list[int]]:
    """Indices of the queries to score together, longest first: rows × longest row ≤ max_positions, one row at least.

    No row is shorter than `MIN_FILL` of the longest: few queries of many lengths would be padding for the most part.
    """
    return padded_batches([query.width for query in queries], max_positions, MIN_FILL)


@torch.no_grad()
def score(model: SpeechLM | PreTrainedModel, queries: Sequence[Query]) -> list[list[float]]:
    """Log-likelihood of each choice of each query, in nats, from a single forward; `batches` says which go together.

    Args:
        model: in eval mode, loaded with attention "sdpa" or "eager"; a plain text LLM takes text queries only.

    Raises:
        ModelError: the model's attention takes no mask or reaches less far than the longest query, or it cannot hear.
    """
    if not queries:
        return []
    llm = model.llm if isinstance(model, SpeechLM) else model
    _require_reach(llm, max(query.num_positions for query in queries))
    rows = [_lay_out(query) for query in queries]
    ids, positions, branches = (
        _padded([getattr(row, name) for row in rows], fill).to(llm.device)
        for name, fill in (("ids", 0), ("positions", 0), ("branches", -1))
    )
    width = ids.shape[1]
    embeddings = _put_speech(model, queries, llm.get_input_embeddings()(ids))
    hidden = llm.get_decoder()(
        inputs_embeds=embeddings,
        attention_mask=_tree_mask(branches, embeddings.dtype),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    sources = torch.from_numpy(np.concatenate([row.sources + b * width for b, row in enumerate(rows)]))
    labels = torch.from_numpy(np.concatenate([row.labels for row in rows]))
    values = _log_probabilities(hidden.flatten(0, 1), lm_head(llm), sources, labels)
    return _sum_by_choice(values, queries)


def predict(log_likelihoods: Sequence[float], choices_text: Sequence[str]) -> tuple[int | None, int | None]:
    """The choice of the largest log-likelihood, and that of the largest per character (harness: acc, acc_norm).

    None where two choices share the largest value exactly; the harness would take the first.

    Raises:
        BadInput: a value is not finite, or a choice is empty.
    """
    values = np.array(log_likelihoods, dtype=np.float64)
    lengths = np.array([len(choice) for choice in choices_text], dtype=np.float64)
    if len(values) != len(lengths):
        raise ValueError(f"{len(values)} log-likelihoods are not of {len(lengths)} choices")
    if not np.isfinite(values).all():
        raise BadInput(f"the log-likelihoods of its choices are not finite ({', '.join(map(str, values))})")
    if not lengths.all():
        raise BadInput("one of its choices is empty")
    return _only_largest(values), _only_largest(values / lengths)


def _only_largest(values: NDArray[np.float64]) -> int | None:
    (largest,) = np.nonzero(values == values.max())
    return int(largest[0]) if len(largest) == 1 else None


def _longest_fitting(make: Callable[[Any], Query], exemplars: Sequence[Any], context: int) -> Query:
    for dropped in range(len(exemplars) + 1):
        query = make(exemplars[dropped:])
        if query.num_positions <= context:
            return query
    raise BadInput(f"it takes {query.num_positions} positions without exemplars, longer than the context of {context}")


def _encode(
    tokenizer: PreTrainedTokenizerBase, exemplars: Sequence[str], item: Item
) -> tuple[str, Tokens, list[list[int]]]:
    """The whole prompt as text; its tokens without trailing spaces and special tokens; the ids of the choices."""
    text = EXEMPLAR_END.join([*exemplars, item.before + item.spoken + item.after])
    prompt, *wholes = tokenize([text.rstrip(), *(f"{text} {choice}" for choice in item.choices)], tokenizer)
    choices = [whole.ids[len(prompt.ids) :].tolist() for whole in wholes]
    for choice, ids in zip(item.choices, choices, strict=True):
        if not ids:
            raise BadInput(f"the tokenizer makes no token of its choice '{choice}'")
    return text, prompt, choices


def _start_id(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise BadInput("its prompt is empty, and the tokenizer has neither BOS nor EOS to stand for that")
    return [start]


def _heard(text: str, tokens: Tokens, start: int, end: int) -> tuple[int, int]:
    """Range of the tokens that are heard where the characters [start, end) are spoken."""
    (inside,) = np.nonzero((tokens.starts < end) & (tokens.ends > start))
    if len(inside) == 0:
        raise BadInput("the tokenizer makes no token of what is spoken")
    first, last = int(inside[0]), int(inside[-1]) + 1
    read = text[tokens.starts[first] : start].strip() or text[end : tokens.ends[last - 1]].strip()
    if read:
        raise BadInput(f"a token joins what is spoken with '{read}', which is read")
    while first > 0 and _is_space(text, tokens, first - 1, start):
        first -= 1
    return first, last


def _is_space(text: str, tokens: Tokens, index: int, start: int) -> bool:
    """Whether a token in front of the character `start` is nothing but spaces; some tokenizers give these no width."""
    before = tokens.ends[index - 1] if index > 0 else 0
    return not text[tokens.starts[index] : tokens.ends[index]].strip(" ") and not text[before:start].strip(" ")


@dataclass(frozen=True, eq=False)
class _Row:
    """A query's row: ids (0 at speech), positions and branches (0 prompt, c + 1 choice c), all (width,); and, (L',)
    each, from where in the row the labels are predicted."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    branches: NDArray[np.int64]
    sources: NDArray[np.int64]
    labels: NDArray[np.int64]


def _lay_out(query: Query) -> _Row:
    """The prompt, then the choices, each without its last token."""
    ids = query.prompt
    num = len(ids)
    positions, branches, sources = [*range(num)], [0] * num, []
    for branch, choice in enumerate(query.choices, 1):
        sources += [num - 1, *range(len(ids), len(ids) + len(choice) - 1)]
        ids += choice[:-1]
        positions += range(num, num + len(choice) - 1)
        branches += [branch] * (len(choice) - 1)
    labels = [token for choice in query.choices for token in choice]
    return _Row(*(np.array(values, dtype=np.int64) for values in (ids, positions, branches, sources, labels)))


def _padded(rows: Sequence[NDArray[Any]], fill: int = 0) -> Tensor:
    """(len(rows), longest, …), padded on the right."""
    return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True, padding_value=fill)


def _tree_mask(branches: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T) to add to the attention's scores: earlier positions of the prompt and of one's own branch."""
    seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    seen = seen.tril()
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def _put_speech(model: SpeechLM | PreTrainedModel, queries: Sequence[Query], embeddings: Tensor) -> Tensor:
    """The embeddings (B, T, D) with the adapter's output where the frames of the queries are."""
    heard = [(b, frames, start) for b, query in enumerate(queries) for start, frames in query.speech]
    if not heard:
        return embeddings
    if not isinstance(model, SpeechLM):
        raise ModelError(f"{model.name_or_path}: is a text LLM and cannot hear; score text, or load a SpeechLM")
    width = embeddings.shape[1]
    padded = _padded([np.asarray(frames, dtype=np.float32) for _, frames, _ in heard])
    mask = _padded([np.ones(len(frames), dtype=bool) for _, frames, _ in heard])
    index = torch.cat([torch.arange(len(frames)) + b * width + start for b, frames, start in heard])
    weight = model.adapter.input.weight
    speech = model.adapter(padded.to(weight.device, weight.dtype), mask.to(weight.device))
    mixed = embeddings.flatten(0, 1).index_copy(0, index.to(embeddings.device), speech.to(embeddings.dtype))
    return mixed.view_as(embeddings)


def _log_probabilities(hidden: Tensor, head: Head, sources: Tensor, labels: Tensor) -> NDArray[np.float64]:
    """(L,) log-probability of each label at its source, a flat position of hidden (B · T, D); in fp32."""
    places, of_label = torch.unique(sources, return_inverse=True)  # (P,), (L,)
    values = torch.empty(len(labels), dtype=torch.float32)
    size = max(CHUNK_LOGITS // len(head), 1)
    for start in range(0, len(places), size):
        chosen = (of_label >= start) & (of_label < start + size)
        logits = head.logits(hidden[places[start : start + size].to(hidden.device)])
        rows, own = (of_label[chosen] - start).to(head.device), labels[chosen].to(head.device)
        values[chosen] = (logits[rows, own] - logits.logsumexp(-1)[rows]).cpu()
    return values.double().numpy()


def _sum_by_choice(values: NDArray[np.float64], queries: Sequence[Query]) -> list[list[float]]:
    lengths = [len(choice) for query in queries for choice in query.choices]
    bounds = pairwise(accumulate(lengths, initial=0))
    return [[float(values[slice(*next(bounds))].sum()) for _ in query.choices] for query in queries]


def _require_reach(llm: PreTrainedModel, longest: int) -> None:
    """Refuse attention that knows no such mask, or that would not reach from one end of a query to the other."""
    attention = llm.config._attn_implementation
    if attention not in _MASKED_ATTENTION:
        raise ModelError(
            f"{llm.name_or_path}: its attention '{attention}' takes no mask, so choices cannot share a prompt; load it "
            f"with attention='{_MASKED_ATTENTION[0]}'"
        )
    config = llm.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    turned = rope.get("rope_type") in ("dynamic", "longrope")  # all rows of a batch, by the farthest position
    limits = {
        "a sliding window": window(config),
        "room": getattr(config, "max_position_embeddings", None),
        "an original context": rope.get("original_max_position_embeddings") if turned else None,
    }
    for what, limit in limits.items():
        if limit is not None and longest > limit:
            raise ModelError(
                f"{llm.name_or_path}: has {what} of {limit} positions, but a query takes {longest}; make the context "
                f"{limit} or less"
            )
