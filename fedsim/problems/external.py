"""A user's own black box: a Python function, or a command that reads a point and prints a value."""

from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fedsim import registry
from fedsim.errors import InputError, RunError
from fedsim.problems.black_box import BlackBox, Noise
from fedsim.problems.problem import Nodes

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Evaluate = Callable[[NDArray[np.float64], int], float]
SHOWN = 10  # coordinates of a point in an error


@dataclass(frozen=True)
class FunctionParameters:
    """Your function `f(x, node) -> float`, x float64 `[dim]` in your own units.

    Attributes:
        function: `file.py:name` beside the scenario, or `package.module:name`, beside it or installed.
        dim: length of x. lower, upper: the box, one number for all coordinates or a list `[dim]`.
        start: where to start, in your units; default: the middle of the box.
        workers: processes that evaluate side by side; 1: in this one.
        noise: standard deviation of what is added to every query.
    """

    needs_data: ClassVar[bool] = False
    function: str
    dim: Count
    lower: float | list[float] = 0.0
    upper: float | list[float] = 1.0
    start: list[float] | None = None
    workers: Count = 1
    noise: Noise = 0.0

    def problem(self, n: int, seed: int, base: Path) -> OwnBlackBox:
        """Return the problem; the function is looked up now."""
        if ":" not in self.function:
            raise InputError(
                f"problem.function: {self.function!r} given; package.module:name or file.py:name is needed"
            )
        try:
            found = registry.find("problem", self.function, base)
        except InputError as error:
            raise InputError(f"problem.function: {str(error).removeprefix('problem.kind: ')}") from error.__cause__
        if not callable(found):
            raise InputError(f"problem.function: {self.function} is no function")
        if self.workers == 1:
            return OwnBlackBox(self, n, partial(_call, found, self.function), processes=False)
        return OwnBlackBox(self, n, partial(_call_in_worker, self.function, str(base)), processes=True)


@dataclass(frozen=True)
class CommandParameters:
    """A command that reads a point from its input, one number a line, and prints a value as the last line it prints.

    `{node}` in the command stands for the client's number; no shell is involved.

    Attributes:
        command: what is run, in the scenario's folder.
        dim, lower, upper, start, noise: as for a function. workers: commands that run side by side.
        timeout: seconds after which it is ended. retries: how often a failure is tried again.
    """

    needs_data: ClassVar[bool] = False
    command: str
    dim: Count
    lower: float | list[float] = 0.0
    upper: float | list[float] = 1.0
    start: list[float] | None = None
    workers: Count = 1
    noise: Noise = 0.0
    timeout: Positive = 60.0
    retries: Annotated[int, Field(ge=0)] = 0

    def problem(self, n: int, seed: int, base: Path) -> OwnBlackBox:
        """Return the problem; nothing is run yet."""
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise InputError(f"problem.command: {self.command!r}: {error}") from None
        if not words:
            raise InputError("problem.command: empty; give what is to be run, such as: python simulate.py {node}")
        run = partial(_run, tuple(words), str(base), self.timeout, self.retries)
        return OwnBlackBox(self, n, run, processes=False)


