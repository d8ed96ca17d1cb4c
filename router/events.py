"""Owns what can happen to one try of a request at the pools, as `workers` tells `inflight`."""

from dataclasses import dataclass

from router.request import Tokens
from service.errors import ServiceError

# What either end says of a transfer that is lost, of which the other end may be the cause.
TRANSFER_LOST = frozenset(
    {
        "AckTimeout",
        "ChecksumMismatch",
        "ConnectionRefused",
        "CreditStalled",
        "GrantExpired",
        "GrantRefused",
        "LayoutMismatch",
        "ManifestMismatch",
        "PeerLost",
        "ProtocolViolation",
        "StaleEpoch",
        "StaleRead",
        "TransferAborted",
        "TransferClosed",
        "UnknownPeer",
    }
)


@dataclass(frozen=True, kw_only=True)
class Grant:
    """Decode's leave to write one request's KV; the router only hands it on.

    `cached_tokens` of the prompt decode had when it reserved: they are not sent.
    """

    transfer_id: int
    wire: bytes
    cached_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class FirstToken:
    """The prompt is computed, at prefill or at decode."""

    tokens: Tokens
    queue_s: float
    prefill_s: float
    cached_tokens: int


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """Decode has the whole KV and prefill has freed its own."""

    kv_bytes: int
    transport: str
    handoff_s: float


@dataclass(frozen=True)
class PrefillEnded:
    """Nothing more comes from prefill; `error` is None where it ended in order."""

    error: ServiceError | None


@dataclass(frozen=True)
class Granted:
    """Decode has reserved what the request needs."""

    grant: Grant


@dataclass(frozen=True)
class Regranted:
    """Decode waits for the rest of the KV from another prefill; None: it has the whole already."""

    grant: Grant | None


@dataclass(frozen=True, kw_only=True)
class TransferLost:
    """Decode does not count on a transfer any more, but keeps the reservation."""

    transfer_id: int
    error: ServiceError


@dataclass(frozen=True)
class ResumeFailed:
    """No other prefill instance could take a request over."""

    error: ServiceError


@dataclass(frozen=True)
class DecodeFailed:
    """Decode refused the reservation, failed at the work, or is lost."""

    error: ServiceError


@dataclass(frozen=True)
class Output:
    """What one decode step made for the request."""

    tokens: Tokens


PrefillEvent = FirstToken | Transferred | PrefillEnded


@dataclass(frozen=True, kw_only=True)
class Paused:
    """Decode has taken the request's sequence out of its batch, as asked, after its last Output.

    `tokens` have their KV there, at `ranks` of the instance; none are named where all have it.
    """

    tokens: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Sent:
    """The sequence's KV is at another decode instance, and the sequence has ended at this one."""

    kv_bytes: int
    transport: str


DecodeEvent = (
    Granted | Regranted | FirstToken | TransferLost | Output | Paused | Sent | DecodeFailed
)
Event = PrefillEvent | DecodeEvent | ResumeFailed
