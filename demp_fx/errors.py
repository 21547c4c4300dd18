"""What can go wrong, as exceptions that carry the exit code of the command line."""

from __future__ import annotations


class DempError(Exception):
    """Base of every error that demp_fx raises on purpose: its text is meant for the user."""

    exit_code = 1


class UsageError(DempError):
    """What was handed in cannot be used: a file, a shape, weights, an output folder."""

    exit_code = 2


class TraceError(DempError):
    """The model's forward could not be turned into a graph."""

    exit_code = 3


class VerificationError(DempError):
    """The rewritten module does not compute what the original computes; it was not handed over."""

    exit_code = 4


class EmitError(DempError):
    """The result could not be written as files."""

    exit_code = 5


class DivergedError(DempError):
    """The training diverged: the loss is no number any more."""

    exit_code = 6
