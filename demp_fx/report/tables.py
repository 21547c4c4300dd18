"""Reports for a terminal."""

from __future__ import annotations

from rich.console import Group as Stack
from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from demp_fx.passes.outcome import CompileReport, Pinned

_MEMBERS = 3


def compile_report(report: CompileReport) -> RenderableType:
    """Sizes before and after, the layers that changed, what is pinned, and the proof."""
    parts: list[RenderableType] = [_sizes(report)]
    if any(_changed(report)):
        parts.append(_widths(report))
    else:
        parts.append("No layer changed its width: nothing in it is dead.")
    if report.pinned:
        parts.append(_pinned(report.pinned))
    parts += [escape(line) for line in _remarks(report)]
    return Stack(*parts)


def _sizes(report: CompileReport) -> Table:
    table = Table(title=escape(report.model), title_justify="left")
    table.add_column("")
    for heading in ("before", "after", "left"):
        table.add_column(heading, justify="right")
    rows = (
        ("parameters", report.params_before, report.params_after),
        ("MACs", report.macs_before, report.macs_after),
        ("channels", report.channels_before, report.channels_after),
    )
    for name, before, after in rows:
        left = f"{after / before:.1%}" if before else "-"
        table.add_row(name, f"{before:,}", f"{after:,}", left)
    return table


def _changed(report: CompileReport) -> list[tuple[str, str, str, str]]:
    return [
        (
            width.name,
            width.kind,
            _arrow(width.in_before, width.in_after),
            _arrow(width.out_before, width.out_after),
        )
        for width in report.widths
        if (width.in_before, width.out_before) != (width.in_after, width.out_after)
    ]


def _arrow(before: int, after: int) -> str:
    return f"{before}" if before == after else f"{before} -> {after}"


def _widths(report: CompileReport) -> Table:
    table = Table(title="Layers that are narrower", title_justify="left")
    for heading in ("layer", "kind"):
        table.add_column(heading, overflow="fold")
    for heading in ("inputs", "outputs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in _changed(report):
        table.add_row(*map(escape, row))
    return table


def _pinned(pinned: list[Pinned]) -> Table:
    table = Table(title="Dead or not, these have to stay", title_justify="left")
    table.add_column("channels", justify="right")
    for heading in ("why", "by", "of"):
        table.add_column(heading, overflow="fold")
    for pin in pinned:
        by = f"{pin.op} in {pin.node}" + (f"\n{pin.source}" if pin.source else "")
        table.add_row(str(pin.channels), escape(pin.reason), escape(by), escape(_few(pin.members)))
    return table


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _MEMBERS} more" if len(names) > _MEMBERS else ""
    return ", ".join(names[:_MEMBERS]) + more


def _remarks(report: CompileReport) -> list[str]:
    """What else there is to say, a line each."""
    counts = (
        (report.dead_proven, "known dead or constant from the weights"),
        (report.dead_observed, "never fired on the calibration data"),
        (report.constants_folded, "constant, folded into what reads them"),
        (report.carriers, "kept as carriers of a constant"),
    )
    lines = [f"{count} channels {what}" for count, what in counts if count]
    if report.gathers or report.scatters:
        lines.append(f"{report.gathers} edges cut by a gather, {report.scatters} by an index_add")
    lines += [f"not traced, kept as it is: {name}: {why}" for name, why in report.opaque.items()]
    lines += [f"assumed: {text}" for text in report.assumptions]
    if report.verification is None:
        lines.append("not verified")
    else:
        proof = report.verification
        lines.append(f"verified in float64 at batch {proof.batch}: relative error {proof.errors}")
    if report.seconds:
        stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in report.seconds.items())
        lines.append(f"seconds: {stages}")
    return lines
