"""A stream keeps its order of bytes whatever the kernel takes at a time, and lets go of buffers."""

import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from kvtransfer.control_socket import Broken
from kvtransfer.data_socket import DataSocket


@pytest.fixture
def pair() -> Iterator[tuple[DataSocket, DataSocket]]:
    one, other = socket.socketpair()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    ends = DataSocket(one), DataSocket(other)
    yield ends
    for end in ends:
        end.close()


def cut(data: memoryview, rng: random.Random, most: int) -> list[memoryview]:
    parts, at = [], 0
    while at < len(data):
        size = rng.randint(1, most)
        parts.append(data[at : at + size])
        at += size
    return parts


def run(sender: DataSocket, receiver: DataSocket) -> tuple[list[Any], list[Any]]:
    sent: list[Any] = []
    received: list[Any] = []
    while sender.wants_to_write:
        sent += sender.write()
        received += receiver.read()
    return sent, received


@pytest.mark.parametrize("seed", range(5))
def test_many_parts_arrive_in_order(pair: tuple[DataSocket, DataSocket], seed: int) -> None:
    sender, receiver = pair
    rng = random.Random(seed)
    data = rng.randbytes(300_000)
    into = bytearray(len(data))
    for number, part in enumerate(cut(memoryview(data), rng, 60_000)):
        sender.send(cut(part, rng, 700), number)
    for number, part in enumerate(cut(memoryview(into), rng, 60_000)):
        receiver.receive(cut(part, rng, 300), number)
    sent, received = run(sender, receiver)
    assert into == data
    assert sent == sorted(sent)
    assert received == sorted(received)
    assert not sender.wants_to_write
    assert not receiver.wants_to_read


def test_a_diverted_send_goes_on_as_zeros_and_the_next_is_whole(
    pair: tuple[DataSocket, DataSocket],
) -> None:
    sender, receiver = pair
    secret, after = bytearray(b"s" * 200_000), b"a" * 1000
    into = bytearray(201_000)
    receiver.receive([memoryview(into)], "in")
    sender.send([memoryview(b"h"), memoryview(secret)[1:]], "secret")
    sender.send([memoryview(after)], "after")
    sender.write()
    sender.divert("secret")
    secret[:] = b"x" * len(secret)
    sent, received = run(sender, receiver)
    assert b"x" not in into
    assert b"s" in into
    assert b"\0" in into
    assert into[200_000:] == after
    assert sent == ["secret", "after"]
    assert received == ["in"]


def test_a_diverted_send_that_has_not_begun_keeps_its_first_part(
    pair: tuple[DataSocket, DataSocket],
) -> None:
    sender, receiver = pair
    into = bytearray(210)
    receiver.receive([memoryview(into)], "in")
    sender.send([memoryview(b"h" * 10), memoryview(b"s" * 200)], "piece")
    sender.divert("piece")
    run(sender, receiver)
    assert into == b"h" * 10 + bytes(200)


def test_a_diverted_receive_writes_no_more_and_the_next_is_whole(
    pair: tuple[DataSocket, DataSocket],
) -> None:
    sender, receiver = pair
    into, after = bytearray(200_000), bytearray(1000)
    sender.send([memoryview(b"1" * 200_000)], 1)
    sender.send([memoryview(b"2" * 1000)], 2)
    receiver.receive([memoryview(into)], 1)
    receiver.receive([memoryview(after)], 2)
    sender.write()
    receiver.read()
    arrived = into.count(b"1")
    assert 0 < arrived < len(into)
    receiver.divert(1)
    _, received = run(sender, receiver)
    assert into.count(b"1") == arrived
    assert after == b"2" * 1000
    assert received == [1, 2]


def test_what_nobody_asks_for_stays_in_the_kernel(pair: tuple[DataSocket, DataSocket]) -> None:
    sender, receiver = pair
    sender.send([memoryview(bytes(10_000_000))], "much")
    for _ in range(100):
        sender.write()
        assert receiver.read() == []
    assert sender.wants_to_write


def test_the_peers_end_is_told(pair: tuple[DataSocket, DataSocket]) -> None:
    sender, receiver = pair
    receiver.receive([memoryview(bytearray(10))], "in")
    sender.close()
    with pytest.raises(Broken):
        receiver.read()
    assert receiver.close() == ["in"]
