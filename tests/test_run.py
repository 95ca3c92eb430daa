"""The life of a run: folders, digests, checkpoints, stops, and what a mistake or a Ctrl-C leaves behind."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from cases import Tracking, quadratic

import fedsim
from fedsim.errors import Diverged, InputError
from fedsim.results.draw import partition_of
from fedsim.results.plots import what_was_saved
from fedsim.results.recorder import Recorder, read_metrics

EVENTS = {
    "name": "events",
    "topology": {"kind": "ring", "n": 6},
    "problem": {"kind": "quadratic", "dim": 3},
    "algorithm": {"kind": "dadao"},
    "schedule": {"horizon": 12},
    "checkpoint": {"every": 5},
}
ROUNDS = EVENTS | {"name": "rounds", "problem": {"kind": "quadratic", "dim": 3}, "algorithm": {"kind": "adom_plus"}}
BATCHES = EVENTS | {
    "name": "batches",
    "problem": {"kind": "logistic", "data": {"kind": "breast_cancer", "normalise": "columns"}, "l2": 0.1},
    "algorithm": {"kind": "a2cid2", "step": 0.05, "momentum": 0.5, "batch": {"size": 4, "kind": "epoch"}},
}


@pytest.mark.parametrize("scenario", [EVENTS, ROUNDS, BATCHES], ids=lambda s: s["name"])
def test_the_same_scenario_gives_the_same_digest_and_another_seed_another(tmp_path, scenario):
    """A run is a function of its scenario: equal digests for equal seeds, and only then."""
    one, two, three = (
        fedsim.run(scenario, folder=tmp_path / str(i), overrides=[f"seed={s}", "data_seed=0"])
        for i, s in enumerate((0, 0, 1))
    )
    assert one.digest == two.digest
    if scenario is not ROUNDS:  # which draws nothing: its seed has nothing to change
        assert one.digest != three.digest


def test_a_study_with_data_seeds_of_its_runs_draws_a_graph_for_each(tmp_path):
    """With `data_seed: each` a random graph without a seed is drawn anew for every run, as when the run is alone."""
    study = EVENTS | {
        "topology": {"kind": "random_geometric", "n": 12, "radius": 0.6},
        "data_seed": "each",
        "seeds": [0, 1],
        "schedule": {"horizon": 2},
    }
    together = fedsim.run(study, folder=tmp_path / "study")
    alone = fedsim.run(study, folder=tmp_path / "alone", overrides={"seeds": [1]})
    assert [run.facts["topology"]["edges"] for run in together.runs] == [50, 37]
    assert together.runs[1].digest == alone.runs[0].digest


@pytest.mark.parametrize("scenario", [EVENTS, ROUNDS, BATCHES], ids=lambda s: s["name"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, scenario):
    """Killed after its second checkpoint and resumed, a run ends with the same digest, counts and metrics."""
    straight = fedsim.run(scenario, folder=tmp_path / "straight")
    seen = []

    def kill(name, now, horizon, row):
        seen.append(now)
        if now == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedsim.run(scenario, folder=tmp_path / "killed", progress=kill)
    assert fedsim.load(tmp_path / "killed").status == "interrupted"
    assert len(fedsim.load(tmp_path / "killed").metrics) == 12
    resumed = fedsim.resume(tmp_path / "killed")
    assert (resumed.status, resumed.digest) == ("finished", straight.digest)
    columns = [c for c in straight.metrics if c != "wall_seconds"]
    assert resumed.metrics[columns].equals(straight.metrics[columns])


def test_observing_and_saving_leave_the_bits_unchanged(tmp_path):
    """Recording ten times as often, with checkpoints, gives the digest of a run that never looked."""
    plain = {key: value for key, value in EVENTS.items() if key != "checkpoint"} | {"record": {"every": 12}}
    often = EVENTS | {"record": {"every": 0.3}}
    assert fedsim.run(plain, folder=tmp_path / "a").digest == fedsim.run(often, folder=tmp_path / "b").digest


def test_a_folder_holds_what_a_reader_needs(tmp_path):
    """scenario.yaml runs by itself to the same digest; run.json names versions, constants and provenance."""
    result = fedsim.run(EVENTS, folder=tmp_path / "run")
    again = fedsim.run(tmp_path / "run" / "scenario.yaml", folder=tmp_path / "again")
    assert again.digest == result.digest
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["status"] == "finished"
    assert facts["provenance"] == "paper"
    assert facts["versions"]["torch"]
    assert {c["name"] for c in facts["constants"]} >= {"chi1", "chi2", "gamma"}
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoint", "metrics.parquet", "run.json", "scenario.yaml",
    ]  # fmt: skip


def test_the_summary_is_what_json_promises(tmp_path):
    """`run --json`: folder, status, digest, totals and the last row of the metrics."""
    summary = fedsim.run(EVENTS, folder=tmp_path / "run").summary()
    assert list(summary) == ["folder", "status", "digest", "totals", "last"]
    assert list(summary["totals"]) == ["gradients", "communications", "messages", "bytes", "queries", "wall_seconds"]
    assert summary["last"]["time"] == 12
    assert summary["totals"]["gradients"] == summary["last"]["gradients"] > 0
    json.dumps(summary)


def test_a_study_is_one_folder_per_run_and_one_digest(tmp_path):
    """Variants and seeds run into folders of their own; the study's frame is long and its digest covers all."""
    study = EVENTS | {"seeds": 2, "variants": {"a": {}, "b": {"algorithm.gamma": 0.01}}}
    result = fedsim.run(study, folder=tmp_path / "s")
    assert result.status == "finished"
    assert [r.folder.name for r in result.runs] == ["a-seed0", "a-seed1", "b-seed0", "b-seed1"]
    assert result.digest == fedsim.run(study, folder=tmp_path / "t").digest
    assert len(result.metrics) == 4 * 13
    assert list(result.metrics.columns[:2]) == ["variant", "seed"]
    single = fedsim.run(EVENTS, folder=tmp_path / "one")
    assert single.digest == result.runs[0].digest


