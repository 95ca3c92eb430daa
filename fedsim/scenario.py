"""A scenario file becomes a study: one frozen, resolved scenario per variant and seed, or one report of mistakes."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim import registry
from fedsim.errors import InputError, did_you_mean
from fedsim.reading import Lines, line_of, read_value, read_yaml
from fedsim.sections import COSTS, METRICS, PLAIN

if TYPE_CHECKING:
    from fedsim.algorithms.algorithm import Algorithm
    from fedsim.prepare import Live

SECTIONS = ("topology", "rates", "mixing", "problem", "start", "algorithm", "schedule", "privacy", "stop", "record")
KEYS = ("name", "claim", "seed", "data_seed", *SECTIONS, "checkpoint", "engine", "seeds", "variants", "short")
NOT_IN_DIGEST = ("name", "claim", "record", "checkpoint", "engine")


@dataclass(frozen=True, eq=False)
class Scenario:
    """Everything that one run depends on, with defaults filled in; equal scenarios give equal results.

    Sections are dictionaries with the keys of the file. `data_seed` seeds graph, data and partition (the file's
    seed, so that they stay the same over the seeds of a study; `each`: the run's own). `variant` and `folder` name the
    run in its study, `base` is the folder that relative files are looked up from. `live` lists sections given as
    objects instead.
    """

    name: str
    seed: int
    data_seed: int
    sections: Mapping[str, Any]
    base: Path
    claim: str = ""
    variant: str | None = None
    folder: str = "run"
    live: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        if name in (*SECTIONS, "checkpoint", "engine"):
            return self.__dict__["sections"].get(name)
        raise AttributeError(name)

    def content(self) -> dict[str, Any]:
        """Return the scenario as one dictionary, as `scenario.yaml` holds it."""
        return {"name": self.name, "seed": self.seed, "data_seed": self.data_seed, **copy.deepcopy(dict(self.sections))}

    def digest(self) -> str:
        """Return the SHA-256 of everything that results depend on, hashes of the user's own code included."""
        kept = {key: value for key, value in self.content().items() if key not in NOT_IN_DIGEST}
        text = json.dumps({**kept, "sources": dict(self.sources), "live": self.live}, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_yaml(self) -> str:
        """Return the resolved scenario as a file that runs by itself."""
        import yaml

        head = {"claim": self.claim} if self.claim else {}
        return yaml.safe_dump({**self.content(), **head}, sort_keys=False, allow_unicode=True)

    def make_algorithm(self) -> Algorithm:
        """Return the algorithm with the scenario's parameters, not yet resolved."""
        section = dict(self.algorithm)
        return build(registry.find("algorithm", section.pop("kind"), self.base), section)


@dataclass(frozen=True)
class Study:
    """The runs that one scenario file asks for: variants times seeds, one run where there are neither."""

    name: str
    runs: tuple[Scenario, ...]
    claim: str = ""


@dataclass
class _Mistakes:
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


def load_study(
    source: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    short: bool = False,
    live: Live | None = None,
    base: Path | None = None,
) -> Study:
    """Read, override and check a scenario; order of overrides: file, variant, short, then these.

    Args:
        source: a file, or the same as a dictionary.
        overrides: `"algorithm.gamma=0.1"` strings, or dotted keys and values.
        short: apply the scenario's `short` block.
        live: objects that replace the sections topology, problem, algorithm.
        base: folder that relative files are looked up from (default: the scenario's own).

    Raises:
        InputError: one report of all mistakes, each with file, line and key.
    """
    if isinstance(source, str | Path):
        file = Path(source)
        content, lines = read_yaml(file)
        base, name = base or file.resolve().parent, file.stem
    else:
        content, lines, file = copy.deepcopy(dict(source)), {}, Path("scenario")
        base, name = base or Path.cwd(), "run"
    mistakes = _Mistakes(str(source) if isinstance(source, str | Path) else "scenario", lines)
    _refuse_unknown_keys(content, mistakes)
    given = tuple(s for s in ("topology", "problem", "algorithm") if live and getattr(live, s) is not None)
    extra = _parsed(overrides)
    if short and "short" not in content:
        mistakes.add(("short",), "this scenario has no short form; run it without --short")
    runs = []
    for variant, seed, merged in _expand(content, extra, short, mistakes):
        runs.append(_scenario(merged, name, base, variant, seed, given, live, mistakes))
    mistakes.refuse()
    title = str(content.get("name", name))
    return Study(title, _with_folders(runs, title), str(content.get("claim", "")))


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """Return `cls(**values)`, checked against the annotations of the dataclass; raises pydantic's error."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls).validate_python(dict(values))


def override(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key; changing `X.kind` drops the other keys of X, and so does a `file` that stands for a kind.

    Raises:
        InputError: the path goes through something that is not a section.
    """
    *path, last = key.split(".")
    place = content
    for part in path:
        inner = place.setdefault(part, {})
        if inner is None:
            inner = place[part] = {}
        if not isinstance(inner, dict):
            raise InputError(f"override {key}: {part!r} is {inner!r}, not a section with keys")
        place = inner
    replaces = last == "kind" or (last == "file" and path in (["topology"], ["rates"], ["mixing"]))
    if replaces and path and place.get(last) != value:
        place.clear()
    place[last] = copy.deepcopy(value)


def _parsed(overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(overrides, Mapping):
        return dict(overrides)
    parsed = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
            raise InputError(f"override {text!r}: KEY=VALUE is needed, such as algorithm.gamma=0.1")
        parsed[key] = read_value(value)
    return parsed


def _expand(
    content: dict[str, Any], extra: dict[str, Any], short: bool, mistakes: _Mistakes
) -> Iterator[tuple[str | None, int, dict[str, Any]]]:
    """Yield (variant, seed, merged sections) for every run."""
    variants = content.get("variants") or {None: {}}
    if not isinstance(variants, Mapping) or not all(isinstance(v, Mapping | None) for v in variants.values()):
        mistakes.add(("variants",), "a name and a set of dotted overrides for each variant are needed")
        variants = {None: {}}
    brief = content.get("short") or {} if short else {}
    for name, changes in variants.items():
        merged = {key: copy.deepcopy(v) for key, v in content.items() if key not in ("variants", "short")}
        for part, where in ((changes or {}, ("variants", str(name))), (brief, ("short",)), (extra, ("command line",))):
            _apply(merged, part, where, mistakes)
        merged = {key: value for key, value in merged.items() if key not in ("variants", "short")}
        for seed in _seeds(merged, mistakes):
            yield (None if name is None else str(name)), seed, copy.deepcopy(merged)


def _apply(merged: dict[str, Any], changes: Mapping[str, Any], where: tuple[str, ...], mistakes: _Mistakes) -> None:
    for key, value in sorted(changes.items(), key=lambda item: not str(item[0]).endswith((".kind", ".file"))):
        top = str(key).split(".")[0]
        if top not in KEYS or top in ("variants", "short"):
            mistakes.add((*where, str(key)), f"no section {top!r}{did_you_mean(top, KEYS)}")
            continue
        try:
            override(merged, str(key), value)
        except InputError as error:
            mistakes.add((*where, str(key)), str(error))


def _seeds(merged: dict[str, Any], mistakes: _Mistakes) -> list[int]:
    first, seeds = merged.get("seed", 0), merged.get("seeds", 1)
    if not _whole(first) or first < 0:
        mistakes.add(("seed",), f"{first!r} given, a whole number of at least 0 needed")
        return [0]
    if isinstance(seeds, list) and seeds and all(_whole(s) and s >= 0 for s in seeds):
        return seeds
    if not isinstance(seeds, int) or not _whole(seeds) or seeds < 1:
        mistakes.add(("seeds",), f"{seeds!r} given; a number of seeds (at least 1) or a list of seeds is needed")
        return [first]
    return list(range(first, first + seeds))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse_unknown_keys(content: Mapping[str, Any], mistakes: _Mistakes) -> None:
    for key in content:
        if key not in KEYS:
            mistakes.add((str(key),), f"unknown key{did_you_mean(str(key), KEYS)}; known: {', '.join(KEYS)}")


def _scenario(
    merged: dict[str, Any],
    name: str,
    base: Path,
    variant: str | None,
    seed: int,
    given: tuple[str, ...],
    live: Live | None,
    mistakes: _Mistakes,
) -> Scenario:
    """Check and complete every section of one run."""
    sections: dict[str, Any] = {}
    for section in ("topology", "problem", "algorithm", "schedule"):
        if section not in merged and section not in given:
            mistakes.add((section,), "missing; every scenario needs topology, problem, algorithm and schedule")
    for key in (*SECTIONS, "checkpoint", "engine"):
        value = merged.get(key)
        if value is not None and not isinstance(value, Mapping):
            such = f", such as {key}: {{kind: {value}}}" if isinstance(value, str) else ""
            mistakes.add((key,), f"{value!r} given, a section with keys needed{such}")
            value = None
        if value is not None:
            sections[key] = dict(value)
    for key, cls in PLAIN.items():
        if key in sections or key in ("start", "record", "engine"):
            sections[key] = _plain(key, cls, sections.get(key, {}), mistakes)
    _check_named(sections, base, mistakes)
    _check_stop(sections.get("stop"), mistakes)
    _check_schedule(sections, base, live, mistakes)
    return Scenario(
        name=str(merged.get("name", name)),
        seed=seed,
        data_seed=_data_seed(merged, seed, mistakes),
        sections=sections,
        base=base,
        claim=str(merged.get("claim", "")),
        variant=variant,
        live=given,
        sources=_sources(sections, base),
    )


def _data_seed(merged: Mapping[str, Any], seed: int, mistakes: _Mistakes) -> int:
    given = merged.get("data_seed", merged.get("seed", 0))
    if given == "each":
        return seed
    if given is not None and (not _whole(given) or given < 0):
        if "data_seed" in merged:
            mistakes.add(("data_seed",), f"{given!r} given; a whole number of at least 0, or each, is needed")
        return 0
    return int(given or 0)


def _plain(key: str, cls: type, values: Mapping[str, Any], mistakes: _Mistakes) -> dict[str, Any]:
    allowed = [f.name for f in fields(cls)]
    known = _known_keys((key,), values, allowed, mistakes)
    try:
        return {name: v for name, v in asdict(build(cls, known)).items() if v is not None or name == "metrics"}
    except Exception as error:
        _add_pydantic((key,), error, mistakes)
        return dict(known)


def _known_keys(path: tuple[str, ...], values: Mapping[str, Any], allowed: Sequence[str], mistakes: _Mistakes) -> dict:
    for name in values:
        if name not in allowed:
            hint = did_you_mean(str(name), allowed)
            mistakes.add((*path, str(name)), f"unknown key{hint}; known: {', '.join(allowed)}")
    return {name: value for name, value in values.items() if name in allowed}


def _add_pydantic(path: tuple[str, ...], error: Exception, mistakes: _Mistakes) -> None:
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


def _check_named(sections: dict[str, Any], base: Path, mistakes: _Mistakes) -> None:
    """Check the sections that name a component."""
    for section in ("algorithm", "problem"):
        if section in sections:
            _check_component((section,), section, sections[section], base, mistakes)
    problem = sections.get("problem", {})
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
    "composite": (),
    "algorithm": (),
}


def _check_component(
    path: tuple[str, ...], section: str, values: Mapping[str, Any], base: Path, mistakes: _Mistakes
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
    known = _known_keys(path, rest, (*own, *beside), mistakes)
    try:
        build(cls, {name: value for name, value in known.items() if name in own})
    except InputError as error:
        mistakes.add(path, str(error))
    except Exception as error:
        _add_pydantic(path, error, mistakes)


def _check_topology(values: Mapping[str, Any] | None, base: Path, mistakes: _Mistakes) -> None:
    if values is None:
        return
    from fedsim.topology.generators import maker, parameter_names

    if "file" in values:
        _known_keys(("topology",), values, ("file", "name", "order"), mistakes)
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
    _known_keys(("topology",), values, ("kind", "name", "order", *allowed), mistakes)


def _check_kind(
    section: str, values: Mapping[str, Any] | None, kinds: Sequence[str], keys: Sequence[str], mistakes: _Mistakes
) -> None:
    if values is None:
        return
    kind = values.get("kind", kinds[0])
    if kind not in kinds and "file" not in values:
        mistakes.add(
            (section, "kind"), f"{kind!r} is not known{did_you_mean(str(kind), kinds)}; known: {', '.join(kinds)}"
        )
    _known_keys((section,), values, ("kind", "file", *keys), mistakes)
    if section == "rates" and values.get("scale", "theory") not in ("theory", "none", None):
        mistakes.add(("rates", "scale"), f"{values['scale']!r} given; theory or none is needed")


def _check_stop(values: Mapping[str, Any] | None, mistakes: _Mistakes) -> None:
    for name, bound in (values or {}).items():
        if name not in (*COSTS, *METRICS):
            hint = did_you_mean(str(name), (*COSTS, *METRICS))
            mistakes.add(("stop", str(name)), f"unknown condition{hint}; known: {', '.join((*METRICS, *COSTS))}")
        elif isinstance(bound, bool) or not isinstance(bound, int | float) or not bound > 0:
            mistakes.add(("stop", str(name)), f"{bound!r} given, a number above 0 needed")


def _check_schedule(sections: dict[str, Any], base: Path, live: Live | None, mistakes: _Mistakes) -> None:
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


def _sources(sections: Mapping[str, Any], base: Path) -> dict[str, str]:
    found = {}
    for section in ("problem", "algorithm"):
        kind = str(sections.get(section, {}).get("kind", ""))
        if ".py:" in kind and (base / kind.rpartition(":")[0]).is_file():
            found[kind] = registry.fingerprint(kind, base) or ""
    return found


def _with_folders(runs: list[Scenario], title: str) -> tuple[Scenario, ...]:
    """Give every run of a study a folder name that tells variant and seed."""
    from dataclasses import replace

    if len(runs) == 1:
        return (replace(runs[0], folder=title),)
    return tuple(
        replace(run, folder="-".join([*([_slug(run.variant)] if run.variant else []), f"seed{run.seed}"]))
        for run in runs
    )


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "variant"
