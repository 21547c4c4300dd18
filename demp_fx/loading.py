"""Models and weights as they are named on the command line."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from demp_fx.errors import UsageError

_SHOWN = 5


@dataclass(frozen=True)
class Loaded:
    """A model, and the module that it came from."""

    model: nn.Module
    home: ModuleType
    stem: str

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that its parameters have."""
        dtypes = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(dtypes, torch.get_default_dtype())

    def example_inputs(self) -> Any:
        """`example_inputs` of the model's file, called if it is a function; None if not there."""
        found = getattr(self.home, "example_inputs", None)
        if callable(found) and not isinstance(found, torch.Tensor):
            with _folder_of(self.home):
                found = users(found, "example_inputs()")
        return found


def load_model(spec: str) -> Loaded:
    """The model that `spec` names.

    `model.py` (its `model`: a module, or a function or class that makes one), `model.py:name` or
    `package.module:name`.
    """
    found, home, name, place = _named(spec)
    if not isinstance(found, nn.Module):
        raise UsageError(f"`{name}` of {place} gives a {type(found).__name__}, not an nn.Module")
    return Loaded(found, home, Path(place).stem if _is_file(place) else place.rpartition(".")[2])


def load_object(spec: str) -> Any:
    """Whatever `spec` names, in the same ways as a model; what can be called is called."""
    return _named(spec)[0]


def _named(spec: str) -> tuple[Any, ModuleType, str, str]:
    """What a spec names, the module that it is from, its name, and the place of the module."""
    place, colon, name = spec.rpartition(":")
    if not colon or not name.isidentifier():
        place, name = spec, "model"
    home = _import_file(Path(place)) if _is_file(place) else _import_package(place)
    if not hasattr(home, name):
        raise UsageError(f"{place} has no `{name}`{_suggestion(place, home)}")
    found = getattr(home, name)
    if callable(found) and not isinstance(found, nn.Module):
        with _folder_of(home):
            found = users(found, f"{name}() of {place}")
    return found, home, name, place


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place or Path(place).is_file()


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"{path} is a folder" if path.is_dir() else f"there is no file {path}")
    path = path.resolve()
    # a name of its own, so that the user's `torch.py` or `test.py` shadows nothing
    name = f"_model_{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file")
    home = importlib.util.module_from_spec(spec)
    sys.modules[name] = home
    with _folder_of(home):
        try:
            users(lambda: spec.loader.exec_module(home), str(path))  # type: ignore[union-attr]
        except UsageError:
            del sys.modules[name]
            raise
    return home


def _import_package(place: str) -> ModuleType:
    with _on_path(Path.cwd()):
        try:  # what is above it is imported on the way
            missing = users(lambda: importlib.util.find_spec(place), place) is None
        except UsageError as error:
            missing = _is_not_there(place, error.__cause__)
            if not missing:
                raise
        if missing:
            raise UsageError(f"there is no file and no package '{place}'")
        module = users(lambda: importlib.import_module(place), place)
    assert isinstance(module, ModuleType)
    return module


def _is_not_there(place: str, error: BaseException | None) -> bool:
    """Whether an import failed for want of `place` or a package that it is in, not of another."""
    if isinstance(error, ModuleNotFoundError):
        return f"{place}.".startswith(f"{error.name}.")
    return isinstance(error, ValueError)


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _folder_of(home: ModuleType) -> contextlib.AbstractContextManager[None]:
    """The folder of a model's file on the import path, for what stands beside it."""
    file = home.__file__
    return _on_path(Path(file).parent) if file else contextlib.nullcontext()


def users(function: Callable[[], Any], what: str) -> Any:
    """`function()`, with what goes wrong in the user's code told by file and line."""
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise UsageError(f"{what} failed{where(error)}: {type(error).__name__}: {error}") from error


def where(error: BaseException) -> str:
    """The last line of the user's own on the way to the error, as ' at file:line'."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if _theirs(f.filename)]
    return f" at {theirs[-1].filename}:{theirs[-1].lineno}" if theirs else ""


def _theirs(file: str) -> bool:
    others = ("site-packages", "dist-packages", "lib/python3.", str(Path(__file__).parent))
    return not file.startswith("<") and not any(other in file for other in others)


def _suggestion(place: str, home: ModuleType) -> str:
    """What the file holds that could be meant."""
    own = {k: v for k, v in vars(home).items() if getattr(v, "__module__", None) == home.__name__}
    made = [k for k, v in vars(home).items() if isinstance(v, nn.Module)]
    classes = [k for k, v in own.items() if isinstance(v, type) and issubclass(v, nn.Module)]
    functions = [k for k, v in own.items() if not isinstance(v, (type, nn.Module)) and callable(v)]
    names = [k for k in [*made, *functions, *classes] if not k.startswith("_")][:_SHOWN]
    hint = ", or name one of its own: " + ", ".join(f"{place}:{k}" for k in names) if names else ""
    return f": define a module-level `model`{hint}"


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a .safetensors file, or a .pt file of tensors, into the model, strictly."""
    weights = read_tensors(path)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
    if not isinstance(weights, dict):
        raise UsageError(f"{path} holds a {type(weights).__name__}, not a state_dict")
    own = model.state_dict()
    weights = _without_prefix(weights, list(own))
    shapes = [
        f"{key} {tuple(weights[key].shape)} in the file, {tuple(value.shape)} in the model"
        for key, value in own.items()
        if isinstance(weights.get(key), torch.Tensor) and weights[key].shape != value.shape
    ]
    wrong = [
        _listing("missing", [key for key in own if key not in weights]),
        _listing("unexpected", [str(key) for key in weights if key not in own]),
        _listing("of another shape", shapes),
    ]
    if any(wrong):
        raise UsageError(f"{path} does not fit the model:" + "".join(wrong))
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"{path} does not fit the model: {error}") from error


def _without_prefix(weights: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Weights by the names of the model, where all are behind one prefix: that of a wrapper, such
    as DataParallel's `module.` or that of `torch.compile`."""
    first = next(iter(names), "")
    keys = [str(key) for key in weights]
    for prefix in {key.removesuffix(first) for key in keys if first and key.endswith(first)}:
        if {key for key in keys if key.startswith(prefix)} == {prefix + name for name in names}:
            return {str(key).removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _listing(what: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"\n  {what}: {', '.join(keys[:_SHOWN])}{more}"


def read_tensors(path: Path) -> Any:
    """What a .safetensors, .pt, .pth or .bin file holds; tensors and containers only, no code."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()
        if "weights_only" in str(error):
            raise UsageError(
                f"{path} does not hold tensors alone, as torch.save(model.state_dict(), ...) does; "
                "what else it holds could be code, and is not run"
            ) from error
        raise UsageError(f"{path} cannot be read: {reason[0] if reason else error!r}") from error
