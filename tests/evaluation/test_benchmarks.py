"""Benchmarks in their original formats: prompts as in lm-evaluation-harness, and what cannot be read."""

from __future__ import annotations

import csv
import errno
import gzip
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import constants

from salad_ray.config import ConfigError
from salad_ray.evaluation.benchmarks import (
    BENCHMARKS,
    LETTERS,
    choices_alone,
    choose_exemplars,
    exemplar_of,
    find_files,
    prompt_of,
    read_items,
    read_recording,
    swap_partners,
    world_items,
)
from salad_ray.tables import BadInput, Item, Reject, from_arrow, to_arrow
from salad_ray.text.world import DOMAINS

REAL = {
    # items; digest of all (context, continuation) that lm-evaluation-harness 0.4.13 itself makes of the same items
    # without exemplars (tasks openbookqa, hellaswag, arc_challenge, piqa; of MMLU the continuation template)
    "openbookqa": (500, "e3c1aa7f61226ba9"),
    "hellaswag": (500, "9570781012b25a11"),
    "arc_challenge": (500, "38b0e21b0d9647ff"),
    "piqa": (500, "df37d7f9a65769ee"),
    "mmlu_spoken": (513, "c51feec1409ca43b"),
}
STORY = {
    "InputStoryid": "story-1",
    "InputSentence1": "Ann baked a cake.",
    "InputSentence2": 'She said, "It smells good."',
    "InputSentence3": "Ben, her brother, came in.",
    "InputSentence4": "He was hungry.",
    "RandomFifthSentenceQuiz1": "He flew to the moon.",
    "RandomFifthSentenceQuiz2": "He ate a slice.",
    "AnswerRightEnding": 2,
}
STORY_TEXT = 'Ann baked a cake. She said, "It smells good." Ben, her brother, came in. He was hungry.'
MMLU = {"question": "What is two plus two?", "subject": "arithmetic", "choices": ["1", "2", "3", "4"], "answer": 3}
SPOKEN = "Who makes law?\nA. Courts\nB. Parliament\nC. Nobody\nD. Banks\nAnswer with the letter A, B, C or D."
GOOD: dict[str, dict[str, Any]] = {
    "storycloze": STORY,
    "openbookqa": {
        "id": "7-1",
        "question": {"stem": "The sun is", "choices": [{"text": "hot", "label": "A"}, {"text": "cold", "label": "B"}]},
        "answerKey": "A",
    },
    "arc_challenge": {
        "id": "M_1",
        "question": {"stem": "What falls?", "choices": [{"text": "rain", "label": "1"}, {"text": "sky", "label": "2"}]},
        "answerKey": "2",
    },
    "hellaswag": {
        "ind": 4, "activity_label": "Baking", "ctx_a": "[header] How to bake [title] Mix.", "ctx_b": "the Cook",
        "endings": ["stirs [substeps] it.", ", then  rests."], "source_id": "wikihow~9", "label": "1",
    },
    "piqa": {"goal": "Cut bread", "sol1": "use a knife ", "sol2": "use a spoon", "label": 0},
    "mmlu_spoken": MMLU,
    "voicebench_mmsu": {
        "question_id": 1101, "category": "law", "src": "mmlu_law", "prompt": SPOKEN, "reference": "B",
        "audio": {"bytes": b"RIFF", "path": None},
    },
}  # fmt: skip


