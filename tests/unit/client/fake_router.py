"""A router for the client's tests: answers what it is told to, and notes what it was asked."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status
from twinpool.v1 import inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from twinpool.v1.common_pb2 import FINISH_REASON_LENGTH, ROLE_DECODE
from twinpool.v1.inference_pb2 import (
    CountTokensRequest,
    CountTokensResponse,
    DescribeRequest,
    DescribeResponse,
    GenerateRequest,
    GenerateResponse,
    ListModelsRequest,
    ListModelsResponse,
    RequestStats,
    ServedModel,
    Usage,
)

PATIENCE_S = 20.0


@dataclass(frozen=True)
class Failure:
    """An error with details as the service sends them; without any it is a bare status."""

    code: grpc.StatusCode
    message: str
    details: tuple[Message, ...] = ()

    def end(self, context: grpc.ServicerContext) -> None:
        if not self.details:
            context.abort(self.code, self.message)
        status = Status(code=self.code.value[0], message=self.message)
        for detail in self.details:
            status.details.add().Pack(detail)
        context.abort_with_status(rpc_status.to_status(status))


class WaitForClient:
    """A step that lasts until the client has left."""


Step = GenerateResponse | Failure | WaitForClient

STATS = RequestStats(
    queue_s=0.5,
    prefill_s=0.25,
    handoff_s=0.125,
    kv_bytes=4096,
    kv_transport="loopback",
    prefill_instance="p0",
    decode_instance="d0",
    retries=1,
    cached_tokens=7,
    decode_cached_tokens=5,
    moves=2,
    pause_s=0.75,
)


def part(text: str, *token_ids: int, last: bool = False) -> GenerateResponse:
    message = GenerateResponse(request_id="00000000000000ab", text=text, token_ids=token_ids)
    if last:
        message.finish_reason = FINISH_REASON_LENGTH
        message.usage.CopyFrom(Usage(prompt_tokens=3, completion_tokens=2))
        message.stats.CopyFrom(STATS)
    return message


ANSWER: tuple[Step, ...] = (part("Hel", 1), part("lo", 2, last=True))


@dataclass
class FakeRouter(inference_pb2_grpc.InferenceServicer, worker_pb2_grpc.MembershipServicer):
    script: tuple[Step, ...] = ANSWER
    address: str = ""
    requests: list[GenerateRequest] = field(default_factory=list)
    metadata: dict[str, str | bytes] = field(default_factory=dict)
    time_left_s: float | None = None
    client_left: threading.Event = field(default_factory=threading.Event)

    def Generate(self, request: GenerateRequest, context: Any) -> Iterator[GenerateResponse]:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        self.time_left_s = context.time_remaining()
        answered, ended = threading.Event(), threading.Event()

        def end() -> None:
            ended.set()
            if not answered.is_set():
                self.client_left.set()

        context.add_callback(end)
        for step in self.script:
            match step:
                case GenerateResponse():
                    yield step
                case Failure():
                    step.end(context)
                case WaitForClient():
                    ended.wait(PATIENCE_S)
                    return
        answered.set()

    def Describe(self, request: DescribeRequest, context: Any) -> DescribeResponse:
        if isinstance(self.script[0], Failure):
            self.script[0].end(context)
        self.metadata = dict(context.invocation_metadata())
        return DescribeResponse(model=request.model or "tiny", max_model_len=64, vocab_size=9)

    def ListModels(self, request: ListModelsRequest, context: Any) -> ListModelsResponse:
        return ListModelsResponse(
            models=[
                ServedModel(name="tiny", architecture="A", max_model_len=64, ready=True),
                ServedModel(name="wide", max_request_tokens=99),
            ]
        )

    def CountTokens(self, request: CountTokensRequest, context: Any) -> CountTokensResponse:
        return CountTokensResponse(tokens=len(request.prompt.text))

    def GetStatus(
        self, request: worker_pb2.GetStatusRequest, context: Any
    ) -> worker_pb2.GetStatusResponse:
        instance = worker_pb2.InstanceStatus(name="d0", role=ROLE_DECODE, layout="tp1", running=2)
        instance.blocks.free = 7
        instance.capacity.block_size = 16
        return worker_pb2.GetStatusResponse(
            router_id="r",
            uptime_s=1.5,
            instances=[instance],
            requests=worker_pb2.RequestCounts(finished=2**40),
            models=[_model("tiny", finished=3, ready=True), _model("wide")],
            missing=[worker_pb2.MissingInstance(role=ROLE_DECODE, address="127.0.0.1:7001")],
        )

    def Register(self, request_iterator: Any, context: Any) -> Any:
        raise NotImplementedError

    def Drain(self, request: Any, context: Any) -> Any:
        raise NotImplementedError


def _model(name: str, *, finished: int = 0, ready: bool = False) -> worker_pb2.ModelStatus:
    return worker_pb2.ModelStatus(
        model=worker_pb2.ModelDescription(name=name),
        requests=worker_pb2.RequestCounts(finished=finished),
        ready=ready,
    )


@contextmanager
def running_server(
    router: FakeRouter, credentials: grpc.ServerCredentials | None = None
) -> Iterator[grpc.Server]:
    """Serve the router on a free loopback port, which goes to its `address`."""
    server = grpc.server(ThreadPoolExecutor(8))
    inference_pb2_grpc.add_InferenceServicer_to_server(router, server)
    worker_pb2_grpc.add_MembershipServicer_to_server(router, server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    router.address = f"127.0.0.1:{port}"
    server.start()
    try:
        yield server
    finally:
        server.stop(0).wait()
