"""Figures for papers: their size, marks, bands, legends and notes; the same results give the same files."""

import itertools
import re
import xml.etree.ElementTree as ET

import pytest
from test_compare import study

import fedsim
from fedsim.errors import InputError
from fedsim.results.plots import plot


def words(file):
    """Return the text of an SVG."""
    return [" ".join("".join(t.itertext()).split()) for t in ET.parse(file).iter("{http://www.w3.org/2000/svg}text")]


@pytest.fixture
def many(tmp_path):
    """Ten variants with four runs each."""
    runs = [(f"V{v}", s, [9 / (1 + k * (1 + v + s / 4)) for k in range(12)]) for v in range(10) for s in range(4)]
    return study(tmp_path / "many", runs)


def test_a_figure_has_the_width_of_the_page_and_one_legend(many, tmp_path):
    """`column` is 3.25 in and `text` 6.75 in wide, in PDF and SVG; each variant stands in the legend once."""
    for width, inches in (("column", 3.25), ("text", 6.75), (5, 5.0)):
        png, svg, pdf = many.plot(width=width, against=["bytes", "gradients"], out=tmp_path / str(width))
        assert png.exists()
        size = ET.parse(svg).getroot().get("width")
        assert float(size.removesuffix("pt")) == pytest.approx(72 * inches)
        box = re.search(rb"/MediaBox \[ *0 0 ([\d.]+)", pdf.read_bytes())
        assert float(box.group(1)) == pytest.approx(72 * inches)
        assert [word for word in words(svg) if word.startswith("V")] == [f"V{v}" for v in range(10)]


def test_a_name_with_a_format_is_one_file(many, tmp_path):
    """`out="figure.pdf"` writes that file and no other."""
    out = tmp_path / "figures" / "figure.pdf"
    assert many.plot(out=out) == [out]
    assert list(out.parent.iterdir()) == [out]


def test_large_costs_do_not_run_into_each_other(tmp_path):
    """Millions of bytes under a panel of 2.2 in are written with M, and no two labels touch."""
    import matplotlib.pyplot as plt

    from fedsim.results.plots import _STYLE, _Drawn, _panel

    found = study(tmp_path, [("A", 0, [9, 5, 1])])
    for run in found.runs:
        run.metrics["bytes"] *= 1_234_567
    with plt.rc_context(rc=_STYLE):
        figure, axis = plt.subplots(figsize=(2.2, 2))
        _panel(axis, _Drawn(found.runs, {"A": found.runs}), "loss", "bytes", theory=False)
        figure.canvas.draw()
        labels = [label for label in axis.get_xticklabels() if label.get_text()]
        boxes = sorted(label.get_window_extent().extents.tolist() for label in labels)
    plt.close(figure)
    assert all(label.get_text()[-1] in "M0" for label in labels)
    assert all(left[2] < right[0] for left, right in itertools.pairwise(boxes))


def test_lines_are_told_apart_by_more_than_colour(many, tmp_path):
    """Of ten variants no two share colour, marker and dashes; fewer than nine never share a colour or a marker."""
    import matplotlib.pyplot as plt

    from fedsim.results.plots import _line

    figure, axis = plt.subplots()
    for index in range(10):
        _line(axis, many.runs[4 * index : 4 * index + 4], "loss", "bytes", f"V{index}", index)
    looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axis.get_lines()]
    plt.close(figure)
    assert len(set(looks)) == 10
    assert len({colour for colour, _, _ in looks[:8]}) == len({mark for _, mark, _ in looks[:8]}) == 8


def test_bands_are_what_the_caption_says(tmp_path):
    """Quartiles from three runs on, both runs of two, none of one."""
    for count, said in ((4, "bands: quartiles"), (2, "bands: both runs"), (1, None)):
        found = study(tmp_path / str(count), [("A", s, [9, 5 + s, 1 + s]) for s in range(count)])
        text = " ".join(words(found.plot(metric="loss", against="bytes")[1]))
        assert (said in text) if said else ("bands" not in text)


def test_several_studies_metrics_and_costs_stand_in_one_figure(tmp_path):
    """Two studies and two costs share one legend, each line with its study's name."""
    one = study(tmp_path / "one", [("A", 0, [9, 5, 1])])
    two = study(tmp_path / "two", [("A", 0, [9, 4, 1]), ("B", 0, [9, 4, 2])])
    _, svg, _ = plot([one, two], metric="loss", against=["bytes", "round"], out=tmp_path / "both")
    shown = words(svg)
    assert [word for word in shown if ": " in word] == ["one: A", "two: A", "two: B"]
    assert {"bytes sent", "round"} <= set(shown)


def test_a_diverged_run_ends_in_a_cross_and_hides_no_other(tmp_path):
    """A run that grows to 1e300 leaves the others in view, and a variant that only diverged says so."""
    broken = {"status": "failed", "diverged": True}
    runs = [
        ("A", 0, [9, 5, 1, 0.5]),
        ("A", 1, [9, 90, 1e300], broken),
        ("B", 0, [9, 1e200], broken),
        ("C", 0, [], broken),
    ]
    _, svg, _ = study(tmp_path, runs).plot(metric="loss", against="bytes")
    assert "B (diverged)" in words(svg)
    assert "C (diverged)" in words(svg)
    assert not any("200" in word or "300" in word for word in words(svg))


