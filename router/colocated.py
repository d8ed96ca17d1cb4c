"""Owns placement where instances are colocated: each computes the prompts of its own sequences.

How they are chosen is the policy's, which knows of nothing else than two roles: it is shown a
prefill instance that costs nothing, and chooses among the others as among decode instances.
"""

import sys
from collections.abc import Sequence

from router.policy import RoutingPolicy
from router.views import (
    CachedTokens,
    Capacity,
    DecodeView,
    InstanceKey,
    Need,
    Placement,
    PrefillView,
)

_NOWHERE = PrefillView(
    key=InstanceKey("", 0),
    capacity=Capacity(
        blocks=1, block_size=sys.maxsize, max_sequences=1, max_sequence_tokens=sys.maxsize
    ),
    owed_tokens=(0,),
    outstanding_requests=0,
    max_outstanding_requests=1,
)


def choose(
    policy: RoutingPolicy, decodes: Sequence[DecodeView], need: Need, cached_tokens: CachedTokens
) -> Placement | None:
    """Returns a placement at one instance alone, or None where the request fits nowhere now."""
    found = policy.choose([_NOWHERE], decodes, need, cached_tokens)
    if found is None or found.decode is None:
        return None
    known = cached_tokens(found.decode, found.dp_rank)
    return Placement(
        prefill=None,
        decode=found.decode,
        # The last token is computed in any case, for its logits.
        cached_tokens=min(known, need.prompt_tokens - 1),
        dp_rank=found.dp_rank,
    )
