"""The whole run as one nested, typed, strict config; `configfile.py` reads it from YAML and `key=value`.

Every section below is the sub-config of one stage or room. Unknown keys, wrong types and contradictions are errors of
one sentence: the key, its value and the remedy. A key that says how fast or where work is done, and not what comes out,
is marked `operational`: changing it makes nothing anew.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    model_validator,
)
from pydantic.fields import FieldInfo

from salad_ray.names import ACTIVE, NATURAL, TEXT, WEB

SetName = Literal["web", "text", "natural", "heldout", "probe", "active", "benchmark"]


class ConfigError(ValueError):
    """A config that cannot be used; its message is one sentence for the user."""


def operational(default: Any, **limits: Any) -> Any:
    """A key that never decides what a stage writes; arguments are those of pydantic's `Field`."""
    return Field(default, json_schema_extra={OPERATIONAL: True}, **limits)


OPERATIONAL = "operational"


class Section(BaseModel):
    """A part of the config: unknown keys fail, values are not coerced, nothing changes after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    def problems(self) -> Iterator[str]:
        """What contradicts itself, in a sentence with the remedy."""
        return iter(())

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for problem in self.problems():
            raise ValueError(problem)
        return self


RESOLVE = "resolve"
"""In the context of a validation: relative paths are of this process's folder, and made absolute. Workers on this
machine may start in another folder."""


def _resolved(path: str, info: ValidationInfo) -> str:
    if not path or not (info.context or {}).get(RESOLVE):
        return path
    return path.rstrip("/") if "://" in path else str(Path(path).resolve())  # a store takes a//b for another name


def _resolved_if_there(name: str, info: ValidationInfo) -> str:
    resolved = _resolved(name, info)
    place = Path(name).parent if "*" in name else Path(name)  # `*` is in the last part
    return resolved if resolved != name and place.exists() else name


LocalPath = Annotated[str, AfterValidator(_resolved)]
"""A file or folder, or a URL."""
HubPath = Annotated[str, AfterValidator(_resolved_if_there)]
"""The same, or a hub id where nothing of this name is here."""


def _ascending(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError("must be [least, most]")
    return ends


Range = Annotated[tuple[float, float], AfterValidator(_ascending)]
PositiveRange = Annotated[tuple[PositiveFloat, PositiveFloat], AfterValidator(_ascending)]
CountRange = Annotated[tuple[PositiveInt, PositiveInt], AfterValidator(_ascending)]


def _both_given(section: str, what: str, **given: float | None) -> Iterator[str]:
    both = [f"{section}.{key}={value:g}" for key, value in given.items() if value is not None]
    if len(both) > 1:
        yield f"{' and '.join(both)} both say {what}; give one of them"


def _uneven_heads(name: str, hidden_size: int, num_heads: int) -> Iterator[str]:
    if hidden_size % (2 * num_heads):
        yield f"{name}.hidden_size={hidden_size} must be an even multiple of {name}.num_heads={num_heads}; change one"


def _not_below(name: str, low: float, high: float) -> Iterator[str]:
    if low >= high:
        yield f"min_{name}={low:g} must be below max_{name}={high:g}"


PICKED_PER_SHARD = 256
"""Passages that are picked out of the web; a shard of speech is the unit of work and of retry."""
STAGE2_SHARE = 0.08
"""Of Stage I's steps, where Stage II's are not given: the paper's 1.9 B positions of 24 B."""
SHARES_TOLERANCE = 1e-3
"""A third is written 0.333; what is missing to 1 is dealt to all."""
POSITIONS_PER_WORD = 6
"""Of spoken words: 12.5 frames a second, at 130 words a minute."""


class RayConfig(Section):
    address: str | None = None
    """Cluster to join (`auto`, `ray://…`); unset: a local one is started."""
    num_cpus: int | None = Field(None, ge=1)
    """CPUs of a local Ray; unset: what the machine has."""
    max_actors: int | None = Field(None, ge=1)
    """Most actors of a stage; unset: what the cluster has room for now. On an autoscaled cluster, say how many."""


class WorldConfig(Section):
    """The embedded, procedural corpus (text/world.py)."""

    num_natural: int = Field(3000, ge=1)
    """Documents spoken as "natural" speech, in the heard domains only."""
    num_heldout: int = Field(240, ge=1)
    """Documents of all domains, kept for `measure`."""
    num_web: int = Field(6000, ge=1)
    """Documents of all domains, as web text; the tiny text LM is trained on them."""
    num_text: int = Field(0, ge=0)
    """Documents of all domains to train on as text alone, where ingest.text names none. They are drawn apart: none is
    one of the web's or of the held-out ones, or shares 13 words in a row with a question."""
    num_questions: int = Field(240, ge=0)
    """Questions about documents of all domains, for `evaluate`; asked where the text LM is the world's own."""
    domains: tuple[str, ...] = Field(("animals", "cooking", "stars", "chemistry", "law", "music"), min_length=1)
    """What documents and questions are about. Each domain has words of its own: fewer are heard sooner."""
    unheard: tuple[str, ...] = ("law", "music")
    """Domains that appear as text but never as natural speech."""

    def problems(self) -> Iterator[str]:
        if unknown := set(self.unheard) - set(self.domains):
            yield f"world.unheard={sorted(unknown)} are not among world.domains={list(self.domains)}"
        if not self.heard:
            yield "world.unheard names every domain; leave one of world.domains to be heard"

    @property
    def heard(self) -> tuple[str, ...]:
        return tuple(domain for domain in self.domains if domain not in self.unheard)


def _path_only(value: Any) -> Any:
    if isinstance(value, str):
        return {"path": value}
    return _with_tuples(value) if isinstance(value, dict) else value


def _with_tuples(given: dict[str, Any]) -> dict[str, Any]:
    """Behind a validator of ours, pydantic no longer takes JSON's arrays for tuples."""
    return {key: tuple(item) if isinstance(item, list) else item for key, item in given.items()}


