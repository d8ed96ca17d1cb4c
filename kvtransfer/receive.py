"""The receiving side of KV transfers: one agent for each decode rank.

Owns the granted transfers and all writes into the rank's KV memory: only this agent's thread
scatters, so a transfer that this thread has closed cannot be written to any more. Grants come
from the control path; nothing is accepted without one.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from kvtransfer import wire
from kvtransfer.addresses import Memory, tables_of
from kvtransfer.api import (
    AgentStats,
    Closed,
    Completed,
    Failed,
    Identity,
    Kept,
    PeerDown,
    PeerUp,
    ReceiveGrant,
    TransferEvent,
    TransferStats,
)
from kvtransfer.device_memory import Boxes, memories_of
from kvtransfer.errors import (
    GrantExpired,
    GrantRefused,
    ManifestMismatch,
    PeerLost,
    ProtocolViolation,
    StaleEpoch,
    TransferAborted,
    TransferError,
)
from kvtransfer.header import DataHeader
from kvtransfer.inbound import Connection, Inbound
from kvtransfer.incoming import Incoming, Source
from kvtransfer.layout import CacheLayout, Span, check_compatible
from kvtransfer.loop import AgentLoop
from kvtransfer.plan import plan_cache
from kvtransfer.receive_lanes import Landing
from kvtransfer.settings import TransferSettings
from kvtransfer.stats import Counters
from kvtransfer.transport import Accepted, ControlArrived, Done, Happening, Lost, Transport

logger = logging.getLogger(__name__)

# Of a piece that is in a cache group's memory: the group, the layers, and its blocks of this rank.
OnLanded = Callable[[int, Span, Sequence[int]], None]

_BUSY_TICK_S = 0.1
_IDLE_TICK_S = 60.0
_REMEMBERED_TRANSFERS = 1 << 16


class ReceiveAgent:
    """Takes granted KV from prefill ranks into one rank's blocks.

    All methods are thread-safe and return at once; outcomes are events, given to `on_event` from
    the agent's thread. Of each transfer comes at most one Completed or Failed; after it, and
    after Closed, nothing writes to its blocks. Closed comes once for each `revoke`.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        memories: Sequence[torch.Tensor],
        layout: CacheLayout,
        rank: int,
        identity: Identity,
        settings: TransferSettings,
        on_event: Callable[[TransferEvent], None],
        on_landed: OnLanded | None = None,
        boxes: Boxes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take each cache group's memory of `rank`: [layers, planes, blocks, heads, block_size,
        head_size]; with `boxes` it is a GPU's.

        `on_landed` is told of each piece when it is in a memory, in the agent's thread: before the
        event that ends its transfer. Raises ValueError where a memory does not fit the layout.
        """
        self._memories: tuple[Memory, ...] = memories_of(memories, layout, rank, boxes)
        self._transport = transport
        self._layout = layout
        self._rank = rank
        self._epoch = identity.epoch
        self._settings = settings
        self._on_event = on_event
        self._on_landed = on_landed
        self._clock = clock
        self._transfers: dict[int, Incoming] = {}
        self._over: OrderedDict[tuple[int, bytes], None] = OrderedDict()
        self._counters = Counters()
        self._inbound = Inbound(
            transport=transport,
            identity=identity,
            rank=rank,
            settings=settings,
            clock=clock,
            counters=self._counters,
            owner=self,
            boxes=boxes,
        )
        self._snapshot = AgentStats()
        self._loop = AgentLoop(f"kv-receive-{rank}", transport, self, clock)

    # ------------------------------------------------------------------ called from any thread

    def start(self) -> tuple[str, int]:
        """Start the agent; return (host, port) of its listener. Raises OSError where it cannot."""
        return self._loop.start(self._listen, self._settings.connect_s)

    def open(self, grant: ReceiveGrant) -> None:
        """Accept data under `grant` until it is complete, fails, expires or is revoked."""
        self._loop.call(lambda: self._open(grant))

    def revoke(self, transfer_id: int) -> None:
        """End a transfer; Closed follows, for an unknown or finished one too."""
        self._loop.call(lambda: self._revoke(transfer_id))

    def stats(self) -> AgentStats:
        """Return counters and slot states, at most a tick old."""
        return self._snapshot

    def close(self) -> None:
        """End all transfers (Failed) and connections; free threads, descriptors and slots."""
        self._loop.close()

    # --------------------------------------------------------------------------- loop's handler

    def handle(self, happening: Happening) -> None:
        """Act on one thing that the transport reports."""
        match happening:
            case Done(_, (number, key), error):
                self._inbound.done(number, key, error)
            case ControlArrived(link, message):
                self._inbound.arrived(link, message)
            case Accepted(link):
                self._inbound.accepted(link)
            case Lost(link, reason):
                self._inbound.lost(link, PeerLost(reason))

    def settle(self) -> bool:
        """Say what has been taken of a batch that was handled."""
        self._inbound.settle()
        return False

    def tick(self) -> float:
        """Expire grants, hellos and silent peers; send heartbeats."""
        now = self._clock()
        for incoming in list(self._transfers.values()):
            self._check_deadlines(incoming, now)
        self._inbound.tick()
        self._snap()
        if self._transfers or self._inbound.waiting:
            return min(_BUSY_TICK_S, self._settings.heartbeat_s)
        return self._settings.heartbeat_s if any(self._inbound) else _IDLE_TICK_S

    def shut(self) -> None:
        """Fail what is open and say goodbye."""
        for incoming in list(self._transfers.values()):
            self._fail(incoming, TransferAborted("the receiving agent closes"))
        self._inbound.shut()
        self._snap()

    def _listen(self) -> tuple[str, int]:
        return self._transport.listen(self._settings.host, self._settings.port)

    # ------------------------------------------------------------------------------ transfers

    def _open(self, grant: ReceiveGrant) -> None:
        now = self._clock()
        if grant.transfer_id in self._transfers:
            logger.error("transfer %016x is open already: grant ignored", grant.transfer_id)
            return
        try:
            incoming = self._begin(grant, now)
        except TransferError as exc:
            self._report_failed(grant.transfer_id, exc)
            return
        except ValueError as exc:
            self._report_failed(grant.transfer_id, GrantRefused(str(exc)))
            return
        self._transfers[grant.transfer_id] = incoming
        for connection in self._inbound:
            self._expect(incoming, connection)
        if incoming.complete:
            self._complete(incoming, now)

    def _begin(self, grant: ReceiveGrant, now: float) -> Incoming:
        if grant.epoch != self._epoch:
            raise StaleEpoch(f"the grant is of epoch {grant.epoch}, not {self._epoch}")
        if (grant.transfer_id, grant.nonce) in self._over:
            raise GrantRefused("a grant is good for one transfer")
        if len(self._transfers) >= self._settings.max_transfers:
            raise GrantRefused(f"{len(self._transfers)} transfers are open already")
        check_compatible(self._layout, grant.source_layout)
        tables = tables_of(self._memories, grant.block_ids, grant.total_tokens)
        plans = plan_cache(
            grant.source_layout, self._layout, grant.tokens, grant.total_tokens, grant.kept
        )
        return Incoming.begin(grant, self._layout, tables, plans, self._rank, now)

    def _expect(self, incoming: Incoming, connection: Connection) -> None:
        """Tie a source that has sent nothing yet to the connection that will bring it."""
        if connection.instance == incoming.grant.source_instance:
            source = incoming.sources.get(connection.rank)
            if source is not None and not source.checksums and source.manifest is None:
                source.connection = connection.number

    def _revoke(self, transfer_id: int) -> None:
        incoming = self._transfers.get(transfer_id)
        if incoming is None:
            self._emit(Closed(transfer_id))
            return
        self._end(incoming, TransferAborted("the receiver gave the transfer up"))
        self._emit(Closed(transfer_id, incoming.kept()))

    def _check_deadlines(self, incoming: Incoming, now: float) -> None:
        if now > incoming.deadline:
            ttl_s = incoming.grant.ttl_s
            self._fail(incoming, GrantExpired(f"not complete within {ttl_s:.1f} s"))
            return
        for rank, source in incoming.sources.items():
            waited = now - source.manifest_at
            if source.manifest and not source.confirmed and waited > self._settings.credit_stall_s:
                missing = source.missing_units
                text = f"source rank {rank} says it sent all, {missing} units are missing"
                self._fail(incoming, ManifestMismatch(text))
                return

    def _fail(self, incoming: Incoming, error: TransferError, *, keep: bool = True) -> None:
        self._end(incoming, error)
        kept = incoming.kept() if keep else ()
        self._report_failed(incoming.grant.transfer_id, error, kept)

    def _end(self, incoming: Incoming, error: TransferError | None) -> None:
        """Forget the transfer: from here on its pieces are late ones. Tells the sources."""
        grant = incoming.grant
        for connection in self._inbound:
            connection.lane.drop(grant.transfer_id)
        del self._transfers[grant.transfer_id]
        self._over[grant.transfer_id, grant.nonce] = None
        if len(self._over) > _REMEMBERED_TRANSFERS:
            self._over.popitem(last=False)
        if error is None:
            return
        for connection in self._inbound:
            if connection.instance == grant.source_instance and connection.rank in incoming.sources:
                _answer(connection, grant.transfer_id, grant.nonce, error)

    def _complete(self, incoming: Incoming, now: float) -> None:
        self._end(incoming, None)
        seconds = now - (incoming.started_at or now)
        self._counters.completed += 1
        self._counters.seconds += seconds
        stats = TransferStats(
            bytes=incoming.bytes,
            messages=incoming.messages,
            seconds=seconds,
            transport=incoming.carrier,
        )
        self._emit(Completed(incoming.grant.transfer_id, stats))

    def _report_failed(self, transfer_id: int, error: TransferError, kept: Kept = ()) -> None:
        self._counters.failed += 1
        self._emit(Failed(transfer_id, error, error.retryable, kept))

    def _emit(self, event: TransferEvent) -> None:
        self._snap()
        try:
            self._on_event(event)
        except Exception:
            logger.exception("the callback failed for %s", type(event).__name__)

    def _snap(self) -> None:
        self._snapshot = self._counters.snapshot(
            len(self._transfers), self._inbound.slot_counts(), self._inbound.peer_stats()
        )

    # ------------------------------------------------------------------- the connections' owner

    def connection_up(self, connection: Connection) -> None:
        """See inbound.Owner."""
        for incoming in self._transfers.values():
            self._expect(incoming, connection)
        self._emit(PeerUp(connection.instance, connection.rank, connection.carrier))

    def connection_down(self, connection: Connection, error: TransferError | None) -> None:
        """See inbound.Owner: a transfer that still needs the connection fails with it."""
        for incoming in list(self._transfers.values()):
            if any(
                source.connection == connection.number and not source.confirmed
                for source in incoming.sources.values()
            ):
                self._fail(incoming, error or PeerLost(f"{connection.instance} closed"))
        self._emit(PeerDown(connection.instance, connection.rank, connection.carrier, error))

    def control(self, connection: Connection, message: wire.Control) -> None:
        """See inbound.Owner."""
        match message:
            case wire.Manifest():
                self._manifest(connection, message)
            case wire.Abort(transfer_id, nonce):
                # Also what it told of a transfer that was over here before it knew.
                connection.lane.drop(transfer_id)
                found = self._find(connection, transfer_id, nonce)
                if found is not None:
                    self._fail(found[0], TransferAborted("the sender gave the transfer up"))
            case _:
                raise ProtocolViolation(f"{type(message).__name__} is not for a receiver")

    # ------------------------------------------------------------------------ the lanes' owner

    def announced(
        self, source: int, header: DataHeader, crc: int, checksummed: bool
    ) -> Landing | None:
        """See receive_lanes.Owner: a piece is checked against grant and plan, all but its bytes."""
        connection = self._inbound.of(source)
        if header.epoch != self._epoch:
            self._counters.stale_pieces += 1
            stale = StaleEpoch(f"of epoch {header.epoch}, this is {self._epoch}")
            _answer(connection, header.transfer_id, header.nonce, stale)
            return None
        found = self._find(connection, header.transfer_id, header.nonce)
        if found is None:
            return None
        incoming, owed = found
        owed.connection = connection.number
        try:
            self._check(header, checksummed, connection, incoming)
            incoming.check(owed, header)
        except TransferError as exc:
            self._counters.refused_pieces += 1
            self._fail(incoming, exc)
            return None
        incoming.started_at = incoming.started_at or self._clock()
        return Landing(
            header=header,
            crc=crc,
            memory=self._memories[header.group],
            table=incoming.tables[header.group],
            box=header.box(incoming.units[header.group]),
            source_layout=incoming.grant.source_layout,
            total_tokens=incoming.grant.total_tokens,
            owner_key=(incoming, owed),
        )

    def landed(self, source: int, landing: Landing) -> None:
        """See receive_lanes.Owner."""
        connection = self._inbound.of(source)
        incoming, owed = landing.owner_key
        header = landing.header
        incoming.accept(owed, header, landing.crc)
        connection.bytes += header.payload_bytes
        connection.messages += 1
        if self._on_landed is not None:
            block_size = self._layout.groups[header.group].block_size
            blocks = landing.table.blocks_of(header.tokens, block_size)
            self._on_landed(header.group, header.layers, blocks)
        self._advance(connection, incoming, owed)

    def refuse(self, source: int, landing: Landing, error: TransferError) -> None:
        """See receive_lanes.Owner."""
        incoming, _ = landing.owner_key
        self._counters.refused_pieces += 1
        self._fail(incoming, error)

    # ---------------------------------------------------------------------------------- checks

    def _find(
        self, connection: Connection, transfer_id: int, nonce: bytes
    ) -> tuple[Incoming, Source] | None:
        """Return what a message belongs to; one that belongs to nothing is counted and answered."""
        incoming = self._transfers.get(transfer_id)
        if incoming is None and (transfer_id, nonce) in self._over:
            self._counters.late_pieces += 1
            return None
        try:
            if incoming is None:
                raise GrantRefused("no such grant is open")
            return incoming, incoming.source_for(connection.instance, connection.rank, nonce)
        except GrantRefused as exc:
            self._counters.refused_pieces += 1
            _answer(connection, transfer_id, nonce, exc)
            return None

    def _check(
        self, header: DataHeader, checksummed: bool, connection: Connection, incoming: Incoming
    ) -> None:
        if connection.checksum and not checksummed:
            raise ProtocolViolation("a piece without the checksum that was asked for")
        if header.source_rank != connection.rank:
            raise ProtocolViolation("a piece in the name of another rank")
        if header.group >= len(self._memories):
            raise ProtocolViolation(f"cache group {header.group} does not exist")
        memory, unit = self._memories[header.group], incoming.units[header.group]
        want = memory.payload_bytes(header.box(unit))
        if header.payload_bytes != want:
            raise ProtocolViolation(f"{header.payload_bytes} payload bytes where {want} belong")

    def _manifest(self, connection: Connection, manifest: wire.Manifest) -> None:
        found = self._find(connection, manifest.transfer_id, manifest.nonce)
        if found is None:
            return
        incoming, source = found
        if source.manifest is not None or manifest.epoch != self._epoch:
            self._fail(incoming, ProtocolViolation("a second or foreign manifest"))
            return
        source.manifest, source.manifest_at = manifest, self._clock()
        source.connection = connection.number
        self._advance(connection, incoming, source)

    def _advance(self, connection: Connection, incoming: Incoming, source: Source) -> None:
        try:
            confirmed = incoming.confirm(source)
        except ManifestMismatch as exc:
            # What arrived is not what was sent: nothing of it is worth keeping.
            self._fail(incoming, exc, keep=False)
            return
        if not confirmed:
            return
        incoming.carrier = connection.carrier
        connection.seconds += self._clock() - (incoming.started_at or self._clock())
        grant = incoming.grant
        connection.link.send_control(wire.encode(wire.Ack(grant.transfer_id, grant.nonce)))
        if incoming.complete:
            self._complete(incoming, self._clock())


def _answer(connection: Connection, transfer_id: int, nonce: bytes, error: TransferError) -> None:
    message = wire.Fail(transfer_id, nonce, error.code, str(error))
    connection.link.send_control(wire.encode(message))
