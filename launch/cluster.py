"""The processes of one machine's Twinpool and the moment they can serve.

Owns command lines, thread counts and readiness. Starting and stopping is the supervisor's.
"""

import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, Protocol, Self

import grpc
from pydantic import BaseModel, ConfigDict, Field, model_validator
from twinpool.v1.common_pb2 import ROLE_DECODE, ROLE_PREFILL
from twinpool.v1.worker_pb2 import GetStatusRequest, GetStatusResponse
from twinpool.v1.worker_pb2_grpc import MembershipStub

from launch import builtin
from launch.supervisor import ChildFailed, ChildSpec, Supervisor
from service.channels import dial
from service.config import Positional
from service.errors import PermissionDenied, Unauthenticated
from service.lifecycle import join_address, stop_signals
from service.logs import LogLevel
from service.security.settings import (
    PLAIN,
    Security,
    SecuritySettings,
    TlsCa,
    TlsCert,
    TlsKey,
    TlsRequireClientCert,
    TlsServerName,
    TokensFile,
    WorkerTokenFile,
    check_tls,
    shown_by_client,
)
from service.status import from_rpc_error
from service.threads import default_threads, thread_env

_POLL_S = 0.1
_CALL_TIMEOUT_S = 2.0
# On top of the drain: what a child needs to close connections and end its threads.
_STOP_MARGIN_S = 3.0
_NAMES = {ROLE_PREFILL: "prefill", ROLE_DECODE: "decode"}
# Decode's steps beside prompts vary less with 10 than with 5; prefill still gets a tenth.
_PREFILL_NICE = "10"


class ClusterSecurity(SecuritySettings, Protocol):
    """What a configuration of a whole cluster has."""

    @property
    def tokens_file(self) -> Path | None: ...
    @property
    def token_file(self) -> Path | None: ...


# Its fields, by name.
SECURITY_FIELDS = (
    *("tls_cert", "tls_key", "tls_ca", "tls_require_client_cert", "tls_server_name"),
    *("tokens_file", "worker_token_file", "token_file"),
)


def check_security(settings: ClusterSecurity) -> None:
    """Raises ValueError for flags of which one needs another, in one sentence."""
    check_tls(settings)
    if settings.tokens_file is None:
        return
    if settings.token_file is None:
        raise ValueError(
            "--token-file: is required where --tokens-file is given, with a token that has the"
            " right 'admin': the router is asked with it whether all is ready"
        )
    if settings.worker_token_file is None:
        raise ValueError(
            "--worker-token-file: is required where --tokens-file is given; `twinpool token new"
            " --rights worker --out FILE` makes one"
        )


