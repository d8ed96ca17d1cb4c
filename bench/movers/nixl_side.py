"""One side of `nixl`; runs under the peer's interpreter and imports nothing of this project.

What is measured favours the peer: descriptor lists and the transfer's handle are made before the
clock starts. It starts at the call that begins the transfer and stops when the initiator (the
sender for WRITE, the receiver for READ) sees DONE; no notification to the other side is asked for.
The side that does not initiate spins on NIXL's progress, or leaves it to NIXL's progress thread
where there is one; then it sleeps.
"""

import base64
import importlib
import importlib.metadata
import mmap
import os
import select
import sys
import time
from typing import Any

import numpy as np
import numpy.typing as npt

_FLUSH_BYTES = 64 * 1024 * 1024
_GIVE_UP_S = 30.0


class Side:
    """An agent with one pool of slices in page-aligned memory; `pair` says what each line means."""

    def __init__(self) -> None:
        self._waits = False

    def open(
        self, *, side: str, pool_slices: int, slice_bytes: int, progress_thread: bool
    ) -> dict[str, Any]:
        """Make agent and pool; answers with what the other side's agent must know."""
        api = importlib.import_module("nixl_cu12._api")
        config = api.nixl_agent_config(progress_thread, False, 0, backends=[])
        self._agent = api.nixl_agent(side, config)
        self._agent.create_backend("UCX", {})
        self._receives, self._thread = side == "target", progress_thread
        self._words_SW = np.frombuffer(
            mmap.mmap(-1, pool_slices * slice_bytes), dtype=np.uint64
        ).reshape(pool_slices, slice_bytes // 8)
        for index in range(pool_slices):
            self._words_SW[index] = 0 if self._receives else self._pattern(index)
        self._flush = np.ones(_FLUSH_BYTES, dtype=np.uint8)
        self._agent.register_memory(
            [(self._words_SW.ctypes.data, self._words_SW.nbytes, 0, "")], "DRAM"
        )
        return {
            "version": importlib.metadata.version("nixl-cu12"),
            "metadata": base64.b64encode(self._agent.get_agent_metadata()).decode(),
            "base": self._words_SW.ctypes.data,
        }

    def meet(self, *, peer: dict[str, Any]) -> dict[str, Any]:
        """Learn of the other side's agent and memory."""
        self._peer = self._agent.add_remote_agent(base64.b64decode(peer["metadata"]))
        self._peer_base = peer["base"]
        return {}

    def prepare(
        self, *, mine: list[int], theirs: list[int], initiate: bool, number: int, operation: str
    ) -> dict[str, Any]:
        """Clear what is written to, flush the caches, make the handle where this side initiates."""
        self._mine, self._theirs = mine, theirs
        for index in mine if self._receives else ():
            self._words_SW[index] = 0
        if initiate:
            self._handle = self._agent.initialize_xfer(
                operation,
                self._slices(self._words_SW.ctypes.data, mine),
                self._slices(self._peer_base, theirs),
                self._peer,
            )
        self._waits = not initiate
        self._flush += 1
        return {}

    def go(self) -> dict[str, Any]:
        """Move all slices."""
        began = time.perf_counter()
        state = self._agent.transfer(self._handle)
        while state == "PROC" and time.perf_counter() - began < _GIVE_UP_S:
            state = self._agent.check_xfer_state(self._handle)
        ended = time.perf_counter()
        if state != "DONE":
            raise RuntimeError(f"the transfer is {state} after {ended - began:.1f} s")
        self._agent.release_xfer_handle(self._handle)
        return {"began": began, "ended": ended}

    def finish(self) -> dict[str, Any]:
        """Stop reacting to the other side."""
        self._waits = False
        return {}

    def check(self) -> dict[str, Any]:
        """Raise ValueError where a slice does not hold what its source does."""
        for index, source in zip(self._mine, self._theirs, strict=True):
            if not np.array_equal(self._words_SW[index], self._pattern(source)):
                raise ValueError(f"slice {index} does not hold the bytes of source {source}")
        return {}

    def next_line(self) -> bytes:
        """Return the next command; make progress until it comes, where that is this side's part."""
        while self._waits and not self._thread and not select.select([sys.stdin], [], [], 0)[0]:
            for _ in range(8):
                self._agent.get_new_notifs()
        return sys.stdin.buffer.readline()

    def _slices(self, base: int, indices: list[int]) -> Any:
        size = self._words_SW.shape[1] * 8
        descriptors = np.zeros((len(indices), 3), dtype=np.uint64)
        descriptors[:, 0] = base + np.array(indices, dtype=np.uint64) * size
        descriptors[:, 1] = size
        return self._agent.get_xfer_descs(descriptors, "DRAM")

    def _pattern(self, index: int) -> npt.NDArray[np.uint64]:
        words = self._words_SW.shape[1]
        return np.arange(index << 32, (index << 32) + words, dtype=np.uint64)


def main() -> None:
    """Answer a pair's lines until there are no more."""
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    side = Side()
    commands = {
        "open": side.open,
        "meet": side.meet,
        "prepare": side.prepare,
        "go": side.go,
        "finish": side.finish,
        "check": side.check,
    }
    # On its path, unlike the rest of this project.
    importlib.import_module("answers").serve(commands, side.next_line)


if __name__ == "__main__":
    main()
