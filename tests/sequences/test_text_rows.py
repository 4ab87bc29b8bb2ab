"""Text alone: every passage in one row, teacher and student alike, and its share of the rows wherever one looks."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import TOKENIZERS, a_table, make_features, make_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from salad_ray.config import AdapterConfig, Config, PackConfig
from salad_ray.configfile import parse_config
from salad_ray.distill import budget
from salad_ray.distill.step import batch_loss
from salad_ray.model.speech_lm import EncoderSpec, SpeechLM, load_text_lm
from salad_ray.sequences.batch import Batch, Sample, collate
from salad_ray.sequences.interleave import tokenize
from salad_ray.sequences.loader import LaneReader, LaneStream, Mix
from salad_ray.sequences.plan import plan_lane, plan_shard_name, read_without_features, shards_of_lane
from salad_ray.sequences.text_rows import Text, plan_text_lane, text_segment
from salad_ray.stages.pack import active_rows, natural_rows
from salad_ray.tables import BadInput, Features, Passage, PlanRow, Table, TableError, to_arrow

TOKENIZER = make_tokenizer("bos")
CONFIG = PackConfig(context=96, text_words=(2, 6), speech_words=(1, 4), num_lanes=4, rows_per_lane=2)
SETS = ("active", "text", "natural")
NUM_EPOCHS = {"natural": 4, "active": 6}


def some_text(rng: np.random.Generator, most: int) -> str:
    return " ".join(rng.choice(["people", "said", "union,", "justice"], rng.integers(3, most)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Natural and active speech, and text alone, with their plans."""
    path, rng = str(tmp_path_factory.mktemp("text")), np.random.default_rng(0)
    for name, num_epochs in NUM_EPOCHS.items():
        features, plan = a_table(path, name, "features"), a_table(path, name, "plan")
        for shard in range(8):
            rows = [make_features(some_text(rng, 16), f"{name}-{shard}-{i}") for i in range(16)]
            features.write(f"part-{shard:05d}", to_arrow(Features, rows))
        for lane in range(CONFIG.num_lanes):
            own = shards_of_lane(features.shards(), lane, CONFIG.num_lanes)
            for epoch in range(num_epochs):
                planned, _ = plan_lane(
                    lambda shard, table=features: read_without_features(table, shard),
                    own, TOKENIZER, CONFIG, lane=lane, epoch=epoch, seed=0,
                )  # fmt: skip
                plan.write(plan_shard_name(lane, epoch), to_arrow(PlanRow, planned))
    passages, plan = a_table(path, "text", "passages"), a_table(path, "text", "plan")
    for shard in range(8):
        rows = [Passage(passage_id=f"{shard}-{i}", doc_id="d", text=some_text(rng, 24)) for i in range(12)]
        passages.write(f"part-{shard:05d}", to_arrow(Passage, rows))
    for lane in range(CONFIG.num_lanes):
        planned, _, _ = plan_texts(passages, lane)
        plan.write(plan_shard_name(lane, 0), to_arrow(PlanRow, planned))
    return path


def plan_texts(passages: Table, lane: int, seed: int = 0, context: int = CONFIG.context) -> Any:
    def load(shard: str) -> list[Text]:
        rows = passages.read_rows(Passage, shard)
        return [Text(index, row.passage_id, row.text) for index, row in enumerate(rows)]

    own = shards_of_lane(passages.shards(), lane, CONFIG.num_lanes)
    return plan_text_lane(load, own, TOKENIZER, context, lane=lane, seed=seed)


def tables(path: str, name: str) -> tuple[Table, Table]:
    return a_table(path, name, "plan"), a_table(path, name, "passages" if name == "text" else "features")


def make_reader(path: str, shares: dict[str, float], **options: Any) -> LaneReader:
    others = {name: tables(path, name) for name in shares}
    mix = Mix(shares, CONFIG.num_lanes)
    return LaneReader(*tables(path, "natural"), TOKENIZER, CONFIG, others=others, mix=mix, **options)


