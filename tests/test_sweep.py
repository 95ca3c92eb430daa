"""Sweeps: cells equal lone runs, are kept, go on after a kill; variants are tuned on seeds of their own."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import fedsim
from fedsim.cli import app
from fedsim.errors import InputError
from fedsim.scenario import load_study
from fedsim.side_by_side import lay_out, play_folder
from fedsim.sweeping import counts, numbered

BASE = {
    "name": "swept",
    "topology": {"kind": "ring", "n": 6},
    "problem": {"kind": "logistic", "data": {"kind": "breast_cancer"}, "l2": 0.1},
    "algorithm": {"kind": "dpsgd", "eta": 0.1},
    "schedule": {"horizon": 12},
    "record": {"every": 4},
}
GRID = BASE | {"sweep": {"algorithm.eta": [0.05, 0.5, 1e40]}}
TUNED = BASE | {
    "seeds": [0, 1],
    "variants": {"D-PSGD": {}, "tracking": {"algorithm.kind": "gradient_tracking"}},
    "sweep": {"algorithm.eta": [0.02, 0.2, 2.0]},
    "select": {"metric": "loss", "seeds": [7, 8, 9]},
}


@pytest.fixture(autouse=True)
def one_worker(monkeypatch):
    """Workers take seconds to import; the tests that are about several ask for them."""
    monkeypatch.setenv("FEDSIM_CORES", "1")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The tuned study, played once."""
    return fedsim.sweep(TUNED, folder=tmp_path_factory.mktemp("tuned") / "out")


def times(study):
    return {run.folder.name: (run.folder / "run.json").stat().st_mtime_ns for run in study.runs}


def test_a_cell_equals_the_lone_run_with_its_values(tmp_path):
    """Every cell has the digest of `fedsim run` with the same overrides; the cell that diverges is a result, too."""
    study = fedsim.sweep(GRID, folder=tmp_path / "sweep")
    assert [run.variant for run in study.runs] == ["eta=0.05", "eta=0.5", "eta=1e+40"]
    assert [run.facts["cell"] for run in study.runs] == [{"algorithm.eta": eta} for eta in (0.05, 0.5, 1e40)]
    for run, eta in zip(study.runs[:2], (0.05, 0.5), strict=True):
        alone = fedsim.run(BASE, overrides={"algorithm.eta": eta}, folder=tmp_path / f"alone{eta}")
        assert run.digest == alone.digest
    assert study.runs[2].status == "failed"
    assert study.runs[2].facts["diverged"]
    assert counts(study) == "3 cells: 2 finished, 1 diverged"


def test_what_has_ended_is_kept_and_only_what_is_new_is_played(tmp_path):
    """Called again, no run is touched; with a value more, that one alone is played; with other metrics, all are."""
    first = times(fedsim.sweep(GRID, folder=tmp_path))
    assert times(fedsim.sweep(GRID, folder=tmp_path)) == first
    wider = times(fedsim.sweep(GRID, overrides={"sweep.algorithm.eta": [0.05, 0.5, 0.1]}, folder=tmp_path))
    kept = {name: stamp for name, stamp in first.items() if "eta-1e40" not in name}
    assert {name: wider[name] for name in kept} == kept
    assert len(wider) == 3
    other = times(fedsim.sweep(GRID, overrides={"record.every": 2}, folder=tmp_path))
    assert not set(other) & set(first)