def test_two_algorithms_of_a_study_see_the_same_clocks(tmp_path):
    """Variants share events: the same seed gives the same gradients and, at equal rates, communications."""
    study = EVENTS | {"variants": {"a": {}, "b": {"algorithm": {"kind": "gossip_sgd", "step": 0.01}}}}
    a, b = fedsim.run(study, folder=tmp_path / "s").runs
    assert a.metrics["gradients"].diff()[1:].equals(b.metrics["gradients"].diff()[1:])


def test_live_objects_run_without_a_file(tmp_path):
    """A networkx graph, a problem object and an algorithm object are a scenario, too."""
    graph = nx.grid_2d_graph(3, 4)
    result = fedsim.run(
        topology=graph, problem=quadratic(12, 5), algorithm=Tracking(0.1), schedule={"horizon": 300},
        record={"every": 50}, folder=tmp_path / "live",
    )  # fmt: skip
    assert result.metrics["distance"].iloc[-1] < 1e-12
    assert result.metrics["round"].tolist() == [0, 50, 100, 150, 200, 250, 300]


def test_a_stop_condition_ends_the_run_and_is_named(tmp_path):
    """The run ends at the first observation at which the condition holds, and says which one."""
    result = fedsim.run(EVENTS | {"stop": {"gradients": 20}}, folder=tmp_path / "run")
    assert result.facts["stopped_by"] == "gradients >= 20"
    assert result.metrics["gradients"].iloc[-2] < 20 <= result.metrics["gradients"].iloc[-1]


def test_a_diverging_run_stops_with_its_cause_and_keeps_its_metrics(tmp_path):
    """A step far too large ends in `Diverged` with the likely cause; what was observed is readable."""
    wild = EVENTS | {"algorithm": {"kind": "gossip_sgd", "step": 1e6}, "schedule": {"horizon": 400}}
    with pytest.raises(Diverged, match="step"):
        fedsim.run(wild, folder=tmp_path / "run")
    result = fedsim.load(tmp_path / "run")
    assert result.status == "failed"
    assert "step" in result.facts["error"]
    assert len(result.metrics) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": {"kind": "continuized"}, "problem": BATCHES["problem"]}, "dual gradients"),
        ({"problem": BATCHES["problem"] | {"l2": 0.0}}, "strong convexity"),
        ({"record": {"metrics": ["distanc"]}}, "'distanc' is unknown.*did you mean 'distance'"),
        ({"start": {"kind": "given", "value": [1.0]}}, r"shape \(1,\) given, \[3\]"),
        ({"start": {"kind": "normal"}, "algorithm": {"kind": "dadao", "init": "theorem4"}}, "needs a common start"),
        ({"topology": {"kind": "server", "n": 6}}, "rates"),
        ({"stop": {"stationarity": 1e-3}}, "stop.stationarity: not among what this run records"),
    ],
)
def test_combinations_that_mean_nothing_are_refused_by_name(tmp_path, change, message):
    """Each refusal says what is missing for what."""
    with pytest.raises(InputError, match=message):
        fedsim.run(EVENTS | change, folder=tmp_path / "run")


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"kind": "dadao", "init": "theorem4"}, "theorem4 needs a common start"),
        ({"kind": "cdproxsgt", "eta": 0.1, "copies": "x0"}, "copies: x0 needs a common start"),
    ],
)
def test_rows_that_start_apart_are_no_common_start(tmp_path, algorithm, message):
    """A given start with a row of its own for every node is refused where one for all is needed; equal rows are one."""
    content = EVENTS | {"algorithm": algorithm, "start": {"kind": "given", "value": str(tmp_path / "x.npy")}}
    np.save(tmp_path / "x.npy", np.tile([1.0, 2.0, 3.0], (6, 1)))
    assert fedsim.run(content, folder=tmp_path / "together").status == "finished"
    np.save(tmp_path / "x.npy", np.arange(18.0).reshape(6, 3))
    with pytest.raises(InputError, match=message):
        fedsim.run(content, folder=tmp_path / "apart")


