"""What a router does with ten times as many requests as the pools can take.

The pools can take as many as they have slots in the time that an answer takes.
"""

from collections.abc import Callable

from bench.report import Row
from bench.routers.runs import run
from bench.routers.settings import Settings

Say = Callable[[str], None]

_DECODES = 4
_SEQUENCES = 16
_TOKENS = 20
_INTERVAL_S = 0.05
# Requests per second that the slots can take, if the next one came at once.
_CAPACITY = _DECODES * _SEQUENCES / (_TOKENS * _INTERVAL_S)
# Enough for every slot to be taken again at once, and few enough to be refused hardly ever.
_PEAK_LOAD = 1.25
_OVERLOAD = 10


def rows(settings: Settings, say: Say) -> list[Row]:
    """Measure goodput and refusals under overload; raises SideFailed."""
    name = f"overload {_OVERLOAD}x"
    if not settings.wants(name):
        return []
    peak = _offer(settings, _PEAK_LOAD)["finished_per_s"]
    found = _offer(settings, _OVERLOAD)
    say(f"measured {name}")
    return overload_rows(name, peak, found)


def overload_rows(name: str, peak_per_s: float, found: dict[str, float]) -> list[Row]:
    """Return the rows of a run under overload beside the best goodput."""
    kept = 100 * found["finished_per_s"] / peak_per_s
    refusals = [
        Row(
            row=f"{name}, time to a refusal, p{percent}",
            ours=found[f"refused_p{percent}_s"] * 1e3,
            unit="ms",
            higher_is_better=False,
        )
        for percent in (50, 99)
    ]
    return [
        Row(
            row=f"{name}, goodput",
            ours=found["finished_per_s"],
            unit="requests/s",
            higher_is_better=True,
            limit=peak_per_s,
        ),
        Row(row=f"{name}, goodput kept", ours=kept, unit="%", higher_is_better=True),
        *refusals,
        Row(
            row=f"{name}, router's core",
            ours=found["router_cpu"] * 100,
            unit="%",
            higher_is_better=False,
        ),
    ]


def _offer(settings: Settings, times: float) -> dict[str, float]:
    [window] = run(
        "offered",
        settings,
        may_refuse=True,
        # Half a second of queue in a quick run, so that it fills up.
        options=["--max-queue", "32"] if settings.quick else [],
        interval_s=_INTERVAL_S,
        tokens=_TOKENS,
        decodes=_DECODES,
        sequences=_SEQUENCES,
        per_s=times * _CAPACITY,
        # Until the queue is full, and the first answers are done.
        settle_s=1.5 if settings.quick else 6.0,
        seconds=1.0 if settings.quick else 10.0,
    )
    return window
