"""Links between processes: two TCP sockets each, and UCX beside them where it is asked for.

Owns the sockets, the UCX context and its workers; only the thread that polls may touch them.

Why control messages go over a socket of their own: it passes while data is stalled; the listener
binds to one host (ucxx's own binds to all); a stranger is turned away before UCX sees anything of
it; and the kernel closes it when a process is killed, so that a death shows in milliseconds where
UCX over shared memory needs its keepalive.
"""

import logging
import os
import selectors
import socket
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from kvtransfer import ucx_settings
from kvtransfer.arrivals import Arrivals, preambles
from kvtransfer.control_socket import Broken, ControlSocket
from kvtransfer.data_socket import DataSocket
from kvtransfer.errors import PeerLost
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
    from kvtransfer.ucx_worker import Context, Worker

logger = logging.getLogger(__name__)

_NAP_S = (20e-6, 1e-3)
_BACKLOG = 128
_CLOSED = "the link is closed"


class NetworkLink:
    """One link; see transport.Link. Its stream and its tagged lane are views of it."""

    def __init__(self, owner: "NetworkTransport", control: ControlSocket, data: DataSocket) -> None:
        data.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.owner = owner
        self.control = control
        self.data = data
        self.closed = False
        self.broken = False
        self.watched = 0
        self.stream = LinkStream(self)
        self.stream_carrier = "tcp"
        self._tagged: LinkTagged | None = None

    @property
    def tagged(self) -> "LinkTagged":
        """See Link; the UCX worker is made when first asked for, so that a stranger gets none."""
        if self._tagged is None:
            self._tagged = LinkTagged(self, self.owner.new_worker())
        return self._tagged

    def send_control(self, message: bytes) -> None:
        """See Link."""
        if not self.closed:
            self.owner.send_control(self, message)

    def close(self) -> None:
        """See Link."""
        if not self.closed:
            self.closed = True
            self.owner.drop(self, self._tagged.release() if self._tagged else None)


class LinkStream:
    """A link's byte stream; see transport.Stream."""

    def __init__(self, link: NetworkLink) -> None:
        self._link = link

    def send(self, parts: Sequence[memoryview], key: Any) -> None:
        """See Stream."""
        if self._link.closed:
            self._link.owner.report(Done(self._link, key, _CLOSED))
            return
        self._link.data.send(parts, key)
        self._link.owner.move_data(self._link, selectors.EVENT_WRITE)

    def receive(self, parts: Sequence[memoryview], key: Any) -> None:
        """See Stream."""
        if self._link.closed:
            self._link.owner.report(Done(self._link, key, _CLOSED))
            return
        self._link.data.receive(parts, key)
        self._link.owner.move_data(self._link, selectors.EVENT_READ)

    def divert(self, key: Any) -> None:
        """See Stream."""
        self._link.data.divert(key)


class LinkTagged:
    """A link's UCX worker; see transport.Tagged."""

    def __init__(self, link: NetworkLink, worker: "Worker") -> None:
        self._link = link
        self._worker: Worker | None = worker
        self._carrier = ""

    @property
    def address(self) -> bytes:
        """See Tagged."""
        return self._live().address

    def open(self, address: bytes) -> None:
        """See Tagged."""
        self._live().connect(address)

    def send(self, tag: int, message: Bytes, key: Any) -> None:
        """See Tagged."""
        if self._worker is None:
            self._link.owner.report(Done(self._link, key, _CLOSED))
        else:
            self._worker.send(tag, message, (self._link, key))

    def receive(self, tag: int, into: Bytes, key: Any) -> None:
        """See Tagged."""
        if self._worker is None:
            self._link.owner.report(Done(self._link, key, _CLOSED))
        else:
            self._worker.receive(tag, into, (self._link, key))

    @property
    def carrier(self) -> str:
        """See Tagged."""
        if not self._carrier and self._worker is not None:
            names = self._worker.transports()
            bulk = [name for name in names if name != "tcp"] or names
            if bulk:
                self._carrier = "ucx/" + "+".join(bulk)
        return self._carrier or "ucx"

    def release(self) -> "Worker | None":
        """Give the worker up to whoever closes it."""
        _ = self.carrier  # UCX cannot be asked for it any more afterwards
        worker, self._worker = self._worker, None
        return worker

    def _live(self) -> "Worker":
        if self._worker is None:
            raise PeerLost(_CLOSED)
        return self._worker


