"""Owns the Membership service: one Register stream for each instance, Drain, GetStatus.

Wire messages end here; what they mean for the pools is `membership` and `pools`.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from twinpool.v1 import common_pb2, kv_pb2, worker_pb2, worker_pb2_grpc

from router.assets import AssetsReceiver
from router.credit_uses import CreditUses
from router.hello import (
    credit_from_wire,
    heartbeat_from_wire,
    instance_from_wire,
    prefix_events_from_wire,
)
from router.ledger import InstanceKey, Ledger
from router.membership import Instance, Member, Model, Pair, Role
from router.pools import Pools
from router.wire import speed_to_wire
from service.errors import InvalidRequest, ServiceError, Unavailable

_HELLO_TIMEOUT_S = 10.0
_LAST_WRITE_TIMEOUT_S = 1.0
_ROLES = {Role.PREFILL: common_pb2.ROLE_PREFILL, Role.DECODE: common_pb2.ROLE_DECODE}


class _Session:
    """One Register stream's state: what is still to be said, and why it must end."""

    def __init__(self) -> None:
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
        pools: Pools,
        ledger: Ledger,
        uses: CreditUses,
        heartbeat_interval_s: float,
        heartbeats_missed: int,
        clock: Callable[[], float],
        request_counts: Callable[[], worker_pb2.RequestCounts],
        risks: Callable[[], Mapping[InstanceKey, float]],
    ) -> None:
        self._router_id = router_id
        self._version = version
        self._pools = pools
        self._ledger = ledger
        self._uses = uses
        self._interval_s = heartbeat_interval_s
        self._heartbeats_missed = heartbeats_missed
        self._clock = clock
        self._request_counts = request_counts
        self._risks = risks
        self._started_at = clock()
        self._sessions: dict[Member, _Session] = {}
        pools.on_decodes_changed = self._tell_peers

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
        member, replaced = self._pools.join(instance)
        session = self._sessions[member] = _Session()
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
            self._uses.leave(member)
            self._pools.leave(member, why)

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
        receiver = AssetsReceiver()
        while (request := await self._next(requests)) is not None:
            member.seen_at = self._clock()
            match request.WhichOneof("kind"):
                case "heartbeat":
                    self._take_heartbeat(member, request.heartbeat)
                case "credit":
                    credit = credit_from_wire(request.credit, member.instance.capacity)
                    self._pools.take_credit(member, credit)
                    self._uses.watch(member, session.tell_use)
                    session.tell_use()
                case "prefixes":
                    self._pools.take_prefixes(member, prefix_events_from_wire(request.prefixes))
                case "assets":
                    chunk = request.assets
                    receiver.add(chunk.file, chunk.data)
                    if chunk.last:
                        digest = member.instance.model.assets_digest
                        await self._pools.tokenizers.put(digest, receiver.finish())
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

    def _take_heartbeat(self, member: Member, message: worker_pb2.Heartbeat) -> None:
        member.heartbeat = heartbeat_from_wire(message)
        self._ledger.set_pace(member.instance.key, member.heartbeat.pace)
        if message.draining:
            self._pools.drain(member)

    async def _write(self, context: Any, member: Member, session: _Session) -> None:
        digest = member.instance.model.assets_digest
        accepted = worker_pb2.Accepted(
            router_id=self._router_id,
            heartbeat_interval_ms=round(self._interval_s * 1000),
            send_assets=self._pools.tokenizers.get(digest) is None,
            prefix_events=True,
            credits=True,
        )
        await context.write(worker_pb2.RegisterResponse(accepted=accepted))
        session.peers_changed = True
        while not session.is_over:
            if session.peers_changed:
                session.peers_changed = False
                await context.write(worker_pb2.RegisterResponse(peers=self._peers()))
            if session.use_is_due:
                session.use_is_due = False
                use = self._uses.tell(member)
                await context.write(worker_pb2.RegisterResponse(credit_use=use))
            if session.drain_reason:
                command = worker_pb2.DrainCommand(reason=session.drain_reason)
                session.drain_reason = ""
                await context.write(worker_pb2.RegisterResponse(drain=command))
            if not session.has_news:
                session.wake.clear()
                await session.wake.wait()

    def _tell_peers(self) -> None:
        # Prefill instances send to them, and decode instances that drain.
        for session in self._sessions.values():
            session.tell_peers()

    def _peers(self) -> worker_pb2.Peers:
        return worker_pb2.Peers(
            peers=[
                worker_pb2.Peer(
                    name=m.instance.key.name,
                    epoch=m.instance.key.epoch,
                    layout=kv_pb2.KvLayout.FromString(m.instance.layout.wire),
                    data_token=m.instance.data_token,
                )
                for m in self._pools.members.of(Role.DECODE)
            ]
        )

    # ---- operators

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: Any
    ) -> worker_pb2.DrainResponse:
        """Takes an instance out of service."""
        member = self._pools.named(request.instance)
        self._pools.drain(member)
        if member in self._sessions:
            self._sessions[member].tell_drain("an operator asked for it")
        return worker_pb2.DrainResponse()

    async def GetStatus(
        self, request: worker_pb2.GetStatusRequest, context: Any
    ) -> worker_pb2.GetStatusResponse:
        """Says what the router knows of the pools."""
        model = self._pools.members.model
        risks = self._risks()
        return worker_pb2.GetStatusResponse(
            router_id=self._router_id,
            version=self._version,
            uptime_s=self._clock() - self._started_at,
            model=_model_to_wire(model) if model is not None else None,
            instances=[self._status(member, risks) for member in self._pools.members.all()],
            requests=self._request_counts(),
        )

    def _status(
        self, member: Member, risks: Mapping[InstanceKey, float]
    ) -> worker_pb2.InstanceStatus:
        instance, credit = member.instance, member.credit
        return worker_pb2.InstanceStatus(
            name=instance.key.name,
            epoch=instance.key.epoch,
            role=_ROLES[instance.role],
            address=instance.address,
            layout=instance.layout.summary,
            capacity=worker_pb2.Capacity(
                blocks=instance.capacity.blocks,
                block_size=instance.capacity.block_size,
                max_sequences=instance.capacity.max_sequences,
                max_sequence_tokens=instance.capacity.max_sequence_tokens,
                dp=instance.capacity.dp,
                expected_output_tokens=instance.capacity.expected_output_tokens,
                colocated=instance.capacity.colocated,
            ),
            blocks=worker_pb2.BlockCounts(**dataclasses.asdict(member.heartbeat.blocks)),
            running=member.heartbeat.running,
            waiting=member.heartbeat.waiting,
            draining=member.draining,
            heartbeat_age_s=self._clock() - member.seen_at,
            ledger_reserved=self._ledger.reserved_blocks(instance.key),
            pairs=[_pair_to_wire(pair) for pair in member.heartbeat.pairs],
            known_prefix_blocks=self._pools.prefixes.known_blocks(instance.key),
            connecting=not self._pools.is_up(instance.key),
            credit_blocks=sum(credit.blocks) if credit is not None else instance.capacity.blocks,
            credit_sequences=(
                credit.sequences if credit is not None else instance.capacity.max_sequences
            ),
            speed=speed_to_wire(member.heartbeat.speed),
            overcommit_risk=risks.get(instance.key, 0.0),
        )


def _pair_to_wire(pair: Pair) -> worker_pb2.KvPair:
    return worker_pb2.KvPair(
        peer=pair.peer,
        rank=pair.rank,
        transport=pair.transport,
        rtt_s=pair.rtt_s,
        bytes_per_s=pair.bytes_per_s,
        note=pair.note,
    )


def _model_to_wire(model: Model) -> worker_pb2.ModelDescription:
    return worker_pb2.ModelDescription(
        name=model.name,
        fingerprint=model.fingerprint,
        architecture=model.architecture,
        dtype=model.dtype,
        max_model_len=model.max_model_len,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
        assets_digest=model.assets_digest,
    )
