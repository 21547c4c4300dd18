"""The command line: parse, call the library, print. Data on stdout, the rest on stderr."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from demp_fx.cli_train import report_, show_on_stdout, train
from demp_fx.errors import DempError, EmitError

if TYPE_CHECKING:
    from rich.console import RenderableType

_EXIT_CODES = """\b
Exit codes:
  0    done
  1    a bug in demp_fx (with a traceback)
  2    wrong use: a file, a shape, weights, an output folder
  3    the model's forward could not be traced
  4    the result is not what the model computes, so it was not handed over
  5    the result could not be written
  6    the training diverged
  130  interrupted
"""


class _Commands(click.Group):
    """Turns every way to fail into a message on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DempError as error:
            _say(f"error: {error}")
            code = error.exit_code
        except KeyboardInterrupt:
            _say("interrupted")
            code = 130
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # whoever read stdout has gone, which click handles
            _say("".join(traceback.format_exception(error)).rstrip())
            _say(f"error: this is a bug in demp_fx: {type(error).__name__}: {error}")
            code = 1
        raise click.exceptions.Exit(code)


def _say(text: str) -> None:
    click.echo(text, err=True)


@click.group(
    cls=_Commands,
    epilog=_EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="demp_fx", prog_name="demp-fx")
def main() -> None:
    """Cut dead channels out of PyTorch networks, exactly.

    MODEL is a file with a module-level `model` (model.py), something in a file that makes one
    (model.py:factory), or something in a package (package.module:factory).
    """


_INPUT = click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="[NAME=]SHAPE[:DTYPE]",
    help="An argument of the forward, such as 1x3x224x224 or mask=1x16:bool; repeatable. "
    "Default: `example_inputs` of the model's file.",
)
_WEIGHTS = click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="Weights to load into the model first: .safetensors, or .pt with tensors only.",
)


@main.command("compile")
@click.argument("model")
@_INPUT
@_WEIGHTS
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    help="Data on which channels are watched: .pt, .npy, .npz or .safetensors. "
    "Without it only what the weights prove dead is cut.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder to write. Default: <model>-narrow."
)
@click.option("--overwrite", is_flag=True, help="Replace the output folder of an earlier run.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--dry-run", is_flag=True, help="Print what would go, write nothing.")
@click.option("--no-verify", is_flag=True, help="Skip the comparison with the original.")
@click.option(
    "--keep",
    multiple=True,
    metavar="NAME",
    help="A layer or submodule that keeps its shape; wildcards are allowed; repeatable.",
)
@click.option("--round-to", default=1, metavar="N", help="Round widths up to a multiple of N.")
@click.option(
    "--cuts",
    type=click.Choice(["pays", "always", "never"]),
    default="pays",
    help="Where the graph may be cut for more to go. Default: where it pays.",
)
def compile_(
    model: str,
    inputs: tuple[str, ...],
    weights: Path | None,
    calibrate: Path | None,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
    dry_run: bool,
    no_verify: bool,
    keep: tuple[str, ...],
    round_to: int,
    cuts: Literal["pays", "always", "never"],
) -> None:
    """Find what is dead in MODEL and write a narrower module that computes the same."""
    from demp_fx import compile as narrow
    from demp_fx.data import check_forward, load_calibration
    from demp_fx.emit import folder
    from demp_fx.report import tables

    with redirect_stdout(sys.stderr):  # what the model prints is not the report
        loaded, example = _load(model, inputs, weights)
        target = out or Path(f"{loaded.stem}-narrow")
        if not dry_run:
            folder.check(target, overwrite)
        calibration = load_calibration(calibrate, loaded) if calibrate else None
        if calibration:
            check_forward(loaded.model, calibration[0], f"the calibration data of {calibrate}")
        _say(f"compiling {type(loaded.model).__name__}")
        result = narrow(
            loaded.model, example, calibration=calibration, verify=not no_verify,
            cuts=cuts, keep=keep, round_to=round_to,
        )  # fmt: skip
    for warning in result.report.warnings:
        _say(f"warning: {warning}")
    if not dry_run:
        folder.write(result, target, overwrite)
        _say(f"wrote {target}")
    if as_json:
        show_on_stdout(result.report.to_json())
    else:
        show_on_stdout(tables.compile_report(result.report))


@main.command()
@click.argument("model")
@_INPUT
@_WEIGHTS
@click.option(
    "--format",
    "form",
    type=click.Choice(["tree", "json", "dot", "mermaid", "graphml", "html"]),
    default="tree",
    help="Default: a tree for the terminal.",
)
@click.option("--out", type=click.Path(path_type=Path), help="File to write instead of stdout.")
@click.option(
    "--why",
    metavar="NAME",
    help="Explain one layer or parameter: what ties it to others, what stops its channels.",
)
@click.option(
    "--filter",
    "only",
    metavar="NAME",
    help="Only groups of this submodule; wildcards are allowed, as in '*.conv1'.",
)
def inspect(
    model: str,
    inputs: tuple[str, ...],
    weights: Path | None,
    form: str,
    out: Path | None,
    why: str | None,
    only: str | None,
) -> None:
    """Show the pruning groups of MODEL: what is cut together, what is pinned where, and why."""
    import demp_fx
    from demp_fx.report import exports
    from demp_fx.report.explain import why_tree

    if why and (only or form != "tree"):
        raise click.UsageError("--why is answered in the terminal: without --format and --filter")
    with redirect_stdout(sys.stderr), _one_thread():
        loaded, example = _load(model, inputs, weights)
        deps = demp_fx.analyze(demp_fx.trace(loaded.model, example))
    if why:
        _print(why_tree(deps.explain(why)), out)
    else:
        graph = deps.data.only(only) if only else deps.data
        _print(exports.export(graph, form, type(loaded.model).__name__), out)


@main.command()
def passes() -> None:
    """List the passes, one line each."""
    from demp_fx.passes import CATALOGUE

    width = max((len(name) for name, _ in CATALOGUE), default=0)
    show_on_stdout("\n".join(f"{name:<{width}}  {line}" for name, line in CATALOGUE))


def _load(model: str, inputs: tuple[str, ...], weights: Path | None) -> tuple[Any, Any]:
    """The model with its weights, and inputs that it has been seen to take."""
    from demp_fx import data, loading

    loaded = loading.load_model(model)
    if weights:
        loading.load_weights(loaded.model, weights)
    example = data.example_inputs(loaded, inputs)
    data.check_forward(loaded.model, example, "the example inputs")
    return loaded, example


@contextmanager
def _one_thread() -> Iterator[None]:
    """Without threads: an analysis is many small ops, whose threads mostly wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _print(what: str | RenderableType, out: Path | None = None) -> None:
    """To stdout, or to a file as plain text."""
    from rich.console import Console

    if out is None:
        show_on_stdout(what)
        return
    try:
        with out.open("w", encoding="utf-8") as file:
            if isinstance(what, str):
                file.write(what.rstrip("\n") + "\n")
            else:
                Console(file=file, width=120).print(what)
    except OSError as error:
        raise EmitError(f"cannot write {out}: {error}") from error
    _say(f"wrote {out}")


main.add_command(train)
main.add_command(report_)

if __name__ == "__main__":
    main()
