"""Each network in a process of its own: clean figures, and a crash or hang costs one row's part.

Children are forked from a process that has imported and warmed up everything, so that neither
imports nor first calls are timed. They send what they find at once; what was sent stays.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

Found = dict[str, Any]
Work = Callable[[Callable[[Found], None]], None]


@dataclass(frozen=True)
class Task:
    """Work to be done under a key, within a limit in seconds."""

    key: Any
    work: Work
    limit: float


@dataclass
class _Running:
    task: Task
    process: BaseProcess
    receiver: connection.Connection
    deadline: float
    found: Found


def run(tasks: list[Task], jobs: int) -> Iterator[tuple[Any, Found]]:
    """Yield each task's key and findings when it ends, `jobs` at a time.

    A task that was ended has the reason under "error".
    """
    waiting, running = list(tasks), list[_Running]()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_start(waiting.pop(0)))
        soonest = min(r.deadline for r in running) - time.monotonic()
        connection.wait([r.receiver for r in running], timeout=max(soonest, 0.0))
        for r in list(running):
            if _has_ended(r):
                running.remove(r)
                yield r.task.key, r.found


def _start(task: Task) -> _Running:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(task.work, sender), daemon=True)
    process.start()
    sender.close()
    return _Running(task, process, receiver, time.monotonic() + task.limit, {})


def _child(work: Work, sender: connection.Connection) -> None:
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, sys.stdout.fileno())
    os.dup2(quiet, sys.stderr.fileno())
    work(sender.send)
    sender.close()


def _has_ended(r: _Running) -> bool:
    while r.receiver.poll():
        try:
            r.found.update(r.receiver.recv())
        except EOFError:
            r.process.join()
            code = r.process.exitcode or 0
            if code:
                reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                r.found.setdefault("error", f"the process died: {reason}")
            return True
    if time.monotonic() < r.deadline:
        return False
    r.process.kill()
    r.process.join()
    r.found.setdefault("error", f"not done after {r.task.limit:.0f} s")
    return True
