"""The report of a run: figures as a table, and a page with pictures that stands on its own."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from demp_fx.errors import EmitError, UsageError
from demp_fx.passes.outcome import CompileReport
from demp_fx.report import plots
from demp_fx.report.claims import assumed
from demp_fx.report.fragments import bars, cards, legend, listed, section, table
from demp_fx.report.style import page

Record = dict[str, Any]


class RunRecords:
    """What a run left behind: its recipe, its records by kind, its figures (if it has ended)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            self.recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{folder} holds no run: {error}") from error
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:  # the last line of a killed process
                continue
        self.steps = [r for r in records if r["kind"] == "step"]
        self.epochs = [r for r in records if r["kind"] == "epoch"]
        self.events = [r for r in records if r["kind"] == "event"]
        self.compiling = sum(r["seconds"] for r in records if r["kind"] == "compile")
        ends = [r for r in records if r["kind"] == "end"]
        self.end: Record | None = ends[-1] if ends else None
        self.result = _result(folder / "narrow" / "report.json") if ends else None

    @property
    def before(self) -> dict[str, int]:
        """Sizes of the dense network."""
        if self.end is not None and "before" in self.end:
            return dict(self.end["before"])
        return dict(self.events[0]["size"]) if self.events else {}


def _result(path: Path) -> CompileReport | None:
    """The report of the narrow network; None where there is none that can be read."""
    try:
        return CompileReport.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def summary(run: RunRecords) -> RenderableType:
    """The figures of a run as a table for the terminal."""
    table = Table(title=str(run.folder), title_justify="left")
    table.add_column("")
    for heading in ("dense", "now", "left"):
        table.add_column(heading, justify="right")
    for row in _size_rows(run):
        table.add_row(*row)
    for name, value in _figures(run):
        table.add_row(name, "", value, "")
    return table


def _size_rows(run: RunRecords) -> Iterable[tuple[str, str, str, str]]:
    if run.events:
        now = run.events[-1]["size"] if run.end is None else run.end["after"]
        for key, name in (("params", "parameters"), ("macs", "MACs"), ("channels", "channels")):
            before, after = run.before[key], now[key]
            yield name, f"{before:,}", f"{after:,}", f"{after / before:.1%}"


def _figures(run: RunRecords) -> Iterable[tuple[str, str]]:
    if run.end is None:
        yield "state", "has not ended"
    last: Record = run.end or (run.epochs[-1] if run.epochs else {})
    if last:
        yield "test accuracy", f"{last['test_accuracy']:.2%}"
        yield "steps", f"{run.end['steps'] if run.end else last['step']:,}"
        yield "seconds", f"{last['seconds']:.1f}"
    if run.events:
        pruning = sum(sum(e["seconds"].values()) for e in run.events)
        yield "of them checking and narrowing", f"{pruning:.1f}"
        if run.compiling:
            yield "of them compiling anew", f"{run.compiling:.1f}"
        yield "death checks", str(len(run.events))
        failed = sum(e["failure"] is not None for e in run.events)
        if failed:
            yield "narrowings undone", str(failed)
    if run.end is not None and run.end.get("target"):
        yield "target", run.end["target"]


def write(run: RunRecords) -> Path:
    """Write report.html into the run's folder, with every picture in it. Returns its path."""
    try:
        body = "\n".join(_sections(run))
    except ImportError as error:
        raise UsageError(f"pictures take matplotlib: pip install matplotlib ({error})") from error
    path = run.folder / "report.html"
    title = f"demp_fx: {run.folder.name}"
    try:
        path.write_text(page(title, body), encoding="utf-8")
    except OSError as error:
        raise EmitError(f"cannot write {path}: {error}") from error
    return path


def _sections(run: RunRecords) -> Iterable[str]:
    yield f"<h1>{html.escape(run.folder.name)}, dense to sparse</h1>"
    sizes = list(_size_rows(run))
    yield cards((f"{name} left", left, f"{dense} → {now}") for name, dense, now, left in sizes)
    yield table(("", ""), list(_figures(run)))
    if run.steps and run.epochs:
        yield section("Loss and accuracy", plots.learning(run.steps, run.epochs))
    if run.events:
        first = _dense_widths(run)
        yield section("Channels that died, by layer", plots.deaths(run.events, first))
        if run.steps:
            yield section("Work and time of a step", plots.work(run.steps, run.events, run.before))
            yield section("Pressure", plots.pressure(run.steps))
        if run.events[-1].get("aim") is not None and run.end is not None:
            measure, share = run.end["aimed_at"]
            yield section(
                "The way to the target",
                plots.trajectory(run.events, measure, share, run.before[measure]),
            )
        yield section("What was proven", listed(_proven(run)))
        if run.result is not None:
            yield section("What was assumed", listed(assumed(run.result)))
        after = run.events[-1]["widths"]
        key = legend((("before", "var(--before)"), ("after", "var(--accent)")))
        yield section("Channels by layer", key + bars([(n, first[n], after[n]) for n in first]))
        headings = ("step", "dead", "removed", "parameters", "MACs", "lambda", "seconds", "failure")
        yield section("Death checks", table(headings, [_event_row(e) for e in run.events]))
    yield section("Recipe", f"<pre>{html.escape(run.recipe)}</pre>")


def _proven(run: RunRecords) -> Iterable[str]:
    """What the comparisons during the run showed."""
    errors = [e["verify_error"] for e in run.events if e["verify_error"] is not None]
    if errors:
        yield (
            f"Networks before and after {len(errors)} narrowings agree in float64 on a probe "
            "batch, in eval and in train mode, dead channels held at their level: largest relative "
            f"error {max(errors):.1e}."
        )
    if any(e["removed"] for e in run.events) and not errors:
        yield "The narrowings were not compared with the network before."
    undone = sum(e["failure"] is not None for e in run.events)
    if undone:
        yield f"{undone} narrowings were not as they should be, and were undone."
    if not any(e["removed"] for e in run.events):
        yield "Nothing was narrowed."


def _dense_widths(run: RunRecords) -> dict[str, int]:
    if run.end is not None and "widths" in run.end:
        return {name: width for name, (width, _) in run.end["widths"].items()}
    first = run.events[0]
    return {n: w + first["removed"].get(n, 0) for n, w in first["widths"].items()}


def _event_row(event: Record) -> tuple[str, ...]:
    return (
        str(event["step"]), str(sum(event["dead"].values())), str(sum(event["removed"].values())),
        f"{event['size']['params']:,}", f"{event['size']['macs']:,}", f"{event['penalty']:.3g}",
        f"{sum(event['seconds'].values()):.2f}", event["failure"] or "",
    )  # fmt: skip
