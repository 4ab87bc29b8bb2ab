"""`salad …`: the command line."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NoReturn

import typer
from rich.table import Table as Grid

from salad_ray import pipeline
from salad_ray.config import Config, ConfigError, SweepConfig, all_fields, section_of
from salad_ray.configfile import dump_config, load_config
from salad_ray.console import console, say, user_error
from salad_ray.credentials import redact, refuse_secret_arguments
from salad_ray.flow import STAGES, steps
from salad_ray.names import NATURAL
from salad_ray.runs import open_places, open_run
from salad_ray.tables import write_json

app = typer.Typer(
    name="salad",
    help="SALAD on Ray: teach a text LLM to listen, and measure how far its understanding of speech lies behind text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
ConfigPath = Annotated[  # no `Path`, which would make s3://bucket s3:/bucket
    str, typer.Argument(metavar="CONFIG", help="YAML file or its URL, such as configs/quickstart.yaml.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value …]", help="Overrides, such as distill.alpha=0.5.")
]

RunDir = Annotated[str, typer.Argument(metavar="RUN_DIR", help="Folder or URL of a run.")]
RunName = Annotated[str | None, typer.Option("--run", help="One of the runs in RUN_DIR; the newest by default.")]


def load(path: str, overrides: list[str] | None) -> Config:
    """The resolved config.

    A Ray job works in a copy of the checkout that Ray deletes, and that another submission has elsewhere. There a
    relative run_dir lies at home instead, and what is read from the copy, or beside it, is refused.

    Raises:
        ConfigError: also an input of a job that only a relative path names.
    """
    config, here = load_config(path, overrides or []), Path.cwd()
    if here.parent.name != "working_dir_files":  # where Ray unpacks what `--working-dir` uploads
        return config
    moved = ""
    if Path(config.run_dir).is_relative_to(here):
        moved = str(Path.home() / Path(config.run_dir).relative_to(here))
        config = config.model_copy(update={"run_dir": moved})
    for key, value in _texts(config.model_dump(mode="json")):
        resolved = Path(value).is_relative_to(here.parents[1])
        if resolved or (
            not os.path.isabs(value) and "/" in value and os.path.exists(value)
        ):  # a sweep's stays as it is
            raise ConfigError(
                f"{path}: '{key}' is the relative path {os.path.relpath(value, here)}, which in a job leads into the "
                "copy of the checkout that Ray deletes; give an absolute path that all machines see, or a URL"
            )
    if moved:
        say(f"run_dir: {moved}, on the machine of the job's driver")
    return config


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All strings of plain data, with their dotted keys."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, str):
        yield key, value


def describe(annotation: Any, prefix: str) -> str:
    """A paragraph for each key of a section (the type of a field): name, default, meaning."""
    section, lines = section_of(annotation), []
    assert section is not None
    for key, field in all_fields(section, f"{prefix}."):
        if section_of(field.annotation) is None:
            meaning = f"  {' '.join(field.description.split())}" if field.description else ""
            default = "unset" if field.default is None else field.default
            lines.append(f"[bold]{key}[/bold]{' (required)' if field.is_required() else f'={default}'}{meaning}")
    return "\n\n".join(lines)


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Resolve and validate; show the config and stop.")] = False,
) -> None:
    """Run all stages, skipping what is done and continuing what was interrupted."""
    resolved = load(config, overrides)
    if dry_run:
        say(dump_config(resolved))
        say("stages: " + " → ".join(dict.fromkeys(step.label for step in steps(resolved))))
        return
    pipeline.run_all(resolved)


@app.command()
def status(run_dir: RunDir, name: RunName = None) -> None:
    """Show how far a run is and where its tables lie, and which other runs share the folder."""
    run = open_run(run_dir, name)
    grid = Grid("stage", "set", "table", "state", "rows", "rejects", "time", "place", title=run_dir)
    for row in pipeline.status(run):
        grid.add_row(*(row[str(column.header)] for column in grid.columns))
    console.print(grid)
    for other, difference in pipeline.other_runs(run):
        say(f"also here: run {other} ({difference}); `salad status {run_dir} --run {other}`")


@app.command()
def clean(
    run_dir: Annotated[str, typer.Argument(metavar="RUN_DIR", help="Folder or URL of runs.")],
    forget: Annotated[list[str] | None, typer.Option(metavar="RUN", help="Runs to keep no longer.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
) -> None:
    """List the tables that no kept run has, with their sizes, and delete them if you say so."""
    pipeline.clean(run_dir.rstrip("/"), forget or [], _asker(yes))


def _asker(yes: bool) -> pipeline.Ask:
    """How to ask whether to go on: never with --yes; without a terminal the answer is no."""

    def ask(question: str) -> bool:
        say(question)
        if yes:
            return True
        if not sys.stdin.isatty():
            say("there is nobody to ask here; say --yes to do it")
            return False
        return typer.confirm("Go on?")

    return ask


@app.command(epilog=describe(SweepConfig, "sweeps.NAME"))
def sweep(
    config: ConfigPath,
    overrides: Overrides = None,
    only: Annotated[str | None, typer.Option(help="Name of one of the config's sweeps; all by default.")] = None,
    redo: Annotated[bool, typer.Option("--redo", help="Delete the sweep's trainings first.")] = False,
) -> None:
    """Train over a grid of the config's keys and budgets, sharing what can be shared, and fit the misalignment law."""
    resolved = load(config, overrides)
    pipeline.run_sweeps(resolved, only, redo)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    rates: Annotated[str | None, typer.Option(help="An edited copy of rates.yaml: rates, prices, cluster.")] = None,
    measured: Annotated[
        str | None, typer.Option(metavar="RUN_DIR", help="Take the rates that this run has measured.")
    ] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure rates on this machine, in minutes.")] = False,
    show_rates: Annotated[bool, typer.Option("--show-rates", help="Print rates.yaml, to copy and edit.")] = False,
) -> None:
    """Say what a config will take, before anything runs: epochs, hours, bytes, memory, money."""
    from salad_ray.scaling.rates import RATES

    if show_rates:
        sys.stdout.write(RATES.read_text())
        return
    resolved = load(config, overrides)
    pipeline.show_plan(resolved, rates, measured, calibrate)


