"""`twinpool generate`: one prompt, its answer on stdout as it comes."""

import dataclasses
import json
import os
import sys
from typing import Annotated

import typer
from twinpool import Chunk, Client, GenerateOptions, Message, Prompt, Stream, TwinpoolError

from launch.connection import TlsCa, TlsCert, TlsKey, TlsServerName, TokenFile, UseTls, connect

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    router: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Router to ask.")
    ] = "127.0.0.1:9000",
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens to generate at most; the router's default if unset.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Name of the model; needed only where the router serves several.")
    ] = "",
    temperature: Annotated[float | None, typer.Option(help="0 is greedy, the default.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Smallest set of this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Only the k most likely tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Use the model's chat template, or send the text as it is. Chat where the model"
            " has a template, if unset.",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message; implies --chat.")] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds the whole answer may take.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with answer, usage and stats.")
    ] = False,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_server_name: TlsServerName = "",
    token_file: TokenFile = None,
) -> None:
    """Send a prompt to a router and print the answer as it comes."""
    if system is not None and chat is False:
        _fail("--system needs a chat: leave out --raw", code=2)
    options = GenerateOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop or None,
        model=model,
        timeout_s=timeout,
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    try:
        with connect(
            router,
            use_tls=tls,
            ca=tls_ca,
            cert=tls_cert,
            key=tls_key,
            server_name=tls_server_name,
            token_file=token_file,
        ) as client:
            use_chat = (
                chat if chat is not None else system is not None or _has_template(client, model)
            )
            stream = client.generate(_prompt(text, system) if use_chat else text, **options)
            if as_json:
                print(_as_json(list(stream)), flush=True)
            else:
                _print_text(stream)
    except TwinpoolError as exc:
        _fail(exc.message)
    except (TypeError, ValueError) as exc:
        _fail(str(exc))
    except BrokenPipeError:
        # The reader has left, as `head` does; Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _print_text(stream: Stream) -> None:
    try:
        for chunk in stream:
            print(chunk.text, end="", flush=True)
    finally:
        # Also when it fails in between: what is printed next must start a line.
        print(flush=True)


def _has_template(client: Client, model: str) -> bool:
    return client.describe(model=model).has_chat_template


def _prompt(text: str, system: str | None) -> Prompt:
    user = Message(role="user", content=text)
    return [user] if system is None else [Message(role="system", content=system), user]


def _as_json(chunks: list[Chunk]) -> str:
    last = chunks[-1]
    answer = {
        "request_id": last.request_id,
        "text": "".join(chunk.text for chunk in chunks),
        "token_ids": [token for chunk in chunks for token in chunk.token_ids],
        "finish_reason": last.finish_reason,
        "usage": dataclasses.asdict(last.usage) if last.usage else None,
        "stats": dataclasses.asdict(last.stats) if last.stats else None,
    }
    return json.dumps(answer, ensure_ascii=False)


def _fail(message: str, code: int = 1) -> None:
    typer.echo(f"twinpool: {message}", err=True)
    raise typer.Exit(code)
