"""An attack on the very mechanism of a run, and what it proves.

The run's algorithm, multipliers, weights, clipping and noise are played on canaries: records (or workers) with the
worst gradient there is. For each, an observer of all releases computes the log-likelihood ratio of the two neighbouring
data sets. How often that is right bounds epsilon from below; how far apart the two cases lie estimates mu, which is
the sharper instrument.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.errors import InputError
from fedsim.privacy.bounds import certified_epsilon, separation
from fedsim.privacy.canaries import Canaries
from fedsim.privacy.guard import Guard
from fedsim.privacy.ledger import FILE, Ledger, read
from fedsim.privacy.plan import multipliers
from fedsim.privacy.requests import Perturb, Release

if TYPE_CHECKING:
    from fedsim.prepare import Prepared
    from fedsim.privacy.section import Privacy

ERROR, LEAST_SLACK = 0.05, 0.05
PER_WORKER = 40
DIFFERENCES = ("difference", "local")  # releases of clipped differences of gradients


@dataclass(frozen=True)
class Verdict:
    """What an audit found.

    Attributes:
        claimed: epsilon of the releases, by the accountant. certified: lower bound with 95 % confidence.
        mu_claimed, mu_measured: of the releases without sampling (nan where there are none).
        shift_claimed, shift_measured: how far one record moves the sampled releases, in standard deviations of their
            noise, on average over its being drawn (nan where there are none).
        trials: canaries played. delta: of both epsilons. broken: what is wrong, or None.
    """

    claimed: float
    certified: float
    mu_claimed: float
    mu_measured: float
    shift_claimed: float
    shift_measured: float
    trials: int
    delta: float
    broken: str | None

    def text(self) -> str:
        """Return the verdict as lines for a terminal."""
        lines = [
            f"claimed    epsilon <= {self.claimed:.6g} at delta = {self.delta:g}",
            f"certified  epsilon >= {self.certified:.6g} with {100 - 100 * ERROR:g} % confidence, {self.trials} trials",
        ]
        if math.isfinite(self.mu_measured):
            lines.append(f"measured   mu = {self.mu_measured:.4g}, claimed {self.mu_claimed:.4g}")
        if math.isfinite(self.shift_measured):
            lines.append(f"sampled    shift = {self.shift_measured:.4g}, claimed {self.shift_claimed:.4g}")
        return "\n".join([*lines, f"BROKEN     {self.broken}" if self.broken else "nothing contradicts the claim"])


def audit_run(folder: Path, trials: int = 10_000, seed: int = 0) -> Verdict:
    """Audit the run that left `folder`, by its scenario and its ledger; write `audit.json` there.

    Raises:
        InputError: the folder holds no private run.
    """
    from fedsim.engine.machine import prepare as prepare_machine
    from fedsim.prepare import prepare
    from fedsim.results.folder import to_json, write_whole
    from fedsim.results.result import Result
    from fedsim.scenario import load_study

    result = Result(folder)
    if "privacy" not in result.facts or not (folder / FILE).exists():
        raise InputError(f"{folder}: no private run, it claims nothing; give the folder of one run with a ledger")
    prepare_machine()
    p = prepare(load_study(folder / "scenario.yaml", base=Path(result.facts["base"])).runs[0])
    header, entries = read((folder / FILE).read_text())
    ledger = Ledger(header["delta"], header["relation"], header["exposure"])
    ledger.write(entries)
    z = multipliers(p.setting.privacy, p.algorithm.plan(p.setting))  # type: ignore
    verdict = audit(p, trials, seed, rounds=1 + max((entry.round for entry in entries), default=-1))
    wrong = _of_ledger(ledger, z, result.facts["privacy"]["epsilon"])
    verdict = Verdict(**{**asdict(verdict), "claimed": ledger.epsilon(), "broken": verdict.broken or wrong})
    if verdict.certified > verdict.claimed and not verdict.broken:
        verdict = Verdict(**{**asdict(verdict), "broken": "certified epsilon above the ledger's"})
    write_whole(folder / "audit.json", to_json(asdict(verdict)) + "\n")
    return verdict


def _of_ledger(ledger: Ledger, z: dict[str, float], reported: float) -> str | None:
    """Return what the books get wrong, or None."""
    for entry in ledger.entries:
        if abs(entry.z / z[entry.release] - 1) > 1e-9:
            return f"round {entry.round}: the ledger says noise {entry.z:g}, the mechanism makes {z[entry.release]:g}"
    if not math.isclose(reported, ledger.epsilon(), rel_tol=1e-6):
        return f"the run reports epsilon {reported:g}, its ledger adds up to {ledger.epsilon():g}"
    return None


def audit(p: Prepared, trials: int = 10_000, seed: int = 0, rounds: int | None = None) -> Verdict:
    """Attack the mechanism of a prepared run with about `trials` canaries, over `rounds` (default: its schedule).

    First and last records of every worker are attacked apart, since code that works in chunks may treat them
    differently; the worse counts.
    """
    privacy, rounds = p.setting.privacy, p.setting.rounds if rounds is None else rounds
    if privacy is None or not rounds:
        raise InputError("audit: nothing was released under a privacy section, so nothing is claimed")
    z = multipliers(privacy, p.algorithm.plan(p.setting))  # type: ignore[attr-defined] - prepare refuses others
    groups = ("all",) if privacy.unit == "user" else ("first", "last")
    found = [_attacked(p, privacy, z, group, trials // len(groups), seed, rounds) for group in groups]
    claimed, error = found[0].claimed, ERROR / len(groups)
    certified = max(certified_epsilon(f.statistic, f.upper, privacy.delta, error) for f in found)
    mu, shift = (max((_distance(f, kind) for f in found), key=lambda d: d.measured) for kind in ("plain", "sampled"))
    broken = (
        f"epsilon is at least {certified:.4g}, more than the claimed {claimed:.4g}" if certified > claimed else None
    )
    return Verdict(
        claimed,
        certified,
        mu.claimed,
        mu.measured,
        shift.claimed,
        shift.measured,
        sum(len(f.upper) for f in found),
        privacy.delta,
        broken or _too_far("mu", mu) or _too_far("the shift of sampled releases", shift),
    )


@dataclass(frozen=True)
class _Distance:
    """How far apart the two cases lie, in standard deviations: as claimed, as measured, and the measure's own error."""

    claimed: float
    measured: float
    error: float


