"""Grants and finished layers come in any order; the transfer hears of each layer once."""

from collections.abc import Callable
from typing import Any

from kvtransfer import KVShape, Span, uniform_cache
from prefill.handoff import Handoff
from service.peers import Grant

LAYOUT = uniform_cache((KVShape(layers=2, kv_heads=1, head_size=8, dtype="float32"),), 16)
TOKENS = Span(0, 20)


class FakeAgent:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def begin(self, transfer: Any) -> None:
        self.calls.append(("begin", transfer.transfer_id, *transfer.block_ids))

    def ready(self, transfer_id: int, layers: Span, tokens: Span) -> None:
        self.calls.append(("ready", transfer_id, layers.begin, tokens))

    def abort(self, transfer_id: int) -> None:
        self.calls.append(("abort", transfer_id))


def grant(transfer_id: int = 77) -> Grant:
    return Grant(
        transfer_id=transfer_id,
        epoch=1,
        nonce=bytes(16),
        tokens=TOKENS,
        ttl_s=5.0,
        instance="decode-0",
        layout=LAYOUT,
    )


def make() -> tuple[Handoff, FakeAgent]:
    agent = FakeAgent()
    return Handoff(agent, layers=2), agent  # type: ignore[arg-type]


def test_layers_that_are_ready_before_the_grant_follow_it() -> None:
    handoff, agent = make()
    handoff.expect(1)
    handoff.open(1, 20, [3, 4])
    handoff.ready(1, Span(0, 1), TOKENS)
    assert agent.calls == []
    handoff.grant(1, grant())
    handoff.ready(1, Span(1, 2), TOKENS)
    assert agent.calls == [
        ("begin", 77, (3, 4)),
        ("ready", 77, 0, TOKENS),
        ("ready", 77, 1, TOKENS),
    ]


def test_grant_that_comes_before_the_blocks_waits_for_them() -> None:
    handoff, agent = make()
    handoff.expect(1)
    handoff.grant(1, grant())
    assert agent.calls == []
    handoff.open(1, 20, [3])
    assert agent.calls == [("begin", 77, (3,))]


def test_second_grant_for_a_request_is_ignored() -> None:
    handoff, agent = make()
    handoff.expect(1)
    handoff.open(1, 20, [3])
    handoff.grant(1, grant(77))
    handoff.grant(1, grant(78))
    assert agent.calls == [("begin", 77, (3,))]


def test_closing_an_open_transfer_aborts_it_and_its_end_is_still_told() -> None:
    handoff, agent = make()
    handoff.expect(1)
    handoff.open(1, 20, [3])
    handoff.grant(1, grant())
    assert handoff.close(1)
    assert agent.calls[-1] == ("abort", 77)
    assert handoff.ended(77) == 1
    assert handoff.ended(77) is None


def test_closing_before_the_grant_leaves_nothing_to_wait_for() -> None:
    handoff, agent = make()
    handoff.expect(1)
    handoff.open(1, 20, [3])
    assert not handoff.close(1)
    handoff.grant(1, grant())
    handoff.ready(1, Span(0, 1), TOKENS)
    assert agent.calls == []


def test_what_is_cached_is_sent_when_it_is_where_the_agent_reads() -> None:
    """On a GPU a prefix that another request has computed may still be on its way."""
    later: list[Callable[[], None]] = []
    agent = FakeAgent()
    handoff = Handoff(agent, layers=2, then=later.append)  # type: ignore[arg-type]
    handoff.expect(1)
    handoff.open(1, 20, [3, 4])
    handoff.grant(1, grant())
    handoff.cached(1, TOKENS)
    assert agent.calls == [("begin", 77, (3, 4))]
    [saved] = later
    saved()
    assert agent.calls[1:] == [("ready", 77, 0, TOKENS)]