def test_global_randomness_is_neither_used_nor_moved(tmp_path):
    """NumPy's and torch's global generators stand where they stood, and their seeds do not matter."""
    np.random.seed(1)  # noqa: NPY002 - the very thing that must not matter
    torch.manual_seed(1)
    before = np.random.get_state()[1].copy(), torch.random.get_rng_state()  # noqa: NPY002
    first = fedsim.run(BATCHES, folder=tmp_path / "a").digest
    after = np.random.get_state()[1], torch.random.get_rng_state()  # noqa: NPY002
    assert np.array_equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    np.random.seed(2)  # noqa: NPY002
    assert fedsim.run(BATCHES, folder=tmp_path / "b").digest == first


def test_metrics_can_be_read_while_they_are_written(tmp_path):
    """Every observation is on disk when it was made; a torn last row costs that row only."""
    recorder = Recorder(tmp_path)
    for k in range(3):
        recorder.append({"round": k, "loss": k / 2})
        assert read_metrics(tmp_path).num_rows == k + 1
    stream = tmp_path / "metrics.arrows"
    stream.write_bytes(stream.read_bytes()[:-40])
    assert read_metrics(tmp_path).num_rows == 2


def cli(*arguments, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "fedsim", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, env=environment
    )


def test_the_command_line_runs_resumes_compares_and_plots(tmp_path):
    """run --json prints one object; compare and plot read the folder; exit code 0."""
    file = tmp_path / "s.yaml"
    file.write_text(json.dumps(EVENTS | {"variants": {"a": {}, "b": {"algorithm.gamma": 0.01}}}))
    done = cli("run", file, "--json", "--folder", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert [r["variant"] for r in summary["runs"]] == ["a", "b"]
    table = cli("compare", "out", "--to", "distance=1e-1", cwd=tmp_path)
    assert "| a | 1 |" in table.stdout
    drawn = cli("plot", "out", cwd=tmp_path)
    assert [Path(line).suffix for line in drawn.stdout.split()] == [".png", ".svg", ".pdf"]
    assert all((tmp_path / line).stat().st_size > 1000 for line in drawn.stdout.split())


def test_a_mistake_exits_with_2_and_a_failed_run_with_1(tmp_path):
    """Exit codes tell a wrong input from a run that failed; neither prints a traceback."""
    file = tmp_path / "s.yaml"
    file.write_text(json.dumps(EVENTS))
    wrong = cli("run", file, "algorithm.gama=1", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "did you mean 'gamma'" in wrong.stderr
    failed = cli("run", file, "algorithm={kind: gossip_sgd, step: 1e6}", "schedule.horizon=400", cwd=tmp_path)
    assert failed.returncode == 1
    assert "Traceback" not in wrong.stderr + failed.stderr
    assert cli("run", "none.yaml", cwd=tmp_path).returncode == 2
    assert cli("nonsense", cwd=tmp_path).returncode == 2


def test_check_prints_constants_with_formulas_and_the_guarantee(tmp_path):
    """check --json holds the derived constants, the rates and the bound with rate and prefactor apart."""
    file = tmp_path / "s.yaml"
    file.write_text(json.dumps(EVENTS))
    facts = json.loads(cli("check", file, "--json", cwd=tmp_path).stdout)[0]
    assert facts["problem"]["L"] == pytest.approx(10)
    assert facts["guarantee"]["broken"] == []
    assert facts["guarantee"]["rate"] == pytest.approx(1 / (8 * (2 * 10) ** 0.5))
    assert facts["guarantee"]["prefactor"] == pytest.approx(4 * 111)
    assert facts["rates"]["communications"] == pytest.approx((6 * 5 / (2 - 2 * np.cos(np.pi / 3))) ** 0.5)
    text = cli("check", file, cwd=tmp_path).stdout
    assert "1 / (4L)" in text
    assert "mu / 2" in text


def test_rates_prints_one_object_and_writes_a_file_that_a_scenario_uses(tmp_path):
    """`fedsim rates --json` has the four schemes; the file it writes gives a run the same rates."""
    table = json.loads(cli("rates", "grid:3,3", "--json", "--out", "r.csv", cwd=tmp_path).stdout)
    assert (table["n"], table["edges"]) == (9, 12)
    assert list(table["schemes"]) == ["uniform", "metropolis", "degree", "sdp"]
    assert table["schemes"]["uniform"]["communications"] == pytest.approx(10.0995, rel=1e-4)
    assert table["schemes"]["sdp"]["communications"] == pytest.approx(9.8337, rel=1e-4)
    assert table["schemes"]["uniform"]["gap"] is None
    file = tmp_path / "s.yaml"
    file.write_text(
        json.dumps(EVENTS | {"topology": {"kind": "grid", "rows": 3, "columns": 3}, "rates": {"file": "r.csv"}})
    )
    facts = json.loads(cli("check", file, "--json", cwd=tmp_path).stdout)[0]
    assert facts["rates"]["communications"] == pytest.approx(9.8337, rel=1e-4)


def test_light_commands_import_nothing_heavy():
    """--help, list and schema answer without torch, numba, scipy, pandas, cvxpy, networkx or pyplot."""
    code = (
        "import sys, contextlib, io\n"
        "from fedsim.cli import app\n"
        "for words in (['--help'], ['list'], ['schema']):\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        app(words, standalone_mode=False)\n"
        "heavy = {'torch', 'numba', 'scipy', 'pandas', 'cvxpy', 'matplotlib', 'networkx'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_long_study_runs_side_by_side_to_the_same_digest(tmp_path, monkeypatch):
    """Runs in processes of their own give the digests of runs one after another; one that fails is named."""
    import fedsim.side_by_side

    study = EVENTS | {"seeds": 3}
    alone = fedsim.run(study, folder=tmp_path / "alone")
    monkeypatch.setattr(fedsim.side_by_side, "LONG", 0.0)
    monkeypatch.setenv("FEDSIM_CORES", "2")
    together = fedsim.run(study, folder=tmp_path / "together")
    assert (together.status, together.digest) == ("finished", alone.digest)
    wild = EVENTS | {"schedule": {"horizon": 400}, "variants": {
        "fine": {}, "wild": {"algorithm": {"kind": "gossip_sgd", "step": 1e6}}, "also fine": {}}}  # fmt: skip
    with pytest.raises(Diverged, match=r"wild-seed0: .*step"):
        fedsim.run(wild, folder=tmp_path / "wild")
    assert [r.status for r in fedsim.load(tmp_path / "wild").runs] == ["finished", "failed", "finished"]


def test_results_are_never_overwritten(tmp_path):
    """A folder that holds results is refused, and a mistake in any variant is found before anything is played."""
    fedsim.run(EVENTS, folder=tmp_path / "run")
    with pytest.raises(InputError, match="holds the results of an earlier run"):
        fedsim.run(EVENTS, folder=tmp_path / "run")
    with pytest.raises(InputError, match="strong convexity"):
        fedsim.run(
            EVENTS | {"variants": {"a": {}, "b": {"problem": BATCHES["problem"] | {"l2": 0.0}}}}, folder=tmp_path / "s"
        )
    assert not (tmp_path / "s").exists()


def test_the_partition_is_drawn_beside_the_metrics(tmp_path):
    """A run on data leaves a picture of records per node and class; a run without data leaves none."""
    data = {"kind": "iris", "normalise": "columns"}
    given = {
        "name": "p",
        "topology": {"kind": "ring", "n": 4},
        "problem": {"kind": "multinomial", "l2": 0.1, "data": data, "partition": {"kind": "sorted"}},
        "algorithm": {"kind": "dadao"},
        "schedule": {"horizon": 1},
    }
    with_data = fedsim.run(given, folder=tmp_path / "data")
    assert [file.name for file in partition_of(with_data)] == ["partition.png", "partition.svg"]
    assert (tmp_path / "data" / "plots" / "partition.svg").read_text().count("setosa") > 0
    without = fedsim.run({**given, "problem": {"kind": "quadratic"}}, folder=tmp_path / "none")
    assert partition_of(without) == []


def test_variants_that_cost_the_same_are_not_called_cheaper(tmp_path):
    """Where all variants paid the same, no line claims a saving."""
    given = {
        "name": "tie",
        "topology": {"kind": "ring", "n": 4},
        "problem": {"kind": "quadratic"},
        "algorithm": {"kind": "dadao"},
        "schedule": {"horizon": 1},
        "variants": {"one": {}, "two": {"engine.player": "waves"}},
    }
    assert what_was_saved(fedsim.run(given, folder=tmp_path / "tie"), "distance", "communications", 1e9) == ""


def test_an_interrupted_study_is_read_and_resumed_to_its_own_digest(tmp_path):
    """Stopped in its second run of three: it can be loaded, the third waits, and resume ends all with one digest."""
    given = {**EVENTS, "seeds": 3}
    (tmp_path / "s.yaml").write_text(json.dumps(given))
    whole = fedsim.run(tmp_path / "s.yaml", folder=tmp_path / "whole")

    def stop(name, now, horizon, row):
        if name.endswith("1") and now == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedsim.run(tmp_path / "s.yaml", folder=tmp_path / "out", progress=stop)
    found = fedsim.load(tmp_path / "out")
    assert [run.status for run in found.runs] == ["finished", "interrupted", "waiting"]
    assert len(found.metrics) == 13 + 8
    assert fedsim.resume(tmp_path / "out").digest == whole.digest


def test_a_study_is_resumed_beyond_a_run_that_diverged(tmp_path):
    """What diverged stands as it is and is named again; the runs that were interrupted or waited are played."""
    wild = {"algorithm": {"kind": "gossip_sgd", "step": 1e6}, "schedule.horizon": 400}
    given = {**EVENTS, "variants": {"wild": wild, "cut": {}, "waits": {}}}

    def stop(name, now, horizon, row):
        if name.startswith("cut") and now == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedsim.run(given, folder=tmp_path / "out", progress=stop)
    assert [run.status for run in fedsim.load(tmp_path / "out").runs] == ["failed", "interrupted", "waiting"]
    played = set()
    for _ in range(2):  # the second time nothing is left to play
        with pytest.raises(Diverged, match=r"wild-seed0: .*diverges"):
            fedsim.resume(tmp_path / "out", progress=lambda name, *rest: played.add(name))
    assert played == {"cut-seed0", "waits-seed0"}
    assert [run.status for run in fedsim.load(tmp_path / "out").runs] == ["failed", "finished", "finished"]


def test_an_error_in_one_variant_leaves_the_others_to_be_played(tmp_path):
    """The study ends with the error itself; the table says that this was no divergence."""

    def trouble(name, now, horizon, row):
        if name.startswith("b-") and now == 3:
            raise ValueError("trouble of one's own")

    given = {**EVENTS, "variants": {"a": {}, "b": {}, "c": {}}}
    with pytest.raises(ValueError, match="trouble of one's own") as failure:
        fedsim.run(given, folder=tmp_path / "out", progress=trouble)
    assert failure.value.folder == tmp_path / "out"  # type: ignore[attr-defined]
    found = fedsim.load(tmp_path / "out")
    assert [run.status for run in found.runs] == ["finished", "failed", "finished"]
    assert any("1 of 3 runs failed by an error" in note for note in found.compare().attrs["notes"])
    assert fedsim.resume(tmp_path / "out").status == "finished"


def test_a_run_killed_at_any_moment_is_read_and_resumed(tmp_path, monkeypatch):
    """Whatever the disk held when the process died, the folder loads, and resume ends with the same digest.

    While the process lives the run is running; what it left behind was interrupted, on another host who knows.
    """
    from fedsim.results.journal import Journal

    seen = set()

    def keep(name):
        shutil.copytree(tmp_path / "run", tmp_path / "killed" / name)
        seen.add(fedsim.load(tmp_path / "run").status)

    begin = Journal.begin
    monkeypatch.setattr(Journal, "begin", lambda *given: (keep("before"), begin(*given))[1])
    whole = fedsim.run(EVENTS, folder=tmp_path / "run", progress=lambda name, now, *rest: keep(f"at {now:g}"))
    monkeypatch.setattr(Journal, "begin", begin)
    assert seen == {"waiting", "running"}
    for moment, rows in (("before", 0), ("at 0", 1), ("at 4", 5), ("at 12", 13)):
        found = fedsim.load(tmp_path / "killed" / moment)
        assert (found.status, len(found.metrics)) == ("waiting" if moment == "before" else "interrupted", rows)
        if moment != "before":
            with monkeypatch.context() as elsewhere:
                elsewhere.setattr("platform.node", lambda: "another host")
                assert found.status == "running"
        assert fedsim.resume(found.folder).digest == whole.digest


def test_a_full_disk_ends_the_run_with_a_readable_result(tmp_path, monkeypatch):
    """What was written stays readable, the run is marked failed in one sentence, and goes on once there is room."""
    whole, write = fedsim.run(EVENTS, folder=tmp_path / "whole"), Recorder._write

    def full(self, row):
        if row["time"] == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, row)

    monkeypatch.setattr(Recorder, "_write", full)
    with pytest.raises(fedsim.RunError, match="results cannot be written: No space left on device") as failure:
        fedsim.run(EVENTS, folder=tmp_path / "run")
    assert failure.value.folder == tmp_path / "run"
    found = fedsim.load(tmp_path / "run")
    assert (found.status, len(found.metrics)) == ("failed", 7)
    monkeypatch.setattr(Recorder, "_write", write)
    assert fedsim.resume(found.folder).digest == whole.digest


@pytest.mark.parametrize("scenario", [EVENTS, ROUNDS], ids=lambda s: s["name"])
def test_checkpoints_come_as_often_as_they_are_asked_for(tmp_path, monkeypatch, scenario):
    """Between two observations, too; a run that dies after one goes on from there to the same digest and metrics."""
    from fedsim.results.journal import Journal

    given = scenario | {"record": {"every": 6}, "checkpoint": {"every": 2}}
    whole, save, times = fedsim.run(given, folder=tmp_path / "whole"), Journal.checkpoint, []

    def checkpoint(self, arrays, wall):
        save(self, arrays, wall)
        times.append(float(arrays["now"] if "now" in arrays else arrays["round"][0]))
        if times[-1] == 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "checkpoint", checkpoint)
    with pytest.raises(KeyboardInterrupt):
        fedsim.run(given, folder=tmp_path / "run")
    assert times == [2, 4, 6, 8, 10]
    monkeypatch.setattr(Journal, "checkpoint", save)
    resumed = fedsim.resume(tmp_path / "run")
    assert resumed.digest == whole.digest
    assert resumed.metrics.drop(columns="wall_seconds").equals(whole.metrics.drop(columns="wall_seconds"))


@pytest.mark.parametrize("every", [0.7, 0.35, 1.9])
def test_checkpoints_go_on_where_a_multiple_is_rounded(tmp_path, monkeypatch, every):
    """3 times 0.7 divided by 0.7 is less than 3: the checkpoint after it is the fourth, not the same one for ever."""
    from fedsim.results.journal import Journal

    save, times = Journal.checkpoint, []

    def checkpoint(self, arrays, wall):
        save(self, arrays, wall)
        times.append(float(arrays["now"]))
        assert len(times) < 100

    monkeypatch.setattr(Journal, "checkpoint", checkpoint)
    fedsim.run(EVENTS | {"record": {"every": 12}, "checkpoint": {"every": every}}, folder=tmp_path / "run")
    assert times == [k * every for k in range(1, math.ceil(12 / every))]


def interrupted(given, folder):
    def stop(name, now, horizon, row):
        if now == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedsim.run(given, folder=folder, progress=stop)


def test_a_run_whose_scenario_code_or_data_changed_is_not_resumed(tmp_path):
    """It could not end as an uninterrupted one does: resume refuses by name, and goes on once the old one is back."""
    (tmp_path / "own.py").write_text(
        "from dataclasses import dataclass\nfrom fedsim.algorithms.dadao import DADAO\n\n\n"
        "@dataclass(frozen=True)\nclass Mine(DADAO):\n    pass\n"
    )
    (tmp_path / "lab.csv").write_text("a,b,y\n" + "".join(f"{k % 7},{k * k % 5},{k / 8}\n" for k in range(30)))
    problem = {"kind": "ridge", "l2": 1.0, "data": {"kind": "csv", "file": "lab.csv", "label": "y"}}
    given = EVENTS | {"algorithm": {"kind": "own.py:Mine"}, "problem": problem}
    (tmp_path / "s.yaml").write_text(json.dumps(given))
    interrupted(tmp_path / "s.yaml", tmp_path / "run")
    for file, words in (
        (tmp_path / "own.py", "own.py changed since the run began"),
        (tmp_path / "lab.csv", "lab.csv changed since the run began"),
        (tmp_path / "run" / "scenario.yaml", r"scenario.yaml \(its content\) changed"),
    ):
        before = file.read_text()
        file.write_text(before.replace("horizon: 12.0", "horizon: 14.0") if file.suffix == ".yaml" else before + "\n")
        with pytest.raises(InputError, match=words):
            fedsim.resume(tmp_path / "run")
        file.write_text(before)
    file = tmp_path / "run" / "scenario.yaml"
    file.write_text(file.read_text().replace("every: 1.0", "every: 2.0"))
    with pytest.raises(InputError, match="its record section"):
        fedsim.resume(tmp_path / "run")
    file.write_text(file.read_text().replace("every: 2.0", "every: 1.0"))
    assert fedsim.resume(tmp_path / "run").digest == fedsim.run(tmp_path / "s.yaml", folder=tmp_path / "whole").digest


def test_objects_are_not_in_the_folder_and_the_folder_says_so(tmp_path):
    """A run of objects is loaded and drawn like any other; what needs the objects again says which."""
    with pytest.raises(KeyboardInterrupt):
        fedsim.run(topology=nx.cycle_graph(12), problem=quadratic(), algorithm={"kind": "dadao"},
                   schedule={"horizon": 9}, folder=tmp_path / "run", progress=_stop)  # fmt: skip
    assert fedsim.load(tmp_path / "run").scenario.startswith("# topology, problem: given as objects from Python")
    with pytest.raises(InputError, match="topology, problem were objects from Python"):
        fedsim.resume(tmp_path / "run")


def _stop(*row):
    raise KeyboardInterrupt


def test_a_folder_is_played_by_one_process_at_a_time(tmp_path):
    """A resume of what is being played is refused: both would write the same files."""
    words = []

    def again(name, now, horizon, row):
        if now == 3:
            with pytest.raises(InputError) as refusal:
                fedsim.resume(tmp_path / "run")
            words.append(str(refusal.value))

    fedsim.run(EVENTS, folder=tmp_path / "run", progress=again)
    assert words == [f"{tmp_path / 'run'}: another process is playing this run"]


def test_sections_beside_a_file_override_its_own(tmp_path):
    """`fedsim.run("s.yaml", schedule=..., topology=...)` plays what it is told, not what the file had."""
    (tmp_path / "s.yaml").write_text(json.dumps(EVENTS))
    result = fedsim.run(
        tmp_path / "s.yaml", schedule={"horizon": 4}, topology={"kind": "path", "n": 5}, folder=tmp_path / "run"
    )
    assert result.metrics["time"].iloc[-1] == 4
    assert result.facts["topology"]["n"] == 5
    with pytest.raises(InputError, match=r"override: schedul: unknown|no section 'schedul'"):
        fedsim.run(tmp_path / "s.yaml", schedul={"horizon": 4}, folder=tmp_path / "no")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"algorithm": Tracking}, r"algorithm: the class Tracking given; a section .* or a Algorithm object"),
        ({"algorithm": "dadao"}, "algorithm: str given"),
        ({"problem": len}, "problem: builtin_function_or_method given"),
        ({"topology": np.ones((3, 3))}, "topology: ndarray given; a networkx graph"),
    ],
)
def test_what_is_no_object_of_the_kind_is_refused(tmp_path, given, message):
    """A class in place of an object, a name, a function, an array: each is told what is needed."""
    with pytest.raises(InputError, match=message):
        fedsim.run(**(EVENTS | given), folder=tmp_path / "run")


