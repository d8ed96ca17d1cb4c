"""Routers come and go at a decode instance: their credit follows what sequences really hold."""

import asyncio

import pytest
from twinpool.v1.worker_pb2 import CreditUse

from decode.admission import Admission
from decode.credit_desk import CreditDesk, Line
from tests.unit.decode.test_admission import BLOCKS, make, reservation


class Router:
    """Answers its credits when told to."""

    def __init__(self, desk: CreditDesk, router_id: str) -> None:
        self.woken = 0
        self.line: Line = desk.begin(router_id, self._wake)

    def _wake(self) -> None:
        self.woken += 1

    def answer(self, held: int = 0, wanted: int = 0) -> None:
        self.line.take(
            CreditUse(
                serial=self.line.credit().serial,
                held=[held],
                wanted=[max(held, wanted)],
                largest=[0],
                sequences_held=int(held > 0),
            )
        )

    @property
    def blocks(self) -> int:
        [blocks] = self.line.credit().blocks
        return blocks


def started() -> tuple[Admission, CreditDesk]:
    admission, _ = make()
    return admission, CreditDesk(admission)


async def until_blocks(router: Router, blocks: int) -> None:
    async with asyncio.timeout(10):
        while router.blocks != blocks:
            await asyncio.sleep(0.01)


async def test_second_router_gets_its_part_once_the_first_has_let_go_of_it() -> None:
    _, desk = started()
    first = Router(desk, "a")
    assert (first.blocks, first.woken) == (BLOCKS, 1)
    second = Router(desk, "b")
    assert (first.blocks, second.blocks) == (BLOCKS // 2, 0)
    first.answer()
    assert (first.blocks, second.blocks) == (BLOCKS // 2, BLOCKS // 2)
    desk.check_integrity()


async def test_credit_of_a_lost_router_comes_back_as_its_sequences_end() -> None:
    admission, desk = started()
    first, second = Router(desk, "a"), Router(desk, "b")
    first.answer()
    record = admission.reserve(reservation(1, router_id="a.1.1"))
    admission.reserve(reservation(2, router_id="b.1.1"))
    held = len(record.blocks)
    first.answer(held=held)
    second.answer(held=held)
    first.line.close()
    # It is back, and has nothing to do with what its last life held.
    again = Router(desk, "a")
    assert again.blocks + second.blocks <= BLOCKS - held
    again.line.close()
    await until_blocks(second, BLOCKS - held)
    admission.end(1)
    await until_blocks(second, BLOCKS)
    desk.check_integrity()


async def test_answer_that_makes_no_sense_is_an_error() -> None:
    _, desk = started()
    router = Router(desk, "a")
    with pytest.raises(ValueError, match="serial"):
        router.line.take(CreditUse(serial=99, held=[0], wanted=[0], largest=[0]))
