"""YAML with line numbers, numbers as people write them, and no duplicate keys."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from fedsim.errors import InputError

Lines = dict[tuple[str, ...], int]

# YAML 1.2's float: `1e-3` is a number, which PyYAML alone reads as a string.
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
_INT = re.compile(r"^[-+]?[0-9]+$|^0x[0-9a-fA-F]+$")


class _Loader(yaml.SafeLoader):
    """A safe loader with YAML 1.2's numbers; `yes`, `no`, `on`, `off` stay words."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if not tag.endswith((":float", ":int", ":bool", ":timestamp"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))


def read_yaml(file: Path) -> tuple[dict[str, Any], Lines]:
    """Return the mapping in a file, and the line of each key by its path.

    Raises:
        InputError: there is no such file, it is not YAML, not a mapping, or a key stands twice.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file; give the path of a scenario (.yaml)")
    loader = _Loader(file.read_text())
    try:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise InputError(f"{file}: a mapping of sections is needed (name:, topology:, problem:, ...)")
        lines: Lines = {}
        _walk(root, (), lines, file)
        return loader.construct_document(root), lines
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not readable as YAML: {error}") from error
    finally:
        loader.dispose()


def read_value(text: str) -> Any:
    """Return the value of one YAML scalar or flow collection, as on the command line (`0.1`, `[1, 2]`, `null`)."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{text!r}: not readable as a YAML value: {error}") from error


def line_of(lines: Lines, path: Iterable[str]) -> int | None:
    """Return the line of a key, or of the closest section around it."""
    parts = tuple(str(p) for p in path)
    while parts:
        if parts in lines:
            return lines[parts]
        parts = parts[:-1]
    return None


def _walk(node: yaml.Node, path: tuple[str, ...], lines: Lines, file: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*path, str(key.value))
            if place in lines:
                raise InputError(f"{file}:{key.start_mark.line + 1}: {'.'.join(place)} stands twice; keep one")
            lines[place] = key.start_mark.line + 1
            _walk(value, place, lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _walk(value, (*path, str(index)), lines, file)
