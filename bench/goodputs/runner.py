"""One run after another at given rates. Owns what a run is made of, and the figures of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.goodputs.backend import Backend, Served
from bench.goodputs.load import OpenLoop, check
from bench.goodputs.metrics import Metrics, metrics
from bench.goodputs.records import Record
from bench.goodputs.search import Search
from bench.goodputs.slo import Slo
from bench.workloads.arrivals import Phases, Planned, plan
from bench.workloads.prompts import Prompts
from bench.workloads.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is over: its number, what was offered, the window's records and their figures."""

    number: int
    rate: float
    records: tuple[Record, ...]
    metrics: Metrics


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What all runs have in common."""

    workload: Workload
    phases: Phases
    slo: Slo
    seed: int
    vocab_size: int
    max_context: int | None
    max_requests: int | None
    timeout_s: float


class Runner:
    """Runs rates. `begin` is told of each run's loop and number of requests, `note` of each record.

    What is done is in `runs`, also where one is cut short.
    """

    def __init__(
        self,
        backend: Backend,
        served: Served,
        asked: Asked,
        *,
        begin: Callable[[OpenLoop, float, int], None],
        note: Callable[[Record], None],
    ) -> None:
        self.runs: list[Run] = []
        self._backend = backend
        self._asked = asked
        self._begin, self._note = begin, note
        said = asked.max_context, served.max_context
        self._max_context = min((each for each in said if each is not None), default=None)
        self._vocab_size = served.vocab_size or asked.vocab_size

    def plan(self, rate: float | None) -> list[Planned]:
        """Return the requests of a rate; raises WorkloadError where the workload lacks them."""
        asked = self._asked
        arrivals = asked.workload.at(rate, asked.phases.total_s, self._max_context)
        return plan(arrivals, asked.phases, asked.max_requests)

    async def check(self, rate: float | None) -> Record:
        """Send the first request alone; raises SendError where it is not answered."""
        first = self.plan(rate)[0].arrival
        return await check(self._backend, self._prompts(0), first, timeout_s=self._asked.timeout_s)

    async def at(self, rate: float | None) -> Run:
        """Run a rate, or the workload's own; raises WorkloadError and ServerLost."""
        asked, number = self._asked, len(self.runs) + 1
        planned = self.plan(rate)
        counted = sum(each.part == "window" for each in planned)
        # Of a trace's own rate, what came in the window.
        offered = rate or counted / asked.phases.window_s
        found: list[Record] = []

        def note(record: Record) -> None:
            found.append(record)
            self._note(record)

        loop = OpenLoop(
            self._backend,
            self._prompts(number),
            note,
            run=number,
            rate=offered,
            timeout_s=asked.timeout_s,
        )
        self._begin(loop, offered, len(planned))
        until_s = 0.0
        try:
            await loop.run(planned)
            if asked.max_requests is None:
                until_s = asked.phases.warmup_s + asked.phases.window_s
        finally:
            window = [record for record in found if record.part == "window"]
            self._keep(number, offered, window, until_s)
        return self.runs[-1]

    async def search(self, search: Search, say: Callable[[str], None]) -> None:
        """Run what a search asks for until it is over."""
        while (rate := search.next()) is not None:
            run = await self.at(rate)
            say(str(search.add(rate, run.metrics.met, run.metrics.submitted)))

    def _prompts(self, run: int) -> Prompts:
        return Prompts(seed=self._asked.seed, run=run, vocab_size=self._vocab_size)

    def _keep(self, number: int, rate: float, window: Sequence[Record], until_s: float) -> None:
        if window:
            asked = self._asked
            began_s = asked.phases.warmup_s
            found = metrics(window, asked.slo, began_s=began_s, until_s=until_s)
            self.runs.append(Run(number=number, rate=rate, records=tuple(window), metrics=found))
