"""Multiple-choice benchmarks, read in their original formats into `Item`s; and the exemplars in front of an item.

| benchmark | text in front | spoken | text behind | scored, after a space |
| --- | --- | --- | --- | --- |
| storycloze | | the four sentences | | both endings |
| openbookqa | | the question's stem | | the choices |
| hellaswag | the activity, ": " | the context | | the endings |
| arc_challenge | "Question: " | the question | newline, "Answer:" | the choices |
| piqa | "Question: " | the goal | newline, "Answer:" | both solutions |
| mmlu_spoken | "Question: " | the question | newline, "Answer:" | the choices, as text |
| voicebench_mmsu | "Question: " | what its recording says: question, lettered choices, instruction | newline, "Answer:" | as mmlu_spoken |
| …_letters | "Question: " | the question, and a line "A. …" for each choice | newline, "Answer:" | the letters |
| world | | a document's beginning and the question | | the choices |

The requests of OpenBookQA, HellaSwag, ARC, PIQA and StoryCloze are those of lm-evaluation-harness 0.4.13, byte for byte,
those of MMLU of its task `mmlu_continuation`; docs/evaluation.md says which files and fields are read.
"""  # noqa: E501

from __future__ import annotations

import csv
import heapq
import io
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from salad_ray.config import ConfigError
from salad_ray.names import INGEST
from salad_ray.speech.audio import naming
from salad_ray.speech.readers import inside
from salad_ray.store import filesystem, is_of_storage, open_file
from salad_ray.tables import BadInput, Item, Reject, stable_hash
from salad_ray.text.documents import MAX_FILE_BYTES, UNREACHABLE, column_values, hub_url, json_record, read_whole
from salad_ray.text.world import world_questions

PARQUET_ROWS = 16
"""That are decoded at once."""
MAX_AUDIO_BYTES = 2**31
"""Of the recordings of a row group."""
LETTERS = "_letters"
"""How benchmarks are called whose options are listed behind the question, and of which the letters are scored."""
BENCHMARKS = (
    *("storycloze", "openbookqa", "hellaswag", "arc_challenge", "piqa", "mmlu_spoken", "voicebench_mmsu"),
    *(f"{name}{LETTERS}" for name in ("openbookqa", "arc_challenge", "mmlu_spoken", "voicebench_mmsu")),
)
ENDS: dict[str, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "jsonl": (".jsonl", ".jsonl.gz"),
    "csv": (".csv", ".csv.gz"),
}
_OWN_DOMAIN = ("mmlu_spoken", "voicebench_mmsu")
"""Exemplars of these are of the item's own domain."""
_HUB_FOLDERS = {
    "arc_challenge": "ARC-Challenge",
    "openbookqa": "main",
    "mmlu_spoken": "all",
    "voicebench_mmsu": "mmsu",
}
"""Where a data set of the hub, or a folder, holds several sets, the one that is meant."""
_SPLITS = {"test": "test", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}
_NO_TEST_LABELS = ("hellaswag", "piqa")
_MMLU_COLUMNS = ("question", "A", "B", "C", "D", "answer")
_LETTERS = "ABCDEFGHIJ"
_LETTERED = re.compile(r"\s*\(?([A-J])[.):]\s+(\S.*)")
_FIRST_OPTION = re.compile(r"^\s*\(?A[.):]\s", re.MULTILINE)
_ANSWER = "\nAnswer:"
_ROW = re.compile(r"(.+\.parquet)#row=(\d+)")
Record = dict[str, Any]


class _Parts(NamedTuple):
    """An item before it is checked; `name` is its id in the file, if the format has one."""

    before: str
    spoken: str
    after: str
    choices: list[str]
    answer: int
    domain: str = ""
    name: str = ""


def read_items(benchmark: str, path: str, revision: str | None = None) -> Iterator[Item | Reject]:
    """The items of a benchmark in the order of its files; rows that cannot be used are rejects with file, row, remedy.

    Args:
        benchmark: one of `BENCHMARKS`.
        path: a file (.jsonl, .csv, .parquet, the first two also gzipped), a folder or pattern, any URL of such, or a
            hub id with or without a folder or pattern behind it. Of a folder and of a hub id the test split is read,
            of HellaSwag and PIQA, whose test splits have no labels, the validation split.
        revision: of a hub id.

    Raises:
        ConfigError: no such benchmark or file, a hub that cannot be reached, a damaged file, or one of which more
            than half of the rows cannot be used; one sentence with the remedy.
    """
    return _read_files(benchmark, find_files(benchmark, path, revision))


