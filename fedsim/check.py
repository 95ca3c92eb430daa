"""What a scenario stands on, computed before anything is run: constants, hyper-parameters, expected cost, guarantee."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.algorithms.algorithm import DynamicsAlgorithm, SyncAlgorithm
from fedsim.errors import InputError

if TYPE_CHECKING:
    from fedsim.prepare import Prepared
    from fedsim.scenario import Study


def check(
    scenario: str | Path | dict[str, Any] | Study,
    *,
    overrides: Sequence[str] = (),
    short: bool = False,
    precision: float = 1e-6,
    ranks: int | None = None,
) -> list[dict[str, Any]]:
    """Validate a scenario and return, per variant, what its runs stand on.

    Args:
        precision: the relative precision that expected costs are stated for.
        ranks: also say what so many processes would hold and send.

    Raises:
        InputError: the scenario cannot be run.
    """
    from fedsim.engine.machine import prepare as prepare_machine
    from fedsim.privacy.study import refuse_mixtures
    from fedsim.run import of_each_variant
    from fedsim.scenario import Study, load_study

    if not 0 < precision < 1:
        raise InputError(f"check: precision {precision:g} given; a number between 0 and 1 is needed")
    prepare_machine()
    study = scenario if isinstance(scenario, Study) else load_study(scenario, overrides=overrides, short=short)
    refuse_mixtures((run.variant or run.folder, run.privacy) for run in (*study.tuning, *study.runs))
    return of_each_variant(study, lambda p: describe(p, precision, ranks), None, {})


def describe(p: Prepared, precision: float, ranks: int | None = None) -> dict[str, Any]:
    """Return the facts of one prepared run as plain data."""
    from fedsim.prepare import provenance
    from fedsim.run import guarantee_of

    s = p.setting
    guarantee = guarantee_of(p)
    facts: dict[str, Any] = {
        "variant": p.scenario.variant,
        "topology": {"name": p.topology.name, "n": p.topology.n, "edges": p.topology.m},
        "problem": {"kind": p.problem.kind, "dim": p.problem.dim, "L": s.L, "mu": s.mu},
        **provenance(p.algorithm),
        "constants": [asdict(c) for c in p.algorithm.constants(s)],
        "warnings": _warnings(p),
    }
    if p.rates is not None:
        facts["rates"] = {
            "kind": p.rates.kind,
            "communications": float(p.rates.rates.sum()),
            "chi1": s.chi1,
            "chi2": s.chi2,
            "exact": s.chi.exact,
            "gap": p.rates.gap,
        }
        horizon = float(p.scenario.schedule["horizon"])
        facts["schedule"] = {"horizon": horizon, **_costs(p, horizon)}
    elif s.mixing is not None:
        facts["mixing"] = {"spectral_gap": s.mixing_gap}
    if ranks is not None:
        from fedsim.spread import spread

        facts["spread"] = spread(p, ranks)
    if guarantee is not None:
        facts["guarantee"] = asdict(guarantee)
        facts["expected"] = _expected(p, guarantee.rate, guarantee.prefactor, precision)
    return facts


def _expected(p: Prepared, rate: float, prefactor: float, precision: float) -> dict[str, float]:
    """Return time (or rounds) and costs after which the bound is below `precision` of the start."""
    time = max(0.0, math.log(prefactor / precision) / rate)
    if isinstance(p.algorithm, SyncAlgorithm):
        return {"precision": precision, "rounds": time}
    return {"precision": precision, "time": time, **_costs(p, time)}


def _costs(p: Prepared, time: float) -> dict[str, float]:
    """Return what an algorithm by events is expected to spend in so much time: Poisson counts on nodes and edges."""
    table = p.algorithm.dynamics(p.setting) if isinstance(p.algorithm, DynamicsAlgorithm) else None
    exchanges = time * float(p.setting.rates.sum())
    if table is not None and table.dual:
        return {"dual_gradients": 2 * exchanges, "communications": exchanges}
    ticks = table is None or table.node_clocks
    return {"gradients": time * p.topology.n if ticks else 0.0, "communications": exchanges}


def _warnings(p: Prepared) -> list[str]:
    from fedsim.run import notes

    found = notes(p)
    if p.problem.mu is not None and p.setting.mu == 0:
        found.append("mu = 0: linear rates of the theory are void for this problem")
    if p.problem.weak_convexity:
        rho = p.problem.weak_convexity
        found.append(
            f"problem.composite is weakly convex, rho = {rho:g}: its prox needs steps below 1/rho = {1 / rho:g}"
        )
    if p.problem.L is None:
        found.append("L is unknown: step sizes are yours to choose")
    if p.scenario.start.get("kind", "zeros") == "zeros" and p.problem.kind == "module":
        found.append("start: zeros, which hidden layers do not leave; start: {kind: problem} takes the model's own")
    if not isinstance(p.algorithm, SyncAlgorithm) and p.rates is not None and not p.setting.chi.exact:
        found.append("chi1, chi2 are certified upper bounds at this size, not exact values")
    return found


def as_text(facts: dict[str, Any]) -> str:
    """Return the facts of one variant as lines for a terminal."""
    t, q = facts["topology"], facts["problem"]
    head = f"variant {facts['variant']}" if facts["variant"] else "scenario"
    lines = [
        f"{head}: {facts['algorithm']} ({facts['paper']}; {facts['provenance']})",
        f"  topology   {t['name']}: {t['n']} nodes, {t['edges']} edges",
        f"  problem    {q['kind']}, dim {q['dim']}, L = {_number(q['L'])}, mu = {_number(q['mu'])}{_condition(q)}",
    ]
    if "rates" in facts:
        r = facts["rates"]
        gap = "" if r["gap"] is None else f", certified gap {r['gap']:.1e}"
        exact = "" if r["exact"] else " (upper bounds)"
        lines.append(
            f"  rates      {r['kind']}: {r['communications']:.6g} communications per unit of time,"
            f" chi1 = {r['chi1']:.6g}, chi2 = {r['chi2']:.6g}{exact}{gap}"
        )
        spent = {k: v for k, v in facts["schedule"].items() if k != "horizon"}
        lines.append(f"  schedule   {facts['schedule']['horizon']:g} units of time: {_spent(spent)} expected")
    if "mixing" in facts:
        lines.append(f"  mixing     spectral gap {facts['mixing']['spectral_gap']:.6g}")
    width = max((len(c["name"]) for c in facts["constants"]), default=0)
    lines += [f"  {c['name']:<{width}} = {c['value']:<14.8g} {c['formula']}" for c in facts["constants"]]
    if "guarantee" in facts:
        lines += _guarantee_lines(facts["guarantee"], facts["expected"])
    if "spread" in facts:
        from fedsim.spread import as_lines

        lines += as_lines(facts["spread"])
    return "\n".join(lines + [f"  note: {text}" for text in facts["warnings"]])


def _guarantee_lines(g: dict[str, Any], e: dict[str, float]) -> list[str]:
    lines = [
        f"  guarantee  {g['metric']}(t) <= {g['prefactor']:.4g} {g['metric']}(0) exp(-{g['rate']:.6g} t)",
        f"             {g['source']}",
        f"             rate {g['rate']:.6g} per unit of time, prefactor {g['prefactor']:.4g}",
    ]
    if g["broken"]:
        lines.append(f"             rate only, since {'; '.join(g['broken'])}")
    return [
        *lines,
        f"  expected   to {e['precision']:.0e} of the start, by this bound: {_spent(e)}",
    ]


def _spent(costs: dict[str, float]) -> str:
    named = {k: v for k, v in costs.items() if k != "precision"}
    return ", ".join(f"{k} {v:.4g}" if k == "time" else f"{v:.4g} {k.replace('_', ' ')}" for k, v in named.items())


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.6g}"


def _condition(q: dict[str, Any]) -> str:
    return f", L/mu = {q['L'] / q['mu']:.4g}" if q["L"] and q["mu"] else ""
