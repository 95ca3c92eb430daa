"""What a run has spent: one line per release, on disk before its noise is used; every epsilon is computed from it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import RunError
from fedsim.privacy.gaussian import epsilon_of, mu_of
from fedsim.privacy.sampled import Events, epsilon_of_events

FILE = "ledger.jsonl"
TOLERANCE = 1e-9  # relative, of the budget


@dataclass(frozen=True)
class Entry:
    """One release: its place in the schedule, its noise over sensitivity, and whom it exposes.

    Attributes:
        z: standard deviation over the most exposed unit's sensitivity. rate: of Poisson sampling, 1 without.
        worker: the only one whose data it touches, or None. key: which secret numbers the noise was made of.
        attempt: 0, or a number where the same place was released anew with other noise.
    """

    round: int
    release: str
    step: int
    z: float
    rate: float = 1.0
    worker: int | None = None
    key: str = ""
    attempt: int = 0

    @property
    def place(self) -> tuple[int, str, int, int | None]:
        """Where in the schedule it stands."""
        return self.round, self.release, self.step, self.worker

    @property
    def cost(self) -> tuple[float, float, int | None]:
        """What its price depends on."""
        return self.z, self.rate, self.worker


class Ledger:
    """The releases of a run and what they add up to, per worker.

    Args:
        delta, relation: of the guarantee.
        exposure: `[n]` in (0, 1]: sensitivity of a unit of each worker over that of the most exposed one.
        fresh: noise is drawn anew every time, so that the same place released again is another release.

    Attributes:
        entries: in the order of their release. sampled: whether any of them was Poisson sampled.
        promised: what a worker may be in within the budget, as far as known (the plan that was calibrated).
    """

    def __init__(self, delta: float, relation: str, exposure: Sequence[float], fresh: bool = False) -> None:
        self.delta, self.relation = delta, relation
        self.exposure = np.asarray(exposure, dtype=np.float64)
        self._full = self.exposure**2
        self._fresh = fresh
        self.entries: list[Entry] = []
        self._last: dict[tuple[int, str, int, int | None], Entry] = {}
        self._costs: Counter[tuple[float, float, int | None]] = Counter()
        self._square = np.zeros(len(self.exposure))  # sum of mu^2 per worker, of what is not sampled
        self.sampled = False
        self._seal = hashlib.sha256()
        self._sink: IO[str] | None = None
        self.promised: Events | None = None
        self._allowed: list[Counter[tuple[float, float, int | None]]] = []
        self._stride = 64

    def planned(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return what releasing these would add: nothing where the very same release is there already."""
        new = []
        for entry in entries:
            last = self._last.get(entry.place)
            if last is None:
                new.append(entry)
            elif self._fresh or (last.cost, last.key) != (entry.cost, entry.key):
                new.append(Entry(**{**asdict(entry), "attempt": last.attempt + 1}))
        return new

    def write(self, entries: Iterable[Entry]) -> None:
        """Add releases, on disk first."""
        new = [(entry, _line(entry)) for entry in entries]
        if self._sink is not None and new:
            self._sink.write("".join(line for _, line in new))
            self._pass_on(durable=self._fresh)
        for entry, line in new:
            self._add(entry, line)

    def _add(self, entry: Entry, line: str) -> None:
        self._seal.update(line.encode())
        self.entries.append(entry)
        self._last[entry.place] = entry
        self._costs[entry.cost] += 1
        self.sampled = self.sampled or entry.rate < 1
        if entry.rate == 1:
            self._square += self._squares(entry)

    def _squares(self, entry: Entry) -> NDArray[np.float64]:
        """Return what a release adds to every worker's mu^2, `[n]`."""
        if entry.worker is None:
            return self._full / entry.z**2
        return np.where(np.arange(len(self.exposure)) == entry.worker, entry.z**-2, 0.0)

    def epsilon(self) -> float:
        """Return what the most exposed worker has spent."""
        if not self.sampled:
            return epsilon_of(math.sqrt(float(self._square.max())), self.delta)
        return max(self._price(events) for events in self._distinct(self._costs))

    def by_worker(self) -> list[float]:
        """Return what every worker has spent, `[n]`; with sampling, workers beyond 32 kinds get the largest."""
        if not self.sampled:
            return [epsilon_of(math.sqrt(float(square)), self.delta) for square in self._square]
        events = [self._events(self._costs, worker) for worker in range(len(self.exposure))]
        if len(set(events)) > 32:
            return [self.epsilon()] * len(events)
        return [self._price(own) for own in events]

    def fits(self, entries: Sequence[Entry], budget: float) -> bool:
        """Return whether these may be added without passing the budget."""
        if not self.sampled and all(entry.rate == 1 for entry in entries):
            after = sum((self._squares(entry) for entry in entries), self._square)
            return float(after.max()) <= mu_of(budget * (1 + TOLERANCE), self.delta) ** 2
        return self._fits_sampled(Counter(entry.cost for entry in entries), budget)

    def _fits_sampled(self, extra: Counter[tuple[float, float, int | None]], budget: float) -> bool:
        """Ask the accountant as seldom as possible: what fits many times over fits once."""
        after = self._costs + extra
        if any(after <= allowed for allowed in self._allowed):
            return True
        if self.promised and _less(_at_most(after), self.promised):
            return True
        while self._stride >= 1:
            ahead = self._costs + Counter({cost: self._stride * count for cost, count in extra.items()})
            if self._worst(ahead) <= budget * (1 + TOLERANCE):
                self._allowed = [*self._allowed[-7:], ahead]
                return True
            self._stride //= 2
        self._stride = 1
        return False

    def _worst(self, costs: Counter[tuple[float, float, int | None]]) -> float:
        return max(self._price(events) for events in self._distinct(costs))

    def _price(self, events: Events) -> float:
        if all(rate == 1 for _, rate, _ in events):
            return epsilon_of(math.sqrt(sum(count / z**2 for z, _, count in events)), self.delta)
        return epsilon_of_events(events, self.delta, self.relation)

    def _distinct(self, costs: Counter[tuple[float, float, int | None]]) -> set[Events]:
        """Return what different workers are in, without those who are in less than another.

        Of workers with the same releases of their own the most exposed one counts: the accountant is slow.
        """
        own: dict[int, list[tuple[float, float, int]]] = {}
        for (z, rate, only), count in costs.items():
            if only is not None:
                own.setdefault(only, []).append((z, rate, count))
        worst: dict[tuple[tuple[float, float, int], ...], int] = {}
        for worker in np.argsort(self.exposure).tolist():
            worst[tuple(sorted(own.get(worker, ())))] = worker
        found = {self._events(costs, worker) for worker in worst.values()}
        return {a for a in found if not any(a != b and _less(a, b) for b in found)}

    def bound(self) -> list[tuple[float, float, int]]:
        """Return events (z, rate, how many) that no worker is in more of: per kind, those of the worker with most."""
        every = [self._events(self._costs, worker) for worker in range(len(self.exposure))]
        square = max((sum(count / z**2 for z, rate, count in own if rate == 1) for own in every), default=0.0)
        most: dict[tuple[float, float], int] = {}
        for own in every:
            for z, rate, count in own:
                if rate < 1:
                    most[z, rate] = max(count, most.get((z, rate), 0))
        return [*([(square**-0.5, 1.0, 1)] if square else []), *((z, r, c) for (z, r), c in most.items())]

    def _events(self, costs: Counter[tuple[float, float, int | None]], worker: int) -> Events:
        """Return the events that a worker is in; those without sampling are one Gaussian."""
        square, sampled = 0.0, Counter[tuple[float, float]]()
        for (z, rate, only), count in costs.items():
            own = z / float(self.exposure[worker]) if only is None else z
            if only is None or only == worker:
                if rate == 1:
                    square += count / own**2
                else:
                    sampled[own, rate] += count
        merged = [(square**-0.5, 1.0, 1)] if square else []
        return (*merged, *((z, rate, count) for (z, rate), count in sorted(sampled.items())))

    @property
    def seal(self) -> bytes:
        """SHA-256 of all entries so far."""
        return self._seal.digest()

    def open(self, folder: Path, again: bool) -> str:
        """Take hold of the folder's ledger, and return what stands in it: nothing, unless `again`.

        A last line that was cut off while it was written is removed: its noise was never used.

        Raises:
            RunError: another process holds it.
        """
        file = folder / FILE
        sink = file.open("a")
        _lock(sink, file)
        self._sink = sink
        if not again:
            sink.truncate(0)
        text = file.read_text(errors="replace")
        kept = whole(text)
        if kept != text:
            with file.open("r+b") as mended:
                mended.truncate(len(kept.encode()))
        if kept and not kept.endswith("\n"):
            self._sink.write("\n")
        return kept

    def begin(self, header: Mapping[str, Any]) -> None:
        """Write the first line of a new ledger."""
        assert self._sink is not None
        self._sink.write(json.dumps(header) + "\n")
        self._pass_on(durable=True)

    def _pass_on(self, durable: bool) -> None:
        """Give the lines to the system, so that they outlive this process; `durable`: a loss of power, too.

        That takes up to milliseconds a round. Noise drawn anew needs it: its release happens once. Reproducible noise
        does not: after a loss, whoever plays the round again makes the same release.
        """
        assert self._sink is not None
        self._sink.flush()
        if durable:
            os.fsync(self._sink.fileno())

    def merge(self, text: str, least: int = 0, seal: bytes = b"") -> None:
        """Add what an earlier part of this run released; `text` is the file's.

        Args:
            least, seal: how many releases a checkpoint has counted, and their `seal` then.

        Raises:
            RunError: they are not there, or are others; or a line is no release.
        """
        entries = read(text)[1] if text else []
        if len(entries) < least:
            raise RunError(
                f"{FILE}: {len(entries)} releases are there, the checkpoint has counted {least}; a run is not"
                " resumed on a ledger that forgets"
            )
        for count, entry in enumerate(entries, start=1):
            self._add(entry, _line(entry))
            if count == least and seal and self.seal != seal:
                raise RunError(
                    f"{FILE}: the first {least} releases are not those that the checkpoint has counted; a run is not"
                    " resumed on a ledger that was changed"
                )

    def close(self) -> None:
        """Let go of the file."""
        if self._sink is not None:
            self._pass_on(durable=True)
            self._sink.close()
            self._sink = None


