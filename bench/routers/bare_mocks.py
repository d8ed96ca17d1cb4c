"""Mocks of decode for a relay that is nothing but gRPC: see `bare`."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from twinpool.v1 import inference_pb2, worker_pb2

from bench.routers.bare import FEED, ID
from bench.routers.mocks import Batch, steps
from bench.routers.pace import Pace
from bench.routers.stamps import Stamps
from service.channels import WORKER_MESSAGE_BYTES, channel_options


class Feeds:
    """So many mocks, each with a stream to the relay; a context manager that ends them."""

    def __init__(self, relay: str, mocks: int, *, stamps: Stamps, pace: Callable[[], Pace]) -> None:
        self._relay = relay
        self._mocks = mocks
        self._stamps = stamps
        self._pace = pace
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Feeds":
        self._tasks = [asyncio.create_task(self._feed()) for _ in range(self._mocks)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _feed(self) -> None:
        batch = Batch()
        options = channel_options(WORKER_MESSAGE_BYTES)
        async with grpc.aio.insecure_channel(self._relay, options=options) as channel:
            start: Any = channel.stream_stream(
                FEED, request_serializer=worker_pb2.DecodeRunResponse.SerializeToString
            )
            call = start()
            stepping = asyncio.create_task(steps(batch, self._pace(), self._stamps, call.write))
            try:
                await _join(batch, call)
            finally:
                stepping.cancel()


async def _join(batch: Batch, requests: AsyncIterator[bytes]) -> None:
    async for request in requests:
        [request_id] = ID.unpack_from(request)
        asked = inference_pb2.GenerateRequest.FromString(request[ID.size :])
        batch.join(request_id, asked.stop.max_new_tokens)
