"""KV cache transfer between a prefill rank and a decode rank.

Owns layouts, plans and the data path. Knows nothing of models, requests or gRPC.
"""

from kvtransfer.api import (
    AgentStats,
    Closed,
    Completed,
    Failed,
    Identity,
    Kept,
    PeerAddress,
    PeerDown,
    PeerProbed,
    PeerStats,
    PeerUp,
    ReceiveGrant,
    SendTransfer,
    TransferEvent,
    TransferStats,
)
from kvtransfer.errors import TransferError
from kvtransfer.header import NONCE_BYTES, PROTOCOL_VERSION
from kvtransfer.layout import (
    CacheLayout,
    KVLayout,
    KVShape,
    Shard,
    Span,
    check_compatible,
    compatibility_hash,
    uniform,
    uniform_cache,
)
from kvtransfer.plan import Plan, Region, plan
from kvtransfer.receive import ReceiveAgent
from kvtransfer.send import SendAgent
from kvtransfer.settings import TransferSettings
from kvtransfer.shared import SharedRegion

__all__ = [
    "NONCE_BYTES",
    "PROTOCOL_VERSION",
    "AgentStats",
    "CacheLayout",
    "Closed",
    "Completed",
    "Failed",
    "Identity",
    "KVLayout",
    "KVShape",
    "Kept",
    "PeerAddress",
    "PeerDown",
    "PeerProbed",
    "PeerStats",
    "PeerUp",
    "Plan",
    "ReceiveAgent",
    "ReceiveGrant",
    "Region",
    "SendAgent",
    "SendTransfer",
    "Shard",
    "SharedRegion",
    "Span",
    "TransferError",
    "TransferEvent",
    "TransferSettings",
    "TransferStats",
    "check_compatible",
    "compatibility_hash",
    "plan",
    "uniform",
    "uniform_cache",
]
