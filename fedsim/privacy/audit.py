"""An attack on the very mechanism of a run, and what it proves.

The run's algorithm, multipliers, weights, clipping and noise are played on canaries: records (or workers) with the
worst gradient there is. For each, an observer of all releases computes the log-likelihood ratio of the two neighbouring
data sets. How often that is right bounds epsilon from below; how far apart the two cases lie estimates mu.

Two instruments are sharper. Without noise, how far a canary moves every kind of release is seen exactly, and must be
what its noise was made for. And in coordinates that no record enters, the noise itself is heard: its size by kind of
release, and whether it is drawn anew for every round, coordinate and worker.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError
from fedsim.privacy.bounds import certified_epsilon, separation
from fedsim.privacy.ledger import FILE, Ledger, read
from fedsim.privacy.listening import Noises, Play, Tally
from fedsim.privacy.plan import Planned, multipliers

if TYPE_CHECKING:
    from fedsim.prepare import Prepared

ERROR, LEAST_SLACK = 0.05, 0.05


@dataclass(frozen=True)
class Verdict:
    """What an audit found.

    Attributes:
        claimed: epsilon of the releases, by the accountant. certified: lower bound with 95 % confidence.
        mu_claimed, mu_measured: of the releases without sampling (nan where there are none).
        shift_claimed, shift_measured: how far one record moves the sampled releases, in standard deviations of their
            noise, on average over its being drawn (nan where there are none).
        trials: canaries played. delta: of both epsilons. broken: what is wrong, or None.
        reach: by kind of release, the most that one record moves it, over what its noise is made for: 1 at most.
        noise: by kind of release, standard deviation over what it should be: 1.
        correlation: of the noises of different rounds, coordinates and (where each has its own) workers: 0.
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
    reach: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    correlation: dict[str, float] = field(default_factory=dict)

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
        lines += [
            f"reach      {_listed(self.reach)} (of one record, over what the noise is made for; 1 at most)",
            f"noise      {_listed(self.noise)} (measured over claimed; 1)",
            f"correlated {_listed(self.correlation)} (noises of different ones; 0)",
        ]
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
    verdict = audit(p, trials, seed, rounds=1 + max((entry.round for entry in entries), default=-1))
    wrong = _of_ledger(p, ledger, result.facts["privacy"]["epsilon"])
    verdict = Verdict(**{**asdict(verdict), "claimed": ledger.epsilon(), "broken": verdict.broken or wrong})
    if verdict.certified > verdict.claimed and not verdict.broken:
        verdict = Verdict(**{**asdict(verdict), "broken": "certified epsilon above the ledger's"})
    write_whole(folder / "audit.json", to_json(asdict(verdict)) + "\n")
    return verdict


def _of_ledger(p: Prepared, ledger: Ledger, reported: float) -> str | None:
    """Return what the books get wrong, or None."""
    from fedsim.prepare import guard_of

    guard, plan = guard_of(p), {kind.name: kind for kind in _plan(p)}
    assert guard is not None
    assert guard.ledger is not None
    for entry in ledger.entries:
        if entry.release not in plan:
            return f"round {entry.round}: the ledger has a release {entry.release!r}, which the mechanism does not make"
        z, rate = guard.multipliers[entry.release], plan[entry.release].rate
        if abs(entry.z / z - 1) > 1e-9 or entry.rate != rate:
            return (
                f"round {entry.round}: the ledger says noise {entry.z:g} at rate {entry.rate:g}, the mechanism makes"
                f" {z:g} at {rate:g}"
            )
    if not np.array_equal(ledger.exposure, guard.ledger.exposure):
        return "the ledger has other weights of records than the mechanism"
    if not math.isclose(reported, ledger.epsilon(), rel_tol=1e-6):
        return f"the run reports epsilon {reported:g}, its ledger adds up to {ledger.epsilon():g}"
    return None


def _plan(p: Prepared) -> tuple[Planned, ...]:
    return p.algorithm.plan(p.setting)  # type: ignore[attr-defined] - prepare refuses others under a privacy section


