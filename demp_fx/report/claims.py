"""What a compilation proved, and what it took for granted, in words for a page."""

from __future__ import annotations

from demp_fx.passes.outcome import CompileReport


def proven(report: CompileReport) -> list[str]:
    """What holds for every input."""
    lines = [f"{report.dead_proven:,} channels are zero or constant, by the weights alone."]
    for count, what in (
        (report.constants_folded, "constant channels were folded into what reads them."),
        (report.carriers, "channels were kept as carriers of a constant."),
        (report.gathers, "edges were cut by a gather."),
        (report.scatters, "residual sums became an index_add."),
    ):
        lines += [f"{count:,} {what}"] if count else []
    proof = report.verification
    if proof is None:
        return [*lines, "The result was not compared with the original."]
    return [
        *lines,
        f"Narrow and original agree in float64 at batch {proof.batch}: relative error "
        f"{proof.errors} (allowed: {proof.tolerance:.0e}).",
    ]


def assumed(report: CompileReport) -> list[str]:
    """What rests on the example inputs or on the calibration data."""
    lines = [*report.assumptions]
    lines += [f"not traced, kept as it is: {name}: {why}" for name, why in report.opaque.items()]
    return lines or ["Nothing: no data was watched, and the whole forward was traced."]
