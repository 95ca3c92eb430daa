"""Scenario files: what they expand to, and one report of everything that is wrong."""

import json
from pathlib import Path

import numpy as np
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
    ("text", "value"),
    [("1e-3", 1e-3), ("1.0e-2", 1e-2), ("2", 2), ("-.5", -0.5), ("yes", "yes"), ("null", None), ("010", 10), ("09", 9)],
)
def test_numbers_are_read_as_people_write_them(text, value):
    """`1e-3` is a number, `yes` is a word, and `010` is ten (YAML 1.2), not eight."""
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
        ("rates: {kind: sdpp}", "or 'sdp' ('sdpp' given) (did you mean 'sdp'?)"),
        ("rates: {kind: sdp, prune: 'yes'}", "rates.prune: 'yes' given, true or false needed"),
        ("rates: {caps: one}", "rates.caps: input should be a valid number"),
        ("rates: {kind: sdp, set: totl}", "rates.set: input should be 'total', 'node_rate' or 'node_bandwidth'"),
        ("topology: {kind: ring, n: five}", "topology.n: must be an integer, got 'five'"),
        ("topology: {kind: ring}", "topology.n: missing; it takes n"),
        ("topology: ", "topology: missing; every scenario needs"),
        ("schedule: ", "schedule: missing; every scenario needs"),
        ("schedule: {horizon: true}", "schedule.horizon: true given, a number needed"),
        ("schedule: {horizon: '3'}", "schedule.horizon: '3' given, a number needed (without quotes)"),
        ("algorithm: {kind: dadao, gamma: true}", "algorithm.gamma: true given, a number needed"),
        ("algorithm: {kind: dadao, gamma: .inf}", "algorithm.gamma: inf given, a finite number needed"),
        ("algorithm: {kind: adom_plus, multi_consensus: 1}", "multi_consensus: 1 given, true or false needed"),
        ("algorithm: {kind: 'os.path:join'}", "os.path:join is no class"),
        ("algorithm: {kind: 'fractions:Fraction'}", "fractions:Fraction is no fedsim algorithm"),
        ("algorithm: {kind: [dadao]}", "algorithm.kind: ['dadao'] given, a name needed"),
        ("problem: {kind: least_squares, l2: 1, data: {kind: diabetes}}", "problem.l2: unknown key"),
        ("problem: {kind: quadratic, normalise: rows}", "problem.normalise: unknown key"),
        ("problem: {kind: ridge, l2: 1, data: diabetes}", "such as data: {kind: diabetes}"),
        ("problem: {kind: ridge, l2: 1}", "problem.data: missing; ridge needs records"),
        ("problem: {kind: quadratic, data: {kind: iris}}", "quadratic makes its own objectives; leave data out"),
        ("problem: {kind: ridge, l2: 1, data: {kind: diabetes}, partition: iid}", "partition: {kind: iid}"),
        ("start: {kind: given}", "start.value: missing; kind: given needs numbers"),
        ("start: {value: [1, 2, 3]}", "start.value: goes with kind: given alone"),
        ("algorithm: {kind: msda}\nrecord: {every: 0.3}", "record.every: 0.3 given, a whole number of rounds"),
        ("seed: 18446744073709551616", "a whole number of at least 0 and below 2^64 needed"),
        ("seeds: [1, 1]", "seeds: [1, 1] given; a seed stands twice"),
        ("seed: -1\nseeds: 0", "seeds: 0 given; a number of seeds"),
        ("name: a/b", "name: 'a/b' given; it names a folder"),
        ("name: ", "name: None given, a text needed"),
        ("claim: [a]", "claim: ['a'] given, a text needed"),
        ("short: {schedul.horizon: 1}", "short.schedul.horizon: no section 'schedul' (did you mean 'schedule'?)"),
        ("short: 3", "short: 3 given; a set of dotted overrides is needed"),
        ("rates: {kind: uniform, prune: true}", "rates.prune: is for kind: sdp"),
        ("rates: {kind: sdp, file: mine.csv}", "rates.kind: does not go with file"),
        ("mixing: {kind: fdla, file: w.npy}", "mixing.kind: does not go with file"),
        ("mixing: {lazy: 'no'}", "mixing.lazy: 'no' given, true or false needed"),
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