def test_the_edge_of_a_grid_is_flagged_in_the_figure(tmp_path):
    """The variant's label has a dagger, explained under the figure."""
    choice = {"variant": "A", "cell": {"a.eta": 1}, "edges": ["a.eta at its upper end 1"]}
    found = study(tmp_path, [("A", 0, [9, 1])], select={"choices": [choice]})
    shown = " ".join(words(found.plot(metric="loss", against="bytes")[1]))
    assert "A\N{DAGGER}" in shown
    assert "\N{DAGGER} A: a.eta at its upper end 1 of its grid; the best may lie beyond" in shown


def test_the_caption_names_who_needs_less(tmp_path):
    """`A needs 10 bytes, 50% fewer than B (20)`: the saving stands with the one that saves."""
    found = study(tmp_path, [("A", 0, [9, 1, 1]), ("B", 0, [9, 9, 1])])
    shown = " ".join(words(found.plot(metric="loss", against="bytes")[1]))
    assert "loss 1e+00: A needs 10 bytes, 50% fewer than B (20)" in shown


def test_no_caption_says_that_all_is_saved(tmp_path):
    """Where the saving would round to 100 % the caption counts how many times fewer it is."""
    found = study(tmp_path, [("A", 0, [9, 1]), ("B", 0, [9] * 300 + [1])])
    shown = " ".join(words(found.plot(metric="loss", against="bytes")[1]))
    assert "A needs 10 bytes, 300 times fewer than B (3,000)" in shown


def test_the_same_results_give_the_same_files(many, tmp_path):
    """SVG and PDF are equal byte for byte when drawn again: no dates, no random names."""
    first = many.plot(out=tmp_path / "a", metric="loss", against="bytes")
    second = many.plot(out=tmp_path / "b", metric="loss", against="bytes")
    for one, two in zip(first[1:], second[1:], strict=True):
        assert one.read_bytes() == two.read_bytes()


def test_what_cannot_be_drawn_is_refused(tmp_path):
    """A column that was not recorded, a width that is none, and a study without observations are named."""
    found = study(tmp_path / "a", [("A", 0, [9, 1])])
    for options, message in (
        ({"metric": "los"}, "column 'los' was not recorded (did you mean 'loss'?)"),
        ({"width": "page"}, "width 'page' given; column, text, or 1 to 40 inches is needed"),
        ({"width": 99}, "width 99 given"),
    ):
        with pytest.raises(InputError) as error:
            found.plot(against="bytes", **({"metric": "loss"} | options))
        assert message in str(error.value)
    empty = study(tmp_path / "b", [("A", 0, [], {"status": "waiting"})])
    with pytest.raises(InputError, match="has observed anything yet"):
        fedsim.load(empty.folder).plot()


def test_a_format_that_is_not_written_is_refused(many, tmp_path):
    """`--out figure.jpg` is told which formats there are; no `figure.jpg.png` appears."""
    with pytest.raises(InputError, match=r"figure.jpg: .png, .svg, .pdf are written"):
        many.plot(out=tmp_path / "figure.jpg")
    many.plot(out=tmp_path / "figure.v2")
    assert sorted(f.suffix for f in tmp_path.glob("figure*")) == [".pdf", ".png", ".svg"]


def test_a_study_that_is_not_over_is_drawn_and_claims_nothing(tmp_path):
    """Runs that wait have no line and no say; no caption says who needs less before all have ended."""
    runs = [("A", 0, [9, 5, 1]), ("B", 0, [9, 1]), ("C", 0, [], {"status": "waiting"})]
    (tmp_path / "s").mkdir()
    found = study(tmp_path / "s", runs)
    _, svg, _ = found.plot(against="bytes")
    assert {"A", "B"} <= set(words(svg))
    assert not any("fewer than" in word for word in words(svg))


def test_studies_of_one_name_are_told_apart(tmp_path):
    """Two folders called `out` are two lines."""
    found = [study(tmp_path / name / "out", [("A", 0, [9, 5, 1])]) for name in ("one", "two")]
    _, svg, _ = plot(found, out=tmp_path / "both")
    assert {"one/out: A", "two/out: A"} <= set(words(svg))


def test_the_bound_of_a_line_holds_for_all_its_runs(tmp_path):
    """Runs on data of their own have bounds of their own: the dashed line is above all; dotted where one is broken."""
    import matplotlib.pyplot as plt
    import numpy as np

    from fedsim.results.plots import _guarantee

    bound = {"metric": "loss", "source": "", "broken": []}
    bounds = [bound | {"rate": 0.3, "prefactor": 2.0}, bound | {"rate": 0.2, "prefactor": 3.0}]
    for broken, style in (([], "--"), (["start"], ":")):
        given = [("A", s, [9 - s, 5, 1], {"guarantee": b | {"broken": broken}}) for s, b in enumerate(bounds)]
        found = study(tmp_path / style.replace(":", "dotted"), given)
        figure, axis = plt.subplots()
        _guarantee(axis, found.runs, "loss", "round", "black")
        (line,) = axis.lines
        plt.close(figure)
        assert line.get_linestyle() == style
        for run, own in zip(found.runs, bounds, strict=True):
            first, rounds = run.metrics["loss"].iloc[0], run.metrics["round"].to_numpy()
            if not broken:
                assert (
                    line.get_ydata() >= own["prefactor"] * first * np.exp(-own["rate"] * rounds) * (1 - 1e-12)
                ).all()
