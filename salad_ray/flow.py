"""Every stage, declared once: what it is for, what it reads and writes, and which keys of the config decide its output.

The order of `salad run`, the places of all tables, what `salad STAGE` makes beforehand, `--help`, `status`, `--redo`,
`clean`, the planner and the sweeps all follow from here. A table is named "set/table", or by its name alone where it
is the whole run's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from salad_ray.config import Config
from salad_ray.tables import table_label

from salad_ray.names import (  # isort: skip
    ACTIVE, ALIGN, ALIGNED, BASE, BENCHMARK, CASCADE, CATALOG, CENTROIDS, CLUSTER, CLUSTERS, CONTROL, EMBED,
    EMBEDDINGS, ENCODE, EVALUATE, EXEMPLARS, FEATURES, HELDOUT, INGEST, ITEMS, MEASURE, NATURAL, PACK, PASSAGES,
    PLAN, PROBE, REPORT, SELECT, SELECTION, STAGE1, STAGE2, SYNTHESIZE, TEACHER, TEXT, TRUNK, UNTRAINED,
    UTTERANCES, WEB, measurements_of, scores_of,
)  # fmt: skip


@dataclass(frozen=True)
class About:
    """What `salad STAGE --help` says: a sentence, and the sections of the config whose keys the stage reads."""

    summary: str
    sections: tuple[str, ...] = ()


STAGES = {
    INGEST: About("Read recordings or text, check them, and write utterances or passages.", ("ingest", "world")),
    EMBED: About("Embed the passages of the web text.", ("embed",)),
    CLUSTER: About("Cluster the embeddings by balanced k-means, and say what each cluster is about.", ("cluster",)),
    PROBE: About("Draw a few passages of every cluster, to measure what the model makes of them.", ("probe",)),
    SELECT: About("Draw passages for synthesis where the model misunderstands: P_web · M^γ.", ("select", "probe")),
    TEACHER: About("Verify and pin the text LLM; for the embedded world, train it.", ("model",)),
    ALIGN: About("Give recorded utterances word times.", ("align",)),
    SYNTHESIZE: About("Speak passages, with word times.", ("synthesize",)),
    ENCODE: About("Turn speech into the encoder's features.", ("encode",)),
    PACK: About("Draw interleavings and pack them into training rows.", ("pack",)),
    TRUNK: About("Distil at a constant rate, with a checkpoint where each decay begins.", ("distill", "model")),
    STAGE1: About("Distil the text LLM into the speech-adapted one.", ("distill", "model")),
    STAGE2: About("Continue before Stage I's decay, on natural and active speech and text.", ("stage2", "distill")),
    MEASURE: About("Measure forgetting, misalignment and distillation loss on held-out passages.", ("measure",)),
    EVALUATE: About("Answer the benchmarks' items, read as text and heard as speech.", ("evaluate",)),
    REPORT: About("Print the gap tables; write report/metrics.json and report/page.html."),
}
TRAINED = (STAGE1, STAGE2, CONTROL)
"""The speech-adapted models of a run."""
SPEECH_SHARES = ("stage2.shares.natural", "stage2.shares.active")
"""Which only tell Stage II from its control, whose share of text is the same."""
LENGTHS = ("distill.num_steps", "distill.num_positions", "distill.decay_share")
"""Where Stage I branches off its trunk. Plan and trunk do not depend on them: a longer budget lengthens both."""


CUT = (
    *(f"ingest.passages.{name}" for name in ("max_word_pieces", "min_words", "max_words", "ngram")),
    *("ingest.num_shards", "embed.embedder", "embed.path", "embed.revision"),
)
"""How documents become passages and are dealt to shards."""


@dataclass(frozen=True)
class Step:
    """A stage on one set ("" for stages of the whole run), and the names of the tables that it writes there."""

    stage: str
    set: str
    tables: tuple[str, ...]
    reads: tuple[str, ...] = ()
    """Tables of other steps that it is made from, as "set/table"."""
    keys: tuple[str, ...] = ()
    """(Dotted) keys of the config that decide what it writes, sections whole; operational ones never do."""
    without: tuple[str, ...] = ()
    """Keys in those sections that do not."""
    version: int = 1
    """Raised when the stage's output changes though its config and inputs do not."""
    reads_if_there: tuple[str, ...] = ()
    """Tables that it takes into account. A run makes them before, but asking for this step alone does not: whoever
    wants to see what Stage I makes of speech does not want Stage II to be trained first."""
    grows: bool = False
    """Its table may be lengthened later; what was made of the shorter one stays valid."""
    by_shard: bool = False
    """Whether the stage's `work` makes it shard by shard, on all machines."""
    trains: bool = False
    """Whether the stage's `training` makes it, on the workers of a Train job. Else its `make` does, in its own way."""
    along: str = ""
    """The input whose shards it goes along with: it can make one as soon as that one is there."""
    system: str = ""
    """Which it measures, or asks."""

    @property
    def writes(self) -> tuple[str, ...]:
        return tuple(table_label(self.set, name) for name in self.tables)

    @property
    def label(self) -> str:
        return f"{self.stage} {self.set}".strip()


