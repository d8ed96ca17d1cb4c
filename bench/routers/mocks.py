"""Mock instances of both roles that speak the real protocol and compute nothing.

Owns their gRPC servers, their registration and the pace of their steps. A mock prefill tells a mock
decode of its process that the KV is complete; none is moved.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from twinpool.v1 import common_pb2, kv_pb2, worker_pb2, worker_pb2_grpc

from bench.routers.pace import Pace
from bench.routers.stamps import FIRST_ID, IDS, Stamps
from service.channels import WORKER_MESSAGE_BYTES, server_options
from service.registration import Registration
from text import TextAssets

_LENGTH = common_pb2.FINISH_REASON_LENGTH
_LONGEST = 1 << 20
_BLOCK = 16
_LAYERS, _HEADS = 2, 2


def assets() -> TextAssets:
    """Return a tokenizer of bytes, with a short word for each id that stands for a step."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {f"Ġ{i:x}~": i for i in range(FIRST_ID, FIRST_ID + IDS)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return TextAssets(
        {
            "tokenizer.json": backend.to_str().encode(),
            "tokenizer_config.json": json.dumps({}).encode(),
        }
    )


class Mock:
    """What both roles share: a server, a hello, and a registration with each router."""

    role = common_pb2.ROLE_UNSPECIFIED

    def __init__(self, name: str, text: TextAssets, *, max_sequences: int) -> None:
        self.name = name
        self._text = text
        self._max_sequences = max_sequences
        self._address = ""
        self._server = grpc.aio.server(options=server_options(WORKER_MESSAGE_BYTES))
        self._tasks: list[asyncio.Task[None]] = []

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add the role's servicer."""
        raise NotImplementedError

    async def start(self, routers: list[str]) -> None:
        """Serve, and register with all routers; returns once they have accepted."""
        self.add_to(self._server)
        self._address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()
        registrations = [self._registration(router) for router in routers]
        self._tasks = [asyncio.create_task(each.run()) for each in registrations]
        for each in registrations:
            await each.wait_registered()

    async def stop(self) -> None:
        """End all streams."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.stop(0)

    def _registration(self, router: str) -> Registration:
        return Registration(
            router_address=router,
            hello=self._hello(),
            heartbeat=worker_pb2.Heartbeat,
            assets=self._files,
        )

    def _files(self) -> Mapping[str, bytes]:
        return self._text.files

    def _hello(self) -> worker_pb2.InstanceHello:
        shard = kv_pb2.KvShard(
            layers=kv_pb2.Range(end=_LAYERS),
            heads=kv_pb2.Range(end=_HEADS),
            cp_size=1,
            data_host="127.0.0.1",
            data_port=1,
        )
        shape = kv_pb2.KvShape(layers=_LAYERS, kv_heads=_HEADS, head_size=8, dtype="float32")
        return worker_pb2.InstanceHello(
            name=self.name,
            epoch=1,
            role=self.role,
            address=self._address,
            model=worker_pb2.ModelDescription(
                name="mock",
                fingerprint="mock",
                architecture="Mock",
                dtype="float32",
                max_model_len=_LONGEST,
                vocab_size=FIRST_ID + IDS,
                assets_digest=self._text.digest,
            ),
            layout=kv_pb2.KvLayout(
                shape=shape,
                block_size=_BLOCK,
                shards=[shard],
                cp_order=kv_pb2.CP_ORDER_CONTIGUOUS,
            ),
            capacity=worker_pb2.Capacity(
                blocks=_LONGEST,
                block_size=_BLOCK,
                max_sequences=self._max_sequences,
                max_sequence_tokens=_LONGEST,
            ),
            data_token=b"mock",
            version="mock",
        )


class Batch:
    """The sequences of one router: those that run, with the tokens that each is still to get."""

    def __init__(self) -> None:
        self.left: dict[int, int] = {}
        self.has_work = asyncio.Event()

    def join(self, request_id: int, tokens: int) -> None:
        """Take a sequence in."""
        self.left[request_id] = tokens
        self.has_work.set()

    def drop(self, request_id: int) -> None:
        """Take one out; unknown ones are no error."""
        if self.left.pop(request_id, None) is not None and not self.left:
            self.has_work.clear()

    def step(self, token_id: int) -> worker_pb2.DecodeRunResponse:
        """Give every sequence its next token, and end those that have all."""
        outputs = []
        for request_id, left in list(self.left.items()):
            output = worker_pb2.SequenceOutput(request_id=request_id, token_ids=(token_id,))
            if left == 1:
                output.finish_reason = _LENGTH
                self.drop(request_id)
            else:
                self.left[request_id] = left - 1
            outputs.append(output)
        return worker_pb2.DecodeRunResponse(outputs=outputs)


async def steps(
    batch: Batch,
    pace: Pace,
    stamps: Stamps,
    write: Callable[[worker_pb2.DecodeRunResponse], Awaitable[None]],
) -> None:
    """Step a batch for ever, at its pace."""
    while True:
        await batch.has_work.wait()
        await pace.next()
        if not batch.left:  # the last one has been aborted meanwhile
            pace.arrived()
        else:
            token_id = stamps.open(len(batch.left), pace.arrived)
            message = batch.step(token_id)
            stamps.sent(token_id)
            await write(message)


class MockDecode(Mock, worker_pb2_grpc.DecodeServicer):
    """Reserves whatever it is asked to, and gives tokens at a set pace, a message for each step."""

    role = common_pb2.ROLE_DECODE

    def __init__(
        self,
        name: str,
        text: TextAssets,
        *,
        max_sequences: int,
        stamps: Stamps,
        pace: Callable[[], Pace],
    ) -> None:
        super().__init__(name, text, max_sequences=max_sequences)
        self._stamps = stamps
        self._pace = pace
        self._batches: dict[str, Batch] = {}
        # Of those that do not run yet: the batch, the tokens, and what is still missing.
        self._waiting: dict[int, tuple[Batch, int, set[str]]] = {}

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add the role's servicer."""
        worker_pb2_grpc.add_DecodeServicer_to_server(self, server)

    async def Reserve(
        self, request: worker_pb2.ReserveRequest, context: Any
    ) -> worker_pb2.ReserveResponse:
        """Grant what is asked for; a transfer has its request's id."""
        batch = self._batches[request.router_id]
        tokens = request.stop.max_new_tokens - 1
        self._waiting[request.request_id] = (batch, tokens, {"kv", "token"})
        grant = kv_pb2.Grant(
            transfer_id=request.request_id, epoch=1, nonce=b"n", instance=self.name
        )
        return worker_pb2.ReserveResponse(grant=grant, blocks=1)

    def has(self, request_id: int, what: str) -> None:
        """Take note that a request's "kv" or first "token" is here; with both it runs."""
        waiting = self._waiting.get(request_id)
        if waiting is None:
            return
        batch, tokens, missing = waiting
        missing.discard(what)
        if not missing:
            del self._waiting[request_id]
            batch.join(request_id, tokens)

    async def Run(  # type: ignore[override]
        self, request_iterator: AsyncIterator[worker_pb2.DecodeRunRequest], context: Any
    ) -> None:
        """Serve one router."""
        router_id = (await anext(request_iterator)).hello.router_id
        batch = self._batches[router_id] = Batch()
        stepping = asyncio.create_task(steps(batch, self._pace(), self._stamps, context.write))
        try:
            async for request in request_iterator:
                self.has(request.activate.request_id, "token")
        finally:
            stepping.cancel()
            del self._batches[router_id]

    async def Regrant(
        self, request: worker_pb2.RegrantRequest, context: Any
    ) -> worker_pb2.RegrantResponse:
        """Say that the KV is complete: no prefill instance is ever lost here."""
        return worker_pb2.RegrantResponse()

    async def Abort(
        self, request: worker_pb2.DecodeAbortRequest, context: Any
    ) -> worker_pb2.DecodeAbortResponse:
        """Forget a request."""
        self._waiting.pop(request.request_id, None)
        for batch in self._batches.values():
            batch.drop(request.request_id)
        return worker_pb2.DecodeAbortResponse()


