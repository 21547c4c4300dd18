"""Verify: run the original and the rewritten module side by side, in float64, in both modes.

Where a kernel of the original knows no float64, both run in the dtype that they have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from demp_fx.errors import VerificationError
from demp_fx.inputs import ExampleInputs, Inputs
from demp_fx.passes.still import Still
from demp_fx.report.model import Verification

TOLERANCE = 1e-9  # relative, in float64; rounding alone stays below 1e-12
FOLDED = 16  # units of rounding of the parameters' own dtype, where constants were folded into them
ROUGH = 1000  # such units, where all is computed in that dtype

Precision = Literal["layers", "whole", "own"]


def verify(
    original: nn.Module, narrow: nn.Module, example_inputs: ExampleInputs, *,
    observed: bool = False, train: bool = True, folded: bool = False,
) -> Verification:  # fmt: skip
    """Compare two modules on `example_inputs` (or a calibration batch).

    Unless something was only `observed` on data, fresh inputs of another batch size are tried too.
    `folded`: parameters were computed anew, and are rounded to their dtype. Raises
    `VerificationError` where the two differ by more than the tolerance. Neither is changed.
    """
    coarse = max((torch.finfo(p.dtype).eps for p in narrow.parameters()
                  if p.is_floating_point()), default=0.0)  # fmt: skip
    tolerance = max(TOLERANCE, FOLDED * coarse if folded else 0.0)
    inputs = Inputs.of(example_inputs)
    trials = [inputs] if observed else [fresh(inputs, extra=1), inputs]
    errors: dict[bool, float | None] = {}
    batch = 0
    for training in (False, True) if train else (False,):
        errors[training] = None
        for trial in trials:
            expected, precision = _expected(original, trial, training)
            if expected is None:
                continue  # a batch size, or a mode, that the original itself does not take
            if precision == "own":
                tolerance = max(tolerance, ROUGH * coarse)
            try:
                found = run(narrow, trial, training, precision)
            except Exception as failure:
                sizes = [tuple(t.shape) for t in trial.tensors]
                raise VerificationError(
                    f"the narrow module does not take inputs of shape {sizes}, which the original "
                    f"takes: {failure}; nothing was handed over"
                ) from failure
            error = _difference(expected, found)
            if error > tolerance and training != narrow.training and followed_mode(narrow):
                break  # in this mode the original goes another way, which the trace has noted
            errors[training] = error
            batch = max(batch, trial.tensors[0].shape[0] if trial.tensors[0].dim() else 1)
            break
    result = Verification(
        eval_error=math.nan if errors[False] is None else errors[False],
        train_error=errors.get(True), tolerance=tolerance, batch=batch,
    )  # fmt: skip
    compared = {mode: error for mode, error in errors.items() if error is not None}
    if not compared:
        raise VerificationError("the original runs on none of these inputs: nothing was compared")
    for training, error in compared.items():
        if not error <= tolerance:
            raise VerificationError(
                f"the narrow module differs from the original in {'train' if training else 'eval'} "
                f"mode by {error:.1e} (relative, float64; tolerance {tolerance:.0e}); nothing was "
                "handed over"
            )
    return result


def followed_mode(narrow: nn.Module) -> list[str]:
    """The lines of the original's code that ask for the mode, and were traced in one of them."""
    notes = getattr(narrow, "meta", {}).get("demp_fx")
    return [line for line in notes.baked if line.endswith(" mode")] if notes else []


def _difference(expected: Any, found: Any) -> float:
    """As `difference`; infinite where there are other tensors."""
    same = len(_tensors(expected)) == len(_tensors(found))
    return difference(expected, found) if same else math.inf


def fresh(inputs: Inputs, extra: int = 0) -> Inputs:
    """Random inputs of the shapes of `inputs`, with `extra` more samples; integers are reused."""
    tensors = inputs.tensors
    batched = all(t.dim() for t in tensors) and len({t.shape[0] for t in tensors}) == 1
    generator = torch.Generator().manual_seed(0)

    def draw(t: Tensor) -> Tensor:
        size = t.shape[0] + extra if batched else t.shape[0] if t.dim() else 1
        if t.is_floating_point():
            shape = (size, *t.shape[1:]) if t.dim() else ()
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(t)
        return t[torch.arange(size, device=t.device) % t.shape[0]] if t.dim() else t

    return inputs.map(draw)


