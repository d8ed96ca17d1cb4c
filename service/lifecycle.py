"""Life of a gRPC process: bind, say ready, serve, drain on a signal, stop within a bound.

Owns the server, its health service and the signals; knows nothing of what the services do.
"""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from service.channels import WORKER_MESSAGE_BYTES, server_options
from service.errors import StartError
from service.parent import exit_with_supervisor
from service.security.access import AccessInterceptor
from service.security.settings import PLAIN, Security
from service.security.tls import Tls
from service.status import StatusInterceptor, leaves
from service.trace import TraceInterceptor

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Calls that are still open when the drain is over are ones that never end by themselves.
_STOP_GRACE_S = 0.5
_EXIT_GRACE_S = 5.0


class Server:
    """One grpc.aio server on one address, with health and, where wanted, reflection.

    `security` says whether its port speaks TLS and whom it lets in.

    Use: `add` the services, `await start()`, then `await serve_until_stopped()`.
    """

    def __init__(
        self,
        role: str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        max_message_bytes: int = WORKER_MESSAGE_BYTES,
        reflection: bool = False,
        security: Security = PLAIN,
    ) -> None:
        self.role = role
        self.host = host
        self.port = port
        self._reflection = reflection
        self._tls = security.tls
        access = security.access
        guards = [AccessInterceptor(access)] if access is not None else []
        self._services: list[str] = []
        self._serving = [""]
        self._health = health.aio.HealthServicer()
        self._stop_wanted = asyncio.Event()
        self._grpc = grpc.aio.server(
            interceptors=[TraceInterceptor(), StatusInterceptor(), *guards],
            options=server_options(max_message_bytes),
            compression=grpc.Compression.NoCompression,
        )

    @property
    def address(self) -> str:
        """host:port; the port is the one really bound once `start` is done."""
        return join_address(self.host, self.port)

    def add(
        self,
        add_to_server: Callable[[Any, grpc.aio.Server], None],
        servicer: object,
        service: str,
        *,
        serves_at_once: bool = True,
    ) -> None:
        """Adds a servicer with its generated `add_..._to_server`; `service` is its full name.

        Unless it `serves_at_once`, its health says so only after `set_serving`.
        """
        add_to_server(servicer, self._grpc)
        self._services.append(service)
        if serves_at_once:
            self._serving.append(service)

    async def set_serving(self, service: str, serving: bool) -> None:
        """Sets what the health service says of one service, or of the whole process ("")."""
        status = health_pb2.HealthCheckResponse.ServingStatus
        await self._health.set(service, status.SERVING if serving else status.NOT_SERVING)

    async def start(self) -> str:
        """Binds and starts to answer calls; returns the address. `StartError` if it cannot bind."""
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        if self._reflection:
            # Here, since it costs the start of every process a tenth of a second otherwise.
            from grpc_reflection.v1alpha import reflection

            names = [*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(names, self._grpc)
        _check_bindable(self.host, self.port)
        try:
            self.port = _add_port(self._grpc, self.address, self._tls)
        except RuntimeError as exc:
            raise StartError(_bind_problem(self.host, self.port, None)) from exc
        for service in ("", *self._services):
            await self.set_serving(service, service in self._serving)
        await self._grpc.start()
        return self.address

    def request_stop(self) -> None:
        """Does what a SIGTERM does: drain, then stop. For drain commands; call on the loop."""
        self._stop_wanted.set()

    async def serve_until_stopped(
        self,
        *,
        drain: Callable[[], Awaitable[None]] | None = None,
        drain_timeout_s: float = 30.0,
        background: Iterable[Coroutine[Any, Any, None]] = (),
    ) -> None:
        """Serves until SIGTERM, SIGINT or `request_stop`, drains, then stops.

        `drain` returns when no work is left; calls still reach the services meanwhile and the
        background coroutines run on. Without it, open calls are waited for. Either is cut at
        `drain_timeout_s`. A second signal ends the process at once. A background coroutine
        that raises stops the server, and the error is raised here; one may also just end.
        """
        with stop_signals(self.request_stop):
            _say(f"{self.role} ready on {self.address}")
            tasks = [asyncio.create_task(coroutine) for coroutine in background]
            try:
                await self._wait_for_stop(tasks)
                await self._drain(drain, drain_timeout_s)
            finally:
                await _cancel(tasks)
                await self._grpc.stop(_STOP_GRACE_S)

    async def stop(self) -> None:
        """Stops without a drain; for servers that `serve_until_stopped` does not run."""
        await self._health.enter_graceful_shutdown()
        await self._grpc.stop(_STOP_GRACE_S)

    async def _wait_for_stop(self, tasks: Sequence["asyncio.Future[None]"]) -> None:
        stop = asyncio.ensure_future(self._stop_wanted.wait())
        pending: set[asyncio.Future[Any]] = {stop, *tasks}
        try:
            while not stop.done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            stop.cancel()

    async def _drain(
        self, drain: Callable[[], Awaitable[None]] | None, drain_timeout_s: float
    ) -> None:
        await self._health.enter_graceful_shutdown()
        _log.info("stopping: open requests have at most %g s to finish", drain_timeout_s)
        if drain is None:
            await self._grpc.stop(drain_timeout_s)
            return
        try:
            async with asyncio.timeout(drain_timeout_s):
                await drain()
        except TimeoutError:
            _log.warning("stopping with requests open: the time to finish them is over")


def run(
    main: Callable[[], Coroutine[Any, Any, None]],
    *,
    role: str,
    expected: tuple[type[Exception], ...] = (),
) -> NoReturn:
    """Runs a process's main coroutine on uvloop, then exits: 0 when it ends, 1 when it fails.

    `StartError` and the `expected` errors are shown as one line, anything else with its trace.
    Also ends with the supervisor that started it, if one did. The last call of a process:
    threads that still run a few seconds later are cut off.
    """
    exit_with_supervisor()
    for number in _wanted_signals():
        # Nothing is in flight while it starts, and a model may be loading: no reason to wait.
        signal.signal(number, lambda number, _: os._exit(128 + number))
    try:
        uvloop.run(_bounded_exit(main))
    except Exception as exc:
        _report(role, exc, (StartError, *expected))
        sys.exit(1)
    sys.exit(0)


def _report(role: str, exc: Exception, expected: tuple[type[Exception], ...]) -> None:
    causes = leaves(exc)
    if all(isinstance(cause, expected) for cause in causes):
        for cause in causes:
            _say(f"{role}: {cause}", sys.stderr)
    else:
        _log.error("%s is stopped by a defect", role, exc_info=exc)


async def _bounded_exit(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    code = 1
    try:
        await main()
        code = 0
    finally:
        # From here on only joins of threads are left; none of them may keep the process.
        timer = threading.Timer(_EXIT_GRACE_S, os._exit, (code,))
        timer.daemon = True
        timer.start()


@contextlib.contextmanager
def stop_signals(
    request_stop: Callable[[], None], at_once: Callable[[], None] | None = None
) -> Iterator[None]:
    """Calls `request_stop` on the first SIGTERM, SIGINT or SIGHUP; a second ends the process.

    `at_once` runs before that end. For the main thread, on a running loop.
    """
    loop = asyncio.get_running_loop()
    seen = 0

    def on_signal(number: int) -> None:
        nonlocal seen
        seen += 1
        if seen == 1:
            request_stop()
            return
        if at_once is not None:
            at_once()
        os._exit(128 + number)

    numbers = _wanted_signals()
    for number in numbers:
        loop.add_signal_handler(number, on_signal, number)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def _wanted_signals() -> list[signal.Signals]:
    # Under nohup SIGHUP is ignored already, and must stay so.
    hangup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [one for one in _SIGNALS if not (one is signal.SIGHUP and hangup_ignored)]


async def _cancel(tasks: Sequence["asyncio.Future[None]"]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def join_address(host: str, port: int) -> str:
    """Returns host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _add_port(server: grpc.aio.Server, address: str, tls: Tls | None) -> int:
    if tls is None or tls.files.cert is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, tls.server_credentials())


def _check_bindable(host: str, port: int) -> None:
    """Raises `StartError` in plain words: gRPC's own error names neither cause nor remedy."""
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as exc:
        raise StartError(
            f"{host} is not an address of this machine: choose another with --host"
        ) from exc
    family, kind, protocol, _, sockaddr = infos[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(sockaddr)
        except OSError as exc:
            raise StartError(_bind_problem(host, port, exc.errno)) from exc


def _bind_problem(host: str, port: int, number: int | None) -> str:
    if number == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine: choose another with --host"
    if number == errno.EACCES:
        return f"port {port} on {host} needs more rights: choose one above 1023 with --port"
    return f"port {port} on {host} is in use: choose another with --port or stop the other process"


def _say(line: str, stream: Any = None) -> None:
    print(line, file=stream or sys.stdout, flush=True)
