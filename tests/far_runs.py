"""Runs on the CPU and on a device that is not there; prints what came out as JSON. See `test_accelerator`."""

import json
import sys
from pathlib import Path

import far
import torch

ADAM = {"kind": "adam", "step": 0.01}
RUNS = {
    "dproxsgt": {"kind": "dproxsgt", "eta": 0.1, "clip": 1.0, "final": "prox", "batch": {"size": 4}},
    "pre_mix": {"kind": "dproxsgt", "eta": 0.1, "tracker": "pre_mix"},
    "top-k": {"kind": "cdproxsgt", "eta": 0.1, "compress": {"kind": "top_k", "ratio": 0.3}},
    "drawn": {"kind": "cdproxsgt", "eta": 0.1, "compress": {"kind": "qsgd", "levels": 8}, "compress_y": "natural"},
    "random-k": {"kind": "choco_sgd", "eta": 0.1, "compress": {"kind": "random_k", "ratio": 0.3}},
    "beer": {"kind": "beer", "eta": 0.1, "compress": "sign"},
    "dpsgd": {"kind": "dpsgd", "eta": 0.1},
    "deepstorm": {"kind": "deepstorm", "eta": 0.1, "batch": {"size": 4, "kind": "epoch"}},
    "all-reduce": {"kind": "allreduce_sgd", "eta": 0.1},
    "fedavg": {"kind": "fedavg", "participants": 3, "local_steps": 2, "optimiser": ADAM},
    "scaffold": {"kind": "scaffold", "participants": 3, "local_steps": 2, "optimiser": ADAM},
}
COMPOSITE = ("dproxsgt", "pre_mix", "top-k", "drawn")


def scenario(name):
    r = {"composite": {"kind": "group_lasso", "weight": 1.0e-3, "size": 5}} if name in COMPOSITE else {}
    server = name in ("fedavg", "scaffold")
    data = {"kind": "synthetic_classification", "samples": 9, "dim": 6, "classes": 3}
    return {
        "topology": {"kind": "server", "n": 5} if server else {"kind": "ring", "n": 5},
        "problem": {"kind": "module", "model": "mlp", "hidden": [4], "data": data, **r},
        "start": {"kind": "problem"},
        "algorithm": RUNS[name],
        "schedule": {"horizon": 4},
        "checkpoint": {"every": 2},
        "engine": {"device": "cuda"},
    }


def played(name, folder, device, **more):
    """Return a run; on the device where one is given."""
    import fedsim
    import fedsim.prepare
    from fedsim.engine.machine import Device

    fedsim.prepare.usable = lambda _device, _transport: Device(device)
    return fedsim.run({**scenario(name), **more}, folder=folder)


def main(folder):
    """Play everything."""
    import fedsim

    there = str(far.device())
    found = {"runs": {}}
    for name in RUNS:
        away, here = played(name, folder / f"{name}-far", there), played(name, folder / f"{name}-here", "cpu")
        columns = [c for c in here.metrics if c not in ("wall_seconds", "variant")]
        of = lambda result, columns=columns: {c: result.metrics[c].tolist() for c in columns}
        found["runs"][name] = {"there": of(away), "here": of(here), "device": away.facts["problem"]["device"]}
    found["whole"] = fedsim.load(folder / "top-k-far").digest
    played("top-k", folder / "cut", there, schedule={"horizon": 2})
    (folder / "cut" / "scenario.yaml").write_text((folder / "top-k-far" / "scenario.yaml").read_text())
    facts = json.loads((folder / "top-k-far" / "run.json").read_text())
    (folder / "cut" / "run.json").write_text(json.dumps({**facts, "status": "interrupted"}))
    found["resumed"] = fedsim.resume(folder / "cut").digest
    try:
        torch.ones(3).to(there) + torch.ones(3)
    except RuntimeError as error:
        found["refused"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
