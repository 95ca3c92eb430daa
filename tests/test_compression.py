"""Compressors: exact codecs, declared constants, purity, true bytes."""

import math

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

import fedsim
from fedsim.algorithms.requests import Mix
from fedsim.compression.compressors import build
from fedsim.engine.counts import Counts, Packed
from fedsim.engine.layout import Layout
from fedsim.engine.network import LocalNetwork
from fedsim.engine.streams import RoundDraws, Streams
from fedsim.errors import InputError
from fedsim.prepare import prepare
from fedsim.scenario import load_study
from fedsim.topology.build import build as graph

ALL = {
    "identity": {"kind": "identity"},
    "bf16": {"kind": "low_precision"},
    "fp16": {"kind": "low_precision", "to": "float16"},
    "fp32": {"kind": "low_precision", "to": "float32"},
    "top": {"kind": "top_k", "ratio": 0.3},
    "top of tensors": {"kind": "top_k", "ratio": 0.3, "scope": "tensor"},
    "top, short": {"kind": "top_k", "k": 2, "values": "float16"},
    "random": {"kind": "random_k", "ratio": 0.3},
    "random of tensors": {"kind": "random_k", "ratio": 0.5, "scope": "tensor"},
    "random, unbiased": {"kind": "random_k", "ratio": 0.25, "unbiased": True},
    "random, short": {"kind": "random_k", "ratio": 0.25, "values": "bfloat16"},
    "qsgd": {"kind": "qsgd", "levels": 4},
    "qsgd in blocks": {"kind": "qsgd", "levels": 7, "block": 5},
    "qsgd, scaled": {"kind": "qsgd", "levels": 2, "scaled": True},
    "qsgd of tensors": {"kind": "qsgd", "levels": 3, "scope": "tensor"},
    "uniform, tensors in blocks": {"kind": "uniform", "levels": 2, "scope": "tensor", "block": 4, "scaled": True},
    "uniform": {"kind": "uniform", "levels": 3},
    "natural": {"kind": "natural"},
    "sign": {"kind": "sign"},
    "sign of tensors": {"kind": "sign", "scope": "tensor"},
}


def draws(rows, seed=0, step=0):
    return RoundDraws(Streams(seed), np.arange(rows), step)


def sizes_of(dim):
    return (dim // 2, dim - dim // 2) if dim > 1 else (dim,)


def packed(how, v, seed=0, step=0):
    """Return the packet of rows `v [rows, dim]`."""
    return build(how, "compress").compress(v, draws(len(v), seed, step), "test", sizes_of(v.shape[1]))


numbers = st.floats(-1e6, 1e6, width=32) | st.just(0.0) | st.sampled_from([1.0, -1.0, 1e-30, -3e-200])


@pytest.mark.parametrize("how", ALL.values(), ids=ALL)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_decoding_gives_the_very_bits(how, data):
    """`decode(encode(row))` is `dense[row]` to the bit, and what is charged is the length of the encoded body."""
    rows, dim = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 40))
    values = data.draw(st.lists(numbers, min_size=rows * dim, max_size=rows * dim))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    v = torch.tensor(values, dtype=torch.float64).to(dtype).reshape(rows, dim)
    before = v.clone()
    packet = packed(how, v)
    assert torch.equal(v, before)
    assert packet.dense.dtype == dtype
    lengths = packet.lengths()
    for row in range(rows):
        body = packet.encode(row)
        assert len(body) == lengths[row]
        decoded = packet.decode(body)
        assert decoded.dtype == packet.dense.numpy().dtype
        assert np.array_equal(decoded, packet.dense[row].numpy(), equal_nan=True)


@pytest.mark.parametrize("how", ALL.values(), ids=ALL)
def test_rows_do_not_see_each_other(how):
    """A row's packet is the same alone and among others."""
    v = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 23)))
    whole = packed(how, v).dense
    for row in range(5):
        alone = build(how, "c").compress(
            v[row : row + 1], RoundDraws(Streams(0), np.array([row]), 0), "test", sizes_of(23)
        )
        assert torch.equal(alone.dense[0], whole[row])


