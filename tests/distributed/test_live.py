"""Real clocks: what runs live replays to the bit, keeps what the flow conserves, and resumes."""

import json
import socket
import threading
import time

import numpy as np
import pytest
from launching import launch, needs_mpi

import fedsim
from fedsim.errors import InputError, RunError
from fedsim.live import shared
from fedsim.live.mesh import FRAME, OFFER, Frame, Mesh
from fedsim.live.moves import APPLY
from fedsim.live.shared import LINE, SHORT, share
from fedsim.live.trace import FOLDER
from fedsim.replay import replay

LIVE = {
    "name": "live",
    "topology": {"kind": "ring", "n": 7},
    "problem": {"kind": "ridge", "l2": 0.5, "data": {"kind": "diabetes", "normalise": "columns"}},
    "start": {"kind": "normal"},
    "algorithm": {"kind": "dadao"},
    "schedule": {"kind": "live", "horizon": 60},
    "record": {"every": 15},
    "checkpoint": {"every": 30},
    "engine": {"gradient_seconds": 0.002, "timeout": 60},
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(json.dumps(LIVE))
    return tmp_path / "s.yaml"


ALGORITHMS = {
    "dadao": [],
    "a2cid2": ["algorithm={kind: a2cid2, step: 0.02, momentum: 0.5, batch: {size: 4}}"],
    "gossip_sgd": ["algorithm={kind: gossip_sgd, step: 0.02, batch: {size: 3, kind: epoch}}"],
    "averaging": ["algorithm.kind=randomised_gossip", "problem={kind: consensus, dim: 4}", "schedule.unit=0.002"],
    "network": [
        "problem={kind: module, model: mlp, hidden: [5], data: {kind: iris, normalise: columns}}",
        "algorithm={kind: gossip_sgd, step: 0.02, batch: {size: 3}}",
        "start={kind: problem}",
    ],
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("dadao", "averaging") else pytest.mark.slow) for name in ALGORITHMS],
)
def test_one_process_replays_to_the_bit(file, name):
    """A live run of one process (its nodes still meet by offers) has the digest of its replay, costs included."""
    result = fedsim.run(file, overrides=ALGORITHMS[name], folder="out")
    found = replay(result.folder)
    assert found["same"]
    assert found["digest"] == result.digest
    assert found["totals"]["communications"] > 0


