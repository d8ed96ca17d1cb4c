"""The options that the benchmarks of both pools take; each command says how many rounds."""

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[Path | None, typer.Option(help="Write the figures to this file.")]
Rows = Annotated[str, typer.Option(help="Only rows that this pattern matches.")]
VllmPython = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="Interpreter of an environment with vLLM; without one the peer is left out.",
    ),
]
Checkpoints = Annotated[
    Path | None,
    typer.Option(file_okay=False, help="Keep checkpoints here; else they are written anew."),
]
Quick = Annotated[bool, typer.Option(help="The smallest rows only, to see it work.")]
