"""A dictionary such as `{kind: dirichlet, alpha: 0.3}` becomes one frozen dataclass, or one clear refusal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from fedsim.errors import InputError, did_you_mean

Chosen = TypeVar("Chosen")


def choose(spec: Mapping[str, Any], kinds: Mapping[str, type[Chosen]], section: str) -> Chosen:
    """Return `kinds[spec["kind"]](**rest)`, every value checked against the dataclass's annotations.

    Raises:
        InputError: unknown kind, unknown keys, wrong values; one message lists all of them.
    """
    rest = dict(spec)
    kind = rest.pop("kind", None)
    if kind not in kinds:
        hint = did_you_mean(str(kind), kinds)
        raise InputError(f"{section}.kind: {kind!r} is not known{hint}; known: {', '.join(sorted(kinds))}")
    allowed = [field.name for field in fields(kinds[kind])]  # pyright: ignore[reportArgumentType]
    problems = [
        f"{section}.{key}: {kind!r} has no such key{did_you_mean(key, allowed)}; it has {', '.join(sorted(allowed))}"
        for key in rest
        if key not in allowed
    ]
    known = {key: value for key, value in rest.items() if key in allowed}
    return _validated(kinds[kind], known, section, problems)


def _validated(cls: type[Chosen], values: dict[str, Any], section: str, problems: list[str]) -> Chosen:
    from pydantic import TypeAdapter, ValidationError

    try:
        chosen = TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        for item in error.errors():
            key = ".".join([section, *map(str, item["loc"])])
            given = "" if item["type"] == "missing" else f", given {item['input']!r}"
            problems.append(f"{key}: {item['msg'][0].lower()}{item['msg'][1:]}{given}")
        raise InputError("\n".join(problems)) from None
    if problems:
        raise InputError("\n".join(problems))
    return chosen
