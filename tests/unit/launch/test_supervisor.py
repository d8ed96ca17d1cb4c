"""The supervisor with small fake children that tell their lives on stdout."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from launch.supervisor import ChildFailed, ChildSpec, Supervisor

HEAD = """
import os, signal, subprocess, sys, time
from service.parent import exit_with_supervisor
exit_with_supervisor()
def on_term(number, frame):
    print("stopping", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, on_term)
print("up", os.getpid(), flush=True)
"""
SLEEP = HEAD + "time.sleep(60)\n"
STUBBORN = HEAD + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf')\ntime.sleep(60)\n"
ROOT = str(Path(__file__).parents[3])


class Fleet:
    """A supervisor of fake children, and what it said."""

    def __init__(self, sources: dict[str, str], *, orders: dict[str, int] | None = None) -> None:
        self.lines: list[str] = []
        self._news = asyncio.Event()
        self.specs = [
            ChildSpec(
                name=name,
                argv=(sys.executable, "-u", "-c", source),
                env={**os.environ, "PYTHONPATH": ROOT},
                stop_order=(orders or {}).get(name, 0),
            )
            for name, source in sources.items()
        ]

    def supervisor(self, *, restart: bool = True, stop_timeout_s: float = 10.0) -> Supervisor:
        return Supervisor(
            self.specs,
            restart=restart,
            stop_timeout_s=stop_timeout_s,
            say=self.say,
            first_delay_s=0.05,
        )

    def say(self, line: str) -> None:
        self.lines.append(line)
        self._news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self._news.clear()
                await self._news.wait()

    def count(self, part: str) -> int:
        return sum(part in line for line in self.lines)

    @property
    def seen_pids(self) -> list[int]:
        return [int(line.split()[-1]) for line in self.lines if " up " in line]


@asynccontextmanager
async def running(supervisor: Supervisor) -> AsyncIterator["asyncio.Task[None]"]:
    task = asyncio.create_task(supervisor.keep())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await supervisor.stop()


async def run(supervisor: Supervisor) -> None:
    async with running(supervisor) as task:
        await task


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_children_are_stopped_in_order_and_none_is_left() -> None:
    fleet = Fleet({"worker": SLEEP, "router": SLEEP}, orders={"router": 0, "worker": 1})
    async with running(fleet.supervisor()):
        await fleet.until(lambda: fleet.count(" up ") == 2)
    assert fleet.lines[-2:] == ["router | stopping", "worker | stopping"]
    assert not any(map(alive, fleet.seen_pids))


async def test_killed_child_is_started_again_and_the_others_are_left_alone() -> None:
    fleet = Fleet({"a": SLEEP, "b": SLEEP})
    supervisor = fleet.supervisor()
    async with running(supervisor):
        await fleet.until(lambda: fleet.count(" up ") == 2)
        supervisor.mark_started()
        first = supervisor.pids
        os.kill(first["a"], signal.SIGKILL)
        await fleet.until(lambda: fleet.count(" up ") == 3)
        assert supervisor.pids["a"] != first["a"]
        assert supervisor.pids["b"] == first["b"]
    assert "a was killed by SIGKILL, starting it again in 0.05 s" in fleet.lines


async def test_restarts_wait_longer_and_longer() -> None:
    fleet = Fleet({"a": "raise SystemExit(3)"})
    async with running(fleet.supervisor()):
        await fleet.until(lambda: fleet.count("starting it again in") == 3)
    delays = [line.rsplit(" ", 2)[1] for line in fleet.lines if "starting it again" in line]
    assert delays == ["0.05", "0.1", "0.2"]


@pytest.mark.parametrize("code", [1, 2])
async def test_bad_settings_at_start_stop_everything_with_the_childs_message(code: int) -> None:
    bad = f"import sys; print('prefill: no config.json in /x', file=sys.stderr); sys.exit({code})"
    fleet = Fleet({"router": SLEEP, "prefill": bad})
    with pytest.raises(ChildFailed) as caught:
        await run(fleet.supervisor())
    assert str(caught.value) == (
        f"prefill ended with exit code {code}: prefill: no config.json in /x"
    )
    assert not any(map(alive, fleet.seen_pids))


async def test_exit_code_1_after_the_start_is_an_accident() -> None:
    fleet = Fleet({"a": HEAD + "time.sleep(0.2); sys.exit(1)"})
    supervisor = fleet.supervisor()
    supervisor.mark_started()
    async with running(supervisor):
        await fleet.until(lambda: fleet.count(" up ") == 2)
    assert "a ended with exit code 1, starting it again in 0.05 s" in fleet.lines


async def test_without_restart_any_end_stops_everything() -> None:
    fleet = Fleet({"a": SLEEP, "b": HEAD + "time.sleep(0.2)"})
    supervisor = fleet.supervisor(restart=False)
    supervisor.mark_started()
    with pytest.raises(ChildFailed, match="b ended with exit code 0"):
        await run(supervisor)
    assert not any(map(alive, fleet.seen_pids))


async def test_child_that_ignores_the_signal_is_killed() -> None:
    fleet = Fleet({"a": STUBBORN})
    async with running(fleet.supervisor(stop_timeout_s=0.3)):
        await fleet.until(lambda: fleet.count("deaf") == 1)
    assert "a does not stop, killing it" in fleet.lines
    assert not any(map(alive, fleet.seen_pids))


async def test_grandchildren_end_with_their_parent() -> None:
    source = HEAD + (
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('grandchild up', child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    fleet = Fleet({"a": source})
    async with running(fleet.supervisor()):
        await fleet.until(lambda: fleet.count("grandchild") == 1)
    assert len(fleet.seen_pids) == 2
    await wait_gone(fleet.seen_pids[1])


async def test_kill_leaves_nothing() -> None:
    fleet = Fleet({"a": STUBBORN, "b": SLEEP})
    supervisor = fleet.supervisor()
    async with running(supervisor) as task:
        await fleet.until(lambda: fleet.count(" up ") == 2)
        pids = fleet.seen_pids
        task.cancel()
        supervisor.kill()
    for pid in pids:
        await wait_gone(pid)


async def test_long_lines_and_unfinished_ones_are_passed_on() -> None:
    source = "import sys; sys.stdout.write('x' * 200_000 + '\\nend'); sys.exit(0)"
    fleet = Fleet({"a": source})
    with pytest.raises(ChildFailed):
        await run(fleet.supervisor(restart=False))
    assert sum(line.count("x") for line in fleet.lines) == 200_000
    assert fleet.lines[-1] == "a | end"


async def test_program_that_is_not_there_is_a_plain_failure() -> None:
    fleet = Fleet({"a": SLEEP})
    missing = ChildSpec(name="b", argv=("/no/such/program",), env={})
    fleet.specs.append(missing)
    with pytest.raises(ChildFailed, match="b cannot be started"):
        await run(fleet.supervisor())
    assert not any(map(alive, fleet.seen_pids))


async def wait_gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while alive(pid):
            await asyncio.sleep(0.01)
