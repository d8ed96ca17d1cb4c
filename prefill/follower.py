"""A rank of an instance that is not its first: does what the first one says, and tells how it went.

Owns the rank's part of each step and each transfer. Decides nothing. Whatever goes wrong here is
the end of the process, and so of the instance: the first rank sees the stream break.
"""

import asyncio
import logging
import queue
import signal
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import grpc
from twinpool.v1 import rank_pb2, rank_pb2_grpc

from kvtransfer import Closed, Completed, Failed, SharedRegion, TransferEvent
from prefill.config import PrefillConfig
from prefill.group import given_place, meet_first, rank_name, take_part
from prefill.rank import Rank
from prefill.rank_wire import end_to_wire, heartbeat_to_wire, step_from_wire
from service.channels import dial
from service.instance import Incarnation, Model, die, load_model, make_identity
from service.logs import configure_logging
from service.wire import span_from_wire

log = logging.getLogger(__name__)

BEAT_S = 0.5


class FirstRankLost(Exception):
    """The instance's first rank has ended, or cannot be reached any more."""


class Follower:
    """Acts on what the first rank says, in order: on a thread what needs the cache's contents, the
    steps and what follows from them, all else at once.
    """

    def __init__(self, rank: Rank) -> None:
        self._compute = rank.compute
        self._handoff = rank.handoff
        self._agent = rank.agent
        self._peers = rank.peers
        self._orders: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, name="prefill-rank", daemon=True)

    def start(self) -> None:
        """Start taking steps."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the steps that were told; where one hangs, do not wait for long."""
        self._orders.put(None)
        self._thread.join(timeout=1.0)

    def act(self, message: rank_pb2.FollowResponse) -> None:
        """Do what the first rank says."""
        match message.WhichOneof("kind"):
            case "step":
                self._orders.put(partial(self._compute.run, step_from_wire(message.step)))
            case "peers":
                self._peers.update(message.peers.peers)
            case "expect":
                self._handoff.expect(message.expect.request_id)
            case "open":
                opened = message.open
                self._handoff.open(
                    opened.request_id, opened.tokens, list(opened.blocks), opened.cp_first
                )
            case "grant":
                granted = message.grant
                self._handoff.grant(granted.request_id, self._peers.grant(granted.grant))
            case "ready":
                ready = message.ready
                tokens = span_from_wire(ready.tokens)
                # Computed by a step that this rank may not have come to yet.
                self._orders.put(partial(self._handoff.cached, ready.request_id, tokens))
            case "close":
                self._handoff.close(message.close.request_id)
            case "abort":
                self._agent.abort(message.abort.transfer_id)

    def _main(self) -> None:
        try:
            while (order := self._orders.get()) is not None:
                order()
        except BaseException as error:
            log.exception("a step broke")
            die(error)


class Stream:
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

    async def beat(self, rank: Rank) -> None:
        """Say again and again that this rank is alive."""
        while True:
            beat = heartbeat_to_wire(rank.agent.stats(), rank.links)
            self.say(rank_pb2.FollowRequest(heartbeat=beat))
            await asyncio.sleep(BEAT_S)

    async def _said(self) -> AsyncIterator[rank_pb2.FollowRequest]:
        while True:
            yield await self._outbox.get()


async def follow(settings: PrefillConfig) -> None:
    """Be one of an instance's ranks but the first, until that one lets go or is lost."""
    place = await asyncio.to_thread(given_place)
    name = rank_name(settings, place.rank)
    _configure_logs(settings, f"rank {name}")
    address, secret = await asyncio.to_thread(meet_first, place)
    channel = dial(address)
    stream = Stream(channel, place.rank, secret)
    welcome = await stream.welcome()
    who = Incarnation(name=welcome.instance, epoch=welcome.epoch)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the first rank drains, and then lets go
    _configure_logs(settings, f"{who.name}[{name}]")
    region = SharedRegion()  # so that a decode instance on this host can read the cache itself
    try:
        part = await asyncio.to_thread(take_part, settings, place.rank, place.store)
        model = await asyncio.to_thread(
            load_model, settings, region.allocate, part, settings.rank_threads
        )
        await _take_orders(settings, model, who, region, stream)
    finally:
        region.close()
        await channel.close(None)


async def _take_orders(
    settings: PrefillConfig, model: Model, who: Incarnation, region: SharedRegion, stream: Stream
) -> None:
    def on_event(event: TransferEvent) -> None:
        if isinstance(event, Completed | Failed | Closed):
            rank.handoff.ended(event.transfer_id)
            stream.say(rank_pb2.FollowRequest(transfer_end=end_to_wire(event)))

    rank = Rank(settings, model, make_identity(model, who), region, on_event)
    follower = Follower(rank)
    rank.agent.start()
    follower.start()
    ready = rank_pb2.RankReady(blocks=model.num_blocks, fingerprint=model.description.fingerprint)
    stream.say(rank_pb2.FollowRequest(ready=ready))
    beating = asyncio.create_task(stream.beat(rank))
    beating.add_done_callback(_die_of_its_error)
    try:
        async for message in stream.heard():
            follower.act(message)
    finally:
        beating.cancel()
        follower.stop()
        rank.agent.close()


def _die_of_its_error(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the rank cannot say that it is alive", exc_info=error)
        die(error)


def _configure_logs(settings: PrefillConfig, name: str) -> None:
    configure_logging(
        role="prefill", instance=name, level=settings.log_level, as_json=settings.log_json
    )
