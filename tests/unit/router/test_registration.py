"""Instances on their Register streams: assets, peers, heartbeats, drains, restarts."""

import asyncio
from typing import Any

import pytest
from twinpool.v1 import worker_pb2

from router import assets
from router.assets import AssetsReceiver, TokenizerStore
from router.membership import Role
from service.errors import Incompatible, InvalidRequest, NotFound, Unavailable
from service.registration import RegistrationRefused
from tests.unit.router.fakes import EOF, FakeDecode, FakePrefill
from tests.unit.router.served import ASSETS, byte_level_assets, model
from tests.unit.router.system import System, collect, error_of, pair, running, text_of, until


async def register(system: System, *messages: worker_pb2.RegisterRequest) -> Any:
    """Opens a Register stream by hand and returns it with the messages sent."""
    call = system.membership.Register()
    for message in messages:
        await call.write(message)
    return call


async def test_assets_are_asked_for_only_while_there_are_none() -> None:
    async with running() as system:
        first = await system.add_prefill()
        second = await system.add_decode()
        assert (first.assets_asked, second.assets_asked) == (1, 0)


async def test_instances_hear_of_decode_instances_as_they_come_and_go() -> None:
    async with pair() as (system, prefill, decode):
        await until(lambda: [p.name for p in prefill.peers] == ["decode"])
        [peer] = prefill.peers
        assert (peer.epoch, peer.data_token) == (decode.epoch, decode.hello().data_token)
        assert peer.layout == decode.layout
        other = await system.add_decode("other")
        await until(lambda: [p.name for p in prefill.peers] == ["decode", "other"])
        await other.die()
        await until(lambda: [p.name for p in prefill.peers] == ["decode"])
        await until(lambda: [p.name for p in decode.peers] == ["decode"])  # as it may drain


async def test_status_tells_which_instances_the_router_cannot_reach() -> None:
    async with running() as system:
        await system.add_prefill()
        lost = FakeDecode("lost")
        lost.address = "127.0.0.1:1"
        lost.join(system.router.server.address)
        try:
            await until(lambda: len(system.group.pools.members) == 2)
            status = await system.membership.GetStatus(worker_pb2.GetStatusRequest(), timeout=10)
        finally:
            await lost.die()
    assert {i.name: i.connecting for i in status.instances} == {"prefill": False, "lost": True}


async def test_instance_of_another_model_is_refused_for_good() -> None:
    async with pair() as (system, _, _):
        stranger = FakeDecode("stranger", model_description=model(fingerprint="beef"))
        await stranger.start()
        with pytest.raises(RegistrationRefused, match="fingerprint of instance 'stranger'"):
            await stranger.join(system.router.server.address)
        await stranger.die()
        assert len(system.group.pools.members) == 2


async def test_restarted_instance_replaces_the_old_one_and_goes_on_with_its_requests() -> None:
    async with pair() as (system, _, decode):
        decode.step_gate.clear()
        call = system.generate(max_new_tokens=50)
        await call.read()
        new = await system.add_decode(decode.name)
        assert len(await collect(call)) > 1
        await until(system.group.ledger.is_idle)
        assert [d.key.epoch for d in system.group.ledger.decodes()] == [new.epoch]
        assert text_of(await collect(system.generate(max_new_tokens=5))) == "hello"
        decode.held.clear()


async def test_same_process_may_come_again_at_once() -> None:
    async with pair() as (system, _, decode):
        [member] = system.group.pools.members.of(Role.DECODE)
        again = decode.join(system.router.server.address)
        await until(lambda: system.group.pools.members.of(Role.DECODE) not in ([], [member]))
        assert text_of(await collect(system.generate(max_new_tokens=5))) == "hello"
        assert not again.done()


async def test_missed_heartbeats_make_an_instance_lost() -> None:
    async with running(heartbeat_interval_s=0.05, heartbeats_missed=2) as system:
        silent = FakePrefill("silent", system.decode_named)
        await silent.start()
        call = await register(system, worker_pb2.RegisterRequest(hello=silent.hello()))
        accepted = (await call.read()).accepted
        assert accepted.send_assets
        assert accepted.heartbeat_interval_ms == 50
        await until(lambda: len(system.group.pools.members) == 1)
        error = await error_of(call)
        assert isinstance(error, Unavailable)
        assert error.reason == "HEARTBEAT_MISSED"
        assert len(system.group.pools.members) == 0
        assert not system.group.ledger.prefills()
        await silent.die()


async def test_drained_instance_ends_what_it_has_and_gets_nothing_new() -> None:
    async with pair() as (system, _, decode):
        decode.step_gate.clear()
        call = system.generate(max_new_tokens=5)
        first = await call.read()
        await system.membership.Drain(worker_pb2.DrainRequest(instance="decode"))
        await until(lambda: bool(decode.drains))
        other = await system.add_decode("other")
        assert text_of(await collect(system.generate(max_new_tokens=5))) == "hello"
        assert len(other.reserves) == 1
        decode.step_gate.set()
        assert text_of([first, *await collect(call)]) == "hello"
        assert len(decode.reserves) == 1
        await system.settled()
        missing = system.membership.Drain(worker_pb2.DrainRequest(instance="nobody"))
        assert isinstance(await error_of(missing), NotFound)


