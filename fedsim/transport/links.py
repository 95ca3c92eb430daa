"""Rows that lie on accelerators, between processes: which device is whose, and how rows get from one to another."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from fedsim.transport.transport import as_bytes

if TYPE_CHECKING:
    from fedsim.transport.transport import Transport

Tensors = dict[int, torch.Tensor]


class Links(Protocol):
    """Moves tensors that stay on their device; both ends know type and shape. Rows are along the first axis."""

    def start(self, sends: Tensors, receives: Tensors) -> Callable[[], None]:
        """Begin to send a tensor to each peer in `sends` and to fill those in `receives`; return what waits."""
        ...

    def all_gather(self, mine: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        """Return every process's rows, in rank order; rank r has `counts[r]` of them."""
        ...

    def all_to_all(self, rows: torch.Tensor, lengths: list[int], expected: list[int]) -> torch.Tensor:
        """Send rank r its `lengths[r]` rows; return the `expected[r]` rows that came from rank r, by rank."""
        ...


class ThroughHost:
    """Copies to host memory and back, and lets the job's transport carry the bytes between."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def start(self, sends: Tensors, receives: Tensors) -> Callable[[], None]:
        """Copy what is sent; what comes is copied to the device when it is waited for."""
        buffers = {peer: np.empty(t.numel() * t.element_size(), np.uint8) for peer, t in receives.items()}
        wait = self._transport.start({peer: as_bytes(_host(t)) for peer, t in sends.items()}, buffers)

        def finish() -> None:
            wait()
            for peer, tensor in receives.items():
                tensor.copy_(_like(tensor, buffers[peer]))

        return finish

    def all_gather(self, mine: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        """See `Links`."""
        return [_like(mine, part).to(mine.device) for part in self._transport.all_gather(as_bytes(_host(mine)))]

    def all_to_all(self, rows: torch.Tensor, lengths: list[int], expected: list[int]) -> torch.Tensor:
        """See `Links`."""
        width = rows[:1].numel() * rows.element_size() if len(rows) else rows.new_empty(1, *rows.shape[1:]).nbytes
        raw = self._transport.all_to_all(
            as_bytes(_host(rows)), [n * width for n in lengths], [n * width for n in expected]
        )
        return _like(rows, raw).to(rows.device)


def own_device(devices: int, transport: Transport, name: Callable[[int], str]) -> tuple[int, bool]:
    """Return which device this process takes, and whether every process of the job has one of its own.

    Processes of a host take its devices in turn.

    Args:
        devices: how many this process sees. name: of device number i, unlike that of any other on this host.
    """
    host = socket.gethostname().encode()
    hosts = [part.tobytes() for part in transport.all_gather(np.frombuffer(host, np.uint8))]
    mine = sum(other == host for other in hosts[: transport.rank]) % devices
    full = host + b"/" + name(mine).encode()
    taken = [part.tobytes() for part in transport.all_gather(np.frombuffer(full, np.uint8))]
    return mine, len(set(taken)) == len(taken)


def _host(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


def _like(tensor: torch.Tensor, raw: np.ndarray) -> torch.Tensor:
    """Return bytes as rows of a tensor's type and shape."""
    return torch.frombuffer(raw, dtype=tensor.dtype).reshape(-1, *tensor.shape[1:]) if len(raw) else tensor[:0].cpu()