def row_key(row: list[Sample]) -> bytes:
    return b"".join(s.segment.token_ids.tobytes() + s.frames.tobytes() for s in row)


def steps(reader: LaneReader, num: int) -> list[list[bytes]]:
    return [[row_key(row) for row in rows] for rows in islice(reader.samples(), num)]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_sample_is_the_text_and_every_position_but_the_first_is_scored_against_the_same_one(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    text = "people said justice, and the union"
    [tokens] = tokenize([text], tokenizer)
    bos = [tokenizer.bos_token_id] if kind == "bos" else []
    segment = text_segment(tokens, bos, len(tokens.ids))
    ids = [*bos, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert segment.token_ids.tolist() == segment.teacher_ids.tolist() == ids
    assert segment.student_index.tolist() == segment.teacher_index.tolist() == list(range(len(ids) - 1))
    assert segment.labels.tolist() == ids[1:]
    assert set(segment.distance.tolist()) == {-1}
    assert len(segment.frame_index) == len(segment.span_lengths) == 0
    with pytest.raises(BadInput, match="another tokenizer"):
        text_segment(tokens, bos, len(tokens.ids) + 1)


def test_every_passage_is_in_one_row_and_long_ones_are_cut_at_the_context(tmp_path: Path) -> None:
    passages = a_table(tmp_path, "text", "passages")
    texts = ["people said " * 3, "justice " * 200, "", "union, " * 5]
    rows = [Passage(passage_id=str(i), doc_id="d", text=text) for i, text in enumerate(texts)]
    passages.write("part-00000", to_arrow(Passage, rows))
    planned, rejects, num_cut = plan_texts(passages, 0)
    assert sorted(segment.rows[0] for row in planned for segment in row.segments) == [0, 1, 3]
    assert [reject.key for reject in rejects] == ["2"]
    assert "fewer than two positions" in rejects[0].reason
    assert max(row.num_positions for row in planned) == CONFIG.context
    assert num_cut == len(TOKENIZER(texts[1], add_special_tokens=False)["input_ids"]) - (CONFIG.context - 1)


def test_the_plan_holds_all_passages_once_as_long_as_it_says_and_in_an_order_of_the_seed(folder: str) -> None:
    plan, passages = tables(folder, "text")
    for lane in range(CONFIG.num_lanes):
        planned = plan.read_rows(PlanRow, plan_shard_name(lane, 0))
        assert [row.row for row in planned] == list(range(len(planned)))
        read = list(islice(LaneStream(plan, passages, TOKENIZER, lane).rows(0), len(planned)))
        for row, samples in zip(planned, read, strict=True):
            assert row.num_positions == sum(len(sample.segment.token_ids) for sample in samples) <= CONFIG.context
            assert row.num_labels == sum(len(sample.segment.labels) for sample in samples)
        own = shards_of_lane(passages.shards(), lane, CONFIG.num_lanes)
        texts = [text for shard in own for text in passages.read(shard)["text"].to_pylist()]
        given = sorted(sample.segment.teacher_ids.tolist() for samples in read for sample in samples)
        assert given == sorted(TOKENIZER(text)["input_ids"][:-1] for text in texts)  # without its EOS
        assert plan_texts(passages, lane)[0] == planned
        assert plan_texts(passages, lane, seed=1)[0] != planned


def test_the_one_epoch_is_read_again_and_again_from_any_row_on(folder: str) -> None:
    plan, passages = tables(folder, "text")
    num_rows = plan.metadata(plan_shard_name(1, 0)).num_rows
    rows = [row_key(row) for row in islice(LaneStream(plan, passages, TOKENIZER, 1).rows(0), num_rows)]
    later = LaneStream(plan, passages, TOKENIZER, 1).rows(7 * num_rows + 2)
    assert [row_key(row) for row in islice(later, 2 * num_rows)] == (rows[2:] + rows + rows)[: 2 * num_rows]
    plan.write(plan_shard_name(9, 0), to_arrow(PlanRow, []))
    with pytest.raises(TableError, match="has no rows"):
        next(LaneStream(plan, passages, TOKENIZER, 9).rows(0))
    Path(f"{plan.url}/{plan_shard_name(9, 0)}.parquet").unlink()


@pytest.mark.parametrize("shares", [{"active": 1 / 3, "text": 1 / 3}, {"active": 0.07, "text": 0.62}, {"text": 0.9}])
def test_shares_hold_within_two_rows_over_any_stretch_of_a_lane(shares: dict[str, float]) -> None:
    mix, num = Mix(shares, 7), 500
    wanted = shares | {"natural": 1 - sum(shares.values())}
    for lane in range(7):
        names = list(islice(mix.sets(0, lane), num))
        assert list(islice(mix.sets(123, lane), 50)) == names[123:173]
        for name, share in wanted.items():
            counts = np.concatenate([[0], np.cumsum([each == name for each in names])])
            assert [mix.rows_before(row, lane)[name] for row in range(0, num, 17)] == counts[:num:17].tolist()
            for length in (1, 5, 40, 300):
                stretches = counts[length:] - counts[:-length]
                assert np.abs(stretches - share * length).max() < 2 + 1e-9
        assert {name: names.count(name) for name in wanted} == mix.rows_before(num, lane)


def test_every_step_of_many_lanes_holds_about_the_shares() -> None:
    lanes, per_step = 64, 8
    mix = Mix({"active": 1 / 3, "text": 1 / 3}, lanes)
    names = np.array([list(islice(mix.sets(0, lane), 40 * per_step)) for lane in range(lanes)])
    of_steps = names.reshape(lanes, 40, per_step).transpose(1, 0, 2).reshape(40, -1)
    for name in SETS:
        shares = (of_steps == name).mean(axis=1)
        assert np.abs(shares - 1 / 3).max() < 0.03


def test_three_streams_are_the_same_at_every_world_size_and_after_every_resume(folder: str) -> None:
    shares = {"active": 0.25, "text": 0.4}
    trunk = Mix({"text": 0.3}, CONFIG.num_lanes)
    for options in ({}, {"first_row": 3}, {"first_row": 3, "earlier": trunk}):
        alone = steps(make_reader(folder, shares, **options), 12)
        assert len({row for step in alone for row in step}) > 60
        for start in (1, 5, 11):
            assert steps(make_reader(folder, shares, start_step=start, **options), 12 - start) == alone[start:]
        for world_size in (2, 3, 4):
            ranks = [
                steps(make_reader(folder, shares, rank=rank, world_size=world_size, **options), 12)
                for rank in range(world_size)
            ]
            for number, step in enumerate(alone):
                assert sorted(step) == sorted(row for rank in ranks for row in rank[number])


def test_a_second_training_goes_on_in_every_stream_where_the_first_has_stopped(folder: str) -> None:
    """Stage I with text, 6 rows of each lane; then Stage II with other shares: no row is left out or comes twice."""
    first, second = {"text": 0.3}, {"active": 0.25, "text": 0.4}
    before = steps(make_reader(folder, first), 3)
    after = steps(make_reader(folder, second, first_row=6, earlier=Mix(first, CONFIG.num_lanes)), 4)
    for lane in range(CONFIG.num_lanes):
        taken = [row for step in before + after for row in step[lane :: CONFIG.num_lanes]]
        for name in ("natural", "active", "text"):
            stream = LaneStream(*tables(folder, name), TOKENIZER, lane).rows(0)
            own = [row_key(row) for row in islice(stream, 14)]
            found = [row for row in taken if row in own]
            assert found == own[: len(found)], name
            assert len(found) >= (1 if name == "active" else 3), name


def test_the_first_training_goes_on_as_if_it_had_not_been_divided(folder: str) -> None:
    shares = {"text": 0.3}
    whole = steps(make_reader(folder, shares), 6)
    assert steps(make_reader(folder, shares, first_row=2 * CONFIG.rows_per_lane), 4) == whole[2:]


def config_of(**changes: Any) -> Config:
    world = {"num_text": 5}
    given = {"world": world, "ingest": {"num_shards": 8}, "pack": CONFIG.model_dump(mode="json"), "stage2": {}}
    return parse_config(given | {"distill": {"num_steps": 10}} | changes)


def test_shares_of_samples_become_shares_of_rows(folder: str) -> None:
    """Counted in what is read: a third of each, in samples, though the rows of text hold more of them."""
    plans = {name: tables(folder, name)[0] for name in SETS}
    config = config_of()
    shares = budget.stage2_row_shares(config, plans)
    assert sum(shares.values()) == pytest.approx(1)
    for name, plan in plans.items():
        planned = [row for shard in budget.first_epoch(config) for row in plan.read_rows(PlanRow, shard)]
        mean = sum(len(row.segments) for row in planned) / len(planned)
        assert budget.samples_per_row(config, plan) == pytest.approx(mean)
        assert shares[name] * mean == pytest.approx(
            shares["natural"] * budget.samples_per_row(config, plans["natural"])
        )
    own = {"others": {name: tables(folder, name) for name in ("active", "text")}}
    reader = LaneReader(*tables(folder, "natural"), TOKENIZER, CONFIG, mix=budget.mix_of(config, shares), **own)
    samples = [sample for rows in islice(reader.samples(), 30) for row in rows for sample in row]
    num_text = sum(not len(sample.frames) for sample in samples)
    assert num_text / len(samples) == pytest.approx(1 / 3, abs=0.02)


def test_the_control_has_the_same_share_of_text_and_natural_speech_for_the_rest(folder: str) -> None:
    plans = {name: tables(folder, name)[0] for name in ("natural", "text")}
    config = config_of(stage2={"shares": {"natural": 0.2, "active": 0.6, "text": 0.2}})
    shares = budget.stage2_row_shares(config, plans)
    counts = {name: shares[name] * budget.samples_per_row(config, plan) for name, plan in plans.items()}
    assert counts["text"] / sum(counts.values()) == pytest.approx(0.2)


def test_a_budget_in_positions_counts_those_of_text(folder: str) -> None:
    plans = {name: tables(folder, name)[0] for name in SETS}
    config = config_of(pack=CONFIG.model_dump(mode="json") | {"text_share": 0.5}, distill={"num_positions": 20_000})
    num_steps = budget.budget_of(config, plans).num_steps
    shares = budget.stage1_row_shares(config, plans)
    reader = make_reader(folder, {"text": shares["text"]})
    batches = [collate(rows, CONFIG.context) for rows in islice(reader.samples(), num_steps)]
    assert sum(batch.num_positions for batch in batches) == pytest.approx(20_000, rel=0.06)
    assert 0.2 < sum(batch.num_text_positions for batch in batches) / 20_000 < 0.8
    bound = budget.budget_of(config, {"natural": plans["natural"]}).num_steps
    natural = budget.mix_of(config, shares).most_rows("natural", num_steps * CONFIG.rows_per_lane)
    assert bound * CONFIG.rows_per_lane >= natural  # a plan that knows no text lasts, too


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, SpeechLM]:
    path = str(tmp_path_factory.mktemp("teacher"))
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 400}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    Qwen2ForCausalLM(Qwen2Config(**shape)).save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    adapter = AdapterConfig(hidden_size=16, num_layers=2, num_heads=2, ffn_size=24)
    encoder = EncoderSpec(name="log_mel", path=None, revision=None, sampling_rate=16000, frame_rate=12.5, dim=2)
    return load_text_lm(path, None), SpeechLM.from_teacher(path, None, adapter, encoder, 0)


