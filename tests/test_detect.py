"""The launcher is found from the environment; what does not fit is told."""

import sys

import pytest

from fedsim import doctor, doctor_jobs
from fedsim.errors import InputError
from fedsim.launchers import probe
from fedsim.transport.detect import _refuse_strangers, choose, connect, found

TORCH = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "3", "PMIX_RANK": "0"}
ENVIRONMENTS = [
    ("alone", {}, {}, "local"),
    ("Open MPI", OPEN_MPI, {"mpi": 3}, "mpi"),
    ("MPICH, Intel MPI", {"PMI_RANK": "0", "PMI_SIZE": "2"}, {"mpi": 2}, "mpi"),
    ("srun", {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8", "PMIX_RANK": "0"}, {"mpi": 8}, "mpi"),
    ("srun of one task", {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, {}, "local"),
    ("a batch script", {"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, {}, "local"),
    ("torchrun", TORCH, {"torch": 4}, "torch"),
    ("torchrun under mpirun", {**TORCH, **OPEN_MPI}, {"torch": 4, "mpi": 3}, "torch"),
]


@pytest.mark.parametrize(
    ("environment", "launchers", "kind"), [e[1:] for e in ENVIRONMENTS], ids=[e[0] for e in ENVIRONMENTS]
)
def test_launchers_are_found(environment, launchers, kind):
    """Each launcher is known by what it sets; torchrun, the innermost, comes before MPI."""
    assert found(environment) == launchers
    assert choose("auto", environment) == kind


def test_a_transport_can_be_forced_but_not_invented():
    """`engine.transport` chooses among the launchers that are there; local is always there."""
    assert choose("mpi", {**TORCH, **OPEN_MPI}) == "mpi"
    assert choose("local", TORCH) == "local"
    with pytest.raises(InputError, match="mpirun -n N fedsim"):
        choose("mpi", TORCH)


def test_which_of_two_launchers_won_is_told(monkeypatch, capsys):
    """Two launchers in the environment: one line says which is used."""
    for name, value in {**TORCH, **OPEN_MPI}.items():
        monkeypatch.setenv(name, value)
    assert connect("local").size == 1
    assert "both torchrun and MPI are present; neither is used" in capsys.readouterr().err


def test_processes_that_mpi_does_not_connect_are_refused():
    """A launcher of another MPI starts processes that each see one: none of them plays the whole job."""
    _refuse_strangers(2, 2)
    _refuse_strangers(1, 1)
    with pytest.raises(InputError, match=r"started 4 processes.*connects none.*fedsim doctor"):
        _refuse_strangers(1, 4)


def test_doctor_names_the_launcher_that_fits():
    """A launcher that does not fit, found before one that does, is a problem; with none that fits, its fix is told."""
    wrong = doctor_jobs.Launcher("/a/mpirun", "MPI A", 1, "export MPI4PY_MPIABI=mpich")
    right = doctor_jobs.Launcher("/b/mpiexec", "MPI B", 2, None)
    assert doctor_jobs._verdict([right, wrong], "B") == []
    assert doctor_jobs._verdict([wrong, right], "B") == [
        "/a/mpirun does not fit the MPI that mpi4py loads (B): start jobs with /b/mpiexec"
    ]
    assert "export MPI4PY_MPIABI=mpich (then /a/mpirun fits)" in doctor_jobs._verdict([wrong], "B")[0]
    assert "pip install 'fedsim[mpi]'" in doctor_jobs._verdict([], "B")[0]


def test_doctor_says_when_there_is_no_mpi(monkeypatch):
    """Without an MPI that mpi4py finds, torchrun is still measured, and the installation is told."""
    monkeypatch.setattr(doctor_jobs, "LIBRARY", "raise SystemExit(1)")
    monkeypatch.setattr(
        doctor_jobs, "_measured", lambda kind, problems: {"small": 1e-6, "large": 1e-3, "all_to_all": 1e-4}
    )
    facts = doctor_jobs.examine_jobs()
    assert facts["mpi"] is None
    assert "mpi4py finds no MPI" in facts["problems"][0]
    assert any(line.startswith("  torchrun") for line in doctor_jobs.report_jobs(facts))


def test_doctor_says_when_cvxpy_cannot_be_loaded(monkeypatch):
    """A package that cvxpy needs is missing: that is a line of the report, and the others are still told."""
    monkeypatch.setattr(doctor_jobs, "examine_jobs", lambda: {"mpi": None, "torch": None, "problems": []})
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    facts = doctor.examine()
    assert facts["solvers"] == []
    assert any("cvxpy cannot be loaded" in text for text in facts["problems"])
    assert facts["versions"]["torch"]


@pytest.mark.slow
def test_doctor_measures_this_machine():
    """Two processes under each launcher exchange bytes, which are checked, and the times are printed."""
    facts = doctor_jobs.examine_jobs()
    assert facts["torch"]["processes"] == 2
    assert facts["mpi"] is None or facts["mpi"]["small"] > 0
    assert any(line.startswith("  torchrun") for line in doctor_jobs.report_jobs(facts))


@pytest.mark.parametrize(
    ("said", "seen"), [("processes 2\nprocesses \n", 2), ("processes processes 1\n1\n", 1), ("processes \n", None)]
)
def test_a_launcher_may_mix_what_its_processes_say(tmp_path, said, seen):
    """However two processes' words come out of the launcher, it is told how many see each other."""
    launcher = tmp_path / "mpirun"
    launcher.write_text(f"#!/bin/sh\ncat <<'END'\n{said}END\n")
    launcher.chmod(0o755)
    assert probe((str(launcher),)) == seen
