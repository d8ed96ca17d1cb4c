"""The sending side of KV transfers: one agent for each rank that sends, of prefill or decode.

Owns the transfers under way and all reads of this rank's KV memory for them: only this agent's
thread packs and sends, so of a transfer that this thread has closed nothing is sent any more. Where
the receiver reads the memory for itself, the end of the transfer's lease tells it that what it
read from then on is worth nothing.
"""

import logging
import time
from collections import deque
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
    PeerAddress,
    PeerDown,
    PeerUp,
    SendTransfer,
    TransferEvent,
    TransferStats,
)
from kvtransfer.device_memory import Boxes, memories_of
from kvtransfer.errors import (
    AckTimeout,
    CreditStalled,
    GrantExpired,
    GrantRefused,
    PeerLost,
    ProtocolViolation,
    StaleEpoch,
    TransferAborted,
    TransferError,
    from_code,
)
from kvtransfer.layout import CacheLayout, Span, check_compatible
from kvtransfer.loop import AgentLoop
from kvtransfer.offer import make_offer
from kvtransfer.outbound import Outbound, Route, Session
from kvtransfer.outgoing import Lane, Outgoing
from kvtransfer.plan import plan_cache
from kvtransfer.probe import lagging
from kvtransfer.send_pieces import PieceSender
from kvtransfer.settings import TransferSettings
from kvtransfer.shared import SharedRegion, boot_id
from kvtransfer.stats import Counters
from kvtransfer.transport import (
    Connected,
    ControlArrived,
    Done,
    Happening,
    Link,
    Lost,
    Transport,
)
from kvtransfer.wire import LaneKind

logger = logging.getLogger(__name__)

_BUSY_TICK_S = 0.1
_IDLE_TICK_S = 60.0

_Turn = deque[tuple[Outgoing, Lane]]