def path_name(path: str) -> str:
    """The last part of a path without the ends that manifests have."""
    return re.sub(r"\.jsonl(\.gz|\.zst|\.bz2|\.xz)?$", "", path.rstrip("/").rsplit("/", 1)[-1])


class QualityConfig(Section):
    """What recorded speech must satisfy; the rest goes to `rejects` with its reason."""

    min_duration_secs: float = Field(0.15, gt=0)
    max_duration_secs: float = Field(60.0, gt=0)
    min_level_dbfs: float = -75.0
    """Quieter than this (root mean square) counts as silent; real quiet speech has been seen at -67."""
    max_clipped_share: float = Field(0.01, ge=0, le=1)
    """Largest share of samples at full scale."""
    max_chars_per_sec: float = Field(40.0, gt=0)
    """More text than anyone can say; fast readers reach 25."""
    min_chars_per_sec: float = Field(1.0, ge=0)

    def problems(self) -> Iterator[str]:
        yield from _not_below("duration_secs", self.min_duration_secs, self.max_duration_secs)
        yield from _not_below("chars_per_sec", self.min_chars_per_sec, self.max_chars_per_sec)


class RecordedQualityConfig(QualityConfig):
    min_dnsmos: float | None = None
    """Least DNSMOS (estimated quality, 1 to 5), where the corpus gives one."""


class CorpusConfig(Section):
    """One corpus of recorded speech; a plain string in `ingest.corpora` stands for its path."""

    path: LocalPath
    """A folder (`transcripts.tsv`, Emilia's tars, Kaldi's tables), or a Lhotse cut manifest; local or a URL; `*` in the
    last part stands for several manifests."""
    format: Literal["auto", "folder", "lhotse", "kaldi", "emilia"] = "auto"
    """`auto` looks at what lies at the path. LibriHeavy's full manifest is a Lhotse manifest."""
    name: str | None = None
    """Prefix of its ids; unset: the last part of the path."""
    root: LocalPath | None = None
    """Folder that the manifest's audio paths are relative to, and must stay in; unset: the manifest's own folder."""
    license: str | None = None
    """Of rows that state none; unset: the corpus' own, where it is known."""
    attribution: str | None = None
    """Whom the model card is to name; unset: what is known of the corpus."""
    text: Literal["book", "recogniser"] = "book"
    """Which of LibriHeavy's two texts: the book's, cased and punctuated, or the recogniser's upper case."""
    allow_outside: bool = False
    """Believe absolute paths, URLs and links of a manifest; otherwise audio must lie under `root`."""


class WebTextConfig(Section):
    """One corpus of web text; a plain string in `ingest.web` stands for its path."""

    path: HubPath
    """A Parquet or jsonl(.gz, …) file, a folder of them, a URL (`*` in the last part), or a hub id of a data set
    such as HuggingFaceFW/fineweb-edu, if need be with a folder or pattern behind it: …/sample/10BT/*.parquet."""
    name: str | None = None
    """Prefix of its ids; unset: the last part of the path."""
    format: Literal["auto", "parquet", "jsonl"] = "auto"
    revision: str | None = None
    """Of a hub id."""
    text_column: str = "text"
    id_column: str = "id"
    url_column: str = "url"
    license_column: str = "license"
    domain_column: str = "domain"
    language_column: str = "language"
    language_score_column: str = "language_score"
    score_column: str = "score"
    """Only `text_column` must be there; a filter below needs its column."""
    languages: tuple[str, ...] = ()
    """Languages to keep, as two-letter codes; unset: all."""
    min_language_score: float | None = None
    min_score: float | None = None
    """Least quality score, such as FineWeb-Edu's educational one."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of the documents to take, by the hash of their id; the others are passed over."""
    license: str | None = None
    """Of documents that state none."""
    attribution: str | None = None
    """Whom the model card is to name."""


class PassageConfig(Section):
    """How documents are cut into passages, the unit that is embedded, clustered, selected and spoken."""

    max_word_pieces: int = Field(256, ge=8)
    """MiniLM reads no more. Counted with the tokenizer of a sentence-transformers model, else estimated from above."""
    min_words: int = Field(8, ge=1)
    max_words: int | None = Field(None, ge=2)
    """Longest passage; unset: what pack.context holds if all of it were spoken, six positions a word."""
    num_heldout: int = Field(400, ge=1)
    """Passages of documents kept aside (ingest.heldout_share) that are spoken and measured as set=heldout."""
    benchmarks: tuple[LocalPath, ...] = ()
    """Files (jsonl, csv) of benchmark items; passages that share a run of words with one are rejected."""
    ngram: int = Field(13, ge=5)
    """Words of such a run."""


class IngestConfig(Section):
    corpora: tuple[Annotated[CorpusConfig, BeforeValidator(_path_only)], ...] = ()
    """Recorded speech; without any, natural speech is the embedded world's."""
    web: tuple[Annotated[WebTextConfig, BeforeValidator(_path_only)], ...] = ()
    """Web text; without any, and without corpora, it is the embedded world's."""
    text: tuple[Annotated[WebTextConfig, BeforeValidator(_path_only)], ...] = ()
    """What is trained on as text alone (pack.text_share, stage2.shares), in the formats of ingest.web and cut alike; a
    passage that the web text has too is left out, as it may be measured."""
    passages: PassageConfig = PassageConfig()
    languages: tuple[str, ...] = ()
    """Languages of recordings to keep, as two-letter codes; unset: all. Web text has filters of its own."""
    heldout_share: float = Field(0.1, ge=0, lt=1)
    """Share of the sources (by hash) marked `split=test`."""
    split_by: Literal["source", "speaker"] = "source"
    """What is never divided between the splits: the book, video or recording, or the speaker."""
    num_shards: int = Field(16, ge=1)
    """Shards to which recordings are dealt by hash: the unit of work, of resume and of retry, and the one shuffle of
    the data. A multiple of pack.num_lanes."""
    max_rejected_share: float = operational(0.5, ge=0, le=1)
    """A stage that rejects more than this share of its rows stops: the input, or a setting, is wrong."""
    max_member_bytes: int = operational(2**29, ge=1)
    """Largest file inside an archive; a larger one is refused unread."""
    quality: RecordedQualityConfig = RecordedQualityConfig()

    def problems(self) -> Iterator[str]:
        for key in ("corpora", WEB, TEXT):
            corpora: tuple[CorpusConfig | WebTextConfig, ...] = getattr(self, key)
            for corpus in corpora:
                if "*" in corpus.path and corpus.name is None:
                    yield (
                        f"ingest.{key}: {corpus.path} stands for several files, and ids begin with the corpus' name; "
                        "give it one: {path: …, name: …}"
                    )
            names = [corpus.name or path_name(corpus.path) for corpus in corpora]
            for twice in sorted({name for name in names if names.count(name) > 1}):
                yield (
                    f"ingest.{key}: two of them are called '{twice}', and ids begin with the name; give one of them "
                    f"another: {{path: …, name: {twice}-2}}"
                )


