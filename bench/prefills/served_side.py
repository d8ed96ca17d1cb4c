"""Our whole system as a user starts it, asked over its SDK: one token for each of some prompts."""

import asyncio
import signal
import sys
import time
from typing import Any

from twinpool import Client
from twinpool.aio import AsyncClient
from twinpool.errors import TwinpoolError

from bench.prefills import servers
from bench.prefills.side import serve

_TIMEOUT_S = 1800.0


class Served:
    """`twinpool serve` with all threads for prefill, and a client of it."""

    def open(self, *, model: str, threads: int) -> dict[str, Any]:
        """Start a router, a prefill and a decode instance."""
        self._address = f"127.0.0.1:{servers.free_port()}"
        command = [sys.executable, "-m", "launch", "serve", model, "--log-level", "warning"]
        command += ["--port", self._address.rpartition(":")[2], "--threads", str(threads)]
        self._server = servers.start(command, self._is_ready, signal.SIGTERM)
        return {"version": "served"}

    def run(self, *, prompts: list[list[int]]) -> dict[str, Any]:
        """Answer with the seconds until all prompts, sent together, have their first token."""
        return asyncio.run(self._run(prompts))

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

    def _is_ready(self) -> bool:
        try:
            with Client(self._address) as client:
                return len(client.status(timeout_s=1.0).instances) == 2
        except TwinpoolError:
            return False


if __name__ == "__main__":
    side = Served()
    serve({"open": side.open, "run": side.run})