def text_batch(folder: str) -> Batch:
    return collate(list(islice(LaneStream(*tables(folder, "text"), TOKENIZER, 0).rows(0), 2)), CONFIG.context)


def test_the_untrained_student_reads_text_as_its_teacher_and_its_adapter_gets_a_gradient_of_zero(
    folder: str, models: tuple[Any, SpeechLM]
) -> None:
    teacher, student = models
    batch = text_batch(folder)
    assert batch.frames.numel() == 0
    loss = batch_loss(student, student.head, teacher, batch, alpha=0.5)
    assert loss.kl.item() == pytest.approx(0, abs=1e-6)
    assert loss.each_kl.abs().max() < 1e-5
    assert loss.nll > 1
    loss.loss.backward()
    gradients = [parameter.grad for parameter in student.adapter.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_the_kl_of_text_is_that_of_its_labels_in_a_mixed_batch(folder: str, models: tuple[Any, SpeechLM]) -> None:
    teacher, student = models
    with torch.no_grad():
        student.llm.get_input_embeddings().weight.add_(0.05)
    text = list(islice(LaneStream(*tables(folder, "text"), TOKENIZER, 0).rows(0), 2))
    speech = list(islice(LaneStream(*tables(folder, "natural"), TOKENIZER, 0).rows(0), 2))
    mixed = collate([speech[0], text[0], speech[1], text[1]], CONFIG.context)
    loss = batch_loss(student, student.head, teacher, mixed, alpha=1.0)
    alone = batch_loss(student, student.head, teacher, collate(text, CONFIG.context), alpha=1.0)
    assert int(mixed.is_text.sum()) == sum(len(sample.segment.labels) for row in text for sample in row)
    assert mixed.num_text_positions == sum(len(sample.segment.token_ids) for row in text for sample in row)
    assert loss.each_kl[mixed.is_text].mean().item() == pytest.approx(alone.kl.item(), rel=1e-4) != 0
    assert loss.each_kl.mean().item() == pytest.approx(loss.kl.item(), rel=1e-5)


def test_the_plans_are_as_long_as_both_stages_and_the_control_take(folder: str) -> None:
    """Counted in the rows that are read: none is missing, and hardly any is planned for nothing."""
    plans = {name: tables(folder, name)[0] for name in SETS}
    without_active = {name: plans[name] for name in ("natural", "text")}
    pack = CONFIG.model_dump(mode="json") | {"text_share": 0.3}
    config = config_of(pack=pack, distill={"num_steps": 10, "decay_share": 0.5}, stage2={"num_steps": 9})
    trunk = budget.mix_of(config, budget.stage1_row_shares(config, plans))
    second = {"first_row": 5 * CONFIG.rows_per_lane, "earlier": trunk}
    shares = [
        (budget.stage1_row_shares(config, plans), {}, 10),
        (budget.stage2_row_shares(config, plans), second, 9),
        (budget.stage2_row_shares(config, without_active), second, 9),
    ]
    most = dict.fromkeys(("natural", "active"), 0)
    for own, options, num_steps in shares:
        mixed = {name: share for name, share in own.items() if name != "natural"}
        read = steps(make_reader(folder, mixed, **options), num_steps)
        for lane in range(CONFIG.num_lanes):
            rows = {row for step in read for row in step[lane :: CONFIG.num_lanes]}
            for name in most:
                stream = LaneStream(*tables(folder, name), TOKENIZER, lane).rows(0)
                places = [place for place, row in enumerate(islice(stream, 30), 1) if row_key(row) in rows]
                most[name] = max(most[name], *places, 0)
    assert 0 <= natural_rows(config, budget.budget_of(config, without_active)) - most["natural"] <= 1
    assert active_rows(config, budget.budget_of(config, plans)) == most["active"] > 0
