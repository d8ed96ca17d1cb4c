"""The peer vLLM as a server, asked over HTTP; runs under its interpreter, see `answers`.

Its defaults on a CPU, but for prefix caching, which is as it is asked for. It is stopped between
its turns.
"""

import http.client
import importlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

# Beside this file: its interpreter does not know this project.
servers = importlib.import_module("servers")

_TIMEOUT_S = 1800.0
_NAME = "served"


class VllmServed:
    """vLLM's OpenAI-compatible server, and a connection for each prompt."""

    def open(
        self, *, model: str, max_model_len: int, prefix_caching: bool = False
    ) -> dict[str, Any]:
        """Start the server."""
        self._port = servers.free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--served-model-name", _NAME, "--dtype", "bfloat16", "--host", "127.0.0.1"]
        command += ["--port", str(self._port), "--max-model-len", str(max_model_len)]
        command += ["--enable-prefix-caching" if prefix_caching else "--no-enable-prefix-caching"]
        self._server = servers.start(command, self._is_ready, signal.SIGTERM)
        servers.rest(self._server)
        return {"version": f"vLLM {importlib.import_module('vllm').__version__} served"}

    def run(self, *, prompts: list[list[int]]) -> dict[str, Any]:
        """Answer with the seconds until all prompts, sent together, have their first token."""
        with self._awake(), ThreadPoolExecutor(len(prompts)) as pool:
            began = time.perf_counter()
            tokens = list(pool.map(self._first_token, prompts))
            seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": tokens}

    def stream(self, *, requests: list[tuple[list[int], int]], in_flight: int) -> dict[str, Any]:
        """Answer with when each token of each request came, in seconds from the start.

        A request is its prompt and how many tokens it is to get; as soon as one ends the next is
        sent.
        """
        with self._awake(), ThreadPoolExecutor(in_flight) as pool:
            began = time.perf_counter()
            came = list(pool.map(lambda request: self._arrivals(began, *request), requests))
        return {"arrivals": came}

    @contextmanager
    def _awake(self) -> Iterator[None]:
        servers.wake(self._server)
        try:
            yield
        finally:
            servers.rest(self._server)

    def _first_token(self, prompt: list[int]) -> int:
        with self._answer("POST", "/v1/completions", _asked(prompt, 1)) as answer:
            token: int = json.loads(answer.read())["choices"][0]["token_ids"][0]
        return token

    def _arrivals(self, began: float, prompt: list[int], new_tokens: int) -> list[float]:
        asked = _asked(prompt, new_tokens) | {"stream": True}
        came: list[float] = []
        with self._answer("POST", "/v1/completions", asked) as answer:
            for line in answer:
                now = time.perf_counter() - began
                if line.startswith(b"data: {"):
                    for choice in json.loads(line[len(b"data: ") :])["choices"]:
                        came.extend([now] * len(choice["token_ids"] or ()))
        if len(came) != new_tokens:
            raise RuntimeError(f"asked for {new_tokens} tokens, got {len(came)}")
        return came

    @contextmanager
    def _answer(
        self, method: str, path: str, asked: dict[str, Any] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_TIMEOUT_S)
        try:
            body = json.dumps(asked) if asked else None
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                raise RuntimeError(f"{path}: {response.status} {response.read()[:500]!r}")
            yield response
        finally:
            connection.close()

    def _is_ready(self) -> bool:
        try:
            with self._answer("GET", "/health"):
                return True
        except OSError:
            return False


def _asked(prompt: list[int], new_tokens: int) -> dict[str, Any]:
    return {
        "model": _NAME,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


if __name__ == "__main__":
    side = VllmServed()
    importlib.import_module("answers").serve(
        {"open": side.open, "run": side.run, "stream": side.stream}
    )