class NetworkTransport:
    """All links of one agent; see transport.Transport."""

    def __init__(self, settings: UcxSettings | None = None) -> None:
        self._settings = settings or UcxSettings()
        self._context: Context | None = None
        self._workers: list[Worker] = []
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._woken = False
        self._selector.register(self._wake_fd, selectors.EVENT_READ, self._take_wake)
        self._listener: socket.socket | None = None
        self._arrivals = Arrivals()
        self._links: set[NetworkLink] = set()
        self._out: list[Happening] = []
        self._closed = False

    def listen(self, host: str, port: int) -> tuple[str, int]:
        """See Transport."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._listener = listener
        bound = listener.getsockname()
        return bound[0], bound[1]

    def connect(self, host: str, port: int) -> NetworkLink:
        """See Transport. Raises OSError for an address that cannot be tried at all.

        `host` must be an address or a name from the hosts file: a lookup would stall the thread.
        """
        control = _connecting(host, port)
        try:
            data = _connecting(host, port)
        except OSError:
            control.close()
            raise
        link = NetworkLink(self, ControlSocket(control), DataSocket(data))
        self._links.add(link)
        missing = {control, data}
        for sock, preamble in zip((control, data), preambles(), strict=True):
            connected = partial(self._connected, link, sock, preamble, missing)
            self._selector.register(sock, selectors.EVENT_WRITE, connected)
        return link

    def poll(self, timeout_s: float) -> list[Happening]:
        """See Transport.

        With UCX in use, spins only for a moment after something happened, then arms the workers
        and sleeps in one selector with the sockets: spinning in Python would keep the GIL from
        compute threads, and on a busy machine the core from the peer.
        """
        now = time.monotonic()
        until = now + timeout_s
        again = self._arrivals.expire(now)
        if again is not None:
            until = min(until, again)
        self._bury()
        spin_until = now + min(timeout_s, self._settings.spin_s) if self._workers else now
        nap_s = _NAP_S[0]
        self._woken = False
        while True:
            self._finish()
            self._sockets(0.0)
            if self._out or self._woken:
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

    @property
    def rdma(self) -> bool:
        """See Transport: whether the host has a device and this build of UCX a way to drive it."""
        if not ucx_settings.rdma_devices():
            return False
        self._make_context()
        return ucx_settings.drives_rdma()

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
        self._arrivals.close()
        self._bury()
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
        self._selector.close()
        os.close(self._wake_fd)
        self._out.clear()
        if self._context is not None:
            self._context.close()

    # ------------------------------------------------------------------------- used by the links

    def report(self, happening: Happening) -> None:
        """Queue for the next poll."""
        self._out.append(happening)

    def send_control(self, link: NetworkLink, message: bytes) -> None:
        """Send on a link's control socket; a broken one is reported as lost."""
        if link.broken:
            return
        try:
            link.control.send(message)
        except Broken as exc:
            self._break(link, str(exc))
            return
        self._watch_control(link)

    def move_data(self, link: NetworkLink, mask: int) -> None:
        """Send or receive on a link's stream what can be moved at once."""
        if link.closed or link.broken:
            return
        try:
            if mask & selectors.EVENT_WRITE:
                self._out += [Done(link, key, None) for key in link.data.write()]
            if mask & selectors.EVENT_READ:
                self._out += [Done(link, key, None) for key in link.data.read()]
        except Broken as exc:
            self._break(link, str(exc))
            return
        self._watch_data(link)

    def new_worker(self) -> "Worker":
        """Return a UCX worker that takes part in polling; raises PeerLost where UCX cannot work."""
        worker = self._make_context().worker()
        self._workers.append(worker)
        self._selector.register(worker.event_fd, selectors.EVENT_READ, _nothing)
        return worker

    def drop(self, link: NetworkLink, worker: "Worker | None") -> None:
        """Close a link's sockets and worker; its outstanding operations are terminal then."""
        if not link.broken:
            self._forget_sockets(link)
        link.control.close()
        ended = link.data.close()
        self._links.discard(link)
        if worker is not None:
            self._selector.unregister(worker.event_fd)
            self._workers.remove(worker)
            ended += [key for _, key in worker.close()]
        self._out += [Done(link, key, _CLOSED) for key in ended]

    # ------------------------------------------------------------------------------- internals

    def _make_context(self) -> "Context":
        if self._context is None:
            # UCX and ucxx read the environment when they are loaded, hence not at the top.
            ucx_settings.apply(self._settings)
            from kvtransfer.ucx_worker import Context

            self._context = Context()
        return self._context

    def _finish(self) -> None:
        """Make UCX progress everywhere; collect what became terminal."""
        for worker in self._workers:
            for (link, key), error in worker.finished():
                self._out.append(Done(link, key, error))

    def _sockets(self, timeout_s: float) -> None:
        for selected, mask in self._selector.select(timeout_s):
            selected.data(mask)

    def _take_wake(self, _: int) -> None:
        os.eventfd_read(self._wake_fd)
        self._woken = True

    def _accept(self, _: int) -> None:
        assert self._listener is not None
        try:
            sock, _peer = self._listener.accept()
        except OSError as exc:
            logger.warning("accept failed: %s", exc)
            return
        self._arrivals.add(sock, time.monotonic())
        self._selector.register(sock, selectors.EVENT_READ, partial(self._arriving, sock))
        self._bury()

    def _arriving(self, sock: socket.socket, _: int) -> None:
        halves = self._arrivals.readable(sock)
        self._bury()
        if halves is None:
            if self._arrivals.waits(sock):
                self._selector.unregister(sock)
            return
        control, data = halves
        link = NetworkLink(self, ControlSocket(control), DataSocket(data))
        self._links.add(link)
        self._selector.unregister(sock)
        self._selector.register(control, selectors.EVENT_READ, partial(self._serve_control, link))
        self._out.append(Accepted(link))

    def _bury(self) -> None:
        """Close the sockets that will not become a link."""
        for sock in self._arrivals.closed:
            if sock in self._selector.get_map():
                self._selector.unregister(sock)
            sock.close()
        self._arrivals.closed.clear()

    def _connected(
        self,
        link: NetworkLink,
        sock: socket.socket,
        preamble: bytes,
        missing: set[socket.socket],
        _: int,
    ) -> None:
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if not error:
            try:
                sock.send(preamble)
            except OSError as exc:
                error = exc.errno or -1
        if error:
            self._break(link, os.strerror(error))
            return
        missing.discard(sock)
        if sock is link.data.socket:
            self._selector.unregister(sock)
        else:
            self._selector.modify(sock, selectors.EVENT_READ, partial(self._serve_control, link))
        if not missing:
            self._out.append(Connected(link))

    def _serve_control(self, link: NetworkLink, mask: int) -> None:
        if link.broken:
            return
        try:
            if mask & selectors.EVENT_WRITE:
                link.control.flush()
                self._watch_control(link)
        except Broken as exc:
            self._break(link, str(exc))
            return
        if mask & selectors.EVENT_READ:
            messages, ended = link.control.receive()
            self._out += [ControlArrived(link, message) for message in messages]
            if ended is not None:
                self._break(link, ended)

    def _watch_control(self, link: NetworkLink) -> None:
        """Wait for the control socket to become writable only while something waits for that."""
        events = selectors.EVENT_READ
        if link.control.backlogged:
            events |= selectors.EVENT_WRITE
        sock = link.control.socket
        if not link.broken and self._selector.get_key(sock).events != events:
            self._selector.modify(sock, events, partial(self._serve_control, link))

    def _watch_data(self, link: NetworkLink) -> None:
        """Wait for the data socket exactly as long as something is to be moved on it."""
        events = selectors.EVENT_READ if link.data.wants_to_read else 0
        if link.data.wants_to_write:
            events |= selectors.EVENT_WRITE
        if link.broken or events == link.watched:
            return
        sock, serve = link.data.socket, partial(self.move_data, link)
        if not link.watched:
            self._selector.register(sock, events, serve)
        elif events:
            self._selector.modify(sock, events, serve)
        else:
            self._selector.unregister(sock)
        link.watched = events

    def _break(self, link: NetworkLink, reason: str) -> None:
        if link.broken:
            return
        # A send that fails may be how the end shows, with a goodbye still to be read.
        messages, _ = link.control.receive()
        self._out += [ControlArrived(link, message) for message in messages]
        self._forget_sockets(link)
        self._out.append(Lost(link, reason))

    def _forget_sockets(self, link: NetworkLink) -> None:
        """Stop watching a link for good."""
        link.broken = True
        for sock in (link.control.socket, link.data.socket):
            if sock.fileno() >= 0 and sock in self._selector.get_map():
                self._selector.unregister(sock)


def _connecting(host: str, port: int) -> socket.socket:
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
    return sock


def _nothing(_: int) -> None:
    """UCX has an event: the next progress takes it."""
