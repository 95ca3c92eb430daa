"""What a number of processes would hold and send, before any is started."""

import pytest

import fedsim
from fedsim.check import as_text
from fedsim.errors import InputError

RING = {
    "topology": {"kind": "ring", "n": 12, "order": "given"},
    "problem": {"kind": "quadratic", "dim": 20000, "shape": "diagonal"},
    "algorithm": {"kind": "adom_plus"},
    "schedule": {"horizon": 3},
}


def spread(ranks, **changes):
    return fedsim.check(RING | changes, ranks=ranks)[0]["spread"]


def test_a_ring_sends_two_rows_a_rank_however_many_there_are():
    """Rows are shared evenly; each rank has two neighbours and sends each of them one row per mixing."""
    facts = spread(4)
    assert facts["rows"] == [3, 3, 3, 3]
    assert facts["neighbours"] == [2, 2, 2, 2]
    assert facts["sent"] == [2, 2, 2, 2]
    assert facts["per"] == "mixing"
    assert spread(2)["sent"] == [2, 2]
    assert spread(1)["sent"] == [0]


def test_a_complete_graph_sends_each_row_once_to_every_other_rank():
    """A row goes once to each rank that holds a neighbour, not once per edge; that cannot pay."""
    facts = spread(3, topology={"kind": "complete", "n": 6})
    assert facts["sent"] == [4, 4, 4]
    assert facts["verdict"].startswith("is unlikely to pay")


def test_events_count_exchanges_across_the_cut():
    """For asynchronous algorithms, rates of edges between ranks: on a ring of equal rates, two edges a rank."""
    section = {"algorithm": {"kind": "gossip_sgd", "step": 0.1}, "rates": {"kind": "uniform", "scale": "none"}}
    facts = spread(3, **section)
    total = fedsim.check(RING | section)[0]["rates"]["communications"]
    assert facts["sent"] == pytest.approx([2 * total / 12] * 3)
    assert facts["per"] == "unit of time"


def test_tiny_rows_cannot_pay_and_more_ranks_than_nodes_are_refused():
    """Work below the time of a message is told; so is a rank without a node."""
    text = as_text(fedsim.check(RING | {"problem": {"kind": "quadratic", "dim": 2}}, ranks=2)[0])
    assert "2 ranks: cannot pay" in text
    assert "rows sent per mixing" in text
    with pytest.raises(InputError, match="13 processes for 12 nodes"):
        spread(13)
    assert "least" in as_text(fedsim.check(RING | {"topology": {"kind": "ring", "n": 40}}, ranks=20)[0])
