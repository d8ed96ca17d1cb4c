"""Requests to a server that speaks OpenAI's completions, with prompts of token ids.

What counts as a message with tokens, and what does not, is as in `vllm bench serve`.
"""

import json
from asyncio import LimitOverrunError
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.goodputs.backend import Message, SendError, Served
from bench.goodputs.http_events import HttpError, HttpEvents

_REFUSALS = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_DONE = b"[DONE]"
# What reading an answer raises where the connection breaks, and where it is not as it should be.
_BROKEN = (HttpError, OSError, EOFError)
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, LimitOverrunError)


class OpenAIBackend:
    """A server at a URL, as http://127.0.0.1:8000; with or without /v1."""

    def __init__(self, url: str, *, model: str = "", api_key: str = "") -> None:
        """Connects with the first request; raises ValueError for a URL that is none."""
        self._http = HttpEvents(url, api_key)
        self._model = model

    async def describe(self) -> Served:
        """Ask what is served, and take the first model where none was named; raises SendError."""
        try:
            listed = json.loads(await self._http.get("/v1/models"))["data"]
            found = next((each for each in listed if each["id"] == self._model), listed[0])
        except _BROKEN as exc:
            raise _send_error(exc) from exc
        except _MALFORMED as exc:
            raise SendError("failed", f"/v1/models names no model: {exc!r}") from exc
        self._model = self._model or found["id"]
        return Served(
            model=self._model,
            version=f"OpenAI-compatible ({found.get('owned_by', 'unknown')})",
            max_context=found.get("max_model_len"),
        )

    def prepare(self, prompt: NDArray[np.int64], output_tokens: int) -> bytes:
        """Return what `send` takes."""
        return self.message(self.question(prompt, output_tokens))

    def question(self, prompt: NDArray[np.int64], output_tokens: int) -> dict[str, Any]:
        """Return a request as JSON has it."""
        return {
            "model": self._model,
            "prompt": prompt.tolist(),
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def message(self, question: dict[str, Any]) -> bytes:
        """Return a request as it is sent."""
        return self._http.post("/v1/completions", json.dumps(question).encode())

    async def whole(self, message: bytes) -> dict[str, Any]:
        """Send a request that does not stream and return its answer; raises SendError."""
        try:
            answer: dict[str, Any] = json.loads(await self._http.whole(message))
        except _BROKEN as exc:
            raise _send_error(exc) from exc
        except _MALFORMED as exc:
            raise SendError("failed", f"the answer is none of OpenAI's: {exc!r}") from exc
        return answer

    async def send(self, prepared: bytes) -> AsyncGenerator[Message]:
        """Send a request and return its answer as it comes; raises SendError."""
        is_done = False
        try:
            async with aclosing(self._http.events(prepared)) as events:
                async for data in events:
                    is_done = is_done or data == _DONE
                    if not is_done:
                        yield _message(json.loads(data))
        except _BROKEN as exc:
            raise _send_error(exc) from exc
        except _MALFORMED as exc:
            raise SendError("failed", f"the answer is none of OpenAI's: {exc!r}") from exc
        if not is_done:
            raise SendError("lost", "the answer broke off before its end")

    async def close(self) -> None:
        """Drop what is open."""
        await self._http.close()


def _message(event: dict[str, Any]) -> Message:
    if "error" in event:
        raise SendError("failed", str(event["error"])[:2000])
    usage = event.get("usage")
    return Message(
        has_tokens=bool(event.get("choices")),
        usage=usage and (usage["prompt_tokens"], usage["completion_tokens"]),
    )


def _send_error(error: HttpError | OSError | EOFError) -> SendError:
    if isinstance(error, HttpError):
        return SendError("refused" if error.status in _REFUSALS else "failed", str(error))
    return SendError("lost", f"the connection broke: {str(error) or type(error).__name__}")
