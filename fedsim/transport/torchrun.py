"""Processes started by torchrun: buffers over torch.distributed (gloo), rows on accelerators over NCCL."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from fedsim.transport.links import Links, Tensors
from fedsim.transport.transport import Bytes, Transport

LIFE = timedelta(days=365)  # gloo and NCCL have timeouts of their own; who waits too long, the job's watch says


def _to_send(buffer: Bytes) -> torch.Tensor:
    """Return the buffer as a tensor; torch warns of read-only ones, though nothing is written to what is sent."""
    return torch.from_numpy(buffer if buffer.flags.writeable else buffer.copy())


class TorchTransport(Transport):
    """A process group of torch.distributed on gloo.

    Args:
        timeout: seconds in which all processes must have come together.
    """

    kind = "torch"

    def __init__(self, timeout: float) -> None:
        import torch.distributed as dist

        self._dist: Any = dist
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        self._group = dist.new_group(backend="gloo", timeout=LIFE)
        self.rank, self.size, self.moved = dist.get_rank(), dist.get_world_size(), 0
        self.calls, self.waiting, self.asks = 0, False, (0, "")
        self._links: GroupLinks | None = None

    @contextmanager
    def _waits(self) -> Iterator[None]:
        """Say that this process waits for others; a lost connection may end that."""
        self.waiting = True
        yield
        self.calls, self.waiting = self.calls + 1, False

    def start(self, sends: dict[int, Bytes], receives: dict[int, Bytes]) -> Callable[[], None]:
        """Post all receives, then all sends."""
        works = [
            self._dist.irecv(torch.from_numpy(buffer), src=peer, group=self._group) for peer, buffer in receives.items()
        ]
        for peer, buffer in sends.items():
            works.append(self._dist.isend(_to_send(buffer), dst=peer, group=self._group))
            self.moved += buffer.nbytes

        def wait() -> None:
            with self._waits():
                for work in works:
                    work.wait()

        return wait

    def all_gather(self, mine: Bytes) -> list[Bytes]:
        """Exchange lengths, then buffers padded to the longest."""
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._waits():
            self._dist.all_gather(lengths, torch.tensor([mine.nbytes]), group=self._group)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: mine.nbytes] = _to_send(np.ascontiguousarray(mine))
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        with self._waits():
            self._dist.all_gather(parts, padded, group=self._group)
        self.moved += longest * (self.size - 1)
        return [part[: int(length)].numpy() for part, length in zip(parts, lengths, strict=True)]

    def all_to_all(self, sends: Bytes, lengths: list[int], expected: list[int]) -> Bytes:
        """Send all parts and receive all parts in one collective (`all_to_all_single`)."""
        arrived = torch.empty(sum(expected), dtype=torch.uint8)
        with self._waits():
            self._dist.all_to_all_single(arrived, _to_send(sends), expected, lengths, group=self._group)
        self.moved += sum(lengths) - lengths[self.rank]
        return arrived.numpy()

    def broadcast(self, buffer: Bytes | None, root: int = 0) -> Bytes:
        """Send the length, then the buffer."""
        length = torch.tensor([0 if buffer is None else buffer.nbytes])
        with self._waits():
            self._dist.broadcast(length, src=root, group=self._group)
        mine = self.rank == root and buffer is not None
        data = torch.from_numpy(np.array(buffer)) if mine else torch.empty(int(length), dtype=torch.uint8)
        with self._waits():
            self._dist.broadcast(data, src=root, group=self._group)
        return data.numpy()

    def links(self, device: str, alone: bool) -> Links:
        """Return links over NCCL where every process has a CUDA device of its own: one group for all runs of a job."""
        if not (alone and device.startswith("cuda")):
            return super().links(device, alone)
        if self._links is None:
            group = self._dist.new_group(backend="nccl", timeout=LIFE)
            self._links = GroupLinks(self, self._dist, group, device)
        return self._links

    def abort(self, message: str) -> None:
        """Print the message and end this process at once: torchrun then ends the others."""
        print(message, file=sys.stderr, flush=True)
        os._exit(1)

    def leaves_with_all(self, seconds: float) -> bool:
        """Return at once: torchrun ends the others when one ends with an error."""
        return True

    def close(self) -> None:
        """Wait for all processes and end the group."""
        with self._waits():
            self._dist.barrier(group=self._group)
        self._dist.destroy_process_group()


class GroupLinks:
    """Rows between the devices of a process group: NCCL, which does not touch host memory.

    Args:
        transport: counts what is moved. dist: torch.distributed. group: of all processes. device: this process's.
    """

    def __init__(self, transport: TorchTransport, dist: Any, group: Any, device: str) -> None:
        self._transport, self._dist, self._group = transport, dist, group
        # messages between two need connections between all, which the first collective makes
        dist.all_reduce(torch.zeros(1).to(device), group=group)

    def start(self, sends: Tensors, receives: Tensors) -> Callable[[], None]:
        """Post all receives and sends at once; see `Links`."""
        ops = [self._dist.P2POp(self._dist.irecv, t, peer, self._group) for peer, t in receives.items()]
        for peer, tensor in sends.items():
            ops.append(self._dist.P2POp(self._dist.isend, tensor.contiguous(), peer, self._group))
            self._transport.moved += tensor.numel() * tensor.element_size()
        works = self._dist.batch_isend_irecv(ops) if ops else []

        def wait() -> None:
            for work in works:
                work.wait()

        return wait

    def all_gather(self, mine: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        """Gather rows padded to the longest; see `Links`."""
        padded = mine.new_zeros(max(counts), *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in counts]
        self._dist.all_gather(parts, padded, group=self._group)
        self._transport.moved += padded.numel() * padded.element_size() * (len(counts) - 1)
        return [part[:count] for part, count in zip(parts, counts, strict=True)]

    def all_to_all(self, rows: torch.Tensor, lengths: list[int], expected: list[int]) -> torch.Tensor:
        """Send and receive all parts in one collective (`all_to_all_single`); see `Links`."""
        arrived = rows.new_empty(sum(expected), *rows.shape[1:])
        self._dist.all_to_all_single(arrived, rows.contiguous(), expected, lengths, group=self._group)
        away = sum(lengths) - lengths[self._transport.rank]
        self._transport.moved += away * rows.new_empty(1, *rows.shape[1:]).nbytes
        return arrived
