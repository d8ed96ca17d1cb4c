"""The peer vLLM as a server, asked over HTTP; runs under its interpreter, see vllm_side.

Its defaults on a CPU, but for prefix caching, which is off. It is stopped between its turns.
"""

import http.client
import importlib
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# Beside this file: its interpreter does not know this project.
servers = importlib.import_module("servers")

_TIMEOUT_S = 1800.0
_NAME = "served"


class VllmServed:
    """vLLM's OpenAI-compatible server, and a connection for each prompt."""

    def open(self, *, model: str, max_model_len: int) -> dict[str, Any]:
        """Start the server."""
        self._port = servers.free_port()
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--served-model-name", _NAME, "--dtype", "bfloat16", "--host", "127.0.0.1"]
        command += ["--port", str(self._port), "--max-model-len", str(max_model_len)]
        command += ["--no-enable-prefix-caching"]
        self._server = servers.start(command, self._is_ready, signal.SIGTERM)
        servers.rest(self._server)
        return {"version": f"vLLM {importlib.import_module('vllm').__version__} served"}

    def run(self, *, prompts: list[list[int]]) -> dict[str, Any]:
        """Answer with the seconds until all prompts, sent together, have their first token."""
        servers.wake(self._server)
        try:
            with ThreadPoolExecutor(len(prompts)) as pool:
                began = time.perf_counter()
                tokens = list(pool.map(self._first_token, prompts))
                seconds = time.perf_counter() - began
        finally:
            servers.rest(self._server)
        return {"seconds": seconds, "tokens": tokens}

    def _first_token(self, prompt: list[int]) -> int:
        asked = {
            "model": _NAME,
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = self._ask("POST", "/v1/completions", json.dumps(asked))
        token: int = json.loads(answer)["choices"][0]["token_ids"][0]
        return token

    def _ask(self, method: str, path: str, body: str | None = None) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_TIMEOUT_S)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            said = response.read()
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            raise RuntimeError(f"{path}: {response.status} {said[:500]!r}")
        return said

    def _is_ready(self) -> bool:
        try:
            self._ask("GET", "/health")
        except OSError:
            return False
        return True


def main() -> None:
    """Answer lines until there are no more, then end at once."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = VllmServed()
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = getattr(side, arguments.pop("do"))(**arguments)
        except Exception as exc:
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
