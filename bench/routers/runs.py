"""One run of mocks and clients against routers. Owns the processes while it lasts."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from bench.routers import processes
from bench.routers.around import prefills_for
from bench.routers.settings import Settings
from bench.sides.process import SideFailed


def run(
    do: str,
    settings: Settings,
    *,
    decodes: int,
    sequences: int,
    interval_s: float | None,
    routers: int = 1,
    options: Sequence[str] = (),
    may_refuse: bool = False,
    **load: Any,
) -> list[dict[str, float]]:
    """Start routers and have the load side do something; return the figures of each window.

    Each router has a core of its own where there are as many. Raises SideFailed, also where a
    request was not answered to its end unless it `may_refuse`.
    """
    cores = settings.router_cores
    with ExitStack() as stack:
        started = [
            stack.enter_context(processes.router(cores[number % len(cores)], options))
            for number in range(routers)
        ]
        around = {
            "routers": [each.address for each in started],
            "decodes": decodes,
            "sequences": sequences,
            "interval_s": interval_s,
        }
        windows = _ask(do, settings, around, started, load)
    lost = sum(window["unfinished"] for window in windows)
    if lost and not may_refuse:
        raise SideFailed(f"{lost:.0f} requests were not answered to their end")
    return windows


def run_bare(
    settings: Settings, *, decodes: int, interval_s: float | None, **load: Any
) -> list[dict[str, float]]:
    """As `run` of streams, with nothing but gRPC in the router's place."""
    with processes.bare(settings.router_cores[0]) as relay:
        around = _around(relay, decodes, interval_s, bare=True)
        windows = _ask("streams", settings, around, [relay], load)
    return _whole(windows, "the bare relay")


def run_peer(
    settings: Settings, *, decodes: int, interval_s: float | None, **load: Any
) -> list[dict[str, float]]:
    """As `run` of streams, with sglang's router before workers of its kind."""
    assert settings.peer_python is not None
    prefills = prefills_for(decodes)
    ports = processes.free_ports(prefills + decodes)
    with processes.sglang(
        settings.peer_python, settings.router_cores[0], ports[:prefills], ports[prefills:]
    ) as peer:
        around = _around(peer, decodes, interval_s, http_ports=ports)
        windows = _ask("streams", settings, around, [peer], load)
    return _whole(windows, "sglang's router")


def _around(
    started: processes.Started, decodes: int, interval_s: float | None, **more: Any
) -> dict[str, Any]:
    return {
        "routers": [started.address],
        "decodes": decodes,
        "sequences": 0,
        "interval_s": interval_s,
        **more,
    }


def _whole(windows: list[dict[str, float]], who: str) -> list[dict[str, float]]:
    if any(window["unfinished"] for window in windows):
        raise SideFailed(f"{who} has not answered all requests to their end")
    return windows


def _ask(
    do: str,
    settings: Settings,
    around: dict[str, Any],
    started: Sequence[processes.Started],
    load: dict[str, Any],
) -> list[dict[str, float]]:
    with processes.load(settings.load_core) as side:
        answer = side.ask(do, around=around, processes=[each.process for each in started], **load)
    windows: list[dict[str, float]] = answer["windows"]
    return windows
