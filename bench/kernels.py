"""How near do the kernels come to what the GPU allows?

Runs every kernel on shapes of an 8-billion model's layer, each call with nothing of it in the L2.
What moves memory is compared with a plain copy, what multiplies with a large product, and both with
torch where torch does the same; all in the same run. With --tune, tries the tiles of the attention
kernels first and keeps the best for this GPU.
"""

import re
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Annotated, NoReturn

import torch
import typer

from bench.kernel_cases import Case, Shapes, Tunable, cases
from bench.kernel_timing import CudaTimer, Timer, copied_bytes_per_s, flops_per_s
from bench.options import Json, Rows
from bench.report import GrowingReport, Row, median_and_spread
from engine.errors import UnsupportedError
from engine.kernels.gpu.tune import Tile, keep
from engine.kernels.table import paged_kernels

_NOTHING_TO_RUN_ON = 2


def row_of(case: Case, timer: Timer, limit: float, repeats: int) -> Row:
    """Measure a case; `limit` is in bytes or FLOP a second."""
    work, unit, scale = (case.bytes, "GB/s", 1e9) if case.bytes else (case.flops, "TFLOP/s", 1e12)
    rates = [work / seconds / scale for seconds in timer(case.ours, repeats)]
    ours, spread = median_and_spread(rates)
    peer = None
    if case.peer is not None:
        peer = work / statistics.median(timer(case.peer, repeats)) / scale
    return Row(
        row=case.name,
        ours=ours,
        unit=unit,
        higher_is_better=True,
        limit=limit / scale,
        peer=peer,
        peer_name=case.peer_name,
        spread=spread,
    )


def best_tile(tunable: Tunable, timer: Timer, repeats: int, figures: GrowingReport) -> Tile:
    """Return the tile that takes the least time, of those that the GPU takes."""
    times: dict[Tile, float] = {}
    for tile in tunable.choices.tiles:
        with figures.attempt(f"{tunable.choices.name}, {tile}"):
            times[tile] = statistics.median(timer(partial(tunable.run, tile), repeats))
            typer.echo(f"{tunable.choices.name}, {tile}: {1e6 * times[tile]:.1f} us", err=True)
    return min(times, key=lambda tile: times[tile])


def _chosen(found: Iterator[Case], pattern: str) -> Iterator[Case]:
    return (case for case in found if re.search(pattern, case.name))


def _tune(
    found: Iterator[Case], timer: Timer, repeats: int, gpu: str, figures: GrowingReport
) -> None:
    best: dict[str, Tile] = {}
    for case in found:
        if case.tunable is not None:
            with figures.attempt(f"the best tile for {case.name}"):
                best[case.tunable.choices.name] = best_tile(case.tunable, timer, repeats, figures)
    typer.echo(f"the best tiles are in {keep(gpu, best)}")


def _refuse(why: str) -> NoReturn:
    typer.echo(f"cannot measure the kernels: {why}", err=True)
    raise typer.Exit(_NOTHING_TO_RUN_ON)


def main(
    json: Json = None,
    rows: Rows = "",
    device: Annotated[str, typer.Option(help="The GPU: cuda, or cuda:1 and so on.")] = "cuda",
    repeats: Annotated[int, typer.Option(min=4, help="Timed calls of each kernel.")] = 50,
    tune: Annotated[bool, typer.Option(help="First find and keep the best tiles.")] = False,
) -> None:
    """Measure the kernels beside what the GPU allows, and torch."""
    if not device.startswith("cuda"):
        _refuse(f"the device {device} is no GPU; give --device cuda on a machine that has one")
    if not torch.cuda.is_available():
        _refuse("torch finds no CUDA device here; run it on a machine with a GPU and a CUDA build")
    on = torch.device(device)
    torch.cuda.set_device(on)
    try:
        kernels = paged_kernels(on)
    except UnsupportedError as missing:
        _refuse(str(missing))
    gpu = torch.cuda.get_device_name(on)
    timer = CudaTimer(on)

    def made() -> Iterator[Case]:
        return _chosen(cases(kernels, on, Shapes()), rows)

    figures = GrowingReport("How near do the kernels come to what the GPU allows?", json)
    if tune:
        _tune(made(), timer, repeats, gpu, figures)
    bytes_limit = copied_bytes_per_s(timer, on, repeats)
    flops_limit = flops_per_s(timer, on, repeats)
    for case in made():
        with figures.attempt(case.name):
            limit = bytes_limit if case.bytes else flops_limit
            figures.put(row_of(case, timer, limit, repeats))
    figures.end()


if __name__ == "__main__":
    typer.run(main)
