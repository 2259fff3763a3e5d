"""What a kernel must move and compute at least: the floor that it is measured against."""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """Bytes to and from memory, and floating-point operations."""

    bytes: int
    flops: int

    def floor(self, bandwidth: float) -> float:
        """Seconds that the bytes take at ``bandwidth`` bytes per second: no kernel is faster."""
        return self.bytes / bandwidth