def _line(entry: Entry) -> str:
    """Return a release as a line of JSON; a run has thousands that differ in where they stand only."""
    worker = "null" if entry.worker is None else entry.worker
    place = f'"round": {entry.round}, "step": {entry.step}, "worker": {worker}, "attempt": {entry.attempt}'
    return f"{{{place}, {_price_tag(entry.release, entry.z, entry.rate, entry.key)}}}\n"


@lru_cache(maxsize=256)
def _price_tag(release: str, z: float, rate: float, key: str) -> str:
    return json.dumps({"release": release, "z": z, "rate": rate, "key": key})[1:-1]


def _at_most(costs: Mapping[tuple[float, float, int | None], int]) -> Events:
    """Return events that no worker is in more of, all taken for most exposed ones: quick, and errs upwards only."""
    everybody, alone = Counter[tuple[float, float]](), dict[tuple[float, float], int]()
    for (z, rate, worker), count in costs.items():
        if worker is None:
            everybody[z, rate] += count
        else:
            alone[z, rate] = max(count, alone.get((z, rate), 0))
    kinds = {**everybody, **alone}
    return tuple((z, rate, everybody[z, rate] + alone.get((z, rate), 0)) for z, rate in kinds)


def _less(a: Events, b: Events) -> bool:
    """Return whether a is contained in b: the same sampled kinds at most as often, and no less Gaussian noise."""
    many = {(z, rate): count for z, rate, count in b if rate < 1}
    square = [sum(count / z**2 for z, rate, count in events if rate == 1) for events in (a, b)]
    return square[0] <= square[1] and all(count <= many.get((z, rate), 0) for z, rate, count in a if rate < 1)


