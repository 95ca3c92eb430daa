"""Checks every section of a scenario against what it names; all mistakes end up in one report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim import registry
from fedsim.errors import InputError, did_you_mean
from fedsim.reading import Lines, line_of
from fedsim.sections import COSTS, HIGHER_IS_BETTER, METRICS

if TYPE_CHECKING:
    from fedsim.prepare import Live


@dataclass
class Mistakes:
    """Collects everything that is wrong, each with its place, for one report."""

    file: str
    lines: Lines
    found: dict[str, None] = field(default_factory=dict)

    def add(self, path: Sequence[str], message: str) -> None:
        line = line_of(self.lines, path)
        place = f"{self.file}:{line}" if line else self.file
        self.found.setdefault(f"{place}: {'.'.join(str(p) for p in path)}: {message}")

    def refuse(self) -> None:
        if self.found:
            count = "1 mistake" if len(self.found) == 1 else f"{len(self.found)} mistakes"
            raise InputError(f"{count}, nothing was run:\n" + "\n".join(f"  {text}" for text in self.found))


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """Return `cls(**values)`, checked against the annotations of the dataclass; raises pydantic's error."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls).validate_python(dict(values))


def complete(key: str, cls: type, values: Mapping[str, Any], mistakes: Mistakes) -> dict[str, Any]:
    """Return a plain section with its defaults."""
    allowed = [f.name for f in fields(cls)]
    known = known_keys((key,), values, allowed, mistakes)
    try:
        return {name: v for name, v in asdict(build(cls, known)).items() if v is not None or name == "metrics"}
    except Exception as error:
        report((key,), error, mistakes)
        return dict(known)


def known_keys(path: tuple[str, ...], values: Mapping[str, Any], allowed: Sequence[str], mistakes: Mistakes) -> dict:
    """Return the values of known keys; the others are mistakes."""
    for name in values:
        if name not in allowed:
            hint = did_you_mean(str(name), allowed)
            mistakes.add((*path, str(name)), f"unknown key{hint}; known: {', '.join(allowed)}")
    return {name: value for name, value in values.items() if name in allowed}


