"""What all private algorithms share: a plan of releases, radii, and what is printed about them."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from fedsim.algorithms.algorithm import Constant, Oracle, Setting, SyncAlgorithm
from fedsim.algorithms.requests import Mean, Shared
from fedsim.errors import InputError
from fedsim.privacy.plan import Planned, multipliers
from fedsim.privacy.section import refuse_contradictions

TRAFFIC = ("communications", "messages", "bytes", "bytes_up", "bytes_down")


@dataclass
class ServerState:
    """The server's point."""

    x: Shared


@dataclass(frozen=True)
class PrivateAlgorithm(SyncAlgorithm):
    """Rounds in which everything that leaves a worker is in the plan of releases.

    Without a `privacy` section nothing is protected: no noise is added, and radii may be left out.
    """

    on_device: ClassVar[bool] = False  # noise, its generator and the ledger are the CPU's
    unit: ClassVar[Literal["record", "user"]] = "record"
    radii: ClassVar[tuple[str, ...]] = ()  # fields that bound what is released
    _common: bool = field(default=True, init=False, repr=False)

    @abstractmethod
    def plan(self, setting: Setting) -> tuple[Planned, ...]:
        """Return the kinds of releases with how many of each there are (call on a resolved instance)."""

    def resolved(self, setting: Setting) -> Any:
        """Return a copy that knows how nodes start; refuse what cannot be private.

        Raises:
            InputError: a radius is missing, the unit is another one, records cannot be told apart.
        """
        kind = self.kind
        if self.unit == "record":
            setting.require(f"algorithm {kind}", "records")
        privacy = setting.privacy
        if privacy is not None:
            refuse_contradictions(privacy, setting.n)
            if privacy.unit != self.unit:
                raise InputError(
                    f"privacy.unit: {privacy.unit!r} given, but {kind} protects one {self.unit} of the data;"
                    f" say unit: {self.unit}, so that the result does"
                )
            for name in self.radii:
                if getattr(self, name) is None:
                    raise InputError(f"algorithm.{name}: missing; without a radius no noise is large enough")
        return self.derived(_common=setting.common_start)

    def secret_counts(self, setting: Setting) -> tuple[str, ...]:
        """Return the counts that tell how many records, or workers, were drawn (call on a resolved instance)."""
        if all(kind.rate == 1 for kind in self.plan(setting)):
            return ()
        return ("samples",) if self.unit == "record" else ("gradients", "samples", *TRAFFIC)

    async def begin(self, x0: torch.Tensor) -> torch.Tensor:
        """Return the server's first point `[1, dim]`: the common start, or the mean of the workers' own."""
        return x0[:1].clone() if self._common else await Mean(x0)

    def output(self, s: Any, f: Oracle) -> torch.Tensor:
        """Return the server's point for every worker."""
        return s.x.expand(len(f.nodes), -1)

    def constants(self, setting: Setting) -> tuple[Constant, ...]:
        """Return the weight of one unit, and the noise of every kind of release."""
        weight = Constant("unit weight", setting.unit_weight, f"largest weight of one {self.unit} in the objective")
        if setting.privacy is None:
            return (weight,)
        plan = self.plan(setting)
        z = multipliers(setting.privacy, plan)
        counts = {kind.name: kind.count for kind in plan}
        how = "given" if setting.privacy.multipliers else f"{setting.privacy.calibration} calibration"
        found = [
            Constant(f"z {name}", value, f"noise over sensitivity, {counts[name]} releases, {how}")
            for name, value in z.items()
        ]
        return (weight, *found)

    def notes(self, setting: Setting) -> tuple[str, ...]:
        """Say where nothing is protected, and what add_remove takes for granted."""
        if setting.privacy is None:
            return ("no privacy section: no noise is added and nobody is protected",)
        if setting.privacy.relation == "add_remove":
            sizes = "number of workers" if self.unit == "user" else "numbers of records"
            return (f"add_remove: sums are divided by the {sizes} at hand, as declared constants: they are public",)
        return ()


def radius(value: float | None) -> float:
    """Return a radius, infinity where none is given."""
    return math.inf if value is None else value
