"""A leaf of the graph, such as a convolution, as the constructor call that builds it."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import itertools
import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from demp_fx.errors import EmitError

_SCALARS = (bool, int, float, complex, str, type(None), torch.dtype)
_NAMES = {
    "import_module": importlib.import_module,
    "torch": torch,
    "nn": nn,
    "inf": math.inf,
    "nan": math.nan,
}


def constructor(leaf: nn.Module, path: str) -> str:
    """The call that builds a module like `leaf`, checked by building one."""
    name = _class_name(leaf, path)
    if any(module._forward_hooks or module._forward_pre_hooks for module in leaf.modules()):
        raise EmitError(
            f"'{path}' ({name}) has hooks, which no file can hold: remove them (for weight or "
            "spectral norm, torch.nn.utils.remove_weight_norm and its like) and compile again"
        )
    for call in _calls(leaf, name):
        if _builds(call, leaf):
            return call + _conversions(leaf, path)
    raise EmitError(
        f"no constructor call was found that builds '{path}' ({name}) as it is; "
        "use the module that demp_fx.compile returns instead of files"
    )


def _class_name(leaf: nn.Module, path: str) -> str:
    """How generated code names the leaf's class: `nn.Conv2d`, a dotted path inside torch, or what
    another installed package has."""
    kind = type(leaf)
    if getattr(nn, kind.__name__, None) is kind:
        return f"nn.{kind.__name__}"
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__.partition(".")[0] == "torch":
        found: Any = torch
        for part in name.split(".")[1:]:
            found = getattr(found, part, None)
        if found is kind:
            return name
    if installed(kind.__module__):
        home = importlib.import_module(kind.__module__)
        if getattr(home, kind.__qualname__, None) is kind:
            return f"import_module({kind.__module__!r}).{kind.__qualname__}"
    raise EmitError(
        f"'{path}' is a {name}, a class of your own that module.py could not import; "
        "use the module that demp_fx.compile returns instead of files"
    )


def _calls(leaf: nn.Module, name: str) -> Iterator[str]:
    """Constructor calls to try: by the class's signature, then what the leaf prints of itself."""
    arguments, silent = [], []
    for parameter in inspect.signature(type(leaf)).parameters.values():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if not named or parameter.name in ("device", "dtype"):
            continue
        default = parameter.default
        if not hasattr(leaf, parameter.name):
            if isinstance(default, bool):
                silent.append(f"{parameter.name}={not default}")
            continue
        value = getattr(leaf, parameter.name)
        # `bias=True` is kept as the parameter that it made
        if isinstance(value, torch.Tensor) or (value is None and isinstance(default, bool)):
            value = value is not None
        if default is parameter.empty:
            arguments.append(repr(value))
        # `stride=1` is kept as (1, 1)
        elif not _same(value, default) and not (isinstance(value, tuple) and {*value} == {default}):
            arguments.append(f"{parameter.name}={value!r}")
    yield f"{name}({', '.join(arguments)})"
    yield f"{name}({leaf.extra_repr()})"
    # flags that left no attribute behind, such as MultiheadAttention's `bias`
    for count in range(1, len(silent) + 1):
        for flags in itertools.combinations(silent[:4], count):
            yield f"{name}({', '.join([*arguments, *flags])})"


def _builds(call: str, leaf: nn.Module) -> bool:
    """Whether `call` builds a module of the leaf's class, settings and shapes."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = eval(call, dict(_NAMES))
    except Exception:  # a wrong guess fails in any way it likes; the caller tries the next
        return False
    return (
        list(map(type, twin.modules())) == list(map(type, leaf.modules()))
        and _shapes(twin) == _shapes(leaf)
        and all(map(_like, twin.modules(), leaf.modules()))
    )


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    parameters = module.named_parameters(remove_duplicate=False)
    buffers = module.named_buffers(remove_duplicate=False)
    return {name: tensor.shape for name, tensor in (*parameters, *buffers)}


def _like(twin: nn.Module, module: nn.Module) -> bool:
    """Whether every plain setting of `twin` has the same value in `module`."""
    ours, theirs = vars(twin), vars(module)
    return all(
        name in theirs and _same(value, theirs[name])
        for name, value in ours.items()
        if name != "training" and _plain(value)
    )


def _plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_plain(item) for item in value)
    return isinstance(value, _SCALARS)


def _same(a: object, b: object) -> bool:
    return _plain(a) and _plain(b) and repr(a) == repr(b)


def _conversions(leaf: nn.Module, path: str) -> str:
    """What to call on the new module for its dtype and `requires_grad` to be the leaf's."""
    text = ""
    tensors = [*leaf.parameters(), *leaf.buffers()]
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    if len(dtypes) > 1 or any(tensor.is_complex() for tensor in tensors):
        raise EmitError(f"'{path}' mixes the dtypes {', '.join(sorted(map(str, dtypes)))}")
    if dtypes - {torch.float32}:
        text += f".to({dtypes.pop()})"
    if tensors and not any(parameter.requires_grad for parameter in leaf.parameters()):
        text += ".requires_grad_(False)"
    return text


def installed(home: str) -> bool:
    """Whether a module comes with Python or an installed package other than this one."""
    top = home.partition(".")[0]
    if top in ("demp_fx", "__main__"):
        return False
    return top in sys.stdlib_module_names or top in importlib.metadata.packages_distributions()
