"""Axes of a sweep: lists and ranges become a grid, labels tell its cells apart, mistakes are named."""

import itertools
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedsim.errors import InputError
from fedsim.grid import axes_of, cells_of, edges, from_command_line, label

VALUES = st.one_of(st.integers(-100, 100), st.floats(-1e9, 1e9), st.text("abc", min_size=1, max_size=3))
AXES = st.dictionaries(
    st.sampled_from(["algorithm.eta", "algorithm.gamma", "problem.l2", "topology.n", "schedule.eta"]),
    st.lists(VALUES, min_size=1, max_size=4, unique_by=lambda v: (str(v), float(v) if not isinstance(v, str) else v)),
    max_size=4,
)


@given(AXES)
def test_a_grid_holds_every_combination_once(section):
    """The cells are the product of the axes, each point once, in the order of the file with the last axis fastest."""
    axes = axes_of({k: v for k, v in section.items() if all(v.index(x) == i for i, x in enumerate(v))})
    cells = cells_of(axes)
    assert len(cells) == math.prod(map(len, axes.values()))
    assert len({repr(cell) for cell in cells}) == len(cells)
    for key, values in axes.items():
        assert {repr(cell[key]) for cell in cells} == {repr(value) for value in values}
    ranks = [[axes[key].index(cell[key]) for key in axes] for cell in cells]
    assert ranks == sorted(ranks)


@example([1e-06, 1.0000000000000002e-06], [1])
@given(
    st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=5, unique=True),
    st.lists(st.integers(1, 9), min_size=1, max_size=5, unique=True),
)
def test_labels_tell_cells_apart(etas, counts):
    """No two cells of a variant have the same label, and a variant without several cells keeps its name."""
    axes = axes_of({"algorithm.eta": etas, "topology.n": counts})
    labels = [label("DADAO", cell, axes) for cell in cells_of(axes)]
    assert len(set(labels)) == len(labels)
    assert labels == ["DADAO"] or all(str(name).startswith("DADAO, ") for name in labels)


def test_keys_that_end_alike_are_written_whole():
    """Two axes called eta are told apart by their sections."""
    axes = axes_of({"algorithm.eta": [1, 2], "schedule.eta": [3, 4]})
    assert label(None, {"algorithm.eta": 1, "schedule.eta": 4}, axes) == "algorithm.eta=1, schedule.eta=4"


@given(st.floats(1e-9, 1e3), st.floats(1.5, 1e6), st.integers(2, 12))
def test_a_log_range_has_equal_ratios_and_exact_ends(first, factor, count):
    """Neighbours in a range have the same ratio, to the 12 digits that values are written with."""
    values = axes_of({"a.b": {"log": [first, first * factor, count]}})["a.b"]
    assert len(values) == count
    assert (values[0], values[-1]) == (first, first * factor)
    for a, b in itertools.pairwise(values):
        assert b / a == pytest.approx(factor ** (1 / (count - 1)), rel=1e-10)


def test_a_range_of_decades_is_written_as_one_writes_it():
    """`log: [0.001, 10, 5]` gives 0.001, 0.01, 0.1, 1, 10, not their neighbours in floating point."""
    assert axes_of({"a.b": {"log": [1e-3, 10, 5]}})["a.b"] == (0.001, 0.01, 0.1, 1.0, 10.0)


def test_edges_of_a_grid_are_noticed():
    """A cell at an end of an axis of numbers is said to be there; words, and axes of one value, have no ends."""
    axes = axes_of({"a.eta": [1.0, 0.1, 10.0], "a.kind": ["x", "y"], "a.one": [5]})
    at = lambda eta: edges({"a.eta": eta, "a.kind": "x", "a.one": 5}, axes)
    assert at(1.0) == []
    assert at(0.1) == ["a.eta at its lower end 0.1"]
    assert at(10.0) == ["a.eta at its upper end 10"]


def test_the_command_line_tells_axes_from_overrides():
    """Commas outside of brackets make an axis, `log:` a range, anything else overrides; lists stay values."""
    texts = ["algorithm.eta=0.01,0.1", "algorithm.gamma=log:1e-3,1,4", "seed=3", "problem.hidden=[32,16]"]
    overrides, axes = from_command_line([*texts, "problem.layers=[8],[16,16]"])
    assert overrides == ["seed=3", "problem.hidden=[32,16]"]
    assert axes == {
        "algorithm.eta": [0.01, 0.1],
        "algorithm.gamma": {"log": [0.001, 1, 4]},
        "problem.layers": [[8], [16, 16]],
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0.1, "a.b: 0.1 given; a list of values or log: [a, b, n] is needed"),
        ([], "a.b: an empty list; at least one value is needed"),
        ([1, 2, 1], "a.b: [1, 2, 1] holds a value twice; its runs would be the same"),
        ({"lin": [1, 2, 3]}, "a.b: {'lin': [1, 2, 3]} given; log: [a, b, n] with three numbers is needed"),
        ({"log": [1, 2]}, "log: [a, b, n] with three numbers is needed"),
        ({"log": [0, 1, 3]}, "two numbers above 0 that differ and a count of 2 or more needed"),
        ({"log": [1, 10, 1]}, "two numbers above 0 that differ and a count of 2 or more needed"),
        ({"log": [1, 10, 2.5]}, "two numbers above 0 that differ and a count of 2 or more needed"),
        ({"log": [1, 1, 3]}, "two numbers above 0 that differ and a count of 2 or more needed"),
    ],
)
def test_what_is_no_axis_is_refused_by_its_key(given, message):
    """A mistake in an axis names the key, what was given and what is needed."""
    with pytest.raises(InputError) as error:
        axes_of({"a.b": given})
    assert message in str(error.value)
