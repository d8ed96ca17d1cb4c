"""A sequence from elsewhere goes on where it was, and one that cannot end here is handed back."""

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from twinpool.v1 import common_pb2, kv_pb2, worker_pb2

from decode.admission import Admission
from decode.metrics import Metrics
from decode.prefixes import Prefixes
from decode.sequence import SequenceRecord, State
from decode.server import DecodeService
from engine.blocks import BlockPool
from kvtransfer import Closed, Completed, Failed, KVShape, TransferStats, uniform_cache
from kvtransfer.errors import PeerLost
from service.errors import InvalidRequest, Unavailable
from service.wire import layout_to_wire
from tests.unit.decode.test_admission import BLOCK_SIZE, BLOCKS
from tests.unit.decode.test_server import StubReceiver, StubSender

SHAPE = KVShape(layers=2, kv_heads=1, head_size=8, dtype="float32")
LAYOUT = layout_to_wire(uniform_cache((SHAPE,), BLOCK_SIZE))


class StubWorker:
    """Ends at once what it is told to; steps nothing."""

    def __init__(self) -> None:
        self.aborted: list[int] = []
        self.resumed: list[bool] = []
        self.on_paused: Callable[[SequenceRecord], None] = lambda _: None
        self.admission: Admission | None = None

    def ready(self, request_id: int) -> None:
        """It never runs."""

    def pause(self, request_id: int) -> None:
        assert self.admission is not None
        record = self.admission.pause(request_id)
        if record is not None:
            self.on_paused(record)

    def resume(self, request_id: int) -> None:
        assert self.admission is not None
        self.resumed.append(self.admission.resume(request_id) is not None)

    def abort(self, request_id: int) -> None:
        assert self.admission is not None
        self.aborted.append(request_id)
        self.admission.end(request_id)


class Instance:
    """A decode service with one router's stream, and what came on it."""

    def __init__(self, drain_timeout_s: float = 30.0) -> None:
        self.worker, self.receiver, self.sender = StubWorker(), StubReceiver(), StubSender()
        self.admission = Admission(
            prefixes=[Prefixes(BlockPool(BLOCKS), layers=2)],
            block_size=BLOCK_SIZE,
            max_sequences=4,
            revoke=self._revoke,
        )
        self.worker.admission = self.admission
        config: Any = SimpleNamespace(eos_token_ids=(9,))
        worker: Any = self.worker
        self.service = DecodeService(
            name="decode",
            epoch=1,
            config=config,
            max_sequence_tokens=BLOCKS * BLOCK_SIZE,
            drain_timeout_s=drain_timeout_s,
            admission=self.admission,
            worker=worker,
            compute=SimpleNamespace(add=lambda _: None),
            receiver=self.receiver,
            sender=self.sender,  # type: ignore[arg-type]
            metrics=Metrics(CollectorRegistry(), token_bytes=1),
        )
        self.worker.on_paused = self.service.paused
        self.requests: asyncio.Queue[worker_pb2.DecodeRunRequest] = asyncio.Queue()
        self.told: list[worker_pb2.DecodeRunResponse] = []

    def _revoke(self, transfer_id: int) -> None:
        self.admission.writer_closed(transfer_id)

    async def listen(self) -> None:
        async for message in self.service.Run(self._requests(), None):
            self.told.append(message)

    async def _requests(self) -> AsyncIterator[worker_pb2.DecodeRunRequest]:
        hello = worker_pb2.RouterHello(router_id="r")
        yield worker_pb2.DecodeRunRequest(hello=hello)
        while True:
            yield await self.requests.get()

    async def tell(self, **kind: Any) -> None:
        """Have the service take a message of the router's, and what follows from it."""
        self.requests.put_nowait(worker_pb2.DecodeRunRequest(**kind))
        await self.settle()

    async def settle(self) -> None:
        for _ in range(4):  # the reader, the loop's own call, the stream
            await asyncio.sleep(0)

    async def reserve(self, request_id: int, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "router_id": "r",
            "prompt_tokens": 6,
            "stop": common_pb2.StopParams(max_new_tokens=10),
            "ttl_ms": 10_000,
            "prefill_instance": "prefill",
            "prefill_layout": LAYOUT,
            **changes,
        }
        await self.service.Reserve(worker_pb2.ReserveRequest(request_id=request_id, **fields), None)


