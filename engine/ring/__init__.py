"""Attention over a sequence whose tokens are spread over ranks (context parallelism).

Owns the cut of tokens over ranks, the partial attention of a block, its merging, and the exchange
between ranks. Knows no models, no cache and no blocks of one.
"""

from engine.ring.choose import AttentionShape, Load, Speeds, Variant, choose
from engine.ring.comm import Comm, GroupComm, Traffic, Wire
from engine.ring.errors import CommError, RingError
from engine.ring.moves import move
from engine.ring.ring import GatherKV, PassKV, PassQ, RingAttention
from engine.ring.shards import Pieces, RingPlan, SequenceShards, zigzag

__all__ = [
    "AttentionShape",
    "Comm",
    "CommError",
    "GatherKV",
    "GroupComm",
    "Load",
    "PassKV",
    "PassQ",
    "Pieces",
    "RingAttention",
    "RingError",
    "RingPlan",
    "SequenceShards",
    "Speeds",
    "Traffic",
    "Variant",
    "Wire",
    "choose",
    "move",
    "zigzag",
]