def test_a_folder_that_cannot_be_used_is_refused_before_anything_is_played(tmp_path):
    """A file in place of the folder, or of one above it, is a mistake in the input."""
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(InputError, match=r"is no folder; results need one|cannot be used"):
            fedsim.run(EVENTS, folder=folder)


def test_mistakes_of_all_variants_come_in_one_report(tmp_path):
    """What only building finds is looked for in every variant before the report is given."""
    given = EVENTS | {"variants": {
        "a": {}, "b": {"topology": {"kind": "ring", "n": 1}}, "c": {"topology": {"file": "none.gml"}}}}  # fmt: skip
    for ask in (fedsim.check, lambda s: fedsim.run(s, folder=tmp_path / "run")):
        with pytest.raises(
            InputError, match=r"2 mistakes, nothing was run:\n.*at least 3, got 1\n.*no file 'none.gml'"
        ):
            ask(given)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="'distanc' is unknown"):
        fedsim.check(EVENTS | {"record": {"metrics": ["distanc"]}})


def test_a_failed_run_prints_its_object_and_its_folder(tmp_path):
    """`--json` gives one object whose status is failed; the message says where, when, and what likely caused it."""
    (tmp_path / "s.yaml").write_text(json.dumps(EVENTS | {"schedule": {"horizon": 400}}))
    done = cli("run", "s.yaml", "algorithm={kind: gossip_sgd, step: 1e6}", "--folder", "out", "--json", cwd=tmp_path)
    assert done.returncode == 1
    summary = json.loads(done.stdout)
    assert (summary["folder"], summary["status"], summary["digest"]) == ("out", "failed", None)
    assert re.search(
        r"distance is \S+ at time \d+ \(\d+ gradients, \d+ communications\): the run diverges", done.stderr
    )
    assert "results  out" in done.stderr


