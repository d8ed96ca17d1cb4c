"""Limits and waits of the transfer agents; every wait that they make is bounded by one of these."""

from dataclasses import dataclass
from typing import Literal, get_args

Lane = Literal["auto", "mapped", "stream", "ucx"]
MAX_SLOTS = 64
MIN_SLOT_BYTES = 4096
MAX_SLOT_BYTES = 64 << 20
MAX_PIECE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """One agent's limits; seconds and bytes. Raises ValueError when made with senseless values.

    `lane` is how payload may travel; "auto" takes memory mapped from a process of the same host,
    then UCX where it drives an RDMA device, then a TCP stream. `slot_bytes` is what is packed into
    one message, `piece_bytes` what goes at once straight from the cache; `window` counts pieces
    announced and not yet read on a mapped lane. With `probe_bytes` 0 pairs are not probed.
    """

    host: str = "127.0.0.1"
    port: int = 0
    slot_bytes: int = 512 << 10
    slots_per_connection: int = 6
    lane: Lane = "auto"
    piece_bytes: int = 2 << 20
    window: int = 8
    probe_bytes: int = 2 << 20
    checksum: bool = True
    connect_s: float = 5.0
    hello_s: float = 2.0
    heartbeat_s: float = 0.8
    heartbeat_misses: int = 3
    credit_stall_s: float = 2.0
    ack_s: float = 5.0
    max_connections: int = 256
    max_transfers: int = 4096

    def __post_init__(self) -> None:
        if not MIN_SLOT_BYTES <= self.slot_bytes <= MAX_SLOT_BYTES:
            raise ValueError(
                f"slot_bytes must be {MIN_SLOT_BYTES} to {MAX_SLOT_BYTES}, found {self.slot_bytes}"
            )
        if not self.slot_bytes <= self.piece_bytes <= MAX_PIECE_BYTES:
            raise ValueError(
                f"piece_bytes must be slot_bytes to {MAX_PIECE_BYTES}, found {self.piece_bytes}"
            )
        if self.lane not in get_args(Lane):
            raise ValueError(f"lane must be one of {get_args(Lane)}, found {self.lane!r}")
        if self.window < 1 or not 0 <= self.probe_bytes <= MAX_PIECE_BYTES:
            raise ValueError(f"window must be at least 1, probe_bytes 0 to {MAX_PIECE_BYTES}")
        if not 1 <= self.slots_per_connection <= MAX_SLOTS:
            raise ValueError(
                f"slots_per_connection must be 1 to {MAX_SLOTS}, found {self.slots_per_connection}"
            )
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be 0 to 65535, found {self.port}")
        for name in ("connect_s", "hello_s", "heartbeat_s", "credit_stall_s", "ack_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, found {getattr(self, name)}")
        if min(self.heartbeat_misses, self.max_connections, self.max_transfers) < 1:
            raise ValueError("heartbeat_misses, max_connections and max_transfers need at least 1")

    @property
    def silence_s(self) -> float:
        """How long a peer may say nothing before it counts as lost."""
        return self.heartbeat_s * self.heartbeat_misses
