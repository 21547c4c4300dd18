"""The module that tracing hands over: a GraphModule whose copies and pickles keep all of it."""

from __future__ import annotations

import copy
import functools
import importlib
import keyword
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from demp_fx.tracing.norms import PLAIN, as_plain
from demp_fx.tracing.regions import as_blocks


@dataclass(frozen=True)
class TraceNotes:
    """What the graph does not say: modules left whole, and decisions taken while tracing."""

    opaque: dict[str, str] = field(default_factory=dict)  # qualified name -> "reason at file:line"
    baked: list[str] = field(default_factory=list)  # "file:line: `the line` followed for ..."
    exported: str = ""  # why torch.export made the graph, if it did
    memos: list[str] = field(default_factory=list)  # attributes: sizes that the last call had


def left_out(place: str, value: Any) -> str:
    """The note on a part of the output that no graph can return, such as a cache of keys."""
    return f"output{place} left out: nothing is known of a {type(value).__name__}"


class Parts(nn.Module):
    """Stands for a Sequential, ModuleList or ModuleDict: what is in it is found as it was there."""

    def __getitem__(self, key: int | str) -> nn.Module:
        if str(key) in self._modules or isinstance(key, str):
            return self.get_submodule(str(key))
        return list(self.children())[key]

    def __iter__(self) -> Iterator[nn.Module]:
        return self.children()

    def __len__(self) -> int:
        return len(self._modules)


class TracedModule(fx.GraphModule):
    """A GraphModule; its meta, node sources and buffers' persistence outlive copies and pickles."""

    __getitem__ = Parts.__getitem__

    @property
    def code(self) -> str:
        """The Python code generated from the graph."""
        if "_code" not in vars(self):
            self.recompile()
        return super().code

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModule:
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, TracedModule)
        whole = nn.Module()  # what the graph does not use is not in a copy of a GraphModule
        kept = {key: value for key, value in vars(self).items() if key in vars(whole)}
        whole.__dict__.update(copy.deepcopy(kept, memo))
        _mirror(whole, copied, {})
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        body = {k: v for k, v in vars(self).items() if k not in ("_graph", "_code", "_lineno_map")}
        rows = []
        for node in self.graph.nodes:
            args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), _to_reference)
            rows.append(
                (node.op, _to_name(node.target), args, kwargs, node.name, node.meta.get("source"))
            )
        return _restore, (type(self).__name__, body, rows)


TracedModule.__jit_unused_properties__ = [*fx.GraphModule.__jit_unused_properties__, "code"]


@dataclass(frozen=True)
class _Reference:
    name: str


@dataclass(frozen=True)
class _Found:
    """What does not pickle, by the way to it: "torch", "ops", "aten", "view", "default".

    Besides ATen ops these are torch's own closures, such as `F.max_pool2d`, and memory formats.
    """

    path: tuple[str, ...]


def _to_reference(argument: Any) -> Any:
    if isinstance(argument, torch.memory_format):
        return _Found(tuple(str(argument).split(".")))
    return _Reference(argument.name) if isinstance(argument, fx.Node) else argument


def _to_name(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload):
        return _Found(("torch", "ops", target.namespace, target._opname, target._overloadname))
    if "<locals>" in getattr(target, "__qualname__", ""):
        named = _Found((target.__module__, target.__name__))
        return named if _at(named, None) is target else target
    return target


def _at(place: _Found, *default: Any) -> Any:
    home, *path = place.path
    start = importlib.import_module(home)
    return functools.reduce(lambda owner, name: getattr(owner, name, *default), path, start)


def _meant(nodes: dict[str, fx.Node], stored: Any) -> Any:
    if isinstance(stored, _Reference):
        return nodes[stored.name]
    return _at(stored) if isinstance(stored, _Found) else stored


def _restore(class_name: str, body: dict[str, Any], rows: list[tuple[Any, ...]]) -> TracedModule:
    """Undo `TracedModule.__reduce__`: fx itself would trace the code again, for one mode only."""
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    for op, target, args, kwargs, name, source in rows:
        args, kwargs = fx.node.map_aggregate((args, kwargs), functools.partial(_meant, nodes))
        target = _meant(nodes, target)
        nodes[name] = graph.create_node(op, target, args, kwargs, name)
        nodes[name].meta.update({} if source is None else {"source": source})
    root = nn.Module()
    root.__dict__.update(body)
    module = assemble(root, graph, class_name)
    module.__dict__.update({k: v for k, v in body.items() if k not in vars(nn.Module())})
    return module


