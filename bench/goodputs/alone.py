"""How long one request at a time takes: to the first token, for each further one, and for the
hand-over. The system has nothing else to do.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from bench.goodputs.backend import Backend, SendError
from bench.report import Row, median_and_spread
from bench.workloads.arrivals import Arrival, Planned
from bench.workloads.prompts import Prompts

WARM_UP = 2
NEW_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Alone:
    """One request's times.

    `next_s` is from prefill's end, as the client learns of it, to the next token; prefill's end may
    be told with the first token.
    """

    ttft_s: float
    next_s: float
    tpot_s: float


async def asked_alone(
    backend: Backend,
    prompts: Prompts,
    prompt_tokens: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Alone]:
    """Return the times of some requests of NEW_TOKENS tokens each; raises SendError."""
    found = []
    for number in range(WARM_UP + repeats):
        arrival = Arrival(at_s=0.0, prompt_tokens=prompt_tokens, output_tokens=NEW_TOKENS)
        prompt = prompts.of(Planned(index=number, part="window", arrival=arrival))
        found.append(await _ask(backend, backend.prepare(prompt, NEW_TOKENS), clock))
    return found[WARM_UP:]


def rows(prompt_tokens: int, found: Sequence[Alone], *, hands_over: bool) -> list[Row]:
    """Return the figures of one length, in ms: TTFT, TPOT, and the hand-over where there is one."""
    of = {
        f"TTFT of one request, {prompt_tokens} tokens": [each.ttft_s for each in found],
        f"TPOT of one request, {prompt_tokens} tokens": [each.tpot_s for each in found],
    }
    if hands_over:
        of[f"hand-over, {prompt_tokens} tokens"] = [each.next_s for each in found]
        of[f"hand-over beyond a step, {prompt_tokens} tokens"] = [
            each.next_s - each.tpot_s for each in found
        ]
    figures = []
    for name, seconds in of.items():
        middle, spread = median_and_spread([1e3 * each for each in seconds])
        figures.append(Row(row=name, ours=middle, unit="ms", higher_is_better=False, spread=spread))
    return figures


async def _ask(backend: Backend, prepared: Any, clock: Callable[[], float]) -> Alone:
    began_s = clock()
    moments: list[float] = []
    first_s = None
    async with aclosing(backend.send(prepared)) as messages:
        async for message in messages:
            if message.has_tokens or message.ends_prefill:
                moments.append(clock())
                if message.has_tokens and first_s is None:
                    first_s = moments[-1]
    if len(moments) < 2 or first_s is None:
        raise SendError("failed", "the answer came in one message: there is no next token to see")
    return Alone(
        ttft_s=first_s - began_s,
        next_s=moments[1] - moments[0],
        tpot_s=(moments[-1] - first_s) / (NEW_TOKENS - 1),
    )
