"""A scenario file becomes a study: one frozen, resolved scenario per variant and seed, or one report of mistakes."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim import registry
from fedsim.checks import Mistakes, build, check_named, check_schedule, check_stop, complete, known_keys, report
from fedsim.errors import InputError, did_you_mean
from fedsim.grid import axes_of, cells_of, label
from fedsim.reading import read_value, read_yaml
from fedsim.sections import PLAIN

if TYPE_CHECKING:
    from fedsim.algorithms.algorithm import Algorithm
    from fedsim.grid import Axes, Cell
    from fedsim.prepare import Live
    from fedsim.tuning import Select

SECTIONS = ("topology", "rates", "mixing", "problem", "start", "algorithm", "schedule", "privacy", "stop", "record")
KEYS = (
    "name",
    "claim",
    "seed",
    "data_seed",
    *SECTIONS,
    "checkpoint",
    "engine",
    "seeds",
    "variants",
    "sweep",
    "select",
    "short",
)
OF_STUDY = ("variants", "short")
NO_AXES = ("name", "claim", "seed", "seeds", "variants", "sweep", "select", "short")
NOT_IN_DIGEST = ("name", "claim", "record", "checkpoint", "engine")


@dataclass(frozen=True, eq=False)
class Scenario:
    """Everything that one run depends on, with defaults filled in; equal scenarios give equal results.

    Sections are dictionaries with the keys of the file. `data_seed` seeds graph, data and partition (the file's
    seed, so that they stay the same over the seeds of a study; `each`: the run's own). `variant` and `folder` name the
    run in its study; in a sweep `of` is the variant that it is a cell of, and `cell` the values of the swept keys.
    `base` is the folder that relative files are looked up from. `live` lists sections given as objects instead.
    """

    name: str
    seed: int
    data_seed: int
    sections: Mapping[str, Any]
    base: Path
    claim: str = ""
    variant: str | None = None
    folder: str = "run"
    of: str | None = None
    cell: Mapping[str, Any] = field(default_factory=dict)
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

    def identity(self) -> dict[str, Any]:
        """Return what tells this run from the others of its study, as `run.json` holds it."""
        cell = {"of": self.of, "cell": dict(self.cell)} if self.cell else {}
        own = {"name": self.name, "variant": self.variant, "seed": self.seed, "base": str(self.base)}
        return {**own, **cell}

    def key(self) -> str:
        """Return the SHA-256 of all that a result file depends on: a run with the same key need not be played again.

        Beside what `digest` covers: what is recorded, live engines, the files that are named, and fedsim's version.
        """
        engine = {k: v for k, v in (self.engine or {}).items() if k not in ("transport", "block", "player", "timeout")}
        parts = (
            self.digest(),
            dict(self.record or {}),
            engine,
            _named_files(self.sections, self.base),
            version("fedsim"),
        )
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

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
    """The runs that one scenario file asks for: variants times cells of the sweep times seeds, or one run.

    With `select`, `tuning` are the runs that it looks at, and of `runs` only those of the cells it picks are played.
    `axes` are the swept values of each variant, `source` is what it was read from: `load_study(**source)` gives it
    again.
    """

    name: str
    runs: tuple[Scenario, ...]
    claim: str = ""
    tuning: tuple[Scenario, ...] = ()
    select: Select | None = None
    axes: Mapping[str | None, Axes] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_sweep(self) -> bool:
        """Whether it has cells."""
        return any(self.axes.values())


def load_study(
    source: str | Path | Mapping[str, Any],
    *,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    short: bool = False,
    live: Live | None = None,
    base: str | Path | None = None,
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
        base, name = Path(base or file.resolve().parent), file.stem
    else:
        content, lines, file = copy.deepcopy(dict(source)), {}, Path("scenario")
        base, name = Path(base or Path.cwd()), "run"
    mistakes = Mistakes(str(source) if isinstance(source, str | Path) else "scenario", lines)
    _refuse_unknown_keys(content, mistakes)
    given = tuple(s for s in ("topology", "problem", "algorithm") if live and getattr(live, s) is not None)
    if short and "short" not in content:
        mistakes.add(("short",), "this scenario has no short form; run it without --short")
    reader = _Reader(name, base, given, live, mistakes)
    extra = parsed(overrides)
    grids = [reader.grid(*part) for part in _variants(content, extra, short, mistakes)]
    reader.refuse_unfair(grids)
    mistakes.refuse()
    title, sweep = str(extra.get("name", content.get("name", name))), any(grid.axes for grid in grids)
    runs, tuning = [r for grid in grids for r in grid.runs], [r for grid in grids for r in grid.tuning]
    return Study(
        title,
        _with_folders(runs, title, sweep),
        str(content.get("claim", "")),
        _with_folders(tuning, title, sweep),
        grids[0].select,
        {grid.variant: grid.axes for grid in grids},
        {"source": {**content, "name": title}, "overrides": extra, "short": short, "base": str(base)},
    )


@dataclass(frozen=True)
class _Grid:
    """The runs of one variant."""

    variant: str | None
    axes: Axes
    select: Select | None
    runs: list[Scenario]
    tuning: list[Scenario]


@dataclass(frozen=True)
class _Reader:
    """Makes runs of merged sections; what is wrong goes to `mistakes`."""

    name: str
    base: Path
    given: tuple[str, ...]
    live: Live | None
    mistakes: Mistakes

    def grid(self, variant: str | None, merged: dict[str, Any]) -> _Grid:
        """Return a variant's runs: cells times seeds, and those for tuning."""
        axes, select = _axes(merged, self.mistakes), _select(merged, self.mistakes)
        seeds = _seeds(merged, self.mistakes)
        apart = self._tuning_seeds(select, seeds)
        runs, tuning = [], []
        for cell in cells_of(axes):
            at = self._at(merged, cell)
            first = replace(self._scenario(at, seeds[0]), of=variant, cell=cell)
            title = label(variant, cell, axes)
            runs += [_seeded(first, at, seed, variant if select else title) for seed in seeds]
            tuning += [_seeded(first, at, seed, title) for seed in apart]
        return _Grid(variant, axes, select, runs, tuning)

    def refuse_unfair(self, grids: Sequence[_Grid]) -> None:
        """Check what `select` asks for against all variants."""
        from fedsim.tuning import refuse_unequal

        select = grids[0].select
        if any(grid.select != select for grid in grids):
            self.mistakes.add(("variants",), "select is for all variants; one cannot have its own")
        if select is None:
            return
        if not any(grid.axes for grid in grids):
            self.mistakes.add(("select",), "nothing to select from; give sweep: a grid")
        try:
            refuse_unequal(select, {grid.variant: len(cells_of(grid.axes)) for grid in grids})
        except InputError as error:
            self.mistakes.add(("select",), str(error))

    def _tuning_seeds(self, select: Select | None, seeds: Sequence[int]) -> list[int]:
        from fedsim.tuning import tuning_seeds

        try:
            return tuning_seeds(select, seeds) if select else []
        except InputError as error:
            self.mistakes.add(("select", "seeds"), str(error))
            return []

    def _starts_itself(self, problem: Mapping[str, Any]) -> bool:
        """Return whether nodes start from the problem's own point unless told otherwise: a network's first weights."""
        given = self.live.problem if self.live else None
        return problem.get("kind") == "module" if given is None else given.own_start

    def _at(self, merged: dict[str, Any], cell: Cell) -> dict[str, Any]:
        at = copy.deepcopy(merged)
        _apply(at, cell, ("sweep",), self.mistakes)
        return at

    def _scenario(self, merged: dict[str, Any], seed: int) -> Scenario:
        """Check and complete every section of one run."""
        sections: dict[str, Any] = {}
        for section in ("topology", "problem", "algorithm", "schedule"):
            if section not in merged and section not in self.given:
                self.mistakes.add((section,), "missing; every scenario needs topology, problem, algorithm and schedule")
        for key in (*SECTIONS, "checkpoint", "engine"):
            value = merged.get(key)
            if value is not None and not isinstance(value, Mapping):
                such = f", such as {key}: {{kind: {value}}}" if isinstance(value, str) else ""
                self.mistakes.add((key,), f"{value!r} given, a section with keys needed{such}")
            elif value is not None:
                sections[key] = dict(value)
        if self._starts_itself(sections.get("problem", {})):
            sections["start"] = {"kind": "problem", **sections.get("start", {})}
        for key, cls in PLAIN.items():
            if key in sections or key in ("start", "record", "engine"):
                sections[key] = complete(key, cls, sections.get(key, {}), self.mistakes)
        check_named(sections, self.base, self.mistakes)
        check_stop(sections.get("stop"), self.mistakes)
        check_schedule(sections, self.base, self.live, self.mistakes)
        return Scenario(
            name=str(merged.get("name", self.name)),
            seed=seed,
            data_seed=_data_seed(merged, seed, self.mistakes),
            sections=sections,
            base=self.base,
            claim=str(merged.get("claim", "")),
            live=self.given,
            sources=_sources(sections, self.base),
        )


def _seeded(scenario: Scenario, merged: Mapping[str, Any], seed: int, variant: str | None) -> Scenario:
    own = seed if merged.get("data_seed") == "each" else scenario.data_seed
    return replace(scenario, seed=seed, data_seed=own, variant=variant)


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


def parsed(overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Return overrides as dotted keys and values.

    Raises:
        InputError: a text that is not KEY=VALUE.
    """
    if isinstance(overrides, Mapping):
        return dict(overrides)
    parsed = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
            raise InputError(f"override {text!r}: KEY=VALUE is needed, such as algorithm.gamma=0.1")
        parsed[key] = read_value(value)
    return parsed


def _variants(
    content: dict[str, Any], extra: dict[str, Any], short: bool, mistakes: Mistakes
) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Yield (variant, merged sections) for every variant."""
    variants = content.get("variants") or {None: {}}
    if not isinstance(variants, Mapping) or not all(isinstance(v, Mapping | None) for v in variants.values()):
        mistakes.add(("variants",), "a name and a set of dotted overrides for each variant are needed")
        variants = {None: {}}
    brief = content.get("short") or {} if short else {}
    for name, changes in variants.items():
        merged = {key: copy.deepcopy(v) for key, v in content.items() if key not in OF_STUDY}
        for part, where in ((changes or {}, ("variants", str(name))), (brief, ("short",)), (extra, ("command line",))):
            _apply(merged, part, where, mistakes)
        yield (None if name is None else str(name)), merged


def _axes(merged: dict[str, Any], mistakes: Mistakes) -> Axes:
    section = merged.get("sweep") or {}
    if not isinstance(section, Mapping):
        mistakes.add(("sweep",), f"{section!r} given; dotted keys with lists of values are needed")
        return {}
    try:
        axes = axes_of(section)
    except InputError as error:
        mistakes.add(("sweep",), str(error))
        return {}
    for key in axes:
        if key.partition(".")[0] in NO_AXES:
            mistakes.add(("sweep", key), "cannot be swept; sweep the keys of sections (seeds has its own key)")
    return axes


def _select(merged: dict[str, Any], mistakes: Mistakes) -> Select | None:
    from fedsim.tuning import Select, refuse_cost

    section = merged.get("select")
    if section is None:
        return None
    if not isinstance(section, Mapping):
        mistakes.add(("select",), f"{section!r} given; metric and seeds are needed, such as {{metric: loss, seeds: 3}}")
        return None
    try:
        select = build(Select, known_keys(("select",), section, [f.name for f in fields(Select)], mistakes))
        refuse_cost(select)
        return select
    except InputError as error:
        mistakes.add(("select", "at"), str(error))
    except (TypeError, ValueError) as error:
        report(("select",), error, mistakes)
    return None


def _apply(merged: dict[str, Any], changes: Mapping[str, Any], where: tuple[str, ...], mistakes: Mistakes) -> None:
    for key, value in sorted(changes.items(), key=lambda item: not str(item[0]).endswith((".kind", ".file"))):
        top, _, rest = str(key).partition(".")
        if top in OF_STUDY:
            mistakes.add((*where, str(key)), f"{top} stands in the file alone; nothing can override it")
            continue
        if top not in KEYS:
            mistakes.add((*where, str(key)), f"no section {top!r}{did_you_mean(top, KEYS)}")
            continue
        if top == "sweep" and rest:  # the keys of a sweep are dotted themselves
            merged["sweep"] = {**(merged.get("sweep") or {}), rest: value}
            continue
        try:
            override(merged, str(key), value)
        except InputError as error:
            mistakes.add((*where, str(key)), str(error))


def _seeds(merged: dict[str, Any], mistakes: Mistakes) -> list[int]:
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


def _refuse_unknown_keys(content: Mapping[str, Any], mistakes: Mistakes) -> None:
    for key in content:
        if key not in KEYS:
            mistakes.add((str(key),), f"unknown key{did_you_mean(str(key), KEYS)}; known: {', '.join(KEYS)}")


def _data_seed(merged: Mapping[str, Any], seed: int, mistakes: Mistakes) -> int:
    given = merged.get("data_seed", merged.get("seed", 0))
    if given == "each":
        return seed
    if given is not None and (not _whole(given) or given < 0):
        if "data_seed" in merged:
            mistakes.add(("data_seed",), f"{given!r} given; a whole number of at least 0, or each, is needed")
        return 0
    return int(given or 0)


def _sources(sections: Mapping[str, Any], base: Path) -> dict[str, str]:
    """Return the fingerprints of all own code that the sections name: kinds, models, compressors."""
    return {name: registry.fingerprint(name, base) or "" for name in sorted(_own_code(sections, base))}


def _own_code(value: Any, base: Path) -> set[str]:
    if isinstance(value, Mapping | list):
        inner = value.values() if isinstance(value, Mapping) else value
        return set().union(*(_own_code(part, base) for part in inner))
    known = isinstance(value, str) and ".py:" in value and (base / value.rpartition(":")[0]).is_file()
    return {value} if known else set()


def _named_files(value: Any, base: Path) -> dict[str, str]:
    """Return the hashes of all files that a section's values name."""
    if isinstance(value, Mapping):
        return {k: v for inner in value.values() for k, v in _named_files(inner, base).items()}
    if isinstance(value, list):
        return {k: v for inner in value for k, v in _named_files(inner, base).items()} if len(value) < 100 else {}
    name = str(value).rpartition(":")[0] if ".py:" in str(value) else value
    if not (isinstance(name, str) and 0 < len(name) < 1000 and (base / name).is_file()):
        return {}
    with (base / name).open("rb") as file:
        return {name: hashlib.file_digest(file, "sha256").hexdigest()}


def _with_folders(runs: list[Scenario], title: str, sweep: bool) -> tuple[Scenario, ...]:
    """Give every run of a study a folder name that tells variant and seed, and in a sweep its content."""
    if len(runs) == 1 and not sweep:
        return (replace(runs[0], folder=title),)
    return tuple(replace(run, folder=_folder(run, sweep)) for run in runs)


def _folder(run: Scenario, sweep: bool) -> str:
    parts = [*([_slug(run.variant)] if run.variant else []), f"seed{run.seed}"]
    return "-".join([*parts, run.key()[:12]] if sweep else parts)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text.replace("e+", "e")).strip("-.").lower() or "variant"