def find_files(benchmark: str, path: str, revision: str | None = None) -> list[str]:
    """Paths or URLs of the files that `read_items` reads, sorted; arguments and errors as there."""
    if benchmark not in BENCHMARKS:
        raise ConfigError(f"benchmark '{benchmark}' is unknown; name one of {', '.join(BENCHMARKS)}")
    is_file = _kind(path) is not None and path.count("/") < 2  # no data set is called a/b.jsonl
    url = hub_url(f"./{path}" if is_file else path, revision)
    try:
        fs, root = filesystem(url)
        files = fs.glob(root) if "*" in root else fs.find(root)
    except FileNotFoundError:
        files = []
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be opened ({error}); set a file, folder, URL or hub id") from None
    except UNREACHABLE as error:
        here = "nothing is there, and as a data set of the hub it" if "://" not in path else "it"
        raise ConfigError(
            f"{path}: {here} cannot be listed ({type(error).__name__}: {error}); set path to a local copy"
        ) from None
    if not files:
        raise ConfigError(f"{path}: no such file or folder; set path to the items of {benchmark}")
    known = sorted(file for file in files if _kind(file) is not None)
    if not known:
        ends = ", ".join(end for ends in ENDS.values() for end in ends)
        is_script = any(file.endswith(".py") for file in files)
        remedy = (
            "it holds a script: set revision to refs/convert/parquet"
            if is_script
            else f"set path to the items of {benchmark}"
        )
        raise ConfigError(f"{path}: none of its files ends in {ends}; {remedy}")
    if "*" not in root and _kind(root) is None:  # a folder or data set, not a file
        known = _evaluation_files(benchmark, known, path, root)
    return [file if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(file)) for file in known]


def world_items(num: int, domains: Sequence[str], seed: int) -> list[Item]:
    """Questions of the embedded world; raises `ConfigError` for a domain that it does not have."""
    return [
        Item(
            item_id=f"world-{seed}-{number:05d}",
            benchmark="world",
            domain=question.domain,
            before="",
            spoken=f"{question.context} {question.question}",
            after="",
            choices=list(question.choices),
            answer=question.answer,
        )
        for number, question in enumerate(world_questions(num, domains, seed))
    ]


def prompt_of(item: Item) -> str:
    """The item as text, without its choices."""
    return item.before + item.spoken + item.after


def exemplar_of(item: Item) -> str:
    """The item as text, with the right choice."""
    return f"{prompt_of(item)} {item.choices[item.answer]}"


def choose_exemplars(items: Sequence[Item], item: Item, num: int, seed: int) -> list[Item]:
    """Up to `num` other items of the same benchmark (MMLU: and domain), no two of them with one prompt.

    The choice depends on the seed and the ids alone, not on the order of `items`, which may be another split. Every
    item gets exemplars of its own: with the same few for all, an interval over items would not know what they do.
    """
    own_domain = item.benchmark.removesuffix(LETTERS) in _OWN_DOMAIN
    others = [
        other
        for other in items
        if other.benchmark == item.benchmark
        and other.item_id != item.item_id
        and (not own_domain or other.domain == item.domain)
    ]
    # Places on a ring: an item takes those that follow its own, so a place is hashed once and not for every pair.
    here = _place(seed, item.item_id)
    tried = 2 * num + 8
    while True:
        ranked = heapq.nsmallest(tried, others, key=lambda other: (_place(seed, other.item_id) - here) % 2**64)
        prompts = {prompt_of(other): other for other in reversed(ranked)}
        prompts.pop(prompt_of(item), None)
        if len(prompts) >= num or tried >= len(others):
            return list(reversed(prompts.values()))[:num]
        tried *= 4


@lru_cache(maxsize=2**17)
def _place(seed: int, item_id: str) -> int:
    return stable_hash("exemplars", seed, item_id)


def choices_alone(item: Item) -> Item:
    """The item without its question and the texts around it: nothing but its choices can tell the right one.

    Where letters are scored, the options that they stand for are left, in front of the text behind them.
    """
    if not item.benchmark.endswith(LETTERS):
        return replace(item, before="", spoken="", after="")
    *_, first = _FIRST_OPTION.finditer(item.spoken)
    return replace(item, before=item.spoken[first.start() :], spoken="")