def test_the_bar_shows_what_playing_alone_took():
    """Events per second are those of the run itself, also where another process played it; metrics follow."""
    from fedsim.progress import _facts

    row = {"time": 5.0, "distance": 0.5, "loss": 2.0, "gradients": 300, "dual_gradients": 0, "communications": 700}
    shown = "t=5  500 events/s  distance 5.00e-01  loss 2.00e+00"
    assert _facts(5.0, row | {"wall_seconds": 2.0}) == shown
    assert "events/s" not in _facts(0.0, row | {"wall_seconds": 0.0})


@pytest.mark.parametrize(
    ("change", "spent"),
    [
        ({}, {"gradients": 72.0, "communications": 66.0}),
        ({"algorithm": {"kind": "continuized"}}, {"dual_gradients": 132.0, "communications": 66.0}),
        ({"algorithm": {"kind": "randomised_gossip"}}, {"gradients": 0.0, "communications": 66.0}),
        ({"algorithm": {"kind": "gossip_sgd", "step": 0.1}}, {"gradients": 72.0, "communications": 66.0}),
    ],
)
def test_check_tells_what_the_schedule_is_expected_to_cost(change, spent):
    """Over the horizon: n gradients a unit of time, or two dual ones an exchange, and exchanges as the rates say."""
    given = EVENTS | {"topology": {"kind": "path", "n": 6}, "rates": {"kind": "uniform", "scale": "none", "caps": 5.5}}
    found = fedsim.check(given | change)[0]["schedule"]
    assert found == pytest.approx({"horizon": 12.0, **spent})


