"""The synchronous client against a server in this process."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from twinpool import (
    BlockCounts,
    Client,
    Completion,
    DeadlineExceeded,
    RequestStats,
    ServerError,
    Unavailable,
    Usage,
)

from tests.unit.client.fake_router import (
    PATIENCE_S,
    FakeRouter,
    WaitForClient,
    part,
    running_server,
)

ENDLESS = (part("Hel", 1), part("lo", 2), WaitForClient())


@pytest.fixture
def client(router: FakeRouter) -> Iterator[Client]:
    with Client(router.address) as client:
        yield client


def test_stream_gives_the_chunks_in_order(client: Client) -> None:
    with client.generate("Hi") as stream:
        assert stream.request_id is None
        chunks = list(stream)
        assert stream.request_id == "00000000000000ab"
    first, last = chunks
    assert (first.text, first.token_ids, first.finish_reason) == ("Hel", (1,), None)
    assert first.usage is None
    assert first.stats is None
    assert (last.text, last.finish_reason) == ("lo", "length")
    assert last.usage == Usage(prompt_tokens=3, completion_tokens=2)


def test_complete_gives_the_whole_answer(client: Client) -> None:
    assert client.complete("Hi") == Completion(
        text="Hello",
        token_ids=(1, 2),
        finish_reason="length",
        usage=Usage(prompt_tokens=3, completion_tokens=2),
        logprobs=(),
        stats=RequestStats(
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
        ),
        request_id="00000000000000ab",
    )


def test_leaving_a_loop_aborts_the_request_while_the_stream_is_still_held(
    client: Client, router: FakeRouter
) -> None:
    router.script = ENDLESS
    stream = client.generate("Hi")
    for chunk in stream:
        assert chunk.text == "Hel"
        break
    assert router.client_left.wait(PATIENCE_S)
    assert list(stream) == []


def test_leaving_the_context_aborts_the_request(client: Client, router: FakeRouter) -> None:
    router.script = ENDLESS
    with client.generate("Hi") as stream:
        assert next(stream).text == "Hel"
        assert next(stream).text == "lo"
    assert router.client_left.wait(PATIENCE_S)


def test_exception_in_the_callers_loop_aborts_the_request(
    client: Client, router: FakeRouter
) -> None:
    router.script = ENDLESS

    def fail() -> None:
        for _ in client.generate("Hi"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert router.client_left.wait(PATIENCE_S)


def test_close_from_another_thread_ends_the_stream(client: Client, router: FakeRouter) -> None:
    router.script = ENDLESS
    stream = client.generate("Hi")
    next(stream), next(stream)
    closer = threading.Timer(0.05, stream.close)
    closer.start()
    assert list(stream) == []
    assert router.client_left.wait(PATIENCE_S)
    closer.join()


def test_closing_the_client_ends_its_streams_with_an_error(
    client: Client, router: FakeRouter
) -> None:
    router.script = ENDLESS
    stream = client.generate("Hi")
    next(stream)
    client.close()
    with pytest.raises(Unavailable):
        list(stream)
    assert router.client_left.wait(PATIENCE_S)
    with pytest.raises(ValueError, match="closed"):
        client.generate("Hi")
    with pytest.raises(ValueError, match="closed"):
        client.describe()


def test_answer_without_its_last_message_is_an_error(client: Client, router: FakeRouter) -> None:
    router.script = (part("Hel", 1),)
    with pytest.raises(ServerError, match="broke off") as caught:
        client.complete("Hi")
    assert caught.value.request_id == "00000000000000ab"
    router.script = ()
    with pytest.raises(ServerError, match="broke off"):
        list(client.generate("Hi"))


def test_timeout_is_the_calls_deadline(client: Client, router: FakeRouter) -> None:
    client.complete("Hi", timeout_s=500)
    assert router.time_left_s is not None
    assert 100 < router.time_left_s < 1000
    router.script = ENDLESS
    stream = client.generate("Hi", timeout_s=0.3)
    with pytest.raises(DeadlineExceeded, match="took longer than its timeout_s") as caught:
        list(stream)
    assert caught.value.request_id in ("00000000000000ab", None)
    assert list(stream) == []


def test_unreachable_server_is_named() -> None:
    with running_server(router := FakeRouter()):
        pass
    with Client(router.address) as client:
        with pytest.raises(Unavailable, match=f"no answer from {router.address}"):
            client.complete("Hi")
        with pytest.raises(Unavailable, match=router.address):
            client.status()


def test_server_that_dies_in_mid_answer_is_unavailable() -> None:
    router = FakeRouter(script=ENDLESS)
    with running_server(router) as server, Client(router.address) as client:
        stream = client.generate("Hi")
        next(stream), next(stream)
        server.stop(0)
        with pytest.raises(Unavailable) as caught:
            next(stream)
        assert caught.value.request_id == "00000000000000ab"


def test_one_client_serves_many_threads(client: Client, router: FakeRouter) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(client.complete, [f"prompt {n}" for n in range(32)]))
    assert {answer.text for answer in answers} == {"Hello"}
    assert {request.prompt.text for request in router.requests} == {
        f"prompt {n}" for n in range(32)
    }


def test_token_goes_with_every_call(router: FakeRouter) -> None:
    with Client(router.address, token="secret") as client:
        client.complete("Hi")
        assert router.metadata["authorization"] == "Bearer secret"
        router.metadata = {}
        client.describe()
        assert router.metadata["authorization"] == "Bearer secret"
    with Client(router.address) as client:
        client.complete("Hi")
        assert "authorization" not in router.metadata


def test_trace_goes_with_a_request(client: Client, router: FakeRouter) -> None:
    client.complete("Hi", traceparent="00-ab-cd-01", tracestate="a=1")
    assert router.metadata["traceparent"] == "00-ab-cd-01"
    assert router.metadata["tracestate"] == "a=1"


def test_credentials_make_the_connection_secure() -> None:
    router = FakeRouter()
    with running_server(router, grpc.local_server_credentials()):
        credentials = grpc.local_channel_credentials()
        with Client(router.address, credentials=credentials, token="secret") as client:
            assert client.complete("Hi").text == "Hello"


def test_questions_are_answered(client: Client) -> None:
    description = client.describe(model="big")
    assert (description.model, description.max_model_len) == ("big", 64)
    assert client.count_tokens("four") == 4
    assert [(m.name, m.ready, m.max_request_tokens) for m in client.models()] == [
        ("tiny", True, 0),
        ("wide", False, 99),
    ]
    status = client.status()
    (instance,) = status.instances
    assert status.model is None
    assert [(m.name, m.ready, m.requests.finished) for m in status.models] == [
        ("tiny", True, 3),
        ("wide", False, 0),
    ]
    assert [(m.role, m.address) for m in status.missing] == [("decode", "127.0.0.1:7001")]
    assert status.requests.finished == 2**40
    assert (instance.name, instance.role, instance.layout) == ("d0", "decode", "tp1")
    assert instance.blocks == BlockCounts(
        total=0, free=7, reserved=0, used=0, quarantined=0, cached=0
    )
    assert instance.capacity.block_size == 16


def test_address_that_is_no_text_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="host:port"):
        Client(9000)  # type: ignore[arg-type]
