"""What a run has cost so far."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class Counts:
    """Cumulative costs over all nodes, as they happen; the same on every layout.

    Attributes:
        gradients, dual_gradients: calls of a node's gradient oracle.
        samples: per-record gradients.
        communications: edge activations: one mixing is |E|, a sum over m clients is m up and m down.
        messages: directed node-to-node payloads, self excluded.
        bytes: length of their encoded bodies, headers excluded; `bytes_up`, `bytes_down` with a server.
        exchanges: communication steps that cannot overlap.
        queries: function values asked for.
    """

    gradients: int = 0
    dual_gradients: int = 0
    samples: int = 0
    communications: int = 0
    messages: int = 0
    bytes: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    exchanges: int = 0
    queries: int = 0

    def charge_sum(self, up: int, down: int, bytes_up: int, bytes_down: int) -> None:
        """Add what a sum costs: payloads of those who send, and of those who receive it, and their lengths."""
        self.communications += up + down
        self.messages += up + down
        self.bytes += bytes_up + bytes_down
        self.bytes_up += bytes_up
        self.bytes_down += bytes_down

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return asdict(self)

    def restore(self, saved: dict[str, int]) -> None:
        """Set the counts to saved ones."""
        for name, value in saved.items():
            setattr(self, name, int(value))


@dataclass
class Packed:
    """What packets weigh, in bytes, beside the same values unpacked.

    Attributes:
        packed, dense: all that was sent along edges as packets, and what it would have been without.
        excess: bytes that packets of single requests weighed more than dense values.
    """

    packed: int = 0
    dense: int = 0
    excess: int = 0

    def add(self, packed: int, dense: int) -> None:
        """Add what one request sent."""
        self.packed, self.dense = self.packed + packed, self.dense + dense
        self.excess += max(0, packed - dense)

    def as_dict(self) -> dict[str, int]:
        """Return the numbers by name."""
        return asdict(self)
