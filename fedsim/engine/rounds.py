"""The driver of synchronous algorithms: blocks of rows as coroutines, one request at a time."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.algorithms.algorithm import SyncAlgorithm
from fedsim.algorithms.requests import Rows
from fedsim.engine.accelerator import DeviceNetwork
from fedsim.engine.budget import Budget
from fedsim.engine.counts import Counts, Packed
from fedsim.engine.layout import Layout
from fedsim.engine.network import LocalNetwork
from fedsim.engine.oracle import BlockOracle
from fedsim.engine.pace import Pace
from fedsim.engine.queries import Spent
from fedsim.engine.sampling import check
from fedsim.engine.streams import RoundDraws, Streams
from fedsim.engine.sums import total as global_sum
from fedsim.errors import Diverged, InputError, RunError
from fedsim.job import counts_of_all
from fedsim.problems.problem import Problem

if TYPE_CHECKING:
    from fedsim.privacy.guard import Guard
    from fedsim.transport.links import Links

BLOCK_BYTES = 1 << 20  # of one variable: blocks of this size are fastest, they stay in the second-level cache
START = 0xFFFFFFFF  # the step of draws made before round 0
QUERY_ROWS = ("query.round", "query.value", "query.x")


class Rounds:
    """Plays a `SyncAlgorithm`. The block size never changes a bit.

    Args:
        algorithm: resolved. problem: what the nodes own. layout: the rows of this process.
        matrices: sparse `[n, n]` over node numbers: "W", "laplacian", "adjacency".
        x0: `[rows, dim]`, position order. seed: of batches and all other draws.
        block: rows per block, or "auto". stop: counts that may not be passed, all nodes together.
        guard: of a private algorithm's releases.
        links: how rows get to other processes' devices; None: x0 lies on the CPU.

    Attributes:
        spent: the count whose bound ended the run. The state is that of the last round within it; of the round that
            would pass it only function values, which have been asked for, stay counted (and what was sent before the
            last of them, as far as other bounds allow).
    """

    def __init__(
        self,
        algorithm: SyncAlgorithm,
        problem: Problem,
        layout: Layout,
        matrices: dict[str, Any],
        x0: torch.Tensor,
        seed: int,
        block: int | Literal["auto"] = "auto",
        stop: Mapping[str, float] | None = None,
        guard: Guard | None = None,
        links: Links | None = None,
    ) -> None:
        self.counts = Counts()
        self.spent: str | None = None
        self._budget = Budget(stop or {}, layout)
        limit = None if not stop or "queries" not in stop else int(stop["queries"])
        self._algorithm, self._layout, self._x0 = algorithm, layout, x0
        self._streams = Streams(seed)
        check(getattr(algorithm, "batch", None), problem.records, problem.kind)
        self._blocks = _blocks(layout.rows, x0, block)
        parts = layout, self._blocks, matrices, self.counts
        self._network = LocalNetwork(*parts) if links is None else DeviceNetwork(*parts, x0.device, links)
        self._network.guard = self.guard = guard
        nodes = [layout.nodes[rows] for rows in self._blocks]
        self._oracles = [BlockOracle(problem, own, self._streams, self.counts, limit) for own in nodes]
        self._quiet = [BlockOracle(problem, own, self._streams, Counts()) for own in nodes]
        self._states: list[Any] = []
        self._round = 0
        self._packed, self._warned = Packed(), False  # of all ranks, when they were last asked

    def set_pace(self, pace: Pace | None) -> None:
        """Have every gradient last as long as a pace says; None: as fast as it can."""
        for oracle in self._oracles:
            oracle.pace = pace

    @property
    def now(self) -> float:
        """Rounds played."""
        return float(self._round)

    @property
    def row_names(self) -> frozenset[str]:
        """Which arrays of `save` and `final` hold one row per node of this rank."""
        names = [name for name, is_rows in _fields(type(self._states[0])).items() if is_rows]
        return frozenset([*names, *(f"state.{name}" for name in names), *QUERY_ROWS])

    def start(self) -> None:
        """Play the algorithm's start; its requests and gradients are charged.

        Raises:
            InputError: a bound of `stop` does not even cover the start.
        """
        blocks = zip(self._blocks, self._oracles, strict=True)
        try:
            self._states = self._drive(
                [self._algorithm.start(self._x0[rows], o, self._draws(o, START)) for rows, o in blocks]
            )
        except Spent:
            bound = f"queries: {self._oracles[0].queries.budget} do"
            if self.guard and self.guard.refusal:
                bound = f"epsilon: {self.guard.budget:g} does"
            raise InputError(f"stop.{bound} not cover the start of this algorithm") from None
        self._share()
        self._budget.refuse_start(self.counts)
        self.spent = self._budget.reached(self.counts)

    def advance(self, until: float) -> None:
        """Play rounds up to number `until`.

        Raises:
            Diverged: a row is no longer finite.
        """
        while self._round + 1 <= until and not self.spent:
            for oracle in self._oracles:
                oracle.queries.round = self._round
            before = (self._states, self.counts.as_dict(), replace(self._network.packed)) if self._budget else None
            try:
                self._states = self._drive(
                    [
                        self._algorithm.round(state, self._round, oracle, self._draws(oracle, self._round))
                        for state, oracle in zip(self._states, self._oracles, strict=True)
                    ]
                )
            except Spent:
                if before:
                    self._over(*before)
                self.spent = "epsilon" if self.guard and self.guard.refusal else "queries"
                break
            if before and self._over(*before):
                break
            self._share()
            self._round += 1
        self._refuse_divergence()

    def _over(self, states: list[Any], counts: dict[str, int], packed: Packed) -> bool:
        """Take back the round that was just played if it passed the budget; a full one ends after it."""
        passed = self._budget.passed(self.counts)
        if passed:
            self._states, self._network.packed = states, packed
            self._network.forget()
            self.counts.restore({**counts, "queries": self.counts.queries})
        self.spent = passed or self._budget.reached(self.counts)
        return bool(passed)

    def outputs(self) -> torch.Tensor:
        """Return every node's answer `[rows, dim]`; the observation is not charged."""
        if type(self._algorithm).answer is not SyncAlgorithm.answer:
            return self._asked_for()
        return (
            torch.cat([self._algorithm.output(s, oracle) for s, oracle in zip(self._states, self._quiet, strict=True)])
            .detach()
            .cpu()
        )

    def _asked_for(self) -> torch.Tensor:
        before = self.counts.as_dict()
        pairs = zip(self._states, self._quiet, strict=True)
        answers = self._drive([self._algorithm.answer(s, oracle) for s, oracle in pairs])
        self.counts.restore(before)
        return torch.cat(answers).cpu()

    def measures(self) -> dict[str, float]:
        """Return the means over all nodes of what the algorithm measures of its rows; warn of packets that cost."""
        self._weigh()
        pairs = zip(self._states, self._quiet, strict=True)
        parts = [self._algorithm.measures(s, oracle) for s, oracle in pairs]
        n = self._layout.n
        own = self.guard.columns() if self.guard else {}
        return own | {
            name: float(global_sum(torch.cat([p[name] for p in parts]).cpu().double()[:, None], self._layout)[0]) / n
            for name in parts[0]
        }

    def facts(self) -> dict[str, Any]:
        """Return how much packets weighed beside dense values of the same type."""
        found = {"compression_ratio": self._packed.packed / self._packed.dense} if self._packed.dense else {}
        return found | ({"privacy": self.guard.facts()} if self.guard and self.guard.ledger else {})

    def _weigh(self) -> None:
        """Add up over ranks what packets weighed, and say so once where those of a request weighed more than dense."""
        self._packed = Packed(**counts_of_all(self._network.packed, self._layout))
        if self._packed.excess and not self._warned and self._layout.rank == 0:
            ratio = self._packed.packed / self._packed.dense
            warnings.warn(
                f"compressed messages cost more than dense ones of the same type would ({ratio:.3g} times as much so"
                " far): keep less, or send values in a shorter type",
                stacklevel=2,
            )
        self._warned = self._packed.excess > 0

    def final(self) -> dict[str, NDArray]:
        """Return the state's fields: rows `[rows, ...]`, shared values `[1, ...]`."""
        fields: dict[str, NDArray] = {}
        for name, is_rows in _fields(type(self._states[0])).items():
            parts = [getattr(state, name) for state in self._states]
            if parts[0] is None:
                continue
            fields[name] = _as_array(torch.cat(parts) if is_rows else parts[0])
        return fields

    def save(self) -> dict[str, NDArray]:
        """Return the state, the round, the number of draws and the counts of all ranks (which all call this)."""
        saved = {f"state.{name}": value for name, value in self.final().items()}
        saved["round"] = np.array([self._round, self._oracles[0].draws])
        saved.update(self._saved_queries())
        saved.update(self.guard.save() if self.guard else {})
        saved.update({f"count.{name}": np.array(v) for name, v in counts_of_all(self.counts, self._layout).items()})
        packed = counts_of_all(self._network.packed, self._layout)
        saved.update({f"packets.{name}": np.array(v) for name, v in packed.items()})
        return saved

    def load(self, saved: dict[str, NDArray]) -> None:
        """Go back to a saved state."""
        self._network.forget()
        self._round, draws = (int(v) for v in saved["round"])
        self._network.packed = Packed()
        if self._layout.rank == 0:  # counts are added up over ranks
            self.counts.restore({k[6:]: int(v) for k, v in saved.items() if k.startswith("count.")})
            self._network.packed = Packed(**{k[8:]: int(v) for k, v in saved.items() if k.startswith("packets.")})
        else:
            self.counts.restore(Counts().as_dict())
        kinds = _fields(type(self._states[0]))
        for block, rows in enumerate(self._blocks):
            self._oracles[block].draws = draws
            if "query.asked" in saved:
                own = {name: value[rows] for name, value in saved.items() if name in QUERY_ROWS}
                self._oracles[block].queries.load(own, saved["query.asked"][0])
            new = {}
            for name, is_rows in kinds.items():
                value = saved.get(f"state.{name}")
                new[name] = None if value is None else self._restored(block, name, value[rows] if is_rows else value)
            self._states[block] = replace(self._states[block], **new)

    @property
    def asked(self) -> NDArray[np.int64]:
        """How many function values every node has asked for, int64 `[n]` by node number."""
        return self._oracles[0].queries.asked

    def query_log(self) -> dict[str, NDArray] | None:
        """Return what the nodes of this rank asked of black boxes (see `Queries.columns`); None: nobody asked."""
        if not self.asked.any():
            return None
        parts = [oracle.queries.columns() for oracle in self._oracles]
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    def _saved_queries(self) -> dict[str, NDArray]:
        if not self.asked.any():
            return {}
        parts = [oracle.queries.save() for oracle in self._oracles]
        whole = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        return {**whole, "query.asked": self.asked[None]}

    def _restored(self, block: int, name: str, value: NDArray) -> Any:
        before = getattr(self._states[block], name)
        if isinstance(before, torch.Tensor) or before is None:
            return torch.from_numpy(np.ascontiguousarray(value)).to(self._x0.device)
        return type(before)(value.item())

    def _draws(self, oracle: BlockOracle, step: int) -> RoundDraws:
        return RoundDraws(self._streams, oracle.nodes, step, self._x0.device)

    def _drive(self, blocks: list[Coroutine[Any, Any, Any]]) -> list[Any]:
        """Run every block to its next request, answer all, and so on to the end of the round."""
        if len(blocks) == 1:
            return [self._drive_one(blocks[0])]
        answers: list[Any] = [None] * len(blocks)
        while True:
            requests, results, spent = [], [], 0
            for block, answer in zip(blocks, answers, strict=True):
                try:
                    requests.append(block.send(answer))
                except StopIteration as end:
                    results.append(end.value)
                except Spent:
                    spent += 1
            if spent == len(blocks):
                raise Spent
            if not requests:
                return results
            if results:
                raise RunError(
                    f"blocks disagree in round {self._round}: {len(results)} of {len(blocks)} ended, others ask on;"
                    " control flow may depend on the round and on shared values, never on rows"
                )
            answers = self._network.answer(requests)

    def _drive_one(self, block: Coroutine[Any, Any, Any]) -> Any:
        answer = None
        try:
            while True:
                answer = self._network.answer([block.send(answer)])[0]
        except StopIteration as end:
            return end.value

    def _share(self) -> None:
        """Keep one copy of the shared values, the first block's."""
        if len(self._states) > 1:
            for name, is_rows in _fields(type(self._states[0])).items():
                if not is_rows:
                    for state in self._states[1:]:
                        object.__setattr__(state, name, getattr(self._states[0], name))

    def _refuse_divergence(self) -> None:
        for state, oracle in zip(self._states, self._oracles, strict=True):
            for name, is_rows in _fields(type(state)).items():
                value = getattr(state, name)
                rows = len(oracle.nodes)
                if is_rows and isinstance(value, torch.Tensor) and (value.dim() == 0 or len(value) != rows):
                    raise RunError(
                        f"{type(state).__name__}.{name} has shape {tuple(value.shape)} after round {self._round};"
                        f" one row per node is needed, and this block has {rows}"
                    )
                if not isinstance(value, torch.Tensor) or not value.is_floating_point() or _finite(value):
                    continue
                bad = ~value.reshape(len(value), -1).isfinite().all(dim=1)
                whose = f" of node {int(oracle.nodes[int(bad.nonzero()[0, 0])])}" if is_rows else ""
                raise Diverged(
                    f"{name}{whose} is no longer finite after round {self._round}: the run diverges."
                    " Likely a step size too large for this problem's L"
                )