class AlignConfig(Section):
    aligner: Literal["pocketsphinx", "ctc", "none"] = "pocketsphinx"
    """`ctc` is any CTC recogniser of transformers; `none` leaves word times out: whole utterances of a recording then
    alternate between speech and text."""
    path: HubPath | None = None
    """Hub id or folder of the CTC model, for example facebook/wav2vec2-base-960h."""
    revision: str | None = None
    min_score: float | None = None
    """Least score of the worst stretch of an utterance; unset: the aligner's own (−4.3 for pocketsphinx, whose
    frames are scored against their best phone; CTC_MIN_SCORE for a CTC model, nats a frame)."""
    batch_secs: float = operational(120.0, gt=0)
    """Audio per batch of the CTC model, padding included."""
    num_threads: int = operational(1, ge=1)
    """Threads of each actor that decode and resample ahead of the model; so many CPUs are reserved for it."""
    num_gpus: float = operational(0.0, ge=0)
    """GPUs of each CTC actor."""

    def problems(self) -> Iterator[str]:
        if self.aligner == "ctc" and self.path is None:
            yield "align.aligner=ctc needs align.path, for example facebook/wav2vec2-base-960h"


class SpeechGates(QualityConfig):
    """What synthetic speech must satisfy; the rest goes to `rejects` with its reason."""

    max_duration_secs: float = Field(180.0, gt=0)
    max_chars_per_sec: float = Field(30.0, gt=0)
    """Faster than any of the synthesizers speaks: words were swallowed."""
    min_chars_per_sec: float = Field(4.0, ge=0)
    """Slower than any of them: it stuttered or fell silent."""
    max_pause_secs: float = Field(3.0, gt=0)
    """Longest stretch within the speech that is 40 dB below its level."""


ESPEAK_VOICES = (
    *(f"en-us{variant}" for variant in ("", "+f1", "+f3", "+Andrea", "+anika", "+belinda", "+shelby", "+zac")),
    *(f"en-us+{variant}" for variant in ("m1", "m5", "m7", "Alex", "Gene", "Mario", "boris", "iven")),
    *(f"en-gb{variant}" for variant in ("", "+f2", "+f5", "+Alicia", "+Annie", "+grandma", "+linda", "+steph")),
    *(f"en-gb+{variant}" for variant in ("m2", "m4", "m8", "Andy", "Lee", "Michael", "ed", "pablo")),
)
"""Plain and with thirty of its hundred variants, unlike each other; `espeak.variants` says what was left out."""
KOKORO_VOICES = tuple(
    f"{kind}_{name}"
    for kind, names in (
        ("af", ("alloy", "aoede", "bella", "heart", "jessica", "kore", "nova", "river", "sarah", "sky")),
        ("am", ("adam", "echo", "eric", "fenrir", "liam", "michael", "onyx", "santa")),
        ("bf", ("alice", "emma", "isabella", "lily")),
        ("bm", ("daniel", "fable", "george", "lewis")),
    )
    for name in names
)
"""All English voices of Kokoro-82M but the two that evaluate."""
EVALUATION_VOICES = {"espeak": ("en-us+m3", "en-gb+f4"), "kokoro": ("af_nicole", "am_puck")}


class SynthesizeConfig(Section):
    synthesizer: Literal["espeak", "kokoro"] = "espeak"
    path: HubPath | None = None
    """Weights of Kokoro, a hub id or a folder; unset: hexgrad/Kokoro-82M."""
    revision: str | None = None
    voices: tuple[str, ...] = Field(ESPEAK_VOICES, min_length=1)
    """Voices of training speech, drawn per passage; of Kokoro all English ones but the two below."""
    evaluation_voices: tuple[str, ...] = Field(EVALUATION_VOICES["espeak"], min_length=1)
    """Voices of held-out speech, never used for training speech; of Kokoro af_nicole and am_puck."""
    audio_format: Literal["FLAC", "OPUS"] = "FLAC"
    batch_size: int = operational(32, ge=1)
    """Passages that are spoken at once: the unit of resume within a shard."""
    gates: SpeechGates = SpeechGates()
    recogniser: HubPath | None = None
    """CTC model (hub id or folder) that listens to every passage; unset: none does."""
    recogniser_revision: str | None = None
    max_word_error_rate: float = Field(0.3, gt=0)
    """Of the recogniser's transcript against the text; more is rejected."""
    num_gpus: float = operational(0.0, ge=0)
    """GPUs of each synthesizing actor."""

    @model_validator(mode="before")
    @classmethod
    def _own_voices(cls, given: Any) -> Any:
        """Kokoro's voices where it speaks and none are named."""
        if not isinstance(given, dict):
            return given
        is_kokoro = given.get("synthesizer") == "kokoro"
        own = {"voices": KOKORO_VOICES, "evaluation_voices": EVALUATION_VOICES["kokoro"]} if is_kokoro else {}
        return own | _with_tuples(given)

    def problems(self) -> Iterator[str]:
        strangers = [voice for voice in (*self.voices, *self.evaluation_voices) if not re.match("[a-z]{2}_", voice)]
        if self.synthesizer == "kokoro" and strangers:
            yield (
                f"synthesize.voices and evaluation_voices: '{strangers[0]}' is no voice of Kokoro's, whose names are "
                "like af_heart and bm_george"
            )
        shared = sorted(set(self.voices) & set(self.evaluation_voices))
        if shared:
            yield (
                f"synthesize.voices and synthesize.evaluation_voices share {', '.join(shared)}; "
                "a voice heard in training cannot be used for evaluation, so take it out of one of them"
            )


