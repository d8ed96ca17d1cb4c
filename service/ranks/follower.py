"""A rank of an instance that is not its first: hears what the first one says, and answers.

Owns the way into the group and the stream to the first rank. What is done is the role's `Member`'s.
Whatever goes wrong is the end of the process, and so of the instance: the first rank sees the
stream break.
"""

import asyncio
import logging
import queue
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

import grpc
from twinpool.v1 import rank_pb2, rank_pb2_grpc

from service.channels import dial
from service.instance import Incarnation, Part, die
from service.logs import configure_logging
from service.ranks.config import RanksConfig
from service.ranks.group import given_place, log_name, meet_first, rank_name, take_part
from service.security.settings import instance_security

log = logging.getLogger(__name__)

BEAT_S = 0.5

Say = Callable[[rank_pb2.FollowRequest], None]


class FirstRankLost(Exception):
    """The instance's first rank has ended, or cannot be reached any more."""


class Member(Protocol):
    """What a role's rank does; its model is loaded when it is made."""

    def start(self) -> rank_pb2.RankReady:
        """Begin to take part."""
        ...

    def act(self, message: rank_pb2.FollowResponse) -> None:
        """Do what the first rank says; must return at once."""
        ...

    def beat(self) -> rank_pb2.RankHeartbeat:
        """Return what the first rank is told again and again."""
        ...

    def close(self) -> None:
        """End, and free what it has."""
        ...


# Makes a rank: with its part, whose it is, and the way to say something, from any thread.
Make = Callable[[Part, Incarnation, Say], Awaitable[Member]]


class Orders:
    """Does things one after another on a thread of its own; an error there ends the process."""

    def __init__(self, name: str) -> None:
        self._orders: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)

    def start(self) -> None:
        """Begin with the first."""
        self._thread.start()

    def put(self, order: Callable[[], object]) -> None:
        """Have something done after all that was put before."""
        self._orders.put(order)

    def stop(self) -> None:
        """Stop after what was put; where it hangs, do not wait for long."""
        self._orders.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout=1.0)

    def _main(self) -> None:
        try:
            while (order := self._orders.get()) is not None:
                order()
        except BaseException as error:
            log.exception("a step broke")
            die(error)


class _Stream:
    """The stream to the first rank: hello goes out, then whatever is said; from any thread."""

    def __init__(self, channel: grpc.aio.Channel, rank: int, secret: bytes) -> None:
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[rank_pb2.FollowRequest] = asyncio.Queue()
        self._outbox.put_nowait(
            rank_pb2.FollowRequest(hello=rank_pb2.RankHello(rank=rank, secret=secret))
        )
        self._call: Any = rank_pb2_grpc.RanksStub(channel).Follow(self._said())

    def say(self, message: rank_pb2.FollowRequest) -> None:
        """Tell the first rank."""
        self._loop.call_soon_threadsafe(self._outbox.put_nowait, message)

    async def welcome(self) -> rank_pb2.RankWelcome:
        """Return the first answer: whose rank this is. Raises FirstRankLost."""
        async for message in self.heard():
            return message.welcome
        raise FirstRankLost("the first rank has ended before it began")

    async def heard(self) -> AsyncIterator[rank_pb2.FollowResponse]:
        """Yield what the first rank says until it lets go; raises FirstRankLost."""
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                yield message
        except grpc.aio.AioRpcError as error:
            raise FirstRankLost(f"the first rank is lost: {error.code().name}") from error

    async def beat(self, member: Member) -> None:
        """Say again and again that this rank is alive."""
        while True:
            self.say(rank_pb2.FollowRequest(heartbeat=member.beat()))
            await asyncio.sleep(BEAT_S)

    async def _said(self) -> AsyncIterator[rank_pb2.FollowRequest]:
        while True:
            yield await self._outbox.get()


async def follow(settings: RanksConfig, make: Make) -> None:
    """Be one of an instance's ranks but the first, until that one lets go or is lost."""
    place = await asyncio.to_thread(given_place)
    _configure_logs(settings, f"rank {rank_name(settings, place.rank)}")
    address, secret = await asyncio.to_thread(meet_first, place)
    channel = dial(address, security=instance_security(settings))
    stream = _Stream(channel, place.rank, secret)
    welcome = await stream.welcome()
    who = Incarnation(
        name=welcome.instance, epoch=welcome.epoch, data_token=bytes(welcome.data_token)
    )
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the first rank drains, and then lets go
    _configure_logs(settings, log_name(settings, who, place.rank))
    try:
        part = await asyncio.to_thread(take_part, settings, place.rank, place.store)
        await _take_orders(await make(part, who, stream.say), stream)
    finally:
        await channel.close(None)


async def _take_orders(member: Member, stream: _Stream) -> None:
    try:
        stream.say(rank_pb2.FollowRequest(ready=member.start()))
        beating = asyncio.create_task(stream.beat(member))
        beating.add_done_callback(_die_of_its_error)
        try:
            async for message in stream.heard():
                member.act(message)
        finally:
            beating.cancel()
    finally:
        member.close()


def _die_of_its_error(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the rank cannot say that it is alive", exc_info=error)
        die(error)


def _configure_logs(settings: RanksConfig, name: str) -> None:
    configure_logging(
        role=settings.role, instance=name, level=settings.log_level, as_json=settings.log_json
    )
