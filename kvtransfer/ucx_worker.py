"""The part of ucxx that is used: a context, and workers with one endpoint each.

Owns every ucxx object and how they end. A request and its buffer are kept until the request is
terminal or its worker is destroyed, because dropping it would cancel it, and a cancelled receive
may still be written to.

Why every link has a worker of its own, on both sides (7 ms, a dozen descriptors and 4 MiB each):
a process that is killed while it writes into another's shared-memory queue leaves a hole there
that UCX 1.21 never gets past, and one that is killed while its own queue is full is never let go
of by its peers. Either way the worker is spoilt: nothing more arrives at it, or it can never be
armed again. With a worker for each link this is the end of that link only.

Why a worker is destroyed behind ucxx's back when something was outstanding on it: ucxx 0.52 keeps
a request that is cancelled while under way, its endpoint and its worker for ever (a cycle of
references). Destroying the UCP worker frees what matters and makes sure that nothing writes into
a buffer any more; what ucxx itself holds, some kilobytes, is given up. The endpoint is not closed
before: with a peer that goes away at the same moment that has crashed inside UCX (once in a few
hundred times), and it waits without a bound for what is still in the queue of a stopped one.
"""

import ctypes
import os
from collections.abc import Iterator
from typing import Any

import ucxx._lib.libucxx as ucx
from ucxx._lib.arr import Array
from ucxx.exceptions import UCXError

from kvtransfer import ucp
from kvtransfer.errors import PeerLost
from kvtransfer.transport import Bytes

# Progress steps before completions are looked at: each copies a few fragments.
_STEPS = 16

_Outstanding = tuple[Any, Any, Array]


class Context:
    """A UCX context; raises what ucxx raises where UCX cannot work."""

    def __init__(self) -> None:
        self._context = ucx.UCXContext(feature_flags=(ucx.Feature.TAG, ucx.Feature.WAKEUP))
        self._given_up = False

    def worker(self) -> "Worker":
        """Return a new worker."""
        return Worker(self, self._context)

    def give_up(self) -> None:
        """A worker was destroyed behind ucxx's back; so must the context be."""
        self._given_up = True

    def close(self) -> None:
        """Free the context; its workers must be closed."""
        if self._given_up:
            _keep_for_ever(self._context)
            ucp.destroy_context(self._context.handle)
        del self._context


class Worker:
    """One UCX worker with at most one endpoint; for one thread."""

    def __init__(self, owner: Context, context: Any) -> None:
        self._owner = owner
        self._worker = ucx.UCXWorker(
            context, enable_delayed_submission=False, enable_python_future=False
        )
        self._worker.init_blocking_progress_mode()
        self.event_fd: int = self._worker.epoll_file_descriptor
        self.address: bytes = self._worker.address.tobytes()
        self._endpoint: Any = None
        self._outstanding: list[_Outstanding] = []
        self._fresh = False

    def connect(self, address: bytes) -> None:
        """Make the endpoint to another worker; raises PeerLost where UCX cannot."""
        try:
            there = ucx.UCXAddress.create_from_buffer(address)
            self._endpoint = ucx.UCXEndpoint.create_from_worker_address(
                self._worker, there, endpoint_error_handling=True
            )
        except (UCXError, ValueError, RuntimeError) as exc:
            raise PeerLost(f"UCX cannot reach the peer: {exc}") from exc

    def transports(self) -> list[str]:
        """Return what UCX uses towards the peer; [] where it cannot say (yet)."""
        if self._endpoint is None or not self._endpoint.alive:
            return []
        return ucp.transports(self._endpoint.handle)

    def send(self, tag: int, message: Bytes, key: Any) -> None:
        """Start a send; it ends in `finished` or `close`."""
        array = Array(message)
        request = self._endpoint.tag_send(array, tag=ucx.UCXXTag(tag))
        self._outstanding.append((request, key, array))
        self._fresh = True

    def receive(self, tag: int, into: Bytes, key: Any) -> None:
        """Post a receive; it ends in `finished` or `close`."""
        array = Array(into)
        request = self._endpoint.tag_recv(array, tag=ucx.UCXXTag(tag))
        self._outstanding.append((request, key, array))
        self._fresh = True

    def progress(self) -> None:
        """Let UCX do all that it can do now, cancellations too."""
        self._worker.progress()
        self._fresh = True

    def finished(self) -> Iterator[tuple[Any, str | None]]:
        """Make progress; yield (key, error or None) of every operation that became terminal."""
        moved = self._fresh
        for _ in range(_STEPS):
            if not self._worker.progress_once():
                break
            moved = True
        if not moved:
            return
        self._fresh = False
        still: list[_Outstanding] = []
        ended: list[_Outstanding] = []
        for entry in self._outstanding:
            (ended if entry[0].completed else still).append(entry)
        self._outstanding = still
        for request, key, _ in ended:
            yield key, _error(request)

    def arm(self) -> bool:
        """Ask for an event on `event_fd`; False while something is still to be progressed."""
        return bool(self._worker.arm())

    def close(self) -> list[Any]:
        """Destroy the worker at once; return the keys of what was outstanding.

        Nothing can touch the buffers of those any more when this returns.
        """
        ended = [key for _, key, _ in self._outstanding]
        if not ended:
            if self._endpoint is not None:
                self._endpoint.close_blocking()
            self._endpoint = None
            del self._worker
            return ended
        self._owner.give_up()
        _keep_for_ever(self._worker, self._endpoint, *(entry[0] for entry in self._outstanding))
        own = _watched_by(self.event_fd)
        ucp.destroy_worker(self._worker.handle)
        for descriptor in (self.event_fd, *own):
            os.close(descriptor)
        self._outstanding.clear()
        del self._worker, self._endpoint
        return ended


def _keep_for_ever(*objects: Any) -> None:
    """Make sure that ucxx never destroys again what has been destroyed beneath it."""
    for kept in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))


def _watched_by(epoll_fd: int) -> list[int]:
    """Return the eventfd with which ucxx can interrupt waiting; the other one is UCX's own."""
    with open(f"/proc/self/fdinfo/{epoll_fd}") as lines:
        watched = [int(line.split()[1]) for line in lines if line.startswith("tfd:")]
    return [fd for fd in watched if "eventfd" in os.readlink(f"/proc/self/fd/{fd}")]


def _error(request: Any) -> str | None:
    try:
        request.check_error()
    except UCXError as exc:
        return f"{type(exc).__name__}: {exc}"
    return None