def write_jsonl(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_csv(path: Path, rows: list[list[Any]]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def write_parquet(path: Path, *records: dict[str, Any], row_group_size: int | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(records)), path, row_group_size=row_group_size)
    return str(path)


def items_of(benchmark: str, path: str | Path) -> list[Item]:
    found = list(read_items(benchmark, str(path)))
    assert all(isinstance(item, Item) for item in found), found
    return found  # type: ignore[return-value]


def changed(benchmark: str, **fields: Any) -> dict[str, Any]:
    return GOOD[benchmark] | fields


@pytest.mark.parametrize("benchmark", REAL)
def test_every_real_item_asks_what_the_harness_asks(shared_data: Path, benchmark: str) -> None:
    name = "mmlu" if benchmark == "mmlu_spoken" else benchmark
    items = items_of(benchmark, shared_data / "benchmarks" / f"{name}.jsonl")
    num_items, requests = REAL[benchmark]
    assert len(items) == len({item.item_id for item in items}) == num_items
    asked = [[prompt_of(item), f" {choice}"] for item in items for choice in item.choices]
    assert hashlib.blake2b(json.dumps(asked).encode(), digest_size=8).hexdigest() == requests
    assert all(item.spoken == item.spoken.strip() for item in items)
    assert from_arrow(Item, to_arrow(Item, items)) == items


def test_real_items_know_their_right_answers(shared_data: Path) -> None:
    folder = shared_data / "benchmarks"
    for benchmark in ("openbookqa", "arc_challenge"):
        lines = (folder / f"{benchmark}.jsonl").read_text().splitlines()
        for item, record in zip(
            items_of(benchmark, folder / f"{benchmark}.jsonl"), map(json.loads, lines), strict=True
        ):
            right = {choice["label"]: choice["text"] for choice in record["question"]["choices"]}[record["answerKey"]]
            assert item.item_id == f"{benchmark}-{record['id']}"
            assert item.choices[item.answer] == right
    for benchmark, key in (("hellaswag", "label"), ("piqa", "label"), ("mmlu", "answer")):
        lines = (folder / f"{benchmark}.jsonl").read_text().splitlines()
        name = "mmlu_spoken" if benchmark == "mmlu" else benchmark
        answers = [item.answer for item in items_of(name, folder / f"{benchmark}.jsonl")]
        assert answers == [json.loads(line)[key] for line in lines]


def test_prompts_of_every_benchmark(tmp_path: Path) -> None:
    items = {name: items_of(name, write_jsonl(tmp_path / f"{name}.jsonl", record))[0] for name, record in GOOD.items()
             if name != "voicebench_mmsu"}  # fmt: skip
    assert {name: exemplar_of(item) for name, item in items.items()} == {
        "storycloze": f"{STORY_TEXT} He ate a slice.",
        "openbookqa": "The sun is hot",
        "arc_challenge": "Question: What falls?\nAnswer: sky",
        "hellaswag": "Baking: How to bake. Mix. The cook , then rests.",
        "piqa": "Question: Cut bread\nAnswer: use a knife ",
        "mmlu_spoken": "Question: What is two plus two?\nAnswer: 4",
    }
    spoken = [STORY_TEXT, "The sun is", "What falls?", "How to bake. Mix. The cook", "Cut bread", MMLU["question"]]
    assert [item.spoken for item in items.values()] == spoken
    assert items["hellaswag"].domain == "Baking"
    assert items["hellaswag"].item_id == "hellaswag-wikihow-4"
    assert items["hellaswag"].choices == ["stirs it.", ", then rests."]
    assert items["mmlu_spoken"].domain == "arithmetic"
    assert items["piqa"].item_id == "piqa-1"


def test_spaces_around_the_question_stay_in_the_prompt(tmp_path: Path) -> None:
    record = changed("piqa", goal=" Cut bread \n")
    (item,) = items_of("piqa", write_jsonl(tmp_path / "a.jsonl", record))
    assert (item.before, item.spoken, item.after) == ("Question:  ", "Cut bread", " \n\nAnswer:")


def test_csv_forms(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "cloze_test_val.csv", [list(STORY), list(STORY.values())])
    (story,) = items_of("storycloze", path)
    assert (story.item_id, prompt_of(story), story.answer) == ("storycloze-story-1", STORY_TEXT, 1)
    Path(path).write_bytes(b"\xef\xbb\xbf" + Path(path).read_bytes())
    assert items_of("storycloze", path) == [story]
    rows = [["What, then,\nis two?", "1", "2", "3", "4", "B"], ['Say "one"', "one", "two", "three", "four", "A"]]
    first, second = items_of("mmlu_spoken", write_csv(tmp_path / "high_school_physics_test.csv", rows))
    assert (first.spoken, first.choices, first.answer) == (rows[0][0], ["1", "2", "3", "4"], 1)
    assert (second.spoken, second.domain, second.answer) == ('Say "one"', "high_school_physics", 0)
    assert [first.item_id, second.item_id] == [f"mmlu_spoken-high_school_physics-{row}" for row in (1, 3)]


def test_hub_forms_give_the_same_items(tmp_path: Path) -> None:
    for benchmark, stem in (("openbookqa", "question_stem"), ("arc_challenge", "question")):
        record = GOOD[benchmark]
        choices = {key: [choice[key] for choice in record["question"]["choices"]] for key in ("text", "label")}
        flat = {"id": record["id"], stem: record["question"]["stem"], "choices": choices}
        flat["answerKey"] = record["answerKey"]
        from_hub = items_of(benchmark, write_parquet(tmp_path / f"{benchmark}.parquet", flat))
        assert from_hub == items_of(benchmark, write_jsonl(tmp_path / f"{benchmark}.jsonl", record))
    for benchmark in ("hellaswag", "piqa", "mmlu_spoken"):
        from_hub = items_of(benchmark, write_parquet(tmp_path / f"{benchmark}.parquet", GOOD[benchmark]))
        assert from_hub == items_of(benchmark, write_jsonl(tmp_path / f"{benchmark}.jsonl", GOOD[benchmark]))
    names = ["story_id", *(f"input_sentence_{n}" for n in range(1, 5)), "sentence_quiz1", "sentence_quiz2"]
    lower = dict(zip([*names, "answer_right_ending"], STORY.values(), strict=True))
    from_hub = items_of("storycloze", write_parquet(tmp_path / "story.parquet", lower))
    assert from_hub == items_of("storycloze", write_jsonl(tmp_path / "story.jsonl", STORY))


def test_piqa_labels_beside_the_file(tmp_path: Path) -> None:
    rows = [{key: value for key, value in GOOD["piqa"].items() if key != "label"} | {"goal": f"Cut {n}"} for n in "abc"]
    path = write_jsonl(tmp_path / "valid.jsonl", *rows)
    with pytest.raises(ConfigError, match=r"3 of the 3 rows .* no 'label', and there is no file of labels"):
        list(read_items("piqa", path))
    (tmp_path / "valid-labels.lst").write_text("1\n0\n1\n")
    assert [item.answer for item in items_of("piqa", path)] == [1, 0, 1]
    Path(path).with_name("valid.jsonl.gz").write_bytes(gzip.compress(Path(path).read_bytes()))
    assert items_of("piqa", f"{path}.gz") == items_of("piqa", path)
    (tmp_path / "valid-labels.lst").write_text("1\n0\n")
    with pytest.raises(ConfigError, match="2 labels for the 3 rows"):
        list(read_items("piqa", path))


def test_voicebench_speaks_its_prompt_and_brings_its_recording(tmp_path: Path) -> None:
    rows = [changed("voicebench_mmsu", question_id=n, audio={"bytes": b"%d" % n, "path": f"{n}.wav"}) for n in range(5)]
    items = items_of("voicebench_mmsu", write_parquet(tmp_path / "law.parquet", *rows, row_group_size=2))
    assert {(item.spoken, item.domain, item.answer) for item in items} == {(SPOKEN, "law", 1)}
    assert items[0].choices == ["Courts", "Parliament", "Nobody", "Banks"]
    assert exemplar_of(items[0]) == f"Question: {SPOKEN}\nAnswer: Parliament"
    assert [item.item_id for item in items] == [f"voicebench_mmsu-{n}" for n in range(5)]
    assert [read_recording(item.audio or "") for item in items] == [b"%d" % n for n in range(5)]
    with pytest.raises(BadInput, match="has 5 rows"):
        read_recording(f"{tmp_path}/law.parquet#row=5")


@pytest.mark.parametrize(
    "prompt",
    ["Who makes law?", "Who?\nA. Courts\nB. Parliament, or\nthe court\nC. Nobody", "Who?\nB. Courts\nC. Nobody"],
)
def test_voicebench_choices_that_the_prompt_leaves_in_doubt_come_from_the_options(tmp_path: Path, prompt: str) -> None:
    record = changed("voicebench_mmsu", prompt=prompt, audio=None)
    with pytest.raises(ConfigError, match="no lettered choices"):
        items_of("voicebench_mmsu", write_jsonl(tmp_path / "a.jsonl", record))
    (item,) = items_of("voicebench_mmsu", write_jsonl(tmp_path / "a.jsonl", record | {"options": ["x", "y"]}))
    assert (item.choices, item.answer, item.audio) == (["x", "y"], 1, None)


def test_recordings_stay_in_the_folder_of_the_items(tmp_path: Path) -> None:
    (tmp_path / "one.wav").write_bytes(b"RIFF")
    outside = [changed("piqa", audio=audio) for audio in ("../one.wav", "/one.wav", "s3://bucket/one.wav", 7)]
    inside = [changed("piqa", audio=audio) for audio in ("one.wav", {"path": "one.wav"}, None, "", "two.wav")]
    found = list(read_items("piqa", write_jsonl(tmp_path / "a.jsonl", *inside, *outside)))
    assert [type(row) for row in found] == [Item] * 5 + [Reject] * 4
    audio = [row.audio for row in found if isinstance(row, Item)]
    assert audio == [f"{tmp_path}/one.wav"] * 2 + [None] * 2 + [f"{tmp_path}/two.wav"]
    assert read_recording(audio[0] or "") == b"RIFF"
    with pytest.raises(BadInput, match="no such audio file"):
        read_recording(audio[-1] or "")


@pytest.mark.parametrize("name", ["one.wav", "law.parquet#row=0"])
def test_a_disk_that_fails_is_no_fault_of_a_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "one.wav").write_bytes(b"RIFF")
    write_parquet(tmp_path / "law.parquet", changed("voicebench_mmsu", question_id=1, audio={"bytes": b"RIFF"}))

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(LocalFileSystem, "_open", fails)
    with pytest.raises(OSError, match="Input/output error"):
        read_recording(f"{tmp_path}/{name}")


