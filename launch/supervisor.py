"""Keeps child processes alive and takes them down in order; knows nothing of what they do.

Owns starting, restarting with back-off, the children's output and the promise that none of them
is left behind.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from service.errors import StartError
from service.parent import PARENT_PID_VARIABLE

_FIRST_DELAY_S = 0.5
_LONGEST_DELAY_S = 10.0
# A child that held this long is not failing at start: the next restart is quick again.
_HEALTHY_AFTER_S = 30.0
_KILL_WAIT_S = 5.0
_OUTPUT_WAIT_S = 1.0
_READ_BYTES = 1 << 16
# How the processes of this project say that their settings, not their luck, are the problem.
_FATAL_CODES = (1, 2)


class ChildFailed(StartError):
    """A child cannot start, or ended and is not to be started again."""


@dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """What to start: a name for its output, a command line, and the order at the end."""

    name: str
    argv: Sequence[str]
    env: Mapping[str, str]
    # Lower ones are stopped first; those alike at the same time.
    stop_order: int = 0


class Supervisor:
    """Runs children: `keep` until one fails for good or it is enough, then `stop`.

    Until `mark_started`, a child that ends with exit code 1 or 2 is a failure for good; with
    `restart` false, any end of a child is. `say` gets every line, the children's with their name.
    """

    def __init__(
        self,
        specs: Sequence[ChildSpec],
        *,
        restart: bool,
        stop_timeout_s: float,
        say: Callable[[str], None],
        first_delay_s: float = _FIRST_DELAY_S,
    ) -> None:
        width = max(len(spec.name) for spec in specs)
        self._children = [_Child(spec, f"{spec.name:{width}} | ", say) for spec in specs]
        self._restart = restart
        self._stop_timeout_s = stop_timeout_s
        self._say = say
        self._first_delay_s = first_delay_s
        self._started = False

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the children that live, by name."""
        return {child.spec.name: child.pid for child in self._children if child.pid}

    def mark_started(self) -> None:
        """Says that all is up: from now on a child's end is an accident, not a bad setting."""
        self._started = True

    async def keep(self) -> None:
        """Starts children and keeps them until cancelled or `ChildFailed`; `stop` must follow."""
        tasks = [asyncio.create_task(self._keep(child)) for child in self._children]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def stop(self) -> None:
        """Stops every child: SIGTERM in order, SIGKILL for those that take too long."""
        for order in sorted({child.spec.stop_order for child in self._children}):
            group = [child for child in self._children if child.spec.stop_order == order]
            for child in group:
                child.send(signal.SIGTERM)
            await asyncio.gather(*(self._await_end(child) for child in group))

    def kill(self) -> None:
        """Kills every child at once."""
        for child in self._children:
            child.send_group(signal.SIGKILL)

    async def _keep(self, child: "_Child") -> None:
        delay_s = self._first_delay_s
        while True:
            began = time.monotonic()
            await child.start()
            code = await child.wait()
            if not self._restart or (not self._started and code in _FATAL_CODES):
                # Only a process that ends by itself says why.
                why = child.last_words() if code in _FATAL_CODES else ""
                raise ChildFailed(f"{child.spec.name} {_how(code)}{why}")
            if time.monotonic() - began > _HEALTHY_AFTER_S:
                delay_s = self._first_delay_s
            self._say(f"{child.spec.name} {_how(code)}, starting it again in {delay_s:g} s")
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _LONGEST_DELAY_S)

    async def _await_end(self, child: "_Child") -> None:
        try:
            async with asyncio.timeout(self._stop_timeout_s):
                await child.wait()
        except TimeoutError:
            self._say(f"{child.spec.name} does not stop, killing it")
            child.send_group(signal.SIGKILL)
            async with asyncio.timeout(_KILL_WAIT_S):
                await child.wait()


class _Child:
    """One process of a spec at a time, with its output."""

    def __init__(self, spec: ChildSpec, prefix: str, say: Callable[[str], None]) -> None:
        self.spec = spec
        self._prefix = prefix
        self._say = say
        self._process: asyncio.subprocess.Process | None = None
        self._output: asyncio.Task[None] | None = None
        self._last: deque[str] = deque(maxlen=1)

    @property
    def pid(self) -> int:
        """The process id while it runs, else 0."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else 0

    async def start(self) -> None:
        self._last.clear()
        # A pipe of our own: asyncio's wait() for a process with its pipe waits for the pipe's end
        # too, which descendants that the process leaves behind can put off for ever.
        reading, writing = os.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.spec.argv,
                env={**self.spec.env, PARENT_PID_VARIABLE: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=writing,
                stderr=writing,
                # A group of its own: Ctrl-C in a terminal reaches the supervisor alone, which then
                # stops the children in order; and a group can be killed with its descendants.
                start_new_session=True,
            )
        except OSError as exc:
            os.close(reading)
            raise ChildFailed(f"{self.spec.name} cannot be started: {exc}") from exc
        finally:
            os.close(writing)
        self._output = asyncio.create_task(self._pass_on(reading))

    async def wait(self) -> int:
        """Waits for the end of process and output; returns the exit code, 0 if none was started."""
        if self._process is None or self._output is None:
            return 0
        code = await self._process.wait()
        # Descendants that it left behind would hold ports, memory and this pipe.
        self.send_group(signal.SIGKILL)
        await asyncio.wait([self._output], timeout=_OUTPUT_WAIT_S)
        self._output.cancel()
        return code

    def send(self, number: signal.Signals) -> None:
        if self.pid and self._process is not None:
            self._process.send_signal(number)

    def send_group(self, number: signal.Signals) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def last_words(self) -> str:
        return f": {self._last[0]}" if self._last else ""

    async def _pass_on(self, descriptor: int) -> None:
        loop, stream = asyncio.get_running_loop(), asyncio.StreamReader()
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(descriptor, "rb", 0)
        )
        try:
            rest = b""
            while chunk := await stream.read(_READ_BYTES):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    self._say_line(line)
                if len(rest) > _READ_BYTES:
                    self._say_line(rest)
                    rest = b""
            if rest:
                self._say_line(rest)
        finally:
            transport.close()

    def _say_line(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        if text:
            self._last.append(text)
        self._say(self._prefix + text)


def _how(code: int) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
