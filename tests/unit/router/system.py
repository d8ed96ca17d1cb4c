"""A router in the middle of scripted instances, and what tests ask of the two together."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cached_property
from types import MappingProxyType
from typing import Any

import grpc
from prometheus_client import CollectorRegistry
from twinpool.v1 import inference_pb2
from twinpool.v1.inference_pb2_grpc import InferenceStub
from twinpool.v1.worker_pb2_grpc import MembershipStub

from router.breaker import BreakerSettings
from router.config import RouterConfig
from router.group import ModelGroup, build_group
from router.server import Router
from service.errors import ServiceError
from service.status import from_rpc_error
from tests.unit.router.fakes import EOF, FakeDecode, FakeInstance, FakePrefill
from tests.unit.router.served import ASSETS


class System:
    """A router and the instances around it."""

    def __init__(self, router: Router, registry: CollectorRegistry) -> None:
        self.router = router
        self.registry = registry
        self.instances: list[FakeInstance] = []
        self.channel = grpc.aio.insecure_channel(router.server.address)
        self.inference = InferenceStub(self.channel)
        self.membership = MembershipStub(self.channel)
        self._epochs = itertools.count(1)

    @property
    def group(self) -> ModelGroup:
        """The group of the one model there is; an empty one before its first instance."""
        found = self.router.groups.all()
        assert len(found) < 2
        return found[0] if found else self._nothing

    @cached_property
    def _nothing(self) -> ModelGroup:
        config = self.router.config
        return build_group("", config=config, router_id="", dial=_no_dial, clock=time.monotonic)

    def sample(
        self, name: str, labels: Mapping[str, str] = MappingProxyType({}), model: str = "echo"
    ) -> float | None:
        """A metric of a model."""
        return self.registry.get_sample_value(name, {"model_name": model, **labels})

    def decode_named(self, name: str) -> FakeDecode:
        found = [i for i in self.instances if i.name == name and isinstance(i, FakeDecode)]
        return found[-1]

    async def add_decode(self, name: str = "decode", **options: Any) -> FakeDecode:
        options.setdefault("epoch", next(self._epochs))
        decode = FakeDecode(name, **options)
        decode.decode_named = self.decode_named
        await self._add(decode)
        await until(lambda: self._knows(decode))
        return decode

    async def add_prefill(self, name: str = "prefill", **options: Any) -> FakePrefill:
        options.setdefault("epoch", next(self._epochs))
        prefill = FakePrefill(name, self.decode_named, **options)
        await self._add(prefill)
        await until(lambda: self._knows(prefill))
        return prefill

    async def _add(self, instance: FakeInstance) -> None:
        self.instances.append(instance)
        await instance.start()
        instance.join(self.router.server.address)

    def _knows(self, instance: FakeInstance) -> bool:
        group = self.router.groups.get(instance.model.name)
        if group is None:
            return False
        keys = {v.key for v in group.ledger.decodes()}
        keys |= {v.key for v in group.ledger.prefills()}
        has_text = group.pools.tokenizers.get(ASSETS.digest) is not None
        return has_text and (instance.name, instance.epoch) in keys

    def generate(
        self, prompt: str = "say hello", *, timeout: float | None = 20.0, **fields: Any
    ) -> Any:
        """Starts a call; `fields` are those of sampling, stop and the request, flat."""
        request = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text=prompt))
        for name, value in fields.items():
            for part in (request.sampling, request.stop, request):
                if name in part.DESCRIPTOR.fields_by_name:
                    field = part.DESCRIPTOR.fields_by_name[name]
                    if field.is_repeated:
                        getattr(part, name).extend(value)
                    else:
                        setattr(part, name, value)
                    break
            else:
                raise AttributeError(name)
        return self.inference.Generate(request, timeout=timeout)

    async def settled(self) -> None:
        """Returns once no request holds anything anywhere."""
        groups = self.router.groups.all()
        await until(lambda: all(group.ledger.is_idle() for group in groups))
        for group in groups:
            await group.inflight.settle()
        await until(lambda: not any(i.held for i in self.instances if isinstance(i, FakeDecode)))
        await until(lambda: not any(i.open for i in self.instances if isinstance(i, FakePrefill)))
        for group in groups:
            group.ledger.check_integrity()


def _no_dial(address: str) -> grpc.aio.Channel:
    raise AssertionError(f"nothing is called at {address}")


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


async def collect(call: Any) -> list[inference_pb2.GenerateResponse]:
    messages = []
    while (message := await call.read()) is not EOF:
        messages.append(message)
    return messages


def text_of(messages: list[inference_pb2.GenerateResponse]) -> str:
    return "".join(message.text for message in messages)


@asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[System]:
    """A started router without instances; ends all that is around it."""
    breaker: BreakerSettings | None = settings.pop("breaker", None)
    settings = {"port": 0, "heartbeat_interval_s": 0.2, "restart_grace_s": 0.5} | settings
    registry = CollectorRegistry()
    router = Router(RouterConfig(**settings), registry, breaker)
    await router.server.start()
    system = System(router, registry)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(_close, system)
        yield system


async def _close(system: System) -> None:
    for instance in system.instances:
        await instance.die()
    await system.channel.close(None)
    await system.router.close()
    await system.router.server.stop()


@asynccontextmanager
async def pair(**settings: Any) -> AsyncIterator[tuple[System, FakePrefill, FakeDecode]]:
    """A router with one instance of each role, ready for work."""
    async with running(**settings) as system:
        prefill = await system.add_prefill()
        decode = await system.add_decode()
        yield system, prefill, decode


async def error_of(call: Any) -> ServiceError:
    """Returns the error that a call ends with, whether it streams or not."""
    try:
        if hasattr(call, "read"):
            await collect(call)
        else:
            await call
    except grpc.aio.AioRpcError as exc:
        return from_rpc_error(exc)
    raise AssertionError("the call went well")
