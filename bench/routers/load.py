"""What clients do: requests that go on without end, or come at random times. Owns their answers.

All clients are one task-less set of callbacks on a few connections: see `calls`.
"""

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from typing import Protocol

from twinpool.v1 import inference_pb2

from bench.routers.calls import Answer
from bench.routers.http_mocks import DONE
from bench.routers.spread import Spread
from bench.routers.stamps import Stamps

METHOD = "/twinpool.v1.Inference/Generate"
HTTP_PATH = "/generate"


class Calls(Protocol):
    """What requests are sent over."""

    def call(self, request: bytes, answer: Answer) -> object:
        """Send one request; `answer` gets what comes."""
        ...

    def close(self) -> None:
        """Drop all that is open; no answer hears of it."""
        ...


class Dialect(Protocol):
    """How requests are written, and messages read."""

    def request(self, tokens: int, prompt: str) -> bytes:
        """Return a request for so many tokens."""
        ...

    def read(self, message: bytes) -> tuple[Sequence[int], bool]:
        """Return a message's token ids, and whether it is the last one of an answer."""
        ...


class Grpc:
    """Our own messages."""

    def request(self, tokens: int, prompt: str) -> bytes:
        """Return a request for so many tokens."""
        return _request(tokens, prompt)

    def read(self, message: bytes) -> tuple[Sequence[int], bool]:
        """Return a message's token ids, and whether it is the last one of an answer."""
        part = inference_pb2.GenerateResponse.FromString(message)
        return part.token_ids, bool(part.finish_reason)


class Http:
    """The peer's messages: JSON, of which the mocks put the token's id at the end of an event."""

    def request(self, tokens: int, prompt: str) -> bytes:
        """Return a request for so many tokens."""
        sampling = {"max_new_tokens": tokens, "ignore_eos": True}
        asked = {"text": prompt, "sampling_params": sampling, "stream": True}
        return json.dumps(asked).encode()

    def read(self, message: bytes) -> tuple[Sequence[int], bool]:
        """Return a message's token ids, and whether it is the last one of an answer."""
        if message == DONE:
            return (), True
        return (int(message[message.rindex(b"[") + 1 : message.rindex(b"]")]),), False


def _request(tokens: int, prompt: str) -> bytes:
    message = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text=prompt))
    message.stop.max_new_tokens = tokens
    message.stop.ignore_eos = True
    return message.SerializeToString()


class Tally:
    """What has come since some moment."""

    def __init__(self) -> None:
        self.on_way = Spread()  # of tokens that a step gave
        self.refused_after = Spread()  # of calls that ended without an answer
        self.tokens = 0
        self.messages = 0
        self.finished = 0
        self.unfinished = 0


class Client:
    """Sends requests over some connections; what comes is noted in `tally`, which may change."""

    def __init__(
        self,
        connections: Sequence[Calls],
        dialect: Dialect,
        stamps: Stamps,
        clock: Callable[[], float],
    ) -> None:
        self.tally = Tally()
        self.open = 0
        self.dialect = dialect
        self.stamps = stamps
        self.clock = clock
        self._connections = connections
        self._next = 0

    def send(self, body: bytes, then: Callable[[bool], None]) -> None:
        """Send a request; `then` is told whether it was answered to its end."""
        connection = self._connections[self._next % len(self._connections)]
        self._next += 1
        self.open += 1
        connection.call(body, _Answer(self, then))


class _Answer:
    """One request's answer."""

    __slots__ = ("_began", "_client", "_is_finished", "_then")

    def __init__(self, client: Client, then: Callable[[bool], None]) -> None:
        self._client = client
        self._then = then
        self._began = client.clock()
        self._is_finished = False

    def message(self, data: bytes, now: float) -> None:
        """Take a part of the answer."""
        token_ids, is_last = self._client.dialect.read(data)
        tally, stamps = self._client.tally, self._client.stamps
        tally.messages += 1
        for token_id in token_ids:
            tally.tokens += 1
            on_way = stamps.arrived(token_id, now)
            if on_way is not None:
                tally.on_way.add(on_way)
        if is_last:
            self._is_finished = True

    def ended(self) -> None:
        """Note how it ended."""
        client = self._client
        client.open -= 1
        if self._is_finished:
            client.tally.finished += 1
        else:
            client.tally.unfinished += 1
            client.tally.refused_after.add(client.clock() - self._began)
        self._then(self._is_finished)


class Streams:
    """So many answers at any time: where one ends, the next request is sent.

    The first ones are shorter by chance, so that they do not end all at once.
    """

    def __init__(self, client: Client, tokens: int, prompt: str, rng: random.Random) -> None:
        self._client = client
        self._tokens = tokens
        self._prompt = prompt
        self._rng = rng
        self._body = client.dialect.request(tokens, prompt)
        self._is_over = False

    def begin(self, streams: int) -> None:
        """Send the first requests."""
        for _ in range(streams):
            tokens = self._rng.randint(min(2, self._tokens), self._tokens)
            self._client.send(self._client.dialect.request(tokens, self._prompt), self._again)

    def end(self) -> None:
        """Send no more."""
        self._is_over = True

    def _again(self, finished: bool) -> None:
        if not self._is_over:
            self._client.send(self._body, self._again)


async def arrivals(
    client: Client, bodies: Sequence[bytes], per_s: float, seconds: float, rng: random.Random
) -> None:
    """Send any of these requests at random times, `per_s` a second, whatever becomes of them."""
    due = client.clock()
    end = due + seconds
    while (due := due + rng.expovariate(per_s)) < end:
        wait_s = due - client.clock()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        client.send(rng.choice(bodies), _whatever)


def _whatever(finished: bool) -> None:
    pass
