"""What ranks send each other in one collective, and how long that takes. Pure.

Counted for the rank that sends most: hops that follow each other, and bytes that leave it. The
usual account of latency and bandwidth (Hockney), as in Thakur et al., "Optimization of Collective
Communication Operations in MPICH", 2005.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Hops one after another, and the bytes of them; `large_bytes` move at their own rate."""

    hops: float = 0.0
    bytes: float = 0.0
    large_bytes: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.hops + other.hops,
            self.bytes + other.bytes,
            self.large_bytes + other.large_bytes,
        )

    def __mul__(self, times: float) -> "Traffic":
        return Traffic(self.hops * times, self.bytes * times, self.large_bytes * times)


@dataclass(frozen=True, kw_only=True)
class Link:
    """A way between ranks: seconds of a hop, and bytes a second up to a size and from there on."""

    latency_s: float
    bytes_per_s: float
    large_bytes_per_s: float
    large_message_bytes: float
    one_shot_max_bytes: float = 0.0

    def seconds(self, traffic: Traffic) -> float:
        """Return how long a rank is at it."""
        return (
            traffic.hops * self.latency_s
            + traffic.bytes / self.bytes_per_s
            + traffic.large_bytes / self.large_bytes_per_s
        )

    def all_reduce(self, message_bytes: float, ranks: int) -> Traffic:
        """Return the faster of ring and, where it is allowed, one shot."""
        ring = ring_all_reduce(message_bytes, ranks, self.large_message_bytes)
        if message_bytes > self.one_shot_max_bytes:
            return ring
        one_shot = one_shot_all_reduce(message_bytes, ranks, self.large_message_bytes)
        return min(ring, one_shot, key=self.seconds)


def _split(message_bytes: float, times: float, hops: float, large_from: float) -> Traffic:
    """Return the traffic of a message of which each rank sends `times` as much."""
    small = min(message_bytes, large_from)
    return Traffic(hops, small * times, (message_bytes - small) * times)


def ring_all_reduce(message_bytes: float, ranks: int, large_from: float = float("inf")) -> Traffic:
    """Reduce-scatter and all-gather round a ring: 2 (n - 1) hops of an n-th each."""
    hops = 2 * (ranks - 1)
    return _split(message_bytes, hops / ranks, hops, large_from)


def one_shot_all_reduce(
    message_bytes: float, ranks: int, large_from: float = float("inf")
) -> Traffic:
    """Everyone sends everything to everyone, and adds up by itself: one hop."""
    return _split(message_bytes, ranks - 1, min(1, ranks - 1), large_from)


def all_gather(message_bytes: float, ranks: int, large_from: float = float("inf")) -> Traffic:
    """Half of a ring's all-reduce; `message_bytes` is what each rank has in the end."""
    return ring_all_reduce(message_bytes, ranks, large_from) * 0.5


def all_to_all(rank_bytes: float, ranks: int, large_from: float = float("inf")) -> Traffic:
    """Each rank keeps an n-th of its bytes and sends the rest, straight to whom they are for."""
    return _split(rank_bytes, (ranks - 1) / ranks, min(1, ranks - 1), large_from)


def point_to_point(message_bytes: float, large_from: float = float("inf")) -> Traffic:
    """Send one message to one other rank."""
    return _split(message_bytes, 1, 1, large_from)
