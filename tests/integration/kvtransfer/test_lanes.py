"""Agents between two processes, on every lane: exact bytes, and what happens when one dies."""

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.integration.kvtransfer.processes import RankProcess, begin, join, transfer

pytestmark = pytest.mark.timeout(120)

Start = Callable[..., RankProcess]
LOST = {"PeerLost"}


LANES: dict[str, dict[str, Any]] = {
    "ucx": {"lane": "ucx", "tls": None},
    "ucx-tcp": {"lane": "ucx", "tls": "tcp"},
    "stream": {"lane": "stream"},
    "mapped": {"lane": "mapped"},
}


@pytest.fixture(params=LANES)
def lane(request: pytest.FixtureRequest) -> str:
    """The way that payload travels in this test."""
    return str(request.param)


@pytest.fixture
def start(lane: str) -> Iterator[Start]:
    started: list[RankProcess] = []

    def make(role: str, **config: Any) -> RankProcess:
        started.append(RankProcess(role, **LANES[lane], **config))
        return started[-1]

    yield make
    for rank in started:
        rank.close()


def all_free(receiver: RankProcess, lane: str) -> None:
    """Wait until nothing is held for a transfer; only UCX has slots."""
    receiver.slots_become(**({"granted": 6} if lane.startswith("ucx") else {}))


def test_bytes_arrive_exactly_and_close_leaves_nothing(start: Start, lane: str) -> None:
    sender, receiver = start("send"), start("receive")
    sender.ask("start")
    join(sender, receiver)
    for transfer_id in range(1, 6):
        done = transfer(sender, receiver, transfer_id)
    transport = {"ucx-tcp": "ucx/tcp", "stream": "tcp", "mapped": "mapped"}
    assert done["transport"].startswith(transport.get(lane, "ucx/"))
    all_free(receiver, lane)
    for end in (sender, receiver):
        closed = end.ask("close")
        assert closed["threads"] == 0
        sockets = [d for d in closed["descriptors"] if "socket" in d or "event" in d]
        assert not sockets, closed["descriptors"]


@pytest.mark.parametrize("lane", ["ucx"], indirect=True)
def test_one_slot_of_credit_is_enough(start: Start) -> None:
    sender, receiver = start("send", slots=1), start("receive", slots=1)
    sender.ask("start")
    join(sender, receiver)
    assert transfer(sender, receiver, 1)["messages"] > 2


def test_a_killed_sender_is_noticed_and_its_successor_serves(start: Start, lane: str) -> None:
    receiver = start("receive", tokens=40000)
    first, second = start("send", tokens=40000), start("send", tokens=40000, epoch=8)
    first.ask("start")
    join(first, receiver)
    begin(first, receiver, 1)
    first.do("ready", id=1, layers=[0, 3])
    first.kill()
    assert receiver.wait(event="Failed", id=1)["error"] in LOST
    receiver.wait(event="PeerDown")
    second.ask("start")
    join(second, receiver)
    transfer(second, receiver, 2)
    all_free(receiver, lane)


def test_senders_killed_in_the_midst_of_sending_do_not_disturb_another(
    start: Start, lane: str
) -> None:
    receiver, steady = start("receive", tokens=20000), start("send", tokens=20000)
    all_doomed = [start("send", tokens=20000, instance=f"doomed-{n}") for n in range(2)]
    steady.ask("start")
    join(steady, receiver)
    for number, doomed in enumerate(all_doomed):
        doomed.ask("start")
        join(doomed, receiver)
        begin(doomed, receiver, 10 + number)
        doomed.do("ready", id=10 + number, layers=[0, 3])
        doomed.kill()
        receiver.wait(event="Failed", id=10 + number)
        transfer(steady, receiver, 20 + number)
    all_free(receiver, lane)


def test_strangers_on_the_data_port_are_turned_away(start: Start) -> None:
    receiver, sender = start("receive"), start("send")
    host, port = receiver.bound
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", bytes(1000), b"\xff" * 1000):
        with socket.create_connection((host, port), timeout=10.0) as stranger:
            stranger.sendall(garbage)
            with suppress(ConnectionResetError):
                while stranger.recv(4096):
                    pass
    sender.ask("start")
    join(sender, receiver)
    transfer(sender, receiver, 1)


def test_a_killed_receiver_is_noticed_and_its_successor_serves(start: Start, lane: str) -> None:
    sender = start("send", tokens=40000)
    first, second = start("receive", tokens=40000), start("receive", tokens=40000, epoch=8)
    sender.ask("start")
    join(sender, first)
    begin(sender, first, 1)
    sender.do("ready", id=1, layers=[0, 3])
    first.kill()
    assert sender.wait(event="Failed", id=1)["error"] in LOST
    join(sender, second)
    transfer(sender, second, 2)
    slots = {"stream": 3, "mapped": 0}.get(lane, 6)
    sender.slots_become(free=slots, sending=0)


@pytest.mark.parametrize("stopped", ["send", "receive"])
def test_a_stopped_process_is_noticed_by_silence_and_may_come_back(
    start: Start, stopped: str
) -> None:
    ranks = {"send": start("send", tokens=40000), "receive": start("receive", tokens=40000)}
    sender, receiver = ranks["send"], ranks["receive"]
    sender.ask("start")
    join(sender, receiver)
    begin(sender, receiver, 1)
    sender.do("ready", id=1, layers=[0, 3])
    ranks[stopped].signal(signal.SIGSTOP)
    other = receiver if stopped == "send" else sender
    assert other.wait(event="Failed", id=1)["error"] in LOST
    ranks[stopped].signal(signal.SIGCONT)
    ranks[stopped].wait(event="Failed", id=1)
    sender.wait(event="PeerUp")
    receiver.wait(event="PeerUp")
    transfer(sender, receiver, 2)
