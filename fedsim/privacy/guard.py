"""The guard of a run: nothing is released that is not in the ledger, and nothing without its noise."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.algorithms.requests import Request, Sum
from fedsim.engine.queries import Spent
from fedsim.errors import RunError
from fedsim.privacy.ledger import FILE, Entry, Ledger, read
from fedsim.privacy.noise import Noise
from fedsim.privacy.requests import Charge, Perturb, PrivateRequest, Release, Spend, Subsample

if TYPE_CHECKING:
    from fedsim.engine.layout import Layout
    from fedsim.engine.network import LocalNetwork
    from fedsim.privacy.section import Privacy
    from fedsim.problems.problem import Problem

Tap = Callable[[Release | Perturb, NDArray[np.float64]], None]


class PrivacyBudgetExceeded(Spent):
    """A release would pass the budget; nothing of its round is computed."""


class Guard:
    """Answers private requests.

    Args:
        privacy: what is promised; None: nothing, and releases are plain sums.
        multipliers: standard deviation over sensitivity, by kind of release.
        seed: of all secret draws, where they are reproducible.
        budget: epsilon that may not be passed; None: only counted.

    Attributes:
        ledger: what was released; None without privacy.
        refusal: the release that the budget refused, or None.
        noise: where all secrets come from.
        taps: called with every release and what an observer sees of it (an audit listens here).
    """

    def __init__(
        self,
        privacy: Privacy | None,
        multipliers: Mapping[str, float],
        problem: Problem,
        layout: Layout,
        seed: int,
        budget: float | None = None,
    ) -> None:
        self.privacy, self.multipliers, self.budget = privacy, dict(multipliers), budget
        self._layout, self._shares, self._records = layout, problem.shares, problem.records
        self._longest = int(problem.records.max())
        secure = privacy is not None and privacy.secure_noise
        self.noise, self._key = Noise(layout, None if secure else seed), "system" if secure else f"{seed:016x}"
        self.refusal: str | None = None
        self.taps: list[Tap] = []
        self.ledger: Ledger | None = None
        self.seconds = 0.0
        self._spent: set[tuple[int, Charge]] = set()
        if privacy is not None:
            exposure = np.ones(layout.n) if privacy.trust == "local" else self._unit_weights / self._unit_weights.max()
            self.ledger = Ledger(privacy.delta, privacy.relation, exposure.tolist(), fresh=privacy.secure_noise)

    @property
    def _unit_weights(self) -> NDArray[np.float64]:
        """Weight of one unit (record, or worker) of each worker in a sum over workers, `[n]`."""
        if self.privacy is not None and self.privacy.unit == "user":
            return self._shares
        return self._shares / self._records

    def answer(self, requests: list[Any], network: LocalNetwork) -> list[Any]:
        """Return each block's answer to its private request."""
        first: PrivateRequest = requests[0]
        if isinstance(first, Spend):
            self._spend(first)
            return [None] * len(requests)
        if isinstance(first, Subsample):
            return self._subsample(first, network)
        if isinstance(first, Perturb):
            return self._perturb(first, requests)
        assert isinstance(first, Release)
        return self._release(first, requests, network)

    def _spend(self, request: Spend) -> None:
        if self.ledger is None:
            return
        clock = time.perf_counter()
        entries = self.ledger.planned(self._entry(request.round, charge) for charge in request.charges)
        if self.budget is not None and not self.ledger.fits(entries, self.budget):
            names = ", ".join(sorted({charge.name for charge in request.charges}))
            self.refusal = f"epsilon: round {request.round} ({names}) would pass the budget of {self.budget:g}"
            raise PrivacyBudgetExceeded(self.refusal)
        self.ledger.write(entries)
        self._spent = {(request.round, charge) for charge in request.charges}
        self.seconds += time.perf_counter() - clock

    def _entry(self, number: int, charge: Charge) -> Entry:
        z = self.multipliers[charge.name]
        return Entry(number, charge.name, charge.step, z, charge.rate, charge.worker, self._key)

    def _paid(self, request: Release | Perturb) -> None:
        """Refuse what was not spent for; every charge pays once, since two releases of one noise give it away."""
        place = request.round, request.charge
        if self.ledger is not None and place not in self._spent:
            raise RunError(
                f"release {request.charge.name!r} of round {request.round} was not spent for; await Spend first, with a"
                " charge (name, step, worker) for each"
            )
        self._spent.discard(place)

    def deviation(self, charge: Charge, radius: float) -> float:
        """Return the standard deviation that a sum over workers gets: multiplier times sensitivity."""
        assert self.privacy is not None
        sensitivity = self.privacy.factor * radius * float(self._unit_weights.max()) / charge.rate
        return self.multipliers[charge.name] * sensitivity

    def message_deviations(self, charge: Charge, radius: float) -> NDArray[np.float64]:
        """Return the standard deviation that each of this rank's messages gets by itself, `[rows]`."""
        assert self.privacy is not None
        p, shares = self.privacy, self._shares[self._layout.nodes]
        if p.trust == "local":
            unit = self._unit_weights[self._layout.nodes] / shares
            return self.multipliers[charge.name] * p.factor * radius * unit / charge.rate
        honest = self._layout.n if p.honest is None else p.honest
        return self.deviation(charge, radius) / (shares * math.sqrt(honest))

    def _release(self, first: Release, requests: list[Any], network: LocalNetwork) -> list[torch.Tensor]:
        self._paid(first)
        values = [r.v for r in requests]
        trust = None if self.privacy is None else self.privacy.trust
        if trust in ("secagg", "local"):
            self._refuse_missing_workers(first)
            values = self._with_own_noise(first, values)
        weights = [torch.from_numpy(self._shares[self._layout.nodes[rows]]) for rows in network.blocks]
        sums: list[Request] = [Sum(v, weight=w, rows=first.rows) for v, w in zip(values, weights, strict=True)]
        total = network.answer(sums)[0]
        if trust == "central":
            drawn = self.noise.common_normal(first.charge.name, self._step(first), total.shape[1])
            total = total + (self.deviation(first.charge, first.radius) * torch.from_numpy(drawn)).to(total.dtype)
        for tap in self.taps:
            tap(first, (torch.cat(values) if trust == "local" else total).double().numpy())
        return [total] * len(requests)

    def _with_own_noise(self, request: Release, values: list[torch.Tensor]) -> list[torch.Tensor]:
        drawn = self.noise.normal(request.charge.name, self._step(request), values[0].shape[1])
        noise = torch.from_numpy(self.message_deviations(request.charge, request.radius)[:, None] * drawn)
        parts = noise.to(values[0].dtype).split([len(v) for v in values])
        return [v + part for v, part in zip(values, parts, strict=True)]

    def _refuse_missing_workers(self, request: Release) -> None:
        assert self.privacy is not None
        if request.rows is None or self.privacy.trust == "local":
            return
        there = int(np.count_nonzero(request.rows))
        if there < (self.privacy.honest or self._layout.n):
            raise RunError(
                f"secure aggregation: {there} of {self._layout.n} workers take part in round {request.round}, so their"
                " shares of the noise are too small together; say privacy.honest: how many are sure to"
            )

    def _perturb(self, first: Perturb, requests: list[Any]) -> list[torch.Tensor]:
        self._paid(first)
        if self.privacy is None:
            return [r.v for r in requests]
        v, radius = torch.cat([r.v for r in requests]), torch.cat([r.radius for r in requests])
        whole = Perturb(first.round, v, first.charge, radius)
        drawn = torch.from_numpy(self.noise.normal(first.charge.name, self._step(first), first.v.shape[1]))
        noise = torch.from_numpy(self.row_deviations(first.charge, whole.radius))[:, None] * drawn
        noisy = whole.v + noise.to(first.v.dtype)
        for tap in self.taps:
            tap(whole, noisy.double().numpy())
        return list(noisy.split([len(r.v) for r in requests]))

    def row_deviations(self, charge: Charge, radius: torch.Tensor) -> NDArray[np.float64]:
        """Return the standard deviation that each row of a `Perturb` gets, `[rows]`; 0 where it is not the worker's."""
        assert self.privacy is not None
        nodes = self._layout.nodes
        unit = (nodes == charge.worker) / (charge.rate * self._records[nodes])
        return self.multipliers[charge.name] * self.privacy.factor * unit * radius[:, 0].double().numpy()

    def _subsample(self, first: Subsample, network: LocalNetwork) -> list[Any]:
        charge, blocks = first.charge, network.blocks
        if first.of == "workers":
            return [self.noise.common_uniform("workers", first.round, self._layout.n) < charge.rate] * len(blocks)
        records = self._records[self._layout.nodes][:, None]
        drawn = self.noise.uniform(f"batch {charge.name}", self._step(first), self._longest)
        weights = ((drawn < charge.rate) & (np.arange(self._longest) < records)) / (charge.rate * records)
        return [weights[rows] for rows in blocks]

    @staticmethod
    def _step(request: Release | Perturb | Subsample) -> int:
        """Return a number for the place of a release: rounds and steps never share one.

        Raises:
            RunError: there are no more numbers.
        """
        if request.round >= 1 << 24 or request.charge.step >= 1 << 8:
            raise RunError(
                f"round {request.round}, step {request.charge.step}: 2^24 rounds of 2^8 steps have noise of their own"
            )
        return request.round + (request.charge.step << 24)

    def columns(self) -> dict[str, float]:
        """Return what is recorded: epsilon of the most exposed worker against broadcasts, and against the server."""
        if self.ledger is None or self.privacy is None:
            return {}
        clock = time.perf_counter()
        spent = self.ledger.epsilon()
        self.seconds += time.perf_counter() - clock
        return {"epsilon": spent, "epsilon_server": math.inf if self.privacy.trust == "central" else spent}

    def open(self, folder: Path, again: bool, saved: Mapping[str, NDArray]) -> None:
        """Keep the ledger in the run's folder; `again` goes on with what is there, at least what `saved` has counted.

        Raises:
            RunError: the ledger there was begun under another promise, forgets, or is another one.
        """
        if self.ledger is None or self.privacy is None:
            return
        promise = {name: getattr(self.privacy, name) for name in ("unit", "relation", "trust", "delta")}
        header = {**promise, "exposure": self.ledger.exposure.tolist()}
        text = self._of_rank_0(self.ledger.open(folder, again) if self._layout.rank == 0 else "")
        try:
            if text:
                self._refuse_another(read(text)[0], header, folder / FILE)
            self.ledger.merge(text, **_counted(saved))
        except RunError:
            self.close()
            raise
        if not text and self._layout.rank == 0:
            self.ledger.begin(header)

    @staticmethod
    def _refuse_another(begun: dict[str, Any], header: dict[str, Any], file: Path) -> None:
        """Refuse a ledger of another promise, or of workers with other weights: its entries are priced by them."""
        exposures = np.asarray(begun.pop("exposure", ())), np.asarray(header["exposure"])
        now = {name: value for name, value in header.items() if name != "exposure"}
        if begun != now:
            raise RunError(f"{file}: begun under {begun}, the scenario now says {now}")
        if exposures[0].shape != exposures[1].shape or not np.allclose(*exposures, rtol=1e-12, atol=0):
            raise RunError(f"{file}: begun with other numbers or weights of records than the scenario has now")

    def _of_rank_0(self, text: str) -> str:
        if self._layout.size == 1:
            return text
        return self._layout.transport.broadcast(np.frombuffer(text.encode(), np.uint8)).tobytes().decode()

    def save(self) -> dict[str, NDArray]:
        """Return what a checkpoint keeps of the ledger: how many releases it counts, and their seal."""
        if self.ledger is None:
            return {}
        seal = np.frombuffer(self.ledger.seal, np.uint8)
        return {"ledger.entries": np.array(len(self.ledger.entries)), "ledger.seal": seal}

    def close(self) -> None:
        """Let go of the ledger's file."""
        if self.ledger is not None:
            self.ledger.close()

    def facts(self) -> dict[str, Any]:
        """Return what `run.json` says of privacy."""
        if self.ledger is None or self.privacy is None:
            return {}
        p, spent = self.privacy, self.ledger.by_worker()
        server = [math.inf] * len(spent) if p.trust == "central" else spent
        return {
            "unit": p.unit,
            "relation": p.relation,
            "trust": p.trust,
            "honest": p.honest or (len(spent) if p.trust == "secagg" else None),
            "delta": p.delta,
            "epsilon": max(spent),
            "epsilon_server": max(server),
            "epsilon_by_worker": {"broadcasts": spent, "server": server},
            "budget": self.budget,
            "multipliers": self.multipliers,
            "releases": len(self.ledger.entries),
            "accountant": "privacy loss distributions (dp-accounting)" if self.ledger.sampled else "exact Gaussian",
            "calibration": p.calibration if p.epsilon is not None else "multipliers given",
            "noise": SECURE if p.secure_noise else REPRODUCIBLE,
            "refused": self.refusal,
            "accounting_seconds": self.seconds,
        }


def _counted(saved: Mapping[str, NDArray]) -> dict[str, Any]:
    """Return what a checkpoint has counted, as `Ledger.merge` asks for it."""
    seal = saved["ledger.seal"].tobytes() if "ledger.seal" in saved else b""
    return {"least": int(saved.get("ledger.entries", 0)), "seal": seal}


SECURE = "from the operating system's entropy"
REPRODUCIBLE = "reproducible from the scenario: for research, not for protecting anybody (privacy.secure_noise: true)"
