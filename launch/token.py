"""`twinpool token new`: makes a token and the line that a router's tokens file knows it by."""

import os
import secrets
from pathlib import Path
from typing import Annotated, NoReturn

import typer
import yaml
from pydantic import ValidationError

from service.security.rights import Right
from service.security.tokens import TokenEntry, hash_of, new_token

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Make tokens for clients and workers.",
)


@app.callback()
def _root() -> None:
    """A group, so that more can be done with tokens than to make them."""


@app.command()
def new(
    tenant: Annotated[str, typer.Option(help="Whose requests are made with it.")] = "",
    rights: Annotated[
        list[Right] | None, typer.Option(help="What it is good for; may be repeated.")
    ] = None,
    name: Annotated[
        str, typer.Option(help="What the file calls it; from the tenant unless given.")
    ] = "",
    max_priority: Annotated[
        int | None, typer.Option(help="Requests with a higher priority are lowered to this.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens that a request may generate at most.")
    ] = None,
    max_concurrent_requests: Annotated[
        int | None, typer.Option(help="Requests that may be open at once.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="New file for the token, which only this user may read; else printed."),
    ] = None,
) -> None:
    """Make a token of 256 random bits and print it, once, and its line for the tokens file."""
    token = new_token()
    tenant = tenant or "cluster"
    try:
        entry = TokenEntry(
            name=name or f"{tenant[:100]}-{secrets.token_hex(4)}",
            tenant=tenant,
            rights=tuple(rights or (Right.INFERENCE,)),
            sha256=hash_of(token),
            max_priority=max_priority,
            max_new_tokens=max_new_tokens,
            max_concurrent_requests=max_concurrent_requests,
        )
    except ValidationError as exc:
        error = exc.errors(include_url=False)[0]
        flag = str(error["loc"][0]).replace("_", "-")
        _fail(f"--{flag}: {error['msg']}")
    if out is not None:
        _write_secret(out, token)
        typer.echo(f"the token is in {out}; the line for the router's --tokens-file:")
    else:
        typer.echo(f"the token, which is not shown again:\n{token}")
        typer.echo("the line for the router's --tokens-file, below 'tokens:':")
    typer.echo(_line(entry), nl=False)


def _line(entry: TokenEntry) -> str:
    values = entry.model_dump(mode="json", exclude_none=True)
    dumped = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=float("inf"))
    return f"- {dumped}"


def _write_secret(path: Path, token: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as exc:
        _fail(f"--out: cannot make {path}: {exc.strerror}")
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{token}\n")


def _fail(message: str) -> NoReturn:
    typer.echo(f"twinpool: {message}", err=True)
    raise typer.Exit(2)
