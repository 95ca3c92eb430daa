"""Checks every section of a scenario against what it names; all mistakes end up in one report."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim import registry
from fedsim.errors import InputError, did_you_mean
from fedsim.reading import Lines
from fedsim.sections import COSTS, HIGHER_IS_BETTER, METRICS, Mixing, Rates

if TYPE_CHECKING:
    from fedsim.prepare import Live


Path_ = tuple[str, ...]


@dataclass(frozen=True)
class Origin:
    """Where the keys of a scenario were given: lines of its file, and what variants, `short` and overrides changed.

    `changed` maps the path of a key to the part that set it (`("variants", "fast")`, `("override",)`) and the path at
    which it stands there.
    """

    file: str = "scenario"
    lines: Lines = field(default_factory=Lines)
    changed: Mapping[Path_, tuple[Path_, Path_]] = field(default_factory=dict)

    def of(self, path: Sequence[str]) -> tuple[str, str]:
        """Return the place of a key, as FILE:LINE, and the key as it is called there."""
        parts = tuple(str(p) for p in path)
        where, source = self._changed(parts)
        if where == ("override",):
            return "override", ".".join(parts)
        line = self.lines.nearest(source)
        return f"{self.file}:{line}" if line else self.file, ".".join((*where, *parts))

    def _changed(self, parts: Path_) -> tuple[Path_, Path_]:
        for length in range(len(parts), 0, -1):
            if parts[:length] in self.changed:
                where, source = self.changed[parts[:length]]
                return where, (*source, *parts[length:])
        return (), parts

    @contextmanager
    def told(self, *section: str) -> Iterator[None]:
        """Have a refusal of what is built from `section` say where that stands."""
        try:
            yield
        except InputError as error:
            if not error.placed:
                head = re.match(r"(\w+(?:\.[\w-]+)*): ", str(error))
                named = tuple(head[1].split(".")) if head else ()
                path = ("problem", *named) if named[:1] in (("data",), ("partition",)) else named
                error.args = (f"{self.of(path if path[:1] == section[:1] else section)[0]}: {error}",)
                error.placed = True
            raise


@dataclass(frozen=True)
class Mistakes:
    """Collects everything that is wrong, each with its place, for one report."""

    origin: Origin = field(default_factory=Origin)
    found: dict[str, None] = field(default_factory=dict)

    def add(self, path: Sequence[str], message: str, line: int | None = None) -> None:
        place, key = self.origin.of(path)
        self.say(f"{place if line is None else f'{self.origin.file}:{line}'}: {key}: {message}")

    def say(self, text: str) -> None:
        self.found.setdefault(text)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Enter a refusal instead of letting it end everything."""
        try:
            yield
        except InputError as error:
            self.say(str(error))

    def refuse(self) -> None:
        if self.found:
            count = "1 mistake" if len(self.found) == 1 else f"{len(self.found)} mistakes"
            error = InputError(f"{count}, nothing was run:\n" + "\n".join(f"  {text}" for text in self.found))
            error.placed = True
            raise error


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """Return `cls(**values)`, checked against the annotations of the dataclass; raises pydantic's error."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls).validate_python(dict(values))


def checked(path: Path_, cls: type, values: Mapping[str, Any], mistakes: Mistakes) -> Any | None:
    """Return `cls(**values)`; enter what is wrong with its values, and return None then."""
    try:
        made = build(cls, values)
    except InputError as error:
        mistakes.add(path, str(error))
        return None
    except Exception as error:
        report(path, error, mistakes)
        return None
    wrong = list(_conversions(values, made, path))
    for place, text in wrong:
        mistakes.add(place, text)
    return None if wrong else made


def _conversions(given: Any, made: Any, path: Path_) -> Iterator[tuple[Path_, str]]:
    """Yield (path, text) where a text or a truth value was taken for a number, or the reverse, or a number is none."""
    if isinstance(given, Mapping):
        for key, value in given.items():
            inner = made.get(key, value) if isinstance(made, Mapping) else getattr(made, str(key), value)
            yield from _conversions(value, inner, (*path, str(key)))
    elif isinstance(given, list | tuple) and isinstance(made, list | tuple) and len(given) == len(made):
        for index, (one, other) in enumerate(zip(given, made, strict=True)):
            yield from _conversions(one, other, (*path, str(index)))
    elif isinstance(given, float) and (math.isnan(given) or (math.isinf(given) and path[0] == "algorithm")):
        yield path, f"{given} given, a finite number needed"
    elif isinstance(made, bool) and not isinstance(given, bool):
        yield path, f"{given!r} given, true or false needed"
    elif isinstance(made, int | float) and not isinstance(made, bool) and isinstance(given, str | bool):
        shown = str(given).lower() if isinstance(given, bool) else repr(given)
        yield path, f"{shown} given, a number needed{' (without quotes)' if isinstance(given, str) else ''}"


def complete(key: str, cls: type, values: Mapping[str, Any], mistakes: Mistakes) -> dict[str, Any]:
    """Return a plain section with its defaults."""
    known = known_keys((key,), values, [f.name for f in fields(cls)], mistakes)
    made = checked((key,), cls, known, mistakes)
    if made is None:
        return dict(known)
    return {name: v for name, v in asdict(made).items() if v is not None or name == "metrics"}


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
        if item["type"] == "literal_error":
            text += did_you_mean(str(item["input"]), re.findall(r"'([^']*)'", item["msg"]))
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
        if problem.get(part) is not None and is_section(("problem", part), problem[part], mistakes):
            _check_component(("problem", part), part, problem[part], base, mistakes)
    _check_topology(sections.get("topology"), base, mistakes)
    for section, cls in (("rates", Rates), ("mixing", Mixing)):
        if section in sections:
            values = known_keys((section,), sections[section], [f.name for f in fields(cls)], mistakes)
            checked((section,), cls, values, mistakes)
    if sections.get("rates"):
        from fedsim.topology.rates import clashes

        for key, why in clashes(sections["rates"]):
            mistakes.add(("rates", key), why)
    mixing = sections.get("mixing") or {}
    if "file" in mixing and "kind" in mixing:
        mistakes.add(("mixing", "kind"), "does not go with file: give one of them")


def is_section(path: Path_, value: Any, mistakes: Mistakes) -> bool:
    """Return whether a value has keys; enter the mistake where it has none."""
    if isinstance(value, Mapping):
        return True
    such = f", such as {path[-1]}: {{kind: {value}}}" if isinstance(value, str) else ""
    mistakes.add(path, f"{value!r} given, a section with keys needed{such}")
    return False


# Keys that stand beside the component's own, with what reads them.
BESIDE = {
    "problem": ("data", "partition", "composite"),
    "data": (),
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
        text = "missing" if kind is None else f"{kind!r} given, a name needed"
        mistakes.add((*path, "kind"), f"{text}; known: {', '.join(registry.KINDS[section])}")
        return
    try:
        cls = registry.find(section, kind, base)
    except InputError as error:
        mistakes.add((*path, "kind"), str(error).partition(": ")[2])
        return
    lack = _lacks(section, kind, cls)
    if lack:
        mistakes.add((*path, "kind"), lack)
        return
    if ":" in kind and section == "problem":
        return  # a user's own problem reads its own keys
    own = [f.name for f in fields(cls) if f.init]
    beside = [name for name in BESIDE.get(section, ()) if name not in own]
    known = known_keys(path, rest, (*own, *beside), mistakes)
    checked(path, cls, {name: value for name, value in known.items() if name in own}, mistakes)
    if section == "problem":
        _check_records(kind, cls, values, mistakes)


def _lacks(section: str, kind: str, cls: Any) -> str | None:
    """Return what keeps a class from being a component of this section."""
    from fedsim.algorithms.algorithm import Algorithm

    if not isinstance(cls, type):
        return f"{kind} is no class"
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        return f"{kind} does not define {', '.join(missing)}"
    if ":" in kind and section == "problem":
        return None
    if section == "algorithm" and not issubclass(cls, Algorithm):
        return f"{kind} is no fedsim algorithm (SyncAlgorithm, DynamicsAlgorithm or EventAlgorithm)"
    return None if is_dataclass(cls) else f"{kind} is no dataclass; put @dataclass(frozen=True) before the class"


def _check_records(kind: str, cls: Any, values: Mapping[str, Any], mistakes: Mistakes) -> None:
    if cls.needs_data and values.get("data") is None:
        mistakes.add(("problem", "data"), f"missing; {kind} needs records, such as data: {{kind: breast_cancer}}")
    for name in ("data", "partition"):
        if not cls.needs_data and values.get(name) is not None:
            mistakes.add(("problem", name), f"{kind} makes its own objectives; leave {name} out")


def _check_patterns(composite: Any, mistakes: Mistakes) -> None:
    patterns = composite.get("parameters") if isinstance(composite, Mapping) else None
    fits = isinstance(patterns, Sequence) and not isinstance(patterns, str) and bool(patterns)
    if patterns is not None and not (fits and all(isinstance(name, str) for name in patterns)):
        text = "given; a list of names of the model's tensors is needed, such as ['*weight']"
        mistakes.add(("problem", "composite", "parameters"), f"{patterns!r} {text}")


def _check_topology(values: Mapping[str, Any] | None, base: Path, mistakes: Mistakes) -> None:
    if values is None:
        return
    from fedsim.topology.generators import maker, parameter_names, wrong_parameters

    if "file" in values:
        known_keys(("topology",), values, ("file", "name", "order"), mistakes)
        return
    kind = values.get("kind")
    if not isinstance(kind, str):
        mistakes.add(("topology", "kind"), "missing; give kind (ring, torus, ... or any networkx generator) or file")
        return
    try:
        make = maker(kind)
    except InputError as error:
        mistakes.add(("topology", "kind"), str(error).partition(": ")[2])
        return
    known = known_keys(("topology",), values, ("kind", "name", "order", *parameter_names(make)), mistakes)
    for key, text in wrong_parameters(make, {k: v for k, v in known.items() if k not in ("kind", "name", "order")}):
        mistakes.add(("topology", key), text)


def check_start(values: Mapping[str, Any] | None, mistakes: Mistakes) -> None:
    """Check that a point is given where, and only where, it is used."""
    kind = (values or {}).get("kind", "zeros")
    if kind == "given" and (values or {}).get("value") is None:
        mistakes.add(("start", "value"), "missing; kind: given needs numbers [dim], or a .npy file")
    if kind != "given" and (values or {}).get("value") is not None:
        mistakes.add(("start", "value"), f"goes with kind: given alone, and {kind!r} is given")


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
    from fedsim.algorithms.algorithm import Algorithm, SyncAlgorithm

    schedule = sections.get("schedule")
    cls: Any = type(live.algorithm) if live and live.algorithm is not None else None
    if cls is None:
        try:
            cls = registry.find("algorithm", str(sections.get("algorithm", {}).get("kind")), base)
        except InputError:
            return  # reported already
    if schedule is None or not (isinstance(cls, type) and issubclass(cls, Algorithm)):
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
    for key, name_ in (("schedule", "horizon"), ("record", "every"), ("checkpoint", "every")) if sync else ():
        count = (sections.get(key) or {}).get(name_)
        if isinstance(count, float) and count % 1:
            mistakes.add((key, name_), f"{count:g} given, a whole number of rounds needed")
    unused = "rates" if sync else "mixing"
    if unused in sections:
        text = "mixes in rounds and has no gossip rates; leave rates out" if sync else "does not mix; leave mixing out"
        mistakes.add((unused,), f"{name} {text}")
