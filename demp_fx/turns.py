"""What goes on around the work of demp_fx does not change it.

Tracing and comparing change what is torch's own, for the whole process (the methods that torch.fx
patches, the default dtype, the collection of garbage), so one thread works at a time. And they are
done as if outside of what the caller has entered: autocast, inference mode, a default device.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

_TURN = threading.RLock()
_DEVICES = ("cpu", "cuda", "mps", "xpu")
_defaults: list[torch.device] = []  # what in_turn has set aside


def in_turn(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, which waits for other threads to leave all functions that are `in_turn`, and runs
    outside of autocast and of inference mode, with the CPU as the default device."""

    @functools.wraps(function)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> T:
        with _TURN, ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            for device in filter(torch.is_autocast_enabled, _DEVICES):
                stack.enter_context(torch.autocast(device, enabled=False))
            default = torch.empty(0).device  # get_default_device misses contexts in torch 2.6
            if default.type != "cpu":
                _defaults.append(default)
                stack.callback(_defaults.pop)
                stack.enter_context(torch.device("cpu"))
            return function(*args, **kwargs)

    return waiting


def default_device() -> AbstractContextManager[Any]:
    """For the user's own code: what `in_turn` has set aside is the default device again."""
    return _defaults[-1] if _defaults else nullcontext()