Effect = Literal["noise", "reverberation", "speed", "codec", "telephone"]


class AugmentConfig(Section):
    """Changes to training speech before it is encoded, one draw per utterance; measured speech is left as it is."""

    share: float = Field(0.0, ge=0, le=1)
    """Share of the training utterances that are changed; 0 switches augmentation off."""
    effects: tuple[Effect, ...] = typing.get_args(Effect)
    num_effects: CountRange = (1, 2)
    """Fewest and most different effects of a changed utterance."""
    snr_db: Range = (5.0, 30.0)
    """Level of the speech above the noise."""
    reverberation_secs: PositiveRange = (0.1, 0.6)
    """Time in which the room's echo falls by 60 dB."""
    speed: PositiveRange = (0.9, 1.1)
    """Factors of tempo and pitch together, as of a tape."""

    def problems(self) -> Iterator[str]:
        if not self.effects or self.num_effects[1] > len(set(self.effects)):
            yield (
                f"encode.augment.num_effects={list(self.num_effects)} asks for more than the "
                f"{len(set(self.effects))} effects named in encode.augment.effects"
            )


class EncodeConfig(Section):
    encoder: Literal["log_mel", "mimi"] = "log_mel"
    backend: Literal["transformers", "moshi"] = "transformers"
    """Whose code runs Mimi; moshi's is installed by `make moshi`."""
    path: HubPath | None = None
    """Weights of Mimi, a hub id or folder; for moshi a .safetensors file, a folder with one, or a hub id such as
    kyutai/moshiko-pytorch-bf16."""
    revision: str | None = None
    storage: Literal["float16", "int8"] = "float16"
    """Type of the stored features; int8 has one scale per channel and utterance, and takes half the space."""
    augment: AugmentConfig = AugmentConfig()
    batch_secs: float = operational(240.0, gt=0)
    """Audio per encoder batch, padding included."""
    num_threads: int = operational(1, ge=1)
    """Threads of each actor that decode and resample ahead of the encoder; so many CPUs are reserved for it."""
    num_gpus: float = operational(0.0, ge=0)
    """GPUs of each encoding actor."""

    def problems(self) -> Iterator[str]:
        if self.encoder == "mimi" and self.path is None:
            yield "encode.encoder=mimi needs encode.path, for example kyutai/mimi"


class EmbedConfig(Section):
    embedder: Literal["tfidf", "sentence_transformers"] = "tfidf"
    """`tfidf` is TF-IDF and truncated SVD, fitted on a sample of the passages; nothing to download."""
    path: HubPath | None = None
    """Hub id or folder of a sentence-transformers model, such as sentence-transformers/all-MiniLM-L6-v2."""
    revision: str | None = None
    dim: int = Field(64, ge=2)
    """Of the SVD."""
    sample_passages: int = Field(20_000, ge=1)
    """Passages that TF-IDF and SVD are fitted on."""
    batch_size: int = operational(64, ge=1)
    num_gpus: float = operational(0.0, ge=0)
    """GPUs of each embedding actor."""

    def problems(self) -> Iterator[str]:
        if self.embedder == "sentence_transformers" and self.path is None:
            yield (
                "embed.embedder=sentence_transformers needs embed.path, for example "
                "sentence-transformers/all-MiniLM-L6-v2"
            )


class ClusterConfig(Section):
    num_clusters: int = Field(128, ge=1)
    """K of balanced k-means."""
    sample_passages: int = Field(1_000_000, ge=1)
    """Most passages that centroids and prices are fitted on."""
    num_iterations: int = Field(20, ge=1)
    cards_passages: int = operational(100_000, ge=1)
    """Most passages that the clusters' cards are written from."""
    num_gpus: float = operational(0.0, ge=0)
    """GPUs for fitting."""


Protocol = Literal["interleaved", "whole"]
PROTOCOLS: tuple[Protocol, ...] = ("interleaved", "whole")


class ProbeConfig(Section):
    passages_per_cluster: int = Field(32, ge=2)
    """Synthesised once from every cluster, to measure M(c); never selected."""
    protocol: Protocol = "interleaved"
    """How the probe is heard for M(c); both are measured (`measure`)."""
    min_reliability: float = Field(0.8, ge=0, lt=1)
    """Share of the variance between the M(c) that is not noise; below it the probe is called too small."""


class SelectConfig(Section):
    gamma: float = Field(5.0, ge=0)
    """P_target ∝ P_web · M^γ; 0 draws uniformly over passages."""
    budget_hours: float | None = Field(None, gt=0)
    """Synthetic speech to make; give either this or budget_percent."""
    budget_percent: float | None = Field(None, gt=0)
    """Likewise, in percent of the natural training speech; 1 (the paper's) if neither is given."""
    shrink: bool = False
    """Draw noisy M(c) towards their mean (empirical Bayes) before they are raised to γ."""

    def problems(self) -> Iterator[str]:
        given = {"budget_hours": self.budget_hours, "budget_percent": self.budget_percent}
        yield from _both_given("select", "how much to synthesise", **given)