def test_content_decides_what_is_the_same(tmp_path):
    """Keys differ with anything that results depend on, a data file's content included, and with nothing else."""
    (tmp_path / "data.csv").write_text("a,b,y\n1,2,3\n3,1,2\n2,2,1\n1,5,2\n")
    own = BASE | {"problem": {"kind": "least_squares", "data": {"kind": "csv", "file": "data.csv", "label": "y"}}}
    own |= {"topology": {"kind": "path", "n": 2}}
    key = lambda *overrides: load_study(own, overrides=overrides, base=tmp_path).runs[0].key()
    same = key()
    assert all(key(o) == same for o in ("engine.block=2", "engine.transport=local", "claim=x", "checkpoint.every=2"))
    changed = [key(o) for o in ("seed=1", "algorithm.eta=0.2", "record.every=2", "stop.gradients=9", "data_seed=3")]
    (tmp_path / "data.csv").write_text("a,b,y\n1,2,3\n3,1,2\n2,2,1\n1,5,3\n")
    assert len({same, key(), *changed}) == 7


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_ends_equal_to_an_unbroken_one(tmp_path, monkeypatch):
    """After SIGKILL in the middle, the same command (and `fedsim resume`) ends with the digest of an unbroken sweep."""
    monkeypatch.setenv("FEDSIM_CORES", "2")
    scenario = TUNED | {"schedule": {"horizon": 400}, "checkpoint": {"every": 20}}
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(scenario))
    whole = fedsim.sweep(file, folder=tmp_path / "whole")
    command = [sys.executable, "-m", "fedsim", "sweep", str(file), "--folder", str(tmp_path / "broken"), "--no-plot"]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    tuning = tmp_path / "broken" / "tuning"
    until = time.monotonic() + 120
    while time.monotonic() < until and not [*tuning.glob("*/metrics.parquet")]:
        time.sleep(0.02)
    job.kill()
    job.wait()
    ended = [f for f in tuning.glob("*/run.json") if json.loads(f.read_text())["status"] == "finished"]
    assert 0 < len(ended) < 18
    result = fedsim.resume(tmp_path / "broken")
    assert result.digest == whole.digest
    assert result.digest is not None
    assert result.facts["select"] == whole.facts["select"]


@pytest.mark.slow
def test_a_process_that_dies_fails_its_cell_alone_and_is_tried_again(tmp_path, monkeypatch):
    """A cell whose process is killed is failed, the others end, and the next call plays it again."""
    monkeypatch.setenv("FEDSIM_CORES", "2")
    (tmp_path / "own.py").write_text(
        "import os, pathlib\nfrom dataclasses import dataclass\nfrom fedsim.algorithms.sgd import DPSGD\n\n"
        "@dataclass(frozen=True)\nclass Dies(DPSGD):\n"
        "    async def round(self, state, k, oracle, draws):\n"
        f"        if self.eta == 0.3 and not pathlib.Path({str(tmp_path / 'once')!r}).exists():\n"
        f"            pathlib.Path({str(tmp_path / 'once')!r}).touch()\n"
        "            os.kill(os.getpid(), 9)\n"
        "        return await super().round(state, k, oracle, draws)\n"
    )
    file = tmp_path / "s.yaml"
    scenario = BASE | {"algorithm": {"kind": "own.py:Dies"}, "sweep": {"algorithm.eta": [0.1, 0.3, 0.2]}}
    file.write_text(yaml.safe_dump(scenario))
    first = fedsim.sweep(file, folder=tmp_path / "out")
    assert [run.status for run in first.runs] == ["finished", "failed", "finished"]
    assert first.runs[1].facts["error"] == "its process ended with code -9"
    again = fedsim.sweep(file, folder=tmp_path / "out")
    assert [run.status for run in again.runs] == ["finished"] * 3


def test_an_error_in_ones_own_code_is_kept_with_its_traceback(tmp_path):
    """An exception that is not fedsim's fails its cell, and `run.json` says where it came from."""
    (tmp_path / "own.py").write_text(
        "from dataclasses import dataclass\nfrom fedsim.algorithms.sgd import DPSGD\n\n"
        "@dataclass(frozen=True)\nclass Breaks(DPSGD):\n"
        "    async def round(self, state, k, oracle, draws):\n"
        "        if self.eta > 0.2:\n            raise KeyError('my mistake')\n"
        "        return await super().round(state, k, oracle, draws)\n"
    )
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(BASE | {"algorithm": {"kind": "own.py:Breaks"}}))
    study = fedsim.sweep(tmp_path / "s.yaml", overrides={"sweep.algorithm.eta": [0.1, 0.3]}, folder=tmp_path / "out")
    assert [run.status for run in study.runs] == ["finished", "failed"]
    assert study.runs[1].facts["error"] == "KeyError: 'my mistake'"
    assert any("own.py" in line for line in study.runs[1].facts["traceback"])


