"""How long a hand-over takes: from prefill's end, as the client learns of it, to decode's first
token. Asks one request at a time of a system that has nothing else to do.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

from bench.goodputs.backend import Backend, SendError
from bench.report import Row, median_and_spread
from bench.workloads.arrivals import Arrival, Planned
from bench.workloads.prompts import Prompts

WARM_UP = 2
_NEW_TOKENS = 4


async def handovers_s(
    backend: Backend,
    prompts: Prompts,
    prompt_tokens: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Return the seconds of each of some hand-overs; raises SendError."""
    found = []
    for number in range(WARM_UP + repeats):
        arrival = Arrival(at_s=0.0, prompt_tokens=prompt_tokens, output_tokens=_NEW_TOKENS)
        prompt = prompts.of(Planned(index=number, part="window", arrival=arrival))
        found.append(await _handover_s(backend, backend.prepare(prompt, _NEW_TOKENS), clock))
    return found[WARM_UP:]


def row(prompt_tokens: int, seconds: Sequence[float]) -> Row:
    """Return the figure of one length, in ms."""
    middle, spread = median_and_spread([1e3 * each for each in seconds])
    name = f"hand-over, {prompt_tokens} tokens"
    return Row(row=name, ours=middle, unit="ms", higher_is_better=False, spread=spread)


async def _handover_s(backend: Backend, prepared: Any, clock: Callable[[], float]) -> float:
    """From prefill's end, be it told with the first token, to the next token."""
    moments: list[float] = []
    async with aclosing(backend.send(prepared)) as messages:
        async for message in messages:
            if message.has_tokens or message.ends_prefill:
                moments.append(clock())
    if len(moments) < 2:
        raise SendError("failed", "the answer came in one message: there is no hand-over to see")
    return moments[1] - moments[0]