class PackConfig(Section):
    context: int = Field(2048, ge=16)
    """Positions (text tokens and speech frames) of a training row."""
    text_words: CountRange = (5, 30)
    """Shortest and longest text span, in words (uniform; ours, the paper does not say)."""
    speech_words: CountRange = (5, 15)
    """Shortest and longest speech span, in words (ours)."""
    whole_share: float = Field(0.0, ge=0, le=1)
    """Share of the samples in which everything but a last text span (1 word to the longest of `text_words`) is speech
    (ours; 0 is the paper's). A question that is only heard looks like them."""
    num_lanes: int = Field(8, ge=1)
    """Streams of rows; at most so many training workers, and best a number that divides it."""
    rows_per_lane: int = Field(1, ge=1)
    """Rows that each lane gives to one step; the global batch is num_lanes × rows_per_lane rows."""
    text_share: float = Field(0.0, ge=0, lt=1)
    """Share of Stage I's samples that are text alone (ingest.text, world.num_text), against forgetting; the paper has
    a third."""


class TinyLMConfig(Section):
    """The small Qwen2 that is trained on the world's text when model.teacher=world."""

    hidden_size: int = Field(160, ge=2)
    num_layers: int = Field(2, ge=1)
    num_heads: int = Field(5, ge=1)
    ffn_size: int = Field(448, ge=1)
    num_steps: int = Field(1000, ge=1)
    batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(3e-3, gt=0)

    def problems(self) -> Iterator[str]:
        yield from _uneven_heads("model.tiny_lm", self.hidden_size, self.num_heads)


class AdapterConfig(Section):
    """Llama-style causal decoder between encoder and LLM. The defaults have 122 M parameters at 3B and 7B."""

    hidden_size: int = Field(1024, ge=2)
    num_layers: int = Field(12, ge=1)
    num_heads: int = Field(16, ge=1)
    num_kv_heads: int | None = Field(None, ge=1)
    """Heads of keys and values, which others share; unset: as many as `num_heads`."""
    ffn_size: int = Field(1856, ge=1)
    stride: int = Field(1, ge=1)
    """Frames side by side at one position (ours; 1 is the paper's): 2 makes Mimi's 12.5 Hz 6.25 Hz. They are counted
    from the start of a speech span."""

    def problems(self) -> Iterator[str]:
        yield from _uneven_heads("model.adapter", self.hidden_size, self.num_heads)
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            yield f"model.adapter.num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"


def _resolved_teacher(name: str, info: ValidationInfo) -> str:
    """A folder that happens to be called `world` is `./world`."""
    return name if name == "world" else _resolved_if_there(name, info)


class ModelConfig(Section):
    teacher: Annotated[str, AfterValidator(_resolved_teacher)] = "world"
    """Text LLM: a hub id, a folder, or `world` (the tiny LM trained on the embedded corpus)."""
    revision: str | None = None
    attention: Literal["sdpa", "eager", "flash_attention_2", "varlen"] = operational("sdpa")
    """`varlen` computes nothing between the samples of a row: on GPUs in 16 bit by the flash kernel inside torch,
    elsewhere sample by sample. `sdpa` computes whole rows and masks them."""
    adapter: AdapterConfig = AdapterConfig()
    tiny_lm: TinyLMConfig = TinyLMConfig()


class DistillConfig(Section):
    alpha: float = Field(1.0, ge=0, le=1)
    """L = α · L_DIST + (1 − α) · L_NLL."""
    word_ends: bool = False
    """Compare the student with its teacher at the end of every word inside a speech span, too (ours; without, the
    objective is the paper's): one label a word instead of one a span. Needs word times."""
    word_ends_weight: float = Field(1.0, gt=0)
    """Of the KL at a word's end, against 1 of a text token's loss."""
    num_steps: int | None = Field(None, ge=1)
    """Optimizer steps; give either this or num_positions."""
    num_positions: float | None = Field(None, gt=0)
    """Non-padding student positions to train on (D of the scaling law)."""
    learning_rate: float = Field(5e-5, gt=0)
    """Peak learning rate of the LLM."""
    adapter_learning_rate: float = Field(3e-4, gt=0)
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all weights, as the paper; or Muon for the matrices of the adapter and inside the LLM's decoder layers,
    and AdamW for the rest (ours)."""
    muon_learning_rate: float = Field(0.007, gt=0)
    """Peak learning rate of the matrices in the LLM's layers under Muon: the spectral norm of an update, about."""
    adapter_muon_learning_rate: float = Field(0.02, gt=0)
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Nesterov's."""
    muon_weight_decay: float = Field(0.01, ge=0)
    """Of these matrices, times their learning rate; `weight_decay` is AdamW's."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.1, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    warmup_steps: int = Field(100, ge=0)
    """Steps in which the learning rate climbs to its peak. In steps and not as a share: longer training begins alike,
    so that it can share what shorter training has done."""
    decay_share: float = Field(0.2, gt=0, le=1)
    """Share of the steps, at the end, in which it falls linearly to zero."""
    num_workers: int | tuple[int, int] = operational(1)
    """Training workers; [least, most] lets their number follow the cluster, at the price of a resume at each change."""
    micro_batch_rows: int = operational(1, ge=1)
    """Rows of one forward pass; accumulation follows from it, the lanes and the workers."""
    zero_stage: Literal[1, 2, 3] = operational(2)
    precision: Literal["fp32", "bf16"] = "bf16"
    use_gpu: bool = operational(True)
    """Train on GPUs (one a worker), or on CPUs over gloo."""
    cpus_per_worker: int = operational(1, ge=0)
    """CPUs that Ray has to have free for each worker; 0 where the nodes meant for training offer none."""
    extra_resources: dict[str, float] = operational({})
    """Of each worker, such as {training: 1}: resources that only the nodes meant for training have."""
    activation_checkpointing: bool = operational(False)
    compile: bool = operational(False)
    """Run the decoder layers of student and teacher through torch.compile, which needs a C compiler. With ZeRO-3 some
    of them stay as they are, as its hooks are compiled anew too often."""
    loss_chunk_size: int | None = operational(None, ge=1)
    """Positions whose logits exist at once; unset: a sixteenth."""
    checkpoint_every: int = operational(500, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = operational(2, ge=1)
    max_failures: int = operational(3, ge=0)
    """Worker-group failures that Ray Train may recover from; machines that are taken away with notice do not count."""
    log_every: int = operational(10, ge=1)
    wandb_project: str | None = operational(None)
    mlflow_experiment: str | None = operational(None)

    @property
    def least_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    def problems(self) -> Iterator[str]:
        if not 1 <= self.least_workers <= self.most_workers:
            yield f"distill.num_workers={self.num_workers} must be at least 1, or [least, most]"
        yield from _both_given("distill", "when to stop", num_steps=self.num_steps, num_positions=self.num_positions)


class SharesConfig(Section):
    """Shares of Stage II's samples; together 1."""

    natural: float = Field(gt=0, lt=1)
    active: float = Field(gt=0, lt=1)
    text: float = Field(0.0, ge=0, lt=1)
    """Text alone."""

    def problems(self) -> Iterator[str]:
        total = self.natural + self.active + self.text
        if abs(total - 1) > SHARES_TOLERANCE:
            yield (
                f"stage2.shares: natural={self.natural:g}, active={self.active:g} and text={self.text:g} make "
                f"{total:g}, and must make 1"
            )


