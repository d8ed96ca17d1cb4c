"""Answers chats with the engine alone, in one process: what the distributed system must equal.

Run as `python -m launch.reference MODEL`: reads {"prompts": [...], "max_new_tokens": n} from
standard input and writes {"answers": [{"text", "token_ids"}]} to standard output, both JSON.
"""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.cluster import import_env
from service.errors import StartError
from service.parent import PARENT_PID_VARIABLE, exit_with_supervisor
from service.threads import thread_env

_TIMEOUT_S = 300.0
_BLOCK_SIZE = 32
_MAX_BATCHED_TOKENS = 2048


async def reference_answers(
    folder: Path, prompts: Sequence[str], *, max_new_tokens: int, threads: int
) -> list[dict[str, Any]]:
    """Returns text and token ids for each prompt, computed in a process of its own.

    Raises `StartError` where that process fails or takes too long.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "launch.reference", str(folder)),
        env={
            **os.environ,
            **thread_env(threads),
            **import_env(),
            PARENT_PID_VARIABLE: str(os.getpid()),
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    asked = {"prompts": list(prompts), "max_new_tokens": max_new_tokens}
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            output, _ = await process.communicate(json.dumps(asked).encode())
    except TimeoutError as exc:
        raise StartError(f"the engine alone took over {_TIMEOUT_S:g} s") from exc
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise StartError("the engine alone failed: see the lines above")
    answers: list[dict[str, Any]] = json.loads(output)["answers"]
    return answers


def answer(folder: Path, prompts: list[str], max_new_tokens: int) -> list[dict[str, Any]]:
    """Returns the greedy answers to the prompts, each as one user's message."""
    import torch

    from engine.config import load_config
    from engine.generate import GenerationRequest, generate
    from engine.runner import ModelRunner
    from engine.stopping import StopCriteria
    from text.assets import load_assets
    from text.tokenizer import Tokenizer

    config = load_config(folder)
    tokenizer = Tokenizer(load_assets(folder))
    stop = StopCriteria(
        max_new_tokens=max_new_tokens, eos_token_ids=frozenset(config.eos_token_ids)
    )
    requests = [
        GenerationRequest(prompt_ids=tokenizer.encode_messages([("user", prompt)]), stop=stop)
        for prompt in prompts
    ]
    longest = max(len(request.prompt_ids) for request in requests) + max_new_tokens
    runner = ModelRunner(
        folder=folder,
        config=config,
        dtype=getattr(torch, config.dtype),
        device=torch.device("cpu"),
        num_blocks=-(-longest // _BLOCK_SIZE),
        block_size=_BLOCK_SIZE,
    )
    answers = []
    for result in generate(runner, requests, max_batched_tokens=_MAX_BATCHED_TOKENS):
        shown = [token for token in result.token_ids if token not in stop.end_token_ids]
        answers.append({"text": tokenizer.decode(shown), "token_ids": result.token_ids})
    return answers


def main() -> None:
    """Entry point of the subprocess."""
    exit_with_supervisor()
    asked = json.load(sys.stdin)
    answers = answer(Path(sys.argv[1]), asked["prompts"], asked["max_new_tokens"])
    json.dump({"answers": answers}, sys.stdout)


if __name__ == "__main__":
    main()
