"""The one thread in which an agent does everything.

Owns the thread, the queue of calls from other threads, and the time-outs of waiting. An agent
is a `Handler`: it is only ever entered from this thread, so it needs no locks.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Protocol, TypeVar

from kvtransfer.transport import Happening, Transport

logger = logging.getLogger(__name__)
T = TypeVar("T")

CLOSE_S = 10.0
SOON_S = 0.05


class Handler(Protocol):
    """What an agent does in its thread."""

    def handle(self, happening: Happening) -> None:
        """Act on one thing that the transport reports."""
        ...

    def settle(self) -> bool:
        """Do what the last calls and happenings made possible; whether more can be done now."""
        ...

    def tick(self) -> float:
        """Check every deadline; return the seconds until it must be called again."""
        ...

    def shut(self) -> None:
        """Say goodbye and drop everything; the transport closes next."""
        ...


class AgentLoop:
    """Runs one handler over one transport until closed."""

    def __init__(
        self,
        name: str,
        transport: Transport,
        handler: Handler,
        clock: Callable[[], float],
    ) -> None:
        self._transport = transport
        self._handler = handler
        self._clock = clock
        self._calls: deque[Callable[[], None]] = deque()
        self._woken = False
        self._closing = False
        self._due = 0.0
        self._more = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self, first: Callable[[], T], timeout_s: float) -> T:
        """Start the thread; return what `first` returned in it, or close and raise its error."""
        done: Future[T] = Future()

        def call() -> None:
            try:
                done.set_result(first())
            except Exception as exc:
                done.set_exception(exc)

        self.call(call)
        self._thread.start()
        try:
            return done.result(timeout_s)
        except BaseException:
            self.close()
            raise

    def call(self, function: Callable[[], None]) -> None:
        """Have `function` called in the agent's thread, in order; returns at once.

        After `close` calls are dropped.
        """
        if self._closing:
            return
        self._calls.append(function)
        # One wake-up serves all calls until the thread has taken them; a second thread that sees
        # the flag still set has appended before the queue is read.
        if not self._woken:
            self._woken = True
            self._transport.wake()

    def close(self) -> None:
        """Run the calls made so far, shut the handler, end the thread; bounded in time."""
        if not self._closing:
            self._closing = True
            self._transport.wake()
            if self._thread.ident is None:
                self._transport.close()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                logger.error("transfer agent %s did not stop in %.0f s", self._thread.name, CLOSE_S)

    def _run(self) -> None:
        try:
            while not self._closing:
                self._turn()
            self._take_calls()
        except Exception:
            logger.exception("transfer agent %s ends on an error", self._thread.name)
        finally:
            self._closing = True
            self._guard(self._handler.shut, None)
            self._calls.clear()
            self._transport.close()

    def _turn(self) -> None:
        idle = not self._more and not self._calls and not self._closing
        wait = max(0.0, self._due - self._clock()) if idle else 0.0
        happenings = self._transport.poll(wait)
        # Calls first: a grant that was opened before its data was sent must be known by now.
        if self._take_calls() or happenings:
            # There may be new things with deadlines now.
            self._due = min(self._due, self._clock() + SOON_S)
        for happening in happenings:
            self._guard(partial(self._handler.handle, happening), None)
        self._more = self._guard(self._handler.settle, False)
        now = self._clock()
        if now >= self._due:
            self._due = now + self._guard(self._handler.tick, SOON_S)

    def _take_calls(self) -> int:
        self._woken = False
        count = len(self._calls)
        for _ in range(count):
            self._guard(self._calls.popleft(), None)
        return count

    def _guard(self, function: Callable[[], T], instead: T) -> T:
        """A bug met in one call must not end all other transfers; it is logged, they go on."""
        try:
            return function()
        except Exception:
            logger.exception("error in transfer agent %s", self._thread.name)
            return instead
