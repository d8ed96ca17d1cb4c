"""Every method is in the table, and each is refused to whoever has not its right."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from twinpool.v1 import inference_pb2, rank_pb2, worker_pb2

from service.channels import dial
from service.errors import PermissionDenied, ServiceError, Unauthenticated
from service.lifecycle import Server
from service.security.access import Access, current_caller
from service.security.rights import OPEN, RIGHTS, Right
from service.security.settings import Security
from service.security.tokens import TokenFile, WorkerToken, hash_of, new_token
from service.status import from_rpc_error

FILES = (inference_pb2, worker_pb2, rank_pb2)
METHODS = sorted(
    f"/{service.full_name}/{method.name}"
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)
TOKENS = {right: new_token() for right in Right}
WORKER = new_token()


def test_table_has_every_method_and_no_other() -> None:
    ours = {method for method in RIGHTS if method.startswith("/twinpool.")}
    assert ours == set(METHODS)
    assert len(METHODS) == 14


def test_nothing_of_ours_is_open() -> None:
    assert {method.split("/")[1] for method in OPEN} == {health.SERVICE_NAME}
    assert not OPEN & RIGHTS.keys()


@pytest.fixture
def access(tmp_path: Path) -> Access:
    entries = [
        {"name": right.value, "tenant": "t", "rights": [right.value], "sha256": hash_of(token)}
        for right, token in TOKENS.items()
    ]
    (tmp_path / "tokens").write_text(yaml.safe_dump({"tokens": entries}))
    return Access(tokens=TokenFile(tmp_path / "tokens"), worker=_worker(tmp_path), is_router=True)


def _worker(folder: Path) -> WorkerToken:
    (folder / "worker").write_text(WORKER)
    return WorkerToken(folder / "worker")


def shown(token: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "x"), ("authorization", f"Bearer {token}")]


@pytest.mark.parametrize("method", METHODS)
def test_call_needs_a_known_token(access: Access, method: str) -> None:
    for metadata, reason in (
        ([], "TOKEN_MISSING"),
        ([("authorization", "")], "TOKEN_MALFORMED"),
        ([("authorization", "Bearer ")], "TOKEN_MALFORMED"),
        ([("authorization", f"Basic {TOKENS[RIGHTS[method]]}")], "TOKEN_MALFORMED"),
        ([*shown(TOKENS[RIGHTS[method]]), *shown(new_token())], "TOKEN_MALFORMED"),
        (shown(new_token()), "TOKEN_UNKNOWN"),
        (shown(hash_of(TOKENS[RIGHTS[method]])), "TOKEN_UNKNOWN"),
    ):
        with pytest.raises(Unauthenticated) as caught:
            access.authorize(method, metadata)
        assert caught.value.reason == reason


@pytest.mark.parametrize("method", METHODS)
def test_only_the_methods_own_right_lets_in(access: Access, method: str) -> None:
    for right, token in TOKENS.items():
        if right is RIGHTS[method]:
            caller = access.authorize(method, shown(token))
            assert caller is not None
            assert caller.name == right.value
        else:
            with pytest.raises(PermissionDenied) as caught:
                access.authorize(method, shown(token))
            assert caught.value.reason == "RIGHT_MISSING"
            assert token not in caught.value.message


def test_method_that_is_not_in_the_table_is_refused_to_all(access: Access) -> None:
    for token in (*TOKENS.values(), WORKER):
        with pytest.raises(PermissionDenied) as caught:
            access.authorize("/twinpool.v1.Inference/Newer", shown(token))
        assert caught.value.reason == "METHOD_NOT_LISTED"
    with pytest.raises(Unauthenticated):
        access.authorize("/twinpool.v1.Inference/Newer", [])


def test_workers_token_registers_and_does_nothing_else_at_a_router(access: Access) -> None:
    access.authorize("/twinpool.v1.Membership/Register", shown(WORKER))
    for method in ("/twinpool.v1.Inference/Generate", "/twinpool.v1.Membership/GetStatus"):
        with pytest.raises(PermissionDenied):
            access.authorize(method, shown(WORKER))


def test_router_without_tokens_file_asks_only_workers(tmp_path: Path) -> None:
    access = Access(worker=_worker(tmp_path), is_router=True)
    assert not access.is_complete
    assert access.authorize("/twinpool.v1.Inference/Generate", []) is None
    with pytest.raises(Unauthenticated):
        access.authorize("/twinpool.v1.Membership/Register", [])
    with pytest.raises(Unauthenticated):
        access.authorize("/twinpool.v1.Membership/Newer", [])


def test_instance_asks_for_the_workers_token_whatever_is_called(tmp_path: Path) -> None:
    access = Access(worker=_worker(tmp_path))
    for method in RIGHTS:
        with pytest.raises(Unauthenticated):
            access.authorize(method, [])
    access.authorize("/twinpool.v1.Decode/Run", shown(WORKER))


# ---- through a real server

KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


@asynccontextmanager
async def serving(access: Access, seen: list[Any]) -> AsyncIterator[grpc.aio.Channel]:
    """A server with a handler of each kind under Generate's name, which keeps who called."""
    server = Server("test", security=Security(access=access), reflection=True)

    async def answer(request: Any, context: Any) -> Any:
        seen.append(current_caller())
        if isinstance(request, bytes):
            return b"answer"
        return await anext(request)

    async def answers(request: Any, context: Any) -> AsyncIterator[bytes]:
        seen.append(current_caller())
        yield b"answer"

    handlers: dict[str, Any] = {
        "unary_unary": grpc.unary_unary_rpc_method_handler(answer),
        "unary_stream": grpc.unary_stream_rpc_method_handler(answers),
        "stream_unary": grpc.stream_unary_rpc_method_handler(answer),
        "stream_stream": grpc.stream_stream_rpc_method_handler(answers),
    }

    def add(made: Any, to: grpc.aio.Server) -> None:
        kinds = dict(zip(KINDS, ("Generate", "Describe", "CountTokens", "Other"), strict=True))
        methods = {kinds[kind]: handler for kind, handler in handlers.items()}
        generic = grpc.method_handlers_generic_handler("twinpool.v1.Inference", methods)
        to.add_generic_rpc_handlers((generic,))

    server.add(add, None, "twinpool.v1.Inference")
    await server.start()
    try:
        async with dial(server.address) as channel:
            yield channel
    finally:
        await server.stop()


