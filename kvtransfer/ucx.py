"""KV transport over UCX: data as tagged messages, control over a TCP socket beside it.

Owns a UCX context and its workers, which only the thread that polls may touch, and one socket
and one endpoint for each link.

Why the control lane is a socket and not tagged messages: it passes while data is stalled; the
listener binds to one host (ucxx's own binds to all); a stranger is turned away before UCX sees
anything of it, and cannot fill UCX's unexpected queue; and the kernel closes it when a process is
killed, so that a death shows in milliseconds where UCX over shared memory needs its keepalive.
"""

import logging
import os
import selectors
import socket
import time
from typing import TYPE_CHECKING, Any

from kvtransfer import ucx_settings
from kvtransfer.control_socket import Broken, ControlSocket
from kvtransfer.transport import (
    Accepted,
    Bytes,
    Connected,
    ControlArrived,
    Done,
    Happening,
    Lost,
)
from kvtransfer.ucx_settings import UcxSettings

if TYPE_CHECKING:
    from kvtransfer.ucx_worker import Worker

logger = logging.getLogger(__name__)

_NAP_S = (20e-6, 1e-3)
_BACKLOG = 128


class UcxLink:
    """One link; see transport.Link."""

    def __init__(self, owner: "UcxTransport", control: ControlSocket, *, connected: bool) -> None:
        self._owner = owner
        self.control = control
        self.connected = connected
        self.closed = False
        self._worker: Worker | None = None
        self._carrier = ""

    @property
    def worker(self) -> "Worker":
        """The link's worker; made when first needed, so that a stranger gets none."""
        if self._worker is None:
            self._worker = self._owner.new_worker()
        return self._worker

    @property
    def data_address(self) -> bytes:
        """See Link."""
        return self.worker.address

    @property
    def carrier(self) -> str:
        """See Link."""
        if not self._carrier and self._worker is not None:
            names = self._worker.transports()
            bulk = [name for name in names if name != "tcp"] or names
            if bulk:
                self._carrier = "ucx/" + "+".join(bulk)
        return self._carrier or "ucx"

    def send_control(self, message: bytes) -> None:
        """See Link."""
        if not self.closed:
            self._owner.send_control(self, message)

    def open_data(self, address: bytes) -> None:
        """See Link."""
        self.worker.connect(address)

    def send(self, tag: int, message: Bytes, key: Any) -> None:
        """See Link."""
        if self.closed:
            self._owner.report(Done(self, key, "the link is closed"))
        else:
            self.worker.send(tag, message, (self, key))

    def receive(self, tag: int, into: Bytes, key: Any) -> None:
        """See Link."""
        if self.closed:
            self._owner.report(Done(self, key, "the link is closed"))
        else:
            self.worker.receive(tag, into, (self, key))

    def close(self) -> None:
        """See Link."""
        if not self.closed:
            _ = self.carrier  # UCX cannot be asked for it any more afterwards
            self.closed = True
            self._owner.drop(self, self._worker)
            self._worker = None