class _Pending:
    """Stands for the forward of a module whose code is generated when somebody asks for it."""

    def __init__(self, module: TracedModule) -> None:
        self.module = module

    def __get__(self, instance: TracedModule | None, owner: type[TracedModule]) -> Any:
        self.module.recompile()  # puts the forward where this is
        return (owner if instance is None else instance).forward


def assemble(root: nn.Module, graph: fx.Graph, class_name: str) -> TracedModule:
    """A GraphModule with all of `root`'s parameters and buffers: names, order and persistence.

    Containers are new; leaf modules and tensors are shared with `root`.
    """
    module = draft(root, graph, class_name)
    module.recompile()
    return module


def draft(root: nn.Module, graph: fx.Graph, class_name: str) -> TracedModule:
    """What `assemble` makes, for the use of its graph: its code is not generated before it runs.
    Nobody else should get it: torch.compile and others look at a forward without asking for it."""
    module = TracedModule(nn.Module(), fx.Graph(), class_name)
    places: _Places = {"": (root, module)}
    for node in graph.nodes:
        if node.name == "self":  # for an attribute of this name: in code it is the module
            node._rename("self_")
        if node.op in ("get_attr", "call_module"):
            _place(str(node.target), places, node.meta.get(PLAIN))
    _mirror(root, module, {})
    module._graph, graph.owning_module = graph, module
    graph.on_generate_code(lambda _: _as_python)
    for generated in ("_code", "_lineno_map", "_prologue_start"):  # of the empty graph
        module.__dict__.pop(generated, None)
    type(module).forward = _Pending(module)  # type: ignore[assignment]
    return module


_KEYWORD = re.compile(
    r'((?:getattr\()*self(?:\.\w+|, "[^"]*"\))*)\.(' + "|".join(keyword.kwlist) + r")\b"
)


def _as_python(body: list[str]) -> list[str]:
    """Generated code with regions as blocks, and with attributes by names that Python has taken
    (heads called "class", say), which fx writes as it writes others."""
    text, before = "".join(as_blocks(body)), ""
    while text != before:
        before, text = text, _KEYWORD.sub(r'getattr(\1, "\2")', text)
    return [text]


_Places = dict[str, tuple[nn.Module, nn.Module]]  # path -> what it leads to, at home and in a copy


def _place(target: str, places: _Places, plain: type[nn.Module] | None) -> None:
    """Put what a node refers to into the copy; a module, where `plain` is given, as one of that."""
    path, _, name = target.rpartition(".")
    source, twin = _container(path, places)
    if source is twin:
        return
    value = getattr(source, name)
    if isinstance(value, nn.Module):
        new = value
        if plain is not None and plain is not type(value):
            new = as_plain(value, plain)
            if target in places:  # by what is in it
                new._modules = places[target][1]._modules
        twin._modules[name] = new
        places[target] = value, new
    elif isinstance(value, nn.Parameter):
        twin._parameters[name] = value
    elif isinstance(value, Tensor):
        twin._buffers[name] = value
    else:
        setattr(twin, name, value)


def _container(path: str, places: _Places) -> tuple[nn.Module, nn.Module]:
    if path not in places:
        outer, _, name = path.rpartition(".")
        source, twin = _container(outer, places)
        inner = getattr(source, name)
        if source is not twin and name not in twin._modules:
            twin._modules[name] = nn.Module()
        places[path] = inner, getattr(twin, name)
    return places[path]


_NUMBERED = (nn.Sequential, nn.ModuleList, nn.ModuleDict, Parts)


def _mirror(source: nn.Module, target: nn.Module, seen: dict[nn.Module, nn.Module]) -> None:
    seen[source] = target
    if target is source:
        return
    if type(target) is nn.Module and isinstance(source, _NUMBERED):
        target.__class__ = Parts
    constants = target._buffers.keys() - source._buffers.keys()
    children = target._modules
    vars(target).update(
        training=source.training,
        _non_persistent_buffers_set=source._non_persistent_buffers_set | constants,
        _parameters={**source._parameters, **target._parameters},
        _buffers={**source._buffers, **target._buffers},
        _modules={},
    )
    for name, child in source._modules.items():
        if child is None:
            continue
        twin = children.get(name, seen.get(child))
        if twin is None and child.state_dict():
            twin = child
        if twin is not None:
            target._modules[name] = twin
            _mirror(child, twin, seen)