def test_a_bound_is_rate_only_where_the_way_of_playing_breaks_it(tmp_path):
    """Real clocks and observations as of the last event are no part of the theorem, whatever the algorithm says."""
    for change, word in (
        ({"record": {"output": "lazy"}}, "lazy"),
        ({"schedule": {"kind": "live", "horizon": 1}}, "clocks"),
    ):
        facts = fedsim.check(EVENTS | change)[0]
        assert word in facts["guarantee"]["broken"][0]
    for precision in (0, -1, 1, float("nan")):
        with pytest.raises(InputError, match="a number between 0 and 1"):
            fedsim.check(EVENTS, precision=precision)


def test_a_run_that_ends_far_away_is_finished_and_says_so(tmp_path):
    """A step that is too long for so few rounds leaves finite numbers; the result's notes tell a reader."""
    given = {
        "topology": {"kind": "ring", "n": 4},
        "problem": {"kind": "quadratic", "dim": 3},
        "schedule": {"horizon": 12},
    }
    notes = []
    for eta in (0.1, 10.0):
        scenario = {**given, "algorithm": {"kind": "dpsgd", "eta": eta, "batch": None}}
        notes.append(fedsim.run(scenario, folder=tmp_path / str(eta)).facts["notes"])
    assert notes[0] == []
    assert re.fullmatch(r"distance ends at \S+ and began at \S+: the run diverges", notes[1][-1])