@pytest.mark.parametrize("how", ALL.values(), ids=ALL)
def test_declared_constants_hold(how):
    """Contraction and variance bounds hold over Gaussian, sparse and constant vectors; unbiased means are unbiased."""
    rng, many, dim = np.random.default_rng(1), 4000, 24
    sparse = rng.standard_normal(dim) * (rng.random(dim) < 0.2)
    for v in (rng.standard_normal(dim), sparse, np.ones(dim), np.r_[100.0, np.zeros(dim - 1)]):
        rows = torch.from_numpy(np.repeat(v[None], many, axis=0))
        out = packed(how, rows).dense.numpy()
        delta, omega = build(how, "c").quality(sizes_of(dim))
        error = ((out - v) ** 2).sum(axis=1)
        slack = 4 * error.std() / math.sqrt(many) + 1e-9 * (v @ v)
        if delta is not None:
            assert error.mean() <= (1 - delta) * (v @ v) + slack
        if omega is not None:
            assert error.mean() <= omega * (v @ v) + slack
            assert (np.abs(out.mean(axis=0) - v) <= 5 * out.std(axis=0) / math.sqrt(many) + 1e-6 * np.abs(v)).all()


@pytest.mark.parametrize("how", ALL.values(), ids=ALL)
def test_zero_stays_zero(how):
    """Q(0) = 0, without a division by the norm."""
    assert (packed(how, torch.zeros(2, 9, dtype=torch.float64)).dense == 0).all()


DRAWS_PLACES = ("random", "random of tensors", "random, unbiased", "random, short")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("how", [ALL[name] for name in ALL if name not in DRAWS_PLACES], ids=str)
def test_what_has_overflowed_is_not_made_a_number(how, value):
    """A row with NaN or infinity is not finite behind the packet, either, which encodes as any; nobody is warned.

    What float32 norms and scales cannot hold (1e300) is no number, or what it was.
    """
    v = torch.tensor([[1.0, -2.0, value, 0.5, 0.0, 3.0]], dtype=torch.float64)
    packet = packed(how, v)
    assert np.array_equal(packet.decode(packet.encode(0)), packet.dense[0].numpy(), equal_nan=True)
    if math.isfinite(value):
        assert not packet.dense[0, 2].isfinite() or packet.dense[0, 2] > 1e38
    else:
        assert not packet.dense.isfinite().all()


@pytest.mark.parametrize("values", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["top_k", "random_k"])
def test_rounded_values_keep_less(kind, values):
    """Values that travel in a shorter type lose up to its roundoff: the declared contraction counts that in."""
    u = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[values]
    v = torch.full((1, 6), 1.0 + u, dtype=torch.float64)  # half way between two numbers: the worst case
    how = {"kind": kind, "ratio": 0.5, "values": values}
    delta = build(how, "c").quality(sizes_of(6)).delta
    assert delta is not None
    lost = float(((packed(how, v).dense - v) ** 2).sum() / (v * v).sum())
    assert lost <= 1 - delta
    assert delta == pytest.approx(0.5 * (1 - u * u), abs=1e-15)
    assert lost > 0.5


def test_tensors_have_norms_of_their_own():
    """`scope: tensor`: one small tensor beside a large one keeps its levels, and the bytes of two norms are charged."""
    v = torch.cat([torch.full((1, 4), 1e-6), torch.full((1, 8), 1e3)], dim=1).double()
    how = {"kind": "uniform", "levels": 1}
    c = build({**how, "scope": "tensor"}, "c")
    packet = c.compress(v, draws(1), "t", (4, 8))
    assert torch.allclose(packet.dense, v, rtol=1e-6)
    assert packet.lengths()[0] == (4 + 1) + (4 + 2)
    assert c.quality((4, 8)).omega == 2.0
    assert not build(how, "c").compress(v, draws(1), "t", (4, 8)).dense[0, :4].all()


def test_top_k_keeps_the_largest_and_the_first_of_equals():
    """The largest magnitudes, signs kept; ties go to the lowest place; k = max(1, floor(ratio d))."""
    v = torch.tensor([[3.0, -5.0, 1.0, 2.0, -0.1], [1.0, -1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    kept = packed({"kind": "top_k", "k": 2}, v).dense
    assert kept.tolist() == [[3.0, -5.0, 0, 0, 0], [1.0, -1.0, 0, 0, 0]]
    one = packed({"kind": "top_k", "ratio": 0.1}, v).dense
    assert (one != 0).sum(dim=1).tolist() == [1, 1]


def test_different_rounds_and_seeds_draw_differently():
    """Random compressors depend on seed and round, and on nothing else."""
    v = torch.ones(1, 64, dtype=torch.float64)
    how = {"kind": "random_k", "ratio": 0.5}
    first = packed(how, v).dense
    assert torch.equal(first, packed(how, v).dense)
    assert not torch.equal(first, packed(how, v, seed=1).dense)
    assert not torch.equal(first, packed(how, v, step=1).dense)


LENET = [150, 6, 2400, 16, 30720, 120, 10080, 84, 840, 10]  # 44,426 parameters in ten tensors


def test_published_sizes_of_a_network():
    """LeNet5, largest 30 % of each tensor in float32: 58,858 bytes a message, against 177,704 dense."""
    v = torch.from_numpy(np.random.default_rng(0).standard_normal((1, sum(LENET)))).float()
    top = build({"kind": "top_k", "ratio": 0.3, "scope": "tensor"}, "c")
    packet = top.compress(v, draws(1), "c", LENET)
    assert packet.values.shape[1] == 13_326
    assert packet.lengths()[0] == 58_858
    assert top.quality(LENET).delta == pytest.approx(1 / 6)


def test_few_places_travel_as_gaps():
    """One in a thousand: gaps of one or two bytes instead of a bitmap of 1,250."""
    v = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 10_000)))
    packet = packed({"kind": "top_k", "k": 10}, v)
    assert 10 * 8 + 10 <= packet.lengths()[0] <= 10 * 8 + 20