class UcxTransport:
    """A UCX context and its links; see transport.Transport."""

    def __init__(self, settings: UcxSettings | None = None) -> None:
        """Make the context; raises what ucxx raises where UCX cannot work."""
        self._settings = settings or UcxSettings()
        # UCX and ucxx read the environment when they are loaded, hence not at the top.
        ucx_settings.apply(self._settings)
        from kvtransfer.ucx_worker import Context

        self._context = Context()
        self._workers: list[Worker] = []
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake_fd, selectors.EVENT_READ, None)
        self._listener: socket.socket | None = None
        self._links: set[UcxLink] = set()
        self._out: list[Happening] = []
        self._closed = False

    def listen(self, host: str, port: int) -> tuple[str, int]:
        """See Transport."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, listener)
        self._listener = listener
        bound = listener.getsockname()
        return bound[0], bound[1]

    def connect(self, host: str, port: int) -> UcxLink:
        """See Transport. Raises OSError for an address that cannot be tried at all.

        `host` must be an address or a name from the hosts file: a lookup would stall the thread.
        """
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, proto)
        sock.setblocking(False)
        try:
            sock.connect(address)
        except BlockingIOError:
            pass
        except OSError:
            sock.close()
            raise
        link = UcxLink(self, ControlSocket(sock), connected=False)
        self._selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, link)
        self._links.add(link)
        return link

    def poll(self, timeout_s: float) -> list[Happening]:
        """See Transport.

        Spins only for a moment after something happened, then arms the worker and sleeps in one
        selector with the sockets: spinning in Python would keep the GIL from compute threads, and
        on a busy machine the core from the peer.
        """
        now = time.monotonic()
        until = now + timeout_s
        spin_until = now + min(timeout_s, self._settings.spin_s)
        nap_s = _NAP_S[0]
        while True:
            self._finish()
            woken = self._sockets(0.0)
            if self._out or woken:
                break
            now = time.monotonic()
            if now >= until:
                break
            if now < spin_until:
                continue
            if all(worker.arm() for worker in self._workers):
                self._sockets(until - now)
                for worker in self._workers:
                    worker.progress()
                self._finish()
                break
            # UCX has something under way of which it cannot notify us (a full shared-memory
            # queue, say): look again soon, and let the peer have the core.
            time.sleep(min(nap_s, until - now))
            nap_s = min(nap_s * 2, _NAP_S[1])
        out, self._out = self._out, []
        return out

    def wake(self) -> None:
        """See Transport."""
        if not self._closed:
            os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """See Transport."""
        if self._closed:
            return
        self._closed = True
        for link in list(self._links):
            link.close()
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
        self._selector.close()
        os.close(self._wake_fd)
        self._out.clear()
        self._context.close()

    # ------------------------------------------------------------------------- used by UcxLink

    def report(self, happening: Happening) -> None:
        """Queue for the next poll."""
        self._out.append(happening)

    def send_control(self, link: UcxLink, message: bytes) -> None:
        """Send on a link's socket; a broken one is reported as lost."""
        try:
            link.control.send(message)
            self._watch(link)
        except Broken as exc:
            self._break(link, str(exc))

    def new_worker(self) -> "Worker":
        """Return a worker that takes part in polling."""
        worker = self._context.worker()
        self._workers.append(worker)
        self._selector.register(worker.event_fd, selectors.EVENT_READ, worker)
        return worker

    def drop(self, link: UcxLink, worker: "Worker | None") -> None:
        """Close a link's socket and worker; its outstanding operations are terminal then."""
        self._forget_socket(link)
        link.control.close()
        self._links.discard(link)
        if worker is not None:
            self._selector.unregister(worker.event_fd)
            self._workers.remove(worker)
            self._out += [Done(link, key, "the link is closed") for _, key in worker.close()]

    # ------------------------------------------------------------------------------- internals

    def _finish(self) -> None:
        """Make progress everywhere; collect what became terminal."""
        for worker in self._workers:
            for (link, key), error in worker.finished():
                self._out.append(Done(link, key, error))

    def _sockets(self, timeout_s: float) -> bool:
        """Serve readable and writable sockets; whether `wake` was called."""
        woken = False
        for selected, mask in self._selector.select(timeout_s):
            if selected.data is None:
                os.eventfd_read(self._wake_fd)
                woken = True
            elif selected.data is self._listener:
                self._accept()
            elif isinstance(selected.data, UcxLink):
                self._serve(selected.data, mask)
        return woken

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError as exc:
            logger.warning("accept failed: %s", exc)
            return
        link = UcxLink(self, ControlSocket(sock), connected=True)
        self._links.add(link)
        self._selector.register(sock, selectors.EVENT_READ, link)
        self._out.append(Accepted(link))

    def _serve(self, link: UcxLink, mask: int) -> None:
        if not link.connected:
            error = link.control.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                self._break(link, os.strerror(error))
                return
            link.connected = True
            self._watch(link)
            self._out.append(Connected(link))
            return
        try:
            if mask & selectors.EVENT_WRITE:
                link.control.flush()
                self._watch(link)
        except Broken as exc:
            self._break(link, str(exc))
            return
        if mask & selectors.EVENT_READ:
            messages, ended = link.control.receive()
            self._out += [ControlArrived(link, message) for message in messages]
            if ended is not None:
                self._break(link, ended)

    def _watch(self, link: UcxLink) -> None:
        """Wait for a socket to become writable only while something waits to be written."""
        events = selectors.EVENT_READ
        if link.control.backlogged or not link.connected:
            events |= selectors.EVENT_WRITE
        selected = self._selector.get_map().get(link.control.socket)
        if selected is not None and selected.events != events:
            self._selector.modify(link.control.socket, events, link)

    def _break(self, link: UcxLink, reason: str) -> None:
        if self._forget_socket(link):
            self._out.append(Lost(link, reason))

    def _forget_socket(self, link: UcxLink) -> bool:
        if link.control.socket.fileno() in self._selector.get_map():
            self._selector.unregister(link.control.socket)
            return True
        return False
