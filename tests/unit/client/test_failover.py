"""One of several routers is lost: the answer goes on at another one, and is the same."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from twinpool import (
    AsyncClient,
    Client,
    Completion,
    DeadlineExceeded,
    Refused,
    ServerError,
    TwinpoolError,
    Unavailable,
)
from twinpool.channel import checked_addresses
from twinpool.failover import TRIES_EACH, Routers, Tries
from twinpool.v1.inference_pb2 import GenerateResponse, Terms

from tests.unit.client.fake_router import (
    PATIENCE_S,
    Failure,
    FakeRouter,
    Step,
    WaitForClient,
    part,
    running_server,
)

LOST = Failure(grpc.StatusCode.UNAVAILABLE, "Socket closed")
TERMS = Terms(seed=77, max_new_tokens=4, model_fingerprint="f00d", prompt_digest=b"p")


def first(text: str, *token_ids: int) -> GenerateResponse:
    message = part(text, *token_ids)
    message.terms.CopyFrom(TERMS)
    return message


BEGINNING: tuple[Step, ...] = (first("Hé", 1, 2), part("l", 3))
REST = part("lo", 4, last=True)


@pytest.fixture
def two() -> Iterator[tuple[FakeRouter, FakeRouter]]:
    """The first of the two is the one that requests go to."""
    one = FakeRouter(script=(*BEGINNING, LOST))
    other = FakeRouter(script=(REST,))
    with running_server(one), running_server(other):
        yield one, other


def ask(kind: str, *routers: FakeRouter, timeout_s: float | None = None) -> Completion:
    """Ask for an answer through either client."""
    addresses = [router.address for router in routers]
    if kind == "sync":
        with Client(addresses) as client:
            return client.complete("Hi", temperature=0.5, timeout_s=timeout_s)

    async def complete() -> Completion:
        async with AsyncClient(",".join(addresses)) as client:
            return await client.complete("Hi", temperature=0.5, timeout_s=timeout_s)

    return asyncio.run(complete())


either = pytest.mark.parametrize("kind", ["sync", "async"])


@either
def test_answer_goes_on_after_all_that_came(kind: str, two: tuple[FakeRouter, FakeRouter]) -> None:
    one, other = two
    answer = ask(kind, one, other, timeout_s=500)
    assert (answer.text, answer.token_ids) == ("Héllo", (1, 2, 3, 4))
    assert (answer.stats.moves, answer.stats.retries) == (3, 1)  # 2 and 1 are the router's own
    assert answer.stats.pause_s > 0.75
    [asked], [resumed] = one.requests, other.requests
    assert not asked.HasField("resume")
    assert resumed.prompt == asked.prompt
    assert resumed.sampling == asked.sampling
    assert resumed.resume.request_id == "00000000000000ab"
    assert resumed.resume.terms == TERMS
    assert list(resumed.resume.output_token_ids) == [1, 2, 3]
    assert resumed.resume.text_chars == 3


@either
@pytest.mark.parametrize(
    "failure",
    [
        LOST,
        Failure(grpc.StatusCode.CANCELLED, "the server stops"),
        Failure(grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2"),
        Failure(
            grpc.StatusCode.UNAVAILABLE,
            "this router is stopping",
            (ErrorInfo(reason="ROUTER_STOPS", domain="twinpool"),),
        ),
    ],
    ids=["socket", "cancelled", "reset", "stops"],
)
def test_request_without_a_token_is_asked_anew(
    kind: str, failure: Failure, two: tuple[FakeRouter, FakeRouter]
) -> None:
    one, other = two
    one.script = (failure,)
    other.script = (*BEGINNING, REST)
    answer = ask(kind, one, other)
    assert answer.text == "Héllo"
    assert (answer.stats.moves, answer.stats.retries) == (2, 2)
    assert not other.requests[0].HasField("resume")


@either
def test_router_that_never_was_there_is_passed_by(
    kind: str, two: tuple[FakeRouter, FakeRouter]
) -> None:
    _, other = two
    with running_server(gone := FakeRouter()):
        pass
    other.script = (*BEGINNING, REST)
    assert ask(kind, gone, other).text == "Héllo"


@either
def test_answer_may_move_as_often_as_it_grows(
    kind: str, two: tuple[FakeRouter, FakeRouter]
) -> None:
    one, other = two
    one.script = (first("a", 1), LOST)
    other.script = (first("b", 2), LOST)

    class Ends(FakeRouter):
        """Gives a token each time, and ends when there are eleven."""

        def Generate(self, request: object, context: object) -> Iterator[GenerateResponse]:
            had = len(request.resume.output_token_ids)  # type: ignore[attr-defined]
            self.script = (REST,) if had >= 10 else (first("x", had), LOST)
            return super().Generate(request, context)  # type: ignore[arg-type]

    with ExitStack() as stack:
        routers = [Ends(), Ends()]
        for router in routers:
            stack.enter_context(running_server(router))
        answer = ask(kind, *routers)
    assert answer.text == "x" * 10 + "lo"
    assert answer.token_ids == (*range(10), 4)


@either
@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room"), Refused),
        (Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "over"), DeadlineExceeded),
        (
            Failure(
                grpc.StatusCode.INTERNAL,
                "a defect",
                (ErrorInfo(reason="INTERNAL", domain="twinpool"),),
            ),
            ServerError,
        ),
    ],
    ids=["refused", "deadline", "defect"],
)
def test_what_no_other_router_can_mend_is_told(
    kind: str,
    failure: Failure,
    error: type[TwinpoolError],
    two: tuple[FakeRouter, FakeRouter],
) -> None:
    one, other = two
    one.script = (failure,)
    with pytest.raises(error):
        ask(kind, one, other)
    assert not other.requests


@either
def test_all_routers_lost_is_one_clear_error(kind: str, two: tuple[FakeRouter, FakeRouter]) -> None:
    one, other = two
    other.script = (LOST,)
    one.script = (first("H", 1), LOST)
    with pytest.raises(Unavailable, match="no router went on with the request in 4 tries") as found:
        one_then_lost(kind, one, other)
    assert one.address in found.value.message
    assert other.address in found.value.message
    assert found.value.request_id == "00000000000000ab"


def one_then_lost(kind: str, one: FakeRouter, other: FakeRouter) -> None:
    """Ask for an answer of which there is one token, and then no router."""

    class Once(FakeRouter):
        def Generate(self, request: object, context: object) -> Iterator[GenerateResponse]:
            resumes = request.HasField("resume")  # type: ignore[attr-defined]
            self.script = (LOST,) if resumes else one.script
            return super().Generate(request, context)  # type: ignore[arg-type]

    with running_server(once := Once()):
        one.address = once.address
        ask(kind, once, other)


@either
def test_one_deadline_is_over_all_routers(kind: str, two: tuple[FakeRouter, FakeRouter]) -> None:
    one, other = two
    other.script = (WaitForClient(),)
    with pytest.raises(DeadlineExceeded):
        ask(kind, one, other, timeout_s=0.4)
    assert other.requests


@either
def test_answer_that_is_whole_does_not_need_its_router_any_more(
    kind: str, two: tuple[FakeRouter, FakeRouter]
) -> None:
    one, other = two
    one.script = (*BEGINNING, REST, LOST)
    assert ask(kind, one, other).text == "Héllo"
    assert not other.requests


@either
def test_answer_of_a_router_that_tells_no_terms_is_not_gone_on_with(
    kind: str, two: tuple[FakeRouter, FakeRouter]
) -> None:
    one, other = two
    one.script = (part("H", 1), LOST)
    with pytest.raises(Unavailable, match="Socket closed"):
        ask(kind, one, other)
    assert not other.requests


def test_later_calls_go_where_the_last_one_went(two: tuple[FakeRouter, FakeRouter]) -> None:
    one, other = two
    with Client([one.address, other.address]) as client:
        with client.generate("Hi") as stream:
            assert stream.seed is None
            list(stream)
            assert stream.seed == 77
        client.complete("Hi")
        assert client.describe().model == "tiny"
    assert (len(one.requests), len(other.requests)) == (1, 2)


@either
def test_question_goes_to_a_router_that_answers(
    kind: str, two: tuple[FakeRouter, FakeRouter]
) -> None:
    one, other = two
    one.script = (LOST,)
    addresses = [one.address, other.address]
    if kind == "sync":
        with Client(addresses) as client:
            assert client.describe(model="big").model == "big"
        return

    async def describe() -> str:
        async with AsyncClient(addresses) as client:
            return (await client.describe(model="big")).model

    assert asyncio.run(describe()) == "big"


def test_closing_a_stream_that_waits_for_another_router_ends_it() -> None:
    with running_server(gone := FakeRouter()), running_server(gone_too := FakeRouter()):
        pass
    with Client([gone.address, gone_too.address]) as client:
        stream = client.generate("Hi")
        closer = threading.Timer(0.05, stream.close)
        closer.start()
        assert list(stream) == []
        closer.join(PATIENCE_S)


def test_tries_are_bounded_by_routers_and_begin_anew_with_progress() -> None:
    tries = Tries(Routers(("a:1", "b:1", "c:1")), None, clock=lambda: 0.0)
    error = Unavailable("gone")
    tries.failed(error, lost=True)
    tries.note_progress()
    waits = [tries.failed(error, lost=True) for _ in range(3 * TRIES_EACH - 1)]
    assert [wait > 0 for wait in waits] == [False, False, True, False, False]
    assert tries.address == "a:1"
    with pytest.raises(Unavailable, match="in 6 tries"):
        tries.failed(error, lost=True)


def test_wait_that_the_deadline_does_not_allow_is_not_begun() -> None:
    now = [0.0]
    tries = Tries(Routers(("a:1", "b:1")), 1.0, clock=lambda: now[0])
    assert tries.failed(Unavailable("gone"), lost=True) == 0.0
    now[0] = 0.9
    assert tries.remaining_s() == pytest.approx(0.1)
    with pytest.raises(DeadlineExceeded):
        tries.failed(Unavailable("gone"), lost=True)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("a:1", ("a:1",)),
        ("a:1, b:1", ("a:1", "b:1")),
        (["a:1", "b:1"], ("a:1", "b:1")),
        (("a:1",), ("a:1",)),
    ],
)
def test_addresses_are_a_text_or_a_sequence(given: object, found: tuple[str, ...]) -> None:
    assert checked_addresses(given) == found


@pytest.mark.parametrize("given", ["", ",", [], "a:1,a:1"])
def test_no_address_or_one_twice_is_an_error(given: object) -> None:
    with pytest.raises(ValueError, match="address"):
        checked_addresses(given)
