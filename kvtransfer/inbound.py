"""The receiver's connections: hello, choice of a lane, liveness.

Owns every link from its first byte to its last outstanding receive. Knows nothing of transfers:
its owner is told what arrived, and which connections come and go.
"""

import hmac
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from kvtransfer import receive_lanes, wire
from kvtransfer.api import Identity, PeerStats
from kvtransfer.device_memory import Boxes
from kvtransfer.errors import ConnectionRefused, PeerLost, StaleEpoch, TransferError
from kvtransfer.lane_choice import in_common, usable
from kvtransfer.mapped_caches import Caches, LentCaches, MappedCaches
from kvtransfer.receive_lanes import (
    Place,
    ReceiveLane,
    StreamReceive,
    TaggedReceive,
)
from kvtransfer.receive_mapped import MappedReceive
from kvtransfer.settings import TransferSettings
from kvtransfer.shared import MappedRegion, NotMappable, boot_id
from kvtransfer.slots import MAX_CONNECTION, SlotState
from kvtransfer.stats import Counters
from kvtransfer.transport import Link, Transport
from kvtransfer.wire import LaneKind

logger = logging.getLogger(__name__)

_REMEMBERED_INSTANCES = 4096
_HEARTBEAT = wire.encode(wire.Heartbeat())


@dataclass(slots=True, eq=False)
class Connection:
    """One source rank's link and the lane on which its payload comes."""

    link: Link
    number: int
    instance: str
    epoch: int
    rank: int
    lane: ReceiveLane
    carrier: str
    checksum: bool
    note: str
    heard_at: float
    beat_at: float
    bytes: int = 0
    messages: int = 0
    seconds: float = 0.0
    # A probe to be answered when its bytes are here: (number, bytes, microseconds).
    ping: tuple[int, int, int] | None = None


class Owner(receive_lanes.Owner, Protocol):
    """Whom the connections serve."""

    def connection_up(self, connection: Connection) -> None:
        """A source rank may send."""
        ...

    def connection_down(self, connection: Connection, error: TransferError | None) -> None:
        """A source rank is gone; None where it said goodbye."""
        ...

    def control(self, connection: Connection, message: wire.Control) -> None:
        """A control message about a transfer came; raises ProtocolViolation for a wrong one."""
        ...