def test_duplicate_keys_are_refused_with_their_lines(tmp_path):
    """Keys that stand twice are mistakes like all others: each has its line, and one report has them all."""
    report = mistakes(tmp_path, GOOD + "seed: 5\nstart: {kind: zeros, kind: normal}\nsead: 3\n")
    assert "3 mistakes" in report
    for part in ("s.yaml:8: seed: stands twice", "s.yaml:9: start.kind: stands twice", "s.yaml:10: sead: unknown"):
        assert part in report


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a mapping of sections is needed"),
        (b"- a\n- b\n", "a mapping of sections is needed"),
        (b"name: caf\xe9\n", "s.yaml:1: not text in UTF-8 (byte 0xe9)"),
        ("name: x\n".encode("utf-16"), "s.yaml:1: not text in UTF-8"),
        (b'name: x\nclaim: "a\x07"\n', "s.yaml:2: not readable as YAML"),
        (b"name: x\n\tseed: 1\n", "s.yaml:2: not readable as YAML"),
        (b"topology:\n\tkind: ring\n", "cannot start any token; indent by spaces"),
        (b"claim: !!python/object/apply:os.system [ls]\n", "s.yaml:1: not readable as YAML: could not determine"),
        (b"short: &v {a: *v}\n", "s.yaml:1: short.a contains itself"),
        (b"claim: " + b"[" * 5000, "nested too deeply"),
    ],
    ids=str,
)
def test_a_file_that_is_no_scenario_is_refused_with_its_line(tmp_path, content, message):
    """Whatever bytes a file holds, the answer is one line that says where and what, never a traceback."""
    file = tmp_path / "s.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError) as found:
        load_study(file)
    assert message in str(found.value)


def test_a_folder_is_no_scenario(tmp_path):
    """The path of a folder is refused as such."""
    with pytest.raises(InputError, match="a folder; give the path of a scenario"):
        load_study(tmp_path)


def test_a_mistake_in_a_variant_has_the_line_of_the_variant(tmp_path):
    """What a variant, `short` or an override changed is reported where it stands, not where the file had it."""
    text = GOOD + "variants:\n  fine: {}\n  bad:\n    algorithm.gamma: -1\n    algorithm.gama: 1\n"
    text += "  other:\n    algorithm.kind: a2cid2\nshort: {start.kind: zero}\n"
    report = mistakes(tmp_path, text, short=True, overrides=["schedule.horizon=-2", "record", "engine.block=0"])
    for part in (
        "s.yaml:11: variants.bad.algorithm.gamma: input should be greater than 0",
        "s.yaml:12: variants.bad.algorithm.gama: unknown key",
        "s.yaml:14: variants.other.algorithm.step: this key is missing",
        "s.yaml:15: short.start.kind: input should be",
        "override: schedule.horizon: input should be greater than 0 (-2 given)",
        "override: engine.block: input should be",
        "override 'record': KEY=VALUE is needed",
    ):
        assert part in report


