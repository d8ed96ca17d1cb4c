"""Links over real sockets: two halves become one link, strangers and the dead are dropped."""

import socket
import time
from collections.abc import Callable, Iterator

import pytest

from kvtransfer import arrivals
from kvtransfer.network import NetworkTransport
from kvtransfer.transport import Accepted, Connected, ControlArrived, Done, Happening, Lost

HOST = "127.0.0.1"


class Ends:
    """A listening and a connecting transport, polled in turn."""

    def __init__(self) -> None:
        self.near, self.far = NetworkTransport(), NetworkTransport()
        self.port = self.far.listen(HOST, 0)[1]
        self.seen: dict[NetworkTransport, list[Happening]] = {self.near: [], self.far: []}

    def until(self, condition: Callable[[], object]) -> None:
        until = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < until, self.seen
            for transport, seen in self.seen.items():
                seen += transport.poll(0.01)

    def of(self, transport: NetworkTransport, kind: type) -> list[Happening]:
        return [happening for happening in self.seen[transport] if isinstance(happening, kind)]

    def link(self) -> tuple[object, object]:
        near = self.near.connect(HOST, self.port)
        self.until(lambda: self.of(self.far, Accepted) and self.of(self.near, Connected))
        far = self.of(self.far, Accepted)[-1]
        assert isinstance(far, Accepted)
        return near, far.link


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.near.close()
    made.far.close()


def test_control_and_stream_pass_independently(ends: Ends) -> None:
    near, far = ends.link()
    payload = bytes(range(256)) * 40_000
    into = bytearray(len(payload))
    near.stream.send([memoryview(payload)], "out")  # type: ignore[attr-defined]
    near.send_control(b"overtakes")  # type: ignore[attr-defined]
    ends.until(lambda: ends.of(ends.far, ControlArrived))
    assert not ends.of(ends.near, Done), "the stream is stalled: nobody has asked for its bytes"
    far.stream.receive([memoryview(into)], "in")  # type: ignore[attr-defined]
    ends.until(lambda: ends.of(ends.far, Done) and ends.of(ends.near, Done))
    assert into == payload


def test_a_closed_link_ends_what_was_posted_and_is_lost_to_the_peer(ends: Ends) -> None:
    near, far = ends.link()
    far.stream.receive([memoryview(bytearray(10))], "in")  # type: ignore[attr-defined]
    near.close()  # type: ignore[attr-defined]
    ends.until(lambda: ends.of(ends.far, Lost))
    far.close()  # type: ignore[attr-defined]
    ends.until(lambda: ends.of(ends.far, Done))
    done = ends.of(ends.far, Done)[0]
    assert isinstance(done, Done)
    assert done.key == "in"
    assert done.error
    far.stream.receive([memoryview(bytearray(10))], "late")  # type: ignore[attr-defined]
    ends.until(lambda: len(ends.of(ends.far, Done)) == 2)


def test_a_refused_connection_is_lost(ends: Ends) -> None:
    with socket.create_server((HOST, 0)) as closed:
        port = closed.getsockname()[1]
    ends.near.connect(HOST, port)
    ends.until(lambda: ends.of(ends.near, Lost))
    assert len(ends.of(ends.near, Lost)) == 1


def test_garbage_is_dropped_and_a_link_still_comes_up(ends: Ends) -> None:
    with socket.create_connection((HOST, ends.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        stranger.settimeout(5)
        ends.link()
        assert stranger.recv(1) == b""


def test_a_half_that_stays_alone_is_given_up(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "_PATIENCE_S", 0.05)
    control, _ = arrivals.preambles()
    with socket.create_connection((HOST, ends.port)) as alone:
        alone.sendall(control)
        alone.setblocking(False)

        def closed() -> bool:
            try:
                return alone.recv(1) == b""
            except BlockingIOError:
                return False

        ends.until(closed)
    assert not ends.of(ends.far, Accepted)


def test_what_follows_a_preamble_waits_for_the_other_half(ends: Ends) -> None:
    control, data = arrivals.preambles()
    with (
        socket.create_connection((HOST, ends.port)) as one,
        socket.create_connection((HOST, ends.port)) as other,
    ):
        one.sendall(control + (5).to_bytes(4, "little") + b"hello")
        for _ in range(20):
            ends.far.poll(0.01)
        other.sendall(data)
        ends.until(lambda: ends.of(ends.far, ControlArrived))
    arrived = ends.of(ends.far, ControlArrived)[0]
    assert isinstance(arrived, ControlArrived)
    assert arrived.message == b"hello"


def test_two_halves_of_one_kind_make_no_link(ends: Ends) -> None:
    control, _ = arrivals.preambles()
    with (
        socket.create_connection((HOST, ends.port)) as one,
        socket.create_connection((HOST, ends.port)) as other,
    ):
        one.sendall(control)
        other.sendall(control)
        other.settimeout(0.01)

        def second_closed() -> bool:
            for sock in (one, other):
                sock.settimeout(0.01)
                try:
                    if sock.recv(1) == b"":
                        return True
                except TimeoutError:
                    pass
            return False

        ends.until(second_closed)
    assert not ends.of(ends.far, Accepted)


def test_a_goodbye_is_heard_though_a_send_fails_first(ends: Ends) -> None:
    near, far = ends.link()
    near.send_control(b"goodbye")  # type: ignore[attr-defined]
    near.close()  # type: ignore[attr-defined]
    far.control.socket.shutdown(socket.SHUT_WR)  # type: ignore[attr-defined]
    far.send_control(b"into the void")  # type: ignore[attr-defined]
    ends.until(lambda: ends.of(ends.far, Lost))
    last = [h for h in ends.seen[ends.far] if isinstance(h, ControlArrived | Lost)]
    assert [type(h) for h in last] == [ControlArrived, Lost]
    assert isinstance(last[0], ControlArrived)
    assert last[0].message == b"goodbye"
