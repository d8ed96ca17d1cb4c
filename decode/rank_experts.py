"""What one rank does when experts change places: reads what comes to it, and puts it in.

Owns a thread that reads, and what it has read until the step that is told to switch. Which experts
move is the balancer's.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from decode.orders import Loads, Order, Placing
from engine.dispatch import ExpertMap
from engine.errors import EngineError
from engine.expert_moves import Staged, stage, switch
from engine.runner import ModelRunner
from engine.weights import Reader
from service.ranks.follower import Orders

# The thread rests so many times as long as it reads: it takes a quarter of a core, and of what
# disk and memory give one thread.
_RESTS = 3.0


class _Stopped(EngineError):
    """The rank ends."""


class RankExperts:
    """A rank's experts in an instance where ranks have different ones.

    May be set, and are then told: `on_loads`, in the step loop's thread, what the rank has counted;
    `on_staged` the number of a placing that it has read, and what went wrong, if anything did;
    `on_switch`, in the step loop's thread, the seconds that a switch took.
    """

    def __init__(self, runner: ModelRunner, folder: Path) -> None:
        """The runner has been loaded from `folder` a moment ago; raises WeightError."""
        assert runner.config.moe is not None
        self._experts = runner.experts
        self._num_experts = runner.config.moe.num_experts
        self._ep_rank = runner.layout.ep_rank
        self._reader = Reader(folder, self._rest)
        # By number: the next layer's may be read while the step that switches is on its way.
        self._staged: dict[int, Staged] = {}
        self._stopping = threading.Event()
        self._orders = Orders("decode-experts")
        self.on_loads: Callable[[Loads], None] = lambda loads: None
        self.on_staged: Callable[[int, str], None] = lambda number, failed: None
        self.on_switch: Callable[[float], None] = lambda seconds: None

    # ---- any thread

    def start(self) -> None:
        """Start the thread that reads."""
        self._orders.start()

    def close(self) -> None:
        """Stop it, also in the middle."""
        self._stopping.set()
        self._orders.stop()

    def later(self, call: Callable[[], object]) -> None:
        """Have something done in the thread that reads."""
        self._orders.put(call)

    def stage(self, placing: Placing) -> None:
        """Read what a placing brings to this rank; `on_staged` hears of the end."""
        self._orders.put(partial(self._stage, placing))

    # ---- the step loop's thread

    def act(self, order: Order) -> None:
        """Do what comes with a step, before it."""
        if order.switch:
            began_s = time.perf_counter()
            switch(self._experts, self._staged.pop(order.switch))
            self.on_switch(time.perf_counter() - began_s)
        if order.take_loads:
            loads = self._experts.take_loads()
            self.on_loads({layer: loads_E.tolist() for layer, loads_E in loads.items()})

    # ---- the thread that reads

    def _stage(self, placing: Placing) -> None:
        to = ExpertMap(self._num_experts, placing.slots)
        try:
            staged = stage(self._experts, self._ep_rank, placing.layer, to, self._reader.fill)
        except _Stopped:
            return
        except EngineError as error:
            self.on_staged(placing.number, str(error))
            return
        self._staged[placing.number] = staged
        self.on_staged(placing.number, "")

    def _rest(self, seconds: float) -> None:
        if self._stopping.wait(_RESTS * seconds):
            raise _Stopped("the rank ends")