class ClusterConfig(BaseModel):
    """What `twinpool serve` takes; a role's other settings come from its environment variables."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: Annotated[Path, Positional("[MODEL]")] = Field(
        default=builtin.MODEL_DIR,
        description="Folder of a Hugging Face checkpoint; the built-in model unless given.",
    )
    host: str = Field(default="127.0.0.1", description="Address that the router listens on.")
    port: int = Field(
        default=9000, ge=0, le=65535, description="Port of the router; 0 takes a free one."
    )
    colocated: bool = Field(
        default=False,
        description="Start instances that both prefill and decode, in chunks beside other tokens,"
        " instead of one for each.",
    )
    replicas: int = Field(
        default=1, ge=1, le=64, description="With --colocated, how many of them to start."
    )
    threads: int = Field(
        default_factory=default_threads,
        ge=1,
        description="Threads that compute in each instance; its part of the cores unless given.",
    )
    restart: bool = Field(default=True, description="Start a role again when it dies.")
    start_timeout_s: float = Field(
        default=600.0, gt=0, description="Seconds until a request can be served at most."
    )
    drain_timeout_s: float = Field(
        default=10.0, ge=0, description="Seconds that open requests may take at the end."
    )
    tls_cert: TlsCert = None
    tls_key: TlsKey = None
    tls_ca: TlsCa = None
    tls_require_client_cert: TlsRequireClientCert = False
    tls_server_name: TlsServerName = ""
    tokens_file: TokensFile = None
    worker_token_file: WorkerTokenFile = None
    token_file: Path | None = Field(
        default=None, description="File of a token with the right 'admin', to ask the router with."
    )
    log_level: LogLevel = Field(default="info", description="What the roles log.")

    @model_validator(mode="after")
    def _has_whole_security(self) -> Self:
        check_security(self)
        return self

    @model_validator(mode="after")
    def _has_replicas_of_what_can_have_some(self) -> Self:
        if self.replicas > 1 and not self.colocated:
            raise ValueError(
                f"--replicas: found {self.replicas} without --colocated; add that, or start more"
                " instances with `twinpool prefill` and `twinpool decode`"
            )
        return self

    @property
    def instance_threads(self) -> int:
        """Threads of each instance: the given number, or its part of the cores."""
        if self.colocated and "threads" not in self.model_fields_set:
            return default_threads(self.replicas)
        return self.threads


class Cluster:
    """A router and its instances as child processes of this one.

    `say` gets every line for the user, the children's own included.
    """

    def __init__(self, config: ClusterConfig, say: Callable[[str], None]) -> None:
        self._config = config
        self._say = say
        self._security = shown_by_client(config, config.token_file)
        port = config.port or free_port(config.host)
        self.address = join_address(_reachable(config.host), port)
        self._supervisor = Supervisor(
            child_specs(config, port),
            restart=config.restart,
            stop_timeout_s=config.drain_timeout_s + _STOP_MARGIN_S,
            say=say,
        )

    async def run(self, work: Callable[["Cluster"], Coroutine[Any, Any, None]]) -> bool:
        """Starts the roles, does `work` once a request can be served, stops the roles.

        Returns whether the work was done to its end: SIGTERM and SIGINT cut it short. Raises
        `ChildFailed` where a role fails for good, and what `work` raises.
        """
        keeper = asyncio.create_task(self._supervisor.keep())
        worker = asyncio.create_task(self._when_ready(work))
        with stop_signals(lambda: _cancel(worker), at_once=self._supervisor.kill):
            try:
                await asyncio.wait([keeper, worker], return_when=asyncio.FIRST_COMPLETED)
                for task in (keeper, worker):
                    if task.done() and not task.cancelled():
                        task.result()
                return not worker.cancelled()
            finally:
                _cancel(keeper)
                _cancel(worker)
                await asyncio.gather(keeper, worker, return_exceptions=True)
                await self._supervisor.stop()

    async def _when_ready(self, work: Callable[["Cluster"], Coroutine[Any, Any, None]]) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._config.start_timeout_s):
                status = await wait_until_ready(
                    self.address,
                    self._say,
                    self._security,
                    colocated=self._config.replicas if self._config.colocated else 0,
                )
        except TimeoutError as exc:
            raise ChildFailed(
                f"not ready after {self._config.start_timeout_s:g} s: see the lines above, or give"
                " it more time with --start-timeout-s"
            ) from exc
        self._supervisor.mark_started()
        took_s = time.monotonic() - began
        self._say(f"twinpool ready on {self.address}: {status.model.name}, after {took_s:.1f} s")
        await work(self)


def _cancel(task: "asyncio.Task[None]") -> None:
    task.cancel()


async def wait_until_ready(
    address: str, say: Callable[[str], None], security: Security = PLAIN, *, colocated: int = 0
) -> GetStatusResponse:
    """Returns the router's status once nothing is missing (see `missing_roles`).

    Raises `ChildFailed` where it refuses the token.
    """
    told = ""
    async with dial(address, security=security) as channel:
        stub = MembershipStub(channel)
        while True:
            missing, status = "the router", GetStatusResponse()
            try:
                status = await stub.GetStatus(GetStatusRequest(), timeout=_CALL_TIMEOUT_S)
                missing = missing_roles(status, colocated=colocated)
            except grpc.aio.AioRpcError as exc:
                error = from_rpc_error(exc)
                if isinstance(error, Unauthenticated | PermissionDenied):
                    raise ChildFailed(f"--token-file: the router says: {error.message}") from exc
            if not missing:
                return status
            if missing != told:
                say(f"waiting for {missing}")
                told = missing
            await asyncio.sleep(_POLL_S)


def missing_roles(status: GetStatusResponse, *, colocated: int = 0) -> str:
    """Names the roles that no instance has, in words; empty when a request can be served.

    Where instances are to be colocated, so many of them are needed.
    """
    usable = [one for one in status.instances if not (one.draining or one.connecting)]
    if colocated:
        found = sum(one.capacity.colocated for one in usable)
        return f"{colocated - found} of {colocated} colocated" if found < colocated else ""
    present = {instance.role for instance in usable}
    return " and ".join(name for role, name in _NAMES.items() if role not in present)


def child_specs(config: ClusterConfig, router_port: int) -> list[ChildSpec]:
    """Returns the command lines of the router and of the instances.

    The router is stopped first: it finishes the open requests while the others still work.
    """
    shared: tuple[str, ...] = (
        *("--drain-timeout-s", str(config.drain_timeout_s), "--log-level", config.log_level),
        *_flags(config, "tls_cert", "tls_key", "tls_ca", "tls_server_name", "worker_token_file"),
        *(("--tls-require-client-cert",) if config.tls_require_client_cert else ()),
    )
    router = (
        *("--host", config.host, "--port", str(router_port)),
        *_flags(config, "tokens_file"),
    )
    instance: tuple[str, ...] = (
        *("--router", join_address(_reachable(config.host), router_port)),
        *("--threads", str(config.instance_threads)),
    )
    if config.model == builtin.MODEL_DIR:
        instance += ("--served-model-name", "builtin")
    env = {**os.environ, **thread_env(config.instance_threads), **import_env()}
    # A prompt is a long piece of work, and running sequences would feel it with every token.
    env.setdefault("TWINPOOL_PREFILL_NICE", _PREFILL_NICE)
    specs = [_spec("router", "router", (*router, *shared), env, stop_order=0)]
    model, common = str(config.model), (*instance, *shared)
    if config.colocated:
        for name in (f"colocated-{number}" for number in range(config.replicas)):
            arguments = (model, "--name", name, "--colocated", *common)
            specs.append(_spec(name, "decode", arguments, env, stop_order=1))
        return specs
    for role in ("prefill", "decode"):
        arguments = (model, "--name", f"{role}-0", *common)
        specs.append(_spec(role, role, arguments, env, stop_order=1))
    return specs


def _flags(config: ClusterConfig, *names: str) -> tuple[str, ...]:
    """Returns some of the settings as flags, where they are given."""
    given = [(name, getattr(config, name)) for name in names if getattr(config, name)]
    return tuple(
        word for name, value in given for word in (f"--{name.replace('_', '-')}", str(value))
    )


def _spec(
    name: str, role: str, arguments: tuple[str, ...], env: dict[str, str], *, stop_order: int
) -> ChildSpec:
    # -P: a folder called "router" where the user happens to be must not be taken for ours.
    argv = (sys.executable, "-P", "-m", role, *arguments)
    return ChildSpec(name=name, argv=argv, env=env, stop_order=stop_order)


def import_env() -> dict[str, str]:
    """Returns the environment in which a child finds this project's packages."""
    root = str(Path(__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(part for part in (root, inherited) if part)
    return {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def free_port(host: str) -> int:
    """Returns a port that was free a moment ago."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
