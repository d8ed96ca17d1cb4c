"""How commands connect to a router: the options for TLS and token that they share."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from twinpool import Client, Tls

from service.security.settings import TlsSettings

UseTls: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--tls",
        envvar="TWINPOOL_TLS",
        help="Use TLS, and believe public CAs unless --tls-ca is given, which implies it.",
    ),
]
TlsCa: TypeAlias = Annotated[
    Path | None,
    typer.Option(envvar="TWINPOOL_TLS_CA", help="PEM file of the CA of the router's certificate."),
]
TlsCert: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        envvar="TWINPOOL_TLS_CERT", help="PEM file of a certificate to show, where one is wanted."
    ),
]
TlsKey: TypeAlias = Annotated[
    Path | None, typer.Option(envvar="TWINPOOL_TLS_KEY", help="PEM file of that one's key.")
]
TlsServerName: TypeAlias = Annotated[
    str,
    typer.Option(
        envvar="TWINPOOL_TLS_SERVER_NAME",
        help="Name in the router's certificate, where it is not the address.",
    ),
]
TokenFile: TypeAlias = Annotated[
    Path | None, typer.Option(envvar="TWINPOOL_TOKEN_FILE", help="File of the token to show.")
]


def client_tls(settings: TlsSettings) -> Tls | bool:
    """Returns what a client's `tls=` is for the settings of a cluster."""
    if settings.tls_cert is None:
        return False
    return Tls(
        ca=settings.tls_ca,
        cert=settings.tls_cert,
        key=settings.tls_key,
        server_name=settings.tls_server_name,
    )


def connect(
    router: str,
    *,
    use_tls: bool,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    server_name: str,
    token_file: Path | None,
) -> Client:
    """Returns a client; raises ValueError for files that cannot be used and for half a pair."""
    wants_tls = use_tls or any((ca, cert, key, server_name))
    tls = Tls(ca=ca, cert=cert, key=key, server_name=server_name) if wants_tls else False
    return Client(router, tls=tls, token_file=token_file)
