"""Bounds on counts: never passed, reached to the last event or round, the same on every layout."""

import pytest
from cases import Tracking

import fedsim
from fedsim.errors import InputError

EVENTS = {
    "topology": {"kind": "ring", "n": 7},
    "problem": {"kind": "logistic", "data": {"kind": "breast_cancer"}, "l2": 0.1},
    "algorithm": {"kind": "dadao"},
    "schedule": {"horizon": 30},
    "record": {"every": 5},
}
ROUNDS = EVENTS | {"algorithm": {"kind": "gradient_tracking", "eta": 0.1}}
FUNCTIONS = EVENTS | {"algorithm": {"kind": "a2cid2", "step": 0.01}}


def played(scenario, folder, **stop):
    result = fedsim.run(scenario | {"stop": stop} if stop else scenario, folder=folder)
    return result, result.metrics.iloc[-1]


@pytest.mark.parametrize("player", ["kernel", "waves", "plain"])
@pytest.mark.parametrize(
    ("count", "bound"),
    [("gradients", 101), ("communications", 57), ("messages", 115), ("bytes", 9_999), ("samples", 7_777)],
)
def test_events_end_at_the_last_one_that_a_bound_allows(tmp_path, count, bound, player):
    """The run is that with the last allowed event's time as horizon, to the bit, and one event more would pass."""
    scenario = EVENTS | {"engine": {"player": player}}
    result, last = played(scenario, tmp_path / "a", **{count: bound})
    whole, _ = played(scenario | {"schedule": {"horizon": last["time"]}}, tmp_path / "b")
    assert whole.digest == result.digest
    step = {"messages": 2, "bytes": 2 * 8 * 30, "samples": 569 // 7 + 1}.get(count, 1)
    assert bound - step < last[count] <= bound
    exact = f"{count} >= {bound:g}", f"{count}: more would pass {bound:g}"
    assert result.facts["stopped_by"] == exact[int(last[count] < bound)]


@pytest.mark.parametrize("player", ["waves", "plain"])
def test_exchanges_of_dual_gradients_end_at_the_last_one_that_a_bound_allows(tmp_path, player):
    """An event of Continuized costs two dual gradients: a bound of 101 leaves 50 events."""
    scenario = {
        "topology": {"kind": "ring", "n": 6},
        "problem": {"kind": "quadratic", "dim": 3},
        "algorithm": {"kind": "continuized"},
        "schedule": {"horizon": 1000},
        "engine": {"player": player},
    }
    result, last = played(scenario, tmp_path, dual_gradients=101)
    assert (last["dual_gradients"], last["communications"]) == (100, 50)
    assert result.facts["stopped_by"] == "dual_gradients: more would pass 101"


@pytest.mark.parametrize("kind", ["with_replacement", "epoch", "poisson"])
@pytest.mark.parametrize("base", [EVENTS, FUNCTIONS])
def test_samples_are_counted_as_they_are_drawn(tmp_path, base, kind):
    """Also where every gradient uses another number of records, the bound is met as closely as gradients allow."""
    algorithm = base["algorithm"] | {"batch": {"size": 9, "kind": kind}}
    if base is EVENTS:
        algorithm = {"kind": "gossip_sgd", "step": 0.01, "batch": {"size": 9, "kind": kind}}
    scenario = base | {"algorithm": algorithm, "record": {"every": 0.25}}
    free, _ = played(scenario, tmp_path / "free")
    result, last = played(scenario, tmp_path / "a", samples=500)
    assert last["samples"] <= 500
    assert last["samples"] > 500 - 40
    whole, _ = played(scenario | {"schedule": {"horizon": last["time"]}}, tmp_path / "b")
    assert whole.digest == result.digest
    later = free.metrics[free.metrics["time"] > last["time"] + 1]
    assert later["samples"].iloc[0] > last["samples"]


@pytest.mark.parametrize("count", ["gradients", "communications", "messages", "bytes", "samples"])
def test_rounds_end_before_the_one_that_would_pass(tmp_path, count):
    """A bound between what rounds 4 and 5 cost gives the run of 4 rounds, to the bit; one that is met ends after it."""
    free, _ = played(ROUNDS | {"record": {"every": 1}}, tmp_path / "free")
    costs = free.metrics[count]
    four, _ = played(ROUNDS | {"schedule": {"horizon": 4}}, tmp_path / "four")
    for name, bound, reason in (
        ("between", int(costs[4] + costs[5]) // 2, "more would pass"),
        ("met", int(costs[4]), ">="),
    ):
        result, last = played(ROUNDS, tmp_path / name, **{count: bound})
        assert result.digest == four.digest
        assert last["round"] == 4
        assert last[count] == costs[4] <= bound
        assert reason in result.facts["stopped_by"]


def test_the_tightest_of_several_bounds_ends_the_run(tmp_path):
    """With several conditions the first that is met counts; the others are within their bounds."""
    result, last = played(EVENTS, tmp_path, gradients=10_000, communications=25, bytes=1e9)
    assert result.facts["stopped_by"] == "communications >= 25"
    assert last["communications"] == 25


def test_a_metric_of_which_more_is_better_ends_a_run_from_below(tmp_path):
    """`stop: {test_accuracy: 0.9}` ends a run when the accuracy has risen to 0.9, not at its start."""
    scenario = ROUNDS | {
        "problem": {
            "kind": "module",
            "hidden": [8],
            "data": {"kind": "breast_cancer", "held_out": 0.2, "normalise": "columns"},
        },
        "start": {"kind": "problem"},
        "record": {"every": 1, "metrics": ["test_accuracy"]},
        "algorithm": {"kind": "gradient_tracking", "eta": 0.5},
        "schedule": {"horizon": 600},
    }
    result, last = played(scenario, tmp_path, test_accuracy=0.9)
    assert result.facts["stopped_by"] == "test_accuracy >= 0.9"
    assert last["test_accuracy"] >= 0.9
    assert (result.metrics["test_accuracy"][:-1] < 0.9).all()
    assert 0 < last["round"] < 600


def test_seconds_end_a_run_between_observations(tmp_path):
    """A run that would last for hours, observed at its end alone, is over after the seconds that it was given."""
    long = ROUNDS | {"schedule": {"horizon": 10**9}, "record": {"every": 10**9}}
    result, last = played(long, tmp_path, seconds=0.5)
    assert last["wall_seconds"] >= 0.5
    assert 0 < last["round"] < 10**9
    assert result.facts["stopped_by"] == "seconds >= 0.5"


def test_a_bound_that_the_start_passes_is_refused(tmp_path):
    """What the algorithm's start costs (here a gradient of every node) must be affordable; else nothing is run."""
    sections = {name: ROUNDS[name] for name in ("topology", "problem", "schedule")}
    with pytest.raises(InputError, match=r"stop\.gradients: 6 do not cover the start of this algorithm"):
        fedsim.run(**sections, algorithm=Tracking(), stop={"gradients": 6}, folder=tmp_path / "a")
    result = fedsim.run(**sections, algorithm=Tracking(), stop={"gradients": 7}, folder=tmp_path / "b")
    assert result.metrics["round"].tolist() == [0]
    assert result.facts["totals"]["gradients"] == 7
