"""What does a short prompt gain where its decode instance computes it, and what do others lose?

Runs two whole systems as `twinpool serve` does, of which one may have prompts computed at decode,
and asks them in turn with the same prompts:

- a prompt of 16 tokens, and the next turn of a conversation: the time to its first token, and to
  the second one, which disaggregated is the first that needs the KV sent;
- 8 sequences that run while such prompts come, 20 a second: the time between their tokens, of the
  best of some rounds. The limit is that with no prompts beside them.

What the router would rather have had computed at prefill is left out of the first figures; how much
of it was computed at decode is shown.
"""

import asyncio
import os
import random
import re
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer
from twinpool import AsyncClient

from bench.options import Json, Rows
from bench.report import Row, median_and_spread, report
from engine.config import load_config
from launch.builtin import MODEL_DIR
from launch.cluster import Cluster, ClusterConfig
from service.threads import set_thread_env

_QUESTION = "What does a short prompt gain where its decode instance computes it?"
_MOST = "TWINPOOL_ROUTER_LOCAL_PREFILL_MAX"
_MOST_TOKENS = 64
_SHORT, _TURN, _QUESTION_TOKENS = 16, 500, 20
_RUNNING, _RUN_TOKENS, _PAUSE_S = 8, 600, 0.05
_WARM_UP, _ROUNDS = 4, 4
_FEW = 4  # answers, of which a median would say nothing
LOCAL, APART = "at decode", "at prefill"


@dataclass
class Samples:
    """Seconds, one entry a request or, of `gap_s`, a token."""

    first_s: list[float] = field(default_factory=list)
    second_s: list[float] = field(default_factory=list)
    gap_s: list[float] = field(default_factory=list)


async def _answer(
    client: AsyncClient, prompt: list[int], tokens: int
) -> tuple[list[float], list[int], bool]:
    """Seconds until each token, the tokens, and whether decode has computed the prompt."""
    began = time.perf_counter()
    times: list[float] = []
    found: list[int] = []
    is_local = False
    async with client.generate(prompt, max_new_tokens=tokens, ignore_eos=True) as stream:
        async for chunk in stream:
            times.extend([time.perf_counter() - began] * len(chunk.token_ids))
            found.extend(chunk.token_ids)
            if chunk.stats is not None:
                is_local = chunk.stats.prefill_instance == ""
    return times, found, is_local


class Measured:
    """The two systems side by side; one works while the other one waits."""

    def __init__(self, clients: dict[str, AsyncClient], vocab_size: int, repeats: int) -> None:
        self._clients = clients
        self._rng = random.Random(0)
        self._vocab_size = vocab_size
        self._repeats = repeats

    def _prompt(self, tokens: int) -> list[int]:
        return [self._rng.randrange(self._vocab_size) for _ in range(tokens)]

    async def short(self) -> dict[str, Samples]:
        """A prompt that nobody knows."""
        return await self._ask([self._prompt(_SHORT) for _ in range(self._repeats + _WARM_UP)])

    async def turns(self) -> dict[str, Samples]:
        """The next turn of a conversation, of which all but a question is known."""
        prompts = [self._prompt(_TURN) for _ in range(self._repeats + _WARM_UP)]
        for prompt in prompts:
            answers = [(await _answer(c, prompt, 8))[1] for c in self._clients.values()]
            prompt += [*answers[0], *self._prompt(_QUESTION_TOKENS)]
        await asyncio.sleep(1.0)  # until the routers know what is where
        return await self._ask(prompts)

    async def _ask(self, prompts: list[list[int]]) -> dict[str, Samples]:
        found = {way: Samples() for way in self._clients}
        for turn, prompt in enumerate(prompts):
            for way, client in self._clients.items():
                times, _, is_local = await _answer(client, prompt, 3)
                if turn >= _WARM_UP and is_local is (way == LOCAL):
                    found[way].first_s.append(times[0])
                    found[way].second_s.append(times[1])
        return found

    async def beside(self) -> dict[str, Samples]:
        """Sequences that run: with prompts beside them either way, and "alone"."""
        found: dict[str, Samples] = {}
        for _ in range(_ROUNDS):
            for way in (*self._clients, "alone"):
                gap_s = await self._run_beside(way)
                if way not in found or _mean(gap_s) < _mean(found[way].gap_s):
                    found[way] = Samples(gap_s=gap_s)
        return found

    async def _run_beside(self, way: str) -> list[float]:
        client = self._clients[LOCAL if way == "alone" else way]
        running = [
            asyncio.create_task(_answer(client, self._prompt(_SHORT), _RUN_TOKENS))
            for _ in range(_RUNNING)
        ]
        while way != "alone" and not any(task.done() for task in running):
            await _answer(client, self._prompt(_SHORT), 2)
            await asyncio.sleep(_PAUSE_S)
        times = [(await task)[0] for task in running]
        return [after - before for each in times for before, after in pairwise(each[4:])]


