"""What gRPC for Python leaves to a router: passes steps on to streams, and does nothing else.

It admits everybody, knows no pools, no text and no failures. A step is read, and each of its tokens
written to its client's stream as a message of the protocol; what a router does beside that is its
own. Mocks attach themselves (`bare_mocks`) and are given the requests in turn.
"""

import asyncio
import struct
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

import grpc
import uvloop
from twinpool.v1 import inference_pb2, worker_pb2

from bench.routers.load import METHOD
from service.channels import WORKER_MESSAGE_BYTES, server_options
from service.garbage import collect_rarely
from service.parent import exit_with_supervisor

FEED = "/bench.Relay/Feed"
# A request's id, before the request itself.
ID = struct.Struct("<Q")


class Relay:
    """Joins clients' streams with the mocks' steps."""

    def __init__(self) -> None:
        self._ids = count(1)
        self._feeds: list[asyncio.Queue[bytes]] = []
        self._answers: dict[int, asyncio.Queue[worker_pb2.SequenceOutput]] = {}

    async def feed(
        self, steps: AsyncIterator[worker_pb2.DecodeRunResponse], context: Any
    ) -> AsyncIterator[bytes]:
        """Take a mock's steps, and tell it of requests: their ids, and what was asked."""
        requests: asyncio.Queue[bytes] = asyncio.Queue()
        self._feeds.append(requests)
        reading = asyncio.create_task(self._read(steps))
        try:
            while True:
                yield await requests.get()
        finally:
            reading.cancel()

    async def _read(self, steps: AsyncIterator[worker_pb2.DecodeRunResponse]) -> None:
        async for step in steps:
            for output in step.outputs:
                self._answers[output.request_id].put_nowait(output)

    async def generate(
        self, request: bytes, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Answer a client with what a mock gives."""
        request_id = next(self._ids)
        answer = self._answers[request_id] = asyncio.Queue()
        self._feeds[request_id % len(self._feeds)].put_nowait(ID.pack(request_id) + request)
        try:
            is_last = False
            while not is_last:
                output = await answer.get()
                is_last = bool(output.finish_reason)
                yield inference_pb2.GenerateResponse(
                    token_ids=output.token_ids, finish_reason=output.finish_reason
                )
        finally:
            del self._answers[request_id]


async def main() -> None:
    """Serve until killed."""
    relay = Relay()
    service, _, method = METHOD.removeprefix("/").partition("/")
    feed_service, _, feed_method = FEED.removeprefix("/").partition("/")
    server = grpc.aio.server(options=server_options(WORKER_MESSAGE_BYTES))
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                service,
                {
                    method: grpc.unary_stream_rpc_method_handler(
                        relay.generate,
                        response_serializer=inference_pb2.GenerateResponse.SerializeToString,
                    )
                },
            ),
            grpc.method_handlers_generic_handler(
                feed_service,
                {
                    feed_method: grpc.stream_stream_rpc_method_handler(
                        relay.feed,
                        request_deserializer=worker_pb2.DecodeRunResponse.FromString,
                    )
                },
            ),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"bare relay ready on 127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    exit_with_supervisor()
    collect_rarely()
    uvloop.run(main())
