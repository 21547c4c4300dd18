"""The statements of a generated `__init__`: modules, parameters, buffers, modes."""

from __future__ import annotations

import keyword
import textwrap

import torch
from torch import nn
from torch.fx import GraphModule

from demp_fx.emit import tensors
from demp_fx.emit.leaves import constructor
from demp_fx.errors import EmitError
from demp_fx.tracing.norms import without_parts


def _plain_name(name: str) -> bool:
    # two leading underscores would be mangled inside a class
    return name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("__")


def reference(path: str) -> str:
    """The expression for a dotted path: `self.layer1`, `getattr(self.layer1, '0')`."""
    text = "self"
    for part in filter(None, path.split(".")):
        text = f"{text}.{part}" if _plain_name(part) else f"getattr({text}, {part!r})"
    return text


def _assign(path: str, value: str) -> str:
    parent, _, name = path.rpartition(".")
    if _plain_name(name):
        return f"{reference(parent)}.{name} = {value}"
    return f"setattr({reference(parent)}, {name!r}, {value})"


class Structure:
    """The statements of `__init__`: the modules, then what their constructors leave to say."""

    def __init__(self, root: GraphModule) -> None:
        self.lines: list[str] = []
        self._after: list[str] = []
        self._known: dict[int, str] = {}  # what may be shared by several names, by identity
        called = (node.target for node in root.graph.nodes if node.op == "call_module")
        self._leaves = {id(root.get_submodule(str(target))) for target in called}
        self._tensors(root, "")
        for name, child in root._modules.items():
            if child is not None:
                self.lines.append(_assign(name, self._module(child, name)))
        reads = [str(node.target) for node in root.graph.nodes if node.op == "get_attr"]
        for path in dict.fromkeys(reads):
            self._attribute(root, path)
        self.lines += self._after
        self._modes(root, {path.rpartition(".")[0] for path in reads if path.endswith("training")})

    def _module(self, module: nn.Module, path: str) -> str:
        """The expression that builds `module`; one that stands elsewhere already comes after."""
        if id(module) in self._known:
            self._after.append(_assign(path, self._known[id(module)]))
            return "nn.Module()"
        self._known[id(module)] = reference(path)
        root = ""
        if id(module) in self._leaves:
            bare = without_parts(module)
            root = constructor(bare, path)
            self._leaf(bare, path + ".")
            if bare is module:
                return root
        else:
            self._tensors(module, path + ".")
        children = [
            f"{name!r}: {self._module(child, f'{path}.{name}')},"
            for name, child in module._modules.items()
            if child is not None
        ]
        if not children:
            return root or "nn.Module()"
        tree = "{\n" + textwrap.indent("\n".join(children), "    ") + "\n}"
        return f"_tree({tree}, {root})" if root else f"_tree({tree})"

    def _tensors(self, module: nn.Module, prefix: str) -> None:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                self._parameter(prefix + name, parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                self._buffer(prefix + name, buffer, name not in module._non_persistent_buffers_set)

    def _leaf(self, leaf: nn.Module, prefix: str) -> None:
        """What a constructor call leaves to say: tied and frozen parameters."""
        mixed = len({parameter.requires_grad for parameter in leaf.parameters()}) > 1
        for name, parameter in leaf.named_parameters(remove_duplicate=False):
            path = prefix + name
            if id(parameter) in self._known:
                self._after.append(_assign(path, self._known[id(parameter)]))
                continue
            self._known[id(parameter)] = reference(path)
            if mixed and not parameter.requires_grad:
                self._after.append(f"{reference(path)}.requires_grad_(False)")

    def _parameter(self, path: str, parameter: nn.Parameter) -> None:
        frozen = "" if parameter.requires_grad else ", requires_grad=False"
        value = f"nn.Parameter({tensors.blank(parameter)}{frozen})"
        self._after.append(_assign(path, self._known.setdefault(id(parameter), value)))
        self._known[id(parameter)] = reference(path)

    def _buffer(self, path: str, buffer: torch.Tensor, persistent: bool) -> None:
        parent, _, name = path.rpartition(".")
        value = tensors.blank(buffer) if persistent else tensors.literal(buffer, path)
        value = self._known.setdefault(id(buffer), value)
        keep = "" if persistent else ", persistent=False"
        self._after.append(f"{reference(parent)}.register_buffer({name!r}, {value}{keep})")
        self._known[id(buffer)] = reference(path)

    def _attribute(self, root: GraphModule, path: str) -> None:
        """What the forward reads from a module that is neither parameter, buffer nor module."""
        parent, _, name = path.rpartition(".")
        owner = root.get_submodule(parent)
        value = getattr(owner, name)
        if name == "training" or id(value) in self._known or isinstance(value, nn.Module):
            return
        if isinstance(value, torch.Tensor):
            if name not in owner._parameters and name not in owner._buffers:
                self._buffer(path, value, persistent=False)
        elif isinstance(value, (bool, int, float, str, type(None))):
            self._after.append(_assign(path, repr(value)))
        else:
            raise EmitError(f"'{path}', read by the forward, is a {type(value).__name__}")

    def _modes(self, root: GraphModule, read: set[str]) -> None:
        """train() or eval() of the leaves, and of those whose `training` the forward reads."""
        modes = {"": root.training}
        if not root.training:
            self.lines.append("self.eval()")
        for path, module in root.named_modules(remove_duplicate=False):
            mode = modes[path.rpartition(".")[0]]
            if (id(module) in self._leaves or path in read) and module.training != mode:
                mode = module.training
                self.lines.append(f"{reference(path)}.train({mode})")
            modes[path] = mode
