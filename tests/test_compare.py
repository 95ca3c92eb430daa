"""Tables against hand-made results: medians, quartiles, pairs; what was not reached, diverged or ended early."""

import io
import json
import math
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import fedsim
from fedsim.cli import app
from fedsim.errors import InputError
from fedsim.results.curves import carried_forward, cost_to_reach
from fedsim.results.folder import RunFolder
from fedsim.results.recorder import Recorder
from fedsim.results.tables import latex, markdown, written

COSTS = ("gradients", "communications", "messages", "bytes", "queries", "dual_gradients", "samples", "exchanges")


def run(folder, variant, seed, losses, bytes_each=10, status="finished", metric="loss", **facts):
    """Leave a run of `len(losses)` observations, `bytes_each` bytes between two."""
    files, recorder = RunFolder(folder), Recorder(folder)
    for k, loss in enumerate(losses):
        costs = dict.fromkeys(COSTS, 0) | {"bytes": k * bytes_each, "gradients": k}
        recorder.append({"round": k, metric: float(loss), **costs, "wall_seconds": 0.5 * k})
    recorder.close()
    files.write_scenario("name: made\n")
    files.write_run({"name": "made", "variant": variant, "seed": seed, "status": status, "base": ".", **facts})


def study(folder, runs, **facts):
    """Leave a study of (variant, seed, losses, options) and return it."""
    names = []
    for variant, seed, losses, *options in runs:
        names.append(f"{variant}-{seed}".replace(" ", ""))
        run(folder / names[-1], variant, seed, losses, **(options[0] if options else {}))
    (folder / "study.json").write_text(json.dumps({"name": "made", "claim": "", "runs": names, **facts}))
    return fedsim.load(folder)


def test_costs_to_a_value_are_medians_and_quartiles_of_what_was_paid(tmp_path):
    """Three runs pay 20, 30 and 50 bytes: median 30, quartiles 25 and 40, by hand."""
    runs = [("A", 0, [9, 5, 1]), ("A", 1, [9, 5, 4, 1]), ("A", 2, [9, 8, 7, 6, 5, 1])]
    row = study(tmp_path, runs).compare(to=("loss", 1)).loc["A"]
    assert (row["runs"], row["reached"], row["diverged"]) == (3, 3, 0)
    assert (row["bytes"], row["bytes_q1"], row["bytes_q3"]) == (30, 25, 40)
    assert row["wall_seconds"] == 1.5


def test_a_value_counts_from_where_it_is_kept(tmp_path):
    """A loss that dips under the goal and rises again has reached it only when it stays."""
    row = study(tmp_path, [("A", 0, [9, 0.5, 3, 0.9, 0.8])]).compare(to=("loss", 1)).loc["A"]
    assert row["bytes"] == 30


def test_the_goal_that_nobody_named_is_not_where_runs_begin(tmp_path):
    """A power of ten that all reach; where a run starts below it, the worst end in two digits: nobody pays 0."""
    far = study(tmp_path / "far", [("A", 0, [5.0, 0.3, 0.03])])
    near = study(tmp_path / "near", [("A", 0, [0.9, 0.8, 0.6789])])
    assert far.compare().attrs["goal"] == 0.1
    assert near.compare().attrs["goal"] == 0.68
    assert near.compare().loc["A", "bytes"] == 20


def test_a_variant_that_ends_no_better_than_it_began_has_no_say_in_the_goal(tmp_path):
    """The others' goal stands; the one that got worse has not reached it, and no saving is claimed at nobody's cost."""
    found = study(tmp_path, [("good", 0, [9, 3, 0.4]), ("fair", 0, [9, 6, 0.8]), ("wild", 0, [9, 50, 400])])
    frame = found.compare()
    assert frame.attrs["goal"] == 1
    assert frame["reached"].tolist() == [1, 1, 0]


