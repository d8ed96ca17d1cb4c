"""Systems one after another, and their figures side by side. Owns what happens where one fails:
the others go on.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import uvloop

from bench.goodputs.backend import SendError
from bench.goodputs.figures import ALONE, Figures, Settings, searched, timed_alone
from bench.goodputs.load import ServerLost
from bench.goodputs.loads import Load
from bench.goodputs.rows import named
from bench.goodputs.systems import OURS, SYSTEMS, Machine, OpenBackend
from bench.report import Row
from bench.workloads.arrivals import WorkloadError
from bench.workloads.workload import Repaced


def beside(found: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Return our figures, once for each other system that has one of the same name beside it.

    Those that ours lacks stand alone, with the name of their system.
    """
    ours = {row.row: row for row in found.get(OURS, ())}
    theirs = [(system, row) for system in found if system != OURS for row in found[system]]
    rows = []
    for name, row in ours.items():
        peers = [(system, its.ours) for system, its in theirs if its.row == name]
        rows += [replace(row, peer=peer, peer_name=system) for system, peer in peers] or [row]
    alone = [(system, row) for system, row in theirs if row.row not in ours]
    return rows + [replace(row, row=f"{system}, {row.row}") for system, row in alone]


class Contest:
    """Asks systems one after another, in one event loop: gRPC is not to see several."""

    def __init__(
        self,
        machine: Machine,
        asked: Mapping[Load, Repaced],
        settings: Settings,
        out: Path,
        say: Callable[[str], None],
    ) -> None:
        self._machine, self._asked = machine, asked
        self._settings, self._out = settings, out
        self._say = say
        self.found: dict[str, Figures] = {}
        self.failed: list[str] = []

    def hold(self) -> None:
        """Ask all systems that the pattern matches; those that fail are in `failed`."""
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            for name in SYSTEMS:
                if self._is_wanted(name):
                    self._one(name, runner)

    def records_of(self, system: str, load: Load) -> Path:
        """Return the file of a system's records."""
        return self._folder(system) / f"{load.name}.jsonl"

    def _one(self, name: str, runner: asyncio.Runner) -> None:
        self._say(f"starting {name}")
        self.found[name] = Figures()
        machine = replace(self._machine, logs=self._folder(name))
        try:
            with SYSTEMS[name].start(machine) as open_backend:
                runner.run(self._ask(name, open_backend))
        except (RuntimeError, SendError, ServerLost, WorkloadError, OSError) as exc:
            self._say(f"{name}: {exc}")
            self.failed.append(name)

    async def _ask(self, name: str, open_backend: OpenBackend) -> None:
        found, settings = self.found[name], self._settings
        if settings.wants(ALONE, name):
            hands_over = SYSTEMS[name].hands_over
            found.main += await timed_alone(open_backend, settings, hands_over=hands_over)
        for load, workload in self._asked.items():
            if settings.wants(load.name, name):
                file = self.records_of(name, load)
                its = await searched(open_backend, load, workload, settings, file, self._say)
                found.main += its.main
                found.points += named(its.points, f"{name}, ")

    def _is_wanted(self, name: str) -> bool:
        system = SYSTEMS[name]
        parts = [ALONE, *(load.name for load in self._asked)]
        if not any(self._settings.wants(part, name) for part in parts):
            return False
        if system.is_vllm and self._machine.vllm_python is None:
            return False
        if system.instances > len(self._machine.cores):
            self._say(f"{name} is left out: it needs {system.instances} cores")
            return False
        return True

    def _folder(self, system: str) -> Path:
        return self._out / system.replace(" ", "-")