def test_a_damaged_file_of_recordings_is_a_bad_input(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "law.parquet", changed("voicebench_mmsu", question_id=1, audio={"bytes": b"RIFF"}))
    Path(path).write_bytes(Path(path).read_bytes()[:-40])
    with pytest.raises(BadInput, match="#row=0 cannot be read"):
        read_recording(f"{path}#row=0")


TEN_LETTERS = "ABCDEFGHIJ"
SIZES = (3, 4, 5, 7, 10)


@pytest.mark.parametrize("num_choices", SIZES)
@pytest.mark.parametrize("labels", [list(TEN_LETTERS), [str(n) for n in range(1, 11)], list(range(1, 11))])
@pytest.mark.parametrize("benchmark", ["arc_challenge", "openbookqa"])
def test_items_of_three_to_ten_choices_with_any_labels(
    tmp_path: Path, benchmark: str, labels: list[Any], num_choices: int
) -> None:
    choices = [{"text": f"choice {n}", "label": label} for n, label in enumerate(labels[:num_choices])]
    for key in (labels[num_choices - 1], str(labels[num_choices - 1])):
        row = changed(benchmark, question={"stem": "What falls?", "choices": choices}, answerKey=key)
        (item,) = items_of(benchmark, write_jsonl(tmp_path / "a.jsonl", row))
        assert (len(item.choices), item.choices[item.answer]) == (num_choices, f"choice {num_choices - 1}")


