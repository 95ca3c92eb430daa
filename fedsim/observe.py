"""Metrics of the nodes' answers: reductions over nodes in the fixed tree, never a copy of all state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedsim.engine.sums import total
from fedsim.errors import InputError, did_you_mean
from fedsim.problems.problem import refuse_step

if TYPE_CHECKING:
    import torch

    from fedsim.engine.layout import Layout
    from fedsim.problems.problem import Problem

BUILT_IN = ("distance", "consensus", "loss", "stationarity")
HELD_OUT = ("test_loss", "test_accuracy", "node_test_loss", "node_test_accuracy")


class Observer:
    """Computes the chosen metrics of `x [rows, dim]` (position order), as design section 8 defines them.

    Args:
        problem: what is minimised.
        layout: which nodes the rows are.
        names: metric names; None takes all that the problem allows, but `stationarity`.
        own: the algorithm's metrics, which then stand instead of the problem's.
        step: the step of the proximal gradient mapping in `stationarity`; default 1 / max L.

    Raises:
        InputError: an unknown metric, or `distance` where there is no unique optimum.
    """

    def __init__(
        self,
        problem: Problem,
        layout: Layout,
        names: Sequence[str] | None = None,
        step: float | None = None,
        own: Mapping[str, Callable[[torch.Tensor], float | None]] | None = None,
    ) -> None:
        self._problem, self._layout = problem, layout
        self._optimum = problem.optimum()
        extra = problem.metrics() if own is None else own
        self._extra: Mapping[str, Callable[[torch.Tensor], float | None]] = extra
        self._local = {} if own is not None else problem.local_metrics()
        default = [m for m in ("distance", "consensus", "loss") if m != "distance" or self._optimum is not None]
        default = default if own is None else []
        families = [name for name in extra if "." not in name]  # `load.3`: one of many, recorded when asked for
        possible = [*extra, *(f"{name}.{node}" for name in self._local for node in range(layout.n))]
        self.names = (*default, *families) if names is None else tuple(_expanded(names, possible))
        self._step = step if step is not None else _default_step(problem)
        self._refuse_unknown()

    @property
    def facts(self) -> dict[str, float]:
        """What a reader of the metrics must know beside them: the step of the mapping in `stationarity`."""
        return {"stationarity_step": self._step} if "stationarity" in self.names and self._step is not None else {}

    def __call__(self, x: torch.Tensor) -> dict[str, float | None]:
        """Return the metrics by name, in the order asked for; None where one has no value yet."""
        mean = self._mean(x)
        return {name: self._metric(name, x, mean) for name in self.names}

    def _metric(self, name: str, x: torch.Tensor, mean: torch.Tensor) -> float | None:
        if name == "distance":
            assert self._optimum is not None
            return self._mean_square(x - self._optimum)
        if name == "consensus":
            return self._mean_square(x - mean)
        if name == "loss":
            local = self._problem.loss(mean, self._layout.nodes)
            return float(self._mean(local[:, None])[0, 0] + self._problem.composite(mean)[0])
        if name == "stationarity":
            return self._stationarity(mean)
        if name.partition(".")[0] in self._local:
            family, _, node = name.partition(".")
            return self._local_metric(family, node, x)
        value = self._extra[name](mean)
        return None if value is None else float(value)

    def _local_metric(self, name: str, node: str, x: torch.Tensor) -> float:
        """Return the mean over nodes of a metric of their own models, or that of one node."""
        values = self._local[name](x).double()
        if node:
            import torch

            values = torch.where(torch.from_numpy(self._layout.nodes) == int(node), values, 0.0)
        found = float(total(values[:, None], self._layout)[0])
        return found if node else found / self._layout.n

    def _stationarity(self, mean: torch.Tensor) -> float:
        g = self._mean(self._problem.gradient(mean.expand(self._layout.rows, -1).contiguous(), self._layout.nodes))
        assert self._step is not None
        mapping = (mean - self._problem.prox(mean - self._step * g, self._step)) / self._step
        return float((mapping**2).sum())

    def _mean(self, values: torch.Tensor) -> torch.Tensor:
        return (total(values, self._layout) / self._layout.n)[None]

    def _mean_square(self, difference: torch.Tensor) -> float:
        return float(self._mean((difference**2).sum(dim=1, keepdim=True))[0, 0])

    def _is_of_a_node(self, name: str) -> bool:
        family, _, node = name.partition(".")
        return family in self._local and node.isdigit() and int(node) < self._layout.n

    def _refuse_unknown(self) -> None:
        allowed = (*BUILT_IN, *self._extra, *self._local)
        for name in self.names:
            if name not in allowed and not self._is_of_a_node(name):
                hint = did_you_mean(name, allowed)
                if name.partition(".")[0] in HELD_OUT:
                    hint = " (metrics of held-out records need data.held_out, and accuracy needs classes)"
                raise InputError(f"record.metrics: {name!r} is unknown{hint}; this problem has {', '.join(allowed)}")
        if "distance" in self.names and self._optimum is None:
            raise InputError(
                f"record.metrics: 'distance' needs a unique optimum, which problem {self._problem.kind!r} does not have"
                " here (mu = 0, or not convex); leave it out, or add l2"
            )
        if "stationarity" in self.names and self._step is None:
            raise InputError("record.metrics: 'stationarity' needs record.step, since L is unknown for this problem")
        if "stationarity" in self.names and self._step is not None:
            refuse_step(self._problem, self._step, "record.step")


def _expanded(names: Sequence[str], extra: Sequence[str]) -> list[str]:
    """Return the names with `NAME.*` replaced by every `NAME.3` there is."""
    found: list[str] = []
    for name in names:
        family = [m for m in extra if name.endswith(".*") and m.startswith(name[:-1])]
        found += family or [name]
    return found


def _default_step(problem: Problem) -> float | None:
    return None if problem.L is None else 1.0 / float(problem.L.max())
