"""Locks on open files, which the system lets go where the process ends."""

from __future__ import annotations


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
