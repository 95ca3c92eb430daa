"""The sections of a scenario that do not name a registered component, with their keys and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from fedsim.privacy.section import Privacy

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Start:
    """Where the nodes start.

    Attributes:
        kind: zeros; normal (a draw per node); common_normal (one draw for all); given; problem (as it says). Default:
            zeros, which hidden layers do not leave, so of a module its own first weights (problem).
        scale: standard deviation of the draws.
        value: with `given`: numbers `[dim]`, or a `.npy` file of `[dim]` or `[n, dim]`.
    """

    kind: Literal["zeros", "normal", "common_normal", "given", "problem"] = "zeros"
    scale: Positive = 1.0
    value: list[float] | str | None = None


@dataclass(frozen=True)
class Schedule:
    """What happens when.

    Attributes:
        kind: rounds (synchronous algorithms), poisson (asynchronous ones, virtual time) or live (asynchronous ones,
        real
            clocks); by default what the algorithm needs, in virtual time.
        horizon: number of rounds, or units of time (one gradient per node and unit).
        unit: of live time, seconds; default: what one gradient of each node takes, or longer where the transport could
            not keep the gossip rates.
    """

    horizon: Positive
    kind: Literal["rounds", "poisson", "live"] | None = None
    unit: Positive | None = None


@dataclass(frozen=True)
class Record:
    """What is observed.

    Attributes:
        every: rounds or units of time between observations.
        metrics: names; default distance (where the optimum is known), consensus, loss, and the problem's own.
        output: flowed (all nodes at the time of observation) or lazy (each at its last event).
        step: step of the proximal gradient mapping in `stationarity`; default 1/L.
    """

    every: Positive = 1.0
    metrics: list[str] | None = None
    output: Literal["flowed", "lazy"] = "flowed"
    step: Positive | None = None


@dataclass(frozen=True)
class Checkpoint:
    """How often the state is saved, in rounds or units of time."""

    every: Positive


@dataclass(frozen=True)
class Engine:
    """How it is played; none of this changes a bit of the result, but a device other than the CPU may.

    Attributes:
        transport: local, mpi or torch; auto finds the launcher that started the process.
        block: rows played together, or auto.
        device: cpu, or cuda: module problems compute losses and gradients there, of all rows at once, and the state of
            a synchronous algorithm lies and mixes there (not that of a private one). Processes of a host take its
            devices in turn; rows travel by NCCL where each has one of its own. Bits are then promised on no layout.
        player: of events: auto, kernel (compiled), waves (batched gradients) or plain (one by one).
        timeout: seconds after which a silent process ends the job.
        gradient_seconds: what every gradient is stretched to, to show what heavy models would do; real time only.
        slow: how many times slower some ranks are made, `{1: 5}`: stragglers; real time only.
    """

    transport: Literal["auto", "local", "mpi", "torch"] = "auto"
    block: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    player: Literal["auto", "kernel", "waves", "plain"] = "auto"
    timeout: Positive = 120.0
    gradient_seconds: Positive | None = None
    slow: dict[int, Annotated[float, Field(ge=1, allow_inf_nan=False)]] | None = None


@dataclass(frozen=True)
class Rates:
    """How often edges exchange, for algorithms by events.

    Attributes:
        kind: uniform; metropolis (`1/(1 + max degree)`); degree (`1/d_i + 1/d_j`); sdp (optimal, with a certificate).
        file: rates written by `fedsim rates`, or a file of one's own, in place of a kind.
        set: what bounds them: total (all edges together), node_rate (what each node starts), node_bandwidth (what it
            takes part in).
        caps: the total, or each node's bound (default 1).
        solver: of sdp; auto chooses by size, and says so.
        prune: of sdp; drop small rates and solve again while that helps.
        chi1: given where the graph is too large to compute it; of the normalised rates.
        chi2: given together with chi1.
        scale: theory (the multiple with `2 chi1 chi2 = 1`) or none (physical rates).
    """

    kind: Literal["uniform", "metropolis", "degree", "sdp"] = "uniform"
    file: str | None = None
    set: Literal["total", "node_rate", "node_bandwidth"] = "total"
    caps: Positive | list[Positive] | None = None
    solver: Literal["auto", "cvxpy", "interior_point", "surrogate"] = "auto"
    prune: bool = False
    chi1: Positive | None = None
    chi2: Positive | None = None
    scale: Literal["theory", "none"] | None = "theory"


@dataclass(frozen=True)
class Mixing:
    """How neighbours are weighted, for algorithms by rounds.

    Attributes:
        kind: metropolis; max_degree; fdla or fastest_mixing (optimal, by cvxpy).
        file: a matrix `[n, n]` (`.npy`, or scipy's sparse `.npz`) in place of a kind.
        lazy: half a step: `(I + W) / 2`.
    """

    kind: Literal["metropolis", "max_degree", "fdla", "fastest_mixing"] = "metropolis"
    file: str | None = None
    lazy: bool = False


COSTS = (
    *("gradients", "dual_gradients", "samples", "communications", "messages", "bytes", "queries", "epsilon"),
    "seconds",
)
METRICS = ("distance", "consensus", "loss", "stationarity")
HIGHER_IS_BETTER = frozenset(
    {"accuracy", "test_accuracy", "node_test_accuracy", "success", "precision", "recall", "f1", "jaccard"}
)

PLAIN: dict[str, Any] = {
    "start": Start,
    "schedule": Schedule,
    "record": Record,
    "checkpoint": Checkpoint,
    "engine": Engine,
    "privacy": Privacy,
}
