"""How many tokens one router passes on, what it adds to each, and whether that stays so."""

from collections.abc import Callable, Sequence
from typing import Any

from bench.report import Row, median_and_spread
from bench.routers.runs import run, run_bare
from bench.routers.settings import Settings

Say = Callable[[str], None]

_ROUNDS = 5
_MB = 1e6


def rows(settings: Settings, say: Say) -> list[Row]:
    """Measure streams at saturation, and at half of that for as long as is wanted.

    Raises SideFailed.
    """
    name = f"{settings.streams} streams"
    if not settings.wants(name):
        return []
    bare = {**_work(settings), **_rounds(settings)}
    del bare["sequences"]
    most = _median(run_bare(settings, **bare, interval_s=None), "tokens_per_s")
    say(f"measured {name} of bare gRPC")
    best = run("streams", settings, **_work(settings), interval_s=None, **_rounds(settings))
    say(f"measured {name} at saturation")
    per_s, spread = median_and_spread([window["tokens_per_s"] for window in best])
    interval_s = 2 * settings.streams / per_s
    at_half = run_bare(settings, **bare, interval_s=interval_s)
    minutes = run(
        "streams",
        settings,
        **_work(settings),
        interval_s=interval_s,
        settle_s=settings.settle_s,
        window_s=settings.minute_s,
        windows=settings.minutes,
    )
    say(f"measured {name} at half of it")
    return [
        Row(
            row=f"{name}, saturation",
            ours=per_s,
            unit="tokens/s",
            higher_is_better=True,
            spread=spread,
            limit=most,
        ),
        *half_load_rows(f"{name}, half load", minutes, at_half),
    ]


def half_load_rows(
    name: str, minutes: Sequence[dict[str, float]], bare: Sequence[dict[str, float]]
) -> list[Row]:
    """Return the rows of windows of a minute each: the median one, the worst, and memory.

    `bare` are windows of a relay that is nothing but gRPC, with the same steps.
    """

    def row(what: str, figure: str, unit: str, scale: float = 1, *, higher: bool = False) -> Row:
        return Row(
            row=f"{name}, {what}",
            ours=_median(minutes, figure) * scale,
            unit=unit,
            higher_is_better=higher,
            limit=_median(bare, figure) * scale,
        )

    found = [
        row("tokens", "tokens_per_s", "tokens/s", higher=True),
        row("added p50", "on_way_p50_s", "ms", 1e3),
        row("added p99", "on_way_p99_s", "ms", 1e3),
        row("router's core", "router_cpu", "%", 100),
        _row(f"{name}, memory grown", max(m["grown_bytes"] for m in minutes) / _MB, "MB"),
    ]
    if len(minutes) > 1:
        first, last = minutes[0], minutes[-1]
        worst = max(minute["on_way_p99_s"] for minute in minutes)
        grown = (last["grown_bytes"] - first["grown_bytes"]) / _MB
        found += [
            _row(f"{name}, added p99, first minute", first["on_way_p99_s"] * 1e3, "ms"),
            _row(f"{name}, added p99, last of {len(minutes)}", last["on_way_p99_s"] * 1e3, "ms"),
            _row(f"{name}, added p99, worst minute", worst * 1e3, "ms"),
            _row(f"{name}, memory grown after the first minute", grown, "MB"),
        ]
    return found


def _work(settings: Settings) -> dict[str, Any]:
    return {
        "streams": settings.streams,
        "tokens": settings.answer_tokens,
        "decodes": settings.decodes,
        "sequences": settings.sequences,
    }


def _rounds(settings: Settings) -> dict[str, Any]:
    return {"settle_s": settings.settle_s, "window_s": settings.window_s, "windows": _ROUNDS}


def _median(windows: Sequence[dict[str, float]], figure: str) -> float:
    values = sorted(window[figure] for window in windows)
    return values[len(values) // 2]


def _row(name: str, value: float, unit: str, *, higher: bool = False) -> Row:
    return Row(row=name, ours=value, unit=unit, higher_is_better=higher)
