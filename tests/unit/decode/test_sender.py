"""The ranks of a decode instance send a sequence as one, and connect to others only when needed."""

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from twinpool.v1 import kv_pb2, worker_pb2

from decode.config import DecodeConfig
from decode.sender import RankSender, Sender
from engine.cache_memory import CacheItself
from kvtransfer import Closed, Completed, Failed, KVShape, Span, TransferStats, uniform_cache
from kvtransfer.errors import PeerLost
from service.errors import WorkFailed
from service.ranks.leader import Message
from service.wire import layout_to_wire

SETTINGS = DecodeConfig(model="m", dp=2, tp=2)  # type: ignore[arg-type]
LAYERS = 3
LAYOUT = uniform_cache((KVShape(layers=LAYERS, kv_heads=2, head_size=8, dtype="float32"),), 4)
STATS = TransferStats(5, 1, 0.1, "tcp")
CACHE: Any = SimpleNamespace(tensor=torch.zeros(1), layers=range(LAYERS))


class FakeAgent:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start(self) -> None:
        self.calls.append(("start",))

    def connect(self, peer: Any) -> None:
        self.calls.append(("connect", peer.instance))

    def forget(self, instance: str) -> None:
        self.calls.append(("forget", instance))

    def begin(self, transfer: Any) -> None:
        self.calls.append(("begin", transfer.transfer_id, transfer.total_tokens))
        self.transfer = transfer

    def ready(self, transfer_id: int, layers: Span, tokens: Span) -> None:
        self.calls.append(("ready", transfer_id, layers, tokens))

    def abort(self, transfer_id: int) -> None:
        self.calls.append(("abort", transfer_id))

    def close(self) -> None:
        self.calls.append(("close",))


class Group:
    """The first of four ranks, of two dp ranks."""

    def __init__(self) -> None:
        self.agents: list[FakeAgent] = []
        self.told: list[tuple[str | None, list[int] | None]] = []
        self.ends: list[Any] = []
        self.rank = RankSender(self._make, LAYERS, CacheItself(CACHE))
        self.sender = Sender(SETTINGS, "a", self.rank, tell=self._tell, emit=self.ends.append)

    def _make(self) -> Any:
        self.agents.append(FakeAgent())
        return self.agents[-1]

    def _tell(self, message: Message, ranks: Collection[int] | None) -> None:
        self.told.append((message.WhichOneof("kind"), list(ranks) if ranks is not None else None))

    @property
    def calls(self) -> list[tuple[Any, ...]]:
        [agent] = self.agents
        return agent.calls


def peers(*names: str) -> list[worker_pb2.Peer]:
    layout = layout_to_wire(LAYOUT, [("127.0.0.1", 1)])
    return [worker_pb2.Peer(name=name, epoch=3, layout=layout) for name in names]


def grant(transfer_id: int, instance: str = "b") -> kv_pb2.Grant:
    return kv_pb2.Grant(
        transfer_id=transfer_id,
        epoch=3,
        nonce=bytes(16),
        tokens=kv_pb2.Range(end=9),
        ttl_ms=1000,
        instance=instance,
        kept=[kv_pb2.KeptTokens(of_layers=[4] * LAYERS)],
    )


@pytest.fixture
def group() -> Group:
    made = Group()
    made.sender.update_peers(peers("a", "b", "c"))
    return made


def test_nothing_is_connected_before_it_must_be(group: Group) -> None:
    assert (group.agents, group.told) == ([], [])
    group.rank.abort(1)
    group.rank.close()
    assert not group.agents


def test_all_ranks_connect_to_all_but_their_own_instance(group: Group) -> None:
    group.sender.connect()
    group.sender.connect()
    assert group.calls == [("start",), ("connect", "b"), ("connect", "c")]
    assert group.told == [("peers", None)]
    group.sender.update_peers(peers("a", "c"))
    assert ("forget", "b") in group.calls
    assert group.told == [("peers", None)] * 2


def test_sequence_is_sent_by_the_ranks_that_have_it(group: Group) -> None:
    group.sender.send(7, 0, [4, 1, 0], grant(1))
    group.sender.send(8, 1, [3], grant(2))
    assert group.told == [("peers", None), ("send", [0, 1]), ("send", [2, 3])]
    assert group.calls[-2:] == [
        ("begin", 1, 9),
        ("ready", 1, Span(0, LAYERS), Span(0, 9)),
    ]
    [agent] = group.agents
    assert agent.transfer.block_ids == ((4, 1, 0),)
    assert agent.transfer.kept == ((4,) * LAYERS,)


def test_grant_of_a_stranger_is_refused_and_nobody_told(group: Group) -> None:
    with pytest.raises(WorkFailed):
        group.sender.send(7, 0, [4], grant(1, "stranger"))
    assert group.told == [("peers", None)]


def test_transfer_ends_when_no_rank_reads_any_more(group: Group) -> None:
    group.sender.send(7, 0, [4], grant(1))
    group.sender.take(1, Completed(1, STATS))
    assert group.ends == []
    group.sender.take(0, Completed(1, STATS))
    [end] = group.ends
    assert end.stats.bytes == 10


def test_failure_on_one_rank_ends_the_others(group: Group) -> None:
    group.sender.send(7, 0, [4], grant(1))
    group.sender.take(1, Failed(1, PeerLost("gone"), retryable=True))
    assert group.calls[-1] == ("abort", 1)
    assert group.told[-1] == ("abort", [0, 1])
    group.sender.take(0, Closed(1))
    [end] = group.ends
    assert isinstance(end, Failed)


def test_request_that_ends_takes_its_transfer_with_it(group: Group) -> None:
    group.sender.send(7, 0, [4], grant(1))
    group.sender.drop(7)
    for rank in (0, 1):
        group.sender.take(rank, Closed(1))
    assert [type(end) for end in group.ends] == [Closed]
    told = list(group.told)
    group.sender.drop(7)
    assert group.told == told


def test_sequence_may_be_sent_again_before_the_first_transfer_has_ended(group: Group) -> None:
    group.sender.send(7, 0, [4], grant(1))
    group.sender.drop(7)
    group.sender.send(7, 0, [4], grant(2))
    for rank in (0, 1):
        group.sender.take(rank, Closed(1))
    group.sender.drop(7)
    assert group.calls[-1] == ("abort", 2)
    for rank in (0, 1):
        group.sender.take(rank, Closed(2))
    assert [end.transfer_id for end in group.ends] == [1, 2]
