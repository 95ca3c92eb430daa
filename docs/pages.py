"""Write docs/algorithms/: one page per algorithm, from its docstring, parameters and scenarios.

`python docs/pages.py` writes the pages; a test says that they are current.
"""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

from fedsim import registry

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "algorithms"


def page(kind: str) -> str:
    """Return the page of one algorithm."""
    cls = registry.find("algorithm", kind, ROOT)
    lines = [f"# {kind}", "", f"`algorithm: {{kind: {kind}}}` · {cls.paper} · from: {cls.provenance}", ""]
    lines += [
        "```text",
        inspect.cleandoc(cls.__doc__),
        "```",
        "",
        "## Parameters",
        "",
        "| key | default |",
        "|---|---|",
    ]
    lines += [f"| `{f.name}` | {default(f)} |" for f in fields(cls) if f.init] or ["| none | |"]
    return "\n".join([*lines, "", "## Scenarios", "", *scenarios(kind), ""])


def default(f: Any) -> str:
    """Return a field's default as a scenario writes it."""
    value = f.default if f.default_factory is MISSING else f.default_factory()
    if value is MISSING:
        return "must be given"
    if isinstance(value, dict):
        value = "{" + ", ".join(f"{key}: {inner}" for key, inner in value.items()) + "}"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def scenarios(kind: str) -> list[str]:
    """Return the shipped scenarios that play this algorithm."""
    found = []
    for file in sorted((ROOT / "scenarios").rglob("*.yaml")):
        content = yaml.safe_load(file.read_text())
        changes = (v or {} for v in (content.get("variants") or {}).values())
        kinds = {content["algorithm"]["kind"]} | {
            v.get("algorithm.kind") or (v.get("algorithm") or {}).get("kind") for v in changes
        }
        if kind in kinds:
            claim = " ".join(content["claim"].split())
            found.append(f"- [{file.stem}](../../{file.relative_to(ROOT)}): {claim}")
    return found or ["None yet."]


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in registry.KINDS["algorithm"]:
        (FOLDER / f"{name}.md").write_text(page(name))