def test_variants_are_picked_on_tuning_seeds_and_report_on_others(tuned):
    """The choice is the smallest median over the tuning runs; reporting runs have the picked cell and other seeds."""
    study, tuning = tuned, fedsim.load(tuned.folder / "tuning")
    assert {run.seed for run in tuning.runs} == {7, 8, 9}
    assert [(run.variant, run.seed) for run in study.runs] == [
        ("D-PSGD", 0),
        ("D-PSGD", 1),
        ("tracking", 0),
        ("tracking", 1),
    ]
    last = tuning.metrics.groupby(["variant", "seed"], sort=False)["loss"].last()
    for choice in study.facts["select"]["choices"]:
        medians = {}
        for eta in (0.02, 0.2, 2.0):
            name = f"{choice['variant']}, eta={eta:g}"
            medians[eta] = sorted(last[name, seed] for seed in (7, 8, 9))[1]
        best = min(medians, key=medians.get)
        assert choice["cell"] == {"algorithm.eta": best}
        assert choice["value"] == medians[best]
        assert (choice["cells"], choice["failed"]) == (3, 0)
        assert bool(choice["edges"]) == (best != 0.2)
        runs = [run for run in study.runs if run.variant == choice["variant"]]
        assert all(run.facts["cell"] == choice["cell"] for run in runs)


def test_selection_cannot_see_reporting_seeds(tuned, tmp_path):
    """With other reporting seeds the choice is the same, value for value."""
    other = fedsim.sweep(TUNED | {"seeds": [40, 41, 42]}, folder=tmp_path)
    assert tuned.facts["select"] == other.facts["select"]
    assert {run.seed for run in other.runs} == {40, 41, 42}


@pytest.mark.slow
def test_selection_by_what_was_spent_and_by_the_highest(tmp_path):
    """`at` takes the last value observed within the amount; a metric where more is better is maximised."""
    early = TUNED | {"select": {"metric": "loss", "seeds": 2, "at": {"gradients": 30}}}
    study = fedsim.sweep(early, folder=tmp_path / "a")
    tuning = fedsim.load(tmp_path / "a/tuning")
    assert {run.seed for run in tuning.runs} == {2, 3}
    for choice in study.facts["select"]["choices"]:
        name = f"{choice['variant']}, eta={choice['cell']['algorithm.eta']:g}"
        frame = tuning.metrics[(tuning.metrics["variant"] == name) & (tuning.metrics["gradients"] <= 30)]
        assert choice["value"] == frame.groupby("seed")["loss"].last().median()
    worst = fedsim.sweep(
        TUNED | {"select": {"metric": "loss", "best": "highest", "seeds": [7, 8, 9]}}, folder=tmp_path / "c"
    )
    for low, high in zip(study.facts["select"]["choices"], worst.facts["select"]["choices"], strict=True):
        assert high["value"] > low["value"]


def test_diverged_cells_are_never_picked(tmp_path):
    """A cell that diverges on one tuning seed of one does not win, and is counted."""
    scenario = TUNED | {"sweep": {"algorithm.eta": [1e40, 0.2]}, "select": {"metric": "loss", "seeds": [7]}}
    study = fedsim.sweep(scenario, folder=tmp_path)
    assert [c["cell"] for c in study.facts["select"]["choices"]] == [{"algorithm.eta": 0.2}] * 2
    assert [c["failed"] for c in study.facts["select"]["choices"]] == [1, 1]


def test_cells_one_by_one_as_an_array_job_plays_them(tuned, tmp_path):
    """`--cells` numbers them, `--cell I` plays one; reporting cells wait for tuning; the end is that of one call."""
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(TUNED))
    run = lambda *more: CliRunner().invoke(app, ["sweep", str(tmp_path / "s.yaml"), *more])
    assert run("--cells").output == "tuning 0-17\nreporting 18-21\n"
    folder = ("--folder", str(tmp_path / "out"))
    early = run("--cell", "18", *folder)
    assert isinstance(early.exception, InputError)
    assert "of the tuning, cells 0, 1, 2" in str(early.exception)
    assert "there are cells 0 to 21" in str(run("--cell", "22", *folder).exception)
    begun = fedsim.load(tmp_path / "out")
    assert (begun.status, begun.runs, list(begun.metrics)) == ("waiting", [], ["variant", "seed"])
    for cell in range(22):
        result = run("--cell", str(cell), "--json", *folder)
        facts = json.loads(result.output)
        assert (facts["number"], facts["status"]) == (cell, "finished")
    assert fedsim.load(tmp_path / "out").digest == tuned.digest


