"""Requests to a prefill and a decode server of vLLM, with a KV connector between them.

A request goes as vLLM's own proxies send it: prefill is asked for one token, and decode for the
whole answer with what prefill has said of where the cache lies. So the first token is decode's.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.goodputs.backend import Message, SendError, Served
from bench.goodputs.openai_backend import OpenAIBackend

_TRANSFER = "kv_transfer_params"
_TO_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_Prepared = tuple[bytes, dict[str, Any]]


class PairBackend:
    """Two servers at their URLs."""

    def __init__(self, prefill_url: str, decode_url: str, *, model: str = "") -> None:
        """Connects with the first request; raises ValueError for a URL that is none."""
        self._prefill = OpenAIBackend(prefill_url, model=model)
        self._decode = OpenAIBackend(decode_url, model=model)

    async def describe(self) -> Served:
        """Ask what is served; raises SendError."""
        await self._prefill.describe()
        return await self._decode.describe()

    def prepare(self, prompt: NDArray[np.int64], output_tokens: int) -> _Prepared:
        """Return what `send` takes: prefill's request, and what decode is to be asked."""
        asked = self._decode.question(prompt, output_tokens)
        first = asked | {"max_tokens": 1, "stream": False, _TRANSFER: _TO_DECODE}
        del first["stream_options"]
        return self._prefill.message(first), asked

    async def send(self, prepared: _Prepared) -> AsyncGenerator[Message]:
        """Send a request and return its answer as it comes; raises SendError."""
        first, asked = prepared
        where = (await self._prefill.whole(first)).get(_TRANSFER)
        if not where:
            raise SendError("failed", f"prefill's answer has no {_TRANSFER}; is it a KV producer?")
        yield Message(has_tokens=False, ends_prefill=True)
        then = self._decode.message(asked | {_TRANSFER: where})
        async with aclosing(self._decode.send(then)) as messages:
            async for message in messages:
                yield message

    async def close(self) -> None:
        """Drop what is open."""
        await self._prefill.close()
        await self._decode.close()
