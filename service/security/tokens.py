"""Tokens: how they are made, and whose they are.

Owns the file of hashed tokens and the workers' shared secret. A token is 256 random bits, so its
plain SHA-256 can be stored: nobody can try that many, and a slow hash, which passwords need, would
only slow down each call.
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from service.errors import StartError
from service.security.files import Reloaded, read_file
from service.security.rights import Right

PREFIX = "twp_"
_RANDOM_BYTES = 32
# As in Generate's own field, which a token's tenant takes the place of.
_MAX_NAME_CHARS = 128
# Files are read on the event loop: PyYAML's own loader takes ten times as long as the one in C.
_YAML: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# What HTTP/2 metadata can carry and nobody mistakes for a part of something else.
_TOKEN = re.compile(r"[!-~]{16,1024}")


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who calls, by the token that was shown; None stands for "no limit of its own"."""

    name: str
    tenant: str
    rights: frozenset[Right]
    max_priority: int | None = None
    max_new_tokens: int | None = None
    max_concurrent_requests: int | None = None


def new_token() -> str:
    """Returns a new secret of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)


def hash_of(token: str) -> str:
    """Returns what stands for a token in files: its SHA-256 in hex digits."""
    return hashlib.sha256(token.encode()).hexdigest()


# ---- tenants' tokens

_Name = Annotated[str, StringConstraints(min_length=1, max_length=_MAX_NAME_CHARS)]


class TokenEntry(BaseModel):
    """One token as the file has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: _Name
    tenant: _Name
    rights: Annotated[tuple[Right, ...], Field(min_length=1)]
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
    max_priority: int | None = None
    max_new_tokens: int | None = Field(default=None, ge=1)
    max_concurrent_requests: int | None = Field(default=None, ge=1)

    def caller(self) -> Caller:
        """Returns who shows this token."""
        return Caller(
            name=self.name,
            tenant=self.tenant,
            rights=frozenset(self.rights),
            max_priority=self.max_priority,
            max_new_tokens=self.max_new_tokens,
            max_concurrent_requests=self.max_concurrent_requests,
        )


class _Content(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: tuple[TokenEntry, ...]


class TokenFile:
    """The tokens of a file, as it is now. Raises StartError where it cannot be used at first."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._callers = Reloaded([path], lambda: read_tokens(path), clock=clock)

    def find(self, token: str) -> Caller | None:
        """Returns whose token it is; None for one that is not in the file.

        A lookup by hash may take longer for some hashes than for others, which says nothing of the
        tokens: nobody can choose a token by the hash that it will have.
        """
        return self._callers.get().get(hash_of(token))


def read_tokens(path: Path) -> Mapping[str, Caller]:
    """Returns the callers by the hash of their token; `StartError` says what is wrong, and where.

    Nothing of the file's content is quoted: somebody may have written a token instead of its hash.
    """
    try:
        content = _Content.model_validate(yaml.load(read_file(path, "--tokens-file"), _YAML))
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise StartError(f"--tokens-file: {path} is neither YAML nor JSON{where}") from exc
    except ValidationError as exc:
        # Not chained: pydantic's own message quotes what it found.
        raise StartError(f"--tokens-file: {path}: {_problem(exc)}") from None
    hashes = [entry.sha256 for entry in content.tokens]
    names = [entry.name for entry in content.tokens]
    if len(set(hashes)) < len(hashes) or len(set(names)) < len(names):
        raise StartError(f"--tokens-file: {path}: two tokens have the same name or the same sha256")
    return {entry.sha256: entry.caller() for entry in content.tokens}


def _problem(exc: ValidationError) -> str:
    error = exc.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in error["loc"]) or "the file"
    return f"{where}: {error['msg']}; `twinpool token new` prints a line as it should be"


# ---- the workers' token


class WorkerToken:
    """The secret that routers and instances of one cluster share, as its file has it now.

    One token a line: the first is shown to others, all are accepted, so that a new one can be
    brought in process by process. Raises StartError where the file cannot be used at first.
    """

    def __init__(
        self,
        path: Path,
        flag: str = "--worker-token-file",
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tokens = Reloaded([path], lambda: read_token_lines(path, flag), clock=clock)

    def shown(self) -> str:
        """Returns the token to show to others."""
        return self._tokens.get()[0]

    def accepts(self, token: str) -> bool:
        """Whether it is one of these; takes as long for any token."""
        found = hash_of(token)
        same = [hmac.compare_digest(hash_of(ours), found) for ours in self._tokens.get()]
        return any(same)

    def sign(self, content: bytes) -> bytes:
        """Returns what only who knows the token can say of some content."""
        return _signature(self.shown(), content)

    def has_signed(self, content: bytes, signature: bytes) -> bool:
        """Whether one of these has signed the content; takes as long for any signature."""
        same = [
            hmac.compare_digest(_signature(ours, content), signature) for ours in self._tokens.get()
        ]
        return any(same)


def _signature(token: str, content: bytes) -> bytes:
    return hmac.digest(token.encode(), content, "sha256")


def read_token_lines(path: Path, flag: str) -> tuple[str, ...]:
    """Returns a file's tokens, at least one; `StartError` names the flag, never the content."""
    try:
        lines = read_file(path, flag).decode("ascii").split()
    except UnicodeDecodeError:
        lines = [""]
    if not lines or not all(_TOKEN.fullmatch(line) for line in lines):
        raise StartError(
            f"{flag}: {path} must hold one token a line, of 16 to 1024 plain characters;"
            " `twinpool token new` makes one"
        )
    return tuple(lines)
