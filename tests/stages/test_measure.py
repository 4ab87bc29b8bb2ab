"""`measure` without Ray: a shard by both protocols, what is left out, and what makes no difference; M(c) by each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from factories import a_table, hand_table, keep_run, make_features, make_tokenizer, small_world_config
from transformers import Qwen2Config, Qwen2ForCausalLM

from salad_ray.config import Config
from salad_ray.configfile import parse_config
from salad_ray.report.headline import sentences
from salad_ray.runs import Run
from salad_ray.stages.common import probe_losses
from salad_ray.stages.measure import MeasureShard
from salad_ray.stages.report import selection_metrics
from salad_ray.stages.select import measured_clusters, selection_facts
from salad_ray.stages.shards import ShardPart, StageError
from salad_ray.tables import Cluster, Features, Measurement, Passage, Table, Utterance, from_arrow, to_arrow

TEXT = "she said the people of the union opened and more so on in order to form a perfect union of the states"
ENCODER = {"name": "log_mel", "path": None, "revision": None, "sampling_rate": 16000, "frame_rate": 12.5, "dim": 2}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    folder, tokenizer = tmp_path_factory.mktemp("teacher"), make_tokenizer("byte_level")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=400, **shape, **heads)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"path": str(folder), "revision": None}


def spoken(number: int, text: str = TEXT, with_words: bool = True, split: str = "test") -> Features:
    text = f"{' '.join(text.split()[: 18 + number % 5])} {number}" if text == TEXT else text
    return make_features(text, f"u{number}", with_words=with_words, split=split)


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Eight that can be used, one in training, one that is too short for `whole`, one without word times."""
    table = a_table(str(tmp_path_factory.mktemp("run")), "heldout", "features")
    rows = [spoken(i) for i in range(8)]
    rows += [spoken(8, split="train"), spoken(9, "she said so on"), spoken(10, with_words=False)]
    table.write("part-00000", to_arrow(Features, rows))
    return table


def config_of(folder: Path, **sections: dict) -> Config:
    plain = small_world_config(folder)
    return parse_config(plain | {name: plain.get(name, {}) | values for name, values in sections.items()})


def measured(config: Config, features: Table, teacher: dict) -> tuple[ShardPart, list[Measurement]]:
    [part] = MeasureShard(config, "untrained", teacher, features, ENCODER, None)("part-00000")
    return part, from_arrow(Measurement, part.rows)


def test_a_shard_is_measured_by_both_protocols_and_nothing_is_lost(
    features: Table, teacher: dict, tmp_path: Path
) -> None:
    part, rows = measured(config_of(tmp_path), features, teacher)
    names = {name: {row.passage for row in rows if row.protocol == name} for name in ("interleaved", "whole")}
    usable = {f"u{i}" for i in range(8)}
    assert names["interleaved"] == usable | {"u9"}
    assert names["whole"] == usable
    assert {reject.key for reject in part.rejects} == {"u9", "u10"}
    assert {reject.key: reject.reason.split(":")[0] for reject in part.rejects} == {"u9": "whole", "u10": "interleaved"}
    # Ten utterances under two protocols, but for the one without word times, which is no input of `whole`.
    assert (part.num_input, part.num_kept, len(part.rejects)) == (19, 17, 2)
    assert part.totals == {"num_untimed": 1}
    assert {row.source for row in rows} == names["interleaved"]  # of make_features each has a recording of its own
    assert all(np.isfinite([row.misalignment, row.forgetting, row.distillation]).all() for row in rows)
    forgotten = sum(abs(row.forgetting) for row in rows)
    assert forgotten == pytest.approx(0, abs=1e-3)  # the untrained student is the teacher, on text
    whole = sum(row.misalignment for row in rows if row.protocol == "whole")
    assert whole > 0.1
    with pytest.raises(StageError, match="measure: u10: interleaved: a sample needs"):
        measured(config_of(tmp_path).model_copy(update={"strict": True}), features, teacher)


def test_measures_do_not_depend_on_the_spans_of_training_nor_on_batches(
    features: Table, teacher: dict, tmp_path: Path
) -> None:
    _, rows = measured(config_of(tmp_path), features, teacher)
    other = config_of(tmp_path, pack={"text_words": [2, 3], "speech_words": [1, 2]}, measure={"batch_rows": 1})
    again = {(row.protocol, row.passage, row.distance): row for row in measured(other, features, teacher)[1]}
    assert len(again) == len(rows)
    for row in rows:
        same = again[row.protocol, row.passage, row.distance]
        assert same.num_positions == row.num_positions
        assert same.misalignment == pytest.approx(row.misalignment, rel=1e-4, abs=1e-5)
    own = config_of(tmp_path, measure={"text_words": [2, 3], "speech_words": [1, 2]})
    counts = [sum(row.num_positions for row in found) for found in (rows, measured(own, features, teacher)[1])]
    assert counts[0] != counts[1]