@pytest.mark.parametrize("num_choices", SIZES)
def test_answers_as_integers_letters_or_the_choice_itself(tmp_path: Path, num_choices: int) -> None:
    choices, last = [f"choice {n}" for n in range(num_choices)], num_choices - 1
    for answer in (last, str(last), TEN_LETTERS[last], choices[last]):
        row = changed("mmlu_spoken", choices=choices, answer=answer)
        (item,) = items_of("mmlu_spoken", write_jsonl(tmp_path / "a.jsonl", row))
        assert (len(item.choices), item.answer) == (num_choices, last)
    for label in (last, str(last)):
        row = changed("hellaswag", endings=choices, label=label)
        (item,) = items_of("hellaswag", write_jsonl(tmp_path / "b.jsonl", row))
        assert (len(item.choices), item.answer) == (num_choices, last)


BAD = [
    ("openbookqa", {"answerKey": "E"}, "answerKey 'E' is not one of A, B"),
    ("openbookqa", {"answerKey": None}, "no 'answerKey'"),
    ("openbookqa", {"question": {"stem": " ", "choices": GOOD["openbookqa"]["question"]["choices"]}}, "is empty"),
    ("openbookqa", {"question": {"stem": "Sun", "choices": [{"text": "hot", "label": "A"}]}}, "1 choice, not two"),
    ("openbookqa", {"question": {"stem": "Sun", "choices": "hot"}}, "no choices with 'text' and 'label'"),
    ("arc_challenge", {"question": None}, "no 'question'"),
    ("hellaswag", {"label": ""}, "'label' is '', not 0 to 1"),
    ("hellaswag", {"label": 2}, "'label' is 2, not 0 to 1"),
    ("hellaswag", {"endings": ["a [b]", "a "]}, "choices are the same"),
    ("hellaswag", {"endings": ["[substeps]", "a"]}, "choices is empty"),
    ("hellaswag", {"endings": "ab"}, "no list of endings"),
    ("hellaswag", {"ctx_a": "", "ctx_b": ""}, "context is empty"),
    ("piqa", {"label": -1}, "'label' is -1, not 0 to 1"),
    ("piqa", {"label": True}, "'label' is True"),
    ("piqa", {"sol2": 3}, "'sol2' is a int, not text"),
    ("piqa", {"goal": "lone \ud800"}, "not valid Unicode"),
    ("storycloze", {"AnswerRightEnding": 0}, "'AnswerRightEnding' is 0, not 1 to 2"),
    ("storycloze", {"InputSentence3": None}, "no 'InputSentence3'"),
    ("storycloze", {"InputSentence3": ""}, "four sentences is empty"),
    ("mmlu_spoken", {"answer": "Z"}, "'answer' is 'Z', not 0 to 3 or A to D"),
    ("mmlu_spoken", {"choices": ["1"], "answer": 0}, "1 choice, not two"),
    ("mmlu_spoken", {"subject": None}, "no 'subject'"),
    ("voicebench_mmsu", {"reference": "E"}, "'reference' is 'E'"),
]


