"""A process of torchrun with a CUDA device, its rows over NCCL. See `test_cuda`.

Where there are fewer devices than processes, processes share one, which NCCL allows those of different hosts only: each
then says that it is a host of its own, and NCCL takes sockets between them.
"""

import os
import sys

import torch

if torch.cuda.device_count() < int(os.environ["WORLD_SIZE"]):
    os.environ["NCCL_HOSTID"] = f"rank{os.environ['RANK']}"

import fedsim
import fedsim.transport.links
from fedsim.transport.links import ThroughHost, own_device
from fedsim.transport.torchrun import GroupLinks, TorchTransport


def requests() -> None:
    """Compare the answers to all requests with those that come through host memory."""
    from test_accelerator import REQUESTS, answers

    transport = TorchTransport(60.0)
    number = transport.rank % torch.cuda.device_count()
    torch.cuda.set_device(number)
    links = transport.links(f"cuda:{number}", alone=True)
    assert isinstance(links, GroupLinks)
    for name, make in REQUESTS.items():
        before = transport.moved
        ours, counts = answers(transport, make, links, f"cuda:{number}")
        moved = transport.moved - before
        theirs, same = answers(transport, make, ThroughHost(transport), f"cuda:{number}")
        assert counts == same, name
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), name
        assert moved > 0, name
    print(f"rank {transport.rank} agrees", flush=True)
    transport.close()


def run(file: str, folder: str) -> None:
    """Play a scenario as if every process had a device of its own."""

    def alone(devices, transport, name):
        return own_device(devices, transport, name)[0], True

    fedsim.transport.links.own_device = alone
    fedsim.run(file, folder=folder)


if __name__ == "__main__":
    run(*sys.argv[1:]) if sys.argv[1:] else requests()