def swap_partners(items: Sequence[Item], lengths: Sequence[float]) -> list[int | None]:
    """For each item the place of another one of its benchmark, with other words and the nearest length of speech.

    None where there is no such item. Two items may have the same partner.
    """

    def distance(here: int, other: int) -> tuple[float, str]:
        return abs(lengths[other] - lengths[here]), items[other].item_id

    def partner(here: int) -> int | None:
        own = items[here]
        others = [
            place
            for place, item in enumerate(items)
            if item.benchmark == own.benchmark and item.spoken.split() != own.spoken.split()
        ]
        return min(others, key=partial(distance, here), default=None)

    return [partner(here) for here in range(len(items))]


def read_recording(audio: str) -> bytes:
    """The encoded bytes of an item's `audio`: a file, or a row of a Parquet file (`file.parquet#row=7`, from 0).

    Raises:
        BadInput: the file is missing or damaged, or the row has no audio.
        OSError: of the network or a disk, which says nothing of the recording.
    """
    found = _ROW.fullmatch(audio)
    with naming(audio):
        if found is None:
            fs, path = filesystem(audio)
            data = fs.cat_file(path)
        else:
            data = _recording_of_row(found[1], int(found[2]))
    if not data:
        raise BadInput(f"its recording {audio} is empty")
    return bytes(data)


def _recording_of_row(url: str, row: int) -> bytes | None:
    try:
        starts = _group_starts(url)
        group = bisect_right(starts, row) - 1
        if group == len(starts) - 1:
            raise IndexError(f"the file has {starts[-1]} rows")
        return _recordings(url, group)[row - starts[group]].get("bytes")
    except (OSError, ValueError, LookupError, AttributeError, pa.ArrowException) as error:
        if is_of_storage(error):
            raise
        raise BadInput(f"its recording {url}#row={row} cannot be read ({type(error).__name__}: {error})") from None


@lru_cache(maxsize=64)
def _group_starts(url: str) -> list[int]:
    """The first row of each row group, and the number of rows."""
    with open_file(url) as file:
        metadata = pq.ParquetFile(file).metadata
        return [
            *accumulate((metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)), initial=0)
        ]


@lru_cache(maxsize=1)  # items are asked for in order: a row group is read once, and one is in memory
def _recordings(url: str, group: int) -> list[Record]:
    with open_file(url) as file:
        rows = _bounded(pq.ParquetFile(file), ["audio"], [group], MAX_AUDIO_BYTES)
    return [value or {} for value in rows["audio"].to_pylist()]


def _kind(file: str) -> str | None:
    return next((kind for kind, ends in ENDS.items() if file.endswith(ends)), None)


def _evaluation_files(benchmark: str, files: list[str], path: str, root: str) -> list[str]:
    """Of a folder's files those of the right set, split and format; all where no name tells a split (VoiceBench)."""
    within = {file: file.removeprefix(root).lstrip("/") for file in files}
    folder = _HUB_FOLDERS.get(benchmark.removesuffix(LETTERS))
    if any(folder in name.split("/")[:-1] for name in within.values()):
        within = {file: name for file, name in within.items() if folder in name.split("/")[:-1]}
    splits = {file: _split(name) for file, name in within.items()}
    wanted = ("validation",) if benchmark in _NO_TEST_LABELS else ("test", "validation")
    if any(splits.values()):
        split = next((split for split in wanted if split in splits.values()), None)
        if split is None:
            raise ConfigError(
                f"{path} has files of the splits {', '.join(sorted(set(filter(None, splits.values()))))}, but none of "
                f"{' or '.join(wanted)}; set path to the file that is meant"
            )
        within = {file: name for file, name in within.items() if splits[file] == split}
    kinds = [_kind(file) for file in within]
    return [file for file in within if _kind(file) == next(kind for kind in ENDS if kind in kinds)]


