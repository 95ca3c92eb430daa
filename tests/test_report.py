"""The report of a run or a study: what stands in it, that it needs nothing else, and how a browser shows it."""

import base64
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

import fedsim
from fedsim.errors import Diverged, InputError
from fedsim.report import pictures
from fedsim.report.page import html, write
from fedsim.report.parts import Table, number, spread, text_of
from fedsim.results.result import StudyResult, load

CLAIM = "plain <script>alert(1)</script> descent & <b>a step</b> that is too large"
RING = {
    "name": "steps",
    "claim": CLAIM,
    "topology": {"kind": "ring", "n": 6},
    "problem": {"kind": "quadratic", "dim": 3},
    "algorithm": {"kind": "dpsgd", "eta": 0.05},
    "schedule": {"horizon": 60},
    "record": {"every": 5},
    "seeds": 2,
}
PRIVATE = {
    "name": "private",
    "claim": "privacy costs something",
    "topology": {"kind": "server", "n": 6},
    "problem": {
        "kind": "logistic",
        "l2": 1.0e-3,
        "data": {"kind": "breast_cancer", "normalise": "both"},
        "partition": {"kind": "sorted"},
    },
    "algorithm": {"kind": "dp_gd", "eta": 1.0, "clip_grad": 1.0},
    "privacy": {"epsilon": 1.0, "delta": 1e-5},
    "schedule": {"horizon": 8},
    "record": {"every": 2},
    "variants": {"epsilon 1": {}, "no privacy": {"privacy": None}},
}


class Page(HTMLParser):
    """The text of a page, its tables by caption (heading first), its resources, pictures and preformatted blocks."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.links, self.tags, self.images, self.blocks = {}, [], [], [], []
        self._words, self._inside, self._cell, self._rows, self._caption = [], [], None, [], ""
        self.feed(text)
        self.text = " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag, attrs):
        facts = dict(attrs)
        self.tags.append(tag)
        self.links += [facts[key] for key in ("src", "href", "action", "data", "srcset") if key in facts]
        if tag == "img":
            self.images.append(facts)
        if tag not in ("meta", "img", "link", "br"):
            self._inside.append(tag)
        if tag == "table":
            self._rows = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("th", "td", "caption", "pre"):
            self._cell = ""

    def handle_endtag(self, tag):
        self._inside.pop()
        if tag in ("th", "td"):
            self._rows[-1].append(self._cell)
        if tag == "caption":
            self._caption = self._cell
        if tag == "pre":
            self.blocks.append(self._cell)
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data
        if "style" not in self._inside:
            self._words.append(data)


@cache
def written(folder):
    """Return the file of a study that no test changes."""
    return write(folder)


def page_of(folder):
    return Page(written(folder).read_text())


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """A study of which one variant diverges."""
    folder = tmp_path_factory.mktemp("steps") / "study"
    with pytest.raises(Diverged):
        fedsim.run({**RING, "variants": {"small": {}, "<i>huge</i>": {"algorithm.eta": 1e4}}}, folder=folder)
    return folder


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    """A study with a partition, of which one variant is private."""
    folder = tmp_path_factory.mktemp("private") / "study"
    fedsim.run(PRIVATE, folder=folder)
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A tuned study made by hand: two reporting runs; two axes, four cells of which one failed before its first row."""
    folder = tmp_path_factory.mktemp("tuned") / "study"
    cells = [{"algorithm.eta": eta, "problem.dim": dim} for eta in (0.01, 0.1) for dim in (3, 4)]
    fedsim.run({**RING, "variants": {"D-PSGD": {"algorithm.eta": 0.1}}}, folder=folder)
    labels = {f"D-PSGD, eta={c['algorithm.eta']:g}, dim={c['problem.dim']}": c for c in cells}
    fedsim.run({**RING, "seed": 100, "seeds": 1, "variants": labels}, folder=folder / "tuning")
    axes = {"sweep": {"axes": {"D-PSGD": {"algorithm.eta": [0.01, 0.1], "problem.dim": [3, 4]}}}}
    for run in StudyResult(folder / "tuning").runs:
        _edit(run.folder / "run.json", {"of": "D-PSGD", "cell": labels[run.variant]})
    for run in StudyResult(folder).runs:
        _edit(run.folder / "run.json", {"of": "D-PSGD", "cell": cells[2]})
    last = StudyResult(folder / "tuning").runs[-1]
    (last.folder / "metrics.parquet").unlink()
    _edit(last.folder / "run.json", {"status": "failed", "error": "its process ended with code -9", "digest": None})
    choice = {"variant": "D-PSGD", "cell": cells[2], "value": 0.0123, "cells": 4, "failed": 1}
    choice["edges"] = ["algorithm.eta at its upper end 0.1"]
    select = {"metric": "distance", "best": "lowest", "at": {"communications": 200}, "seeds": [100]}
    select |= {"unequal": "the rival <has> one knob", "choices": [choice]}
    _edit(folder / "tuning" / "study.json", {"name": "steps, tuning", "claim": "", **axes})
    _edit(folder / "study.json", {**axes, "select": select})
    return folder


