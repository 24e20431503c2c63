"""`speck`: the command line. Heavy imports happen inside the commands, so that `--help` is quick."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from flows.automations_command import automations
from flows.compare_command import compare_command
from flows.data_commands import data_app
from flows.doctor_command import doctor
from flows.evaluate_command import evaluate
from flows.export_command import export
from flows.history_command import history
from flows.output import JsonOption, print_json
from flows.predict_command import predict_command
from flows.promote_command import promote
from flows.reproduce_command import reproduce
from flows.rollback_command import rollback
from flows.score_command import score
from flows.stack_commands import stack_commands
from flows.sync_command import sync_command

if TYPE_CHECKING:
    from flows.report import Report
    from training.spec import RunSpec

app = typer.Typer(
    help="Train small-object detectors: a dataset version goes in, a promoted model comes out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.command()(score)
app.command("compare")(compare_command)
app.command()(promote)
app.command()(history)
app.command()(rollback)
app.command()(reproduce)
app.command("predict")(predict_command)
app.command()(export)
app.command("sync")(sync_command)
stack_commands(app)
app.command()(doctor)
app.command()(automations)

SpecOption = Annotated[str, typer.Option("--spec", help="Experiment: a name in flows/runs/ or a YAML file.")]
SetOption = Annotated[list[str], typer.Option("--set", help="Change one value: key.path=value. May be repeated.")]
ArchitecturesOption = Annotated[str | None, typer.Option(help="Architectures instead of the experiment's: a,b")]
DatasetsOption = Annotated[str | None, typer.Option(help="Datasets instead of the experiment's: x,y")]
SeedsOption = Annotated[str | None, typer.Option(help="Seeds instead of the experiment's: 0,1")]
CodeChangeOption = Annotated[
    Literal["warn", "retrain"], typer.Option("--on-code-change", help="Finished cells that other code trained.")
]
ProfileOption = Annotated[
    bool, typer.Option("--profile", help="Keep a trace of a few steps of every cell that trains: trace.json.gz.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("speck"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """What is asked of no command."""


def main() -> None:
    """Entry point of the `speck` command. Exit code 1 on failure, with the reason on stderr."""
    from flows.settings import Settings, prepare_environment

    prepare_environment(Settings().home)
    try:
        app(standalone_mode=True)
    except SystemExit as end:
        # Typer turns Ctrl-C into this.
        if end.code == 130:
            fail("interrupted; what was reached is kept, run the same command to go on", code=130)
        raise
    except Exception as error:
        if not is_expected(error):
            raise
        fail(f"{type(error).__name__}: {error}")


@app.command("train-all")
def train_all_command(
    spec: SpecOption = "default",
    sets: SetOption = [],  # noqa: B006  (typer reads the default, nothing mutates it)
    architectures: ArchitecturesOption = None,
    datasets: DatasetsOption = None,
    seeds: SeedsOption = None,
    on_code_change: CodeChangeOption = "warn",
    profile: ProfileOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train every architecture x dataset x seed that is not trained yet, compare, and promote the best."""
    changes = _with_profile(sets, profile)
    _train(spec, changes, _names(architectures), _names(datasets), _seeds(seeds), on_code_change, as_json)


