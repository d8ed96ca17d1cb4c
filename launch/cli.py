"""The `twinpool` command: names the subcommands and loads one only when it is used.

So `twinpool --help` and `twinpool status` start at once, without torch.
"""

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

import service  # noqa: F401  (before anything imports gRPC: it sets gRPC's environment)

# Name: what the list of commands says, and the module whose `app` is the command.
_COMMANDS = {
    "serve": ("Serve a model on this machine, all roles at once.", "launch.serve"),
    "generate": ("Send a prompt and print the answer as it comes.", "launch.generate"),
    "status": ("Show pools, instances, blocks and requests.", "launch.status"),
    "token": ("Make tokens for clients and workers.", "launch.token"),
    "plan": ("Choose layouts and pool sizes for a model and a load.", "launch.plan"),
    "simulate": ("See what chosen pools would do with a load.", "launch.simulate"),
    "bench": ("Measure a server: its goodput.", "bench.commands"),
    "demo": ("Serve the built-in model and check its answers.", "launch.demo"),
    "router": ("Run a router.", "router.__main__"),
    "prefill": ("Run a prefill instance that joins a router.", "prefill.__main__"),
    "decode": ("Run a decode instance that joins a router.", "decode.__main__"),
}


class _LazyCommand(TyperCommand):
    """Stands for a command until it is parsed, then hands over to the real one."""

    def __init__(self, name: str, help: str, module: str) -> None:
        super().__init__(name, help=help, rich_markup_mode=None)
        self._module = module

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        command = typer.main.get_command(importlib.import_module(self._module).app)
        return command.make_context(info_name, args, *rest, **extra)


class _LazyGroup(TyperGroup):
    """Takes its commands from the table above."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _COMMANDS:
            return None
        help, module = _COMMANDS[cmd_name]
        return _LazyCommand(cmd_name, help, module)


app = typer.Typer(
    cls=_LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Twinpool: a model server whose prefill and decode run on separate pools.",
)


@app.callback()
def _root() -> None:
    """A group needs a callback of its own to have a help text."""


def main() -> None:
    """Entry point of the `twinpool` command."""
    app(prog_name="twinpool", args=sys.argv[1:])
