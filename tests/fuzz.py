"""Requests that nobody would send: every field with what it should not have, and bytes at random.

Made for any method from the service descriptors, and sent over plain channels.
"""

import asyncio
import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

# What no input may lead to: it would be the server's own fault.
OWN_FAULTS = frozenset(
    {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}
)
# What gRPC's client says where it was still sending when the call ended: no server's words.
_OWN_CORE = "Internal error from Core"
_CALL_TIMEOUT_S = 0.5
_MOST_MESSAGES = 3
_MOST_DEPTH = 4

_TEXTS = (
    "", " ", "\0", "a" * 5000, "\u200d\U0001f469", "..", "-1", "%s", "{{ 1 }}", "tok\n",
)  # fmt: skip
_DOUBLES = (0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e-320, 1e308, 0.5)
_INTEGERS = (0, 1, 2, 7, 255, 256, 257, 65535, 1 << 20)
_BOUNDS = {
    FieldDescriptor.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}


def fuzzed(message: Message, rng: random.Random, depth: int = 0) -> Message:
    """Fill some of a message's fields with values of their types, mostly odd ones."""
    for each in message.DESCRIPTOR.fields:
        if rng.random() < 0.4 or (each.message_type is not None and depth == _MOST_DEPTH):
            continue
        if each.is_repeated:
            count = rng.choice((0, 1, 2, 70))
            if each.message_type is not None:
                for _ in range(min(count, 4)):
                    fuzzed(getattr(message, each.name).add(), rng, depth + 1)
            else:
                getattr(message, each.name).extend(_value(each, rng) for _ in range(count))
        elif each.message_type is not None:
            inner = getattr(message, each.name)
            inner.SetInParent()
            fuzzed(inner, rng, depth + 1)
        else:
            setattr(message, each.name, _value(each, rng))
    return message


def _value(each: Any, rng: random.Random) -> Any:
    kind = each.cpp_type
    if kind in _BOUNDS:
        least, most = _BOUNDS[kind]
        return rng.choice((rng.choice(_INTEGERS), least, most, rng.randint(least, most)))
    if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        value = rng.choice((rng.choice(_DOUBLES), rng.uniform(-2, 2)))
        return value if kind == FieldDescriptor.CPPTYPE_DOUBLE or abs(value) < 1e38 else 0.0
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return rng.choice((0, 1, 2, 99, -1))
    if each.type == FieldDescriptor.TYPE_BYTES:
        return rng.randbytes(rng.choice((0, 1, 8, 32, 1000)))
    return rng.choice(_TEXTS)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Change, drop or add some bytes."""
    made = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(made) + 1)
        match rng.randrange(3):
            case 0:
                made[place:place] = rng.randbytes(rng.randint(1, 4))
            case 1:
                del made[place : place + rng.randint(1, 4)]
            case _:
                made[place : place + 1] = rng.randbytes(1)
    return bytes(made)


@dataclass
class Tally:
    """What came of the calls, and those that ended as none may."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def take(self, method: str, code: grpc.StatusCode, details: str, sent: list[bytes]) -> None:
        self.outcomes[code.name] += 1
        if code in OWN_FAULTS and details != _OWN_CORE:
            shown = ", ".join(message.hex() for message in sent)
            self.faults.append(f"{method}: {code.name} {details!r} after {shown[:2000]}")


class Fuzzer:
    """Calls the methods of services on one channel.

    Args:
        seeds: Good requests by the name of their message, which are damaged too.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        services: list[ServiceDescriptor],
        rng: random.Random,
        seeds: dict[str, Callable[[], Message]],
    ) -> None:
        self.tally = Tally()
        self._channel = channel
        self._methods = [method for service in services for method in service.methods]
        self._rng = rng
        self._seeds = seeds

    async def call(self) -> None:
        """Call one method with nonsense, and take down how that ends."""
        method = self._rng.choice(self._methods)
        count = self._rng.randint(1, _MOST_MESSAGES) if method.client_streaming else 1
        sent = [self._message(method) for _ in range(count)]
        name = f"/{method.containing_service.full_name}/{method.name}"
        call = self._start(method, name, sent)
        try:
            async with asyncio.timeout(2 * _CALL_TIMEOUT_S):
                if method.server_streaming:
                    async for _ in call:
                        if self._rng.random() < 0.1:
                            call.cancel()
                            break
                else:
                    await call
            code, details = await call.code(), await call.details()
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details()
        except (asyncio.CancelledError, TimeoutError):
            call.cancel()
            code, details = grpc.StatusCode.CANCELLED, ""
        self.tally.take(name, code, details or "", sent)

    def _start(self, method: MethodDescriptor, name: str, sent: list[bytes]) -> Any:
        async def messages() -> AsyncIterator[bytes]:
            for message in sent:
                yield message

        takes = "stream" if method.client_streaming else "unary"
        gives = "stream" if method.server_streaming else "unary"
        call = getattr(self._channel, f"{takes}_{gives}")(
            name, request_serializer=bytes, response_deserializer=bytes
        )
        return call(messages() if takes == "stream" else sent[0], timeout=_CALL_TIMEOUT_S)

    def _message(self, method: MethodDescriptor) -> bytes:
        rng, input_type = self._rng, method.input_type
        kind = rng.random()
        if kind < 0.15:
            return rng.randbytes(rng.choice((0, 1, 5, 60, 3000)))
        if kind < 0.4 and input_type.name in self._seeds:
            seed = self._seeds[input_type.name]().SerializeToString()
            return damaged(seed, rng)
        if kind < 0.6 and input_type.name in self._seeds:
            return fuzzed(self._seeds[input_type.name](), rng).SerializeToString()
        made = fuzzed(GetMessageClass(input_type)(), rng).SerializeToString()
        return damaged(made, rng) if kind < 0.7 else made
