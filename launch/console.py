"""Where tables are printed: as wide as the terminal, or wide enough where there is none."""

import sys

from rich.console import Console

_PIPE_WIDTH = 160


def table_console() -> Console:
    """Returns a console for tables; into a pipe or a file it does not cut columns off."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
