"""The sender's connections: attempts, hello, credits, liveness.

Owns one route for each rank of each peer. Knows nothing of transfers: its owner is told which
routes come and go, and what the receiver says about a transfer.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from kvtransfer import wire
from kvtransfer.api import Identity, PeerAddress, PeerStats
from kvtransfer.errors import PeerLost, ProtocolViolation, StaleEpoch, TransferError, from_code
from kvtransfer.probe import Probe
from kvtransfer.send_lanes import MappedSend, SendLane, StreamSend, TaggedSend
from kvtransfer.settings import TransferSettings
from kvtransfer.stats import Counters
from kvtransfer.transport import Link, Transport
from kvtransfer.wire import LaneKind

logger = logging.getLogger(__name__)

_BACKOFF_S = (0.05, 2.0)
_HEARTBEAT = wire.encode(wire.Heartbeat())
_LANES: dict[LaneKind, Callable[[Link, wire.Welcome, TransferSettings, Counters], SendLane]] = {
    LaneKind.MAPPED: MappedSend,
    LaneKind.DEVICE: MappedSend,
    LaneKind.STREAM: StreamSend,
    LaneKind.TAGGED: TaggedSend,
}


@dataclass(slots=True)
class Session:
    """What the receiver's welcome gave: the lane on which a route may send."""

    link: Link
    lane: SendLane
    carrier: str
    probe: Probe
    heard_at: float
    beat_at: float
    moved_at: float
    bytes: int = 0
    messages: int = 0
    seconds: float = 0.0
    stalled_at: float | None = None


@dataclass(slots=True, eq=False)
class Route:
    """The way to one rank of a peer: a session, or the attempts to get one."""

    peer: PeerAddress
    rank: int
    host: str
    port: int
    session: Session | None = None
    refused: TransferError | None = None
    attempt: Link | None = None
    attempt_at: float = 0.0
    next_attempt_at: float = 0.0
    backoff_s: float = _BACKOFF_S[0]


class Owner(Protocol):
    """Whom the routes serve."""

    def route_up(self, route: Route) -> None:
        """The route has a session now."""
        ...

    def route_down(self, route: Route, carrier: str, error: TransferError | None) -> None:
        """The route lost its session, or was refused one for good."""
        ...

    def probed(self, route: Route) -> None:
        """The route's session has been tried out."""
        ...

    def control(self, route: Route, message: wire.Control) -> None:
        """A control message about a transfer came; raises ProtocolViolation for a wrong one."""
        ...


