"""Mocks around a router, and a client before it: all that a router has to do with.

Of one process, so that both read the same clock and share what was sent when.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from twinpool import AsyncClient

from bench.routers.bare_mocks import Feeds
from bench.routers.calls import Connection
from bench.routers.http_calls import HttpCalls
from bench.routers.http_mocks import HttpWorkers
from bench.routers.load import HTTP_PATH, METHOD, Calls, Client, Dialect, Grpc, Http
from bench.routers.mocks import Pools
from bench.routers.pace import Paces
from bench.routers.stamps import Stamps

_CONNECTIONS = 4  # to each router
_READY_S = 60.0
_POLL_S = 0.1
# For the router's streams to instances that it knows already.
_CONNECT_S = 0.5
_WARM_UP = 20
# About three hundred tokens: a byte of plain text is one to the mocks' tokenizer.
PROMPT = "Say in plain words how a router of requests finds room for the next one. " * 4


@dataclass(frozen=True, kw_only=True)
class Around:
    """What is around some routers.

    Attributes:
        routers: host:port of each.
        decodes: Mock decode instances; there is a fourth as many of prefill.
        sequences: What each decode instance can take at once.
        interval_s: Between two of its steps; None: as soon as the last ones have arrived.
        http_ports: Where the peer expects its workers, prefill first; None for our own router.
        bare: Whether there is a relay in the router's place.
    """

    routers: Sequence[str]
    decodes: int
    sequences: int
    interval_s: float | None
    http_ports: Sequence[int] | None = None
    bare: bool = False

    @property
    def prefills(self) -> int:
        """Mock prefill instances."""
        return prefills_for(self.decodes)


def prefills_for(decodes: int) -> int:
    """Return how many prefill instances there are beside so many of decode."""
    return max(1, decodes // 4)


@asynccontextmanager
async def client_of(around: Around) -> AsyncIterator[Client]:
    """Start mocks, and a client that sends to all routers in turn once they serve.

    Raises TimeoutError where they do not in time.
    """
    clock = time.monotonic
    stamps = Stamps(clock)
    paces = Paces(around.interval_s, clock, random.Random(0))
    calls: Sequence[Calls]
    if around.http_ports is not None:
        ports = around.http_ports
        workers = HttpWorkers(
            ports[: around.prefills], ports[around.prefills :], stamps=stamps, pace=paces
        )
        async with workers:
            calls = [HttpCalls(router, HTTP_PATH, clock) for router in around.routers]
            async with _warm(calls, Http(), stamps) as client:
                yield client
        return
    if around.bare:
        [relay] = around.routers
        calls = await _connections(around, clock)
        feeds = Feeds(relay, around.decodes, stamps=stamps, pace=paces)
        async with feeds, _warm(calls, Grpc(), stamps) as client:
            yield client
        return
    pools = Pools(
        list(around.routers),
        prefills=around.prefills,
        decodes=around.decodes,
        sequences=around.sequences,
        stamps=stamps,
        pace=paces,
    )
    async with pools:
        for router in around.routers:
            await _ready(router, pools.instances)
        async with _warm(await _connections(around, clock), Grpc(), stamps) as client:
            yield client


async def _connections(around: Around, clock: Callable[[], float]) -> list[Connection]:
    turns = [router for _ in range(_CONNECTIONS) for router in around.routers]
    return [await Connection.open(router, METHOD, clock) for router in turns]


@asynccontextmanager
async def _warm(calls: Sequence[Calls], dialect: Dialect, stamps: Stamps) -> AsyncIterator[Client]:
    """Make a client and have some requests answered; close its calls at the end."""
    client = Client(calls, dialect, stamps, time.monotonic)
    body = dialect.request(4, PROMPT)
    try:
        async with asyncio.timeout(_READY_S):
            answered = 0
            while answered < _WARM_UP:
                if await _is_answered(client, body):
                    answered += 1
                else:
                    await asyncio.sleep(_POLL_S)
        yield client
    finally:
        for each in calls:
            each.close()


async def _is_answered(client: Client, body: bytes) -> bool:
    future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    client.send(body, future.set_result)
    return await future


async def _ready(router: str, instances: int) -> None:
    """Return once a router knows all instances and has room."""
    async with asyncio.timeout(_READY_S), AsyncClient(router) as client:
        while len((await client.status()).instances) < instances:
            await asyncio.sleep(_POLL_S)
        # It waits for the tokenizer itself.
        while not (await client.describe()).max_request_tokens:
            await asyncio.sleep(_POLL_S)
        await asyncio.sleep(_CONNECT_S)
