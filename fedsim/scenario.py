"""A scenario file becomes a study: one frozen, resolved scenario per variant and seed, or one report of mistakes."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim import registry
from fedsim.checks import (
    Mistakes,
    Origin,
    build,
    check_named,
    check_schedule,
    check_start,
    check_stop,
    checked,
    complete,
    is_section,
    known_keys,
)
from fedsim.errors import InputError, did_you_mean
from fedsim.grid import axes_of, cells_of, label
from fedsim.reading import read_value, read_yaml
from fedsim.sections import PLAIN

if TYPE_CHECKING:
    from fedsim.algorithms.algorithm import Algorithm
    from fedsim.grid import Axes
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
MOST_SEEDS = 100_000
NOT_IN_DIGEST = ("name", "claim", "record", "checkpoint", "engine")
SEED = "a whole number of at least 0 and below 2^64"


@dataclass(frozen=True, eq=False)
class Scenario:
    """Everything that one run depends on, with defaults filled in; equal scenarios give equal results.

    Sections are dictionaries with the keys of the file. `data_seed` seeds graph, data and partition (the file's
    seed, so that they stay the same over the seeds of a study; `each`: the run's own). `variant` and `folder` name the
    run in its study; in a sweep `of` is the variant that it is a cell of, and `cell` the values of the swept keys.
    `base` is the folder that relative files are looked up from. `live` lists sections given as objects instead.
    `origin` knows where each key was given.
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
    origin: Origin = field(default_factory=Origin)

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
        objects = {"objects": list(self.live)} if self.live else {}
        return {**own, **cell, **objects}

    def marks(self) -> dict[str, Any]:
        """Return what must be the same where a run goes on from a checkpoint: files by their hashes, digest, record."""
        files = _named_files(self.sections, self.base)
        return {"files": files, "scenario_digest": self.digest(), "record": dict(self.record or {})}

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
        """Return the resolved scenario as a file that runs by itself, unless objects stood in for sections."""
        import yaml

        head = {"claim": self.claim} if self.claim else {}
        text = yaml.safe_dump({**self.content(), **head}, sort_keys=False, allow_unicode=True)
        if not self.live:
            return text
        return f"# {', '.join(self.live)}: given as objects from Python; this file does not run without them.\n{text}"

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
        base, name, origin = Path(base or file.resolve().parent), file.stem, Origin(str(source), lines)
    else:
        content, base, name, origin = _plain(source), Path(base or Path.cwd()), "run", Origin()
    mistakes = Mistakes(origin)
    for path, line in origin.lines.again:
        mistakes.add(path, "stands twice; keep one", line)
    _refuse_unknown_keys(content, mistakes)
    given = tuple(s for s in ("topology", "problem", "algorithm") if live and getattr(live, s) is not None)
    if short and "short" not in content:
        mistakes.add(("short",), "this scenario has no short form; run it without --short")
    extra = _overrides(overrides, mistakes)
    title = _name(extra.get("name", content.get("name", name)), mistakes)
    reader = _Reader(title, base, given, live, mistakes)
    grids = [reader.grid(*part) for part in _variants(content, extra, short, mistakes)]
    reader.refuse_unfair(grids)
    mistakes.refuse()
    sweep = any(grid.axes for grid in grids)
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

    def grid(self, variant: str | None, merged: dict[str, Any], origin: Origin) -> _Grid:
        """Return a variant's runs: cells times seeds, and those for tuning."""
        mistakes = replace(self.mistakes, origin=origin)
        axes, select = _axes(merged, mistakes), _select(merged, mistakes)
        seeds = _seeds(merged, mistakes)
        apart = self._tuning_seeds(select, seeds)
        runs, tuning = [], []
        for cell in cells_of(axes):
            at = copy.deepcopy(merged)
            changed = _apply(at, cell, ("sweep",), mistakes)
            first = replace(self._scenario(at, seeds[0], changed), of=variant, cell=cell)
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

    def _scenario(self, merged: dict[str, Any], seed: int, mistakes: Mistakes) -> Scenario:
        """Check and complete every section of one run."""
        sections: dict[str, Any] = {}
        for section in ("topology", "problem", "algorithm", "schedule"):
            if merged.get(section) is None and section not in self.given:
                mistakes.add((section,), "missing; every scenario needs topology, problem, algorithm and schedule")
        for key in (*SECTIONS, "checkpoint", "engine"):
            if merged.get(key) is not None and is_section((key,), merged[key], mistakes):
                sections[key] = dict(merged[key])
        if self._starts_itself(sections.get("problem", {})):
            sections["start"] = {"kind": "problem", **sections.get("start", {})}
        check_start(sections.get("start"), mistakes)
        for key, cls in PLAIN.items():
            if key in sections or key in ("start", "record", "engine"):
                sections[key] = complete(key, cls, sections.get(key, {}), mistakes)
        check_named(sections, self.base, mistakes)
        check_stop(sections.get("stop"), mistakes)
        check_schedule(sections, self.base, self.live, mistakes)
        return Scenario(
            name=self.name,
            seed=seed,
            data_seed=_data_seed(merged, seed, mistakes),
            sections=sections,
            base=self.base,
            claim=_text("claim", merged.get("claim", ""), mistakes),
            live=self.given,
            sources=_sources(sections, self.base),
            origin=mistakes.origin,
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
            raise InputError(f"{part!r} is {inner!r}, not a section with keys")
        place = inner
    if _replaces(path, last) and place.get(last) != value:
        place.clear()
    place[last] = copy.deepcopy(value)


def _replaces(path: Sequence[str], last: str) -> bool:
    """Return whether a key says what its section is, so that another value leaves nothing of the others."""
    return bool(path) and (last == "kind" or (last == "file" and list(path) in (["topology"], ["rates"], ["mixing"])))


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


def _overrides(given: Sequence[str] | Mapping[str, Any], mistakes: Mistakes) -> dict[str, Any]:
    """Return overrides as dotted keys and values; what is no override is a mistake."""
    if isinstance(given, Mapping):
        return _plain(given)
    found: dict[str, Any] = {}
    for text in given:
        try:
            found |= parsed([text])
        except InputError as error:
            mistakes.say(str(error))
    return found


def _plain(value: Any) -> Any:
    """Return a copy with NumPy's numbers, arrays, tuples and paths as what a file would hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    return str(value) if isinstance(value, Path) else copy.deepcopy(value)


def _text(key: str, value: Any, mistakes: Mistakes) -> str:
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return str(value)
    mistakes.add((key,), f"{value!r} given, a text needed")
    return ""


def _name(given: Any, mistakes: Mistakes) -> str:
    """Return the study's name, which its folder (runs/NAME) can have."""
    title = _text("name", given, mistakes)
    bad = not title.strip() or title in (".", "..") or re.search(r"[/\0\n]", title) or len(title.encode()) > 200
    if isinstance(given, str) and bad:
        mistakes.add(("name",), f"{given!r} given; it names a folder: no slash, not empty, at most 200 letters")
    return title


def _variants(
    content: dict[str, Any], extra: dict[str, Any], short: bool, mistakes: Mistakes
) -> Iterator[tuple[str | None, dict[str, Any], Origin]]:
    """Yield (variant, merged sections, where each key comes from) for every variant."""
    variants: Any = content.get("variants") or {None: {}}
    if not isinstance(variants, Mapping) or not all(isinstance(v, Mapping | None) for v in variants.values()):
        mistakes.add(("variants",), "a name and a set of dotted overrides for each variant are needed")
        variants = {None: {}}
    brief = content.get("short") or {}
    if not isinstance(brief, Mapping):
        mistakes.add(("short",), f"{brief!r} given; a set of dotted overrides is needed")
        brief = {}
    _known_sections(brief, ("short",), mistakes)
    for name, changes in variants.items():
        merged, seen = {key: copy.deepcopy(v) for key, v in content.items() if key not in OF_STUDY}, mistakes
        parts = ((changes or {}, ("variants", str(name))), (brief if short else {}, ("short",)), (extra, ("override",)))
        for part, where in parts:
            seen = _apply(merged, part, where, seen)
        yield (None if name is None else str(name)), merged, seen.origin


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
    known = known_keys(("select",), section, [f.name for f in fields(Select)], mistakes)
    select = checked(("select",), Select, known, mistakes)
    try:
        if select is not None:
            refuse_cost(select)
    except InputError as error:
        mistakes.add(("select", "at"), str(error))
    return select


def _known_sections(changes: Mapping[str, Any], where: tuple[str, ...], mistakes: Mistakes) -> dict[str, Any]:
    """Return the overrides of known sections; the others are mistakes."""
    known = {}
    for key, value in changes.items():
        top = str(key).partition(".")[0]
        if top in OF_STUDY:
            mistakes.add((*where, str(key)), f"{top} stands in the file alone; nothing can override it")
        elif top not in KEYS:
            mistakes.add((*where, str(key)), f"no section {top!r}{did_you_mean(top, KEYS)}")
        else:
            known[str(key)] = value
    return known


def _apply(merged: dict[str, Any], changes: Mapping[str, Any], where: tuple[str, ...], mistakes: Mistakes) -> Mistakes:
    """Override keys, outer ones first and kinds before their keys; return what enters mistakes from then on."""
    changed = dict(mistakes.origin.changed)
    known = _known_sections(changes, where, mistakes)
    for key in sorted(known, key=lambda key: (key.count("."), not key.endswith((".kind", ".file")))):
        value, path = known[key], tuple(key.split("."))
        if path[0] == "sweep" and len(path) > 1:  # the keys of a sweep are dotted themselves
            merged["sweep"] = {**(merged.get("sweep") or {}), key.partition(".")[2]: value}
            continue
        try:
            override(merged, key, value)
        except InputError as error:
            mistakes.add((*where, key), str(error))
            continue
        whole = path[:-1] if _replaces(path[:-1], key.rpartition(".")[2]) else path
        changed = {p: at for p, at in changed.items() if p[: len(whole)] != whole}
        changed[whole] = changed[path] = (where, (*where, key))
    return replace(mistakes, origin=replace(mistakes.origin, changed=changed))


def _seeds(merged: dict[str, Any], mistakes: Mistakes) -> list[int]:
    first, seeds = merged.get("seed", 0), merged.get("seeds", 1)
    if not _is_seed(first):
        mistakes.add(("seed",), f"{first!r} given, {SEED} needed")
        first = 0
    if isinstance(seeds, list) and seeds and all(map(_is_seed, seeds)):
        if len(set(seeds)) < len(seeds):
            mistakes.add(("seeds",), f"{seeds!r} given; a seed stands twice, and its runs would be the same")
        return list(dict.fromkeys(seeds))
    if not isinstance(seeds, int) or not _whole(seeds) or not 1 <= seeds <= MOST_SEEDS:
        text = f"a number of seeds (1 to {MOST_SEEDS:,}) or a list of seeds is needed"
        mistakes.add(("seeds",), f"{seeds!r} given; {text}")
        return [first]
    if not _is_seed(first + seeds - 1):
        mistakes.add(("seeds",), f"{seeds} from {first} on given; the last one must be {SEED}")
        return [first]
    return list(range(first, first + seeds))


def _is_seed(value: Any) -> bool:
    return _whole(value) and 0 <= value < 2**64


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
    if given is not None and not _is_seed(given):
        if "data_seed" in merged:
            mistakes.add(("data_seed",), f"{given!r} given; {SEED}, or each, is needed")
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
    slugs = _slugs(run.variant for run in runs)
    return tuple(replace(run, folder=_folder(run, slugs[run.variant], sweep)) for run in runs)


def _slugs(variants: Iterable[str | None]) -> dict[str | None, str]:
    """Return a name for folders per variant; names that come out alike are numbered."""
    found: dict[str | None, str] = {None: ""}
    for variant in variants:
        if variant not in found:
            plain = _slug(str(variant))
            numbered = (f"{plain}-{number}" for number in itertools.count(2))
            found[variant] = (
                plain if plain not in found.values() else next(s for s in numbered if s not in found.values())
            )
    return found


def _folder(run: Scenario, slug: str, sweep: bool) -> str:
    parts = [*([slug] if slug else []), f"seed{run.seed}"]
    return "-".join([*parts, run.key()[:12]] if sweep else parts)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text.replace("e+", "e")).strip("-.").lower()[:100] or "variant"
