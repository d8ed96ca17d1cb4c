"""One process for each way of computing, driven by JSON lines; all but one of them are stopped.

Owns the processes, and whose turn it is; knows nothing of what they compute. A side answers every
line, {"do": command, ...}, with one line, and computes nothing in between. Between its turns it is
stopped by a signal, so that no thread of its libraries spins where another is measured.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.movers.neighbours import Neighbours

# A dense prompt of 32,768 tokens takes minutes.
_ANSWER_S = 1800.0
_EXIT_S = 10.0
# What a parent or another way wants of its threads must not reach a side.
_OF_THREADS = ("OMP_", "GOMP_", "KMP_", "MKL_", "VLLM_")


class SideFailed(RuntimeError):
    """A process that computes died, fell silent, or says that it cannot."""


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with `settings`, and no others for threads."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(_OF_THREADS)}
    return inherited | dict(settings)


class Side:
    """A process that answers lines; a context manager that ends it."""

    def __init__(self, name: str, command: Sequence[str], settings: Mapping[str, str]) -> None:
        """Start `command`; raises SideFailed where it cannot be run."""
        self.name = name
        with ExitStack() as stack:
            # A pipe would fill up where nobody reads it.
            self._stderr = stack.enter_context(tempfile.TemporaryFile())
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._stderr,
                    env=environment(settings),
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
            raise SideFailed(self._last_words("is gone")) from exc

    def hear(self) -> dict[str, Any]:
        """Wait for the answer; raises SideFailed for an error, silence or the process's end."""
        if not select.select([self._stdout], [], [], _ANSWER_S)[0]:
            raise SideFailed(self._last_words(f"gave no answer for {_ANSWER_S:.0f} s"))
        line = self._stdout.readline()
        if not line:
            raise SideFailed(self._last_words("is gone"))
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


def serve(commands: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer lines until there are no more, then end this process at once."""
    # Libraries print to standard output; only answers may be read there.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = commands[arguments.pop("do")](**arguments)
        except Exception as exc:
            answer = {"error": f"{type(exc).__name__}: {exc}"}
        print(json.dumps(answer), file=answers, flush=True)
    # Without the orderly end, in which ranks would wait for each other.
    os._exit(0)
