"""One side of `slices`: a tagged message for each slice, straight from and into the pool.

Receives are posted before the clock starts, which favours this way. The clock starts when the
sender posts its first message and stops when the receiver sees the last one complete.
"""

import base64
import time
from typing import Any

import ucxx._lib.libucxx as ucx
from ucxx._lib.arr import Array

from bench.movers.side import Pool, serve


class Slices:
    """A worker with one endpoint; for one thread."""

    def __init__(self) -> None:
        self._pending: list[Any] = []
        self._ended = 0.0

    def open(self, *, side: str, pool_slices: int, slice_bytes: int) -> dict[str, Any]:
        """Make pool and worker; answers with the worker's address."""
        self._receives = side == "target"
        self._pool = Pool(pool_slices, slice_bytes, filled=not self._receives)
        self._context = ucx.UCXContext(feature_flags=(ucx.Feature.TAG,))
        self._worker = ucx.UCXWorker(
            self._context, enable_delayed_submission=False, enable_python_future=False
        )
        self._slices = [Array(one_B) for one_B in self._pool.bytes_SB]
        return {"address": base64.b64encode(self._worker.address.tobytes()).decode()}

    def meet(self, *, peer: dict[str, Any]) -> dict[str, Any]:
        """Make the endpoint."""
        address = ucx.UCXAddress.create_from_buffer(base64.b64decode(peer["address"]))
        self._endpoint = ucx.UCXEndpoint.create_from_worker_address(
            self._worker, address, endpoint_error_handling=True
        )
        return {}

    def prepare(
        self, *, mine: list[int], theirs: list[int], initiate: bool, number: int
    ) -> dict[str, Any]:
        """Flush the caches; the receiver clears its slices and posts a receive for each."""
        self._mine, self._theirs = mine, theirs
        first = number * len(mine)
        self._tags = [ucx.UCXXTag(first + i) for i in range(len(mine))]
        if self._receives:
            self._pool.clear(mine)
        self._pool.flush_caches()
        if self._receives:
            # Completion is looked for from the end of the list.
            self._pending = [
                self._endpoint.tag_recv(self._slices[index], tag=tag)
                for index, tag in zip(mine, self._tags, strict=True)
            ][::-1]
        return {}

    def go(self) -> dict[str, Any]:
        """Send every slice; over when UCX needs none of them any more."""
        began = time.perf_counter()
        self._pending = [
            self._endpoint.tag_send(self._slices[index], tag=tag)
            for index, tag in zip(self._mine, self._tags, strict=True)
        ][::-1]
        while self.progress():
            pass
        return {"began": began}

    def finish(self) -> dict[str, Any]:
        """Wait for the last slice."""
        while self.progress():
            pass
        return {"ended": self._ended}

    def check(self) -> dict[str, Any]:
        """Raise ValueError where a slice is wrong."""
        self._pool.check(self._mine, self._theirs)
        return {}

    def progress(self) -> bool:
        """Make progress while anything is under way."""
        if not self._pending:
            return False
        self._worker.progress()
        while self._pending and self._pending[-1].completed:
            self._pending.pop().check_error()
        self._ended = time.perf_counter()
        return bool(self._pending)


if __name__ == "__main__":
    serve(Slices())
