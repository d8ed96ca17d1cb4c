"""The security settings that all roles share, and what a process makes of them.

Owns their names and the rules between them. Configurations name the fields one by one.
"""

import ipaddress
import logging
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol, TypeAlias

from pydantic import Field

from service.security.access import Access
from service.security.tls import Tls, TlsFiles
from service.security.tokens import TokenFile, WorkerToken

_log = logging.getLogger(__name__)

TlsCert: TypeAlias = Annotated[
    Path | None,
    Field(description="PEM file of this process's certificate, and chain; TLS on its port."),
]
TlsKey: TypeAlias = Annotated[
    Path | None, Field(description="PEM file of the certificate's key, without a password.")
]
TlsCa: TypeAlias = Annotated[
    Path | None,
    Field(description="PEM file of the CA whose certificates other processes must show."),
]
TlsRequireClientCert: TypeAlias = Annotated[
    bool, Field(description="Take only callers that show a certificate of --tls-ca (mTLS).")
]
TlsServerName: TypeAlias = Annotated[
    str,
    Field(description="Name that others' certificates must have where it is not their address."),
]
TokensFile: TypeAlias = Annotated[
    Path | None,
    Field(description="YAML or JSON file of hashed tokens; calls without one are refused."),
]
WorkerTokenFile: TypeAlias = Annotated[
    Path | None,
    Field(description="File of the token that routers and instances show each other."),
]


class TlsSettings(Protocol):
    """What any configuration with TLS has."""

    @property
    def tls_cert(self) -> Path | None: ...
    @property
    def tls_key(self) -> Path | None: ...
    @property
    def tls_ca(self) -> Path | None: ...
    @property
    def tls_require_client_cert(self) -> bool: ...
    @property
    def tls_server_name(self) -> str: ...


class SecuritySettings(TlsSettings, Protocol):
    """What the configuration of a role has."""

    @property
    def worker_token_file(self) -> Path | None: ...


def check_tls(settings: TlsSettings) -> None:
    """Raises ValueError for flags of which one needs another, in one sentence."""
    cert, key = settings.tls_cert, settings.tls_key
    if (cert is None) != (key is None):
        given, missing = ("--tls-cert", "--tls-key") if key is None else ("--tls-key", "--tls-cert")
        raise ValueError(f"{missing}: is required where {given} is given")
    if cert is None and settings.tls_ca is not None:
        raise ValueError(
            "--tls-cert: is required where --tls-ca is given: others then call this port with TLS"
        )
    if settings.tls_require_client_cert and settings.tls_ca is None:
        raise ValueError("--tls-ca: is required where --tls-require-client-cert is given")
    if settings.tls_server_name and cert is None:
        raise ValueError("--tls-cert: is required where --tls-server-name is given")


@dataclass(frozen=True, kw_only=True)
class Security:
    """How a process's ports are guarded, and how it shows itself to others.

    `tls` is for both ways. `shows` is the token that it shows, `access` what it asks of callers.
    """

    tls: Tls | None = None
    shows: WorkerToken | None = None
    access: Access | None = None

    def warn_if_exposed(self, role: str, host: str) -> None:
        """Logs one warning where others can reach a port that asks for too little."""
        what = self._exposure()
        if what and not is_loopback(host):
            _log.warning(
                "the %s listens on %s, where others may reach it, and %s", role, host, what
            )

    def _exposure(self) -> str:
        asks_for_certificate = self.tls is not None and self.tls.require_client_cert
        if self.access is None and not asks_for_certificate:
            return (
                "asks no caller for a token or a certificate: set --worker-token-file and, at the"
                " router, --tokens-file, or --tls-require-client-cert"
            )
        if self.access is not None and not self.access.is_complete and not asks_for_certificate:
            return "lets everybody ask for answers and drain instances: set --tokens-file"
        if self.access is not None and self.tls is None:
            return "has no TLS: tokens and prompts can be read on the way; set --tls-cert"
        return ""


PLAIN = Security()


def tls_of(settings: TlsSettings) -> Tls | None:
    """Returns a process's TLS, None where it has none; raises StartError for unusable files."""
    files = TlsFiles(cert=settings.tls_cert, key=settings.tls_key, ca=settings.tls_ca)
    if not files.paths:
        return None
    return Tls(
        files,
        require_client_cert=settings.tls_require_client_cert,
        server_name=settings.tls_server_name,
    )


def instance_security(settings: SecuritySettings) -> Security:
    """Reads what an instance's flags name; raises StartError for unusable files."""
    file = settings.worker_token_file
    worker = WorkerToken(file) if file is not None else None
    access = Access(worker=worker) if worker is not None else None
    return Security(tls=tls_of(settings), shows=worker, access=access)


def router_security(settings: SecuritySettings, tokens_file: Path | None) -> Security:
    """Reads what a router's flags name; raises StartError for unusable files."""
    file = settings.worker_token_file
    worker = WorkerToken(file) if file is not None else None
    tokens = TokenFile(tokens_file) if tokens_file is not None else None
    guarded = worker is not None or tokens is not None
    access = Access(tokens=tokens, worker=worker, is_router=True) if guarded else None
    return Security(tls=tls_of(settings), shows=worker, access=access)


def shown_by_client(settings: TlsSettings, token_file: Path | None) -> Security:
    """Reads what a process that only asks a router shows; raises StartError for unusable files."""
    token = WorkerToken(token_file, "--token-file") if token_file is not None else None
    return Security(tls=tls_of(settings), shows=token)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a port on an address, as far as is known."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(info[4][0])).is_loopback for info in found)
