"""Where experts should be, by how many tokens they have had. Pure.

An expert that gets much has replicas, as many as it takes, and the ranks' loads are alike. Source:
the balancer that DeepSeek-V3 describes (arXiv 2412.19437, section 3.4), without its node groups.

Legend: E logical experts.
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

Slots = tuple[tuple[int, ...], ...]  # the experts of each ep rank, as in an ExpertMap

_Place = tuple[int, int]  # rank, slot
_SlotsOf = defaultdict[int, set[_Place]]  # of each expert

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


def in_parts(now: Slots, to: Slots, most: int) -> list[Slots]:
    """Return maps that lead from one to the other, the last one included; none where they are one.

    Every expert has a slot in each of them. From one to the next not more than `most` slots of a
    rank change, but where several must at once: when one expert takes the only slot of another.
    """
    current, found = [list(held) for held in now], []
    changing = {
        (rank, slot): expert
        for rank, held in enumerate(to)
        for slot, expert in enumerate(held)
        if now[rank][slot] != expert
    }
    slots_of: _SlotsOf = defaultdict(set)
    for rank, held in enumerate(now):
        for slot, expert in enumerate(held):
            slots_of[expert].add((rank, slot))
    part: Counter[int] = Counter()  # slots of each rank that change
    while changing:
        together = _changed_together(current, changing, slots_of)
        more = Counter(rank for rank, _ in together)
        if part and max((part + more).values()) > most:
            found.append(tuple(map(tuple, current)))
            part.clear()
        part += more
        for rank, slot in together:
            current[rank][slot] = changing.pop((rank, slot))
    return [*found, tuple(map(tuple, current))] if part else []


def _changed_together(
    current: list[list[int]], changing: dict[_Place, int], slots_of: _SlotsOf
) -> set[_Place]:
    """Return one of the slots that change, and those without which an expert would have none.

    They have changed in `slots_of`.
    """
    found: set[_Place] = set()
    following = [next(iter(changing))]
    while following:
        place = following.pop()
        found.add(place)
        leaving = current[place[0]][place[1]]
        slots_of[leaving].discard(place)
        slots_of[changing[place]].add(place)
        if not slots_of[leaving]:
            following.append(next(at for at, expert in changing.items() if expert == leaving))
    return found


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
        from_hot, from_cold = sorted(ranks[hot] - ranks[cold]), sorted(ranks[cold] - ranks[hot])
        if not from_hot or not from_cold:
            return
        # All pairs at once: in Python they would take the step loop's interpreter for too long.
        hot_X, cold_Y = (
            np.array([weight_of[e] for e in each], dtype=np.float64)
            for each in (from_hot, from_cold)
        )
        left_XY = np.abs(gap - 2 * (hot_X[:, None] - cold_Y))
        at_x, at_y = divmod(int(left_XY.argmin()), len(from_cold))
        if left_XY[at_x, at_y] >= gap * (1 - 1e-9):
            return
        x, y = from_hot[at_x], from_cold[at_y]
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