class Stage2Config(Section):
    """Stage II: natural and active speech mixed, from Stage I's weights and optimizer before its decay. What is not
    said here is as in `distill`."""

    alpha: float = Field(1.0, ge=0, le=1)
    num_steps: int | None = Field(None, ge=1)
    """Optimizer steps; give either this or num_positions."""
    num_positions: float | None = Field(None, gt=0)
    """Non-padding student positions; if neither is set, 8 % of Stage I's steps, the paper's 1.9 B of 24 B."""
    shares: SharesConfig | None = None
    """Shares of the samples, such as {natural: 0.4, active: 0.4, text: 0.2}; unset: the paper's third of each, or
    half natural and half active where there is no text (ingest.text, world.num_text). The control has the same share of
    text, and the rest is natural speech."""
    decay_share: float = Field(0.5, ge=0, le=1)
    """Share of the steps, at the end, in which the rate falls linearly to zero; the rest keeps the peak."""
    control: bool = operational(False)
    """Also train a control: Stage I continued without active speech for as many steps."""

    @model_validator(mode="before")
    @classmethod
    def _no_weight(cls, data: Any) -> Any:
        if isinstance(data, dict) and "active_weight" in data:
            raise ValueError(
                "stage2.active_weight is gone; say the shares of Stage II's samples instead, such as "
                "stage2.shares: {natural: 0.4, active: 0.4, text: 0.2}"
            )
        return data

    def problems(self) -> Iterator[str]:
        yield from _both_given("stage2", "when to stop", num_steps=self.num_steps, num_positions=self.num_positions)


class MeasureConfig(Section):
    """F and M by two protocols (evaluation/protocols.py) that do not depend on training: `interleaved`, spans of text
    and of speech by turns, and `whole`, all but the last few words spoken."""

    batch_rows: int = operational(8, ge=1)
    text_words: CountRange = (10, 30)
    """Shortest and longest text span of `interleaved`, in words (the paper's)."""
    speech_words: CountRange = (5, 15)
    """Shortest and longest speech span of `interleaved`, in words (the paper's)."""
    whole_tail_words: int = Field(4, ge=1)
    """Words at the end of a passage that `whole` leaves as text, and scores."""
    passage_secs: float = Field(60.0, gt=0)
    """Neighbouring recorded utterances are joined to passages of at most so many seconds."""
    distance_bins: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Bin edges, in text tokens after the last speech frame."""
    num_gpus: float = operational(0.0, ge=0)


class BenchmarkConfig(Section):
    """One benchmark, in its original format."""

    name: Literal[
        "storycloze", "openbookqa", "hellaswag", "arc_challenge", "piqa", "mmlu_spoken", "voicebench_mmsu",
        "openbookqa_letters", "arc_challenge_letters", "mmlu_spoken_letters", "voicebench_mmsu_letters",
    ]  # fmt: skip
    """With `_letters` the options are spoken too and their letters scored; without, the choices' texts are."""
    path: HubPath
    """A file (jsonl, csv, parquet), a URL, or a hub id of a data set."""
    revision: str | None = None
    """Of a hub id."""
    exemplars: HubPath | None = None
    """File that the exemplars are taken from, such as the training split; unset: other items of the same file."""
    max_items: int | None = Field(None, ge=1)
    """Most items, the first by the hash of their id; unset: all."""


Condition = Literal["clean", "voice", "noise", "speed", "codec", "telephone"]
Floor = Literal["silence", "choices", "swapped"]
FLOORS: tuple[Floor, ...] = typing.get_args(Floor)


