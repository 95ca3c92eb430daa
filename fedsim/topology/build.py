"""From what a scenario or a command line says to a `Topology`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from fedsim.errors import InputError
from fedsim.topology.generators import generate, maker, parameter_names
from fedsim.topology.topology import Order, Topology


def build(spec: Mapping[str, Any] | str, base: Path | None = None, seed: int = 0) -> Topology:
    """Build a topology from `{kind: ..., parameters}`, `{file: ...}` or a command-line text.

    Args:
        spec: a scenario's `topology` section; `name` and `order` (`rcm`, `given`) may be given with any kind.
            A text is read by `parse`.
        base: folder that relative files are looked up from (default: the current one).
        seed: seed of a random graph whose spec gives none.

    Raises:
        InputError: says which key, file or graph property is wrong.
    """
    folder = base or Path.cwd()
    section = parse(spec, folder) if isinstance(spec, str) else dict(spec)
    name, order = section.pop("name", None), _order(section.pop("order", "rcm"))
    if "file" in section:
        from fedsim.topology.files import read

        return read(_only_file(section), folder, name=name, order=order)
    kind = section.pop("kind", None)
    if not isinstance(kind, str):
        raise InputError("topology: give 'kind' (a graph's name) or 'file' (a graph file)")
    if "seed" in parameter_names(maker(kind)):
        section.setdefault("seed", seed)
    return generate(kind, section, name=name, order=order)


def parse(text: str, base: Path | None = None) -> dict[str, Any]:
    """Read `kind:key=value,key=value` (values without a key go by place: `torus:4,5`), a path, or a shipped name."""
    from fedsim.topology.files import find

    if find(text, base or Path.cwd()) is not None:
        return {"file": text}
    kind, _, inside = text.partition(":")
    if "/" in kind or "." in kind:
        raise InputError(f"topology {text!r}: no such file")
    names = parameter_names(maker(kind))
    section: dict[str, Any] = {"kind": kind}
    for place, item in enumerate(filter(None, re.split(r",(?![^\[]*\])", inside))):
        key, equals, value = item.partition("=")
        if not equals:
            if place >= len(names):
                raise InputError(f"topology {text!r}: too many values; {kind} takes {', '.join(names)}")
            key, value = names[place], item
        section[key.strip()] = _value(value)
    return section


def _value(text: str) -> Any:
    import yaml

    try:
        return float(text) if re.fullmatch(r"[-+.\d]+[eE][-+]?\d+", text) else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise InputError(f"topology: cannot read the value {text!r}") from None


def _order(given: Any) -> Order:
    if given not in get_args(Order):
        raise InputError(f"topology: order must be 'rcm' or 'given', got {given!r}")
    return given


def _only_file(section: dict[str, Any]) -> str:
    extra = sorted(set(section) - {"file"})
    if extra:
        raise InputError(f"topology: keys {', '.join(extra)} do not go with 'file'")
    return str(section["file"])