@pytest.mark.parametrize(("benchmark", "fields", "reason"), BAD)
def test_bad_rows_are_rejects_that_name_row_and_remedy(
    tmp_path: Path, benchmark: str, fields: dict[str, Any], reason: str
) -> None:
    good = changed(benchmark, audio=None)
    path = write_jsonl(tmp_path / "set.jsonl", good, changed(benchmark, audio=None) | fields)
    item, reject = read_items(benchmark, path)
    assert isinstance(item, Item)
    assert isinstance(reject, Reject)
    assert (reject.stage, reject.key) == ("ingest", f"{benchmark}/set.jsonl:2")
    assert reject.reason.startswith("set.jsonl, row 2: ")
    assert reason in reject.reason
    assert reject.reason.endswith("; correct or remove the row")


def test_broken_lines_and_repeated_ids(tmp_path: Path) -> None:
    lines = [json.dumps(GOOD["openbookqa"] | {"id": name}).encode() for name in ("a", "b", "c", "a", "d", "e")]
    lines[1:1] = [b"", b'{"id": ', b"[1]", lines[0].replace(b"sun", b"s\xffn")]
    (tmp_path / "set.jsonl").write_bytes(b"\n".join(lines))
    found = list(read_items("openbookqa", f"{tmp_path}/set.jsonl"))
    rejects = [row for row in found if isinstance(row, Reject)]
    assert len(found) - len(rejects) == 5
    assert [row.key.rsplit(":", 1)[1] for row in rejects] == ["3", "4", "5", "8"]
    for row, reason in zip(rejects, ("not JSON", "JSON list", "Unicode", "openbookqa-a is that of"), strict=True):
        assert reason in row.reason


def test_damaged_csv_rows_lose_only_themselves(tmp_path: Path) -> None:
    good = "Is {} one?,yes,no,maybe,never,A\n"
    text = good.format(1) + "too,few\n" + good.format(2) + '"quoted"wrong,yes,no,maybe,never,A\n' + good.format(3)
    (tmp_path / "logic_test.csv").write_text(text)
    found = list(read_items("mmlu_spoken", f"{tmp_path}/logic_test.csv"))
    assert [row.spoken for row in found if isinstance(row, Item)] == ["Is 1 one?", "Is 2 one?", "Is 3 one?"]
    few, quoted = (row.reason for row in found if isinstance(row, Reject))
    assert "row 2: it has 2 fields, not 6 (question, A, B, C, D, answer)" in few
    assert "row 4: not CSV" in quoted
    (tmp_path / "logic_test.csv").write_text(text + '"never closed,yes\n' + good.format(4))
    last = list(read_items("mmlu_spoken", f"{tmp_path}/logic_test.csv"))[-1]
    assert isinstance(last, Reject)
    assert "row 6: not CSV up to row 7" in last.reason


