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
        from fedsim.topology.generators import maker, parameter_names

        made = maker(kind)
        return f"{inspect.getdoc(made) or kind}\n\nkeys\n" + "\n".join(_parameters(made, parameter_names(made)))
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


def _parameters(function: Any, names: list[str]) -> list[str]:
    defaults = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    return [f"  {n:<16} {'needed' if defaults[n] is inspect.Parameter.empty else repr(defaults[n])}" for n in names]
