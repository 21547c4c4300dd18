"""The rewrite: a plan and a graph in, a physically narrower GraphModule out."""

from __future__ import annotations

from torch import fx, nn

from demp_fx.passes.plan import PruningPlan
from demp_fx.passes.rewrite import Constants, rewritten
from demp_fx.passes.weights import Weights
from demp_fx.tracing.module import TracedModule, assemble
from demp_fx.turns import in_turn

ROUNDED = "rounded"  # in a narrow module's meta: whether parameters were computed anew


@in_turn
def narrow(graph: fx.GraphModule, plan: PruningPlan) -> TracedModule:
    """Carry out `plan` on a traced module.

    Returns a new module with parameters of its own; `graph` is not changed. Tied parameters stay
    tied. Raises `UsageError` where the plan is of another model.
    """
    modules = dict(graph.named_modules(remove_duplicate=False))
    weights = Weights(graph, plan, modules)
    constants = Constants(graph)
    new_graph = rewritten(graph.graph, plan, constants)
    root = weights.fill(nn.Module(), graph)
    root.training = graph.training
    for name, value in constants.parts.items():
        root.register_buffer(name, value, persistent=False)
    root._non_persistent_buffers_set |= graph._non_persistent_buffers_set
    module = assemble(root, new_graph, type(graph).__name__)
    module.meta = {**graph.meta, ROUNDED: plan.rounds}
    return module
