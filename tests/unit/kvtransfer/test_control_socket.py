"""Framed messages over a socket: whole messages only, bounded in both directions."""

import socket
import struct
from collections.abc import Iterator

import pytest

from kvtransfer.control_socket import Broken, ControlSocket
from kvtransfer.ucx_settings import UcxSettings, environment
from kvtransfer.wire import MAX_CONTROL_BYTES

Ends = tuple[ControlSocket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    listener = socket.create_server(("127.0.0.1", 0))
    far = socket.create_connection(listener.getsockname())
    near, _ = listener.accept()
    listener.close()
    control = ControlSocket(near)
    yield control, far
    control.close()
    far.close()


def all_messages(control: ControlSocket, count: int) -> list[bytes]:
    found: list[bytes] = []
    while len(found) < count:
        messages, ended = control.receive()
        assert ended is None
        found += messages
    return found


def send_for_ever(control: ControlSocket) -> None:
    while True:
        control.send(bytes(MAX_CONTROL_BYTES))


def test_messages_arrive_whole_however_they_are_cut(ends: Ends) -> None:
    control, far = ends
    sent = [b"one", b"", b"x" * MAX_CONTROL_BYTES]
    stream = b"".join(struct.pack("<I", len(m)) + m for m in sent)
    for at in range(0, len(stream), 777):
        far.sendall(stream[at : at + 777])
    assert all_messages(control, 3) == sent


def test_an_announced_giant_ends_the_connection(ends: Ends) -> None:
    control, far = ends
    far.sendall(struct.pack("<I", MAX_CONTROL_BYTES + 1))
    ended = None
    while ended is None:
        _, ended = control.receive()
    assert "announced" in ended


def test_the_end_is_told_after_the_last_message(ends: Ends) -> None:
    control, far = ends
    far.sendall(struct.pack("<I", 3) + b"bye")
    far.close()
    found: list[bytes] = []
    ended = None
    while ended is None:
        messages, ended = control.receive()
        found += messages
    assert found == [b"bye"]


def test_a_peer_that_does_not_read_breaks_the_connection(ends: Ends) -> None:
    control, _ = ends
    with pytest.raises(Broken, match="does not read"):
        send_for_ever(control)
    assert control.backlogged


def test_too_large_a_message_is_a_bug_of_ours(ends: Ends) -> None:
    control, _ = ends
    with pytest.raises(ValueError, match="bytes"):
        control.send(bytes(MAX_CONTROL_BYTES + 1))


def test_ucx_is_told_what_it_needs() -> None:
    variables = environment(UcxSettings(tls="tcp,self", net_devices="eth0"))
    assert variables["UCX_POSIX_ERROR_HANDLING"] == "y"
    assert (variables["UCX_TLS"], variables["UCX_NET_DEVICES"]) == ("tcp,self", "eth0")
    assert "UCX_TLS" not in environment(UcxSettings())
    assert variables["UCX_LOG_FILE"] == "stderr"


@pytest.mark.parametrize("wrong", [{"tcp_segment_kib": 1}, {"keepalive_s": 0.0}, {"spin_s": -1.0}])
def test_senseless_ucx_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        UcxSettings(**wrong)  # type: ignore[arg-type]
