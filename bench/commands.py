"""The benchmarks that users run, as `twinpool bench`; the others are for contributors."""

import typer

from bench import goodput

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Measure a server.",
)
app.add_typer(goodput.app)


@app.callback()
def _root() -> None:
    """Measure a server."""
