"""Owns the Membership service: one Register stream for each instance, Drain, GetStatus.

Wire messages end here; what they mean for the pools is `membership` and `pools`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from twinpool.v1 import kv_pb2, worker_pb2, worker_pb2_grpc

from router.assets import AssetsReceiver
from router.group import ModelGroup
from router.groups import Groups
from router.hello import (
    credit_from_wire,
    heartbeat_from_wire,
    instance_from_wire,
    prefix_events_from_wire,
)
from router.membership import Instance, Member, Role
from router.metrics.requests import Outcomes
from router.roster import Roster
from router.status import status_to_wire
from service.errors import InvalidRequest, ServiceError, Unavailable

_HELLO_TIMEOUT_S = 10.0
_LAST_WRITE_TIMEOUT_S = 1.0


class _Session:
    """One Register stream's state: what is still to be said, and why it must end.

    Its instance is in `group`.
    """

    def __init__(self, group: ModelGroup) -> None:
        self.group = group
        self.wake = asyncio.Event()
        self.peers_changed = False
        self.use_is_due = False
        self.drain_reason = ""
        self.is_over = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def has_news(self) -> bool:
        return self.peers_changed or self.use_is_due or bool(self.drain_reason) or self.is_over

    def tell_peers(self) -> None:
        self.peers_changed = True
        self.wake.set()

    def tell_use(self) -> None:
        self.use_is_due = True
        self.wake.set()

    def tell_drain(self, reason: str) -> None:
        self.drain_reason = reason
        self.wake.set()

    def stop_telling(self) -> None:
        self.is_over = True
        self.wake.set()

    def end(self, error: ServiceError) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)


class MembershipService(worker_pb2_grpc.MembershipServicer):
    """Serves `twinpool.v1.Membership`."""

    def __init__(
        self,
        *,
        router_id: str,
        version: str,
        groups: Groups,
        roster: Roster,
        unplaced: Outcomes,
        heartbeat_interval_s: float,
        heartbeats_missed: int,
        clock: Callable[[], float],
    ) -> None:
        self._router_id = router_id
        self._version = version
        self._groups = groups
        self._roster = roster
        self._unplaced = unplaced
        self._interval_s = heartbeat_interval_s
        self._heartbeats_missed = heartbeats_missed
        self._clock = clock
        self._started_at = clock()
        self._sessions: dict[Member, _Session] = {}
        groups.on_decodes_changed = self._tell_peers

    def end_all(self) -> None:
        """Ends every stream, so that the instances look for a router again."""
        for session in self._sessions.values():
            session.end(Unavailable("the router stops", reason="ROUTER_STOPS"))

    # ---- Register

    # A coroutine that reads and writes, since both directions go on at once.
    async def Register(  # type: ignore[override]
        self, request_iterator: AsyncIterator[worker_pb2.RegisterRequest], context: Any
    ) -> None:
        """Holds one instance in the table for as long as its stream and its heartbeats come."""
        instance = await self._read_hello(request_iterator)
        self._roster.check(instance)
        group, member, replaced = self._groups.join(instance)
        session = self._sessions[member] = _Session(group)
        if replaced is not None and replaced in self._sessions:
            self._sessions[replaced].end(
                Unavailable("another stream of this instance came", reason="REPLACED")
            )
        why = "its stream broke"
        try:
            await self._converse(request_iterator, context, member, session)
            why = "it ended its registration"
        except ServiceError as exc:
            why = exc.message
            raise
        finally:
            del self._sessions[member]
            group.uses.leave(member)
            group.pools.leave(member, why)

    async def _read_hello(self, requests: AsyncIterator[worker_pb2.RegisterRequest]) -> Instance:
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                first = await anext(requests, None)
        except TimeoutError:
            first = None
        if first is None or first.WhichOneof("kind") != "hello":
            raise InvalidRequest("hello", "missing", "the first message must be hello")
        return instance_from_wire(first.hello)

    async def _converse(
        self,
        requests: AsyncIterator[worker_pb2.RegisterRequest],
        context: Any,
        member: Member,
        session: _Session,
    ) -> None:
        """Runs both directions until one ends; returns where the instance ended its side."""
        reader = asyncio.ensure_future(self._read(requests, member, session))
        writer = asyncio.ensure_future(self._write(context, member, session))
        try:
            done, _ = await asyncio.wait(
                {reader, writer, session.ended}, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            # A write under way is let finish: gRPC takes no status while a message is going out.
            session.stop_telling()
            await asyncio.wait({writer}, timeout=_LAST_WRITE_TIMEOUT_S)
            for task in (reader, writer, session.ended):
                task.cancel()
            await asyncio.gather(reader, writer, session.ended, return_exceptions=True)
        for task in done:
            task.result()

    async def _read(
        self,
        requests: AsyncIterator[worker_pb2.RegisterRequest],
        member: Member,
        session: _Session,
    ) -> None:
        receiver, pools, uses = AssetsReceiver(), session.group.pools, session.group.uses
        while (request := await self._next(requests)) is not None:
            member.seen_at = self._clock()
            match request.WhichOneof("kind"):
                case "heartbeat":
                    _take_heartbeat(session.group, member, request.heartbeat)
                case "credit":
                    credit = credit_from_wire(request.credit, member.instance.capacity)
                    pools.take_credit(member, credit)
                    uses.watch(member, session.tell_use)
                    session.tell_use()
                case "prefixes":
                    pools.take_prefixes(member, prefix_events_from_wire(request.prefixes))
                case "assets":
                    chunk = request.assets
                    receiver.add(chunk.file, chunk.data)
                    if chunk.last:
                        digest = member.instance.model.assets_digest
                        await pools.tokenizers.put(digest, receiver.finish())
                case _:
                    raise InvalidRequest("kind", "a second hello", "send heartbeats")

    async def _next(
        self, requests: AsyncIterator[worker_pb2.RegisterRequest]
    ) -> worker_pb2.RegisterRequest | None:
        # Silence is counted in intervals through which this loop itself was awake: a router that
        # was held up finds the heartbeats of that time waiting, and must not blame the instances.
        receive = asyncio.ensure_future(anext(requests, None))
        try:
            for _ in range(self._heartbeats_missed):
                done, _ = await asyncio.wait({receive}, timeout=self._interval_s)
                if done:
                    return receive.result()
        finally:
            receive.cancel()
        silence_s = self._interval_s * self._heartbeats_missed
        raise Unavailable(f"no heartbeat for {silence_s:g} s", reason="HEARTBEAT_MISSED")

    async def _write(self, context: Any, member: Member, session: _Session) -> None:
        digest = member.instance.model.assets_digest
        accepted = worker_pb2.Accepted(
            router_id=self._router_id,
            heartbeat_interval_ms=round(self._interval_s * 1000),
            send_assets=session.group.pools.tokenizers.get(digest) is None,
            prefix_events=True,
            credits=True,
        )
        await context.write(worker_pb2.RegisterResponse(accepted=accepted))
        session.peers_changed = True
        while not session.is_over:
            if session.peers_changed:
                session.peers_changed = False
                await context.write(worker_pb2.RegisterResponse(peers=_peers(session.group)))
            if session.use_is_due:
                session.use_is_due = False
                use = session.group.uses.tell(member)
                await context.write(worker_pb2.RegisterResponse(credit_use=use))
            if session.drain_reason:
                command = worker_pb2.DrainCommand(reason=session.drain_reason)
                session.drain_reason = ""
                await context.write(worker_pb2.RegisterResponse(drain=command))
            if not session.has_news:
                session.wake.clear()
                await session.wake.wait()

    def _tell_peers(self, model: str) -> None:
        # Prefill instances send to them, and decode instances that drain.
        for session in self._sessions.values():
            if session.group.name == model:
                session.tell_peers()

    # ---- operators

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: Any
    ) -> worker_pb2.DrainResponse:
        """Takes an instance out of service."""
        group, member = self._groups.named(request.instance)
        group.pools.drain(member)
        if member in self._sessions:
            self._sessions[member].tell_drain("an operator asked for it")
        return worker_pb2.DrainResponse()

    async def GetStatus(
        self, request: worker_pb2.GetStatusRequest, context: Any
    ) -> worker_pb2.GetStatusResponse:
        """Says what the router knows of the pools."""
        members = self._groups.members()
        now = self._clock()
        status = status_to_wire(
            self._groups.all(),
            unplaced=self._unplaced.counts,
            missing=self._roster.missing(member.instance for member in members),
            now=now,
        )
        status.router_id = self._router_id
        status.version = self._version
        status.uptime_s = now - self._started_at
        return status


def _take_heartbeat(group: ModelGroup, member: Member, message: worker_pb2.Heartbeat) -> None:
    member.heartbeat = heartbeat_from_wire(message)
    group.ledger.set_pace(member.instance.key, member.heartbeat.pace)
    if message.draining:
        group.pools.drain(member)


def _peers(group: ModelGroup) -> worker_pb2.Peers:
    return worker_pb2.Peers(
        peers=[
            worker_pb2.Peer(
                name=m.instance.key.name,
                epoch=m.instance.key.epoch,
                layout=kv_pb2.KvLayout.FromString(m.instance.layout.wire),
                data_token=m.instance.data_token,
            )
            for m in group.pools.members.of(Role.DECODE)
        ]
    )
