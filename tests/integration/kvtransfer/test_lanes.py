"""Agents between two processes, on every lane: exact bytes, and what happens when one dies."""

import signal
import socket
from contextlib import suppress

import pytest

from tests.integration.kvtransfer.processes import (
    LAYERS,
    RankProcess,
    Ranks,
    Start,
    Way,
    begin,
    join,
    transfer,
)

pytestmark = pytest.mark.timeout(120)

LONG = 40_000
QUICK = {"heartbeat_s": 0.3}


def nothing_held(sender: RankProcess, receiver: RankProcess) -> None:
    """Wait until neither of two ranks that have no other peer holds anything."""
    sender.holds_nothing(1)
    receiver.holds_nothing(1)


def test_bytes_arrive_exactly_and_close_leaves_nothing(start: Start, way: Way) -> None:
    sender, receiver = start("send"), start("receive")
    join(sender, receiver)
    for transfer_id in range(1, 6):
        assert transfer(sender, receiver, transfer_id)["transport"] == way.carrier
    nothing_held(sender, receiver)
    for end in (sender, receiver):
        closed = end.ask("close")
        assert closed["threads"] == 0
        left = [d for d in closed["descriptors"] if "socket" in d or "event" in d]
        assert not left, closed["descriptors"]


def test_of_all_lanes_between_processes_of_one_host_mapped_memory_is_taken(ranks: Ranks) -> None:
    sender, receiver = ranks.start("send"), ranks.start("receive")
    join(sender, receiver)
    assert transfer(sender, receiver, 1)["transport"] == "mapped"
    ranks.end(sender)
    ranks.end(receiver)


def test_the_smallest_window_is_enough(start: Start) -> None:
    settings = {"slots_per_connection": 1, "window": 1, "slot_bytes": 65536, "piece_bytes": 65536}
    sender, receiver = start("send", settings=settings), start("receive", settings=settings)
    join(sender, receiver)
    assert transfer(sender, receiver, 1)["messages"] > 10


def test_a_killed_sender_is_noticed_and_its_successor_serves(start: Start) -> None:
    receiver = start("receive", tokens=LONG)
    first, second = start("send", tokens=LONG), start("send", tokens=LONG, epoch=8)
    join(first, receiver)
    begin(first, receiver, 1)
    first.do("ready", id=1, layers=[0, LAYERS - 1])
    first.signal(signal.SIGKILL)
    assert receiver.wait(event="Failed", id=1)["error"] == "PeerLost"
    receiver.wait(event="PeerDown")
    join(second, receiver)
    transfer(second, receiver, 2)
    nothing_held(second, receiver)


def test_senders_killed_in_the_midst_of_sending_do_not_disturb_another(start: Start) -> None:
    receiver, steady = start("receive", tokens=LONG, sequences=2), start("send", tokens=LONG)
    join(steady, receiver)
    for number in range(2):
        doomed = start("send", tokens=LONG, instance=f"doomed-{number}")
        join(doomed, receiver)
        begin(doomed, receiver, 10 + number, sequence=1)
        begin(steady, receiver, 20 + number)
        for sender, transfer_id in ((doomed, 10 + number), (steady, 20 + number)):
            sender.do("ready", id=transfer_id, layers=[0, LAYERS - 1])
        doomed.signal(signal.SIGKILL)
        receiver.wait(event="Failed", id=10 + number)
        steady.do("ready", id=20 + number, layers=[LAYERS - 1, LAYERS])
        receiver.wait(event="Completed", id=20 + number)
        assert all(receiver.check().values())
    nothing_held(steady, receiver)


def test_strangers_on_the_data_port_are_turned_away(start: Start) -> None:
    receiver, sender = start("receive"), start("send")
    host, port = receiver.bound
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", bytes(1000), b"\xff" * 1000):
        with socket.create_connection((host, port), timeout=10.0) as stranger:
            stranger.sendall(garbage)
            with suppress(ConnectionResetError):
                while stranger.recv(4096):
                    pass
    join(sender, receiver)
    transfer(sender, receiver, 1)


def test_a_killed_receiver_is_noticed_and_its_successor_serves(start: Start) -> None:
    sender = start("send", tokens=LONG)
    first, second = start("receive", tokens=LONG), start("receive", tokens=LONG, epoch=8)
    join(sender, first)
    begin(sender, first, 1)
    sender.do("ready", id=1, layers=[0, LAYERS - 1])
    first.signal(signal.SIGKILL)
    assert sender.wait(event="Failed", id=1)["error"] == "PeerLost"
    join(sender, second)
    transfer(sender, second, 2)
    nothing_held(sender, second)


@pytest.mark.parametrize("stopped", ["send", "receive"])
def test_a_stopped_process_is_noticed_by_silence_and_may_come_back(
    start: Start, stopped: str
) -> None:
    ranks = {role: start(role, tokens=LONG, settings=QUICK) for role in ("send", "receive")}
    sender, receiver = ranks["send"], ranks["receive"]
    join(sender, receiver)
    begin(sender, receiver, 1)
    sender.do("ready", id=1, layers=[0, LAYERS - 1])
    ranks[stopped].signal(signal.SIGSTOP)
    other = receiver if stopped == "send" else sender
    assert other.wait(event="Failed", id=1)["error"] == "PeerLost"
    ranks[stopped].signal(signal.SIGCONT)
    ranks[stopped].wait(event="Failed", id=1)
    sender.wait(event="PeerUp")
    receiver.wait(event="PeerUp")
    transfer(sender, receiver, 2)
    nothing_held(sender, receiver)