def steps(config: Config) -> list[Step]:
    """The whole flow for this config, in order: steps of one stage stand together where they can, and share actors."""
    flow = [*_texts(config), *_speech(config, _first_sets(config)), _teacher(config), *_stage1(config)]
    trained = [STAGE1]
    if config.stage2 is not None:
        flow += _data_engine(config)
        trained += [STAGE2, CONTROL] if config.stage2.control else [STAGE2]
    flow += [_measure(config, name, system) for name in config.measured_sets for system in (UNTRAINED, *trained)]
    if config.has_benchmark:
        flow += _evaluate(config, trained)
    asked = [step for step in flow if step.system and step.set != PROBE]
    shown = [name for step in asked if step.system not in (STAGE2, CONTROL) for name in step.writes]
    others = [name for step in flow for name in step.writes if name not in shown]
    return [*flow, Step(REPORT, "", (), tuple(shown), reads_if_there=tuple(others))]


def _first_sets(config: Config) -> list[str]:
    """Sets whose speech is made before any training."""
    spoken = [HELDOUT] if HELDOUT in config.measured_sets else []
    return [NATURAL, *spoken, *([BENCHMARK] if config.has_benchmark else [])]


def _texts(config: Config) -> list[Step]:
    """What is read first: passages to be spoken, recordings, and the benchmarks' items."""
    world = ("world.domains", "ingest.num_shards", "seed")
    found = []
    if config.has_benchmark:
        own = (EXEMPLARS,) if config.evaluate.has_pool else ()
        asked = () if config.evaluate.benchmarks else ("world.num_questions", "world.domains")
        keys = ("evaluate.benchmarks", "seed", *asked)
        found.append(Step(INGEST, BENCHMARK, (ITEMS, *own), keys=keys))
        found.append(Step(INGEST, BENCHMARK, (PASSAGES,), (f"{BENCHMARK}/{ITEMS}",)))
    if config.ingest.web:
        keys = ("ingest.web", *CUT, "ingest.heldout_share")
        found.append(Step(INGEST, WEB, (PASSAGES,), keys=keys, version=2))
    elif config.has_web or config.model.teacher == "world":
        found.append(Step(INGEST, WEB, (PASSAGES,), keys=("world.num_web", *world), by_shard=True, version=2))
    if config.ingest.corpora:
        read = (f"ingest.{name}" for name in ("corpora", "languages", "heldout_share", "split_by", "num_shards"))
        found.append(Step(INGEST, NATURAL, (CATALOG,), keys=tuple(read), version=2))
        checked = (f"{NATURAL}/{CATALOG}",)
        found.append(Step(INGEST, NATURAL, (UTTERANCES,), checked, ("ingest.quality",), by_shard=True, version=2))
    else:
        keys = ("world.num_natural", "world.unheard", *world)
        found.append(Step(INGEST, NATURAL, (PASSAGES,), keys=keys, by_shard=True, version=2))
    if HELDOUT in config.measured_sets and config.ingest.web:
        keys = ("ingest.passages.num_heldout", "seed")
        found.append(Step(INGEST, HELDOUT, (PASSAGES,), (f"{WEB}/{PASSAGES}",), keys))
    elif HELDOUT in config.measured_sets:
        keys = ("world.num_heldout", *world)
        found.append(Step(INGEST, HELDOUT, (PASSAGES,), keys=keys, by_shard=True, version=2))
    if TEXT in config.trained_sets:
        found.append(_text_alone(config, [label for step in found for label in step.writes]))
    return found


def _text_alone(config: Config, made: Collection[str]) -> Step:
    """Passages that are read in training and never heard; what the web text or held-out recordings have is left out."""
    if config.ingest.text:
        others = [f"{WEB}/{PASSAGES}"] if config.ingest.web else []
        others += [label for label in (f"{HELDOUT}/{PASSAGES}", f"{NATURAL}/{CATALOG}") if label in made]
        return Step(INGEST, TEXT, (PASSAGES,), tuple(others), ("ingest.text", *CUT), version=2)
    asked = () if config.evaluate.benchmarks else ("world.num_questions",)
    drawn = ("world.domains", "world.num_text", "world.num_web")
    keys = (*drawn, "ingest.num_shards", "seed", "ingest.passages.ngram", *asked)
    return Step(INGEST, TEXT, (PASSAGES,), keys=keys, by_shard=True)


