"""What a client shows and whom it believes: token, certificate, CA. Knows no call."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import grpc

FilePath: TypeAlias = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class Tls:
    """How a connection is made TLS, by PEM files.

    `ca` is whose certificates are believed; without it those of gRPC's own list of public CAs.
    `cert` and `key` are what the client shows where the server asks for it (mTLS). `server_name`
    is the name in the server's certificate where it is not the address.
    """

    ca: FilePath | None = None
    cert: FilePath | None = None
    key: FilePath | None = None
    server_name: str = ""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("Tls: cert and key go together: give both or none")

    def credentials(self) -> grpc.ChannelCredentials:
        """Return gRPC's credentials; raises ValueError for a file that cannot be read."""
        return grpc.ssl_channel_credentials(
            _content("ca", self.ca), _content("key", self.key), _content("cert", self.cert)
        )

    def options(self) -> list[tuple[str, str]]:
        """Return the channel options that go with the credentials."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []


TlsChoice: TypeAlias = Tls | FilePath | bool
"""True for public CAs, a path for a CA's PEM file, a `Tls` for more; False is no TLS."""


def tls_of(choice: TlsChoice) -> Tls | None:
    """Return what a client's `tls=` means; None is no TLS. Raises TypeError for another type."""
    if isinstance(choice, Tls):
        return choice
    if isinstance(choice, bool):
        return Tls() if choice else None
    if isinstance(choice, str | os.PathLike):
        return Tls(ca=choice)
    raise TypeError(f"tls has type {type(choice).__name__}; give True, a CA's PEM file or a Tls")


def _content(name: str, path: FilePath | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        raise ValueError(f"Tls: cannot read {name} {path}: {exc.strerror}") from exc


class Bearer:
    """The token that calls show: a given one, or that of a file, which may change meanwhile.

    Raises ValueError for both at once, for a file that cannot be read, and for what is no token.
    """

    def __init__(self, token: str | None, token_file: FilePath | None) -> None:
        if token is not None and token_file is not None:
            raise ValueError("token and token_file: give one of them")
        self._path = Path(token_file) if token_file is not None else None
        self._seen: tuple[int, int] | None = None
        self._token = _checked(token, "token") if token is not None else None
        if self._path is not None:
            self._read(self._path)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata that every call carries."""
        if self._path is not None and self._seen != _changed_at(self._path):
            self._read(self._path)
        return (("authorization", f"Bearer {self._token}"),) if self._token is not None else ()

    def _read(self, path: Path) -> None:
        seen = _changed_at(path)
        try:
            words = path.read_text(encoding="ascii", errors="replace").split()
            token = _checked(words[0] if words else "", f"token_file {path}")
        except (OSError, ValueError) as exc:
            if self._token is None:
                reason = exc.strerror if isinstance(exc, OSError) else str(exc)
                raise ValueError(f"cannot use token_file {path}: {reason}") from exc
            return  # it is being written: what was there before is shown a moment longer
        self._seen, self._token = seen, token


def _changed_at(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino


def _checked(token: object, what: str) -> str:
    """Return a token that a call can carry; the error does not quote it."""
    if not isinstance(token, str):
        raise TypeError(f"{what} has type {type(token).__name__}; give text")
    if not token or not all("!" <= char <= "~" for char in token):
        raise ValueError(f"{what} is empty or has characters that no token has")
    return token
