"""Locks on open files, which the system lets go where the process ends."""

from __future__ import annotations

import os
from pathlib import Path


def locked(file: int, wait: bool) -> bool:
    """Take the lock of an open file for this process; return False where another has it and `wait` is not asked for.

    Where files cannot be locked (by this system, or this file system), everybody has it.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def abandoned(place: Path) -> bool:
    """Return whether no process holds the lock of a file or folder; False where that cannot be asked."""
    try:
        import fcntl

        file = os.open(place, os.O_RDONLY)
    except (ModuleNotFoundError, OSError):
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: those who ask do not meet
    except OSError:
        return False
    finally:
        os.close(file)
    return True
