"""Real Twinpool processes on loopback, for tests that kill, starve and restart them."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import pytest
from twinpool import Client
from twinpool.errors import TwinpoolError

from service.parent import PARENT_PID_VARIABLE
from service.threads import thread_env

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 60.0

# Below those that the kernel gives to connections, so that none of them takes a port between its
# choice here and the start of the process that it is for. In any order, for another run of tests
# may be under way; each once, for what it was chosen for listens there only later.
_PORTS = iter(random.SystemRandom().sample(range(20_000, 32_000), 12_000))


def free_port() -> int:
    """A port that nothing listens on now, and that nobody else is given later."""
    for port in _PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("all ports were given away")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Return when `condition` holds; fail with `what` when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s:g} s: {what}"
        time.sleep(0.02)


class Cluster:
    """A router, prefill instances and decode instances as processes of their own.

    Each can be killed and started again; it then keeps its name and its address. The router is
    named "router", a single decode instance "decode"; `more_flags` are by name, and so are the
    `models` of instances that serve another one. All instances are launched by `launcher` where one
    is given: a module as `hangs` and `apart`.
    """

    def __init__(
        self,
        model: Path,
        logs: Path,
        *flags: str,
        router_flags: tuple[str, ...] = (),
        prefills: tuple[str, ...] = ("prefill",),
        decodes: tuple[str, ...] = ("decode",),
        more_flags: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
        models: Mapping[str, Path] = MappingProxyType({}),
        launcher: str = "",
    ):
        self.address = f"127.0.0.1:{free_port()}"
        self._logs = logs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        router_port = self.address.rpartition(":")[2]
        self._commands = {"router": ["router", "--port", router_port, *router_flags]}
        for name in (*prefills, *decodes):
            role = "decode" if name in decodes else "prefill"
            options = ["--router", self.address, "--port", str(free_port()), "--name", name]
            options += ["--threads", "1", *flags, *more_flags.get(name, ())]
            command = [role, str(models.get(name, model)), *options]
            self._commands[name] = [launcher, *command] if launcher else command

    def __enter__(self) -> Self:
        try:
            for role in self._commands:
                self.start(role)
            self.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self, role: str) -> None:
        """Start a role's process."""
        module, *options = self._commands[role]
        with (self._logs / f"{role}.log").open("ab") as log:
            self._processes[role] = subprocess.Popen(
                [sys.executable, "-m", module, *options],
                cwd=ROOT,
                env={**os.environ, **thread_env(1), PARENT_PID_VARIABLE: str(os.getpid())},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def signal(self, role: str, number: signal.Signals) -> None:
        """Send a signal to a role's process."""
        self._processes[role].send_signal(number)

    def kill(self, role: str) -> None:
        """SIGKILL a role's process and reap it."""
        self._processes[role].kill()
        self._processes[role].wait()

    def wait_exit(self, role: str, timeout_s: float = 30.0) -> int:
        """The exit code of a role's process, once it has ended."""
        return self._processes[role].wait(timeout_s)

    def pid(self, role: str) -> int:
        """A role's process id."""
        return self._processes[role].pid

    def log(self, role: str) -> str:
        """What a role has printed so far."""
        return (self._logs / f"{role}.log").read_text()

    def client(self) -> Client:
        """A new client of the router."""
        return Client(self.address)

    def wait_ready(self) -> None:
        """Return when the router knows every instance."""
        names = self._commands.keys() - {"router"}

        def ready() -> bool:
            for role, process in self._processes.items():
                assert process.poll() is None, f"{role} ended:\n{self.log(role)}"
            try:
                with self.client() as client:
                    found = client.status().instances
                    return {i.name for i in found if not i.connecting} == names
            except TwinpoolError:
                return False

        wait_until(ready, "both pools are registered", START_TIMEOUT_S)

    def wait_idle(self, timeout_s: float = 10.0) -> None:
        """Return when every block of every pool is free and no request is left."""

        def idle() -> bool:
            with self.client() as client:
                status = client.status()
            requests = status.requests
            return requests.queued == requests.running == 0 and all(
                instance.blocks.free + instance.blocks.cached == instance.blocks.total
                and instance.ledger_reserved == 0
                for instance in status.instances
            )

        wait_until(idle, "all blocks are free", timeout_s)

    def busiest(self, *names: str) -> str:
        """Of some instances the one with most blocks reserved now: its loss is felt.

        Where requests go hangs on speeds that were measured, so none has some for sure.
        """
        with self.client() as client:
            reserved = {each.name: each.ledger_reserved for each in client.status().instances}
        name = max(names, key=lambda name: reserved[name])
        assert reserved[name], "all that was asked is answered already"
        return name

    def close(self) -> None:
        """End every process that is left."""
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self._processes.values():
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def some_slow(names: Iterable[str], *fast: str) -> list[Any]:
    """Parameters of which all but the `fast` ones are for `make soak`."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]