class Outbound:
    """All routes of one send agent; entered from the agent's thread only."""

    def __init__(
        self,
        *,
        transport: Transport,
        identity: Identity,
        rank: int,
        settings: TransferSettings,
        clock: Callable[[], float],
        counters: Counters,
        owner: Owner,
        hello: Callable[[Link], wire.Hello],
    ) -> None:
        """`hello` makes what is said of this rank; the receiver's part is filled in here."""
        self._hello = hello
        self._transport = transport
        self._identity = identity
        self._rank = rank
        self._settings = settings
        self._clock = clock
        self._counters = counters
        self._owner = owner
        self._peers: dict[str, tuple[int, dict[int, Route]]] = {}
        self._links: dict[Link, Route] = {}
        self._ticked_at = clock()

    def __iter__(self) -> Iterator[Route]:
        return iter([route for _, routes in self._peers.values() for route in routes.values()])

    def epoch_of(self, instance: str) -> int | None:
        """Return the epoch in which a peer is known, None for a stranger."""
        known = self._peers.get(instance)
        return known[0] if known else None

    def route(self, instance: str, rank: int) -> Route | None:
        """Return the way to a rank of a peer."""
        known = self._peers.get(instance)
        return known[1].get(rank) if known else None

    @property
    def connecting(self) -> bool:
        """Whether some route is on the way to a session."""
        return any(route.session is None and route.refused is None for route in self)

    # ------------------------------------------------------------------------------------ peers

    def connect(self, peer: PeerAddress) -> bool:
        """Keep sessions with every rank of `peer`; whether its epoch is the one to use now."""
        known = self.epoch_of(peer.instance)
        if known is not None and peer.epoch < known:
            logger.warning("%s: epoch %d is older than %d", peer.instance, peer.epoch, known)
            return False
        if known is not None and peer.epoch > known:
            self.forget(peer.instance, StaleEpoch(f"{peer.instance} started anew"))
        _, routes = self._peers.setdefault(peer.instance, (peer.epoch, {}))
        now = self._clock()
        for rank, host, port in peer.ranks:
            route = routes.setdefault(rank, Route(peer, rank, host, port))
            route.refused = None
            if route.session is None and route.attempt is None:
                self._try(route, now)
        return True

    def forget(self, instance: str, error: TransferError | None) -> None:
        """Close all sessions with a peer; `error` is what its transfers fail with."""
        _, routes = self._peers.pop(instance, (0, {}))
        for route in routes.values():
            if route.session is not None:
                route.session.link.send_control(wire.encode(wire.Bye()))
            self._close(route, error)

    def _try(self, route: Route, now: float) -> None:
        route.attempt_at = now
        route.next_attempt_at = now + route.backoff_s
        route.backoff_s = min(route.backoff_s * 2, _BACKOFF_S[1])
        try:
            link = self._transport.connect(route.host, route.port)
        except OSError as exc:
            logger.warning("cannot reach %s rank %d: %s", route.peer.instance, route.rank, exc)
            return
        route.attempt = link
        self._links[link] = route

    def _close(self, route: Route, error: TransferError | None) -> None:
        """Close the route's link; sends outstanding keep their buffers until they are done."""
        session, route.session = route.session, None
        link = session.link if session else route.attempt
        route.attempt = None
        if link is None:
            return
        del self._links[link]
        if session is not None:
            self._counters.bytes += session.bytes
            self._counters.messages += session.messages
            self._owner.route_down(route, session.carrier, error)
        link.close()

    # ------------------------------------------------------------------------------- happenings

    def connected(self, link: Link) -> None:
        """The link's control lane is up: say hello."""
        route = self._links.get(link)
        if route is None:
            return
        hello = replace(
            self._hello(link),
            target_epoch=route.peer.epoch,
            target_rank=route.rank,
            token=route.peer.token,
        )
        link.send_control(wire.encode_hello(hello, self._identity.compatibility))

    def arrived(self, link: Link, message: bytes) -> None:
        """A control message came on `link`."""
        route = self._links.get(link)
        if route is None:
            return
        try:
            if route.session is None:
                self._answered(route, link, wire.decode(message))
            else:
                route.session.heard_at = self._clock()
                self._told(route, route.session, wire.decode(message))
        except TransferError as exc:
            self.lost(link, exc)

    def _answered(self, route: Route, link: Link, message: wire.Control) -> None:
        match message:
            case wire.Welcome():
                self._welcome(route, link, message)
            case wire.Refused(code, reason):
                error = from_code(code, reason)
                logger.warning("%s rank %d refuses: %s", route.peer.instance, route.rank, reason)
                self._close(route, error)
                # A peer of another epoch is not there any more: only a new address helps.
                if not error.retryable or isinstance(error, StaleEpoch):
                    route.refused = error
                    self._owner.route_down(route, "", error)
            case _:
                raise ProtocolViolation(f"{type(message).__name__} where a welcome belongs")

    def _told(self, route: Route, session: Session, message: wire.Control) -> None:
        if session.lane.told(message):
            session.moved_at = session.heard_at
            self._pump_probe(route, session)
            return
        match message:
            case wire.Heartbeat():
                pass
            case wire.Pong(number, micros):
                session.probe.answered(number, micros, self._clock())
                self._pump_probe(route, session)
            case wire.Bye():
                logger.info("%s rank %d says goodbye", route.peer.instance, route.rank)
                self._close(route, None)
                route.next_attempt_at = self._clock() + route.backoff_s
            case _:
                self._owner.control(route, message)

    def _pump_probe(self, route: Route, session: Session) -> None:
        probe = session.probe
        if not probe.over and probe.go_on(self._clock()):
            self._owner.probed(route)

    def _welcome(self, route: Route, link: Link, welcome: wire.Welcome) -> None:
        if welcome.epoch != route.peer.epoch:
            raise StaleEpoch(f"epoch {welcome.epoch} answers for {route.peer.epoch}")
        lane = _LANES[welcome.lane](link, welcome, self._settings, self._counters)
        now = self._clock()
        route.session = Session(
            link=link,
            lane=lane,
            carrier=lane.carrier,
            probe=Probe(link, lane, welcome, self._settings.probe_bytes),
            heard_at=now,
            beat_at=now,
            moved_at=now,
        )
        route.attempt, route.backoff_s = None, _BACKOFF_S[0]
        if welcome.note:
            logger.warning("%s rank %d: %s", route.peer.instance, route.rank, welcome.note)
        self._owner.route_up(route)
        self._pump_probe(route, route.session)

    def done(self, link: Link, lane: SendLane, key: Any, error: str | None) -> None:
        """Something that a lane started is terminal: its buffer is free again."""
        lane.done(key)
        route = self._links.get(link)
        if route is None or route.session is None:
            return
        route.session.moved_at = self._clock()
        if error is not None:
            self.lost(link, PeerLost(f"send failed: {error}"))
        else:
            self._pump_probe(route, route.session)

    def lost(self, link: Link, error: TransferError) -> None:
        """The link broke, or its peer misbehaved or fell silent."""
        route = self._links.get(link)
        if route is None:
            return
        now = self._clock()
        if route.session is not None:
            self._counters.lost(now - route.session.heard_at)
            logger.warning("lost %s rank %d: %s", route.peer.instance, route.rank, error)
        self._close(route, error)
        route.next_attempt_at = now + route.backoff_s

    def tick(self) -> None:
        """Expire attempts and silent peers; reconnect; send heartbeats."""
        now = self._clock()
        settings = self._settings
        # A thread that was itself held up has heard nobody, and must not blame the peers.
        held_up = now - self._ticked_at > settings.heartbeat_s + settings.silence_s / 2
        self._ticked_at = now
        for route in self:
            if route.session is not None:
                if held_up:
                    route.session.heard_at = now
                self._tick_session(route, route.session, now)
            elif route.attempt is not None:
                patience = settings.connect_s + settings.hello_s
                if now - route.attempt_at > patience:
                    text = f"{route.peer.instance} does not answer within {patience:.1f} s"
                    self.lost(route.attempt, PeerLost(text))
            elif route.refused is None and now >= route.next_attempt_at:
                self._try(route, now)

    def _tick_session(self, route: Route, session: Session, now: float) -> None:
        silence = now - session.heard_at
        if silence > self._settings.silence_s:
            text = f"{route.peer.instance} rank {route.rank} silent for {silence:.1f} s"
            self.lost(session.link, PeerLost(text))
        elif now - session.beat_at >= self._settings.heartbeat_s:
            session.beat_at = now
            session.link.send_control(_HEARTBEAT)

    # ------------------------------------------------------------------------------------ stats

    def slot_counts(self) -> dict[str, int]:
        """Number of send slots by use."""
        slots = [
            route.session.lane.slots
            for route in self
            if route.session is not None and isinstance(route.session.lane, TaggedSend | StreamSend)
        ]
        free = sum(each.free for each in slots)
        return {"free": free, "sending": sum(each.count for each in slots) - free}

    def peer_stats(self) -> list[PeerStats]:
        """What went out in each open session."""
        return [
            PeerStats(
                instance=route.peer.instance,
                rank=route.rank,
                transport=route.session.carrier,
                bytes=route.session.bytes,
                messages=route.session.messages,
                seconds=route.session.seconds,
                rtt_s=route.session.probe.rtt_s,
                probe_bytes_per_s=route.session.probe.bytes_per_s,
                note=route.session.probe.note,
            )
            for route in self
            if route.session is not None
        ]
