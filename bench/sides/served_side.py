"""Our whole system as a user starts it, asked over its SDK."""

import asyncio
import os
import signal
import sys
import time
from typing import Any

from twinpool import Client
from twinpool.aio import AsyncClient
from twinpool.errors import TwinpoolError

from bench.sides import servers
from bench.sides.answers import serve

_TIMEOUT_S = 1800.0


class Served:
    """`twinpool serve`, and a client of it."""

    def open(self, *, model: str, threads: int, kv_mib: int | None = None) -> dict[str, Any]:
        """Start a router, a prefill and a decode instance, each with as many threads.

        `kv_mib` is the size of each instance's KV cache, where it is not to be the default.
        """
        if kv_mib is not None:
            for role in ("PREFILL", "DECODE"):
                os.environ[f"TWINPOOL_{role}_KV_MEMORY_MIB"] = str(kv_mib)
        self._address = f"127.0.0.1:{servers.free_port()}"
        command = [sys.executable, "-m", "launch", "serve", model, "--log-level", "warning"]
        command += ["--port", self._address.rpartition(":")[2], "--threads", str(threads)]
        self._server = servers.start(command, self._is_ready, signal.SIGTERM)
        return {"version": "served"}

    def run(self, *, prompts: list[list[int]]) -> dict[str, Any]:
        """Answer with the seconds until all prompts, sent together, have their first token."""
        return asyncio.run(self._run(prompts))

    def stream(self, *, requests: list[tuple[list[int], int]], in_flight: int) -> dict[str, Any]:
        """Answer with when each token of each request came, in seconds from the start.

        A request is its prompt and how many tokens it is to get; as soon as one ends the next is
        sent.
        """
        return {"arrivals": asyncio.run(self._stream(requests, in_flight))}

    async def _run(self, prompts: list[list[int]]) -> dict[str, Any]:
        async with AsyncClient(self._address) as client:
            await client.status()  # connected
            began = time.perf_counter()
            asked = [
                client.complete(prompt, max_new_tokens=1, ignore_eos=True, timeout_s=_TIMEOUT_S)
                for prompt in prompts
            ]
            done = await asyncio.gather(*asked)
            seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": [each.token_ids[0] for each in done]}

    async def _stream(
        self, requests: list[tuple[list[int], int]], in_flight: int
    ) -> list[list[float]]:
        room = asyncio.Semaphore(in_flight)
        async with AsyncClient(self._address) as client:
            await client.status()  # connected
            began = time.perf_counter()

            async def arrivals(prompt: list[int], new_tokens: int) -> list[float]:
                came: list[float] = []
                async with (
                    room,
                    client.generate(
                        prompt, max_new_tokens=new_tokens, ignore_eos=True, timeout_s=_TIMEOUT_S
                    ) as stream,
                ):
                    async for chunk in stream:
                        came.extend([time.perf_counter() - began] * len(chunk.token_ids))
                return came

            return await asyncio.gather(*(arrivals(*request) for request in requests))

    def _is_ready(self) -> bool:
        try:
            with Client(self._address) as client:
                return len(client.status(timeout_s=1.0).instances) == 2
        except TwinpoolError:
            return False


if __name__ == "__main__":
    side = Served()
    serve({"open": side.open, "run": side.run, "stream": side.stream})