def report(path: tuple[str, ...], error: Exception, mistakes: Mistakes) -> None:
    """Enter what pydantic found; raise anything else."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        raise error
    merged: dict[tuple[str, ...], list[str]] = {}
    for item in error.errors():
        where = tuple(str(p) for p in item["loc"][:1])
        given = "" if item["type"] == "missing" else f" ({item['input']!r} given)"
        text = "this key is missing" if item["type"] == "missing" else item["msg"][0].lower() + item["msg"][1:] + given
        merged.setdefault((*path, *where), []).append(text)
    for where, texts in merged.items():
        mistakes.add(where, "; or ".join(dict.fromkeys(texts)))


def check_named(sections: dict[str, Any], base: Path, mistakes: Mistakes) -> None:
    """Check the sections that name a component."""
    for section in ("algorithm", "problem"):
        if section in sections:
            _check_component((section,), section, sections[section], base, mistakes)
    problem = sections.get("problem", {})
    _check_patterns(problem.get("composite"), mistakes)
    for part in ("data", "partition", "composite"):
        if isinstance(problem.get(part), Mapping):
            _check_component(("problem", part), part, problem[part], base, mistakes)
    _check_topology(sections.get("topology"), base, mistakes)
    _check_kind("rates", sections.get("rates"), registry.RATES.split(), _rates_keys(), mistakes)
    _check_kind("mixing", sections.get("mixing"), registry.MIXINGS.split(), ("lazy",), mistakes)


def _rates_keys() -> tuple[str, ...]:
    from fedsim.topology.rates import KEYS as keys

    return tuple(k for k in (*keys, "scale") if k not in ("kind", "file"))


# Keys that stand beside the component's own, with what reads them.
BESIDE = {
    "problem": ("data", "partition", "composite", "normalise", "standardise", "bias", "weights", "l2"),
    "data": ("normalise", "bias"),
    "partition": (),
    "composite": ("parameters",),
    "algorithm": (),
}


def _check_component(
    path: tuple[str, ...], section: str, values: Mapping[str, Any], base: Path, mistakes: Mistakes
) -> None:
    rest = dict(values)
    kind = rest.pop("kind", None)
    if not isinstance(kind, str):
        mistakes.add((*path, "kind"), f"missing; known: {', '.join(registry.KINDS[section])}")
        return
    try:
        cls = registry.find(section, kind, base)
    except InputError as error:
        mistakes.add((*path, "kind"), str(error).partition(": ")[2])
        return
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        mistakes.add((*path, "kind"), f"{kind} does not define {', '.join(missing)}")
        return
    if ":" in kind and section == "problem":
        return  # a user's own problem reads its own keys
    if not (isinstance(cls, type) and is_dataclass(cls)):
        mistakes.add((*path, "kind"), f"{kind} is no dataclass; put @dataclass(frozen=True) before the class")
        return
    own = [f.name for f in fields(cls) if f.init]
    beside = [name for name in BESIDE[section] if name not in own]
    known = known_keys(path, rest, (*own, *beside), mistakes)
    try:
        build(cls, {name: value for name, value in known.items() if name in own})
    except InputError as error:
        mistakes.add(path, str(error))
    except Exception as error:
        report(path, error, mistakes)


def _check_patterns(composite: Any, mistakes: Mistakes) -> None:
    patterns = composite.get("parameters") if isinstance(composite, Mapping) else None
    fits = isinstance(patterns, Sequence) and not isinstance(patterns, str) and bool(patterns)
    if patterns is not None and not (fits and all(isinstance(name, str) for name in patterns)):
        text = "given; a list of names of the model's tensors is needed, such as ['*weight']"
        mistakes.add(("problem", "composite", "parameters"), f"{patterns!r} {text}")


def _check_topology(values: Mapping[str, Any] | None, base: Path, mistakes: Mistakes) -> None:
    if values is None:
        return
    from fedsim.topology.generators import maker, parameter_names

    if "file" in values:
        known_keys(("topology",), values, ("file", "name", "order"), mistakes)
        return
    kind = values.get("kind")
    if not isinstance(kind, str):
        mistakes.add(("topology", "kind"), "missing; give kind (ring, torus, ... or any networkx generator) or file")
        return
    try:
        allowed = parameter_names(maker(kind))
    except InputError as error:
        mistakes.add(("topology", "kind"), str(error).partition(": ")[2])
        return
    known_keys(("topology",), values, ("kind", "name", "order", *allowed), mistakes)


def _check_kind(
    section: str, values: Mapping[str, Any] | None, kinds: Sequence[str], keys: Sequence[str], mistakes: Mistakes
) -> None:
    if values is None:
        return
    kind = values.get("kind", kinds[0])
    if kind not in kinds and "file" not in values:
        mistakes.add(
            (section, "kind"), f"{kind!r} is not known{did_you_mean(str(kind), kinds)}; known: {', '.join(kinds)}"
        )
    known_keys((section,), values, ("kind", "file", *keys), mistakes)
    if section == "rates" and values.get("scale", "theory") not in ("theory", "none", None):
        mistakes.add(("rates", "scale"), f"{values['scale']!r} given; theory or none is needed")


def check_stop(values: Mapping[str, Any] | None, mistakes: Mistakes) -> None:
    """Check the conditions' names and bounds."""
    known = (*METRICS, "test_loss", *sorted(HIGHER_IS_BETTER), *COSTS)
    for name, bound in (values or {}).items():
        if name not in known:
            hint = did_you_mean(str(name), known)
            mistakes.add(("stop", str(name)), f"unknown condition{hint}; known: {', '.join(known)}")
        elif isinstance(bound, bool) or not isinstance(bound, int | float) or not bound > 0:
            mistakes.add(("stop", str(name)), f"{bound!r} given, a number above 0 needed")


def check_schedule(sections: dict[str, Any], base: Path, live: Live | None, mistakes: Mistakes) -> None:
    """Set the schedule's kind from the algorithm, and refuse combinations that mean nothing."""
    from fedsim.algorithms.algorithm import SyncAlgorithm

    schedule = sections.get("schedule")
    cls: Any = type(live.algorithm) if live and live.algorithm is not None else None
    if cls is None:
        try:
            cls = registry.find("algorithm", str(sections.get("algorithm", {}).get("kind")), base)
        except InputError:
            return  # reported already
    if schedule is None:
        return
    sync = issubclass(cls, SyncAlgorithm)
    needed, name = ("rounds" if sync else "poisson"), getattr(cls, "kind", cls.__name__)
    live_time = schedule.get("kind") == "live" and not sync
    if schedule.get("unit") is not None and not live_time:
        mistakes.add(("schedule", "unit"), "only live time has a unit in seconds; give kind: live")
    if schedule.get("kind", needed) != needed and not live_time:
        what = "in rounds" if sync else "by events"
        mistakes.add(("schedule", "kind"), f"{schedule['kind']!r} given, but {name} works {what}: {needed} is needed")
    schedule["kind"] = "live" if live_time else needed
    if sync and not isinstance(schedule.get("horizon"), str) and float(schedule.get("horizon", 1)) % 1:
        mistakes.add(("schedule", "horizon"), f"{schedule['horizon']} given, a whole number of rounds needed")
    unused = "rates" if sync else "mixing"
    if unused in sections:
        text = "mixes in rounds and has no gossip rates; leave rates out" if sync else "does not mix; leave mixing out"
        mistakes.add((unused,), f"{name} {text}")
