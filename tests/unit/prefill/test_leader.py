"""The ranks of a prefill instance hear all that its first one does, and end transfers as one."""

from typing import Any

from kvtransfer import Closed, Completed, Failed, KVShape, Span, TransferStats, uniform_cache
from kvtransfer.errors import ChecksumMismatch
from prefill.compute import Piece
from prefill.handoff import Handoff
from prefill.leader import GroupTransfers
from prefill.rank_wire import step_from_wire, step_to_wire
from service.peers import Grant
from service.ranks.leader import Message

LAYOUT = uniform_cache((KVShape(layers=2, kv_heads=2, head_size=8, dtype="float32"),), 4)
GRANT = Grant(
    transfer_id=77,
    epoch=1,
    nonce=bytes(16),
    tokens=Span(0, 10),
    ttl_s=5.0,
    instance="decode",
    layout=LAYOUT,
)


def test_steps_arrive_as_they_were() -> None:
    step = [
        Piece(request_id=2**63 + 1, start=32, token_ids=[5, 6], blocks=[9, 1], transfer=True),
        Piece(request_id=2, start=0, token_ids=[7], blocks=[3], transfer=False),
    ]
    assert step_from_wire(step_to_wire(step)) == step


class FakeAgent:
    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def begin(self, transfer: Any) -> None:
        self.calls.append(("begin", transfer.transfer_id))

    def ready(self, transfer_id: int, layers: Span, tokens: Span) -> None:
        pass

    def abort(self, transfer_id: int) -> None:
        self.calls.append(("abort", transfer_id))


class Joint:
    """Transfers of two ranks, of which the second is only what it is told."""

    def __init__(self) -> None:
        self.agent = FakeAgent()
        self.told: list[Message] = []
        self.ends: list[Any] = []
        own = Handoff(self.agent, layers=2)  # type: ignore[arg-type]
        self.transfers = GroupTransfers(
            own,
            self.agent,  # type: ignore[arg-type]
            2,
            tell=self.told.append,
            emit=self.ends.append,
        )

    @property
    def kinds(self) -> list[str | None]:
        return [message.WhichOneof("kind") for message in self.told]


def test_ranks_are_told_all_that_this_one_does() -> None:
    joint = Joint()
    joint.transfers.expect(1)
    joint.transfers.grant(1, GRANT)
    joint.transfers.open(1, 10, [4, 2, 0])
    joint.transfers.cached(1, Span(0, 4))
    assert joint.kinds == ["expect", "grant", "open", "ready"]
    granted = joint.told[1].grant.grant
    assert (granted.transfer_id, granted.instance, granted.ttl_ms) == (77, "decode", 5000)
    assert list(joint.told[2].open.blocks) == [4, 2, 0]
    assert joint.agent.calls == [("begin", 77)]


def test_end_is_told_when_both_ranks_have_ended() -> None:
    joint = Joint()
    joint.transfers.expect(1)
    joint.transfers.open(1, 10, [4, 2, 0])
    joint.transfers.grant(1, GRANT)
    joint.transfers.take(0, Completed(77, TransferStats(1, 1, 0.1, "tcp")))
    assert joint.ends == []
    joint.transfers.take(1, Completed(77, TransferStats(1, 1, 0.1, "tcp")))
    assert [type(end) for end in joint.ends] == [Completed]
    assert joint.transfers.ended(77) == 1
    assert joint.transfers.ended(77) is None


def test_failure_on_one_rank_ends_the_transfer_on_the_other() -> None:
    joint = Joint()
    joint.transfers.expect(1)
    joint.transfers.open(1, 10, [4, 2, 0])
    joint.transfers.grant(1, GRANT)
    joint.transfers.take(1, Failed(77, ChecksumMismatch("x"), retryable=True))
    assert joint.agent.calls[-1] == ("abort", 77)
    assert joint.told[-1].abort.transfer_id == 77
    joint.transfers.take(0, Closed(77))
    assert [type(end) for end in joint.ends] == [Failed]


def test_closing_before_the_transfer_begins_leaves_nothing_to_wait_for() -> None:
    joint = Joint()
    joint.transfers.expect(1)
    joint.transfers.open(1, 10, [4, 2, 0])
    assert not joint.transfers.close(1)
    assert joint.kinds[-1] == "close"


def test_closing_waits_for_every_rank() -> None:
    joint = Joint()
    joint.transfers.expect(1)
    joint.transfers.open(1, 10, [4, 2, 0])
    joint.transfers.grant(1, GRANT)
    joint.transfers.take(1, Completed(77, TransferStats(1, 1, 0.1, "tcp")))
    assert joint.transfers.close(1)
    assert joint.ends == []
    joint.transfers.take(0, Closed(77))
    assert joint.ends == [Closed(77)]