def audit(p: Prepared, trials: int = 10_000, seed: int = 0, rounds: int | None = None) -> Verdict:
    """Attack the mechanism of a prepared run with about `trials` canaries, over `rounds` (default: its schedule).

    First and last records of every worker are attacked apart, since code that works in chunks may treat them
    differently; the worse counts.
    """
    privacy, rounds = p.setting.privacy, p.setting.rounds if rounds is None else rounds
    if privacy is None or not rounds:
        raise InputError("audit: nothing was released under a privacy section, so nothing is claimed")
    z = multipliers(privacy, _plan(p))
    groups = ("all",) if privacy.unit == "user" else ("first", "last")
    found = [_attacked(p, z, group, trials // len(groups), seed, rounds) for group in groups]
    claimed, error = found[0].claimed, ERROR / len(groups)
    certified = max(certified_epsilon(f.statistic, f.upper, privacy.delta, error) for f in found)
    mu, shift = (max((_distance(f, kind) for f in found), key=lambda d: d.measured) for kind in ("plain", "sampled"))
    reach = {kind: max(f.reach[kind] for f in found) for kind in found[0].reach}
    noises = Noises()
    for f in found:
        noises += f.noises
    wrong = [*_too_long(reach), *_too_quiet(noises), *_together(noises)]
    if certified > claimed:
        wrong.append(f"epsilon is at least {certified:.4g}, more than the claimed {claimed:.4g}")
    wrong += [*_too_far("mu", mu), *_too_far("the shift of sampled releases", shift)]
    return Verdict(
        claimed,
        certified,
        mu.claimed,
        mu.measured,
        shift.claimed,
        shift.measured,
        sum(len(f.upper) for f in found),
        privacy.delta,
        "; ".join(wrong) or None,
        reach,
        {kind: size for kind, (size, _) in noises.deviations().items()},
        {of: value for of, (value, _) in noises.correlations().items()},
    )


def _too_long(reach: dict[str, float]) -> list[str]:
    return [
        f"one record moves a {kind} {most:.4g} times as far as its noise is made for"
        for kind, most in reach.items()
        if not most <= 1 + 1e-6
    ]


def _too_quiet(noises: Noises) -> list[str]:
    return [
        f"the noise of a {kind} is {size:.3g} times what is claimed"
        for kind, (size, error) in noises.deviations().items()
        if not size >= 1 - max(0.01, 5 * error)
    ]


def _together(noises: Noises) -> list[str]:
    return [
        f"the noises of different {of} go together ({value:.3g}, 0 where they are independent)"
        for of, (value, error) in noises.correlations().items()
        if not abs(value) <= max(0.05, 6 * error)
    ]


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


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


def _too_far(name: str, distance: _Distance) -> list[str]:
    slack = max(LEAST_SLACK * distance.claimed, 4 * distance.error)
    if not distance.measured > distance.claimed + slack:
        return []
    times = distance.measured / distance.claimed
    return [f"{name} is {times:.3g} times what is claimed: too little noise, or records that weigh too much"]


@dataclass(frozen=True)
class _Found:
    """What was heard of all canaries of a group: log-likelihood ratios in standard deviations, tallies, sides."""

    statistic: NDArray[np.float64]
    tallies: dict[str, Tally]
    upper: NDArray[np.bool_]
    claimed: float
    reach: dict[str, float]
    noises: Noises


def _attacked(p: Prepared, z: dict[str, float], group: str, trials: int, seed: int, rounds: int) -> _Found:
    """Return what about `trials` canaries of one group give away, and how far they move releases without noise."""
    plays: list[Play] = []
    noises = Noises()
    while sum(len(play.upper) for play in plays) < trials or not plays:
        plays.append(Play(p, z, group, seed + 1000 * len(plays) + (group == "last"), rounds))
        noises += plays[-1].noises
    tallies = {kind: Tally.joined(play.tallies[kind] for play in plays) for kind in plays[0].tallies}
    square = sum((tally.square for tally in tallies.values()), np.zeros(1))
    total = sum((tally.sum for tally in tallies.values()), np.zeros(1)) / np.sqrt(np.where(square > 0, square, 1.0))
    upper = np.concatenate([play.upper for play in plays])
    reach = Play(p, z, group, seed, rounds, silent=True).reach
    return _Found(total, tallies, upper, plays[0].claimed, reach, noises)
