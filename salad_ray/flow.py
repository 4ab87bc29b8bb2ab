"""Every stage, declared once: what it is for, which tables it reads and writes, in which order a run takes them.

The order of `salad run`, what `salad STAGE` makes beforehand, `--help`, `status`, `--redo`, the planner and the sweeps
all follow from here. A table is named "set/table", or by its name alone where it is the whole run's.
"""

from __future__ import annotations

from dataclasses import dataclass

from salad_ray.config import Config


@dataclass(frozen=True)
class About:
    """What `salad STAGE --help` says: a sentence, and the sections of the config whose keys the stage reads."""

    summary: str
    sections: tuple[str, ...] = ()


STAGES = {
    "ingest": About("Read recordings or text, check them, and write utterances or passages.", ("ingest", "world")),
    "embed": About("Embed the passages of the web text.", ("embed",)),
    "cluster": About("Cluster the embeddings by balanced k-means, and say what each cluster is about.", ("cluster",)),
    "probe": About("Draw a few passages of every cluster, to measure what the model makes of them.", ("probe",)),
    "select": About("Draw passages for synthesis where the model misunderstands: P_web · M^γ.", ("select",)),
    "teacher": About("Verify and pin the text LLM; for the embedded world, train it.", ("model",)),
    "align": About("Give recorded utterances word times.", ("align",)),
    "synthesize": About("Speak passages, with word times.", ("synthesize",)),
    "encode": About("Turn speech into the encoder's features.", ("encode",)),
    "pack": About("Draw interleavings and pack them into training rows.", ("pack",)),
    "stage1": About("Distil the text LLM into the speech-adapted one.", ("distill", "model")),
    "stage2": About("Continue before Stage I's decay, on natural and active speech.", ("stage2", "distill")),
    "measure": About("Measure forgetting, misalignment and distillation loss on held-out passages.", ("measure",)),
    "evaluate": About("Answer the benchmarks' items, read as text and heard as speech.", ("evaluate",)),
    "report": About("Print the gap tables; write report/metrics.json and report/page.html."),
}


@dataclass(frozen=True)
class Step:
    """A stage on one set ("" for stages of the whole run), and the names of the tables that it writes there."""

    stage: str
    set: str
    tables: tuple[str, ...]
    reads: tuple[str, ...] = ()
    """Tables of other steps that it cannot do without, as "set/table"."""
    reads_if_there: tuple[str, ...] = ()
    """Others that it takes into account: a run makes them before, but asking for this step alone does not. Whoever
    wants to see what Stage I makes of speech does not want Stage II to be trained first."""

    @property
    def writes(self) -> tuple[str, ...]:
        return tuple(f"{self.set}/{name}" if self.set else name for name in self.tables)


def steps(config: Config) -> list[Step]:
    """The whole flow for this config, in order."""
    is_world = config.model.teacher == "world"
    flow = []
    if config.has_web or is_world:
        flow.append(Step("ingest", "web", ("passages",)))
    flow.append(Step("teacher", "", ("teacher",), ("web/passages",) if is_world else ()))
    if config.ingest.corpora:
        flow += _recorded("natural", config.align.aligner != "none")
    else:
        flow += _spoken(Step("ingest", "natural", ("passages",)))
    if "heldout" in config.measured_sets:
        flow += _spoken(Step("ingest", "heldout", ("passages",), ("web/passages",) if config.ingest.web else ()))
    flow.append(Step("pack", "natural", ("plan",), ("teacher", "natural/features")))
    flow.append(Step("stage1", "", ("stage1",), ("teacher", "natural/features", "natural/plan")))
    second: tuple[str, ...] = ()
    if config.stage2 is not None:
        second = ("stage2", "control") if config.stage2.control else ("stage2",)
        flow += _data_engine()
        plans = ("natural/features", "natural/plan", "active/features", "active/plan")
        flow.append(Step("stage2", "", second, ("teacher", "stage1", *plans)))
    measured = tuple(f"measurements_{system}" for system in ("untrained", "stage1", *second))
    for name in config.measured_sets:
        flow.append(Step("measure", name, measured, ("teacher", f"{name}/features", "stage1"), second))
    if config.has_benchmark:
        flow += _questions(config, second)
    written = {name: step for step in flow for name in step.writes}
    shown = [name for name, step in written.items() if step.stage in ("measure", "evaluate") and step.set != "probe"]
    others = [name for name in written if name not in shown]
    flow.append(Step("report", "", ("report",), tuple(shown), tuple(others)))
    return flow


def _data_engine() -> list[Step]:
    """From web text, and what Stage I makes of a probe of it, to actively selected speech."""
    clusters = ("web/clusters", "web/centroids")
    probed = ("probe/passages", "probe/utterances", "probe/measurements_stage1")
    return [
        Step("embed", "web", ("embeddings",), ("web/passages",)),
        Step("cluster", "web", ("clusters", "centroids"), ("web/passages", "web/embeddings")),
        *_spoken(Step("probe", "probe", ("passages",), ("web/passages", *clusters))),
        Step("measure", "probe", ("measurements_stage1",), ("teacher", "probe/features", "stage1")),
        *_spoken(
            Step(
                "select",
                "active",
                ("selection", "passages"),
                ("web/passages", *clusters, *probed, "natural/features"),
            )
        ),
        Step("pack", "active", ("plan",), ("teacher", "active/features", "active/selection", "natural/plan")),
    ]


def _questions(config: Config, second: tuple[str, ...]) -> list[Step]:
    """The benchmarks' items, spoken, and what every system answers."""
    own = ("exemplars",) if config.evaluate.has_pool else ()
    asked = ["base", "stage1", *second, *(["cascade"] if config.evaluate.cascade != "none" else [])]
    read = tuple(f"benchmark/{name}" for name in ("items", *own, "utterances", "features"))
    return [
        *_spoken(Step("ingest", "benchmark", ("items", *own, "passages"))),
        Step("evaluate", "benchmark", tuple(f"scores_{name}" for name in asked), ("teacher", *read, "stage1"), second),
    ]


def _spoken(writer: Step) -> list[Step]:
    """What writes passages, and the stages that speak and encode them."""
    name = writer.set
    return [
        writer,
        Step("synthesize", name, ("utterances",), (f"{name}/passages",)),
        Step("encode", name, ("features",), (f"{name}/utterances",)),
    ]


def _recorded(name: str, aligned: bool) -> list[Step]:
    align = [Step("align", name, ("aligned",), (f"{name}/utterances",))] if aligned else []
    heard = f"{name}/aligned" if aligned else f"{name}/utterances"
    return [Step("ingest", name, ("catalog", "utterances")), *align, Step("encode", name, ("features",), (heard,))]


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
        chosen = [step for step in flow if step.set != "probe" or stage != "measure"]
    return chosen


def with_needs(config: Config, wanted: list[Step]) -> list[Step]:
    """These steps and all that make what they read, in the order of the run."""
    flow = steps(config)
    writers = {name: step for step in flow for name in step.writes}
    needed, ahead = set(wanted), list(wanted)
    while ahead:
        found = {writers[name] for name in ahead.pop().reads} - needed
        needed |= found
        ahead += found
    return [step for step in flow if step in needed]
