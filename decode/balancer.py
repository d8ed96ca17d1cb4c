"""When experts change places while the instance serves, and to where: the first rank's decisions.

Owns the maps, and the round that is under way: loads are asked for, layers that gain by it get
placings one after another, each is read by all ranks beside the steps, and put in force by all
before the same step. What a step waits for is bounded: a layer whose experts are many to move gets
there in several placings. Reads and moves nothing itself.

A round's calls come from three threads: the step loop's (`order`), those that hear ranks
(`took_loads`, `staged`), and one in the background, where plans are made.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from decode.orders import NOTHING, Loads, Order, Placing
from engine.dispatch.balance import Slots, balanced, imbalance, in_parts

log = logging.getLogger(__name__)

# A layer is placed anew where its hottest rank comes so much nearer to the mean.
_WORTH = 0.05
# Choices for each expert, on average, below which loads are chance: they are kept for later.
_LEAST_CHOICES = 16
# How often loads are asked for where nothing is moved: for the metrics.
_REPORT_S = 30.0
# Between two layers' plans, so that the step loop gets on.
_REST_S = 0.002


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the metrics say of experts.

    Attributes:
        tokens: How many chose each expert since the start, by layer.
        imbalance: The hottest rank's tokens divided by the mean, by layer, in the last round.
        before, after: The same, mean over the layers that were placed anew last: before, and as
            the same loads would have been after.
        rounds: In which some were, since the start.
        switches: Placings that were put in force since the start.
    """

    tokens: Mapping[int, list[int]]
    imbalance: Mapping[int, float]
    before: float
    after: float
    rounds: int
    switches: int


@dataclass(kw_only=True)
class _Round:
    """What is awaited: loads, a plan, ranks that read a placing, a step; nothing when `idle`."""

    state: str = "idle"
    missing: set[int] = field(default_factory=set)
    placing: Placing | None = None
    queue: deque[tuple[int, Slots]] = field(default_factory=deque)


class Balancer:
    """Decides for an instance of `ranks` ranks whose layers begin with the slots `even`.

    Args:
        interval_s: From round to round at least; 0 for counting only.
        most_slots: Of a rank that change in one placing, if they can be told apart.
        stage: Has all ranks read what a placing brings them; each answers with `staged`.
        later: Runs something in the background.
        rest: Called between two layers' plans.
    """

    def __init__(
        self,
        *,
        even: Slots,
        ranks: int,
        interval_s: float,
        most_slots: int,
        stage: Callable[[Placing], None],
        later: Callable[[Callable[[], object]], None],
        clock: Callable[[], float] = time.monotonic,
        rest: Callable[[], None] = lambda: time.sleep(_REST_S),
    ) -> None:
        self._even = even
        self._ranks = ranks
        self._moves = interval_s > 0
        self._interval_s = interval_s or _REPORT_S
        self._most_slots = most_slots
        self._stage = stage
        self._later = later
        self._clock = clock
        self._rest = rest
        self._lock = threading.Lock()
        self._round = _Round()
        self._due_s = clock() + self._interval_s
        self._number = 0
        self._slots: dict[int, Slots] = {}
        self._recent: dict[int, list[int]] = {}
        self._tokens: dict[int, list[int]] = {}
        self._imbalance: dict[int, float] = {}
        self._before = self._after = 1.0
        self._rounds = self._switches = 0

    def order(self) -> Order:
        """Return what all ranks do before the step that begins now; for the step loop."""
        with self._lock:
            if self._round.state == "ready":
                return self._switch()
            if self._round.state == "idle" and self._clock() >= self._due_s:
                self._due_s = self._clock() + self._interval_s
                self._round = _Round(state="loads", missing=set(range(self._ranks)))
                return Order(take_loads=True)
        return NOTHING

    def took_loads(self, rank: int, loads: Loads) -> None:
        """A rank says what it has counted; every token is counted on one of them."""
        with self._lock:
            for layer, loads_E in loads.items():
                _add(self._recent, layer, loads_E)
                _add(self._tokens, layer, loads_E)
            self._round.missing.discard(rank)
            if self._round.missing:
                return
            self._round.state = "planning"
            known = {
                layer: loads_E
                for layer, loads_E in self._recent.items()
                if sum(loads_E) >= _LEAST_CHOICES * len(loads_E)
            }
            for layer in known:
                del self._recent[layer]
        self._later(lambda: self._plan(known))

    def staged(self, rank: int, number: int, failed: str = "") -> None:
        """A rank has read what a placing brings it, or `failed` says why not."""
        with self._lock:
            placing = self._round.placing
            if placing is None or placing.number != number:
                return
            if failed:
                # The ranks go on with what they have: serving needs nothing new.
                log.error("experts stay where they are from now on: rank %d: %s", rank, failed)
                self._moves = False
                self._round = _Round()
                return
            self._round.missing.discard(rank)
            if not self._round.missing:
                self._round.state = "ready"

    def figures(self) -> Figures:
        """Return what is known now; from any thread."""
        with self._lock:
            return Figures(
                tokens={layer: list(loads_E) for layer, loads_E in self._tokens.items()},
                imbalance=dict(self._imbalance),
                before=self._before,
                after=self._after,
                rounds=self._rounds,
                switches=self._switches,
            )

    # ---- in the background

    def _plan(self, loads: Mapping[int, list[int]]) -> None:
        """Find the layers that gain by another map, the worst first, and begin with that."""
        now = {layer: self._slots.get(layer, self._even) for layer in loads}
        found, ratios = [], {}
        for layer, loads_E in loads.items():
            before = ratios[layer] = imbalance(loads_E, now[layer])
            if self._moves and before > 1 + _WORTH:
                slots = balanced(loads_E, now[layer])
                after = imbalance(loads_E, slots)
                if after < before * (1 - _WORTH):
                    found.append((before, after, layer, slots))
                self._rest()
        found.sort(key=lambda each: each[1] - each[0])
        parts = [
            (layer, part)
            for _, _, layer, slots in found
            for part in in_parts(now[layer], slots, self._most_slots)
        ]
        with self._lock:
            self._imbalance.update(ratios)
            if found:
                self._note(found)
            self._round.queue.extend(parts)
        self._stage_next()

    def _stage_next(self) -> None:
        with self._lock:
            if not self._round.queue:
                self._round = _Round()
                return
            self._number += 1
            layer, slots = self._round.queue.popleft()
            placing = Placing(number=self._number, layer=layer, slots=slots)
            self._round.placing = placing
            self._round.missing = set(range(self._ranks))
            self._round.state = "staging"
        self._stage(placing)

    # ---- with the lock held

    def _switch(self) -> Order:
        """Put the placing in force that all ranks have read, and go on with the next one."""
        placing = self._round.placing
        assert placing is not None
        self._slots[placing.layer] = placing.slots
        self._switches += 1
        self._round.placing = None
        self._round.state = "planning"
        self._later(self._stage_next)
        return Order(switch=placing.number)

    def _note(self, found: Iterable[tuple[float, float, int, Slots]]) -> None:
        self._rounds += 1
        before, after, layers, _ = zip(*found, strict=True)
        self._before, self._after = sum(before) / len(layers), sum(after) / len(layers)
        log.info(
            "experts of %d layers move: the hottest rank has %.2f times the mean, then %.2f",
            *(len(layers), self._before, self._after),
        )


def _add(sums: dict[int, list[int]], layer: int, loads_E: Iterable[int]) -> None:
    known = sums.get(layer)
    sums[layer] = (
        list(loads_E)
        if known is None
        else [old + new for old, new in zip(known, loads_E, strict=True)]
    )