def test_a_variant_that_ends_worse_has_no_say_where_no_power_of_ten_lies_between(tmp_path):
    """Losses fall from 0.69 to 0.61 and 0.2; one rises to 3.9: the goal is 0.61, not 3.9, where all were at no cost."""
    runs = [("A", 0, [0.69, 0.65, 0.2]), ("B", 0, [0.69, 0.66, 0.61]), ("noise", 0, [0.69, 2.0, 3.9])]
    frame = study(tmp_path, runs).compare()
    assert frame.attrs["goal"] == 0.61
    assert frame["bytes"].fillna(-1).to_list() == [20, 20, -1]


def test_without_a_level_that_costs_anything_values_at_the_end_are_shown(tmp_path):
    """A common start has consensus 0 and losses may end below 0: what all have at their last common round is told."""
    for name, metric, values in (("up", "consensus", [0.0, 0.3, 0.2]), ("below", "loss", [1.0, -2.0, -3.0])):
        runs = [("A", 0, values, {"metric": metric}), ("B", 0, [*values, values[-1] / 2], {"metric": metric})]
        frame = study(tmp_path / name, runs).compare()
        assert frame.attrs["question"] == "value at round = 2"
        assert frame.loc["A", metric] == frame.loc["B", metric] == values[-1]


def test_a_loss_on_held_out_records_comes_before_consensus(tmp_path):
    """What a model is for is asked before how far nodes are apart."""
    run(tmp_path / "a", "A", 0, [9.0, 0.5], metric="test_loss")
    frame = pd.read_parquet(tmp_path / "a" / "metrics.parquet")
    frame.insert(1, "consensus", [9.0, 0.5])
    frame.to_parquet(tmp_path / "a" / "metrics.parquet")
    assert fedsim.load(tmp_path / "a").compare().attrs["metric"] == "test_loss"


def test_folders_of_one_name_are_told_apart_and_one_folder_counts_once(tmp_path):
    """`a/out` and `b/out` are two rows, never the median of both; the same folder twice is one."""
    for name, losses in (("a", [9, 1]), ("b", [9, 5, 1])):
        run(tmp_path / name / "out", None, 0, losses)
    folders = [tmp_path / "a" / "out", tmp_path / "b" / "out", tmp_path / "a" / ".." / "a" / "out"]
    frame = fedsim.compare(folders, to=("loss", 1))
    assert frame["runs"].to_dict() == {"a/out: made": 1, "b/out: made": 1}
    assert frame["bytes"].tolist() == [10, 20]


def test_what_is_not_reached_is_said_and_never_a_number(tmp_path):
    """With one of three runs short of the goal there is no median, and the table says one of three."""
    runs = [("A", 0, [9, 1]), ("A", 1, [9, 1]), ("A", 2, [9, 8]), ("B", 0, [9, 1])]
    frame = study(tmp_path, runs).compare(to=("loss", 1))
    assert math.isnan(frame.loc["A", "bytes"])
    assert frame.loc["A", "reached"] == 2
    assert "| A | 3 | not reached (1 of 3) |" in markdown(frame)
    assert "| B | 1 | 1 | 10 | 0.5 | 1 |" in markdown(frame)


def test_a_diverged_run_reaches_nothing_and_is_not_carried_on(tmp_path):
    """Its last value stands neither for a cost beyond its end nor as reached; the table says that it diverged."""
    broken = {"status": "failed", "diverged": True}
    found = study(tmp_path, [("A", 0, [9, 1, 1, 1]), ("A", 1, [9, 0.5], broken), ("B", 0, [], broken)])
    frame = found.compare(at=("bytes", 20))
    assert math.isnan(frame.loc["A", "loss"])
    assert "| A | 2 | diverged (1 of 2) |" in markdown(frame)
    assert "| B | 1 | diverged (1 of 1) |" in markdown(frame)
    assert found.compare(at=("bytes", 10)).loc["A", "loss"] == 0.75
    assert "| A | 2 | not reached (1 of 2, 1 diverged) |" in markdown(found.compare(to=("loss", 1)))


