"""What code asks of a value before it uses it: whether it is a tensor, whether it can be called.

While a model is traced, the proxy of a tensor or of a size answers as that would.
"""

from __future__ import annotations

import builtins
import numbers
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn

from demp_fx.tracing.proxies import KnownAttribute, KnownProxy, TensorProxy

_is_a = isinstance
# Where torch asks on behalf of a model's code, or is a part of it.
_FOR_OTHERS = ("torch._jit_internal", "torch.ao.pruning.")
# How Python's own packages ask whether a size is a number.
_NUMBERS = {numbers.Number, numbers.Complex, numbers.Real, numbers.Rational, numbers.Integral}
_PROXIES = {KnownProxy: Tensor, KnownAttribute: Tensor, TensorProxy: nn.Parameter}


def _isinstance(value: Any, kinds: Any) -> bool:
    """`isinstance`, of which torch's own code gets the plain answer: it has a way for proxies.
    (Torch's C++ would take a proxy whose `__class__` is `Tensor` for one, and crash.)"""
    if _is_a(value, kinds):
        return True
    if type(value) not in _PROXIES:
        return False
    if kinds in _NUMBERS:
        return _is_a(value.known(), kinds)
    if not issubclass(_PROXIES[type(value)], kinds):
        return False
    asks = sys._getframe(1).f_globals.get("__name__", "")
    of_buffers = kinds is Tensor and asks == nn.Module.__module__  # older ones know of no proxies
    plain = asks.startswith("torch.") and not asks.startswith(_FOR_OTHERS) and not of_buffers
    return not plain and _is_a(value.known(), Tensor)


@contextmanager
def proxies_are_tensors() -> Iterator[None]:
    """Meanwhile a tensor's proxy is an instance of `Tensor`, and is not `callable`."""
    plain: Any = builtins
    call = fx.Proxy.__call__
    plain.isinstance = _isinstance
    del fx.Proxy.__call__
    try:
        yield
    finally:
        plain.isinstance = _is_a
        fx.Proxy.__call__ = call  # type: ignore[method-assign]
