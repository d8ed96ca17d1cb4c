"""Sends requests when they are due, whatever becomes of those before. Owns a run's clock.

Open loop: a server that stalls gets what it would have got, and its answers count from the moment
that each was sent. Nothing here waits for an answer before the next request.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from bench.goodputs.backend import Backend, SendError
from bench.goodputs.records import Outcome, Record
from bench.workloads.arrivals import Arrival, Planned
from bench.workloads.prompts import Prompts

# Requests that are made ready before they are due: making one would delay another.
_AHEAD = 32
_POLL_S = 0.001
# So many in a row that found no server: it is gone.
LOST_IN_ROW = 20


class ServerLost(Exception):
    """The server is gone, so that sending on would say nothing."""


class OpenLoop:
    """One run: sends its requests and tells `note` of each when it is over.

    `clock` reads seconds. `sent` and `open` may be read at any time.
    """

    def __init__(
        self,
        backend: Backend,
        prompts: Prompts,
        note: Callable[[Record], None],
        *,
        run: int,
        rate: float,
        timeout_s: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.sent = 0
        self.open = 0
        self._backend = backend
        self._prompts = prompts
        self._note = note
        self._run, self._rate = run, rate
        self._timeout_s = timeout_s
        self._clock = clock
        self._began = 0.0
        self._lost_since_s: float | None = None
        self._lost_in_row = 0
        self._last_error = ""

    async def run(self, planned: Sequence[Planned]) -> None:
        """Send all requests and wait for their ends.

        Raises ServerLost where many in a row have found no server; those under way are then
        stopped, as they are where this is cancelled.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                if await self._send_all(planned, tasks):
                    return
        except ExceptionGroup as group:  # those after the first were stopped because of it
            raise group.exceptions[0] from group
        raise ServerLost(
            f"the last {self._lost_in_row} requests found no server: {self._last_error}; see why it"
            " has ended, what came before is kept"
        )

    async def _send_all(self, planned: Sequence[Planned], tasks: asyncio.TaskGroup) -> bool:
        """Send all requests; False where the server is gone, and what is under way is stopped."""
        ready: asyncio.Queue[Any] = asyncio.Queue(_AHEAD)
        under_way = [maker := tasks.create_task(self._prepare(planned, ready))]
        while not (ready.full() or maker.done()):
            await asyncio.sleep(_POLL_S)
        self._began = self._clock()
        for each in planned:
            prepared = await ready.get()
            await asyncio.sleep(self._began + each.arrival.at_s - self._clock())
            if self._lost_in_row >= LOST_IN_ROW:
                for task in under_way:
                    task.cancel()
                return False
            self.sent += 1
            under_way.append(tasks.create_task(self._one(each, prepared)))
        return True

    async def _prepare(self, planned: Sequence[Planned], ready: "asyncio.Queue[Any]") -> None:
        for each in planned:
            await ready.put(await asyncio.to_thread(self._made, each))

    def _made(self, each: Planned) -> Any:
        return self._backend.prepare(self._prompts.of(each), each.arrival.output_tokens)

    async def _one(self, planned: Planned, prepared: Any) -> None:
        self.open += 1
        answer = _Answer(self._clock, self._began)
        outcome: Outcome = "finished"
        error = ""
        try:
            async with asyncio.timeout(self._timeout_s):
                await answer.read(self._backend, prepared)
        except SendError as exc:
            outcome, error = exc.outcome, str(exc)
        except TimeoutError:
            outcome, error = "timeout", f"no end after {self._timeout_s:g} s"
        except asyncio.CancelledError:
            self._over(planned, answer, "stopped", "the benchmark was stopped")
            raise
        finally:
            self.open -= 1
        self._over(planned, answer, outcome, error)

    def _over(self, planned: Planned, answer: "_Answer", outcome: Outcome, error: str) -> None:
        ended_s = self._clock() - self._began
        self._mind_losses(outcome, error, answer.sent_s, ended_s)
        arrival = planned.arrival
        prompt_tokens, output_tokens = answer.usage or (arrival.prompt_tokens, len(answer.came_s))
        self._note(
            Record(
                run=self._run,
                rate=self._rate,
                index=planned.index,
                part=planned.part,
                outcome=outcome,
                scheduled_s=arrival.at_s,
                sent_s=answer.sent_s,
                ended_s=ended_s,
                ttft_s=answer.came_s[0] - answer.sent_s if answer.came_s else 0.0,
                itl_s=answer.gaps_s,
                prompt_tokens=prompt_tokens,
                asked_tokens=arrival.output_tokens,
                output_tokens=output_tokens,
                error=error,
            )
        )

    def _mind_losses(self, outcome: Outcome, error: str, sent_s: float, now_s: float) -> None:
        """Count the requests that found no server; of those before, many may end at once."""
        self._last_error = error
        if outcome != "lost":
            self._lost_since_s, self._lost_in_row = None, 0
        elif self._lost_since_s is None:
            self._lost_since_s = now_s
        elif sent_s >= self._lost_since_s:
            self._lost_in_row += 1


class _Answer:
    """When what of an answer came, in seconds since `began`."""

    def __init__(self, clock: Callable[[], float], began: float) -> None:
        self._clock, self._began = clock, began
        self.sent_s = clock() - began
        self.came_s: list[float] = []
        self.usage: tuple[int, int] | None = None

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """The seconds between messages with tokens."""
        return tuple(
            after - before for before, after in zip(self.came_s, self.came_s[1:], strict=False)
        )

    async def read(self, backend: Backend, prepared: Any) -> None:
        """Send and read to the end; raises SendError also where no token came."""
        async with aclosing(backend.send(prepared)) as messages:
            async for message in messages:
                if message.has_tokens:
                    self.came_s.append(self._clock() - self._began)
                self.usage = message.usage or self.usage
        if not self.came_s:
            raise SendError("failed", "the answer has no token")


async def check(
    backend: Backend, prompts: Prompts, arrival: Arrival, *, timeout_s: float
) -> Record:
    """Send one request by itself and return what became of it; raises SendError where it fails."""
    found: list[Record] = []
    loop = OpenLoop(backend, prompts, found.append, run=0, rate=0.0, timeout_s=timeout_s)
    await loop.run([Planned(index=0, part="warm-up", arrival=replace(arrival, at_s=0.0))])
    if not found[0].is_finished:
        raise SendError(found[0].outcome, found[0].error)
    return found[0]
