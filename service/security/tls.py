"""TLS of one process: its own certificate, and whose certificates it believes.

Owns reading and checking the files, and gRPC's credentials made of them. Servers show a changed
certificate from the next handshake on; channels are `service.security.channel`'s.
"""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from service.errors import StartError
from service.security.files import Reloaded, read_file


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """Where the PEM files are, as the flags name them; `key` is there where `cert` is."""

    cert: Path | None = None
    key: Path | None = None
    ca: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """Those that are given."""
        return tuple(path for path in (self.cert, self.key, self.ca) if path is not None)


@dataclass(frozen=True, kw_only=True)
class Pems:
    """The files' content; None where no file is given."""

    cert: bytes | None
    key: bytes | None
    ca: bytes | None


class Tls:
    """Makes credentials of files that may change. Raises StartError for files that do not do.

    `require_client_cert`: servers take only clients that show a certificate of the CA.
    `server_name`: the name that servers' certificates must have where it is not their address.
    """

    def __init__(
        self, files: TlsFiles, *, require_client_cert: bool = False, server_name: str = ""
    ) -> None:
        self.files = files
        self.require_client_cert = require_client_cert
        self.server_name = server_name
        self._pems = Reloaded(files.paths, lambda: read_pems(files))

    def current(self) -> tuple[Pems, int]:
        """Returns the files' content and a number that changes with it."""
        return self._pems.get_with_version()

    def server_credentials(self) -> grpc.ServerCredentials:
        """Returns a port's credentials, which follow the files; needs a certificate."""
        assert self.files.cert is not None, "a server without a certificate"
        pems, shown = self.current()

        # Called at each handshake, on a thread of gRPC's: an error here would have no reader.
        # None is for no change, which grpc's stubs do not know.
        def fetch() -> Any:
            nonlocal shown
            pems, version = self.current()
            if version == shown:
                return None
            shown = version
            return self._certificates(pems)

        return grpc.dynamic_ssl_server_credentials(
            self._certificates(pems), fetch, require_client_authentication=self.require_client_cert
        )

    def _certificates(self, pems: Pems) -> grpc.ServerCertificateConfiguration:
        assert pems.key is not None
        assert pems.cert is not None
        # Without the CA gRPC asks clients for nothing: a certificate that is not needed but is
        # wrong would end the handshake of somebody who has a token.
        roots = pems.ca if self.require_client_cert else None
        return grpc.ssl_server_certificate_configuration(
            [(pems.key, pems.cert)], root_certificates=roots
        )


def channel_credentials(pems: Pems) -> grpc.ChannelCredentials:
    """Returns what a channel needs; without a CA gRPC's own list of public ones is believed."""
    return grpc.ssl_channel_credentials(pems.ca, pems.key, pems.cert)


def read_pems(files: TlsFiles) -> Pems:
    """Reads and checks the files; `StartError` names the flag and what is wrong."""
    pems = Pems(
        cert=read_file(files.cert, "--tls-cert") if files.cert else None,
        key=read_file(files.key, "--tls-key") if files.key else None,
        ca=read_file(files.ca, "--tls-ca") if files.ca else None,
    )
    if files.cert is not None and files.key is not None:
        _check_pair(files.cert, files.key)
    if pems.ca is not None:
        _check_ca(pems.ca, files.ca)
    return pems


def _check_pair(cert: Path, key: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # With an empty password, else OpenSSL would ask for one on the terminal.
        context.load_cert_chain(cert, key, password="")
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise StartError(
                f"--tls-key: {key} is not the key of the certificate in {cert}; give both of one"
                " pair"
            ) from exc
        raise StartError(
            f"--tls-cert, --tls-key: {cert} and {key} are no usable pair"
            f" ({exc.reason or 'unknown'}); give PEM files, the key without a password"
        ) from exc
    except OSError as exc:
        raise StartError(
            f"--tls-cert, --tls-key: cannot read {exc.filename or cert}: {exc.strerror}"
        ) from exc


def _check_ca(pem: bytes, path: Path | None) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, ValueError) as exc:
        raise StartError(
            f"--tls-ca: {path} holds no certificate; give the PEM file of the CA that signs them"
        ) from exc
