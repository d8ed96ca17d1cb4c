"""Two models behind one router: what is one's never is the other's."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from twinpool.v1 import inference_pb2, worker_pb2

from router.ledger import InstanceKey
from service.errors import InvalidRequest, Refused, Unavailable
from tests.unit.router.fakes import FakeDecode, FakePrefill
from tests.unit.router.served import model
from tests.unit.router.system import System, collect, error_of, running, text_of, until
from tests.unit.router.test_prefix_routing import BLOCK, SEED, Told, keys_of, news


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.registration.PREFIX_INTERVAL_S", 0.01)


@dataclass(frozen=True)
class Served:
    """The instances of one model."""

    prefill: FakePrefill
    decode: FakeDecode


async def serve(system: System, name: str, **options: Any) -> Served:
    """Adds a pair that serves a model and answers with its name, again and again."""
    described = model(name=name, fingerprint=name)
    options = {"answer": name, "model_description": described} | options
    return Served(
        await system.add_prefill(f"prefill-{name}", **options),
        await system.add_decode(f"decode-{name}", **options),
    )


@asynccontextmanager
async def two(**settings: Any) -> AsyncIterator[tuple[System, Served, Served]]:
    async with running(**settings) as system:
        yield system, await serve(system, "abc"), await serve(system, "xyz")


async def answer(system: System, name: str, **fields: Any) -> str:
    return text_of(await collect(system.generate(model=name, **({"max_new_tokens": 3} | fields))))


async def status_of(system: System) -> worker_pb2.GetStatusResponse:
    found: worker_pb2.GetStatusResponse = await system.membership.GetStatus(
        worker_pb2.GetStatusRequest()
    )
    return found


async def test_each_model_is_answered_by_its_own_instances() -> None:
    async with two() as (system, abc, xyz):
        assert await asyncio.gather(*(answer(system, n) for n in ("abc", "xyz", "xyz"))) == [
            *("abc", "xyz", "xyz")
        ]
        assert [len(s.prefill.starts) for s in (abc, xyz)] == [1, 2]
        assert [len(s.decode.reserves) for s in (abc, xyz)] == [1, 2]
        assert [p.name for p in abc.prefill.peers] == ["decode-abc"]
        assert [p.name for p in xyz.prefill.peers] == ["decode-xyz"]
        error = await error_of(system.generate())
        assert isinstance(error, InvalidRequest)
        assert error.field == "model"
        await system.settled()


async def test_room_and_queue_of_one_model_are_not_the_others() -> None:
    async with two(max_queue=1) as (system, abc, _):
        abc.decode.step_gate.clear()
        held = [system.generate(model="abc", max_new_tokens=1000) for _ in range(2)]
        first = system.router.groups.for_request("abc")
        second = system.router.groups.for_request("xyz")
        await until(lambda: first.admission.queued == 1)
        assert isinstance(
            await error_of(system.generate(model="abc", max_new_tokens=1000)), Refused
        )
        assert second.ledger.is_idle()
        assert second.admission.queued == 0
        assert await answer(system, "xyz") == "xyz"
        for call in held:
            call.cancel()
        await system.settled()


async def test_cap_of_a_tenant_counts_for_each_model() -> None:
    async with two(max_tenant_requests={"*": 1}) as (system, abc, _):
        abc.decode.step_gate.clear()
        held = system.generate(model="abc", tenant="t", max_new_tokens=9)
        await until(lambda: bool(abc.decode.reserves))
        error = await error_of(system.generate(model="abc", tenant="t", max_new_tokens=9))
        assert error.reason == "TENANT_CAP"
        assert await answer(system, "xyz", tenant="t") == "xyz"
        held.cancel()
        await system.settled()


async def test_what_a_tenant_got_of_one_model_does_not_count_at_the_other() -> None:
    async with running() as system:
        abc = await serve(system, "abc", blocks=4)
        xyz = await serve(system, "xyz", blocks=4)
        await answer(system, "abc", tenant="greedy", max_new_tokens=50)
        assert await _order_of_service(system, abc) == ["modest", "greedy"]
        assert await _order_of_service(system, xyz) == ["greedy", "modest"]


async def _order_of_service(system: System, served: Served) -> list[str]:
    """Who is next at a full model of two tenants, of which the greedy one came first."""
    name = served.prefill.model.name
    group = system.router.groups.for_request(name)
    served.decode.step_gate.clear()
    reserved, seen = len(served.decode.reserves), len(served.prefill.starts) + 1
    holder = system.generate(model=name, tenant="holder", max_new_tokens=50)
    await until(lambda: len(served.decode.reserves) == reserved + 1)
    await until(lambda: len(served.prefill.starts) == seen)
    calls = []
    for waiting, tenant in enumerate(("greedy", "modest"), start=1):
        # Of two that are entitled to the same it is the earlier time limit that decides.
        call = system.generate(model=name, tenant=tenant, max_new_tokens=50, timeout=20 + waiting)
        calls.append(asyncio.ensure_future(collect(call)))
        await until(lambda count=waiting: group.admission.queued == count)  # type: ignore[misc]
    served.decode.step_gate.set()
    await asyncio.gather(collect(holder), *calls)
    return [start.tenant for start in served.prefill.starts[seen:]]


async def test_known_prefixes_of_one_model_are_not_looked_up_for_the_other() -> None:
    prompt = "a beginning that both models are asked to go on with, " * 2
    keys = keys_of(prompt)
    async with two() as (system, _, _):
        described = model(name="abc", fingerprint="abc")
        holder = await system.add_prefill(
            "holder", model_description=described, prefix_seed=SEED, prefixes=Told(news(1, keys))
        )
        prefixes = [group.pools.prefixes for group in system.router.groups.all()]
        key = InstanceKey(holder.name, holder.epoch)
        await until(lambda: prefixes[0].known_blocks(key) == len(keys))
        for name in ("abc", "xyz"):
            await answer(system, name, prompt=prompt)
        assert len(holder.starts) == 1
        cached = "twinpool_router_expected_cached_tokens_total"
        assert system.sample(cached, model="abc") == len(keys) * BLOCK
        assert system.sample(cached, model="xyz") == 0
        assert not prefixes[1].known_blocks(key)


async def test_model_whose_instances_have_gone_is_unavailable_and_the_other_goes_on() -> None:
    async with two(restart_grace_s=0.05) as (system, abc, _):
        await abc.prefill.die()
        await abc.decode.die()
        group = system.router.groups.for_request("abc")
        await until(lambda: not group.has_instances)
        error = await error_of(system.generate(model="abc"))
        assert isinstance(error, Unavailable)
        assert error.reason == "NO_INSTANCE"
        assert await answer(system, "xyz") == "xyz"


async def test_models_are_listed_with_what_they_take() -> None:
    async with two() as (system, _, xyz):
        await xyz.decode.die()
        await until(lambda: not system.router.groups.for_request("xyz").is_whole)
        listed = await system.inference.ListModels(inference_pb2.ListModelsRequest())
        described = await system.inference.Describe(inference_pb2.DescribeRequest(model="xyz"))
    assert [(m.name, m.ready, m.max_request_tokens) for m in listed.models] == [
        ("abc", True, 1024),
        ("xyz", False, 0),
    ]
    assert listed.models[0].architecture == "Qwen3ForCausalLM"
    assert described.model == "xyz"


async def test_status_and_metrics_tell_the_models_apart() -> None:
    async with two() as (system, _, _):
        for name in ("abc", "xyz", "xyz"):
            await answer(system, name)
        await error_of(system.generate(model=""))
        await system.settled()
        status = await status_of(system)
        counted = "twinpool_router_requests_total"
        finished = {
            name: system.sample(counted, {"outcome": "finished"}, model=name)
            for name in ("abc", "xyz")
        }
        assert system.sample(counted, {"outcome": "invalid"}, model="") == 1
    assert finished == {"abc": 1, "xyz": 2}
    assert [(m.model.name, m.requests.finished, m.ready) for m in status.models] == [
        ("abc", 1, True),
        ("xyz", 2, True),
    ]
    assert status.requests.finished == 3
    assert not status.HasField("model")
    assert {i.name: i.model for i in status.instances} == {
        f"{role}-{name}": name for role in ("prefill", "decode") for name in ("abc", "xyz")
    }


async def test_instance_of_any_model_can_be_drained_by_its_name() -> None:
    async with two() as (system, _, xyz):
        await system.membership.Drain(worker_pb2.DrainRequest(instance="decode-xyz"))
        await until(lambda: bool(xyz.decode.drains))
        assert not system.router.groups.for_request("xyz").is_whole
        assert system.router.groups.for_request("abc").is_whole


async def test_health_serves_while_one_model_is_whole() -> None:
    async with running() as system:
        health = health_pb2_grpc.HealthStub(system.channel)

        async def becomes(service: str, serving: bool) -> None:
            wanted = health_pb2.HealthCheckResponse.ServingStatus
            request = health_pb2.HealthCheckRequest(service=service)
            async with asyncio.timeout(10):
                async for answer in health.Watch(request):
                    if answer.status == (wanted.SERVING if serving else wanted.NOT_SERVING):
                        return

        inference = "twinpool.v1.Inference"
        await becomes(inference, False)
        await becomes("", True)
        keeper = asyncio.create_task(system.router.keep_health())
        abc = await serve(system, "abc")
        await becomes(inference, True)
        xyz = await serve(system, "xyz")
        await abc.prefill.die()
        await until(lambda: not system.router.groups.for_request("abc").is_whole)
        await becomes(inference, True)
        await xyz.decode.die()
        await becomes(inference, False)
        await becomes("twinpool.v1.Membership", True)
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)


async def test_instance_that_comes_again_with_another_model_leaves_the_first() -> None:
    async with two() as (system, abc, _):
        described = model(name="xyz", fingerprint="xyz")
        again = await system.add_decode(abc.decode.name, model_description=described, answer="xyz")
        await until(lambda: not abc.prefill.peers)
        instances = {(i.name, i.epoch): i.model for i in (await status_of(system)).instances}
        assert instances[again.name, again.epoch] == "xyz"
        assert (abc.decode.name, abc.decode.epoch) not in instances
        assert await answer(system, "xyz") == "xyz"