@app.command()
def cuts(
    run_dir: RunDir,
    target: Annotated[str, typer.Argument(metavar="OUT.jsonl.gz", help="The manifest to write.")],
    set_name: Annotated[str, typer.Option("--set", help="natural, heldout, …")] = NATURAL,
    name: RunName = None,
) -> None:
    """Write a run's utterances, with their word times, as a Lhotse cut manifest."""
    say(f"{pipeline.export_cuts(run_dir, set_name, target, name):,} cuts → {target}")


@app.command()
def compare(
    run_dirs: Annotated[
        list[str],
        typer.Argument(metavar="RUN_DIR…", help="Runs, one of several as RUN_DIR#RUN; the first is the reference."),
    ],
    out: Annotated[str, typer.Option(help="The HTML page to write.")] = "report.html",
) -> None:
    """Write one page for several runs, to look at and listen to."""
    from salad_ray.report.page import write_page

    named = (run_dir.partition("#") for run_dir in run_dirs)
    write_page([open_places(run_dir, name or None)[0] for run_dir, _, name in named], out)
    say(f"report: {out}")


@app.command()
def analyze(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="Run folders or URLs, or one CSV table of runs.")],
    out: Annotated[str | None, typer.Option(help="Also write the result as JSON.")] = None,
    metric: Annotated[str, typer.Option(help="acc or acc_norm.")] = "acc",
) -> None:
    """Say how far misalignment and forgetting explain accuracy over many runs (R², partial R²)."""
    from salad_ray.evaluation.analysis import analyse, analysis_grid, read_table, runs_table

    is_table = len(runs) == 1 and runs[0].endswith(".csv")
    analysis = analyse(read_table(runs[0]) if is_table else runs_table(runs, metric))
    console.print(analysis_grid(analysis))
    for warning in analysis.warnings:
        say(warning)
    if out is not None:
        write_json(out, asdict(analysis))


