"""Live agents stand a fire of messages that are almost right; with a check missing they would not.

TWINPOOL_TEST_SEED repeats a run.
"""

import os
import random

import pytest

from kvtransfer.coverage import Coverage
from kvtransfer.incoming import Incoming
from kvtransfer.receive import ReceiveAgent
from kvtransfer.send import SendAgent
from kvtransfer.settings import Lane
from tests.unit.kvtransfer.siege import Breach, besiege
from tests.unit.kvtransfer.siege_receiver import ReceiverSiege
from tests.unit.kvtransfer.siege_sender import SenderSiege

COUNT = 500
# With a check missing, this many changed messages are enough to tell.
COUNT_TO_BREACH = 3000
SEED = int(os.environ.get("TWINPOOL_TEST_SEED", random.SystemRandom().randrange(10**6)))


@pytest.mark.parametrize("siege", [ReceiverSiege, SenderSiege])
def test_no_message_makes_an_agent_do_harm(
    lane: Lane, siege: type[ReceiverSiege | SenderSiege]
) -> None:
    print(f"TWINPOOL_TEST_SEED={SEED}")
    besiege(siege(lane, SEED), COUNT)


def _nothing_refused(*_: object) -> None:
    return None


@pytest.mark.parametrize(
    ("owner", "check"),
    [(Coverage, "refusal"), (ReceiveAgent, "_check"), (Incoming, "source_for")],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_receiver_that_does_not_check_is_breached(
    lane: Lane, monkeypatch: pytest.MonkeyPatch, owner: type, check: str
) -> None:
    siege = ReceiverSiege(lane, 1)
    if check == "source_for":
        monkeypatch.setattr(owner, check, lambda incoming, *_: incoming.sources[0])
    else:
        monkeypatch.setattr(owner, check, _nothing_refused)
    with pytest.raises(Breach):
        besiege(siege, COUNT_TO_BREACH)


def test_a_sender_that_takes_any_acknowledgement_is_breached(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    def acked(agent: SendAgent, route: object, transfer_id: int, nonce: bytes) -> None:
        outgoing = agent._transfers.get(transfer_id)
        if outgoing is not None:
            agent._complete(outgoing, 0.0)

    siege = SenderSiege(lane, 1)
    monkeypatch.setattr(SendAgent, "_acked", acked)
    with pytest.raises(Breach):
        besiege(siege, COUNT_TO_BREACH)
