"""The two ways a command can fail: the input was wrong, or the run went wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedsimError(Exception):
    """Base of every error that fedsim raises on purpose; the command line prints it without a traceback."""

    exit_code = 1


class InputError(FedsimError):
    """The input cannot be used. The message says where, what was given and what is needed (exit code 2).

    `placed` says that the message names the file and line already.
    """

    exit_code = 2
    placed = False


class Unsupported(InputError):
    """A combination that has no meaning or no implementation: says which part lacks what."""


class RunError(FedsimError):
    """A run that started and failed (exit code 1)."""


class Diverged(RunError):
    """A state that is no longer finite or left every sensible bound; says at which event it was noticed."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


class Stopped(RunError):
    """All ranks stopped together after a checkpoint, because one was asked to (SIGTERM, Ctrl-C)."""