class SendAgent:
    """Sends a rank's KV to decode ranks as compute finishes it, under their grants.

    All methods are thread-safe and return at once; outcomes are events, given to `on_event` from
    the agent's thread. Of each transfer comes at most one Completed or Failed; after it, and
    after Closed, nothing reads its blocks. Closed comes once for each `abort`.
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
        region: SharedRegion | None = None,
        boxes: Boxes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take each cache group's memory of `rank`: [layers, planes, blocks, heads, block_size,
        head_size]. With a `region` from which they were allocated, receivers on this host may map
        them. With `boxes` they are a GPU's, and are lent under the region's leases.

        Raises ValueError where a memory does not fit the layout or is not of the region, OSError
        where it cannot be lent.
        """
        self._memories: tuple[Memory, ...] = memories_of(memories, layout, rank, boxes)
        self._region = region
        self._offer = make_offer(memories, region, boxes, settings.lane, rdma=transport.rdma)
        self._transport = transport
        self._identity = identity
        self._layout = layout
        self._rank = rank
        self._settings = settings
        self._on_event = on_event
        self._clock = clock
        self._transfers: dict[int, Outgoing] = {}
        self._turns: dict[Route, _Turn] = {}
        self._counters = Counters()
        self._outbound = Outbound(
            transport=transport,
            identity=identity,
            rank=rank,
            settings=settings,
            clock=clock,
            counters=self._counters,
            owner=self,
            hello=self._hello,
        )
        self._pieces = PieceSender(self._memories, region, rank, clock)
        self._snapshot = AgentStats()
        self._loop = AgentLoop(f"kv-send-{rank}", transport, self, clock)

    # ------------------------------------------------------------------ called from any thread

    def start(self) -> None:
        """Start the agent's thread."""
        self._loop.start(lambda: None, self._settings.connect_s)

    def connect(self, peer: PeerAddress) -> None:
        """Keep connections to all ranks of `peer`; a later epoch replaces an earlier one."""
        self._loop.call(lambda: self._connect(peer))

    def forget(self, instance: str) -> None:
        """Close the connections to `instance` and fail its transfers."""
        self._loop.call(lambda: self._forget(instance))

    def begin(self, transfer: SendTransfer) -> None:
        """Take a transfer on; what is ready goes out as soon as the peer is connected."""
        self._loop.call(lambda: self._begin(transfer))

    def ready(self, transfer_id: int, layers: Span, tokens: Span, group: int = 0) -> None:
        """Say that the cache of these layers (of a group) and tokens is final in memory.

        A group's fixed state is final with the sequence's last token.
        """
        self._loop.call(lambda: self._ready(transfer_id, layers, tokens, group))

    def abort(self, transfer_id: int) -> None:
        """End a transfer; Closed follows, for an unknown or finished one too."""
        self._loop.call(lambda: self._abort(transfer_id))

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
            case Done(link, (lane, key), error):
                self._outbound.done(link, lane, key, error)
            case ControlArrived(link, message):
                self._outbound.arrived(link, message)
            case Connected(link):
                self._outbound.connected(link)
            case Lost(link, reason):
                self._outbound.lost(link, PeerLost(reason))

    def settle(self) -> bool:
        """Send one message on each route that can; whether any route can send more at once."""
        more = False
        for route in list(self._turns):
            more = self._send_one(route) or more
        return more

    def tick(self) -> float:
        """Expire transfers, attempts and silent peers; reconnect; send heartbeats."""
        now = self._clock()
        for outgoing in list(self._transfers.values()):
            self._check_deadlines(outgoing, now)
        self._outbound.tick()
        self._snap()
        if self._transfers or self._outbound.connecting:
            return min(_BUSY_TICK_S, self._settings.heartbeat_s)
        return self._settings.heartbeat_s if any(self._outbound) else _IDLE_TICK_S

    def shut(self) -> None:
        """Fail what runs and say goodbye."""
        for outgoing in list(self._transfers.values()):
            self._fail(outgoing, TransferAborted("the sending agent closes"))
        for instance in {route.peer.instance for route in self._outbound}:
            self._outbound.forget(instance, None)
        self._snap()

    def _hello(self, link: Link) -> wire.Hello:
        """Say who this rank is and which lanes it can use; whom it talks to is not known here."""
        offer = self._offer
        return wire.Hello(
            instance=self._identity.instance,
            epoch=self._identity.epoch,
            rank=self._rank,
            target_epoch=0,
            target_rank=0,
            token=b"",
            lanes=offer.lanes,
            boot_id=boot_id(),
            data_address=link.tagged.address if LaneKind.TAGGED in offer.lanes else b"",
            share=offer.share,
            offsets=offer.offsets,
            lent=offer.lent,
        )

    # ------------------------------------------------------------------------------ transfers

    def _connect(self, peer: PeerAddress) -> None:
        if not self._outbound.connect(peer):
            return
        for outgoing in list(self._transfers.values()):
            if outgoing.transfer.target_instance == peer.instance:
                self._attach(outgoing)

    def _forget(self, instance: str) -> None:
        error = PeerLost(f"{instance} is gone")
        self._outbound.forget(instance, error)
        for outgoing in list(self._transfers.values()):
            if outgoing.transfer.target_instance == instance:
                self._fail(outgoing, error)

    def _begin(self, transfer: SendTransfer) -> None:
        now = self._clock()
        if transfer.transfer_id in self._transfers:
            logger.error("transfer %016x runs already: begin ignored", transfer.transfer_id)
            return
        try:
            outgoing = self._prepare(transfer, now)
        except TransferError as exc:
            self._report_failed(transfer.transfer_id, exc)
            return
        except ValueError as exc:
            self._report_failed(transfer.transfer_id, GrantRefused(str(exc)))
            return
        self._transfers[transfer.transfer_id] = outgoing
        if outgoing.complete:
            self._complete(outgoing, now)
        else:
            self._attach(outgoing)

    def _prepare(self, transfer: SendTransfer, now: float) -> Outgoing:
        if len(self._transfers) >= self._settings.max_transfers:
            raise GrantRefused(f"{len(self._transfers)} transfers run already")
        check_compatible(self._layout, transfer.target_layout)
        layout = self._layout.begun_at(transfer.cp_first)
        tables = tables_of(
            self._memories, transfer.block_ids, transfer.total_tokens, transfer.cp_first
        )
        plans = plan_cache(
            layout,
            transfer.target_layout,
            transfer.tokens,
            transfer.total_tokens,
            transfer.kept,
        )
        return Outgoing.begin(transfer, layout, tables, plans, self._rank, now)

    def _attach(self, outgoing: Outgoing) -> None:
        """Give every lane its route, or fail where there can be none; a stranger may yet come."""
        transfer = outgoing.transfer
        epoch = self._outbound.epoch_of(transfer.target_instance)
        if epoch is None or transfer.epoch > epoch:
            return
        if transfer.epoch < epoch:
            text = f"granted by epoch {transfer.epoch}, {transfer.target_instance} is at {epoch}"
            self._fail(outgoing, StaleEpoch(text))
            return
        for rank, lane in outgoing.lanes.items():
            route = self._outbound.route(transfer.target_instance, rank)
            if route is None:
                self._fail(outgoing, PeerLost(f"no address for target rank {rank}"))
                return
            if route.refused is not None:
                self._fail(outgoing, route.refused)
                return
            turn = self._turns.setdefault(route, deque())
            if not any(other is lane for _, other in turn):
                turn.append((outgoing, lane))

    def _ready(self, transfer_id: int, layers: Span, tokens: Span, group: int) -> None:
        outgoing = self._transfers.get(transfer_id)
        if outgoing is None:
            return
        outgoing.started_at = outgoing.started_at or self._clock()
        outgoing.hidden_bytes = outgoing.bytes
        outgoing.add_ready(layers, tokens, group)

    def _abort(self, transfer_id: int) -> None:
        outgoing = self._transfers.get(transfer_id)
        if outgoing is not None:
            self._end(outgoing, tell=True)
        self._emit(Closed(transfer_id))

    def _check_deadlines(self, outgoing: Outgoing, now: float) -> None:
        settings, transfer = self._settings, outgoing.transfer
        if now > outgoing.deadline:
            self._fail(outgoing, GrantExpired(f"not confirmed within {transfer.ttl_s:.1f} s"))
            return
        patience = settings.connect_s + settings.hello_s
        known = self._outbound.epoch_of(transfer.target_instance) == transfer.epoch
        for rank, lane in outgoing.lanes.items():
            route = self._outbound.route(transfer.target_instance, rank) if known else None
            session = route.session if route is not None else None
            error: TransferError | None = None
            if session is None:
                if now - outgoing.began_at > patience:
                    text = f"no connection to {transfer.target_instance} rank {rank}"
                    error = PeerLost(f"{text} within {patience:.1f} s")
            elif lane.manifest_at is not None:
                if not lane.acked and now - lane.manifest_at > settings.ack_s:
                    error = AckTimeout(f"rank {rank} did not confirm within {settings.ack_s:.1f} s")
            elif (
                lane.queue
                and not session.lane.can_send
                and now - session.moved_at > settings.credit_stall_s
            ):
                error = CreditStalled(f"rank {rank} gives no slot back")
            if error is not None:
                self._fail(outgoing, error)
                return

    def _fail(self, outgoing: Outgoing, error: TransferError) -> None:
        if self._transfers.get(outgoing.transfer.transfer_id) is outgoing:
            self._end(outgoing, tell=True)
            self._report_failed(outgoing.transfer.transfer_id, error)

    def _end(self, outgoing: Outgoing, *, tell: bool) -> None:
        """Forget the transfer; with `tell`, targets that are not done hear that no more comes."""
        transfer = outgoing.transfer
        del self._transfers[transfer.transfer_id]
        if outgoing.lease is not None and self._region is not None:
            self._region.end(outgoing.lease)
        for rank, lane in outgoing.lanes.items():
            route = self._outbound.route(transfer.target_instance, rank)
            if route is None:
                continue
            self._leave(route, lane)
            if route.session is not None:
                route.session.lane.drop(transfer.transfer_id)
            if tell and route.session is not None and not lane.acked:
                message = wire.Abort(transfer.transfer_id, transfer.nonce)
                route.session.link.send_control(wire.encode(message))

    def _leave(self, route: Route, lane: Lane) -> None:
        """Take a lane out of its route's turn."""
        turn = deque(entry for entry in self._turns.get(route, ()) if entry[1] is not lane)
        if turn:
            self._turns[route] = turn
        else:
            self._turns.pop(route, None)

    def _complete(self, outgoing: Outgoing, now: float) -> None:
        self._end(outgoing, tell=False)
        seconds = now - (outgoing.started_at or now)
        self._counters.completed += 1
        self._counters.seconds += seconds
        stats = TransferStats(
            bytes=outgoing.bytes,
            messages=outgoing.messages,
            seconds=seconds,
            transport=outgoing.carrier,
            hidden_bytes=outgoing.hidden_bytes,
        )
        self._counters.hidden_bytes += outgoing.hidden_bytes
        self._emit(Completed(outgoing.transfer.transfer_id, stats))

    def _report_failed(self, transfer_id: int, error: TransferError) -> None:
        self._counters.failed += 1
        self._emit(Failed(transfer_id, error, error.retryable))

    def _emit(self, event: TransferEvent) -> None:
        self._snap()
        try:
            self._on_event(event)
        except Exception:
            logger.exception("the callback failed for %s", type(event).__name__)

    def _snap(self) -> None:
        self._snapshot = self._counters.snapshot(
            len(self._transfers), self._outbound.slot_counts(), self._outbound.peer_stats()
        )

    # ------------------------------------------------------------------------ the routes' owner

    def route_up(self, route: Route) -> None:
        """See outbound.Owner."""
        assert route.session is not None
        self._emit(PeerUp(route.peer.instance, route.rank, route.session.carrier))

    def route_down(self, route: Route, carrier: str, error: TransferError | None) -> None:
        """See outbound.Owner: every transfer that still needs the route fails with it."""
        instance = route.peer.instance
        for outgoing in list(self._transfers.values()):
            transfer = outgoing.transfer
            lane = outgoing.lanes.get(route.rank)
            if lane is None or lane.acked:
                continue
            if (transfer.target_instance, transfer.epoch) == (instance, route.peer.epoch):
                self._fail(outgoing, error or PeerLost(f"{instance} closed"))
        self._turns.pop(route, None)
        self._emit(PeerDown(instance, route.rank, carrier, error))

    def probed(self, route: Route) -> None:
        """See outbound.Owner: tell what was measured, and whether the pair lags behind others."""
        session = route.session
        assert session is not None
        others = [
            other.session.probe.bytes_per_s
            for other in self._outbound
            if other is not route and other.session and other.session.carrier == session.carrier
        ]
        probe = session.probe
        probe.note = probe.note or lagging(probe.bytes_per_s, others)
        self._emit(probe.report(route.peer.instance, route.rank, session.carrier))

    def control(self, route: Route, message: wire.Control) -> None:
        """See outbound.Owner."""
        match message:
            case wire.Ack(transfer_id, nonce):
                self._acked(route, transfer_id, nonce)
            case wire.Fail(transfer_id, nonce, code, reason):
                outgoing = self._transfers.get(transfer_id)
                if outgoing is not None and outgoing.transfer.nonce == nonce:
                    self._fail(outgoing, from_code(code, reason))
            case _:
                raise ProtocolViolation(f"{type(message).__name__} is not for a sender")

    def _acked(self, route: Route, transfer_id: int, nonce: bytes) -> None:
        outgoing = self._transfers.get(transfer_id)
        if outgoing is None or outgoing.transfer.nonce != nonce:
            return
        lane = outgoing.lanes.get(route.rank)
        if lane is None or lane.manifest_at is None:
            raise ProtocolViolation("an acknowledgement of what was not sent")
        lane.acked = True
        if route.session is not None:
            route.session.seconds += self._clock() - (outgoing.started_at or self._clock())
        if outgoing.complete:
            self._complete(outgoing, self._clock())

    # ----------------------------------------------------------------------------------- data

    def _send_one(self, route: Route) -> bool:
        """Send one piece, round robin over transfers; whether another could follow at once."""
        session, turn = route.session, self._turns[route]
        if session is None or self._stalled(session, turn):
            return False
        for _ in range(len(turn)):
            if turn[0][1].queue:
                break
            turn.rotate(-1)
        else:
            return False
        outgoing, lane = turn[0]
        turn.rotate(-1)
        try:
            if self._pieces.send(session, outgoing, lane):
                self._leave(route, lane)
        except (TransferError, ValueError) as exc:
            error = exc if isinstance(exc, TransferError) else GrantRefused(str(exc))
            self._fail(outgoing, error)
        except Exception as exc:
            # A bug of ours: fail closed, or the same piece would be tried for ever.
            logger.exception("error while a piece was sent")
            self._fail(outgoing, PeerLost(f"internal error {type(exc).__name__}"))
        return session.lane.can_send and any(x.queue for _, x in self._turns.get(route, ()))

    def _stalled(self, session: Session, turn: _Turn) -> bool:
        """Whether nothing can leave; counts for how long something was held up by it."""
        now = self._clock()
        if not session.lane.can_send:
            if session.stalled_at is None and any(lane.queue for _, lane in turn):
                session.stalled_at = now
                self._counters.stalls += 1
            return True
        if session.stalled_at is not None:
            self._counters.stalled_s += now - session.stalled_at
            session.stalled_at = None
        return False