@app.command()
def train(
    architecture: str, dataset: str, spec: SpecOption = "default", sets: SetOption = [],  # noqa: B006
    seeds: SeedsOption = None, on_code_change: CodeChangeOption = "warn", profile: ProfileOption = False,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Train one architecture on one dataset."""
    _train(spec, _with_profile(sets, profile), [architecture], [dataset], _seeds(seeds), on_code_change, as_json)


@app.command()
def plan(
    spec: SpecOption = "default",
    sets: SetOption = [],  # noqa: B006
    architectures: ArchitecturesOption = None,
    datasets: DatasetsOption = None,
    seeds: SeedsOption = None,
    on_code_change: CodeChangeOption = "warn",
    folder: Annotated[
        Path | None, typer.Option("--specs", help="Write each cell's spec there, for torchrun -m training.loop.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what train-all would do to each cell, and why, without doing it."""
    from data.versioning import current_version, planned_version
    from flows.experiment import load_experiment
    from flows.plan import plan_cells
    from flows.plan_table import as_json as plan_as_json
    from flows.plan_table import line, total
    from flows.settings import REPO, Settings
    from flows.warm_start import specs_of

    experiment = load_experiment(
        spec, sets, architectures=_names(architectures), datasets=_names(datasets), seeds=_seeds(seeds)
    )
    found = {name: planned_version(name, REPO) for name in experiment.datasets}
    known = {name: version.version for name, version in found.items() if version is not None}
    unversioned = sorted(found.keys() - known.keys())
    settings = Settings()
    specs = [spec for name, version in known.items() for spec in specs_of(experiment, name, version, settings)]
    planned = plan_cells(specs, settings, on_code_change)
    if folder is not None:
        _write_specs(specs, folder)
    if as_json:
        print_json({"cells": plan_as_json(planned), "unversioned_datasets": unversioned})
        return
    for name, version in known.items():
        typer.echo(f"{name}: version {version[:12]}")
    for cell in planned:
        typer.echo(line(cell))
    per_dataset = len(experiment.resolved_architectures()) * len(experiment.seeds)
    for name in unversioned:
        before = current_version(name, REPO)
        news = "new" if before is None else f"changed since version {before.version[:12]}"
        typer.echo(
            f"{name}: {news}: train-all prepares it, and then trains what its version lacks of {per_dataset} cells"
        )
    waiting = f"; {per_dataset * len(unversioned)} more wait for their data to be prepared" if unversioned else ""
    typer.echo(total(planned) + waiting)


app.command()(evaluate)


@app.command()
def models(
    as_json: JsonOption = False,
    table: Annotated[
        bool, typer.Option("--table", help="Parameters and GFLOPs beside the papers', in Markdown.")
    ] = False,
) -> None:
    """Architectures that can be trained, with their settings."""
    from dataclasses import asdict

    from models import ARCHITECTURES

    if table:
        from flows.architecture_table import as_markdown, describe

        typer.echo(as_markdown([describe(name) for name in ARCHITECTURES]))
        return
    if as_json:
        print_json({name: asdict(architecture.config) for name, architecture in ARCHITECTURES.items()})
        return
    for name, architecture in ARCHITECTURES.items():
        config = asdict(architecture.config).items()
        settings = ", ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in config)
        typer.echo(f"{name:20} {settings}")


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Free it; without, it is only shown.")] = False,
    unpushed: Annotated[
        bool, typer.Option("--unpushed", help="Dataset versions, too, that no remote is known to have.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what lies on this machine's disks that no run and no version needs, and free it with --delete."""
    from dataclasses import asdict

    from data.store import default_root
    from flows.gc import by_kind, find_garbage, free
    from flows.settings import REPO, Settings

    settings = Settings()
    garbage = find_garbage(settings, REPO, default_root())
    kinds = by_kind(garbage)
    chosen = [one for one in garbage if unpushed or not one.is_only_copy]
    total = sum(found.size_bytes for found in by_kind(chosen).values()) / 2**20
    freed = free(chosen, settings, REPO, default_root()) if delete else []
    if as_json:
        print_json({"kinds": {kind: asdict(found) for kind, found in kinds.items()}, "freed": len(freed)})
        return
    for kind, found in kinds.items():
        typer.echo(f"{found.size_bytes / 2**20:10.1f} MiB  {found.count:5} x {kind}: {', '.join(found.names)}")
    if not garbage:
        typer.echo("nothing: all that is there is needed, or younger than an hour")
        return
    if len(chosen) < len(garbage):
        only_copies = len(garbage) - len(chosen)
        typer.echo(f"dataset versions that may have no other copy and stay without --unpushed: {only_copies}")
    if not delete:
        typer.echo(f"{total:10.1f} MiB  would be free; delete with `speck gc --delete`")
        return
    kept = f"; {len(chosen) - len(freed)} are in use or needed by now and stay" if len(freed) < len(chosen) else ""
    typer.echo(f"{total:10.1f} MiB  to free, {len(freed)} of {len(chosen)} deleted{kept}")


def fail(message: str, code: int = 1) -> NoReturn:
    """Print the reason on stderr and exit."""
    typer.echo(message, err=True)
    sys.exit(code)


def is_expected(error: Exception) -> bool:
    """True for errors that are an answer to the user, not a fault of ours: our own, and those of files and disks."""
    if isinstance(error, OSError):
        return True
    ours = {"flows", "models", "data", "training", "evaluation", "tracking", "infra"}
    return type(error).__module__.partition(".")[0] in ours


def _write_specs(specs: Sequence[RunSpec], folder: Path) -> None:
    from training.checkpoint import write_json

    folder.mkdir(parents=True, exist_ok=True)
    for spec in specs:
        write_json(folder / f"{spec.run_key}.json", spec.model_dump(mode="json"))
    typer.echo(f"{len(specs)} specs are in {folder}: torchrun -m training.loop FILE", err=True)


def _with_profile(sets: Sequence[str], profile: bool) -> list[str]:
    return [*sets, "compute.profile=true"] if profile else list(sets)


def _train(
    spec: str, sets: Sequence[str], architectures: Sequence[str], datasets: Sequence[str], seeds: Sequence[int],
    on_code_change: Literal["warn", "retrain"], as_json: bool,
) -> None:  # fmt: skip
    from flows.experiment import load_experiment
    from flows.say import plain_terminal
    from flows.settings import Settings, prefect_api

    # Checked before anything heavy starts; the flow loads it again from the same arguments.
    load_experiment(spec, sets, architectures=architectures, datasets=datasets, seeds=seeds)
    plain_terminal(sys.stderr if as_json else sys.stdout)
    settings = Settings()
    with prefect_api(settings.home):
        from flows.report import Report, Unfinished
        from flows.train_all import train_all

        try:
            report = train_all(
                experiment=spec, changes=list(sets), architectures=list(architectures), datasets=list(datasets),
                seeds=list(seeds), on_code_change=on_code_change,
            )  # fmt: skip
        except Unfinished as error:
            report = error.report
    assert isinstance(report, Report)  # only a deployment's run is held back
    _print_report(report, settings.storage, as_json)
    if report.failed or report.not_promoted:
        raise Unfinished(report)


def _print_report(report: Report, storage: Path, as_json: bool) -> None:
    from dataclasses import asdict

    from rich.console import Console

    from flows.leaderboard import as_json as leaderboard_json
    from flows.leaderboard import as_tables, spent

    if as_json:
        told = {
            "promotions": [asdict(promotion) for promotion in report.promotions],
            "not_promoted": report.not_promoted,
            "seconds": report.seconds,
        }
        print_json({**leaderboard_json(report.rows), **told})
        return
    # Without a terminal rich would assume 80 columns and break names apart.
    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in as_tables(report.rows):
        console.print(table)
    for row in report.rows:
        page = storage / row.run_key / "artifacts" / "report.html"
        outcome = f"failed: {row.error}" if row.error else f"report in {page}"
        typer.echo(f"{row.title}: {outcome}")
    typer.echo(spent(report.rows))
    typer.echo("compare runs in the browser: make ui")


def _names(text: str | None) -> list[str]:
    """Names between commas; none if the option was not given. An empty text is a shell variable that was never set."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    if text is not None and not names:
        raise typer.BadParameter("--architectures, --datasets and --seeds need a value, or leave the option out")
    return names


def _seeds(text: str | None) -> list[int]:
    try:
        return [int(seed) for seed in _names(text)]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}: seeds are whole numbers, separated by commas", param_hint="--seeds"
        ) from None