def _distance(found: _Found, kind: str) -> _Distance:
    """Measure on the releases without sampling (`plain`), or on those with, whose noise the canaries left out show."""
    tally, upper = found.tallies[kind], found.upper
    heard = tally.square > 0
    if not heard.any():
        return _Distance(math.nan, math.nan, math.nan)
    statistic, mu, upper = tally.sum[heard] / np.sqrt(tally.square[heard]), np.sqrt(tally.square[heard]), upper[heard]
    if kind == "plain":
        return _Distance(float(mu.mean()), separation(statistic, upper), 2 / math.sqrt(len(upper)))
    moved, noise = statistic / mu * mu.mean(), float(statistic[~upper].std(ddof=1))
    shift = (moved[upper].mean() - moved[~upper].mean()) / noise
    error = math.sqrt(moved[upper].var() / upper.sum() + moved[~upper].var() / (~upper).sum()) / noise
    return _Distance(float(mu.mean()), float(shift), error + shift / math.sqrt(2 * (~upper).sum()))


def _too_far(name: str, distance: _Distance) -> str | None:
    slack = max(LEAST_SLACK * distance.claimed, 4 * distance.error)
    if not distance.measured > distance.claimed + slack:
        return None
    times = distance.measured / distance.claimed
    return f"{name} is {times:.3g} times what is claimed: too little noise, or records that weigh too much"


@dataclass
class _Tally:
    """Sums over releases, per canary `[m]`: weight times what was heard in units of its noise, and weight squared.

    A weight is how far a canary moves a release, in the same units: the rate of sampling over the multiplier.
    """

    sum: NDArray[np.float64]
    square: NDArray[np.float64]

    def add(self, canaries: NDArray[np.bool_], weight: float, heard: NDArray[np.float64]) -> None:
        """Add one release that some of the canaries are in."""
        self.sum[canaries] += weight * heard[canaries]
        self.square[canaries] += weight**2


@dataclass(frozen=True)
class _Found:
    """What was heard of all canaries of a group: log-likelihood ratios in standard deviations, tallies, sides."""

    statistic: NDArray[np.float64]
    tallies: dict[str, _Tally]
    upper: NDArray[np.bool_]
    claimed: float


