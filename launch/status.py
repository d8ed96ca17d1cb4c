"""`twinpool status`: what a router knows of its pools, as a table or as JSON."""

import dataclasses
import json
import time
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text
from twinpool import Client, InstanceStatus, RequestCounts, Status, TwinpoolError

from launch.connection import TlsCa, TlsCert, TlsKey, TlsServerName, TokenFile, UseTls, connect
from launch.console import table_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_STALE_AFTER_S = 2.0


@app.command()
def status(
    router: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Router to ask.")
    ] = "127.0.0.1:9000",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Ask again and again.")] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, help="Seconds between questions with --watch.")
    ] = 1.0,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_server_name: TlsServerName = "",
    token_file: TokenFile = None,
) -> None:
    """Show the pools of a router: instances, KV blocks, requests."""
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
            if watch:
                _watch(client, as_json, interval)
            elif as_json:
                print(_as_json(client.status()))
            else:
                table_console().print(render(client.status()))
    except TwinpoolError as exc:
        typer.echo(f"twinpool: {exc.message}", err=True)
        raise typer.Exit(1) from None
    except ValueError as exc:
        typer.echo(f"twinpool: {exc}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def render(status: Status) -> RenderableType:
    """Returns the status as lines and a table, one row for each instance."""
    head = Text()
    head.append(f"router {status.router_id}, {status.version}, up {status.uptime_s:.0f} s\n")
    for model in status.models:
        head.append(
            f"model {model.name} ({model.architecture}, {model.dtype}, {model.max_model_len}"
            " tokens)\n"
        )
        if len(status.models) > 1:
            head.append(f"  {_counts(model.requests)}\n")
        if not model.ready:
            head.append("  not ready: instances of both roles are needed\n", style="red")
    if not status.models:
        head.append("no model: no instance has registered\n")
    for missing in status.missing:
        head.append(f"missing: {missing.role} instance at {missing.address}\n", style="red")
    head.append(_counts(status.requests))
    if status.requests.overcommitted:
        head.append(_overcommit(status))
    has_models = len(status.models) > 1
    parts: list[RenderableType] = [head, _instances(status.instances, has_models)]
    if any(instance.pairs for instance in status.instances):
        parts.append(_pairs(status.instances))
    return Group(*parts)


def _counts(requests: RequestCounts) -> str:
    return (
        f"requests: {requests.running} running, {requests.queued} queued; {requests.finished}"
        f" finished, {requests.refused} refused, {requests.aborted} aborted,"
        f" {requests.failed} failed, {requests.retried} retried"
    )


def _overcommit(status: Status) -> str:
    requests = status.requests
    risk = max((instance.overcommit_risk for instance in status.instances), default=0.0)
    return (
        f"\novercommitted: {requests.outgrown} of {requests.overcommitted} reservations were"
        f" outgrown; risk that an instance lacks blocks: {risk:.1%}"
    )


def _instances(instances: tuple[InstanceStatus, ...], has_models: bool) -> Table:
    """Returns a row for each instance; with its model where there are several."""
    table = Table(title="KV blocks", title_justify="left")
    if has_models:
        table.add_column("model")
    table.add_column("pool")
    table.add_column("instance")
    table.add_column("address")
    table.add_column("layout")
    for name in ("free", "cached", "reserved", "used", "quarantined", "total", "ledger", "running"):
        table.add_column(name, justify="right")
    table.add_column("waiting", justify="right")
    table.add_column("heartbeat", justify="right")
    for instance in sorted(instances, key=_order):
        blocks = instance.blocks
        numbers = (
            *(blocks.free, blocks.cached, blocks.reserved, blocks.used),
            *(blocks.quarantined, blocks.total),
            *(instance.ledger_reserved, instance.running, instance.waiting),
        )
        state = " (draining)" if instance.draining else ""
        name = instance.name + (" (connecting)" if instance.connecting else state)
        age = f"{instance.heartbeat_age_s:.1f} s ago"
        style = "red" if instance.heartbeat_age_s > _STALE_AFTER_S else ""
        table.add_row(
            *([instance.model] if has_models else []),
            "colocated" if instance.capacity.colocated else instance.role,
            name,
            instance.address,
            instance.layout,
            *map(str, numbers),
            Text(age, style=style),
        )
    return table


def _order(instance: InstanceStatus) -> tuple[str, bool, str]:
    return instance.model, instance.role != "prefill", instance.name


def _pairs(instances: tuple[InstanceStatus, ...]) -> Table:
    table = Table(title="KV connections", title_justify="left")
    for name in ("from", "to", "rank", "transport"):
        table.add_column(name)
    table.add_column("round trip", justify="right")
    table.add_column("GB/s", justify="right")
    table.add_column("trouble")
    for instance in sorted(instances, key=lambda one: one.name):
        for pair in sorted(instance.pairs, key=lambda one: (one.peer, one.rank)):
            rtt = f"{pair.rtt_s * 1e6:.0f} us" if pair.rtt_s else ""
            speed = f"{pair.bytes_per_s / 1e9:.2f}" if pair.bytes_per_s else ""
            trouble = Text(pair.note, style="red")
            table.add_row(
                instance.name, pair.peer, str(pair.rank), pair.transport, rtt, speed, trouble
            )
    return table


def _watch(client: Client, as_json: bool, interval_s: float) -> None:
    with Live(Text("asking"), auto_refresh=False, transient=as_json) as live:
        while True:
            try:
                status = client.status()
                if as_json:
                    print(_as_json(status), flush=True)
                else:
                    live.update(render(status), refresh=True)
            except TwinpoolError as exc:
                live.update(Text(exc.message), refresh=True)
            time.sleep(interval_s)


def _as_json(status: Status) -> str:
    return json.dumps(dataclasses.asdict(status))
