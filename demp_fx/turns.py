"""One thread at a time: tracing and comparing change what is torch's own, for the whole process
(the methods that torch.fx patches, the default dtype, the collection of garbage)."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_TURN = threading.RLock()


def in_turn(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which waits for other threads to leave all functions that are `in_turn`."""

    @functools.wraps(function)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> T:
        with _TURN:
            return function(*args, **kwargs)

    return waiting
