"""Expert-parallel training against a dense model in one place: gradients, loads, biases, accumulation, resume."""

import hashlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import fedsim
from fedsim.algorithms.moe_training import MoETraining
from fedsim.engine.layout import Layout
from fedsim.engine.rounds import Rounds
from fedsim.errors import InputError
from fedsim.moe import losses, model
from fedsim.moe.rules import Balancing, updated
from fedsim.problems.build import build
from fedsim.setting import RunSetting
from fedsim.topology.topology import Topology

TINY = {
    "kind": "byte_language",
    "sequence": 12,
    "validation": 3,
    "d_model": 12,
    "heads": 2,
    "d_dense": 10,
    "d_expert": 6,
    "moe_num_experts": 8,
    "dtype": "float64",
}


def player(problem, algorithm, block="auto", n=4):
    topology = Topology.server(n)
    resolved = algorithm.resolve(RunSetting(problem, topology))
    x0 = torch.zeros(n, problem.dim, dtype=problem.dtype)
    made = Rounds(resolved, problem, Layout(topology), {}, x0, seed=3, block=block)
    made.start()
    return made


def made(n=4, **keys):
    return build({**TINY, **keys}, n, 0, Path())


def texts(play, problem, algorithm, step=0):
    """Return every host's text of a step `[n, sequences, S + 1]`, drawn as the engine draws it."""
    draws = play._draws(play._oracles[0], step)
    draws.nodes = np.arange(problem.n)
    places = draws.integers("sequences", algorithm.sequences * algorithm.accumulation, problem.records)
    return [problem.sequences(node, own) for node, own in enumerate(places)]


def gradients(problem, algorithm, block="auto"):
    """Return the gradient of the first step (from Adam's first moment), the losses, and the player."""
    play = player(problem, algorithm, block)
    play.advance(1)
    state = play.final()
    g = np.concatenate([state["m"].ravel(), state["m_experts"].ravel()]) / (1 - algorithm.beta1)
    return torch.from_numpy(g), state, play


def dense_gradient(problem, per_host):
    """Return the gradient of the mean over hosts of the loss, by ordinary autograd, experts in one place."""
    x = problem.initial.clone().requires_grad_()
    common, experts = problem.taken_apart(x)
    bias = np.zeros((problem.shape.layers, problem.shape.experts))
    loss = sum(model.dense_loss(problem.shape, common, experts, bias, text)[0] for text in per_host) / problem.n
    loss.backward()
    return x.grad


PLAIN = MoETraining(bias_rule="none", sequences=3, clip=None)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"moe_top_k": 1},
        {"moe_top_k": 8},
        {"score_func": "softmax", "route_norm": False},
        {"score_func": "sqrtsoftplus", "route_scale": 2.5},
        {"moe_shared_experts": 1, "moe_layers": 3},
        {"num_expert_groups": 4, "num_limited_groups": 2},
    ],
    ids=lambda k: " ".join(k) or "default",
)
def test_gradients_through_requests_are_those_of_a_dense_model(keys):
    """Tokens that travel there and back, and their gradients, give autograd's gradient to 1e-10, in any block."""
    problem = made(**keys)
    g, _, play = gradients(problem, PLAIN)
    wanted = dense_gradient(problem, texts(play, problem, PLAIN))
    assert float((g - wanted).abs().max()) < 1e-10 * max(1.0, float(wanted.abs().max()))
    again, _, _ = gradients(problem, PLAIN, block=1)
    assert torch.equal(g, again)


