"""Meta twins: run a module on shapes alone, and for real where an op has no shape-only form."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from demp_fx.channels.writes import memory_of
from demp_fx.errors import UsageError


def on_zeros(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The shapes of a result that has no meta kernel: run for real, on zeros; on ones, where those
    are refused, as lengths and windows are. Of what a mask picks from, all is taken to be there."""

    def run(fill: Callable[..., Tensor]) -> Any:
        def real(t: Tensor) -> Tensor:
            made = torch.ones_like if t.dtype == torch.bool else fill
            return made(t, device="cpu") if t.is_meta else t

        given = pytree.tree_map_only(Tensor, real, (args, kwargs))
        return as_meta(function(*given[0], **given[1]))

    try:
        return run(torch.zeros_like)
    except Exception:
        return run(torch.ones_like)


def as_meta(value: Any) -> Any:
    """The value with all its tensors on meta; what is known of one goes with it."""

    def twin(t: Tensor) -> Tensor:
        if t.is_meta:
            return t
        blank = torch.empty_like(t, device="meta")
        t.__dict__["memory"] = memory_of(t)
        blank.__dict__ = t.__dict__  # what is known of one is known of the other
        return blank

    return pytree.tree_map_only(Tensor, twin, value)


def placeholder(node: fx.Node, feed: Iterator[Any], kwargs: dict[str, Any]) -> Any:
    if str(node.target) in kwargs:
        return kwargs[str(node.target)]
    try:
        return next(feed)
    except StopIteration:
        if node.args:
            return node.args[0]
        raise UsageError(f"the example inputs have no value for {node.target!r}") from None


Twins = tuple[dict[int, tuple[str, Tensor]], Callable[[], AbstractContextManager[None]]]


@contextmanager
def on_meta(graph: fx.GraphModule) -> Iterator[Twins]:
    """Swap every parameter and buffer for a meta twin, and all modules to eval mode, meanwhile.

    Yields id(twin) -> (name, real tensor), and a context in which the real ones are back (of
    buffers copies, as code may write into them). Twins of tied tensors are one, under the first
    name. TorchScript lets nobody swap what is in it.
    """
    twins: dict[int, Tensor] = {}
    names: dict[int, tuple[str, Tensor]] = {}
    modules = [
        (name, module)
        for name, module in graph.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    saved = [(m, dict(m._parameters), dict(m._buffers), m.training) for _, m in modules]

    def restore() -> None:
        for module, parameters, buffers, _ in saved:
            module._parameters.update(parameters)
            module._buffers.update(buffers)

    def swap() -> None:
        for prefix, module in modules:
            _swap(prefix, module, twins, names)

    @contextmanager
    def real() -> Iterator[None]:
        restore()
        for module, _, buffers, _ in saved:
            module._buffers.update({k: b if b is None else b.clone() for k, b in buffers.items()})
        try:
            yield
        finally:
            restore()
            swap()

    try:
        swap()
        for _, module in modules:
            vars(module)["training"] = False  # what torch does, at a tenth of the time
        yield names, real
    finally:
        restore()
        for module, _, _, training in saved:
            vars(module)["training"] = training


def _swap(
    prefix: str,
    module: nn.Module,
    twins: dict[int, Tensor],
    names: dict[int, tuple[str, Tensor]],
) -> None:
    for table in (module._parameters, module._buffers):
        for key, real in table.items():
            if real is None:
                continue
            twin = twins.get(id(real))
            if twin is None:
                twin = torch.empty_strided(
                    real.shape, real.stride(), dtype=real.dtype, device="meta"
                )
                twins[id(real)] = twin
                names[id(twin)] = (f"{prefix}.{key}" if prefix else key, real)
            table[key] = twin  # type: ignore[assignment]


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection meanwhile: a full one looks at all that torch has loaded, which takes
    longer than the walk over a large network, and finds nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
