"""Scripted instances of both roles on real gRPC.

They speak the whole control path and move no KV: a fake prefill tells a fake decode in memory that
a transfer is complete.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from twinpool.v1 import common_pb2, kv_pb2, worker_pb2, worker_pb2_grpc

from service.errors import Incompatible, NotFound, ServiceError, WorkFailed
from service.registration import PrefixSource, Registration
from service.security.settings import PLAIN, Security
from service.status import StatusInterceptor
from tests.unit.router.served import ASSETS, TOKENIZER, layout, model

EOF: Any = grpc.aio.EOF
LENGTH = common_pb2.FINISH_REASON_LENGTH
STOP = common_pb2.FINISH_REASON_STOP


class FakeInstance:
    """What both roles share: a gRPC server, a hello and, after `join`, a Register stream."""

    role = common_pb2.ROLE_UNSPECIFIED

    def __init__(
        self,
        name: str,
        *,
        epoch: int = 1,
        blocks: int = 64,
        max_sequences: int = 8,
        answer: str = "hello world",
        model_description: worker_pb2.ModelDescription | None = None,
        prefix_seed: bytes = b"",
        prefixes: PrefixSource | None = None,
        expected_output_tokens: int = 0,
        local_prefill_tokens: int = 0,
        colocated: bool = False,
        security: Security = PLAIN,
    ) -> None:
        self.name = name
        self.security = security
        self.epoch = epoch
        self.answer = TOKENIZER.encode(answer)
        self.capacity = worker_pb2.Capacity(
            blocks=blocks,
            block_size=16,
            max_sequences=max_sequences,
            max_sequence_tokens=16 * blocks,
            expected_output_tokens=expected_output_tokens,
            local_prefill_tokens=local_prefill_tokens,
            colocated=colocated,
        )
        self.model = model_description or model()
        self.layout = layout()
        self.peers: list[worker_pb2.Peer] = []
        self.drains: list[str] = []
        self.prefix_seed = prefix_seed
        self.prefixes = prefixes
        self.assets_asked = 0
        self.draining = False
        self.aborted: list[int] = []
        # Hears what came beside a request.
        self.on_metadata: Callable[[Any], object] = lambda _: None
        self.address = ""
        self._server = grpc.aio.server(interceptors=[StatusInterceptor()])
        self._registration: asyncio.Task[None] | None = None

    def hello(self) -> worker_pb2.InstanceHello:
        return worker_pb2.InstanceHello(
            name=self.name,
            epoch=self.epoch,
            role=self.role,
            address=self.address,
            model=self.model,
            layout=self.layout,
            capacity=self.capacity,
            data_token=f"{self.name} {self.epoch}".encode(),
            version="test",
            prefix_seed=self.prefix_seed,
        )

    def _add_to(self, server: grpc.aio.Server) -> None:
        raise NotImplementedError

    def _assets(self) -> dict[str, bytes]:
        self.assets_asked += 1
        return dict(ASSETS.files)

    async def start(self) -> None:
        self._add_to(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    def join(self, router_address: str) -> "asyncio.Task[None]":
        registration = Registration(
            router_address=router_address,
            hello=self.hello(),
            heartbeat=lambda: worker_pb2.Heartbeat(running=1, draining=self.draining),
            assets=self._assets,
            on_peers=lambda peers: setattr(self, "peers", peers),
            on_drain=self.drains.append,
            prefixes=self.prefixes,
            security=self.security,
        )
        self._registration = asyncio.create_task(registration.run())
        return self._registration

    async def hang_up(self) -> None:
        """Ends all streams but the registration, as if a dying process let go of that last."""
        await self._server.stop(0)

    async def die(self) -> None:
        """Ends at once, as a killed process does."""
        if self._registration is not None:
            self._registration.cancel()
        await self.hang_up()
        if self._registration is not None:
            await asyncio.wait({self._registration})


class FakeDecode(FakeInstance, worker_pb2_grpc.DecodeServicer):
    """Reserves, waits for the first token and the KV, then gives one token a step."""

    role = common_pb2.ROLE_DECODE

    def __init__(self, name: str, *, silent_after: int | None = None, **options: Any) -> None:
        super().__init__(name, **options)
        self.reserves: dict[int, worker_pb2.ReserveRequest] = {}
        self.cached_tokens = 0
        self.regrants: list[worker_pb2.RegrantRequest] = []
        self.regrant_gate = _open_gate()
        self.regrant_errors: list[ServiceError] = []
        # The request of each transfer that decode still counts on.
        self.transfers: dict[int, int] = {}
        self.held: dict[int, str] = {}
        self.reserve_errors: list[ServiceError] = []
        self.reserve_gate = _open_gate()
        self.prompt_gate = _open_gate()
        self.step_gate = _open_gate()
        self.tokens_per_step = 1
        self.silent_after = silent_after
        self.fail_after: tuple[int, worker_pb2.SequenceFailure] | None = None
        self.fail_prompt: worker_pb2.SequenceFailure | None = None
        self.stops_at_once = False
        # Sequences that are to pause or have, and what makes them go on.
        self.pausing: dict[int, asyncio.Event] = {}
        # After so many tokens it waits to be asked for a pause.
        self.pause_after: int | None = None
        self._asked_to_pause = asyncio.Event()
        self.decode_named: Callable[[str], FakeDecode] = lambda _: self
        self.paused_ranks: list[int] = []
        self.sends: list[worker_pb2.Send] = []
        self.send_gate = _open_gate()
        self.send_failure: worker_pb2.TransferLost | None = None
        # Says nothing of what it has sent.
        self.is_mute = False
        self.loses_transfers = False
        self._transfer_ids = itertools.count(1)
        self._streams: dict[str, asyncio.Queue[worker_pb2.DecodeRunResponse | None]] = {}
        self._activated: dict[int, asyncio.Future[None]] = {}
        self._complete: dict[int, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def _add_to(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_DecodeServicer_to_server(self, server)

    async def Reserve(
        self, request: worker_pb2.ReserveRequest, context: Any
    ) -> worker_pb2.ReserveResponse:
        self.reserves[request.request_id] = request
        self.on_metadata(context.invocation_metadata())
        if request.router_id not in self._streams:
            raise Incompatible("no Run stream", reason="NO_RUN_STREAM")
        if request.local_prefill:
            return await self._reserve_local(request)
        await self.reserve_gate.wait()
        if self.reserve_errors:
            raise self.reserve_errors.pop(0)
        loop = asyncio.get_running_loop()
        self.held[request.request_id] = request.router_id
        self._activated[request.request_id] = loop.create_future()
        self._complete[request.request_id] = loop.create_future()
        self._spawn(self._decode(request))
        return worker_pb2.ReserveResponse(
            grant=self._grant(request.request_id), blocks=1, cached_tokens=self.cached_tokens
        )

    async def _reserve_local(
        self, request: worker_pb2.ReserveRequest
    ) -> worker_pb2.ReserveResponse:
        """The first token may come before the answer."""
        assert not request.prefill_instance
        assert len(request.prompt_token_ids) + len(request.output_token_ids) == (
            request.prompt_tokens
        )
        self.held[request.request_id] = request.router_id
        self._spawn(self._compute(request))
        await self.reserve_gate.wait()
        return worker_pb2.ReserveResponse(blocks=1, cached_tokens=self.cached_tokens)

    async def _compute(self, request: worker_pb2.ReserveRequest) -> None:
        request_id, given = request.request_id, len(request.output_token_ids)
        await self.prompt_gate.wait()
        if request_id not in self.held:
            return
        if self.fail_prompt is not None:
            failure = worker_pb2.SequenceFailure()
            failure.CopyFrom(self.fail_prompt)
            failure.request_id = request_id
            del self.held[request_id]
            self._say(request.router_id, worker_pb2.DecodeRunResponse(failures=[failure]))
            return
        finish = common_pb2.FINISH_REASON_UNSPECIFIED
        if given + 1 == request.stop.max_new_tokens:
            finish = LENGTH
        if self.stops_at_once:
            finish = STOP
        if finish:
            del self.held[request_id]
        first = worker_pb2.FirstToken(
            token_id=self.answer[given % len(self.answer)],
            finish_reason=finish,
            prefill_s=0.25,
            cached_tokens=self.cached_tokens,
        )
        told = worker_pb2.LocalFirstToken(request_id=request_id, first_token=first)
        self._say(request.router_id, worker_pb2.DecodeRunResponse(first_tokens=[told]))
        for futures in (self._complete, self._activated):
            futures[request_id] = asyncio.get_running_loop().create_future()
            futures[request_id].set_result(None)
        await self._decode(request)

    async def Regrant(
        self, request: worker_pb2.RegrantRequest, context: Any
    ) -> worker_pb2.RegrantResponse:
        self.regrants.append(request)
        await self.regrant_gate.wait()
        if self.regrant_errors:
            raise self.regrant_errors.pop(0)
        if request.request_id not in self.held:
            raise NotFound("the request has no reservation here")
        if self._complete[request.request_id].done():
            return worker_pb2.RegrantResponse()
        return worker_pb2.RegrantResponse(grant=self._grant(request.request_id))

    def _grant(self, request_id: int) -> kv_pb2.Grant:
        """Only the newest transfer of a request counts."""
        self.transfers = {t: r for t, r in self.transfers.items() if r != request_id}
        transfer_id = next(self._transfer_ids)
        self.transfers[transfer_id] = request_id
        return kv_pb2.Grant(
            transfer_id=transfer_id, epoch=self.epoch, nonce=b"n", instance=self.name
        )

    def lose(self, transfer_id: int, *, retryable: bool = True) -> None:
        """Tells the router that a transfer will not be complete."""
        request_id = self.transfers[transfer_id]
        lost = worker_pb2.TransferLost(
            request_id=request_id,
            transfer_id=transfer_id,
            reason="PeerLost",
            message="gone",
            retryable=retryable,
        )
        message = worker_pb2.DecodeRunResponse(lost_transfers=[lost])
        self._say(self.held[request_id], message)

    @property
    def completions(self) -> "list[asyncio.Future[None]]":
        """One for each request: done when its KV is complete."""
        return list(self._complete.values())

    def complete(self, transfer_id: int) -> None:
        future = self._complete.get(self.transfers.get(transfer_id, -1))
        if future is not None and not future.done():
            future.set_result(None)

    async def Run(
        self, request_iterator: AsyncIterator[worker_pb2.DecodeRunRequest], context: Any
    ) -> AsyncIterator[worker_pb2.DecodeRunResponse]:
        first = await anext(request_iterator)
        router_id = first.hello.router_id
        queue: asyncio.Queue[worker_pb2.DecodeRunResponse | None] = asyncio.Queue()
        self._streams[router_id] = queue
        reader = asyncio.ensure_future(self._read(request_iterator, queue))
        try:
            while (message := await queue.get()) is not None:
                yield message
        finally:
            reader.cancel()
            del self._streams[router_id]
            for request_id in [r for r, owner in self.held.items() if owner == router_id]:
                del self.held[request_id]

    async def _read(
        self,
        requests: AsyncIterator[worker_pb2.DecodeRunRequest],
        queue: "asyncio.Queue[worker_pb2.DecodeRunResponse | None]",
    ) -> None:
        async for request in requests:
            match request.WhichOneof("kind"):
                case "activate":
                    self.first_token = request.activate.first_token_id
                    self._activated[request.activate.request_id].set_result(None)
                case "pause":
                    self.pausing[request.pause.request_id] = asyncio.Event()
                    self._asked_to_pause.set()
                case "resume":
                    self.pausing.pop(request.resume.request_id).set()
                case "send":
                    self.sends.append(request.send)
                    self._spawn(self._send(request.send))
        queue.put_nowait(None)

    async def _send(self, send: worker_pb2.Send) -> None:
        await self.send_gate.wait()
        router_id = self.held.get(send.request_id)
        if router_id is None:
            return
        if self.send_failure is not None:
            lost = worker_pb2.TransferLost()
            lost.CopyFrom(self.send_failure)
            lost.request_id, lost.transfer_id = send.request_id, send.grant.transfer_id
            self._say(router_id, worker_pb2.DecodeRunResponse(lost_transfers=[lost]))
            return
        self.decode_named(send.grant.instance).complete(send.grant.transfer_id)
        if not self.is_mute:
            del self.held[send.request_id]
            sent = worker_pb2.Sent(
                request_id=send.request_id,
                transfer_id=send.grant.transfer_id,
                bytes=8192,
                transport="fake/memory",
            )
            self._say(router_id, worker_pb2.DecodeRunResponse(sent=[sent]))

    async def Abort(
        self, request: worker_pb2.DecodeAbortRequest, context: Any
    ) -> worker_pb2.DecodeAbortResponse:
        self.aborted.append(request.request_id)
        self.held.pop(request.request_id, None)
        return worker_pb2.DecodeAbortResponse()

    async def _decode(self, request: worker_pb2.ReserveRequest) -> None:
        request_id = request.request_id
        await self._complete[request_id]
        await self._activated[request_id]
        total = request.stop.max_new_tokens
        position = len(request.output_token_ids) + 1
        while position < total and request_id in self.held:
            await self.step_gate.wait()
            if self.pause_after is not None and position >= self.pause_after:
                await self._asked_to_pause.wait()
            if request_id in self.pausing:
                go_on = self.pausing[request_id]
                paused = worker_pb2.Paused(
                    request_id=request_id,
                    tokens=request.prompt_tokens - len(request.output_token_ids) + position - 1,
                    ranks=self.paused_ranks,
                )
                self._say(request.router_id, worker_pb2.DecodeRunResponse(paused=[paused]))
                await go_on.wait()
                continue
            if self.silent_after is not None and position >= self.silent_after:
                return
            if self.fail_after is not None and position >= self.fail_after[0]:
                failure = worker_pb2.SequenceFailure()
                failure.CopyFrom(self.fail_after[1])
                failure.request_id = request_id
                self._say(request.router_id, worker_pb2.DecodeRunResponse(failures=[failure]))
                return
            end = min(total, position + self.tokens_per_step)
            ids = [self.answer[p % len(self.answer)] for p in range(position, end)]
            position = end
            finish = LENGTH if position == total else common_pb2.FINISH_REASON_UNSPECIFIED
            if finish:
                self.held.pop(request_id, None)
            output = worker_pb2.SequenceOutput(
                request_id=request_id,
                token_ids=ids,
                finish_reason=finish,
                logprobs=[_logprobs(i) for i in ids if request.sampling.HasField("logprobs")],
            )
            self._say(request.router_id, worker_pb2.DecodeRunResponse(outputs=[output]))
            await asyncio.sleep(0)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _say(self, router_id: str, message: worker_pb2.DecodeRunResponse) -> None:
        if router_id in self._streams:
            self._streams[router_id].put_nowait(message)

    async def die(self) -> None:
        await super().die()
        for task in list(self._tasks):
            task.cancel()


class FakePrefill(FakeInstance, worker_pb2_grpc.PrefillServicer):
    """Gives the first token, and after the grant the end of the transfer."""

    role = common_pb2.ROLE_PREFILL

    def __init__(self, name: str, decodes: Callable[[str], FakeDecode], **options: Any) -> None:
        super().__init__(name, **options)
        self._decode_named = decodes
        self.starts: list[worker_pb2.PrefillStart] = []
        self.open: set[int] = set()
        self.errors: list[ServiceError] = []
        self.compute_gate = _open_gate()
        self.transfer_gate = _open_gate()
        self.fail_transfer = False
        # Sends all of the KV and then never says a token.
        self.sends_before_token = False
        self.first_finish = common_pb2.FINISH_REASON_UNSPECIFIED

    def _add_to(self, server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_PrefillServicer_to_server(self, server)

    async def Run(
        self, request_iterator: AsyncIterator[worker_pb2.PrefillRunRequest], context: Any
    ) -> AsyncIterator[worker_pb2.PrefillRunResponse]:
        start = (await anext(request_iterator)).start
        self.starts.append(start)
        self.on_metadata(context.invocation_metadata())
        self.open.add(start.request_id)
        try:
            await self.compute_gate.wait()
            if self.sends_before_token:
                [grant] = (await anext(request_iterator)).grants.grants
                self._decode_named(grant.instance).complete(grant.transfer_id)
                await asyncio.Event().wait()
            if self.errors:
                raise self.errors.pop(0)
            finish = self.first_finish
            if start.stop.max_new_tokens == start.output_tokens + 1:
                finish = LENGTH
            token_id = self.answer[start.output_tokens % len(self.answer)]
            first = worker_pb2.FirstToken(
                token_id=token_id,
                finish_reason=finish,
                prefill_s=0.25 + start.output_tokens,
                logprobs=_logprobs(token_id) if start.sampling.HasField("logprobs") else None,
            )
            yield worker_pb2.PrefillRunResponse(first_token=first)
            if finish or not start.transfer:
                return
            granted = await anext(request_iterator, None)
            if granted is None:
                return
            [grant] = granted.grants.grants
            await self.transfer_gate.wait()
            if self.fail_transfer:
                raise WorkFailed("the peer is lost", reason="PeerLost", retryable=True)
            decode = self._decode_named(grant.instance)
            if decode.loses_transfers:
                decode.lose(grant.transfer_id)
                await asyncio.Event().wait()
            decode.complete(grant.transfer_id)
            done = worker_pb2.Transferred(
                bytes=4096, messages=1, transport="fake/memory", handoff_s=0.125
            )
            yield worker_pb2.PrefillRunResponse(transferred=done)
        finally:
            self.open.discard(start.request_id)

    async def Abort(
        self, request: worker_pb2.PrefillAbortRequest, context: Any
    ) -> worker_pb2.PrefillAbortResponse:
        self.aborted.append(request.request_id)
        return worker_pb2.PrefillAbortResponse()


def _open_gate() -> asyncio.Event:
    gate = asyncio.Event()
    gate.set()
    return gate


def _logprobs(token_id: int) -> common_pb2.PositionLogprobs:
    entry = common_pb2.TokenLogprob(token_id=token_id, logprob=-0.5)
    return common_pb2.PositionLogprobs(chosen=entry, top=[entry])
