"""Router replay as a scenario: golden loads over hosts, metrics, recordings, workloads, refusals."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fedsim
from fedsim.check import check
from fedsim.errors import InputError
from fedsim.moe.oracle import exact_assignment
from fedsim.moe.selection import select
from fedsim.moe.streams import recorded

SCORES = {"kind": "router_scores", "tokens": 512, "moe_num_experts": 8, "moe_top_k": 2, "seed": 0}


def play(folder, rounds, rule, problem=SCORES, hosts=4, metrics=None, **more):
    """Return the metrics of a replay, one row per round."""
    result = fedsim.run(
        {
            "name": "replay",
            "topology": {"kind": "server", "n": hosts},
            "problem": problem,
            "algorithm": {"kind": "router_replay", **rule},
            "schedule": {"horizon": rounds},
            "record": {"every": 1, **({"metrics": metrics} if metrics else {})},
            **more,
        },
        folder=folder,
    )
    return result.metrics


def loads(frame, row):
    names = [c for c in frame if c.startswith("load.0.")]
    return " ".join(str(int(frame[c].iloc[row])) for c in names)


@pytest.mark.parametrize("hosts", [1, 3, 8])
def test_golden_loads_whatever_the_hosts(tmp_path, hosts):
    """Round r is step r + 1 of the reference run; how many hosts hold the tokens changes no load."""
    frame = play(tmp_path / "a", 99, {"bias_rule": "sign"}, hosts=hosts, metrics=["gap", "load.*", "bias.*"])
    assert loads(frame, 0) == "17 29 56 90 127 181 217 307"
    assert loads(frame, 1) == "18 29 56 93 129 179 216 304"
    assert loads(frame, 9) == "21 32 59 96 130 176 213 297"
    assert loads(frame, 99) == "54 82 122 129 128 128 154 227"
    assert frame["gap"].iloc[[0, 1, 99]].tolist() == pytest.approx([57.077431, 56.441460, 11.927318], abs=2e-6)
    assert frame["bias.0.0"].iloc[1] == pytest.approx(0.75e-3)  # 5 experts up, 3 down, centred


@pytest.mark.parametrize("tokens", [512, 509])
@pytest.mark.parametrize("centred", [True, False])
def test_lagrangian_and_its_terms(tmp_path, tokens, centred):
    """The recorded benefit and penalty are those of theorem 1: the Lagrangian rises by their difference.

    Also where E does not divide K T; before the first update nothing has risen.
    """
    rule = {"bias_rule": "sign", "bias_update_rate": 0.01, "center_bias": centred}
    frame = play(tmp_path / "a", 40, rule, {**SCORES, "tokens": tokens})
    assert frame.loc[0, ["benefit", "penalty"]].tolist() == [0, 0]
    rise = frame["lagrangian"].diff().iloc[1:]
    assert np.allclose(rise, (frame["benefit"] - frame["penalty"]).iloc[1:], atol=1e-9)
    assert (frame["benefit"] > -1e-9).all()
    assert (frame["gap"] > -1e-9).all()


@pytest.mark.parametrize("problem", [{"fresh": True}, {"workload": "drift", "period": 4}, {"layers": 2, "fresh": True}])
def test_every_stream_reports_the_gap(tmp_path, problem):
    """Batches that change have their own exact optimum at every step, unless asked to leave it out."""
    frame = play(tmp_path / "a", 4, {"bias_rule": "sign"}, {**SCORES, "tokens": 64, **problem})
    assert (frame["gap"] > 0).all()
    assert frame["gap"].nunique() == 5
    none = play(tmp_path / "b", 1, {"oracle": "none"}, {**SCORES, "tokens": 64, **problem})
    assert not {"gap", "score_ratio"} & set(none)


def test_large_streams_say_that_they_leave_the_gap_out():
    """Above 2^17 scores in every step the oracle is asked for by name; `check` says so."""
    problem = {**SCORES, "tokens": 2**14 + 1, "fresh": True}
    scenario = {"topology": {"kind": "server", "n": 2}, "problem": problem, "schedule": {"horizon": 1}}
    for oracle, said in (("auto", True), ("each", False), ("none", False)):
        (found,) = check({**scenario, "algorithm": {"kind": "router_replay", "oracle": oracle}})
        assert any("oracle: each computes it" in note for note in found["warnings"]) == said


def test_maxvio_of_the_whole_stream(tmp_path):
    """MaxVio_global of a recording counts all its steps under the bias of the moment; of one batch it is MaxVio."""
    scores = np.random.default_rng(0).random((3, 2, 20, 4)) + np.linspace(0, 0.5, 4)
    np.save(tmp_path / "s.npy", scores)
    problem = {"kind": "router_scores", "file": str(tmp_path / "s.npy")}
    frame = play(tmp_path / "a", 5, {"bias_update_rate": 0.05}, problem, metrics=["maxvio_global", "bias.*"])
    for _, row in frame.iterrows():
        whole = [
            select(scores[:, layer].reshape(-1, 4), np.array([row[f"bias.{layer}.{e}"] for e in range(4)]), 2).loads
            for layer in (0, 1)
        ]
        assert row["maxvio_global"] == pytest.approx(np.mean([w.max() / 30 - 1 for w in whole]))
    assert "maxvio_global" not in play(tmp_path / "b", 1, {})


def test_the_regret_of_a_recording_is_against_its_own_best_bias(tmp_path):
    """Over a whole pass the comparator's dual value is the least there is: that of all steps' tokens at once."""
    rng = np.random.default_rng(0)
    scores = (
        rng.random((4, 1, 200, 4))
        + np.array([[0.5, 0, 0, 0], [0, 0.4, 0, 0], [0, 0, 0.3, 0], [0, 0, 0, 0.9]])[:, None, None]
    )
    np.save(tmp_path / "s.npy", scores)
    problem = {"kind": "router_scores", "file": str(tmp_path / "s.npy")}
    frame = play(tmp_path / "a", 3, {"bias_rule": "none", "regret": True}, problem)
    whole = scores.reshape(-1, 4)
    least = exact_assignment(whole, 2).value
    assert frame["regret"].iloc[-1] == pytest.approx(select(whole, np.zeros(4), 2).score - least, abs=0.05)


def test_rules_see_loads_before_dropping(tmp_path):
    """With capacity factor 1 the biases follow the golden trajectory, and the drops are counted."""
    rule = {"bias_rule": "sign", "capacity_factor": 1.0}
    frame = play(tmp_path / "a", 9, rule, hosts=1, metrics=["dropped", "load.*", "score_ratio"])
    assert loads(frame, 1) == "18 29 56 93 129 179 216 304"
    assert loads(frame, 9) == "21 32 59 96 130 176 213 297"
    assert frame["dropped"].iloc[0] == 321 / 1024
    assert frame["score_ratio"].iloc[0] == pytest.approx(0.7709, abs=5e-5)


def test_own_counts_are_a_mistake_that_maxvio_hides(tmp_path):
    """Hosts that differ: with loads of all of them score/OPT > 0.999 and one bias, with their own the same MaxVio."""
    problem = {**SCORES, "shard": "favourite"}
    frames = {
        sync: play(tmp_path / sync, 500, {"bias_rule": "sign", "bias_sync": sync, "center_bias": False}, problem)
        for sync in ("global", "local")
    }
    last = {sync: frame.iloc[-1] for sync, frame in frames.items()}
    assert last["global"]["maxvio"] == last["local"]["maxvio"] == 0.015625
    assert last["global"]["score_ratio"] > 0.999
    assert last["global"]["bias_spread"] == 0
    assert last["local"]["score_ratio"] == pytest.approx(0.9767, abs=2e-3)
    assert last["local"]["bias_spread"] == pytest.approx(0.269, abs=1e-9)
    assert "gap" not in frames["local"]


def test_every_rule_plays_and_balances(tmp_path):
    """Each rule ends more balanced than no rule; no gap is recorded where there is none."""
    start = play(tmp_path / "none", 1, {"bias_rule": "none"})["maxvio"].iloc[-1]
    for rule, more in {
        "sign": {"bias_update_rate": 0.01},
        "prop": {"bias_update_rate": 0.05},
        "tanh": {"bias_update_rate": 0.01, "kappa": 2.0, "momentum": 0.5},
        "mult": {"bias_update_rate": 0.01},
        "aux_loss": {"bias_update_rate": 2.0},
        "qb": {},
        "bip": {},
        "sinkhorn": {"rule_rounds": 50},
        "expert_choice": {},
        "force_balanced": {},
    }.items():
        frame = play(tmp_path / rule, 60, {"bias_rule": rule, **more})
        assert frame["maxvio"].iloc[-1] < 0.35 * start, rule
        assert ("gap" in frame) == (rule in ("sign", "prop", "tanh", "qb")), rule


def test_the_auxiliary_loss_descends_its_own_gradient():
    """The slope that shifts the logits is the derivative of E sum f_k P_k, f held fixed, for every score function."""
    from types import SimpleNamespace

    from fedsim.moe.part import _aux_slope
    from fedsim.moe.streams import to_scores

    rng = np.random.default_rng(0)
    logits, bias = rng.standard_normal((50, 6)), rng.standard_normal(6)
    for kind in ("sigmoid", "softmax", "sqrtsoftplus"):
        count = select(to_scores(logits + bias, kind), np.zeros(6), 2).loads

        def value(shift, kind=kind, count=count):
            scores = to_scores(logits + shift, kind)
            return 6 * (count / 100 * (scores / scores.sum(axis=1, keepdims=True)).mean(axis=0)).sum()

        s = SimpleNamespace(experts=6, top_k=2, p=SimpleNamespace(score_func=kind))
        slope = _aux_slope(to_scores(logits + bias, kind), logits, bias, count, s)
        step = 1e-6 * np.eye(6)
        wanted = [(value(bias + step[k]) - value(bias - step[k])) / 2e-6 for k in range(6)]
        assert slope == pytest.approx(wanted, abs=1e-8)


def test_routing_looks_at_the_past_only(tmp_path):
    """The loads of step n are the same whatever comes after n: a longer recording begins alike."""
    rng = np.random.default_rng(0)
    scores = rng.random((6, 1, 40, 4))
    np.save(tmp_path / "short.npy", scores[:4])
    np.save(tmp_path / "long.npy", np.concatenate([scores[:4], rng.random((2, 1, 40, 4))]))
    problem = {"kind": "router_scores", "moe_top_k": 2}
    rule = {"bias_rule": "prop", "bias_update_rate": 0.1}
    frames = [
        play(tmp_path / name, 3, rule, {**problem, "file": str(tmp_path / f"{name}.npy")}, metrics=["load.*"])
        for name in ("short", "long")
    ]
    assert frames[0].filter(like="load.").equals(frames[1].filter(like="load."))


def test_recordings_in_three_formats(tmp_path):
    """.npy, .npz and Parquet with steps and layers give the same replay."""
    scores = np.random.default_rng(0).random((3, 2, 20, 4))
    np.save(tmp_path / "s.npy", scores)
    np.savez(tmp_path / "s.npz", scores=scores, step=np.arange(3))
    step, layer, token = np.meshgrid(range(3), range(2), range(20), indexing="ij")
    columns = {"step": step.ravel(), "layer": layer.ravel(), "token": token.ravel()}
    columns |= {f"expert{e}": scores[..., e].ravel() for e in range(4)}
    pq.write_table(pa.table(columns), tmp_path / "s.parquet")
    frames = [
        play(
            tmp_path / f.replace(".", "-"),
            4,
            {"bias_rule": "sign"},
            {"kind": "router_scores", "moe_top_k": 2, "file": str(tmp_path / f)},
            metrics=["maxvio", "load.*"],
        ).drop(columns="wall_seconds")
        for f in ("s.npy", "s.npz", "s.parquet")
    ]
    assert frames[0].equals(frames[1])
    assert frames[0].equals(frames[2])
    first = select(scores[0, 1], np.zeros(4), 2).loads
    assert [frames[0][f"load.1.{e}"].iloc[0] for e in range(4)] == first.tolist()


def test_fresh_batches_belong_to_the_seed(tmp_path):
    """Two seeds draw different streams, one seed the same; the regret is counted against the best fixed bias."""
    problem = {**SCORES, "tokens": 128, "fresh": True}
    rule = {"bias_rule": "prop", "bias_update_rate": 0.1, "bias_schedule": "inv_n", "regret": True}
    one, two = (play(tmp_path / f"{s}", 30, rule, problem, seed=s, data_seed=0) for s in (1, 2))
    again = play(tmp_path / "again", 30, rule, problem, seed=1, data_seed=0)
    assert one.drop(columns="wall_seconds").equals(again.drop(columns="wall_seconds"))
    assert not one["maxvio"].equals(two["maxvio"])
    assert one["regret"].iloc[-1] > 0
    each = play(tmp_path / "each", 5, {**rule, "oracle": "each"}, problem)
    assert (each["gap"] > 0).all()


def test_group_limits_report_score_and_load_apart(tmp_path):
    """Under group limits there is no gap; score ratio and loads are there, and a token touches at most M groups."""
    problem = {**SCORES, "num_expert_groups": 4, "num_limited_groups": 1}
    frame = play(tmp_path / "a", 20, {"bias_rule": "sign"}, problem)
    assert "gap" not in frame
    assert {"score_ratio", "maxvio"} <= set(frame)


def test_check_prints_floor_curvature_and_growth(tmp_path):
    """`check` says the target load, the sampling floor, the stable rate and how the regret should grow."""
    scenario = {
        "topology": {"kind": "server", "n": 2},
        "problem": {**SCORES, "fresh": True},
        "algorithm": {"kind": "router_replay", "bias_rule": "sign"},
        "schedule": {"horizon": 5},
    }
    (found,) = check(scenario)
    constants = {c["name"]: c["value"] for c in found["constants"]}
    assert constants["L"] == 128
    assert constants["maxvio_floor"] == pytest.approx(0.1165, abs=1e-4)
    assert constants["prop_limit"] == pytest.approx(0.25, rel=0.15)
    assert constants["regret"] > 0


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize(("unit", "times"), [("relative", 1.0), ("fraction", 4.0), ("tokens", 1 / 128)])
def test_steps_that_swing_are_warned_of_in_every_unit(unit, times, delay):
    """The stable rate is that of the notes (0.243 at once, 0.075 two steps late), in the unit of the error."""
    for factor in (0.8, 1.25):
        rate = {0: 0.243, 2: 0.075}[delay] * times
        rule = {"bias_rule": "prop", "bias_update_rate": rate * factor, "error_unit": unit, "bias_delay": delay}
        scenario = {
            "topology": {"kind": "server", "n": 2},
            "problem": {**SCORES, "fresh": True},
            "algorithm": {"kind": "router_replay", **rule},
            "schedule": {"horizon": 5},
        }
        (found,) = check(scenario)
        (limit,) = [c["value"] for c in found["constants"] if c["name"] == "prop_limit"]
        assert limit == pytest.approx(rate, rel=0.15)
        assert any("loads will swing" in note for note in found["warnings"]) == (factor > 1)


def test_loads_eight_steps_late(tmp_path):
    """A slow sign step ends near balance; a fast proportional one leaves 1 to 3 of 8 experts empty in 3 of 4 steps."""
    tails = {}
    for kind, rate in (("sign", 1e-3), ("prop", 0.05)):
        rule = {"bias_rule": kind, "bias_update_rate": rate, "bias_delay": 8, "oracle": "none"}
        tails[kind] = play(tmp_path / kind, 400, rule, {**SCORES, "tokens": 4096}, metrics=["maxvio", "dead"])[-200:]
    assert tails["sign"]["maxvio"].iloc[-50:].max() == pytest.approx(0.083, abs=5e-4)
    assert tails["prop"]["maxvio"].max() == pytest.approx(2.88, abs=5e-3)
    assert tails["prop"]["dead"].max() == 3
    assert (tails["prop"]["dead"] > 0).mean() == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize(
    ("score_func", "rule", "warned"),
    [("softmax", "sign", True), ("softmax", "prop", False), ("sigmoid", "sign", False)],
)
def test_sign_steps_on_softmax_scores_are_warned_of(score_func, rule, warned):
    """The combination that training systems refuse is noted by `check`, and no other."""
    scenario = {
        "topology": {"kind": "server", "n": 2},
        "problem": {**SCORES, "score_func": score_func},
        "algorithm": {"kind": "router_replay", "bias_rule": rule},
        "schedule": {"horizon": 5},
    }
    (found,) = check(scenario)
    assert any("sign with softmax scores" in note for note in found["warnings"]) == warned


def test_expert_choice_on_one_host_has_the_table_s_score(tmp_path):
    """The reference instance in one place: loads all 128, score over optimum 1.0373."""
    last = play(tmp_path / "a", 2, {"bias_rule": "expert_choice"}, hosts=1).iloc[-1]
    assert last["maxvio"] == 0
    assert last["score_ratio"] == pytest.approx(1.0373, abs=5e-5)


@pytest.mark.parametrize(
    ("problem", "rule", "words"),
    [
        ({"kind": "quadratic"}, {}, "router_replay plays problem 'router_scores', not 'quadratic'"),
        ({**SCORES, "moe_top_k": 9}, {}, "moe_top_k: 9 given, at most moe_num_experts = 8"),
        ({**SCORES, "tokens": 3}, {}, "tokens: 3 given for 4 hosts"),
        ({**SCORES, "file": "none.npy"}, {}, "no such file; .npy, .npz or .parquet of router scores"),
        (SCORES, {"bias_rule": "signs"}, "signs"),
        (SCORES, {"bias_rule": "expert_choice", "capacity_factor": 1.0}, "leave capacity_factor and group limits out"),
        (SCORES, {"bias_rule": "mult", "regret": True}, "the regret needs selection by score plus biases"),
        (SCORES, {"regret": True, "comparator": [[0.0, 0.0]]}, r"comparator: \(1, 2\) given, \(1, 8\) needed"),
        ({**SCORES, "tokens": 5, "shard": "ragged"}, {}, "shard: ragged leaves host 0 of 4 none of 5 tokens"),
        ({**SCORES, "skew": float("nan")}, {}, "problem.skew: input should be a finite number"),
        (SCORES, {"capacity_factor": float("inf")}, "algorithm.capacity_factor: input should be a finite number"),
    ],
)
def test_refusals_say_what_is_needed(tmp_path, problem, rule, words):
    """Problems, files, sizes and keys that do not fit are named, before anything is played."""
    with pytest.raises(InputError, match=words):
        play(tmp_path / "a", 2, rule, problem)
    assert not (tmp_path / "a" / "run.json").exists()


def test_a_recording_that_is_none_is_refused(tmp_path):
    """Wrong shapes, types and names are told with what was found."""
    np.save(tmp_path / "flat.npy", np.ones(4))
    np.save(tmp_path / "int.npy", np.ones((4, 4), int))
    np.savez(tmp_path / "other.npz", gates=np.ones((4, 4)))
    for name, words in [
        ("flat.npy", r"shape \(4,\); \[tokens, experts\]"),
        ("int.npy", "float16, float32 or float64 scores are needed, int64 found"),
        ("other.npz", "no array 'scores'; it has gates"),
    ]:
        with pytest.raises(InputError, match=words):
            play(tmp_path / "a", 2, {}, {"kind": "router_scores", "file": str(tmp_path / name)})


def parquet(file, **columns):
    pq.write_table(pa.table(columns), file)
    return file


def test_files_that_cannot_be_used_say_why(tmp_path):
    """Broken files, missing values, columns that are no scores, tables that are not full: the place is named."""
    half = [0.5, 0.25]
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "torn.npz").write_bytes(b"PK")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    np.save(tmp_path / "objects.npy", np.array([{}], object))
    np.save(tmp_path / "nan.npy", np.array([[0.1, 0.2], [np.nan, np.inf]]))
    parquet(tmp_path / "index.parquet", a=half, b=half, __index_level_0__=[3, 4])
    parquet(tmp_path / "null.parquet", a=half, b=[0.5, None])
    parquet(tmp_path / "lists.parquet", scores=[half, half])
    parquet(tmp_path / "empty.parquet", a=pa.array([], pa.float64()))
    parquet(tmp_path / "keys.parquet", step=[0, 1])
    parquet(tmp_path / "holes.parquet", a=half, b=half, step=[0, 1], layer=[0, 1])
    for name, words in [
        ("torn.npy", "not a readable .npy of numbers"),
        ("torn.npz", "not a readable .npz of numbers"),
        ("torn.parquet", "not a readable Parquet file"),
        ("objects.npy", "not a readable .npy of numbers"),
        ("nan.npy", r"scores must be finite; 2 are not, the first at \[1, 0\] \(nan\)"),
        ("index.parquet", "column '__index_level_0__' is int64"),
        ("null.parquet", "column 'b' is double with 1 nulls"),
        ("lists.parquet", "column 'scores' is list"),
        ("empty.parquet", "0 rows, 1 columns of experts"),
        ("keys.parquet", "2 rows, 0 columns of experts"),
        ("holes.parquet", "2 of 2 x 2 are there"),
    ]:
        with pytest.raises(InputError, match=words):
            recorded(tmp_path / name)


def test_runs_say_which_file_they_played(tmp_path):
    """`run.json` holds the hash of the recording."""
    np.save(tmp_path / "s.npy", np.random.default_rng(0).random((20, 4)))
    play(tmp_path / "out", 1, {}, {"kind": "router_scores", "file": str(tmp_path / "s.npy")})
    wanted = hashlib.sha256((tmp_path / "s.npy").read_bytes()).hexdigest()
    assert fedsim.load(tmp_path / "out").facts["problem"]["sha256"] == wanted


def test_tokens_of_a_table_stand_in_their_order(tmp_path):
    """Column `token` orders the rows of a step and layer; half precision is read as float32."""
    file = parquet(tmp_path / "t.parquet", a=[0.1, 0.2, 0.3], b=[0.4, 0.5, 0.6], token=[2, 0, 1])
    assert recorded(file)[0, 0, :, 0].tolist() == [0.2, 0.3, 0.1]
    np.save(tmp_path / "half.npy", np.full((3, 2), 0.1, np.float16))
    assert recorded(tmp_path / "half.npy").dtype == np.float32


def test_sizes_that_a_file_contradicts_are_refused(tmp_path):
    """Tokens, experts and layers given beside a file are compared with it: axes are swapped easily."""
    np.save(tmp_path / "s.npy", np.random.default_rng(0).random((2, 8, 30)))
    problem = {"kind": "router_scores", "file": str(tmp_path / "s.npy")}
    for key, value in (("moe_num_experts", 8), ("tokens", 30), ("layers", 1)):
        with pytest.raises(InputError, match=rf"problem.{key}: {value} given, but .* holds"):
            play(tmp_path / "a", 1, {}, {**problem, key: value})
    same = {**problem, "moe_num_experts": 30, "tokens": 8, "layers": 2}
    assert len(play(tmp_path / "a", 1, {}, same)) == 2


def test_an_auxiliary_loss_without_logits_is_refused_before_the_run(tmp_path):
    """A recording of scores has nothing to shift; `check` knows."""
    np.save(tmp_path / "s.npy", np.random.default_rng(0).random((20, 4)))
    scenario = {
        "topology": {"kind": "server", "n": 2},
        "problem": {"kind": "router_scores", "file": str(tmp_path / "s.npy")},
        "algorithm": {"kind": "router_replay", "bias_rule": "aux_loss"},
        "schedule": {"horizon": 1},
    }
    with pytest.raises(InputError, match="aux_loss shifts logits, but the recording holds scores"):
        check(scenario)