def test_mixing_charges_the_encoded_bodies():
    """A mixing of packets costs degree times length, and what the same values would have cost is noted beside it."""
    topology = graph("ring:4")
    counts = Counts()
    W = csr_array(np.full((4, 4), 0.25))
    network = LocalNetwork(Layout(topology), [slice(0, 4)], {"W": W}, counts)
    v = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 8)))
    answer = network.answer([Mix(packed({"kind": "top_k", "k": 2}, v))])[0]
    assert counts.bytes == 4 * 2 * (2 * 8 + 1)
    assert answer.shape == (4, 8)
    assert network.packed == Packed(packed=4 * 2 * 17, dense=4 * 2 * 64)
    network.answer([Mix(packed({"kind": "top_k", "k": 8}, v[:, :8]))])
    assert network.packed.excess == 4 * 2 * 1


def test_copies_are_mixed_while_packets_travel():
    """With `copies` the answer is their weighted sum, and the packet is what is charged."""
    topology, counts = graph("ring:4"), Counts()
    W = csr_array(np.full((4, 4), 0.25))
    network = LocalNetwork(Layout(topology), [slice(0, 4)], {"W": W}, counts)
    v = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 8)))
    answer = network.answer([Mix(packed({"kind": "top_k", "k": 2}, v), copies=v, name="x")])[0]
    assert torch.allclose(answer, v.mean(dim=0).expand(4, -1))
    assert counts.bytes == 4 * 2 * (2 * 8 + 1)


SCENARIO = {
    "topology": {"kind": "ring", "n": 4},
    "problem": {"kind": "quadratic", "dim": 8},
    "algorithm": {"kind": "cdproxsgt", "eta": 0.01, "compress": {"kind": "top_k", "k": 2}},
    "schedule": {"horizon": 6},
}


def test_a_run_whose_packets_cost_more_says_so_once(tmp_path):
    """Only y costs more than dense here, and all together less; a reader still hears of it, once."""
    costly = {**SCENARIO["algorithm"], "compress_y": {"kind": "top_k", "k": 8}}
    with pytest.warns(UserWarning, match=r"cost more than dense ones .* \(0.641 times as much so far\)") as told:
        result = fedsim.run({**SCENARIO, "algorithm": costly}, folder=tmp_path / "out")
    assert len(told) == 1
    assert result.facts["compression_ratio"] == pytest.approx((17 + 65) / 128)


def test_a_resumed_run_weighs_all_its_packets(tmp_path):
    """The ratio of a run that went on from a checkpoint is that of the whole run, though messages differ in length."""
    problem, compress = {"kind": "quadratic", "dim": 400}, {"kind": "top_k", "k": 2}
    scenario = {**SCENARIO, "problem": problem, "algorithm": {**SCENARIO["algorithm"], "compress": compress}}
    first, second, whole = (prepare(load_study(scenario).runs[0]).player() for _ in range(3))
    for player in (first, second, whole):
        player.start()
    whole.advance(6)
    first.advance(3)
    second.load(first.save())
    second.advance(6)
    ratios = []
    for player in (second, whole):
        player.measures()
        ratios.append(player.facts()["compression_ratio"])
    assert ratios[0] == ratios[1]
    first.measures()
    assert first.facts()["compression_ratio"] != ratios[0]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"kind": "top_q"}, "did you mean 'top_k'"),
        ({"kind": "top_k"}, "give one of ratio"),
        ({"kind": "top_k", "ratio": 0.1, "k": 3}, "give one of ratio"),
        ({"kind": "top_k", "ratio": 1.5}, "compress.ratio"),
        ({"kind": "top_k", "k": 3, "scope": "tensor"}, "needs a ratio"),
        ({"kind": "qsgd", "level": 3}, "compress.level: unknown key"),
        ({"kind": "random_k", "ratio": 0.5, "unbiased": True, "scope": "tensor"}, "needs scope flat"),
        ({"kind": "random_k", "ratio": 0.5, "unbiased": True, "values": "float32"}, "needs values: state"),
    ],
)
def test_wrong_compressors_are_refused(how, message):
    """The key, and what is needed."""
    with pytest.raises(InputError, match=message):
        build(how, "compress")


