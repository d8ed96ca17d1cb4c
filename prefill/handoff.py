"""Joins the engine's progress to the transfer: what has been computed goes out as soon as it may.

Owns which request feeds which transfer. The engine's thread reports finished layers, the server's
thread brings grants, and either may come first. Knows nothing of scheduling or of block ownership:
the worker keeps a request's blocks until the transfer's end comes back as an event.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvtransfer import SendAgent, SendTransfer, Span
from service.peers import Grant


class Transfers(Protocol):
    """The transfers of an instance by request, whatever its ranks.

    Every method may be called from any thread and returns at once.
    """

    def expect(self, request_id: int) -> None:
        """A request will be transferred: its grant is welcome from now on."""
        ...

    def open(
        self, request_id: int, tokens: int, block_ids: Sequence[int], cp_first: int = 0
    ) -> None:
        """The request's blocks exist; its layers will follow. It begins at cp rank `cp_first`."""
        ...

    def grant(self, request_id: int, grant: Grant) -> None:
        """Decode has given leave: send what is ready, and the rest as it comes."""
        ...

    def cached(self, request_id: int, tokens: Span) -> None:
        """All layers of these tokens are final in memory."""
        ...

    def close(self, request_id: int) -> bool:
        """End a request; True where its transfer's end is still to come as an event."""
        ...

    def ended(self, transfer_id: int) -> int | None:
        """A transfer has ended, one way or another: whose it was, the first time it is asked."""
        ...


@dataclass(kw_only=True)
class _Outgoing:
    tokens: int = 0
    cp_first: int = 0
    block_ids: Sequence[int] | None = None
    grant: Grant | None = None
    # Ready before the grant came, in order: (layers, tokens).
    held: list[tuple[Span, Span]] = field(default_factory=list)


class Handoff:
    """The transfers of one prefill rank, from the first layer to the receiver's acknowledgement.

    See Transfers; and `ready` is for each layer of the steps that this rank computes.
    """

    def __init__(
        self,
        agent: SendAgent,
        layers: int,
        blocks_of: Callable[[Sequence[int]], Sequence[int]] = tuple,
        then: Callable[[Callable[[], None]], None] = lambda call: call(),
    ) -> None:
        """For a model of so many layers; `blocks_of` gives this rank's part of a block table.

        `then` calls when what is computed so far is where the agent reads it (CacheMemory.then).
        """
        self._agent = agent
        self._layers = layers
        self._blocks_of = blocks_of
        self._then = then
        self._lock = threading.Lock()
        self._outgoing: dict[int, _Outgoing] = {}
        self._requests: dict[int, int] = {}  # by transfer id, until the transfer has ended

    def expect(self, request_id: int) -> None:
        """A request will be transferred: its grant is welcome from now on."""
        with self._lock:
            self._outgoing[request_id] = _Outgoing()

    def open(
        self, request_id: int, tokens: int, block_ids: Sequence[int], cp_first: int = 0
    ) -> None:
        """The request's blocks exist; its layers will follow. It begins at cp rank `cp_first`."""
        with self._lock:
            outgoing = self._outgoing[request_id]
            outgoing.tokens = tokens
            outgoing.cp_first = cp_first
            outgoing.block_ids = self._blocks_of(block_ids)
            self._begin_if_possible(request_id, outgoing)

    def grant(self, request_id: int, grant: Grant) -> None:
        """Decode has given leave: send what is ready, and the rest as it comes."""
        with self._lock:
            outgoing = self._outgoing.get(request_id)
            if outgoing is not None and outgoing.grant is None:
                outgoing.grant = grant
                self._begin_if_possible(request_id, outgoing)

    def ready(self, request_id: int, layers: Span, tokens: Span) -> None:
        """The KV of these layers and tokens is final in memory."""
        with self._lock:
            outgoing = self._outgoing.get(request_id)
            if outgoing is None:
                return
            if outgoing.grant is None:
                outgoing.held.append((layers, tokens))
            else:
                self._agent.ready(outgoing.grant.transfer_id, layers, tokens)

    def cached(self, request_id: int, tokens: Span) -> None:
        """All layers of these tokens are final in memory."""
        self._then(lambda: self.ready(request_id, Span(0, self._layers), tokens))

    def close(self, request_id: int) -> bool:
        """End a request; True where its transfer's end is still to come as an event."""
        with self._lock:
            outgoing = self._outgoing.pop(request_id, None)
            if outgoing is None or outgoing.grant is None or outgoing.block_ids is None:
                return False
            self._agent.abort(outgoing.grant.transfer_id)
            return True

    def transfer_of(self, request_id: int) -> int | None:
        """The request's transfer, once it has begun and until the request is closed."""
        with self._lock:
            outgoing = self._outgoing.get(request_id)
            if outgoing is None or outgoing.grant is None or outgoing.block_ids is None:
                return None
            return outgoing.grant.transfer_id

    def ended(self, transfer_id: int) -> int | None:
        """A transfer has ended, one way or another: whose it was, the first time it is asked."""
        with self._lock:
            request_id = self._requests.pop(transfer_id, None)
            if request_id is not None:
                self._outgoing.pop(request_id, None)
            return request_id

    def _begin_if_possible(self, request_id: int, outgoing: _Outgoing) -> None:
        grant, block_ids = outgoing.grant, outgoing.block_ids
        if grant is None or block_ids is None:
            return
        self._requests[grant.transfer_id] = request_id
        self._agent.begin(
            SendTransfer(
                transfer_id=grant.transfer_id,
                epoch=grant.epoch,
                nonce=grant.nonce,
                target_instance=grant.instance,
                target_layout=grant.layout,
                tokens=grant.tokens,
                total_tokens=outgoing.tokens,
                block_ids=(tuple(block_ids),),
                ttl_s=grant.ttl_s,
                kept=grant.kept,
                cp_first=outgoing.cp_first,
            )
        )
        for layers, tokens in outgoing.held:
            self._agent.ready(grant.transfer_id, layers, tokens)
        outgoing.held.clear()
