"""Pictures of experts: families of columns, the Lagrangian's terms, the regret beside its prediction."""

import numpy as np
import pytest

import fedsim
from fedsim.results.experts import predicted


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A small study with loads and biases of every expert, and the regret."""
    return fedsim.run(
        {
            "name": "pictures",
            "topology": {"kind": "server", "n": 2},
            "problem": {"kind": "router_scores", "tokens": 64, "layers": 2, "moe_num_experts": 4, "fresh": True},
            "algorithm": {"kind": "router_replay", "regret": True, "comparator": [[0.3, 0.1, -0.1, -0.3]] * 2},
            "schedule": {"horizon": 20},
            "record": {"every": 1, "metrics": ["maxvio", "maxvio_floor", "regret", "load.*", "bias.*"]},
            "variants": {"sign": {}, "prop": {"algorithm.bias_rule": "prop", "algorithm.bias_update_rate": 0.05}},
        },
        folder=tmp_path_factory.mktemp("pictures") / "out",
    )


@pytest.mark.parametrize("metric", ["load", "bias", "regret", "maxvio"])
def test_every_picture_is_drawn(study, metric, tmp_path):
    """PNG and SVG are there; the SVG names every variant."""
    png, svg, *_ = study.plot(metric=metric, out=tmp_path / metric)
    assert png.stat().st_size > 5000
    assert "sign" in svg.read_text()
    assert "prop" in svg.read_text()


def test_the_terms_of_the_lagrangian_are_drawn(tmp_path):
    """One batch again and again has switching benefits; a run of fresh ones has none to draw."""
    result = fedsim.run(
        {
            "name": "terms",
            "topology": {"kind": "server", "n": 2},
            "problem": {"kind": "router_scores", "tokens": 64},
            "algorithm": {"kind": "router_replay"},
            "schedule": {"horizon": 20},
        },
        folder=tmp_path / "out",
    )
    _, svg, *_ = result.plot(metric="lagrangian")
    assert "switching benefits" in svg.read_text()


def test_families_stay_out_of_tables_and_defaults(study, tmp_path):
    """Comparisons list no column per expert; they are recorded only where asked for."""
    from fedsim.results.compare import compare

    frame = compare([study.folder])
    assert "maxvio" in frame
    assert not any("." in column for column in frame)


def test_predicted_growth_has_its_shape():
    """ln N, sqrt N, N and powers, from a given start."""
    steps = np.array([10.0, 100.0, 1000.0])
    law = lambda shape, value: {"formula": f"predicted growth per {shape}", "value": value}
    assert predicted(law("ln N", 2.0), steps, 1.0) == pytest.approx(1 + 2 * np.log(steps / 10))
    assert predicted(law("sqrt N", 2.0), steps, 1.0)[2] == pytest.approx(1 + 2 * (1000**0.5 - 10**0.5))
    assert predicted(law("N", 2.0), steps, 1.0)[1] == pytest.approx(181)
    assert predicted(law("N^power", 0.5), steps, 1.0)[1] == pytest.approx(10**0.5)
