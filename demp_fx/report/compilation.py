"""The page of a compilation: sizes, widths layer by layer, what was proven, what had to stay."""

from __future__ import annotations

import html
from collections.abc import Iterator

from demp_fx.passes.outcome import CompileReport, Pinned
from demp_fx.report.claims import assumed, proven
from demp_fx.report.fragments import bars, cards, legend, listed, section, table
from demp_fx.report.source import code_at, short
from demp_fx.report.style import page

_MEMBERS = 4


def page_of(report: CompileReport) -> str:
    """The report as HTML that loads nothing."""
    return page(f"{report.model}: compiled", "\n".join(_sections(report)))


def _sections(report: CompileReport) -> Iterator[str]:
    name = html.escape(report.model)
    yield f"<h1>{name}, compiled</h1>"
    yield cards(
        (title, _left(before, after), f"{before:,} → {after:,}") for title, before, after in (
            ("parameters left", report.params_before, report.params_after),
            ("MACs left", report.macs_before, report.macs_after),
            ("channels left", report.channels_before, report.channels_after),
        )
    )  # fmt: skip
    if report.warnings:
        yield section("Warnings", listed(report.warnings))
    yield section("What was proven", listed(proven(report)))
    yield section("What was assumed", listed(assumed(report)))
    if report.widths:
        rows = [(w.name, w.out_before, w.out_after) for w in report.widths]
        key = legend((("before", "var(--before)"), ("after", "var(--accent)")))
        yield section("Channels by layer", key + bars(rows))
        yield section("Layers", _layers(report))
    if report.pinned:
        yield section("What had to stay, dead or not, and why", _pinned(report.pinned))
    yield section("Time and versions", _end(report))


def _left(before: int, after: int) -> str:
    return f"{after / before:.1%}" if before else "-"


def _layers(report: CompileReport) -> str:
    rows = [
        (w.name, w.kind, str(w.in_before), str(w.in_after), str(w.out_before), str(w.out_after))
        for w in report.widths
    ]
    return table(("layer", "kind", "inputs", "now", "outputs", "now"), rows)


def _pinned(pinned: list[Pinned]) -> str:
    rows = []
    for pin in pinned:
        code = code_at(pin.source)
        where = f"{pin.op} in {pin.node}" + (f"\n{short(pin.source)}" if pin.source else "")
        more = len(pin.members) - _MEMBERS
        members = ", ".join(pin.members[:_MEMBERS]) + (f" and {more} more" if more > 0 else "")
        rows.append((str(pin.channels), pin.reason, f"{where}\n{code}".strip(), members))
    return table(("channels", "why", "by", "of"), rows, words=True)


def _end(report: CompileReport) -> str:
    seconds = [(stage, f"{s:.2f} s") for stage, s in report.seconds.items()]
    versions = [(name, version) for name, version in report.versions.items()]
    return table(("", ""), [*seconds, *versions])
