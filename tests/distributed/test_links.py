"""Rows between the devices of several processes."""

import re
import subprocess
from pathlib import Path

from launching import command

RANK = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from test_accelerator import REQUESTS, answers
from fedsim.transport.torchrun import GroupLinks, TorchTransport
transport = TorchTransport(60.0)
group = transport._dist.new_group(backend="gloo")
for name, make in REQUESTS.items():
    before = transport.moved
    ours, counts = answers(transport, make, GroupLinks(transport, transport._dist, group, "cpu"))
    moved = transport.moved - before
    theirs, same = answers(transport, make)
    assert counts == same and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), name
    assert moved > 0, name
print(f"rank {transport.rank} agrees", flush=True)
transport.close()
"""


def test_a_process_group_moves_what_host_memory_does(tmp_path):
    """The links that NCCL is used by, on gloo: the same answers and counts for every request on two processes."""
    (tmp_path / "rank.py").write_text(RANK)
    line = command("torch", 2, tmp_path / "rank.py", Path(__file__).parents[1])
    done = subprocess.run(line, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(re.findall(r"rank \d agrees", done.stdout)) == ["rank 0 agrees", "rank 1 agrees"]
