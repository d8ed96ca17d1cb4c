"""The memory that transfers read and write, and its way to the cache that passes compute with.

On a CPU it is the cache itself. A GPU's cache has a copy in the host's memory, with the same blocks
in the same places: what passes have computed is saved to it before it is sent, and what has arrived
is loaded from it before a pass reads it. Or transfers read and write the GPU's own, and only have
to know when passes are over. Owns these copies and their order, not which blocks are whose: who
frees a block has nobody left that saves or loads it for the old owner.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.boxes import Boxes
from engine.errors import UnsupportedError
from engine.kernels.table import paged_kernels
from engine.kvcache import Allocate, KVCache
from engine.placed import placed

Call = Callable[[], None]
Ids = NDArray[np.int64]

# Pieces that are copied one by one: each takes the host some microseconds, while all in one launch
# keep multiprocessors busy.
_MOST_COPIES = 32
_MAPPED = 2  # cudaHostRegisterMapped: the GPU may read and write it itself


class CacheMemory(Protocol):
    """Keys and values for transfers, shaped as KVCache.tensor; layers by the model's numbers."""

    @property
    def tensor(self) -> Tensor:
        """The memory itself."""
        ...

    @property
    def boxes(self) -> Boxes | None:
        """What copies from it and to it where it is a GPU's; None: it is the host's."""
        ...

    @property
    def layers(self) -> range:
        """The layers that this rank has."""
        ...

    def save(self, layers: range, blocks: Sequence[int]) -> None:
        """Bring over what passes that were started have put into the blocks of some layers."""
        ...

    def then(self, call: Call) -> None:
        """Call when all that was saved until now is in the memory: at once, or from a thread."""
        ...

    def load(self, layers: range, blocks: Sequence[int]) -> None:
        """Bring over what transfers have put into the blocks of some layers; from any thread."""
        ...

    def before_pass(self) -> None:
        """Have the passes that are started from now on wait for all that was loaded."""
        ...

    def finish_passes(self) -> None:
        """Return when the passes that were started are over."""
        ...


class CacheItself:
    """The cache of a CPU; see CacheMemory. Passes are over when they return."""

    boxes = None

    def __init__(self, cache: KVCache) -> None:
        self.tensor = cache.tensor
        self.layers = cache.layers

    def save(self, layers: range, blocks: Sequence[int]) -> None:
        """See CacheMemory."""

    def then(self, call: Call) -> None:
        """See CacheMemory."""
        call()

    def load(self, layers: range, blocks: Sequence[int]) -> None:
        """See CacheMemory."""

    def before_pass(self) -> None:
        """See CacheMemory."""

    def finish_passes(self) -> None:
        """See CacheMemory."""


class Lane(Protocol):
    """Copies one after another, beside the passes; from any thread."""

    def after_passes(self) -> None:
        """Have the copies that follow wait for the passes that were started."""
        ...

    def copy(self, target: Tensor, source: Tensor, layers: range, blocks: Ids) -> None:
        """Copy blocks of some layers, by their place from 0 on, after all before.

        Both memories have the shape of KVCache.tensor.
        """
        ...

    def mark(self) -> Call:
        """Return what waits for all copies so far."""
        ...

    def before_passes(self) -> None:
        """Have the passes that are started from now on wait for all copies so far."""
        ...

    def finish_passes(self) -> None:
        """Wait for the passes that were started."""
        ...


class HostCopy:
    """A copy of a GPU's cache in the host's memory; see CacheMemory.

    All copies go over one lane: a block that has got another owner is saved and loaded for it after
    whatever was still on its way for the old one.
    """

    boxes = None

    def __init__(self, cache: KVCache, host: Tensor, lane: Lane) -> None:
        """`host` has the cache's shape and type."""
        self.tensor = host
        self.layers = cache.layers
        self._cache = cache
        self._lane = lane
        self._has_loaded = False
        self._saved = _InTurn()

    def save(self, layers: range, blocks: Sequence[int]) -> None:
        """See CacheMemory."""
        self._saved.check()
        self._lane.after_passes()
        self._copy(self.tensor, self._cache.tensor, layers, blocks)

    def then(self, call: Call) -> None:
        """See CacheMemory."""
        self._saved.put(self._lane.mark(), call)

    def load(self, layers: range, blocks: Sequence[int]) -> None:
        """See CacheMemory."""
        self._copy(self._cache.tensor, self.tensor, layers, blocks)
        self._has_loaded = True  # after the copies: whoever sees it waits for them

    def before_pass(self) -> None:
        """See CacheMemory."""
        self._saved.check()
        if self._has_loaded:
            self._has_loaded = False
            self._lane.before_passes()

    def finish_passes(self) -> None:
        """See CacheMemory."""
        self._lane.finish_passes()

    def _copy(self, target: Tensor, source: Tensor, layers: range, blocks: Sequence[int]) -> None:
        first = self.layers.start
        places = range(layers.start - first, layers.stop - first)
        ids = np.asarray(blocks, np.int64)
        if len(places) and len(ids):
            self._lane.copy(target, source, places, ids)