OWN = """
from dataclasses import dataclass
import torch
from fedsim.compression.compressors import Compressor, Quality
from fedsim.compression.packets import DensePacket

@dataclass(frozen=True)
class Halves(Compressor):
    kind = "halves"
    keep: float = 0.5

    def quality(self, sizes):
        return Quality(1 - (1 - self.keep) ** 2, None)

    def compress(self, v, rng, purpose, sizes):
        return DensePacket(self.keep * v, self.keep * v)
"""


@pytest.mark.parametrize("elsewhere", [False, True])
def test_ones_own_compressor_lies_beside_the_scenario(tmp_path, monkeypatch, elsewhere):
    """`file.py:Class` is looked up in the scenario's folder, not in the current one."""
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "own.py").write_text(OWN)
    how = {"kind": "own.py:Halves", "keep": 0.9}
    content = {
        "topology": {"kind": "ring", "n": 4},
        "problem": {"kind": "quadratic", "dim": 3},
        "algorithm": {"kind": "cdproxsgt", "eta": 0.1, "compress": how, "compress_y": "own.py:Halves"},
        "schedule": {"horizon": 2},
    }
    (tmp_path / "lab" / "s.yaml").write_text(yaml.safe_dump(content))
    if elsewhere:
        (tmp_path / "own.py").write_text("raise SystemExit('the wrong file')")
    monkeypatch.chdir(tmp_path)
    scenario = only_run(tmp_path / "lab" / "s.yaml")
    made = prepare(scenario).algorithm
    assert (made._x.keep, made._y.keep) == (0.9, 0.5)
    assert fedsim.run(tmp_path / "lab" / "s.yaml", folder=tmp_path / "out").status == "finished"
    assert scenario.key() != changed_own_file(tmp_path / "lab").key()


def only_run(file):
    return load_study(file).runs[0]


def changed_own_file(folder):
    (folder / "own.py").write_text(OWN + "\n# another version\n")
    return only_run(folder / "s.yaml")


@pytest.mark.parametrize(
    ("how", "message"), [("other.py:Halves", "no such file"), ({"kind": "own.py:Halves", "kept": 1}, "'keep'")]
)
def test_a_mistake_in_ones_own_compressor_is_named(tmp_path, how, message):
    """A missing file, or an unknown key, ends before anything is played."""
    (tmp_path / "own.py").write_text(OWN)
    content = {
        "topology": {"kind": "ring", "n": 4},
        "problem": {"kind": "quadratic", "dim": 3},
        "algorithm": {"kind": "choco_sgd", "eta": 0.1, "compress": how},
        "schedule": {"horizon": 2},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=message):
        prepare(only_run(tmp_path / "s.yaml"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["plain", "ties", "zero", "misleading", "not a number"])
def test_a_sample_only_says_where_to_look(case, dtype):
    """Of long rows the k largest are found as by sorting, ties to the lowest place, whatever a sample of them shows."""
    rng, k = np.random.default_rng(3), 40
    v = torch.from_numpy(rng.normal(size=(3, 8192))).to(dtype)
    if case == "ties":
        v = v.mul(2).round()
    elif case == "zero":
        v[1] = 0.0
    elif case == "misleading":
        v[:, ::64] *= 1e6  # the sample sees the large numbers only
    elif case == "not a number":
        v[2, 5000] = math.nan
    packet = build({"kind": "top_k", "k": k}, "c").compress(v, draws(3), "test", [8192])
    for row in range(3 if case != "not a number" else 2):
        order = np.argsort(-v[row].abs().numpy(), kind="stable")
        assert packet.places[row].tolist() == sorted(order[:k].tolist())
        assert torch.equal(packet.values[row], v[row, torch.from_numpy(packet.places[row])])
    assert (packet.places >= 0).all()
    assert (packet.places < 8192).all()
