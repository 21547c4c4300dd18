"""torchvision for its networks alone: importable beside a torch that it was not built for.

Its compiled operators do not load then, and its import registers fake kernels for two of them.
Declaring their schemas first is all that the import asks for; no network of the zoo calls either.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch


def _compiled_operators_load() -> bool:
    """Whether torchvision's own library of operators fits this torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the zoo needs torchvision: pip install --no-deps torchvision")
    for path in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(path)
        except OSError:
            continue
        return True
    return False


if not _compiled_operators_load():
    schemas = torch.library.Library(
        "torchvision", "FRAGMENT"
    )  # dropped with this module, not before
    for name in ("nms", "qnms"):
        schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import torchvision  # noqa: E402  (the schemas come first)

__all__ = ["torchvision"]