def test_what_is_found_while_building_has_its_line_too(tmp_path):
    """Mistakes that only building finds (files, sizes, names of metrics) say file and line."""
    import fedsim

    for change, message in (
        ("topology: {file: none.gml}", r"s\.yaml:3: topology: no file"),
        ("topology: {kind: ring, n: 1}", r"s\.yaml:3: topology ring: n must be at least 3"),
        ("record: {metrics: [distanc]}", r"s\.yaml:7: record.metrics: 'distanc' is unknown"),
        ("stop: {accuracy: 0.5}", r"s\.yaml:7: stop.accuracy: not among"),
        ("start: {kind: given, value: none.npy}", r"s\.yaml:7: start.value: 'none.npy' cannot be read"),
        ("algorithm: {kind: dadao, batch: {size: 2}}", r"s\.yaml:5: algorithm.batch: problem 'quadratic' has no"),
    ):
        lines = [line for line in GOOD.strip().splitlines() if line.partition(":")[0] != change.partition(":")[0]]
        lines.insert(2 if "topology" in change else 4 if "algorithm" in change else len(lines), change)
        with pytest.raises(InputError, match=message):
            fedsim.run(write(tmp_path, "\n".join(lines) + "\n"), folder=tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_variants_whose_names_look_alike_have_folders_of_their_own(tmp_path):
    """No run of a study overwrites another's, whatever the variants are called."""
    names = ["a b", "a-b", "SDP", "sdp", "\N{GREEK SMALL LETTER ETA}", "\N{GREEK SMALL LETTER MU}"]
    given = yaml.safe_load(GOOD) | {"variants": {name: {} for name in names}, "seeds": 2}
    folders = [run.folder for run in load_study(given).runs]
    assert len(set(folders)) == len(folders) == 12
    assert folders[0] == "a-b-seed4"


def test_outer_overrides_apply_before_inner_ones(tmp_path):
    """In whatever order they are given, `problem.kind` and `problem` leave what `problem.data.kind` says."""
    for words in (
        ["problem.data.kind=diabetes", "problem.kind=ridge", "problem.l2=0.1"],
        ["problem.l2=0.1", "problem={kind: ridge}", "problem.data={kind: diabetes}"],
    ):
        run = load_study(write(tmp_path, GOOD), overrides=words).runs[0]
        assert run.problem == {"kind": "ridge", "l2": 0.1, "data": {"kind": "diabetes"}}


def test_numbers_from_numpy_are_numbers(tmp_path):
    """A dictionary may hold NumPy's numbers, arrays, tuples and paths; the resolved file holds plain ones."""
    given = yaml.safe_load(GOOD) | {"seed": np.int64(3), "start": {"kind": "given", "value": np.ones(3)}}
    run = load_study(given | {"record": {"every": np.float32(2), "metrics": ("loss",)}}).runs[0]
    assert load_study(write(tmp_path, run.to_yaml())).runs[0].digest() == run.digest()


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


def test_the_schema_accepts_all_that_is_shipped_and_rejects_typos():
    """Editors that read the schema show no error in a shipped scenario, and one under every misspelt key or kind."""
    jsonschema = pytest.importorskip("jsonschema")
    from fedsim.schema import FILE

    schema = jsonschema.Draft202012Validator(json.loads(FILE.read_text()))
    for file in SCENARIOS:
        assert schema.is_valid(read_yaml(file)[0]), file
    good = yaml.safe_load(GOOD)
    assert schema.is_valid(good)
    for change in (
        {"sead": 1},
        {"seeds": 0},
        {"topology": {"kind": "ring", "m": 5}},
        {"topology": {"knid": "ring"}},
        {"rates": {"kind": "sdp", "set": "totl"}},
        {"rates": {"kind": "sdp", "sett": "total"}},
        {"algorithm": {"kind": "dado"}},
        {"algorithm": {"kind": "dadao", "gama": 1}},
        {"problem": {"kind": "least_squares", "l2": 1, "data": {"kind": "diabetes"}}},
        {"problem": {"kind": "ridge", "l2": 1, "data": {"kind": "diabetes", "normalize": "rows"}}},
        {"schedule": {"horizn": 3}},
        {"stop": {"distanc": 1}},
        {"variants": {"a": {"algoritm.gamma": 1}}},
        {"short": {"schedul.horizon": 1}},
    ):
        assert not schema.is_valid(good | change), change


@pytest.mark.parametrize("file", SCENARIOS, ids=lambda f: f.stem)
def test_shipped_scenarios_load_and_name_the_schema(file):
    """Every shipped scenario is valid in its long and short form, states a claim, and names the schema for editors."""
    first = file.read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert load_study(file).claim
    load_study(file, short=True)
    read_yaml(file)
