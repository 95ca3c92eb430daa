"""What a run or a study left behind, read back."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.errors import InputError
from fedsim.locks import abandoned
from fedsim.results.folder import RUN, SCENARIO, RunFolder, from_json
from fedsim.results.recorder import read_metrics

if TYPE_CHECKING:
    import pandas as pd

STUDY = "study.json"
TUNING = "tuning"  # the folder, in that of a tuned study, of the runs that it picks by
TOTALS = ("gradients", "communications", "messages", "bytes", "queries", "wall_seconds")


@dataclass(frozen=True)
class Result:
    """One run. Works while the run is still going on, too.

    Attributes:
        folder: where it lies.
    """

    folder: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What `run.json` says: status, versions, machine, seed, digest, constants, totals, provenance."""
        return RunFolder(self.folder).read_run()

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row per observation; columns are the metrics and the cumulative counts."""
        return read_metrics(self.folder).to_pandas()

    @property
    def status(self) -> str:
        """`"finished"`, `"running"`, `"interrupted"` or `"failed"`.

        A run of this host whose process is gone without a word (killed) was interrupted, whatever it said last.
        """
        said = self.facts["status"]
        here = self.facts.get("machine", {}).get("host") == platform.node()
        return "interrupted" if said == "running" and here and abandoned(self.folder) else said

    @property
    def digest(self) -> str | None:
        """SHA-256 of the final state and counts; None until the run has ended."""
        return self.facts.get("digest")

    @property
    def variant(self) -> str:
        """Name of the variant in its study; the scenario's name outside of one."""
        return self.facts.get("variant") or self.facts.get("name", self.folder.name)

    @property
    def seed(self) -> int:
        """The seed it ran with."""
        return self.facts["seed"]

    @cached_property
    def queries(self) -> pd.DataFrame:
        """Every function value that was asked for: node, number, round, value, and x where points are short."""
        from fedsim.results.query_log import read_queries

        return read_queries(self.folder)

    @property
    def constants(self) -> list[dict[str, Any]]:
        """Derived constants: name, value, formula."""
        return self.facts.get("constants", [])

    @property
    def scenario(self) -> str:
        """The resolved scenario as YAML."""
        return (self.folder / SCENARIO).read_text()

    @property
    def runs(self) -> list[Result]:
        """The run itself, so that a run and a study are read alike."""
        return [self]

    def summary(self) -> dict[str, Any]:
        """Return what `fedsim run --json` prints."""
        metrics = self.metrics
        last = {} if metrics.empty else _plain(metrics.iloc[-1].to_dict(), metrics.dtypes)
        totals = {name: last.get(name, 0) for name in TOTALS}
        return {
            "folder": str(self.folder),
            "status": self.status,
            "digest": self.digest,
            "totals": totals,
            "last": last,
        }

    def compare(self, **question: Any) -> pd.DataFrame:
        """Return its row of a comparison; see `fedsim.compare`."""
        from fedsim.results.compare import compare

        return compare([self.folder], **question)

    def plot(self, **options: Any) -> list[Path]:
        """Draw metric against cost; see `fedsim.results.plots.plot`."""
        from fedsim.results.plots import plot

        return plot(self, **options)


@dataclass(frozen=True)
class StudyResult:
    """Several runs of one scenario: variants and seeds."""

    folder: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What `study.json` says."""
        return from_json((self.folder / STUDY).read_text())

    @cached_property
    def runs(self) -> list[Result]:
        """The runs, in the order of the scenario."""
        return [Result(self.folder / name) for name in self.facts["runs"]]

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """All runs in one long frame, with the columns `variant` and `seed` in front."""
        import pandas as pd

        frames = [pd.DataFrame({"variant": [], "seed": []})] if not self.runs else []
        for run in self.runs:
            frame = run.metrics.copy()
            frame.insert(0, "variant", run.variant)
            frame.insert(1, "seed", run.seed)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    @property
    def status(self) -> str:
        """`"finished"` when every run is, else the first other status; until a tuned study has picked, its tuning's."""
        if self.facts.get("select", {"choices": True})["choices"]:
            states = [run.status for run in self.runs]
        else:
            tuning = StudyResult(self.folder / TUNING)
            states = [*(run.status for run in tuning.runs if run.status not in ("finished", "failed")), "waiting"]
        return next((s for s in states if s != "finished"), "finished")

    @property
    def digest(self) -> str | None:
        """SHA-256 over the digests of the runs in order; None until all have ended."""
        return self.facts.get("digest")

    def summary(self) -> dict[str, Any]:
        """Return what `fedsim run --json` prints."""
        return {
            "folder": str(self.folder),
            "status": self.status,
            "digest": self.digest,
            "runs": [{"variant": run.variant, "seed": run.seed, **run.summary()} for run in self.runs],
        }

    def compare(self, **question: Any) -> pd.DataFrame:
        """Return what a value costs, or what a cost buys, by variant; see `fedsim.compare`."""
        from fedsim.results.compare import compare

        return compare([self.folder], **question)

    def plot(self, **options: Any) -> list[Path]:
        """Draw metric against cost, one line and band per variant; see `fedsim.results.plots.plot`."""
        from fedsim.results.plots import plot

        return plot(self, **options)


def load(folder: str | Path) -> Result | StudyResult:
    """Read a run's or a study's folder.

    Raises:
        InputError: it is neither.
    """
    path = Path(folder)
    if (path / STUDY).exists():
        return StudyResult(path)
    if (path / RUN).exists():
        return Result(path)
    raise InputError(f"{path}: neither a run ({RUN}) nor a study ({STUDY}); give a folder that `fedsim run` made")


def _plain(row: dict[str, Any], types: Any) -> dict[str, Any]:
    return {name: int(v) if types[name].kind == "i" else float(v) for name, v in row.items()}
