"""Demon pruning as a compiler pass: networks that get physically narrower while they train."""

from demp_fx.channels.analysis import analyze
from demp_fx.channels.dependencies import DependencyGraph
from demp_fx.compiler import CompileResult, compile
from demp_fx.passes.outcome import CompileReport
from demp_fx.passes.plan import PruningPlan
from demp_fx.recipe import Recipe
from demp_fx.rules import rule
from demp_fx.trace import trace
from demp_fx.training.demon import Demon

__all__ = [
    "CompileReport",
    "CompileResult",
    "Demon",
    "DependencyGraph",
    "PruningPlan",
    "Recipe",
    "analyze",
    "compile",
    "rule",
    "trace",
]