def test_a_file_that_is_something_else_is_told_in_one_sentence(tmp_path: Path, shared_data: Path) -> None:
    with pytest.raises(ConfigError, match=r"500 of the 500 rows of .*piqa.jsonl cannot be read as hellaswag"):
        list(read_items("hellaswag", str(shared_data / "benchmarks" / "piqa.jsonl")))
    for name, content in (("a.jsonl", b""), ("a.csv", b"goal,sol1,sol2,label\n"), ("b.jsonl", b"\n\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match="holds no items"):
            list(read_items("piqa", f"{tmp_path}/{name}"))
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(ConfigError, match="cannot be read as Parquet"):
        list(read_items("piqa", f"{tmp_path}/c.parquet"))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD["piqa"]).encode())[:-9])
    with pytest.raises(ConfigError, match="truncated or damaged"):
        list(read_items("piqa", f"{tmp_path}/d.jsonl.gz"))
    for missing in ("absent.jsonl", "absent", "absent/*.jsonl"):
        with pytest.raises(ConfigError, match="no such file or folder"):
            read_items("piqa", f"{tmp_path}/{missing}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"none of its files ends in \.parquet"):
        read_items("piqa", f"{tmp_path}/notes")
    with pytest.raises(ConfigError, match="no hub id"):
        read_items("piqa", f"{tmp_path}/a.jsonl", revision="main")
    with pytest.raises(ConfigError, match="'mmlu' is unknown; name one of storycloze"):
        read_items("mmlu", f"{tmp_path}/a.jsonl")


def test_a_data_set_that_is_a_script_has_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "piqa.py").write_text("class Piqa: ...")
    with pytest.raises(ConfigError, match=r"it holds a script: set revision to refs/convert/parquet"):
        list(read_items("piqa", str(tmp_path)))


@pytest.mark.parametrize("key", ["B", 2, "2", "text 1"])
def test_answers_may_be_letters_integers_or_texts(tmp_path: Path, key: str | int) -> None:
    """Of MMLU numbers count from 0, of ARC they are labels."""
    texts = [f"text {number}" for number in range(5)]
    labels = [1, 2, 3, 4, 5] if isinstance(key, int) else list("12345") if key == "2" else list("ABCDE")
    if key != "text 1":
        rows = {"id": "x", "question": "Who?", "choices": {"text": texts, "label": labels}, "answerKey": key}
        (tmp_path / "arc.jsonl").write_text(json.dumps(rows) + "\n")
        [item] = items_of("arc_challenge", tmp_path / "arc.jsonl")
        assert (item.choices, item.answer) == (texts, 1)
    number = {2: 1, "2": "1"}.get(key, key)
    row = {"question": "Who?", "subject": "law", "choices": texts, "answer": number}
    (tmp_path / "mmlu.jsonl").write_text(json.dumps(row) + "\n")
    [item] = items_of("mmlu_spoken", tmp_path / "mmlu.jsonl")
    assert (item.choices, item.answer) == (texts, 1)


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"as a data set of the hub it cannot be listed .*local copy"):
        read_items("arc_challenge", "allenai/ai2_arc")
    with pytest.raises(ConfigError, match="cannot be listed"):
        read_items("arc_challenge", "allenai/ai2_arc/ARC-Challenge/train-*.parquet", revision="main")
    with pytest.raises(ConfigError, match="no such file"):
        read_items("arc_challenge", "absent/arc.jsonl")


