"""Requests to a Twinpool router, by its SDK."""

from collections.abc import AsyncGenerator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from twinpool import AsyncClient, DeadlineExceeded, Refused, TwinpoolError, Unavailable

from bench.goodputs.backend import Message, SendError, Served
from bench.goodputs.records import Outcome

_Request = tuple[list[int], int]


class TwinpoolBackend:
    """A router, or several ("a:9000,b:9000") of which the next is used where one is lost."""

    def __init__(
        self, address: str, *, model: str = "", ca: Path | None, token_file: Path | None
    ) -> None:
        """Connects with the first request; raises ValueError for files that cannot be used."""
        tls = False if ca is None else str(ca)
        self._client = AsyncClient(address, tls=tls, token_file=token_file)
        self._model = model or None

    async def describe(self) -> Served:
        """Ask what is served; raises SendError."""
        try:
            said = await self._client.describe(model=self._model or "")
        except TwinpoolError as exc:
            raise _send_error(exc) from exc
        return Served(
            model=said.model,
            version=f"twinpool {said.version}",
            vocab_size=said.vocab_size,
            max_context=min(said.max_model_len, said.max_request_tokens or said.max_model_len),
        )

    def prepare(self, prompt: NDArray[np.int64], output_tokens: int) -> _Request:
        """Return what `send` takes."""
        return prompt.tolist(), output_tokens

    async def send(self, prepared: _Request) -> AsyncGenerator[Message]:
        """Send a request and return its answer as it comes; raises SendError."""
        prompt, output_tokens = prepared
        try:
            async with self._client.generate(
                prompt, max_new_tokens=output_tokens, ignore_eos=True, model=self._model
            ) as stream:
                async for chunk in stream:
                    usage = chunk.usage
                    yield Message(
                        has_tokens=bool(chunk.token_ids),
                        usage=(usage.prompt_tokens, usage.completion_tokens) if usage else None,
                    )
        except TwinpoolError as exc:
            raise _send_error(exc) from exc

    async def close(self) -> None:
        """Drop what is open."""
        await self._client.close()


def _send_error(error: TwinpoolError) -> SendError:
    outcome: Outcome = "failed"
    match error:
        case Refused():
            outcome = "refused"
        case DeadlineExceeded():
            outcome = "timeout"
        case Unavailable():
            outcome = "lost"
    return SendError(outcome, error.message)