def test_values_by_a_cost_are_the_last_observed(tmp_path):
    """By 25 bytes, observed at 20 and 30, the value at 20 counts; a run that ended before is said to have."""
    found = study(tmp_path, [("A", 0, [9, 5, 3, 1]), ("B", 0, [9, 2])])
    frame = found.compare(at=("bytes", 25))
    assert frame["loss"].tolist() == [3, 2]
    assert frame["ended"].tolist() == [0, 1]
    assert frame.attrs["notes"] == ["B: 1 of 1 runs ended before bytes = 25; what they had then counts"]
    assert "B: 1 of 1 runs ended before" in markdown(frame)


def test_pairs_are_of_equal_seeds(tmp_path):
    """Ratios of costs and differences of values are taken seed by seed, then their median; other seeds are no pairs."""
    runs = [("A", s, [9] * k + [1]) for s, k in ((0, 2), (1, 4), (2, 10))]
    runs += [("B", s, [9] * k + [1]) for s, k in ((0, 1), (1, 1), (7, 1))]
    found = study(tmp_path, runs)
    row = found.compare(to=("loss", 1)).loc["B"]
    assert row["pairs"] == 2
    assert (row["bytes_vs"], row["bytes_vs_q1"], row["bytes_vs_q3"]) == (0.375, 0.3125, 0.4375)
    assert "*ratio to A on common seeds*" in markdown(found.compare(to=("loss", 1)))
    assert found.compare(to=("loss", 1), reference="B").loc["A", "bytes_vs"] == 3.0
    other = found.compare(at=("bytes", 10)).loc["B"]
    assert other["loss_vs"] == -8
    assert "*difference to A on common seeds*" in markdown(found.compare(at=("bytes", 10)))


def test_where_more_is_better_the_goal_is_met_from_below(tmp_path):
    """`--to test_accuracy=0.9` is reached where the accuracy stays at 0.9 or above."""
    found = study(tmp_path, [("A", 0, [0.1, 0.95, 0.8, 0.9, 0.91], {"metric": "test_accuracy"})])
    frame = found.compare(to=("test_accuracy", 0.9))
    assert frame.loc["A", "bytes"] == 30
    assert frame.attrs["question"] == "cost to test_accuracy >= 0.9"


def test_an_optimum_at_the_edge_of_its_grid_is_flagged(tmp_path):
    """The variant carries a dagger, and a line below says on which axis and at which end."""
    choice = {"variant": "A", "cell": {"a.eta": 1}, "edges": ["a.eta at its upper end 1"]}
    other = {"variant": "B", "cell": {"a.eta": 1}, "edges": []}
    found = study(tmp_path, [("A", 0, [9, 1]), ("B", 0, [9, 1])], select={"choices": [choice, other]})
    text = markdown(found.compare(to=("loss", 1)))
    assert "| A\N{DAGGER} | 1 |" in text
    assert "| B | 1 |" in text
    assert "- \N{DAGGER} A: a.eta at its upper end 1 of its grid; the best may lie beyond" in text
    assert "A$\\dag$" in latex(found.compare(to=("loss", 1))) or r"A\dag{}" in latex(found.compare(to=("loss", 1)))


def test_runs_that_are_not_over_are_said_to_be_so(tmp_path):
    """A table of an interrupted study says how many runs it still lacks."""
    runs = [("A", 0, [9, 1]), ("A", 1, [9, 1], {"status": "interrupted"}), ("A", 2, [], {"status": "waiting"})]
    notes = study(tmp_path, runs).compare(to=("loss", 1)).attrs["notes"]
    assert notes == [f"{tmp_path}: 1 of 3 runs are interrupted", f"{tmp_path}: 1 of 3 runs are waiting"]


