"""What a decode instance answers to a router that wants room."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from twinpool.v1 import common_pb2, kv_pb2, worker_pb2

from decode.metrics import Metrics
from decode.server import DecodeService
from decode.worker import First, Step, Token
from engine.sampling import Sampled
from kvtransfer import Completed, Failed, KVShape, ReceiveGrant, TransferStats, uniform_cache
from kvtransfer.errors import PeerLost
from service.errors import Incompatible, InvalidRequest, NotFound, WorkFailed
from service.wire import layout_to_wire
from tests.unit.decode.test_prefixes import BLOCK_SIZE, BLOCKS, LAYERS, make

TOKEN_BYTES = 10
VOCABULARY = 300
PROMPT = list(range(10))
SHAPE = KVShape(layers=LAYERS, kv_heads=1, head_size=8, dtype="float32")
LAYOUT = layout_to_wire(uniform_cache((SHAPE,), BLOCK_SIZE))


class StubReceiver:
    """Keeps the grants that it is given."""

    def __init__(self) -> None:
        self.grants: list[ReceiveGrant] = []

    async def open(self, grant: ReceiveGrant, dp_rank: int) -> None:
        self.grants.append(grant)

    def ranks_of(self, dp_rank: int) -> tuple[int, ...]:
        return (0,)

    def revoke(self, transfer_id: int) -> None:
        raise NotImplementedError


class StubSender:
    """Keeps what it is told to send; one instance is unknown to it."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, list[int], kv_pb2.Grant]] = []
        self.dropped: list[int] = []
        self.is_connected = False

    def connect(self) -> None:
        self.is_connected = True

    def ranks_of(self, dp_rank: int) -> tuple[int, ...]:
        return (0,)

    def send(self, request_id: int, dp_rank: int, blocks: list[int], message: kv_pb2.Grant) -> None:
        if message.instance == "stranger":
            raise WorkFailed("not a peer", reason="UnknownPeer", retryable=True)
        self.sent.append((request_id, blocks, message))

    def drop(self, request_id: int) -> None:
        self.dropped.append(request_id)


class System:
    """A service whose transfers end when they are told to, and one router's stream to it."""

    def __init__(self, *, computes_prompts: bool = False) -> None:
        self.registry = CollectorRegistry()
        self.receiver = StubReceiver()
        self.ready: list[int] = []
        self.told: asyncio.Queue[worker_pb2.DecodeRunResponse] = asyncio.Queue()
        config: Any = SimpleNamespace(eos_token_ids=(), vocab_size=VOCABULARY)
        self.service = DecodeService(
            name="decode",
            epoch=1,
            config=config,
            max_sequence_tokens=BLOCKS * BLOCK_SIZE,
            drain_timeout_s=30.0,
            admission=make(),
            worker=SimpleNamespace(ready=self.ready.append),  # type: ignore[arg-type]
            computes_prompts=computes_prompts,
            compute=SimpleNamespace(add=lambda _: None),
            receiver=self.receiver,
            sender=StubSender(),  # type: ignore[arg-type]
            metrics=Metrics(self.registry, token_bytes=TOKEN_BYTES),
        )

    async def reserve(self, request_id: int, **more: Any) -> worker_pb2.ReserveResponse:
        fields: dict[str, Any] = {"prompt_token_ids": PROMPT, **more}
        return await self.service.Reserve(
            worker_pb2.ReserveRequest(
                request_id=request_id,
                router_id="r",
                prompt_tokens=len(PROMPT),
                stop=common_pb2.StopParams(max_new_tokens=2),
                ttl_ms=1000,
                prefill_layout=LAYOUT,
                **fields,
            ),
            None,
        )

    def complete(self) -> None:
        """The latest transfer brings all that it owes."""
        stats = TransferStats(bytes=0, messages=0, seconds=0.0, transport="")
        self.service.transfer_event(Completed(self.receiver.grants[-1].transfer_id, stats))

    async def next_message(self) -> worker_pb2.DecodeRunResponse:
        async with asyncio.timeout(5):
            return await self.told.get()

    def sample(self, name: str) -> float | None:
        return self.registry.get_sample_value(f"twinpool_decode_{name}_total")


@pytest.fixture
def computes_prompts(request: pytest.FixtureRequest) -> bool:
    return getattr(request, "param", False)


@pytest.fixture
async def system(computes_prompts: bool) -> AsyncIterator[System]:
    made = System(computes_prompts=computes_prompts)

    async def requests() -> AsyncIterator[worker_pb2.DecodeRunRequest]:
        yield worker_pb2.DecodeRunRequest(hello=worker_pb2.RouterHello(router_id="r"))
        await asyncio.Event().wait()

    async def listen() -> None:
        async for message in made.service.Run(requests(), None):
            made.told.put_nowait(message)

    stream = asyncio.ensure_future(listen())
    await asyncio.sleep(0)  # the stream is open now, and nothing is on it
    yield made
    stream.cancel()
    await asyncio.wait({stream})


