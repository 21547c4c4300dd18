"""Take every node that `instrument` inserted out of a module again, without a trace."""

from __future__ import annotations

from torch import fx, nn

from demp_fx.nodes.noise import Noise
from demp_fx.nodes.penalty import Penalty
from demp_fx.nodes.watch import Watch
from demp_fx.passes.instrument import HOME
from demp_fx.tracing.module import TracedModule, assemble

_INSERTED = (Noise, Penalty, Watch)


def strip(graph: fx.GraphModule) -> TracedModule:
    """The module as it was before `instrument`; it shares all parameters, `graph` stays."""
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if _is_inserted(graph, node):
            copies[node] = copies[node.all_input_nodes[0]]
        elif not (node.op == "get_attr" and _is_for_inserted(graph, node)):
            copies[node] = new.node_copy(node, copies.__getitem__)
    new._codegen = graph.graph._codegen
    root = nn.Module()
    root._parameters = dict(graph._parameters)
    root._buffers = dict(graph._buffers)
    root._modules = {name: m for name, m in graph._modules.items() if name != HOME}
    root._non_persistent_buffers_set = set(graph._non_persistent_buffers_set)
    root.training = graph.training
    module = assemble(root, new, type(graph).__name__)
    module.meta = dict(graph.meta)
    return module


def _is_inserted(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(
        graph.get_submodule(str(node.target)), _INSERTED
    )  # fmt: skip


def _is_for_inserted(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an attribute is read by inserted nodes alone, and not in the place of a value."""
    return bool(node.users) and all(
        _is_inserted(graph, user) and user.args[0] is not node for user in node.users
    )