@app.command()
def export(
    run_dir: RunDir,
    target: Annotated[str, typer.Argument(metavar="FOLDER", help="Where the model goes.")],
    system: Annotated[str | None, typer.Option(help="stage1, stage2 or control; the last one by default.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; as trained by default.")] = None,
    name: RunName = None,
) -> None:
    """Write the model with its card, config and lineage to a folder that loads without Ray and DeepSpeed."""
    from salad_ray.report.export import export as write

    place = write(run_dir, target, system, dtype, name)
    say(f"exported to {place}; hear it with `salad listen {place} FILE`")


@app.command()
def listen(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Exported folder, or a run's stage2/model.")],
    file: Annotated[str, typer.Argument(metavar="FILE", help="A recording of any format.")],
    prompt: Annotated[str, typer.Option(help="Text with {speech} where the recording is heard.")] = "{speech}",
    max_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws, where temperature is above 0.")] = 0,
    encoder: Annotated[str | None, typer.Option(help="Weights of the encoder, where they lie elsewhere now.")] = None,
) -> None:
    """Write the text that follows a recording."""
    from salad_ray.model.listen import listen as follow
    from salad_ray.model.listen import load_listener
    from salad_ray.runs import followed

    speech_lm, own = load_listener(followed(model), encoder)
    for piece in follow(speech_lm, own, file, None, prompt, max_tokens, temperature, seed):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def add_stage(name: str, summary: str, sections: tuple[str, ...]) -> None:
    """Add `salad NAME CONFIG [key=value …]`; its help lists the keys of its sections."""

    def command(
        config: ConfigPath,
        overrides: Overrides = None,
        redo: Annotated[
            bool, typer.Option("--redo", help="Delete this stage's tables first, and what was made from them.")
        ] = False,
        yes: Annotated[bool, typer.Option("--yes", help="Do not ask before other runs lose tables.")] = False,
    ) -> None:
        resolved = load(config, overrides)
        pipeline.make(resolved, name, resolved.set, redo, _asker(yes))

    keys = "\n\n".join(describe(Config.model_fields[section].annotation, section) for section in sections)
    app.command(name=name, help=summary, epilog=keys)(command)


def main(in_job: bool = False) -> None:
    """Entry point: errors that a user can mend are one sentence, others leave their traceback in a file."""
    sys.excepthook = partial(_explain, in_job=in_job)
    refuse_secret_arguments(sys.argv[1:])
    typer.main.get_command(app)(prog_name="salad")  # calling `app` itself would install typer's own hook


def job(command: str) -> None:
    """Entry point of `jobs/`: `[--config C] [key=value …]`, the config defaulting to the quickstart."""
    config = "configs/quickstart.yaml"
    arguments = [part for each in sys.argv[1:] for part in _split_option(each)]
    if not command:
        _misused(f"usage: jobs/stage.py NAME [--config C] [key=value …], where NAME is one of {', '.join(STAGES)}")
    if "--config" in arguments:
        place = arguments.index("--config")
        config = "".join(arguments[place + 1 : place + 2])
        if not config or config.startswith("--"):
            _misused("salad: --config stands without the path or URL of a config, such as configs/quickstart.yaml")
        del arguments[place : place + 2]
    sys.argv[1:] = [command] if command == "--help" else [command, config, *arguments]
    main(in_job=True)


def _split_option(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def _misused(sentence: str) -> NoReturn:
    sys.stderr.write(f"{sentence}\n")
    sys.exit(2)


def _explain(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None, in_job: bool = False
) -> None:
    cause = user_error(error)
    if cause is not None:
        sys.stderr.write(redact(f"salad: {cause}\n"))
        return
    if isinstance(error, KeyboardInterrupt):
        sys.stderr.write("salad: interrupted; run the same command again to continue\n")
        return
    story = redact("".join(traceback.format_exception(kind, error, trace)))
    if in_job:  # the file below goes with the head's pod; the job's log stays
        sys.stderr.write(story)
    with tempfile.NamedTemporaryFile("w", prefix="salad-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.write(story)
    last = str(error).strip().splitlines()[-1:] or [""]
    sys.stderr.write(redact(f"salad: {kind.__name__}: {last[0]}\nsalad: the whole story is in {file.name}\n"))


for _name, _about in STAGES.items():
    add_stage(_name, _about.summary, _about.sections)

if __name__ == "__main__":
    main()
