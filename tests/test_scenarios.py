"""Every shipped scenario plays, as it is, in its short form."""

import json
import math
from pathlib import Path

import pytest

import fedsim

FOLDER = Path(__file__).parent.parent / "scenarios"
LONG = [*FOLDER.glob("paper/*.yaml"), FOLDER / "live-stragglers.yaml"]
SCENARIOS = [
    pytest.param(file, id=file.stem, marks=pytest.mark.slow if file in LONG else [])
    for file in sorted(FOLDER.rglob("*.yaml"))
]


@pytest.mark.parametrize("file", SCENARIOS)
def test_the_short_form_plays_and_leaves_a_readable_result(tmp_path, file):
    """The short form ends finished, with finite metrics, a digest and a picture."""
    try:
        result = fedsim.run(file, short=True, folder=tmp_path / "out")
    except fedsim.InputError as error:
        if "fedsim data get" not in str(error):
            raise
        pytest.skip(str(error))
    assert result.status == "finished"
    assert result.digest
    for run in result.runs:
        last = run.summary()["last"]
        assert all(math.isfinite(value) for name, value in last.items() if not name.startswith("epsilon"))
        json.dumps(run.summary())
    assert all(f.stat().st_size > 0 for f in result.plot())