def _split(name: str) -> str:
    """The split that a file's name or folder tells, the last one if there are several; "" for none."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLITS or word == "train"]
    return _SPLITS.get(words[-1], "train") if words else ""


def _read_files(benchmark: str, files: list[str]) -> Iterator[Item | Reject]:
    seen: set[str] = set()
    for url in files:
        found = list(_read_file(benchmark, url, seen, several=len(files) > 1))
        rejects = [row for row in found if isinstance(row, Reject)]
        if not found:
            raise ConfigError(f"{url} holds no items; set path to the items of {benchmark}")
        if 2 * len(rejects) > len(found):
            raise ConfigError(
                f"{len(rejects)} of the {len(found)} rows of {url} cannot be read as {benchmark}, such as "
                f"{rejects[0].reason}; set path to a file in a format that docs/evaluation.md names"
            )
        yield from found


def _read_file(benchmark: str, url: str, seen: set[str], several: bool) -> Iterator[Item | Reject]:
    name = url.rsplit("/", 1)[-1]
    for row, record in _records(benchmark, url):
        fallback = f"{_stem(name)}-{row}" if several else str(row)
        try:
            if isinstance(record, BadInput):
                raise record
            item = _item(benchmark, record, fallback, _recording(record.get("audio"), url))
            if item.item_id in seen:
                raise BadInput(f"its id {item.item_id} is that of an earlier row")
            seen.add(item.item_id)
            yield item
        except BadInput as error:
            reason = f"{name}, row {row}: {error}; correct or remove the row"
            yield Reject(INGEST, f"{benchmark}/{name}:{row}", reason.encode("utf-8", "backslashreplace").decode())


def _records(benchmark: str, url: str) -> Iterator[tuple[int, Record | BadInput]]:
    """(row from 1, record): the line of a text file, the row of a Parquet file."""
    kind = _kind(url)
    if kind == "parquet":
        return _parquet_records(url)
    data = _read(url)
    if kind == "csv":
        return _csv_records(data, _stem(url.rsplit("/", 1)[-1]) if benchmark.startswith("mmlu_spoken") else None)
    records = _json_records(data)
    return _labelled(records, url) if benchmark == "piqa" else records


def _read(url: str) -> bytes:
    try:
        return read_whole(url)
    except UNREACHABLE as error:
        raise ConfigError(f"{url} cannot be read ({type(error).__name__}: {error}); check path") from None


def _json_records(data: bytes) -> Iterator[tuple[int, Record | BadInput]]:
    for row, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            yield row, json_record(line)


def _labelled(records: Iterator[tuple[int, Record | BadInput]], url: str) -> Iterator[tuple[int, Record | BadInput]]:
    """PIQA as first distributed: labels of valid.jsonl in valid-labels.lst, a line each."""
    rows = list(records)
    missing = [record for _, record in rows if isinstance(record, dict) and record.get("label") is None]
    folder, _, name = url.rpartition("/")
    beside = f"{folder or '.'}/{_stem(name)}-labels.lst"
    fs, path = filesystem(beside)
    if missing and fs.exists(path):
        labels = _read(beside).decode("utf-8", "replace").split()
        if len(labels) != len(rows):
            raise ConfigError(f"{beside} has {len(labels)} labels for the {len(rows)} rows of {url}; fetch both again")
        for (_, record), label in zip(rows, labels, strict=True):
            if isinstance(record, dict) and record.get("label") is None:
                record["label"] = label
    yield from rows


def _csv_records(data: bytes, mmlu_stem: str | None) -> Iterator[tuple[int, Record | BadInput]]:
    """Rows by the header; of MMLU, whose files have none, by its six columns, the subject being the file's name."""
    text = data.decode("utf-8-sig", "surrogateescape")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = None if mmlu_stem is None else list(_MMLU_COLUMNS)
    subject = {} if mmlu_stem is None else {"subject": re.sub(r"_(test|val|dev|train)$", "", mmlu_stem)}
    while True:
        row = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield row, BadInput(f"not CSV up to row {reader.line_num} ({error}), perhaps a quotation mark too many")
            continue
        if header is None:
            header = [name.strip() for name in fields]
        elif fields and len(fields) != len(header):
            yield row, BadInput(f"it has {len(fields)} fields, not {len(header)} ({', '.join(header)})")
        elif fields:
            record: Record = dict(zip(header, fields, strict=True)) | subject
            yield row, record | {"id": f"{subject['subject']}-{row}"} if subject else record