@pytest.mark.parametrize(
    ("benchmark", "files", "read"),
    [
        ("arc_challenge", ["ARC-Challenge/test-0.parquet", "ARC-Challenge/train-0.parquet", "ARC-Easy/test-0.parquet"],
         ["ARC-Challenge/test-0.parquet"]),
        ("arc_challenge", ["ARC-Challenge-Dev.jsonl", "ARC-Challenge-Test.jsonl", "ARC-Challenge-Test.csv"],
         ["ARC-Challenge-Test.jsonl"]),
        ("openbookqa", ["main/validation-0.parquet", "additional/test-0.parquet"], ["main/validation-0.parquet"]),
        ("hellaswag", ["data/test-0.parquet", "data/train-0.parquet", "data/validation-0.parquet"],
         ["data/validation-0.parquet"]),
        ("piqa", ["tests.jsonl", "train.jsonl", "valid.jsonl", "valid-labels.lst"], ["valid.jsonl"]),
        ("mmlu_spoken", ["dev/law_dev.csv", "test/art_test.csv", "test/law_test.csv", "val/law_val.csv"],
         ["test/art_test.csv", "test/law_test.csv"]),
        ("voicebench_mmsu", ["bbh/test-0.parquet", "mmsu/law-0.parquet", "mmsu/biology-0.parquet"],
         ["mmsu/biology-0.parquet", "mmsu/law-0.parquet"]),
        ("storycloze", ["cloze_test_test__2016 - cloze_test_ALL_test.csv", "cloze_test_val__2016 - ALL_val.csv"],
         ["cloze_test_test__2016 - cloze_test_ALL_test.csv"]),
    ],
)  # fmt: skip
def test_of_a_folder_the_labelled_evaluation_split_is_read(
    tmp_path: Path, benchmark: str, files: list[str], read: list[str]
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert find_files(benchmark, str(tmp_path)) == [f"{tmp_path}/{name}" for name in read]


def test_a_folder_without_the_split_is_told_and_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", GOOD["piqa"])
    with pytest.raises(ConfigError, match="files of the splits train, but none of validation"):
        find_files("piqa", str(tmp_path))
    assert find_files("piqa", path) == find_files("piqa", f"{tmp_path}/tr*.jsonl") == [path]


def test_ids_of_several_files_differ(tmp_path: Path) -> None:
    for shard in range(2):
        write_parquet(tmp_path / f"test-{shard}.parquet", MMLU, MMLU | {"question": "And three?"})
    ids = [item.item_id for item in items_of("mmlu_spoken", tmp_path)]
    assert ids == [f"mmlu_spoken-test-{shard}-{row}" for shard in (0, 1) for row in (1, 2)]


def test_world_items_continue_their_prompts() -> None:
    items = world_items(12, DOMAINS, seed=0)
    assert items == world_items(12, DOMAINS, seed=0) != world_items(12, DOMAINS, seed=1)
    assert [item.domain for item in items] == list(DOMAINS) * 2
    assert len({item.item_id for item in items}) == 12
    for item in items:
        assert prompt_of(item) == item.spoken
        assert item.spoken.endswith("?")
        assert exemplar_of(item) == f"{item.spoken} {item.choices[item.answer]}"


def test_exemplars_are_other_items_and_do_not_depend_on_order(shared_data: Path) -> None:
    items = items_of("piqa", shared_data / "benchmarks" / "piqa.jsonl")
    same_goal = [item for item in items if item.spoken == "dresser"]
    assert len(same_goal) == 2
    for item in [*items[:20], *same_goal]:
        chosen = choose_exemplars(items, item, 5, seed=0)
        assert chosen == choose_exemplars(items[::-1], item, 5, seed=0)
        assert chosen[:3] == choose_exemplars(items, item, 3, seed=0)
        assert chosen != choose_exemplars(items, item, 5, seed=1)
        assert len({prompt_of(other) for other in [*chosen, item]}) == 6
    first, second = same_goal
    everything = choose_exemplars(items, first, 1000, seed=0)
    assert second not in everything
    assert len(everything) == len({item.spoken for item in items}) - 1
    drawn = [other.item_id for item in items for other in choose_exemplars(items, item, 5, seed=0)]
    assert len(set(drawn)) > 450  # nearly every item is some item's exemplar


def test_exemplars_of_mmlu_keep_to_the_domain_and_none_cross_benchmarks(shared_data: Path) -> None:
    mmlu = items_of("mmlu_spoken", shared_data / "benchmarks" / "mmlu.jsonl")
    world = world_items(40, DOMAINS, seed=0)
    chosen = choose_exemplars([*world, *mmlu], mmlu[100], 5, seed=3)
    assert [item.domain for item in chosen] == [mmlu[100].domain] * 5
    assert len(choose_exemplars(mmlu, mmlu[100], 100, seed=3)) == 8
    of_world = choose_exemplars([*mmlu, *world], world[0], 39, seed=3)
    assert len({item.domain for item in of_world}) == len(DOMAINS)
    train = world_items(40, DOMAINS, seed=1)
    assert len(choose_exemplars(train, world[0], 5, seed=3)) == 5


def test_many_copies_of_one_prompt_do_not_hide_the_others(tmp_path: Path) -> None:
    copies = [changed("piqa", goal="Cut bread" if n else "Peel an egg") for n in range(200)]
    items = items_of("piqa", write_jsonl(tmp_path / "a.jsonl", *copies, changed("piqa", goal="Tie a knot")))
    for seed in range(5):
        chosen = choose_exemplars(items, items[0], 2, seed)
        assert {item.spoken for item in chosen} == {"Cut bread", "Tie a knot"}


def test_benchmarks_are_told_apart() -> None:
    lettered = {"openbookqa", "arc_challenge", "mmlu_spoken", "voicebench_mmsu"}
    assert set(GOOD) | {f"{name}{LETTERS}" for name in lettered} == set(BENCHMARKS)


def test_options_are_spoken_behind_the_question_and_their_letters_scored(tmp_path: Path) -> None:
    (arc,) = items_of("arc_challenge_letters", write_jsonl(tmp_path / "a.jsonl", GOOD["arc_challenge"]))
    assert exemplar_of(arc) == "Question: What falls?\nA. rain\nB. sky\nAnswer: B"
    assert (arc.spoken, arc.choices, arc.answer) == ("What falls?\nA. rain\nB. sky", ["A", "B"], 1)
    assert arc.item_id == "arc_challenge_letters-M_1"
    assert prompt_of(choices_alone(arc)) == "A. rain\nB. sky\nAnswer:"
    (recorded,) = items_of(
        "voicebench_mmsu_letters", write_jsonl(tmp_path / "b.jsonl", changed("voicebench_mmsu", audio=None))
    )
    assert (recorded.spoken, recorded.choices, recorded.answer) == (SPOKEN, ["A", "B", "C", "D"], 1)
    assert prompt_of(choices_alone(recorded)) == SPOKEN.removeprefix("Who makes law?\n") + "\nAnswer:"
    silent = changed("voicebench_mmsu", audio=None, prompt="Who makes law?", options=["Courts", "Parliament"])
    with pytest.raises(ConfigError, match="its prompt, which is what its recording says, has no lettered choices"):
        list(read_items("voicebench_mmsu_letters", write_jsonl(tmp_path / "c.jsonl", silent)))
    assert len(items_of("voicebench_mmsu", tmp_path / "c.jsonl")) == 1


def test_letters_stand_for_what_the_file_says(shared_data: Path) -> None:
    path = shared_data / "benchmarks" / "arc_challenge.jsonl"
    letters, cloze = items_of("arc_challenge_letters", path), items_of("arc_challenge", path)
    assert len(letters) == len(cloze) == 500
    for listed, item in zip(letters, cloze, strict=True):
        lines = listed.spoken.splitlines()[-len(item.choices) :]
        assert lines == [f"{a}. {text}" for a, text in zip("ABCDE", item.choices, strict=False)]
        assert lines[listed.answer] == f"{listed.choices[listed.answer]}. {item.choices[item.answer]}"
        assert prompt_of(choices_alone(listed)) == "\n".join(lines) + "\nAnswer:"


def test_three_to_ten_choices_have_letters(tmp_path: Path) -> None:
    records = [
        changed("mmlu_spoken", choices=[f"{n} of {num}" for n in range(num)], answer=num - 1) for num in (3, 10, 11)
    ]
    found = list(read_items("mmlu_spoken_letters", write_jsonl(tmp_path / "a.jsonl", *records)))
    three, ten, eleven = found
    assert isinstance(three, Item)
    assert isinstance(ten, Item)
    assert (three.choices[three.answer], ten.choices[ten.answer]) == ("C", "J")
    assert ten.spoken.endswith("\nI. 8 of 10\nJ. 9 of 10")
    assert isinstance(eleven, Reject)
    assert "it has 11 choices, and letters go to J" in eleven.reason


def test_choices_alone_have_no_prompt(tmp_path: Path) -> None:
    for name in ("storycloze", "hellaswag", "piqa", "mmlu_spoken", "voicebench_mmsu"):
        (item,) = items_of(name, write_jsonl(tmp_path / f"{name}.jsonl", changed(name, audio=None)))
        alone = choices_alone(item)
        assert prompt_of(alone) == ""
        assert (alone.choices, alone.answer) == (item.choices, item.answer)


def test_speech_is_swapped_for_the_nearest_in_length_of_other_words() -> None:
    items = world_items(6, DOMAINS, seed=0)
    items[1] = replace(items[1], spoken=items[0].spoken)
    items[5] = replace(items[5], benchmark="piqa")
    assert swap_partners(items, [50, 50, 53, 90, 70, 50]) == [2, 2, 0, 4, 2, None]
