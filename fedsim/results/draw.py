"""Pictures of what a run stands on: the topology with its rates, and the partition of the data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsim.results.plots import _STYLE, COLOURS, _save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fedsim.topology.topology import Topology


def draw_rates(topology: Topology, schemes: dict[str, NDArray[np.float64]], out: Path) -> list[Path]:
    """Draw the graph once per scheme, edge widths by rate (relative to each scheme's mean), as PNG and SVG.

    Args:
        schemes: rates float64 `[m]` by the scheme's name, in the order of `topology.edges`.
        out: file without suffix.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    places = node_places(topology)
    with plt.rc_context(rc=_STYLE):
        figure, axes = plt.subplots(1, len(schemes), figsize=(3.4 * len(schemes), 3.5), squeeze=False)
        for axis, (name, rates) in zip(axes[0], schemes.items(), strict=True):
            _graph(axis, topology, places, rates)
            axis.set_title(name)
        files = _save(figure, out)
        plt.close(figure)
    return files


def draw_partition(table: NDArray[np.int64], labels: list[str], out: Path) -> list[Path]:
    """Draw records per node, stacked by label: `table [n, labels]`; as PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(rc=_STYLE):
        figure, axis = plt.subplots(figsize=(7, 2.8))
        bottom = np.zeros(len(table))
        for index, label in enumerate(labels):
            axis.bar(
                np.arange(len(table)),
                table[:, index],
                0.9,
                bottom,
                color=_colour(index, len(labels)),
                label=label,
            )
            bottom += table[:, index]
        axis.set_xlabel("node")
        axis.set_ylabel("records")
        if len(labels) <= 12:
            figure.legend(loc="outside right center", frameon=False)
        files = _save(figure, out)
        plt.close(figure)
    return files


def node_places(topology: Topology) -> NDArray[np.float64]:
    """Return where to draw each node, `[n, 2]`: the topology's own places, else a fixed-seed spring layout."""
    import networkx as nx

    if topology.layout is not None:
        return topology.layout
    start = nx.kamada_kawai_layout(topology.graph) if topology.n <= 200 else nx.spring_layout(topology.graph, seed=0)
    return np.array([start[i] for i in range(topology.n)])


def _graph(axis: Axes, topology: Topology, places: NDArray[np.float64], rates: NDArray[np.float64]) -> None:
    from matplotlib.collections import LineCollection

    relative = rates / max(rates.mean(), np.finfo(float).tiny)
    widths = np.clip(1.3 * relative, 0.08, 7.0)
    lines = LineCollection(list(places[topology.edges]), linewidths=list(widths), colors=COLOURS[0], alpha=0.75)
    axis.add_collection(lines)
    axis.scatter(*places.T, s=max(6.0, 600 / topology.n), color=COLOURS[1], zorder=2)
    axis.set_aspect("equal")
    axis.axis("off")


def _colour(index: int, count: int):
    import matplotlib

    return COLOURS[index] if count <= len(COLOURS) else matplotlib.colormaps["viridis"](index / (count - 1))
