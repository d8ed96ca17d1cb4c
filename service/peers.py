"""Which decode instances a rank may send KV to, and the leave that they give.

Owns what the router last said of these instances.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from twinpool.v1 import kv_pb2, worker_pb2

from kvtransfer import CacheLayout, Kept, PeerAddress, SendAgent, Span
from service.errors import WorkFailed
from service.wire import (
    addresses_from_wire,
    kept_from_wire,
    kept_to_wire,
    layout_from_wire,
    span_from_wire,
    span_to_wire,
)


@dataclass(frozen=True, kw_only=True)
class Grant:
    """Leave to write one request's KV to one decode instance, and the layout of its `ranks`.

    What is `kept` there has arrived from elsewhere and is not sent.
    """

    transfer_id: int
    epoch: int
    nonce: bytes
    tokens: Span
    ttl_s: float
    instance: str
    layout: CacheLayout
    kept: Kept = ()
    ranks: tuple[int, ...] = ()


class Peers:
    """The decode instances that this rank may send to, as the router last named them."""

    def __init__(self, agent: SendAgent) -> None:
        self._agent = agent
        self._known: dict[str, tuple[int, CacheLayout]] = {}

    def update(self, peers: Iterable[worker_pb2.Peer]) -> None:
        """Connect to new peers and newer epochs, and let go of those that are gone."""
        peers = list(peers)
        for name in self._known.keys() - {peer.name for peer in peers}:
            del self._known[name]
            self._agent.forget(name)
        for peer in peers:
            layout = layout_from_wire(peer.layout)
            self._known[peer.name] = (peer.epoch, layout)
            self._agent.connect(
                PeerAddress(
                    instance=peer.name,
                    epoch=peer.epoch,
                    layout=layout,
                    ranks=tuple(addresses_from_wire(peer.layout)),
                    token=peer.data_token,
                )
            )

    def grant(self, message: kv_pb2.Grant) -> Grant:
        """A grant with the layout of the instance that gave it.

        Raises:
            WorkFailed: The router has not named this instance, or not this epoch of it, or not the
                ranks of the grant.
        """
        epoch, layout = self._known.get(message.instance, (None, None))
        if layout is None or epoch != message.epoch:
            raise WorkFailed(
                f"decode instance {message.instance!r} with epoch {message.epoch} is not a peer",
                reason="UnknownPeer",
                retryable=True,
            )
        return Grant(
            transfer_id=message.transfer_id,
            epoch=message.epoch,
            nonce=message.nonce,
            tokens=span_from_wire(message.tokens),
            ttl_s=message.ttl_ms / 1000,
            instance=message.instance,
            layout=_part(layout, message),
            kept=kept_from_wire(message.kept),
            ranks=tuple(message.ranks),
        )


def _part(layout: CacheLayout, grant: kv_pb2.Grant) -> CacheLayout:
    """Return the layout of the ranks that a grant is for."""
    if not grant.ranks:
        return layout
    try:
        return layout.of_ranks(set(grant.ranks))
    except ValueError as error:
        raise WorkFailed(
            f"decode instance {grant.instance!r} grants to ranks that do not hold a whole cache",
            reason="LayoutMismatch",
            retryable=False,
        ) from error


def grant_to_wire(grant: Grant) -> kv_pb2.Grant:
    """A grant as decode gave it."""
    return kv_pb2.Grant(
        transfer_id=grant.transfer_id,
        epoch=grant.epoch,
        nonce=grant.nonce,
        tokens=span_to_wire(grant.tokens),
        ttl_ms=max(1, int(grant.ttl_s * 1000)),
        instance=grant.instance,
        kept=kept_to_wire(grant.kept),
        ranks=grant.ranks,
    )
