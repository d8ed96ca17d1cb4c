"""The seam between the service and what takes KV: the agent of one rank, or those of all as one."""

from collections.abc import Sequence
from typing import Protocol

from kvtransfer import ReceiveAgent, ReceiveGrant


class Receiver(Protocol):
    """Takes what comes under grants. How transfers end, its owner is told."""

    async def open(self, grant: ReceiveGrant, dp_rank: int) -> None:
        """Take KV for a sequence of a dp rank; returns when it may come."""
        ...

    def ranks_of(self, dp_rank: int) -> Sequence[int]:
        """Return the ranks that a dp rank's sequences are on."""
        ...

    def revoke(self, transfer_id: int) -> None:
        """End a transfer, if it has not ended; from any thread."""
        ...


class OwnReceiver:
    """The only rank's agent; see Receiver."""

    def __init__(self, agent: ReceiveAgent) -> None:
        self._agent = agent

    async def open(self, grant: ReceiveGrant, dp_rank: int) -> None:
        """See Receiver."""
        self._agent.open(grant)

    def ranks_of(self, dp_rank: int) -> Sequence[int]:
        """See Receiver."""
        return (0,)

    def revoke(self, transfer_id: int) -> None:
        """See Receiver."""
        self._agent.revoke(transfer_id)