def _edit(file, changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without curves, which take most of the time."""
    monkeypatch.setattr(pictures, "curves", lambda result: ([], []))


def test_page_says_what_was_run_and_what_came_out(private):
    """Claim, settings, comparison, costs, constants with formulas, versions and digests are those of the folder."""
    page, study = page_of(private), load(private)
    assert "privacy costs something" in page.text
    assert ["problem.partition.kind", "sorted"] in page.tables["Settings of all runs"]
    for run in study.runs:
        row = next(row for row in page.tables["Totals of each variant"] if row[0] == run.variant)
        for name, total in run.facts["totals"].items():
            assert not total or f"{total:,}" in row, name
        assert any(
            run.digest in row and run.facts["scenario_digest"] in row for row in page.tables["Runs and their digests"]
        )
        constants = page.tables["Constants that the runs stand on"]
        assert all(any(c["name"] == row[0] and c["formula"] == row[-1] for row in constants) for c in run.constants)
    assert study.digest in page.text
    assert ["torch", study.runs[0].facts["versions"]["torch"]] in page.tables["Versions and machine"]
    assert any(caption.startswith("Cost to loss") or caption.startswith("Value at") for caption in page.tables)


def test_page_draws_figures_and_partition_with_words_for_them(private):
    """Every picture has an alternative text and a caption; one shows the partition."""
    page = page_of(private)
    assert all(len(image["alt"]) > 20 for image in page.images)
    assert sum(image["alt"].startswith("Line plot of ") for image in page.images) >= 3
    assert any("569 records" in image["alt"] for image in page.images)
    assert page.tags.count("figcaption") == len(page.images)
    assert "6 nodes meet only at a server" in page.text


def test_page_says_who_is_protected_from_what(private):
    """Epsilon per observer, unit, relation, trust model, what all runs spend together, and what is not covered."""
    page = page_of(private)
    promises = {row[0]: row[1:] for row in page.tables["What is promised, and to whom"]}
    assert promises[""] == ["epsilon 1"]
    assert promises["ε against who sees broadcasts"] == ["1"]
    assert promises["ε against the server"] == ["∞"]
    assert (promises["unit"], promises["relation"], promises["trust model"]) == (
        ["record"],
        ["replace_one"],
        ["central"],
    )
    assert "1 private runs on the same data spend together (1, 1e-05)-DP" in page.text
    assert "1 more protect nothing" in page.text
    assert "Outside of the guarantee, computed on the data themselves: " in page.text


def test_page_says_where_algorithms_come_from(steps, tmp_path, request):
    """Paper, provenance, differences, notes and the hypotheses that a guarantee lacks stand in it."""
    page, run = page_of(steps), load(steps).runs[0]
    assert run.facts["paper"] in page.text
    assert "written from the paper" in page.text
    request.getfixturevalue("undrawn")
    _copied(steps, tmp_path / "s")
    for one in load(tmp_path / "s").runs:
        bound = {
            "metric": "distance",
            "rate": 0.1,
            "prefactor": 2.0,
            "source": "Theorem 4",
            "broken": ["f is not convex"],
        }
        facts = {"algorithm": "dadao", "provenance": "reconstruction", "guarantee": bound, "notes": ["c is 1.5"]}
        _edit(one.folder / "run.json", facts)
    text = page_of(tmp_path / "s").text
    assert "a reconstruction" in text
    assert "Differences from the paper: Lemma 12 prints" in text
    assert "Theorem 4; a slope only, since these hypotheses are broken: f is not convex" in text
    assert "Note: c is 1.5" in text


def test_graph_is_drawn_with_its_rates(tmp_path):
    """Events on edges have rates: each kind gets a drawing, and its caption says so."""
    scenario = {**RING, "algorithm": {"kind": "dadao"}, "schedule": {"horizon": 3}, "record": {"every": 1}, "seeds": 1}
    variants = {"uniform": {"rates.kind": "uniform"}, "degree": {"rates.kind": "degree"}}
    fedsim.run({**scenario, "variants": variants}, folder=tmp_path / "s")
    alts = [image["alt"] for image in page_of(tmp_path / "s").images]
    drawn = [alt for alt in alts if alt.startswith("Drawing of the graph")]
    assert len(drawn) == 2
    assert "6 nodes, 6 edges; every node has 2 neighbours; widths of edges are uniform gossip rates" in drawn[0]
    assert "degree gossip rates" in drawn[1]


def test_graph_that_cannot_be_made_again_is_named(steps, tmp_path, undrawn):
    """A graph file that is gone leaves a sentence, not an error."""
    _copied(steps, tmp_path / "s")
    for run in load(tmp_path / "s").runs:
        file = run.folder / "scenario.yaml"
        file.write_text(file.read_text().replace("  kind: ring\n  n: 6\n", "  file: gone.yaml\n"))
    assert "is not drawn: " in page_of(tmp_path / "s").text


def _copied(source, to):
    shutil.copytree(source, to)


def test_runs_that_did_not_finish_are_named(steps, tmp_path, request):
    """Diverged runs stand at the top with their message, their lines end, and the study has no digest."""
    page = page_of(steps)
    assert "Not all of 4 runs finished: 2 finished, 2 diverged." in page.text
    rows = page.tables["Runs that did not finish"][1:]
    assert [row[:3] for row in rows] == [["<i>huge</i>", "0", "diverged"], ["<i>huge</i>", "1", "diverged"]]
    assert all("the run diverges" in row[3] for row in rows)
    assert any(re.search(r"<i>huge</i> ends at \d\S*e\+\d{3}", image["alt"]) for image in page.images)
    reached = next(rows for caption, rows in page.tables.items() if caption.startswith("Cost to distance"))
    huge = next(row for row in reached if row[0] == "<i>huge</i>")
    assert any(cell.startswith("not reached (2 of 2") for cell in huge)
    assert "none, as long as a run has none." in page.text
    request.getfixturevalue("undrawn")
    _copied(steps, tmp_path / "s")
    for name, status in zip(load(steps).facts["runs"], ("interrupted", "running", "failed", "waiting"), strict=True):
        elsewhere = {"status": status, "diverged": False, "machine": {"host": "another"}}
        _edit(tmp_path / "s" / name / "run.json", elsewhere)
    (tmp_path / "s" / name / "metrics.parquet").unlink()
    assert "Not all of 4 runs finished: 1 interrupted, 1 running, 1 failed, 1 waiting." in page_of(tmp_path / "s").text


def test_study_that_has_not_begun_has_a_page(tmp_path):
    """Runs that wait, without constants or metrics, give a page that says so."""
    from fedsim.scenario import load_study
    from fedsim.side_by_side import lay_out

    study = load_study(RING)
    for run in study.runs:
        lay_out(run, tmp_path / run.folder)
    names = [run.folder for run in study.runs]
    (tmp_path / "study.json").write_text(json.dumps({"name": "steps", "claim": CLAIM, "runs": names}))
    page = page_of(tmp_path)
    assert "Not all of 2 runs finished: 2 waiting." in page.text
    assert "There is nothing to draw yet." in page.text
    assert "Nothing has been spent yet." in page.text


def test_run_alone_has_a_page(steps):
    """A run's folder gives the page of this run."""
    page = page_of(load(steps).runs[0].folder)
    assert "The run finished." in page.text
    assert page.images


def test_tuning_is_shown_with_its_doubts(tuned):
    """Axes, cells, failed cells with their message, choices, the dagger of an edge, and the words for unequal cells."""
    page = page_of(tuned)
    assert page.tables["The grid"][1] == ["D-PSGD", "0.01, 0.1", "3, 4", "4", "3 finished, 1 failed"]
    assert page.tables["What was picked"][1] == [
        "D-PSGD†",
        "algorithm.eta: 0.1, problem.dim: 3",
        "0.0123",
        "4",
        "1",
        "algorithm.eta at its upper end 0.1",
    ]
    assert page.text.count("† D-PSGD: algorithm.eta at its upper end 0.1 of its grid; the best may lie beyond") == 2
    assert "Why: the rival <has> one knob" in page.text
    assert (
        "with the lowest distance at 200 communications (median over seeds) was picked, on the tuning seeds 100"
        in page.text
    )
    assert page.tables["Tuning runs that did not finish"][1][-1] == "its process ended with code -9"
    assert any(image["alt"].startswith("distance at 200 communications against algorithm.eta") for image in page.images)
    assert "2 of 2 runs finished. Tuning: Not all of 4 runs finished: 3 finished, 1 failed." in page.text


def test_sweep_without_selection_draws_few_of_many(tmp_path):
    """Of more cells than a picture can tell apart the best are drawn, and the page says that this is no selection."""
    etas = [round(0.01 * k, 2) for k in range(1, 11)]
    variants = {f"D-PSGD, eta={eta:g}": {"algorithm.eta": eta} for eta in etas}
    fedsim.run({**RING, "seeds": 1, "variants": variants}, folder=tmp_path / "s")
    for run, eta in zip(load(tmp_path / "s").runs, etas, strict=True):
        _edit(run.folder / "run.json", {"of": "D-PSGD", "cell": {"algorithm.eta": eta}})
    _edit(tmp_path / "s" / "study.json", {"sweep": {"axes": {"D-PSGD": {"algorithm.eta": etas}}}})
    page = page_of(tmp_path / "s")
    assert "of 10: those with the lowest distance at the end" in page.text
    assert page.tables["The grid"][1][-2:] == ["10", "10 finished"]
    assert any(image["alt"].startswith("distance at the end against algorithm.eta") for image in page.images)


def test_page_needs_nothing_else(steps, private, tuned):
    """No script, no link out, no font or style from elsewhere, in the page and in its pictures."""
    for folder in (steps, private, tuned):
        text = written(folder).read_text()
        page = Page(text)
        assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
        assert all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in page.links)
        style = text[text.index("<style>") : text.index("</style>")]
        assert "url(" not in style
        assert "@import" not in style
        for image in page.images:
            svg = base64.b64decode(image["src"].partition(",")[2]).decode()
            assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', svg))
            assert "<script" not in svg