class OwnBlackBox(BlackBox):
    """`f_i` as the user's code evaluates it, on a real box that is mapped to the unit cube."""

    kind = "own"

    def __init__(self, p: FunctionParameters | CommandParameters, n: int, evaluate: Evaluate, processes: bool) -> None:
        super().__init__(n, p.dim, p.noise)
        self._p, self._evaluate, self._processes = p, evaluate, processes
        self._low, self._high = self._corner("lower", p.lower), self._corner("upper", p.upper)
        if not (self._low < self._high).all():
            where = int(np.flatnonzero(self._low >= self._high)[0])
            raise InputError(
                f"problem.upper: {self._high[where]:g} at coordinate {where}, not above lower = {self._low[where]:g}"
            )
        self._begin = self._unit_start(p.start)
        self._pool: Executor | None = None

    def _corner(self, name: str, given: float | list[float]) -> NDArray[np.float64]:
        corner = np.asarray(given, dtype=np.float64)
        if corner.ndim and corner.shape != (self.dim,):
            raise InputError(f"problem.{name}: {len(corner)} numbers given, dim = {self.dim} (or one for all) needed")
        return np.broadcast_to(corner, (self.dim,))

    def _unit_start(self, given: list[float] | None) -> NDArray[np.float64]:
        if given is None:
            return np.full(self.dim, 0.5)
        point = (self._corner("start", given) - self._low) / (self._high - self._low)
        if not ((point >= 0) & (point <= 1)).all():
            raise InputError("problem.start: lies outside the box from lower to upper")
        return point

    def values(self, points: torch.Tensor, nodes: Nodes) -> torch.Tensor:
        """Return what the user's code answers `[rows, count]`, side by side where that was asked for."""
        real = self._low + (self._high - self._low) * points.double().clamp(0.0, 1.0).numpy()
        tasks = [(x, int(node)) for row, node in zip(real, nodes, strict=True) for x in row]
        answers = self._side_by_side(tasks) if self._p.workers > 1 else [self._evaluate(*task) for task in tasks]
        return torch.tensor(answers, dtype=torch.float64).view(points.shape[:2])

    def _side_by_side(self, tasks: list[tuple[NDArray[np.float64], int]]) -> list[float]:
        if not tasks:
            return []
        try:
            with _without_main():
                answers = self._workers().map(self._evaluate, *zip(*tasks, strict=True))
            return list(answers)
        except BrokenExecutor:
            self._pool = None
            raise RunError("a process that evaluates problem.function ended before it answered") from None

    def evaluate(self, points: torch.Tensor, node: int) -> torch.Tensor:
        """Return `f_node` `[count]`."""
        return self.values(points[None], np.array([node]))[0]

    def _workers(self) -> Executor:
        if self._pool is None and self._processes:
            import multiprocessing

            self._pool = ProcessPoolExecutor(self._p.workers, mp_context=multiprocessing.get_context("spawn"))
        elif self._pool is None:
            self._pool = ThreadPoolExecutor(self._p.workers)
        return self._pool

    def start(self, nodes: Nodes) -> torch.Tensor:
        """Return the given start, or the middle of the box, on every row."""
        return torch.from_numpy(np.repeat(self._begin[None], len(nodes), axis=0))

    def facts(self) -> dict[str, Any]:
        """Return what is evaluated, and on which box."""
        named = (
            {"function": self._p.function} if isinstance(self._p, FunctionParameters) else {"command": self._p.command}
        )
        return {**named, "lower": self._p.lower, "upper": self._p.upper}


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the user's script while processes are started: they need none of it, and would run it once more."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@lru_cache(maxsize=1)
def _function(path: str, base: str) -> Any:
    return registry.find("problem", path, Path(base))


def _call_in_worker(path: str, base: str, x: NDArray[np.float64], node: int) -> float:
    """Evaluate a user's function in a process that has to find it first."""
    return _call(_function(path, base), path, x, node)


def _call(function: Any, path: str, x: NDArray[np.float64], node: int) -> float:
    """Evaluate a user's function."""
    try:
        answer = function(x.copy(), node)
    except (Exception, SystemExit) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        what = traceback.format_exception_only(error)[-1].strip()
        raise RunError(f"{path} raised {what} ({place.filename}, line {place.lineno}) for {_asked(x, node)}") from error
    try:
        return _finite(float(answer))
    except (TypeError, ValueError):
        raise RunError(f"{path} returned {answer!r} for {_asked(x, node)}; a finite number is needed") from None


def _asked(x: NDArray[np.float64], node: int) -> str:
    """Return the client and the point for an error, a long point by its beginning."""
    shown = ", ".join(f"{v!r}" for v in x[:SHOWN].tolist())
    return f"client {node} at x = [{shown}{', ...' if len(x) > SHOWN else ''}]"


def _run(words: tuple[str, ...], folder: str, timeout: float, retries: int, x: NDArray[np.float64], node: int) -> float:
    """Evaluate a command; the last of `retries + 1` failures ends the run."""
    command = [word.replace("{node}", str(node)) for word in words]
    text, said = "".join(f"{v!r}\n" for v in x.tolist()), ""
    for _ in range(retries + 1):
        try:
            code, out, err = _output(command, text, timeout, folder)
        except subprocess.TimeoutExpired:
            said = f"gave no answer within {timeout:g} seconds"
            continue
        except OSError as error:
            raise RunError(f"{shlex.join(command)}: cannot be started: {error}") from None
        if code:
            ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            said = f"{ended}: {err.strip()[-500:] or 'it said nothing'}"
            continue
        last = (out.strip().splitlines() or [""])[-1]
        try:
            return _finite(float(last))
        except ValueError:
            said = f"printed {last[-500:]!r} as its last line; a finite number is needed"
    tries = f" ({retries + 1} times)" if retries else ""
    raise RunError(f"{shlex.join(command)}: {said}{tries}, for {_asked(x, node)}")


def _output(command: list[str], text: str, timeout: float, folder: str) -> tuple[int, str, str]:
    """Return exit code, output and errors of a command, in a session of its own so that all it started ends with it.

    Raises:
        subprocess.TimeoutExpired: it took longer; it and its children are ended.
        OSError: it cannot be started.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=folder, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(text, timeout)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
        return process.returncode, out, err


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(value)
    return value