async def listening(instance: Instance) -> "asyncio.Task[None]":
    task = asyncio.create_task(instance.listen())
    await asyncio.sleep(0)
    return task


async def test_sequence_goes_on_after_what_was_generated_elsewhere() -> None:
    instance = Instance()
    task = await listening(instance)
    await instance.reserve(7, output_token_ids=[3, 4])
    [record] = instance.admission.all()
    assert record.reservation.max_tokens == 4 + 10
    assert len(record.blocks) == -(-14 // BLOCK_SIZE)
    assert (record.sampling.output_len, record.sampling.position) == (2, 6)
    [grant] = instance.receiver.grants
    assert grant.total_tokens == 6  # of all of them the KV comes from prefill
    instance.admission.activate(7, 5)
    assert (record.sampling.output_len, record.sampling.position) == (3, 7)
    task.cancel()


@pytest.mark.parametrize("output", [[3] * 6, [3] * 10])
async def test_output_that_is_no_part_of_the_prompt_is_refused(output: list[int]) -> None:
    instance = Instance()
    task = await listening(instance)
    with pytest.raises(InvalidRequest):
        await instance.reserve(7, output_token_ids=output)
    instance.admission.check_integrity()
    assert not instance.admission.held
    task.cancel()


async def test_drain_hands_back_what_takes_too_long_and_frees_it() -> None:
    instance = Instance(drain_timeout_s=1.0)  # nothing is left of it before the hand-back
    task = await listening(instance)
    await instance.reserve(7)
    await instance.reserve(8)
    record, _ = instance.admission.all()
    instance.admission.complete(record.transfer.transfer_id)
    instance.admission.activate(7, 5)
    assert record.state is State.RUNNING
    async with asyncio.timeout(5):
        await instance.service.drain()
    await asyncio.sleep(0)
    failures = [failure for message in instance.told for failure in message.failures]
    assert [(f.request_id, f.reason, f.retryable) for f in failures] == [
        (7, "DRAINED", True),
        (8, "DRAINED", True),
    ]
    assert instance.worker.aborted == [7]  # the step loop's; the other one runs in no step
    assert instance.admission.counts().free == BLOCKS
    instance.admission.check_integrity()
    task.cancel()


@pytest.mark.parametrize("runs", [False, True])
async def test_sequence_whose_room_others_need_is_handed_back_and_frees_it(runs: bool) -> None:
    instance = Instance()
    task = await listening(instance)
    await instance.reserve(7, came_us=3)
    [record] = instance.admission.all()
    assert record.reservation.came_us == 3
    if runs:
        instance.admission.activate(7, 5)
        instance.admission.complete(record.transfer.transfer_id)
    await asyncio.to_thread(instance.service.hand_back, record)
    await asyncio.sleep(0)
    [failure] = [failure for message in instance.told for failure in message.failures]
    assert (failure.request_id, failure.reason, failure.retryable) == (7, "PREEMPTED", True)
    assert instance.worker.aborted == [7] * runs
    assert instance.admission.counts().free == BLOCKS
    task.cancel()


async def test_drain_waits_for_what_ends_in_time_and_takes_nothing_new() -> None:
    instance = Instance()
    task = await listening(instance)
    await instance.reserve(7)
    draining = asyncio.create_task(instance.service.drain())
    await asyncio.sleep(0.01)
    with pytest.raises(Unavailable):
        await instance.reserve(8)
    assert not draining.done()
    instance.admission.end(7)
    async with asyncio.timeout(5):
        await draining
    assert not instance.told
    task.cancel()


# ---- a running sequence is sent to another decode instance


async def paused(instance: Instance) -> SequenceRecord:
    """A sequence of six prompt tokens and two generated ones that has been asked to pause."""
    await instance.reserve(7)
    [record] = instance.admission.all()
    instance.admission.complete(record.transfer.transfer_id)
    instance.admission.activate(7, 5)
    record.append(6)
    await instance.tell(pause=worker_pb2.Pause(request_id=7))
    return record


def grant_of(tokens: int, instance: str = "other") -> kv_pb2.Grant:
    return kv_pb2.Grant(transfer_id=99, instance=instance, tokens=kv_pb2.Range(end=tokens))


async def send(instance: Instance, grant: kv_pb2.Grant) -> None:
    await instance.tell(send=worker_pb2.Send(request_id=7, grant=grant))


async def test_paused_sequence_says_how_many_tokens_are_in_the_cache() -> None:
    instance = Instance()
    task = await listening(instance)
    await paused(instance)
    [told] = [each for message in instance.told for each in message.paused]
    assert (told.request_id, told.tokens, list(told.ranks)) == (7, 7, [0])
    task.cancel()


async def test_sequence_that_was_sent_ends_and_its_router_hears_of_it() -> None:
    instance = Instance()
    task = await listening(instance)
    record = await paused(instance)
    await send(instance, grant_of(7))
    assert instance.sender.sent == [(7, record.blocks, grant_of(7))]
    assert instance.admission.held == 1
    stats = TransferStats(bytes=1234, messages=3, seconds=0.1, transport="tcp")
    instance.service.sent_event(Completed(99, stats))
    await instance.settle()
    [sent] = [each for message in instance.told for each in message.sent]
    assert (sent.request_id, sent.transfer_id, sent.bytes, sent.transport) == (7, 99, 1234, "tcp")
    assert instance.admission.counts().free == BLOCKS
    instance.admission.check_integrity()
    task.cancel()


@pytest.mark.parametrize("how", ["transfer fails", "unknown instance", "wrong tokens"])
async def test_sequence_that_cannot_be_sent_stays_and_may_go_on(how: str) -> None:
    instance = Instance()
    task = await listening(instance)
    await paused(instance)
    match how:
        case "transfer fails":
            await send(instance, grant_of(7))
            instance.service.sent_event(Failed(99, PeerLost("gone"), retryable=True))
        case "unknown instance":
            await send(instance, grant_of(7, "stranger"))
        case _:
            await send(instance, grant_of(8))
    await instance.settle()
    [lost] = [each for message in instance.told for each in message.lost_transfers]
    assert (lost.request_id, lost.transfer_id, lost.retryable) == (7, 99, True)
    await instance.tell(resume=worker_pb2.Resume(request_id=7))
    assert instance.worker.resumed == [True]
    assert instance.sender.dropped == [7]
    assert instance.admission.held == 1
    instance.admission.check_integrity()
    task.cancel()


async def test_blocks_of_an_aborted_sequence_stay_while_they_are_being_sent() -> None:
    instance = Instance()
    task = await listening(instance)
    record = await paused(instance)
    await send(instance, grant_of(7))
    await instance.service.Abort(worker_pb2.DecodeAbortRequest(request_id=7), None)
    assert instance.admission.held == 0
    assert instance.admission.counts().quarantined == len(record.blocks)
    instance.admission.check_integrity()
    instance.service.sent_event(Closed(99))
    assert instance.admission.counts().free == BLOCKS
    instance.admission.check_integrity()
    assert not [each for message in instance.told for each in message.sent]
    task.cancel()


async def test_sequence_that_is_not_paused_is_not_sent() -> None:
    instance = Instance()
    task = await listening(instance)
    await paused(instance)
    await instance.tell(resume=worker_pb2.Resume(request_id=7))
    await send(instance, grant_of(7))
    assert not instance.sender.sent
    assert instance.admission.lend(8, 99) is None
    task.cancel()


async def test_instance_connects_to_the_others_when_it_drains() -> None:
    instance = Instance()
    assert not instance.sender.is_connected
    await instance.service.drain()
    assert instance.sender.is_connected
