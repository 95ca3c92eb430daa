"""Pictures of what a run stands on: the topology with its rates, and the partition of the data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsim.results.plots import _STYLE, COLOURS, _save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fedsim.results.result import Result, StudyResult
    from fedsim.topology.topology import Topology

MANY = 1000  # nodes above which bars would be thinner than what a page can show


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


def partition_of(result: Result | StudyResult) -> list[Path]:
    """Draw how the data lie on the nodes of a run (a study's first), into its `plots`; nothing where there are none."""
    facts = result.runs[0].facts.get("problem", {}).get("partition")
    if not facts or len(facts["counts"]) > MANY:
        return []
    table = np.array(facts["counts"], dtype=np.int64)  # node, records, then one column per class where there are
    classes = facts["header"][2:]
    shown = table[:, 2:] if classes else table[:, 1:2]
    return draw_partition(shown, [str(name) for name in classes] or ["records"], result.folder / "plots" / "partition")


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
