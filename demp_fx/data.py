"""Example inputs and calibration data as they are named on the command line."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from demp_fx.errors import UsageError
from demp_fx.inputs import ExampleInputs, Inputs
from demp_fx.loading import Loaded, read_tensors, where

BATCH = 256
_SPEC = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")


def example_inputs(loaded: Loaded, specs: Sequence[str]) -> ExampleInputs:
    """Inputs made to the `--input` specs, or the `example_inputs` of the model's file."""
    if specs:
        return _arguments(loaded, specs)
    found = loaded.example_inputs()
    if found is None:
        raise UsageError(
            "what goes into the model is not known: pass --input (for instance 1x3x224x224), "
            "or define `example_inputs` in the model's file"
        )
    if not isinstance(found, (torch.Tensor, tuple, list, Mapping)):
        raise UsageError(f"example_inputs is a {type(found).__name__}: a tensor, tuple or dict")
    return found


def _arguments(loaded: Loaded, specs: Sequence[str]) -> ExampleInputs:
    parsed = [_parse(spec, loaded.dtype) for spec in specs]
    if all(name is None for name, _ in parsed):
        tensors = tuple(tensor for _, tensor in parsed)
        return tensors[0] if len(tensors) == 1 else tensors
    # what has no name of its own takes the names of the forward's arguments, in order
    taken = {name for name, _ in parsed}
    arguments = inspect.signature(loaded.model.forward).parameters
    free = iter([name for name in arguments if name not in taken])
    named = {name or next(free, ""): tensor for name, tensor in parsed}
    if not set(named) <= set(arguments):
        raise UsageError(f"--input: the forward takes {', '.join(arguments) or 'nothing'}")
    return named


def _parse(spec: str, floating: torch.dtype) -> tuple[str | None, torch.Tensor]:
    """`[name=]1x3x32x32[:dtype]` as a name and a tensor of random numbers."""
    match = _SPEC.fullmatch(spec)
    dtype = getattr(torch, match["dtype"], None) if match and match["dtype"] else floating
    if match is None or not isinstance(dtype, torch.dtype):
        raise UsageError(f"--input {spec}: expected [name=]1x3x224x224[:dtype], as mask=1x16:bool")
    shape = [int(size) for size in match["shape"].split("x")]
    random = torch.Generator().manual_seed(0)
    if dtype.is_floating_point or dtype.is_complex:
        return match["name"], torch.randn(shape, generator=random, dtype=dtype)
    if dtype is torch.bool:  # a mask that hides nothing
        return match["name"], torch.ones(shape, dtype=dtype)
    # indices that any table of two rows or more has
    return match["name"], torch.randint(0, 2, shape, generator=random, dtype=dtype)


def load_calibration(path: Path, loaded: Loaded) -> list[ExampleInputs]:
    """Batches of at most 256 inputs from a .pt, .npy, .npz or .safetensors file.

    Several named arrays are the forward's arguments of these names.
    """
    if not path.exists():
        raise UsageError(f"there is no file {path}")
    data = _read(path)
    if isinstance(data, (list, tuple)):
        return [batch for item in data for batch in _batches(item, loaded, path)]
    return _batches(data, loaded, path)


def _read(path: Path) -> Any:
    if path.suffix not in (".npy", ".npz"):
        return read_tensors(path)
    try:
        data = np.load(path, allow_pickle=False)
        if isinstance(data, np.ndarray):
            return torch.from_numpy(data)
        return {name: torch.from_numpy(data[name]) for name in data.files}
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def _batches(data: Any, loaded: Loaded, path: Path) -> list[ExampleInputs]:
    tensors = data if isinstance(data, dict) else {"": data}
    if not tensors or not all(isinstance(t, torch.Tensor) and t.ndim for t in tensors.values()):
        raise UsageError(f"{path} does not hold tensors: one, a list of batches, or one by name")
    arguments = inspect.signature(loaded.model.forward).parameters
    if len(tensors) > 1 and not set(tensors) <= set(arguments):
        raise UsageError(
            f"{path} holds {', '.join(sorted(tensors))}; the forward takes {', '.join(arguments)}"
        )
    if len({len(tensor) for tensor in tensors.values()}) > 1:
        raise UsageError(f"{path}: its arrays are not of one length")
    cast = {k: t.to(loaded.dtype) if t.is_floating_point() else t for k, t in tensors.items()}
    pieces = {name: tensor.split(BATCH) for name, tensor in cast.items()}
    count = len(next(iter(pieces.values())))
    named: list[ExampleInputs] = [{k: p[i] for k, p in pieces.items()} for i in range(count)]
    return named if len(tensors) > 1 else [piece for parts in pieces.values() for piece in parts]


def check_forward(model: nn.Module, inputs: ExampleInputs, what: str) -> None:
    """Run the model once as it is, so that inputs that do not fit are told from the rest."""
    call = Inputs.of(inputs)
    modes = {module: module.training for module in model.modules()}
    model.eval()  # statistics of a batch are not to be touched
    try:
        with torch.no_grad():
            model(*call.args, **call.kwargs)
    except Exception as error:
        shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in call.tensors)
        raise UsageError(
            f"the model does not take {what} ({shapes}){where(error)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