def _teacher(config: Config) -> Step:
    if config.model.teacher == "world":
        keys = ("model.teacher", "model.tiny_lm", "seed")
        return Step(TEACHER, "", (TEACHER,), (f"{WEB}/{PASSAGES}",), keys, version=2)
    return Step(TEACHER, "", (TEACHER,), keys=("model.teacher", "model.revision"))


def _speech(config: Config, sets: Collection[str]) -> list[Step]:
    """Texts are spoken, recordings are aligned; both are encoded."""
    recorded = NATURAL in sets and bool(config.ingest.corpora)
    aligned = recorded and config.align.aligner != "none"
    spoken = [name for name in sets if not (recorded and name == NATURAL)]
    found = []
    if aligned:
        heard = f"{NATURAL}/{UTTERANCES}"
        found.append(Step(ALIGN, NATURAL, (ALIGNED,), (heard,), keys=("align",), version=2, by_shard=True, along=heard))
    for name in spoken:
        text = f"{name}/{PASSAGES}"
        keys: tuple[str, ...] = ("synthesize", "seed")
        found.append(Step(SYNTHESIZE, name, (UTTERANCES,), (text,), keys, version=2, by_shard=True, along=text))
    for name in sets:
        heard = f"{name}/{ALIGNED if aligned and name == NATURAL else UTTERANCES}"
        keys = ("encode", "seed") if config.encode.augment.share else ("encode",)
        keys = ("encode", "seed", "evaluate.conditions") if name == BENCHMARK else keys
        found.append(Step(ENCODE, name, (FEATURES,), (heard,), keys, by_shard=True, along=heard))
    return found


def _pack(name: str, *others: str) -> Step:
    pack = ("context", "text_words", "speech_words", "whole_share", "num_lanes")
    keys = (*(f"pack.{key}" for key in pack), "model.adapter.stride", "seed")
    reads = (TEACHER, f"{name}/{FEATURES}", *others)
    return Step(PACK, name, (PLAN,), reads, keys, grows=True)


def _stage1(config: Config) -> list[Step]:
    text = (f"{TEXT}/{PLAN}",) if config.pack.text_share else ()  # text of Stage II alone does not change the trunk
    read = (TEACHER, f"{NATURAL}/{FEATURES}", f"{NATURAL}/{PLAN}", *text)
    keys = ("distill", "model.adapter", "pack.rows_per_lane", "pack.text_share", "seed")
    alone = Step(PACK, TEXT, (PLAN,), (TEACHER, f"{TEXT}/{PASSAGES}"), ("pack.context", "pack.num_lanes", "seed"))
    return [
        *([alone] if TEXT in config.trained_sets else []),
        _pack(NATURAL, *text),
        Step(TRUNK, "", (TRUNK,), read, keys, LENGTHS, grows=True, trains=True),
        Step(STAGE1, "", (STAGE1,), (TRUNK, *read), LENGTHS, trains=True),
    ]


def _data_engine(config: Config) -> list[Step]:
    """From web text, and what Stage I makes of a probe of it, to actively selected speech and Stage II."""
    passages, embeddings, clusters, centroids = (
        f"{WEB}/{table}" for table in (PASSAGES, EMBEDDINGS, CLUSTERS, CENTROIDS)
    )
    probed = [f"{PROBE}/{table}" for table in (PASSAGES, UTTERANCES, measurements_of(STAGE1))]
    features, plan = f"{NATURAL}/{FEATURES}", f"{NATURAL}/{PLAN}"
    text = (f"{TEXT}/{PLAN}",) if TEXT in config.trained_sets else ()
    trunk = (TRUNK, TEACHER, features, plan, *text)
    active = (f"{ACTIVE}/{FEATURES}", f"{ACTIVE}/{PLAN}")
    keys = ("embed",) if config.embed.embedder == "sentence_transformers" else ("embed", "seed")
    found = [
        Step(EMBED, WEB, (EMBEDDINGS,), (passages,), keys, by_shard=True),
        Step(CLUSTER, WEB, (CLUSTERS, CENTROIDS), (passages, embeddings), keys=("cluster", "seed")),
        Step(PROBE, PROBE, (PASSAGES,), (passages, clusters, centroids), ("probe.passages_per_cluster",),
             by_shard=True),
        *_speech(config, [PROBE]),
        _measure(config, PROBE, STAGE1),
        Step(SELECT, ACTIVE, (SELECTION, PASSAGES), (passages, clusters, centroids, *probed, features),
             keys=("select", "probe.protocol"), version=2),
        *_speech(config, [ACTIVE]),
        _pack(ACTIVE, f"{ACTIVE}/{SELECTION}", plan, *text),
        Step(STAGE2, "", (STAGE2,), (*trunk, *active), keys=("stage2", *LENGTHS), trains=True),
    ]  # fmt: skip
    assert config.stage2 is not None
    if config.stage2.control:
        found.append(Step(STAGE2, "", (CONTROL,), trunk, keys=("stage2", *LENGTHS), without=SPEECH_SHARES, trains=True))
    return found