class MockPrefill(Mock, worker_pb2_grpc.PrefillServicer):
    """Gives the first token at once, and tells decode that the KV is there once that is granted."""

    role = common_pb2.ROLE_PREFILL

    def __init__(
        self, name: str, text: TextAssets, *, max_sequences: int, decodes: Mapping[str, MockDecode]
    ) -> None:
        super().__init__(name, text, max_sequences=max_sequences)
        self._decodes = decodes

    def add_to(self, server: grpc.aio.Server) -> None:
        """Add the role's servicer."""
        worker_pb2_grpc.add_PrefillServicer_to_server(self, server)

    async def Run(  # type: ignore[override]
        self, request_iterator: AsyncIterator[worker_pb2.PrefillRunRequest], context: Any
    ) -> None:
        """Serve one request."""
        start = (await anext(request_iterator)).start
        first = worker_pb2.FirstToken(token_id=0)
        await context.write(worker_pb2.PrefillRunResponse(first_token=first))
        granted = await anext(request_iterator, None)
        for grant in granted.grants.grants if granted is not None else ():
            self._decodes[grant.instance].has(grant.transfer_id, "kv")
            done = worker_pb2.Transferred(bytes=start.ttl_ms, messages=1, transport="mock")
            await context.write(worker_pb2.PrefillRunResponse(transferred=done))

    async def Abort(
        self, request: worker_pb2.PrefillAbortRequest, context: Any
    ) -> worker_pb2.PrefillAbortResponse:
        """Say that it is over; the end of the stream has done the work."""
        return worker_pb2.PrefillAbortResponse()


class Pools:
    """Mocks of both roles; a context manager that starts and ends them."""

    def __init__(
        self,
        routers: list[str],
        *,
        prefills: int,
        decodes: int,
        sequences: int,
        stamps: Stamps,
        pace: Callable[[], Pace],
    ) -> None:
        text = assets()
        self._routers = routers
        self._decodes = {
            name: MockDecode(name, text, max_sequences=sequences, stamps=stamps, pace=pace)
            for name in (f"decode-{i}" for i in range(decodes))
        }
        self._prefills = [
            MockPrefill(f"prefill-{i}", text, max_sequences=sequences, decodes=self._decodes)
            for i in range(prefills)
        ]

    @property
    def instances(self) -> int:
        """How many there are, of both roles."""
        return len(self._all)

    @property
    def _all(self) -> list[Mock]:
        return [*self._prefills, *self._decodes.values()]

    async def __aenter__(self) -> "Pools":
        # One after another: they would all send the tokenizer.
        for mock in self._all:
            await mock.start(self._routers)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(mock.stop() for mock in self._all))
