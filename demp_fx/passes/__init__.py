"""The passes, one a file: each a small callable on a graph.

graph = demp_fx.trace(model, example_inputs)
seen, samples = observe(graph, calibration, activations(graph))
plan = make_plan(graph, seen)
module = narrow(graph, plan)
verify(model, module, calibration[0], observed=True, train=False)

Without calibration: `make_plan(graph)`, and `verify(model, module, example_inputs)`.
"""

from demp_fx.passes.instrument import instrument
from demp_fx.passes.make_plan import make_plan
from demp_fx.passes.narrow import narrow
from demp_fx.passes.neurons import neurons
from demp_fx.passes.observe import activations, observe
from demp_fx.passes.plan import PruningPlan
from demp_fx.passes.strip import strip
from demp_fx.passes.verify import verify

CATALOGUE: list[tuple[str, str]] = [
    ("trace", "turn any module into an fx graph of its layers"),
    ("observe", "the death test: which channels never fire on calibration data"),
    ("make_plan", "find what is dead, proven or observed, and what can be cut for it"),
    ("narrow", "carry out a plan: a physically narrower module"),
    ("neurons", "find layers of neurons: activations, and the parameters that make them"),
    ("instrument", "insert noise, penalty and watch nodes, as a recipe says"),
    ("strip", "take every inserted node out again"),
    ("verify", "compare with the original in float64, in eval and train mode"),
]

__all__ = [
    "CATALOGUE",
    "PruningPlan",
    "activations",
    "instrument",
    "make_plan",
    "narrow",
    "neurons",
    "observe",
    "strip",
    "verify",
]