async def ask(channel: grpc.aio.Channel, kind: str, method: str, token: str | None) -> bytes:
    """One call of any kind; raises the service error it ends with."""
    call = getattr(channel, kind)(f"/twinpool.v1.Inference/{method}")
    request = b"answer" if kind.startswith("unary") else iter([b"answer"])
    metadata = (("authorization", f"Bearer {token}"),) if token is not None else ()
    try:
        started = call(request, metadata=metadata, timeout=10)
        if kind.endswith("unary"):
            return bytes(await started)
        return b"".join([bytes(message) async for message in started])
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


@pytest.mark.parametrize(
    ("kind", "method"),
    [("unary_unary", "Generate"), ("unary_stream", "Describe"), ("stream_unary", "CountTokens")],
)
async def test_calls_of_every_kind_are_guarded(access: Access, kind: str, method: str) -> None:
    seen: list[Any] = []
    async with serving(access, seen) as channel:
        for token, expected in ((None, Unauthenticated), (TOKENS[Right.WORKER], PermissionDenied)):
            with pytest.raises(expected):
                await ask(channel, kind, method, token)
        assert seen == []
        assert await ask(channel, kind, method, TOKENS[Right.INFERENCE]) == b"answer"
    assert [caller.name for caller in seen] == ["inference"]


async def test_stream_that_is_in_no_table_never_reaches_its_handler(access: Access) -> None:
    seen: list[Any] = []
    async with serving(access, seen) as channel:
        for token in (None, *TOKENS.values()):
            with pytest.raises((Unauthenticated, PermissionDenied)):
                await ask(channel, "stream_stream", "Other", token)
    assert seen == []


async def test_every_method_is_refused_over_the_wire(access: Access) -> None:
    async with serving(access, []) as channel:
        for method in METHODS:
            wrong = next(token for right, token in TOKENS.items() if right is not RIGHTS[method])
            for token in (None, new_token()):
                error = await _error_of_stream(channel, method, token)
                assert isinstance(error, Unauthenticated)
            assert isinstance(await _error_of_stream(channel, method, wrong), PermissionDenied)
            # With a message: a handler that gets in and takes one would wait for it.
            error = await _error_of_stream(channel, method, TOKENS[RIGHTS[method]], b"answer")
            assert not isinstance(error, Unauthenticated | PermissionDenied)


async def test_health_is_open_and_reflection_is_not(access: Access) -> None:
    async with serving(access, []) as channel:
        request = health_pb2.HealthCheckRequest(service="twinpool.v1.Inference")
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        error = await _error_of_stream(channel, path, None)
        assert isinstance(error, Unauthenticated)
        error = await _error_of_stream(channel, path, TOKENS[Right.INFERENCE])
        assert isinstance(error, PermissionDenied)
        assert await _error_of_stream(channel, path, TOKENS[Right.ADMIN]) is None


async def _error_of_stream(
    channel: grpc.aio.Channel, path: str, token: str | None, *messages: bytes
) -> ServiceError | None:
    metadata = (("authorization", f"Bearer {token}"),) if token is not None else ()
    start: Any = channel.stream_stream(path)
    call = start(iter(messages), metadata=metadata, timeout=10)
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    return None
