"""What more router processes carry together, and what a token costs in each of them."""

from collections.abc import Callable

from bench.report import Row, median_and_spread
from bench.routers.runs import run
from bench.routers.settings import Settings

Say = Callable[[str], None]

_ROUTERS = (1, 2, 4)
_ROUNDS = 3


def rows(settings: Settings, say: Say) -> list[Row]:
    """Measure as many streams over one, two and four routers; raises SideFailed."""
    found: list[Row] = []
    for routers in _ROUTERS[:2] if settings.quick else _ROUTERS:
        cores = min(routers, len(settings.router_cores))
        name = f"scaling, {routers} routers on {cores} cores"
        if not settings.wants(name):
            continue
        windows = run(
            "streams",
            settings,
            routers=routers,
            interval_s=None,
            streams=settings.streams,
            tokens=settings.answer_tokens,
            decodes=settings.decodes,
            sequences=settings.sequences,
            settle_s=settings.settle_s,
            window_s=settings.window_s,
            windows=_ROUNDS,
        )
        say(f"measured {name}")
        found += scaling_rows(name, windows)
    return found


def scaling_rows(name: str, windows: list[dict[str, float]]) -> list[Row]:
    """Return what came through all routers, and the processor time of each token."""
    per_s, spread = median_and_spread([window["tokens_per_s"] for window in windows])
    cost_us, cost_spread = median_and_spread(
        [1e6 * window["router_cpu"] / window["tokens_per_s"] for window in windows]
    )
    return [
        Row(row=name, ours=per_s, unit="tokens/s", higher_is_better=True, spread=spread),
        Row(
            row=f"{name}, a token",
            ours=cost_us,
            unit="us",
            higher_is_better=False,
            spread=cost_spread,
        ),
    ]
