"""The second front end: `torch.export`, for what symbolic tracing cannot take.

A model is exported in eval and in train mode, the second time in another dtype as well. What
differs between the two graphs depends on the mode or on the dtype, and is read from the module
(`merge`); what belongs to one call of a torch.nn layer becomes that layer again (`layers`).
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from demp_fx.tracing.layers import restore_layers
from demp_fx.tracing.lower import lower, prune
from demp_fx.tracing.merge import Version, merge
from demp_fx.tracing.module import left_out
from demp_fx.tracing.preserve import preserved
from demp_fx.tracing.regions import inference_as_no_grad
from demp_fx.tracing.source import first_line
from demp_fx.tracing.values import in_mode

# Batch sizes to export with: none that another dim has, so that it is not taken for the batch.
_BATCHES = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31)
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class FixedSizeError(Exception):
    """A size that was meant to be free is one number in the graph."""


class Exporter:
    """Exports one module once.

    Args:
        model: the module; it is left as it is.
        bound: the example inputs as arguments of its forward.

    Attributes:
        baked: see `TraceNotes`.
        constants: tensors that the graph reads and the model does not have, by name.
    """

    def __init__(self, model: nn.Module, bound: inspect.BoundArguments) -> None:
        self.model, self.bound = model, bound
        self.baked: dict[str, None] = {}
        self.constants: dict[str, Tensor] = {}
        floats = [(n, p.dtype) for n, p in model.named_parameters() if p.is_floating_point()]
        self.typical, self.dtype = floats[0] if floats else ("", torch.get_default_dtype())

    def trace(self) -> fx.Graph:
        """The graph of the model: it follows train() and eval(), and takes batches of any size,
        wherever the model can be exported so. Raises what torch.export raises where it cannot.
        """
        for name, value in self.bound.arguments.items():
            if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
                self.baked[f"argument `{name}` fixed at {value!r}"] = None
        given = self.bound.args, self.bound.kwargs
        before = dict(self.baked)
        try:
            graph = self._both_modes(_resized(given), free=True)
        except Exception as error:
            self.baked = before
            graph = self._both_modes(given, free=False)
            self.baked[f"sizes of the inputs fixed at the example's: {first_line(error)}"] = None
        prune(graph)
        for node in graph.nodes:  # what torch.export says of nodes cannot be pickled
            node.meta = {"source": node.meta["source"]}
        return graph

    def _both_modes(self, arguments: Arguments, free: bool) -> fx.Graph:
        """The graph of the mode that the model is in, merged with that of the other one. Free sizes
        are slow: the other graph does without at first, and takes the sizes of this one."""
        mode = self.model.training
        versions = {mode: self._version(arguments, free, mode, self.dtype)}
        self.constants = versions[mode].constants
        other = torch.float64 if self.dtype == torch.float32 else torch.float32
        for trial in (False, other), (free, self.dtype):
            try:
                versions[not mode] = self._version(arguments, trial[0], not mode, trial[1])
                return merge(versions[False], versions[True], self.typical)
            except Exception as error:
                reason = first_line(error)
        name = "train" if mode else "eval"
        self.baked[f"{name} mode followed wherever no layer of torch.nn does: {reason}"] = None
        return versions[mode].graph

    def _version(
        self, arguments: Arguments, free: bool, training: bool, dtype: torch.dtype
    ) -> Version:
        """The graph of one mode, with parameters of one dtype."""
        cast = pytree.tree_map_only(
            Tensor, lambda t: t.to(dtype) if t.dtype == self.dtype else t, arguments
        )
        with (
            preserved(self.model.modules()), in_mode(self.model, training), self._known_outputs(),
            _parameters_in(self.model, self.dtype, dtype), _quiet(), inference_as_no_grad(),
        ):  # fmt: skip
            program = torch.export.export(
                self.model, *cast, dynamic_shapes=_shapes(self.bound, cast, free), strict=False
            )
        if free:
            _check_batch(program)
        graph, constants = lower(program, self.model, self.bound)
        restore_layers(graph, self.model)
        prune(graph)
        return Version(graph, dtype, constants)

    @contextlib.contextmanager
    def _known_outputs(self) -> Iterator[None]:
        """Leave out of the model's output what no graph can return, such as a cache of keys."""

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            return pytree.tree_map_with_path(self._returnable, output)

        handle = self.model.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _returnable(self, path: Any, leaf: Any) -> Any:
        if leaf is None or isinstance(leaf, (Tensor, bool, int, float, str, torch.SymInt)):
            return leaf
        self.baked[left_out(pytree.keystr(path), leaf)] = None
        return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the graphs, traces and advice that torch.export prints on its way to an exception."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):  # fmt: skip
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _parameters_in(model: nn.Module, own: torch.dtype, dtype: torch.dtype) -> Iterator[None]:
    """Meanwhile blank parameters and buffers of another dtype stand where those of `own` do."""
    modules = list(model.modules()) if own != dtype else []
    tables: list[dict[str, Any]] = [t for m in modules for t in (m._parameters, m._buffers)]
    before = [dict(table) for table in tables]
    blanks: dict[int, Any] = {}
    try:
        for table in tables:
            for key, tensor in table.items():
                if tensor is None or tensor.dtype != own:
                    continue
                if id(tensor) not in blanks:
                    blank: Tensor = torch.empty_like(tensor, dtype=dtype, requires_grad=False)
                    if isinstance(tensor, nn.Parameter):
                        blank = nn.Parameter(blank, requires_grad=tensor.requires_grad)
                    blanks[id(tensor)] = blank
                table[key] = blanks[id(tensor)]
        yield
    finally:
        for table, saved in zip(tables, before, strict=True):
            table.update(saved)


def _resized(arguments: Arguments) -> Arguments:
    """The arguments with another batch size, where all tensors have the same first size."""
    tensors = [t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor)]
    if not all(t.dim() for t in tensors) or len({t.shape[:1] for t in tensors}) != 1:
        return arguments
    others = {n for t in tensors for n in t.shape[1:]}
    batch = next((b for b in _BATCHES if b not in others), _BATCHES[-1] + 2)

    def resize(t: Tensor) -> Tensor:
        return t.new_zeros((batch, *t.shape[1:]))

    resized: Arguments = pytree.tree_map_only(Tensor, resize, arguments)
    return resized


def _shapes(bound: inspect.BoundArguments, arguments: Arguments, free: bool) -> Any:
    """Which sizes are free: the batch, and all of tokens and masks; export may still fix them."""
    if not free:
        return None

    def dims(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return None
        count = min(t.dim(), 1) if t.is_floating_point() else t.dim()
        return dict.fromkeys(range(count), Dim.AUTO)

    args, kwargs = arguments
    values = bound.signature.bind(*args, **kwargs).arguments
    return pytree.tree_map(dims, dict(values))


def _check_batch(program: ExportedProgram) -> None:
    """Raise `FixedSizeError` where the first size of an input is a number in the graph: if code has
    made it one, that matters where it is the first size of all of them."""
    given = set(program.graph_signature.user_inputs)
    nodes = [n for n in program.graph.find_nodes(op="placeholder") if n.name in given]
    values = {n: n.meta.get("val") for n in nodes}
    firsts = {n: v.shape[0] for n, v in values.items() if isinstance(v, Tensor) and v.dim()}
    alike = len({size if isinstance(size, int) else size.node.hint for size in firsts.values()}) < 2
    for node, size in firsts.items():
        if isinstance(size, int) or (alike and is_concrete_int(size)):
            raise FixedSizeError(f"the forward needs {size} samples in {node.target}")