def test_m_of_clusters_is_that_of_each_protocol(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    labels = ("probe/passages", "probe/measurements_stage1")
    places = keep_run(config.run_dir, config.model_dump(mode="json"), labels)
    passages = [Passage(passage_id=f"p{i}", doc_id=f"p{i}", text="a", cluster_id=i % 2) for i in range(6)]
    hand_table(config.run_dir, labels[0]).write("part-00000", to_arrow(Passage, passages))
    sums = dict.fromkeys(("misalignment", "forgetting", "nll_speech", "nll_text"), 0.0)
    rows = [
        Measurement(
            system="stage1",
            protocol=name,
            passage=f"p{i}",
            domain="law",
            distance=0,
            num_positions=10,
            distillation=scale * (1 + i),
            **sums,
        )
        for i in range(6)
        for name, scale in (("interleaved", 1.0), ("whole", 30.0))
    ]
    hand_table(config.run_dir, labels[1]).write("part-00000", to_arrow(Measurement, rows))
    found = probe_losses(Run(config, places), 2)
    assert found["interleaved"].mean.tolist() == pytest.approx([0.3, 0.4])
    assert found["whole"].mean.tolist() == pytest.approx([9.0, 12.0])
    assert found["whole"].num_passages.tolist() == [3, 3]


@pytest.mark.parametrize(("protocol", "largest"), [("interleaved", 0), ("whole", 1)])
def test_the_probe_protocol_decides_what_is_aimed_at_and_the_report_tells_both(
    protocol: str, largest: int, tmp_path: Path
) -> None:
    """Cluster 1 is of an unheard domain, which only `whole` notices."""
    config = config_of(tmp_path, probe={"protocol": protocol})
    labels = ("probe/passages", "probe/utterances", "probe/measurements_stage1", "web/centroids")
    places = keep_run(config.run_dir, config.model_dump(mode="json"), labels)
    domains = ("food", "law")
    probe = [
        Passage(passage_id=f"p{i}", doc_id=f"p{i}", text="a", cluster_id=i % 2, domain=domains[i % 2]) for i in range(8)
    ]
    clusters = [
        Cluster(cluster_id=k, centroid=b"", price=0.0, web_share=0.5, num_passages=100, num_chars=5000) for k in (0, 1)
    ]
    voices = [
        Utterance(utt_id="p0", text="a" * 10, duration_secs=1.0, recording_id="p0", corpus="world", passage_id="p0")
    ]
    losses = {"interleaved": (0.3, 0.2), "whole": (0.5, 3.0)}
    none = dict.fromkeys(("misalignment", "forgetting", "nll_speech", "nll_text"), 0.0)
    rows = [
        Measurement(
            system="stage1",
            protocol=name,
            passage=f"p{i}",
            domain=domains[i % 2],
            distance=0,
            num_positions=10,
            distillation=10 * of_cluster[i % 2] + 0.01 * i,
            **none,
        )
        for i in range(8)
        for name, of_cluster in losses.items()
    ]
    for label, row_type, content in zip(
        labels, (Passage, Utterance, Measurement, Cluster), (probe, voices, rows, clusters), strict=True
    ):
        hand_table(config.run_dir, label).write("part-00000", to_arrow(row_type, content))
    run = Run(config, places)
    found = measured_clusters(run)
    assert found["distillation"].argmax() == found["target_share"].argmax() == largest
    assert found["distillation"] == pytest.approx(losses[protocol], abs=0.01)
    chosen = pa.table({"cluster_id": [0, 1, 1], "duration_secs": [1.0, 1.0, 2.0]})
    facts = selection_facts(config, found, chosen, budget_secs=4.0)
    told = selection_metrics(run, facts, {"food"})
    assert told["protocol"] == protocol
    assert told["unheard_auc"] == told["by_protocol"][protocol]["unheard_auc"] == largest
    assert {name: row["unheard_auc"] for name, row in told["by_protocol"].items()} == {"interleaved": 0, "whole": 1}
    aucs = {"interleaved": "AUC 0.000 interleaved, 1.000 whole", "whole": "AUC 1.000 whole, 0.000 interleaved"}
    assert any(aucs[protocol] in line for line in sentences({"selection": told}))