async def test_instance_that_says_it_drains_gets_nothing_new() -> None:
    async with pair() as (system, prefill, _):
        prefill.draining = True
        await until(lambda: not system.group.ledger.prefills())
        status = await system.membership.GetStatus(worker_pb2.GetStatusRequest())
        assert {i.name: i.draining for i in status.instances} == {"prefill": True, "decode": False}
        await system.add_prefill("second")
        assert text_of(await collect(system.generate(max_new_tokens=5))) == "hello"
        assert not prefill.starts


async def test_decode_stream_that_breaks_comes_again_with_a_clean_ledger() -> None:
    async with pair() as (system, _, decode):
        decode.step_gate.clear()
        call = system.generate(max_new_tokens=50)
        await call.read()
        for queue in decode._streams.values():
            queue.put_nowait(None)
        await until(lambda: len(decode.reserves) == 2)
        decode.step_gate.set()
        assert len(await collect(call)) > 1
        assert text_of(await collect(system.generate(max_new_tokens=5))) == "hello"
        await system.settled()


async def test_other_model_takes_over_only_when_all_instances_have_gone() -> None:
    async with pair(restart_grace_s=20) as (system, prefill, decode):
        await decode.die()
        await until(lambda: not system.group.ledger.decodes())
        call = asyncio.ensure_future(error_of(system.generate(max_new_tokens=3)))
        await until(lambda: system.group.admission.queued == 1)
        await prefill.die()
        await until(lambda: len(system.group.pools.members) == 0)
        await system.add_decode(model_description=model(fingerprint="beef"))
        error = await call
        assert isinstance(error, Unavailable)
        assert error.reason == "MODEL_CHANGED"


@pytest.mark.parametrize(
    "message",
    [
        worker_pb2.RegisterRequest(heartbeat=worker_pb2.Heartbeat()),
        worker_pb2.RegisterRequest(hello=worker_pb2.InstanceHello(name="x")),
    ],
)
async def test_stream_must_begin_with_a_hello_that_makes_sense(
    message: worker_pb2.RegisterRequest,
) -> None:
    async with running() as system:
        call = await register(system, message)
        assert isinstance(await error_of(call), InvalidRequest)


@pytest.mark.parametrize(
    "chunk",
    [
        worker_pb2.AssetsChunk(file="../../etc/passwd", data=b"x"),
        worker_pb2.AssetsChunk(file="tokenizer.json", data=b"{}", last=True),
    ],
)
async def test_assets_that_are_not_as_announced_end_the_stream(
    chunk: worker_pb2.AssetsChunk,
) -> None:
    async with running() as system:
        instance = FakePrefill("p", system.decode_named)
        await instance.start()
        call = await register(
            system,
            worker_pb2.RegisterRequest(hello=instance.hello()),
            worker_pb2.RegisterRequest(assets=chunk),
        )
        assert isinstance(await error_of(call), InvalidRequest)
        assert system.group.pools.tokenizers.get(ASSETS.digest) is None
        await instance.die()


async def test_call_waits_for_a_tokenizer_that_is_on_its_way() -> None:
    async with running(heartbeat_interval_s=5) as system:
        instance = FakePrefill("p", system.decode_named)
        await instance.start()
        call = await register(system, worker_pb2.RegisterRequest(hello=instance.hello()))
        await until(lambda: system.group.pools.members.model is not None)
        answer = asyncio.ensure_future(collect(system.generate(max_new_tokens=1)))
        await asyncio.sleep(0.01)
        assert not answer.done()
        files = dict(ASSETS.files)
        for number, (name, data) in enumerate(files.items(), start=1):
            chunk = worker_pb2.AssetsChunk(file=name, data=data, last=number == len(files))
            await call.write(worker_pb2.RegisterRequest(assets=chunk))
        assert text_of(await answer) == "h"
        await instance.die()
        await call.done_writing()
        while await call.read() is not EOF:
            pass


def test_assets_have_a_limit_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "MAX_BYTES", 10)
    receiver = AssetsReceiver()
    receiver.add("tokenizer.json", b"123456")
    with pytest.raises(InvalidRequest, match="at most 10"):
        receiver.add("tokenizer_config.json", b"12345")


async def test_store_keeps_the_tokenizer_of_the_model_served_now() -> None:
    store = TokenizerStore()
    other = byte_level_assets(template=False)
    await store.put(ASSETS.digest, dict(ASSETS.files))
    await store.put(other.digest, dict(other.files))
    assert store.get(ASSETS.digest) is None
    assert not (await store.wait(other.digest)).has_chat_template


async def test_equal_epoch_of_another_process_is_refused() -> None:
    async with pair() as (system, _, decode):
        hello = decode.hello()
        hello.data_token = b"another process"
        call = await register(system, worker_pb2.RegisterRequest(hello=hello))
        error = await error_of(call)
        assert isinstance(error, Incompatible)
        assert error.reason == "NAME_TAKEN"