def _parquet_records(url: str) -> Iterator[tuple[int, Record | BadInput]]:
    """Without the bytes of recordings: of these `audio` keeps its place, {"row": …}."""
    try:
        with open_file(url) as file:
            parquet = pq.ParquetFile(file)
            names = parquet.schema_arrow.names
            has_bytes = "audio" in names and pa.types.is_struct(parquet.schema_arrow.field("audio").type)
            table = _bounded(parquet, names if not has_bytes else [name for name in names if name != "audio"])
            columns = {name: column_values(table[name].combine_chunks()) for name in table.column_names}
    except (pa.ArrowException, *UNREACHABLE) as error:
        raise ConfigError(f"{url} cannot be read as Parquet ({error}); fetch it again") from None
    for row, values in enumerate(zip(*columns.values(), strict=True)):
        record: Record = dict(zip(columns, values, strict=True))
        yield row + 1, record | {"audio": {"row": row}} if has_bytes else record


def _bounded(
    parquet: pq.ParquetFile, columns: list[str], groups: list[int] | None = None, most: int = MAX_FILE_BYTES
) -> pa.Table:
    """The rows, a few at a time: a page of two kilobytes can name one text of megabytes a thousand times."""
    batches: list[pa.RecordBatch] = []
    size = 0
    for batch in parquet.iter_batches(PARQUET_ROWS, row_groups=groups, columns=columns, use_threads=False):
        batches.append(batch)
        size += batch.nbytes
        if size > most:
            raise pa.ArrowInvalid(f"its rows are more than {most:,} bytes")
    return pa.Table.from_batches(batches, parquet.schema_arrow.empty_table().select(columns).schema)


def _recording(audio: Any, url: str) -> str | None:
    """Where a row's recording is: a row of the Parquet file itself, or a file at or below the folder of the items."""
    if isinstance(audio, dict):
        if "row" in audio:
            return f"{url}#row={audio['row']}"
        audio = audio.get("path")
    if audio is None or audio == "":
        return None
    if not isinstance(audio, str):
        raise BadInput(f"its 'audio' is a {type(audio).__name__}, not a path")
    try:
        return inside(audio, url.rpartition("/")[0] or ".")
    except BadInput:
        raise BadInput(f"its audio {audio} is outside the folder of the items") from None


def _item(benchmark: str, record: Record, fallback: str, audio: str | None) -> Item:
    """A checked item; raises `BadInput`."""
    parts = _parse(benchmark, record)
    spoken = parts.spoken.strip()
    if not spoken:
        raise BadInput("its question is empty")
    _check_choices(parts.choices)
    start = parts.spoken.index(spoken)  # spaces around it are text: the prompt stays as it is
    item = Item(
        item_id=f"{benchmark}-{parts.name or fallback}",
        benchmark=benchmark,
        domain=parts.domain,
        before=parts.before + parts.spoken[:start],
        spoken=spoken,
        after=parts.spoken[start + len(spoken) :] + parts.after,
        choices=parts.choices,
        answer=parts.answer,
        audio=audio,
    )
    try:
        "".join((item.item_id, item.domain, prompt_of(item), audio or "", *item.choices)).encode()
    except UnicodeEncodeError:
        raise BadInput("it is not valid Unicode (UTF-8, without lone surrogates)") from None
    return item


def _check_choices(choices: Sequence[str]) -> None:
    if len(choices) < 2:
        raise BadInput(f"it has {len(choices)} choice{'s' * (len(choices) != 1)}, not two or more")
    if not all(choice.strip() for choice in choices):
        raise BadInput("one of its choices is empty")
    if len({choice.strip() for choice in choices}) < len(choices):
        raise BadInput("two of its choices are the same")


def _parse(benchmark: str, record: Record) -> _Parts:
    """Dispatch by name; raises `BadInput`."""
    if benchmark.endswith(LETTERS):
        parts = _parse(benchmark.removesuffix(LETTERS), record)
        return _with_letters(parts, listed=benchmark == f"voicebench_mmsu{LETTERS}")
    if benchmark == "storycloze":
        return _storycloze(record)
    if benchmark in ("openbookqa", "arc_challenge"):
        return _science(record, asks=benchmark == "arc_challenge")
    if benchmark == "hellaswag":
        return _hellaswag(record)
    if benchmark == "piqa":
        return _piqa(record)
    return _mmlu(record) if benchmark == "mmlu_spoken" else _voicebench(record)


