"""The processes of one system: started together, ended together, with a log each.

Owns the processes and what they have said; knows nothing of what they serve.
"""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from bench.sides import servers
from bench.sides.process import OF_THREADS, environment

_END_S = 60.0
_LAST_LINES = 12


@dataclass(frozen=True, kw_only=True)
class Program:
    """One process: what it runs, and the cores that it may use."""

    name: str
    command: Sequence[str]
    settings: Mapping[str, str]
    cores: tuple[int, ...]


@contextmanager
def running(
    programs: Sequence[Program], is_ready: Callable[[], bool], logs: Path
) -> Iterator[None]:
    """Run programs from when they are ready until the block ends; their logs go to a folder.

    Raises RuntimeError, with the last lines of the log, where one ends by itself, or where they
    are not ready in time.
    """
    logs.mkdir(parents=True, exist_ok=True)
    started: dict[str, Popen[bytes]] = {}
    is_up = False
    with ExitStack() as stack:
        try:
            for program in programs:
                started[program.name] = stack.enter_context(_started(program, logs))
            servers.wait_until(is_ready, list(started.values()))
            is_up = True
            yield
        except Exception as exc:
            ended = [name for name, each in started.items() if each.poll() is not None]
            if ended or not is_up:
                said = "\n".join(_last_words(logs, name) for name in ended or started)
                raise RuntimeError(f"{exc}\n{said}") from exc
            raise


def log_of(logs: Path, name: str) -> Path:
    """Return where the log of a program is."""
    return logs / f"{name}.log"


@contextmanager
def _started(program: Program, logs: Path) -> Iterator["Popen[bytes]"]:
    environ = environment(program.settings, (*OF_THREADS, "TWINPOOL_"))
    with log_of(logs, program.name).open("wb") as log:
        server = servers.spawn(
            program.command, signal.SIGTERM, environ, cores=program.cores, says_to=log
        )
    try:
        yield server
    finally:
        servers.end(server, _END_S)


def _last_words(logs: Path, name: str) -> str:
    path = log_of(logs, name)
    lines = path.read_text(errors="replace").splitlines()[-_LAST_LINES:]
    return "\n".join((f"the last lines of {path}:", *(f"  {line}" for line in lines)))