def read(text: str) -> tuple[dict[str, Any], list[Entry]]:
    """Return header and entries of a ledger file, without a last line that was cut off.

    Raises:
        RunError: another line is no release.
    """
    head, *lines = whole(text).split("\n")
    try:
        header = json.loads(head)
    except ValueError:
        raise RunError(f"{FILE}, line 1: {head[:80]!r} is no header") from None
    return header, [_entry(line, number) for number, line in enumerate(lines, start=2) if line]


def whole(text: str) -> str:
    """Return the text without a last line that was cut off."""
    begun, newline, last = text.rpartition("\n")
    try:
        json.loads(last)
    except ValueError:
        return begun + newline
    return text


def _entry(line: str, number: int) -> Entry:
    try:
        entry = Entry(**json.loads(line))
        if entry.round >= 0 and 0 < entry.z < math.inf and 0 < entry.rate <= 1:
            return entry
    except (ValueError, TypeError):
        pass
    raise RunError(f"{FILE}, line {number}: {line[:80]!r} is no release; the file was damaged or changed by hand")


def _lock(sink: IO[str], file: Path) -> None:
    """Keep the file to this process: two that play one run would spend its budget twice."""
    try:
        import fcntl
    except ModuleNotFoundError:  # not on this system
        return
    try:
        fcntl.flock(sink, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sink.close()
        raise RunError(f"{file}: another process plays this run; wait for its end") from None
