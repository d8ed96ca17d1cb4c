"""Requests as a workload tells them: when, how long, which begin alike. Pure.

Owns how a workload is made slower, shorter and cut. Knows no file format, no tokens and no server.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from planner.traces import BLOCK

Part: TypeAlias = Literal["warm-up", "window", "cool-down"]


class WorkloadError(ValueError):
    """The workload cannot be had as it is asked for; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request.

    `blocks` name the whole prompt, `block_tokens` at a time, the last one maybe less: equal
    numbers are equal tokens after equal ones. Empty: it shares nothing with others.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = BLOCK

    @property
    def tokens(self) -> int:
        """What the request takes of a context, prompt and answer."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A request with its place in a run: its number, and the part of the run that it belongs to."""

    index: int
    part: Part
    arrival: Arrival


@dataclass(frozen=True, kw_only=True)
class Phases:
    """How long requests come for; only those of the window count."""

    warmup_s: float
    window_s: float
    cooldown_s: float = 0.0

    @property
    def total_s(self) -> float:
        """From the first request to the last, at most."""
        return self.warmup_s + self.window_s + self.cooldown_s

    def part_of(self, at_s: float) -> Part:
        """Return the part that a moment is in."""
        if at_s < self.warmup_s:
            return "warm-up"
        return "window" if at_s < self.warmup_s + self.window_s else "cool-down"


def scaled(arrival: Arrival, length_scale: float) -> Arrival:
    """Return a request with prompt, answer and blocks so many times as long, no part empty."""
    output_tokens = max(1, round(arrival.output_tokens * length_scale))
    if not arrival.blocks:
        prompt_tokens = max(1, round(arrival.prompt_tokens * length_scale))
        return replace(arrival, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    # Block by block, so that what was shared still is, to the token.
    block_tokens = max(1, round(arrival.block_tokens * length_scale))
    full = len(arrival.blocks) - 1
    rest = round((arrival.prompt_tokens - full * arrival.block_tokens) * length_scale)
    return replace(
        arrival,
        prompt_tokens=full * block_tokens + min(max(1, rest), block_tokens),
        output_tokens=output_tokens,
        block_tokens=block_tokens,
    )


def within_context(arrivals: Sequence[Arrival], max_context: int | None) -> list[Arrival]:
    """Return the requests of at most `max_context` tokens, the first of them at 0 seconds.

    Raises WorkloadError where none is short enough.
    """
    kept = [each for each in arrivals if max_context is None or each.tokens <= max_context]
    if not kept:
        shortest = min(each.tokens for each in arrivals)
        raise WorkloadError(
            f"no request of the workload has at most {max_context} tokens, the shortest has"
            f" {shortest}; raise --max-context or lower --length-scale"
        )
    return [replace(each, at_s=each.at_s - kept[0].at_s) for each in kept]


def at_rate(arrivals: Sequence[Arrival], rate: float, total_s: float) -> list[Arrival]:
    """Return the first `rate * total_s` requests, their times stretched to take `total_s`.

    So the rate is met exactly whatever the gaps are like. Raises WorkloadError where there are
    fewer.
    """
    count = max(1, round(rate * total_s))
    if count > len(arrivals):
        raise WorkloadError(
            f"{rate:g} requests/s for {total_s:g} s take {count} requests, the workload has"
            f" {len(arrivals)}; lower the rate or --duration, or let in longer ones by"
            " --max-context"
        )
    # To where the next request would be, or the last one would come at the very end.
    span_s = (
        arrivals[count].at_s
        if count < len(arrivals)
        else arrivals[-1].at_s * count / (count - 1 or 1)
    )
    factor = total_s / span_s if span_s > 0 else 0.0
    return [replace(each, at_s=each.at_s * factor) for each in arrivals[:count]]


def slowed(arrivals: Sequence[Arrival], time_scale: float) -> list[Arrival]:
    """Return the requests with all times so many times as long."""
    return [replace(each, at_s=each.at_s * time_scale) for each in arrivals]


def plan(
    arrivals: Sequence[Arrival], phases: Phases, max_requests: int | None = None
) -> list[Planned]:
    """Return the requests that come while a run goes on, at most so many in its window.

    Raises WorkloadError where none comes in the window.
    """
    planned: list[Planned] = []
    most = math.inf if max_requests is None else max_requests
    in_window = 0
    for arrival in arrivals:
        if arrival.at_s >= phases.total_s or in_window >= most:
            break
        part = phases.part_of(arrival.at_s)
        in_window += part == "window"
        planned.append(Planned(index=len(planned), part=part, arrival=arrival))
    if not in_window:
        raise WorkloadError(
            f"no request comes in the {phases.window_s:g} s after a warm-up of"
            f" {phases.warmup_s:g} s; raise --duration or the rate"
        )
    return planned
