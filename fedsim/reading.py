"""YAML with line numbers, numbers as people write them, and no duplicate keys."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedsim.errors import InputError

MOST_KEYS = 100_000  # anchors that repeat anchors grow without end

# YAML 1.2's numbers: `1e-3` is one, which PyYAML alone reads as a string, and `010` is ten, not eight.
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
_INT = re.compile(r"^[-+]?[0-9]+$|^0x[0-9a-fA-F]+$")


class _Loader(yaml.SafeLoader):
    """A safe loader with YAML 1.2's numbers; `yes`, `no`, `on`, `off` stay words."""

    def whole(self, node: yaml.ScalarNode) -> int:
        return int(node.value, 16 if node.value.startswith("0x") else 10)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if not tag.endswith((":float", ":int", ":bool", ":timestamp"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.whole)


@dataclass
class Lines:
    """The line of every key of a file by its path, and of keys that stand there again."""

    of: dict[tuple[str, ...], int] = field(default_factory=dict)
    again: list[tuple[tuple[str, ...], int]] = field(default_factory=list)

    def nearest(self, path: Iterable[str]) -> int | None:
        """Return the line of a key, or of the closest section around it."""
        parts = tuple(str(p) for p in path)
        while parts:
            if parts in self.of:
                return self.of[parts]
            parts = parts[:-1]
        return None


def read_yaml(file: Path) -> tuple[dict[str, Any], Lines]:
    """Return the mapping in a file, and where its keys stand.

    Raises:
        InputError: there is no such file, it cannot be read, it is not UTF-8 or not YAML, or not a mapping.
    """
    text, lines = _text(file), Lines()
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            if not isinstance(root, yaml.MappingNode):
                raise InputError(f"{file}: a mapping of sections is needed (name:, topology:, problem:, ...)")
            _walk(root, (), lines, file, ())
            return loader.construct_document(root), lines
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise InputError(f"{file}:{_line_of_error(error, text)}: not readable as YAML: {_words(error)}") from None
    except RecursionError:
        raise InputError(f"{file}: nested too deeply") from None


def read_value(text: str) -> Any:
    """Return the value of one YAML scalar or flow collection, as on the command line (`0.1`, `[1, 2]`, `null`)."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{text!r}: not readable as a YAML value: {_words(error)}") from None


def _text(file: Path) -> str:
    try:
        if not file.exists():
            raise InputError(f"{file}: no such file; give the path of a scenario (.yaml)")
        if file.is_dir():
            raise InputError(f"{file}: a folder; give the path of a scenario (.yaml)")
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{file}:{line}: not text in UTF-8 (byte 0x{content[error.start]:02x}); save it as such"
        ) from None


def _line_of_error(error: yaml.YAMLError, text: str) -> int:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        return mark.line + 1
    return text.count("\n", 0, getattr(error, "position", 0)) + 1


def _words(error: yaml.YAMLError) -> str:
    """Return what PyYAML found, on one line."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"character {error.character!r} cannot stand in it" if isinstance(error.character, str) else error.reason
    parts = (getattr(error, name, None) for name in ("context", "problem"))
    found = ", ".join(part for part in parts if part) or str(error)
    return found + ("; indent by spaces" if r"'\t'" in found else "")


def _walk(node: yaml.Node, path: tuple[str, ...], lines: Lines, file: Path, inside: tuple[int, ...]) -> None:
    """Note the line of every key; `inside` are the nodes around this one."""
    if id(node) in inside:
        raise InputError(f"{file}:{node.start_mark.line + 1}: {'.'.join(path)} contains itself (*{path[-1]}?)")
    if len(lines.of) > MOST_KEYS:
        raise InputError(f"{file}: more than {MOST_KEYS:,} keys; do anchors repeat anchors?")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*path, str(key.value))
            if place in lines.of:
                lines.again.append((place, key.start_mark.line + 1))
            else:
                lines.of[place] = key.start_mark.line + 1
            _walk(value, place, lines, file, (*inside, id(node)))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _walk(value, (*path, str(index)), lines, file, (*inside, id(node)))
