"""One process for each way of doing something, driven by JSON lines, see `answers`.

Owns the processes, and whose turn it is; knows nothing of what they do. Sides that take turns by
`ask` are stopped by a signal in between, so that no thread of their libraries spins where another
one is measured.
"""

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.movers.neighbours import Neighbours

# A dense prompt of 32,768 tokens takes minutes.
_ANSWER_S = 1800.0
_EXIT_S = 10.0
# What a parent or another way wants of its threads must not reach a side.
OF_THREADS = ("OMP_", "GOMP_", "KMP_", "MKL_", "VLLM_")


class SideFailed(RuntimeError):
    """A process died, fell silent, or says that it cannot, or that something is wrong."""


def environment(settings: Mapping[str, str], apart_from: tuple[str, ...]) -> dict[str, str]:
    """Return this process's environment with `settings`, and no others that begin like those."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(apart_from)}
    return inherited | dict(settings)


class Side:
    """A process that answers lines; a context manager that ends it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        settings: Mapping[str, str],
        *,
        apart_from: tuple[str, ...] = OF_THREADS,
        answer_s: float = _ANSWER_S,
    ) -> None:
        """Start `command` with `environment(settings, apart_from)` and this thread's cores.

        It has `answer_s` for each answer. Raises SideFailed where it cannot be run.
        """
        self.name = name
        self._answer_s = answer_s
        with ExitStack() as stack:
            # A pipe would fill up where nobody reads it.
            self._stderr = stack.enter_context(tempfile.TemporaryFile())
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._stderr,
                    env=environment(settings, apart_from),
                    # Signals reach its children too. Of the same session, so that the kernel wakes
                    # and ends a stopped group that this process leaves behind.
                    process_group=0,
                )
            except OSError as exc:
                raise SideFailed(f"{name}: {command[0]} cannot be run: {exc}") from exc
            self._stack = stack.pop_all()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin = self._process.stdin
        self._stdout = self._stack.enter_context(self._process.stdout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Let the side have its turn; raises SideFailed where nothing good comes of it."""
        self.tell(do, **arguments)
        answer = self.hear()
        self.rest()
        return answer

    def tell(self, do: str, **arguments: Any) -> None:
        """Wake the side with one command; raises SideFailed where the process is gone."""
        self._signal(signal.SIGCONT)
        try:
            self._stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError as exc:
            raise SideFailed(self._epitaph()) from exc

    def hear(self) -> dict[str, Any]:
        """Wait for the answer; raises SideFailed for an error, silence or the process's end."""
        if not select.select([self._stdout], [], [], self._answer_s)[0]:
            raise SideFailed(self._last_words(f"gave no answer for {self._answer_s:.0f} s"))
        line = self._stdout.readline()
        if not line:
            raise SideFailed(self._epitaph())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SideFailed(f"{self.name}: {answer['error']}")
        return answer

    def rest(self) -> None:
        """Stop the process until it is told something."""
        self._signal(signal.SIGSTOP)

    def forget_peak(self) -> None:
        """Let `peak_bytes` count from what is resident now."""
        for process in self._group():
            with suppress(OSError):
                (process / "clear_refs").write_text("5")

    def peak_bytes(self) -> int:
        """Return the most memory that was ever resident in the process and its children."""
        return sum(high_water_bytes(process / "status") for process in self._group())

    def cpu_s(self) -> float:
        """Return the processor time of the process and its children that are there."""
        return sum(used_cpu_s(process / "stat") for process in self._group())

    def open(self, **arguments: Any) -> Self:
        """Ask the side to `open` and take its name from the `version` it answers with.

        Ends the process and raises SideFailed where it cannot.
        """
        try:
            self.name = self.ask("open", **arguments)["version"]
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Let the process end by itself, and kill it where it does not."""
        self._signal(signal.SIGCONT)
        with suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._stack.close()

    def _signal(self, number: signal.Signals) -> None:
        # Not to a group that may be another's by now.
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _group(self) -> list[Path]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.getpgid(int(folder.name)) == self._process.pid:
                    found.append(folder)
        return found

    def _epitaph(self) -> str:
        # Its pipes close before it has said why it ends.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_S)
        return self._last_words("is gone")

    def _last_words(self, what: str) -> str:
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip()
        return f"{self.name} {what}; it said: {said[-2000:] or 'nothing'}"


def high_water_bytes(status: Path) -> int:
    """Return the peak resident memory that a /proc/PID/status tells of; 0 where it is gone."""
    with suppress(OSError):
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def used_cpu_s(stat: Path) -> float:
    """Return the processor time that a /proc/PID/stat tells of; 0 where it is gone."""
    with suppress(OSError):
        # The name, in brackets, may hold anything.
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


class Bystanders:
    """How many cores others took than this process and `sides`; starts counting when made."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self._sides = sides
        self._neighbours = Neighbours()
        self._began_s, self._used_s = time.monotonic(), self._of_sides_s()

    def __str__(self) -> str:
        used_s = self._of_sides_s() - self._used_s
        own = used_s / (time.monotonic() - self._began_s)
        return f"others took {max(0.0, self._neighbours.cores() - own):.2f} cores meanwhile"

    def _of_sides_s(self) -> float:
        return sum(side.cpu_s() for side in self._sides)
