"""KV cache transfer between a prefill rank and a decode rank.

Owns layouts, plans and the data path. Knows nothing of models, requests or gRPC.
"""

from kvtransfer.api import (
    AgentStats,
    Closed,
    Completed,
    Failed,
    Identity,
    PeerAddress,
    PeerDown,
    PeerStats,
    PeerUp,
    ReceiveGrant,
    SendTransfer,
    TransferEvent,
    TransferStats,
)
from kvtransfer.errors import TransferError
from kvtransfer.layout import (
    KVLayout,
    KVShape,
    Shard,
    Span,
    check_compatible,
    compatibility_hash,
    uniform,
)
from kvtransfer.plan import Piece, Plan, plan
from kvtransfer.receive import ReceiveAgent
from kvtransfer.send import SendAgent
from kvtransfer.settings import TransferSettings
from kvtransfer.wire import NONCE_BYTES, PROTOCOL_VERSION

__all__ = [
    "NONCE_BYTES",
    "PROTOCOL_VERSION",
    "AgentStats",
    "Closed",
    "Completed",
    "Failed",
    "Identity",
    "KVLayout",
    "KVShape",
    "PeerAddress",
    "PeerDown",
    "PeerStats",
    "PeerUp",
    "Piece",
    "Plan",
    "ReceiveAgent",
    "ReceiveGrant",
    "SendAgent",
    "SendTransfer",
    "Shard",
    "Span",
    "TransferError",
    "TransferEvent",
    "TransferSettings",
    "TransferStats",
    "check_compatible",
    "compatibility_hash",
    "plan",
    "uniform",
]
