"""An exported program as an fx graph on the model's own names: arguments, parameters, structure."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, TensorArgument

from demp_fx.tracing import regions, structure
from demp_fx.tracing.source import traced_line

aten = torch.ops.aten
# What a trace asserts about sizes and types: it held for the example, and need not for others.
_ASSERTS = {"_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range",
            "sym_constrain_range_for_size"}  # fmt: skip
# What takes numbers out of a tensor, or a size from them: no shapes alone tell what it gives.
_NUMBERS = {aten.item.default, aten._local_scalar_dense.default,
            aten.repeat_interleave.self_Tensor, aten.repeat_interleave.Tensor}  # fmt: skip
# What takes another tensor's sizes, and the same with the sizes spelled out.
_LIKE = {aten.expand_as.default: aten.expand.default, aten.view_as.default: aten.view.default,
         aten.reshape_as.default: aten.reshape.default}  # fmt: skip
_STORED = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR}
_END = 2**63 - 1  # how a slice without an end is written


def lower(
    program: ExportedProgram, model: nn.Module, bound: inspect.BoundArguments
) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The graph of `program`, and the constants in it that `model` does not have.

    Placeholders are the arguments in `bound`, each whole; parameters are read where they are first
    used; the output has the structure that the model returns. Every node's meta has "source", the
    user's line, "module", the path and the call of the module that it comes from, and "val".
    """
    return _Lowering(program, model, bound).run()


def prune(graph: fx.Graph) -> None:
    """Take out what nothing uses."""
    for node in reversed(graph.nodes):
        if not node.users and node.op in ("get_attr", "call_function") and not _acts(node.target):
            graph.erase_node(node)
    regions.drop_empty(graph)


def _acts(target: Any) -> bool:
    """Whether a function changes one of its arguments."""
    changes = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
    return changes and target is not aten.detach_.default


