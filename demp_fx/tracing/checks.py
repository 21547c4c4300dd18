"""Checks in a model's code, such as `assert x.isfinite().all()`: what way they go where they pass.

Read from the bytecode: of the two ways that a conditional jump can go, one always ends in a raise.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Mapping
from typing import Any

# Between a value that is asked whether it is true and the jump that depends on it.
_BETWEEN = {"PRECALL", "TO_BOOL", "EXTENDED_ARG", "UNARY_NOT"}
_ENDS = ("RETURN", "YIELD", "RERAISE", "FOR_ITER", "SEND")
_STORES = ("STORE_", "POP_TOP", *_ENDS)

Code = Mapping[int, tuple[dis.Instruction, int]]  # by offset: what is there, and what is behind it


def passing(frame: types.FrameType) -> bool | None:
    """What the value that `frame` asks now must be for a check to pass; None where either value may
    do, or somebody may catch what is raised."""
    code = _instructions(frame.f_code)
    at, wanted = frame.f_lasti, True
    while "JUMP" not in (name := code[at][0].opname):
        if at != frame.f_lasti and name not in _BETWEEN:
            return None
        wanted ^= name == "UNARY_NOT"
        at = code[at][1]
    taken = _taken(frame.f_code, at)
    return None if taken is None else taken == wanted


def is_checked(frame: types.FrameType) -> bool:
    """Whether what `frame` calls now is only looked at by a check."""
    code, at = _instructions(frame.f_code), frame.f_lasti
    while "IF_" not in (name := code[at][0].opname):
        if name.startswith((*_STORES, "RAISE")) or "JUMP" in name:
            return False
        at = code[at][1]
    return _taken(frame.f_code, at) is not None


def _taken(source: types.CodeType, at: int) -> bool | None:
    """The value with which the jump at an offset goes where nothing is raised; None where both ways
    do so. (What an `or` asks next may be left out: its ways are no others.)"""
    code = _instructions(source)
    jump, behind = code[at]
    if not jump.opname.endswith(("IF_TRUE", "IF_FALSE")) or _is_caught(source, at):
        return None
    if_true = jump.opname.endswith("IF_TRUE")
    ways = {if_true: jump.argval, not if_true: behind}
    for passed in (None, *ways.values()):
        raising = [v for v, way in ways.items() if way != passed and _raises(code, way, passed)]
        if len(raising) == 1:
            return not raising[0]
    return None


def _raises(code: Code, at: int, passed: int | None, seen: frozenset[int] = frozenset()) -> bool:
    """Whether every way from an offset ends in a raise, or else comes to where the check is
    `passed` without doing more than asking."""
    while at != passed:
        if at not in code or at in seen:
            return False
        seen |= {at}
        instruction, behind = code[at]
        name = instruction.opname
        if name == "RAISE_VARARGS":
            return True
        if name.startswith(_ENDS if passed is None else _STORES):
            return False
        if "JUMP" in name:
            if "IF_" in name and not _raises(code, behind, passed, seen):
                return False
            behind = instruction.argval
        at = behind
    return True


def _is_caught(source: types.CodeType, at: int) -> bool:
    """Whether an `except` or `finally` of the function itself may get what is raised there."""
    code = _instructions(source)
    bytecode: Any = dis.Bytecode(source)  # typeshed does not list its exception table
    for entry in bytecode.exception_entries:
        if entry.start <= at < entry.end:
            handler = code[code[entry.target][1]][0].opname
            if handler != "WITH_EXCEPT_START":
                return True
    return False


@functools.lru_cache(maxsize=64)
def _instructions(source: types.CodeType) -> Code:
    """By offset, those of what an instruction keeps behind itself included: a frame may say that it
    is there while it calls."""
    listed = list(dis.get_instructions(source))
    ends = [*(i.offset for i in listed[1:]), len(source.co_code)]
    return {
        offset: (i, end)
        for i, end in zip(listed, ends, strict=True)
        for offset in range(i.offset, end, 2)
    }