def _measure(config: Config, name: str, system: str) -> Step:
    keys: tuple[str, ...] = ("measure", "distill.precision", "pack.context")
    if system == UNTRAINED:
        keys += ("model.adapter", "seed")
    model = () if system == UNTRAINED else (system,)
    heard = f"{name}/{FEATURES}"
    reads, table = (TEACHER, heard, *model), measurements_of(system)
    return Step(MEASURE, name, (table,), reads, keys, version=2, by_shard=True, along=heard, system=system)


def _evaluate(config: Config, trained: Collection[str]) -> list[Step]:
    """What every system answers to the benchmarks' items: the text LLM, the trained models, the cascade."""
    pool = (f"{BENCHMARK}/{EXEMPLARS}",) if config.evaluate.has_pool else ()
    read = (TEACHER, f"{BENCHMARK}/{ITEMS}", *pool)
    keys: tuple[str, ...] = ("evaluate.num_shots", "evaluate.floors", "distill.precision", "pack.context", "seed")

    def asked(system: str, *heard: str, own: tuple[str, ...] = ()) -> Step:
        reads, table = (*read, *heard), scores_of(system)
        return Step(EVALUATE, BENCHMARK, (table,), reads, (*keys, *own), by_shard=True, system=system)

    hears = (f"{BENCHMARK}/{FEATURES}",)
    found = [asked(BASE), *(asked(system, *hears, system, own=("evaluate.exemplars",)) for system in trained)]
    if config.evaluate.cascade != "none":
        found.append(asked(CASCADE, f"{BENCHMARK}/{UTTERANCES}", own=("evaluate.conditions", "evaluate.cascade")))
    return found


def merged(flow: Iterable[Step]) -> list[Step]:
    """One step for each stage and set, with all the tables that it writes there: what a plan has a row for."""
    found: dict[tuple[str, str], Step] = {}
    for step in flow:
        before = found.get((step.stage, step.set))
        tables = step.tables if before is None else before.tables + step.tables
        found[step.stage, step.set] = replace(step, tables=tables)
    return list(found.values())


def batches(config: Config, flow: Iterable[Step]) -> list[list[Step]]:
    """Neighbouring steps that the same processes make: trainings, one after the other; shards of one stage; and, where
    none of them needs a GPU, of others: stages that go along with the shards of those before, so that one actor takes
    a shard through all of them, and stages that read nothing of those before."""
    found: list[list[Step]] = []
    for step in flow:
        last = found[-1] if found else []
        written = {label for each in last for label in each.writes}
        trained = bool(last) and last[-1].trains and step.trains
        sharded = bool(last) and last[-1].by_shard and step.by_shard
        same = sharded and last[-1].stage == step.stage
        on_cpus = sharded and not any(gpus(config, each) for each in (*last, step))
        if trained or same or (on_cpus and (step.along in written or written.isdisjoint(step.reads))):
            last.append(step)
        else:
            found.append([step])
    return found


def gpus(config: Config, step: Step) -> float:
    """GPUs of each actor of a stage."""
    return float(getattr(getattr(config, step.stage, None), "num_gpus", 0.0))


def steps_of(config: Config, stage: str, set_name: str) -> list[Step]:
    """The steps that `salad STAGE CONFIG set=…` asks for.

    Stages of the whole run have one. Where the set is left at its default, on which the stage does not work, all sets
    are meant; but the probe, which is part of Stage II, only by its name.

    Returns:
        None of them, where this config has no such step.
    """
    flow = [step for step in steps(config) if step.stage == stage]
    chosen = [step for step in flow if step.set in ("", set_name)]
    if not chosen and set_name == Config.model_fields["set"].default:
        chosen = [step for step in flow if step.set != PROBE or stage != MEASURE]
    return chosen


def with_needs(config: Config, wanted: Collection[Step], if_there: bool = False) -> list[Step]:
    """These steps and all that make what they read, in the order of the run; with `if_there` also what they take into
    account."""
    flow = steps(config)
    writers = {name: step for step in flow for name in step.writes}
    needed, ahead = set(wanted), list(wanted)
    while ahead:
        step = ahead.pop()
        reads = (*step.reads, *step.reads_if_there) if if_there else step.reads
        found = {writers[name] for name in reads if name in writers} - needed
        needed |= found
        ahead += found
    return [step for step in flow if step in needed]


def made_from(flow: Iterable[Step], tables: Collection[str]) -> list[str]:
    """These tables and all that are made from them, directly or not, in the order of the run."""
    found = list(tables)
    for step in flow:
        if set(step.reads) & set(found):
            found += [name for name in step.writes if name not in found]
    return found