class _Lowering:
    def __init__(
        self, program: ExportedProgram, model: nn.Module, bound: inspect.BoundArguments
    ) -> None:
        self.program, self.model, self.bound = program, model, bound
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.stored: dict[fx.Node, tuple[str, Tensor]] = {}  # by the program's placeholder
        self.read: dict[str, fx.Node] = {}
        self.constants: dict[str, Tensor] = {}
        self.home: tuple[torch.device, fx.Node] | None = None  # the first tensor that comes in
        self.device: fx.Node | None = None
        self.names = _first_names(model)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        code = inspect.unwrap(type(model).forward).__code__
        self.entry = f"{code.co_filename}:{code.co_firstlineno}"

    def run(self) -> tuple[fx.Graph, dict[str, Tensor]]:
        self._inputs()
        inner = self.program.graph_module
        for node in inner.graph.nodes:
            if node.op == "output":
                self._output(node)
            elif node.op != "placeholder":
                self.env[node] = self._node(node, inner, self.env)
        for node in self.graph.nodes:
            node.meta.setdefault("source", self.entry)
        return self.graph, self.constants

    # -- ends -----------------------------------------------------------------------------------

    def _inputs(self) -> None:
        placeholders = {n.name: n for n in self.program.graph.find_nodes(op="placeholder")}
        given = []
        for spec in self.program.graph_signature.input_specs:
            if spec.kind in _STORED:
                self.stored[placeholders[spec.arg.name]] = self._attribute(str(spec.target))
            elif spec.kind is InputKind.USER_INPUT:
                given.append(spec.arg)
            else:
                raise NotImplementedError(f"an input of the kind {spec.kind.name}")
        leaves = structure.inputs(self.graph, self.bound)
        for arg, leaf in zip(given, leaves, strict=True):
            if isinstance(arg, TensorArgument):
                value = leaf.meta["val"] = placeholders[arg.name].meta["val"]
                self.home = self.home or (value.device, leaf)
                self.env[placeholders[arg.name]] = leaf

    def _attribute(self, target: str) -> tuple[str, Tensor]:
        """A stored tensor and the model's name for it, the first one where it has several."""
        try:
            value: Tensor = operator.attrgetter(target)(self.model)
        except AttributeError:
            name, value = f"_tensor_constant{len(self.constants)}", self.program.constants[target]
            self.constants[name] = value
            return name, value
        return self.names.get(id(value), target), value

    def _output(self, node: fx.Node) -> None:
        flat: Any = [self._argument(a, self.env) for a in node.args[0]]  # type: ignore[union-attr]
        for k, spec in enumerate(self.program.graph_signature.output_specs):
            if isinstance(spec.arg, ConstantArgument):
                flat[k] = spec.arg.value
        tree = self.program.call_spec.out_spec
        assert tree is not None
        self.graph.output(structure.output(self.graph, tree, iter(flat)))

    # -- nodes ----------------------------------------------------------------------------------

    def _node(self, node: fx.Node, inner: nn.Module, env: dict[fx.Node, Any]) -> Any:
        target: Any = node.target
        if node.op == "get_attr":
            return operator.attrgetter(str(target))(inner)  # a subgraph, for the op that runs it
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._subgraph(node, env)
        name = getattr(target, "_opname", "")
        if name in _ASSERTS:
            return None
        if target in _NUMBERS and node.kwargs.get("output_size") is None:
            raise NotImplementedError(f"{name} needs the numbers in a tensor")
        if getattr(target, "__module__", "").startswith("torch._functorch"):
            raise NotImplementedError("torch.func works on tensors that no graph has")
        args: Any = tuple(self._argument(a, env) for a in node.args)
        kwargs = {k: self._argument(a, env) for k, a in node.kwargs.items()}
        if target is operator.getitem and not isinstance(args[0], fx.Node):
            return args[0][args[1]]  # of what a subgraph returned
        whole = target is aten.slice.Tensor and args[2:] in ((0, _END), (None, _END))
        if whole or target is aten.alias.default:
            return args[0]
        if target is aten.cat.default:
            args = (self._pieces(args[0]), *args[1:])
            if len(args[0]) == 1:
                return args[0][0]
        if kwargs.get("pin_memory") is False:
            del kwargs["pin_memory"]
        if target in _LIKE:  # only its sizes are meant: no reader of its channels
            target, args = _LIKE[target], (args[0], self._sizes(args[1]))
        made = self.graph.create_node("call_function", target, args, kwargs, node.name)
        made.meta = {k: node.meta[k] for k in ("val",) if k in node.meta}
        made.meta["source"] = traced_line(node.meta.get("stack_trace") or "") or self.entry
        stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {"": ("", None)}
        call, (path, _) = list(stack.items())[-1]
        module = self.modules.get(path)  # none where torch.export has lost the stack
        made.meta["module"] = (self.names[id(module)], call) if module is not None else ("", "")
        return made

    def _argument(self, argument: Any, env: dict[fx.Node, Any]) -> Any:
        if isinstance(argument, fx.Node):
            if argument in self.stored:
                return self._stored(*self.stored[argument], argument)
            return env[argument]
        if isinstance(argument, (list, tuple)):
            return type(argument)(self._argument(a, env) for a in argument)
        if isinstance(argument, torch.device) and self.home and argument == self.home[0]:
            if self.device is None:
                self.device = self.graph.call_function(getattr, (self.home[1], "device"))
            return self.device
        return argument

    def _stored(self, name: str, value: Tensor, placeholder: fx.Node) -> fx.Node:
        if name not in self.read:
            node = self.read[name] = self.graph.get_attr(name)
            node.meta |= {"val": placeholder.meta["val"], "attribute": value}
        return self.read[name]

    def _pieces(self, pieces: list[Any]) -> list[Any]:
        """What is joined, without tensors of shape (0,): torch passes over them."""
        return [p for p in pieces if not isinstance(p, fx.Node) or not _is_nothing(p.meta["val"])]

    def _sizes(self, like: fx.Node) -> list[Any]:
        """The sizes of a tensor, one by one: those that follow the input are asked for."""
        found: list[Any] = []
        for d, size in enumerate(like.meta["val"].shape):
            found.append(size)
            if not isinstance(size, int):
                found[d] = self.graph.call_function(aten.sym_size.int, (like, d))
                found[d].meta |= {"val": size, "source": like.meta["source"], "module": ("", "")}
        return found

    def _subgraph(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """The nodes of a region without gradients or under autocast, between its two ends."""
        target: Any = node.target
        args: Any = [self._argument(a, env) for a in node.args]
        if target.name() == "wrap_with_set_grad_enabled":
            enabled, body, *operands = args
            region = regions.enter(self.graph, torch.set_grad_enabled, (enabled,))
        elif target.name() == "wrap_with_autocast":
            *given, body = args[:5]
            operands = args[5:]
            region = regions.enter(self.graph, torch.autocast, tuple(given))
        else:
            raise NotImplementedError(f"the higher-order op {target}")
        inner: dict[fx.Node, Any] = {}
        feed = iter(operands)
        for n in body.graph.nodes:
            if n.op == "placeholder":
                inner[n] = next(feed)
            elif n.op == "output":
                regions.leave(self.graph, region[0])
                return [self._argument(a, inner) for a in n.args[0]]
            else:
                inner[n] = self._node(n, body, inner)
        raise AssertionError("a graph without an output")


def _is_nothing(tensor: Tensor) -> bool:
    """Whether it is known to have the shape (0,), whatever the numbers in an input are."""
    return tensor.dim() == 1 and type(tensor.shape[0]) is int and tensor.shape[0] == 0


def _first_names(model: nn.Module) -> dict[int, str]:
    """The first name of every module, parameter and buffer, by identity."""
    named: list[tuple[str, Any]] = [*model.named_modules(), *model.named_parameters()]
    return {id(value): name for name, value in (*named, *model.named_buffers())}