def test_csv_has_every_column_and_latex_compiles(tmp_path):
    """CSV reads back to the frame's numbers; LaTeX is booktabs with escaped text (compiled where there is a LaTeX)."""
    runs = [("50 % of_it & <more>", s, [9] * (s + 1) + [1]) for s in range(3)] + [("B^2", 0, [9, 1])]
    frame = study(tmp_path, runs).compare(to=("loss", 1))
    back = pd.read_csv(io.StringIO(written(frame, "csv")), index_col="variant")
    assert back.loc["50 % of_it & <more>", "bytes_q3"] == frame.loc["50 % of_it & <more>", "bytes_q3"] == 25
    text = written(frame, "latex")
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == text.count(r"\begin{tabular}") >= 1
    assert r"50 \% of\_it \& $<$more$>$ & 3 & " in text
    assert r"B\textasciicircum{}2" in text
    if shutil.which("pdflatex"):
        document = r"\documentclass{article}\usepackage{booktabs}\begin{document}" + text + r"\end{document}"
        (tmp_path / "t.tex").write_text(document)
        subprocess.run(["pdflatex", "-halt-on-error", "t.tex"], cwd=tmp_path, check=True, capture_output=True)


@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=20),
    st.lists(st.floats(-10, 10), min_size=20, max_size=20),
    st.lists(st.floats(-5, 110), min_size=1, max_size=8),
)
def test_curves_are_carried_forward_never_interpolated(costs, values, grid):
    """On any grid the value is that of the last observation at or before, found by looking through all of them."""
    frame = pd.DataFrame({"bytes": sorted(costs), "loss": values[: len(costs)]})
    found = carried_forward(frame, "bytes", "loss", np.array(grid))
    for point, value in zip(grid, found, strict=True):
        expected = math.nan
        for cost, seen in zip(frame["bytes"], frame["loss"], strict=True):
            expected = seen if cost <= point else expected
        assert value == expected or (math.isnan(value) and math.isnan(expected))


@given(st.lists(st.floats(0, 2), min_size=1, max_size=20))
def test_a_goal_is_reached_where_all_that_follows_is_within(losses):
    """The cost is the first from which every later value is at most the goal; none where the last one is above."""
    frame = pd.DataFrame({"bytes": range(len(losses)), "loss": losses})
    expected = next((k for k in range(len(losses)) if all(v <= 1 for v in losses[k:])), None)
    assert cost_to_reach(frame, "bytes", "loss", 1.0) == expected


def test_the_command_writes_each_format(tmp_path):
    """`--format` and `--out` write what Python's `compare` gives; a wrong format is refused."""
    study(tmp_path / "s", [("A", 0, [9, 1]), ("B", 0, [9, 9, 1])])
    call = lambda *more: CliRunner().invoke(app, ["compare", str(tmp_path / "s"), "--to", "loss=1", *more])
    assert "| A | 1 | 1 | 10 |" in call().output
    assert call("--format", "csv", "--out", str(tmp_path / "t.csv")).output.strip() == str(tmp_path / "t.csv")
    assert pd.read_csv(tmp_path / "t.csv", index_col=0).loc["B", "bytes"] == 20
    assert r"\midrule" in call("--format", "latex").output
    assert "markdown, csv or latex" in str(call("--format", "html").exception)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"to": ("los", 1)}, "did not record 'los' (did you mean 'loss'?)"),
        ({"at": ("byte", 1)}, "did not record 'byte' (did you mean 'bytes'?)"),
        ({"to": ("loss", 1), "at": ("bytes", 1)}, "give either --to"),
        ({"to": ("loss", 1), "reference": "C"}, "no variant 'C' to compare with; there are A, B"),
    ],
)
def test_questions_without_an_answer_are_refused(tmp_path, question, message):
    """A column that is not there, both questions at once, or an unknown reference is named."""
    found = study(tmp_path, [("A", 0, [9, 1]), ("B", 0, [9, 1])])
    with pytest.raises(InputError) as error:
        found.compare(**question)
    assert message in str(error.value)