def test_private_tuning_is_charged_to_the_study(tmp_path):
    """The study's epsilon covers the tuning runs: trying values on the data spends its privacy, too."""
    private = {
        "name": "private",
        "topology": {"kind": "server", "n": 4},
        "problem": {"kind": "logistic", "data": {"kind": "breast_cancer"}, "l2": 0.1},
        "algorithm": {"kind": "dp_gd", "clip_grad": 1.0},
        "privacy": {"epsilon": 2.0, "delta": 1e-5},
        "schedule": {"horizon": 4},
        "select": {"metric": "loss", "seeds": [5]},
        "sweep": {"algorithm.eta": [0.1, 0.5]},
    }
    study = fedsim.sweep(private, folder=tmp_path)
    assert study.facts["privacy"]["runs"] == 3
    alone = study.runs[0].metrics["epsilon"].iloc[-1]
    assert study.facts["privacy"]["epsilon"] > 1.5 * alone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select": {"metric": "loss", "seeds": [1, 2]}}, "[1] are reporting seeds too"),
        ({"select": {"metric": "loss", "seeds": []}}, "at least one seed, and each once"),
        ({"select": {"metric": "loss", "seeds": [5, 5]}}, "at least one seed, and each once"),
        ({"select": {"metric": "loss"}}, "select.seeds: this key is missing"),
        ({"select": {"metric": "loss", "seeds": 1, "at": {"bits": 3}}}, "{'bits': 3.0} given; end, or one of"),
        ({"select": {"metric": "loss", "seeds": 1, "bst": 3}}, "select.bst: unknown key (did you mean 'best'?)"),
        ({"select": "loss"}, "metric and seeds are needed"),
        ({"sweep": None}, "nothing to select from"),
        ({"sweep": [1, 2]}, "dotted keys with lists of values are needed"),
        ({"sweep": {"seeds": [1, 2]}}, "sweep.seeds: cannot be swept"),
        ({"sweep": {"algoritm.eta": [1, 2]}}, "no section 'algoritm' (did you mean 'algorithm'?)"),
        ({"sweep": {"algorithm.etta": [1, 2]}}, "algorithm.etta: unknown key (did you mean 'eta'?)"),
        (
            {"variants": {"A": {}, "B": {"sweep": {"algorithm.eta": [0.1]}}}},
            "different numbers of cells (A: 3, B: 1); give each as many, or say why in select.unequal",
        ),
    ],
)
def test_mistakes_of_a_sweep_are_refused_before_anything_runs(tmp_path, changes, message):
    """Unfair tuning, wrong keys and empty grids are named, and nothing is left behind."""
    with pytest.raises(InputError) as error:
        fedsim.sweep({k: v for k, v in (TUNED | changes).items() if v is not None}, folder=tmp_path / "out")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_unequal_grids_need_words_that_stay(tmp_path):
    """With the reason given, variants may have different numbers of cells; the reason stands in the study."""
    why = "B has no step size of its own"
    select = {"metric": "loss", "seeds": [7], "unequal": why}
    variants = {"A": {}, "B": {"sweep": {"algorithm.eta": [0.1]}}}
    study = fedsim.sweep(TUNED | {"variants": variants, "select": select}, folder=tmp_path)
    assert study.facts["select"]["unequal"] == why
    assert [c["cells"] for c in study.facts["select"]["choices"]] == [3, 1]


def test_refusals_of_folders_objects_and_hopeless_grids(tmp_path):
    """A folder of something else, live objects, no axes, and a variant none of whose cells can run are refused."""
    fedsim.run(BASE, folder=tmp_path / "run")
    with pytest.raises(InputError, match="no sweep; give another folder"):
        fedsim.sweep(GRID, folder=tmp_path / "run")
    with pytest.raises(InputError, match="nothing to sweep: give KEY=a,b,c"):
        fedsim.sweep(BASE, folder=tmp_path / "none")
    hopeless = GRID | {"problem": BASE["problem"] | {"data": {"kind": "digits"}}}
    with pytest.raises(InputError, match="multiclass"):
        fedsim.sweep(hopeless, folder=tmp_path / "hopeless")
    assert not (tmp_path / "hopeless").exists()


