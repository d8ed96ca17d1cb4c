"""What callers hand to the agents and what they hear back.

Plain frozen values; no behaviour beyond checks when made.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvtransfer.errors import TransferError
from kvtransfer.header import NONCE_BYTES
from kvtransfer.layout import CacheLayout, Span
from kvtransfer.wire import COMPATIBILITY_BYTES, MAX_NAME_BYTES, MAX_TOKEN_BYTES

# What the target holds already: per cache group and layer, tokens from the sequence's start. Both
# sides of a transfer must be given the same; () means nothing.
Kept = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Who an agent is. `compatibility` is layout.compatibility_hash(); `token` is the receiver's
    secret for this epoch (a sender's own token is not used: it shows the one of its peer)."""

    instance: str
    epoch: int
    compatibility: bytes
    token: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not 0 < len(self.instance.encode()) <= MAX_NAME_BYTES:
            raise ValueError(f"instance name must have 1 to {MAX_NAME_BYTES} bytes")
        if len(self.compatibility) != COMPATIBILITY_BYTES:
            raise ValueError(f"compatibility hash must have {COMPATIBILITY_BYTES} bytes")
        _check_token(self.token)


@dataclass(frozen=True, kw_only=True)
class ReceiveGrant:
    """Leave for one source instance to write one sequence's KV into this rank's blocks, once.

    `block_ids` are, for each cache group, the sequence's blocks on this rank, in the order of the
    tokens it holds, from the sequence's first token on; only those of `tokens` are written, and
    of these not what is `kept`. The nonce has 16 bytes.
    """

    transfer_id: int
    epoch: int
    nonce: bytes = field(repr=False)
    tokens: Span
    total_tokens: int
    block_ids: Sequence[Sequence[int]] = field(repr=False)
    source_layout: CacheLayout = field(repr=False)
    source_instance: str
    ttl_s: float
    kept: Kept = field(default=(), repr=False)

    def __post_init__(self) -> None:
        _check_nonce(self.nonce)


@dataclass(frozen=True, kw_only=True)
class PeerAddress:
    """Where a decode instance's receive agents listen, and the token that they want to see."""

    instance: str
    epoch: int
    layout: CacheLayout = field(repr=False)
    ranks: tuple[tuple[int, str, int], ...]
    token: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _check_token(self.token)


@dataclass(frozen=True, kw_only=True)
class SendTransfer:
    """One sequence's KV on this rank, to go to `target_instance` under its grant.

    `epoch` and `nonce` are the grant's; `block_ids` as in ReceiveGrant, but of this rank. Its first
    share lies on cp rank `cp_first`, as the source layout of the grant has it.
    """

    transfer_id: int
    epoch: int
    nonce: bytes = field(repr=False)
    target_instance: str
    tokens: Span
    total_tokens: int
    block_ids: Sequence[Sequence[int]] = field(repr=False)
    target_layout: CacheLayout = field(repr=False)
    ttl_s: float
    kept: Kept = field(default=(), repr=False)
    cp_first: int = 0

    def __post_init__(self) -> None:
        _check_nonce(self.nonce)


def _check_nonce(nonce: bytes) -> None:
    if len(nonce) != NONCE_BYTES:
        raise ValueError(f"a grant's nonce must have {NONCE_BYTES} bytes, found {len(nonce)}")


def _check_token(token: bytes) -> None:
    if len(token) > MAX_TOKEN_BYTES:
        raise ValueError(f"token must have at most {MAX_TOKEN_BYTES} bytes, found {len(token)}")


@dataclass(frozen=True, slots=True)
class TransferStats:
    """What one finished transfer moved through this rank.

    `seconds` runs from the first piece to the manifest (sender: to the last acknowledgement).
    `hidden_bytes` left before the last layer was ready; only a sender knows.
    """

    bytes: int
    messages: int
    seconds: float
    transport: str
    hidden_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Completed:
    """Every byte arrived and was confirmed; nothing touches the blocks any more."""

    transfer_id: int
    stats: TransferStats


@dataclass(frozen=True, slots=True)
class Failed:
    """The transfer is over without success; nothing touches the blocks any more.

    `kept` is what of the sequence is complete on the receiving rank all the same, for a next grant.
    """

    transfer_id: int
    error: TransferError
    retryable: bool
    kept: Kept = ()


@dataclass(frozen=True, slots=True)
class Closed:
    """The answer to `revoke` or `abort`; nothing touches the blocks any more.

    `kept` as in Failed, where the transfer was still open.
    """

    transfer_id: int
    kept: Kept = ()


@dataclass(frozen=True, slots=True)
class PeerUp:
    """A connection to (from) one rank of a peer is ready."""

    instance: str
    rank: int
    transport: str


@dataclass(frozen=True, slots=True)
class PeerProbed:
    """A connection to one rank of a peer was tried out; `note` says what is wrong with it."""

    instance: str
    rank: int
    transport: str
    rtt_s: float
    bytes_per_s: float | None
    note: str


@dataclass(frozen=True, slots=True)
class PeerDown:
    """A connection to (from) one rank of a peer ended; an orderly end has no error."""

    instance: str
    rank: int
    transport: str
    error: TransferError | None


TransferEvent = Completed | Failed | Closed | PeerUp | PeerProbed | PeerDown


@dataclass(frozen=True, kw_only=True)
class PeerStats:
    """One connection's part of AgentStats; `seconds` are those in which its transfers ran."""

    instance: str
    rank: int
    transport: str
    bytes: int
    messages: int
    seconds: float = 0.0
    rtt_s: float | None = None
    probe_bytes_per_s: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class AgentStats:
    """Counters since start, and what is held right now.

    `seconds` are those of completed transfers. Of the time that pieces took, `pack_s` went into
    copying to a buffer, `checksum_s` into checksums, `scatter_s` into copying to the cache (on a
    mapped lane with its checksum), `wire_s` is from a piece's start to its end, summed over pieces
    that overlap. A stall is a time in which pieces were ready and none could leave. `hidden_bytes`
    left before the last layer was ready: compute hid them. Detection is from the last word of a
    peer to the loss of its connection.
    """

    bytes: int = 0
    messages: int = 0
    seconds: float = 0.0
    completed: int = 0
    failed: int = 0
    late_pieces: int = 0
    stale_pieces: int = 0
    refused_pieces: int = 0
    refused_hellos: int = 0
    lost_connections: int = 0
    detection_s: float = 0.0
    slowest_detection_s: float = 0.0
    pack_s: float = 0.0
    checksum_s: float = 0.0
    wire_s: float = 0.0
    scatter_s: float = 0.0
    stalls: int = 0
    stalled_s: float = 0.0
    hidden_bytes: int = 0
    active_transfers: int = 0
    connections: int = 0
    slots: dict[str, int] = field(default_factory=dict)
    peers: tuple[PeerStats, ...] = ()