async def test_known_beginning_is_kept_in_the_grant_and_counted(system: System) -> None:
    first = await system.reserve(1)
    assert (first.cached_tokens, list(first.grant.kept)) == (0, [])
    system.complete()
    second = await system.reserve(2)
    assert second.cached_tokens == 8
    assert [list(group.of_layers) for group in second.grant.kept] == [[8] * LAYERS]
    assert system.receiver.grants[-1].kept == ((8,) * LAYERS,)
    assert system.sample("cached_tokens") == 8
    assert system.sample("cached_bytes") == 8 * TOKEN_BYTES
    assert (await system.reserve(3, cache_salt="mine")).cached_tokens == 0


async def test_known_beginning_is_kept_in_the_next_grant_too(system: System) -> None:
    await system.reserve(1)
    system.complete()
    await system.reserve(2)
    lost = Failed(system.receiver.grants[-1].transfer_id, PeerLost("gone"), True)
    system.service.transfer_event(lost)
    regrant = worker_pb2.RegrantRequest(request_id=2, prefill_layout=LAYOUT)
    response = await system.service.Regrant(regrant, None)
    assert [list(group.of_layers) for group in response.grant.kept] == [[8] * LAYERS]
    assert system.sample("cached_tokens") == 8


@pytest.mark.parametrize("said", [PROMPT[:-1], [*PROMPT, 1]])
async def test_prompt_of_another_length_than_said_is_refused(
    system: System, said: list[int]
) -> None:
    with pytest.raises(InvalidRequest, match="prompt_token_ids"):
        await system.reserve(1, prompt_token_ids=said)


def local(prompt: list[int] = PROMPT, request_id: int = 7) -> worker_pb2.ReserveRequest:
    return worker_pb2.ReserveRequest(
        request_id=request_id,
        router_id="r",
        prompt_tokens=len(PROMPT),
        prompt_token_ids=prompt,
        stop=common_pb2.StopParams(max_new_tokens=2),
        ttl_ms=1000,
        local_prefill=True,
    )


@pytest.mark.parametrize("computes_prompts", [True], indirect=True)
async def test_prompt_is_computed_here_where_that_is_asked_for(system: System) -> None:
    response = await system.service.Reserve(local(), None)
    assert not response.HasField("grant")
    assert system.receiver.grants == []
    assert system.ready == [7]


@pytest.mark.parametrize("computes_prompts", [True], indirect=True)
@pytest.mark.parametrize("prompt", [[], PROMPT[1:], [*PROMPT[1:], VOCABULARY]])
async def test_prompt_that_cannot_be_computed_is_refused(system: System, prompt: list[int]) -> None:
    with pytest.raises(InvalidRequest, match="prompt_token_ids"):
        await system.service.Reserve(local(prompt), None)
    assert system.ready == []


async def test_instance_that_computes_no_prompts_says_so(system: System) -> None:
    with pytest.raises(Incompatible) as refusal:
        await system.service.Reserve(local(), None)
    assert refusal.value.reason == "NO_LOCAL_PREFILL"


@pytest.mark.parametrize("computes_prompts", [True], indirect=True)
async def test_regrant_of_a_prompt_that_is_computed_here_is_refused(system: System) -> None:
    await system.service.Reserve(local(), None)
    with pytest.raises(NotFound):
        await system.service.Regrant(
            worker_pb2.RegrantRequest(request_id=7, prefill_layout=LAYOUT), None
        )


async def test_first_token_of_a_prompt_that_was_computed_here_tells_of_it(system: System) -> None:
    first = First(cached_tokens=4, queue_s=0.25, prefill_s=0.5)
    tokens = [Token(7, Sampled(token_id=5), "stop", first), Token(8, Sampled(token_id=6), None)]
    step = Step(
        tokens={"r": tokens},
        seconds=0.0,
        forward_s=0.0,
        sample_s=0.0,
        gap_s=0.0,
        wait_s=0.0,
        prompt_tokens=6,
    )
    system.service.emit(step)
    message = await system.next_message()
    assert (system.sample("prompt_tokens"), system.sample("cached_tokens")) == (6, 4)
    [told] = message.first_tokens
    assert told == worker_pb2.LocalFirstToken(
        request_id=7,
        first_token=worker_pb2.FirstToken(
            token_id=5,
            finish_reason=common_pb2.FINISH_REASON_STOP,
            queue_s=0.25,
            prefill_s=0.5,
            cached_tokens=4,
        ),
    )
    assert [output.request_id for output in message.outputs] == [8]