def test_run_plays_a_scenario_with_a_sweep_too(tmp_path):
    """`fedsim run` of a scenario with `sweep:` gives the same as `fedsim sweep`, and numbers its cells alike."""
    swept = fedsim.sweep(GRID, folder=tmp_path / "a")
    assert fedsim.run(GRID, folder=tmp_path / "b").facts["runs"] == swept.facts["runs"]
    assert numbered(load_study(GRID)) == {"cells": (0, 2)}


def test_a_pick_that_reports_one_run_prints_it(tmp_path):
    """One variant on one seed: the command ends with the run's last row."""
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(BASE | {"sweep": {"algorithm.eta": [0.1, 0.2]}, "select": TUNED["select"]}))
    done = CliRunner().invoke(app, ["sweep", str(file), "--folder", str(tmp_path / "out"), "--no-plot"])
    assert done.exit_code == 0, done.exception
    assert "round=12" in done.stdout


def test_a_cell_that_another_process_resumes_is_waited_for(tmp_path):
    """A cell held by `fedsim resume CELL` is not noted as refused, which would keep it from ever being played."""
    (run,) = load_study(BASE).runs
    lay_out(run, tmp_path / "cell")
    held = os.open(tmp_path / "cell", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Timer(0.3, os.close, [held]).start()
    play_folder(tmp_path / "cell")
    assert fedsim.load(tmp_path / "cell").status == "finished"


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_leaves_a_sweep_that_goes_on(tmp_path, number):
    """Ctrl-C and a scheduler's SIGTERM end the workers at a checkpoint, none is left, and --json says what there is."""
    scenario = GRID | {
        "schedule": {"horizon": 2_000_000},
        "record": {"every": 100},
        "sweep": {"algorithm.eta": [0.1, 0.2]},
        "select": {"metric": "loss", "seeds": [7]},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(scenario))
    # A shell has its jobs in the background ignore Ctrl-C: this one hears it wherever the tests are run.
    heard = "import signal as s; s.signal(s.SIGINT, s.default_int_handler); from fedsim.cli import main; main()"
    command = [sys.executable, "-c", heard, "sweep", "s.yaml", "--folder", str(tmp_path / "out"), "--json"]
    with (tmp_path / "said").open("w") as said:
        job = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=said)
    until = time.monotonic() + 120
    while time.monotonic() < until and not [*tmp_path.glob("out/tuning/*/metrics.arrows")]:
        time.sleep(0.02)
    time.sleep(0.5)
    os.kill(job.pid, number)
    printed, _ = job.communicate(timeout=60)
    assert (job.returncode, json.loads(printed)["status"]) == (1, "interrupted")
    assert f"`fedsim resume {tmp_path / 'out'}` goes on" in (tmp_path / "said").read_text()
    study = fedsim.load(tmp_path / "out" / "tuning")
    states = [run.status for run in study.runs]
    assert "interrupted" in states
    assert all((run.folder / "checkpoint").exists() for run in study.runs if run.status == "interrupted")


SBATCH = """#!/usr/bin/env bash
# Plays the tasks of an array at once, in this process.
for a in "$@"; do case "$a" in
  --array=*) r="${a#--array=}"; r="${r%%%*}" ;;
  --wrap) wrapped=1 ;;
  --*) ;;
  *) if [[ "${wrapped:-}" == 1 ]]; then bash -c "$a" > /dev/null; exit; fi; rest+=("$a") ;;
esac; done
for ((i = ${r%-*}; i <= ${r#*-}; i++)); do SLURM_ARRAY_TASK_ID=$i bash "${rest[@]}" > /dev/null; done
echo 17
"""


@pytest.mark.slow
def test_the_array_script_plays_a_whole_study(tuned, tmp_path):
    """`launch/slurm-array.sh` submits tuning, reporting and the end, in this order, to the digest of one call."""
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(TUNED))
    script = Path(__file__).parents[1] / "launch" / "slurm-array.sh"
    paths = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [str(script), "s.yaml", "--folder", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["tuning: job 17, cells 0-17", "reporting: job 17, cells 18-21"]
    assert fedsim.load(tmp_path / "out").digest == tuned.digest