def _with_letters(parts: _Parts, listed: bool) -> _Parts:
    """The options are spoken behind the question, a line each, as VoiceBench has them; the choices are their letters.

    Args:
        listed: they must be there already, as a recording says them.
    """
    if len(parts.choices) > len(_LETTERS):
        raise BadInput(f"it has {len(parts.choices)} choices, and letters go to {_LETTERS[-1]}")
    _check_choices(parts.choices)
    letters = list(_LETTERS[: len(parts.choices)])
    spoken = parts.spoken.strip()
    if not spoken:
        raise BadInput("its question is empty")
    if listed and not _lettered_choices(spoken):
        raise BadInput("its prompt, which is what its recording says, has no lettered choices on lines of their own")
    if not listed:
        options = zip(letters, parts.choices, strict=True)
        spoken += "".join(f"\n{letter}. {' '.join(text.split())}" for letter, text in options)
    return parts._replace(before="Question: ", spoken=spoken, after=_ANSWER, choices=letters)


def _storycloze(record: Record) -> _Parts:
    """Columns of the original CSV, or those of its version on the hub."""
    sentences = [_text(record, f"InputSentence{n}", f"input_sentence_{n}") for n in range(1, 5)]
    if not all(sentence.strip() for sentence in sentences):
        raise BadInput("one of its four sentences is empty")
    endings = [_text(record, f"RandomFifthSentenceQuiz{n}", f"sentence_quiz{n}") for n in (1, 2)]
    answer = _answer(record, ("AnswerRightEnding", "answer_right_ending"), 2, first=1)
    return _Parts("", " ".join(sentences), "", endings, answer, name=_name(record, "InputStoryid", "story_id"))


def _science(record: Record, asks: bool) -> _Parts:
    """ARC and OpenBookQA: `question` {stem, choices [{text, label}]}, or the hub's `choices` {text [], label []}."""
    question = record.get("question")
    holder = question if isinstance(question, dict) else record
    stem = _text(holder, "stem") if isinstance(question, dict) else _text(record, "question", "question_stem")
    texts, labels = _labelled_choices(holder.get("choices"))
    key = _name(record, "answerKey") or _text(record, "answerKey").strip()
    if labels.count(key) != 1:
        raise BadInput(f"its answerKey '{key}' is not one of {', '.join(labels)}")
    before, after = ("Question: ", _ANSWER) if asks else ("", "")
    return _Parts(before, stem, after, texts, labels.index(key), name=_name(record, "id"))


def _labelled_choices(choices: Any) -> tuple[list[str], list[str]]:
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {"text": [each.get("text") for each in choices], "label": [each.get("label") for each in choices]}
    if not isinstance(choices, dict):
        raise BadInput("it has no choices with 'text' and 'label'")
    texts, labels = _texts(choices.get("text"), "choices"), _texts(choices.get("label"), "labels of the choices")
    if len(texts) != len(labels):
        raise BadInput(f"it has {len(texts)} choices but {len(labels)} labels")
    return texts, [label.strip() for label in labels]


def _hellaswag(record: Record) -> _Parts:
    activity = _text(record, "activity_label")
    context = f"{_text(record, 'ctx_a')} {_text(record, 'ctx_b').capitalize()}"
    if not context.strip():
        raise BadInput("its context is empty")
    prompt = _without_marks(f"{activity}: {context}")
    before = f"{_without_marks(activity)}: "
    if not prompt.startswith(before):
        before = ""  # marks at the seam: then the activity is spoken with the rest
    endings = [_without_marks(ending) for ending in _texts(record.get("endings"), "endings")]
    # `ind` counts within each of the two sources, and the same number occurs in both.
    source, number = _name(record, "source_id").split("~")[0], _name(record, "ind")
    return _Parts(
        before=before,
        spoken=prompt.removeprefix(before),
        after="",
        choices=endings,
        answer=_answer(record, ("label",), len(endings)),
        domain=activity,
        name="-".join(filter(None, (source, number))) if number else "",
    )


