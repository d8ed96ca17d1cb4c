"""Answer many prompts at once, with a bound on how many. Usage: batch_async.py [HOST:PORT]"""

import asyncio
import sys

from twinpool import AsyncClient, Completion

AT_ONCE = 8
PROMPTS = [f"what is {number} + 17?" for number in range(32)]


async def main(address: str) -> None:
    slots = asyncio.Semaphore(AT_ONCE)
    async with AsyncClient(address) as client:

        async def answer(prompt: str) -> Completion:
            async with slots:
                return await client.complete(prompt, max_new_tokens=16, timeout_s=120)

        answers = await asyncio.gather(*(answer(prompt) for prompt in PROMPTS))
    for prompt, completion in zip(PROMPTS, answers, strict=True):
        print(f"{prompt!r} -> {completion.text!r}")
    print(sum(completion.usage.completion_tokens for completion in answers), "tokens")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:9000"))
