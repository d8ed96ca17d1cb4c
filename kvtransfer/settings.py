"""Limits and waits of the transfer agents; every wait that they make is bounded by one of these."""

from dataclasses import dataclass

MAX_SLOTS = 64
MIN_SLOT_BYTES = 4096
MAX_SLOT_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """One agent's limits; seconds and bytes. Raises ValueError when made with senseless values."""

    host: str = "127.0.0.1"
    port: int = 0
    slot_bytes: int = 512 << 10
    slots_per_connection: int = 6
    checksum: bool = True
    connect_s: float = 5.0
    hello_s: float = 2.0
    heartbeat_s: float = 1.0
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