def test_page_shows_markup_as_text(steps, tuned):
    """A claim, a variant or words of a scenario that hold markup are shown, never obeyed."""
    page = page_of(steps)
    assert CLAIM in page.text
    assert not {"script", "i", "b"} & set(page.tags)
    assert "has" not in page_of(tuned).tags


def test_equal_folders_give_equal_pages(steps):
    """Nothing of the day or of the process that draws stands in the page."""
    assert html(load(steps)) == html(load(steps))


def test_printed_commands_give_the_same_digest(steps, tmp_path):
    """The first command of a page, typed as it stands, ends with the digest that the page prints."""
    page, first = page_of(steps), load(steps).runs[0]
    line = next(line for block in page.blocks for line in block.splitlines() if line.startswith("fedsim run "))
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(line), "--json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == first.digest
    assert any(line.startswith("mpirun -n 4 fedsim run ") for block in page.blocks for line in block.splitlines())


@pytest.mark.slow
def test_sweep_comes_again_from_its_page(tmp_path):
    """study.yaml and the command of the page, with axes that were given on the command line, end with its digest."""
    from fedsim.sweeping import sweep

    given = {"sweep.algorithm.eta": [0.01, 0.1], "record.every": 20}
    first = sweep({**RING, "seeds": 1}, overrides=given, folder=tmp_path / "first")
    page = page_of(tmp_path / "first")
    line = next(block for block in page.blocks if block.startswith("fedsim sweep study.yaml "))
    (tmp_path / "study.yaml").write_text(next(block for block in page.blocks if block.startswith("name: steps\n")))
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(line), "--json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == first.digest is not None


