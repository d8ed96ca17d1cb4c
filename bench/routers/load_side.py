"""Mocks and clients in one process, for routers that run elsewhere; each command is a whole run."""

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import uvloop

from bench.routers.around import PROMPT, Around, client_of
from bench.routers.load import Client, Streams, Tally, arrivals
from bench.routers.resident import resident_bytes
from bench.sides.answers import serve
from bench.sides.process import used_cpu_s
from service.garbage import collect_rarely


class Load:
    """Answers commands. `processes` are those of the routers, `around` the fields of `Around`."""

    def open(self) -> dict[str, Any]:
        """Say that it is here."""
        return {"version": "mocks and clients"}

    def streams(
        self, *, around: dict[str, Any], processes: list[int], **load: Any
    ) -> dict[str, Any]:
        """Keep answers open; answer with the figures of each window of time."""
        return {"windows": uvloop.run(_streams(Around(**around), processes, **load))}

    def offered(
        self, *, around: dict[str, Any], processes: list[int], **load: Any
    ) -> dict[str, Any]:
        """Offer requests at random times; answer with the figures of one window."""
        return {"windows": [uvloop.run(_offered(Around(**around), processes, **load))]}


async def _streams(
    around: Around,
    processes: list[int],
    *,
    streams: int,
    tokens: int,
    settle_s: float,
    window_s: float,
    windows: int,
) -> list[dict[str, float]]:
    """Keep so many streams open; the windows begin after `settle_s`."""
    async with client_of(around) as client:
        idle_bytes = sum(map(resident_bytes, processes))
        load = Streams(client, tokens, PROMPT, random.Random(1))
        load.begin(streams)
        await asyncio.sleep(settle_s)
        found = []
        for _ in range(windows):
            window = Window(client, processes)
            await asyncio.sleep(window_s)
            grown = sum(map(resident_bytes, processes)) - idle_bytes
            found.append({**window.end(), "grown_bytes": grown})
        load.end()
    return found


async def _offered(
    around: Around,
    processes: list[int],
    *,
    tokens: int,
    per_s: float,
    settle_s: float,
    seconds: float,
) -> dict[str, float]:
    """Offer `per_s` requests a second; the window begins after `settle_s`.

    They are for half to one and a half times `tokens`, so that answers do not end all at once.
    """
    rng = random.Random(2)
    async with client_of(around) as client:
        lengths = range(tokens - tokens // 2, tokens + tokens // 2 + 1)
        bodies = [client.dialect.request(length, PROMPT) for length in lengths]
        await arrivals(client, bodies, per_s, settle_s, rng)
        window = Window(client, processes)
        await arrivals(client, bodies, per_s, seconds, rng)
        return window.end()


class Window:
    """A time in which everything that comes, and what it costs, is counted; begins when made."""

    def __init__(self, client: Client, processes: list[int]) -> None:
        self._client = client
        self._processes = processes
        client.tally = self._tally = Tally()
        self._began, self._cpu_s = client.clock(), _cpu_s(processes)
        self._own_cpu_s = time.process_time()

    def end(self) -> dict[str, float]:
        """Return the figures as plain numbers: per second, seconds, and shares of a core."""
        seconds = self._client.clock() - self._began
        tally = self._tally
        found = {
            "tokens_per_s": tally.tokens / seconds,
            "messages_per_s": tally.messages / seconds,
            "finished_per_s": tally.finished / seconds,
            "unfinished": tally.unfinished,
            "router_cpu": (_cpu_s(self._processes) - self._cpu_s) / seconds,
            "load_cpu": (time.process_time() - self._own_cpu_s) / seconds,
        }
        for name, spread in (("on_way", tally.on_way), ("refused", tally.refused_after)):
            if len(spread):
                found |= {f"{name}_p{p}_s": spread.percentile(p) for p in (50, 99)}
        return found


def _cpu_s(processes: list[int]) -> float:
    return sum(used_cpu_s(Path(f"/proc/{process}/stat")) for process in processes)


if __name__ == "__main__":
    collect_rarely()  # or its own pauses would be the router's
    side = Load()
    serve({"open": side.open, "streams": side.streams, "offered": side.offered})
