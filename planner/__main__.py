"""`python -m planner`: makes a calibration of benchmark files. Owns flags; `planner.fit` fits."""

from pathlib import Path
from typing import Annotated

import typer

from planner.errors import PlannerError
from planner.fit import fit, predict
from planner.hardware import find_device
from planner.measured import read_bench
from planner.models import find_model

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def calibrate(
    files: Annotated[list[Path], typer.Argument(help="JSON files of bench.prefill, bench.decode.")],
    model: Annotated[str, typer.Option(help="Config.json of the model that was measured.")],
    rows: Annotated[str, typer.Option(help="What its rows begin with, as dense.")],
    gpu: Annotated[str, typer.Option(help="Device that it was measured on.")],
    out: Annotated[Path, typer.Option(help="File for the calibration.")],
) -> None:
    """Fit efficiencies and overheads to measured rows, and show how near the fit comes to them."""
    try:
        shape, device = find_model(model), find_device(gpu)
        measured = [row for file in files for row in read_bench(file, rows, shape)]
        source = "fitted to " + ", ".join(file.name for file in files)
        calibration = fit(measured, device, source)
        out.write_text(calibration.model_dump_json(indent=1) + "\n", encoding="utf-8")
    except (PlannerError, OSError) as exc:
        typer.echo(f"planner: {exc}", err=True)
        raise typer.Exit(2) from None
    for row in measured:
        ratio = predict(row, device, calibration) / row.seconds
        typer.echo(
            f"{row.role.value} {row.batch} x {row.tokens:,}: measured {row.seconds * 1e3:.2f} ms, "
            f"predicted {ratio:.2f} of it"
        )


if __name__ == "__main__":
    app()