def test_folder_that_is_no_study_is_refused(tmp_path):
    """The message names the folder and what is needed; the command ends with 2."""
    with pytest.raises(InputError, match=r"neither a run \(run.json\) nor a study \(study.json\); give a folder that"):
        write(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "fedsim", "report", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "neither a run" in done.stderr
    assert not list(tmp_path.iterdir())


def test_out_names_the_file(steps, tmp_path):
    """`out` is where the page goes; its folder is made."""
    file = write(steps, tmp_path / "new" / "page.html")
    assert file == tmp_path / "new" / "page.html"
    assert file.read_text().startswith("<!doctype html>")


def test_values_are_written_as_one_reads_them():
    """Large numbers have thousands, small ones exponents; infinity, nothing and yes are words or signs."""
    values = [1234567, 0.1, 1.5e-7, 3.0, float("inf"), float("nan"), None, True, [0.1, 2], {"a": 1}]
    assert [text_of(v) for v in values] == ["1,234,567", "0.1", "1.5e-07", "3", "∞", "–", "–", "yes", "0.1, 2", "a: 1"]
    assert number(1234.5) == "1,234"
    assert spread([1.0, 1.0]) == "1"
    assert spread([1.0, 2.0, 3.0]) == "2 [1.5, 2.5]"
    table = Table("t", ["name", "a", "formula"], [["x", "1", "1 / (4L)"]], words=("formula",))
    assert [table.is_number(k, cell) for k, cell in enumerate(table.rows[0])] == [False, True, False]


CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
MEASURE = """
const page = document.querySelector("iframe");
page.addEventListener("load", () => {
  const inside = page.contentDocument, images = [...inside.images];
  document.querySelector("p").textContent = JSON.stringify({
    screen: page.clientWidth, page: inside.documentElement.scrollWidth, images: images.length,
    drawn: images.filter(i => i.complete && i.naturalWidth > 0 && i.clientWidth > 0).length,
    tables: inside.querySelectorAll("table tbody tr").length,
    headings: [...inside.querySelectorAll("h1, h2, h3")].map(h => h.tagName),
    small: [...inside.querySelectorAll("p, td, a")].filter(e => parseFloat(getComputedStyle(e).fontSize) < 12).length,
  });
});
"""


def browse(url, folder, *options):
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=5000", *options, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console


def measured(text, folder, width):
    """Return what a browser says of a page that is shown so many pixels wide."""
    quoted = json.dumps(text).replace("</", "<\\/")  # a closing tag would end the script
    (folder / "frame.html").write_text(
        f'<!doctype html><p></p><iframe style="width: {width}px; height: 800px; border: 0"></iframe>'
        f"<script>{MEASURE} page.srcdoc = {quoted};</script>"
    )
    shown, console = browse((folder / "frame.html").as_uri(), folder, "--dump-dom")
    found = re.search(r"<p>(\{.*?\})</p>", shown)
    assert found, (shown[:500], console)
    return json.loads(found[1]), console


@in_browser
@pytest.mark.parametrize("study", ["steps", "private", "tuned"])
def test_browser_opens_the_page_without_errors(study, request, tmp_path):
    """Chromium says nothing on its console, and figures and tables are in the document."""
    file = written(request.getfixturevalue(study))
    shown, console = browse(file.resolve().as_uri(), tmp_path, "--dump-dom")
    assert not console
    page = Page(shown)
    assert {"h1", "h2", "main", "figure", "table", "nav"} <= set(page.tags)
    assert len(page.images) >= 4
    assert "Runs and their digests" in page.tables


@in_browser
@pytest.mark.parametrize("study", ["steps", "private", "tuned"])
def test_page_fits_a_phone(study, request, tmp_path):
    """At 390 pixels nothing is wider than the screen, every picture is drawn, and text is at least 12 pixels high."""
    text = written(request.getfixturevalue(study)).read_text()
    found, console = measured(text, tmp_path, 390)
    assert not console
    assert found["screen"] == 390
    assert found["page"] <= 390
    assert found["images"] == found["drawn"] > 0
    assert found["tables"] > 10
    assert found["small"] == 0
    assert found["headings"][0] == "H1"
    assert found["headings"].count("H1") == 1


@in_browser
def test_measure_sees_what_does_not_fit(tmp_path):
    """A page that is too wide, a picture that is none and a script that is barred are all found."""
    wide = '<h1>x</h1><div style="width: 900px">wide</div><img src="data:image/png;base64,AAAA">'
    found, _ = measured(f"<!doctype html><html><body>{wide}</body></html>", tmp_path, 390)
    assert found["page"] > 390
    assert (found["images"], found["drawn"]) == (1, 0)
    barred = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\"><script>1</script>"
    (tmp_path / "barred.html").write_text(f"<!doctype html><title>{escape('<b>')}</title>{barred}")
    _, console = browse(Path(tmp_path / "barred.html").as_uri(), tmp_path, "--dump-dom")
    assert console


@in_browser
def test_page_prints(tuned, tmp_path):
    """The browser makes a PDF of it."""
    file = written(tuned)
    browse(file.resolve().as_uri(), tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
