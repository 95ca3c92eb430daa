"""What a kind is and which keys it has, from its own class: `fedsim list data csv`."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from fedsim import registry


def describe(section: str, kind: str) -> str:
    """Return the docstring of a kind and one line for each of its keys.

    Raises:
        InputError: there is no such kind.
    """
    if section == "topology":
        from fedsim.topology.generators import maker

        made = maker(kind)
        return f"{inspect.getdoc(made) or kind}\n\nkeys\n" + "\n".join(_parameters(made))
    cls = registry.find(section, kind, Path.cwd())
    text = inspect.getdoc(cls) or registry.known(section, kind).summary
    keys = [_key(f) for f in fields(cls) if f.init] if is_dataclass(cls) else []
    return text + ("\n\nkeys\n" + "\n".join(keys) if keys else "")


def _key(f: Field[Any]) -> str:
    annotation = f.type if isinstance(f.type, str) else inspect.formatannotation(f.type)
    if f.default is not MISSING:
        default = repr(f.default)
    else:
        default = "needed" if f.default_factory is MISSING else repr(f.default_factory())
    return f"  {f.name:<16} {default:<16} {annotation}"


def _parameters(function: Any) -> list[str]:
    given = list(inspect.signature(function).parameters.values())
    return [f"  {p.name:<16} {'needed' if p.default is p.empty else p.default!r}" for p in given]