def _expected(original: nn.Module, inputs: Inputs, training: bool) -> tuple[Any, Precision]:
    """The original's output (None if it refuses these inputs), and how it was computed. It may look
    at the dtype of a layer's weights from outside: then all of them are in float64 at once."""
    ways: tuple[Precision, ...] = ("layers", "whole", "own")
    for precision in ways:
        try:
            return run(original, inputs, training, precision), precision
        except (RuntimeError, ValueError):
            continue
    return None, "own"


class _KeepFloat64(TorchDispatchMode):
    """Every float is float64, also where code asks for another dtype (norms that always compute in
    float32, grids of coordinates): rounding magnifies differences in the last digit."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.default = torch.get_default_dtype()

    def __enter__(self) -> Self:
        torch.set_default_dtype(torch.float64)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(self.default)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        dtype = kwargs.get("dtype")
        if dtype is not None and dtype.is_floating_point:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def run(module: nn.Module, inputs: Inputs, training: bool, precision: Precision = "layers") -> Any:
    """The output without gradients, randomness or a trace on the module.

    `precision`: in float64, "layers": one by one, "whole": all parameters at once; or in their
    "own" dtype.
    """
    double = precision != "own"
    if double:
        inputs = inputs.map(lambda t: t.to(torch.float64) if t.is_floating_point() else t)
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.train(training)
        with torch.no_grad(), ExitStack() as stack:
            stack.enter_context(_copies(module, precision))
            stack.enter_context(Still())
            if double:
                stack.enter_context(_KeepFloat64())
            return module(*inputs.args, **inputs.kwargs)
    finally:
        for m, mode in modes:
            m.training = mode


def difference(expected: Any, found: Any) -> float:
    """The largest difference between two outputs, relative to the largest number expected."""
    worst = 0.0
    for a, b in zip(_tensors(expected), _tensors(found), strict=True):
        if a.numel() == 0:
            continue
        if a.shape != b.shape:
            return math.inf
        a, b = a.to(torch.float64), b.to(torch.float64)
        scale = max(float(a.abs().max()), torch.finfo(torch.float64).tiny)
        error = float((a - b).abs().max()) / scale
        if math.isnan(error):
            return math.nan
        worst = max(worst, error)
    return worst


def _tensors(output: Any) -> list[Tensor]:
    """The tensors in an output; a graph may leave out what is none, such as a cache."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


@contextmanager
def _copies(module: nn.Module, precision: Precision) -> Iterator[None]:
    """Meanwhile every layer computes with copies of its parameters and buffers, in float64 unless
    in their "own" dtype.

    The copies live only while their layer runs, so that a large network is never held twice; those
    of a module that is no plain layer live until the end, and all of them unless by "layers".
    """
    dtype = None if precision == "own" else torch.float64
    with ExitStack() as stack:
        held = _held(module) if precision == "layers" else set(module.modules())
        for part in module.modules():
            if part in held:
                stack.enter_context(_swapped(part, dtype))
            elif part._parameters or part._buffers:
                for handle in _hooks(part, dtype):
                    stack.callback(handle.remove)
        yield


def _held(module: nn.Module) -> set[nn.Module]:
    """Modules whose tensors are used from outside of their own forward."""
    held: set[nn.Module] = {module}
    for part in module.modules():
        if any(part.children()) and (part._parameters or part._buffers):
            held |= set(part.modules()) if part is not module else {part}
    graph = getattr(module, "graph", None)
    for node in graph.nodes if graph is not None else ():
        if node.op == "get_attr":
            held.add(module.get_submodule(str(node.target).rpartition(".")[0]))
    return held


def _hooks(part: nn.Module, dtype: torch.dtype | None) -> list[Any]:
    open_: list[Any] = []

    def enter(*_: Any) -> None:
        context = _swapped(part, dtype)
        context.__enter__()
        open_.append(context)

    def leave(*_: Any) -> None:
        open_.pop().__exit__(None, None, None)

    return [
        part.register_forward_pre_hook(enter, prepend=True),
        part.register_forward_hook(leave, always_call=True),
    ]


@contextmanager
def _swapped(part: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Copies in a module's own tables; buffers come back as they were, not as updated."""
    tables: list[dict[str, Any]] = [part._parameters, part._buffers]
    before = [dict(table) for table in tables]
    copy: Callable[[Tensor], Tensor] = lambda t: (  # noqa: E731
        t.detach().to(dtype if t.is_floating_point() else None, copy=True)
    )
    try:
        for table in tables:
            for key, tensor in table.items():
                # a constant of the code is one of the original as well, and is not converted there
                if tensor is not None and not key.startswith("_tensor_constant"):
                    table[key] = copy(tensor)
        yield
    finally:
        for table, saved in zip(tables, before, strict=True):
            table.update(saved)