def _finite(value: torch.Tensor) -> bool:
    """Return whether all numbers are finite: their sum tells, at the speed of memory, unless it overflows."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


@cache
def _fields(state: type) -> dict[str, bool]:
    """Return the fields of a state class and whether each holds rows.

    Raises:
        InputError: a field is annotated neither `Rows` nor `Shared`.
    """
    from fedsim.algorithms.requests import Shared

    if not dataclasses.is_dataclass(state):
        raise InputError(f"{state.__name__}: a round must return a dataclass whose fields are annotated Rows or Shared")
    found = {}
    for name, hint in get_type_hints(state).items():
        kinds = getattr(hint, "__args__", (hint,))
        if Rows not in kinds and Shared not in kinds:
            raise InputError(f"{state.__name__}.{name}: annotated {hint}; Rows or Shared is needed")
        found[name] = Rows in kinds
    return found


def _blocks(rows: int, x0: torch.Tensor, block: int | Literal["auto"]) -> list[slice]:
    if block == "auto":
        size = max(2, BLOCK_BYTES // max(1, x0.shape[1] * x0.element_size()))
        size = rows if size * 2 > rows else size
    else:
        size = int(block)
        if size < 1:
            raise InputError(f"engine.block: {block} rows given, at least 1 (or auto) needed")
    return [slice(begin, min(begin + size, rows)) for begin in range(0, rows, size)]


def _as_array(value: Any) -> NDArray:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.array([value])