def _attacked(
    p: Prepared, privacy: Privacy, z: dict[str, float], group: str, trials: int, seed: int, rounds: int
) -> _Found:
    """Return what about `trials` canaries of one group give away."""
    plays: list[_Play] = []
    while sum(len(play.upper) for play in plays) < trials or not plays:
        plays.append(_Play(p, privacy, z, group, seed + 1000 * len(plays) + (group == "last"), rounds))
    tallies = {
        kind: _Tally(
            np.concatenate([play.tallies[kind].sum for play in plays]),
            np.concatenate([play.tallies[kind].square for play in plays]),
        )
        for kind in plays[0].tallies
    }
    square = sum((tally.square for tally in tallies.values()), np.zeros(1))
    total = sum((tally.sum for tally in tallies.values()), np.zeros(1)) / np.sqrt(np.where(square > 0, square, 1.0))
    return _Found(total, tallies, np.concatenate([play.upper for play in plays]), plays[0].claimed)


class _Play:
    """One play of the mechanism, with canaries on random sides; an observer listens to every release.

    Attributes:
        upper: `[m]`, which canaries are in their first form. tallies: of releases without sampling, and with.
        claimed: epsilon of all releases, by the ledger.
    """

    def __init__(self, p: Prepared, privacy: Privacy, z: dict[str, float], group: str, seed: int, rounds: int) -> None:
        from fedsim.engine.layout import Layout
        from fedsim.engine.rounds import Rounds

        self._owners = _owners(p, privacy)
        self.upper = np.random.default_rng(seed).random(len(self._owners)) < 0.5
        side = np.where(self.upper, 1.0, -1.0 if privacy.relation == "replace_one" else 0.0)
        self._problem = Canaries(p.problem.records, p.problem.shares, side, self._owners, at_end=group == "last")
        layout = Layout(p.topology)
        self._guard = Guard(privacy, z, self._problem, layout, seed)
        self._guard.taps.append(self._listen)
        self._rows, self._local, self._z = p.topology.position[self._owners], privacy.trust == "local", z
        self.tallies = {kind: _Tally(np.zeros(len(side)), np.zeros(len(side))) for kind in ("plain", "sampled")}
        x0 = torch.zeros(layout.rows, self._problem.dim, dtype=torch.float64)
        algorithm: Any = p.algorithm
        player = Rounds(algorithm, self._problem, layout, {}, x0, seed, guard=self._guard)
        player.start()
        player.advance(rounds)
        assert self._guard.ledger is not None
        self.claimed = self._guard.ledger.epsilon()

    def _listen(self, request: Release | Perturb, seen: NDArray[np.float64]) -> None:
        """Add what one release says of every canary: its value along the canary's sign, over its noise."""
        charge, guard, everybody = request.charge, self._guard, np.zeros_like(self._rows)
        rows, canaries = self._rows, np.ones(len(self._rows), bool)
        if isinstance(request, Perturb):
            noise, canaries = guard.row_deviations(charge, request.radius), self._owners == charge.worker
        elif self._local:
            noise = guard.message_deviations(charge, request.radius)
        else:
            noise, rows = np.array([guard.deviation(charge, request.radius)]), everybody
        sign: Any = -1.0 if charge.name == "model" else 1.0  # models move against gradients
        if charge.name in DIFFERENCES:
            sign = self._problem.sign.numpy()
        heard = sign * seen[rows, np.arange(len(rows))] / np.where(noise > 0, noise, 1.0)[rows]
        tally = self.tallies["sampled" if charge.rate < 1 else "plain"]
        tally.add(canaries, charge.rate / self._z[charge.name], heard)


def _owners(p: Prepared, privacy: Privacy) -> NDArray[np.int64]:
    """Return the worker of each canary: some records of every worker whose records weigh most, or such workers."""
    by_user = privacy.unit == "user"
    weights = p.problem.shares / (1 if by_user else p.problem.records)
    if privacy.trust == "local" and not by_user:
        weights = np.ones(p.problem.n)
    worst = np.flatnonzero(weights >= weights.max() * (1 - 1e-9))
    each = 1 if by_user else np.minimum(np.maximum(p.problem.records[worst] // 2, 1), PER_WORKER)
    return np.repeat(worst, each)
