"""The JSON Schema of scenario files, made from the registry and the components' own annotations.

`python -m fedsim.schema` writes `fedsim/schema.json`, which is shipped, so that `fedsim schema` imports nothing.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fedsim import registry
from fedsim.checks import BESIDE
from fedsim.scenario import KEYS, MOST_SEEDS, OF_STUDY
from fedsim.sections import COSTS, HIGHER_IS_BETTER, METRICS, PLAIN, Mixing, Rates
from fedsim.tuning import Select

STOPS = (*METRICS, "test_loss", *sorted(HIGHER_IS_BETTER), *COSTS)
FILE = Path(__file__).parent / "schema.json"


def schema() -> dict[str, Any]:
    """Return the schema: every section, every registered kind with its keys."""
    definitions: dict[str, Any] = {}
    properties: dict[str, Any] = {
        "name": {"type": "string", "description": "name of the study and of its folder"},
        "claim": {"type": "string", "description": "what the comparison shows"},
        "seed": {"type": "integer", "minimum": 0, "description": "seed of clocks, batches, start, noise"},
        "data_seed": {
            "anyOf": [{"type": "integer", "minimum": 0}, {"const": "each"}],
            "description": "seed of graph, data, partition (default: seed, for all runs; each: the run's own)",
        },
        "seeds": {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": MOST_SEEDS},
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1, "uniqueItems": True},
            ],
            "description": "number of seeds from `seed` on, or a list of seeds",
        },
        "topology": _topology(),
        "stop": {
            "type": "object",
            "properties": {name: {"type": "number", "exclusiveMinimum": 0} for name in STOPS},
            "additionalProperties": False,
        },
        "variants": {
            "type": "object",
            "description": "sets of dotted overrides, by name",
            "additionalProperties": {**_overrides(), "type": ["object", "null"]},
        },
        "sweep": {
            "type": "object",
            "description": "dotted keys and their values: every point of the grid is played, for every variant",
            "additionalProperties": {"anyOf": [{"type": "array", "minItems": 1}, _log_range()]},
        },
        "short": {**_overrides(), "description": "dotted overrides of the short form"},
    }
    for name, cls in {**PLAIN, "rates": Rates, "mixing": Mixing, "select": Select}.items():
        properties[name] = _of(cls, definitions)
    definitions["data"] = _component("data", definitions, {})
    definitions["partition"] = _component("partition", definitions, {})
    patterns = {
        "type": "array",
        "items": {"type": "string"},
        "minItems": 1,
        "description": "names of the tensors that the term is of, with * for anything (default: all)",
    }
    definitions["composite"] = _component("composite", definitions, {"parameters": patterns})
    parts = {name: {"$ref": f"#/$defs/{name}"} for name in ("data", "partition", "composite")}
    properties["problem"] = _component("problem", definitions, parts)
    properties["algorithm"] = _component("algorithm", definitions, {})
    assert set(properties) == set(KEYS), set(properties) ^ set(KEYS)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fedsim scenario",
        "type": "object",
        "properties": {name: properties[name] for name in KEYS},
        "required": ["topology", "problem", "algorithm", "schedule"],
        "additionalProperties": False,
        "$defs": definitions,
    }


def _log_range() -> dict[str, Any]:
    numbers = {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}, "minItems": 3, "maxItems": 3}
    return {
        "type": "object",
        "description": "from, to, number of values: evenly spaced in the logarithm",
        "properties": {"log": numbers},
        "required": ["log"],
        "additionalProperties": False,
    }


def _overrides() -> dict[str, Any]:
    tops = "|".join(key for key in KEYS if key not in OF_STUDY)
    return {"type": "object", "propertyNames": {"pattern": rf"^({tops})(\..+)?$"}}


def _topology() -> dict[str, Any]:
    """Return the kinds with short names and their parameters, a file, or another generator of networkx."""
    from fedsim.topology.generators import SHORT, maker, parameter_names

    beside = {"name": {"type": "string"}, "order": {"enum": ["rcm", "given"]}}
    choices, names = [], [*SHORT, "server"]
    for kind in names:
        given = inspect.signature(maker(kind)).parameters
        keys = {name: _NUMBERS[str(given[name].annotation)] for name in parameter_names(maker(kind))}
        choices.append(
            {
                "type": "object",
                "title": kind,
                "description": (inspect.getdoc(maker(kind)) or "").partition("\n")[0],
                "properties": {"kind": {"const": kind}, **keys, **beside},
                "required": ["kind", *(n for n in keys if given[n].default is inspect.Parameter.empty)],
                "additionalProperties": False,
            }
        )
    file = {"properties": {"file": {"type": "string"}, **beside}, "required": ["file"], "additionalProperties": False}
    other = {"properties": {"kind": {"type": "string", "not": {"enum": names}}}, "required": ["kind"]}
    return {"type": "object", "anyOf": [*choices, file, other]}


_NUMBERS = {"int": {"type": "integer"}, "float": {"type": "number", "exclusiveMinimum": 0}}


def _component(section: str, definitions: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    choices = []
    for kind, entry in registry.KINDS[section].items():
        cls = registry.find(section, kind, Path())
        own = _of(cls, definitions)
        beside = {name: parts.get(name, {}) for name in BESIDE.get(section, ()) if name not in own["properties"]}
        choices.append(
            {
                "type": "object",
                "title": kind,
                "description": entry.summary,
                "properties": {"kind": {"const": kind}, **own["properties"], **beside},
                "required": ["kind", *own.get("required", [])],
                "additionalProperties": False,
            }
        )
    pattern = {"type": "object", "properties": {"kind": {"type": "string", "pattern": ":"}}, "required": ["kind"]}
    return {"anyOf": [*choices, pattern]}


def _of(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    made = TypeAdapter(cls).json_schema(ref_template="#/$defs/{model}")
    definitions.update(made.pop("$defs", {}))
    hidden = {f.name for f in fields(cls) if not f.init}  # type: ignore[arg-type]
    properties = {name: value for name, value in made.get("properties", {}).items() if name not in hidden}
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        **({"required": made["required"]} if "required" in made else {}),
    }


def text() -> str:
    """Return the file's text."""
    return json.dumps(schema(), indent=1, sort_keys=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
