"""How much does one router carry?

Mock instances speak the real protocol and compute nothing, so that the router is all there is to
measure. It has one core; mocks and clients share another one, and a clock.

- Streams: 1,000 answers at any time, of 1,024 tokens each, from 16 decode instances, with a message
  for each step of each. Saturation: an instance takes its next step once at most two of its steps
  are on their way to the clients. Half load: steady steps at half of that speed, each instance with
  a phase of its own. Added is the time from the moment that a mock hands a step to gRPC to the one
  at which a client reads the token from its socket: the last of a step's tokens has waited for all
  others. Memory counts from the router with nothing to do. With --minutes N also the first, the
  last and the worst minute. The limit is a relay on the same core and library that passes the same
  steps on and does nothing else.
- Decision: from a request's arrival to its booking, in the router's pure parts alone; half of the
  instances are prefill. Where caches are known, hashing the prompt is part of it.
- Overload: requests at random times, ten times as many as there are slots for; goodput beside the
  one at 1.25 times as many.
- Scaling: saturation with several routers before the same pools. Where they share a core it shows
  what splitting costs, and not what more cores would carry.
- Peer: sglang's router before mock workers of its own kind over HTTP; with --peer-python alone.

    python -m bench.router --peer-python PEER/bin/python --json FILE
    python -m bench.router --rows streams --minutes 30
    python -m bench.router --rows 'decision|overload'
"""

from pathlib import Path
from typing import Annotated

import typer

from bench.options import Json, Quick, Rows
from bench.report import Row, report
from bench.routers import decision, overload, peer, scaling, streams
from bench.routers.settings import Settings
from bench.sides.process import SideFailed

QUESTION = "How much does one router carry?"
# By what a row's name ends with: the least of what is good, the most of what is not.
_TARGETS = {
    "streams, saturation": 15_000.0,
    "half load, added p99": 5.0,
    "memory grown": 150.0,
    "no caches": 100.0,
    "caches known": 100.0,
    "refusal, p99": 20.0,
    "goodput kept": 95.0,
}


def _measure(settings: Settings) -> list[Row]:
    """Measure what the pattern matches; ends the program where a process fails."""

    def say(line: str) -> None:
        typer.echo(line, err=True)

    rows: list[Row] = []
    try:
        for part in (decision, streams, overload, scaling, peer):
            rows += part.rows(settings, say)
    except SideFailed as exc:
        say(str(exc))
        raise typer.Exit(1) from exc
    return rows


def _show_targets(rows: list[Row]) -> None:
    for row in rows:
        for part, wanted in _TARGETS.items():
            if row.row.endswith(part):
                is_met = row.ours >= wanted if row.higher_is_better else row.ours <= wanted
                bound = "at least" if row.higher_is_better else "at most"
                typer.echo(
                    f"{row.row}: {row.ours:.4g}, wanted {bound} {wanted:g} {row.unit}:"
                    f" {'met' if is_met else 'MISSED'}"
                )


def main(
    json: Json = None,
    rows: Rows = "",
    minutes: Annotated[int, typer.Option(min=1, help="Minutes of streams at half load.")] = 1,
    peer_python: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Interpreter of an environment with sglang-router; without one it is left out.",
        ),
    ] = None,
    quick: Quick = False,
) -> None:
    """Measure one router between mock instances and many clients."""
    settings = Settings(pattern=rows, minutes=minutes, peer_python=peer_python, quick=quick)
    measured = _measure(settings)
    report(QUESTION, measured, json)
    if not quick:
        _show_targets(measured)


if __name__ == "__main__":
    typer.run(main)
