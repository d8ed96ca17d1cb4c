"""A lane of copies that are late, in the place of a GPU's stream; see engine.cache_memory.Lane."""

import queue
import threading
import time
from collections.abc import Callable

from torch import Tensor


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

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See Lane."""
        assert target.is_contiguous()
        assert source.is_contiguous()

        def do() -> None:
            time.sleep(self._pause_s)
            target.copy_(source)
            self.copies += 1

        self._orders.put(do)

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