def _against(name: str, ours: list[float], theirs: list[float]) -> Row:
    value, spread = median_and_spread(ours)
    return Row(
        row=name,
        ours=value * 1e3,
        unit="ms",
        higher_is_better=False,
        peer=median_and_spread(theirs)[0] * 1e3,
        peer_name=APART,
        spread=spread * 1e3,
    )


def _share(name: str, part: float) -> Row:
    return Row(row=f"at decode, {name}", ours=100 * part, unit="%", higher_is_better=True)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _p99(values: list[float]) -> float:
    return sorted(values)[len(values) * 99 // 100]


async def _measure(measured: Measured, pattern: str) -> list[Row]:
    rows = []
    for name, ask in (
        (f"{_SHORT} tokens", measured.short),
        (f"{_QUESTION_TOKENS} tokens after {_TURN}", measured.turns),
    ):
        if re.search(pattern, name):
            found = await ask()
            here, there = found[LOCAL], found[APART]
            rows.append(_share(name, len(here.first_s) / len(there.first_s)))
            if len(here.first_s) >= _FEW:
                rows.append(_against(f"first token, {name}", here.first_s, there.first_s))
                rows.append(_against(f"second token, {name}", here.second_s, there.second_s))
    name = f"between tokens of {_RUNNING}"
    if re.search(pattern, name):
        beside = await measured.beside()
        gaps, theirs, alone = (beside[way].gap_s for way in (LOCAL, APART, "alone"))
        for figure, of in (("mean", _mean), ("p99", _p99)):
            rows.append(
                Row(
                    row=f"{name}, {figure}",
                    ours=of(gaps) * 1e3,
                    unit="ms",
                    higher_is_better=False,
                    limit=of(alone) * 1e3,
                    peer=of(theirs) * 1e3,
                    peer_name=APART,
                )
            )
    return rows


def _config(model: Path) -> ClusterConfig:
    return ClusterConfig(model=model, port=0, restart=False, log_level="warning", threads=1)


def main(
    json: Json = None,
    rows: Rows = "",
    model: Path = MODEL_DIR,
    repeats: int = 30,
) -> None:
    """Measure prompts that decode computes against the same ones computed at prefill."""
    set_thread_env()
    figures: list[Row] = []

    async def work(apart: Cluster) -> None:
        async def inner(local: Cluster) -> None:
            async with AsyncClient(local.address) as here, AsyncClient(apart.address) as there:
                clients = {LOCAL: here, APART: there}
                vocab_size = load_config(model).vocab_size
                figures.extend(await _measure(Measured(clients, vocab_size, repeats), rows))

        os.environ[_MOST] = str(_MOST_TOKENS)
        await _run(inner, model)

    os.environ[_MOST] = "0"
    asyncio.run(_run(work, model))
    report(_QUESTION, figures, json)


async def _run(work: Callable[[Cluster], Coroutine[Any, Any, None]], model: Path) -> None:
    await Cluster(_config(model), print).run(work)


if __name__ == "__main__":
    typer.run(main)