def test_the_layer_is_the_formula():
    """Shared residual plus the sum over the K chosen of normalised gate times expert, token by token."""
    problem = made(moe_layers=1)
    common, experts = problem.taken_apart(problem.initial)
    text = problem.sequences(0, torch.arange(2) * 50)
    x = model.embed(common, text[:, :-1])
    x, _ = model.before_experts(problem.shape, common, 0, x)
    x, h = model.before_experts(problem.shape, common, 1, x)
    bias = np.linspace(-0.2, 0.2, 8)
    out = x.reshape(-1, 12).clone()
    for i, token in enumerate(h):
        score = 1 / (1 + torch.exp(-(token @ common["1.router"])))
        best = np.argsort(-(score.numpy() + bias), kind="stable")[:2]
        for k in best:
            w = experts[0][k]
            a, b = (token @ w["up"]).chunk(2)
            out[i] += score[k] / score[best].sum() * ((a / (1 + torch.exp(-a)) * b) @ w["down"])
    logits = out / (out.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() @ common["head"]
    wanted = torch.nn.functional.cross_entropy(logits, text[:, 1:].reshape(-1))
    loss, loads = model.dense_loss(problem.shape, common, experts, bias[None], text)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-12)
    assert loads.sum() == 2 * 12 * 2


def test_gates_do_not_see_the_bias():
    """A constant added to all biases changes no bit; gates are the unbiased scores of the experts chosen."""
    problem = made(route_norm=False)
    common, _ = problem.taken_apart(problem.initial)
    h = torch.from_numpy(np.random.default_rng(0).standard_normal((20, 12)))
    bias = np.linspace(-0.3, 0.3, 8)
    one, two = (model.gate(problem.shape, common, 1, h, b, "sign") for b in (bias, bias + 5.0))
    assert torch.equal(one.gates, two.gates)
    assert torch.equal(one.experts, two.experts)
    scores = model.scores_of(h @ common["1.router"], "sigmoid")
    assert torch.equal(one.gates, scores.gather(1, one.experts))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_auxiliary_and_z_losses_reach_the_router(scope, accumulation):
    """Their gradient equals that of the losses written out; f is not differentiated, its scope is kept.

    The global batch's f is of all hosts in the step's micro-batches so far (Megatron's and arXiv 2501.11873's).
    """
    problem = made()
    parts = {"sequences": 3 // accumulation, "accumulation": accumulation}
    algorithm = replace(PLAIN, aux_loss_coeff=0.3, aux_loss_scope=scope, z_loss_coeff=0.01, **parts)
    g, _, play = gradients(problem, algorithm)
    x = problem.initial.clone().requires_grad_()
    common, experts = problem.taken_apart(x)
    per_host, shape = texts(play, problem, algorithm), problem.shape
    zero, total, before = np.zeros((shape.layers, 8)), 0.0, 0
    for host, micro in [(h, m) for m in range(accumulation) for h in range(problem.n)]:
        texts_now = [text.split(algorithm.sequences)[micro] for text in per_host]
        text, seen = texts_now[host], [model.dense_loss(shape, common, experts, zero, t)[1] for t in texts_now]
        total = total + model.dense_loss(shape, common, experts, zero, text)[0]
        loads = before + sum(seen) if scope == "global_batch" else seen[host]
        before = before + (sum(seen) if host == problem.n - 1 else 0)
        y = model.embed(common, text[:, :-1])
        y, _ = model.before_experts(shape, common, 0, y)
        for layer in range(shape.layers):
            y, h = model.before_experts(shape, common, layer + 1, y)
            gating = model.gate(shape, common, layer + 1, h, zero[layer], "")
            share = torch.from_numpy(loads[layer] / loads[layer].sum())
            total = total + 0.3 * 8 * (share * gating.mean).sum() + 0.01 * gating.z
            order = torch.argsort(gating.experts.reshape(-1), stable=True)
            parts = h[order // 2].split(gating.loads.tolist())
            back = torch.cat([model.feed_forward(w, p) for w, p in zip(experts[layer], parts, strict=True)])
            y = model.combined(y, gating.gates, order, back)
    (total / problem.n / accumulation).backward()
    assert float((g - x.grad).abs().max()) < 1e-10


def by_hand(name, scores, router):
    """Return one of the router's losses of a host, written out: scores `[sequences, S, E]`, top 2."""
    if name == "simbal_coeff":
        return sum(
            (router[:, a] @ router[:, b] - float(a == b)).abs()
            for a in range(len(router[0]))
            for b in range(len(router[0]))
        )
    if name == "importance_loss_coeff":
        sums = scores.sum(dim=(0, 1))
        return ((sums - sums.mean()) ** 2).mean() / sums.mean() ** 2
    total = torch.zeros((), dtype=torch.float64)
    for one in scores:
        best = one.detach().argsort(dim=1, descending=True, stable=True)[:, :2]
        for k in range(scores.shape[2]):
            f = scores.shape[2] / (2 * len(one)) * float((best == k).sum())
            total = total + f * (one[:, k] / one.sum(dim=1)).mean()
    return total / len(scores)


@pytest.mark.parametrize("name", ["sequence", "importance_loss_coeff", "simbal_coeff"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_losses_of_a_hosts_own_tokens_reach_the_router(name, accumulation):
    """Sequence-wise balance, importance and SimBal: the gradient is that of the formulas, per micro-batch and layer."""
    problem = made()
    how = {"aux_loss_coeff": 0.3, "aux_loss_scope": "sequence"} if name == "sequence" else {name: 0.3}
    algorithm = replace(PLAIN, sequences=3 // accumulation, accumulation=accumulation, **how)
    g, _, play = gradients(problem, algorithm)
    x, shape = problem.initial.clone().requires_grad_(), problem.shape
    common, experts = problem.taken_apart(x)
    bias, total = np.zeros((shape.layers, 8)), 0.0
    for text in texts(play, problem, algorithm):
        total = total + model.dense_loss(shape, common, experts, bias, text)[0]
        for micro in text.split(algorithm.sequences):
            y, _ = model.before_experts(shape, common, 0, model.embed(common, micro[:, :-1]))
            for layer in range(shape.layers):
                y, h = model.before_experts(shape, common, layer + 1, y)
                gating, router = model.gate(shape, common, layer + 1, h, bias[layer], ""), common[f"{layer + 1}.router"]
                scores = model.scores_of(h @ router, "sigmoid").view(len(micro), -1, 8)
                total = total + 0.3 / accumulation * by_hand(name, scores, router)
                order = torch.argsort(gating.experts.reshape(-1), stable=True)
                parts = h[order // 2].split(gating.loads.tolist())
                back = torch.cat([model.feed_forward(w, p) for w, p in zip(experts[layer], parts, strict=True)])
                y = model.combined(y, gating.gates, order, back)
    (total / problem.n).backward()
    assert float((g - x.grad).abs().max()) < 1e-10
    again, _, _ = gradients(problem, algorithm, block=1)
    assert torch.equal(g, again)


def test_the_losses_of_balanced_routers_are_least():
    """Equal scores: the sequence loss is 1, the importance loss 0; orthonormal routers have no SimBal loss."""
    equal, shape = torch.full((12, 8), 0.5, dtype=torch.float64), made().shape
    assert float(losses.importance_loss(equal)) == pytest.approx(0, abs=1e-15)
    rotated = torch.stack([torch.roll(torch.arange(8.0, dtype=torch.float64) + 1, i) for i in range(8)])
    assert float(losses.sequence_loss(shape, rotated, 1)) == pytest.approx(1)
    assert float(losses.sequence_loss(shape, rotated, 8)) == pytest.approx(8 / 2 * (7 + 8) / 36)
    assert float(losses.similarity_loss(torch.eye(12, 8, dtype=torch.float64))) == 0


def test_the_step_rises_stays_or_falls_by_a_cosine():
    """Warm-up for 10 steps, then from 1e-2 to 1e-3 at the last of 110; without an end it stays."""
    problem = made()
    setting = RunSetting(problem, Topology.server(4), rounds=110)
    keys = {"learning_rate": 1e-2, "warmup": 10}
    falls = MoETraining(learning_rate_end=1e-3, **keys).resolve(setting)
    rates = [falls.rate_of_learning(k) for k in range(110)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[9] == pytest.approx(1e-2)
    assert rates[59] == pytest.approx(5.5e-3)
    assert rates[109] == pytest.approx(1e-3)
    assert all(a > b for a, b in pairwise(rates[9:]))
    stays = MoETraining(**keys).resolve(setting)
    assert {stays.rate_of_learning(k) for k in range(9, 110)} == {1e-2}
    with pytest.raises(InputError, match="must not be above learning_rate"):
        MoETraining(learning_rate_end=0.1).resolve(setting)
    with pytest.raises(InputError, match=r"must outlast warmup \(200\)"):
        MoETraining(learning_rate_end=0.0, warmup=200).resolve(setting)


def test_micro_batches_add_up_to_one_batch():
    """Four micro-batches of one sequence: the gradient, loads and bias of one batch of four; one update of the bias."""
    problem = made()
    rule = {"bias_rule": "sign", "bias_update_rate": 0.01, "clip": None}
    whole = gradients(problem, MoETraining(sequences=4, **rule))
    parts = gradients(problem, MoETraining(sequences=1, accumulation=4, **rule))
    assert np.array_equal(whole[1]["own"], parts[1]["own"])
    assert np.array_equal(whole[1]["bias"], parts[1]["bias"])
    assert float((whole[0] - parts[0]).abs().max()) < 1e-12
    assert np.abs(parts[1]["bias"]).max() <= 0.02  # one centred step


def test_biases_follow_the_loads_of_all_hosts():
    """After every step each host's bias is the rule applied to the sum of all hosts' selections, to the bit."""
    problem, algorithm = made(), MoETraining(bias_rule="prop", bias_update_rate=0.05, sequences=2)
    play = player(problem, algorithm, block=3)
    bias = torch.zeros(1, 2, 8, dtype=torch.float64)
    for n in range(1, 5):
        play.advance(n)
        state = play.final()
        loads = torch.from_numpy(state["own"].sum(axis=0))[None]
        assert loads.sum(dim=-1).tolist() == [[4 * 2 * 12 * 2] * 2]
        bias, _ = updated(Balancing("prop", 0.05), bias, bias, loads, 2, n)
        for row in state["bias"]:
            assert row.tobytes() == bias[0].numpy().tobytes()


def test_observing_leaves_loads_and_biases_alone():
    """Evaluation is no training: the same final state whether the run is observed or not."""
    problem, algorithm = made(), MoETraining(bias_rule="sign", sequences=2)
    seen, unseen = player(problem, algorithm), player(problem, algorithm)
    resolved = algorithm.resolve(RunSetting(problem, Topology.server(4)))
    metrics = resolved.metrics(RunSetting(problem, Topology.server(4)))
    for n in range(1, 4):
        seen.advance(n)
        mean = seen.outputs().mean(dim=0, keepdim=True)
        assert all(np.isfinite(m(mean)) for m in metrics.values())
    unseen.advance(3)
    for name, value in unseen.final().items():
        assert value.tobytes() == seen.final()[name].tobytes(), name
    assert seen.counts.as_dict() == unseen.counts.as_dict()


def test_the_observed_model_is_the_model():
    """The mean of all answers holds the common weights and every expert in its place."""
    problem, algorithm = made(), MoETraining(bias_rule="sign", sequences=2)
    play = player(problem, algorithm)
    play.advance(2)
    state, mean = play.final(), play.outputs().mean(dim=0)
    assert mean[: problem.common].numpy() == pytest.approx(state["weights"][0], abs=1e-15)
    assert mean[problem.common : problem.dim].numpy() == pytest.approx(state["experts"].ravel(), abs=1e-15)


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_dropping_bounds_what_an_expert_takes(policy):
    """With a capacity, slots are dropped, loads before dropping are recorded, and gradients stay finite."""
    problem = made()
    algorithm = replace(PLAIN, capacity_factor=0.5, drop_policy=policy, sequences=2)
    g, state, _ = gradients(problem, algorithm)
    assert torch.isfinite(g).all()
    assert state["own"].sum() == 4 * 2 * 12 * 2 * 2
    assert state["sent"].sum() < state["own"].sum()
    assert (state["sent"] <= np.minimum(state["own"], 3)).all()  # ceil(0.5 * 2 * 24 / 8)
    free = gradients(problem, replace(algorithm, capacity_factor=8.0))
    none = gradients(problem, replace(algorithm, capacity_factor=None))
    assert torch.equal(free[0], none[0])


def test_empty_experts_and_one_expert_for_all():
    """Routers that send every token to one expert train on: the others get no rows and zero gradients."""
    problem = made(moe_top_k=1)
    sizes = problem.shape.common()
    start = model.named(problem.initial[: problem.common], sizes)
    for layer in (1, 2):
        start[f"{layer}.router"].zero_()  # all scores equal: ties go to expert 0
    g, state, _ = gradients(problem, PLAIN)
    assert state["own"][:, :, 0].tolist() == [[36, 36]] * 4
    experts = g[problem.common :].view(4, 2, 2, -1)
    assert bool((experts[0, :, 0] != 0).any())
    assert not bool(experts[1:].any())
    assert not bool(experts[0, :, 1].any())


def test_communications_are_counted():
    """Per layer and micro-batch: counts, rows there and back, gradients there and back, self excluded."""
    problem = made(moe_top_k=8)  # every host sends to every host
    play = player(problem, PLAIN)
    before = play.counts.as_dict()
    play.advance(1)
    after = {k: v - before[k] for k, v in play.counts.as_dict().items()}
    sums = 2 * 3 * 4  # Mean of gradients, Sum of squares, Sum of loads: four up, four down
    assert after["messages"] == 2 * 5 * 4 * 3 + sums
    rows = 4 * 3 * 36 * 2  # hosts, other hosts, tokens, experts of a host
    up = 4 * (problem.common * 8 + 8 + 2 * 8 * 8)
    assert after["bytes"] == 2 * (4 * rows * 12 * 8 + 4 * 3 * 2 * 8) + 2 * up
    assert after["gradients"] == 4
    assert after["samples"] == 12


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_bytes_of_an_all_to_all_are_those_that_travel(capacity):
    """`bytes_per_route` times the exchanges of rows is what was counted, with slots dropped and without."""
    problem, algorithm = made(), MoETraining(bias_rule="none", sequences=2, accumulation=3, capacity_factor=capacity)
    play = player(problem, algorithm)
    before = play.counts.as_dict()["bytes"]
    play.advance(1)
    metrics = algorithm.resolve(RunSetting(problem, Topology.server(4))).metrics(
        RunSetting(problem, Topology.server(4))
    )
    rows = metrics["bytes_per_route"](play.outputs().mean(dim=0, keepdim=True))
    sums = 2 * 4 * (problem.common * 8 + 8 + 2 * 8 * 8)  # gradients, squares, loads: up and down
    tables = 2 * 3 * 4 * 3 * 2 * 8  # layers, micro-batches, pairs of hosts, two experts each
    assert play.counts.as_dict()["bytes"] - before == sums + tables + 4 * 2 * 3 * rows


def test_nothing_is_said_of_a_step_before_the_first(tmp_path):
    """Before any step there are no loads: MaxVio, losses and bytes of a step have no value, the evaluation has one."""
    scenario = {
        "topology": {"kind": "server", "n": 4},
        "problem": TINY,
        "algorithm": {"kind": "moe_training", "sequences": 1, "capacity_factor": 1.0},
        "schedule": {"horizon": 2},
        "record": {"every": 1, "metrics": ["val_loss", "maxvio", "train_loss", "dropped", "load.*", "bias.*"]},
    }
    frame = fedsim.run(scenario, folder=tmp_path / "out").metrics
    empty = {c for c in frame if np.isnan(frame[c].iloc[0])}
    assert empty == {"maxvio", "train_loss", "dropped", *(f"load.{layer}.{e}" for layer in (0, 1) for e in range(8))}
    assert not frame.iloc[1:].isna().any(axis=None)


def test_a_run_resumes_to_the_same_bits_and_learns(tmp_path):
    """Stopped after a checkpoint and resumed, biases included: one digest; the loss falls, balance is better."""
    scenario = {
        "name": "tiny",
        "topology": {"kind": "server", "n": 4},
        "problem": {**TINY, "dtype": "float32", "sequence": 32, "d_model": 16},
        "algorithm": {"kind": "moe_training", "bias_rule": "sign", "bias_update_rate": 0.01, "learning_rate": 0.01},
        "schedule": {"horizon": 40},
        "record": {"every": 10},
        "checkpoint": {"every": 20},
    }
    whole = fedsim.run(scenario, folder=tmp_path / "whole")

    def kill(name, now, horizon, row):
        if now == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedsim.run(scenario, folder=tmp_path / "cut", progress=kill)
    assert fedsim.resume(tmp_path / "cut").digest == whole.digest
    frame = whole.metrics
    assert frame["val_loss"].iloc[-1] < frame["val_loss"].iloc[0] - 1.5
    assert frame["bias_spread"].iloc[-1] == 0
    assert frame["bytes_per_route"].iloc[-1] > 0
    free = fedsim.run({**scenario, "algorithm": {**scenario["algorithm"], "bias_rule": "none"}}, folder=tmp_path / "no")
    assert frame["maxvio"].iloc[-1] < free.metrics["maxvio"].iloc[-1]


@pytest.mark.parametrize(
    ("problem", "algorithm", "words"),
    [
        ({"kind": "quadratic"}, {}, "moe_training plays problem 'byte_language', not 'quadratic'"),
        ({**TINY, "moe_num_experts": 6}, {}, "6 given for 4 hosts; experts are divided evenly, so a multiple of 4"),
        ({**TINY, "heads": 5}, {}, "heads: 5 given, which does not divide d_model = 12"),
        ({**TINY, "corpus": "none.txt"}, {}, "corpus: 'none.txt': no such file; give python_docs"),
        ({**TINY, "validation": 100000}, {}, "corpus: python_docs has .* bytes, at least"),
        (TINY, {"bias_rule": "qb"}, "training knows none, sign, prop, tanh, mult"),
    ],
)
def test_refusals_say_what_is_needed(tmp_path, problem, algorithm, words):
    """What does not fit is named before anything is trained."""
    scenario = {
        "topology": {"kind": "server", "n": 4},
        "problem": problem,
        "algorithm": {"kind": "moe_training", **algorithm},
        "schedule": {"horizon": 1},
    }
    with pytest.raises(InputError, match=words):
        fedsim.run(scenario, folder=tmp_path / "out")


def test_corpora(tmp_path):
    """Python's own text, a file, and the texts of an archive joined by name; an archive without any is refused."""
    import tarfile

    from fedsim.moe import corpus

    text = corpus.load("python_docs", tmp_path)
    assert len(text) > 100_000
    assert made().facts()["sha256"] == hashlib.sha256(text.tobytes()).hexdigest()
    (tmp_path / "b.txt").write_bytes(b"second")
    (tmp_path / "a.txt").write_bytes(b"first")
    with tarfile.open(tmp_path / "texts.tgz", "w:gz") as tar:
        for name in ("b.txt", "a.txt"):
            tar.add(tmp_path / name, f"package/{name}")
    assert corpus.load("texts.tgz", tmp_path).tobytes() == b"first\nsecond"
    assert corpus.load("a.txt", tmp_path).tobytes() == b"first"
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    with pytest.raises(InputError, match=r"corpus: none.tar: holds no .txt files"):
        corpus.load("none.tar", tmp_path)
