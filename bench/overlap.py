"""How much of the KV transfer does prefill's compute hide?

Two processes on a core each: one computes a prompt in the steps of a prefill instance and hands its
KV over, one receives it. The gap is the time from the first token to the moment at which decode has
all of the KV and has checked it. Rounds in which layers are handed over as they are computed take
turns with rounds in which everything is handed over at the end: the share that is hidden is what
the gap of the former lacks of the latter's.
"""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from bench.checkpoints import write_dense
from bench.movers.ours import request_options
from bench.movers.pair import Pair
from bench.movers.works import CARRIERS, Carrier, Ranks, Request, Work
from bench.report import Row, median_and_spread, report

QUESTION = "How much of the KV transfer does prefill's compute hide?"
LAYERS, HIDDEN, KV_HEADS, TOKENS = 8, 512, 8, 4096
WARM_UP = 1
_LANES = {"tcp": "tcp", "shm": "mapped memory"}


def _work() -> Work:
    request = Request(
        source=Ranks(), target=Ranks(), layers=LAYERS, kv_heads=KV_HEADS, tokens=TOKENS
    )
    return Work(
        name="prompt",
        slices=request.bytes // request.slice_bytes,
        slice_bytes=request.slice_bytes,
        pool_factor=2,
        request=request,
    )


def _measure(model: Path, carrier: Carrier, repeats: int) -> list[Row]:
    work, gaps = _work(), {"streamed": list[float](), "afterwards": list[float]()}
    compute = {mode: list[float]() for mode in gaps}
    hidden: list[float] = []
    command = [sys.executable, "-m", "bench.movers.overlap_side"]
    with Pair("overlap", command, carrier) as pair:
        pair.open(work, model=str(model), **request_options(work, carrier))
        for number in range(2 * (WARM_UP + repeats)):
            mode = "afterwards" if number % 2 else "streamed"
            said = pair.round(work, number, mode=mode)
            if said["sent"] != said["arrived"]:
                raise typer.BadParameter("the KV that arrived is not what was computed")
            if number < 2 * WARM_UP:
                continue
            gaps[mode].append(1e3 * (said["ended"] - said["began"]))
            compute[mode].append(1e3 * said["compute_s"])
            if mode == "streamed":
                hidden.append(100 * said["hidden_bytes"] / said["bytes"])
    streamed, spread = median_and_spread(gaps["streamed"])
    afterwards, _ = median_and_spread(gaps["afterwards"])
    slower, slower_spread = median_and_spread(compute["streamed"])
    alone, _ = median_and_spread(compute["afterwards"])
    sent, sent_spread = median_and_spread(hidden)
    lane = _LANES[carrier.name]
    return [
        Row(
            row=f"first token to decode-ready, {lane}",
            ours=streamed,
            unit="ms",
            higher_is_better=False,
            peer=afterwards,
            peer_name="not hidden",
            spread=spread,
        ),
        Row(
            row=f"share of the transfer hidden, {lane}",
            # Below 0, decode had everything before the first token was sampled.
            ours=100 * min(1.0, 1 - streamed / afterwards),
            unit="%",
            higher_is_better=True,
            limit=100.0,
        ),
        Row(
            row=f"bytes sent before the last layer, {lane}",
            ours=sent,
            unit="%",
            higher_is_better=True,
            limit=100.0,
            spread=sent_spread,
        ),
        Row(
            row=f"prefill while it hands over, {lane}",
            ours=slower,
            unit="ms",
            higher_is_better=False,
            limit=alone,
            spread=slower_spread,
        ),
    ]


def main(
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Prompts of each kind.")] = 5,
) -> None:
    """Measure how far prefill's compute hides the KV transfer."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_dense(Path(folder), layers=LAYERS, hidden=HIDDEN, kv_heads=KV_HEADS)
        rows = [row for carrier in CARRIERS for row in _measure(model, carrier, repeats)]
    report(QUESTION, rows, json)


if __name__ == "__main__":
    typer.run(main)
