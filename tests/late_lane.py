"""A lane of copies that are late, in the place of a GPU's stream; see engine.cache_memory.Lane."""

import queue
import threading
import time
from collections.abc import Callable
from functools import partial

from torch import Tensor

from engine.cache_memory import Ids, extents


class LateLane:
    """Copies in order on a thread of its own, each after a pause.

    Passes of a CPU are over when they return: copies need not wait for them.
    """

    def __init__(self, pause_s: float = 0.001) -> None:
        self.copies = 0
        self._pause_s = pause_s
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._main, name="late-lane", daemon=True).start()

    def after_passes(self) -> None:
        """See Lane."""

    def copy(self, target: Tensor, source: Tensor, layers: range, blocks: Ids) -> None:
        """See Lane."""
        for layer in layers:
            for plane in range(target.shape[1]):
                for run in extents(blocks):
                    place = layer, plane, run
                    self._orders.put(partial(self._piece, target[place], source[place]))

    def _piece(self, target: Tensor, source: Tensor) -> None:
        time.sleep(self._pause_s)
        target.copy_(source)
        self.copies += 1

    def mark(self) -> Callable[[], None]:
        """See Lane."""
        reached = threading.Event()
        self._orders.put(reached.set)

        def wait() -> None:
            reached.wait()

        return wait

    def before_passes(self) -> None:
        """See Lane."""
        self.mark()()

    def finish_passes(self) -> None:
        """See Lane."""

    def _main(self) -> None:
        while True:
            self._orders.get()()
