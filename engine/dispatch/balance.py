"""Where experts should be, by how many tokens they have had. Pure.

An expert that gets much has replicas, as many as it takes, and the ranks' loads are alike. Source:
the balancer that DeepSeek-V3 describes (arXiv 2412.19437, section 3.4), without its node groups.

Legend: E logical experts.
"""

import heapq
from collections.abc import Sequence

Slots = tuple[tuple[int, ...], ...]  # the experts of each ep rank, as in an ExpertMap

# Exchanges between two ranks that are tried to even out what the greedy choice has left.
_EXCHANGES = 64


def balanced(loads_E: Sequence[int], now: Slots) -> Slots:
    """Return a map with as many slots on each rank as there are now, for loads like these.

    What can stay in its slot stays: all other slots have to be filled with other weights. An
    expert has at most one replica on a rank.
    """
    sizes = [len(held) for held in now]
    weights = _weights_of_replicas(loads_E, sum(sizes), len(sizes))
    ranks = _packed(weights, sizes)
    _even_out(ranks, {expert: weight for expert, weight, _ in weights})
    return _kept_in_place(ranks, now)


def rank_loads(loads_E: Sequence[int], slots: Slots) -> list[float]:
    """Return what each rank gets of these loads, where replicas share alike."""
    replicas = [0] * len(loads_E)
    for held in slots:
        for expert in held:
            replicas[expert] += 1
    return [sum(loads_E[expert] / replicas[expert] for expert in held) for held in slots]


def imbalance(loads_E: Sequence[int], slots: Slots) -> float:
    """Return the hottest rank's load divided by the mean; 1 is even, also where there is none."""
    loads = rank_loads(loads_E, slots)
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0


def _weights_of_replicas(
    loads_E: Sequence[int], slots: int, ranks: int
) -> list[tuple[int, float, int]]:
    """Return (expert, load of each replica, replicas): each next one goes to the hottest."""
    replicas = [1] * len(loads_E)
    hottest = [(-float(load), expert) for expert, load in enumerate(loads_E)]
    heapq.heapify(hottest)
    spare = slots - len(loads_E)
    while spare and hottest:
        _, expert = heapq.heappop(hottest)
        if replicas[expert] < ranks:
            replicas[expert] += 1
            spare -= 1
            heapq.heappush(hottest, (-loads_E[expert] / replicas[expert], expert))
    return [(e, load / replicas[e], replicas[e]) for e, load in enumerate(loads_E)]


def _packed(weights: list[tuple[int, float, int]], sizes: list[int]) -> list[set[int]]:
    """Put replicas on ranks, the hottest first, each where there is least."""
    ranks: list[set[int]] = [set() for _ in sizes]
    loads = [0.0] * len(sizes)
    replicas = [(e, weight) for e, weight, count in weights for _ in range(count)]
    for expert, weight in sorted(replicas, key=lambda item: (-item[1], item[0])):
        free = [r for r, size in enumerate(sizes) if len(ranks[r]) < size]
        able = [r for r in free if expert not in ranks[r]]
        if able:
            rank = min(able, key=lambda r: (loads[r], r))
        else:
            # All that have room have one. A full rank without it has two more experts than one of
            # those at least, and gives it one.
            rank = next(r for r in range(len(ranks)) if expert not in ranks[r])
            moved = min(ranks[rank] - ranks[free[0]])
            ranks[rank].remove(moved)
            ranks[free[0]].add(moved)
            moved_weight = weights[moved][1]
            loads[rank] -= moved_weight
            loads[free[0]] += moved_weight
        ranks[rank].add(expert)
        loads[rank] += weight
    return ranks


def _even_out(ranks: list[set[int]], weight_of: dict[int, float]) -> None:
    """Exchange experts of the hottest rank and the coldest as long as that helps."""
    loads = [sum(weight_of[e] for e in held) for held in ranks]
    for _ in range(_EXCHANGES):
        hot = max(range(len(ranks)), key=loads.__getitem__)
        cold = min(range(len(ranks)), key=loads.__getitem__)
        gap = loads[hot] - loads[cold]
        best = min(
            (
                (abs(gap - 2 * (weight_of[x] - weight_of[y])), x, y)
                for x in ranks[hot] - ranks[cold]
                for y in ranks[cold] - ranks[hot]
            ),
            default=(gap, 0, 0),
        )
        left, x, y = best
        if left >= gap * (1 - 1e-9):
            return
        ranks[hot] ^= {x, y}
        ranks[cold] ^= {x, y}
        loads[hot] += weight_of[y] - weight_of[x]
        loads[cold] += weight_of[x] - weight_of[y]


def _kept_in_place(ranks: list[set[int]], now: Slots) -> Slots:
    """Give each set to the rank that has most of it, and keep each expert's slot where it is."""
    pairs = sorted(
        (
            (len(held.intersection(old)), r, n)
            for r, held in enumerate(ranks)
            for n, old in enumerate(now)
        ),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )
    set_of: dict[int, int] = {}
    for _, r, n in pairs:
        if n not in set_of and r not in set_of.values() and len(ranks[r]) == len(now[n]):
            set_of[n] = r
    found = []
    for n, old in enumerate(now):
        wanted = ranks[set_of[n]]
        new = iter(sorted(wanted.difference(old)))
        found.append(tuple(e if e in wanted else next(new) for e in old))
    return tuple(found)