def _without_marks(text: str) -> str:
    """WikiHow's [header], [title], [step] and [substeps] taken out, as in lm-evaluation-harness."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _piqa(record: Record) -> _Parts:
    if record.get("label") is None:
        raise BadInput("it has no 'label', and there is no file of labels (valid-labels.lst beside valid.jsonl)")
    solutions = [_text(record, "sol1"), _text(record, "sol2")]
    answer = _answer(record, ("label",), 2)
    return _Parts("Question: ", _text(record, "goal"), _ANSWER, solutions, answer, name=_name(record, "id"))


def _mmlu(record: Record) -> _Parts:
    """`choices` and the number of the right one (`answer`), or columns A to D and its letter."""
    listed = record.get("choices")
    choices = [_text(record, letter) for letter in "ABCD"] if listed is None else _texts(listed, "choices")
    return _Parts(
        before="Question: ",
        spoken=_text(record, "question").strip(),
        after=_ANSWER,
        choices=choices,
        answer=_answer(record, ("answer",), len(choices), letters=True, texts=choices),
        domain=_text(record, "subject").strip(),
        name=_name(record, "id"),
    )


def _voicebench(record: Record) -> _Parts:
    """VoiceBench's mmsu: its `prompt` is what its recording says, and the letters in there are the answer's."""
    prompt = _text(record, "prompt", "question").strip()
    listed = record.get("options", record.get("choices"))
    choices = _lettered_choices(prompt) or (_texts(listed, "options") if listed is not None else [])
    if not choices:
        raise BadInput("its prompt has no lettered choices on lines of their own, and it has no 'options'")
    return _Parts(
        before="Question: ",
        spoken=prompt,
        after=_ANSWER,
        choices=choices,
        answer=_answer(record, ("reference", "answer", "answer_index"), len(choices), letters=True),
        domain=_text(record, "category").strip(),
        name=_name(record, "question_id"),
    )


def _lettered_choices(prompt: str) -> list[str]:
    """Lines `A. …`, `B. …` that follow each other; [] where there are none, or where any such line is elsewhere."""
    found = [_LETTERED.fullmatch(line) for line in prompt.splitlines() if line.strip()]
    numbers = [number for number, match in enumerate(found) if match]
    lettered = [match for match in found if match]
    in_order = [match[1] for match in lettered] == list(_LETTERS[: len(lettered)])
    if len(lettered) < 2 or not in_order or numbers[-1] - numbers[0] >= len(lettered):
        return []
    return [match[2].strip() for match in lettered]


def _text(record: Mapping[str, Any], *names: str) -> str:
    """The first of these fields that there is."""
    for name in names:
        value = record.get(name)
        if isinstance(value, str):
            return value
        if value is not None:
            raise BadInput(f"its '{name}' is a {type(value).__name__}, not text")
    raise BadInput(f"it has no '{names[0]}'")


def _texts(values: Any, what: str) -> list[str]:
    if not isinstance(values, list):
        raise BadInput(f"it has no list of {what}")
    texts = [str(value) if type(value) is int else value for value in values]
    if not all(isinstance(text, str) for text in texts):
        raise BadInput(f"one of its {what} is not text")
    return texts


def _name(record: Record, *names: str) -> str:
    """An id as text; "" for none."""
    values = (record.get(name) for name in names)
    return next((str(v).strip() for v in values if isinstance(v, str | int) and not isinstance(v, bool)), "")


def _answer(
    record: Record,
    names: Sequence[str],
    num: int,
    *,
    first: int = 0,
    letters: bool = False,
    texts: Sequence[str] = (),
) -> int:
    """The index that the first of these fields tells: a number from `first` on or, if asked, a letter or one text."""
    name = next((name for name in names if record.get(name) is not None), None)
    if name is None:
        raise BadInput(f"it has no '{names[0]}'")
    value = record[name]
    text = "" if isinstance(value, bool) else str(value).strip()
    index = int(text) - first if re.fullmatch(r"[0-9]{1,3}", text) else -1
    if letters and len(text) == 1 and text in _LETTERS:
        index = _LETTERS.index(text)
    if index < 0 and list(texts).count(text) == 1:
        index = list(texts).index(text)
    if not 0 <= index < num:
        known = f"{first} to {num - 1 + first}" + (f" or A to {_LETTERS[num - 1]}" if letters and num else "")
        raise BadInput(f"its '{name}' is {value!r}, not {known}")
    return index


def _stem(name: str) -> str:
    return re.sub(r"\.(jsonl|csv|parquet)(\.gz)?$", "", name)