@pytest.mark.parametrize("kind", [pytest.param("mpi", marks=[needs_mpi, pytest.mark.slow]), "torch"])
def test_ranks_replay_to_the_bit(file, kind):
    """Three ranks on real clocks: the merged trace gives the same state in one process; achieved rates are told."""
    done = launch(kind, 3, "run", file, "--json", "--folder", "out", cwd=file.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    found = launch("local", 1, "replay", "out", "--json", cwd=file.parent)
    assert found.returncode == 0, found.stderr + found.stdout
    printed = json.loads(found.stdout)
    assert printed["digest"] == json.loads(done.stdout)["digest"]
    live = fedsim.load(file.parent / "out").facts["live"]
    assert live["ranks"] == 3
    assert 0.5 < live["achieved"] < 1.5
    assert sum(edge[3] for edge in live["edges"]) == printed["totals"]["communications"]


def test_a_changed_trace_is_noticed(file):
    """A gradient applied a thousandth later: another state, exit code 1; one message misnamed: a torn trace."""
    result = fedsim.run(file, folder="out")
    place = sorted((result.folder / FOLDER).glob("*.npz"))[1]
    with np.load(place) as part:
        arrays = {name: part[name].copy() for name in part.files}
    arrays["time"][np.argmax(arrays["kind"] == APPLY)] += 1e-3
    np.savez(place, **arrays)
    assert not replay(result.folder)["same"]
    done = launch("local", 1, "replay", "out", cwd=file.parent)
    assert done.returncode == 1
    arrays["number"][arrays["kind"] == 2] += 1
    np.savez(place, **arrays)
    with pytest.raises(RunError, match="torn"):
        replay(result.folder)


@needs_mpi
def test_long_messages_lie_in_memory_that_ranks_share_and_replay_to_the_bit(file):
    """Messages of 40 kB between three ranks of a host go through shared memory, no file of which is left; same bits."""
    start = ["algorithm.kind=accelerated_gossip", "problem={kind: consensus, dim: 5000}", "start={kind: problem}"]
    before = set(shared.FOLDER.glob("fedsim-*"))
    start += ["schedule.unit=0.01", "--json", "--folder", "out"]
    done = launch("mpi", 3, "run", file, *start, cwd=file.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    live = fedsim.load(file.parent / "out").facts["live"]
    assert live["shared_edges"] == 4  # nodes lie in an order of small bandwidth: two edges cross either border
    assert set(shared.FOLDER.glob("fedsim-*")) <= before
    found = replay(file.parent / "out")
    assert found["same"]
    assert found["digest"] == json.loads(done.stdout)["digest"]


class Ranks:
    """A rank among threads: gathers what all of them give."""

    def __init__(self, rank, barrier, given):
        self.rank, self._barrier, self._given = rank, barrier, given

    def all_gather(self, mine):
        self._given[self.rank] = mine
        self._barrier.wait(20)
        parts = [self._given[rank] for rank in sorted(self._given)]
        self._barrier.wait(20)
        return parts


def shared_by_two(dim):
    """Return what two ranks share for edges 4 and 9, by rank."""
    barrier, given, found = threading.Barrier(2), {}, {}

    def play(rank):
        found[rank] = share(Ranks(rank, barrier, given), {1 - rank: [4, 9]}, dim, np.dtype("f8"))

    threads = [threading.Thread(target=play, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_each_end_of_an_edge_reads_what_the_other_writes():
    """Every edge has a place for either direction; none overlaps another."""
    found = shared_by_two(3001)
    for rank, slots in found.items():
        for edge, (mine, _) in slots.items():
            mine[:] = 10 * edge + rank
    assert set(found[0]) == set(found[1]) == {4, 9}
    for rank, slots in found.items():
        for edge, (mine, theirs) in slots.items():
            assert mine.shape == theirs.shape == (3001,)
            assert mine.ctypes.data % LINE == theirs.ctypes.data % LINE == 0
            assert (mine == 10 * edge + rank).all()
            assert (theirs == 10 * edge + 1 - rank).all()


@pytest.mark.parametrize("trouble", ["no folder", "full", "another folder", "short"])
def test_messages_go_over_connections_where_memory_cannot_be_shared(tmp_path, monkeypatch, trouble):
    """No folder for it, no room in it, another one in the other's container, or short messages: nothing is shared."""
    monkeypatch.setattr(shared, "FOLDER", tmp_path / "none" if trouble == "no folder" else tmp_path)
    if trouble == "full":
        monkeypatch.setattr(shared.os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    if trouble == "another folder":
        take = shared._take
        monkeypatch.setattr(shared, "_take", lambda file, size, mark: take(file, size, "00" * 32))
    assert shared_by_two(SHORT // 8 if trouble == "short" else 3001) == {0: {}, 1: {}}
    assert not list(tmp_path.iterdir())


@needs_mpi
def test_what_the_flow_conserves_is_conserved(file):
    """A2CiD2 without gradients: the sum over nodes of x + x~ stays what it was, to rounding."""
    start = ["algorithm.kind=accelerated_gossip", "problem={kind: consensus, dim: 4}", "schedule.unit=0.002"]
    done = launch("mpi", 2, "run", file, *start, "start={kind: problem}", "--json", "--folder", "out", cwd=file.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    first, last = (fedsim.load(file.parent / "out").metrics.iloc[k] for k in (0, -1))
    assert last["consensus"] < 1e-3 * first["consensus"]
    assert last["loss"] <= first["loss"] + 1e-9


@needs_mpi
@pytest.mark.slow
def test_a_live_run_resumes_and_still_replays(file):
    """Killed after a checkpoint and resumed on another number of ranks, the trace goes on; replay has its digest."""

    def kill(name, now, horizon, row):
        if now == 45:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedsim.run(file, folder="out", progress=kill)
    done = launch("mpi", 3, "resume", "out", "--json", cwd=file.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    result = fedsim.load(file.parent / "out")
    assert list(result.metrics["time"]) == [0, 15, 30, 45, 60]
    assert replay(result.folder)["same"]


@pytest.mark.parametrize(
    ("kind", "algorithm"),
    [pytest.param("mpi", "dadao", marks=needs_mpi), ("torch", "randomised_gossip")],
)
@pytest.mark.slow
def test_an_observation_may_be_further_than_the_timeout(file, kind, algorithm):
    """Ranks that take gradients, or meet when their clocks say so, for longer than engine.timeout are not given up."""
    overrides = ["schedule={kind: live, horizon: 10, unit: 0.8}", "record.every=10", "engine.timeout=3"]
    gossip = [] if algorithm == "dadao" else ["problem={kind: consensus, dim: 4}"]
    overrides += [f"algorithm.kind={algorithm}", *gossip]
    done = launch(kind, 2, "run", file, *overrides, "--json", "--folder", "out", cwd=file.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["last"]["wall_seconds"] > 8


class Bad(fedsim.Problem):
    """Its gradient raises after a few."""

    n, dim, records, left = 3, 2, np.zeros(3, np.int64), 20

    def gradient(self, x, nodes, batch=None):
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError("of the user's own")
        return x

    def loss(self, x, nodes):
        return (x.expand(len(nodes), -1) ** 2).sum(1) / 2


def test_a_failing_gradient_ends_a_live_run_at_once(file):
    """What a gradient raises is not kept until the next observation, a minute later: gossip stops with it."""
    clock = time.monotonic()
    with pytest.raises(ZeroDivisionError, match="own"):
        fedsim.run(
            topology={"kind": "ring", "n": 3},
            problem=Bad(),
            algorithm={"kind": "gossip_sgd", "step": 0.1},
            schedule={"kind": "live", "horizon": 60, "unit": 1},
            record={"every": 60},
            engine={"gradient_seconds": 0.01},
        )
    assert time.monotonic() - clock < 30


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm={kind: msda}"], "works in rounds"),
        (["algorithm={kind: continuized}"], "primal gradients"),
        (["schedule={kind: poisson, horizon: 5, unit: 0.1}"], "only live time has a unit"),
    ],
)
def test_what_cannot_live_is_refused(file, overrides, message):
    """Rounds, dual gradients, a unit of virtual time: refused by name."""
    with pytest.raises(InputError, match=message):
        fedsim.run(file, overrides=overrides, folder="out")


def test_a_replay_prints_its_own_last_observation(file):
    """The last row is observed on the replayed state: where the recorded one was changed, the two differ."""
    result = fedsim.run(file, overrides=["schedule.horizon=15"], folder="out")
    last = result.summary()["last"]
    table = result.metrics
    table.loc[table.index[-1], ["distance", "gradients"]] = [0.125, 1]
    table.to_parquet(result.folder / "metrics.parquet")
    assert replay(result.folder)["last"] == last


def test_a_run_without_a_trace_is_not_replayed(file):
    """Virtual time has no trace, and says so."""
    fedsim.run(file, overrides=["schedule={kind: poisson, horizon: 5}"], folder="out")
    with pytest.raises(InputError, match="not a finished live run"):
        replay(file.parent / "out")


class Pair:
    """Two ranks in one process, for a mesh: what one broadcasts or gathers is what the test hands it."""

    kind, size, moved, calls, waiting = "test", 2, 0, 0, False

    def __init__(self, rank, token, notes):
        self.rank, self._token, self._notes = rank, token, notes

    def broadcast(self, buffer, root=0):
        return np.frombuffer(self._token, np.uint8)

    def all_gather(self, mine):
        self._notes[self.rank] = mine
        while len(self._notes) < 2:
            pass
        return [self._notes[0], self._notes[1]]


def test_messages_larger_than_any_buffer_cross_without_waiting_for_each_other():
    """Two ranks that send 32 MB at the same moment, twice, both get all of it, in order."""
    notes, token, dim, got = {}, b"t" * 32, 4_000_000, {0: [], 1: []}

    def play(rank):
        mesh = Mesh(Pair(rank, token, notes), [1 - rank], dim, np.dtype("f8"))
        for number in (0, 1):
            mesh.send(1 - rank, Frame(OFFER, 7, number, rank, np.full(dim, 10.0 * number + rank)))
        while len(got[rank]) < 2:
            got[rank] += [frame for _, frame in mesh.arrived(1.0)]
        notes[2 + rank] = mesh  # closed when both have everything

    threads = [threading.Thread(target=play, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for rank in (0, 1):
        notes[2 + rank].close()
        assert [(f.kind, f.edge, f.number, f.depth) for f in got[rank]] == [(OFFER, 7, k, 1 - rank) for k in (0, 1)]
        assert all((f.m == 10.0 * f.number + 1 - rank).all() for f in got[rank])


def test_strangers_and_nonsense_are_refused():
    """A connection without the token is closed; bytes that are no frame end the run."""
    notes, token, meshes = {}, b"t" * 32, {}
    threads = [
        threading.Thread(target=lambda r=r: meshes.update({r: Mesh(Pair(r, token, notes), [1 - r], 3, np.dtype("f8"))}))
        for r in (0, 1)
    ]
    threads[0].start()
    while 0 not in notes:
        pass
    port = int(notes[0].tobytes().split(b"\n")[0])
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"x" * 36)
        threads[1].start()
        for thread in threads:
            thread.join(20)
        assert stranger.recv(1) == b""
    meshes[1]._connections[0].sendall(FRAME.pack(b"?", 0, 0, 0))
    with pytest.raises(RunError, match="no message of a live run"):
        list(meshes[0].arrived(2.0))
    meshes[1].close()
    with pytest.raises(RunError, match="gone in the middle"):
        list(meshes[0].arrived(2.0))
    meshes[0].close()