class Inbound:
    """All connections of one receive agent; entered from the agent's thread only."""

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
        boxes: Boxes | None,
    ) -> None:
        self._transport = transport
        self._identity = identity
        self._rank = rank
        self._settings = settings
        self._clock = clock
        self._counters = counters
        self._owner = owner
        self._boxes = boxes
        self._pending: dict[Link, float] = {}
        self._open: dict[Link, Connection] = {}
        self._numbered: dict[int, Connection] = {}
        self._quarantine: set[Connection] = set()
        self._numbers = 0
        self._epochs: OrderedDict[str, int] = OrderedDict()
        self._ticked_at = clock()

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._open.values()))

    def of(self, number: int) -> Connection:
        """Return an open connection by its number."""
        return self._numbered[number]

    @property
    def waiting(self) -> bool:
        """Whether a stranger's hello is awaited."""
        return bool(self._pending)

    # ------------------------------------------------------------------------------- happenings

    def accepted(self, link: Link) -> None:
        """A stranger connected."""
        if len(self._pending) + len(self._open) >= self._settings.max_connections:
            self._refuse(link, TransferError("too many connections; try again later"))
        else:
            self._pending[link] = self._clock()

    def arrived(self, link: Link, message: bytes) -> None:
        """A control message came on `link`."""
        if link in self._pending:
            try:
                self._hello(link, wire.decode_hello(message, self._identity.compatibility))
            except TransferError as exc:
                self._refuse(link, exc)
            return
        connection = self._open.get(link)
        if connection is None:
            return
        connection.heard_at = self._clock()
        try:
            self._told(connection, wire.decode(message))
        except TransferError as exc:
            self.lost(link, exc)

    def _told(self, connection: Connection, message: wire.Control) -> None:
        if connection.lane.told(message):
            return
        match message:
            case wire.Heartbeat():
                pass
            case wire.Bye():
                self._drop(connection, None)
            case wire.Ping(number, probe_bytes):
                micros = int(connection.lane.probe_s * 1e6)
                connection.ping = (number, probe_bytes, micros)
                self._pong(connection)
            case other:
                self._owner.control(connection, other)

    def _pong(self, connection: Connection) -> None:
        if connection.ping is None or connection.lane.probed_bytes < connection.ping[1]:
            return
        number, _, micros = connection.ping
        connection.ping = None
        connection.link.send_control(wire.encode(wire.Pong(number, micros)))

    def done(self, number: int, key: Any, error: str | None) -> None:
        """Something that a connection's lane started is terminal."""
        connection = self._numbered.get(number)
        if connection is None:
            return
        is_open = connection.link in self._open
        if is_open and error is None:
            connection.heard_at = self._clock()
        try:
            connection.lane.done(key, error)
        except TransferError as exc:
            self.lost(connection.link, exc)
        except Exception as exc:
            # A bug of ours, met while the bytes of a transfer were handled: fail closed.
            logger.exception("error while handling a message")
            self.lost(connection.link, PeerLost(f"internal error {type(exc).__name__}"))
        self._pong(connection)
        if not is_open:
            self._settle_quarantine(connection)

    def settle(self) -> None:
        """Everything that came in one batch has been handled."""
        for connection in self:
            connection.lane.settle()

    def lost(self, link: Link, error: TransferError) -> None:
        """The link broke, or its peer misbehaved or fell silent."""
        if self._pending.pop(link, None) is not None:
            link.close()
            return
        connection = self._open.get(link)
        if connection is None:
            return
        self._counters.lost(self._clock() - connection.heard_at)
        logger.warning("lost %s rank %d: %s", connection.instance, connection.rank, error)
        self._drop(connection, error)

    def tick(self) -> None:
        """Expire hellos and silent peers; send heartbeats."""
        now = self._clock()
        settings = self._settings
        # A thread that was itself held up has heard nobody, and must not blame the peers.
        held_up = now - self._ticked_at > settings.heartbeat_s + settings.silence_s / 2
        self._ticked_at = now
        for link, since in list(self._pending.items()):
            if now - since > settings.hello_s:
                self._refuse(link, ConnectionRefused("no hello came in time"))
        for connection in self:
            if held_up:
                connection.heard_at = now
            silence = now - connection.heard_at
            if silence > settings.silence_s:
                text = f"{connection.instance} rank {connection.rank} silent for {silence:.1f} s"
                self.lost(connection.link, PeerLost(text))
            elif now - connection.beat_at >= settings.heartbeat_s:
                connection.beat_at = now
                connection.link.send_control(_HEARTBEAT)

    def shut(self) -> None:
        """Say goodbye and close."""
        for connection in self:
            connection.link.send_control(wire.encode(wire.Bye()))
            self._drop(connection, None)
        for link in self._pending:
            link.close()
        self._pending.clear()

    # ------------------------------------------------------------------------------------ hello

    def _refuse(self, link: Link, error: TransferError) -> None:
        self._counters.refused_hellos += 1
        logger.warning("connection refused: %s", error)
        self._pending.pop(link, None)
        link.send_control(wire.encode(wire.Refused(error.code, str(error))))
        link.close()

    def _hello(self, link: Link, hello: wire.Hello) -> None:
        self._check_hello(hello)
        settings, now = self._settings, self._clock()
        self._numbers += 1
        place = Place(
            link=link,
            number=self._numbers,
            rank=hello.rank,
            epoch=self._identity.epoch,
            settings=settings,
            counters=self._counters,
            owner=self._owner,
        )
        kind, lane, note = self._lane(place, hello)
        fresh = Connection(
            link=link,
            number=self._numbers,
            instance=hello.instance,
            epoch=hello.epoch,
            rank=hello.rank,
            lane=lane,
            carrier=lane.carrier,
            # The host sees no byte of what goes from GPU to GPU.
            checksum=settings.checksum and kind is not LaneKind.DEVICE,
            note=note,
            heard_at=now,
            beat_at=now,
        )
        self._epochs[hello.instance] = hello.epoch
        self._epochs.move_to_end(hello.instance)
        if len(self._epochs) > _REMEMBERED_INSTANCES:
            self._epochs.popitem(last=False)
        del self._pending[link]
        self._open[link] = self._numbered[fresh.number] = fresh
        tagged = kind is LaneKind.TAGGED
        welcome = wire.Welcome(
            connection=fresh.number,
            epoch=self._identity.epoch,
            lane=kind,
            window=settings.slots_per_connection if tagged else settings.window,
            slot_bytes=settings.slot_bytes,
            checksum=fresh.checksum,
            data_address=link.tagged.address if tagged else b"",
            note=note,
        )
        link.send_control(wire.encode(welcome))
        lane.start()
        self._owner.connection_up(fresh)
        self._supersede(fresh)

    def _lane(self, place: Place, hello: wire.Hello) -> tuple[LaneKind, ReceiveLane, str]:
        """Return the best lane that works, and why it is none of the better ones of this host."""
        here = usable(
            self._settings.lane, rdma=self._transport.rdma, on_device=self._boxes is not None
        )
        note = ""
        for kind in in_common(here, hello.lanes):
            if kind is LaneKind.TAGGED:
                place.link.tagged.open(hello.data_address)
                return kind, TaggedReceive(place), note
            if kind is LaneKind.STREAM:
                if hello.boot_id == boot_id() and self._settings.lane == "auto":
                    note = f"TCP between processes of one host: {note or 'no memory is shared'}"
                return kind, StreamReceive(place), note
            try:
                return kind, MappedReceive(place, self._caches(hello)), note
            except NotMappable as exc:
                note = str(exc)
        raise ConnectionRefused(f"no lane for KV works: {note}")

    def _caches(self, hello: wire.Hello) -> Caches:
        """Return what a peer of this host shares; raises NotMappable."""
        if hello.share is None:
            raise NotMappable("the peer shares no memory")
        region = MappedRegion(hello.share)
        if self._boxes is None:
            return MappedCaches(region, hello.offsets)
        return LentCaches(region, hello.offsets, hello.lent, self._boxes)

    def _check_hello(self, hello: wire.Hello) -> None:
        if not hmac.compare_digest(hello.token, self._identity.token):
            raise ConnectionRefused("the token is not this instance's")
        if hello.target_epoch != self._identity.epoch:
            raise StaleEpoch(
                f"meant for epoch {hello.target_epoch}, this is {self._identity.epoch}"
            )
        if hello.target_rank != self._rank:
            raise ConnectionRefused(f"meant for rank {hello.target_rank}, this is {self._rank}")
        if hello.epoch < self._epochs.get(hello.instance, 0):
            raise StaleEpoch(f"{hello.instance} has been here with a later epoch")
        if self._numbers + 1 >= MAX_CONNECTION:
            raise ConnectionRefused("connection numbers of this epoch are used up: restart it")

    def _supersede(self, fresh: Connection) -> None:
        """A rank that connects anew, or an instance that restarted, ends what it had before."""
        for old in self:
            if old is fresh or old.instance != fresh.instance:
                continue
            if old.epoch < fresh.epoch or old.rank == fresh.rank:
                self.lost(old.link, PeerLost(f"{old.instance} connected anew"))

    def _drop(self, connection: Connection, error: TransferError | None) -> None:
        """Close the link; what can still be written to is put aside, memory and all.

        A remote write may still be in flight: no other connection ever gets these buffers.
        """
        del self._open[connection.link]
        connection.lane.close()
        self._quarantine.add(connection)
        self._counters.bytes += connection.bytes
        self._counters.messages += connection.messages
        self._owner.connection_down(connection, error)
        connection.link.close()
        self._settle_quarantine(connection)

    def _settle_quarantine(self, connection: Connection) -> None:
        """Forget a closed connection when nothing can be written to its slots any more."""
        states = connection.lane.states()
        if not states[SlotState.GRANTED] and not states[SlotState.QUARANTINED]:
            self._quarantine.discard(connection)
            self._numbered.pop(connection.number, None)

    # ------------------------------------------------------------------------------------ stats

    def slot_counts(self) -> dict[str, int]:
        """Number of slots in each state, quarantined ones included."""
        counts: Counter[SlotState] = Counter()
        for connection in (*self._open.values(), *self._quarantine):
            counts.update(connection.lane.states())
        return {str(state): count for state, count in counts.items()}

    def peer_stats(self) -> list[PeerStats]:
        """What each open connection has brought."""
        return [
            PeerStats(
                instance=connection.instance,
                rank=connection.rank,
                transport=connection.carrier,
                bytes=connection.bytes,
                messages=connection.messages,
                seconds=connection.seconds,
                note=connection.note,
            )
            for connection in self._open.values()
        ]
