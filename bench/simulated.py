"""How near does a simulation come to the real system?

Starts a prefill and a decode instance with a checkpoint of random weights, and has them answer
requests at each of --rates. Before and after each it measures single requests, makes a simulation
of what these took, and has that answer the same requests at the same moments. A row is the real
figure; its peer is the simulation's.

    python -m bench.simulated --checkpoints DIR --json FILE
"""

import asyncio
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from twinpool import AsyncClient

from bench.checkpoints import DENSE, add_tokenizer, kept
from bench.goodputs.metrics import Times
from bench.goodputs.runner import Asked, Run, Runner
from bench.goodputs.slo import Slo
from bench.goodputs.systems import DECODE, PREFILL, Machine, at_address
from bench.goodputs.twinpool_backend import TwinpoolBackend
from bench.options import Json
from bench.report import Row, report
from bench.simulations.calibrated import calibrated
from bench.simulations.probes import Prober
from bench.workloads.arrivals import Phases, Planned
from bench.workloads.synthetic import lengths
from bench.workloads.workload import Drawn
from planner.simulator.cluster import Simulation
from planner.simulator.setup import Setup
from planner.traces import Request

QUESTION = "How near does a simulation come to the real system?"
_PERCENTILES = (50, 90)
_MAX_CONTEXT = 2048
_KV_GIB = 2


async def measure(
    address: str, asked: Asked, rates: Sequence[float], rounds: int, kv_tokens: int
) -> list[Row]:
    """Run all rates, and probe the system before and after each: a machine is not always as fast.

    Raises TwinpoolError, SendError and ServerLost.
    """
    backend = TwinpoolBackend(address, ca=None, token_file=None)
    try:
        served = await backend.describe()
        runner = Runner(backend, served, asked, begin=lambda *_: None, note=lambda _: None)
        rows: list[Row] = []
        async with AsyncClient(address) as client:
            prober = Prober(client, served.vocab_size or asked.vocab_size)
            before = await prober.probe(rounds)
            for rate in rates:
                run = await runner.at(rate)
                after = await prober.probe(rounds)
                setup = calibrated(before + after, kv_tokens=kv_tokens)
                typer.echo(f"calibrated for {rate:g}: {_said(setup)}", err=True)
                rows += rows_of(run, simulated(setup, runner.plan(rate)))
                before = after
        return rows
    finally:
        await backend.close()


def simulated(setup: Setup, planned: Sequence[Planned]) -> dict[str, list[float]]:
    """Return the times of the window's requests, by name, as the simulation has them."""
    calls = Simulation(setup).run(
        Request(
            at_s=each.arrival.at_s,
            prompt_tokens=each.arrival.prompt_tokens,
            output_tokens=each.arrival.output_tokens,
        )
        for each in planned
    )
    window = [call for call, each in zip(calls, planned, strict=True) if each.part == "window"]
    return {
        "TTFT": [call.ttft_s for call in window],
        "TPOT": [call.tpot_s for call in window if call.output_tokens > 1],
    }


def rows_of(run: Run, found: dict[str, list[float]]) -> list[Row]:
    """Return a run's percentiles with the simulation's beside them."""
    real: dict[str, Times] = {"TTFT": run.metrics.ttft, "TPOT": run.metrics.tpot}
    return [
        Row(
            row=f"{run.rate:g} requests/s, {name} p{percentile}",
            ours=real[name].percentiles_s[percentile] * 1e3,
            unit="ms",
            higher_is_better=False,
            peer=float(np.percentile(found[name], percentile)) * 1e3,
            peer_name="simulated",
        )
        for name in real
        for percentile in _PERCENTILES
    ]


def _said(setup: Setup) -> str:
    return f"{setup.decodes.costs}, {setup.beside}, {setup.shared}"


def main(
    checkpoints: Annotated[
        Path, typer.Option(file_okay=False, help="Keep the checkpoint here; made if it is not.")
    ],
    json: Json = None,
    rates: Annotated[str, typer.Option(help="Requests a second.")] = "0.5,1,1.5",
    prompt_tokens: Annotated[str, typer.Option(help="As of bench.goodput.")] = "lognormal:200:0.6",
    output_tokens: Annotated[str, typer.Option(help="As of bench.goodput.")] = "lognormal:48:0.5",
    warmup_s: Annotated[float, typer.Option(min=0, help="Before the window of each rate.")] = 6.0,
    window_s: Annotated[float, typer.Option(min=1, help="Whose requests count.")] = 60.0,
    rounds: Annotated[int, typer.Option(min=2, help="Of the probes.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the requests.")] = 0,
) -> None:
    """Compare a simulation with the system that it is of."""
    asked = Asked(
        workload=Drawn(
            prompts=lengths(prompt_tokens),
            outputs=lengths(output_tokens),
            burstiness=1.0,
            seed=seed,
        ),
        phases=Phases(warmup_s=warmup_s, window_s=window_s),
        slo=Slo(),
        seed=seed,
        vocab_size=10_000,
        max_context=1024,
        max_requests=None,
        timeout_s=300.0,
    )
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as logs:
        add_tokenizer(kept(checkpoints, DENSE), Path(folder))
        machine = Machine(
            model=Path(folder),
            max_context=_MAX_CONTEXT,
            kv_gib=_KV_GIB,
            cores=tuple(sorted(os.sched_getaffinity(0))),
            logs=Path(logs),
        )
        with at_address(machine, PREFILL, DECODE) as address:
            wanted = [float(rate) for rate in rates.split(",")]
            rows = asyncio.run(measure(address, asked, wanted, rounds, _kv_tokens()))
    report(QUESTION, rows, json)
    worst = max(abs(row.peer / row.ours - 1) for row in rows if row.peer is not None)
    typer.echo(f"the simulation is at most {worst:.0%} off")


def _kv_tokens() -> int:
    """Return the tokens that an instance has room for: of 8 layers with 8 heads of 128 in bf16."""
    return _KV_GIB * 2**30 // 2 // (8 * 2 * 8 * 128 * 2)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
