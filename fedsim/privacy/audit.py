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

if TYPE_CHECKING:
    from fedsim.prepare import Prepared
    from fedsim.privacy.requests import Release
    from fedsim.privacy.section import Privacy

ERROR, LEAST_SLACK = 0.05, 0.05
PER_WORKER = 40


@dataclass(frozen=True)
class Verdict:
    """What an audit found.

    Attributes:
        claimed: epsilon of the releases, by the accountant. certified: lower bound with 95 % confidence.
        mu_claimed, mu_measured: of the Gaussian releases attacked (nan where records are sampled).
        trials: canaries played. delta: of both epsilons. broken: what is wrong, or None.
    """

    claimed: float
    certified: float
    mu_claimed: float
    mu_measured: float
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
    error = ERROR / len(groups)
    certified = max(certified_epsilon(s, u, privacy.delta, error) for s, u, _ in found)
    plays = [plays for _, _, plays in found]
    mu, claimed = plays[0].mu, plays[0].claimed
    measured = math.nan if plays[0].sampled else max(separation(s, u) for s, u, _ in found)
    count = sum(len(u) for _, u, _ in found)
    broken = _broken(claimed, certified, mu, measured, count / len(groups))
    return Verdict(claimed, certified, mu, measured, count, privacy.delta, broken)


def _broken(claimed: float, certified: float, mu: float, measured: float, count: float) -> str | None:
    if certified > claimed:
        return f"epsilon is at least {certified:.4g}, more than the claimed {claimed:.4g}"
    slack = max(LEAST_SLACK, 4 * 2 / (math.sqrt(count) * mu)) if mu else LEAST_SLACK
    if measured > mu * (1 + slack):
        return f"mu is {measured / mu:.3g} times what is claimed: too little noise, or records that weigh too much"
    return None


def _attacked(
    p: Prepared, privacy: Privacy, z: dict[str, float], group: str, trials: int, seed: int, rounds: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_], _Play]:
    """Return statistics, sides and the last play of about `trials` canaries of one group."""
    statistics, sides, done, repeat = [], [], 0, 0
    while True:
        play = _Play(p, privacy, z, group, seed + 1000 * repeat + (group == "last"))
        statistics.append(play.statistic(rounds))
        sides.append(play.upper)
        done, repeat = done + len(play.upper), repeat + 1
        if done >= trials:
            return np.concatenate(statistics), np.concatenate(sides), play


class _Play:
    """One play of the mechanism, with canaries on random sides; an observer listens to every release.

    Attributes:
        upper: `[m]`, which canaries are in their first form. mu, claimed: of the releases heard, and of all.
        sampled: whether some of those heard were sampled.
    """

    def __init__(self, p: Prepared, privacy: Privacy, z: dict[str, float], group: str, seed: int) -> None:
        from fedsim.engine.layout import Layout
        from fedsim.engine.rounds import Rounds

        owners = _owners(p, privacy)
        self.upper = np.random.default_rng(seed).random(len(owners)) < 0.5
        side = np.where(self.upper, 1.0, -1.0 if privacy.relation == "replace_one" else 0.0)
        problem = Canaries(p.problem.records, p.problem.shares, side, owners, at_end=group == "last")
        layout = Layout(p.topology)
        self._guard = Guard(privacy, z, problem, layout, seed)
        self._guard.taps.append(self._listen)
        x0 = torch.zeros(layout.rows, problem.dim, dtype=torch.float64)
        algorithm: Any = p.algorithm
        self._player = Rounds(algorithm, problem, layout, {}, x0, seed, guard=self._guard)
        self._rows = p.topology.position[owners] if privacy.trust == "local" else np.zeros(len(owners), np.int64)
        self._local, self._z, self.sampled = privacy.trust == "local", z, False
        self._sum, self._square = np.zeros(len(owners)), 0.0
        self._before = self._now = np.zeros(len(owners))

    def statistic(self, rounds: int) -> NDArray[np.float64]:
        """Return each canary's log-likelihood ratio, up to a constant, in standard deviations: `[m]`."""
        self._player.start()
        for number in range(rounds):
            self._before, self._now = self._now, self._player.outputs()[0].numpy()
            self._player.advance(number + 1)
        assert self._guard.ledger is not None
        self.mu, self.claimed = math.sqrt(self._square), self._guard.ledger.epsilon()
        return self._sum / self.mu

    def _listen(self, release: Release, seen: NDArray[np.float64]) -> None:
        """Add what one release says of every canary: its value along the canary's sign, over noise and multiplier."""
        charge = release.charge
        sign: Any = -1.0 if charge.name == "model" else 1.0  # models move against gradients
        if charge.name == "difference":
            sign = np.sign(self._now - self._before)
        value = seen[self._rows, np.arange(len(self._rows))]
        if self._local:
            noise: Any = self._guard.message_deviations(charge, release.radius)[self._rows]
        else:
            noise = self._guard.deviation(charge, release.radius)
        z = self._z[charge.name]
        self._sum += sign * value / noise / z
        self._square += z**-2
        self.sampled = self.sampled or charge.rate < 1


def _owners(p: Prepared, privacy: Privacy) -> NDArray[np.int64]:
    """Return the worker of each canary: some records of every worker whose records weigh most, or such workers."""
    by_user = privacy.unit == "user"
    weights = p.problem.shares / (1 if by_user else p.problem.records)
    if privacy.trust == "local" and not by_user:
        weights = np.ones(p.problem.n)
    worst = np.flatnonzero(weights >= weights.max() * (1 - 1e-9))
    each = 1 if by_user else np.minimum(np.maximum(p.problem.records[worst] // 2, 1), PER_WORKER)
    return np.repeat(worst, each)
