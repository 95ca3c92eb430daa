"""Scenario files: what they expand to, and one report of everything that is wrong."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedsim.errors import InputError
from fedsim.reading import read_value, read_yaml
from fedsim.scenario import load_study, override

SCENARIOS = sorted((Path(__file__).parent.parent / "scenarios").rglob("*.yaml"))

GOOD = """
name: good
seed: 4
topology: {kind: ring, n: 5}
problem: {kind: quadratic, dim: 3}
algorithm: {kind: dadao}
schedule: {horizon: 10}
"""


def write(folder, text):
    file = folder / "s.yaml"
    file.write_text(text)
    return file


def mistakes(folder, text, **options):
    with pytest.raises(InputError) as found:
        load_study(write(folder, text), **options)
    return str(found.value)


def test_defaults_are_filled_in(tmp_path):
    """A short file resolves to a whole scenario: schedule kind, record, engine and start are there."""
    run = load_study(write(tmp_path, GOOD)).runs[0]
    assert (run.seed, run.data_seed, run.name) == (4, 4, "good")
    assert run.schedule == {"horizon": 10, "kind": "poisson"}
    assert run.start["kind"] == "zeros"
    assert run.record["every"] == 1.0


def test_the_resolved_file_is_the_same_scenario(tmp_path):
    """The scenario.yaml that a run leaves behind loads to the same digest."""
    run = load_study(write(tmp_path, GOOD), overrides=["algorithm.gamma=0.1"]).runs[0]
    again = load_study(write(tmp_path, run.to_yaml())).runs[0]
    assert again.digest() == run.digest()


def test_variants_and_seeds_expand_to_runs_with_the_same_data(tmp_path):
    """Two variants and three seeds are six runs; graph and data keep the file's seed."""
    text = GOOD + "seeds: 3\nvariants:\n  a: {rates.kind: uniform}\n  b c: {rates.kind: sdp}\n"
    study = load_study(write(tmp_path, text))
    assert [(r.variant, r.seed) for r in study.runs] == [(v, s) for v in ("a", "b c") for s in (4, 5, 6)]
    assert {r.data_seed for r in study.runs} == {4}
    assert [r.folder for r in study.runs][3] == "b-c-seed4"


def test_overrides_apply_in_the_order_file_variant_short_command_line(tmp_path):
    """The later source wins: variant over file, short over variant, command line over all."""
    text = GOOD + "short: {schedule.horizon: 2}\nvariants:\n  v: {schedule.horizon: 5, seed: 9}\n"
    file = write(tmp_path, text)
    assert load_study(file).runs[0].schedule["horizon"] == 5
    assert load_study(file, short=True).runs[0].schedule["horizon"] == 2
    assert load_study(file, short=True, overrides=["schedule.horizon=3"]).runs[0].schedule["horizon"] == 3


def test_changing_a_kind_drops_the_other_keys():
    """Another algorithm does not inherit the first one's parameters."""
    content = {"algorithm": {"kind": "dadao", "gamma": 0.1}}
    override(content, "algorithm.kind", "a2cid2")
    override(content, "algorithm.step", 0.2)
    assert content == {"algorithm": {"kind": "a2cid2", "step": 0.2}}


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1.0e-2", 1e-2), ("2", 2), ("-.5", -0.5), ("yes", "yes"), ("null", None)]
)
def test_numbers_are_read_as_people_write_them(text, value):
    """`1e-3` is a number and `yes` is a word."""
    assert read_value(text) == value
    assert type(read_value(text)) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_survives_the_file(value):
    """A float that Python prints is read back to the same bits."""
    assert float(read_value(repr(value))) == value