class EvaluateConfig(Section):
    benchmarks: tuple[BenchmarkConfig, ...] = ()
    """Without any, the world's own questions are asked, where the text LM is the world's."""
    num_shots: int = Field(5, ge=0)
    """Exemplars in front of every item."""
    exemplars: Literal["text", "spoken"] = "text"
    """How a system that hears an item is given its exemplars: to read; or to hear, answers apart, as it hears the item.
    Exemplars to hear are other items that are asked, since their speech is there. The cascade and the text LLM read."""
    conditions: tuple[Condition, ...] = ("clean",)
    """How the items are heard: as spoken, in another evaluation voice, with noise 10 dB below the speech, a fifth
    faster, through a lossy codec, over a telephone line (8 kHz)."""
    floors: tuple[Floor, ...] = FLOORS
    """What a system scores without the question: hearing silence of the same length, without any prompt (the choices
    alone), and, as a check, hearing another item. The first and the last each cost as much as a condition."""
    cascade: Literal["none", "pocketsphinx", "ctc", "whisper"] = "none"
    """The recogniser of the cascade, whose transcript the text LM reads."""
    recogniser: HubPath | None = None
    """Weights of the cascade's recogniser: hub id or folder, such as openai/whisper-large-v3."""
    recogniser_revision: str | None = None
    batch_positions: int = operational(8192, ge=1)
    """Positions that are scored at once, padding included."""
    num_gpus: float = operational(0.0, ge=0)
    """GPUs of each scoring actor."""

    @property
    def has_pool(self) -> bool:
        """Whether exemplars are taken from more than the items that are asked."""
        return self.exemplars == "text" and any(
            benchmark.exemplars or benchmark.max_items for benchmark in self.benchmarks
        )

    def problems(self) -> Iterator[str]:
        names = [benchmark.name for benchmark in self.benchmarks]
        if len(set(names)) < len(names):
            yield "evaluate.benchmarks names a benchmark twice; each has one file"
        if self.exemplars == "spoken" and (named := [each.name for each in self.benchmarks if each.exemplars]):
            yield (
                f"evaluate.exemplars=spoken hears items that are asked, so the exemplars of {named[0]} would not be "
                "read; remove the file, or set evaluate.exemplars=text"
            )
        if "clean" not in self.conditions or len(set(self.conditions)) < len(self.conditions):
            yield "evaluate.conditions must hold 'clean', and each condition once"
        if len(set(self.floors)) < len(self.floors):
            yield "evaluate.floors must hold each floor once"
        if self.cascade in ("ctc", "whisper") and self.recogniser is None:
            example = "openai/whisper-large-v3" if self.cascade == "whisper" else "facebook/wav2vec2-base-960h"
            yield f"evaluate.cascade={self.cascade} needs evaluate.recogniser, for example {example}"


class SweepConfig(Section):
    """Many trainings that share what they can: a grid over keys of the config, and perhaps training budgets."""

    grid: dict[str, tuple[Any, ...]] = Field(min_length=1)
    """Key → values, such as {distill.alpha: [0, 0.5, 1]}; all combinations are trained."""
    num_steps: tuple[PositiveInt, ...] = ()
    """Budgets of Stage I, in steps: those of one combination share a trunk at constant rate, from which a short decay
    branches off at each. Without budgets every combination is a run of its own, up to Stage II if there is one."""
    num_positions: tuple[PositiveFloat, ...] = ()
    """The same, in positions (D of the scaling law); give either this or num_steps."""
    seeds: tuple[int, ...] = Field((), max_length=100)
    """Seeds of all combinations; unset: the config's own. Intervals then come from several trainings a point."""
    evaluate: bool = False
    """Ask every run the benchmarks, too."""
    max_concurrent: int | None = Field(None, ge=1)
    """Trainings at a time; unset: what the cluster has room for."""
    max_failures: int = Field(1, ge=0)
    """Times that a training which failed is tried again."""

    @property
    def budgets(self) -> tuple[float, ...]:
        return tuple(sorted(set(self.num_steps or self.num_positions)))

    def problems(self) -> Iterator[str]:
        if self.num_steps and self.num_positions:
            yield "a sweep's num_steps and num_positions both give its budgets; give one of them"
        for key, values in self.grid.items():
            if not values:
                yield f"a sweep's grid names '{key}' without values"
            if len({json.dumps(value) for value in values}) < len(values):
                yield f"a sweep's grid names a value of '{key}' twice"
        fixed = ("run_dir", "seed", "set", "strict")
        kept = [key for key in self.grid if key in fixed or key.startswith(("sweeps", "ray."))]
        if kept:
            yield f"a sweep's grid cannot vary '{kept[0]}'" + "; name seeds" * (kept[0] == "seed")
        later = ("stage2", "select.", "probe.", "cluster.", "embed.", "distill.num_steps", "distill.num_positions")
        idle = [key for key in self.grid if self.budgets and key.startswith(later)]
        if idle:
            yield f"a sweep's budgets are Stage I's, which '{idle[0]}' does not change; leave one of them out"


