"""The benchmark of the kernels, as far as it goes without a GPU."""

from collections.abc import Callable

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

from bench.kernel_cases import Case, Shapes, Tunable, cases
from bench.kernel_timing import Timer
from bench.kernels import best_tile, main, row_of
from bench.report import GrowingReport
from engine.errors import UnsupportedError
from engine.kernels.gpu.tune import Choices, Tile
from engine.kernels.table import paged_kernels

TINY = Shapes(
    tokens=48,
    hidden=64,
    inner=32,
    heads=4,
    kv_heads=2,
    size=64,
    places=16,
    decodes=((2, 40),),
    prefills=((16, 16), (8, 24)),
    latent_heads=4,
    latent=32,
    turned=16,
    latents=((2, 40),),
    sparse_hidden=32,
    sparse_inner=16,
    experts=4,
    choices=2,
    sparse=(2, 160),
    vocabulary=200,
    drawn=3,
)


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_without_a_gpu_it_says_so_and_exits_with_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, output = run()
    assert code == 2
    assert "no CUDA device" in output


def test_a_device_that_is_no_gpu_is_refused() -> None:
    code, output = run("--device", "cpu")
    assert code == 2
    assert "cpu is no GPU" in output


# Where there is a GPU it is compiled.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_case_runs_and_computes_what_its_peer_does() -> None:
    try:
        kernels = paged_kernels(torch.device("cuda"))
    except UnsupportedError as missing:
        pytest.skip(str(missing))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compared = set()
    for case in cases(kernels, device, TINY):
        assert bool(case.bytes) != bool(case.flops)
        if case.name.startswith("add"):  # in place: the second would add again
            assert case.peer is not None
            case.ours(), case.peer()
            continue
        ours = case.ours()
        if case.peer is not None:
            theirs = case.peer()
            assert isinstance(ours, Tensor)
            assert isinstance(theirs, Tensor)
            # Sums of bf16 products that nearly cancel are as exact as what was added up.
            near = 2e-2 if theirs.is_floating_point() else 0
            atol = near * theirs.float().abs().max().item()
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=near, atol=atol)
            compared.add(case.name.split(",")[0])
    moves = {"pack", "unpack", "reshard"}
    assert compared == {"SiLU and multiply", "decode", "draw", "experts", "prefill", *moves}


def timer_of(*seconds: float) -> Timer:
    left = list(seconds)

    def timer(run: Callable[[], object], repeats: int) -> list[float]:
        run()
        return [left.pop(0)] * repeats

    return timer


def test_a_case_that_moves_memory_is_shown_in_bytes() -> None:
    case = Case(name="copy", ours=int, bytes=10**9, peer=int, peer_name="torch")
    row = row_of(case, timer_of(0.5, 0.25), 4e9, 4)
    assert (row.ours, row.limit, row.peer, row.unit) == (2.0, 4.0, 4.0, "GB/s")
    assert row.spread == 0


def test_a_case_that_multiplies_is_shown_in_flops() -> None:
    row = row_of(Case(name="product", ours=int, flops=10**12), timer_of(0.5), 4e12, 4)
    assert (row.ours, row.limit, row.peer, row.unit) == (2.0, 4.0, None, "TFLOP/s")


def test_the_tile_that_takes_the_least_time_is_best() -> None:
    tiles = [Tile(keys=keys, warps=4, stages=2) for keys in (16, 32, 64)]
    tunable = Tunable(choices=Choices(name="any", tiles=tiles), run=lambda tile: tile)
    figures = GrowingReport("any", None)
    assert best_tile(tunable, timer_of(3.0, 1.0, 2.0), 4, figures) == tiles[1]
    assert not figures.failed


def test_a_tile_that_the_gpu_refuses_is_not_chosen() -> None:
    tiles = [Tile(keys=keys, warps=4, stages=2) for keys in (16, 32)]

    def refuse_the_first(tile: Tile) -> None:
        if tile is tiles[0]:
            raise RuntimeError("out of resource: shared memory")

    figures = GrowingReport("any", None)
    tunable = Tunable(choices=Choices(name="any", tiles=tiles), run=refuse_the_first)
    assert best_tile(tunable, timer_of(2.0), 4, figures) == tiles[1]
    assert len(figures.failed) == 1