def test_all_mistakes_come_in_one_report(tmp_path):
    """Each mistake has its line, its key, what was given, and the closest known name."""
    text = """
name: bad
sead: 3
topology: {kind: pth, n: 10}
problem: {kind: ridge, data: {kind: diabetez}}
algorithm: {kind: dadao, gama: 1, gamma: -1}
schedule: {horizon: 1e-3, kind: rounds}
stop: {distanc: 1e-3}
"""
    report = mistakes(tmp_path, text)
    for part in (
        "8 mistakes, nothing was run",
        "s.yaml:3: sead: unknown key (did you mean 'seed'?)",
        "s.yaml:4: topology.kind: unknown kind 'pth' (did you mean 'path'?)",
        "s.yaml:5: problem.l2: this key is missing",
        "s.yaml:5: problem.data.kind: 'diabetez' is not known (did you mean 'diabetes'?)",
        "s.yaml:6: algorithm.gama: unknown key (did you mean 'gamma'?)",
        "s.yaml:6: algorithm.gamma: input should be greater than 0 (-1 given)",
        "s.yaml:7: schedule.kind: 'rounds' given, but dadao works by events: poisson is needed",
        "s.yaml:8: stop.distanc: unknown condition (did you mean 'distance'?)",
    ):
        assert part in report


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seeds: 0", "seeds: 0 given; a number of seeds"),
        ("seed: -1", "seed: -1 given, a whole number of at least 0"),
        ("seed: 18446744073709551616", "seed: 18446744073709551616 given, a whole number of at least 0 and below 2^64"),
        ("seed: 18446744073709551615\nseeds: 2", "seeds: 2 from 18446744073709551615 on given"),
        ("data_seed: -1", "data_seed: -1 given; a whole number of at least 0"),
        ("problem: {kind: quadratic, l2: 0.1}", "problem.l2: unknown key"),
        ("problem: {kind: logistic, data: {kind: iris}, normalise: rows}", "problem.normalise: unknown key"),
        ("schedule: {horizon: 0}", "schedule.horizon: input should be greater than 0"),
        ("schedule: {}", "schedule.horizon: this key is missing"),
        ("mixing: {kind: metropolis}", "dadao does not mix; leave mixing out"),
        ("rates: {kind: uniform, scale: big}", "rates.scale: input should be 'theory' or 'none' ('big' given)"),
        ("rates: {kind: sdp, set: totall}", "rates.set: input should be 'total', 'node_rate' or 'node_bandwidth'"),
        ("rates: {kind: sdp, prune: 'no'}", "rates.prune: input should be a valid boolean ('no' given)"),
        ("rates: {kind: uniform, prune: true}", "rates.prune: is for kind: sdp"),
        ("rates: {kind: sdp, file: mine.csv}", "rates.kind: does not go with file"),
        ("mixing: {kind: fdla, file: w.npy}", "mixing.kind: does not go with file"),
        ("mixing: {lazy: 'no'}", "mixing.lazy: input should be a valid boolean ('no' given)"),
        ("rates: {kind: sdpp}", "'sdpp' is not known (did you mean 'sdp'?)"),
        ("algorithm: {kind: 'nothing.here:Class'}", "give package.module:Class or file.py:Class"),
        ("algorithm: {}", "algorithm.kind: missing"),
        ("algorithm: dadao", "'dadao' given, a section with keys needed"),
        ("algorithm: {kind: msda}\nschedule: {horizon: 2.5}", "2.5 given, a whole number of rounds"),
        ("algorithm: {kind: a2cid2}", "algorithm.step: this key is missing"),
        ("variants: {a: {algorithmm.gamma: 1}}", "no section 'algorithmm' (did you mean 'algorithm'?)"),
        ("start: {kind: zero}", "start.kind: input should be"),
    ],
)
def test_each_mistake_is_refused_by_name(tmp_path, change, message):
    """A wrong value says where it stands, what was given and what is needed."""
    sections = yaml.safe_load(GOOD) | yaml.safe_load(change)
    assert message in mistakes(tmp_path, yaml.safe_dump(sections))


def test_a_duplicate_key_is_refused_with_its_line(tmp_path):
    """A key that stands twice is an error, not a silent choice."""
    assert "s.yaml:8: seed stands twice" in mistakes(tmp_path, GOOD + "seed: 5\n")


def test_a_missing_file_and_bad_overrides_are_refused(tmp_path):
    """No file, no assignment and no short form each say what is needed."""
    with pytest.raises(InputError, match="no such file"):
        load_study(tmp_path / "none.yaml")
    assert "KEY=VALUE is needed" in mistakes(tmp_path, GOOD, overrides=["algorithm"])
    assert "no short form" in mistakes(tmp_path, GOOD, short=True)


def test_a_users_class_beside_the_scenario_is_found_and_fingerprinted(tmp_path):
    """`file.py:Class` loads from the scenario's folder, and its hash is part of the digest."""
    code = "from dataclasses import dataclass\nfrom fedsim.algorithms.gossip import RandomisedGossip\n\n\n"
    code += "@dataclass(frozen=True)\nclass Mine(RandomisedGossip):\n    speed: float = 1.0\n"
    (tmp_path / "mine.py").write_text(code)
    file = write(tmp_path, GOOD.replace("{kind: dadao}", "{kind: 'mine.py:Mine', speed: 2}"))
    run = load_study(file).runs[0]
    assert run.make_algorithm().speed == 2.0
    (tmp_path / "mine.py").write_text(code + "# changed\n")
    assert load_study(file).runs[0].digest() != run.digest()


def test_the_digest_ignores_what_results_do_not_depend_on(tmp_path):
    """Name, record, checkpoint and engine are not in the digest; the seed is."""
    base = load_study(write(tmp_path, GOOD)).runs[0].digest()
    for same in (["name=other"], ["record.every=2"], ["engine.block=3"], ["checkpoint.every=5"]):
        assert load_study(write(tmp_path, GOOD), overrides=same).runs[0].digest() == base
    assert load_study(write(tmp_path, GOOD), overrides=["seed=5", "data_seed=4"]).runs[0].digest() != base


def test_the_shipped_schema_is_current():
    """`fedsim/schema.json` is what the code makes now (`python -m fedsim.schema` writes it)."""
    from fedsim.schema import FILE, text

    assert json.loads(FILE.read_text()) == json.loads(text())


@pytest.mark.parametrize("file", SCENARIOS, ids=lambda f: f.stem)
def test_shipped_scenarios_load_and_name_the_schema(file):
    """Every shipped scenario is valid in its long and short form, states a claim, and names the schema for editors."""
    first = file.read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert load_study(file).claim
    load_study(file, short=True)
    read_yaml(file)