class Config(Section):
    run_dir: LocalPath = ""
    """Where all tables go: a local path or a URL; if unset, `runs/X` for `configs/X.yaml`. Configs that share it share
    the tables that they would make alike."""
    seed: int = 0
    strict: bool = False
    """Stop at the first bad input, with the words that `rejects` would have."""
    set: SetName = "natural"
    """The set a single stage works on (`salad encode CONFIG set=heldout`)."""
    ray: RayConfig = RayConfig()
    world: WorldConfig = WorldConfig()
    ingest: IngestConfig = IngestConfig()
    align: AlignConfig = AlignConfig()
    synthesize: SynthesizeConfig = SynthesizeConfig()
    encode: EncodeConfig = EncodeConfig()
    embed: EmbedConfig = EmbedConfig()
    cluster: ClusterConfig = ClusterConfig()
    probe: ProbeConfig = ProbeConfig()
    select: SelectConfig = SelectConfig()
    pack: PackConfig = PackConfig()
    model: ModelConfig = ModelConfig()
    distill: DistillConfig = DistillConfig()
    stage2: Stage2Config | None = None
    """Without it the run ends with Stage I; `{}` takes the defaults."""
    measure: MeasureConfig = MeasureConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    sweeps: dict[str, SweepConfig] = {}
    """Name → sweep, for `salad sweep`."""

    @property
    def has_web(self) -> bool:
        """Whether there is web text: a configured corpus, or the embedded world's."""
        return bool(self.ingest.web) or not self.ingest.corpora

    @property
    def has_text(self) -> bool:
        """Whether there is text to train on alone: configured corpora, or the embedded world's."""
        in_world = not self.ingest.corpora and not self.ingest.web
        return bool(self.ingest.text) or (in_world and self.world.num_text > 0)

    @property
    def stage1_shares(self) -> dict[str, float]:
        """Share of each set in the samples of Stage I."""
        return _without_zeros({NATURAL: 1 - self.pack.text_share, TEXT: self.pack.text_share})

    @property
    def stage2_shares(self) -> dict[str, float]:
        """Share of each set in the samples of Stage II."""
        assert self.stage2 is not None
        shares = self.stage2.shares
        if shares is not None:
            return _without_zeros(shares.model_dump())
        names = (NATURAL, ACTIVE, TEXT) if self.has_text else (NATURAL, ACTIVE)
        return dict.fromkeys(names, 1 / len(names))

    @property
    def trained_sets(self) -> frozenset[str]:
        """The sets that training takes its samples from."""
        return frozenset(self.stage1_shares) | frozenset(self.stage2_shares if self.stage2 is not None else ())

    @property
    def measured_sets(self) -> tuple[SetName, ...]:
        """The sets whose `split=test` passages are measured, the main one first: broad web text that is spoken, as in
        the paper; and recordings, which are held out of their own set."""
        spoken: tuple[SetName, ...] = ("heldout",) if self.has_web else ()
        return spoken + (("natural",) if self.ingest.corpora else ())

    @property
    def has_benchmark(self) -> bool:
        """Whether there are questions to ask: configured benchmarks, or the embedded world's."""
        return bool(self.evaluate.benchmarks) or (self.model.teacher == "world" and self.world.num_questions > 0)

    @property
    def max_words(self) -> int:
        """Words of the longest passage."""
        return self.ingest.passages.max_words or max(self.pack.context // POSITIONS_PER_WORD, 2)

    def problems(self) -> Iterator[str]:
        odd = [name for name in self.sweeps if not re.fullmatch(r"[\w-]+", name)]
        if odd:
            yield f"sweeps.{odd[0]}: a sweep's name is a folder's; use letters, digits, - and _"
        if (self.ingest.corpora or self.ingest.web) and self.ingest.heldout_share == 0:
            yield "ingest.heldout_share=0 leaves nothing to measure on; 0.01 is enough for a large corpus"
        if self.has_web and self.ingest.passages.min_words > self.max_words:
            yield (
                f"no passage can have ingest.passages.min_words={self.ingest.passages.min_words} words or more and, as "
                f"pack.context={self.pack.context} or ingest.passages.max_words has it, {self.max_words} or fewer"
            )
        # All values of encode.encoder are causal. One that is not must be refused with distill.word_ends here: its
        # frames would have heard the word that they are to predict.
        if self.cluster.sample_passages < self.cluster.num_clusters:
            yield (
                f"cluster.sample_passages={self.cluster.sample_passages} are fewer than "
                f"cluster.num_clusters={self.cluster.num_clusters}; raise the former"
            )
        if "voice" in self.evaluate.conditions and len(self.synthesize.evaluation_voices) < 2:
            yield "evaluate.conditions: 'voice' needs two voices in synthesize.evaluation_voices"
        if TEXT in self.trained_sets and not self.has_text:
            key = f"pack.text_share={self.pack.text_share:g}" if self.pack.text_share else "stage2.shares.text"
            remedy = "name some in ingest.text"
            if not self.ingest.corpora and not self.ingest.web:
                remedy += ", or set world.num_text to the number of the embedded world's documents to take"
            yield (
                f"{key} asks for samples of text alone, and there is no text for them; {remedy}, or let the share be 0"
            )
        if self.stage2 is not None and not self.has_web:
            yield "stage2 needs web text to select from; name some in ingest.web"
        workers = self.distill.num_workers
        if self.distill.most_workers > self.pack.num_lanes:
            yield (
                f"distill.num_workers={self.distill.most_workers} is more than pack.num_lanes={self.pack.num_lanes}, "
                "and every worker needs a lane; change one of them"
            )
        if isinstance(workers, int) and self.pack.num_lanes % workers:
            yield (
                f"distill.num_workers={workers} must divide pack.num_lanes={self.pack.num_lanes}; change one of them"
            )
        rows = self.pack.num_lanes // self.distill.most_workers * self.pack.rows_per_lane
        if isinstance(workers, int) and rows % self.distill.micro_batch_rows:
            yield (
                f"distill.micro_batch_rows={self.distill.micro_batch_rows} must divide the {rows} rows that a worker "
                "gets per step (pack.num_lanes / distill.num_workers × pack.rows_per_lane)"
            )
        if self.ingest.num_shards % self.pack.num_lanes:
            yield (
                f"ingest.num_shards={self.ingest.num_shards} must be a multiple of pack.num_lanes={self.pack.num_lanes}"
            )


def _without_zeros(shares: dict[str, float]) -> dict[str, float]:
    """The shares above 0, which together make 1."""
    return {name: share / sum(shares.values()) for name, share in shares.items() if share}


def identity(config: Config, *keys: str, without: Sequence[str] = ()) -> dict[str, Any]:
    """What of these (dotted) keys decides a stage's output: all but the operational ones and those in `without`, as
    plain data."""
    left_out = operational_keys(Config) | set(without)

    def strip(value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: strip(item, f"{path}.{name}") for name, item in value.items() if f"{path}.{name}" not in left_out}

    data = config.model_dump(mode="json")
    chosen: dict[str, Any] = {}
    for key in keys:
        value: Any = data
        for part in key.split("."):
            value = value[part]
        chosen[key] = strip(value, key)
    return chosen


@lru_cache
def operational_keys(section: type[BaseModel]) -> frozenset[str]:
    """Dotted keys of a section that are marked `operational`."""
    marks = {key: field.json_schema_extra for key, field in all_fields(section)}
    return frozenset(key for key, mark in marks.items() if isinstance(mark, dict) and OPERATIONAL in mark)


def all_keys(section: type[BaseModel]) -> list[str]:
    """Every dotted key of a section, sections themselves included."""
    return [key for key, _ in all_fields(section)]


def all_fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key of a section with its field, sections themselves included."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        part = section_of(field.annotation)
        if part is not None:
            yield from all_fields(part, f"{prefix}{name}.")


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field's type names, `Section` or `Section | None`; None for any other type."""
    kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)] or [annotation]
    return kinds[0] if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], BaseModel) else None
