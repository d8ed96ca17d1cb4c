"""sglang's router beside ours: requests per second, and what either adds to a token.

Both are on one core and pass on the same answers; theirs between HTTP clients and HTTP workers.
"""

from collections.abc import Callable, Sequence
from typing import Any

from bench.report import Row, median_and_spread
from bench.routers.runs import run, run_peer
from bench.routers.settings import Settings

Say = Callable[[str], None]
Windows = Sequence[dict[str, float]]

_PEER = "sglang-router"
_ROUNDS = 3
# Short answers, so that it is requests that cost. Their steps wait for nobody: sglang's router
# leaves it to the kernel when small pieces are sent, which holds some back for 40 ms.
_SHORT_TOKENS = 16
_SHORT_STEP_S = 0.005
_AT_ONCE = 512
# Few enough streams for both routers to have time to spare.
_STREAMS = 100
_STEP_S = 0.04
_SEQUENCES = 256


def rows(settings: Settings, say: Say) -> list[Row]:
    """Measure short requests and steady streams, of the peer too where there is one.

    Raises SideFailed.
    """
    found: list[Row] = []
    requests = f"requests of {_SHORT_TOKENS} tokens, {_AT_ONCE} at once"
    if settings.wants(requests):
        ours, theirs = _both(settings, _SHORT_STEP_S, streams=_AT_ONCE, tokens=_SHORT_TOKENS)
        found.append(row_beside(requests, "finished_per_s", "requests/s", 1.0, ours, theirs))
        name = f"{requests}, router's core"
        found.append(row_beside(name, "router_cpu", "%", 100, ours, theirs))
        say(f"measured {requests}")
    steady = f"{_STREAMS} steady streams"
    if settings.wants(steady):
        ours, theirs = _both(settings, _STEP_S, streams=_STREAMS, tokens=settings.answer_tokens)
        for percent in (50, 99):
            name, figure = f"{steady}, added p{percent}", f"on_way_p{percent}_s"
            found.append(row_beside(name, figure, "ms", 1e3, ours, theirs))
        found.append(row_beside(f"{steady}, router's core", "router_cpu", "%", 100, ours, theirs))
        say(f"measured {steady}")
    return found


def row_beside(
    name: str, figure: str, unit: str, scale: float, ours: Windows, theirs: Windows
) -> Row:
    """Return a row of one figure's median, beside the peer's where it was run."""
    middle, spread = median_and_spread([window[figure] * scale for window in ours])
    other = median_and_spread([window[figure] * scale for window in theirs])[0] if theirs else None
    return Row(
        row=name,
        ours=middle,
        unit=unit,
        higher_is_better=unit.endswith("/s"),
        peer=other,
        peer_name=_PEER if theirs else None,
        spread=spread,
    )


def _both(settings: Settings, interval_s: float | None, **load: Any) -> tuple[Windows, Windows]:
    """Return the windows of our router, and those of the peer where there is one."""
    asked = {
        "decodes": 4,
        "interval_s": interval_s,
        "settle_s": min(2.0, settings.settle_s),
        "window_s": settings.window_s,
        "windows": _ROUNDS,
        **load,
    }
    ours = run("streams", settings, sequences=_SEQUENCES, **asked)
    return ours, run_peer(settings, **asked) if settings.peer_python is not None else ()
