"""`demp-fx train` and `demp-fx report`."""

from __future__ import annotations

import errno
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from demp_fx.errors import EmitError

if TYPE_CHECKING:
    from rich.progress import Progress


def say(text: str) -> None:
    click.echo(text, err=True)


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--resume", is_flag=True, help="Go on with the run where its checkpoint is.")
@click.option("--overwrite", is_flag=True, help="Replace the run that is in the folder.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def train(recipe: Path, resume: bool, overwrite: bool, out: Path | None, quiet: bool) -> None:
    """Train the model that RECIPE (YAML) describes, narrowing it as its neurons die.

    Leaves a folder with metrics, checkpoints, the narrow network and report.html. Ctrl-C leaves a
    checkpoint for --resume.
    """
    from demp_fx.errors import UsageError
    from demp_fx.report import run as report
    from demp_fx.training.config import RunConfig
    from demp_fx.training.runs import InterruptedRun, Run

    config = RunConfig.from_yaml(recipe)
    folder = out or config.out or Path("runs") / recipe.stem
    progress = _progress(quiet)
    with redirect_stdout(sys.stderr), progress:
        bar = progress.add_task("starting", total=None)

        def show(step: int, total: int, values: dict[str, Any]) -> None:
            progress.update(bar, completed=step, total=total, description=_line(values))

        run = Run(
            config,
            folder,
            resume=resume,
            overwrite=overwrite,
            say=progress.console.print,
            show=show,
        )
        try:
            run.go()
        except InterruptedRun as stop:
            say(str(stop))
            raise click.exceptions.Exit(130) from None
    records = report.RunRecords(folder)
    try:
        say(f"wrote {report.write(records)}")
    except UsageError as error:  # no matplotlib: the run itself has ended well
        say(f"warning: no report.html: {error}")
    show_on_stdout(report.summary(records))


@click.command("report")
@click.argument("folder", type=click.Path(path_type=Path))
def report_(folder: Path) -> None:
    """Write report.html of the run in FOLDER, ended or not, and print its figures."""
    from demp_fx.report import run as report

    records = report.RunRecords(folder)
    say(f"wrote {report.write(records)}")
    show_on_stdout(report.summary(records))


def _progress(quiet: bool) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.description}"),
        TimeRemainingColumn(), console=Console(stderr=True, highlight=False), disable=quiet,
    )  # fmt: skip


def _line(values: dict[str, Any]) -> str:
    """What the progress bar says."""
    parts = []
    if "loss" in values:
        parts.append(f"loss {values['loss']:.3f}")
    if "test_accuracy" in values:
        parts.append(f"accuracy {values['test_accuracy']:.1%}")
    if "channels" in values:
        parts.append(f"{values['channels']:,} channels")
        parts.append(f"{values['macs'] / 1e6:,.1f} M MACs")
    return ", ".join(parts)


def show_on_stdout(what: Any) -> None:
    """Print text as it is, and all else as a terminal shows it best. Raises `EmitError` where that
    cannot be written, but for a reader who has gone, which click handles."""
    from rich.console import Console

    try:
        if not isinstance(what, str):
            console = Console()
            with console.capture() as captured:
                console.print(what)
            what = captured.get().removesuffix("\n")
        click.echo(what)  # in UTF-8, where a locale knows ASCII alone
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        raise EmitError(f"cannot write to stdout: {error}") from error