class CacheOnGpu:
    """A GPU's cache, which transfers read and write themselves; see CacheMemory.

    What arrives is there before anybody is told of it.
    """

    def __init__(self, cache: KVCache, lane: Lane, boxes: Boxes) -> None:
        """`lane` is asked for the order of passes only."""
        self.tensor = cache.tensor
        self.layers = cache.layers
        self.boxes = boxes
        self._lane = lane
        self._computed = _InTurn()

    def save(self, layers: range, blocks: Sequence[int]) -> None:
        """See CacheMemory."""
        self._computed.check()

    def then(self, call: Call) -> None:
        """See CacheMemory."""
        self._lane.after_passes()
        self._computed.put(self._lane.mark(), call)

    def load(self, layers: range, blocks: Sequence[int]) -> None:
        """See CacheMemory."""

    def before_pass(self) -> None:
        """See CacheMemory."""
        self._computed.check()

    def finish_passes(self) -> None:
        """See CacheMemory."""
        self._lane.finish_passes()


class _InTurn:
    """Calls from a thread of their own, each after a wait."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[Call, Call]] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._call, name="kv-saved", daemon=True)
        self._thread.start()

    def put(self, wait: Call, call: Call) -> None:
        """Call when the wait is over, after all before."""
        self.check()
        self._waiting.put((wait, call))

    def check(self) -> None:
        """Raise RuntimeError where a call has failed: for the thread that ends the instance."""
        if self._error is not None:
            raise RuntimeError("keys and values could not be saved to be sent") from self._error

    def _call(self) -> None:
        try:
            while True:
                wait, call = self._waiting.get()
                wait()
                call()
        except BaseException as error:
            self._error = error


class _CudaLane:
    """A CUDA stream; see Lane. Passes are on the device's default one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copy_blocks = paged_kernels(device).copy_blocks

    def after_passes(self) -> None:
        """See Lane."""
        self._stream.wait_stream(torch.cuda.default_stream(self._device))

    def copy(self, target: Tensor, source: Tensor, layers: range, blocks: Ids) -> None:
        """See Lane. Many pieces are one launch, which reads or writes the host's memory itself."""
        runs = extents(blocks)
        with torch.cuda.stream(self._stream):
            if len(layers) * target.shape[1] * len(runs) > _MOST_COPIES:
                self._copy_blocks(
                    target, source, layers, placed(blocks.astype(np.int32), self._device)
                )
                return
            for layer in layers:
                for plane in range(target.shape[1]):
                    for run in runs:
                        place = layer, plane, run
                        target[place].copy_(source[place], non_blocking=True)

    def warm_up(self, cache: Tensor, host: Tensor) -> None:
        """Copy a block there and back, so that no transfer waits for a compiler: both are empty."""
        with torch.cuda.stream(self._stream):
            first = placed(np.zeros(1, np.int32), self._device)
            self._copy_blocks(host, cache, range(1), first)
            self._copy_blocks(cache, host, range(1), first)
        self._stream.synchronize()

    def mark(self) -> Call:
        """See Lane."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        wait: Call = event.synchronize
        return wait

    def before_passes(self) -> None:
        """See Lane."""
        torch.cuda.default_stream(self._device).wait_stream(self._stream)

    def finish_passes(self) -> None:
        """See Lane."""
        torch.cuda.default_stream(self._device).synchronize()


def extents(blocks: Ids) -> list[slice]:
    """Return the runs of blocks that lie side by side, in their order; of one block at least."""
    runs = np.split(blocks, np.flatnonzero(np.diff(blocks) != 1) + 1)
    return [slice(int(run[0]), int(run[-1]) + 1) for run in runs]


def cache_memory(
    cache: KVCache, allocate: Allocate | None, *, host_copy: bool = True
) -> CacheMemory:
    """Return the memory for transfers; a GPU's has its copy from `allocate`, where that is given.

    Without a copy in the host's memory transfers have the GPU's own. Raises UnsupportedError where
    the host's cannot be held in place for a GPU to copy.
    """
    tensor = cache.tensor
    if tensor.device.type == "cpu":
        return CacheItself(cache)
    lane = _CudaLane(tensor.device)
    if not host_copy:
        boxes = Boxes(tensor.device)
        boxes.warm_up(tensor)
        return CacheOnGpu(cache, lane, boxes)
    host = (allocate or _zeros)(tensor.shape, tensor.dtype)
    _pin(host)
    lane.warm_up(tensor, host)
    return HostCopy(cache, host, lane)


def _zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def _pin(host: Tensor) -> None:
    """Lock memory as it is: torch's own pinned memory is of another allocator, and larger."""
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = cudart.cudaHostRegister(host.data_ptr(), host.nbytes, _MAPPED)
    if int(error):
        raise UnsupportedError(
            f"{host.nbytes >> 20} MiB of the host's memory, as much as the GPU has for KV, cannot"
            f" be locked for copies ({error}): raise the limit of locked memory (ulimit -l), or"
            " give less memory for KV"
        )
