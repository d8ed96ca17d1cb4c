"""Looks for the layouts and the split of devices that serve most within the limits. Pure.

As DistServe's placement (arXiv 2401.09670, algorithm 1) each pool is looked at by itself: what rate
so many instances of a layout sustain within the pool's limit. A split of devices is then as good as
the weaker of its pools, or the network between them. The one with the highest goodput for each
device that it uses wins; those that sustain the rate asked for come before those that do not.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from planner.errors import NoPlanError
from planner.layout import Layout, Role
from planner.options import Option, Question, options
from planner.pools import DecodePool, PrefillPool
from planner.shape import devices_needed

Key = tuple[Role, Layout]


@dataclass(frozen=True)
class Instances:
    """So many instances of one layout."""

    option: Option
    count: int

    @property
    def devices(self) -> int:
        """Devices of all of them."""
        return self.count * self.option.layout.ranks

    @property
    def goodput(self) -> float:
        """The highest rate within the pool's limit."""
        return self.option.goodput[self.count - 1]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Two pools, and the highest rate that they, and the network between them, sustain."""

    prefill: Instances
    decode: Instances
    goodput: float
    bound_by: str

    @property
    def devices(self) -> int:
        """Devices in use."""
        return self.prefill.devices + self.decode.devices

    @property
    def goodput_per_device(self) -> float:
        """What splits are compared by."""
        return self.goodput / self.devices


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The outcome.

    Attributes:
        smallest: The split with the fewest devices that sustains the rate; None where none does.
        losers: All other layouts.
        best_with: The best split that has a layout, where there is any.
    """

    question: Question
    best: Split
    smallest: Split | None
    losers: tuple[Option, ...]
    best_with: dict[Key, Split]


def plan(question: Question) -> Plan:
    """Return the best split.

    Raises NoPlanError where nothing fits, or nothing keeps the limits at any rate.
    """
    had = {role: options(question, role) for role in Role}
    for role in Role:
        _refuse_without_any(question, role, had[role])
    splits = list(_splits(question, had[Role.PREFILL], had[Role.DECODE]))
    if not splits:
        raise NoPlanError(_no_room_for_both(question, had))
    rate = question.workload.rate_per_s
    enough = [split for split in splits if split.goodput >= rate]
    best = max(enough or splits, key=_rank)
    smallest = min(enough, key=lambda split: (split.devices, -split.goodput), default=None)
    winners = {_key(best.prefill.option), _key(best.decode.option)}
    return Plan(
        question=question,
        best=best,
        smallest=smallest,
        losers=tuple(loser for role in Role for loser in had[role] if _key(loser) not in winners),
        best_with=_best_with(splits),
    )


def _best_with(splits: Iterable[Split]) -> dict[Key, Split]:
    best: dict[Key, Split] = {}
    for split in splits:
        for instances in (split.prefill, split.decode):
            key = _key(instances.option)
            if key not in best or _rank(split) > _rank(best[key]):
                best[key] = split
    return best


def _key(option: Option) -> Key:
    return option.role, option.layout


def _rank(split: Split) -> tuple[float, int, float]:
    """Order by goodput a device; of equals the smaller, then the one with more room to spare."""
    spare = split.prefill.goodput + split.decode.goodput
    return split.goodput_per_device, -split.devices, spare


def _refuse_without_any(question: Question, role: Role, had: Sequence[Option]) -> None:
    if any(option.goodput for option in had):
        return
    name, count = question.device.name, question.devices
    fitting = [option for option in had if option.fits]
    if not fitting:
        nearest = max(had, key=lambda option: option.memory.kv)
        weights = question.shape.weight_bytes
        least = devices_needed(weights, question.device.memory_bytes, question.reserve)
        raise NoPlanError(
            f"{question.shape.name} fits into no {role.value} layout on {count} x {name}: with "
            f"{nearest.layout.name} {nearest.reason}; its weights alone want {least} devices a "
            "pool: give more --gpus, larger ones, or fewer --weight-bits"
        )
    flag = "--ttft" if role is Role.PREFILL else "--tpot"
    nearest = min(fitting, key=_alone_s)
    raise NoPlanError(
        f"no {role.value} layout on {count} x {name} keeps the limit at any rate; the nearest is "
        f"{nearest.layout.name}: {nearest.reason}; "
        f"raise {flag}, or give more or faster devices"
    )


def _alone_s(option: Option) -> float:
    """Return how long a mean prompt, or a step of one sequence, takes with nothing else to do."""
    pool = option.pool
    if isinstance(pool, PrefillPool):
        return float(pool.first_s.mean())
    return pool.step_s(1) if isinstance(pool, DecodePool) else float("inf")


def _no_room_for_both(question: Question, had: dict[Role, list[Option]]) -> str:
    least = {
        role: min(option.layout.ranks for option in had[role] if option.goodput) for role in Role
    }
    return (
        f"{question.devices} x {question.device.name} are too few for both pools: prefill needs "
        f"{least[Role.PREFILL]} at least within the limits and decode {least[Role.DECODE]}; give "
        f"--gpus {sum(least.values())} or more"
    )


def _splits(
    question: Question, prefills: Sequence[Option], decodes: Sequence[Option]
) -> Iterator[Split]:
    """Yield for each layout and number of its instances the best partner of each size."""
    best_prefills = _best_by_devices(prefills)
    best_decodes = _best_by_devices(decodes)
    for prefill in _instances(prefills):
        for decode in best_decodes:
            if prefill.devices + decode.devices <= question.devices:
                yield _split(question, prefill, decode)
    for decode in _instances(decodes):
        for prefill in best_prefills:
            if prefill.devices + decode.devices <= question.devices:
                yield _split(question, prefill, decode)


def _instances(had: Iterable[Option]) -> Iterator[Instances]:
    for option in had:
        for count in range(1, len(option.goodput) + 1):
            yield Instances(option, count)


def _best_by_devices(had: Iterable[Option]) -> Iterable[Instances]:
    best: dict[int, Instances] = {}
    for instances in _instances(had):
        other = best.get(instances.devices)
        if other is None or instances.goodput > other.goodput:
            best[instances.devices] = instances
    return best.values()


def _split(question: Question, prefill: Instances, decode: Instances) -> Split:
    rates = {
        "prefill": prefill.goodput,
        "decode": decode.goodput,
        "the network": _network_rate(question, min(prefill.devices, decode.devices)),
    }
    bound_by = min(rates, key=lambda name: rates[name])
    return Split(prefill=prefill, decode=decode, goodput=rates[bound_by], bound_by=bound_by)


def _network_rate(question: Question, devices: int) -> float:
    """Return the requests a second whose KV so many devices' networks carry."""
    each = question.device.network_bytes_per_s * question.calibration.network_efficiency
    return devices * each / request_kv_bytes(question)


def request_kv_bytes(question: Question) -> float:
    """Return the KV that a mean prompt has."""
    return question.workload.prompt_tokens * question.shape.kv_token_bytes
