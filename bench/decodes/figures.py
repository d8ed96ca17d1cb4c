"""From moments to a report's rows. Pure."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from bench.decodes.works import Work
from bench.report import Row, median_and_spread

Step = tuple[float, int]  # when it was over, and how many tokens it gave


@dataclass(frozen=True, kw_only=True)
class Given:
    """What one way gave of a work: tokens per second of each round."""

    name: str
    speeds: Sequence[float]


def step_s(steps: Sequence[Step], batch: int) -> float:
    """Return the median time of a step, from the end of one that gave the whole batch a token.

    Raises ValueError where the batch never ran as a whole for two steps in a row.
    """
    times = [
        end - begin
        for (begin, before), (end, tokens) in pairwise(steps)
        if before == tokens == batch
    ]
    if not times:
        raise ValueError(f"{len(steps)} steps, but no two in a row of all {batch} sequences")
    return statistics.median(times)


def speed(arrivals: Sequence[Sequence[float]]) -> float:
    """Return the tokens per second that reach a client while every sequence gets some.

    That is from the latest first token to the earliest last one. Raises ValueError where there is
    no such time.
    """
    begin, end = max(each[0] for each in arrivals), min(each[-1] for each in arrivals)
    tokens = sum(begin < at <= end for each in arrivals for at in each)
    if not tokens:
        raise ValueError(f"{len(arrivals)} sequences that never got tokens at the same time")
    return tokens / (end - begin)


def gaps_s(arrivals: Sequence[Sequence[float]], in_flight: int) -> list[float]:
    """Return the times between one token of a request and its next.

    Only while so many were under way and the first of them, which began at once, had begun to be
    replaced by others.
    """
    begin = min(each[-1] for each in arrivals[:in_flight])
    end = max(each[0] for each in arrivals)
    return [
        after - before
        for each in arrivals
        for before, after in pairwise(each)
        if begin <= before and after <= end
    ]


def speed_rows(name: str, ours: Given, peers: Sequence[Given], limit: float | None) -> list[Row]:
    """Return our speed beside each peer's; beside none where there is none."""
    middle, spread = median_and_spread(ours.speeds)
    alone = Row(
        row=name,
        ours=middle,
        unit="tokens/s",
        higher_is_better=True,
        limit=limit,
        spread=spread,
    )
    return [
        replace(
            alone,
            row=f"{name}, beside {peer.name.split()[0]}",
            peer=median_and_spread(peer.speeds)[0],
            peer_name=peer.name,
        )
        for peer in peers
    ] or [alone]


def limit_speed(work: Work, bytes_of_step: float, bytes_per_s: Sequence[float]) -> float:
    """Return the tokens per second of a batch whose steps do nothing but read."""
    return work.batch * statistics.median(bytes_per_s) / bytes_of_step


def overhead_row(name: str, outside_s: Sequence[float]) -> Row:
    """Return the time of a step that is not the model's, in ms."""
    middle, spread = median_and_spread([1e3 * one for one in outside_s])
    return Row(row=name, ours=middle, unit="ms", higher_is_better=False, spread=spread)


@dataclass(frozen=True, kw_only=True)
class Gaps:
    """The times between tokens that one way had under load, a list for each round."""

    name: str
    rounds: Sequence[Sequence[float]]

    def percentile_ms(self, percent: int) -> list[float]:
        """Return a percentile of each round."""
        return [1e3 * statistics.quantiles(one, n=100)[percent - 1] for one in self.rounds]

    def ratios(self) -> list[float]:
        """Return the 99th over the 50th percentile of each round."""
        pairs = zip(self.percentile_ms(99), self.percentile_ms(50), strict=True)
        return [high / middle for high, middle in pairs]


def latency_rows(name: str, ours: Gaps, peer: Gaps | None) -> list[Row]:
    """Return both percentiles of the time between tokens, and what one is of the other."""

    def row(what: str, unit: str, of_ours: list[float], of_peer: list[float] | None) -> Row:
        middle, spread = median_and_spread(of_ours)
        return Row(
            row=f"{name}, {what}",
            ours=middle,
            unit=unit,
            higher_is_better=False,
            peer=median_and_spread(of_peer)[0] if of_peer else None,
            peer_name=peer.name if peer else None,
            spread=spread,
        )

    return [
        row("p99/p50", "x", ours.ratios(), peer.ratios() if peer else None),
        *(
            row(f"p{p}", "ms", ours.percentile_ms(p), peer.percentile_ms(p) if peer else None)
            for p in (50, 99)
        ),
    ]
